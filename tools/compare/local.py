"""The local launcher: claims runs from the ledger, several at a time, and
trains each, or a group of them, as a process of its own; another process then
does the evaluations that they owe."""

import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

from tools import dies_with_parent
from tools.compare import layout, worker
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
  evaluates: bool
  process: subprocess.Popen
  slot: int
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
    waiting = self._ledger.runs(ledger_lib.PENDING)
    with (progress.during('runs', len(waiting)) as self._advance,
          # It counts alone: it may come while a job is being started.
          interrupts.handled(self._signals.add)):
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
        for job in [j for j in self._jobs if j.process.poll() is not None]:
          self._jobs.remove(job)
          self._ended(job)
        while not self._signals.n and len(self._jobs) < self._parallel:
          if not self._start():
            break
        if not self._jobs and (self._signals.n or not self._left()):
          return not self._signals.n
        time.sleep(POLL_SECONDS)
    finally:
      for job in self._jobs:  # an error of ours: leave nothing running
        job.process.kill()

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
      elif len(job.runs) == 1 and self._stranger(job.runs[0]):
        # The sweep's file was changed since; groups train by sweep.json.
        job.process.kill()
    self._recover()

  def _start(self) -> bool:
    """Starts one more job; returns whether there was one to take."""
    waiting = self._ledger.runs(ledger_lib.PENDING)
    if not {run.point for run in waiting} <= {
        point['name'] for point in self._description['points']}:
      # Points were added.
      self._description = layout.load_description(self._workdir)
    for group in self._groups(waiting):
      claimed = self._ledger.claim([run.id for run in group], self._name)
      if runs := [run for run in group if run.id in claimed]:
        slot = min(set(range(self._parallel)) - {j.slot for j in self._jobs})
        left = [run for run in runs if not self._is_trained(run)]
        self._spawn(left or runs, not left and bool(runs[0].tasks), slot)
        # What was trained before is evaluated beside the others.
        self._jobs[-1].runs = runs
        return True
    return False

  def _groups(self, waiting: list) -> list[list]:
    """Returns the runs that train as one program, `group` of them at most."""
    alone = [[run] for run in waiting if run.alone or self._group == 1]
    waiting = [] if self._group == 1 else [r for r in waiting if not r.alone]
    from training import vectorised
    configs = [self._config(run) for run in waiting]
    return [[waiting[i] for i in indices[at:at + self._group]]
            for indices in vectorised.groups(configs)
            for at in range(0, len(indices), self._group)] + alone

  def _spawn(self, runs: list, evaluates: bool, slot: int) -> None:
    names = [(run.point, run.seed) for run in runs]
    tasks = runs[0].tasks if evaluates else ''
    if len(runs) > 1:
      words = layout.group_command(self._workdir, names, tasks)
    elif evaluates:
      words = layout.evaluate_command(self._workdir, *names[0], tasks)
    else:
      words = layout.train_command(self._description, self._workdir, *names[0])
    log = self._folder(runs[0]) / 'log.txt'
    for run in runs:
      self._say(f'{run.point}, seed {run.seed}: '
                + ('evaluating' if evaluates else 'training'))
      layout.log(self._folder(run), f'$ {shlex.join(["python", *words])}')
    for run in runs[1:] * (not evaluates):  # else each prints into its own
      layout.log(self._folder(run), f'What it printed: {log}')
    with log.open('a') as file:
      # A session of its own: Ctrl-C reaches it through our handler alone.
      process = subprocess.Popen(
          dies_with_parent.words([sys.executable, *words],
                                 _cores(slot, self._parallel)),
          stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
          start_new_session=True, env=_environment(slot, self._parallel))
    self._jobs.append(Job(runs, evaluates, process, slot))

  def _folder(self, run) -> pathlib.Path:
    return layout.run_folder(self._workdir, run.point, run.seed)

  def _config(self, run):
    return layout.config(self._description, run.point, run.seed)

  def _is_trained(self, run) -> bool:
    return layout.is_trained(self._folder(run), self._config(run).train)

  def _stranger(self, run) -> str:
    """Returns why what a run has begun is not the sweep's, or ''."""
    from training.workdir import run_config
    return layout.stranger(
        self._description, self._workdir, run.point, run.seed
        ) if run_config.exists(self._folder(run)) else ''

  def _ended(self, job: Job) -> None:
    """Writes into the ledger how a job ended, run by run; those that are
    trained and owe evaluations go on."""
    code = job.process.returncode
    # A group that none of its runs ended, but an error of all.
    fell = (len(job.runs) > 1 and code not in (0, worker.UNFINISHED)
            and not self._signals.n)
    owing = []
    for run in job.runs:
      # Tasks may be added at any moment but between these two.
      with self._ledger.transaction():
        now = self._ledger.run(run.id)
        state, error = self._outcome(run, now.owes, job.evaluates, code)
        if state == ledger_lib.RUNNING and not fell:
          owing.append(now)
          continue
        alone = fell and state in (ledger_lib.FAILED, ledger_lib.RUNNING)
        settled = self._ledger.settle(
            run.id, self._name, ledger_lib.PENDING if alone else state,
            '' if alone else error, alone)
      if settled:
        if state in ledger_lib.ENDED and not alone:
          self._advance()
        self._say(
            f'{run.point}, seed {run.seed}: '
            + ('goes on alone, since its group failed' if alone else state)
            + (f': {error}' if error else ''))
    if owing:
      self._spawn(owing, True, job.slot)

  def _outcome(self, run, owed: list[str], evaluated: bool, code: int
               ) -> tuple[str, str]:
    """Returns the state of a run that ended, and why it failed; RUNNING where
    it is trained and owes evaluations."""
    folder = self._folder(run)
    if error := self._stranger(run):
      return ledger_lib.FAILED, error
    if self._is_trained(run):
      if layout.is_evaluated(folder, owed):
        return ledger_lib.DONE, ''
      # Also where a task was added while the others were done.
      if not self._signals.n and (
          not evaluated or layout.is_evaluated(folder, run.owes)):
        return ledger_lib.RUNNING, ''
    if self._signals.n:  # it saved and left, or had nothing to save yet
      return ledger_lib.PENDING, ''
    how = (f'exit code {code}' if code >= 0
           else f'killed by {signal.Signals(-code).name}')
    return ledger_lib.FAILED, f'{layout.error(folder)} ({how})'

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


def enter(workdir, ledger) -> None:
  """Frees what dead runners held, and marks as done what is so on disk and the
  ledger has not seen: runs of a printed command, or of a ledger that was lost;
  as failed, what was trained there by another config; and as pending, what was
  done before a task of it was added."""
  ledger.recover()
  pending, done = map(ledger.runs, (ledger_lib.PENDING, ledger_lib.DONE))
  # Read later than the ledger, it has all of these points.
  description = layout.load_description(workdir)
  for run in pending:
    folder = layout.run_folder(workdir, run.point, run.seed)
    config = layout.config(description, run.point, run.seed)
    if layout.is_trained(folder, config.train):
      error = layout.stranger(description, workdir, run.point, run.seed)
      if error or layout.is_evaluated(folder, run.owes):
        ledger.adopt(run.id, ledger_lib.PENDING, ledger_lib.FAILED if error
                     else ledger_lib.DONE, error)
  for run in done:
    folder = layout.run_folder(workdir, run.point, run.seed)
    if not layout.is_evaluated(folder, run.owes):
      ledger.adopt(run.id, ledger_lib.DONE, ledger_lib.PENDING)
