"""What a recurrence is given, the pieces of a row, and how a head's decays add
up within one (recurrence.py says of what)."""

from typing import NamedTuple, Optional

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
