"""Rates that muP carries to larger sizes are checked by their neighbours at the
first of these, and tuned from there on where a neighbour is better."""

import dataclasses
import math

import numpy as np
import pytest

from common.errors import Stopped
from tests.helpers import studies
from tools.compare import comparison, freeze, phases, recompute, report
from tools.compare import plan as plans
from tools.compare import results, status, study, tuning

RATES = (1e-3, 2e-3, 4e-3)


def carrying_plan(**changes) -> plans.Plan:
  """Returns the plan of a study whose rates are carried by muP, but for those
  of `same`, which has no rules."""
  return studies.plan(**{
      'tuned_sizes': ('s',), 'checked_size': 'm', 'largest': 'xl',
      'tuned_at_each_size': ('same',), 'variants': ('good', 'same'),
      'seeds': dict(noise=6, tune=3, screen=6, confirm=6, largest=3),
      'tuning': plans.Tuning({'optim.lr': RATES}, rungs=1, extend=2),
      **changes})


def run_study(moved=None, **changes):
  """Returns the trainer and the last state of a study that was computed.

  Args:
    moved: by variant and size, another best rate than at the smallest one.
    **changes: other values of the plan.
  """
  trainer = studies.Trainer(
      studies.frozen(carrying_plan(**changes)),
      effects={'good': 0.3, 'same': 0.3}, moved=moved)
  *_, state = phases.run_phases(trainer.frozen, trainer, anyway=True)
  return trainer, state


def rates_of(trainer, folder, variant, workload='text'):
  """Returns the rates that the runs of a folder have, by size."""
  rates: dict[str, set] = {}
  for run in trainer.asked[folder]:
    if (run.variant, run.workload) == (variant, workload):
      rates.setdefault(run.size, set()).add(run.changes['optim.lr'])
  return rates


@pytest.fixture(scope='module')
def kept():
  return run_study()


@pytest.fixture(scope='module')
def moved():
  """The best rate of `good` on the text is another one from `m` on."""
  return run_study({('good', size): 8e-3 for size in ('m', 'l', 'xl')})


def test_each_carried_rate_is_run_beside_its_neighbours_and_kept(kept):
  trainer, state = kept
  # The best rate of `good` was at the edge, which was moved before the check.
  assert rates_of(trainer, 'tune-2', 'good') == {'s': {8e-3}}
  assert rates_of(trainer, 'tune-3', 'good') == {'m': {2e-3, 4e-3, 8e-3}}
  assert rates_of(trainer, 'tune-3', 'base') == {'m': {1e-3, 2e-3, 4e-3}}
  assert rates_of(trainer, 'tune-3', 'same') == {}  # was tuned at each size
  assert {run.seed for run in trainer.asked['tune-3']} == {
      run.seed for run in trainer.asked['tune-1']}
  assert 'tune-4' not in trainer.asked
  checks = {(row.variant, row.workload): row for row in state.records['tuned']
            if row.size == 'm' and row.variant != 'same'}
  assert len(checks) == 4 and all(row.kept for row in checks.values())
  assert checks['good', 'text'].changes == {'optim.lr': 4e-3}
  assert checks['good', 'text'].at_edge == ()
  assert rates_of(trainer, 'confirm', 'good') == {
      size: {4e-3} for size in 'sml'}


def test_what_moves_is_tuned_there_and_at_each_larger_size(moved):
  trainer, state = moved
  rows = {(row.variant, row.size): row for row in state.records['tuned']
          if row.workload == 'text'}
  assert not rows['good', 'm'].kept and rows['base', 'm'].kept
  assert rows['good', 's'].changes == {'optim.lr': 4e-3}
  assert rows['good', 'm'].changes == {'optim.lr': 8e-3}
  assert rows['good', 'l'].changes == {'optim.lr': 8e-3}
  assert ('base', 'l') not in rows
  # At the size of the check it goes on from the neighbour, which was an edge.
  assert rates_of(trainer, 'tune-4', 'good') == {
      'm': {1.6e-2}, 'l': {1e-3, 2e-3, 4e-3}}
  assert rates_of(trainer, 'confirm', 'good') == {
      's': {4e-3}, 'm': {8e-3}, 'l': {8e-3}}
  assert rates_of(trainer, 'confirm', 'base') == {
      size: {2e-3} for size in 'sml'}
  # The size that is predicted has the rates of the largest one that has any.
  assert rates_of(trainer, 'largest', 'good') == {'xl': {8e-3}}
  assert rates_of(trainer, 'largest', 'same') == {'xl': {2e-3}}


def test_only_runs_of_a_size_that_is_not_larger_tell_of_a_rate(moved, kept):
  """The noise of a choice is that of the runs that it was made by. Those of a
  check tell of its size and of the larger ones."""
  for (trainer, state), of_large in (moved, 'l'), (kept, 'm'):
    runs_of_tuning = tuning.read_tuning_runs(
        trainer.frozen.plan, state.outcomes)
    points = {}
    for run in state.outcomes:
      if (run.variant, run.workload) == ('good', 'text'):
        points[run.size] = runs_of_tuning._tuned_point(run)[1]
        if run.phase == 'confirm':
          assert runs_of_tuning.draw_misses(run).shape == (tuning.NUM_DRAWS,)
          assert not runs_of_tuning.is_at_edge(run)
    assert points == {'s': 's', 'm': 'm', 'l': of_large, 'xl': of_large}


def test_the_choice_is_told(moved, kept):
  trainer, state = moved
  plan = trainer.frozen.plan
  rows = plans.to_json(state.records['tuned'])
  sentence = tuning.describe_check(plan, rows)
  assert sentence.startswith('At m the values of 4 searches, which muP carries')
  assert 'rules did not hold for good on text, good on copy: a' in sentence
  warnings = comparison._doubt_tuning(plan, rows)
  assert sentence in warnings
  assert any('good at m (optim.lr=0.008, base optim.lr=0.002); good at l'
             in warning for warning in warnings)
  rows = plans.to_json(kept[1].records['tuned'])
  assert 'rules held for all' in tuning.describe_check(plan, rows)
  assert tuning.describe_check(plan, rows) not in comparison._doubt_tuning(
      plan, rows)
  assert not tuning.describe_check(plan, [])
  lines = phases.PHASES['tune'].summary(state.records)
  assert any('m good' in line and line.endswith('carried values kept: False')
             for line in lines)


def test_a_plan_counts_the_check(kept):
  trainer, _ = kept
  tune = {cost.phase: cost
          for cost in results.costs(trainer.frozen, 1, None)}['tune']
  # Three rates and three seeds, on two workloads: `same` at three sizes, the
  # base and `good` at the smallest, and at that of the check.
  assert tune.runs == 9 * 2 * (3 + 2 + 2)
  # Edges of ten searches; and of a rate that does not hold a search at `l`,
  # with edges there and at `m`.
  assert tune.note == (
      'and at most 60 more runs, where an optimum is at an edge; and 21 more '
      'at most for each variant and workload whose values do not hold at m')
  asked = sum(len(runs) for folder, runs in trainer.asked.items()
              if folder.startswith('tune'))
  assert tune.runs <= asked <= tune.runs + 60


def test_studies_without_mup_have_no_check():
  trainer, state = run_study(
      tuned_sizes=('s', 'm', 'l'), checked_size=None, tuned_at_each_size=None)
  assert all(row.kept is None for row in state.records['tuned'])
  assert len(state.records['tuned']) == 3 * 3 * 2
  assert not tuning.describe_check(
      trainer.frozen.plan, plans.to_json(state.records['tuned']))


def table_of_runs(losses, diverged=()):
  """Returns what tuning has of a table of the losses at size m.

  Args:
    losses: by variant and rate, the loss with each seed.
    diverged: the variant and the rate of which a run diverged.
  """
  outcomes = []
  for (variant, rate), by_seed in losses.items():
    for seed, loss in enumerate(by_seed):
      outcomes.append(plans.Outcome(
          phase='tune', variant=variant, size='m', workload='text', seed=seed,
          values={'loss': loss, 'copy': 0.0}, flops=1.0, seconds=1.0, params=1,
          diverged=(variant, rate) == diverged, changes={'optim.lr': rate}))
  return tuning.read_tuning_runs(carrying_plan(), outcomes)


def test_a_neighbour_is_better_by_more_than_the_noise_of_both():
  """By hand: the residuals of each variant are +-0.01, 0.02 and 0.01 three
  times, whose squares sum to 0.0018 over 4 degrees of freedom, so that with two
  variants s = sqrt(0.0036 / 8) = 0.0212. Student's quantile of 8 degrees at
  0.975 is 2.306, and 2.306 * 0.0212 * sqrt(2 / 3) = 0.0399."""
  residuals = {1e-3: (0.01, -0.02, 0.01), 2e-3: (0.01, 0.01, -0.02),
               4e-3: (-0.02, 0.01, 0.01)}
  seeds = np.array([0.3, -0.2, 0.1])  # what the runs of a seed have in common
  losses = {}
  for variant, means in (('good', (2.0, 2.0, 2.0)), ('base', (2.1, 2.0, 2.2))):
    for (rate, residual), mean in zip(residuals.items(), means):
      losses[variant, rate] = (mean + seeds + residual).tolist()
  point, carried = ('good', 'm', 'text'), (2e-3,)
  assert table_of_runs(losses).deviations['m', 'text'].sd == pytest.approx(
      math.sqrt(0.0036 / 8))
  assert table_of_runs(losses).better_neighbours(point, carried) == []
  for gain, better in (0.0398, []), (0.0401, [(4e-3,)]):
    changed = losses | {('good', 4e-3): (
        2.0 - gain + seeds + residuals[4e-3]).tolist()}
    found = table_of_runs(changed).better_neighbours(point, carried)
    assert found == better
    # What diverged has no mean to be better by, and no rate of which all other
    # runs ended is kept.
    found = table_of_runs(changed, ('good', 4e-3)).better_neighbours(
        point, carried)
    assert found == []
    found = table_of_runs(changed, ('good', 2e-3)).better_neighbours(
        point, carried)
    assert found == [(1e-3,), (4e-3,)]


def test_rules_that_hold_are_given_up_for_one_variant_of_twenty():
  """Where all rates are equally good; and a loss of three standard deviations
  of a run is noticed in most cases."""
  rng = np.random.default_rng(0)
  given_up, noticed = [], []
  for _ in range(40):
    losses = {(f'v{i}', rate): rng.normal(2.0, 0.02, 3)
              for i in range(20) for rate in RATES}
    for gain, decisions in (0.0, given_up), (0.06, noticed):
      shifted = {key: (by_seed - gain * (key[1] == 4e-3)).tolist()
                 for key, by_seed in losses.items()}
      runs_of_tuning = table_of_runs(shifted)
      for i in range(20):
        better = runs_of_tuning.better_neighbours(
            (f'v{i}', 'm', 'text'), (2e-3,))
        decisions.append(bool(better))
  # Two tests at half the level, which share the runs of the carried rate.
  assert 0.025 < np.mean(given_up) < 0.06
  assert np.mean(noticed) > 0.8


@pytest.mark.parametrize('best, neighbours', [
    (2, [1, 4]), (4, [2, 8]), (1, [2])])
def test_neighbours_go_on_where_the_grid_ends(best, neighbours):
  search = phases.Search(
      carrying_plan(tuning=plans.Tuning({'model.num_layers': (1, 2, 4)})),
      variant='base', size='s', workload='text')
  search.tried = [{'changes': {'model.num_layers': value}}
                  for value in (1, 2, 4)]
  search.best = {'changes': {'model.num_layers': best}}
  assert search.neighbours_of_best() == [
      {'model.num_layers': value} for value in neighbours]


# On disk.


def loss_of(config):
  """Returns a loss whose best rate is another one without positions in models
  that are wider than the smallest one."""
  is_none = config.model.position == 'none'
  best = 4e-3
  if is_none and config.model.d_model > 8:
    best = 8e-3
  return (2.0 + is_none + 0.1 * math.log2(config.optim.lr / best) ** 2
          + 0.01 * studies.spread(
              config.seed, config.model.position, str(config.init_seed),
              str(config.optim.lr)))


def start(workdir, frozen, stop_after=None):
  """Runs a study as `run` does; returns the trainer."""
  plan = plans.adopt_plan(workdir, dataclasses.replace(
      frozen, notes=[], amendments=[]))
  trainer = studies.Written(workdir, plan, loss=loss_of, stop_after=stop_after)
  study.run_and_report_phases(
      workdir, plan, trainer, studies.arguments(until='tune', anyway=True))
  return trainer


def test_a_check_that_is_killed_goes_on_and_is_computed_from_the_runs(
    tmp_path, capsys):
  frozen = freeze.freeze_plan(studies.write(
      tmp_path, "TUNING.update(rungs=1, extend=1)",
      base="c.model.update(parametrization='mup', mup_base_width=8)"))
  assert frozen.plan.checked_size == 'm'
  workdir = tmp_path / 'study'
  # Noise, and three rates at the smallest size; the check has 18 runs.
  before = 2 * 3 * 3 + 2 * 3 * 3
  with pytest.raises(Stopped):
    start(workdir, frozen, stop_after=before + 5)
  trainer = start(workdir, frozen)
  folders = [folder for folder, _, _ in trainer.did]
  assert folders.count('tune-2') == 18 - 5 and 'tune-1' not in folders
  assert 'tune-3' in folders

  # It is told by the state, and by what follows from the runs alone.
  capsys.readouterr()
  told = "MuP's rules did not hold for none on text"
  found = recompute.recompute_results(workdir, frozen)
  assert found['missing'] == 'screen was not begun'
  assert told in ' '.join(report.describe_methods(frozen, found))
  assert [(row['variant'], row['size'], row['kept'])
          for row in found['tuned']] == [
      ('base', 's', None), ('none', 's', None), ('base', 'm', True),
      ('none', 'm', False), ('none', 'l', None)]
  status._study(workdir, as_json=False)
  assert told in capsys.readouterr().out
