"""What is fitted to the runs of a ladder, and said of it."""

import dataclasses
import operator
from typing import NamedTuple

import numpy as np

from configs.errors import RequestError
from tools.compare import scaling


class Runs(NamedTuple):
  """The runs of a ladder, an entry each.

  Attributes:
    params, tokens, losses, flops_per_token: of each.
    ratios: of width to depth.
    shapes: the same over the ladder's mean of it (scaling.relative_shapes);
      None where the ladder cannot tell shape from size.
  """
  params: np.ndarray
  tokens: np.ndarray
  losses: np.ndarray
  flops_per_token: np.ndarray
  ratios: np.ndarray
  shapes: np.ndarray | None

  def fit(self) -> scaling.Law:
    return scaling.fit(self.params, self.tokens, self.losses, self.shapes)

  def bootstrap(self, law: scaling.Law, draws: int, seed: int = 0
                ) -> list[scaling.Law]:
    return scaling.bootstrap(law, self.params, self.tokens, self.losses, draws,
                             seed, self.shapes)


def data(points, count: str, who: str, beside: str = '') -> Runs:
  """Returns every run of a ladder, by tokens, parameters, shape and seed.

  Args:
    points: of one ladder.
    count: which parameters.
    who: has them.
    beside: a field that the points may set though it is no size.

  Raises:
    RequestError: where they are no ladder.
  """
  for point in points:
    _check_ladder(point, beside)
  done = [point for point in points if point.finals]
  if not done:
    raise RequestError(f'{who} has no finished run')
  done.sort(key=lambda p: (p.tokens, getattr(p, count), np.divide(*sides(p))))
  widths, depths = zip(*map(sides, done))
  shapes = scaling.relative_shapes(
      widths, depths, [getattr(point, count) for point in done])
  told = np.ones(len(done)) if shapes is None else shapes
  _check_rungs(done, count, told)
  rows = [(getattr(point, count), point.tokens, loss, point.flops_per_token,
           width / depth, shape)
          for point, width, depth, shape in zip(done, widths, depths, told)
          for _, loss in sorted(point.finals.items())]
  *columns, each = map(np.array, zip(*rows))
  return Runs(*columns, None if shapes is None else each)


def sides(point) -> tuple[int, int]:
  """The width and the depth of a point of which a run is done."""
  config = point.runs[min(point.finals)].config
  return config['model.d_model'], config['model.num_layers']


def _check_ladder(point, beside: str) -> None:
  """Raises ValueError for a point that is no other size of the same model."""
  kinds = [f'{key}={value}' for key, value in point.changes.items()
           if isinstance(value, str | bool | list | dict) and key != beside]
  if kinds:
    raise RequestError(
        f'point {point.name!r} sets {", ".join(kinds)}: a law is fitted to '
        'sizes and lengths of one model, as in configs/sweeps/ladder.py; '
        '--by=FIELD fits one for each value of a field')


def _check_rungs(points, count: str, shapes) -> None:
  """Raises ValueError for two points of one size, length and shape: what else
  they differ in, the law does not know."""
  rungs = {}
  for point, shape in zip(points, shapes):
    size = getattr(point, count), point.tokens
    other = rungs.setdefault((*size, round(float(shape), 9)), point)
    if other is not point:
      keys = [key for key in {**other.changes, **point.changes}
              if other.changes.get(key) != point.changes.get(key)]
      raise RequestError(
          f'points {other.name!r} and {point.name!r} have both {size[0]:,} '
          f'{count} and {size[1]:,} tokens, and differ in {", ".join(keys)}: '
          'a law is fitted to one point of each size and length, and of each '
          'shape where model.d_model and model.num_layers vary apart')


def report(runs: Runs, budgets, draws: int) -> dict:
  """Returns all that `fit` prints, of the runs of a ladder."""
  law = runs.fit()
  return described(law, runs.bootstrap(law, draws), runs, budgets)


def described(law: scaling.Law, drawn: list[scaling.Law], runs: Runs, budgets
              ) -> dict:
  """Returns what `fit` prints of a law and those drawn around it."""
  params, tokens, losses, flops_per_token, ratios, shapes = runs
  cost = scaling.cost_of(params, flops_per_token)
  budgets = budgets or [float(np.max(tokens * flops_per_token)) * scale
                        for scale in (1, 10, 100)]
  shape = None if shapes is None else {
      **_with_interval(lambda of: 2 ** of.s - 1, law, drawn),
      'ratios': [float(ratios.min()), float(ratios.max())]}
  return {
      'runs': len(losses),
      'parameters': [float(params.min()), float(params.max())],
      'tokens': [float(tokens.min()), float(tokens.max())],
      'rms_log_residual': float(np.sqrt(np.mean(
          np.log(losses / law.loss(params, tokens, shapes)) ** 2))),
      'constants': {name: _with_interval(operator.attrgetter(name), law, drawn)
                    for name in scaling.CONSTANTS},
      'shape': shape,
      'flops_per_token': dataclasses.asdict(cost),
      'optima': [_optimum(law, drawn, cost, budget) for budget in budgets]}


def _with_interval(figure, law: scaling.Law, drawn) -> dict:
  low, high = scaling.percentiles([figure(other) for other in drawn])
  return {'value': float(figure(law)), 'low': low, 'high': high}


def _optimum(law, drawn, cost, budget: float) -> dict:
  """The best size for a budget; {'budget': ...} alone where an exponent is 0
  and no size is the best."""
  kept = [other for other in drawn if min(other.a, other.b) > 0.01]
  if min(law.a, law.b) <= 0.01 or len(kept) < 0.95 * len(drawn):
    return {'budget': budget}
  best = lambda of: scaling.optimum(of, cost, budget)
  figures = {'parameters': lambda of: best(of)[0],
             'tokens': lambda of: best(of)[1],
             'loss': lambda of: float(of.loss(*best(of)))}
  return {'budget': budget} | {
      name: _with_interval(figure, law, kept)
      for name, figure in figures.items()}


def text(f: dict) -> str:
  """Renders `report` for a terminal."""
  lines = [f'L(N, D) = E + A / N^a + B / D^b, of {f["runs"]} runs; '
           f'rms residual of log L {f["rms_log_residual"]:.2e}']
  for name, x in f['constants'].items():
    lines.append(f'  {name}  {x["value"]:>10.4g}  '
                 f'[{x["low"]:.4g}, {x["high"]:.4g}]')
  if f['shape']:
    x, (least, most) = f['shape'], f['shape']['ratios']
    lines.append(
        'shape: twice the width over the depth, at the same parameters and '
        f'tokens, changes the loss by {x["value"]:+.2%} [{x["low"]:+.2%}, '
        f'{x["high"]:+.2%}]; seen from {least:.3g} to {most:.3g}')
  cost = f['flops_per_token']
  lines += [f'FLOPs a token, of this ladder: {cost["factor"]:.3g} '
            f'N^{cost["power"]:.3f}',
            f'{"budget (FLOPs)":<16}{"parameters":<30}{"tokens":<30}loss']
  for row in f['optima']:
    if 'loss' not in row:
      lines.append(f'{row["budget"]:<16.3g}no optimum: an exponent is 0 as far '
                   'as this ladder can tell')
      continue
    cells = [f'{x["value"]:.3g} [{x["low"]:.3g}, {x["high"]:.3g}]'
             for x in (row['parameters'], row['tokens'])]
    loss = row['loss']
    outside = [name for name in ('parameters', 'tokens') if not (
        f[name][0] <= row[name]['value'] <= f[name][1])]
    lines.append(
        f'{row["budget"]:<16.3g}{cells[0]:<30}{cells[1]:<30}'
        f'{loss["value"]:.3f} [{loss["low"]:.3f}, {loss["high"]:.3f}]'
        + (f'  extrapolated: {" and ".join(outside)} beyond the ladder'
           if outside else ''))
  lines.append('95 % intervals are of a bootstrap over the residuals of this '
               'law: they do not know that another law may hold.')
  return '\n'.join(lines)
