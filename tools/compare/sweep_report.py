"""report: W/report.html, W/report.csv and W/curves.csv; prints the main table.

The page says what each variant's final loss is beside the base's and whether
the difference stands outside the noise over seeds; it draws the loss curves by
tokens, FLOPs and time, and where the sweep has them: sensitivity to the
learning rate, health of the routers, loss past the training length. What
failed or is not done is listed.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

from tools.compare import curves, figures, page, spec, statistics, tables
from tools.compare.curves import AXES, SPLITS, Point, Run, Sweep
from tools.compare.statistics import Interval
from tools.compare.tables import UNKNOWN, Cell, Table, label
from training import evals
from training.evals.tasks.extrapolation import Text, loss_at

FILES = ('report.html', 'report.csv', 'curves.csv')
LR = 'optim.lr'
# Of the experts' panel: name in metrics.jsonl, heading. Over a window of steps
# where there is one: an expert is unused if no step of the window used it.
HEALTH = {
    'health/dropped': 'dropped', 'health/unserved': 'unserved',
    'health/window_load_max': 'load, max/mean',
    'health/window_load_entropy': 'load entropy',
    'health/window_unused': 'unused experts',
    'health/confidence': 'confidence',
    'health/router_entropy': 'router entropy'}
MOST = 300  # points of a line; longer ones are thinned
BINS = 40  # of the positions of a long text
CURVES = (
    'Means over the seeds that are done. Seconds are of training steps on the '
    'machine that ran them, without compiling, evaluating and saving; where '
    "several runs trained as one program, each one's share.")
LONGER = ('At the longest text that each encoding takes; means over seeds and '
          'over bins of positions.')


def main(args) -> int:
  from training.workdir import storage
  for file in FILES:
    storage.try_file(pathlib.Path(args.workdir) / file, '--workdir')
  if args.plot:
    figures.check_format(args.plot)
    storage.output(args.plot, '--plot')
  sweep = curves.load_sweep(args.workdir)
  print(json.dumps(as_json(sweep), indent=2) if args.json else text(sweep))
  print(*write(sweep, args.workdir), sep='\n',
        file=sys.stderr if args.json else sys.stdout)
  if args.plot:
    figures.save(figures.sweep_picture(sweep, outcomes(sweep)), args.plot)
  return 0


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A point beside the base; None where it cannot be said.

  Attributes:
    fit_error: rms of the fitted curves, in nats.
    p: that paired seeds differ as much by chance (Student's t, two-sided).
    p_holm: corrected over the points that have one.
  """
  point: Point
  difference: Interval | None
  speed_up: Interval | None
  fit_error: float | None
  p: float | None = None
  p_holm: float | None = None

  @property
  def verdict(self) -> str:
    return statistics.verdict(self.difference)


def outcomes(sweep: Sweep) -> list[Outcome]:
  """Returns each point beside the base, the base first."""
  others = [point for point in sweep.points if point is not sweep.base]
  tests = statistics.beside_the_base([point.finals for point in others],
                                     sweep.base.finals)
  base = {seed: sweep.base.law(seed) for seed in sweep.base.finals}
  rows = [Outcome(sweep.base, None, None, None)]
  for point, test in zip(others, tests):
    pairs = [(point.law(seed), base[seed]) for seed in point.finals
             if seed in base]
    rows.append(Outcome(
        point, statistics.paired(point.finals, sweep.base.finals),
        *statistics.over_seeds(pairs), *test))
  return rows


def outcome_table(sweep: Sweep, rows: Sequence[Outcome]) -> Table:
  """Final losses, differences from the base, speed-ups and costs."""
  base, body = sweep.base, []
  for row in rows:
    point = row.point
    own = {'minus base': Cell('base', 0.0), 'verdict': Cell('base'),
           'corrected p': Cell('base'), 'speed-up': Cell('1', 1.0)} if (
               point is base) else {
        'minus base': tables.difference(row.difference),
        'verdict': Cell(tables.VERDICTS[row.verdict], row.verdict, row.verdict),
        'corrected p': tables.p_value(row.p_holm), 'speed-up': _speed_up(row)}
    body.append({
        'variant': label(point.name),
        'held-out loss': tables.mean(list(point.finals.values())), **own,
        'parameters': _cost(point.params, base.params),
        'FLOPs a token': _cost(point.flops_per_token, base.flops_per_token),
        'seeds': Cell(f'{_ended(point)}/{len(point.runs)}', _ended(point)),
        'changes': label(changes(point))})
  return Table('outcome', body, _notes(sweep, rows))


def _speed_up(row: Outcome) -> Cell:
  x = row.speed_up
  if x is None:
    return Cell(UNKNOWN)
  text = tables.estimate(x.mean, x.low, x.high, '.2f').text
  if abs(row.difference.mean) < row.fit_error:
    text = f'~{text}'
  if row.verdict in ('noise', 'unknown'):
    return Cell(f'({text})', x.mean, row.verdict)
  return Cell(text, x.mean)


def _cost(ours: float, base: float) -> Cell:
  x, units, more = ours, ['', 'k', 'M', 'G', 'T'], ours / base - 1
  while abs(x) >= 1000 and len(units) > 1:
    x /= 1000
    units.pop(0)
  share = '' if abs(more) < 5e-4 else f' ({more:+.1%})'
  return Cell(f'{x:.4g}{units[0]}{share}', ours)


def _ended(point: Point) -> int:
  """Returns how many runs have a final loss, or were to have none."""
  return sum(run.final is not None or run.is_whole
             for run in point.runs.values())


def _notes(sweep: Sweep, rows: Sequence[Outcome]) -> list[str]:
  from tools.compare import layout
  notes, compared = [], [r for r in rows if r.difference is not None]
  if not sweep.base.finals:
    notes.append(
        'No held-out losses were asked for (eval.every_steps=0): the tasks '
        'alone compare the points.' if _ended(sweep.base) else
        f'The base {sweep.base.name} has no finished run: nothing can be '
        'compared with it.')
  few = [r.point.name for r in compared if not r.difference.known]
  if few:
    notes.append(
        f'With fewer than {statistics.MIN_SEEDS} seeds no noise can be stated:'
        f' the difference of {", ".join(few)} may be nothing but the seed.')
  many = len(compared) - len(few)
  if many > 1:
    notes.append(
        f'{many} comparisons at 95 %: by chance alone about {many / 20:.2g} '
        'of them would stand outside the noise. ' + _after_holm(rows))
  if any(p.tokens != sweep.base.tokens for p in sweep.points):
    notes.append('Not all points see as many tokens as the base.')
  # Who fails at some seeds is compared at the others, which flatters it.
  survivors = [f'{r.point.name} {r.difference.seeds} of {asked}'
               for r in compared if r.difference.seeds < (
                   asked := len({*r.point.runs} | {*sweep.base.runs}))]
  if survivors:
    notes.append('Compared over the seeds that ended alone: '
                 f'{", ".join(survivors)}. What failed or is not done is in no '
                 'verdict.')
  notes += _unmatched(sweep)
  if len(sweep.codes) > 1:
    notes.append(layout.codes_note(sweep.codes))
  if held_out := layout.held_out_note(p.changes for p in sweep.points):
    notes.append(held_out)
  if sweep.changed_data:
    notes.append(layout.data_note(sweep.changed_data))
  if sweep.strangers:
    notes.append('Not of the config that sweep.json says, though in these '
                 f'figures: {"; ".join(sweep.strangers)}.')
  if any(r.speed_up for r in rows):
    notes.append(
        'Speed-ups read each run\'s own held-out curve, a saturating power '
        'law of compute fitted after warm-up. A run that was planned shorter '
        'would have lowered its learning rate sooner, so they compare curves '
        'under this schedule, not best runs at each budget.')
  return notes


def _after_holm(rows: Sequence[Outcome]) -> str:
  """Says which differences outside the noise remain, all taken together."""
  outside = [r for r in rows if r.verdict in ('better', 'worse')]
  left = [r.point.name for r in outside if r.p_holm <= 0.05]
  gone = [r.point.name for r in outside if r.p_holm > 0.05]
  if not outside:
    return 'None of them does.'
  remain = f'{", ".join(left)} differ{"s" * (len(left) == 1)}' if (
      left) else 'none differs'
  lost = f', and {", ".join(gone)} no longer' if gone else ''
  return f'Corrected for this (Holm), {remain}{lost}.'


def _unmatched(sweep: Sweep) -> list[str]:
  """The figures that nobody made equal, and who is off by them."""
  told = []
  for name, words in (('params', 'parameters'),
                      ('active_params', 'parameters at work for a token'),
                      ('flops_per_token', 'FLOPs a token')):
    far = [p.name for p in sweep.points
           if abs(getattr(p, name) / getattr(sweep.base, name) - 1) > 0.01]
    if far and name != sweep.match:
      told.append(f'{words} of {", ".join(far)}')
  what = f'Only {sweep.match} was' if sweep.match else 'Sizes were not'
  return [f'{what} matched. By more than 1 % from the base differ the '
          f'{"; the ".join(told)}.'] if told else []


def changes(point: Point) -> str:
  """What a point changes, as the flags would have it."""
  return ', '.join(_flag(*item) for item in point.changes.items())


def _flag(name: str, value: Any) -> str:
  return f'{name}={value if isinstance(value, str) else json.dumps(value)}'


def missing(sweep: Sweep) -> Table:
  """The runs that are not done or stand in no figure, and why."""
  rows = []
  for point in sweep.points:
    for seed, run in point.runs.items():
      if not run.is_whole:
        why = ('no finite held-out loss at the last step (eval.every_steps)'
               if run.state == 'done' else run.error.strip())
        rows.append({
            'variant': label(point.name), 'seed': Cell(str(seed), seed),
            'state': label(run.state),
            'figures': Cell('none' if run.final is None else 'trained',
                            run.final is not None), 'why': label(why)})
  return Table('missing', rows)


def figures_of_tasks(run: Run) -> dict[str, float]:
  """Returns the fractions that tasks found of a run, after its last step or
  once it was trained, as TASK/FIGURE; counts, groups of figures and curves are
  left out."""
  found = {}
  for row in run.rows:
    if (run.config and row['split'] == 'eval'
        and row['step'] == run.config['train.steps']):
      tasks = evals.listed(run.config['eval.tasks'])
      found |= {name: value for name, value in row.items()
                if type(value) is float
                and any(_is_own(task, name) for task in tasks)}
  for task, own in run.evaluations.items():
    if isinstance(own, Mapping):
      found |= {f'{task}/{name}': value for name, value in own.items()
                if type(value) is float}
  return found


def _is_own(task: str, name: str) -> bool:
  """Whether a name of metrics.jsonl is one of a task's own figures, and not of
  a group of them, whose names are joined there by a slash, too."""
  if name.rpartition('/')[0] == task:
    return True
  row = evals.TASKS.get(task.partition(':')[0])  # None: of another version
  beside = row and row.beside
  return beside is not None and name.startswith(f'{task}/') and (
      name[len(task) + 1:].partition('/')[0] not in beside)


class Measured(NamedTuple):
  """A figure of a point: by seed, and beside the base's."""
  values: dict[int, float]
  difference: Interval | None


def measured(sweep: Sweep) -> dict[str, dict[str, Measured]]:
  """Returns what tasks found, by figure and point."""
  by_point = {point.name: {seed: figures_of_tasks(run)
                           for seed, run in point.runs.items()}
              for point in sweep.points}
  names = dict.fromkeys(name for runs in by_point.values()
                        for own in runs.values() for name in own)
  found = {}
  for name in names:
    values = {point: {seed: own[name] for seed, own in runs.items()
                      if name in own} for point, runs in by_point.items()}
    found[name] = {point: Measured(own, statistics.paired(
        own, values[sweep.base.name])) for point, own in values.items()}
  return found


def measures_table(sweep: Sweep) -> Table:
  """Each figure and its difference from the base; no rows where there are no
  figures. Whether more is better, the figure's name says to who reads it."""
  found, why, rows = measured(sweep), {}, []
  for point in sweep.points if found else ():
    row = {'variant': label(point.name)}
    for name, by_point in found.items():
      own = by_point[point.name]
      row |= {name: tables.mean(list(own.values.values())),
              f'{name}, minus base': Cell('base', 0.0) if point is sweep.base
              else tables.difference(own.difference)}
      why |= {name: 'after the last step: mean over seeds, and their standard '
                    'deviation; of two seeds, from one to the other',
              f'{name}, minus base': 'mean over paired seeds, and its 95 % '
              'interval; of two pairs, from one to the other'}
    rows.append(row)
  return Table('measures', rows, why=why)


def _measures_by_line(wide: Table) -> Table:
  """The same for a terminal, which is narrow: a line for each figure of each
  point."""
  return Table('', [
      {'what the tasks found': Cell(name), 'variant': row['variant'],
       'mean': row[name], 'minus base': row[f'{name}, minus base']}
      for name in list(wide.columns)[1::2] for row in wide.rows])


def effects_table(sweep: Sweep) -> Table:
  """Each change alone: the mean over all pairs of points that differ in it and
  in nothing else, what was matched aside; none where no change has 2 pairs."""
  declared = {p.name: {k: v for k, v in p.changes.items()
                       if k not in p.matched} for p in sweep.points}
  found: dict[tuple, list[tuple[Point, Point]]] = {}  # with and without it
  for ours in sweep.points:
    for key, value in declared[ours.name].items():
      rest = {k: v for k, v in declared[ours.name].items() if k != key}
      found.setdefault((key, spec.hashable(value)), []).extend(
          (ours, theirs) for theirs in sweep.points
          if declared[theirs.name] == rest)
  rows = []
  for (key, _), pairs in found.items():
    by_seed: dict[int, list[float]] = {}
    means = []
    for ours, theirs in pairs:
      apart = {seed: ours.finals[seed] - theirs.finals[seed]
               for seed in ours.finals.keys() & theirs.finals.keys()}
      means += [float(np.mean(list(apart.values())))] if apart else []
      for seed, x in apart.items():
        by_seed.setdefault(seed, []).append(x)
    # Seeds that only some pairs have would weigh these pairs alone.
    whole = [float(np.mean(x)) for x in by_seed.values()
             if len(x) == len(means)]
    if len(means) < 2 or not whole:
      continue
    x = statistics.interval(whole)
    verdict = statistics.verdict(x)
    rows.append({
        'change': label(_flag(key, pairs[0][0].changes[key])),
        'loss': tables.difference(x),
        'verdict': Cell(tables.VERDICTS[verdict], verdict, verdict),
        'from pair to pair': Cell(f'{min(means):+.4f} to {max(means):+.4f}',
                                  min(means)),
        'pairs': tables.count(len(means))})
  return Table('effects', rows)


class Rates(NamedTuple):
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
    rest = ', '.join(_flag(k, v) for k, v in point.changes.items() if k != LR)
    lr = point.changes.get(LR, sweep.base_config[LR])
    groups.setdefault(rest or 'base', {})[lr] = point
  return [Rates(name, dict(sorted(points.items())))
          for name, points in groups.items() if len(points) > 1]


def rate_table(groups: Sequence[Rates]) -> Table:
  """The best learning rate of each group, and what another one costs."""
  rows, notes = [], []
  for group in groups:
    done = group.done
    best = min(done, key=done.get, default=None)
    row = dict.fromkeys(('best', 'loss there', 'next to it', 'sensitivity'),
                        Cell(UNKNOWN))
    if done:
      is_edge = best in (min(group.points), max(group.points))
      row = {
          'best': Cell(f'{best:g}' + ' (at the edge)' * is_edge, best),
          'loss there': tables.number(done[best]),
          'next to it': _neighbour(group, best),
          'sensitivity': tables.number(
              float(np.mean(list(done.values()))) - done[best])}
      notes += [f'{group.name}: the best learning rate is at the edge of those '
                'tried; a better one may lie outside.'] * is_edge
    rows.append({'group': label(group.name), **row,
                 'failed': tables.count(len(group.points) - len(done))})
  return Table('rates-table', rows, notes)


def _neighbour(group: Rates, best: float) -> Cell:
  """How far the better neighbour of the best learning rate is behind it."""
  done = list(group.done)
  i = done.index(best)
  beside = done[max(i - 1, 0):i] + done[i + 1:i + 2]
  if not beside:
    return Cell(UNKNOWN)
  lr = min(beside, key=group.done.get)
  x = statistics.paired(group.points[lr].finals, group.points[best].finals)
  cell, verdict = tables.difference(x), statistics.verdict(x)
  return Cell(f'{lr:g}: {cell.text}', cell.value,
              verdict if verdict in ('noise', 'unknown') else '')


def health_table(sweep: Sweep) -> Table:
  """The last figures of the experts' panel; means over layers and seeds."""
  rows = []
  for point in sweep.points:
    last = [own for seed in point.finals if (own := next(
        (row for row in reversed(point.runs[seed].rows)
         if row['split'] == 'train' and not row.keys().isdisjoint(HEALTH)),
        None))]
    if last:
      rows.append({'variant': label(point.name)} | {
          heading: tables.number(float(np.mean(
              [_mean(row[name]) for row in last if name in row] or [math.nan])))
          for name, heading in HEALTH.items()})
  return Table('health-table', rows, why={h: n for n, h in HEALTH.items()})


def _mean(figure) -> float:
  return float(np.mean(np.asarray(figure, float)))  # null is not finite: NaN


def _health_curve(point: Point, name: str) -> curves.Curve | None:
  """One figure of the panel in the course of training; `loss` holds it.

  The mean over layers and over the seeds that are done, at the steps that all
  of them report; None where none does.
  """
  by_seed = [{r['step']: _mean(r[name]) for r in point.runs[seed].rows
              if r['split'] == 'train' and name in r} for seed in point.finals]
  if not by_seed or not (steps := set.intersection(*map(set, by_seed))):
    return None
  curve = point.mean_curve('train')
  at = np.isin(curve.step, sorted(steps))
  mean = [np.mean([own[step] for own in by_seed]) for step in curve.step[at]]
  return curves.Curve(curve.step[at], curve.tokens[at], curve.flops[at],
                      curve.seconds[at], np.array(mean))


class Encoding(NamedTuple):
  """Losses past the training length, as one encoding of positions has them.

  Attributes:
    length: of training.
    curves: by multiple of the length: of each seed the losses by position, and
      the Text they are of; a refused length has none.
  """
  length: int
  curves: dict[int, list[tuple[np.ndarray, Text]]]


def extrapolation(sweep: Sweep) -> dict[tuple[str, str], Encoding]:
  """Returns what the task of that name found, by variant and encoding."""
  found: dict[tuple[str, str], Encoding] = {}
  for point in sweep.points:
    for run in point.runs.values():
      task = run.evaluations.get('extrapolation') or {'curves': {}}
      for name, by in task['curves'].items():
        own = found.setdefault((point.name, name), Encoding(task['length'], {}))
        for multiple, curve in by.items():
          taken = own.curves.setdefault(int(multiple), [])
          if curve is not None:
            text = task['texts'][multiple]
            taken.append((np.asarray(curve, float), Text(*(
                np.asarray(text[name]) for name in Text._fields))))
  return found


def extrapolation_table(found: Mapping[tuple[str, str], Encoding]) -> Table:
  """Mean loss at each multiple of the training length."""
  multiples = sorted({m for own in found.values() for m in own.curves})
  rows = [{'variant': label(point), 'encoding': label(name)} | {
      f'{m} × length': tables.difference(statistics.interval(
          [loss_at(*c, slice(None)) for c in own.curves[m]]), '.3f')
      if own.curves.get(m) else Cell('refused') for m in multiples}
          for (point, name), own in found.items()]
  return Table('extrapolation-table', rows, why=dict.fromkeys(
      (f'{m} × length' for m in multiples), 'nats per token over all tokens: '
      'mean over seeds, and its 95 % interval; of two seeds, from one to the '
      'other'))


# What report.js draws: {id, title, x, y, log, series}. `x` and `y` name the
# axes and the measures that a reader can choose from, and a series holds, for
# each measure, its points by axis: {'eval': {'tokens': [...], 'y': [...]}}.
# `look` is the class of report.css that gives it its colour and dashes.


def _series(sweep: Sweep, point: Point, mean: Mapping[str, Any],
            **more: Any) -> dict:
  return {'name': point.name, 'base': point is sweep.base,
          'look': figures.css_look(sweep, point.name), 'mean': mean, **more}


def curves_plot(sweep: Sweep) -> dict:
  """Loss curves: the mean over seeds, and each seed."""
  return {'id': 'curves', 'title': 'loss curves', 'curves': True, 'log': False,
          'x': AXES, 'y': SPLITS, 'series': [
              _series(sweep, point,
                      {s: _line(point.mean_curve(s)) for s in SPLITS},
                      seeds={seed: {s: _line(point.curve(seed, s))
                                    for s in SPLITS} for seed in point.finals})
              for point in sweep.points if point.finals]}


def rates_plot(sweep: Sweep, groups: Sequence[Rates]) -> dict:
  """Final loss by learning rate, with its interval over seeds; a group looks as
  the first of its points."""
  series, order = [], [point.name for point in sweep.points]
  for group in groups:
    found = {lr: statistics.interval(list(point.finals.values()))
             for lr, point in group.points.items() if point.finals}
    bars = [x.bar or (None, None) for x in found.values()]
    first = min(group.points.values(), key=lambda p: (
        p is not sweep.base, order.index(p.name)))
    if found:
      series.append(_series(sweep, first, {'loss': _numbers({
          'lr': found, 'y': [x.mean for x in found.values()],
          'low': [low for low, _ in bars],
          'high': [high for _, high in bars]})}) | {
              'name': group.name, 'base': False})
  return {'id': 'rates', 'title': 'loss by learning rate', 'log': True,
          'x': {'lr': 'learning rate'}, 'y': {'loss': 'final held-out loss'},
          'series': series}


def health_plot(sweep: Sweep) -> dict:
  """The experts' panel in the course of training: mean over layers, seeds."""
  found = [(point, {name: _line(curve) for name in HEALTH
                    if (curve := _health_curve(point, name)) is not None})
           for point in sweep.points]
  return {'id': 'health', 'title': 'health of the routers', 'curves': True,
          'log': False, 'x': AXES, 'y': HEALTH,
          'series': [_series(sweep, *own) for own in found if own[1]]}


def extrapolation_plot(sweep: Sweep, found: Mapping[tuple[str, str], Encoding]
                       ) -> dict:
  """Loss by position at the longest text that each encoding takes; those of one
  variant have its colour, in dashes of their own."""
  series, drawn = [], {}
  points = {point.name: point for point in sweep.points}
  for (point, name), own in found.items():
    taken = {m: c for m, c in own.curves.items() if c}
    if not taken:
      continue
    seeds = taken[max(taken)]
    edges = np.unique(np.geomspace(1, len(seeds[0][0]), BINS).astype(int))
    line = {'position': np.sqrt(edges[:-1] * edges[1:]),
            'y': [np.mean([loss_at(*seed, slice(a, b)) for seed in seeds])
                  for a, b in zip(edges, edges[1:])]}
    drawn[point] = turn = drawn.get(point, -1) + 1
    series.append(_series(sweep, points[point], {'loss': _numbers(line)}) | {
        'name': point if name == point else f'{point}: {name}', 'base': False,
        'look': figures.css_look(sweep, point, turn)})
  length = max((own.length for own in found.values()), default=0)
  return {'id': 'extrapolation', 'title': 'loss by position', 'log': True,
          'x': {'position': 'position in tokens'},
          'y': {'loss': 'held-out loss'},
          'rule': {'x': length, 'label': 'training length'}, 'series': series}


def _line(curve: curves.Curve) -> dict:
  """A curve with at most MOST points, its last one kept."""
  n = len(curve.step)
  keep = np.unique(np.linspace(0, n - 1, min(n, MOST)).round().astype(int))
  return _numbers({name: getattr(curve, name)[keep] for name in AXES}
                  | {'y': curve.loss[keep]})


def _numbers(line: Mapping[str, Any]) -> dict:
  """Plain numbers of six digits; what is unknown or not finite is None."""
  return {name: [float(f'{x:.6g}') if tables.known(x) else None
                 for x in values] for name, values in line.items()}


def bars(numbers: Sequence[int], paired: bool = False) -> str:
  """Says what the bars of a figure are, by its means' numbers of seeds."""
  what = 'paired seeds' if paired else 'seeds'
  if any(n >= statistics.MIN_SEEDS for n in numbers):
    return (f'Bars: 95 % intervals over {what}'
            + ', grey ones hold 0' * paired
            + '; of two seeds, from one to the other' * (2 in numbers) + '.')
  return ('Bars: from one seed to the other, since two give no interval.'
          if 2 in numbers else 'One seed: no bars.')


def document(sweep: Sweep) -> page.Document:
  """Returns the page, with the sections that there is something for."""
  rows = outcomes(sweep)
  groups, found = rates(sweep), extrapolation(sweep)
  forest = [row for row in rows if row.difference]
  bars_of_forest = bars([row.difference.seeds for row in forest], paired=True)
  bars_of_rates = bars([len(p.finals) for g in groups
                        for p in g.points.values()])
  done = any(point.finals for point in sweep.points)
  return page.Document('sweep', sweep.name, *_about(sweep), page.filled([
      page.Section('beside', 'Beside the base', figures=[
          figures.sweep_forest(sweep, forest, bars_of_forest)
      ] if forest else [], tables=[outcome_table(sweep, rows)]),
      page.Section('tasks', 'What the tasks found',
                   tables=[measures_table(sweep)]),
      page.Section('changes', 'Each change, whatever the others',
                   tables=[effects_table(sweep)]),
      page.Section('losses', 'Loss curves', [] if done else [
          'No run is done.'], plots=[page.Plot(curves_plot(sweep), CURVES)]),
      page.Section('sensitivity', 'Sensitivity to the learning rate',
                   tables=[rate_table(groups)], plots=[
                       page.Plot(rates_plot(sweep, groups), bars_of_rates)]),
      page.Section('routers', 'Health of the routers',
                   tables=[health_table(sweep)], plots=[page.Plot(
                       health_plot(sweep), 'Means over layers and seeds.')]),
      page.Section('longer', 'Past the training length',
                   tables=[extrapolation_table(found)], plots=[page.Plot(
                       extrapolation_plot(sweep, found), LONGER)]),
      page.Section('lost', 'Failed or not done', tables=[missing(sweep)])]))


def _about(sweep: Sweep) -> tuple[str, str, list[str]]:
  """What the sweep is, no answer, and what to know before the figures."""
  done = sum(run.state == 'done' for p in sweep.points
             for run in p.runs.values())
  asked = sum(len(p.runs) for p in sweep.points)
  matched = (f'{sweep.match} matched to the base\'s within 1 %' if sweep.match
             else 'sizes are not matched')
  paired = ('seed by seed, every point sees the same data in the same order'
            if sweep.paired else 'points differ in their data, so that seeds '
            'pair less than they do elsewhere')
  warning = (f'{asked - done} of {asked} runs failed or are not done: they are '
             'listed at the end of this page.')
  return (f'{sweep.file}: {len(sweep.points)} points, {done} of {asked} runs '
          f'done; base {sweep.base.name}; {matched}; {paired}.', '',
          [warning] * (done < asked))


def write(sweep: Sweep, workdir) -> list[pathlib.Path]:
  """Writes report.html, report.csv (the outcome) and curves.csv (every loss);
  returns their paths."""
  html, outcome, losses = (pathlib.Path(workdir) / name for name in FILES)
  html.write_text(page.html(document(sweep)))
  for path, records in ((outcome, _records(sweep)), (losses, _losses(sweep))):
    path.write_text(tables.sheet(records[0], records))
  return [html, outcome, losses]


def _losses(sweep: Sweep) -> list[dict]:
  """A line for each loss of each run, also of what is not done; empty where a
  figure is not known. One empty line where no run has begun."""
  records = []
  for point in sweep.points:
    for seed in point.runs:
      for split in SPLITS:
        curve = point.curve(seed, split)
        records += [
            {'variant': point.name, 'seed': seed, 'split': split,
             'step': int(step)} | {
                 name: x if np.isfinite(x := getattr(curve, name)[i]) else None
                 for name in (*AXES, 'loss')}
            for i, step in enumerate(curve.step)]
  return records or [dict.fromkeys(
      ('variant', 'seed', 'split', 'step', *AXES, 'loss'))]


def text(sweep: Sweep) -> str:
  """Returns the outcome for a terminal, with its notes and what is missing."""
  table, lost = outcome_table(sweep, outcomes(sweep)), missing(sweep)
  lines = [table.text(), *(f'- {note}' for note in table.notes)]
  for more in (_measures_by_line(measures_table(sweep)), effects_table(sweep)):
    if more.rows:
      lines += ['', more.text()]
  if lost.rows:
    lines += ['', f'failed or not done: {len(lost.rows)} runs', lost.text()]
  return '\n'.join(lines)


def as_json(sweep: Sweep) -> dict:
  """Returns what `text` says, as JSON takes it."""
  return {'sweep': sweep.name, 'file': sweep.file, 'match': sweep.match,
          'base': sweep.base.name, 'points': _records(sweep),
          'notes': outcome_table(sweep, outcomes(sweep)).notes,
          'effects': effects_table(sweep).plain(),
          'missing': missing(sweep).plain()}


def _records(sweep: Sweep) -> list[dict]:
  """A line of the sheet for each point: figures in full, None where not
  known."""
  seeds = sorted({seed for p in sweep.points for seed in p.runs})
  found, records = measured(sweep), []
  for row in outcomes(sweep):
    point, finals = row.point, list(row.point.finals.values())
    mean, low, high = _ends(row.difference)
    fast, least, most = _ends(row.speed_up)
    record = {
        'variant': point.name, 'changes': changes(point),
        'loss': float(np.mean(finals)) if finals else None,
        'difference': mean, 'low': low, 'high': high,
        'pairs': row.difference and row.difference.seeds,
        'p': row.p, 'p_holm': row.p_holm,
        'verdict': ('base' if point is sweep.base
                    else tables.VERDICTS[row.verdict]),
        'speed_up': fast, 'speed_up_low': least, 'speed_up_high': most,
        'fit_error': row.fit_error,
        'params': point.params, 'active_params': point.active_params,
        'flops_per_token': point.flops_per_token, 'tokens': point.tokens,
        'seeds_done': len(finals), 'seeds_asked': len(point.runs),
    } | {f'loss_seed_{seed}': point.finals.get(seed) for seed in seeds}
    for name, by_point in found.items():
      own = by_point[point.name]
      values = list(own.values.values())
      record[name] = float(np.mean(values)) if values else None
      record |= zip((f'{name}_difference', f'{name}_low', f'{name}_high'),
                    _ends(own.difference))
    records.append(record)
  return records


def _ends(x: Interval | None) -> tuple[float | None, ...]:
  return (x.mean, x.low, x.high) if x else (None, None, None)
