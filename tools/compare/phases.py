"""The phases of a study, each from the outcomes of those before.

noise -> tune -> screen -> confirm. A phase asks a trainer for runs, gets their
outcomes, and decides. A trainer is an object with

    train(folder, runs) -> [Outcome of each run]

such as study.Trainer, which returns what it has at once where runs are done
already: so a study that is started again walks through its phases until there
is something left to do.

Tuning is the same search for each variant and the base, by successive halving:
rung by rung the candidates train longer and the better share of them survives
(Jamieson and Talwalkar 2016). Then an optimum at the edge of what was tried
moves that edge, at most `extend` times. What a search does next follows from
the outcomes alone, so that a study which is resumed, or run by two at once,
searches in the same way.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any, NamedTuple

from configs.errors import RequestError
from tools.compare import decide
from tools.compare import plan as plans
from training.objectives import pipeline
from training.workdir import run_config

Changes = dict[str, Any]


class Run(NamedTuple):
  """A run that a phase asks for.

  Attributes:
    phase, variant, size, workload, seed: as in an Outcome.
    point: the name of its point in the sweep of its folder.
    changes: of the study's base config, but for the seed.
    share: of the steps that a run of its size and workload takes.
  """
  phase: str
  variant: str
  size: str
  workload: str
  seed: int
  point: str
  changes: Changes
  share: float = 1.0


@dataclasses.dataclass
class Found:
  """What a study has found so far; see plan.py."""
  outcomes: list[plans.Outcome] = dataclasses.field(default_factory=list)
  noise: list[decide.Noise] = dataclasses.field(default_factory=list)
  announced: decide.Announced | None = None
  tuned: list[plans.Tuned] = dataclasses.field(default_factory=list)
  screen: list[decide.Verdict] = dataclasses.field(default_factory=list)
  confirm: list[decide.Verdict] = dataclasses.field(default_factory=list)
  finished: list[str] = dataclasses.field(default_factory=list)


class TooWeak(RequestError):
  """The study cannot find the effect that it is after."""


def run(frozen: plans.Frozen, trainer: Any, until: str = 'confirm',
        anyway: bool = False,
        after: Callable[[Found], None] = lambda found: None) -> Found:
  """Goes through the phases.

  Args:
    frozen: the plan.
    trainer: of the runs.
    until: the last phase.
    anyway: whether to go on where the noise is too large for the effect.
    after: called with all that is found, after each phase.

  Raises:
    TooWeak: after `noise`, unless `anyway`.
  """
  found, plan = Found(), frozen.plan
  for phase in plans.PHASES[:plans.PHASES.index(until) + 1]:
    if phase == 'noise':
      found.outcomes += trainer.train(phase, noise_runs(frozen))
      found.noise = decide.noise(plan, found.outcomes)
      found.announced = decide.announce(plan, found.noise)
    elif phase == 'tune':
      found.tuned = _tune(frozen, trainer, found)
    elif phase == 'screen':
      found.outcomes += trainer.train(phase, full_runs(
          frozen, found.tuned, phase, (plan.base, *plan.variants),
          plan.sizes[:1]))
      found.screen = decide.screen(plan, found.outcomes)
    else:
      passed = [row.variant for row in found.screen
                if row.verdict == decide.PASSED]
      if passed:
        found.outcomes += trainer.train(phase, full_runs(
            frozen, found.tuned, phase, (plan.base, *passed), plan.sizes))
      found.confirm = decide.confirm(plan, found.outcomes)
    found.finished.append(phase)
    after(found)
    if phase == 'noise' and not found.announced.enough and not anyway:
      raise TooWeak(found.announced.sentence.rstrip('.') + ': take more seeds, '
                    'a larger EFFECT, or --anyway')
  return found


def _tune(frozen: plans.Frozen, trainer: Any, found: Found
          ) -> list[plans.Tuned]:
  each = searches(frozen.plan)
  for rung in itertools.count(1):
    going = [search for search in each if search.candidates]
    if not going:
      return [search.found() for search in each]
    asked = [tune_runs(frozen, search) for search in going]
    outcomes = trainer.train(f'tune-{rung}', [
        run for own in asked for candidate in own for run in candidate])
    found.outcomes += outcomes
    given = iter(outcomes)
    for search, own in zip(going, asked):
      search.take(frozen.steps(own[0][0].changes),
                  [[next(given) for _ in candidate] for candidate in own])


def noise_runs(frozen: plans.Frozen) -> list[Run]:
  """The base, and the base with other first parameters."""
  plan = frozen.plan
  return [_run(frozen, 'noise', variant, size, workload, seed, apart)
          for size in plan.sizes for workload in plan.workloads
          for variant, apart in ((plan.base, {}), (plans.AGAIN,
                                                   {'init_seed': 1}))
          for seed in plan.seeds.of('noise')]


def tune_runs(frozen: plans.Frozen, search: 'Search') -> list[list[Run]]:
  """The runs of each candidate of a search, over the seeds of tuning."""
  return [[_run(frozen, 'tune', *search.name, seed, changes, search.share)
           for seed in frozen.plan.seeds.of('tune')]
          for changes in search.candidates]


def full_runs(frozen: plans.Frozen, tuned: Sequence[plans.Tuned],
              phase: str, variants: Iterable[str], sizes: Iterable[str]
              ) -> list[Run]:
  """The runs of `screen` or `confirm`, with the values that were tuned: of a
  size that was not tuned, those of the smallest. The primary measure decides on
  the screening, so that has its workload alone."""
  plan, variants = frozen.plan, tuple(variants)
  best = {(row.variant, row.size, row.workload): row.changes for row in tuned}
  workloads = (plan.workloads if phase == 'confirm'
               else (plan.primary.workload,))
  return [_run(frozen, phase, variant, size, workload, seed, best[
      variant, size if size in plan.tuned_sizes else plan.tuned_sizes[0],
      workload])
          for size in sizes for workload in workloads
          for variant in variants for seed in plan.seeds.of(phase)]


def _run(frozen: plans.Frozen, phase: str, variant: str, size: str,
         workload: str, seed: int, more: dict, share: float = 1.0) -> Run:
  """Returns a run of a point of the plan, with `more` changes."""
  row = frozen.point(frozen.plan.base if variant == plans.AGAIN else variant,
                     size, workload)
  changes = {**row['changes'], **more,
             'eval.part': 'first' if phase == 'tune' else 'second'}
  if share < 1:
    shorten(changes, frozen.base_config, share)
  if phase != 'confirm':  # whose curves are drawn
    changes['eval.every_steps'] = frozen.steps(changes)
  name = f'{workload}.{size}.{variant}'
  if phase == 'tune':
    name += ''.join(f'.{field.rpartition(".")[2]}={value:g}'
                    for field, value in more.items())
  return Run(phase, variant, size, workload, seed, name, changes, share)


def shorten(changes: dict, base: dict, share: float) -> None:
  """Makes a run a share as long, with a whole schedule of its own."""
  before = run_config.flatten_dict(base) | changes
  steps = before['train.steps']
  changes['train.steps'] = short = max(round(steps * share), 1)
  for field in ('optim.warmup_steps', 'optim.decay_steps'):
    changes[field] = min(round(before[field] * short / steps), short)
  for field in ('checkpoint.every_steps', 'log.every_steps'):
    changes[field] = min(before[field], short)
  if stages := before['data.batch_ramp']:
    changes['data.batch_ramp'] = pipeline.scaled_ramp(stages, steps, short)


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
    runs: how many were trained.
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
    measure = self.plan.of_workload(self.workload)[0]
    mean = lambda values: sum(values) / len(values)
    rows = [{'rung': self.rung, 'steps': steps, 'changes': changes,
             'value': mean([x.values[measure.name] for x in own]),
             'loss': mean([x.loss for x in own]),
             'diverged': any(x.diverged for x in own)}
            for changes, own in zip(self.candidates, outcomes, strict=True)]
    self.tried += rows
    self.runs += sum(map(len, outcomes))
    tuning = self.plan.tuning
    self.rung += 1

    def worse(row: Mapping) -> tuple:
      """What is larger for a worse candidate: of two with one value, as at what
      guessing gives, the one with the larger loss."""
      return row['diverged'], -measure.sign * row['value'], row['loss']

    ranked = sorted(rows, key=worse)
    if self.rung < tuning.rungs:
      self.candidates = tuple(
          row['changes'] for row in ranked[:kept(tuning, len(ranked))])
      return
    self.best = min([*filter(None, [self.best]), *ranked], key=worse)
    self.candidates = ()
    if self.rung - tuning.rungs < tuning.extend:
      best = self.best['changes']
      further = [{**best, field: further_out(*self._edge(field))}
                 for field in self.at_edge]
      self.candidates = tuple(own for own in further if own != best)

  def _edge(self, field: str) -> tuple[float, float]:
    """The edge of the values of a field that were tried which is nearer to the
    best, and the value within."""
    values = sorted({row['changes'][field] for row in self.tried})
    return (values[0], values[1]) if (
        self.best['changes'][field] == values[0]) else (values[-1], values[-2])

  @property
  def at_edge(self) -> tuple[str, ...]:
    """The fields whose best value is the first or the last that was tried."""
    return tuple(field for field in self.plan.tuning.fields
                 if self.best['changes'][field] == self._edge(field)[0])

  def found(self) -> plans.Tuned:
    return plans.Tuned(
        *self.name, dict(self.best['changes']), self.at_edge, self.runs,
        tuple(self.tried))


def further_out(edge: float, inner: float) -> float:
  """Returns the value beyond an edge, as many times as far from it as the edge
  is from the value within; of whole numbers the edge, where none is left."""
  out = edge * edge / inner
  if not isinstance(edge, int):
    return float(f'{out:.6g}')
  out = max(round(out), 1)
  return edge + 1 if out == edge > inner else out


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
