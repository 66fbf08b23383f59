"""Which parameters are trained, and at which share of the learning rate.

optim.freeze names parameters that are not trained. optim.layer_decay gives
each layer the rate lr * layer_decay ** (N - n), n counted from 0 (Clark et al.
2020, ELECTRA, section 3.1 and table 6; with the exponents of Bao et al. 2022,
BEiT, whose last layer has the first power): the embedding has one power more
than the first layer, and what stands above the layers has the whole rate. Low-
rank adapters (model.lora) leave nothing trained but themselves and what else
declares itself `tuned` (architectures/parts/roles.py).

A parameter that is not trained has no gradient, no update, no decay and no
state in the optimiser. The layers of a stack share an array: where some of
them are frozen, the state of these rows is there and stays zero.
"""

from collections.abc import Callable, Iterator
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from architectures.parts.roles import Role
from configs.errors import RequestError, require
from training import paths

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
      parameter, and where nothing would be trained.
  """
  stacks = _Stacks(paths.flatten(shapes))
  frozen = _frozen(optim.freeze, stacks)

  def share(key: Any, role: Role, x: Any):
    path = paths.join(key)
    rows = [0.0 if name in frozen or adapted and not role.tuned else
            optim.layer_decay ** stacks.above(name)
            for name in stacks.names(path)]
    if len(set(rows)) == 1:
      return rows[0]
    return np.array(rows, np.float32).reshape(-1, *(1,) * (len(x.shape) - 1))

  tree = jax.tree_util.tree_map_with_path(share, roles, shapes)
  require(any(map(np.any, jax.tree.leaves(tree))),
          f'optim.freeze is {optim.freeze!r}, which leaves no parameter to '
          'train')
  return tree


class _Stacks:
  """The layers of a model, by the paths of its parameters.

  A row of STACK/layers/block_B/NAME is of one layer n: its name here is
  STACK/layers/n/NAME.
  """

  def __init__(self, shapes: dict[str, Any]):
    self._shapes, self._places = shapes, paths.Stacks(shapes)
    self._below, self._layers = {}, 0
    for stack in sorted(self._places.counts, key=STACKS.index):
      self._below[stack] = self._layers
      self._layers += self._places.counts[stack]

  def all_names(self) -> Iterator[tuple[str, str]]:
    """Yields the path of each parameter and the name of each of its rows."""
    for path in self._shapes:
      for name in self.names(path):
        yield path, name

  def names(self, path: str) -> list[str]:
    """Returns the names of a parameter's rows, or of all of it."""
    if not paths.Stacks.has(path):
      return [path]
    stack, name = self._places.split(path)
    return [f'{stack}/layers/{n}/{name}' for n in self._places.layers(path)]

  def above(self, name: str) -> int:
    """Returns how many powers of the decay the name has."""
    stack, _, rest = name.partition('/layers/')
    if rest:
      return self._layers - self._below[stack] - int(rest.partition('/')[0])
    return self._layers + 1 if stack.startswith('embed/') else 0


def _frozen(freeze: str, stacks: _Stacks) -> set[str]:
  """Returns the names that a pattern matches; it may be written for the path
  of the parameter, or with the number of the layer in it."""
  found: set[str] = set()
  for pattern in filter(None, freeze.split(',')):
    try:
      matches = re.compile(pattern).fullmatch
    except re.error as error:
      raise RequestError(f'optim.freeze has the pattern {pattern!r}, which is '
                         f'no regular expression: {error}') from error
    new = {name for path, name in stacks.all_names()
           if matches(path) or matches(name)}
    some = list(dict.fromkeys(name for _, name in stacks.all_names()))[:3]
    require(new, f'optim.freeze has the pattern {pattern!r}, which matches no '
            f'parameter of the model: their paths are such as '
            f'{", ".join(some)}, and a pattern must match all of one')
    found |= new
  return found


def trained(shares: Any, tree: Any):
  """Returns `tree` with optax.MaskedNode() for each frozen parameter."""
  if shares is None:
    return tree
  return jax.tree.map(
      lambda share, x: x if np.any(share) else optax.MaskedNode(), shares, tree)


def whole(shares: Any, part: Any, params: Any):
  """Returns `params` with what `trained` has kept of a tree in its places."""
  if shares is None:
    return part
  return jax.tree.map(lambda share, new, old: new if np.any(share) else old,
                      shares, part, params)


def without_frozen_rows(shares: Any, grads: Any):
  """Returns gradients with zeros for the frozen layers of a stack."""
  if shares is None:
    return grads
  return jax.tree.map(
      lambda share, g: g if np.ndim(share) == 0 or np.all(share)
      else jnp.where(share != 0, g, 0), trained(shares, shares), grads)


def with_frozen_rows(shares: Any, new: Any, old: Any):
  """Returns `new` with the rows of `old` for the frozen layers of a stack;
  both trees are as `trained` returns them."""
  if shares is None:
    return new
  return jax.tree.map(
      lambda share, x, was: x if x is was or np.all(share)
      else jnp.where(share != 0, x, was), trained(shares, shares), new, old)


def of_trained(shares: Any, make: Callable) -> optax.GradientTransformation:
  """Returns an optimiser of the parameters that are trained.

  It takes whole trees, or those that `trained` returns, and gives updates like
  the latter.

  Args:
    shares: as `of` returns them.
    make: (keep) -> the optimiser; keep is `trained` with these shares, for the
      trees that it is made from.
  """
  keep = lambda tree: trained(shares, tree)
  tx = make(keep)
  if shares is None:
    return tx

  def init(params: Any):
    # optax.tree_utils.tree_map_params gives a stand-in that is no tree.
    return tx.init(keep(params) if isinstance(params, dict) else params)

  def update(grads: Any, state: Any, params: Any = None):
    return tx.update(keep(grads), state, keep(params))

  return optax.GradientTransformation(init, update)
