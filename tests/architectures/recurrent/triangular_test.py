"""The inverse of a triangular matrix against numpy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from architectures.parts.recurrent import triangular

# What CPUs, GPUs and TPUs compute.
WAYS = pytest.mark.parametrize('inverse', [
    jax.jit(triangular.by_columns), jax.jit(triangular.solved),
    jax.jit(triangular.by_halves)], ids=['by_columns', 'solved', 'by_halves'])


def drawn(size, seed=0, scale=0.3):
  a = scale * np.random.default_rng(seed).normal(size=(2, 3, size, size))
  return jnp.asarray(a, jnp.float32)


def expected(a):
  a = np.asarray(a, np.float64)
  return np.linalg.inv(np.eye(a.shape[-1]) + np.tril(a, -1))


@WAYS
@pytest.mark.parametrize('size', [1, 2, 7, 17, 40, 64])
def test_it_is_the_inverse_and_reads_what_is_below_the_diagonal_alone(
    size, inverse):
  a = drawn(size)
  want = expected(a)
  np.testing.assert_allclose(inverse(a), want, atol=1e-6 * np.abs(want).max())
  upper = jnp.triu(jnp.full(a.shape, jnp.nan))
  np.testing.assert_array_equal(inverse(a + upper), inverse(a))


@WAYS
@pytest.mark.parametrize('rate', [0.5, 1.0, 1.99])
def test_keys_that_are_alike_take_no_digits(rate, inverse):
  """Powers of A grow to 1e18 here, and the inverse is below 2."""
  a = jnp.full((1, 1, 64, 64), rate)
  np.testing.assert_allclose(inverse(a), expected(a), atol=5e-5)


def test_a_cpu_calls_no_library_whose_threads_wait_for_each_other():
  text = jax.jit(triangular.inverse).lower(drawn(40)).compile().as_text()
  assert 'lapack' not in text
  assert 'lapack' in jax.jit(triangular.solved).lower(
      drawn(40)).compile().as_text()
