"""Studies as they run: the phases, what each asks for and what follows, and
what stands in a study's files while it goes on."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from configs.errors import EnvironmentFailure, RequestError
from tests.helpers import studies
from tools.compare import costs, freeze, phases, results, status, study
from tools.compare import decide, trainer, tuning
from tools.compare import frozen as frozen_lib
from tools.compare import plan as plans

ROOT = pathlib.Path(__file__).parents[3]
SECONDS = 1500  # that a process may take beside other tests
KEPT = ('outcomes', 'noise', 'announced', 'tuned', 'screen', 'confirm')


@pytest.fixture(scope='module')
def made():
  frozen = studies.frozen(studies.plan())
  trainer = studies.Trainer(frozen)
  seen = []
  found = phases.run(frozen, trainer, after=lambda found: seen.append(
      (list(found.finished), len(found.outcomes))))
  return frozen, trainer, found, seen


def test_a_whole_study_finds_what_is_there(made):
  _, trainer, found, seen = made
  assert found.finished == list(plans.PHASES)
  assert [names for names, _ in seen] == [
      list(plans.PHASES[:i]) for i in (1, 2, 3, 4)]
  assert [row.variant for row in found.screen if row.passed] == ['good']
  verdicts = {(row.variant, row.measure): row.verdict for row in found.confirm}
  assert verdicts['good', 'loss'] == 'better'
  assert {variant for variant, _ in verdicts} == {'good'}
  assert len(found.outcomes) == sum(map(len, trainer.asked.values()))


def test_each_phase_asks_for_its_runs(made):
  frozen, trainer, _, _ = made
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


def test_every_variant_is_tuned_alike_and_takes_its_own_best(made):
  frozen, trainer, found, _ = made
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


def test_a_short_rung_has_a_whole_schedule_of_its_own(made):
  _, trainer, _, _ = made
  for run in trainer.asked['tune-1']:
    assert run.changes['train.steps'] == run.changes['eval.every_steps'] == 50
    assert run.changes['optim.warmup_steps'] == 5
    assert run.changes['data.batch_ramp'] == '20:8'
  assert all('train.steps' not in run.changes
             for run in trainer.asked['tune-2'])


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


def test_the_hash_is_of_all_that_is_planned_and_of_nothing_else():
  frozen = frozen_lib.Frozen(studies.plan(), {'seed': 0}, [], {'file': 'a'}, {})
  back = frozen_lib.from_json(json.loads(json.dumps(
      frozen_lib.to_json(frozen))), 'study.json')
  assert back == frozen and back.hash == frozen.hash
  for changed in (dict(plan=studies.plan(effect=0.02)),
                  dict(base_config={'seed': 1}),
                  dict(sources={'file': 'b'}), dict(code={'commit': 'c'})):
    assert dataclasses.replace(frozen, **changed).hash != frozen.hash
  noted = dataclasses.replace(frozen, notes=[{'time': 0.0, 'told': 'looked'}])
  assert noted.hash == frozen.hash


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
  plan = study.adopted(workdir, dataclasses.replace(
      frozen, notes=[], amendments=[]), args.pop('amend', ''))
  own = studies.Written(workdir, plan, retry=retry, loss=loss,
                        stop_after=stop_after)
  assert study.go(workdir, plan, own, studies.arguments(**args)) == 0
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
    study.adopted(tmp_path, frozen, 'why not')
  start(tmp_path, frozen)
  with pytest.raises(RequestError, match='is the one that was frozen'):
    study.adopted(tmp_path, frozen, 'why not')
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
  with pytest.raises(RequestError, match='sweep.json is damaged'):
    start(tmp_path, other, until='noise')


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


def test_a_plan_that_was_written_over_is_refused(frozen, tmp_path):
  study.adopted(tmp_path, frozen, '')
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
  assert status.main(types.SimpleNamespace(
      where='', workdir=str(workdir), once=True, json=True)) == 0
  rows = json.loads(capsys.readouterr().out)['phases']
  assert {row['phase']: row['states'] for row in rows} == {
      phase: {'done': row['done']} for phase, row in found['phases'].items()}
  study.adopted(tmp_path, frozen, '')
  assert status.main(types.SimpleNamespace(
      where=str(tmp_path), workdir='', once=True, json=False)) == 0
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


class Killed(Exception):
  """Stands for the end of a process."""


class Mortal(studies.Trainer):
  """Dies when a phase begins."""

  def __init__(self, frozen, dies):
    super().__init__(frozen)
    self._dies = dies

  def train(self, folder, runs):
    if folder == self._dies:
      raise Killed
    return super().train(folder, runs)


def go(workdir, frozen, dies='', **args):
  study.save(workdir, frozen)
  study.go(workdir, frozen, Mortal(frozen, dies), studies.arguments(**args))


def test_results_do_not_lose_what_is_known_by_now(tmp_path):
  frozen = studies.frozen(studies.plan())
  go(tmp_path, frozen)
  whole = (tmp_path / results.FILE).read_bytes()
  assert json.loads(whole)['phases']['confirm']['finished']
  go(tmp_path, frozen, until='noise')
  assert (tmp_path / results.FILE).read_bytes() == whole
  with pytest.raises(Killed):  # while it walks through its phases again
    go(tmp_path, frozen, dies='screen')
  assert (tmp_path / results.FILE).read_bytes() == whole
  # Of another plan they are others.
  go(tmp_path, dataclasses.replace(frozen, sources={'file': 'b'}),
     until='noise')
  found = json.loads((tmp_path / results.FILE).read_text())
  assert [name for name, row in found['phases'].items()
          if row['finished']] == ['noise']


def _start(file, workdir):
  return subprocess.Popen(
      [sys.executable, '-m', 'tools.study', 'run', file, '--workdir',
       str(workdir), '--group=16', '--anyway'], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env=os.environ | {'XLA_FLAGS': ''})


@pytest.mark.slow
@pytest.mark.long
def test_an_a_a_study_goes_through_all_phases(tmp_path):
  """The variant is the base with other first parameters. Q lets it pass, so
  that there is something to confirm."""
  file = studies.write(
      tmp_path, "TUNING['rungs'] = 1\nQ = 0.999\nQUESTION = 'Is it better?'",
      base="c.model.update(parametrization='mup', mup_base_width=8)",
      sweep="add('twin', init_seed=2)")
  workdir = tmp_path / 'study'
  first = _start(file, workdir)
  until = time.monotonic() + SECONDS
  while not list(workdir.glob('noise/points/*/*/metrics.jsonl')):
    assert first.poll() is None, first.communicate()[0]
    assert time.monotonic() < until
    time.sleep(0.1)
  first.send_signal(signal.SIGKILL)
  first.communicate()

  both = [_start(file, workdir) for _ in range(2)]
  told = [process.communicate(timeout=SECONDS)[0] for process in both]
  assert [process.returncode for process in both] == [0, 0], told

  found = json.loads((workdir / 'results.json').read_text())
  assert all(row['finished'] and row['done'] == row['planned']
             for row in found['phases'].values())
  assert [found['phases'][phase]['done'] for phase in plans.PHASES] == [
      3 * 2 * 3, 2 * 2, 2 * 3, 2 * 3 * 3]
  assert not any(x['diverged'] for x in found['outcomes'])
  verdict, = found['confirm']
  assert verdict['variant'] == 'twin'
  assert verdict['verdict'] != decide.UNSTABLE and verdict['n'] == 3
  # Base and twin have the same data, but not the same parameters.
  values = {(x['variant'], x['seed']): x['values']['loss']
            for x in found['outcomes'] if x['phase'] == 'screen'}
  assert len(set(values.values())) == 6
  # With muP, what was tuned at the smallest size holds for all.
  best = {row['variant']: row['changes'] for row in found['tuned']}
  assert len(found['tuned']) == 2
  for x in found['outcomes']:
    if x['phase'] == 'confirm':
      assert best[x['variant']].items() <= x['changes'].items()
  assert found['provenance']['devices'] and found['provenance']['versions']
  assert (workdir / 'report' / 'index.html').is_file()
