"""One picture of a sweep as a PNG: loss curves, and what each variant's final
loss is beside the base's."""

import pathlib
from typing import Any

from configs.errors import RequestError
from tools.compare.pages import colours
from tools.compare.pages import fonts
from tools.compare.pages import labels
from tools.compare.sweep_report import tables
from tools.compare.sweep_report.curves import Sweep

VERDICTS = {'better': '#00664a', 'worse': '#a63f00'}
OTHER = '#6a707a'  # where no difference is shown


def require_matplotlib() -> None:
  """Refuses --plot where matplotlib is not installed."""
  try:
    import matplotlib  # noqa: F401
  except ImportError as error:
    raise RequestError("--plot needs matplotlib: pip install -e '.[plot]'"
                       ) from error


def draw(sweep: Sweep, path: str | pathlib.Path) -> None:
  """Writes the picture: on the left the held-out loss by tokens, the mean over
  seeds; on the right each variant's difference from the base with its 95 %
  interval and verdict, the best at the top."""
  import matplotlib
  matplotlib.use('Agg')
  with matplotlib.rc_context({'font.family': fonts.families()}):
    _draw(sweep, path)


def _draw(sweep: Sweep, path: str | pathlib.Path) -> None:
  from matplotlib import pyplot
  rows = [row for row in tables.outcomes(sweep)
          if row.point is sweep.base or row.difference is not None]
  rows.sort(key=lambda row: row.difference.mean if row.difference else 0.0)
  others = [p.name for p in sweep.points if p is not sweep.base]
  looks = colours.looks(sweep.base.name, others)
  label = labels.shortened([sweep.base.name, *others])
  figure, (left, right) = pyplot.subplots(
      1, 2, figsize=(10, 1.6 + 0.25 * max(len(rows), 8)), layout='constrained')
  figure.set_facecolor('white')
  for row in rows:
    curve = row.point.mean_curve('eval')
    left.plot(curve.tokens, curve.loss, linewidth=1.5,
              **looks[row.point.name])
  left.set(xlabel='training tokens', ylabel='held-out loss, nats per token',
           title='loss curves, mean over seeds')
  left.xaxis.set_major_formatter('{x:,.0f}')
  left.locator_params(axis='x', nbins=4)
  left.grid(alpha=0.3)
  for y, row in enumerate(rows):
    _row(right, y, row, row.point is sweep.base, looks[row.point.name])
  right.axvline(0, color='grey', linestyle='--', linewidth=1)
  right.set(xlabel='held-out loss minus that of '
            f'{label[sweep.base.name]}, nats',
            title='final difference with its 95 % interval',
            ylim=(len(rows) - 0.5, -0.5))
  right.set_yticks(range(len(rows)),
                   [label[row.point.name] for row in rows])
  right.tick_params(axis='y', length=0, pad=36)
  right.grid(axis='x', alpha=0.3)
  with open(path, 'wb') as file:
    figure.savefig(file, dpi=100, format='png')
  pyplot.close(figure)


def _row(axes: Any, y: int, row: tables.Outcome, is_base: bool,
         look: dict[str, Any]) -> None:
  """Draws one variant: its line's look beside its name, interval, verdict."""
  sides = axes.get_yaxis_transform()
  axes.plot([-0.09, -0.02], [y, y], transform=sides, linewidth=2,
            clip_on=False, **look)
  colour = VERDICTS.get(row.verdict, OTHER)
  if not is_base:
    if row.difference.bar:
      axes.plot(row.difference.bar, [y, y], color=colour, linewidth=2,
                solid_capstyle='butt')
    axes.plot(row.difference.mean, y, 'o', color=colour, markersize=5)
  word = 'the base' if is_base else tables.WORDS[row.verdict]
  axes.text(1.02, y, word, transform=sides, va='center', fontsize=9,
            color=colour)
