"""Becomes another program, which ends when the process that started it does:
a killed runner must not leave a training run behind that still writes.

  python tools/sweep/tether.py PARENT CORES PROGRAM ...

PARENT is the number of that process; CORES, as 0,2, those to stay on.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def main() -> None:
  parent, cores, *words = sys.argv[1:]
  if sys.platform == 'linux':
    if cores:
      os.sched_setaffinity(0, {int(core) for core in cores.split(',')})
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != int(parent):  # it died before the line above
    sys.exit(1)
  os.execvp(words[0], words)


if __name__ == '__main__':
  main()
