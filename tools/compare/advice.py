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
BOOTSTRAP_DRAWS = 1000  # enough for the second digit of a quantile
SHARE_OF_LAST_EVALUATIONS = 0.25  # of a run, which are averaged
NOTE_ON_PAIRING_WITHOUT_GAIN = 'It is not shown that pairing gains anything. '
# The other ways, of which no figure of the noise phase tells:
NOTE_ON_WHAT_IS_NOT_MEASURED = (
    'A larger batch, a lower learning rate and more text to evaluate '
    'on were not measured.')


class Factor(NamedTuple):
  """How many times lower a standard deviation is by a measure against noise, or
  the share of a variance that comes from a source, with a 95 % interval.

  Attributes:
    name: the measure, or the source, in words.
    factor, low, high: the standard deviation without the measure over that with
      it, or the share.
  """
  name: str
  factor: float
  low: float
  high: float


def gain_of_pairing(base: Sequence[float], again: Sequence[float]) -> Factor:
  """Returns how many times less the differences of pairs (runs of one seed)
  vary than those of runs of different seeds would, by standard deviations.

  With equal spreads the sums and the differences of the pairs are independent,
  and the quotient of their variances, over the true one, has the F distribution
  with n - 1 and n - 1 degrees of freedom, which gives the interval.

  Args:
    base, again: the figure of each of n seeds, of the base and of the base with
      other first parameters.
  """
  from scipy.special import fdtri
  variance_of_sums = float(np.var(np.add(base, again), ddof=1))
  variance_of_differences = float(np.var(np.subtract(base, again), ddof=1))
  quotient = variance_of_sums / variance_of_differences
  df = len(base) - 1
  upper_quantile = float(fdtri(df, df, 0.975))

  def factor(quotient: float) -> float:
    """Returns the factor of a quotient of both variances. Their sum is twice
    the variance of the difference of two unpaired runs, so the factor is
    sqrt((sums + differences) / (2 differences))."""
    return math.sqrt((1 + quotient) / 2)

  # The lower quantile of F with equal degrees of freedom is 1 / the upper one.
  return Factor(
      name='pairing, which is in it already', factor=factor(quotient),
      low=factor(quotient * (1 / upper_quantile)),
      high=factor(quotient * upper_quantile))


def gain_over_same_pairs(name: str, before: Sequence[float],
                         after: Sequence[float]) -> Factor:
  """Returns how many times less one figure of the pairs varies than another one
  of the same pairs, by standard deviations.

  The interval is that of Pitman (1939) and Morgan (1939) for the quotient of
  the variances of two correlated variables. With the correlation r and the
  quantile t of Student's distribution with n - 2 degrees of freedom, it reaches
  from quotient / (k + sqrt(k^2 - 1)) to quotient * (k + sqrt(k^2 - 1)), where
  k = 1 + 2 (1 - r^2) t^2 / (n - 2).

  Args:
    name: what lowers the noise, in words.
    before, after: both figures of each of n pairs.
  """
  from scipy.special import stdtrit
  n = len(before)
  quotient = float(np.var(before) / np.var(after))
  r = float(np.corrcoef(before, after)[0, 1])
  t = float(stdtrit(n - 2, 0.975))
  k = 1 + 2 * (1 - r * r) * t ** 2 / (n - 2)
  reach = k + math.sqrt(k * k - 1)
  low, high = quotient * (1 / reach), quotient * reach
  return Factor(name=name, factor=math.sqrt(quotient), low=math.sqrt(low),
                high=math.sqrt(high))


def variance_components(base: np.ndarray, again: np.ndarray) -> np.ndarray:
  """Returns the variances of a run that come from its first parameters, from
  the order of its data, and from the rest, [..., 3], by the method of moments.

  Half of the mean squared difference of two runs is the sum of the variances in
  which they differ. With s, o and r for first parameters, order and rest, pairs
  of one order give s + r, pairs of the same first parameters give o + r, and
  all other pairs give s + o + r.

  Args:
    base: [..., n], of n seeds, each with first parameters and an order of data
      of its own.
    again: [..., n], with the same orders, and the first parameters of the next
      seed of `base`.
  """
  n = base.shape[-1]

  def half_mean_square(differences: np.ndarray) -> np.ndarray:
    """Returns half of the mean square over the last axis."""
    return np.mean(differences ** 2, -1) / 2

  # Pairs that share the order of the data, or the first parameters.
  same_order = half_mean_square(base - again)
  same_parameters = half_mean_square(again[..., :-1] - base[..., 1:])

  # Pairs that share neither: all pairs of the 2n runs without those.
  runs = np.concatenate([base, again], -1)
  sum_of_all_pairs = 2 * n * n * np.var(runs, -1)
  num_other_pairs = n * (2 * n - 1) - (2 * n - 1)
  share_neither = (
      sum_of_all_pairs - n * same_order - (n - 1) * same_parameters
      ) / num_other_pairs
  return np.stack([share_neither - same_parameters, share_neither - same_order,
                   same_parameters + same_order - share_neither], -1)


def shares_of_variance(base: np.ndarray, again: np.ndarray) -> list[Factor]:
  """Returns the shares of the variance of a run that come from its first
  parameters, from the order of its data, and from the rest.

  The intervals are by a parametric bootstrap: runs are drawn whose noise is
  normal and has the measured components. An interval is as wide as the
  quantiles of the shares of these, and as the quantiles reflected about the
  share (the basic bootstrap), whichever reaches further.

  Args:
    base, again: [sizes, seeds], as in `variance_components`. The components are
      means over the sizes.
  """
  def shares(base: np.ndarray, again: np.ndarray) -> np.ndarray:
    """Returns the shares of [..., sizes, seeds], [..., 3]."""
    components = np.maximum(variance_components(base, again).mean(-2), 0)
    return components / np.maximum(components.sum(-1, keepdims=True), 1e-300)

  measured_shares = shares(base, again)

  # Runs whose noise has the components that were measured.
  sizes, n = base.shape
  rng, scale = np.random.default_rng(0), np.sqrt(measured_shares)
  parameters = scale[0] * rng.normal(size=(BOOTSTRAP_DRAWS, sizes, n + 1))
  # The order of the data is the same at all sizes.
  order = scale[1] * rng.normal(size=(BOOTSTRAP_DRAWS, 1, n))
  rest = scale[2] * rng.normal(size=(2, BOOTSTRAP_DRAWS, sizes, n))
  drawn_shares = shares(parameters[..., :-1] + order + rest[0],
                        parameters[..., 1:] + order + rest[1])

  # The wider of both intervals.
  low, high = np.quantile(drawn_shares, [0.025, 0.975], axis=0)
  lows = np.clip(np.minimum(low, 2 * measured_shares - high), 0, 1)
  highs = np.clip(np.maximum(high, 2 * measured_shares - low), 0, 1)
  factors = []
  for i, name in enumerate(('the start', 'the order of the data', 'the rest')):
    factors.append(Factor(
        name=name, factor=float(measured_shares[i]), low=float(lows[i]),
        high=float(highs[i])))
  return factors


class _NoiseRuns(NamedTuple):
  """The runs of the noise phase on text.

  Attributes:
    outcomes: the outcomes by (variant, size, seed).
    variants: the base, and the base with other first parameters.
    seeds: the seeds of the phase.
    complete_seeds: the seeds of which all runs are there and none diverged.
  """
  outcomes: dict[tuple[str, str, int], Outcome]
  variants: list[str]
  seeds: list[int]
  complete_seeds: list[int]


def _select_noise_runs(plan: Plan, outcomes: Iterable[Outcome]) -> _NoiseRuns:
  """Returns the runs of the noise phase on text."""
  outcome_of = {(x.variant, x.size, x.seed): x for x in outcomes
                if x.phase == 'noise' and x.workload == TEXT}
  seeds = sorted({seed for _, _, seed in outcome_of})
  variants = [plan.base, SECOND_BASE]
  complete_seeds = []
  for seed in seeds:
    outcomes_of_seed = []
    for variant in variants:
      for size in plan.sizes:
        outcomes_of_seed.append(outcome_of.get((variant, size, seed)))
    if all(x is not None and not x.diverged for x in outcomes_of_seed):
      complete_seeds.append(seed)
  return _NoiseRuns(outcomes=outcome_of, variants=variants, seeds=seeds,
                    complete_seeds=complete_seeds)


def measure_gains(plan: Plan, outcomes: Iterable[Outcome]) -> list[Factor]:
  """Returns by what factor pairing lowers the standard deviation of a
  difference, and longer runs and means of evaluations would lower it.

  Args:
    plan: the plan of the study.
    outcomes: the outcomes of its runs.

  Returns:
    A factor for each, as far as the runs of the noise phase tell it.
  """
  noise_runs = _select_noise_runs(plan, outcomes)
  if len(noise_runs.complete_seeds) < MIN_PAIRS:
    return []

  def means_over_sizes(figure: Callable[[Outcome], float]) -> list[np.ndarray]:
    """Returns the means of a figure over the sizes, [seeds], of the base and of
    the base again."""
    means_of_variants = []
    for variant in noise_runs.variants:
      means = []
      for seed in noise_runs.complete_seeds:
        at_sizes = [figure(noise_runs.outcomes[variant, size, seed])
                    for size in plan.sizes]
        means.append(np.mean(at_sizes))
      means_of_variants.append(np.array(means))
    return means_of_variants

  # The gain by pairing.
  base, again = means_over_sizes(lambda run: run.values[plan.primary.name])
  if np.ptp(np.subtract(base, again)) == 0:
    return []
  factors = [gain_of_pairing(base, again)]

  # The gain by longer runs, and by means, where the curves of all runs tell it.
  for (_, _, seed), run in noise_runs.outcomes.items():
    is_used = seed in noise_runs.complete_seeds
    if is_used and len(run.curve.get('loss', ())) <= 3:
      return factors
  half_way = np.subtract(*means_over_sizes(_loss_half_way))
  last = np.subtract(*means_over_sizes(_last_loss))
  late = np.subtract(*means_over_sizes(_late_loss))
  factors.append(gain_over_same_pairs(
      name='twice as many steps (from half-way to the end of these runs)',
      before=half_way, after=last))
  if not np.array_equal(last, late):  # more than one evaluation
    factors.append(gain_over_same_pairs(
        name='the mean loss over the last quarter of a run (averaged '
        'parameters, optim.ema, do no worse)', before=last, after=late))
  return factors


def _progress_of_evaluations(run: Outcome) -> np.ndarray:
  """Returns after which share of a run each evaluation was: 1 is the end."""
  steps = np.array(run.curve['step'])
  return steps / steps[-1]


def _loss_half_way(run: Outcome) -> float:
  """Returns the loss of the evaluation that is nearest to the middle of a run.
  """
  distance = np.abs(_progress_of_evaluations(run) - 0.5)
  return run.curve['loss'][int(np.argmin(distance))]


def _last_loss(run: Outcome) -> float:
  """Returns the loss of the last evaluation of a run."""
  return run.curve['loss'][-1]


def _late_loss(run: Outcome) -> float:
  """Returns the mean loss of the last quarter of a run."""
  losses = np.array(run.curve['loss'])
  is_late = _progress_of_evaluations(run) > 1 - SHARE_OF_LAST_EVALUATIONS
  return np.mean(losses[is_late])


def measure_shares_of_variance(plan: Plan, outcomes: Iterable[Outcome]
                               ) -> list[Factor]:
  """Returns the shares of the variance of a run by their sources, as the noise
  phase has measured them; nothing where a run diverged, or where first
  parameters are not crossed with orders of data."""
  noise_runs = _select_noise_runs(plan, outcomes)
  are_crossed = all(
      run.changes.get('init_seed', INIT_SEED_OF_NEXT_SEED)
      == INIT_SEED_OF_NEXT_SEED for run in noise_runs.outcomes.values())
  needed_seeds = max(len(noise_runs.seeds), MIN_PAIRS)
  if len(noise_runs.complete_seeds) < needed_seeds or not are_crossed:
    return []

  # The primary measure of the base and of the base again, [sizes, seeds].
  tables = []
  for variant in noise_runs.variants:
    rows = []
    for size in plan.sizes:
      rows.append([
          noise_runs.outcomes[variant, size, seed].values[plan.primary.name]
          for seed in noise_runs.seeds])
    tables.append(np.array(rows))
  if np.ptp(tables) == 0:
    return []
  base, again = tables
  return shares_of_variance(base, again)


def describe_what_lowers_noise(plan: Plan, outcomes: Iterable[Outcome]) -> str:
  """Returns the sentences of a report about what lowers the noise of a study,
  and where its noise comes from; '' where nothing was measured.

  Args:
    plan: the plan of the study.
    outcomes: the outcomes of its runs.
  """
  factors = measure_gains(plan, outcomes)
  if not factors:
    return ''

  # The factors, of which the first is that of pairing.
  gains = []
  for gain in factors:
    gains.append(f'{gain.name}: {gain.factor:.2f} '
                 f'[{gain.low:.2f}, {gain.high:.2f}]')
  note_on_pairing = ''
  if factors[0].low <= 1:
    note_on_pairing = NOTE_ON_PAIRING_WITHOUT_GAIN
  sentence = (
      'What divides the standard deviation of a difference, by how much, '
      f'with 95 % intervals: {"; ".join(gains)}. A factor f spares f² times '
      f'the seeds. {note_on_pairing}{NOTE_ON_WHAT_IS_NOT_MEASURED}')

  # The shares of the variance, where the noise phase tells them.
  shares = []
  for share in measure_shares_of_variance(plan, outcomes):
    shares.append(f'{share.name} ({share.factor:.0%} '
                  f'[{share.low:.0%}, {share.high:.0%}])')
  if shares:
    sentence += f' The variance of a run comes from {", ".join(shares)}.'
  return sentence
