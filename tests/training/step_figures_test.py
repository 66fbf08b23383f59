"""What a training step reports, and when it takes itself for a bad one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from configs import base
from tests.helpers import models
from tests.training import step_test
from training import losses, objectives, runs
from training.distributed import devices
from training.step import make_train_step


def one_step(c, batch=None):
  """Returns (module, state before, state after, metrics) of one step."""
  run = runs.build(c, architectures.resolve(c.model),
                   mesh=step_test.one_device())
  with run.context():
    state = run.new_state()
    before = jax.device_get(state)
    after, metrics = jax.jit(make_train_step(run.module, run.tx, c))(
        state, devices.put(batch or step_test.batch(), run.place))
  return run.module, before, *jax.device_get((after, metrics))


# What is added to the loss: an infinity that has no gradient; a 0 whose
# gradient is not a number.
ADDED = {
    'loss': lambda x: jax.lax.stop_gradient(jnp.inf),
    'gradient': lambda x: jnp.sqrt(0 * x.astype(jnp.float32).sum()),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', ADDED)
def test_a_loss_or_a_gradient_that_is_not_finite_alone_is_bad(name,
                                                              monkeypatch):
  plain = losses.cross_entropy
  def cross_entropy(hidden_BLD, *args, **kwargs):
    value, sums = plain(hidden_BLD, *args, **kwargs)
    return value + ADDED[name](hidden_BLD), sums
  monkeypatch.setattr(losses, 'cross_entropy', cross_entropy)
  _, before, after, metrics = one_step(step_test.config())
  assert np.isfinite(metrics['loss']) == (name == 'gradient')
  assert np.isfinite(metrics['grad_norm']) == (name == 'loss')
  assert metrics['bad_steps'] == 1
  jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


@pytest.mark.slow
def test_figures_of_a_step_by_hand():
  z_loss, smoothing, batch = 0.1, 0.2, step_test.batch()
  module, before, after, metrics = one_step(step_test.config(
      optim__schedule='constant', train__z_loss=z_loss,
      train__label_smoothing=smoothing), batch)
  logits = np.float64(jax.jit(lambda params: module.apply(
      {'params': params}, batch['tokens']).logits)(before.params))
  log_z = np.log(np.exp(logits).sum(-1))
  told = np.take_along_axis(logits, batch['targets'][..., None], -1)[..., 0]
  mean = lambda x: (x * batch['weights']).sum() / batch['weights'].sum()
  want = dict(
      loss=mean(log_z - (1 - smoothing) * told - smoothing * logits.mean(-1)
                + z_loss * log_z ** 2),
      z_loss=mean(z_loss * log_z ** 2),
      accuracy=mean(logits.argmax(-1) == batch['targets']),
      param_norm=np.sqrt(sum(np.square(np.float64(x)).sum()
                             for x in jax.tree.leaves(after.params))),
      learning_rate=0.1, bad_steps=0, bad_in_row=0)
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_auxiliary_losses_are_reported_and_learned_from():
  """By themselves: where no token counts much, the router still moves."""
  def step(weight):
    return one_step(step_test.config(
        model__ffn='moe', model__moe=dict(
            num_experts=4, d_ff=8, dispatch='dropless', balance_weight=weight)))
  _, before, after, metrics = step(10.0)
  np.testing.assert_allclose(
      metrics['aux/balance'], 10 * metrics['health/balance_loss'].sum(),
      rtol=1e-5)
  _, _, other, _ = step(0.0)
  router = lambda state: state.params['decoder']['layers']['block_0']['ffn'][
      'router']
  assert np.abs(router(after) - router(other)).max() > 1e-3


@pytest.mark.slow
def test_what_is_differentiated_is_what_is_reported():
  """BERT's loss is a mean over masked words plus one over rows, each by its
  own number: a row with padding counts as a row, one that is all padding does
  not."""
  module, params = models.make('bert')
  tokens, config = models.tokens(3, 8), base.base()
  config.data.mask_rate = 3 / 8
  batch = dict(tokens=tokens, targets=tokens, types=jnp.zeros((3, 8), int),
               segment_ids=jnp.ones((3, 8), int).at[1, 5:].set(0).at[2].set(0),
               weights=jnp.zeros((3, 8)).at[0, :3].set(1.0).at[1, 2:4].set(1.0),
               nsp_targets=jnp.array([0, 1, 0]))
  objective = objectives.OBJECTIVES['mlm_nsp']
  @jax.jit
  def values(params):
    output = objective.apply(module, params, batch)
    share, figures = objective.loss(output, batch, config)
    log_p = jax.nn.log_softmax(output.logits)
    told = jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
    nsp_B2 = jax.nn.log_softmax(output.extra['nsp_logits'])
    return (share / objective.weights(batch)[objective.main],
            objective.means(figures)['loss'],
            -(told * batch['weights']).sum() / 5
            - (nsp_B2[0, 0] + nsp_B2[1, 1]) / 2)
  share, reported, by_hand = values(params)
  np.testing.assert_allclose([share, reported], by_hand, rtol=1e-5)
  models.close(*[jax.grad(lambda p, i=i: values(p)[i])(params)
                 for i in (0, 2)])
