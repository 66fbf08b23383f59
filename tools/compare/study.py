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
import math
import pathlib
import sys
import tempfile
import textwrap
import time
from typing import Any

from common.errors import EnvironmentFailure, one_of, require
from tools.compare import curves, freeze, layout
from tools.compare import comparison, local, phases, report, results
from tools.compare import plan as plans
from training import objectives, plugins

# Times the loss of guessing, above which a run counts as diverged: one that
# has learnt nothing ends near it.
GUESSING = 1.2
# To tell the hours of a plan: how many steps are timed, and how long at most;
# and the seconds of all steps of a study, below which its smallest size tells
# enough: to start and to compile programs would take longer than they may err.
TIMED_STEPS, MOST_SECONDS, SHORT_SECONDS = 8, 60.0, 900.0


def check(args) -> int:
  """Prints the plan of a study's file and the costs of its phases."""
  frozen = freeze.freeze(
      args.file, plans.load(args.workdir) if args.workdir else None)
  print(described(frozen), flush=True)
  times = results.times_of(args.workdir, frozen) if args.workdir else None
  whence = 'the runs of this study so far'
  if not times:
    print('\nTiming a few steps of the base at each size ...', file=sys.stderr)
    try:
      times, whence = timed(frozen, args.parallel, args.group), (
          f'{TIMED_STEPS} steps of the base on this machine')
    except EnvironmentFailure as error:
      print(f'warning: the hours are not known: {error}', file=sys.stderr)
  each = results.costs(frozen, args.group, times)
  print('', results.table(each, args.parallel), '', sep='\n')
  if times:
    print(f'Hours are of the steps of {args.parallel} processes at once, '
          f'without starting and compiling them, by the time of {whence}.')
  return 0


def timed(frozen: plans.Frozen, parallel: int, group: int) -> results.Times:
  """Returns the seconds of a step at each size on each workload, as a program
  of the confirmation takes them, of a few steps in a folder that is removed.

  The smallest size comes first. What by its FLOPs would then take longer than
  MOST_SECONDS is not trained, nor is any other of a study that is short by
  them: its time is that of the largest size that was, times its FLOPs over
  those, and so rather too much.

  Raises:
    EnvironmentFailure: where the runs failed.
  """
  plan, seconds = frozen.plan, {}
  alike = min(group, plan.seeds['confirm'])
  rows = {(size, workload): frozen.point(plan.base, size, workload)
          for workload in plan.workloads for size in plan.every_size}
  steps = {key: frozen.steps(row['changes']) for key, row in rows.items()}
  flops = {key: row['tokens'] * row['flops_per_token'] / steps[key]
           for key, row in rows.items()}
  first, *others = sorted(rows, key=flops.get)

  def train(keys: Sequence[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder, (
        contextlib.redirect_stdout(io.StringIO())):
      sweep = Trainer(folder, frozen, parallel, alike).trained('timed', [
          phases.run_of(frozen, 'screen', plan.base, *key, seed, {
              'eval.batches': 1, 'eval.tasks': ''},
                        min(TIMED_STEPS / steps[key], 0.999))
          for key in keys for seed in range(alike)])
    for key, point in zip(keys, sweep.points, strict=True):
      for run in point.runs.values():
        if run.state != layout.DONE:
          raise EnvironmentFailure(f'a run of {point.name} failed: {run.error}')
      seconds[key] = sum(point.curve(seed, 'train')['seconds'][-1] for seed in (
          point.runs)) / alike / run.config['train.steps']

  def every() -> results.Times:
    last = max(seconds, key=flops.get)
    return {key: seconds.get(key, seconds[last] * flops[key] / flops[last])
            for key in rows}

  train([first])
  most = MOST_SECONDS / (seconds[first] * TIMED_STEPS * alike) * flops[first]
  within = [key for key in others if flops[key] <= most]
  if within and SHORT_SECONDS < sum(
      x.seconds for x in results.costs(frozen, group, every())):
    train(within)
  return every()


def run(args, submit: Callable[..., None]) -> int:
  """Freezes the plan of a study's file, and goes through its phases.

  Args:
    args: of `run`, as its add_arguments defines them.
    submit: (args, jobs) submits runners to SLURM.
  """
  layout.try_folder(args.workdir, 'study.json')
  frozen = freeze.freeze(args.file, plans.last(args.workdir))
  one_of('--until', args.until, ('freeze', *frozen.plan.seeds, plans.REPORT))
  frozen = plans.adopted(args.workdir, frozen, args.amend)
  print(described(frozen), flush=True)
  for folder in results.folders(args.workdir) if args.retry else ():
    with layout.Ledger(folder) as ledger:
      ledger.retry()
  if args.launcher == 'slurm':
    submit(args, args.jobs or 1)
    return 0
  if args.until == 'freeze':
    return 0
  return go(args.workdir, frozen, Trainer(
      args.workdir, frozen, args.parallel, args.group), args)


def described(frozen: plans.Frozen) -> str:
  """Returns what a plan says, and how large its models are."""
  plan = frozen.plan
  sizes = [(size, f'{row["params"]:,}', f'{row["flops_per_token"]:,.0f}')
           for size in plan.every_size
           for row in [frozen.point(plan.base, size, plans.TEXT)]]
  return '\n\n'.join([
      f'study {plan.name}: {plan.question}',
      *map(textwrap.fill, report.methods(frozen)),
      '\n'.join(layout.columns([
          ('size', 'parameters', 'FLOPs a token'), *sizes]))])


def go(workdir, frozen: plans.Frozen, trainer: Any, args) -> int:
  """Goes through the phases with a trainer.

  Args:
    workdir: of the study.
    frozen: its plan, as it stands in study.json.
    trainer: of the runs.
    args: until, anyway, group and parallel, as add_arguments defines them.
  """
  each = results.costs(frozen, args.group, results.times_of(workdir, frozen))
  print('', results.table(each, args.parallel), '', sep='\n', flush=True)
  for state in phases.run(frozen, trainer, args.until, args.anyway):
    if args.anyway and state.weakness:
      _note(workdir, frozen, 'The study went on although it was too weak for '
            f'what it wants. {state.weakness}')
    results.write(workdir, frozen, state)
    phase = phases.PHASES[state.finished[-1]]
    runs = [x for x in state.outcomes if x.phase == phase.name]
    # What is too weak to go on says all this as it ends.
    on = args.anyway or not state.weakness
    print(f'{phase.name}: {len(runs)} runs, {sum(x.diverged for x in runs)} '
          'diverged', *phase.summary(state.records) * on, sep='\n', flush=True)
    if len(state.finished) == 1 and None in [
        cost.seconds for cost in each]:  # their time is known by now
      print(results.table(results.costs(frozen, args.group, results.times_of(
          workdir, frozen))[1:], args.parallel), flush=True)
  if args.until == plans.REPORT:
    print(f'report: {report.write(comparison.load(workdir))[0]}', flush=True)
  return 0


def _note(workdir, frozen: plans.Frozen, sentence: str) -> None:
  """Notes in the plan, once, that it went on; before anything more is run, so
  that a study which is killed later tells it too."""
  if sentence not in [note['told'] for note in frozen.notes]:
    frozen.notes.append({'time': time.time(), 'told': sentence})
    plans.save(workdir, frozen)


class Trainer:
  """Trains through the ledger and the runner of sweeps.

  Args:
    workdir: of the study.
    frozen: its plan.
    parallel: processes at once.
    group: how many runs one program holds at most.
  """

  def __init__(self, workdir, frozen: plans.Frozen, parallel: int = 1,
               group: int = 8):
    self._workdir = pathlib.Path(workdir)
    self._frozen = frozen
    self._parallel, self._group = parallel, group

  def train(self, folder: str, runs: Sequence[phases.Run]
            ) -> list[plans.Outcome]:
    """Returns the outcome of each run, once all of them have ended, as it lies
    on disk.

    Raises:
      Stopped: after a signal.
      EnvironmentFailure: where runs failed that did not diverge.
    """
    path, sweep = self._workdir / folder, self.trained(folder, runs)
    others = layout.plans_of(path) - self._frozen.known
    require(not others, f'{path} holds runs of another plan than the study has '
            f'had ({", ".join(sorted(others)) or "none"}): move them away, or '
            'give the reason why they are of this study by --amend=REASON')
    require(not sweep.strangers, f'{path} holds runs of another config than '
            f'the plan says: {"; ".join(sweep.strangers[:3])}; move them away')
    points = {point.name: point for point in sweep.points}
    outcomes, failed = [], []
    for run in runs:
      result = points[run.point].runs[run.seed]
      if result.ended_badly or (
          result.held_out and result.state != layout.FAILED):
        outcomes.append(self._outcome(run, points[run.point], result))
      else:
        failed.append(f'{run.point}, seed {run.seed}: ' + (
            result.error or 'it was not evaluated after its last step'))
    if failed:
      raise EnvironmentFailure(
          f'{path}: {len(failed)} runs failed that did not diverge: '
          f'{"; ".join(failed[:3])}: see log.txt in their folders; --retry '
          'takes up again those that failed, and a run whose folder is moved '
          'away is trained anew')
    return outcomes

  def predicted(self, phase: str, rows: Sequence) -> dict:
    """Freezes what a phase is expected to find, once."""
    return plans.predicted(self._workdir, self._frozen, phase, rows)

  def trained(self, folder: str, runs: Sequence[phases.Run]) -> curves.Sweep:
    """Returns the sweep of some runs, once all of them have ended."""
    path = self._workdir / folder
    with layout.Ledger(path) as ledger:
      description = layout.begin(path, ledger, self.describe(folder, runs))
      if ledger.runs(layout.PENDING, layout.RUNNING):
        self.work(path, ledger)
      return curves.read(path, description, ledger.runs())

  def work(self, path: pathlib.Path, ledger) -> None:
    """Trains what is pending, and waits for what other runners have."""
    local.Runner(path, ledger, self._parallel, self._group,
                 lambda runs: self.begun(path, runs)).run(wait=True)

  def begun(self, path: pathlib.Path, runs: Sequence[layout.Run]) -> None:
    """Notes in the study's ledger that runs of a phase begin from nothing."""
    with layout.StudyLedger(self._workdir) as ledger:
      ledger.add_begun(self._frozen.hash, [
          (path.name, run.point, run.seed) for run in runs])

  def describe(self, folder: str, runs: Sequence[phases.Run]) -> dict:
    """Returns what sweep.json holds of a phase."""
    frozen, rows = self._frozen, {}
    for run in runs:
      if run.point not in rows:
        point = frozen.point_of(run)
        rows[run.point] = {
            'name': run.point, 'variant': run.variant, 'size': run.size,
            'workload': run.workload,
            'changes': plans.to_json(run.changes), 'seeds': [],
            'tasks': self._owed(run),
            # A run may take fewer steps than its point.
            'tokens': round(point['tokens'] / frozen.steps(point['changes'])
                            * frozen.steps(run.changes)),
            **{name: point[name] for name in (
                'matched', 'params', 'active_params', 'flops_per_token')}}
      rows[run.point]['seeds'].append(run.seed)
    return {'name': f'{frozen.plan.name}, {folder}', 'file': frozen.plan.file,
            'match': frozen.plan.match, 'match_field': frozen.plan.match_field,
            'base': runs[0].point, 'base_config': frozen.base_config,
            'paired': True, 'points': list(rows.values()),
            'sources': frozen.sources, 'files': dict(plugins.loaded),
            'plan': f'{frozen.hash} {plans.date(frozen.time)}'}

  def _owed(self, run: phases.Run) -> list[str]:
    """The losses of each document, of what the verdict is on."""
    objective = (self._frozen.base_config | run.changes)['objective']
    return ['documents'] * (
        run.phase == 'confirm' and run.workload == plans.TEXT
        and objectives.OBJECTIVES[objective].every_token)

  def _outcome(self, run: phases.Run, point: curves.Point, result: curves.Run
               ) -> plans.Outcome:
    loss = result.final if result.final is not None else math.inf
    diverged = (result.ended_badly or not math.isfinite(loss)
                or loss > GUESSING * self._frozen.point_of(run)['guess'])
    values = {}
    for measure in self._frozen.plan.of_workload(run.workload):
      value = (measure.chance if diverged else
               result.held_out.get(measure.figure))
      require(isinstance(value, int | float), f'measure {measure.name!r} is '
              f'{measure.figure!r}, which {run.point}, seed {run.seed}, has '
              f'not reported: it has {", ".join(result.held_out) or "nothing"}')
      values[measure.name] = float(value)
    spent = {name: values[-1] for name, values in point.curve(
        run.seed, 'train').items()}
    return plans.Outcome(
        run.phase, run.variant, run.size, run.workload, run.seed, values,
        diverged, spent.get('flops', 0.0), spent.get('seconds', math.nan),
        point.params, dict(run.changes), loss,
        point.curve(run.seed) if run.phase in plans.WITH_CURVES else {},
        {measure.name: result.items[measure.figure]
         for measure in self._frozen.plan.of_workload(run.workload)
         if measure.figure in result.items and run.phase not in (
             'noise', 'tune')},
        curves.cooled(result.config), self._frozen.point_of(run).get('body'))
