"""The tables of a report: each is described once, as rows of cells by heading
(page.Table), and printed for a terminal, on the page and as JSON.

What the headings mean stands in templates/columns.toml. In all functions `c` is
the Comparison that is reported.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tools.compare import curves, decide, page, statistics
from tools.compare import measures as measures_lib
from tools.compare import plan as plans
from tools.compare.comparison import BASE, Comparison, changes_from_base
from tools.compare.comparison import format_changes, format_config_value
from tools.compare.page import UNKNOWN, Cell, Table, label
from training.workdir import run_config

TARGET_LEVEL = 0.01  # as in the rules of modded-nanogpt's third track
# The counts of a phase, by heading.
COUNTS = {'runs planned at most': 'planned', 'done': 'done',
          'diverged': 'failed', 'tokens': 'tokens'}
# The further p of an estimate, by heading.
P_VALUES = {'corrected p': 'p_corrected', 'robust p': 'p_robust',
            'equivalence p': 'p_equivalent', 'no worse p': 'p_not_worse'}


# Estimates.


def verdict_table(c: Comparison) -> Table:
  """Returns the estimates that the verdicts are on."""
  return estimate_table(
      c, name='verdicts', title='Each variant beside the base',
      rows=c.verdicts())


def other_table(c: Comparison) -> Table:
  """Returns the estimates of the confirmation that no verdict is on."""
  others = c.estimates[len(c.variants):]
  confirmed = [row for row in others if row['phase'] == 'confirm']
  return estimate_table(c, name='estimates', title='Each size and measure',
                        rows=confirmed)


def estimate_table(c: Comparison, name: str, title: str,
                   rows: Sequence[Mapping[str, Any]]) -> Table:
  """Returns estimates as a table, without those of which nothing is known and
  the columns that say nothing of them.

  Args:
    c: the Comparison.
    name: the anchor of the table.
    title: its title.
    rows: rows of Comparison.estimates.
  """
  rows = [row for row in rows
          if row['runs'] or row['verdict'] or row['n'] is not None]
  measures = {row['measure'] for row in rows}
  # A table of one measure does not name it in each row.
  names_measure = len(measures) != 1
  mean = 'held-out loss' if measures == {'loss'} else 'mean'
  cells = []
  for row in rows:
    cells.append(_estimate_cells(c=c, row=row, mean=mean,
                                 names_measure=names_measure))
  return page.table(name, title, cells)


def _estimate_cells(c: Comparison, row: Mapping[str, Any], mean: str,
                    names_measure: bool) -> dict[str, Cell]:
  """Returns the row of an estimate.

  Args:
    c: the Comparison.
    row: the row of Comparison.estimates.
    mean: the heading of its mean.
    names_measure: whether it says which measure it is of.
  """
  minus_base = _with_interval(row)
  if row['variant'] == c.plan.base:
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
  cells['p'] = page.p_value(p)
  for heading, name in P_VALUES.items():
    cells[heading] = page.p_value(row[name])
  cells['speed-up in FLOPs'] = _speed_up(row, 'flops')
  cells['speed-up in time'] = _speed_up(row, 'seconds')
  cells['trend over size'] = _with_interval(row, 'trend_')
  cells['seeds'] = page.count(seeds)
  cells['diverged'] = Cell(str(diverged or ''), diverged)
  return cells


def _with_interval(row: Mapping[str, Any], prefix: str = '') -> Cell:
  """Returns an effect of an estimate with its interval."""
  return page.estimate(row[f'{prefix}effect'], row[f'{prefix}low'],
                       row[f'{prefix}high'])


def _speed_up(row: Mapping[str, Any], by: str) -> Cell:
  """Returns '1.2 [1.1, 1.3]'; ~ where the curves' fit errs by more than the
  difference, in brackets where no difference is shown."""
  factor = row[f'speed_up_{by}']
  if not page.known(factor):
    return Cell(UNKNOWN)
  text = page.estimate(
      factor, low=row[f'speed_up_{by}_low'], high=row[f'speed_up_{by}_high'],
      form='.2f').text
  effect = row['effect']
  if page.known(effect) and abs(effect) < row[f'speed_up_{by}_fit_error']:
    text = f'~{text}'
  if row['verdict'] in (decide.NO_NOISE, decide.NONE_SHOWN):
    text = f'({text})'
  return Cell(text, factor)


# A target.


def reached(each: Sequence[Mapping[str, Sequence]], target: float
            ) -> dict[str, float | None]:
  """Returns what runs spend to reach a loss.

  That is 'step', 'tokens' and 'seconds' of the first evaluation from which on
  their mean loss is below the target, with a one-sided p below TARGET_LEVEL,
  and this 'p'; where there is none, the p of the last evaluation alone.

  The last evaluation is tested first, then the one before it, until one is not
  below. In an order that is fixed beforehand no test has to be corrected
  (Maurer et al. 1995): that any step is named too early has a probability of
  at most TARGET_LEVEL.

  Args:
    each: the curve of each seed.
    target: the loss.
  """
  # A p for each evaluation that all seeds have.
  at = curves.mean_curve(each)
  losses = []
  for curve in each:
    is_shared = np.isin(curve['step'], at['step'])
    losses.append(np.asarray(curve['loss'], float)[is_shared])
  ps = [statistics.p_value_below_target(seeds, target)
        for seeds in zip(*losses)]
  if not ps:
    return {'p': None}

  # From the last one back.
  first = len(ps)
  while first and ps[first - 1] is not None and ps[first - 1] < TARGET_LEVEL:
    first -= 1
  if first == len(ps):
    return {'p': ps[-1]}
  return {'step': float(at['step'][first]),
          'tokens': float(at['tokens'][first]),
          'seconds': float(at['seconds'][first]), 'p': ps[first]}


def target_table(c: Comparison) -> Table:
  """Returns what each variant spends to reach the target at each size. A run
  that diverged or failed never does, and so neither does its variant."""
  title = f'To a held-out loss of {c.target}'
  if c.target is None:
    return page.table('target', title, [])
  rows = []
  for size in reversed(c.plan.sizes):
    for variant in c.variants:
      each = _evaluations(c, variant, size)
      spent = {}
      if each and not _has_lost_runs(c, variant, size):
        spent = reached(each, c.target)
      rows.append({
          'variant': label(variant), 'size': label(size),
          'steps to target': page.count(spent.get('step')),
          'tokens to target': page.count(spent.get('tokens')),
          'time to target': page.duration(spent.get('seconds')),
          'p of target': page.p_value(spent.get('p')),
          'seeds': page.count(len(each))})
  return page.table('target', title, rows)


def _evaluations(c: Comparison, variant: str, size: str) -> list[Mapping]:
  """Returns the curve of held-out losses of each seed that has one."""
  each = []
  for (name, at, _), by_figure in c.curves.items():
    if (name, at) == (variant, size) and by_figure.get('eval'):
      each.append(by_figure['eval'])
  return each


def _has_lost_runs(c: Comparison, variant: str, size: str) -> bool:
  """Returns whether a run of the confirmation, or of a sweep, is excluded."""
  for row in c.excluded:
    is_here = (row['variant'], row['size']) == (variant, size)
    if is_here and row['phase'] in ('', 'confirm'):
      return True
  return False


# Changes and costs.


def costs(c: Comparison) -> Table:
  """Returns what each variant costs at each size, and what it changes."""
  rows = []
  for point in c.frozen.points:
    if point['workload'] != plans.TEXT:
      continue
    # Active parameters are said where they are not all.
    active = Cell('')
    if point['active_params'] != point['params']:
      active = _beside_base(c, point, 'active_params')
    seconds = _mean_seconds(c, point)
    changes = format_changes(changes_from_base(c.frozen, point))
    matched = ', '.join(point['matched'])
    rows.append({
        'variant': label(point['variant']),
        'size': label(point['size']),
        'parameters': _beside_base(c, point, 'params'),
        'active parameters': active,
        'FLOPs a token': _beside_base(c, point, 'flops_per_token'),
        'tokens': page.count(point['tokens']),
        'time of a run': page.duration(seconds),
        'changes': label(changes),
        'solved for': label(matched)})
  return page.table('costs', 'What each variant changes and costs', rows)


def _mean_seconds(c: Comparison, point: Mapping[str, Any]) -> float | None:
  """Returns the time of a confirmed run of a point; None where none ran."""
  wanted = point['variant'], point['size'], point['workload']
  seconds = []
  for run in c.outcomes:
    is_of_point = (run.variant, run.size, run.workload) == wanted
    if run.phase == 'confirm' and is_of_point:
      seconds.append(run.seconds)
  return float(np.mean(seconds)) if seconds else None


def _beside_base(c: Comparison, point: Mapping[str, Any], cost: str) -> Cell:
  """Returns '52k (+4.0%)': a cost of a point, and how far it is from that of
  the base."""
  if not page.known(point[cost]):
    return Cell(UNKNOWN)
  # In thousands, millions and so on.
  scaled, units = point[cost], ['', 'k', 'M', 'G', 'T']
  while abs(scaled) >= 1000 and len(units) > 1:
    scaled /= 1000
    units.pop(0)
  text = f'{scaled:.4g}{units[0]}'
  # A share that would be shown as 0 is left out.
  base = c.frozen.point(c.plan.base, point['size'], point['workload'])
  more = point[cost] / base[cost] - 1
  if abs(more) >= 5e-4:
    text += f' ({more:+.1%})'
  return Cell(text, point[cost])


def effects(c: Comparison) -> Table:
  """Returns each change alone: the mean over all pairs of points that differ in
  it and in nothing else, what was matched aside; no row where a change has less
  than 2 pairs."""
  rows = []
  for change, pairs in _pairs(c).items():
    if len(pairs) < 2:
      continue
    # Seeds that only some pairs have would weigh these pairs alone.
    seeds = set.intersection(*map(set, pairs))
    if not seeds:
      continue

    # The mean over the pairs of each seed, and over the seeds of each pair.
    by_seed = []
    for seed in seeds:
      differences = [pair[seed] for pair in pairs]
      by_seed.append(float(np.mean(differences)))
    by_pair = []
    for pair in pairs:
      by_pair.append(float(np.mean([*pair.values()])))

    mean, low, high, _ = statistics.student_interval(by_seed)
    least, most = min(by_pair), max(by_pair)
    rows.append({
        'change': label(change),
        'minus base': page.estimate(mean=mean, low=low, high=high),
        'from pair to pair': Cell(f'{least:+.4f} to {most:+.4f}', least),
        'pairs': page.count(len(pairs))})
  return page.table('effects', 'Each change, whatever the others', rows)


def _pairs(c: Comparison) -> dict[str, list[dict[int, float]]]:
  """Returns, by change, the difference of each pair of points that differ in it
  alone, by seed."""
  # The changes that each variant declares, without what was solved for.
  declared = {}
  for point in c.frozen.points:
    changes = dict(point['changes'])
    for field in point['matched']:
      changes.pop(field, None)
    declared[point['variant']] = changes

  # The partner of a variant for a change declares all of its others.
  losses = {variant: c.values('confirm', variant, '', c.plan.primary)
            for variant in c.variants}
  pairs: dict[str, list[dict[int, float]]] = {}
  for variant, changes in declared.items():
    for field, x in changes.items():
      of_change = pairs.setdefault(format_changes({field: x}), [])
      rest = dict(changes)
      del rest[field]
      for partner, partner_changes in declared.items():
        if partner_changes == rest:
          difference = _difference(losses[variant], losses[partner])
          if difference:
            of_change.append(difference)
  return pairs


def _difference(ours: Mapping[int, float], theirs: Mapping[int, float]
                ) -> dict[int, float]:
  """Returns the difference of two points at each seed that both have."""
  return {seed: ours[seed] - theirs[seed]
          for seed in ours.keys() & theirs.keys()}


# Tuning and noise.


def tuning(c: Comparison) -> Table:
  """Returns the values that were tried for each variant, and the best of them.
  """
  rows = [_tuning_cells(c, row) for row in c.results['tuned']]
  return page.table('tuned', 'What was tried for each variant', rows)


def _tuning_cells(c: Comparison, row: Mapping[str, Any]) -> dict[str, Cell]:
  """Returns the row of a plans.Tuned."""
  trials = row['tried']
  measure, *_ = c.plan.measures_of_workload(row['workload']) or (c.plan.primary,
                                                                 )

  # The values that were tried of each field.
  tried = []
  for name in row['changes']:
    values = sorted({trial['changes'][name] for trial in trials})
    tried.append(f'{name}: {", ".join(map(format_config_value, values))}')

  # The measure at the end of each trial, and how far that hangs on the values.
  best = None
  last = []
  for trial in trials:
    if trial['changes'] == row['changes']:
      best = trial['value']
    if trial['rung'] >= c.plan.tuning.rungs - 1:
      last.append(trial['value'])
  sensitivity = None
  if last and None not in last:
    sensitivity = abs(sum(last) / len(last) - best)
  diverged = sum(bool(trial['diverged']) for trial in trials)
  return {
      'variant': label(row['variant']),
      'size': label(row['size']),
      'workload': label(row['workload']),
      'chosen': label(format_changes(row['changes'])),
      'tried': label('; '.join(tried)),
      'at the edge': label(', '.join(row['at_edge']) or 'no'),
      'best': page.number(best),
      'next best': _next_best(c, row, measure),
      'on fresh seeds': _on_fresh_seeds(c, row, measure),
      'sensitivity': page.number(sensitivity),
      'runs': page.count(row['runs']),
      'diverged': Cell(str(diverged or ''), diverged)}


def _on_fresh_seeds(c: Comparison, row: Mapping[str, Any],
                    measure: plans.Measure) -> Cell:
  """Returns the measure on the seeds of the screening, on which nothing was
  chosen."""
  screened = c.values('screen', row['variant'], row['size'], measure)
  values = [*screened.values()]
  if len(values) < 2:
    return Cell(UNKNOWN)
  return page.mean(float(np.mean(values)), float(np.std(values, ddof=1)))


def _next_best(c: Comparison, row: Mapping[str, Any], measure: plans.Measure
               ) -> Cell:
  """Returns the candidate after the chosen one minus it, over the seeds of
  tuning."""
  # The trials of the last rung on, which alone are of whole runs.
  trials = []
  for trial in row['tried']:
    is_whole = trial['rung'] >= c.plan.tuning.rungs - 1
    if is_whole and not trial['diverged'] and page.known(trial['value']):
      trials.append(trial)
  if len(trials) < 2:
    return Cell(UNKNOWN)

  def order(trial: Mapping[str, Any]) -> tuple[bool, float]:
    """Returns what is less of the chosen one, and then of a better one."""
    is_other = trial['changes'] != row['changes']
    return is_other, -measure.sign * trial['value']

  chosen, second, *_ = sorted(trials, key=order)
  apart = np.subtract(second.get('values', [second['value']]),
                      chosen.get('values', [chosen['value']]))
  mean, low, high, _ = statistics.student_interval(apart)
  return page.estimate(mean=mean, low=low, high=high)


def noise(c: Comparison) -> Table:
  """Returns what a variant without effect shows, and what can be found beside
  it."""
  rows = [_noise_cells(row) for row in c.results['noise']]
  wanted = measures_lib.format_amount(c.frozen, c.plan.effect)
  return page.table('noise-table', 'Base against base; wanted is an effect of '
                    + wanted, rows)


def _noise_cells(row: Mapping[str, Any]) -> dict[str, Cell]:
  """Returns the row of a noise.Noise."""
  cells = {}
  for name in ('measure', 'size', 'phase'):
    cells[name] = label(row[name])
  cells['pairs'] = page.count(row['pairs'])
  cells['standard deviation'] = page.number(row['sd'])
  cells['smallest effect'] = page.number(row['smallest_effect'])
  cells['seeds'] = page.count(row['seeds'])
  cells['seeds needed'] = page.count(row['seeds_needed'])
  cells['power'] = page.number(row['power'], '.0%')
  cells['signal to noise'] = page.number(row.get('snr'), '.1f')
  cells['p of skew'] = page.p_value(row.get('skew'))
  cells['p of outliers'] = page.p_value(row.get('outliers'))
  cells['error'] = page.number(row.get('error'), '.2g')
  return cells


# Sizes.


def multipliers(c: Comparison) -> Table:
  """Returns compute multipliers at each size and of one fit of all."""
  rows: dict[tuple[str, str], dict[str, Cell]] = {}
  for verdict in c.results.get('confirm', ()):
    variant = verdict['variant']
    for multiplier in verdict.get('multipliers', ()):
      # Each way to count stands in a column of its own.
      size = multiplier['size']
      if (variant, size) not in rows:
        rows[variant, size] = {
            'variant': label(variant), 'size': label(size),
            'floor': page.number(multiplier['floor'], '.3f')}
      rows[variant, size][multiplier['by']] = page.estimate(
          mean=multiplier['factor'], low=multiplier['low'],
          high=multiplier['high'], form='.3f')
  return page.table('multipliers', 'Compute multipliers', [*rows.values()])


def ranks(c: Comparison) -> Table:
  """Returns how far the order of the variants, the base among them, is the same
  at a size as at the largest: Kendall's tau."""
  from scipy.stats import kendalltau
  # The difference of each variant from the base, by size.
  by_size = {}
  for size in c.plan.all_sizes:
    phase = 'largest' if size == c.plan.largest else 'confirm'
    differences = [0.0]  # the base's own
    for variant in c.plan.variants:
      effect = c.effect(phase, variant, c.plan.primary.name, size)
      differences.append(effect.get('effect'))
    by_size[size] = np.array(differences, float)

  # The sizes that have an order, beside the last of them.
  ordered = [size for size, x in by_size.items() if np.isfinite(x).sum() > 2]
  rows = []
  for size in ordered[:-1]:
    last = ordered[-1]
    tau, _ = kendalltau(by_size[size], by_size[last], nan_policy='omit')
    rows.append({'size': label(size), 'compared with': label(last),
                 'Kendall\'s tau': page.number(float(tau), '.2f')})
  return page.table('ranks', 'Is the order that of the largest size?', rows)


def predictions(c: Comparison) -> Table:
  """Returns what was predicted for the largest size, and what was seen there.
  """
  record = c.results['predicted']
  title = f'{c.plan.largest}, by the law of the other sizes'
  if not record:
    return page.table('predictions', title, [])
  # The loss of the base, and the differences of the variants from it.
  seen = {}
  for row in c.estimates:
    if (row['phase'], row['measure']) == ('largest', c.plan.primary.name):
      is_base = row['variant'] == c.plan.base
      seen[row['variant']] = row['mean'] if is_base else row['effect']
  rows = []
  for row in record['rows']:
    observed, predicted, low, high = np.array(
        [seen.get(row['variant']), row['value'], row['low'], row['high']],
        float)
    inside = 'yes' if low <= observed <= high else 'no'
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


def excluded(c: Comparison) -> Table:
  """Returns the runs that failed, diverged or are not done, and why."""
  # Runs that only differ in their seed share a row.
  names = ('variant', 'phase', 'size', 'workload', 'state', 'why')
  groups: dict[tuple, list[str]] = {}
  for row in c.excluded:
    group = tuple(row[name] for name in names)
    groups.setdefault(group, []).append(str(row['seed']))
  rows = []
  for group, seeds in groups.items():
    cells = dict(zip(names, map(label, group)))
    cells['seeds left out'] = label(', '.join(seeds))
    rows.append(cells)
  return page.table('excluded', 'Runs that failed, diverged or are not done',
                    rows)


def spent(c: Comparison) -> Table:
  """Returns the runs, FLOPs and time of each phase, and of all."""
  phases = dict(c.results['phases'])
  if phases:
    phases['all'] = _sums([*phases.values()])
  rows = []
  for phase, row in phases.items():
    cells = {'phase': label(phase)}
    for heading, name in COUNTS.items():
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


def config(c: Comparison) -> Table:
  """Returns every field of the config that all runs change."""
  rows = []
  for name, x in run_config.flatten(c.frozen.base_config).items():
    rows.append({'field': label(name), 'value': Cell(format_config_value(x))})
  return page.table('config', 'The config that all runs change', rows)


def provenance(c: Comparison) -> Table:
  """Returns code, machines, versions and data."""
  record = c.results['provenance']
  rows = []
  if c.is_study:
    commit = c.frozen.code.get('commit')
    rows.append(('plan', f'{c.frozen.hash}, frozen on '
                 f'{plans.format_date(c.frozen.time)} at commit {commit}'))
  for code in record['codes']:
    rows.append(('code', code))
  for device in record['devices']:
    rows.append(('device', device))
  for name, version in record['versions'].items():
    rows.append(('version', f'{name} {version}'))
  for name, digest in c.frozen.sources.items():
    rows.append(('hash', f'{name}: {digest}'))
  cells = [{'what': label(what), 'which': Cell(which)} for what, which in rows]
  return page.table('code', 'Code, machines and data', cells)
