"""Tables whose entries lie in files of a folder, imported when they are asked
for.

A run needs one system, one objective and few tasks, of dozens.
"""

from collections.abc import Callable, Iterator, Mapping
import importlib
import pkgutil
import types
from typing import Any


class LazyTable(Mapping):
  """A table with the entries of all files of a package, in the order of the
  files' names; a file is imported when an entry of it may be asked for.

  An entry is looked for in the file of the same name, and then in all others.
  One that is set, as by a file from outside the tree, comes first.
  """

  def __init__(self, package: str, path: Any,
               read: Callable[[types.ModuleType], Mapping[str, Any]],
               without: tuple[str, ...] = ()):
    """Lists the files of the package; none is imported yet.

    Args:
      package: the name of the package.
      path: its __path__.
      read: a function that returns the entries of a file's module.
      without: the names of the files that have no entries.
    """
    self._package = package
    self._read = read
    # Entries that were set come before those of files.
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
    if name in self._set_entries:
      return self._set_entries[name]
    # The file of that name is the likeliest one.
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
