"""Studies on disk: killed and resumed, by two runners, amended, failed."""

import copy
import dataclasses
import json
import threading

import pytest

from configs.errors import EnvironmentFailure, RequestError
from tests.helpers import studies
from tools.compare import frozen as frozen_lib
from tools.compare import costs, freeze, phases, results, trainer
from tools.compare import study_status as status
from tools.compare import plan as plans
from tools.compare import study_run as run_lib

pytestmark = pytest.mark.slow
KEPT = ('outcomes', 'noise', 'announced', 'tuned', 'screen', 'confirm')


@pytest.fixture(scope='module')
def frozen(tmp_path_factory):
  return freeze.freeze(studies.write(tmp_path_factory.mktemp('study')))


def loss_of(config):
  """Without positions a model is worse; the best learning rate is the higher
  one; and there is noise."""
  return (2.0 + (config.model.position == 'none') + 0.1 * config.optim.lr
          + 0.01 * studies.spread(config.seed, config.model.position,
                                  str(config.init_seed)))


def start(workdir, frozen, loss=loss_of, stop_after=None, retry=False, **args):
  """Freezes and runs as `run` does; returns the trainer."""
  plan = run_lib.adopted(workdir, dataclasses.replace(
      frozen, notes=[], amendments=[]), args.pop('amend', ''))
  own = studies.Written(workdir, plan, retry=retry, loss=loss,
                        stop_after=stop_after)
  assert run_lib.go(workdir, plan, own, studies.arguments(**args)) == 0
  return own


def read(workdir):
  return json.loads((workdir / 'results.json').read_text())


@pytest.fixture(scope='module')
def whole(frozen, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  return start(workdir, frozen), read(workdir), workdir


def test_what_a_study_found_is_in_its_results(whole, frozen):
  own, found, workdir = whole
  assert set(plans.RESULTS) <= set(found)
  assert found['study'] == {'name': 'made', 'hash': frozen.hash}
  verdict, = found['confirm']
  assert (verdict['variant'], verdict['verdict']) == ('none', 'worse')
  assert len(found['outcomes']) == len(own.did) == len(set(own.did))
  for phase, row in found['phases'].items():
    runs = [x for x in found['outcomes'] if x['phase'] == phase]
    assert row['finished'] and row['done'] == row['planned'] == len(runs)
    assert row['flops'] == pytest.approx(sum(x['flops'] for x in runs))
    assert row['seconds'] == pytest.approx(sum(x['seconds'] for x in runs))
    # A batch is 4 rows of 8 tokens; a step takes half a second.
    assert row['tokens'] == pytest.approx(row['seconds'] * 2 * 4 * 8)
  assert found['phases']['tune']['tokens'] == 2 * 3 * (2 * 2 + 4) * 4 * 8
  assert all(row['changes'] == {'optim.lr': 4e-3} for row in found['tuned'])
  curves = [x['curve'] for x in found['outcomes'] if x['curve']]
  assert len(curves) == found['phases']['confirm']['done']
  assert curves[0]['step'] == [2, 4] and curves[0]['seconds'] == [1.0, 2.0]
  assert found['as_planned'] == {'same': True, 'differences': []}
  assert found['provenance']['versions']['jax']


@pytest.mark.long
def test_a_study_that_is_stopped_again_and_again_ends_as_one_that_is_not(
    whole, frozen, tmp_path):
  own, found, _ = whole
  did = []
  while not did or len(did[-1]) == 19:
    did.append(start(tmp_path, frozen, stop_after=19).did)
  assert len(did) > 2
  assert sorted(run for some in did for run in some) == sorted(own.did)
  again = read(tmp_path)
  assert {name: again[name] for name in KEPT} == {
      name: found[name] for name in KEPT}


@pytest.mark.long
def test_two_runners_share_a_study_and_end_alike(whole, frozen, tmp_path):
  own, found, _ = whole
  did, errors = [], []

  def work():
    try:
      did.append(start(tmp_path, frozen).did)
    except Exception as error:  # shown by the assertion below
      errors.append(error)

  threads = [threading.Thread(target=work) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not errors
  assert sorted(run for some in did for run in some) == sorted(own.did)
  again = read(tmp_path)
  assert {name: again[name] for name in KEPT} == {
      name: found[name] for name in KEPT}


def test_what_is_done_is_not_done_again(whole, frozen):
  _, found, workdir = whole
  assert start(workdir, frozen).did == []
  assert read(workdir) == found


@pytest.mark.long
@pytest.mark.parametrize('loss', [None, 9.0], ids=(
    'too many bad steps', 'well above guessing'))
def test_runs_that_diverge_are_results(frozen, tmp_path, loss):
  lost = frozen.plan.seeds.of('noise')[0]
  start(tmp_path, frozen, until='noise', anyway=True, loss=lambda config: (
      loss if config.seed == lost and not config.init_seed
      else loss_of(config)))
  found = read(tmp_path)
  bad = [x for x in found['outcomes'] if x['diverged']]
  assert len(bad) == found['phases']['noise']['failed'] == 3
  assert {(x['variant'], x['seed']) for x in bad} == {('base', lost)}
  assert all(x['values'] == {'loss': frozen.plan.primary.chance} for x in bad)


def test_a_run_that_has_learnt_nothing_has_not_diverged(frozen, tmp_path):
  guessing = frozen.plan.primary.chance
  own = studies.Written(tmp_path, frozen, loss=lambda config: 1.01 * guessing)
  outcome, = own.train('noise', phases.noise_runs(frozen)[:1])
  assert not outcome.diverged
  assert outcome.values == {'loss': pytest.approx(1.01 * guessing)}


def test_a_run_diverges_by_what_guessing_gives_its_objective(frozen, tmp_path):
  labels = dataclasses.replace(frozen, points=[
      row | {'guess': 0.7} for row in frozen.points])
  for loss, diverged in (0.8, False), (0.9, True):
    own = studies.Written(tmp_path / str(loss), labels,
                          loss=lambda config, loss=loss: loss)
    outcome, = own.train('noise', phases.noise_runs(labels)[:1])
    assert outcome.diverged == diverged


def test_runs_that_fail_otherwise_end_the_study_and_are_retried(
    frozen, tmp_path):
  lost = frozen.plan.seeds.of('noise')
  def loss(config):
    if config.init_seed and config.seed == lost[0]:
      return None
    return 'no space' if config.seed == lost[1] else loss_of(config)
  with pytest.raises(EnvironmentFailure,
                     match='6 runs failed that did not diverge: .*no space'):
    start(tmp_path, frozen, loss=loss)
  with pytest.raises(EnvironmentFailure):
    start(tmp_path, frozen)
  own = start(tmp_path, frozen, retry=True, until='noise', anyway=True)
  assert {seed for *_, seed in own.did} == {lost[1]} and len(own.did) == 6


def test_a_measure_that_no_run_reports_is_named(frozen, tmp_path):
  measure = dataclasses.replace(frozen.plan.primary, figure='bits_per_byte')
  other = dataclasses.replace(frozen, plan=dataclasses.replace(
      frozen.plan, measures=(measure,)))
  with pytest.raises(RequestError, match="is 'bits_per_byte', which .* has not "
                     'reported: it has loss, accuracy'):
    start(tmp_path, other)


def _with(frozen, **plan):
  return dataclasses.replace(frozen, plan=dataclasses.replace(
      frozen.plan, **plan))


@pytest.mark.long
def test_a_changed_plan_is_refused_and_amended_for_a_reason(frozen, tmp_path):
  with pytest.raises(RequestError, match='has no plan yet'):
    run_lib.adopted(tmp_path, frozen, 'why not')
  start(tmp_path, frozen)
  with pytest.raises(RequestError, match='is the one that was frozen'):
    run_lib.adopted(tmp_path, frozen, 'why not')
  other = _with(frozen, alpha=0.01)
  with pytest.raises(RequestError, match='planned otherwise: plan.alpha'):
    start(tmp_path, other)
  assert start(tmp_path, other, amend='a reviewer asked').did == []
  told = read(tmp_path)['as_planned']
  assert not told['same']
  assert told['differences'] == [
      'The plan was changed (plan.alpha) when noise, tune, screen, confirm had '
      'been looked at. Reason: a reviewer asked']
  kept = frozen_lib.load(tmp_path)
  assert kept.hash == other.hash
  assert [own['before'] for own in kept.amendments] == [frozen.hash]


@pytest.mark.long
def test_what_an_amended_plan_runs_otherwise_runs_anew(frozen, tmp_path):
  start(tmp_path, frozen, until='noise')
  other = dataclasses.replace(frozen, points=[
      row | {'changes': row['changes'] | {'model.norm': 'rmsnorm'}}
      for row in frozen.points])
  own = start(tmp_path, other, until='noise', amend='another norm')
  assert len(own.did) == 18 and (tmp_path / 'noise.1' / 'sweep.json').exists()
  assert start(tmp_path, other, until='noise').did == []
  told = read(tmp_path)['as_planned']['differences']
  assert 'noise had run under an earlier plan; it ran anew as noise.1.' in told


def test_what_ran_on_other_data_runs_anew(frozen, tmp_path):
  start(tmp_path, frozen, until='noise', stop_after=2)
  file = tmp_path / 'noise/sweep.json'
  tree = json.loads(file.read_text())
  (source, held), = tree['sources'].items()
  assert held == frozen.sources[source]
  # The file's own hash says nothing of the data.
  other = dataclasses.replace(frozen, sources=frozen.sources | {'file': 'new'})
  assert len(start(tmp_path, other, until='noise', stop_after=2,
                   amend='a typo').did) == 2
  assert [path.name for path in results.folders(tmp_path)] == ['noise']
  other = dataclasses.replace(frozen, sources={'file': 'new', source: 'other'})
  start(tmp_path, other, until='noise', stop_after=2, amend='more text')
  assert [path.name for path in results.folders(tmp_path)] == [
      'noise', 'noise.1']
  file.write_text(json.dumps(tree | {'sources': {source: 5}}))
  with pytest.raises(RequestError, match=r'sweep.json.sources.* is damaged'):
    start(tmp_path, other, until='noise')
  # An earlier version did not keep what the data held.
  del tree['sources']
  file.write_text(json.dumps(tree))
  own = studies.Written(tmp_path, other)
  assert trainer.compatible(file.parent, own.describe(
      'noise', phases.noise_runs(other))) == file.parent


@pytest.mark.long
def test_more_seeds_go_into_the_same_sweep(frozen, tmp_path):
  start(tmp_path, frozen, until='noise')
  more = dataclasses.replace(frozen.plan.seeds, noise=4)
  own = start(tmp_path, _with(frozen, seeds=more), until='noise',
              amend='too few')
  assert len(own.did) == 6  # a pair more at each size
  assert not (tmp_path / 'noise.1').exists()


def test_what_an_amended_plan_leaves_out_is_not_run(frozen, tmp_path):
  more = dataclasses.replace(frozen.plan.seeds, noise=4)
  start(tmp_path, _with(frozen, seeds=more), until='noise', stop_after=2)
  own = start(tmp_path, frozen, until='noise', amend='too many')
  assert len(own.did) == 16  # of 18, and none of the six of the fourth seed
  assert {seed for _, _, seed in own.did} <= set(frozen.plan.seeds.of('noise'))


@pytest.mark.long
def test_a_plan_of_before_some_fields_goes_on(frozen, tmp_path):
  old = dataclasses.replace(frozen, base_config=copy.deepcopy(
      frozen.base_config))
  for group, name in (('model', 'mixer'), ('data', 'batch_ramp')):
    del old.base_config[group][name]
  start(tmp_path, old, until='noise')
  for path in tmp_path.glob('noise/points/*/*/config.json'):
    tree = json.loads(path.read_text())
    del tree['model']['mixer']
    path.write_text(json.dumps(tree))
  own = start(tmp_path, frozen)  # which needs no --amend
  assert not [did for did in own.did if did[0] == 'noise']
  assert frozen_lib.load(tmp_path).hash == old.hash
  assert read(tmp_path)['confirm'][0]['verdict'] == 'worse'


def test_a_plan_that_was_written_over_is_refused(frozen, tmp_path):
  run_lib.adopted(tmp_path, frozen, '')
  path = tmp_path / 'study.json'
  path.write_text(path.read_text().replace('"effect": 0.5', '"effect": 5.0'))
  with pytest.raises(RequestError, match='is not as it was written'):
    frozen_lib.load(tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_a_weak_study_goes_on_for_once_told_and_says_so(frozen, tmp_path):
  weak = _with(frozen, effect=1e-5)
  with pytest.raises(phases.TooWeak):
    start(tmp_path, weak)
  assert [path.name for path in results.folders(tmp_path)] == ['noise']
  start(tmp_path, weak, anyway=True)
  told, = read(tmp_path)['as_planned']['differences']
  assert told.startswith('The study went on although it was too weak')
  start(tmp_path, weak)
  weaker = _with(frozen, effect=1e-6)
  with pytest.raises(phases.TooWeak):  # that was told of another plan
    start(tmp_path, weaker, amend='a smaller effect matters')
  start(tmp_path, weaker, anyway=True)
  assert len(frozen_lib.load(tmp_path).notes) == 2


def test_code_that_changed_is_told(frozen, tmp_path):
  now = ['commit aaaaaaaaaaaa', 'commit bbbbbbbbbbbb with changes cc']
  planned = dataclasses.replace(frozen, code={'commit': 'a' * 40, 'diff': ''})
  assert results.as_planned(tmp_path, planned, now[:1])['same']
  told, = results.as_planned(tmp_path, planned, now)['differences']
  assert told == ('The plan was made with commit aaaaaaaaaaaa, and runs were '
                  'trained by commit bbbbbbbbbbbb with changes cc.')


def test_hours_are_known_of_what_has_run_or_was_timed(
    whole, frozen, monkeypatch):
  _, found, workdir = whole
  assert costs.known(workdir / 'nothing', frozen) is None
  monkeypatch.setattr(trainer, 'Trainer', studies.Written)
  for times in costs.known(workdir, frozen), costs.timed(frozen, 1, 2):
    assert times.step == {(size, 'text'): 0.5 for size in 'sml'}
    assert times.program == 0.0  # nothing was trained
  noise = costs.of(frozen, 8, times)[0]
  assert noise.seconds == pytest.approx(found['phases']['noise']['seconds'])
  table = costs.table([noise._replace(seconds=7200.0)], 2)
  assert table.splitlines()[1].split() == [
      'noise', '18', '3', '2,304', f'{noise.flops:.3g}', '1.00']


def test_status_says_how_far_each_phase_is(whole, frozen, tmp_path, capsys):
  _, found, workdir = whole
  capsys.readouterr()
  assert status.main(studies.arguments(workdir=workdir, json=True)) == 0
  rows = json.loads(capsys.readouterr().out)['phases']
  assert {row['phase']: row['states'] for row in rows} == {
      phase: {'done': row['done']} for phase, row in found['phases'].items()}
  run_lib.adopted(tmp_path, frozen, '')
  assert status.main(studies.arguments(workdir=tmp_path, json=False)) == 0
  assert 'confirm  not begun, 18 planned at most' in capsys.readouterr().out


def test_a_run_ends_with_the_path_of_the_report(whole, frozen, capsys):
  workdir = whole[2]
  start(workdir, frozen, until='report')
  page = workdir / 'report' / 'index.html'
  assert capsys.readouterr().out.endswith(f'report: {page}\n')
  assert page.is_file()


def test_a_run_of_another_config_is_refused(whole, frozen, tmp_path):
  own = studies.Written(tmp_path, frozen, loss=loss_of)
  runs = phases.noise_runs(frozen)[:1]
  own.train('noise', runs)
  file = tmp_path / 'noise/points' / runs[0].point / 'seed-0/config.json'
  file.write_text(file.read_text().replace('"b2": 0.95', '"b2": 0.9'))
  with pytest.raises(RequestError, match='of another config than the plan .*'
                     'optim.b2'):
    own.train('noise', runs)


def test_a_signal_is_told_apart_from_an_end(frozen, tmp_path):
  own = studies.Written(tmp_path, frozen, loss=loss_of, stop_after=0)
  with pytest.raises(trainer.Stopped):
    own.train('noise', phases.noise_runs(frozen))
  assert frozen_lib.changed(frozen, frozen) == []
