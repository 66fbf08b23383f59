"""What a model config may not say, each refused with its reason.

The type, range and choices of each field are checked where a config is made
(tables.py), and each chosen entry of a table checks its own fields. What is
left for this file are combinations of parts that nobody can mean.
"""

from collections.abc import Callable, Iterable

from architectures.parts import blocks
from architectures.parts import heads
from architectures.parts import layers
from architectures.parts import positions
from architectures.parts.attention import kernels
from architectures.parts.blocks import BLOCKS
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.layers import FFNS, NO_FFN
from architectures.parts.moe import routing
from architectures.parts.tables import get
from configs import kinds
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
  _check_kinds(c)
  for name in dict.fromkeys(('', *c.kinds_used)):
    try:
      _check_layers(c.of_kind(name), stack)
    except RequestError as error:
      raise RequestError(f'model.kinds.{name}: {error}' if name else
                         str(error)) from error
  _check_values(c)
  _check_stack(c, stack, archs)
  _check_products(c)
  heads.HEADS[c.head].check(c)
  require(c.head == 'lm' or stack != 'encoder-decoder',
          f'model.head is {c.head!r}, which model.arch {c.arch!r} does not '
          'have: an encoder-decoder answers in text (objective seq2seq)')
  if c.has_experts:
    routing.check_router(c, stack)


def _check_kinds(c: ModelConfig) -> None:
  """Raises RequestError for a pattern that names what is not there, kinds that
  it does not name, and layers that it does not divide."""
  names = {field: kinds.split(getattr(c, field))
           for field in ('pattern', 'prefix', 'suffix')}
  said = ', '.join(f'model.{field} {getattr(c, field)!r}' for field in names)
  for name in sum(names.values(), ()):
    require(name in c.kinds, f'{said} name the kind of layer {name!r}, which '
            'model.kinds does not have: there are '
            f'{", ".join(c.kinds) or "none"}')
  unused = ', '.join(name for name in c.kinds if name not in c.kinds_used)
  require(not unused, f'model.kinds has {unused}, which no layer is by {said}')
  period = len(c.layer_pattern())
  for field in ('num_layers', 'num_decoder_layers'):
    rest = getattr(c, field) - len(names['prefix'] + names['suffix'])
    require(rest > 0 and rest % period == 0, f'model.{field} is '
            f'{getattr(c, field)}: without those of the prefix and the suffix '
            f'it must be a multiple of the {period} layers of the period, by '
            f'{said}')
  sections = c.sections(c.num_layers)
  for section in sections:
    for kind in section.kinds:
      if kind.name:
        _check_position(c, kind.name)
      if c.of_kind(kind.name).kv_sharing:
        _check_sharing(c, kind, section.kinds, sections[0].kinds)


def _check_sharing(c: ModelConfig, kind: LayerKind,
                   layers: tuple[LayerKind, ...],
                   prefix: tuple[LayerKind, ...]) -> None:
  """Raises RequestError for a layer that is to read another's keys and values,
  where none before it has any, or they are not as its own would be."""
  reader = c.of_kind(kind.name)
  who = (f'model.kinds.{kind.name}.' if kind.name else 'model.') + (
      'kv_sharing is True, but ')
  require(reader.mixer == 'attention',
          f'{who}mixer {reader.mixer!r} reads no keys')
  require(kind.source is not None, f'{who}no layer before it, in its period of '
          'model.pattern, in model.prefix, or in model.suffix if it is there, '
          'is one of attention that sees as many keys and has its own: put one '
          'there, by a kind of layer with kv_sharing=False')
  source = kind.source or 0
  lender = c.of_kind((layers if source >= 0 else prefix)[source].name)
  for field in ('num_kv_heads', 'head_dim', 'position', 'rope'):
    mine, theirs = getattr(reader, field), getattr(lender, field)
    require(mine == theirs, f'{who}model.{field} of the layer is {mine!r}, and '
            f'{theirs!r} of the layer whose keys it reads: choose one for both')


def _check_position(c: ModelConfig, name: str) -> None:
  """Raises RequestError for an encoding that a layer cannot have alone."""
  layer, whole = c.of_kind(name), lambda row: row.embed or row.stack_bias
  require(layer.position == c.position or not whole(positions.of(layer)),
          f'model.kinds.{name}.position is {layer.position!r}, which is no '
          'encoding of one layer: set it as model.position, or choose from '
          + ', '.join(key for key, row in positions.POSITIONS.items()
                      if not whole(row)))
  require(layer.num_heads == c.num_heads or not positions.of(layer).stack_bias,
          f'model.kinds.{name}.num_heads is {layer.num_heads}, and the bias of '
          f'model.position {layer.position!r}, which all layers share, is of '
          f'{c.num_heads} heads')


def _check_layers(c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what the layers of a model, or those of one kind,
  cannot be."""
  position, mixer = positions.of(c), blocks.mixer_of(c)
  mixer.check(c, stack)  # which may refuse the position
  if mixer.turns_heads or not position.rotate:
    position.check(c, stack)
  kernels.RULES[c.attention].check(c)
  for able, needed, field in (
      ('STREAMS', c.residual != 'plain', f'model.residual {c.residual!r}'),
      ('WITHOUT_FFN', c.ffn == NO_FFN, f'model.ffn {NO_FFN!r}'),
      ('CROSS', stack == 'encoder-decoder', f'model.arch {c.arch!r}')):
    require(not needed or getattr(BLOCKS[c.block], able),
            f'model.block is {c.block!r}, which has no equation for {field}: '
            'choose it from ' + ', '.join(
                x for x, block in BLOCKS.items() if getattr(block, able)))
  require(c.num_heads % c.num_kv_heads == 0,
          f'model.num_kv_heads is {c.num_kv_heads}, which does not divide '
          f'model.num_heads {c.num_heads}')


def _check_values(c: ModelConfig) -> None:
  """Raises RequestError where the first layer's values fit no other layer."""
  sizes = {(layer.num_kv_heads, layer.head_dim)
           for layer in blocks.readers(c, 'value_residual')}
  require(not c.value_residual or len(sizes) == 1, 'model.value_residual is '
          'True, but the values of the kinds of layer differ in num_kv_heads '
          f'or head_dim, {" and ".join(map(str, sorted(sizes)))}: choose one '
          'size, as those of the first layer are mixed into all')


def products(c: ModelConfig) -> list[str]:
  """Returns which of layers.PRODUCTS the model has, outside of experts."""
  there: set[str] = set()
  for kind in map(c.of_kind, c.kinds_used):
    there |= blocks.mixer_of(kind).products(kind)
    if kind.ffn != NO_FFN and (kind.ffn != 'moe' or c.moe.shared_experts):
      ffn = c.moe.ffn if kind.ffn == 'moe' else kind.ffn
      there |= {'up', 'down'} | ({'gate'} if FFNS[ffn].gated else set())
  return [name for name in layers.PRODUCTS if name in there]


def _check_products(c: ModelConfig) -> None:
  """Raises RequestError for a product that is to get a low-rank adapter, or
  whose weight is to stay gathered, and that no layer has outside of experts."""
  there = (*products(c), layers.ALL)
  for field, read in (('lora.targets', c.lora.rank > 0),
                      ('keep_gathered', c.keep_gathered != 'none')):
    for name in get(c, field).split(',') if read else ():
      require(name in there, f'model.{field} has {name!r}, a product that no '
              'layer of this model has outside of its experts, which are left '
              f'out: choose from {", ".join(there)}')


def _check_stack(c: ModelConfig, stack: str,
                 archs: Callable[[str], Iterable[str]]) -> None:
  """Raises RequestError for what the stack of `c` has no use for."""
  for field, rest, kind in (
      ('type_vocab_size', 0, 'encoder'), ('next_sentence', False, 'encoder'),
      ('pooling', 'cls', 'encoder'),
      ('mtp_depth', 0, 'decoder'),
      ('attention_conv', 0, 'decoder'),
      # training/optim/mup.py has rules for the parameters of decoders alone.
      ('parametrization', 'standard', 'decoder'),
      ('num_decoder_layers', c.num_layers, 'encoder-decoder')):
    for value in (get(x, field) for x in (c, *map(c.of_kind, c.kinds_used))):
      if stack != kind and value != rest:  # else no page is imported
        raise RequestError(
            f'model.{field} {value!r} has no meaning with model.arch '
            f'{c.arch!r}: set it to {rest!r}, or choose model.arch from '
            f'{", ".join(archs(kind))}')
  require(c.ffn != NO_FFN or stack != 'encoder', f'model.ffn is {NO_FFN!r}, '
          f'and the head of masked words of model.arch {c.arch!r} has the '
          'activation of the layers: set model.ffn to a network, and '
          f'ffn={NO_FFN} of the kinds of layer that have none')
  require(not c.mtp_depth or c.layer_kinds(c.num_layers)[-1].source is None,
          f'model.mtp_depth is {c.mtp_depth}, but the last layer, whose kind '
          'the modules that predict further tokens have, reads the keys of '
          'another layer: end the pattern or the suffix with a kind that has '
          'keys of its own')
