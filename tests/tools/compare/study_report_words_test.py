"""What a study's report and plan say of units, intervals, and what is n/a."""

import dataclasses

import pytest

from tests.helpers import study_folder
from tools.compare import findings, show, speed, units
from tools.compare import plan as plans
from tools.compare.study_report import figures
from tools.compare.study_report import record as records
from tools.compare.study_report import render
from tools.compare.study_report import tables
from tools.compare.study_report import words
from tools.compare.study_report import writing


def _record(folder, found=None, plan=None, **changes):
  study_folder.write(folder, plan, found, **changes)
  return records.load(folder)


def _markdown(record):
  text = render.markdown_page(writing.assemble(record, []))
  return text.replace('\\', '')


@pytest.fixture
def drawn(monkeypatch):
  """Has figures drawn, but not saved."""
  from tools.compare.study_report import drawing
  drawing.require_libraries()
  from matplotlib import pyplot
  monkeypatch.setattr(figures, '_figure', lambda *args: args[-1](pyplot))
  yield
  pyplot.close('all')


def test_every_format_says_what_its_columns_are(tmp_path):
  record = _record(tmp_path)
  document = writing.assemble(record, [])
  shown = render.html_page(document), _markdown(record), render.latex_tables(
      document).replace('$\\pm$', '±')
  for text in shown:
    assert 'mean ± standard deviation over seeds' in text
    assert 'of finding an effect of 0.05 nats a token by the screen' in text
    assert 'for ten times the parameters of the base' in text
  assert '- passed: q is at most' in shown[1]


def test_the_unit_is_the_objectives():
  plan = study_folder.plan()
  frozen = study_folder.frozen(plan)
  loss, accuracy, _ = plan.measures
  bits = dataclasses.replace(loss, figure='bits_per_byte')
  assert [units.of(frozen, m) for m in (loss, accuracy, bits)] == [
      'nats a token', '', 'bits a byte']
  for objective, unit in (('mlm', 'nats a token'), ('mlm_nsp', 'nats'),
                          ('classification', 'nats'), ('regression', '')):
    frozen.base_config['objective'] = objective
    assert units.of(frozen, loss) == unit
  # A workload may have another objective than the base.
  for row in frozen.points:
    row['changes'] |= {'objective': 'causal'} if row['workload'] == 'text' \
        else {}
  assert units.of(frozen, loss) == 'nats a token'


def test_what_has_a_unit_says_it(tmp_path, drawn):
  record = _record(tmp_path)
  text = _markdown(record)
  for said in ('loss is in nats a token.', '(loss on text, in nats a token, '
               'lower is better)', 'an effect of 0.05 nats a token on loss',
               'By loss (nats a token), rope (-0.2'):
    assert said in text
  axes, = figures.effects(record).axes
  assert axes.get_xlabel() == 'loss minus that of learned, nats a token'
  assert [a.get_ylabel() for a in figures.noise(record).axes] == [
      'noise of a difference,\nnats a token', 'noise of a difference', '']
  assert 'an effect of 0.05 nats a token is wanted' in show.described(
      record.frozen)


@pytest.mark.parametrize('effect, far', [(0.05, False), (5.0, True)])
def test_an_effect_far_above_the_noise_does_not_squash_it(
    tmp_path, drawn, effect, far):
  plan = dataclasses.replace(study_folder.plan(), effect=effect)
  axes = figures.noise(_record(tmp_path, plan=plan, found=study_folder.results(
      study_folder.plan()))).axes[0]
  assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] < 0.2
  told = [text.get_text() for text in axes.texts]
  assert told == (['wanted: 5 ↑'] if far else [])
  assert not any(line.get_clip_on() for line in axes.lines
                 if line.get_marker() == 'o')


def _none_shown(**row):
  """Results in which no difference is shown of rope."""
  found = study_folder.results(study_folder.plan())
  primary = [own for own in found['confirm'] if own['primary']]
  assert primary[0]['variant'] == 'rope' and len(primary) == 3
  primary[0].update(verdict=findings.NONE_SHOWN, n=5, **row)
  return found


def test_an_effect_is_excluded_by_an_interval_that_holds_for_all(tmp_path):
  answer = lambda found: words.answer(_record(tmp_path, found))
  said = 'rope (+0.0050 [-0.0020, +0.0120]: an effect of 0.05 is excluded)'
  assert said in answer(_none_shown(effect=0.005, low=-0.002, high=0.012))
  # By itself this interval lies within 0.05; not so beside two others.
  found = _none_shown(effect=0.0, low=-0.045, high=0.045)
  assert 'rope (+0.0000 [-0.0450, +0.0450]);' in answer(found)
  found['confirm'] = [row for row in found['confirm']
                      if row['variant'] == 'rope']
  assert 'an effect of 0.05 is excluded' in answer(found)
  assert 'excluded' not in answer(
      _none_shown(effect=0.01, low=-0.03, high=0.05))
  assert 'excluded' not in answer(
      _none_shown(effect=0.01, low=None, high=None))


def test_a_speed_up_that_is_not_known_says_why(tmp_path):
  found = study_folder.results(study_folder.plan())
  told = lambda: [
      note for make in (tables.verdicts, tables.by_size)
      for note in make(_record(tmp_path, found)).notes if 'speed-up' in note]
  assert told() == []
  for row in found['confirm']:
    for own in row['speed_ups']:
      own.update(factor=None, low=None, high=None)
  assert all('does not fall' in note for note in told()) and len(told()) == 2
  for run in found['outcomes']:
    if run['curve']:
      run['curve']['warm'] = [False] * 5 + [True] * 5
  assert told() == ['A speed-up is n/a where a run has 5 evaluations after '
                    'warm-up: 6 are needed.'] * 2


def test_a_plan_says_that_there_will_be_no_speed_ups():
  frozen = study_folder.frozen(study_folder.plan())
  frozen.base_config['train']['steps'] = 65
  frozen.base_config['optim']['warmup_steps'] = 10
  frozen.base_config['eval']['every_steps'] = 10
  assert speed.evaluations(frozen, 'small') == 7  # after 10, ..., 60 and 65
  assert 'speed-ups' not in show.described(frozen)
  frozen.point('rope', 'small', plans.TEXT)['changes'][
      'optim.warmup_steps'] = 21
  assert ('speed-ups will be n/a: runs of the confirmation have too few '
          'evaluations after warm-up (5 at small; 6 needed;'
          ) in show.described(frozen)


@pytest.mark.parametrize('rungs, extend, said', [
    (1, 0, 'by grid search{}; edges not extended'),
    (2, 1, 'by successive halving over 2 rungs, each of which keeps 50 %{}; '
     'edges extended at most once')])
def test_tuning_is_called_what_it_is(tmp_path, rungs, extend, said):
  plan = study_folder.plan()
  plan = dataclasses.replace(plan, tuning=dataclasses.replace(
      plan.tuning, rungs=rungs, extend=extend))
  record = _record(tmp_path, plan=plan)
  assert said.format(' with 1 seed, at small') in _markdown(record)
  assert said.format('') in show.described(record.frozen)


def test_counts_are_whole_and_phases_say_how_they_are_evaluated(tmp_path):
  text = _markdown(_record(tmp_path))
  assert '1,228,800 tokens' in text and '| 12,300,000 |' in text
  assert 'has the parameter count of the base' in text
  assert '| runs planned at most |' in text
  assert ('those of all other phases after the last one alone' in text)
