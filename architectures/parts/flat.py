"""The flat names of config.model, and the model that they stand for.

A config file, a flag, config.json and a kind of layer name each field flatly:
`norm`, `moe.top_k`, `kinds.local.window`. A model is a tree: a ModelConfig with
its parts, each a frozen dataclass beside the module that reads it. This file
alone turns names into the tree (`make_model`) and the tree into names
(`to_dict`).

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
from common.errors import RequestError, suggest_name

GROUP_OF_LORA = 'lora'  # the group that every model has


def _classes_by_group() -> dict[str, type]:
  """Returns the class of each part of a model, by its group, the name before
  the dot of its fields."""
  groups: dict[str, type] = {GROUP_OF_LORA: LoraConfig}
  for table in tables.TABLES.values():
    for name, entry in table.items():
      settings = getattr(entry, 'settings', None)
      if settings is not None:
        group = getattr(settings, 'GROUP', name)
        groups[group] = settings
  return groups


def _groups_by_class() -> dict[type, str]:
  """Returns the group of each part of a model, by its class."""
  return {part_class: group for group, part_class in GROUPS.items()}


GROUPS = _classes_by_group()
_GROUP_OF_CLASS = _groups_by_class()
# The group that no name has before its dot: that of plain attention.
GROUP_WITHOUT_PREFIX = AttentionConfig.GROUP


def fields_of_group(group: str) -> dict[str, declared.DeclaredField]:
  """Returns the fields of one group by their flat names, such as `rope.theta`.
  Those of plain attention have no group before them."""
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
  """Returns the group of each field that is in one, by its flat name."""
  groups: dict[str, str] = {}
  for group in GROUPS:
    groups |= dict.fromkeys(fields_of_group(group), group)
  return groups


def _defaults() -> dict[str, Any]:
  """Returns the default of each field, by its flat name."""
  return {name: leaf.default for name, leaf in FIELDS.items()}


FIELDS = _fields_of_all_models()
_GROUP_OF_FIELD = _groups_by_field()
DEFAULTS = _defaults()


def _fields_of_layer_kinds() -> dict[str, str]:
  """Returns the names that a kind of layer (an entry of model.kinds) may have,
  and for each the model's field, or group, whose place it takes. A field of a
  group has its name without that of the group: router is moe.router."""
  names = {}
  for name, leaf in FIELDS.items():
    if leaf.rule.of_layers:
      names[name.rpartition('.')[2]] = name
  names['window'] = 'sliding_window'
  names['rope'] = 'rope'
  return names


# The model's field, or group, whose place each name of a kind of layer takes.
FIELDS_OF_LAYER_KINDS = _fields_of_layer_kinds()


def _name_of_model_field(name: str) -> str:
  """Returns the name of the model's field whose place a field of a kind of
  layer takes; for a field of a group, as rope.theta, that is its own name."""
  return FIELDS_OF_LAYER_KINDS.get(name, name)


def flatten_groups(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Flattens nested dicts to one dict with dotted names. For example,
  {'moe': {'top_k': 2}} becomes {'moe.top_k': 2}.

  Args:
    tree: a dict, whose values may be further dicts or ConfigDicts.
    prefix: what each name begins with, such as 'moe.'.
  """
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    if hasattr(value, 'items'):
      flat |= flatten_groups(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


def nest_by_group(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns values by their dotted names as a dict with a dict for each group:
  the inverse of `flatten_groups`."""
  tree: dict[str, Any] = {}
  for name, value in fields.items():
    group, _, field_name = name.rpartition('.')
    branch = tree
    if group:
      branch = tree.setdefault(group, {})
    branch[field_name] = value
  return tree


def default_tree() -> dict[str, Any]:
  """Returns config.model at its defaults, with every group, as nested dicts."""
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
  """Fills this module's dicts of the config's fields anew, from the tables that
  name the choices of a model, such as its norms (tables.TABLES).

  It must be called after a user's file has added entries to these tables. Other
  modules hold the dicts, so they are changed in place and not replaced.
  """
  # Pairs of a dict and the function that makes its content. The order matters,
  # because each function reads the dicts before its own.
  makers: tuple[tuple[dict[Any, Any], Callable[[], dict]], ...] = (
      (GROUPS, _classes_by_group), (_GROUP_OF_CLASS, _groups_by_class),
      (FIELDS, _fields_of_all_models), (_GROUP_OF_FIELD, _groups_by_field),
      (DEFAULTS, _defaults), (FIELDS_OF_LAYER_KINDS, _fields_of_layer_kinds),
      (_CHOICES_BY_NAME, _choices_by_name))
  for known, make in makers:
    known.clear()
    known.update(make())
  _FIELDS_OF_EVERY_MODEL.clear()
  _FIELDS_OF_EVERY_MODEL.update(_fields_of_every_model())
  _NAMES_IN_TREE[:] = list(default_tree())
  _fields_of_entry.cache_clear()


def get_field(config: ModelConfig, name: str) -> Any:
  """Returns the value of a field of a model's config by its dotted name.

  Args:
    config: the model.
    name: the name. If the field is in a group, that of the group stands before
      a dot, such as 'rope.theta'.

  Returns:
    The value; the field's default if the model does not have the group.
  """
  # Find the object that holds the field: the config of the group, or the
  # model's own config.
  group = _GROUP_OF_FIELD.get(name, '')
  part: Any = config
  if group == GROUP_OF_LORA:
    part = config.lora
  elif group:
    part = config.find_part(GROUPS[group])
  if part is None:
    return DEFAULTS[name]
  return getattr(part, name.rpartition('.')[2])


def group_of(part: Any) -> str:
  """Returns the group of a part of a model, or of the class of one."""
  part_class = part if isinstance(part, type) else type(part)
  return _GROUP_OF_CLASS[part_class]


def to_dict(config: ModelConfig) -> dict[str, Any]:
  """Converts a model's config to nested dicts, from which `make_model` makes
  the same config again.

  Args:
    config: the model.

  Returns:
    The fields by name. Each group of fields, such as 'rope', is a dict, and
    'kinds' has what each kind of layer overrides. Groups that no layer reads
    are left out.
  """
  # The fields that are in no group.
  tree: dict[str, Any] = {}
  for name in FIELDS:
    if name not in _GROUP_OF_FIELD:
      tree[name] = getattr(config, name)
  # The kinds of layer, and the groups, each of which is a part of the config.
  tree['kinds'] = {name: _copy_as_dicts(kind.overrides)
                   for name, kind in config.kinds.items()}
  tree[GROUP_OF_LORA] = dataclasses.asdict(config.lora)
  for part in config.parts:
    group, fields = group_of(part), dataclasses.asdict(part)
    if group == GROUP_WITHOUT_PREFIX:
      tree |= fields
    else:
      tree[group] = fields
  return tree


def _copy_as_dicts(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a copy of nested mappings as dicts, which may be changed."""
  copy = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      value = _copy_as_dicts(value)
    copy[name] = value
  return copy


# Which fields a model takes.
#
# A selector is a field by which a part is chosen, a key of tables.TABLES, such
# as `mixer`; its choices are the entries of that table.


def _choices_by_name() -> dict[str, dict[str, list[str]]]:
  """Returns for each field, or group, that not every model takes the choices
  with which a model does: {name: {selector: the entries of its table}}."""
  choices: dict[str, dict[str, list[str]]] = {}
  for selector, table in tables.TABLES.items():
    for entry in table:
      for name in _names_of_entry(selector, entry):
        entries_by_selector = choices.setdefault(name, {})
        entries_by_selector.setdefault(selector, []).append(entry)
  return choices


def _names_of_entry(selector: str, entry_name: str) -> list[str]:
  """Returns the fields and the groups that an entry of a table lists as its
  own."""
  entry = tables.TABLES[selector][entry_name]
  names = list(getattr(entry, 'fields', ()))
  settings = getattr(entry, 'settings', None)
  if settings is not None:
    names.append(getattr(settings, 'GROUP', entry_name))
  return names


_CHOICES_BY_NAME = _choices_by_name()


def _fields_of_every_model() -> set[str]:
  """Returns the fields that every model takes, whatever it chooses."""
  names = set()
  for name in FIELDS:
    group = _GROUP_OF_FIELD.get(name)
    if name not in _CHOICES_BY_NAME and group not in _CHOICES_BY_NAME:
      names.add(name)
  return names


_FIELDS_OF_EVERY_MODEL = _fields_of_every_model()


@functools.cache
def _fields_of_entry(selector: str, entry_name: str) -> frozenset[str]:
  """Returns the fields that a model with this choice takes. Of a group, these
  are the fields that no entry lists one by one."""
  fields: set[str] = set()
  for name in _names_of_entry(selector, entry_name):
    if name in GROUPS:
      fields |= fields_of_group(name).keys() - _CHOICES_BY_NAME.keys()
    else:
      fields.add(name)
  return frozenset(fields)


def _fields_of_choices(choices: Mapping[str, Any]) -> set[str]:
  """Returns the names of the config's fields that matter to layers with these
  choices, such as 'rope.theta' for layers with rotary positions.

  Args:
    choices: what is chosen in each field that names a part of a layer (the keys
      of tables.TABLES), such as {'norm': 'rmsnorm', ...}.
  """
  # Some mixers have no use for a position encoding, unless it is one of the
  # embedding.
  fields = set(_FIELDS_OF_EVERY_MODEL)
  mixer = blocks.MIXERS[choices['mixer']]
  position = positions.POSITIONS[choices['position']]
  if not (mixer.positional or position.embed or choices['position'] == 'none'):
    fields.discard('position')
  # A choice inside a group, such as moe.router, counts only if that group was
  # chosen. The order of TABLES matters: a group comes before the choices inside
  # it, so that `fields` has them by then.
  for selector in tables.TABLES:
    if selector in fields:
      fields |= _fields_of_entry(selector, choices[selector])
  return fields


def _conditions_of_reading(config: ModelConfig) -> dict[str, declared.ReadIf]:
  """Returns the fields of a config that have no effect because of the value of
  another field, such as the sizes of a network that the layers do not have.

  Args:
    config: the model, or the config of one kind of layer.

  Returns:
    {dotted name of a field without effect: the other field that switches it
    off, and the condition under which it would be read}.
  """
  # The model and each group of fields list those of their own.
  conditions = config.conditions_of_reading()
  for part in (config.lora, *config.parts):
    if hasattr(part, 'conditions_of_reading'):
      conditions_in_part = part.conditions_of_reading(config)
      for name in fields_of_group(group_of(part)):
        field_name = name.rpartition('.')[2]
        if field_name in conditions_in_part:
          conditions[name] = conditions_in_part[field_name]

  # The sizes of a feed-forward network that the layers do not have. In a model
  # with experts, d_ff is only the default of moe.d_ff, and ffn_dropout is only
  # read by the shared experts, which all tokens go through.
  moe = config.find_part(MoEConfig)
  if config.ffn == layers.NO_FFN:
    for name in ('d_ff', 'ffn_bias', 'ffn_dropout'):
      conditions[name] = declared.ReadIf('ffn', f'is not {layers.NO_FFN}')
  if config.ffn == 'moe' and moe is not None:
    if moe.d_ff != config.d_ff:
      conditions['d_ff'] = declared.ReadIf(
          'moe.d_ff', 'is 0, or the network of a layer is dense')
    if not moe.shared_experts:
      conditions['ffn_dropout'] = declared.ReadIf(
          'moe.shared_experts', 'is set, or model.ffn is not moe')
  return conditions


def fields_of_layers(config: ModelConfig) -> set[str]:
  """Returns the fields that a layer reads, where all layers are as `c` says."""
  choices = {selector: get_field(config,
                                 selector) for selector in tables.TABLES}
  return _fields_of_choices(choices) - _conditions_of_reading(config).keys()


def fields_that_are_read(config: ModelConfig) -> set[str]:
  """Returns the dotted names of the model's own fields that have an effect: a
  layer reads them, or the model beside its layers does.

  A field has no effect if the kinds of all layers override it.

  Args:
    config: the model.
  """
  fields: set[str] = set()
  for kind_name in config.kinds_used:
    overrides: Mapping[str, Any] = {}
    if kind_name:
      overrides = flatten_groups(config.kinds[kind_name].overrides)
    # The model does not read a field that a kind of layer overrides. The field
    # `window` of a kind also replaces the model's rule of attention.
    replaced = {_name_of_model_field(name) for name in overrides}
    if 'window' in overrides:
      replaced.add('attention')
    # These are also read by the model itself, so overriding them in all layers
    # does not make them useless.
    replaced -= {'position', 'ffn', 'block'}
    fields |= fields_of_layers(config.layer_config(kind_name)) - replaced
  if positions.position_of(config).of_stack:
    fields |= fields_of_layers(config)
  return fields


@dataclasses.dataclass(frozen=True)
class UnreadField:
  """Why a model does not read a field.

  Attributes:
    where: in words, when it is read.
    others: the fields of the model that decide on it.
  """
  where: str
  others: tuple[str, ...] = ()


def fields_that_are_unread(config: ModelConfig,
                           tree: Mapping[str, Any] | None = None
                           ) -> dict[str, UnreadField]:
  """Returns the fields that a model's config has without any effect, the
  model's own and those of its kinds of layer. A user who sets one has made a
  mistake, and is told the reason.

  Args:
    config: the model.
    tree: the nested dicts that `config` was made from. They tell which sizes
      were left open and derived. None: fields from which sizes may be derived
      count as read.

  Returns:
    {dotted name of the field ('kinds.{kind}.{field}' for one of a kind of
    layer): when it would be read, and the fields that decide on that}.
  """
  unread: dict[str, UnreadField] = {}
  if tree is not None:
    unread |= _unneeded_sources_of_sizes(config, tree)
  unread |= _unread_fields_of_model(config)
  for kind_name in config.kinds:
    unread_of_kind = _unread_fields_of_layer_kind(config, kind_name)
    for name, reason in unread_of_kind.items():
      unread[f'kinds.{kind_name}.{name}'] = reason
  return unread


def _unread_fields_of_model(config: ModelConfig) -> dict[str, UnreadField]:
  """Returns the fields of a model, without those of its kinds of layer, that
  neither a layer nor the model beside its layers reads.

  Args:
    config: the model.

  Returns:
    {dotted name of the field: when it would be read, and the fields that decide
    on that}.
  """
  # The fields that another one switches off, in some of the layers.
  switched_off: dict[str, declared.ReadIf] = {}
  for layer in config.distinct_layers:
    switched_off |= _conditions_of_reading(layer)

  # A field that no other one decides on is unread because all kinds of layer
  # have a value of their own.
  overridden = UnreadField(
      where='a kind of model.kinds does not set it', others=('kinds',))
  unread = {}
  read = fields_that_are_read(config)
  for name in FIELDS:
    if name not in read:
      reason = _explain_unread_field(name, switched_off)
      unread[name] = reason or overridden
  return unread


def _unread_fields_of_layer_kind(config: ModelConfig, kind_name: str
                                 ) -> dict[str, UnreadField]:
  """Returns the fields that a kind of layer overrides without effect, because
  its layers do not read them.

  Args:
    config: the model.
    kind_name: the name of the kind, a key of model.kinds.

  Returns:
    {name of the field in the kind: when it would be read, and the fields that
    decide on that}.
  """
  layer = config.layer_config(kind_name)
  read, conditions = fields_of_layers(layer), _conditions_of_reading(layer)
  sources = blocks.MIXERS[layer.mixer].sources
  unread = {}
  for name, value in flatten_groups(config.kinds[kind_name].overrides).items():
    model_field = _name_of_model_field(name)
    # The mixer (such as a recurrence) has its own field for this size.
    if name in sources:
      unread[name] = UnreadField(
          where='a layer of the kind has attention: the sizes of model.mixer '
          f'{layer.mixer} stand in model.{layer.mixer}')
      continue
    # A window of 0 says that the layer has none: that is read, though no field
    # of the layer holds it.
    is_no_window = name == 'window' and not value
    if model_field not in read and not is_no_window:
      reason = _explain_unread_field(model_field, conditions)
      assert reason is not None, f'nothing reads {model_field}'
      unread[name] = reason
  return unread


def _explain_unread_field(name: str, conditions: Mapping[str, declared.ReadIf]
                          ) -> Optional[UnreadField]:
  """Explains to the user when a field of the config would be read.

  Args:
    name: the dotted name of the field.
    conditions: the fields that have no effect because of the value of another
      field, each with that field; see `_conditions_of_reading`.

  Returns:
    The conditions that must all hold, such as "model.ffn is moe and
    model.moe.router is sigmoid", and the fields that they are about. None: the
    field is always read.
  """
  clauses: list[str] = []
  deciding_fields: list[str] = []
  # First, its group must be chosen, and the field inside of it.
  for group_or_field in (_GROUP_OF_FIELD.get(name, ''), name):
    entries_by_selector = _CHOICES_BY_NAME.get(group_or_field, {})
    if not entries_by_selector:
      continue
    choices = []
    for selector, entries in entries_by_selector.items():
      choices.append(f'model.{selector} is {" or ".join(entries)}')
      deciding_fields.append(selector)
    clauses.append(' or '.join(choices))
  # Second, no other field must switch it off.
  if name in conditions:
    read_if = conditions[name]
    clauses.append(f'model.{read_if.field} {read_if.until}')
    deciding_fields.append(read_if.field)
  if name == 'position':
    clauses.append('a layer turns or biases by positions')
    deciding_fields.append('mixer')
  if not clauses:
    return None
  return UnreadField(where=' and '.join(clauses),
                     others=tuple(dict.fromkeys(deciding_fields)))


class _ModelThatRecordsReads:
  """Stands for a model, and remembers the names of the fields that are read."""

  def __init__(self, config: ModelConfig):
    self._model = config
    self.names: set[str] = set()

  def __getattr__(self, name: str) -> Any:
    self.names.add(name)
    return getattr(self._model, name)


def _unneeded_sources_of_sizes(config: ModelConfig, tree: Mapping[str, Any]
                               ) -> dict[str, UnreadField]:
  """Returns the fields that are read only to derive other sizes, if all of
  those sizes are given and nothing is left to derive.

  A mixer (the attention or the recurrence of a layer) may have sizes of its
  own. They follow from sizes of the model, unless they are given.

  Args:
    config: the model.
    tree: the nested dicts that `config` was made from.

  Returns:
    {dotted name of the field: when it would be read}.
  """
  # muP always reads the size of a head.
  if config.parametrization == 'mup':
    return {}
  mixers: dict[str, None] = {}
  sources = set(FIELDS)
  for layer in config.distinct_layers:
    sources &= set(blocks.MIXERS[layer.mixer].sources)
    mixers[f'model.{layer.mixer}'] = None
  if not sources:
    return {}

  # Find the sizes that are read after all. The groups of fields are made a
  # second time from `tree`, in which missing sizes are still open, with a
  # recorder in place of the model.
  recorder: Any = _ModelThatRecordsReads(config)
  for part in config.parts:
    _make_part(type(part), tree, recorder)
  if 'head_dim' in recorder.names and not tree.get('head_dim'):
    recorder.names.add('num_heads')  # of which it is derived
  reason = UnreadField(
      where=f'a size is left open in {" or ".join(mixers)}', others=('mixer',))
  return {name: reason for name in sources - recorder.names}


# From names to the tree.


def _make_part(part_class: type, tree: Mapping[str, Any], sizes: Sizes) -> Any:
  """Makes one part of a model's config, the frozen dataclass of a group of
  fields, and fills in its fields that follow from the model's sizes.

  Args:
    part_class: the class of the part, such as RopeConfig.
    tree: config.model as nested dicts. Missing fields have their default.
    sizes: the sizes of the model.
  """
  group = group_of(part_class)
  fields = tree.get(group, {})
  # The fields of plain attention stand among the model's own.
  if group == GROUP_WITHOUT_PREFIX:
    fields = {name: tree[name] for name in fields_of_group(group)
              if name in tree}
  part = part_class(**fields)
  if hasattr(part, 'derived'):
    part = part.derived(sizes)
  return part


@dataclasses.dataclass(frozen=True)
class ConfigWithAllParts(ModelConfig):
  """A config whose parts that no layer has are at their defaults."""

  def part(self, kind: type[Part]) -> Part:
    """Returns the part of a class."""
    part = self.find_part(kind)
    if part is None:
      part = _make_part(kind, {}, self)
    return part


def with_all_parts(config: ModelConfig) -> ConfigWithAllParts:
  """Returns the config with a default in the place of each part that no layer
  has."""
  return ConfigWithAllParts(**{field.name: getattr(config, field.name)
                               for field in dataclasses.fields(config)})


def make_model(tree: Mapping[str, Any]) -> ModelConfig:
  """Builds the frozen config of a model from `config.model`.

  Args:
    tree: a ConfigDict or a dict, which is left as it is; what is not there has
      its default. What is built, as a dict, builds the same again.

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
  config = ModelConfig(**_derive_fields_of_model(fields, kinds))
  fields['head'] = config.head

  # The parts that any layer has chosen.
  names = _fields_of_choices(fields)
  for kind_name in config.kinds_used:
    if kind_name in kinds:  # else it is refused later
      choices = _choices_of_layer_kind(fields, kinds[kind_name])
      names |= _fields_of_choices(choices)
  parts = []
  chosen_groups = {_GROUP_OF_FIELD.get(name) for name in names}
  for group, part_class in GROUPS.items():
    if group in chosen_groups and group != GROUP_OF_LORA:
      parts.append(_make_part(part_class, tree, config))
  lora = LoraConfig()
  if fields['lora.rank']:
    lora = _make_part(LoraConfig, tree, config)
  config = dataclasses.replace(config, lora=lora, parts=tuple(parts))

  # Heads that nothing is derived from need not divide the width.
  is_divided = fields['head_dim'] or config.d_model % config.num_heads == 0
  if not is_divided:
    unneeded_sizes = _unneeded_sources_of_sizes(config, tree)
    if 'num_heads' not in unneeded_sizes:
      raise RequestError(
          f'model.num_heads is {config.num_heads}, which does not divide '
          f'model.d_model {config.d_model}: choose a divisor, or set '
          'model.head_dim')
  return config


def _choices_of_layer_kind(fields: Mapping[str, Any], kind: Mapping[str, Any]
                           ) -> dict[str, Any]:
  """Returns what the layers of one kind choose for each of their parts, such as
  the norm. These are the model's choices, unless the kind has its own.

  Args:
    fields: all fields of the model, by their dotted names.
    kind: what the kind overrides, its entry of config.model.kinds.

  Returns:
    The choices by field (the keys of tables.TABLES), such as {'norm':
    'rmsnorm', ...}.
  """
  choices = {selector: fields[selector] for selector in tables.TABLES}
  if 'window' in kind:
    choices['attention'] = _attention_rule_of_window(kind['window'])
  for name, value in flatten_groups(kind).items():
    model_field = _name_of_model_field(name)
    if model_field in choices:
      choices[model_field] = value
  choices['ffn'] = _network_of_layer_kind(choices['ffn'], fields)
  return choices


def _attention_rule_of_window(window: int) -> str:
  """Returns the rule of attention, a value of model.attention, that the field
  `window` of a kind of layer chooses."""
  if window:
    return 'banded'
  return 'global'


def _network_of_layer_kind(name: str, fields: Mapping[str, Any]) -> str:
  """Returns the name of the feed-forward network that a kind of layer has.

  Args:
    name: the kind's field `ffn`: a network's name, or 'dense', which stands for
      the model's own network without a mixture of experts.
    fields: all fields of the model, by their dotted names.
  """
  if name != layer_kinds.DENSE_NETWORK:
    return name
  # In a model of experts, a dense layer has the network that each expert has.
  if fields['ffn'] == 'moe':
    return fields['moe.ffn']
  return fields['ffn']


def _derive_fields_of_model(fields: Mapping[str, Any],
                            kinds: Mapping[str, Mapping[str, Any]]
                            ) -> dict[str, Any]:
  """Returns the fields of a ModelConfig without its parts, with those that are
  derived from others where they are 0 or empty.

  Args:
    fields: all fields of the model.
    kinds: config.model.kinds.

  Raises:
    RequestError: without a vocabulary or a length, or for a base of muP that
      cannot be.
  """
  for name, source in (('vocab_size', 'the tokenizer'),
                       ('max_len', 'data.length')):
    if fields[name] <= 0:
      raise RequestError(
          f'model.{name} is {fields[name]}: it must be > 0 (derived from '
          f'{source} at the start of a run)')
  derived = {name: value for name, value in fields.items()
             if name not in _GROUP_OF_FIELD}

  # Fields that are left open follow from others.
  num_heads, width = fields['num_heads'], fields['d_model']
  head_dim = fields['head_dim'] or width // num_heads or 1
  base_width, base_head_dim = _sizes_of_mup_base(fields, head_dim)
  value_of_open_field = dict(
      head_dim=head_dim, num_decoder_layers=fields['num_layers'],
      num_kv_heads=num_heads, d_ff=4 * width, head='lm',
      attention_scale=base_head_dim ** -0.5, embed_scale=base_width ** 0.5,
      logits_scale=base_width ** -0.5)
  for name, value in value_of_open_field.items():
    derived[name] = fields[name] or value

  # The base of muP.
  derived['mup_base_width'] = derived['mup_base_head_dim'] = 0
  derived['mup_base_depth'] = 0
  if fields['parametrization'] == 'mup':
    derived['mup_base_width'] = base_width
    derived['mup_base_head_dim'] = base_head_dim
    derived['mup_base_depth'] = fields['mup_base_depth']

  # The kinds of layer.
  overrides_by_kind = {}
  for name, kind in kinds.items():
    overrides = _complete_layer_kind(fields, kind)
    overrides_by_kind[name] = _make_layer_kind(overrides, fields)
  derived['kinds'] = FrozenDict(overrides_by_kind)
  return derived


# The sizes of a kind of layer that are the model's where they are 0.
_SIZES_THAT_ZERO_LEAVES_OPEN = (
    'num_kv_heads', 'head_dim', 'd_ff', 'attention_scale')


def _complete_layer_kind(fields: Mapping[str, Any], kind: Mapping[str, Any]
                         ) -> dict[str, Any]:
  """Completes what a kind of layer overrides by the fields that follow from it.
  For example, another num_heads means another num_kv_heads.

  A field follows only if the user has not set it for the model. A value that is
  set holds for all kinds.

  Args:
    fields: all fields of the model, by their dotted names.
    kind: what the kind overrides, its entry of config.model.kinds.

  Returns:
    The fields that the kind overrides.
  """
  # A size of 0 counts as not given, so the model's own size stays.
  overrides = {}
  for name, value in kind.items():
    if value or name not in _SIZES_THAT_ZERO_LEAVES_OPEN:
      overrides[name] = value
  if 'num_heads' in overrides and not fields['num_kv_heads']:
    overrides.setdefault('num_kv_heads', overrides['num_heads'])
  # The factor of the scores, by the size of a head in muP's base.
  if 'head_dim' in overrides:
    fields_of_layer = {**fields, **overrides, 'd_model': fields['d_model']}
    _, base_head_dim = _sizes_of_mup_base(
        fields_of_layer, overrides['head_dim'])
    if not fields['attention_scale']:
      overrides.setdefault('attention_scale', base_head_dim ** -0.5)
    if fields['parametrization'] == 'mup' and not fields['mup_base_head_dim']:
      overrides.setdefault('mup_base_head_dim', base_head_dim)
  return overrides


def _make_layer_kind(overrides: Mapping[str, Any], fields: Mapping[str, Any]
                     ) -> config.LayerOverrides:
  """Makes the frozen record of what a kind of layer overrides. The fields are
  sorted into the model's own ones and those of its parts. A part is the frozen
  dataclass of a group of fields, such as RopeConfig.

  Args:
    overrides: the fields of the kind, by their names in it. The value of a
      whole group, such as rope, is a dict.
    fields: all fields of the model, by their dotted names.

  Returns:
    The record with the overrides as they were given, the model's fields, and
    pairs of a part's class and the changes to its fields.
  """
  model_fields: dict[str, Any] = {}  # those that are in no part
  part_fields: dict[type, dict[str, Any]] = {}
  if 'window' in overrides:
    model_fields['attention'] = _attention_rule_of_window(overrides['window'])
  for name, value in overrides.items():
    model_field = _name_of_model_field(name)
    group = _GROUP_OF_FIELD.get(model_field)
    if model_field in GROUPS:  # a whole group, such as rope
      part_fields[GROUPS[model_field]] = dict(value)
    elif group is not None:
      field_name = model_field.rpartition('.')[2]
      part_fields.setdefault(GROUPS[group], {})[field_name] = value
    else:
      model_fields[model_field] = value
  if 'ffn' in model_fields:
    model_fields['ffn'] = _network_of_layer_kind(model_fields['ffn'], fields)
  parts = [(part_class, FrozenDict(changes))
           for part_class, changes in part_fields.items()]
  return config.LayerOverrides(
      overrides=FrozenDict(overrides), fields=FrozenDict(model_fields),
      parts=tuple(parts))


def _sizes_of_mup_base(fields: Mapping[str, Any], head_dim: int
                       ) -> tuple[int, int]:
  """Returns the width and the size of a head of muP's base model. At the width
  of the base model, muP (Yang et al. 2022, arXiv 2203.03466) equals the
  standard parametrisation.

  Args:
    fields: all fields of the model, or of a kind of layer.
    head_dim: the size of its heads.

  Returns:
    d_model and head_dim of the base; in the standard parametrization, those of
    the model itself.

  Raises:
    RequestError: for muP without a base width, or one that would make heads of
      no whole size.
  """
  if fields['parametrization'] == 'standard':
    return fields['d_model'], head_dim
  base_width = fields['mup_base_width']
  if base_width <= 0:
    raise RequestError(
        "model.parametrization is 'mup', but model.mup_base_width is 0: set it "
        'to the d_model at which mup equals standard')
  # The base has as many heads, unless the size of one is given.
  features = base_width * head_dim
  base_head_dim, remainder = divmod(features, fields['d_model'])
  is_possible = base_head_dim > 0 and not remainder
  if not fields['mup_base_head_dim'] and not is_possible:
    raise RequestError(
        f'model.mup_base_width is {base_width}, at which a head would have '
        f'{features / fields["d_model"]:g} features: choose another, '
        'or set model.mup_base_head_dim')
  return base_width, fields['mup_base_head_dim'] or base_head_dim


# Checks of the values of fields.


def check_fields(tree: Mapping[str, Any], subject: str = 'model') -> None:
  """Checks the fields of config.model one by one: their names, types, ranges
  and choices.

  Args:
    tree: config.model as nested dicts, or some of its fields.
    subject: what the dict is called in messages.

  Raises:
    RequestError: if a name is no field, or a value is not allowed.
  """
  declared.check_type(tree, {}, subject)
  values = []
  for name, value in tree.items():
    if name not in _NAMES_IN_TREE:
      raise _error_of_unknown_field(name, subject, _NAMES_IN_TREE)
    if name == 'kinds':
      check_kinds(value, f'{subject}.kinds')
    else:
      values += _values_to_check(name, field=name, value=value, subject=subject)
  declared.check_values(values)


def check_kinds(kinds: Any, subject: str = 'model.kinds') -> None:
  """Checks the kinds of layer of config.model one by one: their names, and the
  names and values of the fields that they override.

  Args:
    kinds: config.model.kinds, {name of a kind: the fields that it overrides}.
    subject: what this dict is called in messages.

  Raises:
    RequestError: if the name of a kind is no identifier, if kinds cannot have a
      field, or if a value is not allowed.
  """
  declared.check_type(kinds, {}, subject)
  values = []
  for kind_name, fields in kinds.items():
    is_text = isinstance(kind_name, str)
    if not is_text or not re.fullmatch(r'[A-Za-z]\w*', kind_name):
      raise RequestError(f'{subject} has a kind called {kind_name!r}: call it '
                         'by letters, digits and _')
    name_of_kind = f'{subject}.{kind_name}'
    declared.check_type(fields, {}, name_of_kind)
    for name, value in fields.items():
      if name not in FIELDS_OF_LAYER_KINDS:
        raise _error_of_unknown_field(
            name, name_of_kind, FIELDS_OF_LAYER_KINDS)
      # A kind may choose 'dense', which is no network by itself.
      more_choices: Collection[str] = ()
      if name == 'ffn':
        more_choices = (layer_kinds.DENSE_NETWORK,)
      values += _values_to_check(
          name, field=FIELDS_OF_LAYER_KINDS[name], value=value,
          subject=name_of_kind, more_choices=more_choices)
  declared.check_values(values)


def _values_to_check(name: str, field: str, value: Any, subject: str,
                     more_choices: Collection[str] = ()
                     ) -> list[declared.FieldValue]:
  """Collects what is needed to check the value of a field, or the values of all
  fields of a group.

  Args:
    name: the name of the field or group in the user's dict.
    field: its name in FIELDS, if it is a field (a kind of layer may call it
      otherwise), or the name of the group.
    value: the value; for a group, a dict.
    subject: what the user's dict is called in messages.
    more_choices: values that are allowed beside the declared choices.

  Returns:
    One FieldValue for each field, for `declared.check_values`.

  Raises:
    RequestError: for a name that is no field of the group.
  """
  full_name = f'{subject}.{name}'
  if field not in GROUPS:
    choices = tables.CHOICES.get(field, ())
    if more_choices:
      choices = *choices, *more_choices
    return [declared.FieldValue(leaf=FIELDS[field], value=value,
                                subject=full_name, choices=choices)]
  # For a group, collect the same for each of its fields.
  if not hasattr(value, 'items'):
    declared.check_type(value, {}, full_name)
  names_in_group = [x.name for x in dataclasses.fields(GROUPS[field])]
  values = []
  for inner_name, inner_value in value.items():
    if inner_name not in names_in_group:
      raise _error_of_unknown_field(inner_name, full_name, names_in_group)
    values += _values_to_check(
        inner_name, field=f'{field}.{inner_name}', value=inner_value,
        subject=full_name)
  return values


def _error_of_unknown_field(name: str, subject: str, names: Iterable[str]
                            ) -> RequestError:
  """Returns the error for a name that is no field of a dict. It lists the names
  that the dict may have, and suggests one that is spelled like it.

  Args:
    name: the name.
    subject: what the dict is called in messages.
    names: the names of the fields that the dict may have.
  """
  names = list(names)
  return RequestError(f'{subject}.{name} is no field of {subject}: choose from '
                      f'{", ".join(names)}.{suggest_name(name, names)}')
