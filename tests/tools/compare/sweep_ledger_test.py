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


def test_a_run_goes_through_its_states(book):
  book.add(ROWS)
  book.add(ROWS)  # again: the same rows
  assert [(r.point, r.seed) for r in book.runs()] == [
      ('a', 0), ('b', 0), ('a', 1)]
  me = book.register()
  first = next(r.id for r in book.runs() if r.point == 'b')
  assert book.claim([first], me, now=10) == [first]
  assert book.claim([first], me) == []  # it is taken
  assert book.settle(first, me, ledger.PENDING, now=13)
  assert not book.settle(first, me, ledger.DONE)  # no claim of ours any more
  assert book.claim([first], me, now=20) == [first]
  assert book.runs(ledger.RUNNING)[0].attempts == 2
  assert book.settle(first, me, ledger.DONE, now=21)
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


def test_a_silent_runner_of_another_host_is_dead(book, monkeypatch):
  book.add(ROWS)
  monkeypatch.setattr(ledger, '_host', lambda: 'elsewhere')
  other = book.register(now=1000)
  book.claim([1, 2], other)
  monkeypatch.undo()
  assert book.recover(now=1000 + ledger.STALE_SECONDS - 1) == []
  assert book.beat(other, now=2000) == {1, 2}
  assert book.recover(now=2000 + ledger.STALE_SECONDS - 1) == []
  assert book.recover(now=2001 + ledger.STALE_SECONDS) == [
      'a, seed 0', 'a, seed 1']
  assert book.beat(other) == set()  # and the runner finds out
