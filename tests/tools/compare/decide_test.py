"""What a study says of known outcomes, beside scipy and statsmodels."""

import dataclasses
import json
import random

from hypothesis import given, settings, strategies
import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from tests.helpers import study_outcomes as made
from tools.compare import decide, findings
from tools.compare import plan as plans

PLAN = made.plan()


def _values(seed=0, seeds=5, effects=(0.0, -0.05, 0.0), noise=0.02):
  """Returns {variant: [seed, size]} with a large common part."""
  rng = np.random.default_rng(seed)
  common = rng.normal(3.0, 0.5, (seeds, 3))
  return {name: common + effect + rng.normal(0, noise, (seeds, 3))
          for name, effect in zip(('base', 'a', 'b', 'c'), effects)}


def _confirm(values, plan=PLAN, **more):
  return decide.confirm(plan, made.phase('confirm', values, **more))


def test_the_confirmation_is_scipys_test_and_statsmodels_holm():
  values = _values()
  found = _confirm(values)
  tests = [stats.ttest_1samp((values[v] - values['base']).mean(1), 0)
           for v in 'ab']
  holm = multipletests([t.pvalue for t in tests], method='holm')[1]
  for row, test, p in zip(found, tests, holm):
    assert row.p == pytest.approx(test.pvalue)
    assert row.p_holm == pytest.approx(p)
    assert (row.low, row.high) == pytest.approx(test.confidence_interval())
    assert row.n == 5 and row.primary and row.runs == 15
    for size, own in zip(row.sizes, (values[row.variant]
                                     - values['base']).T):
      assert (size.mean, size.p) == pytest.approx(
          (own.mean(), stats.ttest_1samp(own, 0).pvalue))
  assert [row.verdict for row in found] == ['better', 'no difference shown']


def test_the_screening_is_scipys_test_at_the_smallest_size():
  values = _values(effects=(0, -0.05, 0.1, 0.02))
  plan = made.plan(variants=('a', 'b', 'c'))
  found = decide.screen(plan, made.phase('screen', values))
  tests = [stats.ttest_rel(values[v][:, 0], values['base'][:, 0])
           for v in 'abc']
  qs = stats.false_discovery_control([t.pvalue for t in tests], method='bh')
  for row, test, q in zip(found, tests, qs):
    assert (row.p, row.q) == pytest.approx((test.pvalue, q))
    assert row.passed == (q <= 0.05)
    assert (row.low, row.high) == pytest.approx(test.confidence_interval())


def test_what_is_lower_and_what_is_higher_is_better():
  loss, accuracy = (_values(effects=(0, -0.05, 0.05)) for _ in range(2))
  outcomes = made.phase('confirm', loss) + made.phase(
      'confirm', accuracy, workload='mqar')
  said = {(row.measure, row.variant): row.verdict
          for row in decide.confirm(PLAN, outcomes)}
  assert said == {('loss', 'a'): 'better', ('loss', 'b'): 'worse',
                  ('mqar', 'a'): 'worse', ('mqar', 'b'): 'better'}


def test_measures_that_are_not_primary_are_corrected_by_themselves():
  outcomes = made.phase('confirm', _values()) + made.phase(
      'confirm', _values(1), workload='mqar')
  rows = decide.confirm(PLAN, outcomes)
  assert [row.primary for row in rows] == [True, True, False, False]
  for own in (rows[:2], rows[2:]):
    assert [row.p_holm for row in own] == pytest.approx(list(multipletests(
        [row.p for row in own], method='holm')[1]))
  alone = decide.confirm(PLAN, outcomes[:len(outcomes) // 2])
  assert alone[:2] == rows[:2]


def test_sizes_that_point_apart_are_no_verdict():
  values = _values(noise=0.001)
  values['a'][:, 2] = values['base'][:, 2] + 0.01
  row, _ = _confirm(values)
  assert row.p_holm < 0.05 and not row.same_direction
  assert row.verdict == 'sizes disagree'
  assert row.trend.slope > 0 and row.trend.low > 0


def test_a_run_that_diverged_is_counted_and_is_in_no_mean():
  values = _values(seeds=8)
  row, other = _confirm(values, lost={('a', 0, 1)})
  kept = (values['a'] - values['base'])[1:].mean(1)
  test = stats.ttest_1samp(kept, 0)
  assert row.n == 7 and row.p == pytest.approx(test.pvalue)
  assert (row.diverged, row.base_diverged, row.runs) == (1, 0, 24)
  assert [size.n for size in row.sizes] == [8, 7, 8]
  counted = values['a'] - values['base']
  counted[0, 1] = 5.5 - values['base'][0, 1]
  assert row.counted == pytest.approx(counted.mean())
  assert (row.rate_low, row.rate_high) == pytest.approx(
      tuple(stats.binomtest(1, 24).proportion_ci()))
  assert row.verdict == 'better' and other.n == 8
  # A run of the base takes that seed from every variant.
  assert [x.n for x in _confirm(values, lost={('base', 3, 0)})] == [7, 7]


def test_a_variant_that_diverges_too_often_is_unstable_and_never_better():
  values = _values(seeds=8)
  lost = {('a', s, s % 3) for s in range(3)}  # 3 of 24, 10 % are allowed
  row, _ = _confirm(values, lost=lost)
  assert row.p < 0.05 and row.effect < 0 and row.verdict == 'unstable'
  rows = decide.screen(PLAN, made.phase('screen', values, lost={('a', 0, 0)}))
  assert rows[0].unstable and not rows[0].passed and rows[0].q < 0.05
  allowed = dataclasses.replace(PLAN, unstable=0.2)
  assert _confirm(values, allowed, lost=lost)[0].verdict == 'better'


def test_a_variant_that_diverges_more_than_the_base_is_unstable():
  values = _values(seeds=40)
  lost = {('a', s, 0) for s in range(10)}
  plan = dataclasses.replace(PLAN, unstable=1.0)
  row, _ = _confirm(values, plan, lost=lost)
  # Holm of two: twice the one-sided sign test of 10 against 0.
  assert row.p_diverged == pytest.approx(2 * 0.5 ** 10)
  assert row.verdict == 'unstable'
  both = lost | {('base', s, 0) for s in range(10)}
  row, _ = _confirm(values, plan, lost=both)
  assert row.p_diverged == 1 and row.verdict == 'better'


def test_too_few_seeds_say_nothing():
  row, _ = _confirm(_values(seeds=2))
  assert (row.p, row.low, row.verdict) == (None, None, 'no difference shown')
  lost = {('base', s, 0) for s in range(5)}
  row, _ = _confirm(_values(), lost=lost)
  assert (row.n, row.effect, row.p, row.trend) == (0, None, None, None)
  assert row.verdict == 'no difference shown'
  assert not decide.confirm(PLAN, [])


def test_figures_without_spread_have_the_p_of_the_sign_test():
  solved = {'base': np.zeros((5, 3)), 'a': np.ones((5, 3)),
            'b': np.zeros((5, 3))}
  outcomes = made.phase('confirm', solved, workload='mqar')
  rows = decide.confirm(PLAN, made.phase('confirm', _values()) + outcomes)
  assert [row.p for row in rows[2:]] == [2 ** -4, 1.0]


def test_a_trend_is_least_squares_over_the_logarithm_of_the_size():
  values = _values()
  row, _ = _confirm(values)
  slopes = [np.polyfit([4, 5, 6], d, 1)[0]
            for d in values['a'] - values['base']]
  test = stats.ttest_1samp(slopes, 0)
  assert (row.trend.slope, row.trend.p) == pytest.approx(
      (np.mean(slopes), test.pvalue))
  assert (row.trend.low, row.trend.high) == pytest.approx(
      test.confidence_interval())


def test_a_speed_up_is_the_factor_of_what_is_spent():
  spent = np.geomspace(1e10, 1e13, 20)
  rng = np.random.default_rng(0)
  outcomes = []
  for variant, factor in (('base', 1.0), ('a', 0.5), ('b', 1.0)):
    for x in made.phase('confirm', {variant: np.full((3, 3), 2.0)}):
      own = spent * factor * np.exp(rng.normal(0, 0.01))
      loss = 1.5 + 300 * spent ** -0.25
      outcomes.append(x._replace(curve={
          'step': [], 'tokens': [], 'flops': own.tolist(),
          'seconds': (own * 3e-11).tolist(), 'loss': loss.tolist()}))
  row, other = decide.confirm(PLAN, outcomes)
  assert [(x.size, x.by) for x in row.speed_ups] == [
      (size, by) for size in made.SIZES for by in ('flops', 'seconds')]
  for x in row.speed_ups:
    assert x.low < x.factor < x.high and x.factor == pytest.approx(2, rel=0.05)
  assert all(x.factor == pytest.approx(1, rel=0.05) for x in other.speed_ups)
  # What came before the learning rate was at its height is in no law.
  rough = [x._replace(curve=x.curve | {
      'warm': [i > 3 for i in range(20)],
      'loss': [5.5 if i < 4 else y for i, y in enumerate(x.curve['loss'])]})
           for x in outcomes]
  for x in decide.confirm(PLAN, rough)[0].speed_ups:
    assert x.factor == pytest.approx(2, rel=0.05) and x.fit_error < 0.01
  broken = [x if x.curve and x.seed != 30_001 else x._replace(
      curve=x.curve | {'seconds': [None] * 20}) for x in outcomes]
  by_time = [x for x in decide.confirm(PLAN, broken)[0].speed_ups
             if x.by == 'seconds']
  assert all(x.factor is None for x in by_time)


def test_findings_go_through_json():
  outcomes = made.phase('noise', {
      name: _values()['base'] for name in ('base', plans.AGAIN)})
  for rows in (_confirm(_values()), decide.noise(PLAN, outcomes)):
    json.dumps(plans.to_json(rows), allow_nan=False)


@settings(max_examples=25, deadline=None)
@given(strategies.integers(0, 10_000), strategies.integers(3, 8),
       strategies.sampled_from((0.0, 0.02, 0.06)))
def test_laws_of_verdicts(seed, seeds, effect):
  values = _values(seed, seeds, (0, -effect, effect))
  plan = dataclasses.replace(PLAN, unstable=0.0)
  rows = _confirm(values)
  # The order of the runs and the level of a seed say nothing.
  shuffled = made.phase('confirm', values)
  random.Random(seed).shuffle(shuffled)
  assert decide.confirm(PLAN, shuffled) == rows
  moved = _confirm({name: x + 0.125 for name, x in values.items()})
  # The other sign has the other verdict.
  turned = _confirm({name: -x for name, x in values.items()})
  other = {'better': 'worse', 'worse': 'better'}
  for row, own, back in zip(rows, moved, turned):
    assert own.p == pytest.approx(row.p, rel=1e-4)
    assert back.p == pytest.approx(row.p)
    assert back.verdict == other.get(row.verdict, row.verdict)
    assert row.p_holm >= row.p and row.verdict in findings.VERDICTS
    assert row.low <= row.effect <= row.high
    if row.verdict in other:
      assert not row.low <= 0 <= row.high
  # One run that diverges where none may is never better.
  assert _confirm(values, plan, lost={('a', 0, 0)})[0].verdict == 'unstable'
