"""status: how far each point of a sweep is, or each phase of a study."""

import argparse
import collections
from collections.abc import Mapping, Sequence
import json
from typing import Any

from tools.compare import layout
from tools.compare import plan as plans
from training import progress

HEADINGS = ('point', 'runs', 'trained', 'held-out loss', 'vs base')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  layout.add_workdir_arguments(parser)
  parser.add_argument('--json', action='store_true',
                      help='print every run as JSON')


def main(args) -> int:
  """Prints how far a sweep or a study is: a table with a row for each point (a
  variant of the config), and the runs that failed. Returns the exit code, 0.

  Args:
    args: the arguments of the command `status`.

  Raises:
    RequestError: where no sweep or study was run.
  """
  workdir = layout.parse_workdir(args)
  if layout.is_study(workdir):
    return _study(workdir, args.json)

  # sweep.json says what was asked for, and the ledger how far each run is.
  description = layout.load_sweep_description(workdir)
  runs = layout.load_ledger_runs(workdir)

  # Print a row for each point, with the columns of HEADINGS.
  points = rows(description, workdir, runs)
  if args.json:
    print(json.dumps({
        'sweep': description['name'],
        'points': [dict(zip(HEADINGS, row)) for row in points],
        'runs': [run._asdict() for run in runs]}, indent=2))
    return 0
  for line in layout.align_columns([HEADINGS, *points], left=2):
    print(line)
  print()
  print(f'{len(runs)} runs: {states(runs)}')
  for line in failed(runs):
    print(f'failed: {line}')
  return 0


def _study(workdir, as_json: bool) -> int:
  """Prints how far each phase of a study is, what was changed in its plan, the
  time that is left, and the verdicts so far; returns the exit code.

  Args:
    workdir: the folder of the study.
    as_json: whether to print JSON.
  """
  from tools.compare import results, tuning
  frozen = plans.load_frozen_plan(workdir)
  saved = results.load(workdir)
  # Each phase with its cost, which has the largest number of its runs, and the
  # runs that it has begun, which may lie in several folders.
  phases = []
  times = results.times_of(workdir, frozen)
  for cost in results.costs(frozen, 1, times):
    runs = []
    for folder in results.folders(workdir, cost.phase):
      runs += layout.load_ledger_runs(folder)
    phases.append((cost, runs))
  seconds_left = _seconds_left(phases, saved)
  verdicts = _saved_verdicts(frozen.plan, saved)

  if as_json:
    phases_as_json = []
    for cost, runs in phases:
      counts = collections.Counter(run.state for run in runs)
      phases_as_json.append({
          'phase': cost.phase, 'planned': cost.runs, 'states': counts,
          'failed': failed(runs)})
    print(json.dumps({'study': frozen.plan.name, 'plan': frozen.hash,
                      'amendments': frozen.amendments,
                      'phases': phases_as_json, 'seconds_left': seconds_left,
                      'verdicts': verdicts}, indent=2))
    return 0

  _print_plan_and_phases(frozen, phases, saved)
  if seconds_left is None:
    print('time left: not known yet')
  elif seconds_left == 0:
    print('time left: none, all phases are over')
  else:
    print(f'time left: at most {progress.format_seconds(seconds_left)} for '
          'the steps of one process, without starting and compiling')
  check = tuning.describe_check(frozen.plan, saved['tuned'])
  if check:
    print(check)
  for variant, verdict in verdicts.items():
    print(f'{variant}: {verdict}')
  if verdicts:
    print('These verdicts are those that the study saved; `report` computes '
          'them from the runs.')
  return 0


def _print_plan_and_phases(
    frozen: plans.FrozenPlan,
    phases: Sequence[tuple[Any, list[layout.Run]]],
    saved: Mapping[str, Any]) -> None:
  """Prints the name of a study's plan, how the plan was changed since it was
  written down, and how far each phase is.

  Args:
    frozen: the plan.
    phases: for each phase, its highest possible cost (results.Cost) and the
      runs that it has begun.
    saved: the contents of results.json.
  """
  print(f'study {frozen.plan.name}, plan {frozen.hash}, frozen on '
        f'{plans.format_date(frozen.time)}')
  for change in frozen.amendments:
    print(f'changed on {plans.format_date(change["time"])}: '
          f'{", ".join(change["changed"])}. Reason: {change["reason"]}')
  width = max(len(cost.phase) for cost, _ in phases)
  for cost, runs in phases:
    if not _is_over(cost.phase, saved):
      state = f'{states(runs) or "not begun"}, {cost.runs} planned'
      if cost.note:
        state += f' {cost.note}'
    elif runs:
      state = f'{states(runs)}, over'
    else:
      state = 'no runs: no variant was left for it'
    print(f'{cost.phase:<{width}} {state}')
    for line in failed(runs):
      print(f'{"":<{width}} failed: {line}')


def _seconds_left(phases: Sequence[tuple[Any, list[layout.Run]]],
                  saved: Mapping[str, Any]) -> float | None:
  """Returns the most seconds of training that a study has left, if one process
  does all of it; None if the time of a step is not known.

  Args:
    phases: for each phase, its highest possible cost (results.Cost) and the
      runs that it has begun.
    saved: the contents of results.json.
  """
  # A phase that is finished needs no more, even if it had fewer runs than were
  # planned. Of the others, the share of runs that are not done is left.
  seconds_left = 0.0
  for cost, runs in phases:
    if _is_over(cost.phase, saved):
      continue
    if cost.seconds is None:
      return None
    num_done = sum(run.state == layout.DONE for run in runs)
    seconds_left += cost.seconds * max(1 - num_done / max(cost.runs, 1), 0.0)
  return seconds_left


def _is_over(phase: str, saved: Mapping[str, Any]) -> bool:
  """Returns whether a phase of a study has ended.

  Args:
    phase: the name of the phase.
    saved: the contents of results.json.
  """
  return bool(saved['phases'].get(phase, {}).get('finished'))


def _saved_verdicts(plan: plans.Plan, saved: Mapping[str, Any]
                    ) -> dict[str, str]:
  """Returns the newest verdict on each variant of a study, {variant: verdict},
  by the primary measure. Variants that no phase has compared are left out.

  Args:
    plan: the plan of the study.
    saved: the contents of results.json.
  """
  verdicts = {}
  # The phases are in their order, so that the verdict of a later one wins.
  for phase in ('screen', 'rescreen', 'confirm'):
    for row in saved.get(phase, ()):
      if row['measure'] == plan.primary.name:
        verdicts[row['variant']] = row['verdict']
  return verdicts


def rows(description: dict, workdir, runs: list[layout.Run]
         ) -> list[tuple[str, ...]]:
  """Returns the rows of the table of a sweep's status, one for each point (a
  variant), the base first.

  Args:
    description: the content of sweep.json.
    workdir: the folder of the sweep.
    runs: the runs of its ledger.

  Returns:
    Rows of the columns of HEADINGS: the name, the states of the runs, the share
    that is trained, the mean held-out loss, and that minus the base's, seed by
    seed.
  """
  # Group the runs by their point.
  by_point = collections.defaultdict(list)
  for run in runs:
    by_point[run.point].append(run)

  # The base must come first (False sorts before True), because the others are
  # compared with its losses.
  names = [point['name'] for point in description['points']]
  names.sort(key=lambda name: name != description['base'])
  base_losses: dict[int, float] = {}
  rows_of_table = []
  for name in names:
    shares, losses = _trained(description, workdir=workdir, point=name,
                              runs=by_point[name])
    # Compare the seeds that point and base have both finished. base_losses is
    # still empty for the base itself.
    differences = [loss - base_losses[seed] for seed, loss in losses.items()
                   if seed in base_losses]
    if name == names[0]:
      base_losses = losses
    rows_of_table.append((
        name, states(by_point[name]), _mean(shares, '.0%'),
        _mean(list(losses.values()), '.4f'), _mean(differences, '+.4f')))
  return rows_of_table


def _trained(description: dict, workdir, point: str, runs: list[layout.Run]
             ) -> tuple[list[float], dict[int, float]]:
  """Reads from their metrics how far the runs of one point of a sweep (a
  variant of the config) are.

  Args:
    description: the content of sweep.json.
    workdir: the folder of the sweep.
    point: the name of the point.
    runs: its runs.

  Returns:
    The share of its steps that each run has trained, and by seed the held-out
    loss of those that have finished.
  """
  # All seeds have the same number of steps, so that any seed will do.
  num_steps = layout.config_of_run(description, point, 0).train.steps
  shares, losses = [], {}
  for run in runs:
    folder = layout.run_folder(workdir, run.point, run.seed)
    train_rows = layout.read_metrics(folder, 'train')
    shares.append(train_rows[-1]['step'] / num_steps if train_rows else 0.0)
    for row in layout.read_metrics(folder, 'eval'):
      if row['step'] == num_steps and row.get('loss') is not None:
        losses[run.seed] = row['loss']
  return shares, losses


def states(runs: list[layout.Run]) -> str:
  """Returns how many runs are in each state: '2 done, 1 running'."""
  counts = collections.Counter(run.state for run in runs)
  return ', '.join(f'{counts[state]} {state}'
                   for state in reversed(layout.STATES) if counts[state])


def failed(runs: list[layout.Run]) -> list[str]:
  """Returns a line for each run that failed, with its error."""
  return [f'{run.point}, seed {run.seed}: {run.error}' for run in runs
          if run.state == layout.FAILED]


def _mean(values: list[float], form: str) -> str:
  """Returns the mean of some values as text; '' where there is none."""
  if not values:
    return ''
  return format(sum(values) / len(values), form)
