"""All parts of a model by their tables, and what a model may not say.

A part is an entry of a table. An entry may have `settings`, the dataclass of
its fields (common/fields.py), whose group of config.model is called as the
entry, or as the dataclass's GROUP; and `fields`, the names of other fields that
not every entry reads. flat.py makes a model of these names.
"""

import collections
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from architectures.parts import blocks
from architectures.parts import heads
from architectures.parts import layers
from architectures.parts import lookup
from architectures.parts import positions
from architectures.parts import skeletons
from architectures.parts import streams
from architectures.parts.attention import kernels
from architectures.parts.attention import multi_head
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.blocks import BLOCKS
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.heads import GeneratorConfig
from architectures.parts.layers import FFNS, NO_FFN, NORMS, REMAT
from architectures.parts.loops import LoopsConfig
from architectures.parts.moe import dispatch
from architectures.parts.moe import grouped
from architectures.parts.moe import layer as moe_layer
from architectures.parts.moe import routing
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.positions import RopeConfig
from common.errors import RequestError, require

# Where a part is chosen: its table.
TABLES: dict[str, Mapping[str, Any]] = {
    'norm': NORMS,
    'position': positions.POSITIONS,
    'rope.scaling': positions.SCALINGS,
    'ffn': collections.ChainMap({'moe': moe_layer.MoE, NO_FFN: None}, FFNS),
    'moe.ffn': FFNS,
    'moe.router': routing.ROUTERS,
    'moe.balance_loss': routing.BALANCE_LOSSES,
    'block': BLOCKS,
    'residual': streams.RESIDUALS,
    'loop': skeletons.LOOPS,
    'mixer': blocks.MIXERS,
    'memory': lookup.MEMORIES,
    'attention': kernels.RULES,
    'head': heads.HEADS,
}
# The choices of each field that names a part, or several with commas between.
CHOICES: dict[str, Collection[str]] = {
    **TABLES,
    'head': collections.ChainMap(heads.HEADS, {'': None}),
    'pooling': heads.POOLINGS,
    'attention_gate': multi_head.GATES,
    'attention_kernel': collections.ChainMap(
        kernels.KERNELS, dict.fromkeys(('auto', 'xla'))),
    'init': layers.INITS,
    'lora.targets': (*layers.PRODUCTS, layers.ALL),
    'remat': REMAT,
    'keep_gathered': ('none', *layers.PRODUCTS, layers.ALL),
    'moe.dispatch': ('auto', *dispatch.WAYS),
    'moe.grouped_kernel': grouped.GROUPED_KERNELS,
}


# What a model config may not say, each refused with its reason.
#
# The type, range and choices of each field are checked where a config is made,
# and each chosen entry of a table checks its own fields. What is left here are
# combinations of parts that nobody can mean.


def check_model(c: ModelConfig, stack: str,
                archs: Callable[[str], Iterable[str]]) -> None:
  """Raises RequestError: a sentence with the field, its value, the choices.

  Args:
    c: the config.
    stack: what its architecture stacks: 'decoder', 'encoder' or
      'encoder-decoder'.
    archs: the architectures that stack such a thing, to choose from.
  """
  _check_pattern(c)
  for name in dict.fromkeys(('', *c.kinds_used)):
    try:
      _check_layers(c.of_kind(name), stack)
    except RequestError as error:
      raise RequestError(f'model.kinds.{name}: {error}' if name else
                         str(error)) from error
  _check_values(c)
  if c.find(LoopsConfig):
    _check_loop(c)
  _check_stack(c, stack, archs)
  _check_products(c)
  heads.HEADS[c.head].check(c)
  if c.head != 'lm' and stack == 'encoder-decoder':
    raise RequestError(
        f'model.head is {c.head!r}, which model.arch {c.arch!r} does not have: '
        'an encoder-decoder answers in text (objective seq2seq)')
  if c.find(GeneratorConfig) and stack != 'encoder':  # else no page is imported
    raise RequestError(
        f'model.head is {c.head!r}, which model.arch {c.arch!r} does not have: '
        f'choose model.arch from {", ".join(archs("encoder"))}')
  for kind in c.distinct_layers:
    if kind.ffn == 'moe':
      routing.check_router(kind, stack)


def _check_pattern(c: ModelConfig) -> None:
  """Raises RequestError for a pattern that names what is not there, kinds that
  it does not name, and layers that it does not divide."""
  first, period, last = c.names_of_layers
  settings = (f'model.pattern {c.pattern!r}, model.prefix {c.prefix!r}, '
              f'model.suffix {c.suffix!r}')
  for name in c.kinds_used:
    if name and name not in c.kinds:
      raise RequestError(
          f'{settings} name the kind of layer {name!r}, which model.kinds does '
          f'not have: there are {", ".join(c.kinds) or "none"}')
  unused = [name for name in c.kinds if name not in c.kinds_used]
  if unused:
    raise RequestError(f'model.kinds has {", ".join(unused)}, which no layer '
                       f'is by {settings}')
  for field, count in (('num_layers', c.num_layers),
                       ('num_decoder_layers', c.num_decoder_layers)):
    rest = count - len(first) - len(last)
    if rest <= 0 or rest % len(period):
      raise RequestError(
          f'model.{field} is {count}: without those of the prefix and the '
          f'suffix it must be a multiple of the {len(period)} layers of the '
          f'period, by {settings}')
  sections = c.sections(c.num_layers)
  for section in sections:
    for kind in section.kinds:
      if kind.name:
        _check_position(c, kind.name)
      if c.of_kind(kind.name).shares_keys:
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
  ropes = reader.find(RopeConfig), lender.find(RopeConfig)
  same = {field: (getattr(reader, field), getattr(lender, field))
          for field in ('num_kv_heads', 'head_dim', 'position')}
  for field, (mine, theirs) in {**same, 'rope': ropes}.items():
    require(mine == theirs, f'{who}model.{field} of the layer is {mine!r}, and '
            f'{theirs!r} of the layer whose keys it reads: choose one for both')


def _check_position(c: ModelConfig, name: str) -> None:
  """Raises RequestError for an encoding that a layer cannot have alone."""
  layer = c.of_kind(name)
  require(layer.position == c.position or not positions.of(layer).of_stack,
          f'model.kinds.{name}.position is {layer.position!r}, which is no '
          'encoding of one layer: set it as model.position, or choose from '
          + ', '.join(key for key, row in positions.POSITIONS.items()
                      if not row.of_stack))
  require(layer.num_heads == c.num_heads or not positions.of(layer).stack_bias,
          f'model.kinds.{name}.num_heads is {layer.num_heads}, and the bias of '
          f'model.position {layer.position!r}, which all layers share, is of '
          f'{c.num_heads} heads')


def _check_layers(c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what the layers of a model, or those of one kind,
  cannot be."""
  position, mixer = positions.of(c), blocks.mixer_of(c)
  mixer.check(c, stack)  # which may refuse the position
  if (mixer.positional or position.of_stack) and (
      mixer.turns_heads or not position.rotate):
    position.check(c, stack)
  kernels.RULES[c.attention].check(c, stack)
  if c.memory != lookup.NO_MEMORY:
    lookup.check(c)
  if c.layer_scale and c.residual != 'plain':
    raise RequestError(
        'model.layer_scale is True, which multiplies one stream, and '
        f"model.residual {c.residual!r} has others: set it to 'plain'")
  for able, needed, field in (
      ('STREAMS', c.residual != 'plain', f'model.residual {c.residual!r}'),
      ('STREAMS', c.residual_scale != 1,
       f'model.residual_scale {c.residual_scale}'),
      ('WITHOUT_FFN', c.ffn == NO_FFN, f'model.ffn {NO_FFN!r}'),
      ('CROSS', stack == 'encoder-decoder', f'model.arch {c.arch!r}')):
    if needed and not getattr(BLOCKS[c.block], able):
      choices = [x for x, block in BLOCKS.items() if getattr(block, able)]
      raise RequestError(
          f'model.block is {c.block!r}, which has no equation for {field}: '
          f'choose it from {", ".join(choices)}')
  if c.num_heads % c.num_kv_heads:
    raise RequestError(
        f'model.num_kv_heads is {c.num_kv_heads}, which does not divide '
        f'model.num_heads {c.num_heads}')


def _check_values(c: ModelConfig) -> None:
  """Raises RequestError where the first layer's values fit no other layer."""
  attention = c.find(AttentionConfig)
  if attention is None or not attention.value_residual:
    return
  sizes = {(layer.num_kv_heads, layer.head_dim)
           for layer in c.distinct_layers if layer.mixer == 'attention'}
  if len(sizes) != 1:
    raise RequestError(
        'model.value_residual is True, but the values of the kinds of layer '
        'differ in num_kv_heads or head_dim, '
        f'{" and ".join(map(str, sorted(sizes)))}: choose one size, as those '
        'of the first layer are mixed into all')


def _check_loop(c: ModelConfig) -> None:
  """Raises RequestError for layers that cannot be run several times so."""
  loops, who = c.part(LoopsConfig), f'model.loop is {c.loop!r}, '
  joins, norm = c.loop != 'plain', loops.boundary != 'none'
  require(c.residual == 'plain' or not (joins or norm), f'{who}model.loops.'
          f'boundary is {loops.boundary!r} and model.residual {c.residual!r}: '
          "several streams are handed on as they are, by loop 'plain' and "
          "boundary 'none'")
  last = c.of_kind(c.layer_kinds(c.num_layers)[-1].name)
  require(not norm or BLOCKS[last.block].FINAL_NORM, f"{who}model.loops."
          f"boundary is 'norm', and after layers of model.block {last.block!r} "
          "there is no final norm: set it to 'none'")
  require(loops.gradient_passes <= loops.passes, f'{who}model.loops.'
          f'gradient_passes is {loops.gradient_passes}: choose from 1 to the '
          f'{loops.passes} of model.loops.passes, or 0 for all')
  require(joins or loops.gradient_passes in (0, loops.passes), f'{who}model.'
          f'loops.gradient_passes is {loops.gradient_passes}: the last passes '
          'read nothing but the state, so what comes before them would have no '
          'gradient; set it to 0, or choose add, concat or gate')
  require(c.keep_gathered == 'none', f'{who}model.keep_gathered '
          f'{c.keep_gathered!r}: each pass would keep weights that all passes '
          'share; set it to none')


def products(c: ModelConfig) -> list[str]:
  """Returns which of layers.PRODUCTS the model has, outside of experts."""
  there: set[str] = set()
  for layer in c.distinct_layers:
    there |= blocks.mixer_of(layer).products(layer)
    ffn = layer.ffn
    if ffn == 'moe':
      moe = layer.part(MoEConfig)
      ffn = moe.ffn if moe.shared_experts else NO_FFN
    if ffn == NO_FFN:
      continue
    there |= {'up', 'down'}
    if FFNS[ffn].gated:
      there.add('gate')
  return [name for name in layers.PRODUCTS if name in there]


def _check_products(c: ModelConfig) -> None:
  """Raises RequestError for a product that is to get a low-rank adapter, or
  whose weight is to stay gathered, and that no layer has outside of experts."""
  named = []
  if c.lora.rank:
    named += [('lora.targets', x) for x in c.lora.targets.split(',')]
  if c.keep_gathered != 'none':
    named += [('keep_gathered', x) for x in c.keep_gathered.split(',')]
  if not named:
    return
  there = (*products(c), layers.ALL)
  for field, name in named:
    if name not in there:
      raise RequestError(
          f'model.{field} has {name!r}, a product that no layer of this model '
          'has outside of its experts, which are left out: choose from '
          f'{", ".join(there)}')


def _check_stack(c: ModelConfig, stack: str,
                 archs: Callable[[str], Iterable[str]]) -> None:
  """Raises RequestError for what the stack of `c` has no use for."""
  layers_ = [c]
  if c.kinds:
    layers_ += c.distinct_layers
  for field, rest, kind in (
      ('type_vocab_size', 0, 'encoder'), ('next_sentence', False, 'encoder'),
      ('pooling', 'cls', 'encoder'), ('embed_dim', 0, 'encoder'),
      ('mtp_depth', 0, 'decoder'),
      ('branch_conv', 0, 'decoder'),
      ('memory', lookup.NO_MEMORY, 'decoder'),
      # training/optim/mup.py has rules for the parameters of decoders alone.
      ('parametrization', 'standard', 'decoder'),
      ('num_decoder_layers', c.num_layers, 'encoder-decoder')):
    for layer in layers_:
      value = getattr(layer, field)
      if stack != kind and value != rest:  # else no page is imported
        raise RequestError(
            f'model.{field} {value!r} has no meaning with model.arch '
            f'{c.arch!r}: set it to {rest!r}, or choose model.arch from '
            f'{", ".join(archs(kind))}')
  attention = c.find(AttentionConfig)
  if stack != 'decoder' and attention is not None:
    for layer in layers_:
      conv = layer.part(AttentionConfig).attention_conv
      if conv:
        raise RequestError(
            f'model.attention_conv {conv!r} has no meaning with model.arch '
            f'{c.arch!r}: set it to 0, or choose model.arch from '
            f'{", ".join(archs("decoder"))}')
  if c.ffn == NO_FFN and stack == 'encoder':
    raise RequestError(
        f'model.ffn is {NO_FFN!r}, and the head of masked words of model.arch '
        f'{c.arch!r} has the activation of the layers: set model.ffn to a '
        f'network, and ffn={NO_FFN} of the kinds of layer that have none')
  if not c.mtp_depth:
    return
  last = c.layer_kinds(c.num_layers)[-1]
  require(c.of_kind(last.name).memory == lookup.NO_MEMORY,
          f'model.mtp_depth is {c.mtp_depth}, but the last layer, whose kind '
          'the modules that predict further tokens have, reads tables of '
          f"model.memory: end with a kind of memory {lookup.NO_MEMORY!r}")
  require(last.source is None,
          f'model.mtp_depth is {c.mtp_depth}, but the last layer, whose kind '
          'the modules that predict further tokens have, reads the keys of '
          'another layer: end the pattern or the suffix with a kind that has '
          'keys of its own')
