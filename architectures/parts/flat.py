"""The flat names of config.model, and the model that they stand for.

A config file, a flag, config.json and a kind of layer name each field flatly:
`norm`, `moe.top_k`, `kinds.local.window`. A model is a tree: a ModelConfig with
its parts, each a frozen dataclass beside the module that reads it. This file
alone turns names into the tree (`make`) and the tree into names (`as_dict`).

The name of a part before the dot, its group, is the GROUP of its class, or that
of the entry in the table by which it is chosen (tables.TABLES). Which names a
model takes follows from its chosen entries: the fields of their `settings` and
those that they list in `fields`. All other names are unread: a config that is
saved, printed or exported has none of them.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
import dataclasses
import functools
import re
from typing import Any, Optional

from architectures.parts import blocks
from architectures.parts import config
from architectures.parts import layers
from architectures.parts import positions
from architectures.parts import tables
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.config import FrozenDict, ModelConfig, Part
from architectures.parts.lora import LoraConfig
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.sizes import Sizes
from common import fields as declared
from common import kinds as layer_kinds
from common.errors import suggest_name, RequestError

GROUP_OF_LORA = 'lora'  # the group that every model has


def _classes_by_group() -> dict[str, type]:
  """Returns the class of each part, by its group."""
  groups: dict[str, type] = {GROUP_OF_LORA: LoraConfig}
  for table in tables.TABLES.values():
    for name, entry in table.items():
      settings = getattr(entry, 'settings', None)
      if settings is not None:
        group = getattr(settings, 'GROUP', name)
        groups[group] = settings
  return groups


def _groups_by_class() -> dict[type, str]:
  """Returns the group of each part, by its class."""
  return {kind: group for group, kind in GROUPS.items()}


GROUPS = _classes_by_group()
_GROUP_OF = _groups_by_class()
GROUP_WITHOUT_PREFIX = AttentionConfig.GROUP  # which no name has before its dot


def fields_of_group(group: str) -> dict[str, declared.DeclaredField]:
  """Returns the fields of a part by their flat names. Those of plain attention
  have no group before them."""
  prefix = f'{group}.'
  if group == GROUP_WITHOUT_PREFIX:
    prefix = ''
  return declared.declared_fields(GROUPS[group], prefix)


def _fields_of_all_models() -> dict[str, declared.DeclaredField]:
  """Returns all fields of config.model but `kinds`, by their flat names."""
  fields = declared.declared_fields(ModelConfig)
  for group in (GROUP_WITHOUT_PREFIX, *GROUPS):
    fields |= fields_of_group(group)
  return fields


def _groups_by_field() -> dict[str, str]:
  """Returns the group of each name that is a part's."""
  names: dict[str, str] = {}
  for group in GROUPS:
    names |= dict.fromkeys(fields_of_group(group), group)
  return names


def _defaults() -> dict[str, Any]:
  """Returns the default of each field."""
  return {name: leaf.default for name, leaf in FIELDS.items()}


FIELDS = _fields_of_all_models()
_GROUP_OF_NAME = _groups_by_field()
DEFAULTS = _defaults()


def _fields_of_layer_kinds() -> dict[str, str]:
  """Returns the names that a kind of layer has, and for each the name of the
  model's field, or group, for which it stands."""
  names = {name: name for name, leaf in FIELDS.items() if leaf.rule.of_layers}
  names['window'] = 'sliding_window'
  names['router'] = 'moe.router'
  names['rope'] = 'rope'
  return names


# The model's field, or group, for which each name of a kind of layer stands.
FIELDS_OF_LAYER_KINDS = _fields_of_layer_kinds()


def _name_of_model_field(name: str) -> str:
  """Returns the name of the model's field for which a field of a kind of layer
  stands; of a field of a group, as rope.theta, that is its own."""
  return FIELDS_OF_LAYER_KINDS.get(name, name)


def flatten_groups(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns the leaves of nested groups by their dotted names."""
  leaves: dict[str, Any] = {}
  for name, value in tree.items():
    if hasattr(value, 'items'):
      leaves |= flatten_groups(value, f'{prefix}{name}.')
    else:
      leaves[prefix + name] = value
  return leaves


def nest_by_group(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns fields by their dotted names as a dict with a dict of each group.
  """
  tree: dict[str, Any] = {}
  for name, value in fields.items():
    group, _, last = name.rpartition('.')
    branch = tree
    if group:
      branch = tree.setdefault(group, {})
    branch[last] = value
  return tree


def default_tree() -> dict[str, Any]:
  """Returns config.model at its defaults, with every group."""
  tree = {}
  for name, value in nest_by_group(DEFAULTS).items():
    tree[name] = value
    # The kinds stand beside the fields that name them.
    if name == 'suffix':
      tree['kinds'] = {}
  return tree


# The names of the fields and groups of config.model.
_NAMES_IN_TREE = list(default_tree())


def refresh_from_tables() -> None:
  """Reads the tables again, to which a file from outside has added entries."""
  # In this order: each is made of those before it.
  makers: tuple[tuple[dict[Any, Any], Callable[[], dict]], ...] = (
      (GROUPS, _classes_by_group), (_GROUP_OF, _groups_by_class),
      (FIELDS, _fields_of_all_models),
      (_GROUP_OF_NAME, _groups_by_field), (DEFAULTS, _defaults),
      (FIELDS_OF_LAYER_KINDS, _fields_of_layer_kinds),
      (_CHOICES_BY_NAME, _choices_by_name))
  for known, read in makers:
    known.clear()
    known.update(read())
  _FIELDS_OF_EVERY_MODEL.clear()
  _FIELDS_OF_EVERY_MODEL.update(_fields_of_every_model())
  _NAMES_IN_TREE[:] = list(default_tree())
  _fields_of_entry.cache_clear()


def get_field(c: ModelConfig, name: str) -> Any:
  """Returns a field of the model by its flat name; of a part that is not there
  its default."""
  group = _GROUP_OF_NAME.get(name, '')
  part: Any = c
  if group == GROUP_OF_LORA:
    part = c.lora
  elif group:
    part = c.find(GROUPS[group])
  if part is None:
    return DEFAULTS[name]
  return getattr(part, name.rpartition('.')[2])


def group_of(part: Any) -> str:
  """Returns the group of a part, or of its class."""
  kind = part if isinstance(part, type) else type(part)
  return _GROUP_OF[kind]


def to_dict(c: ModelConfig) -> dict[str, Any]:
  """Returns the fields as nested dicts, of which `make` makes `c` again."""
  tree: dict[str, Any] = {}
  for name in FIELDS:
    if name not in _GROUP_OF_NAME:
      tree[name] = getattr(c, name)
  tree['kinds'] = {
  name: _copy_as_dicts(
    kind.overrides) for name,
     kind in c.kinds.items()}
  tree[GROUP_OF_LORA] = dataclasses.asdict(c.lora)
  for part in c.parts:
    group, fields = group_of(part), dataclasses.asdict(part)
    if group == GROUP_WITHOUT_PREFIX:
      tree |= fields
    else:
      tree[group] = fields
  return tree


def _copy_as_dicts(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested mappings as dicts, which may be changed."""
  copy = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      value = _copy_as_dicts(value)
    copy[name] = value
  return copy


# Which names a model takes.


def _choices_by_name() -> dict[str, dict[str, list[str]]]:
  """Returns for each name, or group, that not every model takes the entries
  that do: {name: {where it is chosen: the names of the entries}}."""
  claims: dict[str, dict[str, list[str]]] = {}
  for selector, table in tables.TABLES.items():
    for entry in table:
      for name in _names_of_entry(selector, entry):
        selectors = claims.setdefault(name, {})
        selectors.setdefault(selector, []).append(entry)
  return claims


def _names_of_entry(selector: str, name: str) -> list[str]:
  """Returns the fields and the groups that an entry of a table lists."""
  entry = tables.TABLES[selector][name]
  names = list(getattr(entry, 'fields', ()))
  settings = getattr(entry, 'settings', None)
  if settings is not None:
    names.append(getattr(settings, 'GROUP', name))
  return names


_CHOICES_BY_NAME = _choices_by_name()


def _fields_of_every_model() -> set[str]:
  """Returns the names that every model takes."""
  names = set()
  for name in FIELDS:
    if name not in _CHOICES_BY_NAME and _GROUP_OF_NAME.get(
      name) not in _CHOICES_BY_NAME:
      names.add(name)
  return names


_FIELDS_OF_EVERY_MODEL = _fields_of_every_model()


@functools.cache
def _fields_of_entry(selector: str, entry: str) -> frozenset[str]:
  """Returns the names that a chosen entry takes. It takes those names of a
  group that no entry lists one by one."""
  taken: set[str] = set()
  for name in _names_of_entry(selector, entry):
    if name in GROUPS:
      taken |= fields_of_group(name).keys() - _CHOICES_BY_NAME.keys()
    else:
      taken.add(name)
  return frozenset(taken)


def _fields_of_choices(fields: Mapping[str, Any]) -> set[str]:
  """Returns the names that layers with these choices take.

  Args:
    fields: the name of the chosen entry of each of tables.TABLES.
  """
  taken = set(_FIELDS_OF_EVERY_MODEL)
  mixer = blocks.MIXERS[fields['mixer']]
  position = positions.POSITIONS[fields['position']]
  if not (mixer.positional or position.embed or fields['position'] == 'none'):
    taken.discard('position')
  # A part comes before what is chosen inside it.
  for selector in tables.TABLES:
    if selector in taken:
      taken |= _fields_of_entry(selector, fields[selector])
  return taken


def _fields_that_wait(c: ModelConfig) -> dict[str, declared.ReadIf]:
  """Returns the fields that layers as `c` says have and do not read, with what
  each of them waits for."""
  waiting = c.waits()
  for part in (c.lora, *c.parts):
    if hasattr(part, 'waits'):
      waits = part.waits(c)
      for name in fields_of_group(group_of(part)):
        last = name.rpartition('.')[2]
        if last in waits:
          waiting[name] = waits[last]

  # The sizes of a feed-forward network that is not there.
  moe = c.find(MoEConfig)
  if c.ffn == layers.NO_FFN:
    for name in ('d_ff', 'ffn_bias', 'ffn_dropout'):
      waiting[name] = declared.ReadIf('ffn', f'is not {layers.NO_FFN}')
  if c.ffn == 'moe' and moe is not None:
    if moe.d_ff != c.d_ff:
      waiting['d_ff'] = declared.ReadIf(
          'moe.d_ff', 'is 0, or the network of a layer is dense')
    if not moe.shared_experts:
      waiting['ffn_dropout'] = declared.ReadIf(
          'moe.shared_experts', 'is set, or model.ffn is not moe')
  return waiting


def fields_of_layers(c: ModelConfig) -> set[str]:
  """Returns the names that layers read which are all as `c` says."""
  choices = {selector: get_field(c, selector) for selector in tables.TABLES}
  return _fields_of_choices(choices) - _fields_that_wait(c).keys()


def fields_that_are_read(c: ModelConfig) -> set[str]:
  """Returns the fields of the model that any layer reads, or what is beside the
  layers; not those in whose place all layers have some of their kinds."""
  read: set[str] = set()
  for kind in c.kinds_used:
    changes: Mapping[str, Any] = {}
    if kind:
      changes = flatten_groups(c.kinds[kind].overrides)
    replaced = {_name_of_model_field(name) for name in changes}
    if 'window' in changes:
      replaced.add('attention')
    # These are read beside the layers too.
    replaced -= {'position', 'ffn', 'block'}
    read |= fields_of_layers(c.of_kind(kind)) - replaced
  if positions.position_of(c).of_stack:
    read |= fields_of_layers(c)
  return read


@dataclasses.dataclass(frozen=True)
class UnreadField:
  """Why a model does not read a field.

  Attributes:
    where: in words, when it is read.
    others: the fields of the model that decide on it.
  """
  where: str
  others: tuple[str, ...] = ()


def fields_that_are_unread(c: ModelConfig, tree: Mapping[str, Any] | None = None
           ) -> dict[str, UnreadField]:
  """Returns the fields that no layer reads, and those of a kind of layer that
  its own layers do not, by their names.

  Args:
    c: the model.
    tree: the config.model of which `c` was made, which alone tells whether
      there are sizes that are derived; None: fields from which sizes may be
      derived count as read.
  """
  fields: dict[str, UnreadField] = {}
  if tree is not None:
    fields |= _unneeded_sources_of_sizes(c, tree)
  # The model's own fields.
  read = fields_that_are_read(c)
  waiting: dict[str, declared.ReadIf] = {}
  for layer in c.distinct_layers:
    waiting |= _fields_that_wait(layer)
  for name in FIELDS:
    if name not in read:
      fields[name] = _explain_unread_field(name, waiting) or UnreadField(
          'a kind of model.kinds does not set it', ('kinds',))
  # The fields of the kinds of layer.
  for kind in c.kinds:
    for name, why in _unread_fields_of_layer_kind(c, kind).items():
      fields[f'kinds.{kind}.{name}'] = why
  return fields


def _unread_fields_of_layer_kind(
  c: ModelConfig, kind: str) -> dict[str, UnreadField]:
  """Returns the fields that a kind of layer has and its layers do not read."""
  layer = c.of_kind(kind)
  taken, waiting = fields_of_layers(layer), _fields_that_wait(layer)
  sources = blocks.mixer_of_layers(layer).sources
  fields = {}
  for name, value in flatten_groups(c.kinds[kind].overrides).items():
    field = _name_of_model_field(name)
    if name in sources:
      fields[name] = UnreadField(
          'a layer of the kind has attention: the sizes of model.mixer '
          f'{layer.mixer} stand in model.{layer.mixer}')
      continue
    is_no_window = name == 'window' and not value
    if field not in taken and not is_no_window:
      why = _explain_unread_field(field, waiting)
      assert why is not None, f'nothing reads {field}'
      fields[name] = why
  return fields


def _explain_unread_field(name: str, waiting: Mapping[str, declared.ReadIf]
                          ) -> Optional[UnreadField]:
  """Returns when a field is read; None: always."""
  clauses: list[str] = []
  others: list[str] = []
  # A field is read where its group is chosen, and it itself.
  for owned in (_GROUP_OF_NAME.get(name, ''), name):
    claims = _CHOICES_BY_NAME.get(owned, {})
    if not claims:
      continue
    places = []
    for selector, entries in claims.items():
      places.append(f'model.{selector} is {" or ".join(entries)}')
      others.append(selector)
    clauses.append(' or '.join(places))
  if name in waiting:
    wait = waiting[name]
    clauses.append(f'model.{wait.field} {wait.until}')
    others.append(wait.field)
  if name == 'position':
    clauses.append('a layer turns or biases by positions')
    others.append('mixer')
  if not clauses:
    return None
  return UnreadField(' and '.join(clauses), tuple(dict.fromkeys(others)))


class _ModelThatRecordsReads:
  """Stands for a model, and remembers which of its sizes were asked for."""

  def __init__(self, c: ModelConfig):
    self._model = c
    self.names: set[str] = set()

  def __getattr__(self, name: str) -> Any:
    self.names.add(name)
    return getattr(self._model, name)


def _unneeded_sources_of_sizes(c: ModelConfig, tree: Mapping[str, Any]
                        ) -> dict[str, UnreadField]:
  """Returns the fields that the mixers of all layers read only to derive sizes
  from them, where `tree` gives these sizes."""
  # The rules of muP are by the size of a head.
  if c.parametrization == 'mup':
    return {}
  mixers: dict[str, None] = {}
  sources = set(FIELDS)
  for layer in c.distinct_layers:
    sources &= set(blocks.mixer_of_layers(layer).sources)
    mixers[f'model.{layer.mixer}'] = None
  if not sources:
    return {}

  # The sizes for which the parts ask, when they are made of `tree`.
  sizes: Any = _ModelThatRecordsReads(c)
  for part in c.parts:
    _make_part(type(part), tree, sizes)
  if 'head_dim' in sizes.names and not tree.get('head_dim'):
    sizes.names.add('num_heads')  # of which it is derived
  why = UnreadField(f'a size is left open in {" or ".join(mixers)}', ('mixer',))
  return {name: why for name in sources - sizes.names}


# From names to the tree.


def _make_part(kind: type, tree: Mapping[str, Any], c: Sizes) -> Any:
  """Returns the part of a class, of the fields in `tree` or at their defaults,
  with what follows from the sizes of the model."""
  group = group_of(kind)
  fields = tree.get(group, {})
  if group == GROUP_WITHOUT_PREFIX:
    fields = {name: tree[name]
      for name in fields_of_group(group) if name in tree}
  part = kind(**fields)
  if hasattr(part, 'derived'):
    part = part.derived(c)
  return part


@dataclasses.dataclass(frozen=True)
class ConfigWithAllParts(ModelConfig):
  """A config whose parts that no layer has are at their defaults."""

  def part(self, kind: type[Part]) -> Part:
    """Returns the part of a class."""
    part = self.find(kind)
    if part is None:
      part = _make_part(kind, {}, self)
    return part


def with_all_parts(c: ModelConfig) -> ConfigWithAllParts:
  """Returns the config as one that lacks no part."""
  return ConfigWithAllParts(**{field.name: getattr(c, field.name)
                  for field in dataclasses.fields(c)})


def make_model(tree: Mapping[str, Any]) -> ModelConfig:
  """Builds the frozen config from `config.model` (a ConfigDict or a dict),
  which is left as it is; what is not there has its default. What it builds, as
  a dict, builds the same again.

  Raises:
    RequestError: a field that is not of its type, out of range or none of its
      choices, or one that another is derived from and that does not allow it.
  """
  if hasattr(tree, 'to_dict'):
    tree = tree.to_dict()
  check_fields(tree)
  kinds = tree.get('kinds', {})
  given = {name: value for name, value in tree.items() if name != 'kinds'}
  fields = DEFAULTS | flatten_groups(given)

  # The model without its parts.
  c = ModelConfig(**_derive_fields_of_model(fields, kinds))
  fields['head'] = c.head

  # The parts that any layer has chosen.
  names = _fields_of_choices(fields)
  for kind in c.kinds_used:
    if kind in kinds:  # else it is refused later
      names |= _fields_of_choices(_choices_of_layer_kind(fields, kinds[kind]))
  parts = []
  groups = {_GROUP_OF_NAME.get(name) for name in names}
  for group, part in GROUPS.items():
    if group in groups and group != GROUP_OF_LORA:
      parts.append(_make_part(part, tree, c))
  lora = LoraConfig()
  if fields['lora.rank']:
    lora = _make_part(LoraConfig, tree, c)
  c = dataclasses.replace(c, lora=lora, parts=tuple(parts))

  # Heads that nothing is derived from need not divide the width.
  is_divided = fields['head_dim'] or c.d_model % c.num_heads == 0
  if not is_divided and 'num_heads' not in _unneeded_sources_of_sizes(c, tree):
    raise RequestError(
        f'model.num_heads is {c.num_heads}, which does not divide '
        f'model.d_model {c.d_model}: choose a divisor, or set model.head_dim')
  return c


def _choices_of_layer_kind(fields: Mapping[str, Any], kind: Mapping[str, Any]
                ) -> dict[str, Any]:
  """Returns the choices of the layers of a kind, by the names of TABLES.

  Args:
    fields: all fields of the model.
    kind: what config.model.kinds says of the kind.
  """
  choices = {selector: fields[selector] for selector in tables.TABLES}
  if 'window' in kind:
    choices['attention'] = _attention_rule_of_window(kind['window'])
  for name, value in flatten_groups(kind).items():
    field = _name_of_model_field(name)
    if field in choices:
      choices[field] = value
  choices['ffn'] = _network_of_layer_kind(choices['ffn'], fields)
  return choices


def _attention_rule_of_window(window: int) -> str:
  """Returns the rule of attention that a kind's `window` chooses."""
  if window:
    return 'banded'
  return 'global'


def _network_of_layer_kind(name: str, fields: Mapping[str, Any]) -> str:
  """Returns the feed-forward network that a kind's `ffn` chooses; 'dense' is
  the network of the model's dense layers."""
  if name != layer_kinds.DENSE_NETWORK:
    return name
  if fields['ffn'] == 'moe':
    return fields['moe.ffn']
  return fields['ffn']


def _derive_fields_of_model(
    fields: Mapping[str, Any], kinds: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
  """Returns the fields that are in no part, with what is derived.

  Args:
    fields: all fields of the model.
    kinds: config.model.kinds.
  """
  for name, source in (('vocab_size', 'the tokenizer'),
                       ('max_len', 'data.length')):
    if fields[name] <= 0:
      raise RequestError(
          f'model.{name} is {fields[name]}: it must be > 0 (derived from '
          f'{source} at the start of a run)')
  derived = {name: value for name, value in fields.items()
             if name not in _GROUP_OF_NAME}

  # Sizes that are left open.
  heads, width = fields['num_heads'], fields['d_model']
  head_dim = fields['head_dim'] or width // heads or 1
  derived['head_dim'] = head_dim
  derived['num_decoder_layers'] = (
      fields['num_decoder_layers'] or fields['num_layers'])
  derived['num_kv_heads'] = fields['num_kv_heads'] or heads
  derived['d_ff'] = fields['d_ff'] or 4 * width
  derived['head'] = fields['head'] or 'lm'

  # The base of muP, and the factors that are its own.
  base_width, base_head_dim = _sizes_of_mup_base(fields, head_dim)
  derived['mup_base_width'] = derived['mup_base_head_dim'] = 0
  if fields['parametrization'] == 'mup':
    derived['mup_base_width'] = base_width
    derived['mup_base_head_dim'] = base_head_dim
  derived['attention_scale'] = (
      fields['attention_scale'] or base_head_dim ** -0.5)
  derived['embed_scale'] = fields['embed_scale'] or base_width ** 0.5
  derived['logits_scale'] = fields['logits_scale'] or base_width ** -0.5

  layer_kinds_ = {}
  for name, kind in kinds.items():
    overrides = _complete_layer_kind(fields, kind)
    layer_kinds_[name] = _make_layer_kind(overrides, fields)
  derived['kinds'] = FrozenDict(layer_kinds_)
  return derived


# The sizes of a kind of layer that are the model's where they are 0.
_SIZES_THAT_ZERO_LEAVES_OPEN = (
  'num_kv_heads',
  'head_dim',
  'd_ff',
   'attention_scale')


def _complete_layer_kind(fields: Mapping[str, Any], kind: Mapping[str, Any]
          ) -> dict[str, Any]:
  """Returns what is said of a kind of layer, with what follows from it where
  the model leaves that to be derived.

  Args:
    fields: all fields of the model.
    kind: what config.model.kinds says of the kind.
  """
  said = {}
  for name, value in kind.items():
    if value or name not in _SIZES_THAT_ZERO_LEAVES_OPEN:
      said[name] = value
  if 'num_heads' in said and not fields['num_kv_heads']:
    said.setdefault('num_kv_heads', said['num_heads'])
  if 'head_dim' in said:
    of_layer = {**fields, **said, 'd_model': fields['d_model']}
    _, base_head_dim = _sizes_of_mup_base(of_layer, said['head_dim'])
    if not fields['attention_scale']:
      said.setdefault('attention_scale', base_head_dim ** -0.5)
    if fields['parametrization'] == 'mup' and not fields['mup_base_head_dim']:
      said.setdefault('mup_base_head_dim', base_head_dim)
  return said


def _make_layer_kind(
  said: Mapping[str, Any], fields: Mapping[str, Any]) -> config.LayerOverrides:
  """Returns a kind of layer as the tree has it.

  Args:
    said: what is said of the kind, by flat names.
    fields: all fields of the model.
  """
  plain: dict[str, Any] = {}  # the fields that are in no part
  parts: dict[type, dict[str, Any]] = {}
  if 'window' in said:
    plain['attention'] = _attention_rule_of_window(said['window'])
  for name, value in said.items():
    field = _name_of_model_field(name)
    group = _GROUP_OF_NAME.get(field)
    if field in GROUPS:
      parts[GROUPS[field]] = dict(value)
    elif group is not None:
      last = field.rpartition('.')[2]
      parts.setdefault(GROUPS[group], {})[last] = value
    else:
      plain[field] = value
  if 'ffn' in plain:
    plain['ffn'] = _network_of_layer_kind(plain['ffn'], fields)
  frozen_parts = [(part, FrozenDict(changes))
                   for part, changes in parts.items()]
  return config.LayerOverrides(
  overrides=FrozenDict(said),
  fields=FrozenDict(plain),
   parts=tuple(frozen_parts))


def _sizes_of_mup_base(
  fields: Mapping[str, Any], head_dim: int) -> tuple[int, int]:
  """Returns the width of muP's base and of its heads; the standard form is its
  own base.

  Args:
    fields: all fields of the model, or of a layer.
    head_dim: the size of its heads.
  """
  if fields['parametrization'] == 'standard':
    return fields['d_model'], head_dim
  width = fields['mup_base_width']
  if width <= 0:
    raise RequestError(
        "model.parametrization is 'mup', but model.mup_base_width is 0: set it "
        'to the d_model at which mup equals standard')
  base, rest = divmod(width * head_dim, fields['d_model'])
  if not fields['mup_base_head_dim'] and (base <= 0 or rest):
    raise RequestError(
        f'model.mup_base_width is {width}, at which a head would have '
        f'{width * head_dim / fields["d_model"]:g} features: choose another, '
        'or set model.mup_base_head_dim')
  return width, fields['mup_base_head_dim'] or base


# Checks of the values of fields.


def check_fields(tree: Mapping[str, Any], who: str = 'model') -> None:
  """Raises RequestError for a value of config.model that is no field, or is not
  of its field's type, range or choices."""
  declared.check_type(tree, {}, who)
  values = []
  for name, value in tree.items():
    if name not in _NAMES_IN_TREE:
      raise _error_of_unknown_field(name, who, _NAMES_IN_TREE)
    if name == 'kinds':
      check_kinds(value, f'{who}.kinds')
    else:
      values += _values_to_check(name, field=name, value=value, who=who)
  declared.check_values(values)


def check_kinds(kinds: Any, who: str = 'model.kinds') -> None:
  """Raises RequestError for a kind of layer with a field that it does not have,
  or whose value the model's own field could not have."""
  declared.check_type(kinds, {}, who)
  values = []
  for kind, fields in kinds.items():
    if not isinstance(kind, str) or not re.fullmatch(r'[A-Za-z]\w*', kind):
      raise RequestError(f'{who} has a kind called {kind!r}: call it by '
                         'letters, digits and _')
    of_kind = f'{who}.{kind}'
    declared.check_type(fields, {}, of_kind)
    for name, value in fields.items():
      if name not in FIELDS_OF_LAYER_KINDS:
        raise _error_of_unknown_field(name, of_kind, FIELDS_OF_LAYER_KINDS)
      more: Collection[str] = ()
      if name == 'ffn':
        more = (layer_kinds.DENSE_NETWORK,)
      values += _values_to_check(name, FIELDS_OF_LAYER_KINDS[name], value,
                                 who=of_kind, more=more)
  declared.check_values(values)


def _values_to_check(name: str, field: str, value: Any, who: str,
            more: Collection[str] = ()) -> list[declared.FieldValue]:
  """Returns a value as `check_all` checks it; of a group those of its fields.

  Args:
    name: the name of the field, or group, in what has it.
    field: its name in FIELDS, or a group.
    value: the value that it is to have.
    who: the name of what has it.
    more: further choices.
  """
  full = f'{who}.{name}'
  if field not in GROUPS:
    choices = tables.CHOICES.get(field, ())
    if more:
      choices = *choices, *more
    return [declared.FieldValue(leaf=FIELDS[field], value=value, who=full,
                                choices=choices)]
  # A group, each of whose fields is such a value.
  if not hasattr(value, 'items'):
    declared.check_type(value, {}, full)
  names = [x.name for x in dataclasses.fields(GROUPS[field])]
  values = []
  for inner, inner_value in value.items():
    if inner not in names:
      raise _error_of_unknown_field(inner, full, names)
    values += _values_to_check(inner, f'{field}.{inner}', inner_value, who=full)
  return values


def _error_of_unknown_field(
  name: str,
  who: str,
   names: Iterable[str]) -> RequestError:
  """Returns the error for a name that is no field of `who`."""
  names = list(names)
  return RequestError(f'{who}.{name} is no field of {who}: choose from '
                      f'{", ".join(names)}.{suggest_name(name, names)}')
