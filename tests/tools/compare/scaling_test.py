"""The scaling law: known constants found, ladders that cannot give them not."""

import argparse
import dataclasses
import json
import math
import types

import numpy as np
import pytest

from tests.helpers import sweep_folder
from tools.compare import curves, scaling

# Of Hoffmann et al. 2022, approach 3, and another one.
CHINCHILLA = scaling.Law(E=1.69, A=406.4, B=410.7, a=0.34, b=0.28)
STEEP = scaling.Law(E=0.8, A=60.0, B=2000.0, a=0.25, b=0.45)
END = float(sweep_folder.loss(sweep_folder.STEPS))


def ladder(law, noise=0.0, seed=0, sizes=4, lengths=4):
  params, tokens = (x.ravel() for x in np.meshgrid(
      np.geomspace(1e5, 3e7, sizes), np.geomspace(1e6, 3e8, lengths)))
  losses = law.loss(params, tokens) * np.exp(
      np.random.default_rng(seed).normal(0, noise, len(params)))
  return params, tokens, losses


@pytest.fixture
def quick(monkeypatch):
  """Fewer starts, since these ladders are smooth; and fewer draws."""
  monkeypatch.setattr(scaling, 'NUM_POLISHED_STARTS', 3)
  monkeypatch.setattr(scaling, 'NUM_DRAWS', 40)


def test_constants_are_found(quick):
  got = scaling.fit_law(*ladder(CHINCHILLA))
  for name in scaling.CONSTANTS_OF_LAW:
    assert getattr(got, name) == pytest.approx(getattr(CHINCHILLA, name),
                                               rel=1e-4)


def test_an_outlier_does_not_move_them(quick):
  params, tokens, losses = ladder(CHINCHILLA, noise=5e-4)
  losses[5] *= 1.3  # a run that went wrong: Huber's loss does not follow it
  got = scaling.fit_law(params, tokens, losses)
  assert got.a == pytest.approx(CHINCHILLA.a, rel=0.03)
  assert got.b == pytest.approx(CHINCHILLA.b, rel=0.03)


def test_the_gradient_is_that_of_the_objective():
  x, y, z = map(np.log, ladder(STEEP, noise=1e-4))
  # Near the law, so that the residuals have both signs.
  theta = np.array([*np.log([0.8, 60, 2000]), 0.25, 0.45])
  value = lambda t: scaling.huber_objective(t, x, y, z)[0]
  np.testing.assert_allclose(
      scaling.huber_objective(theta, x, y, z)[1],
      [(value(theta + h) - value(theta - h)) / 2e-6 for h in 1e-6 * np.eye(5)],
      rtol=1e-3)


@pytest.mark.parametrize('params, tokens, message', [
    ([1e5, 1e6, 1e7] * 3, [1e6, 1e7, 1e8] * 3, '3 different pairs'),
    ([1e5, 1e6] * 4, np.geomspace(1e6, 1e9, 8), 'numbers of parameters'),
    (np.geomspace(1e5, 1e8, 8), [1e6] * 4 + [1e7] * 4, 'numbers of tokens'),
    (np.geomspace(1e5, 1e8, 8), 20 * np.geomspace(1e5, 1e8, 8),
     r'correlation 1\.000'),
    # Of one budget: the larger a model, the shorter its run.
    (np.geomspace(1e5, 1e8, 8), 1e15 / np.geomspace(1e5, 1e8, 8),
     r'correlation -1\.000'),
])
def test_a_ladder_too_small_is_refused(params, tokens, message):
  with pytest.raises(ValueError, match=message):
    scaling.check_ladder(params, tokens)


def test_residuals_are_drawn_as_wide_as_the_noise(monkeypatch):
  """Five constants took their share of the residuals: what is drawn has the
  variance that is the noise's without bias, sum r^2 / (n - 5). With one seed
  two ladders get the residuals of the same runs, with another seed others."""
  monkeypatch.setattr(scaling, '_minimise_from_starts',
                      lambda starts, x, y, z: z)
  monkeypatch.setattr(scaling, 'NUM_DRAWS', 2000)
  params, tokens, _ = ladder(STEEP)
  fitted = np.log(STEEP.loss(params, tokens))
  r = np.random.default_rng(0).normal(0, 0.01, len(fitted))
  r -= r.mean()

  def drawn(residuals, seed=0):
    runs = scaling.Runs(params, tokens, np.exp(fitted + residuals), tokens)
    return np.array(scaling.bootstrap_laws(STEEP, runs, seed)) - fitted

  first = drawn(r)
  assert first.var() == pytest.approx((r ** 2).sum() / (len(r) - 5), rel=0.02)
  np.testing.assert_allclose(first.mean(0), 0, atol=5 * 0.012 / 2000 ** 0.5)
  np.testing.assert_allclose(drawn(3 * r), 3 * first, atol=1e-9)
  assert abs(np.corrcoef(drawn(r, seed=1).ravel(), first.ravel())[0, 1]) < 0.05


def test_the_optimum_is_the_papers_formula_and_the_least_loss():
  # G = (aA / bB)^(1 / (a + b)); N = G (C/6)^(b/(a+b)), D = (C/6)^(a/(a+b)) / G.
  law, budget = CHINCHILLA, 1e21
  both = law.a + law.b
  g = (law.a * law.A / (law.b * law.B)) ** (1 / both)
  assert scaling.optimal_size(law, scaling.Cost(), budget) == pytest.approx(
      (g * (budget / 6) ** (law.b / both), (budget / 6) ** (law.a / both) / g))
  params = np.geomspace(1e5, 1e8, 5)
  cost = scaling.fit_cost_per_token(params, 50 * params ** 0.85)
  assert (cost.factor, cost.power) == pytest.approx((50, 0.85))
  best, _ = scaling.optimal_size(STEEP, cost, 1e15)
  loss = lambda n: float(STEEP.loss(n, 1e15 / cost.per_token(n)))
  assert loss(best) <= min(map(loss, best * np.geomspace(0.1, 10, 400)))


@pytest.mark.parametrize('law, flat, known', [
    (STEEP, 0, True), (STEEP, 5, True), (STEEP, 6, False),
    (dataclasses.replace(STEEP, a=0.0), 0, False),
    (dataclasses.replace(STEEP, b=0.01), 0, False)])
def test_a_best_size_is_claimed_if_almost_all_laws_have_one(law, flat, known):
  drawn = (100 - flat) * [STEEP] + flat * [dataclasses.replace(STEEP, b=0.0)]
  got = scaling._optimum_with_intervals(law, drawn, scaling.Cost(), 1e15)
  params, tokens = scaling.optimal_size(STEEP, scaling.Cost(), 1e15)
  size = {'parameters': params, 'tokens': tokens,
          'loss': STEEP.loss(params, tokens)}
  assert got == {'budget': 1e15} | (known and {
      name: dict.fromkeys(('value', 'low', 'high'), pytest.approx(value))
      for name, value in size.items()} or {})


def _point(name, changes, params, tokens, losses):
  return sweep_folder.point(
      name, changes, seeds=range(len(losses)), params=int(params),
      tokens=int(tokens), flops=6.0 * int(params),
      shift={seed: float(x) - END for seed, x in enumerate(losses)})


def _main(*words):
  parser = argparse.ArgumentParser()
  scaling.add_arguments(parser)
  return scaling.main(parser.parse_args(list(map(str, words))))


@pytest.mark.slow
def test_a_folder_of_sizes_and_lengths_is_fitted(tmp_path, capsys, quick):
  sweep_folder.write(tmp_path, [
      _point(f'p{i}', {'model.d_model': 64 + i}, n, d, [loss])
      for i, (n, d, loss) in enumerate(zip(*ladder(STEEP, noise=1e-4)))])
  assert _main(tmp_path, '--budgets=1e15,1e19', '--json') == 0
  fitted = json.loads(capsys.readouterr().out)
  for name in ('E', 'a', 'b'):
    x = fitted['constants'][name]
    assert x['low'] <= x['value'] <= x['high']
    assert x['value'] == pytest.approx(getattr(STEEP, name), rel=0.02)
  assert fitted['flops_per_token'] == pytest.approx(
      {'factor': 6.0, 'power': 1.0})
  near = scaling.optimal_size(STEEP, scaling.Cost(), 1e15)
  assert fitted['optima'][0]['parameters']['value'] == pytest.approx(
      near[0], rel=0.1)
  assert 'parameters and tokens beyond the ladder' in (
      scaling.format_law(fitted).splitlines()[-2])


def test_what_is_no_ladder_is_refused(tmp_path):
  def refused(words, *points):
    folder = tmp_path / points[-1]['name'] / str(len(words))
    sweep_folder.write(folder, points)
    with pytest.raises(ValueError, match=words):
      scaling.runs_of_ladder(curves.load_sweep(folder).points, 'params', 'it')

  base = sweep_folder.point('base')
  for change in ({'model.norm': 'rmsnorm'}, {'optim.decay_mask': [['.*', 0]]}):
    refused(f"'a' sets {[*change][0]}=", sweep_folder.point('a', change))
  refused("'base' and 'fast' have both 50,000 params and 1,000,000 tokens, and "
          'differ in optim.lr', base, sweep_folder.point(
              'fast', {'optim.lr': 3e-3}))
  sweep_folder.write(tmp_path / 'one', [base])
  for words, flag in (('1 different pairs', '--budgets='),
                      ('--budgets', '--budgets=much'),
                      ('is no config', '--by=model.depth'),
                      ("'learned' at every point", '--by=model.position')):
    with pytest.raises(ValueError, match=words):
      _main(tmp_path / 'one', flag)


def _least_squares(starts, x, y, z):
  """Returns the law with the least squared residuals near STEEP, by four steps
  of Gauss and Newton, which take no time."""
  theta = np.array([*np.log([STEEP.E, STEEP.A, STEEP.B]), STEEP.a, STEEP.b])
  for _ in range(4):
    log_E, log_A, log_B, a, b = theta
    terms = np.exp([0 * x + log_E, log_A - a * x, log_B - b * y])
    e, f, g = terms / terms.sum(0)
    slopes = np.stack([e, f, g, -f * x, -g * y], 1)
    theta += np.linalg.lstsq(slopes, z - np.log(terms.sum(0)))[0]
  return scaling.Law(*np.exp(theta[:3]), *theta[3:])


@pytest.mark.parametrize('paired', [True, False])
def test_exponents_of_two_variants_are_compared(paired, monkeypatch):
  """What a seed and a length do to both laws cancels, if both have them."""
  monkeypatch.setattr(scaling, '_minimise_from_starts', _least_squares)
  rng = np.random.default_rng(1)
  other = dataclasses.replace(STEEP, a=STEEP.a + 0.08)
  params, tokens, _ = ladder(STEEP)
  both = rng.normal(0, 3e-3, (len(params), 2))
  points = []
  for law, changes, first_seed in (
      (STEEP, {}, 0), (other, {'model.position': 'rope'}, 0 if paired else 2)):
    for i, (n, d) in enumerate(zip(params, tokens)):
      losses = law.loss(n, d) * np.exp(both[i] + rng.normal(0, 5e-4, 2))
      points.append(types.SimpleNamespace(
          name=str(len(points)), changes={'model.d_model': 64 + i, **changes},
          params=n, tokens=d, flops_per_token=6 * n,
          final_losses=dict(enumerate(losses, first_seed))))
  fitted = scaling.fit_by_field(
      types.SimpleNamespace(name='it', points=points,
                            base_config={'model.position': 'learned'}),
      field='model.position', count='params', budgets=[1e15])
  assert list(fitted['variants']) == ['learned', 'rope']
  for value, exponent in (('learned', STEEP.a), ('rope', other.a)):
    law = fitted['variants'][value]
    assert law['runs'] == 32
    assert law['constants']['a']['value'] == pytest.approx(exponent, abs=0.02)
  row, = fitted['differences']
  assert row['paired'] is paired
  assert (row['variant'], row['against']) == ('rope', 'learned')
  assert 0 < row['a']['low'] < 0.08 < row['a']['high']
  assert row['b']['low'] < 0 < row['b']['high']
  widths = [law['constants']['a'] for law in fitted['variants'].values()]
  independent = math.hypot(*(x['high'] - x['low'] for x in widths))
  share = (row['a']['high'] - row['a']['low']) / independent
  assert share < 0.5 if paired else 0.8 < share < 1.25
  lines = scaling.format_laws_by_field(fitted).splitlines()
  end = '' if paired else ' (their runs are no pairs)'
  assert lines[-2].startswith('  a (parameters), rope - learned: +0.08')
  assert lines[-2].endswith(f']{end}')
  assert lines[-1].endswith(f', inside the noise{end}')
