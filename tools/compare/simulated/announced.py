"""Whether a study finds as often as it announced."""

import dataclasses
import random

from tools.compare import decide, findings, phases, power
from tools.compare import plan as plans
from tools.compare.simulated import errors, rates, world
from tools.compare.simulated.errors import EQUAL, SEEDS, UNEQUAL
from tools.compare.simulated.rates import Row

ONE = 'v1'  # the variant that has the effect; the others have none
BINS = ((0.0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1.0))
SETTINGS = {name: errors.SETTINGS[name]
            for name in ('equal noise', 'unequal noise', '3 % diverge')}
WITHIN = 0.03


def _noise(plan: plans.Plan, own: world.World) -> list[findings.Noise]:
  return decide.noise(plan, world.Memory(own, plan).train(
      'noise', phases.noise_runs(world.frozen(plan))))


def _row(rows, phase: str) -> findings.Noise:
  """Returns the row that the phase's test is announced by."""
  return next(row for row in rows if row.phase == phase
              and (phase == 'screen' or row.size == findings.ALL))


def _finds(plan: plans.Plan, own: world.World, effect: float) -> bool:
  own = dataclasses.replace(own, effects={ONE: (-effect,) * 3})
  found = decide.confirm(plan, world.confirmed(plan, own))
  return found[0].verdict == findings.BETTER


def smallest(studies: int) -> list[Row]:
  """Of studies whose true effect is the smallest that they announce, the share
  that finds it."""
  return [row for name in SETTINGS
          for seeds in (SEEDS if name == 'equal noise' else (5,))
          for row in smallest_of(studies, name, seeds)]


def smallest_of(studies: int, name: str, seeds: int) -> list[Row]:
  """Rows of one of SETTINGS."""
  plan, setting = world.plan(seeds=(6, 2, 5, seeds)), SETTINGS[name]

  def one(number, add):
    own = world.World(number, **setting)
    row = _row(_noise(plan, own), 'confirm')
    add('none', row.smallest_effect is None)
    if row.smallest_effect is not None:
      add('found', _finds(plan, own, row.smallest_effect))

  means = rates.grouped(studies, one)
  told = f'the smallest effect announced, {name}, {seeds} seeds'
  if 'diverge' not in setting:
    return [rates.near(told, 'is found', means['found'], plan.power, WITHIN)]
  # How many will diverge is an estimate of few.
  return [rates.told(told, 'is found', means['found']),
          rates.told(told, 'no effect announced', means['none'])]


def needed(studies: int) -> list[Row]:
  """Of studies that take as many seeds as they announce to need, the share
  that finds the effect: at least as many as promised, since half a seed cannot
  be taken."""
  found = []
  for effect in (0.015, 0.03):
    plan = world.plan(1, effect=effect)

    def one(number, add, plan=plan, effect=effect):
      own = world.World(number, UNEQUAL)
      row = _row(_noise(plan, own), 'confirm')
      seeds = dataclasses.replace(plan.seeds, confirm=row.seeds_needed)
      add('seeds', row.seeds_needed)
      add('found', _finds(dataclasses.replace(plan, seeds=seeds), own, effect))

    means = rates.grouped(studies // 2, one)
    told = (f'as many seeds as announced, unequal noise, effect {effect:g} '
            f'({means["seeds"].value:.0f} seeds on average)')
    found.append(rates.at_least(told, 'is found', means['found'],
                                plan.power - WITHIN))
  return found


def calibrated(studies: int) -> list[Row]:
  """An effect and numbers of seeds that the plan fixes, for noise that differs
  from study to study over two powers of ten: of those that announce a power,
  the share that attains it. The power of screening and confirmation together
  is announced as the product of both. Since they hang on the same noise, more
  is attained."""
  plan, found = world.plan(1, effect=0.05), []

  def one(number, add):
    scale = 10 ** random.Random(number).uniform(-1, 1)
    own = world.World(number, tuple(scale * x for x in EQUAL))
    said = decide.announce(plan, _noise(plan, own))
    mine = dataclasses.replace(own, effects={ONE: (-plan.effect,) * 3})
    passed = decide.screen(plan, world.confirmed(plan, mine, 'screen'))
    confirmed = _finds(plan, own, plan.effect)
    for what, share, hit in (
        ('is confirmed', said.confirm, confirmed),
        ('passes and is confirmed', said.power,
         confirmed and passed[0].passed)):
      for low, high in BINS:
        if low <= share < high or share == high == 1:
          add(f'said {what} {low}', share)
          add(f'found {what} {low}', hit)

  means = rates.grouped(studies, one)
  for what in ('is confirmed', 'passes and is confirmed'):
    for low, high in BINS:
      said, hit = (means.get(f'{told} {what} {low}')
                   for told in ('said', 'found'))
      if said is None:
        continue
      told = f'studies whose noise differs, announcing {low:.0%} to {high:.0%}'
      found.append(
          rates.near(told, f'effect {what}', hit, said.value, WITHIN)
          if what == 'is confirmed' else
          rates.at_least(told, f'effect {what}', hit, said.value - WITHIN))
  return found


def one_noise(studies: int) -> list[Row]:
  """The power announced, on average, and attained, where the true noise is one
  and the same."""
  found = []
  for name, pairs, effect in (
      ('equal noise', 4, 0.05), ('equal noise', 8, 0.05),
      ('equal noise', 16, 0.05), ('equal noise', 6, 0.03),
      ('unequal noise', 6, 0.09), ('3 % diverge', 6, 0.05),
      ('sizes hang together', 6, 0.05)):
    plan = world.plan(seeds=(pairs, 2, 5, 5), effect=effect)

    def one(number, add, plan=plan, setting=errors.SETTINGS[name]):
      own = world.World(number, **setting)
      add('said', _row(_noise(plan, own), 'confirm').power)
      add('found', _finds(plan, own, plan.effect))

    means = rates.grouped(studies // 4, one)
    told = f'effect {effect}, {name}, {pairs} pairs to measure the noise'
    found += [rates.told(told, 'power announced, on average', means['said']),
              rates.told(told, 'effect is found', means['found'])]
  return found


def careless(studies: int) -> list[Row]:
  """What is found of an effect that is announced as if the deviation that was
  measured were the true one."""
  plan = world.plan()

  def one(number, add):
    own = world.World(number, EQUAL)
    row = _row(_noise(plan, own), 'screen')
    known = power.smallest_effect(plan.power, row.sd, [row.sd], 1e7,
                                  row.seeds, row.level)
    for name, effect in (('known', known), ('estimate', row.smallest_effect)):
      mine = dataclasses.replace(own, effects={ONE: (-effect,) * 3})
      own_row = decide.screen(plan, world.confirmed(plan, mine, 'screen'))[0]
      add(name, own_row.p is not None and own_row.p <= row.level)

  means = rates.grouped(studies, one)
  told = 'one size, 6 pairs to measure the noise'
  return [rates.told(f'{told}, taken for the true noise',
                     'the smallest effect announced is found', means['known']),
          rates.near(f'{told}, taken for an estimate',
                     'the smallest effect announced is found',
                     means['estimate'], plan.power, WITHIN)]
