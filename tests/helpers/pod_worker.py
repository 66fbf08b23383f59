"""One process of a test of several: runs train.py's main.

  python -m tests.helpers.pod_worker JSON: {"words": [words of train.py],
      "faults": [{"folder": F, "process": 1, "step": 4, "kind": "kill"}, ...]}

A fault happens at the end of its step, once: a file in its folder says so, and
holds the time. While the run goes on, prints how often the processes have
exchanged anything outside of the step itself.
"""

import json
import os
import pathlib
import signal
import sys
import time

from absl import flags
import jax
from jax.experimental import multihost_utils

import train
from training.distributed import signals


def _fault(fault: dict) -> None:
  marker = pathlib.Path(fault['folder']) / f'fault-{fault["kind"]}'
  if fault['process'] != jax.process_index() or marker.exists():
    return
  marker.write_text(str(time.time()))
  if fault['kind'] == 'raise':
    raise KeyError('raised on purpose')
  os.kill(os.getpid(), {'kill': signal.SIGKILL, 'term': signal.SIGTERM}[
      fault['kind']])
  # The service that spreads SIGTERM takes longer than several of these steps.
  time.sleep(1)


def _watch_steps(faults: list[dict]) -> None:
  """Lets each fault happen, and counts exchanges, at the end of each step."""
  agreed = signals.Stop.should_stop
  exchanges = []

  def counted(exchange):
    def count(*args, **options):
      exchanges.append(exchange.__name__)
      return exchange(*args, **options)
    return count

  def at_step(stop, step):
    print(f'exchanges in step {step}: {len(exchanges)}')
    exchanges.clear()
    for fault in faults:
      if (fault['step'], fault['workdir']) == (step, flags.FLAGS.workdir):
        _fault(fault)
    return agreed(stop, step)

  for name in ('process_allgather', 'broadcast_one_to_all'):
    setattr(multihost_utils, name, counted(getattr(multihost_utils, name)))
  signals.Stop.should_stop = at_step


def main():
  given = json.loads(sys.argv[1])
  _watch_steps(given['faults'])
  sys.argv = ['train.py', *given['words']]
  return train.main()


if __name__ == '__main__':
  from training import cli
  cli.run(main)
