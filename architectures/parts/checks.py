"""What a model config may not say, each refused with its reason.

The type, range and choices of each field are checked where a config is made
(tables.py), and each chosen entry of a table checks its own fields. What is
left for this file are combinations of parts that nobody can mean.
"""

from collections.abc import Callable, Iterable

from architectures.parts import heads
from architectures.parts import kinds
from architectures.parts import linear
from architectures.parts import mixers
from architectures.parts import positions
from architectures.parts.attention import visibility
from architectures.parts.blocks import BLOCKS
from architectures.parts.config import ModelConfig
from architectures.parts.ffn import FFNS, NONE
from architectures.parts.moe import health
from architectures.parts.moe import routing
from architectures.parts.tables import get
from configs.errors import RequestError, require


def check_model(c: ModelConfig, stack: str,
                archs: Callable[[str], Iterable[str]]) -> None:
  """Raises RequestError: a sentence with the field, its value, the choices.

  Args:
    c: the config.
    stack: what its architecture stacks: 'decoder', 'encoder' or
      'encoder-decoder'.
    archs: the architectures that stack such a thing, to choose from.
  """
  kinds.check_kinds(c)
  _check_layers(c, stack)
  for name in c.kinds_used:
    if name:
      with kinds.named(name):
        _check_layers(c.of_kind(name), stack)
  _check_values(c)
  _check_stack(c, stack, archs)
  _check_products(c)
  heads.HEADS[c.head].check(c)
  require(c.head == 'lm' or stack != 'encoder-decoder',
          f'model.head is {c.head!r}, which model.arch {c.arch!r} does not '
          'have: an encoder-decoder answers in text (objective seq2seq)')
  if c.has_experts:
    require(c.moe.top_k <= c.moe.num_experts,
            f'model.moe.top_k is {c.moe.top_k}: choose 1 to '
            f'model.moe.num_experts {c.moe.num_experts}')
    routing.check_router(c, stack)
    health.check_balance(c.moe)


def _check_layers(c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what the layers of a model, or those of one kind,
  cannot be."""
  position, mixer = positions.of(c), mixers.of(c)
  mixer.check(c, stack)  # which may refuse the position
  if position.check and (mixer.turns_heads or not position.rotate):
    position.check(c, stack)
  visibility.KINDS[c.attention].check(c)
  _check_block(c, stack)
  require(c.num_heads % c.num_kv_heads == 0,
          f'model.num_kv_heads is {c.num_kv_heads}, which does not divide '
          f'model.num_heads {c.num_heads}')


def _check_block(c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what the wiring does not say that it can do."""
  def able(what: str) -> str:
    return ', '.join(x for x, block in BLOCKS.items() if getattr(block, what))
  block = BLOCKS[c.block]
  require(c.residual == 'plain' or block.STREAMS, f'model.residual is '
          f'{c.residual!r}, which model.block {c.block!r} has no equation for: '
          f"choose 'plain', or model.block from {able('STREAMS')}")
  require(c.ffn != NONE or block.WITHOUT_FFN, f'model.ffn is {NONE!r}, and '
          f'model.block {c.block!r} has no equation without a feed-forward '
          f'network: choose it from {able("WITHOUT_FFN")}')
  require(stack != 'encoder-decoder' or block.CROSS,
          f'model.block is {c.block!r}, which has no cross-attention, and '
          f'model.arch {c.arch!r} is an encoder-decoder: choose it from '
          f'{able("CROSS")}')


def _check_values(c: ModelConfig) -> None:
  """Raises RequestError where the first layer's values fit no other layer."""
  sizes = {(own.num_kv_heads, own.head_dim)
           for own in mixers.readers(c, 'value_residual')}
  require(not c.value_residual or len(sizes) == 1, 'model.value_residual is '
          'True, but model.kinds has layers whose values differ in '
          f'num_kv_heads or head_dim, {" and ".join(map(str, sorted(sizes)))}: '
          'the values of the first layer are mixed into all, so choose one '
          'size, or set it to False')


def products(c: ModelConfig) -> list[str]:
  """Returns which of linear.PRODUCTS the model has, outside of experts."""
  there: set[str] = set()
  for kind in map(c.of_kind, c.kinds_used):
    there |= mixers.of(kind).products(kind)
    if kind.ffn != NONE and (kind.ffn != 'moe' or c.moe.shared_experts):
      ffn = c.moe.ffn if kind.ffn == 'moe' else kind.ffn
      there |= {'up', 'down'} | ({'gate'} if FFNS[ffn].gated else set())
  return [name for name in linear.PRODUCTS if name in there]


def _check_products(c: ModelConfig) -> None:
  """Raises RequestError for a product that is to get a low-rank adapter, or
  whose weight is to stay gathered, and that no layer has outside of experts."""
  there = products(c)
  for field, read in (('lora.targets', c.lora.rank > 0),
                      ('keep_gathered', c.keep_gathered != 'none')):
    for name in get(c, field).split(',') if read else ():
      require(name == linear.ALL or name in there,
              f'model.{field} has {name!r}, a product that no layer of this '
              'model has outside of its experts, which are left out: choose '
              f'from {", ".join(there)}, {linear.ALL}')


def _check_stack(c: ModelConfig, stack: str,
                 archs: Callable[[str], Iterable[str]]) -> None:
  """Raises RequestError for what the stack of `c` has no use for."""
  for field, rest, kind in (
      ('type_vocab_size', 0, 'encoder'), ('next_sentence', False, 'encoder'),
      ('pooling', 'cls', 'encoder'),
      ('mtp_depth', 0, 'decoder'),
      ('num_decoder_layers', c.num_layers, 'encoder-decoder')):
    if stack != kind and get(c, field) != rest:
      raise RequestError(
          f'model.{field} {get(c, field)!r} has no meaning with model.arch '
          f'{c.arch!r}, which does not read it: set it to {rest!r}, or '
          f'choose model.arch from {", ".join(archs(kind))}')
  require(c.ffn != NONE or stack != 'encoder', f'model.ffn is {NONE!r}, and '
          f'the head of masked words of model.arch {c.arch!r} has the '
          'activation of the layers: set model.ffn to a network, and '
          f'ffn={NONE} of the kinds of layer that have none')
  last = 'suffix' if c.suffix else 'pattern'
  require(not c.mtp_depth or c.sections(c.num_layers)[-1].kinds[-1].source
          is None, f'model.mtp_depth is {c.mtp_depth}, but the last layer of '
          f'model.{last} {getattr(c, last)!r}, whose kind the modules that '
          'predict further tokens have, reads the keys of another layer: end '
          f'the {last} with a kind that has keys of its own, or set it to 0')
  # training/optim/mup.py has rules for the parameters of these.
  if c.parametrization == 'mup' and stack != 'decoder':
    raise RequestError(
        "model.parametrization is 'mup', which has no rules for model.arch "
        f'{c.arch!r}: choose from {", ".join(archs("decoder"))}')
