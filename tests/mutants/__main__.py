"""Runs the tests on every mutant: see the package.

To start Python and import JAX takes longer than most of the tests. So it is
done once, in this process, which the tests of each mutant are a fork of.
"""

import argparse
import collections
import contextlib
import importlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple
import warnings

from tests import conftest  # noqa: F401  what JAX reads when it is imported
from tests import mutants

PAGE = mutants.ROOT / 'docs' / 'testing.md'
BEGIN, END = '<!-- make mutants -->', '<!-- end of make mutants -->'
SECONDS = 600  # that the tests of one mutant may take
PACKAGES = ('numpy', 'jax', 'flax.linen', 'optax', 'chex', 'orbax.checkpoint',
            'grain', 'pytest')


class Verdict(NamedTuple):
  """What the tests said: killed, survived or broken, by which test or why."""
  kind: str
  by: str
  seconds: float


def verdict(status: int, output: str, seconds: float) -> Verdict:
  """Reads the exit code of pytest, negative for a signal, and its output."""
  failed = re.search(r'^(?:FAILED|ERROR) (.+?)(?: - .*)?$', output, re.M)
  if status == 0:
    return Verdict('survived', '', seconds)
  if status == 1 and failed:
    return Verdict('killed', failed[1], seconds)
  if status == -signal.SIGALRM:
    return Verdict('killed', 'time', seconds)
  if status < 0:
    return Verdict('killed', f'signal {-status}', seconds)
  return Verdict('broken', output[-2000:], seconds)  # no import, or no test


class Fault:
  """A mutant in a copy of the tree, and the way back."""

  def __init__(self, mutant: mutants.Mutant, tree: pathlib.Path, number: int):
    self._path = tree / mutant.file
    self._source, self._stat = self._path.read_text(), self._path.stat()
    self._path.write_text(mutant.apply(self._source))
    # Python takes compiled code for that of a file as old and as long.
    os.utime(self._path, (10 * number, 10 * number))

  def undo(self):
    self._path.write_text(self._source)
    os.utime(self._path, ns=(self._stat.st_atime_ns, self._stat.st_mtime_ns))


class Running(NamedTuple):
  """Tests in a process and a copy of the tree of their own."""
  pid: int
  start: float
  tree: pathlib.Path
  scratch: tempfile.TemporaryDirectory

  @classmethod
  def begin(cls, tree: pathlib.Path, arguments: list[str]) -> 'Running':
    scratch = tempfile.TemporaryDirectory()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
      _child(tree, pathlib.Path(scratch.name), arguments)
    return cls(pid, time.monotonic(), tree, scratch)

  def verdict(self, status: int) -> Verdict:
    output = (pathlib.Path(self.scratch.name) / 'output').read_text()
    self.scratch.cleanup()
    return verdict(os.waitstatus_to_exitcode(status), output,
                   time.monotonic() - self.start)


def _child(tree, scratch, arguments):
  """Runs pytest in the tree; never returns."""
  code = 3
  try:
    os.setsid()
    output = os.open(scratch / 'output', os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.alarm(SECONDS)
    os.chdir(tree)
    # A mutant may write what is wrong into a cache of tokens.
    os.environ.update(ARCHETYPE_CACHE=str(scratch / 'cache'),
                      PYTHONPATH=str(tree))
    sys.path[:] = [str(tree)] + [
        p for p in sys.path if pathlib.Path(p or '.').resolve() != mutants.ROOT]
    for name in [n for n in sys.modules if n.split('.')[0] == 'tests']:
      del sys.modules[name]
    import pytest
    # The tests that `make test` leaves to `make test-long` are run too.
    code = pytest.main(['-x', '-q', '--tb=line', '-p', 'no:cacheprovider',
                        '-m', 'long or not long',
                        f'--basetemp={scratch}/tmp', *arguments])
    sys.stdout.flush()
  finally:
    os._exit(code)


def run(jobs, trees):
  """Yields (job, verdict) as they end, several at a time.

  Args:
    jobs: pairs of a mutant, or None, and the arguments of pytest.
    trees: copies of the tree, each for one job at a time.
  """
  waiting, running, free = list(enumerate(jobs, 1)), {}, list(trees)
  while waiting or running:
    while waiting and free:
      number, (mutant, arguments) = waiting.pop(0)
      tree = free.pop()
      fault = Fault(mutant, tree, number) if mutant is not None else None
      one = Running.begin(tree, arguments)
      running[one.pid] = one, fault, (mutant, arguments)
    pid, status = os.wait()
    with contextlib.suppress(ProcessLookupError):
      os.killpg(pid, signal.SIGKILL)  # what its tests have left running
    one, fault, job = running.pop(pid)
    if fault is not None:
      fault.undo()
    free.append(one.tree)
    yield job, one.verdict(status)


def copy_of_the_tree(folder: pathlib.Path) -> pathlib.Path:
  """Copies what git tracks, and what is new, into `folder`."""
  listed = subprocess.run(
      ['git', 'ls-files', '-co', '--exclude-standard', '-z'],
      cwd=mutants.ROOT, check=True, capture_output=True, text=True).stdout
  for name in filter(None, listed.split('\0')):
    if (mutants.ROOT / name).exists():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(mutants.ROOT / name, folder / name)
  return folder


def without_a_mutant(chosen: list[mutants.Mutant]):
  """Yields the arguments that run all chosen tests, file by file."""
  expressions = collections.defaultdict(set)
  for mutant in chosen:
    for file in mutant.test_files:
      expressions[file].add(mutant.expression)
  for file, asked in expressions.items():
    yield [file] if '' in asked else [
        file, '-k', ' or '.join(f'({e})' for e in sorted(asked))]


def wrong(mutant: mutants.Mutant, result: Verdict) -> str:
  """What is wrong with a verdict, '' if it is as it should be."""
  if result.kind == 'broken':
    return f'the tests cannot be run on it:\n{result.by}'
  if result.kind == 'survived' and not mutant.reason:
    return f'no test of {mutant.tests!r} notices'
  if result.kind == 'killed' and mutant.reason:
    return f'it is told by {result.by}, though it is said to be equivalent'
  return ''


def update(page: str, results: dict[mutants.Mutant, Verdict]) -> str:
  """Returns the page with the rows of the source files whose mutants have all
  been run, and are as they should be; the other rows stay."""
  before, _, rest = page.partition(BEGIN)
  section, _, after = rest.partition(END)
  kept = {row.split('`')[1]: row for row in section.splitlines()
          if row.startswith('| `')}
  table = mutants.table()
  rows = {}
  for file in dict.fromkeys(m.file for m in table):
    ours = [m for m in table if m.file == file]
    done = all(m in results and not wrong(m, results[m]) for m in ours)
    if done or file in kept:
      rows[file] = _row(file, {m: results[m] for m in ours}) if done else (
          kept[file])
  cells = [[cell.strip() for cell in row.split('|')] for row in rows.values()]
  total, equal, seconds = (
      sum(int(row[i].replace(',', '') or 0) for row in cells)
      for i in (2, 3, 4))
  lines = [f'{total} mutants: {total - equal} killed, {equal} equivalent, in '
           f'{seconds / 60:.0f} minutes of tests.', '',
           '| source | mutants | equivalent | seconds | killed by tests of |',
           '|---|---|---|---|---|', *rows.values(), '',
           'The equivalent ones, and why no test can tell them:', '']
  lines += [f'- `{m.file}`, `{" ".join(m.old.split())}` to '
            f'`{" ".join(m.new.split())}`: {m.reason}.'
            for m in table if m.reason]
  return '\n'.join([before + BEGIN, *lines, END + after])


def _row(file: str, results: dict[mutants.Mutant, Verdict]) -> str:
  by = collections.Counter(
      re.sub(r'^tests/(?:.*/)?(\w+?)(_test)?\.py.*', r'\1', result.by)
      for mutant, result in results.items() if not mutant.reason)
  equal = sum(bool(mutant.reason) for mutant in results)
  seconds = sum(result.seconds for result in results.values())
  return (f'| `{file}` | {len(results)} | {equal or ""} | {seconds:.0f} | '
          + ', '.join(f'{name} {n}' for name, n in by.most_common()) + ' |')


def main() -> int:
  parser = argparse.ArgumentParser(
      'python -m tests.mutants', allow_abbrev=False, description=__doc__)
  parser.add_argument('names', nargs='*', help='ends of source files, whose '
                      'rows of the page are written anew; default: all')
  parser.add_argument('--jobs', type=int, default=2, help='at a time')
  parser.add_argument('--only', action='append', default=[],
                      help='a part of the old text; several: any of them')
  asked = parser.parse_args()
  for name in asked.names:
    if not any(m.file.endswith(name) for m in mutants.table()):
      parser.error(f'no source file that has mutants ends in {name!r}')
  chosen = [m for m in mutants.table()
            if (not asked.names or m.file.endswith(tuple(asked.names)))
            and (not asked.only or any(part in m.old for part in asked.only))]
  warnings.filterwarnings('ignore', message='.*fork')  # no thread has a lock
  for package in PACKAGES:
    importlib.import_module(package)
  bad, start, results = 0, time.monotonic(), {}
  with tempfile.TemporaryDirectory() as folder:
    trees = [copy_of_the_tree(pathlib.Path(folder) / str(i))
             for i in range(asked.jobs)]
    for (_, arguments), result in run(
        [(None, a) for a in without_a_mutant(chosen)], trees):
      print(f'without a mutant  {result.kind:8} {result.seconds:5.1f} s  '
            f'{arguments[0]}  {result.by}', flush=True)
      bad += result.kind != 'survived'  # then a failure tells no mutant
    if bad:
      return 1
    for (mutant, _), result in run([(m, m.arguments) for m in chosen], trees):
      results[mutant] = result
      said = wrong(mutant, result)
      bad += bool(said)
      print(f'{len(results):3} of {len(chosen)}  {result.kind:8} '
            f'{result.seconds:5.1f} s  {mutant}\n'
            f'    {said or result.by}', flush=True)
  print(f'{bad} not as they should be, in '
        f'{(time.monotonic() - start) / 60:.0f} minutes')
  before = PAGE.read_text()
  if (after := update(before, results)) != before:
    PAGE.write_text(after)
  return 1 if bad else 0


if __name__ == '__main__':
  sys.exit(main())
