"""What lowers the noise of a study, as its first phase has measured it.

Each factor is one of standard deviations. The figures are a seed's means over
the sizes, since the confirmation tests these.
"""

from collections.abc import Iterable, Sequence
import math
from typing import NamedTuple

import numpy as np

from tools.compare.plan import AGAIN, TEXT, Outcome, Plan
from training.runs import AS_NEXT

MIN_PAIRS = 3  # with two, every correlation is 1 or -1
DRAWS = 1000  # of a bootstrap
LAST = 0.25  # the share of a run whose evaluations are averaged
NO_GAIN = 'It is not shown that pairing gains anything. '
# What no figure of the noise phase tells of:
UNMEASURED = ('A larger batch, a lower learning rate and more text to evaluate '
              'on were not measured.')


class Factor(NamedTuple):
  """By how much a standard deviation is lower, and the 95 % interval of that.

  Attributes:
    what: lowers it.
  """
  what: str
  factor: float
  low: float
  high: float


def pairing(base: Sequence[float], again: Sequence[float]) -> Factor:
  """Returns how much less the differences of pairs vary than those of runs of
  different seeds would.

  With equal spreads the sums and differences of the pairs are independent, and
  the quotient of their variances, over the true one, has the F distribution.
  """
  from scipy.special import fdtri
  more, less = (float(np.var(x, ddof=1)) for x in (
      np.add(base, again), np.subtract(base, again)))
  df = len(base) - 1
  most = float(fdtri(df, df, 0.975))
  factor, low, high = (math.sqrt((1 + more / less * x) / 2)
                       for x in (1.0, 1 / most, most))
  return Factor('pairing, which is in it already', factor, low, high)


def lowered(what: str, before: Sequence[float], after: Sequence[float]
            ) -> Factor:
  """Returns how much less `after` varies than `before` of the same pairs; its
  interval is that of Pitman and Morgan (1939), for two that hang together."""
  from scipy.special import stdtrit
  n = len(before)
  quotient = float(np.var(before) / np.var(after))
  r = float(np.corrcoef(before, after)[0, 1])
  k = 1 + 2 * (1 - r * r) * float(stdtrit(n - 2, 0.975)) ** 2 / (n - 2)
  apart = k + math.sqrt(k * k - 1)
  return Factor(what, *(math.sqrt(quotient * x) for x in (
      1.0, 1 / apart, apart)))


def components(base: np.ndarray, again: np.ndarray) -> np.ndarray:
  """Returns the variances of a run that come from its start, from the order of
  its data, and from the rest, [..., 3], by the method of moments: half of the
  mean squared difference of two runs is the sum of those in which they differ.

  Args:
    base: [..., seeds], each with a start and an order of its own.
    again: likewise, with the same order and the start of the next of `base`.
  """
  n = base.shape[-1]
  half = lambda apart: np.mean(apart ** 2, -1) / 2
  same_order, same_start = half(base - again), half(
      again[..., :-1] - base[..., 1:])
  every = 2 * n * n * np.var(np.concatenate([base, again], -1), -1)
  both = (every - n * same_order - (n - 1) * same_start) / (
      n * (2 * n - 1) - (2 * n - 1))
  return np.stack([both - same_start, both - same_order,
                   same_start + same_order - both], -1)


def split(base: np.ndarray, again: np.ndarray) -> list[Factor]:
  """Returns the shares of the variance of a run: of its start, of the order of
  its data, and of the rest, with intervals by a bootstrap of normal noise, each
  as wide as its quantiles and as these reflected.

  Args:
    base, again: [sizes, seeds], as in `components`. The components are means
      over the sizes.
  """
  def shares(*runs: np.ndarray) -> np.ndarray:
    each = np.maximum(components(*runs).mean(-2), 0)
    return each / np.maximum(each.sum(-1, keepdims=True), 1e-300)

  share, (sizes, n) = shares(base, again), base.shape
  rng, scale = np.random.default_rng(0), np.sqrt(share)
  start = scale[0] * rng.normal(size=(DRAWS, sizes, n + 1))
  order = scale[1] * rng.normal(size=(DRAWS, 1, n))  # the same at all sizes
  rest = scale[2] * rng.normal(size=(2, DRAWS, sizes, n))
  low, high = np.quantile(shares(
      start[..., :-1] + order + rest[0], start[..., 1:] + order + rest[1]),
                          [0.025, 0.975], axis=0)
  return [Factor(*row) for row in zip(
      ('the start', 'the order of the data', 'the rest'), share.tolist(),
      np.clip(np.minimum(low, 2 * share - high), 0, 1).tolist(),
      np.clip(np.maximum(high, 2 * share - low), 0, 1).tolist())]


def measured(plan: Plan, outcomes: Iterable[Outcome]) -> list[Factor]:
  """Returns what was gained by pairing, and what longer runs and means of
  evaluations would gain, as far as the runs of the noise phase tell it.

  Args:
    plan: of the study.
    outcomes: of its runs.
  """
  runs, names, _, whole = _whole(plan, outcomes)
  if len(whole) < MIN_PAIRS:
    return []

  def of(figure) -> list[np.ndarray]:
    """The figure's means over sizes, [seeds], of the base and again."""
    return [np.array([np.mean([figure(runs[name, size, seed])
                               for size in plan.sizes]) for seed in whole])
            for name in names]

  ends = of(lambda x: x.values[plan.primary.name])
  if np.ptp(np.subtract(*ends)) == 0:
    return []
  factors = [pairing(*ends)]
  if all(len(runs[name, size, seed].curve.get('loss', ())) > 3
         for name in names for size in plan.sizes for seed in whole):
    half, last, late = (np.subtract(*of(figure)) for figure in (
        lambda x: x.curve['loss'][int(np.argmin(np.abs(_share(x) - 0.5)))],
        lambda x: x.curve['loss'][-1],
        lambda x: np.mean(np.array(x.curve['loss'])[_share(x) > 1 - LAST])))
    factors.append(lowered(
        'twice as many steps (from half-way to the end of these runs)', half,
        last))
    if not np.array_equal(last, late):  # more than one evaluation
      factors.append(lowered(
          'the mean loss over the last quarter of a run (averaged parameters, '
          'optim.ema, do no worse)', last, late))
  return factors


def measured_split(plan: Plan, outcomes: Iterable[Outcome]) -> list[Factor]:
  """Returns `split` of the noise phase; nothing where a run diverged, or where
  its starts are not crossed with its orders of data."""
  runs, names, seeds, whole = _whole(plan, outcomes)
  if len(whole) < max(len(seeds), MIN_PAIRS) or any(
      x.changes.get('init_seed', AS_NEXT) != AS_NEXT for x in runs.values()):
    return []
  values = [np.array([[runs[name, size, seed].values[plan.primary.name]
                       for seed in seeds] for size in plan.sizes])
            for name in names]
  return split(*values) if np.ptp(values) else []


def _whole(plan: Plan, outcomes: Iterable[Outcome]):
  """Returns the runs of the noise phase on text by (variant, size, seed), their
  variants, their seeds, and the seeds of which no run diverged."""
  runs = {(x.variant, x.size, x.seed): x for x in outcomes
          if x.phase == 'noise' and x.workload == TEXT}
  seeds, names = sorted({seed for *_, seed in runs}), [plan.base, AGAIN]
  return runs, names, seeds, [seed for seed in seeds if all(
      (x := runs.get((name, size, seed))) and not x.diverged
      for name in names for size in plan.sizes)]


def _share(outcome: Outcome) -> np.ndarray:
  """Where in its run each evaluation was: 1 is the end."""
  return np.array(outcome.curve['step']) / outcome.curve['step'][-1]


def sentence(plan: Plan, outcomes: Iterable[Outcome]) -> str:
  """Returns what was measured, for a reader; '' where nothing was."""
  factors = measured(plan, outcomes)
  if not factors:
    return ''
  each = '; '.join(f'{x.what}: {x.factor:.2f} [{x.low:.2f}, {x.high:.2f}]'
                   for x in factors)
  parts = ', '.join(f'{x.what} ({x.factor:.0%} [{x.low:.0%}, {x.high:.0%}])'
                    for x in measured_split(plan, outcomes))
  return ('What divides the standard deviation of a difference, by how much, '
          f'with 95 % intervals: {each}. A factor f spares f² times the seeds. '
          f'{"" if factors[0].low > 1 else NO_GAIN}{UNMEASURED}'
          + f' The variance of a run comes from {parts}.' * bool(parts))
