"""Several runs as one program: the training step under vmap.

Runs that differ in nothing but FIELDS share one compiled step, whose inputs
these fields are; the axis of the runs is cut over the devices there are. Each
run draws the batches, the dropout and the initial parameters of its own seed,
and writes the workdir that train.py would have written: its losses equal
those of the run alone to float32 rounding, and either goes on where the other
stopped. Rows of labelled data are as long as the longest of all seeds needs;
where that is more than one needs alone, its dropout draws other numbers (with
data.length_buckets=1 all rows have one length).
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import ml_collections
import numpy as np

import architectures
from common.errors import require
from configs import sharding as tables
from training import loop, objectives, parameters
from training import preflight, runs
from training.data import tokenizers
from training.distributed import devices
from training.objectives import pipeline
from training.runs import make_eval_step, make_train_step, optimizer
from training.runs import TrainState, init_state, initial_seed
from training.workdir import checkpoints, metrics, provenance, run_config
from training.workdir import storage

# What the runs of a group may differ in, and what a step is given it as.
DTYPES = {
    'seed': np.uint32,
    'init_seed': np.uint32,
    'optim.lr': np.float32,
    'optim.weight_decay': np.float32,
    'optim.warmup_steps': np.float32,
    'model.init_stddev': np.float32,
    'model.init_scale': np.float32,
}
FIELDS = tuple(DTYPES)

RUNS = 'runs'  # the mesh axis, and the leading axis of every array
_EACH, _ALL = PartitionSpec(RUNS), PartitionSpec()


def groups(configs: Sequence[ml_collections.ConfigDict]) -> list[list[int]]:
  """Returns the places of the configs that may train as one program.

  A config that needs several devices, starts from weights, reports to a
  tracker, or is trained by SOAP stands alone: train.py is for it.
  """
  alike: dict[object, list[int]] = {}
  for i, config in enumerate(configs):
    # SOAP's bases of several runs would turn at each step.
    alone = (config.init_from or config.seed >= 2 ** 32
             or any(config.log[name] for name in metrics.TRACKERS)
             or config.optim.name == 'soap' or any(
                 config.mesh[axis] not in (1, -1 if axis == 'data' else 1)
                 for axis in tables.MESH_AXES))
    alike.setdefault(i if alone else _shared(config), []).append(i)
  return list(alike.values())


def _shared(config: ml_collections.ConfigDict) -> tuple:
  return tuple((name, value) for name, value in run_config.flatten(
      config).items() if name not in FIELDS)


def train(configs: Sequence[ml_collections.ConfigDict],
          workdirs: Sequence) -> list[loop.Writer]:
  """Trains a group of runs, each into its own workdir, or goes on with them.

  Runs that stopped at different steps go on as one program for each step.

  Args:
    configs: of one group; see `groups`.
    workdirs: a folder for each.

  Returns:
    How each of them ended: the `sentence` of one that did not reach its last
    step, after a signal, or where its loss was not finite in
    train.max_bad_steps steps in a row; all that was trained is saved.

  Raises:
    ValueError: for configs that are no group, or a workdir of another run.
  """
  require(groups(configs) == [list(range(len(workdirs)))], 'runs of a group '
          f'differ in {", ".join(FIELDS)} alone, and have a device, and a '
          'workdir, each')
  for config, workdir in zip(configs, workdirs):
    preflight.check_config(config)
    preflight.try_workdir(storage.path(workdir))
  filled = [objectives.with_labels(c) for c in configs]
  config = filled[0]
  tokenizer = tokenizers.load(config.data.tokenizer)
  resolved = [runs.resolve(c, tokenizer) for c in filled]
  changes = [run_config.changes(workdir, c, derived)
             for c, workdir, (_, derived) in zip(filled, workdirs, resolved)]
  for change in changes:
    run_config.refuse(change, allow_config_change=False)
  contents = pipeline.contents(config, tokenizer)
  for workdir in workdirs:
    provenance.check_data(run_config.starts(workdir), contents, allowed=False)
  mesh = devices.make_mesh(dict.fromkeys(tables.MESH_AXES, 1),
                           jax.devices()[:1])
  run = runs.build(config, resolved[0][0], mesh)
  devices.check_memory(run.abstract, mesh)
  with contextlib.ExitStack() as stack:
    begun = []
    for c, workdir, (model, _), changed in zip(
        filled, map(pathlib.Path, workdirs), resolved, changes):
      stack.enter_context(storage.locked(workdir))
      saved = stack.enter_context(checkpoints.Checkpoints(
          workdir, **c.checkpoint, agree_every=c.log.every_steps))
      writer = loop.Writer(c, workdir, saved, str(workdir))
      member = dataclasses.replace(run, config=c, model=model,
                                   module=architectures.build(model))
      begun.append((writer, *_take_up(member, writer, bool(changed))))
    records = dict(zip([writer for writer, *_ in begun], zip(
        configs, [derived for _, derived in resolved])))
    going = [each for each in begun if not each[0].sentence]
    # Of two that begin, one may have the parameters of an import.
    for start, new in sorted({(n, state is None) for _, state, n in going}):
      part, states = zip(*[each[:2] for each in going if (
          each[2], each[1] is None) == (start, new)])
      if start >= config.train.steps:
        print(f'{len(part)} of {len(going)} runs are complete: {start} steps '
              f'of {config.train.steps}')
      elif any(writer.code == loop.STOPPED or writer.stop_requested
               for writer, *_ in going):
        for writer in part:
          writer.sentence = f'stopped before step {start}'
      else:
        for writer in part:  # no record is written of what is not trained
          run_config.save(writer.workdir, *records[writer], contents)
        _train_part(run, part, states, start, tokenizer)
  return [writer for writer, *_ in begun]


def _take_up(run: runs.Run, writer: loop.Writer, changed: bool
             ) -> tuple[TrainState | None, int]:
  """Returns the state that a run goes on from, None where it begins, and the
  index of its next batch; `changed`: whether its config differs from before,
  `run`: the run alone.
  """
  restored = parameters.restore(run, writer.saved)
  if restored is None:
    return None, 0
  if restored.step < writer.config.train.steps:
    print(f'{writer.workdir}: going on from step {restored.step}')
  if not changed:
    writer.sentence = loop.ended_badly(restored.state, writer.config)
    writer.code = loop.DIVERGED if writer.sentence else 0
  early = loop.ended_early(writer.config, writer.saved.best,
                                     restored.step)
  if early and not writer.sentence:
    writer.sentence, writer.code = early, loop.EARLY
  return restored.state, restored.record['next_batch']


def _train_part(run: runs.Run, part: Sequence[loop.Writer],
                states: Sequence[TrainState | None], start: int,
                tokenizer: tokenizers.Tokenizer) -> None:
  """Trains those of the runs that are at one step."""
  program = program_of(run, part)
  config = program.run.config
  loaders = [pipeline.training_loader(with_values(config, {'seed': seed}),
                                      tokenizer) for seed in seeds_of(part)]
  for loader in loaders:
    loader.beside = loaders
  state = (program.new_state() if states[0] is None else
           program.join(states))
  n = loop.train_all(program, part, state, start, loaders,
                     pipeline.held_out(config, tokenizer))
  if any(writer.code == loop.STOPPED for writer in part):
    print(f'stopped after step {n}: the same request goes on.')


def program_of(run: runs.Run, writers: Sequence[loop.Writer]) -> loop.Program:
  """Returns several runs at one step as one program.

  Arrays have a leading axis of the runs, filled up with copies of the last to
  a multiple of the devices in use. What a step takes beside the state is
  (batch, values).

  Args:
    run: one of them, alone.
    writers: of all of them.
  """
  run = dataclasses.replace(run, config=writers[0].config)
  each = -(-len(writers) // jax.device_count())
  used = -(-len(writers) // each)
  rows = np.minimum(np.arange(each * used), len(writers) - 1)
  mesh = jax.make_mesh((used,), (RUNS,), (AxisType.Auto,),
                       devices=jax.devices()[:used])

  def put(tree: Any, spec: Any = _EACH) -> Any:
    return jax.device_put(tree, NamedSharding(mesh, spec))

  seeds = seeds_of(writers)
  flat = [run_config.flatten(writer.config) for writer in writers]
  differ = [f for f in FIELDS if len({fields[f] for fields in flat}) > 1]
  values = put({name: np.array([flat[i][name] for i in rows], DTYPES[name])
                for name in differ or FIELDS[:1]})

  def over_runs(fn: Callable, in_axes: tuple) -> Callable:
    """`fn` over the runs, on each device over those that it holds."""
    specs = jax.tree.map(lambda axis: _ALL if axis is None else _EACH, in_axes,
                         is_leaf=lambda axis: axis is None)
    return jax.shard_map(jax.vmap(fn, in_axes), mesh=mesh, in_specs=specs,
                         out_specs=_EACH, check_vma=False)

  def init(values: dict[str, jax.Array]) -> TrainState:
    config = with_values(run.config, values)
    module = run.module.clone(config=dataclasses.replace(
        run.model, init_stddev=config.model.init_stddev,
        init_scale=config.model.init_scale))
    return init_state(module, run.tx, jax.random.key(initial_seed(config)),
                      config.optim)

  def train_step(state: TrainState, inputs: tuple[dict, dict]):
    batch, values = inputs
    config = with_values(run.config, values)
    tx = optimizer(run.module, config.optim, config.train.steps)
    return make_train_step(run.module, tx, config)(state, batch)

  eval_step = make_eval_step(run.module, run.config)

  def put_batches(*batches: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """One batch is for all runs; else they are those of `seeds`."""
    if len(batches) == 1:
      return put(batches[0], _ALL), values
    of = dict(zip(seeds, batches, strict=True))
    row_batches = [of[writers[i].config.seed] for i in rows]
    return put({name: np.stack([batch[name] for batch in row_batches])
                for name in row_batches[0]}), values

  def join(trees: Sequence[Any]) -> Any:
    return put(jax.tree.map(lambda *xs: np.stack([xs[i] for i in rows]),
                            *jax.device_get(list(trees))))

  def split(tree: Any) -> Iterator[Any]:
    host = jax.device_get(tree)
    for row in range(len(writers)):
      yield jax.tree.map(jnp.asarray, part(host, row))

  def part(figures: Any, row: int) -> Any:
    return jax.tree.map(lambda x: x[row], figures,
                        is_leaf=lambda x: isinstance(x, list))

  return loop.Program(
      run, contextlib.nullcontext,  # each run is on one device
      list(mesh.devices.flat),
      lambda: jax.jit(over_runs(init, (0,)))(values),
      jax.jit(over_runs(train_step, (0, (0 if len(seeds) > 1 else None, 0))),
              donate_argnums=0),
      jax.jit(over_runs(lambda params, inputs: eval_step(params, inputs[0]),
                        (0, (None, 0)))),
      put_batches, split, join, part, {'runs_at_once': len(writers)},
      f'{len(writers)} runs at once, each of them:\n')


def seeds_of(writers: Sequence[loop.Writer]) -> list[int]:
  """Returns the different seeds of some runs: each has batches of its own."""
  return list(dict.fromkeys(writer.config.seed for writer in writers))


def with_values(config: ml_collections.ConfigDict, values: Any
                ) -> ml_collections.ConfigDict:
  """Returns a copy of `config` that holds traced values in some fields."""
  config = config.copy_and_resolve_references()
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict(values)
  return config
