"""The local launcher: claims runs from the ledger, several at a time, and
trains each as a process of its own."""

import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

from tools.sweep import commands, layout
from tools.sweep import ledger as ledger_lib

POLL_SECONDS = 0.2
BEAT_SECONDS = 10
GPUS = 'CUDA_VISIBLE_DEVICES'
TETHER = str(pathlib.Path(__file__).with_name('tether.py'))


@dataclasses.dataclass
class Job:
  """A process, and the runs that it trains or evaluates."""
  runs: list
  state: str  # that they were claimed in
  process: subprocess.Popen
  slot: int
  checked: bool = False  # whether train.py got the config of the sweep
  wrong: bool = False  # it did not


class Runner:
  """Takes what is pending until nothing is, `parallel` processes at once.

  Args:
    description: of the sweep, as sweep.json holds it.
    workdir: of the sweep.
    ledger: its ledger.
    parallel: how many processes at once; they share the cores out.
    group: how many runs may train as one program; 1: none do.
  """

  def __init__(self, description, workdir, ledger, parallel: int, group: int):
    self._description = description
    self._workdir = pathlib.Path(workdir)
    self._ledger = ledger
    self._parallel = parallel
    self._group = group
    self._name = ledger.register()
    self._jobs: list[Job] = []
    self._signals = 0
    self._beaten = 0.0

  def run(self) -> bool:
    """Returns whether it came to the end, and was not told to stop."""
    old = {number: signal.signal(number, self._stop)
           for number in (signal.SIGINT, signal.SIGTERM)}
    try:
      while True:
        self._beat()
        for job in self._jobs:
          self._check_config(job)
        for job in [j for j in self._jobs if j.process.poll() is not None]:
          self._jobs.remove(job)
          self._settle(job)
        while not self._signals and len(self._jobs) < self._parallel:
          if not self._start():
            break
        if not self._jobs:
          return not self._signals
        time.sleep(POLL_SECONDS)
    finally:
      for job in self._jobs:  # an error of ours: leave nothing running
        job.process.kill()
      for number, handler in old.items():
        signal.signal(number, handler)

  def _stop(self, number, frame) -> None:
    """The first signal lets the runs save and end; the second kills them."""
    self._signals += 1
    for job in self._jobs:
      if job.process.poll() is None:
        job.process.send_signal(
            signal.SIGTERM if self._signals == 1 else signal.SIGKILL)

  def _beat(self) -> None:
    if time.monotonic() - self._beaten < BEAT_SECONDS:
      return
    self._beaten = time.monotonic()
    ours = self._ledger.beat(self._name)
    for job in self._jobs:
      if not ours & {run.id for run in job.runs}:
        job.process.kill()  # we were taken for dead; another has them
    for run in self._ledger.recover():
      _say(f'{run}: its runner died; it goes on here')

  def _start(self) -> bool:
    """Starts one more job; returns whether there was one to take."""
    for state in (ledger_lib.OWED, ledger_lib.PENDING):
      waiting = self._ledger.runs(state)
      for group in self._groups(waiting, state):
        claimed = self._ledger.claim([run.id for run in group], self._name,
                                     state)
        runs = [run for run in group if run.id in claimed]
        if runs:
          self._spawn(runs, state)
          return True
    return False

  def _groups(self, waiting: list, state: str) -> list[list]:
    if state == ledger_lib.OWED or self._group == 1:
      return [[run] for run in waiting]
    from training import vectorised
    configs = [layout.config(self._description, run.point, run.seed)
               for run in waiting]
    return [[waiting[i] for i in indices[at:at + self._group]]
            for indices in vectorised.groups(configs)
            for at in range(0, len(indices), self._group)]

  def _spawn(self, runs: list, state: str) -> None:
    first = runs[0]
    if state == ledger_lib.OWED:
      words = commands.evaluate(self._workdir, first.point, first.seed,
                                first.tasks.split(','))
    elif len(runs) > 1:
      words = commands.train_together(
          self._workdir, [(run.point, run.seed) for run in runs])
    else:
      words = commands.train(self._description, self._workdir, first.point,
                             first.seed)
    slot = min(set(range(self._parallel)) - {job.slot for job in self._jobs})
    folder = self._folder(first)
    for run in runs:
      layout.log(self._folder(run), f'$ {shlex.join(["python", *words])}')
    for run in runs[1:]:
      layout.log(self._folder(run), f'What it printed: {folder / "log.txt"}')
    with (folder / 'log.txt').open('a') as log:
      # A session of its own: Ctrl-C reaches it through _stop alone.
      process = subprocess.Popen(
          [sys.executable, TETHER, str(os.getpid()),
           _cores(slot, self._parallel), sys.executable, *words],
          stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
          start_new_session=True, env=_environment(slot, self._parallel))
    self._jobs.append(Job(runs, state, process, slot))

  def _folder(self, run) -> pathlib.Path:
    return layout.run_folder(self._workdir, run.point, run.seed)

  def _check_config(self, job: Job) -> None:
    """Ends a run whose config is not the sweep's: its file was edited since
    the sweep began."""
    from training import run_config
    folder = self._folder(job.runs[0])
    if job.checked or not run_config.exists(folder):
      return
    job.checked = True
    run = job.runs[0]
    got = run_config.flatten(run_config.load(folder))
    expected = run_config.flatten(
        layout.config(self._description, run.point, run.seed))
    wrong = [key for key in got if got[key] != expected.get(key)]
    if wrong:
      job.wrong = True
      job.process.kill()
      job.process.wait()
      layout.log(folder, 'error: this run has another config than sweep.json '
                 f'says, in {", ".join(wrong)}: {self._description["file"]} '
                 'was changed since the sweep began')

  def _settle(self, job: Job) -> None:
    """Writes into the ledger how a job ended, run by run."""
    code = job.process.returncode
    for run in job.runs:
      state, error = self._outcome(job, run, code)
      if self._ledger.settle(run.id, self._name, state, error):
        _say(f'{run.point}, seed {run.seed}: {state}'
             + (f': {error}' if error else ''))

  def _outcome(self, job: Job, run, code: int) -> tuple[str, str]:
    tasks = run.tasks.split(',') if run.tasks else []
    folder = self._folder(run)
    if job.wrong:
      return ledger_lib.FAILED, layout.error(folder)
    if job.state == ledger_lib.PENDING:
      steps = layout.config(
          self._description, run.point, run.seed).train.steps
      if layout.is_trained(folder, steps):
        return (ledger_lib.OWED if tasks else ledger_lib.DONE), ''
    elif code == 0 and layout.is_evaluated(folder, tasks):
      return ledger_lib.DONE, ''
    if self._signals:  # it saved and left, or had nothing to save yet
      return job.state, ''
    if code < 0:
      name = signal.Signals(-code).name
      return ledger_lib.FAILED, f'{layout.error(folder)} (killed by {name})'
    return ledger_lib.FAILED, f'{layout.error(folder)} (exit code {code})'


def _cores(slot: int, parallel: int) -> str:
  """The cores of one of `parallel` slots; '' where there are too few, or no
  way to say it."""
  if not hasattr(os, 'sched_getaffinity'):
    return ''
  cores = sorted(os.sched_getaffinity(0))[slot::parallel]
  return ','.join(map(str, cores))


def _environment(slot: int, parallel: int) -> dict[str, str]:
  """The environment of one slot: of the GPUs that CUDA_VISIBLE_DEVICES names,
  its share; all where there are fewer than slots."""
  gpus = [gpu for gpu in os.environ.get(GPUS, '').split(',') if gpu]
  share = {GPUS: ','.join(gpus[slot::parallel])} if len(
      gpus) >= parallel else {}
  return os.environ | share


def _say(text: str) -> None:
  print(text, flush=True)
