"""What a model is: one page a system, built from `config.model`."""

from collections.abc import Mapping
import importlib
from typing import Any

import flax.linen as nn

from architectures.parts import config as model_config
from architectures.parts.config import ModelConfig

# arch: (page, its module)
ARCHITECTURES = {
    'bert': ('bert', 'BERT'),
    'bloom': ('bloom', 'BLOOM'),
    'gpt': ('gpt', 'GPT'),
    'gpt4-rumoured': ('gpt4', 'RumouredGPT4'),
    'gpt_neox': ('gpt_neox', 'GPTNeoX'),
    'gshard': ('gshard', 'GShard'),
    'llama': ('llama', 'LLaMA'),
    'mixtral': ('mixtral', 'Mixtral'),
    'switch': ('switch', 'Switch'),
    't5': ('t5', 'T5'),
    'transformer': ('transformer', 'Transformer'),
}


def resolve(model: ModelConfig | Mapping[str, Any]) -> ModelConfig:
  """Returns the frozen, validated config of `config.model`."""
  return model if isinstance(model, ModelConfig) else model_config.make(model)


def page(arch: str):
  """Returns the page of `arch`: a module under architectures/."""
  model_config.one_of('model.arch', arch, ARCHITECTURES)
  return importlib.import_module(f'architectures.{ARCHITECTURES[arch][0]}')


def build(model: ModelConfig | Mapping[str, Any]) -> nn.Module:
  """Returns the module that `config.model` describes.

  Raises:
    ValueError: a sentence with the field, its value and the choices.
  """
  config = resolve(model)
  return getattr(page(config.arch), ARCHITECTURES[config.arch][1])(config)


def init_cache(model: ModelConfig | Mapping[str, Any], batch: int,
               length: int):
  """Returns an empty key-value cache for `batch` rows of `length` tokens."""
  from architectures.parts import skeletons
  return skeletons.init_cache(resolve(model), batch, length)
