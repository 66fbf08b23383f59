"""The models: one page a system, built from `config.model`.

A system is found by its file: a page NAME.py in this folder. It has one class
with a `STACK`, the skeleton's, and with `PARTS`, the fields of config.model by
which the system differs from others; configs/NAME.py sets the same. It is known
as `model.arch` NAME, or as the class calls itself (`ARCH`). Where transformers
has the system too, the page ends with a class of that, `HF` (parts/hf).
"""

from collections.abc import Mapping
import functools
import importlib
import pkgutil
import sys
import types
from typing import Any

import flax.linen as nn

from architectures.parts import flat, skeletons, tables
from architectures.parts.config import ModelConfig
from architectures.parts.hf import HuggingFace
from common.fields import PositiveSize, check_argument_types
from common.errors import RequestError, check_choice, require


# Systems of files from outside the tree: {model.arch: its class}.
SYSTEMS: dict[str, type[Any]] = {}


def refresh() -> None:
  """Forgets what was cached, so that systems that were added to SYSTEMS are
  found."""
  systems.cache_clear()
  arch_of_model_type.cache_clear()
  # The cache is under the check of the arguments.
  typed_system: Any = system
  typed_system.__wrapped__.cache_clear()


@functools.cache
def systems() -> dict[str, type[Any]]:
  """Returns the class of each system by its name, model.arch: those of the
  pages (the modules of this folder), and those of SYSTEMS."""
  classes = {}
  for file in _page_files():
    cls = _class_of_page(file)
    classes[getattr(cls, 'ARCH', file)] = cls
  return classes | SYSTEMS


def _page_files() -> list[str]:
  """Returns the names of the pages in this folder."""
  files = pkgutil.iter_modules(__path__)
  return [file.name for file in files if not file.ispkg]


def _class_of_page(file: str) -> type[Any]:
  """Returns the class that a page defines: the one with a STACK."""
  module = importlib.import_module(f'{__name__}.{file}')
  classes = []
  for value in vars(module).values():
    if hasattr(value, 'STACK') and value.__module__ == module.__name__:
      classes.append(value)
  assert len(classes) == 1, f'{file} has {len(classes)} systems'
  return classes[0]


@check_argument_types
@functools.cache
def system(arch: str) -> type[Any]:
  """Returns the Flax class of an architecture by its name, such as 'llama'.

  Each architecture is a module of this folder. To start fast, only the module
  of that name is imported. All are imported if no file has the name.

  Args:
    arch: the name, which is model.arch in a config.

  Raises:
    RequestError: if there is no such architecture.
  """
  # A file may hold an architecture of another name, which its ARCH says.
  if arch in _page_files():
    cls = _class_of_page(arch)
    if getattr(cls, 'ARCH', arch) == arch:
      return cls
  # The name is not that of a file, so all files are searched.
  check_choice('model.arch', value=arch, choices=systems())
  return systems()[arch]


def page(arch: str) -> types.ModuleType:
  """Returns the module that defines the system `arch`: one of this folder, or a
  file from outside."""
  return importlib.import_module(system(arch).__module__)


def hugging_face(arch: str) -> HuggingFace:
  """Returns how the config and the weights of the system `arch` stand in the
  Hugging Face format.

  Raises:
    RequestError: where transformers has no such system.
  """
  module = page(arch)
  require(hasattr(module, 'HF'),
          f'model.arch {arch!r} has no counterpart in transformers')
  return module.HF()


@functools.cache
def arch_of_model_type() -> dict[str, str]:
  """Returns the name of a system, model.arch, by each model_type by which a
  Hugging Face config.json may name it."""
  archs: dict[str, str] = {}
  for arch, cls in systems().items():
    hf_class = getattr(sys.modules[cls.__module__], 'HF', None)
    if hf_class is None:
      continue
    for model_type in (hf_class.model_type, *hf_class.more_model_types):
      archs[model_type] = arch
  return archs


def file_name(arch: str) -> str:
  """Returns the name of the file of the system `arch` in this folder, which is
  that of its file in configs/ too."""
  return page(arch).__name__.rpartition('.')[2]


@check_argument_types
def files(stack: str = '') -> list[str]:
  """Returns the name of the file of every system, or of those whose stack is
  'decoder', 'encoder' or 'encoder-decoder'."""
  archs = list(systems())
  if stack:
    archs = _archs_of_skeleton(stack)
  return [file_name(arch) for arch in archs]


def resolve(model: ModelConfig | Mapping[str, Any]) -> ModelConfig:
  """Makes the frozen config of a model, with all derived fields filled in, and
  checks it.

  Args:
    model: the fields of config.model as nested dicts, or such a config, which
      is only checked.

  Raises:
    RequestError: for a wrong field. The message has its name, its value and the
      choices.
  """
  config = model
  if not isinstance(config, ModelConfig):
    config = flat.make_model(config)
  tables.check_model(config, stack=system(config.arch).STACK,
                     archs=_archs_of_skeleton)
  return config


def _archs_of_skeleton(stack_name: str) -> list[str]:
  """Returns the names of the systems whose stack is 'decoder', 'encoder' or
  'encoder-decoder'."""
  return [arch for arch, cls in systems().items() if cls.STACK == stack_name]


def build(model: ModelConfig | Mapping[str, Any]) -> nn.Module:
  """Returns the module that `config.model` describes.

  Raises:
    RequestError: for what `resolve` refuses.
  """
  config = resolve(model)
  return system(config.arch)(config)


@check_argument_types
def stack(model: ModelConfig | Mapping[str, Any]) -> str:
  """Returns the kind of the model's stack: 'decoder' (which is causal),
  'encoder', or 'encoder-decoder'."""
  if isinstance(model, ModelConfig):
    return system(model.arch).STACK
  return system(model.get('arch')).STACK


@check_argument_types
def init_cache(model: ModelConfig | Mapping[str, Any], batch: PositiveSize,
               length: PositiveSize) -> Any:
  """Makes an empty cache for generating text with a model. It holds the keys
  and values of attention and the states of recurrences, for each layer.

  Args:
    model: the config of the model, resolved or as nested dicts.
    batch: the number of rows.
    length: for how many tokens each row has room.

  Returns:
    The cache, a tree of arrays.

  Raises:
    RequestError: for an encoder, which writes no text.
  """
  config = resolve(model)
  kind_of_stack = stack(config)
  if kind_of_stack == 'encoder':
    writers = _archs_of_skeleton('decoder')
    writers += _archs_of_skeleton('encoder-decoder')
    raise RequestError(
        f'model.arch {config.arch} is an encoder: it writes no text and has no '
        f'cache; those that have one are {", ".join(writers)}')
  return skeletons.init_cache(config, batch=batch, length=length)
