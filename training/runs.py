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
import sys
from typing import Any

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

RANDOM_STREAMS = ('dropout',
                  'router')  # The random streams that a model draws from.
# The fields that a program takes as inputs, so that runs which differ in these
# alone share it, and the type of each.
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
    params: the parameters.
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
  """Returns the Role of each parameter of `module`, as a tree.

  Raises:
    RequestError: for a parameter that declares none.
  """
  return sharding.roles_of_parameters(abstract_params(module))


def build_optimizer(module: nn.Module, optim: ml_collections.ConfigDict,
                    steps: int) -> optax.GradientTransformation:
  """Returns config.optim's optimiser for the parameters of `module`. Some of
  its fields may be traced; preflight.check_config checks those that are not.
  """
  tree = parameter_roles(module)
  rates = mup.rates(module.config, optim.name, tree)
  parts = parameter_shares(module, optim)
  return optimizers.make(optim, steps=steps, roles=tree, rates=rates,
                         parts=parts)


def parameter_shares(module: nn.Module, optim: ml_collections.ConfigDict):
  """Returns the share of the learning rate that each parameter of `module`
  has, None where all have the whole; see shares.of.

  Raises:
    RequestError: for rates by depth of layers that loop.
  """
  loop = module.config.loop
  if optim.layer_decay != 1 and loop != 'none':
    raise RequestError(f'optim.layer_decay is {optim.layer_decay}, and with '
                       f'model.loop {loop!r} a layer is run at several depths: '
                       'leave it at 1')
  # With adapters, the model's own parameters rest.
  adapted = module.config.lora.rank > 0
  if (optim.freeze or adapted
      or optim.layer_decay != 1 or optim.table_rate != 1):
    roles = parameter_roles(module)
    shapes = parameter_shapes(module)
    return shares.of(optim, roles=roles, shapes=shapes, adapted=adapted)
  return None


def abstract_state(module: nn.Module, tx: optax.GradientTransformation,
                   mesh: Mesh, rules: str, optim: ml_collections.ConfigDict
                   ) -> TrainState:
  """Returns the state's shapes with their shardings: to plan, to make and to
  restore it. An average lies where its parameter lies.

  Args:
    module: the model.
    tx: the optimiser.
    mesh: the mesh.
    rules: mesh.rules, which maps logical axes to those of the mesh.
    optim: config.optim.
  """
  boxed = abstract_params(module)
  params = nn.meta.unbox(boxed)
  parts = parameter_shares(module, optim)
  shapes = jax.eval_shape(
      functools.partial(_make_first_state, tx=tx, optim=optim, parts=parts),
      params)

  # Where each array of the state lies.
  places = devices.param_shardings(boxed, mesh, rules)
  on_all = NamedSharding(mesh, PartitionSpec())
  ema_places = None
  if optim.ema:
    ema_places = shares.trained(parts, places)
  shardings = TrainState(
      step=on_all,
      params=places,
      opt_state=optimizers.opt_state_shardings(tx, params, places),
      bad_steps=on_all,
      bad_in_row=on_all,
      ema=ema_places)
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, shardings)


# 2^32 over the golden ratio: multiples of it lie far from each other.
_INIT_SEED_STRIDE = 0x9E3779B9
# The init_seed by which a seed has the first parameters of the next seed.
INIT_SEED_OF_NEXT_SEED = pow(_INIT_SEED_STRIDE, -1, 2 ** 32)


def seed_of_parameters(config: ml_collections.ConfigDict) -> jax.Array:
  """Returns the seed of the first parameters, a uint32: `seed`, where init_seed
  is 0. Either field may be traced."""
  seed = jnp.asarray(config.seed, jnp.uint32)
  init_seed = jnp.asarray(config.init_seed, jnp.uint32)
  return seed + init_seed * jnp.uint32(_INIT_SEED_STRIDE)


def init_state(module: nn.Module, tx: optax.GradientTransformation,
               key: jax.Array, optim: ml_collections.ConfigDict
               ) -> TrainState:
  """Returns a new state, a pure function of its key."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = nn.meta.unbox(module.init(key, tokens)['params'])
  parts = parameter_shares(module, optim)
  return _make_first_state(params, tx=tx, optim=optim, parts=parts)


def _make_first_state(params: Any, tx: optax.GradientTransformation,
                      optim: ml_collections.ConfigDict,
                      parts: Any) -> TrainState:
  """Returns the state before the first step with these parameters.

  Args:
    params: the parameters.
    tx: the optimiser.
    optim: config.optim.
    parts: the share of the learning rate that each parameter has.
  """
  # Each count is an array of its own: a shared one that is donated would be
  # freed twice.
  step = jnp.zeros((), jnp.int32)
  bad_steps = jnp.zeros((), jnp.int32)
  bad_in_row = jnp.zeros((), jnp.int32)
  opt_state = tx.init(params)
  average = shares.start_average(optim, parts, params)
  return TrainState(
      step=step, params=params, opt_state=opt_state, bad_steps=bad_steps,
      bad_in_row=bad_in_row, ema=average)


def make_train_step(module: nn.Module, tx: optax.GradientTransformation,
                    config: ml_collections.ConfigDict,
                    taps: Sequence[Callable] = ()) -> Callable:
  """Returns step(state, batch) -> (state, metrics), to be jitted with the
  state donated; trace it under the mesh and sharding.rules.

  Args:
    module: the model.
    tx: the optimiser.
    config: the config of the run.
    taps: further figures of a step, each (params, grads) -> {name: array}; see
      Hook.trace.

  Returns:
    The step. Its metrics are those of the whole batch: loss (nats per token),
    the objective's other figures, grad_norm, param_norm, learning_rate,
    bad_steps and bad_in_row. A model with experts adds each auxiliary loss as
    aux/NAME, each health figure, by layer, as health/NAME, and the tokens that
    these are means over as health/tokens.
  """
  objective = objectives.of(config)
  schedule = optimizers.rate(config.optim, config.train.steps)
  parts = parameter_shares(module, config.optim)

  def step(state: TrainState, batch: Any):
    """Returns the state after a step, and the step's figures."""
    # The gradient is that of the trained parameters alone: a frozen product
    # has no gradient of its weights.
    trained = shares.trained(parts, state.params)

    def loss_of_trained(trained: Any, *args):
      params = shares.whole(parts, trained, state.params)
      return _micro_batch_loss(module, config, params,
                               *args)  # batch, key, whole

    # The gradient and the figures of the whole batch.
    grad_fn = jax.grad(loss_of_trained, has_aux=True)
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    whole = objective.weights(batch) | {'tokens': objective.tokens(batch)}
    grads, (figures, panel, loads) = _accumulate_gradients(
        grad_fn, params=trained, batch=batch, key=key, whole=whole,
        parts=config.train.grad_accumulation)
    grads = jax.tree.map(lambda g: g / whole[objective.main], grads)
    grads = shares.without_frozen_rows(parts, grads)
    metrics = objective.means(figures) | panel
    if panel:
      metrics['health/tokens'] = whole['tokens']

    # The update, unless the loss or a gradient is not finite.
    grad_norm = optax.tree.norm(grads)
    ok = jnp.isfinite(grad_norm) & jnp.isfinite(metrics['loss'])
    updated, opt_state = optimizers.update_if(
        ok, tx=tx, grads=grads, state=state.opt_state, params=trained)
    moved = moe.move_biases(module.config, params=updated, loads=loads,
                            applied=ok)
    updated = shares.with_frozen_rows(parts, moved, updated)
    params = shares.whole(parts, updated, state.params)

    # The counts, and the average of the parameters.
    bad_in_row = jnp.where(ok, 0, state.bad_in_row + 1)
    bad_steps = state.bad_steps + jnp.where(ok, 0, 1)
    good_steps = state.step + 1 - bad_steps
    ema = shares.update_average(config.optim, average=state.ema, params=updated,
                                updates=good_steps, ok=ok)

    # The other figures.
    metrics['grad_norm'] = grad_norm
    metrics['param_norm'] = _global_norm(params)
    metrics['learning_rate'] = schedule(state.step - state.bad_steps)
    metrics['bad_steps'] = bad_steps
    metrics['bad_in_row'] = bad_in_row
    for tap in taps:
      metrics |= tap(state.params, grads)
    new_state = TrainState(
        step=state.step + 1, params=params, opt_state=opt_state,
        bad_steps=bad_steps, bad_in_row=bad_in_row, ema=ema)
    return new_state, metrics

  return step


def _micro_batch_loss(module: nn.Module, config: ml_collections.ConfigDict,
                      params: Any,
                      batch: Any, key: jax.Array, whole: Any):
  """Returns the loss of a micro-batch, and its figures.

  Args:
    module: the model.
    config: the config of the run.
    params: the parameters.
    batch: the micro-batch.
    key: the key of the step.
    whole: the weights of the whole batch, by name, and its tokens.

  Returns:
    The loss, times its weight in `whole`; and the figures of the objective,
    the share of this micro-batch in the auxiliary losses and health figures,
    and that in the loads that move the experts' biases.
  """
  objective = objectives.of(config)
  rngs = {name: jax.random.fold_in(key, i) for i,
          name in enumerate(RANDOM_STREAMS)}
  output = objective.apply(module, params, batch, deterministic=False,
                           rngs=rngs)
  total, figures = objective.loss(output, batch, config, whole=whole)
  if not output.aux:
    return total, (figures, {}, {})

  # A micro-batch counts by its tokens in what the experts report.
  share = objective.tokens(batch) / whole['tokens']
  panel = {}
  loads = {}
  for name, value in output.aux['health'].items():
    panel[f'health/{name}'] = share * value
  losses = [share * value for value in output.aux['losses'].values()]
  for name, value in zip(output.aux['losses'], losses):
    panel[f'aux/{name}'] = value
  for path, load in output.aux['loads'].items():
    loads[path] = share * load
  total = total + whole[objective.main] * sum(losses)
  return total, (figures, panel, loads)


def _global_norm(tree: Any) -> jax.Array:
  """Returns the joint norm of all leaves, in float32 whatever they are in."""
  return optax.tree.norm(
      jax.tree.map(lambda x: x.astype(jnp.float32), tree))


def _accumulate_gradients(grad_fn: Callable, params: Any, batch: Any,
                          key: jax.Array,
                          whole: Any, parts: int):
  """Sums gradients and figures over `parts` micro-batches, by a scan.

  Micro-batch i takes rows i, i + parts, ...: each device cuts up its own.
  Gradients in bfloat16 add up in float32.

  Args:
    grad_fn: (params, batch, key, whole) -> (gradients, figures).
    params: the parameters that are trained.
    batch: the whole batch.
    key: the key of the step; each micro-batch has a key of its own.
    whole: the weights of the whole batch, by name.
    parts: the number of micro-batches.
  """
  if parts == 1:
    return grad_fn(params, batch, key, whole)

  def cut(x: jax.Array) -> jax.Array:
    """Returns [parts, rows of a micro-batch, ...]."""
    x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    other_axes = (None,) * (x.ndim - 2)
    return sharding.constrain(x, None, 'batch', *other_axes)

  def zero(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

  def add(total: Any, part: Any):
    i, micro = part
    result = grad_fn(params, micro, jax.random.fold_in(key, i), whole)
    return jax.tree.map(jnp.add, total, result), None

  # The sums begin at zeros of the shapes that one micro-batch gives.
  micros = jax.tree.map(cut, batch)
  first = jax.tree.map(lambda x: x[0], micros)
  shapes = jax.eval_shape(grad_fn, params, first, key, whole)
  total, _ = jax.lax.scan(
      add, jax.tree.map(zero, shapes), (jnp.arange(parts), micros))
  return total


def make_eval_step(module: nn.Module, config: ml_collections.ConfigDict
                   ) -> Callable:
  """Returns step(params, batch) -> {figure: Mean}, without label
  smoothing, z-loss or auxiliary losses."""
  objective = objectives.of(config)
  config = config.copy_and_resolve_references()
  config.train.z_loss = config.train.label_smoothing = 0.0

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
  """Returns the validated model config, and the fields that were derived.

  Raises:
    ValueError: for anything in the config that a run could not honour.
  """
  config = objectives.with_labels(config)
  objective = objectives.of(config)
  model = config.model.to_dict()
  least_vocab = objective.vocab_size(config, tokenizer)
  model['vocab_size'] = model['vocab_size'] or least_vocab
  _fill_derived_fields(model, config)

  # The sizes that were given must have room for the data.
  labels = objective.num_labels(config)
  require(labels in (0, model['num_labels']), f'model.num_labels is '
          f'{model["num_labels"]}, and the data of objective '
          f'{config.objective!r} have {labels}: leave it at 0, to be derived')
  if least_vocab == tokenizer.vocab_size:
    # An import may be without the ids that no text gives.
    least_vocab = tokenizer.least_size
  require(model['vocab_size'] >= least_vocab, 'model.vocab_size is '
          f'{model["vocab_size"]}, but data.source {config.data.source!r} by '
          f'the tokenizer {config.data.tokenizer!r} has {least_vocab} ids: set '
          'it to 0, to be derived, or to more')

  resolved = architectures.resolve(model)
  derived = {f'model.{name}': model[name] for name in DERIVED_MODEL_FIELDS}
  if objective.has_labels:
    derived['data.labels'] = tuple(config.data.labels)
  return resolved, derived | objective.derived(config)


def _fill_derived_fields(model: dict[str, Any],
                         config: ml_collections.ConfigDict) -> None:
  """Fills in what is derived from the data's length and the objective."""
  objective = objectives.of(config)
  model['max_len'] = model['max_len'] or config.data.length
  model['head'] = model['head'] or objective.head
  model['num_labels'] = model['num_labels'] or objective.num_labels(config)


def resolve_model_without_tokenizer(config: ml_collections.ConfigDict
                                    ) -> ModelConfig:
  """Returns the model config where the tokenizer is not at hand: all but its
  vocabulary is as in the run."""
  model = config.model.to_dict()
  _fill_derived_fields(model, config)
  # The real sizes come with the tokenizer and the data; these stand in.
  model['vocab_size'] = model['vocab_size'] or tokenizers.Bytes.USUAL
  head = heads.HEADS.get(model['head'], heads.HEADS['lm'])
  if 'num_labels' in head.fields:
    model['num_labels'] = model['num_labels'] or 2
  return architectures.resolve(model)


def count_parameters(params: Any) -> int:
  """Returns the number of parameters."""
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
    tx: the optimiser.
    abstract: the shapes and shardings of its state.
    place: the sharding of a batch's rows.
  """
  config: ml_collections.ConfigDict
  model: ModelConfig
  module: nn.Module
  mesh: Mesh
  tx: Any
  abstract: TrainState
  place: NamedSharding

  @classmethod
  def of(cls, config: ml_collections.ConfigDict, model: ModelConfig,
         mesh: Mesh) -> 'Run':
    """Returns the run on a mesh that fits it; see `build`."""
    rules = config.mesh.rules
    module = architectures.build(model)
    tx = build_optimizer(module, config.optim, config.train.steps)
    abstract = abstract_state(module, tx=tx, mesh=mesh, rules=rules,
                              optim=config.optim)
    return cls(
        config=config, model=model, module=module, mesh=mesh, tx=tx,
        abstract=abstract, place=devices.batch_sharding(mesh, rules))

  @property
  def shardings(self):
    """The sharding of each array of the state."""
    return jax.tree.map(lambda x: x.sharding, self.abstract)

  @contextlib.contextmanager
  def context(self):
    """Sets the mesh and the axis rules, for all that is traced inside."""
    rules = tables.RULES[self.config.mesh.rules]
    with jax.set_mesh(self.mesh), sharding.install_rules(rules):
      yield

  def new_state(self) -> TrainState:
    """Returns a state before its first step, each shard drawn where it lies."""
    init = functools.partial(init_state, self.module, self.tx,
                             optim=self.config.optim)
    with self.context():
      key = jax.random.key(seed_of_parameters(self.config))
      return jax.jit(init, out_shardings=self.shardings)(key)

  def with_params(self, state: TrainState, params: Any) -> TrainState:
    """Returns a state before its first step with other parameters."""
    parts = parameter_shares(self.module, self.config.optim)
    start = functools.partial(shares.start_average, self.config.optim, parts)
    with self.context():
      ema = jax.jit(start, out_shardings=self.shardings.ema)(params)
    return state.replace(params=params, ema=ema)

  def evaluated(self, state: TrainState):
    """Returns the parameters that a state is evaluated with: with optim.ema
    their average."""
    parts = parameter_shares(self.module, self.config.optim)
    return shares.evaluated(parts, state.ema, state.params)

  def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices."""
    return devices.put(batch, self.place)

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
  """Builds a run's mesh, module and optimiser; nothing is computed.

  Args:
    config: the config of the run.
    model: its model, resolved.
    mesh: the mesh, for tests and plans; None: config.mesh over all devices.

  Raises:
    ValueError: where the mesh does not fit the devices, model or batch.
  """
  if mesh is None:
    shape = devices.mesh_shape(config.mesh, jax.device_count())
    mesh = devices.make_mesh(shape, slices=config.mesh.slices)
  check_mesh(config, model, mesh.shape)
  platform = mesh.devices.flat[0].platform
  kernels.check_kernel(model, platform)
  if model.has_experts:
    grouped.check_grouped_kernel(model.part(MoEConfig), platform)
  return Run.of(config, model, mesh)


def check_mesh(config: ml_collections.ConfigDict, model: ModelConfig,
               shape: Mapping[str, int]) -> None:
  """Refuses a mesh that does not divide the model, the batches or the rows."""
  devices.check_mesh(model, shape)
  # Each micro-batch has as many rows on each device.
  shards = shape['data'] * shape['fsdp'] * shape['expert']
  parts = config.train.grad_accumulation
  ramp = pipeline.ramp_of(config)
  multiple = shards * parts
  for size in (ramp.last, *ramp.sizes):
    name = 'a size of data.batch_ramp'
    if size == ramp.last:
      name = 'data.batch_size'
    require(size % multiple == 0, f'{name} is {size}, which the '
            f'{shards} batch shards of mesh.data x mesh.fsdp x mesh.expert '
            f'times train.grad_accumulation {parts} do not divide: choose a '
            f'multiple of {multiple}')

  # Each device of the context axis has an equal part of every row.
  for name in ('length', 'target_length'):
    size = config.data[name]
    require(size % shape['context'] == 0, f'mesh.context is '
            f'{shape["context"]}, which does not divide data.{name} {size}: '
            'choose a multiple of it')


def fit_mesh_to_this_machine(config: ml_collections.ConfigDict
                             ) -> ml_collections.ConfigDict:
  """Returns the config with this machine's mesh, to evaluate a run: all devices
  in `data` where its own mesh does not fit them."""
  config = config.copy_and_resolve_references()
  _let_kernels_be_chosen(config.model)
  # An evaluation takes whole batches.
  config.train.grad_accumulation = 1
  config.data.batch_ramp = ''
  try:
    devices.mesh_shape(config.mesh, jax.device_count())
  except RequestError:
    config.mesh.update(data=-1, fsdp=1, expert=1, context=1, tensor=1,
                       slices=0)
    print("the run's mesh does not fit this machine: evaluating on "
          f'mesh.data={jax.device_count()}')
  return config


def load_run_config(workdir: epath.Path) -> ml_collections.ConfigDict:
  """Returns the config of a run, with what it derived from its training data,
  which need not be there."""
  config = run_config.load_config(workdir)
  for name, value in run_config.load_derived_fields(workdir).items():
    if name.startswith(('data.', 'probe.')):
      config.update_from_flattened_dict({name: value})
  return config


def load_run_tokenizer(workdir: epath.Path, config: ml_collections.ConfigDict
                       ) -> tokenizers.Tokenizer:
  """Returns the tokenizer of a run, and warns where the file of that name holds
  another one than the run was trained with; `config` is the run's."""
  tokenizer = tokenizers.load(config.data.tokenizer)
  starts = run_config.load_starts(workdir)
  contents = pipeline.of_tokenizer(config, tokenizer)
  for line in provenance.check_data(starts, contents, allowed=True):
    print(f'warning: {line}', file=sys.stderr)
  return tokenizer


def load_run_model_config(workdir: epath.Path,
                          config: ml_collections.ConfigDict | None = None
                          ) -> ModelConfig:
  """Returns the model of a run; its tokenizer need not be there. `config` is
  the result of `config_of`, where that was read already."""
  if config is None:
    config = load_run_config(workdir)
  model = config.model.to_dict()
  _let_kernels_be_chosen(model)
  for name, value in run_config.load_derived_fields(workdir).items():
    if name.startswith('model.'):
      model[name.removeprefix('model.')] = value
  return architectures.resolve(model)


def _let_kernels_be_chosen(model: Any) -> None:
  """Leaves the kernels that a run names to `auto`, to use the model and not to
  train it: this machine may lack them, or they cannot do what is asked.

  Args:
    model: config.model, or a dict of it, which is changed.
  """
  if model['attention_kernel'] != 'xla':
    model['attention_kernel'] = 'auto'
  if model['moe']['grouped_kernel'] != 'xla':
    model['moe']['grouped_kernel'] = 'auto'
