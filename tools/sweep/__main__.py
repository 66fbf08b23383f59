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

import argparse
import importlib

from training import cli

# name: (the module with its add_arguments and main, what it does).
COMMANDS = {
    'check': ('tools.sweep.check', 'what every point changes and costs'),
    'run': ('tools.sweep.run', 'train what is not done yet'),
    'report': ('tools.sweep.report.command', 'report.html and report.csv'),
    'fit': ('tools.sweep.fit', 'the scaling law of a ladder'),
    'status': ('tools.sweep.status', 'how far each point is'),
}


def main() -> int:
  parser = argparse.ArgumentParser(
      prog='python -m tools.sweep', description=__doc__,
      allow_abbrev=False,
      formatter_class=cli.HelpFormatter)
  commands = parser.add_subparsers(dest='command', required=True)
  for name, (module, told) in COMMANDS.items():
    importlib.import_module(module).add_arguments(
        commands.add_parser(
            name, help=told, description=told, allow_abbrev=False,
            formatter_class=cli.HelpFormatter))
  args = parser.parse_args()
  module, _ = COMMANDS[args.command]
  return importlib.import_module(module).main(args)


if __name__ == '__main__':
  cli.run(main)
