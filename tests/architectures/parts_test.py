"""Each part alone against its equation: how weights are born, their roles, what
a product rounds, norms, positions, the hidden units of networks, and the wiring
of a block."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import layers, positions
from architectures.parts import paths
from architectures.parts.attention.multi_head import CrossAttention
from architectures.parts.attention.multi_head import SelfAttention
from architectures.parts.blocks import BLOCKS
from architectures.parts.config import LayerKind
from architectures.parts.context import Context, Memory
from architectures.parts.layers import ClampConfig, FFN
from architectures.parts.sharding import Declared, Role
from common.errors import RequestError
from configs import base
from tests.helpers import models
from training.runs import abstract_params


D = 32
KIND = LayerKind('global', 'gelu')


def resolved(system='gpt', **changes):
  return architectures.resolve(models.small_config(system, **changes))


def normal(seed, *shape):
  return jax.device_put(np.random.default_rng(seed).normal(
      size=shape).astype(np.float32))


def born(module, *args, seed=0):
  """Parameters at no tidy initial value: biases, norms and sinks count."""
  return models.draw_parameters(nn.meta.unbox(jax.eval_shape(
      lambda: module.init(jax.random.key(0), *args)))['params'], seed)


def context(L=6, **fields):
  return Context(jnp.arange(L)[None], **fields)


# Weights and products.


@pytest.mark.slow
@pytest.mark.parametrize('init', [
    pytest.param('normal', marks=pytest.mark.long), 'scaled_normal', 'fan_in'])
def test_weights_are_born_with_the_size_that_the_init_says(init):
  """GPT-2, section 2.3, and Switch, section 2.4; `down` has 4 x the fan-in."""
  N, d, F = 8, 64, 256
  module = architectures.build(models.small_config(
      d_model=d, d_ff=F, num_layers=N, init=init, init_stddev=0.05,
      init_scale=0.5, tie_embeddings=False, vocab_size=200, num_heads=4))
  variables = jax.jit(module.init)(jax.random.key(0), models.random_tokens())
  params = jax.device_get(
      paths.flatten_by_path(nn.meta.unbox(variables['params'])))
  residual = 0.05 / (2 * N) ** 0.5 if init == 'scaled_normal' else 0.05
  layer = 'decoder/layers/block_0/'
  sizes = {'attention/query': (d, 0.05), 'attention/out': (d, residual),
           'ffn/up': (d, 0.05), 'ffn/down': (F, residual)}
  for name, (fan_in, stddev) in sizes.items():
    want = (0.5 / fan_in) ** 0.5 if init == 'fan_in' else stddev
    got = np.std(params[layer + name])
    assert got == pytest.approx(want, rel=0.03), name
  want = (0.5 / d) ** 0.5 if init == 'fan_in' else 0.05
  assert np.std(params['head/kernel']) == pytest.approx(want, rel=0.03)


LATENT_EXPERTS = dict(ffn='moe', moe=dict(num_experts=4, latent_dim=12))


@pytest.mark.parametrize('system, changes', [
    ('gpt', LATENT_EXPERTS), ('bart', {}), ('deepseek_v2', {}),
    ('deepseek_v4', {}), ('lfm2', {}),
    ('gpt', dict(memory='engram', ngrams=dict(rows=40))),
    *(('llama', dict(mixer=name)) for name in (
        'comba', 'deltanet', 'gdn2', 'gla', 'kda', 'mamba', 'mamba2', 'mamba3',
        'mesa', 'retnet', 'rwkv7'))])
def test_the_products_that_end_in_the_residual_stream_are_born_smaller(
    system, changes, monkeypatch):
  """Which weights these are is known by their names: the last of attention,
  recurrences and networks, and the way back from latent experts."""
  last_products = ('out', 'down', 'latent_up')
  born_smaller, declare_weight = {}, layers.weight

  def weight(module, name, *args, residual=False, **kwargs):
    born_smaller[(*module.path, name)] = residual
    return declare_weight(module, name, *args, residual=residual, **kwargs)

  monkeypatch.setattr(layers, 'weight', weight)
  module = architectures.build(models.small_config(system, **changes))
  jax.eval_shape(module.init, jax.random.key(0), models.random_tokens())
  assert any(born_smaller.values())
  for path, is_smaller in born_smaller.items():
    expected = path[-1] in last_products or path[-2:] == ('memory', 'value')
    assert is_smaller == expected, path


def test_a_product_in_bfloat16_rounds_its_operands_alone():
  """Its gradients too: each near that of float32, and of its operand's type."""
  x, w, d = normal(0, 64, 48), normal(1, 48, 40), normal(2, 64, 40)
  @functools.partial(jax.jit, static_argnums=0)
  def value_and_grads(dtype):
    y, vjp = jax.vjp(lambda x, w: layers.einsum(
        'AB,BC->AC', x, w, dtype, jnp.float32), x, w)
    return y, *vjp(d)
  for got, want in zip(*map(value_and_grads, (jnp.bfloat16, jnp.float32))):
    assert got.dtype == want.dtype == jnp.float32
    models.assert_trees_close(want, got, 0.02)


@pytest.mark.parametrize('spec, x, w', [
    ('BLD,DF->BLF', (2, 3, 5), (5, 7)),
    ('BLD,DHK->BLHK', (2, 3, 5), (5, 4, 7)),
    ('BLHK,HKD->BLD', (2, 3, 4, 7), (4, 7, 5)),
    ('BLHU,UHK->BLHK', (2, 3, 4, 7), (7, 4, 5)),
    ('...D,DV->...V', (2, 5), (5, 3)),
    ('QBPV,QBPD->QVD', (2, 3, 4, 5), (2, 3, 4, 7))])
def test_the_gradients_of_a_product_are_those_that_jax_derives(spec, x, w):
  x, w = normal(0, *x), normal(1, *w)
  want = np.einsum(spec, *(np.asarray(a, np.float64) for a in (x, w)))
  @jax.jit
  def both(x, w):
    y, vjp = jax.vjp(lambda x, w: layers.einsum(spec, x, w, jnp.float32), x, w)
    return y, vjp(y), jax.vjp(lambda x, w: jnp.einsum(spec, x, w), x, w)[1](y)
  y, grads, plain = both(x, w)
  np.testing.assert_allclose(y, want, atol=1e-5)
  for got, grad in zip(grads, plain):
    np.testing.assert_allclose(got, grad, atol=1e-4)


# Norms.


@pytest.mark.parametrize('name', ['layernorm', 'rmsnorm'])
def test_a_norm_rounds_its_result_alone(name):
  """Of bfloat16, it computes in float32: an offset costs no digits."""
  x = (10 + normal(0, 4, D)).astype(jnp.bfloat16)
  one, zero = jnp.ones(D), jnp.zeros(D)
  run = (lambda x: layers.layernorm(x, one, zero, 1e-6)
         ) if name == 'layernorm' else lambda x: layers.rmsnorm(x, one, 1e-6)
  got, want = map(jax.jit(run), (x, x.astype(jnp.float32)))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_a_gated_norm_is_its_definition():
  c = resolved(norm='rmsnorm_gated', gated_norm=dict(rank=3))
  module, x = layers.norm(c, 'norm'), normal(0, 2, 5, D)
  params = born(module, x)
  p, at = jax.tree.map(np.asarray, params), np.asarray(x, np.float64)
  assert p['gate_down'].shape == (D, 3)
  y = at / np.sqrt((at ** 2).mean(-1, keepdims=True) + c.norm_eps) * p['scale']
  h = y @ p['gate_down']
  want = y / (1 + np.exp(-(h / (1 + np.exp(-h))) @ p['gate_up']))
  np.testing.assert_allclose(module.apply({'params': params}, x), want,
                             rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('norms, gated', [
    ('all', {'attention', 'ffn', 'final'}), ('final', {'final'}),
    ('ffn,attention', {'ffn', 'attention'}), ('experts', set())])
def test_gates_of_norms_are_in_those_that_are_named(norms, gated):
  c = resolved(norm='rmsnorm_gated', gated_norm=dict(norms=norms))
  x, with_gate = normal(0, 2, 5, D), set()
  for name in ('attention', 'ffn', 'final'):
    if 'gate_up' in born(layers.norm(c, f'{name}_norm'), x):
      with_gate.add(name)
  assert with_gate == gated


def test_a_dynamic_tanh_is_its_definition():
  c = resolved(norm='dynamic_tanh', dynamic_tanh=dict(alpha=0.8))
  module, x = layers.norm(c, 'norm'), normal(0, 2, 5, D)
  params = born(module, x)
  p = jax.tree.map(np.asarray, params)
  want = p['scale'] * np.tanh(p['alpha'] * np.asarray(x)) + p['bias']
  np.testing.assert_allclose(module.apply({'params': params}, x), want,
                             rtol=1e-4, atol=1e-5)
  first = module.init(jax.random.key(0), x)['params']
  np.testing.assert_allclose(nn.unbox(first)['alpha'], 0.8, rtol=1e-6)


# Positions.


def test_stretched_positions_lie_between_two_rows():
  table_LD = np.asarray(normal(0, 4, D))
  learned = jax.jit(positions.look_up_learned_positions, static_argnums=2)
  got = learned(table_LD, jnp.array([0, 1, 2, 3, 7]), 2.0)
  want = [table_LD[0], (table_LD[0] + table_LD[1]) / 2, table_LD[1],
          (table_LD[1] + table_LD[2]) / 2, table_LD[3]]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  quarter = learned(table_LD, jnp.array([1]), 4.0)[0]
  np.testing.assert_allclose(quarter, 0.75 * table_LD[0] + 0.25 * table_LD[1],
                             rtol=1e-6)


def rope(scaling, **fields):
  c = resolved(position='rope', head_dim=128, max_len=32768, rope=dict(
      scaling=scaling, theta=5e5, original_len=8192) | fields)
  frequency, factor = positions.rope_frequencies(c)
  return np.float64(frequency), factor, 5e5 ** (-np.arange(0, 128, 2) / 128)


def test_alibi_falls_with_the_distance_to_both_sides():
  at = np.arange(4)
  np.testing.assert_allclose(
      positions.alibi_bias(jnp.array(at)[None], jnp.array(at)[None], 2)[0],
      -np.array([2**-4, 2**-8])[:, None, None] * np.abs(at[:, None] - at))


def test_llama3_keeps_short_waves_stretches_long_ones_and_blends_between():
  """As Meta's own apply_scaling has it, by wavelengths."""
  got, factor, plain = rope('llama3', factor=8.0, low_freq_factor=1.0,
                            high_freq_factor=4.0)
  want = []
  for frequency in plain:
    wave = 2 * np.pi / frequency
    smooth = (8192 / wave - 1) / (4 - 1)
    want.append(frequency if wave < 8192 / 4 else
                frequency / 8 if wave > 8192 else
                (1 - smooth) * frequency / 8 + smooth * frequency)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert factor == 1
  kinds = np.isclose(got, plain, rtol=1e-6), np.isclose(got, plain / 8, 1e-6)
  assert all(5 < k.sum() < 50 for k in kinds)


def test_yarn_keeps_what_turns_often_and_stretches_what_turns_seldom():
  """Peng et al. 2023, section 3.2: a ramp between the dimensions that turn
  beta_fast and beta_slow times in the training length, rounded outwards."""
  got, factor, plain = rope('yarn', factor=4.0, beta_fast=32.0, beta_slow=1.0)
  turns = lambda d: 8192 * 5e5 ** (-2 * d / 128) / (2 * np.pi)
  dims = np.arange(0, 64, 0.001)
  low = np.floor(dims[turns(dims) >= 32].max())
  high = np.ceil(dims[turns(dims) >= 1].max())
  stretched = np.clip((np.arange(64) - low) / (high - low), 0, 1)
  np.testing.assert_allclose(
      got, plain * (1 - stretched) + plain / 4 * stretched, rtol=1e-5)
  assert factor == pytest.approx(0.1 * np.log(4) + 1)
  assert 0 < low < high < 63
  # DeepSeek-V2's yarn_get_mscale, of both: (0.1 m ln s + 1), 1 unless s > 1.
  of = lambda s, m: 0.1 * m * np.log(s) + 1
  for s, m, every in ((4.0, 0.8, 0.5), (4.0, 0.5, 0.5), (1.5, 0.0, 1.0),
                      (1.0, 0.8, 0.5)):
    _, factor, _ = rope('yarn', factor=s, mscale=m, mscale_all_dim=every)
    assert factor == pytest.approx(of(s, m) / of(s, every))


def test_proportional_positions_turn_the_first_pairs_of_a_whole_head():
  got, factor, plain = rope('none', fraction=0.25, proportional=True)
  want = np.where(np.arange(64) < 16, plain, 0)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert factor == 1
  c = resolved(position='rope', head_dim=8, rope=dict(
      fraction=0.6, proportional=True, scaling='linear', factor=2.0))
  x, at = np.float64(normal(0, 1, 3, 1, 8)), np.array([[0, 1, 5]])
  got = positions.rotate_heads(x.astype(np.float32), at, c)
  angle = np.float64([0.5, 1e4 ** (-2 / 8) / 2, 0, 0]) * at[0][:, None]
  turned = (x[0, :, 0, :4] + 1j * x[0, :, 0, 4:]) * np.exp(1j * angle)
  np.testing.assert_allclose(
      got[0, :, 0], np.concatenate([turned.real, turned.imag], -1), atol=1e-6)


# Blocks: the equations of their docstrings.


# Blocks, with cross-attention where they have it, and without.
EACH_BLOCK = pytest.mark.parametrize('block, cross', [
    pytest.param(name, cross, marks=[] if cross == block.CROSS
                 else pytest.mark.long)
    for name, block in BLOCKS.items()
    for cross in (False, True)[:1 + block.CROSS]])


@pytest.mark.slow
@EACH_BLOCK
def test_a_block_follows_its_equations(block, cross):
  W = 0 if cross else 3  # a decoder without a memory has convolutions too
  c = resolved(block=block, norm='layernorm', branch_conv=W)
  x = normal(0, 2, 6, D)
  ctx = context(memory=Memory(normal(1, 2, 7, D)))
  module = BLOCKS[block](c, LayerKind('global', 'gelu', cross=cross))
  params = born(module, x, ctx, None)
  params |= {name: normal(2, *w.shape) for name, w in params.items()
             if name.endswith('_conv')}
  got = module.apply({'params': params}, x, ctx, None)[0]
  def conv(name, y):
    return y + sum(np.pad(y, ((0, 0), (W - 1 - i, 0), (0, 0)))[:, :6]
                   * params[f'{name}_conv'][i][None, None] for i in range(W))
  def n(name, x):
    p = params[f'{name}_norm']
    return layers.layernorm(x, p['scale'], p['bias'], c.norm_eps)
  A = lambda x: conv('attention', SelfAttention(c, KIND).apply(
      {'params': params['attention']}, x, ctx, None)[0])
  C = lambda x: CrossAttention(c, KIND).apply(
      {'params': params['cross_attention']}, x, ctx, None)[0]
  F = lambda x: conv('ffn', FFN(c, 'gelu').apply(
      {'params': params['ffn']}, x, ctx)[0])
  if block == 'pre_norm':
    x = x + A(n('attention', x))
    x = x + C(n('cross', x)) if cross else x
    want = x + F(n('ffn', x))
  elif block == 'post_norm':
    x = n('attention', x + A(x))
    x = n('cross', x + C(x)) if cross else x
    want = n('ffn', x + F(x))
  elif block == 'parallel':
    want = (x + A(n('attention', x)) + F(n('ffn', x))
            + (C(n('cross', x)) if cross else 0))
  elif block == 'out_norm':
    x = x + n('attention_out', A(x))
    x = x + n('cross_out', C(x)) if cross else x
    want = x + n('ffn_out', F(x))
  elif block in ('ffn_norm', 'no_norm'):
    x = x + A(x)
    x = x + C(x) if cross else x
    want = x + F(n('ffn', x) if block == 'ffn_norm' else x)
  elif block == 'shared_norm':
    m = n('attention', x)
    want = x + A(m) + F(m) + (C(m) if cross else 0)
  elif block == 'sandwich':
    x = x + n('attention_out', A(n('attention', x)))
    x = x + n('cross_out', C(n('cross', x))) if cross else x
    want = x + n('ffn_out', F(n('ffn', x)))
  else:
    pytest.skip(f'write the equation of {block} here')
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# The hidden units of each network are what its paper says, in numpy.


UP, GATE = np.random.default_rng(0).normal(size=(2, 40, 8)) * 6


def test_relu2_and_reglu_by_hand():
  up, gate = jnp.asarray(UP), jnp.asarray(GATE)
  np.testing.assert_allclose(layers.HiddenUnits('relu2')(up),
                             np.where(UP > 0, UP ** 2, 0), rtol=1e-5)
  np.testing.assert_allclose(layers.HiddenUnits('leaky_relu2')(up),
                             np.where(UP > 0, UP, UP / 2) ** 2, rtol=1e-5)
  np.testing.assert_allclose(layers.HiddenUnits('reglu')(up, gate),
                             np.where(GATE > 0, GATE * UP, 0), rtol=1e-5)


def test_xielu_by_hand():
  above, below = 0.7, -0.4
  a, b = np.log1p(np.exp(above)), 0.5 + np.log1p(np.exp(below))
  want = np.where(UP > 0, a * UP ** 2, b * (np.exp(np.minimum(UP, 0)) - 1 - UP))
  got = layers.HiddenUnits('xielu')(
      jnp.asarray(UP), None, [jnp.float32(above), jnp.float32(below)])
  np.testing.assert_allclose(got, want + UP / 2, rtol=1e-5, atol=1e-6)
  # In a new layer both curves have the factor 0.8.
  numbers = dict(layers.FFNS['xielu'].learned)
  assert np.log1p(np.exp(numbers['alpha_p'])) == pytest.approx(0.8)
  assert 0.5 + np.log1p(np.exp(numbers['alpha_n'])) == pytest.approx(0.8)


def test_clamped_swiglu_by_hand():
  alpha, limit = 1.3, 5.0
  assert GATE.max() > limit and min(UP.min(), GATE.min()) < -limit
  g, u = np.minimum(GATE, limit), np.clip(UP, -limit, limit)
  want = g / (1 + np.exp(-alpha * g)) * (u + 1)
  got = layers.HiddenUnits('swiglu_clamped', ClampConfig(alpha, limit))(
      jnp.asarray(UP), jnp.asarray(GATE))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('kind', layers.FFNS)
def test_hidden_units_of_bfloat16_are_rounded_once(kind):
  """And so are their gradients."""
  hidden = layers.HiddenUnits(kind, ClampConfig(1.3, 5.0))
  narrow = [jnp.asarray(x, jnp.bfloat16) for x in (UP, GATE)]
  narrow = narrow[:1 + hidden.gated]
  learned = [jnp.float32(0.3)] * len(layers.FFNS[kind].learned)
  hidden = functools.partial(hidden, learned=learned)
  wide = [x.astype(jnp.float32) for x in narrow]
  h, pull = jax.vjp(hidden, *narrow)
  want, pull_wide = jax.vjp(hidden, *wide)
  d = jnp.cos(want).astype(jnp.bfloat16)
  for got, exact in zip((h, *pull(d)), (want, *pull_wide(
      d.astype(jnp.float32)))):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


# Rotary positions that turn otherwise in long rows: longrope and dynamic.


K, THETA, ORIGINAL = 8, 1e4, 6
SHORT, LONG = (1.0, 1.1, 1.3, 1.8), (1.0, 3.0, 8.0, 30.0)
LONGROPE = dict(scaling='longrope', theta=THETA, original_len=ORIGINAL,
                factor=4.0, short_factor=SHORT, long_factor=LONG)
DYNAMIC = dict(scaling='dynamic', theta=THETA, original_len=ORIGINAL,
               factor=4.0)


def frequencies(rope, length):
  c = architectures.resolve(models.small_config('llama', head_dim=K, rope=rope))
  result = positions.rope_frequencies(c, length)
  # Rows of several lengths, each by its own.
  rows, _ = positions.rope_frequencies(c, jnp.array([length, 2 * ORIGINAL]))
  np.testing.assert_allclose(np.atleast_2d(rows)[0], result[0], rtol=1e-6)
  return result


@pytest.mark.parametrize('length', [1, ORIGINAL, ORIGINAL + 1, 5 * ORIGINAL])
def test_longrope_divides_by_the_factors_of_its_length(length):
  """Ding et al. 2024, equation 2, and the factor on attention of Phi-3."""
  got, factor = frequencies(LONGROPE, length)
  divided_by = LONG if length > ORIGINAL else SHORT
  np.testing.assert_allclose(
      got, THETA ** (-np.arange(0, K, 2) / K) / np.array(divided_by), rtol=1e-6)
  assert factor == pytest.approx(np.sqrt(1 + np.log(4) / np.log(ORIGINAL)))
  assert frequencies(LONGROPE | dict(attention_factor=1.5), length)[1] == 1.5
  assert frequencies(LONGROPE | dict(factor=1.0), length)[1] == 1.0


@pytest.mark.parametrize('length', [1, ORIGINAL, ORIGINAL + 1, 5 * ORIGINAL])
def test_dynamic_grows_theta_with_the_length(length):
  """NTK-aware scaling whose factor is 1 up to the original length."""
  got, factor = frequencies(DYNAMIC, length)
  stretch = 4.0 * max(length, ORIGINAL) / ORIGINAL - 3.0
  theta = THETA * stretch ** (K / (K - 2))
  np.testing.assert_allclose(got, theta ** (-np.arange(0, K, 2) / K), rtol=1e-6)
  assert factor == 1.0
  if length <= ORIGINAL:
    plain, _ = frequencies(dict(theta=THETA), length)
    np.testing.assert_allclose(got, plain, rtol=1e-6)


def test_layouts_of_sinusoids():
  where = jnp.arange(7)
  paper = positions.sinusoidal_encoding(where, 16)
  halves = positions.sinusoidal_encoding(where, 16, 'halves')
  order = np.concatenate([np.arange(0, 16, 2), np.arange(1, 16, 2)])
  np.testing.assert_allclose(paper[:, order], halves)
  np.testing.assert_allclose(paper[3, 2], np.sin(3 / 10000 ** (2 / 16)),
                             rtol=1e-5)


def boxes(module) -> dict[str, Declared]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(
      abstract_params(module),
      is_leaf=lambda x: isinstance(x, Declared))
  return {paths.path_to_string(path): box for path, box in leaves}


def test_axes_as_a_picture():
  split = lambda role, ndim: tuple(role.split(ndim))
  query = Role(('embed', 'heads', 'head'), (0,))
  assert split(query, 3) == ((), (0,), (1, 2))
  assert split(query, 4) == ((0,), (1,), (2, 3))  # of every layer
  out = Role(('heads', 'head', 'embed'), (0, 1))
  assert split(out, 4) == ((0,), (1, 2), (3,))
  expert = Role(('experts', 'embed', 'mlp'), (1,), (0,))
  assert split(expert, 4) == ((0, 1), (2,), (3,))
  last = Role(('embed', 'mlp', 'experts'), (0,), (2,))
  assert split(last, 3) == ((2,), (0,), (1,))
  bias = Role(('experts', 'mlp'), batch=(0,))
  assert split(bias, 3) == ((0, 1), (), (2,)) and not bias.is_matrix
  assert query.split(4).sizes((2, 3, 5, 7)) == (3, 35)


@pytest.mark.parametrize('arch, fields', [
    ('bert', {}), ('gpt', {}),
    ('t5', dict(
        ffn='swiglu', tie_embeddings=False, qk_norm=True, logits_bias=True,
        qk_norm_over='projection', attention_sinks=True, position='relative',
        attention_gate='headwise', num_kv_heads=2, value_residual=True,
        value_embedding=True)),
    ('gpt', dict(ffn='moe', attention_gate='elementwise', moe=dict(
        router='sigmoid', shared_experts=1, shared_gate=True, ffn='swiglu',
        logit_bias=True), **models.DENSE_AND_MOE_LAYERS))])
def test_a_parameters_role_agrees_with_its_name_and_its_axes(arch, fields):
  config = base.base().model
  config.update(dict(arch=arch, vocab_size=64, max_len=16, **fields))
  module = architectures.build(config)
  matrices = 0
  for path, box in boxes(module).items():
    assert len(box.names) == box.value.ndim
    axes = box.role.split(box.value.ndim)
    named = lambda side, names=box.names: [names[i] for i in side]
    assert sorted(sum(axes, ())) == list(range(box.value.ndim)), path
    assert named(axes.batch) == [
        n for n in box.names if n in ('layers', 'experts')], path
    # A gate may be of whole heads: one number each.
    headwise = path.endswith('/value_gate') or (
        path.endswith('/output_gate') and box.value.ndim == 3)
    # Heads and what they hold are one side of a matrix.
    if box.role.is_matrix:
      matrices += 1
      for side in (axes.inputs, axes.outputs):
        assert ('head' in named(side)) == bool(
            {'heads', 'kv_heads'} & set(named(side))) or headwise, path
    assert box.role.is_matrix != any(
        w in path for w in ('norm', 'bias', 'sink', 'residual')), path
    assert (box.role.kind == 'embedding') == (
        path.startswith('embed/') or path.endswith('/value_embedding')) or (
            not box.role.is_matrix), path
    assert (box.role.kind == 'logits') == (
        path.startswith(('head/', 'nsp'))
        or path.endswith(('/router', '/shared_gate')) or headwise), path
  assert matrices >= 6


def test_parameters_in_bfloat16_are_drawn_in_float32():
  """JAX draws bfloat16 from 128 values, whose mean is -0.012 deviations."""
  module = architectures.build(models.small_config('llama',
                                                   param_dtype='bfloat16',
                                                   d_ff=4096))
  params = jax.jit(lambda key: nn.meta.unbox(module.init(
      key, models.random_tokens())['params']))(jax.random.key(0))
  x = params['decoder']['layers']['block_0']['ffn']['up']
  assert x.dtype == jnp.bfloat16
  values = np.asarray(x, np.float64).reshape(-1)
  assert len(np.unique(values)) > 300
  assert abs(values.mean()) < 4 * values.std() / np.sqrt(values.size) < (
      0.01 * values.std())


MUP = dict(parametrization='mup', mup_base_width=32)
ENGRAM = dict(memory='engram', ngrams=dict(rows=40))
SHARING = dict(kv_sharing=True)


def of_kinds(**kinds):
  """Returns the changes of a config that has one layer of each kind a turn."""
  return dict(pattern=','.join(kinds), kinds=kinds)


@pytest.mark.parametrize('system, fields, words', [
    # Mixers, rules of what is seen, and positions.
    ('bert', dict(mixer='csa'), 'is no decoder'),
    ('llama', dict(mixer='csa', **MUP), 'has no rule'),
    ('llama', dict(mixer='csa', indexer=dict(block=2)), 'one by one'),
    ('t5', dict(mixer='latent'), 'no attention to the memory'),
    ('llama', dict(mixer='latent', **MUP), 'has no rule'),
    ('llama', dict(mixer='latent', attention_kernel='splash'), 'of one size'),
    ('llama', dict(mixer='mamba', **MUP), 'nothing of its steps'),
    ('llama', dict(mixer='kda', parametrization='mup', mup_base_width=16),
     'have the rank of the base'),
    ('llama', dict(mixer='retnet', rope=dict(
        scaling='dynamic', factor=2.0, original_len=8)), 'by the length'),
    ('llama', dict(mixer='deltanet', deltanet=dict(key_heads=3,
                                                   value_heads=4)), 'divide'),
    ('bert', dict(attention='indexed'), 'is no decoder'),
    ('llama', of_kinds(a=dict(attention='indexed'), b=dict(
        attention='indexed', kv_sharing=True)), 'keys of its own, so'),
    ('llama', dict(position='disentangled') | of_kinds(a={}, b=SHARING),
     "keys of the layer's own"),
    ('deberta_v2', dict(disentangled=dict(buckets=7)), 'must be even'),
    ('deberta_v2', dict(disentangled=dict(buckets=62)), 'more than half'),
    ('deberta_v2', MUP, 'has no rule'),
    ('llama', dict(attention_exclusive='all', attention_difference=0.3),
     'pairs of heads'),
    ('llama', dict(key_offset=True), 'positions do not rotate'),
    ('gpt', dict(parametrization='mup'), 'mup_base_width is 0'),
    ('gpt', dict(parametrization='mup', mup_base_width=3), '0.75 features'),
    # Memories, experts, residual streams and loops.
    ('llama', ENGRAM | dict(residual='attention'), 'adds to one stream'),
    ('llama', ENGRAM | MUP, 'no rules'),
    ('llama', dict(memory='engram', ngrams=dict(rows=40, pad_token=61)),
     'is no token of 61'),
    ('llama', dict(memory='engram', ngrams=dict(rows=2**30)), 'in 32 bits'),
    ('llama', dict(memory='engram', ngrams=dict(rows=40, heads=64)),
     'not a feature for each'),
    ('mixtral', dict(moe=dict(latent_dim=4), **MUP), 'has no rule'),
    ('mixtral', dict(moe=dict(dispatch='sorted', capacity_factor=0.0)), 'pads'),
    ('mixtral', dict(moe=dict(dispatch='sorted', eval_capacity_factor=0.0,
                              capacity_factor=1.0)), 'pads'),
    ('mixtral', dict(moe=dict(gate_inputs=True)), 'one input for all'),
    ('llama', dict(layer_scale=True, residual='mhc'), 'multiplies one stream'),
    ('llama', dict(skips=True, num_layers=1), 'no other half'),
    ('llama', dict(skips=True, residual='mhc'), 'has none: choose it from pla'),
    ('llama', dict(skips=True, loop='plain', loops=dict(passes=2)), 'no pass'),
    ('llama', dict(loop='add', residual='mhc'), 'streams are handed on'),
    ('llama', dict(loop='plain', residual='mhc', loops=dict(boundary='norm')),
     'streams are handed on'),
    ('llama', dict(loop='plain', block='post_norm', loops=dict(
        boundary='norm')), 'there is no final norm'),
    ('llama', dict(loop='plain', loops=dict(passes=3, gradient_passes=2)),
     'would have no gradient'),
    ('llama', dict(loop='add', loops=dict(passes=3, gradient_passes=4)),
     'from 1 to the 3'),
    ('llama', dict(loop='plain', loops=dict(passes=2), keep_gathered='query'),
     'all passes share'),
    # Layers of several kinds, wirings, adapters and further tokens.
    ('llama', dict(num_kv_heads=3), 'does not divide'),
    ('llama', dict(block='parallel', ffn='none'), 'no equation for model.ffn'),
    ('llama', dict(pattern='a,b', kinds=dict(a={})), "'b', which model.kinds"),
    ('llama', dict(pattern='a', kinds=dict(a={}, b={})), 'has b, which no la'),
    ('llama', dict(pattern='a,b,a', kinds=dict(a={}, b={}), num_layers=4),
     'multiple of the 3 layers'),
    ('llama', of_kinds(a={}, b=dict(mixer='gla', **SHARING)), 'reads no keys'),
    ('llama', of_kinds(a=SHARING), 'no layer before it'),
    ('llama', of_kinds(a=dict(head_dim=8), b=dict(head_dim=16, **SHARING)),
     'is 16, and 8 of'),
    ('t5', dict(mtp_depth=1), 'no meaning with model.arch'),
    ('llama', dict(mtp_depth=1, **ENGRAM), 'reads tables of model.memory'),
    ('llama', dict(mtp_depth=1) | of_kinds(a={}, b=SHARING), 'keys of another'),
    ('llama', dict(lora=dict(rank=2, targets='nothing')), "'nothing': choose"),
    ('gpt', dict(attention='banded'), 'sliding_window is 0'),
    ('gpt', dict(position='sinusoidal', d_model=33, num_heads=3), 'need it ev'),
    ('t5', dict(relative=dict(buckets=7)), 'needs an even number of buckets'),
    ('t5', dict(pattern='a', kinds=dict(a=dict(num_heads=2))), 'all layers'),
    ('llama', dict(mixer='latent', rope=dict(fraction=0.5)), 'of whose heads'),
    ('llama', dict(mixer='latent', latent=dict(rope_dim=3)), 'rope_dim .* 3:'),
    ('llama', dict(rope=dict(scaling='yarn', beta_fast=0.5)), 'fast is 0.5'),
    ('llama', dict(attention_difference=0.3, num_kv_heads=1), 'an even model'),
    ('llama', dict(keep_gathered='query_up'), "'query_up', a product that no"),
    ('llama', dict(type_vocab_size=2), '2 has no meaning with model.arch'),
    ('bert', dict(head='sequence', num_labels=0), 'num_labels is 0'),
    ('bert', dict(position='relative_by_token'), 'in a decoder: choose'),
    ('bert', dict(position='path'), 'in a decoder, and they are'),
    ('gpt', dict(position='path', attention_softcap=5.0), 'which is 5.0, to 0'),
    ('llama', dict(mixer='latent', position='relative_by_token'), 'attention'),
    ('bert', dict(ffn='none'), 'has the activation of the layers'),
    ('mixtral', dict(moe=dict(router='expert_choice')), 'must not see'),
    ('mixtral', dict(moe=dict(router='switch', top_k=2)), 'chooses 1'),
    ('mixtral', dict(moe=dict(num_experts=4, top_k=5)), 'choose 1 to'),
    ('mixtral', dict(moe=dict(num_experts=4, expert_groups=3)), 'divide them'),
    ('bert', dict(ffn='moe', moe=dict(router='expert_choice',
                                      balance_loss='sequence')), 'do not: ch')])
def test_what_no_model_can_be_is_refused(system, fields, words):
  with pytest.raises(RequestError, match=words):
    architectures.resolve(models.small_config(system, **fields))
