"""fit --by=FIELD: a scaling law for each variant, and whether their exponents
differ.

The interval of a difference is of a bootstrap over the residuals of both laws
(scaling.bootstrap). Where both ladders have the same lengths and seeds, rung by
rung, the residuals of both are drawn together, as pairs: what a length and a
seed do to both cancels.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from configs.errors import require
from tools.compare import laws, layout, scaling
from tools.compare.sweep_report.curves import Point, Sweep

EXPONENTS = ('a', 'b')


@dataclasses.dataclass(frozen=True)
class Ladders:
  """The points of a sweep by the value of a field, the base's first."""
  workdir: str
  field: str
  points: Mapping[str, Sequence[Point]]


def ladders(sweep: Sweep, workdir, field: str) -> Ladders:
  """Returns the points of each value of a field.

  Raises:
    RequestError: where there is no such field, or only one value of it.
  """
  from training.workdir import run_config
  config = run_config.flatten(run_config.from_json(
      layout.load_description(workdir)['base_config']))
  require(field in config, f'--by is {field!r}, which is no config field')
  found: dict[str, list[Point]] = {str(config[field]): []}
  for point in sweep.points:
    found.setdefault(str(point.changes.get(field, config[field])), []).append(
        point)
  found = {value: points for value, points in found.items() if points}
  require(len(found) > 1, f'--by is {field!r}, which is {next(iter(found))!r} '
          f'at every point of {workdir}: name a field of which it has two '
          'values')
  return Ladders(str(workdir), field, found)


def report(own: Ladders, count: str, budgets, draws: int) -> dict:
  """Returns the law of each variant, and the differences of their exponents
  from the first one's."""
  told, fitted = {}, {}
  for value, points in own.points.items():
    runs = laws.data(points, count, f'{own.field}={value} of {own.workdir}',
                     own.field)
    law = runs.fit()
    drawn = runs.bootstrap(law, draws)
    told[value] = laws.described(law, drawn, runs, budgets)
    fitted[value] = law, drawn, _rungs(points)
  first, *others = fitted
  return {'field': own.field, 'variants': told, 'differences': [
      _difference(value, first, fitted, draws, own, count)
      for value in others]}


def _difference(value: str, first: str, fitted, draws: int, own: Ladders,
                count: str) -> dict:
  law, drawn, rungs = fitted[value]
  base, base_drawn, base_rungs = fitted[first]
  pairs = rungs == base_rungs
  if not pairs:  # else what is drawn of both would hang together by chance
    runs = laws.data(own.points[value], count, own.workdir, own.field)
    drawn = runs.bootstrap(law, draws, seed=1)
  figures = {'variant': value, 'against': first, 'paired': pairs}
  for name in EXPONENTS:
    apart = np.array([getattr(x, name) for x in drawn]) - np.array(
        [getattr(x, name) for x in base_drawn])
    low, high = scaling.percentiles(apart)
    figures[name] = {'value': getattr(law, name) - getattr(base, name),
                     'low': low, 'high': high}
  return figures


def _rungs(points: Sequence[Point]) -> list[tuple]:
  """Returns tokens, rank of the size, shape and seed of each run, as laws.data
  has them in order."""
  ranks = {size: rank for rank, size in enumerate(
      sorted({point.params for point in points}))}
  return sorted((point.tokens, ranks[point.params],
                 np.divide(*laws.sides(point)), seed)
                for point in points for seed in point.finals)


def text(figures: Mapping) -> str:
  """Renders `report` for a terminal."""
  parts = [f'{figures["field"]}={value}\n{laws.text(own)}'
           for value, own in figures['variants'].items()]
  lines = ['How the exponents differ, with 95 % intervals:']
  for row in figures['differences']:
    for name, of in zip(EXPONENTS, ('parameters', 'tokens')):
      x = row[name]
      beyond = not x['low'] <= 0 <= x['high']
      lines.append(
          f'  {name} ({of}), {row["variant"]} - {row["against"]}: '
          f'{x["value"]:+.4f} [{x["low"]:+.4f}, {x["high"]:+.4f}]'
          + ('' if beyond else ', inside the noise')
          + ('' if row['paired'] else ' (their runs are no pairs)'))
  return '\n\n'.join([*parts, '\n'.join(lines)])
