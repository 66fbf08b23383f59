"""What a study may say of its runs: pure functions of a plan and outcomes.

Differences are paired: seed s of a variant and of the base have the same data
in the same order, so what the seed does to both cancels. Tests are Student's
over the seeds. How often this errs, tests/tools/compare/simulate_test.py
measures on studies whose truth is known; four rules are as they are because
of it:

- Noise that is not normal, by the skewness or the largest of the differences
  of all variants, breaks Student's test. The spread of all variants together
  must then find a difference, too (statistics.Pooled).
- A run that diverged is no figure of a mean, but a result of its own. Counted
  at what guessing gives, it is an outlier a hundred times the spread: an
  interval then holds the truth far less often than it says, and a variant as
  stable as the base is hardly ever found to be better. So effects are over
  seeds whose runs ended, and a variant of which more runs diverged, beyond the
  share of the base, than the plan allows, or significantly more than of the
  base, is 'unstable', whatever its effect.
- Sizes need not agree by significance, only by the sign of their means. That
  too fails by chance where an effect is small, so the power that is announced
  counts it in.
- Power is announced for a standard deviation that is an estimate:
  statistics.py.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from tools.compare import statistics
from tools.compare.plan import AGAIN, LOWER, Measure, Outcome, Plan
from training.evals import items

BETTER, WORSE, NONE_SHOWN = 'better', 'worse', 'no difference shown'
DISAGREE, UNSTABLE = 'sizes disagree', 'unstable'
EQUIVALENT, NOT_WORSE = 'equivalent', 'no worse'  # within the plan's margin
VERDICTS = (BETTER, WORSE, NONE_SHOWN, DISAGREE, UNSTABLE, EQUIVALENT,
            NOT_WORSE)
NO_NOISE = 'noise unknown'  # of a sweep, with too few seeds for any verdict
PASSED, STOPPED = 'passed', 'stopped at the screen'
STOPPED_UNSTABLE = f'{STOPPED}: unstable'
ALL = 'all sizes'  # the size of a row about the mean over sizes
RARE = 0.1  # the share of runs on a plateau by which a screening may be misled


@dataclasses.dataclass(frozen=True)
class Noise:
  """How far base and base-again stand apart, and what a test can find then.

  Attributes:
    size: of the plan, or ALL: the mean over sizes, which the confirmation
      tests.
    measure: its name.
    phase: whose test the last five figures are of: 'screen' or 'confirm'.
    pairs: that both ended, at all sizes of the row.
    sd: of the paired differences, or of their means over the sizes.
    seeds: that the phase has.
    level: at which the test must find, as if all variants but one were like
      the base: alpha / variants, or q / variants; in the confirmation of a
      secondary measure alpha / (variants * secondary measures), since these
      are corrected together.
    smallest_effect: the smallest effect that is found with the power that the
      plan asks for.
    seeds_needed: for the effect that the plan wants; None for a measure that
      is not the primary one, and where 10,000 do not do.
    power: with which that effect is found; None likewise.
    skew: the p of the skewness of the base's runs (their means over the sizes),
      if their noise were normal.
    outliers: that of the largest of the differences. Where one is small, the
      other figures are resampled from these differences.
    power_within: with which a variant that has no effect is shown to be
      equivalent, where the plan names a margin.
    error: how often a study without effect finds one then, at `level`.
    snr: of the measure: how far the means of the sizes are apart, over the
      standard deviation of a run (Heineman et al. 2025, arXiv 2508.13144).
  """
  size: str
  measure: str
  phase: str
  pairs: int
  sd: float | None
  seeds: int
  level: float
  smallest_effect: float | None = None
  seeds_needed: int | None = None
  power: float | None = None
  skew: float | None = None
  outliers: float | None = None
  error: float | None = None
  power_within: float | None = None
  snr: float | None = None


class Announced(NamedTuple):
  """What the whole study can find, said before it is run.

  Attributes:
    power: of the screening and the confirmation together: the product. Both
      hang on the same noise, which is an estimate, so it is rather more.
    enough: whether that is as much as the plan wants.
    sentence: all this, for a reader.
  """
  power: float
  enough: bool
  sentence: str


class Effect(NamedTuple):
  """A mean over the pairs of seeds that both ended, its interval and its p;
  `differences` are of these seeds."""
  size: str
  effect: float | None
  low: float | None
  high: float | None
  n: int
  p: float | None
  differences: Sequence[float] = ()


class SpeedUp(NamedTuple):
  """How many times what the variant spends the base needs to the same loss.

  Attributes:
    size: of the plan; of multipliers also ALL: one factor, fitted to all sizes.
    by: 'flops' or 'seconds'; of multipliers, which FLOPs and which floor.
    factor, low, high: geometric mean over seeds; low and high are None for
      fewer than 3. Of multipliers the law's, and a jackknife over paired
      seeds.
    fit_error: rms of the fitted curves, in nats: a factor of losses that
      differ by less says nothing; of multipliers, None.
    floor: of a multiplier's law.
  """
  size: str
  by: str
  factor: float | None
  low: float | None
  high: float | None
  fit_error: float | None
  floor: float | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A variant beside the base: at the smallest size in the screening, at all
  sizes in the confirmation.

  Attributes:
    effect, low, high: mean over sizes of the paired differences, over the n
      seeds whose runs of both ended at all sizes.
    differences: of these seeds.
    p, p_corrected: Student's over these seeds; corrected over the variants, by
      Benjamini-Hochberg in the screening and by Holm in the confirmation, and
      for measures that are not primary over all of these together.
    sizes: each size by itself.
    diverged, base_diverged, runs: of `runs` runs each.
    p_diverged: that it diverges more often than the base by chance (exact
      McNemar, one-sided, Holm over the variants).
    verdict: of VERDICTS; in the screening PASSED or a way of STOPPED.
    p_robust: of the permutation test of the trimmed mean, not corrected.
    p_shape: of the differences of all variants, if their noise were normal.
    p_equivalent, p_not_worse: that the primary measure lies within the plan's
      margin, or is not worse than by it: each corrected by Holm over the
      variants.
    multipliers: of the same, how many times the variant's FLOPs the base needs
      for its loss, by the law of the base over its sizes, each run of which
      was cooled down at its budget.
    trend: by how much the effect grows for ten times the parameters of the
      base; of the primary measure in the confirmation, as are speed_ups.
    both: the effect over seeds and items crossed, if it is known what each item
      scored (of the held-out loss: each document); n is the number of items,
      and its p is not corrected.
    item_noise: half of the effect's 95 % interval over the items alone: what
      others of the kind may change.
  """
  variant: str
  measure: str
  effect: float | None
  low: float | None
  high: float | None
  n: int
  p: float | None
  p_corrected: float | None
  sizes: list[Effect]
  diverged: int
  base_diverged: int
  runs: int
  p_diverged: float
  verdict: str
  differences: Sequence[float] = ()
  p_robust: float | None = None
  p_shape: float | None = None
  p_equivalent: float | None = None
  p_not_worse: float | None = None
  trend: Effect | None = None
  speed_ups: list[SpeedUp] = dataclasses.field(default_factory=list)
  both: Effect | None = None
  item_noise: float | None = None
  multipliers: list[SpeedUp] = dataclasses.field(default_factory=list)


# What FLOPs of an Outcome a multiplier is of.
COUNTED = {'multiplier': lambda x: x.flops,
           'multiplier, no embeddings': lambda x: x.flops * (x.body or 0)}
BY = ('flops', 'seconds')  # speed-ups
Outcomes = Iterable[Outcome]
Runs = Mapping[tuple[str, str, str], Mapping[int, Outcome]]


def of_phase(outcomes: Outcomes, phase: str) -> Runs:
  """Returns {(variant, size, workload): {seed: outcome}}."""
  by_point: dict[tuple[str, str, str], dict[int, Outcome]] = {}
  for x in outcomes:
    if x.phase == phase:
      by_point.setdefault((x.variant, x.size, x.workload), {})[x.seed] = x
  return by_point


def noise(plan: Plan, outcomes: Outcomes, phase='noise') -> list[Noise]:
  """Returns, for each measure, a row for each size, one for the screening, and
  one for the confirmation, which is over the mean of the sizes.

  The last is measured as it is tested, by the seeds' means over the sizes: to
  take the sizes for independent would give it more degrees of freedom, and
  promise far too much where they are not.
  """
  runs = of_phase(outcomes, phase)
  rows = []
  snrs = {m.name: _signal_to_noise(plan, runs, m) for m in plan.measures}
  going = going_on(plan, snrs)
  for measure in plan.measures:
    both = {size: _both(runs, AGAIN, plan.base, size, measure)
            for size in plan.sizes}
    lost = [x.diverged for pairs in both.values()
            for pair in pairs.values() for x in pair]
    rate = sum(lost) / len(lost) if lost else 0.0
    for name, phase, sizes in (
        *((size, 'confirm', (size,)) for size in plan.sizes),
        (plan.sizes[0], 'screen', plan.sizes[:1]),
        (ALL, 'confirm', plan.sizes)):
      row = _noise_row(going, measure, name, phase,
                       [both[size] for size in sizes], rate)
      rows.append(dataclasses.replace(row, snr=snrs[measure.name]))
  return rows


def _signal_to_noise(plan: Plan, runs: Runs, measure: Measure) -> float | None:
  each = [[x.values[measure.name] for name in (plan.base, AGAIN)
           for x in runs.get((name, size, measure.workload), {}).values()
           if measure.name in x.values and not x.diverged]
          for size in plan.sizes]
  if min(map(len, each)) < 2:
    return None
  noise = math.sqrt(np.mean([np.var(values, ddof=1) for values in each]))
  signal = float(np.ptp([np.mean(values) for values in each]))
  return signal / noise if noise else math.inf if signal else 0.0


def going_on(plan: Plan, snrs: Mapping[str, float | None]) -> Plan:
  """Returns the plan without the measures, the first one aside, that have less
  signal to noise than it wants, and the workloads that have none then."""
  measures = tuple(
      m for m in plan.measures if m == plan.primary
      or (snr := snrs.get(m.name)) is None or snr >= (plan.least_snr or 0.0))
  return dataclasses.replace(plan, measures=measures, workloads=tuple(
      x for x in plan.workloads if x in {m.workload for m in measures}))


def _noise_row(plan: Plan, measure: Measure, name: str, phase: str, sizes,
               rate: float) -> Noise:
  share = plan.alpha if phase == 'confirm' else plan.q
  # Tests that are corrected together where all variants pass the screening.
  tests = len(plan.variants)
  if phase == 'confirm' and measure != plan.primary:
    tests *= max(len(plan.measures) - 1, 1)
  level, seeds = share / tests, plan.seeds[phase]
  by_seed = _differences_by_seed(sizes, measure)
  row = Noise(name, measure.name, phase, len(by_seed), None, seeds, level)
  if len(by_seed) < 2:
    return row
  apart = np.array([*by_seed.values()])
  sd, sds = float(np.std(_means(by_seed), ddof=1)), np.std(apart, 0, ddof=1)
  # What a seed's data do to all sizes: these are not apart, as differences are.
  base = np.array([[np.mean([pairs[seed][1].values[measure.name]
                             for pairs in sizes])] for seed in by_seed])
  base_shape, differing = statistics.shape([base]), statistics.shape([apart])
  test = dict(sd=sd, sds=sds, df=len(by_seed) - 1, level=level, rate=rate,
              limit=plan.unstable)
  if base_shape and differing:
    row = dataclasses.replace(row, skew=base_shape.skew,
                              outliers=differing.outliers)
    if is_irregular(row) and sds.all():
      test['seen'] = apart
      row = dataclasses.replace(row, error=statistics.errs(
          apart, sds, seeds, level, len(plan.variants)))
  row = dataclasses.replace(row, sd=sd, smallest_effect=(
      statistics.smallest_effect(plan.power, seeds=seeds, **test)))
  if measure != plan.primary:
    return row
  return dataclasses.replace(
      row, power=statistics.power(plan.effect, seeds=seeds, **test),
      power_within=statistics.power(
          plan.margin, seeds=seeds, within=True, **test)
      if plan.margin else None,
      seeds_needed=statistics.seeds_needed(plan.effect, plan.power, **test))


def is_irregular(row: Noise) -> bool:
  """Whether the noise of the base is not taken for normal."""
  return row.skew is not None and (
      2 * min(row.skew, row.outliers) <= statistics.IRREGULAR)


def announce(plan: Plan, rows: Sequence[Noise]) -> Announced:
  """Returns what the study can find, of the rows of `noise`."""
  by_phase = {row.phase: row for row in rows
              if row.measure == plan.primary.name
              and (row.phase == 'screen' or row.size == ALL)}
  screen, confirm = (by_phase[phase].power or 0.0 for phase in (
      'screen', 'confirm'))
  both = screen * confirm
  enough = both >= plan.power
  sentence = (f'An effect of {plan.effect:g} in {plan.primary.name} is found '
              f'with a probability of {math.floor(100 * both)}% or more: it '
              f'passes the screening ({plan.seeds["screen"]} seeds) in '
              f'{screen:.0%} of such studies, and the confirmation '
              f'({plan.seeds["confirm"]} seeds) in {confirm:.0%}.')
  if not enough:
    needs = '; '.join(_wanted(plan, by_phase[phase])
                      for phase in ('screen', 'confirm'))
    sentence += (f' That is less than the {plan.power:.0%} that the plan '
                 f'wants: {needs}.')
  for phase, words, share in (('screen', 'screening', plan.q),
                              ('confirm', 'confirmation', plan.alpha)):
    if (row := by_phase[phase]).error is not None:
      sentence += (f' The noise of the {words} does not look normal (p = '
                   f'{row.skew:.2g} by the skewness of the base\'s runs, '
                   f'{row.outliers:.2g} by the largest difference), so that '
                   'this is resampled from it (and is less where the '
                   'differences of the variants look so, too: the test is then '
                   'more cautious), and at most '
                   f'{min(row.error * len(plan.variants), 1):.2g} of studies '
                   'without any effect find one, where '
                   f'{share:.2g} is planned.')
  runs = plan.seeds['screen'] * len(plan.variants)
  unseen = (1 - RARE) ** runs
  sentence += (f' Where {RARE:.0%} of the variants\' runs end on a plateau, '
               f'none of the {runs} of the screening does with a probability '
               f'of {unseen:.2g}, so that its false discovery rate is up to '
               f'{min(plan.q + unseen, 1):.2g} then.')
  if plan.margin and by_phase['confirm'].sd is not None:
    sentence += (' A variant without any effect is shown in the confirmation '
                 f'to be equivalent within {plan.margin:g} with a probability '
                 f'of {by_phase["confirm"].power_within:.0%}.')
  return Announced(both, enough, sentence)


def can_show(plan: Plan) -> str:
  """Returns what the seeds of the confirmation can show, whatever is found."""
  seeds, tests = plan.seeds['confirm'], len(plan.variants)
  deviations, sign = statistics.shows(seeds, plan.alpha / tests)
  alike = (', so that differences that are all alike show nothing'
           if sign > plan.alpha / tests else '')
  runs = seeds * len(plan.sizes)
  return (f'With {seeds} seeds and {tests} variants, a difference is first '
          f'significant at {deviations:.2g} standard deviations of a paired '
          f'difference; signs alone have p >= {sign:.2g} before correction'
          f'{alike}. Where none of the {runs} runs of a variant ends on a '
          f'plateau, up to {1 - 0.05 ** (1 / runs):.0%} of such runs may.')


def _wanted(plan: Plan, row: Noise) -> str:
  if row.sd is None:
    return f'fewer than 2 pairs of the base ended for the {row.phase}ing'
  needs = (f'{row.seeds_needed} seeds' if row.seeds_needed else
           f'more than {statistics.MOST_SEEDS:,} seeds')
  phase = 'screening' if row.phase == 'screen' else 'confirmation'
  return f'{plan.power:.0%} in the {phase} alone takes {needs}'


def screen(plan: Plan, outcomes: Outcomes, phase='screen') -> list[Verdict]:
  """Returns the row of each variant that was run, at the smallest size. Where
  the plan names a margin, one that is no worse than by it passes, too."""
  ran = {variant for variant, *_ in of_phase(outcomes, phase)}
  rows = _family(plan, outcomes, phase, [
      (v, plan.primary) for v in plan.variants if v in ran], plan.sizes[:1],
                 'bh')
  lost = _lost_share(plan, outcomes, plan.primary)
  return [dataclasses.replace(row, verdict=(
      STOPPED_UNSTABLE if _too_many(plan, row.diverged, row.runs, lost)
      else PASSED if min(p for p in (row.p_corrected, row.p_not_worse, 1.0)
                         if p is not None) <= plan.q else STOPPED))
          for row in rows]


def confirm(plan: Plan, outcomes: Outcomes, phase='confirm') -> list[Verdict]:
  """Returns the verdict on each variant that was run in the confirmation, for
  the primary measure; then rows for the other measures."""
  runs = of_phase(outcomes, phase)
  ran = {variant for variant, *_ in runs}
  variants = [variant for variant in plan.variants if variant in ran]
  return _family(plan, outcomes, phase, [
      (v, plan.primary) for v in variants], plan.sizes) + _family(
          plan, outcomes, phase, [
              (v, measure) for measure in plan.measures[1:] for v in variants
              if any(_both(runs, v, plan.base, size, measure)
                     for size in plan.sizes)], plan.sizes)


def promising(plan: Plan, rows: Sequence[Verdict]) -> list[str]:
  """Returns the variants that a screening stopped although they looked better
  than the base, the best first."""
  gain = lambda row: plan.primary.sign * row.effect
  return [row.variant for row in sorted(
      (row for row in rows if row.verdict == STOPPED and row.effect is not None
       and gain(row) > 0), key=gain, reverse=True)]


def predict(plan: Plan, outcomes: Outcomes, flops: Mapping[str, float]
            ) -> list[dict[str, Any]]:
  """Returns what the confirmation lets expect of the plan's largest size, as
  {'variant', 'value', 'low', 'high'}: of the base its primary measure, of the
  others their differences from it; none where runs were not cooled down.

  The law is taken for true, and the multiplier for the same at all sizes; the
  noise of the seeds that will be seen is within the interval.

  Args:
    flops: of a run of that size, by variant, the base too.
  """
  runs, rows = of_phase(outcomes, 'confirm'), []
  for variant in flops:
    if samples := _budgets(plan.primary, [_both(
        runs, variant, plan.base, size, plan.primary) for size in plan.sizes]):
      (compute, *_), losses = samples[0].values(), samples[1]
      values, halves = statistics.scaled(
          compute, losses, np.array([flops[plan.base], flops[variant]]))
      # The base stands beside itself.
      at, per_seed = (1, losses[:, 0]) if variant == plan.base else (
          2, losses[:, 1] - losses[:, 0])
      seen = statistics.half_width(per_seed[:, -1]) * math.sqrt(
          len(per_seed) / plan.seeds['largest'])
      rows.append({'variant': variant} | dict(zip(
          ('value', 'low', 'high'),
          _known(values[at], math.hypot(halves[at], seen)))))
  return rows


def sweep(plan: Plan, outcomes: Outcomes) -> list[Verdict]:
  """Returns the rows of a sweep, whose runs count as a confirmation: so its
  words follow the corrected p, too."""
  rows = []
  for row in confirm(plan, outcomes):
    if row.n < statistics.MIN_SEEDS and row.verdict != UNSTABLE:
      row = dataclasses.replace(row, verdict=NO_NOISE)
    rows.append(row)
  return rows


def _family(plan: Plan, outcomes: Outcomes, phase: str, members,
            sizes: Sequence[str], method: str = 'holm') -> list[Verdict]:
  """Tests of (variant, measure) that are corrected together."""
  runs = of_phase(outcomes, phase)
  both = [[_both(runs, variant, plan.base, size, measure) for size in sizes]
          for variant, measure in members]
  shapes = {measure: _shape([pairs for pairs, (_, other) in zip(both, members)
                             if other == measure], measure)
            for _, measure in members}
  lost = {measure: _lost_share(plan, outcomes, measure)
          for _, measure in members}
  rows = [_row(plan, sizes, *member, pairs, shapes[member[1]])
          for pairs, member in zip(both, members)]
  holm = statistics.corrected
  return [_verdict(plan, row, lost[measure]) for row, (_, measure) in zip((
      dataclasses.replace(
          row, p_corrected=p, p_diverged=diverges, p_equivalent=equivalent,
          p_not_worse=not_worse) for row, p, diverges, equivalent, not_worse
      in zip(rows, holm([row.p for row in rows], method),
             holm([row.p_diverged for row in rows]),
             holm([row.p_equivalent for row in rows], method),
             holm([row.p_not_worse for row in rows], method))), members)]


def _row(plan: Plan, sizes: Sequence[str], variant: str, measure: Measure,
         pairs, shape: statistics.Shape | None) -> Verdict:
  """Returns a member of a family before it is corrected, without a verdict."""
  means = _means(_differences_by_seed(pairs, measure))
  over = shape and shape.pooled(lambda x: x.mean(1))
  effect = _effect(ALL, means, over)
  each = [_effect(size, _means(_differences_by_seed([part], measure)),
                  shape and shape.pooled_at(i))
          for i, (size, part) in enumerate(zip(sizes, pairs))]
  every = [pair for part in pairs for pair in part.values()]
  ours, base = (sum(pair[i].diverged for pair in every) for i in (0, 1))
  row = Verdict(
      variant, measure.name, *effect[1:6], None, each, ours, base, len(every),
      _more_diverge(pairs), '', means, statistics.robust_p(means),
      shape and shape.p, **_over_items(measure, pairs))
  if measure != plan.primary:
    return row
  if plan.margin:
    row = dataclasses.replace(row, **dict(zip(
        ('p_equivalent', 'p_not_worse'), statistics.p_within(
            means, plan.margin, measure.sign, over))))
  return dataclasses.replace(
      row, trend=_trend(measure, pairs, shape),
      multipliers=_multipliers(plan, sizes, pairs),
      speed_ups=_speed_ups(sizes, pairs))


def _verdict(plan: Plan, row: Verdict, lost: float) -> Verdict:
  within = lambda p: p is not None and p <= plan.alpha
  sign = next(m.sign for m in plan.measures if m.name == row.measure)
  if (_too_many(plan, row.diverged, row.runs, lost)
      or row.p_diverged <= plan.alpha):
    word = UNSTABLE
  elif within(row.p_corrected):
    alike = len({part.effect > 0 for part in row.sizes}) == 1
    word = (DISAGREE if not alike else BETTER if row.effect * sign > 0
            else WORSE)
  elif within(row.p_equivalent) and all(
      abs(part.effect) < plan.margin for part in row.sizes):
    word = EQUIVALENT
  else:
    word = NOT_WORSE if within(row.p_not_worse) else NONE_SHOWN
  return dataclasses.replace(row, verdict=word)


def _shape(both, measure: Measure) -> statistics.Shape | None:
  """Returns the shape of the noise of all variants beside the base."""
  by_seed = [_differences_by_seed(pairs, measure) for pairs in both]
  return statistics.shape([np.array([*differences.values()])
                           for differences in by_seed if differences])


def _lost_share(plan: Plan, outcomes: Outcomes, measure: Measure) -> float:
  """Returns the share of the base's runs that diverged, in all phases but that
  in which the rates are tried."""
  lost = [x.diverged for x in outcomes if x.variant in (plan.base, AGAIN)
          and x.phase != 'tune' and x.workload == measure.workload]
  return sum(lost) / max(len(lost), 1)


def _too_many(plan: Plan, diverged: int, runs: int, lost: float) -> bool:
  """Whether more of the runs diverged, beyond the base's share, than the plan
  allows. Shares are compared with some slack for their last digit: 29 of 100
  are no more than 0.29, and yet more than 0.29 * 100."""
  return diverged / max(runs, 1) > plan.unstable + lost + 1e-9


def _both(runs: Runs, variant: str, base: str, size: str, measure: Measure
          ) -> dict[int, tuple[Outcome, Outcome]]:
  """Returns the outcomes of the seeds of which both have the measure."""
  ours, theirs = (
      {seed: x for seed, x in runs.get((name, size, measure.workload),
                                       {}).items() if measure.name in x.values}
      for name in (variant, base))
  return {seed: (ours[seed], theirs[seed])
          for seed in sorted(ours.keys() & theirs.keys())}


def _ended(sizes) -> list[int]:
  """Returns the seeds whose runs ended at all sizes: a mean over other sizes
  would be another figure."""
  return [seed for seed in sorted(set.intersection(*map(set, sizes)))
          if not any(x.diverged for pairs in sizes for x in pairs[seed])]


def _differences_by_seed(sizes, measure: Measure) -> dict[int, list[float]]:
  """Returns the differences at each size, of the seeds of `_ended`."""
  return {seed: [ours.values[measure.name] - base.values[measure.name]
                 for ours, base in (pairs[seed] for pairs in sizes)]
          for seed in _ended(sizes)}


def _means(by_seed: Mapping[int, list[float]]) -> list[float]:
  return [sum(values) / len(values) for values in by_seed.values()]


def _more_diverge(sizes) -> float:
  """McNemar's exact test, of one side: of the pairs of which one run diverged,
  the variant's is it no more often than the base's."""
  pairs = [pair for size in sizes for pair in size.values()]
  return statistics.mcnemar(*([pair[i].diverged for pair in pairs]
                              for i in (0, 1)), 'greater')


def _effect(size: str, values: Sequence[float],
            pooled: statistics.Pooled | None = None) -> Effect:
  ends = (statistics.interval(values, pooled)[:3] if values else (None,) * 3)
  return Effect(size, *ends, len(values), statistics.p_value(values, pooled),
                values)


def _over_items(measure: Measure, sizes) -> dict[str, Any]:
  """Returns `both` and `item_noise` of a Verdict, of the seeds whose runs ended
  at all sizes: of each item, a seed has one mean over these. {} where the items
  are not known, or not the same in all runs."""
  seeds = _differences_by_seed(sizes, measure)
  scores = items.paired([x.items.get(measure.name) for x in pairs[seed]]
                        for seed in seeds for pairs in sizes)
  if scores is None:
    return {}
  ours, base, weights_Q = scores
  values_SQ = (ours - base).reshape(len(seeds), len(sizes), -1).mean(1)
  both, alone = (statistics.crossed(x_SQ, weights_Q)
                 for x_SQ in (values_SQ, values_SQ.mean(0, keepdims=True)))
  row = {} if alone.p is None else {'item_noise': alone.high - alone.mean}
  return row if both.p is None or len(seeds) < 2 else row | {
      'both': Effect(ALL, *both[:3], values_SQ.shape[1], both.p)}


def _trend(measure: Measure, sizes, shape: statistics.Shape | None
           ) -> Effect | None:
  """Returns the slope of the effect over log10 of the base's parameters.

  Each seed gives a slope by least squares over its own sizes, and the interval
  is over the seeds: it holds whatever the noise of each size is.
  """
  by_seed = _differences_by_seed(sizes, measure)
  if not by_seed or len(sizes) < 2:
    return None
  logs = [math.log10(next(iter(pairs.values()))[1].params) for pairs in sizes]
  slopes = lambda rows: np.polyfit(logs, rows.T, 1)[0]
  return _effect(ALL, slopes(np.array([*by_seed.values()])).tolist(),
                 shape and shape.pooled(slopes))


def _budgets(measure: Measure, sizes) -> tuple[dict, np.ndarray] | None:
  """Returns the FLOPs of base and variant, [2, sizes] by each of COUNTED that
  is known, and [seeds, 2, sizes], their losses; None where they give no law,
  be it that a run was not cooled down."""
  seeds = _ended(sizes)
  of = lambda get: np.array([[[get(pairs[seed][i]) for pairs in sizes]
                              for i in (1, 0)] for seed in seeds], float)
  if (min(len(sizes), len(seeds)) < statistics.MIN_SEEDS
      or measure.better != LOWER or not of(lambda x: bool(x.cooled)).all()):
    return None
  compute = {by: of(get)[0] for by, get in COUNTED.items()}
  return ({by: x for by, x in compute.items() if np.all(x > 0)},
          of(lambda x: x.values[measure.name]))


def _multipliers(plan: Plan, sizes: Sequence[str], by_size) -> list[SpeedUp]:
  compute, losses = _budgets(plan.primary, by_size) or ({}, None)
  rows: list[SpeedUp] = []
  for by, floor in itertools.product(compute, (None, plan.floor or 0.0)):
    values, halves = statistics.scaled(
        compute[by], losses, compute[by][:, -1], floor)
    name = by + ', pinned' * (floor is not None)
    rows += [SpeedUp(size, name, *(
        None if x is None else math.exp(x) for x in _known(*estimate)), None,
                     _known(values[0], 0.0)[0])
             for size, *estimate in zip((ALL, *sizes), values[3:], halves[3:])]
  return rows


def _known(value: float, half: float) -> list[float | None]:
  """Returns a value and the ends of its interval; None of what is not known."""
  return [float(x) if math.isfinite(x) else None
          for x in (value, value - half, value + half)]


def _speed_ups(sizes: Sequence[str], by_size) -> list[SpeedUp]:
  """Returns the speed-up of a variant at each size, by FLOPs and by time, of
  the curves of the primary measure's runs; none where no curves were kept.

  For each seed, the base's spending over the variant's to the same loss, read
  from a saturating power law of each curve (statistics.speed_up).
  """
  factors = []
  for size, by_seed in zip(sizes, by_size):
    pairs = [by_seed[seed] for seed in _ended([by_seed])]
    if any(x.curve for pair in pairs for x in pair):
      for by in BY:
        x, error = statistics.over_seeds(
            [tuple(_law(run, by) for run in pair) for pair in pairs])
        factors.append(SpeedUp(size, by, *(x[:3] if x else (None,) * 3), error))
  return factors


def _law(outcome: Outcome, by: str) -> statistics.PowerLaw | None:
  """Fits a curve from where the learning rate had reached its height."""
  curve = outcome.curve
  warm = np.array(curve.get('warm', True), bool)
  return statistics.power_law(*(
      np.where(warm, np.array(curve.get(name, [])), math.nan)
      for name in (by, 'loss')))
