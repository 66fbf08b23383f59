"""muP over experts: a mixture whose experts are copied, or cut into two, is
trained as it was."""

from configs import base
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import paths, sharding
from architectures.parts.context import Context
from architectures.parts.moe.layer import MoE
from tests.helpers import models
from training.optim import mup, optimizers

B, L, D, F, E, X = 2, 16, 8, 12, 4, 2


def built(times=1, is_split=False, **changes):
  """A mixture with so many times the experts, and experts of a token, of E and
  X; experts that are split have as many times fewer hidden units."""
  fields = base.base().model
  fields.update(arch='gpt', d_model=D, d_ff=F, num_heads=1, vocab_size=9,
                max_len=L, ffn='moe', ffn_bias=True, parametrization='mup',
                mup_base_width=D)
  moe = dict(num_experts=times * E, top_k=times * X, ffn='swiglu',
             mup_base_experts=E, mup_base_top_k=X, mup_base_d_ff=F, d_ff=F)
  if is_split:
    moe['d_ff'] = F // times
  fields.moe.update(moe | changes.pop('moe', {}))
  fields.update(changes)
  return MoE(architectures.resolve(fields))


def context():
  return Context(jnp.arange(L)[None], deterministic=False)


def boxed_shapes(module):
  return jax.eval_shape(lambda: module.init(
      jax.random.key(0), jnp.zeros((B, L, D)), context()))['params']


def in_two(params, is_split):
  """Each expert twice, or its hidden units in two halves. A token's gates are
  half as large for each, so halves return twice as much."""
  wide = {}
  for name, x in params.items():
    if name == 'router':
      wide[name] = np.repeat(x, 2, axis=1)
    elif not is_split or name == 'down_bias':
      wide[name] = np.repeat(x, 2, axis=0)
    elif name == 'down':
      wide[name] = 2 * x.reshape(2 * E, F // 2, D)
    else:  # [experts, (features,) hidden units]
      wide[name] = np.stack(np.split(x, 2, axis=-1), axis=1).reshape(
          2 * E, *x.shape[1:-1], F // 2)
  return wide


def trained(module, params, name, steps):
  """The parameters after a few steps."""
  optim = base.base().optim
  optim.update(name=name, lr=0.01, warmup_steps=0, schedule='constant',
               weight_decay=0.0, clip_norm=0.0)
  if name == 'adamw':  # whose epsilon does not follow the size of an expert
    optim.eps = 1e-12
  roles = sharding.roles_of_parameters(boxed_shapes(module))
  tx = optimizers.make_optimizer(
      optim, steps, roles,
      mup.learning_rate_factors(module.config, name, roles),
      gradient_factors=mup.gradient_factors(module.config, name, roles))
  random = np.random.default_rng(1)
  x_BLD, wave_BLD = random.normal(size=(2, B, L, D)).astype(np.float32)

  def loss(params):
    y_BLD, report = module.apply({'params': params}, x_BLD, context())
    return (y_BLD * wave_BLD).mean() + report.losses['balance']

  def step(state, _):
    params, opt_state = state
    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return (jax.tree.map(jnp.add, params, updates), opt_state), None

  state = params, tx.init(params)
  return jax.jit(
      lambda state: jax.lax.scan(step, state, length=steps)[0][0])(state)


@pytest.mark.parametrize('name, is_split', [
    ('adamw', False), ('sgd', False), ('muon', False), ('adamw', True),
    ('sgd', True), ('lion', True)])
def test_experts_in_two_are_trained_as_one(name, is_split):
  small, large = built(), built(2, is_split)
  params = models.draw_parameters(nn.meta.unbox(boxed_shapes(small)))
  wide = in_two(params, is_split)
  assert jax.tree.map(np.shape, wide) == jax.tree.map(
      lambda x: x.shape, nn.meta.unbox(boxed_shapes(large)))
  # Halves return other things, so that the router learns to tell them apart.
  steps = 1 if is_split else 3
  after = jax.device_get(trained(small, params, name, steps))
  want = in_two(after, is_split)
  got = trained(large, wide, name, steps)
  if is_split:
    del want['router']
  for path in want:
    assert np.abs(want[path] - wide[path]).max() > 1e-5, path
    np.testing.assert_allclose(got[path], want[path], rtol=1e-4, atol=1e-5,
                               err_msg=path)


@pytest.mark.parametrize('init', ['fan_in', 'scaled_normal'])
def test_split_experts_are_born_as_large(init):
  """The two halves of an expert return twice as much each, at half the gate."""
  deviations = []
  for module in (built(init=init), built(2, is_split=True, init=init)):
    params = nn.meta.unbox(module.init(
        jax.random.key(0), jnp.zeros((B, L, D)), context()))['params']
    deviations.append([float(np.std(params[n])) for n in ('up', 'down')])
  up, down = np.array(deviations[1]) / deviations[0]
  assert up == pytest.approx(1, rel=0.15) and down == pytest.approx(2, rel=0.15)


def test_a_step_that_is_a_share_of_a_matrix_knows_its_first_size():
  module = built(4)
  roles = sharding.roles_of_parameters(boxed_shapes(module))
  for name, is_hyperball in (('adafactor', False), ('muon', True)):
    rates = paths.flatten_by_path(mup.learning_rate_factors(
        module.config, name, roles, is_hyperball))
    assert (rates['up'], rates['down']) == (1, 0.5)


@pytest.mark.parametrize('changes, word', [
    (dict(normalize_gates=False), 'gates that do not sum to 1: choose'),
    (dict(mup_base_top_k=1), 'gates that do not sum to 1: choose'),
    (dict(zero_experts=1), 'no rule for model.moe.zero_experts 1: set it'),
    (dict(router='softmax_bias'), "no rule for model.moe.router 'softmax")])
def test_what_has_no_rule_over_experts_is_refused(changes, word):
  with pytest.raises(ValueError, match=word):
    built(2, moe=changes)
