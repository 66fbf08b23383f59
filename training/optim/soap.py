"""SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the eigenbasis of Shampoo.

Of each matrix with the gradient G, as in its authors' code (nikhilvyas/SOAP,
whose defaults these are but for b1), with b1, b2 and eps of Adam, at step t:

    P = QL' G QR                              G in the basis of the step before
    M = b1 M + (1 - b1) P,   V = b2 V + (1 - b2) P * P
    step = sqrt(1 - b2^t) / (1 - b1^t) QL (M / (sqrt(V) + eps)) QR'
    L = b2 L + (1 - b2) G G',   R = b2 R + (1 - b2) G' G

and every `basis_every` steps QL and QR come nearer to the eigenvectors of L and
R, by a QR decomposition of L QL and R QR with the columns in the order of
QL' L QL and QR' R QR; M and V go with them. The first gradient only makes L, R
and, by an eigendecomposition, QL and QR: no gradient is seen in a basis that it
is part of.

A side that is longer than `max_side` has no preconditioner, as in a basis that
is the identity (one-sided SOAP). Layers and experts that share an array are
matrices of their own; several axes of inputs, or of outputs, such as heads, are
one side. Vectors are not preconditioned: they are Adam's (optimizers.py).
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from architectures.parts.sharding import Axes
from training.optim import matrices


class SoapState(NamedTuple):
  """The state of the parameters, each field as a tree of arrays.

  M and V have the shape of the parameter. L and QL have its axes of inputs, and
  in the place of its outputs one axis that is as long as the inputs together;
  R and QR have its outputs so. They are None for a side without a
  preconditioner.

  Attributes:
    count: the number of gradients so far.
    mean, square: M and V.
    left, right: L and R.
    left_basis, right_basis: QL and QR.
  """
  count: jax.Array
  mean: Any
  square: Any
  left: Any
  right: Any
  left_basis: Any
  right_basis: Any


def scale_by_soap(roles: Any, b1: float, b2: float, eps: float,
                  basis_every: int, max_side: int
                  ) -> optax.GradientTransformation:
  """Returns SOAP's step before the learning rate, by the equations at the head
  of this file.

  Args:
    roles: the Role of each parameter, as a tree.
    b1, b2, eps: Adam's; b2 is the decay of the preconditioners too.
    basis_every: the steps between two updates of the bases.
    max_side: the longest side of a matrix that has a preconditioner.
  """
  soap = _Soap(roles=roles, b1=b1, b2=b2, eps=eps, basis_every=basis_every,
               max_side=max_side)
  return optax.GradientTransformation(soap.init, soap.update)


@dataclasses.dataclass(frozen=True)
class _Soap:
  """SOAP for a tree of parameters. The fields are the arguments of
  `scale_by_soap`."""
  roles: Any
  b1: float
  b2: float
  eps: float
  basis_every: int
  max_side: int

  def init(self, params: Any) -> SoapState:
    """Returns the state before the first gradient, which is all zeros."""
    zeros = optax.tree.zeros_like(params)
    left = matrices.map_over_parameters(
        self.roles, self._zero_left_factor, params)
    right = matrices.map_over_parameters(
        self.roles, self._zero_right_factor, params)
    return SoapState(count=jnp.zeros([], jnp.int32), mean=zeros, square=zeros,
                     left=left, right=right, left_basis=left,
                     right_basis=right)

  def _zero_left_factor(self, axes: Axes, x: jax.Array) -> jax.Array | None:
    """Returns zeros in the shape of L [inputs, inputs] for the parameter x;
    None if it has more inputs than `max_side`."""
    num_inputs, _ = axes.sizes(x.shape)
    if num_inputs > self.max_side:
      return None
    # L keeps the parameter's axes of inputs, and has one axis of outputs.
    shape = list(x.shape)
    for axis in axes.outputs:
      shape[axis] = 1
    shape[axes.outputs[0]] = num_inputs
    return jnp.zeros(shape, x.dtype)

  def _zero_right_factor(self, axes: Axes, x: jax.Array) -> jax.Array | None:
    """Returns zeros in the shape of R, which is L of the transposed parameter;
    None if x has more outputs than `max_side`."""
    return self._zero_left_factor(_transpose_axes(axes), x)

  def update(self, grads: optax.Updates, state: SoapState,
             params: optax.Params | None = None
             ) -> tuple[optax.Updates, SoapState]:
    """Returns the steps of all parameters, and the new state.

    Args:
      grads: the gradients.
      state: the state before.
      params: the parameters, which are not read: the step does not depend on
        them.
    """
    del params
    # All parameters share the count; the other fields are trees like `grads`.
    count, *trees = state
    update_parameter = functools.partial(self._update_parameter, count)
    updated = matrices.map_over_parameters(
        self.roles, update_parameter, grads, *trees)
    steps, *new_trees = matrices.unzip_tree(updated, len(SoapState._fields))
    return steps, SoapState(count + 1, *new_trees)

  def _update_parameter(self, count: jax.Array, axes: Axes, grad: jax.Array,
                        *fields: jax.Array | None) -> tuple:
    """Computes the step of one parameter, and its new state.

    Args:
      count: the number of gradients before this one.
      axes: which axes of the parameter are the inputs of its product (the rows
        of a matrix), the outputs (the columns), and a batch of matrices.
      grad: the gradient.
      *fields: the parameter's part of each field of SoapState except for the
        count, in their order: the moments M and V, the averages L and R of
        G G^T and G^T G of the gradient G, and their bases QL and QR.

    Returns:
      A tuple of the step and the new values of these fields.
    """
    # R and QR have the columns of the parameter as their rows, and so the axes
    # of its transpose. This order is that of the fields.
    transposed = _transpose_axes(axes)
    axes_of_fields = [axes, axes, axes, transposed, axes, transposed]

    # Reshape the gradient and the state to matrices, and update these.
    grad_matrices = matrices.reshape_to_matrices(axes, grad)
    field_matrices = []
    for field_axes, field in zip(axes_of_fields, fields):
      field_matrices.append(_reshape_to_matrices(field_axes, field))
    step_matrices, new_state = _update_matrices(
        grad_matrices, state=SoapState(count, *field_matrices), b1=self.b1,
        b2=self.b2, eps=self.eps, basis_every=self.basis_every)

    # Reshape the results to the parameter and its state.
    step = matrices.reshape_from_matrices(axes, step_matrices, grad.shape)
    new_fields = []
    for field_axes, new, old in zip(axes_of_fields, new_state[1:], fields):
      new_fields.append(_reshape_from_matrices(field_axes, new, old))
    return step, *new_fields


def _transpose_axes(axes: Axes) -> Axes:
  """Returns the axes of the transposed matrices."""
  return Axes(batch=axes.batch, inputs=axes.outputs, outputs=axes.inputs)


def _reshape_to_matrices(axes: Axes, x: jax.Array | None) -> jax.Array | None:
  """Returns x as matrices [*batch, rows, columns]; None if x is None."""
  if x is None:
    return None
  return matrices.reshape_to_matrices(axes, x)


def _reshape_from_matrices(axes: Axes, x: jax.Array | None,
                           old: jax.Array | None) -> jax.Array | None:
  """Returns the matrices x in the shape of `old`; None if x is None."""
  if x is None:
    return None
  return matrices.reshape_from_matrices(axes, x, old.shape)


def _update_matrices(grad: jax.Array, state: SoapState, b1: float, b2: float,
                     eps: float, basis_every: int
                     ) -> tuple[jax.Array, SoapState]:
  """Returns SOAP's step for matrices with the gradient G, and the new state.

    P = QL' G QR                              G in the basis of the step before
    M = b1 M + (1 - b1) P,   V = b2 V + (1 - b2) P * P
    step = sqrt(1 - b2^t) / (1 - b1^t) QL (M / (sqrt(V) + eps)) QR'
    L = b2 L + (1 - b2) G G',   R = b2 R + (1 - b2) G' G

  Args:
    grad: G, matrices [*batch, rows, columns].
    state: the state of these matrices; its count is t, from 0 at the first
      gradient.
    b1, b2, eps: those of Adam.
    basis_every: the number of steps between two updates of the bases.
  """
  is_first = state.count == 0

  def unless_first(new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(is_first, old, new)

  # Adam in the eigenbasis. The first step is 0: there is no basis yet.
  projected = _project(grad, state.left_basis, state.right_basis)
  new_mean = b1 * state.mean + (1 - b1) * projected
  new_square = b2 * state.square + (1 - b2) * projected * projected
  mean = unless_first(new_mean, state.mean)
  square = unless_first(new_square, state.square)
  num_updates = jnp.maximum(state.count, 1).astype(grad.dtype)
  debias = jnp.sqrt(1 - b2 ** num_updates) / (1 - b1 ** num_updates)
  direction = mean / (jnp.sqrt(square) + eps)
  step = debias * _project_back(direction, state.left_basis, state.right_basis)
  state = state._replace(mean=mean, square=square)

  # The preconditioners L and R take in the gradient.
  if state.left is not None:
    new_left = b2 * state.left + (1 - b2) * (grad @ grad.mT)
    state = state._replace(left=new_left)
  if state.right is not None:
    new_right = b2 * state.right + (1 - b2) * (grad.mT @ grad)
    state = state._replace(right=new_right)

  # The bases follow them: from the first gradient on, and at every few steps.
  is_basis_step = ~is_first & (state.count % basis_every == 0)
  state = jax.lax.cond(is_first, _start_bases, _keep_state, state)
  state = jax.lax.cond(is_basis_step, _refine_bases, _keep_state, state)
  return step, state


def _keep_state(state: SoapState) -> SoapState:
  return state


def _start_bases(state: SoapState) -> SoapState:
  """Returns the state with the eigenvectors of L and R as its bases."""
  return state._replace(left_basis=_eigenbasis(state.left),
                        right_basis=_eigenbasis(state.right))


def _refine_bases(state: SoapState) -> SoapState:
  """Brings the bases QL and QR, in which SOAP runs Adam, nearer to the
  eigenvectors of the averages L of G G^T and R of G^T G, where G is the
  gradient of a matrix. Adam's moments M and V are brought into the new bases.

  The mean M is a matrix like G, and is rotated. The mean square V is not, and
  cannot be rotated: its rows and columns only change places as the vectors of
  the bases do.

  Args:
    state: the state of the optimiser for one parameter, whose fields are
      matrices [*batch, rows, columns].

  Returns:
    The state with the new bases and moments.
  """
  # Rotate M out of the old bases.
  mean = _project_back(state.mean, state.left_basis, state.right_basis)
  square = state.square
  left_basis = state.left_basis
  right_basis = state.right_basis
  # Refine the bases. Their vectors are sorted by eigenvalue, and V is put in
  # the same order. A side of the matrix that is too large has no basis (None).
  if state.left is not None:
    left_basis, order = _refine_basis(state.left, left_basis)
    square = jnp.take_along_axis(square, order[..., :, None], axis=-2)
  if state.right is not None:
    right_basis, order = _refine_basis(state.right, right_basis)
    square = jnp.take_along_axis(square, order[..., None, :], axis=-1)
  # Rotate M into the new bases.
  mean = _project(mean, left_basis, right_basis)
  return state._replace(mean=mean, square=square, left_basis=left_basis,
                        right_basis=right_basis)


def _refine_basis(factor: jax.Array, basis: jax.Array
                  ) -> tuple[jax.Array, jax.Array]:
  """Brings a basis nearer to the eigenvectors of a matrix, by one step of power
  iteration and a QR decomposition.

  Args:
    factor: symmetric matrices A, [*batch, n, n].
    basis: the old basis of each, [*batch, n, n], whose columns are its vectors.

  Returns:
    The new bases, [*batch, n, n]; and `order` [*batch, n]: vector j of the new
    basis comes from vector order[j] of the old one. Vectors with large
    eigenvalues are first.
  """
  # Estimate eigenvalue j as q_j^T A q_j, with column q_j of the basis. The
  # columns are sorted before the QR decomposition, which keeps their order.
  eigenvalues = jnp.einsum('...ij,...ij->...j', basis, factor @ basis)
  order = jnp.argsort(eigenvalues, axis=-1, descending=True)
  sorted_basis = jnp.take_along_axis(basis, order[..., None, :], axis=-1)
  return _map_one_by_one(_orthonormalize, factor @ sorted_basis), order


def _orthonormalize(x: jax.Array) -> jax.Array:
  """Returns Q of the QR decomposition of one matrix."""
  q, _ = jnp.linalg.qr(x)
  return q


def _eigenvectors(x: jax.Array) -> jax.Array:
  """Returns the eigenvectors of one symmetric matrix, as columns."""
  _, vectors = jnp.linalg.eigh(x)
  return vectors


def _project(x: jax.Array, left_basis: jax.Array | None,
             right_basis: jax.Array | None) -> jax.Array:
  """Returns QL' x QR, the matrices x in the bases; None is the identity."""
  if left_basis is not None:
    x = left_basis.mT @ x
  if right_basis is not None:
    x = x @ right_basis
  return x


def _project_back(x: jax.Array, left_basis: jax.Array | None,
                  right_basis: jax.Array | None) -> jax.Array:
  """Returns QL x QR', the inverse of `_project`; None is the identity."""
  if left_basis is not None:
    x = left_basis @ x
  if right_basis is not None:
    x = x @ right_basis.mT
  return x


def _eigenbasis(factor: jax.Array | None) -> jax.Array | None:
  """Returns the eigenvectors of symmetric matrices as columns, those of large
  eigenvalues first; None of None."""
  if factor is None:
    return None
  return jnp.flip(_map_one_by_one(_eigenvectors, factor), -1)


def _map_one_by_one(fn: Callable[[jax.Array], jax.Array], x: jax.Array
                    ) -> jax.Array:
  """Applies a function to each matrix of x [..., m, n], one after another.

  On CPU, a batch of matrices waits for threads of the pool in which it runs
  itself. If several devices of one process do so, no thread is left, and all
  wait forever (jaxlib 0.10.2, ParallelBatchMap).

  Args:
    fn: a function of one matrix, whose result has the same shape.
    x: the matrices.
  """
  flat = x.reshape(-1, *x.shape[-2:])
  # vmap would make a batch of them again.
  one_by_one = jax.custom_batching.sequential_vmap(fn)
  return jax.lax.map(one_by_one, flat).reshape(x.shape)
