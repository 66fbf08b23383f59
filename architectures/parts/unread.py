"""Fields of a model that its parts, as they are chosen, do not read.

An entry of a table of parts says which fields it alone reads (`fields`). A
field that belongs to entries of which none was chosen is not read.

A file of configs/ sets fields for a part of its system, and they stay where
that part is swapped away: `moe.*` of Mixtral with `model.ffn=gelu`, its dense
twin. So such a field is no error by itself. Whoever sets one on the command
line means something by it, and is told (training/limits.py).
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

from architectures.parts import heads
from architectures.parts import mixers
from architectures.parts import positions
from architectures.parts import rotary
from architectures.parts import streams
from architectures.parts.attention import visibility
from architectures.parts.config import MoEConfig, ModelConfig
from architectures.parts.ffn import FFNS, NONE
from architectures.parts.moe import health
from architectures.parts.moe import routing
from configs import kinds

# Where a part is chosen: its table. One that is chosen inside of another's
# fields comes after it.
TABLES: dict[str, Mapping[str, Any]] = {
    'position': positions.POSITIONS,
    'rope.scaling': rotary.SCALINGS,
    'residual': streams.RESIDUALS,
    'mixer': mixers.MIXERS,
    'attention': visibility.KINDS,
    'head': heads.HEADS,
    'moe.router': routing.ROUTERS,
    'moe.balance_loss': health.BALANCE_LOSSES,
}


class Row(NamedTuple):
  """Why fields are not read, or under which condition they are.

  Attributes:
    where: the condition under which they are read, in words.
    decided_by: the fields that the condition is about.
  """
  where: str
  decided_by: tuple[str, ...]


class Condition(NamedTuple):
  """Fields that are read under one condition, which no table holds."""
  fields: tuple[str, ...]
  row: Row
  is_read: Callable[[ModelConfig], bool]


CONDITIONS = (
    Condition(
        ('init_scale',), Row('model.init is fan_in', ('init',)),
        lambda c: c.init == 'fan_in'),
    Condition(
        ('position',), Row('a layer turns or biases by positions', ('mixer',)),
        lambda c: c.position == 'none' or mixers.of(c).positional
        or bool(positions.of(c).embed)),
    Condition(
        ('mamba2.norm_over',),
        Row('model.mamba2.groups is above 1', ('mamba2.groups',)),
        lambda c: c.mamba2.groups > 1),
    Condition(
        ('qk_norm_over',), Row('model.qk_norm is True', ('qk_norm',)),
        lambda c: c.qk_norm),
    Condition(
        ('value_residual', 'value_embedding'),
        Row('a layer has keys and values of its own', ('kv_sharing',)),
        lambda c: not c.kv_sharing),
    Condition(
        ('attention_out_bias',),
        Row('model.attention_bias is True', ('attention_bias',)),
        lambda c: c.attention_bias),
    Condition(
        tuple(f'moe.{field.name}' for field in dataclasses.fields(MoEConfig)),
        Row('model.ffn is moe', ('ffn',)), lambda c: c.ffn == 'moe'),
    Condition(
        ('d_ff', 'ffn_bias'),
        Row('a layer has a feed-forward network', ('ffn', 'kinds')),
        lambda c: c.ffn != NONE),
    Condition(  # experts have moe.d_ff, and d_ff where that is 0
        ('d_ff',),
        Row('the network of a layer is dense, or model.moe.d_ff is 0',
            ('ffn', 'kinds', 'moe.d_ff')),
        lambda c: c.ffn != 'moe' or c.moe.d_ff == c.d_ff),
    Condition(
        ('ffn_dropout',),
        Row('the network of a layer is dense, or model.moe.shared_experts '
            'above 0', ('ffn', 'kinds', 'moe.shared_experts')),
        lambda c: c.ffn not in ('moe', NONE)
        or c.ffn == 'moe' and c.moe.shared_experts > 0),
    Condition(
        ('lora.alpha', 'lora.targets', 'lora.dropout'),
        Row('model.lora.rank is above 0', ('lora.rank',)),
        lambda c: c.lora.rank > 0),
    Condition(
        ('clamp.alpha', 'clamp.limit'),
        Row('a network is swiglu_clamped', ('ffn', 'moe.ffn')),
        lambda c: c.ffn != NONE and bool(
            FFNS[c.moe.ffn if c.ffn == 'moe' else c.ffn].fields)),
    Condition(
        ('moe.shared_gate',),
        Row('model.moe.shared_experts is above 0', ('moe.shared_experts',)),
        lambda c: c.moe.shared_experts > 0),
    Condition(
        ('moe.top_groups',),
        Row('model.moe.expert_groups is above 1', ('moe.expert_groups',)),
        lambda c: c.moe.expert_groups > 1),
    Condition(
        ('moe.group_size',),
        Row('an expert has a capacity, or model.moe.router chooses within '
            'groups', ('moe.router', 'moe.capacity_factor',
                       'moe.eval_capacity_factor')),
        lambda c: routing.ROUTERS[c.moe.router].groups
        or max(c.moe.capacity_factor, c.moe.eval_capacity_factor) > 0),
    Condition(
        ('moe.grouped_kernel',),
        Row('model.moe.dispatch is auto or dropless', ('moe.dispatch',)),
        lambda c: c.moe.dispatch in ('auto', 'dropless')),
)


# Fields that name several products, with commas between.
LISTS = ('lora.targets', 'keep_gathered')


def get(c: ModelConfig, field: str) -> Any:
  """Returns a field of the model by its dotted name."""
  for name in field.split('.'):
    c = getattr(c, name)
  return c


def chosen(c: ModelConfig, field: str) -> tuple[str, ...]:
  """Returns the names of the entries that `c` chooses of a table: one, but of
  the products in LISTS."""
  value = get(c, field)
  return tuple(value.split(',')) if field in LISTS else (value,)


def unread(c: ModelConfig) -> dict[str, Row]:
  """Returns the fields that `c` does not read and, for each, the first
  condition that does not hold. With kinds of layer these are the fields that no
  layer reads, and those of a kind that its own layers do not."""
  by_kind = {name: _unread(c.of_kind(name)) for name in c.kinds_used}
  of_model = [_overridden(c, name) | rows for name, rows in by_kind.items()]
  if positions.of(c).embed or positions.of(c).stack_bias:
    of_model.append(_unread(c))  # read beside the layers
  first, *others = of_model
  found = {field: row for field, row in first.items()
           if all(field in rows for rows in others)}
  for name in c.kinds:
    for field in (*c.kinds[name], *(
        f'rope.{inner}' for inner in c.kinds[name].get('rope', ()))):
      row = _of_the_model(c.of_kind(name), field) or (
          by_kind[name].get(kinds.FIELDS.get(field, field)))
      whole = field == 'window' and not c.kinds[name][field]  # says: no window
      if row and not whole:
        found[f'kinds.{name}.{field}'] = row
  return found


def _of_the_model(own: ModelConfig, field: str) -> Row | None:
  """Returns why a kind of layer has no such field of its own: what its parts
  read follows from the model's field, once for all kinds."""
  if field in mixers.of(own).sources:
    return Row(f'a layer of the kind has attention, and not model.mixer '
               f'{own.mixer}, whose sizes stand in model.{own.mixer}',
               ('mixer',))
  if field == 'd_ff' and own.ffn == 'moe':
    return Row('the network of a layer is dense: experts have model.moe.d_ff',
               ('ffn',))
  return None


def _overridden(c: ModelConfig, name: str) -> dict[str, Row]:
  """Returns the fields of the model that a kind of layer has of its own."""
  own = c.kinds[name] if name else {}
  fields = {kinds.FIELDS[field] for field in own} | {
      f'rope.{inner}' for inner in own.get('rope', ())}
  if 'window' in own:
    fields.add('attention')
  row = Row('a kind of model.kinds does not set it', ('kinds',))
  return dict.fromkeys(
      sorted(fields - {'rope', 'position', 'ffn', 'block'}), row)


def _unread(c: ModelConfig) -> dict[str, Row]:
  """The same of a model whose layers are all alike."""
  found: dict[str, Row] = {}
  for fields, row, is_read in CONDITIONS:
    if not is_read(c):
      found = dict.fromkeys(fields, row) | found
  rows: dict[str, Row] = {}  # of every field of an entry
  for selector, table in TABLES.items():
    above = rows.get(selector, Row('', ()))  # a part of a part
    where = f'{above.where} and ' if above.where else ''
    for field in dict.fromkeys(f for e in table.values() for f in e.fields):
      owners = [name for name in table if field in table[name].fields]
      rows[field] = Row(f'{where}model.{selector} is {_any(owners)}',
                        (*above.decided_by, selector))
      if selector in found:
        found.setdefault(field, found[selector])
      elif not set(owners) & set(chosen(c, selector)):
        found.setdefault(field, rows[field])
  return found


def _any(names: list[str]) -> str:
  *others, last = names
  return f'{", ".join(others)} or {last}' if others else last
