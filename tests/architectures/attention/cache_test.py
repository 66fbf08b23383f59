"""A cache that holds keys and values as products take them, for single tokens;
the slots of many layers, written where they lie; a prompt beside a cache."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import skeletons
from architectures.parts.attention import cache as caches
from tests.helpers import models

B, M, J, K = 3, 24, 2, 8


def drawn(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def entry(**memory):
  return caches.Cache(drawn(B, M, J, K), drawn(B, M, J, K, seed=1), **memory)


@pytest.mark.parametrize('rows, dtype', [
    (1, 'float32'), (B, 'float32'), (B, 'bfloat16')])
@pytest.mark.parametrize('length', [1, 5])
def test_a_turned_cache_writes_where_a_plain_one_does(length, rows, dtype):
  plain = jax.tree.map(lambda x: x[:rows].astype(dtype), entry(
      memory_key_BMJK=drawn(B, 7, J, K, seed=2),
      memory_value_BMJK=drawn(B, 7, J, K, seed=3)))
  turned = plain.turn()
  assert turned.key_BMJK.shape == (rows, J, K, M)
  assert turned.value_BMJK.shape == (rows, J, M, K)
  assert plain.num_slots == turned.num_slots == M
  new = (drawn(rows, length, J, K, seed=4), drawn(rows, length, J, K, seed=5),
         jnp.array([[3], [0], [M - length]])[:rows]
         + jnp.arange(length)[None])
  found = turned.write(*new)
  for got, was, put in zip(found.slots, plain.slots, new):
    want = np.array(was)
    for row, at in enumerate(np.asarray(new[2])):
      want[row, at] = put[row]
    np.testing.assert_array_equal(got, want)
    assert got.dtype == dtype
  jax.tree.map(np.testing.assert_array_equal, plain.write(*new).slots,
               found.slots)
  jax.tree.map(np.testing.assert_array_equal, plain.memory, found.memory)


@pytest.mark.parametrize('rows', [1, B])
@pytest.mark.parametrize('dtype, held', [('float32', 'f32'),
                                         ('bfloat16', 'u16')])
def test_a_loop_over_tokens_writes_turned_slots_where_they_lie(
    rows, dtype, held):
  """As a token is in generate.py. That of one row was written with 16 copies
  of the slots of two layers, and in bfloat16 all slots were converted."""
  module, params = models.make('gpt', num_layers=2, d_model=32, num_heads=4,
                               num_kv_heads=4, dtype=dtype)
  cache = architectures.init_cache(module.config, rows, 16)
  params, slots = skeletons.one_by_one(params, cache)
  assert slots[0][0].turned
  def tokens(params, slots):
    def step(i, carry):
      out = module.apply(
          {'params': params}, carry[0], cache=carry[1], one_by_one=True,
          positions_BL=jnp.full((rows, 1), i))
      return out.logits.argmax(-1).astype(jnp.int32), out.cache
    return jax.lax.fori_loop(
        2, 9, step, (jnp.ones((rows, 1), jnp.int32), slots))
  text = jax.jit(tokens, donate_argnums=1).lower(
      params, slots).compile().as_text()
  shape = ','.join(map(str, slots[0][0].key_BMJK.shape))
  assert f'{held}[{shape}]' in text
  assert not re.findall(rf'= {held}\[{shape}\]\S* copy\(', text)
  assert not re.findall(rf'= bf16\[{shape}\]\S* fusion\(', text)


@pytest.mark.parametrize('layer', [0, 2])
@pytest.mark.parametrize('places', [
    np.array([[3], [0], [M - 1]]), np.arange(5, 9)[None],
    np.array([[3], [0], [M - 4]]) + np.arange(4)], ids=['rows', 'all', 'more'])
def test_a_layer_writes_its_own_slots_among_those_of_all(layer, places):
  stacks = drawn(4, B, M, J, K), drawn(4, B, M, J, K, seed=1)
  L = places.shape[1]
  new = drawn(B, L, J, K, seed=2), drawn(B, L, J, K, seed=3)
  cache = caches.Cache(*stacks, layer=jnp.array(layer))
  found = cache.write(*new, jnp.asarray(places))
  for got, was, put, read in zip((found.key_BMJK, found.value_BMJK), stacks,
                                 new, found.slots):
    want = np.array(was)
    for row, at in enumerate(np.broadcast_to(places, (B, L))):
      want[layer, row, at] = put[row]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(read, want[layer])


def test_layers_that_are_scanned_write_their_slots_where_they_lie():
  """As what the scan is given and returns, six copies of all would be made."""
  module, params = models.make(num_layers=5, num_kv_heads=2)
  cache = architectures.init_cache(module.config, B, M)
  def tokens(params, cache):
    def step(i, cache):
      at_B1 = jnp.array([[5], [3], [0]]) + i
      return module.apply({'params': params}, jnp.ones((B, 1), jnp.int32),
                          cache=cache, positions_BL=at_B1).cache
    return jax.lax.fori_loop(0, 8, step, cache)
  text = jax.jit(tokens, donate_argnums=1).lower(
      params, cache).compile().as_text()
  shape = ','.join(map(str, cache[0].key_BMJK.shape))
  assert f'f32[{shape}]' in text
  assert not re.findall(rf'= f32\[{shape}\]\S* copy\(', text)


@pytest.mark.parametrize('changes', [
    dict(position='alibi'), dict(attention='banded', sliding_window=5),
    dict(mixer='latent'), dict(attention_sinks=True, attention_softcap=5.0),
    'prefix'], ids=str)
def test_a_prompt_sees_no_slots_behind_it(changes):
  """Whatever a cache holds, a prompt that begins a row is read as without."""
  system, prefix_B = 'gpt', None
  if changes == 'prefix':
    changes, prefix_B = {}, jnp.array([3, 0])
  module, params = models.make(system, **changes)
  tokens = models.tokens()[:, :9]
  cache = jax.tree.map(lambda x: jnp.full_like(x, 1e3),
                       architectures.init_cache(module.config, 2, 16))
  shown = ((tokens, tokens), {}) if system == 't5' else (
      (tokens,), dict(prefix_B=prefix_B))
  read = lambda **options: module.apply(
      {'params': params}, *shown[0], **shown[1], **options)
  out = read(cache=cache)
  models.close(read().logits, out.logits)
  for entry in out.cache:
    assert (entry.key_BMJK[:, :, 9:] == 1e3).all()
    assert not (entry.key_BMJK[:, :, :9] == 1e3).any()
