r"""Plans, runs and reports a study: from a question to a table.

  python -m tools.study plan configs/studies/tiny.py
  python -m tools.study run configs/studies/tiny.py --workdir runs/tiny
  python -m tools.study status --workdir runs/tiny
  python -m tools.study report --workdir runs/tiny

A study is a file of configs/studies/: a base, variants, three sizes or more,
measures, and what counts as a difference. `run` freezes the plan, measures the
noise, tunes every variant alike, screens them at the smallest size, and
confirms what passes at all sizes on fresh seeds (docs/studies.md). It may be
killed at any moment and started again, and also started several times at once.
The exit code is 2 for a wrong request or a study that cannot find what it is
after, and 1 if runs failed.
"""

from training import cli

# name: (the module with its add_arguments and main, what it does).
COMMANDS = {
    'plan': ('tools.compare.show', 'the phases and what they cost'),
    'run': ('tools.compare.study_run',
            'freeze the plan, and go through its phases'),
    'status': ('tools.compare.study_status', 'how far each phase is'),
    'report': ('tools.compare.study_report', 'write the pages and tables anew'),
}


def main() -> int:
  return cli.run_command('python -m tools.study', __doc__, COMMANDS)


if __name__ == '__main__':
  cli.run(main)
