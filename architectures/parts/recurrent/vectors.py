"""Lengths and scalings of vectors, whose gradients are products of vectors.

For a sum over features of x * y, where x and y are two arrays, XLA's CPU
backend (jaxlib 0.10.2) takes 15 times as long as for the same sum as an einsum.
JAX derives such sums as the gradient of a number that multiplies a vector.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import norms
from architectures.parts.config import ModelConfig
from architectures.parts.roles import Role, declare

LENGTH_EPS = 1e-6  # beside a squared length, as in the authors' programs


def dots(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns the inner products of the vectors of x and y, [..., K] -> [...]."""
  return jnp.einsum('...k,...k->...', x, y)


@jax.custom_vjp
def scaled(x: jax.Array, by: jax.Array) -> jax.Array:
  """Returns the vectors of x, [..., K], times the numbers of `by`, [...]."""
  return x * by[..., None]


scaled.defvjp(
    lambda x, by: (scaled(x, by), (x, by)),
    lambda kept, d: (d * kept[1][..., None], dots(d, kept[0])))


@jax.custom_vjp
def weighted(x: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns x times weights of its last axes, in float32. The gradient of the
  weights sums over all other axes at once: over [1, 2048, 8, 64] it takes 1.1
  ms on CPU, and 12 ms over axis 1 alone, which JAX derives."""
  lead = (1,) * (x.ndim - weights.ndim)
  return x * weights.astype(jnp.float32).reshape(lead + weights.shape)


def _weighted_bwd(kept: tuple[jax.Array, jax.Array], d: jax.Array):
  x, weights = kept
  d_weights = (d * x).sum(tuple(range(x.ndim - weights.ndim)))
  return weighted(d, weights), d_weights.astype(weights.dtype)


weighted.defvjp(lambda x, weights: (weighted(x, weights), (x, weights)),
                _weighted_bwd)


def unit(x: jax.Array, length: float = 1.0) -> jax.Array:
  """Returns x / |x| times a length, over the last axis, in x's dtype."""
  x32 = x.astype(jnp.float32)
  squares = jnp.square(x32).sum(-1)
  return scaled(x32, length * jax.lax.rsqrt(squares + LENGTH_EPS)
                ).astype(x.dtype)


def rmsnorm(x: jax.Array, scale_K: jax.Array, eps: float) -> jax.Array:
  """The same as norms.rmsnorm, [..., K] -> [..., K]."""
  x32 = x.astype(jnp.float32)
  y = scaled(x32, jax.lax.rsqrt(jnp.square(x32).mean(-1) + eps))
  return (y * scale_K.astype(jnp.float32)[(None,) * (x.ndim - 1)]
          ).astype(x.dtype)


class RMSNorm(nn.Module):
  """norms.RMSNorm of the features of a head."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_K = declare(self, 'scale', nn.initializers.ones, x.shape[-1:],
                      Role(('head',)))
    return norms.recomputed(rmsnorm)(x, scale_K, self.config.norm_eps)
