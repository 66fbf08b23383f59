"""Runs train.py until a checkpoint is on disk, and dies in the step after it.

  python -m tools.verify_resume.worker STEP [words of train.py]

Killed from outside, a small run would be over before the kill came.
"""

import os
import runpy
import signal
import sys
import time

from absl import flags

from configs.errors import EnvironmentFailure
from training.distributed import signals
from training.workdir import checkpoints

SAVE_SECONDS = 600


def main():
  if '--help' in sys.argv:
    print(__doc__.strip())
    return
  step = int(sys.argv.pop(1))
  agreed = signals.Stop.agreed

  def die_or_go_on(stop, n: int) -> bool:
    if n > step:
      _wait_for_checkpoint(step)
      os.kill(os.getpid(), signal.SIGKILL)
    return agreed(stop, n)

  signals.Stop.agreed = die_or_go_on
  sys.argv[0] = 'train.py'
  runpy.run_path('train.py', run_name='__main__')


def _wait_for_checkpoint(step: int) -> None:
  folder = checkpoints.directory(flags.FLAGS.workdir)
  until = time.monotonic() + SAVE_SECONDS
  while step not in checkpoints.steps(folder):
    if time.monotonic() > until:
      raise EnvironmentFailure(f'checkpoint {step} is not on disk after '
                               f'{SAVE_SECONDS} s')
    time.sleep(0.01)


if __name__ == '__main__':
  main()
