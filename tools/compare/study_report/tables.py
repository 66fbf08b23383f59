"""The tables of what a study decided: verdicts, noise, screen, sizes."""

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

from tools.compare.pages.tables import Cell, Table
from tools.compare import findings, speed, units
from tools.compare import plan as plans
from tools.compare.study_report import numbers
from tools.compare.study_report.record import Record
from tools.compare import statistics

# How a verdict is coloured.
STOPPED, OPEN = 'stopped at the screen', 'not confirmed yet'
UNSTABLE = f'{STOPPED}: unstable'
MARKS = {findings.BETTER: 'better', findings.WORSE: 'worse',
         findings.UNSTABLE: 'worse', UNSTABLE: 'worse'}
INTERVALS = 'Square brackets are 95 % intervals.'


def name_of(record: Record, variant: str) -> Cell:
  text = f'{variant} (the base)' if variant == record.plan.base else variant
  return Cell(text, variant)


def standing(record: Record, variant: str) -> str:
  """How far a variant came, in the words of the verdict's column."""
  if variant == record.plan.base:
    return 'base'
  found, screened = record.verdict(variant), record.screened(variant)
  if found:
    return found['verdict']
  if screened is None or screened['passed']:
    return OPEN
  return UNSTABLE if screened['unstable'] else STOPPED


def minus(record: Record, measure: plans.Measure,
          over: str = 'sizes and paired seeds') -> tuple[str, str]:
  """The heading of a difference from the base, and what it is."""
  return (f'{measure.name} minus base',
          f'{units.said(record.frozen, measure, "in ", ": ")}mean over {over} '
          f'that ended, and its 95 % interval; {measure.better} is better')


def _units(record: Record, *measures: plans.Measure) -> list[str]:
  """A note on the unit of each measure that has one, if none are given of all
  that the study has."""
  told = (units.said(record.frozen, m, f'{m.name} is in ', '.')
          for m in measures or record.plan.measures)
  return [*filter(None, told)]


def _no_speed_up(record: Record) -> list[str]:
  """A note on why speed-ups are n/a, where one is."""
  found = [row for v in record.plan.variants if (row := record.verdict(v))]
  wanted = len(record.plan.sizes) * len(speed.BY)
  if all(sum(numbers.known(own['factor']) for own in row['speed_ups']) == wanted
         for row in found):
    return []
  counts = [sum(run.curve.get('warm', [True] * len(run.curve['loss'])))
            for run in record.outcomes if run.phase == 'confirm'
            and run.workload == plans.TEXT and run.curve and not run.diverged]
  least = min(counts, default=statistics.MIN_POINTS)
  if least < statistics.MIN_POINTS:
    return [f'A speed-up is n/a where a run has {least} evaluations after '
            f'warm-up: {statistics.MIN_POINTS} are needed.']
  return ['A speed-up is n/a where all runs diverged, their time is not known, '
          'or the loss of one of them does not fall as the law that is fitted '
          'to it or never comes to that of the other.']


def verdicts(record: Record) -> Table:
  """A row for each variant, whatever became of it."""
  plan = record.plan
  columns = [
      ('variant', ''),
      ('verdict', 'of the confirmation, on the primary measure'),
      minus(record, plan.primary),
      ('p (Holm)', 'corrected for the number of variants that were confirmed'),
      ('power', f'of finding an effect of {_wanted(record)} by the screen and '
       'the confirmation, as announced by the noise before they were run'),
      ('speed-up in FLOPs', 'compute that the base needs over compute that '
       f'this needs, to the same loss, at the size {plan.sizes[-1]}'),
      ('speed-up in time', 'the same in seconds of training'),
      ('trend over size', 'by how much the difference grows for ten times the '
       "parameters of the base: the mean of each seed's least-squares slope, "
       'and its 95 % interval'),
      *(minus(record, measure) for measure in plan.measures[1:]),
      ('diverged', 'runs of the confirmation that diverged, of those done')]
  rows = []
  for variant in record.variants:
    found, word = record.verdict(variant), standing(record, variant)
    row = [name_of(record, variant), Cell(word, word, MARKS.get(word, ''))]
    row += (_verdict(record, found) if found else
            [Cell(word if word == 'base' else '-'),
             *[Cell('-')] * (len(columns) - 4)])
    rows.append([*row, _diverged(record, variant, found)])
  notes = [INTERVALS, *_units(record), *_no_speed_up(record)]
  stopped = [v for v in plan.variants
             if standing(record, v) in (STOPPED, UNSTABLE)]
  if stopped:
    notes.append('What the screen found of the variants that it stopped '
                 f'({", ".join(stopped)}) is in its own table.')
  if plan.measures[1:] and record.results['confirm']:
    notes.append(
        'The verdict is on the primary measure alone. The others are '
        'secondary: their p-values are corrected among themselves, and no '
        'verdict rests on them.')
  return Table(columns, rows, notes)


def _wanted(record: Record) -> str:
  return units.amount(record.frozen, record.plan.effect)


def _verdict(record: Record, found: Mapping[str, Any]) -> list[Cell]:
  plan, announced = record.plan, record.results['announced']
  largest = {own['by']: own for own in found['speed_ups']
             if own['size'] == plan.sizes[-1]}
  return [
      numbers.estimate(found), numbers.p(found['p_holm']),
      numbers.share(announced and announced['power']),
      numbers.ratio(largest.get('flops')),
      numbers.ratio(largest.get('seconds')), _trend(found['trend']),
      *(_secondary(record.verdict(found['variant'], measure.name))
        for measure in plan.measures[1:])]


def _trend(trend: Mapping[str, Any] | None) -> Cell:
  return (Cell(numbers.UNKNOWN) if trend is None
          else numbers.estimate(trend, 'slope'))


def _secondary(row: Mapping[str, Any] | None) -> Cell:
  if row is None:
    return Cell(numbers.UNKNOWN)
  cell, p = numbers.estimate(row), numbers.p(row['p_holm'])
  if p.value is None:
    return cell
  sign = '' if p.text.startswith('<') else '= '
  return Cell(f'{cell.text}, p {sign}{p.text}', cell.value)


def _diverged(record: Record, variant: str, found) -> Cell:
  if found:
    return Cell(f'{found["diverged"]} of {found["runs"]}', found['diverged'])
  runs = record.runs('confirm', variant, workload=record.plan.primary.workload)
  if not runs:
    return Cell('-')
  bad = sum(run.diverged for run in runs)
  return Cell(f'{bad} of {len(runs)}', bad)


def by_size(record: Record) -> Table:
  """The primary measure of each confirmed variant at each size."""
  rows = []
  for variant in record.plan.variants:
    found = record.verdict(variant)
    for row in found['sizes'] if found else ():
      by = {own['by']: own for own in found['speed_ups']
            if own['size'] == row['size']}
      rows.append([
          Cell(variant, variant), Cell(row['size'], row['size']),
          numbers.estimate(row, 'mean'), Cell(str(row['n']), row['n']),
          numbers.p(row['p']), numbers.ratio(by.get('flops')),
          numbers.ratio(by.get('seconds'))])
  return Table(
      [('variant', ''), ('size', ''),
       minus(record, record.plan.primary, 'paired seeds'),
       ('seeds', 'whose runs of both ended'),
       ('p', 'of this size alone, not corrected'),
       ('speed-up in FLOPs', 'geometric mean over seeds'),
       ('speed-up in time', 'geometric mean over seeds')],
      rows, [INTERVALS, *_units(record, record.plan.primary),
             *_no_speed_up(record),
             'A verdict needs the same direction at all sizes.'])


def means(record: Record) -> Table:
  """Each measure of each variant, side by side: in the confirmation, or of what
  the screen stopped, there."""
  plan, rows = record.plan, []
  for variant in record.variants:
    phase = 'confirm' if record.runs('confirm', variant) else 'screen'
    for size in plan.sizes:
      values = [values_of(record, phase, variant, size, measure)
                for measure in plan.measures]
      if any(values):
        rows.append([name_of(record, variant), Cell(size), Cell(phase),
                     *map(_mean, values)])
  columns = [('variant', ''), ('size', ''),
             ('phase', 'whose runs the means are of')] + [
      (m.name, f'mean ± standard deviation over seeds; {m.better} is better; '
       f'guessing gives {m.chance:.4g}') for m in plan.measures]
  return Table(columns, rows, [
      *_units(record), 'A run that diverged counts with what guessing gives.'])


def values_of(record: Record, phase: str, variant: str, size: str,
              measure: plans.Measure) -> list[float]:
  """Returns a measure of each run of a phase that has it."""
  return [value for run in record.runs(phase, variant, size, measure.workload)
          if numbers.known(value := run.values.get(measure.name))]


def _mean(values: list[float]) -> Cell:
  if not values:
    return Cell(numbers.UNKNOWN)
  mean = math.fsum(values) / len(values)
  spread = f' ± {np.std(values, ddof=1):.4f}' if len(values) > 1 else ''
  return Cell(f'{mean:.4f}{spread}', mean)


def noise(record: Record) -> Table:
  """What a variant without effect shows, and what can be found beside it."""
  plan, rows = record.plan, []
  for row in record.results['noise']:
    rows.append([
        Cell(row['size'], row['size']), Cell(row['measure'], row['measure']),
        Cell(row['phase'], row['phase']), Cell(str(row['pairs']), row['pairs']),
        Cell(numbers.with_interval(row['sd'], row['sd_low'], row['sd_high'],
                                   '.4f'), row['sd']),
        Cell(numbers.plain(row['smallest_effect']), row['smallest_effect']),
        Cell(str(row['seeds']), row['seeds']),
        numbers.count(row['seeds_needed']), numbers.share(row['power'])])
  return Table(
      [('size', ''), ('measure', ''), ('phase', 'whose test is asked about'),
       ('pairs', 'of runs of the base with different first parameters'),
       ('standard deviation', 'of a paired difference, and its 95 % interval'),
       ('smallest effect', 'that the seeds of the phase find with a power of '
        f'{numbers.percent(plan.power)}'),
       ('seeds', 'that the phase has'),
       ('seeds needed', f'to find an effect of {_wanted(record)} with that '
        'power; n/a for a measure that is not the primary one, and where '
        '10,000 do not do'),
       ('power', 'of finding that effect with the seeds that the phase has')],
      rows, [INTERVALS, *_units(record), f'Wanted is an effect of '
             f'{_wanted(record)} on {plan.primary.name}.'] if rows else [])


def screen(record: Record) -> Table:
  plan = record.plan
  rows = [[Cell(row['variant'], row['variant']),
           Cell(row['measure'], row['measure']),
           numbers.estimate(row), Cell(str(row['n']), row['n']),
           numbers.p(row['p']), numbers.p(row['q']),
           Cell(f'{row["diverged"]} of {row["runs"]}', row['diverged']),
           Cell('yes' if row['passed'] else
                'no: unstable' if row['unstable'] else 'no', row['passed'])]
          for row in record.results['screen']]
  return Table(
      [('variant', ''), ('measure', ''),
       ('minus base', 'mean over paired seeds that ended, and its 95 % '
        'interval'),
       ('seeds', 'whose runs of both ended'), ('p', 'not corrected'),
       ('q', 'corrected by Benjamini and Hochberg'),
       ('diverged', 'runs that diverged, of those done'),
       ('passed', f'q is at most {plan.q:g}, and no more runs diverged than '
        'the plan allows')],
      rows, [INTERVALS, *_units(record, plan.primary),
             f'At the smallest size, {plan.sizes[0]}.'])


def stability(record: Record) -> Table:
  """How often each confirmed variant diverges, beside the base."""
  rows = []
  for variant in record.plan.variants:
    row = record.verdict(variant)
    if row:
      rows.append([
          Cell(variant, variant),
          Cell(f'{row["diverged"]} of {row["runs"]}', row['diverged']),
          Cell(f'{row["base_diverged"]} of {row["runs"]}',
               row['base_diverged']),
          Cell(f'[{numbers.plain(row["rate_low"])}, '
               f'{numbers.plain(row["rate_high"])}]', row['rate_low']),
          numbers.p(row['p_diverged']),
          Cell(numbers.with_interval(row['counted'], None, None),
               row['counted'])])
  return Table(
      [('variant', ''), ('diverged', 'of the runs of the confirmation'),
       ('the base', 'of as many'),
       ('share', '95 % interval by Clopper and Pearson'),
       ('p (Holm)', 'that it diverges more often than the base by chance: '
        "McNemar's exact test, one-sided"),
       (f'{record.plan.primary.name} minus base, all counted', 'where a run '
        'that diverged counts with what guessing gives')],
      rows, [*_units(record, record.plan.primary),
             'Unstable is a variant of which more than '
             f'{numbers.percent(record.plan.unstable)} of the runs diverge.'])


def diverged(record: Record) -> Table:
  """Runs that diverged, by phase and size."""
  sizes, rows = record.plan.sizes, []
  for variant in record.variants:
    for phase in plans.PHASES:
      by = [record.runs(phase, variant, size) for size in sizes]
      if any(run.diverged for runs in by for run in runs):
        rows.append([name_of(record, variant), Cell(phase)] + [
            Cell(f'{sum(r.diverged for r in runs)} of {len(runs)}',
                 sum(r.diverged for r in runs)) if runs else Cell('-')
            for runs in by])
  return Table([('variant', ''), ('phase', '')] + [
      (size, 'runs that diverged, of those done, of all workloads')
      for size in sizes], rows)
