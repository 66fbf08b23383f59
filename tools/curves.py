"""Draws the curves of runs beside each other: losses, rate, gradients, speed.

  python -m tools.curves runs/a runs/b --plot=curves.png
  python -m tools.curves runs/a runs/b --plot=curves.svg --by=tokens --smooth=.9

Each folder is a workdir of train.py, whose run may be under way. The page of
--plot=FILE.html has all of --by to choose from, and shows the figure under the
pointer.
"""

from collections.abc import Mapping, Sequence
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

  # The request.
  require(0 <= args.smooth < 1, f'--smooth is {args.smooth}: choose 0 to .999')
  file = storage.checked_output_file(args.plot, '--plot')
  require(file is not None and file.suffix[1:] in FORMATS_OF_PLOT, f'--plot is '
          f'{args.plot!r}: its name must end in one of '
          f'.{", .".join(FORMATS_OF_PLOT)}')

  # The lines of each run, and the figures that any of them has.
  drawn = {folder: _curves_of_run(folder, args.smooth) for folder in args.runs}
  panels = {}
  for figure, words in TITLE_OF_FIGURE.items():
    if any(figure in lines for lines in drawn.values()):
      panels[figure] = words
  if file.suffix == '.html':
    storage.write_file(file, _render_page(drawn, panels, args.by))
  else:
    storage.write_picture(file, _draw_picture(drawn, panels, args.by))
  print(f'curves: {file}')
  return 0


def _curves_of_run(folder: str, weight: float) -> dict[str, dict[str, list]]:
  """Returns the curve of each figure that a run has, by the name of the figure;
  a curve has the columns of curves.curve_from_rows.

  Args:
    folder: the folder of the run.
    weight: the weight of --smooth.

  Raises:
    RequestError: where no run lies there, or it has no figures yet.
  """
  file = storage.checked_path(folder) / metrics.METRICS_FILE
  config = runs.load_run_config(file.parent)
  rows = []
  if file.exists():
    rows = metrics.read_metrics(file)
  require(rows, f'{file} has no figures yet (log.every_steps)')

  spent, lines = cost.cost_of_run(config), {}
  for figure in TITLE_OF_FIGURE:
    split, name = figure.split('/')
    line = curves.curve_from_rows(rows, split, name, run_config.flatten(config),
                                  spent.tokens, spent.flops_per_token)
    if not line:
      continue
    if split != 'eval':
      line = line | {'loss': smooth_curve(line['loss'], weight)}
    lines[figure] = line
  return lines


def smooth_curve(values: Sequence[float], weight: float) -> list[float]:
  """Returns the exponential moving average of some values, without the bias to
  a start of 0: a_t = sum_s w^(t - s) x_s / sum_s w^(t - s).

  Args:
    values: the values x; one that is not finite stays, and is in no average.
    weight: w, from 0 (no smoothing) to below 1.
  """
  total = weights = 0.0
  result = []
  for value in values:
    if not math.isfinite(value):
      result.append(value)
      continue
    total = weight * total + value
    weights = weight * weights + 1
    result.append(total / weights)
  return result


def _draw_picture(drawn: Mapping[str, Mapping], panels: Mapping[str, str],
                  by: str) -> Any:
  """Returns a matplotlib figure with a panel for each figure of the runs.

  Args:
    drawn: the lines of each run, by its folder.
    panels: the figures, and the words for each.
    by: the entry of curves.AXES to draw against.
  """
  from matplotlib import ticker
  from matplotlib.figure import Figure
  with figures.drawing_style('curves'):
    names = list(drawn)
    look, label = figures.line_styles('', names), figures.shorten_labels(names)
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(figures.PAGE_WIDTH, 1.9 * rows + 0.5))
    for place, panel in enumerate(panels, 1):
      axes = figure.add_subplot(rows, 2, place)
      for name, lines in drawn.items():
        line = lines.get(panel, {by: [], 'loss': []})
        marker = ''
        if len(line[by]) == 1:  # a line of one point cannot be seen
          marker = 'o'
        axes.plot(line[by], line['loss'], marker=marker, label=label[name],
                  **look[name])
      axes.set(title=panels[panel], xlabel=curves.AXES[by])
      axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
      axes.locator_params(axis='x', nbins=5)
      axes.grid(axis='y')
    figure.legend(*axes.get_legend_handles_labels(), ncols=4,
                  loc='outside lower center')
    figure.draw_without_rendering()  # under this style, wherever it is written
  return figure


def _render_page(drawn: Mapping[str, Mapping], panels: Mapping[str, str],
                 by: str) -> str:
  """Returns an HTML page on which a reader chooses the figure and the axis; the
  arguments are those of `_draw_picture`."""
  series = []
  for i, (name, lines) in enumerate(drawn.items()):
    thinned = {figure: plots.thin_curve(line) for figure, line in lines.items()}
    series.append({'name': name, 'base': False, 'look': f'c{i % 6} d{i // 6}',
                   'mean': thinned})
  plot = {
      'id': 'curves-0', 'title': 'curves', 'curves': True, 'log': False,
      'x': {by: curves.AXES[by]} | curves.AXES, 'y': panels, 'series': series,
      'caption': 'Seconds are of training steps on the machine that ran them, '
      'without compiling, evaluating and saving.'}
  section = page.Section('curves', 'Curves', plots=[plot])
  return page.html([section], title=', '.join(drawn), about=[], answer='',
                   warnings=[])


if __name__ == '__main__':
  cli.run(main)
