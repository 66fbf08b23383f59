"""What a model is: one page a system, built from `config.model`."""

from collections.abc import Mapping
import importlib
from typing import Any

import flax.linen as nn

from architectures.parts import config as model_config
from architectures.parts.config import ModelConfig
from configs.errors import one_of, require

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
  one_of('model.arch', arch, ARCHITECTURES)
  return importlib.import_module(f'architectures.{ARCHITECTURES[arch][0]}')


def build(model: ModelConfig | Mapping[str, Any]) -> nn.Module:
  """Returns the module that `config.model` describes.

  Raises:
    ValueError: a sentence with the field, its value and the choices.
  """
  config = resolve(model)
  return _class(config.arch)(config)


def _class(arch: str) -> type[nn.Module]:
  return getattr(page(arch), ARCHITECTURES[arch][1])


def stack(model: ModelConfig | Mapping[str, Any]) -> str:
  """Returns what the model stacks: 'decoder' (which is causal), 'encoder', or
  'encoder-decoder'."""
  return _class(resolve(model).arch).STACK


def init_cache(model: ModelConfig | Mapping[str, Any], batch: int,
               length: int):
  """Returns an empty key-value cache for `batch` rows of `length` tokens.

  Raises:
    ValueError: for an encoder, which writes no text.
  """
  from architectures.parts import skeletons
  config = resolve(model)
  choices = [arch for arch in ARCHITECTURES
             if _class(arch).STACK != 'encoder']
  require(
      config.arch in choices, f'model.arch {config.arch} is an encoder: it '
      'writes no text and has no cache; those that have one are '
      f'{", ".join(choices)}')
  return skeletons.init_cache(config, batch, length)
