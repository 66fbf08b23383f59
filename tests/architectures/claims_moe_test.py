"""What docs/architectures.md claims of mixtures of experts, each shown: what a
token costs, what the gates are, and what evens out the load."""

import dataclasses
import functools
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import architectures
from architectures.parts.context import Context
from architectures.parts.moe import health
from architectures.parts.moe import layer as moe
from architectures.parts.moe import routing
from tests.helpers import models
from training.costs import flops
from training.costs import totals

EXPERTS, WIDTH, TOKENS = 4, 16, 128


def get(system, size):
  return importlib.import_module(f'configs.{system}').get_config(size)


@functools.cache
def counted(system, size):
  return totals.count(get(system, size))


def test_mixtral_has_46_7b_parameters_and_uses_12_9b():
  figures = counted('mixtral', '8x7b')
  assert figures['parameters'] == 46_702_792_704  # 46.7B
  assert figures['active_parameters'] == 12_879_925_248  # 12.9B
  # "8x7B" is neither: only the networks are there eightfold.
  dense = counted('llama', '7b')['parameters']
  assert figures['parameters'] < 0.87 * 8 * dense
  experts = figures['by_part']['ffn']
  assert experts - figures['active_by_part']['ffn'] == experts * 6 // 8
  shared = figures['parameters'] - experts
  assert shared == figures['active_parameters'] - experts * 2 // 8


def test_a_token_costs_what_its_experts_cost():
  config = get('mixtral', '8x7b').model
  def cost(**changes):
    return flops.forward_flops_per_token(
        dataclasses.replace(architectures.resolve(config), **changes), 4096)
  sparse = cost()
  router = 32 * 2 * 4096 * 8
  twice = cost(ffn='swiglu', d_ff=2 * 14336)  # as much at work
  assert sparse == pytest.approx(twice + router, rel=1e-9)
  assert router < 1e-3 * sparse
  eightfold = cost(ffn='swiglu', d_ff=8 * 14336)  # as many parameters
  assert 3.4 < eightfold / sparse < 3.6
  # 2 FLOPs a parameter at work, but for the table of the input; and attention.
  weights = counted('mixtral', '8x7b')['active_parameters'] - (
      4096 * 32000 + (2 * 32 + 1) * 4096)  # the table, and 65 norms
  attention = 32 * 4 * 4096 * (4096 + 1) / 2
  assert sparse == pytest.approx(2 * weights + attention, rel=1e-9)


@pytest.mark.long
def test_more_experts_cost_no_more_flops():
  def figures(size):
    config = totals.resolved(get('switch', size))
    shapes = jax.eval_shape(architectures.build(config).init,
                            jax.random.key(0), models.tokens())
    return (sum(x.size for x in jax.tree.leaves(shapes)),
            flops.forward_flops_per_token(config, 512, 512))
  (few, cheap), (many, dear) = figures('base-8'), figures('base-256')
  assert many / few > 20 and dear / cheap < 1.05


def test_what_the_gates_are():
  logits_TE = jax.random.normal(jax.random.key(0), (6, 8))
  inputs = routing.Inputs(logits_TE, jnp.ones(6, bool))
  m = architectures.resolve(models.config('mixtral')).moe
  def gates(**changes):
    r = routing.topk(dataclasses.replace(m, **changes), inputs)
    return r.gate_A.reshape(6, -1), r.expert_A.reshape(6, -1)
  gate_TX, expert_TX = gates(normalize_gates=True)
  chosen_TX = jnp.take_along_axis(logits_TE, expert_TX, 1)
  np.testing.assert_allclose(  # = the softmax over the chosen logits alone
      gate_TX, jax.nn.softmax(chosen_TX, -1), rtol=1e-5)
  plain_TX, _ = gates(normalize_gates=False)
  assert (plain_TX.sum(1) < 0.99).all()  # the other experts' share is lost
  np.testing.assert_array_equal(expert_TX, jnp.argsort(-logits_TE, 1)[:, :2])


def test_importance_must_be_normalised():
  """E sum(importance^2) of the sums of probabilities grows with T^2; as shares
  it is 1 in balance, whatever the batch."""
  for tokens in (64, 4096):
    probs_TE = jnp.full((tokens, 8), 1 / 8)
    bare = 8 * float(jnp.square(probs_TE.sum(0)).sum())
    assert bare == pytest.approx(tokens ** 2)
    assert float(health.importance_loss(probs_TE.mean(0))) == pytest.approx(1)


def test_importance_is_blind_to_a_load_that_probabilities_hide():
  """All choose expert 0 by a hair: importance is content, and its gradient
  nothing; Switch's loss pushes expert 0 down."""
  logits_TE = jnp.zeros((64, 8)).at[:, 0].set(1e-4)
  expert_T = jnp.argmax(logits_TE, 1)
  assert health.counts(expert_T, 8).tolist() == [64] + [0] * 7
  mean_probs = lambda logits_TE: jax.nn.softmax(logits_TE, -1).mean(0)
  push = {
      'importance': jax.grad(lambda x: health.importance_loss(mean_probs(x))),
      'switch': jax.grad(lambda x: health.switch_loss(expert_T, mean_probs(x)))}
  push = {name: float(g(logits_TE).sum(0)[0]) for name, g in push.items()}
  assert abs(push['importance']) < 1e-3 < 0.5 < push['switch']


# A router that starts collapsed, all tokens on expert 0, on a task that needs
# all four: tokens come in four kinds, each with its own linear map to learn.
REMEDIES = {
    'none': {},
    'importance': dict(balance_loss='importance', balance_weight=0.1),
    'switch': dict(balance_loss='switch', balance_weight=0.1),
    'jitter': dict(jitter=0.01),
    'noise': dict(logit_noise=3.0),
    'capacity': dict(capacity_factor=1.25, eval_capacity_factor=1.25),
}


def train_router(remedy: str, seed: int = 0, steps: int = 100) -> dict:
  """Returns the panel {load_max, unused, dropped, task}, 'train' the mean of
  the last 20 steps and 'eval' that of fresh tokens without noise."""
  config = architectures.resolve(models.config(
      d_model=WIDTH, d_ff=16, ffn='moe',
      moe=dict(num_experts=EXPERTS, top_k=1, router='switch', ffn='relu',
               dispatch='einsum', balance_weight=0.0) | REMEDIES[remedy]))
  layer, ctx = moe.MoE(config), Context(jnp.arange(TOKENS)[None])
  keys = jax.random.split(jax.random.key(seed), 5)
  centre_ED = jax.random.normal(keys[0], (EXPERTS, WIDTH))
  map_EDD = jax.random.normal(keys[1], (EXPERTS, WIDTH, WIDTH)) / WIDTH ** 0.5
  def batch(key):
    kind_T = jax.random.randint(key, (TOKENS,), 0, EXPERTS)
    x_TD = centre_ED[kind_T] + 0.5 * jax.random.normal(key, (TOKENS, WIDTH))
    x_TD = x_TD.at[:, 0].set(1.0)
    return x_TD, jnp.einsum('TD,TDF->TF', x_TD, map_EDD[kind_T])
  def loss(params, key, train):
    x_TD, y_TD = batch(key)
    y_BLD, aux = layer.apply({'params': params}, x_TD[None], ctx.replace(
        deterministic=not train), rngs={'router': key})
    task = jnp.square(y_BLD[0] - y_TD).mean()
    return task + sum(aux['losses'].values()), aux['health'] | {'task': task}
  params = nn.meta.unbox(jax.jit(lambda: layer.init(
      keys[2], batch(keys[2])[0][None], ctx))())
  params = params['params']
  params['router'] = params['router'].at[0, 0].add(1.0)  # x[0] is always 1
  tx = optax.adam(5e-3)
  @jax.jit
  def run(params):
    def step(carry, key):
      gradient, panel = jax.grad(loss, has_aux=True)(carry[0], key, True)
      updates, state = tx.update(gradient, carry[1])
      return (optax.apply_updates(carry[0], updates), state), panel
    carry, panels = jax.lax.scan(step, (params, tx.init(params)),
                                 jax.random.split(keys[3], steps))
    return {'train': jax.tree.map(lambda x: x[-20:].mean(0), panels),
            'eval': loss(carry[0], keys[4], False)[1]}
  return {when: {name: float(panel[name]) for name in (
      'load_max', 'unused', 'dropped', 'task')}
          for when, panel in run(params).items()}


@pytest.mark.slow
@pytest.mark.parametrize('remedy', [
    pytest.param(remedy, marks=[pytest.mark.long] * (
        remedy in ('importance', 'jitter'))) for remedy in REMEDIES])
def test_what_evens_out_the_load(remedy):
  panel = train_router(remedy)
  print(remedy, *(f'{when} {name} {x:.2f}' for when, figures in panel.items()
                  for name, x in figures.items()), sep='  ')
  train, fresh = panel['train'], panel['eval']
  if remedy in ('none', 'jitter', 'capacity'):  # it stays collapsed
    assert fresh['load_max'] > 3.9 and fresh['unused'] == 0.75
  if remedy == 'jitter':  # of 1 %, as in Switch
    assert train['load_max'] > 3.9
  if remedy == 'importance':  # evens out probabilities, and load with them
    assert fresh['load_max'] < 3.6
  if remedy == 'switch':
    assert fresh['load_max'] < 2 and fresh['unused'] == 0
  if remedy == 'noise':  # all are tried, but only while there is noise
    assert train['unused'] < 0.05 and train['load_max'] < 3
    assert fresh['unused'] > 0 and fresh['load_max'] > train['load_max'] + 0.3
  # Capacity bounds what an expert computes, by refusing the rest.
  dropped = 1 - 1.25 / EXPERTS if remedy == 'capacity' else 0
  assert train['dropped'] == pytest.approx(dropped, abs=0.01)
