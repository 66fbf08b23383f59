"""items: whether two runs differ on what both were asked, item by item.

BASE and VARIANT are each what has the items' scores: a file that eval.py wrote
as --json, the folder of a run, or what lm_eval (or tools.lm_eval) wrote into
--output_path with --log_samples, of any model; or a folder of seed-0, seed-1,
... that are such folders. Of one run each, the test is over the items, paired:
McNemar's exact one where they are right or wrong. Of 3 seeds or more, it is of
both, crossed (statistics.crossed). The corrected p is Holm's, over all
figures.
"""

import argparse
from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any

import numpy as np

from common.errors import require
from tools.compare import page, statistics
from training.evals import items


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('base', metavar='BASE', help='a file or folder')
  parser.add_argument('variant', metavar='VARIANT', help='another one')
  parser.add_argument('--json', action='store_true', help='print JSON')


def main(args) -> int:
  rows = compared(args.base, args.variant)
  print(json.dumps(rows, indent=2) if args.json else text(rows))
  return 0


def compared(base: str, variant: str) -> list[dict[str, Any]]:
  """Returns a row of each figure whose items both have.

  Raises:
    RequestError: where there is none.
  """
  runs = [_read(base), _read(variant)]
  seeds = [seed for seed in runs[0] if seed in runs[1]]
  figures = dict.fromkeys(name for seed in seeds for name in runs[0][seed])
  rows = [{'figure': name} | _row(*scores) for name in figures
          if (scores := items.paired(
              [run[seed].get(name) for run in runs] for seed in seeds))]
  require(rows, f'{base} and {variant} have no figure of the same items of the '
          'same seeds')
  for row, p in zip(rows, statistics.corrected([row['p'] for row in rows])):
    row['p_corrected'] = p
  return rows


def _read(name: str) -> dict[str, dict[str, dict]]:
  """Returns the records of each seed."""
  path = pathlib.Path(name)
  require(path.exists(), f'there is no {path}')
  return {seed.name: items.read(seed) for seed in sorted(
      path.glob('seed-*'))} or {'': items.read(path)}


def _row(theirs_SQ: np.ndarray, ours_SQ: np.ndarray,
         weights_Q: Sequence[float] | None) -> dict[str, Any]:
  of = statistics.crossed(ours_SQ - theirs_SQ, weights_Q)
  means = [float(np.average(x_SQ.mean(0), weights=weights_Q))
           for x_SQ in (theirs_SQ, ours_SQ)]
  S, Q = ours_SQ.shape
  test, p = 'seeds and items' if S > 1 else 'items', of.p
  if S == 1 and weights_Q is None and {
      *theirs_SQ.flat, *ours_SQ.flat} <= {0.0, 1.0}:
    test, p = 'McNemar', statistics.mcnemar(ours_SQ[0], theirs_SQ[0])
  return {'base': means[0], 'variant': means[1], 'effect': of.mean,
          'low': of.low, 'high': of.high, 'test': test, 'p': p, 'items': Q,
          'seeds': S}


def text(rows: Sequence[Mapping[str, Any]]) -> str:
  """Renders rows for a terminal."""
  return page.table('items', '', [{
      'figure': page.label(row['figure']), 'base': page.number(row['base']),
      'variant': page.number(row['variant']),
      'minus base': page.estimate(row['effect'], row['low'], row['high']),
      'test': page.label(row['test']), 'p': page.p_value(row['p']),
      'corrected p': page.p_value(row['p_corrected']),
      'items': page.count(row['items']), 'seeds': page.count(row['seeds'])}
                                  for row in rows]).text()
