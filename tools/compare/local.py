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

from tools import tether
from tools.compare import commands, layout, worker
from tools.compare import ledger as ledger_lib
from training import progress
from training.distributed import interrupts

POLL_SECONDS = 0.2
GPUS = 'CUDA_VISIBLE_DEVICES'
STOPPING = ('stopping: what is under way is saved first; once more ends it at '
            'once')


@dataclasses.dataclass
class Job:
  """A process, and the runs that it trains or evaluates."""
  runs: list
  state: str  # that they were claimed in
  process: subprocess.Popen
  slot: int
  checked: bool = False  # whether train.py got the config of the sweep
  wrong: bool = False  # it did not
  told: int = 0  # signals that were passed on to it


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
    self._signals = interrupts.Count()
    self._beaten = 0.0
    self._waiting = False

  def run(self) -> bool:
    """Returns whether it came to the end, and was not told to stop."""
    waiting = [run for state in (ledger_lib.PENDING, ledger_lib.OWED)
               for run in self._ledger.runs(state)]
    with (progress.during('runs', len(waiting)) as self._advance,
          interrupts.handled(self._heard)):
      return self._run()

  def _run(self) -> bool:
    stopping = False
    try:
      while True:
        self._beat()
        if self._signals.n and not stopping:
          stopping = True
          self._say(STOPPING)
        for job in self._jobs:
          self._pass_on(job)
          self._check_config(job)
        for job in [j for j in self._jobs if j.process.poll() is not None]:
          self._jobs.remove(job)
          self._settle(job)
        while not self._signals.n and len(self._jobs) < self._parallel:
          if not self._start():
            break
        if not self._jobs and (self._signals.n or not self._left()):
          return not self._signals.n
        time.sleep(POLL_SECONDS)
    finally:
      for job in self._jobs:  # an error of ours: leave nothing running
        job.process.kill()

  def _heard(self, number) -> None:
    """Counts alone: it may come while a job is being started."""
    self._signals.add(number)

  def _pass_on(self, job: Job) -> None:
    """The first signal lets a run save and end; the second kills it."""
    signals = self._signals.n  # one more may come any moment
    if job.told < signals and job.process.poll() is None:
      job.process.send_signal(
          signal.SIGTERM if signals == 1 else signal.SIGKILL)
    job.told = signals

  def _left(self) -> bool:
    """Whether there is something to wait for, all jobs of ours being done:
    what a dead runner held, and what one holds that may be dead."""
    freed = self._recover()
    doubtful = [] if freed else self._ledger.doubtful()
    if doubtful and not self._waiting:
      self._say(f'waiting: the runner of {"; ".join(doubtful)} is silent; '
                f'after {ledger_lib.STALE_SECONDS} s it counts as dead')
    self._waiting = bool(doubtful)
    return bool(freed or doubtful)

  def _recover(self) -> list[str]:
    freed = self._ledger.recover()
    for run in freed:
      self._say(f'{run}: its runner died; it goes on here')
    return freed

  def _beat(self) -> None:
    if time.monotonic() - self._beaten < ledger_lib.BEAT_SECONDS:
      return
    self._beaten = time.monotonic()
    ours = self._ledger.beat(self._name)
    for job in self._jobs:
      if not ours & {run.id for run in job.runs}:
        job.process.kill()  # we were taken for dead; another has them
    self._recover()

  def _start(self) -> bool:
    """Starts one more job; returns whether there was one to take."""
    # What is owed comes last, so that many are evaluated in one process.
    for state in (ledger_lib.PENDING, ledger_lib.OWED):
      waiting = self._ledger.runs(state)
      if not {run.point for run in waiting} <= {
          point['name'] for point in self._description['points']}:
        # Points were added.
        self._description = layout.load_description(self._workdir)
      for group in self._groups(waiting, state):
        claimed = self._ledger.claim([run.id for run in group], self._name,
                                     state)
        runs = [run for run in group if run.id in claimed]
        if runs:
          self._spawn(runs, state)
          return True
    return False

  def _groups(self, waiting: list, state: str) -> list[list]:
    if self._group == 1:
      return [[run] for run in waiting]
    alone = [[run] for run in waiting if run.alone]
    waiting = [run for run in waiting if not run.alone]
    if state == ledger_lib.OWED:
      return self._alike(waiting) + alone
    from training import vectorised
    configs = [layout.config(self._description, run.point, run.seed)
               for run in waiting]
    return [[waiting[i] for i in indices[at:at + self._group]]
            for indices in vectorised.groups(configs)
            for at in range(0, len(indices), self._group)] + alone

  def _alike(self, waiting: list) -> list[list]:
    """Returns the runs that owe the same tasks together, as many as leave
    something for each of the processes."""
    by_tasks = {}
    for run in waiting:
      by_tasks.setdefault(run.tasks, []).append(run)
    size = min(self._group, -(-len(waiting) // self._parallel) or 1)
    return [runs[at:at + size] for runs in by_tasks.values()
            for at in range(0, len(runs), size)]

  def _spawn(self, runs: list, state: str) -> None:
    first = runs[0]
    names = [(run.point, run.seed) for run in runs]
    if state == ledger_lib.OWED and len(runs) > 1:
      words = commands.evaluate_together(self._workdir, names,
                                         first.tasks.split(','))
    elif state == ledger_lib.OWED:
      words = commands.evaluate(self._workdir, *names[0],
                                first.tasks.split(','))
    elif len(runs) > 1:
      words = commands.train_together(self._workdir, names)
    else:
      words = commands.train(self._description, self._workdir, first.point,
                             first.seed)
    slot = min(set(range(self._parallel)) - {job.slot for job in self._jobs})
    folder = self._folder(first)
    doing = 'evaluating' if state == ledger_lib.OWED else 'training'
    for run in runs:
      self._say(f'{run.point}, seed {run.seed}: {doing}')
      layout.log(self._folder(run), f'$ {shlex.join(["python", *words])}')
    for run in runs[1:]:
      if state == ledger_lib.PENDING:  # evaluations print into their own logs
        layout.log(self._folder(run), f'What it printed: {folder / "log.txt"}')
    with (folder / 'log.txt').open('a') as log:
      # A session of its own: Ctrl-C reaches it through _heard alone.
      process = subprocess.Popen(
          tether.words([sys.executable, *words], _cores(slot, self._parallel)),
          stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
          start_new_session=True, env=_environment(slot, self._parallel))
    self._jobs.append(Job(runs, state, process, slot))

  def _folder(self, run) -> pathlib.Path:
    return layout.run_folder(self._workdir, run.point, run.seed)

  def _check_config(self, job: Job) -> None:
    """Ends a run whose config is not the sweep's: its file was edited since
    the sweep began."""
    from training.workdir import run_config
    run = job.runs[0]
    folder = self._folder(run)
    # What trains as a group gets its configs of sweep.json.
    if job.checked or len(job.runs) > 1 or not run_config.exists(folder):
      return
    job.checked = True
    wrong = layout.differing(self._description, self._workdir, run.point,
                             run.seed)
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
    # A group that none of its runs ended, but an error of all.
    fell = (len(job.runs) > 1 and code not in (0, worker.UNFINISHED)
            and not self._signals.n)
    for run in job.runs:
      # Tasks may be added at any moment but between these two.
      with self._ledger.transaction():
        state, error = self._outcome(
            job, run, code, self._ledger.tasks(run.id))
        alone = fell and state == ledger_lib.FAILED
        settled = self._ledger.settle(
            run.id, self._name, job.state if alone else state,
            '' if alone else error, alone)
      if settled:
        if state in (ledger_lib.DONE, ledger_lib.FAILED) and not alone:
          self._advance()
        self._say(
            f'{run.point}, seed {run.seed}: '
            + ('goes on alone, since its group failed' if alone else state)
            + (f': {error}' if error else ''))

  def _outcome(self, job: Job, run, code: int, tasks: list[str]
               ) -> tuple[str, str]:
    """Returns the state of a run that ended, and why it failed."""
    folder = self._folder(run)
    # Of several that were evaluated, each has a file as soon as it is done.
    ended = code == 0 or len(job.runs) > 1
    if job.wrong:
      return ledger_lib.FAILED, layout.error(folder)
    if job.state == ledger_lib.PENDING:
      config = layout.config(self._description, run.point, run.seed)
      if layout.is_trained(folder, config.train):
        return (ledger_lib.OWED if tasks else ledger_lib.DONE), ''
    elif ended and layout.is_evaluated(folder, tasks):
      return ledger_lib.DONE, ''
    elif ended and layout.is_evaluated(folder, run.tasks.split(',')):
      return ledger_lib.OWED, ''  # a task was added meanwhile
    if self._signals.n:  # it saved and left, or had nothing to save yet
      return job.state, ''
    if code < 0:
      name = signal.Signals(-code).name
      return ledger_lib.FAILED, f'{layout.error(folder)} (killed by {name})'
    return ledger_lib.FAILED, f'{layout.error(folder)} (exit code {code})'

  def _say(self, text: str) -> None:
    """Prints; where nobody reads it, stops: `| head` has read enough, or the
    signal that we got ended `| tee` too."""
    try:
      _say(text)
    except OSError:
      interrupts.print_nowhere([sys.stdout.fileno()])
      if not self._signals.n:
        self._signals.add(signal.SIGTERM)


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
