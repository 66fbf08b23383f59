"""fit: a scaling law L(N, D) = E + A / N^a + B / D^b of a ladder of sizes, with
intervals, and the best size for a budget of FLOPs.

Approach 3 of Hoffmann et al. 2022 ("Training compute-optimal large language
models"): N parameters and D tokens give the final loss; the five constants
minimise the Huber loss (delta 1e-3) of the residuals of log L, by L-BFGS from a
grid of starts, best of all. The sum is minimised, not the mean, and to a tight
tolerance: a loose one stops early and gives too narrow intervals (Besiroglu et
al. 2024, "Chinchilla scaling: a replication attempt").

Intervals are of a bootstrap over the residuals, spread by the freedom that the
fit took: it keeps the ladder's sizes, of which there are too few to leave any
out. With --by=FIELD there is a law for each value of a field. The interval of
how their exponents differ is of both bootstraps: where both ladders have the
same lengths and seeds, rung by rung, the residuals of both are drawn together,
so that what a length and a seed do to both cancels.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
from typing import NamedTuple, TypedDict

import numpy as np

from common.errors import RequestError, require

HUBER_DELTA = 1e-3  # as in the paper
CONSTANTS_OF_LAW = ('E', 'A', 'B', 'a', 'b')
# The least ladder that fixes five constants, and leaves residuals.
MIN_RUNS, MIN_SIZES, MIN_LENGTHS = 6, 3, 3
# The largest correlation of log N and log D at which their effects can be told
# apart.
MAX_CORRELATION = 0.97
# The starts: exponents, log E, log A and log B, as in the paper.
START_EXPONENTS = (0.0, 0.5, 1.0, 1.5, 2.0)
START_LOG_E = (-1.0, -0.5, 0.0, 0.5, 1.0)
START_LOG_SCALES = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
NUM_POLISHED_STARTS = 100  # of the starts: those with the least error
NUM_DRAWS = 400  # of the bootstrap: ten laws lie beyond each end of an interval
# The bounds of log E, log A, log B, a, b: a law of exponent 0
# cannot be told from E.
BOUNDS_OF_CONSTANTS = ((-12, 6), (-30, 90), (-30, 90), (0, 8), (0, 8))


class Interval(TypedDict):
  """A figure with its 95 % percentile interval of a bootstrap.

  Attributes:
    value: the figure.
    low: the lower end of the interval.
    high: its upper end.
  """
  value: float
  low: float
  high: float


class DifferenceOfLaws(TypedDict):
  """By how much the exponents of one scaling law exceed those of another.

  Attributes:
    variant: the value of the field whose law it is.
    against: the value of the field of the base.
    paired: whether both were fitted to runs of the same sizes, lengths and
      seeds.
    a: the difference of the exponents of parameters, variant minus base.
    b: that of the exponents of tokens.
  """
  variant: str
  against: str
  paired: bool
  a: Interval
  b: Interval


class LawsByField(TypedDict):
  """The scaling laws of a ladder, one for each value of a config field.

  Attributes:
    field: the dotted name of the field.
    differences: how the exponents of each other value differ from the base's.
    variants: the law of each value, as `describe_law` returns it, that of the
      base first.
  """
  field: str
  differences: list[DifferenceOfLaws]
  variants: dict[str, dict]


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of the command that fits a scaling law to a sweep."""
  parser.add_argument('workdir', help='of the whole sweep')
  parser.add_argument('--budgets', default='', help='FLOPs to find the best '
                      'size for, as 1e15,1e16; default: the largest of the '
                      'ladder, and 10 and 100 times it')
  parser.add_argument('--by', default='', metavar='FIELD', help='a law for '
                      'each value of this field that the sweep has, as '
                      'model.position, and how their exponents differ')
  parser.add_argument('--count', default='params', choices=(
      'params', 'active_params'), help='which parameters N is (%(default)s)')
  parser.add_argument('--json', action='store_true', help='print JSON')


def main(args) -> int:
  """Fits the scaling law L(N, D) of Hoffmann et al. 2022 to the runs of a sweep
  over numbers of parameters N and of tokens D, and prints it.

  Args:
    args: the arguments that `add_arguments` defines.

  Returns:
    The exit code, 0.
  """
  from tools.compare import curves
  budgets = _parse_budgets(args.budgets)
  sweep = curves.load_sweep(args.workdir)

  # With --by, fit one law for each value of a field. Otherwise fit one law to
  # all runs, with intervals from laws that are fitted to resampled residuals.
  if args.by:
    figures = fit_by_field(sweep, field=args.by, count=args.count,
                           budgets=budgets)
  else:
    runs = runs_of_ladder(sweep.points, args.count, args.workdir)
    law = fit_law(runs.params, runs.tokens, runs.losses)
    drawn = bootstrap_laws(law, runs)
    figures = describe_law(law=law, drawn=drawn, runs=runs, budgets=budgets)

  # Print it, for a program or for a person.
  if args.json:
    print(json.dumps(figures, indent=2))
  elif args.by:
    print(format_laws_by_field(figures))
  else:
    print(format_law(figures))
  return 0


def _parse_budgets(text: str) -> list[float]:
  """Returns the budgets in FLOPs that --budgets names, such as '1e15,1e16'."""
  try:
    budgets = [float(word) for word in text.split(',') if word]
  except ValueError as error:
    raise RequestError(f'--budgets is {text!r}: write numbers of FLOPs, as '
                       '1e15,1e16') from error
  require(all(0 < budget < math.inf for budget in budgets),
          f'--budgets is {text!r}: a budget must be > 0')
  return budgets


@dataclasses.dataclass(frozen=True)
class Law:
  """The five constants of L(N, D) = E + A / N^a + B / D^b, of N parameters and
  D tokens (Hoffmann et al. 2022, equation 2)."""
  E: float
  A: float
  B: float
  a: float
  b: float

  def loss(self, params, tokens):
    """Returns L(N, D) of N parameters and D tokens, numbers or arrays."""
    too_small = self.A * np.asarray(params, float) ** -self.a
    too_short = self.B * np.asarray(tokens, float) ** -self.b
    return self.E + too_small + too_short


@dataclasses.dataclass(frozen=True)
class Cost:
  """The FLOPs of a token as factor x N^power: 6 N in the paper."""
  factor: float = 6.0
  power: float = 1.0

  def per_token(self, params):
    return self.factor * np.asarray(params, float) ** self.power


class Runs(NamedTuple):
  """The runs of a ladder (a sweep over sizes and lengths), as arrays with an
  entry for each run."""
  params: np.ndarray
  tokens: np.ndarray
  losses: np.ndarray
  flops_per_token: np.ndarray


def runs_of_ladder(points, count: str, subject: str, beside: str = '') -> Runs:
  """Returns the finished runs of a ladder as arrays. A ladder is a sweep over
  the size of one model and the length of its training.

  Args:
    points: the points of one ladder (curves.Point). A point is a size and a
      length, with a run for each seed.
    count: the parameters that are counted, 'params' or 'active_params'.
    subject: the name of the ladder in messages.
    beside: a field of the config that the points may set though it is not a
      size, or '' for none.

  Returns:
    Arrays with an entry for each run, ordered by tokens, then parameters, then
    seed. This order must stay: it aligns two ladders of the same sizes, lengths
    and seeds run by run, which `bootstrap_laws` relies on.

  Raises:
    RequestError: if no run has finished, if a point changes more than sizes and
      lengths, or if two points have the same size and length.
  """
  # Check the points. A run that diverged or is not over has no final loss.
  for point in points:
    _check_point_sets_sizes(point, beside)
  finished = [point for point in points if point.final_losses]
  require(bool(finished), f'{subject} has no finished run')
  finished.sort(key=lambda point: (point.tokens, getattr(point, count)))
  _check_rungs_differ(finished, count)

  # Make an entry for each run. The runs of a point differ only in their loss.
  params, tokens, losses, flops_per_token = [], [], [], []
  for point in finished:
    for _, loss in sorted(point.final_losses.items()):
      params.append(getattr(point, count))
      tokens.append(point.tokens)
      losses.append(loss)
      flops_per_token.append(point.flops_per_token)
  return Runs(
      params=np.array(params),
      tokens=np.array(tokens),
      losses=np.array(losses),
      flops_per_token=np.array(flops_per_token))


def _check_point_sets_sizes(point, other_field: str) -> None:
  """Checks that a point of a sweep changes only numbers in the config: sizes
  and lengths. A scaling law holds for one kind of model.

  Args:
    point: the point (curves.Point).
    other_field: a field that it may set though it is not a number, or '' for
      none.

  Raises:
    RequestError: if it changes a word, a switch or a list, such as the kind of
      attention.
  """
  other_changes = []
  for field, value in point.changes.items():
    # bool is listed, because Python counts it among the numbers.
    is_number = not isinstance(value, str | bool | list | dict)
    if not is_number and field != other_field:
      other_changes.append(f'{field}={value}')
  require(not other_changes,
          f'point {point.name!r} sets {", ".join(other_changes)}: a law '
          'is fitted to sizes and lengths of one model, as in '
          'configs/sweeps/ladder.py; --by=FIELD fits one for each value of a '
          'field')


def _check_rungs_differ(points, count: str) -> None:
  """Checks that no two points of a ladder (a sweep over sizes and lengths) have
  the same number of parameters and of tokens. They would differ in something
  that a scaling law does not know of.

  Args:
    points: the points of the ladder (curves.Point).
    count: the parameters that are counted, 'params' or 'active_params'.

  Raises:
    RequestError: for the first two points of one size and length. The message
      names the fields in which they differ.
  """
  point_of_rung = {}  # by the number of parameters and of tokens
  for point in points:
    params, tokens = getattr(point, count), point.tokens
    earlier_point = point_of_rung.setdefault((params, tokens), point)
    if earlier_point is point:
      continue

    # Two points are equal. A field that only one of them changes counts too.
    differing_fields = []
    for field in {**earlier_point.changes, **point.changes}:
      if earlier_point.changes.get(field) != point.changes.get(field):
        differing_fields.append(field)
    raise RequestError(
        f'points {earlier_point.name!r} and {point.name!r} have '
        f'both {params:,} {count} and {tokens:,} tokens, and differ in '
        f'{", ".join(differing_fields)}: a law is fitted to one point of each '
        'size and length')


def check_ladder(params: Sequence[float], tokens: Sequence[float]) -> None:
  """Checks that runs vary enough in size and length to fit the five constants
  of a scaling law, with residuals left over.

  Args:
    params: the number of parameters of each run.
    tokens: the number of tokens of each run.

  Raises:
    RequestError: if there are too few different sizes, lengths or pairs of
      both, or if size and length rise together.
  """
  # Count the different pairs of size and length, and the different values of
  # each alone. Each row of the table has the values, the least number of
  # different ones, and their name.
  log_params, log_tokens = _logarithms(params, tokens)
  requirements = (
      (np.stack([log_params, log_tokens], 1), MIN_RUNS,
       'pairs of parameters and tokens'),
      (log_params[:, None], MIN_SIZES, 'numbers of parameters'),
      (log_tokens[:, None], MIN_LENGTHS, 'numbers of tokens'))
  for values, least, things in requirements:
    number = len(_distinct_points(values))
    require(number >= least, f'the ladder has {number} different {things}: the '
            f'five constants of the law need {least}; add points that vary the '
            'model\'s size and train.steps')

  # If only large models are trained for long, a lower loss may come from either
  # the size or the length.
  correlation = float(np.corrcoef(log_params, log_tokens)[0, 1])
  require(abs(correlation) <= MAX_CORRELATION, 'tokens rise with parameters '
          f'(correlation {correlation:.3f} of their logarithms, at most '
          f'{MAX_CORRELATION}): what each contributes cannot be told apart; '
          'add points that vary train.steps at one size')


def _distinct_points(x: np.ndarray) -> list[np.ndarray]:
  """Returns the rows of x, [points, ...] logarithms, that differ from all rows
  before them by more than 1 %."""
  rows: list[np.ndarray] = []
  for row in x:
    distances = [np.max(np.abs(row - other)) for other in rows]
    if min(distances, default=math.inf) > 0.01:
      rows.append(row)
  return rows


def fit_law(params: Sequence[float], tokens: Sequence[float],
            losses: Sequence[float]) -> Law:
  """Fits the scaling law L(N, D) = E + A / N^a + B / D^b to the losses of runs.

  This is approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556): minimise the
  Huber loss of the residuals of log L, starting from each point of a grid.

  Args:
    params: the number of parameters N of each run.
    tokens: the number of tokens D of each run.
    losses: the final loss L of each run.

  Returns:
    The law with the least Huber loss that any of the starts leads to.

  Raises:
    RequestError: if the runs vary too little in size and length.
  """
  check_ladder(params, tokens)
  # x, y and z are the logarithms of N, D and L, as in the paper's equation 3.
  x, y, z = _logarithms(params, tokens, losses)

  # Make the paper's grid of starts, [starts, 5], whose columns are log E, log
  # A, log B, a and b. log A and log B share one range, and a and b another.
  axes = np.meshgrid(START_LOG_E, START_LOG_SCALES, START_LOG_SCALES,
                     START_EXPONENTS, START_EXPONENTS,
                     indexing='ij')
  grid = np.stack(axes, -1).reshape(-1, 5)

  # To minimise from each of them would take long. The objective alone is cheap,
  # so it is only minimised from the starts where it is lowest.
  objectives = []
  for theta in grid:
    objective, _ = huber_objective(theta, x=x, y=y, z=z)
    objectives.append(objective)
  best_starts = np.argsort(objectives, kind='stable')[:NUM_POLISHED_STARTS]
  return _minimise_from_starts(grid[best_starts], x=x, y=y, z=z)


def _logarithms(*columns: Sequence[float]) -> list[np.ndarray]:
  """Returns the natural logarithms of each column."""
  return [np.log(np.asarray(column, float)) for column in columns]


def bootstrap_laws(law: Law, runs: Runs, seed: int = 0) -> list[Law]:
  """Draws laws by a residual bootstrap (Efron and Tibshirani 1993, chapter 9).
  Each is fitted to the losses that the fitted law predicts, plus a residual of
  a random run for each run. The spread of these laws shows how uncertain the
  fitted law is.

  Two sweeps of as many runs in the same order, drawn with the same seed, get
  the residuals of the same runs. The effects that a size, a length and a seed
  have on both then cancel in the difference of their laws.

  Args:
    law: the law that was fitted.
    runs: the runs that it was fitted to.
    seed: the seed of the draws.

  Returns:
    NUM_DRAWS laws.
  """
  log_params, log_tokens, log_losses = _logarithms(
      runs.params, runs.tokens, runs.losses)
  fitted_losses = np.log(law.loss(runs.params, runs.tokens))

  # The residuals of a fit are smaller than the noise, because its five
  # constants follow the losses. The factor sqrt(n / (n - 5)) makes up for it.
  freedom = len(log_losses) - len(CONSTANTS_OF_LAW)
  residuals = (log_losses - fitted_losses) * math.sqrt(
      len(log_losses) / freedom)

  # Fit a law to each draw. It lies near the fitted one, so one start is enough.
  start = [math.log(law.E), math.log(law.A), math.log(law.B), law.a, law.b]
  rng = np.random.default_rng(seed)
  laws = []
  for _ in range(NUM_DRAWS):
    # One residual for each run, drawn with replacement.
    drawn_losses = fitted_losses + rng.choice(residuals, len(log_losses))
    laws.append(_minimise_from_starts(
        [start], x=log_params, y=log_tokens, z=drawn_losses))
  return laws


def _minimise_from_starts(starts: Sequence, x: np.ndarray, y: np.ndarray,
                          z: np.ndarray) -> Law:
  """Fits a scaling law by minimising `huber_objective` from several starts, and
  returns the best law that any of them leads to.

  Args:
    starts: the values of log E, log A, log B, a and b at each start.
    x: the logarithm of the parameters of each run.
    y: the logarithm of the tokens of each run.
    z: the logarithm of the loss of each run.
  """
  from scipy.optimize import minimize
  # The objective is not convex, so that different starts may end in different
  # minima. The best of them is kept.
  best = None
  for start in starts:
    # jac=True: the objective returns its gradient as well. The tolerances are
    # tight, since intervals are differences of nearby fits.
    result = minimize(
        huber_objective, start, args=(x, y, z), jac=True, method='L-BFGS-B',
        bounds=BOUNDS_OF_CONSTANTS,
        options=dict(maxiter=5000, ftol=1e-15, gtol=1e-10))
    if best is None or result.fun < best.fun:
      best = result

  # E, A and B were fitted as logarithms, which keeps them positive.
  E, A, B = np.exp(best.x[:3]).tolist()
  a, b = best.x[3:].tolist()
  return Law(E=E, A=A, B=B, a=a, b=b)


def huber_objective(theta, x, y, z) -> tuple[float, np.ndarray]:
  """Returns the Huber loss of the residuals of log L, summed over the runs, and
  its gradient (Hoffmann et al. 2022, equation 3).

  It is the sum of Huber(logsumexp(log E, log A - a log N, log B - b log D) -
  log L), where the logsumexp is the logarithm of the law.

  Args:
    theta: log E, log A, log B, a, b.
    x: the logarithm of the parameters N of each run.
    y: the logarithm of the tokens D of each run.
    z: the logarithm of the loss L of each run.

  Returns:
    The loss, and its gradient of the shape of `theta`; both are scaled by one
    constant, which moves no minimum.
  """
  log_E, log_A, log_B, a, b = theta
  # The logarithms of the three terms of the law, [3, runs], and of their sum.
  terms = np.stack([np.full_like(x, log_E), log_A - a * x, log_B - b * y])
  log_predicted = np.logaddexp.reduce(terms)
  residual = log_predicted - z
  # Huber's loss is a parabola near 0, and a line beyond HUBER_DELTA.
  distance = np.abs(residual)
  parabola = residual * residual / 2
  line = HUBER_DELTA * (distance - HUBER_DELTA / 2)
  value = np.where(distance <= HUBER_DELTA, parabola, line).sum()
  # The slope of Huber's loss is its residual, clipped. By the chain rule each
  # term has the part of it that the term has in the sum (a softmax).
  slope = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
  slope_of_terms = slope * np.exp(terms - log_predicted)
  # log E, log A and log B are added to their terms, so their gradient is the
  # sum itself; a and b are multiplied by -log N and -log D.
  by_log_E, by_log_A, by_log_B = slope_of_terms.sum(1)
  gradient = np.array([
      by_log_E, by_log_A, by_log_B, -(slope_of_terms[1] * x).sum(),
      -(slope_of_terms[2] * y).sum()])
  # L-BFGS stops by the absolute size of the gradient, which would be too small.
  scale = 1 / HUBER_DELTA ** 2
  return value * scale, gradient * scale


def optimal_size(law: Law, cost: Cost, budget: float) -> tuple[float, float]:
  """Returns the number of parameters N and of tokens D that give the least loss
  for a budget of training FLOPs.

  The loss is L(N, D) = E + A / N^a + B / D^b. A token costs factor N^power
  FLOPs, so that D = budget / (factor N^power). The derivative of L by N is 0 at
    N^(a + power b) = a A / (power b B) (budget / factor)^b.

  Args:
    law: the scaling law of the loss.
    cost: the FLOPs of a token by the number of parameters.
    budget: the FLOPs of training.
  """
  # Compute the right side of the equation as a product of two, and solve for N.
  power = cost.power
  ratio = law.a * law.A / (power * law.b * law.B)
  power_of_budget = (budget / cost.factor) ** law.b
  params = (ratio * power_of_budget) ** (1 / (law.a + power * law.b))
  tokens = budget / float(cost.per_token(params))
  return params, tokens


def fit_cost_per_token(params: Sequence[float],
                       flops_per_token: Sequence[float]) -> Cost:
  """Fits the FLOPs of a token as factor x N^power to the models of a ladder, by
  least squares of the logarithms."""
  power, factor = np.polyfit(np.log(params), np.log(flops_per_token), 1)
  return Cost(factor=float(np.exp(factor)), power=float(power))


def describe_law(law: Law, drawn: list[Law], runs: Runs, budgets) -> dict:
  """Returns all figures of a scaling law with their intervals, as --json prints
  them.

  Args:
    law: the law of the runs.
    drawn: the laws of a bootstrap, by which intervals are found.
    runs: the runs that the law was fitted to.
    budgets: the training FLOPs to find the best size for; none: the largest of
      the ladder, and 10 and 100 times it.

  Returns:
    A tree for JSON: the number of 'runs'; the least and largest 'parameters'
    and 'tokens'; 'rms_log_residual', how far log L lies from the law;
    'constants' of the law, each with its interval; the constants of
    'flops_per_token'; and 'optima', the best size for each budget.
  """
  # The best size for each budget. It needs the FLOPs of a token at sizes that
  # were not trained, which are read from a power law of the runs.
  cost = fit_cost_per_token(runs.params, runs.flops_per_token)
  if not budgets:
    largest = float(np.max(runs.tokens * runs.flops_per_token))
    budgets = [largest, 10 * largest, 100 * largest]
  optima = []
  for budget in budgets:
    optima.append(
        _optimum_with_intervals(law=law, drawn=drawn, cost=cost, budget=budget))

  # How well the law fits.
  predicted = law.loss(runs.params, runs.tokens)
  residuals = np.log(runs.losses / predicted)
  rms = math.sqrt(np.mean(residuals ** 2))
  return {
      'runs': len(runs.losses),
      'parameters': _least_and_largest(runs.params),
      'tokens': _least_and_largest(runs.tokens),
      'rms_log_residual': rms,
      'constants': _figures_with_intervals(dataclasses.asdict, law, drawn),
      'flops_per_token': dataclasses.asdict(cost),
      'optima': optima}


def _least_and_largest(values: np.ndarray) -> list[float]:
  """Returns the least and the largest value."""
  return [float(values.min()), float(values.max())]


def _figures_with_intervals(figures, law: Law, drawn) -> dict[str, dict]:
  """Returns figures that follow from a scaling law, such as its best size, each
  with its 95 % interval from a bootstrap.

  Args:
    figures: a function that maps a law to its figures, by name.
    law: the law that was fitted.
    drawn: the laws of the bootstrap.

  Returns:
    A dict with 'value', 'low' and 'high' for each figure, by its name.
  """
  figures_of_drawn = [figures(drawn_law) for drawn_law in drawn]
  interval_of_figure = {}
  for name, value in figures(law).items():
    # The spread of the figure over the drawn laws is its interval.
    drawn_values = [drawn_figures[name] for drawn_figures in figures_of_drawn]
    interval_of_figure[name] = _percentile_interval(value, drawn_values)
  return interval_of_figure


def _percentile_interval(value: float, drawn: Sequence[float]) -> Interval:
  """Returns a value with its 95 % percentile interval of a bootstrap."""
  low, high = np.percentile(drawn, [2.5, 97.5])
  return Interval(value=float(value), low=float(low), high=float(high))


def _optimum_with_intervals(law: Law, drawn: Sequence[Law], cost: Cost,
                            budget: float) -> dict:
  """Returns the size of model with the least loss for a budget of training
  FLOPs, with 95 % intervals from a bootstrap.

  Args:
    law: the scaling law that was fitted.
    drawn: the laws of the bootstrap.
    cost: the FLOPs of a token by the number of parameters.
    budget: the FLOPs of training.

  Returns:
    The 'budget', and 'parameters', 'tokens' and 'loss' with their intervals. It
    is {'budget': ...} alone if an exponent may be 0: the loss then does not
    depend on the size (or the length), and no size is the best.
  """
  def has_optimum(law: Law) -> bool:
    """Returns whether both exponents are clearly above 0."""
    return min(law.a, law.b) > 0.01

  # An interval over the drawn laws that have an optimum is meaningful only if
  # almost all have: at most 5 % may be left out.
  drawn_with_optimum = [
      drawn_law for drawn_law in drawn if has_optimum(drawn_law)]
  have_most = len(drawn_with_optimum) >= 0.95 * len(drawn)
  if not has_optimum(law) or not have_most:
    return {'budget': budget}

  def figures_at_optimum(law: Law) -> dict[str, float]:
    """Returns the figures of one law, the fitted one or a drawn one."""
    params, tokens = optimal_size(law, cost, budget)
    return {'parameters': params, 'tokens': tokens,
            'loss': law.loss(params, tokens)}

  return {'budget': budget} | _figures_with_intervals(
      figures_at_optimum, law=law, drawn=drawn_with_optimum)


def format_law(figures: dict) -> str:
  """Returns the text of a scaling law with its intervals and best sizes, for a
  terminal.

  Args:
    figures: the figures of the law, as `describe_law` returns them.
  """
  # The formula, and how well it fits.
  num_runs, rms = figures['runs'], figures['rms_log_residual']
  lines = [f'L(N, D) = E + A / N^a + B / D^b, of {num_runs} runs; '
           f'rms residual of log L {rms:.2e}']

  # Its constants, each with its interval, and those of the cost of a token.
  for name, constant in figures['constants'].items():
    lines.append(
        f'  {name}  {constant["value"]:>10.4g}  [{constant["low"]:.4g}, '
        f'{constant["high"]:.4g}]')
  cost = figures['flops_per_token']
  lines.append(f'FLOPs a token, of this ladder: {cost["factor"]:.3g} '
               f'N^{cost["power"]:.3f}')

  # One line for each budget, below the headings. Their widths must be those of
  # the columns in `_format_optimum`.
  lines.append(f'{"budget (FLOPs)":<16}{"parameters":<30}{"tokens":<30}loss')
  for optimum in figures['optima']:
    lines.append(_format_optimum(figures, optimum))
  lines.append('95 % intervals are of a bootstrap over the residuals of this '
               'law: they do not know that another law may hold.')
  return '\n'.join(lines)


def _format_optimum(figures: dict, optimum: dict) -> str:
  """Returns a line with the best size of model for one budget of training
  FLOPs. It says so where that size is an extrapolation.

  Args:
    figures: the figures of the scaling law, as `describe_law` returns them.
    optimum: one of figures['optima']. It has no 'loss' if no size is the best.
  """
  # The widths must be those of the headings in `format_law`.
  budget = f'{optimum["budget"]:<16.3g}'
  if 'loss' not in optimum:
    return (f'{budget}no optimum: an exponent is 0 as far as this ladder can '
            'tell')

  # Format each figure with its interval.
  params = _format_interval(optimum['parameters'], '.3g')
  tokens = _format_interval(optimum['tokens'], '.3g')
  loss = _format_interval(optimum['loss'], '.3f')

  # Mark a best size that is beyond the sizes or lengths that were trained.
  outside = []
  for name in ('parameters', 'tokens'):
    least, largest = figures[name]
    if not least <= optimum[name]['value'] <= largest:
      outside.append(name)
  beyond = ''
  if outside:
    beyond = f'  extrapolated: {" and ".join(outside)} beyond the ladder'
  return f'{budget}{params:<30}{tokens:<30}{loss}{beyond}'


def _format_interval(x: Mapping[str, float], form: str) -> str:
  """Returns 'value [low, high]' in a format."""
  return f'{x["value"]:{form}} [{x["low"]:{form}}, {x["high"]:{form}}]'


def fit_by_field(sweep, field: str, count: str, budgets) -> LawsByField:
  """Fits a scaling law for each value of a config field, such as each kind of
  attention, and compares their exponents with those of the base.

  Args:
    sweep: the ladder, as curves.load_sweep returns it.
    field: the dotted name of the field.
    count: the parameters that are counted, 'params' or 'active_params'.
    budgets: the training FLOPs to find the best size for; none: as in
      `describe_law`.

  Returns:
    The laws, and how their exponents differ.

  Raises:
    RequestError: where there is no such field, or only one value of it.
  """
  ladders = _ladder_by_value(sweep, field)
  runs, laws, drawn = {}, {}, {}
  for value, points in ladders.items():
    runs[value] = runs_of_ladder(points, count=count,
                                 subject=f'{field}={value} of {sweep.name}',
                                 beside=field)
    laws[value] = fit_law(runs[value].params, runs[value].tokens,
                          runs[value].losses)
    drawn[value] = bootstrap_laws(laws[value], runs[value])

  # How the exponents of the others differ from those of the base, whose value
  # comes first.
  first, *others = ladders
  differences: list[DifferenceOfLaws] = []
  for value in others:
    # Ladders of the same sizes, lengths and seeds are paired: drawn with one
    # seed, both bootstraps take the residuals of the same runs, and what these
    # have in common cancels. Others are drawn with another seed, since equal
    # draws would then hang together by chance.
    is_paired = _rungs_of_ladder(ladders[value]) == _rungs_of_ladder(
        ladders[first])
    theirs = drawn[value]
    if not is_paired:
      theirs = bootstrap_laws(laws[value], runs[value], seed=1)
    both_laws = laws[value], laws[first]
    both_drawn = theirs, drawn[first]
    differences.append(DifferenceOfLaws(
        variant=value, against=first, paired=is_paired,
        a=_difference_of_exponents(both_laws, both_drawn, exponent='a'),
        b=_difference_of_exponents(both_laws, both_drawn, exponent='b')))

  variants = {}
  for value in ladders:
    variants[value] = describe_law(law=laws[value], drawn=drawn[value],
                                   runs=runs[value], budgets=budgets)
  return LawsByField(field=field, differences=differences, variants=variants)


def _ladder_by_value(sweep, field: str) -> dict[str, list]:
  """Groups the points of a sweep by their value of a config field, such as the
  kind of attention. The group of the base's value comes first.

  Args:
    sweep: the sweep (curves.Sweep).
    field: the dotted name of the field.

  Returns:
    The points (curves.Point) of each group, by the value as text.

  Raises:
    RequestError: if there is no such field, or only one value of it.
  """
  require(field in sweep.base_config,
          f'--by is {field!r}, which is no config field')
  value_of_base = sweep.base_config[field]
  # A dict keeps the order in which its keys were added: the base comes first
  # even where its points do not.
  ladders: dict[str, list] = {str(value_of_base): []}
  for point in sweep.points:
    # A point that does not change the field has the value of the base.
    value = str(point.changes.get(field, value_of_base))
    ladders.setdefault(value, []).append(point)
  require(len(ladders) > 1, f'--by is {field!r}, which is '
          f'{str(value_of_base)!r} at every point of {sweep.name}: name a '
          'field of which it has two values')
  return ladders


def _difference_of_exponents(laws: tuple[Law, Law],
                             drawn: tuple[list[Law], list[Law]],
                             exponent: str) -> Interval:
  """Returns by how much an exponent of one scaling law exceeds that of another,
  with the 95 % percentile interval of a bootstrap.

  Args:
    laws: the two laws that were fitted.
    drawn: the laws of the bootstrap of each, as many of both.
    exponent: the name of the exponent, 'a' or 'b'.

  Returns:
    The difference, first minus second, with its interval.
  """
  # Subtract draw by draw. Draws of paired runs share their residuals, so that
  # the differences vary less than either exponent.
  differences = []
  for first_draw, second_draw in zip(*drawn):
    differences.append(
        getattr(first_draw, exponent) - getattr(second_draw, exponent))
  first_law, second_law = laws
  difference = getattr(first_law, exponent) - getattr(second_law, exponent)
  return _percentile_interval(difference, differences)


def _rungs_of_ladder(points: Sequence) -> list[tuple]:
  """Returns which run stands where on a ladder of sizes, so that the runs of
  two ladders can be paired: its tokens, the rank of its size and its seed.

  Sizes are compared by their rank, as models of another kind that stand on the
  same rung have another number of parameters.

  Args:
    points: the points of the ladder (curves.Point).

  Returns:
    The (tokens, rank, seed) of each run, in the order of `runs_of_ladder`.
  """
  sizes = sorted({point.params for point in points})
  rungs = []
  for point in points:
    rank = sizes.index(point.params)
    rungs += [(point.tokens, rank, seed) for seed in point.final_losses]
  return sorted(rungs)


def format_laws_by_field(figures: LawsByField) -> str:
  """Returns the text of the laws of each value of a config field, and of how
  their exponents differ, for a terminal.

  Args:
    figures: the laws and differences, as `fit_by_field` returns them.
  """
  # The law of each value, as it would be printed alone.
  paragraphs = [f'{figures["field"]}={value}\n{format_law(law)}'
                for value, law in figures['variants'].items()]

  # The differences of the exponents. An interval that holds 0 shows none.
  lines = ['How the exponents differ, with 95 % intervals:']
  for row in figures['differences']:
    lines.append(_format_difference('a (parameters)', row['a'], row))
    lines.append(_format_difference('b (tokens)', row['b'], row))
  return '\n\n'.join([*paragraphs, '\n'.join(lines)])


def _format_difference(title: str, difference: Interval, row: DifferenceOfLaws
                       ) -> str:
  """Returns the line of one exponent's difference, for a terminal.

  Args:
    title: the name of the exponent and of what grows with it.
    difference: the difference, variant minus base, with its interval.
    row: the two laws that are compared.
  """
  line = (f'  {title}, {row["variant"]} - {row["against"]}: '
          f'{difference["value"]:+.4f} [{difference["low"]:+.4f}, '
          f'{difference["high"]:+.4f}]')
  if difference['low'] <= 0 <= difference['high']:
    line += ', inside the noise'
  if not row['paired']:
    line += ' (their runs are no pairs)'
  return line
