"""results.json: everything that a study has found, and what it took; and before
it runs, what each phase costs: runs, tokens, FLOPs, and hours where the time of
a step is known."""

import collections
from collections.abc import Mapping, Sequence
import importlib.metadata
import pathlib
import platform
from typing import Any, NamedTuple

from tools.compare import layout, phases
from tools.compare import plan as plans

FILE = 'results.json'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'scipy')
# What a study that was frozen and no more has found.
NOTHING: dict[str, Any] = {
    'study': None, 'outcomes': [], 'phases': {}, 'noise': [], 'announced': None,
    'advice': '', 'tuned': [], 'as_planned': {'differences': []},
    'predicted': None,
    'provenance': {'codes': [], 'devices': [], 'versions': {}}}


def write(workdir, frozen: plans.Frozen, state: phases.State) -> None:
  """Writes results.json, unless it holds later phases of the same plan.

  Args:
    workdir: of the study.
    frozen: its plan.
    state: what is found so far.
  """
  before = load(workdir)
  over = {phase for phase, row in before['phases'].items() if row['finished']}
  # A study that is started again walks through all of its phases, and may be
  # told to end early.
  if set(state.finished) < over and before['study']['hash'] == frozen.hash:
    return
  ran = codes(workdir)
  layout.save_checked(pathlib.Path(workdir) / FILE, {
      'study': {'name': frozen.plan.name, 'hash': frozen.hash},
      'outcomes': plans.to_json(state.outcomes), **plans.to_json(state.records),
      'phases': {phase.name: _spent(frozen, phase, state)
                 for phase in phases.of(frozen.plan.seeds)},
      'as_planned': as_planned(workdir, frozen, ran),
      'provenance': {'codes': ran, 'devices': _devices(workdir),
                     'versions': {'python': platform.python_version()} | {
                         name: importlib.metadata.version(name)
                         for name in _PACKAGES}}})


def load(workdir) -> dict[str, Any]:
  """Returns what results.json holds, and what of NOTHING it does not."""
  path = pathlib.Path(workdir) / FILE
  return NOTHING | (layout.load_checked(path) if path.is_file() else {})


def folders(workdir, phase: str = '') -> list[pathlib.Path]:
  """Returns the sweeps of a phase, or of all, in the order of the phases."""
  paths = sorted((path.parent for path in pathlib.Path(workdir).glob(
      '*/sweep.json')), key=lambda path: (len(path.name), path.name))
  return [path for name in ([phase] if phase else phases.PHASES)
          for path in paths if plans.phase_of(path) == name]


def _spent(frozen: plans.Frozen, phase: phases.Phase, state) -> dict[str, Any]:
  runs = [x for x in state.outcomes if x.phase == phase.name]
  return {'planned': len(phase.most(frozen)), 'done': len(runs),
          'failed': sum(x.diverged for x in runs),
          'tokens': sum(x.flops / frozen.point_of(x)['flops_per_token']
                        for x in runs),
          'flops': float(sum(x.flops for x in runs)),
          'seconds': float(sum(x.seconds for x in runs
                               if x.seconds == x.seconds)),
          'finished': phase.name in state.finished}


def as_planned(workdir, frozen: plans.Frozen, ran: Sequence[str]
               ) -> dict[str, Any]:
  """Returns whether what ran, by these codes, is what was planned, and what is
  not."""
  from training.workdir import provenance
  differences, (repeated, unknown) = [], _begun(workdir)
  for change in frozen.amendments:
    seen = ', '.join(change['seen']) or 'nothing'
    differences.append(
        f'The plan was changed ({", ".join(change["changed"])}) when {seen} '
        f'had been looked at. Reason: {change["reason"]}')
  differences += [change['told'] for change in frozen.notes]
  differences += [f'Runs of {phase} were deleted and trained again: {number}.'
                  for phase, number in repeated.items()]
  if unknown:
    differences.append('Runs that the ledger of the study does not know, since '
                       'they were begun elsewhere or it was lost: '
                       f'{unknown}.')
  planned = provenance.codes([frozen.code])
  others = [code for code in ran if planned and code not in planned]
  if others:
    differences.append(f'The plan was made with {planned[0]}, and runs were '
                       f'trained by {", ".join(others)}.')
  return {'same': not differences, 'differences': differences,
          'repeated': repeated, 'unknown': unknown}


def _begun(workdir) -> tuple[dict[str, int], int]:
  """Returns how many times runs of each phase were begun anew, and how many
  runs are on disk that the ledger of the study did not see begin."""
  with layout.StudyLedger(workdir) as ledger:
    begun = ledger.begun()
  phase = lambda run: plans.phase_of(pathlib.Path(run[0]))
  again = collections.Counter(map(phase, begun))
  again.subtract(map(phase, set(begun)))
  there = {(folder.name, run.parent.name, int(run.name.removeprefix('seed-')))
           for folder in folders(workdir)
           for run in folder.glob('points/*/seed-*')}
  return dict(+again), len(there - set(begun))


def codes(workdir) -> list[str]:
  """Returns the codes that trained the runs, as far as they are known."""
  return list(dict.fromkeys(code for folder in folders(workdir)
                            for code in layout.codes(
                                folder, layout.load_description(folder))))


def _devices(workdir) -> list[str]:
  """Returns the devices that the runs said they have."""
  names = {}
  for folder in folders(workdir):
    for log in sorted(folder.glob('points/*/*/log.txt')):
      for line in log.read_text(errors='replace').splitlines():
        name, colon, devices = line.partition(': ')
        if colon and name.strip() == 'devices':
          names[devices.partition(', mesh')[0]] = None
  return list(names)


# Seconds of a step of one run, by size and workload, as measured on this
# machine; of runs that train as one program, a run's share.
Times = Mapping[tuple[str, str], float]


class Cost(NamedTuple):
  """What a phase takes; `seconds` of the steps of one process, without starting
  and compiling, None where not known."""
  phase: str
  runs: int
  programs: int
  tokens: float
  flops: float
  seconds: float | None
  note: str = ''


def costs(frozen: plans.Frozen, group: int, times: Times | None
          ) -> list[Cost]:
  """Returns the costs of all phases, at most: every variant is confirmed, and
  no edge of what is tuned is moved (of which its `note` says how much it is).

  Args:
    frozen: the plan.
    group: how many runs one program holds at most.
    times: None: not measured.
  """
  return [_cost(frozen, group, times, phase)
          for phase in phases.of(frozen.plan.seeds)]


def _cost(frozen, group: int, times: Times | None, phase) -> Cost:
  from training import vectorised
  runs = phase.most(frozen)
  tokens = flops = seconds = 0.0
  alike: collections.Counter[tuple] = collections.Counter()
  for run in runs:
    row = frozen.point_of(run)
    steps = frozen.steps(run.changes)
    part = steps / frozen.steps(row['changes'])
    tokens += row['tokens'] * part
    flops += row['tokens'] * part * row['flops_per_token']
    key = tuple(sorted((name, repr(value)) for name, value in
                       run.changes.items() if name not in vectorised.FIELDS))
    alike[key] += 1
    if times:
      seconds += steps * times[run.size, run.workload]
  programs = sum(-(-n // group) for n in alike.values())
  return Cost(phase.name, len(runs), programs, tokens, flops,
              seconds if times else None, phase.note(frozen.plan))


def times_of(workdir, frozen: plans.Frozen) -> Times | None:
  """Returns what the runs in a study's folder took; None where a size on a
  workload has none yet with a known time. What an earlier plan had and this one
  has not is left out."""
  plan = frozen.plan
  variants = (plan.base, plans.AGAIN, *plan.variants)
  wanted = [(size, workload) for size in plan.every_size
            for workload in plan.workloads]
  steps, seconds = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0.0)
  for x in map(plans.outcome_from_json, load(workdir)['outcomes']):
    key = x.size, x.workload
    if (x.seconds == x.seconds and not x.diverged and x.variant in variants
        and key in steps):
      steps[key] += frozen.steps(x.changes)
      seconds[key] += x.seconds
  return {key: seconds[key] / steps[key] for key in wanted} if all(
      steps.values()) else None


def table(each: Sequence[Cost], parallel: int) -> str:
  """Renders costs for a terminal: a row for each phase, and all of them."""
  sums = (None if None in column else sum(column)
          for column in list(zip(*each))[1:6])
  every = [*each, Cost('in all', *sums)]
  lines = layout.columns([
      ('phase', 'runs', 'programs', 'tokens', 'FLOPs', 'hours'),
      *((c.phase, f'{c.runs:,}', f'{c.programs:,}', f'{c.tokens:,.0f}',
         f'{c.flops:.3g}', 'unknown' if c.seconds is None
         else f'{c.seconds / parallel / 3600:.2f}') for c in every)])
  notes = ('', *(c.note for c in every))
  return '\n'.join(f'{line}  {note}'.rstrip()
                   for line, note in zip(lines, notes))
