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
  """M and V have the shape of the parameter. So have L, R, QL and QR, but that
  the other side is one axis as long as this side, and what else it has is 1; of
  a side without a preconditioner they are None."""
  count: jax.Array  # of gradients
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
    b1, b2, eps: of Adam; b2 is of the preconditioners too.
    every: steps between two updates of the bases.
    most: the longest side that has a preconditioner.
  """
  flipped = lambda axes: Axes(axes.batch, axes.outputs, axes.inputs)
  # Of a field of the state: its own side is the rows.
  seen = lambda axes: (axes, axes, axes, flipped(axes), axes, flipped(axes))

  def init(params: Any):
    def factor(axes: Axes, x: jax.Array):
      size, _ = axes.sizes(x.shape)
      other = axes.outputs
      return None if size > most else jnp.zeros(
          [size if i == other[0] else 1 if i in other else n
           for i, n in enumerate(x.shape)], x.dtype)

    zeros = [matrices.over(roles, make, params) for make in (
        lambda _, x: jnp.zeros_like(x), factor,
        lambda axes, x: factor(flipped(axes), x))]
    return SoapState(jnp.zeros([], jnp.int32),
                     *(zeros[i] for i in (0, 0, 1, 2, 1, 2)))

  def update(grads: Any, state: Any, params: Any = None):
    def one(axes: Axes, g: jax.Array, *fields: Any):
      each = [*zip(seen(axes), fields)]
      step, s = _update(
          matrices.as_matrices(axes, g), SoapState(state.count, *(
              None if x is None else matrices.as_matrices(sides, x)
              for sides, x in each)), b1, b2, eps, every)
      return (matrices.as_before(axes, step, g.shape), *(
          None if x is None else matrices.as_before(sides, new, x.shape)
          for (sides, x), new in zip(each, s[1:])))

    step, *fields = matrices.apart(
        matrices.over(roles, one, grads, *state[1:]), 7)
    return step, SoapState(state.count + 1, *fields)

  return optax.GradientTransformation(init, update)


def _update(g: jax.Array, s: SoapState, b1: float, b2: float, eps: float,
            every: int) -> tuple[jax.Array, SoapState]:
  """Returns the step and the new state of matrices [*batch, rows, columns];
  s.count: how many steps there have been, this one included, 0 at the first."""
  t, first = s.count, s.count == 0
  p = _into(g, s.left_basis, s.right_basis)
  keep = lambda new, old: jnp.where(first, old, new)
  mean = keep(b1 * s.mean + (1 - b1) * p, s.mean)
  square = keep(b2 * s.square + (1 - b2) * p * p, s.square)
  done = jnp.maximum(t, 1).astype(g.dtype)
  debias = jnp.sqrt(1 - b2 ** done) / (1 - b1 ** done)
  step = debias * _out_of(mean / (jnp.sqrt(square) + eps), s.left_basis,
                          s.right_basis)
  left, right = (
      None if old is None else b2 * old + (1 - b2) * new
      for old, new in ((s.left, g @ g.mT), (s.right, g.mT @ g)))
  s = s._replace(mean=mean, square=square, left=left, right=right)
  begin = lambda s: s._replace(left_basis=_eigenbasis(s.left),
                               right_basis=_eigenbasis(s.right))
  s = jax.lax.cond(first, begin, lambda s: s, s)
  s = jax.lax.cond(~first & (t % every == 0), _turn, lambda s: s, s)
  return step, s  # 0 at the first: it is of the mean before


def _turn(s: SoapState) -> SoapState:
  """Brings the bases nearer to the eigenvectors, and M and V into them."""
  mean = _out_of(s.mean, s.left_basis, s.right_basis)
  square, bases = s.square, []
  for axis, factor, basis in ((-2, s.left, s.left_basis),
                              (-1, s.right, s.right_basis)):
    if factor is not None:
      values = jnp.einsum('...ij,...ij->...j', basis, factor @ basis)
      order = jnp.argsort(values, axis=-1, descending=True)
      square = jnp.take_along_axis(
          square, jnp.expand_dims(order, -3 - axis), axis=axis)
      basis = jnp.take_along_axis(basis, order[..., None, :], axis=-1)
      basis = _one_by_one(lambda x: jnp.linalg.qr(x)[0], factor @ basis)
    bases.append(basis)
  return s._replace(mean=_into(mean, *bases), square=square,
                    left_basis=bases[0], right_basis=bases[1])


def _into(x: jax.Array, left: Any, right: Any) -> jax.Array:
  x = x if left is None else left.mT @ x
  return x if right is None else x @ right


def _out_of(x: jax.Array, left: Any, right: Any) -> jax.Array:
  x = x if left is None else left @ x
  return x if right is None else x @ right.mT


def _eigenbasis(factor: Any):
  """The eigenvectors, those of large values first; None of None."""
  if factor is None:
    return None
  return jnp.flip(_one_by_one(
      lambda x: jnp.linalg.eigh(x)[1], factor), -1)


def _one_by_one(fn: Callable[[jax.Array], jax.Array], x: jax.Array
                ) -> jax.Array:
  """Returns fn of each matrix of x [..., m, n], one after another.

  On CPU, a batch of matrices waits for threads of the pool in which it runs
  itself. If several devices of one process do so, no thread is left, and all
  wait forever (jaxlib 0.10.2, ParallelBatchMap).

  Args:
    fn: of one matrix; its result has the same shape.
    x: the matrices.
  """
  flat = x.reshape(-1, *x.shape[-2:])
  # vmap would make a batch of them again.
  return jax.lax.map(jax.custom_batching.sequential_vmap(fn), flat
                     ).reshape(x.shape)
