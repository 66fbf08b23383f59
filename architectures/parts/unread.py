"""Fields of a model that its parts, as they are chosen, do not read.

A file of configs/ sets fields for a part of its system, and they stay where
that part is swapped away: `moe.*` of Mixtral with `model.ffn=gelu`, its dense
twin. So such a field is no error by itself. Whoever sets one on the command
line means something by it, and is told (training/limits.py).
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

from architectures.parts import config as choices
from architectures.parts.config import ModelConfig


class Row(NamedTuple):
  """Fields that are read under one condition.

  Attributes:
    fields: the fields, by their dotted names in config.model.
    where: the condition, in words.
    decided_by: the fields that the condition is about.
    is_read: the condition.
  """
  fields: tuple[str, ...]
  where: str
  decided_by: tuple[str, ...]
  is_read: Callable[[ModelConfig], bool]


_WITHOUT_LOGITS = ('hash', 'uniform')  # routers that compute none
_SCALING = ('position', 'rope.scaling')

# A field that is in several rows is read where all of their conditions hold.
ROWS = (
    Row(('sinusoid',), 'model.position is sinusoidal', ('position',),
        lambda c: c.position == 'sinusoidal'),
    Row(('rope.theta', 'rope.fraction'), 'model.position is rope',
        ('position',), lambda c: c.position == 'rope'),
    Row(('rope.original_len',), 'model.position is rope and model.rope.scaling '
        'is llama3 or yarn', _SCALING, lambda c: c.position == 'rope'
        and c.rope.scaling in ('llama3', 'yarn')),
    Row(('rope.low_freq_factor', 'rope.high_freq_factor'), 'model.position is '
        'rope and model.rope.scaling is llama3', _SCALING,
        lambda c: c.position == 'rope' and c.rope.scaling == 'llama3'),
    Row(('rope.beta_fast', 'rope.beta_slow'), 'model.position is rope and '
        'model.rope.scaling is yarn', _SCALING,
        lambda c: c.position == 'rope' and c.rope.scaling == 'yarn'),
    Row(('relative.buckets', 'relative.max_distance'), 'model.position is '
        'relative', ('position',), lambda c: c.position == 'relative'),
    Row(('init_scale',), 'model.init is fan_in', ('init',),
        lambda c: c.init == 'fan_in'),
    Row(('ffn_dropout',), 'model.ffn is dense, model.moe.every is above 1, or '
        'model.moe.shared_experts above 0',
        ('ffn', 'moe.every', 'moe.shared_experts'), lambda c: c.ffn != 'moe'
        or c.moe.every > 1 or c.moe.shared_experts > 0),
    Row(tuple(f'moe.{field.name}' for field in dataclasses.fields(
        choices.MoEConfig)), 'model.ffn is moe', ('ffn',),
        lambda c: c.ffn == 'moe'),
    Row(('moe.jitter', 'moe.balance_loss', 'moe.balance_weight',
         'moe.z_loss_weight'), 'model.moe.router has logits, as '
        f'{" and ".join(_WITHOUT_LOGITS)} have not', ('moe.router',),
        lambda c: c.moe.router not in _WITHOUT_LOGITS),
    Row(('moe.group_size',), 'an expert has a capacity, or model.moe.router is '
        'sinkhorn or expert_choice', ('moe.router', 'moe.capacity_factor',
                                      'moe.eval_capacity_factor'),
        lambda c: c.moe.router in ('sinkhorn', 'expert_choice')
        or max(c.moe.capacity_factor, c.moe.eval_capacity_factor) > 0),
    Row(('moe.balance_weight',), 'model.moe.balance_loss is not none',
        ('moe.balance_loss',), lambda c: c.moe.balance_loss != 'none'),
)


def unread(c: ModelConfig) -> dict[str, Row]:
  """Returns the fields that `c` does not read, and why, by the first row of
  each that does not hold."""
  found: dict[str, Row] = {}
  for row in ROWS:
    if not row.is_read(c):
      found = dict.fromkeys(row.fields, row) | found
  return found
