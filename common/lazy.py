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
    """Finds the files; none is imported yet.

    Args:
      package: the name of the package.
      path: its __path__.
      read: a function that returns the entries of a file.
      without: the files that have none.
    """
    self._package, self._read = package, read
    self._set: dict[str, Any] = {}
    self._entries: dict[str, Mapping[str, Any]] = {}  # of imported files
    self._files = []
    for file in pkgutil.iter_modules(path):
      if not file.ispkg and file.name not in without:
        self._files.append(file.name)

  def _entries_of(self, file: str) -> Mapping[str, Any]:
    """Returns the entries of a file, which is imported once."""
    if file not in self._entries:
      module = importlib.import_module(f'{self._package}.{file}')
      self._entries[file] = self._read(module)
    return self._entries[file]

  def __setitem__(self, name: str, entry: Any) -> None:
    self._set[name] = entry

  def __getitem__(self, name: str) -> Any:
    if name in self._set:
      return self._set[name]
    files = self._files
    if name in files:
      files = [name, *files]
    for file in files:
      entries = self._entries_of(file)
      if name in entries:
        return entries[name]
    raise KeyError(name)

  def __iter__(self) -> Iterator[str]:
    for file in self._files:
      yield from self._entries_of(file)
    yield from self._set

  def __len__(self) -> int:
    in_files = sum(len(self._entries_of(file)) for file in self._files)
    return in_files + len(self._set)
