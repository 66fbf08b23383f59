"""The ways of computing experts agree, and cost what they should; megablox
equals a loop over experts; and a bias evens out the load in training."""

import dataclasses
import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import architectures
from architectures.parts import layers
from architectures.parts.context import Context, SharedArrays
from architectures.parts.moe import dispatch, grouped, routing
from architectures.parts.moe.layer import MoE, without_capacity
from architectures.parts.moe.routing import MoEConfig
from configs import base
from tests.architectures.attention import kernels_test
from tests.helpers import models
from tests.training import step_test
from training import runs
from training.distributed import devices
from training.runs import make_train_step


B, L, D, F, E = 2, 16, 8, 12, 4
SWIGLU = layers.HiddenUnits('swiglu')


def config(*, dtype='float32', bias=True, **moe):
  fields = base.base().model
  fields.arch = 'bert'  # in a decoder experts may not choose
  fields.update(d_model=D, d_ff=F, num_heads=1, vocab_size=9, max_len=L,
                ffn='moe', dtype=dtype, ffn_bias=bias)
  fields.moe.update(dict(num_experts=E) | moe)
  return architectures.resolve(fields)


@functools.cache
def parameters(c):
  shapes = jax.eval_shape(lambda: MoE(c).init(
      jax.random.key(0), jnp.zeros((B, L, D)), Context(jnp.arange(L)[None])))
  return models.draw_parameters(nn.meta.unbox(shapes))


def run(c, train=True, **context):
  """Returns (y_BLD, report, gradients of the parameters and of x)."""
  module, key = MoE(c), jax.random.key(0)
  ctx = Context(jnp.arange(L)[None], deterministic=not train, **context)
  x_BLD = np.random.default_rng(1).normal(size=(B, L, D)).astype(np.float32)
  rngs = {name: key for name in ('router', 'dropout')}
  params = parameters(dataclasses.replace(c, dtype='float32').with_part(
      MoEConfig, dispatch='auto'))
  wave = np.cos(np.arange(D, dtype=np.float32))[None, None]

  def loss(params, x_BLD):
    y_BLD, report = module.apply(params, x_BLD, ctx, rngs=rngs)
    return (y_BLD * wave).sum(), (y_BLD, report)

  grads, (y_BLD, report) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(
      params, x_BLD)
  return y_BLD, report, grads


def assert_close(got, want, tolerance=2e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.array(a, np.float32), np.array(b, np.float32)
    np.testing.assert_allclose(a, b, atol=tolerance * (1e-3 + np.abs(b).max()))


def by_einsum(x_TD, r, run, slots):
  """Dispatches by the masks of GShard's paper, [T, E, C], all in float32."""
  T, num_experts = x_TD.shape[0], r.probs_TE.shape[1]
  hot = jax.nn.one_hot
  slot_A = dispatch.rank_among_equal_keys(r.expert_A, num_experts + 1)
  hot_AEC = (hot(r.expert_A, num_experts)[:, :, None]
             * hot(slot_A, slots)[:, None])
  hot_AT = hot(r.token_A, T)
  dispatch_TEC = jnp.einsum('AT,AEC->TEC', hot_AT, hot_AEC)
  combine_TEC = jnp.einsum('AT,AEC->TEC', hot_AT,
                           hot_AEC * r.gate_A[:, None, None])
  id_EC = jnp.einsum('AEC,A->EC', hot_AEC.astype(jnp.int32),
                     run.dropout_ids(jnp.arange(slot_A.shape[0])))
  rows_ECD = jnp.einsum('TEC,TD->ECD', dispatch_TEC, x_TD.astype(jnp.float32))
  y_ECD = run.compute_padded(rows_ECD.astype(x_TD.dtype), id_EC)
  y_ECD = y_ECD.astype(jnp.float32)
  return jnp.einsum('TEC,ECD->TD', combine_TEC, y_ECD).astype(x_TD.dtype)


def oracle(c, **context):
  """What `run` returns where tokens are dispatched by einsum."""
  with mock.patch.dict(dispatch.DISPATCHES, dropless=by_einsum):
    return run(c.with_part(MoEConfig, dispatch='dropless'), **context)


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    dict(ffn='swiglu_clamped', expert_dropout=0.2, capacity_factor=0.75,
         eval_capacity_factor=0.75, logit_bias=True, gate_scale=2.5,
         num_experts=8, expert_groups=4, top_groups=2),
    pytest.param(dict(ffn='gelu', bias=False, group_size=16,
                      capacity_factor=8.0, eval_capacity_factor=8.0),
                 marks=pytest.mark.long),
    dict(router='expert_choice', bias=False, top_k=1, group_size=16)],
                         ids=['gated', 'grouped', 'expert_choice'])
def test_each_way_is_the_sum_over_all_experts(fields):
  """With padding, which takes no expert and is dropped from the rest."""
  ids = np.repeat(np.int32([[1, 0]] * B), L // 2, 1)
  want = oracle(config(**fields), segment_ids_BL=ids)
  assert (want[1].health['dropped'] > 0) == ('expert_dropout' in fields)
  assert not want[0][:, L // 2:].any() and want[0][:, :L // 2].any()
  for way in ('sorted', 'dropless'):
    assert_close(run(config(dispatch=way, **fields), segment_ids_BL=ids), want)


@pytest.mark.slow
@pytest.mark.parametrize('dispatch_way', ['sorted', 'dropless'])
def test_zero_experts_return_what_they_read_of_the_latent_space(dispatch_way):
  """By hand, of 3 networks and 2 others."""
  c = config(num_experts=3, zero_experts=2, latent_dim=6, ffn='swiglu',
             bias=False, dispatch=dispatch_way, capacity_factor=5.0,
             eval_capacity_factor=5.0)
  y_BLD, report, _ = run(c)
  p = parameters(c.with_part(MoEConfig, dispatch='auto'))['params']
  x = np.random.default_rng(1).normal(size=(B, L, D)).astype(np.float32)
  score = np.exp(x @ p['router'])
  gate = score * (np.argsort(np.argsort(-score)) < 2)
  assert gate[..., :3].any() and gate[..., 3:].any()
  silu, x = lambda a: a / (1 + np.exp(-a)), x @ p['latent_down']
  networks = [(silu(x @ p['gate'][e]) * (x @ p['up'][e])) @ p['down'][e]
              for e in range(3)]
  want = sum(g[..., None] * y for g, y in zip(
      np.moveaxis(gate / gate.sum(-1, keepdims=True), -1, 0),
      [*networks, x, x]))
  assert_close(y_BLD, want @ p['latent_up'])
  assert report.health['dropped'] == 0 and report.health['load_E'].size == 5


def test_a_router_reads_the_state_of_the_one_before():
  """By hand, with an expert that is a skip."""
  c = config(num_experts=2, top_k=1, router='softmax_bias', router_dim=5,
             zero_experts=1, zero_experts_skip=True)
  before = np.random.default_rng(2).normal(size=(B, L, 5)).astype(np.float32)
  p = jax.tree.map(lambda x: 6 * np.asarray(x), parameters(c)['params'])
  p['router_bias'] = np.zeros(3, np.float32)
  x = np.random.default_rng(1).normal(size=(B, L, D)).astype(np.float32)
  ctx = Context(jnp.arange(L)[None], keep_layers=True,
                shared=SharedArrays(router_BLU=jnp.asarray(before)))
  y_BLD, report = jax.jit(MoE(c).apply)({'params': p}, x, ctx)
  state = x @ p['router_down'] + p['router_down_bias'] + (
      p['router_factor'] * before)
  gelu = lambda z: z * stats.norm.cdf(z)
  z = state / np.sqrt(np.square(state).mean(-1, keepdims=True) + c.norm_eps)
  z = z * p['router_norm']
  for name in ('router_hidden_1', 'router_hidden_2'):
    z = gelu(z @ p[name] + p[f'{name}_bias'])
  score = np.exp(z @ p['router'])
  probabilities = score / score.sum(-1, keepdims=True)
  assert_close((report.router_BLU, report.experts['probabilities']),
               (state, probabilities))
  skips = probabilities.argmax(-1) == 2
  np.testing.assert_array_equal(skips, ~np.any(y_BLD, -1))
  assert skips.any() and not skips.all()


@pytest.mark.slow
def test_one_expert_is_the_dense_network_and_shared_ones_add_to_it():
  kind = 'swiglu_clamped'
  c = config(num_experts=1, top_k=1, ffn=kind, shared_experts=2,
             shared_gate=True)
  x_BLD = np.full((B, L, D), 0.3, np.float32)
  ctx = Context(jnp.arange(L)[None])
  params = parameters(c)['params']
  assert params['shared']['up'].shape == (D, 2 * F)

  @jax.jit
  def each(params):
    expert = {name: params[name][0] for name in
              ('up', 'up_bias', 'gate', 'gate_bias', 'down', 'down_bias')}
    shared = layers.FFN(c, kind, width=2 * F)
    return [module.apply({'params': p}, x_BLD, ctx)[0] for module, p in (
        (MoE(c), params), (layers.FFN(c, kind), expert),
        (shared, params['shared']))]

  got_BLD, want_BLD, shared_BLD = map(np.asarray, each(params))
  gate_BLU = 1 / (1 + np.exp(-x_BLD @ np.asarray(params['shared_gate'])))
  assert gate_BLU.shape == (B, L, 1) and abs(gate_BLU - 0.5).min() > 0.01
  assert_close(got_BLD, want_BLD + gate_BLU * shared_BLD)


def test_the_noise_of_a_routers_logits_is_normal(monkeypatch):
  c = config(logit_noise=0.3)
  params, seen, report = parameters(c), [], routing.report_routing
  def keep(*args, logits_TE, **others):
    seen.append(logits_TE)
    return report(*args, logits_TE=logits_TE, **others)
  monkeypatch.setattr(routing, 'report_routing', keep)
  x_BLD = jax.random.normal(jax.random.key(1), (16, L, D))

  @functools.partial(jax.jit, static_argnums=0)
  def logits(deterministic):
    MoE(c).apply(params, x_BLD, Context(
        jnp.arange(L)[None], deterministic=deterministic),
                 rngs={'router': jax.random.key(0)})
    return seen.pop()

  z = (np.asarray(logits(False)) - np.asarray(logits(True))).ravel() / 0.3
  assert stats.kstest(z, 'norm').pvalue > 1e-3


ROWS = ([5, 0, 40], [0, 0, 0], [64, 0, 0], [1, 62, 1])


def grouped_case(counts, rows=64):
  random, n = np.random.default_rng(0), len(counts)
  normal = lambda *shape: random.normal(size=shape).astype(np.float32)
  w = dispatch.ExpertWeights(normal(n, D, F), normal(n, F, D), normal(n, D, F),
                             normal(n, F), normal(n, F), normal(n, D))
  inside_R1 = (np.arange(rows) < sum(counts))[:, None]
  mask_RF = np.float32((random.random((rows, F)) < 0.8) / 0.8)
  return normal(rows, D), w, mask_RF, normal(rows, D) * inside_R1


def test_text_is_written_without_a_capacity():
  """So that a row's text depends on no other's; what has none stays."""
  c = architectures.resolve(models.small_config('mixtral', moe=dict(
      dispatch='sorted', capacity_factor=1.0, eval_capacity_factor=1.0,
      group_size=8)))
  moe = without_capacity(c).find_part(MoEConfig)
  assert moe.dispatch == 'dropless'
  assert moe.eval_capacity_factor == moe.group_size == 0
  dense = architectures.resolve(models.small_config('llama'))
  assert without_capacity(dense) is dense


@pytest.mark.parametrize('D', [64, 128, 300, 1024])
def test_hidden_units_are_computed_in_as_few_parts_as_may_be(D):
  """By search: no wider than a row, a multiple of 128 wide; or all at once."""
  for F in (64, 128, 384, 512, 1000, 1024, 1152, 2816, 8192):
    fit = [n for n in range(1, F + 1)
           if F % n == 0 and F // n <= D and F // n % 128 == 0]
    assert grouped._num_slices_of_hidden_units(D, F) == min(fit, default=1)


@pytest.mark.slow
def test_grouped_product_equals_a_loop_over_experts(monkeypatch):
  """Gates, and hidden units that are made again in parts, included."""
  monkeypatch.setattr(grouped, '_num_slices_of_hidden_units', lambda D, F: 2)
  even = 8

  @functools.partial(jax.jit, static_argnums=0)
  def blocks(again, count_E, x_RD, gate_R, w, mask_RF, d_RD):
    def loss(x_RD, gate_R, w):
      how = grouped.GroupedSettings(SWIGLU, even, 'xla', again)
      y_RD = grouped.grouped_ffn(x_RD, count_E, gate_R, w, mask_RF, how)
      return (y_RD * d_RD).sum()
    return jax.value_and_grad(loss, (0, 1, 2))(x_RD, gate_R, w)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def whole(product, again, count_E, x_RD, gate_R, w, mask_RF, d_RD):
    y_RD, pre = grouped._forward_at_once(
        product, SWIGLU, again, x_RD, count_E, w, mask_RF)
    return (gate_R[:, None] * y_RD * d_RD).sum(), grouped._backward_at_once(
        product, SWIGLU, x_RD, count_E, gate_R, w, mask_RF,
        None if again else pre, d_RD)

  ragged = functools.partial(
      whole, grouped.grouped_product_of_kernel('xla', even), False)
  megablox = functools.partial(
      whole, functools.partial(grouped.megablox_product, even, True), True)

  @jax.jit
  def loop(count_E, x_RD, gate_R, w, mask_RF, d_RD):
    expert_R = jnp.searchsorted(jnp.cumsum(count_E), jnp.arange(len(x_RD)),
                                side='right')
    def loss(x_RD, gate_R, w):
      total = 0.0
      for e in range(len(count_E)):  # each of all rows, of which it has some
        expert = jax.tree.map(lambda m, e=e: m[e:e + 1], w)
        (y_RD,) = dispatch.batched_ffn(
            x_RD[None], expert, SWIGLU, mask_RF[None])
        total += ((expert_R == e) * gate_R * (y_RD * d_RD).sum(1)).sum()
      return total
    return jax.value_and_grad(loss, (0, 1, 2))(x_RD, gate_R, w)

  gate_R = np.linspace(0, 1, 64, dtype=np.float32)
  for counts in ROWS:
    x_RD, w, mask_RF, d_RD = grouped_case(counts)
    args = np.int32(counts), x_RD, gate_R, w, mask_RF, d_RD
    want = loop(*args)
    for way in (functools.partial(blocks, False), functools.partial(
        blocks, True), ragged, megablox):
      assert_close(way(*args), want)


@pytest.mark.slow
def test_the_router_multiplies_float32_whatever_the_model_does():
  """By its z-loss, against numpy; and on a TPU, in all the digits."""
  c = config(dtype='bfloat16')
  module, ctx = MoE(c), Context(jnp.arange(L)[None])
  x_BLD = jax.random.normal(jax.random.key(0), (B, L, D)).astype(jnp.bfloat16)
  params = parameters(config())  # with digits that bfloat16 has not got
  router_DE = np.array(params['params']['router'], np.float64)
  logits_TE = np.array(x_BLD, np.float64).reshape(-1, D) @ router_DE
  z = (np.log(np.exp(logits_TE).sum(-1)) ** 2).mean()
  def loss(params, x_BLD):
    health = module.apply(params, x_BLD, ctx)[1].health
    return health['z_loss'], health
  got, _ = jax.jit(loss)(params, x_BLD)
  np.testing.assert_allclose(got, z, rtol=1e-5)
  text = jax.jit(loss).trace(params, x_BLD).lower(
      lowering_platforms=('tpu',)).as_text()
  router = [line for line in text.splitlines() if 'dot_general' in line
            and f'tensor<{B * L}x{D}xf32>, tensor<{D}x{E}xf32>' in line]
  assert len(router) == 1 and 'precision = [HIGHEST, HIGHEST]' in router[0]


@pytest.mark.slow
@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_accelerators_get_a_ragged_product(platform):
  x_RD, w, _, _ = grouped_case([5, 0, 40])
  step = jax.jit(jax.grad(lambda x, w: grouped.grouped_ffn(
      x, jnp.array([5, 0, 40]), jnp.ones(len(x)), w, None,
      grouped.GroupedSettings(SWIGLU, 16, 'xla')).sum(), (0, 1)))
  lower = lambda name: step.trace(x_RD, w).lower(
      lowering_platforms=(name,)).as_text()
  text = lower(platform)
  assert text.count('ragged_dot') >= 9
  assert 'dynamic_update_slice' not in text
  assert 'dynamic_update_slice' in lower('cpu')


@pytest.mark.parametrize('even_rows, rows, tile', [
    (1024, 2048, 512), (1023, 2048, 256), (1024, 768, 256), (512, 768, 256),
    (511, 768, 128), (1024, 640, 128), (10, 640, 128)])
def test_an_expert_of_even_load_fills_two_tiles(even_rows, rows, tile):
  for dtype, side in (('bfloat16', 640), ('float32', 384)):
    sides = grouped._tile_sides(even_rows, rows, inputs=300, outputs=1100,
                                dtype=dtype)
    assert sides == (tile, 300, side)


COUNTS = {  # of 300 rows, in tiles of 128 and by the even load of 256
    'uneven': [5, 0, 129, 90], 'none': [0, 0, 0, 0], 'all': [0, 300, 0, 0],
    'edges': [128, 0, 128, 1]}


@pytest.mark.slow
def test_the_product_equals_a_loop_over_experts(monkeypatch):
  """Whatever void rows hold, and with sides that tiles do not divide."""
  monkeypatch.setitem(grouped.LONGEST_SIDE_OF_A_TILE, 'float32', 128)
  R, K, N, random = 300, 200, 130, np.random.default_rng(0)
  x_RK, m_EKN, dy_RN = (random.normal(size=shape).astype(np.float32)
                        for shape in ((R, K), (4, K, N), (R, N)))

  @jax.jit
  def product(x_RK, m_EKN, dy_RN, count_E):
    y_RN, vjp = jax.vjp(
        lambda x, m: grouped.megablox_product(256, True, x, m, count_E),
        x_RK, m_EKN)
    return y_RN, *vjp(dy_RN)

  for name, counts in COUNTS.items():
    want = tuple(map(np.zeros_like, (dy_RN, x_RK, m_EKN)))
    for e, end in enumerate(np.cumsum(counts)):
      at = slice(end - counts[e], end)
      want[0][at] = x_RK[at] @ m_EKN[e]
      want[1][at] = dy_RN[at] @ m_EKN[e].T
      want[2][e] = x_RK[at].T @ dy_RN[at]
    inside_R1 = (np.arange(R) < sum(counts))[:, None]
    void = lambda x, inside_R1=inside_R1: np.where(inside_R1, x, np.nan)
    for a, b in zip(product(void(x_RK), m_EKN, void(dy_RN),
                            np.array(counts, np.int32)), want):
      np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max()),
                                 err_msg=name)


def test_a_kernel_of_another_platform_is_refused_but_not_for_parameters():
  """So that a program can be compiled for devices that are not here."""
  module = architectures.build(models.small_config(
      'mixtral', moe=dict(grouped_kernel='megablox')))
  tokens = models.random_tokens(1, 1)
  params = jax.eval_shape(module.init, jax.random.key(0), tokens)
  with pytest.raises(ValueError, match='runs on tpu, and this program is for'):
    jax.eval_shape(module.apply, params, tokens)


@pytest.mark.slow
@pytest.mark.plan
@pytest.mark.parametrize('chips, sizes', [
    ('v5e:2x4', dict(data=2, expert=2, tensor=2)), ('v5p:2x2x1', dict())],
                         ids=['v5e', 'v5p-alone'])
def test_auto_is_megablox_in_a_tpu_program(chips, sizes):
  """Of 3 products, 3 kernels forward and 6 backward; of other sides too."""
  size = int(np.prod(list(sizes.values()), dtype=int))
  mesh = kernels_test._mesh(kernels_test.tpus(chips)[:size], **sizes)
  program = functools.partial(
      kernels_test.lowered, 'mixtral', mesh, attention_kernel='xla',
      dtype='bfloat16', d_ff=200)
  kernel, xla = program(), program(moe=dict(grouped_kernel='xla'))
  assert xla.as_text().count('ragged_dot') >= 9
  assert 'ragged_dot' not in kernel.as_text()
  calls = kernel.compile().as_text().count(
      'custom_call_target="tpu_custom_call"')
  assert calls == 9


EXPERTS, RATE, STEPS = 4, 0.08, 12


def _config(**train):
  c = step_test.config()
  c.model.update(ffn='moe', num_layers=4, pattern='table,bias', kinds=dict(
      table=dict(router='hash_scored'), bias={}))
  c.model.moe.update(num_experts=EXPERTS, top_k=1, d_ff=16, router='sigmoid',
                     balance_loss='none', bias_rate=RATE)
  c.optim.lr = 1e-9  # nothing but the bias moves
  c.train.update(train)
  return c


def _biases(params, block=1, name='router_bias'):
  """[N, E], layers in order."""
  return np.asarray(params['decoder']['layers'][f'block_{block}']['ffn'][name])


@pytest.mark.slow
def test_the_bias_moves_against_the_load_and_evens_it_out():
  c = _config(grad_accumulation=2)
  run = runs.build(c, architectures.resolve(c.model),
                   mesh=step_test.one_device_mesh())
  params = jax.tree.map(np.array,
                        models.draw_parameters(run.abstract_state.params))
  # It begins collapsed: expert 0 is every token's, in both layers.
  _biases(params)[:] = 1.0, 0, 0, 0
  _biases(params, 0, 'experts_of')[:] = 2
  with run.context():
    state = step_test.start(run, params)
    step = jax.jit(make_train_step(run.module, run.tx, c))
    biases, loads = [_biases(state.params)], []
    for n in range(STEPS):
      batch = devices.put_on_devices(step_test.batch(n), run.batch_sharding)
      state, metrics = step(state, batch)
      biases.append(_biases(state.params))
      load_NE = np.asarray(metrics['health/load_E'])
      np.testing.assert_array_equal(load_NE[::2], [[0, 0, 1, 0]] * 2)
      loads.append(load_NE[1::2])
  assert (_biases(state.params, 0, 'experts_of') == 2).all()
  for before, after, load_NE in zip(biases, biases[1:], loads):
    np.testing.assert_allclose(
        after - before, RATE * np.sign(1 / EXPERTS - load_NE), atol=1e-6)
  load_SN = EXPERTS * np.max(loads, -1)
  assert (load_SN[0] > 3.9).all()
  assert (load_SN[-5:].mean(0) < 2).all(), load_SN
  assert not np.allclose(loads[-1][0], loads[-1][1])  # each layer by its own
