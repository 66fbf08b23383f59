"""How far the choice of tuned values may have missed the best ones.

Tuning keeps the values, such as a learning rate, whose few runs were best.
Where others are nearly as good the noise decides, and every later run has the
values that it chose: fresh seeds do not show such a miss, and all variants
share that of the base. So the choice is drawn again from the runs of tuning,
and its miss stands in each interval and p of a study (decide.py).

Values that muP carries from the smallest size to larger ones are checked at one
of these, where their neighbours are run, too (TuningRuns.better_neighbours).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple
import zlib

import numpy as np

from common.errors import format_count
from tools.compare import pairing, statistics
from tools.compare import plan as plans

# How often each choice is drawn again.
NUM_DRAWS = 500
# With fewer seeds of tuning the choice is mostly noise.
MIN_SEEDS_OF_TUNING = statistics.MIN_SEEDS
# With what probability a check, at most, finds a neighbour of carried values to
# be better where all are equally good.
LEVEL_OF_CHECK = 0.05

Values = tuple[Any, ...]  # of the tuned fields, in the order of the plan
Point = tuple[str, str, str]  # a variant, a size and a workload
# The losses of the runs of one candidate by their number of steps, which grows
# from rung to rung.
LossesBySteps = dict[float, list[float]]


@dataclasses.dataclass(frozen=True)
class TuningRuns:
  """The runs of tuning of a study, and what they tell of each choice.

  A loss here is a value of the first measure of a workload, for which values
  are tuned, with the sign that makes less better.

  Attributes:
    plan: the plan of the study.
    tried: for each point the values of all its candidates.
    losses: for each point the losses of each candidate of which no run
      diverged.
    deviations: by size and workload, the standard deviation of a run beside
      others of its seed; a size of which it is not known is left out.
  """
  plan: plans.Plan
  tried: Mapping[Point, Sequence[Values]]
  losses: Mapping[Point, Mapping[Values, LossesBySteps]]
  deviations: Mapping[tuple[str, str], statistics.PooledDeviation]

  @property
  def has_few_seeds(self) -> bool:
    """Whether values were tuned with too few seeds for a verdict."""
    return bool(self.tried) and _num_seeds(self.plan) < MIN_SEEDS_OF_TUNING

  def is_at_edge(self, run: plans.Outcome) -> bool:
    """Returns whether a run has the least or the largest value that was tried
    of a field, so that a better one may lie beyond."""
    tried = self.tried.get(self._tuned_point(run), ())
    for value, values_of_field in zip(self._values(run), zip(*tried)):
      if value in (min(values_of_field), max(values_of_field)):
        return True
    return False

  def draw_misses(self, run: plans.Outcome) -> np.ndarray | None:
    """Draws by how much the tuned values of a run may be worse than those of
    the best candidate, L_chosen - min_c L_c. The true losses L_c of all
    candidates c are not known, and are drawn as

      L_c = m_c + s sqrt(df / X) Z_c / sqrt(n),

    where m_c is the mean loss over n seeds, s the standard deviation of a run
    with df degrees of freedom, Z_c standard normal, and X chi-squared with df
    degrees of freedom (the parametric bootstrap: Efron and Tibshirani 1993,
    chapter 6.5). A choice that won narrowly may miss the best one by as much as
    the noise of a tuning run, and one that won clearly misses it by nothing.

    Args:
      run: the outcome of a run with tuned values.

    Returns:
      The misses, [draws], none below 0; None if nothing was tuned, if the
      values of the run are none of the candidates, or if the noise is unknown.
    """
    # Look up the losses of all candidates, and their noise.
    point = self._tuned_point(run)
    _, size, workload = point
    losses = self.losses.get(point, {})
    deviation = self.deviations.get((size, workload))
    if deviation is None or self._values(run) not in losses:
      return None
    estimates = _losses_of_whole_runs(losses)
    if self._values(run) not in estimates.candidates:
      return None

    # Draw the true losses. The seed follows from the point (the variant at a
    # size on a workload), so that a point has the same draws in each
    # comparison.
    rng = np.random.default_rng(zlib.crc32('/'.join(point).encode()))
    scales = np.sqrt(deviation.df / rng.chisquare(deviation.df, NUM_DRAWS))
    noise = rng.normal(size=(NUM_DRAWS, len(estimates.candidates)))
    standard_error = deviation.sd / math.sqrt(estimates.num_seeds)
    drawn = estimates.means + standard_error * scales[:, None] * noise
    chosen = estimates.candidates.index(self._values(run))
    return drawn[:, chosen] - drawn.min(1)

  def better_neighbours(self, point: Point, carried: Values) -> list[Values]:
    """Returns the neighbours of carried values that a check has found to be
    better than these: with more than noise, or where carried values diverged.

    A neighbour is better if its mean loss over the seeds of tuning is lower by

      mean(L_carried - L_neighbour) > t s sqrt(2 / n),

    where n is the number of seeds, s the standard deviation of a run beside
    others of its seed at this size, pooled over all variants and the phase
    `noise`, and t the quantile of Student's distribution with the degrees of
    freedom of s at 1 - LEVEL_OF_CHECK / (the number of neighbours): one-sided
    tests, corrected by Bonferroni. (A variant's own n differences, of mostly
    three seeds, would tell too little of the noise.) So muP's rules are given
    up for one of twenty variants in vain, which costs runs and no verdict.

    Args:
      point: the variant, the size of the check, and the workload.
      carried: the values that muP carries there. All other values that were
        tried at the point are their neighbours.
    """
    losses = self.losses.get(point, {})
    neighbours = sorted(values for values in losses if values != carried)
    if carried not in losses or not neighbours:
      return neighbours
    estimates = _losses_of_whole_runs(losses)
    mean_by_values = dict(zip(estimates.candidates, estimates.means))

    # The gain that is more than noise. Without any noise, each gain is.
    _, size, workload = point
    deviation = self.deviations.get((size, workload))
    least_gain = 0.0
    if deviation is not None:
      from scipy.special import stdtrit
      level = LEVEL_OF_CHECK / len(neighbours)
      standard_error = deviation.sd * math.sqrt(2 / estimates.num_seeds)
      least_gain = float(stdtrit(deviation.df, 1 - level)) * standard_error
    better = []
    for values in neighbours:
      if mean_by_values[carried] - mean_by_values[values] > least_gain:
        better.append(values)
    return better

  def _values(self, run: plans.Outcome) -> Values:
    """Returns the values of the tuned fields with which a run was trained."""
    return tuple(run.changes.get(field) for field in self.plan.tuning.fields)

  def _tuned_point(self, run: plans.Outcome) -> Point:
    """Returns the point whose tuning or check tells most of the values of a
    run: that of the largest size which is not above the run's."""
    tuned_sizes = set()
    for variant, size, workload in self.tried:
      if (variant, workload) == (run.variant, run.workload):
        tuned_sizes.add(size)
    size = self.plan.size_of_tuning(run.size, tuned_sizes)
    return run.variant, size, run.workload


def read_tuning_runs(plan: plans.Plan, outcomes: pairing.Outcomes
                     ) -> TuningRuns:
  """Collects the runs of a study's tuning, and measures how noisy their losses
  are, since the best values were chosen by these losses.

  Args:
    plan: the plan of the study.
    outcomes: the outcomes of the runs of all its phases.
  """
  # Select the runs. A phase may compare only some of the measures, and needs
  # only the workloads (the text, or probes) of these.
  outcomes = [*outcomes]
  workloads = {measure.workload for measure in plan.measures}
  runs_of_tuning = [run for run in outcomes
                    if run.phase == 'tune' and run.workload in workloads]
  runs_of_tuning.sort(key=lambda run: run.seed)

  # Collect the losses of each candidate (the values of the tuned fields), seed
  # by seed. A candidate of which any run diverged is left out.
  tried: dict[Point, list[Values]] = {}
  diverged = set()  # pairs of a point and its values
  losses: dict[Point, dict[Values, LossesBySteps]] = {}
  for run in runs_of_tuning:
    point = run.variant, run.size, run.workload
    values = tuple(run.changes[field] for field in plan.tuning.fields)
    measure, *_ = plan.measures_of_workload(run.workload)
    tried.setdefault(point, []).append(values)
    if run.diverged:
      diverged.add((point, values))
    # Only a run that was shortened must name its steps.
    steps = run.changes.get('train.steps', math.inf)
    losses_by_steps = losses.setdefault(point, {}).setdefault(values, {})
    losses_by_steps.setdefault(steps, []).append(
        -measure.sign * run.values[measure.name])
  for point, values in diverged:
    del losses[point][values]

  # Measure the noise at each size of the model on each workload.
  noise_runs = pairing.outcomes_of_phase(outcomes, 'noise')
  deviations = {}
  for size, workload in {(size, workload) for _, size, workload in losses}:
    tables = [_table_of_whole_runs(losses[point]) for point in sorted(losses)
              if point[1:] == (size, workload)]
    deviation = _deviation_of_run(
        tables, _differences_of_noise(plan, noise_runs, size, workload))
    if deviation is not None:
      deviations[size, workload] = deviation
  return TuningRuns(plan=plan, tried=tried, losses=losses,
                    deviations=deviations)


class EstimatedLosses(NamedTuple):
  """The losses that the candidates of tuning have, or would have, after a run
  that is not shortened.

  Attributes:
    candidates: the candidates, each the values of the tuned fields; in
      ascending order.
    means: the loss of each candidate, the mean over the seeds, [candidates].
    num_seeds: the number of seeds.
  """
  candidates: list[Values]
  means: np.ndarray
  num_seeds: int


def _losses_of_whole_runs(losses: Mapping[Values, LossesBySteps]
                          ) -> EstimatedLosses:
  """Estimates the mean loss that each candidate of tuning has after a whole
  run. A candidate is a choice of values of the tuned fields, such as a learning
  rate.

  Tuning by successive halving trains all candidates for a few steps, drops the
  worse ones, and trains the others for more steps. A candidate that was trained
  to the end has the mean loss of its seeds. One that was dropped is assumed to
  keep its distance from the best candidate b that went on, as it was after the
  most steps s that it was trained for:

    loss(end) = loss_b(end) + mean over seeds of (loss(s) - loss_b(s))

  A candidate is left out if no candidate that was trained to the end has a loss
  after s steps.

  Args:
    losses: the losses of each candidate by the number of steps, seed by seed.

  Returns:
    The estimates.
  """
  # The candidates that were trained to the end.
  all_steps: set[float] = set()
  for by_steps in losses.values():
    all_steps.update(by_steps)
  whole_run = max(all_steps)
  means: dict[Values, float] = {}
  for candidate, by_steps in losses.items():
    if whole_run in by_steps:
      means[candidate] = float(np.mean(by_steps[whole_run]))
  best_first = sorted(means, key=means.__getitem__)
  num_seeds = len(losses[best_first[0]][whole_run])

  # The candidates that were dropped before.
  for candidate, by_steps in losses.items():
    if whole_run in by_steps:
      continue
    last_steps = max(by_steps)
    for best in best_first:
      if last_steps in losses[best]:
        distances = np.subtract(by_steps[last_steps], losses[best][last_steps])
        means[candidate] = means[best] + float(np.mean(distances))
        break

  candidates = sorted(means)
  means_of_candidates = np.array([means[one] for one in candidates])
  return EstimatedLosses(candidates=candidates, means=means_of_candidates,
                         num_seeds=num_seeds)


def _table_of_whole_runs(losses: Mapping[Values, LossesBySteps]) -> np.ndarray:
  """Returns the losses of the candidates that were trained to the end, without
  those that tuning dropped after fewer steps, [candidates, seeds].

  Args:
    losses: the losses of each candidate by the number of steps, seed by seed.
  """
  if not losses:
    return np.zeros((0, 0))
  # Only whole runs have the largest number of steps.
  all_steps: set[float] = set()
  for losses_by_steps in losses.values():
    all_steps.update(losses_by_steps)
  steps_of_whole_run = max(all_steps)

  # The candidates are in rising order of their values.
  losses_by_candidate = []
  for candidate in sorted(losses):
    losses_by_steps = losses[candidate]
    if steps_of_whole_run in losses_by_steps:
      losses_by_candidate.append(losses_by_steps[steps_of_whole_run])
  return np.array(losses_by_candidate)


def _differences_of_noise(plan: plans.Plan, runs: pairing.Runs, size: str,
                          workload: str) -> list[float]:
  """Returns the differences of the pairs of the phase `noise`, of the measure
  that is tuned for."""
  measure, *_ = plan.measures_of_workload(workload)
  pairs = pairing.pair_with_base(
      runs=runs, variant=plans.SECOND_BASE, base=plan.base, size=size,
      measure=measure)
  differences = pairing.differences_by_seed([pairs], measure)
  return pairing.mean_differences(differences)


def _deviation_of_run(tables: Sequence[np.ndarray], differences: Sequence[float]
                      ) -> statistics.PooledDeviation | None:
  """Returns the standard deviation of the loss of a run compared with other
  runs of the same seed, pooled over all runs that show it.

  Args:
    tables: the losses of tuning of each variant, [candidates, seeds]. What is
      left after the means of candidates and of seeds are subtracted is noise
      (the residuals of a two-way analysis of variance).
    differences: the differences of pairs of runs of the base, whose variance is
      twice that of a run.

  Returns:
    The deviation, or None if no run was repeated or all repeats are equal.
  """
  # Sum the squares and the degrees of freedom (df): of the tables, and then of
  # the pairs.
  sum_of_squares, df = 0.0, 0
  for table in tables:
    num_candidates, num_seeds = table.shape
    if num_candidates > 1 and num_seeds > 1:
      residuals = (table - table.mean(0) - table.mean(1, keepdims=True)
                   + table.mean())
      sum_of_squares += float(np.sum(residuals ** 2))
      df += (num_candidates - 1) * (num_seeds - 1)
  if len(differences) > 1:
    sum_of_squares += float(np.var(differences)) * len(differences) / 2
    df += len(differences) - 1
  if sum_of_squares == 0:  # nothing was repeated, or all repeats are alike
    return None
  return statistics.PooledDeviation(sd=math.sqrt(sum_of_squares / df), df=df)


def describe_few_seeds(plan: plans.Plan) -> str:
  """Returns the sentence that says what too few seeds of tuning cost a study;
  '' where it has enough, or no tuning."""
  num_seeds = _num_seeds(plan)
  if num_seeds >= MIN_SEEDS_OF_TUNING:
    return ''
  seeds = format_count(num_seeds, 'seed')
  return (f'Tuning has {seeds}, fewer than {MIN_SEEDS_OF_TUNING}: '
          'its choices are largely noise, so that there is no verdict on any. '
          'Intervals allow for what they may have missed.')


def describe_check(plan: plans.Plan, tuned: Sequence[Mapping[str, Any]]) -> str:
  """Returns the sentences that say what the check of carried values found; ''
  where there was none, or not yet.

  Args:
    plan: the plan of the study.
    tuned: the rows of 'tuned' in its results.json, as plans.Tuned has them.
  """
  checks = [row for row in tuned if row.get('kept') is not None]
  if not checks:
    return ''
  given_up = []
  for row in checks:
    if not row['kept']:
      given_up.append(f'{row["variant"]} on {row["workload"]}')
  checked = format_count(len(checks), 'search', 'searches')
  sentence = (f'At {plan.checked_size} the values of {checked}, which muP '
              'carries there, were run beside their neighbours.')
  if not given_up:
    return f'{sentence} No neighbour was better: muP\'s rules held for all.'
  return (f'{sentence} MuP\'s rules did not hold for {", ".join(given_up)}: a '
          'neighbour was better, so that values were tuned there and at each '
          'larger size.')


def _num_seeds(plan: plans.Plan) -> int:
  """Returns how many seeds tried each value; enough where nothing was tuned."""
  return plan.seeds.get('tune', MIN_SEEDS_OF_TUNING)
