"""The ledger of a sweep: the state of each of its runs, in one SQLite file.

    pending -> running -> [owed -> evaluating ->] done
                 \\-> failed, with its error  <-/

A runner claims runs by a single UPDATE ... WHERE state, so two never share
one. A runner that died gives its claims back when another looks: on its own
host once its process is gone, on others once its heartbeat is old. The journal
is SQLite's default: write-ahead logging does not work on network folders.
"""

from collections.abc import Iterable, Sequence
import contextlib
import os
import pathlib
import socket
import time
from typing import NamedTuple

from tools.compare import database

PENDING, RUNNING, OWED = 'pending', 'running', 'owed'
EVALUATING, DONE, FAILED = 'evaluating', 'done', 'failed'
STATES = (PENDING, RUNNING, OWED, EVALUATING, DONE, FAILED)
# What a claim makes of a state, and what a lost claim makes of it again.
CLAIMED = {PENDING: RUNNING, OWED: EVALUATING}
BUSY_SECONDS = 60  # how long a writer waits for the others
STALE_SECONDS = 120  # another host's runner counts as dead after so long
BEAT_SECONDS = 10  # between two heartbeats
SILENT_SECONDS = 3 * BEAT_SECONDS  # and may be dead after so long

SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
  id INTEGER PRIMARY KEY,
  point TEXT NOT NULL,
  seed INTEGER NOT NULL,
  tasks TEXT NOT NULL,
  state TEXT NOT NULL DEFAULT 'pending',
  runner TEXT NOT NULL DEFAULT '',
  attempts INTEGER NOT NULL DEFAULT 0,
  seconds REAL NOT NULL DEFAULT 0,
  alone INTEGER NOT NULL DEFAULT 0,
  started REAL,
  ended REAL,
  error TEXT NOT NULL DEFAULT '',
  UNIQUE (point, seed));
CREATE TABLE IF NOT EXISTS runners (
  name TEXT PRIMARY KEY,
  host TEXT NOT NULL,
  pid INTEGER NOT NULL,
  born TEXT NOT NULL,
  heartbeat REAL NOT NULL);
"""
# Columns that ledgers of earlier versions lack.
LATER = {'seconds': 'REAL NOT NULL DEFAULT 0',
         'alone': 'INTEGER NOT NULL DEFAULT 0'}


class Run(NamedTuple):
  """One row: a point with one seed.

  `tasks` are the evaluations that it owes once trained; `seconds` is what all
  attempts took together; `started` and `ended` are of the last, in seconds
  since 1970; `alone` that it trains beside no other, since a program that held
  it and others ended in an error; `error` says why it failed.
  """
  id: int
  point: str
  seed: int
  tasks: str
  state: str
  runner: str
  attempts: int
  seconds: float
  alone: int
  started: float | None
  ended: float | None
  error: str


class Ledger:
  """Opens or makes WORKDIR/ledger.sqlite; a context that closes it."""

  def __init__(self, workdir):
    path = pathlib.Path(workdir) / 'ledger.sqlite'
    path.parent.mkdir(parents=True, exist_ok=True)
    self._db = database.Database(path, BUSY_SECONDS)
    with self.transaction():
      for statement in SCHEMA.split(';\n'):
        self._db.change(statement)
      columns = {row[1] for row in self._db.rows('PRAGMA table_info(runs)')}
      for name, kind in LATER.items():
        if name not in columns:
          self._db.change(f'ALTER TABLE runs ADD COLUMN {name} {kind}')

  def __enter__(self) -> 'Ledger':
    return self

  def __exit__(self, *error):
    self._db.close()

  @contextlib.contextmanager
  def transaction(self):
    """All inside happens at once, or not at all, and one such at a time."""
    with self._db.transaction():
      yield

  def add(self, rows: Iterable[tuple[str, int, Sequence[str]]]) -> None:
    """Adds (point, seed, tasks) where missing; a run that is done and owes a
    task which it did not owe before is owed again."""
    with self.transaction():
      for point, seed, tasks in rows:
        tasks = ','.join(tasks)
        self._db.change(
            'INSERT OR IGNORE INTO runs (point, seed, tasks) VALUES (?, ?, ?)',
            (point, seed, tasks))
        self._db.change(
            'UPDATE runs SET tasks = ?, state = CASE WHEN state = ? AND ? '
            'THEN ? ELSE state END WHERE point = ? AND seed = ? '
            'AND tasks != ?',
            (tasks, DONE, bool(tasks), OWED, point, seed, tasks))

  def runs(self, state: str = '') -> list[Run]:
    """Every run, or those in one state, by seed and then in file order."""
    where, values = (' WHERE state = ?', (state,)) if state else ('', ())
    rows = self._db.rows(
        f'SELECT {", ".join(Run._fields)} FROM runs{where} ORDER BY seed, id',
        values)
    return [self._checked(Run(*row)) for row in rows]

  def _checked(self, run: Run) -> Run:
    """Raises RequestError for a row that this program cannot have written."""
    for name, value in run._asdict().items():
      if not isinstance(value, Run.__annotations__[name]) or (
          name == 'state' and value not in STATES):
        raise self._db.damaged(f'{name} of a run is {value!r}')
    return run

  def register(self, now: float | None = None) -> str:
    """Adds this process as a runner; returns its name."""
    host, pid, born = _host(), os.getpid(), _born(os.getpid())
    name = f'{host}:{pid}:{born}'
    self._db.change('INSERT OR REPLACE INTO runners VALUES (?, ?, ?, ?, ?)',
                     (name, host, pid, born, _now(now)))
    return name

  def claim(self, ids: Sequence[int], runner: str, state: str = PENDING,
            now: float | None = None) -> list[int]:
    """Takes those of `ids` that are still in `state`; returns them.

    Args:
      ids: of runs.
      runner: as `register` named it.
      state: PENDING, to train, or OWED, to evaluate.
      now: tests' own clock.
    """
    marks = ', '.join('?' * len(ids))
    rows = self._db.rows(
        f'UPDATE runs SET state = ?, runner = ?, started = ?, ended = NULL, '
        f"error = '', attempts = attempts + 1 "
        f'WHERE state = ? AND id IN ({marks}) RETURNING id',
        (CLAIMED[state], runner, _now(now), state, *ids))
    return sorted(row[0] for row in rows)

  def settle(self, id: int, runner: str, state: str, error: str = '',
             alone: bool = False, now: float | None = None) -> bool:
    """Writes how a claimed run ended; False if the claim was lost meanwhile.

    Args:
      id: of the run.
      runner: as `register` named it.
      state: that it goes into.
      error: why it failed.
      alone: it trains beside no other from now on.
      now: tests' own clock.
    """
    return self._db.change(
        "UPDATE runs SET state = ?, error = ?, ended = ?, runner = '', "
        'alone = max(alone, ?), seconds = seconds + ? - started '
        'WHERE id = ? AND runner = ?',
        (state, error, _now(now), alone, _now(now), id, runner)) == 1

  def tasks(self, id: int) -> list[str]:
    """Returns what a run owes by now: tasks may have come since its claim."""
    told, = self._db.rows('SELECT tasks FROM runs WHERE id = ?', (id,))[0]
    return told.split(',') if told else []

  def drop(self, id: int) -> None:
    """Removes a run that has not begun."""
    self._db.change('DELETE FROM runs WHERE id = ? AND state = ?',
                    (id, PENDING))

  def adopt(self, id: int, old: str, new: str, error: str = '') -> bool:
    """Moves a run that nobody holds from one state to another."""
    return self._db.change(
        'UPDATE runs SET state = ?, error = ? WHERE id = ? AND state = ?',
        (new, error, id, old)) == 1

  def beat(self, runner: str, now: float | None = None) -> set[int]:
    """Says that the runner lives; returns the runs that are still its own."""
    self._db.change('UPDATE runners SET heartbeat = ? WHERE name = ?',
                     (_now(now), runner))
    rows = self._db.rows(
        'SELECT id FROM runs WHERE runner = ?', (runner,))
    return {row[0] for row in rows}

  def recover(self, now: float | None = None) -> list[str]:
    """Frees what dead runners hold; returns 'point, seed S' of each run."""
    rows = self._db.rows(
        "SELECT name, host, pid, born, heartbeat FROM runners WHERE name IN "
        "(SELECT DISTINCT runner FROM runs WHERE runner != '')")
    freed = []
    for name, host, pid, born, heartbeat in rows:
      if not isinstance(heartbeat, int | float):
        raise self._db.damaged(f'the heartbeat of a runner is {heartbeat!r}')
      if _alive(host, pid, born, _now(now) - heartbeat):
        continue
      for claimed, state in ((b, a) for a, b in CLAIMED.items()):
        freed += self._db.rows(
            "UPDATE runs SET state = ?, runner = '' WHERE runner = ? "
            'AND state = ? RETURNING point, seed',
            (state, name, claimed))
    return [f'{point}, seed {seed}' for point, seed in freed]

  def doubtful(self, now: float | None = None) -> list[str]:
    """Returns 'point, seed S' of the runs that runners of other hosts hold
    which have missed three heartbeats: alive or dead, nobody knows yet."""
    rows = self._db.rows(
        'SELECT point, seed FROM runs JOIN runners ON runner = name '
        'WHERE host != ? AND heartbeat <= ? ORDER BY runs.id',
        (_host(), _now(now) - SILENT_SECONDS))
    return [f'{point}, seed {seed}' for point, seed in rows]


def _now(now: float | None) -> float:
  return time.time() if now is None else now


def _alive(host: str, pid: int, born: str, silence: float) -> bool:
  """Whether a runner lives: its process on this host, else its heartbeat."""
  if host == _host():
    return born == _born(pid)
  return silence < STALE_SECONDS


def _host() -> str:
  """This machine, and the space of process numbers if it has several."""
  try:
    space = os.readlink('/proc/self/ns/pid')
  except OSError:  # not Linux: one space
    space = ''
  return socket.gethostname() + space.removeprefix('pid:')


def _born(pid: int) -> str:
  """When a process started, so that a reused number is not taken for it; ''
  for one that is gone (or, as a zombie, only waits to be noticed)."""
  stat = pathlib.Path(f'/proc/{pid}/stat')
  if not stat.parent.parent.joinpath('self').exists():  # not Linux
    try:
      os.kill(pid, 0)
    except ProcessLookupError:
      return ''
    return 'alive'
  try:
    fields = stat.read_text().rpartition(') ')[2].split()
  except OSError:
    return ''
  return '' if fields[0] in 'ZX' else fields[19]
