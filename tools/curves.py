"""Draws the curves of runs beside each other: losses, rate, gradients, speed.

  python -m tools.curves runs/a runs/b --plot=curves.png
  python -m tools.curves runs/a runs/b --plot=curves.svg --by=tokens --smooth=.9

Each folder is a workdir of train.py, whose run may be under way. The fields in
which the configs of the runs differ are printed as a table. The page of
--plot=FILE.html has it too, has all of --by to choose from, and shows the
figure under the pointer.
"""

from collections.abc import Mapping, Sequence
import itertools
import math
from typing import Any

from common.errors import require
from tools.compare import cost, curves, figures, page, plots
from training import cli, runs
from training.workdir import metrics, run_config, storage

# The figures that are drawn, by the split and name of their rows in
# metrics.jsonl.
TITLE_OF_FIGURE = {'eval/loss': 'held-out loss', 'train/loss': 'training loss',
                   'train/learning_rate': 'learning rate',
                   'train/grad_norm': 'gradient norm',
                   'train/tokens_per_second': 'tokens a second'}
FORMATS_OF_PLOT = ('html', *figures.FILE_FORMATS)


def main() -> int:
  """Draws the curves of the runs that the command line names."""
  parser = cli.Parser(prog='python -m tools.curves', description=__doc__)
  parser.add_argument('runs', nargs='+', metavar='WORKDIR',
                      help='the folder of a run')
  parser.add_argument('--plot', required=True, metavar='FILE', help='a '
                      'picture or page: ends in .png, .svg, .pdf or .html')
  parser.add_argument('--by', default='step', choices=sorted(curves.AXES),
                      help='what to draw against')
  parser.add_argument('--smooth', type=float, default=0.0, metavar='W',
                      help='a moving average of what is measured in training, '
                      'in which what came before weighs W, as 0.9')
  args = parser.parse_args()

  # Check the options.
  require(0 <= args.smooth < 1, f'--smooth is {args.smooth}: choose 0 to .999')
  file = storage.checked_output_file(args.plot, '--plot')
  require(file is not None and file.suffix[1:] in FORMATS_OF_PLOT, f'--plot is '
          f'{args.plot!r}: its name must end in one of '
          f'.{", .".join(FORMATS_OF_PLOT)}')

  # Read the curves of each run. Each figure that any run has gets a panel.
  curves_of_runs = {}
  for folder in args.runs:
    curves_of_runs[folder] = _curves_of_run(folder, args.smooth)
  title_of_panel = {}
  for figure, title in TITLE_OF_FIGURE.items():
    if any(figure in lines for lines in curves_of_runs.values()):
      title_of_panel[figure] = title

  # Draw them as a page or a picture, beside what the configs have different.
  differences = _table_of_differences(args.runs)
  if differences.rows:
    print(f'{differences.text()}\n')
  if file.suffix == '.html':
    html = _render_page(curves_of_runs, title_of_panel, axis=args.by,
                        differences=differences)
    storage.write_file(file, html)
  else:
    picture = _draw_picture(curves_of_runs, title_of_panel, axis=args.by)
    storage.write_picture(file, picture)
  print(f'curves: {file}')
  return 0


def _curves_of_run(folder: str, weight: float) -> dict[str, dict[str, list]]:
  """Reads the curves of a run: how each figure, such as the training loss,
  changes over the steps.

  Args:
    folder: the folder of the run.
    weight: the weight of the moving average by which training curves are
      smoothed, from 0 (not at all) to below 1.

  Returns:
    The curves by the name of their figure. A curve is a dict of columns: one
    for each horizontal axis ('step', 'tokens', ...), and `loss`, which holds
    the values whatever the figure is.

  Raises:
    RequestError: if there is no run in the folder, or it has no figures yet.
  """
  file = storage.checked_path(folder) / metrics.METRICS_FILE
  config = runs.load_run_config(file.parent)
  rows = []
  if file.exists():
    rows = metrics.read_metrics(file)
  require(rows, f'{file} has no figures yet (log.every_steps)')

  # The costs of the run give the axes of tokens and of FLOPs. A figure is named
  # 'train/loss' or 'eval/loss'; a run may not have all of them.
  run_cost = cost.cost_of_run(config)
  flat_config = run_config.flatten(config)
  curve_of_figure = {}
  for figure in TITLE_OF_FIGURE:
    split, name = figure.split('/')
    curve = curves.curve_from_rows(
        rows, split=split, name=name, config=flat_config,
        tokens=run_cost.tokens, flops_per_token=run_cost.flops_per_token)
    if not curve:
      continue
    # Evaluations average over many batches, and need no smoothing.
    if split != 'eval':
      smooth_values = smooth_curve(curve['loss'], weight)
      curve = curve | {'loss': smooth_values}
    curve_of_figure[figure] = curve
  return curve_of_figure


def _table_of_differences(folders: Sequence[str]) -> page.Table:
  """Returns the table of the fields in which the configs of some runs differ: a
  row for each field, with its value in each run.

  Args:
    folders: the folders of the runs.
  """
  # The config of each run, {dotted name of a field: value}.
  config_of_folder = {}
  for folder in folders:
    config = runs.load_run_config(storage.checked_path(folder))
    config_of_folder[folder] = run_config.flatten(config)

  # Each field that any of them has, once, in the order of the configs.
  fields = dict.fromkeys(
      itertools.chain.from_iterable(config_of_folder.values()))
  rows = []
  for field in fields:
    value_of_folder = {}
    for folder, config in config_of_folder.items():
      value_of_folder[folder] = config.get(field, run_config.MISSING_VALUE)
    values = list(value_of_folder.values())
    if all(value == values[0] for value in values):
      continue
    row = {'field': page.Cell(field, field)}
    for folder, value in value_of_folder.items():
      row[folder] = page.Cell(str(value), str(value))
    rows.append(row)
  return page.Table('differences', 'What the configs have different', rows)


def smooth_curve(values: Sequence[float], weight: float) -> list[float]:
  """Returns the exponential moving average of a curve, without the bias towards
  a start of 0 (as Adam corrects its moments, Kingma and Ba 2015):

    a_t = sum_s w^(t - s) x_s / sum_s w^(t - s), over the values s <= t

  Args:
    values: the values x_t. A value that is not finite stays as it is, and is in
      no average.
    weight: the weight w, from 0 (no smoothing) to below 1.

  Returns:
    The average a_t in the place of each value.
  """
  # The numerator at t is w times that at t - 1, plus x_t. The denominator is w
  # times that at t - 1, plus 1.
  weighted_sum = sum_of_weights = 0.0
  averages = []
  for value in values:
    if not math.isfinite(value):
      averages.append(value)
      continue
    weighted_sum = weight * weighted_sum + value
    sum_of_weights = weight * sum_of_weights + 1
    averages.append(weighted_sum / sum_of_weights)
  return averages


def _draw_picture(curves_of_runs: Mapping[str, Mapping],
                  title_of_panel: Mapping[str, str], axis: str) -> Any:
  """Draws the curves of several runs with matplotlib: a panel for each figure,
  such as the loss, with a line for each run.

  Args:
    curves_of_runs: the curves of each run by the name of their figure, by the
      folder of the run.
    title_of_panel: the title of each panel, by the name of its figure.
    axis: the name of the horizontal axis, a key of curves.AXES.

  Returns:
    The matplotlib figure.
  """
  from matplotlib import ticker
  from matplotlib.figure import Figure
  with figures.drawing_style('curves'):
    folders = list(curves_of_runs)
    style_of_run = figures.line_styles('', folders)
    label_of_run = figures.shorten_labels(folders)
    # Two panels stand side by side; sizes are in inches.
    num_rows = math.ceil(len(title_of_panel) / 2)
    figure = Figure(figsize=(figures.PAGE_WIDTH, 1.9 * num_rows + 0.5))

    # Draw a panel for each figure, with a line for each run. A run without the
    # figure has a line of no points, so that the legend has all runs.
    for number, panel in enumerate(title_of_panel, 1):
      axes = figure.add_subplot(num_rows, 2, number)
      for folder, curve_of_panel in curves_of_runs.items():
        curve = curve_of_panel.get(panel, {axis: [], 'loss': []})
        # A line of one point could not be seen without a marker.
        marker = ''
        if len(curve[axis]) == 1:
          marker = 'o'
        axes.plot(curve[axis], curve['loss'], marker=marker,
                  label=label_of_run[folder], **style_of_run[folder])
      axes.set(title=title_of_panel[panel], xlabel=curves.AXES[axis])
      axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
      axes.locator_params(axis='x', nbins=5)
      axes.grid(axis='y')

    # All panels share one legend. The figure must be laid out inside of this
    # block, after which the style of the drawing no longer holds.
    figure.legend(*axes.get_legend_handles_labels(), ncols=4,
                  loc='outside lower center')
    figure.draw_without_rendering()
  return figure


def _render_page(curves_of_runs: Mapping[str, Mapping],
                 title_of_panel: Mapping[str, str], axis: str,
                 differences: page.Table) -> str:
  """Returns an HTML page that plots the curves of several runs. A reader of the
  page chooses the figure and the horizontal axis.

  Args:
    curves_of_runs: the curves of each run, by its folder.
    title_of_panel: the title of each figure to choose from, by its name.
    axis: the axis that is chosen at first, a key of curves.AXES.
    differences: the table of the fields in which the runs' configs differ.
  """
  # One series for each run. `look` names the CSS classes of its line: c0 to c5
  # are colours, and d0, d1, ... are patterns of dashes for more than six runs.
  series = []
  for i, (folder, curve_of_figure) in enumerate(curves_of_runs.items()):
    thinned = {}
    for figure, curve in curve_of_figure.items():
      thinned[figure] = plots.thin_curve(curve)
    series.append({'name': folder, 'base': False, 'look': f'c{i % 6} d{i // 6}',
                   'mean': thinned})
  # The chosen axis comes first, because the page shows the first one.
  plot = {
      'id': 'curves-0', 'title': 'curves', 'curves': True, 'log': False,
      'x': {axis: curves.AXES[axis]} | curves.AXES, 'y': title_of_panel,
      'series': series,
      'caption': 'Seconds are of training steps on the machine that ran them, '
      'without compiling, evaluating and saving.'}
  section = page.Section('curves', 'Curves', plots=[plot],
                         tables=[differences])
  return page.html(
      [section], title=', '.join(curves_of_runs), about=[], answer='',
      warnings=[])


if __name__ == '__main__':
  cli.run(main)
