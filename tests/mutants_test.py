"""The table of mutants fits the source, the tests and the page; the runs of it
are `make mutants`."""

import collections
import re
import signal
import subprocess
import sys

import pytest

from tests import mutants
from tests.mutants import __main__ as runner

TABLE = mutants.table()
SOURCES = {m.file: (mutants.ROOT / m.file).read_text() for m in TABLE}


def _tests(path):
  """The names of the tests of a file."""
  return re.findall(r'^def (test_\w+)', (mutants.ROOT / path).read_text(), re.M)


TESTS = {path: _tests(path) for m in TABLE for path in m.test_files
         if (mutants.ROOT / path).exists()}


@pytest.mark.parametrize('file', SOURCES)
def test_every_mutant_is_another_program(file):
  for mutant in TABLE:
    if mutant.file == file:
      mutant.apply(SOURCES[file])


def test_no_mutant_stands_there_twice():
  texts = collections.Counter(
      SOURCES[m.file].replace(m.old, m.new) for m in TABLE)
  assert max(texts.values()) == 1


def test_every_mutant_names_tests_that_are_there():
  """Of the words of an expression, one at least is of a test's name."""
  for mutant in TABLE:
    assert set(mutant.test_files) <= TESTS.keys(), mutant
    words = set(re.findall(r'\w+', mutant.expression)) - {'and', 'or', 'not'}
    names = ' '.join(name for path in mutant.test_files
                     for name in (path, *TESTS[path]))
    assert not words or any(word in names for word in words), mutant


@pytest.mark.parametrize('old, new, sentence', [
    ('nothing', 'x', 'stands in it 0 times'),
    ('a', 'b', 'stands in it 3 times'),
    ('1  # one', '1  # two', 'the program stays the same')])
def test_a_row_that_has_rotted_is_an_error(old, new, sentence):
  with pytest.raises(ValueError, match=sentence):
    mutants.Mutant('x.py', old, new, 'x').apply('a = a + a * 1  # one\n')


@pytest.mark.parametrize('status, output, kind', [
    (0, '3 passed', 'survived'),
    (1, 'x\nFAILED tests/a_test.py::test_b[c - d] - assert 1\n', 'killed'),
    (1, 'ERROR tests/a_test.py::test_b - ValueError\n', 'killed'),
    (1, 'INTERNALERROR> x', 'broken'),
    (-signal.SIGABRT, '', 'killed'), (-signal.SIGALRM, '', 'killed'),
    (2, 'ERROR tests/a_test.py - SyntaxError', 'broken'),  # nothing was run
    (5, 'no tests ran', 'broken'), (4, 'not found', 'broken')])
def test_a_verdict_is_by_a_test_that_was_run(status, output, kind):
  assert runner.verdict(status, output, 1.0).kind == kind


def test_what_is_wrong_with_a_verdict():
  told = mutants.Mutant('x.py', 'a', 'b', 'x')
  equal = told._replace(reason='it is the same')
  said = {(m, kind): bool(runner.wrong(m, runner.Verdict(kind, '', 1.0)))
          for m in (told, equal) for kind in ('killed', 'survived', 'broken')}
  assert said == {
      (told, 'killed'): False, (told, 'survived'): True, (told, 'broken'): True,
      (equal, 'killed'): True, (equal, 'survived'): False,
      (equal, 'broken'): True}


def test_the_page_has_a_row_for_each_source_and_a_reason_for_each_equal():
  """Its figures are of this table: `make mutants` writes them."""
  page = runner.PAGE.read_text()
  equal = sum(bool(m.reason) for m in TABLE)
  assert (f'{len(TABLE)} mutants: {len(TABLE) - equal} killed, {equal} '
          'equivalent') in page
  counts = collections.Counter(m.file for m in TABLE)
  rows = dict(re.findall(r'^\| `([\w/]+\.py)` \| (\d+) \|', page, re.M))
  assert rows == {file: str(n) for file, n in counts.items()}
  for mutant in TABLE:
    assert mutant.reason in page


def test_the_sums_of_the_page_are_those_of_its_rows():
  """Or else a run, this file's own too, would write the page anew."""
  page = runner.PAGE.read_text()
  assert runner.update(page, {}) == page


@pytest.mark.long
def test_a_run_tells_a_mutant_from_the_source():
  """Of one that a test kills, and of one that nothing can tell."""
  said = subprocess.run(
      [sys.executable, '-m', 'tests.mutants', 'schedules.py', 'positions.py',
       '--only=math.pi * progress', '--only=distance < exact'],
      cwd=mutants.ROOT, capture_output=True, text=True)
  assert said.returncode == 0, said.stdout + said.stderr
  kinds = re.findall(r' of 2 +(\w+)', said.stdout)
  assert sorted(kinds) == ['killed', 'survived']


def test_each_row_of_the_page_counts_every_mutant_once():
  cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in
           re.findall(r'^\| `[\w/]+\.py` \|.*$', runner.PAGE.read_text(), re.M)]
  assert len(cells) == len({m.file for m in TABLE})
  for file, count, equal, _, killed in cells:
    by = sum(int(n) for n in re.findall(r'\w+ (\d+)', killed))
    assert by + int(equal or 0) == int(count), file
