r"""Checks, runs, watches and reports a sweep over a config.

  python -m tools.sweep check configs/sweeps/parts.py --match=params
  python -m tools.sweep run configs/sweeps/parts.py --workdir runs/parts \
      --match=params --parallel=2
  python -m tools.sweep status --workdir runs/parts
  python -m tools.sweep report --workdir runs/parts
  python -m tools.sweep fit runs/ladder --budgets=1e15,1e16

A sweep is a file of configs/sweeps/: a base config, and points that change
some of its fields. Every point has the same seeds, and seed s of every point
sees the same batches in the same order. `run` may be killed at any moment and
started again, and also started several times at once: a ledger in the workdir
says which runs are pending, running, done or failed. The exit code is 2 for a
wrong request, and 1 if a run failed.
"""

from training import cli

# name: (the module with its add_arguments and main, what it does).
COMMANDS = {
    'check': ('tools.compare.check', 'what every point changes and costs'),
    'run': ('tools.compare.run', 'train what is not done yet'),
    'report': ('tools.compare.sweep_report',
               'report.html and report.csv'),
    'fit': ('tools.compare.scaling', 'the scaling law of a ladder'),
    'status': ('tools.compare.status', 'how far each point is'),
}


def main() -> int:
  return cli.run_command('python -m tools.sweep', __doc__, COMMANDS)


if __name__ == '__main__':
  cli.run(main)
