"""What each phase of a study costs, before it runs: runs, tokens, FLOPs, and
hours where the time of a step is known."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tools.compare import layout, phases, results
from tools.compare import plan as plans

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


def of(frozen: plans.Frozen, group: int, times: Times | None
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
  alike: dict[tuple, int] = {}
  for run in runs:
    row = frozen.point_of(run)
    steps = frozen.steps(run.changes)
    part = steps / frozen.steps(row['changes'])
    tokens += row['tokens'] * part
    flops += row['tokens'] * part * row['flops_per_token']
    key = tuple(sorted((name, repr(value)) for name, value in
                       run.changes.items() if name not in vectorised.FIELDS))
    alike[key] = alike.get(key, 0) + 1
    if times:
      seconds += steps * times[run.size, run.workload]
  programs = sum(-(-n // group) for n in alike.values())
  return Cost(phase.name, len(runs), programs, tokens, flops,
              seconds if times else None, phase.note(frozen.plan))


def known(workdir, frozen: plans.Frozen) -> Times | None:
  """Returns what the runs in a study's folder took; None where a size on a
  workload has none yet with a known time. What an earlier plan had and this one
  has not is left out."""
  plan = frozen.plan
  variants = (plan.base, plans.AGAIN, *plan.variants)
  wanted = [(size, workload) for size in plan.every_size
            for workload in plan.workloads]
  steps, seconds = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0.0)
  for x in map(plans.outcome_from_json, results.load(workdir)['outcomes']):
    key = x.size, x.workload
    if (x.seconds == x.seconds and not x.diverged and x.variant in variants
        and key in steps):
      steps[key] += frozen.steps(x.changes)
      seconds[key] += x.seconds
  return {key: seconds[key] / steps[key] for key in wanted} if all(
      steps.values()) else None


def table(costs: Sequence[Cost], parallel: int) -> str:
  """Renders costs for a terminal: a row for each phase, and all of them."""
  sums = (None if None in column else sum(column)
          for column in list(zip(*costs))[1:6])
  every = [*costs, Cost('in all', *sums)]
  lines = layout.columns([
      ('phase', 'runs', 'programs', 'tokens', 'FLOPs', 'hours'),
      *((c.phase, f'{c.runs:,}', f'{c.programs:,}', f'{c.tokens:,.0f}',
         f'{c.flops:.3g}', 'unknown' if c.seconds is None
         else f'{c.seconds / parallel / 3600:.2f}') for c in every)])
  notes = ('', *(c.note for c in every))
  return '\n'.join(f'{line}  {note}'.rstrip()
                   for line, note in zip(lines, notes))
