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
import operator
from typing import NamedTuple

import numpy as np

from common.errors import RequestError, require
from common.fields import check_number

DELTA = 1e-3
CONSTANTS = ('E', 'A', 'B', 'a', 'b')
MIN_RUNS, MIN_SIZES, MIN_LENGTHS = 6, 3, 3
MAX_CORRELATION = 0.97
# The starts: exponents, log E, log A and log B, as in the paper.
EXPONENTS = (0.0, 0.5, 1.0, 1.5, 2.0)
LOG_E = (-1.0, -0.5, 0.0, 0.5, 1.0)
LOG_SCALES = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
POLISHED = 100  # of the starts: those with the least error
# Of log E, log A, log B, a, b: an exponent of 0 cannot be told from E.
BOUNDS = ((-12, 6), (-30, 90), (-30, 90), (0, 8), (0, 8))


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
  budgets = _budgets(args.budgets)
  sweep = curves.load_sweep(args.workdir)
  if args.by:
    figures = report_by(sweep, args.by, args.count, budgets, args.draws)
  else:
    runs = data(sweep.points, args.count, args.workdir)
    law = fit(*runs[:3])
    figures = described(law, bootstrap(law, *runs[:3], args.draws), runs,
                        budgets)
  print(json.dumps(figures, indent=2) if args.json else
        text_by(figures) if args.by else text(figures))
  return 0


def _budgets(text: str) -> list[float]:
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
  """The five constants of L(N, D) = E + A / N^a + B / D^b."""
  E: float
  A: float
  B: float
  a: float
  b: float

  def loss(self, params, tokens):
    return (self.E + self.A * np.asarray(params, float) ** -self.a
            + self.B * np.asarray(tokens, float) ** -self.b)


@dataclasses.dataclass(frozen=True)
class Cost:
  """FLOPs of a token as factor x N^power: 6 N in the paper."""
  factor: float = 6.0
  power: float = 1.0

  def per_token(self, params):
    return self.factor * np.asarray(params, float) ** self.power


class Runs(NamedTuple):
  """The runs of a ladder, an entry each: arrays."""
  params: np.ndarray
  tokens: np.ndarray
  losses: np.ndarray
  flops_per_token: np.ndarray


def data(points, count: str, who: str, beside: str = '') -> Runs:
  """Returns every run of a ladder, by tokens, parameters and seed.

  Args:
    points: of one ladder.
    count: which parameters.
    who: has them.
    beside: a field that the points may set though it is no size.

  Raises:
    RequestError: where they are no ladder.
  """
  for point in points:
    kinds = [f'{key}={value}' for key, value in point.changes.items()
             if isinstance(value, str | bool | list | dict) and key != beside]
    require(not kinds, f'point {point.name!r} sets {", ".join(kinds)}: a law '
            'is fitted to sizes and lengths of one model, as in '
            'configs/sweeps/ladder.py; --by=FIELD fits one for each value of a '
            'field')
  done = [point for point in points if point.finals]
  require(bool(done), f'{who} has no finished run')
  done.sort(key=lambda p: (p.tokens, getattr(p, count)))
  _check_rungs(done, count)
  return Runs(*map(np.array, zip(*(
      (getattr(point, count), point.tokens, loss, point.flops_per_token)
      for point in done for _, loss in sorted(point.finals.items())))))


def _check_rungs(points, count: str) -> None:
  """Raises RequestError for two points of one size and length: what else they
  differ in, the law does not know."""
  rungs = {}
  for point in points:
    size = getattr(point, count), point.tokens
    other = rungs.setdefault(size, point)
    keys = [key for key in {**other.changes, **point.changes}
            if other.changes.get(key) != point.changes.get(key)]
    require(other is point, f'points {other.name!r} and {point.name!r} have '
            f'both {size[0]:,} {count} and {size[1]:,} tokens, and differ in '
            f'{", ".join(keys)}: a law is fitted to one point of each size and '
            'length')


def check_ladder(params: Sequence[float], tokens: Sequence[float]) -> None:
  """Raises RequestError where a ladder is too small to fix five constants, and
  to leave residuals."""
  x, y = np.log(np.asarray(params, float)), np.log(np.asarray(tokens, float))
  for rows, least, things in (
      (np.stack([x, y], 1), MIN_RUNS, 'pairs of parameters and tokens'),
      (x[:, None], MIN_SIZES, 'numbers of parameters'),
      (y[:, None], MIN_LENGTHS, 'numbers of tokens')):
    have = len(_distinct(rows))
    require(have >= least, f'the ladder has {have} different {things}: the '
            f'five constants of the law need {least}; add points that vary the '
            'model\'s size and train.steps')
  correlation = float(np.corrcoef(x, y)[0, 1])
  require(abs(correlation) <= MAX_CORRELATION, 'tokens rise with parameters '
          f'(correlation {correlation:.3f} of their logarithms, at most '
          f'{MAX_CORRELATION}): what each contributes cannot be told apart; '
          'add points that vary train.steps at one size')


def _distinct(x: np.ndarray) -> list[np.ndarray]:
  """Rows that differ by more than 1 % (x are logarithms)."""
  rows: list[np.ndarray] = []
  for row in x:
    if all(np.max(np.abs(row - other)) > 0.01 for other in rows):
      rows.append(row)
  return rows


def fit(params: Sequence[float], tokens: Sequence[float],
        losses: Sequence[float]) -> Law:
  """Returns the law that fits runs best; RequestError where the ladder is too
  small."""
  check_ladder(params, tokens)
  x, y, z = (np.log(np.asarray(v, float)) for v in (params, tokens, losses))
  grid = np.stack(np.meshgrid(LOG_E, LOG_SCALES, LOG_SCALES, EXPONENTS,
                              EXPONENTS, indexing='ij'), -1).reshape(-1, 5)
  errors = np.array([objective(theta, x, y, z)[0] for theta in grid])
  return _best(grid[np.argsort(errors, kind='stable')[:POLISHED]], x, y, z)


def bootstrap(law: Law, params, tokens, losses, draws: int, seed: int = 0
              ) -> list[Law]:
  """Returns laws of `draws` ladders whose residuals are drawn anew.

  Two ladders of as many runs in the same order, drawn with the same seed, get
  the residuals of the same runs: what a size, a length and a seed do to both
  then cancels in the difference of their laws.
  """
  x, y, z = (np.log(np.asarray(v, float)) for v in (params, tokens, losses))
  fitted = np.log(law.loss(params, tokens))
  residuals = (z - fitted) * math.sqrt(len(z) / (len(z) - len(CONSTANTS)))
  start = [math.log(law.E), math.log(law.A), math.log(law.B), law.a, law.b]
  rng = np.random.default_rng(seed)
  return [_best([start], x, y, fitted + rng.choice(residuals, len(z)))
          for _ in range(draws)]


def _best(starts, x, y, z) -> Law:
  from scipy.optimize import minimize
  fits = [minimize(objective, theta, args=(x, y, z), jac=True,
                    method='L-BFGS-B', bounds=BOUNDS,
                    options=dict(maxiter=5000, ftol=1e-15, gtol=1e-10))
           for theta in starts]
  theta = min(fits, key=lambda result: result.fun).x
  return Law(*map(float, np.exp(theta[:3])), *map(float, theta[3:]))


def objective(theta, x, y, z) -> tuple[float, np.ndarray]:
  """Returns the summed Huber loss of log L, and its gradient.

  Args:
    theta: log E, log A, log B, a, b.
    x, y, z: logarithms of parameters, tokens and losses.
  """
  terms = np.stack([np.full_like(x, theta[0]), theta[1] - theta[3] * x,
                    theta[2] - theta[4] * y])
  total = np.logaddexp.reduce(terms)
  r = total - z
  size = np.abs(r)
  value = np.where(size <= DELTA, r * r / 2, DELTA * (size - DELTA / 2)).sum()
  pull = np.clip(r, -DELTA, DELTA) * np.exp(terms - total)
  gradient = np.array([*pull.sum(1), -(pull[1] * x).sum(),
                       -(pull[2] * y).sum()])
  scale = 1 / DELTA ** 2  # L-BFGS stops by absolute size of the gradient
  return value * scale, gradient * scale


def optimum(law: Law, cost: Cost, budget: float) -> tuple[float, float]:
  """Returns the parameters and tokens that make the loss least for a budget.

  D = budget / (factor N^power); where dL/dN = 0,
  N^(a + power b) = a A / (power b B) (budget / factor)^b.
  """
  p = cost.power
  params = (law.a * law.A / (p * law.b * law.B)
            * (budget / cost.factor) ** law.b) ** (1 / (law.a + p * law.b))
  return params, budget / float(cost.per_token(params))


def cost_of(params: Sequence[float], flops_per_token: Sequence[float]) -> Cost:
  """Returns the FLOPs of a token as a power of N, through a ladder's own."""
  power, factor = np.polyfit(np.log(params), np.log(flops_per_token), 1)
  return Cost(float(np.exp(factor)), float(power))


def described(law: Law, drawn: list[Law], runs: Runs, budgets) -> dict:
  """Returns what `fit` prints of a law and those drawn around it."""
  params, tokens, losses, flops_per_token = runs
  cost = cost_of(params, flops_per_token)
  budgets = budgets or [float(np.max(tokens * flops_per_token)) * scale
                        for scale in (1, 10, 100)]
  residuals = np.log(losses / law.loss(params, tokens))
  return {
      'runs': len(losses),
      'parameters': _ends(params), 'tokens': _ends(tokens),
      'rms_log_residual': float(np.sqrt(np.mean(residuals ** 2))),
      'constants': _with_intervals(dataclasses.asdict, law, drawn),
      'flops_per_token': dataclasses.asdict(cost),
      'optima': [_optimum(law, drawn, cost, budget) for budget in budgets]}


def _ends(values: np.ndarray) -> list[float]:
  return [float(values.min()), float(values.max())]


def _with_intervals(figures, law: Law, drawn) -> dict[str, dict]:
  """Returns the figures of a law by name, with those of laws around it."""
  each = [figures(other) for other in drawn]
  return {name: _interval(value, [other[name] for other in each])
          for name, value in figures(law).items()}


def _interval(value: float, drawn: Sequence[float]) -> dict:
  low, high = map(float, np.percentile(drawn, [2.5, 97.5]))
  return {'value': float(value), 'low': low, 'high': high}


def _optimum(law, drawn, cost, budget: float) -> dict:
  """The best size for a budget; {'budget': ...} alone where an exponent is 0
  and no size is the best."""
  kept = [other for other in drawn if min(other.a, other.b) > 0.01]
  if min(law.a, law.b) <= 0.01 or len(kept) < 0.95 * len(drawn):
    return {'budget': budget}

  def best(of: Law) -> dict[str, float]:
    params, tokens = optimum(of, cost, budget)
    return {'parameters': params, 'tokens': tokens,
            'loss': of.loss(params, tokens)}

  return {'budget': budget} | _with_intervals(best, law, kept)


def text(f: dict) -> str:
  """Renders `report` for a terminal."""
  lines = [f'L(N, D) = E + A / N^a + B / D^b, of {f["runs"]} runs; '
           f'rms residual of log L {f["rms_log_residual"]:.2e}']
  lines += [f'  {name}  {x["value"]:>10.4g}  [{x["low"]:.4g}, {x["high"]:.4g}]'
            for name, x in f['constants'].items()]
  cost = f['flops_per_token']
  lines += [f'FLOPs a token, of this ladder: {cost["factor"]:.3g} '
            f'N^{cost["power"]:.3f}',
            f'{"budget (FLOPs)":<16}{"parameters":<30}{"tokens":<30}loss',
            *(_optimum_line(f, row) for row in f['optima']),
            '95 % intervals are of a bootstrap over the residuals of this '
            'law: they do not know that another law may hold.']
  return '\n'.join(lines)


def _optimum_line(f: dict, row: dict) -> str:
  if 'loss' not in row:
    return (f'{row["budget"]:<16.3g}no optimum: an exponent is 0 as far as '
            'this ladder can tell')
  params, tokens, loss = (
      f'{x["value"]:{form}} [{x["low"]:{form}}, {x["high"]:{form}}]'
      for x, form in ((row['parameters'], '.3g'), (row['tokens'], '.3g'),
                      (row['loss'], '.3f')))
  outside = [name for name in ('parameters', 'tokens') if not (
      f[name][0] <= row[name]['value'] <= f[name][1])]
  beyond = (f'  extrapolated: {" and ".join(outside)} beyond the ladder'
            if outside else '')
  return f'{row["budget"]:<16.3g}{params:<30}{tokens:<30}{loss}{beyond}'


def report_by(sweep, field: str, count: str, budgets, draws: int) -> dict:
  """Returns the law of each value that the points have of a field, the base's
  first, and how the exponents of the others differ from its.

  Raises:
    RequestError: where there is no such field, or only one value of it.
  """
  require(field in sweep.base_config,
          f'--by is {field!r}, which is no config field')
  of_base = sweep.base_config[field]
  ladders: dict[str, list] = {str(of_base): []}
  for point in sweep.points:
    ladders.setdefault(str(point.changes.get(field, of_base)), []).append(point)
  require(len(ladders) > 1, f'--by is {field!r}, which is '
          f'{next(iter(ladders))!r} at every point of {sweep.name}: name a '
          'field of which it has two values')
  runs = {value: data(points, count, f'{field}={value} of {sweep.name}', field)
          for value, points in ladders.items()}
  laws = {value: fit(*each[:3]) for value, each in runs.items()}
  drawn = {value: bootstrap(laws[value], *each[:3], draws)
           for value, each in runs.items()}
  first, *others = runs
  differences = []
  for value in others:
    is_paired = _rungs(ladders[value]) == _rungs(ladders[first])
    # Else what is drawn of both would hang together by chance.
    theirs = drawn[value] if is_paired else bootstrap(
        laws[value], *runs[value][:3], draws, seed=1)
    differences.append({
        'variant': value, 'against': first, 'paired': is_paired} | {
            name: _interval(of(laws[value]) - of(laws[first]), [
                of(x) - of(y) for x, y in zip(theirs, drawn[first])])
            for name in ('a', 'b') for of in [operator.attrgetter(name)]})
  return {'field': field, 'differences': differences, 'variants': {
      value: described(laws[value], drawn[value], runs[value], budgets)
      for value in runs}}


def _rungs(points: Sequence) -> list[tuple]:
  """Returns tokens, rank of the size and seed of each run, in the order of
  `data`."""
  sizes = sorted({point.params for point in points})
  return sorted((point.tokens, sizes.index(point.params), seed)
                for point in points for seed in point.finals)


def text_by(figures: Mapping) -> str:
  """Renders `report_by` for a terminal."""
  parts = [f'{figures["field"]}={value}\n{text(law)}'
           for value, law in figures['variants'].items()]
  lines = ['How the exponents differ, with 95 % intervals:']
  for row in figures['differences']:
    for name, of in (('a', 'parameters'), ('b', 'tokens')):
      x = row[name]
      lines.append(
          f'  {name} ({of}), {row["variant"]} - {row["against"]}: '
          f'{x["value"]:+.4f} [{x["low"]:+.4f}, {x["high"]:+.4f}]'
          + ', inside the noise' * (x['low'] <= 0 <= x['high'])
          + ' (their runs are no pairs)' * (not row['paired']))
  return '\n\n'.join([*parts, '\n'.join(lines)])
