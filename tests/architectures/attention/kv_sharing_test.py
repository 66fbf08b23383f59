"""Layers that read the keys and values of another layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from configs.errors import RequestError
from tests.helpers import models, numpy_attention
from training.costs import totals

READS = dict(kv_sharing=True)
# Every second layer reads, as in the paper; and the last half does, of which
# one layer more shares in the first half.
SHARED = {
    'period': dict(num_layers=4, pattern='own,reads',
                   kinds=dict(own={}, reads=READS)),
    'prefix': dict(num_layers=5, prefix='own,reads,own', pattern='reads',
                   kinds=dict(own={}, reads=READS)),
}
# Whose keys layer n of 'prefix' reads.
SOURCES = (0, 0, 2, 2, 2)


def layers_of(params, c):
  """Yields the parameters of each layer in order."""
  for name, kinds, periods in c.sections(c.num_layers):
    for row in range(periods):
      for block in range(len(kinds)):
        yield jax.tree.map(lambda a, row=row: a[row],
                           params['decoder'][name][f'block_{block}'])


def turned(x_BLHK, theta):
  """Rotary positions of halves of a head (Su et al. 2021)."""
  half = x_BLHK.shape[-1] // 2
  angle_LK = np.arange(x_BLHK.shape[1])[:, None] * theta ** (
      -np.arange(half) / half)
  cos, sin = (f(angle_LK)[None, :, None] for f in (np.cos, np.sin))
  a, b = x_BLHK[..., :half], x_BLHK[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def by_numpy(c, params, tokens, sources):
  """What the layers of a pre-norm decoder return, without biases and
  parameters of norms."""
  p = numpy_attention.float64(params)
  n = lambda x: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + c.norm_eps)
  x, made = p['embed']['tokens'][tokens], {}
  for i, (layer, source) in enumerate(zip(layers_of(p, c), sources)):
    a, h = layer['attention'], n(x)
    assert ('key' in a) == ('value' in a) == (i == source)
    if 'key' in a:
      made[i] = (turned(numpy_attention.project(a, 'key', h), c.rope.theta),
                 numpy_attention.project(a, 'value', h))
    q = turned(numpy_attention.project(a, 'query', h), c.rope.theta)
    x = x + numpy_attention.out(
        a, numpy_attention.heads(q, *made[source], c.score_scale))
    x = x + np.maximum(n(x) @ layer['ffn']['up'], 0) @ layer['ffn']['down']
  return n(x)


def decoded(module, params, tokens):
  """Returns the hidden states of a row that is read token by token."""
  L = tokens.shape[1]
  cache, found = architectures.init_cache(module.config, len(tokens), L), []
  step = jax.jit(lambda t, cache, i: module.apply(
      {'params': params}, t, cache=cache, positions_BL=i[None, None]))
  for i in range(L):
    out = step(tokens[:, i:i + 1], cache, jnp.array(i))
    cache, found = out.cache, [*found, out.hidden]
  return jnp.concatenate(found, 1)


@pytest.mark.slow
def test_layers_read_the_keys_of_one_before_them():
  """Against NumPy in float64: the forward pass, and a cache's single tokens."""
  module, params = models.make(
      'llama', norm='rmsnorm_plain', ffn='relu', num_kv_heads=2,
      **SHARED['prefix'])
  tokens = models.tokens(2, 6)
  want = by_numpy(module.config, params, tokens, SOURCES)
  run = jax.jit(lambda t: module.apply({'params': params}, t).hidden)
  np.testing.assert_allclose(run(tokens), want, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(decoded(module, params, tokens), want, rtol=1e-4,
                             atol=1e-4)


def test_a_layer_reads_from_the_nearest_that_sees_as_much():
  far, near = dict(window=0), dict(window=4)
  c = architectures.resolve(models.config(
      'llama', num_layers=12, prefix='far,near',
      pattern='far,near_reads,far_reads,far,far_reads,near,near_reads',
      suffix='near,far,near_reads',
      kinds=dict(far=far, near=near, far_reads=far | READS,
                 near_reads=near | READS)))
  assert [tuple(kind.source for kind in section.kinds)
          for section in c.sections(12)] == [
              (None, None), (None, -1, 0, None, 3, None, 5), (None, None, 0)]


def test_the_cache_holds_shared_keys_once():
  own, shared = (models.config('llama', num_kv_heads=2, **SHARED['period'] | {
      'kinds': dict(own={}, reads=dict(kv_sharing=flag))})
                 for flag in (False, True))
  size = lambda model: sum(x.nbytes for x in jax.tree.leaves(
      architectures.init_cache(model, 2, 8)))
  assert size(own) == 2 * size(shared)
  c = architectures.resolve(shared)
  assert [row['kv_cache_bytes_per_token'] for row in totals.kinds_of_layer(c)
          ] == [2 * 2 * 8 * 4, 0]  # keys and values, heads, features, bytes
  counts = [totals.parameters(architectures.resolve(model))[0]
            for model in (own, shared)]
  assert counts[0] - counts[1] == 2 * 2 * 32 * 2 * 8  # layers, matrices


@pytest.mark.parametrize('fields, words', [
    (dict(kv_sharing=True), 'no layer before it'),
    (dict(pattern='reads,own', kinds=dict(own={}, reads=READS)),
     'model.kinds.reads.kv_sharing is True, but no layer before it'),
    (dict(pattern='own,reads', kinds=dict(own=dict(window=4), reads=READS)),
     'sees as many keys'),
    (dict(pattern='own,reads', kinds=dict(
        own={}, reads=dict(kv_sharing=True, num_kv_heads=1))),
     'model.num_kv_heads of the layer is 1, and 4'),
    (dict(pattern='own,reads', kinds=dict(
        own={}, reads=dict(kv_sharing=True, position='none'))),
     "model.position of the layer is 'none', and 'rope'"),
    (dict(pattern='own,reads', mixer='latent', kinds=dict(own={}, reads=READS)),
     "mixer 'latent' does not read"),
    (dict(pattern='own,reads', kinds=dict(
        own=dict(mixer='deltanet', position='none'), reads=READS)),
     'no layer before it'),
])
def test_keys_that_cannot_be_shared_are_refused(fields, words):
  with pytest.raises(RequestError, match=words):
    architectures.resolve(models.config('llama', num_kv_heads=4, **fields))
