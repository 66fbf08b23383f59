"""report: writes the pages and tables of a study anew, of its two files."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--workdir', required=True, help='of the study')


def main(args) -> int:
  from tools.compare import study_report as report
  print(*report.write(args.workdir), sep='\n')
  return 0
