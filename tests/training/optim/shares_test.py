"""What is frozen and which layer learns how fast, against a few lines of
NumPy, and that what is frozen has no gradient, no state and no decay."""

from configs import base
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import models
from tests.training import step_test
from training import paths
from training.step import optimizer, parameter_shares

LAYERS = dict(num_layers=4, **models.banded(8))


def optim(**fields):
  config = base.base().optim
  config.update(fields)
  return config


def flat_shares(system='gpt', changes=None, **fields):
  module, _ = models.make(system, **(LAYERS if changes is None else changes))
  return paths.flatten(parameter_shares(module, optim(**fields)))


def test_layer_decay_has_the_powers_of_beit():
  """BEiT's get_num_layer_for_vit: 0 for the embedding, n + 1 for layer n,
  N + 1 for the rest; the rate is decay ** (N + 1 - that)."""
  found = flat_shares(layer_decay=0.5)
  assert found['embed/tokens'] == found['embed/positions'] == 0.5 ** 5
  assert found['decoder/final_norm/scale'] == 1
  # Block 0 holds layers 0 and 2, block 1 layers 1 and 3.
  for block, layers in enumerate([(0, 2), (1, 3)]):
    share = found[f'decoder/layers/block_{block}/attention/query']
    assert share.shape == (2, 1, 1, 1)
    np.testing.assert_array_equal(
        share.ravel(), [0.5 ** (4 - n) for n in layers])


def test_an_encoder_lies_below_its_decoder():
  found = flat_shares('t5', {}, layer_decay=0.5)
  rows = lambda stack: next(x.ravel().tolist() for path, x in found.items()
                            if path.startswith(f'{stack}/layers/'))
  assert rows('decoder') == [0.25, 0.5]
  assert rows('encoder') == [0.0625, 0.125]
  assert found['embed/tokens'] == 0.03125


@pytest.mark.parametrize('freeze, names', [
    ('embed/.*', {'embed/tokens', 'embed/positions'}),
    ('decoder/layers/[02]/ffn/.*', {
        f'decoder/layers/block_0/ffn/{name}'
        for name in ('up', 'down', 'up_bias', 'down_bias')}),
    ('.*/block_1/attention/query,embed/tokens', {
        'decoder/layers/block_1/attention/query', 'embed/tokens'})])
def test_a_pattern_freezes_what_it_matches(freeze, names):
  found = flat_shares(freeze=freeze)
  assert {path for path, x in found.items() if not np.any(x)} == names
  assert all(np.all(np.asarray(x) == 1) for path, x in found.items()
             if path not in names)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_an_update_is_that_of_numpy(name):
  """The update of a parameter, its decay included, is its share of what it
  would be; that of a frozen one is not there, nor is its state."""
  module, params = models.make(**LAYERS)
  grads = jax.tree.map(lambda x: jnp.cos(9 * x), params)
  fields = dict(name=name, warmup_steps=0, clip_norm=0.0, lr=0.1)
  usual = optimizer(module, optim(**fields), 10)
  tx = optimizer(module, optim(**fields, layer_decay=0.5,
                               freeze='embed/.*,decoder/layers/0/.*'), 10)
  plain = paths.flatten(jax.jit(usual.update)(
      grads, usual.init(params), params)[0])
  state = tx.init(params)
  updates, _ = jax.jit(tx.update)(grads, state, params)
  assert isinstance(updates['embed']['tokens'], optax.MaskedNode)
  found = paths.flatten(updates)
  assert set(found) == {path for path in plain if 'embed' not in path}
  assert not any('embed' in path for path in paths.flatten(state))
  for path, u in found.items():
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
  run, state, seen = step_test.train(c, step_test.one_device())
  before = paths.flatten(jax.device_get(run.new_state().params))
  after = paths.flatten(state.params)
  for path, x in after.items():
    old = before[path]
    if path.startswith('embed/'):
      np.testing.assert_array_equal(x, old)
    elif '/layers/' in path:
      np.testing.assert_array_equal(x[0], old[0])
      assert 'key_bias' in path or np.abs(x[1] - old[1]).max() > 0, path
  moments = {path: x for path, x in paths.flatten(state.opt_state).items()
             if '/layers/' in path}
  assert moments and not any(x[0].any() for x in moments.values())
  whole = step_test.train(step_test.config(), step_test.one_device())[2]
  assert 0 < seen[0]['grad_norm'] < whole[0]['grad_norm']
