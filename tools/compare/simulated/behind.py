"""The simulated trainer behind the real ledger, killed and started again.

It takes the place of train.py alone: plans, sweeps' folders, ledger, adoption
and reading are those of real studies (tools/compare/trainer.py).
"""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile

from tools.compare import phases, trainer
from tools.compare import plan as plans
from tools.compare.frozen import Frozen
from tools.compare.simulated import rates, world
from tools.compare.simulated.rates import Mean, Row
from tools.compare import layout
from tools.compare import ledger as ledger_lib
from tools.compare import run as sweep_run

KILLS = 4  # of a study that is killed, at least
EVENTS = 90  # a process dies at one of so many
STUDIES = 5  # on disk, of each way to run them


class Trainer(trainer.Trainer):
  """Writes what train.py would have written.

  Args:
    workdir: of the study.
    frozen: its plan.
    own: what is true.
    dies: at which event the process kills itself; 0: it does not.
  """

  def __init__(self, workdir, frozen: Frozen, own: world.World, dies: int = 0):
    super().__init__(workdir, frozen)
    self._world, self._dies = own, dies

  def work(self, path: pathlib.Path, description: dict, ledger) -> bool:
    sweep_run.adopt(path, ledger)
    name = ledger.register()
    while waiting := ledger.runs(ledger_lib.PENDING):
      self._event()
      run = waiting[0]
      if ledger.claim([run.id], name):
        self._event()
        state = self._train(path, description, run)
        self._event()
        ledger.settle(run.id, name, state, '' if state == ledger_lib.DONE
                      else 'too many bad steps')
    return True

  def _event(self) -> None:
    self._dies -= 1
    if not self._dies:
      os.kill(os.getpid(), signal.SIGKILL)

  def _train(self, path: pathlib.Path, description: dict, row) -> str:
    from training.workdir import run_config
    point = layout.row_of(description, row.point)
    config = layout.config(description, row.point, row.seed)
    steps = config.train.steps
    run = phases.Run(
        path.name.partition('-')[0], point['variant'], point['size'],
        point['workload'], row.seed, row.point, point['changes'],
        steps / self._frozen.base_config['train']['steps'])
    bad = self._world.diverges(run)
    folder = layout.run_folder(path, row.point, row.seed)
    run_config.save(folder, config)
    train = {'step': steps, 'split': 'train', 'loss': 3.0, 'step_seconds': 1e-3}
    lines = [train | {'bad_in_row': config.train.max_bad_steps * bad}]
    if not bad:
      (folder / 'checkpoints' / str(steps)).mkdir(parents=True, exist_ok=True)
      lines.append({'step': steps, 'split': 'eval', 'loss': self._world.loss(
          self._frozen.plan, run)})
    self._event()
    (folder / 'metrics.jsonl').write_text(
        ''.join(json.dumps(line) + '\n' for line in lines))
    return ledger_lib.FAILED if bad else ledger_lib.DONE


def small(**changes) -> plans.Plan:
  """Returns a plan of few runs."""
  return world.plan(2, seeds=(4, 1, 4, 4), tuning=plans.Tuning(
      {world.RATE: (1e-3, 2e-3)}, rungs=1, extend=0), q=0.5, **changes)


def frozen(plan: plans.Plan) -> Frozen:
  """Returns the plan with a whole config, as runs on disk have one."""
  from configs import base
  from training.workdir import run_config
  own, config = world.frozen(plan), base.base()
  for group, fields in own.base_config.items():
    config[group].update(fields)
  return dataclasses.replace(own, base_config=run_config.to_json(config))


def decided(found: phases.Found) -> dict:
  """Returns what was decided, without what a run in memory does not have."""
  tree = plans.to_json(found)
  for row in tree['confirm']:
    del row['speed_ups']
  return {'noise': tree['noise'], 'screen': tree['screen'],
          'confirm': tree['confirm'],
          'tuned': [row['changes'] for row in tree['tuned']]}


def resumed(studies: int) -> list[Row]:
  """The same decisions from studies in memory, and on disk: killed at random
  places and started again, or by two runners at once."""
  equal = {'killed': Mean(), 'two': Mean()}
  kills = Mean()
  for number in range(min(studies, STUDIES)):
    plan = small()
    own = world.World(number, (0.01,) * 3, {'v1': (-0.1,) * 3},
                      diverge={'': 0.02}, bend=0.01, best={'': 2e-3})
    expected = decided(phases.run(
        world.frozen(plan), world.Memory(own, plan), anyway=True))
    root = pathlib.Path(tempfile.mkdtemp(prefix='study-'))
    try:
      found, deaths = _killed(root / 'killed', plan, own, number)
      equal['killed'].add(found == expected)
      kills.add(deaths)
      for found in _two(root / 'two', plan, own):
        equal['two'].add(found == expected)
    finally:
      shutil.rmtree(root)
  return [rates.told('on disk, killed at random places', 'kills of a study',
                     kills),
          _all('on disk, killed at random places', equal['killed']),
          _all('on disk, by two runners at once', equal['two'])]


def _all(setting: str, equal: Mean) -> Row:
  return Row(setting, 'the decisions are those of a study in memory',
             equal.value, equal.error, equal.count, 'all', equal.value == 1)


def _killed(workdir, plan, own, number: int) -> tuple[dict, int]:
  """Returns what is decided in the end, and how many processes died."""
  chance, deaths = random.Random(number), 0
  while True:
    dies = chance.randint(1, EVENTS) if deaths < KILLS else 0
    if _wait(_start(workdir, 'found', plan, own, dies)):
      return _read(workdir, 'found'), deaths
    deaths += 1


def _two(workdir, plan, own) -> list[dict]:
  names = ('one', 'other')
  started = [_start(workdir, name, plan, own) for name in names]
  if not all([_wait(pid) for pid in started]):
    raise RuntimeError('a simulated runner failed')
  return [_read(workdir, name) for name in names]


def _start(workdir, name: str, plan, own, dies: int = 0) -> int:
  """Returns a process that goes through the study."""
  pid = os.fork()
  if pid:
    return pid
  code = 1
  try:
    sys.stdout = open(os.devnull, 'w')
    trainer.POLL_SECONDS = 0.05
    whole = frozen(plan)
    found = phases.run(whole, Trainer(workdir, whole, own, dies), anyway=True)
    (workdir / f'{name}.json').write_text(json.dumps(decided(found)))
    code = 0
  finally:
    os._exit(code)


def _wait(pid: int) -> bool:
  """Returns whether a process went through; RuntimeError where it failed."""
  code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  if code not in (0, -signal.SIGKILL):
    raise RuntimeError(f'a simulated runner ended with exit code {code}')
  return code == 0


def _read(workdir, name: str) -> dict:
  return json.loads((workdir / f'{name}.json').read_text())
