"""Becomes another program, which ends when the process that started it does: a
launcher or a sweep that is killed must not leave a run behind that still
trains and writes.

  python tools/dies_with_parent.py PARENT CORES PROGRAM ...

PARENT is the number of that process, whose main thread must have started this
one, for Linux means the thread; CORES, as 0,2, those to stay on; '': all.
Elsewhere than on Linux it only becomes the program.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def words(program: list[str], cores: str = '') -> list[str]:
  """Returns the command that becomes `program`, and ends with this process."""
  # Isolated, and without site: it is gone in some milliseconds.
  return [sys.executable, '-IS', __file__, str(os.getpid()), cores, *program]


def main() -> None:
  """Becomes the program of the command line, after it has asked Linux to kill
  this process when its parent dies, and taken the cores that it may run on."""
  parent, cores, *program = sys.argv[1:]
  if sys.platform == 'linux':
    if cores:
      os.sched_setaffinity(0, {int(core) for core in cores.split(',')})
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
  # The parent may have died before the line above, which then came too late.
  if os.getppid() != int(parent):
    sys.exit(1)
  os.execvp(program[0], program)


if __name__ == '__main__':
  main()
