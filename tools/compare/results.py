"""results.json: everything that a study has found, and what it took; and before
it runs, what each phase costs: runs, tokens, FLOPs, and hours where the time of
a step is known."""

import collections
from collections.abc import Mapping, Sequence
import importlib.metadata
import math
import pathlib
import platform
from typing import Any, NamedTuple

from tools.compare import decide, layout, phases
from tools.compare import plan as plans
from training.workdir import provenance as provenance_lib

FILE = 'results.json'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'scipy')
# The results of a study that was frozen and no more.
NOTHING: dict[str, Any] = {
    'study': None, 'outcomes': [], 'phases': {}, 'noise': [], 'announced': None,
    'advice': '', 'tuned': [], 'as_planned': {'differences': []},
    'predicted': None, 'missing': '', 'unlike_saved': [],
    'statistics': {'codes': [], 'tests': {}},
    'provenance': {'codes': [], 'devices': [], 'versions': {}}}


def write(workdir, frozen: plans.FrozenPlan, state: phases.StudyState) -> None:
  """Writes results.json, unless it holds later phases of the same plan.

  Args:
    workdir: the folder of the study.
    frozen: its plan.
    state: the outcomes and decisions so far.
  """
  # A study that is started again walks through all its phases from the first
  # on, and may be told to end early. The file must not lose later phases that
  # were finished before.
  saved = load(workdir)
  finished = {
      phase for phase, row in saved['phases'].items() if row['finished']}
  if set(state.finished) < finished and saved['study']['hash'] == frozen.hash:
    return

  tree = make_tree(workdir=workdir, frozen=frozen, state=state,
                   provenance=describe_provenance(workdir))
  layout.save_with_checksum(pathlib.Path(workdir) / FILE, tree)


def describe_provenance(workdir) -> dict[str, Any]:
  """Returns what has trained the runs of a study: the versions of the code, the
  devices, and the versions of packages of this process.

  Args:
    workdir: the folder of the study.

  Returns:
    The lists 'codes' and 'devices', each with what is different among the runs,
    and 'versions' by the name of the package.
  """
  run_folders: list[pathlib.Path] = []
  for folder in folders(workdir):
    run_folders += sorted(folder.glob('points/*/seed-*'))
  devices: list[str] = []
  for run_folder in run_folders:
    devices += layout.devices_of_run(run_folder)
  versions = {'python': platform.python_version()}
  for name in _PACKAGES:
    versions[name] = importlib.metadata.version(name)
  return {'codes': provenance_lib.list_codes(
              layout.starts_of_runs(run_folders)),
          'devices': list(dict.fromkeys(devices)), 'versions': versions}


def make_tree(workdir, frozen: plans.FrozenPlan, state: phases.StudyState,
              provenance: Mapping[str, Any]) -> dict[str, Any]:
  """Puts the contents of results.json together: the outcomes of a study's runs,
  what its phases found, what they cost, and which code was used.

  Args:
    workdir: the folder of the study.
    frozen: the plan of the study.
    state: the outcomes and decisions so far.
    provenance: the code and machines that trained the runs, as
      `describe_provenance` returns them.
  """
  phases_spent = {}
  for phase in phases.phases_of_study(frozen.plan.seeds):
    phases_spent[phase.name] = _spent(frozen, phase, state)
  # The records of the phases, such as 'tuned' and 'confirm', are keys of their
  # own.
  return {
      'study': {'name': frozen.plan.name, 'hash': frozen.hash},
      'outcomes': plans.to_json(state.outcomes),
      **plans.to_json(state.records),
      'phases': phases_spent,
      'as_planned': as_planned(workdir, frozen, provenance['codes']),
      'provenance': dict(provenance),
      'statistics': {
          'codes': provenance_lib.list_codes(
              [provenance_lib.describe_this_start()]),
          'tests': _tests_by_phase(state.records)}}


def _tests_by_phase(records: Mapping[str, Any]) -> dict[str, str]:
  """Returns the name of the test that each phase has compared variants by, of
  its first measure; phases without a verdict are left out."""
  tests = {}
  for phase, rows in records.items():
    if phase in phases.PHASES and rows and isinstance(rows[0], decide.Verdict):
      tests[phase] = rows[0].test
  return tests


def load(workdir) -> dict[str, Any]:
  """Returns the content of results.json, with the entries of NOTHING for keys
  that it lacks, or where there is no such file."""
  path = pathlib.Path(workdir) / FILE
  if not path.is_file():
    return dict(NOTHING)
  return NOTHING | layout.load_with_checksum(path)


def folders(workdir, phase: str = '') -> list[pathlib.Path]:
  """Returns the folders of the sweeps of a study, in the order of its phases. A
  phase may have several, such as tune-1, tune-2, ...

  Args:
    workdir: the folder of the study.
    phase: the name of the phase; '': all phases.
  """
  def length_and_name(folder: pathlib.Path) -> tuple[int, str]:
    """Returns a key of sorting by which tune-10 comes after tune-9."""
    return len(folder.name), folder.name

  files = pathlib.Path(workdir).glob('*/sweep.json')
  sweeps = sorted((file.parent for file in files), key=length_and_name)
  wanted = list(phases.PHASES)
  if phase:
    wanted = [phase]
  ordered = []
  for name in wanted:
    for sweep in sweeps:
      if plans.phase_of_folder(sweep) == name:
        ordered.append(sweep)
  return ordered


def _spent(frozen: plans.FrozenPlan, phase: phases.Phase, state
           ) -> dict[str, Any]:
  """Sums the runs, tokens, FLOPs and time that a phase of a study has taken so
  far.

  Args:
    frozen: the plan of the study.
    phase: the phase.
    state: the outcomes and decisions so far.

  Returns:
    The entry of the phase in `phases` of results.json: the numbers of runs that
    were 'planned' at most, are 'done', and 'failed' (diverged); the sums of
    'tokens', 'flops' and 'seconds'; and whether the phase is 'finished'.
  """
  num_done = num_failed = 0
  tokens, flops, seconds = 0.0, 0.0, 0.0
  for run in state.outcomes:
    if run.phase != phase.name:
      continue
    num_done += 1
    num_failed += run.diverged
    # A run may have trained only a part of its planned steps, so its tokens
    # follow from its FLOPs.
    tokens += run.flops / frozen.point_of_run(run)['flops_per_token']
    flops += run.flops
    # The time of a run is not always known. The others are summed.
    if not math.isnan(run.seconds):
      seconds += run.seconds
  return {'planned': len(phase.largest_set_of_runs(frozen)), 'done': num_done,
          'failed': num_failed,
          'tokens': tokens, 'flops': flops, 'seconds': seconds,
          'finished': phase.name in state.finished}


def as_planned(workdir, frozen: plans.FrozenPlan, ran: Sequence[str]
               ) -> dict[str, Any]:
  """Compares what ran with what was planned.

  Args:
    workdir: the folder of the study.
    frozen: its plan.
    ran: the versions of the code that trained the runs.

  Returns:
    'differences', a sentence for each;
    'repeated', how many runs of each phase were trained again; 'unknown', how
    many runs the ledger does not know; 'without_hash', of how many it does not
    know with which figures they ended.
  """
  differences = []

  # Decisions after the plan was frozen.
  for change in frozen.amendments:
    seen = ', '.join(change['seen']) or 'nothing'
    differences.append(
        f'The plan was changed ({", ".join(change["changed"])}) when {seen} '
        f'had been looked at. Reason: {change["reason"]}')
  differences += [change['told'] for change in frozen.notes]

  # Runs that were begun more than once might have been repeated until they were
  # good; those begun elsewhere might be the best of many.
  repeated, unknown, without_hash = _count_runs_of_ledger(workdir)
  for phase, number in repeated.items():
    differences.append(
        f'Runs of {phase} were deleted and trained again: {number}.')
  if unknown:
    differences.append('Runs that the ledger of the study does not know, since '
                       'they were begun elsewhere or it was lost: '
                       f'{unknown}.')

  # The code that trained the runs. Where that of the plan is not known, nothing
  # can be compared.
  planned_codes = provenance_lib.list_codes([frozen.code])
  unplanned = []
  if planned_codes:
    unplanned = [code for code in ran if code not in planned_codes]
  if unplanned:
    differences.append(
        f'The plan was made with {planned_codes[0]}, and runs were trained by '
        f'{", ".join(unplanned)}.')
  return {'differences': differences, 'repeated': repeated,
          'unknown': unknown, 'without_hash': without_hash}


def _count_runs_of_ledger(workdir) -> tuple[dict[str, int], int, int]:
  """Counts the runs of a study that were begun again, or that its ledger (the
  database of runs that began and ended) did not see begin or end.

  Args:
    workdir: the folder of the study.

  Returns:
    Three counts: by phase, how many times its runs were begun again; how many
    runs on disk the ledger did not see begin; and how many runs with figures it
    did not see end, so that it has no hash of these figures.
  """
  with layout.StudyLedger(workdir) as ledger:
    begun_runs = ledger.begun_runs()
    ended_runs = ledger.hash_of_ended_runs()

  # An entry of begun_runs, (folder, point, seed), is one beginning of a run.
  # All but the first count.
  repeated: dict[str, int] = {}
  for (folder, _, _), num_times in collections.Counter(begun_runs).items():
    if num_times > 1:
      phase = plans.phase_of_folder(pathlib.Path(folder))
      repeated[phase] = repeated.get(phase, 0) + num_times - 1

  # Collect the runs on disk in the form of the ledger's rows.
  on_disk = set()
  with_figures = set()
  for folder in folders(workdir):
    for run in folder.glob('points/*/seed-*'):
      seed = int(run.name.removeprefix('seed-'))
      row = folder.name, run.parent.name, seed
      on_disk.add(row)
      if (run / 'metrics.jsonl').is_file():
        with_figures.add(row)
  return (repeated, len(on_disk - set(begun_runs)),
          len(with_figures - ended_runs.keys()))


# Seconds of a step of one run, by size and workload, as measured on this
# machine; of runs that train as one program, a run's share.
Times = Mapping[tuple[str, str], float]


class Cost(NamedTuple):
  """The cost of a phase.

  Attributes:
    phase: the name of the phase.
    runs: the number of runs.
    programs: the number of programs that train them.
    tokens: the tokens of all runs.
    flops: the FLOPs of all runs.
    seconds: the time of the steps of one process, without starting and
      compiling; None where it is not known.
    note: what else may come.
  """
  phase: str
  runs: int
  programs: int
  tokens: float
  flops: float
  seconds: float | None
  note: str = ''


def costs(frozen: plans.FrozenPlan, group: int, times: Times | None
          ) -> list[Cost]:
  """Returns the highest possible cost of each phase of a study: every variant
  passes the screening and is confirmed. If tuning may go beyond the planned
  values, the `note` of a cost says how much that adds.

  Args:
    frozen: the plan of the study.
    group: the most runs that are trained as one program.
    times: the seconds of a training step, {(size, workload): seconds}; None: it
      was not measured.
  """
  cost_of_phases = []
  for phase in phases.phases_of_study(frozen.plan.seeds):
    cost_of_phases.append(
        _cost(frozen=frozen, group=group, times=times, phase=phase))
  return cost_of_phases


def _cost(frozen: plans.FrozenPlan, group: int, times: Times | None,
          phase: phases.Phase) -> Cost:
  """Returns the highest possible cost of a phase of a study.

  Args:
    frozen: the plan of the study.
    group: the most runs that are trained as one program.
    times: the seconds of a training step, {(size, workload): seconds}; None: it
      was not measured.
    phase: the phase.
  """
  # Sum over the runs. `runs_of_program` counts the runs that could be trained
  # as one program, because they differ in nothing that is compiled into it.
  runs = phase.largest_set_of_runs(frozen)
  tokens = flops = seconds = 0.0
  runs_of_program: collections.Counter[tuple] = collections.Counter()
  for run in runs:
    # A run of tuning may train a part of the steps of its point (a variant at a
    # size).
    planned_point = frozen.point_of_run(run)
    steps = frozen.steps(run.changes)
    share = steps / frozen.steps(planned_point['changes'])
    tokens += planned_point['tokens'] * share
    flops += planned_point['tokens'] * share * planned_point['flops_per_token']
    if times:
      seconds += steps * times[run.size, run.workload]
    runs_of_program[_program(run)] += 1

  # Split them into programs of `group` runs at most.
  programs = sum(
      math.ceil(number / group) for number in runs_of_program.values())
  return Cost(
      phase=phase.name,
      runs=len(runs),
      programs=programs,
      tokens=tokens,
      flops=flops,
      seconds=seconds if times else None,
      note=phase.note_on_cost(frozen.plan))


def _program(run: phases.Run) -> tuple:
  """Returns a key that is equal for runs that train as one compiled program:
  those that differ only in values which are inputs of the program."""
  from training.runs import TYPE_OF_TRACED_FIELD
  others = []
  for name, value in run.changes.items():
    if name not in TYPE_OF_TRACED_FIELD:
      others.append((name, repr(value)))
  return tuple(sorted(others))


def times_of(workdir, frozen: plans.FrozenPlan) -> Times | None:
  """Returns the mean time of a training step, as the finished runs of a study
  took it.

  Args:
    workdir: the folder of the study.
    frozen: the plan of the study. Runs of sizes, workloads (the text, or
      probes) and variants that it does not have are left out.

  Returns:
    The seconds, {(size, workload): seconds}, or None if one of them is not
    known.
  """
  plan = frozen.plan
  variants = (plan.base, plans.SECOND_BASE, *plan.variants)

  # Sum steps and seconds over the runs. Sums that stay 0 are of sizes and
  # workloads of which no run has finished.
  steps, seconds = {}, {}
  for size in plan.all_sizes:
    for workload in plan.workloads:
      steps[size, workload] = seconds[size, workload] = 0.0
  # Runs that diverged may have ended early, and say little about a step.
  for row in load(workdir)['outcomes']:
    run = plans.outcome_from_json(row)
    key = run.size, run.workload
    if key not in steps or run.variant not in variants:
      continue
    if run.diverged or math.isnan(run.seconds):
      continue
    steps[key] += frozen.steps(run.changes)
    seconds[key] += run.seconds

  # Times are given for everything or for nothing.
  if not all(steps.values()):
    return None
  return {key: seconds[key] / steps[key] for key in steps}


def table(cost_of_phases: Sequence[Cost], parallel: int) -> str:
  """Returns the costs of a study's phases and their sum as a table for a
  terminal.

  Args:
    cost_of_phases: the cost of each phase.
    parallel: the number of processes that run at once, by which the hours are
      divided.
  """
  # The first row has the headings, which have no note.
  rows = [('phase', 'runs', 'programs', 'tokens', 'FLOPs', 'hours')]
  notes = ['']
  for cost in [*cost_of_phases, _in_all(cost_of_phases)]:
    text_of_hours = 'unknown'
    if cost.seconds is not None:
      hours = cost.seconds / parallel / 3600
      text_of_hours = f'{hours:.2f}' if hours >= 0.1 else f'{hours:.1g}'
    rows.append((cost.phase, f'{cost.runs:,}', f'{cost.programs:,}',
                 f'{cost.tokens:,.0f}', f'{cost.flops:.3g}', text_of_hours))
    notes.append(cost.note)

  # Notes stand behind the columns, because they are too long for one.
  lines = []
  for line, note in zip(layout.align_columns(rows), notes):
    lines.append(f'{line}  {note}'.rstrip())
  return '\n'.join(lines)


def _in_all(cost_of_phases: Sequence[Cost]) -> Cost:
  """Returns the sum of the costs of a study's phases. Its time is known only if
  that of every phase is.

  Args:
    cost_of_phases: the cost of each phase.
  """
  runs = programs = 0
  tokens = flops = 0.0
  seconds: float | None = 0.0
  for cost in cost_of_phases:
    runs += cost.runs
    programs += cost.programs
    tokens += cost.tokens
    flops += cost.flops
    # Once one time is unknown (None), so is the sum.
    if seconds is None or cost.seconds is None:
      seconds = None
    else:
      seconds += cost.seconds
  return Cost(phase='in all', runs=runs, programs=programs, tokens=tokens,
              flops=flops, seconds=seconds)
