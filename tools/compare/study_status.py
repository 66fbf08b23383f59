"""status: how far each phase of a study is."""

import argparse
import collections
import json

from tools.compare import costs, results
from tools.compare import frozen as frozen_lib
from tools.compare import plan as plans
from tools.compare import ledger as ledger_lib
from tools.compare import status


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--workdir', required=True, help='of the study')
  parser.add_argument('--json', action='store_true', help='print JSON')


def main(args) -> int:
  frozen = frozen_lib.load(args.workdir)
  planned = {cost.phase: cost.runs for cost in costs.of(frozen, 1, None)}
  rows = [_row(args.workdir, phase, planned[phase]) for phase in plans.PHASES]
  if args.json:
    print(json.dumps({'study': frozen.plan.name, 'plan': frozen.hash,
                      'phases': rows}, indent=2))
    return 0
  print(f'study {frozen.plan.name}, plan {frozen.hash}')
  for row in rows:
    print(f'{row["phase"]:<8} {row["told"] or "not begun"}, '
          f'{row["planned"]} planned at most')
    for line in row['failed']:
      print(f'  {line}')
  return 0


def _row(workdir, phase: str, planned: int) -> dict:
  runs = results.rows(workdir, phase)
  return {'phase': phase, 'planned': planned, 'told': status.states(runs),
          'states': dict(collections.Counter(run.state for run in runs)),
          'failed': [f'{run.point}, seed {run.seed}: {run.error}'
                     for run in runs if run.state == ledger_lib.FAILED]}
