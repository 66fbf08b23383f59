"""The average of the parameters (optim.ema): against numpy, and its place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from configs import base
from tests.training import step_test
from training import paths, runs
from training.distributed import devices
from training.optim import average
from training.step import make_train_step

OPTIM = base.base().optim
OPTIM.ema = 0.75


def of_numpy(decay, values):
  """Kingma and Ba 2015, section 7.2, in float64, after each value."""
  m, found = 0.0, []
  for t, value in enumerate(values, 1):
    m = decay * m + (1 - decay) * np.float64(value)
    found.append(m / (1 - decay ** t))
  return found


@pytest.mark.parametrize('decay', [0.5, 0.9, 0.9999])
def test_it_is_the_debiased_average_of_the_paper(decay):
  optim = OPTIM.copy_and_resolve_references()
  optim.ema = decay
  values = np.random.default_rng(0).normal(3, 1, (30, 4)).astype(np.float32)
  own = average.start(optim, None, {'x': jnp.full(4, 7.0)})
  np.testing.assert_array_equal(own['x'], 7)  # as long as there is no update
  for t, expected in enumerate(of_numpy(decay, values), 1):
    own = average.update(optim, own, {'x': values[t - 1]}, jnp.int32(t),
                         jnp.bool_(True))
    np.testing.assert_allclose(own['x'], expected, rtol=2e-6)


def test_a_bad_step_is_no_update_of_it():
  own = average.start(OPTIM, None, {'x': jnp.full(4, 7.0)})
  for t in (0, 5):
    after = average.update(OPTIM, own, {'x': jnp.zeros(4)}, jnp.int32(t),
                           jnp.bool_(False))
    np.testing.assert_array_equal(after['x'], own['x'])


def stepped(c, mesh=None):
  """Returns the run, its states and what each is evaluated with; step 2 is
  bad."""
  run = runs.build(c, architectures.resolve(c.model), mesh=mesh)
  with run.context():
    state, states, seen = run.new_state(), [], []
    step = jax.jit(make_train_step(run.module, run.tx, c))
    for n in range(4):
      b = step_test.batch(n)
      if n == 1:
        b['weights'] = b['weights'] * np.nan
      state, _ = step(state, devices.put(b, run.place))
      states.append(jax.device_get(state))
      seen.append(jax.device_get(run.evaluated(state)))
  return run, states, seen


@pytest.fixture(scope='module')
def trained():
  c = step_test.config(optim__ema=0.75, optim__freeze='.*/layers/0/.*,embed/.*')
  c.optim.lr = 1.0
  return stepped(c, step_test.one_device())


def test_a_step_averages_what_it_trains(trained):
  _, states, seen = trained
  for path, found in paths.flatten(seen[-1]).items():
    params = [paths.flatten(state.params)[path] for state in states]
    expected = of_numpy(0.75, [params[i] for i in (0, 2, 3)])
    for i, value in zip((0, 2, 3), expected):
      np.testing.assert_allclose(paths.flatten(seen[i])[path], value,
                                 atol=1e-6, err_msg=path)
    if path.startswith('embed/'):
      np.testing.assert_array_equal(found, params[0])
  assert not any(path.startswith('embed/')
                 for path in paths.flatten(states[0].ema))
  jax.tree.map(np.testing.assert_array_equal, seen[0], seen[1])
