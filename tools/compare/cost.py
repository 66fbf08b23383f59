"""cost: what one point costs, everything that a run would refuse in it, and
points of equal cost. Without device work: the config is checked, and the model
built by eval_shape."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import NamedTuple

import jax

from architectures.parts.config import ModelConfig
from common.errors import RequestError, require
from tools.compare import spec
from training import objectives, preflight, runs
from training.costs import flops, totals
from training.data import tokenizers
from training.objectives import pipeline

# The share by which a cost that is made equal to the base's may be off.
LARGEST_SHARE_OFF = 0.01
# A cost that is off by this share or less is left as it is.
SHARE_OFF_LEFT_ALONE = 0.0025
STEP_OF_WIDTHS = 8  # a width that hardware likes
LARGEST_WIDTH = 2 ** 24  # beyond which no width is tried
# Points of a sweep ask for the same ones many times.
_load_tokenizer = functools.cache(tokenizers.load)
_count_parameters = functools.cache(totals.count_parameters)
_count_by_use = functools.cache(totals.count_parameters_by_use)


class Cost(NamedTuple):
  """Figures of a config.

  Attributes:
    params: the number of parameters.
    active_params: the number of these that work for one token.
    multiplied_params, looked_up_params: the numbers of these in products, and
      in tables that are looked up (totals.count_parameters_by_use).
    flops_per_token: the FLOPs of a training step, forward and backward, a
      token.
    tokens: the number of tokens of the whole run.
  """
  params: int
  active_params: int
  multiplied_params: int
  looked_up_params: int
  flops_per_token: float
  tokens: int


def keep_off_accelerators() -> None:
  """Keeps this process off the accelerators: its children need them."""
  jax.config.update('jax_platforms', 'cpu')


def cost_of_run(config, model: ModelConfig | None = None) -> Cost:
  """Returns what a run costs: the parameters of its model, the FLOPs of a token
  in training, and the tokens that it trains on.

  Args:
    config: the config of the run.
    model: the config of its model with all sizes resolved; None: it is resolved
      here.

  Raises:
    ValueError: for a model that cannot be built.
  """
  model = model or resolve_model(config)
  # An encoder-decoder trains on rows with two lengths.
  length = sum(objectives.find_objective(config).row_lengths(config))
  params, active_params = _count_parameters(model)
  multiplied_params, looked_up_params = _count_by_use(model)
  # The size of the batch may grow in stages, so rows are not steps * batch.
  num_rows = int(pipeline.read_ramp(config).rows_before(config.train.steps))
  return Cost(
      params=params,
      active_params=active_params,
      multiplied_params=multiplied_params,
      looked_up_params=looked_up_params,
      flops_per_token=_flops_per_token(config, model),
      tokens=num_rows * length)


def _flops_per_token(config, model: ModelConfig) -> float:
  """Returns the FLOPs of training on one token of a run with this model, whose
  step is traced for it."""
  flops_by_part = flops.training_flops_of_row(config, model)
  flops_of_row = sum(flops_by_part.values())
  return flops_of_row / sum(
      objectives.find_objective(config).row_lengths(config))


def share_of_flops_without_vocabulary(config) -> float:
  """Returns the share of the FLOPs of training that is spent in the layers, and
  not on products with the vocabulary (the logits).

  Let f(V) be the FLOPs with a vocabulary of V tokens. Those for the logits are
  proportional to V, so they are f(2V) - f(V), and the share of the others is
  1 - (f(2V) - f(V)) / f(V) = 2 - f(2V) / f(V).

  Args:
    config: the config of the run, with the model and the length of a row.

  Returns:
    The share, between 0 and 1.
  """
  model = resolve_model(config)
  doubled = dataclasses.replace(model, vocab_size=model.vocab_size * 2)
  flops_once = sum(flops.training_flops_of_row(config, model).values())
  flops_twice = sum(flops.training_flops_of_row(config, doubled).values())
  return 2 - flops_twice / flops_once


def one_cost_figure(config, name: str) -> float:
  """Returns one figure of the cost of a run. The others are not computed,
  because each kind of figure takes a trace of the model of its own.

  Args:
    config: the config of the run.
    name: the figure, one of spec.MATCHABLE_COSTS: 'flops_per_token', 'params'
      or 'active_params'.
  """
  if name == 'flops_per_token':
    return _flops_per_token(config, resolve_model(config))
  params, active_params = _count_parameters(resolve_model(config))
  return active_params if name == 'active_params' else params


def check_config_of_point(config, changes: Mapping) -> None:
  """Checks the config of a run of a comparison before anything is trained.

  Args:
    config: the config of the run.
    changes: the fields that were changed in it.

  Raises:
    RequestError: for what the run itself would refuse, for a changed field that
      nothing reads, and for early stopping, since runs are compared after their
      last step.
  """
  preflight.check_config(config)
  preflight.refuse_unread_fields(changes, config,
                                 runs.resolve_model_without_tokenizer(config))
  require(not config.eval.patience, f'eval.patience is {config.eval.patience}: '
          'runs are compared after their last step, and none ends before it; '
          'leave it at 0')
  pipeline.check_sources(config)


def hash_data_of_configs(configs) -> dict[str, str]:
  """Returns a hash of what each source of data and each tokenizer of some
  configs holds, by its name, as far as they lie on this machine."""
  config_by_data = {str(config.data): config for config in configs}
  hashes = {}
  for config in config_by_data.values():
    tokenizer = _load_tokenizer(config.data.tokenizer)
    hashes |= pipeline.digest_contents(config, tokenizer)
  return hashes


def resolve_model(config):
  """Returns the model config of a run, with the fields that were left open
  filled in."""
  model, *_ = runs.resolve_model(
      config, _load_tokenizer(config.data.tokenizer))
  return model


def match_costs(sweep: spec.Sweep, cost_name: str, field: str) -> spec.Sweep:
  """Returns a sweep in which every point (a variant of the config) costs what
  the base costs. One field, such as the width of the feed-forward networks, is
  set for that.

  A point within 0.25 % of the base is left alone. Otherwise the field becomes
  the multiple of 8 that comes as near or, if none does, the nearest integer.

  Args:
    sweep: the sweep that was read.
    cost_name: the figure of a Cost that is made equal, of spec.MATCHABLE_COSTS.
    field: an integer field of the config by which the cost grows.

  Raises:
    RequestError: naming the point that cannot be matched, and why.
  """
  # Setting the field to an integer fails here if it is no integer field.
  spec.apply_changes(sweep.base, {field: STEP_OF_WIDTHS}, '--match_field')
  target = one_cost_figure(sweep.base, cost_name)
  points = []
  for point in sweep.points:
    with spec.prefix_errors(f'point {point.name!r}'):
      points.append(_match_cost_of_point(
          sweep=sweep, point=point, cost_name=cost_name, field=field,
          target=target))
  return dataclasses.replace(sweep, points=tuple(points))


def _match_cost_of_point(sweep: spec.Sweep, point: spec.Point, cost_name: str,
                         field: str, target: float) -> spec.Point:
  """Returns a point with the value of a field at which it costs what the base
  costs, as `match_costs` does.

  Args:
    sweep: the sweep.
    point: the point.
    cost_name: the figure of a Cost that is made equal, of spec.MATCHABLE_COSTS.
    field: the field.
    target: the cost of the base.

  Raises:
    RequestError: where the point cannot be matched.
  """
  @functools.cache  # because it traces a model
  def cost(value: int) -> float:
    """Returns the cost of the point with a value of the field."""
    changes = {**point.changes, field: value}
    config = spec.apply_changes(sweep.base, changes, 'it')
    return one_cost_figure(config, cost_name)

  def share_off(value: int) -> float:
    """Returns by which share the cost of a value is off the target."""
    return abs(cost(value) / target - 1)

  # A point that needs no change, or that allows none.
  config = sweep.config_of_point(point)
  if abs(one_cost_figure(config, cost_name) / target
         - 1) <= SHARE_OFF_LEFT_ALONE:
    return point
  require(field not in point.changes, f'it sets {field}, which '
          f'--match={cost_name} would solve: name another field with '
          '--match_field, or leave it out of the point')
  counts_layers = field.endswith('layers')
  # Where the points are equally wide, another width of the networks is one that
  # muP's base has in proportion.
  keeps_proportions = (field == spec.DEFAULT_MATCH_FIELD
                       and config.model.d_model == sweep.base.model.d_model)
  if config.model.parametrization == 'mup':
    require(counts_layers or keeps_proportions, 'it is in muP, whose widths go '
            f'together, and --match={cost_name} would change {field} alone: '
            'match by the number of layers (--match_field=model.num_layers), '
            f'by {spec.DEFAULT_MATCH_FIELD} of points that are as wide as the '
            'base, or not at all')

  # A width that hardware likes, or else any.
  heads = 1
  if field == 'model.d_model' and not config.model.head_dim:
    heads = 2 * config.model.num_heads  # they must divide the width
  best = None
  for step, allowed_share_off in ((STEP_OF_WIDTHS, SHARE_OFF_LEFT_ALONE),
                                  (1, LARGEST_SHARE_OFF)):
    step = 1 if counts_layers else math.lcm(step, heads)
    candidates = _multiples_around_target(cost, target, step)
    best = min(candidates, key=share_off, default=None)
    if best is not None and share_off(best) <= allowed_share_off:
      return spec.Point(name=point.name,
                        changes={**point.changes, field: best},
                        matched=(field,))

  nearest = ''
  if best is not None:
    nearest = f': {field}={best} comes nearest, at {cost(best):,.0f}'
  raise RequestError(
      f'it cannot be matched: no {field} gives it the {cost_name} '
      f'of the base, {target:,.0f}, within {LARGEST_SHARE_OFF:.0%}{nearest}. '
      f'Match something else of {", ".join(spec.MATCHABLE_COSTS)}, or by '
      'another --match_field')


def _multiples_around_target(cost: Callable[[int], float], target: float,
                             step: int) -> list[int]:
  """Finds the two neighbouring multiples of a step, such as of 8, between whose
  costs a target lies. It uses the method of false position (regula falsi),
  which needs few evaluations, because costs are almost linear in a width.

  Args:
    cost: a function from a value of the field to its cost, which rises. It is
      called with the same values again, so it should keep what it has computed.
    target: the cost to be reached.
    step: the step.

  Returns:
    [the largest multiple below the target, the next one]. It is [step] if the
    first multiple reaches the target already, and [] if none does up to
    LARGEST_WIDTH, or if the cost does not rise.
  """
  low, high = 1, 2  # as multiples of the step

  def interpolate() -> float:
    """Returns the multiple at which the line through both costs reaches the
    target."""
    rise = (cost(high * step) - cost(low * step)) / (high - low)
    return low + (target - cost(low * step)) / rise

  # Search outwards, until the target lies between low and high.
  if cost(step) >= target:
    return [step]
  while cost(high * step) < target:
    if cost(high * step) <= cost(low * step) or high * step > LARGEST_WIDTH:
      return []  # the field changes nothing here
    further = min(math.ceil(interpolate()), 2 * LARGEST_WIDTH // step)
    low, high = high, max(high + 1, further)

  # Search inwards, until low and high are neighbours.
  while high - low > 1:
    middle = min(max(int(interpolate()), low + 1), high - 1)
    if cost(middle * step) < target:
      low = middle
    else:
      high = middle
  return [low * step, high * step]
