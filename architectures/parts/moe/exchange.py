"""The all-to-all that rows cross the mesh by, there and, as gradients, back."""

import functools
from typing import Optional

import jax
import jax.numpy as jnp

LANES = 128  # in which a TPU holds the last axis of an array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def exchange(x: jax.Array, send_n: Optional[jax.Array],
             receive_n: Optional[jax.Array], axis: str):
  """x[d] of this device becomes x[this] of device d, along mesh axis `axis`.

  With `send_n` and `receive_n`, only so many rows of each matter, and where
  the backend can, no others travel.
  """
  whole = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=0,
                            concat_axis=0, tiled=True)
  if send_n is None:
    return whole(x)
  everything = lambda x, *_: whole(x)
  # Where only full rows travel, TPU pads a number for each row to LANES of
  # them. The numbers of all rows are fewer.
  numbers = x.ndim == 2 and x.shape[0] <= LANES
  return jax.lax.platform_dependent(
      x, send_n, receive_n, cpu=everything,
      **(dict(tpu=everything) if numbers else {}),
      default=functools.partial(_ragged, axis))


def _ragged(axis: str, x: jax.Array, send_n: Optional[jax.Array],
            receive_n: Optional[jax.Array]):
  n, bound = x.shape[:2]
  flat = x.reshape(n * bound, *x.shape[2:])
  first_n = jnp.arange(n, dtype=jnp.int32) * bound
  mine_n = jnp.full(n, jax.lax.axis_index(axis) * bound, jnp.int32)
  return jax.lax.ragged_all_to_all(
      flat, jnp.zeros_like(flat), first_n, send_n.astype(jnp.int32), mine_n,
      receive_n.astype(jnp.int32), axis_name=axis).reshape(x.shape)


def _exchange_fwd(x: jax.Array, send_n: Optional[jax.Array],
                  receive_n: Optional[jax.Array], axis: str):
  return exchange(x, send_n, receive_n, axis), (send_n, receive_n)


def _exchange_bwd(axis: str, saved: tuple, d: jax.Array):
  send_n, receive_n = saved
  return exchange(d, receive_n, send_n, axis), None, None


exchange.defvjp(_exchange_fwd, _exchange_bwd)
