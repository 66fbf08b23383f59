"""simulate: how often studies err whose truth is known.

Thousands of studies are decided by the very functions that decide on real ones;
what trains is replaced by a simulated trainer (tools/compare/simulated/). Each
figure stands with its Monte-Carlo standard error. The exit code is 1 where a
promise of docs/studies.md is broken by more than three of them.
"""

import argparse
import dataclasses
import functools
import gc
import json

from configs.errors import one_of
from tools.compare.simulated import announced, behind, errors, without
from tools.compare.simulated.rates import Row
from training import limits, progress

# name: the functions of the number of studies that give its rows.
PARTS = {
    'confirm': (errors.no_effects,), 'screen': (errors.mixture,),
    'power': (announced.smallest, announced.needed, announced.calibrated,
              announced.one_noise, announced.careless),
    'whole': (errors.pipeline,), 'rules': (without.rules,),
    'resumed': (behind.resumed,)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--studies', type=int, default=2000,
                      help='of each setting; a half or a quarter of the '
                      'settings that take longest (%(default)s)')
  parser.add_argument('--only', default='', help='parts of it, as '
                      f'{",".join(PARTS)} (default: all)')
  parser.add_argument('--json', action='store_true', help='print JSON')


def main(args) -> int:
  limits.number('--studies', args.studies, (('>=', 2), ('<=', 10_000_000)))
  parts = args.only.split(',') if args.only else list(PARTS)
  for part in parts:
    one_of('--only', part, PARTS)
  quicken()
  work = [functools.partial(one, args.studies)
          for part in parts for one in PARTS[part]]
  rows = [row for one in progress.each(work, 'parts') for row in one()]
  print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2)
        if args.json else text(rows))
  return int(any(row.holds is False for row in rows))


def quicken() -> None:
  """Holm's correction of statsmodels collects garbage each time, which takes
  long where much was imported: what is there by now is left out of that."""
  errors.no_effects(1)
  gc.collect()
  gc.freeze()


def text(rows: list[Row]) -> str:
  """Returns the rows as a table of Markdown."""
  lines = ['| what is simulated | figure | found | promised | holds | '
           'studies |', '|---|---|---|---|---|---|']
  for row in rows:
    kept = {None: '', True: 'yes', False: 'NO'}[row.holds]
    lines.append(f'| {row.setting} | {row.what} | {row.value:.4f} ± '
                 f'{row.error:.4f} | {row.promised} | {kept} | '
                 f'{row.studies:,} |')
  return '\n'.join(lines)
