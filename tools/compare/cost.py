"""cost: what one point costs, everything that a run would refuse in it, and
points of equal cost. Without device work: the config is checked, and the model
built by eval_shape."""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import NamedTuple

import jax

from common.errors import RequestError, require
from tools.compare import spec
from training import objectives, preflight, runs
from training.costs import flops, totals
from training.data import tokenizers
from training.objectives import pipeline

# The shares by which a cost that is made equal to the base's may be off: at
# most, and so that it is left alone.
LARGEST_SHARE_OFF, SHARE_OFF_LEFT_ALONE = 0.01, 0.0025
STEP_OF_WIDTHS = 8  # a width that hardware likes
LARGEST_WIDTH = 2 ** 24
# Points of a sweep ask for the same ones many times.
_tokenizer = functools.cache(tokenizers.load)
_parameters = functools.cache(totals.count_parameters)


class Cost(NamedTuple):
  """Figures of a config.

  Attributes:
    params: the number of parameters.
    active_params: the number of these that work for one token.
    flops_per_token: the FLOPs of a training step, forward and backward, a
      token.
    tokens: the number of tokens of the whole run.
  """
  params: int
  active_params: int
  flops_per_token: float
  tokens: int


def keep_off_accelerators() -> None:
  """Keeps this process off the accelerators: its children need them."""
  jax.config.update('jax_platforms', 'cpu')


def cost_of_run(config) -> Cost:
  """Returns what a run of `config` costs; ValueError for a bad model."""
  length = sum(objectives.find_objective(config).row_lengths(config))
  params, active_params = _parameters(resolve_model(config))
  rows = int(pipeline.read_ramp(config).before(config.train.steps))
  return Cost(params=params, active_params=active_params,
              flops_per_token=_flops_per_token(config), tokens=rows * length)


def _flops_per_token(config) -> float:
  """Returns the FLOPs of training on one token."""
  flops_by_part = flops.training_flops_of_row(config, resolve_model(config))
  flops_of_row = sum(flops_by_part.values())
  return flops_of_row / sum(
      objectives.find_objective(config).row_lengths(config))


def share_of_flops_without_vocabulary(config) -> float:
  """Returns the share of the FLOPs of training that is not for products with
  the vocabulary, which grow in proportion to it."""
  model = resolve_model(config)
  doubled = dataclasses.replace(model, vocab_size=model.vocab_size * 2)
  once = sum(flops.training_flops_of_row(config, model).values())
  twice = sum(flops.training_flops_of_row(config, doubled).values())
  return 2 - twice / once


def one_cost_figure(config, what: str) -> float:
  """Returns one figure of a Cost alone, of spec.MATCHABLE_COSTS: each takes a
  trace that the others do not need."""
  if what == 'flops_per_token':
    return _flops_per_token(config)
  params, active_params = _parameters(resolve_model(config))
  return active_params if what == 'active_params' else params


def check_config_of_point(config, changes: Mapping) -> None:
  """Raises RequestError for whatever a run of `config`, of which `changes` were
  made, would refuse before it starts, and for what no comparison can have."""
  preflight.check_config(config)
  preflight.refuse_unread_fields(changes, config,
                                 runs.resolve_model_without_tokenizer(config))
  require(not config.eval.patience, f'eval.patience is {config.eval.patience}: '
          'runs are compared after their last step, and none ends before it; '
          'leave it at 0')
  pipeline.check_sources(config)


def hash_data_of_configs(configs) -> dict[str, str]:
  """Returns a hash of what each source and tokenizer of some configs holds, by
  its name, as far as they lie on this machine."""
  by_data = {str(config.data): config for config in configs}
  hashes = {}
  for config in by_data.values():
    hashes |= pipeline.digest_contents(config,
                                       _tokenizer(config.data.tokenizer))
  return hashes


def resolve_model(config):
  """Returns the model of a run, its open fields filled in."""
  model, *_ = runs.resolve_model(config, _tokenizer(config.data.tokenizer))
  return model


def match_costs(sweep: spec.Sweep, what: str, field: str) -> spec.Sweep:
  """Returns the sweep with `field` solved in each point that needs it.

  A point within 0.25 % of the base is left alone. Else the field becomes the
  multiple of 8 that comes as near or, if none does, the nearest integer.

  Args:
    sweep: the sweep that was read.
    what: the figure of a Cost that is made equal, of spec.MATCHABLE_COSTS.
    field: an integer field of the config by which the cost grows.

  Raises:
    RequestError: naming the point that cannot be matched, and why.
  """
  spec.apply_changes(
      sweep.base, {field: STEP_OF_WIDTHS}, '--match_field')  # it is an integer
  target = one_cost_figure(sweep.base, what)
  points = []
  for point in sweep.points:
    with spec.prefix_errors(f'point {point.name!r}'):
      points.append(_solved(sweep, point, what, field, target))
  return dataclasses.replace(sweep, points=tuple(points))


def _solved(sweep: spec.Sweep, point: spec.Point, what: str, field: str,
            target: float) -> spec.Point:
  """Returns a point with `field` solved, as `match` does; `target` is the cost
  of the base."""
  @functools.cache  # because it traces a model
  def cost(value: int) -> float:
    """Returns the cost of the point with a value of the field."""
    changes = {**point.changes, field: value}
    return one_cost_figure(spec.apply_changes(sweep.base, changes, 'it'), what)

  def off(value: int) -> float:
    """Returns how far the cost of a value is from the target."""
    return abs(cost(value) / target - 1)

  config = sweep.config_of_point(point)
  if abs(one_cost_figure(config, what) / target - 1) <= SHARE_OFF_LEFT_ALONE:
    return point
  require(field not in point.changes, f'it sets {field}, which --match={what} '
          'would solve: name another field with --match_field, or leave it out '
          'of the point')
  counts_layers = field.endswith('layers')
  if config.model.parametrization == 'mup' and not counts_layers:
    raise RequestError(
        'it is in muP, whose '
        f'widths go together, and --match={what} would change {field} alone: '
        'match by the number of layers (--match_field=model.num_layers), or '
        'not at all')

  # A width that hardware likes, or else any.
  heads = 1
  if field == 'model.d_model' and not config.model.head_dim:
    heads = 2 * config.model.num_heads  # they must divide the width
  best = None
  for step, enough in (
      (STEP_OF_WIDTHS, SHARE_OFF_LEFT_ALONE), (1, LARGEST_SHARE_OFF)):
    step = 1 if counts_layers else math.lcm(step, heads)
    best = min(_around(cost, target, step), key=off, default=None)
    if best is not None and off(best) <= enough:
      return spec.Point(name=point.name,
                        changes={**point.changes, field: best},
                        matched=(field,))
  near = ''
  if best is not None:
    near = f': {field}={best} comes nearest, at {cost(best):,.0f}'
  raise RequestError(
      f'it cannot be matched: no {field} gives it the {what} '
      f'of the base, {target:,.0f}, within {LARGEST_SHARE_OFF:.0%}{near}. '
      f'Match something else of {", ".join(spec.MATCHABLE_COSTS)}, or by '
      'another --match_field')


def _around(cost, target: float, step: int) -> list[int]:
  """Returns the multiples of `step` on both sides of the target; one or none
  where the cost does not reach so far."""
  low, high = 1, 2

  def on_the_line() -> float:
    """Costs are almost linear in a width: where a line reaches the target."""
    rise = (cost(high * step) - cost(low * step)) / (high - low)
    return low + (target - cost(low * step)) / rise

  if cost(step) >= target:
    return [step]
  while cost(high * step) < target:
    if cost(high * step) <= cost(low * step) or high * step > LARGEST_WIDTH:
      return []  # the field changes nothing here
    further = min(math.ceil(on_the_line()), 2 * LARGEST_WIDTH // step)
    low, high = high, max(high + 1, further)
  while high - low > 1:
    middle = min(max(int(on_the_line()), low + 1), high - 1)
    if cost(middle * step) < target:
      low = middle
    else:
      high = middle
  return [low * step, high * step]
