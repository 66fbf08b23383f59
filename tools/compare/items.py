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
  """Adds the arguments of `python -m tools.compare items` to its parser."""
  parser.add_argument('base', metavar='BASE', help='a file or folder')
  parser.add_argument('variant', metavar='VARIANT', help='another one')
  parser.add_argument('--json', action='store_true', help='print JSON')


def main(args) -> int:
  """Prints how base and variant differ by the scores of their items."""
  rows = compare_items(args.base, args.variant)
  if args.json:
    print(json.dumps(rows, indent=2))
  else:
    print(render_rows(rows))
  return 0


def compare_items(base: str, variant: str) -> list[dict[str, Any]]:
  """Returns a paired test of each figure of which base and variant have the
  scores of the same items, such as questions; corrected by Holm (1979).

  Args:
    base, variant: the files or folders of both.

  Returns:
    A row for each figure, with 'base', 'variant', 'effect', 'low', 'high',
    'test', 'p', 'p_corrected', and the numbers of 'items' and 'seeds'.

  Raises:
    RequestError: where there is no such figure.
  """
  rows = compare_records(_read_records_by_seed(base),
                         _read_records_by_seed(variant))
  require(rows, f'{base} and {variant} have no figure of the same items of the '
          'same seeds')

  # Each as one of several.
  corrected_ps = statistics.correct_p_values([row['p'] for row in rows])
  for row, p_corrected in zip(rows, corrected_ps):
    row['p_corrected'] = p_corrected
  return rows


def compare_records(base_records: Mapping[str, Mapping[str, dict]],
                    variant_records: Mapping[str, Mapping[str, dict]]
                    ) -> list[dict[str, Any]]:
  """Returns the rows of `compare_items` before their correction.

  Args:
    base_records, variant_records: the scores of the items of each figure, by
      seed and by the name of the figure.
  """
  seeds = [seed for seed in base_records if seed in variant_records]
  figures: dict[str, None] = {}  # in the order of the base's records
  for seed in seeds:
    figures |= dict.fromkeys(base_records[seed])

  # The test of each figure.
  rows = []
  for figure in figures:
    record_pairs = []
    for seed in seeds:
      record_pairs.append((base_records[seed].get(figure),
                           variant_records[seed].get(figure)))
    scores = items.pair_scores(record_pairs)
    if scores is not None:
      base_SQ, variant_SQ, weights_Q = scores
      test = _test_figure(base_SQ, variant_SQ, weights_Q)
      rows.append({'figure': figure} | test)
  return rows


def _read_records_by_seed(name: str) -> dict[str, dict[str, dict]]:
  """Returns the scores of the items of each figure, by seed; those of a single
  run are of seed ''.

  Args:
    name: the file or folder.
  """
  path = pathlib.Path(name)
  require(path.exists(), f'there is no {path}')
  folders = sorted(path.glob('seed-*'))
  if not folders:
    return {'': items.read_records(path)}
  return {folder.name: items.read_records(folder) for folder in folders}


def _test_figure(base_SQ: np.ndarray, variant_SQ: np.ndarray,
                 weights_Q: Sequence[float] | None) -> dict[str, Any]:
  """Returns the paired test of a figure by the scores of its items.

  Of right and wrong items of one run each it is McNemar's exact test (1947), of
  other scores Student's over the items, and of several seeds one over seeds and
  items crossed (statistics.estimate_over_seeds_and_items).

  Args:
    base_SQ, variant_SQ: the scores of base and variant, by S seeds and Q items.
    weights_Q: the weights of the items; None: all count alike.
  """
  num_seeds, num_items = variant_SQ.shape
  difference = statistics.estimate_over_seeds_and_items(variant_SQ - base_SQ,
                                                        weights_Q)

  # The test that fits the scores.
  score_values = {*base_SQ.flat, *variant_SQ.flat}
  are_right_or_wrong = score_values <= {0.0, 1.0}
  if num_seeds > 1:
    test, p = 'seeds and items', difference.p
  elif weights_Q is None and are_right_or_wrong:
    test, p = 'McNemar', statistics.mcnemar_p_value(variant_SQ[0], base_SQ[0])
  else:
    test, p = 'items', difference.p

  base_mean = np.average(base_SQ.mean(0), weights=weights_Q)
  variant_mean = np.average(variant_SQ.mean(0), weights=weights_Q)
  return {
      'base': float(base_mean),
      'variant': float(variant_mean),
      'effect': difference.mean,
      'low': difference.low,
      'high': difference.high,
      'test': test,
      'p': p,
      'items': num_items,
      'seeds': num_seeds}


def render_rows(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the rows of `compare_items` as a table for a terminal."""
  cells = []
  for row in rows:
    cells.append({
        'figure': page.label(row['figure']),
        'base': page.number(row['base']),
        'variant': page.number(row['variant']),
        'minus base': page.effect(row),
        'test': page.label(row['test']),
        'p': page.p_value(row['p']),
        'corrected p': page.p_value(row['p_corrected']),
        'items': page.count(row['items']),
        'seeds': page.count(row['seeds'])})
  return page.table('items', '', cells).text()
