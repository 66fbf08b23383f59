"""Kinds of layer: what the dicts of config.model.kinds may say.

`model.pattern` names the kinds of one period of layers, `model.prefix` those of
the first layers and `model.suffix` those of the last. What a kind does not say
is the model's.
"""

from collections.abc import Mapping
import math
from typing import Any

DENSE = 'dense'  # of ffn: the network of the model's dense layers
# The parts of a stack, in their order, as its parameters are named.
SECTIONS = 'prefix', 'layers', 'suffix'


def split(names: str) -> tuple[str, ...]:
  """Returns the kinds that a pattern, a prefix or a suffix names."""
  return tuple(names.split(',')) if names else ()


def fewest_layers(model: Mapping[str, Any], least: int = 1) -> int:
  """Returns how many layers a model of these kinds has at least, and no fewer
  than `least`."""
  period = len(split(model['pattern'])) or 1
  apart = sum(len(split(model.get(x, ''))) for x in ('prefix', 'suffix'))
  return apart + period * max(1, math.ceil((least - apart) / period))


def with_experts(model: Mapping[str, Any], every: int) -> dict[str, Any]:
  """Returns {'pattern', 'kinds'} in which the last of every so many layers has
  experts and the others the dense network between them, as in GShard and
  Switch (every other layer, the second first)."""
  names = split(model.get('pattern', ''))
  kinds = dict(model.get('kinds', {}))
  if every == 1:
    return dict(pattern=','.join(names), kinds=kinds)
  pattern, made = [], {}
  for i in range(math.lcm(len(names) or 1, every)):
    kind = names[i % len(names)] if names else ''
    moe = i % every == every - 1
    pattern.append(f'{kind}_' * bool(kind) + ('moe' if moe else DENSE))
    made[pattern[-1]] = kinds.get(kind, {}) | ({} if moe else {'ffn': DENSE})
  apart = {name: kinds[name] for field in ('prefix', 'suffix')
           for name in split(model.get(field, '')) if name in kinds}
  return dict(pattern=','.join(pattern), kinds=apart | made)
