"""Simulated studies: they err as rarely as is promised, and a rule that is
broken shows."""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tools.compare import decide, simulate
from tools.compare import plan as plans
from tools.compare.simulated import announced, errors, rates, without, world
from tools.compare import statistics

ROOT = pathlib.Path(__file__).parents[3]


def _figures(rows) -> dict[str, float]:
  return {row.what: row.value for row in rows}


@pytest.mark.parametrize('name', [
    'equal noise', pytest.param('3 % diverge', marks=pytest.mark.long)])
def test_no_effects_are_found_as_rarely_as_promised(name):
  rows = errors.confirmation(150, name, 5)
  found = _figures(rows)
  assert found['family-wise error'] <= 0.075
  assert all(row.holds is not False for row in rows)
  for what in ('of the effect', 'at each size', 'of the trend'):
    assert found[f'95 % intervals {what}'] == pytest.approx(0.95, abs=0.025)


def test_without_holm_too_much_is_found(monkeypatch):
  monkeypatch.setattr(statistics, 'corrected', lambda p, method='': list(p))
  row = errors.confirmation(150, 'equal noise', 5)[0]
  assert row.value > 0.1 and row.holds is False


def test_the_screening_keeps_its_rate_and_breaks_it_uncorrected(monkeypatch):
  assert errors.screening(100, 'equal noise', 3)[0].value <= 0.14
  monkeypatch.setattr(statistics, 'corrected', lambda p, method='': list(p))
  row = errors.screening(100, 'equal noise', 3)[0]
  assert row.value > 0.2 and row.holds is False


def test_unpaired_seeds_find_nothing():
  kept, broken = without._pairing(60)
  assert kept.value > 0.9 and broken.value < 0.1


def test_the_runs_that_were_picked_do_not_judge_themselves():
  kept, broken = without._fresh(40)[2:]
  assert kept.value > 0.85 and broken.value < 0.65


def test_phases_that_shared_seeds_would_judge_what_they_picked(monkeypatch):
  """The bias that disjoint seeds keep out of whole studies."""
  def bias():
    found = _figures(errors.whole(40, 'a mixture'))
    assert found['screened effect / true effect, of what passed'] > 1.08
    return found['confirmed effect / true effect']
  assert bias() == pytest.approx(1, abs=0.06)
  monkeypatch.setattr(plans.Seeds, 'APART', 0)
  assert bias() > 1.05


def test_guessing_in_a_mean_hides_an_effect():
  kept, broken, *_ = without._diverged(60)
  assert kept.value > 0.75 and broken.value < 0.4


@pytest.mark.slow
def test_tuning_by_the_best_of_a_grid_leaves_the_confirmation_right():
  rows = errors.whole(60, 'no effects, all are confirmed')
  found = _figures(rows)
  assert found['a wrong claim on any variant'] <= 0.075
  assert found['95 % intervals of what was confirmed'] == pytest.approx(
      0.95, abs=0.03)


@pytest.mark.long
def test_the_power_announced_is_attained_and_careless_power_is_not():
  row, = announced.smallest_of(200, 'equal noise', 5)
  assert row.value == pytest.approx(0.8, abs=0.08) and row.holds
  naive, right = announced.careless(400)
  assert naive.value < 0.74 and right.value == pytest.approx(0.8, abs=0.06)


def test_the_world_is_as_it_is_said_to_be():
  plan = world.plan(1, seeds=(1500, 1, 1, 1500))
  own = world.World(3, (0.02, 0.04, 0.06), {'v1': (-0.01, 0.0, 0.02)},
                    shared=0.4, diverge={'v1': 0.05})
  runs = world.confirmed(plan, own)
  assert runs == world.confirmed(plan, own)
  assert runs != world.confirmed(plan, world.World(4, own.noise, own.effects))
  both = [decide._both(decide.of_phase(runs, 'confirm'), 'v1', 'base', size,
                       'text') for size in plan.sizes]
  d = np.array(list(decide._differences_by_seed(both, plan.primary).values()))
  np.testing.assert_allclose(d.mean(0), (-0.01, 0.0, 0.02), atol=0.006)
  np.testing.assert_allclose(
      d.std(0), np.array(own.noise) * math.sqrt(2), rtol=0.06)
  np.testing.assert_allclose(
      np.corrcoef(d.T)[np.triu_indices(3, 1)], 0.4, atol=0.08)
  lost = [x.diverged for x in runs if x.variant == 'v1']
  assert np.mean(lost) == pytest.approx(0.05, abs=0.012)
  assert not any(x.diverged for x in runs if x.variant == 'base')
  base = np.array([x.loss for x in runs if x.variant == 'base'][:1500])
  assert base.std() == pytest.approx(math.hypot(0.3, 0.02), rel=0.06)


def test_heavy_tails_have_the_spread_of_others():
  own = world.World(0, (1.0,), heavy=True)
  draws = np.array([own._draw(str(i), True) for i in range(4000)])
  assert np.abs(draws).max() > 6  # no normal draw of 4000 is
  # Three quarters of Student's t of 3, over the root of 3.
  assert np.quantile(draws, 0.75) == pytest.approx(0.7649 / 3 ** 0.5, abs=0.03)


def test_true_effects_are_those_at_the_rates_that_were_chosen():
  own = world.World(0, (0.1,) * 3, {'a': (1.0, 2.0, 3.0)}, best={'': 2e-3},
                    bend=0.5)
  assert own.truth('a') == [1.0, 2.0, 3.0]
  assert own.truth('a', [2e-3, 4e-3, 5e-4]) == [1.0, 2.5, 5.0]
  assert own.truth('base', [1e-3] * 3) == [0.5] * 3


def test_a_mean_has_the_error_of_its_studies():
  values = np.random.default_rng(0).normal(2, 3, 500)
  mean = rates.Mean()
  for value in values:
    mean.add(value)
  assert (mean.value, mean.error) == pytest.approx(
      (values.mean(), values.std(ddof=1) / math.sqrt(500)))
  # What one study adds several times counts as one.
  again = rates.grouped(500, lambda i, add: [add('x', values[i])] * 4)['x']
  assert again.error == pytest.approx(mean.error)
  assert rates.near('', '', mean, mean.value - 0.1, 0.1).holds
  assert not rates.at_most('', '', mean, mean.value - 4 * mean.error).holds
  assert not rates.at_least('', '', mean, mean.value + 4 * mean.error).holds


def _main(*words):
  parser = argparse.ArgumentParser()
  simulate.add_arguments(parser)
  return simulate.main(parser.parse_args(words))


def test_the_command_prints_what_holds(monkeypatch, capsys):
  monkeypatch.setattr(simulate, 'PARTS', {
      'a': (lambda n: errors.confirmation(n, 'equal noise', 3),)})
  assert _main('--studies=20', '--json') == 0
  rows = json.loads(capsys.readouterr().out)
  assert rows[0]['studies'] == 20 and rows[0]['promised'] == '<= 0.05'
  broken = rates.Row('s', 'w', 0.2, 0.01, 100, '<= 0.05', False)
  monkeypatch.setattr(simulate, 'PARTS', {'a': (lambda n: [broken],)})
  assert _main('--only=a') == 1
  assert '| s | w | 0.2000 ± 0.0100 | <= 0.05 | NO | 100 |' in (
      capsys.readouterr().out)


@pytest.mark.parametrize('word, said', [
    ('--studies=1', '--studies is 1'), ('--only=all', "unknown --only 'all'")])
def test_wrong_requests_are_sentences(word, said):
  with pytest.raises(ValueError, match=said):
    _main(word)


@pytest.mark.long  # study_run_test.py has the same of a study that is written
def test_kills_and_two_runners_change_no_decision():
  """In a process of its own, since it forks."""
  code = ('from tools.compare.simulated import behind\n'
          'for row in behind.resumed(1): print(row.what, row.value, row.holds)')
  run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True,
                       capture_output=True, env={**os.environ}, timeout=600)
  assert run.returncode == 0, run.stderr
  lines = run.stdout.splitlines()
  assert lines[0] == 'kills of a study 4.0 None'
  assert lines[1:] == ['the decisions are those of a study in memory 1.0 True'
                       ] * 2
