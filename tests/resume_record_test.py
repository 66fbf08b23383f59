"""What a run's record and its refusals say where its command changes."""

import json
import pathlib

import pytest

from tests import train_test
from tests.train_test import command, run
from tests.training import vectorised_test
from training import vectorised

texts = train_test.texts
group_texts = vectorised_test.texts


@pytest.fixture(scope='module')
def done(tmp_path_factory, texts):
  """A complete run of five steps."""
  workdir = tmp_path_factory.mktemp('done') / 'run'
  run(command(workdir, texts, *FEW))
  return workdir


FEW = ('--config.train.steps=5', '--config.eval.every_steps=0')
ANOTHER_RATE = ('--config.optim.lr=1e-2', '--allow_config_change')


def _config(workdir):
  return json.loads((pathlib.Path(workdir) / 'config.json').read_text())


@pytest.mark.slow
def test_a_resume_that_trains_nothing_leaves_the_record(done, texts):
  before = _config(done)
  result = run(command(done, texts, *FEW, *ANOTHER_RATE))
  assert 'is complete: 5 steps of 5. Its config is left as' in result.stdout
  assert 'going on' not in result.stdout
  assert _config(done) == before
  assert 'is complete: 5 steps of 5. To look' in run(
      command(done, texts, *FEW)).stdout


@pytest.mark.slow
def test_fewer_steps_than_are_trained_are_refused(done, texts):
  before = _config(done)
  result = run(command(done, texts, *FEW, '--config.train.steps=3',
                       '--allow_config_change'), code=2)
  assert 'train.steps is 3, and the run in' in result.stderr
  assert 'has trained 5 steps' in result.stderr
  assert _config(done) == before


@pytest.mark.slow
@pytest.mark.parametrize('flags', [(), ('--allow_config_change',)])
@pytest.mark.parametrize('change, some_fit', [
    ('model.d_model=64', False), ('model.num_layers=3', True)])
def test_parameters_are_offered_where_some_fit(change, some_fit, flags, done,
                                               texts):
  result = run(command(done, texts, *FEW, f'--config.{change}', *flags), code=2)
  name = change.partition('=')[0]
  assert f'a run cannot go on with another {name}' in result.stderr
  assert ('--config.init_partial=True' in result.stderr) == some_fit
  assert 'float32[' not in result.stderr


@pytest.mark.long
def test_a_group_that_trains_nothing_leaves_its_records(group_texts, tmp_path):
  """Where one of two is complete, only the other's is written anew."""
  few = dict(train__steps=2, optim__schedule='constant')
  configs = [vectorised_test.config(group_texts, seed=seed, **few)
             for seed in (0, 1)]
  folders = [tmp_path / '0', tmp_path / '1']
  vectorised.train(configs[:1], folders[:1])
  others = [vectorised_test.config(group_texts, seed=seed, log__every_steps=2,
                                   **few) for seed in (0, 1)]
  vectorised.train(others, folders)
  assert [_config(folder)['log']['every_steps'] for folder in folders] == [1, 2]
  fewer = vectorised_test.config(group_texts, seed=0, **few | {
      'train__steps': 1})
  vectorised.train([fewer], folders[:1])
  assert _config(folders[0])['train']['steps'] == 2
