"""Fields of `config.model`, changed by name in a model that is there."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import architectures
from architectures.parts import tables
from architectures.parts.config import ModelConfig
from configs.errors import require
from training import config_files


def replaced(config: ModelConfig, fields: Mapping[str, Any]) -> ModelConfig:
  """Returns the config with other fields, checked as any config is. A field
  that is 0 where a config's is derived, is derived: with lora.rank alone,
  lora.alpha becomes as large."""
  changes: dict[str, Any] = {}
  for name, value in fields.items():
    config_files.check_field('config.model', name, _names(config))
    require(name not in _SIZES, f'model.{name} decides the sizes of other '
            'parts: build a model with it, from a file of configs/')
    if isinstance(value, Mapping):
      group = getattr(config, name) or tables.GROUPS[name]()
      for field in value:
        config_files.check_field(f'config.model.{name}', field, _names(group))
      if name == 'lora' and group.alpha == group.rank:
        value = {'alpha': 0} | value
      value = dataclasses.replace(group, **value)
    changes[name] = value
  if 'num_layers' in changes and (
      architectures.stack(config) != 'encoder-decoder'):
    changes.setdefault('num_decoder_layers', changes['num_layers'])
  changed = tables.make(tables.as_dict(
      dataclasses.replace(config, **changes)))
  refuse_unread(changed, fields)
  return changed


def name_no_kernel(model: Any) -> None:
  """Leaves the kernels that a run names to `auto`, to use the model and not to
  train it: this machine may lack them, or they cannot do what is asked.

  Args:
    model: config.model, or a dict of it, which is changed.
  """
  for group, name in ((model, 'attention_kernel'),
                      (model['moe'], 'grouped_kernel')):
    if group[name] != 'xla':
      group[name] = 'auto'


# Other fields are derived from these when a run's config is resolved.
_SIZES = ('arch', 'd_model', 'num_heads', 'head_dim', 'kinds',
          'parametrization', 'mup_base_width', 'mup_base_head_dim')


def _names(group: Any) -> list[str]:
  return [field.name for field in dataclasses.fields(group)]


def refuse_unread(config: ModelConfig, fields: Mapping[str, Any]) -> None:
  """Raises RequestError for a field that the model would not read."""
  unread = tables.unread(config)
  for name in tables.flat(fields):
    require(name not in unread, f'model.{name} is not read by this model: it '
            f'is read where {unread.get(name)}')
