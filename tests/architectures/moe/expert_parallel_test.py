"""Experts over a mesh: the same numbers as one device, by all-to-all alone."""

import collections
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

import architectures
from architectures.parts import layers, sharding
from architectures.parts.context import Context
from architectures.parts.moe import dispatch
from architectures.parts.moe.layer import MoE
from architectures.parts.moe.routing import MoEConfig, Routing
from configs import base, sharding as tables
from tests.helpers import models
from tools.plan.collectives import parse_groups

B, L, D, F, E, X = 8, 8, 16, 32, 8, 2
BATCH = ('data', 'fsdp', 'expert')


def config(**moe):
  fields = base.base().model
  fields.arch = 'bert'  # in a decoder experts may not choose
  fields.update(d_model=D, d_ff=F, num_heads=2, num_layers=1, vocab_size=11,
                max_len=L, ffn='moe')
  fields.moe.update(dict(num_experts=E, top_k=X) | moe)
  return architectures.resolve(fields)


def mesh_of(shape):
  return jax.make_mesh(tuple(shape.values()), tuple(shape),
                       axis_types=(AxisType.Auto,) * len(shape))


def expected_rows(shape, way: str) -> tuple[int, float]:
  """(A device's tokens, rows of its buffer a token), by the formula in
  parts/dispatch.py."""
  n = shape['expert']
  tokens = B * L // math.prod(shape[a] for a in (*BATCH, 'context'))
  slots = min(tokens, B * L * X // E)
  return tokens, (n * min(X, E // n) if way == 'dropless'
                  else E * slots / tokens)


def setup(c, length=L):
  """Returns (loss(params, x) -> (loss, report), params, x, their specs)."""
  module, key = MoE(c), jax.random.key(0)
  at_B1, at_L = np.ogrid[:B, :length]
  ctx = Context(jnp.arange(length)[None], deterministic=False,
                segment_ids_BL=np.int32((at_B1 != 3) | (at_L < 5)))
  x_BLD = np.random.default_rng(1).normal(size=(B, length, D)).astype(
      np.float32)
  rngs = {name: key for name in ('params', 'router', 'dropout')}
  boxed = jax.eval_shape(lambda: module.init(rngs, x_BLD, ctx))
  params = models.draw_parameters(nn.meta.unbox(boxed))

  def loss(params, x_BLD):
    y_BLD, report = module.apply(params, x_BLD, ctx, rngs=rngs)
    wave = jnp.cos(jnp.arange(D, dtype=jnp.float32))[None, None]
    return (y_BLD * wave).sum() + sum(report.losses.values()), report

  return loss, params, x_BLD, nn.get_partition_spec(boxed)


def compile_on(shape, c):
  """Returns (compiled value and gradients, its arguments on the mesh)."""
  loss, params, x_BLD, logical = setup(c)
  mesh = mesh_of(shape)
  with jax.set_mesh(mesh), sharding.install_rules(
      tables.RULES['default']):
    specs = nn.logical_to_mesh(logical)
    put = lambda x, spec: jax.device_put(
        np.asarray(x), NamedSharding(mesh, spec))
    even = B % math.prod(shape[a] for a in BATCH) == 0
    args = (jax.tree.map(put, params, specs),
            put(x_BLD, PartitionSpec(BATCH if even else None)))
    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    return step.lower(*args).compile(), args


def one_device(c):
  loss, params, x_BLD, _ = setup(c)
  return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x_BLD)


def assert_equal(got, want, shards):
  """Losses, gradients and the panel; only shard_imbalance tells the mesh."""
  (loss, report), grads = got
  (want_loss, want_report), want_grads = want
  np.testing.assert_allclose(loss, want_loss, rtol=2e-5)
  load_E = np.array(want_report.health['load_E'])
  want_report = want_report.replace(health=want_report.health | {
      'shard_imbalance': shards * load_E[:E].reshape(shards, -1).sum(1).max()})
  for a, b in zip(jax.tree.leaves((report, grads)),
                  jax.tree.leaves((want_report, want_grads)), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * np.abs(b).max())


COMMON = dict(capacity_factor=1.0, eval_capacity_factor=1.0, expert_dropout=0.1,
              z_loss_weight=0.1)


@pytest.fixture(scope='module')
def reference():
  want = one_device(config(dispatch='sorted', **COMMON))
  assert want[0][1].health['dropped'] > 0  # so that drops are compared too
  return want


def collectives(hlo: str, kind: str):
  """Yields ({dtype: elements}, groups of devices) of each one in the text."""
  for line in hlo.splitlines():
    match = re.search(rf' = (.*?) {kind}(?:-start)?\(', line)
    if not match:
      continue
    sizes = collections.Counter()
    for dtype, shape in re.findall(r'(\w+)\[([\d,]*)\]', match[1]):
      sizes[dtype] += math.prod(int(d) for d in shape.split(',') if d)
    yield sizes, parse_groups(line)


def along(members: np.ndarray, shape: dict, axis: str) -> bool:
  """Whether devices of one group differ along a mesh axis."""
  place = np.unravel_index(members, tuple(shape.values()))[
      list(shape).index(axis)]
  return bool((place != place[:, :1]).any())


def crossed(hlo: str, shape: dict, dense: int = D * E):
  """[{dtype: elements}] of each all-to-all along `expert`. Asserts that neither
  activations nor experts' weights are gathered along it: counts, for the
  capacity, are, and other weights, of `dense` elements at most."""
  for sizes, members in collectives(hlo, 'all-gather'):
    assert (set(sizes) <= {'s32', 'u32'} or sizes.total() <= dense
            or not along(members, shape, 'expert'))
  return [sizes for sizes, members in collectives(hlo, 'all-to-all')
          if along(members, shape, 'expert')]


@pytest.mark.slow
@pytest.mark.parametrize('preset, way', [
    ('ep_fsdp_tp', 'dropless'), *(
        pytest.param(preset, 'sorted', marks=pytest.mark.long)
        for preset in ('ep', 'ep_fsdp_tp'))])
def test_equals_one_device_by_all_to_all(preset, way, reference):
  shape = tables.PRESETS[preset]
  step, args = compile_on(shape, config(dispatch=way, **COMMON))
  assert_equal(step(*args), reference, shape['expert'])
  crossings = crossed(step.as_text(), shape)
  if shape['expert'] == 1:
    assert not crossings
    return
  tokens, rows = expected_rows(shape, way)
  floats = [sizes['f32'] for sizes in crossings if sizes['f32']]
  # Rows four times, and their gates there and back.
  assert sorted(floats) == [rows * tokens] * 2 * (way == 'dropless') + [
      rows * tokens * D] * 4
  whole = [sizes['s32'] for sizes in crossings if sizes['s32']]
  assert sorted(whole) == sorted(
      [rows * tokens] + ([E] if way == 'dropless' else []))


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    dict(router='expert_choice', group_size=8),
    pytest.param(dict(router='gshard', capacity_factor=1.0, group_size=32),
                 marks=pytest.mark.long),
    pytest.param(dict(router='sigmoid', balance_loss='importance',
                      balance_weight=0.1, expert_groups=4, top_groups=2,
                      gate_scale=2.5), marks=pytest.mark.long)],
                         ids=lambda fields: fields['router'])
def test_routers_route_alike_on_a_mesh(fields):
  fields = fields | dict(jitter=0.1, logit_noise=0.1)
  step, args = compile_on(tables.PRESETS['ep'], config(**fields))
  assert_equal(step(*args), one_device(config(**fields)), 4)
  crossings = crossed(step.as_text(), tables.PRESETS['ep'])
  # Rows of D numbers; where tokens choose, gates cross too, one of a row.
  assert len([sizes for sizes in crossings
              if sizes['f32'] > B * L]) == 4


@pytest.mark.slow
def test_a_latent_space_and_zero_experts_equal_one_device():
  c, shape = config(router='softmax_bias', zero_experts=4, latent_dim=8
                    ), tables.PRESETS['ep_fsdp_tp']
  step, args = compile_on(shape, c)
  assert_equal(step(*args), one_device(c), shape['expert'])


@pytest.mark.slow
@pytest.mark.parametrize('remat, times', [
    ('full', 5 + 3), pytest.param('none', 4 + 2, marks=pytest.mark.long),
    pytest.param('dots', 5 + 3, marks=pytest.mark.long)])
def test_accelerators_send_only_full_rows(remat, times):
  """Rows and, as often but for the way back, their gates."""
  loss, params, x_BLD, _ = setup(config())
  apply = lambda p, x: loss(p, x)[0]
  if remat != 'none':
    apply = jax.checkpoint(apply, policy=layers.remat_policy(
        models.make_model('mixtral', remat=remat)[0].config))
  with jax.set_mesh(mesh_of(tables.PRESETS['ep'])), sharding.install_rules(
      tables.RULES['default']):
    traced = jax.jit(jax.grad(apply, (0, 1))).trace(params, x_BLD)
    lower = lambda name: traced.lower(lowering_platforms=(name,)).as_text()
    primitives = [eqn.primitive.name
                  for eqn in models.list_equations(traced.jaxpr.jaxpr)]
    assert primitives.count('ragged_all_to_all') == times
    ragged = {name: set(re.findall(
        r'ragged_all_to_all.*: \(tensor<(\w+)>', lower(name)))
              for name in ('cuda', 'tpu', 'cpu')}
  # TPU would pad a number for each row to 128: there all gates cross.
  assert ragged == {'cuda': {f'64x{D}xf32', '64xf32'}, 'tpu': {f'64x{D}xf32'},
                    'cpu': set()}


def ragged_by_gather(operand, output, input_offsets, send_sizes,
                     output_offsets, recv_sizes, *, axis_name):
  """What jax.lax.ragged_all_to_all is documented to do, which CPU cannot."""
  me = jax.lax.axis_index(axis_name)
  sent_n, first_n, size_n, to_n = jax.lax.all_gather(
      (operand, input_offsets, send_sizes, output_offsets), axis_name)
  row_R = jnp.arange(output.shape[0])
  for sent, first, size, to in zip(sent_n, first_n[:, me], size_n[:, me],
                                   to_n[:, me]):
    inside_R = (row_R >= to) & (row_R < to + size)
    new = sent.at[first + row_R - to].get(mode='clip')
    inside = inside_R.reshape(-1, *(1,) * (new.ndim - 1))
    output = jnp.where(inside, new, output)
  wrong = (recv_sizes != size_n[:, me]).any()
  return jnp.where(wrong, jnp.full_like(output, -2 ** 30), output)


@pytest.mark.slow
def test_accelerators_exchange_equals_one_device(reference, monkeypatch):
  """The program of TPU and GPU, values and gradients."""
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', ragged_by_gather)
  monkeypatch.setattr(jax.lax, 'platform_dependent',
                      lambda *args, default, **_: default(*args))
  step, args = compile_on(tables.PRESETS['ep'],
                          config(dispatch='dropless', **COMMON))
  assert all(set(sizes) == {'s32'} for sizes, _ in collectives(
      step.as_text(), 'all-to-all'))  # counts alone: the rest is emulated
  assert_equal(step(*args), reference, 4)


# Where experts are computed: the sums and the refusals, without a mesh.


def moe(**fields):
  return config(**fields).part(MoEConfig)


@pytest.mark.parametrize('fields, factor, way', [
    (dict(), 1.0, 'sorted'),
    (dict(), 1.5, 'sorted'),  # 192 rows for 128 assignments
    (dict(), 2.5, 'dropless'),  # 320
    (dict(), 0.0, 'dropless'),
    (dict(num_experts=2), 0.0, 'dropless'),  # few, but no capacity
    (dict(router='expert_choice'), 0.0, 'sorted')])
def test_the_way_of_auto_pads_little(fields, factor, way):
  assert dispatch.choose_dispatch(moe(**fields), factor, 64, 4, 1) == way


def test_groups_are_whole_on_shards_or_shards_in_groups():
  for count, shards in ((1, 8), (2, 4), (8, 4)):
    dispatch._check_routing_groups(64, count, shards, experts_choose=False)
  with pytest.raises(ValueError, match='do not fit on 4 shards'):
    dispatch._check_routing_groups(64, 2, 4, experts_choose=True)


def test_zero_experts_have_a_share_of_the_room():
  """Of 32 choices among 4 experts and 4 that return what they read, an even
  load is 4 each."""
  moe = MoEConfig(num_experts=4, zero_experts=4, top_k=2)
  assert dispatch.slots_of_expert(moe, 1.0, 16, groups=1, shards=1) == 4
  routed = Routing(
      expert_A=jnp.zeros(32, jnp.int32), gate_A=jnp.ones(32),
      token_A=jnp.arange(32) // 2, probs_TE=jnp.ones((16, 4)), choices=2)
  routed = dispatch._void_choices_over_capacity(
      moe, factor=1.0, tokens=16, groups=1, axes=dispatch.MixtureAxes(), T=16,
      routed=routed)
  assert (routed.expert_A < 4).tolist() == [True, False] * 4 + [False] * 24


def test_dropout_of_hidden_units_keeps_their_mean():
  dropout = dispatch.ExpertDropout(seed=jnp.uint32(7), rate=0.25)
  mask_PF = np.asarray(dropout.mask(jnp.arange(300), 200))
  np.testing.assert_allclose(np.unique(mask_PF), [0, 4 / 3], rtol=1e-6)
  for axis in 0, 1:  # each row and each unit has draws of its own
    np.testing.assert_allclose(mask_PF.mean(axis).mean(), 1, atol=0.02)
    assert mask_PF.mean(axis).std() < 0.07
