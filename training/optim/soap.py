"""SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the eigenbasis of Shampoo.

Of each matrix with the gradient G, as in its authors' code (nikhilvyas/SOAP,
whose defaults these are but for b1), with b1, b2 and eps of Adam, at step t:

    P = QL' G QR                              G in the basis of the step before
    M = b1 M + (1 - b1) P,   V = b2 V + (1 - b2) P * P
    step = sqrt(1 - b2^t) / (1 - b1^t) QL (M / (sqrt(V) + eps)) QR'
    L = b2 L + (1 - b2) G G',   R = b2 R + (1 - b2) G' G

and every `every` steps QL and QR come nearer to the eigenvectors of L and R,
by a QR decomposition of L QL and R QR with the columns in the order of QL' L QL
and QR' R QR; M and V go with them. The first gradient only makes L, R and, by
an eigendecomposition, QL and QR: no gradient is seen in a basis that it is part
of.

A side that is longer than `most` has no preconditioner, as in a basis that is
the identity (one-sided SOAP). Layers and experts that share an array are
matrices of their own; several axes of inputs, or of outputs, such as heads, are
one side. Vectors are not preconditioned: they are Adam's (optimizers.py).
"""

from collections.abc import Callable
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


def scale_by_soap(roles: Any, b1: float, b2: float, eps: float, every: int,
                  most: int) -> optax.GradientTransformation:
  """Returns the direction of SOAP.

  Args:
    roles: the Role of each parameter, as a tree.
    b1, b2, eps: Adam's; b2 is the decay of the preconditioners too.
    every: the steps between two updates of the bases.
    most: the longest side that has a preconditioner.
  """
  def left_factor(axes: Axes, x: jax.Array) -> jax.Array | None:
    """Returns zeros for L: the side of the outputs is as long as the inputs'.
    """
    size, _ = axes.sizes(x.shape)
    if size > most:
      return None
    shape = list(x.shape)
    for axis in axes.outputs:
      shape[axis] = 1
    shape[axes.outputs[0]] = size
    return jnp.zeros(shape, x.dtype)

  def right_factor(axes: Axes, x: jax.Array) -> jax.Array | None:
    return left_factor(_flipped(axes), x)

  def init(params: Any) -> SoapState:
    zeros = optax.tree.zeros_like(params)
    left = matrices.over(roles, left_factor, params)
    right = matrices.over(roles, right_factor, params)
    return SoapState(count=jnp.zeros([], jnp.int32), mean=zeros, square=zeros,
                     left=left, right=right, left_basis=left,
                     right_basis=right)

  def update(grads: Any, state: SoapState, params: Any = None):
    """Returns the steps and the new state, of each parameter by itself."""
    del params

    def one(axes: Axes, g: jax.Array, *fields: Any):
      """Returns the step of a parameter, and the new fields of its state."""
      # A field's own side is its rows.
      flipped = _flipped(axes)
      sides = SoapState(count=None, mean=axes, square=axes, left=axes,
                        right=flipped, left_basis=axes, right_basis=flipped)
      of_matrices = []
      for side, x in zip(sides[1:], fields):
        of_matrices.append(_as_matrices(side, x))

      # The algorithm is of matrices, which the parameter is cut into.
      g_as_matrices = matrices.as_matrices(axes, g)
      of_parameter = SoapState(state.count, *of_matrices)
      step, new = _update(g_as_matrices, s=of_parameter, b1=b1, b2=b2, eps=eps,
                          every=every)

      # The step and the fields as the parameter and its fields lie.
      new_fields = []
      for side, x, old in zip(sides[1:], new[1:], fields):
        new_fields.append(_as_before(side, x, old))
      return matrices.as_before(axes, step, g.shape), *new_fields

    updated = matrices.over(roles, one, grads, *state[1:])
    step, *fields = matrices.apart(updated, len(SoapState._fields))
    return step, SoapState(state.count + 1, *fields)

  return optax.GradientTransformation(init, update)


def _flipped(axes: Axes) -> Axes:
  """Returns the axes of the transposed matrices."""
  return Axes(axes.batch, axes.outputs, axes.inputs)


def _as_matrices(axes: Axes, x: jax.Array | None) -> jax.Array | None:
  if x is None:
    return None
  return matrices.as_matrices(axes, x)


def _as_before(axes: Axes, x: jax.Array | None, old: jax.Array | None
               ) -> jax.Array | None:
  if x is None:
    return None
  return matrices.as_before(axes, x, old.shape)


def _update(g: jax.Array, s: SoapState, b1: float, b2: float, eps: float,
            every: int) -> tuple[jax.Array, SoapState]:
  """Returns the step of SOAP and the new state, by the equations above.

  Args:
    g: G, matrices [*batch, rows, columns].
    s: the state of these matrices; s.count is t, from 0 at the first gradient.
    b1, b2, eps: those of Adam.
    every: the number of steps between two updates of the bases.
  """
  is_first = s.count == 0

  def unless_first(new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(is_first, old, new)

  # Adam in the basis. The first step is 0: it is of the mean before.
  p = _into(g, s.left_basis, s.right_basis)
  mean = unless_first(b1 * s.mean + (1 - b1) * p, s.mean)
  square = unless_first(b2 * s.square + (1 - b2) * p * p, s.square)
  done = jnp.maximum(s.count, 1).astype(g.dtype)
  debias = jnp.sqrt(1 - b2 ** done) / (1 - b1 ** done)
  direction = mean / (jnp.sqrt(square) + eps)
  step = debias * _out_of(direction, s.left_basis, s.right_basis)

  # L = b2 L + (1 - b2) G G', and R of G' G; now and then their bases.
  s = s._replace(mean=mean, square=square)
  if s.left is not None:
    s = s._replace(left=b2 * s.left + (1 - b2) * (g @ g.mT))
  if s.right is not None:
    s = s._replace(right=b2 * s.right + (1 - b2) * (g.mT @ g))
  is_turn = ~is_first & (s.count % every == 0)
  s = jax.lax.cond(is_first, _begin, _as_it_is, s)
  s = jax.lax.cond(is_turn, _turn, _as_it_is, s)
  return step, s


def _as_it_is(s: SoapState) -> SoapState:
  return s


def _begin(s: SoapState) -> SoapState:
  """Makes the bases of the first preconditioners."""
  return s._replace(left_basis=_eigenbasis(s.left),
                    right_basis=_eigenbasis(s.right))


def _turn(s: SoapState) -> SoapState:
  """Brings QL and QR nearer to the eigenvectors, and M and V into them."""
  # M leaves the bases before they move, and enters them after.
  mean = _out_of(s.mean, s.left_basis, s.right_basis)
  square = s.square
  left_basis = s.left_basis
  right_basis = s.right_basis
  # The columns of a basis change places with its eigenvalues, and V with them.
  if s.left is not None:
    left_basis, order = _nearer(s.left, left_basis)
    square = jnp.take_along_axis(square, order[..., :, None], axis=-2)
  if s.right is not None:
    right_basis, order = _nearer(s.right, right_basis)
    square = jnp.take_along_axis(square, order[..., None, :], axis=-1)
  mean = _into(mean, left_basis, right_basis)
  return s._replace(mean=mean, square=square, left_basis=left_basis,
                    right_basis=right_basis)


def _nearer(factor: jax.Array, basis: jax.Array
            ) -> tuple[jax.Array, jax.Array]:
  """Returns a basis that is nearer to the eigenvectors of a factor, by a step
  of power iteration and a QR decomposition, and the new order of its vectors,
  those of large values first."""
  values = jnp.einsum('...ij,...ij->...j', basis, factor @ basis)
  order = jnp.argsort(values, axis=-1, descending=True)
  basis = jnp.take_along_axis(basis, order[..., None, :], axis=-1)
  return _one_by_one(_q_of, factor @ basis), order


def _q_of(x: jax.Array) -> jax.Array:
  q, _ = jnp.linalg.qr(x)
  return q


def _eigenvectors(x: jax.Array) -> jax.Array:
  _, vectors = jnp.linalg.eigh(x)
  return vectors


def _into(x: jax.Array, left: jax.Array | None, right: jax.Array | None
          ) -> jax.Array:
  """Returns matrices in the bases; None is the identity."""
  if left is not None:
    x = left.mT @ x
  if right is not None:
    x = x @ right
  return x


def _out_of(x: jax.Array, left: jax.Array | None, right: jax.Array | None
            ) -> jax.Array:
  """Returns matrices out of the bases; None is the identity."""
  if left is not None:
    x = left @ x
  if right is not None:
    x = x @ right.mT
  return x


def _eigenbasis(factor: jax.Array | None) -> jax.Array | None:
  """Returns the eigenvectors, those of large values first; None of None."""
  if factor is None:
    return None
  return jnp.flip(_one_by_one(_eigenvectors, factor), -1)


def _one_by_one(fn: Callable[[jax.Array], jax.Array], x: jax.Array
                ) -> jax.Array:
  """Returns fn of each matrix of x [..., m, n], one after another.

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
