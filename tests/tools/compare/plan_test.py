"""Plans and outcomes: through JSON and back, seeds apart, the hash."""

import dataclasses
import json

from tools.compare import frozen as frozen_lib
from tools.compare import plan as plans


def _plan(**changes) -> plans.Plan:
  return dataclasses.replace(plans.Plan(
      name='norms', question='which norm?', file='configs/studies/norms.py',
      base='layernorm', variants=('rmsnorm',), sizes=('s', 'm', 'l'),
      workloads=('text', 'mqar'),
      measures=(plans.Measure('loss', 'text', 'loss', plans.LOWER, 5.5),
                plans.Measure('mqar', 'mqar', 'probe/accuracy', plans.HIGHER,
                              0.0)),
      seeds=plans.Seeds(noise=3, tune=1, screen=4, confirm=5),
      tuning=plans.Tuning({'optim.lr': (1e-3, 2e-3)}), effect=0.01,
      tuned_sizes=('s',)), **changes)


def test_plans_and_outcomes_come_back_from_json_as_they_were():
  plan = _plan()
  tree = json.loads(json.dumps(plans.to_json(plan)))
  assert plans.plan_from_json(tree) == plan
  outcome = plans.Outcome(
      'confirm', 'rmsnorm', 's', 'text', 30_000, {'loss': 1.5}, False, 1e9,
      2.0, 1000, {'optim.lr': 1e-3}, 1.5, {'step': [1, 2]})
  tree = json.loads(json.dumps(plans.to_json(outcome)))
  assert plans.outcome_from_json(tree) == outcome
  bad = outcome._replace(loss=float('inf'))
  tree = json.loads(json.dumps(plans.to_json(bad), allow_nan=False))
  assert plans.outcome_from_json(tree) == bad


def test_no_seed_is_in_two_phases():
  seeds = _plan().seeds
  each = [seeds.of(phase) for phase in plans.PHASES]
  assert [len(own) for own in each] == [3, 1, 4, 5]
  assert len({seed for own in each for seed in own}) == 13


def test_the_hash_is_of_all_that_is_planned_and_of_nothing_else():
  frozen = frozen_lib.Frozen(_plan(), {'seed': 0}, [], {'file': 'a'}, {})
  back = frozen_lib.from_json(json.loads(json.dumps(
      frozen_lib.to_json(frozen))), 'study.json')
  assert back == frozen and back.hash == frozen.hash
  for changed in (dict(plan=_plan(effect=0.02)), dict(base_config={'seed': 1}),
                  dict(sources={'file': 'b'}), dict(code={'commit': 'c'})):
    assert dataclasses.replace(frozen, **changed).hash != frozen.hash
  noted = dataclasses.replace(frozen, notes=[{'time': 0.0, 'told': 'looked'}])
  assert noted.hash == frozen.hash


def test_a_measure_says_which_sign_is_an_improvement():
  loss, accuracy = _plan().measures
  assert (loss.sign, accuracy.sign) == (-1, 1)
