"""The local launcher: claims runs from the ledger, several at a time, and
trains each, or a group of them, as a process of its own; another process then
does the evaluations that they owe.

A group is trained, and evaluated, by this module as a program:

  python -m tools.compare.local --workdir W --runs=NAME/0,NAME/1
  python -m tools.compare.local --workdir W --runs=NAME/0 --evaluate=loss
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

from common.errors import EnvironmentFailure, RequestError, Stopped
from tools import dies_with_parent
from tools.compare import layout
from training import cli, evals, progress, vectorised
from training.distributed import cpu, signals
from training.workdir import provenance, storage
from training.writer import DIVERGED, ENDED_EARLY

POLL_SECONDS = 0.2
SECONDS_BETWEEN_PROGRESS = 60  # between two lines of the time left
GPUS_VARIABLE = 'CUDA_VISIBLE_DEVICES'
EXIT_CODE_UNFINISHED = 3  # the log of each run that did not end says why


@dataclasses.dataclass
class Job:
  """A process, and the runs that it trains or evaluates.

  Attributes:
    runs: the runs.
    evaluates: whether it evaluates them, and does not train them.
    process: the process.
    slot: its place among those that run at once, from 0 on.
    signals: how many signals were passed on to it.
  """
  runs: list[layout.Run]
  evaluates: bool
  process: subprocess.Popen
  slot: int
  signals: int = 0


class Runner:
  """Takes what is pending until nothing is, `parallel` processes at once.

  Args:
    workdir: the folder of the sweep.
    ledger: its ledger.
    parallel: how many processes run at once; they share the cores out.
    group: how many runs may train as one program; 1: none do.
    begun: a function that is given the runs whose folder is new, before they
      are trained.
  """

  def __init__(self, workdir, ledger, parallel: int, group: int,
               begun: Callable[[Sequence], None] = lambda runs: None):
    self._workdir = pathlib.Path(workdir)
    self._ledger = ledger
    self._parallel = parallel
    self._group = group
    self._begun = begun
    self._name = ledger.register()
    self._jobs: list[Job] = []
    self._signals = signals.Count()
    self._beaten = 0.0

  def run(self, wait: bool = False) -> None:
    """Returns once nothing is left.

    Args:
      wait: whether to wait for the runs that other runners have, too.

    Raises:
      Stopped: after a signal, where something is.
    """
    unended = [layout.PENDING]
    if wait:
      unended.append(layout.RUNNING)
    self._description = layout.load_sweep_description(self._workdir)
    self._printed = self._since = time.monotonic()
    self._before = self._trained()
    # It counts alone: it may come while a job is being started.
    with signals.handled(self._signals.add):
      try:
        while True:
          self._beat()
          self._tell()
          self._end_jobs()
          self._start_jobs()
          if not self._jobs:
            if not self._ledger.runs(*unended):
              return
            if self._signals.n:
              raise Stopped
          time.sleep(POLL_SECONDS)
      finally:
        for job in self._jobs:  # an error of ours: leave nothing running
          job.process.kill()

  def _end_jobs(self) -> None:
    """Passes signals on to the jobs, and takes away those that have ended."""
    for job in list(self._jobs):
      self._pass_on(job)
      if job.process.poll() is not None:
        self._jobs.remove(job)
        self._ended(job)

  def _start_jobs(self) -> None:
    """Starts jobs until there are `parallel`, or nothing is left to take; none
    after a signal."""
    while not self._signals.n and len(self._jobs) < self._parallel:
      if not self._start():
        return

  def _pass_on(self, job: Job) -> None:
    """Passes signals on: the first lets a run save and end; the second kills
    it."""
    signals = self._signals.n  # one more may come any moment
    if job.signals < signals and job.process.poll() is None:
      if not job.signals:
        print(f'{job.runs[0].point}, seed {job.runs[0].seed}: stopping: it is '
              'saved first; once more ends it at once', flush=True)
      job.process.send_signal(
          signal.SIGTERM if signals == 1 else signal.SIGKILL)
    job.signals = signals

  def _beat(self) -> None:
    """Says from time to time that this runner lives, and frees what dead ones
    held."""
    if time.monotonic() - self._beaten < layout.BEAT_SECONDS:
      return
    self._beaten = time.monotonic()
    ours = self._ledger.beat(self._name)
    for job in self._jobs:
      if not any(run.id in ours for run in job.runs):
        job.process.kill()  # we were taken for dead; another has them
    for run in self._ledger.recover():
      print(f'{run}: its runner died; it goes on here', flush=True)

  def _trained(self) -> float:
    """Returns how many runs are trained, and parts of runs; one that failed is
    over."""
    trained = 0.0
    for run in self._ledger.runs():
      if run.state in (layout.DONE, layout.FAILED):
        trained += 1.0
        continue
      rows = layout.read_metrics(self._folder(run), 'train')
      if rows:
        trained += rows[-1]['step'] / self._config(run).train.steps
    return trained

  def _tell(self) -> None:
    """Prints from time to time how much is done, and how long the rest takes if
    it goes on as fast as since the start."""
    now = time.monotonic()
    if now - self._printed < SECONDS_BETWEEN_PROGRESS:
      return
    self._printed = now
    trained, number = self._trained(), len(self._ledger.runs())
    line = f'{trained:.1f} of {number} runs are trained'
    since = trained - self._before
    if since > 0:
      left = (number - trained) * (now - self._since) / max(since, 1e-9)
      line += f', some {progress.format_seconds(left)} left'
    print(line, flush=True)

  def _start(self) -> bool:
    """Starts one more job; returns whether there was one to take."""
    waiting = self._ledger.runs(layout.PENDING)
    # Read later than the ledger, it has all of these points.
    self._description = layout.load_sweep_description(self._workdir)
    for group in self._groups(waiting):
      claimed = self._ledger.claim([run.id for run in group], self._name)
      runs = [run for run in group if run.id in claimed]
      if not runs:
        continue
      # A job of runs that are all trained evaluates them beside the others.
      left = [run for run in runs if not self._is_trained(run)]
      evaluates = not left and bool(runs[0].tasks)
      taken = {job.slot for job in self._jobs}
      slot = min(set(range(self._parallel)) - taken)
      process = self._process(left or runs, evaluates, slot)
      self._jobs.append(Job(runs=runs, evaluates=evaluates, process=process,
                            slot=slot))
      return True
    return False

  def _groups(self, waiting: list[layout.Run]) -> list[list[layout.Run]]:
    """Returns the runs that train as one program, `group` of them at most."""
    alone, others = [], []
    for run in waiting:
      if run.alone or self._group == 1:
        alone.append([run])
      else:
        others.append(run)
    groups = []
    configs = [self._config(run) for run in others]
    for places in vectorised.group_configs(configs):
      for first in range(0, len(places), self._group):
        together = places[first:first + self._group]
        groups.append([others[place] for place in together])
    return groups + alone

  def _process(self, runs: list[layout.Run], evaluates: bool, slot: int
               ) -> subprocess.Popen:
    """Starts the process that trains or evaluates runs in a slot."""
    # The command.
    names = [(run.point, run.seed) for run in runs]
    tasks = runs[0].tasks if evaluates else ''
    if evaluates or len(runs) > 1:
      words = layout.group_command(self._workdir, names, tasks)
    else:
      words = layout.train_command(self._description, self._workdir, *names[0])

    # Each run's log says so; that of the first has what is printed.
    log = self._folder(runs[0]) / 'log.txt'
    self._begun([run for run in runs
                 if not (self._folder(run) / 'log.txt').exists()])
    for run in runs:
      what = 'evaluating' if evaluates else 'training'
      print(f'{run.point}, seed {run.seed}: {what}', flush=True)
      layout.append_to_log(
          self._folder(run), f'$ {shlex.join(["python", *words])}')
    if not evaluates:  # else each prints into its own
      for run in runs[1:]:
        layout.append_to_log(self._folder(run), f'What it printed: {log}')

    environment = _environment(slot, self._parallel)
    environment[provenance.PLAN_VARIABLE] = self._description.get('plan', '')
    words = dies_with_parent.words([sys.executable, *words],
                                   _cores(slot, self._parallel))
    with log.open('a') as file:
      # A session of its own: Ctrl-C reaches it through our handler alone.
      return subprocess.Popen(
          words, stdin=subprocess.DEVNULL, stdout=file,
          stderr=subprocess.STDOUT, start_new_session=True, env=environment)

  def _folder(self, run) -> pathlib.Path:
    return layout.run_folder(self._workdir, run.point, run.seed)

  def _config(self, run):
    return layout.config_of_run(self._description, run.point, run.seed)

  def _is_trained(self, run) -> bool:
    return layout.is_trained(self._folder(run), self._config(run).train)

  def _ended(self, job: Job) -> None:
    """Writes into the ledger how a job ended, run by run."""
    code = job.process.returncode
    # A group that none of its runs ended, but an error of all.
    is_error_of_all = (
        len(job.runs) > 1 and code not in (0, EXIT_CODE_UNFINISHED)
        and not self._signals.n)
    for run in job.runs:
      # Tasks may be added at any moment but between these two.
      with self._ledger.transaction():
        by_id = {row.id: row for row in self._ledger.runs()}
        state, error = self._outcome(run, by_id[run.id].owes, job.evaluates,
                                     code)
        alone = is_error_of_all and state == layout.FAILED
        if alone:
          state = layout.PENDING
        settled = self._ledger.settle(
            id=run.id, runner=self._name, state=state,
            error='' if alone else error, alone=alone)
      if not settled:
        continue
      line = f'{run.point}, seed {run.seed}: {state}'
      if alone:
        line = (f'{run.point}, seed {run.seed}: goes on alone, since its group '
                'failed')
      if error:
        line += f': {error}'
      print(line, flush=True)

  def _outcome(self, run: layout.Run, owes: list[str], evaluated: bool,
               code: int) -> tuple[str, str]:
    """Returns the state of a run that ended, and why it failed; PENDING where
    it is trained and owes evaluations.

    Args:
      run: the run as it was when it was claimed.
      owes: the evaluations that it owes by now.
      evaluated: whether its process was to evaluate it.
      code: the exit code of the process.
    """
    folder = self._folder(run)
    if (folder / 'config.json').exists():
      error = layout.why_not_of_sweep(
          self._description, self._workdir, run.point, run.seed)
      if error:
        return layout.FAILED, error
    is_trained = self._is_trained(run)
    if is_trained and layout.is_evaluated(folder, owes):
      return layout.DONE, ''
    # It saved and left, or had nothing to save yet.
    if self._signals.n:
      return layout.PENDING, ''
    # It is to be evaluated, also where a task was added while the others were
    # done.
    if is_trained and not evaluated:
      return layout.PENDING, ''
    if is_trained and layout.is_evaluated(folder, run.owes):
      return layout.PENDING, ''
    how = f'exit code {code}'
    if code < 0:
      how = f'killed by {signal.Signals(-code).name}'
    return layout.FAILED, f'{layout.read_error_of_log(folder)} ({how})'


def _cores(slot: int, parallel: int) -> str:
  """Returns the cores of one of `parallel` slots; '' where there are too few,
  or no way to say it."""
  if not hasattr(os, 'sched_getaffinity'):
    return ''
  cores = sorted(os.sched_getaffinity(0))
  return ','.join(map(str, cores[slot::parallel]))


def _environment(slot: int, parallel: int) -> dict[str, str]:
  """Returns the environment of one slot: its share of the GPUs that
  CUDA_VISIBLE_DEVICES names; all of them where there are fewer than slots."""
  environment = dict(os.environ)
  gpus = [gpu for gpu in os.environ.get(GPUS_VARIABLE, '').split(',') if gpu]
  if len(gpus) >= parallel:
    environment[GPUS_VARIABLE] = ','.join(gpus[slot::parallel])
  return environment


def main() -> int:
  """Trains several runs of a sweep as one program, or evaluates them."""
  parser = cli.Parser(description=__doc__)
  parser.add_argument('--workdir', required=True, help='of the sweep')
  parser.add_argument('--runs', required=True, help='POINT/SEED,POINT/SEED')
  parser.add_argument('--evaluate', default='', metavar='TASK,TASK',
                      help='what to evaluate instead of training')
  args = parser.parse_args()
  cpu.prepare()
  runs = []
  for run in args.runs.split(','):
    point, seed = run.split('/')
    runs.append((point, int(seed)))
  folders = [layout.run_folder(args.workdir, *run) for run in runs]
  if args.evaluate:
    return _evaluate(folders, args.evaluate.split(','))
  description = layout.load_sweep_description(args.workdir)
  configs = [layout.config_of_run(description, *run) for run in runs]
  return _train(configs, folders)


def _train(configs: Sequence, folders: Sequence[pathlib.Path]) -> int:
  """Trains runs as one program, and says in the log of each why it did not
  reach its last step; returns the exit code."""
  code = 0
  for writer in vectorised.train_group(configs, folders):
    if not writer.sentence:
      continue
    line = writer.sentence
    if writer.code == DIVERGED:
      line = f'error: {line}'
    layout.append_to_log(writer.workdir, line)
    # A run that ended early has all that it was to have (training/loop.py).
    if writer.code != ENDED_EARLY:
      code = EXIT_CODE_UNFINISHED
  return code


def _evaluate(folders: Sequence[pathlib.Path], tasks: list[str]) -> int:
  """Evaluates runs one after the other, each into its own log; those of one
  model and data share what was compiled."""
  code, programs = 0, {}
  for folder in folders:
    with (folder / 'log.txt').open('a') as log, contextlib.redirect_stdout(
        log), contextlib.redirect_stderr(log):
      try:
        figures = evals.evaluate_run(
            storage.checked_path(folder), tasks, None, step=None,
            programs=programs)
      except (RequestError, EnvironmentFailure, OSError) as error:
        print(f'error: {error}')  # of this run: the others go on
        code = EXIT_CODE_UNFINISHED
      else:
        evals.write_figures(storage.checked_path(folder / 'eval.json'), figures)
  return code


if __name__ == '__main__':
  cli.run(main)
