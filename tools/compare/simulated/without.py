"""What each rule is for: the same studies decided without it."""

import dataclasses
import random

from tools.compare import decide, findings, phases
from tools.compare import plan as plans
from tools.compare.simulated import rates, world
from tools.compare.simulated.errors import CLAIMS, EQUAL, holds
from tools.compare.simulated.rates import Row


def rules(studies: int) -> list[Row]:
  few = max(studies // 4, 2)  # what is shown is large
  return [*_holm(few), *_pairing(few), *_fresh(few), *_diverged(few)]


def _holm(studies: int) -> list[Row]:
  plan = world.plan()

  def one(number, add):
    found = decide.confirm(plan, world.confirmed(
        plan, world.World(number, EQUAL)))
    add('with', any(row.verdict in CLAIMS for row in found))
    add('without', any(row.p <= plan.alpha and row.same_direction
                       for row in found))

  return _both('Holm, no effects', 'family-wise error',
               rates.grouped(studies, one))


def unpaired(outcomes, number: int) -> list[plans.Outcome]:
  """Deals the base's outcomes to other seeds."""
  deal = random.Random(number)
  own = [x for x in outcomes if x.variant == 'base']
  found = [x for x in outcomes if x.variant != 'base']
  for size in {x.size for x in own}:
    rows = [x for x in own if x.size == size]
    seeds = [x.seed for x in rows]
    deal.shuffle(seeds)
    found += [x._replace(seed=seed) for x, seed in zip(rows, seeds)]
  return found


def _pairing(studies: int) -> list[Row]:
  plan = world.plan()

  def one(number, add):
    own = world.World(number, EQUAL, {'v1': (-0.06,) * 3})
    outcomes = world.confirmed(plan, own)
    for name, each in (('with', outcomes),
                       ('without', unpaired(outcomes, number))):
      add(name, decide.confirm(plan, each)[0].verdict == findings.BETTER)

  return _both('paired seeds, effect 0.06', 'effect is found',
               rates.grouped(studies, one))


def _fresh(studies: int) -> list[Row]:
  """Without fresh seeds, the confirmation judges the runs that were picked."""
  plan = world.plan(20, seeds=(6, 2, 5, 5), q=0.5)

  def one(number, add):
    own = world.World(number, EQUAL)
    screened = world.confirmed(plan, own, 'screen')
    passed = [row.variant for row in decide.screen(plan, screened)
              if row.passed]
    for name, phase in (('with', 'confirm'), ('without', 'screen')):
      runs = [run._replace(phase='confirm') for run in phases.full_runs(
          world.frozen(plan), world.untuned(plan), phase,
          (plan.base, *passed), plan.sizes)]
      found = decide.confirm(plan, world.Memory(own, plan).train(phase, runs))
      add(name, any(row.verdict in CLAIMS for row in found) and bool(passed))
      for row in found:
        if row.sizes[0].low is not None:
          add(f'{name} interval', holds(row.sizes[0], 0.0))

  means = rates.grouped(studies, one)
  told = 'fresh seeds for what passed of 20 variants, no effects'
  return _both(told, 'family-wise error', means) + [
      rates.told(f'{name} {told}', '95 % intervals at the smallest size',
                 means[f'{name} interval']) for name in ('with', 'without')]


def _diverged(studies: int) -> list[Row]:
  """Without leaving diverged runs out of the means: at what guessing gives."""
  plan = world.plan(seeds=(6, 2, 5, 8))
  chance = plan.primary.chance

  def one(number, add):
    own = world.World(number, EQUAL, {'v1': (-0.04,) * 3},
                      diverge={'': 0.03})
    outcomes = world.confirmed(plan, own)
    counted = [x._replace(diverged=False, values={'loss': chance})
               if x.diverged else x for x in outcomes]
    for name, each in (('with', outcomes), ('without', counted)):
      found = decide.confirm(plan, each)
      add(name, found[0].verdict == findings.BETTER)
      for row in found[1:]:
        if row.low is not None:
          add(f'{name} interval', holds(row, 0.0))
      # Of a variant of which alone a tenth diverges.
    steady = dataclasses.replace(own, diverge={'v2': 0.1}, effects={})
    outcomes = world.confirmed(plan, steady)
    gap = 0.1 * sum(chance - (3.0 - 0.3 * k) for k in range(3)) / 3
    counted = [x._replace(diverged=False, values={'loss': chance})
               if x.diverged else x for x in outcomes]
    row = decide.confirm(plan, counted)[1]
    add('without mixture', holds(row, gap))

  means = rates.grouped(studies, one)
  told = 'means of runs that ended, effect 0.04, 3 % of all diverge'
  return _both(told, 'effect is found', means) + [
      rates.told(f'without {told[:28]}, 10 % of one variant diverge',
                 '95 % intervals of the mean with guessing counted',
                 means['without mixture'])]


def _both(told: str, what: str, means) -> list[Row]:
  return [rates.told(f'{name} {told}', what, means[name])
          for name in ('with', 'without')]
