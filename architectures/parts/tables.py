"""All parts of a model by their tables, and the combinations of parts that are
refused.

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
from architectures.parts import passes
from architectures.parts import positions
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

# The table of each field that chooses a part.
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
    'loop': passes.LOOPS,
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
    'init': layers.WEIGHT_DISTRIBUTIONS,
    'lora.targets': (*layers.NAMES_OF_PRODUCTS, layers.ALL_PRODUCTS),
    'remat': REMAT,
    'keep_gathered': ('none', *layers.NAMES_OF_PRODUCTS, layers.ALL_PRODUCTS),
    'moe.dispatch': ('auto', *dispatch.DISPATCHES),
    'moe.grouped_kernel': grouped.GROUPED_KERNELS,
}


# The combinations of parts that nobody can mean are refused, each with its
# reason. The type, range and choices of a field are checked where a config is
# made, and each chosen entry of a table checks its own fields.


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
      if not name:
        raise
      raise RequestError(f'model.kinds.{name}: {error}') from error
  _check_value_residual(c)
  if c.find(LoopsConfig):
    _check_loop(c)
  _check_stack(c, stack, archs)
  _check_products(c)
  _check_head(c, stack, archs)
  for kind in c.distinct_layers:
    if kind.ffn == 'moe':
      routing.check_router(kind, stack)


def _check_head(c: ModelConfig, stack: str,
                archs: Callable[[str], Iterable[str]]) -> None:
  """Raises RequestError for a head that the model cannot have."""
  check = heads.HEADS[c.head].check
  if check is not None:
    check(c)
  if c.head != 'lm' and stack == 'encoder-decoder':
    raise RequestError(
        f'model.head is {c.head!r}, which model.arch {c.arch!r} does not have: '
        'an encoder-decoder answers in text (objective seq2seq)')
  if c.find(GeneratorConfig) and stack != 'encoder':  # else no page is imported
    raise RequestError(
        f'model.head is {c.head!r}, which model.arch {c.arch!r} does not have: '
        f'choose model.arch from {", ".join(archs("encoder"))}')


def _check_pattern(c: ModelConfig) -> None:
  """Raises RequestError for a pattern that names what is not there, kinds that
  it does not name, and layers that it does not divide."""
  first, period, last = c.kind_names_of_sections
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

  # The layers between the prefix and the suffix are whole periods.
  for field, count in (('num_layers', c.num_layers),
                       ('num_decoder_layers', c.num_decoder_layers)):
    rest = count - len(first) - len(last)
    if rest <= 0 or rest % len(period):
      raise RequestError(
          f'model.{field} is {count}: without those of the prefix and the '
          f'suffix it must be a multiple of the {len(period)} layers of the '
          f'period, by {settings}')

  # Each layer has a place, and may read the keys of one before it.
  sections = c.sections(c.num_layers)
  for section in sections:
    for kind in section.kinds:
      if kind.name:
        _check_position(c, kind.name)
      if c.of_kind(kind.name).shares_keys:
        _check_shared_keys(
  c,
  kind,
  layers=section.kinds,
   prefix=sections[0].kinds)


def _check_shared_keys(c: ModelConfig, kind: LayerKind,
                   layers: tuple[LayerKind, ...],
                   prefix: tuple[LayerKind, ...]) -> None:
  """Raises RequestError for a layer that is to read another's keys and values,
  where none before it has any, or they are not as its own would be.

  Args:
    c: the model.
    kind: the layer.
    layers: the layers of its section.
    prefix: the layers of the first section.
  """
  reader = c.of_kind(kind.name)
  who = 'model.'
  if kind.name:
    who = f'model.kinds.{kind.name}.'
  who += 'kv_sharing is True, but '
  require(reader.mixer == 'attention',
          f'{who}mixer {reader.mixer!r} reads no keys')
  source = kind.source
  if source is None:
    raise RequestError(
        f'{who}no layer before it, in its period of model.pattern, in '
        'model.prefix, or in model.suffix if it is there, is one of attention '
        'that sees as many keys and has its own: put one there, by a kind of '
        'layer with kv_sharing=False')

  # A place below 0 is one of the prefix.
  lender_kind = layers[source]
  if source < 0:
    lender_kind = prefix[source]
  lender = c.of_kind(lender_kind.name)
  pairs: dict[str, tuple[Any, Any]] = {}
  for field in ('num_kv_heads', 'head_dim', 'position'):
    pairs[field] = getattr(reader, field), getattr(lender, field)
  pairs['rope'] = reader.find(RopeConfig), lender.find(RopeConfig)
  for field, (of_reader, of_lender) in pairs.items():
    require(of_reader == of_lender,
            f'{who}model.{field} of the layer is {of_reader!r}, and '
            f'{of_lender!r} of the layer whose keys it reads: choose one for '
            'both')


def _check_position(c: ModelConfig, name: str) -> None:
  """Raises RequestError for an encoding that a layer cannot have alone."""
  layer = c.of_kind(name)
  position = positions.position_of(layer)
  if layer.position != c.position and position.of_stack:
    choices = [choice for choice, entry in positions.POSITIONS.items()
               if not entry.of_stack]
    raise RequestError(
        f'model.kinds.{name}.position is {layer.position!r}, which is no '
        'encoding of one layer: set it as model.position, or choose from '
        f'{", ".join(choices)}')
  require(layer.num_heads == c.num_heads or not position.stack_bias,
          f'model.kinds.{name}.num_heads is {layer.num_heads}, and the bias of '
          f'model.position {layer.position!r}, which all layers share, is of '
          f'{c.num_heads} heads')


def _check_layers(c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what the layers of a model, or those of one kind,
  cannot be."""
  # Each chosen part has a check of its own; a mixer may refuse the position.
  position, mixer = positions.position_of(c), blocks.MIXERS[c.mixer]
  mixer.check(c, stack)
  has_positions = mixer.positional or position.of_stack
  turns = mixer.turns_heads or not position.rotate
  if has_positions and turns:
    position.check(c, stack)
  check_rule = kernels.RULES[c.attention].check
  if check_rule is not None:
    check_rule(c, stack)
  if c.memory != lookup.NAME_OF_NO_MEMORY:
    lookup.check_memory(c)

  if c.layer_scale and c.residual != 'plain':
    raise RequestError(
        'model.layer_scale is True, which multiplies one stream, and '
        f"model.residual {c.residual!r} has others: set it to 'plain'")
  _check_block(c, stack)
  if c.num_heads % c.num_kv_heads:
    raise RequestError(
        f'model.num_kv_heads is {c.num_kv_heads}, which does not divide '
        f'model.num_heads {c.num_heads}')


def _check_block(c: ModelConfig, stack: str) -> None:
  """Raises RequestError for a block that is not wired for what its layers are
  to have."""
  needs = []  # pairs of an attribute of a block, and the field that needs it
  if c.residual != 'plain':
    needs.append(('STREAMS', f'model.residual {c.residual!r}'))
  if c.residual_scale != 1:
    needs.append(('STREAMS', f'model.residual_scale {c.residual_scale}'))
  if c.ffn == NO_FFN:
    needs.append(('WITHOUT_FFN', f'model.ffn {NO_FFN!r}'))
  if stack == 'encoder-decoder':
    needs.append(('CROSS', f'model.arch {c.arch!r}'))
  for able, field in needs:
    if not getattr(BLOCKS[c.block], able):
      choices = [name for name, block in BLOCKS.items() if getattr(block, able)]
      raise RequestError(
          f'model.block is {c.block!r}, which has no equation for {field}: '
          f'choose it from {", ".join(choices)}')


def _check_value_residual(c: ModelConfig) -> None:
  """Raises RequestError where the first layer's values fit no other layer."""
  attention = c.find(AttentionConfig)
  if attention is None or not attention.value_residual:
    return
  sizes = set()
  for layer in c.distinct_layers:
    if layer.mixer == 'attention':
      sizes.add((layer.num_kv_heads, layer.head_dim))
  if len(sizes) != 1:
    listed = [str(size) for size in sorted(sizes)]
    raise RequestError(
        'model.value_residual is True, but the values of the kinds of layer '
        'differ in num_kv_heads or head_dim, '
        f'{" and ".join(listed)}: choose one size, as those '
        'of the first layer are mixed into all')


def _check_loop(c: ModelConfig) -> None:
  """Raises RequestError for layers that cannot be run several times so."""
  loops, who = c.part(LoopsConfig), f'model.loop is {c.loop!r}, '
  joins, has_norm = c.loop != 'plain', loops.boundary != 'none'

  # Between two passes several streams are handed on as they are.
  if c.residual != 'plain' and (joins or has_norm):
    raise RequestError(
        f'{who}model.loops.boundary is {loops.boundary!r} and model.residual '
        f"{c.residual!r}: several streams are handed on as they are, by loop "
        "'plain' and boundary 'none'")
  last = c.of_kind(c.layer_kinds(c.num_layers)[-1].name)
  if has_norm and not BLOCKS[last.block].FINAL_NORM:
    raise RequestError(
        f"{who}model.loops.boundary is 'norm', and after layers of model.block "
        f"{last.block!r} there is no final norm: set it to 'none'")

  # The passes that have a gradient.
  gradient_passes = loops.gradient_passes
  if gradient_passes > loops.passes:
    raise RequestError(
        f'{who}model.loops.gradient_passes is {gradient_passes}: choose from 1 '
        f'to the {loops.passes} of model.loops.passes, or 0 for all')
  if not joins and gradient_passes not in (0, loops.passes):
    raise RequestError(
        f'{who}model.loops.gradient_passes is {gradient_passes}: the last '
        'passes read nothing but the state, so what comes before them would '
        'have no gradient; set it to 0, or choose add, concat or gate')
  require(c.keep_gathered == 'none', f'{who}model.keep_gathered '
          f'{c.keep_gathered!r}: each pass would keep weights that all passes '
          'share; set it to none')


def products_of_model(c: ModelConfig) -> list[str]:
  """Returns which of layers.PRODUCTS the model has, outside of experts."""
  there: set[str] = set()
  for layer in c.distinct_layers:
    there |= blocks.mixer_of_layers(layer).products(layer)
    ffn = layer.ffn
    if ffn == 'moe':
      moe = layer.part(MoEConfig)
      ffn = moe.ffn if moe.shared_experts else NO_FFN
    if ffn == NO_FFN:
      continue
    there |= {'up', 'down'}
    if FFNS[ffn].gated:
      there.add('gate')
  return [name for name in layers.NAMES_OF_PRODUCTS if name in there]


def _check_products(c: ModelConfig) -> None:
  """Raises RequestError for a product that is to get a low-rank adapter, or
  whose weight is to stay gathered, and that no layer has outside of experts."""
  named = {}
  if c.lora.rank:
    named['lora.targets'] = c.lora.targets
  if c.keep_gathered != 'none':
    named['keep_gathered'] = c.keep_gathered
  if not named:
    return
  there = (*products_of_model(c), layers.ALL_PRODUCTS)
  for field, names in named.items():
    for name in names.split(','):
      if name not in there:
        raise RequestError(
            f'model.{field} has {name!r}, a product that no layer of this '
            'model has outside of its experts, which are left out: choose from '
            f'{", ".join(there)}')


# Fields that only one kind of stack reads: their value without meaning, and the
# stack. (training/optim/mup.py has rules for the parameters of decoders alone.)
_FIELDS_OF_ONE_STACK = (
    ('type_vocab_size', 0, 'encoder'), ('next_sentence', False, 'encoder'),
    ('pooling', 'cls', 'encoder'), ('embed_dim', 0, 'encoder'),
    ('mtp_depth', 0, 'decoder'), ('branch_conv', 0, 'decoder'),
    ('memory', lookup.NAME_OF_NO_MEMORY, 'decoder'),
    ('parametrization', 'standard', 'decoder'))


def _check_stack(c: ModelConfig, stack: str,
                 archs: Callable[[str], Iterable[str]]) -> None:
  """Raises RequestError for what the stack of `c` has no use for."""
  layers_ = [c]
  if c.kinds:
    layers_ += c.distinct_layers
  fields = (*_FIELDS_OF_ONE_STACK,
            ('num_decoder_layers', c.num_layers, 'encoder-decoder'))
  for field, unset, kind in fields:
    if kind == stack:
      continue
    for layer in layers_:
      value = getattr(layer, field)
      if value != unset:  # else no page is imported
        raise RequestError(
            f'model.{field} {value!r} has no meaning with model.arch '
            f'{c.arch!r}: set it to {unset!r}, or choose model.arch from '
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
  if c.mtp_depth:
    _check_further_tokens(c)


def _check_further_tokens(c: ModelConfig) -> None:
  """Raises RequestError for a last layer whose kind the modules that predict
  further tokens (model.mtp_depth) cannot have."""
  last = c.layer_kinds(c.num_layers)[-1]
  who = (f'model.mtp_depth is {c.mtp_depth}, but the last layer, whose kind '
         'the modules that predict further tokens have, reads ')
  require(c.of_kind(last.name).memory == lookup.NAME_OF_NO_MEMORY,
          f'{who}tables of model.memory: end with a kind of memory '
          f'{lookup.NAME_OF_NO_MEMORY!r}')
  require(last.source is None,
          f'{who}the keys of another layer: end the pattern or the suffix with '
          'a kind that has keys of its own')
