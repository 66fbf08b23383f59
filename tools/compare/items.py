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
  """Tests whether a variant differs from a base in the scores of single items,
  such as the questions of a benchmark. Each figure, such as an accuracy, gets a
  paired test, whose p-value is corrected for their number by Holm (1979).

  Args:
    base: the file or folder with the scores of the base.
    variant: the file or folder with those of the variant.

  Returns:
    A row for each figure that both have for the same items: its 'base',
    'variant', 'effect' (their difference) with 'low' and 'high', 'test', 'p',
    'p_corrected', and the numbers of 'items' and 'seeds'.

  Raises:
    RequestError: if there is no such figure.
  """
  rows = compare_records(_read_records_by_seed(base),
                         _read_records_by_seed(variant))
  require(rows, f'{base} and {variant} have no figure of the same items of the '
          'same seeds')

  # Correct the p-values for the number of tests.
  corrected_ps = statistics.correct_p_values([row['p'] for row in rows])
  for row, p_corrected in zip(rows, corrected_ps):
    row['p_corrected'] = p_corrected
  return rows


def compare_records(base_records: Mapping[str, Mapping[str, dict]],
                    variant_records: Mapping[str, Mapping[str, dict]]
                    ) -> list[dict[str, Any]]:
  """Tests each figure, such as an accuracy, by the scores of single items that
  base and variant have for the same seeds. The p-values are not corrected.

  The suffixes name axes: S seeds, Q items (such as questions).

  Args:
    base_records: the scores of the base, {seed: {figure: record}}.
    variant_records: the scores of the variant, in the same form.

  Returns:
    The rows of `compare_items`, without 'p_corrected'.
  """
  # Find the figures, in the order of the base's records.
  seeds = [seed for seed in base_records if seed in variant_records]
  figures: dict[str, None] = {}
  for seed in seeds:
    figures |= dict.fromkeys(base_records[seed])

  # Test each figure whose items are the same on both sides.
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
  """Reads the scores of single items, {seed: {figure: record}}.

  Args:
    name: a folder with a folder seed-N for each seed; or the file or folder of
      a single run, whose seed is then called ''.
  """
  path = pathlib.Path(name)
  require(path.exists(), f'there is no {path}')
  folders = sorted(path.glob('seed-*'))
  if not folders:
    return {'': items.read_records(path)}
  return {folder.name: items.read_records(folder) for folder in folders}


def _test_figure(base_SQ: np.ndarray, variant_SQ: np.ndarray,
                 weights_Q: Sequence[float] | None) -> dict[str, Any]:
  """Tests the difference of a variant from a base by the scores of single
  items, which are paired.

  With several seeds, it is a test over seeds and items crossed
  (statistics.estimate_over_seeds_and_items). With one seed, it is McNemar's
  exact test (1947) if each item is right or wrong, and otherwise Student's
  t-test over the items.

  The suffixes name axes: S seeds, Q items (such as questions).

  Args:
    base_SQ: the scores of the base, [seeds, items].
    variant_SQ: the scores of the variant, [seeds, items].
    weights_Q: the weights of the items; None: all count alike.

  Returns:
    A row of `compare_items`, without its 'figure' and 'p_corrected'.
  """
  num_seeds, num_items = variant_SQ.shape
  difference = statistics.estimate_over_seeds_and_items(variant_SQ - base_SQ,
                                                        weights_Q)

  # Choose the test that fits the scores.
  score_values = {*base_SQ.flat, *variant_SQ.flat}
  are_right_or_wrong = score_values <= {0.0, 1.0}
  p = difference.p
  if num_seeds > 1:
    test = 'seeds and items'
  elif weights_Q is None and are_right_or_wrong:
    test = 'McNemar'
    p = statistics.mcnemar_p_value(variant_SQ[0], base_SQ[0])
  else:
    test = 'items'

  # The figure itself is the weighted mean over the items.
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
  """Returns a table for a terminal with a row for each figure: its values on
  both sides, their difference with its interval, the test and its p-values.

  Args:
    rows: the rows that `compare_items` returns.
  """
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
