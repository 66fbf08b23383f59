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

import ml_collections

from common.errors import EnvironmentFailure, RequestError, Stopped
from common.errors import format_count
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
    slot: its number among those that run at once, from 0 on; the cores and GPUs
      of this machine are shared out by it.
    num_signals: how many signals were passed on to it.
  """
  runs: list[layout.Run]
  evaluates: bool
  process: subprocess.Popen
  slot: int
  num_signals: int = 0


class Runner:
  """Trains and evaluates the pending runs of a sweep on this machine, several
  processes at once.

  Args:
    workdir: the folder of the sweep.
    ledger: its ledger, the database of the states of its runs.
    parallel: how many processes run at once; they share the cores out.
    group: how many runs may train as one program; 1: none do.
    begun: a function that is given the runs whose folder is new, before they
      are trained.
    ended: a function that is given each run that is done or has failed.
  """

  def __init__(self, workdir, ledger: layout.Ledger, parallel: int, group: int,
               begun: Callable[[Sequence], None] = lambda runs: None,
               ended: Callable[[layout.Run], None] = lambda run: None):
    """Enters this runner (a process that trains runs) into the ledger.

    Args:
      workdir: the folder of the sweep.
      ledger: the database of its runs, which other runners may share.
      parallel: the number of processes that train at once.
      group: the most runs that are trained as one program.
      begun: called with the runs that are about to be trained.
      ended: called with each run that has ended.
    """
    self._workdir = pathlib.Path(workdir)
    self._ledger = ledger
    self._parallel = parallel
    self._group = group
    self._on_begun = begun
    self._on_ended = ended
    self._name = ledger.register_runner()
    self._jobs: list[Job] = []
    self._signals = signals.SignalCount()
    self._time_of_heartbeat = 0.0
    self._has_told_tenth = False  # of the runs that were left at the start
    self._configs: dict[tuple[str, int], ml_collections.ConfigDict] = {}

  def run(self, wait: bool = False) -> None:
    """Trains and evaluates the runs of the sweep until none of them is pending
    in the ledger, the database that all runners (processes like this one, also
    on other machines) share.

    Args:
      wait: whether to wait for the runs of other runners too.

    Raises:
      Stopped: after a signal, if a run is still pending.
    """
    unended_states = [layout.PENDING]
    if wait:
      unended_states.append(layout.RUNNING)
    self._description = layout.load_sweep_description(self._workdir)
    # The time that is left is estimated from this moment on.
    self._start_time = self._time_of_progress = time.monotonic()
    self._trained_at_start = self._count_trained()
    num_pending = len(self._ledger.runs(layout.PENDING))
    runs = format_count(num_pending, 'run')
    progress.print_milestone(f'began: {runs} of {self._workdir}')

    # A signal is only counted here, because it may come while a job is being
    # started.
    with signals.handle_signals(self._signals.add):
      try:
        # Each round does what is due, and waits for no job (a process that
        # trains or evaluates some runs). The order matters: a job that has
        # ended frees its slot for one that is started in the same round.
        while True:
          self._record_heartbeat()
          self._print_progress()
          self._end_jobs()
          self._start_jobs()

          # Without jobs, this runner is done unless runs are left that others
          # hold and may still free. After a signal no job is started any more.
          if not self._jobs:
            if not self._ledger.runs(*unended_states):
              return
            if self._signals.n:
              raise Stopped
          time.sleep(POLL_SECONDS)
      finally:
        # Jobs are left only after an error of this program. Kill them, so that
        # nothing goes on running without a runner.
        for job in self._jobs:
          job.process.kill()

  def _end_jobs(self) -> None:
    """Passes signals on to the jobs, and takes away those that have ended."""
    for job in list(self._jobs):
      self._pass_signals_on(job)
      if job.process.poll() is not None:
        self._jobs.remove(job)
        self._settle_job(job)

  def _start_jobs(self) -> None:
    """Starts jobs until there are `parallel`, or nothing is left to take; none
    after a signal."""
    while not self._signals.n and len(self._jobs) < self._parallel:
      if not self._start_job():
        return

  def _pass_signals_on(self, job: Job) -> None:
    """Passes on to a job the signals that came: the first lets it save and end;
    the second kills it."""
    num_signals = self._signals.n  # one more may come any moment
    if job.num_signals < num_signals and job.process.poll() is None:
      if not job.num_signals:
        print(f'{job.runs[0].point}, seed {job.runs[0].seed}: stopping: it is '
              'saved first; once more ends it at once', flush=True)
      job.process.send_signal(
          signal.SIGTERM if num_signals == 1 else signal.SIGKILL)
    job.num_signals = num_signals

  def _record_heartbeat(self) -> None:
    """Records in the ledger every BEAT_SECONDS that this runner is alive. Runs
    of runners that have stopped doing so become pending again."""
    if time.monotonic() - self._time_of_heartbeat < layout.BEAT_SECONDS:
      return
    self._time_of_heartbeat = time.monotonic()

    # If this process stood still for long, others took it for dead and may have
    # claimed its runs. Two processes must not write into one folder, so jobs
    # that have lost all their runs are killed.
    ids_of_our_runs = self._ledger.record_heartbeat(self._name)
    for job in self._jobs:
      if not any(run.id in ids_of_our_runs for run in job.runs):
        job.process.kill()

    # Free the runs of dead runners.
    for run in self._ledger.free_runs_of_dead_runners():
      print(f'{run}: its runner died; it goes on here', flush=True)

  def _count_trained(self) -> float:
    """Returns the number of runs that are trained, with fractions for those
    that are trained in part. A run that failed counts as a whole one, since
    nothing is left to do for it."""
    num_trained = 0.0
    for run in self._ledger.runs():
      if run.state in (layout.DONE, layout.FAILED):
        num_trained += 1.0
        continue
      # A run that is pending may have been trained in part before it was
      # stopped.
      rows = layout.read_metrics(self._folder(run), 'train')
      if rows:
        num_trained += rows[-1]['step'] / self._config(run).train.steps
    return num_trained

  def _print_progress(self) -> None:
    """Prints, every SECONDS_BETWEEN_PROGRESS, how much is done, and how long
    the rest takes if it goes on as fast as since the start."""
    now = time.monotonic()
    if now - self._time_of_progress < SECONDS_BETWEEN_PROGRESS:
      return
    self._time_of_progress = now
    num_trained, num_runs = self._count_trained(), len(self._ledger.runs())
    # Runs that are trained in part count in part.
    count = f'{num_trained:,.1f}'.removesuffix('.0')
    line = f'{count} of {num_runs:,} runs are trained'
    trained_since_start = num_trained - self._trained_at_start

    # Estimate the remaining time, once anything was trained here.
    if trained_since_start > 0:
      seconds_since_start = now - self._start_time
      seconds_left = ((num_runs - num_trained) * seconds_since_start
                      / max(trained_since_start, 1e-9))
      line += f', some {progress.format_seconds(seconds_left)} left'
    print(line, flush=True)

    # The first estimate that is worth a notification comes once a tenth of the
    # work is done.
    tenth = (num_runs - self._trained_at_start) / 10
    if trained_since_start >= tenth and not self._has_told_tenth:
      self._has_told_tenth = True
      progress.print_milestone(line)

  def _start_job(self) -> bool:
    """Claims a group of pending runs, and starts a process that trains or
    evaluates them.

    Returns:
      Whether there was a run to take.
    """
    # The description of the sweep must be read after the ledger, so that it has
    # the points of all these runs.
    pending_runs = self._ledger.runs(layout.PENDING)
    self._description = layout.load_sweep_description(self._workdir)
    for group in self._group_runs(pending_runs):
      # Claim them. Another runner may have been faster with some or all.
      ids = [run.id for run in group]
      claimed_ids = self._ledger.claim_runs(ids, self._name)
      runs = [run for run in group if run.id in claimed_ids]
      if not runs:
        continue

      # A job either trains or evaluates. If some runs of the group are not yet
      # trained, it trains these. The trained ones stay in it without being
      # trained, and become pending again when it ends, to be evaluated then.
      untrained = [run for run in runs if not self._is_trained(run)]
      evaluates = not untrained and bool(runs[0].tasks)

      # The lowest free slot says which cores and GPUs the job gets.
      slots_in_use = {job.slot for job in self._jobs}
      slot = min(set(range(self._parallel)) - slots_in_use)
      process = self._start_process(
          runs=untrained or runs, evaluates=evaluates, slot=slot)
      self._jobs.append(Job(runs=runs, evaluates=evaluates, process=process,
                            slot=slot))
      return True
    return False

  def _group_runs(self, runs: list[layout.Run]) -> list[list[layout.Run]]:
    """Splits runs into groups that are each trained as one program. Runs that
    must be trained alone come last, each in a group of its own.

    Args:
      runs: the runs to split.
    """
    # A run is trained alone after a program that it was in has failed.
    single_groups, groupable = [], []
    for run in runs:
      if run.alone or self._group == 1:
        single_groups.append([run])
      else:
        groupable.append(run)

    # Runs can share a program if their configs differ in nothing that is
    # compiled into it. Split these into groups of at most self._group runs.
    groups = []
    configs = [self._config(run) for run in groupable]
    for indices in vectorised.group_configs(configs):
      for start in range(0, len(indices), self._group):
        indices_of_group = indices[start:start + self._group]
        groups.append([groupable[i] for i in indices_of_group])
    return groups + single_groups

  def _start_process(self, runs: list[layout.Run], evaluates: bool, slot: int
                     ) -> subprocess.Popen:
    """Starts the process that trains or evaluates runs, and returns it.

    Args:
      runs: the runs.
      evaluates: whether to evaluate them, and not to train them.
      slot: the number of the process among those that run at once, by which it
        gets its cores and GPUs.
    """
    # One run is trained by train.py, as a user would do; several are trained,
    # or evaluated, by this module.
    point_seeds = [(run.point, run.seed) for run in runs]
    tasks = runs[0].tasks if evaluates else ''
    if evaluates or len(runs) > 1:
      command = layout.group_command(self._workdir, point_seeds, tasks)
    else:
      point, seed = point_seeds[0]
      command = layout.train_command(
          self._description, workdir=self._workdir, point=point, seed=seed)

    # A run begins anew where it has no log yet; this is asked before the logs
    # are written. Then each log says what runs. What the process prints goes to
    # the log of the first run, to which the others refer, but for evaluation,
    # which prints into the log of each.
    log = self._folder(runs[0]) / 'log.txt'
    self._on_begun([run for run in runs
                    if not (self._folder(run) / 'log.txt').exists()])
    for run in runs:
      activity = 'evaluating' if evaluates else 'training'
      print(f'{run.point}, seed {run.seed}: {activity}', flush=True)
      layout.append_to_log(
          self._folder(run), f'$ {shlex.join(["python", *command])}')
    if not evaluates:
      for run in runs[1:]:
        layout.append_to_log(self._folder(run), f'What it printed: {log}')

    # The process, on the cores and GPUs of its slot. It ends when this process
    # ends, even by a crash; the run records the plan of its study from the
    # environment.
    environment = _environment_of_slot(slot, self._parallel)
    environment[provenance.PLAN_VARIABLE] = self._description.get('plan', '')
    command = dies_with_parent.words([sys.executable, *command],
                                     _cores_of_slot(slot, self._parallel))
    with log.open('a') as file:
      # A session of its own: Ctrl-C reaches it through our handler alone.
      return subprocess.Popen(
          command, stdin=subprocess.DEVNULL, stdout=file,
          stderr=subprocess.STDOUT, start_new_session=True, env=environment)

  def _folder(self, run: layout.Run) -> pathlib.Path:
    """Returns the folder of a run."""
    return layout.run_folder(self._workdir, run.point, run.seed)

  def _config(self, run: layout.Run) -> ml_collections.ConfigDict:
    """Returns the config of a run. It is made once: each job that starts asks
    for those of all pending runs, and one takes 10 ms."""
    key = run.point, run.seed
    if key not in self._configs:
      self._configs[key] = layout.config_of_run(self._description, run.point,
                                                run.seed)
    return self._configs[key]

  def _is_trained(self, run: layout.Run) -> bool:
    """Returns whether a run took its last step and saved it."""
    return layout.is_trained(self._folder(run), self._config(run).train)

  def _settle_job(self, job: Job) -> None:
    """Writes into the ledger, the database of runs, how each run of an ended
    job went, and prints it.

    If a program of several runs failed as a whole, it is not known which run is
    to blame. Each of them becomes pending again and is trained alone from then
    on, so that only the one to blame fails.

    Args:
      job: the job, whose process has ended.
    """
    # The program failed as a whole unless its exit code says that each log
    # tells how its run ended, or a signal had told it to stop.
    code = job.process.returncode
    is_error_of_all = (
        len(job.runs) > 1 and code not in (0, EXIT_CODE_UNFINISHED)
        and not self._signals.n)
    for run in job.runs:
      # Another process may add evaluation tasks to a run. The transaction keeps
      # it from doing so between reading the tasks here, and writing a state
      # that is right only for them. The tasks are read anew, because `run` is
      # the row as it was when the job claimed it.
      with self._ledger.transaction():
        run_by_id = {row.id: row for row in self._ledger.runs()}
        state, error = self._state_after_job(
            run=run, owed_tasks=run_by_id[run.id].owed_tasks,
            was_evaluated=job.evaluates, code=code)
        goes_on_alone = is_error_of_all and state == layout.FAILED
        if goes_on_alone:
          state = layout.PENDING
        is_settled = self._ledger.settle_run(
            id=run.id, runner=self._name, state=state,
            error='' if goes_on_alone else error, alone=goes_on_alone)

      # Nothing was written if another runner took this one for dead and has the
      # run now. Otherwise say how the run went.
      if not is_settled:
        continue
      if state in (layout.DONE, layout.FAILED):
        self._on_ended(run)
      line = f'{run.point}, seed {run.seed}: {state}'
      if goes_on_alone:
        line = (f'{run.point}, seed {run.seed}: goes on alone, since its group '
                'failed')
      if error:
        line += f': {error}'
      print(line, flush=True)

  def _state_after_job(self, run: layout.Run, owed_tasks: list[str],
                       was_evaluated: bool, code: int) -> tuple[str, str]:
    """Returns the state of a run after its process has ended, and the reason if
    it failed.

    The order of the checks matters: a run that is done is done even if a signal
    came.

    Args:
      run: the run as it was when it was claimed.
      owed_tasks: the names of the evaluations that are missing now. Another
        process may have added some since then.
      was_evaluated: whether the process was started to evaluate the run, and
        not to train it.
      code: the exit code of the process; -N where signal N killed it.

    Returns:
      The state, which is PENDING if the run is trained but not evaluated; and
      the error, or ''.
    """
    # A folder may hold another run, because the file of the sweep was changed.
    # Its results must not count, however complete they are.
    folder = self._folder(run)
    if (folder / 'config.json').exists():
      error = layout.why_not_of_sweep(self._description, workdir=self._workdir,
                                      point=run.point, seed=run.seed)
      if error:
        return layout.FAILED, error

    is_trained = self._is_trained(run)
    if is_trained and layout.is_evaluated(folder, owed_tasks):
      return layout.DONE, ''
    # After a signal the process saved and left, or had nothing to save yet.
    if self._signals.n:
      return layout.PENDING, ''
    # The run is still to be evaluated: its job was to train it, or did all the
    # tasks that it owed when it was claimed, and another was added since.
    if is_trained and not was_evaluated:
      return layout.PENDING, ''
    if is_trained and layout.is_evaluated(folder, run.owed_tasks):
      return layout.PENDING, ''

    # All else is a failure.
    exit_text = f'exit code {code}'
    if code < 0:
      exit_text = f'killed by {signal.Signals(-code).name}'
    return layout.FAILED, f'{layout.read_error_of_log(folder)} ({exit_text})'


def _cores_of_slot(slot: int, parallel: int) -> str:
  """Returns the CPU cores of one of `parallel` processes as 'CORE,CORE'; ''
  where there are fewer than processes, or no way to choose them."""
  if not hasattr(os, 'sched_getaffinity'):
    return ''
  cores = sorted(os.sched_getaffinity(0))
  return ','.join(map(str, cores[slot::parallel]))


def _environment_of_slot(slot: int, parallel: int) -> dict[str, str]:
  """Returns the environment of one of `parallel` processes: with its share of
  the GPUs that CUDA_VISIBLE_DEVICES names, or with all of them where there are
  fewer than processes."""
  environment = dict(os.environ)
  gpus = [gpu for gpu in os.environ.get(GPUS_VARIABLE, '').split(',') if gpu]
  if len(gpus) >= parallel:
    environment[GPUS_VARIABLE] = ','.join(gpus[slot::parallel])
  return environment


def main() -> int:
  """Trains several runs of a sweep as one program, or evaluates them one after
  the other, as the command line says.

  Returns:
    The exit code: 0, or EXIT_CODE_UNFINISHED where a run did not end and its
    log says why.
  """
  parser = cli.Parser(description=__doc__)
  parser.add_argument('--workdir', required=True, help='of the sweep')
  parser.add_argument('--runs', required=True, help='POINT/SEED,POINT/SEED')
  parser.add_argument('--evaluate', default='', metavar='TASK,TASK',
                      help='what to evaluate instead of training')
  args = parser.parse_args()
  cpu.configure_cpu()

  # --runs names each run by its point (a variant of the config) and its seed.
  runs = []
  for run_text in args.runs.split(','):
    point, seed = run_text.split('/')
    runs.append((point, int(seed)))
  folders = [layout.run_folder(args.workdir, point, seed)
             for point, seed in runs]

  # Evaluation reads the config of a run from its folder. Training reads it from
  # sweep.json, because the folder may be empty.
  if args.evaluate:
    return _evaluate_runs(folders, args.evaluate.split(','))
  description = layout.load_sweep_description(args.workdir)
  configs = [layout.config_of_run(description, point, seed)
             for point, seed in runs]
  return _train_as_one_program(configs, folders)


def _train_as_one_program(configs: Sequence, folders: Sequence[pathlib.Path]
                          ) -> int:
  """Trains runs as one program. If a run does not reach its last step, the
  reason is written into its log.

  Args:
    configs: the config of each run.
    folders: the folder of each run, in the same order.

  Returns:
    The exit code: 0, or EXIT_CODE_UNFINISHED if a run is not over.
  """
  exit_code = 0
  for writer in vectorised.train_group(configs, folders):
    # A run that reached its last step has nothing to say.
    if not writer.sentence:
      continue
    line = writer.sentence

    # The process that started this one reads the reason of a failure from a
    # line of this form.
    if writer.code == DIVERGED:
      line = f'error: {line}'
    layout.append_to_log(writer.workdir, line)
    # A run that was stopped early on purpose (eval.patience) is over.
    if writer.code != ENDED_EARLY:
      exit_code = EXIT_CODE_UNFINISHED
  return exit_code


def _evaluate_runs(folders: Sequence[pathlib.Path], tasks: list[str]) -> int:
  """Evaluates runs one after the other. The results of a run are written to
  eval.json in its folder, and what is printed goes to its log.

  Args:
    folders: the folder of each run.
    tasks: the names of the evaluation tasks.

  Returns:
    The exit code: 0, or EXIT_CODE_UNFINISHED if an evaluation failed.
  """
  # Runs of the same model and data share compiled programs. The evaluation of
  # the first of them fills this dict.
  compiled_programs = {}
  exit_code = 0
  for folder in folders:
    with (folder / 'log.txt').open('a') as log, contextlib.redirect_stdout(
        log), contextlib.redirect_stderr(log):
      try:
        figures = evals.evaluate_run(
            storage.checked_path(folder), names=tasks, options=None, step=None,
            programs=compiled_programs)
      except (RequestError, EnvironmentFailure, OSError) as error:
        # A failure concerns this run alone, and the others go on.
        print(f'error: {error}')
        exit_code = EXIT_CODE_UNFINISHED
      else:
        evals.write_figures(storage.checked_path(folder / 'eval.json'), figures)
  return exit_code


if __name__ == '__main__':
  cli.run(main)
