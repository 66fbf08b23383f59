"""The state of a run, and its training and evaluation steps.

The loss of a batch is the weighted mean over all of its tokens (of BERT's
second task, over its rows), however many micro-batches or devices they are
spread over, plus the auxiliary losses of the model (experts' balance), of
which a micro-batch counts by its tokens. A step whose loss or gradient is not
finite, as of a batch with nothing to predict, changes no parameter; it is
counted.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import struct
import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import jax.numpy as jnp
import ml_collections
import optax

from architectures.parts import roles, sharding
from architectures.parts.moe import layer as moe
from training import objectives
from training.distributed import devices
from training.objectives.record import Mean
from training.optim import mup, optimizers, shares

STREAMS = ('dropout', 'router')  # what a model draws at random


@struct.dataclass
class TrainState:
  """What a checkpoint holds.

  Attributes:
    step: steps taken, skipped ones included: the index of the next batch.
    params: the parameters.
    opt_state: the optimiser's state.
    bad_steps: steps skipped because a loss or gradient was not finite.
    bad_in_row: of these, the ones since the last good step.
    ema: the average of the parameters that are trained (optim/shares.py);
      None: optim.ema is 0.
  """
  step: jax.Array
  params: Any
  opt_state: Any
  bad_steps: jax.Array
  bad_in_row: jax.Array
  ema: Any = None


@functools.lru_cache(maxsize=64)  # a program asks for the same ones often
def abstract_params(module: nn.Module):
  """Returns the boxed parameters' shapes; nothing is computed."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(module.init, jax.random.key(0), tokens)['params']


def parameter_shapes(module: nn.Module):
  """Returns the parameters' shapes alone, out of their boxes; in a run's
  context `nn.meta.unbox` would constrain them to its mesh."""
  return jax.tree.map(
      lambda box: box.value if nn.meta.is_axis_metadata(box) else box,
      abstract_params(module), is_leaf=nn.meta.is_axis_metadata)


def parameter_roles(module: nn.Module):
  """Returns the Role of each parameter of `module`, as a tree.

  Raises:
    RequestError: for a parameter that declares none.
  """
  return roles.read(abstract_params(module))


def optimizer(module: nn.Module, optim: ml_collections.ConfigDict,
              steps: int) -> optax.GradientTransformation:
  """Returns config.optim's optimiser for the parameters of `module`."""
  optimizers.check_optim(optim)
  return optimizer_unchecked(module, optim, steps)


def optimizer_unchecked(module: nn.Module, optim: ml_collections.ConfigDict,
                        steps: int) -> optax.GradientTransformation:
  """`optimizer`, of which some fields may be traced."""
  tree = parameter_roles(module)
  return optimizers.make(optim, steps, tree,
                          mup.rates(module.config, optim.name, tree),
                          parameter_shares(module, optim))


def parameter_shares(module: nn.Module, optim: ml_collections.ConfigDict):
  """Returns the share of the learning rate that each parameter of `module`
  has, None where all have the whole; see shares.of."""
  if not (optim.freeze or module.config.lora.rank) and optim.layer_decay == 1:
    return None
  return shares.of(optim, parameter_roles(module), parameter_shapes(module),
                   adapted=module.config.lora.rank > 0)


def abstract_state(module: nn.Module, tx: optax.GradientTransformation,
                   mesh: Mesh, rules: str, optim: ml_collections.ConfigDict
                   ) -> TrainState:
  """Returns the state's shapes with their shardings: to plan, to make and to
  restore it. What is averaged lies where its parameter lies."""
  boxed = abstract_params(module)
  params = nn.meta.unbox(boxed)
  shardings = devices.param_shardings(boxed, mesh, rules)
  whole = NamedSharding(mesh, PartitionSpec())
  parts = parameter_shares(module, optim)
  shapes = jax.eval_shape(lambda p: _make(p, tx, optim, parts), params)
  places = TrainState(
      whole, shardings,
      optimizers.opt_state_shardings(tx, params, shardings), whole, whole,
      shares.trained(parts, shardings) if optim.ema else None)
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, places)


# 2^32 over the golden ratio: multiples of it lie far from each other.
_APART = 0x9E3779B9


def initial_seed(config: ml_collections.ConfigDict) -> jax.Array:
  """Returns what the first parameters are drawn from, a uint32: `seed`, where
  init_seed is 0. Either field may be traced."""
  seed, apart = (jnp.asarray(x, jnp.uint32)
                 for x in (config.seed, config.init_seed))
  return seed + apart * jnp.uint32(_APART)


def init_state(module: nn.Module, tx: optax.GradientTransformation,
               key: jax.Array, optim: ml_collections.ConfigDict
               ) -> TrainState:
  """Returns a new state, a pure function of its key."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return _make(nn.meta.unbox(module.init(key, tokens)['params']), tx, optim,
               parameter_shares(module, optim))


def _make(params: Any, tx: optax.GradientTransformation,
          optim: ml_collections.ConfigDict, parts: Any) -> TrainState:
  # Arrays of their own each: donated, a shared one would be freed twice.
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params),
                    jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32),
                    shares.start_average(optim, parts, params))


def make_train_step(module: nn.Module, tx: optax.GradientTransformation,
                    config: ml_collections.ConfigDict) -> Callable:
  """Returns step(state, batch) -> (state, metrics), to be jitted with the
  state donated; trace it under the mesh and sharding.rules.

  Metrics are of the whole batch: loss (nats per token), the objective's other
  figures, grad_norm, param_norm, learning_rate, bad_steps, bad_in_row, and of
  experts each auxiliary loss as aux/NAME, each health figure, by layer, as
  health/NAME, and the tokens that these are means over as health/tokens.
  """
  objective = objectives.of(config)
  schedule = optimizers.rate(config.optim, config.train.steps)
  parts = parameter_shares(module, config.optim)

  def loss_fn(params: Any, batch: Any, key: jax.Array, whole: Any):
    """Of a micro-batch: its share in whole['loss'] times the loss, its
    figures, and its share in the auxiliary losses and the health panel, and
    in the loads that move biases."""
    rngs = {name: jax.random.fold_in(key, i)
            for i, name in enumerate(STREAMS)}
    output = objective.apply(module, params, batch, deterministic=False,
                             rngs=rngs)
    total, figures = objective.loss(output, batch, config, whole)
    if not output.aux:
      return total, (figures, {}, {})
    share = objective.tokens(batch) / whole['tokens']
    aux = {name: share * value
           for name, value in output.aux['losses'].items()}
    panel = {f'health/{name}': share * value
             for name, value in output.aux['health'].items()}
    panel |= {f'aux/{name}': value for name, value in aux.items()}
    loads = {path: share * load for path, load in output.aux['loads'].items()}
    return (total + whole[objective.main] * sum(aux.values()),
            (figures, panel, loads))

  def step(state: TrainState, batch: Any):
    # Differentiated by what is trained alone: a frozen product has no gradient
    # of its weights.
    own = shares.trained(parts, state.params)
    grad_fn = jax.grad(lambda own, *args: loss_fn(
        shares.whole(parts, own, state.params), *args), has_aux=True)
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    whole = objective.weights(batch) | {'tokens': objective.tokens(batch)}
    grads, (figures, panel, loads) = _accumulate(
        grad_fn, own, batch, key, whole, config.train.grad_accumulation)
    grads = shares.without_frozen_rows(parts, jax.tree.map(
        lambda g: g / whole[objective.main], grads))
    metrics = objective.means(figures) | panel
    if panel:
      metrics['health/tokens'] = whole['tokens']
    grad_norm = optax.tree.norm(grads)
    ok = jnp.isfinite(grad_norm) & jnp.isfinite(metrics['loss'])
    own, opt_state = optimizers.update_if(
        ok, tx, grads, state.opt_state, own)
    own = shares.with_frozen_rows(
        parts, moe.move_biases(config.model, own, loads, ok), own)
    params = shares.whole(parts, own, state.params)
    bad_in_row = jnp.where(ok, 0, state.bad_in_row + 1)
    bad_steps = state.bad_steps + jnp.where(ok, 0, 1)
    ema = shares.update_average(config.optim, state.ema, own,
                                state.step + 1 - bad_steps, ok)
    metrics |= dict(
        grad_norm=grad_norm, param_norm=_norm(params),
        learning_rate=schedule(state.step - state.bad_steps),
        bad_steps=bad_steps, bad_in_row=bad_in_row)
    return TrainState(state.step + 1, params, opt_state, bad_steps,
                      bad_in_row, ema), metrics

  return step


def _norm(tree: Any) -> jax.Array:
  """The joint norm of all leaves, in float32 whatever they are in."""
  return optax.tree.norm(
      jax.tree.map(lambda x: x.astype(jnp.float32), tree))


def _accumulate(grad_fn: Callable, params: Any, batch: Any, key: jax.Array,
                whole: Any, parts: int):
  """Sums gradients and figures over `parts` micro-batches, by a scan.

  Micro-batch i takes rows i, i + parts, ...: each device cuts up its own.
  Gradients in bfloat16 add up in float32.
  """
  if parts == 1:
    return grad_fn(params, batch, key, whole)

  def cut(x: jax.Array):
    x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    return sharding.constrain(x, None, 'batch', *(None,) * (x.ndim - 2))

  def add(total: Any, part: Any):
    i, micro = part
    result = grad_fn(params, micro, jax.random.fold_in(key, i), whole)
    return jax.tree.map(jnp.add, total, result), None

  micros = jax.tree.map(cut, batch)
  first = jax.tree.map(lambda x: x[0], micros)
  zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
      jax.eval_shape(grad_fn, params, first, key, whole))
  return jax.lax.scan(add, zeros, (jnp.arange(parts), micros))[0]


def make_eval_step(module: nn.Module, config: ml_collections.ConfigDict
                   ) -> Callable:
  """Returns step(params, batch) -> {figure: Mean}, without label
  smoothing, z-loss or auxiliary losses."""
  objective = objectives.of(config)
  config = config.copy_and_resolve_references()
  config.train.z_loss = config.train.label_smoothing = 0.0

  def step(params: Any, batch: Any) -> dict[str, Mean]:
    return objective.figures(objective.apply(module, params, batch), batch,
                             config)

  return step
