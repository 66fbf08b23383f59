"""tune: the same search for each variant and the base, by successive halving.

Rung by rung the candidates train longer and the better share of them survives
(Jamieson and Talwalkar 2016). Then an optimum at the edge of what was tried
moves that edge, at most `extend` times. What a search does next follows from
the outcomes alone, so that a study which is resumed, or run by two at once,
searches in the same way.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any

from tools.compare import plan as plans

Changes = dict[str, Any]


@dataclasses.dataclass
class Search:
  """The search of one variant at one size on one workload.

  Attributes:
    plan: the study's.
    variant, size, workload: whose it is.
    rung: of the candidates; from plan.tuning.rungs on, the edge is moved.
    candidates: that are trained next; () where the search is over.
    best: the best of the last rung, once that is done.
    tried: of each candidate of each rung, as plans.Tuned has it.
  """
  plan: plans.Plan
  variant: str
  size: str
  workload: str
  rung: int = 0
  candidates: tuple[Changes, ...] = ()
  best: dict | None = None
  tried: list[dict] = dataclasses.field(default_factory=list)
  runs: int = 0
  flops: float = 0.0
  seconds: float = 0.0

  def __post_init__(self):
    fields = self.plan.tuning.fields
    self.candidates = tuple(dict(zip(fields, values)) for values in
                            itertools.product(*fields.values()))

  @property
  def name(self) -> tuple[str, str, str]:
    return self.variant, self.size, self.workload

  @property
  def share(self) -> float:
    """Of train.steps, what the candidates train."""
    return share(self.plan.tuning, self.rung)

  def take(self, steps: int, outcomes: Sequence[Sequence[plans.Outcome]]
           ) -> None:
    """Takes the outcomes of each candidate, and decides what comes next.

    Args:
      steps: that the candidates trained.
      outcomes: of each candidate, over the seeds of tuning.
    """
    rows = [self._row(steps, changes, own) for changes, own in zip(
        self.candidates, outcomes, strict=True)]
    self.tried += rows
    every = [x for own in outcomes for x in own]
    self.runs += len(every)
    self.flops += sum(x.flops for x in every)
    self.seconds += sum(x.seconds for x in every)
    tuning = self.plan.tuning
    self.rung += 1
    ranked = sorted(rows, key=self._worse)
    if self.rung < tuning.rungs:
      self.candidates = tuple(
          row['changes'] for row in ranked[:kept(tuning, len(ranked))])
      return
    self.best = min([*filter(None, [self.best]), *ranked], key=self._worse)
    moved = self.rung - tuning.rungs
    further = [self._one_out(field) for field in self.at_edge]
    self.candidates = () if moved == tuning.extend else tuple(
        changes for changes in further if changes != self.best['changes'])

  def _row(self, steps: int, changes: Changes, own: Sequence[plans.Outcome]
           ) -> dict:
    measure = self.plan.of_workload(self.workload)[0]
    mean = lambda values: sum(values) / len(own)
    return {'rung': self.rung, 'steps': steps, 'changes': changes,
            'value': mean([x.values[measure.name] for x in own]),
            'loss': mean([x.loss for x in own]),
            'diverged': any(x.diverged for x in own)}

  def _worse(self, row: Mapping) -> tuple:
    """What is larger for a worse candidate: of two with one value, as at what
    guessing gives, the one with the larger loss."""
    measure = self.plan.of_workload(self.workload)[0]
    return row['diverged'], -measure.sign * row['value'], row['loss']

  def _values(self, field: str) -> list:
    """The values of a field that were tried, rising."""
    return sorted({row['changes'][field] for row in self.tried})

  @property
  def at_edge(self) -> tuple[str, ...]:
    """The fields whose best value is the first or the last that was tried."""
    found = []
    for field in self.plan.tuning.fields:
      values, best = self._values(field), self.best['changes'][field]
      if best in (values[0], values[-1]):
        found.append(field)
    return tuple(found)

  def _one_out(self, field: str) -> Changes:
    """Returns the best candidate with a field one value further out; the best
    itself where there is none."""
    values, best = self._values(field), self.best['changes'][field]
    edge, inner = ((values[0], values[1]) if best == values[0]
                   else (values[-1], values[-2]))
    return {**self.best['changes'], field: further_out(edge, inner)}

  def found(self) -> plans.Tuned:
    return plans.Tuned(
        *self.name, dict(self.best['changes']), self.at_edge, self.runs,
        self.flops, self.seconds, tuple(self.tried))


def further_out(edge: float, inner: float) -> float:
  """Returns the value beyond an edge, as many times as far from it as the edge
  is from the value within; of whole numbers the edge, where none is left."""
  out = edge * edge / inner
  if not isinstance(edge, int):
    return float(f'{out:.6g}')
  out = max(round(out), 1)
  return edge + 1 if out == edge > inner else out


def corners(tuning: plans.Tuning, moved: int = 0) -> list[Changes]:
  """Returns the least values of all fields, and the largest ones, where each
  edge was moved so often."""
  found: list[Changes] = [{}, {}]
  for name, values in tuning.fields.items():
    for own, (edge, inner) in zip(found, (values[:2], values[:-3:-1])):
      for _ in range(moved):
        edge, inner = further_out(edge, inner), edge
      own[name] = edge
  return found


def kept(tuning: plans.Tuning, candidates: int) -> int:
  """How many of a rung's candidates survive it."""
  return max(1, math.ceil(tuning.keep * candidates))


def share(tuning: plans.Tuning, rung: int) -> float:
  """Of train.steps, what a candidate of a rung trains."""
  return tuning.keep ** max(tuning.rungs - 1 - rung, 0)


def searches(plan: plans.Plan) -> list[Search]:
  """Returns the searches of a study, before their first rung."""
  return [Search(plan, variant, size, workload)
          for size in plan.tuned_sizes for workload in plan.workloads
          for variant in (plan.base, *plan.variants)]


def chosen(plan: plans.Plan, tuned: Sequence[plans.Tuned], variant: str,
           size: str, workload: str) -> Changes:
  """Returns the tuned values of a variant: of a size that was not tuned, those
  of the smallest."""
  size = size if size in plan.tuned_sizes else plan.tuned_sizes[0]
  return next(row.changes for row in tuned if (
      row.variant, row.size, row.workload) == (variant, size, workload))


def kind(tuning: plans.Tuning) -> str:
  """How candidates are searched: 'grid search'."""
  if tuning.rungs == 1:
    return 'grid search'
  return (f'successive halving over {tuning.rungs} rungs, each of which keeps '
          f'{100 * tuning.keep:.0f} %')


def edges(tuning: plans.Tuning) -> str:
  """What becomes of an optimum at the edge of the values."""
  if not tuning.extend:
    return 'edges not extended'
  times = 'once' if tuning.extend == 1 else f'{tuning.extend} times'
  return f'edges extended at most {times}'
