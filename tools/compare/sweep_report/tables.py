"""What a sweep's report says, as tables."""

from collections.abc import Sequence
import dataclasses
import json

import numpy as np

from tools.compare.pages.tables import Cell, Table
from tools.compare import layout, statistics
from tools.compare.sweep_report.curves import Point, Sweep
from tools.compare.statistics import Interval

WORDS = {  # of a verdict
    'better': 'better', 'worse': 'worse', 'noise': 'inside the noise',
    'unknown': 'noise unknown', 'n/a': 'n/a'}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A point beside the base; None where it cannot be said.

  Attributes:
    p: that paired seeds differ as much by chance (Student's t, two-sided).
    p_holm: corrected over the points that have one.
  """
  point: Point
  difference: Interval | None
  speed_up: Interval | None
  fit_error: float | None  # rms of the fitted curves, in nats
  p: float | None = None
  p_holm: float | None = None

  @property
  def verdict(self) -> str:
    return statistics.verdict(self.difference)


def outcomes(sweep: Sweep) -> list[Outcome]:
  """Returns each point beside the base, the base first."""
  laws = {}  # of each run that is done
  for point in sweep.points:
    laws[point.name] = {seed: point.law(seed) for seed in point.finals}
  result = [Outcome(sweep.base, None, None, None)]
  others = [point for point in sweep.points if point is not sweep.base]
  tests = statistics.beside_the_base([point.finals for point in others],
                                     sweep.base.finals)
  for point, test in zip(others, tests):
    ours, theirs = laws[point.name], laws[sweep.base.name]
    pairs = [(ours[s], theirs[s]) for s in ours if s in theirs]
    ratios = [statistics.speed_up(*pair) for pair in pairs]
    known = bool(ratios) and None not in ratios
    result.append(Outcome(
        point, statistics.paired(point.finals, sweep.base.finals),
        statistics.over_seeds(ratios) if known else None,
        max(law.rms for pair in pairs for law in pair) if known else None,
        *test))
  return result


def outcome_table(sweep: Sweep, rows: Sequence[Outcome]) -> Table:
  """Final losses, differences from the base, speed-ups and costs."""
  columns = (
      ('variant', 'name of the point'),
      ('held-out loss', 'nats per token after the last step: mean over seeds, '
       'and their standard deviation; of two seeds, from one to the other'),
      ('minus base', 'mean over paired seeds, and its 95 % interval '
       '(Student\'s t); of two pairs, from one to the other'),
      ('verdict', 'inside the noise: the interval holds 0'),
      ('corrected p', 'of the difference, over paired seeds (Student\'s t), by '
       'Holm over all points: of calling all below 0.05 different, the '
       'probability of any false claim is at most 5 %'),
      ('speed-up', 'compute that the base needs over compute that this needs, '
       'to the same loss; ~ where the curves\' fit errs by more than the '
       'difference; in brackets where the losses differ by noise, or the noise '
       'is not known'),
      ('parameters', ''), ('FLOPs a token', 'of training'),
      ('seeds', 'done of those asked for'), ('changes', 'from the base'))
  body = []
  for row in rows:
    point, base = row.point, sweep.base
    is_base = point is base
    body.append((
        Cell(point.name, point.name), _loss(point),
        Cell('base', 0.0) if is_base else difference(row.difference),
        Cell('base') if is_base else Cell(
            WORDS[row.verdict], row.verdict, row.verdict),
        Cell('base') if is_base else Cell(
            statistics.p_text(row.p_holm), row.p_holm),
        Cell('1', 1.0) if is_base else _speed_up(row),
        _cost(point.params, base.params, is_base),
        _cost(point.flops_per_token, base.flops_per_token, is_base),
        Cell(f'{(ended := _ended(point))}/{len(point.runs)}', ended),
        Cell(changes(point), changes(point))))
  return Table(columns, body, _notes(sweep, rows))


def _notes(sweep: Sweep, rows: Sequence[Outcome]) -> list[str]:
  notes, compared = [], [r for r in rows if r.difference is not None]
  if not sweep.base.finals and _ended(sweep.base):
    notes.append('No held-out losses were asked for (eval.every_steps=0): the '
                 'tasks alone compare the points.')
  elif not sweep.base.finals:
    notes.append(f'The base {sweep.base.name} has no finished run: nothing '
                 'can be compared with it.')
  few = [r for r in compared if not r.difference.known]
  if few:
    notes.append(
        f'With fewer than {statistics.MIN_SEEDS} seeds no noise can be stated:'
        f' the difference of {", ".join(r.point.name for r in few)} may be '
        'nothing but the seed.')
  known = len(compared) - len(few)
  if known > 1:
    notes.append(
        f'{known} comparisons at 95 %: by chance alone about {known / 20:.2g} '
        'of them would stand outside the noise. ' + _after_holm(rows))
  if any(p.tokens != sweep.base.tokens for p in sweep.points):
    notes.append('Not all points see as many tokens as the base.')
  notes += _survivors(sweep, compared) + _unmatched(sweep)
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


def _ended(point: Point) -> int:
  """Returns how many runs have a final loss, or were to have none."""
  return sum(run.final is not None or run.is_whole
             for run in point.runs.values())


def _after_holm(rows: Sequence[Outcome]) -> str:
  """Says which differences outside the noise remain, all taken together."""
  outside = [r for r in rows if r.verdict in ('better', 'worse')]
  left = [r.point.name for r in outside if r.p_holm <= 0.05]
  gone = [r.point.name for r in outside if r.p_holm > 0.05]
  if not outside:
    return 'None of them does.'
  return ('Corrected for this (Holm), '
          + (f'{", ".join(left)} {"differs" if len(left) == 1 else "differ"}'
             if left else 'none differs')
          + (f', and {", ".join(gone)} no longer.' if gone else '.'))


def _survivors(sweep: Sweep, compared: Sequence[Outcome]) -> list[str]:
  """Who fails at some seeds is compared at the others, which flatters it."""
  few = [f'{r.point.name} {r.difference.seeds} of {asked}' for r in compared
         if r.difference.seeds < (asked := len({*r.point.runs}
                                               | {*sweep.base.runs}))]
  return [f'Compared over the seeds that ended alone: {", ".join(few)}. What '
          'failed or is not done is in no verdict.'] if few else []


def _unmatched(sweep: Sweep) -> list[str]:
  """The figures that nobody made equal, and who is off by them."""
  told = []
  for name, words in (('params', 'parameters'),
                      ('active_params', 'parameters at work for a token'),
                      ('flops_per_token', 'FLOPs a token')):
    base = getattr(sweep.base, name)
    far = [p.name for p in sweep.points
           if abs(getattr(p, name) / base - 1) > 0.01]
    if far and name != sweep.match:
      told.append(f'in {words} differ {", ".join(far)}')
  what = f'Only {sweep.match} was' if sweep.match else 'Sizes were not'
  return [f'{what} matched: by more than 1 %, {"; ".join(told)}.'
          ] if told else []


def changes(point: Point) -> str:
  """What a point changes, as the flags would have it."""
  return ', '.join(f'{name}={plain(value)}'
                   for name, value in point.changes.items())


def mean_loss(point: Point) -> float | None:
  return float(np.mean(list(point.finals.values()))) if point.finals else None


def plain(value) -> str:
  return value if isinstance(value, str) else json.dumps(value)


def _loss(point: Point) -> Cell:
  return mean_cell(list(point.finals.values()))


def mean_cell(values: Sequence[float]) -> Cell:
  """A mean over seeds, with what is known of their spread."""
  if not values:
    return Cell('n/a')
  mean = float(np.mean(values))
  if len(values) == 1:
    return Cell(f'{mean:.4f}', mean)
  if len(values) == 2:
    return Cell(f'{mean:.4f} ({min(values):.4f} to {max(values):.4f})', mean)
  return Cell(f'{mean:.4f} ± {np.std(values, ddof=1):.4f}', mean)


def difference(x: Interval | None) -> Cell:
  if x is None:
    return Cell('n/a')
  if x.known:
    return Cell(f'{x.mean:+.4f} [{x.low:+.4f}, {x.high:+.4f}]', x.mean)
  both = f' ({x.least:+.4f} to {x.most:+.4f})' * (x.seeds == 2)
  return Cell(f'{x.mean:+.4f}{both}', x.mean)


def _speed_up(row: Outcome) -> Cell:
  x = row.speed_up
  if x is None:
    return Cell('n/a')
  unsure = '~' if abs(row.difference.mean) < row.fit_error else ''
  text = f'{unsure}{x.mean:.2f}'
  if x.known:
    text += f' [{x.low:.2f}, {x.high:.2f}]'
  if row.verdict in ('noise', 'unknown'):
    return Cell(f'({text})', x.mean, row.verdict)
  return Cell(text, x.mean)


def _cost(ours: float, base: float, is_base: bool) -> Cell:
  more = ours / base - 1
  share = '' if is_base or abs(more) < 5e-4 else f' ({more:+.1%})'
  return Cell(f'{_short(ours)}{share}', ours)


def _short(x: float) -> str:
  units = ['', 'k', 'M', 'G', 'T']
  while abs(x) >= 1000 and len(units) > 1:
    x /= 1000
    units.pop(0)
  return f'{x:.4g}{units[0]}'


def missing(sweep: Sweep) -> Table:
  """The runs that are not done or stand in no figure, and why."""
  rows = []
  for point in sweep.points:
    for seed, run in point.runs.items():
      if run.is_whole:
        continue
      why = run.error.strip()
      if run.state == 'done':
        why = 'no finite held-out loss at the last step (eval.every_steps)'
      rows.append((
          Cell(point.name, point.name), Cell(str(seed), seed),
          Cell(run.state, run.state),
          Cell('trained' if run.final is not None else 'none',
               run.final is not None), Cell(why, why)))
  return Table((('variant', ''), ('seed', ''), ('state', 'in the ledger'),
                ('figures', 'trained: its losses are in the figures above'),
                ('why', '')), rows)
