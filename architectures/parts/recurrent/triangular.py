"""The inverse of a triangular matrix whose diagonal is ones."""

import jax
import jax.numpy as jnp

from architectures.parts import lapack


def inverse(a_PP: jax.Array) -> jax.Array:
  """Returns (I + A)^-1, [..., P, P].

  Blocks that are inverted and joined by products take as long on CPU, and at
  least five times as long to compile (docs/performance_diary.md). The product
  (I - A)(I + A^2)(I + A^4)..., which ends as A is nilpotent, is one of powers
  that cancel: of 64 keys alike with a rate near 2 no digit is left.

  Args:
    a_PP: [..., P, P]; what lies on the diagonal or above it is not read.
  """
  return jax.lax.platform_dependent(
      a_PP, cpu=lambda a_PP: lapack.one_by_one(_solved, a_PP), default=_solved)


def _solved(a_PP: jax.Array) -> jax.Array:
  eye_PP = jnp.eye(a_PP.shape[-1], dtype=a_PP.dtype)
  return jax.lax.linalg.triangular_solve(
      a_PP, jnp.broadcast_to(eye_PP, a_PP.shape), left_side=True, lower=True,
      unit_diagonal=True)
