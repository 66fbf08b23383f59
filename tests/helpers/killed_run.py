"""Runs train.py until a checkpoint is on disk, and dies in the step after it.

  python -m tests.helpers.killed_run STEP [words of train.py]

Killed from outside, a small run would be over before the kill came.
"""

import os
import runpy
import signal
import sys
import time

from absl import flags

from training.distributed import signals
from training.workdir import checkpoints, storage


def main():
  step = int(sys.argv.pop(1))
  agreed = signals.Stop.should_stop

  def die_or_go_on(stop, n: int) -> bool:
    if n > step:
      workdir = storage.checked_path(flags.FLAGS.workdir)
      folder = checkpoints.checkpoint_folder(workdir)
      until = time.monotonic() + 300
      while (step not in checkpoints.list_steps(folder)
             and time.monotonic() < until):
        time.sleep(0.01)
      os.kill(os.getpid(), signal.SIGKILL)
    return agreed(stop, n)

  signals.Stop.should_stop = die_or_go_on
  sys.argv[0] = 'train.py'
  runpy.run_path('train.py', run_name='__main__')


if __name__ == '__main__':
  main()
