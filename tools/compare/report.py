"""report: writes W/report/ anew: a page, CSV and figures of a sweep or a study;
prints the main table.

A sweep is a study of one size that has no phase but the confirmation: both are
one table of runs, one of estimates, and one page. What a study has beside it
(noise, screening, what was planned) has sections of its own.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import math
import pathlib
import sys
from typing import Any

import numpy as np

from common.errors import require
from common.fields import check_number
from tools.compare import curves, decide, efficiency, figures, layout, page
from tools.compare import statistics
from tools.compare import measures as measures_lib
from tools.compare import phases as phases_lib
from tools.compare import plan as plans
from tools.compare import results as results_lib
from tools.compare.page import UNKNOWN, Cell, Section, Table, label
from training import evals
from training.workdir import metrics, run_config, storage

LR = 'optim.lr'
BASE, OPEN = 'base', 'not done yet'
NOT_COOLED = ('Compute multipliers need runs whose learning rate has fallen to '
              'the end of its schedule by the last step: those of some had not.'
              )
MOST = 300  # points of a line; longer ones are thinned
TARGET_LEVEL = 0.01  # as in the rules of modded-nanogpt's third track
# Fields that say where and how a run is done, not what it computes.
ASIDE = ('log.', 'checkpoint.', 'mesh.', 'profile.')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  layout.add_workdir(parser)
  parser.add_argument('--json', action='store_true', help='print JSON')
  parser.add_argument('--rows', default='', metavar='FILE.csv', help='of a '
                      'sweep: losses of variants that were trained elsewhere, '
                      'in columns variant, seed, loss and, maybe, step')
  parser.add_argument('--target', type=float, help='a held-out loss: what each '
                      'variant spends to reach it (default: TARGET of a study)')


def main(args) -> int:
  c = load(layout.workdir_of(args), args.rows)
  if args.target is not None:
    check_number('--target', args.target, (('>', 0), ('<', 1e30)))
    c = dataclasses.replace(c, target=args.target)
  print(json.dumps(as_json(c), indent=2) if args.json else text(c))
  print(*write(c), sep='\n', file=sys.stderr if args.json else sys.stdout)
  return 0


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What a sweep or a study planned and found.

  Attributes:
    workdir: W.
    frozen: study.json; of a sweep, the same in its place.
    results: results.json; likewise.
    outcomes: of it: the runs that have a figure, and those that diverged.
    curves: by (variant, size, seed), of each the figures that it has
      (curves.FIGURES).
    excluded: what failed, diverged or is not done: rows of {'phase',
      'variant', 'size', 'workload', 'seed', 'state', 'why'}.
    about: what it is, in paragraphs.
    warnings: what a reader must know before the figures.
    target: the held-out loss that is to be reached; None: none is.
  """
  workdir: str
  frozen: plans.Frozen
  results: Mapping[str, Any]
  outcomes: Sequence[plans.Outcome]
  curves: Mapping[tuple[str, str, int], Mapping[str, Mapping]]
  excluded: Sequence[Mapping[str, Any]]
  about: Sequence[str]
  warnings: Sequence[str]
  target: float | None = None

  @property
  def plan(self) -> plans.Plan:
    return self.frozen.plan

  @property
  def is_study(self) -> bool:
    return len(self.plan.sizes) > 1

  @property
  def variants(self) -> tuple[str, ...]:
    """The base first."""
    return (self.plan.base, *self.plan.variants)

  @property
  def comparing(self) -> list[phases_lib.Phase]:
    """The phases that compare variants with the base."""
    return [phase for phase in phases_lib.of(self.plan.seeds)
            if not isinstance(phase, phases_lib.Noise | phases_lib.Tune)]

  def values(self, phase: str, variant: str, size: str,
             measure: plans.Measure) -> dict[int, float]:
    """A measure of each run of a phase that has it, by seed."""
    wanted = phase, variant, size, measure.workload
    return {x.seed: x.values[measure.name] for x in self.outcomes
            if (x.phase, x.variant, x.size, x.workload) == wanted
            and page.known(x.values.get(measure.name))}

  def effect(self, phase: str, variant: str, measure: str, size: str = ''
             ) -> Mapping[str, Any]:
    """What a phase says of a measure, by default over all sizes; {} of what it
    has not compared."""
    row = next((row for row in self.results.get(phase, ())
                if (row['variant'], row['measure']) == (variant, measure)), {})
    if not row or size in ('', decide.ALL) or len(row['sizes']) == 1:
      return row
    return next(part for part in row['sizes'] if part['size'] == size)

  def standing(self, variant: str) -> str:
    """How far a variant came, in the words of the verdict's column."""
    if variant == self.plan.base:
      return BASE
    names = [phase.name for phase in self.comparing]
    for name in reversed(names[:names.index('confirm') + 1]):
      if row := self.effect(name, variant, self.plan.primary.name):
        return OPEN if row['verdict'] == decide.PASSED else row['verdict']
    return OPEN

  @functools.cached_property
  def estimates(self) -> list[dict[str, Any]]:
    """A row for each measure of each variant in each phase, at each size and
    over all of them: its mean, and its difference from the base. Those of the
    confirmation come first, and of each phase those that its verdict is on."""
    rows = []
    for phase in sorted(self.comparing, key=lambda x: x.name != 'confirm'):
      plan = phase.narrow(self.plan)
      sizes = [decide.ALL] * (len(plan.sizes) > 1) + [*reversed(plan.sizes)]
      if phase.name in ('confirm', *self.results):
        rows += [self._estimate(phase.name, measure, size, variant, (
            measure, size) == (plan.primary, sizes[0]))
                 for measure in plan.measures for size in sizes
                 for variant in self.variants]
    return rows

  def _estimate(self, phase: str, measure: plans.Measure, size: str,
                variant: str, is_verdict: bool) -> dict[str, Any]:
    values = [*self.values(phase, variant, size, measure).values()]
    compared = self.effect(phase, variant, measure.name, size)
    row = {
        'phase': phase, 'measure': measure.name, 'variant': variant,
        'size': size, 'mean': float(np.mean(values)) if values else None,
        'sd': float(np.std(values, ddof=1)) if values[1:] else None,
        'runs': len(values)}
    row |= {name: compared.get(name) for name in (
        'effect', 'low', 'high', 'n', 'p', 'p_corrected', 'p_robust',
        'p_equivalent', 'p_not_worse', 'diverged',
        'base_diverged')}
    row['item_noise'] = compared.get('item_noise')
    both = compared.get('both') or {}
    row |= {f'both_{name}': both.get(name) for name in (
        'effect', 'low', 'high', 'p')}
    row['verdict'] = (None if not is_verdict else self.standing(variant)
                      if phase == 'confirm' else compared.get('verdict'))
    trend = compared.get('trend') or {}
    row |= {f'trend_{name}': trend.get(name)
            for name in ('effect', 'low', 'high')}
    speed_ups = self.effect(phase, variant, measure.name).get('speed_ups', ())
    for by in efficiency.BY:
      fast = next((x for x in speed_ups
                   if (x['size'], x['by']) == (size, by)), {})
      row |= {f'speed_up_{by}{ending}': fast.get(name) for ending, name in (
          ('', 'factor'), ('_low', 'low'), ('_high', 'high'),
          ('_fit_error', 'fit_error'))}
    return row

  def verdicts(self) -> list[dict[str, Any]]:
    """The estimates that the verdicts are on, the base's first."""
    return self.estimates[:len(self.variants)]


def load(workdir, rows: str = '') -> Comparison:
  """Returns what lies in a workdir, from its files alone.

  Args:
    workdir: of a sweep or a study.
    rows: of a sweep: a CSV of further variants (curves.with_rows); '': none.

  Raises:
    RequestError: where no sweep or study was run there, or a file is damaged.
  """
  is_study = layout.is_study(workdir)
  require(not (rows and is_study), f'--rows is of a sweep, and {workdir} holds '
          'a study, whose plan was written down before it ran')
  return _study(workdir) if is_study else _sweep(workdir, rows)


def _study(workdir) -> Comparison:
  frozen, results = plans.load(workdir), results_lib.load(workdir)
  require(not results['study'] or results['study']['hash'] == frozen.hash,
          f'{workdir}/{results_lib.FILE} is of another plan than study.json, '
          'whose study has to be run before it is reported')
  outcomes = [plans.outcome_from_json(row) for row in results['outcomes']]
  over = [name for name, row in results['phases'].items() if row['finished']]
  left = [name for name in frozen.plan.seeds if name not in over]
  warnings, announced = [], results['announced']
  if left:
    warnings.append(f'This study is not over: {", ".join(left)} '
                    f'{"are" if left[1:] else "is"} to be done.')
  if results['as_planned']['differences']:
    warnings.append('What ran is not what was planned at first: see "Planned '
                    'and run".')
  if announced and not announced['enough']:
    warnings.append(announced['sentence'] + ' That no difference is shown does '
                    'not mean that there is none.')
  if small := [f'{row["variant"]} in {row["measure"]}'
               for row in results.get('confirm', ())
               if row.get('both') and row['both']['p'] > frozen.plan.alpha
               and row['verdict'] in (decide.BETTER, decide.WORSE)]:
    warnings.append(f'The difference of {"; ".join(small)} is not shown over '
                    'seeds and items (documents, questions) together: other '
                    'items of their kind may show none.')
  if edges := dict.fromkeys(row['variant'] for row in results['tuned']
                            if row['at_edge']):
    warnings.append('Tuning ended at the edge of what was tried for '
                    f'{", ".join(edges)}: a better value may lie beyond.')
  warnings += doubts(frozen.plan, results.get('confirm', ()))
  return Comparison(
      workdir, frozen, results, outcomes,
      {(x.variant, x.size, x.seed): {'eval': x.curve} for x in outcomes
       if x.phase == 'confirm' and x.workload == plans.TEXT and x.curve
       and not x.diverged},
      [{'phase': x.phase, 'variant': x.variant, 'size': x.size,
        'workload': x.workload, 'seed': x.seed, 'state': 'diverged',
        'why': 'in no mean of differences'} for x in outcomes if x.diverged],
      [frozen.plan.question], warnings, frozen.plan.target)


def _sweep(workdir, rows: str) -> Comparison:
  sweep = curves.load_sweep(workdir)
  if rows:
    sweep = curves.with_rows(sweep, rows)
  outcomes = _outcomes(sweep)
  names = dict.fromkeys(['loss', *(n for x in outcomes for n in x.values)])
  plan = plans.Plan(
      sweep.name, '', sweep.file, sweep.base.name,
      tuple(p.name for p in sweep.points if p is not sweep.base), ('',),
      (plans.TEXT,), tuple(plans.Measure(
          name, plans.TEXT, name, plans.LOWER, math.nan) for name in names),
      {'confirm': len(sweep.base.runs)},
      plans.Tuning({LR: ()}, rungs=1), 0.0, match=sweep.match)
  results = results_lib.NOTHING | plans.to_json({
      'confirm': decide.sweep(plan, outcomes), 'tuned': _rates(sweep),
      'provenance': {'codes': sweep.codes, 'devices': [], 'versions': {}}})
  about, warnings = _about(sweep)
  points = [{'variant': p.name, 'size': '', 'workload': plans.TEXT} | {
      name: getattr(p, name) for name in (
          'changes', 'matched', 'params', 'active_params', 'flops_per_token',
          'tokens')} for p in sweep.points]
  finished = {(x.variant, x.seed) for x in outcomes if not x.diverged}
  return Comparison(
      workdir, plans.Frozen(plan, sweep.base_tree, points, {}, {}),
      results, outcomes,
      {(p.name, '', seed): {name: curve for name in curves.FIGURES
                            if (curve := p.curve(seed, name))}
       for p in sweep.points for seed in p.runs if (p.name, seed) in finished},
      [{'phase': '', 'variant': p.name, 'size': '', 'workload': '',
        'seed': seed, 'state': 'diverged' if run.diverged else run.state,
        'why': run.error.strip() or (
            'no finite held-out loss at the last step (eval.every_steps)'
            if run.state == 'done' else '')}
       for p in sweep.points for seed, run in p.runs.items()
       if run.diverged or not run.is_whole],
      about, warnings + doubts(plan, results['confirm']))


def _outcomes(sweep: curves.Sweep) -> list[plans.Outcome]:
  """Returns what became of the runs of a sweep that have a figure, and of those
  that diverged, which count as such and have no figures."""
  values = {(point.name, seed): {} if run.diverged else _values(run)
            for point in sweep.points for seed, run in point.runs.items()}
  names = dict.fromkeys(name for row in values.values() for name in row)
  outcomes = []
  for point in sweep.points:
    for seed, run in point.runs.items():
      figures = values[point.name, seed]
      if run.diverged:
        figures = dict.fromkeys(names, math.nan)
      if not figures:
        continue
      spent = {name: column[-1]
               for name, column in point.curve(seed, 'train').items()}
      outcomes.append(plans.Outcome(
          phase='confirm', variant=point.name, size='', workload=plans.TEXT,
          seed=seed, values=figures, diverged=run.diverged,
          flops=spent.get('flops', math.nan),
          seconds=spent.get('seconds', math.nan), params=point.params,
          changes=point.changes, curve=point.curve(seed),
          items={name: scores for name, scores in run.items.items()
                 if name in figures}))
  return outcomes


def doubts(plan: plans.Plan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Says where the noise of a confirmation is not what Student's test takes it
  for, and where the robust test does not agree with it."""
  rows, sentences = [
      row for row in rows if row['measure'] == plan.primary.name], []
  shape = next((row['p_shape'] for row in rows
                if row.get('p_shape') is not None), 1.0)
  if shape <= statistics.IRREGULAR:
    sentences.append(
        f'The differences look skewed or have outliers (p = {shape:.2g} of '
        'normal noise): p and intervals are the more cautious of Student\'s '
        'and of those by the differences of all variants together.')
  apart = [f'{row["variant"]} (p = {row["p"]:.2g} and {row["p_robust"]:.2g})'
           for row in rows if None not in (row['p'], row.get('p_robust'))
           and (row['p'] <= plan.alpha) != (row['p_robust'] <= plan.alpha)]
  if apart:
    sentences.append(
        'Student\'s test and the permutation test of the trimmed mean '
        f'disagree, before correction, on {", ".join(apart)}.')
  return sentences


def _values(run: curves.Run) -> dict[str, float]:
  """Returns the held-out loss of a run after its last step, and what else was
  found of it then: fractions that tasks found, as TASK/FIGURE, and the last
  figures of its routers. Counts, groups of figures and curves are left out."""
  values = {} if run.final is None else {'loss': run.final}
  if held_out := run.held_out:
    tasks = evals.listed(run.config['eval.tasks'])
    values |= {name: value for name, value in held_out.items()
               if type(value) is float
               and any(_is_figure_of(task, name) for task in tasks)}
  for task, results in run.evaluations.items():
    if isinstance(results, Mapping):
      values |= {f'{task}/{name}': value for name, value in results.items()
                if type(value) is float}
  last = next((row for row in reversed(run.rows) if row['split'] == 'train'
               and not row.keys().isdisjoint(curves.FIGURES)), {})
  if values:
    values |= {words: float(np.mean(np.asarray(last[name], float)))
              for name, words in curves.FIGURES.items() if name in last}
  return {name: x for name, x in values.items() if math.isfinite(x)}


def _is_figure_of(task: str, name: str) -> bool:
  """Whether a name of metrics.jsonl is one of a task's own figures, and not of
  a group of them, whose names are joined there by a slash, too."""
  if name.rpartition('/')[0] == task:
    return True
  row = evals.TASKS.get(task.partition(':')[0])  # None: of another version
  beside = row and row.beside
  return beside is not None and name.startswith(f'{task}/') and (
      name[len(task) + 1:].partition('/')[0] not in beside)


def _rates(sweep: curves.Sweep) -> list[dict[str, Any]]:
  """Returns the groups of points that differ in the learning rate alone, as
  plans.Tuned of what was tried."""
  groups: dict[str, dict[float, curves.Point]] = {}
  for point in sweep.points:
    rest = {k: v for k, v in point.changes.items() if k != LR}
    lr = point.changes.get(LR, sweep.base_config[LR])
    groups.setdefault(changed(rest) or sweep.base.name, {})[lr] = point
  tuned = []
  for name, points in groups.items():
    tried = [(lr, any(run.diverged for run in points[lr].runs.values()),
              statistics.interval([*points[lr].finals.values()]))
             for lr in sorted(points) if points[lr].finals]
    if len(tried) > 1:
      best, *_ = min(tried, key=lambda trial: (trial[1], trial[2].mean))
      tuned.append({
          'variant': name, 'size': '', 'workload': '',
          'changes': {LR: best}, 'look': next(iter(points.values())).name,
          'at_edge': [LR] * (best in (min(points), max(points))),
          'runs': sum(len(p.finals) for p in points.values()), 'tried': [
              {'rung': 0, 'changes': {LR: lr}, 'diverged': diverged,
               'value': losses.mean, 'low': losses.low, 'high': losses.high}
              for lr, diverged, losses in tried]})
  return tuned


def _about(sweep: curves.Sweep) -> tuple[list[str], list[str]]:
  """What the sweep is, and what to know before the figures."""
  runs = [run for p in sweep.points for run in p.runs.values()]
  done = sum(run.state == 'done' for run in runs)
  left = sum(run.state != 'done' and not run.diverged for run in runs)
  matched = (f'{sweep.match} matched to the base\'s within 1 %' if sweep.match
             else 'sizes are not matched')
  paired = ('seed by seed, every point sees the same data in the same order'
            if sweep.paired else 'points differ in their data, so that seeds '
            'pair less than they do elsewhere')
  warnings = []
  if left:
    warnings.append(f'{left} of {len(runs)} runs failed or are not done: they '
                    'are listed at the end, and are in no verdict.')
  if not sweep.base.finals:
    warnings.append(f'The base {sweep.base.name} has no finished run with a '
                    'held-out loss: no loss can be compared with it.')
  for name, words in (('tokens', 'tokens'), ('params', 'parameters'),
                      ('flops_per_token', 'FLOPs a token')):
    far = [p.name for p in sweep.points
           if abs(getattr(p, name) / getattr(sweep.base, name) - 1) > 0.01]
    if far and name != sweep.match:
      warnings.append(f'The {words} of {", ".join(far)} differ from the '
                      "base's by more than 1 %.")
  if len(sweep.codes) > 1:
    warnings.append(layout.codes_note(sweep.codes))
  if sweep.strangers:
    warnings.append('Not of the config that sweep.json says, though in these '
                    f'figures: {"; ".join(sweep.strangers)}.')
  return ([f'{sweep.file}: {len(sweep.points)} points, {done} of {len(runs)} '
           f'runs done; base {sweep.base.name}; {matched}; {paired}.'],
          warnings)


def value(x: Any) -> str:
  """Returns a config's value as a flag would have it."""
  return x if isinstance(x, str) and x else json.dumps(x)


def changed(changes: Mapping[str, Any]) -> str:
  return ', '.join(f'{name}={value(x)}' for name, x in changes.items())


def alone(frozen: plans.Frozen, row: Mapping[str, Any]) -> dict[str, Any]:
  """What a point changes beside the base of its size and workload."""
  base = frozen.point(frozen.plan.base, row['size'], row['workload'])['changes']
  return {name: x for name, x in row['changes'].items()
          if name not in base or base[name] != x}


def answer(c: Comparison) -> str:
  """The answer, as far as there is one, in a sentence."""
  groups: dict[str, list[str]] = {}
  for row in c.verdicts()[1:]:
    effect = page.estimate(row['effect'], row['low'], row['high']).text
    groups.setdefault(row['verdict'], []).append(
        row['variant'] + f' ({effect}{_excluded(c, row)})' * (
            effect != UNKNOWN))
  unit = measures_lib.unit_text(c.frozen, c.plan.primary, ' (', ')')
  return f'By {c.plan.primary.name}{unit}: ' + '; '.join(
      f'{word}: {", ".join(names)}' for word, names in groups.items()) + '.'


def _excluded(c: Comparison, row: Mapping[str, Any]) -> str:
  """Says of a variant of which no difference is shown that it cannot have one
  of EFFECT: its interval lies within, and does so where it is as wide as makes
  the intervals of all confirmed variants hold at once (Bonferroni)."""
  if row['verdict'] != decide.NONE_SHOWN or not page.known(row['low']):
    return ''
  from scipy.stats import t
  family = [other['measure'] for other in c.results['confirm']].count(
      row['measure'])
  wider = t.isf(c.plan.alpha / (2 * family), row['n'] - 1) / t.isf(
      0.025, row['n'] - 1)
  half = max(row['high'] - row['effect'], row['effect'] - row['low'])
  return (f': an effect of {c.plan.effect:g} is excluded' if abs(
      row['effect']) + half * max(wider, 1.0) < c.plan.effect else '')


# The tables.


def estimate_table(c: Comparison, name: str, title: str,
                   rows: Sequence[Mapping[str, Any]]) -> Table:
  """Estimates as a table, without the columns that say nothing of them."""
  rows = [row for row in rows
          if row['runs'] or row['verdict'] or row['n'] is not None]
  one = len({row['measure'] for row in rows}) == 1
  mean = 'held-out loss' if one and rows[0]['measure'] == 'loss' else 'mean'
  ends = lambda row, key: page.estimate(
      row[key], row[key.replace('effect', 'low')],
      row[key.replace('effect', 'high')])
  table = [{
      'variant': label(row['variant']),
      'measure': label('' if one else row['measure']),
      'size': label(row['size']),
      mean: page.mean(row['mean'], row['sd']),
      'minus base': Cell(BASE, 0.0) if row['variant'] == c.plan.base
      else ends(row, 'effect'),
      '± items': page.number(row['item_noise']),
      'over seeds and items': ends(row, 'both_effect'),
      'p over both': page.p_value(row['both_p']),
      'verdict': label(row['verdict'] or '', page.MARKS.get(
          row['verdict'], '')),
      'p': page.p_value(row['p'] if row['p_corrected'] is None else None),
      'corrected p': page.p_value(row['p_corrected']),
      'robust p': page.p_value(row['p_robust']),
      'equivalence p': page.p_value(row['p_equivalent']),
      'no worse p': page.p_value(row['p_not_worse']),
      'speed-up in FLOPs': _speed_up(row, 'flops'),
      'speed-up in time': _speed_up(row, 'seconds'),
      'trend over size': ends(row, 'trend_effect'),
      'seeds': page.count((row['runs'] or None) if row['n'] is None
                          else row['n']),
      'diverged': Cell(str(row['diverged'] or ''), row['diverged'])}
           for row in rows]
  return page.table(name, title, table)


def _speed_up(row: Mapping[str, Any], by: str) -> Cell:
  """'1.2 [1.1, 1.3]'; ~ where the curves' fit errs by more than the difference,
  in brackets where no difference is shown."""
  x = row[f'speed_up_{by}']
  if not page.known(x):
    return Cell(UNKNOWN)
  text = page.estimate(x, row[f'speed_up_{by}_low'], row[f'speed_up_{by}_high'],
                       '.2f').text
  if page.known(row['effect']) and (
      abs(row['effect']) < row[f'speed_up_{by}_fit_error']):
    text = f'~{text}'
  shown = row['verdict'] not in (decide.NO_NOISE, decide.NONE_SHOWN)
  return Cell(text if shown else f'({text})', x)


def reached(each: Sequence[Mapping[str, Sequence]], target: float
            ) -> dict[str, float | None]:
  """Returns what runs spend to reach a loss: 'step', 'tokens' and 'seconds' of
  the first evaluation from which on their mean loss is below the target, with
  a one-sided p below TARGET_LEVEL, and this 'p'; where there is none, the p of
  the last evaluation alone.

  The last evaluation is tested first, then the one before it, until one is not
  below. In an order that is fixed beforehand no test has to be corrected
  (Maurer et al. 1995): that any step is named too early has a probability of
  at most TARGET_LEVEL.

  Args:
    each: the curve of each seed.
    target: the loss.
  """
  at = curves.mean(each)
  losses = [np.asarray(x['loss'], float)[np.isin(x['step'], at['step'])]
            for x in each]
  ps = [statistics.p_below(seeds, target) for seeds in zip(*losses)]
  first = len(ps)
  while first and ps[first - 1] is not None and ps[first - 1] < TARGET_LEVEL:
    first -= 1
  if first == len(ps):
    return {'p': ps[-1] if ps else None}
  return {name: float(at[name][first])
          for name in ('step', 'tokens', 'seconds')} | {'p': ps[first]}


def target_table(c: Comparison) -> Table:
  """What each variant spends to reach the target at each size. A run that
  diverged or failed never does, and so neither does its variant."""
  rows = []
  for size in reversed(c.plan.sizes) if c.target is not None else ():
    for name in c.variants:
      each = [by['eval'] for (variant, at, _), by in c.curves.items()
              if (variant, at) == (name, size) and by.get('eval')]
      lost = any((x['variant'], x['size']) == (name, size)
                 and x['phase'] in ('', 'confirm') for x in c.excluded)
      spent = reached(each, c.target) if each and not lost else {}
      rows.append({
          'variant': label(name), 'size': label(size),
          'steps to target': page.count(spent.get('step')),
          'tokens to target': page.count(spent.get('tokens')),
          'time to target': page.duration(spent.get('seconds')),
          'p of target': page.p_value(spent.get('p')),
          'seeds': page.count(len(each))})
  return page.table('target', f'To a held-out loss of {c.target}', rows)


def costs(c: Comparison) -> Table:
  """What each variant costs at each size, and what it changes."""
  def beside(row, name):
    if not page.known(row[name]):
      return Cell(UNKNOWN)
    base = c.frozen.point(c.plan.base, row['size'], row['workload'])[name]
    more = row[name] / base - 1
    x, units = row[name], ['', 'k', 'M', 'G', 'T']
    while abs(x) >= 1000 and units[1:]:
      x /= 1000
      units.pop(0)
    share = '' if abs(more) < 5e-4 else f' ({more:+.1%})'
    return Cell(f'{x:.4g}{units[0]}{share}', row[name])

  rows = []
  for row in c.frozen.points:
    if row['workload'] != plans.TEXT:
      continue
    seconds = [x.seconds for x in c.outcomes if x.phase == 'confirm' and (
        x.variant, x.size, x.workload) == (
            row['variant'], row['size'], row['workload'])]
    rows.append({'variant': label(row['variant']), 'size': label(row['size']),
                 'parameters': beside(row, 'params'),
                 'active parameters': beside(row, 'active_params')
                 if row['active_params'] != row['params'] else Cell(''),
                 'FLOPs a token': beside(row, 'flops_per_token'),
                 'tokens': page.count(row['tokens']),
                 'time of a run': page.duration(
                     float(np.mean(seconds)) if seconds else None),
                 'changes': label(changed(alone(c.frozen, row))),
                 'solved for': label(', '.join(row['matched']))})
  return page.table('costs', 'What each variant changes and costs', rows)


def effects(c: Comparison) -> Table:
  """Each change alone: the mean over all pairs of points that differ in it and
  in nothing else, what was matched aside; none where no change has 2 pairs."""
  declared = {row['variant']: {k: v for k, v in row['changes'].items()
                               if k not in row['matched']}
              for row in c.frozen.points}
  finals = {v: c.values('confirm', v, '', c.plan.primary) for v in c.variants}
  pairs: dict[str, list[dict[int, float]]] = {}
  for ours, changes in declared.items():
    for key, x in changes.items():
      rest = {k: v for k, v in changes.items() if k != key}
      pairs.setdefault(changed({key: x}), []).extend(
          {seed: finals[ours][seed] - finals[theirs][seed]
           for seed in finals[ours].keys() & finals[theirs].keys()}
          for theirs, other in declared.items() if other == rest)
  rows = []
  for change, apart in pairs.items():
    apart = [by_seed for by_seed in apart if by_seed]
    # Seeds that only some pairs have would weigh these pairs alone.
    seeds = set.intersection(*map(set, apart)) if apart[1:] else ()
    if not seeds:
      continue
    mean, low, high, _ = statistics.interval([
        float(np.mean([by_seed[seed] for by_seed in apart])) for seed in seeds])
    means = [float(np.mean([*by_seed.values()])) for by_seed in apart]
    rows.append({
        'change': label(change),
        'minus base': page.estimate(mean, low, high),
        'from pair to pair': Cell(f'{min(means):+.4f} to {max(means):+.4f}',
                                  min(means)),
        'pairs': page.count(len(means))})
  return page.table('effects', 'Each change, whatever the others', rows)


def tuning(c: Comparison) -> Table:
  """The values that were tried for each variant, and the best of them."""
  rows = []
  for row in c.results['tuned']:
    tried = {name: sorted({trial['changes'][name] for trial in row['tried']})
             for name in row['changes']}
    best = [trial['value'] for trial in row['tried']
            if trial['changes'] == row['changes']][-1]
    last = [trial['value'] for trial in row['tried']
            if trial['rung'] >= c.plan.tuning.rungs - 1]
    measure = next(iter(c.plan.of_workload(row['workload'])), c.plan.primary)
    fresh = [*c.values('screen', row['variant'], row['size'], measure).values()]
    rows.append({
        'variant': label(row['variant']),
        'size': label(row['size']), 'workload': label(row['workload']),
        'chosen': label(changed(row['changes'])),
        'tried': label('; '.join(f'{name}: {", ".join(map(value, values))}'
                                 for name, values in tried.items())),
        'at the edge': label(', '.join(row['at_edge']) or 'no'),
        'best': page.number(best),
        'next best': _next_best(c, row, measure),
        'on fresh seeds': page.mean(
            float(np.mean(fresh)), float(np.std(fresh, ddof=1)))
        if len(fresh) > 1 else Cell(UNKNOWN),
        'sensitivity': page.number(
            abs(sum(last) / len(last) - best)
            if last and None not in last else None),
        'runs': page.count(row['runs']),
        'diverged': Cell(str(n) if (n := sum(
            bool(trial['diverged']) for trial in row['tried'])) else '', n)})
  return page.table('tuned', 'What was tried for each variant', rows)


def _next_best(c: Comparison, row: Mapping[str, Any], measure: plans.Measure
               ) -> Cell:
  """The candidate after the chosen one minus it, over the seeds of tuning."""
  trials = sorted((trial for trial in row['tried'] if not trial['diverged']
                   and trial['rung'] >= c.plan.tuning.rungs - 1
                   and page.known(trial['value'])),
                  key=lambda trial: (trial['changes'] != row['changes'],
                                     -measure.sign * trial['value']))[:2]
  if len(trials) < 2:
    return Cell(UNKNOWN)
  return page.estimate(*statistics.interval(np.subtract(*(
      trial.get('values', [trial['value']]) for trial in trials[::-1])))[:3])


def noise(c: Comparison) -> Table:
  """What a variant without effect shows, and what can be found beside it."""
  rows = [{
      'measure': label(row['measure']), 'size': label(row['size']),
      'phase': label(row['phase']), 'pairs': page.count(row['pairs']),
      'standard deviation': page.number(row['sd']),
      'smallest effect': page.number(row['smallest_effect']),
      'seeds': page.count(row['seeds']),
      'seeds needed': page.count(row['seeds_needed']),
      'power': page.number(row['power'], '.0%'),
      'signal to noise': page.number(row.get('snr'), '.1f'),
      'p of skew': page.p_value(row.get('skew')),
      'p of outliers': page.p_value(row.get('outliers')),
      'error': page.number(row.get('error'), '.2g')}
          for row in c.results['noise']]
  return page.table('noise-table', 'Base against base; wanted is an effect of '
                    + measures_lib.amount(c.frozen, c.plan.effect), rows)


def excluded(c: Comparison) -> Table:
  """The runs that failed, diverged or are not done, and why."""
  names = ('variant', 'phase', 'size', 'workload', 'state', 'why')
  groups: dict[tuple, list[str]] = {}
  for row in c.excluded:
    groups.setdefault(tuple(row[name] for name in names), []).append(
        str(row['seed']))
  return page.table('excluded', 'Runs that failed, diverged or are not done', [
      dict(zip(names, map(label, group)))
      | {'seeds left out': label(', '.join(seeds))}
      for group, seeds in groups.items()])


def spent(c: Comparison) -> Table:
  """Runs, FLOPs and time of each phase, and of all."""
  phases = dict(c.results['phases'])
  if phases:
    phases['all'] = {key: sum(row[key] or 0.0 for row in phases.values())
                     for key in next(iter(phases.values()))}
  rows = [{
      'phase': label(phase), 'runs planned at most': page.count(row['planned']),
      'done': page.count(row['done']), 'diverged': page.count(row['failed']),
      'tokens': page.count(row['tokens']),
      'FLOPs': page.number(row['flops'], '.3g'),
      'training time': page.duration(row['seconds'])}
          for phase, row in phases.items()]
  return page.table('spent', 'Spent, by phase', rows)


def config(c: Comparison) -> Table:
  """Every field of the config that all runs change."""
  return page.table('config', 'The config that all runs change', [
      {'field': label(name), 'value': Cell(value(x))}
      for name, x in run_config.flatten(c.frozen.base_config).items()
      if not name.startswith(ASIDE)])


def provenance(c: Comparison) -> Table:
  """Code, machines, versions and data."""
  record = c.results['provenance']
  rows = [('plan', f'{c.frozen.hash}, frozen on {plans.date(c.frozen.time)} at '
           f'commit {c.frozen.code.get("commit")}')] * c.is_study
  rows += [(what, name) for what, names in (
      ('code', record['codes']), ('device', record['devices']),
      ('version', [f'{name} {x}' for name, x in record['versions'].items()]),
      ('hash', [f'{name}: {x}' for name, x in c.frozen.sources.items()]))
           for name in names]
  return page.table('code', 'Code, machines and data', [
      {'what': label(what), 'which': Cell(name)} for what, name in rows])


def methods(frozen: plans.Frozen,
            results: Mapping[str, Any] = results_lib.NOTHING) -> list[str]:
  """The paragraphs that a paper needs to say how a study was done, or will be:
  then there are no results yet. Nothing is said of a phase that had no runs."""
  plan, as_planned = frozen.plan, results['as_planned']
  again = as_planned.get('repeated', {}).get('confirm', 0)
  empty = {name for name, phase in results['phases'].items()
           if phase['finished'] and not phase['done']}

  def changes(row: Mapping) -> str:
    """What a size and a workload change: most of it is as at the smallest."""
    fields, first = row['changes'], frozen.point(
        plan.base, plan.sizes[0], row['workload'])['changes']
    new = {name: x for name, x in fields.items()
           if (name, x) not in first.items()}
    same = 0 < len(new) < len(fields) and first.keys() <= fields.keys()
    return f'as at {plan.sizes[0]}, but ' * same + changed(
        new if same else fields)

  seen = max((change['seen'].get('confirm', 0)
              for change in frozen.amendments), default=0)
  text = page.render(
      'methods.txt', frozen=frozen, announced=results['announced'], plan=plan,
      seen=seen, again=again, otherwise=as_planned['differences'],
      date=plans.date, unknown=as_planned.get('unknown', 0),
      phases=[x for x in phases_lib.of(plan.seeds) if x.name not in empty],
      primary=plan.primary, changed=changed, changes=changes,
      unit_text=measures_lib.unit_text,
      shows=decide.can_show(plan), alone=alone,
      amount=measures_lib.amount(frozen, plan.effect),
      grid=[f'{name} in {{{", ".join(map(value, values))}}}'
            for name, values in plan.tuning.fields.items()])
  return [' '.join(part.split()) for part in text.split('\n---\n')]


# What report.js draws: {id, title, caption, x, y, log, series}. `x` and `y`
# name the axes and the measures that a reader can choose from, and a series
# holds, for each measure, its points by axis: {'eval': {'tokens': [...],
# 'y': [...]}}. `look` is the class of report.css that gives it its colour and
# dashes.


def curve_plots(c: Comparison) -> list[dict[str, Any]]:
  """Curves at each size: the mean over seeds, and each seed."""
  plots = []
  for i, size in enumerate(c.plan.sizes):
    series = []
    for name in c.variants:
      seeds = {seed: lines for (variant, at, seed), lines in c.curves.items()
               if (variant, at) == (name, size) and lines}
      if not seeds:
        continue
      every = [figure for figure in curves.FIGURES
               if all(figure in lines for lines in seeds.values())]
      series.append({
          'name': name, 'base': name == c.plan.base,
          'look': figures.css_look(c, name),
          'mean': {name: thinned(curves.mean(
              [lines[name] for lines in seeds.values()])) for name in every},
          'seeds': {seed: {name: thinned(lines[name]) for name in every}
                    for seed, lines in seeds.items()}})
    plots.append({
        'id': f'curves-{i}', 'title': f'curves {size}', 'curves': True,
        'log': False, 'x': curves.AXES, 'series': series,
        'y': {name: words for name, words in curves.FIGURES.items()
              if any(name in line['mean'] for line in series)},
        'caption': f'{size or "Curves"}: means over the seeds that are done. '
        'Seconds are of training steps on the machine that ran them, '
        'without compiling, evaluating and saving; where several runs trained '
        "as one program, each one's share."})
  return plots


def tuning_plot(c: Comparison) -> dict[str, Any]:
  """What the last rung of tuning found on text by the learning rate, with the
  interval over seeds where there is one."""
  series = []
  for row in c.results['tuned']:
    tried = [trial for trial in row['tried'] if LR in trial['changes']
             and trial['rung'] >= c.plan.tuning.rungs - 1]
    if row['workload'] not in ('', plans.TEXT) or not tried:
      continue
    tried.sort(key=lambda trial: trial['changes'][LR])
    look = row.get('look', row['variant'])
    turn = c.plan.sizes.index(row['size'])
    series.append({
        'name': ' '.join([row['variant'], row['size']]).strip(), 'base': False,
        'look': figures.css_look(c, look, turn), 'mean': {'loss': _numbers({
            'lr': [trial['changes'][LR] for trial in tried],
            'y': [trial['value'] for trial in tried],
            'low': [trial.get('low') for trial in tried],
            'high': [trial.get('high') for trial in tried]})}})
  return {'id': 'rates', 'title': 'loss by learning rate', 'log': True,
          'x': {'lr': 'learning rate'}, 'y': {'loss': c.plan.primary.name},
          'caption': 'Bars are 95 % intervals over seeds.', 'series': series}


def thinned(curve: Mapping[str, Sequence]) -> dict[str, list]:
  """Returns a curve as report.js draws it: with at most MOST points, its last
  one kept."""
  n = len(curve['step'])
  keep = np.unique(np.linspace(0, n - 1, min(n, MOST)).round().astype(int))
  return _numbers({'y' if name == 'loss' else name:
                   np.asarray(curve[name], float)[keep]
                   for name in (*curves.AXES, 'loss')})


def _numbers(line: Mapping[str, Sequence]) -> dict[str, list]:
  """Plain numbers of six digits; what is unknown or not finite is None."""
  return {name: [float(f'{x:.6g}') if page.known(x) else None
                 for x in values] for name, values in line.items()}


def multipliers(c: Comparison) -> Table:
  """Compute multipliers at each size and of one fit of all."""
  rows: dict[tuple, dict] = {}
  for verdict in c.results.get('confirm', ()):
    for x in verdict.get('multipliers', ()):
      row = rows.setdefault((verdict['variant'], x['size']), {
          'variant': label(verdict['variant']), 'size': label(x['size']),
          'floor': page.number(x['floor'], '.3f')})
      row[x['by']] = page.estimate(x['factor'], x['low'], x['high'], '.3f')
  return page.table('multipliers', 'Compute multipliers', [*rows.values()])


def ranks(c: Comparison) -> Table:
  """How far the order of the variants, the base among them, is the same at a
  size as at the largest."""
  from scipy.stats import kendalltau
  name, effects = c.plan.primary.name, {}
  for size in c.plan.every_size:
    phase = 'largest' if size == c.plan.largest else 'confirm'
    effects[size] = np.array([0.0, *(
        c.effect(phase, variant, name, size).get('effect')
        for variant in c.plan.variants)], float)
  *sizes, last = [size for size, x in effects.items()
                  if np.isfinite(x).sum() > 2] or ['']
  return page.table('ranks', 'Is the order that of the largest size?', [{
      'size': label(size), 'compared with': label(last),
      'Kendall\'s tau': page.number(float(kendalltau(
          effects[size], effects[last], nan_policy='omit')[0]), '.2f')}
      for size in sizes])


def lost(c: Comparison) -> list[str]:
  """Says what the screening may have lost."""
  plan, rows = c.plan, c.results.get('screen', ())
  power = next((row['power'] for row in c.results['noise'] if (
      row['phase'], row['measure']) == ('screen', plan.primary.name)), None)
  stopped = [row for row in rows if row['verdict'] != decide.PASSED]
  may = [row['variant'] for row in stopped if row['low'] is None or max(
      plan.primary.sign * row[end] for end in ('low', 'high')) >= plan.effect]
  return [f'{len(stopped)} of {len(rows)} variants were stopped. Of such as '
          f'improve {plan.primary.name} by {plan.effect:g} at this size, '
          f'{1 - (power or 0):.0%} are stopped by the noise; so much is within '
          f'the interval of {", ".join(may) or "none"}. What only larger sizes '
          'show cannot be seen here.'] * bool(stopped and power)


def predictions(c: Comparison) -> Section:
  """What was predicted for the largest size, and what was seen there."""
  record, last, rows = c.results['predicted'], c.plan.largest, []
  seen = {row['variant']: row[
      'mean' if row['variant'] == c.plan.base else 'effect']
          for row in c.estimates if (row['phase'], row['measure']) == (
              'largest', c.plan.primary.name)}
  for prediction in record['rows'] if record else ():
    x, value, low, high = np.array([seen.get(prediction['variant']), *(
        prediction[name] for name in ('value', 'low', 'high'))], float)
    rows.append({
        'variant': label(prediction['variant']),
        'predicted': page.estimate(value, low, high),
        'observed': page.number(x, '+.4f'),
        'off by': page.number(x - value, '+.4f'),
        'inside': label('' if np.isnan(x - low) else
                        'yes' if low <= x <= high else 'no')})
  return Section('predicted', 'Predicted and seen', [
      f'The prediction {record["hash"]} of {last} was recorded on '
      f'{plans.date(record["time"])}, ' + (
          'before any run of this size began.' if record['blind'] else
          'when runs of this size had begun: it is none.')] if rows else (),
                 tables=[page.table('predictions', f'{last}, by the law of the '
                                    'other sizes', rows)])


# The whole.


def verdict_table(c: Comparison) -> Table:
  return estimate_table(c, 'verdicts', 'Each variant beside the base',
                        c.verdicts())


def other_table(c: Comparison) -> Table:
  """What the verdicts are not on."""
  rows = c.estimates[len(c.variants):]
  return estimate_table(c, 'estimates', 'Each size and measure', [
      row for row in rows if row['phase'] == 'confirm'])


def comparison(c: Comparison, phase: phases_lib.Phase) -> Section:
  """What a phase found that the verdicts are not of."""
  sizes = phase.narrow(c.plan).sizes
  return Section(phase.name, phase.name.capitalize(), lost(c) * (
      phase.name == 'screen'), tables=[estimate_table(
      c, f'{phase.name}-table', f'At the smallest size, {sizes[0]}'
      if sizes == c.plan.sizes[:1] else f'At {", ".join(sizes)}',
      [row for row in c.estimates if row['phase'] == phase.name])])


def html(c: Comparison, drawn: Sequence[page.Figure]) -> str:
  pick = lambda name: [figure for figure in drawn if figure.name == name]
  announced = c.results['announced']
  planned = c.results['as_planned']['differences'] or [
      f'What ran is what was planned, by the plan {c.frozen.hash}.']
  return page.html([
      Section('verdict', 'Verdict', (), pick('outcome'), [
          verdict_table(c), costs(c)]),
      Section('curves', 'Loss curves', tables=[target_table(c)],
              plots=curve_plots(c)),
      Section('others', 'Sizes and measures', [NOT_COOLED] * any(
          x.cooled is False for x in c.outcomes if x.phase == 'confirm'
          and x.workload == plans.TEXT), pick('measures'),
              [other_table(c), multipliers(c), ranks(c)]),
      Section('changes', 'Each change',
              tables=[] if c.is_study else [effects(c)]),
      Section('tuning', 'Tuning', tables=[tuning(c)], plots=[tuning_plot(c)]),
      Section('noise', 'Noise and power', [
          announced['sentence'], *filter(None, [c.results['advice']])]
              if announced else (), (), [noise(c)]),
      *(comparison(c, phase) for phase in c.comparing
        if phase.name != 'confirm'),
      predictions(c),
      Section('left-out', 'Left out', tables=[excluded(c)]),
      Section('planned', 'Planned and run', planned * c.is_study),
      Section('methods', 'Methods', methods(c.frozen, c.results)
              if c.is_study else (), (), [config(c)]),
      Section('provenance', 'Provenance and cost', (), (), [
          spent(c), provenance(c)])],
                   title=c.plan.name, about=c.about, answer=answer(c),
                   warnings=c.warnings)


def write(c: Comparison) -> list[pathlib.Path]:
  """Writes the page, the estimates, the runs, the curves and the figures;
  returns their paths, the page's first."""
  folder = pathlib.Path(c.workdir) / 'report'
  storage.try_folder(folder)
  drawn = figures.of(c)
  runs = [{
      **{name: getattr(x, name) for name in (
          'phase', 'variant', 'size', 'workload', 'seed')}, 'measure': measure,
      'value': y, **{name: getattr(x, name) for name in (
          'diverged', 'loss', 'flops', 'seconds', 'params')},
      'changes': json.dumps(x.changes, sort_keys=True)}
          for x in c.outcomes for measure, y in x.values.items()]
  lines = [{'variant': variant, 'size': size, 'seed': seed, 'figure': figure}
           | dict(zip(curve, row))
           for (variant, size, seed), by_figure in c.curves.items()
           for figure, curve in by_figure.items()
           for row in zip(*curve.values())]
  files = {'index.html': html(c, drawn), 'results.csv': page.sheet(c.estimates),
           'runs.csv': page.sheet(runs), 'curves.csv': page.sheet(lines)} | {
               f'{figure.name}.{kind}': content for figure in drawn
               for kind, content in figure.files.items()}
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    storage.write(folder / name, content)
  return [folder / name for name in files]


def text(c: Comparison) -> str:
  """Returns the outcome for a terminal, with what to know of it."""
  more = () if c.is_study else (costs(c), other_table(c), effects(c))
  first, *others = [table for table in (
      verdict_table(c), target_table(c), *more, excluded(c))
                    if table.rows]
  return '\n'.join([first.text(), *(f'- {line}' for line in c.warnings), *(
      f'\n{table.title}\n{table.text()}' for table in others)])


def as_json(c: Comparison) -> dict[str, Any]:
  return {'name': c.plan.name, 'file': c.plan.file, 'match': c.plan.match,
          'base': c.plan.base, 'answer': answer(c), 'warnings': c.warnings,
          'target': [{name: cell.value for name, cell in row.items()}
                     for row in target_table(c).rows],
          'estimates': c.estimates, 'points': metrics.plain(c.frozen.points),
          'excluded': c.excluded}
