"""The average of the parameters (optim.ema): against numpy, and its place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import architectures
from configs import base
from configs.errors import RequestError
from tests.helpers import models
from tests.training import step_test
from training import paths, runs
from training.costs import memory
from training.distributed import devices
from training.optim import average
from training.step import make_train_step
from training.workdir import run_config

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


def test_it_is_float32_and_evaluated_in_the_dtype_of_the_parameters():
  params = {'x': jnp.ones(3, jnp.bfloat16), 'frozen': jnp.full(2, 5.0)}
  parts = {'x': 1.0, 'frozen': 0.0}
  own = average.start(OPTIM, parts, params)
  assert own['x'].dtype == jnp.float32
  assert isinstance(own['frozen'], optax.MaskedNode)
  seen = average.evaluated(parts, {**own, 'x': jnp.full(3, 1.25)}, params)
  assert seen['x'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(seen['x'].astype(float), 1.25)
  assert seen['frozen'] is params['frozen']
  assert average.start(base.base().optim, None, params) is None
  assert average.evaluated(None, None, params) is params


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


@pytest.fixture(scope='module')
def spread():
  c = step_test.config(optim__ema=0.75)
  c.mesh.update(fsdp=4, tensor=2)
  return c


def test_it_lies_where_its_parameter_lies(spread):
  run = runs.build(spread, architectures.resolve(spread.model))
  places = paths.flatten(run.abstract.params)
  average_of = paths.flatten(run.abstract.ema)
  assert average_of.keys() == places.keys()
  for path, x in average_of.items():
    assert x.sharding == places[path].sharding and x.dtype == jnp.float32
  held = memory.state(run)
  assert held['average'] == held['parameters']  # in float32 both


@pytest.mark.long
@pytest.mark.slow
def test_sharded_it_is_the_same(spread):
  alone = spread.copy_and_resolve_references()
  alone.mesh.update(fsdp=1, tensor=1)
  _, _, expected = stepped(alone, step_test.one_device())
  _, states, seen = stepped(spread)
  models.close(expected[-1], seen[-1], rtol=1e-4)


@pytest.mark.parametrize('old, new, kind', [
    (0.0, 0.9, run_config.INCOMPATIBLE),
    (0.9, 0.0, run_config.INCOMPATIBLE),
    (None, 0.9, run_config.INCOMPATIBLE),  # a run of an earlier version
    (0.9, 0.99, run_config.OPTIMISATION)])
def test_what_a_change_of_it_does_to_a_run(old, new, kind):
  before = {} if old is None else {'optim.ema': old}
  assert run_config.classify('optim.ema', before, {'optim.ema': new})[0] == kind


@pytest.mark.parametrize('fields, words', [
    ({'optim.ema': 1.0}, r'optim.ema is 1.0: choose it in \[0, 1\)'),
    ({'eval.live': True}, 'eval.live is True, which is not read'),
    ({'checkpoint.average': 1}, '2 checkpoints or more'),
    ({'checkpoint.average': -1}, 'checkpoint.average is -1: it must be'),
    ({'checkpoint.average': 2, 'checkpoint.every_steps': 0},
     'every_steps is 0: the mean'),
    ({'checkpoint.average': 3}, 'there are 2 checkpoints in train.steps 1000'),
    ({'checkpoint.average': 2, 'eval.every_steps': 0}, 'nothing is evaluated')])
def test_what_cannot_be_honoured_is_refused(fields, words):
  c = base.base()
  c.update_from_flattened_dict(fields)
  with pytest.raises(RequestError, match=words):
    runs.check_config(c)


def test_a_mean_of_all_the_checkpoints_is_taken():
  c = base.base()
  c.checkpoint.average = 2
  runs.check_config(c)
