"""What the report draws: the figures of each plot, as report.js takes them.

A plot is {id, title, x, y, log, series}: `x` and `y` name the axes and the
measures that a reader can choose from, and a series holds, for each measure,
its points by axis: {'eval': {'tokens': [...], 'y': [...]}}. `look` is the class
of report.css that gives a series its colour and dashes.
"""

from collections.abc import Sequence
import math

import numpy as np

from tools.compare.pages import labels
from tools.compare import statistics
from tools.compare.sweep_report import curves
from tools.compare.sweep_report import extras
from tools.compare.sweep_report.curves import Sweep
from tools.compare.sweep_report.tables import difference
from training.evals.by_position import loss_at

MOST = 300  # points of a line; longer ones are thinned
BINS = 40  # of the positions of a long text
COLOURS, DASHES = 6, 4  # of report.css
NAME = 40  # characters of a name beside a figure


def looks(sweep: Sweep) -> dict[str, str]:
  """Returns the look of each variant, the same in all figures. The base is
  ink; the others take the colours in turn, and then the colours dashed."""
  others = [p.name for p in sweep.points if p is not sweep.base]
  return {sweep.base.name: 'ink'} | {
      name: f'c{i % COLOURS} d{i // COLOURS % DASHES}'
      for i, name in enumerate(others)}


def losses(sweep: Sweep) -> dict:
  """Loss curves: the mean over seeds, and each seed."""
  series = []
  for point in sweep.points:
    if not point.finals:
      continue
    series.append({
        'name': point.name, 'base': point is sweep.base,
        'look': looks(sweep)[point.name],
        'mean': {s: _line(point.mean_curve(s)) for s in curves.SPLITS},
        'seeds': {seed: {s: _line(point.curve(seed, s))
                         for s in curves.SPLITS} for seed in point.finals}})
  return {'id': 'curves', 'title': 'loss curves', 'curves': True, 'log': False,
          'x': curves.AXES, 'y': curves.SPLITS, 'series': series}


def rates(sweep: Sweep, groups: Sequence[extras.Rates]) -> dict:
  """Final loss by learning rate, with its interval over seeds; a group looks as
  the first of its points."""
  series, look = [], looks(sweep)
  order = [point.name for point in sweep.points]
  for group in groups:
    found = {lr: statistics.interval(list(point.finals.values()))
             for lr, point in group.points.items() if point.finals}
    bars = [x.bar or (None, None) for x in found.values()]
    line = {'lr': list(found), 'y': [x.mean for x in found.values()],
            'low': [low for low, _ in bars], 'high': [high for _, high in bars]}
    names = [point.name for point in group.points.values()]
    first = sweep.base.name if sweep.base.name in names else min(
        names, key=order.index)
    if found:
      series.append({'name': group.name, 'base': False, 'look': look[first],
                     'mean': {'loss': _numbers(line)}})
  return {'id': 'rates', 'title': 'loss by learning rate', 'log': True,
          'x': {'lr': 'learning rate'}, 'y': {'loss': 'final held-out loss'},
          'series': series}


def health(sweep: Sweep) -> dict:
  """The experts' panel in the course of training: mean over layers, seeds."""
  series = []
  for point in sweep.points:
    mean = {}
    for name in extras.HEALTH:
      curve = extras.health_curve(point, name)
      if curve is not None:
        mean[name] = _line(curve)
    if mean:
      series.append({'name': point.name, 'base': point is sweep.base,
                     'look': looks(sweep)[point.name], 'mean': mean})
  return {'id': 'health', 'title': 'health of the routers', 'curves': True,
          'log': False, 'x': curves.AXES, 'y': extras.HEALTH,
          'series': series}


def extrapolation(sweep: Sweep, found: dict) -> dict:
  """Loss by position at the longest text that each encoding takes; those of one
  variant have its colour, in dashes of their own."""
  series, drawn = [], {}
  for (point, name), entry in found.items():
    taken = {m: c for m, c in entry['curves'].items() if c}
    if not taken:
      continue
    seeds = taken[max(taken)]
    edges = np.unique(np.geomspace(1, len(seeds[0][0]), BINS).astype(int))
    line = {'position': np.sqrt(edges[:-1] * edges[1:]),
            'y': [np.mean([loss_at(*seed, slice(a, b)) for seed in seeds])
                  for a, b in zip(edges, edges[1:])]}
    colour, *dashes = looks(sweep)[point].split()
    drawn[point] = drawn.get(point, -1) + 1
    if drawn[point]:
      dashes = [f'd{drawn[point] % DASHES}']
    series.append({'name': point if name == point else f'{point}: {name}',
                   'base': False, 'look': ' '.join([colour, *dashes]),
                   'mean': {'loss': _numbers(line)}})
  length = max((entry['length'] for entry in found.values()), default=0)
  return {'id': 'extrapolation', 'title': 'loss by position', 'log': True,
          'x': {'position': 'position in tokens'},
          'y': {'loss': 'held-out loss'},
          'rule': {'x': length, 'label': 'training length'}, 'series': series}


def _line(curve: curves.Curve) -> dict:
  """A curve with at most MOST points, its last one kept."""
  n = len(curve.step)
  keep = np.unique(np.linspace(0, n - 1, min(n, MOST)).round().astype(int))
  return _numbers({name: getattr(curve, name)[keep] for name in curves.AXES}
                  | {'y': curve.loss[keep]})


def _numbers(line: dict) -> dict:
  """Plain numbers of six digits; what is unknown or not finite is None."""
  return {name: [_number(x) for x in values]
          for name, values in line.items()}


def _number(x) -> float | None:
  return None if x is None or not math.isfinite(x) else float(f'{x:.6g}')


def forest(rows, look: dict[str, str], width: int = 900) -> str:
  """Draws the differences from the base and their intervals, as SVG."""
  from html import escape
  rows = [r for r in rows if r.difference is not None]
  ends = [e for r in rows for e in (r.difference.mean,
                                    *(r.difference.bar or ()))]
  low, high = min([0.0, *ends]), max([0.0, *ends])
  room = (high - low) * 0.05 or 0.01
  low, high = low - room, high + room
  shown = labels.shortened([r.point.name for r in rows], NAME)
  left = 60 + min(8 * max(map(len, shown.values())), 2 * width // 3)
  height = 26 * len(rows) + 56
  at = lambda v: left + (v - low) / (high - low) * (width - left - 20)
  parts = [f'<svg class="forest" viewBox="0 0 {width} {height}" role="img" '
           'aria-label="differences from the base">']
  for tick in _ticks(low, high):
    parts.append(
        f'<line class="grid" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="8" '
        f'y2="{height - 44}"/><text x="{at(tick):.1f}" y="{height - 28}" '
        f'text-anchor="middle">{tick:+.4g}</text>')
  parts.append(f'<line class="rule" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="8" '
               f'y2="{height - 44}"/>')
  for i, row in enumerate(rows):
    d, y = row.difference, 22 + 26 * i
    span = '' if d.bar is None else (
        f'<line x1="{at(d.bar[0]):.1f}" x2="{at(d.bar[1]):.1f}" y1="{y}" '
        f'y2="{y}" stroke="currentColor" '
        f'stroke-width="{2 if d.known else 1}"/>')
    says = difference(d).text
    name = escape(row.point.name)
    parts.append(
        f'<g class="{row.verdict}"><title>{name}: {says}</title>{span}'
        f'<circle cx="{at(d.mean):.1f}" cy="{y}" r="4.5" fill="currentColor"/>'
        f'<text x="{left - 48}" y="{y + 4}" text-anchor="end">'
        f'{escape(shown[row.point.name])}</text>'
        f'<line class="line {look[row.point.name]}" x1="{left - 40}" '
        f'x2="{left - 12}" y1="{y}" y2="{y}"/>'
        '</g>')
  parts.append(f'<text x="{(width + left) / 2}" y="{height - 6}" '
               'text-anchor="middle">held-out loss minus the base, nats per '
               'token</text></svg>')
  return ''.join(parts)


def bars(numbers: Sequence[int], paired: bool = False) -> str:
  """Says what the bars of a figure are, by its means' numbers of seeds."""
  what = 'paired seeds' if paired else 'seeds'
  many = any(n >= statistics.MIN_SEEDS for n in numbers)
  two = 2 in numbers
  if many:
    return (f'Bars: 95 % intervals over {what}'
            + (', grey ones hold 0' if paired else '')
            + ('; of two seeds, from one to the other.' if two else '.'))
  return ('Bars: from one seed to the other, since two give no interval.' if two
          else 'One seed: no bars.')


def _ticks(low: float, high: float) -> list[float]:
  raw = (high - low) / 6
  power = 10 ** math.floor(math.log10(raw))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
  return [i * step for i in range(math.ceil(low / step),
                                  math.floor(high / step) + 1)]
