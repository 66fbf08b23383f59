"""Tests, intervals and fits of paired differences between training runs.

Seeds are paired: seed s of every variant sees the same data in the same order.
The differences of a pair therefore vary less than the losses themselves, and
their standard deviation is the noise that a mean difference is tested against.
"""

import bisect
from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

# With fewer seeds the standard deviation itself is not known.
MIN_SEEDS = 3
# A curve needs twice as many points as its law has constants.
MIN_POINTS_OF_CURVE = 6
# To find the power of a test: how many studies are simulated, and the largest
# number of seeds that is tried.
NUM_SIMULATED_STUDIES, MAX_SEEDS = 2048, 10_000
# How often the largest of many looks is simulated: a p of 0.001 is then known
# to an eighth of itself.
NUM_DRAWS_OF_LOOKS = 2 ** 16
# With fewer seeds no choice of signs has a p below 0.05: 2^-4 > 0.05 > 2^-5.
MIN_SEEDS_OF_PERMUTATION = 6
# A mean over more seeds than these is normal whatever the noise is.
MAX_SEEDS_OF_NOISE_SHAPE = 50
# Noise whose test of normality has this p or a lower one counts as irregular.
MAX_P_OF_IRREGULAR = 0.2
# A law is read up to this many times beyond the compute that it was fitted to.
MAX_EXTRAPOLATION = 4.0


class PooledDeviation(NamedTuple):
  """The standard deviation of a seed's difference, pooled over all variants.

  Where noise has a tail to one side, the runs of a variant that have none of it
  by chance lie close together, and far from their true mean: a variant's own
  deviation is least where it errs most. A variant with such noise must
  therefore differ by its own deviation and by the pooled one, too: an
  intersection-union test (Berger 1982), which never finds more than Student's.

  Attributes:
    sd: the root of the pooled variance.
    df: its degrees of freedom.
  """
  sd: float
  df: float


class Interval(NamedTuple):
  """A mean over seeds and the ends of its 95 % interval; the ends are None
  where there are too few seeds."""
  mean: float
  low: float | None
  high: float | None
  seeds: int


def half_width_of_interval(values: Sequence[float], level: float = 0.05,
                           pooled: PooledDeviation | None = None) -> float:
  """Returns half of the width of Student's confidence interval of a mean,
    t(1 - level / 2, df) sd / sqrt(n),
  where t is the quantile of Student's distribution, and sd a standard deviation
  with df degrees of freedom.

  Args:
    values: the value of each of n seeds, two or more.
    level: the probability that the true mean lies outside of the interval.
    pooled: a standard deviation over all variants of a comparison, for noise
      that is not normal; None: there is none.

  Returns:
    The half width, by the deviation of the values or by `pooled`, whichever is
    wider.
  """
  # One width for each deviation: that of the values, and `pooled`, if given.
  from scipy.special import stdtrit
  widths = []
  for sd, df in _deviations_to_pass(values, pooled):
    quantile = float(stdtrit(df, 1 - level / 2))
    widths.append(quantile * sd / math.sqrt(len(values)))
  return max(widths)


def _deviations_to_pass(values: Sequence[float],
                        pooled: PooledDeviation | None
                        ) -> list[PooledDeviation]:
  """Returns each standard deviation that a mean is tested by: that of the
  values themselves, and the pooled one if there is one."""
  own_deviation = PooledDeviation(
      sd=float(np.std(values, ddof=1)), df=len(values) - 1)
  if pooled is None:
    return [own_deviation]
  return [own_deviation, pooled]


def student_interval(values: Sequence[float],
                     pooled: PooledDeviation | None = None,
                     level: float = 0.05,
                     shifts: np.ndarray | None = None) -> Interval:
  """Returns the mean of some values and Student's t interval around it. With
  the options, the widest of several intervals is taken.

  Args:
    values: the value of each seed.
    pooled: a standard deviation over all variants of a comparison, for noise
      that is not normal; None: there is none.
    level: the probability that the true mean lies outside of the interval.
    shifts: [draws], random draws of an error that all values share, such as
      that of a learning rate that was not tuned exactly; None: there is none.

  Returns:
    The mean, the ends of its interval, and the number of seeds. The ends are
    None for fewer than MIN_SEEDS values, and for values that are all alike,
    since these do not tell how much they vary.
  """
  num_seeds, mean = len(values), float(np.mean(values))
  if num_seeds < MIN_SEEDS or _are_all_alike(values):
    return Interval(mean=mean, low=None, high=None, seeds=num_seeds)

  # The interval without a shared error.
  half_width = half_width_of_interval(values, level, pooled)
  lows, highs = [mean - half_width], [mean + half_width]

  # The interval with it, for each deviation.
  if shifts is not None:
    for deviation in _deviations_to_pass(values, pooled):
      standard_error = deviation.sd / math.sqrt(num_seeds)
      # The upper end is minus the lower end for the negated values.
      lows.append(_lower_end_with_shifts(
          mean=mean, standard_error=standard_error, df=deviation.df,
          shifts=shifts, level=level))
      highs.append(-_lower_end_with_shifts(
          mean=-mean, standard_error=standard_error, df=deviation.df,
          shifts=-shifts, level=level))
  return Interval(mean=mean, low=min(lows), high=max(highs), seeds=num_seeds)


def _shifted_tail(distance: float, standard_error: float, df: float,
                  shifts: np.ndarray) -> float:
  """Returns the one-sided p-value of a mean that has a systematic error (a
  shift) besides its noise. Only the distribution of the shift is known, by
  random draws s. The p-value averages Student's over them:
    mean over s of P(T <= (distance - s) / standard_error).

  The error of the mean is thus the sum of two independent parts, each by what
  the data tell about it (a generalised p-value: Tsui and Weerahandi 1989).

  Args:
    distance: the mean minus the value that it is tested against.
    standard_error: the standard error of the mean.
    df: the degrees of freedom of the standard error.
    shifts: [draws], how far the mean may lie above the true one.
  """
  from scipy.special import stdtr
  return float(np.mean(stdtr(df, (distance - shifts) / standard_error)))


def _lower_end_with_shifts(mean: float, standard_error: float, df: float,
                           shifts: np.ndarray, level: float) -> float:
  """Returns the lower end of the interval of a mean that has a systematic error
  (a shift) besides its noise: the value that the true mean is below with a
  one-sided p-value (`_shifted_tail`) of level / 2.

  Args:
    mean: the mean.
    standard_error: its standard error.
    df: the degrees of freedom of the standard error.
    shifts: [draws], how far the mean may lie above the true one.
    level: the probability that the true mean lies outside of the interval.
  """
  from scipy.optimize import brentq
  from scipy.special import stdtrit
  half_width = float(stdtrit(df, 1 - level / 2)) * standard_error

  def excess_of_tail(end: float) -> float:
    """Returns the p that the true mean is below `end`, minus level / 2."""
    tail = _shifted_tail(distance=end - mean, standard_error=standard_error,
                         df=df, shifts=-shifts)
    return tail - level / 2

  # Find the end at which the excess is 0. It lies between the ends for the
  # largest and for the smallest of the shifts. The standard error is a margin
  # for rounding.
  lowest = mean - half_width - float(np.max(shifts)) - standard_error
  highest = mean - half_width - float(np.min(shifts)) + standard_error
  return float(brentq(excess_of_tail, lowest, highest))


def logit_interval(values: Sequence[float]) -> Interval:
  """Returns the mean m of fractions, such as accuracies, and an interval around
  it that stays between 0 and 1.

  It is Student's interval on the scale of logit(m) = log(m / (1 - m)), mapped
  back by the logistic function. By the delta method, its half width on that
  scale is that of the mean, divided by m (1 - m), since the derivative of the
  logit is 1 / (m (1 - m)) (Lumley 2010, svyciprop in R).

  Args:
    values: the share of each seed, between 0 and 1.
  """
  interval = student_interval(values)
  # Values that are all equal have no interval. Among them are those with a mean
  # of 0 or 1, at which the logit would be infinite.
  if interval.low is None:
    return interval
  from scipy.special import expit, logit
  mean = interval.mean

  # Go to the scale of logits.
  half_width = (interval.high - interval.low) / 2
  half_width_of_logit = half_width / (mean * (1 - mean))

  # Go back, where neither end can pass 0 or 1.
  return Interval(
      mean=mean,
      low=float(expit(logit(mean) - half_width_of_logit)),
      high=float(expit(logit(mean) + half_width_of_logit)),
      seeds=interval.seeds)


def _are_all_alike(values: Sequence[float]) -> bool:
  """Returns whether the values are all alike, but for rounding."""
  return float(np.std(values)) <= 1e-12 * abs(float(np.mean(values)))


class CrossedEstimate(NamedTuple):
  """A mean over seeds and items (documents, questions), the ends of its 95 %
  interval and its p; these are None where seeds or items are too few, or all
  values are alike."""
  mean: float
  low: float | None
  high: float | None
  p: float | None


def estimate_over_seeds_and_items(
    values_SQ: np.ndarray, weights_Q: Sequence[float] | None = None
    ) -> CrossedEstimate:
  """Returns the mean of differences that are each of a seed and an item, with
  an interval and a p that take both for samples of many; of one seed alone,
  over its items.

  This is the two-way random-effects model without replication (Searle, Casella
  and McCulloch 1992, chapter 4). With the mean squares MS of seeds, of items
  and of the residuals, the variance of the mean is
  (MS_seeds + MS_items - MS_residual) / (S Q), and at least MS_seeds / (S Q),
  with Satterthwaite's degrees of freedom (1946). Weights make the mean a ratio
  estimate, whose residuals stand for the values (Cochran 1977, section 2.11).

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

  # The mean squares of seeds, of items, and of the residuals.
  effect_of_seed_S1 = x_SQ.mean(1, keepdims=True) - mean
  effect_of_item_Q = x_SQ.mean(0) - mean
  residual_SQ = x_SQ - effect_of_seed_S1 - effect_of_item_Q - mean
  sum_of_squares = [
      Q * np.sum(effect_of_seed_S1 ** 2),
      S * np.sum(effect_of_item_Q ** 2),
      np.sum(residual_SQ ** 2)]
  dfs = np.maximum((S - 1, Q - 1, (S - 1) * (Q - 1)), 1)
  mean_squares = np.array(sum_of_squares) / dfs

  # S Q times the variance of the mean, and Satterthwaite's degrees of freedom.
  variance = max(mean_squares @ (1, 1, -1), mean_squares[0])
  df = max(variance ** 2 / np.sum(mean_squares ** 2 / dfs), S - 1)

  # Student's interval and test of the mean.
  standard_error = math.sqrt(variance / (S * Q))
  half_width = float(stdtrit(df, 0.975)) * standard_error
  p = float(2 * stdtr(df, -abs(mean) / standard_error))
  return CrossedEstimate(mean=mean, low=mean - half_width,
                         high=mean + half_width, p=p)


def mcnemar_p_value(ours: Sequence[float], theirs: Sequence[float],
                    alternative: str = 'two-sided') -> float:
  """Returns the p-value of McNemar's exact test (1947), which compares two
  models on the same items (such as questions).

  Items that both get right, or both get wrong, do not tell them apart. If the
  models were equally good, each of the others would be won by either with
  probability 1/2: a binomial test.

  Args:
    ours: 1 or 0 for each item: whether our model is right.
    theirs: likewise of the other model, in the same order.
    alternative: the alternative hypothesis in scipy's words: 'two-sided', or
      'greater' or 'less' for how often ours is right.
  """
  from scipy.stats import binomtest
  difference = np.subtract(ours, theirs, dtype=float)
  wins = int(np.sum(difference > 0))
  losses = int(np.sum(difference < 0))
  # No item tells them apart.
  if wins + losses == 0:
    return 1.0
  test = binomtest(wins, wins + losses, alternative=alternative)
  return float(test.pvalue)


def student_p_value(values: Sequence[float],
                    pooled: PooledDeviation | None = None,
                    shifts: np.ndarray | None = None) -> float | None:
  """Returns the two-sided p-value of Student's t-test that a mean is 0. With
  the options, the largest of several p-values is taken.

  Values that are all equal have no standard deviation, as when a task is solved
  at every seed. Their p-value is that of the sign test: 2^(1 - n), and 1 if
  they are all 0.

  Args:
    values: the value of each of n seeds.
    pooled: a standard deviation over all variants of a comparison, for noise
      that is not normal; None: there is none.
    shifts: [draws], random draws of an error that all values share; None: there
      is none.

  Returns:
    The p-value, or None for fewer than MIN_SEEDS values.
  """
  tails = _one_sided_p_values(values, 0.0, pooled, shifts)
  if tails is None:
    return None
  # Twice the smaller tail; two tails of 1, for values of 0, would make 2.
  return min(2 * min(tails), 1.0)


def equivalence_p_values(values: Sequence[float], margin: float, sign: int,
                         pooled: PooledDeviation | None = None,
                         shifts: np.ndarray | None = None
                         ) -> tuple[float | None, float | None]:
  """Returns the p-values of two tests of a mean difference against a margin.

  Equivalence says that -margin < mean < margin. Its p-value is the larger one
  of two one-sided t-tests (TOST: Schuirmann 1987). Non-inferiority says that
  the mean is worse than none by less than the margin. It is one of these tests.

  Args:
    values: the difference of each seed.
    margin: the largest difference that still counts as none, above 0.
    sign: 1 if a positive difference is an improvement, else -1.
    pooled: a standard deviation over all variants of a comparison, for noise
      that is not normal; None: there is none.
    shifts: [draws], random draws of an error that all values share; None: there
      is none.

  Returns:
    The p-value of equivalence, and that of non-inferiority. Both are None for
    fewer than MIN_SEEDS values.
  """
  at_low_end = _one_sided_p_values(values, -margin, pooled, shifts)
  at_high_end = _one_sided_p_values(values, margin, pooled, shifts)
  if at_low_end is None or at_high_end is None:
    return None, None

  # A test has two p-values: that the mean is below the end, and that it is
  # above. The mean must be above the low end and below the high end.
  _, p_above_low_end = at_low_end
  p_below_high_end, _ = at_high_end

  # If larger is better, the low end is the worse one, and else the high end.
  p_not_worse = p_above_low_end if sign > 0 else p_below_high_end
  return max(p_above_low_end, p_below_high_end), p_not_worse


def p_value_below_target(values: Sequence[float], target: float
                         ) -> float | None:
  """Returns the p of Student's one-sided test that a mean is below a target;
  None for fewer than MIN_SEEDS values."""
  tails = _one_sided_p_values(values, target, None)
  return None if tails is None else tails[0]


def _one_sided_p_values(values: Sequence[float], center: float,
                        pooled: PooledDeviation | None,
                        shifts: np.ndarray | None = None
                        ) -> tuple[float, float] | None:
  """Returns both one-sided p-values of Student's t-test of a mean against
  `center`.

  Args:
    values: the value of each of n seeds.
    center: the mean under the null hypothesis.
    pooled: a standard deviation over all variants of a comparison, for noise
      that is not normal; the larger p by either deviation is taken.
    shifts: by how much the values may all be off, drawn many times; the larger
      p, with or without, is taken.

  Returns:
    The p of a mean that is below `center`, and of one that is above it; None
    for fewer than MIN_SEEDS values.
  """
  n = len(values)
  if n < MIN_SEEDS:
    return None
  distance = float(np.mean(values)) - center

  # No deviation to measure by: the p of the sign test. If signs were a toss of
  # a coin, all n would be the one that they are with probability 2^-n.
  if _are_all_alike(values):
    p_of_one_sign = 2.0 ** -n
    p_below = 1.0 if distance >= 0 else p_of_one_sign
    p_above = 1.0 if distance <= 0 else p_of_one_sign
    return p_below, p_above

  # The mean must differ by each of the deviations: the largest p counts.
  from scipy.special import stdtr
  all_p_below, all_p_above = [], []
  for sd, df in _deviations_to_pass(values, pooled):
    t = distance * math.sqrt(n) / sd
    all_p_below.append(float(stdtr(df, t)))
    all_p_above.append(float(stdtr(df, -t)))
    if shifts is not None:
      standard_error = sd / math.sqrt(n)
      all_p_below.append(_shifted_tail(
          distance=distance, standard_error=standard_error, df=df,
          shifts=shifts))
      all_p_above.append(_shifted_tail(
          distance=-distance, standard_error=standard_error, df=df,
          shifts=-shifts))
  return max(all_p_below), max(all_p_above)


def permutation_p_value(values: Sequence[float]) -> float | None:
  """Returns the p-value of a permutation test that the mean of paired
  differences is 0 (Fisher 1935). The signs of the values are flipped in all
  ways. The p-value is the share of flips whose trimmed mean is at least as
  large, in absolute value, as that of the data.

  It assumes only that the noise is symmetric. A fifth of the values is trimmed
  at each end. Of six values none is trimmed, because the p-value could not be
  below 0.06 then. More than 12 values get 4,096 random flips.

  Args:
    values: the difference of each seed.

  Returns:
    The two-sided p; None for fewer than MIN_SEEDS_OF_PERMUTATION values.
  """
  n = len(values)
  if n < MIN_SEEDS_OF_PERMUTATION:
    return None

  # List which values are flipped, [flips, n]. The bits of 0, 1, ..., 2^n - 1
  # are all possible choices. The first must flip none: the data as they are
  # count as one of the flips, so that p is never 0.
  if n <= 12:
    is_flipped = np.arange(2 ** n)[:, None] >> np.arange(n) & 1
  else:
    is_flipped = np.random.default_rng(0).integers(2, size=(4096, n))
    is_flipped[0] = 0
  signs = 1 - 2 * is_flipped

  # Compute the trimmed mean for each of these choices.
  num_trimmed = n // 5 if n > MIN_SEEDS_OF_PERMUTATION else 0
  ordered = np.sort(np.asarray(values) * signs, axis=1)
  means = np.abs(ordered[:, num_trimmed:n - num_trimmed].mean(1))

  # The factor lets flips count that give the same mean as the data, although
  # their sums are rounded in another way.
  mean_of_data = means[0] * (1 - 1e-12)
  return float(np.mean(means >= mean_of_data))


class MeanDifference(NamedTuple):
  """A difference of the means of two groups of runs, and how far it is known.

  Attributes:
    mean: the difference.
    standard_error: the standard deviation of `mean`.
    df: the degrees of freedom of `standard_error`; infinite where the deviation
      of a run is known beforehand.
    deviation: the standard deviation of the difference of two single runs, one
      of each group.
    df_per_run: by how many degrees of freedom one more run of each group adds
      to `df`; infinite where the deviation is not measured by these runs.
  """
  mean: float
  standard_error: float
  df: float
  deviation: float
  df_per_run: float

  @property
  def p(self) -> float:
    """The two-sided p of Student's t-test that the difference is 0."""
    from scipy.special import stdtr
    return float(2 * stdtr(self.df, -abs(self.mean) / self.standard_error))

  def interval(self, level: float) -> tuple[float, float]:
    """Returns the ends of Student's interval, outside of which the true
    difference lies with the probability `level`."""
    from scipy.special import stdtrit
    half_width = float(stdtrit(self.df, 1 - level / 2)) * self.standard_error
    return self.mean - half_width, self.mean + half_width

  def detectable(self, level: float, power: float) -> float:
    """Returns the true difference that so many runs find at a two-sided level
    with the probability `power`: (t(1 - level / 2) + t(power)) times the
    standard error, with the quantiles t of Student's distribution."""
    return _sum_of_quantiles(self.df, level, power) * self.standard_error

  def runs_needed(self, level: float, power: float) -> int | None:
    """Returns the number of runs of each group with which a t-test would find a
    difference as large as this one.

    Args:
      level: the two-sided level of the test.
      power: the probability to find the difference.

    Returns:
      The smallest such number, or None if MAX_SEEDS are too few.
    """
    def is_enough(runs: int) -> bool:
      """Returns whether that many runs of each group find it."""
      df = self.df_per_run * (runs - 1)
      standard_error = self.deviation / math.sqrt(runs)
      least = _sum_of_quantiles(df, level, power) * standard_error
      return least <= abs(self.mean)

    # The power rises with the number of runs, so bisection finds the first
    # number that is enough. Two may be enough, if the deviation is known.
    numbers = range(2, MAX_SEEDS + 1)
    index = bisect.bisect_left(numbers, True, key=is_enough)
    return numbers[index] if index < len(numbers) else None


def _sum_of_quantiles(df: float, level: float, power: float) -> float:
  """Returns t(1 - level / 2) + t(power) of Student's distribution."""
  from scipy.special import stdtrit
  return float(stdtrit(df, 1 - level / 2) + stdtrit(df, power))


def difference_of_pairs(differences: Sequence[float]) -> MeanDifference | None:
  """Returns the mean difference of pairs of runs with its standard error, as
  the paired t-test needs it.

  Args:
    differences: the difference of each pair, such as the two runs of a seed.

  Returns:
    The mean difference, or None if there are fewer than MIN_SEEDS pairs or all
    differences are equal, which does not tell how much they vary.
  """
  if len(differences) < MIN_SEEDS or _are_all_alike(differences):
    return None
  sd = float(np.std(differences, ddof=1))
  return MeanDifference(
      mean=float(np.mean(differences)),
      standard_error=sd / math.sqrt(len(differences)),
      df=len(differences) - 1, deviation=sd, df_per_run=1)


class GroupOfRuns(NamedTuple):
  """The mean of a figure over some runs.

  Attributes:
    mean: the mean.
    num_runs: the number of runs.
    deviation: the standard deviation of a run; None: it is not known.
  """
  mean: float
  num_runs: int
  deviation: float | None


def describe_group(values: Sequence[float]) -> GroupOfRuns:
  """Returns the mean of a figure over runs, with the deviation of a run, which
  is not known of fewer than two runs, or of runs that are all alike."""
  deviation = None
  if len(values) > 1 and not _are_all_alike(values):
    deviation = float(np.std(values, ddof=1))
  return GroupOfRuns(mean=float(np.mean(values)), num_runs=len(values),
                     deviation=deviation)


def difference_of_groups(group: GroupOfRuns, base: GroupOfRuns
                         ) -> MeanDifference | None:
  """Returns the difference of the means of two independent groups of runs with
  its standard error, as Welch's t-test (1947) needs it. Their standard
  deviations s1 and s2 may differ:
    standard_error^2 = s1^2 / n1 + s2^2 / n2.

  Args:
    group: one group.
    base: the group that is subtracted.

  Returns:
    The difference, or None if a deviation is not known, or a group has fewer
    than MIN_SEEDS runs.
  """
  # For each group s^2, and the squared standard error of its mean, q = s^2 / n.
  variances, squared_errors = [], []
  sum_for_df = 0.0
  for runs in (group, base):
    if runs.deviation is None or runs.num_runs < MIN_SEEDS:
      return None
    squared_error = runs.deviation ** 2 / runs.num_runs
    variances.append(runs.deviation ** 2)
    squared_errors.append(squared_error)
    sum_for_df += squared_error ** 2 / (runs.num_runs - 1)

  # The degrees of freedom are those of Welch and Satterthwaite,
  # (q1 + q2)^2 / (q1^2 / (n1 - 1) + q2^2 / (n2 - 1)). A difference of single
  # runs has the variance s1^2 + s2^2.
  return MeanDifference(
      mean=group.mean - base.mean,
      standard_error=math.sqrt(sum(squared_errors)),
      df=sum(squared_errors) ** 2 / sum_for_df,
      deviation=math.sqrt(sum(variances)), df_per_run=2)


def difference_with_deviation(group: GroupOfRuns, base: GroupOfRuns,
                              pooled: PooledDeviation) -> MeanDifference:
  """Returns the difference of the means of two independent groups of runs that
  share a standard deviation sd. Its standard error is sd sqrt(1 / n1 + 1 / n2).

  Args:
    group: one group.
    base: the group that is subtracted.
    pooled: the deviation of a run. Its degrees of freedom `df` are infinite if
      it is known exactly.

  Returns:
    The difference. Its `df_per_run` is infinite, since the deviation is not
    measured by these runs alone.
  """
  standard_error = pooled.sd * math.sqrt(
      1 / group.num_runs + 1 / base.num_runs)
  return MeanDifference(
      mean=group.mean - base.mean, standard_error=standard_error,
      df=pooled.df, deviation=pooled.sd * math.sqrt(2), df_per_run=math.inf)


def pool_deviations(groups: Sequence[GroupOfRuns]) -> PooledDeviation | None:
  """Returns one standard deviation of a run for all groups of runs, each around
  its own mean; None where the deviation of no group is known."""
  sum_of_squares, df = 0.0, 0
  for group in groups:
    if group.deviation is not None:
      sum_of_squares += group.deviation ** 2 * (group.num_runs - 1)
      df += group.num_runs - 1
  if not df:
    return None
  return PooledDeviation(sd=math.sqrt(sum_of_squares / df), df=df)


class Looks(NamedTuple):
  """The tests at each evaluation that a mean loss is below a target.

  Attributes:
    p: the one-sided p of each evaluation by itself.
    p_counted: the probability that any of all evaluations has a p as small
      where none has a mean below the target.
  """
  p: np.ndarray
  p_counted: np.ndarray


def p_values_of_looks(losses_RL: np.ndarray, target: float,
                      known_deviation: float | None = None) -> Looks | None:
  """Tests at each evaluation of some runs whether their mean loss is below a
  target, by itself and counting all looks.

  Who takes the first evaluation that passes has looked at all of them. The
  noise of a run at one step is nearly that at the next, so that L looks are
  fewer than L tests. Their correlation is that of the runs' residuals; the
  largest of L normal numbers with this correlation is simulated (the step-down
  of Westfall and Young 1993, its first step).

  Args:
    losses_RL: the loss of each of R runs at L evaluations.
    target: the target.
    known_deviation: the standard deviation of a run; None: it is measured at
      each evaluation, by Student's test.

  Returns:
    The p of each evaluation; None where the deviation is measured by fewer than
    MIN_SEEDS runs.
  """
  from scipy.special import ndtri, ndtr, stdtr
  R, L = losses_RL.shape
  distance_L = target - losses_RL.mean(0)
  if known_deviation is not None:
    p_L = ndtr(-distance_L * math.sqrt(R) / known_deviation)
  elif R < MIN_SEEDS:
    return None
  else:
    deviation_L = np.maximum(losses_RL.std(0, ddof=1), 1e-300)
    p_L = stdtr(R - 1, -distance_L * math.sqrt(R) / deviation_L)
  # Without residuals the looks are taken for independent: Bonferroni.
  if R == 1:
    return Looks(p=p_L, p_counted=np.minimum(L * p_L, 1.0))

  # Residuals of unit length: sums of them with normal weights have a variance
  # of 1, and the correlation of the residuals.
  residuals_RL = losses_RL - losses_RL.mean(0)
  length_L = np.sqrt((residuals_RL ** 2).sum(0))
  residuals_RL = residuals_RL / np.maximum(length_L, 1e-300)
  weights_NR = np.random.default_rng(0).normal(size=(NUM_DRAWS_OF_LOOKS, R))
  largest_N = np.sort((weights_NR @ residuals_RL).max(1))

  # The share of draws whose largest number is as far out as the p of the look.
  z_L = -ndtri(np.clip(p_L, 1e-300, 1 - 1e-16))
  num_smaller_L = np.searchsorted(largest_N, z_L)
  p_counted_L = 1 - num_smaller_L / NUM_DRAWS_OF_LOOKS
  return Looks(p=p_L, p_counted=np.maximum(p_counted_L, p_L))


class NoiseShape(NamedTuple):
  """Two tests of whether the noise of differences is normal.

  Attributes:
    skew: the p of its skewness, if the noise were normal.
    outliers: the p of its largest value, if the noise were normal.
    groups: the differences of each variant, [seeds, sizes].
  """
  skew: float
  outliers: float
  groups: Sequence[np.ndarray]

  @property
  def p(self) -> float:
    """The p of normal noise by both tests together (Bonferroni)."""
    return min(2 * min(self.skew, self.outliers), 1.0)

  def pooled_deviation(self, statistic: Callable[[np.ndarray], np.ndarray]
                       ) -> PooledDeviation | None:
    """Returns the standard deviation of a figure over seeds, pooled over all
    variants. Tests that must hold for noise which is not normal use it besides
    the deviation of a single variant.

    Args:
      statistic: a function that maps the differences of a variant, [seeds,
        sizes], to the figure of each seed that is tested, [seeds].

    Returns:
      The deviation with its degrees of freedom; None if the noise looks normal,
      and needs no pooling.
    """
    if self.p > MAX_P_OF_IRREGULAR:
      return None
    # Each variant is measured from its own mean, which takes one degree of
    # freedom; np.var times the number of seeds is its sum of squares.
    df = sum(len(group) - 1 for group in self.groups)
    sum_of_squares = sum(np.var(statistic(group)) * len(group)
                         for group in self.groups)
    return PooledDeviation(sd=math.sqrt(sum_of_squares / df), df=df)

  def pooled_deviation_at_size(self, size: int) -> PooledDeviation | None:
    """Returns the standard deviation over seeds at one size of the model,
    pooled over all variants, for tests that must hold for noise which is not
    normal.

    Outliers may have been seen only at another size. So the deviation at this
    size, in units of the median distance from the mean, is raised to the root
    mean square over all sizes, if it is lower.

    Args:
      size: the index of the size.

    Returns:
      The deviation with its degrees of freedom; None where the noise looks
      normal, and needs no pooling.
    """
    pooled = self.pooled_deviation(lambda group: group[:, size])
    if pooled is None:
      return None
    # The variance at each size, in units that a tail does not move.
    residuals = np.concatenate(
        [group - np.mean(group, axis=0) for group in self.groups])
    variance_by_size = np.mean(
        _scale_by_median_distance(residuals) ** 2, axis=0)
    inflation = variance_by_size.mean() / max(variance_by_size[size], 1e-300)
    return pooled._replace(sd=pooled.sd * math.sqrt(max(inflation, 1.0)))


def measure_noise_shape(groups: Sequence[np.ndarray]) -> NoiseShape | None:
  """Tests whether the noise of paired differences is normal. Its skewness and
  its largest value are compared with those of simulated normal noise of as many
  seeds.

  Args:
    groups: the differences of each variant from one base, [seeds, sizes of the
      model].

  Returns:
    The p-value of the skewness, that of the largest value, and the groups that
    were used. None if no group can be used.
  """
  # Leave out groups without noise, of too few seeds, and of so many that their
  # mean is normal whatever the noise is.
  usable_groups = []
  for group in groups:
    has_no_noise = all(_are_all_alike(column) for column in group.T)
    is_right_length = MIN_SEEDS <= len(group) <= MAX_SEEDS_OF_NOISE_SHAPE
    if is_right_length and not has_no_noise:
      usable_groups.append(group)
  if not usable_groups:
    return None

  # Subtract the effect of each variant, so that only its noise is left. The
  # effect is taken to be the median, because outliers would move a mean.
  residuals = np.concatenate(
      [group - np.median(group, axis=0) for group in usable_groups])
  skewness, largest = _skewness_and_largest(residuals)

  # Find how often normal noise of as many seeds is as skewed or has as large a
  # value.
  lengths = tuple(len(group) for group in usable_groups)
  normal_skewness, normal_largest = _simulate_normal_shapes(
      lengths, residuals.shape[1])
  # The factor lets draws count that equal the data but for rounding.
  p_of_skewness = np.mean(normal_skewness >= skewness * (1 - 1e-9))
  p_of_largest = np.mean(normal_largest >= largest * (1 - 1e-9))
  return NoiseShape(skew=float(p_of_skewness), outliers=float(p_of_largest),
                    groups=usable_groups)


def _skewness_and_largest(residuals: np.ndarray
                          ) -> tuple[np.ndarray, np.ndarray]:
  """Returns the absolute skewness |E z^3| / (E z^2)^1.5 and the largest |z| of
  residuals z, which are scaled so that all sizes of model count alike.

  Args:
    residuals: [..., values, sizes].

  Returns:
    The skewness and the largest |z|, both of shape [...].
  """
  z = _scale_by_median_distance(residuals)
  # The medians are 0, but skewness is defined around the mean.
  z = z - np.mean(z, (-2, -1), keepdims=True)
  # Residuals that are all 0 have a skewness of 0, and not of NaN.
  mean_square = np.maximum(np.mean(z ** 2, (-2, -1)), 1e-300)
  skewness = np.abs(np.mean(z ** 3, (-2, -1))) / mean_square ** 1.5
  return skewness, np.max(np.abs(z), (-2, -1))


def _scale_by_median_distance(residuals: np.ndarray) -> np.ndarray:
  """Returns residuals [..., values, sizes], those of each size divided by
  their median distance from 0, or by the mean distance where that is 0."""
  distance = np.abs(residuals)
  scale = np.median(distance, -2, keepdims=True)
  scale = np.where(scale > 0, scale, np.mean(distance, -2, keepdims=True))
  return residuals / np.where(scale > 0, scale, 1.0)


@functools.lru_cache(maxsize=32)
def _simulate_normal_shapes(lengths: tuple[int, ...], num_sizes: int
                            ) -> tuple[np.ndarray, np.ndarray]:
  """Simulates many studies with normal noise, and returns the skewness and the
  largest value that each of them would see.

  Args:
    lengths: the number of seeds of each variant.
    num_sizes: the number of sizes of the model.

  Returns:
    Two arrays of [draws], as `_skewness_and_largest` finds them.
  """
  rng = np.random.default_rng(0)
  values_per_draw = sum(lengths) * num_sizes
  # A large study gets fewer draws, to save memory.
  num_draws = min(NUM_SIMULATED_STUDIES, max(4_000_000 // values_per_draw, 200))

  # All variants are compared with the same base, so their differences are
  # correlated.
  base = rng.normal(size=(num_draws, max(lengths), num_sizes))

  # Treat the draws as `measure_noise_shape` treats the data: subtract the base
  # from each variant, and then the median over the seeds.
  residuals = []
  for length in lengths:
    variant = rng.normal(size=(num_draws, length, num_sizes))
    group = variant - base[:, :length]
    residuals.append(group - np.median(group, 1, keepdims=True))
  return _skewness_and_largest(np.concatenate(residuals, 1))


def least_significant_mean(seeds: int, level: float) -> tuple[float, float]:
  """Returns what tests over some number of seeds can show at best.

  Args:
    seeds: the number of seeds, n.
    level: the two-sided level of the test.

  Returns:
    The smallest mean that Student's t-test finds significant, in standard
    deviations of a paired difference: t(1 - level / 2, n - 1) / sqrt(n), where
    t is the quantile of Student's distribution. And the smallest p-value that
    the sign test can have: 2^(1 - n).
  """
  from scipy.special import stdtrit
  quantile = float(stdtrit(seeds - 1, 1 - level / 2))
  return quantile / math.sqrt(seeds), 2.0 ** (1 - seeds)


def correct_p_values(p: Sequence[float | None], method: str = 'holm'
                     ) -> list[float | None]:
  """Returns p-values corrected for multiple tests.

  Args:
    p: the p-value of each test; None for one that could not be done, which
      counts as a test all the same.
    method: 'holm' for the family-wise error rate (Holm 1979), or 'bh' for the
      false discovery rate (Benjamini and Hochberg 1995).

  Returns:
    The corrected p-values, in the order of `p` and with its None.
  """
  # A test that could not be done counts as one with p = 1.
  corrected = np.array(
      [1.0 if p_value is None else p_value for p_value in p])
  if method == 'holm':
    # Multiply the smallest p by n, the next by n - 1, and so on. None may be
    # below the one before it, or above 1.
    order = np.argsort(corrected)
    factors = np.arange(len(corrected), 0, -1)
    rising = np.maximum.accumulate(corrected[order] * factors)
    corrected[order] = np.minimum(rising, 1.0)
  elif len(corrected):
    from scipy import stats
    corrected = stats.false_discovery_control(corrected)
  return [None if p_value is None else p_corrected
          for p_value, p_corrected in zip(p, corrected.tolist())]


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
  """Fits the power law loss(C) = floor + scale / C^exponent with floor >= 0 to
  a curve, by least squares.

  For each exponent the two other constants are a linear fit, so one exponent is
  all there is to search, and no start has to be guessed.

  Args:
    compute: the compute C at each point of the curve.
    loss: the loss there. Points that are not finite are left out.

  Returns:
    The law; None where fewer than MIN_POINTS_OF_CURVE points are left, or where
    the loss does not fall.
  """
  x, y = np.asarray(compute, float), np.asarray(loss, float)
  is_known = np.isfinite(x) & np.isfinite(y) & (x > 0)
  x, y = x[is_known], y[is_known]
  if len(x) < MIN_POINTS_OF_CURVE or np.ptp(x) == 0:
    return None
  from scipy.optimize import minimize_scalar, nnls
  # Compute is measured in its geometric mean: raw FLOPs to a power would be too
  # small beside the 1 of the floor.
  unit = np.exp(np.mean(np.log(x)))

  def fit_floor_and_scale(exponent: float) -> tuple[np.ndarray, float]:
    """Returns [floor, scale], and the norm of the residuals."""
    powers = (x / unit) ** -exponent
    return nnls(np.stack([np.ones_like(x), powers], 1), y)

  def norm_of_residuals(exponent: float) -> float:
    """Returns the error of the best law with this exponent."""
    _, norm = fit_floor_and_scale(exponent)
    return norm

  # The error may have several minima over the exponent: the best of a grid is
  # found, and then the best between its neighbours.
  grid = np.geomspace(0.01, 5.0, 60)
  errors = [norm_of_residuals(exponent) for exponent in grid]
  best_index = int(np.argmin(errors))
  bounds = (grid[max(best_index - 1, 0)],
            grid[min(best_index + 1, len(grid) - 1)])
  best = minimize_scalar(norm_of_residuals, bounds=bounds, method='bounded',
                         options={'xatol': 1e-10})

  # The law in the unit of the compute itself.
  (floor, scale), norm = fit_floor_and_scale(best.x)
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
  """Returns how many times faster one loss curve reaches the same loss than
  another: the compute of the other, divided by its own.

  The loss is the higher one of the two last losses. Both curves have reached
  it, so that neither is extrapolated.

  Args:
    ours: the power law fitted to our curve; None: none could be fitted.
    theirs: the power law fitted to the other curve.

  Returns:
    The ratio, which is above 1 if our curve needs less; None if either law is
    None, or if the curves have no loss in common.
  """
  if ours is None or theirs is None:
    return None
  our_last_loss = float(ours.loss(ours.last))
  their_last_loss = float(theirs.loss(theirs.last))
  shared_loss = max(our_last_loss, their_last_loss)
  our_compute = ours.compute(shared_loss)
  their_compute = theirs.compute(shared_loss)
  # One curve may begin below the loss at which the other one ends.
  if our_compute is None or their_compute is None:
    return None
  return their_compute / our_compute


def mean_speed_up(pairs: Sequence[tuple[PowerLaw | None, PowerLaw | None]]
                  ) -> tuple[Interval | None, float | None]:
  """Averages the speed-up of a variant over seeds, by the geometric mean. A
  speed-up is the base's compute over the variant's to the same loss.

  Args:
    pairs: for each seed, the power law of the variant's loss curve and that of
      the base's.

  Returns:
    The mean with its interval, and the largest error of the fits in nats. Both
    are None if any seed has no speed-up. The others are those that went well,
    so that their mean would be too good.
  """
  ratios = [speed_up(ours, theirs) for ours, theirs in pairs]
  # A speed-up exists only where both laws do, so none is None below.
  if not ratios or None in ratios:
    return None, None
  fit_error = max(max(ours.rms, theirs.rms) for ours, theirs in pairs)

  # The geometric mean is the exponential of the mean of the logarithms, and so
  # are the ends of its interval.
  mean_of_logs = student_interval(np.log(ratios))
  low = high = None
  if mean_of_logs.low is not None:
    low, high = math.exp(mean_of_logs.low), math.exp(mean_of_logs.high)
  mean = Interval(mean=math.exp(mean_of_logs.mean), low=low, high=high,
                  seeds=mean_of_logs.seeds)
  return mean, fit_error


def jackknife(samples: np.ndarray,
              statistic: Callable[[np.ndarray], np.ndarray]
              ) -> tuple[np.ndarray, np.ndarray]:
  """Returns a statistic of the mean over seeds, and half of the width of its 95
  % interval by the jackknife (Tukey 1958).

  Each of the n seeds is left out in turn. The standard error is sd(statistic
  without a seed) (n - 1) / sqrt(n), and the interval is Student's with n - 1
  degrees of freedom.

  Args:
    samples: [seeds, ...]; all that belongs to a seed is left out together.
    statistic: a function that maps a mean over seeds, [...], to an array of
      figures; those that are not known are NaN.

  Returns:
    The figures, and the half width of each; NaN where a figure is not known
    without one of the seeds.
  """
  from scipy.special import stdtrit
  n = len(samples)
  without_a_seed = []
  for seed in range(n):
    other_seeds = np.delete(samples, seed, axis=0)
    without_a_seed.append(statistic(np.mean(other_seeds, axis=0)))
  # The statistics without a seed share n - 2 of n - 1 seeds each, so they lie
  # close together. The factor (n - 1) makes up for it.
  deviation = np.std(without_a_seed, axis=0, ddof=1)
  standard_error = deviation * (n - 1) / math.sqrt(n)
  # 97.5 % lie below this: 2.5 % are left out at either side.
  quantile = stdtrit(n - 1, 0.975)
  return statistic(np.mean(samples, axis=0)), quantile * standard_error


def fit_compute_multiplier(compute: np.ndarray, loss: np.ndarray,
                           floor: float | None = None
                           ) -> tuple[PowerLaw | None, float]:
  """Fits the scaling law of a base over sizes, and the compute multiplier m of
  a variant, by least squares over the losses of both:

    loss of the base     = floor + scale / C^exponent
    loss of the variant  = floor + scale / (m C)^exponent

  For each exponent and multiplier, floor and scale are a linear fit.

  Args:
    compute: [2, sizes], the compute of the base and of the variant.
    loss: [2, sizes], their losses.
    floor: the floor of the law; None: it is fitted, and is 0 or more.

  Returns:
    The law and the multiplier; None and NaN where the loss does not fall.
  """
  from scipy.optimize import least_squares
  # Compute is measured in its geometric mean, so that its powers are near 1.
  unit = np.exp(np.mean(np.log(compute)))
  # A floor that is given is taken off the losses, and the law above it is one
  # of floor 0.
  pinned_floor = floor or 0.0
  losses = loss.ravel() - pinned_floor

  def fit_floor_and_scale(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fits the floor and the scale of the law L = floor + scale C^-exponent by
    linear least squares, which is possible once the exponent, and the variant's
    multiplier of the compute C, are given.

    Args:
      theta: the logarithms of exponent and multiplier.

    Returns:
      [floor, scale], and the residuals of all losses.
    """
    log_exponent, log_multiplier = theta
    # The base is the first row and has a multiplier of exp(0) = 1.
    multipliers = np.exp([[0.0], [log_multiplier]])
    effective_compute = compute / unit * multipliers
    powers = effective_compute.ravel() ** -np.exp(log_exponent)
    columns = np.stack([np.ones_like(powers), powers], 1)
    constants = np.linalg.lstsq(columns, losses, rcond=None)[0]
    # A floor below 0 is no loss. Where the floor is 0, or was given and is
    # taken off, the scale alone is the projection of the losses on the powers.
    if floor is not None or constants[0] < 0:
      scale = powers @ losses / (powers @ powers)
      constants = np.array([0.0, scale])
    return constants, columns @ constants - losses

  def residuals_of(theta: np.ndarray) -> np.ndarray:
    """Returns the residuals alone, which are minimised."""
    _, residuals = fit_floor_and_scale(theta)
    return residuals

  # The exponent and the multiplier are searched as logarithms, which keeps them
  # positive: from 0.2 and 1, within 0.007 to 4.5 and 0.05 to 20.
  fit = least_squares(
      residuals_of, [-1.6, 0.0], bounds=([-5.0, -3.0], [1.5, 3.0]),
      x_scale=0.1, xtol=1e-10, ftol=1e-12, gtol=1e-12)
  exponent, multiplier = np.exp(fit.x).tolist()

  # The law in the unit of the compute itself.
  constants, _ = fit_floor_and_scale(fit.x)
  above_pinned_floor, scale = constants.tolist()
  if scale <= 0:
    return None, math.nan
  law = PowerLaw(
      floor=above_pinned_floor + pinned_floor,
      scale=scale * unit ** exponent,
      exponent=exponent,
      first=compute[0].min(),
      last=compute[0].max(),
      rms=math.sqrt(2 * fit.cost / len(losses)))
  return law, multiplier


def multiplier_at_each_size(law: PowerLaw, compute: np.ndarray,
                            loss: np.ndarray) -> np.ndarray:
  """Returns the compute multiplier of a variant at each size of the model: how
  many times the variant's compute the base would need for the variant's loss.

  The scaling law of the base, L(C) = floor + scale / C^exponent, gives the
  compute at which the base's loss would be lower by the difference that was
  measured at this size. It is divided by the compute of the variant.

  Args:
    law: the scaling law of the base.
    compute: [2, sizes], the compute of the base and of the variant.
    loss: [2, sizes], their losses.

  Returns:
    [sizes]. It is NaN if no compute is enough, or if that compute lies more
    than MAX_EXTRAPOLATION times beyond what the law was fitted to.
  """
  base_compute, variant_compute = compute
  base_loss, variant_loss = loss
  # Find how far the law is above its floor, and to which share of that the
  # variant's difference would bring it. The difference is added to the law and
  # not to the base's loss, so that the error of the fit at this size cancels.
  above_floor = np.maximum(law.loss(base_compute) - law.floor, 1e-300)
  wanted_above_floor = above_floor + variant_loss - base_loss
  share = np.maximum(wanted_above_floor / above_floor, 1e-300)

  # scale / C^exponent becomes `share` times as large if C becomes
  # share^(-1 / exponent) times as large. For a loss below the floor, the share
  # is 1e-300, which makes the factor so huge that the compute is outside.
  factor = np.exp(np.minimum(-np.log(share) / law.exponent, 50))
  needed_compute = base_compute * factor
  is_inside = ((needed_compute >= law.first / MAX_EXTRAPOLATION)
               & (needed_compute <= law.last * MAX_EXTRAPOLATION))
  return np.where(is_inside, needed_compute / variant_compute, np.nan)


def jackknife_scaling_figures(compute: np.ndarray, losses: np.ndarray,
                              ahead: np.ndarray, floor: float | None = None
                              ) -> tuple[np.ndarray, np.ndarray]:
  """Returns figures of the scaling law of a base and of a variant's compute
  multiplier, and half of the width of their 95 % intervals over seeds.

  Args:
    compute: [2, sizes], the compute of the base and of the variant.
    losses: [seeds, 2, sizes], their losses.
    ahead: [2], the compute of base and variant at which their losses are
      predicted, such as that of a size that has not been trained.
    floor: the floor of the law; None: it is fitted.

  Returns:
    Two arrays of [4 + sizes], the figures and the half widths by `jackknife`:
    the floor; the predicted loss of the base; that of the variant minus it; the
    logarithm of the compute multiplier; and the logarithm of that of each size.
    All are NaN where the loss does not fall with compute.
  """
  def figures_of_mean(mean_losses: np.ndarray) -> np.ndarray:
    """Returns the figures for losses that are averaged over seeds, in the order
    that the outer function states.

    Args:
      mean_losses: [2, sizes], the losses of the base and of the variant.
    """
    law, multiplier = fit_compute_multiplier(compute, mean_losses, floor)
    if law is None:
      return np.full(compute.shape[1] + 4, np.nan)
    # The variant follows the law of the base at `multiplier` times its compute.
    base_loss, variant_loss = law.loss(ahead * [1.0, multiplier])
    at_sizes = multiplier_at_each_size(law, compute, mean_losses)
    # The interval assumes normal noise, and logarithms of ratios are more
    # nearly normal than ratios.
    log_multipliers = np.log([multiplier, *at_sizes])
    return np.array([law.floor, base_loss, variant_loss - base_loss,
                     *log_multipliers])

  return jackknife(losses, figures_of_mean)


# The power of a test, predicted from a standard deviation that is itself an
# estimate.
#
# A study is simulated a few thousand times: the means of the sizes, the
# deviation that the t-test will see, the runs that diverge, and the true
# standard deviation, given the estimate s with v degrees of freedom:
# sigma = s / sqrt(chi2_v / v). Each simulated study needs some least effect to
# find it, and the share of those that need no more than an effect is the power
# that is predicted for it.
#
# Taking s for sigma promises too much: of studies that take the number of seeds
# that s asks for, more have too few than too many. With sigma drawn, the effect
# that is predicted for 80 % power is found by 80 % of the studies that predict
# it, exactly so for each true sigma, since s / sigma has the distribution that
# was drawn; so do studies that take `seeds_needed` seeds. What is predicted for
# a *fixed* effect and number of seeds is right among studies whose noise
# differs ("of those that predict 70 %, 70 % find it"), and on average some
# points too low over studies of one noise (docs/studies.md, "Can it be
# believed?").


@functools.lru_cache(maxsize=32)
def _sobol_points(dims: int) -> np.ndarray:
  """Returns [studies, dims] points that fill the unit cube evenly (scrambled
  Sobol points), the same ones in each call."""
  from scipy.stats import qmc
  points = qmc.Sobol(dims, seed=0).random(NUM_SIMULATED_STUDIES)
  return np.clip(points, 1e-9, 1 - 1e-9)


@functools.lru_cache(maxsize=32)
def _normal_points(dims: int) -> np.ndarray:
  """Returns [studies, dims] standard normal numbers, by the inverse of the
  normal distribution at the Sobol points."""
  from scipy.special import ndtri
  return ndtri(_sobol_points(dims))


@functools.lru_cache(maxsize=1024)
def _draw_relative_deviations(df: float, column: int, dims: int) -> np.ndarray:
  """Draws how far an estimated standard deviation is from the true one: the
  quotient of both, which is sqrt(chi2 / df), where chi2 has a chi-squared
  distribution with df degrees of freedom.

  Args:
    df: the degrees of freedom.
    column: the column of quasi-random (Sobol) points that is used. Draws that
      must be independent take different columns.
    dims: the number of columns.

  Returns:
    [studies], one draw for each simulated study.
  """
  # The cube root of chi2 / df is nearly normal (Wilson and Hilferty 1931), with
  # mean 1 - 2 / (9 df) and variance 2 / (9 df). Here it errs by less than 1e-4.
  # The power is 3 for the cube times 1 / 2 for the root.
  if df > 40:
    variance = 2 / (9 * df)
    z = _normal_points(dims)[:, column]
    return (1 - variance + z * variance ** 0.5) ** 1.5

  # For fewer degrees of freedom, take the quantile of chi2 at a uniform point
  # u: twice the inverse of the regularised gamma function of df / 2.
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


def simulate_least_effects(
    sd: float, sds: Sequence[float], df: float, seeds: int, level: float,
    rate: float = 0.0, limit: float = 1.0, seen: np.ndarray | None = None,
    within: bool = False) -> np.ndarray:
  """Returns the least effect, of either sign, that each of many simulated
  studies would find: significant over seeds, and of one direction at all sizes.

  Args:
    sd: the standard deviation of a seed's mean over the sizes, of the paired
      differences.
    sds: that of the paired differences at each of these sizes. Where they alone
      would give the mean another deviation than `sd`, the sizes of a seed are
      drawn as correlated (more), or all of them as less noisy (less).
    df: the degrees of freedom of the estimate.
    seeds: how many the test has.
    level: the two-sided level of the test.
    rate: the share of runs that diverge, of variant and base alike.
    limit: how much above `rate` the share of a variant's runs that diverge
      may be; with more it is unstable, and found nothing.
    seen: [pairs, sizes], differences that the noise is resampled from; None:
      it is normal.
    within: return the least margin instead, within which each study would show
      by two one-sided tests, and at all sizes, what has no effect.

  Returns:
    [studies], the least effect or margin; infinite in a study that can find
    nothing.
  """
  from scipy.special import stdtrit
  num_sizes, sds, correlation = _correlate_sizes(sd, np.asarray(sds, float))
  if seeds < MIN_SEEDS:
    return np.full(NUM_SIMULATED_STUDIES, np.inf)
  # The columns of the points: one of each size, the deviation that the test
  # will see, the true deviation, and what the sizes of a seed share.
  dims = num_sizes + 3

  # The seeds whose runs end, and the studies whose variant is unstable.
  num_ended, is_void = np.array([seeds]), np.array([False])
  if rate:
    runs = seeds * num_sizes
    diverged, diverged_of_base = _draw_diverged_runs(runs, rate)
    num_ended = seeds - np.minimum(diverged + diverged_of_base, seeds)
    is_unstable = diverged / runs > limit + rate + 1e-9
    is_void = (num_ended < MIN_SEEDS) | is_unstable
    num_ended = np.maximum(num_ended, MIN_SEEDS)

  # The mean at each size, and the deviation of the means over sizes.
  if seen is not None and seeds <= MAX_SEEDS_OF_NOISE_SHAPE:
    means, deviation = _resample_means(seen, sds, num_ended)
  else:
    z = _normal_points(dims)
    shared_by_sizes = z[:, -1:] * correlation ** 0.5
    of_each_size = z[:, :num_sizes] * (1 - correlation) ** 0.5
    noise = (of_each_size + shared_by_sizes) * sds
    means = noise / np.sqrt(num_ended)[:, None]
    deviation = np.empty(NUM_SIMULATED_STUDIES)
    for n in set(num_ended.tolist()):
      has_n_seeds = num_ended == n if len(num_ended) > 1 else slice(None)
      relative = _draw_relative_deviations(float(n - 1), num_sizes, dims)
      deviation[has_n_seeds] = sd * relative[has_n_seeds]

  # The mean over sizes must exceed this, and each size must point to it.
  tail = level if within else level / 2
  quantile = stdtrit(num_ended - 1, 1 - tail)
  half_width = quantile * deviation / np.sqrt(num_ended)
  if within:
    means = np.abs(np.column_stack([means, means.mean(1)]))
    half_width = half_width + means[:, -1] - means.mean(1)
  least_effect = means.mean(1) + half_width
  if num_sizes > 1:
    least_effect = np.maximum(least_effect, means.max(1))

  # The true deviation is drawn, too.
  true_over_estimate = _draw_relative_deviations(
      round(df, 1), num_sizes + 1, dims)
  return np.where(is_void, np.inf, least_effect / true_over_estimate)


def _resample_means(seen: np.ndarray, sds: np.ndarray, num_ended: np.ndarray
                    ) -> tuple[np.ndarray, np.ndarray]:
  """Simulates studies by drawing from the paired differences of real runs, and
  returns their means.

  Args:
    seen: [pairs, sizes], the differences of real pairs of runs at each size of
      the model.
    sds: [sizes], the standard deviation that the draws have at each size.
    num_ended: [studies] or [1], the number of seeds of each study whose runs
      did not diverge.

  Returns:
    [studies, sizes], the mean at each size; and [studies], the standard
    deviation over seeds of a seed's mean over the sizes.
  """
  # Draw differences, [studies, seeds, sizes].
  differences = _resample_differences(seen, sds, int(num_ended.max()))
  num_studies, num_seeds, _ = differences.shape

  # All studies are drawn with as many seeds as the largest one has. Each uses
  # its first num_ended seeds, and the mask [studies, seeds] is 0 for the rest.
  has_seed = np.arange(num_seeds) < num_ended[:, None]
  mask = has_seed * np.ones((num_studies, num_seeds))

  # Average over the seeds. d: studies, n: seeds, s: sizes.
  means = (np.einsum('dns,dn->ds', differences, mask)
           / num_ended[:, None])

  # The variance over seeds of a seed's mean over the sizes.
  residuals = differences.mean(2) - means.mean(1)[:, None]
  variance = (residuals ** 2 * mask).sum(1) / (num_ended - 1)
  return means, np.sqrt(variance)


def _resample_differences(seen: np.ndarray, sds: np.ndarray, num_seeds: int
                          ) -> np.ndarray:
  """Draws the paired differences of simulated studies, with replacement from
  differences that were seen.

  Args:
    seen: [pairs, sizes], the differences.
    sds: [sizes], the standard deviation that each size shall have.
    num_seeds: the number of seeds of each study.

  Returns:
    [studies, seeds, sizes].
  """
  rng = np.random.default_rng(0)
  # The sizes of a pair stay together: their noise may be correlated.
  pairs = rng.integers(len(seen), size=(NUM_SIMULATED_STUDIES, num_seeds))
  # Each difference is drawn with a random sign, because it means nothing which
  # run of a pair comes first. The mean of all draws is then 0.
  signs = rng.choice((-1, 1), size=(NUM_SIMULATED_STUDIES, num_seeds, 1))
  # Scale the draws, so that the root mean square at each size becomes `sds`.
  scale = sds / np.sqrt(np.mean(seen ** 2, axis=0))
  return seen[pairs] * signs * scale


def simulate_false_positive_rate(seen: np.ndarray, sds: Sequence[float],
                                 seeds: int, level: float, variants: int = 1
                                 ) -> float:
  """Returns how often a variant without effect is found to have one, in studies
  whose noise is drawn from differences that were seen.

  The test is `student_p_value`, by the pooled deviation too where the
  differences of a study do not look normal.

  Args:
    seen: [pairs, sizes], the differences.
    sds: the standard deviation at each size.
    seeds: the number of seeds of a study.
    level: the two-sided level of the test.
    variants: the number of variants of a study.
  """
  from scipy.special import stdtr
  differences = _resample_differences(seen, np.asarray(sds), seeds)
  num_used = NUM_SIMULATED_STUDIES // variants * variants
  # [studies, variants, seeds, sizes]
  studies = differences[:num_used].reshape(-1, variants, *differences.shape[1:])
  means = studies.mean(3)

  # Student's test finds these, with one sign at all sizes. The pooled deviation
  # finds nothing more, so only what is found here is tested again.
  deviation = np.maximum(means.std(2, ddof=1), 1e-300)
  t = means.mean(2) / deviation * seeds ** 0.5
  signs = np.sign(studies.mean(2))
  has_one_sign = np.ptp(signs, axis=2) == 0
  is_significant = 2 * stdtr(seeds - 1, -np.abs(t)) <= level
  is_found = is_significant & has_one_sign

  # Each study is tested with its own pooled deviation.
  num_false = 0
  for study, study_means, is_found_in_study in zip(studies, means, is_found):
    if not is_found_in_study.any():
      continue
    noise = measure_noise_shape(study)
    pooled = None
    if noise is not None:
      pooled = noise.pooled_deviation(lambda group: group.mean(1))
    for values in study_means[is_found_in_study]:
      p = student_p_value(values, pooled)
      if p is not None and p <= level:
        num_false += 1
  return num_false / is_found.size


def _correlate_sizes(sd: float, sds: np.ndarray
                     ) -> tuple[int, np.ndarray, float]:
  """Finds the correlation r between sizes of the model that makes the standard
  deviations at the single sizes agree with that of the mean over them. If each
  two of k sizes have the correlation r,
    sd^2 = (1 - r) sum(sds^2) / k^2 + r (sum(sds) / k)^2.
  This is solved for r.

  Args:
    sd: the standard deviation of the mean over the sizes.
    sds: the standard deviation at each size.

  Returns:
    The number of sizes, their deviations, and r. If even r = 0 gives the mean a
    larger deviation than `sd`, r is 0 and the deviations are scaled down.
  """
  num_sizes = len(sds)
  variance_if_independent = np.sum(sds ** 2) / num_sizes ** 2
  variance_if_equal = (np.sum(sds) / num_sizes) ** 2
  # Sizes that are independent already make the mean vary this much or more. Or
  # both variances are equal, as for one size, and r does not matter.
  needs_no_correlation = (sd * sd <= variance_if_independent
                          or variance_if_equal <= variance_if_independent)
  if needs_no_correlation:
    scale = 1.0
    if variance_if_independent:
      scale = sd / np.sqrt(variance_if_independent)
    return num_sizes, sds * scale, 0.0
  # The mean of fully correlated sizes varies most: r is 1 at most.
  correlation = ((sd * sd - variance_if_independent)
                 / (variance_if_equal - variance_if_independent))
  return num_sizes, sds, min(correlation, 1.0)


def power_to_find(effect: float, *args, **kwargs) -> float:
  """Returns the share of simulated studies that find an effect; the further
  arguments are those of `simulate_least_effects`."""
  return float(np.mean(simulate_least_effects(*args, **kwargs) <= effect))


def smallest_effect(wanted: float, *args, **kwargs) -> float | None:
  """Returns the smallest effect that is found with a power of `wanted`; None
  where no effect is. The further arguments are those of
  `simulate_least_effects`."""
  least_effects = simulate_least_effects(*args, **kwargs)
  effect = float(np.quantile(least_effects, wanted, method='higher'))
  return effect if np.isfinite(effect) else None


def seeds_needed(effect: float, wanted: float, sd: float, sds, df: float,
                 level: float, **kwargs) -> int | None:
  """Returns the smallest number of seeds with which a test finds an effect with
  a given power, which is the probability to find it.

  Args:
    effect: the true difference that the test should find.
    wanted: the power.
    sd: the standard deviation of a seed's mean difference over the sizes of the
      model.
    sds: the standard deviation of a seed's difference at each size.
    df: the degrees of freedom with which these deviations are known.
    level: the level of the test.
    **kwargs: further arguments of `simulate_least_effects`.

  Returns:
    The number of seeds, or None if MAX_SEEDS are too few.
  """
  power_with_seeds = functools.partial(
      power_to_find, effect, sd=sd, sds=sds, df=df, level=level, **kwargs)

  # The power rises with the number of seeds, so bisection finds the first
  # number that gives the power that is wanted.
  numbers = range(MIN_SEEDS, MAX_SEEDS + 1)
  index = bisect.bisect_left(
      numbers, wanted, key=lambda seeds: power_with_seeds(seeds=seeds))
  if index == len(numbers):
    return None
  return numbers[index]
