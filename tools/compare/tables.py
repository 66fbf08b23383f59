"""The tables of a report: each function returns one as rows of cells by heading
(page.Table), which is printed for a terminal, on the page and as JSON.

What the headings mean stands in templates/columns.toml.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tools.compare import certificate, curves, decide, page, statistics
from tools.compare import measures as measures_lib
from tools.compare import plan as plans
from tools.compare.comparison import BASE, Comparison, changes_from_base
from tools.compare.comparison import format_changes, format_config_value
from tools.compare.page import UNKNOWN, Cell, Table, label
from training.workdir import run_config

# The level of the test that a loss is below the target, as in the rules of
# modded-nanogpt's third track.
TARGET_LEVEL = 0.01
# The columns that count something of a phase, and their keys in results.json.
COUNT_OF_HEADING = {'runs planned at most': 'planned', 'done': 'done',
                    'diverged': 'failed', 'tokens': 'tokens'}
# The columns of further p-values, and their names in Comparison.estimates.
P_VALUE_OF_HEADING = {
    'corrected p': 'p_corrected', 'robust p': 'p_robust',
    'equivalence p': 'p_equivalent', 'no worse p': 'p_not_worse'}


# Estimates.


def verdict_table(comparison: Comparison) -> Table:
  """Returns the main table: for each variant the estimate that its verdict is
  on."""
  return estimate_table(
      comparison, name='verdicts', title='Each variant beside the base',
      rows=comparison.verdicts())


def other_table(comparison: Comparison) -> Table:
  """Returns the estimates of the confirmation that no verdict is on, such as
  those at one size or of another measure."""
  others = comparison.estimates[len(comparison.variants):]
  confirmed = [row for row in others if row['phase'] == 'confirm']
  return estimate_table(comparison, name='estimates',
                        title='Each size and measure',
                        rows=confirmed)


def estimate_table(comparison: Comparison, name: str, title: str,
                   rows: Sequence[Mapping[str, Any]]) -> Table:
  """Returns a table of means and differences from the base. Rows of which
  nothing is known are left out, and so are empty columns.

  Args:
    comparison: the sweep or study.
    name: the anchor of the table on the page.
    title: the title of the table.
    rows: the estimates, as Comparison.estimates has them. Each is about one
      measure of one variant, at one size of the model and in one phase.
  """
  # Something is known of a row if the variant has a run, a verdict, or pairs
  # with the base.
  rows = [row for row in rows
          if row['runs'] or row['verdict'] or row['n'] is not None]
  measures = {row['measure'] for row in rows}
  # A table of one measure does not name it in each row.
  names_measure = len(measures) != 1
  # The heading of the column of means.
  mean = 'held-out loss' if measures == {'loss'} else 'mean'
  cells = []
  for row in rows:
    cells.append(_estimate_cells(comparison=comparison, row=row, mean=mean,
                                 names_measure=names_measure))
  return page.table(name, title, cells)


def _estimate_cells(comparison: Comparison, row: Mapping[str, Any], mean: str,
                    names_measure: bool) -> dict[str, Cell]:
  """Returns the cells of an estimate by heading, in the order of the columns.

  Args:
    comparison: the sweep or study.
    row: the estimate, as Comparison.estimates has it.
    mean: the heading of the column of means.
    names_measure: whether the row says which measure it is of.
  """
  minus_base = _with_interval(row)
  if row['variant'] == comparison.plan.base:
    minus_base = Cell(BASE, 0.0)
  measure = ''
  if names_measure:
    measure = row['measure']
  verdict = row['verdict'] or ''
  # Where p is corrected for the other variants, it stands so alone.
  p = None
  if row['p_corrected'] is None:
    p = row['p']
  # The pairs of a difference, or else the runs of a mean.
  seeds = row['n']
  if seeds is None and row['runs']:
    seeds = row['runs']
  diverged = row['diverged']
  not_alike = ''
  if row['not_alike']:
    not_alike = 'yes'

  # The columns, in their order.
  cells = {}
  cells['variant'] = label(row['variant'])
  cells['measure'] = label(measure)
  cells['size'] = label(row['size'])
  cells[mean] = page.mean(row['mean'], row['sd'])
  cells['minus base'] = minus_base
  cells['± items'] = page.number(row['item_noise'])
  cells['over seeds and items'] = _with_interval(row, 'both_')
  cells['p over both'] = page.p_value(row['both_p'])
  cells['verdict'] = label(verdict, page.MARKS.get(verdict, ''))
  cells['not alike'] = Cell(not_alike, row['not_alike'])
  cells['p'] = page.p_value(p)
  for heading, name in P_VALUE_OF_HEADING.items():
    cells[heading] = page.p_value(row[name])
  cells['speed-up in FLOPs'] = _speed_up(row, 'flops')
  cells['speed-up in time'] = _speed_up(row, 'seconds')
  cells['trend over size'] = _with_interval(row, 'trend_')
  cells['seeds'] = page.count(seeds)
  cells['diverged'] = Cell(str(diverged or ''), diverged)
  return cells


def _with_interval(row: Mapping[str, Any], prefix: str = '') -> Cell:
  """Returns the cell of an effect with its interval.

  Args:
    row: the estimate, as Comparison.estimates has it.
    prefix: what the names of the figures begin with: '' for the difference over
      seeds, 'both_' over seeds and items, 'trend_' for the slope over sizes.
  """
  return page.estimate(row[f'{prefix}effect'], row[f'{prefix}low'],
                       row[f'{prefix}high'])


def _speed_up(row: Mapping[str, Any], by: str) -> Cell:
  """Returns the cell of a speed-up with its interval, '1.2 [1.1, 1.3]': how
  many times less compute or time a variant needs than the base.

  It is written as '~1.2' if the fit of the curves errs by more than the losses
  differ, and as '(1.2)' if no difference of the losses is shown.

  Args:
    row: the estimate of the variant, as Comparison.estimates has it.
    by: what is saved: 'flops' or 'seconds'.
  """
  factor = row[f'speed_up_{by}']
  if not page.known(factor):
    return Cell(UNKNOWN)
  text = page.estimate(
      factor, low=row[f'speed_up_{by}_low'], high=row[f'speed_up_{by}_high'],
      form='.2f').text
  # The factor is read from fitted curves. Where their error in nats is larger
  # than the difference of the losses, it is a guess.
  effect = row['effect']
  if page.known(effect) and abs(effect) < row[f'speed_up_{by}_fit_error']:
    text = f'~{text}'
  # Without a difference of the losses, a factor that is not 1 may be noise.
  if row['verdict'] in (decide.NO_NOISE, decide.NONE_SHOWN):
    text = f'({text})'
  return Cell(text, factor)


# A target.


def find_first_evaluation_below(
    curve_of_seeds: Sequence[Mapping[str, Sequence]], target: float
    ) -> dict[str, float | None]:
  """Finds the evaluation from which on the mean held-out loss of some runs is
  below a target, and returns what the runs had spent by then.

  Each evaluation is tested by Student's one-sided t-test over the seeds at
  TARGET_LEVEL. The last one is tested first, then the one before it, until one
  test fails. Because this order is fixed beforehand, the tests need no
  correction (Maurer et al. 1995): the step found is too early with a
  probability of at most TARGET_LEVEL.

  Args:
    curve_of_seeds: the curve of held-out loss of each seed, as
      curves.Point.curve returns it.
    target: the loss.

  Returns:
    The 'step', 'tokens', 'seconds' and 'p' of that evaluation. If not even the
    last one is below, only 'p', that of the last one; and {'p': None} if the
    seeds share no evaluation.
  """
  # Test each evaluation that all seeds have, by the losses of the seeds there.
  mean_curve = curves.mean_curve(curve_of_seeds)
  losses_of_seeds = []
  for curve in curve_of_seeds:
    is_shared = np.isin(curve['step'], mean_curve['step'])
    losses_of_seeds.append(np.asarray(curve['loss'], float)[is_shared])
  p_values = [statistics.p_value_below_target(losses, target)
              for losses in zip(*losses_of_seeds)]
  if not p_values:
    return {'p': None}

  # Go back from the end, as long as the evaluation before is below the target.
  # All evaluations from first_below on are; there is none yet at the start.
  first_below = len(p_values)
  while (first_below and p_values[first_below - 1] is not None
         and p_values[first_below - 1] < TARGET_LEVEL):
    first_below -= 1
  if first_below == len(p_values):
    return {'p': p_values[-1]}
  return {'step': float(mean_curve['step'][first_below]),
          'tokens': float(mean_curve['tokens'][first_below]),
          'seconds': float(mean_curve['seconds'][first_below]),
          'p': p_values[first_below]}


def target_table(comparison: Comparison) -> Table:
  """Returns the table of the steps, tokens and time that each variant needs to
  reach a target loss, at each size of the model.

  Args:
    comparison: the sweep or study. If its target is None, the table is empty.
  """
  title = f'To a held-out loss of {comparison.target}'
  if comparison.target is None:
    return page.table('target', title, [])
  rows = []
  # The largest size comes first.
  for size in reversed(comparison.plan.sizes):
    for variant in comparison.variants:
      curve_of_seeds = _curves_of_held_out_loss(comparison, variant, size)
      # A variant with a run that diverged or failed does not reach the target.
      # The mean over its other seeds would be too good.
      spent_to_target = {}
      if curve_of_seeds and not _has_lost_runs(comparison, variant, size):
        spent_to_target = find_first_evaluation_below(
            curve_of_seeds, comparison.target)
      rows.append({
          'variant': label(variant), 'size': label(size),
          'steps to target': page.count(spent_to_target.get('step')),
          'tokens to target': page.count(spent_to_target.get('tokens')),
          'time to target': page.duration(spent_to_target.get('seconds')),
          'p of target': page.p_value(spent_to_target.get('p')),
          'seeds': page.count(len(curve_of_seeds))})
  return page.table('target', title, rows)


def _curves_of_held_out_loss(comparison: Comparison, variant: str,
                             size: str) -> list[Mapping]:
  """Returns the curve of held-out losses of each seed that has one."""
  curve_of_seeds = []
  for (name, at, _), by_figure in comparison.curves.items():
    if (name, at) == (variant, size) and by_figure.get('eval'):
      curve_of_seeds.append(by_figure['eval'])
  return curve_of_seeds


def _has_lost_runs(comparison: Comparison, variant: str, size: str) -> bool:
  """Returns whether a run of a variant, of a sweep or of the confirmation of a
  study, failed, diverged or is not done."""
  for row in comparison.excluded:
    is_here = (row['variant'], row['size']) == (variant, size)
    if is_here and row['phase'] in ('', 'confirm'):
      return True
  return False


# Changes and costs.


def cost_table(comparison: Comparison) -> Table:
  """Returns the table of what each variant changes in the config, and what it
  costs at each size of the model: parameters, FLOPs, tokens and time.

  Args:
    comparison: the sweep or study.
  """
  rows = []
  for point in comparison.frozen.points:
    # A variant is planned once for each workload (the text, and probes). The
    # table has its costs on text.
    if point['workload'] != plans.TEXT:
      continue
    # Active parameters, which are those that a token uses, are shown if they
    # are not all.
    active_params = Cell('')
    if point['active_params'] != point['params']:
      active_params = _beside_base(comparison, point, 'active_params')
    seconds = _mean_seconds(comparison, point)
    changes = format_changes(changes_from_base(comparison.frozen, point))
    matched = ', '.join(point['matched'])
    rows.append({
        'variant': label(point['variant']),
        'size': label(point['size']),
        'parameters': _beside_base(comparison, point, 'params'),
        'active parameters': active_params,
        'FLOPs a token': _beside_base(comparison, point, 'flops_per_token'),
        'tokens': page.count(point['tokens']),
        'time of a run': page.duration(seconds),
        'changes': label(changes),
        'solved for': label(matched)})
  return page.table('costs', 'What each variant changes and costs', rows)


def _mean_seconds(comparison: Comparison,
                  point: Mapping[str, Any]) -> float | None:
  """Returns the mean training time of the confirmed runs of a point (a variant
  at a size on a workload); None where none ran."""
  wanted = point['variant'], point['size'], point['workload']
  seconds = []
  for run in comparison.outcomes:
    is_of_point = (run.variant, run.size, run.workload) == wanted
    if run.phase == 'confirm' and is_of_point:
      seconds.append(run.seconds)
  return float(np.mean(seconds)) if seconds else None


def _beside_base(comparison: Comparison, point: Mapping[str, Any],
                 cost: str) -> Cell:
  """Returns the cell of one cost of a variant, with its relative difference
  from that of the base: '52k (+4.0%)'.

  Args:
    comparison: the sweep or study.
    point: the variant at a size on a workload, a row of the frozen plan.
    cost: the name of the cost, such as 'params'.
  """
  if not page.known(point[cost]):
    return Cell(UNKNOWN)
  # Scale the number: each division by 1000 takes the next unit.
  scaled, units = point[cost], ['', 'k', 'M', 'G', 'T']
  while abs(scaled) >= 1000 and len(units) > 1:
    scaled /= 1000
    units.pop(0)
  text = f'{scaled:.4g}{units[0]}'

  # Add the difference from the base, unless it would be shown as 0.0 %, as it
  # is for the base itself.
  base = comparison.frozen.point(comparison.plan.base, point['size'],
                                 point['workload'])
  difference = point[cost] / base[cost] - 1
  if abs(difference) >= 5e-4:
    text += f' ({difference:+.1%})'
  return Cell(text, point[cost])


def change_table(comparison: Comparison) -> Table:
  """Returns the table of main effects of a factorial sweep, whose variants
  combine several changes of the config.

  The main effect of a change is the mean difference of all pairs of variants
  that differ in this change alone. (Fields that were set to match costs may
  differ too.) A change with fewer than 2 pairs has no row.

  Args:
    comparison: the sweep.
  """
  rows = []
  for change, pairs in _pairs_by_change(comparison).items():
    if len(pairs) < 2:
      continue
    # Use only the seeds that all pairs have, so that all pairs weigh the same.
    seeds_of_pairs = [set(difference_by_seed) for difference_by_seed in pairs]
    seeds = set.intersection(*seeds_of_pairs)
    if not seeds:
      continue

    # For each seed, average over the pairs. The interval is over the seeds.
    by_seed = []
    for seed in seeds:
      differences = [difference_by_seed[seed] for difference_by_seed in pairs]
      by_seed.append(float(np.mean(differences)))

    # For each pair, average over the seeds. The range of these means shows
    # whether the effect depends on the other changes.
    by_pair = []
    for difference_by_seed in pairs:
      by_pair.append(float(np.mean([*difference_by_seed.values()])))

    mean, low, high, _ = statistics.student_interval(by_seed)
    lowest, highest = min(by_pair), max(by_pair)
    rows.append({
        'change': label(change),
        'minus base': page.estimate(mean=mean, low=low, high=high),
        'from pair to pair': Cell(f'{lowest:+.4f} to {highest:+.4f}',
                                  lowest),
        'pairs': page.count(len(pairs))})
  return page.table('effects', 'Each change, whatever the others', rows)


def _pairs_by_change(comparison: Comparison
                     ) -> dict[str, list[dict[int, float]]]:
  """Finds, for each change of one config field, the pairs of variants that
  differ in this change alone.

  Args:
    comparison: the sweep.

  Returns:
    For each change, such as 'model.norm=rmsnorm', a list with an entry for each
    pair: the loss of the variant with the change minus that of its partner
    without it, {seed: difference}.
  """
  # Collect the changes that each variant declares. Fields that were set to
  # match the costs of the base do not count: they differ between any variants.
  declared = {}
  for point in comparison.frozen.points:
    changes = dict(point['changes'])
    for field in point['matched']:
      changes.pop(field, None)
    declared[point['variant']] = changes

  # The losses of each variant, by seed. A sweep has one size, named ''.
  losses = {}
  for variant in comparison.variants:
    losses[variant] = comparison.values(
        phase='confirm', variant=variant, size='',
        measure=comparison.plan.primary)

  # Pair each variant, for each of its changes, with the variant that declares
  # exactly its other changes.
  pairs: dict[str, list[dict[int, float]]] = {}
  for variant, changes in declared.items():
    for field, value in changes.items():
      pairs_of_change = pairs.setdefault(format_changes({field: value}), [])
      other_changes = dict(changes)
      del other_changes[field]
      for partner, partner_changes in declared.items():
        if partner_changes == other_changes:
          difference = _difference_by_seed(losses[variant], losses[partner])
          if difference:
            pairs_of_change.append(difference)
  return pairs


def _difference_by_seed(ours: Mapping[int, float], theirs: Mapping[int, float]
                        ) -> dict[int, float]:
  """Returns our loss minus the other one at each seed that has both."""
  return {seed: ours[seed] - theirs[seed]
          for seed in ours.keys() & theirs.keys()}


# Tuning and noise.


def tuning_table(comparison: Comparison) -> Table:
  """Returns the table of tuning: the values that were tried for each variant,
  the best of them, and how sure that choice is."""
  rows = [_tuning_cells(comparison, row) for row in comparison.results['tuned']]
  return page.table('tuned', 'What was tried for each variant', rows)


def _tuning_cells(comparison: Comparison, row: Mapping[str, Any]
                  ) -> dict[str, Cell]:
  """Returns the cells of what tuning found for one variant, by heading.

  Args:
    comparison: the study.
    row: the fields of a plans.Tuned: the values that were chosen, and in
      'tried' a trial for each candidate of each rung (of successive halving).
  """
  trials = row['tried']
  # The first measure of the workload is the one that was tuned for.
  measure, *_ = (
      comparison.plan.measures_of_workload(row['workload'])
      or (comparison.plan.primary,))

  # The values that were tried of each field.
  tried = []
  for name in row['changes']:
    values = sorted({trial['changes'][name] for trial in trials})
    tried.append(f'{name}: {", ".join(map(format_config_value, values))}')

  # The chosen candidate has a trial in each rung; the last of them, of the most
  # steps, is kept. Trials of the last rung on are whole runs: how far their
  # mean lies from the best says how much the values matter.
  best_value = None
  whole_runs = []
  for trial in trials:
    if trial['changes'] == row['changes']:
      best_value = trial['value']
    if trial['rung'] >= comparison.plan.tuning.rungs - 1:
      whole_runs.append(trial['value'])
  sensitivity = None
  if whole_runs and None not in whole_runs:
    sensitivity = abs(sum(whole_runs) / len(whole_runs) - best_value)
  diverged = sum(bool(trial['diverged']) for trial in trials)
  return {
      'variant': label(row['variant']),
      'size': label(row['size']),
      'workload': label(row['workload']),
      'chosen': label(format_changes(row['changes'])),
      'tried': label('; '.join(tried)),
      'at the edge': label(', '.join(row['at_edge']) or 'no'),
      'best': page.number(best_value),
      'next best': _next_best(comparison, row, measure),
      'on fresh seeds': _on_fresh_seeds(comparison, row, measure),
      'sensitivity': page.number(sensitivity),
      'runs': page.count(row['runs']),
      'diverged': Cell(str(diverged or ''), diverged)}


def _on_fresh_seeds(comparison: Comparison, row: Mapping[str, Any],
                    measure: plans.Measure) -> Cell:
  """Returns the cell of the mean of a measure over the seeds of the screening:
  no values were chosen by these, so it is free of the bias of the choice."""
  screened = comparison.values('screen', row['variant'], row['size'], measure)
  values = [*screened.values()]
  if len(values) < 2:
    return Cell(UNKNOWN)
  return page.mean(float(np.mean(values)), float(np.std(values, ddof=1)))


def _next_best(comparison: Comparison, row: Mapping[str, Any],
               measure: plans.Measure
               ) -> Cell:
  """Returns the cell that says how much worse the second-best values of tuning
  are than the chosen ones: their mean difference, paired by seed.

  Args:
    comparison: the study.
    row: what tuning found for one variant, with the fields of plans.Tuned. Its
      'tried' has a trial for each candidate.
    measure: the measure that was tuned for.
  """
  # Tuning goes in rungs of rising length, and only the trials from the last one
  # on are of whole runs.
  trials = []
  for trial in row['tried']:
    is_whole = trial['rung'] >= comparison.plan.tuning.rungs - 1
    if is_whole and not trial['diverged'] and page.known(trial['value']):
      trials.append(trial)
  if len(trials) < 2:
    return Cell(UNKNOWN)

  def order(trial: Mapping[str, Any]) -> tuple[bool, float]:
    """Returns a key that sorts the chosen values first, then better ones."""
    is_other = trial['changes'] != row['changes']
    return is_other, -measure.sign * trial['value']

  chosen, next_best, *_ = sorted(trials, key=order)
  differences = np.subtract(
      next_best.get('values', [next_best['value']]),
      chosen.get('values', [chosen['value']]))

  # The interval is over seeds. If a trial has only its mean, there is none.
  mean, low, high, _ = statistics.student_interval(differences)
  return page.estimate(mean=mean, low=low, high=high)


def noise_table(comparison: Comparison) -> Table:
  """Returns the table of the noise: how far the base differs from itself, and
  which effects can be found beside that."""
  rows = [_noise_cells(row) for row in comparison.results['noise']]
  wanted = measures_lib.format_amount(comparison.frozen, comparison.plan.effect)
  return page.table('noise-table', 'Base against base; wanted is an effect of '
                    + wanted, rows)


def _noise_cells(row: Mapping[str, Any]) -> dict[str, Cell]:
  """Returns the cells of one row of the table of noise, by heading: how much a
  measure varies from seed to seed, and what that means for the tests.

  Args:
    row: the fields of a noise.Noise. It is about one measure at one size of the
      model. Some fields may be missing.
  """
  cells = {}
  for name in ('measure', 'size', 'phase'):
    cells[name] = label(row[name])
  # The standard deviation of paired differences; the smallest effect that the
  # planned seeds can find, and the seeds that the planned effect needs.
  cells['pairs'] = page.count(row['pairs'])
  cells['standard deviation'] = page.number(row['sd'])
  cells['smallest effect'] = page.number(row['smallest_effect'])
  cells['seeds'] = page.count(row['seeds'])
  cells['seeds needed'] = page.count(row['seeds_needed'])
  cells['power'] = page.number(row['power'], '.0%')
  # Whether the measure is worth its tests, and whether Student's test may be
  # trusted.
  cells['signal to noise'] = page.number(row.get('snr'), '.1f')
  cells['p of skew'] = page.p_value(row.get('skew'))
  cells['p of outliers'] = page.p_value(row.get('outliers'))
  cells['error'] = page.number(row.get('error'), '.2g')
  return cells


# Sizes.


def multiplier_table(comparison: Comparison) -> Table:
  """Returns the table of compute multipliers: how many times the compute of a
  variant the base needs for the same loss. They are given at each size of the
  model alone, and by one scaling law fitted to all sizes.

  Args:
    comparison: the study.
  """
  rows: dict[tuple[str, str], dict[str, Cell]] = {}
  # A sweep or study without the figures has no rows, and the table is empty.
  for verdict in comparison.results.get('confirm', ()):
    variant = verdict['variant']
    for multiplier in verdict.get('multipliers', ()):
      # A row for each variant and size, to which each way to count compute adds
      # a column of its own.
      size = multiplier['size']
      if (variant, size) not in rows:
        rows[variant, size] = {
            'variant': label(variant), 'size': label(size),
            'floor': page.number(multiplier['floor'], '.3f')}
      rows[variant, size][multiplier['by']] = page.estimate(
          mean=multiplier['factor'], low=multiplier['low'],
          high=multiplier['high'], form='.3f')
  return page.table('multipliers', 'Compute multipliers', [*rows.values()])


def rank_table(comparison: Comparison) -> Table:
  """Returns the table that says how well small models rank the variants. For
  each size it has Kendall's tau between the order of the variants there and
  their order at the largest size: 1 if the orders are equal, and -1 if one is
  the reverse of the other. The base counts as a variant.

  Args:
    comparison: the study.
  """
  from scipy.stats import kendalltau
  # At each size, collect the difference of each variant from the base: the base
  # itself first, and NaN for what is not known.
  by_size = {}
  for size in comparison.plan.all_sizes:
    phase = 'largest' if size == comparison.plan.largest else 'confirm'
    differences = [0.0]  # the base's own
    for variant in comparison.plan.variants:
      effect = comparison.effect(
          phase=phase, variant=variant, measure=comparison.plan.primary.name,
          size=size)
      differences.append(effect.get('effect'))
    by_size[size] = np.array(differences, float)

  # Keep the sizes at which two variants or more are known besides the base. The
  # largest of them comes last, and the others are compared with it.
  known_sizes = [size for size, differences in by_size.items()
                 if np.isfinite(differences).sum() > 2]
  rows = []
  for size in known_sizes[:-1]:
    largest = known_sizes[-1]
    # Variants that are not known at both sizes are left out.
    tau, _ = kendalltau(by_size[size], by_size[largest], nan_policy='omit')
    rows.append({'size': label(size), 'compared with': label(largest),
                 'Kendall\'s tau': page.number(float(tau), '.2f')})
  return page.table('ranks', 'Is the order that of the largest size?', rows)


def prediction_table(comparison: Comparison) -> Table:
  """Returns the table of the predictions that were made for the largest size of
  the model, by a scaling law of the smaller sizes, beside what was observed
  there.

  Args:
    comparison: the study. If nothing was predicted, the table is empty.
  """
  prediction = comparison.results['predicted']
  title = f'{comparison.plan.largest}, by the law of the other sizes'
  if not prediction:
    return page.table('predictions', title, [])

  # Collect what was observed in the same terms as the predictions: the loss of
  # the base, and the difference of each variant from it.
  observations = {}
  primary = comparison.plan.primary.name
  for estimate in comparison.estimates:
    is_primary = estimate['measure'] == primary
    if estimate['phase'] == 'largest' and is_primary:
      is_base = estimate['variant'] == comparison.plan.base
      figure = 'mean' if is_base else 'effect'
      observations[estimate['variant']] = estimate[figure]

  # Compare each prediction with it. An array of floats turns None into NaN, and
  # so a difference from an unknown value is NaN too.
  rows = []
  for row in prediction['rows']:
    observed, predicted, low, high = np.array(
        [observations.get(row['variant']), row['value'], row['low'],
         row['high']], float)
    inside = 'yes' if low <= observed <= high else 'no'
    # If either is not known, it is neither inside nor outside.
    if np.isnan(observed - low):
      inside = ''
    rows.append({
        'variant': label(row['variant']),
        'predicted': page.estimate(predicted, low, high),
        'observed': page.number(observed, '+.4f'),
        'off by': page.number(observed - predicted, '+.4f'),
        'inside': label(inside)})
  return page.table('predictions', title, rows)


# The record.


def excluded_table(comparison: Comparison) -> Table:
  """Returns the table of runs that failed, diverged or are not done, and why.

  Args:
    comparison: the sweep or study.
  """
  # Runs that only differ in their seed share a row.
  names = ('variant', 'phase', 'size', 'workload', 'state', 'why')
  groups: dict[tuple, list[str]] = {}
  for row in comparison.excluded:
    group = tuple(row[name] for name in names)
    groups.setdefault(group, []).append(str(row['seed']))
  rows = []
  for group, seeds in groups.items():
    cells = dict(zip(names, map(label, group)))
    cells['seeds left out'] = label(', '.join(seeds))
    rows.append(cells)
  return page.table('excluded', 'Runs that failed, diverged or are not done',
                    rows)


def spent_table(comparison: Comparison) -> Table:
  """Returns the table of the runs, tokens, FLOPs and time that each phase of a
  study took, and all phases together.

  Args:
    comparison: the study. For a sweep, which has no phases, the table is empty.
  """
  # The sum comes last, below the phases in their order.
  phases = dict(comparison.results['phases'])
  if phases:
    phases['all'] = _sums([*phases.values()])
  rows = []
  for phase, row in phases.items():
    cells = {'phase': label(phase)}
    # Counts first, then what has units.
    for heading, name in COUNT_OF_HEADING.items():
      cells[heading] = page.count(row[name])
    cells['FLOPs'] = page.number(row['flops'], '.3g')
    cells['training time'] = page.duration(row['seconds'])
    rows.append(cells)
  return page.table('spent', 'Spent, by phase', rows)


def _sums(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
  """Returns the sum of each column; what is not known counts as 0."""
  sums = dict.fromkeys(rows[0], 0.0)
  for row in rows:
    for key in sums:
      sums[key] += row[key] or 0.0
  return sums


def certificate_table(comparison: Comparison) -> Table:
  """Returns the table of what each variant and the base were given, such as
  tokens, trials of tuning and devices, so that a reader can see whether the
  comparison is fair. The fields of configs are in other tables.

  Args:
    comparison: the sweep or study. Its certificates list what each was given.
  """
  # Quantities with a tolerance are numbers. Of the others, some are texts.
  rows = []
  for variant, given in comparison.certificates.items():
    cells = {'variant': label(variant)}
    for name, quantity in certificate.QUANTITIES.items():
      if quantity.tolerance is not None:
        cells[quantity.title] = page.number(given.get(name), '.4g')
      elif name in ('tuning', 'seeds', 'code', 'devices'):
        words = certificate.format_value(given.get(name, ''))
        cells[quantity.title] = label(words)
    rows.append(cells)
  return page.table('given', 'What both sides were given', rows)


def config_table(comparison: Comparison) -> Table:
  """Returns the table of every field of the config that all runs start from."""
  rows = []
  for name, x in run_config.flatten(comparison.frozen.base_config).items():
    rows.append({'field': label(name), 'value': Cell(format_config_value(x))})
  return page.table('config', 'The config that all runs change', rows)


def provenance_table(comparison: Comparison) -> Table:
  """Returns the table of what the runs were trained with: the code, devices,
  versions of packages, and hashes of the data.

  Args:
    comparison: the sweep or study.
  """
  # Collect pairs of a kind of thing, and which one it is. There may be several
  # of a kind.
  provenance = comparison.results['provenance']
  things = []
  # Only a study was planned beforehand.
  if comparison.is_study:
    commit = comparison.frozen.code.get('commit')
    date = plans.format_date(comparison.frozen.time)
    things.append(('plan', f'{comparison.frozen.hash}, frozen on {date} at '
                   f'commit {commit}'))
  for code in provenance['codes']:
    things.append(('code', code))
  for device in provenance['devices']:
    things.append(('device', device))
  for name, version in provenance['versions'].items():
    things.append(('version', f'{name} {version}'))
  for name, digest in comparison.frozen.sources.items():
    things.append(('hash', f'{name}: {digest}'))
  rows = []
  for kind, which in things:
    rows.append({'what': label(kind), 'which': Cell(which)})
  return page.table('code', 'Code, machines and data', rows)
