"""The SQLite file of a ledger, whose errors are sentences."""

from collections.abc import Sequence
import contextlib
import pathlib
import sqlite3

from configs.errors import EnvironmentFailure, RequestError

# What is wrong with the machine, and not with the file.
_OF_THE_MACHINE = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN)


class Database:
  """Opens or makes the file; each statement is a transaction of its own,
  outside of `transaction`.

  Args:
    path: of the file.
    busy_seconds: how long a writer waits for the others.
  """

  def __init__(self, path: pathlib.Path, busy_seconds: float):
    self._path = path
    with self._telling():
      self._connection = sqlite3.connect(path, timeout=busy_seconds,
                                         isolation_level=None)

  def rows(self, statement: str, values: Sequence = ()) -> list[tuple]:
    """Executes a statement; returns the rows that it gives."""
    with self._telling():
      return self._connection.execute(statement, values).fetchall()

  def change(self, statement: str, values: Sequence = ()) -> int:
    """Executes a statement; returns how many rows it changed."""
    with self._telling():
      return self._connection.execute(statement, values).rowcount

  @contextlib.contextmanager
  def transaction(self):
    """All inside happens at once, or not at all, and one such at a time."""
    self.change('BEGIN IMMEDIATE')
    try:
      yield
      self.change('COMMIT')
    finally:
      if self._connection.in_transaction:  # an error came before its end
        self.change('ROLLBACK')

  def close(self) -> None:
    self._connection.close()

  def damaged(self, reason) -> RequestError:
    """Returns the error that says so, and how to go on."""
    return RequestError(
        f'{self._path} is damaged ({reason}): move it away and run the sweep '
        'again, which finds on disk what is done')

  @contextlib.contextmanager
  def _telling(self):
    try:
      yield
    except sqlite3.ProgrammingError:
      raise  # a mistake of ours
    except sqlite3.DatabaseError as error:
      code = getattr(error, 'sqlite_errorcode', 0) & 0xff  # without details
      if code in _OF_THE_MACHINE:
        raise EnvironmentFailure(f'{self._path} cannot be used: {error}; the '
                                 'same command goes on') from error
      raise self.damaged(error) from error
