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


def map_over_parameters(roles: Any, fn: Callable[..., Any], *trees: Any):
  """Applies a function to each parameter of a model, given which of its axes
  make the rows and columns of a matrix; returns the tree of the results.

  Args:
    roles: the Role of each parameter (which of its axes are inputs of a
      product), as a tree.
    fn: a function of the Axes of a parameter and its leaf of each tree.
    *trees: trees with a leaf for each parameter. Where the first one has an
      optax.MaskedNode, as optax.partition puts for the parameters of another
      optimiser, the result has it too.
  """

  def apply_to_parameter(role: Role, x: Any, *more: Any):
    if isinstance(x, optax.MaskedNode):
      return x
    return fn(role.split(x.ndim), x, *more)

  return jax.tree.map(apply_to_parameter, roles, *trees)


def unzip_tree(tree: Any, num_trees: int) -> list:
  """Turns a tree whose leaves are tuples into a list of trees: tree i has item
  i of each tuple.

  Args:
    tree: a tree whose leaves are tuples of `num_trees` items.
    num_trees: the number of items in each tuple.
  """
  # A NamedTuple, such as the state of an optimiser, is a node and no leaf.
  def is_tuple(x: Any) -> bool:
    return type(x) is tuple

  trees = []
  for i in range(num_trees):
    trees.append(jax.tree.map(lambda x, i=i: x[i], tree, is_leaf=is_tuple))
  return trees


def reshape_to_matrices(axes: Axes, x: jax.Array) -> jax.Array:
  """Returns a parameter as matrices, an array [*batch, rows, columns].

  Args:
    axes: which axes of `x` hold a matrix each (layers, experts), which make its
      rows (inputs) and which its columns (outputs).
    x: the parameter, or another array of its shape.
  """
  num_rows, num_columns = axes.sizes(x.shape)
  x = x.transpose(*axes.batch, *axes.inputs, *axes.outputs)
  return x.reshape(*x.shape[:len(axes.batch)], num_rows, num_columns)


def reshape_from_matrices(axes: Axes, matrices: jax.Array,
                          shape: tuple[int, ...]) -> jax.Array:
  """Returns matrices in the shape of their parameter, the inverse of
  `reshape_to_matrices`.

  Args:
    axes: the axes of the parameter, as there.
    matrices: an array [*batch, rows, columns].
    shape: the shape of the parameter.
  """
  # Take rows and columns apart into the axes of the parameter, which are still
  # in the order of the matrices. The transpose inverts that order.
  order = (*axes.batch, *axes.inputs, *axes.outputs)
  x = matrices.reshape(*(shape[i] for i in order))
  return x.transpose(*(order.index(i) for i in range(len(order))))


def _zeros_with_summed_axes(x: jax.Array, summed_axes: tuple[int, ...]
                            ) -> jax.Array:
  """Returns float32 zeros in the shape of x, with each summed axis at size 1.
  """
  shape = list(x.shape)
  for axis in summed_axes:
    shape[axis] = 1
  return jnp.zeros(shape, jnp.float32)


class FactoredState(NamedTuple):
  """Second moments of Adafactor; a factored one's mean axes have size 1."""
  count: jax.Array
  rows: optax.Params  # factored: mean over outputs; else the moments
  columns: optax.Params  # factored: mean over inputs; else None


def scale_by_adafactor(roles: Any) -> optax.GradientTransformation:
  """Returns Adafactor's step before the learning rate (Shazeer and Stern 2018,
  algorithm 4).

  The constants are the paper's: epsilon_1 = 1e-30 is added to squares,
  epsilon_2 = 1e-3 is the least root mean square of a parameter, d = 1 the
  greatest of an update, and beta2 at update t is 1 - t ** -0.8. As in optax, a
  matrix with fewer than 128 rows or columns is not factored.

  Args:
    roles: the Role of each parameter, as a tree.
  """
  def is_factored(axes: Axes, x: jax.Array) -> bool:
    return min(axes.sizes(x.shape)) >= 128

  def zero_row_moments(axes: Axes, x: jax.Array) -> jax.Array:
    if is_factored(axes, x):
      return _zeros_with_summed_axes(x, axes.outputs)
    return _zeros_with_summed_axes(x, ())

  def zero_column_moments(axes: Axes, x: jax.Array) -> jax.Array | None:
    if is_factored(axes, x):
      return _zeros_with_summed_axes(x, axes.inputs)
    return None

  def init(params: Any) -> FactoredState:
    return FactoredState(
        count=jnp.zeros([], jnp.int32),
        rows=map_over_parameters(roles, zero_row_moments, params),
        columns=map_over_parameters(roles, zero_column_moments, params))

  def update(grads: Any, state: FactoredState, params: Any):
    """Returns the steps, by the factored second moments after this gradient."""
    count = optax.safe_increment(state.count)
    decay = 1 - count.astype(jnp.float32) ** -0.8

    def update_parameter(axes: Axes, grad: jax.Array, row_moment: jax.Array,
                         column_moment: jax.Array | None, param: jax.Array):
      """Returns the step of a parameter, and its new moments.

      Args:
        axes: which axes of the parameter are the inputs of its product, the
          outputs, and the batch of a stack of matrices.
        grad: the gradient.
        row_moment: the average of the squared gradient for each of the inputs;
          for each element where the parameter is not factored.
        column_moment: the average for each of the outputs; None: the parameter
          is not factored, as a vector or a small matrix.

        param: the parameter.
      """
      # 1e-30 is the paper's first constant: no moment is zero.
      square = jnp.square(grad) + 1e-30
      if column_moment is None:
        row_moment = _update_average(row_moment, square, decay)
        step = jax.lax.rsqrt(row_moment) * grad
      else:
        # The second moment is row * column / mean(row).
        row_moment = _update_average(
            row_moment, _mean(square, axes.outputs), decay)
        column_moment = _update_average(
            column_moment, _mean(square, axes.inputs), decay)
        row_factor = jax.lax.rsqrt(row_moment / _mean(row_moment, axes.inputs))
        step = grad * (row_factor * jax.lax.rsqrt(column_moment))
      # The step has at most 1 root mean square (the paper's clipping), and is
      # then scaled by that of the parameter, which counts as at least 1e-3 so
      # that a parameter of zeros can move.
      matrix_axes = axes.inputs + axes.outputs
      step = step / jnp.maximum(1.0, _root_mean_square(step, matrix_axes))
      param_size = jnp.maximum(_root_mean_square(param, matrix_axes), 1e-3)
      return step * param_size, row_moment, column_moment

    updated = map_over_parameters(roles, update_parameter, grads, state.rows,
                                  state.columns, params)
    steps, rows, columns = unzip_tree(updated, 3)
    return steps, FactoredState(count=count, rows=rows, columns=columns)

  return optax.GradientTransformation(init, update)


def _update_average(average: jax.Array, new: jax.Array,
                    decay: float | jax.Array) -> jax.Array:
  """Returns the exponential moving average after a new value."""
  return decay * average + (1 - decay) * new


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  return jnp.mean(x, axis=axes, keepdims=True)


def _root_mean_square(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  return jnp.sqrt(_mean(jnp.square(x), axes))


def scale_by_muon(roles: Any, beta: float) -> optax.GradientTransformation:
  """Returns Muon's step before the learning rate (Jordan et al. 2024): the
  momentum of each matrix, orthogonalised and scaled to 0.2 root mean square.

  It computes what optax.contrib.scale_by_muon does, for matrices that the
  devices of a mesh may share (`orthogonalize`).

  Args:
    roles: the Role of each parameter, as a tree.
    beta: the decay of the momentum.
  """
  optax_muon = optax.contrib.scale_by_muon(beta=beta)

  def scale_to_adam_size(axes: Axes, orthogonal: jax.Array) -> jax.Array:
    """Returns an orthogonal matrix at 0.2 root mean square."""
    return 0.2 * max(axes.sizes(orthogonal.shape)) ** 0.5 * orthogonal

  def update(grads: Any, state: optax.contrib.MuonState, params: Any = None):
    """Returns the steps, orthogonal matrices in the directions of the
    momentum, and the new state."""
    del params
    # Momentum with Nesterov's look ahead, both without their bias towards their
    # start at 0. The look ahead is one step further than the momentum, hence
    # the next count.
    momentum = optax.tree.update_moment(grads, state.mu, beta, 1)
    count = optax.safe_increment(state.count)
    next_count = optax.safe_increment(count)
    unbiased_momentum = optax.tree.bias_correction(momentum, beta, next_count)
    unbiased_grads = optax.tree.bias_correction(grads, beta, count)
    look_ahead = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g,
                              unbiased_momentum, unbiased_grads)
    # The nearest orthogonal matrices, at the usual size of a step of Adam.
    orthogonal = orthogonalize(roles, look_ahead)
    steps = map_over_parameters(roles, scale_to_adam_size, orthogonal)
    return steps, state._replace(count=count, mu=momentum)

  return optax.GradientTransformation(optax_muon.init, update)


class NorMuonState(NamedTuple):
  """The momentum, and v with the axes of the inputs at size 1."""
  momentum: optax.Params
  neurons: optax.Params


def scale_by_normuon(roles: Any, beta: float, b2: float
                     ) -> optax.GradientTransformation:
  """Returns NorMuon's step before the learning rate (Li et al. 2025, arXiv
  2510.05491): Muon whose neurons, the outputs of a product, take steps of one
  size.

  For each matrix W with the gradient G, momentum b and second decay b2
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

  def zero_neuron_squares(axes: Axes, x: jax.Array) -> jax.Array:
    return _zeros_with_summed_axes(x, axes.inputs)

  def add_gradient(momentum: jax.Array, grad: jax.Array) -> jax.Array:
    return beta * momentum + (1 - beta) * grad

  def update_neuron_squares(axes: Axes, orthogonal: jax.Array,
                            squares: jax.Array) -> jax.Array:
    """Returns v after this step."""
    new_squares = _mean(jnp.square(orthogonal), axes.inputs)
    return _update_average(squares, new_squares, b2)

  def equalize_neurons(axes: Axes, orthogonal: jax.Array,
                       squares: jax.Array) -> jax.Array:
    """Returns U at 0.2 root mean square."""
    even = orthogonal / (jnp.sqrt(squares) + 1e-10)
    mean_square = _mean(jnp.square(even), axes.inputs + axes.outputs)
    return 0.2 * even * jax.lax.rsqrt(mean_square + 1e-20)

  def init(params: Any) -> NorMuonState:
    return NorMuonState(
        momentum=optax.tree.zeros_like(params),
        neurons=map_over_parameters(roles, zero_neuron_squares, params))

  def update(grads: Any, state: NorMuonState, params: Any = None):
    """Returns the steps and the new state, by the equations above."""
    del params
    momentum = jax.tree.map(add_gradient, state.momentum, grads)
    look_ahead = jax.tree.map(add_gradient, momentum, grads)
    orthogonal = orthogonalize(roles, look_ahead)
    neurons = map_over_parameters(roles, update_neuron_squares, orthogonal,
                                  state.neurons)
    steps = map_over_parameters(roles, equalize_neurons, orthogonal, neurons)
    return steps, NorMuonState(momentum=momentum, neurons=neurons)

  return optax.GradientTransformation(init, update)


def orthogonalize(roles: Any, tree: Any):
  """Returns the nearest orthogonal matrix U V^T of each matrix U S V^T of a
  tree of parameters, approximately, by Newton-Schulz iterations (Jordan et al.
  2024): after five of them the singular values are about 0.5 to 1.5, as optax
  says.

  Each iteration multiplies a matrix by its transpose. Where the mesh splits its
  rows or its columns, XLA sums these products over the devices. Here the
  matrices of a stack, of layers or experts, go to the devices one by one, and
  the results come back: two all-to-alls of what a device holds. (Liu et al.
  2025, arXiv 2502.16982, section 2.3, gather a matrix on every device that has
  a part of it.)

  Args:
    roles: the Role of each parameter, as a tree.
    tree: an array in the shape of each parameter, or an optax.MaskedNode, which
      stays.
  """
  def orthogonalize_unless_masked(role: Role, x: Any):
    if isinstance(x, optax.MaskedNode):
      return x
    return _orthogonalize_parameter(role, x)

  return jax.tree.map(orthogonalize_unless_masked, roles, tree)


def _orthogonalize_parameter(role: Role, x: jax.Array) -> jax.Array:
  """Returns the nearest orthogonal matrix, U V^T of U S V^T, of each matrix of
  one parameter, approximately; see `orthogonalize`.

  Args:
    role: says which axes of the parameter are the inputs and outputs of its
      product; the others are a batch of matrices.
    x: the parameter's momentum, in the shape of the parameter.
  """
  axes = role.split(x.ndim)
  # One placement means that no axis of a matrix is split over devices.
  placements = _placements_to_whole_matrices(x.shape, role, axes)
  is_split = len(placements) > 1

  # The matrices are moved so that each is whole on one device. Matrices of
  # zeros fill the batch up, so that all devices hold as many.
  whole = x
  if is_split:
    whole = _pad_number_of_matrices(whole, axes, placements[-1])
    for placement in placements:
      whole = _constrain_placement(whole, placement)

  # optax's Muon without momentum orthogonalises what it is given as it is.
  tx = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)

  def orthogonalize_matrix(matrix: jax.Array) -> jax.Array:
    orthogonal, _ = tx.update(matrix, tx.init(matrix))
    return orthogonal

  # One vmap for each axis of the batch, as optax takes a single matrix.
  for _ in axes.batch:
    orthogonalize_matrix = jax.vmap(orthogonalize_matrix)
  matrices = orthogonalize_matrix(reshape_to_matrices(axes, whole))
  out = reshape_from_matrices(axes, matrices, whole.shape)

  # The results come back the way that the matrices went, without the padding.
  if is_split:
    for placement in reversed(placements):
      out = _constrain_placement(out, placement)
  return out[tuple(slice(size) for size in x.shape)]


def _pad_number_of_matrices(x: jax.Array, axes: Axes, placement: tuple
                            ) -> jax.Array:
  """Returns x with matrices of zeros added, so that the number of devices
  divides the number of matrices.

  Args:
    x: a parameter.
    axes: the axes of its matrices.
    placement: the names of the mesh axes that each axis of x is split over.
  """
  if not axes.batch:
    return x
  batch_axis = axes.batch[0]
  num_devices = sharding.count_devices_along(placement[batch_axis])
  num_missing = -x.shape[batch_axis] % num_devices
  padding = [(0, 0)] * x.ndim
  padding[batch_axis] = (0, num_missing)
  return jnp.pad(x, padding)


def _constrain_placement(x: jax.Array, placement: tuple) -> jax.Array:
  """Returns x with each of its axes split over the mesh axes that `placement`
  names for it; () leaves an axis whole."""
  spec = PartitionSpec(*(names or None for names in placement))
  return jax.lax.with_sharding_constraint(x, spec)


def _placements_to_whole_matrices(shape: tuple[int, ...], role: Role,
                                  axes: Axes) -> list[tuple]:
  """Returns the placements by which the matrices of a parameter become whole on
  one device each: where the parameter lies at first, then one step for each
  axis of a matrix that the mesh splits.

  In a step, the mesh axes that split an axis of the matrices move to an axis of
  the batch, one that they divide if there is one, else the first. A lone matrix
  becomes whole on all devices.

  Args:
    shape: the shape of the parameter.
    role: its Role, which names its logical axes.
    axes: the axes of its matrices.

  Returns:
    A tuple for each placement, with the names of the mesh axes that each axis
    of the parameter is split over.
  """
  # Axes in front, such as that of scanned layers, lie whole on each device.
  num_leading = len(shape) - len(role.axes)
  logical_axes = (None,) * num_leading + role.axes
  first_placement = sharding.mesh_axes_of_weight(shape, logical_axes)
  placements = [first_placement]
  is_lone = math.prod(shape[i] for i in axes.batch) == 1
  for axis in axes.inputs + axes.outputs:
    # This step makes one more axis of the matrices whole.
    mesh_axes = first_placement[axis]
    if not mesh_axes:
      continue
    placement = list(placements[-1])
    placement[axis] = ()
    if not is_lone:
      batch_axis = _choose_batch_axis(
          shape, axes=axes, placement=placement, mesh_axes=mesh_axes)
      placement[batch_axis] += mesh_axes
    placements.append(tuple(placement))
  return placements


def _choose_batch_axis(shape: tuple[int, ...], axes: Axes, placement: list,
                       mesh_axes: tuple) -> int:
  """Returns the axis of the batch over which further mesh axes are to be split:
  one whose size they divide, or the first.

  Args:
    shape: the shape of the parameter.
    axes: the axes of its matrices.
    placement: the mesh axes that each axis is split over already.
    mesh_axes: the names of the further mesh axes.
  """
  for axis in axes.batch:
    num_devices = sharding.count_devices_along(placement[axis] + mesh_axes)
    if shape[axis] % num_devices == 0:
      return axis
  return axes.batch[0]
