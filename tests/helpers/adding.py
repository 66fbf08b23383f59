"""Adds to the project what a test holds as text, as if it stood in a file."""

import contextlib
import importlib
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping

import architectures
from tests.helpers import forked

ROOT = pathlib.Path(__file__).parents[2]
# The packages of the project.
PACKAGES = ('architectures', 'common', 'configs', 'tools', 'training')


@contextlib.contextmanager
def files(folder: pathlib.Path, sources: Mapping[str, str]) -> Iterator[None]:
  """Makes modules of `sources` importable while the context lasts.

  Args:
    folder: where the files are written.
    sources: {'architectures/NAME.py': its text}, beside files that are there.
  """
  # Write the files, each in a folder for its package.
  folder_of_package = {}
  for name, text in sources.items():
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    package = name.rpartition('/')[0].replace('/', '.')
    folder_of_package[importlib.import_module(package)] = str(file.parent)

  # Let the packages look there, too, and undo that at the end.
  for module, path in folder_of_package.items():
    module.__path__.append(path)
  architectures.refresh()
  try:
    yield
  finally:
    for module, path in folder_of_package.items():
      module.__path__.remove(path)
    for name in sources:
      sys.modules.pop(name.removesuffix('.py').replace('/', '.'), None)
    architectures.refresh()


def copied(tree: pathlib.Path) -> pathlib.Path:
  """Copies the project into a folder that is not there yet, in which programs
  can then be run; returns the folder."""
  for package in PACKAGES:
    shutil.copytree(ROOT / package, tree / package,
                    ignore=shutil.ignore_patterns('__pycache__'))
  for program in ROOT.glob('*.py'):
    shutil.copy(program, tree)
  return tree


def run(tree: pathlib.Path, *words: str, code: int = 0
        ) -> subprocess.CompletedProcess:
  """Runs `python WORDS` in a copy of the project; checks its exit code."""
  result = forked.run(*words, cwd=tree, timeout=600)
  assert result.returncode == code, result.stdout + result.stderr
  assert 'Traceback' not in result.stderr, result.stderr
  return result
