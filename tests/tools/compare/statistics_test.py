"""Intervals, p-values, power laws and speed-ups, beside scipy and statsmodels;
and the power that is announced, beside studies that were drawn."""

import json
import math
import warnings

import numpy as np
import pytest
from scipy import stats
import statsmodels.api as sm
from statsmodels.stats import contingency_tables
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from common.errors import RequestError
from tools.compare import items, statistics
from training.evals import items as eval_items

COMPUTE = np.geomspace(1e10, 1e13, 20)
KNOWN = 1e7  # degrees of freedom of a deviation that is known


def test_intervals_and_p_values_are_scipys():
  rng = np.random.default_rng(0)
  for n in (3, 5, 12):
    values = rng.normal(0.1, 0.3, n)
    test = stats.ttest_1samp(values, 0)
    _, low, high, seeds = statistics.student_interval(values)
    assert seeds == n
    assert (low, high) == pytest.approx(test.confidence_interval(0.95))
    assert statistics.student_p_value(values) == pytest.approx(test.pvalue)
  assert statistics.student_p_value([0.1, 0.2]) is None
  assert statistics.student_interval([0.1, 0.2]).low is None
  assert statistics.student_p_value([0.0] * 4) == 1
  # What has no spread has no interval, and the p of the sign test.
  assert statistics.student_p_value([1.0] * 4) == 1 / 8
  assert statistics.student_interval([1.0] * 4)[1:3] == (None, None)
  assert statistics.least_significant_mean(5, 0.05) == pytest.approx(
      (stats.t.isf(0.025, 4) / np.sqrt(5), 1 / 16))


def test_the_interval_of_shares_stays_inside_and_covers():
  """Of 2,000 means over three seeds, whose shares are of a Beta distribution:
  Student's interval covers less often, and passes 1."""
  shares = np.random.default_rng(0).beta(4.5, 0.5, (2000, 3))
  ours, plain = (np.array([of(x)[1:3] for x in shares]) for of in (
      statistics.logit_interval, statistics.student_interval))
  covers = lambda ends: np.mean((ends[:, 0] < 0.9) & (0.9 < ends[:, 1]))
  assert ours.min() > 0 and ours.max() < 1 < np.median(plain[:, 1])
  assert covers(ours) > 0.91 and covers(plain) < 0.88
  # Few runs that are nearly alike have Student's interval.
  assert statistics.logit_interval([0.5, 0.501, 0.502])[1:3] == pytest.approx(
      statistics.student_interval([0.5, 0.501, 0.502])[1:3], abs=1e-5)
  assert statistics.logit_interval([1.0] * 3)[1:3] == (None, None)


@pytest.mark.parametrize('n, cut', [(6, 0), (7, 0.2), (9, 0.2)])
def test_the_robust_test_is_scipys_permutation_of_a_trimmed_mean(n, cut):
  rng = np.random.default_rng(n)
  for shift in (0.0, 0.3, 2.0):
    values = rng.standard_t(2, n) + shift
    test = stats.permutation_test(
        (values,), lambda x, axis: stats.trim_mean(x, cut, axis=axis),
        permutation_type='samples', n_resamples=np.inf, vectorized=True)
    assert statistics.permutation_p_value(values) == pytest.approx(test.pvalue)
  assert statistics.permutation_p_value(values[:5]) is None
  # What differs at every seed can be told from nothing.
  assert statistics.permutation_p_value(np.arange(1.0, n + 1)) <= 0.05
  assert statistics.permutation_p_value([*values] * 4) <= 0.01


def test_equivalence_is_statsmodels_two_one_sided_tests():
  rng = np.random.default_rng(0)
  for shift in (0.0, 0.02, -0.2):
    values = rng.normal(shift, 0.05, 8)
    whole, (_, above, _), (_, below, _) = ttost_paired(
        values, np.zeros(8), -0.1, 0.1)
    p, not_larger = statistics.equivalence_p_values(values, 0.1, -1)
    assert (p, not_larger) == pytest.approx((whole, below))
    assert statistics.equivalence_p_values(values, 0.1,
                                           1)[1] == pytest.approx(above)
  assert statistics.equivalence_p_values([0.05] * 4, 0.1, 1)[0] == 1 / 16
  assert statistics.equivalence_p_values([0.2] * 4, 0.1, 1) == (1.0, 1 / 16)
  assert statistics.equivalence_p_values([0.1] * 2, 0.1, 1) == (None, None)


def _groups(rng, draw, variants=5, seeds=5):
  base = rng.normal(size=(seeds, 3))
  return [draw((seeds, 3)) - base for _ in range(variants)]


def test_normal_noise_looks_as_normal_as_it_says_and_tails_do_not():
  rng = np.random.default_rng(0)
  ps = lambda draw: [statistics.measure_noise_shape(_groups(rng, draw)).p
                     for _ in range(200)]
  normal = np.array(ps(lambda size: rng.normal(size=size)))
  for level in (0.05, 0.2):
    assert level / 3 < np.mean(normal <= level) < level + 0.04
  plateau = lambda size: rng.normal(size=size) + 50 * (rng.random(size) < 0.1)
  assert np.mean(np.array(ps(plateau)) <= 0.05) > 0.97
  skewed = lambda size: 3 * rng.exponential(size=size)
  assert np.mean(np.array(ps(skewed)) <= statistics.MAX_P_OF_IRREGULAR) > 0.7
  assert statistics.measure_noise_shape([np.zeros((5, 3))]) is None


def test_the_shape_of_noise_is_by_its_skewness_and_its_largest_value():
  """The first is scipy's, of values of one size; the second is how many median
  distances the farthest is from the mean. Two outliers that face each other
  show in the second alone."""
  x = np.random.default_rng(0).normal(size=24)
  x -= np.median(x)
  skew, largest = statistics._skewness_and_largest(x[:, None])
  assert skew == pytest.approx(abs(stats.skew(x)))
  assert largest == pytest.approx(
      np.abs(x - x.mean()).max() / np.median(np.abs(x)))
  plain = statistics.measure_noise_shape([x[:, None]])
  assert min(plain.skew, plain.outliers) > 0.05
  x[[np.argmin(x), np.argmax(x)]] = -12, 12
  faced = statistics.measure_noise_shape([x[:, None]])
  assert faced.skew > 0.05 and faced.outliers < 0.001


def test_the_spread_of_all_variants_is_statsmodels_and_never_says_more():
  """Each variant has a mean of its own: the residuals of that are pooled."""
  rng = np.random.default_rng(1)
  groups = _groups(rng, lambda size: 3 * rng.exponential(size=size))
  groups[0] = groups[0][:3]  # of which two seeds diverged
  shape = statistics.measure_noise_shape(groups)
  assert shape.p <= statistics.MAX_P_OF_IRREGULAR
  pooled = shape.pooled_deviation(lambda x: x.mean(1))
  values = [x.mean(1) for x in groups]
  each = np.repeat(np.eye(5), [*map(len, values)], 0)
  fit = sm.OLS(np.concatenate(values), each).fit()
  assert pooled == pytest.approx((fit.mse_resid ** 0.5, fit.df_resid))
  by_all = fit.t_test(np.eye(5))
  for x, p, ends in zip(values, by_all.pvalue, by_all.conf_int()):
    student, (_, low, high, _) = (stats.ttest_1samp(x, 0),
                                  statistics.student_interval(x, pooled))
    assert statistics.student_p_value(x, pooled) == pytest.approx(
        max(p, student.pvalue))
    assert high - low == pytest.approx(max(
        np.ptp(ends), np.ptp(student.confidence_interval(0.95))))
  # Runs without a value of the tail lie close together, and below the mean.
  close = [-0.1, -0.11, -0.12]
  far = statistics.PooledDeviation(0.3, 20)
  assert statistics.student_p_value(
      close, far) > 0.05 > statistics.student_p_value(close)
  assert statistics.student_interval(close, far).high > 0
  assert statistics.measure_noise_shape(
      [x for x in rng.normal(size=(5, 5, 3))]).pooled_deviation(
      lambda x: x.mean(1)) is None


def test_power_resampled_from_much_normal_noise_is_that_of_normal_noise():
  seen = np.random.default_rng(2).normal(0, 0.02, (2000, 3))
  sds = np.std(seen, axis=0, ddof=1)
  rule = dict(sd=float(np.std(seen.mean(1), ddof=1)), sds=sds, df=KNOWN,
              seeds=5, level=0.02)
  for effect in (0.015, 0.03):
    assert statistics.power_to_find(effect, **rule, seen=seen) == pytest.approx(
        statistics.power_to_find(effect, **rule), abs=0.03)
  assert statistics.simulate_false_positive_rate(seen[:, :1], sds[:1], 5,
                                                 0.05) == pytest.approx(
      0.05, abs=0.015)


def test_the_announced_error_is_that_of_the_test_that_is_used():
  """Of ten variants whose runs may end on a plateau: Student's test errs ten
  times as often at its level, and what is done of such noise does not."""
  seen, level = np.array([[0.01], [-0.02], [0.015], [1.0], [-0.012]]), 0.005
  rng = np.random.default_rng(6)
  shape = 300, 10, 5
  drawn = rng.choice(seen[:, 0], shape) * rng.choice((-1, 1), shape)
  student = stats.ttest_1samp(drawn, 0, axis=2).pvalue <= level
  used = []
  for study in drawn:
    noise = statistics.measure_noise_shape([x[:, None] for x in study])
    pooled = noise and noise.pooled_deviation(np.ravel)
    used += [statistics.student_p_value(x, pooled) <= level for x in study]
  announced = statistics.simulate_false_positive_rate(
      seen, seen.std(0, ddof=1), 5, level, 10)
  assert np.mean(student) > 3 * level
  assert announced == pytest.approx(np.mean(used), abs=0.004)
  assert announced < np.mean(student) / 3


def test_the_noise_of_documents_is_statsmodels_and_covers():
  """Of documents of unequal length; the mean of 2,000 such texts is where the
  interval says that it is."""
  rng = np.random.default_rng(3)
  sizes = np.round(rng.lognormal(5, 0.5, (2000, 60)))
  losses = 0.02 + rng.normal(0, 0.05, sizes.shape)  # of a token, by document
  fit = sm.WLS(losses[0], np.ones(60), weights=sizes[0]).fit(
      cov_type='HC1', use_t=True)
  one_seed = statistics.estimate_over_seeds_and_items(losses[:1], sizes[0])
  (low, high), = fit.conf_int()
  assert (one_seed.low, one_seed.high, one_seed.p) == pytest.approx(
      (low, high, fit.pvalues[0]))
  covered = [each.low < 0.02 < each.high for each in (
      statistics.estimate_over_seeds_and_items(x[None], n) for x,
      n in zip(losses, sizes))]
  assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize('seeds', [3, 5])
@pytest.mark.parametrize('of_seeds, of_items, rest', [
    (0.3, 0.05, 1), (0, 1, 0.3), (0.1, 0.5, 0.1), (0, 0, 1), (0.1, 0.5, 1)])
def test_the_interval_over_seeds_and_items_covers(
    seeds, of_seeds, of_items, rest):
  """Of 2,000 tables whose seeds and items both have effects."""
  rng, size = np.random.default_rng(5), (2000, seeds, 60)
  tables = (rng.normal(0.1, of_seeds, size[:2] + (1,))
            + rng.normal(0, of_items, (2000, 1, 60))
            + rng.normal(0, rest, size))
  intervals = [statistics.estimate_over_seeds_and_items(table)
               for table in tables]
  assert np.mean([x.low < 0.1 < x.high for x in intervals]) == pytest.approx(
      0.95, abs=0.02)


def test_a_table_has_the_mean_squares_of_statsmodels():
  rng = np.random.default_rng(6)
  table = rng.normal(size=(4, 1)) + rng.normal(size=30) + rng.normal(
      size=(4, 30))
  sides = [np.ones((120, 1)), np.repeat(np.eye(4), 30, 0),
           np.tile(np.eye(30), (4, 1))]
  fits = [sm.OLS(table.ravel(), np.hstack(sides[:n])).fit() for n in (1, 2, 3)]
  left, dfs = [fit.ssr for fit in fits], np.array([3, 29, 87])
  squares = np.append(-np.diff(left), left[-1]) / dfs
  assert fits[-1].df_resid == dfs[-1]
  variance = squares @ (1, 1, -1)
  df = variance ** 2 / (squares ** 2 / dfs).sum()
  assert squares[0] < variance and df > 3
  low, high = stats.t.interval(
      0.95, df, table.mean(), math.sqrt(variance / table.size))
  both = statistics.estimate_over_seeds_and_items(table)
  assert both[:3] == pytest.approx((table.mean(), low, high))
  # The p is that of the level at which the interval ends at 0.
  assert stats.t.isf(both.p / 2, df) * (high - table.mean()) == pytest.approx(
      abs(table.mean()) * stats.t.isf(0.025, df))
  assert statistics.estimate_over_seeds_and_items(table[:2])[1:] == (None,) * 3
  assert statistics.estimate_over_seeds_and_items(np.ones((4, 30)))[1:] == (
      None,) * 3
  assert statistics.estimate_over_seeds_and_items(table[:, :1])[1:] == (None,
                                                                        ) * 3


def test_paired_items_show_what_two_standard_errors_do_not(tmp_path):
  """As in issue 3831 of lm_eval and its mend: of 220 questions two models
  answer 140 and 122 rightly, and of 42 one alone does."""
  right = np.repeat([[0, 0], [0, 1], [1, 0], [1, 1]], [68, 12, 30, 110], 0).T
  for name, scores in zip('ab', right):
    folder = tmp_path / name / 'model'
    folder.mkdir(parents=True)
    (folder / 'results_now.json').write_text(json.dumps({'results': {
        'arc_easy': {'acc,none': scores.mean(), 'perplexity,none': 3.0}}}))
    (folder / 'samples_arc_easy_now.jsonl').write_text('\n'.join(json.dumps(
        {'filter': 'none', 'doc_hash': str(i), 'acc': x, 'perplexity': -1.0})
        for i, x in enumerate(scores.tolist())))
  row, = items.compare_items(str(tmp_path / 'b'), str(tmp_path / 'a'))
  error = np.sqrt(np.sum(right.mean(1) * (1 - right.mean(1)) / 219))
  unpaired = 2 * stats.norm.sf(row['effect'] / error)
  assert (f'{unpaired:.3f}', f'{row["p"]:.3f}') == ('0.080', '0.008')
  assert row['p'] == pytest.approx(contingency_tables.mcnemar(
      [[110, 30], [12, 68]], exact=True).pvalue)
  assert [row['low'], row['high']] == pytest.approx(
      [*stats.ttest_rel(*right).confidence_interval()])
  assert (row['figure'], row['base'], row['test']) == (
      'arc_easy/acc', pytest.approx(122 / 220), 'McNemar')
  assert '+0.0818 [+0.0247, +0.1390]  McNemar  0.0079' in items.render_rows(
      [row])
  assert statistics.mcnemar_p_value(right[0], right[0]) == 1


def test_runs_of_seeds_are_compared_over_seeds_and_items(tmp_path):
  """Some scores stand in eval.json, some are of the evaluation in training."""
  scores = np.random.default_rng(7).normal(size=(2, 3, 20))
  weights = np.arange(1.0, 21)
  for name, of_seeds in zip('ab', scores):
    for seed, losses_Q in enumerate(of_seeds):
      folder = tmp_path / name / f'seed-{seed}'
      folder.mkdir(parents=True)
      for file, task, scored in (
          ('eval.json', 'documents', {
              'loss': eval_items.record_scores(losses_Q, [1], weights)}),
          ('items.json', 'probe', {
              'accuracy': eval_items.record_scores(losses_Q, [seed]),
              'rows_right': eval_items.record_scores(losses_Q > 0, [name])})):
        (folder / file).write_text(json.dumps({
            'step': 8, task: {'items': scored}}))
  a, b = str(tmp_path / 'a'), str(tmp_path / 'b')
  row, = items.compare_items(a, b)
  table = statistics.estimate_over_seeds_and_items(scores[1] - scores[0],
                                                   weights)
  assert (row['effect'], row['low'], row['high'], row['p']) == pytest.approx(
      table)
  assert (row['figure'], row['items'], row['seeds']) == (
      'documents/loss', 20, 3)
  one = [row['figure'] for row in items.compare_items(
      f'{a}/seed-1', f'{b}/seed-1')]
  assert one == ['documents/loss', 'probe/accuracy']
  with pytest.raises(RequestError, match='no figure of the same items'):
    items.compare_items(f'{a}/seed-1/items.json', f'{b}/seed-2/items.json')
  with pytest.raises(RequestError, match='of the same seeds'):
    items.compare_items(a, f'{b}/seed-1')


def test_corrected_p_values_are_those_of_the_papers():
  # Holm 1979: the smallest times 4, the next times 3, ..., never falling.
  assert statistics.correct_p_values([0.01, 0.04, 0.03, 0.005]) == (
      pytest.approx([0.03, 0.06, 0.06, 0.02]))
  # Benjamini and Hochberg 1995: p_i m / i, from the largest down.
  assert statistics.correct_p_values([0.01, 0.04, 0.03, 0.005], 'bh') == (
      pytest.approx([0.02, 0.04, 0.04, 0.02]))
  # A test that could not be done is of the family.
  assert statistics.correct_p_values([0.2, None]) == [0.4, None]


@pytest.mark.parametrize('floor, scale, exponent', [
    (1.5, 300.0, 0.25), (0.0, 40.0, 0.1), (2.0, 1e6, 0.6)])
def test_power_law_finds_known_constants(floor, scale, exponent):
  law = statistics.fit_power_law(COMPUTE, floor + scale * COMPUTE ** -exponent)
  assert law.exponent == pytest.approx(exponent, rel=1e-3)
  assert law.floor == pytest.approx(floor, abs=1e-3)
  assert law.scale == pytest.approx(scale, rel=1e-2)
  assert law.rms < 1e-5


def test_power_law_is_scipys_least_squares_or_none():
  from scipy.optimize import curve_fit
  rng = np.random.default_rng(2)
  noisy = 1.5 + 300 * COMPUTE ** -0.25 + rng.normal(0, 0.01, len(COMPUTE))
  law = statistics.fit_power_law(COMPUTE, noisy)
  x = COMPUTE / 1e11
  fit, _ = curve_fit(lambda x, e, a, p: e + a * x ** -p, x, noisy,
                     p0=(1.5, 0.5, 0.25), xtol=1e-14, ftol=1e-14)
  np.testing.assert_allclose(law.loss(COMPUTE),
                             fit[0] + fit[1] * x ** -fit[2], atol=1e-5)
  few, losses = COMPUTE[:6], np.arange(6.0, 0, -1)
  assert statistics.fit_power_law(few, losses) is not None
  assert statistics.fit_power_law(few[:5], losses[:5]) is None
  assert statistics.fit_power_law(COMPUTE, np.linspace(1, 2, 20)) is None
  assert statistics.fit_power_law(COMPUTE, np.full(20, np.nan)) is None


def test_a_fit_whose_floor_would_be_negative_is_the_best_without_one():
  """No loss is below 0, so the fit of one that seems to fall there has the two
  other constants alone: scipy's, of these."""
  from scipy.optimize import curve_fit
  x, y = COMPUTE / 1e11, (COMPUTE / 1e11) ** -0.25 - 0.05
  law = statistics.fit_power_law(COMPUTE, y)
  (scale, exponent), _ = curve_fit(lambda x, a, p: a * x ** -p, x, y,
                                   p0=(1, 0.25), xtol=1e-14, ftol=1e-14)
  best = scale * x ** -exponent
  assert law.floor == 0
  assert law.exponent == pytest.approx(exponent, rel=1e-4)
  np.testing.assert_allclose(law.loss(COMPUTE), best, rtol=1e-5)
  assert law.rms == pytest.approx(np.sqrt(np.mean((y - best) ** 2)), rel=1e-3)


def _law(floor=1.5, factor=1.0):
  return statistics.fit_power_law(
      COMPUTE, floor + 300 * (COMPUTE / factor) ** -0.25)


def test_speed_up_is_the_factor_of_compute_within_what_was_fitted():
  law = _law()
  assert law.compute(float(law.loss(2e11))) == pytest.approx(2e11, rel=1e-3)
  for outside in (float(law.loss(2e13)), float(law.loss(1e9)), 1.0):
    assert law.compute(outside) is None
  for factor in (0.5, 0.8, 1.6):
    assert statistics.speed_up(_law(factor=factor), law) == pytest.approx(
        1 / factor, rel=1e-3)
  assert statistics.speed_up(_law(9.5), law) is None  # they do not meet
  pairs = [(_law(factor=f), law) for f in (0.5, 1.0, 2.0)]
  mean, error = statistics.mean_speed_up(pairs)
  assert mean.mean == pytest.approx(1.0, rel=1e-3)
  assert mean.low * mean.high == pytest.approx(1.0, rel=1e-3) and error < 1e-5
  assert statistics.mean_speed_up([*pairs, (None, law)]) == (None, None)


SPENT = 1e13 * 4.0 ** np.arange(3)


def _ladder(floor=1.5, exponent=0.15, factor=1.2, cost=1.1):
  """Compute and losses of a base and a variant, each as a law has it."""
  compute = np.stack([SPENT, SPENT * cost])
  return compute, floor + 1.5 * (compute * np.array([[1.0], [factor]])
                                 / SPENT[0]) ** -exponent


@pytest.mark.parametrize('floor, exponent, factor', [
    (1.5, 0.15, 1.2), (0.0, 0.3, 0.7), (2.5, 0.05, 1.0)])
def test_a_planted_multiplier_is_found(floor, exponent, factor):
  compute, losses = _ladder(floor, exponent, factor)
  for pinned in (None, floor):
    law, fitted = statistics.fit_compute_multiplier(compute, losses, pinned)
    assert (fitted, law.exponent) == pytest.approx((factor, exponent), rel=1e-3)
    assert law.floor == pytest.approx(floor, abs=0.02)
    np.testing.assert_allclose(law.loss(SPENT), losses[0], rtol=1e-5)
    np.testing.assert_allclose(
        statistics.multiplier_at_each_size(law, compute, losses), factor,
        rtol=1e-3)
  # What no compute of the base reaches has no multiplier, nor what lies far
  # beyond its sizes.
  for share, wanted in ((0.0, [np.nan] * 3), (
      8 ** -exponent, [8 / 1.1, 8 / 1.1, np.nan])):
    less = floor + share * (losses[0] - floor)
    np.testing.assert_allclose(statistics.multiplier_at_each_size(
        law, compute, np.stack([losses[0], less])), wanted, rtol=1e-3)
  assert statistics.fit_compute_multiplier(compute, losses[:, ::-1])[0] is None


def test_a_jackknife_of_a_mean_is_students_interval_and_a_ratios_is_its_own():
  rng = np.random.default_rng(0)
  x = rng.normal(2.0, 0.3, (6, 2))
  value, half = statistics.jackknife(x, lambda mean: np.array(
      [mean[0], np.log(mean[1] / mean[0])]))
  interval = stats.t.interval(0.95, 5, x[:, 0].mean(), stats.sem(x[:, 0]))
  assert (value[0] - half[0], value[0] + half[0]) == pytest.approx(interval)
  ratios = [np.log(np.delete(x[:, 1], i).mean() / np.delete(x[:, 0], i).mean())
            for i in range(6)]
  spread = np.sqrt(5 / 6 * np.sum((ratios - np.mean(ratios)) ** 2))
  assert half[1] == pytest.approx(stats.t.isf(0.025, 5) * spread)


def test_one_size_of_known_noise_has_statsmodels_power_and_seeds():
  for seeds, level in ((3, 0.05), (5, 0.01), (12, 0.05)):
    for wanted in (0.3, 0.8):
      effect = statistics.smallest_effect(wanted, 0.02, [0.02], KNOWN, seeds,
                                          level)
      assert TTestPower().power(effect / 0.02, seeds, level) == pytest.approx(
          wanted, abs=0.006)
  for effect in (0.01, 0.02, 0.06):
    needed = statistics.seeds_needed(effect, 0.8, 0.03, [0.03], KNOWN, 0.05)
    expected = TTestPower().solve_power(effect / 0.03, None, 0.05, 0.8)
    assert needed == max(np.ceil(expected), 3) or abs(
        needed / expected - 1) < 0.02
    assert statistics.power_to_find(effect, 0.03, [0.03], KNOWN, needed,
                                    0.05) >= 0.8


def test_noise_that_no_number_of_seeds_beats_is_said_to_be_so():
  assert statistics.seeds_needed(1e-6, 0.8, 1.0, [1.0], KNOWN, 0.05) is None
  assert statistics.smallest_effect(0.8, 1.0, [1.0], KNOWN, 2, 0.05) is None
  # More than half of what is run diverges, and 10 % may.
  assert statistics.smallest_effect(0.8, 1.0, [1.0], 9, 8, 0.05, rate=0.6,
                                    limit=0.1) is None


def test_just_the_share_of_runs_that_may_diverge_costs_nothing():
  """32 of 100 where 0.03 more than 0.29 may."""
  void = [np.isinf(statistics.simulate_least_effects(
      1.0, [1.0], 9, 100, 0.05, rate=0.29, limit=x)).sum()
          for x in (0.0299, 0.03, 0.0399)]
  assert void[0] > void[1] == void[2] > 0


@pytest.mark.parametrize('sds', [(0.02,), (0.05, 0.02, 0.03)])
def test_equivalence_is_shown_as_often_as_is_announced(sds):
  """By two tests of the mean over sizes, and by the mean at each size."""
  rng = np.random.default_rng(0)
  d = rng.normal(0, sds, (20_000, 5, len(sds)))
  p = np.max([stats.ttest_1samp(d.mean(2), end, axis=1, alternative=side).pvalue
              for end, side in ((-0.03, 'greater'), (0.03, 'less'))], axis=0)
  shown = (p <= 0.02) & (np.abs(d.mean(1)) < 0.03).all(1)
  sd = np.sqrt(np.sum(np.square(sds))) / len(sds)
  assert statistics.power_to_find(0.03, sd, sds, KNOWN, 5, 0.02,
                                  within=True) == (
      pytest.approx(np.mean(shown), abs=0.02))


def test_an_estimated_deviation_is_apart_from_the_noise_and_the_test():
  """Of sizes that share all noise: each of three draws is by itself."""
  rng = np.random.default_rng(0)
  z = rng.normal(size=400_000) / np.sqrt(5)
  seen, true = np.sqrt(rng.chisquare(4, (2, 400_000)) / 4)
  expected = (z + stats.t.isf(0.025, 4) * seen / np.sqrt(5)) / true
  least = statistics.simulate_least_effects(1.0, [1.0, 1.0], 4, 5, 0.05)
  np.testing.assert_allclose(*(np.quantile(x, (0.2, 0.5, 0.8, 0.95))
                               for x in (least, expected)), rtol=0.03)


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
                 & (ours <= (limit + rate) * seeds * sizes))


@pytest.mark.parametrize('sds, seeds, rate', [
    ((0.02, 0.02, 0.02), 5, 0.0), ((0.04, 0.02, 0.01), 8, 0.0),
    ((0.02, 0.02, 0.02), 8, 0.03)])
def test_sizes_that_must_agree_and_runs_that_diverge_cost_what_is_said(
    sds, seeds, rate):
  rule = dict(level=0.02, rate=rate, limit=0.1)
  for effect in (0.015, 0.03):
    sd = np.sqrt(np.sum(np.square(sds))) / len(sds)
    announced = statistics.power_to_find(effect, sd, sds, KNOWN, seeds, **rule)
    assert announced == pytest.approx(
        _drawn(sds, seeds, effect=effect, **rule), abs=0.03)
