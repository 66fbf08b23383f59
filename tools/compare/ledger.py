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

from configs.errors import EnvironmentFailure, RequestError

PENDING, RUNNING, DONE, FAILED = 'pending', 'running', 'done', 'failed'
STATES = (PENDING, RUNNING, DONE, FAILED)
ENDED = (DONE, FAILED)
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
# What is wrong with the machine, and not with the file.
_OF_THE_MACHINE = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN)


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

  @property
  def owes(self) -> list[str]:
    return self.tasks.split(',') if self.tasks else []


class Ledger:
  """Opens or makes WORKDIR/ledger.sqlite; a context that closes it."""

  def __init__(self, workdir):
    self._path = pathlib.Path(workdir) / 'ledger.sqlite'
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with self._telling():  # each statement is a transaction of its own
      self._connection = sqlite3.connect(
          self._path, timeout=BUSY_SECONDS, isolation_level=None)
    with self.transaction():
      for statement in SCHEMA.split(';\n'):
        self._change(statement)

  def __enter__(self) -> 'Ledger':
    return self

  def __exit__(self, *error):
    self._connection.close()

  def _rows(self, statement: str, values: Sequence = ()) -> list[tuple]:
    """Executes a statement; returns the rows that it gives."""
    with self._telling():
      return self._connection.execute(statement, values).fetchall()

  def _change(self, statement: str, values: Sequence = ()) -> int:
    """Executes a statement; returns how many rows it changed."""
    with self._telling():
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
  def _telling(self):
    """Makes sentences of SQLite's errors."""
    try:
      yield
    except sqlite3.ProgrammingError:
      raise  # a mistake of ours
    except sqlite3.DatabaseError as error:
      code = getattr(error, 'sqlite_errorcode', 0) & 0xff  # without details
      if code in _OF_THE_MACHINE:
        raise EnvironmentFailure(f'{self._path} cannot be used: {error}; the '
                                 'same command goes on') from error
      raise self._damaged(error) from error

  def _damaged(self, reason) -> RequestError:
    return RequestError(
        f'{self._path} is damaged ({reason}): move it away and run the sweep '
        'again, which finds on disk what is done')

  def add(self, rows: Iterable[tuple[str, int, Sequence[str]]]) -> None:
    """Adds (point, seed, tasks) where missing; a run that is done and owes a
    task which it did not owe before is pending again."""
    with self.transaction():
      for point, seed, tasks in rows:
        tasks = ','.join(tasks)
        self._change(
            'INSERT OR IGNORE INTO runs (point, seed, tasks) VALUES (?, ?, ?)',
            (point, seed, tasks))
        self._change(
            'UPDATE runs SET tasks = ?, state = CASE WHEN state = ? AND ? '
            'THEN ? ELSE state END WHERE point = ? AND seed = ? '
            'AND tasks != ?',
            (tasks, DONE, bool(tasks), PENDING, point, seed, tasks))

  def runs(self, state: str = '') -> list[Run]:
    """Every run, or those in one state, by seed and then in file order."""
    where, values = (' WHERE state = ?', (state,)) if state else ('', ())
    rows = self._rows(
        f'SELECT {", ".join(Run._fields)} FROM runs{where} ORDER BY seed, id',
        values)
    return [self._checked(Run(*row)) for row in rows]

  def _checked(self, run: Run) -> Run:
    """Raises RequestError for a row that this program cannot have written."""
    for name, value in run._asdict().items():
      if not isinstance(value, Run.__annotations__[name]) or (
          name == 'state' and value not in STATES):
        raise self._damaged(f'{name} of a run is {value!r}')
    return run

  def register(self) -> str:
    """Adds this process as a runner; returns its name."""
    host, pid, born = _host(), os.getpid(), _born(os.getpid())
    name = f'{host}:{pid}:{born}'
    self._change('INSERT OR REPLACE INTO runners VALUES (?, ?, ?, ?, ?)',
                     (name, host, pid, born, _now()))
    return name

  def claim(self, ids: Sequence[int], runner: str) -> list[int]:
    """Takes those runs of `ids` that are still pending, for a runner as
    `register` named it; returns them."""
    marks = ', '.join('?' * len(ids))
    rows = self._rows(
        f'UPDATE runs SET state = ?, runner = ?, started = ?, ended = NULL, '
        f"error = '', attempts = attempts + 1 "
        f'WHERE state = ? AND id IN ({marks}) RETURNING id',
        (RUNNING, runner, _now(), PENDING, *ids))
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
        (state, error, _now(), alone, _now(), id, runner)) == 1

  def run(self, id: int) -> Run:
    """Returns a run as it is by now: tasks may have come since its claim."""
    return next(run for run in self.runs() if run.id == id)

  def drop(self, id: int) -> None:
    """Removes a run that has not begun."""
    self._change('DELETE FROM runs WHERE id = ? AND state = ?',
                    (id, PENDING))

  def adopt(self, id: int, old: str, new: str, error: str = '') -> bool:
    """Moves a run that nobody holds from one state to another."""
    return self._change(
        'UPDATE runs SET state = ?, error = ? WHERE id = ? AND state = ?',
        (new, error, id, old)) == 1

  def beat(self, runner: str) -> set[int]:
    """Says that the runner lives; returns the runs that are still its own."""
    self._change('UPDATE runners SET heartbeat = ? WHERE name = ?',
                     (_now(), runner))
    rows = self._rows(
        'SELECT id FROM runs WHERE runner = ?', (runner,))
    return {row[0] for row in rows}

  def recover(self) -> list[str]:
    """Frees what dead runners hold; returns 'point, seed S' of each run."""
    rows = self._rows(
        "SELECT name, host, pid, born, heartbeat FROM runners WHERE name IN "
        "(SELECT DISTINCT runner FROM runs WHERE runner != '')")
    freed = []
    for name, host, pid, born, heartbeat in rows:
      if not isinstance(heartbeat, int | float):
        raise self._damaged(f'the heartbeat of a runner is {heartbeat!r}')
      if _alive(host, pid, born, _now() - heartbeat):
        continue
      freed += self._rows(
          "UPDATE runs SET state = ?, runner = '' WHERE runner = ? "
          'AND state = ? RETURNING point, seed', (PENDING, name, RUNNING))
    return [f'{point}, seed {seed}' for point, seed in freed]

  def doubtful(self) -> list[str]:
    """Returns 'point, seed S' of the runs that runners of other hosts hold
    which have missed three heartbeats: alive or dead, nobody knows yet."""
    rows = self._rows(
        'SELECT point, seed FROM runs JOIN runners ON runner = name '
        'WHERE host != ? AND heartbeat <= ? ORDER BY runs.id',
        (_host(), _now() - SILENT_SECONDS))
    return [f'{point}, seed {seed}' for point, seed in rows]


def _now() -> float:
  return time.time()


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
