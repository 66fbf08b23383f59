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
# The indices of the figures that a fitted law gives
# (statistics.jackknife_scaling_figures).
FLOOR, LOSS, DIFFERENCE, MULTIPLIER = range(4)


class SpeedUp(NamedTuple):
  """How many times what the variant spends the base needs to the same loss.

  Attributes:
    size: a size of the plan; of multipliers also ALL_SIZES: one factor, fitted
      to all sizes.
    by: 'flops' or 'seconds'; of multipliers, which FLOPs and which floor.
    factor, low, high: the geometric mean over seeds, and its interval; low and
      high are None for fewer than 3, and of times that runs share, since those
      vary in nothing. Of multipliers the law's, and a jackknife over paired
      seeds.
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
  share_without_embeddings = outcome.body
  if share_without_embeddings is None:
    return 0.0
  return outcome.flops * share_without_embeddings


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
  """Collects the FLOPs and losses of base and variant at several sizes of the
  model, so that a scaling law can be fitted to them.

  Args:
    measure: the measure, which must be a loss.
    pairs_by_size: for each size, the pairs of a run of the variant and one of
      the base with the same seed.

  Returns:
    The FLOPs and losses, or None if no law can be fitted: there are too few
    runs, a larger value is better, or the learning rate of a run had not fallen
    at its end.
  """
  # Return None if no law can be fitted. A law has as many unknowns as the
  # fewest sizes, and it is about losses at the end of a schedule.
  seeds = pairing.ended_seeds(pairs_by_size)
  if min(len(pairs_by_size), len(seeds)) < statistics.MIN_SEEDS:
    return None
  if measure.better != LOWER:
    return None
  for pairs in pairs_by_size:
    for seed in seeds:
      if not (pairs[seed].base.cooled and pairs[seed].ours.cooled):
        return None

  # The losses of all runs, [seeds, 2, sizes], the base's first.
  losses = []
  for seed in seeds:
    base = [pairs[seed].base.values[measure.name] for pairs in pairs_by_size]
    variant = [pairs[seed].ours.values[measure.name] for pairs in pairs_by_size]
    losses.append([base, variant])

  # The FLOPs of the first seed, [2, sizes], since all seeds spend alike.
  first_seed = seeds[0]
  flops = {}
  for name, count_flops in FLOPS_OF_MULTIPLIER.items():
    base = [count_flops(pairs[first_seed].base) for pairs in pairs_by_size]
    variant = [count_flops(pairs[first_seed].ours) for pairs in pairs_by_size]
    spent = np.array([base, variant], float)
    if np.all(spent > 0):
      flops[name] = spent
  return Ladder(flops=flops, losses=np.array(losses, float))


def compute_multipliers(plan: Plan, sizes: Sequence[str],
                        pairs_by_size: Sequence[pairing.Pairs]
                        ) -> list[SpeedUp]:
  """Returns the compute multipliers of a variant: how many times its compute
  the base needs to reach its loss, by a scaling law fitted to the base.

  A law falls towards a floor, the loss that no compute can go below. It is
  hard to fit, so there are two laws: one fits the floor, and one has it pinned
  to plan.floor.

  Args:
    plan: the plan of the study.
    sizes: the names of the sizes of the model.
    pairs_by_size: for each size, the pairs of a run of the variant and one of
      the base with the same seed.

  Returns:
    For each way to count FLOPs and each of the two laws: the multiplier over
    all sizes, and that at each size. [] if no law can be fitted.
  """
  ladder = cooled_ladder(plan.primary, pairs_by_size)
  if ladder is None:
    return []
  rows = []
  for name, flops in ladder.flops.items():
    # None lets the floor be fitted.
    for floor in (None, plan.floor or 0.0):
      figures, half_widths = statistics.jackknife_scaling_figures(
          compute=flops, losses=ladder.losses, ahead=flops[:, -1], floor=floor)
      by = name
      if floor is not None:
        by = f'{name}, pinned'
      floor_of_law, *_ = value_and_ends(figures[FLOOR], 0.0)

      # The figures from index MULTIPLIER on are logarithms of multipliers: the
      # one over all sizes, and then that at each size.
      log_multipliers = figures[MULTIPLIER:]
      log_half_widths = half_widths[MULTIPLIER:]
      for i, size in enumerate((ALL_SIZES, *sizes)):
        interval = value_and_ends(log_multipliers[i], log_half_widths[i])
        factor, low, high = _exponentials(interval)
        rows.append(SpeedUp(
            size=size, by=by, factor=factor, low=low, high=high, fit_error=None,
            floor=floor_of_law))
  return rows


def value_and_ends(value: float, half_width: float) -> list[float | None]:
  """Returns a value and both ends of its interval; None for what is not finite,
  and so not known."""
  ends = (value, value - half_width, value + half_width)
  return [float(x) if math.isfinite(x) else None for x in ends]


def _exponentials(logs: Sequence[float | None]) -> list[float | None]:
  """Returns exp(x) of each figure x that is known, and None of the others."""
  return [None if x is None else math.exp(x) for x in logs]


def fit_speed_ups(sizes: Sequence[str], pairs_by_size: Sequence[pairing.Pairs]
                  ) -> list[SpeedUp]:
  """Returns how many times faster than the base a variant reaches the same
  loss, at each size of the model, counted in FLOPs and in seconds.

  A saturating power law is fitted to the loss curve of each run. For each seed,
  the speed-up is what the base spends to a loss, divided by what the variant
  spends to it (statistics.speed_up).

  Args:
    sizes: the names of the sizes.
    pairs_by_size: for each size, the pairs of a run of the variant and one of
      the base, by seed.

  Returns:
    A row for each size and way to count, except for sizes without curves.
  """
  rows = []
  for size, pair_by_seed in zip(sizes, pairs_by_size):
    ended_seeds = pairing.ended_seeds([pair_by_seed])
    pairs = [pair_by_seed[seed] for seed in ended_seeds]
    has_curves = any(pair.ours.curve or pair.base.curve for pair in pairs)
    if not has_curves:
      continue

    # Fit both curves of each pair, and average the speed-ups over the seeds.
    has_shared_clock = any(
        pair.ours.shares_clock or pair.base.shares_clock for pair in pairs)
    for by in WAYS_TO_COUNT_SPENDING:
      laws = [(_fit_curve(pair.ours, by), _fit_curve(pair.base, by))
              for pair in pairs]
      interval, fit_error = statistics.mean_speed_up(laws)
      factor = low = high = None
      if interval is not None:
        factor, low, high, _ = interval
      # Runs that were trained as one program report equal shares of its time.
      # They do not tell how much the time varies, so there is no interval.
      if by == 'seconds' and has_shared_clock:
        low = high = None
      rows.append(SpeedUp(
          size=size, by=by, factor=factor, low=low, high=high,
          fit_error=fit_error))
  return rows


def _fit_curve(outcome: Outcome, by: str) -> statistics.PowerLaw | None:
  """Fits a saturating power law to the loss curve of a run, from the end of the
  warmup of its learning rate on. Returns None if it cannot be fitted.

  Args:
    outcome: the run.
    by: what the loss is a function of: 'flops' or 'seconds' spent.
  """
  # Points in the warmup become NaN, which the fit leaves out. Without 'warm',
  # all points of a curve count.
  curve = outcome.curve
  is_warm = np.array(curve.get('warm', True), bool)
  spent = np.array(curve.get(by, []))
  loss = np.array(curve.get('loss', []))
  return statistics.fit_power_law(
      compute=np.where(is_warm, spent, math.nan),
      loss=np.where(is_warm, loss, math.nan))


def predict_largest_size(plan: Plan, outcomes: pairing.Outcomes,
                         flops: Mapping[str, float]) -> list[dict[str, Any]]:
  """Returns what the confirmation lets expect of the plan's largest size, by a
  scaling law of the base.

  The law is taken for true, and the multiplier of a variant for the same at all
  sizes. The noise of the seeds that will be seen is within the interval.

  Args:
    plan: the plan of the study.
    outcomes: the outcomes so far.
    flops: the FLOPs of a run of that size, by variant, the base too.

  Returns:
    {'variant', 'value', 'low', 'high'}: of the base its primary measure, of the
    others their differences from it; none where runs were not cooled down.
  """
  runs = pairing.outcomes_of_phase(outcomes, 'confirm')
  rows = []
  for variant in flops:
    # The runs to which the law is fitted; the base stands beside itself.
    pairs_by_size = [
        pairing.pair_with_base(runs=runs, variant=variant, base=plan.base,
                               size=size,
                               measure=plan.primary) for size in plan.sizes]
    ladder = cooled_ladder(plan.primary, pairs_by_size)
    if ladder is None:
      continue
    compute = next(iter(ladder.flops.values()))
    compute_ahead = np.array([flops[plan.base], flops[variant]])
    values, half_widths = statistics.jackknife_scaling_figures(
        compute, ladder.losses, compute_ahead)

    # The loss of the base, or the difference of a variant from it.
    if variant == plan.base:
      figure = LOSS
      samples = ladder.losses[:, 0]  # [seeds, sizes]
    else:
      figure = DIFFERENCE
      samples = ladder.losses[:, 1] - ladder.losses[:, 0]

    # The interval has the error of the law, and the noise of the seeds to come:
    # the interval of a mean narrows with the root of their number.
    at_last_size = samples[:, -1]
    seeds_ratio = len(at_last_size) / plan.seeds['largest']
    half_width_of_seeds = statistics.half_width_of_interval(at_last_size)
    noise = half_width_of_seeds * math.sqrt(seeds_ratio)
    half_width = math.hypot(half_widths[figure], noise)
    value, low, high = value_and_ends(values[figure], half_width)
    rows.append({'variant': variant, 'value': value, 'low': low, 'high': high})
  return rows
