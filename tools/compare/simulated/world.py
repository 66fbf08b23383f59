"""A simulated trainer: what it gives is drawn from effects that are known.

The loss of a run is

    level(size) + effect(variant, size) + bend * log2(rate / best(variant))^2
      + common(seed, size) + private(variant, size, seed, changes)

`common` is what a seed's data do to every variant alike, which pairing removes;
`private` is what a run has for itself. A draw is a hash of what it belongs to:
so a run gives the same whenever and wherever it is trained, as a real one does,
and what one study draws does not hang on the order in which it asks.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import math
import statistics

from tools.compare import phases
from tools.compare import plan as plans
from tools.compare.frozen import Frozen

RATE = 'optim.lr'
_NORMAL = statistics.NormalDist()
_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class World:
  """What is true.

  Attributes:
    study: the number of the study: another one draws all anew.
    noise: the standard deviation of `private` at each size; that of a paired
      difference is sqrt(2) times as much.
    effects: at each size, of the variants that have one.
    common: the standard deviation of `common`.
    shared: the share of the variance of `private` that a variant's runs of one
      seed have in common at all sizes.
    heavy: whether `private` is Student's t of 3 degrees of freedom.
    diverge: the share of runs that diverge, by variant; '' is any other.
    best: the best learning rate, by variant; '' is any other.
    bend: how much a learning rate is worse that is twice or half as large.
  """
  study: int
  noise: tuple[float, ...]
  effects: Mapping[str, tuple[float, ...]] = (
      dataclasses.field(default_factory=dict))
  common: float = 0.3
  shared: float = 0.0
  heavy: bool = False
  diverge: Mapping[str, float] = (
      dataclasses.field(default_factory=dict))
  best: Mapping[str, float] = (
      dataclasses.field(default_factory=dict))
  bend: float = 0.0

  def truth(self, variant: str, rates: Sequence[float] = ()) -> list[float]:
    """Returns the variant's effects with these learning rates at each size;
    none: with the best."""
    effects = self.effects.get(variant, (0.0,) * len(self.noise))
    return [effect + self._bent(variant, rate)
            for effect, rate in zip(effects, rates or [None] * len(effects))]

  def loss(self, plan: plans.Plan, run: phases.Run) -> float:
    """Returns the loss of a run, whether it diverges or not."""
    k = plan.sizes.index(run.size)
    rate = run.changes.get(RATE)
    who = f'{run.variant}/{run.workload}/{run.seed}/{rate}/{run.share}'
    own = self._draw(f'private/{who}/{run.size}', self.heavy)
    if self.shared:
      own = (math.sqrt(1 - self.shared) * own
             + math.sqrt(self.shared) * self._draw(f'sizes/{who}'))
    place = f'common/{run.size}/{run.workload}/{run.seed}'
    return (3.0 - 0.3 * k + 0.5 * (1 - run.share)
            + self.truth(run.variant, [rate] * len(self.noise))[k]
            + self.common * self._draw(place) + self.noise[k] * own)

  def diverges(self, run: phases.Run) -> bool:
    rate = self.diverge.get(run.variant, self.diverge.get('', 0.0))
    return bool(rate) and self._uniform(
        f'diverge/{run.variant}/{run.size}/{run.workload}/{run.seed}/'
        f'{run.changes.get(RATE)}/{run.share}') < rate

  def _bent(self, variant: str, rate: float | None) -> float:
    best = self.best.get(variant, self.best.get(''))
    if not (rate and best and self.bend):
      return 0.0
    return self.bend * math.log2(rate / best) ** 2

  def _uniform(self, what: str) -> float:
    words = hashlib.blake2b(f'{self.study}/{what}'.encode(), digest_size=7)
    return (int.from_bytes(words.digest()) + 0.5) / 2 ** 56

  def _draw(self, what: str, heavy: bool = False) -> float:
    """Returns a draw of mean 0 and variance 1."""
    z = _NORMAL.inv_cdf(self._uniform(what))
    if not heavy:
      return z
    square = sum(_NORMAL.inv_cdf(self._uniform(f'{what}/{i}')) ** 2
                 for i in range(3))
    return z / math.sqrt(square)  # t of 3, over the root of its variance, 3


class Memory:
  """A phases.Trainer that trains nothing and keeps nothing.

  Args:
    world: what is true.
    plan: of the study.
  """

  def __init__(self, world: World, plan: plans.Plan):
    self._world, self._plan = world, plan

  def train(self, folder: str, runs: Sequence[phases.Run]
            ) -> list[plans.Outcome]:
    del folder
    return [self._outcome(run) for run in runs]

  def _outcome(self, run: phases.Run) -> plans.Outcome:
    diverged = self._world.diverges(run)
    loss = math.inf if diverged else self._world.loss(self._plan, run)
    values = {m.name: m.chance if diverged else loss
              for m in self._plan.of_workload(run.workload)}
    return plans.Outcome(
        run.phase, run.variant, run.size, run.workload, run.seed, values,
        diverged, 1e9 * run.share, 1.0 * run.share,
        params(self._plan, run.size), run.changes, loss)


def params(plan: plans.Plan, size: str) -> int:
  return 10_000 * 4 ** plan.sizes.index(size)


def plan(variants: int = 5, seeds: Sequence[int] = (6, 2, 5, 5), **changes
         ) -> plans.Plan:
  """Returns a plan of three sizes, judged by loss alone.

  Args:
    variants: how many, without the base.
    seeds: of each phase.
    **changes: other fields of the plan.
  """
  sizes = ('small', 'middle', 'large')
  return dataclasses.replace(plans.Plan(
      name='simulated', question='Does it find what is true?',
      file='tools/compare/simulated/world.py', base='base',
      variants=tuple(f'v{i + 1}' for i in range(variants)), sizes=sizes,
      workloads=(plans.TEXT,), measures=(plans.Measure(
          'loss', plans.TEXT, 'loss', plans.LOWER, math.log(256)),),
      seeds=plans.Seeds(*seeds), tuning=plans.Tuning(
          {RATE: (1e-3, 2e-3, 4e-3, 8e-3)}), effect=0.03,
      tuned_sizes=sizes), **changes)


def frozen(own: plans.Plan) -> Frozen:
  """Returns the plan as `freeze` would have it, for runs in memory."""
  config = {'train': {'steps': _STEPS}, 'checkpoint': {'every_steps': _STEPS},
            'optim': {'warmup_steps': 50, 'decay_steps': 0},
            'log': {'every_steps': 100}, 'data': {'batch_ramp': ''}}
  rows = [{'variant': variant, 'size': size, 'workload': workload,
           'changes': {}, 'matched': [], 'params': params(own, size),
           'active_params': params(own, size), 'flops_per_token': 1e6,
           'tokens': 1000, 'vocab': 256}
          for workload in own.workloads for size in own.sizes
          for variant in (own.base, *own.variants)]
  return Frozen(own, config, rows, {}, {'commit': '', 'diff': ''})


def untuned(own: plans.Plan) -> list[plans.Tuned]:
  """Returns what tuning would have found if it changed nothing."""
  return [plans.Tuned(variant, size, workload, {}, (), 0, 0.0, 0.0, ())
          for workload in own.workloads for size in own.tuned_sizes
          for variant in (own.base, *own.variants)]


def confirmed(own: plans.Plan, world: World, phase: str = 'confirm'
              ) -> list[plans.Outcome]:
  """Returns the outcomes of one phase, whatever was screened and tuned."""
  sizes = own.sizes if phase == 'confirm' else own.sizes[:1]
  return Memory(world, own).train(phase, phases.full_runs(
      frozen(own), untuned(own), phase, (own.base, *own.variants), sizes))
