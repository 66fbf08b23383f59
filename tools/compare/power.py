"""What a test would find, announced from a standard deviation that is itself
an estimate.

A study is drawn a few thousand times: the means of the sizes, the spread that
the t-test will see, the runs that diverge, and the true standard deviation,
given the estimate s with v degrees of freedom: sigma = s / sqrt(chi2_v / v).
Each drawn study needs some least effect to find it, and the share of them that
need no more than an effect is the power announced for it.

Taking s for sigma promises too much: of studies that take the number of seeds
that s asks for, more have too few than too many. With sigma drawn, the effect
announced for 80 % power is found by 80 % of the studies that announce it,
exactly so for each true sigma, since s / sigma has the distribution that was
drawn; so do studies that take `seeds_needed` seeds. What is announced for a
*fixed* effect and number of seeds is right among studies whose noise differs
("of those that announce 70 %, 70 % find it"), and on average some points too
low over studies of one noise (docs/studies.md, "Can it be believed?").
"""

from collections.abc import Sequence
import functools

import numpy as np

from tools.compare import statistics

DRAWS = 2048
MOST_SEEDS = 10_000
FEWEST = statistics.MIN_SEEDS  # that a test needs


@functools.lru_cache(maxsize=32)
def _uniform(dims: int) -> np.ndarray:
  """Returns [DRAWS, dims]: scrambled Sobol points, always the same."""
  from scipy.stats import qmc
  points = qmc.Sobol(dims, seed=0).random(DRAWS)
  return np.clip(points, 1e-9, 1 - 1e-9)


@functools.lru_cache(maxsize=32)
def _normal(dims: int) -> np.ndarray:
  from scipy.special import ndtri
  return ndtri(_uniform(dims))


@functools.lru_cache(maxsize=1024)
def _spread(df: float, column: int, dims: int) -> np.ndarray:
  """Returns sqrt(chi2_df / df) of one column of the points: dear, and so kept
  for the next time. Where df is large, by Wilson and Hilferty (1931), who err
  by less than 1e-4 there."""
  if df > 40:
    part = 2 / (9 * df)
    return (1 - part + _normal(dims)[:, column] * part ** 0.5) ** 1.5
  from scipy.special import gammaincinv
  return np.sqrt(2 * gammaincinv(df / 2, _uniform(dims)[:, column]) / df)


@functools.lru_cache(maxsize=256)
def _lost(runs: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns how many of the variant's runs and of the base's diverge."""
  rng = np.random.default_rng(0)
  return rng.binomial(runs, rate, DRAWS), rng.binomial(runs, rate, DRAWS)


def least_effects(sd: float, sds: Sequence[float], df: float, seeds: int,
                  level: float, rate: float = 0.0, limit: float = 1.0
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
    limit: the share above which a variant is unstable, and found nothing.
  """
  from scipy.special import stdtrit
  sizes, sds, shared = _sizes(sd, np.asarray(sds, float))
  if seeds < FEWEST:
    return np.full(DRAWS, np.inf)
  dims = sizes + 3
  n, void = np.array([seeds]), np.array([False])
  if rate:
    ours, base = _lost(seeds * sizes, rate)
    n = seeds - np.minimum(ours + base, seeds)
    void = (n < FEWEST) | (ours > limit * seeds * sizes)
    n = np.maximum(n, FEWEST)
  z = _normal(dims)
  means = (z[:, :sizes] * (1 - shared) ** 0.5 + z[:, -1:] * shared ** 0.5
           ) * sds / np.sqrt(n)[:, None]
  seen = np.empty(DRAWS)  # of the spread that the test is going to see
  for k in set(n.tolist()):
    at = n == k if len(n) > 1 else slice(None)
    seen[at] = _spread(float(k - 1), sizes, dims)[at]
  half = stdtrit(n - 1, 1 - level / 2) * seen * sd / np.sqrt(n)
  need = means.mean(1) + half
  if sizes > 1:
    need = np.maximum(need, means.max(1))
  need = need / _spread(round(df, 1), sizes + 1, dims)
  return np.where(void, np.inf, need)


def _sizes(sd: float, sds: np.ndarray) -> tuple[int, np.ndarray, float]:
  """Returns the number of sizes, their deviations, and the correlation of
  each two, with which their mean has the deviation `sd`."""
  sizes = len(sds)
  apart = np.sum(sds ** 2) / sizes ** 2
  together = (np.sum(sds) / sizes) ** 2
  if sd * sd <= apart or together <= apart:
    return sizes, sds * (sd / np.sqrt(apart) if apart else 1.0), 0.0
  return sizes, sds, min((sd * sd - apart) / (together - apart), 1.0)


def power(effect: float, *args, **kwargs) -> float:
  """Returns the share of drawn studies that find `effect`; the other arguments
  are those of `least_effects`."""
  return float(np.mean(least_effects(*args, **kwargs) <= effect))


def smallest_effect(wanted: float, *args, **kwargs) -> float | None:
  """Returns the effect that a share `wanted` of drawn studies finds."""
  found = float(np.quantile(least_effects(*args, **kwargs), wanted,
                            method='higher'))
  return found if np.isfinite(found) else None


def seeds_needed(effect: float, wanted: float, sd: float, sds, df: float,
                 level: float, **kwargs) -> int | None:
  """Returns the least number of seeds with the power `wanted`; None where
  MOST_SEEDS are too few."""
  enough = lambda seeds: power(effect, sd, sds, df, seeds, level,
                               **kwargs) >= wanted
  # Near where a test of a known deviation has its power of 80 %.
  guess = 8 * (sd / effect) ** 2
  low, high = FEWEST - 1, int(min(max(guess, FEWEST), MOST_SEEDS))
  while not enough(high):
    if high == MOST_SEEDS:
      return None
    low, high = high, min(high + high // 2 + 1, MOST_SEEDS)
  while high - low > 1:
    middle = max((low + high) // 2, 2 * high // 3)
    low, high = (low, middle) if enough(middle) else (middle, high)
  return high
