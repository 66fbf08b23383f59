"""report: W/report.html and W/report.csv, and their main table printed.

The page says what each variant's final loss is beside the base's and whether
the difference stands outside the noise over seeds; it draws the loss curves by
tokens, FLOPs and time, and where the sweep has them: sensitivity to the
learning rate, health of the routers, loss past the training length. What
failed or is not done is listed.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('file', nargs='?', default='',
                      help='the sweep that --workdir must be of')
  parser.add_argument('--workdir', required=True, help='of the whole sweep')


def main(args) -> int:
  from tools.sweep import curves, report_write
  sweep = curves.load(args.workdir)
  if args.file and args.file != sweep.file:
    raise ValueError(f'{args.workdir} holds the sweep {sweep.file}, not '
                     f'{args.file}: leave the file out or name another '
                     '--workdir')
  print(report_write.text(sweep))
  print(*report_write.write(sweep, args.workdir), sep='\n')
  return 0
