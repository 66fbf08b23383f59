"""advice: what lowers the noise of a study, as its first phase has measured it.

Each factor is a quotient of standard deviations. The figures are a seed's means
over the sizes, since the confirmation tests these.
"""

from collections.abc import Callable, Iterable, Sequence
import math
from typing import NamedTuple

import numpy as np

from tools.compare.plan import SECOND_BASE, TEXT, Outcome, Plan
from training.runs import INIT_SEED_OF_NEXT_SEED

MIN_PAIRS = 3  # with two, every correlation is 1 or -1
BOOTSTRAP_DRAWS = 1000  # how many a bootstrap takes
SHARE_OF_LAST_EVALUATIONS = 0.25  # of a run, which are averaged
NOTE_ON_PAIRING_WITHOUT_GAIN = 'It is not shown that pairing gains anything. '
# The other ways, of which no figure of the noise phase tells:
NOTE_ON_WHAT_IS_NOT_MEASURED = (
    'A larger batch, a lower learning rate and more text to evaluate '
    'on were not measured.')


class Factor(NamedTuple):
  """By how much a standard deviation is lower, and the 95 % interval of that.

  Attributes:
    what: the thing that lowers it.
    factor, low, high: the standard deviation without it over that with it.
  """
  what: str
  factor: float
  low: float
  high: float


def gain_of_pairing(base: Sequence[float], again: Sequence[float]) -> Factor:
  """Returns how much less the differences of pairs vary than those of runs of
  different seeds would.

  With equal spreads the sums and differences of the pairs are independent, and
  the quotient of their variances, over the true one, has the F distribution.
  """
  from scipy.special import fdtri
  variance_of_sums = float(np.var(np.add(base, again), ddof=1))
  variance_of_differences = float(np.var(np.subtract(base, again), ddof=1))
  quotient = variance_of_sums / variance_of_differences
  df = len(base) - 1
  most = float(fdtri(df, df, 0.975))

  def factor(quotient: float) -> float:
    """Returns the deviation of differences of runs of different seeds over that
    of pairs. Sums and differences together have the variance of two runs."""
    return math.sqrt((1 + quotient) / 2)

  return Factor(
      what='pairing, which is in it already', factor=factor(quotient),
      low=factor(quotient * (1 / most)), high=factor(quotient * most))


def gain_over_same_pairs(
    what: str, before: Sequence[float], after: Sequence[float]
    ) -> Factor:
  """Returns how much less `after` varies than `before` of the same pairs; its
  interval is that of Pitman and Morgan (1939), for two that hang together."""
  from scipy.special import stdtrit
  n = len(before)
  quotient = float(np.var(before) / np.var(after))
  r = float(np.corrcoef(before, after)[0, 1])
  t = float(stdtrit(n - 2, 0.975))
  # The interval of the quotient reaches from 1 / apart to apart times it.
  k = 1 + 2 * (1 - r * r) * t ** 2 / (n - 2)
  apart = k + math.sqrt(k * k - 1)
  low, high = quotient * (1 / apart), quotient * apart
  return Factor(what=what, factor=math.sqrt(quotient), low=math.sqrt(low),
                high=math.sqrt(high))


def variance_components(base: np.ndarray, again: np.ndarray) -> np.ndarray:
  """Returns the variances of a run that come from its start, from the order of
  its data, and from the rest, [..., 3], by the method of moments: half of the
  mean squared difference of two runs is the sum of those in which they differ.

  Args:
    base: [..., seeds], each with a start and an order of its own.
    again: likewise, with the same order and the start of the next of `base`.
  """
  n = base.shape[-1]

  def half_square(apart: np.ndarray) -> np.ndarray:
    return np.mean(apart ** 2, -1) / 2

  # Pairs that share the order of the data, or the start.
  same_order = half_square(base - again)
  same_start = half_square(again[..., :-1] - base[..., 1:])
  # Pairs that share neither: all pairs without those.
  runs = np.concatenate([base, again], -1)
  every_pair = 2 * n * n * np.var(runs, -1)
  pairs = n * (2 * n - 1) - (2 * n - 1)
  both = (every_pair - n * same_order - (n - 1) * same_start) / pairs
  return np.stack([both - same_start, both - same_order,
                   same_start + same_order - both], -1)


def shares_of_variance(base: np.ndarray, again: np.ndarray) -> list[Factor]:
  """Returns the shares of the variance of a run: of its start, of the order of
  its data, and of the rest, with intervals by a bootstrap of normal noise, each
  as wide as its quantiles and as these reflected.

  Args:
    base, again: [sizes, seeds], as in `components`. The components are means
      over the sizes.
  """
  def shares(base: np.ndarray, again: np.ndarray) -> np.ndarray:
    """Returns the shares of [..., sizes, seeds], [..., 3]."""
    each = np.maximum(variance_components(base, again).mean(-2), 0)
    return each / np.maximum(each.sum(-1, keepdims=True), 1e-300)

  share = shares(base, again)
  sizes, n = base.shape
  # Runs whose noise has the components that were measured.
  rng, scale = np.random.default_rng(0), np.sqrt(share)
  start = scale[0] * rng.normal(size=(BOOTSTRAP_DRAWS, sizes, n + 1))
  order = scale[
      1] * rng.normal(size=(BOOTSTRAP_DRAWS, 1, n))  # the same at all sizes
  rest = scale[2] * rng.normal(size=(2, BOOTSTRAP_DRAWS, sizes, n))
  drawn = shares(start[..., :-1] + order + rest[0],
                 start[..., 1:] + order + rest[1])
  low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
  lows = np.clip(np.minimum(low, 2 * share - high), 0, 1)
  highs = np.clip(np.maximum(high, 2 * share - low), 0, 1)
  factors = []
  for i, what in enumerate(('the start', 'the order of the data', 'the rest')):
    factors.append(Factor(what=what, factor=float(share[i]), low=float(lows[i]),
                          high=float(highs[i])))
  return factors


class _NoiseRuns(NamedTuple):
  """The runs of the noise phase on text.

  Attributes:
    runs: the outcomes by (variant, size, seed).
    variants: the base, and the base again.
    seeds: the seeds of the phase.
    whole: the seeds of which no run diverged.
  """
  runs: dict[tuple[str, str, int], Outcome]
  variants: list[str]
  seeds: list[int]
  whole: list[int]


def _noise_runs(plan: Plan, outcomes: Iterable[Outcome]) -> _NoiseRuns:
  """Returns the runs of the noise phase on text."""
  runs = {(x.variant, x.size, x.seed): x for x in outcomes
          if x.phase == 'noise' and x.workload == TEXT}
  seeds = sorted({seed for _, _, seed in runs})
  variants = [plan.base, SECOND_BASE]
  whole = []
  for seed in seeds:
    of_seed = []
    for variant in variants:
      for size in plan.sizes:
        of_seed.append(runs.get((variant, size, seed)))
    if all(run is not None and not run.diverged for run in of_seed):
      whole.append(seed)
  return _NoiseRuns(runs=runs, variants=variants, seeds=seeds, whole=whole)


def measure_gains(plan: Plan, outcomes: Iterable[Outcome]) -> list[Factor]:
  """Returns what was gained by pairing, and what longer runs and means of
  evaluations would gain, as far as the runs of the noise phase tell it.

  Args:
    plan: the plan of the study.
    outcomes: the outcomes of its runs.
  """
  runs, variants, _, whole = _noise_runs(plan, outcomes)
  if len(whole) < MIN_PAIRS:
    return []

  def means(figure: Callable[[Outcome], float]) -> list[np.ndarray]:
    """Returns the figure's means over sizes, [seeds], of the base and again."""
    rows = []
    for variant in variants:
      row = []
      for seed in whole:
        at_sizes = [figure(runs[variant, size, seed]) for size in plan.sizes]
        row.append(np.mean(at_sizes))
      rows.append(np.array(row))
    return rows

  # The gain by pairing.
  base, again = means(lambda run: run.values[plan.primary.name])
  if np.ptp(np.subtract(base, again)) == 0:
    return []
  factors = [gain_of_pairing(base, again)]

  # The gain by longer runs, and by means, where the curves of all runs tell it.
  for (_, _, seed), run in runs.items():
    if seed in whole and len(run.curve.get('loss', ())) <= 3:
      return factors
  half_way = np.subtract(*means(_loss_half_way))
  last = np.subtract(*means(_last_loss))
  late = np.subtract(*means(_late_loss))
  factors.append(gain_over_same_pairs(
      what='twice as many steps (from half-way to the end of these runs)',
      before=half_way, after=last))
  if not np.array_equal(last, late):  # more than one evaluation
    factors.append(gain_over_same_pairs(
        what='the mean loss over the last quarter of a run (averaged '
        'parameters, optim.ema, do no worse)', before=last, after=late))
  return factors


def _shares(run: Outcome) -> np.ndarray:
  """Returns where in its run each evaluation was: 1 is the end."""
  steps = np.array(run.curve['step'])
  return steps / steps[-1]


def _loss_half_way(run: Outcome) -> float:
  nearest = int(np.argmin(np.abs(_shares(run) - 0.5)))
  return run.curve['loss'][nearest]


def _last_loss(run: Outcome) -> float:
  return run.curve['loss'][-1]


def _late_loss(run: Outcome) -> float:
  """Returns the mean loss of the last quarter of a run."""
  losses = np.array(run.curve['loss'])
  return np.mean(losses[_shares(run) > 1 - SHARE_OF_LAST_EVALUATIONS])


def measure_shares_of_variance(
    plan: Plan, outcomes: Iterable[Outcome]) -> list[Factor]:
  """Returns `split` of the noise phase; nothing where a run diverged, or where
  its starts are not crossed with its orders of data."""
  runs, variants, seeds, whole = _noise_runs(plan, outcomes)
  init_seeds = {run.changes.get('init_seed', INIT_SEED_OF_NEXT_SEED)
                for run in runs.values()}
  are_crossed = init_seeds <= {INIT_SEED_OF_NEXT_SEED}
  if len(whole) < max(len(seeds), MIN_PAIRS) or not are_crossed:
    return []
  tables = []  # of the base and again, [sizes, seeds]
  for variant in variants:
    rows = []
    for size in plan.sizes:
      rows.append([runs[variant, size, seed].values[plan.primary.name]
                   for seed in seeds])
    tables.append(np.array(rows))
  if np.ptp(tables) == 0:
    return []
  base, again = tables
  return shares_of_variance(base, again)


def describe_what_lowers_noise(plan: Plan, outcomes: Iterable[Outcome]) -> str:
  """Returns what was measured, for a reader; '' where nothing was."""
  factors = measure_gains(plan, outcomes)
  if not factors:
    return ''
  each = []
  for x in factors:
    each.append(f'{x.what}: {x.factor:.2f} [{x.low:.2f}, {x.high:.2f}]')
  no_gain = ''
  if factors[0].low <= 1:
    no_gain = NOTE_ON_PAIRING_WITHOUT_GAIN
  sentence = (
      'What divides the standard deviation of a difference, by how much, '
      f'with 95 % intervals: {"; ".join(each)}. A factor f spares f² times the '
      f'seeds. {no_gain}{NOTE_ON_WHAT_IS_NOT_MEASURED}')

  # The shares of the variance, where the noise phase tells them.
  parts = []
  for x in measure_shares_of_variance(plan, outcomes):
    parts.append(f'{x.what} ({x.factor:.0%} [{x.low:.0%}, {x.high:.0%}])')
  if parts:
    sentence += f' The variance of a run comes from {", ".join(parts)}.'
  return sentence
