r"""Starts a run as several processes: here, on SLURM or TPU VMs.

  python -m tools.launch local --processes=2 \
      --config configs/gpt.py --workdir runs/a
  python -m tools.launch slurm --nodes=4 --gpus=8 \
      --config configs/gpt.py:gpt2 --workdir runs/b --dry_run
  python -m tools.launch tpu_vm --tpu=POD --zone=ZONE \
      --config configs/gpt.py:gpt2 --workdir gs://BUCKET/d

Flags that are not the place's own go to train.py. `python -m tools.launch local
--help` lists those of a place. Before anything is started, the config is
checked, and its mesh against the devices of the place (for tpu_vm train.py does
this there, since only the TPU knows its devices). --dry_run only prints what
would be started.

A run that was stopped by a signal (a preemption, a time limit) has saved. It
exits with 75 (train.py --stopped_exit_code), and is started again as often as
it takes. A run that failed is started again --max_restarts times. One that was
a wrong request, or whose loss was not finite (exit code 2), is never started
again. Ctrl-C here or scancel end a run for good.
"""

import importlib
import sys

from absl import flags

from common.errors import check_choice
from training import cli

PLACES = ('local', 'slurm', 'tpu_vm')


def main() -> int:
  """Launches the run that the command line describes, on the place that its
  first word names.

  Returns:
    The exit code of this program.
  """
  place = sys.argv[1] if len(sys.argv) > 1 else ''
  if place in ('', '--help', '-h'):
    print(__doc__.strip())
    if not place:
      return 2
    return 0

  # Each place is a module with flags of its own, which are defined before the
  # command line is parsed.
  check_choice('place to launch on', place, PLACES)
  module = importlib.import_module(f'tools.launch.{place}')
  from tools.launch import job
  cli.define_config()
  cli.define_workdir()
  job.define_flags(job.FLAGS + module.FLAGS)
  flags.adopt_module_key_flags(job)
  cli.parse(module.__doc__, [sys.argv[0], *sys.argv[2:]])

  # Check the run as far as can be seen here, and start it.
  args = flags.FLAGS
  num_devices = module.count_devices(args)
  return module.launch(job.make_job(num_devices), args)


if __name__ == '__main__':
  cli.run(main)
