"""A suite of probes as its file describes it, and the training of it.

A file of configs/probes/ holds LRS, the learning rates, SEEDS, how many, and
suite(add), which calls add(NAME, **{'probe.levels': (1, 2), ...}) for each
task: a probe by its name, with the fields in which a run differs from the
architecture's config. add(NAME, label=OTHER, ...) calls it by another name, so
that a suite may have a probe several times.
"""

from collections.abc import Collection, Iterator, Sequence
import json
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

from etils import epath
import ml_collections

from configs.errors import EnvironmentFailure, one_of, require, short
from tools.compare import spec
from training import config_files
from training.workdir import schema, storage

DIVERGED = 'diverged.json'  # in the folder of a run
_OWN = ('seed', 'optim.lr')  # fields by which the runs of a task differ


class Run(NamedTuple):
  """One training: a task, by its label, at a learning rate with a seed."""
  task: str
  lr: float
  seed: int
  config: ml_collections.ConfigDict

  def folder(self, workdir: epath.Path) -> epath.Path:
    return workdir / self.task / f'lr_{self.lr:g}' / f'seed_{self.seed}'


class Suite(NamedTuple):
  """What a file of configs/probes/ asks for of one architecture."""
  file: str
  lrs: tuple[float, ...]
  seeds: tuple[int, ...]
  configs: dict[str, ml_collections.ConfigDict]

  def runs(self, task: str) -> Iterator[Run]:
    for lr in self.lrs:
      for seed in self.seeds:
        config = self.configs[task].copy_and_resolve_references()
        config.seed, config.optim.lr = seed, lr
        yield Run(task, lr, seed, config.lock())


def load(file: str, base: ml_collections.ConfigDict, only: Sequence[str] = (),
         seeds: int = 0, overrides: Collection[str] = ()) -> Suite:
  """Returns the suite of a file for the architecture of `base`.

  Args:
    file: of configs/probes/.
    base: the config of the architecture.
    only: tasks of the suite to keep; (): all.
    seeds: how many; 0: as the file says.
    overrides: fields that a command line sets.

  Raises:
    RequestError: for a file that is no suite, or a run that cannot be.
  """
  from training import preflight
  from training.data import probes
  require(os.path.isfile(file), f'no suite {file!r}: choose from '
          f'{", ".join(_files())}, or write one')
  module = config_files.run(file)
  for name in ('LRS', 'SEEDS', 'suite'):
    require(hasattr(module, name), f'{file} has no {name}: a suite has LRS, '
            'SEEDS and suite(add)')
  lrs, own = module.LRS, module.SEEDS
  require(isinstance(lrs, Collection) and len(lrs) > 0 and all(
      type(lr) in (int, float) and 0 < lr < math.inf for lr in lrs),
          f'{file}: LRS is {short(lrs)}: write learning rates above 0, such as '
          '(1e-3,) or (1e-3, 3e-3)')
  require(type(own) is int and own >= 1, f'{file}: SEEDS is {short(own)}: '
          'write a whole number from 1 on')
  configs: dict[str, ml_collections.ConfigDict] = {}

  def add(task: str, label: str = '', **fields: Any) -> None:
    one_of(f'{file}: task', task, probes.PROBES)
    label = label or task
    require(label not in configs, f'{file} adds {label!r} twice')
    require(re.fullmatch(r'\w+', label) is not None, f'{file}: {label!r} names '
            'a folder: choose letters, digits and underscores')
    if not only or label in only:
      for field in overrides:
        require(field not in (*_OWN, *_own(task, base, fields), *fields),
                f'--config.{field} is set, which the suite {file} sets itself '
                f'in its task {label!r}: leave it out, or change the suite')
    configs[label] = spec.changed(base, _own(task, base, fields) | fields,
                                  f'{file}, task {task!r}')

  config_files.call(file, module.suite, add)
  for task in only:
    one_of('--only', task, configs)
  suite = Suite(file, tuple(lrs), tuple(range(seeds or own)),
                {task: config for task, config in configs.items()
                 if not only or task in only})
  for task in suite.configs:
    for run in suite.runs(task):
      preflight.check_config(run.config)
  return suite


def _files() -> list[str]:
  return sorted(str(path) for path in pathlib.Path('configs/probes').glob(
      '*.py') if path.stem != '__init__')


def _own(task: str, base: ml_collections.ConfigDict, fields: dict[str, Any]
         ) -> dict[str, Any]:
  """Returns the fields that every task sets, unless it says otherwise."""
  from training.data import probes
  steps = fields.get('train.steps', base.train.steps)
  return {'objective': probes.PROBES[task].objective,
          'data.source': f'probe:{task}',
          'model.vocab_size': 0, 'model.max_len': 0,
          'eval.tasks': 'probe', 'eval.every_steps': steps,
          'checkpoint.every_steps': steps, 'checkpoint.keep': 1,
          'log.every_steps': max(steps // 10, 1),
          'optim.warmup_steps': steps // 10}


def train(suite: Suite, workdir: epath.Path) -> None:
  """Trains what is not trained yet, a task after the other. A run that diverges
  is recorded, and the others go on.

  Raises:
    EnvironmentFailure: after a signal; all that was trained is saved.
  """
  from training import vectorised
  for task in suite.configs:
    runs = list(suite.runs(task))
    print(f'{task}: {len(suite.lrs)} learning rates x {len(suite.seeds)} seeds',
          flush=True)
    left = [run for run in runs if not diverged(run, workdir)]
    if len(left) < len(runs):
      print(f'{len(runs) - len(left)} of {len(runs)} runs diverged before, and '
            'are not trained again')
    for group in vectorised.groups([run.config for run in left]):
      _train_group([left[i] for i in group], workdir)


def _train_group(runs: Sequence[Run], workdir: epath.Path) -> None:
  from training import vectorised
  from training.workdir import run_config
  try:
    stopped = vectorised.train([run.config for run in runs],
                               [run.folder(workdir) for run in runs])
  except vectorised.Unfinished as unfinished:
    for place in unfinished.diverged:
      run = runs[place]
      storage.write(run.folder(workdir) / DIVERGED, json.dumps(
          {'why': unfinished.sentences[place],
           'config': run_config.to_json(run.config)}, indent=1) + '\n')
    if not unfinished.sentences.keys() <= unfinished.diverged:
      raise
    stopped = unfinished.stopped
  if stopped:  # as these runs ended
    raise EnvironmentFailure('stopped: the same command goes on with the other '
                             'runs')


def diverged(run: Run, workdir: epath.Path) -> bool:
  """Whether the run is recorded to have diverged, with the config that it has
  now.

  Raises:
    RequestError: for a record that is damaged.
  """
  from training.workdir import run_config
  path = run.folder(workdir) / DIVERGED
  if not path.exists():
    return False
  record = schema.parse(path.read_bytes(), str(path))
  schema.check_shape(record, {'why': str, 'config': {}}, str(path))
  return record['config'] == json.loads(json.dumps(
      run_config.to_json(run.config)))
