"""Dropout (Srivastava et al. 2014), by random bits that cost little.

On CPU, jax.random.bernoulli takes longer for attention's weights than the
products with them: every element has 20 rounds of its own, and every fourth
goes through memory. Here a row, the last axis, has two random words of
jax.random's, and an element a hash of them and of its place: 11 operations,
which fuse into what the mask is for. A mask depends on its key and shape alone:
it is the same on any mesh, and when it is drawn again for the gradient.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

_STEP = 0x9E3779B9  # 2^32 over the golden ratio: multiples of it lie far apart


class Dropout(nn.Module):
  """x -> x, with the share `rate` at 0 and the others divided by what is kept;
  the key is of the stream 'dropout'."""
  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
    if deterministic or not self.rate:
      return x
    return drop(x, self.rate, self.make_rng('dropout'))


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
  """Returns x with the share `rate`, in [0, 1), at 0, and the others divided by
  what is kept."""
  kept = bits(key, x.shape) >= jnp.uint32(int(rate * 2**32))
  return jnp.where(kept, x * (1 / (1 - rate)), 0)


def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns 32 random bits for each element, as uint32.

  Of a row with the words a and b, column c has mix(a + c * _STEP) + b, as
  SplitMix (Steele et al. 2014) counts and scatters. Rows of which the words a
  are close, which happens by chance, are told apart by b.
  """
  *rows, columns = shape or (1,)
  words = jax.random.bits(key, (2, *rows, 1))
  column = jax.lax.broadcasted_iota(jnp.uint32, (*rows, columns), len(rows))
  return (mix(words[0] + column * jnp.uint32(_STEP)) + words[1]).reshape(shape)


def mix(x: jax.Array) -> jax.Array:
  """Scatters uint32 evenly over uint32 (the finaliser of murmur3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85ebca6b)
  x = (x ^ (x >> 13)) * jnp.uint32(0xc2b2ae35)
  return x ^ (x >> 16)
