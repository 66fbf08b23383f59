"""A study's two files as the report reads them, checked."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any, NamedTuple

from configs.errors import one_of, require, short
from tools.compare import findings
from tools.compare import frozen as frozen_lib
from tools.compare import plan as plans
from tools.compare import shapes
from training import schema

_PHASE = {'planned': int, 'done': int, 'failed': int, 'tokens': schema.MAYBE,
          'flops': schema.MAYBE, 'seconds': schema.MAYBE,
          'wall_seconds': schema.MAYBE, 'finished': bool}
_SHAPE = {
    'study': {'name': str, 'hash': str},
    'outcomes': [shapes.of(plans.Outcome)],
    'noise': [shapes.of(findings.Noise)],
    'announced': schema.Maybe(shapes.of(findings.Announced)),
    'tuned': [shapes.of(plans.Tuned)], 'screen': [shapes.of(findings.Screened)],
    'confirm': [shapes.of(findings.Verdict)], 'phases': schema.Each(_PHASE),
    'as_planned': {'same': bool, 'differences': [str]},
    'provenance': {'codes': [str], 'devices': [str],
                   'versions': schema.Each(str)}}
_TRIED = {'rung': int, 'steps': int, 'changes': {}, 'value': schema.MAYBE,
          'loss': schema.MAYBE, 'diverged': (bool, int)}
# What a study that was frozen and no more has found.
_NOTHING = {'outcomes': [], 'noise': [], 'announced': None, 'tuned': [],
            'screen': [], 'confirm': [], 'phases': {},
            'as_planned': {'same': True, 'differences': []},
            'provenance': {'codes': [], 'devices': [], 'versions': {}}}


class Record(NamedTuple):
  """What a study planned and found.

  Attributes:
    frozen: study.json.
    said: the hash that study.json says it has.
    results: results.json, as _SHAPE has it.
    outcomes: of it, the runs.
  """
  frozen: frozen_lib.Frozen
  said: str
  results: Mapping[str, Any]
  outcomes: Sequence[plans.Outcome]

  @property
  def plan(self) -> plans.Plan:
    return self.frozen.plan

  @property
  def variants(self) -> tuple[str, ...]:
    """The base first."""
    return (self.plan.base, *self.plan.variants)

  @property
  def finished(self) -> tuple[str, ...]:
    """The phases that are over."""
    phases = self.results['phases']
    return tuple(name for name in plans.PHASES
                 if name in phases and phases[name]['finished'])

  def verdict(self, variant: str, measure: str = ''
              ) -> Mapping[str, Any] | None:
    """What the confirmation says of a measure, if '' the primary one; None of
    what it has not compared."""
    measure = measure or self.plan.primary.name
    return next((row for row in self.results['confirm'] if (
        row['variant'], row['measure']) == (variant, measure)), None)

  def screened(self, variant: str) -> Mapping[str, Any] | None:
    """What the screen says of the primary measure."""
    return next((row for row in self.results['screen'] if (
        row['variant'], row['measure']) == (
            variant, self.plan.primary.name)), None)

  def runs(self, phase: str, variant: str, size: str = '', workload: str = ''
           ) -> list[plans.Outcome]:
    """The runs of a phase that are done; of any size and workload, if ''."""
    return [run for run in self.outcomes
            if (run.phase, run.variant) == (phase, variant)
            and size in ('', run.size) and workload in ('', run.workload)]


def load(workdir) -> Record:
  """Returns what lies in a study's folder.

  Raises:
    RequestError: where no study was planned there, or a file is damaged.
  """
  folder = pathlib.Path(workdir)
  plan, found = folder / 'study.json', folder / 'results.json'
  require(plan.is_file(), f'{plan} is missing: no study was planned or run in '
          'this workdir')
  tree = schema.parse(plan.read_bytes(), str(plan))
  frozen = frozen_lib.from_json(tree, str(plan))
  results = {'study': {'name': frozen.plan.name, 'hash': frozen.hash},
             **_NOTHING}
  if found.is_file():
    results = schema.parse(found.read_bytes(), str(found))
    schema.check_shape(results, _SHAPE, str(found))
    for i, row in enumerate(results['tuned']):
      schema.check_shape(row['tried'], [_TRIED], f'{found}.tuned[{i}].tried')
    _check_names(frozen.plan, results, f'{found} is damaged' if (
        results['study']['hash'] == frozen.hash) else
                 f'{found} is of another plan than {plan.name}, whose study '
                 'has to be run before it is reported')
  return Record(frozen, tree['hash'], results,
                [plans.outcome_from_json(row) for row in results['outcomes']])


def _check_names(plan: plans.Plan, results: Mapping, who: str) -> None:
  """Raises RequestError, which begins with `who`, for a row of what the plan
  does not know."""
  known = {'variant': {plan.base, plans.AGAIN, *plan.variants},
           'size': {findings.ALL, *plan.sizes},
           'workload': set(plan.workloads),
           'measure': {measure.name for measure in plan.measures},
           'phase': set(plans.PHASES), 'verdict': set(findings.VERDICTS)}

  def check(row: Mapping, where: str) -> None:
    for key in row.keys() & known.keys():
      require(row[key] in known[key], f'{who}: {where} has the {key} '
              f'{short(row[key])}, which is none of this study')

  for part in ('outcomes', 'noise', 'tuned', 'screen', 'confirm'):
    for i, row in enumerate(results[part]):
      check(row, f'{part}[{i}]')
      for own in (*row.get('sizes', ()), *row.get('speed_ups', ())):
        check(own, f'{part}[{i}]')
  for name in results['phases']:
    one_of('phase', name, plans.PHASES)
