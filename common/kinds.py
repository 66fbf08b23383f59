"""Kinds of layer: what the dicts of config.model.kinds may say.

`model.pattern` names the kinds of one period of layers, `model.prefix` those of
the first layers and `model.suffix` those of the last. What a kind does not say
is the model's.
"""

from collections.abc import Mapping
import math
from typing import Any

# The value of a kind's ffn that stands for the network of the dense layers.
DENSE_NETWORK = 'dense'
REPEATED_SECTION = 'layers'  # the section whose layers are repeated
# The sections of a stack, in their order, as its parameters are named.
SECTIONS = 'prefix', REPEATED_SECTION, 'suffix'


def split_kind_names(names: str) -> tuple[str, ...]:
  """Returns the kinds that a pattern, a prefix or a suffix names."""
  if not names:
    return ()
  return tuple(names.split(','))


def fewest_layers(model: Mapping[str, Any], least: int = 1) -> int:
  """Returns how many layers a model of these kinds has at least, and no fewer
  than `least`."""
  period = len(split_kind_names(model['pattern'])) or 1
  prefix = split_kind_names(model.get('prefix', ''))
  suffix = split_kind_names(model.get('suffix', ''))
  apart = len(prefix) + len(suffix)
  periods = math.ceil((least - apart) / period)
  return apart + period * max(1, periods)


def place_experts(model: Mapping[str, Any], every: int) -> dict[str, Any]:
  """Returns a pattern and its kinds in which the last of every so many layers
  has experts, and the others the dense network between them, as in GShard and
  Switch (every other layer, the second first).

  Args:
    model: config.model, with a pattern of its own or without.
    every: the distance between two layers of experts.
  """
  names = split_kind_names(model.get('pattern', ''))
  kinds = dict(model.get('kinds', {}))
  if every == 1:
    return {'pattern': ','.join(names), 'kinds': kinds}

  # The kinds of a prefix and a suffix stay.
  made = {}
  for field in ('prefix', 'suffix'):
    for name in split_kind_names(model.get(field, '')):
      if name in kinds:
        made[name] = kinds[name]

  # Each kind of the pattern becomes two: one with experts, and a dense one.
  pattern = []
  for i in range(math.lcm(len(names) or 1, every)):
    kind, changes = '', {}
    if names:
      kind = names[i % len(names)]
      changes = dict(kinds.get(kind, {}))
    network = DENSE_NETWORK
    if i % every == every - 1:
      network = 'moe'
    else:
      changes['ffn'] = DENSE_NETWORK
    name = network
    if kind:
      name = f'{kind}_{network}'
    pattern.append(name)
    made[name] = changes
  return {'pattern': ','.join(pattern), 'kinds': made}
