"""The figures of a study: effects, loss curves, noise, probes."""

from collections.abc import Callable, Iterator, Sequence
import math
from typing import Any

import numpy as np

from tools.compare.pages import labels
from tools.compare import findings, units
from tools.compare import plan as plans
from tools.compare.study_report import drawing
from tools.compare.study_report import numbers
from tools.compare.study_report.document import Figure
from tools.compare.study_report.record import Record
from tools.compare.study_report.tables import values_of
from tools.compare import statistics

MARKERS = ('o', 's', '^', 'v', 'P', 'X', '*')  # of sizes, in turn
LEFT_OUT = 0.1  # of training, whose losses would flatten all that follows
LABELS = {plans.LOWER: 'left of the line is better',
          plans.HIGHER: 'right of the line is better'}


def draw(record: Record) -> Iterator[tuple[Figure, drawing.Drawn]]:
  """Yields every figure that the study has figures for."""
  for make in (effects, curves, noise, probes):
    found = make(record)
    if found:
      yield found


def _figure(name: str, title: str, caption: str, alt: str,
            paint: Callable[[Any], Any]) -> tuple[Figure, drawing.Drawn]:
  from matplotlib import pyplot
  with drawing.style(name):
    drawn = drawing.save(paint(pyplot))
  return (Figure(name, title, caption, alt,
                 drawing.inline(drawn.svg, name, alt)), drawn)


def looks(record: Record) -> dict[str, dict[str, Any]]:
  return drawing.looks(record.plan.base, record.plan.variants)


def effects(record: Record):
  """A forest plot: each variant's difference, over all sizes and at each."""
  plan = record.plan
  rows = [row for v in plan.variants if (row := record.verdict(v))]
  rows = [row for row in rows if any(
      numbers.known(x) for x in (row['effect'], *(
          own['mean'] for own in row['sizes'])))]
  if not rows:
    return None
  rows.sort(key=lambda row: _order(row['effect']))
  told = '; '.join(f'{row["variant"]} ' + numbers.with_interval(
      row['effect'], row['low'], row['high']) for row in rows)
  unit = units.said(record.frozen, plan.primary, ', ')
  return _figure(
      'effects', 'Effects',
      f'{plan.primary.name} minus that of {plan.base}{unit}: over all sizes '
      '(diamonds) and at each size, with 95 % intervals over paired seeds; '
      f'{LABELS[plan.primary.better]}.',
      f'Forest plot of {plan.primary.name} minus that of {plan.base}{unit}, '
      f'over all sizes: {told}.', lambda pyplot: _forest(record, rows, pyplot))


def _order(x: float | None) -> float:
  return x if numbers.known(x) else math.inf


def _forest(record: Record, rows, pyplot):
  plan, look, label = record.plan, looks(record), _labels(record)
  lines = len(rows) * (len(plan.sizes) + 1.6)
  figure, axes = pyplot.subplots(
      figsize=(drawing.COLUMN, 0.5 + 0.125 * lines), layout='constrained')
  y, ticks, told = 0.0, [], []
  for row in rows:
    colour = look[row['variant']]['color']
    _bar(axes, y, row['effect'], row['low'], row['high'], 'D', colour, 1.6)
    ticks, told = [*ticks, y], [*told, label[row['variant']]]
    for i, own in enumerate(row['sizes']):
      y += 1
      _bar(axes, y, own['mean'], own['low'], own['high'],
           MARKERS[i % len(MARKERS)], colour, 0.8)
      ticks, told = [*ticks, y], [*told, label[own['size']]]
    y += 1.6
  axes.axvline(0, color=drawing.INK, linewidth=0.6, linestyle=(0, (4, 3)))
  axes.set_yticks(ticks, told)
  each = len(plan.sizes) + 1
  for i, text in enumerate(axes.get_yticklabels()):
    text.set_fontweight('normal' if i % each else 'bold')
  axes.set_ylim(y - 1, -0.8)
  of = f'{label[plan.primary.name]} minus that of {label[plan.base]}'
  axes.set_xlabel(of + units.said(record.frozen, plan.primary,
                                  ', ' if len(of) < 40 else ',\n'))
  axes.grid(axis='x')
  axes.tick_params(axis='y', length=0)
  return figure


def _bar(axes, y, mean, low, high, marker, colour, width) -> None:
  if numbers.known(low) and numbers.known(high):
    axes.plot([low, high], [y, y], color=colour, linewidth=width,
              solid_capstyle='butt')
  if numbers.known(mean):
    axes.plot(mean, y, marker, color=colour, markersize=2.5 + width,
              markeredgewidth=0)
  else:
    axes.text(0.5, y, 'all runs diverged', color=colour, va='center',
              ha='center', transform=axes.get_yaxis_transform())


def _labels(record: Record) -> dict[str, str]:
  """The names of variants, sizes and measures as a figure has room for them."""
  plan = record.plan
  return {name: label for names in (
      [plan.base, *plan.variants], plan.sizes, [m.name for m in plan.measures])
          for name, label in labels.shortened(names).items()}


def curves(record: Record):
  """Held-out loss by tokens, a panel for each size."""
  found = {size: drawn for size in record.plan.sizes
           if (drawn := _curves(record, size))}
  if not found:
    return None
  ends = []
  for size, lines in found.items():
    told = ', '.join(f'{name} {line[1][-1]:.4f}'
                     for name, line in lines.items())
    ends.append(f'{size}: {told}')
  unit = units.of_loss(record.frozen, plans.TEXT)
  unit = f', {unit}' if unit else ''
  return _figure(
      'curves', 'Loss curves',
      'Held-out loss on text in the confirmation: the mean over the seeds that '
      f'ended, and its 95 % band. The first {numbers.percent(LEFT_OUT)} of '
      'training are left out.',
      'Curves of held-out loss by tokens, one panel a size. Mean losses at the '
      f'end: {"; ".join(ends)}.',
      lambda pyplot: _panels(record, list(found), pyplot, lambda axes, size:
                             _losses(record, found[size], axes, size),
                             lambda size: f'held-out loss{unit}'))


def _curves(record: Record, size: str) -> dict[str, tuple]:
  """Returns (tokens, mean, low, high) of each variant that has curves."""
  found = {}
  for variant in record.variants:
    runs = [run.curve for run in record.runs(
        'confirm', variant, size, plans.TEXT)
            if run.curve and run.curve['loss'] and not run.diverged
            and all(map(numbers.known, run.curve['loss']))]
    if not runs:
      continue
    tokens = sorted(set.intersection(*(set(run['tokens']) for run in runs)))
    tokens = [x for x in tokens if x >= LEFT_OUT * tokens[-1]]
    at = [dict(zip(run['tokens'], run['loss'])) for run in runs]
    spans = [statistics.interval([own[x] for own in at]) for x in tokens]
    bars = [span.bar or (math.nan, math.nan) for span in spans]
    found[variant] = (np.array(tokens, float), [s.mean for s in spans],
                      *np.array(bars).T)
  return found


def _losses(record: Record, lines, axes, size: str) -> None:
  look, label = looks(record), _labels(record)
  for name, (tokens, mean, low, high) in lines.items():
    axes.fill_between(tokens, low, high, color=look[name]['color'], alpha=0.18,
                      linewidth=0)
    axes.plot(tokens, mean, label=label[name], **look[name])
  axes.set(xlabel='training tokens', title=label[size])
  axes.xaxis.set_major_formatter(_engineering())
  axes.locator_params(axis='x', nbins=4)
  axes.grid(axis='y')


def _engineering():
  from matplotlib.ticker import EngFormatter
  return EngFormatter(sep='')


def _panels(record: Record, names: Sequence[str], pyplot, paint,
            label: Callable[[str], str]):
  """A row of panels with one legend below; rows of at most four. `label` gives
  the y-axis of each, which is not said again beside its like."""
  columns = min(len(names), 4)
  rows = math.ceil(len(names) / columns)
  width = drawing.PAGE if columns > 1 else drawing.COLUMN
  lines = math.ceil(len(record.variants) / (6 if columns > 1 else 3))
  figure, grid = pyplot.subplots(
      rows, columns, figsize=(width, 1.9 * rows + 0.15 * lines + 0.1),
      layout='constrained', squeeze=False)
  handles: dict[str, Any] = {}
  for axes, name in zip(grid.flat, names):
    paint(axes, name)
    for handle, own in zip(*axes.get_legend_handles_labels()):
      handles.setdefault(own, handle)
  for axes in grid.flat[len(names):]:
    axes.set_visible(False)
  told = [label(name) for name in names]
  for i, (axes, own) in enumerate(zip(grid.flat, told)):
    if i % columns == 0 or own != told[i - 1]:
      axes.set_ylabel(own)
  if handles:
    figure.legend(list(handles.values()), list(handles),
                  loc='outside lower center',
                  ncols=math.ceil(len(handles) / lines),
                  handlelength=2.2, columnspacing=1.2)
  return figure


def noise(record: Record):
  """The smallest effect that is found, of each measure at each size."""
  rows = [row for row in record.results['noise'] if row['phase'] == 'confirm'
          and numbers.known(row['sd'])]
  if not rows:
    return None
  plan = record.plan
  by_name = {m.name: m for m in plan.measures
             if any(row['measure'] == m.name for row in rows)}
  names = list(by_name)
  told = '; '.join(f'{row["measure"]} at {row["size"]} {row["sd"]:.4f}'
                   for row in rows)
  return _figure(
      'noise', 'Noise',
      'Base against base: the standard deviation of a paired difference with '
      'its 95 % interval (dots), and the smallest effect that '
      f'{plan.seeds.confirm} seeds find with a power of '
      f'{numbers.percent(plan.power)} (crosses). '
      f'Wanted on {plan.primary.name} is an effect of '
      f'{units.amount(record.frozen, plan.effect)}: the dashed line, or an '
      'arrow where that lies far above all others.',
      'Noise of the base against itself. Standard deviation of a paired '
      f'difference: {told}.',
      lambda pyplot: _panels(
          record, names, pyplot,
          lambda axes, name: _spread(record, rows, axes, name),
          lambda name: 'noise of a difference' + units.said(
              record.frozen, by_name[name], ',\n')))


def _spread(record: Record, rows, axes, name: str) -> None:
  plan, label = record.plan, _labels(record)
  own = [row for row in rows if row['measure'] == name]
  for x, row in enumerate(own):
    if numbers.known(row['sd_low']) and numbers.known(row['sd_high']):
      axes.plot([x, x], [row['sd_low'], row['sd_high']], color=drawing.INK,
                linewidth=0.8)
    axes.plot(x, row['sd'], 'o', color=drawing.INK, markersize=3,
              clip_on=False, zorder=3)  # whole on the axis too
    if numbers.known(row['smallest_effect']):
      axes.plot(x + 0.18, row['smallest_effect'], 'x', color='#d55e00',
                markersize=4)
  most = max(x for row in own for x in (
      row['sd'], row['sd_high'], row['smallest_effect']) if numbers.known(x))
  far = most and plan.effect > 2 * most  # a line there would squash all others
  if name == plan.primary.name and far:
    axes.set_ylim(0, 1.25 * most)
    # No line of the grid runs through the words.
    axes.set_yticks([y for y in axes.get_yticks() if y < 1.1 * most])
    axes.text(0.98, 0.98, f'wanted: {plan.effect:g} ↑', ha='right', va='top',
              transform=axes.transAxes)
  elif name == plan.primary.name:
    axes.axhline(plan.effect, color=drawing.SOFT, linewidth=0.8,
                 linestyle=(0, (4, 3)))
  axes.set_xticks(range(len(own)), [
      'all' if row['size'] == findings.ALL else label[row['size']]
      for row in own])
  axes.set(title=label[name], xlim=(-0.5, len(own) - 0.3))
  axes.set_ylim(bottom=0)
  axes.grid(axis='y')


def probes(record: Record):
  """The measures that are not the primary one, by size."""
  plan = record.plan
  measures = [m for m in plan.measures[1:] if any(
      values_of(record, 'confirm', v, s, m)
      for v in record.variants for s in plan.sizes)]
  if not measures:
    return None
  by_name = {measure.name: measure for measure in measures}
  told = []
  for measure in measures:
    best = {v: np.mean(own) for v in record.variants
            if (own := values_of(record, 'confirm', v, plan.sizes[-1],
                              measure))}
    told.append(f'{measure.name}: ' + ', '.join(
        f'{name} {mean:.4f}' for name, mean in best.items()))
  return _figure(
      'measures', 'Probes and other measures',
      'Means over the seeds of the confirmation with their 95 % intervals; the '
      'dashed line is what guessing gives.',
      f'Secondary measures by size. Means at {plan.sizes[-1]}: '
      f'{"; ".join(told)}.',
      lambda pyplot: _panels(
          record, list(by_name), pyplot,
          lambda axes, name: _scores(record, by_name[name], axes),
          lambda name: 'score' + units.said(
              record.frozen, by_name[name], ', ')))


def _scores(record: Record, measure: plans.Measure, axes) -> None:
  plan, look, label = record.plan, looks(record), _labels(record)
  # Those of one size stand together, however many there are.
  apart = min(0.06, 0.7 / len(record.variants))
  for i, variant in enumerate(record.variants):
    values = [values_of(record, 'confirm', variant, size, measure)
              for size in plan.sizes]
    at = [x for x, own in enumerate(values) if own]
    if not at:
      continue
    spans = [statistics.interval(values[x]) for x in at]
    # A little apart, so that no interval hides another one.
    x = np.array(at) + apart * (i - len(record.variants) / 2)
    for one, span in zip(x, spans):
      if span.bar:
        axes.plot([one, one], span.bar, linewidth=0.8,
                  color=look[variant]['color'])
    axes.plot(x, [span.mean for span in spans], marker='o', markersize=2.5,
              label=label[variant], **look[variant])
  axes.axhline(measure.chance, color=drawing.SOFT, linewidth=0.8,
               linestyle=(0, (4, 3)), zorder=0)
  axes.set_xticks(range(len(plan.sizes)), [label[s] for s in plan.sizes])
  axes.set(title=label[measure.name])
  axes.grid(axis='y')
