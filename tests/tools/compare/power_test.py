"""Announced power: beside statsmodels, and beside studies that were drawn."""

import dataclasses
import warnings

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from tests.helpers import study_outcomes as made
from tools.compare import decide, findings, power
from tools.compare import plan as plans

KNOWN = 1e7  # degrees of freedom of a deviation that is known


@pytest.mark.parametrize('seeds', [3, 5, 12])
@pytest.mark.parametrize('level', [0.05, 0.01])
def test_one_size_of_known_noise_is_statsmodels_power(seeds, level):
  for wanted in (0.3, 0.8):
    effect = power.smallest_effect(wanted, 0.02, [0.02], KNOWN, seeds, level)
    expected = TTestPower().power(effect / 0.02, seeds, level)
    assert expected == pytest.approx(wanted, abs=0.006)


@pytest.mark.parametrize('effect', [0.01, 0.02, 0.06])
def test_the_seeds_that_an_effect_needs_are_statsmodels(effect):
  needed = power.seeds_needed(effect, 0.8, 0.03, [0.03], KNOWN, 0.05)
  expected = TTestPower().solve_power(effect / 0.03, None, 0.05, 0.8)
  assert needed == max(np.ceil(expected), 3) or abs(
      needed / expected - 1) < 0.02
  assert power.power(effect, 0.03, [0.03], KNOWN, needed, 0.05) >= 0.8
  if needed > 3:
    assert power.power(effect, 0.03, [0.03], KNOWN, needed - 1, 0.05) < 0.8


def test_noise_that_no_number_of_seeds_beats_is_said_to_be_so():
  assert power.seeds_needed(1e-6, 0.8, 1.0, [1.0], KNOWN, 0.05) is None
  assert power.smallest_effect(0.8, 1.0, [1.0], KNOWN, 2, 0.05) is None
  # More than half of what is run diverges, and 10 % may.
  assert power.smallest_effect(0.8, 1.0, [1.0], 9, 8, 0.05, rate=0.6,
                               limit=0.1) is None


def _drawn(sds, seeds, level, effect, rate, limit, studies=20_000):
  """The share of drawn studies that find the effect, by the rule itself."""
  rng = np.random.default_rng(0)
  sizes = len(sds)
  d = rng.normal(-effect, sds, (studies, seeds, sizes))
  lost = rng.random((2, studies, seeds, sizes)) < rate
  ours, gone = lost[0].sum((1, 2)), lost.any((0, 3))
  n = (~gone).sum(1)
  values = np.where(gone, np.nan, d.mean(2))
  with np.errstate(all='ignore'), warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of studies of which all seeds diverged
    mean, sd = np.nanmean(values, 1), np.nanstd(values, 1, ddof=1)
    p = 2 * stats.t.sf(abs(mean) / sd * np.sqrt(n), n - 1)
    ends = np.where(lost.any(0), np.nan, d)
    signs = (np.nanmean(ends, 1) < 0).all(1)
  return np.mean((n >= 3) & (p <= level) & signs
                 & (ours <= limit * seeds * sizes))


@pytest.mark.parametrize('sds, seeds, rate', [
    ((0.02, 0.02, 0.02), 5, 0.0), ((0.04, 0.02, 0.01), 8, 0.0),
    ((0.02, 0.02, 0.02), 8, 0.03), ((0.03, 0.02), 12, 0.05),
    ((0.04, 0.04, 0.04, 0.04, 0.04), 12, 0.0)])
def test_sizes_that_must_agree_and_runs_that_diverge_cost_what_is_said(
    sds, seeds, rate):
  rule = dict(level=0.02, rate=rate, limit=0.1)
  for effect in (0.015, 0.03):
    sd = np.sqrt(np.sum(np.square(sds))) / len(sds)
    said = power.power(effect, sd, sds, KNOWN, seeds, **rule)
    assert said == pytest.approx(
        _drawn(sds, seeds, effect=effect, **rule), abs=0.03)


def test_sizes_that_hang_together_average_less_noise_away():
  sds = (0.02, 0.03, 0.04)
  for share in (0.0, 0.5, 1.0):
    sd = np.sqrt((1 - share) * np.sum(np.square(sds)) + share * np.sum(sds) ** 2
                 ) / 3
    rng = np.random.default_rng(0)
    common = rng.normal(size=(20_000, 6, 1)) * np.sqrt(share)
    own = rng.normal(size=(20_000, 6, 3)) * np.sqrt(1 - share)
    d = -0.04 + np.array(sds) * (common + own)
    test = stats.ttest_1samp(d.mean(2), 0, axis=1)
    found = np.mean((test.pvalue < 0.02) & (d.mean(1) < 0).all(1))
    assert power.power(0.04, sd, sds, KNOWN, 6, 0.02) == pytest.approx(
        found, abs=0.015)


def _noise_outcomes(sds, seeds, rng):
  both = {name: rng.normal(3, np.array(sds) / np.sqrt(2), (seeds, 3))
          for name in ('base', plans.AGAIN)}
  return made.phase('noise', both)


def test_an_estimated_noise_is_announced_so_that_the_power_is_right():
  plan = made.plan(measures=made.plan().measures[:1], effect=0.015)
  rng = np.random.default_rng(1)
  sds = np.array([0.04, 0.02, 0.02])
  sd = np.sqrt(np.sum(sds ** 2)) / 3
  known = dict(sd=sd, sds=sds, df=KNOWN, seeds=5, level=0.025)
  alone = dict(sd=sds[0], sds=sds[:1], df=KNOWN, seeds=5, level=0.025)
  smallest, single, needed = [], [], []
  for _ in range(60):
    rows = {(row.size, row.phase): row for row in decide.noise(
        plan, _noise_outcomes(sds, 6, rng))}
    whole = rows[findings.ALL, 'confirm']
    smallest.append(power.power(whole.smallest_effect, **known))
    single.append(power.power(rows['s', 'screen'].smallest_effect, **alone))
    needed.append(power.power(plan.effect, **known | {
        'seeds': whole.seeds_needed}))
  assert np.mean(single) == pytest.approx(0.8, abs=0.03)
  assert np.mean(smallest) == pytest.approx(0.8, abs=0.03)
  assert 0.77 < np.mean(needed) < 0.86  # whole seeds: rounded up
  # What taking the estimate for the truth would have attained.
  naive = []
  for _ in range(60):
    sd = 0.04 * np.sqrt(rng.chisquare(5) / 5)
    effect = power.smallest_effect(0.8, sd, [sd], KNOWN, 5, 0.025)
    naive.append(power.power(effect, **alone))
  assert np.mean(naive) < 0.77


def test_noise_rows_are_the_deviations_of_the_pairs():
  outcomes = _noise_outcomes((0.04, 0.02, 0.02), 6, np.random.default_rng(2))
  plan = made.plan(measures=made.plan().measures[:1])
  rows = decide.noise(plan, outcomes)
  assert [(row.size, row.phase) for row in rows] == [
      ('s', 'confirm'), ('m', 'confirm'), ('l', 'confirm'), ('s', 'screen'),
      (findings.ALL, 'confirm')]
  values = {(x.variant, x.size, x.seed): x.values['loss'] for x in outcomes}
  spread = [np.std([values[plans.AGAIN, size, s] - values['base', size, s]
                    for s in range(6)], ddof=1) for size in made.SIZES]
  assert [row.sd for row in rows[:3]] == pytest.approx(spread)
  for row in rows[:3]:
    assert (row.sd_low, row.sd_high) == pytest.approx(
        (row.sd * np.sqrt(5 / stats.chi2.isf(0.025, 5)),
         row.sd * np.sqrt(5 / stats.chi2.ppf(0.025, 5))))
  whole = rows[-1]
  assert whole.sd == pytest.approx(np.std(
      [np.mean([values[plans.AGAIN, size, s] - values['base', size, s]
                for size in made.SIZES]) for s in range(6)], ddof=1))
  assert whole.df == 5
  assert whole.level == 0.025 and whole.runs == 36 and whole.pairs == 6


def test_noise_rows_of_secondary_measures_have_the_level_of_their_family():
  measures = made.plan().measures[:1] + tuple(
      plans.Measure(name, 'text', name, plans.LOWER, 5.5) for name in 'xyz')
  plan = made.plan(measures=measures)
  outcomes = [x._replace(values=dict.fromkeys(
      (m.name for m in measures), x.values['loss'])) for x in _noise_outcomes(
          (0.02,) * 3, 6, np.random.default_rng(2))]
  rows = {(row.measure, row.phase): row for row in decide.noise(plan, outcomes)
          if row.size == findings.ALL or row.phase == 'screen'}
  # Two variants, and three measures beside the primary one.
  assert rows['loss', 'confirm'].level == 0.05 / 2
  assert rows['y', 'confirm'].level == 0.05 / (2 * 3)
  assert rows['y', 'screen'].level == rows['loss', 'screen'].level == 0.05 / 2
  # As Bonferroni has it of the primary measure of six variants.
  more = made.plan(measures=measures[:1], variants=tuple('abcdef'))
  alike = decide.noise(more, outcomes)[-1]
  assert rows['y', 'confirm'].smallest_effect == pytest.approx(
      alike.smallest_effect)
  assert rows['y', 'confirm'].smallest_effect > 1.1 * rows[
      'loss', 'confirm'].smallest_effect


def test_a_study_that_cannot_find_what_it_wants_says_so():
  outcomes = _noise_outcomes((0.02,) * 3, 6, np.random.default_rng(3))
  plan = made.plan(measures=made.plan().measures[:1])
  strong, weak = (decide.announce(p, decide.noise(p, outcomes)) for p in (
      dataclasses.replace(plan, effect=0.2),
      dataclasses.replace(plan, effect=0.01)))
  assert strong.enough and 'less than' not in strong.sentence
  assert not weak.enough and weak.power == weak.screen * weak.confirm
  assert 'less than the 80% that the plan wants' in weak.sentence
  none = decide.announce(plan, decide.noise(plan, []))
  assert none.power == 0 and 'fewer than 2 pairs' in none.sentence
