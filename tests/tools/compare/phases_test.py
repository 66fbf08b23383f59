"""Phases: what each asks for, and what follows from what it gets."""

import dataclasses

import pytest

from tests.helpers import studies
from tools.compare import phases, tuning
from tools.compare import plan as plans


@pytest.fixture(scope='module')
def whole():
  frozen = studies.frozen(studies.plan())
  trainer = studies.Trainer(frozen)
  seen = []
  found = phases.run(frozen, trainer, after=lambda found: seen.append(
      (list(found.finished), len(found.outcomes))))
  return frozen, trainer, found, seen


def test_a_whole_study_finds_what_is_there(whole):
  _, trainer, found, seen = whole
  assert found.finished == list(plans.PHASES)
  assert [names for names, _ in seen] == [
      list(plans.PHASES[:i]) for i in (1, 2, 3, 4)]
  assert [row.variant for row in found.screen if row.passed] == ['good']
  verdicts = {(row.variant, row.measure): row.verdict for row in found.confirm}
  assert verdicts['good', 'loss'] == 'better'
  assert {variant for variant, _ in verdicts} == {'good'}
  assert len(found.outcomes) == sum(map(len, trainer.asked.values()))


def test_each_phase_asks_for_its_runs(whole):
  frozen, trainer, _, _ = whole
  plan = frozen.plan
  noise = trainer.asked['noise']
  assert len(noise) == 3 * 2 * 2 * 6  # sizes, workloads, base and again, seeds
  again = [run for run in noise if run.variant == plans.AGAIN]
  assert len(again) == len(noise) / 2
  assert all(run.changes['init_seed'] for run in again)
  assert {(run.size, run.workload) for run in trainer.asked['screen']} == {
      ('s', 'text')}
  confirm = trainer.asked['confirm']
  assert {run.variant for run in confirm} == {'base', 'good'}
  assert {run.size for run in confirm} == {'s', 'm', 'l'}
  for folder, runs in trainer.asked.items():
    phase = folder.partition('-')[0]
    assert {run.seed for run in runs} == set(plan.seeds.of(phase))
    # Nothing but tuning sees the half of what is held out that tuning sees.
    assert {run.changes['eval.part'] for run in runs} == {
        'first' if phase == 'tune' else 'second'}
    assert len({(run.point, run.seed) for run in runs}) == len(runs)


def test_every_variant_is_tuned_alike_and_takes_its_own_best(whole):
  frozen, trainer, found, _ = whole
  spent = {}
  for run in trainer.asked['tune-1'] + trainer.asked['tune-2']:
    spent[run.variant] = spent.get(run.variant, 0) + run.share
  assert len(set(spent.values())) == 1 and len(spent) == 4
  best = {row.variant: row.changes['optim.lr'] for row in found.tuned}
  assert best == studies.BEST_LR
  for run in trainer.asked['confirm'] + trainer.asked['screen']:
    assert run.changes['optim.lr'] == studies.BEST_LR[run.variant]
  # The optimum of `good` was at the edge: one value further out was tried.
  assert {run.variant for run in trainer.asked['tune-3']} == {'good'}
  assert {run.changes['optim.lr'] for run in trainer.asked['tune-3']} == {8e-3}
  assert not any(row.at_edge for row in found.tuned)


def test_a_short_rung_has_a_whole_schedule_of_its_own(whole):
  _, trainer, _, _ = whole
  for run in trainer.asked['tune-1']:
    assert run.changes['train.steps'] == run.changes['eval.every_steps'] == 50
    assert run.changes['optim.warmup_steps'] == 5
    assert run.changes['data.batch_ramp'] == '20:8'
  assert all('train.steps' not in run.changes
             for run in trainer.asked['tune-2'])


@pytest.mark.parametrize('share, average', [(0.5, 3), (0.25, 2), (0.2, 0)])
def test_a_short_run_has_the_mean_of_as_many_checkpoints_as_it_has(
    share, average):
  base = dict(optim=dict(warmup_steps=10, decay_steps=0),
              checkpoint=dict(every_steps=20, average=5),
              log=dict(every_steps=10), data={})
  changes = {}
  phases.shorten(changes, base, 100, share)
  assert changes['checkpoint.average'] == average
  del base['checkpoint']['average']  # as in an earlier plan
  phases.shorten(changes := {}, base, 100, share)
  assert 'checkpoint.average' not in changes


def test_with_mup_the_smallest_size_alone_is_tuned():
  frozen = studies.frozen(studies.plan(tuned_sizes=('s',)))
  trainer = studies.Trainer(frozen)
  found = phases.run(frozen, trainer)
  assert {row.size for row in found.tuned} == {'s'}
  assert {run.size for run in trainer.asked['tune-1']} == {'s'}
  assert {(run.size, run.changes['optim.lr'])
          for run in trainer.asked['confirm'] if run.variant == 'good'} == {
              (size, 4e-3) for size in 'sml'}


def test_a_study_that_is_too_weak_stops_before_it_spends():
  frozen = studies.frozen(studies.plan(effect=1e-4))
  trainer = studies.Trainer(frozen)
  kept = []
  with pytest.raises(phases.TooWeak, match='less than the 80% .*--anyway'):
    phases.run(frozen, trainer, after=kept.append)
  assert list(trainer.asked) == ['noise']
  assert kept[-1].noise and not kept[-1].announced.enough
  found = phases.run(frozen, trainer, anyway=True)
  assert found.finished == list(plans.PHASES)


def test_until_ends_with_a_phase():
  frozen = studies.frozen(studies.plan())
  trainer = studies.Trainer(frozen)
  assert phases.run(frozen, trainer, 'tune').finished == ['noise', 'tune']
  assert not {'screen', 'confirm'} & trainer.asked.keys()


def test_nothing_is_confirmed_where_nothing_passes():
  frozen = studies.frozen(studies.plan(variants=('same',)))
  trainer = studies.Trainer(frozen)
  found = phases.run(frozen, trainer)
  assert 'confirm' not in trainer.asked and found.confirm == []
  assert found.finished[-1] == 'confirm'


def _outcomes(search, losses, diverged=()):
  return [[plans.Outcome(
      'tune', *search.name, 0, {'loss': loss}, i in diverged, 1.0, 1.0, 1, {},
      loss)] for i, loss in enumerate(losses)]


def _search(values=(1e-3, 2e-3, 4e-3, 8e-3), **changes):
  own = studies.plan(tuning=plans.Tuning({'optim.lr': values}, **changes))
  return tuning.Search(own, 'base', 's', 'text')


def test_the_better_half_survives_a_rung():
  search = _search(rungs=3)
  assert search.share == 0.25
  search.take(25, _outcomes(search, (3.0, 2.0, 1.0, 4.0)))
  assert [c['optim.lr'] for c in search.candidates] == [4e-3, 2e-3]
  assert search.share == 0.5
  search.take(50, _outcomes(search, (2.0, 1.0)))
  assert [c['optim.lr'] for c in search.candidates] == [2e-3]
  search.take(100, _outcomes(search, (1.0,)))
  assert search.candidates == () and search.found().at_edge == ()
  assert search.found().changes == {'optim.lr': 2e-3}
  assert tuning.kept(plans.Tuning({}), 3) == 2  # the larger half
  assert search.runs == 7 and search.found().flops == 7.0


def test_an_edge_moves_as_often_as_the_plan_says_and_is_marked_then():
  search = _search((1e-3, 2e-3), rungs=1, extend=2)
  search.take(100, _outcomes(search, (1.0, 2.0)))
  for lr, loss in ((5e-4, 0.9), (2.5e-4, 0.8)):
    assert [c['optim.lr'] for c in search.candidates] == [lr]
    search.take(100, _outcomes(search, (loss,)))
  assert search.candidates == ()
  assert search.found().changes == {'optim.lr': 2.5e-4}
  assert search.found().at_edge == ('optim.lr',)
  search = _search((1e-3, 2e-3), rungs=1, extend=1)
  search.take(100, _outcomes(search, (1.0, 2.0)))
  search.take(100, _outcomes(search, (1.5,)))
  assert search.found().changes == {'optim.lr': 1e-3}
  assert search.found().at_edge == ()


def test_an_edge_that_is_the_last_whole_number_is_not_trained_again():
  own = studies.plan(tuning=plans.Tuning(
      {'optim.warmup_steps': (1, 2)}, rungs=1, extend=2))
  search = tuning.Search(own, 'base', 's', 'text')
  search.take(100, _outcomes(search, (1.0, 2.0)))
  assert search.candidates == ()
  assert search.found().at_edge == ('optim.warmup_steps',)
  assert tuning.corners(own.tuning, 2) == [
      {'optim.warmup_steps': 1}, {'optim.warmup_steps': 8}]


def test_what_diverged_is_the_worst_and_ties_go_by_the_loss():
  search = _search((1e-3, 2e-3), rungs=1, extend=0)
  search.take(100, _outcomes(search, (1.0, 2.0), diverged=(0,)))
  assert search.found().changes == {'optim.lr': 2e-3}
  own = studies.plan(tuning=plans.Tuning({'optim.lr': (1e-3, 2e-3)}, rungs=1))
  search = tuning.Search(own, 'base', 's', 'copy')
  outcomes = _outcomes(search, (1.0, 0.5))
  outcomes = [[x._replace(values={'copy': 0.25}) for x in row]
              for row in outcomes]
  search.take(100, outcomes)
  assert search.best['changes'] == {'optim.lr': 2e-3}


def test_two_fields_are_searched_together():
  own = studies.plan(tuning=plans.Tuning(
      {'optim.lr': (1e-3, 2e-3), 'optim.warmup_steps': (4, 8)}, rungs=1))
  search = tuning.Search(own, 'base', 's', 'text')
  assert len(search.candidates) == 4
  search.take(100, _outcomes(search, (1.0, 2.0, 3.0, 4.0)))
  assert [dict(c) for c in search.candidates] == [
      {'optim.lr': 5e-4, 'optim.warmup_steps': 4},
      {'optim.lr': 1e-3, 'optim.warmup_steps': 2}]


def test_phases_follow_from_the_outcomes_alone():
  frozen = studies.frozen(studies.plan())
  one, two = (phases.run(frozen, studies.Trainer(frozen)) for _ in range(2))
  assert plans.to_json(dataclasses.asdict(one)) == plans.to_json(
      dataclasses.asdict(two))
