"""Which parameters are trained, at which share of the learning rate, and their
moving average.

optim.freeze names parameters that are not trained. optim.table_rate multiplies
the rate of tables that n-grams look up (model.memory). optim.layer_decay gives
each layer the rate lr * layer_decay ** (N - n), n counted from 0 (Clark et al.
2020, ELECTRA, section 3.1 and table 6; with the exponents of Bao et al. 2022,
BEiT, whose last layer has the first power): the embedding has one power more
than the first layer, and what stands above the layers has the whole rate. Low-
rank adapters (model.lora) leave nothing trained but themselves and what else
declares itself `tuned` (architectures/parts/sharding.py).

A parameter that is not trained has no gradient, no update, no decay and no
state in the optimiser. The layers of a stack share an array: where some of
them are frozen, the state of these rows is there and stays zero.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from architectures.parts import paths
from architectures.parts.sharding import Role
from common.errors import RequestError, require

STACKS = ('encoder', 'decoder')  # from the bottom


def learning_rate_shares(optim: ml_collections.ConfigDict, roles: Any,
                         shapes: Any, adapted: bool = False):
  """Computes the share of each parameter: the factor by which the learning rate
  is multiplied for it, 0 if the parameter is frozen.

  Args:
    optim: config.optim.
    roles: the Role of each parameter.
    shapes: the parameters' shapes.
    adapted: whether the model has low-rank adapters.

  Returns:
    A tree with the share of each parameter: a number, or, where an array holds
    several layers whose shares differ, an array [N, 1, ...] with as many axes
    as the parameter.

  Raises:
    RequestError: for a pattern that is no regular expression or matches no
      parameter, for a rate of tables that are not there, and where nothing
      would be trained.
  """
  patterns = _compile_patterns(optim.freeze)
  has_tables = any(role.reads for role in jax.tree.leaves(roles))
  require(optim.table_rate == 1 or has_tables,
          f'optim.table_rate is {optim.table_rate}, and the model has no '
          'tables that n-grams look up: leave it at 1, or set model.memory')
  shape_of_path = paths.flatten_by_path(shapes)
  stacks = paths.Stacks(shape_of_path)
  _check_patterns(
      patterns, parameter_paths=list(shape_of_path), stacks=stacks)

  def share_of_parameter(key: Any, role: Role, x: Any) -> float | np.ndarray:
    path = paths.path_to_string(key)
    shares_of_layers = []
    for layer_path, power in _layers_and_powers(path, stacks):
      is_frozen = _is_frozen(path, layer_path=layer_path, patterns=patterns,
                             role=role, adapted=adapted)
      shares_of_layers.append(
          _share_of_layer(optim, role=role, power=power, is_frozen=is_frozen))
    return _join_shares(shares_of_layers, ndim=len(x.shape))

  tree = jax.tree_util.tree_map_with_path(share_of_parameter, roles, shapes)
  require(any(map(np.any, jax.tree.leaves(tree))),
          f'optim.freeze is {optim.freeze!r}, which leaves no parameter to '
          'train')
  return tree


def _share_of_layer(optim: ml_collections.ConfigDict, role: Role, power: int,
                    is_frozen: bool) -> float:
  """Returns the factor of the learning rate of one layer of a parameter.

  Args:
    optim: config.optim.
    role: the parameter's Role.
    power: the power of optim.layer_decay for this layer.
    is_frozen: whether the layer is not trained.
  """
  if is_frozen:
    return 0.0
  share = optim.layer_decay ** power
  # A table that n-grams look up has a rate of its own.
  if role.reads:
    share *= optim.table_rate
  return share


def _join_shares(shares_of_layers: list[float], ndim: int
                 ) -> float | np.ndarray:
  """Joins the shares of the layers that one parameter holds.

  Args:
    shares_of_layers: the share of each of these layers, N of them.
    ndim: the number of axes of the parameter, of which the first is its layers.

  Returns:
    A number if all layers have the same share; else an array [N, 1, ...] of
    `ndim` axes.
  """
  if len(set(shares_of_layers)) == 1:
    return shares_of_layers[0]
  other_axes = [1] * (ndim - 1)
  return np.array(shares_of_layers, np.float32).reshape(-1, *other_axes)


def _check_patterns(patterns: list[re.Pattern], parameter_paths: list[str],
                    stacks: paths.Stacks) -> None:
  """Checks that every pattern of optim.freeze freezes something.

  Args:
    patterns: the patterns.
    parameter_paths: the paths of all parameters of the model.
    stacks: which layers each stacked parameter of the model holds.

  Raises:
    RequestError: for a pattern that matches no parameter and no layer of one.
  """
  # A pattern may name a parameter, or one of the layers that it holds.
  layer_paths = []
  for path in parameter_paths:
    for layer_path, _ in _layers_and_powers(path, stacks):
      layer_paths.append(layer_path)

  for pattern in patterns:
    is_used = any(map(pattern.fullmatch, parameter_paths + layer_paths))
    require(is_used, f'optim.freeze has the pattern '
            f'{pattern.pattern!r}, which matches no parameter of the model: '
            f'their paths are such as {", ".join(layer_paths[:3])}, and a '
            'pattern must match all of one')


def _is_frozen(path: str, layer_path: str, patterns: list[re.Pattern],
               role: Role, adapted: bool) -> bool:
  """Returns whether a layer of a parameter is not trained.

  Args:
    path: the path of the parameter.
    layer_path: that of the layer in it; the same where it holds no layers.
    patterns: the patterns of optim.freeze.
    role: the parameter's Role, which says whether it is trained where low-rank
      adapters are (`tuned`).
    adapted: whether the model has low-rank adapters.
  """
  if adapted and not role.tuned:
    return True
  for pattern in patterns:
    if pattern.fullmatch(path) or pattern.fullmatch(layer_path):
      return True
  return False


def _compile_patterns(freeze: str) -> list[re.Pattern]:
  """Returns the regular expressions of optim.freeze, which commas separate."""
  try:
    return [re.compile(text) for text in freeze.split(',') if text]
  except re.error as error:
    raise RequestError(f'optim.freeze is {freeze!r}, of which a pattern is no '
                       f'regular expression: {error}') from error


def _layers_and_powers(path: str, stacks: paths.Stacks
                       ) -> list[tuple[str, int]]:
  """Lists the layers that a parameter holds, each with the power of
  optim.layer_decay by which its learning rate is multiplied: the last layer has
  the power 1, and each layer below it one more.

  A parameter outside of the layers is one entry of the list. The embedding has
  one power more than the first layer, anything else the power 0.

  Args:
    path: the path of the parameter, which may hold a stack of layers.
    stacks: which layers each stacked parameter of the model holds.

  Returns:
    (path, power) of each layer. The path has the number of the layer in it.
  """
  num_layers = sum(stacks.counts.values())
  if path.startswith('embed/'):
    return [(path, num_layers + 1)]
  if not paths.Stacks.is_in_stack(path):
    return [(path, 0)]

  # The layers of an encoder come before those of the decoder that reads it, and
  # count as below them.
  stack, name = stacks.split(path)
  layers_below = 0
  for other in STACKS[:STACKS.index(stack)]:
    layers_below += stacks.counts.get(other, 0)
  layers = []
  for n in stacks.layer_numbers(path):
    power = num_layers - layers_below - n
    layers.append((f'{stack}/layers/{n}/{name}', power))
  return layers


def keep_trained(shares: Any, tree: Any):
  """Removes the frozen parameters from a tree: each becomes an
  optax.MaskedNode, which optax and JAX treat as nothing.

  Args:
    shares: the factor of each parameter's learning rate, a number or an array
      with one for each of its layers, 0 where frozen; None: nothing is frozen.
    tree: a tree with a leaf for each parameter.
  """
  if shares is None:
    return tree

  # A parameter of which only some layers are frozen counts as trained.
  def keep_unless_frozen(share: Any, x: Any) -> Any:
    if np.any(share):
      return x
    return optax.MaskedNode()

  return jax.tree.map(keep_unless_frozen, shares, tree)


def fill_in_frozen(shares: Any, trained: Any, params: Any):
  """Puts the frozen parameters back into a tree of the trained ones, from which
  `keep_trained` removed them.

  Args:
    shares: the factor of each parameter's learning rate, a number or an array
      with one for each of its layers, 0 where frozen; None: nothing is frozen.
    trained: the trained parameters, with an optax.MaskedNode for each other
      one.
    params: all parameters, from which the frozen ones are taken.

  Returns:
    The tree of all parameters.
  """
  if shares is None:
    return trained

  # A parameter of which only some layers are frozen counts as trained.
  def fill_in(share: Any, trained_value: Any, param: Any) -> Any:
    if np.any(share):
      return trained_value
    return param

  return jax.tree.map(fill_in, shares, trained, params)


def zero_frozen_layers(shares: Any, grads: Any):
  """Returns gradients with zeros for the frozen layers of stacked parameters.

  Args:
    shares: as for `restore_frozen_layers`.
    grads: the gradients, without those of parameters that are frozen as a
      whole.
  """
  def zero(grad: jax.Array) -> int:
    del grad
    return 0

  return restore_frozen_layers(shares, grads, jax.tree.map(zero, grads))


def restore_frozen_layers(shares: Any, new: Any, old: Any):
  """Sets the frozen layers of parameters back to their old values, after an
  optimiser has updated all layers. It matters to parameters that hold a stack
  of layers of which only some are frozen.

  Args:
    shares: the factor of each parameter's learning rate, a number or an array
      with one for each of its layers, 0 where frozen; None: nothing is frozen.
    new: the tree of parameters after the update, without those that are frozen
      as a whole (see `keep_trained`).
    old: the same tree before the update.

  Returns:
    The tree `new` with the values of `old` in the frozen layers.
  """
  if shares is None:
    return new

  # Parameters that are trained in all layers, or that were not changed, need no
  # operation.
  def restore(share: Any, new_value: Any, old_value: Any) -> Any:
    if new_value is old_value or np.all(share):
      return new_value
    return jnp.where(share != 0, new_value, old_value)

  return jax.tree.map(restore, keep_trained(shares, shares), new, old)


def start_average(optim: ml_collections.ConfigDict, shares: Any, params: Any):
  """Returns the moving average of the parameters before the first update, a
  copy of those that are trained; None where optim.ema is 0.

  It is in float32, whatever model.param_dtype is: at a decay of 0.999 a
  bfloat16 would not move. A step whose gradient is not finite is no update.
  """
  if not optim.ema:
    return None
  def copy(x: jax.Array) -> jax.Array:
    # The parameters' own buffers are overwritten by the next step.
    return jnp.array(x, jnp.float32, copy=True)

  return jax.tree.map(copy, keep_trained(shares, params))


def update_average(optim: ml_collections.ConfigDict, average: Any, params: Any,
                   updates: jax.Array, ok: jax.Array):
  """Returns the moving average of the parameters after a step.

  After update t, with the decay b = optim.ema, it is (Kingma and Ba 2015,
  section 7.2, "Temporal averaging")

    m_t = b m_{t-1} + (1 - b) p_t,  m_0 = 0;     average_t = m_t / (1 - b^t).

  What is kept is average_t itself, which moves by

    average_t = average_{t-1} + w_t (p_t - average_{t-1}),
    w_t = (1 - b) / (1 - b^t),

  so that a checkpoint holds the parameters that are evaluated, and the sum of
  the weights is 1 from the first update on (w_1 = 1).

  Args:
    optim: config.optim.
    average: the average before the step.
    params: the parameters that are trained, after the step.
    updates: t, how many updates there have been, this one included.
    ok: whether the step was an update.
  """
  if not optim.ema:
    return None
  # 1 - b^t without the digits that it would lose where b is nearly 1.
  total_weight = -jnp.expm1(updates.astype(jnp.float32) * math.log(optim.ema))
  weight = jnp.where(ok, (1 - optim.ema) / total_weight, 0.0)

  def move(mean: jax.Array, param: jax.Array) -> jax.Array:
    return mean + weight * (param.astype(jnp.float32) - mean)

  return jax.tree.map(move, average, params)


def evaluated_parameters(shares: Any, average: Any, params: Any):
  """Returns the parameters that a run is evaluated with: the average in the
  dtype of the parameters, or, where there is no average, the parameters.

  Args:
    shares: as for `fill_in_frozen`.
    average: the moving average of the trained parameters; None: there is none.
    params: all parameters.
  """
  if average is None:
    return params

  def cast(mean: jax.Array, param: jax.Array) -> jax.Array:
    return mean.astype(param.dtype)

  cast_average = jax.tree.map(cast, average, keep_trained(shares, params))
  return fill_in_frozen(shares, cast_average, params)
