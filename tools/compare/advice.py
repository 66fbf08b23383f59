"""advice: what lowers the noise of a study, as its first phase has measured it.

Each factor is a quotient of standard deviations. The figures are a seed's means
over the sizes, since the confirmation tests these.
"""

from collections.abc import Callable, Iterable, Sequence
import functools
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
  """Returns how much pairing by seed lowers the noise of a comparison: the
  standard deviation of the difference of two runs of different seeds, divided
  by that of two runs of one seed, which see the same data.

  If both runs of a pair vary equally and their noise is normal, the sums and
  the differences of the pairs are independent. The quotient of their variances,
  over the true quotient, then has the F distribution with n - 1 and n - 1
  degrees of freedom, which gives the 95 % interval.

  Args:
    base: the result of the base for each of n seeds.
    again: the result of the base with other initial parameters, for the same
      seeds. It must not differ from `base` by the same amount at every seed.

  Returns:
    The quotient of the standard deviations, which is above 1 if pairing lowers
    the noise, with its interval.
  """
  from scipy.special import fdtri
  variance_of_sums = float(np.var(np.add(base, again), ddof=1))
  variance_of_differences = float(np.var(np.subtract(base, again), ddof=1))
  quotient = variance_of_sums / variance_of_differences
  degrees_of_freedom = len(base) - 1
  upper_quantile = float(fdtri(degrees_of_freedom, degrees_of_freedom, 0.975))

  def factor(quotient: float) -> float:
    """Returns the gain for a quotient of both variances. Their sum is twice the
    variance of the difference of two unpaired runs, so the gain is
    sqrt((sums + differences) / (2 differences))."""
    return math.sqrt((1 + quotient) / 2)

  # With equal degrees of freedom, the lower quantile of F is 1 / the upper one.
  return Factor(
      name='pairing, which is in it already', factor=factor(quotient),
      low=factor(quotient * (1 / upper_quantile)),
      high=factor(quotient * upper_quantile))


def gain_over_same_pairs(name: str, before: Sequence[float],
                         after: Sequence[float]) -> Factor:
  """Returns how much less one figure varies over pairs of runs than another:
  the quotient of their standard deviations, with a 95 % interval.

  The interval is that of Pitman (1939) and Morgan (1939) for the quotient of
  the variances of two correlated variables. Let r be their correlation, n the
  number of pairs, and t the 97.5 % quantile of Student's distribution with
  n - 2 degrees of freedom. With
    k = 1 + 2 (1 - r^2) t^2 / (n - 2),
  the interval is from quotient / (k + sqrt(k^2 - 1)) to quotient * (k +
  sqrt(k^2 - 1)).

  Args:
    name: the measure that lowers the noise, in words.
    before: the figure of each pair without this measure.
    after: the figure of each pair with it, in the same order.

  Returns:
    sd(before) / sd(after), which is above 1 if the measure lowers the noise,
    and the ends of its interval.
  """
  from scipy.special import stdtrit
  n = len(before)
  quotient = float(np.var(before) / np.var(after))
  r = float(np.corrcoef(before, after)[0, 1])
  t = float(stdtrit(n - 2, 0.975))
  k = 1 + 2 * (1 - r * r) * t ** 2 / (n - 2)
  reach = k + math.sqrt(k * k - 1)
  low = quotient * (1 / reach)
  high = quotient * reach
  # So far all are of variances. Their roots are of standard deviations.
  return Factor(name=name, factor=math.sqrt(quotient), low=math.sqrt(low),
                high=math.sqrt(high))


def variance_components(base: np.ndarray, again: np.ndarray) -> np.ndarray:
  """Splits the variance of a run's result by its sources, with the method of
  moments: the initial parameters, the order of the data, and the rest.

  Half of the mean squared difference of two runs is the sum of the variances
  whose sources they do not share. Let s, o and r be the variances that come
  from the initial parameters, the order of the data and the rest. Pairs of one
  order give s + r, pairs of the same parameters give o + r, and all other pairs
  give s + o + r. Differences of these sums give s, o and r.

  Args:
    base: [..., n], the results of n seeds. Each seed has its own initial
      parameters and its own order of the data.
    again: [..., n], results with the order of the same seed of `base`, and the
      initial parameters of the next seed of `base`.

  Returns:
    [..., 3], the variances s, o and r. An estimate may be below 0.
  """
  n = base.shape[-1]

  def half_mean_square(differences: np.ndarray) -> np.ndarray:
    """Returns half of the mean square over the last axis."""
    return np.mean(differences ** 2, -1) / 2

  # Pairs that share the order of the data, or the first parameters.
  same_order = half_mean_square(base - again)
  same_parameters = half_mean_square(again[..., :-1] - base[..., 1:])

  # The pairs that share neither are all n (2n - 1) pairs of the 2n runs, less
  # the n and n - 1 pairs above.
  runs = np.concatenate([base, again], -1)
  sum_of_all_pairs = 2 * n * n * np.var(runs, -1)
  num_other_pairs = n * (2 * n - 1) - (2 * n - 1)
  share_neither = (
      sum_of_all_pairs - n * same_order - (n - 1) * same_parameters
      ) / num_other_pairs
  return np.stack([share_neither - same_parameters, share_neither - same_order,
                   same_parameters + same_order - share_neither], -1)


def shares_of_variance(base: np.ndarray, again: np.ndarray) -> list[Factor]:
  """Returns the shares of the variance of a run's result that come from its
  initial parameters, from the order of its data, and from the rest.

  The 95 % intervals are from a parametric bootstrap: results are drawn whose
  noise is normal and has the measured shares. Both ends are the wider ones of
  the percentile interval and of the basic bootstrap interval, whose ends are
  the percentiles reflected about the measured share.

  Args:
    base: [sizes, seeds], as in `variance_components`, whose result is averaged
      over the sizes.
    again: [sizes, seeds], as in `variance_components`.

  Returns:
    The three shares in this order, each with its interval. They sum to 1, or
    are all 0 where nothing varies.
  """
  def shares(base: np.ndarray, again: np.ndarray) -> np.ndarray:
    """Returns the three shares, [..., 3], of results [..., sizes, seeds]."""
    components = np.maximum(variance_components(base, again).mean(-2), 0)
    # Without any variance, the shares are 0 and not NaN.
    return components / np.maximum(components.sum(-1, keepdims=True), 1e-300)

  measured_shares = shares(base, again)

  # Draw results with the measured shares. As in the runs themselves, those of
  # `again` have the parameters of the next seed of `base`.
  num_sizes, num_seeds = base.shape
  rng = np.random.default_rng(0)
  sd_parameters, sd_order, sd_rest = np.sqrt(measured_shares)
  parameters = sd_parameters * rng.normal(
      size=(BOOTSTRAP_DRAWS, num_sizes, num_seeds + 1))
  # The order of the data is the same at all sizes.
  order = sd_order * rng.normal(size=(BOOTSTRAP_DRAWS, 1, num_seeds))
  rest_of_base, rest_of_again = sd_rest * rng.normal(
      size=(2, BOOTSTRAP_DRAWS, num_sizes, num_seeds))
  drawn_shares = shares(parameters[..., :-1] + order + rest_of_base,
                        parameters[..., 1:] + order + rest_of_again)

  # Take the wider interval, within 0 and 1.
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
  """Selects the runs of a study's noise phase that trained on text. This phase
  trains the base twice for each seed, with different initial parameters, to
  measure how much results vary without any change.

  Args:
    plan: the plan of the study.
    outcomes: the outcomes of its runs.

  Returns:
    The runs of this phase, and which of its seeds have all of theirs.
  """
  outcome_of = {(run.variant, run.size, run.seed): run for run in outcomes
                if run.phase == 'noise' and run.workload == TEXT}
  seeds = sorted({seed for _, _, seed in outcome_of})
  variants = [plan.base, SECOND_BASE]

  # A seed is complete if all its runs are there, and none diverged.
  complete_seeds = []
  for seed in seeds:
    outcomes_of_seed = []
    for variant in variants:
      for size in plan.sizes:
        outcomes_of_seed.append(outcome_of.get((variant, size, seed)))
    if all(run is not None and not run.diverged for run in outcomes_of_seed):
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

  # The gain by pairing.
  means_over_sizes = functools.partial(
      _means_over_sizes, noise_runs, plan.sizes)
  base, again = means_over_sizes(lambda run: run.values[plan.primary.name])
  if np.ptp(np.subtract(base, again)) == 0:
    return []
  factors = [gain_of_pairing(base, again)]

  # The gain by longer runs, and by means, where the curves of all runs tell it:
  # three evaluations or fewer are too few for that.
  for (_, _, seed), run in noise_runs.outcomes.items():
    is_used = seed in noise_runs.complete_seeds
    if is_used and len(run.curve.get('loss', ())) <= 3:
      return factors

  # The difference of each pair of runs: base minus base again, [seeds].
  half_way_differences = np.subtract(*means_over_sizes(_loss_half_way))
  last_differences = np.subtract(*means_over_sizes(_last_loss))
  late_differences = np.subtract(*means_over_sizes(_late_loss))
  factors.append(gain_over_same_pairs(
      name='twice as many steps (from half-way to the end of these runs)',
      before=half_way_differences, after=last_differences))
  # They are equal if the last quarter of each run has a single evaluation.
  if not np.array_equal(last_differences, late_differences):
    factors.append(gain_over_same_pairs(
        name='the mean loss over the last quarter of a run (averaged '
        'parameters, optim.ema, do no worse)', before=last_differences,
        after=late_differences))
  return factors


def _means_over_sizes(noise_runs: _NoiseRuns, sizes: Sequence[str],
                      figure: Callable[[Outcome], float]) -> list[np.ndarray]:
  """Averages a figure of the runs of the noise phase over the sizes of the
  model, for each seed of which all runs are there.

  Args:
    noise_runs: the runs.
    sizes: the sizes of the study's plan.
    figure: a function that reads the figure from the outcome of a run.

  Returns:
    The means, [seeds], of the base and of the base again with other initial
    parameters.
  """
  means_of_variants = []
  for variant in noise_runs.variants:
    means = []
    for seed in noise_runs.complete_seeds:
      values_at_sizes = [figure(noise_runs.outcomes[variant, size, seed])
                         for size in sizes]
      means.append(np.mean(values_at_sizes))
    means_of_variants.append(np.array(means))
  return means_of_variants


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
  """Returns the shares of the variance of a run's result by their sources (see
  `shares_of_variance`), from the runs of the study's noise phase.

  Args:
    plan: the plan of the study.
    outcomes: the outcomes of its runs.

  Returns:
    The shares; [] if a run diverged, if there are too few runs, or if the noise
    phase did not combine each seed's data with the next seed's parameters.
  """
  noise_runs = _select_noise_runs(plan, outcomes)
  # The runs of the base itself set no `init_seed`, and those of the base again
  # take the parameters of the next seed.
  are_crossed = all(
      run.changes.get('init_seed', INIT_SEED_OF_NEXT_SEED)
      == INIT_SEED_OF_NEXT_SEED for run in noise_runs.outcomes.values())
  needed_seeds = max(len(noise_runs.seeds), MIN_PAIRS)
  if len(noise_runs.complete_seeds) < needed_seeds or not are_crossed:
    return []

  # Collect the primary measure of the base, and of the base again with other
  # parameters, [sizes, seeds] each.
  tables = []
  for variant in noise_runs.variants:
    values_by_size = []
    for size in plan.sizes:
      values_by_size.append([
          noise_runs.outcomes[variant, size, seed].values[plan.primary.name]
          for seed in noise_runs.seeds])
    tables.append(np.array(values_by_size))
  # Without any variance, there is nothing to share out.
  if np.ptp(tables) == 0:
    return []
  base, again = tables
  return shares_of_variance(base, again)


def describe_what_lowers_noise(plan: Plan, outcomes: Iterable[Outcome]) -> str:
  """Returns the sentences of a report that say what lowers the noise of a study
  and where its noise comes from, or '' if that was not measured.

  Args:
    plan: the plan of the study.
    outcomes: the outcomes of its runs.
  """
  factors = measure_gains(plan, outcomes)
  if not factors:
    return ''

  # The gains. The first is that of pairing.
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

  # The shares of the variance, if the noise phase measured them.
  shares = []
  for share in measure_shares_of_variance(plan, outcomes):
    shares.append(f'{share.name} ({share.factor:.0%} '
                  f'[{share.low:.0%}, {share.high:.0%}])')
  if shares:
    sentence += f' The variance of a run comes from {", ".join(shares)}.'
  return sentence
