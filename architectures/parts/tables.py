"""All parts of a model by their tables, the fields that they declare, and the
frozen config that is made of them, with what it may not say.

A part is an entry of a table. An entry may have `settings`, a dataclass of
fields (common/fields.py), which is the group of config.model that is called as
the entry, or as the dataclass's GROUP; and `fields`, the names of other fields
that not every entry reads. A group of which no entry is chosen by any layer is
None in the ModelConfig, and no config that is printed or saved has it.
"""

import collections
from collections.abc import Callable, Collection, Iterable, Mapping
import dataclasses
import functools
import re
from typing import Any

from architectures.parts import blocks
from architectures.parts import heads
from architectures.parts import layers
from architectures.parts import lookup
from architectures.parts import positions
from architectures.parts import skeletons
from architectures.parts.attention import kernels
from architectures.parts.attention import multi_head
from architectures.parts.blocks import BLOCKS
from architectures.parts.config import Kinds, LayerKind, ModelConfig
from architectures.parts.layers import FFNS, NO_FFN, NORMS, REMAT
from architectures.parts.moe import dispatch
from architectures.parts.moe import grouped
from architectures.parts.moe import layer as moe_layer
from architectures.parts.moe import routing
from common import fields as declared
from common import kinds as layer_kinds
from common.errors import hint, RequestError, require

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
    'residual': blocks.RESIDUALS,
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


def _groups_and_owners() -> tuple[dict[str, type], dict[str, list[str]]]:
  groups: dict[str, type] = {'lora': layers.LoraConfig}
  owners: dict[str, dict[str, list[str]]] = {}
  for selector, table in TABLES.items():
    for name, entry in table.items():
      names = list(getattr(entry, 'fields', ()))
      if settings := getattr(entry, 'settings', None):
        names.append(getattr(settings, 'GROUP', name))
        groups[names[-1]] = settings
      for owned in names:
        owners.setdefault(owned, {}).setdefault(selector, []).append(name)
  return groups, {owned: [f'{selector}={",".join(names)}'
                          for selector, names in chosen.items()]
                  for owned, chosen in owners.items()}


# The dataclass of each group; and of each group, or field that not every entry
# of a table reads, the choices that do, each SELECTOR=ENTRY,ENTRY.
GROUPS, _OWNERS = _groups_and_owners()
Model = dataclasses.make_dataclass(
    'Model', [(name, settings | None, None)
              for name, settings in GROUPS.items()],
    bases=(multi_head.AttentionConfig, ModelConfig), frozen=True)
Model.__module__ = __name__
# All fields of config.model but `kinds`, by dotted name.
FIELDS: dict[str, declared.Leaf] = {
    name: leaf for group, settings in {'': Model, **GROUPS}.items()
    for name, leaf in declared.leaves(
        settings, f'{group}.'.lstrip('.')).items()}
# The fields of a kind of layer, and of the model what each stands for.
OF_LAYERS = {name: name for name, leaf in FIELDS.items()
             if leaf.rule.of_layers} | {'window': 'sliding_window',
                                        'router': 'moe.router', 'rope': 'rope'}


def defaults() -> dict[str, Any]:
  """Returns config.model at its defaults, with every group."""
  return dataclasses.asdict(Model(**{
      name: settings() for name, settings in GROUPS.items()}))


def get(c: ModelConfig, name: str) -> Any:
  """Returns a field of the model by its dotted name; of a group that is not
  there its default."""
  group, _, last = name.rpartition('.')
  at = getattr(c, group) if group else c
  return FIELDS[name].default if at is None else getattr(at, last)


# Which fields are read.

# Fields whose reading depends on more than one other: in words, and whether.
_ALSO = {
    'position': ('a layer turns or biases by positions', lambda c: (
        c.position == 'none' or blocks.mixer_of(c).positional
        or bool(positions.of(c).embed))),
    'd_ff': ('the network of a layer is dense, or model.moe.d_ff is 0',
             lambda c: c.ffn != 'moe' or c.moe.d_ff == c.d_ff),
    'moe.group_size': (
        'an expert has a capacity, or model.moe.router chooses within groups',
        lambda c: routing.ROUTERS[c.moe.router].groups or max(
            c.moe.capacity_factor, c.moe.eval_capacity_factor) > 0),
}


@functools.cache
def _clauses(name: str) -> list[list[tuple[str, str, str]]]:
  """Returns when a field, or a group, is read: of each clause one condition
  holds, (another field, a sign or '', values with commas between)."""
  read_by = FIELDS[name].rule.read_by if name in FIELDS else ()
  return [[re.fullmatch(r'([\w.]+)(!=|=|)(.*)', x).groups() for x in clause]
          for clause in (_OWNERS.get(name.rpartition('.')[0]),
                         _OWNERS.get(name), read_by) if clause]


def is_read(c: ModelConfig, name: str) -> bool:
  """Whether layers that are all as `c` says read a field, or a group."""
  for clause in _clauses(name):
    for field, sign, values in clause:
      value = get(c, field)
      fits = ((str(value) in values.split(',')) == (sign == '=') if sign else
              bool(value))
      if fits and is_read(c, field):
        break
    else:
      return False
  return name not in _ALSO or _ALSO[name][1](c)


def decided_by(name: str) -> list[str]:
  """Returns the fields that decide whether a field is read."""
  return list(dict.fromkeys(
      field for clause in _clauses(name) for field, *_ in clause))


def where(name: str) -> str:
  """Returns in words when a field is read."""
  words = {'': 'is set', '=': 'is', '!=': 'is not'}
  clauses = [' or '.join([
      f'model.{field} {words[sign]} {values.replace(",", " or ")}'.strip()
      for field, sign, values in clause]) for clause in _clauses(name)]
  also = [_ALSO[name][0]] if name in _ALSO else []
  return ' and '.join(clauses + also)


def reads(c: ModelConfig, names: Iterable[str]) -> set[str]:
  """Returns those of some fields of the model that any layer reads, or what is
  beside the layers."""
  layers = []
  for kind in c.kinds_used:
    changes = flat(c.kinds[kind]) if kind else {}
    own = {OF_LAYERS.get(field, field) for field in changes} | (
        {'attention'} if 'window' in changes else set())
    # These are read beside the layers too.
    layers.append((c.of_kind(kind), own - {'position', 'ffn', 'block'}))
  if positions.of(c).of_stack:
    layers.append((c, set()))
  return {name for layer, own in layers for name in names
          if name not in own and is_read(layer, name)}


def unread(c: ModelConfig, tree: Mapping[str, Any] | None = None
           ) -> dict[str, str]:
  """Returns the fields that no layer reads, and those of a kind of layer that
  its own layers do not, with when they are read.

  Args:
    c: the model.
    tree: the config.model of which `c` was made, which alone tells whether
      there are sizes that are derived; None: fields from which sizes may be
      derived count as read.
  """
  read = reads(c, FIELDS)
  fields = {name: where(name) or 'a kind of model.kinds does not set it'
            for name in FIELDS if name not in read}
  for kind, changes in c.kinds.items():
    layer = c.of_kind(kind)
    for name in flat(changes):
      field = OF_LAYERS.get(name, name)
      if name in blocks.mixer_of(layer).sources:
        fields[f'kinds.{kind}.{name}'] = (
            'a layer of the kind has attention: the sizes of model.mixer '
            f'{layer.mixer} stand in model.{layer.mixer}')
      elif not is_read(layer, field) and (name != 'window' or changes[name]):
        fields[f'kinds.{kind}.{name}'] = where(field)  # window 0: there is none
  return ({} if tree is None else _sources_of_nothing(c, tree)) | fields


def _sources_of_nothing(c: ModelConfig, tree: Mapping[str, Any]
                        ) -> dict[str, str]:
  """Returns the fields that the mixers of all layers read only to derive sizes
  from them, where `tree` gives these sizes, with when they are read."""
  layers = [c.of_kind(kind) for kind in c.kinds_used]
  groups = [name for name in GROUPS if getattr(c, name) is not None]

  def decides(name: str) -> bool:
    other = with_all_groups(dataclasses.replace(
        c, **dict.fromkeys(groups), **{name: 2 * getattr(c, name)}), tree)
    return any(getattr(c, x) != getattr(other, x) for x in groups) or (
        name == 'num_heads' and not tree.get('head_dim')
        and decides('head_dim'))

  mup = c.parametrization == 'mup'  # whose rules are by the size of a head
  return {name: 'a size is left open in ' + ' or '.join(
              dict.fromkeys(f'model.{layer.mixer}' for layer in layers))
          for name in set.intersection(*(
              set(blocks.mixer_of(layer).sources) for layer in layers))
          if not mup and not decides(name)}


def flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns the leaves of nested groups by their dotted names."""
  leaves = {}
  for name, value in tree.items():
    leaves |= (flat(value, f'{prefix}{name}.') if hasattr(value, 'items')
               else {prefix + name: value})
  return leaves


def as_dict(c: ModelConfig) -> dict[str, Any]:
  """Returns the fields as nested dicts, of which `make` makes `c` again."""
  return {name: value for name, value in dataclasses.asdict(c).items()
          if name not in GROUPS or value is not None}


def with_all_groups(c: ModelConfig, tree: Mapping[str, Any] = {}
                    ) -> ModelConfig:
  """Returns the config with the groups that it lacks, of the fields in `tree`
  or at their defaults, with what follows from the fields of the model."""
  def group(name: str) -> Any:
    fields = GROUPS[name](**tree.get(name, {}))
    return fields.derived(c) if hasattr(fields, 'derived') else fields
  return dataclasses.replace(c, **{
      name: group(name) for name in GROUPS if getattr(c, name) is None})


# From a tree of fields to the frozen config.


def check_fields(tree: Mapping[str, Any], who: str = 'model',
                 names: Mapping[str, str] | None = None) -> None:
  """Raises RequestError for a value of config.model that is no field, or is not
  of its field's type, range or choices.

  Args:
    tree: the fields.
    who: what has them.
    names: {what a field is called in the tree: in FIELDS or GROUPS}; None:
      those of a model.
  """
  names = names or {x.name: x.name for x in dataclasses.fields(Model)}
  declared.check_type(tree, {}, who)
  for name, value in tree.items():
    if name not in names:
      raise RequestError(f'{who}.{name} is no field of {who}: choose from '
                         f'{", ".join(names)}.{hint(name, names)}')
    full, field = f'{who}.{name}', names[name]
    if field == 'kinds':
      check_kinds(value, full)
    elif field in GROUPS:
      check_fields(value, full, {x.name: f'{field}.{x.name}'
                                 for x in dataclasses.fields(GROUPS[field])})
    else:
      choices = CHOICES.get(field, ())
      if field == 'ffn' and names is OF_LAYERS:
        choices = (*choices, layer_kinds.DENSE)
      declared.check(FIELDS[field], value, full, choices)


def check_kinds(kinds: Any, who: str = 'model.kinds') -> None:
  """Raises RequestError for a kind of layer with a field that it does not have,
  or whose value the model's own field could not have."""
  declared.check_type(kinds, {}, who)
  for kind, fields in kinds.items():
    require(re.fullmatch(r'[A-Za-z]\w*', str(kind)) is not None,
            f'{who} has a kind called {kind!r}: call it by letters, digits and '
            '_')
    check_fields(fields, f'{who}.{kind}', OF_LAYERS)


def make(tree: Mapping[str, Any]) -> ModelConfig:
  """Builds the frozen config from `config.model` (a ConfigDict or a dict),
  which is left as it is; what is not there has its default. What it builds, as
  a dict, builds the same again.

  Raises:
    RequestError: a field that is not of its type, out of range or none of its
      choices, or one that another is derived from and that does not allow it.
  """
  tree = tree.to_dict() if hasattr(tree, 'to_dict') else tree
  check_fields(tree)
  fields = {name: value for name, value in (defaults() | tree).items()
            if name not in GROUPS}
  c = with_all_groups(Model(**_derived(fields)), tree)
  layers = [c, *(c.of_kind(kind) for kind in c.kinds_used
                 if kind in c.kinds)]
  there = {name for layer in layers for name in GROUPS if is_read(layer, name)}
  c = dataclasses.replace(c, **dict.fromkeys(GROUPS.keys() - there))
  require(fields['head_dim'] or c.d_model % c.num_heads == 0
          or 'num_heads' in _sources_of_nothing(c, tree),
          f'model.num_heads is {c.num_heads}, which does not divide '
          f'model.d_model {c.d_model}: choose a divisor, or set model.head_dim')
  return c


def _derived(fields: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields that are in no group, with what is derived."""
  for name, source in (('vocab_size', 'the tokenizer'),
                       ('max_len', 'data.length')):
    require(fields[name] > 0, f'model.{name} is {fields[name]}: it must be > 0 '
            f'(derived from {source} at the start of a run)')
  heads_, width = fields['num_heads'], fields['d_model']
  head_dim = fields['head_dim'] or width // heads_ or 1
  base_width, base_head_dim = _base(fields, head_dim)
  mup = fields['parametrization'] == 'mup'
  return fields | dict(
      num_decoder_layers=fields['num_decoder_layers'] or fields['num_layers'],
      num_kv_heads=fields['num_kv_heads'] or heads_,
      head_dim=head_dim,
      d_ff=fields['d_ff'] or 4 * width,
      head=fields['head'] or 'lm',
      mup_base_width=base_width if mup else 0,
      mup_base_head_dim=base_head_dim if mup else 0,
      attention_scale=fields['attention_scale'] or base_head_dim ** -0.5,
      embed_scale=fields['embed_scale'] or base_width ** 0.5,
      logits_scale=fields['logits_scale'] or base_width ** -0.5,
      kinds=Kinds({name: _kind(fields, kind)
                   for name, kind in fields['kinds'].items()}))


def _kind(fields: Mapping[str, Any], kind: Mapping[str, Any]
          ) -> dict[str, Any]:
  """Returns a kind of layer with what follows from the fields that it changes,
  where the model leaves that to be derived. A size of 0 is the model's."""
  overrides = {
      name: value for name, value in kind.items() if value or name not in (
          'num_kv_heads', 'head_dim', 'd_ff', 'attention_scale')}
  if 'num_heads' in overrides and not fields['num_kv_heads']:
    overrides.setdefault('num_kv_heads', overrides['num_heads'])
  if 'head_dim' in overrides:
    _, base_head_dim = _base(
        {**fields, **overrides, 'd_model': fields['d_model']},
        overrides['head_dim'])
    if not fields['attention_scale']:
      overrides.setdefault('attention_scale', base_head_dim ** -0.5)
    if fields['parametrization'] == 'mup' and not fields['mup_base_head_dim']:
      overrides.setdefault('mup_base_head_dim', base_head_dim)
  return overrides


def _base(fields: Mapping[str, Any], head_dim: int) -> tuple[int, int]:
  """Returns the width of muP's base and of its heads; the standard form is its
  own base."""
  if fields['parametrization'] == 'standard':
    return fields['d_model'], head_dim
  width = fields['mup_base_width']
  require(width > 0, "model.parametrization is 'mup', but model.mup_base_width "
          'is 0: set it to the d_model at which mup equals standard')
  base, rest = divmod(width * head_dim, fields['d_model'])
  require(fields['mup_base_head_dim'] or base > 0 and rest == 0,
          f'model.mup_base_width is {width}, at which a head would have '
          f'{width * head_dim / fields["d_model"]:g} features: '
          'choose another, or set model.mup_base_head_dim')
  return width, fields['mup_base_head_dim'] or base


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
  if c.loops:
    _check_loop(c)
  _check_stack(c, stack, archs)
  _check_products(c)
  heads.HEADS[c.head].check(c)
  require(c.head == 'lm' or stack != 'encoder-decoder',
          f'model.head is {c.head!r}, which model.arch {c.arch!r} does not '
          'have: an encoder-decoder answers in text (objective seq2seq)')
  if c.generator and stack != 'encoder':  # else no page is imported
    raise RequestError(
        f'model.head is {c.head!r}, which model.arch {c.arch!r} does not have: '
        f'choose model.arch from {", ".join(archs("encoder"))}')
  for kind in map(c.of_kind, c.kinds_used):
    if kind.ffn == 'moe':
      routing.check_router(kind, stack)


def _check_pattern(c: ModelConfig) -> None:
  """Raises RequestError for a pattern that names what is not there, kinds that
  it does not name, and layers that it does not divide."""
  names = {field: layer_kinds.split(getattr(c, field))
           for field in ('pattern', 'prefix', 'suffix')}
  settings = ', '.join(
      f'model.{field} {getattr(c, field)!r}' for field in names)
  for name in sum(names.values(), ()):
    require(name in c.kinds, f'{settings} name the kind of layer {name!r}, '
            'which model.kinds does not have: there are '
            f'{", ".join(c.kinds) or "none"}')
  unused = ', '.join(name for name in c.kinds if name not in c.kinds_used)
  require(not unused,
          f'model.kinds has {unused}, which no layer is by {settings}')
  period = len(layer_kinds.split(c.pattern)) or 1
  for field in ('num_layers', 'num_decoder_layers'):
    rest = getattr(c, field) - len(names['prefix'] + names['suffix'])
    require(rest > 0 and rest % period == 0, f'model.{field} is '
            f'{getattr(c, field)}: without those of the prefix and the suffix '
            f'it must be a multiple of the {period} layers of the period, by '
            f'{settings}')
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
  require(not c.layer_scale or c.residual == 'plain', 'model.layer_scale is '
          'True, which multiplies one stream, and model.residual '
          f"{c.residual!r} has others: set it to 'plain'")
  for able, needed, field in (
      ('STREAMS', c.residual != 'plain', f'model.residual {c.residual!r}'),
      ('STREAMS', c.residual_scale != 1,
       f'model.residual_scale {c.residual_scale}'),
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


def _check_loop(c: ModelConfig) -> None:
  """Raises RequestError for layers that cannot be run several times so."""
  loops, who = c.loops, f'model.loop is {c.loop!r}, '
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
      ('pooling', 'cls', 'encoder'), ('embed_dim', 0, 'encoder'),
      ('mtp_depth', 0, 'decoder'),
      ('attention_conv', 0, 'decoder'), ('branch_conv', 0, 'decoder'),
      ('memory', lookup.NO_MEMORY, 'decoder'),
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
  last = c.layer_kinds(c.num_layers)[-1]
  require(not c.mtp_depth or c.of_kind(last.name).memory == lookup.NO_MEMORY,
          f'model.mtp_depth is {c.mtp_depth}, but the last layer, whose kind '
          'the modules that predict further tokens have, reads tables of '
          f"model.memory: end with a kind of memory {lookup.NO_MEMORY!r}")
  require(not c.mtp_depth or last.source is None,
          f'model.mtp_depth is {c.mtp_depth}, but the last layer, whose kind '
          'the modules that predict further tokens have, reads the keys of '
          'another layer: end the pattern or the suffix with a kind that has '
          'keys of its own')
