"""outcomes: reads what the runs of a phase of a study gave, as they lie on
disk, for the study that trained them and for whoever computes its verdicts
anew."""

from collections.abc import Sequence
import math

from common.errors import require
from tools.compare import curves, layout, phases
from tools.compare import plan as plans

# Times the loss of guessing, above which a run counts as diverged: one that
# has learnt nothing ends near it.
GUESSING = 1.2


def read_outcomes(frozen: plans.FrozenPlan, sweep: curves.Sweep,
                  runs: Sequence[phases.Run]
                  ) -> tuple[list[plans.Outcome], list[str]]:
  """Returns the outcome of each run that has one, and why the others have none.

  A run that diverged is an outcome. One that failed otherwise is none, and its
  phase cannot decide without it.

  Args:
    frozen: the plan of the study.
    sweep: the sweep of the folder of the phase, as it lies on disk.
    runs: the runs as the phase asked for them.

  Returns:
    The outcomes in the order of the runs, and a sentence for each run that has
    none.
  """
  points = {point.name: point for point in sweep.points}
  outcomes, failed = [], []
  for run in runs:
    point = points.get(run.point)
    if point is None or run.seed not in point.runs:
      failed.append(f'{run.point}, seed {run.seed}: it was not run')
      continue
    result = point.runs[run.seed]
    if result.state in (layout.PENDING, layout.RUNNING):
      failed.append(f'{run.point}, seed {run.seed}: it has not ended')
      continue
    is_evaluated = bool(result.held_out) and result.state != layout.FAILED
    if is_evaluated or result.has_ended_badly:
      outcomes.append(_outcome(frozen, run=run, point=point, result=result))
    else:
      why = result.error or 'it was not evaluated after its last step'
      failed.append(f'{run.point}, seed {run.seed}: {why}')
  return outcomes, failed


def _outcome(frozen: plans.FrozenPlan, run: phases.Run, point: curves.Point,
             result: curves.Run) -> plans.Outcome:
  """Returns the outcome of a run, by which its phase decides.

  Args:
    frozen: the plan of the study.
    run: the run as its phase asked for it.
    point: its point (a variant at a size on a workload), as it lies on disk.
    result: its result, as it lies on disk.
  """
  # A run also counts as diverged where it ended near the loss of guessing: it
  # has learnt nothing. A run without a loss has an infinite one.
  planned_point = frozen.point_of_run(run)
  loss = result.final_loss
  if loss is None:
    loss = math.inf
  learnt = math.isfinite(loss) and loss <= GUESSING * planned_point['guess']
  diverged = result.has_ended_badly or not learnt

  # The figures of the run, and the scores of single items (documents,
  # questions), which no verdict of the phases noise and tune is on.
  values, scores = {}, {}
  keeps_items = run.phase not in ('noise', 'tune')
  for measure in frozen.plan.measures_of_workload(run.workload):
    values[measure.name] = _value(run, measure=measure, result=result,
                                  diverged=diverged)
    if keeps_items and measure.figure in result.items:
      scores[measure.name] = result.items[measure.figure]

  # The compute and the time up to its last step, which end the curve of
  # training.
  spent = {'flops': 0.0, 'seconds': math.nan}
  for name, column in point.curve(run.seed, 'train').items():
    spent[name] = column[-1]
  curve = {}
  if run.phase in plans.PHASES_WITH_CURVES:
    curve = point.curve(run.seed)
  return plans.Outcome(
      phase=run.phase, variant=run.variant, size=run.size,
      workload=run.workload, seed=run.seed, values=values, diverged=diverged,
      flops=spent['flops'], seconds=spent['seconds'], params=point.params,
      changes=dict(run.changes), loss=loss, curve=curve, items=scores,
      cooled=curves.ends_cooled_down(result.config),
      body=planned_point.get('body'),
      shares_clock=result.shares_clock)


def _value(run: phases.Run, measure: plans.Measure, result: curves.Run,
           diverged: bool) -> float:
  """Returns the value of a measure of a run; that of guessing where the run
  diverged.

  Args:
    run: the run as its phase asked for it.
    measure: the measure.
    result: its result, as it lies on disk.
    diverged: whether it diverged.

  Raises:
    RequestError: where the run has not reported it.
  """
  # A run that diverged counts as one that guesses, whatever it reported.
  value = result.held_out.get(measure.figure)
  if diverged:
    value = measure.chance
  # A loss that is not finite is None, but such a run diverged. So what is no
  # number here was never measured, and nothing is known in its place.
  reported = ', '.join(result.held_out) or 'nothing'
  require(isinstance(value, int | float), f'measure {measure.name!r} is '
          f'{measure.figure!r}, which {run.point}, seed {run.seed}, has '
          f'not reported: it has {reported}')
  return float(value)
