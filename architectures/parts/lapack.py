"""Calls of LAPACK that several devices of one CPU process may make at once."""

from collections.abc import Callable

import jax


def one_by_one(fn: Callable[[jax.Array], jax.Array], x: jax.Array
               ) -> jax.Array:
  """Returns fn of each matrix of x [..., m, n], as large as the matrix.

  On CPU a batch of them waits for threads of the pool in which it runs itself:
  where several devices of one process do so, none is left, and all wait for
  ever (jaxlib 0.10.2, ParallelBatchMap).
  """
  flat = x.reshape(-1, *x.shape[-2:])
  # Where there are more of x (vmap), of each of them too.
  return jax.lax.map(jax.custom_batching.sequential_vmap(fn), flat
                     ).reshape(x.shape)
