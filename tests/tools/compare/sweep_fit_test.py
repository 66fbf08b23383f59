"""The scaling law: known constants found, ladders that cannot give them not."""

import argparse
import dataclasses
import json
import math

import numpy as np
import pytest

from configs.sweeps import ladder as ladder_sweep
from tests.helpers import sweep_folder
from tools.compare import fit, laws, scaling, variants
from tools.compare.sweep_report import curves

# Of Hoffmann et al. 2022, approach 3, and another one.
CHINCHILLA = scaling.Law(E=1.69, A=406.4, B=410.7, a=0.34, b=0.28)
STEEP = scaling.Law(E=0.8, A=60.0, B=2000.0, a=0.25, b=0.45)


def ladder(law, noise=0.0, seed=0, sizes=4, lengths=4):
  params, tokens = (x.ravel() for x in np.meshgrid(
      np.geomspace(1e5, 3e7, sizes), np.geomspace(1e6, 3e8, lengths)))
  rng = np.random.default_rng(seed)
  losses = law.loss(params, tokens) * np.exp(
      rng.normal(0, noise, len(params)))
  return params, tokens, losses


@pytest.mark.slow
@pytest.mark.parametrize('law', [
    CHINCHILLA, pytest.param(STEEP, marks=pytest.mark.long)])
def test_constants_are_found(law):
  got = scaling.fit(*ladder(law))
  for name in scaling.CONSTANTS:
    assert getattr(got, name) == pytest.approx(getattr(law, name), rel=1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_noise_moves_constants_little_and_an_outlier_not_at_all():
  params, tokens, losses = ladder(CHINCHILLA, noise=5e-4)
  losses[5] *= 1.3  # a run that went wrong: Huber's loss does not follow it
  got = scaling.fit(params, tokens, losses)
  assert got.a == pytest.approx(CHINCHILLA.a, rel=0.03)
  assert got.b == pytest.approx(CHINCHILLA.b, rel=0.03)


def test_the_gradient_is_that_of_the_objective():
  from scipy.optimize import approx_fprime
  x, y, z = (np.log(v) for v in ladder(CHINCHILLA))
  theta = np.array([0.4, 6.0, 6.2, 0.33, 0.29])
  value = lambda t: scaling.objective(t, x, y, z)[0]
  np.testing.assert_allclose(scaling.objective(theta, x, y, z)[1],
                             approx_fprime(theta, value, 1e-7), rtol=1e-3)


@pytest.mark.long
@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say():
  held = []
  for seed in range(12):
    data = ladder(CHINCHILLA, noise=2e-3, seed=seed)
    law = scaling.fit(*data)
    draws = scaling.bootstrap(law, *data, draws=60, seed=seed)
    for name in ('E', 'a', 'b'):
      low, high = scaling.percentiles([getattr(d, name) for d in draws])
      held.append(low <= getattr(CHINCHILLA, name) <= high)
  assert 0.8 <= np.mean(held) <= 1.0


@pytest.mark.parametrize('params, tokens, said', [
    ([1e5, 1e6, 1e7], [1e6, 1e7, 1e8], 'pairs'),
    ([1e5, 1e6] * 4, np.geomspace(1e6, 1e9, 8), 'numbers of parameters'),
    (np.geomspace(1e5, 1e8, 8), [1e6] * 4 + [1e7] * 4, 'numbers of tokens'),
    (np.geomspace(1e5, 1e8, 8), 20 * np.geomspace(1e5, 1e8, 8), 'correlation'),
])
def test_a_ladder_too_small_is_refused(params, tokens, said):
  with pytest.raises(ValueError, match=said):
    scaling.fit(params, tokens, np.ones(len(params)))


def test_seeds_are_no_new_points():
  params, tokens = [1e5, 1e6, 1e7] * 3, [1e6, 1e7, 1e8] * 3
  with pytest.raises(ValueError, match='3 different pairs'):
    scaling.check_ladder(params, tokens)


def test_a_ladder_of_shapes_has_a_point_more_than_constants(quick):
  """Of as many, the residuals would be none, and the intervals with them."""
  chosen = [0, 4, 8, 9, 13, 17, 21]
  widths, depths, params, tokens, losses = (x[chosen] for x in _shaped())
  shapes = scaling.relative_shapes(widths, depths, params)
  law = scaling.fit(params, tokens, losses, shapes)
  drawn = scaling.bootstrap(law, params, tokens, losses, 2, shapes=shapes)
  assert all(math.isfinite(other.s) for other in drawn)
  for few in (slice(6), [*range(6), *range(6)]):  # seeds are no new points
    own = [x[few] for x in (params, tokens, losses, shapes)]
    with pytest.raises(ValueError, match='6 different points of parameters, '
                       'tokens and shape: the six constants .* need 7'):
      scaling.fit(*own)
    scaling.check_ladder(*own[:2])  # without shape it is one


def test_optimum_is_the_papers_formula():
  # G = (aA / bB)^(1 / (a + b)); N = G (C/6)^(b/(a+b)), D = (C/6)^(a/(a+b)) / G.
  law, budget = CHINCHILLA, 1e21
  both = law.a + law.b
  g = (law.a * law.A / (law.b * law.B)) ** (1 / both)
  params, tokens = scaling.optimum(law, scaling.Cost(6.0, 1.0), budget)
  assert params == pytest.approx(g * (budget / 6) ** (law.b / both))
  assert tokens == pytest.approx((budget / 6) ** (law.a / both) / g)


@pytest.mark.parametrize('cost', [scaling.Cost(), scaling.Cost(50.0, 0.85)])
def test_optimum_is_the_least_loss_of_the_budget(cost):
  budget = 1e15
  params, _ = scaling.optimum(STEEP, cost, budget)
  loss = lambda n: float(STEEP.loss(n, budget / cost.per_token(n)))
  tried = params * np.geomspace(0.1, 10, 400)
  assert loss(params) <= min(map(loss, tried))


def test_cost_is_read_of_the_ladder():
  params = np.geomspace(1e5, 1e8, 5)
  got = scaling.cost_of(params, 50 * params ** 0.85)
  assert got.factor == pytest.approx(50) and got.power == pytest.approx(0.85)
  assert math.isclose(float(got.per_token(1e6)), 50 * 1e6 ** 0.85)


def _folder(path, law=STEEP, **changes):
  """A ladder on disk whose final losses are the law's."""
  points = []
  for i, (params, tokens, loss) in enumerate(zip(*ladder(law, 1e-4))):
    end = float(sweep_folder.loss(sweep_folder.STEPS))
    points.append(sweep_folder.point(
        f'p{i}', {'model.d_model': 64 + i, **changes}, seeds=(0, 1),
        params=int(params), tokens=int(tokens), flops=6.0 * int(params),
        shift={0: float(loss) - end, 1: float(loss) - end}))
  sweep_folder.write(path, points)


def _main(*words):
  parser = argparse.ArgumentParser()
  fit.add_arguments(parser)
  return fit.main(parser.parse_args(list(map(str, words))))


@pytest.mark.long
@pytest.mark.slow
def test_a_folder_is_fitted(tmp_path, capsys):
  _folder(tmp_path)
  assert _main(tmp_path, '--budgets=1e15,1e19', '--draws=40', '--json') == 0
  found = json.loads(capsys.readouterr().out)
  for name in ('E', 'a', 'b'):
    x = found['constants'][name]
    assert x['low'] <= x['value'] <= x['high']
    assert x['value'] == pytest.approx(getattr(STEEP, name), rel=0.02)
  assert found['flops_per_token'] == pytest.approx(
      {'factor': 6.0, 'power': 1.0})
  near = scaling.optimum(STEEP, scaling.Cost(), 1e15)
  assert found['optima'][0]['parameters']['value'] == pytest.approx(
      near[0], rel=0.1)
  said = laws.text(found).splitlines()
  inside, beyond = (next(line for line in said if line.startswith(budget))
                    for budget in ('1e+15', '1e+19'))
  assert 'extrapolated' not in inside
  assert 'parameters and tokens beyond the ladder' in beyond


@pytest.mark.parametrize('change', [
    {'optim.decay_mask': [['.*', 0]]},
    {'model.pattern': 'near', 'model.kinds': {'near': {'window': 8}}}])
def test_a_change_that_is_no_number_makes_no_ladder(change, tmp_path):
  sweep_folder.write(tmp_path, [sweep_folder.point('a', change)])
  with pytest.raises(ValueError, match=f"'a' sets .*{[*change][-1]}="):
    laws.data(curves.load_sweep(tmp_path).points, 'params', 'it')


@pytest.mark.slow
def test_what_is_no_ladder_is_refused(tmp_path):
  _folder(tmp_path / 'a', **{'model.norm': 'rmsnorm'})
  with pytest.raises(ValueError, match='model.norm=rmsnorm'):
    _main(tmp_path / 'a')
  size = sweep_folder.point('base'), sweep_folder.point(
      'fast', {'optim.lr': 3e-3})
  sweep_folder.write(tmp_path / 'c', size)
  with pytest.raises(ValueError, match="'base' and 'fast' have both 50,000 "
                     'params and 1,000,000 tokens, and differ in optim.lr'):
    _main(tmp_path / 'c')
  sweep_folder.write(tmp_path / 'b', [sweep_folder.point('base')])
  with pytest.raises(ValueError, match='1 different pairs'):
    _main(tmp_path / 'b')
  with pytest.raises(ValueError, match='--budgets'):
    _main(tmp_path / 'b', '--budgets=much')


def _two(path, apart=0.08, seeds=(0, 1, 2), common=3e-3, own=5e-4, **more):
  """Two ladders in one sweep, whose exponents of size differ by `apart`, with
  what a seed and a length do to both alike."""
  rng = np.random.default_rng(more.pop('seed', 0))
  end, points = float(sweep_folder.loss(sweep_folder.STEPS)), []
  other = scaling.Law(STEEP.E, STEEP.A, STEEP.B, STEEP.a + apart, STEEP.b)
  params, tokens, _ = ladder(STEEP)
  both = rng.normal(0, common, (len(params), len(seeds)))
  for name, law, changes in (('base', STEEP, {}),
                             ('rope', other, {'model.position': 'rope'})):
    for i, (n, d) in enumerate(zip(params, tokens)):
      loss = law.loss(n, d) * np.exp(
          both[i] + rng.normal(0, own, len(seeds)))
      points.append(sweep_folder.point(
          f'{name}{i}', {'model.d_model': 64 + i, **changes}, seeds=seeds,
          params=int(n), tokens=int(d), flops=6.0 * int(n),
          shift=dict(zip(seeds, (loss - end).tolist()))))
  sweep_folder.write(path, points)


@pytest.fixture
def quick(monkeypatch):
  """Fewer starts: these ladders are smooth."""
  monkeypatch.setattr(scaling, 'POLISHED', 3)


@pytest.mark.long
@pytest.mark.slow
def test_exponents_of_two_variants_are_compared(tmp_path, capsys, quick):
  _two(tmp_path, seeds=(0, 1), seed=1)
  assert _main(tmp_path, '--by=model.position', '--draws=40', '--json') == 0
  found = json.loads(capsys.readouterr().out)
  assert list(found['variants']) == ['learned', 'rope']
  for value, exponent in (('learned', STEEP.a), ('rope', STEEP.a + 0.08)):
    law = found['variants'][value]
    assert law['runs'] == 32
    assert law['constants']['a']['value'] == pytest.approx(exponent, abs=0.02)
  row, = found['differences']
  assert row['paired'] and (row['variant'], row['against']) == (
      'rope', 'learned')
  assert row['a']['low'] < 0.08 < row['a']['high'] and row['a']['low'] > 0
  assert row['b']['low'] < 0 < row['b']['high']
  # What a length and a seed do to both laws cancels.
  widths = [law['constants']['a'] for law in found['variants'].values()]
  assert row['a']['high'] - row['a']['low'] < 0.95 * math.hypot(*(
      x['high'] - x['low'] for x in widths))
  said = variants.text(found).splitlines()
  assert said[-2].startswith('  a (parameters), rope - learned: +0.08')
  assert said[-1].endswith(', inside the noise')


def test_what_has_no_variants_is_refused(tmp_path):
  _folder(tmp_path)
  with pytest.raises(ValueError, match="'model.depth', which is no config"):
    _main(tmp_path, '--by=model.depth')
  with pytest.raises(ValueError, match="'learned' at every point"):
    _main(tmp_path, '--by=model.position')


@pytest.mark.long
@pytest.mark.slow
def test_differences_hold_the_truth_about_as_often_as_they_say(quick):
  held = []
  params, tokens, _ = ladder(STEEP)
  other = scaling.Law(STEEP.E, STEEP.A, STEEP.B, STEEP.a + 0.05, STEEP.b)
  for seed in range(8):
    rng = np.random.default_rng(seed)
    common = rng.normal(0, 2e-3, len(params))
    drawn = []
    for law in (STEEP, other):
      losses = law.loss(params, tokens) * np.exp(
          common + rng.normal(0, 5e-4, len(params)))
      own = scaling.fit(params, tokens, losses)
      drawn.append(scaling.bootstrap(own, params, tokens, losses, draws=40))
    apart = [b.a - a.a for a, b in zip(*drawn)]
    low, high = scaling.percentiles(apart)
    held.append(low <= 0.05 <= high)
  assert np.mean(held) >= 0.75


SHAPED = dataclasses.replace(STEEP, s=0.02)


def _shaped(noise=1e-4):
  """Widths, depths, parameters, tokens, losses of a ladder of both."""
  widths, depths, tokens = (x.ravel() for x in np.meshgrid(
      (64, 128, 256), (2, 4, 8), (1e6, 1e7, 1e8)))
  params = 12.0 * depths * widths ** 2
  ratio = widths / depths
  losses = SHAPED.loss(params, tokens, ratio / np.exp(np.log(ratio).mean()))
  return widths, depths, params, tokens, losses * np.exp(
      np.random.default_rng(0).normal(0, noise, len(losses)))


def test_the_gradient_of_shape_is_that_of_the_objective():
  widths, depths, params, tokens, losses = _shaped()
  u = np.log(scaling.relative_shapes(widths, depths, params))
  x, y, z = np.log(params), np.log(tokens), np.log(losses)
  # Near the law, so that the residuals have both signs.
  theta = np.array([*np.log([0.8, 60, 2000]), 0.25, 0.45, 0.1])
  value = lambda t: scaling.objective(t, x, y, z, u)[0]
  step = 1e-6 * np.eye(6)
  np.testing.assert_allclose(
      scaling.objective(theta, x, y, z, u)[1],
      [(value(theta + h) - value(theta - h)) / 2e-6 for h in step], rtol=1e-3)


def test_shape_is_told_where_width_and_depth_vary_apart():
  widths, depths, params, *_ = _shaped()
  shapes = scaling.relative_shapes(widths, depths, params)
  assert np.prod(shapes) == pytest.approx(1)
  assert shapes.max() / shapes.min() == pytest.approx(128 / 8)
  one_depth = depths == 4
  assert scaling.relative_shapes(
      widths[one_depth], depths[one_depth], params[one_depth]) is None
  # Deeper as they are wider, and wider for their depth the larger they are.
  assert scaling.relative_shapes(
      [32, 64, 128], [2, 3, 4], [1e4, 6e4, 3e5]) is None


@pytest.mark.long
def test_a_ladder_of_widths_and_depths_tells_what_shape_does(
    tmp_path, capsys, quick):
  points = []
  end = float(sweep_folder.loss(sweep_folder.STEPS))
  for i, (width, depth, params, tokens, loss) in enumerate(zip(*_shaped())):
    # 64 x 8 and 128 x 2 have as many parameters, as have 128 x 8 and 256 x 2.
    points.append(sweep_folder.point(
        f'p{i}', {'model.d_model': int(width), 'model.num_layers': int(depth)},
        seeds=(0,), params=int(params), tokens=int(tokens),
        flops=6.0 * int(params), shift={0: float(loss) - end}))
  sweep_folder.write(tmp_path, points)
  assert _main(tmp_path, '--draws=40', '--json') == 0
  found = json.loads(capsys.readouterr().out)
  shape = found['shape']
  assert shape['value'] == pytest.approx(2 ** SHAPED.s - 1, rel=0.05)
  assert shape['low'] <= 2 ** SHAPED.s - 1 <= shape['high']
  assert shape['ratios'] == [8, 128]
  for name in ('E', 'a', 'b'):
    assert found['constants'][name]['value'] == pytest.approx(
        getattr(SHAPED, name), rel=0.02)
  assert 'shape: twice the width over the depth' in laws.text(found)


def test_the_ladder_has_the_points_of_before_and_other_depths():
  points = {}
  ladder_sweep.sweep(lambda name, **changes: points.update({name: changes}))
  before = {f'd{w}-{s}' for w in (24, 32, 48, 64, 96) for s in (125, 250, 500)}
  assert before < points.keys() and len(points) == 27
  assert all('model.num_layers' not in points[name] for name in before)
  assert points['d32x8-250'] == {
      'model.d_model': 32, 'model.num_layers': 8, 'train.steps': 250,
      'optim.lr': 8e-3}
