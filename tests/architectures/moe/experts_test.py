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

import architectures
from architectures.parts import layers
from architectures.parts.config import Context
from architectures.parts.moe import dispatch, grouped
from architectures.parts.moe.layer import MoE
from configs import base
from tests.architectures.attention import kernels_test
from tests.training import step_test
from training import runs
from training.distributed import devices
from training.runs import make_train_step


B, L, D, F, E = 2, 16, 8, 12, 4
SWIGLU = layers.Hidden('swiglu')


def config(*, dtype='float32', bias=True, d_model=D, **moe):
  fields = base.base().model
  fields.arch = 'bert'  # in a decoder experts may not choose
  fields.update(d_model=d_model, d_ff=F, num_heads=1, vocab_size=9, max_len=L,
                ffn='moe', dtype=dtype, ffn_bias=bias)
  fields.moe.update(dict(num_experts=E) | moe)
  return architectures.resolve(fields)


def run(c, train=True, length=L, **context):
  """Returns (y_BLD, aux, gradients of the parameters and of x)."""
  module, key = MoE(c), jax.random.key(0)
  ctx = Context(jnp.arange(length)[None], deterministic=not train, **context)
  x_BLD = jax.random.normal(key, (B, length, c.d_model))
  rngs = {name: key for name in ('params', 'router', 'dropout')}
  born = jax.jit(lambda rngs, x_BLD: module.init(rngs, x_BLD, ctx))
  params = jax.tree.map(lambda p: 20 * p + 0.1,
                        nn.meta.unbox(born(rngs, x_BLD)))
  wave = jnp.cos(jnp.arange(c.d_model, dtype=jnp.float32))[None, None]

  def loss(params, x_BLD):
    y_BLD, aux = module.apply(params, x_BLD, ctx, rngs=rngs)
    return (y_BLD * wave).sum(), (y_BLD, aux)

  grads, (y_BLD, aux) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(
      params, x_BLD)
  return y_BLD, aux, grads


def assert_close(got, want, tolerance=2e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.array(a, np.float32), np.array(b, np.float32)
    np.testing.assert_allclose(a, b, atol=tolerance * (1e-3 + np.abs(b).max()))


def by_einsum(x_TD, r, run, slots):
  """Dispatches by the masks of GShard's paper, [T, E, C], all in float32."""
  T, num_experts = x_TD.shape[0], r.probs_TE.shape[1]
  hot, slot_A = jax.nn.one_hot, dispatch.ranks(r.expert_A, num_experts + 1)
  hot_AEC = (hot(r.expert_A, num_experts)[:, :, None]
             * hot(slot_A, slots)[:, None])
  hot_AT = hot(r.token_A, T)
  dispatch_TEC = jnp.einsum('AT,AEC->TEC', hot_AT, hot_AEC)
  combine_TEC = jnp.einsum('AT,AEC->TEC', hot_AT,
                           hot_AEC * r.gate_A[:, None, None])
  id_EC = jnp.einsum('AEC,A->EC', hot_AEC.astype(jnp.int32),
                     run.ids(jnp.arange(slot_A.shape[0])))
  rows_ECD = jnp.einsum('TEC,TD->ECD', dispatch_TEC, x_TD.astype(jnp.float32))
  y_ECD = run.padded(rows_ECD.astype(x_TD.dtype), id_EC).astype(jnp.float32)
  return jnp.einsum('TEC,ECD->TD', combine_TEC, y_ECD).astype(x_TD.dtype)


def oracle(c, **context):
  """What `run` returns where tokens are dispatched by einsum."""
  with mock.patch.dict(dispatch.WAYS, dropless=by_einsum):
    return run(dataclasses.replace(
        c, moe=dataclasses.replace(c.moe, dispatch='dropless')), **context)


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    dict(ffn='swiglu_clamped', expert_dropout=0.2, capacity_factor=0.75,
         eval_capacity_factor=0.75, logit_bias=True, gate_scale=2.5,
         num_experts=8, expert_groups=4, top_groups=2),
    dict(ffn='gelu', bias=False, group_size=16, capacity_factor=8.0,
         eval_capacity_factor=8.0),
    dict(router='expert_choice', top_k=1, group_size=16)],
                         ids=['gated', 'grouped', 'expert_choice'])
def test_each_way_is_the_sum_over_all_experts(fields):
  """With padding, which takes no expert and is dropped from the rest."""
  ids = jnp.ones((B, L), int).at[:, L // 2:].set(0)
  want = oracle(config(**fields), segment_ids_BL=ids)
  assert (want[1]['health']['dropped'] > 0) == ('expert_dropout' in fields)
  assert not want[0][:, L // 2:].any() and want[0][:, :L // 2].any()
  for way in ('sorted', 'dropless'):
    assert_close(run(config(dispatch=way, **fields), segment_ids_BL=ids), want)


@pytest.mark.slow
def test_bfloat16_is_near_float32():
  want_BLD, _, want = run(config(), train=False)
  for way in ('sorted', 'dropless'):
    y_BLD, _, grads = run(config(dispatch=way, dtype='bfloat16',
                                 capacity_factor=E, eval_capacity_factor=E),
                          train=False)
    assert y_BLD.dtype == jnp.bfloat16
    assert_close(y_BLD, want_BLD, 0.03)
    assert_close(grads, want, 0.05)


@pytest.mark.slow
def test_one_expert_is_the_dense_network_and_shared_ones_add_to_it():
  kind = 'swiglu_clamped'
  c = config(num_experts=1, top_k=1, ffn=kind, shared_experts=2,
             shared_gate=True)
  x_BLD, ctx = jnp.ones((B, L, D)) * 0.3, Context(jnp.arange(L)[None])
  params = nn.meta.unbox(jax.jit(
      lambda: MoE(c).init(jax.random.key(0), x_BLD, ctx))())['params']
  assert params['shared']['up'].shape == (D, 2 * F)
  own = {name: params[name][0] for name in
         ('up', 'up_bias', 'gate', 'gate_bias', 'down', 'down_bias')}
  want_BLD = layers.FFN(c, kind).apply({'params': own}, x_BLD, ctx)[0]
  shared_BLD = layers.FFN(c, kind, width=2 * F).apply(
      {'params': params['shared']}, x_BLD, ctx)[0]
  gate_DU = params['shared_gate'] = 10 * params['shared_gate']
  gate_BLU = 1 / (1 + jnp.exp(-x_BLD @ gate_DU))
  assert gate_BLU.shape == (B, L, 1) and abs(gate_BLU - 0.5).min() > 0.01
  got_BLD = jax.jit(lambda: MoE(c).apply({'params': params}, x_BLD, ctx)[0])()
  assert_close(got_BLD, want_BLD + gate_BLU * shared_BLD)


ROWS = ([5, 0, 40], [0, 0, 0], [64, 0, 0], [1, 62, 1])


def grouped_case(counts, rows=64):
  keys = jax.random.split(jax.random.key(0), 9)
  normal = lambda i, *shape: jax.random.normal(keys[i], shape)
  n = len(counts)
  w = dispatch.Weights(
      normal(0, n, D, F), normal(1, n, F, D), normal(2, n, D, F),
      normal(3, n, F), normal(4, n, F), normal(5, n, D))
  inside_R1 = (jnp.arange(rows) < sum(counts))[:, None]
  mask_RF = jax.random.bernoulli(keys[8], 0.8, (rows, F)) / 0.8
  return (normal(6, rows, D), w, mask_RF, normal(7, rows, D) * inside_R1,
          inside_R1)


@pytest.mark.slow
@pytest.mark.parametrize('even', [8])
def test_grouped_product_equals_a_loop_over_experts(even, monkeypatch):
  """Gates, and hidden units that are made again in parts, included."""
  monkeypatch.setattr(grouped, '_parts', lambda D, F: 2)

  @functools.partial(jax.jit, static_argnums=0)
  def blocks(again, count_E, x_RD, gate_R, w, mask_RF, d_RD):
    def loss(x_RD, gate_R, w):
      how = grouped.How(SWIGLU, even, 'xla', again)
      y_RD = grouped.ffn(x_RD, count_E, gate_R, w, mask_RF, how)
      return (y_RD * d_RD).sum()
    return jax.value_and_grad(loss, (0, 1, 2))(x_RD, gate_R, w)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def whole(product, again, count_E, x_RD, gate_R, w, mask_RF, d_RD):
    y_RD, pre = grouped._whole_forward(product, SWIGLU, again, x_RD, count_E, w,
                                       mask_RF)
    return (gate_R[:, None] * y_RD * d_RD).sum(), grouped._whole_backward(
        product, SWIGLU, x_RD, count_E, gate_R, w, mask_RF,
        None if again else pre, d_RD)

  ragged = functools.partial(whole, grouped.product('xla', even))
  megablox = functools.partial(
      whole, functools.partial(grouped.megablox, even, True), True)

  def loop(counts, x_RD, gate_R, w, mask_RF, d_RD):
    def loss(x_RD, gate_R, w):
      total, start = 0.0, 0
      for e, n in enumerate(counts):
        own = jax.tree.map(lambda m, e=e: m[e:e + 1], w)
        at = slice(start, start + n)
        y_1RD = dispatch.batched(x_RD[None, at], own, SWIGLU,
                                mask_RF[None, at])
        y_RD = gate_R[at, None] * y_1RD[0]
        total, start = total + (y_RD * d_RD[at]).sum(), start + n
      return total
    return jax.value_and_grad(loss, (0, 1, 2))(x_RD, gate_R, w)

  gate_R = jax.random.uniform(jax.random.key(1), (64,))
  for counts in ROWS:
    x_RD, w, mask_RF, d_RD, _ = grouped_case(counts)
    args = x_RD, gate_R, w, mask_RF, d_RD
    want = loop(counts, *args)
    for way in (functools.partial(blocks, False), functools.partial(
        blocks, True), functools.partial(ragged, False), functools.partial(
            ragged, True), megablox):
      assert_close(way(jnp.array(counts), *args), want)


@pytest.mark.slow
def test_the_router_multiplies_float32_whatever_the_model_does():
  """By its z-loss, against numpy; and on a TPU, in all the digits."""
  c = config(dtype='bfloat16')
  module, ctx = MoE(c), Context(jnp.arange(L)[None])
  x_BLD = jax.random.normal(jax.random.key(0), (B, L, D)).astype(jnp.bfloat16)
  params = nn.meta.unbox(jax.jit(
      lambda: module.init(jax.random.key(1), x_BLD, ctx))())
  # Digits that bfloat16 has not got.
  params['params']['router'] = 40 * params['params']['router'] + 1
  router_DE = np.array(params['params']['router'], np.float64)
  logits_TE = np.array(x_BLD, np.float64).reshape(-1, D) @ router_DE
  z = (np.log(np.exp(logits_TE).sum(-1)) ** 2).mean()
  def loss(params, x_BLD):
    health = module.apply(params, x_BLD, ctx)[1]['health']
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
  x_RD, w, _, _, _ = grouped_case([5, 0, 40])
  step = jax.jit(jax.grad(lambda x, w: grouped.ffn(
      x, jnp.array([5, 0, 40]), jnp.ones(len(x)), w, None,
      grouped.How(SWIGLU, 16, 'xla')).sum(), (0, 1)))
  lower = lambda name: step.trace(x_RD, w).lower(
      lowering_platforms=(name,)).as_text()
  text = lower(platform)
  assert text.count('ragged_dot') >= 9
  assert 'dynamic_update_slice' not in text
  assert 'dynamic_update_slice' in lower('cpu')


COUNTS = {  # of 300 rows, in tiles of 128 and by the even load of 256
    'uneven': [5, 0, 129, 90], 'none': [0, 0, 0, 0], 'all': [0, 300, 0, 0],
    'edges': [128, 0, 128, 1]}


@pytest.mark.slow
@pytest.mark.parametrize('counts', COUNTS.values(), ids=list(COUNTS))
def test_the_product_equals_a_loop_over_experts(monkeypatch, counts):
  """Whatever void rows hold, and with sides that tiles do not divide."""
  monkeypatch.setitem(grouped.SIDE, 'float32', 128)
  R, K, N, E = 300, 200, 130, len(counts)
  keys = jax.random.split(jax.random.key(0), 3)
  x_RK, m_EKN, dy_RN = (jax.random.normal(key, shape) for key, shape in zip(
      keys, ((R, K), (E, K, N), (R, N))))
  inside_R1 = (jnp.arange(R) < sum(counts))[:, None]

  def loop(x_RK, m_EKN):
    ends = np.cumsum(counts)
    parts = [x_RK[end - n:end] @ m_KN
             for end, n, m_KN in zip(ends, counts, m_EKN)]
    return jnp.concatenate([*parts, jnp.zeros((R - ends[-1], N))])

  want_RN, vjp = jax.vjp(loop, x_RK, m_EKN)
  want = want_RN, *vjp(dy_RN)
  void = lambda x: jnp.where(inside_R1, x, jnp.nan)
  got_RN, vjp = jax.vjp(lambda x, m: grouped.megablox(
      256, True, x, m, jnp.array(counts, jnp.int32)), void(x_RK), m_EKN)
  for a, b in zip((got_RN, *vjp(void(dy_RN))), want):
    np.testing.assert_allclose(a, b, atol=1e-5 * (1 + float(jnp.abs(b).max())))


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


EXPERTS, RATE, STEPS = 4, 0.03, 30


def _config(**train):
  c = step_test.config()
  c.model.update(ffn='moe', num_layers=2)
  c.model.moe.update(num_experts=EXPERTS, top_k=1, d_ff=16, router='sigmoid',
                     balance_loss='none', bias_rate=RATE)
  c.optim.lr = 1e-9  # nothing but the bias moves
  c.train.update(train)
  return c


def _biases(params):
  """[N, E], layers in order."""
  return np.asarray(
      params['decoder']['layers']['block_0']['ffn']['router_bias'])


@pytest.mark.slow
def test_the_bias_moves_against_the_load_and_evens_it_out():
  c = _config(grad_accumulation=2)
  run = runs.build(c, architectures.resolve(c.model))
  with run.context():
    state = run.new_state()
    # It begins collapsed: expert 0 is every token's, in both layers.
    ffn = state.params['decoder']['layers']['block_0']['ffn']
    ffn['router_bias'] = jax.device_put(
        ffn['router_bias'].at[:, 0].set(0.6), ffn['router_bias'].sharding)
    step = jax.jit(make_train_step(run.module, run.tx, c))
    biases, loads = [_biases(state.params)], []
    for n in range(STEPS):
      batch = devices.put(step_test.batch(n), run.place)
      state, metrics = step(state, batch)
      biases.append(_biases(state.params))
      loads.append(np.asarray(metrics['health/load_E']))
  for before, after, load_NE in zip(biases, biases[1:], loads):
    np.testing.assert_allclose(
        after - before, RATE * np.sign(1 / EXPERTS - load_NE), atol=1e-6)
  load_SN = EXPERTS * np.max(loads, -1)
  assert (load_SN[0] > 3.9).all()
  assert (load_SN[-5:].mean(0) < 2).all(), load_SN
  assert not np.allclose(loads[-1][0], loads[-1][1])  # each layer by its own
