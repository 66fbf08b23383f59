"""Python files that a user names: configs, sweeps, studies, suites and hooks,
and the parts that they declare.

Files of configs/ are found wherever a program runs, by their path or by their
last name alone, such as `gpt`; a file of that path goes first. A file that
fails is refused in one sentence, with its line.

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

from collections.abc import Callable, Iterator, Mapping
import difflib
import hashlib
import importlib
import os
import pathlib
import pkgutil
import re
import sys
import tokenize
import traceback
import types
from typing import Any

import ml_collections

import architectures
from architectures.parts import flat
from common.errors import RequestError, require, shorten
import configs
from configs import base

# The tables that a file may add to, and the modules that have them.
MODULE_OF_TABLE = {
    'NORMS': 'architectures.parts.layers',
    'FFNS': 'architectures.parts.layers',
    'POSITIONS': 'architectures.parts.positions',
    'SCALINGS': 'architectures.parts.positions',
    'BLOCKS': 'architectures.parts.blocks',
    'RESIDUALS': 'architectures.parts.streams',
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


def list_config_files(folders: tuple[str, ...], defines: str) -> list[str]:
  """Lists the Python files in configs/ that define a certain function, such as
  get_config.

  Args:
    folders: the folders in configs/ to look in; '': configs/ itself.
    defines: the name of the function, or of a value.

  Returns:
    Their paths in configs/ without the suffix, such as `gpt` or `sweeps/small`.
  """
  definition = re.compile(rf'^(def )?{defines}\b', re.MULTILINE)
  names = []
  for folder in folders:
    for path in sorted((configs.FOLDER / folder).glob('*.py')):
      if definition.search(path.read_text()):
        path_in_configs = path.relative_to(configs.FOLDER)
        names.append(path_in_configs.with_suffix('').as_posix())
  return names


def find_config_file(name: str, asked_in: str, folders: tuple[str, ...] = ('',),
                     defines: str = 'get_config') -> str:
  """Finds the Python file of a config, a sweep or a study that the user names,
  either by its path or by its name in configs/.

  Args:
    name: the name as the user writes it.
    asked_in: the flag or argument that has the name, for the message.
    folders: the folders in configs/ in which such files lie; '': configs/
      itself.
    defines: the function that each of these files defines.

  Returns:
    The path of the file.

  Raises:
    RequestError: where there is no such file, with similar names.
  """
  if os.path.isfile(name):  # which is False for a name that is too long
    return name

  # The name may be a path in configs/ or the last part of one.
  asked_name = name.removeprefix('configs/').removesuffix('.py')
  known_paths = list_config_files(folders, defines)
  stem_of_path = {path: pathlib.Path(path).name for path in known_paths}
  matches = [path for path, stem in stem_of_path.items()
             if asked_name in (path, stem)]
  if len(matches) == 1:
    return str(configs.FOLDER / f'{matches[0]}.py')

  # Suggest files of similar names. If the name fits files in several folders,
  # these are among them.
  similar_paths = []
  similar_stems = difflib.get_close_matches(
      pathlib.Path(asked_name).name, set(stem_of_path.values()), n=4)
  for similar_stem in similar_stems:
    for path, stem in stem_of_path.items():
      if stem == similar_stem:
        similar_paths.append(path)
  question = ''
  if similar_paths:
    question = f'. Did you mean {" or ".join(similar_paths)}?'
  places = ' or '.join(str(configs.FOLDER / folder) for folder in folders)
  raise RequestError(f'unknown {asked_in} {shorten(name)}: write the path of a '
                     f'file, or the name of one in {places}{question}')


def load_config_file(spec: str) -> ml_collections.ConfigDict:
  """Loads a config from a Python file, by calling the get_config() that it
  defines.

  Args:
    spec: FILE.py or FILE.py:SIZE. FILE.py is a path, or the name of a file in
      configs/, such as `gpt`. get_config is called with SIZE if it is given.

  Raises:
    RequestError: where the file is missing, fails, or returns no config. The
      message has the file and the line.
  """
  name, colon, size = spec.partition(':')
  file = find_config_file(name, '--config')
  module = run_user_file(file)
  require(hasattr(module, 'get_config'), f'--config {file!r} is no config: it '
          'has no get_config()')
  # Without a size, get_config takes its own default.
  if colon:
    config = call_user_function(file, module.get_config, size)
  else:
    config = call_user_function(file, module.get_config)
  check_config(config, f'{file}: get_config()')
  return config


def run_user_file(file: str) -> types.ModuleType:
  """Runs a Python file of the user and returns its module; adds the parts of a
  model that the file declares, such as norms, to the project's.

  Raises:
    RequestError: where the file fails, with the line.
  """
  text = call_user_function(file, read_python_file, file)
  module = call_user_function(file, execute_file, file, text)
  declare_parts(file, text=text, module=module)
  return module


def read_python_file(file: str) -> str:
  """Returns the text of a Python file, decoded as its first lines say."""
  with tokenize.open(file) as opened:
    return opened.read()


def call_user_function(file: str, function: Callable, *args):
  """Calls a function that a user's file defines. If it fails, the error becomes
  a sentence with the file and the line, without a traceback.

  Args:
    file: the path of the file, for the message.
    function: the function to call.
    *args: its arguments.

  Returns:
    What the function returns.

  Raises:
    RequestError: where the function fails.
  """
  try:
    return function(*args)
  except RequestError:
    raise  # which is a sentence already
  except (Exception, SystemExit) as error:  # whatever the user's code raises
    # Find the last line of the user's file that was run. There may be none, for
    # instance if the file could not be parsed.
    place = file
    for frame in traceback.extract_tb(error.__traceback__):
      if frame.filename == file:
        place = f'{file}, line {frame.lineno}'
    if isinstance(error, SyntaxError) and error.filename == file:
      place = f'{file}, line {error.lineno}'
    reason = ' '.join(str(error).split()) or 'no message'
    raise RequestError(f'{place}: {type(error).__name__}: {reason}') from error


def check_config(config: Any, subject: str) -> None:
  """Checks that what a user's function has returned is a config: it must have
  all fields of configs/base.py, with values of the declared types and ranges.

  Args:
    config: the value that the function returned.
    subject: the name of the function, with which a message begins.

  Raises:
    RequestError: for anything else.
  """
  if not isinstance(config, ml_collections.ConfigDict):
    raise RequestError(
        f'{subject} returned {shorten(config)}, which is no ConfigDict: end it '
        'with `return c`, where c began as base.base()')
  missing_fields = base.FIELDS.keys() - flat.flatten_groups(config)
  if missing_fields:
    raise RequestError(
        f'{subject}: the fields {shorten(sorted(missing_fields))} are missing: '
        'begin with base.base() of configs/base.py')
  base.check_config(config.to_dict(), f'{subject}: ')


def execute_file(file: str, text: str) -> types.ModuleType:
  """Executes a Python file and returns the module that it defines. The same
  text at the same path is executed only once.

  Args:
    file: the path of the file, for messages.
    text: the content of the file.
  """
  # The name of the module has a hash of the content, so that a changed file
  # becomes another module.
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  name = f'outside_{pathlib.Path(file).stem}_{digest}'
  module = sys.modules.get(name)
  if module is not None and module.__file__ == file:
    # Executing it again would make its classes different from before.
    return module
  module = types.ModuleType(name)
  module.__file__ = file
  # Register the module before it is executed: dataclasses look up their module
  # by its name.
  sys.modules[name] = module
  try:
    exec(compile(text, file, 'exec'), module.__dict__)
  except BaseException:
    del sys.modules[name]
    raise
  return module


def declare_parts(file: str, text: str, module: types.ModuleType) -> None:
  """Adds the parts of models that a user's file declares, such as NORMS =
  {'half': Half}, to our own tables of the same names.

  Args:
    file: the path of the file.
    text: the content of the file.
    module: the module that `execute_file` returned.

  Raises:
    RequestError: for the name of a part that exists already.
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
  # Make everything again that was made from the tables, such as flags.
  if len(_text_that_declared) > num_before:
    _refresh_derived_tables()


def _add_entry(table_name: str, table: Any, name: str, entry: Any, file: str,
               text: str) -> None:
  """Adds a part of models that a user's file declares, such as the norm 'half',
  to our own table of such parts, such as NORMS.

  Args:
    table_name: the name of the table.
    table: the table, which is changed.
    name: the name of the part.
    entry: the class or function that the file has for it.
    file: the path of the file.
    text: the content of the file.

  Raises:
    RequestError: if we, or another file, have a part of that name already.
  """
  key = table_name, name
  if name in table:
    # A file may be read again, and may have been changed meanwhile.
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
  """Declares the parts of models that a run has taken from the user's files, as
  these files were when the run was started. A file that this process has loaded
  itself is left as it is.

  Args:
    files: {path: text} of the files, as the run's config.json has them.
  """
  for file, text in files.items():
    if file not in text_of_loaded_file:
      declare_parts(file, text=text, module=execute_file(file, text))
      remember_file(file, text)


def hash_loaded_files() -> dict[str, str]:
  """Returns a hash of each file that this process has loaded, by its path."""
  return {file: hash_text(text) for file, text in text_of_loaded_file.items()}


def hash_text(text: str) -> str:
  """Returns a short hash of a file's text."""
  return hashlib.sha256(text.encode()).hexdigest()[:16]


# Tables whose entries lie in files of a folder of the tree. A run needs one
# objective and few tasks, of dozens.


class LazyTable(Mapping):
  """A table with the entries of all files of a package, in the order of the
  files' names; a file is imported when an entry of it may be asked for.

  An entry is looked for in the file of the same name, and then in all others.
  One that is set, as by a file from outside the tree, comes first.
  """

  def __init__(self, package: str, path: Any,
               read: Callable[[types.ModuleType], Mapping[str, Any]],
               without: tuple[str, ...] = ()):
    """Makes a table whose entries are in the files of a package. A file is
    imported only when one of its entries is needed.

    Args:
      package: the name of the package.
      path: the folders of the package's files, its __path__.
      read: returns {name: entry} for the module of a file.
      without: the names of files that have no entries.
    """
    self._package = package
    self._read = read
    # Entries that were set by hand have precedence over those of files.
    self._set_entries: dict[str, Any] = {}
    self._entries_of_file: dict[str, Mapping[str, Any]] = {}  # if imported
    self._files = []
    for file in pkgutil.iter_modules(path):
      if not file.ispkg and file.name not in without:
        self._files.append(file.name)

  def _import_entries(self, file: str) -> Mapping[str, Any]:
    """Returns the entries of a file, which is imported at the first call."""
    if file not in self._entries_of_file:
      module = importlib.import_module(f'{self._package}.{file}')
      self._entries_of_file[file] = self._read(module)
    return self._entries_of_file[file]

  def __setitem__(self, name: str, entry: Any) -> None:
    self._set_entries[name] = entry

  def __getitem__(self, name: str) -> Any:
    """Returns the entry with a given name. Files of the package are imported
    one after another until one has it.

    Args:
      name: the name of the entry, such as 'causal'.

    Raises:
      KeyError: where no file has such an entry.
    """
    if name in self._set_entries:
      return self._set_entries[name]
    # Try the file of that name first.
    files = self._files
    if name in files:
      files = [name, *files]
    for file in files:
      entries = self._import_entries(file)
      if name in entries:
        return entries[name]
    raise KeyError(name)

  def __iter__(self) -> Iterator[str]:
    for file in self._files:
      yield from self._import_entries(file)
    yield from self._set_entries

  def __len__(self) -> int:
    in_files = sum(len(self._import_entries(file)) for file in self._files)
    return in_files + len(self._set_entries)
