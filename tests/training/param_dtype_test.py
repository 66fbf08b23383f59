"""Parameters in bfloat16, and products in bfloat16: through the real step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import checks, sharding
from tests.training.step_test import batch, config, one_device, train
from training import runs
from training.optim import optimizers
from training.step import _accumulate, make_train_step


@pytest.mark.slow
@pytest.mark.parametrize('tied', [
    True, pytest.param(False, marks=pytest.mark.long)])
def test_bfloat16_keeps_float32_parameters(tied):
  single = train(config(model__tie_embeddings=tied), one_device())
  _, state, metrics = train(
      config(model__dtype='bfloat16', model__tie_embeddings=tied),
      one_device())
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {
      jnp.dtype('float32')}
  np.testing.assert_allclose(metrics[1]['loss'], single[2][1]['loss'],
                             rtol=2e-2)


def types(tree):
  return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[pytest.mark.long] * (
        name not in ('adamw', 'adafactor', 'soap')))
    for name in optimizers.OPTIMIZERS])
def test_a_step_returns_a_state_of_the_same_types(name):
  """Else the second step would be another program. Figures are in float32,
  counts apart. (Float32 parameters take a second step in other tests.)"""
  for dtype, parts in itertools.product(checks.DTYPES, (1, 2)):
    c = config(optim__name=name, model__param_dtype='bfloat16',
               model__dtype=dtype, model__num_layers=1,
               train__grad_accumulation=parts)
    run = runs.build(c, architectures.resolve(c.model), mesh=one_device())
    with run.context():
      after, metrics = jax.eval_shape(
          make_train_step(run.module, run.tx, c), run.abstract, batch())
    assert types(after) == types(run.abstract), (dtype, parts)
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
  with jax.set_mesh(one_device()), sharding.rules('default'):
    grads, _ = _accumulate(grad_fn, {}, batch, jax.random.key(0), {}, 4)
  assert grads['w'] == 259


@pytest.mark.long
@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[pytest.mark.long] * (
        name != 'muon'))
    for name in optimizers.OPTIMIZERS])
def test_bfloat16_parameters_train(name):
  """As the float32 parameters of the same values do, but for the rounding of
  each update; in micro-batches too."""
  lr = {'sgd': 0.1, 'adafactor': 0.1}
  changes = dict(optim__name=name, optim__lr=lr.get(name, 1e-2))
  batches = [batch(0)] * 4
  first = config(model__param_dtype='bfloat16', **changes)
  run, state, metrics = train(first, one_device(), 4, batches)
  _, _, parts = train(config(
      model__param_dtype='bfloat16', train__grad_accumulation=4, **changes),
                      one_device(), 4, batches)
  with run.context():
    born = run.new_state()
  exact = train(config(**changes), one_device(), 4, batches, jax.tree.map(
      lambda x: x.astype(jnp.float32), born.params))[2]
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {
      jnp.dtype('bfloat16')}
  losses = [[m['loss'] for m in each] for each in (exact, metrics, parts)]
  fall = losses[0][0] - losses[0][-1]
  assert fall > 0.02
  for other in losses[1:]:
    np.testing.assert_allclose(other, losses[0], atol=0.1 * fall)
  for name in ('grad_norm', 'param_norm'):
    for each in (metrics, parts):
      np.testing.assert_allclose(each[0][name], exact[0][name], rtol=4e-3)
