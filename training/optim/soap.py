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
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from architectures.parts.roles import Axes, Role
from training.optim import trees


class SoapState(NamedTuple):
  """M and V have the shape of the parameter. So have L, R, QL and QR, but that
  the other side is one axis as long as this side, and what else it has is 1; of
  a side without a preconditioner they are masked."""
  count: jax.Array  # of gradients
  mean: optax.Params
  square: optax.Params
  left: optax.Params
  right: optax.Params
  left_basis: optax.Params
  right_basis: optax.Params


class _Matrix(NamedTuple):
  """The state of one parameter, as matrices [*batch, ...]; None: masked."""
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
    roles: the Role of each parameter, as a tree; where optax.partition leaves
      out a parameter, its role is not read.
    b1, b2, eps: of Adam; b2 is of the preconditioners too.
    every: steps between two updates of the bases.
    most: the longest side that has a preconditioner.
  """

  def init(params: Any):
    def zeros(role: Role, x: jax.Array, side: int):
      axes = role.split(x.ndim)
      if side == 2:
        return jnp.zeros(x.shape, x.dtype)
      if axes.sizes(x.shape)[side] > most:
        return optax.MaskedNode()
      return jnp.zeros(_factor_shape(axes, x.shape, side), x.dtype)

    of = lambda side: trees.over_paths(
        roles, lambda role, x: zeros(role, x, side), params)
    return SoapState(jnp.zeros([], jnp.int32), of(2), of(2), of(0), of(1),
                     of(0), of(1))

  def update(grads: Any, state: Any, params: Any = None):
    del params
    first, t = state.count == 0, state.count

    def one(axes: Axes, g: jax.Array, *own: Any):
      shapes = _Matrix(g.shape, g.shape, *(
          _factor_shape(axes, g.shape, side) for side in (0, 1, 0, 1)))
      matrix = _Matrix(*(
          None if isinstance(x, optax.MaskedNode) else _as_matrices(axes, x, i)
          for i, x in enumerate(own)))
      step, matrix = _update(
          trees.as_matrices(axes, g), matrix, t, first, b1, b2, eps, every)
      return (trees.as_before(axes, step, g.shape), *(
          optax.MaskedNode() if x is None else _as_before(axes, x, shape, i)
          for i, (x, shape) in enumerate(zip(matrix, shapes))))

    found = trees.over(roles, one, grads, *state[1:])
    pick = lambda i: jax.tree.map(
        lambda x: x[i], found, is_leaf=lambda x: type(x) is tuple)
    return pick(0), SoapState(state.count + 1, *(
        pick(i) for i in range(1, 1 + len(_Matrix._fields))))

  return optax.GradientTransformation(init, update)


def _update(g: jax.Array, s: _Matrix, t: jax.Array, first: jax.Array,
            b1: float, b2: float, eps: float, every: int
            ) -> tuple[jax.Array, _Matrix]:
  """Returns the step and the new state of matrices [*batch, rows, columns];
  t: how many steps there have been, this one included, 0 at the first."""
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

  def begin(s: _Matrix) -> _Matrix:
    return s._replace(left_basis=_eigenbasis(s.left),
                      right_basis=_eigenbasis(s.right))

  s = _Matrix(mean, square, left, right, s.left_basis, s.right_basis)
  s = _when(first, begin, s)
  s = _when(~first & (t % every == 0), _turn, s)
  return step, s  # 0 at the first: it is of the mean before


def _turn(s: _Matrix) -> _Matrix:
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


def _when(ok: jax.Array, fn: Callable[[_Matrix], _Matrix], s: _Matrix
          ) -> _Matrix:
  """Returns fn(s) if ok, else s. Where several runs train as one (vmap), fn
  is computed at the steps alone at which one of them needs it: jax.lax.cond
  would become a choice between both sides, at each step."""

  @jax.custom_batching.custom_vmap
  def when(ok: jax.Array, s: _Matrix):
    return jax.lax.cond(ok, fn, lambda s: s, s)

  @when.def_vmap
  def _(size: int, batched: Any, ok: jax.Array, s: _Matrix):
    each = lambda x, is_batched: x if is_batched else jnp.broadcast_to(
        x, (size, *x.shape))
    oks = each(ok, batched[0])
    s = jax.tree.map(each, s, batched[1])
    chosen = lambda s: jax.tree.map(
        lambda new, old: jnp.where(
            oks.reshape(-1, *(1,) * (old.ndim - 1)), new, old),
        jax.vmap(fn)(s), s)
    return jax.lax.cond(oks.any(), chosen, lambda s: s, s), jax.tree.map(
        lambda _: True, s)

  return when(ok, s)


def _factor_shape(axes: Axes, shape: tuple[int, ...], side: int
                  ) -> tuple[int, ...]:
  """The shape in which the factor of a side is kept; side 0: the rows."""
  own, other = (axes.inputs, axes.outputs)[::1 if side == 0 else -1]
  size = math.prod(shape[i] for i in own)
  return tuple(size if i == other[0] else 1 if i in other else n
               for i, n in enumerate(shape))


def _is_right(field: int) -> bool:
  return _Matrix._fields[field].startswith('right')


def _as_matrices(axes: Axes, x: jax.Array, field: int) -> jax.Array:
  """A leaf of the state as matrices: of a factor its own side is the rows."""
  if _is_right(field):
    axes = Axes(axes.batch, axes.outputs, axes.inputs)
  return trees.as_matrices(axes, x)


def _as_before(axes: Axes, x: jax.Array, shape: tuple[int, ...], field: int
               ) -> jax.Array:
  if _is_right(field):
    axes = Axes(axes.batch, axes.outputs, axes.inputs)
  return trees.as_before(axes, x, shape)
