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
import math
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from training import paths


def of(tree: Any) -> dict[str, int]:
  """Returns the checksum of each leaf, by path."""
  leaves = paths.flatten(tree)
  if not leaves:
    return {}
  places = [getattr(leaf, 'sharding', None) for leaf in leaves.values()]
  on_mesh = [place for place in places if isinstance(place, NamedSharding)]
  mesh = on_mesh[0].mesh if on_mesh else None
  parts = [
      _parts(mesh, place.spec if isinstance(place, NamedSharding) else P())(
          leaf) for leaf, place in zip(leaves.values(), places)]
  return dict(zip(leaves, np.asarray(_total(mesh)(parts)).tolist()))


# A program for each shape, and not one for all leaves: an optimizer's moments
# share theirs with the parameters, and it is compiled in a third of the time.
@functools.cache
def _parts(mesh: Mesh, spec: Any):
  """Returns a function from one leaf to [devices], the part of each device."""
  axes = tuple(_names(axis) for axis in spec)
  def local(shard: Any):
    part = _sum(shard, axes, mesh)
    for name in mesh.axis_names if mesh else ():
      if name not in sum(axes, ()):  # copies: the first of them counts
        part = jnp.where(jax.lax.axis_index(name) == 0, part, 0)
    return part[None]

  def parts(leaf: Any):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    if mesh is None:
      return local(leaf)
    return jax.shard_map(local, mesh=mesh, in_specs=spec,
                         out_specs=P(mesh.axis_names), check_vma=False)(leaf)
  return jax.jit(parts)


@functools.cache
def _total(mesh: Mesh):
  def total(parts: Any):
    return jnp.sum(jnp.stack(parts), axis=1, dtype=jnp.uint32)
  # On every device of the mesh, so that every process can read it.
  return jax.jit(total, out_shardings=mesh and NamedSharding(mesh, P()))


def _names(axis: Any) -> tuple[str, ...]:
  return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _sum(x: jax.Array, axes: tuple[tuple[str, ...], ...], mesh: Mesh
         ) -> jax.Array:
  """The sum over one shard, whose dimensions are split over mesh `axes`.

  Goes by rows of the last axis, about a million elements at a time: a CPU does
  not fuse a sum with what goes into it, and would hold x once more.
  """
  shape = x.shape or (1,)
  axes += ((),) * (len(shape) - len(axes))
  starts, strides, stride = [], [], 1
  for size, names in reversed(list(zip(shape, axes))):
    index = jax.lax.axis_index(names) if names else 0
    starts.insert(0, jnp.uint32(index) * np.uint32(size))
    strides.insert(0, np.uint32(stride % 2**32))
    stride *= size * math.prod(mesh.shape[name] for name in names)

  x_UU = x.reshape(-1, shape[-1])
  rows, columns = x_UU.shape
  column_U = starts[-1] + jnp.arange(columns, dtype=jnp.uint32)

  def part(first: Any, count: Any):
    row_U = jnp.uint32(first) + jnp.arange(count, dtype=jnp.uint32)
    index_U = jnp.zeros(count, jnp.uint32)
    for size, start, stride in reversed(
        list(zip(shape[:-1], starts, strides))):
      index_U += (start + row_U % np.uint32(size)) * stride
      row_U //= np.uint32(size)
    place_UU = (index_U[:, None] + column_U[None]) * _GOLDEN
    bits_UU = _bits(jax.lax.dynamic_slice_in_dim(x_UU, first, count))
    # dtype: without it jnp.sum would widen to uint64 where x64 is on.
    return jnp.sum(_mix(bits_UU ^ place_UU), dtype=jnp.uint32)

  count = min(rows, max(1, _AT_ONCE // columns))
  total = jax.lax.fori_loop(
      0, rows // count, lambda i, total: total + part(i * count, count),
      jnp.uint32(0))
  rest = rows % count
  return total + part(rows - rest, rest) if rest else total


_AT_ONCE = 2**20
_GOLDEN = np.uint32(0x9E3779B1)  # 2^32 / golden ratio, odd


def _mix(h: jax.Array) -> jax.Array:
  h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return h ^ (h >> np.uint32(16))


def _bits(x: jax.Array) -> jax.Array:
  """The elements of x as uint32."""
  if x.dtype == jnp.bool_ or (
      jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8):
    return x.astype(jnp.uint32)
  if x.dtype.itemsize not in _WORDS:
    raise ValueError(
        f'no checksum for an array of {x.dtype}: it takes booleans, integers '
        'of up to 32 bits, floats of 8 to 32 bits, and random keys')
  word = _WORDS[x.dtype.itemsize]
  return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)


# The unsigned integer that an element of so many bytes is read as.
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
