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
from architectures.parts.mixer import Mixer
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


def check_model(config: ModelConfig, stack: str,
                archs: Callable[[str], Iterable[str]]) -> None:
  """Checks that the parts of a model, each valid by itself, go together.

  Args:
    config: the config of the whole model.
    stack: what its architecture is: 'decoder', 'encoder' or 'encoder-decoder'.
    archs: a function from such a name to the architectures that are one, which
      messages list as choices.

  Raises:
    RequestError: for a combination that cannot be: a sentence with the field,
      its value and the choices.
  """
  # The layers: those that are as the model says, and those of each kind.
  _check_pattern(config)
  # The message for a kind says which kind it is about.
  for name in dict.fromkeys(('', *config.kinds_used)):
    try:
      _check_layers(config.layer_config(name), stack)
    except RequestError as error:
      if not name:
        raise
      raise RequestError(f'model.kinds.{name}: {error}') from error
  # All layers together, and what stands beside them.
  _check_value_residual(config)
  if config.skips:
    streams.check_skips(config)
  if config.find_part(LoopsConfig):
    _check_loop(config, stack)
  _check_stack(config, stack, archs)
  _check_products(config)
  _check_diffusion(config)
  _check_head(config, stack, archs)
  # The mixtures of experts.
  for layer in config.distinct_layers:
    if layer.ffn == 'moe':
      routing.check_router(layer, stack)


def _check_head(config: ModelConfig, stack: str,
                archs: Callable[[str], Iterable[str]]) -> None:
  """Checks that a model can have the output head that it chooses.

  Args:
    config: the config of the whole model.
    stack: what its architecture is: 'decoder', 'encoder' or 'encoder-decoder'.
    archs: a function from such a name to the architectures that are one. It
      imports their modules, so it is called for a refusal only.

  Raises:
    RequestError: for a head that this model or this stack cannot have.
  """
  check = heads.HEADS[config.head].check
  if check is not None:
    check(config)
  if config.head != 'lm' and stack == 'encoder-decoder':
    raise RequestError(
        f'model.head is {config.head!r}, which model.arch {config.arch!r} does '
        'not have: an encoder-decoder answers in text (objective seq2seq)')
  if config.find_part(GeneratorConfig) and stack != 'encoder':
    raise RequestError(
        f'model.head is {config.head!r}, which model.arch {config.arch!r} does '
        f'not have: choose model.arch from {", ".join(archs("encoder"))}')


def _check_pattern(config: ModelConfig) -> None:
  """Checks the pattern of layers of a model with several kinds of layer.

  The layers are those of model.prefix, whole repetitions of model.pattern, and
  those of model.suffix. Each names its layers' kinds, the keys of model.kinds.

  Args:
    config: the config of the whole model.

  Raises:
    RequestError: for a name that is no kind, a kind that no layer is of, a
      number of layers that the pattern does not divide, and a layer that cannot
      have its position encoding or read the keys that it is to.
  """
  prefix, period, suffix = config.kind_names_of_sections
  settings = (f'model.pattern {config.pattern!r}, model.prefix '
              f'{config.prefix!r}, model.suffix {config.suffix!r}')
  # The names of the kinds of layer.
  for name in config.kinds_used:
    if name and name not in config.kinds:
      raise RequestError(
          f'{settings} name the kind of layer {name!r}, which model.kinds does '
          f'not have: there are {", ".join(config.kinds) or "none"}')
  unused = [name for name in config.kinds if name not in config.kinds_used]
  if unused:
    raise RequestError(f'model.kinds has {", ".join(unused)}, which no layer '
                       f'is by {settings}')

  # The layers between the prefix and the suffix are whole periods.
  for field, num_layers in (('num_layers', config.num_layers),
                            ('num_decoder_layers', config.num_decoder_layers)):
    num_repeated = num_layers - len(prefix) - len(suffix)
    if num_repeated <= 0 or num_repeated % len(period):
      raise RequestError(
          f'model.{field} is {num_layers}: without those of the prefix and the '
          f'suffix it must be a multiple of the {len(period)} layers of the '
          f'period, by {settings}')

  # Each layer has a position encoding, and may read the keys of one before it.
  sections = config.sections(config.num_layers)
  for section in sections:
    for kind in section.kinds:
      if kind.name:
        _check_position(config, kind.name)
      if config.layer_config(kind.name).shares_keys:
        _check_shared_keys(
            config, kind=kind, layers=section.kinds, prefix=sections[0].kinds)


def _check_shared_keys(config: ModelConfig, kind: LayerKind,
                       layers: tuple[LayerKind, ...],
                       prefix: tuple[LayerKind, ...]) -> None:
  """Checks a layer that reads the keys and values of an earlier layer instead
  of having its own.

  Args:
    config: the config of the whole model.
    kind: the kind of the layer. Its `source` is the place of the earlier layer
      in the section; below 0, that before the section's start.
    layers: the kinds of the layers of one period of its section (the prefix,
      the repeated pattern, or the suffix).
    prefix: likewise, those of the model's first section.

  Raises:
    RequestError: for a layer that is no attention, that has no such layer
      before it, or whose own keys would be of another size or encoding.
  """
  reader = config.layer_config(kind.name)
  where = 'model.'
  if kind.name:
    where = f'model.kinds.{kind.name}.'
  setting = f'{where}kv_sharing is True, but '
  require(reader.mixer == 'attention',
          f'{setting}mixer {reader.mixer!r} reads no keys')
  source = kind.source
  if source is None:
    raise RequestError(
        f'{setting}no layer before it, in its period of model.pattern, in '
        'model.prefix, or in model.suffix if it is there, is one of attention '
        'that sees as many keys and has its own: put one there, by a kind of '
        'layer with kv_sharing=False')

  # The layer that has the keys; a place below 0 is one of the prefix.
  kind_of_lender = layers[source]
  if source < 0:
    kind_of_lender = prefix[source]
  lender = config.layer_config(kind_of_lender.name)
  # The fields that both must have in common.
  values_of_both: dict[str, tuple[Any, Any]] = {}
  for field in ('num_kv_heads', 'head_dim', 'position'):
    values_of_both[field] = getattr(reader, field), getattr(lender, field)
  values_of_both['rope'] = (reader.find_part(RopeConfig),
                            lender.find_part(RopeConfig))
  for field, (of_reader, of_lender) in values_of_both.items():
    require(of_reader == of_lender,
            f'{setting}model.{field} of the layer is {of_reader!r}, and '
            f'{of_lender!r} of the layer whose keys it reads: choose one for '
            'both')


def _check_position(config: ModelConfig, kind_name: str) -> None:
  """Checks the position encoding of one kind of layer against the model's.

  Some encodings are computed once for all layers: those added to the embedding,
  and biases that the layers share.

  Args:
    config: the config of the whole model.
    kind_name: the name of the kind, a key of model.kinds.

  Raises:
    RequestError: for a kind that alone has such an encoding, or has another
      number of heads than a bias that is shared.
  """
  layer = config.layer_config(kind_name)
  position = positions.position_of(layer)
  if layer.position != config.position and position.of_stack:
    choices = [choice for choice, entry in positions.POSITIONS.items()
               if not entry.of_stack]
    raise RequestError(
        f'model.kinds.{kind_name}.position is {layer.position!r}, which is no '
        'encoding of one layer: set it as model.position, or choose from '
        f'{", ".join(choices)}')
  require(layer.num_heads == config.num_heads or not position.stack_bias,
          f'model.kinds.{kind_name}.num_heads is {layer.num_heads}, and the '
          f'bias of model.position {layer.position!r}, which all layers share, '
          f'is of {config.num_heads} heads')


def _check_layers(config: ModelConfig, stack: str) -> None:
  """Checks that the parts of a layer fit each other: its mixer (attention or a
  recurrence), its positions, its rule of which keys are seen, its memory, its
  wiring and its heads.

  Args:
    config: the config of the model, or of the layers of one kind.
    stack: what the architecture is: 'decoder', 'encoder' or 'encoder-decoder'.

  Raises:
    RequestError: for parts that do not go together. Where several do not, the
      message is that of the first check below: the mixer's comes first, because
      other parts depend on it.
  """
  # Each part has a check of its own. The mixer's also refuses positions that
  # the mixer has no use for.
  mixer = blocks.MIXERS[config.mixer]
  mixer.check(config, stack)
  position = positions.position_of(config)
  if _position_has_own_check(mixer, position):
    position.check(config, stack)
  check_rule = kernels.RULES[config.attention].check
  if check_rule is not None:
    check_rule(config, stack)
  if config.memory != lookup.NAME_OF_NO_MEMORY:
    lookup.check_memory(config)

  # These go only with some other parts.
  if config.layer_scale and config.residual != 'plain':
    raise RequestError(
        'model.layer_scale is True, which multiplies one stream, and '
        f"model.residual {config.residual!r} has others: set it to 'plain'")
  _check_block(config, stack)
  _check_mup(config)
  _check_base_depth(config)
  if config.num_heads % config.num_kv_heads:
    raise RequestError(
        f'model.num_kv_heads is {config.num_kv_heads}, which does not divide '
        f'model.num_heads {config.num_heads}')


def _position_has_own_check(mixer: Mixer, position: positions.Position) -> bool:
  """Returns whether a position encoding has to be checked by itself, beside the
  check of the mixer.

  Args:
    mixer: the entry of MIXERS for the layer.
    position: the entry of POSITIONS.
  """
  # A position that nobody reads has nothing to check. It is read by the layers
  # whose mixer has positions (`positional`), or by the whole stack.
  if not mixer.positional and not position.of_stack:
    return False
  # The check of a rotary position is about the heads of attention. A mixer that
  # rotates other vectors has checked these itself.
  return not position.rotate or mixer.turns_heads


def _check_block(config: ModelConfig, stack: str) -> None:
  """Checks that the wiring of a layer (model.block: where the norms are, and
  what is added to what) is defined for what the layer is to have.

  Args:
    config: the config of the model, or of the layers of one kind.
    stack: what the architecture is: 'decoder', 'encoder' or 'encoder-decoder'.

  Raises:
    RequestError: for a wiring without an equation for several residual streams,
      a residual scale, a layer without a network, or cross-attention.
  """
  # Pairs: an attribute of Block that must be true, and which field of the
  # config needs it, for the message.
  needs = []
  if config.residual != 'plain':
    needs.append(('STREAMS', f'model.residual {config.residual!r}'))
  if config.residual_scale != 1:
    needs.append(('STREAMS', f'model.residual_scale {config.residual_scale}'))
  if config.mup_base_depth:
    needs.append(('STREAMS', f'model.mup_base_depth {config.mup_base_depth}'))
  if config.ffn == NO_FFN:
    needs.append(('WITHOUT_FFN', f'model.ffn {NO_FFN!r}'))
  if stack == 'encoder-decoder':
    needs.append(('CROSS', f'model.arch {config.arch!r}'))
  for attribute, field in needs:
    if not getattr(BLOCKS[config.block], attribute):
      choices = [name for name, block in BLOCKS.items()
                 if getattr(block, attribute)]
      raise RequestError(
          f'model.block is {config.block!r}, which has no equation for '
          f'{field}: choose it from {", ".join(choices)}')


# Parts whose effect adds up over the layers otherwise than that of branches of
# one residual stream: the field, and its value without the part.
_FIELDS_WITHOUT_RULES_OF_DEPTH = (
    ('residual', 'plain'), ('loop', 'none'), ('layer_scale', False),
    ('skips', False), ('mtp_depth', 0))


def _check_mup(config: ModelConfig) -> None:
  """Checks that muP has rules over the width for what encoders alone have. (The
  parts of layers check theirs.)

  Args:
    config: the config of the whole model.

  Raises:
    RequestError: for widths that do not follow that of the model.
  """
  if config.parametrization != 'mup':
    return
  require(not config.embed_dim, f'model.embed_dim is {config.embed_dim}, a '
          "width of its own, for which model.parametrization 'mup' has no "
          'rule: choose standard, or set embed_dim to 0')
  require(config.find_part(GeneratorConfig) is None,
          'model.generator has widths of its own, for which model.'
          "parametrization 'mup' has no rule: choose standard")


def _check_base_depth(config: ModelConfig) -> None:
  """Checks that muP has rules over depth (model.mup_base_depth) for all parts.

  Args:
    config: the config of the whole model.

  Raises:
    RequestError: for a part that has none.
  """
  if not config.mup_base_depth:
    return
  require(config.num_decoder_layers == config.num_layers,
          f'model.num_decoder_layers is {config.num_decoder_layers}, and model.'
          'mup_base_depth has a rule for stacks of one depth: set it to '
          f'num_layers {config.num_layers}, or mup_base_depth to 0')
  for field, value in _FIELDS_WITHOUT_RULES_OF_DEPTH:
    require(getattr(config, field) == value,
            f'model.{field} is {getattr(config, field)!r}, for which model.'
            f'mup_base_depth has no rule: leave {field} at {value!r}, or '
            'mup_base_depth at 0')


def _check_value_residual(config: ModelConfig) -> None:
  """Checks that all layers of attention have values of one size, where those of
  the first layer are mixed into all (model.value_residual).

  Args:
    config: the config of the whole model.

  Raises:
    RequestError: for kinds of layer with other num_kv_heads or head_dim.
  """
  attention = config.find_part(AttentionConfig)
  if attention is None or not attention.value_residual:
    return
  sizes = set()
  for layer in config.distinct_layers:
    if layer.mixer == 'attention':
      sizes.add((layer.num_kv_heads, layer.head_dim))
  if len(sizes) != 1:
    listed = ' and '.join([str(size) for size in sorted(sizes)])
    raise RequestError(
        'model.value_residual is True, but the values of the kinds of layer '
        f'differ in num_kv_heads or head_dim, {listed}: choose one size, as '
        'those of the first layer are mixed into all')


def _check_loop(config: ModelConfig, stack: str) -> None:
  """Checks a model whose layers are run several times with the same weights
  (model.loop).

  Args:
    config: the config of the whole model, which has a loop.
    stack: what its architecture is: 'decoder', 'encoder' or 'encoder-decoder'.

  Raises:
    RequestError: for several residual streams between passes that mix or
      normalise one, a norm that the last layer's wiring does not have, passes
      without a gradient that nothing replaces, and weights that stay gathered.
  """
  loops, setting = config.part(LoopsConfig), f'model.loop is {config.loop!r}, '
  reads_first_input, has_norm = config.loop != 'plain', loops.boundary != 'none'

  # Between two passes several streams are handed on as they are.
  if config.residual != 'plain' and (reads_first_input or has_norm):
    raise RequestError(
        f'{setting}model.loops.boundary is {loops.boundary!r} and '
        f'model.residual {config.residual!r}: several streams are handed on as '
        "they are, by loop 'plain' and boundary 'none'")
  last_kind = config.layer_kinds(config.num_layers)[-1]
  last_layer = config.layer_config(last_kind.name)
  if has_norm and not BLOCKS[last_layer.block].FINAL_NORM:
    raise RequestError(
        f"{setting}model.loops.boundary is 'norm', and after layers of "
        f'model.block {last_layer.block!r} there is no final norm: set it to '
        "'none'")

  if loops.exit_gate:
    _check_exit_gate(config, stack, setting)
  if config.loop == 'turns':
    _check_turns(config, setting)
  _check_gradient_passes(config, setting)
  require(config.keep_gathered == 'none', f'{setting}model.keep_gathered '
          f'{config.keep_gathered!r}: each pass would keep weights that all '
          'passes share; set it to none')


def _check_exit_gate(config: ModelConfig, stack: str, setting: str) -> None:
  """Checks a model whose tokens may leave after a pass (loops.exit_gate).

  Args:
    config: the config of the whole model, whose layers loop.
    stack: what its architecture is: 'decoder', 'encoder' or 'encoder-decoder'.
    setting: the words that the sentence of an error begins with.

  Raises:
    RequestError: for a model that predicts no tokens, and for one in which the
      state after a pass is not what the model's result would be.
  """
  predicts_tokens = stack == 'decoder' and config.head == 'lm'
  require(predicts_tokens, f'{setting}'
          'model.loops.exit_gate is True, whose loss is that of tokens after '
          f'each pass: model.arch is {config.arch!r} and model.head '
          f'{config.head!r}; choose a decoder and the head lm')
  can_exit = (config.loop != 'turns' and not config.suffix
              and not config.mtp_depth and config.residual == 'plain')
  require(can_exit, f'{setting}model.loops.exit_gate '
          'is True: a token leaves after a pass, so that turns, model.suffix '
          f'{config.suffix!r}, model.mtp_depth {config.mtp_depth} and '
          f'model.residual {config.residual!r} have no meaning with it; leave '
          'them out')


def _check_turns(config: ModelConfig, setting: str) -> None:
  """Checks a model whose layers are two halves that take turns (loop 'turns').

  Args:
    config: the config of the whole model.
    setting: the words that the sentence of an error begins with.

  Raises:
    RequestError: for a lower half that never runs, layers without two halves,
      and more passes with a gradient than the lower half has.
  """
  loops = config.part(LoopsConfig)
  num_periods = max(section.periods for section in
                    config.sections(config.num_layers))
  require(loops.low_cycles > 0, f'{setting}model.loops.low_cycles is 0: set '
          'it to how many times the lower half of the layers is run')
  require(num_periods % 2 == 0, f'{setting}and {num_periods} periods of '
          'layers loop: choose an even number, which have two halves')
  require(loops.gradient_passes <= loops.low_cycles,
          f'{setting}model.loops.gradient_passes is {loops.gradient_passes}: '
          f'choose from 1 to the {loops.low_cycles} of '
          'model.loops.low_cycles, or 0 for all')


def _check_gradient_passes(config: ModelConfig, setting: str) -> None:
  """Checks how many of the last passes have a gradient (loops.gradient_passes).

  Args:
    config: the config of the whole model, whose layers loop.
    setting: the words that the sentence of an error begins with.

  Raises:
    RequestError: for more passes than there are, and for fewer where the passes
      do not read the first input again, so that the embeddings and all layers
      before the loop would have no gradient.
  """
  loops = config.part(LoopsConfig)
  gradient_passes = loops.gradient_passes
  if gradient_passes > loops.passes and not loops.low_cycles:
    raise RequestError(
        f'{setting}model.loops.gradient_passes is {gradient_passes}: choose '
        f'from 1 to the {loops.passes} of model.loops.passes, or 0 for all')
  reads_first_input = config.loop != 'plain'
  if not reads_first_input and gradient_passes not in (0, loops.passes):
    raise RequestError(
        f'{setting}model.loops.gradient_passes is {gradient_passes}: the last '
        'passes read nothing but the state, so what comes before them would '
        'have no gradient; set it to 0, or choose add, concat or gate')


def _check_diffusion(config: ModelConfig) -> None:
  """Checks that the tokens of a block can see each other, in a model that
  denoises text block by block (model.diffusion_block).

  All tokens of a block are predicted at once, and each sees all others of its
  block, the later ones too. So no part of the model may take for granted that a
  token sees earlier ones alone:

    a prediction of the tokens further ahead, which would be seen already;
    a state or a convolution, which passes on earlier tokens only;
    an indexer, which chooses the keys of a query from those before it.

  Args:
    config: the config of the whole model.

  Raises:
    RequestError: for such a part, and for self-conditioning in a model without
      diffusion_block, which has no predictions of a block to read.
  """
  size = config.diffusion_block
  if not size:
    require(not config.self_conditioning, 'model.self_conditioning is True, '
            'but model.diffusion_block is 0: set it to the tokens of a block')
    return

  setting = f'model.diffusion_block is {size}'
  remedy = 'set model.diffusion_block to 0'
  if config.mtp_depth:
    raise RequestError(
        f'{setting}, whose tokens see later ones, which model.mtp_depth '
        f'{config.mtp_depth} predicts: set one of them to 0')
  if any(layer.attention == 'indexed' for layer in config.distinct_layers):
    raise RequestError(
        f"{setting}, and model.attention 'indexed' chooses the keys of a query "
        f'from those before it: choose another attention, or {remedy}')
  if blocks.has_layers_with_state(config):
    mixers = sorted({layer.mixer for layer in config.distinct_layers})
    raise RequestError(
        f'{setting}, and a layer reads a row from left to right, by a state or '
        f'a convolution (model.mixer is {", ".join(mixers)}): choose attention '
        f'or latent without them, or {remedy}')


def products_of_model(config: ModelConfig) -> list[str]:
  """Returns the names of the matrix products that the model's layers have
  outside of experts: those that may get a low-rank adapter (LoRA), or keep
  their weights gathered.

  Args:
    config: the config of the whole model.

  Returns:
    The names, in the order of layers.NAMES_OF_PRODUCTS.
  """
  names: set[str] = set()
  for layer in config.distinct_layers:
    names |= blocks.mixer_of_layers(layer).products(layer)
    # The network of the layer; of a mixture, that of its shared experts.
    ffn = layer.ffn
    if ffn == 'moe':
      moe = layer.part(MoEConfig)
      ffn = moe.ffn if moe.shared_experts else NO_FFN
    if ffn == NO_FFN:
      continue
    names |= {'up', 'down'}
    if FFNS[ffn].gated:
      names.add('gate')
  return [name for name in layers.NAMES_OF_PRODUCTS if name in names]


def _check_products(config: ModelConfig) -> None:
  """Checks the names of matrix products in two fields: those that get low-rank
  adapters (lora.targets), and those whose weights stay gathered.

  Args:
    config: the config of the whole model.

  Raises:
    RequestError: for a product that no layer has outside of its experts.
  """
  # The fields that name products, where they are in use.
  products_by_field = {}
  if config.lora.rank:
    products_by_field['lora.targets'] = config.lora.targets
  if config.keep_gathered != 'none':
    products_by_field['keep_gathered'] = config.keep_gathered
  if not products_by_field:
    return
  choices = (*products_of_model(config), layers.ALL_PRODUCTS)
  for field, products in products_by_field.items():
    for name in products.split(','):
      if name not in choices:
        raise RequestError(
            f'model.{field} has {name!r}, a product that no layer of this '
            'model has outside of its experts, which are left out: choose from '
            f'{", ".join(choices)}')


# Fields that only one kind of stack reads: the field, the value that it has
# elsewhere, and the stack.
_FIELDS_OF_ONE_STACK = (
    ('type_vocab_size', 0, 'encoder'), ('next_sentence', False, 'encoder'),
    ('pooling', 'cls', 'encoder'), ('embed_dim', 0, 'encoder'),
    ('mtp_depth', 0, 'decoder'), ('branch_conv', 0, 'decoder'),
    ('diffusion_block', 0, 'decoder'), ('self_conditioning', False, 'decoder'),
    ('memory', lookup.NAME_OF_NO_MEMORY, 'decoder'))


def _check_stack(config: ModelConfig, stack: str,
                 archs: Callable[[str], Iterable[str]]) -> None:
  """Checks that a model sets no field that only another kind of architecture
  has, such as a decoder's in an encoder.

  Args:
    config: the config of the whole model.
    stack: what its architecture is: 'decoder', 'encoder' or 'encoder-decoder'.
    archs: a function from such a name to the architectures that are one. It
      imports their modules, so it is called for a refusal only.

  Raises:
    RequestError: for such a field, and for a last layer whose parts the head or
      the modules of further tokens cannot have.
  """
  # The model's own fields, and those of each kind of layer.
  configs = [config]
  if config.kinds:
    configs += config.distinct_layers
  # Fields that another kind of stack reads, each with the value that means it
  # is not set. num_decoder_layers is derived as num_layers.
  fields = (*_FIELDS_OF_ONE_STACK,
            ('num_decoder_layers', config.num_layers, 'encoder-decoder'))
  for field, unset, stack_of_field in fields:
    if stack_of_field == stack:
      continue
    for layer in configs:
      value = getattr(layer, field)
      if value != unset:
        raise RequestError(
            f'model.{field} {value!r} has no meaning with model.arch '
            f'{config.arch!r}: set it to {unset!r}, or choose model.arch from '
            f'{", ".join(archs(stack_of_field))}')
  attention = config.find_part(AttentionConfig)
  if stack != 'decoder' and attention is not None:
    for layer in configs:
      fields_of_attention = layer.part(AttentionConfig)
      for field in ('attention_conv', 'dynamic_conv', 'cca', 'key_offset',
                    'forget_gate'):
        value = getattr(fields_of_attention, field)
        if value:
          raise RequestError(
              f'model.{field} {value!r} has no meaning with model.arch '
              f'{config.arch!r}: set it to {type(value)()!r}, or choose '
              f'model.arch from {", ".join(archs("decoder"))}')
  # The last layers, whose network or kind something else has too.
  if stack == 'encoder':
    _check_network_of_head(config)
  if config.mtp_depth:
    _check_further_tokens(config)


def _check_network_of_head(config: ModelConfig) -> None:
  """Checks the feed-forward networks of an encoder: its head of masked words
  (BERT's) has the activation that they have. So there must be one, and it must
  have no learned numbers, since these belong to a layer.

  Args:
    config: the config of the whole model.

  Raises:
    RequestError: for layers without a network, or with a learned activation.
  """
  if config.ffn == NO_FFN:
    raise RequestError(
        f'model.ffn is {NO_FFN!r}, and the head of masked words of model.arch '
        f'{config.arch!r} has the activation of the layers: set model.ffn to a '
        f'network, and ffn={NO_FFN} of the kinds of layer that have none')
  if config.ffn in FFNS and FFNS[config.ffn].learned:
    choices = layers.networks_without_learned_numbers()
    raise RequestError(
        f'model.ffn is {config.ffn!r}, whose activation is learned in each '
        f'layer, and the head of masked words of model.arch {config.arch!r} '
        f'has that of the layers: choose it from {", ".join(choices)}')


def _check_further_tokens(config: ModelConfig) -> None:
  """Checks the last layer of a model that predicts several tokens ahead
  (model.mtp_depth): the modules for these have one more layer of its kind.

  Args:
    config: the config of the whole model.

  Raises:
    RequestError: for a last layer that reads tables of model.memory, or the
      keys of another layer.
  """
  last_kind = config.layer_kinds(config.num_layers)[-1]
  setting = (
      f'model.mtp_depth is {config.mtp_depth}, but the last layer, whose kind '
      'the modules that predict further tokens have, reads ')
  memory = config.layer_config(last_kind.name).memory
  require(memory == lookup.NAME_OF_NO_MEMORY,
          f'{setting}tables of model.memory: end with a kind of memory '
          f'{lookup.NAME_OF_NO_MEMORY!r}')
  require(last_kind.source is None,
          f'{setting}the keys of another layer: end the pattern or the suffix '
          'with a kind that has keys of its own')
