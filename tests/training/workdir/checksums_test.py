"""A checksum sees any one element, and is the same on every mesh."""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import toy_run
from training.workdir import checksums


def test_checksum_is_that_of_the_definition_and_of_every_mesh():
  x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
  sums = set()
  for shape in ((8, 1), (2, 4), (1, 1)):
    place = NamedSharding(toy_run.make_mesh(*shape), P('fsdp', 'tensor'))
    sums.add(checksums.of({'x': jax.device_put(x, place)})['x'])
  h = np.arange(x.size, dtype=np.uint32) * np.uint32(0x9E3779B1)
  h ^= x.view(np.uint32).ravel()
  h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)  # MurmurHash3's fmix32
  h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
  h ^= h >> 16
  assert sums == {int(np.sum(h, dtype=np.uint32))}


@pytest.mark.parametrize('dtype', [
    'float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'int32', 'uint32',
    'int16', 'int8', 'uint8', 'int4', 'bool'])
def test_checksum_sees_any_one_element(dtype):
  zeros = jnp.zeros((3, 5), dtype)
  sums = {checksums.of({'x': zeros})['x']}
  for i in range(15):
    one = zeros.at[i // 5, i % 5].set(jnp.ones((), dtype))
    sums.add(checksums.of({'x': one})['x'])
  assert len(sums) == 16


def test_checksum_goes_by_parts_and_holds_little(monkeypatch):
  """In pieces of any size the sum is the same; a CPU needs only one piece."""
  x = jnp.arange(24 * 128, dtype=jnp.float32).reshape(2, 12, 128)
  whole = checksums.of({'x': x})
  for at_once in (1, 128 * 5, 128 * 7):
    monkeypatch.setattr(checksums, '_AT_ONCE', at_once)
    checksums._parts.cache_clear()
    assert checksums.of({'x': x}) == whole
  monkeypatch.setattr(checksums, '_AT_ONCE', 128)
  checksums._parts.cache_clear()
  big = jax.ShapeDtypeStruct((4096, 128), jnp.float32)
  memory = checksums._parts(None, P()).lower(big).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4096 * 128 * 4 // 16
  checksums._parts.cache_clear()


def test_checksum_sees_a_sign_of_zero_a_key_and_an_exchange():
  def of(x):
    return checksums.of({'x': x})['x']
  assert of(jnp.array([0.0])) != of(jnp.array([-0.0]))
  assert of(jax.random.key(0)) != of(jax.random.key(1))
  assert of(jnp.array([1.0, 2.0])) != of(jnp.array([2.0, 1.0]))
  with pytest.raises(ValueError, match='no checksum for an array of complex64'):
    of(jnp.array([1j]))
