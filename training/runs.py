"""The part that train.py, eval.py and the tools share of a run: its model
resolved, its state, its training and evaluation steps, and its mesh.

The loss of a batch is the weighted mean over all of its tokens (over its rows,
for BERT's second task), however many micro-batches or devices they are spread
over, plus the auxiliary losses of the model (experts' balance), of which a
micro-batch counts by its tokens. A step whose loss or gradient is not finite,
as that of a batch with nothing to predict, changes no parameter; it is counted.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import math
import os
import sys
from typing import Any, NamedTuple

from etils import epath
from flax import struct
import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import architectures
from architectures.parts import heads, sharding
from architectures.parts.attention import kernels
from architectures.parts.config import ModelConfig
from architectures.parts.moe import grouped
from architectures.parts.moe import layer as moe
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.sharding import abstract_params, parameter_shapes
from common.errors import RequestError, require
from configs import sharding as tables
from training import objectives
from training.data import tokenizers
from training.distributed import devices
from training.objectives import Mean
from training.objectives import pipeline
from training.optim import mup, optimizers, shares
from training.workdir import provenance, run_config

# The names of the random streams that a model draws from.
RANDOM_STREAMS = ('dropout', 'router')
# The fields of the config that a compiled step takes as inputs, and the type of
# each: runs that differ in these fields alone share one compiled step.
TYPE_OF_TRACED_FIELD = {
    'seed': np.uint32,
    'init_seed': np.uint32,
    'optim.lr': np.float32,
    'optim.weight_decay': np.float32,
    'optim.warmup_steps': np.float32,
    'model.init_stddev': np.float32,
    'model.init_scale': np.float32,
}


@struct.dataclass
class TrainState:
  """The state that a checkpoint holds.

  Attributes:
    step: the number of steps taken, skipped ones included, which is the index
      of the next batch.
    params: the parameters of the model, a tree of arrays.
    opt_state: the optimiser's state.
    bad_steps: the number of steps that were skipped because a loss or gradient
      was not finite.
    bad_in_row: the number of them since the last good step.
    ema: the average of the parameters that are trained (optim/shares.py);
      None: optim.ema is 0.
  """
  step: jax.Array
  params: Any
  opt_state: Any
  bad_steps: jax.Array
  bad_in_row: jax.Array
  ema: Any = None


def parameter_roles(module: nn.Module):
  """Returns the Role of each parameter of `module` (which of its axes a product
  sums over, and whether it is hidden, an embedding or gives logits), as a tree.

  Raises:
    RequestError: for a parameter that declares no role.
  """
  return sharding.roles_of_parameters(abstract_params(module))


def build_optimizer(module: nn.Module, optim: ml_collections.ConfigDict,
                    steps: int) -> optax.GradientTransformation:
  """Builds the optimiser that a run's config describes.

  Args:
    module: the Flax module of the model, whose parameters are to be trained.
    optim: config.optim. Some of its fields may be traced values; the others are
      checked by preflight.check_config.
    steps: train.steps, over which the learning rate is scheduled.
  """
  # A Role says what a parameter is used for, and along which axes. The learning
  # rate of a parameter is multiplied by the factor that muP gives it, and by
  # its share: 0 where it is frozen, less than 1 in early layers with
  # layer_decay.
  roles = parameter_roles(module)
  rate_multipliers = mup.learning_rate_factors(
      module.config, optimizer=optim.name, roles=roles,
      is_hyperball=optim.hyperball)
  gradient_factors = mup.gradient_factors(
      module.config, optimizer=optim.name, roles=roles)
  rate_shares = parameter_shares(module, optim)
  return optimizers.make_optimizer(
      optim, steps=steps, roles=roles, rate_multipliers=rate_multipliers,
      rate_shares=rate_shares, gradient_factors=gradient_factors)


def parameter_shares(module: nn.Module, optim: ml_collections.ConfigDict):
  """Returns the factor by which the learning rate of each parameter is
  multiplied, as a tree: 0 for frozen parameters, and less than 1 for those of
  early layers if optim.layer_decay is less than 1.

  Args:
    module: the Flax module of the model.
    optim: config.optim, with the fields that freeze parameters or lower their
      learning rate.

  Returns:
    The tree; None if every parameter is trained with the whole learning rate.

  Raises:
    RequestError: for optim.layer_decay in a model that runs its layers in a
      loop.
  """
  loop = module.config.loop
  if optim.layer_decay != 1 and loop != 'none':
    raise RequestError(f'optim.layer_decay is {optim.layer_decay}, and with '
                       f'model.loop {loop!r} a layer is run at several depths: '
                       'leave it at 1')
  # Low-rank adapters are trained alone: the parameters of the model are frozen.
  has_adapters = module.config.lora.rank > 0
  if (optim.freeze or has_adapters
      or optim.layer_decay != 1 or optim.table_rate != 1):
    roles = parameter_roles(module)
    shapes = parameter_shapes(module)
    return shares.learning_rate_shares(
        optim, roles=roles, shapes=shapes, adapted=has_adapters)
  return None


def abstract_state(module: nn.Module, tx: optax.GradientTransformation,
                   mesh: Mesh, rules: str, optim: ml_collections.ConfigDict
                   ) -> TrainState:
  """Describes the training state of a run, without making it: a
  jax.ShapeDtypeStruct for each array, with its shape, dtype and sharding. It
  serves to plan a run, to initialise its state, and to restore a checkpoint.

  Args:
    module: the Flax module of the model.
    tx: the optimiser, an optax.GradientTransformation.
    mesh: the mesh of devices.
    rules: the name of the table that maps the names of parameters' axes to axes
      of the mesh (mesh.rules).
    optim: config.optim, the fields of the optimiser.
  """
  boxed_params = abstract_params(module)
  params = nn.meta.unbox(boxed_params)
  rate_shares = parameter_shares(module, optim)
  make_state = functools.partial(
      _make_first_state, tx=tx, optim=optim, rate_shares=rate_shares)
  shapes = jax.eval_shape(make_state, params)

  # The arrays of the optimiser and the moving average (ema) lie where their
  # parameters lie. The counts are on every device.
  param_shardings = devices.param_shardings(boxed_params, mesh=mesh,
                                            rules=rules)
  replicated = NamedSharding(mesh, PartitionSpec())
  ema_shardings = None
  if optim.ema:
    ema_shardings = shares.keep_trained(rate_shares, param_shardings)
  shardings = TrainState(
      step=replicated,
      params=param_shardings,
      opt_state=optimizers.opt_state_shardings(tx, params=params,
                                               shardings=param_shardings),
      bad_steps=replicated,
      bad_in_row=replicated,
      ema=ema_shardings)

  def with_sharding(array: jax.ShapeDtypeStruct, array_sharding: NamedSharding
                    ) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype,
                                sharding=array_sharding)

  return jax.tree.map(with_sharding, shapes, shardings)


# The distance between the seeds of two init_seeds, 2^32 over the golden ratio:
# multiples of it modulo 2^32 lie far from each other.
_INIT_SEED_STRIDE = 0x9E3779B9
# With this init_seed (the inverse of the stride modulo 2^32), a run of seed s
# begins with the parameters of a run of seed s + 1.
INIT_SEED_OF_NEXT_SEED = pow(_INIT_SEED_STRIDE, -1, 2 ** 32)


def seed_of_parameters(config: ml_collections.ConfigDict) -> jax.Array:
  """Returns the seed from which the initial parameters are drawn, a uint32:

    seed + init_seed * stride  mod 2^32,

  which is `seed` where init_seed is 0. Either field may be traced.
  """
  seed = jnp.asarray(config.seed, jnp.uint32)
  init_seed = jnp.asarray(config.init_seed, jnp.uint32)
  return seed + init_seed * jnp.uint32(_INIT_SEED_STRIDE)


def init_state(module: nn.Module, tx: optax.GradientTransformation,
               key: jax.Array, optim: ml_collections.ConfigDict
               ) -> TrainState:
  """Makes the training state before the first step, with parameters that are
  drawn at random.

  Args:
    module: the Flax module of the model.
    tx: the optimiser, an optax.GradientTransformation.
    key: the random key. Nothing else in the state is random.
    optim: config.optim, the fields of the optimiser.
  """
  # The shapes of the parameters do not depend on the input, so one token is
  # enough. unbox removes the names of axes that Flax keeps with each parameter.
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = nn.meta.unbox(module.init(key, tokens)['params'])
  rate_shares = parameter_shares(module, optim)
  return _make_first_state(params, tx=tx, optim=optim, rate_shares=rate_shares)


def _make_first_state(params: Any, tx: optax.GradientTransformation,
                      optim: ml_collections.ConfigDict, rate_shares: Any
                      ) -> TrainState:
  """Makes the training state before the first step, with given parameters.

  Args:
    params: the parameters of the model, a tree of arrays.
    tx: the optimiser, an optax.GradientTransformation.
    optim: config.optim, the fields of the optimiser.
    rate_shares: the factor of each parameter's learning rate, 0 where frozen,
      as `parameter_shares` returns it.
  """
  # Each count must be an array of its own. The training step donates the state,
  # and an array that it has twice would be freed twice.
  step = jnp.zeros((), jnp.int32)
  bad_steps = jnp.zeros((), jnp.int32)
  bad_in_row = jnp.zeros((), jnp.int32)
  opt_state = tx.init(params)
  average = shares.start_average(optim, shares=rate_shares, params=params)
  return TrainState(
      step=step, params=params, opt_state=opt_state, bad_steps=bad_steps,
      bad_in_row=bad_in_row, ema=average)


def make_train_step(module: nn.Module, tx: optax.GradientTransformation,
                    config: ml_collections.ConfigDict,
                    taps: Sequence[Callable] = ()) -> Callable:
  """Returns the function step(state, batch) -> (state, metrics) that computes
  the gradient of one batch and updates the parameters. To be jitted with the
  state donated, and traced under the mesh and sharding.rules.

  Args:
    module: the Flax module of the model.
    tx: the optimiser, a pair of functions of Optax (init, update).
    config: the config of the run.
    taps: functions that compute further metrics of a step, each
      (params, grads) -> {name: array}; see Hook.trace.

  Returns:
    The step. Its metrics are those of the whole batch: loss (nats per token),
    the objective's other figures, grad_norm, param_norm, learning_rate,
    bad_steps and bad_in_row. A model with experts adds each auxiliary loss as
    aux/NAME, each health figure, by layer, as health/NAME, and the tokens that
    these are means over as health/tokens.
  """
  trainer = Trainer(
      module=module, tx=tx, config=config, taps=tuple(taps),
      objective=objectives.find_objective(config),
      schedule=optimizers.learning_rate(config.optim, config.train.steps),
      rate_shares=parameter_shares(module, config.optim))
  return trainer.step


class BatchGradients(NamedTuple):
  """The results of the backward pass over a whole batch.

  Attributes:
    grads: the gradients of the trained parameters, of the mean loss.
    metrics: the figures of the objective and of the experts, by name.
    expert_loads: how the experts were loaded, by the path of the layer.
  """
  grads: Any
  metrics: dict[str, jax.Array]
  expert_loads: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The training step of a run, and what it is made of.

  Attributes:
    module: the Flax module of the model.
    tx: the optimiser, a pair of functions of Optax (init, update).
    config: the config of the run.
    taps: functions that compute further metrics of a step.
    objective: what is learned.
    schedule: the function from the number of updates to the learning rate.
    rate_shares: the factor of each parameter's learning rate, 0 where frozen,
      as `parameter_shares` returns it.
  """
  module: nn.Module
  tx: optax.GradientTransformation
  config: ml_collections.ConfigDict
  taps: tuple[Callable, ...]
  objective: objectives.Objective
  schedule: optax.Schedule
  rate_shares: Any

  def step(self, state: TrainState, batch: Any
           ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after one update, and the metrics of the step.

    Args:
      state: the state before.
      batch: the arrays of the batch, by name.
    """
    # The gradient is that of the trained parameters alone: no product with a
    # frozen weight needs the gradient of that weight. `keep_trained` leaves
    # frozen parameters out of the tree, and `fill_in_frozen` puts them back.
    trained = shares.keep_trained(self.rate_shares, state.params)
    grads, metrics, expert_loads = self._compute_gradients(
        state, trained, batch)

    # The update, which is skipped where the loss or a gradient is not finite.
    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics['loss'])
    updated, opt_state = optimizers.update_if(
        is_finite, tx=self.tx, grads=grads, state=state.opt_state,
        params=trained)
    updated = self._move_biases(updated, expert_loads, is_finite)
    params = shares.fill_in_frozen(self.rate_shares, trained=updated,
                                   params=state.params)

    # The counts of skipped steps, and the average of the parameters.
    bad_in_row = jnp.where(is_finite, 0, state.bad_in_row + 1)
    bad_steps = state.bad_steps + jnp.where(is_finite, 0, 1)
    good_steps = state.step + 1 - bad_steps
    ema = shares.update_average(
        self.config.optim, average=state.ema, params=updated,
        updates=good_steps, ok=is_finite)

    # The other metrics.
    metrics['grad_norm'] = grad_norm
    metrics['param_norm'] = _global_norm(params)
    metrics['learning_rate'] = self.schedule(state.step - state.bad_steps)
    metrics['bad_steps'] = bad_steps
    metrics['bad_in_row'] = bad_in_row
    for tap in self.taps:
      metrics |= tap(state.params, grads)
    new_state = TrainState(
        step=state.step + 1, params=params, opt_state=opt_state,
        bad_steps=bad_steps, bad_in_row=bad_in_row, ema=ema)
    return new_state, metrics

  def _compute_gradients(self, state: TrainState, trained: Any, batch: Any
                         ) -> BatchGradients:
    """Computes the gradients of the mean loss over the whole batch.

    Args:
      state: the state before the step.
      trained: its parameters without the frozen ones.
      batch: the arrays of the batch, by name.
    """
    # Gradients and figures are summed over the batch. The sums are divided by
    # the batch's weight, its number of predicted tokens.
    objective = self.objective
    loss = functools.partial(self._loss_of_trained, all_params=state.params)
    key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
    totals = objective.weights(batch) | {'tokens': objective.tokens(batch)}
    grads, (figures, expert_metrics, expert_loads) = _accumulate_gradients(
        jax.grad(loss, has_aux=True), params=trained, batch=batch, key=key,
        totals=totals, num_micro_batches=self.config.train.grad_accumulation)
    grads = jax.tree.map(lambda g: g / totals[objective.main], grads)
    grads = shares.zero_frozen_layers(self.rate_shares, grads)
    metrics = objective.means(figures) | expert_metrics
    if expert_metrics:
      metrics['health/tokens'] = totals['tokens']
    return BatchGradients(grads=grads, metrics=metrics,
                          expert_loads=expert_loads)

  def _loss_of_trained(self, trained: Any, batch: Any, key: jax.Array,
                       totals: Any, all_params: Any):
    """Returns the loss of a micro-batch and its figures (`_micro_batch_loss`),
    as a function of the trained parameters.

    Args:
      trained: the parameters without the frozen ones.
      batch: the micro-batch.
      key: the random key of the micro-batch.
      totals: the sums over the whole batch.
      all_params: all parameters, of which the frozen ones are read.
    """
    params = shares.fill_in_frozen(self.rate_shares, trained=trained,
                                   params=all_params)
    return _micro_batch_loss(self.module, self.config, params, batch=batch,
                             key=key, totals=totals)

  def _move_biases(self, params: Any, expert_loads: dict[str, jax.Array],
                   is_finite: jax.Array) -> Any:
    """Moves the biases that balance the experts, which have no gradient, by the
    loads of the experts.

    Args:
      params: the trained parameters after the update.
      expert_loads: the loads, by the path of the layer.
      is_finite: whether the step is not skipped.

    Returns:
      The parameters. Frozen layers keep their biases: these are a part of an
      array that holds those of all layers, so their move is undone.
    """
    moved = moe.move_biases(self.module.config, params=params,
                            loads=expert_loads, applied=is_finite)
    return shares.restore_frozen_layers(
        self.rate_shares, new=moved, old=params)


def _micro_batch_loss(module: nn.Module, config: ml_collections.ConfigDict,
                      params: Any, batch: Any, key: jax.Array, totals: Any):
  """Returns the training loss of one micro-batch, and its figures.

  Args:
    module: the Flax module of the model.
    config: the config of the run.
    params: the parameters of the model, a tree of arrays.
    batch: the micro-batch.
    key: the random key of the micro-batch.
    totals: the sums over the whole batch: the weight of each loss by name, and
      the number of `tokens`.

  Returns:
    The loss, summed over the micro-batch, and three dicts that add up over the
    micro-batches: the figures of the objective; the auxiliary losses (aux/NAME)
    and health figures (health/NAME) of the experts; and the expert loads, by
    the path of the layer, from which the experts' biases are moved.
  """
  # The model draws dropout and the noise of its router from separate random
  # streams, so that neither moves the other's numbers.
  objective = objectives.find_objective(config)
  rngs = {}
  for i, name in enumerate(RANDOM_STREAMS):
    rngs[name] = jax.random.fold_in(key, i)
  output = objective.apply(module, params, batch, deterministic=False,
                           rngs=rngs)
  total_loss, figures = objective.loss(output, batch, config, whole=totals)
  if not output.aux:
    return total_loss, (figures, {}, {})

  # The experts report means over tokens, so that a micro-batch counts by its
  # share of the tokens.
  share = objective.tokens(batch) / totals['tokens']
  expert_metrics = {}
  expert_loads = {}
  for name, value in output.aux['health'].items():
    expert_metrics[f'health/{name}'] = share * value
  aux_losses = [share * value for value in output.aux['losses'].values()]
  for name, value in zip(output.aux['losses'], aux_losses):
    expert_metrics[f'aux/{name}'] = value
  for path, load in output.aux['loads'].items():
    expert_loads[path] = share * load
  # The loss is divided by its weight afterwards; an auxiliary loss must not be.
  total_loss = total_loss + totals[objective.main] * sum(aux_losses)
  return total_loss, (figures, expert_metrics, expert_loads)


def _global_norm(tree: Any) -> jax.Array:
  """Returns the Euclidean norm of all arrays of a tree together, computed in
  float32 whatever their dtype."""
  return optax.tree.norm(
      jax.tree.map(lambda x: x.astype(jnp.float32), tree))


def _accumulate_gradients(grad_fn: Callable, params: Any, batch: Any,
                          key: jax.Array, totals: Any, num_micro_batches: int):
  """Returns the sums of gradients and figures over the micro-batches of a
  batch, computed one after another by a scan to save memory.

  Micro-batch i takes rows i, i + n, i + 2n, ... of n micro-batches, so that
  each device cuts up its own rows. Gradients in bfloat16 add up in float32.

  Args:
    grad_fn: (params, batch, key, totals) -> (gradients, figures).
    params: the parameters that are trained.
    batch: the whole batch, arrays of [B = rows, ...].
    key: the random key of the step; each micro-batch has a key of its own.
    totals: the sums over the whole batch; see _micro_batch_loss.
    num_micro_batches: train.grad_accumulation; it divides B.

  Returns:
    (gradients, figures), both summed over the micro-batches and not yet divided
    by the weight of the batch.
  """
  if num_micro_batches == 1:
    return grad_fn(params, batch, key, totals)

  def split_rows(x: jax.Array) -> jax.Array:
    """Returns [micro-batches, rows of a micro-batch, ...] of [B, ...]."""
    # The rows of a device lie next to one another. With the micro-batches on
    # the second axis first, then in front, each device gives each of them an
    # equal part of its rows, and no row moves between devices.
    interleaved = x.reshape(-1, num_micro_batches, *x.shape[1:])
    x = jnp.swapaxes(interleaved, 0, 1)
    other_axes = (None,) * (x.ndim - 2)
    return sharding.constrain(x, None, 'batch', *other_axes)

  # bfloat16 becomes float32, and float32 stays.
  def zeros_of_sum(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

  def add_micro_batch(total: Any, index_and_batch: Any):
    i, micro_batch = index_and_batch
    result = grad_fn(params, micro_batch, jax.random.fold_in(key, i), totals)
    return jax.tree.map(jnp.add, total, result), None

  # The sums begin at zeros, of the shapes that one micro-batch gives.
  micro_batches = jax.tree.map(split_rows, batch)
  first_micro_batch = jax.tree.map(lambda x: x[0], micro_batches)
  shapes = jax.eval_shape(grad_fn, params, first_micro_batch, key, totals)
  zeros = jax.tree.map(zeros_of_sum, shapes)
  indices = jnp.arange(num_micro_batches)
  total, _ = jax.lax.scan(add_micro_batch, zeros, (indices, micro_batches))
  return total


def make_eval_step(module: nn.Module, config: ml_collections.ConfigDict
                   ) -> Callable:
  """Returns a function that evaluates a model on a batch: step(params, batch)
  -> {figure: Mean}. The loss is the plain one, without label smoothing, z-loss
  and auxiliary losses.

  Args:
    module: the Flax module of the model.
    config: the config of the run.
  """
  objective = objectives.find_objective(config)
  config = config.copy_and_resolve_references()
  config.train.z_loss = 0.0
  config.train.label_smoothing = 0.0

  def step(params: Any, batch: Any) -> dict[str, Mean]:
    output = objective.apply(module, params, batch)
    return objective.figures(output, batch, config)

  return step


# A run once its config is resolved and its devices are known.

# The fields of config.model that may be left empty, for the run to fill in.
DERIVED_MODEL_FIELDS = ('vocab_size', 'max_len', 'head', 'num_labels')


def resolve_model(config: ml_collections.ConfigDict,
                  tokenizer: tokenizers.Tokenizer
                  ) -> tuple[ModelConfig, dict[str, Any]]:
  """Completes and checks the model config of a run. Fields that were left
  empty, such as the size of the vocabulary, are derived from the tokenizer and
  the data.

  Args:
    config: the config of the run.
    tokenizer: the tokenizer of the run.

  Returns:
    The complete model config; and {dotted name: value} of the derived fields,
    such as model.vocab_size.

  Raises:
    ValueError: for anything in the config that a run could not honour.
  """
  # Derive the fields that were left at 0 or ''.
  config = objectives.fill_in_labels(config)
  objective = objectives.find_objective(config)
  model = config.model.to_dict()
  least_vocab_size = objective.vocab_size(config, tokenizer)
  model['vocab_size'] = model['vocab_size'] or least_vocab_size
  _fill_derived_fields(model, config)

  # Sizes that the user has given must be large enough for the data.
  num_labels = objective.num_labels(config)
  require(num_labels in (0, model['num_labels']), f'model.num_labels is '
          f'{model["num_labels"]}, and the data of objective '
          f'{config.objective!r} have {num_labels}: leave it at 0, to be '
          'derived')
  if least_vocab_size == tokenizer.vocab_size:
    # An imported model may lack ids that the tokenizer never writes for a text.
    least_vocab_size = tokenizer.least_vocab_size
  require(model['vocab_size'] >= least_vocab_size, 'model.vocab_size is '
          f'{model["vocab_size"]}, but data.source {config.data.source!r} by '
          f'the tokenizer {config.data.tokenizer!r} has {least_vocab_size} '
          'ids: set it to 0, to be derived, or to more')

  resolved = architectures.resolve(model)
  derived = {f'model.{name}': model[name] for name in DERIVED_MODEL_FIELDS}
  if objective.has_labels:
    derived['data.labels'] = tuple(config.data.labels)
  return resolved, derived | objective.derived(config)


def _fill_derived_fields(model: dict[str, Any],
                         config: ml_collections.ConfigDict) -> None:
  """Sets the fields of `model`, a dict of config.model, that were left empty
  and follow from the length of the rows and from the objective."""
  objective = objectives.find_objective(config)
  model['max_len'] = model['max_len'] or config.data.length
  model['head'] = model['head'] or objective.head
  model['num_labels'] = model['num_labels'] or objective.num_labels(config)


def resolve_model_without_tokenizer(config: ml_collections.ConfigDict
                                    ) -> ModelConfig:
  """Completes the model config of a run without reading its tokenizer or data.
  A vocabulary or a number of labels that would follow from them gets a usual
  size.

  Args:
    config: the config of the run.
  """
  model = config.model.to_dict()
  _fill_derived_fields(model, config)
  model['vocab_size'] = model['vocab_size'] or tokenizers.Bytes.USUAL
  head = heads.HEADS.get(model['head'], heads.HEADS['lm'])
  if 'num_labels' in head.fields:
    model['num_labels'] = model['num_labels'] or 2
  return architectures.resolve(model)


def count_parameters(params: Any) -> int:
  """Returns the number of parameters in a tree of arrays or of shapes."""
  return sum(x.size for x in jax.tree.leaves(nn.meta.unbox(params)))


@dataclasses.dataclass(frozen=True)
class Run:
  """A run once its devices are known: its config, and what is built from it.
  The loop trains it as a program.Program.

  Attributes:
    config: the config of the run.
    model: its model, resolved.
    module: the module of the model.
    mesh: the mesh of its devices.
    tx: the optimiser, a pair of functions of Optax (init, update).
    abstract_state: the shapes and shardings of its training state.
    batch_sharding: how the rows of a batch lie on the mesh.
  """
  config: ml_collections.ConfigDict
  model: ModelConfig
  module: nn.Module
  mesh: Mesh
  tx: Any
  abstract_state: TrainState
  batch_sharding: NamedSharding

  @classmethod
  def build_on_mesh(cls, config: ml_collections.ConfigDict, model: ModelConfig,
              mesh: Mesh) -> 'Run':
    """Builds the module and the optimiser of a run for a mesh that is known to
    fit it. Use `build`, which checks the mesh.

    Args:
      config: the config of the run.
      model: its complete model config.
      mesh: the mesh of devices.
    """
    # `rules` names the table that maps axes of parameters to axes of the mesh.
    rules = config.mesh.rules
    module = architectures.build(model)
    tx = build_optimizer(module, optim=config.optim, steps=config.train.steps)
    # This only has the shapes and shardings of the state. No array is made.
    abstract = abstract_state(module, tx=tx, mesh=mesh, rules=rules,
                              optim=config.optim)
    return cls(
        config=config, model=model, module=module, mesh=mesh, tx=tx,
        abstract_state=abstract,
        batch_sharding=devices.batch_sharding(mesh, rules))

  @property
  def shardings(self):
    """The sharding of each array of the state."""
    return jax.tree.map(lambda x: x.sharding, self.abstract_state)

  @contextlib.contextmanager
  def context(self):
    """Sets the mesh, and the rules that map logical axes to it, for all that is
    traced in the `with` block."""
    rules = tables.RULES[self.config.mesh.rules]
    with jax.set_mesh(self.mesh), sharding.install_rules(rules):
      yield

  def new_state(self) -> TrainState:
    """Returns a training state before its first step, with parameters drawn by
    the config's seed; each device draws only its own shard."""
    init = functools.partial(init_state, self.module, self.tx,
                             optim=self.config.optim)
    with self.context():
      key = jax.random.key(seed_of_parameters(self.config))
      return jax.jit(init, out_shardings=self.shardings)(key)

  def with_params(self, state: TrainState, params: Any) -> TrainState:
    """Returns a training state before its first step with other parameters, and
    with the average of parameters (optim.ema) started anew from them."""
    rate_shares = parameter_shares(self.module, self.config.optim)
    start_average = functools.partial(
        shares.start_average, self.config.optim, rate_shares)
    with self.context():
      ema = jax.jit(start_average, out_shardings=self.shardings.ema)(params)
    return state.replace(params=params, ema=ema)

  def parameters_to_evaluate(self, state: TrainState):
    """Returns the parameters with which a training state is evaluated: their
    average, in a run with optim.ema, and else the parameters themselves."""
    rate_shares = parameter_shares(self.module, self.config.optim)
    return shares.evaluated_parameters(rate_shares, average=state.ema,
                                       params=state.params)

  def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns a batch on the devices, given the rows of this process."""
    return devices.put_on_devices(batch, self.batch_sharding)

  def train_step(self, taps: Sequence[Callable] = ()) -> jax.stages.Wrapped:
    """Returns jitted step(state, batch) -> (state, figures), to which the
    state is donated; `taps` is as for make_train_step."""
    step = make_train_step(self.module, tx=self.tx, config=self.config,
                           taps=taps)
    return jax.jit(step, donate_argnums=0,
                   out_shardings=(self.shardings, None))

  def eval_step(self) -> jax.stages.Wrapped:
    """Returns jitted step(params, batch) -> {figure: objectives.Mean}."""
    return jax.jit(make_eval_step(self.module, self.config))


def build(config: ml_collections.ConfigDict, model: ModelConfig,
          mesh: Mesh | None = None) -> Run:
  """Builds the mesh, the module and the optimiser of a run. Nothing is computed
  yet.

  Args:
    config: the config of the run.
    model: its complete model config.
    mesh: the mesh of devices; None: the one that config.mesh describes, over
      all devices.

  Raises:
    ValueError: where the mesh does not fit the devices, the model or the batch,
      or a kernel that the config names does not run on these devices.
  """
  # Make the mesh, and check it against the model and the batch.
  if mesh is None:
    shape = devices.resolve_mesh_shape(config.mesh, jax.device_count())
    mesh = devices.make_mesh(shape, slices=config.mesh.slices)
  check_mesh(config, model=model, shape=mesh.shape)

  # Check the kernels that the config names.
  platform = mesh.devices.flat[0].platform
  kernels.check_attention_kernel(model, platform)
  if model.has_experts:
    grouped.check_grouped_kernel(model.part(MoEConfig), platform)
  return Run.build_on_mesh(config, model, mesh)


def check_mesh(config: ml_collections.ConfigDict, model: ModelConfig,
               shape: Mapping[str, int]) -> None:
  """Checks that the sizes of a mesh divide those of the model and of its
  batches.

  Args:
    config: the config of the run.
    model: its complete model config.
    shape: {name: size} of the axes of the mesh.

  Raises:
    RequestError: where an axis does not divide a dimension of the model, the
      rows of a batch, or the length of a row.
  """
  devices.check_mesh(model, shape)

  # Each device gets the same number of rows of each micro-batch. Batches have
  # several sizes where they grow (data.batch_ramp).
  num_shards = shape['data'] * shape['fsdp'] * shape['expert']
  num_micro_batches = config.train.grad_accumulation
  ramp = pipeline.read_ramp(config)
  multiple = num_shards * num_micro_batches
  for size in (ramp.last, *ramp.sizes):
    name = 'a size of data.batch_ramp'
    if size == ramp.last:
      name = 'data.batch_size'
    require(size % multiple == 0, f'{name} is {size}, which the '
            f'{num_shards} batch shards of mesh.data x mesh.fsdp x mesh.expert '
            f'times train.grad_accumulation {num_micro_batches} do not divide: '
            f'choose a multiple of {multiple}')

  # The devices along the context axis get equal parts of each row.
  for name in ('length', 'target_length'):
    length = config.data[name]
    require(length % shape['context'] == 0, f'mesh.context is '
            f'{shape["context"]}, which does not divide data.{name} {length}: '
            'choose a multiple of it')


def check_state_fits(state: Any, mesh: Mesh) -> None:
  """Checks that the training state of a run fits into the memory of its
  devices.

  Args:
    state: the shapes of the state, with shardings.
    mesh: the mesh of devices that it lies on.

  Raises:
    RequestError: for a state that is larger than all memory of a device; if the
      devices are CPUs, than that of this machine.
  """
  num_bytes = devices.bytes_on_one_device(state)
  device = mesh.local_devices[0]
  # CPU devices share the memory of the machine.
  if device.platform == 'cpu':
    num_bytes *= len(mesh.local_devices)
  check_bytes_fit(num_bytes, device=device, what='parameters and optimiser',
                  more=', or more devices over which mesh.fsdp cuts them')


def check_bytes_fit(num_bytes: int, device: jax.Device, what: str,
                    more: str = '') -> None:
  """Checks that some arrays are not larger than all memory of a device, or of
  this machine if the device is a CPU.

  Args:
    num_bytes: the number of bytes of the arrays.
    device: the device that is to hold them.
    what: the name of the arrays, such as 'parameters', with which the message
      begins.
    more: further advice, with which the message ends.

  Raises:
    RequestError: for more bytes than the memory has.
  """
  if device.platform == 'cpu':
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  else:
    stats = device.memory_stats() or {}
    memory = stats.get('bytes_limit', math.inf)
  require(num_bytes <= memory,
          f'{what} have {num_bytes / 2**30:,.1f} GiB on a '
          f'{device.device_kind}, which has {memory / 2**30:,.1f}: take a '
          f'smaller model.d_model or model.num_layers{more}')


def fit_mesh_to_this_machine(config: ml_collections.ConfigDict
                             ) -> ml_collections.ConfigDict:
  """Adapts the config of a run so that its model can be evaluated on this
  machine. If the devices here do not fit the config's mesh, all of them share
  the rows of a batch.

  Args:
    config: the config of the run.

  Returns:
    The changed copy of the config.
  """
  config = config.copy_and_resolve_references()
  _let_kernels_be_chosen(config.model)
  # Evaluations have neither micro-batches nor batches that grow.
  config.train.grad_accumulation = 1
  config.data.batch_ramp = ''
  try:
    devices.resolve_mesh_shape(config.mesh, jax.device_count())
  except RequestError:
    config.mesh.update(data=-1, fsdp=1, expert=1, context=1, tensor=1,
                       slices=0)
    print("the run's mesh does not fit this machine: evaluating on "
          f'mesh.data={jax.device_count()}')
  return config


def load_run_config(workdir: epath.Path) -> ml_collections.ConfigDict:
  """Returns the config of the run in a folder, with the values that the run
  derived from its training data, so that these need not be there."""
  config = run_config.load_config(workdir)
  for name, value in run_config.load_derived_fields(workdir).items():
    if name.startswith(('data.', 'probe.')):
      config.update_from_flattened_dict({name: value})
  return config


def load_run_tokenizer(workdir: epath.Path, config: ml_collections.ConfigDict
                       ) -> tokenizers.Tokenizer:
  """Loads the tokenizer of a run. A warning is printed if it is no longer the
  one with which the run was trained.

  Args:
    workdir: the folder of the run.
    config: the config of the run, which names the tokenizer.
  """
  tokenizer = tokenizers.load(config.data.tokenizer)
  starts = run_config.load_starts(workdir)
  hash_of_file = pipeline.digest_tokenizer(config, tokenizer)
  for line in provenance.check_data(starts, data=hash_of_file, allowed=True):
    print(f'warning: {line}', file=sys.stderr)
  return tokenizer


def load_run_model_config(workdir: epath.Path,
                          config: ml_collections.ConfigDict | None = None
                          ) -> ModelConfig:
  """Returns the complete model config of a run. The values that were derived
  from its tokenizer and data are read from its folder.

  Args:
    workdir: the folder of the run.
    config: the config of the run, from `load_run_config`; None: it is read
      here.
  """
  if config is None:
    config = load_run_config(workdir)
  model = config.model.to_dict()
  _let_kernels_be_chosen(model)
  for name, value in run_config.load_derived_fields(workdir).items():
    if name.startswith('model.'):
      model[name.removeprefix('model.')] = value
  return architectures.resolve(model)


def _let_kernels_be_chosen(model: Any) -> None:
  """Sets the kernels that a config names to `auto`, for using a trained model:
  this machine may lack them, or they may be for training only. Only `xla`,
  which every machine has, is kept.

  Args:
    model: config.model, or a dict of it, which is changed.
  """
  if model['attention_kernel'] != 'xla':
    model['attention_kernel'] = 'auto'
  if model['moe']['grouped_kernel'] != 'xla':
    model['moe']['grouped_kernel'] = 'auto'
