"""Mutants: single faults put into the source, which a test must notice.

  python -m tests.mutants                     all of them: `make mutants`
  python -m tests.mutants step.py losses.py   those of these files

Each row of the tables beside this file names a source file, a piece of its
text, what stands there in the mutant, and the tests that must then fail. A row
with a reason says that nothing can tell the mutant from the source: there the
tests must still pass.
"""

import ast
import functools
import pathlib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]


class Mutant(NamedTuple):
  """One fault.

  Attributes:
    file: the source file.
    old: a piece of its text, which stands there once.
    new: what stands there instead.
    tests: 'FILE ...' or 'FILE ...: EXPRESSION', with FILE for
      FILE_test.py in a room of tests/, and pytest's expression after -k.
    reason: why no test can notice; empty: the tests must.
  """
  file: str
  old: str
  new: str
  tests: str
  reason: str = ''

  def apply(self, source: str) -> str:
    """Returns the mutant of a source text.

    Raises:
      ValueError: the text has changed, and this row has to be written anew.
    """
    count = source.count(self.old)
    if count != 1:
      raise ValueError(f'{self}: the old text stands in it {count} times')
    mutant = source.replace(self.old, self.new)
    if _program(mutant) == _program(source):
      raise ValueError(f'{self}: the program stays the same')
    return mutant

  @property
  def test_files(self) -> list[str]:
    """The paths of the files of tests."""
    return [_test_files()[name]
            for name in self.tests.partition(':')[0].split()]

  @property
  def expression(self) -> str:
    return self.tests.partition(':')[2].strip()

  @property
  def arguments(self) -> list[str]:
    """What pytest is told."""
    chosen = ['-k', self.expression] if self.expression else []
    return [*self.test_files, *chosen]

  def __str__(self):
    return f'{self.file}: {self.old!r} -> {self.new!r}'


@functools.cache
def _test_files() -> dict[str, str]:
  return {path.stem.removesuffix('_test'): str(path.relative_to(ROOT))
          for path in sorted((ROOT / 'tests').rglob('*_test.py'))}


@functools.lru_cache
def _program(text: str) -> str:
  """What of a text is no comment, and not how it is laid out."""
  return ast.dump(ast.parse(text))


def table() -> list[Mutant]:
  """Returns every mutant, by file."""
  from tests.mutants import answers, attention, experts, insides, labels
  from tests.mutants import model, probes, recurrent, spans, states, studies
  from tests.mutants import talk, text, updates
  return [Mutant(file, *row)
          for part in (model, attention, recurrent, experts, updates, text,
                       states, insides, spans, talk, labels, answers, probes,
                       studies)
          for file, rows in part.MUTANTS.items() for row in rows]
