r"""Checks, runs, watches and reports a sweep or a study over a config.

  python -m tools.compare check configs/sweeps/parts.py --match=params
  python -m tools.compare run configs/sweeps/parts.py --workdir runs/parts \
      --match=params --parallel=2
  python -m tools.compare status runs/parts
  python -m tools.compare report runs/parts
  python -m tools.compare publish runs/parts_study
  python -m tools.compare judge runs/loop/base runs/loop/rope --json
  python -m tools.compare items runs/a runs/b
  python -m tools.compare referee logs/muon logs/soap
  python -m tools.compare fit runs/ladder --budgets=1e15,1e16

A sweep is a file of configs/sweeps/: a base config, and points that change
some of its fields. Every point has the same seeds, and seed s of every point
sees the same batches in the same order. A study is a file of configs/studies/:
a sweep with three sizes or more, measures, and what counts as a difference.
`run` freezes the plan of a study, measures the noise, tunes every variant
alike, screens them at the smallest size, and confirms what passes at all sizes
on fresh seeds (docs/studies.md).

`run` may be killed at any moment and started again, and also started several
times at once: a ledger in the workdir says which runs are pending, running,
done or failed. The exit code is 2 for a wrong request or a study that cannot
find what it is after, 1 if a run failed, and 75 where not all is done: a signal
stopped it, or another runner has the rest. `judge` has codes of its own.
"""

from training import cli

# name: (the module with its add_arguments and main, what it does).
COMMANDS = {
    'check': ('tools.compare.check', 'what every point changes and costs, and '
              'the phases of a study'),
    'run': ('tools.compare.run', 'train what is not done yet'),
    'status': ('tools.compare.status', 'how far each point or phase is'),
    'report': ('tools.compare.report', 'write the pages and tables'),
    'publish': ('tools.compare.publish', 'bundle studies, and write the page '
                'of verdicts'),
    'judge': ('tools.compare.judge', 'whether a variant is better, for loops '
              'that ask often'),
    'items': ('tools.compare.items', 'whether two runs differ, item by item'),
    'referee': ('tools.compare.referee', 'verdicts on runs that others made, '
                'from their logs'),
    'fit': ('tools.compare.scaling', 'the scaling law of a ladder'),
}


def main() -> int:
  return cli.run_subcommand('python -m tools.compare', __doc__, COMMANDS)


if __name__ == '__main__':
  cli.run(main)
