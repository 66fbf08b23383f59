"""One train.py a workdir: two would write over each other's checkpoints."""

import fcntl
import pathlib

from etils import epath

from configs.errors import require


_held = []  # open files, whose locks end with the process, however it ends


def hold(workdir: epath.Path, primary: bool = True) -> None:
  """Locks the workdir for this process, until it ends.

  In a bucket nothing can be locked, and nothing is done.

  Args:
    workdir: of the run.
    primary: whether this is process 0, the only one of a run that locks.

  Raises:
    ValueError: where another run has it.
  """
  if '://' in str(workdir) or not primary:
    return
  path = pathlib.Path(workdir) / 'lock'
  path.parent.mkdir(parents=True, exist_ok=True)
  file = path.open('w')
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    free = True
  except BlockingIOError:
    free = False
  require(free, f'another process trains in {workdir}: wait until it has '
          'ended, or take another --workdir')
  _held.append(file)
