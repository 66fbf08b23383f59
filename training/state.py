"""The state of a run, born sharded."""

import functools
from typing import Any

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import optax

from training.distributed import devices
from training.optim import mup
from training.optim import optimizers


@struct.dataclass
class TrainState:
  """What a checkpoint holds.

  Attributes:
    step: steps taken, skipped ones included: the index of the next batch.
    params: the parameters.
    opt_state: the optimiser's state.
    bad_steps: steps skipped because a loss or gradient was not finite.
    bad_in_row: of these, the ones since the last good step.
  """
  step: jax.Array
  params: Any
  opt_state: Any
  bad_steps: jax.Array
  bad_in_row: jax.Array


@functools.lru_cache(maxsize=64)  # a program asks for the same ones often
def abstract_params(module: nn.Module):
  """Returns the boxed parameters' shapes; nothing is computed."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(module.init, jax.random.key(0), tokens)['params']


def optimizer(module: nn.Module, optim, steps: int
              ) -> optax.GradientTransformation:
  """Returns config.optim's optimiser for the parameters of `module`."""
  params = nn.meta.unbox(abstract_params(module))
  return optimizers.make(optim, steps, params,
                         mup.rates(module.config, optim.name, params))


def abstract(module: nn.Module, tx: optax.GradientTransformation, mesh: Mesh,
             rules: str) -> TrainState:
  """Returns the state's shapes with their shardings: to plan, to make and to
  restore it."""
  boxed = abstract_params(module)
  params = nn.meta.unbox(boxed)
  shardings = devices.param_shardings(boxed, mesh, rules)
  whole = NamedSharding(mesh, PartitionSpec())
  shapes = jax.eval_shape(lambda p: _make(p, tx), params)
  places = TrainState(
      whole, shardings,
      optimizers.opt_state_shardings(tx, params, shardings), whole, whole)
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, places)


def create(module: nn.Module, tx: optax.GradientTransformation,
           state: TrainState, seed: int) -> TrainState:
  """Returns a new state, each shard computed where `state` says it lies."""

  shardings = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(functools.partial(init, module, tx), out_shardings=shardings)(
      jax.random.key(seed))


def init(module: nn.Module, tx: optax.GradientTransformation,
         key: jax.Array) -> TrainState:
  """Returns a new state, a pure function of its key."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return _make(nn.meta.unbox(module.init(key, tokens)['params']), tx)


def _make(params, tx) -> TrainState:
  # Arrays of their own each: donated, a shared one would be freed twice.
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params),
                    jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
