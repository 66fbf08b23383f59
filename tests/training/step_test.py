"""The training step: sharded = single, accumulation = whole, bad steps,
the golden step against numpy."""

import itertools
import re

from configs import base
from configs import sharding as tables
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import architectures
from tests.helpers import models
from tests.helpers.jaxprs import equations
from training import runs
from training.distributed import devices
from training.step import make_eval_step, make_train_step

LENGTH, BATCH = 16, 16


def config(**changes):
  c = base.base()
  c.model = models.config()
  c.model.update(num_heads=4)
  c.data.update(length=LENGTH, batch_size=BATCH)
  # Not Adam: it blows up the rounding of gradients that are zero (keys' bias).
  c.optim.update(name='sgd', lr=0.1, warmup_steps=0)
  c.train.steps = 10
  for name, value in changes.items():
    section, field = name.split('__')
    if isinstance(value, dict):
      c[section][field].update(value)
    else:
      c[section][field] = value
  return c


def batch(seed=0):
  tokens = np.asarray(models.tokens(BATCH, LENGTH + 1, seed))
  weights = np.ones((BATCH, LENGTH), np.float32)
  weights[:3, 5:] = 0
  return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=weights)


def train(c, mesh=None, steps=2, batches=None, params=None):
  """Returns (run, state, [metrics]) after some steps, on the given mesh."""
  run = runs.build(c, architectures.resolve(c.model), mesh=mesh)
  with run.context():
    state = run.new_state()
    if params is not None:
      state = state.replace(params=params)
    step = jax.jit(make_train_step(run.module, run.tx, c), donate_argnums=0)
    seen = []
    for n in range(steps):
      b = batches[n] if batches else batch(n)
      state, metrics = step(state, devices.put(b, run.place))
      seen.append(jax.device_get(metrics))
  return run, jax.device_get(state), seen


def one_device():
  shape = dict.fromkeys(tables.MESH_AXES, 1)
  return devices.make_mesh(shape, jax.devices()[:1])


@pytest.fixture(scope='module')
def single():
  return train(config(), one_device())


@pytest.mark.parametrize('preset, rules', [
    pytest.param(name, 'default',
                 marks={'fsdp_tp': [], 'cp_fsdp_tp': [pytest.mark.slow]}.get(
                     name, [pytest.mark.long]))
    for name, shape in tables.PRESETS.items()
    if shape['expert'] == 1] + [
        pytest.param(name, 'replicated', marks=pytest.mark.slow
                     if name == 'fsdp_tp' else pytest.mark.long)
        for name in ('dp', 'fsdp_tp')])
def test_sharded_equals_single_device(preset, rules, single, capfd):
  shape = tables.PRESETS[preset]
  c = config(mesh__rules=rules)
  c.mesh.update(shape)
  run, state, metrics = train(c)
  # XLA says so, where it compiles, if it had to gather what we meant to stay.
  assert 'Involuntary full rematerialization' not in capfd.readouterr().err
  models.close(single[1].params, state.params, rtol=1e-4)
  for a, b in zip(single[2], metrics, strict=True):
    models.close(a, b, rtol=1e-4)
  # And the state was born in shards, not copied.
  used = {axis for s in jax.tree.leaves(run.shardings.params)
          for axes in s.spec if axes
          for axis in ([axes] if isinstance(axes, str) else axes)}
  sharded = {a for a in ('fsdp', 'tensor') if shape[a] > 1}
  if rules == 'replicated':
    sharded.discard('fsdp')
  assert sharded <= used


def test_accumulation_equals_the_whole_batch(single):
  _, state, metrics = train(config(train__grad_accumulation=4), one_device())
  models.close(single[1].params, state.params, rtol=1e-4)
  models.close(single[2][1], metrics[1], rtol=1e-4)


def uneven(objective):
  """(config, batch) whose rows differ in what there is to predict: from no
  target, of a question alone, to all."""
  system = {'chat': 'mixtral', 'mlm_nsp': 'bert'}[objective]
  c = config()
  # A z-loss is a mean over tokens; a balance loss is of a micro-batch whole.
  c.model = models.config(system, **({} if system == 'bert' else dict(
      num_kv_heads=2, moe=dict(num_experts=4, d_ff=24, balance_loss='none',
                               z_loss_weight=0.5))))
  c.objective, c.model.dropout = objective, 0.0
  b = batch(3)
  index_BL = np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH))
  size_B1 = 4 + np.arange(BATCH)[:, None] % 13
  seen = index_BL < size_B1
  if objective == 'chat':
    told = seen & (index_BL >= 2 * (np.arange(BATCH)[:, None] % 4))
    told[::2] = False
    return c, b | dict(valid=seen.astype(np.float32),
                       weights=told.astype(np.float32))
  c.data.mask_rate = 0.4
  return c, b | dict(
      types=(index_BL > 5).astype(np.int32), segment_ids=seen.astype(np.int32),
      weights=(seen & (index_BL % 3 == 0)).astype(np.float32),
      nsp_targets=np.arange(BATCH, dtype=np.int32) % 2)


@pytest.mark.slow
@pytest.mark.parametrize('objective', [
    'mlm_nsp', pytest.param('chat', marks=pytest.mark.long)])
def test_a_micro_batch_counts_by_what_it_holds(objective):
  """Targets, rows and tokens are spread unevenly over the micro-batches, and
  figures and parameters are those of the whole batch all the same."""
  c, b = uneven(objective)
  _, whole, (metrics,) = train(c, one_device(), 1, [b])
  c.train.grad_accumulation = 4
  _, state, (parts,) = train(c, one_device(), 1, [b])
  assert metrics.keys() == parts.keys()
  means = [n for n in metrics if n not in (
      'health/load_max', 'health/load_entropy', 'health/unused',
      'health/shard_imbalance', 'health/balance_loss',
      'health/importance_loss')]
  assert {'chat': 'aux/router_z', 'mlm_nsp': 'nsp_loss'}[objective] in means
  for name in means:
    np.testing.assert_allclose(parts[name], metrics[name], rtol=1e-4,
                               atol=1e-6, err_msg=name)
  models.close(whole.params, state.params, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('preset', [
    'fsdp_tp', pytest.param('cp_fsdp_tp', marks=pytest.mark.long)])
def test_words_to_predict_are_those_of_one_device(preset):
  """A row that lies on one device gives them to the head alone."""
  c, b = uneven('mlm_nsp')
  _, whole, (metrics,) = train(c, one_device(), 1, [b])
  c.mesh.update(tables.PRESETS[preset])
  _, state, (parts,) = train(c, None, 1, [b])
  models.close(parts, metrics, rtol=1e-4)
  models.close(whole.params, state.params, rtol=1e-4)


@pytest.mark.slow
def test_evaluation_is_the_plain_loss():
  """Whatever is added to the loss in training: smoothing, the z-loss, the
  losses of experts, dropout."""
  c = config(train__z_loss=0.1, train__label_smoothing=0.2)
  c.model = models.config('mixtral', num_kv_heads=2, dropout=0.2, moe=dict(
      num_experts=4, d_ff=24, balance_weight=1.0))
  run = runs.build(c, architectures.resolve(c.model), mesh=one_device())
  b = batch(0)
  with run.context():
    params = run.new_state().params
    figures = jax.jit(make_eval_step(run.module, c))(params, b)
    logits = jax.jit(lambda params: run.module.apply(
        {'params': params}, b['tokens'], valid_BL=b['weights']).logits)(params)
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
  run = runs.build(c, architectures.resolve(c.model), mesh=one_device())
  with run.context():
    before = jax.device_get(run.new_state())
    b = batch(0)
    @jax.jit
    def loss(params):
      logits = run.module.apply({'params': params}, b['tokens']).logits
      nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(
          logits, jnp.asarray(b['targets'])[..., None], -1)[..., 0]
      return (nll * b['weights']).sum() / b['weights'].sum()
    value, grads = jax.value_and_grad(loss)(before.params)
  np.testing.assert_allclose(single[2][0]['loss'], value, rtol=1e-5)
  norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(single[2][0]['grad_norm'], norm, rtol=1e-4)
  _, after, metrics = train(c, one_device(), steps=1)
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
      check, before.params, jax.device_get(grads), after.params))) > 10
  # The gradient itself, along a random direction.
  key = jax.random.key(5)
  d = jax.tree.map(lambda x: jax.random.normal(key, x.shape), before.params)
  h = 1e-3
  up, down = [loss(jax.tree.map(lambda x, y, s=s: x + s * y, before.params, d))
              for s in (h, -h)]
  slope = sum(jnp.vdot(x, y) for x, y in zip(
      jax.tree.leaves(grads), jax.tree.leaves(d), strict=True))
  np.testing.assert_allclose((up - down) / (2 * h), slope, rtol=2e-2)


def _at(tree, path):
  for name in path:
    tree = tree[name]
  return np.asarray(tree)


def sizes(jaxpr):
  """Elements of every array of a program, inner ones included."""
  for eqn in equations(jaxpr):
    yield from (v.aval.size for v in eqn.outvars)


def test_a_step_never_holds_all_logits():
  """No array is as large as [B, L, V], in the loss, its gradient or after."""
  vocab = 1000
  c = config(model__vocab_size=vocab, train__loss_chunk=4)
  run = runs.build(c, architectures.resolve(c.model), mesh=one_device())
  with run.context():
    traced = jax.make_jaxpr(make_train_step(run.module, run.tx, c))(
        run.abstract, batch())
  assert max(sizes(traced.jaxpr)) < BATCH * LENGTH * vocab


def test_a_bad_step_changes_nothing_and_is_counted():
  bad = batch(1)
  bad['weights'] = np.full_like(bad['weights'], np.nan)
  _, state, metrics = train(config(), one_device(), 3,
                            [batch(0), bad, batch(0)])
  assert [m['bad_steps'] for m in metrics] == [0, 1, 1]
  assert [m['bad_in_row'] for m in metrics] == [0, 1, 0]
  _, good, _ = train(config(), one_device(), 2, [batch(0), batch(0)])
  np.testing.assert_array_equal(
      *[_at(s.params, ('embed', 'tokens')) for s in (state, good)])
  assert state.step == 3 and good.step == 2


@pytest.mark.slow
def test_the_rate_that_is_logged_is_the_one_that_was_used():
  """By SGD without momentum: update = -rate * gradient, and the schedule does
  not move on in a step that changes nothing."""
  c = config(optim__warmup_steps=5, optim__momentum=0.0, optim__clip_norm=0.0,
             optim__weight_decay=0.0)
  bad = batch(1)
  bad['weights'] = np.full_like(bad['weights'], np.nan)
  batches = [batch(0), bad, batch(2)]
  _, before, _ = train(c, one_device(), 2, batches)
  _, after, metrics = train(c, one_device(), 3, batches)
  moved = optax.tree.norm(jax.tree.map(
      jnp.subtract, after.params, before.params))
  np.testing.assert_allclose(
      moved / metrics[2]['grad_norm'], metrics[2]['learning_rate'], rtol=1e-3)
  assert metrics[2]['learning_rate'] != metrics[0]['learning_rate']


def test_a_batch_with_nothing_to_predict_has_no_loss():
  empty = batch(0)
  empty['weights'] = np.zeros_like(empty['weights'])
  _, _, (metrics,) = train(config(), one_device(), 1, [empty])
  assert np.isnan(metrics['loss']) and np.isnan(metrics['accuracy'])
  assert metrics['bad_steps'] == 1


def test_loss_falls_on_one_batch():
  _, _, metrics = train(config(optim__name='adamw', optim__lr=1e-2),
                        one_device(), 10, [batch(0)] * 10)
  losses = [m['loss'] for m in metrics]
  assert losses[-1] < losses[0] - 0.5, losses


MESHES = {
    'product': (dict(data=3), 'mesh.data=3.*3.*not the 8 devices'),
    'two free': (dict(fsdp=-1), 'only one axis may be -1'),
    'negative': (dict(tensor=0), 'mesh.tensor is 0'),
    'free': (dict(tensor=3), 'multiply to 3, which does not divide the 8'),
}


@pytest.mark.parametrize('name', MESHES)
def test_a_mesh_that_does_not_fit_is_refused(name):
  sizes, sentence = MESHES[name]
  c = config()
  c.mesh.update(sizes)
  with pytest.raises(ValueError, match=sentence):
    devices.mesh_shape(c.mesh, 8)


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


def test_every_mesh_shape_multiplies_to_its_devices():
  for sizes in itertools.product(
      (1, 2, -1), repeat=len(tables.MESH_AXES)):
    if sizes.count(-1) == 1 and sizes.count(2) <= 3:
      shape = devices.mesh_shape(dict(zip(tables.MESH_AXES, sizes)), 8)
      assert np.prod(list(shape.values())) == 8
