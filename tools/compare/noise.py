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
from tools.compare.pairing import ALL
from tools.compare.plan import AGAIN, Measure, Plan

RARE = 0.1  # the share of runs on a plateau by which a screening may be misled
# The names by which a report calls the phases that test.
WORDS = {'screen': 'screening', 'confirm': 'confirmation'}


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


class Announced(NamedTuple):
  """The power of the whole study, said before it is run.

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


def measured(plan: Plan, outcomes: pairing.Outcomes, phase='noise'
             ) -> list[Noise]:
  """Returns, for each measure, a row for each size, one for the screening, and
  one for the confirmation, which is over the mean of the sizes.

  The last is measured as it is tested, by the seeds' means over the sizes: to
  take the sizes for independent would give it more degrees of freedom, and
  promise far too much where they are not.
  """
  runs = pairing.of_phase(outcomes, phase)
  snrs = {measure.name: signal_to_noise(plan, runs, measure)
          for measure in plan.measures}
  going = going_on(plan, snrs)

  # The tests of each measure: the row's size, its phase and the sizes that it
  # is a mean of.
  smallest = plan.sizes[:1]
  tests = [(size, 'confirm', (size,)) for size in plan.sizes]
  tests.append((plan.sizes[0], 'screen', smallest))
  tests.append((ALL, 'confirm', plan.sizes))

  rows = []
  for measure in plan.measures:
    pairs_at = {}
    runs_of_pairs = []
    for size in plan.sizes:
      pairs_at[size] = pairing.pairs_of(
          runs=runs, variant=AGAIN, base=plan.base, size=size, measure=measure)
      for pair in pairs_at[size].values():
        runs_of_pairs += pair
    rate = pairing.diverged_share(runs_of_pairs)
    for name, tested, sizes in tests:
      row = _row(
          plan=going, measure=measure, size=name, phase=tested,
          pairs_by_size=[pairs_at[size] for size in sizes], rate=rate)
      rows.append(dataclasses.replace(row, snr=snrs[measure.name]))
  return rows


def signal_to_noise(plan: Plan, runs: pairing.Runs, measure: Measure
                    ) -> float | None:
  """Returns the signal-to-noise ratio of a measure (Heineman et al. 2025, arXiv
  2508.13144): the range of the means of the sizes, over the standard deviation
  of a run, sqrt(mean over sizes of its variance). None where a size has fewer
  than two runs that ended."""
  means, variances = [], []
  for size in plan.sizes:
    values = []
    for variant in (plan.base, AGAIN):
      outcomes = pairing.with_measure(runs, variant, size, measure)
      values += [outcome.values[measure.name] for outcome in outcomes.values()
                 if not outcome.diverged]
    if len(values) < 2:
      return None
    means.append(np.mean(values))
    variances.append(np.var(values, ddof=1))
  signal = float(np.ptp(means))
  noise = math.sqrt(np.mean(variances))
  if noise:
    return signal / noise
  return math.inf if signal else 0.0


def going_on(plan: Plan, snrs: Mapping[str, float | None]) -> Plan:
  """Returns the plan without the measures, the first one aside, that have less
  signal to noise than it wants, and the workloads that have none then."""
  least = plan.least_snr or 0.0
  measures = []
  for measure in plan.measures:
    snr = snrs.get(measure.name)
    if measure == plan.primary or snr is None or snr >= least:
      measures.append(measure)
  needed = {measure.workload for measure in measures}
  workloads = tuple(name for name in plan.workloads if name in needed)
  return dataclasses.replace(
      plan, measures=tuple(measures), workloads=workloads)


def _level(plan: Plan, measure: Measure, phase: str) -> float:
  """Returns the level of a test that is corrected with all others of its
  family, where all variants pass the screening."""
  tests = len(plan.variants)
  if phase == 'screen':
    return plan.q / tests
  if measure != plan.primary:
    tests *= max(len(plan.measures) - 1, 1)
  return plan.alpha / tests


def _row(plan: Plan, measure: Measure, size: str, phase: str,
         pairs_by_size: Sequence[pairing.Pairs], rate: float) -> Noise:
  """Returns what a test of some sizes can find.

  Args:
    plan: the plan, with the measures that go on.
    measure: the measure that is tested.
    size: what the row calls the sizes.
    phase: the phase of the test.
    pairs_by_size: the pairs of base-again and base at each size of the test.
    rate: the share of runs that diverge.
  """
  seeds = plan.seeds[phase]
  by_seed = pairing.differences_by_seed(pairs_by_size, measure)
  row = Noise(
      size=size, measure=measure.name, phase=phase, pairs=len(by_seed), sd=None,
      seeds=seeds, level=_level(plan, measure, phase))
  if len(by_seed) < 2:
    return row

  # How far the pairs are apart: at each size, and as means over the sizes.
  differences = np.array([*by_seed.values()])  # [seeds, sizes]
  sds = np.std(differences, axis=0, ddof=1)
  sd = float(np.std(pairing.means(by_seed), ddof=1))
  test: dict[str, Any] = dict(
      sd=sd, sds=sds, df=len(by_seed) - 1, level=row.level, rate=rate,
      limit=plan.unstable)

  # Whether that looks normal; what is announced is resampled where it does not.
  # What a seed's data do to all sizes is looked for in the base's own runs,
  # since differences are without it.
  base_shape = statistics.shape([_base_means(pairs_by_size, measure, by_seed)])
  shape = statistics.shape([differences])
  if base_shape is not None and shape is not None:
    row = dataclasses.replace(
        row, skew=base_shape.skew, outliers=shape.outliers)
    if is_irregular(row) and sds.all():
      test['seen'] = differences
      error = statistics.errs(
          seen=differences, sds=sds, seeds=seeds, level=row.level,
          variants=len(plan.variants))
      row = dataclasses.replace(row, error=error)

  # The effects that are found then. One is wanted of the primary measure alone.
  smallest_effect = statistics.smallest_effect(plan.power, seeds=seeds, **test)
  row = dataclasses.replace(row, sd=sd, smallest_effect=smallest_effect)
  if measure != plan.primary:
    return row
  power_within = None
  if plan.margin:
    power_within = statistics.power(
        plan.margin, seeds=seeds, within=True, **test)
  return dataclasses.replace(
      row,
      power=statistics.power(plan.effect, seeds=seeds, **test),
      power_within=power_within,
      seeds_needed=statistics.seeds_needed(plan.effect, plan.power, **test))


def _base_means(pairs_by_size: Sequence[pairing.Pairs], measure: Measure,
                seeds: Mapping[int, Any]) -> np.ndarray:
  """Returns the means over the sizes of the base's own runs, [seeds, 1]."""
  means = []
  for seed in seeds:
    values = [pairs[seed].base.values[measure.name] for pairs in pairs_by_size]
    means.append([np.mean(values)])
  return np.array(means)


def is_irregular(row: Noise) -> bool:
  """Returns whether the noise of the base is not taken for normal."""
  if row.skew is None:
    return False
  return 2 * min(row.skew, row.outliers) <= statistics.IRREGULAR


def announce(plan: Plan, rows: Sequence[Noise]) -> Announced:
  """Returns what the study can find, by the rows of `measured`."""
  # The rows of the two tests that follow one another.
  by_phase = {}
  for row in rows:
    is_test = row.phase == 'screen' or row.size == ALL
    if row.measure == plan.primary.name and is_test:
      by_phase[row.phase] = row
  screen, confirm = by_phase['screen'], by_phase['confirm']

  # The power of both together; where it is not known, none.
  screen_power = screen.power or 0.0
  confirm_power = confirm.power or 0.0
  power = screen_power * confirm_power
  enough = power >= plan.power
  sentences = [
      f'An effect of {plan.effect:g} in {plan.primary.name} is found '
      f'with a probability of {math.floor(100 * power)}% or more: it '
      f'passes the screening ({plan.seeds["screen"]} seeds) in '
      f'{screen_power:.0%} of such studies, and the confirmation '
      f'({plan.seeds["confirm"]} seeds) in {confirm_power:.0%}.']
  if not enough:
    sentences.append(
        f'That is less than the {plan.power:.0%} that the plan wants: '
        f'{_wanted(plan, screen)}; {_wanted(plan, confirm)}.')
  for row, share in ((screen, plan.q), (confirm, plan.alpha)):
    if row.error is not None:
      sentences.append(_resampled(plan, row, share))

  # A screening cannot see runs on a plateau that are rare, whatever its power.
  runs = plan.seeds['screen'] * len(plan.variants)
  unseen = (1 - RARE) ** runs
  false_discoveries = min(plan.q + unseen, 1)
  sentences.append(
      f'Where {RARE:.0%} of the variants\' runs end on a plateau, '
      f'none of the {runs} of the screening does with a probability '
      f'of {unseen:.2g}, so that its false discovery rate is up to '
      f'{false_discoveries:.2g} then.')

  # The power to show that there is no effect.
  if plan.margin and confirm.sd is not None:
    sentences.append(
        'A variant without any effect is shown in the confirmation '
        f'to be equivalent within {plan.margin:g} with a probability '
        f'of {confirm.power_within:.0%}.')
  return Announced(power=power, enough=enough, sentence=' '.join(sentences))


def _resampled(plan: Plan, row: Noise, share: float) -> str:
  """Returns the sentence about noise that does not look normal."""
  wrong = min(row.error * len(plan.variants), 1)
  return (f'The noise of the {WORDS[row.phase]} does not look normal (p = '
          f'{row.skew:.2g} by the skewness of the base\'s runs, '
          f'{row.outliers:.2g} by the largest difference), so that '
          'this is resampled from it (and is less where the '
          'differences of the variants look so, too: the test is then '
          f'more cautious), and at most {wrong:.2g} of studies '
          f'without any effect find one, where {share:.2g} is planned.')


def _wanted(plan: Plan, row: Noise) -> str:
  """Returns how many seeds a phase needs for the power that the plan wants."""
  phase = WORDS[row.phase]
  if row.sd is None:
    return f'fewer than 2 pairs of the base ended for the {row.phase}ing'
  needs = f'more than {statistics.MOST_SEEDS:,} seeds'
  if row.seeds_needed:
    needs = f'{row.seeds_needed} seeds'
  return f'{plan.power:.0%} in the {phase} alone takes {needs}'
