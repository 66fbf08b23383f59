"""All parts of a model by their tables, the fields that they declare, and the
frozen config that is made of them.

A part is an entry of a table. An entry may have `settings`, a dataclass of
fields (configs/fields.py), which is the group of config.model that is called as
the entry, or as the dataclass's GROUP; and `fields`, the names of other fields
that not every entry reads. A group of which no entry is chosen by any layer is
None in the ModelConfig, and no config that is printed or saved has it.
"""

import collections
from collections.abc import Collection, Mapping
import dataclasses
import re
from typing import Any

from architectures.parts import heads
from architectures.parts import linear
from architectures.parts import mixers
from architectures.parts import positions
from architectures.parts import rotary
from architectures.parts import streams
from architectures.parts.attention import kernels
from architectures.parts.attention import multi_head
from architectures.parts.attention import visibility
from architectures.parts.blocks import BLOCKS
from architectures.parts.config import Kinds, ModelConfig
from architectures.parts.ffn import FFNS, NONE
from architectures.parts.moe import experts
from architectures.parts.moe import grouped
from architectures.parts.moe import health
from architectures.parts.moe import layer as moe_layer
from architectures.parts.moe import routing
from architectures.parts.norms import NORMS
from architectures.parts.remat import REMAT
from configs import fields as declared
from configs import kinds as layer_kinds
from configs.errors import RequestError, require, short

# Where a part is chosen: its table.
TABLES: dict[str, Mapping[str, Any]] = {
    'norm': NORMS,
    'position': positions.POSITIONS,
    'rope.scaling': rotary.SCALINGS,
    'ffn': collections.ChainMap({'moe': moe_layer.MoE, NONE: None}, FFNS),
    'moe.ffn': FFNS,
    'moe.router': routing.ROUTERS,
    'moe.balance_loss': health.BALANCE_LOSSES,
    'block': BLOCKS,
    'residual': streams.RESIDUALS,
    'mixer': mixers.MIXERS,
    'attention': visibility.KINDS,
    'head': heads.HEADS,
}
# The choices of each field that names a part, or several with commas between.
CHOICES: dict[str, Collection[str]] = {
    **TABLES,
    'head': collections.ChainMap(heads.HEADS, {'': None}),
    'qk_norm_over': multi_head.QK_NORMS,
    'pooling': heads.POOLINGS,
    'attention_gate': multi_head.GATES,
    'attention_kernel': collections.ChainMap(
        kernels.KERNELS, dict.fromkeys(('auto', 'xla'))),
    'init': linear.INITS,
    'lora.targets': (*linear.PRODUCTS, linear.ALL),
    'remat': REMAT,
    'keep_gathered': ('none', *linear.PRODUCTS, linear.ALL),
    'moe.dispatch': ('auto', *experts.WAYS),
    'moe.grouped_kernel': grouped.GROUPED_KERNELS,
}


def _groups_and_owners() -> tuple[dict[str, type],
                                  dict[str, dict[str, list[str]]]]:
  groups: dict[str, type] = {'lora': linear.LoraConfig}
  owners: dict[str, dict[str, list[str]]] = {}
  for selector, table in TABLES.items():
    for name, entry in table.items():
      owned = list(getattr(entry, 'fields', ()))
      settings = getattr(entry, 'settings', None)
      if settings:
        group = getattr(settings, 'GROUP', name)
        groups[group] = settings
        owned.append(group)
      for own in owned:
        owners.setdefault(own, {}).setdefault(selector, []).append(name)
  return groups, owners


# The dataclass of each group; and of each group, or field that not every entry
# of a table reads, the entries that do: {selector: their names}.
GROUPS, OWNERS = _groups_and_owners()
# All fields of config.model but `kinds`, by dotted name.
FIELDS: dict[str, declared.Leaf] = {leaf.name: leaf for leaf in (
    *declared.leaves(ModelConfig),
    *(leaf for group, settings in GROUPS.items()
      for leaf in declared.leaves(settings, f'{group}.')))}
# The fields of a kind of layer, and of the model what each stands for.
OF_LAYERS = {name: name for name, leaf in FIELDS.items()
             if leaf.rule.of_layers} | {'window': 'sliding_window',
                                        'rope': 'rope'}

Model = dataclasses.make_dataclass(
    'Model', [(name, settings | None, None)
              for name, settings in GROUPS.items()],
    bases=(ModelConfig,), frozen=True)
Model.__module__ = __name__


def defaults() -> dict[str, Any]:
  """Returns config.model at its defaults, with every group."""
  tree: dict[str, Any] = {}
  for name, leaf in FIELDS.items():
    group, _, own = name.rpartition('.')
    (tree.setdefault(group, {}) if group else tree)[own] = leaf.default
  return tree | {'kinds': {}}


def find(name: str) -> declared.Leaf | None:
  """Returns the field of a dotted name below config.model, that of a kind of
  layer too; None: there is none."""
  if found := re.fullmatch(r'kinds\.\w+\.(\w+)(.*)', name):
    name = OF_LAYERS.get(found[1], '') + found[2]
  return FIELDS.get(name)


def get(c: ModelConfig, name: str) -> Any:
  """Returns a field of the model by its dotted name; of a group that is not
  there its default."""
  group, _, own = name.rpartition('.')
  at = getattr(c, group) if group else c
  return FIELDS[name].default if at is None else getattr(at, own)


# Which fields are read.

# Fields whose reading depends on more than one other: in words, and whether.
_ALSO = {
    'position': ('a layer turns or biases by positions', lambda c: (
        c.position == 'none' or mixers.of(c).positional
        or bool(positions.of(c).embed))),
    'd_ff': ('the network of a layer is dense, or model.moe.d_ff is 0',
             lambda c: c.ffn != 'moe' or c.moe.d_ff == c.d_ff),
    'moe.group_size': (
        'an expert has a capacity, or model.moe.router chooses within groups',
        lambda c: routing.ROUTERS[c.moe.router].groups or max(
            c.moe.capacity_factor, c.moe.eval_capacity_factor) > 0),
}


def is_read(c: ModelConfig, name: str) -> bool:
  """Whether layers that are all as `c` says read a field, or a group."""
  for owned in (name.rpartition('.')[0], name):
    if owned in OWNERS and not _chosen(c, OWNERS[owned]):
      return False
  if name in _ALSO and not _ALSO[name][1](c):
    return False
  conditions = FIELDS[name].rule.read_by if name in FIELDS else ()
  return not conditions or any(_holds(c, x) for x in conditions)


def _chosen(c: ModelConfig, owners: Mapping[str, list[str]]) -> bool:
  for selector, entries in owners.items():
    if get(c, selector) in entries and is_read(c, selector):
      return True
  return False


def _parsed(condition: str) -> tuple[str, str, str]:
  name, sign, value = re.fullmatch(
      r'([\w.]+)(?:(!=|=|>)(.*))?', condition).groups()
  return name, sign or '', value or ''


def _holds(c: ModelConfig, condition: str) -> bool:
  name, sign, value = _parsed(condition)
  found = get(c, name)
  if sign == '>':
    return found > float(value)
  return (str(found) in value.split(',')) == (sign == '=') if sign else (
      bool(found))


def decided_by(name: str) -> list[str]:
  """Returns the fields that decide whether a field is read."""
  owned = [x for x in (name.rpartition('.')[0], name) if x in OWNERS]
  return list(dict.fromkeys((
      *(selector for x in owned for selector in OWNERS[x]),
      *(_parsed(x)[0] for x in FIELDS[name].rule.read_by))))


def where(name: str) -> str:
  """Returns in words when a field is read."""
  clauses = [' or '.join(f'model.{selector} is {_any(entries)}'
                         for selector, entries in OWNERS[owned].items())
             for owned in (name.rpartition('.')[0], name) if owned in OWNERS]
  told = []
  for condition in FIELDS[name].rule.read_by:
    field, sign, value = _parsed(condition)
    words = {'=': f'is {_any(value.split(","))}', '>': f'is above {value}',
             '!=': f'is not {_any(value.split(","))}', '': 'is set'}[sign]
    told.append(f'model.{field} {words}')
  clauses += [' or '.join(told)] if told else []
  clauses += [_ALSO[name][0]] if name in _ALSO else []
  return ' and '.join(clauses)


def _any(names: list[str]) -> str:
  *others, last = names
  return f'{", ".join(others)} or {last}' if others else last


def reads(c: ModelConfig, name: str) -> bool:
  """Whether any layer reads a field of the model, or what is beside them."""
  for kind in c.kinds_used:
    if name not in _overridden(c, kind) and is_read(c.of_kind(kind), name):
      return True
  beside = positions.of(c).embed or positions.of(c).stack_bias
  return bool(beside) and is_read(c, name)


def unread(c: ModelConfig) -> dict[str, str]:
  """Returns the fields that no layer reads, and those of a kind of layer that
  its own layers do not, with when they are read."""
  found = {name: where(name) or 'a kind of model.kinds does not set it'
           for name in FIELDS if not reads(c, name)}
  for kind, fields in c.kinds.items():
    layer = c.of_kind(kind)
    for field in flat(fields):
      if field != 'window' or fields[field]:  # 0 says: no window
        if why := _unread_by_kind(layer, field):
          found[f'kinds.{kind}.{field}'] = why
  return found


def _overridden(c: ModelConfig, kind: str) -> set[str]:
  """Returns the fields of the model of which a kind of layer has its own, but
  for those that are read beside the layers too."""
  own = flat(c.kinds[kind]) if kind else {}
  names = {OF_LAYERS.get(field, field) for field in own}
  return (names | ({'attention'} if 'window' in own else set())) - {
      'position', 'ffn', 'block'}


def _unread_by_kind(layer: ModelConfig, field: str) -> str:
  """Returns when layers of a kind would read a field of theirs; '': they do.
  """
  if field in mixers.of(layer).sources:
    return (f'a layer of the kind has attention, and not model.mixer '
            f'{layer.mixer}, whose sizes stand in model.{layer.mixer}')
  if field == 'd_ff' and layer.ffn == 'moe':
    return 'the network of a layer is dense: experts have model.moe.d_ff'
  name = OF_LAYERS.get(field, field)
  return '' if is_read(layer, name) else where(name)


def flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns the leaves of nested groups by their dotted names."""
  found = {}
  for name, value in tree.items():
    found |= (flat(value, f'{prefix}{name}.') if hasattr(value, 'items')
              else {prefix + name: value})
  return found


def as_dict(c: ModelConfig) -> dict[str, Any]:
  """Returns the fields as nested dicts, of which `make` makes `c` again."""
  return {name: value for name, value in dataclasses.asdict(c).items()
          if name not in GROUPS or value is not None}


def with_all_groups(c: ModelConfig) -> ModelConfig:
  """Returns the config with the groups that no layer reads, at their defaults.
  """
  return dataclasses.replace(c, **{
      name: _group(settings, {}, c) for name, settings in GROUPS.items()
      if getattr(c, name) is None})


def _group(settings: type, fields: Mapping[str, Any], c: ModelConfig) -> Any:
  """Returns a group with what follows from the fields of the model."""
  group = settings(**fields)
  return group.derived(c) if hasattr(group, 'derived') else group


# From a tree of fields to the frozen config.


def check_fields(tree: Mapping[str, Any], who: str = 'model.') -> None:
  """Raises RequestError for a value of config.model that is no field, or is not
  of its field's type, range or choices."""
  for name, value in tree.items():
    if name not in FIELDS and name not in GROUPS and name != 'kinds':
      raise RequestError(f'{who}{name} is no field of a model: choose from '
                         f'{", ".join(defaults())}')
    if name == 'kinds':
      check_kinds(value, f'{who}kinds')
    elif name in GROUPS:
      _check_group(name, value, who)
    else:
      declared.check(FIELDS[name], value, who + name, CHOICES.get(name, ()))


def _check_group(group: str, tree: Any, who: str, full: str = '') -> None:
  """The same of a group; None is one that no layer reads."""
  if tree is None:
    return
  full = full or who + group
  require(hasattr(tree, 'items'), f'{full} is {short(tree)}: it must be a '
          'group of fields')
  for name, value in tree.items():
    field = f'{group}.{name}'
    if field not in FIELDS:
      raise RequestError(
          f'{full}.{name} is no field of model.{group}: choose from '
          f'{", ".join(defaults()[group])}')
    declared.check(FIELDS[field], value, f'{full}.{name}',
                   CHOICES.get(field, ()))


def check_kinds(kinds: Any, who: str = 'model.kinds') -> None:
  """Raises RequestError for a kind of layer with a field that it does not have,
  or whose value the model's own field could not have."""
  require(hasattr(kinds, 'items'), f'{who} is {short(kinds)}: it must be a '
          'group of kinds of layer, by name')
  for kind, fields in kinds.items():
    require(isinstance(kind, str)
            and re.fullmatch(r'[A-Za-z]\w*', kind) is not None,
            f'{who} has a kind called {kind!r}: call it by letters, digits and '
            '_')
    require(hasattr(fields, 'items'), f'{who}.{kind} is {fields!r}: it must be '
            'a group of fields')
    for name, value in fields.items():
      full = f'{who}.{kind}.{name}'
      require(name in OF_LAYERS, f'{full} is no field that a kind may change: '
              f'choose from {", ".join(OF_LAYERS)}')
      field = OF_LAYERS[name]
      if name in GROUPS:
        _check_group(name, value, '', full)
        continue
      choices = CHOICES.get(field, ())
      declared.check(FIELDS[field], value, full, (
          *choices, layer_kinds.DENSE) if name == 'ffn' else choices)
      require(value or name not in ('num_heads', 'num_kv_heads', 'head_dim',
                                    'd_ff', 'attention_scale'),
              f"{full} is 0: leave it away, to have the model's")


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
  fields = {name: leaf.default for name, leaf in FIELDS.items()
            if '.' not in name} | {
                name: value for name, value in tree.items()
                if name not in GROUPS}
  flat_ones = _derived(fields | {'kinds': tree.get('kinds', {})})
  c = Model(**flat_ones)
  c = dataclasses.replace(c, **{
      name: _group(settings, tree.get(name) or {}, c)
      for name, settings in GROUPS.items()})
  layers = [c, *(c.of_kind(kind) for kind in c.kinds_used
                 if kind in c.kinds)]
  return dataclasses.replace(c, **{
      name: None for name in GROUPS
      if not any(is_read(layer, name) for layer in layers)})


def _derived(fields: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields that are in no group, with what is derived."""
  for name in ('vocab_size', 'max_len'):
    source = {'max_len': 'data.length', 'vocab_size': 'the tokenizer'}[name]
    require(fields[name] > 0, f'model.{name} is {fields[name]}: it must be > 0 '
            f'(derived from {source} at the start of a run)')
  heads_, width = fields['num_heads'], fields['d_model']
  require(fields['head_dim'] or width % heads_ == 0,
          f'model.num_heads is {heads_}, which does not divide model.d_model '
          f'{width}: choose a divisor, or set model.head_dim')
  head_dim = fields['head_dim'] or width // heads_
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
  where the model leaves that to be derived."""
  own = dict(kind)
  if 'num_heads' in own and not fields['num_kv_heads']:
    own.setdefault('num_kv_heads', own['num_heads'])
  if own.get('head_dim'):
    _, base_head_dim = _base(
        {**fields, **own, 'd_model': fields['d_model']}, own['head_dim'])
    if not fields['attention_scale']:
      own.setdefault('attention_scale', base_head_dim ** -0.5)
    if fields['parametrization'] == 'mup' and not fields['mup_base_head_dim']:
      own.setdefault('mup_base_head_dim', base_head_dim)
  return own


def _base(fields: Mapping[str, Any], head_dim: int) -> tuple[int, int]:
  """Returns the width of muP's base and of its heads; the standard form is its
  own base."""
  if fields['parametrization'] == 'standard':
    return fields['d_model'], head_dim
  width = fields['mup_base_width']
  require(width > 0, "model.parametrization is 'mup', but model.mup_base_width "
          'is 0: set it to the d_model at which mup equals standard')
  if fields['mup_base_head_dim']:
    return width, fields['mup_base_head_dim']
  base, rest = divmod(width * head_dim, fields['d_model'])
  require(base > 0 and rest == 0,
          f'model.mup_base_width is {width}, at which a head would have '
          f'{width * head_dim / fields["d_model"]:g} features: '
          'choose another, or set model.mup_base_head_dim')
  return width, base
