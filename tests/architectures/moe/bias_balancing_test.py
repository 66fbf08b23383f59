"""Loss-free balancing in real training steps (Wang et al. 2024): the load that
a step measures moves router_bias, and the bias evens out the load."""

import jax
import numpy as np
import pytest

import architectures
from tests.training import step_test
from training import runs
from training.distributed import devices
from training.runs import make_train_step

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


@pytest.mark.slow
def test_the_bias_of_a_frozen_layer_stays():
  c = _config()
  c.optim.freeze = 'decoder/layers/0/.*'
  _, state, _ = step_test.train(c, step_test.one_device(), steps=1)
  first, second = _biases(state.params)
  assert not first.any() and second.any()
