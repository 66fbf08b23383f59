"""Statistics of differences: intervals over paired seeds, and fits.

Seeds are paired: seed s of every variant sees the same data in the same order,
so the differences of a pair vary less than the runs themselves, and their
spread is the noise that a difference must leave behind.
"""

import bisect
from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

MIN_SEEDS = 3  # with fewer, the spread itself is not known
MIN_POINTS_OF_CURVE = 6  # of a curve whose three constants are fitted
NUM_SIMULATED_STUDIES, MAX_SEEDS = 2048, 10_000  # to announce a power
# from which on signs alone can show something: 2^-5 < 0.05
MIN_SEEDS_OF_PERMUTATION = 6
# seeds, above which a mean is normal whatever the noise is
MAX_SEEDS_OF_NOISE_SHAPE = 50
MAX_P_OF_IRREGULAR = 0.2  # p below which the noise is not taken for normal
# times the compute of a ladder, within which its law is read
MAX_EXTRAPOLATION = 4.0


class PooledDeviation(NamedTuple):
  """The standard deviation of a seed's difference, of all variants together
  (their pooled variance), and its degrees of freedom.

  Where noise has a tail to one side, the runs of a variant that have none of it
  by chance lie close together, and far from their true mean: its own spread is
  least where it errs most. A variant of such a family has therefore to differ
  by its own spread and by that of all (an intersection-union test: Berger
  1982), which never says more than Student's.
  """
  sd: float
  df: int


class Interval(NamedTuple):
  """A mean over seeds, and its 95 % interval; None where these are too few."""
  mean: float
  low: float | None
  high: float | None
  seeds: int


def half_width_of_interval(values: Sequence[float], level: float = 0.05,
               pooled: PooledDeviation | None = None) -> float:
  """Returns half of Student's interval of a mean of two or more values, or of
  that by `pooled` if it is wider; the mean is outside with a probability of
  `level`."""
  from scipy.special import stdtrit
  widths = []
  for sd, df in _deviations_to_pass(values, pooled):
    quantile = float(stdtrit(df, 1 - level / 2))
    widths.append(quantile * sd / math.sqrt(len(values)))
  return max(widths)


def _deviations_to_pass(values: Sequence[
    float], pooled: PooledDeviation | None) -> list[PooledDeviation]:
  """Returns the spread of the values themselves, and that of all variants."""
  spreads = [
      PooledDeviation(sd=float(np.std(values, ddof=1)), df=len(values) - 1)]
  if pooled is not None:
    spreads.append(pooled)
  return spreads


def student_interval(values: Sequence[float],
                     pooled: PooledDeviation | None = None,
             level: float = 0.05) -> Interval:
  """Returns the mean and Student's interval around it.

  Args:
    values: the value of each seed. Those that are all alike have no interval:
      their spread is not known.
    pooled: the spread of all variants together, of noise that is not normal.
    level: the probability of a mean that is outside.
  """
  n, mean = len(values), float(np.mean(values))
  if n < MIN_SEEDS or _are_all_alike(values):
    return Interval(mean=mean, low=None, high=None, seeds=n)
  half = half_width_of_interval(values, level, pooled)
  return Interval(mean=mean, low=mean - half, high=mean + half, seeds=n)


def logit_interval(values: Sequence[float]) -> Interval:
  """Returns the mean of shares, such as accuracies, and an interval around it
  inside 0 to 1: Student's of the mean's logit, by the delta method (that of
  shares of clusters in surveys: Lumley 2010, R's svyciprop)."""
  of_share = student_interval(values)
  if of_share.low is None:
    return of_share
  from scipy.special import expit, logit
  mean = of_share.mean
  # The derivative of the logit is 1 / (mean (1 - mean)).
  half = (of_share.high - of_share.low) / 2 / (mean * (1 - mean))
  return Interval(mean=mean, low=float(expit(logit(mean) - half)),
                  high=float(expit(logit(mean) + half)), seeds=of_share.seeds)


def _are_all_alike(values: Sequence[float]) -> bool:
  """Returns whether the values are all alike, but for rounding."""
  return float(np.std(values)) <= 1e-12 * abs(float(np.mean(values)))


class CrossedEstimate(NamedTuple):
  """A mean over seeds and items, its 95 % interval and its p; None where they
  are too few, or all alike."""
  mean: float
  low: float | None
  high: float | None
  p: float | None


def estimate_over_seeds_and_items(values_SQ: np.ndarray,
                                  weights_Q: Sequence[float] | None = None
            ) -> CrossedEstimate:
  """Returns what differences say, each of a seed and an item, where both are
  samples of many; of one seed, over its items alone.

  The variance of the mean is that of a two-way table of random effects (Searle,
  Casella and McCulloch 1992, chapter 4): of the mean squares of the S seeds,
  the Q items and the rest, (seeds + items - rest) / (S Q), with Satterthwaite's
  degrees of freedom. It is at least that over the seeds alone. Weights make
  the mean a ratio, whose residuals stand for the values (Cochran 1977, section
  2.11).

  Args:
    values_SQ: the difference of each of S seeds and Q items.
    weights_Q: the weights of the items; None: all count alike.
  """
  from scipy.special import stdtr, stdtrit
  x_SQ = np.asarray(values_SQ, float)
  S, Q = x_SQ.shape
  mean = float(np.average(x_SQ.mean(0), weights=weights_Q))
  if weights_Q is not None:
    weighed_SQ = (x_SQ - mean) * weights_Q
    x_SQ = mean + weighed_SQ / np.mean(weights_Q)
  are_alike = np.ptp(x_SQ) <= 1e-12 * abs(mean)
  if Q < 2 or 1 < S < MIN_SEEDS or are_alike:
    return CrossedEstimate(mean=mean, low=None, high=None, p=None)

  # The table's mean squares: of seeds, of items, and of the rest.
  seeds_S1 = x_SQ.mean(1, keepdims=True) - mean
  items_Q = x_SQ.mean(0) - mean
  rest_SQ = x_SQ - seeds_S1 - items_Q - mean
  of_seeds = Q * np.sum(seeds_S1 ** 2)
  of_items = S * np.sum(items_Q ** 2)
  of_rest = np.sum(rest_SQ ** 2)
  dfs = np.maximum((S - 1, Q - 1, (S - 1) * (Q - 1)), 1)
  squares = np.array([of_seeds, of_items, of_rest]) / dfs

  # The variance of one value as the mean has it, and its degrees of freedom
  # (Satterthwaite 1946).
  variance = max(squares @ (1, 1, -1), squares[0])
  df = max(variance ** 2 / np.sum(squares ** 2 / dfs), S - 1)

  # Student's interval and test of the mean.
  error = math.sqrt(variance / (S * Q))
  half = float(stdtrit(df, 0.975)) * error
  p = float(2 * stdtr(df, -abs(mean) / error))
  return CrossedEstimate(mean=mean, low=mean - half, high=mean + half, p=p)


def mcnemar_p_value(ours: Sequence[float], theirs: Sequence[float],
            alternative: str = 'two-sided') -> float:
  """Returns the exact p of McNemar's test of items that are right (1) or wrong
  (0); `alternative` is scipy's."""
  from scipy.stats import binomtest
  apart = np.subtract(ours, theirs, dtype=float)
  wins, losses = int(np.sum(apart > 0)), int(np.sum(apart < 0))
  if wins + losses == 0:
    return 1.0
  test = binomtest(wins, wins + losses, alternative=alternative)
  return float(test.pvalue)


def student_p_value(values: Sequence[float],
                    pooled: PooledDeviation | None = None
            ) -> float | None:
  """Returns the two-sided p of a mean of 0: Student's, or that by `pooled` if
  it is larger; None for too few values.

  Values that are all alike have no spread to be measured by, as where a task is
  solved wholly at every seed or not at all. Their p is that of the sign test:
  2^(1 - n), and 1 where they are all 0.
  """
  tails = _one_sided_p_values(values, 0.0, pooled)
  if tails is None:
    return None
  return min(2 * min(tails), 1.0)


def equivalence_p_values(values: Sequence[float], margin: float, sign: int,
             pooled: PooledDeviation | None = None
             ) -> tuple[float | None, float | None]:
  """Returns the p of a mean that lies between -margin and margin (the larger of
  two one-sided tests: Schuirmann 1987), and of one that is not worse than by
  the margin, where `sign` is that of an improvement."""
  at_low_end = _one_sided_p_values(values, -margin, pooled)
  at_high_end = _one_sided_p_values(values, margin, pooled)
  if at_low_end is None or at_high_end is None:
    return None, None
  _, above = at_low_end
  below, _ = at_high_end
  not_worse = above if sign > 0 else below
  return max(above, below), not_worse


def p_value_below_target(values: Sequence[float],
                         target: float) -> float | None:
  """Returns the one-sided p of a mean that is not below a target (Student's);
  None for too few values."""
  tails = _one_sided_p_values(values, target, None)
  return None if tails is None else tails[0]


def _one_sided_p_values(values: Sequence[float], center: float,
                        pooled: PooledDeviation | None
           ) -> tuple[float, float] | None:
  """Returns the p of a mean that is not below `center`, and of one that is not
  above it; None for too few values."""
  n = len(values)
  if n < MIN_SEEDS:
    return None
  mean = float(np.mean(values)) - center
  if _are_all_alike(values):  # their signs are alike: the p of the sign test
    all_alike = 2.0 ** -n
    not_below = 1.0 if mean >= 0 else all_alike
    not_above = 1.0 if mean <= 0 else all_alike
    return not_below, not_above
  from scipy.special import stdtr
  # The largest p of all spreads: each of them must find a difference.
  not_below, not_above = [], []
  for sd, df in _deviations_to_pass(values, pooled):
    t = mean * math.sqrt(n) / sd
    not_below.append(float(stdtr(df, t)))
    not_above.append(float(stdtr(df, -t)))
  return max(not_below), max(not_above)


def permutation_p_value(values: Sequence[float]) -> float | None:
  """Returns the p of the paired permutation test (of signs; Fisher 1935) of the
  mean without the fifth of the values at each end, or of the whole mean of six,
  of which a trimmed one has no p below 0.06; None for fewer than ROBUST_SEEDS.
  It asks for noise that is symmetric, and for no shape beside."""
  n = len(values)
  if n < MIN_SEEDS_OF_PERMUTATION:
    return None
  # The given signs come first: [drawn, n], a row of 1 and -1 each.
  if n <= 12:
    bits = np.arange(2 ** n)[:, None] >> np.arange(n) & 1
  else:  # some of the signs
    bits = np.random.default_rng(0).integers(2, size=(4096, n))
    bits[0] = 0
  signs = 1 - 2 * bits
  # The trimmed mean under each of these signs.
  cut = n // 5 if n > MIN_SEEDS_OF_PERMUTATION else 0
  ordered = np.sort(np.asarray(values) * signs, axis=1)
  means = np.abs(ordered[:, cut:n - cut].mean(1))
  seen = means[0] * (1 - 1e-12)
  return float(np.mean(means >= seen))


class NoiseShape(NamedTuple):
  """The shape of noise: whether it looks normal.

  Attributes:
    skew, outliers: the p of its skewness, and of its largest value, if it were
      normal.
    groups: the differences of each variant, [seeds, sizes].
  """
  skew: float
  outliers: float
  groups: Sequence[np.ndarray]

  @property
  def p(self) -> float:
    """The p of normal noise, by both together (Bonferroni)."""
    return min(2 * min(self.skew, self.outliers), 1.0)

  def pooled(self,
             of: Callable[[np.ndarray], np.ndarray]) -> PooledDeviation | None:
    """Returns the spread of what is tested, of all variants together; None
    where the noise looks normal.

    Args:
      of: a function that maps [seeds, sizes] to the [seeds] that are tested.
    """
    if self.p > MAX_P_OF_IRREGULAR:
      return None
    df = sum(len(group) - 1 for group in self.groups)
    squares = sum(np.var(of(group)) * len(group) for group in self.groups)
    return PooledDeviation(sd=math.sqrt(squares / df), df=df)

  def pooled_deviation_at_size(self, size: int) -> PooledDeviation | None:
    """Returns the spread at one size. It is no less, beside the median distance
    from the mean, than that of all sizes: a tail may be seen at another one."""
    pooled = self.pooled(lambda group: group[:, size])
    if pooled is None:
      return None
    residuals = np.concatenate(
        [group - np.mean(group, axis=0) for group in self.groups])
    # [sizes]
    variances = np.mean(_scale_by_median_distance(residuals) ** 2, axis=0)
    more = variances.mean() / max(variances[size], 1e-300)
    return pooled._replace(sd=pooled.sd * math.sqrt(max(more, 1.0)))


def measure_noise_shape(groups: Sequence[np.ndarray]) -> NoiseShape | None:
  """Returns the shape of the noise of paired differences: of each variant
  [seeds, sizes], all minus the same base. None where nothing tells it."""
  telling = []
  for group in groups:
    is_even = all(_are_all_alike(column) for column in group.T)
    if MIN_SEEDS <= len(group) <= MAX_SEEDS_OF_NOISE_SHAPE and not is_even:
      telling.append(group)
  if not telling:
    return None
  residuals = np.concatenate(
      [group - np.median(group, axis=0) for group in telling])
  skewness, largest = _skewness_and_largest(residuals)
  # How often normal noise of as many seeds has as large ones.
  lengths = tuple(len(group) for group in telling)
  normal_skewness, normal_largest = _simulate_normal_shapes(
      lengths, residuals.shape[1])
  skew = np.mean(normal_skewness >= skewness * (1 - 1e-9))
  outliers = np.mean(normal_largest >= largest * (1 - 1e-9))
  return NoiseShape(skew=float(skew), outliers=float(outliers), groups=telling)


def _skewness_and_largest(residuals: np.ndarray) -> tuple[np.ndarray,
                                                          np.ndarray]:
  """Returns the skewness and the largest value of [..., values, sizes], without
  their signs."""
  z = _scale_by_median_distance(residuals)
  z = z - np.mean(z, (-2, -1), keepdims=True)
  variance = np.maximum(np.mean(z ** 2, (-2, -1)), 1e-300)
  skewness = np.abs(np.mean(z ** 3, (-2, -1))) / variance ** 1.5
  return skewness, np.max(np.abs(z), (-2, -1))


def _scale_by_median_distance(residuals: np.ndarray) -> np.ndarray:
  """Returns [..., values, sizes], each size over its median distance from 0."""
  size = np.abs(residuals)
  scale = np.median(size, -2, keepdims=True)
  scale = np.where(scale > 0, scale, np.mean(size, -2, keepdims=True))
  return residuals / np.where(scale > 0, scale, 1.0)


@functools.lru_cache(maxsize=32)
def _simulate_normal_shapes(lengths: tuple[int, ...], sizes: int
                   ) -> tuple[np.ndarray, np.ndarray]:
  """Returns what `_shapes` gives for many draws of normal noise of variants
  with so many seeds."""
  rng = np.random.default_rng(0)
  drawn = min(NUM_SIMULATED_STUDIES,
              max(4_000_000 // (sum(lengths) * sizes), 200))
  # All variants are beside the same base, which ties them together.
  base = rng.normal(size=(drawn, max(lengths), sizes))
  residuals = []
  for n in lengths:
    group = rng.normal(size=(drawn, n, sizes)) - base[:, :n]
    residuals.append(group - np.median(group, 1, keepdims=True))
  return _skewness_and_largest(np.concatenate(residuals, 1))


def least_significant_mean(seeds: int, level: float) -> tuple[float, float]:
  """Returns how many standard deviations of a paired difference a mean needs to
  be significant at a level, and the least p that signs alone can have."""
  from scipy.special import stdtrit
  quantile = float(stdtrit(seeds - 1, 1 - level / 2))
  return quantile / math.sqrt(seeds), 2.0 ** (1 - seeds)


def correct_p_values(p: Sequence[float | None], method: str = 'holm'
              ) -> list[float | None]:
  """Returns the p-values as corrected for being several.

  Args:
    p: the p of each test; None for one that could not be done, which is a
      member of the family all the same.
    method: 'holm' (Holm 1979), for the probability that any of them is wrong,
      or 'bh' (Benjamini and Hochberg 1995), for the share of wrong ones among
      those found.
  """
  every = np.array([1.0 if x is None else x for x in p])
  if method == 'holm':
    # The smallest times n, the next times n - 1, ..., and none below those
    # before it.
    order = np.argsort(every)
    times = np.arange(len(every), 0, -1)
    rising = np.maximum.accumulate(every[order] * times)
    every[order] = np.minimum(rising, 1.0)
  elif len(every):
    from scipy import stats
    every = stats.false_discovery_control(every)
  return [None if before is None else after
          for before, after in zip(p, every.tolist())]


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """A saturating power law of the compute C,
  loss(C) = floor + scale / C^exponent, fitted between `first` and `last`.

  Attributes:
    floor, scale, exponent: the constants of the law.
    first, last: the least and the largest compute that it was fitted to.
    rms: the root mean square of the residuals, in nats.
  """
  floor: float
  scale: float
  exponent: float
  first: float
  last: float
  rms: float

  def loss(self, compute):
    """Returns the loss at a compute, or at an array of them."""
    return self.floor + self.scale * np.asarray(compute) ** -self.exponent

  def compute(self, loss: float) -> float | None:
    """Returns where the curve reaches `loss`; None outside what was fitted."""
    end, start = self.loss(self.last), self.loss(self.first)
    slack = 1e-9 * abs(start)  # of the arithmetic: the ends are inside
    is_inside = end - slack <= loss <= start + slack
    if not is_inside:
      return None
    ratio = self.scale / (loss - self.floor)
    return float(ratio ** (1 / self.exponent))


def fit_power_law(compute: Sequence[float], loss: Sequence[float]
              ) -> PowerLaw | None:
  """Fits a saturating power law by least squares; None where it cannot.

  For each exponent the two other constants are a linear fit (floor >= 0), so
  one exponent is all there is to search, and no start has to be guessed.
  """
  x, y = np.asarray(compute, float), np.asarray(loss, float)
  is_known = np.isfinite(x) & np.isfinite(y) & (x > 0)
  x, y = x[is_known], y[is_known]
  if len(x) < MIN_POINTS_OF_CURVE or np.ptp(x) == 0:
    return None
  from scipy.optimize import minimize_scalar, nnls
  unit = np.exp(np.mean(np.log(x)))  # the geometric mean of the compute

  def linear(exponent: float) -> tuple[np.ndarray, float]:
    """Returns floor and scale, and the norm of the residuals."""
    powers = (x / unit) ** -exponent
    return nnls(np.stack([np.ones_like(x), powers], 1), y)

  def error(exponent: float) -> float:
    """Returns the norm of the residuals alone."""
    _, norm = linear(exponent)
    return norm

  # The best exponent of a grid, and then the best between its neighbours.
  tried = np.geomspace(0.01, 5.0, 60)
  errors = [error(exponent) for exponent in tried]
  i = int(np.argmin(errors))
  bounds = tried[max(i - 1, 0)], tried[min(i + 1, len(tried) - 1)]
  best = minimize_scalar(error, bounds=bounds, method='bounded',
                         options={'xatol': 1e-10})

  # The law in the unit of the compute itself.
  (floor, scale), norm = linear(best.x)
  if scale <= 0:  # the loss did not fall
    return None
  return PowerLaw(
      floor=float(floor),
      scale=float(scale * unit ** best.x),
      exponent=float(best.x),
      first=float(x.min()),
      last=float(x.max()),
      rms=norm / math.sqrt(len(x)))


def speed_up(ours: PowerLaw | None, theirs: PowerLaw | None) -> float | None:
  """Returns how many times the compute of `ours` the other curve needs to
  reach the same loss: the worse of the two at their ends, which both have
  reached, so that neither curve is read where it was not measured."""
  if ours is None or theirs is None:
    return None
  level = max(float(ours.loss(ours.last)), float(theirs.loss(theirs.last)))
  needed, base = ours.compute(level), theirs.compute(level)
  if needed is None or base is None:
    return None
  return base / needed


def mean_speed_up(pairs: Sequence[tuple[PowerLaw | None, PowerLaw | None]]
               ) -> tuple[Interval | None, float | None]:
  """Returns the geometric mean over seeds of speed-ups, with its interval, and
  the largest error of the fits, in nats; None where a seed gives no speed-up,
  since the seeds that give one are those that went well."""
  ratios = [speed_up(ours, theirs) for ours, theirs in pairs]
  if not ratios or None in ratios:
    return None, None
  error = max(max(ours.rms, theirs.rms) for ours, theirs in pairs)
  # The geometric mean is the exponential of the mean of the logarithms.
  of_logs = student_interval(np.log(ratios))
  low = high = None
  if of_logs.low is not None:
    low, high = math.exp(of_logs.low), math.exp(of_logs.high)
  mean = Interval(mean=math.exp(of_logs.mean), low=low, high=high,
                  seeds=of_logs.seeds)
  return mean, error


def jackknife(samples: np.ndarray, of: Callable[[np.ndarray], np.ndarray]
              ) -> tuple[np.ndarray, np.ndarray]:
  """Returns what `of` makes of the mean over seeds, and half of its 95 %
  interval: Student's over the pseudo-values of leaving each seed out in turn
  (Tukey 1958), which keeps what is paired by a seed together.

  Args:
    samples: [seeds, ...].
    of: a function that maps [...] to some numbers, of which those that are not
      known are NaN.
  """
  from scipy.special import stdtrit
  n = len(samples)
  without = []
  for seed in range(n):
    others = np.delete(samples, seed, axis=0)
    without.append(of(np.mean(others, axis=0)))
  spread = np.std(without, axis=0, ddof=1) * (n - 1) / math.sqrt(n)
  return of(np.mean(samples, axis=0)), stdtrit(n - 1, 0.975) * spread


def fit_compute_multiplier(compute: np.ndarray, loss: np.ndarray,
                           floor: float | None = None
           ) -> tuple[PowerLaw | None, float]:
  """Fits the law of a base over sizes and the compute multiplier of a variant,
  whose loss is law.loss(multiplier * compute), to the losses of both by least
  squares; None and NaN where the loss does not fall.

  For each exponent and multiplier, the two other constants are a linear fit.

  Args:
    compute, loss: [2, sizes], of the base and of the variant.
    floor: the floor at which the law is pinned; None: it is fitted, and is 0 or
      more.
  """
  from scipy.optimize import least_squares
  unit = np.exp(np.mean(np.log(compute)))  # the geometric mean of the compute
  pinned = floor or 0.0
  y = loss.ravel() - pinned

  def linear(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns floor and scale, of the logarithms of exponent and multiplier,
    and the residuals."""
    log_exponent, log_multiplier = theta
    times = np.exp([[0.0], [log_multiplier]])  # of the base and the variant
    spent = compute / unit * times
    x = spent.ravel() ** -np.exp(log_exponent)
    rows = np.stack([np.ones_like(x), x], 1)
    both = np.linalg.lstsq(rows, y, rcond=None)[0]
    if floor is not None or both[0] < 0:
      both = np.array([0.0, x @ y / (x @ x)])
    return both, rows @ both - y

  def residuals(theta: np.ndarray) -> np.ndarray:
    """Returns the residuals alone."""
    _, left = linear(theta)
    return left

  fit = least_squares(
      residuals, [-1.6, 0.0], bounds=([-5.0, -3.0], [1.5, 3.0]), x_scale=0.1,
      xtol=1e-10, ftol=1e-12, gtol=1e-12)
  exponent, multiplier = np.exp(fit.x).tolist()
  both, _ = linear(fit.x)
  above_pinned, scale = both.tolist()
  if scale <= 0:
    return None, math.nan
  law = PowerLaw(
      floor=above_pinned + pinned,
      scale=scale * unit ** exponent,
      exponent=exponent,
      first=compute[0].min(),
      last=compute[0].max(),
      rms=math.sqrt(2 * fit.cost / len(y)))
  return law, multiplier


def multiplier_at_each_size(law: PowerLaw, compute: np.ndarray, loss: np.ndarray
                ) -> np.ndarray:
  """Returns the multiplier of each size alone: what the base needs to differ
  from its own loss there by as much as the variant does, over what the variant
  has spent; NaN where no compute is enough, or more than REACH times beyond
  what the base has spent.

  Args:
    law: the law of the base.
    compute, loss: [2, sizes], of the base and of the variant.
  """
  base_compute, our_compute = compute
  base_loss, our_loss = loss
  # How far above its floor the law is, and the share of that which is wanted.
  above = np.maximum(law.loss(base_compute) - law.floor, 1e-300)
  share = np.maximum((above + our_loss - base_loss) / above, 1e-300)
  # scale / C^exponent is `share` times as much where C is this many times.
  times = np.exp(np.minimum(-np.log(share) / law.exponent, 50))
  needed = base_compute * times
  is_inside = (needed >= law.first / MAX_EXTRAPOLATION) & (needed <= law.last
                                                           * MAX_EXTRAPOLATION)
  return np.where(is_inside, needed / our_compute, np.nan)


def jackknife_scaling_figures(compute: np.ndarray, losses: np.ndarray,
                              ahead: np.ndarray,
           floor: float | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Returns figures of the law of `ladder`, and half of their 95 % intervals
  over seeds (`jackknife`): the floor; what the base loses, and the variant
  beside it, where they spend `ahead`; and the logarithms of the multiplier, and
  of that of each size.

  Args:
    compute: [2, sizes], of the base and of the variant.
    losses: [seeds, 2, sizes].
    ahead: [2].
    floor: as of `ladder`.
  """
  def figures(mean: np.ndarray) -> np.ndarray:
    """Returns the figures of losses [2, sizes], a mean over seeds."""
    law, factor = fit_compute_multiplier(compute, mean, floor)
    if law is None:
      return np.full(compute.shape[1] + 4, np.nan)
    base, ours = law.loss(ahead * [1.0, factor])
    at_sizes = multiplier_at_each_size(law, compute, mean)
    logs = np.log([factor, *at_sizes])
    return np.array([law.floor, base, ours - base, *logs])

  return jackknife(losses, figures)


# The power of a test, announced from a standard deviation that is itself an
# estimate.
#
# A study is drawn a few thousand times: the means of the sizes, the spread that
# the t-test will see, the runs that diverge, and the true standard deviation,
# given the estimate s with v degrees of freedom: sigma = s / sqrt(chi2_v / v).
# Each drawn study needs some least effect to find it, and the share of those
# that need no more than an effect is the power announced for it.
#
# Taking s for sigma promises too much: of studies that take the number of seeds
# that s asks for, more have too few than too many. With sigma drawn, the effect
# announced for 80 % power is found by 80 % of the studies that announce it,
# exactly so for each true sigma, since s / sigma has the distribution that was
# drawn; so do studies that take `seeds_needed` seeds. What is announced for a
# *fixed* effect and number of seeds is right among studies whose noise differs
# ("of those that announce 70 %, 70 % find it"), and on average some points too
# low over studies of one noise (docs/studies.md, "Can it be believed?").


@functools.lru_cache(maxsize=32)
def _sobol_points(dims: int) -> np.ndarray:
  """Returns [DRAWS, dims]: scrambled Sobol points, always the same."""
  from scipy.stats import qmc
  points = qmc.Sobol(dims, seed=0).random(NUM_SIMULATED_STUDIES)
  return np.clip(points, 1e-9, 1 - 1e-9)


@functools.lru_cache(maxsize=32)
def _normal_points(dims: int) -> np.ndarray:
  """Returns [DRAWS, dims]: `_uniform` as normal noise."""
  from scipy.special import ndtri
  return ndtri(_sobol_points(dims))


@functools.lru_cache(maxsize=1024)
def _draw_relative_deviations(df: float, column: int, dims: int) -> np.ndarray:
  """Returns sqrt(chi2_df / df) of one column of the points: dear, and so kept
  for the next time. Where df is large, by Wilson and Hilferty (1931), who err
  by less than 1e-4 there."""
  if df > 40:
    part = 2 / (9 * df)
    z = _normal_points(dims)[:, column]
    return (1 - part + z * part ** 0.5) ** 1.5
  from scipy.special import gammaincinv
  u = _sobol_points(dims)[:, column]
  return np.sqrt(2 * gammaincinv(df / 2, u) / df)


@functools.lru_cache(maxsize=256)
def _draw_diverged_runs(runs: int, rate: float
                        ) -> tuple[np.ndarray, np.ndarray]:
  """Returns how many of the variant's runs and of the base's diverge."""
  rng = np.random.default_rng(0)
  of_variant = rng.binomial(runs, rate, NUM_SIMULATED_STUDIES)
  of_base = rng.binomial(runs, rate, NUM_SIMULATED_STUDIES)
  return of_variant, of_base


def simulate_least_effects(sd: float, sds: Sequence[float], df: float,
                           seeds: int,
                  level: float, rate: float = 0.0, limit: float = 1.0,
                  seen: np.ndarray | None = None, within: bool = False
                  ) -> np.ndarray:
  """Returns the least effect, of any sign, that each drawn study would find:
  significant over seeds and of one direction at all sizes.

  Args:
    sd: of a seed's mean over the sizes of the paired differences.
    sds: of the paired differences at each of these sizes. Where they alone
      would give the mean another spread than `sd`, the sizes of a seed are
      drawn as hanging together (more), or all of them as less noisy (less).
    df: degrees of freedom of the estimate.
    seeds: how many the test has.
    level: two-sided.
    rate: the share of runs that diverge, of variant and base alike.
    limit: how much above `rate` the share of a variant's runs that diverge
      may be; with more it is unstable, and found nothing.
    seen: [pairs, sizes]: differences that the noise is resampled from; None:
      it is normal.
    within: return the least margin instead, within which each study would show
      by two one-sided tests, and at all sizes, what has no effect.
  """
  from scipy.special import stdtrit
  sizes, sds, shared = _correlate_sizes(sd, np.asarray(sds, float))
  if seeds < MIN_SEEDS:
    return np.full(NUM_SIMULATED_STUDIES, np.inf)
  # The columns of the points: one of each size, the spread that the test will
  # see, the true spread, and what the sizes of a seed share.
  dims = sizes + 3

  # The seeds whose runs end, and the studies whose variant is unstable.
  n, is_void = np.array([seeds]), np.array([False])
  if rate:
    runs = seeds * sizes
    ours, base = _draw_diverged_runs(runs, rate)
    n = seeds - np.minimum(ours + base, seeds)
    is_unstable = ours / runs > limit + rate + 1e-9
    is_void = (n < MIN_SEEDS) | is_unstable
    n = np.maximum(n, MIN_SEEDS)

  # The mean at each size, and the spread of the means over sizes.
  if seen is not None and seeds <= MAX_SEEDS_OF_NOISE_SHAPE:
    means, spread = _resample_means(seen, sds, n)
  else:
    z = _normal_points(dims)
    together = z[:, -1:] * shared ** 0.5
    apart = z[:, :sizes] * (1 - shared) ** 0.5
    means = (apart + together) * sds / np.sqrt(n)[:, None]
    spread = np.empty(NUM_SIMULATED_STUDIES)
    for k in set(n.tolist()):
      at = n == k if len(n) > 1 else slice(None)
      spread[at] = sd * _draw_relative_deviations(float(k - 1), sizes, dims)[at]

  # The mean over sizes must exceed this, and each size must point to it.
  tail = level if within else level / 2
  half = stdtrit(n - 1, 1 - tail) * spread / np.sqrt(n)
  if within:
    means = np.abs(np.column_stack([means, means.mean(1)]))
    half = half + means[:, -1] - means.mean(1)
  need = means.mean(1) + half
  if sizes > 1:
    need = np.maximum(need, means.max(1))
  need = need / _draw_relative_deviations(round(df, 1), sizes + 1, dims)
  return np.where(is_void, np.inf, need)


def _resample_means(seen: np.ndarray, sds: np.ndarray, n: np.ndarray
             ) -> tuple[np.ndarray, np.ndarray]:
  """Returns [DRAWS, sizes], the means of n seeds drawn from differences that
  were seen, and the spread of their means over the sizes."""
  # [DRAWS, seeds, sizes]
  drawn = _resample_differences(seen, sds, int(n.max()))
  draws, seeds, _ = drawn.shape
  # Each study has the first n of its seeds.
  has_seed = np.arange(seeds) < n[:, None]
  mask = has_seed * np.ones((draws, seeds))
  means = np.einsum('dns,dn->ds', drawn, mask) / n[:, None]
  # The variance of a seed's means over the sizes.
  apart = drawn.mean(2) - means.mean(1)[:, None]
  variance = (apart ** 2 * mask).sum(1) / (n - 1)
  return means, np.sqrt(variance)


def _resample_differences(seen: np.ndarray, sds: np.ndarray,
                          n: int) -> np.ndarray:
  """Returns [DRAWS, n, sizes], drawn from differences that were seen. Which of
  the two runs of a pair is the first says nothing, so each is drawn with either
  sign."""
  rng = np.random.default_rng(0)
  pairs = rng.integers(len(seen), size=(NUM_SIMULATED_STUDIES, n))
  signs = rng.choice((-1, 1), size=(NUM_SIMULATED_STUDIES, n, 1))
  # To each size its own spread.
  scale = sds / np.sqrt(np.mean(seen ** 2, axis=0))
  return seen[pairs] * signs * scale


def simulate_false_positive_rate(seen: np.ndarray, sds: Sequence[float],
                                 seeds: int, level: float,
         variants: int = 1) -> float:
  """Returns how often a variant without effect is found to have one at a level,
  in studies of so many variants whose noise is drawn from what was seen: by
  p_value, with the spread of all where a study's differences look so, too."""
  from scipy.special import stdtr
  drawn = _resample_differences(seen, np.asarray(sds), seeds)
  whole = NUM_SIMULATED_STUDIES // variants * variants
  # [studies, variants, seeds, sizes]
  studies = drawn[:whole].reshape(-1, variants, *drawn.shape[1:])
  means = studies.mean(3)

  # Student's test finds these, with one sign at all sizes. The spread of all
  # finds nothing more, so only what is found here is looked at again.
  spread = np.maximum(means.std(2, ddof=1), 1e-300)
  t = means.mean(2) / spread * seeds ** 0.5
  signs = np.sign(studies.mean(2))
  agrees = np.ptp(signs, axis=2) == 0
  is_found = (2 * stdtr(seeds - 1, -np.abs(t)) <= level) & agrees

  wrong = 0
  for study, study_means, found in zip(studies, means, is_found):
    if not found.any():
      continue
    noise = measure_noise_shape(study)
    pooled = None
    if noise is not None:
      pooled = noise.pooled(lambda differences: differences.mean(1))
    for values in study_means[found]:
      p = student_p_value(values, pooled)
      if p is not None and p <= level:
        wrong += 1
  return wrong / is_found.size


def _correlate_sizes(sd: float, sds: np.ndarray) -> tuple[int, np.ndarray,
                                                          float]:
  """Returns the number of sizes, their deviations, and the correlation of
  each two, with which their mean has the deviation `sd`."""
  sizes = len(sds)
  apart = np.sum(sds ** 2) / sizes ** 2
  together = (np.sum(sds) / sizes) ** 2
  if sd * sd <= apart or together <= apart:
    scale = sd / np.sqrt(apart) if apart else 1.0
    return sizes, sds * scale, 0.0
  correlation = (sd * sd - apart) / (together - apart)
  return sizes, sds, min(correlation, 1.0)


def power_to_find(effect: float, *args, **kwargs) -> float:
  """Returns the share of drawn studies that find `effect`; the other arguments
  are those of `least_effects`."""
  return float(np.mean(simulate_least_effects(*args, **kwargs) <= effect))


def smallest_effect(wanted: float, *args, **kwargs) -> float | None:
  """Returns the effect that a share `wanted` of drawn studies finds."""
  least = simulate_least_effects(*args, **kwargs)
  effect = float(np.quantile(least, wanted, method='higher'))
  return effect if np.isfinite(effect) else None


def seeds_needed(effect: float, wanted: float, sd: float, sds, df: float,
                 level: float, **kwargs) -> int | None:
  """Returns the least number of seeds with the power `wanted`; None where
  MOST_SEEDS are too few."""
  def is_enough(seeds: int) -> bool:
    return power_to_find(effect, sd=sd, sds=sds, df=df, seeds=seeds,
                         level=level,
                 **kwargs) >= wanted

  numbers = range(MIN_SEEDS, MAX_SEEDS + 1)
  at = bisect.bisect_left(numbers, True, key=is_enough)
  return numbers[at] if at < len(numbers) else None
