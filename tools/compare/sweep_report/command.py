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
  parser.add_argument('--plot', default='',
                      help='a PNG to draw the outcome to (extra plot)')


def main(args) -> int:
  from tools.compare import layout
  from tools.compare.sweep_report import curves, picture, write
  from training.workdir import storage
  layout.load_description(args.workdir, args.file)
  for file in write.FILES:
    storage.try_file(pathlib.Path(args.workdir) / file, '--workdir')
  if args.plot:
    picture.require_matplotlib()
    storage.output(args.plot, '--plot')
  sweep = curves.load_sweep(args.workdir)
  print(json.dumps(write.figures(sweep), indent=2) if args.json
        else write.text(sweep))
  print(*write.write(sweep, args.workdir), sep='\n',
        file=sys.stderr if args.json else sys.stdout)
  if args.plot:
    picture.draw(sweep, args.plot)
  return 0
