"""The ledger of a sweep: the state of each of its runs, in one SQLite file.

    pending -> running -> done, or failed with its error

A run is done once it is trained and has the evaluations that it owes; one that
is stopped is pending again, and goes on from what lies on disk.

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
import sqlite3
import time
from typing import NamedTuple

from configs.errors import EnvironmentFailure

PENDING, RUNNING, DONE, FAILED = 'pending', 'running', 'done', 'failed'
STATES = (PENDING, RUNNING, DONE, FAILED)
ENDED = (DONE, FAILED)
BUSY_SECONDS = 60  # how long a writer waits for the others
STALE_SECONDS = 120  # a runner counts as dead after so long
BEAT_SECONDS = 10  # between two heartbeats

SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
  id INTEGER PRIMARY KEY,
  point TEXT NOT NULL,
  seed INTEGER NOT NULL,
  tasks TEXT NOT NULL,
  state TEXT NOT NULL DEFAULT 'pending',
  runner TEXT NOT NULL DEFAULT '',
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
  heartbeat REAL NOT NULL);
"""


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
  seconds: float
  alone: int
  started: float | None
  ended: float | None
  error: str

  @property
  def owes(self) -> list[str]:
    return self.tasks.split(',') if self.tasks else []


class Ledger:
  """Opens or makes WORKDIR/ledger.sqlite; a context that closes it."""

  def __init__(self, workdir):
    self._path = pathlib.Path(workdir) / 'ledger.sqlite'
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with self._failing():  # each statement is a transaction of its own
      self._connection = sqlite3.connect(
          self._path, timeout=BUSY_SECONDS, isolation_level=None)
    with self.transaction():
      for statement in SCHEMA.split(';\n'):
        self._change(statement)

  def __enter__(self) -> 'Ledger':
    return self

  def __exit__(self, *error):
    self._connection.close()

  def _rows(self, statement: str, *values) -> list[tuple]:
    """Executes a statement; returns the rows that it gives."""
    with self._failing():
      return self._connection.execute(statement, values).fetchall()

  def _change(self, statement: str, *values) -> int:
    """Executes a statement; returns how many rows it changed."""
    with self._failing():
      return self._connection.execute(statement, values).rowcount

  @contextlib.contextmanager
  def transaction(self):
    """All inside happens at once, or not at all, and one such at a time."""
    self._change('BEGIN IMMEDIATE')
    try:
      yield
      self._change('COMMIT')
    finally:
      if self._connection.in_transaction:  # an error came before its end
        self._change('ROLLBACK')

  @contextlib.contextmanager
  def _failing(self):
    """Makes a sentence of SQLite's errors."""
    try:
      yield
    except sqlite3.ProgrammingError:
      raise  # a mistake of ours
    except sqlite3.DatabaseError as error:
      raise self._unusable(error) from error

  def _unusable(self, reason) -> EnvironmentFailure:
    return EnvironmentFailure(
        f'{self._path} cannot be used ({reason}): run the sweep again, and if '
        'the file is damaged, move it away first: what is done is known by '
        'what lies on disk')

  def add(self, rows: Iterable[tuple[str, int, Sequence[str]]]) -> None:
    """Adds (point, seed, tasks) where missing; a run that is done and owes a
    task which it did not owe before is pending again."""
    with self.transaction():
      for point, seed, tasks in rows:
        tasks = ','.join(tasks)
        self._change(
            'INSERT OR IGNORE INTO runs (point, seed, tasks) VALUES (?, ?, ?)',
            point, seed, tasks)
        self._change(
            'UPDATE runs SET tasks = ?, state = CASE WHEN state = ? AND ? '
            'THEN ? ELSE state END WHERE point = ? AND seed = ? '
            'AND tasks != ?',
            tasks, DONE, bool(tasks), PENDING, point, seed, tasks)

  def runs(self, *states: str) -> list[Run]:
    """The runs in some states, or all, by seed and then in file order."""
    runs = [Run(*row) for row in self._rows(
        f'SELECT {", ".join(Run._fields)} FROM runs ORDER BY seed, id')]
    for run in runs:
      if run.state not in STATES or not all(map(
          isinstance, run, Run.__annotations__.values())):
        raise self._unusable(f'it has the run {tuple(run)}')
    return [run for run in runs if run.state in (states or STATES)]

  def register(self) -> str:
    """Adds this process as a runner; returns its name."""
    name = f'{_host()}:{os.getpid()}:{_now():.3f}'
    self._change('INSERT INTO runners VALUES (?, ?, ?, ?)',
                 name, _host(), os.getpid(), _now())
    return name

  def claim(self, ids: Sequence[int], runner: str) -> list[int]:
    """Takes those runs of `ids` that are still pending, for a runner as
    `register` named it; returns them."""
    rows = self._rows(
        'UPDATE runs SET state = ?, runner = ?, started = ?, ended = NULL, '
        f"error = '' WHERE state = ? AND id IN ({', '.join('?' * len(ids))}) "
        'RETURNING id', RUNNING, runner, _now(), PENDING, *ids)
    return sorted(row[0] for row in rows)

  def settle(self, id: int, runner: str, state: str, error: str = '',
             alone: bool = False) -> bool:
    """Writes how a claimed run ended; False if the claim was lost meanwhile.

    Args:
      id: of the run.
      runner: as `register` named it.
      state: that it goes into.
      error: why it failed.
      alone: it trains beside no other from now on.
    """
    return self._change(
        "UPDATE runs SET state = ?, error = ?, ended = ?, runner = '', "
        'alone = max(alone, ?), seconds = seconds + ? - started '
        'WHERE id = ? AND runner = ?',
        state, error, _now(), alone, _now(), id, runner) == 1

  def adopt(self, id: int, state: str, error: str = '') -> None:
    """Moves a run that is pending into another state."""
    self._change(
        'UPDATE runs SET state = ?, error = ? WHERE id = ? AND state = ?',
        state, error, id, PENDING)

  def retry(self) -> None:
    """Makes what failed pending again."""
    self._change("UPDATE runs SET state = ?, error = '' WHERE state = ?",
                 PENDING, FAILED)

  def beat(self, runner: str) -> set[int]:
    """Says that the runner lives; returns the runs that are still its own."""
    self._change('UPDATE runners SET heartbeat = ? WHERE name = ?',
                 _now(), runner)
    return {id for id, in self._rows(
        'SELECT id FROM runs WHERE runner = ?', runner)}

  def recover(self) -> list[str]:
    """Frees what dead runners hold; returns 'point, seed S' of each run."""
    dead = [name for name, *runner in self._rows(
        'SELECT name, host, CAST(pid AS INTEGER), CAST(heartbeat AS REAL) '
        'FROM runners') if not _alive(*runner)]
    freed = self._rows(
        "UPDATE runs SET state = ?, runner = '' WHERE state = ? AND runner IN "
        f'({", ".join("?" * len(dead))}) RETURNING point, seed',
        PENDING, RUNNING, *dead)
    return [f'{point}, seed {seed}' for point, seed in freed]


def _now() -> float:
  return time.time()


def _alive(host: str, pid: int, heartbeat: float) -> bool:
  """Whether a runner lives: it has said so, and if it is of this host, its
  process is there."""
  if host == _host():
    try:
      os.kill(pid, 0)
    except ProcessLookupError:
      return False
    except PermissionError:
      pass  # another user's
  return heartbeat > _now() - STALE_SECONDS


def _host() -> str:
  """This machine, and the space of process numbers if it has several."""
  try:
    return f'{socket.gethostname()}:{os.readlink("/proc/self/ns/pid")}'
  except OSError:  # not Linux: one space
    return socket.gethostname()
