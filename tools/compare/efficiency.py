"""How much compute a variant spares, or wastes, beside its base.

A speed-up is read from the curves of held-out loss of one size. A compute
multiplier is that of a scaling law of the base over its sizes, by runs each of
which was cooled down at its budget; the same law predicts a larger size.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from tools.compare import pairing, statistics
from tools.compare.pairing import ALL_SIZES
from tools.compare.plan import LOWER, Measure, Outcome, Plan

WAYS_TO_COUNT_SPENDING = ('flops', 'seconds')  # what a speed-up counts
# Where the figures of statistics.jackknife_scaling_figures stand.
FLOOR, LOSS, DIFFERENCE, MULTIPLIER = range(4)


class SpeedUp(NamedTuple):
  """How many times what the variant spends the base needs to the same loss.

  Attributes:
    size: a size of the plan; of multipliers also ALL: one factor, fitted to all
      sizes.
    by: 'flops' or 'seconds'; of multipliers, which FLOPs and which floor.
    factor, low, high: the geometric mean over seeds, and its interval; low and
      high are None for fewer than 3. Of multipliers the law's, and a jackknife
      over paired seeds.
    fit_error: the rms of the fitted curves, in nats: a factor of losses that
      differ by less says nothing; of multipliers, None.
    floor: the floor of a multiplier's law.
  """
  size: str
  by: str
  factor: float | None
  low: float | None
  high: float | None
  fit_error: float | None
  floor: float | None = None


def total_flops(outcome: Outcome) -> float:
  """Returns the FLOPs of a run."""
  return outcome.flops


def flops_without_embeddings(outcome: Outcome) -> float:
  """Returns the FLOPs of a run that are not for products with the vocabulary; 0
  where they are not known."""
  if outcome.body is None:
    return 0.0
  return outcome.flops * outcome.body


# Which FLOPs a multiplier counts, by what it is called.
FLOPS_OF_MULTIPLIER = {'multiplier': total_flops,
                       'multiplier, no embeddings': flops_without_embeddings}


class Ladder(NamedTuple):
  """Runs of base and variant at several sizes, to which a law is fitted.

  Attributes:
    flops: [2, sizes], of the base and of the variant, by the names of COUNTED
      that are known.
    losses: [seeds, 2, sizes].
  """
  flops: dict[str, np.ndarray]
  losses: np.ndarray


def cooled_ladder(measure: Measure, pairs_by_size: Sequence[pairing.Pairs]
                  ) -> Ladder | None:
  """Returns the runs that a law is fitted to; None where they give no law: they
  are too few, a larger value is better, or a run was not cooled down."""
  seeds = pairing.ended_seeds(pairs_by_size)

  def table(figure) -> np.ndarray:
    """Returns a figure of each run, [seeds, 2, sizes], the base's first."""
    rows = []
    for seed in seeds:
      base = [figure(pairs[seed].base) for pairs in pairs_by_size]
      ours = [figure(pairs[seed].ours) for pairs in pairs_by_size]
      rows.append([base, ours])
    return np.array(rows, float)

  # Where there is no law.
  if min(len(pairs_by_size), len(seeds)) < statistics.MIN_SEEDS:
    return None
  if measure.better != LOWER:
    return None
  if not np.all(table(lambda run: bool(run.cooled))):
    return None
  flops = {}
  for name, count in FLOPS_OF_MULTIPLIER.items():
    spent = table(count)[0]  # all seeds spend alike
    if np.all(spent > 0):
      flops[name] = spent
  return Ladder(flops=flops,
                losses=table(lambda run: run.values[measure.name]))


def compute_multipliers(plan: Plan, sizes: Sequence[str],
                        pairs_by_size: Sequence[
                            pairing.Pairs]) -> list[SpeedUp]:
  """Returns the compute multipliers of a variant, of one fit of all sizes and
  at each, by each count of FLOPs, with a floor that is fitted and with one that
  is pinned; none where the runs give no law."""
  runs = cooled_ladder(plan.primary, pairs_by_size)
  if runs is None:
    return []
  rows = []
  for name, flops in runs.flops.items():
    # One law has a floor that is fitted, and one has one that is pinned.
    for floor in (None, plan.floor or 0.0):
      figures, halves = statistics.jackknife_scaling_figures(
          compute=flops, losses=runs.losses, ahead=flops[:, -1], floor=floor)
      by = name
      if floor is not None:
        by = f'{name}, pinned'
      fitted_floor, *_ = value_and_ends(figures[FLOOR], 0.0)
      for size, log, half in zip((ALL_SIZES, *sizes), figures[MULTIPLIER:],
                                 halves[MULTIPLIER:]):
        factor, low, high = _exponentials(value_and_ends(log, half))
        rows.append(SpeedUp(
            size=size, by=by, factor=factor, low=low, high=high, fit_error=None,
            floor=fitted_floor))
  return rows


def value_and_ends(value: float, half: float) -> list[float | None]:
  """Returns a value and the ends of its interval; None for what is not known.
  """
  ends = (value, value - half, value + half)
  return [float(x) if math.isfinite(x) else None for x in ends]


def _exponentials(logs: Sequence[float | None]) -> list[float | None]:
  """Returns exp of each figure that is known."""
  return [None if x is None else math.exp(x) for x in logs]


def fit_speed_ups(sizes: Sequence[str], pairs_by_size: Sequence[pairing.Pairs]
                  ) -> list[SpeedUp]:
  """Returns the speed-up of a variant at each size, by FLOPs and by time, of
  the curves of the primary measure's runs; none where no curves were kept.

  For each seed, the base's spending over the variant's to the same loss, read
  from a saturating power law of each curve (statistics.speed_up).
  """
  rows = []
  for size, by_seed in zip(sizes, pairs_by_size):
    pairs = [by_seed[seed] for seed in pairing.ended_seeds([by_seed])]
    has_curves = any(pair.ours.curve or pair.base.curve for pair in pairs)
    if not has_curves:
      continue
    for by in WAYS_TO_COUNT_SPENDING:
      laws = [(_law(pair.ours, by), _law(pair.base, by)) for pair in pairs]
      mean, error = statistics.mean_speed_up(laws)
      factor = low = high = None
      if mean is not None:
        factor, low, high, _ = mean
      rows.append(SpeedUp(
          size=size, by=by, factor=factor, low=low, high=high, fit_error=error))
  return rows


def _law(outcome: Outcome, by: str) -> statistics.PowerLaw | None:
  """Fits a curve from where the learning rate had reached its height."""
  curve = outcome.curve
  is_warm = np.array(curve.get('warm', True), bool)
  spent = np.array(curve.get(by, []))
  loss = np.array(curve.get('loss', []))
  return statistics.fit_power_law(
      compute=np.where(is_warm, spent, math.nan),
      loss=np.where(is_warm, loss, math.nan))


def predict_largest_size(
    plan: Plan, outcomes: pairing.Outcomes, flops: Mapping[str, float]
    ) -> list[dict[str, Any]]:
  """Returns what the confirmation lets expect of the plan's largest size, as
  {'variant', 'value', 'low', 'high'}: of the base its primary measure, of the
  others their differences from it; none where runs were not cooled down.

  The law is taken for true, and the multiplier for the same at all sizes; the
  noise of the seeds that will be seen is within the interval.

  Args:
    plan: the plan of the study.
    outcomes: the outcomes so far.
    flops: the FLOPs of a run of that size, by variant, the base too.
  """
  runs = pairing.outcomes_of_phase(outcomes, 'confirm')
  rows = []
  for variant in flops:
    pairs_by_size = [
        pairing.pair_with_base(runs=runs, variant=variant, base=plan.base,
                               size=size,
                         measure=plan.primary) for size in plan.sizes]
    samples = cooled_ladder(plan.primary, pairs_by_size)
    if samples is None:
      continue
    compute = next(iter(samples.flops.values()))
    ahead = np.array([flops[plan.base], flops[variant]])
    values, halves = statistics.jackknife_scaling_figures(compute,
                                                          samples.losses, ahead)
    # The base stands beside itself.
    if variant == plan.base:
      figure = LOSS
      by_seed = samples.losses[:, 0]  # [seeds, sizes]
    else:
      figure = DIFFERENCE
      by_seed = samples.losses[:, 1] - samples.losses[:, 0]
    # The interval of a mean narrows with the root of the number of seeds.
    at_last_size = by_seed[:, -1]
    fewer = math.sqrt(len(at_last_size) / plan.seeds['largest'])
    seen = statistics.half_width_of_interval(at_last_size) * fewer
    value, low, high = value_and_ends(
        values[figure], math.hypot(halves[figure], seen))
    rows.append({'variant': variant, 'value': value, 'low': low, 'high': high})
  return rows
