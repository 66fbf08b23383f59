"""fit: a scaling law L(N, D) = E + A / N^a + B / D^b of a ladder of sizes, with
intervals, and the best size for a budget of FLOPs (scaling.py). Of
a ladder of widths and depths, also what shape does at the same size.
"""

import argparse
import json
import math

from configs.errors import RequestError
from tools.compare import laws, variants


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('workdir', help='of the whole sweep')
  parser.add_argument('--budgets', default='', help='FLOPs to find the best '
                      'size for, as 1e15,1e16; default: the largest of the '
                      'ladder, and 10 and 100 times it')
  parser.add_argument('--by', default='', metavar='FIELD', help='a law for '
                      'each value of this field that the sweep has, as '
                      'model.position, and how their exponents differ')
  parser.add_argument('--count', default='params', choices=(
      'params', 'active_params'), help='which parameters N is (%(default)s)')
  parser.add_argument('--draws', type=int, default=400,
                      help='of the bootstrap (%(default)s)')
  parser.add_argument('--json', action='store_true', help='print JSON')


def main(args) -> int:
  from tools.compare.sweep_report import curves
  from training import limits
  # An interval needs 40 or more.
  limits.number('--draws', args.draws, (('>=', 40), ('<=', 1_000_000)))
  budgets = _budgets(args.budgets)
  sweep = curves.load_sweep(args.workdir)
  if args.by:
    ladders = variants.ladders(sweep, args.workdir, args.by)
    figures = variants.report(ladders, args.count, budgets, args.draws)
    print(json.dumps(figures, indent=2) if args.json
          else variants.text(figures))
    return 0
  figures = laws.report(
      laws.data(sweep.points, args.count, args.workdir), budgets, args.draws)
  print(json.dumps(figures, indent=2) if args.json else laws.text(figures))
  return 0


def _budgets(text: str) -> list[float]:
  try:
    budgets = [float(word) for word in text.split(',') if word]
  except ValueError as error:
    raise RequestError(f'--budgets is {text!r}: write numbers of FLOPs, as '
                       '1e15,1e16') from error
  if any(not 0 < budget < math.inf for budget in budgets):
    raise RequestError(f'--budgets is {text!r}: a budget must be > 0')
  return budgets
