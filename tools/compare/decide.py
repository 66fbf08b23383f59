"""Decides what a study may say of its runs, by functions of plan and outcomes.

Differences are paired (pairing.py), and tests are Student's over the seeds. How
often this errs, tests/tools/compare/simulate_test.py measures on studies whose
truth is known; four rules are as they are because of it:

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

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from tools.compare import efficiency, pairing, statistics
from tools.compare.efficiency import SpeedUp
from tools.compare.pairing import ALL, Outcomes
from tools.compare.plan import AGAIN, Measure, Plan
from training.evals import items

BETTER, WORSE, NONE_SHOWN = 'better', 'worse', 'no difference shown'
DISAGREE, UNSTABLE = 'sizes disagree', 'unstable'
EQUIVALENT, NOT_WORSE = 'equivalent', 'no worse'  # within the plan's margin
VERDICTS = (BETTER, WORSE, NONE_SHOWN, DISAGREE, UNSTABLE, EQUIVALENT,
            NOT_WORSE)
NO_NOISE = 'noise unknown'  # of a sweep, with too few seeds for any verdict
PASSED, STOPPED = 'passed', 'stopped at the screen'
STOPPED_UNSTABLE = f'{STOPPED}: unstable'


class Effect(NamedTuple):
  """A mean over the pairs of seeds that both ended, its interval and its p.

  Attributes:
    size: a size of the plan, or ALL.
    effect, low, high: the mean of the differences, and its 95 % interval.
    n: the number of seeds.
    p: the p of a mean of 0.
    differences: the difference of each of these seeds.
  """
  size: str
  effect: float | None
  low: float | None
  high: float | None
  n: int
  p: float | None
  differences: Sequence[float] = ()


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A variant beside the base: at the smallest size in the screening, at all
  sizes in the confirmation.

  Attributes:
    variant, measure: the names of what is compared.
    effect, low, high: the mean over sizes of the paired differences and its
      interval, over the n seeds whose runs of both ended at all sizes.
    n: the number of these seeds.
    differences: the difference of each of these seeds.
    p, p_corrected: Student's p over these seeds; corrected over the variants,
      by Benjamini-Hochberg in the screening and by Holm in the confirmation,
      and for measures that are not primary over all of these together.
    sizes: the effect at each size by itself.
    diverged, base_diverged, runs: how many of the `runs` runs of each diverged.
    p_diverged: the p that it diverges more often than the base by chance (exact
      McNemar, one-sided, Holm over the variants).
    verdict: one of VERDICTS; in the screening PASSED or a way of STOPPED.
    p_robust: the p of the permutation test of the trimmed mean, not corrected.
    p_shape: the p of the differences of all variants, if their noise were
      normal.
    p_equivalent, p_not_worse: the p that the primary measure lies within the
      plan's margin, or is not worse than by it: each corrected by Holm over the
      variants.
    trend: by how much the effect grows for ten times the parameters of the
      base; of the primary measure in the confirmation, as are speed_ups.
    speed_ups: the factors by which the variant is faster, by its curves.
    multipliers: how many times the variant's FLOPs the base needs for its loss,
      by the law of the base over its sizes, each run of which was cooled down
      at its budget.
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


@dataclasses.dataclass(frozen=True)
class Member:
  """A variant and a measure: a member of a family of tests, which are corrected
  together.

  Attributes:
    variant: the name of the variant.
    measure: the measure by which it is compared with the base.
    sizes: the names of the sizes.
    pairs_by_size: the pairs of the variant and the base at each size.
  """
  variant: str
  measure: Measure
  sizes: Sequence[str]
  pairs_by_size: Sequence[pairing.Pairs]

  @functools.cached_property
  def differences(self) -> dict[int, list[float]]:
    """The differences at each size, by seed."""
    return pairing.differences_by_seed(self.pairs_by_size, self.measure)

  @functools.cached_property
  def pairs(self) -> list[pairing.Pair]:
    """The pairs of all sizes and seeds, of runs that diverged too."""
    return [pair for pairs in self.pairs_by_size for pair in pairs.values()]

  @property
  def diverged(self) -> int:
    """The number of the variant's runs that diverged."""
    return sum(pair.ours.diverged for pair in self.pairs)

  @property
  def base_diverged(self) -> int:
    """The number of the base's runs that diverged."""
    return sum(pair.base.diverged for pair in self.pairs)


class PValues(NamedTuple):
  """The p of the tests of a member, as they are or as they are corrected.

  Attributes:
    p: the p of no effect.
    p_diverged: the p of diverging no more often than the base.
    p_equivalent, p_not_worse: the p of an effect beyond the plan's margin, in
      any direction, or for the worse.
  """
  p: float | None
  p_diverged: float
  p_equivalent: float | None = None
  p_not_worse: float | None = None


def screen(plan: Plan, outcomes: Outcomes, phase='screen') -> list[Verdict]:
  """Returns the row of each variant that was run, at the smallest size. Where
  the plan names a margin, one that is no worse than by it passes, too."""
  variants = _variants_that_ran(plan, outcomes, phase)
  rows = _family(
      plan=plan, outcomes=outcomes, phase=phase,
      tested=[(variant, plan.primary) for variant in variants],
      sizes=plan.sizes[:1], method='bh')
  base_share = _base_share(plan, outcomes, plan.primary)
  screened = []
  for row in rows:
    if _too_many_diverged(plan, row.diverged, row.runs, base_share):
      verdict = STOPPED_UNSTABLE
    elif _is_within(plan.q, row.p_corrected, row.p_not_worse):
      verdict = PASSED
    else:
      verdict = STOPPED
    screened.append(dataclasses.replace(row, verdict=verdict))
  return screened


def confirm(plan: Plan, outcomes: Outcomes, phase='confirm') -> list[Verdict]:
  """Returns the verdict on each variant that was run in the confirmation, for
  the primary measure; then rows for the other measures."""
  variants = _variants_that_ran(plan, outcomes, phase)
  primary = [(variant, plan.primary) for variant in variants]

  # A variant may lack the runs that another measure is of.
  runs = pairing.of_phase(outcomes, phase)
  secondary = []
  for measure in plan.measures[1:]:
    for variant in variants:
      pairs_by_size = _pairs_by_size(plan=plan, runs=runs, variant=variant,
                                     measure=measure, sizes=plan.sizes)
      if any(pairs_by_size):
        secondary.append((variant, measure))

  # Secondary measures are corrected among themselves.
  rows = []
  for tested in (primary, secondary):
    rows += _family(plan=plan, outcomes=outcomes, phase=phase, tested=tested,
                    sizes=plan.sizes)
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


def promising(plan: Plan, rows: Sequence[Verdict]) -> list[str]:
  """Returns the variants that a screening stopped although they looked better
  than the base, the best first."""
  def gain(row: Verdict) -> float:
    """Returns the effect, which is positive for an improvement."""
    return plan.primary.sign * row.effect

  better = []
  for row in rows:
    is_stopped = row.verdict == STOPPED and row.effect is not None
    if is_stopped and gain(row) > 0:
      better.append(row)
  better.sort(key=gain, reverse=True)
  return [row.variant for row in better]


def can_show(plan: Plan) -> str:
  """Returns what the seeds of the confirmation can show, whatever is found."""
  seeds, tests = plan.seeds['confirm'], len(plan.variants)
  level = plan.alpha / tests
  deviations, sign = statistics.shows(seeds, level)
  alike = ''
  if sign > level:
    alike = ', so that differences that are all alike show nothing'
  # The share of runs of which none of so many diverges with p = 0.05.
  runs = seeds * len(plan.sizes)
  hidden = 1 - 0.05 ** (1 / runs)
  return (f'With {seeds} seeds and {tests} variants, a difference is first '
          f'significant at {deviations:.2g} standard deviations of a paired '
          f'difference; signs alone have p >= {sign:.2g} before correction'
          f'{alike}. Where none of the {runs} runs of a variant ends on a '
          f'plateau, up to {hidden:.0%} of such runs may.')


def _variants_that_ran(plan: Plan, outcomes: Outcomes, phase: str) -> list[str]:
  """Returns the variants that have runs of a phase, in the plan's order."""
  ran = {variant for variant, _, _ in pairing.of_phase(outcomes, phase)}
  return [variant for variant in plan.variants if variant in ran]


def _pairs_by_size(plan: Plan, runs: pairing.Runs, variant: str,
                   measure: Measure, sizes: Sequence[str]
                   ) -> list[pairing.Pairs]:
  """Returns the pairs of a variant and the base at each of some sizes."""
  pairs = []
  for size in sizes:
    pairs.append(pairing.pairs_of(
        runs=runs, variant=variant, base=plan.base, size=size, measure=measure))
  return pairs


def _family(plan: Plan, outcomes: Outcomes, phase: str,
            tested: Sequence[tuple[str, Measure]], sizes: Sequence[str],
            method: str = 'holm') -> list[Verdict]:
  """Returns the verdict of each test of a family, all corrected together.

  Args:
    plan: the plan of the study.
    outcomes: the outcomes of all phases so far.
    phase: the phase whose runs are compared.
    tested: the variants, and the measures by which they are tested.
    sizes: the sizes of which the mean is tested.
    method: the correction, as of statistics.corrected.
  """
  # The pairs of each test, and the shape of the noise of all together.
  runs = pairing.of_phase(outcomes, phase)
  members = []
  for variant, measure in tested:
    pairs_by_size = _pairs_by_size(plan=plan, runs=runs, variant=variant,
                                   measure=measure, sizes=sizes)
    members.append(Member(variant=variant, measure=measure, sizes=sizes,
                          pairs_by_size=pairs_by_size))
  shapes, base_shares = {}, {}
  for measure in {member.measure for member in members}:
    shapes[measure] = _shape(members, measure)
    base_shares[measure] = _base_share(plan, outcomes, measure)

  # Each test by itself, and as one of several.
  tests = [_tests(plan, member, shapes[member.measure]) for member in members]
  corrected = _corrected(tests, method)

  # The row of each, with the word that follows from it.
  rows = []
  for member, alone, together in zip(members, tests, corrected):
    row = _row(plan=plan, member=member, shape=shapes[member.measure],
               alone=alone, corrected=together)
    base_share = base_shares[member.measure]
    verdict = _verdict(plan, member.measure, row, base_share)
    rows.append(dataclasses.replace(row, verdict=verdict))
  return rows


def _tests(plan: Plan, member: Member, shape: statistics.Shape | None
           ) -> PValues:
  """Returns the tests of a member before they are corrected: Student's of its
  means over the sizes, McNemar's of the runs that diverged, and for the primary
  measure two one-sided tests of the plan's margin (Schuirmann 1987)."""
  means = pairing.means(member.differences)
  spread = _pooled(shape, mean_over_sizes)

  # Student's test of no effect.
  p = statistics.p_value(means, spread)

  # McNemar's test of diverging no more often than the base.
  ours_diverged = [pair.ours.diverged for pair in member.pairs]
  base_diverged = [pair.base.diverged for pair in member.pairs]
  p_diverged = statistics.mcnemar(
      ours=ours_diverged, theirs=base_diverged, alternative='greater')

  # The tests of the plan's margin.
  equivalent = not_worse = None
  if plan.margin and member.measure == plan.primary:
    equivalent, not_worse = statistics.p_within(
        values=means, margin=plan.margin, sign=member.measure.sign,
        pooled=spread)
  return PValues(p=p, p_diverged=p_diverged, p_equivalent=equivalent,
                 p_not_worse=not_worse)


def _corrected(tests: Sequence[PValues], method: str) -> list[PValues]:
  """Returns the tests of a family, each corrected over its members; runs that
  diverged always by Holm."""
  columns = []
  for name in PValues._fields:
    ps = [getattr(test, name) for test in tests]
    by = 'holm' if name == 'p_diverged' else method
    columns.append(statistics.corrected(ps, by))
  return [PValues(*ps) for ps in zip(*columns)]


def _row(plan: Plan, member: Member, shape: statistics.Shape | None,
         alone: PValues, corrected: PValues) -> Verdict:
  """Returns the row of a member, without its verdict."""
  # The effect over all sizes, and at each size by itself.
  means = pairing.means(member.differences)
  over_sizes = _effect(ALL, means, _pooled(shape, mean_over_sizes))
  p_shape = None
  if shape is not None:
    p_shape = shape.p
  at_sizes = []
  for i, size in enumerate(member.sizes):
    differences = pairing.differences_by_seed(
        [member.pairs_by_size[i]], member.measure)
    spread = None
    if shape is not None:
      spread = shape.pooled_at(i)
    at_sizes.append(_effect(size, pairing.means(differences), spread))

  both, item_noise = _over_items(member)
  row = Verdict(
      variant=member.variant,
      measure=member.measure.name,
      effect=over_sizes.effect,
      low=over_sizes.low,
      high=over_sizes.high,
      n=over_sizes.n,
      differences=means,
      sizes=at_sizes,
      p=alone.p,
      p_corrected=corrected.p,
      p_robust=statistics.robust_p(means),
      p_shape=p_shape,
      p_equivalent=corrected.p_equivalent,
      p_not_worse=corrected.p_not_worse,
      diverged=member.diverged,
      base_diverged=member.base_diverged,
      runs=len(member.pairs),
      p_diverged=corrected.p_diverged,
      both=both,
      item_noise=item_noise,
      verdict='')
  if member.measure != plan.primary:
    return row

  # The curves and the sizes of the primary measure say more.
  return dataclasses.replace(
      row,
      trend=_trend(member, shape),
      multipliers=efficiency.multipliers(
          plan, member.sizes, member.pairs_by_size),
      speed_ups=efficiency.speed_ups(member.sizes, member.pairs_by_size))


def _verdict(plan: Plan, measure: Measure, row: Verdict, base_share: float
             ) -> str:
  """Returns the word for a row of corrected tests.

  Args:
    plan: the plan of the study.
    measure: the measure of the row.
    row: the row.
    base_share: the share of the base's runs that diverged.
  """
  if (_too_many_diverged(plan, row.diverged, row.runs, base_share)
      or _is_within(plan.alpha, row.p_diverged)):
    return UNSTABLE
  if _is_within(plan.alpha, row.p_corrected):
    directions = {part.effect > 0 for part in row.sizes}
    if len(directions) > 1:
      return DISAGREE
    return BETTER if row.effect * measure.sign > 0 else WORSE
  if _is_within(plan.alpha, row.p_equivalent):
    if all(abs(part.effect) < plan.margin for part in row.sizes):
      return EQUIVALENT
  if _is_within(plan.alpha, row.p_not_worse):
    return NOT_WORSE
  return NONE_SHOWN


def _is_within(level: float, *ps: float | None) -> bool:
  """Returns whether any of some p is known and at most a level."""
  return any(p is not None and p <= level for p in ps)


def _base_share(plan: Plan, outcomes: Outcomes, measure: Measure) -> float:
  """Returns the share of the base's runs that diverged, in all phases but that
  in which the rates are tried."""
  runs = []
  for outcome in outcomes:
    is_base = outcome.variant in (plan.base, AGAIN)
    is_of_measure = outcome.workload == measure.workload
    if is_base and is_of_measure and outcome.phase != 'tune':
      runs.append(outcome)
  return pairing.diverged_share(runs)


def _too_many_diverged(plan: Plan, diverged: int, runs: int, base_share: float
                       ) -> bool:
  """Returns whether more of the runs diverged, beyond the base's share, than
  the plan allows. Shares are compared with some slack for their last digit: 29
  of 100 are no more than 0.29, and yet more than 0.29 * 100."""
  return diverged / max(runs, 1) > plan.unstable + base_share + 1e-9


def _shape(members: Sequence[Member], measure: Measure
           ) -> statistics.Shape | None:
  """Returns the shape of the noise of all variants beside the base."""
  groups = []  # of each variant [seeds, sizes]
  for member in members:
    if member.measure == measure and member.differences:
      groups.append(np.array([*member.differences.values()]))
  return statistics.shape(groups)


def mean_over_sizes(differences: np.ndarray) -> np.ndarray:
  """Returns the mean over sizes of [seeds, sizes]."""
  return differences.mean(1)


def _pooled(shape: statistics.Shape | None,
            figure: Callable[[np.ndarray], np.ndarray]
            ) -> statistics.Pooled | None:
  """Returns the spread of a figure of all variants together, where their noise
  does not look normal."""
  return None if shape is None else shape.pooled(figure)


def _effect(size: str, values: Sequence[float],
            pooled: statistics.Pooled | None = None) -> Effect:
  """Returns Student's interval and p of the differences of some seeds."""
  mean = low = high = None
  if values:
    mean, low, high, _ = statistics.interval(values, pooled)
  return Effect(
      size=size, effect=mean, low=low, high=high, n=len(values),
      p=statistics.p_value(values, pooled), differences=values)


def _over_items(member: Member) -> tuple[Effect | None, float | None]:
  """Returns `both` and `item_noise` of a Verdict, of the seeds whose runs ended
  at all sizes: of each item, a seed has one mean over these. None where the
  items are not known, or not the same in all runs."""
  name = member.measure.name
  seeds = [*member.differences]
  records = []
  for seed in seeds:
    for pairs in member.pairs_by_size:
      ours, base = pairs[seed]
      records.append((ours.items.get(name), base.items.get(name)))
  scores = items.paired(records)
  if scores is None:
    return None, None
  ours, base, weights_Q = scores

  # [seeds * sizes, items] -> [seeds, items]
  by_size = (ours - base).reshape(len(seeds), len(member.sizes), -1)
  values_SQ = by_size.mean(1)
  crossed = statistics.crossed(values_SQ, weights_Q)
  over_items = statistics.crossed(values_SQ.mean(0, keepdims=True), weights_Q)
  both = item_noise = None
  if crossed.p is not None and len(seeds) > 1:
    both = Effect(
        size=ALL, effect=crossed.mean, low=crossed.low, high=crossed.high,
        n=values_SQ.shape[1], p=crossed.p)
  if over_items.p is not None:
    item_noise = over_items.high - over_items.mean
  return both, item_noise


def _trend(member: Member, shape: statistics.Shape | None) -> Effect | None:
  """Returns the slope of the effect over log10 of the base's parameters.

  Each seed gives a slope by least squares over its own sizes, and the interval
  is over the seeds: it holds whatever the noise of each size is.
  """
  differences = member.differences
  if not differences or len(member.sizes) < 2:
    return None
  logs = []
  for pairs in member.pairs_by_size:
    first = next(iter(pairs.values()))
    logs.append(math.log10(first.base.params))

  def slopes(rows: np.ndarray) -> np.ndarray:
    """Returns the slope of each seed of [seeds, sizes]."""
    return np.polyfit(logs, rows.T, 1)[0]

  by_seed = slopes(np.array([*differences.values()])).tolist()
  return _effect(ALL, by_seed, _pooled(shape, slopes))
