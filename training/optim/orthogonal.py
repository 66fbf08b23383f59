"""The orthogonal factors of matrices, by Newton-Schulz iterations (Jordan et
al. 2024, Muon), each matrix on one device.

Each of five iterations multiplies a matrix by its transpose. Where the mesh
splits its rows or its columns, XLA sums these products over the devices. Here
the matrices of a stack, of layers or experts, go to the devices one by one, and
their factors come back: two all-to-alls of what a device holds. (Liu et al.
2025, arXiv 2502.16982, section 2.3, gather a matrix on every device that has a
part of it.)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from architectures.parts import sharding
from architectures.parts.roles import Axes, Role
from training.optim import trees

# The mesh axes that each axis of an array lies on.
_Places = tuple[tuple[str, ...], ...]


def scale_by_muon(roles: Any, beta: float) -> optax.GradientTransformation:
  """Returns optax.contrib.scale_by_muon of matrices that may be split.

  Args:
    roles: the Role of each parameter, as a tree; where optax.partition leaves
      out a parameter, its role is not read.
    beta: of the momentum.
  """
  plain = optax.contrib.scale_by_muon(beta=beta)

  def update(grads: Any, state: optax.contrib.MuonState, params: Any = None):
    del params
    mean = optax.tree.update_moment(grads, state.mu, beta, 1)
    count = optax.safe_increment(state.count)
    ahead = jax.tree.map(
        lambda m, g: beta * m + (1 - beta) * g,
        optax.tree.bias_correction(mean, beta, optax.safe_increment(count)),
        optax.tree.bias_correction(grads, beta, count))
    return factors(roles, ahead), state._replace(count=count, mu=mean)

  return optax.GradientTransformation(plain.init, update)


def factors(roles: Any, tree: Any):
  """Returns U V^T of each matrix U S V^T, nearly: after five iterations the
  singular values are about 0.5 to 1.5, as optax says.

  Args:
    roles: the Role of each parameter, as a tree.
    tree: matrices, of which optax.partition may have masked some. Axes of
      inputs, and of outputs, such as heads, are one side.
  """
  return jax.tree.map(
      lambda role, x: x if isinstance(x, optax.MaskedNode) else _factor(
          role, x), roles, tree)


def _factor(role: Role, x: jax.Array) -> jax.Array:
  axes = role.split(x.ndim)
  homes = _homes(x.shape, role, axes)
  whole = x
  if len(homes) > 1:
    whole = _filled_up(x, axes, homes[-1])
    for places in homes:
      whole = _lie(whole, places)
  factor = _newton_schulz
  for _ in axes.batch:
    factor = jax.vmap(factor)
  out = trees.as_before(
      axes, factor(trees.as_matrices(axes, whole)), whole.shape)
  if len(homes) > 1:
    for places in reversed(homes):
      out = _lie(out, places)
  return out[tuple(slice(n) for n in x.shape)]


def _newton_schulz(matrix: jax.Array) -> jax.Array:
  tx = optax.contrib.scale_by_muon(
      beta=0.0, nesterov=False)  # what it is given is orthogonalised as it is
  return tx.update(matrix, tx.init(matrix))[0]


def _homes(shape: tuple[int, ...], role: Role, axes: Axes) -> list[_Places]:
  """Returns where an array lies, and where after each of the steps in which its
  matrices become whole, one for each axis of a side that the mesh splits.

  Its mesh axes go to an axis of the batch, one that they divide if there is
  one; else to the first one, which is then filled up. A lone matrix becomes
  whole on all devices.
  """
  lead = len(shape) - len(role.axes)
  homes = [sharding.weight_places(shape, (None,) * lead + role.axes)]
  lone = math.prod(shape[i] for i in axes.batch) == 1
  for side in axes.inputs + axes.outputs:
    names, places = homes[0][side], list(homes[-1])
    if not names:
      continue
    places[side] = ()
    if not lone:
      to = next((i for i in axes.batch if shape[i] % sharding.size(
          places[i] + names) == 0), axes.batch[0])
      places[to] += names
    homes.append(tuple(places))
  return homes


def _filled_up(x: jax.Array, axes: Axes, places: _Places) -> jax.Array:
  """Returns x with zeros after its first axis of a batch, so that the devices
  divide it."""
  if not axes.batch:
    return x
  first = axes.batch[0]
  more = -x.shape[first] % sharding.size(places[first])
  return jnp.pad(x, [(0, more if i == first else 0) for i in range(x.ndim)])


def _lie(x: jax.Array, places: _Places) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*(
      names or None for names in places)))
