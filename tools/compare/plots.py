"""The plots that report.js draws on a page, where a reader chooses the axes.

A plot is {id, title, caption, x, y, log, series}. `x` and `y` name the axes and
the figures that a reader can choose from, and a series holds, for each figure,
its points by axis: {'eval': {'tokens': [...], 'y': [...]}}. `look` is the class
of report.css that gives it its colour and dashes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tools.compare import curves, figures, page
from tools.compare import plan as plans
from tools.compare.comparison import LEARNING_RATE_FIELD, Comparison

MOST = 300  # points of a line; longer ones are thinned


def curve_plots(c: Comparison) -> list[dict[str, Any]]:
  """Returns the curves at each size: the mean over seeds, and each seed."""
  plots = []
  for i, size in enumerate(c.plan.sizes):
    series = _series_at(c, size)
    drawn: set[str] = set()
    for line in series:
      drawn |= line['mean'].keys()
    choices = {figure: words for figure, words in curves.FIGURES.items()
               if figure in drawn}
    plots.append({
        'id': f'curves-{i}', 'title': f'curves {size}', 'curves': True,
        'log': False, 'x': curves.AXES, 'series': series, 'y': choices,
        'caption': f'{size or "Curves"}: means over the seeds that are done. '
        'Seconds are of training steps on the machine that ran them, '
        'without compiling, evaluating and saving; where several runs trained '
        "as one program, each one's share."})
  return plots


def _series_at(c: Comparison, size: str) -> list[dict[str, Any]]:
  """Returns the series of each variant that has curves at a size."""
  series = []
  for variant in c.variants:
    seeds = {}
    for (name, at, seed), lines in c.curves.items():
      if (name, at) == (variant, size) and lines:
        seeds[seed] = lines
    if seeds:
      series.append(_curve_series(c, variant, seeds))
  return series


def _curve_series(c: Comparison, variant: str,
                  seeds: Mapping[int, Mapping[str, Mapping]]) -> dict[str, Any]:
  """Returns the curves of a variant, of each figure that all its seeds have.

  Args:
    c: the Comparison.
    variant: the name of the variant.
    seeds: its curves by seed and figure.
  """
  means: dict[str, dict] = {}
  each: dict[int, dict] = {seed: {} for seed in seeds}
  for figure in curves.FIGURES:
    if not all(figure in lines for lines in seeds.values()):
      continue
    lines_of_seeds = []
    for seed, lines in seeds.items():
      lines_of_seeds.append(lines[figure])
      each[seed][figure] = thinned(lines[figure])
    means[figure] = thinned(curves.mean_curve(lines_of_seeds))
  return {'name': variant, 'base': variant == c.plan.base,
          'look': figures.css_line_classes(
              c, variant), 'mean': means, 'seeds': each}


def tuning_plot(c: Comparison) -> dict[str, Any]:
  """Returns what the last rung of tuning found on text by the learning rate,
  with the interval over seeds where there is one."""
  series = []
  for row in c.results['tuned']:
    if row['workload'] not in ('', plans.TEXT):
      continue
    line = _rates_line(row, last_rung=c.plan.tuning.rungs - 1)
    if not line['lr']:
      continue
    # Another size of the variant has other dashes.
    look = figures.css_line_classes(c, row.get('look', row['variant']),
                                    turn=c.plan.sizes.index(row['size']))
    series.append({'name': f'{row["variant"]} {row["size"]}'.strip(),
                   'base': False, 'look': look,
                   'mean': {'loss': _numbers(line)}})
  return {'id': 'rates', 'title': 'loss by learning rate', 'log': True,
          'x': {'lr': 'learning rate'}, 'y': {'loss': c.plan.primary.name},
          'caption': 'Bars are 95 % intervals over seeds.', 'series': series}


def _rates_line(row: Mapping[str, Any], last_rung: int) -> dict[str, list]:
  """Returns the trials of a plans.Tuned from its last rung on, by rising
  learning rate."""
  tried = []
  for trial in row['tried']:
    if LEARNING_RATE_FIELD in trial['changes'] and trial['rung'] >= last_rung:
      tried.append(trial)
  tried.sort(key=lambda trial: trial['changes'][LEARNING_RATE_FIELD])
  line: dict[str, list] = {'lr': [], 'y': [], 'low': [], 'high': []}
  for trial in tried:
    line['lr'].append(trial['changes'][LEARNING_RATE_FIELD])
    line['y'].append(trial['value'])
    line['low'].append(trial.get('low'))
    line['high'].append(trial.get('high'))
  return line


def thinned(curve: Mapping[str, Sequence]) -> dict[str, list]:
  """Returns a curve as report.js draws it: with at most MOST points, its last
  one kept."""
  length = len(curve['step'])
  places = np.linspace(0, length - 1, min(length, MOST))
  keep = np.unique(places.round().astype(int))
  line = {}
  for name in curves.AXES:
    line[name] = np.asarray(curve[name], float)[keep]
  line['y'] = np.asarray(curve['loss'], float)[keep]
  return _numbers(line)


def _numbers(line: Mapping[str, Sequence]) -> dict[str, list]:
  """Returns plain numbers of six digits; what is unknown or not finite is None.
  """
  rounded = {}
  for name, column in line.items():
    rounded[name] = [float(f'{x:.6g}') if page.known(x) else None
                     for x in column]
  return rounded
