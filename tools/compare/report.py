"""report: writes the pages and tables of a sweep or of a study."""

import argparse

from tools.compare import layout


def add_arguments(parser: argparse.ArgumentParser) -> None:
  layout.add_workdir(parser)
  parser.add_argument('--json', action='store_true', help='print JSON')
  parser.add_argument('--plot', default='', help='of a sweep: a PNG, SVG or '
                      'PDF to draw the outcome to')


def main(args) -> int:
  workdir = args.workdir = layout.workdir_of(args)
  if layout.is_study(workdir):
    from tools.compare import study_report
    print(*study_report.write(workdir), sep='\n')
    return 0
  from tools.compare import sweep_report
  return sweep_report.main(args)
