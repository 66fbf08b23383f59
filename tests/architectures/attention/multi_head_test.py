"""Queries, keys and values against NumPy: what they are normalised over, gated
by, convolved by, mixed with, and read from; and the slots of a cache, written
where they lie."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import flat, sharding, skeletons
from architectures.parts.attention import kernels, path, steps
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.attention.multi_head import CrossAttention
from architectures.parts.attention.multi_head import SelfAttention
from architectures.parts.cache import Cache
from architectures.parts.context import Context, Memory
from architectures.parts.positions import RopeConfig
from common.errors import RequestError
from tests.architectures.parts_test import (
    D, KIND, born, context, normal, resolved)
from tests.helpers import models, numpy_attention
from training.costs import totals

GATES = ('elementwise', 'headwise')


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def normalised(x, c, over, norm):
  """Queries or keys [B, L, H, K], normalised over a head or over all."""
  axes = -1 if over == 'head' else (-2, -1)
  if c.norm == 'layernorm':
    x = x - x.mean(axes, keepdims=True)
  x = x / np.sqrt((x ** 2).mean(axes, keepdims=True) + c.norm_eps)
  shape = (-1, x.shape[-1])  # of a head, or of each
  return x * norm['scale'].reshape(shape) + (
      norm['bias'].reshape(shape) if 'bias' in norm else 0)


def convolved(x_BLHK, w_WHK):
  """A token sees itself and the two tokens before it."""
  padded = np.pad(x_BLHK, ((0, 0), (2, 0), (0, 0), (0, 0)))
  return sum(padded[:, i:i + x_BLHK.shape[1]] * w_WHK[i] for i in range(3))


def compressed(p, q, k, x):
  """Queries, keys and values of compressed convolutional attention, of two
  heads of keys, and of convolutions over three tokens and over two."""
  def convolve_twice(name, x):
    bias = p[f'{name}_taps_bias']
    y = convolved(x, p[f'{name}_taps']) + bias
    before = np.concatenate([0 * y[:, :1] + bias, y[:, :-1]], 1)
    return p[f'{name}_mix_bias'] + sum(
        np.einsum('blhk,hku->blhu', x, w)
        for x, w in zip((before, y), p[f'{name}_mix'], strict=True))

  unit = lambda x: x / np.sqrt((x ** 2).mean(-1, keepdims=True))
  mean = (q + np.repeat(k, 2, axis=2)) / 2
  own, second = (numpy_attention.project(p, name, x)
                 for name in ('value', 'value_before'))
  before = np.concatenate(
      [0 * second[:, :1] + p['value_before_bias'], second[:, :-1]], 1)
  mean_of_keys = (mean[:, :, ::2] + mean[:, :, 1::2]) / 2
  return (unit(convolve_twice('query', q) + mean),
          unit(convolve_twice('key', k) + mean_of_keys)
          * p['key_temperature'][:, None],
          np.stack([x.reshape(*x.shape[:2], -1) for x in (own, before)], 2))


FIELDS = [*(dict(qk_norm=True, qk_norm_over=over, norm=norm)
            for over in flat.FIELDS['qk_norm_over'].rule.choices
            for norm in ('rmsnorm', 'layernorm')),
          *(dict(attention_gate=gate) for gate in GATES),
          dict(attention_exclusive='learned', context_norm=True),
          dict(attention_exclusive='all', attention_gate='headwise',
               context_norm=True),
          dict(learned_log_scale=True), dict(forget_gate=True),
          dict(cca=True, cca_taps=3, learned_log_scale=True),
          dict(dynamic_conv=3),
          dict(attention_out_bias=False), dict(attention_conv=3)]


@pytest.mark.parametrize('fields, cross', [
    *((fields, False) for fields in FIELDS), (FIELDS[0], True),
    (FIELDS[-1], True)], ids=str)
def test_a_layer_is_its_definition(fields, cross):
  """In float64, with grouped keys, biases and scales that differ."""
  x, memory = normal(0, 2, 6, D), normal(1, 2, 6, D)
  c = resolved(num_kv_heads=2, position='none', **fields)
  form = CrossAttention if cross else SelfAttention
  module, ctx = form(c, KIND), context(memory=Memory(memory))
  params = born(module, x, ctx, None)
  p, at = numpy_attention.float64(params), np.asarray(x, np.float64)
  assert ('out_bias' in p) == c.attention_out_bias
  fields = c.part(AttentionConfig)

  def heads(name, x):
    y_BLHK = numpy_attention.project(p, name, np.asarray(x, np.float64))
    if fields.attention_conv and not cross:
      y_BLHK = convolved(y_BLHK, p[f'{name}_conv'])
    if fields.dynamic_conv and name != 'query':
      u = numpy_attention.project(p, f'{name}_dynamic_conv', at)
      y_BLHK = (y_BLHK + convolved(y_BLHK, p[f'{name}_dynamic_conv_static'])
                + convolved(y_BLHK, np.moveaxis(u, 3, 0)[..., None])) / 7 ** 0.5
    return normalised(y_BLHK, c, fields.qk_norm_over, p[f'{name}_norm']) if (
        fields.qk_norm and name != 'value') else y_BLHK

  seen = memory if cross else x
  q, k, v = heads('query', x), heads('key', seen), heads('value', seen)
  if fields.cca:
    q, k, v = compressed(p, q, k, at)
  if fields.learned_log_scale:
    q = q * (p['log_scale'] * np.log(1 + np.arange(6))[:, None]
             + p['log_scale_bias'])[..., None]
  bias = np.zeros((2, 4, 6, 6))
  for b, h, i, j in np.argwhere(bias == 0) if fields.forget_gate else ():
    z = at[b, j + 1:i + 1] @ p['forget_gate'][:, h] + p['forget_gate_bias'][h]
    bias[b, h, i, j] = -np.log(1 + np.exp(-z)).sum()  # of what stands between
  o = numpy_attention.heads(q, k, v, c.score_scale, causal=not cross,
                            bias_BHLM=bias)
  if fields.attention_exclusive != 'none':
    v = np.repeat(v, 2, axis=2)
    share = np.tanh(p['exclusive'])[:, None] if 'exclusive' in p else 1.0
    o = o - share * (o * v).sum(-1, keepdims=True) * v / (
        v ** 2).sum(-1, keepdims=True)
  if fields.context_norm:
    o = o / np.sqrt((o ** 2).mean(-1, keepdims=True) + c.norm_eps)
  if 'output_gate' in p:
    z = numpy_attention.project(p, 'output_gate', at)
    assert z.shape == (2, 6, 4) + (8,) * (c.attention_gate == 'elementwise')
    o = o * sigmoid(z.reshape(2, 6, 4, -1))
  got = module.apply({'params': params}, x, ctx, None)[0]
  np.testing.assert_allclose(got, numpy_attention.out(p, o), rtol=1e-4,
                             atol=1e-4)


def test_keys_have_features_of_the_token_before_in_its_document():
  c = resolved(position='rope', rope=dict(fraction=0.5), key_offset=True)
  k = normal(0, 1, 7, 2, 8)
  ids, positions = [1, 1, 1, 2, 2, 2, 2], [0, 1, 2, 0, 1, 2, 3]
  ctx = Context(jnp.array([positions]), jnp.array([ids]))
  want = np.array(k)
  for i in (1, 2, 4, 5, 6):
    want[:, i, :, 4:] = k[:, i - 1, :, 4:]
  np.testing.assert_array_equal(steps.offset_keys(c, k, ctx, None)[0], want)
  with pytest.raises(RequestError, match='key_offset is set: it needs'):
    resolved(position='rope', key_offset=True)


def test_a_token_mixes_the_bias_of_its_scores_from_profiles_by_distance():
  c = resolved(position='relative_by_token', profiles=dict(rank=3, extent=4))
  module, x = SelfAttention(c, KIND), normal(0, 2, 9, D)
  params = born(module, x, context(9), None)
  p, at = numpy_attention.float64(params), np.asarray(x, np.float64)
  q, k, mix = (numpy_attention.project(p, name, at)
               for name in ('query', 'key', 'profile'))
  want = np.zeros((2, c.num_heads, 9, 9))
  for b, h, i, j in np.argwhere(np.tril(np.ones(want.shape))):
    score = c.score_scale * q[b, i, h] @ k[b, j, h]
    if i - j < 4:
      score += mix[b, i, h] @ p['profiles'][:, i - j]
    want[b, h, i, j] = np.exp(score)
  report = module.apply({'params': params}, x, context(
      9, keep_attention=True), None)[2]
  np.testing.assert_allclose(
      report.weights_BHLM, want / want.sum(-1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize('rank', [0, 3])
def test_tokens_reflect_the_keys_before_them(rank, monkeypatch):
  """The products of reflections are taken one by one."""
  monkeypatch.setattr(path, 'MOST_TOKENS_OF_CHUNK', 4)
  c = resolved(position='path', path=dict(rank=rank), num_kv_heads=2)
  module, x = SelfAttention(c, KIND), normal(0, 2, 9, D)
  params = born(module, x, context(9), None)
  p, at = numpy_attention.float64(params), np.asarray(x, np.float64)
  q, k, rate = (numpy_attention.project(p, name, at)
                for name in ('query', 'key', 'path_rate'))
  w = numpy_attention.project(p, 'path', at @ p['path_down'] if rank else at)
  w = convolved(w, p['path_conv'])
  w *= sigmoid(w)
  w /= np.sqrt((w ** 2).sum(-1, keepdims=True) + 1e-6)
  want = np.zeros((2, 4, 9, 9))
  for b, h, m in np.ndindex(2, 4, 9):
    j = h // 2
    key = k[b, m, j]
    for i in range(m, 9):
      if i > m:
        key = key - 2 * sigmoid(rate[b, i, j]) * (w[b, i, j] @ key) * w[b, i, j]
      want[b, h, i, m] = np.exp(c.score_scale * q[b, i, h] @ key)
  report = module.apply({'params': params}, x, context(
      9, keep_attention=True), None)[2]
  np.testing.assert_allclose(
      report.weights_BHLM, want / want.sum(-1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize('name, fields', [
    ('output_gate', dict(attention_gate='headwise')),
    ('value_gate', dict(value_embedding=True))])
def test_a_wider_model_divides_the_one_number_of_a_head(name, fields):
  """In muP, by how many times as wide it is."""
  x, ctx = normal(0, 2, 6, D), context(tokens_BL=models.random_tokens(2, 6))
  base, wider = (SelfAttention(resolved(
      parametrization='mup', mup_base_width=width, mup_base_head_dim=8,
      **fields), KIND) for width in (D, D // 2))
  params = born(base, x, ctx, None)
  twice = params | {name: 2 * params[name]}
  run = lambda module, params: module.apply({'params': params}, x, ctx, None)[0]
  np.testing.assert_allclose(run(wider, twice), run(base, params), rtol=1e-5,
                             atol=1e-6)


def test_a_causal_layer_meets_its_keys_in_parts(monkeypatch):
  monkeypatch.setattr(kernels, 'LEAST_QUERIES_OF_A_BLOCK', 1)
  x, module = normal(0, 2, 6, D), SelfAttention(resolved(), KIND)
  run = lambda p: module.apply({'params': p}, x, context(), None)[0]
  text = str(jax.make_jaxpr(run)(born(module, x, context(), None)))
  assert text.count('= exp ') == kernels.MOST_QUERY_BLOCKS


# What is mixed into the values of self-attention, those of the first layer and
# a table of tokens; and layers that read the keys and values of another layer.


READS = dict(kv_sharing=True)
SHARED = dict(num_layers=5, prefix='own,reads,own', pattern='reads',
              kinds=dict(own={}, reads=READS))
MODELS = {  # with whose keys each layer reads
    'values': (dict(value_residual=True, num_layers=5, prefix='plain',
                    pattern='embedded,plain', position='none',
                    kinds=dict(plain={}, embedded=dict(value_embedding=True))),
               range(5)),
    'keys': (SHARED, (0, 0, 2, 2, 2))}


def layers_of(params, c):
  """Yields the parameters of each layer in order."""
  for section in c.sections(c.num_layers):
    for row in range(section.periods):
      for block in range(len(section.kinds)):
        yield jax.tree.map(lambda a, row=row: a[row],
                           params['decoder'][section.name][f'block_{block}'])


def turned(x_BLHK, c):
  """Rotary positions of halves of a head (Su et al. 2021)."""
  if c.position == 'none':
    return x_BLHK
  half = x_BLHK.shape[-1] // 2
  angle_LK = np.arange(x_BLHK.shape[1])[:, None] * c.part(RopeConfig).theta ** (
      -np.arange(half) / half)
  cos, sin = (f(angle_LK)[None, :, None] for f in (np.cos, np.sin))
  a, b = x_BLHK[..., :half], x_BLHK[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def by_numpy(c, params, tokens, sources):
  """What the layers of a pre-norm decoder return, without biases and
  parameters of norms."""
  p = numpy_attention.float64(params)
  n = lambda x: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + c.norm_eps)
  x, made, first = p['embed']['tokens'][tokens], {}, None
  for i, (layer, source) in enumerate(zip(layers_of(p, c), sources)):
    a, h = layer['attention'], n(x)
    assert ('key' in a) == ('value' in a) == (i == source)
    if i == source:
      v = numpy_attention.project(a, 'value', h)
      first = v if first is None else first
      if c.part(AttentionConfig).value_residual:
        v = (1 - a['value_residual']) * v + a['value_residual'] * first
      if 'value_embedding' in a:
        gate = 2 * sigmoid(h @ a['value_gate'])
        v = v + gate[..., None] * a['value_embedding'][tokens]
      made[i] = turned(numpy_attention.project(a, 'key', h), c), v
    q = turned(numpy_attention.project(a, 'query', h), c)
    x = x + numpy_attention.out(
        a, numpy_attention.heads(q, *made[source], c.score_scale))
    x = x + np.maximum(n(x) @ layer['ffn']['up'], 0) @ layer['ffn']['down']
  return n(x)


def decoded(module, params, tokens, pieces):
  """Returns the hidden states of rows that are read in pieces."""
  cache, states = architectures.init_cache(
      module.config, *tokens.shape), []
  step = jax.jit(lambda t, cache, at: module.apply(
      {'params': params}, t, cache=cache, positions_BL=at))
  for first, last in pieces:
    out = step(tokens[:, first:last], cache, np.arange(first, last)[None])
    cache, states = out.cache, [*states, out.hidden]
  return np.concatenate(states, 1)


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_a_model_mixes_values_and_reads_keys_as_published(name):
  """In float64: the forward pass, and a cache's single tokens."""
  fields, sources = MODELS[name]
  module, params = models.make_model('llama', norm='rmsnorm_plain', ffn='relu',
                                     num_kv_heads=2, **fields)
  tokens = np.asarray(models.random_tokens(2, 6))
  want = by_numpy(module.config, params, tokens, sources)
  run = jax.jit(lambda t: module.apply({'params': params}, t).hidden)
  for got in (run(tokens), decoded(module, params, tokens,
                                   [(i, i + 1) for i in range(6)])):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    dict(attention_conv=3), dict(branch_conv=3), dict(
        cca=True, cca_head_taps=3, attention_bias=True), dict(
        position='path', forget_gate=True, dynamic_conv=3), dict(
        key_offset=True, rope=dict(fraction=0.5), learned_log_scale=True,
        forget_gate=True, attention_sinks=True,
        attention_exclusive='learned')], ids=lambda x: [*x][0])
def test_convolutions_decode_as_the_forward_pass(fields):
  module, params = models.make_model('llama', num_kv_heads=2, **fields)
  tokens = np.asarray(models.random_tokens(2, 8))
  whole = jax.jit(lambda t: module.apply({'params': params}, t).hidden)(tokens)
  models.assert_trees_close(decoded(module, params, tokens,
                       [(0, 3), (3, 4), (4, 5), (5, 8)]), whole, rtol=1e-4)


def test_a_layer_reads_from_the_nearest_that_sees_as_much():
  far, near, mid = (dict(window=n) for n in (0, 4, 8))
  c = architectures.resolve(models.small_config(
      'llama', num_layers=12, prefix='far,near',
      pattern='far,near_reads,far_reads,far,far_reads,near,near_reads',
      suffix='near,mid,near_reads',
      kinds=dict(far=far, near=near, mid=mid, far_reads=far | READS,
                 near_reads=near | READS)))
  assert [tuple(kind.source for kind in section.kinds)
          for section in c.sections(12)] == [
              (None, None), (None, -1, 0, None, 3, None, 5), (None, None, 0)]


def test_the_cache_holds_shared_keys_once():
  unshared, shared = (architectures.resolve(models.small_config(
      'llama', num_kv_heads=2, num_layers=4, pattern='own,reads',
      kinds=dict(own={}, reads=dict(kv_sharing=flag))))
                      for flag in (False, True))
  size = lambda c: sum(x.nbytes for x in jax.tree.leaves(
      architectures.init_cache(c, 2, 8)))
  assert size(unshared) == 2 * size(shared)
  assert [row['kv_cache_bytes_per_token']
          for row in totals.describe_kinds_of_layer(shared)
          ] == [2 * 2 * 8 * 4, 0]  # keys and values, heads, features, bytes
  counts = [totals.count_parameters(c)[0] for c in (unshared, shared)]
  assert counts[0] - counts[1] == 2 * 2 * 32 * 2 * 8  # layers, matrices


@pytest.mark.parametrize('fields, words', [
    (dict(kv_sharing=True), 'no layer before it'),
    (dict(pattern='own,reads', kinds=dict(own=dict(window=4), reads=READS)),
     'sees as many keys'),
    (dict(pattern='own,reads', kinds=dict(
        own={}, reads=dict(kv_sharing=True, num_kv_heads=1))),
     'model.num_kv_heads of the layer is 1, and 4'),
    (dict(cca=True, qk_norm=True), 'model.qk_norm is True: set one of them'),
    (dict(value_residual=True, pattern='a,b', kinds=dict(
        a=dict(num_kv_heads=2), b={})), 'choose one size')])
def test_keys_that_cannot_be_shared_are_refused(fields, words):
  with pytest.raises(RequestError, match=words):
    architectures.resolve(models.small_config('llama', num_kv_heads=4,
                                              **fields))


# The slots of a cache.


B, M, J, K = 3, 24, 2, 8


def drawn(*shape, seed=0):
  return normal(seed, *shape)


@pytest.mark.parametrize('layer', [0, 2])
@pytest.mark.parametrize('places', [
    np.array([[3], [0], [M - 1]]), np.arange(5, 9)[None],
    np.array([[3], [0], [M - 4]]) + np.arange(4)], ids=['rows', 'all', 'more'])
def test_a_layer_writes_its_own_slots_among_those_of_all(layer, places):
  stacks = drawn(4, B, M, J, K), drawn(4, B, M, J, K, seed=1)
  L = places.shape[1]
  new = drawn(B, L, J, K, seed=2), drawn(B, L, J, K, seed=3)
  cache = Cache(*stacks, layer=jnp.array(layer))
  written = cache.write(*new, jnp.asarray(places))
  for got, was, put, read in zip((written.key_BMJK, written.value_BMJK), stacks,
                                 new, written.slots):
    want = np.array(was)
    for row, at in enumerate(np.broadcast_to(places, (B, L))):
      want[layer, row, at] = put[row]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(read, want[layer])


def test_layers_that_are_scanned_write_their_slots_where_they_lie():
  """As what the scan is given and returns, six copies of all would be made."""
  module, params = models.make_model(num_layers=5, num_kv_heads=2)
  cache = architectures.init_cache(module.config, B, M)
  def tokens(params, cache):
    def step(i, cache):
      at_B1 = jnp.array([[5], [3], [0]]) + i
      return module.apply({'params': params}, jnp.ones((B, 1), jnp.int32),
                          cache=cache, positions_BL=at_B1).cache
    return jax.lax.fori_loop(0, 8, step, cache)
  text = jax.jit(tokens, donate_argnums=1).lower(
      params, cache).compile().as_text()
  shape = ','.join(map(str, cache[0].mixer.key_BMJK.shape))
  assert f'f32[{shape}]' in text
  assert not re.findall(rf'= f32\[{shape}\]\S* copy\(', text)


@pytest.mark.parametrize('rows, dtype, stored, changes', [
    (1, 'float32', 'f32', {}), (3, 'bfloat16', 'u16', dict(mixer='latent'))])
def test_a_loop_over_tokens_writes_as_on_one_cpu_as_elsewhere(
    rows, dtype, stored, changes, monkeypatch):
  """There its slots are turned, and written where they lie; one row's were once
  copied 16 times, and bfloat16 ones converted."""
  module, params = models.make_model('gpt', num_layers=2, dtype=dtype,
                                     **changes)
  cache = architectures.init_cache(module.config, rows, 16)
  def step(params, carry, i):
    out = module.apply({'params': params}, carry[0], cache=carry[1],
                       positions_BL=jnp.full((rows, 1), i), one_by_one=True)
    return (out.logits.argmax(-1), out.cache), out.logits
  made = {}
  for turned in (True, False):
    monkeypatch.setattr(
        sharding, 'is_single_cpu', lambda turned=turned: turned)
    ours, slots = jax.jit(skeletons.unstack_layers, static_argnums=0)(
        module.config, params, cache)
    shape = ','.join(map(str, slots[0][0].mixer.key_BMJK.shape))
    run = jax.jit(lambda params, slots: jax.lax.scan(
        functools.partial(step, params), (jnp.ones((rows, 1), int), slots),
        jnp.arange(9)), donate_argnums=1).lower(ours, slots).compile()
    if turned:
      assert f'{stored}[{shape}]' in run.as_text()
      assert not re.findall(rf'= {stored}\[{shape}\]\S* copy\(|'
                            rf'= bf16\[{shape}\]\S* fusion\(', run.as_text())
    (token, slots), logits = run(ours, slots)
    made[turned] = token, logits, [
        entry.mixer.slots for entry, in slots]
  models.assert_trees_close(made[True], made[False],
                            rtol=1e-4 if dtype == 'float32' else 2e-2)


@pytest.mark.parametrize('changes', [
    dict(position='alibi'), dict(attention='banded', sliding_window=5),
    dict(mixer='latent'), dict(attention_sinks=True, attention_softcap=5.0),
    'prefix'], ids=str)
def test_a_prompt_sees_no_slots_behind_it(changes):
  """Whatever a cache holds, a prompt that begins a row is read as without."""
  prefix_B = None
  if changes == 'prefix':
    changes, prefix_B = {}, jnp.array([3, 0])
  module, params = models.make_model(**changes)
  cache = jax.tree.map(lambda x: jnp.full_like(x, 1e3),
                       architectures.init_cache(module.config, 2, 16))
  read = lambda params, cache=None: module.apply(
      {'params': params}, models.random_tokens()[:, :9], prefix_B=prefix_B,
      cache=cache)
  want, got, cache = jax.jit(lambda params, cache: (lambda out: (
      read(params).logits, out.logits, out.cache))(read(params, cache)))(
          params, cache)
  models.assert_trees_close(want, got)
  for entry in cache:
    entry = jax.device_get(entry.mixer)
    assert (entry.key_BMJK[:, :, 9:] == 1e3).all()
    assert not (entry.key_BMJK[:, :, :9] == 1e3).any()


def test_long_keys_are_clipped_and_short_ones_stay():
  c = architectures.resolve(models.small_config(qk_clip=0.5))
  x = np.array([[0.3, 0.4], [3.0, 4.0], [0.06, 0.08]], np.float32)
  clipped = steps.clip_lengths(
      types.SimpleNamespace(config=c), 'key', jnp.asarray(x)[None, None], None)
  np.testing.assert_allclose(
      clipped[0, 0], [[0.3, 0.4], [0.3, 0.4], [0.06, 0.08]], rtol=1e-5)
