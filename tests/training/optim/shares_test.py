"""What is frozen, which layer learns how fast and what is averaged, against a
few lines of NumPy; and that what is frozen has no gradient, state or decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import architectures
from tests.helpers import models
from tests.training import step_test
from tests.training.optim.optimizers_test import optim
from training import runs
from architectures.parts import paths
from training.distributed import devices
from training.optim import shares
from training.runs import make_train_step, build_optimizer, parameter_shares

LAYERS = dict(num_layers=4, **models.window_in_every_other_layer(8))


def flat_shares(system='gpt', changes=None, **fields):
  module, _ = models.make_model(system,
                                **(LAYERS if changes is None else changes))
  return paths.flatten_by_path(parameter_shares(module, optim(**fields)))


def test_layer_decay_has_the_powers_of_beit():
  """BEiT's get_num_layer_for_vit: 0 for the embedding, n + 1 for layer n,
  N + 1 for the rest; the rate is decay ** (N + 1 - that)."""
  shares = flat_shares(layer_decay=0.5)
  assert shares['embed/tokens'] == shares['embed/positions'] == 0.5 ** 5
  assert shares['decoder/final_norm/scale'] == 1
  # Block 0 holds layers 0 and 2, block 1 layers 1 and 3.
  for block, layers in enumerate([(0, 2), (1, 3)]):
    share = shares[f'decoder/layers/block_{block}/attention/query']
    assert share.shape == (2, 1, 1, 1)
    np.testing.assert_array_equal(
        share.ravel(), [0.5 ** (4 - n) for n in layers])


def test_an_encoder_lies_below_its_decoder():
  shares = flat_shares('t5', {}, layer_decay=0.5)
  rows = lambda stack: next(x.ravel().tolist() for path, x in shares.items()
                            if path.startswith(f'{stack}/layers/'))
  assert rows('decoder') == [0.25, 0.5]
  assert rows('encoder') == [0.0625, 0.125]
  assert shares['embed/tokens'] == 0.03125


@pytest.mark.parametrize('freeze, names', [
    ('embed/.*', {'embed/tokens', 'embed/positions'}),
    ('decoder/layers/[02]/ffn/.*', {
        f'decoder/layers/block_0/ffn/{name}'
        for name in ('up', 'down', 'up_bias', 'down_bias')}),
    ('.*/block_1/attention/query,embed/tokens', {
        'decoder/layers/block_1/attention/query', 'embed/tokens'})])
def test_a_pattern_freezes_what_it_matches(freeze, names):
  shares = flat_shares(freeze=freeze)
  assert {path for path, x in shares.items() if not np.any(x)} == names
  assert all(np.all(np.asarray(x) == 1) for path, x in shares.items()
             if path not in names)


@pytest.mark.parametrize('name',
                         models.mark_long_except(('muon',), ('adamw', 'muon')))
def test_an_update_is_that_of_numpy(name):
  """The update of a parameter, its decay included, is its share of what it
  would be; that of a frozen one is not there, nor is its state."""
  module, params = models.make_model(**LAYERS)
  grads = jax.tree.map(lambda x: np.cos(9 * np.asarray(x)), params)
  fields = dict(name=name, warmup_steps=0, clip_norm=0.0, lr=0.1)
  usual = build_optimizer(module, optim(**fields), 10)
  tx = build_optimizer(module, optim(**fields, layer_decay=0.5,
                                     freeze='embed/.*,decoder/layers/0/.*'), 10)
  plain, (updates, state) = jax.jit(lambda params: (
      usual.update(grads, usual.init(params), params)[0],
      tx.update(grads, tx.init(params), params)))(params)
  plain = paths.flatten_by_path(plain)
  assert isinstance(updates['embed']['tokens'], optax.MaskedNode)
  flat = paths.flatten_by_path(updates)
  assert set(flat) == {path for path in plain if 'embed' not in path}
  assert not any('embed' in path for path in paths.flatten_by_path(state))
  for path, u in flat.items():
    share = 1.0
    if '/block_' in path:
      layers = (0, 2) if '/block_0/' in path else (1, 3)
      share = np.array([0.5 ** (4 - n) * (n > 0) for n in layers]
                       ).reshape(-1, *(1,) * (u.ndim - 1))
    np.testing.assert_allclose(u, share * plain[path], rtol=2e-5, atol=1e-9)


def test_a_step_leaves_what_is_frozen_as_it_was():
  """Its gradient is not in the norm by which the others are clipped, either."""
  c = step_test.config(optim__name='adamw', optim__freeze='embed/.*,'
                       'decoder/layers/0/.*', optim__clip_norm=1e-3)
  _, params = models.make_model()
  _, state, seen = step_test.train(c, step_test.one_device_mesh(),
                                   params=params)
  before = paths.flatten_by_path(params)
  for path, x in paths.flatten_by_path(state.params).items():
    old = before[path]
    if path.startswith('embed/'):
      np.testing.assert_array_equal(x, old)
    elif '/layers/' in path:
      np.testing.assert_array_equal(x[0], old[0])
      assert 'key_bias' in path or np.abs(x[1] - old[1]).max() > 0, path
  of_optimizer = paths.flatten_by_path(state.opt_state)
  moments = {path: x for path, x in of_optimizer.items() if '/layers/' in path}
  assert moments and not any(x[0].any() for x in moments.values())
  whole = step_test.train(step_test.config(), step_test.one_device_mesh(), 1,
                          params=params)[2]
  assert 0 < seen[0]['grad_norm'] < whole[0]['grad_norm']


def averages(decay, values):
  """Kingma and Ba 2015, section 7.2, in float64, after each value."""
  m, averages = 0.0, []
  for t, value in enumerate(values, 1):
    m = decay * m + (1 - decay) * np.float64(value)
    averages.append(m / (1 - decay ** t))
  return averages


@pytest.mark.parametrize('decay', [0.5, 0.9999])
def test_the_average_is_that_of_the_paper(decay):
  values = np.random.default_rng(0).normal(3, 1, (30, 4)).astype(np.float32)
  average = shares.start_average(optim(ema=decay), None, {'x': jnp.full(4, 7.)})
  np.testing.assert_array_equal(average['x'], 7)  # until there is an update
  for t, expected in enumerate(averages(decay, values), 1):
    average = shares.update_average(
        optim(ema=decay), average, {'x': values[t - 1]}, jnp.int32(t),
        jnp.bool_(True))
    np.testing.assert_allclose(average['x'], expected, rtol=2e-6)


def test_a_step_averages_what_it_trains():
  """Of four steps, of which the second is bad, and so no update."""
  c = step_test.config(optim__ema=0.75, optim__lr=1.0,
                       optim__freeze='.*/layers/0/.*,embed/.*')
  run = runs.build(c, architectures.resolve(c.model),
                   step_test.one_device_mesh())
  states, evaluated = [], []
  with run.context():
    state = step_test.start(run, step_test.begin())
    step = jax.jit(make_train_step(run.module, run.tx, c))
    for n in range(4):
      b = step_test.batch(n)
      if n == 1:
        b['weights'] = b['weights'] * np.nan
      state, _ = step(state, devices.put_on_devices(b, run.batch_sharding))
      states.append(jax.device_get(state))
      evaluated.append(jax.device_get(run.parameters_to_evaluate(state)))
  for path, last in paths.flatten_by_path(evaluated[-1]).items():
    params = [paths.flatten_by_path(state.params)[path] for state in states]
    expected = averages(0.75, [params[i] for i in (0, 2, 3)])
    for i, value in zip((0, 2, 3), expected):
      np.testing.assert_allclose(
          paths.flatten_by_path(evaluated[i])[path], value, atol=1e-6,
          err_msg=path)
    if path.startswith('embed/'):
      np.testing.assert_array_equal(last, params[0])
  assert not any(path.startswith('embed/')
                 for path in paths.flatten_by_path(states[0].ema))
  jax.tree.map(np.testing.assert_array_equal, *evaluated[:2])
