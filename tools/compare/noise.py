"""How far two runs of the base stand apart, and what a study can find then.

A test finds an effect by the spread of the differences of pairs. The first
phase of a study measures that spread between the base and the base with other
first parameters, and power is announced from it before anything is compared.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from tools.compare import pairing, statistics
from tools.compare.pairing import ALL_SIZES
from tools.compare.plan import SECOND_BASE, Measure, Plan

# A share of runs on a plateau that is so small that a screening may meet none.
SHARE_OF_RARE_PLATEAUS = 0.1
# The names by which a report calls the phases that test.
NAME_OF_PHASE = {'screen': 'screening', 'confirm': 'confirmation'}


@dataclasses.dataclass(frozen=True)
class Noise:
  """How far base and base-again stand apart, and what a test can find then.

  Attributes:
    size: a size of the plan, or ALL: the mean over sizes, which the
      confirmation tests.
    measure: the name of the measure.
    phase: the phase whose test is meant: 'screen' or 'confirm'.
    pairs: the number of pairs that both ended, at all sizes of the row.
    sd: the standard deviation of the paired differences, or of their means
      over the sizes.
    seeds: the number of seeds that the phase has.
    level: the level at which the test must find, as if all variants but one
      were like the base: alpha / variants, or q / variants; in the confirmation
      of a secondary measure alpha / (variants * secondary measures), since
      these are corrected together.
    smallest_effect: the smallest effect that is found with the power that the
      plan asks for.
    seeds_needed: the number of seeds for the effect that the plan wants; None
      for a measure that is not the primary one, and where 10,000 do not do.
    power: the probability with which that effect is found; None likewise.
    skew: the p of the skewness of the base's runs (their means over the sizes),
      if their noise were normal.
    outliers: the p of the largest of the differences. Where one of both is
      small, the other figures are resampled from these differences.
    error: how often a study without effect finds one then, at `level`.
    power_within: the probability with which a variant that has no effect is
      shown to be equivalent, where the plan names a margin.
    snr: the signal-to-noise ratio of the measure: how far the means of the
      sizes are apart, over the standard deviation of a run (Heineman et al.
      2025, arXiv 2508.13144).
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


class AnnouncedPower(NamedTuple):
  """The power of the whole study, announced before it is run.

  Attributes:
    power: the power of the screening and the confirmation together, which is
      the product of both. Both hang on the same noise, which is an estimate, so
      it is rather more.
    enough: whether that is as much as the plan wants.
    sentence: all this, for a reader.
  """
  power: float
  enough: bool
  sentence: str


def measure_noise(plan: Plan, outcomes: pairing.Outcomes, phase='noise'
                  ) -> list[Noise]:
  """Returns how much each measure varies between two runs of the base, and what
  each test of the study can find then.

  A measure has a row for each size, one for the screening, and one for the
  confirmation. The confirmation is measured as it is tested, by the seeds'
  means over the sizes. To take the sizes for independent would give it more
  degrees of freedom, and promise far too much where they are not.

  Args:
    plan: the plan of the study.
    outcomes: the outcomes of the runs of all phases so far.
    phase: the name of the phase that ran the base twice.
  """
  runs = pairing.outcomes_of_phase(outcomes, phase)
  snr_by_measure = {}
  for measure in plan.measures:
    snr_by_measure[measure.name] = signal_to_noise(plan, runs, measure)
  # Tests are corrected over the measures that are precise enough to go on.
  plan_of_tests = drop_noisy_measures(plan, snr_by_measure)

  # The tests of each measure: the row's size, its phase and the sizes that it
  # is a mean of.
  tests = [(size, 'confirm', (size,)) for size in plan.sizes]
  tests.append((plan.sizes[0], 'screen', plan.sizes[:1]))
  tests.append((ALL_SIZES, 'confirm', plan.sizes))

  rows = []
  for measure in plan.measures:
    # The pairs of base-again and base, and the share of these that diverged.
    pairs_at_size = {}
    runs_of_pairs = []
    for size in plan.sizes:
      pairs_at_size[size] = pairing.pair_with_base(
          runs=runs, variant=SECOND_BASE, base=plan.base, size=size,
          measure=measure)
      for pair in pairs_at_size[size].values():
        runs_of_pairs += pair
    diverged_share = pairing.diverged_share(runs_of_pairs)

    # The effects that each test finds with such a noise.
    for row_size, phase_of_test, sizes in tests:
      row = _noise_of_test(
          plan=plan_of_tests, measure=measure, size=row_size,
          phase=phase_of_test,
          pairs_by_size=[pairs_at_size[size] for size in sizes],
          diverged_share=diverged_share)
      row = dataclasses.replace(row, snr=snr_by_measure[measure.name])
      rows.append(row)
  return rows


def signal_to_noise(plan: Plan, runs: pairing.Runs, measure: Measure
                    ) -> float | None:
  """Returns the signal-to-noise ratio of a measure, such as the loss (Heineman
  et al. 2025, arXiv 2508.13144).

  The signal is the range of the means at the sizes of the model. The noise is
  the standard deviation of a run, sqrt(mean over sizes of the variance).

  Args:
    plan: the plan of the study.
    runs: the runs of the base, and of the base with other initial parameters.
    measure: the measure.

  Returns:
    signal / noise, or None if a size has fewer than two runs that ended well.
  """
  # Compute the mean and the variance of the runs at each size.
  mean_by_size, variance_by_size = [], []
  for size in plan.sizes:
    values = []
    for variant in (plan.base, SECOND_BASE):
      outcomes = pairing.outcomes_with_measure(runs, variant=variant, size=size,
                                               measure=measure)
      values += [outcome.values[measure.name] for outcome in outcomes.values()
                 if not outcome.diverged]
    if len(values) < 2:
      return None
    mean_by_size.append(np.mean(values))
    variance_by_size.append(np.var(values, ddof=1))

  # Without any noise the ratio is infinite, unless the signal is 0 too.
  signal = float(np.ptp(mean_by_size))
  noise = math.sqrt(np.mean(variance_by_size))
  if noise:
    return signal / noise
  return math.inf if signal else 0.0


def drop_noisy_measures(plan: Plan, snr_by_measure: Mapping[str, float | None]
                        ) -> Plan:
  """Returns the plan of a study without the measures whose signal-to-noise
  ratio is below the least one that it allows. Workloads (the text, or probes)
  that no other measure needs are dropped too.

  The primary measure stays, and so does a measure whose ratio is not known.

  Args:
    plan: the plan of the study.
    snr_by_measure: the signal-to-noise ratio of each measure, by its name.
  """
  least_snr = plan.least_snr or 0.0
  measures = []
  for measure in plan.measures:
    snr = snr_by_measure.get(measure.name)
    if measure == plan.primary or snr is None or snr >= least_snr:
      measures.append(measure)
  needed = {measure.workload for measure in measures}
  workloads = tuple(name for name in plan.workloads if name in needed)
  return dataclasses.replace(
      plan, measures=tuple(measures), workloads=workloads)


def _corrected_level(plan: Plan, measure: Measure, phase: str) -> float:
  """Returns the level at which one test must be significant after a correction
  for all tests of its family, if all variants pass the screening (Bonferroni:
  the level of the family over the number of its tests)."""
  num_tests = len(plan.variants)
  if phase == 'screen':
    return plan.q / num_tests
  # The measures that are not primary are corrected together.
  if measure != plan.primary:
    num_tests *= max(len(plan.measures) - 1, 1)
  return plan.alpha / num_tests


def _noise_of_test(plan: Plan, measure: Measure, size: str, phase: str,
                   pairs_by_size: Sequence[pairing.Pairs],
                   diverged_share: float) -> Noise:
  """Returns the noise of a paired t-test over some sizes, and its power.

  Args:
    plan: the plan, with the measures that go on.
    measure: the measure that is tested.
    size: what the row calls the sizes.
    phase: the phase of the test.
    pairs_by_size: the pairs of base-again and base at each size of the test.
    diverged_share: the share of runs that diverge.

  Returns:
    The row; without an `sd` where fewer than two pairs ended.
  """
  num_seeds = plan.seeds[phase]
  differences_by_seed = pairing.differences_by_seed(pairs_by_size, measure)
  row = Noise(
      size=size, measure=measure.name, phase=phase,
      pairs=len(differences_by_seed), sd=None, seeds=num_seeds,
      level=_corrected_level(plan, measure, phase))
  if len(differences_by_seed) < 2:
    return row

  # How far the pairs are apart: at each size, and as means over the sizes.
  differences = np.array([*differences_by_seed.values()])  # [seeds, sizes]
  sds = np.std(differences, axis=0, ddof=1)
  sd = float(np.std(pairing.mean_differences(differences_by_seed), ddof=1))
  test: dict[str, Any] = dict(
      sd=sd, sds=sds, df=len(differences_by_seed) - 1, level=row.level,
      rate=diverged_share, limit=plan.unstable)

  # Whether that looks normal; what is announced is resampled where it does not.
  # What a seed's data do to all sizes is looked for in the base's own runs,
  # since differences are without it.
  base_means = _base_means(pairs_by_size, measure, differences_by_seed)
  shape_of_base = statistics.measure_noise_shape([base_means])
  shape_of_differences = statistics.measure_noise_shape([differences])
  if shape_of_base is not None and shape_of_differences is not None:
    row = dataclasses.replace(
        row, skew=shape_of_base.skew, outliers=shape_of_differences.outliers)
    if is_irregular(row) and sds.all():
      test['seen'] = differences
      error = statistics.simulate_false_positive_rate(
          seen=differences, sds=sds, seeds=num_seeds, level=row.level,
          variants=len(plan.variants))
      row = dataclasses.replace(row, error=error)

  # The smallest effect that is found. The plan wants one of the primary measure
  # alone, so the power for it is of that measure, too.
  smallest_effect = statistics.smallest_effect(
      plan.power, seeds=num_seeds, **test)
  row = dataclasses.replace(row, sd=sd, smallest_effect=smallest_effect)
  if measure != plan.primary:
    return row
  power_within = None
  if plan.margin:
    power_within = statistics.power_to_find(
        plan.margin, seeds=num_seeds, within=True, **test)
  return dataclasses.replace(
      row,
      power=statistics.power_to_find(plan.effect, seeds=num_seeds, **test),
      power_within=power_within,
      seeds_needed=statistics.seeds_needed(plan.effect, plan.power, **test))


def _base_means(pairs_by_size: Sequence[pairing.Pairs], measure: Measure,
                seeds: Mapping[int, Any]) -> np.ndarray:
  """Returns the means over the sizes of the base's own runs, [seeds, 1]."""
  mean_by_seed = []
  for seed in seeds:
    values = [pairs[seed].base.values[measure.name] for pairs in pairs_by_size]
    mean_by_seed.append([np.mean(values)])
  return np.array(mean_by_seed)


def is_irregular(row: Noise) -> bool:
  """Returns whether the noise of the base is not taken for normal: where the
  smaller p of its two tests of normality, corrected by Bonferroni, is small."""
  if row.skew is None:
    return False
  return 2 * min(row.skew, row.outliers) <= statistics.MAX_P_OF_IRREGULAR


def announce_power(plan: Plan, rows: Sequence[Noise]) -> AnnouncedPower:
  """Returns the power of a study, which is the probability that it finds the
  effect that its plan asks for, and the sentences that announce it.

  An effect must pass two tests, the screening and then the confirmation, so the
  power of the study is the product of their powers.

  Args:
    plan: the plan of the study.
    rows: the noise of each measure, as `measure_noise` returns it.
  """
  screen, confirm = _tests_of_primary(plan, rows)

  # Multiply the powers of both tests. An unknown power counts as 0.
  screen_power = screen.power or 0.0
  confirm_power = confirm.power or 0.0
  power = screen_power * confirm_power
  is_enough = power >= plan.power

  # The sentences: the power, what it would take to have enough, and what the
  # power assumes.
  sentences = [_describe_power(plan, screen_power, confirm_power)]
  if not is_enough:
    screen_needs = _describe_needed_seeds(plan, screen)
    confirm_needs = _describe_needed_seeds(plan, confirm)
    sentences.append(
        f'That is less than the {plan.power:.0%} that the plan wants: '
        f'{screen_needs}; {confirm_needs}.')
  if screen.error is not None:
    sentences.append(_describe_resampling(plan, screen, plan.q))
  if confirm.error is not None:
    sentences.append(_describe_resampling(plan, confirm, plan.alpha))
  sentences.append(_describe_unseen_plateaus(plan))

  # The power to show that there is no effect.
  if plan.margin and confirm.sd is not None:
    sentences.append(
        'A variant without any effect is shown in the confirmation '
        f'to be equivalent within {plan.margin:g} with a probability '
        f'of {confirm.power_within:.0%}.')
  return AnnouncedPower(
      power=power, enough=is_enough, sentence=' '.join(sentences))


def _tests_of_primary(plan: Plan, rows: Sequence[Noise]) -> list[Noise]:
  """Returns the rows of the two tests of the primary measure that follow one
  another: the screening at the smallest size, and the confirmation over all."""
  row_of_phase = {}
  for row in rows:
    is_test = row.phase == 'screen' or row.size == ALL_SIZES
    if row.measure == plan.primary.name and is_test:
      row_of_phase[row.phase] = row
  return [row_of_phase['screen'], row_of_phase['confirm']]


def _describe_power(plan: Plan, screen_power: float, confirm_power: float
                    ) -> str:
  """Returns the sentence about the power of a study, which is the probability
  that it finds the effect that its plan asks for.

  Args:
    plan: the plan of the study.
    screen_power: the probability that the effect passes the screening.
    confirm_power: the probability that it passes the confirmation.
  """
  # The power is rounded down, because it is a promise.
  percent = math.floor(100 * screen_power * confirm_power)
  screen_seeds = plan.seeds['screen']
  confirm_seeds = plan.seeds['confirm']
  return (f'An effect of {plan.effect:g} in {plan.primary.name} is found '
          f'with a probability of {percent}% or more: it '
          f'passes the screening ({screen_seeds} seeds) in '
          f'{screen_power:.0%} of such studies, and the confirmation '
          f'({confirm_seeds} seeds) in {confirm_power:.0%}.')


def _describe_unseen_plateaus(plan: Plan) -> str:
  """Returns the sentence about runs that end on a plateau (a loss far above the
  others). They may be so rare that a study's screening has none of them, and
  then its tests know nothing of such noise.

  If a share s of all runs ends on a plateau, none of n runs does with
  probability (1 - s)^n, by which the false discovery rate may be higher. If
  only one variant has such runs, n is the number of its own runs.

  Args:
    plan: the plan of the study.
  """
  num_seeds = plan.seeds['screen']
  num_runs = num_seeds * len(plan.variants)
  p_unseen_of_one = (1 - SHARE_OF_RARE_PLATEAUS) ** num_seeds
  p_unseen = (1 - SHARE_OF_RARE_PLATEAUS) ** num_runs
  false_discovery_rate = min(plan.q + p_unseen, 1)
  return (f'Where {SHARE_OF_RARE_PLATEAUS:.0%} of the variants\' runs end on a '
          f'plateau, none of the {num_runs} of the screening does with a '
          f'probability of {p_unseen:.2g}, so that its false discovery rate is '
          f'up to {false_discovery_rate:.2g} then. Where those of one variant '
          f'alone do, none of its {num_seeds} does with a probability of '
          f'{p_unseen_of_one:.2g}, in which it may pass wrongly.')


def _describe_resampling(plan: Plan, row: Noise, planned_share: float) -> str:
  """Returns the sentence that warns of noise that does not look normal. The
  power of the test is then resampled from this noise.

  Args:
    plan: the plan of the study.
    row: the noise of the test, which is the screening or the confirmation.
    planned_share: the share of studies without any effect that may find one, by
      the plan.
  """
  # The chance that any of the variants is found wrongly (Boole's inequality).
  share_of_errors = min(row.error * len(plan.variants), 1)
  return (f'The noise of the {NAME_OF_PHASE[row.phase]} does not look normal '
          f'(p = {row.skew:.2g} by the skewness of the base\'s runs, '
          f'{row.outliers:.2g} by the largest difference), so that '
          'this is resampled from it (and is less where the '
          'differences of the variants look so, too: the test is then '
          f'more cautious), and at most {share_of_errors:.2g} of studies '
          f'without any effect find one, where {planned_share:.2g} is planned.')


def _describe_needed_seeds(plan: Plan, row: Noise) -> str:
  """Returns how many seeds a phase needs for the power that the plan wants, as
  a part of a sentence."""
  phase = NAME_OF_PHASE[row.phase]
  if row.sd is None:
    return f'fewer than 2 pairs of the base ended for the {row.phase}ing'
  needs = f'more than {statistics.MAX_SEEDS:,} seeds'
  if row.seeds_needed:
    needs = f'{row.seeds_needed} seeds'
  return f'{plan.power:.0%} in the {phase} alone takes {needs}'
