"""Adds files of a test to the project, as if they stood in its folders."""

import contextlib
import importlib
import pathlib
import sys
from collections.abc import Iterator, Mapping

import architectures


@contextlib.contextmanager
def files(folder: pathlib.Path, sources: Mapping[str, str]) -> Iterator[None]:
  """Makes modules of `sources` importable while the context lasts.

  Args:
    folder: where the files are written.
    sources: {'architectures/NAME.py': its text}, beside files that are there.
  """
  packages = {}
  for name, text in sources.items():
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    package = name.rpartition('/')[0].replace('/', '.')
    packages[importlib.import_module(package)] = str(file.parent)
  for package, path in packages.items():
    package.__path__.append(path)
  architectures.systems.cache_clear()
  try:
    yield
  finally:
    for package, path in packages.items():
      package.__path__.remove(path)
    for name in sources:
      sys.modules.pop(name.removesuffix('.py').replace('/', '.'), None)
    architectures.systems.cache_clear()
