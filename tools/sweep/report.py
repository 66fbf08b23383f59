"""report: W/report.html, W/report.csv and W/curves.csv; prints the main table.

The page says what each variant's final loss is beside the base's and whether
the difference stands outside the noise over seeds; it draws the loss curves by
tokens, FLOPs and time, and where the sweep has them: sensitivity to the
learning rate, health of the routers, loss past the training length. What
failed or is not done is listed.
"""

import argparse
import json
import pathlib
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('file', nargs='?', default='',
                      help='the sweep that --workdir must be of')
  parser.add_argument('--workdir', required=True, help='of the whole sweep')
  parser.add_argument('--json', action='store_true', help='print JSON')


def main(args) -> int:
  from tools.sweep import curves, layout, report_write
  from training import storage
  layout.load(args.workdir, args.file)
  for file in report_write.FILES:
    storage.try_file(pathlib.Path(args.workdir) / file, '--workdir')
  sweep = curves.load(args.workdir)
  print(json.dumps(report_write.figures(sweep), indent=2) if args.json
        else report_write.text(sweep))
  print(*report_write.write(sweep, args.workdir), sep='\n',
        file=sys.stderr if args.json else sys.stdout)
  return 0
