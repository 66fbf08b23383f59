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

from collections.abc import Collection, Iterable, Mapping
import dataclasses
import functools
import re
from typing import Any, Optional

from architectures.parts import blocks
from architectures.parts import positions
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.config import Frozen, Kind, ModelConfig, Part
from architectures.parts.layers import NO_FFN
from architectures.parts.lora import LoraConfig
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.sizes import Sizes
from architectures.parts.tables import CHOICES, TABLES
from common import fields as declared
from common import kinds as layer_kinds
from common.errors import hint, RequestError
from common.fields import Wait

LORA = 'lora'  # the group that every model has


def _groups() -> dict[str, type]:
  """Returns the class of each part, by its group."""
  groups: dict[str, type] = {LORA: LoraConfig}
  for table in TABLES.values():
    for name, entry in table.items():
      settings = getattr(entry, 'settings', None)
      if settings is not None:
        groups[getattr(settings, 'GROUP', name)] = settings
  return groups


GROUPS = _groups()
_GROUP_OF = {kind: group for group, kind in GROUPS.items()}
PLAIN = AttentionConfig.GROUP  # which no name has before its dot


def fields_of(group: str) -> dict[str, declared.Leaf]:
  """Returns the fields of a part by their flat names. Those of plain attention
  have no group before them."""
  return declared.leaves(GROUPS[group], '' if group == PLAIN else f'{group}.')


def _fields() -> dict[str, declared.Leaf]:
  """Returns all fields of config.model but `kinds`, by their flat names."""
  fields = declared.leaves(ModelConfig)
  for group in (PLAIN, *GROUPS):
    fields |= fields_of(group)
  return fields


def _groups_of_names() -> dict[str, str]:
  """Returns the group of each name that is a part's."""
  names = {}
  for group in GROUPS:
    names |= dict.fromkeys(fields_of(group), group)
  return names


FIELDS = _fields()
_GROUP_OF_NAME = _groups_of_names()
DEFAULTS = {name: leaf.default for name, leaf in FIELDS.items()}


def _of_layers() -> dict[str, str]:
  """Returns the fields of a kind of layer, and for each that of the model."""
  fields = {name: name for name, leaf in FIELDS.items() if leaf.rule.of_layers}
  return fields | {'window': 'sliding_window', 'router': 'moe.router',
                   'rope': 'rope'}


# The fields of a kind of layer, and of the model what each stands for.
OF_LAYERS = _of_layers()


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns the leaves of nested groups by their dotted names."""
  leaves = {}
  for name, value in tree.items():
    if hasattr(value, 'items'):
      leaves |= flatten(value, f'{prefix}{name}.')
    else:
      leaves[prefix + name] = value
  return leaves


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns fields by their dotted names as a dict with a dict of each group.
  """
  tree: dict[str, Any] = {}
  for name, value in fields.items():
    group, _, last = name.rpartition('.')
    at = tree.setdefault(group, {}) if group else tree
    at[last] = value
  return tree


def defaults() -> dict[str, Any]:
  """Returns config.model at its defaults, with every group."""
  tree = {}
  for name, value in nested(DEFAULTS).items():
    tree[name] = value
    if name == 'suffix':  # beside the names of the kinds
      tree['kinds'] = {}
  return tree


# What config.model has, by name.
_NAMES = [*defaults()]


def refresh() -> None:
  """Reads the tables again, to which a file from outside has added entries."""
  for known, read in (
      (GROUPS, _groups), (FIELDS, _fields),
      (_GROUP_OF_NAME, _groups_of_names), (OF_LAYERS, _of_layers),
      (_CLAIMS, _claims), (_ALWAYS, _unclaimed)):
    known.clear()
    known.update(read())
  _GROUP_OF.clear()
  _GROUP_OF.update({kind: group for group, kind in GROUPS.items()})
  DEFAULTS.clear()
  DEFAULTS.update({name: leaf.default for name, leaf in FIELDS.items()})
  _NAMES[:] = [*defaults()]
  _names_of.cache_clear()


def get(c: ModelConfig, name: str) -> Any:
  """Returns a field of the model by its flat name; of a part that is not there
  its default."""
  group = _GROUP_OF_NAME.get(name, '')
  part: Any = c
  if group == LORA:
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


def as_dict(c: ModelConfig) -> dict[str, Any]:
  """Returns the fields as nested dicts, of which `make` makes `c` again."""
  tree: dict[str, Any] = {
      name: getattr(c, name) for name in FIELDS if name not in _GROUP_OF_NAME}
  tree['kinds'] = {name: _copied(kind.said) for name, kind in c.kinds.items()}
  tree[LORA] = dataclasses.asdict(c.lora)
  for part in c.parts:
    group, fields = group_of(part), dataclasses.asdict(part)
    tree |= fields if group == PLAIN else {group: fields}
  return tree


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
  return {name: _copied(value) if isinstance(value, Mapping) else value
          for name, value in tree.items()}


# Which names a model takes.


def _claims() -> dict[str, dict[str, list[str]]]:
  """Returns for each name, or group, that not every model takes the entries
  that do: {name: {where it is chosen: the names of the entries}}."""
  claims: dict[str, dict[str, list[str]]] = {}
  for selector, table in TABLES.items():
    for entry in table:
      for name in _listed(selector, entry):
        claims.setdefault(name, {}).setdefault(selector, []).append(entry)
  return claims


def _listed(selector: str, name: str) -> list[str]:
  """Returns the fields and the groups that an entry of a table lists."""
  entry = TABLES[selector][name]
  names = list(getattr(entry, 'fields', ()))
  settings = getattr(entry, 'settings', None)
  if settings is not None:
    names.append(getattr(settings, 'GROUP', name))
  return names


_CLAIMS = _claims()


def _unclaimed() -> set[str]:
  """Returns the names that every model takes."""
  return {name for name in FIELDS if name not in _CLAIMS
          and _GROUP_OF_NAME.get(name) not in _CLAIMS}


_ALWAYS = _unclaimed()


@functools.cache
def _names_of(selector: str, entry: str) -> frozenset[str]:
  """Returns the names that a chosen entry takes. Of a group it takes all that
  entries do not list one by one."""
  taken = set()
  for name in _listed(selector, entry):
    if name in GROUPS:
      taken |= {field for field in fields_of(name) if field not in _CLAIMS}
    else:
      taken.add(name)
  return frozenset(taken)


def _chosen(fields: Mapping[str, Any]) -> set[str]:
  """Returns the names that layers with these choices take.

  Args:
    fields: what each of TABLES has chosen, by its name.
  """
  taken = set(_ALWAYS)
  mixer = blocks.MIXERS[fields['mixer']]
  position = positions.POSITIONS[fields['position']]
  if not (mixer.positional or position.embed or fields['position'] == 'none'):
    taken.discard('position')
  for selector in TABLES:  # what is chosen inside a part comes after the part
    if selector in taken:
      taken |= _names_of(selector, fields[selector])
  return taken


def _waiting(c: ModelConfig) -> dict[str, Wait]:
  """Returns the fields that layers as `c` says have and do not read, with what
  each of them waits for."""
  waiting = c.waits()
  for part in (c.lora, *c.parts):
    if hasattr(part, 'waits'):
      waits = part.waits(c)
      for name in fields_of(group_of(part)):
        last = name.rpartition('.')[2]
        if last in waits:
          waiting[name] = waits[last]
  moe = c.find(MoEConfig)
  if c.ffn == NO_FFN:
    for name in ('d_ff', 'ffn_bias', 'ffn_dropout'):
      waiting[name] = Wait('ffn', f'is not {NO_FFN}')
  if c.ffn == 'moe' and moe is not None:
    if moe.d_ff != c.d_ff:
      waiting['d_ff'] = Wait('moe.d_ff', 'is 0, or the network of a layer is '
                             'dense')
    if not moe.shared_experts:
      waiting['ffn_dropout'] = Wait('moe.shared_experts', 'is set, or '
                                    'model.ffn is not moe')
  return waiting


def takes(c: ModelConfig) -> set[str]:
  """Returns the names that layers read which are all as `c` says."""
  chosen = _chosen({selector: get(c, selector) for selector in TABLES})
  return chosen - _waiting(c).keys()


def reads(c: ModelConfig) -> set[str]:
  """Returns the fields of the model that any layer reads, or what is beside the
  layers; not those in whose place all layers have some of their kinds."""
  read: set[str] = set()
  for kind in c.kinds_used:
    changes = flatten(c.kinds[kind].said) if kind else {}
    own = {OF_LAYERS.get(name, name) for name in changes}
    if 'window' in changes:
      own.add('attention')
    # These are read beside the layers too.
    own -= {'position', 'ffn', 'block'}
    read |= takes(c.of_kind(kind)) - own
  if positions.of(c).of_stack:
    read |= takes(c)
  return read


@dataclasses.dataclass(frozen=True)
class Unread:
  """Why a model does not read a field.

  Attributes:
    where: in words, when it is read.
    others: the fields of the model that decide on it.
  """
  where: str
  others: tuple[str, ...] = ()


def unread(c: ModelConfig, tree: Mapping[str, Any] | None = None
           ) -> dict[str, Unread]:
  """Returns the fields that no layer reads, and those of a kind of layer that
  its own layers do not, by their names.

  Args:
    c: the model.
    tree: the config.model of which `c` was made, which alone tells whether
      there are sizes that are derived; None: fields from which sizes may be
      derived count as read.
  """
  fields = {}
  if tree is not None:
    fields |= _sources_of_nothing(c, tree)
  # The model's own fields.
  read, waiting = reads(c), {}
  for layer in c.distinct_layers:
    waiting |= _waiting(layer)
  for name in FIELDS:
    if name not in read:
      fields[name] = _why(name, waiting) or Unread(
          'a kind of model.kinds does not set it', ('kinds',))
  # Those of the kinds of layer.
  for kind, changed in c.kinds.items():
    layer = c.of_kind(kind)
    taken, waiting = takes(layer), _waiting(layer)
    for name, value in flatten(changed.said).items():
      field = OF_LAYERS.get(name, name)
      if name in blocks.mixer_of(layer).sources:
        fields[f'kinds.{kind}.{name}'] = Unread(
            'a layer of the kind has attention: the sizes of model.mixer '
            f'{layer.mixer} stand in model.{layer.mixer}')
      elif field not in taken and (name != 'window' or value):
        why = _why(field, waiting)  # a window of 0 is none
        assert why is not None, f'nothing reads {field}'
        fields[f'kinds.{kind}.{name}'] = why
  return fields


def _why(name: str, waiting: Mapping[str, Wait]) -> Optional[Unread]:
  """Returns when a field is read; None: always."""
  clauses, others = [], []
  for owned in (_GROUP_OF_NAME.get(name, ''), name):
    claims = _CLAIMS.get(owned, {})
    if claims:
      clauses.append(' or '.join(
          f'model.{selector} is {" or ".join(entries)}'
          for selector, entries in claims.items()))
      others += claims
  if name in waiting:
    wait = waiting[name]
    clauses.append(f'model.{wait.field} {wait.until}')
    others.append(wait.field)
  if name == 'position':
    clauses.append('a layer turns or biases by positions')
    others.append('mixer')
  if not clauses:
    return None
  return Unread(' and '.join(clauses), tuple(dict.fromkeys(others)))


class _Asked:
  """Sizes of a model, which remember those that a part has asked for."""

  def __init__(self, c: ModelConfig):
    self._c = c
    self.names: set[str] = set()

  def _ask(self, name: str) -> Any:
    self.names.add(name)
    return getattr(self._c, name)

  @property
  def d_model(self) -> int:
    return self._ask('d_model')

  @property
  def num_layers(self) -> int:
    return self._ask('num_layers')

  @property
  def num_heads(self) -> int:
    return self._ask('num_heads')

  @property
  def head_dim(self) -> int:
    return self._ask('head_dim')

  @property
  def d_ff(self) -> int:
    return self._ask('d_ff')

  @property
  def vocab_size(self) -> int:
    return self._ask('vocab_size')

  @property
  def max_len(self) -> int:
    return self._ask('max_len')

  @property
  def norm_eps(self) -> float:
    return self._ask('norm_eps')

  @property
  def prefix(self) -> str:
    return self._ask('prefix')

  @property
  def suffix(self) -> str:
    return self._ask('suffix')

  @property
  def init(self) -> str:
    return self._ask('init')


def _sources_of_nothing(c: ModelConfig, tree: Mapping[str, Any]
                        ) -> dict[str, Unread]:
  """Returns the fields that the mixers of all layers read only to derive sizes
  from them, where `tree` gives these sizes."""
  if c.parametrization == 'mup':  # whose rules are by the size of a head
    return {}
  kinds = c.distinct_layers
  sources = set.intersection(
      *(set(blocks.mixer_of(layer).sources) for layer in kinds))
  if not sources:
    return {}
  sizes = _Asked(c)
  for part in c.parts:
    _part(type(part), tree, sizes)
  if 'head_dim' in sizes.names and not tree.get('head_dim'):
    sizes.names.add('num_heads')  # of which it is derived
  mixers = dict.fromkeys(f'model.{layer.mixer}' for layer in kinds)
  why = Unread(f'a size is left open in {" or ".join(mixers)}', ('mixer',))
  return {name: why for name in sources - sizes.names}


# From names to the tree.


def _part(kind: type, tree: Mapping[str, Any], c: Sizes) -> Any:
  """Returns the part of a class, of the fields in `tree` or at their defaults,
  with what follows from the sizes of the model."""
  group = group_of(kind)
  fields = tree.get(group, {})
  if group == PLAIN:
    fields = {name: tree[name] for name in fields_of(group) if name in tree}
  part = kind(**fields)
  return part.derived(c) if hasattr(part, 'derived') else part


@dataclasses.dataclass(frozen=True)
class Whole(ModelConfig):
  """A config whose parts that no layer has are at their defaults."""

  def part(self, kind: type[Part]) -> Part:
    """Returns the part of a class."""
    part = self.find(kind)
    return _part(kind, {}, self) if part is None else part


def whole(c: ModelConfig) -> Whole:
  """Returns the config as one that lacks no part."""
  return Whole(**{field.name: getattr(c, field.name)
                  for field in dataclasses.fields(c)})


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
  fields = DEFAULTS | flatten(
      {name: value for name, value in tree.items() if name != 'kinds'})
  kinds = tree.get('kinds', {})
  # The fields that are in no part, and the parts of all layers.
  own = _derived({name: value for name, value in fields.items()
                  if name not in _GROUP_OF_NAME}, kinds)
  own['kinds'] = Frozen({name: _kind(said, fields)
                         for name, said in own['kinds'].items()})
  c = ModelConfig(**own)
  fields['head'] = own['head']
  names = _chosen(fields)
  for kind in c.kinds_used:
    if kind in kinds:  # else it is refused later
      names |= _chosen(_choices_of(fields, kinds[kind]))
  groups = {_GROUP_OF_NAME.get(name) for name in names} - {None, LORA}
  parts = [_part(GROUPS[group], tree, c) for group in GROUPS
           if group in groups]
  c = dataclasses.replace(c, lora=_part(LoraConfig, tree, c),
                          parts=tuple(parts))
  # Heads that nothing is derived from need not divide the width.
  if (not fields['head_dim'] and c.d_model % c.num_heads
      and 'num_heads' not in _sources_of_nothing(c, tree)):
    raise RequestError(
        f'model.num_heads is {c.num_heads}, which does not divide '
        f'model.d_model {c.d_model}: choose a divisor, or set model.head_dim')
  return c


def _choices_of(fields: Mapping[str, Any], kind: Mapping[str, Any]
                ) -> dict[str, Any]:
  """Returns what the layers of a kind have chosen, by the names of TABLES."""
  choices = {selector: fields[selector] for selector in TABLES}
  if 'window' in kind:
    choices['attention'] = 'banded' if kind['window'] else 'global'
  for name, value in flatten(kind).items():
    field = OF_LAYERS.get(name, name)
    if field in choices:
      choices[field] = value
  if choices['ffn'] == layer_kinds.DENSE:
    choices['ffn'] = (fields['moe.ffn'] if fields['ffn'] == 'moe' else
                      fields['ffn'])
  return choices


def _derived(fields: dict[str, Any], kinds: Mapping[str, Mapping[str, Any]]
             ) -> dict[str, Any]:
  """Returns the fields that are in no part, with what is derived."""
  for name, source in (('vocab_size', 'the tokenizer'),
                       ('max_len', 'data.length')):
    if fields[name] <= 0:
      raise RequestError(
          f'model.{name} is {fields[name]}: it must be > 0 (derived from '
          f'{source} at the start of a run)')
  heads, width = fields['num_heads'], fields['d_model']
  head_dim = fields['head_dim'] or width // heads or 1
  base_width, base_head_dim = _base(fields, head_dim)
  mup = fields['parametrization'] == 'mup'
  return fields | dict(
      num_decoder_layers=fields['num_decoder_layers'] or fields['num_layers'],
      num_kv_heads=fields['num_kv_heads'] or heads,
      head_dim=head_dim,
      d_ff=fields['d_ff'] or 4 * width,
      head=fields['head'] or 'lm',
      mup_base_width=base_width if mup else 0,
      mup_base_head_dim=base_head_dim if mup else 0,
      attention_scale=fields['attention_scale'] or base_head_dim ** -0.5,
      embed_scale=fields['embed_scale'] or base_width ** 0.5,
      logits_scale=fields['logits_scale'] or base_width ** -0.5,
      kinds={name: _said(fields, kind) for name, kind in kinds.items()})


def _said(fields: Mapping[str, Any], kind: Mapping[str, Any]
          ) -> dict[str, Any]:
  """Returns a kind of layer with what follows from the fields that it changes,
  where the model leaves that to be derived. A size of 0 is the model's."""
  overrides = {
      name: value for name, value in kind.items() if value or name not in (
          'num_kv_heads', 'head_dim', 'd_ff', 'attention_scale')}
  if 'num_heads' in overrides and not fields['num_kv_heads']:
    overrides.setdefault('num_kv_heads', overrides['num_heads'])
  if 'head_dim' in overrides:
    of_layer = {**fields, **overrides, 'd_model': fields['d_model']}
    _, base_head_dim = _base(of_layer, overrides['head_dim'])
    if not fields['attention_scale']:
      overrides.setdefault('attention_scale', base_head_dim ** -0.5)
    if fields['parametrization'] == 'mup' and not fields['mup_base_head_dim']:
      overrides.setdefault('mup_base_head_dim', base_head_dim)
  return overrides


def _kind(said: Mapping[str, Any], fields: Mapping[str, Any]) -> Kind:
  """Returns a kind of layer as the tree has it.

  Args:
    said: what config.model.kinds says of it.
    fields: all fields of the model.
  """
  own: dict[str, Any] = {}
  parts: dict[type, dict[str, Any]] = {}
  if 'window' in said:
    own['attention'] = 'banded' if said['window'] else 'global'
  for name, value in said.items():
    field = OF_LAYERS[name]
    group = _GROUP_OF_NAME.get(field)
    if field in GROUPS:
      parts[GROUPS[field]] = dict(value)
    elif group is not None:
      last = field.rpartition('.')[2]
      parts.setdefault(GROUPS[group], {})[last] = value
    else:
      own[field] = value
  if own.get('ffn') == layer_kinds.DENSE:
    own['ffn'] = fields['moe.ffn'] if fields['ffn'] == 'moe' else fields['ffn']
  return Kind(said=Frozen(said), fields=Frozen(own),
              parts=tuple([(part, Frozen(x)) for part, x in parts.items()]))


def _base(fields: Mapping[str, Any], head_dim: int) -> tuple[int, int]:
  """Returns the width of muP's base and of its heads; the standard form is its
  own base."""
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


# What a value may be.


def check_fields(tree: Mapping[str, Any], who: str = 'model') -> None:
  """Raises RequestError for a value of config.model that is no field, or is not
  of its field's type, range or choices."""
  declared.check_type(tree, {}, who)
  values = []
  for name, value in tree.items():
    if name not in _NAMES:
      raise _no_field(name, who, _NAMES)
    if name == 'kinds':
      check_kinds(value, f'{who}.kinds')
    else:
      values += _values(name, name, value, who)
  declared.check_all(values)


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
      if name not in OF_LAYERS:
        raise _no_field(name, of_kind, OF_LAYERS)
      more = (layer_kinds.DENSE,) if name == 'ffn' else ()
      values += _values(name, OF_LAYERS[name], value, of_kind, more)
  declared.check_all(values)


def _values(name: str, field: str, value: Any, who: str,
            more: Collection[str] = ()) -> list[declared.Value]:
  """Returns a value as `check_all` checks it; of a group those of its fields.

  Args:
    name: what the field is called in what has it.
    field: its name in FIELDS, or a group.
    value: what it is to be.
    who: what has it.
    more: further choices.
  """
  full = f'{who}.{name}'
  if field not in GROUPS:
    choices = CHOICES.get(field, ())
    return [declared.Value(leaf=FIELDS[field], value=value, who=full,
                           choices=(*choices, *more) if more else choices)]
  if not hasattr(value, 'items'):
    declared.check_type(value, {}, full)
  names = [x.name for x in dataclasses.fields(GROUPS[field])]
  values = []
  for inner, x in value.items():
    if inner not in names:
      raise _no_field(inner, full, names)
    values += _values(inner, f'{field}.{inner}', x, full)
  return values


def _no_field(name: str, who: str, names: Iterable[str]) -> RequestError:
  """Returns the error for a name that is no field of `who`."""
  names = list(names)
  return RequestError(f'{who}.{name} is no field of {who}: choose from '
                      f'{", ".join(names)}.{hint(name, names)}')
