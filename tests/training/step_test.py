"""The training step: sharded = single, accumulation = whole, bad steps, its
figures, parameters in bfloat16, and the golden step against numpy."""

import functools
import re

from configs import base
from configs import sharding as tables
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import sharding
from tests.helpers import models
from tests.helpers.evaluations import one_device_mesh
from training import runs
from training.distributed import devices
from training.objectives import losses
from training.optim import optimizers
from training.runs import _accumulate_gradients, make_eval_step, make_train_step

LENGTH, BATCH = 16, 16


def config(**changes):
  c = base.base()
  c.model = models.small_config()
  c.model.update(num_heads=4)
  c.data.update(length=LENGTH, batch_size=BATCH)
  # Not Adam: it blows up the rounding of gradients that are zero (keys' bias).
  c.optim.update(name='sgd', lr=0.1, warmup_steps=0)
  c.train.steps = 10
  for name, value in changes.items():
    *section, field = name.split('__')
    at = c[section[0]] if section else c
    if isinstance(value, dict):
      at[field].update(value)
    else:
      at[field] = value
  return c


def batch(seed=0):
  tokens = np.asarray(models.random_tokens(BATCH, LENGTH + 1, seed))
  weights = np.ones((BATCH, LENGTH), np.float32)
  weights[:3, 5:] = 0
  return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=weights)


def start(run, params):
  """Returns a state before its first step, whose moments are zero: nothing is
  compiled."""
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), run.abstract_state)
  return jax.device_put(zeros.replace(params=jax.tree.map(np.array, params)),
                        run.shardings)


_STEPS = {}  # the compiled steps of `train`


def train(c, mesh=None, steps=2, batches=None, params=None):
  """Returns (run, state, [metrics]) after some steps, on the given mesh."""
  run = runs.build(c, architectures.resolve(c.model), mesh=mesh)
  with run.context():
    state = run.new_state() if params is None else start(run, params)
    step = _STEPS.setdefault((str(c), run.mesh), jax.jit(
        make_train_step(run.module, run.tx, c), donate_argnums=0))
    seen = []
    for n in range(steps):
      b = batches[n] if batches else batch(n)
      state, metrics = step(state,
                            devices.put_on_devices(b, run.batch_sharding))
      seen.append(jax.device_get(metrics))
  return run, jax.device_get(state), seen


@functools.cache
def begin():
  """The parameters that the runs of this file begin with."""
  return models.make_model()[1]


@pytest.fixture(scope='module')
def single():
  return train(config(), one_device_mesh(), params=begin())


@pytest.mark.parametrize('preset, rules', [
    pytest.param(name, 'default',
                 marks=[] if name == 'cp_fsdp_tp' else [pytest.mark.long])
    for name, shape in tables.PRESETS.items()
    if shape['expert'] == 1] + [
        pytest.param(name, 'replicated', marks=pytest.mark.long)
        for name in ('dp', 'fsdp_tp')])
def test_sharded_equals_single_device(preset, rules, single, capfd):
  shape = tables.PRESETS[preset]
  c = config(mesh__rules=rules)
  c.mesh.update(shape)
  run, state, metrics = train(c, params=begin())
  # XLA says so, where it compiles, if it had to gather what we meant to stay.
  assert 'Involuntary full rematerialization' not in capfd.readouterr().err
  models.assert_trees_close(single[1].params, state.params, rtol=1e-4)
  for a, b in zip(single[2], metrics, strict=True):
    models.assert_trees_close(a, b, rtol=1e-4)
  # And the state is born in shards.
  used = {axis for s in jax.tree.leaves(run.shardings.params)
          for axes in s.spec if axes
          for axis in ([axes] if isinstance(axes, str) else axes)}
  sharded = {a for a in ('fsdp', 'tensor') if shape[a] > 1}
  if rules == 'replicated':
    sharded.discard('fsdp')
  assert sharded <= used


@pytest.mark.slow
def test_a_micro_batch_counts_by_what_it_holds():
  """Targets, rows and tokens are spread unevenly over the micro-batches, from
  none to all, and figures and parameters are those of the whole batch all the
  same."""
  c, b = config(objective='mlm_nsp', data__mask_rate=0.4), batch(3)
  c.model = models.small_config('bert', dropout=0.0, num_layers=1)
  index_BL = np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH))
  seen = index_BL < 4 + np.arange(BATCH)[:, None] % 13
  b |= dict(
      types=(index_BL > 5).astype(np.int32), segment_ids=seen.astype(np.int32),
      weights=(seen & (index_BL % 3 == 0)).astype(np.float32),
      nsp_targets=np.arange(BATCH, dtype=np.int32) % 2)
  params = models.make_model('bert', dropout=0.0, num_layers=1)[1]
  _, whole, (metrics,) = train(c, one_device_mesh(), 1, [b], params)
  c.train.grad_accumulation = 4
  _, state, (parts,) = train(c, one_device_mesh(), 1, [b], params)
  assert metrics.keys() == parts.keys() and 'nsp_loss' in metrics
  for name in metrics:
    np.testing.assert_allclose(parts[name], metrics[name], rtol=1e-4,
                               atol=1e-6, err_msg=name)
  models.assert_trees_close(whole.params, state.params, rtol=1e-4)


@pytest.mark.slow
def test_evaluation_is_the_plain_loss():
  """Whatever is added to the loss in training: smoothing, the z-loss, the
  losses of experts, dropout."""
  c = config(train__z_loss=0.1, train__label_smoothing=0.2)
  c.model = models.small_config('mixtral', num_kv_heads=2, dropout=0.2,
                                moe=dict(
      num_experts=4, d_ff=24, balance_weight=1.0))
  run = runs.build(c, architectures.resolve(c.model), mesh=one_device_mesh())
  b = batch(0)
  judge = make_eval_step(run.module, c)
  with run.context():
    figures, logits = jax.jit(lambda params: (
        judge(params, b), models.logits(
            run.module, params, b['tokens'], valid_BL=b['weights'])))(
                models.draw_parameters(run.abstract_state.params))
  nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)),
                            b['targets'][..., None], -1)[..., 0]
  assert figures.keys() == {'loss', 'accuracy'}
  np.testing.assert_allclose(figures['loss'].weight, b['weights'].sum())
  np.testing.assert_allclose(figures['loss'].total, (nll * b['weights']).sum(),
                             rtol=1e-5)


@pytest.mark.slow
def test_golden_step(single):
  """One AdamW step from the gradient alone, by numpy (Loshchilov and Hutter
  2019, algorithm 2); the gradient by finite differences of the loss."""
  c = config(optim__name='adamw', optim__lr=1e-2)
  run = runs.build(c, architectures.resolve(c.model), mesh=one_device_mesh())
  with run.context():
    b, before = batch(0), jax.device_get(begin())
    @jax.jit
    @jax.value_and_grad
    def loss(params):
      logits = run.module.apply({'params': params}, b['tokens']).logits
      nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(
          logits, jnp.asarray(b['targets'])[..., None], -1)[..., 0]
      return (nll * b['weights']).sum() / b['weights'].sum()
    value, grads = jax.device_get(loss(before))
  np.testing.assert_allclose(single[2][0]['loss'], value, rtol=1e-5)
  norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(single[2][0]['grad_norm'], norm, rtol=1e-4)
  _, after, metrics = train(c, one_device_mesh(), steps=1, params=before)
  rate = metrics[0]['learning_rate']

  def check(path, p, g, new):
    name = jax.tree_util.keystr(path)
    decay = 0 if re.search('norm|bias|embed', name) else c.optim.weight_decay
    g = np.float64(g) * min(1.0, c.optim.clip_norm / norm)
    m, v = (1 - c.optim.b1) * g, (1 - c.optim.b2) * g ** 2
    direction = (m / (1 - c.optim.b1)) / (
        np.sqrt(v / (1 - c.optim.b2)) + c.optim.eps)
    expected = p - rate * (direction + decay * p)
    # Adam makes a step of what is rounding alone, such as the keys' bias.
    sure = np.abs(g) > 1e-6
    np.testing.assert_allclose(new[sure], expected[sure], rtol=1e-3, atol=1e-5,
                               err_msg=name)
    return sure.any()

  assert sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(
      check, before, grads, after.params))) > 10
  # The gradient itself, along a random direction.
  random = np.random.default_rng(5)
  d = jax.tree.map(
      lambda x: random.standard_normal(x.shape).astype(np.float32), before)
  h = 1e-3
  with run.context():
    up, down = [loss(jax.tree.map(lambda x, y, s=s: x + np.float32(s) * y,
                                  before, d))[0] for s in (h, -h)]
  slope = sum(np.vdot(x, y) for x, y in zip(
      jax.tree.leaves(grads), jax.tree.leaves(d), strict=True))
  np.testing.assert_allclose((up - down) / (2 * h), slope, rtol=2e-2)


def test_a_bad_step_changes_nothing_and_is_counted():
  bad = batch(1)
  bad['weights'] = np.full_like(bad['weights'], np.nan)
  _, state, metrics = train(config(), one_device_mesh(), 3,
                            [batch(0), bad, batch(0)], begin())
  assert [m['bad_steps'] for m in metrics] == [0, 1, 1]
  assert [m['bad_in_row'] for m in metrics] == [0, 1, 0]
  _, good, _ = train(config(), one_device_mesh(), 2, [batch(0)] * 2, begin())
  jax.tree.map(np.testing.assert_array_equal, state.params, good.params)
  assert state.step == 3 and good.step == 2


@pytest.mark.parametrize('changes, sentence', [
    (dict(data__batch_size=12), 'batch_size is 12, which the 8 batch shards'),
    (dict(model__num_heads=2, mesh__tensor=4), 'model.num_heads 2: choose'),
    (dict(mesh__expert=2), 'has no experts: set mesh.expert=1'),
    (dict(model__ffn='moe', model__moe=dict(num_experts=4, d_ff=6),
          mesh__tensor=4), 'mesh.tensor is 4, .* model.moe.d_ff 6: choose'),
    (dict(train__grad_accumulation=3), 'grad_accumulation 3 do not divide'),
    (dict(mesh__context=8, data__length=12), 'mesh.context is 8, which does'),
])
def test_a_mesh_that_does_not_divide_is_refused(changes, sentence):
  c = config(**changes)
  with pytest.raises(ValueError, match=sentence):
    runs.build(c, architectures.resolve(c.model))


# What is added to the loss: an infinity that has no gradient; a 0 whose
# gradient is not a number.
ADDED = {
    'loss': lambda x: jax.lax.stop_gradient(jnp.inf),
    'gradient': lambda x: jnp.sqrt(0 * x.astype(jnp.float32).sum()),
}


@pytest.mark.slow
def test_a_loss_or_a_gradient_that_is_not_finite_alone_is_bad(monkeypatch):
  plain, c, chosen = losses.cross_entropy, config(), []
  def cross_entropy(hidden_BLD, *args, **kwargs):
    value, sums = plain(hidden_BLD, *args, **kwargs)
    return value + jax.lax.switch(chosen[-1], [
        *ADDED.values(), lambda x: 0.0], hidden_BLD), sums
  monkeypatch.setattr(losses, 'cross_entropy', cross_entropy)
  run = runs.build(c, architectures.resolve(c.model), mesh=one_device_mesh())
  plain_step = make_train_step(run.module, run.tx, c)

  @jax.jit
  def step(which, *args):
    chosen.append(which)
    return plain_step(*args)

  for which, name in enumerate([*ADDED, 'none']):
    with run.context():
      after, metrics = jax.device_get(step(
          which, start(run, begin()), batch()))
    assert np.isfinite(metrics['loss']) == (name != 'loss')
    assert np.isfinite(metrics['grad_norm']) == (name != 'gradient')
    assert metrics['bad_steps'] == (name != 'none')
    same = jax.tree.map(np.array_equal, begin(), after.params)
    assert all(jax.tree.leaves(same)) == (name != 'none')


@pytest.mark.slow
def test_bfloat16_keeps_float32_parameters(single):
  _, state, metrics = train(config(model__dtype='bfloat16'), one_device_mesh(),
                            params=begin())
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {
      jnp.dtype('float32')}
  np.testing.assert_allclose(metrics[1]['loss'], single[2][1]['loss'],
                             rtol=2e-2)


def types(tree):
  return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)


@pytest.mark.parametrize('name', models.mark_long_except(
    ('soap',), optimizers.OPTIMIZERS))
def test_a_step_returns_a_state_of_the_same_types(name):
  """Else the second step would be another program. Figures are in float32,
  counts apart. (Float32 parameters take a second step in other tests.)"""
  for dtype, parts in ('float32', 1), ('bfloat16', 2):
    c = config(optim__name=name, model__param_dtype='bfloat16',
               model__dtype=dtype, model__num_layers=1,
               train__grad_accumulation=parts)
    run = runs.build(c, architectures.resolve(c.model), mesh=one_device_mesh())
    with run.context():
      after, metrics = jax.eval_shape(
          make_train_step(run.module, run.tx, c), run.abstract_state, batch())
    assert types(after) == types(run.abstract_state), (dtype, parts)
    assert {x.dtype for x in jax.tree.leaves(after.params)} == {
        jnp.dtype('bfloat16')}
    assert {n for n, x in metrics.items() if x.dtype != jnp.float32} == {
        'bad_steps', 'bad_in_row'}


def test_micro_batches_add_up_in_float32():
  """In bfloat16 256 + 1 is 256."""
  def grad_fn(params, micro, key, whole):
    del params, key, whole
    return {'w': micro['x'].sum().astype(jnp.bfloat16)}, ({}, {})

  batch = {'x': np.array([256, 1, 1, 1], np.float32)}
  with jax.set_mesh(one_device_mesh()), sharding.install_rules(
      tables.RULES['default']):
    grads, _ = _accumulate_gradients(grad_fn, {}, batch, jax.random.key(0), {},
                                     4)
  assert grads['w'] == 259
