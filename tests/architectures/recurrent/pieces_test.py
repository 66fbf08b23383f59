"""The short convolution and its gradient, which is written out, against the
definition: a sum over all pairs of places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from architectures.parts.recurrent import short_conv, pieces
from tests.helpers import models

B, L, H, K, W = 2, 9, 2, 3, 4


def definition(x_BLHK, w_WHK, before_BWHK, ids_BL):
  """Of place l and of m, W - 1 before at most, in the same document."""
  all_BMHK = jnp.concatenate([before_BWHK, x_BLHK], 1)
  at_l, at_m = jnp.arange(L)[:, None] + W - 1, jnp.arange(L + W - 1)[None]
  gap = at_l - at_m
  w_LMHK = jnp.where(((0 <= gap) & (gap < W))[..., None, None],
                     w_WHK[jnp.clip(W - 1 - gap, 0, W - 1)], 0)
  if ids_BL is None:
    return jnp.einsum('lmhk,bmhk->blhk', w_LMHK, all_BMHK)
  same_BLM = ids_BL[:, :, None] == jnp.pad(
      ids_BL, ((0, 0), (W - 1, 0)), constant_values=-1)[:, None]
  return jnp.einsum('lmhk,blm,bmhk->blhk', w_LMHK, same_BLM * 1.0, all_BMHK)


@pytest.mark.parametrize('ids', [None, (1, 1, 1, 2, 3, 3, 3, 3, 3)])
def test_it_and_its_gradient_are_those_of_the_definition(ids):
  rng = np.random.default_rng(0)
  drawn = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x, w, before = drawn(B, L, H, K), drawn(W, H, K), drawn(B, W - 1, H, K)
  if ids is not None:
    ids = jnp.array([ids])
  ours = lambda x, w, before: short_conv.convolve(
      x, w, before_BWHK=before, segment_ids_BL=ids)[0]
  theirs = lambda x, w, before: definition(x, w, before, ids)
  loss = lambda f: lambda *args: jnp.sin(f(*args)).sum()
  models.close(ours(x, w, before), theirs(x, w, before), 1e-6)
  models.close(*(jax.jit(jax.grad(loss(f), (0, 1, 2)))(x, w, before)
                 for f in (ours, theirs)), 2e-6)
  # With a bias, and through SiLU.
  bias = drawn(H, K)
  ours = lambda x, w, before, bias: short_conv.convolve(
      x, w, bias, before_BWHK=before, segment_ids_BL=ids, silu=True)[0]
  theirs = lambda x, w, before, bias: jax.nn.silu(
      definition(x, w, before, ids) + bias[None, None])
  found, want = (jax.jit(jax.value_and_grad(loss(f), (0, 1, 2, 3)))(
      x, w, before, bias) for f in (ours, theirs))
  models.close(found, want, 2e-6)


# The inverse of a triangular matrix against numpy's in float64.


# What CPUs, GPUs and TPUs compute.
WAYS = pytest.mark.parametrize('inverse', [
    jax.jit(pieces.by_columns), jax.jit(pieces.solved),
    jax.jit(pieces.by_halves)], ids=['by_columns', 'solved', 'by_halves'])


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
