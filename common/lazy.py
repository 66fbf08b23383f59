"""Tables whose entries lie in files of a folder, imported when they are asked
for.

A run needs one system, one objective and few tasks, of dozens.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
import importlib
import pkgutil
import types
from typing import Any


class Lazy(Mapping):
  """The entries of all files of a package, in the order of their names.

  An entry is looked for in the file that is called as it is, and then in all
  others. One that is set, as from a file outside the tree, comes first.
  """

  def __init__(self, package: str, path: Any,
               read: Callable[[types.ModuleType], Mapping[str, Any]],
               without: tuple[str, ...] = ()):
    """Args:
      package: the name of the package.
      path: its __path__.
      read: a file -> its entries.
      without: files that have none.
    """
    self._set: dict[str, Any] = {}
    self._of = functools.cache(lambda file: read(
        importlib.import_module(f'{package}.{file}')))
    self._files = [file.name for file in pkgutil.iter_modules(path)
                   if not file.ispkg and file.name not in without]

  def __setitem__(self, name: str, entry: Any) -> None:
    self._set[name] = entry

  def __getitem__(self, name: str) -> Any:
    if name in self._set:
      return self._set[name]
    files = self._files
    if name in files:
      files = [name, *files]
    for file in files:
      if name in self._of(file):
        return self._of(file)[name]
    raise KeyError(name)

  def __iter__(self) -> Iterator[str]:
    for file in self._files:
      yield from self._of(file)
    yield from self._set

  def __len__(self) -> int:
    return sum(1 for _ in self)
