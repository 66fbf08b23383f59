"""Equal cost: solves one field of each point so that it costs what the base
costs. What cannot be matched is refused."""

from collections.abc import Callable
import dataclasses
import functools
import math

from configs.errors import RequestError
from tools.compare import spec

# --match: the figure of a point (cost.Cost) that is made equal.
WHAT = ('params', 'active_params', 'flops_per_token')
FIELD = 'model.d_ff'
TOLERANCE = 0.01  # what may be off at most
NEAR = 0.0025  # what is left alone, or rounded for
STEP = 8  # a width that hardware likes
LARGEST = 2 ** 24


def match(sweep: spec.Sweep, what: str, field: str,
          cost: Callable) -> spec.Sweep:
  """Returns the sweep with `field` solved in each point that needs it.

  A point within 0.25 % of the base is left alone. Else the field becomes the
  multiple of 8 that comes as near or, if none does, the nearest integer.

  Args:
    sweep: as read.
    what: of WHAT.
    field: an integer field of the config by which the cost grows.
    cost: config -> a number, the figure `what`.

  Raises:
    ValueError: naming the point that cannot be matched, and why.
  """
  spec.changed(sweep.base, {field: STEP}, '--match_field')  # it is an integer
  target = cost(sweep.base)
  points = []
  for point in sweep.points:
    try:
      points.append(_solved(sweep, point, what, field, cost, target))
    except RequestError as error:
      raise RequestError(f'point {point.name!r}: {error}') from error
  return dataclasses.replace(sweep, points=tuple(points), match=what)


def _solved(sweep, point, what, field, cost, target) -> spec.Point:
  @functools.cache  # because it traces a model
  def figure(value) -> float:
    changes = {**point.changes, field: value}
    return cost(spec.changed(sweep.base, changes, 'it'))

  def off(value) -> float:
    return abs(figure(value) / target - 1)

  if abs(cost(sweep.config(point)) / target - 1) <= NEAR:
    return point
  if field in point.changes:
    raise RequestError(
        f'it sets {field}, which --match={what} would solve: '
        'name another field with --match_field, or leave it out of the point')
  if (sweep.config(point).model.parametrization == 'mup'
      and not field.endswith('layers')):
    raise RequestError(
        f'it is in muP, whose widths go together, and --match={what} would '
        f'change {field} alone: match by the number of layers '
        '(--match_field=model.num_layers), or not at all')
  best = None
  for step, enough in ((STEP, NEAR), (1, TOLERANCE)):
    step = _step(sweep, point, field, step)
    best = min(_around(figure, target, step), key=off, default=None)
    if best is not None and off(best) <= enough:
      return spec.Point(point.name, {**point.changes, field: best}, (field,))
  near = '' if best is None else (
      f': {field}={best} comes nearest, at {figure(best):,.0f}')
  raise RequestError(
      f'it cannot be matched: no {field} gives it the {what} '
      f'of the base, {target:,.0f}, within {TOLERANCE:.0%}{near}. Match '
      f'something else of {", ".join(WHAT)}, or by another --match_field')


def _step(sweep, point, field: str, step: int) -> int:
  """Heads must divide the width that is solved for."""
  model = sweep.config(point).model
  if field == 'model.d_model' and not model.head_dim:
    return math.lcm(step, 2 * model.num_heads)
  return 1 if field.endswith('layers') else step


def _around(figure, target: float, step: int) -> list[int]:
  """Returns the multiples of `step` on both sides of the target; one or none
  where the cost does not reach so far."""
  low, high = 1, 2
  at_low = figure(low * step)
  if at_low >= target:
    return [low * step]
  # Costs are almost linear in a width: a step along the line through two of
  # them comes near the target, and another one brackets it.
  while (at_high := figure(high * step)) < target:
    if at_high <= at_low or high * step > LARGEST:
      return []  # the field changes nothing here
    more = (target - at_high) / ((at_high - at_low) / (high - low))
    low, at_low = high, at_high
    high = max(high + 1, min(high + math.ceil(more), 2 * LARGEST // step))
  while high - low > 1:
    share = (target - at_low) / (at_high - at_low)
    middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
    if (at_middle := figure(middle * step)) < target:
      low, at_low = middle, at_middle
    else:
      high, at_high = middle, at_middle
  return [low * step, high * step]
