"""Draws the curves of runs beside each other: losses, rate, gradients, speed.

  python -m tools.curves runs/a runs/b
  python -m tools.curves runs/a runs/b --plot=curves.png
  python -m tools.curves runs/a runs/b --plot=curves.svg --by=tokens --smooth=.9

Each folder is a workdir of train.py, whose run may be under way. Without --plot
a table says where each run is. The page of --plot=FILE.html has all of --by to
choose from, and shows the figure under the pointer.
"""

from collections.abc import Mapping, Sequence
import math
import os
from typing import Any

import numpy as np

from configs.errors import require
from tools.compare import curves, figures, layout, page, report
from training import cli, objectives, runs
from training.costs import flops
from training.objectives import pipeline
from training.workdir import metrics, run_config, storage

# What is drawn, by the split and name of its rows in metrics.jsonl.
FIGURES = {'eval/loss': 'held-out loss', 'train/loss': 'training loss',
           'train/learning_rate': 'learning rate',
           'train/grad_norm': 'gradient norm',
           'train/tokens_per_second': 'tokens a second'}
KINDS = ('html', *figures.FORMATS)


def main() -> int:
  parser = cli.Parser(prog='python -m tools.curves', description=__doc__)
  parser.add_argument('runs', nargs='+', metavar='WORKDIR', help='of a run')
  parser.add_argument('--plot', default='', metavar='FILE', help='a picture '
                      'or a page: its name ends in .png, .svg, .pdf or .html')
  parser.add_argument('--by', default='step', choices=sorted(curves.AXES),
                      help='what to draw against')
  parser.add_argument('--smooth', type=float, default=0.0, metavar='W',
                      help='what is measured in training as a moving average, '
                      'in which what came before weighs W, as 0.9')
  args = parser.parse_args()
  require(0 <= args.smooth < 1, f'--smooth is {args.smooth}: it must be from 0 '
          'to below 1')
  file = storage.output(args.plot, '--plot')
  kind = file.suffix[1:] if file else ''
  require(not file or kind in KINDS, f'--plot is {args.plot!r}: its name must '
          f'end in one of .{", .".join(KINDS)}')
  require(len({*args.runs}) == len(args.runs), 'a run is named twice')
  drawn = {name: _lines(folder, args.smooth)
           for name, folder in _names(args.runs).items()}
  print(*layout.columns(_table(drawn)), sep='\n')
  if kind == 'html':
    storage.write(file, _page(drawn, args.by))
  elif file:
    storage.write_picture(file, _picture(drawn, args.by))
  if file:
    print(f'curves: {file}')
  return 0


def _names(folders: Sequence[str]) -> dict[str, str]:
  """Returns the folders by what tells them apart."""
  paths = [os.path.abspath(folder) for folder in folders]
  above = os.path.commonpath([os.path.dirname(path) for path in paths])
  return dict(zip((os.path.relpath(path, above) for path in paths), folders))


def _lines(folder: str, weight: float) -> dict[str, dict[str, list]]:
  """Returns each of FIGURES that a run has, as curves.line does.

  Raises:
    RequestError: where no run lies there, or it has no figures yet.
  """
  config = runs.config_of(storage.path(folder))
  file = storage.path(folder) / metrics.METRICS
  rows = metrics.read(file) if file.exists() else []
  require(rows, f'{file} has no figures: the run has not reported a step yet '
          '(log.every_steps)')
  lengths = objectives.of(config).row_lengths(config)
  a_row = flops.of_a_row(config, runs.model_of(storage.path(folder), config),
                         lengths)
  tokens = int(pipeline.ramp_of(config).before(config.train.steps))
  lines = {}
  for figure in FIGURES:
    split, name = figure.split('/')
    line = curves.line(rows, split, name, run_config.flatten(config),
                       tokens * sum(lengths),
                       sum(a_row.values()) / sum(lengths))
    if line:
      lines[figure] = line | {'loss': line['loss'] if split == 'eval' else
                              smoothed(line['loss'], weight)}
  return lines


def smoothed(values: Sequence[float], weight: float) -> list[float]:
  """Returns at each place the average of the values so far, in which each one
  before weighs `weight` as much; what is not finite is passed over."""
  total = weights = 0.0
  result = []
  for x in values:
    if math.isfinite(x):
      total, weights = weight * total + x, weight * weights + 1
    result.append(total / weights if math.isfinite(x) else x)
  return result


def _table(drawn: Mapping[str, Mapping]) -> list[Sequence[str]]:
  """Returns where each run is, for a terminal."""
  rows: list[Sequence[str]] = [('run', 'step', 'held-out loss', 'lowest',
                                'at step')]
  for name, lines in drawn.items():
    line = lines.get('eval/loss', {'loss': [math.nan], 'step': [0]})
    at = int(np.argmin(np.nan_to_num(line['loss'], nan=np.inf)))
    rows.append((name, f'{max(x["step"][-1] for x in lines.values()):,.0f}',
                 f'{line["loss"][-1]:.4f}', f'{line["loss"][at]:.4f}',
                 f'{line["step"][at]:,.0f}'))
  return rows


def _picture(drawn: Mapping[str, Mapping], by: str) -> Any:
  """Returns a figure with a panel for each of FIGURES that a run has."""
  from matplotlib import ticker
  with figures.style('curves'):
    from matplotlib import pyplot
    panels = [name for name in FIGURES
              if any(name in lines for lines in drawn.values())]
    look = figures.looks('', [*drawn])
    label = figures.shortened([*drawn])
    rows = math.ceil(len(panels) / 2)
    figure = pyplot.figure(figsize=(
        figures.PAGE, 1.9 * rows + 0.3 + 0.15 * math.ceil(len(drawn) / 4)))
    for place, panel in enumerate(panels, 1):
      axes = figure.add_subplot(rows, 2, place)
      for name, lines in drawn.items():
        x, y = (lines[panel][key] if panel in lines else []
                for key in (by, 'loss'))
        axes.plot(x, y, label=label[name], **look[name])
      axes.set(title=FIGURES[panel], xlabel=curves.AXES[by])
      axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
      axes.locator_params(axis='x', nbins=5)
      axes.grid(axis='y')
    figure.legend(*axes.get_legend_handles_labels(), ncols=4,
                  loc='outside lower center')
    figure.canvas.draw()  # under this style, wherever it is written
  return figure


def _page(drawn: Mapping[str, Mapping], by: str) -> str:
  """Returns the page on which a reader chooses what is drawn, against what."""
  axes = {by: curves.AXES[by]} | curves.AXES
  plot = {
      'id': 'curves-0', 'title': 'curves', 'curves': True, 'log': False,
      'x': axes, 'y': {figure: words for figure, words in FIGURES.items()
                       if any(figure in lines for lines in drawn.values())},
      'series': [{'name': name, 'base': False, 'look': figures.turn_of(i),
                  'mean': {figure: report.thinned(line)
                           for figure, line in lines.items()}}
                 for i, (name, lines) in enumerate(drawn.items())],
      'caption': 'Seconds are of training steps on the machine that ran them, '
      'without compiling, evaluating and saving.'}
  return page.html([page.Section('curves', 'Curves', plots=[plot])],
                   title=', '.join(drawn), about=[], answer='', warnings=[])


if __name__ == '__main__':
  cli.run(main)
