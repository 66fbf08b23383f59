"""Intervals, power laws and speed-ups against independent oracles."""

import math

import numpy as np
import pytest

from tools.compare import statistics


def test_paired_interval_is_scipys():
  from scipy import stats
  rng = np.random.default_rng(0)
  for n in (3, 5, 12):
    ours = dict(enumerate(rng.normal(1.0, 0.3, n)))
    theirs = dict(enumerate(rng.normal(1.1, 0.3, n)))
    got = statistics.paired(ours, theirs)
    test = stats.ttest_rel(list(ours.values()), list(theirs.values()))
    low, high = test.confidence_interval(0.95)
    assert got.low == pytest.approx(low, rel=1e-9)
    assert got.high == pytest.approx(high, rel=1e-9)
    assert got.holds(0.0) == (test.pvalue > 0.05)


def test_interval_is_that_of_the_tables():
  # t(0.975, 2) = 4.303; 1, 2, 3 have mean 2 and standard deviation 1.
  got = statistics.interval([1.0, 2.0, 3.0])
  assert got.high - got.mean == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)


def test_only_seeds_that_both_have_are_paired():
  got = statistics.paired({0: 1.0, 1: 2.0, 5: 9.0}, {0: 0.5, 1: 1.5, 7: 3.0})
  assert got.seeds == 2 and got.mean == pytest.approx(0.5)
  assert statistics.paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize('seeds', [1, 2])
def test_few_seeds_know_no_noise(seeds):
  got = statistics.interval([0.0, 1.0][:seeds])
  assert not got.known and not got.holds(got.mean)
  assert statistics.verdict(got) == 'unknown'
  assert got.bar == (None if seeds == 1 else (0.0, 1.0))  # what is drawn


@pytest.mark.parametrize('values, word', [
    ([-0.1, -0.11, -0.09], 'better'), ([0.1, 0.11, 0.09], 'worse'),
    ([-0.1, 0.1, 0.05], 'noise')])
def test_verdict(values, word):
  assert statistics.verdict(statistics.interval(values)) == word


def test_interval_covers_as_often_as_it_says():
  rng = np.random.default_rng(1)
  hits = sum(statistics.interval(rng.normal(0, 1, 3)).holds(0.0)
             for _ in range(2000))
  assert 0.93 < hits / 2000 < 0.97


COMPUTE = np.geomspace(1e10, 1e13, 20)


@pytest.mark.parametrize('floor, scale, exponent', [
    (1.5, 300.0, 0.25), (0.0, 40.0, 0.1), (2.0, 1e6, 0.6)])
def test_power_law_finds_known_constants(floor, scale, exponent):
  law = statistics.power_law(COMPUTE, floor + scale * COMPUTE ** -exponent)
  assert law.exponent == pytest.approx(exponent, rel=1e-3)
  assert law.floor == pytest.approx(floor, abs=1e-3)
  assert law.scale == pytest.approx(scale, rel=1e-2)
  assert law.rms < 1e-5


def test_power_law_is_scipys_least_squares():
  from scipy.optimize import curve_fit
  rng = np.random.default_rng(2)
  noisy = 1.5 + 300 * COMPUTE ** -0.25 + rng.normal(0, 0.01, len(COMPUTE))
  law = statistics.power_law(COMPUTE, noisy)
  x = COMPUTE / 1e11
  found, _ = curve_fit(lambda x, e, a, p: e + a * x ** -p, x, noisy,
                       p0=(1.5, 0.5, 0.25), xtol=1e-14, ftol=1e-14)
  np.testing.assert_allclose(law.loss(COMPUTE),
                             found[0] + found[1] * x ** -found[2], atol=1e-5)


def test_power_law_refuses_what_it_cannot_fit():
  assert statistics.power_law(COMPUTE[:5], np.arange(5.0, 0, -1)) is None
  rising = np.linspace(1, 2, len(COMPUTE))
  assert statistics.power_law(COMPUTE, rising) is None
  lost = np.full(len(COMPUTE), np.nan)
  assert statistics.power_law(COMPUTE, lost) is None


def test_a_curve_is_not_read_outside_what_was_fitted():
  law = statistics.power_law(COMPUTE, 1.5 + 300 * COMPUTE ** -0.25)
  inside = float(law.loss(2e11))
  assert law.compute(inside) == pytest.approx(2e11, rel=1e-3)
  assert law.compute(float(law.loss(2e13))) is None
  assert law.compute(float(law.loss(1e9))) is None
  assert law.compute(1.0) is None


@pytest.mark.parametrize('factor', [0.5, 0.8, 1.0, 1.6])
def test_speed_up_is_the_factor_of_compute(factor):
  base = statistics.power_law(COMPUTE, 1.5 + 300 * COMPUTE ** -0.25)
  ours = statistics.power_law(
      COMPUTE, 1.5 + 300 * (COMPUTE / factor) ** -0.25)
  assert statistics.speed_up(ours, base) == pytest.approx(1 / factor, rel=1e-3)


def test_speed_up_of_curves_that_do_not_meet_is_unknown():
  base = statistics.power_law(COMPUTE, 1.5 + 300 * COMPUTE ** -0.25)
  worse = statistics.power_law(COMPUTE, 9.5 + 300 * COMPUTE ** -0.25)
  assert statistics.speed_up(worse, base) is None
  assert statistics.speed_up(None, base) is None


def test_ratios_have_a_geometric_mean():
  got = statistics.over_seeds([0.5, 1.0, 2.0])
  assert got.mean == pytest.approx(1.0)
  assert got.low * got.high == pytest.approx(1.0)


def test_p_values_are_scipys_and_agree_with_the_interval():
  from scipy import stats
  rng = np.random.default_rng(3)
  for n in (3, 5, 12):
    values = rng.normal(0.3, 0.3, n)
    got = statistics.p_value(values)
    assert got == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert statistics.interval(values).holds(0.0) == (got > 0.05)
  assert statistics.p_value([0.1, 0.2]) is None
  assert statistics.p_value([0.0] * 4) == 1
  assert statistics.p_value([1.0] * 4) == 1 / 8  # the sign test's


def test_corrected_p_values_are_those_of_the_papers():
  # Holm 1979: the smallest times 4, the next times 3, ..., never falling.
  assert statistics.corrected([0.01, 0.04, None, 0.03, 0.005]) == (
      pytest.approx([0.03, 0.06, None, 0.06, 0.02]))
  # Benjamini and Hochberg 1995: p_i m / i, from the largest down.
  assert statistics.corrected([0.01, 0.04, 0.03, 0.005], 'fdr_bh') == (
      pytest.approx([0.02, 0.04, 0.04, 0.02]))
  assert statistics.corrected([0.2]) == [0.2]
  assert statistics.corrected([None]) == [None]
