"""What train.py, eval.py and the tools do alike with a run's config."""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import math
import sys
from typing import Any

from etils import epath
import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding
import ml_collections
import numpy as np

import architectures
from architectures.parts import heads, mixers, positions, sharding
from architectures.parts.attention import kernels
from architectures.parts.config import ModelConfig
from architectures.parts.moe import grouped
from configs import sharding as tables
from configs.errors import RequestError, one_of, require
from training import early_stopping, evals, fields, limits, objectives
from training.costs import systems, totals
from training.data import holdout, pipeline, ramp, tokenizers
from training.distributed import devices
from training.optim import average, mup, optimizers
from training.step import TrainState, abstract_state, init_state, initial_seed
from training.step import make_eval_step, make_train_step, optimizer
from training.step import parameter_shares
from training.workdir import checkpoints, metrics, run_config, storage

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


def try_workdir(workdir: epath.Path) -> None:
  """Raises RequestError where a run could not write what it has to."""
  for folder in (workdir, checkpoints.directory(workdir)):
    storage.try_folder(folder)
  for file in (run_config.file(workdir), workdir / metrics.METRICS):
    storage.try_file(file, '--workdir')
  if not run_config.has_begun(workdir):  # else it is damaged, which is told
    storage.refuse_others(workdir, '--workdir')


def printable(config: ml_collections.ConfigDict, by_hand: Iterable[str] = ()
              ) -> dict[str, Any]:
  """Returns the config as a run reads it: checked, and with every field of
  the model that is derived filled in; `by_hand` is as for `check`."""
  check_config(config, by_hand)
  config = objectives.with_labels(config)
  model, _ = resolve(config, tokenizers.load(config.data.tokenizer))
  return limits.as_read(config, model, resolved=True)


def check_config(config: ml_collections.ConfigDict, by_hand: Iterable[str] = ()
                 ) -> None:
  """Raises ValueError for what can be seen wrong without data or devices.

  Args:
    config: a run's.
    by_hand: the fields that were set on the command line, or by the point of a
      sweep: one that the model does not read is refused.
  """
  limits.ranges(config)
  objectives.check_objective(config)
  limits.refuse_unread(config)
  one_of('mesh.rules', config.mesh.rules, tables.RULES)
  ramp.check(config)
  optimizers.check_optim(config.optim)
  early_stopping.check_best(config)
  one_of('eval.part', config.eval.part, holdout.PARTS)
  metrics.check_writers(config.log)
  module = architectures.build(_without_tokenizer(config))
  limits.refuse_unread_of(by_hand, config, module.config)
  mup.check_optimizer(module.config, config.optim.name)
  parameter_shares(module, config.optim)  # refuses a pattern without a match
  _check_reach(config, module.config)
  _check_objective(config.objective, module)
  evals.check_in_training(config)


def _check_reach(config: ml_collections.ConfigDict, c: ModelConfig) -> None:
  """Raises ValueError for rows that learned positions do not reach over."""
  longest = max(objectives.of(config).row_lengths(config))
  require(longest <= positions.reach(c),
          f'model.max_len is {c.max_len}, and rows of {longest} tokens '
          '(data.length, or data.target_length) are longer than these learned '
          f'positions: set it to {longest} or more')


def warn_of_unused_ids(config: ml_collections.ConfigDict, model: ModelConfig,
                       tokenizer: tokenizers.Tokenizer) -> None:
  """Says so where most rows of the vocabulary are no token of the text."""
  if model.vocab_size > 2 * vocab_size(config, tokenizer):
    print(f'warning: model.vocab_size is {model.vocab_size}, of which the '
          f'tokenizer {tokenizer.name!r} uses {tokenizer.vocab_size}: set '
          'data.tokenizer to one of that size, or model.vocab_size=0 to take '
          'this one\'s', file=sys.stderr)


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


def _check_objective(name: str, module: nn.Module) -> None:
  """Raises ValueError where the objective does not train such a model."""
  ours = architectures.stack(module.config)
  choices = [key for key, row in objectives.OBJECTIVES.items()
             if ours in row.stacks]
  require(name in choices,
          f'objective is {name!r}, which does not fit model.arch '
          f'{module.config.arch} ({ours}): choose from {", ".join(choices)}')
  require(not objectives.OBJECTIVES[name].prefix
          or not mixers.with_state(module.config), f'objective is {name!r}, '
          'whose first tokens see each other, and some layers read a row in '
          'one direction (a recurrence of model.mixer, or '
          'model.attention_conv): choose causal')
  head = objectives.OBJECTIVES[name].head
  require(module.config.head == head, f'model.head is {module.config.head!r}, '
          f'and objective {name!r} trains {head!r}: leave it empty, to be '
          'derived')


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
          functools.partial(average.start, self.config.optim, parts),
          out_shardings=self.shardings.ema)(params))

  def evaluated(self, state: TrainState):
    """Returns the parameters that a state is evaluated with: with optim.ema
    their average."""
    return average.evaluated(parameter_shares(
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
  fields.name_no_kernel(config.model)
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
  fields.name_no_kernel(model)
  for name, value in run_config.load_derived(workdir).items():
    if name.startswith('model.'):
      model[name.removeprefix('model.')] = value
  return architectures.resolve(model)


def describe(run: Any, start: int, tokens: int, train_data: pipeline.Loader,
       eval_data: Sequence[pipeline.Loader]) -> str:
  """Returns what a run is about to do, in some lines.

  Args:
    run: the run.
    start: how many steps of it are done.
    tokens: of a step, padding included.
    train_data: its batches.
    eval_data: those of what is held out.
  """
  config, model, steps = run.config, run.model, run.config.train.steps
  active = '' if not model.has_experts else (
      f', of which each token uses {totals.parameters(model)[1]:,}')
  parameters = sum(x.size for x in jax.tree.leaves(run.abstract.params))
  trained = totals.trained_parameters(run.module, config.optim)
  if trained != parameters:
    active += f', of which {trained:,} are trained'
  mesh = ','.join(
      f'{axis}={n}' for axis, n in run.mesh.shape.items() if n > 1)
  parts = config.train.grad_accumulation
  sizes = ramp.of(config)
  all_rows = int(sizes.before(steps))
  rows = f'{config.data.batch_size:,} rows' + (
      f' in {parts} micro-batches' if parts > 1 else '')
  source = train_data.text
  if train_data.num_sources == 1:
    passes = all_rows / train_data.num_windows
    source = f'{passes:.3g} passes over {source}'
  # Of views of records alone: text is cut into rows, and nothing of it is lost.
  cut = sum(getattr(view, 'cut', 0) for view in train_data.views)
  if cut:
    source += (f', {cut:,} of whose {train_data.num_windows:,} rows are longer '
               f'than data.length {config.data.length}, and cut off')
  lengths, most = pipeline.lengths(config), ''
  if len(lengths) > 1:
    most = 'at most '
    rows += f' padded to {", ".join(map(str, lengths[:-1]))} or {lengths[-1]}'
    rows += ' tokens (a program each)'
  return '\n'.join([
      f'model: {model.arch}, {parameters:,} parameters in '
      f'{model.param_dtype}{active}; computed in {model.dtype}',
      *filter(None, [systems.line(model)]), *layers(model),
      f'devices: {run.mesh.size} of the kind '
      f'{run.devices[0].device_kind}, mesh {mesh or "data=1"}',
      f'step: {rows}, {most}{tokens:,} tokens',
      *(f'until step {until:,}: {size:,} rows'
        for until, size in zip(sizes.until, sizes.sizes)),
      f'training: steps {start + 1:,} to {steps:,}, {most}'
      f'{all_rows * (tokens // sizes.last):,} tokens in all',
      *_rate(config), f'data: {source}',
      f'held out: {" and ".join(loader.text for loader in eval_data)}, '
      f'{sum(loader.num_tokens for loader in eval_data):,} tokens',
      f'evaluation: {_evaluations(config, eval_data)}',
      *_tasks(config)])


def layers(model: ModelConfig) -> list[str]:
  """A line that says which kinds of layer there are, if there are several."""
  rows = totals.kinds_of_layer(model)
  said = ('; '.join('{layers} of {kind}'.format(
      layers=row['layers'], kind=row['kind'] or 'no kind') + ''.join(
          f', {name}={value}' for name, value in row['changes'].items())
                    for row in rows))
  order = ', then '.join(filter(None, (
      model.prefix, model.pattern or 'the rest', model.suffix)))
  return [f'layers: {said}; in the order {order}'] if rows else []


def _evaluations(config: ml_collections.ConfigDict,
                 eval_data: Sequence[pipeline.Loader]) -> str:
  every = config.eval.every_steps
  if not every:
    return 'none while training'
  there = [loader.num_batches for loader in eval_data]
  taken = [loader.first(config.eval.batches) for loader in eval_data]
  return (f'every {every:,} steps, on {sum(taken):,} of the {sum(there):,} '
          'batches held out')


def _rate(config: ml_collections.ConfigDict) -> list[str]:
  """A line where the learning rate never gets to optim.lr."""
  warmup, steps = config.optim.warmup_steps, config.train.steps
  return [f'learning rate: it rises until step {warmup:,}, so it ends at '
          f'{steps / warmup:.3g} of optim.lr {config.optim.lr:g}; set '
          'optim.warmup_steps to fewer than train.steps to reach it'
          ] if warmup > steps else []


def _tasks(config: ml_collections.ConfigDict) -> list[str]:
  names = evals.listed(config.eval.tasks)
  every = config.eval.tasks_every_steps
  when = f'every {every:,} steps and ' if every else ''
  return [f'tasks: {", ".join(names)}, {when}after the last step'
          ] if names else []
