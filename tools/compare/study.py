"""A study as `check` and `run` go through it: the frozen plan, its phases, and
the trainer of their runs.

Each phase is a sweep in a folder of the study: W/noise, W/tune-1, ... have a
sweep.json, a ledger and points/NAME/seed-S as any sweep has (layout.py). So a
killed study goes on, several runners share one, and
`python -m tools.compare status W/noise` shows how far a phase is.
"""

from collections.abc import Callable, Sequence
import contextlib
import io
import pathlib
import sys
import tempfile
import textwrap
import time
from typing import Any

from common.errors import EnvironmentFailure, check_choice, format_count
from common.errors import require
from tools.compare import curves, freeze, layout
from tools.compare import comparison, local, outcomes, phases, report, results
from tools.compare import plan as plans
from training import objectives, plugins, progress

# To tell the hours of a plan: how many steps are timed, and how long at most;
# and the seconds of all steps of a study, below which its smallest size tells
# enough: to start and to compile programs would take longer than they may err.
TIMED_STEPS, MOST_SECONDS, SHORT_SECONDS = 8, 60.0, 900.0
Key = tuple[str, str]  # a size and a workload


def check(args) -> int:
  """Prints the plan of a study's file, and what its phases cost. Returns the
  exit code, 0.

  Args:
    args: the arguments of the command `check`: file, workdir ('' if the study
      has not begun), parallel and group.
  """
  # Make the plan. A study that has begun keeps what its plan has fixed.
  earlier_plan = None
  if args.workdir:
    earlier_plan = plans.load_frozen_plan(args.workdir)
  frozen = freeze.freeze_plan(args.file, earlier_plan)
  print(describe_plan(frozen), flush=True)

  # Print the costs without hours, which are known at once.
  costs = results.costs(frozen, args.group, None)
  print(f'\n{results.table(costs, args.parallel)}\n', flush=True)

  # Find the time of a step, from runs of the study or by timing a few steps.
  times = None
  if args.workdir:
    times = results.times_of(args.workdir, frozen)
  source_of_times = 'the runs of this study so far'
  if not times:
    print('Timing a few steps of the base, for the hours ...', file=sys.stderr)
    source_of_times = f'{TIMED_STEPS} steps of the base on this machine'
    try:
      times = time_training_steps(frozen, args.parallel, args.group)
    except EnvironmentFailure as error:
      print(f'warning: the hours are not known: {error}', file=sys.stderr)

  # Print the costs again, with hours.
  if times:
    costs = results.costs(frozen, args.group, times)
    print(f'\n{results.table(costs, args.parallel)}\n')
    processes = format_count(args.parallel, 'process', 'processes at once')
    print(f'Hours are of the steps of {processes}, without starting and '
          f'compiling, by the time of {source_of_times}.')
  return 0


class Timing:
  """The seconds of a step of the base, as a program of the confirmation takes
  them.

  Args:
    frozen: the plan.
    parallel: how many processes run at once.
    group: how many runs one program holds at most.

  Attributes:
    alike: how many runs a program trains.
    steps: the number of steps of a run, by its size and workload.
    flops: the FLOPs of one step, likewise.
    seconds: the measured seconds of one step, likewise.
  """

  def __init__(self, frozen: plans.FrozenPlan, parallel: int, group: int):
    """Reads from the plan how many steps the base trains, and what they cost.

    Args:
      frozen: the plan of the study.
      parallel: the number of processes that run at once.
      group: the most runs that are trained as one program.
    """
    self._frozen, self._parallel = frozen, parallel
    plan = frozen.plan
    # A program of the confirmation trains the runs of all seeds at once, up to
    # `group` of them. A step is timed for as many.
    self.alike = min(group, plan.seeds['confirm'])
    self.steps: dict[Key, int] = {}
    self.flops: dict[Key, float] = {}
    self.seconds: dict[Key, float] = {}

    # The planned steps of the base, and the FLOPs of one step.
    for workload in plan.workloads:
      for size in plan.all_sizes:
        planned_point = frozen.point(plan.base, size, workload)
        steps = frozen.steps(planned_point['changes'])
        self.steps[size, workload] = steps
        self.flops[size, workload] = (
            planned_point['tokens'] * planned_point['flops_per_token'] / steps)

  def train(self, keys: Sequence[Key]) -> None:
    """Measures the time of a training step at some sizes of the model on some
    workloads (the text, and probes), by training a few steps in a temporary
    folder.

    Args:
      keys: pairs of the names of a size and a workload.

    Raises:
      EnvironmentFailure: if a run failed.
    """
    runs = []
    for size, workload in keys:
      # Shorten runs of the plan, as many at once as a program of the
      # confirmation has, since these share the time. A share of 1 would leave
      # the config of a run as it is, so it must be below 1.
      share = min(TIMED_STEPS / self.steps[size, workload], 0.999)
      for seed in range(self.alike):
        runs.append(phases.make_run(
            frozen=self._frozen, phase='screen',
            variant=self._frozen.plan.base, size=size, workload=workload,
            seed=seed, more={'eval.batches': 1, 'eval.tasks': ''}, share=share))

    # Train them, and drop the lines that the trainer prints about each run.
    with (tempfile.TemporaryDirectory() as folder,
          contextlib.redirect_stdout(io.StringIO())):
      trainer = Trainer(workdir=folder, frozen=self._frozen,
                        parallel=self._parallel, group=self.alike)
      sweep = trainer.train_in_folder('timed', runs)
    # Points come back in the order in which their runs were asked for.
    for key, point in zip(keys, sweep.points, strict=True):
      self.seconds[key] = self._seconds(point)

  def _seconds(self, point: curves.Point) -> float:
    """Returns the mean time of a step over the runs of a point."""
    total_seconds = 0.0
    for seed, run in point.runs.items():
      if run.state != layout.DONE:
        raise EnvironmentFailure(f'a run of {point.name} failed: {run.error}')
      curve = point.curve(seed, 'train')
      total_seconds += curve['seconds'][-1] / run.config['train.steps']
    return total_seconds / self.alike

  def seconds_at_all_sizes(self) -> results.Times:
    """Returns the seconds of a training step, {(size, workload): seconds}.

    What was not measured is estimated from the largest that was, by the ratio
    of the FLOPs. A larger model uses the machine better, so this is rather too
    high.
    """
    largest = max(self.seconds, key=self.flops.get)
    times = {}
    for key, flops in self.flops.items():
      estimate = self.seconds[largest] * flops / self.flops[largest]
      times[key] = self.seconds.get(key, estimate)
    return times


def time_training_steps(frozen: plans.FrozenPlan, parallel: int, group: int
                        ) -> results.Times:
  """Returns the seconds of a training step, {(size, workload): seconds}, as far
  as it is worth measuring.

  The smallest size is measured first. The others are measured if the study
  takes long, except those that would take longer than MOST_SECONDS by their
  FLOPs. What is not measured follows from the largest that is, and is estimated
  rather too high.

  Args:
    frozen: the plan of the study.
    parallel: the number of processes that run at once.
    group: the most runs that are trained as one program.

  Raises:
    EnvironmentFailure: if the runs failed.
  """
  # Measure the smallest size.
  timing = Timing(frozen, parallel, group)
  smallest, *larger = sorted(timing.flops, key=timing.flops.get)
  timing.train([smallest])

  # At this speed, find the sizes that take at most MOST_SECONDS. To time a size
  # takes the time of TIMED_STEPS steps of each run that is trained at once.
  seconds_of_smallest = timing.seconds[smallest] * TIMED_STEPS * timing.alike
  most_flops = MOST_SECONDS / seconds_of_smallest * timing.flops[smallest]
  affordable = [key for key in larger if timing.flops[key] <= most_flops]

  # Measure these too, if the study takes long.
  if affordable:
    costs = results.costs(frozen, group, timing.seconds_at_all_sizes())
    if sum(cost.seconds for cost in costs) > SHORT_SECONDS:
      timing.train(affordable)
  return timing.seconds_at_all_sizes()


def run(args, submit: Callable[..., None]) -> int:
  """Freezes the plan of a study's file (writes it down for good), and runs its
  phases. Returns the exit code.

  Args:
    args: the arguments that `run` defines (run.add_arguments).
    submit: a function of (args, jobs) that submits jobs to SLURM, which repeat
      this command.

  Raises:
    RequestError: if the folder holds something else, or another plan and no
      reason is given for the change.
  """
  layout.check_workdir(args.workdir, 'study.json')
  frozen = freeze.freeze_plan(args.file, plans.load_last_plan(args.workdir))
  check_choice('--until', args.until,
               choices=('freeze', *frozen.plan.seeds, plans.REPORT))

  # Write the plan to study.json, or record its change there.
  frozen = plans.adopt_plan(args.workdir, frozen, args.amend)
  print(describe_plan(frozen), flush=True)

  # Runs that failed become pending again, in every phase that has begun.
  if args.retry:
    for folder in results.folders(args.workdir):
      with layout.Ledger(folder) as ledger:
        ledger.retry_failed_runs()

  # Train the runs: here, or by jobs of SLURM that call this command again.
  if args.launcher == 'slurm':
    submit(args, args.jobs or 1)
    return 0
  if args.until == 'freeze':
    return 0
  trainer = Trainer(workdir=args.workdir, frozen=frozen, parallel=args.parallel,
                    group=args.group)
  return run_and_report_phases(
      args.workdir, frozen=frozen, trainer=trainer, args=args)


def describe_plan(frozen: plans.FrozenPlan) -> str:
  """Returns a description of a study's plan for a terminal: its question, its
  methods, and the sizes of its models.

  Args:
    frozen: the plan of the study.
  """
  plan = frozen.plan
  # The base stands for all variants of a size, whose costs are near its own.
  rows_of_sizes = [('size', 'parameters', 'FLOPs a token')]
  for size in plan.all_sizes:
    point = frozen.point(plan.base, size, plans.TEXT)
    rows_of_sizes.append((size, f'{point["params"]:,}',
                          f'{point["flops_per_token"]:,.0f}'))

  # Join the paragraphs with an empty line between them.
  paragraphs = [f'study {plan.name}: {plan.question}']
  for paragraph in report.describe_methods(frozen):
    paragraphs.append(textwrap.fill(paragraph))
  paragraphs.append('\n'.join(layout.align_columns(rows_of_sizes)))
  return '\n\n'.join(paragraphs)


def run_and_report_phases(workdir, frozen: plans.FrozenPlan, trainer: Any, args
                          ) -> int:
  """Runs the phases of a study, such as tuning and confirmation, and prints and
  saves what each of them finds. Returns the exit code, 0.

  Args:
    workdir: the folder of the study.
    frozen: its plan, as it stands in study.json.
    trainer: the object that trains the runs.
    args: the arguments until, anyway, group and parallel of the command `run`.
  """
  def costs() -> list[results.Cost]:
    """Returns the costs of the phases by what is known of their time."""
    times = results.times_of(workdir, frozen)
    return results.costs(frozen, args.group, times)

  # Print the costs, as far as they are known before anything is trained.
  costs_before = costs()
  print(f'\n{results.table(costs_before, args.parallel)}\n', flush=True)
  is_time_known = all(cost.seconds is not None for cost in costs_before)

  # A phase trains when the loop asks for its state. If the study is too weak,
  # run_phases raises only after it has given the state, so that the state is
  # saved and printed first.
  for state in phases.run_phases(frozen, trainer=trainer, until=args.until,
                                 anyway=args.anyway):
    if args.anyway and state.weakness:
      _note(workdir, frozen, 'The study went on although it was too weak for '
            f'what it wants. {state.weakness}')
    results.write(workdir, frozen, state)
    is_refused = bool(state.weakness) and not args.anyway
    _print_phase(state, is_refused)
    # The runs of the first phase tell how long those of the others take.
    if len(state.finished) == 1 and not is_time_known:
      print(results.table(costs()[1:], args.parallel), flush=True)
  if progress.are_milestones_wanted() and 'confirm' in state.finished:
    comparison.load_comparison(workdir).print_milestones()
  if args.until == plans.REPORT:
    page, *_ = report.write_report(comparison.load_comparison(workdir))
    progress.print_result(f'report: {page}')
  return 0


def _print_phase(state: phases.StudyState, is_refused: bool) -> None:
  """Prints how many runs the phase that has just ended had, and what it found.

  Args:
    state: the outcomes and decisions so far.
    is_refused: whether the study is refused after this phase. The refusal then
      says what the summary would.
  """
  phase = phases.PHASES[state.finished[-1]]
  runs = [run for run in state.outcomes if run.phase == phase.name]
  num_diverged = sum(run.diverged for run in runs)
  if runs:
    count = f'{format_count(len(runs), "run")}, {num_diverged} diverged'
  else:
    count = 'no runs: no variant was left for it'
  progress.print_result(f'{phase.name}: {count}')
  # Where milestones alone are printed, what a phase found is none of them.
  if not is_refused:
    for sentence in phase.summary(state.records):
      print(sentence, flush=True)


def _note(workdir, frozen: plans.FrozenPlan, sentence: str) -> None:
  """Adds a sentence to the notes of the frozen plan, which the report shows,
  and saves it at once, so that a study which is killed later has it too. A
  sentence that is there already is not added again."""
  if sentence not in [note['told'] for note in frozen.notes]:
    frozen.notes.append({'time': time.time(), 'told': sentence})
    plans.save_frozen_plan(workdir, frozen)


class Trainer:
  """Trains the runs of each phase of a study as a sweep in a folder of its own.

  Args:
    workdir: the folder of the study.
    frozen: its plan.
    parallel: how many processes run at once.
    group: how many runs one program holds at most.
  """

  def __init__(self, workdir, frozen: plans.FrozenPlan, parallel: int = 1,
               group: int = 8):
    self._workdir = pathlib.Path(workdir)
    self._frozen = frozen
    self._parallel, self._group = parallel, group

  def train(self, folder: str, runs: Sequence[phases.Run]
            ) -> list[plans.Outcome]:
    """Trains the runs that a phase asks for, waits until all of them have
    ended, and returns their outcomes, in order.

    Args:
      folder: the name of the folder of the phase.
      runs: the runs.

    Raises:
      Stopped: after a signal.
      RequestError: if the folder holds runs of another plan or config.
      EnvironmentFailure: if runs failed for another reason than divergence.
    """
    path = self._workdir / folder
    sweep = self.train_in_folder(folder, runs)
    self._check_of_this_plan(path, sweep)

    # Results are read from disk, where another runner may have written them.
    outcomes_of_runs, failed = outcomes.read_outcomes(self._frozen, sweep, runs)
    if failed:
      raise EnvironmentFailure(
          f'{path}: {len(failed)} runs failed that did not diverge: '
          f'{"; ".join(failed[:3])}: see log.txt in their folders; --retry '
          'takes up again those that failed, and a run whose folder is moved '
          'away is trained anew')
    return outcomes_of_runs

  def _check_of_this_plan(self, path: pathlib.Path, sweep: curves.Sweep
                          ) -> None:
    """Checks that the runs in a folder were trained by this study's plan, and
    with the configs that it says.

    Args:
      path: the folder of the phase.
      sweep: the runs as they lie there.

    Raises:
      RequestError: if a run is of another plan, or of another config.
    """
    # Runs by an earlier version of the plan count, if the change was recorded.
    others = layout.plan_hashes_of_runs(path) - self._frozen.known_hashes
    names = ', '.join(sorted(others)) or 'none'
    require(not others, f'{path} holds runs of another plan than the study has '
            f'had ({names}): move them away, or '
            'give the reason why they are of this study by --amend=REASON')
    runs_of_other_config = '; '.join(sweep.runs_of_other_config[:3])
    require(not sweep.runs_of_other_config,
            f'{path} holds runs of another config than the plan says: '
            f'{runs_of_other_config}; move them away')

  def predicted(self, phase: str, rows: Sequence) -> dict:
    """Records what a phase is predicted to find, before it runs; see
    plan.record_prediction."""
    return plans.record_prediction(self._workdir, frozen=self._frozen,
                                   phase=phase, rows=rows)

  def train_in_folder(self, folder: str, runs: Sequence[phases.Run]
                      ) -> curves.Sweep:
    """Returns the sweep of some runs, once all of them have ended."""
    path = self._workdir / folder
    with layout.Ledger(path) as ledger:
      description = layout.begin_sweep(
          path, ledger, self.describe(folder, runs))
      if ledger.runs(layout.PENDING, layout.RUNNING):
        self.train_pending_runs(path, ledger)
      return curves.read_sweep(path, description, ledger.runs())

  def train_pending_runs(self, path: pathlib.Path, ledger) -> None:
    """Trains the pending runs of a folder, and waits for those that other
    processes train.

    Args:
      path: the folder of the phase.
      ledger: its open ledger, the database of the states of runs.
    """
    def begun(runs: Sequence[layout.Run]) -> None:
      self.begun(path, runs)

    def ended(run: layout.Run) -> None:
      self.ended(path, run)

    runner = local.Runner(workdir=path, ledger=ledger, parallel=self._parallel,
                          group=self._group, begun=begun, ended=ended)
    runner.run(wait=True)

  def begun(self, path: pathlib.Path, runs: Sequence[layout.Run]) -> None:
    """Records in the study's ledger that runs of a phase begin from step 0."""
    rows = [(path.name, run.point, run.seed) for run in runs]
    with layout.StudyLedger(self._workdir) as ledger:
      ledger.add_begun_runs(self._frozen.hash, rows)

  def ended(self, path: pathlib.Path, run: layout.Run) -> None:
    """Records in the study's ledger what the figures of a run are as it ends,
    by their hash."""
    folder = layout.run_folder(path, run.point, run.seed)
    with layout.StudyLedger(self._workdir) as ledger:
      ledger.add_ended_run(folder=path.name, point=run.point, seed=run.seed,
                           hash=layout.hash_figures(folder))

  def describe(self, folder: str, runs: Sequence[phases.Run]) -> dict:
    """Returns the content of sweep.json for the runs of a phase, by which they
    are trained as a sweep.

    Args:
      folder: the name of the folder of the phase.
      runs: the runs. That of the base comes first.
    """
    frozen = self._frozen
    # Make a row for each point (a variant at a size on a workload), and collect
    # its seeds.
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
      if run.point not in rows:
        rows[run.point] = self._row(run)
      rows[run.point]['seeds'].append(run.seed)

    # 'paired' says that runs of the same seed see the same batches.
    return {
        'name': f'{frozen.plan.name}, {folder}',
        'file': frozen.plan.file,
        'match': frozen.plan.match,
        'match_field': frozen.plan.match_field,
        'base': runs[0].point,
        'base_config': frozen.base_config,
        'paired': True,
        'points': list(rows.values()),
        'sources': frozen.sources,
        'files': dict(plugins.text_of_loaded_file),
        'plan': f'{frozen.hash} {plans.format_date(frozen.time)}'}

  def _row(self, run: phases.Run) -> dict[str, Any]:
    """Returns what sweep.json says of the point of a run (a variant at a size
    on a workload), without its seeds.

    Args:
      run: the run.
    """
    point = self._frozen.point_of_run(run)
    # A run may take fewer steps than planned, and so fewer tokens.
    tokens_a_step = point['tokens'] / self._frozen.steps(point['changes'])
    row = {
        'name': run.point, 'variant': run.variant, 'size': run.size,
        'workload': run.workload, 'changes': plans.to_json(run.changes),
        'seeds': [], 'tasks': self._owed(run),
        'tokens': round(tokens_a_step * self._frozen.steps(run.changes))}
    for name in ('matched', 'params', 'active_params', 'multiplied_params',
                 'looked_up_params', 'flops_per_token'):
      row[name] = point[name]
    return row

  def _owed(self, run: phases.Run) -> list[str]:
    """Returns the tasks that a run owes: the losses of each document, where the
    verdict is on them."""
    name = (self._frozen.base_config | run.changes)['objective']
    has_documents = (run.workload == plans.TEXT
                     and objectives.OBJECTIVES[name].predicts_every_token)
    if run.phase == 'confirm' and has_documents:
      return ['documents']
    return []
