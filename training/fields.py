"""Fields of `config.model`, changed by name in a model that is there."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import architectures
from architectures.parts import unread
from architectures.parts.config import ModelConfig
from configs.errors import RequestError, one_of, require


def replaced(config: ModelConfig, fields: Mapping[str, Any]) -> ModelConfig:
  """Returns the config with other fields, checked as any config is."""
  changes: dict[str, Any] = {}
  for name, value in fields.items():
    one_of('field of config.model', name, _names(config))
    require(name not in _SIZES, f'model.{name} decides the sizes of other '
            'parts: build a model with it, from a file of configs/')
    if isinstance(value, Mapping):
      group = getattr(config, name)
      for field in value:
        one_of(f'field of config.model.{name}', field, _names(group))
      value = dataclasses.replace(group, **value)
    changes[name] = value
  if 'num_layers' in changes and (
      architectures.stack(config) != 'encoder-decoder'):
    changes.setdefault('num_decoder_layers', changes['num_layers'])
  changed = dataclasses.replace(config, **changes)
  refuse_unread(changed, fields)
  return changed


# Other fields are derived from these when a run's config is resolved.
_SIZES = ('arch', 'd_model', 'num_heads', 'head_dim', 'kinds',
          'parametrization', 'mup_base_width', 'mup_base_head_dim')


def _names(group: Any) -> list[str]:
  return [field.name for field in dataclasses.fields(group)]


def refuse_unread(config: ModelConfig, fields: Mapping[str, Any]) -> None:
  """Raises RequestError for a field that the model would not read."""
  unread_fields = unread.unread(config)
  for name, value in fields.items():
    for full in ([f'{name}.{field}' for field in value]
                 if isinstance(value, Mapping) else [name]):
      if row := unread_fields.get(full):
        raise RequestError(f'model.{full} is not read by this model: it is '
                           f'read where {row.where}')
