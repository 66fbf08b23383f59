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
# How an array is laid out: one part for each run, or the same for all of them.
_SPLIT_OVER_RUNS = PartitionSpec(RUN_AXIS)
_SHARED_BY_RUNS = PartitionSpec()


def group_configs(configs: Sequence[ml_collections.ConfigDict]
                  ) -> list[list[int]]:
  """Groups the configs of several runs so that the runs of each group can train
  as one compiled program.

  A config has a group of its own, and is to be trained by train.py, if its run
  needs several devices, starts from given weights, reports to a tracker, or is
  trained by SOAP.

  Args:
    configs: the configs of the runs.

  Returns:
    The indices of the configs of each group.
  """
  # Runs of a group agree in all fields that would change the program. A run
  # that trains alone has its index as a key, which no other run has.
  indices_of_group: dict[object, list[int]] = {}
  for i, config in enumerate(configs):
    group_key: object = i
    if not _must_train_alone(config):
      group_key = _shared_fields(config)
    indices_of_group.setdefault(group_key, []).append(i)
  return list(indices_of_group.values())


def _must_train_alone(config: ml_collections.ConfigDict) -> bool:
  """Returns whether a run cannot train together with others as one program.

  Args:
    config: the config of the run.
  """
  # Its parameters are given, or its seed has more than 32 bits.
  if config.init_from or config.seed >= 2 ** 32:
    return True
  # SOAP computes its bases only at some steps. In a program of several runs,
  # the branch becomes a select, and they would be computed at every step.
  if config.optim.name == 'soap':
    return True
  # It reports to a tracker, such as Weights & Biases.
  for name in metrics.TRACKERS:
    if config.log[name]:
      return True
  # A run must fit on one device. -1 along the axis of data means all devices
  # that there are, so one is enough.
  for axis in tables.MESH_AXES:
    size = config.mesh[axis]
    fits_one_device = size == 1 or (axis == 'data' and size == -1)
    if not fits_one_device:
      return True
  return False


def _shared_fields(config: ml_collections.ConfigDict) -> tuple:
  """Returns the fields of a config that runs of one program must have in
  common, as pairs of a dotted name and a value."""
  shared_fields = []
  for name, value in run_config.flatten(config).items():
    if name not in runs.TYPE_OF_TRACED_FIELD:
      shared_fields.append((name, value))
  return tuple(shared_fields)


def train_group(configs: Sequence[ml_collections.ConfigDict],
                workdirs: Sequence) -> list[RunWriter]:
  """Trains several runs as one compiled program, each in its own folder. Runs
  that were interrupted are resumed; where they stopped at different steps,
  there is one program for each of these steps.

  Args:
    configs: the configs of one group that `group_configs` returned.
    workdirs: the folder of each run.

  Returns:
    The writer of each run, which writes to its folder. Its `sentence` says why
    the run did not reach its last step: a signal, or a loss that was not finite
    in train.max_bad_steps steps in a row. Whatever was trained is saved.

  Raises:
    ValueError: for configs that cannot be one group, or the folder of another
      run.
  """
  is_one_group = group_configs(configs) == [list(range(len(workdirs)))]
  require(is_one_group, 'runs of a group differ in '
          f'{", ".join(runs.TYPE_OF_TRACED_FIELD)} alone, and have a device, '
          'and a workdir, each')

  # Check each run, build the model once, and check the data: the same steps in
  # the same order as for a run that trains alone (begin.py).
  requests = []
  for config, workdir in zip(configs, workdirs):
    request = begin.check_request(config, storage.checked_path(workdir))
    requests.append(request)
  first_request = requests[0]
  mesh_sizes = dict.fromkeys(tables.MESH_AXES, 1)
  one_device = devices.make_mesh(mesh_sizes, jax.devices()[:1])
  run = begin.build_on_devices(first_request, one_device)
  hash_of_source = pipeline.digest_contents(
      first_request.config, first_request.tokenizer)
  for request in requests:
    begin.check_data(request, hash_of_source)

  # All folders and checkpoints stay open until the last run has ended.
  with contextlib.ExitStack() as stack:
    members = []
    for request in requests:
      member = _open_member(request, run=run, stack=stack)
      members.append(member)
    _train_members(run, members=members, hash_of_source=hash_of_source)
  return [member.writer for member in members]


class GroupMember(NamedTuple):
  """A run of a group, and where it goes on.

  Attributes:
    request: its config, folder, model and tokenizer, which are checked.
    writer: what writes to its folder.
    start: the step and the state from which it goes on.
  """
  request: begin.RunRequest
  writer: RunWriter
  start: begin.StartingPoint

  def was_stopped(self) -> bool:
    """Returns whether a signal has stopped the run, or is about to."""
    return self.writer.code == STOPPED or self.writer.stop_requested


def _open_member(request: begin.RunRequest, run: runs.Run,
                 stack: contextlib.ExitStack) -> GroupMember:
  """Opens the folder and the checkpoints of one run of a group, and finds the
  step and the state from which the run goes on.

  Args:
    request: the run's config, folder, model and tokenizer, which are checked.
    run: the first run of the group, built for one device.
    stack: the context that unlocks the folder and closes the checkpoints when
      it is left.

  Returns:
    The request, the writer of the run's folder, and the starting point.
  """
  # Lock the folder, so that no other process writes to it until the group has
  # ended.
  config = request.config
  workdir = pathlib.Path(request.workdir)
  stack.enter_context(storage.lock_workdir(workdir))
  saved = stack.enter_context(checkpoints.Checkpoints(
      workdir, **config.checkpoint, agree_every=config.log.every_steps))

  # Find the starting point as for a run that trains alone. Only the first run
  # of the group was built, so a copy of it gets this run's config and model.
  run_alone = dataclasses.replace(run, config=config, model=request.model,
                                  module=architectures.build(request.model))
  start = begin.find_starting_point(request, run=run_alone, saved=saved,
                                    label=f'{workdir}: ')
  writer = RunWriter(config=config, workdir=workdir, saved=saved,
                     label=str(workdir), code=start.code,
                     sentence=start.sentence)
  return GroupMember(request=request, writer=writer, start=start)


def _train_members(run: runs.Run, members: Sequence[GroupMember],
                   hash_of_source: dict[str, str]) -> None:
  """Trains the runs of a group that are not complete. Runs that have done the
  same number of steps train as one program. The programs follow one another,
  beginning with the fewest steps.

  Args:
    run: the first run of the group, built for one device.
    members: all runs of the group. A run whose writer has a `sentence` has
      already ended, for instance because it diverged, and is left alone.
    hash_of_source: the hash of each data source, which is recorded with the
      config of each run.
  """
  # Group the runs by the number of steps that they have done. At the first
  # step, those with a given state, such as imported parameters, are apart from
  # those whose parameters are yet to be drawn.
  unfinished = [member for member in members if not member.writer.sentence]
  members_at_step: dict[tuple[int, bool], list[GroupMember]] = {}
  for member in unfinished:
    key = member.start.step, member.start.state is None
    members_at_step.setdefault(key, []).append(member)

  for (step, _), members_together in sorted(members_at_step.items()):
    last_step = run.config.train.steps
    if step >= last_step:
      print(f'{len(members_together)} of {len(unfinished)} runs are complete: '
            f'{step} steps of {last_step}')
      continue
    # A signal that stopped one program stops the programs after it.
    if any(member.was_stopped() for member in unfinished):
      for member in members_together:
        member.writer.sentence = f'stopped before step {step}'
      continue
    # Record the config of each run, now that it is sure to be trained.
    for member in members_together:
      request = member.request
      run_config.save_config(
          member.writer.workdir, config=request.given_config,
          derived=request.derived, data=hash_of_source)
    _train_members_at_one_step(run, members_together)


def _train_members_at_one_step(run: runs.Run, members: Sequence[GroupMember]
                               ) -> None:
  """Trains several runs to their last step as one compiled program. All of them
  must have done the same number of steps. Each run's checkpoints and metrics go
  to its own folder.

  Args:
    run: the first run of the group, built for one device.
    members: the runs, each with its folder and its starting state.
  """
  writers = [member.writer for member in members]
  start = members[0].start
  tokenizer = members[0].request.tokenizer
  program = RunGroup(run, writers)
  config = program.run.config

  # Runs with the same seed share their batches, so there is a loader of batches
  # for each seed. Each loader knows all of them: as the batches of a step are
  # stacked, they must be padded to the longest row of any loader.
  loaders = []
  for seed in program.seeds:
    config_of_seed = config_with_traced_values(config, {'seed': seed})
    loaders.append(pipeline.make_training_loader(config_of_seed, tokenizer))
  for loader in loaders:
    loader.loaders_of_program = loaders

  # Join the states of the runs to one whose arrays have a leading axis of runs.
  # Without saved or imported states, the program draws all parameters.
  if start.state is None:
    state = program.new_state()
  else:
    state = program.join_runs([member.start.state for member in members])
  num_steps = loop.train_runs(
      program, writers=writers, state=state, start=start.step, loaders=loaders,
      eval_data=pipeline.make_evaluation_loaders(config, tokenizer))
  if any(writer.code == STOPPED for writer in writers):
    print(f'stopped after step {num_steps}: the same request goes on.')


class RunGroup(Program):
  """Several runs at one step as one program.

  Arrays have a leading axis of the runs, filled up with copies of the last to
  a multiple of the devices in use. What a step takes beside the state is
  (batch, values): the fields in which the runs differ, an array of each.

  Attributes:
    num_runs: the number of runs.
    seeds: the different data seeds, each of which has batches of its own.
  """

  def __init__(self, run: runs.Run, writers: Sequence[RunWriter]):
    """Distributes the runs over the devices, and finds the fields of the config
    in which they differ.

    All arrays of the program have a leading axis of runs. Each of its places,
    called a row, is one run.

    Args:
      run: the run of the first config, built on its devices.
      writers: for each run, what writes to its folder. It has the config.
    """
    self.num_runs = len(writers)
    self._seed_of_run = [writer.config.seed for writer in writers]
    self.seeds = list(dict.fromkeys(self._seed_of_run))

    # Each device gets the same number of rows, on as few devices as this
    # allows; -(-a // b) rounds a / b up. Where the runs do not fill the
    # devices, the last rows repeat the last run. They are computed, but never
    # read.
    runs_per_device = -(-self.num_runs // jax.device_count())
    num_devices = -(-self.num_runs // runs_per_device)
    self._run_of_row = np.minimum(np.arange(runs_per_device * num_devices),
                                  self.num_runs - 1)
    self._mesh = jax.make_mesh((num_devices,), (RUN_AXIS,), (AxisType.Auto,),
                               devices=jax.devices()[:num_devices])

    # The fields in which the runs differ are inputs of the compiled step. All
    # other fields are those of the first run.
    configs = [writer.config for writer in writers]
    self._values = self._put_on_mesh(self._values_of_rows(configs))
    first_config = writers[0].config
    first_run = dataclasses.replace(run, config=first_config)
    super().__init__(first_run, hook.load_hooks(first_config))
    self.title = f'{self.num_runs} runs at once, each of them:\n'
    self.figures = {'runs_at_once': self.num_runs}

  def _values_of_rows(self, configs: Sequence[ml_collections.ConfigDict]
                      ) -> dict[str, np.ndarray]:
    """Returns the fields of the config in which the runs differ, by dotted
    name, each an array with a value for each row. Runs that are all alike have
    their seed, as `new_state` maps over these arrays and needs one.

    Args:
      configs: the config of each run.
    """
    fields_of_run = [run_config.flatten(config) for config in configs]
    names = []
    for name in runs.TYPE_OF_TRACED_FIELD:
      different_values = {fields[name] for fields in fields_of_run}
      if len(different_values) > 1:
        names.append(name)
    if not names:
      names = ['seed']
    arrays = {}
    for name in names:
      values = [fields_of_run[i][name] for i in self._run_of_row]
      arrays[name] = np.array(values, runs.TYPE_OF_TRACED_FIELD[name])
    return arrays

  @property
  def devices(self) -> Sequence[jax.Device]:
    return list(self._mesh.devices.flat)

  def context(self) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()  # each run is on one device

  def _put_on_mesh(self, tree: Any, spec: PartitionSpec = _SPLIT_OVER_RUNS
                   ) -> Any:
    """Returns a tree of arrays on the devices, laid out as `spec` says."""
    return jax.device_put(tree, NamedSharding(self._mesh, spec))

  def _map_over_runs(self, function: Callable, in_axes: tuple) -> Callable:
    """Turns a function of one run into a function of all runs, which are
    computed in parallel.

    jax.shard_map splits the leading axis of all arrays, that of the runs, over
    the devices. jax.vmap applies `function` to each run of a device.

    Args:
      function: a function of trees of arrays, which returns a tree of arrays.
      in_axes: an entry for each argument, as for jax.vmap: 0 where its arrays
        have a leading axis of runs, None where all runs share it, or a tuple of
        these for an argument that is a tuple.

    Returns:
      The function of all runs; all that it returns has a leading axis of runs.
    """
    # None is an entry of in_axes. Without is_leaf, jax takes it for an empty
    # tree, and leaves it out.
    specs = jax.tree.map(_partition_spec, in_axes,
                         is_leaf=lambda axis: axis is None)
    # check_vma would check which values are the same on all devices. None is,
    # since the runs of one device exchange nothing with those of another.
    return jax.shard_map(jax.vmap(function, in_axes), mesh=self._mesh,
                         in_specs=specs, out_specs=_SPLIT_OVER_RUNS,
                         check_vma=False)

  def new_state(self) -> TrainState:
    """Returns the training states of all runs before their first step, as one
    state whose arrays have a leading axis of runs."""
    run = self.run

    def init_one_run(values: dict[str, jax.Array]) -> TrainState:
      """Returns the state of one run; `values` has the config fields in which
      it differs from the others, as traced scalars by dotted name."""
      config = config_with_traced_values(run.config, values)
      # Each run begins with its own seed and its own scale of parameters.
      model = dataclasses.replace(
          run.model, init_stddev=config.model.init_stddev,
          init_scale=config.model.init_scale)
      key = jax.random.key(seed_of_parameters(config))
      return init_state(run.module.clone(config=model), tx=run.tx, key=key,
                        optim=config.optim)

    return jax.jit(self._map_over_runs(init_one_run, (0,)))(self._values)

  def make_train_step(self) -> jax.stages.Wrapped:
    """Returns the jitted training step of all runs: step(state, (batch,
    values)) -> (state, metrics).

    The state, `values` (an array of each config field in which the runs
    differ) and the metrics have a leading axis of runs. The batch has one only
    where the runs have several data seeds. The state is donated.
    """
    run = self.run
    taps = [each_hook.trace for each_hook in self.hooks]

    def step_of_one_run(state: TrainState, batch_and_values: tuple[dict, dict]):
      """Returns the state of one run after a step, and its metrics. The
      optimiser is built in here, because its learning rate and weight decay may
      be traced values of the run."""
      batch, values = batch_and_values
      config = config_with_traced_values(run.config, values)
      tx = build_optimizer(run.module, optim=config.optim,
                           steps=config.train.steps)
      step = make_train_step(run.module, tx=tx, config=config, taps=taps)
      return step(state, batch)

    # Runs of one seed read the same batch; runs of several have one each.
    batch_axis = None
    if len(self.seeds) > 1:
      batch_axis = 0
    step_of_all_runs = self._map_over_runs(
        step_of_one_run, (0, (batch_axis, 0)))
    return jax.jit(step_of_all_runs, donate_argnums=0)

  def make_eval_step(self) -> jax.stages.Wrapped:
    """Returns the jitted evaluation step of all runs on one batch:
    step(params, (batch, values)) -> {figure: Mean}.

    The parameters and the means have a leading axis of runs. All runs are
    evaluated on the same held-out batch, which has no such axis.
    """
    eval_step = make_eval_step(self.run.module, self.run.config)

    def step_of_one_run(params: Any, batch_and_values: tuple[dict, dict]):
      # An evaluation depends on none of the fields in which the runs differ.
      batch, _ = batch_and_values
      return eval_step(params, batch)

    return jax.jit(self._map_over_runs(step_of_one_run, (0, (None, 0))))

  def put(self, *batches: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Puts on the devices what a step of all runs takes beside their state: the
    batch, and the values of the config fields in which the runs differ.

    Args:
      *batches: one batch for all runs; or one for each seed, in the order of
        `seeds`. A batch is a dict of arrays [rows, ...].

    Returns:
      The arrays of the batch, with a leading axis of runs if there are several
      seeds; and the values of the fields by dotted name, arrays with one value
      for each run.
    """
    if len(batches) == 1:
      return self._put_on_mesh(batches[0], _SHARED_BY_RUNS), self._values

    # Stack the batch of each run's seed along a new leading axis. Its last
    # places may be copies of the last run, which fill the devices up.
    batch_of_seed = dict(zip(self.seeds, batches, strict=True))
    batch_of_row = [batch_of_seed[self._seed_of_run[i]]
                    for i in self._run_of_row]
    stacked = {}
    for name in batch_of_row[0]:
      stacked[name] = np.stack([batch[name] for batch in batch_of_row])
    return self._put_on_mesh(stacked), self._values

  def join_runs(self, trees: Sequence[Any]) -> Any:
    """Joins a tree of arrays of each run to one tree on the devices, whose
    arrays have a leading axis of runs. Its last places may be copies of the
    last run, which fill the devices up."""
    on_host = jax.device_get(list(trees))

    def stack_runs(*arrays: np.ndarray) -> np.ndarray:
      """Returns the array of each row, stacked."""
      return np.stack([arrays[i] for i in self._run_of_row])

    return self._put_on_mesh(jax.tree.map(stack_runs, *on_host))

  def split_by_run(self, tree: Any) -> Iterator[Any]:
    """Yields the tree of each run, from one whose arrays have a leading axis of
    runs. Rows that only fill the devices up are left out."""
    on_host = jax.device_get(tree)
    for row in range(self.num_runs):
      yield jax.tree.map(jnp.asarray, self.figures_of_run(on_host, row))

  def figures_of_run(self, figures: Any, row: int) -> Any:
    # Lists are figures too: those of one layer, for each run.
    return jax.tree.map(lambda x: x[row], figures,
                        is_leaf=lambda x: isinstance(x, list))


def _partition_spec(axis: int | None) -> PartitionSpec:
  """Returns how an argument of a function over the runs is laid out: split over
  the devices by its axis of runs, or, with None, the same on each device."""
  if axis is None:
    return _SHARED_BY_RUNS
  return _SPLIT_OVER_RUNS


def config_with_traced_values(config: ml_collections.ConfigDict, values: Any
                              ) -> ml_collections.ConfigDict:
  """Returns a copy of `config` in which some fields, by dotted name, have the
  given values; these may be traced arrays in place of numbers."""
  config = config.copy_and_resolve_references()
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict(values)
  return config
