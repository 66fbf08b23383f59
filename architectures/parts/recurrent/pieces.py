"""What a recurrence is given, the pieces of a row, and how a head's decays add
up within one (recurrence.py says of what)."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp

from architectures.parts import linear

FORGETS = -1e30  # a logarithm in place of -inf, whose exponential is 0 as well


class Inputs(NamedTuple):
  """What a recurrence is given. J heads of queries and keys serve H heads of
  values, each of them H / J that follow one another."""
  q_BLJK: jax.Array
  k_BLJK: jax.Array
  v_BLHU: jax.Array
  # The last axis is 1 (a head has one decay) or K (each feature has its own).
  log_decay_BLHK: Optional[jax.Array] = None  # None: no decay
  rate_BLH: Optional[jax.Array] = None  # None: no delta rule


def by_place(places: int, x_BL: jax.Array) -> jax.Array:
  """[B, L, ...] -> float32 [pieces, B, P, ...], filled up with zeros: a place
  of zeros writes nothing and its decay is 1."""
  B, L, *rest = x_BL.shape
  x_BL = jnp.pad(x_BL.astype(jnp.float32), (
      (0, 0), (0, -L % places), *((0, 0) for _ in rest)))
  return jnp.moveaxis(x_BL.reshape(B, -1, places, *rest), 1, 0)


def cut(places: int, x_BLH: jax.Array) -> jax.Array:
  """[B, L, H, ...] -> float32 [pieces, B, H, P, ...], likewise."""
  return jnp.swapaxes(by_place(places, x_BLH), 2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_groups(f: Callable[[Any], Any], most: int, x: Any) -> Any:
  """Returns f of all pieces, [pieces, B, ...] each, at most `most` of them at a
  time; the backward pass computes them again.

  A group is cut out of the arrays, and goes to `f` as [B x pieces, ...], which
  is how XLA keeps it in memory. If jax.lax.map stacks groups of the first axis
  instead, XLA moves that axis in a kernel together with what comes before it,
  and libtpu (0.0.50 and 0.0.52) aborts: "Cannot find a valid window".

  Args:
    f: a function whose rows do not depend on each other.
    most: the most pieces of a group. All groups are equally large, so that the
      last one may begin with some of those before it.
    x: its argument.
  """
  return _in_groups(functools.partial(_by_row, f), most, x)


def _in_groups(f: Callable[[Any], Any], most: int, x: Any) -> Any:
  count = jax.tree.leaves(x)[0].shape[0]
  groups = -(-count // most)
  if groups == 1:
    return f(x)
  size = -(-count // groups)
  # Both clamp where a group begins, so that it ends with the last piece.
  group = lambda i: jax.tree.map(
      lambda y: jax.lax.dynamic_slice_in_dim(y, i * size, size), x)
  put = lambda i, y, here: jax.lax.dynamic_update_slice_in_dim(
      y, here, i * size, 0)
  empty = jax.tree.map(lambda y: jnp.zeros((count, *y.shape[1:]), y.dtype),
                       jax.eval_shape(f, group(0)))
  return jax.lax.fori_loop(0, groups, lambda i, out: jax.tree.map(
      functools.partial(put, i), out, f(group(i))), empty)


def _by_row(f: Callable[[Any], Any], x: Any) -> Any:
  count, B = jax.tree.leaves(x)[0].shape[:2]
  rows = jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1).reshape(
      B * count, *y.shape[2:]), x)
  return jax.tree.map(lambda y: jnp.swapaxes(y.reshape(
      B, count, *y.shape[1:]), 0, 1), f(rows))


def _in_groups_bwd(f: Callable[[Any], Any], most: int, x: Any, d: Any):
  one = functools.partial(_by_row, f)
  return _in_groups(lambda x_d: jax.vjp(one, x_d[0])[1](x_d[1]), most, (x, d))


in_groups.defvjp(lambda f, most, x: (in_groups(f, most, x), x), _in_groups_bwd)


def decays(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the decay after place j up to i, [..., i, j], 0 where j is later;
  and that of the piece up to i, [..., i]."""
  sums, upto = linear.counted(_sums, 0)(jnp.maximum(log_decay, FORGETS))
  return jnp.where(_lower(log_decay), jnp.exp(sums), 0), jnp.exp(upto)


def _lower(log_decay: jax.Array) -> jax.Array:
  """A triangle of the places of the last axis, with leading axes of 1."""
  P = log_decay.shape[-1]
  return jnp.tri(P, dtype=bool).reshape((1,) * (log_decay.ndim - 1) + (P, P))


def _sums(log_decay: jax.Array):
  """Returns the sums over the places after j up to i, and over those up to i.
  As a product with a triangle of ones, on CPU it takes a third of the time of
  jnp.cumsum."""
  P = log_decay.shape[-1]
  upto = jnp.where(_lower(log_decay), log_decay[..., None, :], 0)
  return (jnp.einsum('...im,mj->...ij', upto, jnp.tri(P, k=-1),
                     precision='highest'), upto.sum(-1))
