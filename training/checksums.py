"""One uint32 per array, computed on the devices that hold it.

Orbax restores a flipped byte in silence, so a checkpoint carries for each leaf

  sum_i mix(bits(x_i) ^ place(i))  mod 2^32,

where bits() reads the element as an unsigned integer, place() is another
number for each position of the row-major order, and mix() is MurmurHash3's
finalizer. All three steps can be undone, so any change within one element
changes the sum, with certainty; exchanged, missing and shifted blocks change
it all but about once in 2^32. (A plain sum of bits times weights is weaker:
1.0 has its lowest set bit at 2^23, which leaves 9 bits of such a sum.)
Addition of integers is associative: the sum is the same on every mesh.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from training import paths


def of(tree) -> dict[str, int]:
  """Returns the checksum of each leaf, by path."""
  leaves = paths.flatten(tree)
  if not leaves:
    return {}
  sums = _summer(_replicated(leaves.values()))(tuple(leaves.values()))
  return dict(zip(leaves, np.asarray(sums).tolist()))


def _replicated(leaves):
  """Where the sums go: on every device of the mesh, so any process reads."""
  for leaf in leaves:
    if isinstance(getattr(leaf, 'sharding', None), jax.sharding.NamedSharding):
      return jax.sharding.NamedSharding(
          leaf.sharding.mesh, jax.sharding.PartitionSpec())
  return None


@functools.lru_cache(maxsize=8)
def _summer(out_sharding):
  def sums(leaves):
    return jnp.stack([_sum(leaf) for leaf in leaves])
  return jax.jit(sums, out_shardings=out_sharding)


def _sum(x: jax.Array) -> jax.Array:
  bits = _bits(x)
  # dtype: without it jnp.sum would widen to uint64 where x64 is on.
  return jnp.sum(_mix(bits ^ _place(bits.shape)), dtype=jnp.uint32)


def _place(shape) -> jax.Array:
  index = jnp.zeros(shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(len(shape))):
    iota = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    index += iota * np.uint32(stride % 2**32)
    stride *= shape[axis]
  return index * np.uint32(0x9E3779B1)  # 2^32 / golden ratio, odd


def _mix(h: jax.Array) -> jax.Array:
  h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return h ^ (h >> np.uint32(16))


def _bits(x: jax.Array) -> jax.Array:
  """The elements of x as uint32; 8-byte elements give two along a new axis."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_ or (
      jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8):
    return x.astype(jnp.uint32)
  word = _WORDS.get(x.dtype.itemsize)
  if word is None or jnp.issubdtype(x.dtype, jnp.complexfloating):
    raise ValueError(
        f'no checksum for an array of {x.dtype}: it takes booleans, integers, '
        'floats of 8 to 64 bits, and random keys')
  return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)


# The unsigned integer that an element of so many bytes is read as.
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
