"""Several runs as one program: the training step under vmap.

Runs that differ in nothing but FIELDS share one compiled step, whose inputs
these fields are; the axis of the runs is cut over the devices there are. Each
run draws the batches, the dropout and the initial parameters of its own seed,
and writes the workdir that train.py would have written: its losses equal
those of the run alone to float32 rounding, and either goes on where the other
stopped.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import ml_collections
import numpy as np

from architectures.parts.config import ModelConfig
from configs import sharding as tables
from configs.errors import EnvironmentFailure, require
from training import loop, members, runs
from training.data import pipeline, tokenizers
from training.distributed import devices
from training.optim import mup, optimizers
from training.step import TrainState, init_state
from training.step import make_eval_step, make_train_step, parameter_roles
from training.workdir import checkpoints, run_config

# What the runs of a group may differ in, and what a step is given it as.
DTYPES = {
    'seed': np.uint32,
    'optim.lr': np.float32,
    'optim.weight_decay': np.float32,
    'optim.warmup_steps': np.float32,
    'model.init_stddev': np.float32,
    'model.init_scale': np.float32,
}
FIELDS = tuple(DTYPES)

RUNS = 'runs'  # the mesh axis, and the leading axis of every array
_EACH, _ALL = PartitionSpec(RUNS), PartitionSpec()


class Unfinished(EnvironmentFailure):
  """Some runs of a group did not reach their last step; the others did.

  Attributes:
    sentences: why not, by the run's place in the group.
  """

  def __init__(self, sentences: dict[int, str], workdirs):
    self.sentences = sentences
    super().__init__('\n'.join(
        f'{workdirs[i]}: {sentence}' for i, sentence in sentences.items()))


def groups(configs: Sequence[ml_collections.ConfigDict]) -> list[list[int]]:
  """Returns the places of the configs that may train as one program.

  A config that needs several devices, starts from weights, or reports to W&B
  stands alone: train.py is for it.
  """
  found: dict[object, list[int]] = {}
  for i, config in enumerate(configs):
    found.setdefault(i if refusal(config) else _shared(config), []).append(i)
  return list(found.values())


def refusal(config: ml_collections.ConfigDict) -> str:
  """Returns why the config cannot train beside others; '' where it can."""
  for axis in tables.MESH_AXES:
    size = config.mesh[axis]
    if size != 1 and (axis, size) != ('data', -1):
      return (f'mesh.{axis} is {size}: a run of a group has one device; leave '
              'mesh.data at -1 and the others at 1')
  if config.init_from:
    return (f'init_from is {config.init_from!r}: a run that starts from '
            'weights trains alone')
  if config.log.wandb:
    return 'log.wandb is True: W&B follows one run a process'
  if config.seed >= 2 ** 32:
    return f'seed is {config.seed}: it must be < 2^32'
  return ''


def _shared(config) -> tuple:
  return tuple((name, value) for name, value in run_config.flatten(
      config).items() if name not in FIELDS)


@dataclasses.dataclass(eq=False)
class Member(members.Member):
  """One run of the group.

  Attributes:
    place: its place in the group.
    state: what it goes on from; None where it begins.
    start: the index of its next batch.
  """
  place: int = 0
  state: TrainState | None = None
  start: int = 0


def train(configs: Sequence[ml_collections.ConfigDict],
          workdirs: Sequence) -> None:
  """Trains a group of runs, each into its own workdir, or goes on with them.

  Runs that stopped at different steps go on as one program for each step.

  Args:
    configs: of one group; see `groups`.
    workdirs: a folder for each.

  Raises:
    ValueError: for configs that are no group, or a workdir of another run.
    Unfinished: after a signal, or where the loss of a run was not finite in
      train.max_bad_steps steps in a row; all that was trained is saved.
  """
  _check(configs, workdirs)
  config = configs[0]
  tokenizer = tokenizers.load(config.data.tokenizer)
  resolved = [runs.resolve(c, tokenizer) for c in configs]
  changed = [bool(_changes(c, workdir, derived))
             for c, workdir, (_, derived) in zip(configs, workdirs, resolved)]
  mesh = devices.make_mesh(dict.fromkeys(tables.MESH_AXES, 1),
                           jax.devices()[:1])
  run = runs.build(config, resolved[0][0], mesh)
  with contextlib.ExitStack() as stack:
    found = []
    for i, (c, workdir, (_, derived)) in enumerate(
        zip(configs, map(pathlib.Path, workdirs), resolved)):
      saved = stack.enter_context(checkpoints.Checkpoints(
          workdir, **c.checkpoint, agree_every=c.log.every_steps))
      found.append(_restored(run, Member(c, workdir, saved, str(workdir),
                                         place=i)))
      run_config.save(workdir, c, derived)
    for m in found:
      if m.state is not None and not changed[m.place]:
        m.sentence = members.ended_badly(m.state, m.config)
    going = [m for m in found if not m.sentence]
    for start in sorted({m.start for m in going}):
      _train_part(run, [m for m in going if m.start == start], tokenizer,
                  going)
  sentences = {m.place: m.sentence for m in found if m.sentence}
  if sentences:
    raise Unfinished(sentences, workdirs)


def _train_part(run: runs.Run, part: list[Member], tokenizer,
                going: list[Member]) -> None:
  """Trains those of the runs that are `going` on that are at one step."""
  start, steps = part[0].start, run.config.train.steps
  if start >= steps:
    print(f'{len(part)} of {len(going)} runs are complete: {start} steps of '
          f'{steps}')
  elif any(m.code == members.STOPPED for m in going):
    for m in part:
      m.sentence = f'stopped before step {start}'
  else:
    group = Group(run, part)
    n = loop.train_all(
        group, part, group.state(), start,
        [pipeline.load(group.seeded(seed), tokenizer) for seed in group.seeds],
        pipeline.held_out(group.config, tokenizer))
    if any(m.code == members.STOPPED for m in part):
      print(f'stopped after step {n}: the same request goes on.')


def _check(configs, workdirs) -> None:
  """Raises ValueError for what is no group."""
  require(len(configs) == len(workdirs) > 0,
          f'{len(configs)} configs and {len(workdirs)} workdirs: pass one '
          'workdir a config')
  require(len({pathlib.Path(w).absolute() for w in workdirs}) == len(workdirs),
          'two runs of a group have the same workdir')
  require(jax.process_count() == 1, 'runs train as one program in one process, '
          f'and there are {jax.process_count()}')
  for config in configs:
    runs.check(config)
    require(not refusal(config), refusal(config))
    differ = [name for (name, a), (_, b) in zip(
        _shared(configs[0]), _shared(config), strict=True) if a != b]
    require(not differ, f'runs of a group differ in {", ".join(differ)}: only '
            f'{", ".join(FIELDS)} may')


def _changes(config, workdir, derived) -> list[run_config.Change]:
  """Returns what differs from the run in a workdir, if there is one, as far as
  that changes no figure: else it is refused, as by train.py."""
  if not run_config.has_begun(workdir):
    return []
  changes = run_config.compare(
      run_config.load(workdir), config,
      run_config.load_derived(workdir), derived)
  run_config.check(changes, allow_config_change=False)
  return changes


def _restored(run: runs.Run, member: Member) -> Member:
  restored = member.saved.restore(run.abstract)
  if restored is None:
    return member
  for sentence in restored.damaged:
    print(f'warning: {sentence}', file=sys.stderr)
  print(f'{member.workdir}: going on from step {restored.step}')
  return dataclasses.replace(member, state=restored.state,
                             start=restored.record['next_batch'])


class Group:
  """Runs at one step, as one program: its arrays and its functions.

  Arrays have a leading axis of the runs, filled up with copies of the last to
  a multiple of the devices in use.
  """

  def __init__(self, run: runs.Run, members: Sequence[Member]):
    self.run = run
    self.members = members
    each = -(-len(members) // jax.device_count())
    used = -(-len(members) // each)
    self._rows = np.minimum(np.arange(each * used), len(members) - 1)
    self.mesh = jax.make_mesh((used,), (RUNS,), (AxisType.Auto,),
                              devices=jax.devices()[:used])
    self.seeds = list(dict.fromkeys(m.config.seed for m in members))
    flat = [run_config.flatten(m.config) for m in members]
    differ = [f for f in FIELDS if len({c[f] for c in flat}) > 1]
    self.values = self._put({
        name: np.array([flat[i][name] for i in self._rows], DTYPES[name])
        for name in differ or FIELDS[:1]})

  @property
  def config(self) -> ml_collections.ConfigDict:
    return self.members[0].config

  @property
  def model(self) -> ModelConfig:
    return self.run.model

  @property
  def devices(self) -> list[jax.Device]:
    return list(self.mesh.devices.flat)

  @property
  def figures(self) -> dict[str, int]:
    return {'runs_at_once': len(self.members)}

  def context(self):
    return contextlib.nullcontext()  # each run is on one device

  def describe(self, *args) -> str:
    return (f'{len(self.members)} runs at once, each of them:\n'
            + self.run.describe(*args))

  def _put(self, tree, spec=_EACH):
    return jax.device_put(tree, NamedSharding(self.mesh, spec))

  def seeded(self, seed: int) -> ml_collections.ConfigDict:
    """Returns the config with one of the group's seeds."""
    config = self.config.copy_and_resolve_references()
    with config.unlocked():
      config.seed = seed
    return config

  def put(self, *batches: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Returns (batch, values), what a step takes beside the state: of one
    batch for all runs, or of those of `seeds`, for each run its own."""
    if len(batches) == 1:
      return self._put(batches[0], _ALL), self.values
    of = {seed: batch for seed, batch in zip(self.seeds, batches, strict=True)}
    rows = [of[self.members[i].config.seed] for i in self._rows]
    return self._put({name: np.stack([row[name] for row in rows])
                      for name in rows[0]}), self.values

  def state(self):
    """Returns the joint state: new, or of what was restored."""
    if self.members[0].state is None:
      return jax.jit(self._over_runs(self._init, (0,)))(self.values)
    states = [jax.device_get(m.state) for m in self.members]
    return self._put(jax.tree.map(
        lambda *xs: np.stack([xs[i] for i in self._rows]), *states))

  def _init(self, values):
    config = with_values(self.config, values)
    module = self.run.module.clone(config=dataclasses.replace(
        self.run.model, init_stddev=config.model.init_stddev,
        init_scale=config.model.init_scale))
    return init_state(module, self.run.tx, jax.random.key(config.seed))

  def train_step(self):
    batch_axis = 0 if len(self.seeds) > 1 else None
    return jax.jit(self._over_runs(self._step, (0, (batch_axis, 0))),
                   donate_argnums=0)

  def _step(self, state: TrainState, given: tuple[dict, dict]):
    batch, values = given
    config = with_values(self.config, values)
    roles = parameter_roles(self.run.module)
    rates = mup.rates(self.run.model, config.optim.name, roles)
    tx = optimizers.chain(config.optim, config.train.steps, roles, rates)
    return make_train_step(self.run.module, tx, config)(state, batch)

  def eval_step(self):
    step = make_eval_step(self.run.module, self.config)
    return jax.jit(self._over_runs(
        lambda params, given: step(params, given[0]), (0, (None, 0))))

  def _over_runs(self, fn: Callable, in_axes: tuple) -> Callable:
    """`fn` over the runs, on each device over those that it holds."""
    specs = jax.tree.map(lambda axis: _ALL if axis is None else _EACH, in_axes,
                         is_leaf=lambda axis: axis is None)
    return jax.shard_map(jax.vmap(fn, in_axes), mesh=self.mesh,
                         in_specs=specs, out_specs=_EACH, check_vma=False)

  def split(self, state: TrainState) -> Iterator[TrainState]:
    host = jax.device_get(state)
    for row in range(len(self.members)):
      yield jax.tree.map(jnp.asarray, self.part(host, row))

  def part(self, figures, row: int):
    return jax.tree.map(lambda x: x[row], figures,
                        is_leaf=lambda x: isinstance(x, list))


def with_values(config: ml_collections.ConfigDict, values
                ) -> ml_collections.ConfigDict:
  """Returns a copy of `config` that holds traced values in some fields."""
  config = config.copy_and_resolve_references()
  with config.unlocked(), config.ignore_type():
    for name, value in values.items():
      *parents, field = name.split('.')
      at = config
      for parent in parents:
        at = at[parent]
      at[field] = value
  return config
