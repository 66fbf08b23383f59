"""How often the decisions of a study err, in settings whose truth is known."""

from collections.abc import Mapping
import math
from typing import Any

from tools.compare import decide, findings, phases
from tools.compare import plan as plans
from tools.compare.simulated import rates, world
from tools.compare.simulated.rates import Mean, Row

CLAIMS = (findings.BETTER, findings.WORSE)
EQUAL, UNEQUAL = (0.02, 0.02, 0.02), (0.06, 0.03, 0.015)
# What the studies of a row have: changes of a World.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    'equal noise': {'noise': EQUAL},
    'unequal noise': {'noise': UNEQUAL},
    '3 % diverge': {'noise': EQUAL, 'diverge': {'': 0.03}},
    'unequal noise, 3 % diverge': {'noise': UNEQUAL, 'diverge': {'': 0.03}},
    'heavy tails': {'noise': EQUAL, 'heavy': True},
    'sizes hang together': {'noise': EQUAL, 'shared': 0.5}}
SEEDS = (3, 5, 8)
MIXTURE = (-0.06, -0.03, 0.03)  # effects of the variants that have one
# Learning rates: '' is the base's, and that of all the others.
BEST = {'': 2.5e-3, 'v1': 5e-3, 'v4': 1.2e-3, 'v5': 5e-3}


def holds(row, truth: float) -> bool:
  return row.low <= truth <= row.high


def no_effects(studies: int) -> list[Row]:
  """The confirmation where no variant differs from the base: each one was let
  through, which is the hardest case for Holm."""
  return [row for name in SETTINGS
          for seeds in (SEEDS if name in ('equal noise', '3 % diverge') else
                        (5,))
          for row in confirmation(studies, name, seeds)]


def confirmation(studies: int, name: str, seeds: int) -> list[Row]:
  """Rows of one of SETTINGS."""
  plan, setting = world.plan(seeds=(6, 2, 5, seeds)), SETTINGS[name]

  def one(number, add):
    outcomes = world.confirmed(plan, world.World(number, **setting))
    found = decide.confirm(plan, outcomes)
    add('wrong', any(row.verdict in CLAIMS for row in found))
    for row in found:
      add('unstable', row.verdict == findings.UNSTABLE)
      _covers(row, (0.0,) * 3, add)

  means = rates.grouped(studies, one)
  told = f'no effects, {name}, {seeds} seeds'
  rows = [rates.at_most(told, 'family-wise error', means['wrong'], plan.alpha),
          *_coverages(told, means, exact='heavy' not in setting)]
  if 'diverge' in setting:
    rows.append(rates.told(told, 'called unstable', means['unstable']))
  return rows


def _covers(row: findings.Verdict, truth, add) -> None:
  """Adds whether the intervals of a verdict hold what is true."""
  if row.low is not None:
    add('effect', holds(row, sum(truth) / len(truth)))
  for size, effect in zip(row.sizes, truth):
    if size.low is not None:
      add('sizes', holds(size, effect))
  if row.trend is not None and row.trend.low is not None:
    slope = (truth[-1] - truth[0]) / (2 * math.log10(4))
    add('trend', holds(row.trend, slope))


def _coverages(told: str, means: Mapping[str, Mean], exact: bool = True
               ) -> list[Row]:
  found = []
  for name, what in (('effect', 'of the effect'), ('sizes', 'at each size'),
                     ('trend', 'of the trend')):
    words = f'95 % intervals {what}'
    found.append(rates.near(told, words, means[name], 0.95, 0.01) if exact
                 else rates.told(told, words, means[name]))
  return found


def mixture(studies: int) -> list[Row]:
  """The screening of ten variants, of which three have an effect."""
  return [row for name in ('equal noise', 'unequal noise', '3 % diverge',
                           'heavy tails')
          for seeds in (SEEDS if name == 'equal noise' else (5,))
          for row in screening(studies, name, seeds)]


def screening(studies: int, name: str, seeds: int) -> list[Row]:
  """Rows of one of SETTINGS."""
  plan = world.plan(10, seeds=(6, 2, seeds, 5), q=0.1)
  effects = {f'v{i + 1}': (x,) * 3 for i, x in enumerate(MIXTURE)}

  def one(number, add):
    own = world.World(number, effects=effects, **SETTINGS[name])
    found = decide.screen(plan, world.confirmed(plan, own, 'screen'))
    passed = [row for row in found if row.passed]
    false = [row for row in passed if row.variant not in effects]
    add('false', len(false) / max(len(passed), 1))
    add('found', (len(passed) - len(false)) / len(effects))

  means = rates.grouped(studies, one)
  told = f'screening of a mixture, {name}, {seeds} seeds'
  return [rates.at_most(told, 'false discovery rate', means['false'], plan.q),
          rates.told(told, 'effects that pass', means['found'])]


# Whole studies: their q, and what their worlds have.
_EFFECTS = {f'v{i + 1}': (x,) * 3 for i, x in enumerate(MIXTURE)}
WHOLE: Mapping[str, tuple[float, Mapping[str, Any]]] = {
    'no effects, all are confirmed': (1.0, {}),
    'no effects, all are confirmed, a steeper optimum': (1.0, {'bend': 0.05}),
    'a mixture': (0.05, {'effects': _EFFECTS}),
    'a mixture, 2 % diverge': (0.05, {'effects': _EFFECTS,
                                      'diverge': {'': 0.02}})}


def pipeline(studies: int) -> list[Row]:
  """Whole studies: noise, tuning, screening, confirmation.

  Each variant has a best learning rate of its own between the values of the
  grid, and the grid is searched with noise. What is true of a variant is its
  effect at the values that tuning chose, beside the base at its own: a claim is
  wrong where that is nought, or has the other sign.
  """
  return [row for name in WHOLE for row in whole(
      studies // 2 if 'diverge' in name else studies, name)]


def whole(studies: int, name: str) -> list[Row]:
  """Rows of one of WHOLE."""
  q, changes = WHOLE[name]
  plan = world.plan(6, q=q)

  def one(number, add):
    own = world.World(number, EQUAL, **{'bend': 0.01, 'best': BEST} | changes)
    _pipeline(plan, own, phases.run(
        world.frozen(plan), world.Memory(own, plan), anyway=True), add)

  means = rates.grouped(studies, one)
  told = f'whole studies, {name}'
  rows = [rates.at_most(told, 'a wrong claim on any variant', means['wrong'],
                        plan.alpha),
          rates.told(told, 'a claim on a variant that is as good as the base, '
                     'each at its best', means['equal'])]
  if 'effect' in means:
    rows.append(rates.near(told, '95 % intervals of what was confirmed',
                           means['effect'], 0.95, 0.01))
  for key, what in (
      ('screened', 'screened effect / true effect, of what passed'),
      ('ratio', 'confirmed effect / true effect'),
      ('found', 'effects found')):
    if key in means:
      rows.append(rates.near(told, what, means[key], 1.0, 0.02)
                  if key == 'ratio' else rates.told(told, what, means[key]))
  return rows


def _pipeline(plan: plans.Plan, own: world.World, found: phases.Found, add
              ) -> None:
  chosen = {(row.variant, row.size): row.changes[world.RATE]
            for row in found.tuned}
  true = {}
  for variant in (plan.base, *plan.variants):
    true[variant] = own.truth(variant, [chosen[variant, size]
                                        for size in plan.sizes])
  wrong = False
  for row in found.confirm:
    truth = [a - b for a, b in zip(true[row.variant], true[plan.base])]
    mean = sum(truth) / len(truth)
    right = {findings.BETTER: mean < 0, findings.WORSE: mean > 0}
    wrong |= not right.get(row.verdict, True)
    if row.low is not None:
      add('effect', holds(row, mean))
    if row.variant in own.effects and row.effect is not None:
      add('ratio', row.effect / mean)
  for row in found.screen:
    if row.passed and row.variant in own.effects:
      add('screened', row.effect / (true[row.variant][0] - true[plan.base][0]))
  for variant, effect in own.effects.items():
    wanted = findings.BETTER if effect[0] < 0 else findings.WORSE
    add('found', any(row.variant == variant and row.verdict == wanted
                     for row in found.confirm))
  add('wrong', wrong)
  add('equal', any(row.verdict in CLAIMS and row.variant not in own.effects
                   for row in found.confirm))
