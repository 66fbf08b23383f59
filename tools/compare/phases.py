"""The phases of a study, each from the outcomes of those before.

noise -> tune -> screen -> confirm. A phase asks a trainer for runs, gets their
outcomes, and decides. A trainer is an object with

    train(folder, runs) -> [Outcome of each run]

which returns what it has at once where runs are done already: so a study that
is started again walks through its phases until there is something left to do.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
from typing import Any, NamedTuple, Protocol

from configs.errors import RequestError
from tools.compare import decide, tuning
from tools.compare import frozen as frozen_lib
from tools.compare import plan as plans
from training.data import ramp


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
  changes: dict[str, Any]
  share: float = 1.0


class Trainer(Protocol):
  """What trains the runs of a phase: trainer.py, or what
  simulated/ has in its place."""

  def train(self, folder: str, runs: Sequence[Run]) -> list[plans.Outcome]:
    """Returns the outcome of each run; `folder` names their sweep."""


@dataclasses.dataclass
class Found:
  """What a study has found so far; see plans.RESULTS."""
  outcomes: list[plans.Outcome] = dataclasses.field(default_factory=list)
  noise: list[decide.Noise] = dataclasses.field(default_factory=list)
  announced: decide.Announced | None = None
  tuned: list[plans.Tuned] = dataclasses.field(default_factory=list)
  screen: list[decide.Screened] = dataclasses.field(default_factory=list)
  confirm: list[decide.Verdict] = dataclasses.field(default_factory=list)
  finished: list[str] = dataclasses.field(default_factory=list)


class TooWeak(RequestError):
  """The study cannot find the effect that it is after."""


def run(frozen: frozen_lib.Frozen, trainer: Trainer, until: str = 'confirm',
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
  found = Found()
  for phase in plans.PHASES[:plans.PHASES.index(until) + 1]:
    _PHASES[phase](frozen, trainer, found)
    found.finished.append(phase)
    after(found)
    if phase == 'noise' and not found.announced.enough and not anyway:
      raise TooWeak(found.announced.sentence.rstrip('.') + ': take more seeds, '
                    'a larger EFFECT, or --anyway')
  return found


def _noise(frozen, trainer, found: Found) -> None:
  found.outcomes += trainer.train('noise', noise_runs(frozen))
  found.noise = decide.noise(frozen.plan, found.outcomes)
  found.announced = decide.announce(frozen.plan, found.noise)


def _tune(frozen, trainer, found: Found) -> None:
  plan = frozen.plan
  each = tuning.searches(plan)
  rung = 0
  while going := [search for search in each if search.candidates]:
    rung += 1
    asked = [tune_runs(frozen, search) for search in going]
    flat = [run for own in asked for candidate in own for run in candidate]
    outcomes = trainer.train(f'tune-{rung}', flat)
    found.outcomes += outcomes
    given = iter(outcomes)
    for search, own in zip(going, asked):
      search.take(steps_of(frozen, own[0][0]),
                  [[next(given) for _ in candidate] for candidate in own])
  found.tuned = [search.found() for search in each]


def _screen(frozen, trainer, found: Found) -> None:
  plan = frozen.plan
  found.outcomes += trainer.train('screen', full_runs(
      frozen, found.tuned, 'screen', (plan.base, *plan.variants),
      plan.sizes[:1]))
  found.screen = decide.screen(plan, found.outcomes)


def _confirm(frozen, trainer, found: Found) -> None:
  plan = frozen.plan
  passed = [row.variant for row in found.screen if row.passed]
  if passed:
    found.outcomes += trainer.train('confirm', full_runs(
        frozen, found.tuned, 'confirm', (plan.base, *passed), plan.sizes))
  found.confirm = decide.confirm(plan, found.outcomes)


_PHASES = {'noise': _noise, 'tune': _tune, 'screen': _screen,
           'confirm': _confirm}


def noise_runs(frozen: frozen_lib.Frozen) -> list[Run]:
  """The base, and the base with other first parameters."""
  plan = frozen.plan
  return [_run(frozen, 'noise', variant, size, workload, seed, apart)
          for size in plan.sizes for workload in plan.workloads
          for variant, apart in ((plan.base, {}), (plans.AGAIN,
                                                   {'init_seed': 1}))
          for seed in plan.seeds.of('noise')]


def tune_runs(frozen: frozen_lib.Frozen, search: tuning.Search
              ) -> list[list[Run]]:
  """The runs of each candidate of a search, over the seeds of tuning."""
  return [[_run(frozen, 'tune', *search.name, seed, changes, search.share)
           for seed in frozen.plan.seeds.of('tune')]
          for changes in search.candidates]


def full_runs(frozen: frozen_lib.Frozen, tuned: Sequence[plans.Tuned],
              phase: str, variants: Iterable[str], sizes: Iterable[str]
              ) -> list[Run]:
  """The runs of `screen` or `confirm`, with the values that were tuned. The
  primary measure decides on the screening, so that has its workload alone."""
  plan = frozen.plan
  variants = tuple(variants)
  workloads = (plan.workloads if phase == 'confirm'
               else (plan.primary.workload,))
  return [_run(frozen, phase, variant, size, workload, seed, tuning.chosen(
      plan, tuned, variant, size, workload))
          for size in sizes for workload in workloads
          for variant in variants for seed in plan.seeds.of(phase)]


def steps_of(frozen: frozen_lib.Frozen, run: Run) -> int:
  """The steps that a run trains."""
  return run.changes.get('train.steps', frozen.base_config['train']['steps'])


def _run(frozen: frozen_lib.Frozen, phase: str, variant: str, size: str,
         workload: str, seed: int, more: dict, share: float = 1.0) -> Run:
  """Returns a run of a point of the plan, with `more` changes."""
  base_name = frozen.plan.base
  row = frozen.point(base_name if variant == plans.AGAIN else variant, size,
                     workload)
  changes = {**row['changes'], **more,
             'eval.part': 'first' if phase == 'tune' else 'second'}
  base = frozen.base_config
  steps = changes.get('train.steps', base['train']['steps'])
  if share < 1:
    shorten(changes, base, steps, share)
    steps = changes['train.steps']
  if phase != 'confirm':  # whose curves are drawn
    changes['eval.every_steps'] = steps
  name = f'{workload}.{size}.{variant}'
  if phase == 'tune':
    name += ''.join(f'.{field.rpartition(".")[2]}={value:g}'
                    for field, value in more.items())
  return Run(phase, variant, size, workload, seed, name, changes, share)


def shorten(changes: dict, base: dict, steps: int, share: float) -> None:
  """Makes a run a share as long, with a whole schedule of its own."""
  changes['train.steps'] = short = max(round(steps * share), 1)
  for field in ('optim.warmup_steps', 'optim.decay_steps'):
    group, name = field.split('.')
    value = changes.get(field, base[group][name])
    changes[field] = min(round(value * short / steps), short)
  for field in ('checkpoint.every_steps', 'log.every_steps'):
    group, name = field.split('.')
    changes[field] = min(changes.get(field, base[group][name]), short)
  average = changes.get('checkpoint.average', base['checkpoint']['average'])
  if average:
    most = 1 + (short - 1) // changes['checkpoint.every_steps']
    changes['checkpoint.average'] = min(average, most) if most > 1 else 0
  stages = changes.get('data.batch_ramp', base['data']['batch_ramp'])
  if stages:
    changes['data.batch_ramp'] = ramp.scaled(stages, steps, short)
