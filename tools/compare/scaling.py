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
from typing import NamedTuple

import numpy as np

from common.errors import RequestError, require
from common.fields import check_number

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
# The bounds of log E, log A, log B, a, b: a law of exponent 0
# cannot be told from E.
BOUNDS_OF_CONSTANTS = ((-12, 6), (-30, 90), (-30, 90), (0, 8), (0, 8))


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('workdir', help='of the whole sweep')
  parser.add_argument('--budgets', default='', help='FLOPs to find the best '
                      'size for, as 1e15,1e16; default: the largest of the '
                      'ladder, and 10 and 100 times it')
  parser.add_argument('--by', default='', metavar='FIELD', help='a law for '
                      'each value of this field that the sweep has, as '
                      'model.position, and how their exponents differ')
  parser.add_argument('--count', default='params', choices=(
      'params', 'active_params'), help='which parameters N is (%(default)s)')
  parser.add_argument('--draws', type=int, default=400,
                      help='of the bootstrap (%(default)s)')
  parser.add_argument('--json', action='store_true', help='print JSON')


def main(args) -> int:
  from tools.compare import curves
  # An interval needs 40 or more.
  check_number('--draws', args.draws, (('>=', 40), ('<=', 1_000_000)))
  budgets = _parse_budgets(args.budgets)
  sweep = curves.load_sweep(args.workdir)
  if args.by:
    figures = fit_by_field(sweep, args.by, args.count, budgets, args.draws)
  else:
    runs = runs_of_ladder(sweep.points, args.count, args.workdir)
    law = fit_law(runs.params, runs.tokens, runs.losses)
    drawn = _bootstrap_runs(law, runs, args.draws)
    figures = describe_law(law=law, drawn=drawn, runs=runs, budgets=budgets)
  if args.json:
    print(json.dumps(figures, indent=2))
  else:
    print(format_laws_by_field(figures) if args.by else format_law(figures))
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


def runs_of_ladder(points, count: str, who: str, beside: str = '') -> Runs:
  """Returns the finished runs of a ladder, ordered by tokens, parameters and
  seed.

  Args:
    points: the points of one ladder.
    count: the parameters that are counted, 'params' or 'active_params'.
    who: what the ladder is called in messages.
    beside: a field that the points may set though it is no size.

  Raises:
    RequestError: where they are no ladder.
  """
  for point in points:
    _check_point_sets_sizes(point, beside)
  done = [point for point in points if point.final_losses]
  require(bool(done), f'{who} has no finished run')
  done.sort(key=lambda point: (point.tokens, getattr(point, count)))
  _check_rungs_differ(done, count)
  params, tokens, losses, flops_per_token = [], [], [], []
  for point in done:
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


def _check_point_sets_sizes(point, beside: str) -> None:
  """Raises RequestError for a point that sets what is no size, but for the
  field `beside`."""
  kinds = []
  for key, value in point.changes.items():
    is_kind = isinstance(value, str | bool | list | dict)
    if is_kind and key != beside:
      kinds.append(f'{key}={value}')
  require(not kinds, f'point {point.name!r} sets {", ".join(kinds)}: a law '
          'is fitted to sizes and lengths of one model, as in '
          'configs/sweeps/ladder.py; --by=FIELD fits one for each value of a '
          'field')


def _check_rungs_differ(points, count: str) -> None:
  """Raises RequestError for two points of one size and length: what else they
  differ in, the law does not know."""
  rungs = {}
  for point in points:
    params, tokens = getattr(point, count), point.tokens
    other = rungs.setdefault((params, tokens), point)
    if other is point:
      continue
    different = []
    for key in {**other.changes, **point.changes}:
      if other.changes.get(key) != point.changes.get(key):
        different.append(key)
    raise RequestError(
        f'points {other.name!r} and {point.name!r} have '
        f'both {params:,} {count} and {tokens:,} tokens, and differ in '
        f'{", ".join(different)}: a law is fitted to one point of each size '
        'and length')


def check_ladder(params: Sequence[float], tokens: Sequence[float]) -> None:
  """Raises RequestError where a ladder is too small to fix five constants, and
  to leave residuals."""
  x, y = _logarithms(params, tokens)
  counted = (
      (np.stack([x, y], 1), MIN_RUNS, 'pairs of parameters and tokens'),
      (x[:, None], MIN_SIZES, 'numbers of parameters'),
      (y[:, None], MIN_LENGTHS, 'numbers of tokens'))
  for rows, least, things in counted:
    number = len(_distinct_points(rows))
    require(number >= least, f'the ladder has {number} different {things}: the '
            f'five constants of the law need {least}; add points that vary the '
            'model\'s size and train.steps')
  correlation = float(np.corrcoef(x, y)[0, 1])
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
  """Fits L(N, D) = E + A / N^a + B / D^b to runs: approach 3 of Hoffmann et al.
  2022, the least Huber loss of log L from a grid of starts.

  Args:
    params: the number of parameters N of each run.
    tokens: the number of tokens D of each run.
    losses: the final loss of each run.

  Raises:
    RequestError: where the ladder is too small.
  """
  check_ladder(params, tokens)
  x, y, z = _logarithms(params, tokens, losses)
  # Every start of the paper's grid is tried; the best of them are polished.
  axes = np.meshgrid(START_LOG_E, START_LOG_SCALES, START_LOG_SCALES,
                     START_EXPONENTS, START_EXPONENTS,
                     indexing='ij')
  grid = np.stack(axes, -1).reshape(-1, 5)
  errors = np.array([huber_objective(theta, x, y, z)[0] for theta in grid])
  best = np.argsort(errors, kind='stable')[:NUM_POLISHED_STARTS]
  return _minimise_from_starts(grid[best], x, y, z)


def _logarithms(*columns: Sequence[float]) -> list[np.ndarray]:
  """Returns the natural logarithms of each column."""
  return [np.log(np.asarray(column, float)) for column in columns]


def bootstrap_laws(law: Law, params, tokens, losses, draws: int, seed: int = 0
                   ) -> list[Law]:
  """Returns the laws of a residual bootstrap: of ladders whose losses are those
  of the fitted law with residuals drawn anew.

  Two ladders of as many runs in the same order, drawn with the same seed, get
  the residuals of the same runs: what a size, a length and a seed do to both
  then cancels in the difference of their laws.

  Args:
    law: the law that was fitted.
    params, tokens, losses: of each run, as in `fit_law`.
    draws: how many laws are drawn.
    seed: the seed of the draws.
  """
  x, y, z = _logarithms(params, tokens, losses)
  fitted = np.log(law.loss(params, tokens))
  # The fit took as much freedom as it has constants.
  freedom = len(z) - len(CONSTANTS_OF_LAW)
  residuals = (z - fitted) * math.sqrt(len(z) / freedom)
  start = [math.log(law.E), math.log(law.A), math.log(law.B), law.a, law.b]
  rng = np.random.default_rng(seed)
  laws = []
  for _ in range(draws):
    drawn = fitted + rng.choice(residuals, len(z))
    laws.append(_minimise_from_starts([start], x, y, drawn))
  return laws


def _minimise_from_starts(starts: Sequence, x: np.ndarray, y: np.ndarray,
                          z: np.ndarray
                          ) -> Law:
  """Returns the law with the least `huber_objective` that L-BFGS reaches from
  any of some starts.

  Args:
    starts: the values of log E, log A, log B, a and b at each start.
    x, y, z: the logarithms of parameters, tokens and losses of each run.
  """
  from scipy.optimize import minimize
  best = None
  for theta in starts:
    result = minimize(
        huber_objective, theta, args=(x, y, z), jac=True, method='L-BFGS-B',
        bounds=BOUNDS_OF_CONSTANTS,
        options=dict(maxiter=5000, ftol=1e-15, gtol=1e-10))
    if best is None or result.fun < best.fun:
      best = result
  E, A, B = np.exp(best.x[:3]).tolist()
  a, b = best.x[3:].tolist()
  return Law(E=E, A=A, B=B, a=a, b=b)


def huber_objective(theta, x, y, z) -> tuple[float, np.ndarray]:
  """Returns the summed Huber loss of the residuals of log L, and its gradient
  (Hoffmann et al. 2022, equation 3): sum over the runs of
  Huber(logsumexp(log E, log A - a log N, log B - b log D) - log L).

  Args:
    theta: log E, log A, log B, a, b.
    x, y, z: the logarithms of parameters, tokens and losses, of each run.
  """
  log_E, log_A, log_B, a, b = theta
  terms = np.stack([np.full_like(x, log_E), log_A - a * x, log_B - b * y])
  total = np.logaddexp.reduce(terms)
  residual = total - z
  # Huber's loss is a parabola near 0, and a line beyond HUBER_DELTA.
  size = np.abs(residual)
  parabola = residual * residual / 2
  line = HUBER_DELTA * (size - HUBER_DELTA / 2)
  value = np.where(size <= HUBER_DELTA, parabola, line).sum()
  # Its slope, shared out by the share of each term in the sum.
  slope = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
  pull = slope * np.exp(terms - total)
  by_log_E, by_log_A, by_log_B = pull.sum(1)
  gradient = np.array([by_log_E, by_log_A, by_log_B, -(pull[1] * x).sum(),
                       -(pull[2] * y).sum()])
  scale = 1 / HUBER_DELTA ** 2  # L-BFGS stops by absolute size of the gradient
  return value * scale, gradient * scale


def optimal_size(law: Law, cost: Cost, budget: float) -> tuple[float, float]:
  """Returns the parameters N and tokens D with the least loss for a budget of
  FLOPs.

  D = budget / (factor N^power); where dL/dN = 0,
  N^(a + power b) = a A / (power b B) (budget / factor)^b.
  """
  p = cost.power
  ratio = law.a * law.A / (p * law.b * law.B)
  spent = (budget / cost.factor) ** law.b
  params = (ratio * spent) ** (1 / (law.a + p * law.b))
  tokens = budget / float(cost.per_token(params))
  return params, tokens


def fit_cost_per_token(params: Sequence[float],
                       flops_per_token: Sequence[float]) -> Cost:
  """Fits the FLOPs of a token as factor x N^power to the models of a ladder, by
  least squares of the logarithms."""
  power, factor = np.polyfit(np.log(params), np.log(flops_per_token), 1)
  return Cost(factor=float(np.exp(factor)), power=float(power))


def describe_law(law: Law, drawn: list[Law], runs: Runs, budgets) -> dict:
  """Returns all figures of a law with their intervals, as --json prints them.

  Args:
    law: the law of the runs.
    drawn: the laws of a bootstrap.
    runs: the runs of the ladder.
    budgets: the FLOPs to find the best size for; none: the largest of the
      ladder, and 10 and 100 times it.
  """
  # The budgets at which a size is asked for.
  cost = fit_cost_per_token(runs.params, runs.flops_per_token)
  if not budgets:
    largest = float(np.max(runs.tokens * runs.flops_per_token))
    budgets = [largest, 10 * largest, 100 * largest]
  optima = []
  for budget in budgets:
    optima.append(
        _optimum_with_intervals(law=law, drawn=drawn, cost=cost, budget=budget))

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
  """Returns figures of a law by name, each with its bootstrap interval.

  Args:
    figures: a function that maps a law to its figures by name.
    law: the law.
    drawn: the laws of a bootstrap.
  """
  figures_of_drawn = [figures(other) for other in drawn]
  rows = {}
  for name, value in figures(law).items():
    around = [other[name] for other in figures_of_drawn]
    rows[name] = _percentile_interval(value, around)
  return rows


def _percentile_interval(value: float, drawn: Sequence[float]) -> dict:
  """Returns a value with its 95 % percentile interval of a bootstrap."""
  low, high = np.percentile(drawn, [2.5, 97.5])
  return {'value': float(value), 'low': float(low), 'high': float(high)}


def _optimum_with_intervals(law: Law, drawn: Sequence[Law], cost: Cost,
                            budget: float) -> dict:
  """Returns the best size for a budget; {'budget': ...} alone where an exponent
  is 0 and no size is the best."""
  kept = [other for other in drawn if min(other.a, other.b) > 0.01]
  if min(law.a, law.b) <= 0.01 or len(kept) < 0.95 * len(drawn):
    return {'budget': budget}

  def best(of: Law) -> dict[str, float]:
    params, tokens = optimal_size(of, cost, budget)
    return {'parameters': params, 'tokens': tokens,
            'loss': of.loss(params, tokens)}

  return {'budget': budget} | _figures_with_intervals(best, law, kept)


def format_law(figures: dict) -> str:
  """Returns a scaling law with its intervals and optima, for a terminal.

  Args:
    figures: the figures of the law, as `describe_law` returns them.
  """
  num_runs, rms = figures['runs'], figures['rms_log_residual']
  lines = [f'L(N, D) = E + A / N^a + B / D^b, of {num_runs} runs; '
           f'rms residual of log L {rms:.2e}']
  for name, x in figures['constants'].items():
    lines.append(
        f'  {name}  {x["value"]:>10.4g}  [{x["low"]:.4g}, {x["high"]:.4g}]')
  cost = figures['flops_per_token']
  lines.append(f'FLOPs a token, of this ladder: {cost["factor"]:.3g} '
               f'N^{cost["power"]:.3f}')
  lines.append(f'{"budget (FLOPs)":<16}{"parameters":<30}{"tokens":<30}loss')
  for optimum in figures['optima']:
    lines.append(_format_optimum(figures, optimum))
  lines.append('95 % intervals are of a bootstrap over the residuals of this '
               'law: they do not know that another law may hold.')
  return '\n'.join(lines)


def _format_optimum(figures: dict, optimum: dict) -> str:
  """Returns the line of the best size for one budget.

  Args:
    figures: the figures of the law, as `describe_law` returns them.
    optimum: one of its optima.
  """
  budget = f'{optimum["budget"]:<16.3g}'
  if 'loss' not in optimum:
    return (f'{budget}no optimum: an exponent is 0 as far as this ladder can '
            'tell')
  params = _format_interval(optimum['parameters'], '.3g')
  tokens = _format_interval(optimum['tokens'], '.3g')
  loss = _format_interval(optimum['loss'], '.3f')
  # The fields that lie outside of the runs to which the law was fitted.
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


def fit_by_field(sweep, field: str, count: str, budgets, draws: int) -> dict:
  """Fits a law for each value of a config field, the base's value first, and
  the differences of the exponents of the others from those of the base.

  Args:
    sweep: the ladder, as curves.load_sweep returns it.
    field: the name of the field.
    count: the parameters that are counted, 'params' or 'active_params'.
    budgets: the FLOPs to find the best size for.
    draws: how many laws each bootstrap draws.

  Raises:
    RequestError: where there is no such field, or only one value of it.
  """
  ladders = _ladder_by_value(sweep, field)
  runs, laws, drawn = {}, {}, {}
  for value, points in ladders.items():
    runs[value] = runs_of_ladder(points, count,
                                 f'{field}={value} of {sweep.name}', field)
    laws[value] = fit_law(runs[value].params, runs[value].tokens,
                          runs[value].losses)
    drawn[value] = _bootstrap_runs(laws[value], runs[value], draws)

  # The others beside the base, whose value comes first.
  first, *others = ladders
  differences = []
  for value in others:
    is_paired = _rungs_of_ladder(ladders[value]) == _rungs_of_ladder(
        ladders[first])
    theirs = drawn[value]
    if not is_paired:
      # Else what is drawn of both would hang together by chance.
      theirs = _bootstrap_runs(laws[value], runs[value], draws, seed=1)
    row = {'variant': value, 'against': first, 'paired': is_paired}
    for exponent in ('a', 'b'):
      row[exponent] = _difference_of_exponents(
          laws=(laws[value], laws[first]), drawn=(theirs, drawn[first]),
          exponent=exponent)
    differences.append(row)

  variants = {}
  for value in ladders:
    variants[value] = describe_law(law=laws[value], drawn=drawn[value],
                                   runs=runs[value], budgets=budgets)
  return {'field': field, 'differences': differences, 'variants': variants}


def _ladder_by_value(sweep, field: str) -> dict[str, list]:
  """Returns the points of each value of a field, the base's first.

  Raises:
    RequestError: where there is no such field, or only one value of it.
  """
  require(field in sweep.base_config,
          f'--by is {field!r}, which is no config field')
  value_of_base = sweep.base_config[field]
  ladders: dict[str, list] = {str(value_of_base): []}
  for point in sweep.points:
    value = str(point.changes.get(field, value_of_base))
    ladders.setdefault(value, []).append(point)
  require(len(ladders) > 1, f'--by is {field!r}, which is '
          f'{str(value_of_base)!r} at every point of {sweep.name}: name a '
          'field of which it has two values')
  return ladders


def _bootstrap_runs(law: Law, runs: Runs, draws: int,
                    seed: int = 0) -> list[Law]:
  """Returns the laws that `bootstrap_laws` draws for the runs of a ladder."""
  return bootstrap_laws(law=law, params=runs.params, tokens=runs.tokens,
                        losses=runs.losses, draws=draws, seed=seed)


def _difference_of_exponents(laws: tuple[Law, Law],
                             drawn: tuple[list[Law], list[Law]],
                             exponent: str) -> dict:
  """Returns an exponent of the first of two laws minus that of the second, with
  the interval of the difference by the bootstraps of both."""
  ours, theirs = laws
  differences = []
  for our_draw, their_draw in zip(*drawn):
    differences.append(
        getattr(our_draw, exponent) - getattr(their_draw, exponent))
  return _percentile_interval(
      getattr(ours, exponent) - getattr(theirs, exponent),
                   differences)


def _rungs_of_ladder(points: Sequence) -> list[tuple]:
  """Returns tokens, rank of the size and seed of each run, in the order of
  `runs_of_ladder`."""
  sizes = sorted({point.params for point in points})
  rungs = []
  for point in points:
    rank = sizes.index(point.params)
    rungs += [(point.tokens, rank, seed) for seed in point.final_losses]
  return sorted(rungs)


def format_laws_by_field(figures: Mapping) -> str:
  """Renders `fit_by_field` for a terminal."""
  parts = [f'{figures["field"]}={value}\n{format_law(law)}'
           for value, law in figures['variants'].items()]
  lines = ['How the exponents differ, with 95 % intervals:']
  for row in figures['differences']:
    for name, of in (('a', 'parameters'), ('b', 'tokens')):
      x = row[name]
      line = (f'  {name} ({of}), {row["variant"]} - {row["against"]}: '
              f'{x["value"]:+.4f} [{x["low"]:+.4f}, {x["high"]:+.4f}]')
      if x['low'] <= 0 <= x['high']:
        line += ', inside the noise'
      if not row['paired']:
        line += ' (their runs are no pairs)'
      lines.append(line)
  return '\n\n'.join([*parts, '\n'.join(lines)])
