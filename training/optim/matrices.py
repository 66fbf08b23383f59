"""Adafactor, Muon and NorMuon: steps that are made of whole matrices.

Layers and experts that share an array are matrices of their own, and several
axes of inputs, or of outputs, such as heads, are one side
(architectures/parts/sharding.py). optax's Adafactor would factor the two
largest axes of an array, and so mix layers: a scanned model would learn
otherwise than an unrolled one.
"""

from collections.abc import Callable
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
    if isinstance(x, optax.MaskedNode):
      return x
    return fn(role.split(x.ndim), x, *more)

  return jax.tree.map(one, roles, *trees)


def apart(tree: Any, count: int) -> list:
  """Returns `count` trees of one whose leaves are tuples of `count` things."""
  def is_leaf(x: Any) -> bool:
    return type(x) is tuple

  trees = []
  for i in range(count):
    trees.append(jax.tree.map(lambda x, i=i: x[i], tree, is_leaf=is_leaf))
  return trees


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


def _zeros(x: jax.Array, summed: tuple[int, ...]) -> jax.Array:
  """Returns float32 zeros like x, with the summed axes at size 1."""
  shape = list(x.shape)
  for axis in summed:
    shape[axis] = 1
  return jnp.zeros(shape, jnp.float32)


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
  def is_factored(axes: Axes, x: jax.Array) -> bool:
    return min(axes.sizes(x.shape)) >= 128

  def rows_of(axes: Axes, x: jax.Array) -> jax.Array:
    if is_factored(axes, x):
      return _zeros(x, axes.outputs)
    return _zeros(x, ())

  def columns_of(axes: Axes, x: jax.Array) -> jax.Array | None:
    if is_factored(axes, x):
      return _zeros(x, axes.inputs)
    return None

  def init(params: Any) -> FactoredState:
    return FactoredState(count=jnp.zeros([], jnp.int32),
                         rows=over(roles, rows_of, params),
                         columns=over(roles, columns_of, params))

  def update(grads: Any, state: FactoredState, params: Any):
    """Returns the steps, by the factored second moments after this gradient."""
    count = optax.safe_increment(state.count)
    decay = 1 - count.astype(jnp.float32) ** -0.8

    def moved(old: jax.Array, new: jax.Array) -> jax.Array:
      return decay * old + (1 - decay) * new

    def scale(axes: Axes, g: jax.Array, row: jax.Array,
              column: jax.Array | None, p: jax.Array):
      """Returns the step of a parameter, and its new moments."""
      sides = axes.inputs + axes.outputs
      square = jnp.square(g) + 1e-30
      if column is None:
        row = moved(row, square)
        u = jax.lax.rsqrt(row) * g
      else:
        # The second moment is row * column / mean(row).
        row = moved(row, _mean(square, axes.outputs))
        column = moved(column, _mean(square, axes.inputs))
        row_factor = jax.lax.rsqrt(row / _mean(row, axes.inputs))
        u = g * (row_factor * jax.lax.rsqrt(column))
      u = u / jnp.maximum(1.0, _root_mean_square(u, sides))
      size = jnp.maximum(_root_mean_square(p, sides), 1e-3)
      return u * size, row, column

    scaled = over(roles, scale, grads, state.rows, state.columns, params)
    updates, rows, columns = apart(scaled, 3)
    return updates, FactoredState(count=count, rows=rows, columns=columns)

  return optax.GradientTransformation(init, update)


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  return jnp.mean(x, axis=axes, keepdims=True)


def _root_mean_square(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  return jnp.sqrt(_mean(jnp.square(x), axes))


def scale_by_muon(roles: Any, beta: float) -> optax.GradientTransformation:
  """Returns optax.contrib.scale_by_muon of matrices that may be split, scaled
  to 0.2 root mean square a matrix.

  Args:
    roles: the Role of each parameter, as a tree.
    beta: the decay of the momentum.
  """
  plain = optax.contrib.scale_by_muon(beta=beta)

  def scaled(axes: Axes, u: jax.Array) -> jax.Array:
    """Returns an orthogonal matrix at 0.2 root mean square."""
    return 0.2 * max(axes.sizes(u.shape)) ** 0.5 * u

  def update(grads: Any, state: optax.contrib.MuonState, params: Any = None):
    """Returns the steps, orthogonal matrices in the directions of the
    momentum."""
    del params
    # Momentum with Nesterov's look ahead, both without their bias.
    mean = optax.tree.update_moment(grads, state.mu, beta, 1)
    count = optax.safe_increment(state.count)
    next_count = optax.safe_increment(count)
    unbiased_mean = optax.tree.bias_correction(mean, beta, next_count)
    unbiased_grads = optax.tree.bias_correction(grads, beta, count)
    ahead = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g,
                         unbiased_mean, unbiased_grads)
    steps = over(roles, scaled, orthogonal_factors(roles, ahead))
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
    beta: b, the decay of the momentum.
    b2: the decay of the neurons' squares.
  """

  def neurons_of(axes: Axes, x: jax.Array) -> jax.Array:
    return _zeros(x, axes.inputs)

  def mixed(m: jax.Array, g: jax.Array) -> jax.Array:
    return beta * m + (1 - beta) * g

  def moved(axes: Axes, o: jax.Array, v: jax.Array) -> jax.Array:
    return b2 * v + (1 - b2) * _mean(jnp.square(o), axes.inputs)

  def evened(axes: Axes, o: jax.Array, v: jax.Array) -> jax.Array:
    u = o / (jnp.sqrt(v) + 1e-10)
    mean = _mean(jnp.square(u), axes.inputs + axes.outputs)
    return 0.2 * u * jax.lax.rsqrt(mean + 1e-20)

  def init(params: Any) -> NorMuonState:
    return NorMuonState(momentum=optax.tree.zeros_like(params),
                        neurons=over(roles, neurons_of, params))

  def update(grads: Any, state: NorMuonState, params: Any = None):
    del params
    momentum = jax.tree.map(mixed, state.momentum, grads)
    ahead = jax.tree.map(mixed, momentum, grads)
    whole = orthogonal_factors(roles, ahead)
    neurons = over(roles, moved, whole, state.neurons)
    steps = over(roles, evened, whole, neurons)
    return steps, NorMuonState(momentum=momentum, neurons=neurons)

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
  def factor(role: Role, x: Any):
    if isinstance(x, optax.MaskedNode):
      return x
    return _factor(role, x)

  return jax.tree.map(factor, roles, tree)


def _factor(role: Role, x: jax.Array) -> jax.Array:
  """Returns U V^T of each matrix U S V^T of one parameter."""
  axes = role.split(x.ndim)
  homes = _homes(x.shape, role, axes)
  is_split = len(homes) > 1

  # The matrices go to the devices one by one.
  whole = x
  if is_split:
    whole = _padded(whole, axes, homes)
    for places in homes:
      whole = _laid_on(whole, places)

  # optax's Muon without momentum orthogonalises what it is given as it is.
  tx = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)

  def orthogonalised(matrix: jax.Array) -> jax.Array:
    factor, _ = tx.update(matrix, tx.init(matrix))
    return factor

  for _ in axes.batch:
    orthogonalised = jax.vmap(orthogonalised)
  factors = orthogonalised(as_matrices(axes, whole))
  out = as_before(axes, factors, whole.shape)

  # And their factors come back.
  if is_split:
    for places in reversed(homes):
      out = _laid_on(out, places)
  return out[tuple(slice(size) for size in x.shape)]


def _padded(x: jax.Array, axes: Axes, homes: list[tuple]) -> jax.Array:
  """Returns x with zero matrices, so that the devices divide their number."""
  if not axes.batch:
    return x
  first = axes.batch[0]
  more = -x.shape[first] % sharding.count_devices_along(homes[-1][first])
  padding = [(0, 0)] * x.ndim
  padding[first] = (0, more)
  return jnp.pad(x, padding)


def _laid_on(x: jax.Array, places: tuple) -> jax.Array:
  """Returns x with each axis on the mesh axes that `places` names."""
  spec = PartitionSpec(*(names or None for names in places))
  return jax.lax.with_sharding_constraint(x, spec)


def _homes(shape: tuple[int, ...], role: Role, axes: Axes) -> list[tuple]:
  """Returns the mesh axes that each axis of an array lies on, and after each of
  the steps in which its matrices become whole, one for each axis of a side that
  the mesh splits.

  Its mesh axes go to an axis of the batch, one that they divide if there is
  one; else to the first one. A lone matrix becomes whole on all devices.
  """
  # Axes in front, such as that of scanned layers, lie whole on each device.
  lead = len(shape) - len(role.axes)
  homes = [sharding.mesh_axes_of_weight(shape, (None,) * lead + role.axes)]
  is_lone = math.prod(shape[i] for i in axes.batch) == 1
  for side in axes.inputs + axes.outputs:
    # This step makes one more axis of the matrices whole.
    names = homes[0][side]
    places = list(homes[-1])
    if not names:
      continue
    places[side] = ()
    if not is_lone:
      places[_host(shape, axes=axes, places=places, names=names)] += names
    homes.append(tuple(places))
  return homes


def _host(shape: tuple[int, ...], axes: Axes, places: list, names: tuple
          ) -> int:
  """Returns the axis of the batch that mesh axes go to: one that they divide,
  or the first."""
  for axis in axes.batch:
    if shape[axis] % sharding.count_devices_along(places[axis] + names) == 0:
      return axis
  return axes.batch[0]
