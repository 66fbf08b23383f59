"""What each phase of a study costs, before it runs: runs, tokens, FLOPs, and
hours where the time of a step is known."""

from collections.abc import Mapping, Sequence
import dataclasses
import statistics
from typing import NamedTuple

from tools.compare import layout, phases, results
from tools.compare import plan as plans
from tools.compare import ledger as ledger_lib


@dataclasses.dataclass(frozen=True)
class Times:
  """What was measured on this machine, of runs that train as the study's do.

  Attributes:
    step: seconds of a step of one run, by size and workload; of runs that
      train as one program, a run's share.
    program: seconds that a program takes beside its steps: to start, compile,
      evaluate and save.
  """
  step: Mapping[tuple[str, str], float]
  program: float


class Cost(NamedTuple):
  """What a phase takes; `seconds` of one process, None where not known."""
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
  plan = frozen.plan
  names = (plan.base, *plan.variants)
  untuned = [plans.Tuned(*search.name, dict(search.candidates[0]), (), 0, 0.0,
                         0.0, ()) for search in phases.searches(plan)]
  asked = {
      'noise': phases.noise_runs(frozen), 'tune': _tuned_runs(frozen),
      'screen': phases.full_runs(frozen, untuned, 'screen', names,
                                 plan.sizes[:1]),
      'confirm': phases.full_runs(frozen, untuned, 'confirm', names,
                                  plan.sizes)}
  notes = {'tune': f'and at most {_extended(plan)} more runs, where an optimum '
                   'is at an edge' if plan.tuning.extend else '',
           'confirm': 'if every variant passes the screening'}
  return [_cost(frozen, phase, runs, group, times, notes.get(phase, ''))
          for phase, runs in asked.items()]


def _tuned_runs(frozen: plans.Frozen) -> list[phases.Run]:
  """The runs of all rungs: which candidates survive does not matter here."""
  found = []
  for search in phases.searches(frozen.plan):
    for rung in range(frozen.plan.tuning.rungs):
      search.rung = rung
      found += [run for own in phases.tune_runs(frozen, search) for run in own]
      search.candidates = search.candidates[:phases.kept(
          frozen.plan.tuning, len(search.candidates))]
  return found


def _extended(plan: plans.Plan) -> int:
  return (plan.tuning.extend * len(plan.tuning.fields) * plan.seeds.tune
          * len(phases.searches(plan)))


def _cost(frozen, phase: str, runs: Sequence[phases.Run], group: int,
          times: Times | None, note: str) -> Cost:
  from training import vectorised
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
      seconds += steps * times.step[run.size, run.workload]
  programs = sum(-(-n // group) for n in alike.values())
  return Cost(phase, len(runs), programs, tokens, flops,
              seconds + programs * times.program if times else None, note)


def times(workdir, frozen: plans.Frozen,
          outcomes: Sequence[plans.Outcome]) -> Times | None:
  """Returns what finished runs of a folder took; None where a size on a
  workload has no run with a known time."""
  plan = frozen.plan
  steps: dict[tuple, float] = {}
  spent: dict[tuple, float] = {}
  for x in outcomes:
    if x.seconds == x.seconds and not x.diverged:
      key = x.size, x.workload
      row = frozen.point_of(x)
      taken = (x.flops / row['flops_per_token'] / row['tokens']
               * frozen.steps(row['changes']))
      steps[key] = steps.get(key, 0.0) + taken
      spent[key] = spent.get(key, 0.0) + x.seconds
  wanted = {(size, workload) for size in plan.sizes
            for workload in plan.workloads}
  if not wanted <= steps.keys():
    return None
  return Times({key: spent[key] / steps[key] for key in wanted},
               _beside_steps(workdir, outcomes))


def known(workdir, frozen: plans.Frozen) -> Times | None:
  """Returns what the runs in a study's folder took; None where there are not
  enough of them yet. What an earlier plan had and this one has not is left
  out."""
  planned = {(row['variant'], row['size'], row['workload'])
             for row in frozen.points}
  planned |= {(plans.AGAIN, *rest) for _, *rest in planned}
  return times(workdir, frozen, [
      x for x in results.outcomes(workdir)
      if (x.variant, x.size, x.workload) in planned])


def _beside_steps(workdir, outcomes) -> float:
  """Returns the median over programs of what they take beside their steps."""
  own: dict[tuple, list[float]] = {}
  for x in outcomes:
    own.setdefault((x.variant, x.size, x.workload, x.seed), []).append(
        x.seconds)
  programs: dict[tuple, float] = {}
  for folder in results.folders(workdir):
    rows = {row['name']: row for row in results.points(folder)}
    with ledger_lib.Ledger(folder) as ledger:
      for run in ledger.runs(ledger_lib.DONE):
        row = rows[run.point]
        taken = own.get((row['variant'], row['size'], row['workload'],
                         run.seed), ())
        if run.started and run.ended and len(taken) == 1:
          # Runs of one program are claimed at once, and end together.
          program = folder.name, run.started
          programs.setdefault(program, run.ended - run.started)
          programs[program] -= taken[0]
  return max(statistics.median(programs.values()), 0.0) if programs else 0.0


def table(costs: Sequence[Cost], parallel: int) -> str:
  """Renders costs for a terminal: a row for each phase, and all of them."""
  total = Cost('in all', sum(c.runs for c in costs),
               sum(c.programs for c in costs), sum(c.tokens for c in costs),
               sum(c.flops for c in costs), None if None in [
                   c.seconds for c in costs] else sum(
                       c.seconds for c in costs))
  lines = layout.columns([
      ('phase', 'runs', 'programs', 'tokens', 'FLOPs', 'hours'),
      *((c.phase, f'{c.runs:,}', f'{c.programs:,}', f'{c.tokens:,.0f}',
         f'{c.flops:.3g}', hours(c, parallel)) for c in (*costs, total))])
  notes = ('', *(c.note for c in (*costs, total)))
  return '\n'.join(f'{line}  {note}'.rstrip()
                   for line, note in zip(lines, notes))


def hours(cost: Cost, parallel: int) -> str:
  return ('unknown' if cost.seconds is None
          else f'{cost.seconds / parallel / 3600:.2f}')
