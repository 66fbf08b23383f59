"""What lowers the noise of a study, as its first phase has measured it.

Each factor is one of standard deviations. The figures are a seed's means over
the sizes, since the confirmation tests these.
"""

from collections.abc import Iterable, Sequence
import math
from typing import NamedTuple

import numpy as np

from tools.compare.plan import AGAIN, TEXT, Outcome, Plan

MIN_PAIRS = 3  # with two, every correlation is 1 or -1
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


def measured(plan: Plan, outcomes: Iterable[Outcome]) -> list[Factor]:
  """Returns what was gained by pairing, and what longer runs and means of
  evaluations would gain, as far as the runs of the noise phase tell it.

  Args:
    plan: of the study.
    outcomes: of its runs.
  """
  runs = {(x.variant, x.size, x.seed): x for x in outcomes
          if x.phase == 'noise' and x.workload == TEXT}
  seeds = sorted({seed for *_, seed in runs})
  names = [plan.base, AGAIN]
  whole = [seed for seed in seeds if all(
      (x := runs.get((name, size, seed))) and not x.diverged
      for name in names for size in plan.sizes)]
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
  return ('What divides the standard deviation of a difference, by how much, '
          f'with 95 % intervals: {each}. A factor f spares f² times the seeds. '
          f'{"" if factors[0].low > 1 else NO_GAIN}{UNMEASURED}')
