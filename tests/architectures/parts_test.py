"""Each part alone against its equation: how weights are born, what a product
rounds, norms, positions, attention's options, the wiring of a block, and the
order in which a model reports on its layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

import architectures
from architectures.parts import ffn
from architectures.parts import linear, norms, positions, rotary
from architectures.parts import roles
from architectures.parts.attention.multi_head import Attention
from architectures.parts.blocks import BLOCKS
from architectures.parts.config import LayerKind
from architectures.parts.context import Context
from architectures.parts.ffn import ClampConfig, FFN
from architectures.parts.norms import NORMS
from tests.helpers import models
from tests.helpers.jaxprs import equations
from architectures.parts import paths
from training.runs import abstract_params

D = 32
KIND = LayerKind('global', 'gelu')


def resolved(system='gpt', **changes):
  return architectures.resolve(models.config(system, **changes))


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def born(module, *args, seed=0):
  """Parameters off their initial values: biases, norms and sinks count."""
  params = nn.meta.unbox(module.init(jax.random.key(seed), *args))['params']
  leaves, tree = jax.tree.flatten(params)
  return jax.tree.unflatten(tree, [
      x + 0.3 * normal(i, *x.shape) for i, x in enumerate(leaves)])


def context(L=6, **fields):
  return Context(jnp.arange(L)[None], **fields)


# Weights and products.


@pytest.mark.slow
@pytest.mark.parametrize('init', ['normal', 'scaled_normal', 'fan_in'])
def test_weights_are_born_with_the_size_that_the_init_says(init):
  """GPT-2, section 2.3, and Switch, section 2.4; `down` has 4 x the fan-in."""
  N, d, F = 8, 64, 256
  module = architectures.build(models.config(
      d_model=d, d_ff=F, num_layers=N, init=init, init_stddev=0.05,
      init_scale=0.5, tie_embeddings=False, vocab_size=200, num_heads=4))
  params = paths.flatten(nn.meta.unbox(jax.jit(module.init)(
      jax.random.key(0), models.tokens())['params']))
  residual = 0.05 / (2 * N) ** 0.5 if init == 'scaled_normal' else 0.05
  layer = 'decoder/layers/block_0/'
  sizes = {'attention/query': (d, 0.05), 'attention/out': (d, residual),
           'ffn/up': (d, 0.05), 'ffn/down': (F, residual)}
  for name, (fan_in, stddev) in sizes.items():
    want = (0.5 / fan_in) ** 0.5 if init == 'fan_in' else stddev
    got = float(params[layer + name].std())
    assert got == pytest.approx(want, rel=0.03), name
  want = (0.5 / d) ** 0.5 if init == 'fan_in' else 0.05
  assert float(params['head/kernel'].std()) == pytest.approx(want, rel=0.03)


def test_a_product_in_bfloat16_rounds_its_operands_alone():
  """Its gradients too: each near that of float32, and of its operand's type."""
  x, w, d = normal(0, 64, 48), normal(1, 48, 40), normal(2, 64, 40)
  def value_and_grads(dtype):
    y, vjp = jax.vjp(lambda x, w: linear.einsum(
        'AB,BC->AC', x, w, dtype, jnp.float32), x, w)
    return y, *vjp(d)
  for got, want in zip(*map(value_and_grads, (jnp.bfloat16, jnp.float32))):
    assert got.dtype == want.dtype == jnp.float32
    assert jnp.abs(got - want).max() < 0.02 * jnp.abs(want).max()


@pytest.mark.parametrize('spec, x, w, turned', [
    ('BLD,DF->BLF', (2, 3, 5), (5, 7), False),
    ('BLF,FD->BLD', (2, 3, 7), (7, 5), True),
    ('BLD,DHK->BLHK', (2, 3, 5), (5, 4, 7), False),
    ('BLHK,HKD->BLD', (2, 3, 4, 7), (4, 7, 5), True),
    ('BLHU,UHK->BLHK', (2, 3, 4, 7), (7, 4, 5), None),
    ('...D,DV->...V', (2, 5), (5, 3), True),
    ('QBPV,QBPD->QVD', (2, 3, 4, 5), (2, 3, 4, 7), False)])
def test_the_gradients_of_a_product_are_those_that_jax_derives(
    spec, x, w, turned):
  """That of the weight has the smaller array first, so long as the program is
  for one CPU. (None: with heads that x and y share, jnp.einsum chooses.)"""
  x, w = normal(0, *x), normal(1, *w)
  product = lambda x, w: linear.einsum(spec, x, w, jnp.float32)
  want = np.einsum(spec, *(np.asarray(a, np.float64) for a in (x, w)))
  y, vjp = jax.vjp(product, x, w)
  np.testing.assert_allclose(y, want, atol=1e-5)
  plain = jax.vjp(lambda x, w: jnp.einsum(spec, x, w), x, w)[1]
  for got, grad in zip(vjp(y), plain(y)):
    np.testing.assert_allclose(got, grad, atol=1e-4)

  def first():
    program = jax.make_jaxpr(lambda d: jax.vjp(product, x, w)[1](d))(y)
    operands = [[v.aval.shape for v in eqn.invars]
                for eqn in equations(program.jaxpr)
                if eqn.primitive.name == 'dot_general']
    one, = (shapes[0] for shapes in operands if w.shape not in shapes)
    return one

  if turned is None:
    return
  assert first() == (y if turned else x).shape
  mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    assert first() == x.shape


# Norms.


@pytest.mark.parametrize('name', NORMS)
def test_a_constant_row_has_a_norm_that_is_finite(name):
  """epsilon keeps a row of zeros, whose variance is 0, from being NaN."""
  module = NORMS[name](resolved(norm_eps=1e-5))
  params = module.init(jax.random.key(0), jnp.ones((1, D)))
  run = lambda x: module.apply(params, x)
  np.testing.assert_array_equal(run(jnp.zeros((2, D))), jnp.zeros((2, D)))
  assert np.isfinite(jax.grad(lambda x: run(x).sum())(jnp.zeros((2, D)))).all()


@pytest.mark.parametrize('name', ['layernorm', 'rmsnorm'])
def test_a_row_near_constant_is_not_blown_up(name):
  """Epsilon makes a small row come out smaller, by the equation."""
  module = NORMS[name](resolved(norm_eps=1e-5))
  params = module.init(jax.random.key(0), jnp.ones((1, D)))
  small = 1e-3 * normal(0, 2, D)
  size = np.square(small - small.mean(-1, keepdims=True) * (
      name == 'layernorm')).mean(-1)
  got = np.square(module.apply(params, small)).mean(-1)
  np.testing.assert_allclose(got, size / (size + 1e-5), rtol=1e-4)


@pytest.mark.parametrize('name', ['layernorm', 'rmsnorm'])
def test_a_norm_rounds_its_result_alone(name):
  """Of bfloat16, it computes in float32: an offset costs no digits."""
  x = (10 + normal(0, 4, D)).astype(jnp.bfloat16)
  one, zero = jnp.ones(D), jnp.zeros(D)
  run = lambda x: (norms.layernorm(x, one, zero, 1e-6) if name == 'layernorm'
                   else norms.rmsnorm(x, one, 1e-6))
  got, want = run(x), run(x.astype(jnp.float32))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


# Positions.


def test_stretched_positions_lie_between_two_rows():
  table_LD = normal(0, 4, D)
  got = positions.learned(table_LD, jnp.array([0, 1, 2, 3, 7]), 2.0)
  want = [table_LD[0], (table_LD[0] + table_LD[1]) / 2, table_LD[1],
          (table_LD[1] + table_LD[2]) / 2, table_LD[3]]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  quarter = positions.learned(table_LD, jnp.array([1]), 4.0)[0]
  np.testing.assert_allclose(quarter, 0.75 * table_LD[0] + 0.25 * table_LD[1],
                             rtol=1e-6)


def rope(scaling, **fields):
  c = resolved(position='rope', head_dim=128, max_len=32768, rope=dict(
      scaling=scaling, theta=5e5, original_len=8192) | fields)
  frequency, factor = rotary.rope_frequencies(c)
  return np.float64(frequency), factor, 5e5 ** (-np.arange(0, 128, 2) / 128)


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


def test_alibi_knows_the_distance_on_either_side():
  at = jnp.arange(5)[None]
  bias_HLM = positions.alibi(at, at, 4)[0]
  np.testing.assert_array_equal(bias_HLM, jnp.swapaxes(bias_HLM, 1, 2))
  assert (np.diff(bias_HLM[:, 0]) < 0).all()


# Attention's options.


def attend(params, x, changes=None, **options):
  """Attention of x [2, 6, D] with the parameters changed by name."""
  module = Attention(resolved(**options), KIND)
  return module.apply({'params': params | (changes or {})}, x, context(),
                      None)[0]


@pytest.mark.parametrize('name', ['query', 'key'])
def test_qk_norm_takes_the_length_of_queries_and_keys_away(name):
  x, module = normal(0, 2, 6, D), Attention(
      resolved(qk_norm=True, norm_eps=1e-12), KIND)
  params = born(module, x, context(), None)
  run = lambda by, **options: attend(params, x, {
      n: by * params[n] for n in (name, f'{name}_bias')}, **options)
  options = dict(qk_norm=True, norm_eps=1e-12)
  np.testing.assert_allclose(run(1, **options), run(9, **options), rtol=1e-4,
                             atol=1e-6)
  assert not np.allclose(run(1), run(9), atol=1e-2)


def test_a_low_cap_on_the_scores_weighs_all_keys_alike():
  x = normal(0, 2, 6, D)
  params = born(Attention(resolved(), KIND), x, context(), None)
  capped = attend(params, x, attention_softcap=1e-4)
  flat = attend(params, x, {n: 0 * params[n] for n in ('query', 'query_bias')})
  np.testing.assert_allclose(capped, flat, atol=1e-3)
  assert not np.allclose(attend(params, x), flat, atol=1e-2)


def test_a_sink_takes_weight_and_gives_no_value():
  x = normal(0, 2, 6, D)
  params = born(Attention(resolved(attention_sinks=True), KIND), x, context(),
                None)
  run = lambda sink: attend(params, x, {'sink': jnp.full(4, sink)},
                            attention_sinks=True)
  bias = jnp.broadcast_to(params['out_bias'], x.shape)
  np.testing.assert_allclose(run(-1e3), attend(params, x), rtol=1e-5)
  for high in (1e2, 1e4):  # the softmax holds on to the highest score
    np.testing.assert_allclose(run(high), bias, rtol=1e-5)
    assert np.isfinite(jax.grad(lambda sink: run(sink).sum())(high))
  assert not np.allclose(run(0.0), bias, atol=1e-2)


def test_cross_attention_does_not_know_where_in_the_memory_a_token_stands():
  x, memory = normal(0, 2, 6, D), normal(1, 2, 6, D)
  module = Attention(resolved(position='rope'), KIND, cross=True)
  run = lambda params, memory: module.apply(
      {'params': params}, x, context(memory_BMD=memory), None)[0]
  params = born(module, x, context(memory_BMD=memory), None)
  order = jnp.array([3, 5, 1, 0, 2, 4])
  np.testing.assert_allclose(run(params, memory),
                             run(params, memory[:, order]), rtol=1e-4,
                             atol=1e-6)


# Blocks: the equations of their docstrings.


@pytest.mark.slow
@pytest.mark.parametrize('block, cross', [
    (name, cross) for name, block in BLOCKS.items()
    for cross in (False, True)[:1 + block.CROSS]])
def test_a_block_follows_its_equations(block, cross):
  c, x = resolved(block=block, norm='layernorm'), normal(0, 2, 6, D)
  ctx = context(memory_BMD=normal(1, 2, 7, D))
  module = BLOCKS[block](c, LayerKind('global', 'gelu', cross=cross))
  params = born(module, x, ctx, None)
  got = module.apply({'params': params}, x, ctx, None)[0]
  def n(name, x):
    p = params[f'{name}_norm']
    return norms.layernorm(x, p['scale'], p['bias'], c.norm_eps)
  A = lambda x: Attention(c, KIND).apply(
      {'params': params['attention']}, x, ctx, None)[0]
  C = lambda x: Attention(c, KIND, cross=True).apply(
      {'params': params['cross_attention']}, x, ctx, None)[0]
  F = lambda x: FFN(c, 'gelu').apply({'params': params['ffn']}, x, ctx)[0]
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
  elif block == 'ffn_norm':
    x = x + A(x)
    x = x + C(x) if cross else x
    want = x + F(n('ffn', x))
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


# Models.


@pytest.mark.slow
def test_a_decoder_has_its_own_number_of_decoder_layers():
  module, params = models.make('t5', num_layers=2, num_decoder_layers=3)
  depth = {stack: jax.tree.leaves(params[stack]['layers'])[0].shape[0]
           for stack in ('encoder', 'decoder')}
  assert depth == {'encoder': 2, 'decoder': 3}
  # And without a target, it is shown the source.
  tokens = models.tokens()
  np.testing.assert_array_equal(models.logits(module, params, tokens),
                                models.logits(module, params, tokens,
                                              decoder_tokens_BL=tokens))


# The hidden units of each network are what its paper says, in numpy.


UP, GATE = np.random.default_rng(0).normal(size=(2, 40, 8)) * 6


def test_relu2_and_reglu_by_hand():
  up, gate = jnp.asarray(UP), jnp.asarray(GATE)
  np.testing.assert_allclose(ffn.Hidden('relu2')(up),
                             np.where(UP > 0, UP ** 2, 0), rtol=1e-5)
  np.testing.assert_allclose(ffn.Hidden('reglu')(up, gate),
                             np.where(GATE > 0, GATE * UP, 0), rtol=1e-5)


def test_clamped_swiglu_by_hand():
  alpha, limit = 1.3, 5.0
  assert GATE.max() > limit and min(UP.min(), GATE.min()) < -limit
  g, u = np.minimum(GATE, limit), np.clip(UP, -limit, limit)
  want = g / (1 + np.exp(-alpha * g)) * (u + 1)
  got = ffn.Hidden('swiglu_clamped', ClampConfig(alpha, limit))(
      jnp.asarray(UP), jnp.asarray(GATE))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('kind', ffn.FFNS)
def test_hidden_units_of_bfloat16_are_rounded_once(kind):
  """And so are their gradients."""
  hidden = ffn.Hidden(kind, ClampConfig(1.3, 5.0))
  narrow = [jnp.asarray(x, jnp.bfloat16) for x in (UP, GATE)]
  narrow = narrow[:1 + hidden.gated]
  wide = [x.astype(jnp.float32) for x in narrow]
  h, pull = jax.vjp(hidden, *narrow)
  want, pull_wide = jax.vjp(hidden, *wide)
  d = jnp.cos(want).astype(jnp.bfloat16)
  for got, exact in zip((h, *pull(d)), (want, *pull_wide(
      d.astype(jnp.float32)))):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


# RMSNorm with 1 + offset and without parameters, against NumPy's formula.


EPS = 1e-3


def config(norm, **changes):
  return models.config(norm=norm, norm_eps=EPS, **changes)


@pytest.mark.parametrize('name', ['rmsnorm_1p', 'rmsnorm_plain'])
def test_a_norm_is_its_formula(name):
  rng = np.random.default_rng(0)
  x, offset = rng.normal(size=(3, 8)), rng.normal(size=8)
  module = NORMS[name](models.config(norm_eps=EPS))
  made = module.init(jax.random.key(0), jnp.ones((1, 8)))
  factor = {'rmsnorm_1p': 1 + offset, 'rmsnorm_plain': 1.0}[name]
  params = jax.tree.map(lambda _: jnp.asarray(offset), made)
  np.testing.assert_allclose(
      module.apply(params, jnp.asarray(x, jnp.float32)),
      x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPS) * factor,
      rtol=1e-5)
  assert len(jax.tree.leaves(made)) == (name == 'rmsnorm_1p')


def test_all_forms_of_rmsnorm_begin_alike():
  x = jax.random.normal(jax.random.key(1), (3, 8))
  first = [module.apply(module.init(jax.random.key(0), x), x) for module in (
      NORMS[name](models.config(norm_eps=EPS))
      for name in ('rmsnorm', 'rmsnorm_1p', 'rmsnorm_plain'))]
  for other in first[1:]:
    np.testing.assert_array_equal(first[0], other)


def test_an_offset_is_no_matrix_and_decays_as_a_scale_does():
  """Not at all, by default; where decay_mask names it, to a factor of 1."""
  boxes = abstract_params(architectures.build(config('rmsnorm_1p')))
  found = paths.flatten(roles.read(boxes))
  offsets = {path: role for path, role in found.items() if 'norm' in path}
  assert len(offsets) == 3  # of attention, of the network, the last
  assert all(path.endswith('/offset') and not role.matrix
             and role.axes == ('embed',) for path, role in offsets.items())
  plain = abstract_params(architectures.build(config('rmsnorm_plain')))
  assert not [path for path in paths.flatten(nn.meta.unbox(plain))
              if 'norm' in path]


# Rotary positions that turn otherwise in long rows: longrope and dynamic.


K, THETA, ORIGINAL = 8, 1e4, 6
SHORT, LONG = (1.0, 1.1, 1.3, 1.8), (1.0, 3.0, 8.0, 30.0)
LONGROPE = dict(scaling='longrope', theta=THETA, original_len=ORIGINAL,
                factor=4.0, short_factor=SHORT, long_factor=LONG)
DYNAMIC = dict(scaling='dynamic', theta=THETA, original_len=ORIGINAL,
               factor=4.0)


def frequencies(rope, length):
  c = architectures.resolve(models.config('llama', head_dim=K, rope=rope))
  return rotary.rope_frequencies(c, length)


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
