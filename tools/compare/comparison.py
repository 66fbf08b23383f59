"""Comparison: what a sweep or a study planned and found, as reports read it.

A sweep is a study of one size that has no phase but the confirmation: both are
one table of runs and one of estimates.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import math
from typing import Any

import numpy as np

from common.errors import require
from tools.compare import curves, decide, efficiency, layout, page, statistics
from tools.compare import phases as phases_lib
from tools.compare import plan as plans
from tools.compare import results as results_lib
from training import evals

LEARNING_RATE_FIELD = 'optim.lr'
BASE, NOT_DONE_YET = 'base', 'not done yet'
# The figures that an estimate takes from the comparison of a phase.
_COMPARED = ('effect', 'low', 'high', 'n', 'p', 'p_corrected', 'p_robust',
             'p_equivalent', 'p_not_worse', 'diverged', 'base_diverged',
             'item_noise')
# The costs of a point, and what they are called in a sentence.
_COSTS = {'tokens': 'tokens', 'params': 'parameters',
          'flops_per_token': 'FLOPs a token'}


def first_row_with(rows: Sequence[Mapping[str, Any]], **wanted: Any
                   ) -> Mapping[str, Any]:
  """Returns the first row that has these values; {} where none has them."""
  for row in rows:
    if all(row[name] == x for name, x in wanted.items()):
      return row
  return {}


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The plan and the results of a sweep or a study.

  Attributes:
    workdir: the folder of the sweep or study.
    frozen: what study.json holds; for a sweep, the same in its place.
    results: what results.json holds; for a sweep, the same in its place.
    outcomes: the runs that have a figure, and those that diverged.
    curves: by (variant, size, seed), the figures that the run has, by name
      (curves.FIGURES).
    excluded: the runs that failed, diverged or are not done, as rows of
      {'phase', 'variant', 'size', 'workload', 'seed', 'state', 'why'}.
    about: paragraphs that say what was compared.
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
    """The base, and then the variants."""
    return (self.plan.base, *self.plan.variants)

  @property
  def comparing(self) -> list[phases_lib.Phase]:
    """The phases that compare variants with the base."""
    others = phases_lib.Noise | phases_lib.Tune
    return [phase for phase in phases_lib.of(self.plan.seeds)
            if not isinstance(phase, others)]

  def values(self, phase: str, variant: str, size: str,
             measure: plans.Measure) -> dict[int, float]:
    """Returns a measure of each run of a phase that has it, by seed."""
    wanted = phase, variant, size, measure.workload
    values = {}
    for run in self.outcomes:
      value = run.values.get(measure.name)
      is_wanted = (run.phase, run.variant, run.size, run.workload) == wanted
      if is_wanted and page.known(value):
        values[run.seed] = value
    return values

  def effect(self, phase: str, variant: str, measure: str, size: str = ''
             ) -> Mapping[str, Any]:
    """Returns what a phase found of a variant, as decide gives it.

    Args:
      phase: the name of the phase.
      variant: the name of the variant.
      measure: the name of the measure.
      size: one of the sizes; '' or decide.ALL: over all of them.

    Returns:
      The row; {} where the phase has not compared the variant.
    """
    rows = self.results.get(phase, ())
    row = first_row_with(rows, variant=variant, measure=measure)
    if not row or size in ('', decide.ALL) or len(row['sizes']) == 1:
      return row
    return first_row_with(row['sizes'], size=size)

  def standing(self, variant: str) -> str:
    """Returns how far a variant came, in the words of the verdict's column."""
    if variant == self.plan.base:
      return BASE
    names = [phase.name for phase in self.comparing]
    until_verdict = names[:names.index('confirm') + 1]
    for name in reversed(until_verdict):
      row = self.effect(name, variant, self.plan.primary.name)
      if row:
        return NOT_DONE_YET if row[
            'verdict'] == decide.PASSED else row['verdict']
    return NOT_DONE_YET

  @functools.cached_property
  def estimates(self) -> list[dict[str, Any]]:
    """A row for each measure of each variant in each phase, at each size and
    over all of them: its mean, and its difference from the base.

    The rows of the confirmation come first, and in each phase those that its
    verdict is on."""
    verdict_first = sorted(self.comparing,
                           key=lambda phase: phase.name != 'confirm')
    rows = []
    for phase in verdict_first:
      if phase.name != 'confirm' and phase.name not in self.results:
        continue
      plan = phase.narrow(self.plan)
      sizes = [*reversed(plan.sizes)]
      if len(sizes) > 1:
        sizes.insert(0, decide.ALL)
      for measure in plan.measures:
        for size in sizes:
          is_verdict = measure == plan.primary and size == sizes[0]
          for variant in self.variants:
            rows.append(self._estimate(
                phase=phase.name, measure=measure, size=size, variant=variant,
                is_verdict=is_verdict))
    return rows

  def _estimate(self, phase: str, measure: plans.Measure, size: str,
                variant: str, is_verdict: bool) -> dict[str, Any]:
    """Returns one row of `estimates`; `is_verdict` says that the verdict of the
    phase is on it."""
    values = list(self.values(phase, variant, size, measure).values())
    compared = self.effect(phase, variant, measure.name, size)

    # The variant alone.
    row: dict[str, Any] = {
        'phase': phase, 'measure': measure.name, 'variant': variant,
        'size': size, 'mean': None, 'sd': None, 'runs': len(values)}
    if values:
      row['mean'] = float(np.mean(values))
    if len(values) > 1:
      row['sd'] = float(np.std(values, ddof=1))

    # Its difference from the base over seeds, and over seeds and items.
    for name in _COMPARED:
      row[name] = compared.get(name)
    both = compared.get('both') or {}
    for name in ('effect', 'low', 'high', 'p'):
      row[f'both_{name}'] = both.get(name)
    row['verdict'] = None
    if is_verdict and phase == 'confirm':
      row['verdict'] = self.standing(variant)
    elif is_verdict:
      row['verdict'] = compared.get('verdict')

    # How the difference changes with the size, and what it is worth.
    trend = compared.get('trend') or {}
    for name in ('effect', 'low', 'high'):
      row[f'trend_{name}'] = trend.get(name)
    over_sizes = self.effect(phase, variant, measure.name)
    for by in efficiency.WAYS_TO_COUNT_SPENDING:
      speed_up = first_row_with(
          over_sizes.get('speed_ups', ()), size=size, by=by)
      row[f'speed_up_{by}'] = speed_up.get('factor')
      for name in ('low', 'high', 'fit_error'):
        row[f'speed_up_{by}_{name}'] = speed_up.get(name)
    return row

  def verdicts(self) -> list[dict[str, Any]]:
    """Returns the estimates that the verdicts are on, the base's first."""
    return self.estimates[:len(self.variants)]


def load_comparison(workdir, rows: str = '') -> Comparison:
  """Returns what lies in a workdir, from its files alone.

  Args:
    workdir: the folder of a sweep or a study.
    rows: a CSV of further variants of a sweep
      (curves.add_variants_of_csv); '': none.

  Raises:
    RequestError: where no sweep or study was run there, or a file is damaged.
  """
  if not layout.is_study(workdir):
    return _sweep(workdir, rows)
  require(not rows, f'--rows is of a sweep, and {workdir} holds '
          'a study, whose plan was written down before it ran')
  return _study(workdir)


def format_config_value(x: Any) -> str:
  """Returns a config's value as a flag would have it."""
  return x if isinstance(x, str) and x else json.dumps(x)


def format_changes(changes: Mapping[str, Any]) -> str:
  """Returns 'field=value, field=value'."""
  return ', '.join(
      f'{name}={format_config_value(x)}' for name, x in changes.items())


def changes_from_base(
    frozen: plans.Frozen, row: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a point changes in the base of its size and workload."""
  point = frozen.point(frozen.plan.base, row['size'], row['workload'])
  base = point['changes']
  changes = {}
  for name, x in row['changes'].items():
    if name not in base or base[name] != x:
      changes[name] = x
  return changes


# A study.


def _study(workdir) -> Comparison:
  """Returns what study.json and results.json of a folder say."""
  frozen = plans.load(workdir)
  results = results_lib.load(workdir)
  study = results['study']
  require(not study or study['hash'] == frozen.hash,
          f'{workdir}/{results_lib.FILE} is of another plan than study.json, '
          'whose study has to be run before it is reported')

  # The runs that have curves, and those that are left out.
  outcomes = [plans.outcome_from_json(row) for row in results['outcomes']]
  lines, excluded = {}, []
  for run in outcomes:
    if run.diverged:
      excluded.append({
          'phase': run.phase, 'variant': run.variant, 'size': run.size,
          'workload': run.workload, 'seed': run.seed, 'state': 'diverged',
          'why': 'in no mean of differences'})
      continue
    is_confirmed_text = run.phase == 'confirm' and run.workload == plans.TEXT
    if is_confirmed_text and run.curve:
      lines[run.variant, run.size, run.seed] = {'eval': run.curve}
  return Comparison(
      workdir=workdir,
      frozen=frozen,
      results=results,
      outcomes=outcomes,
      curves=lines,
      excluded=excluded,
      about=[frozen.plan.question],
      warnings=_study_warnings(frozen.plan, results),
      target=frozen.plan.target)


def _study_warnings(plan: plans.Plan, results: Mapping[str, Any]) -> list[str]:
  """Returns what a reader of a study must know before its figures."""
  warnings = []
  confirmed = results.get('confirm', ())

  # Phases that are not over, and runs that were not planned.
  over = [name for name, row in results['phases'].items() if row['finished']]
  left = [name for name in plan.seeds if name not in over]
  if left:
    verb = 'is' if len(left) == 1 else 'are'
    warnings.append(
        f'This study is not over: {", ".join(left)} {verb} to be done.')
  if results['as_planned']['differences']:
    warnings.append('What ran is not what was planned at first: see "Planned '
                    'and run".')

  # Differences that the noise may hide, or that other items may not show.
  announced = results['announced']
  if announced and not announced['enough']:
    warnings.append(announced['sentence'] + ' That no difference is shown does '
                    'not mean that there is none.')
  over_seeds_alone = _shown_over_seeds_alone(plan, confirmed)
  if over_seeds_alone:
    warnings.append(
        f'The difference of {"; ".join(over_seeds_alone)} is not shown over '
        'seeds and items (documents, questions) together: other '
        'items of their kind may show none.')

  # Values that were tuned too narrowly.
  edges = dict.fromkeys(
      row['variant'] for row in results['tuned'] if row['at_edge'])
  if edges:
    warnings.append('Tuning ended at the edge of what was tried for '
                    f'{", ".join(edges)}: a better value may lie beyond.')
  return warnings + doubt_normal_noise(plan, confirmed)


def _shown_over_seeds_alone(plan: plans.Plan,
                            rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns 'VARIANT in MEASURE' of each difference that a confirmation shows
  over seeds, and that is not shown over seeds and items together."""
  names = []
  for row in rows:
    is_shown = row['verdict'] in (decide.BETTER, decide.WORSE)
    both = row.get('both')
    if is_shown and both and both['p'] > plan.alpha:
      names.append(f'{row["variant"]} in {row["measure"]}')
  return names


def doubt_normal_noise(
    plan: plans.Plan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Says where the noise of a confirmation is not what Student's test takes it
  for, and where the robust test does not agree with it."""
  primary = [row for row in rows if row['measure'] == plan.primary.name]
  sentences = []

  # The test of the shape is one of all variants together.
  shape = 1.0
  for row in primary:
    if page.known(row.get('p_shape')):
      shape = row['p_shape']
      break
  if shape <= statistics.IRREGULAR:
    sentences.append(
        f'The differences look skewed or have outliers (p = {shape:.2g} of '
        'normal noise): p and intervals are the more cautious of Student\'s '
        'and of those by the differences of all variants together.')

  # The robust test is of each variant.
  disagreeing = []
  for row in primary:
    p, p_robust = row['p'], row.get('p_robust')
    if p is None or p_robust is None:
      continue
    if (p <= plan.alpha) != (p_robust <= plan.alpha):
      disagreeing.append(f'{row["variant"]} (p = {p:.2g} and {p_robust:.2g})')
  if disagreeing:
    sentences.append(
        'Student\'s test and the permutation test of the trimmed mean '
        f'disagree, before correction, on {", ".join(disagreeing)}.')
  return sentences


# A sweep.


def _sweep(workdir, rows: str) -> Comparison:
  """Returns what a sweep's folder says, as a study that was only confirmed;
  `rows` is a CSV of further variants, or ''."""
  sweep = curves.load_sweep(workdir)
  if rows:
    sweep = curves.add_variants_of_csv(sweep, rows)

  # The results that a study would have in its files.
  outcomes = _outcomes(sweep)
  plan = _plan(sweep, outcomes)
  records = {'confirm': decide.judge_sweep(plan, outcomes),
             'tuned': _rates(sweep),
             'provenance': {'codes': sweep.codes, 'devices': [],
                            'versions': {}}}
  results = results_lib.NOTHING | plans.to_json(records)

  # The points, and the runs that have curves or are left out.
  finished = {(run.variant, run.seed) for run in outcomes if not run.diverged}
  lines, excluded = {}, []
  for point in sweep.points:
    for seed, run in point.runs.items():
      if (point.name, seed) in finished:
        lines[point.name, '', seed] = _curves(point, seed)
      if run.diverged or not run.is_whole:
        excluded.append(_excluded(point, run))
  frozen = plans.Frozen(
      plan=plan, base_config=sweep.base_tree,
      points=[_point_row(point) for point in sweep.points], sources={}, code={})
  return Comparison(
      workdir=workdir,
      frozen=frozen,
      results=results,
      outcomes=outcomes,
      curves=lines,
      excluded=excluded,
      about=[_about(sweep)],
      warnings=_sweep_warnings(
          sweep) + doubt_normal_noise(plan, results['confirm']))


def _point_row(point: curves.Point) -> dict[str, Any]:
  """Returns the row of plans.Frozen.points of a point."""
  return {
      'variant': point.name, 'size': '', 'workload': plans.TEXT,
      'changes': point.changes, 'matched': point.matched,
      'params': point.params, 'active_params': point.active_params,
      'flops_per_token': point.flops_per_token, 'tokens': point.tokens}


def _plan(sweep: curves.Sweep, outcomes: Sequence[plans.Outcome]
          ) -> plans.Plan:
  """Returns a sweep as the plan of a study: its measures are the figures that
  its runs have."""
  # The loss comes first, whatever the runs have.
  figures = ['loss']
  for run in outcomes:
    figures += run.values
  measures = []
  for name in dict.fromkeys(figures):
    measures.append(plans.Measure(
        name=name, workload=plans.TEXT, figure=name, better=plans.LOWER,
        chance=math.nan))
  variants = tuple(point.name for point in sweep.points
                   if point is not sweep.base)
  return plans.Plan(
      name=sweep.name,
      question='',
      file=sweep.file,
      base=sweep.base.name,
      variants=variants,
      sizes=('',),
      workloads=(plans.TEXT,),
      measures=tuple(measures),
      seeds={'confirm': len(sweep.base.runs)},
      tuning=plans.Tuning(fields={LEARNING_RATE_FIELD: ()}, rungs=1),
      effect=0.0,
      match=sweep.match)


def _curves(point: curves.Point, seed: int) -> dict[str, dict[str, list]]:
  """Returns the curves that a run has, by figure."""
  each = {}
  for name in curves.FIGURES:
    curve = point.curve(seed, name)
    if curve:
      each[name] = curve
  return each


def _excluded(point: curves.Point, run: curves.Run) -> dict[str, Any]:
  """Returns the row of Comparison.excluded of a run."""
  why = run.error.strip()
  if not why and run.state == 'done':
    why = 'no finite held-out loss at the last step (eval.every_steps)'
  state = run.state
  if run.diverged:
    state = 'diverged'
  return {'phase': '', 'variant': point.name, 'size': '', 'workload': '',
          'seed': run.seed, 'state': state, 'why': why}


def _outcomes(sweep: curves.Sweep) -> list[plans.Outcome]:
  """Returns what became of the runs of a sweep that have a figure, and of those
  that diverged, which count as such and have no figures."""
  # A run that diverged has NaN in place of every figure that another one has.
  values, unknown = {}, {}
  for point in sweep.points:
    for seed, run in point.runs.items():
      if not run.diverged:
        figures = _values(run)
        values[point.name, seed] = figures
        unknown |= dict.fromkeys(figures, math.nan)
  outcomes = []
  for point in sweep.points:
    for seed, run in point.runs.items():
      figures = dict(unknown)
      if not run.diverged:
        figures = values[point.name, seed]
      if figures:
        outcomes.append(_outcome(point, run, figures))
  return outcomes


def _outcome(point: curves.Point, run: curves.Run, values: dict[str, float]
             ) -> plans.Outcome:
  """Returns what became of a run that has these figures."""
  # The compute and the time up to its last step.
  spent = {'flops': math.nan, 'seconds': math.nan}
  for name, column in point.curve(run.seed, 'train').items():
    spent[name] = column[-1]
  scores = {}
  for name in run.items:
    if name in values:
      scores[name] = run.items[name]
  return plans.Outcome(
      phase='confirm',
      variant=point.name,
      size='',
      workload=plans.TEXT,
      seed=run.seed,
      values=values,
      diverged=run.diverged,
      flops=spent['flops'],
      seconds=spent['seconds'],
      params=point.params,
      changes=point.changes,
      curve=point.curve(run.seed),
      items=scores)


def _values(run: curves.Run) -> dict[str, float]:
  """Returns the figures of a run after its last step.

  They are its held-out loss, fractions that tasks found, as TASK/FIGURE, and
  the last figures of its routers. Counts, groups of figures and curves are left
  out, and so is what is not finite.
  """
  values = {}
  if run.final is not None:
    values['loss'] = run.final
  values |= _task_values(run)
  if values:  # routers alone are no result
    values |= _router_values(run)
  return {name: x for name, x in values.items() if math.isfinite(x)}


def _task_values(run: curves.Run) -> dict[str, float]:
  """Returns the fractions that tasks found, while a run trained and after it.
  """
  values = {}

  # The tasks of eval.tasks, by the names in metrics.jsonl.
  held_out = run.held_out
  if held_out:
    tasks = evals.parse_task_names(run.config['eval.tasks'])
    for name, x in held_out.items():
      is_of_task = any(_is_figure_of(task, name) for task in tasks)
      if type(x) is float and is_of_task:
        values[name] = x

  # The tasks that it owed, of eval.json.
  for task, figures in run.evaluations.items():
    if not isinstance(figures, Mapping):
      continue
    for name, x in figures.items():
      if type(x) is float:
        values[f'{task}/{name}'] = x
  return values


def _router_values(run: curves.Run) -> dict[str, float]:
  """Returns the last figures of a run's routers, each a mean over layers."""
  for row in reversed(run.rows):
    if row['split'] != 'train' or row.keys().isdisjoint(curves.FIGURES):
      continue
    values = {}
    for name, words in curves.FIGURES.items():
      if name in row:
        values[words] = float(np.mean(np.asarray(row[name], float)))
    return values
  return {}


def _is_figure_of(task: str, name: str) -> bool:
  """Returns whether a name of metrics.jsonl is one of a task's own figures, and
  not of a group of them, whose names are joined there by a slash, too."""
  if name.rpartition('/')[0] == task:
    return True
  row = evals.TASKS.get(task.partition(':')[0])
  # A task of another version is not known, and most tasks have no parts.
  if row is None or row.other_groups is None:
    return False
  if not name.startswith(f'{task}/'):
    return False
  first = name.removeprefix(f'{task}/').partition('/')[0]
  return first not in row.other_groups


def _rates(sweep: curves.Sweep) -> list[dict[str, Any]]:
  """Returns the groups of points that differ in the learning rate alone, as
  plans.Tuned says what was tried."""
  # The points of each group, by the rest of what they change.
  groups: dict[str, dict[float, curves.Point]] = {}
  for point in sweep.points:
    rest = dict(point.changes)
    lr = rest.pop(LEARNING_RATE_FIELD, sweep.base_config[LEARNING_RATE_FIELD])
    groups.setdefault(format_changes(rest) or sweep.base.name, {})[lr] = point

  tuned = []
  for name, points in groups.items():
    row = _rate_row(name, points)
    if row is not None:
      tuned.append(row)
  return tuned


def _rate_row(name: str, points: Mapping[float, curves.Point]
              ) -> dict[str, Any] | None:
  """Returns what a group of points found, as plans.Tuned says it; None where
  fewer than two rates have a loss.

  Args:
    name: the name of the group.
    points: its points by their learning rate.
  """
  tried = []
  for lr in sorted(points):
    if points[lr].finals:
      tried.append(_trial(lr, points[lr]))
  if len(tried) < 2:
    return None
  best = min(tried, key=lambda trial: (trial['diverged'], trial['value']))
  at_edge = []
  if best['changes'][LEARNING_RATE_FIELD] in (min(points), max(points)):
    at_edge.append(LEARNING_RATE_FIELD)
  first = next(iter(points.values()))
  return {
      'variant': name, 'size': '', 'workload': '', 'changes': best['changes'],
      'look': first.name, 'at_edge': at_edge,
      'runs': sum(len(point.finals) for point in points.values()),
      'tried': tried}


def _trial(lr: float, point: curves.Point) -> dict[str, Any]:
  """Returns what a point found at a learning rate, as in plans.Tuned.tried."""
  losses = statistics.interval([*point.finals.values()])
  diverged = any(run.diverged for run in point.runs.values())
  return {'rung': 0, 'changes': {LEARNING_RATE_FIELD: lr}, 'diverged': diverged,
          'value': losses.mean, 'low': losses.low, 'high': losses.high}


def _about(sweep: curves.Sweep) -> str:
  """Returns a sentence that says what a sweep is."""
  matched = 'sizes are not matched'
  if sweep.match:
    matched = f'{sweep.match} matched to the base\'s within 1 %'
  paired = ('points differ in their data, so that seeds pair less than they do '
            'elsewhere')
  if sweep.paired:
    paired = 'seed by seed, every point sees the same data in the same order'
  done = sum(run.state == 'done' for run in sweep.runs)
  return (f'{sweep.file}: {len(sweep.points)} points, '
          f'{done} of {len(sweep.runs)} runs done; base '
          f'{sweep.base.name}; {matched}; {paired}.')


def _sweep_warnings(sweep: curves.Sweep) -> list[str]:
  """Returns what a reader of a sweep must know before its figures."""
  warnings = []

  # Runs that are not there.
  left = [run for run in sweep.runs
          if run.state != 'done' and not run.diverged]
  if left:
    warnings.append(f'{len(left)} of {len(sweep.runs)} runs failed or are not '
                    'done: they are listed at the end, and are in no verdict.')
  if not sweep.base.finals:
    warnings.append(f'The base {sweep.base.name} has no finished run with a '
                    'held-out loss: no loss can be compared with it.')

  # Points that cost more or less than the base.
  for name, words in _COSTS.items():
    if name == sweep.match:
      continue
    base = getattr(sweep.base, name)
    far = [point.name for point in sweep.points
           if abs(getattr(point, name) / base - 1) > 0.01]
    if far:
      warnings.append(f'The {words} of {", ".join(far)} differ from the '
                      "base's by more than 1 %.")

  # Runs of another code, or of another config.
  if len(sweep.codes) > 1:
    warnings.append(layout.describe_changed_code(sweep.codes))
  if sweep.strangers:
    warnings.append('Not of the config that sweep.json says, though in these '
                    f'figures: {"; ".join(sweep.strangers)}.')
  return warnings
