"""Adafactor, Muon and NorMuon: steps that are made of whole matrices.

Layers and experts that share an array are matrices of their own, and several
axes of inputs, or of outputs, such as heads, are one side
(architectures/parts/sharding.py). optax's Adafactor would factor the two
largest axes of an array, and so mix layers: a scanned model would learn
otherwise than an unrolled one.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from architectures.parts import sharding
from architectures.parts.sharding import Axes, Role


def over(roles: Any, fn: Callable[..., Any], *trees: Any):
  """Returns fn(axes, x, ...) of each parameter, as a tree; `axes` are those of
  the parameter, by role. What optax.partition gives to another optimiser is
  optax.MaskedNode, and left so."""

  def one(role: Role, x: Any, *more: Any):
    return x if isinstance(x, optax.MaskedNode) else fn(
        role.split(x.ndim), x, *more)

  return jax.tree.map(one, roles, *trees)


def apart(tree: Any, count: int) -> list:
  """Returns `count` trees of one whose leaves are tuples of as many things."""
  return [jax.tree.map(lambda x, i=i: x[i], tree,
                       is_leaf=lambda x: type(x) is tuple)
          for i in range(count)]


def as_matrices(axes: Axes, x: jax.Array) -> jax.Array:
  """Returns an array [*batch, rows, columns] of the matrices of x."""
  sides = axes.sizes(x.shape)
  x = x.transpose(*axes.batch, *axes.inputs, *axes.outputs)
  return x.reshape(*x.shape[:len(axes.batch)], *sides)


def as_before(axes: Axes, matrices: jax.Array, shape: tuple[int, ...]
              ) -> jax.Array:
  """Returns what `as_matrices` took apart, in its shape."""
  order = (*axes.batch, *axes.inputs, *axes.outputs)
  x = matrices.reshape(*(shape[i] for i in order))
  return x.transpose(*(order.index(i) for i in range(len(order))))


def _zeros(x: jax.Array, without: tuple[int, ...]) -> jax.Array:
  """Returns zeros like x, with some axes at size 1."""
  return jnp.zeros([1 if i in without else n for i, n in enumerate(x.shape)],
                   jnp.float32)


class FactoredState(NamedTuple):
  """Second moments of Adafactor; a factored one's mean axes have size 1."""
  count: jax.Array
  rows: optax.Params  # factored: mean over outputs; else the moments
  columns: optax.Params  # factored: mean over inputs; else None


def scale_by_adafactor(roles: Any) -> optax.GradientTransformation:
  """Returns the step of Adafactor (Shazeer and Stern 2018, algorithm 4), with
  the paper's constants: epsilon_1 = 1e-30 is added to squares, epsilon_2 = 1e-3
  is the least root mean square of a parameter, d = 1 the greatest of an update,
  and beta2 at update t is 1 - t ** -0.8. As in optax, a matrix with fewer than
  128 rows or columns is not factored.

  Args:
    roles: the Role of each parameter, as a tree.
  """
  factored = lambda axes, x: min(axes.sizes(x.shape)) >= 128

  def init(params: Any):
    rows = over(roles, lambda axes, x: _zeros(
        x, axes.outputs if factored(axes, x) else ()), params)
    columns = over(roles, lambda axes, x: _zeros(
        x, axes.inputs) if factored(axes, x) else None, params)
    return FactoredState(jnp.zeros([], jnp.int32), rows, columns)

  def update(grads: Any, state: Any, params: Any):
    count = optax.safe_increment(state.count)
    decay = 1 - count.astype(jnp.float32) ** -0.8
    moved = lambda old, new: decay * old + (1 - decay) * new
    mean = lambda x, over: jnp.mean(x, axis=over, keepdims=True)

    def scale(axes: Axes, g: jax.Array, row: jax.Array, column: Any,
              p: jax.Array):
      rms = lambda x: jnp.sqrt(mean(jnp.square(x), axes.inputs + axes.outputs))
      square = jnp.square(g) + 1e-30
      if column is None:
        row = moved(row, square)
        u = jax.lax.rsqrt(row) * g
      else:
        row = moved(row, mean(square, axes.outputs))
        column = moved(column, mean(square, axes.inputs))
        u = g * (jax.lax.rsqrt(row / mean(row, axes.inputs))
                 * jax.lax.rsqrt(column))
      u = u / jnp.maximum(1.0, rms(u))
      return u * jnp.maximum(rms(p), 1e-3), row, column

    updates, rows, columns = apart(over(
        roles, scale, grads, state.rows, state.columns, params), 3)
    return updates, FactoredState(count, rows, columns)

  return optax.GradientTransformation(init, update)


def scale_by_muon(roles: Any, beta: float) -> optax.GradientTransformation:
  """Returns optax.contrib.scale_by_muon of matrices that may be split, scaled
  to 0.2 root mean square a matrix.

  Args:
    roles: the Role of each parameter, as a tree.
    beta: of the momentum.
  """
  plain = optax.contrib.scale_by_muon(beta=beta)

  def update(grads: Any, state: optax.contrib.MuonState, params: Any = None):
    mean = optax.tree.update_moment(grads, state.mu, beta, 1)
    count = optax.safe_increment(state.count)
    ahead = jax.tree.map(
        lambda m, g: beta * m + (1 - beta) * g,
        optax.tree.bias_correction(mean, beta, optax.safe_increment(count)),
        optax.tree.bias_correction(grads, beta, count))
    steps = over(roles, lambda axes, u: 0.2 * max(axes.sizes(u.shape)) ** 0.5
                 * u, orthogonal_factors(roles, ahead))
    return steps, state._replace(count=count, mu=mean)

  return optax.GradientTransformation(plain.init, update)


class NorMuonState(NamedTuple):
  """The momentum, and v with the axes of the inputs at size 1."""
  momentum: optax.Params
  neurons: optax.Params


def scale_by_normuon(roles: Any, beta: float, b2: float
                     ) -> optax.GradientTransformation:
  """Returns the direction of NorMuon (Li et al. 2025, arXiv 2510.05491): Muon
  whose neurons, the outputs of a product, take steps of one size.

  Of each matrix W with the gradient G, momentum b and second decay b2
  (algorithm 1, with the Nesterov step of its authors' code):

    M = b M + (1 - b) G
    O = orthogonalised (1 - b) G + b M, by five Newton-Schulz iterations
    v = b2 v + (1 - b2) mean over the inputs of O * O,   one number a neuron
    U = O / (sqrt(v) + 1e-10)
    step = 0.2 sqrt(rows columns) / |U|_F * U

  Args:
    roles: the Role of each parameter, as a tree.
    beta: b, of the momentum.
    b2: of the neurons.
  """

  def init(params: Any):
    return NorMuonState(optax.tree.zeros_like(params), over(
        roles, lambda axes, x: _zeros(x, axes.inputs), params))

  def update(grads: Any, state: Any, params: Any = None):
    mixed = lambda m, g: beta * m + (1 - beta) * g
    momentum = jax.tree.map(mixed, state.momentum, grads)
    ahead = jax.tree.map(mixed, momentum, grads)
    whole = orthogonal_factors(roles, ahead)
    neurons = over(
        roles, lambda axes, o, v: b2 * v + (1 - b2) * jnp.mean(
            jnp.square(o), axis=axes.inputs, keepdims=True),
        whole, state.neurons)

    def even(axes: Axes, o: jax.Array, v: jax.Array):
      u, sides = o / (jnp.sqrt(v) + 1e-10), axes.inputs + axes.outputs
      mean = jnp.mean(jnp.square(u), axis=sides, keepdims=True)
      return 0.2 * u * jax.lax.rsqrt(mean + 1e-20)

    return over(roles, even, whole, neurons), NorMuonState(momentum, neurons)

  return optax.GradientTransformation(init, update)


def orthogonal_factors(roles: Any, tree: Any):
  """Returns U V^T of each matrix U S V^T, nearly, by Newton-Schulz iterations
  (Jordan et al. 2024): after five of them the singular values are about 0.5 to
  1.5, as optax says.

  Each iteration multiplies a matrix by its transpose. Where the mesh splits its
  rows or its columns, XLA sums these products over the devices. Here the
  matrices of a stack, of layers or experts, go to the devices one by one, and
  their factors come back: two all-to-alls of what a device holds. (Liu et al.
  2025, arXiv 2502.16982, section 2.3, gather a matrix on every device that has
  a part of it.)
  """
  return jax.tree.map(
      lambda role, x: x if isinstance(x, optax.MaskedNode) else _factor(
          role, x), roles, tree)


def _factor(role: Role, x: jax.Array) -> jax.Array:
  axes = role.split(x.ndim)
  homes = _homes(x.shape, role, axes)
  lie = lambda x, places: jax.lax.with_sharding_constraint(
      x, PartitionSpec(*(names or None for names in places)))
  whole = x
  if len(homes) > 1:
    if axes.batch:  # filled up, so that the devices divide it
      first = axes.batch[0]
      more = -x.shape[first] % sharding.size(homes[-1][first])
      whole = jnp.pad(x, [(0, more * (i == first)) for i in range(x.ndim)])
    whole = functools.reduce(lie, homes, whole)
  # What optax is given is orthogonalised as it is.
  tx = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)
  factor = lambda matrix: tx.update(matrix, tx.init(matrix))[0]
  for _ in axes.batch:
    factor = jax.vmap(factor)
  out = as_before(axes, factor(as_matrices(axes, whole)), whole.shape)
  if len(homes) > 1:
    out = functools.reduce(lie, homes[::-1], out)
  return out[tuple(slice(n) for n in x.shape)]


def _homes(shape: tuple[int, ...], role: Role, axes: Axes) -> list[tuple]:
  """Returns the mesh axes that each axis of an array lies on, and after each of
  the steps in which its matrices become whole, one for each axis of a side that
  the mesh splits.

  Its mesh axes go to an axis of the batch, one that they divide if there is
  one; else to the first one. A lone matrix becomes whole on all devices.
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
