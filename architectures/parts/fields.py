"""Whether the fields of a model config are there, of their type, and in range.

This is what any source of a config has to pass: a file under configs/, a run's
config.json, or the config.json of a Hugging Face folder. What the fields mean
together is checked in checks.py.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from configs import kinds as layer_kinds
from configs.base import MOST_FLOAT
from configs.errors import require, short

# Of each count, the largest that is not a slip of the keyboard.
MOST = {
    'd_model': 2**20,
    'num_layers': 2**12,
    'num_decoder_layers': 2**12,
    'num_heads': 2**14,
    'num_kv_heads': 2**14,
    'head_dim': 2**16,
    'd_ff': 2**24,
    'vocab_size': 2**26,
    'max_len': 2**26,
    'type_vocab_size': 2**16,
    'position_offset': 2**16,
    'mtp_depth': 2**6,
    'attention_conv': 2**10,
    'streams.count': 2**6,
    'streams.iterations': 2**10,
    'streams.block_size': 2**13,
    'num_labels': 2**20,
    'sliding_window': 2**31 - 1,
    'mup_base_width': 2**20,
    'mup_base_head_dim': 2**16,
    'lora.rank': 2**16,
    'rope.original_len': 2**26,
    'relative.buckets': 2**16,
    'relative.max_distance': 2**31 - 1,
    'latent.q_rank': 2**20,
    'latent.kv_rank': 2**20,
    'latent.nope_dim': 2**16,
    'latent.rope_dim': 2**16,
    'latent.v_dim': 2**16,
    'deltanet.key_heads': 2**14,
    'deltanet.value_heads': 2**14,
    'deltanet.key_dim': 2**16,
    'deltanet.value_dim': 2**16,
    'deltanet.conv': 2**10,
    'mamba2.heads': 2**14,
    'mamba2.head_dim': 2**16,
    'mamba2.groups': 2**14,
    'mamba2.state': 2**16,
    'mamba2.conv': 2**10,
    'kda.key_heads': 2**14,
    'kda.value_heads': 2**14,
    'kda.key_dim': 2**16,
    'kda.value_dim': 2**16,
    'kda.conv': 2**10,
    'kda.rank': 2**20,
    'gla.heads': 2**14,
    'gla.key_dim': 2**16,
    'gla.value_dim': 2**16,
    'gla.conv': 2**10,
    'gla.rank': 2**20,
    'retnet.heads': 2**14,
    'retnet.key_dim': 2**16,
    'retnet.value_dim': 2**16,
    'moe.num_experts': 2**16,
    'moe.top_k': 2**16,
    'moe.expert_groups': 2**16,
    'moe.top_groups': 2**16,
    'moe.d_ff': 2**24,
    'moe.shared_experts': 2**10,
    'moe.group_size': 2**31 - 1,
}


def check_fields(fields: Mapping[str, Any], group: type,
                 prefix: str = '') -> None:
  """Raises RequestError unless `fields` are those of a dataclass, each of the
  type that it says and within its range.

  Args:
    fields: values by name; a group of them is a mapping.
    group: the dataclass.
    prefix: of the dotted names, below `model.`.
  """
  kinds = {field.name: field.type for field in dataclasses.fields(group)}
  for name in kinds:
    require(name in fields, f'model.{prefix}{name} is missing')
  for name, value in fields.items():
    require(name in kinds, f'model.{prefix}{name} is no field of a model: '
            f'choose from {", ".join(kinds)}')
    if name == 'kinds':
      _check_kinds(value, fields, kinds)
    elif dataclasses.is_dataclass(kinds[name]):
      require(isinstance(value, Mapping), f'model.{prefix}{name} is a '
              f'{type(value).__name__}: it must be a group of fields')
      check_fields(value, kinds[name], f'{prefix}{name}.')
    elif not hasattr(value, 'dtype'):  # traced, where runs train as one
      _check_value(prefix + name, value, kinds[name])


def _check_kinds(value: Any, fields: Mapping[str, Any],
                 types: Mapping[str, type]) -> None:
  """Raises RequestError for a kind of layer with a field that it does not have,
  or whose value the model's own field could not have."""
  require(isinstance(value, Mapping), f'model.kinds is {short(value)}: it must '
          'be a group of kinds of layer, by name')
  layer_kinds.check_names(value, fields['rope'])
  groups = {field.name: field.type for field in dataclasses.fields(
      types['rope'])}
  for name, kind in value.items():
    for field, x in kind.items():
      if field == 'rope':
        for inner, number in x.items():
          _check_value(f'rope.{inner}', number, groups[inner],
                       f'kinds.{name}.rope.{inner}')
        continue
      own = layer_kinds.FIELDS[field]
      _check_value(own, x, types[own], f'kinds.{name}.{field}')
      require(x or field not in ('num_heads', 'num_kv_heads', 'head_dim',
                                 'd_ff', 'attention_scale'),
              f'model.kinds.{name}.{field} is 0: leave it away, to have the '
              "model's")


def _check_value(name: str, value: Any, kind: type, who: str = '') -> None:
  who = f'model.{who or name}'
  require(type(value) is kind or kind is float and type(value) is int,
          f'{who} is {short(value)}, of type {type(value).__name__}: it '
          f'must be of type {kind.__name__}')
  if kind is int:
    require(0 <= value <= MOST[name], f'{who} is {short(value)}: it '
            f'must be an integer >= 0 and <= {MOST[name]:,}')
  elif kind is tuple:
    require(len(value) <= MOST['head_dim'] and all(
        type(x) in (int, float) and abs(x) <= MOST_FLOAT for x in value),
            f'{who} is {short(value)}: it must hold numbers between '
            f'{-MOST_FLOAT:g} and {MOST_FLOAT:g}')
  elif kind is float:
    require(-MOST_FLOAT <= value <= MOST_FLOAT, f'{who} is '
            f'{short(value)}: it must be a number between {-MOST_FLOAT:g} and '
            f'{MOST_FLOAT:g}')
