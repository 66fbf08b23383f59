"""Adafactor, Muon and NorMuon: steps that are made of whole matrices.

Layers and experts that share an array are matrices of their own, and several
axes of inputs, or of outputs, such as heads, are one side
(architectures/parts/sharding.py). optax's Adafactor would factor the two
largest axes of an array, and so mix layers: a scanned model would learn
otherwise than an unrolled one.
"""

from collections.abc import Callable
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from architectures.parts import sharding
from architectures.parts.sharding import Axes, Role


def map_over_parameters(roles: Any, fn: Callable[..., Any], *trees: Any):
  """Applies a function to each parameter of a model, and tells it which axes of
  the parameter make the rows and columns of a matrix.

  Optimisers such as Muon work on matrices, but a parameter may have more axes,
  such as [layers, features, heads, head size]. Its Role says which of them are
  the inputs of the product that it is used in. From it follow its Axes: the
  axes of a batch of matrices (here the layers), the inputs (rows) and the
  outputs (columns).

  Args:
    roles: the Role of each parameter, as a tree.
    fn: a function of the Axes of a parameter, and of its leaf in each of
      `trees`.
    *trees: trees with one leaf for each parameter. Where the first tree has an
      optax.MaskedNode, which stands for a parameter of another optimiser, `fn`
      is not called, and the result is that node.

  Returns:
    The tree of the results.
  """

  def apply_to_parameter(role: Role, x: Any, *more: Any) -> Any:
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
  # Only plain tuples are leaves: a NamedTuple, such as the state of an
  # optimiser, is a part of the tree.
  def is_tuple(x: Any) -> bool:
    return type(x) is tuple

  trees = []
  for i in range(num_trees):
    take_item = operator.itemgetter(i)
    trees.append(jax.tree.map(take_item, tree, is_leaf=is_tuple))
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
  """Reshapes matrices to the parameter that they were made from. This is the
  inverse of `reshape_to_matrices`.

  Args:
    axes: which axes of the parameter make the batch of matrices, which the rows
      of a matrix (inputs), and which its columns (outputs).
    matrices: an array [*batch, rows, columns].
    shape: the shape of the parameter.
  """
  # Split the rows and the columns into axes of the parameter, still in the
  # order [*batch, *inputs, *outputs]. Then put the axes where the parameter has
  # them.
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

  def update(grads: optax.Updates, state: FactoredState, params: optax.Params
             ) -> tuple[optax.Updates, FactoredState]:
    """Returns the steps of all parameters, and the new state of the optimiser.
    A step is the gradient divided by the root of its factored second moment."""
    count = optax.safe_increment(state.count)
    decay = 1 - count.astype(jnp.float32) ** -0.8

    def update_parameter(axes: Axes, grad: jax.Array, row_moment: jax.Array,
                         column_moment: jax.Array | None, param: jax.Array):
      """Returns the step of one parameter, and its new second moments.

      The second moment V of a matrix is not stored. It is approximated from the
      means R of its rows and C of its columns, V = R C^T / mean(R).

      Args:
        axes: which axes of the parameter are the inputs of its product (the
          rows), the outputs (the columns), and a batch of matrices.
        grad: the gradient.
        row_moment: R, the average of the squared gradient for each row. For a
          parameter that is not factored, the average for each element.
        column_moment: C, the average for each column; None: the parameter is
          not factored, as it is a vector or a small matrix.
        param: the parameter.
      """
      # 1e-30 is the paper's first constant, by which no moment is zero.
      square = jnp.square(grad) + 1e-30
      if column_moment is None:
        row_moment = _update_average(row_moment, square, decay)
        step = jax.lax.rsqrt(row_moment) * grad
      else:
        row_moment = _update_average(
            row_moment, _mean(square, axes.outputs), decay)
        column_moment = _update_average(
            column_moment, _mean(square, axes.inputs), decay)
        row_factor = jax.lax.rsqrt(row_moment / _mean(row_moment, axes.inputs))
        step = grad * (row_factor * jax.lax.rsqrt(column_moment))
      # Clip the root mean square (RMS) of the step to 1, as the paper does.
      # Then scale the step by the RMS of the parameter, but at least by 1e-3,
      # so that a parameter of zeros can move.
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
  momentum of each matrix, orthogonalised and scaled to 0.2 root mean square,
  about the size of Adam's steps. With the gradient G_t and b = beta,

    M_t  = b M_(t-1) + (1 - b) G_t
    N_t  = b M_t / (1 - b^(t+1)) + (1 - b) G_t / (1 - b^t)      Nesterov
    step = 0.2 sqrt(max(rows, columns)) orthogonalised N_t

  It computes what optax.contrib.scale_by_muon does, for matrices that the
  devices of a mesh may share (`orthogonalize`).

  Args:
    roles: the Role of each parameter, as a tree.
    beta: the decay of the momentum.
  """
  optax_muon = optax.contrib.scale_by_muon(beta=beta)

  def scale_to_adam_size(axes: Axes, orthogonal: jax.Array) -> jax.Array:
    """Returns an orthogonal matrix at 0.2 root mean square. Before, it is 1 /
    sqrt(the longer side)."""
    longer_side = max(axes.sizes(orthogonal.shape))
    return 0.2 * longer_side ** 0.5 * orthogonal

  def look_ahead(momentum: jax.Array, grad: jax.Array) -> jax.Array:
    """Returns Nesterov's N, by the unbiased momentum and gradient."""
    return beta * momentum + (1 - beta) * grad

  def update(grads: optax.Updates, state: optax.contrib.MuonState,
             params: optax.Params | None = None
             ) -> tuple[optax.Updates, optax.contrib.MuonState]:
    """Returns the steps of all parameters, orthogonal matrices in the
    directions of the momentum, and the new state of the optimiser."""
    del params
    # Compute N. Both of its terms are corrected for having begun at 0. The
    # momentum is taken for one step later than the gradient, hence the next
    # count.
    momentum = optax.tree.update_moment(grads, state.mu, beta, 1)
    count = optax.safe_increment(state.count)
    next_count = optax.safe_increment(count)
    unbiased_momentum = optax.tree.bias_correction(momentum, beta, next_count)
    unbiased_grads = optax.tree.bias_correction(grads, beta, count)
    directions = jax.tree.map(look_ahead, unbiased_momentum, unbiased_grads)
    # Take the nearest orthogonal matrices, at the usual size of Adam's steps.
    orthogonal = orthogonalize(roles, directions)
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

  def update(grads: optax.Updates, state: NorMuonState,
             params: optax.Params | None = None
             ) -> tuple[optax.Updates, NorMuonState]:
    """Returns the steps of all parameters and the new state, by the equations
    of `scale_by_normuon`."""
    del params
    # M, and (1 - b) G + b M, which adds the gradient to M once more.
    momentum = jax.tree.map(add_gradient, state.momentum, grads)
    look_ahead = jax.tree.map(add_gradient, momentum, grads)
    orthogonal = orthogonalize(roles, look_ahead)

    # v of each neuron, and the steps of one size.
    neurons = map_over_parameters(roles, update_neuron_squares, orthogonal,
                                  state.neurons)
    steps = map_over_parameters(roles, equalize_neurons, orthogonal, neurons)
    return steps, NorMuonState(momentum=momentum, neurons=neurons)

  return optax.GradientTransformation(init, update)


def orthogonalize(roles: Any, tree: Any):
  """Returns the nearest orthogonal matrix of each matrix of a tree of
  parameters, approximately: U V^T for the singular value decomposition U S V^T.
  It is found by five Newton-Schulz iterations (Jordan et al. 2024), after which
  the singular values are about 0.5 to 1.5 rather than 1.

  Each iteration multiplies a matrix by its transpose. If the devices of a mesh
  shared a matrix, XLA would sum these products over them each time. So the
  matrices of a stack, of layers or experts, are first dealt out to the devices,
  each matrix whole to one of them, and the results are sent back: two
  all-to-alls of what a device holds. (Liu et al. 2025, arXiv 2502.16982,
  section 2.3, gather a matrix on every device that has a part of it.)

  Args:
    roles: the Role of each parameter (which of its axes are the inputs and
      outputs of its product), as a tree.
    tree: an array in the shape of each parameter; or an optax.MaskedNode, which
      is returned as it is.
  """
  def orthogonalize_unless_masked(role: Role, x: Any) -> Any:
    if isinstance(x, optax.MaskedNode):
      return x
    return _orthogonalize_parameter(role, x)

  return jax.tree.map(orthogonalize_unless_masked, roles, tree)


def _orthogonalize_parameter(role: Role, x: jax.Array) -> jax.Array:
  """Returns the nearest orthogonal matrix of each matrix of one parameter,
  approximately: U V^T for the singular value decomposition U S V^T.

  Args:
    role: which axes of the parameter are the inputs and the outputs of its
      product. The others are a batch of matrices.
    x: the momentum of the parameter, in the shape of the parameter.
  """
  axes = role.split(x.ndim)
  # The placements say over which mesh axes x is split: at first, and then after
  # each step of bringing whole matrices onto one device. If there is only one,
  # the matrices are whole already.
  placements = _placements_to_whole_matrices(x.shape, role, axes)
  is_split = len(placements) > 1

  # Move the matrices. Matrices of zeros are added first, so that all devices
  # get the same number.
  whole = x
  if is_split:
    whole = _pad_number_of_matrices(whole, axes, placements[-1])
    for placement in placements:
      whole = _constrain_placement(whole, placement)

  # Without momentum, optax's Muon does nothing but orthogonalise its input.
  tx = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)

  def orthogonalize_matrix(matrix: jax.Array) -> jax.Array:
    orthogonal, _ = tx.update(matrix, tx.init(matrix))
    return orthogonal

  # It takes a single matrix, so map over each axis of the batch.
  for _ in axes.batch:
    orthogonalize_matrix = jax.vmap(orthogonalize_matrix)
  matrices = orthogonalize_matrix(reshape_to_matrices(axes, whole))
  out = reshape_from_matrices(axes, matrices, whole.shape)

  # Move the results back by the same steps in reverse, and cut off the padding.
  if is_split:
    for placement in reversed(placements):
      out = _constrain_placement(out, placement)
  return out[tuple(slice(size) for size in x.shape)]


def _pad_number_of_matrices(x: jax.Array, axes: Axes, placement: tuple
                            ) -> jax.Array:
  """Adds matrices of zeros to a parameter, so that the devices over which its
  matrices are distributed get the same number each.

  Args:
    x: a parameter that holds a batch of matrices.
    axes: which axes of x are the batch, and which the rows and columns.
    placement: for each axis of x, the names of the mesh axes that it is split
      over.
  """
  # A single matrix is not distributed.
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
  """Plans how a parameter is moved between the devices of a mesh until each of
  its matrices is whole on one device.

  The plan is a list of placements. A placement says for each axis of the
  parameter which mesh axes split it. The first placement is where the parameter
  lies. Each further one makes one more axis of the matrices whole: the mesh
  axes that split it now split an axis of the batch of matrices instead. A
  parameter that is a single matrix becomes whole on all devices.

  Args:
    shape: the shape of the parameter.
    role: the Role of the parameter, which has the names of its axes.
    axes: which axes of the parameter are the batch of matrices, and which are
      the rows (inputs) and columns (outputs).

  Returns:
    The placements, each a tuple with an entry for each axis of the parameter:
    the names of the mesh axes that split it.
  """
  # Axes before those that the role names, such as that of scanned layers, are
  # not split.
  num_leading = len(shape) - len(role.axes)
  logical_axes = (None,) * num_leading + role.axes
  first_placement = sharding.mesh_axes_of_weight(shape, logical_axes)
  placements = [first_placement]
  is_lone = math.prod(shape[i] for i in axes.batch) == 1
  for axis in axes.inputs + axes.outputs:
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
  """Chooses the axis of the batch of matrices that further mesh axes are to
  split: one whose size the number of devices divides, else the first.

  Args:
    shape: the shape of the parameter.
    axes: which axes of the parameter are the batch, and which the rows and
      columns of its matrices.
    placement: for each axis of the parameter, the mesh axes that already split
      it.
    mesh_axes: the names of the further mesh axes.
  """
  for axis in axes.batch:
    num_devices = sharding.count_devices_along(placement[axis] + mesh_axes)
    if shape[axis] % num_devices == 0:
      return axis
  return axes.batch[0]
