"""One training step and one evaluation step, each a single jit.

The loss of a batch is the weighted mean over all of its tokens, however many
micro-batches or devices they are spread over, plus the auxiliary losses of
the model (experts' balance). A step whose loss or gradient is not finite
changes no parameter; it is counted.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from architectures.parts import routing
from architectures.parts import sharding
from training import objectives
from training import optimizers
from training import schedules
from training.state import TrainState

STREAMS = ('dropout', 'router')  # what a model draws at random


def make_train_step(module: nn.Module, tx: optax.GradientTransformation,
                    config) -> Callable:
  """Returns step(state, batch) -> (state, metrics), to be jitted with the
  state donated; trace it under the mesh and sharding.rules.

  Metrics are scalars of the whole batch: loss (nats per token), accuracy,
  grad_norm, param_norm, learning_rate, bad_steps, bad_in_row, each auxiliary
  loss as aux/NAME and each health figure, by layer, as health/NAME.
  """
  objective = objectives.OBJECTIVES[config.objective]
  schedule = schedules.rate(config.optim, config.train.steps)

  def loss_fn(params, batch, key):
    rngs = {name: jax.random.fold_in(key, i)
            for i, name in enumerate(STREAMS)}
    output = objective.apply(module, params, batch, deterministic=False,
                             rngs=rngs)
    loss_sum, figures = objective.loss(output, batch, config)
    losses = output.aux.get('losses', {}) if output.aux else {}
    weight = figures['weight']
    total = loss_sum + weight * sum(losses.values())
    sums = figures | {'loss': loss_sum} | {
        f'aux/{name}': weight * value for name, value in losses.items()}
    health = output.aux['health'] if output.aux else {}
    return total, (sums, health)

  grad_fn = jax.grad(loss_fn, has_aux=True)

  def step(state: TrainState, batch):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    grads, sums, health = _accumulate(
        grad_fn, state.params, batch, key, config.train.grad_accumulation)
    weight = jnp.maximum(sums.pop('weight'), 1e-9)
    grads = jax.tree.map(lambda g: g / weight, grads)
    metrics = {name: value / weight for name, value in sums.items()}
    metrics |= {f'health/{name}': value for name, value in health.items()}
    grad_norm = optax.tree.norm(grads)
    ok = jnp.isfinite(grad_norm) & jnp.isfinite(metrics['loss'])
    params, opt_state = optimizers.update_if(
        ok, tx, grads, state.opt_state, state.params)
    if config.model.ffn == 'moe' and config.model.moe.router == 'sigmoid':
      params = routing.update_bias(params, health['load_E'],
                                   ok * config.model.moe.bias_rate)
    bad_in_row = jnp.where(ok, 0, state.bad_in_row + 1)
    bad_steps = state.bad_steps + jnp.where(ok, 0, 1)
    metrics |= dict(
        grad_norm=grad_norm, param_norm=_norm(params),
        learning_rate=schedule(state.step - state.bad_steps),
        bad_steps=bad_steps, bad_in_row=bad_in_row)
    return TrainState(state.step + 1, params, opt_state, bad_steps,
                      bad_in_row), metrics

  return step


def _norm(tree) -> jax.Array:
  """The joint norm of all leaves, in float32 whatever they are in."""
  return optax.tree.norm(
      jax.tree.map(lambda x: x.astype(jnp.float32), tree))


def _accumulate(grad_fn, params, batch, key, parts: int):
  """Sums gradients and figures over `parts` micro-batches, by a scan.

  Micro-batch i takes rows i, i + parts, ...: each device cuts up its own.
  Gradients in bfloat16 add up in float32.
  """
  if parts == 1:
    grads, (sums, health) = grad_fn(params, batch, key)
    return grads, sums, health

  def cut(x):
    x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    return sharding.constrain(x, None, 'batch', *(None,) * (x.ndim - 2))

  def add(total, part):
    i, micro = part
    result = grad_fn(params, micro, jax.random.fold_in(key, i))
    return jax.tree.map(jnp.add, total, result), None

  micros = jax.tree.map(cut, batch)
  first = jax.tree.map(lambda x: x[0], micros)
  zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
      jax.eval_shape(grad_fn, params, first, key))
  (grads, (sums, health)), _ = jax.lax.scan(
      add, zeros, (jnp.arange(parts), micros))
  return grads, sums, jax.tree.map(lambda x: x / parts, health)


def make_eval_step(module: nn.Module, config) -> Callable:
  """Returns step(params, batch) -> sums: loss, weight and the objective's own
  counts, without label smoothing, z-loss or auxiliary losses."""
  objective = objectives.OBJECTIVES[config.objective]
  config = config.copy_and_resolve_references()
  config.train.z_loss = config.train.label_smoothing = 0.0

  def step(params: Any, batch) -> dict[str, jax.Array]:
    output = objective.apply(module, params, batch)
    loss_sum, figures = objective.loss(output, batch, config)
    return figures | {'loss': loss_sum}

  return step
