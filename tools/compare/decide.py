"""Decides what a study may say of its runs, by functions of plan and outcomes.

Differences are paired (pairing.py), and tests are Student's over the seeds. How
often this errs, tests/tools/compare/simulate_test.py measures on studies whose
truth is known; five rules are as they are because of it:

- Noise that is not normal, by the skewness or the largest of the differences
  of all variants, breaks Student's test. The spread of all variants together
  must then find a difference, too (statistics.PooledDeviation).
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
- Tuning chooses by noise, too, and what it missed stands in every run after it.
  So the choices are drawn again from the runs of tuning (tuning.py), of the
  variant and of the base, and an effect has to be shown over these draws and
  without them. Where a choice lies at an edge of what was tried, nothing tells
  how much better a value beyond would be: there is no verdict.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from common.errors import format_count
from tools.compare import efficiency, pairing, statistics, tuning
from tools.compare.efficiency import SpeedUp
from tools.compare.pairing import ALL_SIZES, Outcomes
from tools.compare.plan import SECOND_BASE, Measure, Plan
from training.evals import items

BETTER, WORSE, NONE_SHOWN = 'better', 'worse', 'no difference shown'
DISAGREE, UNSTABLE = 'sizes disagree', 'unstable'
EQUIVALENT, NOT_WORSE = 'equivalent', 'no worse'  # within the plan's margin
# Where tuning leaves no verdict: the best value was at an edge of those that
# were tried, or was chosen by too few seeds.
AT_EDGE, TUNED_BY_FEW = 'tuned at an edge', 'tuned by few seeds'
VERDICTS = (BETTER, WORSE, NONE_SHOWN, DISAGREE, UNSTABLE, EQUIVALENT,
            NOT_WORSE, AT_EDGE, TUNED_BY_FEW)
NO_NOISE = 'noise unknown'  # of a sweep, with too few seeds for any verdict
PASSED, STOPPED = 'passed', 'stopped at the screen'
# The tests that a difference may have been shown by.
STUDENT = 'Student\'s paired t-test'
STUDENT_AND_POOLED = (f'{STUDENT}, by the deviation of the variant and by that '
                      'of all variants together')
AND_OVER_CHOICES = ', also over choices of the tuned values drawn again'
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
    test: the name of the test that `p` is of.
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
      and its p is not corrected. It never claims more than the effect over the
      seeds alone.
    item_noise: half of the effect's 95 % interval over the items alone: what
      others of the kind may change.
    tuning_noise: the standard deviation of what the choices of the tuned values
      may have added to the effect, which is in its interval and its p.
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
  test: str = STUDENT
  p_robust: float | None = None
  p_shape: float | None = None
  p_equivalent: float | None = None
  p_not_worse: float | None = None
  trend: Effect | None = None
  speed_ups: list[SpeedUp] = dataclasses.field(default_factory=list)
  both: Effect | None = None
  item_noise: float | None = None
  tuning_noise: float | None = None
  multipliers: list[SpeedUp] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class FamilyMember:
  """A variant and a measure: one test of a family of tests, which are corrected
  together.

  Attributes:
    variant: the name of the variant.
    measure: the measure by which it is compared with the base.
    sizes: the names of the sizes.
    pairs_by_size: the pairs of the variant and the base at each size.
    misses: what the choices of the tuned values may have added to the
      difference at each size, drawn many times, [draws, sizes]; None: nothing
      is known of it.
    fault_of_tuning: AT_EDGE, TUNED_BY_FEW, or '' where the tuned values allow
      a verdict.
  """
  variant: str
  measure: Measure
  sizes: Sequence[str]
  pairs_by_size: Sequence[pairing.Pairs]
  misses: np.ndarray | None = None
  fault_of_tuning: str = ''

  @functools.cached_property
  def differences(self) -> dict[int, list[float]]:
    """The differences at each size, by seed."""
    return pairing.differences_by_seed(self.pairs_by_size, self.measure)

  @functools.cached_property
  def pairs(self) -> list[pairing.Pair]:
    """The pairs of all sizes and seeds, of runs that diverged too."""
    all_pairs: list[pairing.Pair] = []
    for pairs_of_size in self.pairs_by_size:
      all_pairs += pairs_of_size.values()
    return all_pairs

  def shifts(self, figure: Callable[[np.ndarray], np.ndarray]
             ) -> np.ndarray | None:
    """Returns what the choices of the tuned values may have added to a figure,
    [draws], which `figure` computes of [draws, sizes]; None: nothing is known.
    """
    return None if self.misses is None else figure(self.misses)

  @property
  def diverged(self) -> int:
    """The number of the variant's runs that diverged."""
    return sum(pair.ours.diverged for pair in self.pairs)

  @property
  def base_diverged(self) -> int:
    """The number of the base's runs that diverged."""
    return sum(pair.base.diverged for pair in self.pairs)


class PValues(NamedTuple):
  """The p-values of a variant and a measure, before or after a correction.

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


def screen_variants(plan: Plan, outcomes: Outcomes, phase='screen'
                    ) -> list[Verdict]:
  """Decides which variants pass the screening of a study, the phase that stops
  variants without promise early. A variant passes if a paired t-test finds a
  difference of the primary measure at the smallest size. The p-values are
  corrected for the false discovery rate (Benjamini and Hochberg 1995).

  If the plan names a margin, a variant that is not worse than the base by the
  margin passes too. A variant of which too many runs diverged does not pass.

  Args:
    plan: the plan of the study.
    outcomes: the outcomes of the runs of all phases so far.
    phase: the name of the phase that screens.

  Returns:
    The row of each variant that was run, with the verdict PASSED, STOPPED or
    STOPPED_UNSTABLE.
  """
  variants = _variants_that_ran(plan, outcomes, phase)
  tests = [(variant, plan.primary) for variant in variants]
  # Test all variants as one family. Sizes are in rising order, so the slice is
  # the smallest one.
  tested = _test_family(
      plan=plan, outcomes=outcomes, phase=phase, variants_and_measures=tests,
      sizes=plan.sizes[:1], method='bh')

  # Decide which variants go on. The order matters: if many runs diverged, a
  # good mean of the others does not make up for it.
  base_share = _diverged_share_of_base(plan, outcomes, plan.primary)
  screened = []
  for row in tested:
    if _has_too_many_diverged(plan, row, base_share):
      verdict = STOPPED_UNSTABLE
    elif _is_any_significant(plan.q, row.p_corrected, row.p_not_worse):
      verdict = PASSED
    else:
      verdict = STOPPED
    screened.append(dataclasses.replace(row, verdict=verdict))
  return screened


def confirm_variants(plan: Plan, outcomes: Outcomes, phase='confirm'
                     ) -> list[Verdict]:
  """Returns the verdict on each variant that was run in the confirmation, the
  phase of a study that decides. It rests on a paired t-test of the mean over
  all sizes of the model, corrected for the number of tests by Holm (1979).

  The tests of the primary measure are corrected together, as one family, and
  those of all other measures as another.

  Args:
    plan: the plan of the study.
    outcomes: the outcomes of the runs of all phases so far.
    phase: the name of the phase that confirms.

  Returns:
    The rows of the primary measure, and then those of the other measures.
  """
  variants = _variants_that_ran(plan, outcomes, phase)
  primary = [(variant, plan.primary) for variant in variants]

  # Find the tests of the other measures. If a variant has no runs with a
  # measure, there is no test, because an empty one would only make the
  # correction stricter.
  runs = pairing.outcomes_of_phase(outcomes, phase)
  secondary = []
  for measure in plan.measures[1:]:
    for variant in variants:
      pairs_by_size = _pair_with_base(plan=plan, runs=runs, variant=variant,
                                      measure=measure, sizes=plan.sizes)
      if any(pairs_by_size):
        secondary.append((variant, measure))

  # Correct each family by itself, so that further measures cost the primary one
  # no power.
  rows = []
  for family in (primary, secondary):
    rows += _test_family(
        plan=plan, outcomes=outcomes, phase=phase,
        variants_and_measures=family, sizes=plan.sizes)
  return rows


def judge_sweep(plan: Plan, outcomes: Outcomes) -> list[Verdict]:
  """Returns the verdicts on the points of a sweep, whose runs count as a
  confirmation, so that its words follow the corrected p, too. With too few
  seeds the noise is not known, and no verdict is given."""
  rows = []
  for row in confirm_variants(plan, outcomes):
    if row.n < statistics.MIN_SEEDS and row.verdict != UNSTABLE:
      row = dataclasses.replace(row, verdict=NO_NOISE)
    rows.append(row)
  return rows


def list_promising_variants(plan: Plan, rows: Sequence[Verdict]) -> list[str]:
  """Returns the names of the variants that a screening stopped although they
  looked better than the base, the best first.

  Args:
    plan: the plan of the study.
    rows: the rows of the screening (screen_variants).
  """
  def improvement(row: Verdict) -> float:
    """Returns the effect, which is positive for an improvement."""
    return plan.primary.sign * row.effect

  looking_better = []
  for row in rows:
    # A variant that is stopped for diverging has another verdict.
    is_stopped = row.verdict == STOPPED and row.effect is not None
    if is_stopped and improvement(row) > 0:
      looking_better.append(row)
  looking_better.sort(key=improvement, reverse=True)
  return [row.variant for row in looking_better]


def describe_detectable_difference(plan: Plan) -> str:
  """Returns a sentence that says what the seeds of a study's confirmation can
  show at best: the smallest difference, and the smallest share of runs that end
  on a plateau.

  Args:
    plan: the plan of the study.
  """
  # Holm's correction is strictest for the smallest p, whose level is alpha over
  # the number of tests. The sign test has no p below 2^(1 - n) with n seeds.
  num_seeds = plan.seeds['confirm']
  num_tests = len(plan.variants)
  level = plan.alpha / num_tests
  deviations, p_of_signs = statistics.least_significant_mean(num_seeds, level)
  note_on_signs = ''
  if p_of_signs > level:
    note_on_signs = ', so that differences that are all alike show nothing'

  # If a share s of all runs ended on a plateau, none of n runs would with
  # probability (1 - s)^n. The largest s for which this is 0.05 may be hidden.
  num_runs = num_seeds * len(plan.sizes)
  hidden_share = 1 - 0.05 ** (1 / num_runs)
  variants = format_count(num_tests, 'variant')
  return (f'With {num_seeds} seeds and {variants}, a difference is '
          f'first significant at {deviations:.2g} standard deviations of a '
          f'paired difference; signs alone have p >= {p_of_signs:.2g} before '
          f'correction{note_on_signs}. Where none of the {num_runs} runs of a '
          f'variant ends on a plateau, up to {hidden_share:.0%} of such runs '
          'may.')


def _variants_that_ran(plan: Plan, outcomes: Outcomes, phase: str) -> list[str]:
  """Returns the variants that have runs of a phase, in the plan's order."""
  ran = {variant
         for variant, _, _ in pairing.outcomes_of_phase(outcomes, phase)}
  return [variant for variant in plan.variants if variant in ran]


def _pair_with_base(plan: Plan, runs: pairing.Runs, variant: str,
                    measure: Measure, sizes: Sequence[str]
                    ) -> list[pairing.Pairs]:
  """Returns the pairs of a variant and the base at each of some sizes."""
  pairs_by_size = []
  for size in sizes:
    pairs_by_size.append(pairing.pair_with_base(
        runs=runs, variant=variant, base=plan.base, size=size, measure=measure))
  return pairs_by_size


def _test_family(plan: Plan, outcomes: Outcomes, phase: str,
                 variants_and_measures: Sequence[tuple[str, Measure]],
                 sizes: Sequence[str], method: str = 'holm') -> list[Verdict]:
  """Returns the verdicts of a family of tests, whose p-values are corrected
  together.

  Args:
    plan: the plan of the study.
    outcomes: the outcomes of all phases so far.
    phase: the phase whose runs are compared.
    variants_and_measures: what each test compares: a variant, by a measure.
    sizes: the sizes of which the mean is tested.
    method: the correction, as of statistics.correct_p_values.
  """
  # The pairs of each test.
  runs = pairing.outcomes_of_phase(outcomes, phase)
  runs_of_tuning = tuning.read_tuning_runs(plan, outcomes)
  members = []
  for variant, measure in variants_and_measures:
    pairs_by_size = _pair_with_base(plan=plan, runs=runs, variant=variant,
                                    measure=measure, sizes=sizes)
    members.append(FamilyMember(
        variant=variant, measure=measure, sizes=sizes,
        pairs_by_size=pairs_by_size,
        misses=_draw_misses(
            runs_of_tuning=runs_of_tuning, measure=measure,
            pairs_by_size=pairs_by_size),
        fault_of_tuning=_fault_of_tuning(runs_of_tuning, pairs_by_size)))

  # The shape of the noise of all variants together, and how often the base
  # diverges, by each measure.
  shape_of_noise, base_share = {}, {}
  for measure in {member.measure for member in members}:
    shape_of_noise[measure] = _shape_of_noise(members, measure)
    base_share[measure] = _diverged_share_of_base(plan, outcomes, measure)

  # Each test by itself, and as one of several.
  uncorrected = []
  for member in members:
    shape = shape_of_noise[member.measure]
    uncorrected.append(_test_member(plan, member, shape))
  corrected = _correct_family(uncorrected, method)

  # The row of each, with the word that follows from it.
  rows = []
  for i, member in enumerate(members):
    row = _member_row(
        plan=plan, member=member, shape=shape_of_noise[member.measure],
        uncorrected=uncorrected[i], corrected=corrected[i])
    verdict = _verdict(plan=plan, member=member, row=row,
                       base_share=base_share[member.measure])
    rows.append(dataclasses.replace(row, verdict=verdict))
  return rows


def _draw_misses(runs_of_tuning: tuning.TuningRuns, measure: Measure,
                 pairs_by_size: Sequence[pairing.Pairs]) -> np.ndarray | None:
  """Draws how much tuning may have distorted the difference of a variant from
  the base at each size of the model. Tuned values, such as the learning rate,
  are chosen from noisy runs, so they may miss the best ones. The loss by this
  is the miss, and the difference is off by the miss of the variant minus that
  of the base.

  Args:
    runs_of_tuning: the runs of tuning.
    measure: the measure of the difference.
    pairs_by_size: for each size, the pairs of a run of the variant and one of
      the base, by seed.

  Returns:
    The draws, [draws, sizes], or None if they are not known at every size. They
    are known only for the first measure of a workload, since values are tuned
    for that one.
  """
  first_measure, *_ = runs_of_tuning.plan.measures_of_workload(measure.workload)
  if measure != first_measure or not all(pairs_by_size):
    return None
  misses_by_size = []
  for pairs in pairs_by_size:
    any_pair = next(iter(pairs.values()))  # all seeds have the same values
    misses = runs_of_tuning.draw_misses(any_pair.ours)
    base_misses = runs_of_tuning.draw_misses(any_pair.base)
    if misses is None or base_misses is None:
      return None
    # A miss makes the measure worse, whichever way that is.
    misses_by_size.append(-measure.sign * (misses - base_misses))
  return np.stack(misses_by_size, axis=1)


def _fault_of_tuning(runs_of_tuning: tuning.TuningRuns,
                     pairs_by_size: Sequence[pairing.Pairs]) -> str:
  """Returns why the tuning of a variant cannot be trusted, as a note on its
  verdict; '' if it can.

  Args:
    runs_of_tuning: the runs by which values such as learning rates were chosen.
    pairs_by_size: for each size of the model, the pairs of a run of the variant
      and one of the base.

  Returns:
    AT_EDGE if the variant or the base has a value at an edge of those that were
    tried, beyond which a better one may lie; else TUNED_BY_FEW if too few seeds
    chose the values.
  """
  for pairs in pairs_by_size:
    for pair in pairs.values():
      for run in (pair.ours, pair.base):
        if runs_of_tuning.is_at_edge(run):
          return AT_EDGE
  if runs_of_tuning.has_few_seeds:
    return TUNED_BY_FEW
  return ''


def _test_member(plan: Plan, member: FamilyMember,
                 shape: statistics.NoiseShape | None) -> PValues:
  """Tests one variant in one measure, without correction for the number of
  tests.

  Args:
    plan: the plan of the study.
    member: the variant, the measure, and the pairs of runs.
    shape: the shape of the noise of all variants; None: it is not known.

  Returns:
    `p`, that there is no difference, by Student's paired t-test;
    `p_diverged`, that its runs diverge no more often than the base's, by
    McNemar's exact test (1947); `p_equivalent` and `p_not_worse`, that the
    difference is beyond the plan's margin, by two one-sided t-tests (Schuirmann
    1987). It is None if there is no such test.
  """
  # Test each seed's mean over the sizes, of pairs of which both runs ended. For
  # noise that is not normal, the deviation is pooled over all variants.
  means = pairing.mean_differences(member.differences)
  pooled = _pooled_spread(shape, mean_over_sizes)
  shifts = member.shifts(mean_over_sizes)
  p = statistics.student_p_value(means, pooled, shifts)

  # Test the numbers of runs that diverged, over all pairs.
  variant_diverged = [pair.ours.diverged for pair in member.pairs]
  base_diverged = [pair.base.diverged for pair in member.pairs]
  p_diverged = statistics.mcnemar_p_value(
      ours=variant_diverged, theirs=base_diverged, alternative='greater')

  # Test against the plan's margin, which is meant for the primary measure.
  p_equivalent = p_not_worse = None
  if plan.margin and member.measure == plan.primary:
    p_equivalent, p_not_worse = statistics.equivalence_p_values(
        values=means, margin=plan.margin, sign=member.measure.sign,
        pooled=pooled, shifts=shifts)
  return PValues(p=p, p_diverged=p_diverged, p_equivalent=p_equivalent,
                 p_not_worse=p_not_worse)


def _correct_family(tests: Sequence[PValues], method: str) -> list[PValues]:
  """Returns the p-values of a family of tests, each kind of them corrected over
  the family; those of runs that diverged always by Holm's method."""
  corrected_columns = []
  for name in PValues._fields:
    ps = [getattr(test, name) for test in tests]
    method_of_column = 'holm' if name == 'p_diverged' else method
    corrected_columns.append(statistics.correct_p_values(ps, method_of_column))
  return [PValues._make(ps) for ps in zip(*corrected_columns)]


def _member_row(plan: Plan, member: FamilyMember,
                shape: statistics.NoiseShape | None, uncorrected: PValues,
                corrected: PValues) -> Verdict:
  """Returns all figures of a variant and a measure, without the verdict.

  Args:
    plan: the plan of the study.
    member: the variant, the measure, and the pairs of runs.
    shape: the shape of the noise of all variants; None where it is not known.
    uncorrected, corrected: the p-values of the member, by itself and as one of
      its family.
  """
  # The effect over all sizes, and at each size by itself.
  means = pairing.mean_differences(member.differences)
  pooled = _pooled_spread(shape, mean_over_sizes)
  shifts = member.shifts(mean_over_sizes)
  over_sizes = _student_effect(size=ALL_SIZES, differences=means,
                               pooled=pooled, shifts=shifts)
  at_sizes = []
  for i, size in enumerate(member.sizes):
    differences = pairing.differences_by_seed(
        [member.pairs_by_size[i]], member.measure)
    pooled_at_size = None
    if shape is not None:
      pooled_at_size = shape.pooled_deviation_at_size(i)
    shifts_at_size = None
    if member.misses is not None:
      shifts_at_size = member.misses[:, i]
    at_sizes.append(_student_effect(
        size=size, differences=pairing.mean_differences(differences),
        pooled=pooled_at_size, shifts=shifts_at_size))

  p_shape = None
  if shape is not None:
    p_shape = shape.p
  test = STUDENT
  if pooled is not None:
    test = STUDENT_AND_POOLED
  tuning_noise = None
  if shifts is not None:
    tuning_noise = float(np.std(shifts))
    test += AND_OVER_CHOICES
  both, item_noise = _effect_over_items(member, over_sizes)
  row = Verdict(
      variant=member.variant,
      measure=member.measure.name,
      effect=over_sizes.effect,
      low=over_sizes.low,
      high=over_sizes.high,
      n=over_sizes.n,
      differences=means,
      sizes=at_sizes,
      test=test,
      p=uncorrected.p,
      p_corrected=corrected.p,
      p_robust=statistics.permutation_p_value(means),
      p_shape=p_shape,
      p_equivalent=corrected.p_equivalent,
      p_not_worse=corrected.p_not_worse,
      diverged=member.diverged,
      base_diverged=member.base_diverged,
      runs=len(member.pairs),
      p_diverged=corrected.p_diverged,
      both=both,
      item_noise=item_noise,
      tuning_noise=tuning_noise,
      verdict='')
  if member.measure != plan.primary:
    return row

  # The curves and the sizes of the primary measure say more.
  return dataclasses.replace(
      row,
      trend=_trend_over_sizes(member, shape),
      multipliers=efficiency.compute_multipliers(
          plan, member.sizes, member.pairs_by_size),
      speed_ups=efficiency.fit_speed_ups(member.sizes, member.pairs_by_size))


def _verdict(plan: Plan, member: FamilyMember, row: Verdict, base_share: float
             ) -> str:
  """Returns the verdict on a variant, one of VERDICTS, by its corrected
  p-values.

  The order of the checks matters. A variant whose runs diverge too often is
  unstable, whatever its effect is. If the best value of tuning was at the edge
  of what was tried, or chosen by too few seeds, there is no verdict on the
  effect. A difference that is shown goes before equivalence.

  Args:
    plan: the plan of the study.
    member: the variant and the measure.
    row: all figures of the variant in this measure, with corrected p-values.
    base_share: the share of the base's runs that diverged.
  """
  # Too many runs diverge, or significantly more than the base's do.
  if _has_too_many_diverged(plan, row, base_share):
    return UNSTABLE
  if _is_any_significant(plan.alpha, row.p_diverged):
    return UNSTABLE
  if member.fault_of_tuning:
    return member.fault_of_tuning

  # A difference is shown. It must have the same sign at all sizes.
  if _is_any_significant(plan.alpha, row.p_corrected):
    is_positive = {at_size.effect > 0 for at_size in row.sizes}
    if len(is_positive) > 1:
      return DISAGREE
    return BETTER if row.effect * member.measure.sign > 0 else WORSE

  # The mean lies within the plan's margin. The variant is equivalent only if
  # the mean at each size does too, since differences at two sizes may cancel.
  # Otherwise it may still be no worse.
  if _is_any_significant(plan.alpha, row.p_equivalent):
    if all(abs(at_size.effect) < plan.margin for at_size in row.sizes):
      return EQUIVALENT
  if _is_any_significant(plan.alpha, row.p_not_worse):
    return NOT_WORSE
  return NONE_SHOWN


def _is_any_significant(level: float, *ps: float | None) -> bool:
  """Returns whether any of some p-values is known and at most a level."""
  return any(p is not None and p <= level for p in ps)


def _diverged_share_of_base(plan: Plan, outcomes: Outcomes, measure: Measure
                            ) -> float:
  """Returns the share of the base's runs that diverged, in all phases but that
  in which learning rates are tried."""
  runs = []
  for outcome in outcomes:
    is_base = outcome.variant in (plan.base, SECOND_BASE)
    is_of_measure = outcome.workload == measure.workload
    if is_base and is_of_measure and outcome.phase != 'tune':
      runs.append(outcome)
  return pairing.diverged_share(runs)


def _has_too_many_diverged(plan: Plan, row: Verdict, base_share: float) -> bool:
  """Returns whether more of a variant's runs diverged, beyond the base's share,
  than the plan allows."""
  # Some slack for the last digit: 29 of 100 are no more than 0.29, and yet more
  # than 0.29 * 100.
  most = plan.unstable + base_share + 1e-9
  return row.diverged / max(row.runs, 1) > most


def _shape_of_noise(members: Sequence[FamilyMember], measure: Measure
                    ) -> statistics.NoiseShape | None:
  """Returns the skewness and outliers of the differences of all variants from
  the base; None where there are too few."""
  differences_of_variants = []  # of each variant [seeds, sizes]
  for member in members:
    if member.measure == measure and member.differences:
      differences_of_variants.append(np.array([*member.differences.values()]))
  return statistics.measure_noise_shape(differences_of_variants)


def mean_over_sizes(differences: np.ndarray) -> np.ndarray:
  """Returns the mean over sizes of [seeds, sizes]."""
  return differences.mean(1)


def _pooled_spread(shape: statistics.NoiseShape | None,
                   figure: Callable[[np.ndarray], np.ndarray]
                   ) -> statistics.PooledDeviation | None:
  """Returns the spread of a figure over the seeds of all variants together,
  where their noise does not look normal; else None.

  Args:
    shape: the shape of the noise; None where it is not known.
    figure: computes the figure of each seed, [seeds], of [seeds, sizes].
  """
  return None if shape is None else shape.pooled_deviation(figure)


def _student_effect(size: str, differences: Sequence[float],
                    pooled: statistics.PooledDeviation | None,
                    shifts: np.ndarray | None) -> Effect:
  """Returns the mean of paired differences with Student's interval and p-value.

  Args:
    size: the name of the size of the model, or ALL_SIZES.
    differences: the difference of each seed, variant minus base.
    pooled: a standard deviation over all variants, for noise that is not
      normal. It makes the interval wider and p larger, or leaves them.
    shifts: [draws], random draws of how far inexact tuning may have moved the
      mean, which do the same; None: that is not known.

  Returns:
    The effect. Its mean and interval are None if there are no differences.
  """
  mean = low = high = None
  if differences:
    mean, low, high, _ = statistics.student_interval(
        values=differences, pooled=pooled, shifts=shifts)
  return Effect(
      size=size, effect=mean, low=low, high=high, n=len(differences),
      p=statistics.student_p_value(differences, pooled, shifts),
      differences=differences)


def _effect_over_items(member: FamilyMember, over_seeds: Effect
                       ) -> tuple[Effect | None, float | None]:
  """Returns the difference of a variant from the base by the scores of single
  items (documents or questions), with an interval that holds for other seeds
  and other items.

  Only seeds whose runs ended at all sizes count; a score is the mean over the
  sizes.

  The suffixes name axes: S seeds, Q items (such as questions).

  Args:
    member: the variant, the measure, and the pairs of runs.
    over_seeds: the effect over the seeds alone, whose interval may be by the
      deviation of all variants together.

  Returns:
    `both` and `item_noise` of a Verdict: the effect over seeds and items
    crossed, and half of the interval over the items alone. None where the items
    are not known, or not the same in all runs.
  """
  # The scores of each pair of runs: for each seed, one pair at each size.
  name = member.measure.name
  seeds = [*member.differences]
  score_pairs = []
  for seed in seeds:
    for pairs in member.pairs_by_size:
      pair = pairs[seed]
      score_pairs.append((pair.ours.items.get(name), pair.base.items.get(name)))
  # This aligns the items of all runs: scores are [pairs, Q = items], and
  # weights [Q], such as the number of tokens of a document.
  scores = items.pair_scores(score_pairs)
  if scores is None:
    return None, None
  variant_scores, base_scores, weights_Q = scores

  # The pairs were listed seed by seed, so this splits them into [S = seeds,
  # sizes, Q = items]; the mean over the sizes is [S, Q].
  differences_by_size = (variant_scores - base_scores).reshape(
      len(seeds), len(member.sizes), -1)
  differences_SQ = differences_by_size.mean(1)

  # The interval over seeds and items. That over the items alone is found of the
  # mean of the seeds, as if it were one seed.
  crossed = statistics.estimate_over_seeds_and_items(differences_SQ, weights_Q)
  over_items = statistics.estimate_over_seeds_and_items(
      differences_SQ.mean(0, keepdims=True), weights_Q)
  both = item_noise = None
  if crossed.p is not None and len(seeds) > 1:
    both = _no_surer_than_over_seeds(
        crossed, over_seeds, num_items=differences_SQ.shape[1])
  if over_items.p is not None:
    item_noise = over_items.high - over_items.mean
  return both, item_noise


def _no_surer_than_over_seeds(crossed: statistics.CrossedEstimate,
                              over_seeds: Effect, num_items: int) -> Effect:
  """Returns the effect over seeds and items (documents or questions), but with
  an interval and a p-value no smaller than those over the seeds alone.

  An effect that must hold for other items too can only be less certain. The
  estimate over both may still come out more certain, because it has more
  degrees of freedom and does not pool the noise of all variants.

  Args:
    crossed: the estimate over seeds and items.
    over_seeds: the effect over the seeds alone.
    num_items: the number of items.
  """
  # The interval over the seeds may reach further to one side than to the other,
  # because of the choices of tuned values.
  below = above = crossed.high - crossed.mean
  p = crossed.p
  if over_seeds.low is not None:
    below = max(below, over_seeds.effect - over_seeds.low)
    above = max(above, over_seeds.high - over_seeds.effect)
    p = max(p, over_seeds.p)
  return Effect(
      size=ALL_SIZES, effect=crossed.mean, low=crossed.mean - below,
      high=crossed.mean + above, n=num_items, p=p)


def _trend_over_sizes(member: FamilyMember, shape: statistics.NoiseShape | None
                      ) -> Effect | None:
  """Returns how the effect of a variant changes with the size of the model: the
  slope of its difference from the base over log10 of the base's number of
  parameters.

  A line is fitted to each seed by least squares, and the interval of the slope
  is over the seeds. So it holds however noisy each size is.

  Args:
    member: the variant, the measure, and the pairs of runs.
    shape: the shape of the noise of all variants; None: it is not known.

  Returns:
    The mean slope, or None for fewer than two sizes or no seed.
  """
  if not member.differences or len(member.sizes) < 2:
    return None
  # The number of parameters of the base, in the order of member.sizes.
  log_params = []
  for pairs in member.pairs_by_size:
    any_pair = next(iter(pairs.values()))  # all have the base of this size
    log_params.append(math.log10(any_pair.base.params))

  def slopes(differences: np.ndarray) -> np.ndarray:
    """Returns the slope of each seed, [seeds], from differences [seeds, sizes].
    """
    return np.polyfit(log_params, differences.T, 1)[0]

  # The pooled deviation and the shifts must be those of the slope too.
  differences = np.array([*member.differences.values()])
  slope_of_seeds = slopes(differences).tolist()
  return _student_effect(
      size=ALL_SIZES, differences=slope_of_seeds,
      pooled=_pooled_spread(shape, slopes), shifts=member.shifts(slopes))
