"""One process trains in a workdir: two would write over each other's files."""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import pathlib
import sys
from typing import TextIO

from etils import epath

from configs.errors import require


# What a file system says that has none, as Lustre mounted without flock.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)

_held = []  # open files, whose locks end with the process, however it ends


def hold(workdir: epath.Path, primary: bool = True) -> None:
  """Locks the workdir for this process, until it ends.

  In a bucket nothing can be locked, and nothing is done. A file system without
  locks is warned of.

  Args:
    workdir: of the run.
    primary: whether this is process 0, the only one of a run that locks.

  Raises:
    ValueError: where another run has it.
  """
  if primary and '://' not in str(workdir):
    _held.append(_locked(workdir))


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[None]:
  """Locks the workdir as `hold` does, until the context ends: for a process
  that trains in several."""
  if '://' in str(workdir):
    yield
    return
  with _locked(workdir):
    yield


def _locked(workdir: epath.Path) -> TextIO:
  """Returns the open file whose lock ends when it is closed."""
  path = pathlib.Path(workdir) / 'lock'
  path.parent.mkdir(parents=True, exist_ok=True)
  file = path.open('w')
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    free = True
  except BlockingIOError:
    free = False
    file.close()
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
    free = True
    print(f'warning: {workdir} has no file locks ({error.strerror}): nothing '
          'keeps a second process from training in it', file=sys.stderr)
  require(free, f'another process trains in {workdir}: wait until it has '
          'ended, or take another --workdir')
  return file
