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
  """Reads the outcomes of the runs of one phase of a study (such as tuning),
  and the reasons why other runs have no outcome.

  A run that diverged has an outcome. A run that failed for another reason has
  none, and the phase cannot decide without it.

  Args:
    frozen: the plan of the study.
    sweep: the runs as they lie in the folder of the phase.
    runs: the runs that the phase asked for.

  Returns:
    The outcomes in the order of `runs`, and a sentence for each run without an
    outcome.
  """
  points = {point.name: point for point in sweep.points}
  outcomes, failed = [], []
  for run in runs:
    point = points.get(run.point)
    if point is None or run.seed not in point.runs:
      failed.append(f'{run.point}, seed {run.seed}: it was not run')
      continue

    # A run without an outcome has not ended, or was not evaluated.
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
  """Collects from the files of a run what its phase of the study decides by:
  its values, whether it diverged, and what it cost.

  Args:
    frozen: the plan of the study.
    run: the run that the phase asked for.
    point: the point of the run (a variant at a size on a workload) on disk.
    result: the run on disk.
  """
  # A run also counts as diverged if it ended near the loss of guessing, because
  # it has learnt nothing. A run without a loss has an infinite one.
  planned_point = frozen.point_of_run(run)
  loss = result.final_loss
  if loss is None:
    loss = math.inf
  learnt = math.isfinite(loss) and loss <= GUESSING * planned_point['guess']
  diverged = result.has_ended_badly or not learnt

  # The values of its measures, and the scores of single items (documents,
  # questions). The phases noise and tune do not use the latter.
  values, scores = {}, {}
  keeps_items = run.phase not in ('noise', 'tune')
  for measure in frozen.plan.measures_of_workload(run.workload):
    values[measure.name] = _value(run, measure=measure, result=result,
                                  diverged=diverged)
    if keeps_items and measure.figure in result.items:
      scores[measure.name] = result.items[measure.figure]

  # The compute and the time up to its last step are the last entries of its
  # training curve.
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
  """Returns the value of a measure, such as the held-out loss, in a run. A run
  that diverged gets the value of guessing.

  Args:
    run: the run that the phase of the study asked for.
    measure: the measure.
    result: the run on disk, with the figures that it reported.
    diverged: whether it diverged.

  Raises:
    RequestError: if the run has not reported the measure.
  """
  # A run that diverged counts as one that guesses, whatever it reported.
  value = result.held_out.get(measure.figure)
  if diverged:
    value = measure.chance

  # A loss that is not finite is None, but such a run diverged. So a value that
  # is no number here was never measured.
  reported = ', '.join(result.held_out) or 'nothing'
  require(isinstance(value, int | float), f'measure {measure.name!r} is '
          f'{measure.figure!r}, which {run.point}, seed {run.seed}, has '
          f'not reported: it has {reported}')
  return float(value)
