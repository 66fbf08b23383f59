"""What a report says of single changes, learning rates, routers and longer
texts."""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from tools.compare.pages.tables import Cell, Table
from tools.compare import spec, statistics
from tools.compare.sweep_report import curves
from tools.compare.sweep_report.curves import Point, Sweep
from tools.compare.sweep_report.tables import WORDS, difference, plain
from training.evals.by_position import Text, loss_at

# Of the experts' panel: name in metrics.jsonl, heading. Over a window of steps
# where there is one: an expert is unused if no step of the window used it.
HEALTH = {
    'health/dropped': 'dropped', 'health/unserved': 'unserved',
    'health/window_load_max': 'load, max/mean',
    'health/window_load_entropy': 'load entropy',
    'health/window_unused': 'unused experts',
    'health/confidence': 'confidence',
    'health/router_entropy': 'router entropy'}


def effects_table(sweep: Sweep) -> Table:
  """Each change alone: the mean over all pairs of points that differ in it and
  in nothing else, what was matched aside; none where no change has 2 pairs."""
  rows = []
  for (key, _), pairs in _pairs(sweep).items():
    by_seed: dict[int, list[float]] = {}
    means = []
    for ours, theirs in pairs:
      seeds = ours.finals.keys() & theirs.finals.keys()
      found = {s: ours.finals[s] - theirs.finals[s] for s in seeds}
      means += [float(np.mean(list(found.values())))] if found else []
      for seed, x in found.items():
        by_seed.setdefault(seed, []).append(x)
    # Seeds that only some pairs have would weigh these pairs alone.
    whole = [float(np.mean(x)) for x in by_seed.values()
             if len(x) == len(means)]
    if len(means) < 2 or not whole:
      continue
    x = statistics.interval(whole)
    verdict = statistics.verdict(x)
    text = f'{key}={plain(pairs[0][0].changes[key])}'
    rows.append((
        Cell(text, text), difference(x), Cell(WORDS[verdict], verdict, verdict),
        Cell(f'{min(means):+.4f} to {max(means):+.4f}', min(means)),
        Cell(str(len(means)), len(means))))
  return Table((
      ('change', 'of the base\'s value, whatever the other fields are'),
      ('loss', 'mean difference over the pairs, and its 95 % interval over '
       'seeds; of two seeds, from one to the other'),
      ('verdict', 'inside the noise: the interval holds 0'),
      ('from pair to pair', 'the least and the greatest: far apart, the change '
       'does not work alone'),
      ('pairs', 'of points that differ in this alone')), rows)


def _pairs(sweep: Sweep) -> dict[tuple, list[tuple[Point, Point]]]:
  """Returns (with, without) each change, by key and value."""
  declared = {p.name: {k: v for k, v in p.changes.items()
                       if k not in p.matched} for p in sweep.points}
  found: dict[tuple, list[tuple[Point, Point]]] = {}
  for ours in sweep.points:
    for key, value in declared[ours.name].items():
      rest = {k: v for k, v in declared[ours.name].items() if k != key}
      found.setdefault((key, spec.hashable(value)), []).extend(
          (ours, theirs) for theirs in sweep.points
          if declared[theirs.name] == rest)
  return found


LR = 'optim.lr'


@dataclasses.dataclass(frozen=True)
class Rates:
  """Points that differ in the learning rate alone."""
  name: str
  points: dict[float, Point]

  @property
  def done(self) -> dict[float, float]:
    """Mean final loss by learning rate."""
    return {lr: float(np.mean(list(p.finals.values())))
            for lr, p in self.points.items() if p.finals}


def rates(sweep: Sweep) -> list[Rates]:
  """Returns the groups of points in which the learning rate varies."""
  groups: dict[str, dict[float, Point]] = {}
  for point in sweep.points:
    lr = _rate(point)
    if lr is not None:
      rest = {k: v for k, v in point.changes.items() if k != LR}
      name = ', '.join(f'{k}={plain(v)}' for k, v in rest.items()) or 'base'
      groups.setdefault(name, {})[lr] = point
  return [Rates(name, dict(sorted(points.items())))
          for name, points in groups.items() if len(points) > 1]


def _rate(point: Point) -> float | None:
  """The learning rate, of the sweep's description or of a run's config."""
  if LR in point.changes:
    return point.changes[LR]
  return next((run.config[LR] for run in point.runs.values() if run.config),
              None)


def rate_table(groups: Sequence[Rates]) -> Table:
  """The best learning rate of each group, and what another one costs."""
  rows, notes = [], []
  for group in groups:
    done = group.done
    failed = len(group.points) - len(done)
    if not done:
      rows.append((Cell(group.name, group.name), *(Cell('n/a'),) * 4,
                   Cell(str(failed), failed)))
      continue
    best = min(done, key=done.get)
    cost = float(np.mean(list(done.values()))) - done[best]
    edge = best in (min(group.points), max(group.points))
    rows.append((
        Cell(group.name, group.name),
        Cell(f'{best:g}' + (' (at the edge)' if edge else ''), best),
        Cell(f'{done[best]:.4f}', done[best]), _neighbour(group, best),
        Cell(f'{cost:.4f}', cost),
        Cell(str(failed), failed)))
    if edge:
      notes.append(f'{group.name}: the best learning rate is at the edge of '
                   'those tried; a better one may lie outside.')
  return Table((
      ('group', 'points that differ in the learning rate alone'),
      ('best', 'learning rate'), ('loss there', ''),
      ('next to it', 'the better one of its neighbours, less the best: mean '
       'over paired seeds and its 95 % interval; one that holds 0 cannot be '
       'told from the best'),
      ('sensitivity', 'mean loss over the learning rates, less the best '
       '(Wortsman et al. 2023); runs that failed are not in it'),
      ('failed', 'learning rates without a finished run')), rows, notes)


def _neighbour(group: Rates, best: float) -> Cell:
  """How far the better neighbour of the best learning rate is behind it."""
  done = list(group.done)
  i = done.index(best)
  beside = done[max(i - 1, 0):i] + done[i + 1:i + 2]
  if not beside:
    return Cell('n/a')
  lr = min(beside, key=group.done.get)
  x = statistics.paired(group.points[lr].finals, group.points[best].finals)
  cell = difference(x)
  verdict = statistics.verdict(x)
  return dataclasses.replace(
      cell, text=f'{lr:g}: {cell.text}',
      mark=verdict if verdict in ('noise', 'unknown') else '')


def health_table(sweep: Sweep) -> Table:
  """The experts at the last report of training: mean over layers, seeds."""
  rows = []
  for point in sweep.points:
    figures = [last for seed in point.finals
               if (last := _last_health(point.runs[seed]))]
    if not figures:
      continue
    cells = []
    for name in HEALTH:
      values = [_mean(f[name]) for f in figures if name in f]
      mean = float(np.mean(values)) if values else math.nan
      cells.append(Cell(f'{mean:.4f}', mean) if values else Cell('n/a'))
    rows.append((Cell(point.name, point.name), *cells))
  return Table((('variant', ''), *((h, n) for n, h in HEALTH.items())), rows)


def _mean(figure) -> float:
  return float(np.mean(np.asarray(figure, float)))  # null is not finite: NaN


def _last_health(run: curves.Run) -> dict:
  rows = [r for r in run.rows if r['split'] == 'train' and any(
      name in r for name in HEALTH)]
  return dict(rows[-1]) if rows else {}


def extrapolation(sweep: Sweep) -> dict[tuple[str, str], dict]:
  """Returns {(variant, encoding): {'length': L, 'curves': {multiple:
  [(losses by position, the Text they are of), one a seed]}}}; a refused length
  has none."""
  found: dict[tuple[str, str], dict] = {}
  for point in sweep.points:
    for run in point.runs.values():
      task = run.evaluations.get('extrapolation')
      for name, by in (task or {'curves': {}})['curves'].items():
        entry = found.setdefault((point.name, name), {
            'length': task['length'], 'curves': {}})
        for multiple, curve in by.items():
          taken = entry['curves'].setdefault(int(multiple), [])
          if curve is not None:
            taken.append(_with_text(np.asarray(curve, float),
                                  task.get('texts', {}).get(multiple)))
  return found


def _with_text(curve: np.ndarray, text: dict | None):
  """Returns the curve and its Text. An evaluation of before there were texts
  wrote a loss of 0 where there were no tokens."""
  if text is None:
    there = curve != 0
    return curve, Text(there.astype(int), there.astype(float))
  return curve, Text(*(np.asarray(text[name]) for name in Text._fields))


def extrapolation_table(found: dict) -> Table:
  """Mean loss at each multiple of the training length."""
  multiples = sorted({m for entry in found.values() for m in entry['curves']})
  rows = []
  for (point, name), entry in found.items():
    cells = []
    for multiple in multiples:
      taken = entry['curves'].get(multiple, [])
      if not taken:
        cells.append(Cell('refused'))
        continue
      x = statistics.interval([loss_at(*c, slice(None)) for c in taken])
      ends = (f' [{x.low:.3f}, {x.high:.3f}]' if x.known else
              f' ({x.least:.3f} to {x.most:.3f})' if x.seeds == 2 else '')
      cells.append(Cell(f'{x.mean:.3f}{ends}', x.mean))
    rows.append((Cell(point, point), Cell(name, name), *cells))
  return Table((
      ('variant', ''), ('encoding', 'as the evaluation used it'),
      *((f'{m} × length', 'nats per token over all tokens: mean over '
         'seeds, and its 95 % interval; of two seeds, from one to the other')
        for m in multiples)), rows)


def health_curve(point: Point, name: str) -> curves.Curve | None:
  """One figure of the panel in the course of training; `loss` holds it.

  The mean over layers and over the seeds that are done, at the steps that all
  of them report; None where none does.
  """
  steps, values = None, []
  for seed in point.finals:
    by_step = {r['step']: _mean(r[name])
               for r in point.runs[seed].rows
               if r['split'] == 'train' and name in r}
    steps = set(by_step) if steps is None else steps & set(by_step)
    values.append(by_step)
  if not steps:
    return None
  curve = point.mean_curve('train')
  at = np.isin(curve.step, sorted(steps))
  mean = [np.mean([v[step] for v in values]) for step in curve.step[at]]
  return curves.Curve(curve.step[at], curve.tokens[at], curve.flops[at],
                      curve.seconds[at], np.array(mean))
