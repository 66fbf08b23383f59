"""Queries, keys and values: what they are normalised over, and their biases
apart from that of the output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts.attention.latent import LatentAttention
from architectures.parts.attention.multi_head import Attention, QK_NORMS
from configs.errors import RequestError
from tests.architectures.parts_test import (
    D, KIND, attend, born, context, normal, resolved)
from tests.helpers import models, numpy_attention
from architectures.parts import paths
from training.costs import flops, totals


@pytest.mark.parametrize('cross', [False, True])
@pytest.mark.parametrize('norm', ['rmsnorm', 'layernorm'])
@pytest.mark.parametrize('over', QK_NORMS)
def test_qk_norm_is_over_a_head_or_the_whole_projection(over, norm, cross):
  """Against NumPy in float64, with grouped keys and scales that differ."""
  x, memory = normal(0, 2, 6, D), normal(1, 2, 6, D)
  c = resolved(qk_norm=True, qk_norm_over=over, norm=norm, num_kv_heads=2)
  module = Attention(c, KIND, cross=cross)
  ctx = context(memory_BMD=memory)
  params = born(module, x, ctx, None)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

  def heads(name, x):
    y_BLHK = np.einsum('bld,dhk->blhk', x, p[name]) + p[f'{name}_bias']
    if name == 'value':
      return y_BLHK
    axes, n = (-1 if over == 'head' else (-2, -1)), p[f'{name}_norm']
    if norm == 'layernorm':
      y_BLHK = y_BLHK - y_BLHK.mean(axes, keepdims=True)
    y_BLHK = y_BLHK / np.sqrt(
        (y_BLHK ** 2).mean(axes, keepdims=True) + c.norm_eps)
    shape = (-1, y_BLHK.shape[-1])  # of a head, or of each
    y_BLHK = y_BLHK * n['scale'].reshape(shape)
    return y_BLHK + (n['bias'].reshape(shape) if 'bias' in n else 0)

  seen = memory if cross else x
  q, k, v = (heads(name, a) for name, a in (
      ('query', x), ('key', seen), ('value', seen)))
  k, v = np.repeat(k, 2, 2), np.repeat(v, 2, 2)
  weights = np.exp(np.einsum('blhk,bmhk->bhlm', q, k) * c.score_scale)
  if not cross:
    weights = np.tril(weights)
  weights /= weights.sum(-1, keepdims=True)
  want = np.einsum('bhlm,bmhk,hkd->bld', weights, v, p['out']) + p['out_bias']
  got = module.apply({'params': params}, x, ctx, None)[0]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_output_of_attention_may_have_no_bias_of_its_own():
  x = normal(0, 2, 6, D)
  params = born(Attention(resolved(), KIND), x, context(), None)
  assert params.keys() >= {'query_bias', 'key_bias', 'value_bias', 'out_bias'}
  other = born(Attention(resolved(attention_out_bias=False), KIND), x,
               context(), None)
  assert params.keys() - other.keys() == {'out_bias'}
  np.testing.assert_array_equal(
      attend(other, x, {n: params[n] for n in other}, attention_out_bias=False),
      attend(params, x, {'out_bias': 0 * params['out_bias']}))
  plain = born(Attention(resolved(attention_bias=False), KIND), x, context(),
               None)
  assert not [name for name in plain if name.endswith('bias')]


# The gate on what the heads of attention return.


GATES = ('elementwise', 'headwise')


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize('cross', [False, True])
@pytest.mark.parametrize('gate', GATES)
def test_heads_are_gated_by_the_layers_input(gate, cross):
  """Against NumPy in float64, with grouped keys and biases."""
  x, memory = normal(0, 2, 6, D), normal(1, 2, 6, D)
  c = resolved(attention_gate=gate, num_kv_heads=2)
  module, ctx = Attention(c, KIND, cross=cross), context(memory_BMD=memory)
  params = born(module, x, ctx, None)
  p, at = numpy_attention.float64(params), np.asarray(x, np.float64)
  seen = np.asarray(memory, np.float64) if cross else at
  q, k, v = (numpy_attention.project(p, name, a) for name, a in (
      ('query', at), ('key', seen), ('value', seen)))
  o = numpy_attention.heads(q, k, v, c.score_scale, causal=not cross)
  assert 'output_gate_bias' in p
  z = numpy_attention.project(p, 'output_gate', at)
  assert z.shape == (2, 6, 4) + (8,) * (gate == 'elementwise')
  want = numpy_attention.out(p, o * sigmoid(z.reshape(2, 6, 4, -1)))
  got = module.apply({'params': params}, x, ctx, None)[0]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('gate', GATES)
@pytest.mark.parametrize('mixer', [Attention, LatentAttention])
def test_a_gate_that_is_open_is_none_and_one_half_is_half(mixer, gate):
  fields = dict(mixer='latent' if mixer is LatentAttention else 'attention',
                attention_bias=False, attention_gate=gate)
  x = normal(0, 2, 6, D)
  module = mixer(resolved(**fields), KIND)
  params = born(module, x, context(), None)
  run = lambda module, by: module.apply({'params': {
      n: w * by if n == 'output_gate' else w for n, w in params.items()}},
      x, context(), None)[0]
  plain = run(mixer(resolved(**fields | dict(attention_gate='none')), KIND), 0)
  np.testing.assert_allclose(run(module, 0), plain / 2, rtol=1e-4, atol=1e-6)
  assert not np.allclose(run(module, 1), plain / 2, atol=1e-2)


def test_a_wider_model_divides_the_one_number_of_a_head():
  """In muP, by how many times as wide it is; its bias is added after that."""
  x = normal(0, 2, 6, D)
  base, wider = (Attention(resolved(
      attention_gate='headwise', parametrization='mup', mup_base_width=width,
      mup_base_head_dim=8), KIND) for width in (D, D // 2))
  params = born(base, x, context(), None)
  twice = params | dict(output_gate=2 * params['output_gate'])
  run = lambda module, params: module.apply(
      {'params': params}, x, context(), None)[0]
  np.testing.assert_allclose(run(wider, twice), run(base, params), rtol=1e-5,
                             atol=1e-6)


# What is mixed into the values of self-attention: those of the first layer,
# and a table of tokens.


BOTH = dict(value_residual=True, value_embedding=True)
# One layer before two periods; tables of tokens in two layers of five.
MIXED = dict(value_residual=True, num_layers=5, prefix='plain',
             pattern='embedded,plain', num_kv_heads=2,
             kinds=dict(plain={}, embedded=dict(value_embedding=True)))


def by_numpy(c, params, tokens):
  """What the layers of a pre-norm decoder without positions, biases and
  parameters of norms return."""
  p = numpy_attention.float64(params)
  n = lambda x: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + c.norm_eps)
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  rows = [(p['decoder']['prefix']['block_0'], 0)] + [
      (p['decoder']['layers'][f'block_{block}'], row)
      for row in range(2) for block in range(2)]
  x, first = p['embed']['tokens'][tokens], None
  for block, row in rows:
    layer = jax.tree.map(lambda a, row=row: a[row], block)
    a, h = layer['attention'], n(x)
    q, k, v = (numpy_attention.project(a, name, h)
               for name in ('query', 'key', 'value'))
    first = v if first is None else first
    v = (1 - a['value_residual']) * v + a['value_residual'] * first
    if 'value_embedding' in a:
      gate = 2 * sigmoid(h @ a['value_gate'])
      v = v + gate[..., None] * a['value_embedding'][tokens]
    x = x + numpy_attention.out(a, numpy_attention.heads(
        q, k, v, c.score_scale))
    x = x + np.maximum(n(x) @ layer['ffn']['up'], 0) @ layer['ffn']['down']
  return n(x)


@pytest.mark.slow
def test_values_are_mixed_as_published():
  """Against NumPy in float64: the forward pass, and a cache's single tokens."""
  module, params = models.make(
      'llama', position='none', norm='rmsnorm_plain', ffn='relu', **MIXED)
  names = [path for path in paths.flatten(params) if 'value_emb' in path]
  assert names == ['decoder/layers/block_0/attention/value_embedding']
  tokens = models.tokens(2, 6)
  want = by_numpy(module.config, params, tokens)
  run = jax.jit(lambda p, t: module.apply({'params': p}, t).hidden)
  np.testing.assert_allclose(run(params, tokens), want, rtol=1e-4, atol=1e-4)
  cache, found = architectures.init_cache(module.config, 2, 6), []
  step = jax.jit(lambda p, t, cache, i: module.apply(
      {'params': p}, t, cache=cache, positions_BL=i[None, None]))
  for i in range(6):
    out = step(params, tokens[:, i:i + 1], cache, jnp.array(i))
    cache, found = out.cache, [*found, out.hidden]
  np.testing.assert_allclose(np.concatenate(found, 1), want, rtol=1e-4,
                             atol=1e-4)


def test_a_new_model_mixes_halves_and_adds_the_table_once():
  x, tokens = normal(0, 2, 6, D), models.tokens(2, 6)
  module = Attention(resolved(**BOTH), KIND)
  new = jax.jit(module.init)(jax.random.key(0), x, context(tokens_BL=tokens),
                             None)['params']
  assert new['value_residual'].value == 0.5
  assert not new['value_gate'].value.any()
  # The first layer mixes its values with themselves.
  params = born(module, x, context(tokens_BL=tokens), None)
  run = lambda share: module.apply(
      {'params': params | dict(value_residual=jnp.array(share))}, x,
      context(tokens_BL=tokens), None)[0]
  np.testing.assert_allclose(run(0.9), run(0.1), rtol=1e-4, atol=1e-5)


def test_a_wider_model_divides_the_gate_of_a_head():
  """In muP, by how many times as wide it is."""
  x, ctx = normal(0, 2, 6, D), context(tokens_BL=models.tokens(2, 6))
  base, wider = (Attention(resolved(
      value_embedding=True, parametrization='mup', mup_base_width=width,
      mup_base_head_dim=8), KIND) for width in (D, D // 2))
  params = born(base, x, ctx, None)
  twice = params | dict(value_gate=2 * params['value_gate'])
  run = lambda module, params: module.apply({'params': params}, x, ctx, None)[0]
  np.testing.assert_allclose(run(wider, twice), run(base, params), rtol=1e-5,
                             atol=1e-6)


@pytest.mark.parametrize('fields, words', [
    (dict(value_residual=True, pattern='a,b', kinds=dict(
        a=dict(num_kv_heads=2), b={})), 'choose one size'),
])
def test_values_that_cannot_be_mixed_are_refused(fields, words):
  with pytest.raises(RequestError, match=words):
    architectures.resolve(models.config('gpt', **fields))


# Short convolutions of queries, keys and values.


CONV = dict(attention_conv=3, num_kv_heads=2)


def convolved(x_BLHK, w_WHK):
  """Convolves in numpy: a token sees itself and the two tokens before it."""
  padded = np.pad(x_BLHK, ((0, 0), (2, 0), (0, 0), (0, 0)))
  L = x_BLHK.shape[1]
  return sum(padded[:, i:i + L] * w_WHK[i] for i in range(3))


def test_a_layer_convolves_what_it_projects():
  module = Attention(resolved(position='none', **CONV), KIND)
  x = normal(0, 2, 6, D)
  params = born(module, x, context(), None)
  p = numpy_attention.float64(params)
  q, k, v = (convolved(numpy_attention.project(p, name, np.asarray(x)),
                       p[f'{name}_conv']) for name in ('query', 'key', 'value'))
  want = numpy_attention.out(p, numpy_attention.heads(
      q, k, v, module.config.score_scale))
  got, cache = module.apply({'params': params}, x, context(), None)
  assert cache is None
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_decoding_and_packing_are_the_forward_pass():
  module, params = models.make('llama', **CONV)
  tokens = models.tokens(2, 9)
  run = jax.jit(lambda t, **o: module.apply({'params': params}, t, **o).hidden)
  whole, found = run(tokens), []
  cache = architectures.init_cache(module.config, 2, 9)
  step = jax.jit(lambda t, cache, at: module.apply(
      {'params': params}, t, cache=cache, positions_BL=at))
  for first, last in ((0, 4), (4, 5), (5, 6), (6, 9)):
    out = step(tokens[:, first:last], cache, jnp.arange(first, last)[None])
    cache, found = out.cache, [*found, out.hidden]
  models.close(jnp.concatenate(found, 1), whole, rtol=1e-4)
  ids = jnp.array([[1] * 4 + [2] * 5] * 2)
  places = jnp.array([[*range(4), *range(5)]] * 2)
  packed = run(tokens, segment_ids_BL=ids, positions_BL=places)
  models.close(packed, jnp.concatenate(
      [run(tokens[:, :4]), run(tokens[:, 4:])], 1), rtol=1e-4)


def test_what_it_keeps_and_multiplies():
  c, plain = (architectures.resolve(models.config('llama', **CONV | fields))
              for fields in ({}, dict(attention_conv=0)))
  assert totals.parameters(c)[0] - totals.parameters(plain)[0] == (
      2 * 3 * (4 + 2 + 2) * 8)  # layers, tokens, heads, features
  more = {'attention': 0, 'weights': 2 * 2 * 16 * 3 * (4 + 2 + 2) * 8}
  whole, rest = (flops.forward_flops(x, 16) for x in (c, plain))
  assert {name: whole[name] - rest[name] for name in whole} == more
  (per_token, per_row), (other, _) = map(totals.kept_bytes, (c, plain))
  assert per_row == 2 * 2 * (4 + 2 + 2) * 8 * 4 and per_token == other


@pytest.mark.parametrize('system, fields, words', [
    ('bert', {}, 'model.arch .* is an encoder: set it'),
    ('t5', {}, 'is an encoder-decoder: set it to 0'),
])
def test_what_cannot_be_convolved_is_refused(system, fields, words):
  with pytest.raises(RequestError, match=words):
    architectures.resolve(models.config(system, attention_conv=3, **fields))


# Layers that read the keys and values of another layer.


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


def shared_by_numpy(c, params, tokens, sources):
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
  want = shared_by_numpy(module.config, params, tokens, SOURCES)
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
