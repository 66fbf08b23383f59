"""Several runs as one program: the training step under vmap.

Runs that differ in nothing but the fields of runs.TYPE_OF_TRACED_FIELD share
one compiled step; the axis of the runs is cut over the devices there are. Each
run draws the batches, the dropout and the initial parameters of its own seed,
and writes the workdir that train.py would have written: its losses equal those
of the run alone to float32 rounding, and either goes on where the other
stopped. Rows of labelled data are as long as the longest of all seeds needs;
where that is more than one needs alone, its dropout draws other numbers (with
data.length_buckets=1 all rows have one length).
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import ml_collections
import numpy as np

import architectures
from common.errors import STOPPED, require
from configs import sharding as tables
from training import begin, hook, loop, runs
from training.distributed import devices
from training.objectives import pipeline
from training.program import Program
from training.runs import make_eval_step, make_train_step, build_optimizer
from training.runs import TrainState, init_state, seed_of_parameters
from training.workdir import checkpoints, metrics, run_config, storage
from training.writer import RunWriter

RUN_AXIS = 'runs'  # the mesh axis, and the leading axis of every array
_SPLIT_OVER_RUNS = PartitionSpec(RUN_AXIS)
_SHARED_BY_RUNS = PartitionSpec()


def group_configs(configs: Sequence[ml_collections.ConfigDict]
                  ) -> list[list[int]]:
  """Returns the places of the configs that may train as one program.

  A config that needs several devices, starts from weights, reports to a
  tracker, or is trained by SOAP stands alone: train.py is for it.
  """
  alike: dict[object, list[int]] = {}
  for i, config in enumerate(configs):
    key: object = i
    if not _must_train_alone(config):
      key = _shared_fields(config)
    alike.setdefault(key, []).append(i)
  return list(alike.values())


def _must_train_alone(config: ml_collections.ConfigDict) -> bool:
  """Returns whether a run cannot train beside others; see `groups`."""
  if config.init_from or config.seed >= 2 ** 32:
    return True
  # SOAP's bases of several runs would turn at each step.
  if config.optim.name == 'soap':
    return True
  for name in metrics.TRACKERS:
    if config.log[name]:
      return True
  for axis in tables.MESH_AXES:
    size = config.mesh[axis]
    fits_one_device = size == 1 or (axis == 'data' and size == -1)
    if not fits_one_device:
      return True
  return False


def _shared_fields(config: ml_collections.ConfigDict) -> tuple:
  """Returns what the configs of one group have in common."""
  shared = []
  for name, value in run_config.flatten(config).items():
    if name not in runs.TYPE_OF_TRACED_FIELD:
      shared.append((name, value))
  return tuple(shared)


def train_group(configs: Sequence[ml_collections.ConfigDict],
                workdirs: Sequence) -> list[RunWriter]:
  """Trains a group of runs, each into its own workdir, or goes on with them.

  Runs that stopped at different steps go on as one program for each step.

  Args:
    configs: the configs of one group; see `groups`.
    workdirs: a folder for each.

  Returns:
    How each of them ended: the `sentence` of one that did not reach its last
    step, after a signal, or where its loss was not finite in
    train.max_bad_steps steps in a row; all that was trained is saved.

  Raises:
    ValueError: for configs that are no group, or a workdir of another run.
  """
  is_one_group = group_configs(configs) == [list(range(len(workdirs)))]
  require(is_one_group, 'runs of a group differ in '
          f'{", ".join(runs.TYPE_OF_TRACED_FIELD)} alone, and have a device, '
          'and a workdir, each')

  # The steps of begin.py follow, in its order, for all runs of the group.
  requests = []
  for config, workdir in zip(configs, workdirs):
    request = begin.check_request(config, storage.checked_path(workdir))
    requests.append(request)
  first = requests[0]
  sizes = dict.fromkeys(tables.MESH_AXES, 1)
  one_device = devices.make_mesh(sizes, jax.devices()[:1])
  run = begin.build_on_devices(first, one_device)
  contents = pipeline.contents(first.config, first.tokenizer)
  for request in requests:
    begin.check_data(request, contents)

  # All folders and checkpoints stay open until the last run has ended.
  with contextlib.ExitStack() as stack:
    members = []
    for request in requests:
      member = _open_member(request, run, stack)
      members.append(member)
    _train_members(run, members, contents)
  return [member.writer for member in members]


class GroupMember(NamedTuple):
  """A run of a group, and where it goes on."""
  request: begin.RunRequest
  writer: RunWriter
  start: begin.StartingPoint


def _open_member(request: begin.RunRequest, run: runs.Run,
                 stack: contextlib.ExitStack) -> GroupMember:
  """Returns a run of the group with its folder and its checkpoints open.

  Args:
    request: the request of the run.
    run: the first run of the group, alone on a device.
    stack: closes what is opened.
  """
  config = request.config
  workdir = pathlib.Path(request.workdir)
  stack.enter_context(storage.lock_workdir(workdir))
  saved = stack.enter_context(checkpoints.Checkpoints(
      workdir, **config.checkpoint, agree_every=config.log.every_steps))
  alone = dataclasses.replace(run, config=config, model=request.model,
                              module=architectures.build(request.model))
  start = begin.find_starting_point(request, run=alone, saved=saved,
                                    label=f'{workdir}: ')
  writer = RunWriter(config=config, workdir=workdir, saved=saved,
                     label=str(workdir), code=start.code,
                     sentence=start.sentence)
  return GroupMember(request=request, writer=writer, start=start)


def _train_members(run: runs.Run, members: Sequence[GroupMember],
                   contents: dict[str, str]) -> None:
  """Trains the runs that have not ended: those that are at one step as one
  program. Of two that begin, one may have the parameters of an import."""
  going = [member for member in members if not member.writer.sentence]
  parts: dict[tuple[int, bool], list[GroupMember]] = {}
  for member in going:
    key = member.start.step, member.start.state is None
    parts.setdefault(key, []).append(member)

  for (step, _), part in sorted(parts.items()):
    steps = run.config.train.steps
    if step >= steps:
      print(f'{len(part)} of {len(going)} runs are complete: {step} steps of '
            f'{steps}')
      continue
    if any(member.writer.code == STOPPED or member.writer.stop_requested
           for member in going):
      for member in part:
        member.writer.sentence = f'stopped before step {step}'
      continue
    # No record is written of what is not trained.
    for member in part:
      request = member.request
      run_config.save_config(member.writer.workdir, config=request.given_config,
                             derived=request.derived, data=contents)
    _train_members_at_one_step(run, part)


def _train_members_at_one_step(run: runs.Run,
                               part: Sequence[GroupMember]) -> None:
  """Trains those of the runs that are at one step."""
  writers = [member.writer for member in part]
  start = part[0].start
  tokenizer = part[0].request.tokenizer
  program = RunGroup(run, writers)
  config = program.run.config
  # Runs of one seed share their batches. Those of all seeds have one shape.
  loaders = []
  for seed in program.seeds:
    of_seed = config_with_traced_values(config, {'seed': seed})
    loaders.append(pipeline.training_loader(of_seed, tokenizer))
  for loader in loaders:
    loader.beside = loaders

  # The states of the runs become one, with an axis of runs in front.
  if start.state is None:
    state = program.new_state()
  else:
    state = program.join_runs([member.start.state for member in part])
  n = loop.train_runs(program, writers=writers, state=state, start=start.step,
                      loaders=loaders,
                      eval_data=pipeline.held_out(config, tokenizer))
  if any(writer.code == STOPPED for writer in writers):
    print(f'stopped after step {n}: the same request goes on.')


class RunGroup(Program):
  """Several runs at one step as one program.

  Arrays have a leading axis of the runs, filled up with copies of the last to
  a multiple of the devices in use. What a step takes beside the state is
  (batch, values): the fields in which the runs differ, an array of each.

  Args:
    run: one of the runs, alone.
    writers: of all runs.

  Attributes:
    seeds: the different data seeds, each of which has batches of its own.
  """

  def __init__(self, run: runs.Run, writers: Sequence[RunWriter]):
    """Lays the runs out over the devices, and finds the fields in which they
    differ."""
    self.num_runs = len(writers)
    self._seed_of = [writer.config.seed for writer in writers]
    self.seeds = list(dict.fromkeys(self._seed_of))

    # The runs on the devices: as few devices as hold them in so many rows.
    rows_each = -(-self.num_runs // jax.device_count())
    used = -(-self.num_runs // rows_each)
    self._rows = np.minimum(np.arange(rows_each * used), self.num_runs - 1)
    self._mesh = jax.make_mesh((used,), (RUN_AXIS,), (AxisType.Auto,),
                               devices=jax.devices()[:used])

    # The fields in which the runs differ.
    fields = [run_config.flatten(writer.config) for writer in writers]
    differ = []
    for name in runs.TYPE_OF_TRACED_FIELD:
      different = {each[name] for each in fields}
      if len(different) > 1:
        differ.append(name)
    values = {}
    for name in differ or ['seed']:
      rows = [fields[i][name] for i in self._rows]
      values[name] = np.array(rows, runs.TYPE_OF_TRACED_FIELD[name])
    self._values = self._put_on_mesh(values)

    # All other fields are those of the first run.
    first = writers[0].config
    super().__init__(dataclasses.replace(run, config=first),
                     hook.load_hooks(first))
    self.title = f'{self.num_runs} runs at once, each of them:\n'
    self.figures = {'runs_at_once': self.num_runs}

  @property
  def devices(self) -> Sequence[jax.Device]:
    return list(self._mesh.devices.flat)

  def context(self) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()  # each run is on one device

  def _put_on_mesh(self, tree: Any,
                   spec: PartitionSpec = _SPLIT_OVER_RUNS) -> Any:
    return jax.device_put(tree, NamedSharding(self._mesh, spec))

  def _map_over_runs(self, function: Callable, in_axes: tuple) -> Callable:
    """Returns `function` over the runs: on each device over those it holds."""
    specs = jax.tree.map(_partition_spec, in_axes,
                         is_leaf=lambda axis: axis is None)
    return jax.shard_map(jax.vmap(function, in_axes), mesh=self._mesh,
                         in_specs=specs, out_specs=_SPLIT_OVER_RUNS,
                         check_vma=False)

  def new_state(self) -> TrainState:
    """Returns the states of all runs before their first step."""
    run = self.run

    def init(values: dict[str, jax.Array]) -> TrainState:
      """Returns the state of one run."""
      config = config_with_traced_values(run.config, values)
      # Each run begins with its own seed and its own scale of parameters.
      model = dataclasses.replace(
          run.model, init_stddev=config.model.init_stddev,
          init_scale=config.model.init_scale)
      key = jax.random.key(seed_of_parameters(config))
      return init_state(run.module.clone(config=model), tx=run.tx, key=key,
                        optim=config.optim)

    return jax.jit(self._map_over_runs(init, (0,)))(self._values)

  def make_train_step(self) -> jax.stages.Wrapped:
    """Returns the training step of all runs, compiled as one program."""
    run = self.run
    taps = [each.trace for each in self.hooks]

    def step(state: TrainState, inputs: tuple[dict, dict]):
      batch, values = inputs
      config = config_with_traced_values(run.config, values)
      tx = build_optimizer(run.module, config.optim, config.train.steps)
      step = make_train_step(run.module, tx=tx, config=config, taps=taps)
      return step(state, batch)

    batch_axis = None  # one batch is for all runs
    if len(self.seeds) > 1:
      batch_axis = 0
    over_runs = self._map_over_runs(step, (0, (batch_axis, 0)))
    return jax.jit(over_runs, donate_argnums=0)

  def make_eval_step(self) -> jax.stages.Wrapped:
    eval_step = make_eval_step(self.run.module, self.run.config)

    def step(params: Any, inputs: tuple[dict, dict]):
      batch, _ = inputs
      return eval_step(params, batch)

    return jax.jit(self._map_over_runs(step, (0, (None, 0))))

  def put(self, *batches: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Returns (batch, values) on the devices; one batch is for all runs, and
    several are those of `seeds`."""
    if len(batches) == 1:
      return self._put_on_mesh(batches[0], _SHARED_BY_RUNS), self._values
    of_seed = dict(zip(self.seeds, batches, strict=True))
    of_row = [of_seed[self._seed_of[i]] for i in self._rows]
    stacked = {}
    for name in of_row[0]:
      stacked[name] = np.stack([batch[name] for batch in of_row])
    return self._put_on_mesh(stacked), self._values

  def join_runs(self, trees: Sequence[Any]) -> Any:
    on_host = jax.device_get(list(trees))

    def stack(*arrays: np.ndarray) -> np.ndarray:
      return np.stack([arrays[i] for i in self._rows])

    return self._put_on_mesh(jax.tree.map(stack, *on_host))

  def split_by_run(self, tree: Any) -> Iterator[Any]:
    on_host = jax.device_get(tree)
    for row in range(self.num_runs):
      yield jax.tree.map(jnp.asarray, self.figures_of_run(on_host, row))

  def figures_of_run(self, figures: Any, row: int) -> Any:
    # Lists are figures too: those of one layer, for each run.
    return jax.tree.map(lambda x: x[row], figures,
                        is_leaf=lambda x: isinstance(x, list))


def _partition_spec(axis: int | None) -> PartitionSpec:
  """Returns where an argument of a function over the runs lies."""
  if axis is None:
    return _SHARED_BY_RUNS
  return _SPLIT_OVER_RUNS


def config_with_traced_values(config: ml_collections.ConfigDict, values: Any
                              ) -> ml_collections.ConfigDict:
  """Returns a copy of `config` that holds traced values in some fields."""
  config = config.copy_and_resolve_references()
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict(values)
  return config
