"""The interactive plots of a report's page, which report.js draws from JSON: a
reader chooses the figure and the axis."""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from tools.compare import curves, figures, page
from tools.compare import plan as plans
from tools.compare.comparison import LEARNING_RATE_FIELD, Comparison

MAX_POINTS_OF_LINE = 300  # a page of more takes long to draw

# The points of a line as columns: 'y', and what stands on each axis that a
# reader can choose, such as 'tokens'; 'low' and 'high' where it has intervals.
Line = dict[str, list]


class Series(TypedDict):
  """The lines of one variant, of which a reader sees one figure at a time.

  Attributes:
    name: what the legend calls it.
    base: whether it is the base.
    look: the classes of report.css that give it its colour and dashes.
    mean: the mean over seeds of each figure, by the figure's name.
    seeds: by seed, the same of each seed alone.
  """
  name: str
  base: bool
  look: str
  mean: dict[str, Line]
  seeds: NotRequired[dict[int, dict[str, Line]]]


class Plot(TypedDict):
  """A plot as report.js draws it.

  Attributes:
    id: the id of the <figure> that it is drawn into.
    title, caption: the words beside it.
    curves: whether it draws the curves of runs.
    log: whether the horizontal axis is logarithmic.
    x: the axes that a reader can choose, each with its label.
    y: the figures that a reader can choose, each with its label.
    series: the lines.
  """
  id: str
  title: str
  curves: NotRequired[bool]
  log: bool
  x: Mapping[str, str]
  series: list[Series]
  y: Mapping[str, str]
  caption: str


def curve_plots(comparison: Comparison) -> list[Plot]:
  """Returns a plot of the curves at each size of the model, for the script of a
  report's page. Each variant has a line for the mean over its seeds, and one
  for each seed. A reader can choose the figure, such as the held-out loss.

  Args:
    comparison: the comparison that the report is about.
  """
  plots = []
  for i, size in enumerate(comparison.plan.sizes):
    all_series = _series_at_size(comparison, size)

    # A reader chooses among the figures of which there is a line.
    drawn_figures: set[str] = set()
    for series in all_series:
      drawn_figures |= series['mean'].keys()
    label_by_figure = {figure: label for figure, label in curves.FIGURES.items()
                       if figure in drawn_figures}
    plots.append(Plot(
        id=f'curves-{i}',
        title=f'curves {size}',
        curves=True,
        log=False,
        x=curves.AXES,
        series=all_series,
        y=label_by_figure,
        caption=f'{size or "Curves"}: means over the seeds that are done. '
        'Seconds are of training steps on the machine that ran them, '
        'without compiling, evaluating and saving; where several runs trained '
        "as one program, each one's share."))
  return plots


def _series_at_size(comparison: Comparison, size: str) -> list[Series]:
  """Returns the lines of each variant that has curves at a size of the model.

  Args:
    comparison: the comparison that the report is about.
    size: the name of the size.
  """
  all_series = []
  for variant in comparison.variants:
    curves_by_seed = {}
    for (name, size_of_run, seed), curves_of_run in comparison.curves.items():
      is_wanted = (name, size_of_run) == (variant, size)
      if is_wanted and curves_of_run:
        curves_by_seed[seed] = curves_of_run
    if curves_by_seed:
      all_series.append(_curve_series(comparison, variant, curves_by_seed))
  return all_series


def _curve_series(comparison: Comparison, variant: str,
                  curves_by_seed: Mapping[int, Mapping[str, Mapping]]
                  ) -> Series:
  """Returns the lines of a variant: for each figure that all its seeds have,
  the mean over the seeds, and the curve of each seed.

  Args:
    comparison: the comparison that the report is about.
    variant: the name of the variant.
    curves_by_seed: the curves, {seed: {figure: curve}}.
  """
  mean_by_figure: dict[str, Line] = {}
  lines_by_seed: dict[int, dict[str, Line]] = {
      seed: {} for seed in curves_by_seed}
  for figure in curves.FIGURES:
    is_of_all_seeds = all(
        figure in curve_by_figure
        for curve_by_figure in curves_by_seed.values())
    if not is_of_all_seeds:
      continue
    curves_of_figure = []
    for seed, curve_by_figure in curves_by_seed.items():
      curve = curve_by_figure[figure]
      curves_of_figure.append(curve)
      lines_by_seed[seed][figure] = thin_curve(curve)
    mean_by_figure[figure] = thin_curve(curves.mean_curve(curves_of_figure))
  return Series(
      name=variant,
      base=variant == comparison.plan.base,
      look=figures.css_line_classes(comparison, variant),
      mean=mean_by_figure,
      seeds=lines_by_seed)


def tuning_plot(comparison: Comparison) -> Plot:
  """Returns a plot of the loss on text over the learning rate, as tuning found
  it, with 95 % intervals over seeds where there are any.

  Tuning goes in rungs: each trains fewer learning rates for longer. The plot
  has the last one.

  Args:
    comparison: the comparison that the report is about.
  """
  plan = comparison.plan
  all_series = []
  for tuned in comparison.results['tuned']:
    if tuned['workload'] not in ('', plans.TEXT):
      continue
    line = _loss_by_learning_rate(tuned, last_rung=plan.tuning.rungs - 1)
    if not line['lr']:
      continue
    # Another size of the variant has other dashes.
    look = figures.css_line_classes(
        comparison, tuned.get('look', tuned['variant']),
        turn=plan.sizes.index(tuned['size']))
    all_series.append(Series(
        name=f'{tuned["variant"]} {tuned["size"]}'.strip(),
        base=False,
        look=look,
        mean={'loss': _round_for_json(line)}))
  return Plot(
      id='rates',
      title='loss by learning rate',
      log=True,
      x={'lr': 'learning rate'},
      y={'loss': plan.primary.name},
      caption='Bars are 95 % intervals over seeds.',
      series=all_series)


def _loss_by_learning_rate(tuned: Mapping[str, Any], last_rung: int) -> Line:
  """Returns the losses of the last rung of tuning over the learning rate.
  Tuning goes in rungs: each trains fewer learning rates for longer. Trials
  beyond the edges come in rungs after the last planned one, and count too.

  Args:
    tuned: what tuning found for one variant, as plans.Tuned has it.
    last_rung: the number of the last planned rung.

  Returns:
    Lists by rising learning rate: 'lr', the measure 'y', and the ends 'low' and
    'high' of its interval (None: there is none).
  """
  trials = []
  for trial in tuned['tried']:
    has_learning_rate = LEARNING_RATE_FIELD in trial['changes']
    if has_learning_rate and trial['rung'] >= last_rung:
      trials.append(trial)
  trials.sort(key=lambda trial: trial['changes'][LEARNING_RATE_FIELD])
  line: Line = {'lr': [], 'y': [], 'low': [], 'high': []}
  for trial in trials:
    line['lr'].append(trial['changes'][LEARNING_RATE_FIELD])
    line['y'].append(trial['value'])
    line['low'].append(trial.get('low'))
    line['high'].append(trial.get('high'))
  return line


def thin_curve(curve: Mapping[str, Sequence]) -> Line:
  """Thins a curve out to MAX_POINTS_OF_LINE points at most, so that a page with
  many curves stays small. The points are evenly spaced, and the first and the
  last one are among them.

  Args:
    curve: the columns of the curve, by name.

  Returns:
    The columns of the chosen points: one for each axis, and 'y', the loss.
  """
  num_points = len(curve['step'])
  positions = np.linspace(0, num_points - 1,
                          min(num_points, MAX_POINTS_OF_LINE))
  chosen = np.unique(positions.round().astype(int))
  line = {}
  for axis in curves.AXES:
    line[axis] = np.asarray(curve[axis], float)[chosen]
  line['y'] = np.asarray(curve['loss'], float)[chosen]
  return _round_for_json(line)


def _round_for_json(line: Mapping[str, Sequence]) -> Line:
  """Returns the columns of a line rounded to six digits; what is unknown or not
  finite is None."""
  rounded = {}
  for name, column in line.items():
    rounded[name] = [float(f'{x:.6g}') if page.known(x) else None
                     for x in column]
  return rounded
