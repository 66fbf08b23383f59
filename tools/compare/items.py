"""items: whether two runs differ on what both were asked, item by item.

BASE and VARIANT are each what has the items' scores: a file that eval.py wrote
as --json, the folder of a run, or what lm_eval (or tools.lm_eval) wrote into
--output_path with --log_samples, of any model; or a folder of seed-0, seed-1,
... that are such folders. Of one run each, the test is over the items, paired:
McNemar's exact one where they are right or wrong. Of 3 seeds or more, it is of
both, crossed (statistics.estimate_over_seeds_and_items). The corrected p is
Holm's, over all figures.
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
  rows = compare_items(args.base, args.variant)
  if args.json:
    print(json.dumps(rows, indent=2))
  else:
    print(render_rows(rows))
  return 0


def compare_items(base: str, variant: str) -> list[dict[str, Any]]:
  """Returns a row of each figure whose items both have.

  Args:
    base, variant: the files or folders of both.

  Raises:
    RequestError: where there is none.
  """
  theirs, ours = _read(base), _read(variant)
  seeds = [seed for seed in theirs if seed in ours]
  figures: dict[str, None] = {}  # in the order of the base's records
  for seed in seeds:
    figures |= dict.fromkeys(theirs[seed])

  # The test of each figure.
  rows = []
  for name in figures:
    records = [(theirs[seed].get(name), ours[seed].get(name)) for seed in seeds]
    scores = items.pair_scores(records)
    if scores is not None:
      theirs_SQ, ours_SQ, weights_Q = scores
      rows.append({'figure': name} | _row(theirs_SQ, ours_SQ, weights_Q))
  require(rows, f'{base} and {variant} have no figure of the same items of the '
          'same seeds')

  # Each as one of several.
  corrected = statistics.correct_p_values([row['p'] for row in rows])
  for row, p in zip(rows, corrected):
    row['p_corrected'] = p
  return rows


def _read(name: str) -> dict[str, dict[str, dict]]:
  """Returns the records of each seed; those of one run are of seed ''."""
  path = pathlib.Path(name)
  require(path.exists(), f'there is no {path}')
  folders = sorted(path.glob('seed-*'))
  if not folders:
    return {'': items.read_records(path)}
  return {folder.name: items.read_records(folder) for folder in folders}


def _row(theirs_SQ: np.ndarray, ours_SQ: np.ndarray,
         weights_Q: Sequence[float] | None) -> dict[str, Any]:
  """Returns the test of a figure: McNemar's (1947) of right and wrong items of
  one run each, else Student's over the items, or over seeds and items.

  Args:
    theirs_SQ, ours_SQ: the scores of base and variant, by S seeds and Q items.
    weights_Q: the weights of the items; None: all count alike.
  """
  num_seeds, num_items = ours_SQ.shape
  difference = statistics.estimate_over_seeds_and_items(ours_SQ - theirs_SQ,
                                                        weights_Q)

  # The test that fits the scores.
  scores = {*theirs_SQ.flat, *ours_SQ.flat}
  if num_seeds > 1:
    test, p = 'seeds and items', difference.p
  elif weights_Q is None and scores <= {0.0, 1.0}:
    test, p = 'McNemar', statistics.mcnemar_p_value(ours_SQ[0], theirs_SQ[0])
  else:
    test, p = 'items', difference.p

  base = np.average(theirs_SQ.mean(0), weights=weights_Q)
  variant = np.average(ours_SQ.mean(0), weights=weights_Q)
  return {
      'base': float(base),
      'variant': float(variant),
      'effect': difference.mean,
      'low': difference.low,
      'high': difference.high,
      'test': test,
      'p': p,
      'items': num_items,
      'seeds': num_seeds}


def render_rows(rows: Sequence[Mapping[str, Any]]) -> str:
  """Renders rows for a terminal."""
  cells = []
  for row in rows:
    effect = page.estimate(mean=row['effect'], low=row['low'], high=row['high'])
    cells.append({
        'figure': page.label(row['figure']),
        'base': page.number(row['base']),
        'variant': page.number(row['variant']),
        'minus base': effect,
        'test': page.label(row['test']),
        'p': page.p_value(row['p']),
        'corrected p': page.p_value(row['p_corrected']),
        'items': page.count(row['items']),
        'seeds': page.count(row['seeds'])})
  return page.table('items', '', cells).text()
