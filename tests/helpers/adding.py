"""Adds to the project what a test holds as text, as if it stood in its files.

What can be added is listed in KINDS, each with the test that adds one.
README's table of what to open is made of it:

  python -m tests.helpers.adding
"""

import contextlib
import importlib
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import architectures
from tests.helpers import forked

ROOT = pathlib.Path(__file__).parents[2]
ROOMS = ('architectures', 'configs', 'tools', 'training')


class Kind(NamedTuple):
  """What can be added to the project.

  Attributes:
    what: in words.
    open: the one file that it is added to, or the files that it is.
    table: of that file, in which it is an entry; empty: it is files of its own.
    test: that adds one.
  """
  what: str
  open: str
  table: str
  test: str


_PART, _SYSTEM = 'tests/add_a_part_test.py', 'tests/add_a_system_test.py'
_OBJECTIVE = 'tests/add_an_objective_test.py'
KINDS = (
    Kind('norm', 'architectures/parts/norms.py', 'NORMS', _PART),
    Kind('position encoding', 'architectures/parts/positions.py', 'POSITIONS',
         _PART),
    Kind('feed-forward network', 'architectures/parts/ffn.py', 'FFNS', _PART),
    Kind('kind of attention', 'architectures/parts/attention/visibility.py',
         'KINDS', _PART),
    Kind('mixer', 'architectures/parts/mixers.py', 'MIXERS', _PART),
    Kind('attention kernel', 'architectures/parts/attention/kernels.py',
         'KERNELS', _PART),
    Kind('block wiring', 'architectures/parts/blocks.py', 'BLOCKS', _PART),
    Kind('router', 'architectures/parts/moe/routing.py', 'ROUTERS', _PART),
    Kind('balance loss', 'architectures/parts/moe/health.py',
         'BALANCE_LOSSES', _PART),
    Kind('optimiser', 'training/optim/optimizers.py', 'OPTIMIZERS', _PART),
    Kind('learning-rate schedule', 'training/optim/schedules.py', 'SCHEDULES',
         _PART),
    Kind('system', 'architectures/NAME.py, configs/NAME.py', '', _SYSTEM),
    Kind('objective', 'training/objectives/NAME.py', '', _OBJECTIVE),
    Kind('probe', 'training/data/probes/NAME.py', '',
         'tests/add_a_probe_test.py'),
    Kind('evaluation task', 'training/evals/tasks/NAME.py', '', _OBJECTIVE),
)


def table() -> str:
  """Returns README's table of what to open to add something, in Markdown."""
  lines = ['| to add | write | shown by |', '|---|---|---|']
  for kind in KINDS:
    article = 'an' if kind.what[0] in 'aeiou' else 'a'
    files = ' and '.join(f'`{file}`' for file in kind.open.split(', '))
    entry = f'an entry of `{kind.table}` in {files}' if kind.table else files
    lines.append(f'| {article} {kind.what} | {entry} | `{kind.test}` |')
  return '\n'.join(lines) + '\n'


@contextlib.contextmanager
def entry(what: str, source: str) -> Iterator[str]:
  """Runs `source` as if it stood at the end of the file of a kind, and yields
  the name under which it stands in the table.

  Args:
    what: of a Kind.
    source: definitions, and the entry: `TABLE['name'] = ...`.
  """
  kind, = (kind for kind in KINDS if kind.what == what)
  module = importlib.import_module(
      kind.open.removesuffix('.py').replace('/', '.'))
  table = getattr(module, kind.table)
  before = set(table)
  exec(compile(source, kind.open, 'exec'), dict(vars(module)))
  name, = set(table) - before
  try:
    yield name
  finally:
    del table[name]


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


def copy_with(tree: pathlib.Path, sources: Mapping[str, str]) -> pathlib.Path:
  """Returns `tree`, now a copy of the project with some new files and no other
  change, in which programs can be run.

  Args:
    tree: a folder that is not there yet.
    sources: {path of a new file: its text}.
  """
  for room in ROOMS:
    shutil.copytree(ROOT / room, tree / room,
                    ignore=shutil.ignore_patterns('__pycache__'))
  for program in ROOT.glob('*.py'):
    shutil.copy(program, tree)
  for path, text in sources.items():
    assert not (tree / path).exists(), path
    (tree / path).write_text(text)
  return tree


def run(tree: pathlib.Path, *words: str, code: int = 0
        ) -> subprocess.CompletedProcess:
  """Runs `python WORDS` in a copy of the project; checks its exit code."""
  result = forked.run(*words, cwd=tree, timeout=600)
  assert result.returncode == code, result.stdout + result.stderr
  assert 'Traceback' not in result.stderr, result.stderr
  return result


if __name__ == '__main__':
  print(table(), end='')
