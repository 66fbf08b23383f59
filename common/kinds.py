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
  """Returns the names of the kinds of layer that model.pattern, model.prefix or
  model.suffix lists with commas between; () for ''."""
  if not names:
    return ()
  return tuple(names.split(','))


def fewest_layers(model: Mapping[str, Any], least: int = 1) -> int:
  """Returns the smallest number of layers that a model of this layout can have,
  and that is `least` or more.

  `model.pattern` lists one period of layers, which is repeated a whole number
  of times, at least once. `model.prefix` and `model.suffix` list the layers
  before and after the repeated ones.

  Args:
    model: config.model, with its `pattern`, `prefix` and `suffix`.
    least: the lower bound of the number of layers.
  """
  layers_of_period = len(split_kind_names(model['pattern'])) or 1
  prefix = split_kind_names(model.get('prefix', ''))
  suffix = split_kind_names(model.get('suffix', ''))
  layers_outside = len(prefix) + len(suffix)
  num_periods = math.ceil((least - layers_outside) / layers_of_period)
  return layers_outside + layers_of_period * max(1, num_periods)


def place_experts(model: Mapping[str, Any], interval: int) -> dict[str, Any]:
  """Returns the fields `pattern` and `kinds` of a model in which the last of
  every `interval` layers has a mixture of experts and the others have a dense
  feed-forward network. GShard and Switch have experts in every second layer.

  `pattern` names the kind of each layer in one repeated period. `kinds` maps a
  kind of layer to the fields in which it differs from the model.

  Args:
    model: config.model. If it has a pattern already, each kind of layer in it
      is split into one with experts and one without.
    interval: the distance between two layers with experts.
  """
  names_in_pattern = split_kind_names(model.get('pattern', ''))
  kinds = dict(model.get('kinds', {}))
  # With experts in every layer, no kind differs from the model in its network.
  if interval == 1:
    return {'pattern': ','.join(names_in_pattern), 'kinds': kinds}

  # Keep the kinds of the layers before and after the repeated ones.
  new_kinds = {}
  for field in ('prefix', 'suffix'):
    for name in split_kind_names(model.get(field, '')):
      if name in kinds:
        new_kinds[name] = kinds[name]

  # Name a kind for each layer of the new period. Its length is the least common
  # multiple of the old period and the interval, after which both repeat.
  new_pattern = []
  for i in range(math.lcm(len(names_in_pattern) or 1, interval)):
    old_name = ''
    fields_of_kind = {}
    if names_in_pattern:
      old_name = names_in_pattern[i % len(names_in_pattern)]
      fields_of_kind = dict(kinds.get(old_name, {}))
    network = DENSE_NETWORK
    if i % interval == interval - 1:
      network = 'moe'
    else:
      fields_of_kind['ffn'] = DENSE_NETWORK
    new_name = network
    if old_name:
      new_name = f'{old_name}_{network}'
    new_pattern.append(new_name)
    new_kinds[new_name] = fields_of_kind
  return {'pattern': ','.join(new_pattern), 'kinds': new_kinds}
