"""What a study plans, what its runs give, and how both stand in its files.

WORKDIR/study.json is the frozen plan (frozen.py). WORKDIR/results.json is
everything that was found: see `RESULTS`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

PHASES = ('noise', 'tune', 'screen', 'confirm')
TEXT = 'text'  # the workload that every study has, and that comes first
AGAIN = 'base-again'  # the base with other first parameters, of `noise`
LOWER, HIGHER = 'lower', 'higher'  # which value of a measure is better


@dataclasses.dataclass(frozen=True)
class Measure:
  """A figure by which variants are compared.

  Attributes:
    name: what tables call it: 'loss', 'mqar'.
    workload: 'text' or a probe's name: which runs give it.
    figure: where it stands among a run's figures: 'loss', 'bits_per_byte',
      'probe/accuracy', TASK/FIGURE.
    better: LOWER or HIGHER.
    chance: what guessing gives, which a run that diverged counts as.
  """
  name: str
  workload: str
  figure: str
  better: str
  chance: float

  @property
  def sign(self) -> int:
    """What makes a difference positive where it is an improvement."""
    return 1 if self.better == HIGHER else -1


@dataclasses.dataclass(frozen=True)
class Seeds:
  """How many seeds each phase has; no two phases share one."""
  noise: int
  tune: int
  screen: int
  confirm: int

  APART = 10_000  # phase k has the seeds k * APART, k * APART + 1, ...

  def of(self, phase: str) -> tuple[int, ...]:
    first = PHASES.index(phase) * self.APART
    return tuple(range(first, first + getattr(self, phase)))


@dataclasses.dataclass(frozen=True)
class Tuning:
  """The search that each variant and the base get alike, by halving.

  Attributes:
    fields: the values that are tried, by config field, rising; every
      combination of them is a candidate.
    keep: the share of the candidates that survives a rung.
    rungs: rung r trains train.steps * keep ** (rungs - 1 - r) steps, each with
      a whole schedule of its own.
    extend: how often an optimum at the edge of a field's values may move that
      edge one value out; after that it is marked as at the edge.
  """
  fields: Mapping[str, tuple]
  keep: float = 0.5
  rungs: int = 2
  extend: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is asked, and all that decides on the answer.

  Attributes:
    base: the name of the variant that the others are compared with.
    variants: the others.
    sizes: smallest first.
    workloads: 'text' first, then probes.
    measures: the first is the primary one, which the verdict is on.
    effect: the smallest improvement of the primary measure that is wanted.
    alpha: family-wise error of the confirmation (Holm).
    q: false discovery rate of the screening (Benjamini-Hochberg).
    power: with which `effect` is to be found.
    unstable: the largest share of a variant's runs that may diverge.
    match: the figure of a point that is made equal at each size; '': none.
    match_field: the field that is solved for it.
    tuned_sizes: those that are tuned; the others take the values of the
      smallest one. With muP the smallest alone, else all.
  """
  name: str
  question: str
  file: str
  base: str
  variants: tuple[str, ...]
  sizes: tuple[str, ...]
  workloads: tuple[str, ...]
  measures: tuple[Measure, ...]
  seeds: Seeds
  tuning: Tuning
  effect: float
  alpha: float = 0.05
  q: float = 0.05
  power: float = 0.8
  unstable: float = 0.1
  match: str = ''
  match_field: str = ''
  tuned_sizes: tuple[str, ...] = ()

  @property
  def primary(self) -> Measure:
    return self.measures[0]

  def of_workload(self, workload: str) -> tuple[Measure, ...]:
    return tuple(m for m in self.measures if m.workload == workload)


class Outcome(NamedTuple):
  """What one run gave.

  Attributes:
    phase: of PHASES.
    variant: of the plan, its base, or AGAIN.
    values: by the measures' names; `chance` where the run diverged.
    diverged: whether its loss was not finite, ended well above guessing, or
      the run ended after too many bad steps.
    flops, seconds: of its training steps; seconds are NaN where not known.
    changes: what differs from the study's base config, tuned values too.
    loss: held out, of its workload, after the last step; infinite where it is
      not finite.
    curve: of held-out loss: lists by 'step', 'tokens', 'flops', 'seconds',
      'loss', and 'warm': whether the learning rate had reached its height, from
      where on a law is fitted; {} where it is not kept (any phase but
      `confirm`).
  """
  phase: str
  variant: str
  size: str
  workload: str
  seed: int
  values: dict[str, float]
  diverged: bool
  flops: float
  seconds: float
  params: int
  changes: dict
  loss: float = float('nan')
  curve: dict = {}


@dataclasses.dataclass(frozen=True)
class Tuned:
  """What tuning found for one variant at one size on one workload.

  Attributes:
    changes: the values chosen, by field.
    at_edge: of these fields, those whose optimum is still at the edge of what
      was tried.
    runs, flops, seconds: what it took.
    tried: of each candidate of each rung {'rung', 'steps', 'changes', 'value',
      'loss', 'diverged'}: means over the seeds of tuning, of the workload's
      first measure and of the held-out loss.
  """
  variant: str
  size: str
  workload: str
  changes: dict
  at_edge: tuple[str, ...]
  runs: int
  flops: float
  seconds: float
  tried: tuple[dict, ...]


# What results.json holds, by key:
#   study       name, hash of the plan that it is of
#   outcomes    Outcome of every run that is done, as objects
#   noise       decide.noise's
#   announced   decide.announce's; null where noise is not over
#   tuned       Tuned, of each variant, size and workload
#   screen      decide.screen's
#   confirm     decide.confirm's
#   phases      by phase: {'planned': runs, 'done': runs, 'failed': runs,
#               'tokens', 'flops', 'seconds', 'wall_seconds', 'finished': bool}
#   as_planned  {'same': bool, 'differences': [sentences]}
#   provenance  {'codes': [...], 'devices': [...], 'versions': {...}}
# Lists are empty where a phase has not been decided yet.
RESULTS = ('study', 'outcomes', 'noise', 'announced', 'tuned', 'screen',
           'confirm', 'phases', 'as_planned', 'provenance')


def to_json(value: Any) -> Any:
  """Returns dataclasses and Outcomes as plain dicts and lists; figures that
  are not finite as null."""
  if dataclasses.is_dataclass(value):
    return {field.name: to_json(getattr(value, field.name))
            for field in dataclasses.fields(value)}
  if hasattr(value, '_asdict'):
    return to_json(value._asdict())
  if isinstance(value, Mapping):
    return {str(key): to_json(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [to_json(item) for item in value]
  if isinstance(value, float) and not abs(value) < float('inf'):
    return None
  return value


def plan_from_json(tree: Mapping[str, Any]) -> Plan:
  """Returns the plan that `to_json` wrote."""
  tuning = dict(tree['tuning'])
  tuning['fields'] = {name: _tuples(values)
                      for name, values in tuning['fields'].items()}
  own = {field.name for field in dataclasses.fields(Plan)}
  flat = {name: _tuples(value) for name, value in tree.items() if name in own}
  return Plan(**flat | dict(
      measures=tuple(Measure(**row) for row in tree['measures']),
      seeds=Seeds(**tree['seeds']), tuning=Tuning(**tuning)))


def outcome_from_json(tree: Mapping[str, Any]) -> Outcome:
  """Returns the outcome that `to_json` wrote."""
  flat = {name: tree[name] for name in Outcome._fields}
  for name, missing in (('seconds', float('nan')), ('loss', float('inf'))):
    if flat[name] is None:
      flat[name] = missing
  return Outcome(**flat)


def _tuples(value):
  return (tuple(map(_tuples, value)) if isinstance(value, Sequence)
          and not isinstance(value, str) else value)
