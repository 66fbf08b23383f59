"""Calls of LAPACK that several devices of one CPU process may make at once."""

from collections.abc import Callable

import jax


def one_by_one(fn: Callable[[jax.Array], jax.Array], x: jax.Array
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
