"""What train.py, eval.py and the tools do alike with a run's config."""

from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import math
from typing import Any

from etils import epath
import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding
import ml_collections
import numpy as np

import architectures
from architectures.parts import heads, sharding
from architectures.parts.attention import kernels
from architectures.parts.config import ModelConfig
from architectures.parts.moe import grouped
from configs.errors import RequestError, require
from training import limits, objectives
from training.data import ramp, tokenizers
from training.distributed import devices
from training.optim import shares
from training.step import TrainState, abstract_state, init_state, initial_seed
from training.step import make_eval_step, make_train_step, optimizer
from training.step import parameter_shares
from training.workdir import run_config

# What may be left at 0 in config.model, and the run fills in.
DERIVED = ('vocab_size', 'max_len', 'head', 'num_labels')


def resolve(config: ml_collections.ConfigDict, tokenizer: tokenizers.Tokenizer
            ) -> tuple[ModelConfig, dict[str, Any]]:
  """Returns the validated model config, and the fields that were derived.

  Raises:
    ValueError: for anything in the config that a run could not honour.
  """
  config = objectives.with_labels(config)
  model = config.model.to_dict()
  least = vocab_size(config, tokenizer)
  model['vocab_size'] = model['vocab_size'] or least
  _fill(model, config)
  labels = objectives.of(config).num_labels(config)
  require(labels in (0, model['num_labels']), f'model.num_labels is '
          f'{model["num_labels"]}, and the data of objective '
          f'{config.objective!r} have {labels}: leave it at 0, to be derived')
  if least == tokenizer.vocab_size:  # an import may lack what no text gives
    least = tokenizer.least_size
  require(model['vocab_size'] >= least, _too_few_ids(
      model['vocab_size'], least, config, tokenizer))
  resolved = architectures.resolve(model)
  derived = {f'model.{name}': model[name] for name in DERIVED}
  if objectives.of(config).labels:
    derived['data.labels'] = tuple(config.data.labels)
  derived |= objectives.of(config).derived(config)
  return resolved, derived


def vocab_size(config: ml_collections.ConfigDict,
               tokenizer: tokenizers.Tokenizer) -> int:
  """Returns how many ids the data have: model.vocab_size, where it is 0."""
  return objectives.of(config).vocab_size(config, tokenizer)


def _too_few_ids(size: int, least: int, config: ml_collections.ConfigDict,
                 tokenizer: tokenizers.Tokenizer) -> str:
  if least != tokenizer.least_size:
    return (f'model.vocab_size is {size}, but {config.data.source} has {least} '
            'ids: set it to 0, to be derived, or to more')
  return (f'model.vocab_size is {size}, but the tokenizer '
          f'{config.data.tokenizer!r} has {least} ids: set it to 0 (the '
          'tokenizer\'s) or to more, or data.tokenizer to bytes:N, with N ids')


def _fill(model: dict[str, Any], config: ml_collections.ConfigDict) -> None:
  """Fills in what is derived from the data's length and the objective."""
  objective = objectives.of(config)
  model['max_len'] = model['max_len'] or config.data.length
  model['head'] = model['head'] or objective.head
  model['num_labels'] = model['num_labels'] or objective.num_labels(config)


def resolve_alone(config: ml_collections.ConfigDict) -> ModelConfig:
  """Returns the model config where the tokenizer is not at hand: all but its
  vocabulary is as in the run."""
  return architectures.resolve(_without_tokenizer(config))


def _without_tokenizer(config: ml_collections.ConfigDict) -> dict[str, Any]:
  model = config.model.to_dict()
  _fill(model, config)
  # Stand-ins: the real ones come with the tokenizer, and with the data.
  for name in ('vocab_size', 'max_len'):
    model[name] = model[name] or max(config.data.length, 1)
  if 'num_labels' in heads.HEADS.get(model['head'], heads.HEADS['lm']).fields:
    model['num_labels'] = model['num_labels'] or 2
  return model


def count(params: Any) -> int:
  """Returns the number of parameters."""
  return sum(x.size for x in jax.tree.leaves(nn.meta.unbox(params)))


@dataclasses.dataclass(frozen=True)
class Run:
  """A run once its devices are known: what is built of its config.

  See loop.Program for what the loop trains.
  """
  config: ml_collections.ConfigDict
  model: ModelConfig
  module: nn.Module
  mesh: Mesh
  tx: Any
  abstract: TrainState  # shapes and shardings
  place: NamedSharding  # of a batch's rows

  @classmethod
  def of(cls, config: ml_collections.ConfigDict, model: ModelConfig,
         mesh: Mesh) -> 'Run':
    """Returns the run on a mesh that fits it; see `build`."""
    module = architectures.build(model)
    tx = optimizer(module, config.optim, config.train.steps)
    return cls(config, model, module, mesh, tx,
               abstract_state(module, tx, mesh, config.mesh.rules,
                              config.optim),
               devices.batch_sharding(mesh, config.mesh.rules))

  @property
  def shardings(self):
    return jax.tree.map(lambda x: x.sharding, self.abstract)

  @contextlib.contextmanager
  def context(self):
    """The mesh and the axis rules, for whatever is traced inside."""
    with jax.set_mesh(self.mesh), sharding.rules(self.config.mesh.rules):
      yield

  @property
  def devices(self) -> list[jax.Device]:
    return list(self.mesh.devices.flat)

  def new_state(self) -> TrainState:
    """Returns a state before its first step, each shard drawn where it lies."""
    init = functools.partial(init_state, self.module, self.tx,
                             optim=self.config.optim)
    with self.context():
      return jax.jit(init, out_shardings=self.shardings)(
          jax.random.key(initial_seed(self.config)))

  def with_params(self, state: TrainState, params: Any) -> TrainState:
    """Returns a state before its first step with other parameters."""
    parts = parameter_shares(self.module, self.config.optim)
    with self.context():
      return state.replace(params=params, ema=jax.jit(
          functools.partial(shares.start_average, self.config.optim, parts),
          out_shardings=self.shardings.ema)(params))

  def evaluated(self, state: TrainState):
    """Returns the parameters that a state is evaluated with: with optim.ema
    their average."""
    return shares.evaluated(parameter_shares(
        self.module, self.config.optim), state.ema, state.params)

  def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices."""
    return devices.put(batch, self.place)

  def train_step(self) -> jax.stages.Wrapped:
    """Returns jitted step(state, batch) -> (state, figures), to which the
    state is donated."""
    return jax.jit(make_train_step(self.module, self.tx, self.config),
                   donate_argnums=0, out_shardings=(self.shardings, None))

  def eval_step(self) -> jax.stages.Wrapped:
    """Returns jitted step(params, batch) -> {figure: objectives.Mean}."""
    return jax.jit(make_eval_step(self.module, self.config))


def build(config: ml_collections.ConfigDict, model: ModelConfig,
          mesh: Mesh | None = None) -> Run:
  """Builds a run's mesh, module and optimiser; nothing is computed.

  Args:
    config: the run's.
    model: its model, resolved.
    mesh: instead of config.mesh over all devices: for tests and plans.

  Raises:
    ValueError: where the mesh does not fit the devices, model or batch.
  """
  if mesh is None:
    mesh = devices.make_mesh(
        devices.mesh_shape(config.mesh, jax.device_count()),
        slices=config.mesh.slices)
  check_mesh(config, model, mesh.shape)
  platform = mesh.devices.flat[0].platform
  kernels.check_kernel(model, platform)
  if model.has_experts:
    grouped.check_grouped_kernel(model.moe, platform)
  return Run.of(config, model, mesh)


def check_mesh(config: ml_collections.ConfigDict, model: ModelConfig,
               shape: Mapping[str, int]) -> None:
  """Refuses a mesh that does not divide the model, the batches or the rows."""
  devices.check_mesh(model, config.data.batch_size,
                     config.train.grad_accumulation, shape)
  ramp.check_shards(config, shape)
  for name in ('length', 'target_length'):
    size = config.data[name]
    require(size % shape['context'] == 0, f'mesh.context is '
            f'{shape["context"]}, which does not divide data.{name} {size}: '
            'choose a multiple of it')


def for_this_machine(config: ml_collections.ConfigDict
                     ) -> ml_collections.ConfigDict:
  """Returns the config with this machine's mesh, to evaluate a run: all devices
  in `data` where its own mesh does not fit them."""
  config = config.copy_and_resolve_references()
  _name_no_kernel(config.model)
  # An evaluation takes whole batches.
  config.train.grad_accumulation, config.data.batch_ramp = 1, ''
  try:
    devices.mesh_shape(config.mesh, jax.device_count())
    return config
  except RequestError:
    count = math.gcd(jax.device_count(), config.data.batch_size)
    require(count == jax.device_count(), 'data.batch_size '
            f'{config.data.batch_size} does not divide over the '
            f'{jax.device_count()} devices there are')
    config.mesh.update(data=-1, fsdp=1, expert=1, context=1, tensor=1,
                       slices=0)
    print("the run's mesh does not fit this machine: evaluating on "
          f'mesh.data={jax.device_count()}')
    return config


def config_of(workdir: epath.Path) -> ml_collections.ConfigDict:
  """Returns the config of a run, with what it derived of its training data,
  which need not be there."""
  config = run_config.load_config(workdir)
  limits.ranges(config)
  for name, value in run_config.load_derived(workdir).items():
    if name.startswith(('data.', 'probe.')):
      config.update_from_flattened_dict({name: value})
  return config


def model_of(workdir: epath.Path,
             config: ml_collections.ConfigDict | None = None) -> ModelConfig:
  """Returns the model of a run; its tokenizer need not be there. `config` is
  what `config_of` returned, where it was read."""
  config = config_of(workdir) if config is None else config
  model = config.model.to_dict()
  _name_no_kernel(model)
  for name, value in run_config.load_derived(workdir).items():
    if name.startswith('model.'):
      model[name.removeprefix('model.')] = value
  return architectures.resolve(model)


def _name_no_kernel(model: Any) -> None:
  """Leaves the kernels that a run names to `auto`, to use the model and not to
  train it: this machine may lack them, or they cannot do what is asked.

  Args:
    model: config.model, or a dict of it, which is changed.
  """
  for group, name in ((model, 'attention_kernel'),
                      (model['moe'], 'grouped_kernel')):
    if group[name] != 'xla':
      group[name] = 'auto'
