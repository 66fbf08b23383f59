"""The ledger of a sweep: states, claims, and runners that die."""

import pathlib
import subprocess
import sys

import pytest

from tests.helpers import sweeps
from tools.compare import ledger

ROOT = pathlib.Path(__file__).parents[3]
ROWS = [('a', 0, ()), ('a', 1, ()), ('b', 0, ('routing',))]


@pytest.fixture
def book(tmp_path):
  with ledger.Ledger(tmp_path) as opened:
    yield opened


@pytest.fixture
def at(monkeypatch):
  """A function that sets the clock."""
  return lambda now: monkeypatch.setattr(ledger, '_now', lambda: now)


def test_a_run_goes_through_its_states(book, at):
  book.add(ROWS)
  book.add(ROWS)  # again: the same rows
  assert [(r.point, r.seed) for r in book.runs()] == [
      ('a', 0), ('b', 0), ('a', 1)]
  me = book.register()
  first = next(r.id for r in book.runs() if r.point == 'b')
  at(10)
  assert book.claim([first], me) == [first]
  assert book.claim([first], me) == []  # it is taken
  at(13)
  assert book.settle(first, me, ledger.PENDING)
  assert not book.settle(first, me, ledger.DONE)  # no claim of ours any more
  at(20)
  assert book.claim([first], me) == [first]
  assert book.runs(ledger.RUNNING)[0].attempts == 2
  at(21)
  assert book.settle(first, me, ledger.DONE)
  assert book.runs(ledger.DONE)[0].seconds == 4


def test_a_new_task_is_pending_of_what_is_done(book):
  book.add(ROWS)
  me = book.register()
  for row in book.runs():
    book.claim([row.id], me)
    book.settle(row.id, me, ledger.DONE)
  book.add([('a', 0, ('extrapolation',))])
  assert [(r.point, r.tasks) for r in book.runs(ledger.PENDING)] == [
      ('a', 'extrapolation')]


@pytest.mark.slow
def test_two_processes_never_share_a_run(book, tmp_path):
  book.add(('p', seed, ()) for seed in range(200))
  claimers = [subprocess.Popen(
      [sys.executable, '-c', sweeps.CLAIM, str(tmp_path)], cwd=ROOT, text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
  for process in claimers:
    assert process.stdout.readline() == 'ready\n'
  for process in claimers:
    process.stdin.write('go\n')
    process.stdin.flush()
  got = [process.stdout.readline().split() for process in claimers]
  assert sorted(int(x) for taken in got for x in taken) == sorted(
      row.id for row in book.runs())
  assert book.recover() == []  # both live
  claimers[0].kill()
  claimers[0].wait()
  freed = book.recover()
  assert len(freed) == len(got[0]) == len(book.runs('pending'))
  claimers[1].communicate('end\n')
  book.recover()
  assert len(book.runs('pending')) == 200


def test_a_silent_runner_of_another_host_is_dead(book, at, monkeypatch):
  book.add(ROWS)
  at(1000)
  with monkeypatch.context() as elsewhere:
    elsewhere.setattr(ledger, '_host', lambda: 'elsewhere')
    other = book.register()
    book.claim([1, 2], other)
  at(1000 + ledger.STALE_SECONDS - 1)
  assert book.recover() == []
  at(2000)
  assert book.beat(other) == {1, 2}
  at(2000 + ledger.STALE_SECONDS - 1)
  assert book.recover() == []
  at(2001 + ledger.STALE_SECONDS)
  assert book.recover() == ['a, seed 0', 'a, seed 1']
  assert book.beat(other) == set()  # and the runner finds out
