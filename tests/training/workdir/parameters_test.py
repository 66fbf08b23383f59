"""Which parameters a checkpoint stands for, and the mean of several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from configs.errors import RequestError
from training.workdir import checkpoints, parameters

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
DRAWN = np.random.default_rng(0).normal(size=(5, 2, 3, 4)).astype(np.float32)


def of_step(n, averaged=True):
  """The state of step n: a and b are trained, c is frozen."""
  put = lambda x, dtype=jnp.float32: jax.device_put(jnp.asarray(x, dtype), HERE)
  own = DRAWN[n // 10]
  state = {'params': {'a': put(own[0]), 'b': put(own[1], jnp.bfloat16),
                      'c': put(own[0, 0])}}
  if averaged:
    state['ema'] = {'a': put(own[0] / 2), 'b': put(own[1] / 2)}
  return state


def asked():
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=HERE), of_step(0)['params'])


def saved(tmp_path, averaged, steps=(10, 20, 30, 40)):
  with checkpoints.Checkpoints(tmp_path, every_steps=0, every_minutes=0,
                               keep=4, keep_every=0) as store:
    for n in steps:
      store.save(n, of_step(n, averaged), next_batch=n, tokens=n,
                 config=base.base())
  return checkpoints.directory(tmp_path)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  return saved(tmp_path_factory.mktemp('plain'), False)


@pytest.fixture(scope='module')
def averaged(tmp_path_factory):
  return saved(tmp_path_factory.mktemp('averaged'), True)


def test_it_is_the_average_where_one_is_kept(averaged):
  found = parameters.restore(averaged, asked())
  assert (found.step, found.what) == (40, 'the average (optim.ema)')
  kept = of_step(40)
  np.testing.assert_array_equal(found.state['a'], kept['ema']['a'])
  np.testing.assert_array_equal(found.state['c'], kept['params']['c'])
  assert found.state['b'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(
      found.state['b'], kept['ema']['b'].astype(jnp.bfloat16))


def test_the_parameters_themselves_are_found_too(averaged, plain):
  for folder, live in ((averaged, True), (plain, False), (plain, True)):
    found = parameters.restore(folder, asked(), 20, live=live)
    assert (found.step, found.what) == (20, '')
    jax.tree.map(np.testing.assert_array_equal, found.state,
                 of_step(20)['params'])


@pytest.mark.parametrize('text, steps', [
    ('last:3', [20, 30, 40]), ('40,10', [10, 40])])
def test_a_mean_is_that_of_numpy(plain, text, steps):
  found = parameters.restore(plain, asked(), checkpoints.named_step(text))
  assert found.step == 40
  assert found.what == f'the mean of steps {", ".join(map(str, steps))}'
  for name in 'abc':
    own = [np.asarray(of_step(n)['params'][name], np.float32) for n in steps]
    expected = np.mean(own, axis=0)
    if name == 'b':
      expected = expected.astype(jnp.bfloat16)
    np.testing.assert_allclose(np.float32(found.state[name]),
                               np.float32(expected), rtol=2e-7, err_msg=name)
    assert found.state[name].dtype == asked()[name].dtype


def test_a_mean_is_of_averages_where_these_are_kept(averaged):
  found = parameters.restore(averaged, asked(), checkpoints.Mean(last=2))
  assert found.what == ('the mean of steps 30, 40, each the average '
                        '(optim.ema)')
  np.testing.assert_array_equal(found.state['a'], np.mean(
      [of_step(n)['ema']['a'] for n in (30, 40)], axis=0))
  live = parameters.restore(averaged, asked(), checkpoints.Mean(last=2),
                            live=True)
  np.testing.assert_array_equal(live.state['a'], np.mean(
      [of_step(n)['params']['a'] for n in (30, 40)], axis=0))


def test_what_is_not_there_is_refused(plain):
  with pytest.raises(RequestError, match='has 4: 10, 20, 30, 40'):
    parameters.restore(plain, asked(), checkpoints.named_step('last:5'))
  with pytest.raises(RequestError, match='no checkpoint of step 25'):
    parameters.restore(plain, asked(), checkpoints.named_step('20,25'))


@pytest.mark.parametrize('text, words', [
    ('last:1', 'from 2 on'), ('last:x', 'from 2 on'),
    ('10,10', 'different steps'), ('10,', 'different steps')])
def test_a_mean_of_nothing_is_refused(text, words):
  with pytest.raises(RequestError, match=words):
    checkpoints.named_step(text)
