"""What a model is: one page a system, built from `config.model`.

A system is found by its file: a page NAME.py in this folder. It has one class
with a `STACK`, the skeleton's, and with `PARTS`, the fields of config.model by
which the system differs from others; configs/NAME.py sets the same. It is known
as `model.arch` NAME, or as the class calls itself (`ARCH`). Where transformers
has the system too, the page ends with a record of that, `HF` (parts/hf).
"""

from collections.abc import Mapping
import functools
import importlib
import pkgutil
import types
from typing import Any

import flax.linen as nn

from architectures.parts import checks, skeletons, tables
from architectures.parts.config import ModelConfig
from architectures.parts.hf import HuggingFace
from configs.errors import one_of, require


@functools.cache
def systems() -> dict[str, type[Any]]:
  """Returns {model.arch: the class of its page}, of every page in this folder.
  """
  found = {}
  for file in pkgutil.iter_modules(__path__, f'{__name__}.'):
    if not file.ispkg:
      page = importlib.import_module(file.name)
      modules = [x for x in vars(page).values() if hasattr(x, 'STACK')
                 and x.__module__ == page.__name__]
      assert len(modules) == 1, f'{file.name} needs one class with a STACK'
      name = getattr(modules[0], 'ARCH', file.name.rpartition('.')[2])
      found[name] = modules[0]
  return found


def page(arch: str) -> types.ModuleType:
  """Returns the page of `arch`: a module under architectures/."""
  one_of('model.arch', arch, systems())
  return importlib.import_module(systems()[arch].__module__)


def hugging_face(arch: str) -> HuggingFace:
  """Returns the record that the page of `arch` has for Hugging Face's format.

  Raises:
    RequestError: where transformers has no such system.
  """
  require(hasattr(page(arch), 'HF'),
          f'model.arch {arch!r} has no counterpart in transformers')
  return page(arch).HF


def file_name(arch: str) -> str:
  """Returns what a system's page and its file of configs/ are called."""
  return page(arch).__name__.rpartition('.')[2]


def files(stack: str = '') -> list[str]:
  """Returns the `file_name` of every system, or of those of one stack."""
  return [file_name(arch) for arch, module in systems().items()
          if stack in ('', module.STACK)]


def resolve(model: ModelConfig | Mapping[str, Any]) -> ModelConfig:
  """Returns the frozen, validated config of `config.model`.

  Raises:
    RequestError: a sentence with the field, its value and the choices.
  """
  config = (model if isinstance(model, ModelConfig)
            else tables.make(model))
  one_of('model.arch', config.arch, systems())
  checks.check_model(
      config, {arch: module.STACK for arch, module in systems().items()})
  return config


def build(model: ModelConfig | Mapping[str, Any]) -> nn.Module:
  """Returns the module that `config.model` describes.

  Raises:
    RequestError: as `resolve`.
  """
  config = resolve(model)
  return systems()[config.arch](config)


def stack(model: ModelConfig | Mapping[str, Any]) -> str:
  """Returns what the model stacks: 'decoder' (which is causal), 'encoder', or
  'encoder-decoder'."""
  return systems()[resolve(model).arch].STACK


def init_cache(model: ModelConfig | Mapping[str, Any], batch: int,
               length: int):
  """Returns an empty key-value cache for `batch` rows of `length` tokens.

  Raises:
    RequestError: for an encoder, which writes no text.
  """
  config = resolve(model)
  choices = [arch for arch, module in systems().items()
             if module.STACK != 'encoder']
  require(
      config.arch in choices, f'model.arch {config.arch} is an encoder: it '
      'writes no text and has no cache; those that have one are '
      f'{", ".join(choices)}')
  return skeletons.init_cache(config, batch, length)
