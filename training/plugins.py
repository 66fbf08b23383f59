"""Files from outside the tree, and the parts that they declare.

A Python file that `--config`, `train.hooks`, archetype.build, a sweep or a
study reads may declare parts in dicts that are called as the tables of the
tree:

    # my/variant.py
    import flax.linen as nn
    from configs import gpt

    class Half(nn.Module):
      config: object
      axis: str = 'embed'

      def __call__(self, x_BLD):
        return x_BLD / 2

    NORMS = {'half': Half}

    def get_config(size='tiny'):
      c = gpt.get_config(size)
      c.model.norm = 'half'
      return c

From then on `half` is a norm like any other: a flag, a point of a sweep, a
choice that messages list. TABLES has the names of the tables. A run keeps the
text of the file in its config.json, so that it is resumed, evaluated and loaded
without the file, and is told when the file has changed.
"""

from collections.abc import Mapping
import hashlib
import importlib
import pathlib
import sys
import types
from typing import Any

import architectures
from architectures.parts import flat
from common.errors import require
from configs import base

# The tables that a file may add to, and the modules that have them.
MODULE_OF_TABLE = {
    'NORMS': 'architectures.parts.layers',
    'FFNS': 'architectures.parts.layers',
    'POSITIONS': 'architectures.parts.positions',
    'SCALINGS': 'architectures.parts.positions',
    'BLOCKS': 'architectures.parts.blocks',
    'RESIDUALS': 'architectures.parts.blocks',
    'MIXERS': 'architectures.parts.blocks',
    'MEMORIES': 'architectures.parts.lookup',
    'ROUTERS': 'architectures.parts.moe.routing',
    'BALANCE_LOSSES': 'architectures.parts.moe.routing',
    'RULES': 'architectures.parts.attention.kernels',
    'HEADS': 'architectures.parts.heads',
    'SYSTEMS': 'architectures',
    'OPTIMIZERS': 'training.optim.optimizers',
    'SCHEDULES': 'training.optim.optimizers',
    'SOURCES': 'training.data.sources',
    'OBJECTIVES': 'training.objectives',
    'TASKS': 'training.evals',
    'PHASES': 'tools.compare.phases',
}

# The files of this process that declare something: {path: text}.
text_of_loaded_file: dict[str, str] = {}
# The text of the file that has declared an entry: {(table, name): text}.
_text_that_declared: dict[tuple[str, str], str] = {}


def execute_file(file: str, text: str) -> types.ModuleType:
  """Executes the text of a Python file, and returns the module that it defines.
  A text that was executed before under this path is not executed again.

  Args:
    file: the path of the file, for messages.
    text: what it holds.
  """
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  name = f'outside_{pathlib.Path(file).stem}_{digest}'
  module = sys.modules.get(name)
  if module is not None and module.__file__ == file:
    return module  # its classes stay the same ones
  module = types.ModuleType(name)
  module.__file__ = file
  # Dataclasses, and a system's page, are looked up by the name of their module.
  sys.modules[name] = module
  try:
    exec(compile(text, file, 'exec'), module.__dict__)
  except BaseException:
    del sys.modules[name]
    raise
  return module


def declare_parts(file: str, text: str, module: types.ModuleType) -> None:
  """Adds the parts that a file from outside the tree declares, such as NORMS =
  {'half': Half}, to the tables of the same names in the tree.

  Args:
    file: the path of the file.
    text: what it holds.
    module: the module that `execute_file` returned.

  Raises:
    RequestError: for an entry that the tree, or another file, has already.
  """
  num_before = len(_text_that_declared)
  for table_name in MODULE_OF_TABLE:
    entries = getattr(module, table_name, None)
    if not isinstance(entries, Mapping):
      continue  # as TASKS of a sweep, which names tasks
    table = _find_table(table_name)
    if entries is table:
      continue  # the file has imported it
    for name, entry in entries.items():
      _add_entry(table_name, table=table, name=name, entry=entry, file=file,
                 text=text)
    remember_file(file, text)
  # Flags and all else that is made from the tables are made again.
  if len(_text_that_declared) > num_before:
    _refresh_derived_tables()


def _add_entry(table_name: str, table: Any, name: str, entry: Any, file: str,
               text: str) -> None:
  """Adds one entry of a file from outside the tree, such as the norm 'half', to
  a table of the tree, such as NORMS.

  Args:
    table_name: the name of the table, as the file has it.
    table: the table.
    name: the name of the entry.
    entry: the entry.
    file: the path of the file.
    text: what the file holds.

  Raises:
    RequestError: where the tree, or another file, has an entry of that name.
  """
  key = table_name, name
  if name in table:
    # A file may be read again, and may have changed meanwhile.
    is_same_entry = key in _text_that_declared and _text_that_declared[key] in (
        text, text_of_loaded_file.get(file))
    require(is_same_entry, f'{file}: {table_name} has {name!r}, which '
            f'{MODULE_OF_TABLE[table_name]} has already: call it otherwise')
  table[name] = entry
  _text_that_declared[key] = text


def remember_file(file: str, text: str) -> None:
  """Notes that the runs of this process need a file, whose text they write to
  their config.json."""
  text_of_loaded_file[file] = text


def _find_table(name: str) -> Any:
  """Returns the table of the tree with a name, such as NORMS."""
  return getattr(importlib.import_module(MODULE_OF_TABLE[name]), name)


def _refresh_derived_tables() -> None:
  """Lets what is derived from the tables be derived again."""
  flat.refresh_from_tables()
  base.refresh_fields()
  architectures.refresh()


def restore_declared_parts(files: Mapping[str, str]) -> None:
  """Declares the parts that a run which was started before has taken from files
  outside the tree, as these were then. A file that this process has loaded
  itself stays as it is.

  Args:
    files: the text of each file, by its path, as config.json has them.
  """
  for file, text in files.items():
    if file not in text_of_loaded_file:
      declare_parts(file, text, execute_file(file, text))
      remember_file(file, text)


def hash_loaded_files() -> dict[str, str]:
  """Returns a hash of each file that this process has loaded, by its path."""
  return {file: hash_text(text) for file, text in text_of_loaded_file.items()}


def hash_text(text: str) -> str:
  """Returns a short hash of a file's text."""
  return hashlib.sha256(text.encode()).hexdigest()[:16]
