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


def of(optim: ml_collections.ConfigDict, roles: Any, shapes: Any,
       adapted: bool = False):
  """Returns the share of each parameter, as a tree: a number, or where the
  layers of a stack differ an array of as many axes as the parameter. 0: it is
  frozen.

  Args:
    optim: config.optim.
    roles: the Role of each parameter.
    shapes: the parameters' shapes.
    adapted: whether the model has low-rank adapters.

  Raises:
    RequestError: for a pattern that is no regular expression or matches no
      parameter, for a rate of tables that are not there, and where nothing
      would be trained.
  """
  patterns = _patterns(optim.freeze)
  has_tables = any(role.reads for role in jax.tree.leaves(roles))
  require(optim.table_rate == 1 or has_tables,
          f'optim.table_rate is {optim.table_rate}, and the model has no '
          'tables that n-grams look up: leave it at 1, or set model.memory')
  stacks = paths.Stacks(paths.flatten_by_path(shapes))
  names: list[str] = []
  matched = set()

  def share(key: Any, role: Role, x: Any) -> float | np.ndarray:
    """Returns the share of a parameter, of its rows where these differ."""
    path = paths.path_to_string(key)
    rows = []
    # Each row of a scanned parameter is of another layer.
    for name, power in _rows_of(path, stacks):
      names.append(name)
      freezing = []
      for pattern in patterns:
        if pattern.fullmatch(path) or pattern.fullmatch(name):
          freezing.append(pattern)
      matched.update(freezing)
      if freezing or adapted and not role.tuned:
        rows.append(0.0)
      elif role.reads:
        rows.append(optim.layer_decay ** power * optim.table_rate)
      else:
        rows.append(optim.layer_decay ** power)
    # One number where all rows agree, else one for each row.
    if len(set(rows)) == 1:
      return rows[0]
    return np.array(rows, np.float32).reshape(-1, *(1,) * (len(x.shape) - 1))

  tree = jax.tree_util.tree_map_with_path(share, roles, shapes)
  for pattern in patterns:
    require(pattern in matched, f'optim.freeze has the pattern '
            f'{pattern.pattern!r}, which matches no parameter of the model: '
            f'their paths are such as {", ".join(names[:3])}, and a pattern '
            'must match all of one')
  require(any(map(np.any, jax.tree.leaves(tree))),
          f'optim.freeze is {optim.freeze!r}, which leaves no parameter to '
          'train')
  return tree


def _patterns(freeze: str) -> list[re.Pattern]:
  """Returns the regular expressions of optim.freeze."""
  try:
    return [re.compile(text) for text in freeze.split(',') if text]
  except re.error as error:
    raise RequestError(f'optim.freeze is {freeze!r}, of which a pattern is no '
                       f'regular expression: {error}') from error


def _rows_of(path: str, stacks: paths.Stacks) -> list[tuple[str, int]]:
  """Returns the rows of a parameter: the name of each, which has the number of
  its layer in it, and how many powers of the decay it has."""
  depth = sum(stacks.counts.values())
  if path.startswith('embed/'):
    return [(path, depth + 1)]
  if not paths.Stacks.is_in_stack(path):
    return [(path, 0)]
  stack, name = stacks.split(path)
  below = 0  # layers of the stacks before this one
  for other in STACKS[:STACKS.index(stack)]:
    below += stacks.counts.get(other, 0)
  return [(f'{stack}/layers/{n}/{name}', depth - below - n)
          for n in stacks.layer_numbers(path)]


def trained(shares: Any, tree: Any):
  """Returns `tree` with optax.MaskedNode() for each frozen parameter."""
  if shares is None:
    return tree

  def keep(share: Any, x: Any) -> Any:
    if np.any(share):
      return x
    return optax.MaskedNode()

  return jax.tree.map(keep, shares, tree)


def whole(shares: Any, part: Any, params: Any):
  """Returns `params` with what `trained` has kept of a tree in its places."""
  if shares is None:
    return part

  def choose(share: Any, new: Any, old: Any) -> Any:
    if np.any(share):
      return new
    return old

  return jax.tree.map(choose, shares, part, params)


def without_frozen_rows(shares: Any, grads: Any):
  """Returns gradients with zeros for the frozen layers of a stack."""
  return with_frozen_rows(shares, grads, jax.tree.map(lambda _: 0, grads))


def with_frozen_rows(shares: Any, new: Any, old: Any):
  """Returns `new` with the rows of `old` for the frozen layers of a stack;
  both trees are as `trained` returns them."""
  if shares is None:
    return new

  def restore(share: Any, x: Any, before: Any) -> Any:
    if x is before or np.all(share):
      return x
    return jnp.where(share != 0, x, before)

  return jax.tree.map(restore, trained(shares, shares), new, old)


def start_average(optim: ml_collections.ConfigDict, shares: Any, params: Any):
  """Returns the average before the first update, a copy of the parameters that
  are trained; None where optim.ema is 0.

  It is in float32, whatever model.param_dtype is: at a decay of 0.999 a
  bfloat16 would not move. A step whose gradient is not finite is no update.
  """
  if not optim.ema:
    return None
  return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True),
                      trained(shares, params))


def update_average(optim: ml_collections.ConfigDict, average: Any, params: Any,
                   updates: jax.Array, ok: jax.Array):
  """Returns the average after a step. After update t, with the decay b, it is
  (Kingma and Ba 2015, section 7.2, "Temporal averaging")

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
  total = -jnp.expm1(updates.astype(jnp.float32) * math.log(optim.ema))
  weight = jnp.where(ok, (1 - optim.ema) / total, 0.0)
  return jax.tree.map(lambda m, p: m + weight * (p.astype(jnp.float32) - m),
                      average, params)


def evaluated(shares: Any, average: Any, params: Any):
  """Returns the parameters that a run is evaluated with: the average, in the
  dtype of the parameters, or where there is none these themselves."""
  if average is None:
    return params
  cast = jax.tree.map(lambda m, p: m.astype(p.dtype), average,
                      trained(shares, params))
  return whole(shares, cast, params)
