"""What a study says of known outcomes, beside scipy and statsmodels."""

import dataclasses
import itertools
import math
import random
import re

from hypothesis import given, settings, strategies
import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from tools.compare import advice, curves, decide, efficiency, phases
from tools.compare import statistics, tuning
from tools.compare import noise as noise_lib
from tools.compare import plan as plans
from training.evals import items

SIZES = ('s', 'm', 'l')
PARAMS = dict(zip(SIZES, (10_000, 100_000, 1_000_000)))
LOSS = plans.Measure('loss', 'text', 'loss', plans.LOWER, 5.5)
PLAN = plans.Plan(
    name='norms', question='which norm?', file='norms.py', base='base',
    variants=('a', 'b'), sizes=SIZES, workloads=('text', 'mqar'),
    measures=(LOSS, plans.Measure('mqar', 'mqar', 'probe/accuracy',
                                  plans.HIGHER, 0.0)),
    seeds=dict(noise=6, tune=3, screen=5, confirm=5),
    tuning=plans.Tuning({'optim.lr': (1e-3, 2e-3)}), effect=0.03,
    tuned_sizes=SIZES)


def _phase(name, values, workload='text', lost=()):
  """Outcomes of {variant: array [seed, size]}; `lost` holds (variant, seed,
  size) of those that diverged, by index."""
  first = phases.PHASES[name].block * phases.SEEDS_BETWEEN_PHASES
  measure = 'loss' if workload == 'text' else workload
  return [plans.Outcome(
      name, variant, SIZES[k], workload, first + s,
      {measure: 5.5 if (variant, s, k) in lost else float(array[s, k])},
      (variant, s, k) in lost, 1e9, 1.0, PARAMS[SIZES[k]], {})
          for variant, array in values.items()
          for s, k in np.ndindex(array.shape)]


def _values(seed=0, seeds=5, effects=(0.0, -0.05, 0.0), noise=0.02):
  """Returns {variant: [seed, size]} with a large common part."""
  rng = np.random.default_rng(seed)
  common = rng.normal(3.0, 0.5, (seeds, 3))
  return {name: common + effect + rng.normal(0, noise, (seeds, 3))
          for name, effect in zip(('base', 'a', 'b', 'c'), effects)}


def _confirm(values, plan=PLAN, **more):
  return decide.confirm_variants(plan, _phase('confirm', values, **more))


def test_the_confirmation_is_scipys_test_and_statsmodels_holm():
  values = _values()
  rows = _confirm(values)
  tests = [stats.ttest_1samp((values[v] - values['base']).mean(1), 0)
           for v in 'ab']
  holm = multipletests([t.pvalue for t in tests], method='holm')[1]
  for row, test, p in zip(rows, tests, holm):
    assert (row.p, row.p_corrected) == pytest.approx((test.pvalue, p))
    assert (row.low, row.high) == pytest.approx(test.confidence_interval())
    assert row.n == 5 and row.runs == 15
    apart = values[row.variant] - values['base']
    for size, d in zip(row.sizes, apart.T):
      assert (size.effect, size.p) == pytest.approx(
          (d.mean(), stats.ttest_1samp(d, 0).pvalue))
    slopes = [np.polyfit([4, 5, 6], d, 1)[0] for d in apart]
    trend = stats.ttest_1samp(slopes, 0)
    assert (row.trend.effect, row.trend.p, row.trend.low) == pytest.approx(
        (np.mean(slopes), trend.pvalue, trend.confidence_interval()[0]))
  assert [row.verdict for row in rows] == ['better', 'no difference shown']


RATES = (1e-3, 2e-3, 4e-3)


def _tuned_runs(tuning_losses, values, chosen):
  """Returns the runs of tuning, by {variant: losses [rate, seed, size]}, and
  those of the confirmation, each variant with the rate that was chosen."""
  runs = []
  for i, rate in enumerate(RATES):
    at_rate = {name: losses[i] for name, losses in tuning_losses.items()}
    runs += [run._replace(changes={'optim.lr': rate})
             for run in _phase('tune', at_rate)]
  return runs + [run._replace(changes={'optim.lr': chosen[run.variant]})
                 for run in _phase('confirm', values)]


def test_what_tuning_may_have_missed_is_in_p_and_interval(monkeypatch):
  """Beside numpy, which draws the true difference itself. Where a rate is at an
  edge of those that were tried, or two seeds chose it, there is no verdict."""
  monkeypatch.setattr(tuning, 'NUM_DRAWS', 20_000)
  rng = np.random.default_rng(5)
  plan = dataclasses.replace(PLAN, tuning=plans.Tuning({'optim.lr': RATES}))
  curve = np.array([0.02, 0.0, 0.01])[:, None, None]
  losses = {name: 3 + curve + rng.normal(0, 0.02, (3, 3, 3))
            for name in ('base', 'a', 'b')}
  values, chosen = _values(), dict.fromkeys(losses, RATES[1])
  runs = _tuned_runs(losses, values, chosen)
  row, other = decide.confirm_variants(plan, runs)

  # The noise at each size, with 4 degrees of freedom of each variant.
  tables = np.array([*losses.values()])
  residuals = (tables - tables.mean(1, keepdims=True)
               - tables.mean(2, keepdims=True)
               + tables.mean((1, 2), keepdims=True))
  deviations = np.sqrt((residuals ** 2).sum((0, 1, 2)) / 12)
  misses = {}
  for name in ('base', 'a'):
    scale = np.sqrt(12 / rng.chisquare(12, (200_000, 1, 3)) / 3) * deviations
    drawn = losses[name].mean(1) + scale * rng.normal(size=(200_000, 3, 3))
    misses[name] = (drawn[:, 1] - drawn.min(1)).mean(1)
  shifts = misses['a'] - misses['base']
  d = (values['a'] - values['base']).mean(1)
  true = (d.mean() - shifts
          - stats.sem(d) * rng.standard_t(len(d) - 1, len(shifts)))
  student = stats.ttest_1samp(d, 0)
  ends = [*np.quantile(true, (0.025, 0.975)), *student.confidence_interval()]
  assert (row.low, row.high) == pytest.approx((min(ends), max(ends)), rel=0.03)
  tail = min(np.mean(true <= 0), np.mean(true >= 0))
  assert row.p == pytest.approx(max(2 * tail, student.pvalue), rel=0.05)
  assert row.p > 1.2 * student.pvalue
  assert row.tuning_noise == pytest.approx(shifts.std(), rel=0.03)
  assert (row.verdict, other.verdict) == ('better', 'no difference shown')

  # A variant at an edge, and the base.
  for name, verdicts in (('a', [decide.AT_EDGE, other.verdict]),
                         ('base', [decide.AT_EDGE, decide.AT_EDGE])):
    rows = decide.confirm_variants(plan, _tuned_runs(
        losses, values, chosen | {name: RATES[2]}))
    assert [row.verdict for row in rows] == verdicts

  # Two seeds of tuning give none on what three do.
  by_two = {name: losses_of[:, :2] for name, losses_of in losses.items()}
  rows = decide.confirm_variants(
      dataclasses.replace(plan, seeds={**plan.seeds, 'tune': 2}),
      _tuned_runs(by_two, values, chosen))
  assert {row.verdict for row in rows} == {decide.TUNED_BY_FEW}


def test_a_rate_that_was_dropped_keeps_its_distance_from_the_best():
  values, means, num_seeds = tuning._losses_of_whole_runs({
      (1e-3,): {50: [2.0, 2.0], 100: [1.5, 1.5]},
      (2e-3,): {50: [1.9, 1.9], 100: [1.2, 1.2]},
      (4e-3,): {50: [2.4, 2.5]}, (8e-3,): {100: [1.4, 1.6]}})
  assert [rate for rate, in values] == [1e-3, 2e-3, 4e-3, 8e-3]
  assert means == pytest.approx([1.5, 1.2, 1.2 + 0.55, 1.5])
  assert num_seeds == 2


def test_the_deviation_of_a_run_is_pooled_over_tables_and_pairs():
  rng = np.random.default_rng(5)
  table, pairs = rng.normal(size=(3, 4)), rng.normal(3.0, 1.0, 6)
  by_pairs = tuning._deviation_of_run([], pairs)
  assert by_pairs == pytest.approx((np.std(pairs, ddof=1) / 2 ** 0.5, 5))
  # A model of a table with a mean for each row and each column.
  x = np.array([[1, *np.eye(3)[i], *np.eye(4)[j]]
                for i in range(3) for j in range(4)])
  _, (rest,), rank, _ = np.linalg.lstsq(
      x @ np.linalg.svd(x)[2][:6].T, table.ravel())
  sum_of_squares = rest + 5 * by_pairs.sd ** 2
  assert tuning._deviation_of_run([table, table[:1]], pairs) == pytest.approx(
      ((sum_of_squares / 11) ** 0.5, 12 - rank + 5))


def test_noise_is_measured_at_each_size_on_each_workload():
  rng = np.random.default_rng(11)
  losses = {}  # by workload and variant: [rate, seed, size]
  runs = []
  for workload, noise in (('text', 0.01), ('mqar', 0.1)):
    losses[workload] = {
        name: rng.normal(0.5, noise * np.array([1, 2, 3]), (3, 3, 3))
        for name in ('base', 'a')}
    for rate, losses_at_rate in enumerate(zip(*losses[workload].values())):
      by_variant = dict(zip(losses[workload], losses_at_rate))
      for run in _phase('tune', by_variant, workload):
        runs.append(run._replace(changes={'optim.lr': RATES[rate]}))
  measured = tuning.read_tuning_runs(PLAN, runs).deviations
  assert set(measured) == set(itertools.product(SIZES, losses))
  for (size, workload), deviation in measured.items():
    tables = [losses_of[:, :, SIZES.index(size)]
              for losses_of in losses[workload].values()]
    assert deviation == pytest.approx(tuning._deviation_of_run(tables, []))


def test_items_are_compared_by_the_mean_of_sizes_of_each_seed():
  rng, tokens = np.random.default_rng(4), [10.0, 30.0, 20.0, 25.0]
  losses = {}

  def with_documents(x):
    scores = losses[x.variant, x.size, x.seed] = rng.normal(3, 0.1, 4)
    record = items.record_scores(scores, tokens, tokens)
    return x._replace(items={'loss': record})

  outcomes = [*map(with_documents, _phase(
      'confirm', _values(), lost=[('b', 0, 0)]))]
  verdicts = decide.confirm_variants(PLAN, outcomes)
  seeds = sorted({x.seed for x in outcomes})
  for row, subset in zip(verdicts, (seeds, seeds[1:])):
    table = np.array([np.mean(
        [losses[row.variant, size, seed] - losses['base', size, seed]
         for size in SIZES], 0) for seed in subset])
    # Seeds and items together say no more than the seeds alone.
    crossed = statistics.estimate_over_seeds_and_items(table, tokens)
    half = max(crossed.high - crossed.mean, row.high - row.effect)
    assert (row.both.effect, row.both.high - row.both.effect, row.both.p
            ) == pytest.approx((crossed.mean, half, max(crossed.p, row.p)))
    assert row.both.effect - row.both.low == pytest.approx(half)
    alone = statistics.estimate_over_seeds_and_items(table.mean(0)[None],
                                                     tokens)
    assert row.item_noise == pytest.approx((alone.high - alone.low) / 2)
  # Where they are not the same, or not known, nothing is said.
  other = items.record_scores([1.0] * 4, tokens[::-1], tokens[::-1])
  for first in ({'loss': other}, {}):
    row = decide.confirm_variants(PLAN, [outcomes[0]._replace(items=first),
                                         *outcomes[1:]])[0]
    assert (row.both, row.item_noise) == (None, None)


def test_measures_go_on_by_their_signal_to_noise():
  """Of a measure that rises by 1 from size to size, with a deviation of 0.1;
  and of one that is noise alone."""
  rng, plan = np.random.default_rng(8), dataclasses.replace(
      PLAN, least_snr=5.0, measures=(PLAN.primary, *(
          plans.Measure(name, 'text', f't/{name}', 'higher', 0.0)
          for name in ('rises', 'noise'))))
  outcomes = [
      x._replace(values=x.values | {
          'rises': SIZES.index(x.size) + rng.normal(0, 0.1),
          'noise': rng.normal()})
      for phase, names in (('noise', ('base', plans.SECOND_BASE)), (
          'confirm', ('base', *PLAN.variants)))
      for x in _phase(phase, {name: rng.normal(size=(5, 3)) for name in names})]
  rows = noise_lib.measure_noise(plan, outcomes)
  snr = {row.measure: row.snr for row in rows}
  values = np.array([[x.values['rises'] for x in outcomes if x.phase == 'noise'
                      and x.size == size] for size in SIZES])
  assert snr['rises'] == pytest.approx(np.ptp(values.mean(1)) / np.sqrt(
      np.var(values, axis=1, ddof=1).mean()))
  assert snr['rises'] > 15 and snr['noise'] < 2
  going = noise_lib.drop_noisy_measures(plan, snr)
  assert [m.name for m in going.measures] == ['loss', 'rises']
  assert going.workloads == ('text',)
  # What does not go on is not in what the others are corrected by.
  assert {row.level for row in rows if (row.measure, row.phase) == (
      'rises', 'confirm')} == {plan.alpha / len(plan.variants)}
  assert {row.measure for row in decide.confirm_variants(going, outcomes)} == {
      'loss', 'rises'}
  alone = dataclasses.replace(plan, least_snr=None)
  assert noise_lib.drop_noisy_measures(alone, snr).measures == alone.measures


def test_the_screening_is_scipys_test_at_the_smallest_size():
  values = _values(effects=(0, -0.05, 0.1, 0.02))
  verdicts = decide.screen_variants(
      dataclasses.replace(PLAN, variants=('a', 'b', 'c')),
                        _phase('screen', values))
  tests = [stats.ttest_rel(values[v][:, 0], values['base'][:, 0])
           for v in 'abc']
  qs = stats.false_discovery_control([t.pvalue for t in tests], method='bh')
  for row, test, q in zip(verdicts, tests, qs):
    assert (row.p, row.p_corrected) == pytest.approx((test.pvalue, q))
    assert (row.verdict == decide.PASSED) == (q <= 0.05)
    assert (row.low, row.high) == pytest.approx(test.confidence_interval())


def test_what_is_better_and_what_is_corrected_together():
  loss, accuracy = (_values(effects=(0, -0.05, 0.05)) for _ in range(2))
  outcomes = _phase('confirm', loss) + _phase('confirm', accuracy, 'mqar')
  rows = decide.confirm_variants(PLAN, outcomes)
  assert {(row.measure, row.variant): row.verdict for row in rows} == {
      ('loss', 'a'): 'better', ('loss', 'b'): 'worse',
      ('mqar', 'a'): 'worse', ('mqar', 'b'): 'better'}
  for few in (rows[:2], rows[2:]):
    assert [row.p_corrected for row in few] == pytest.approx(list(multipletests(
        [row.p for row in few], method='holm')[1]))
  # What has no spread has the p of the sign test.
  solved = {'base': np.zeros((5, 3)), 'a': np.ones((5, 3)),
            'b': np.zeros((5, 3))}
  rows = decide.confirm_variants(PLAN, _phase('confirm', loss) + _phase(
      'confirm', solved, 'mqar'))
  assert [row.p for row in rows[2:]] == [2 ** -4, 1.0]


def test_sizes_that_point_apart_are_no_verdict():
  values = _values(noise=0.001)
  values['a'][:, 2] = values['base'][:, 2] + 0.01
  row, _ = _confirm(values)
  assert row.p_corrected < 0.05
  assert row.verdict == 'sizes disagree' and row.trend.low > 0


def test_a_run_that_diverged_is_counted_and_is_in_no_mean():
  values = _values(seeds=8)
  row, other = _confirm(values, lost={('a', 0, 1)})
  kept = (values['a'] - values['base'])[1:].mean(1)
  assert row.n == 7
  assert row.p == pytest.approx(stats.ttest_1samp(kept, 0).pvalue)
  assert (row.diverged, row.base_diverged, row.runs) == (1, 0, 24)
  assert [size.n for size in row.sizes] == [8, 7, 8]
  assert row.verdict == 'better' and other.n == 8
  # A run of the base takes that seed from every variant.
  assert [x.n for x in _confirm(values, lost={('base', 3, 0)})] == [7, 7]


@pytest.mark.parametrize('whose', ['a', 'base'])
def test_a_run_that_diverged_is_in_no_screening(whose):
  values = _values(seeds=8)
  plan = dataclasses.replace(PLAN, unstable=0.5)
  row, _ = decide.screen_variants(
      plan, _phase('screen', values, lost={(whose, 3, 0)}))
  kept = np.delete(values['a'] - values['base'], 3, 0)[:, 0]
  assert (row.n, row.runs, row.diverged, row.base_diverged) == (
      7, 8, whose == 'a', whose == 'base')
  assert row.p == pytest.approx(stats.ttest_1samp(kept, 0).pvalue)
  assert row.p < 0.01 and row.verdict == decide.PASSED


@pytest.mark.parametrize('seeds, lost, share', [
    (8, 3, 0.125), (8, 3, 0.2), (8, 3, 0.1249), (100, 87, 0.29),
    (100, 123, 0.41)])
def test_just_the_share_of_runs_that_may_diverge_may(seeds, lost, share):
  """Also where the share of so many runs, in floating point, is less: 0.41 of
  300 is 122.99999999999999."""
  values = _values(seeds=seeds)
  gone = [divmod(i, 3) for i in range(lost)]
  every = {('a', s, k) for s, k in gone}
  plan = dataclasses.replace(PLAN, unstable=share, alpha=1e-60)
  row, _ = _confirm(values, plan, lost=every)
  enough = lost <= round(3 * seeds * share, 6)
  assert (row.verdict == 'unstable') != enough and row.diverged == lost
  # The same share of the runs at one size.
  lost //= 3
  row, _ = decide.screen_variants(plan, _phase('screen', values, lost={
      ('a', s, 0) for s in range(lost)}))
  assert row.verdict == (decide.PASSED if enough else decide.STOPPED_UNSTABLE)
  # As many of the base's runs, and of another phase's, are no fault of a.
  both = every | {('base', s, k) for s, k in gone}
  assert _confirm(values, plan, lost=both)[0].verdict != 'unstable'
  for phase, base_share in (('noise', 0.5), ('tune', 0.0)):  # rates are tried
    outcomes = _phase('confirm', values) + _phase(
        phase, values,
        lost={('base', s, k) for s, k in np.ndindex(seeds, 3)})
    assert decide._diverged_share_of_base(
        plan, outcomes, plan.primary) == base_share


@pytest.mark.parametrize('alpha, q', [(0.001, 0.2), (0.2, 0.001)])
def test_the_confirmation_errs_by_alpha_and_the_screening_by_q(alpha, q):
  plan = dataclasses.replace(PLAN, alpha=alpha, q=q)
  values = _values(seed=8)
  row, _ = _confirm(values, plan)
  assert 0.001 < row.p_corrected < 0.2
  assert (row.verdict == 'better') == (alpha == 0.2)
  row, _ = decide.screen_variants(plan, _phase('screen', values))
  assert 0.001 < row.p_corrected < 0.2
  assert (row.verdict == decide.PASSED) == (q == 0.2)
  levels = {row.phase: row.level for row in noise_lib.measure_noise(plan, [])
            if row.measure == 'loss'}
  assert levels == dict(screen=q / 2, confirm=alpha / 2)
  # Diverging more often than the base is of the confirmation: 6 to none.
  plan = dataclasses.replace(plan, unstable=1.0)
  row, _ = _confirm(_values(seeds=40), plan, lost={
      ('a', s, 0) for s in range(6)})
  assert row.p_diverged == pytest.approx(2 * 0.5 ** 6)
  assert row.verdict == ('unstable' if alpha == 0.2 else 'better')


def test_a_margin_makes_verdicts_of_what_is_not_different():
  """By two one-sided tests, each corrected by Holm, and at each size."""
  plan = dataclasses.replace(PLAN, margin=0.05)
  values = _values(seeds=8, effects=(0.0, 0.0, 0.02), noise=0.02)
  rows = _confirm(values, plan)
  means = [(values[v] - values['base']).mean(1) for v in 'ab']
  for name, ps in (('p_equivalent', [max(
      stats.ttest_1samp(d, -0.05, alternative='greater').pvalue,
      stats.ttest_1samp(d, 0.05, alternative='less').pvalue) for d in means]),
                   ('p_not_worse', [stats.ttest_1samp(
                       d, 0.05, alternative='less').pvalue for d in means])):
    assert [getattr(row, name) for row in rows] == pytest.approx(
        list(multipletests(ps, method='holm')[1]))
  assert rows[0].verdict == decide.EQUIVALENT
  noise = _noise((0.03,) * 3, 8, np.random.default_rng(3))
  announced = noise_lib.announce_power(
      plan, noise_lib.measure_noise(plan, noise))
  assert ('equivalent within 0.05 with a probability of 9'
          in announced.sentence)
  # It is rarer than a difference as large as the margin is found.
  noise = _noise((0.05,) * 3, 8, np.random.default_rng(3))
  wider = dataclasses.replace(plan, effect=0.05)
  row = noise_lib.measure_noise(wider, noise)[0]
  assert 0.05 < row.power_within < row.power - 0.05 < 0.9
  assert _confirm(values)[0].verdict == 'no difference shown'
  # Where one size lies outside, it is no worse at most.
  values['a'][:, 0] += 0.09
  values['a'][:, 2] -= 0.09
  assert _confirm(values, plan)[0].verdict == decide.NOT_WORSE
  # What is no worse passes the screening, though no difference is shown.
  values = _values(seeds=8, effects=(0.0, 0.0, 0.2))
  screened = [[row.verdict for row in decide.screen_variants(each, _phase(
      'screen', values))] for each in (plan, PLAN)]
  assert screened == [[decide.PASSED] * 2, [decide.STOPPED, decide.PASSED]]


def test_a_variant_whose_runs_lie_together_by_chance_is_not_better():
  """Half of the seeds that the variants share end on a plateau, but none of
  a's: its own differences alone would make it better."""
  values = _values(seeds=8, effects=(0.0, -0.15, 0.0, 0.0), noise=0.005)
  plan = dataclasses.replace(PLAN, variants=('a', 'b', 'c'))
  values['b'][[0, 3], 1] += 1
  values['c'][2] += 1
  row, *others = _confirm(values, plan)
  alone, = _confirm({name: values[name] for name in ('base', 'a')}, plan)
  assert alone.verdict == 'better' and row.p_shape < 0.01
  d = np.array([values[name] - values['base'] for name in 'abc'])
  spread = np.sqrt(np.var(d.mean(2), axis=1, ddof=1).mean() / 8)
  t = stats.t(21)
  assert row.p == pytest.approx(2 * t.cdf(d[0].mean() / spread))
  assert (row.high, row.verdict) == (
      pytest.approx(d[0].mean() + t.isf(0.025) * spread), decide.NONE_SHOWN)
  # Beside its median distance, no size is less uneven than all are.
  median = np.median(np.abs(d - d.mean(1, keepdims=True)), axis=(0, 1))
  uneven = np.var(d, axis=1, ddof=1).mean(0) / median ** 2
  assert uneven.min() < uneven.mean() / 2
  assert [(size.high - size.effect) * np.sqrt(8) / t.isf(0.025)
          for size in row.sizes] == pytest.approx(
              median * np.sqrt(np.maximum(uneven, uneven.mean())))
  row = decide.screen_variants(plan, _phase('screen', {
      name: x[:, 1:2] for name, x in values.items()}))[0]
  assert row.verdict == decide.STOPPED


def test_too_few_seeds_say_nothing():
  row, _ = _confirm(_values(seeds=2))
  assert (row.p, row.low, row.verdict) == (None, None, 'no difference shown')
  row, _ = _confirm(_values(), lost={('base', s, 0) for s in range(5)})
  assert (row.n, row.effect, row.p, row.trend) == (0, None, None, None)
  assert row.verdict == 'no difference shown'
  assert not decide.confirm_variants(PLAN, [])


@pytest.mark.parametrize('plateau, miss', [(0.0, 0.0), (1.0, 0.0), (0.0, 0.1)])
def test_over_seeds_and_items_nothing_is_surer_than_over_seeds_alone(
    plateau, miss, monkeypatch):
  """Nor where a run on a plateau of another variant widens that, or tuning
  that may have missed, which does so at one end."""
  rng = np.random.default_rng(1)
  misses = miss * np.abs(rng.normal(size=(500, 3)))
  monkeypatch.setattr(decide, '_draw_misses', lambda **kwargs: misses)
  values = _values(seeds=8, noise=0.01)
  values['b'][0] += plateau
  scores = {name: x[..., None] + rng.normal(0, 1e-4, (8, 3, 40))
            for name, x in values.items()}
  outcomes = []
  for x in _phase('confirm', values):
    at = scores[x.variant][x.seed % 1000, SIZES.index(x.size)]
    record = items.record_scores(at, range(40))
    outcomes.append(x._replace(items={'loss': record}))
  for row in decide.confirm_variants(PLAN, outcomes):
    assert (row.p_shape < 0.05) == (plateau > 0)
    both = row.both
    assert both.effect - both.low >= row.effect - row.low - 1e-12
    assert both.high - both.effect >= row.high - row.effect - 1e-12
    assert row.both.p >= row.p and row.both.n == 40


def test_each_p_is_corrected_over_its_family_and_divergence_by_holm():
  ps = (0.01, 0.03, 0.04, 0.2)
  corrected = decide._correct_family([decide.PValues(p, p) for p in ps], 'bh')
  for name, method in (('p', 'fdr_bh'), ('p_diverged', 'holm')):
    assert [getattr(row, name) for row in corrected] == pytest.approx(
        multipletests(ps, method=method)[1])


def test_no_more_power_is_promised_than_there_is():
  assert 'with a probability of 76% or more' in noise_lib._describe_power(
      PLAN, screen_power=0.9, confirm_power=0.85)  # 76.5 %


def test_a_loss_is_warm_from_where_the_rate_is_at_its_height():
  config = {'data.batch_ramp': '20:4', 'data.batch_size': 8, 'train.steps': 40,
            'optim.warmup_steps': 20}
  curve = curves.curve_from_rows(
      [{'split': 'eval', 'step': n, 'loss': 1.0} for n in (19, 20, 40)],
      'eval', 'loss', config, tokens=2400, flops_per_token=6.0)
  assert curve['warm'] == [False, True, True]
  assert curve['tokens'] == [760, 800, 2400]  # in proportion to rows


def test_a_speed_up_is_the_factor_of_what_is_spent():
  spent = np.geomspace(1e10, 1e13, 20)
  rng = np.random.default_rng(0)
  outcomes = []
  for variant, factor in (('base', 1.0), ('a', 0.5)):
    for x in _phase('confirm', {variant: np.full((3, 3), 2.0)}):
      flops = spent * factor * np.exp(rng.normal(0, 0.01))
      # What came before the learning rate was at its height is in no law.
      loss = np.where(np.arange(20) < 4, 5.5, 1.5 + 300 * spent ** -0.25)
      outcomes.append(x._replace(curve={
          'flops': flops.tolist(), 'seconds': (flops * 3e-11).tolist(),
          'loss': loss.tolist(), 'warm': [i > 3 for i in range(20)]}))
  row, = decide.confirm_variants(PLAN, outcomes)
  assert [(x.size, x.by) for x in row.speed_ups] == [
      (size, by) for size in SIZES for by in ('flops', 'seconds')]
  for x in row.speed_ups:
    assert x.low < x.factor < x.high and x.factor == pytest.approx(2, rel=0.05)
    assert x.fit_error < 0.01
  # Runs of one program have one time, which says nothing of how it varies.
  together = [x._replace(shares_clock=True) for x in outcomes]
  for x in decide.confirm_variants(PLAN, together)[0].speed_ups:
    assert x.factor == pytest.approx(2, rel=0.05)
    assert (x.low is None) == (x.high is None) == (x.by == 'seconds')
  broken = [x if x.seed != 30_001 else x._replace(
      curve=x.curve | {'seconds': [None] * 20}) for x in outcomes]
  assert all((x.factor is None) == (x.by == 'seconds')
             for x in decide.confirm_variants(PLAN, broken)[0].speed_ups)


def _cooled(factors=(1.0, 1.25), **changes):
  """A confirmation whose losses are laws of the FLOPs, with noise."""
  rng, spent = np.random.default_rng(3), 1e12 * 6.0 ** np.arange(3)
  common = rng.normal(0, 0.02, (5, 3))
  values = {name: 1.2 + 2.0 * (factor * spent / 1e12) ** -0.2 + common
            + rng.normal(0, 0.002, (5, 3))
            for name, factor in zip(('base', 'a', 'b'), factors)}
  return [x._replace(**dict(flops=spent[k], body=0.75, cooled=True) | changes)
          for x in _phase('confirm', values) for k in [SIZES.index(x.size)]]


def test_multipliers_are_of_runs_that_were_cooled_down():
  row, = decide.confirm_variants(PLAN, _cooled())
  names = ('multiplier', 'multiplier, pinned', 'multiplier, no embeddings',
           'multiplier, no embeddings, pinned')
  assert [(x.by, x.size) for x in row.multipliers] == [
      (name, size) for name in names for size in (decide.ALL_SIZES, *SIZES)]
  for x in row.multipliers:
    assert x.low < x.factor < x.high
    if x.by.endswith('pinned'):
      assert x.floor == 0
    else:
      assert x.low < 1.25 < x.high and x.floor > 0.5
  pinned, = decide.confirm_variants(
      dataclasses.replace(PLAN, floor=1.2), _cooled())
  assert pinned.multipliers[4].floor == 1.2
  # By less that both spend alike, the multiplier is the same.
  assert row.multipliers[8].factor == pytest.approx(
      row.multipliers[0].factor, rel=1e-3)
  row, = decide.confirm_variants(PLAN, _cooled(body=None))
  assert {x.by for x in row.multipliers} == {*names[:2]}
  for cooled in (False, None):
    assert not decide.confirm_variants(PLAN, [
        *_cooled()[:-1], _cooled()[-1]._replace(cooled=cooled)])[0].multipliers


def test_the_largest_size_is_predicted_by_the_law_of_the_others():
  plan = dataclasses.replace(PLAN, largest='xl',
                             seeds=PLAN.seeds | {'largest': 5})
  flops = dict.fromkeys(('base', 'a', 'b'), 1e12 * 6.0 ** 3)
  loss = lambda factor: 1.2 + 2.0 * (factor * 6.0 ** 3) ** -0.2
  base, a, b = efficiency.predict_largest_size(
      plan, _cooled((1.0, 1.25, 0.8)), flops)
  assert [x['variant'] for x in (base, a, b)] == ['base', 'a', 'b']
  for x, truth in ((base, loss(1.0)), (a, loss(1.25) - loss(1.0)),
                   (b, loss(0.8) - loss(1.0))):
    assert x['low'] < truth < x['high']
  assert a['high'] < 0 < b['low']
  # Fewer seeds that will be seen are a wider interval.
  few = efficiency.predict_largest_size(dataclasses.replace(
      plan, seeds=plan.seeds | {'largest': 1}), _cooled(), flops)[1]
  assert few['value'] == pytest.approx(a['value'], rel=0.2)
  assert few['high'] - few['low'] > a['high'] - a['low']
  assert not efficiency.predict_largest_size(plan, [x._replace(cooled=None)
                                                    for x in _cooled()], flops)


def test_the_most_promising_of_the_stopped_look_better_than_the_base():
  rows = [dataclasses.replace(row, verdict=verdict, effect=effect)
          for row in decide.screen_variants(
              PLAN, _phase('screen', _values()))[:1]
          for verdict, effect in (
              (decide.STOPPED, -0.01), (decide.STOPPED, -0.03),
              (decide.STOPPED, 0.04), (decide.PASSED, -0.5),
              (decide.STOPPED_UNSTABLE, -0.5), (decide.STOPPED, None))]
  rows = [dataclasses.replace(row, variant=str(i))
          for i, row in enumerate(rows)]
  assert decide.list_promising_variants(PLAN, rows) == ['1', '0']
  accuracy = dataclasses.replace(PLAN, measures=PLAN.measures[1:])
  assert decide.list_promising_variants(accuracy, rows) == ['2']


def _noise(sds, seeds, rng, plan=PLAN):
  return _phase('noise', {name: rng.normal(
      3, np.array(sds) / np.sqrt(2), (seeds, 3))
                          for name in ('base', plans.SECOND_BASE)})


def test_noise_rows_are_the_deviations_of_the_pairs():
  measures = (LOSS, *(plans.Measure(name, 'text', name, plans.LOWER, 5.5)
                      for name in 'xyz'))
  plan = dataclasses.replace(PLAN, measures=measures)
  outcomes = [x._replace(values=dict.fromkeys(
      (m.name for m in measures), x.values['loss'])) for x in _noise(
          (0.04, 0.02, 0.02), 6, np.random.default_rng(4))]
  rows = {(row.measure, row.size, row.phase): row
          for row in noise_lib.measure_noise(plan, outcomes)}
  values = {x: np.reshape([y.values['loss'] for y in outcomes
                           if y.variant == x], (6, 3))
            for x in ('base', plans.SECOND_BASE)}
  d = values[plans.SECOND_BASE] - values['base']
  for size, apart in (*zip(SIZES, d.T), (decide.ALL_SIZES, d.mean(1))):
    row = rows['loss', size, 'confirm']
    assert row.sd == pytest.approx(np.std(apart, ddof=1))
  assert (row.level, row.pairs) == (0.025, 6)
  rule = dict(sd=row.sd, sds=np.std(d, 0, ddof=1), df=5, seeds=5, level=0.025)
  assert row.smallest_effect == statistics.smallest_effect(0.8, **rule)
  assert not noise_lib.is_irregular(row) and row.error is None
  # An outlier: what is announced is resampled, and says so.
  far = [x._replace(values=dict.fromkeys(x.values, 4.0))
         if x is outcomes[0] else x for x in outcomes]
  apart = next(x for x in noise_lib.measure_noise(plan, far)
               if (x.measure, x.size) == ('loss', decide.ALL_SIZES))
  assert apart.outliers < 0.01 and apart.error is not None
  assert apart.smallest_effect > 2 * row.smallest_effect
  assert 'does not look normal' in noise_lib.announce_power(
      plan, noise_lib.measure_noise(plan, far)).sentence
  # Two variants, and three measures beside the primary one.
  assert rows['y', decide.ALL_SIZES, 'confirm'].level == 0.05 / (2 * 3)
  assert rows['y', 's', 'screen'].level == 0.05 / 2
  assert rows['y', decide.ALL_SIZES, 'confirm'].smallest_effect > (
      1.1 * row.smallest_effect)


def test_a_study_that_cannot_find_what_it_wants_says_so():
  outcomes = _noise((0.02,) * 3, 6, np.random.default_rng(3))
  plan = dataclasses.replace(PLAN, measures=(LOSS,))
  strong, weak = (
      noise_lib.announce_power(p, noise_lib.measure_noise(p, outcomes))
      for p in (dataclasses.replace(plan, effect=0.2),
                dataclasses.replace(plan, effect=0.01)))
  smaller = dataclasses.replace(plan, effect=0.03)
  rows = noise_lib.measure_noise(smaller, outcomes)
  assert noise_lib.announce_power(smaller, rows).power == math.prod(
      row.power for row in rows if row.phase == 'screen'
      or row.size == decide.ALL_SIZES) < 0.9
  assert strong.enough and 'less than' not in strong.sentence
  assert not weak.enough and weak.power < 0.8 <= strong.power
  assert 'less than the 80% that the plan wants' in weak.sentence
  assert ('none of the 10 of the screening does with a probability of 0.35, so '
          'that its false discovery rate is up to 0.4 then') in weak.sentence
  none = noise_lib.announce_power(plan, noise_lib.measure_noise(plan, []))
  assert none.power == 0 and 'fewer than 2 pairs' in none.sentence


def test_factors_of_noise_hold_what_is_true():
  """Of pairs whose correlation is known, and of spreads whose quotient is; the
  ends of an interval are where Pitman's and Morgan's test has p = 0.05."""
  rng, covered = np.random.default_rng(4), []
  for r in (-0.5, 0.9):
    for _ in range(400):
      x, y = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], 5).T
      pairing = advice.gain_of_pairing(x, y)
      assert pairing.factor == pytest.approx(np.sqrt(
          (np.var(x) + np.var(y)) / np.var(x - y)))
      more = advice.gain_over_same_pairs('', 2 * x, y)
      covered.append((pairing.low < (1 - r) ** -0.5 < pairing.high,
                      more.low < 2 < more.high))
  assert np.mean(covered, 0) == pytest.approx(0.95, abs=0.03)
  for end in (more.low, more.high):
    assert stats.pearsonr(2 * x + end * y, 2 * x - end * y).pvalue == (
        pytest.approx(0.05))


def _crossed(rng, start, order, rest, seeds, sizes=3, studies=()):
  """Runs of the noise phase whose deviations are known: base and again, each
  [*studies, sizes, seeds]; again has the start of the base of the next seed."""
  starts = start * rng.normal(size=(*studies, sizes, seeds + 1))
  orders = order * rng.normal(size=(*studies, 1, seeds))
  eps = rest * rng.normal(size=(2, *studies, sizes, seeds))
  return starts[..., :-1] + orders + eps[0], starts[..., 1:] + orders + eps[1]


@pytest.mark.parametrize('deviations', [
    (0.03, 0.05, 0.01), (0.0, 0.04, 0.0), (0.02, 0.0, 0.03)])
def test_the_split_of_the_variance_is_the_true_one(deviations):
  rng, truth = np.random.default_rng(7), np.square(deviations)
  shares = advice.variance_components(
      *_crossed(rng, *deviations, 5, studies=(4000,)))
  errors = np.std(shares.mean(1), axis=0) / 4000 ** 0.5
  assert np.all(np.abs(shares.mean((0, 1)) - truth) < 4 * errors)
  # Of any two classes of runs, by the definition: one pair at a time.
  base, again = _crossed(rng, *deviations, 4, 1)
  runs = [(s, s, base[0, s]) for s in range(4)] + [
      (s + 1, s, again[0, s]) for s in range(4)]
  half = lambda same: np.mean([
      (a[2] - b[2]) ** 2 / 2 for a, b in itertools.combinations(runs, 2)
      if (a[0] == b[0], a[1] == b[1]) == same])
  none, start, order = half((False, False)), half((True, False)), half(
      (False, True))
  assert advice.variance_components(base, again)[0] == pytest.approx(
      [none - start, none - order, start + order - none])
  covered = np.mean([[x.low <= share <= x.high for x, share in zip(
      advice.shares_of_variance(
          *_crossed(rng, *deviations, 6)), truth / truth.sum())]
                     for _ in range(60)], axis=0)
  assert np.all(covered >= 0.85)


def test_what_lowers_the_noise_is_measured_on_its_pairs():
  rng, outcomes = np.random.default_rng(5), []
  paired = rng.normal(0, 0.1, (200, 3))
  walk = rng.normal(0, 0.02, (2, 200, 3, 8))
  for name, steps in zip(('base', plans.SECOND_BASE), walk):
    # The noise half-way is twice that of the end; that of its last quarter is
    # a mean of two.
    losses = 3 + paired[..., None] + steps * [9, 9, 9, 2, 9, 9, 1, 1]
    outcomes += [x._replace(curve={
        'step': [*range(10, 90, 10)],
        'loss': losses[x.seed, SIZES.index(x.size)].tolist()})
                 for x in _phase('noise', {name: losses[..., -1]})]
  pairing, longer, late = advice.measure_gains(PLAN, outcomes)
  assert pairing.factor == pytest.approx((1 + (0.1 / 0.02) ** 2) ** 0.5, rel=.3)
  assert longer.factor == pytest.approx(2, rel=0.3)
  assert late.factor == pytest.approx(2 ** 0.5, rel=0.3)
  text = advice.describe_what_lowers_noise(PLAN, outcomes)
  assert f'already: {pairing.factor:.2f} [{pairing.low:.2f}' in text
  assert re.search(r'the order of the data \([89]\d% \[\d\d%, \d+%\]\), ', text)
  assert 'not shown that pairing' not in text
  # A pair with the base of another seed gains nothing.
  dealt = [x._replace(seed=(x.seed + 1) % 200) if x.variant == 'base' else x
           for x in outcomes]
  assert 'not shown that pairing' in advice.describe_what_lowers_noise(
      PLAN, dealt)
  assert not advice.describe_what_lowers_noise(PLAN, outcomes[:3])


@settings(max_examples=25, deadline=None)
@given(strategies.integers(0, 10_000), strategies.integers(3, 8),
       strategies.sampled_from((0.0, 0.02, 0.06)))
def test_laws_of_verdicts(seed, seeds, effect):
  values = _values(seed, seeds, (0, -effect, effect))
  rows = _confirm(values)
  # The order of the runs and the level of a seed say nothing.
  shuffled = _phase('confirm', values)
  random.Random(seed).shuffle(shuffled)
  assert decide.confirm_variants(PLAN, shuffled) == rows
  moved = _confirm({name: x + 0.125 for name, x in values.items()})
  # The other sign has the other verdict.
  turned = _confirm({name: -x for name, x in values.items()})
  other = {'better': 'worse', 'worse': 'better'}
  for row, shifted, back in zip(rows, moved, turned):
    assert shifted.p == pytest.approx(row.p, rel=1e-4)
    assert back.p == pytest.approx(row.p)
    assert back.verdict == other.get(row.verdict, row.verdict)
    assert row.p_corrected >= row.p and row.verdict in decide.VERDICTS
    assert row.low <= row.effect <= row.high
    if row.verdict in other:
      assert not row.low <= 0 <= row.high
  # One run that diverges where none may is never better.
  strict = dataclasses.replace(PLAN, unstable=0.0)
  assert _confirm(values, strict, lost={('a', 0, 0)})[0].verdict == 'unstable'
