"""Fine-tuning starts from a language model's weights as they are: the head of
the task is drawn, that of the language model left out, all else refused."""

import dataclasses
import json

from etils import epath
import jax
import numpy as np
import pytest
import safetensors.numpy

import architectures
from configs import base
from configs.errors import RequestError
from tests.helpers import models
from tools import convert
from training import initial_state, new_head, paths, runs, weights
from training.data import tokenizers
from training.workdir import checkpoints, run_config

HEAD = dict(head='sequence', num_labels=3)


def _run(model, source):
  config = base.base()
  config.model = model
  config.update(init_from=str(source), data=dict(length=16, batch_size=8))
  return runs.build(config, architectures.resolve(model))


def _start(source, system, **changes):
  run = _run(models.config(system, **HEAD, **changes), source)
  return initial_state.create(run, str(source)).params


def _folder(path, system, keep=lambda name: True, **changes):
  """Returns the parameters of a language model, whose tensors are written."""
  module, params = models.make(system, **changes)
  weights.to_hf(module, params, path)
  file = path / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  safetensors.numpy.save_file(
      {name: x for name, x in tensors.items() if keep(name)}, file)
  return paths.flatten(params)


def _workdir(path, system, **changes):
  module, params = models.make(system, **changes)
  run = _run(models.config(system, **changes), '')
  path = epath.Path(path)
  run_config.save(path, run.config)
  with checkpoints.Checkpoints(path, every_steps=0, every_minutes=0.0, keep=1,
                               keep_every=0) as saved:
    saved.save(0, {'params': params}, next_batch=0, tokens=0,
               config=run.config)
  return paths.flatten(params)


def _check(params, theirs, said, drawn, left):
  """All but the head of the task is theirs; both heads are listed."""
  ours = paths.flatten(params)
  new = {path for path in ours if path.startswith('task/')}
  assert new == drawn
  assert ours.keys() - new == theirs.keys() - left
  for path in ours.keys() - new:
    np.testing.assert_array_equal(ours[path], theirs[path], path)
  lines = [x for x in said.splitlines() if x.startswith('skipped: ')]
  assert len(lines) == len(drawn) + len(left)
  for path in drawn:
    assert any(path in line for line in lines)


BERT = {'transform', 'transform_bias', 'transform_norm/scale',
        'transform_norm/bias', 'nsp', 'nsp_bias', 'head/bias'}


@pytest.mark.parametrize('write', [
    _folder, pytest.param(_workdir, marks=pytest.mark.long)])
def test_bert_starts_from_a_language_model(tmp_path, capsys, write):
  theirs = write(tmp_path, 'bert')
  params = _start(tmp_path, 'bert')
  _check(params, theirs, capsys.readouterr().out,
         {'task/kernel', 'task/bias'}, BERT)
  assert 0 < np.asarray(params['task']['kernel']).std() < 0.05  # as it is born


@pytest.mark.parametrize('write', [
    pytest.param(_folder, marks=pytest.mark.long), _workdir])
def test_a_decoder_starts_from_one_whose_head_is_its_own(tmp_path, capsys,
                                                          write):
  theirs = write(tmp_path, 'llama')
  _check(_start(tmp_path, 'llama'), theirs, capsys.readouterr().out,
         {'task/kernel'}, {'head/kernel'})


def test_a_folder_without_the_head_of_pretraining_is_as_good(tmp_path, capsys):
  """As sentence-transformers writes a BertModel: MiniLM."""
  theirs = _folder(tmp_path, 'bert', lambda name: not name.startswith('cls.'))
  params = _start(tmp_path, 'bert')
  said = capsys.readouterr().out
  _check(params, {k: v for k, v in theirs.items() if k not in BERT}, said,
         {'task/kernel', 'task/bias'}, set())


def test_a_folder_without_a_pooler_gets_a_new_one(tmp_path, capsys):
  """As BertForMaskedLM is written."""
  theirs = _folder(tmp_path, 'bert', lambda name: 'pooler' not in name)
  params = paths.flatten(_start(tmp_path, 'bert'))
  assert ('files have no pooler, so these parameters are new, drawn from the '
          'seed: pooler, pooler_bias') in capsys.readouterr().out
  np.testing.assert_array_equal(params['embed/tokens'], theirs['embed/tokens'])
  assert np.asarray(params['pooler']).std() < 0.05  # as it is born


def test_what_else_is_missing_is_refused(tmp_path):
  _folder(tmp_path, 'bert', lambda name: 'pooler.dense.bias' not in name)
  with pytest.raises(RequestError, match='files have no bert.pooler.dense'):
    _start(tmp_path, 'bert')


def test_what_else_is_left_over_is_refused(tmp_path):
  _folder(tmp_path, 'bert')
  file = tmp_path / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  safetensors.numpy.save_file(
      tensors | {'bert.extra.weight': np.ones(2, np.float32)}, file)
  with pytest.raises(RequestError, match='bert.extra.weight of the files has'):
    _start(tmp_path, 'bert')


@pytest.mark.parametrize('write', [_folder, _workdir])
def test_another_function_is_refused(tmp_path, write):
  write(tmp_path, 'gpt')
  with pytest.raises(RequestError, match="model.norm is 'rmsnorm', not"):
    _start(tmp_path, 'gpt', norm='rmsnorm')


@pytest.mark.parametrize('write', [_folder, _workdir])
def test_what_to_set_is_said_without_what_is_derived(tmp_path, write):
  write(tmp_path, 'gpt')
  with pytest.raises(RequestError) as error:
    _start(tmp_path, 'gpt', num_layers=3, position='rope')
  said = str(error.value)
  assert 'model.num_layers is 3, not 2' in said
  assert 'num_decoder_layers' not in said
  assert ('add --config.model.num_layers=2 --config.model.position=learned. '
          in said)
  with pytest.raises(RequestError, match='take a size of configs/gpt.py'):
    _start(tmp_path, 'llama')


@pytest.mark.parametrize('write', [_folder, _workdir])
def test_another_head_of_a_task_is_refused(tmp_path, write):
  write(tmp_path, 'bert', head='tokens', num_labels=3)
  with pytest.raises(RequestError, match="head is 'sequence', not 'tokens'"):
    _start(tmp_path, 'bert')


@pytest.mark.parametrize('write', [_folder, _workdir])
def test_the_same_head_goes_on(tmp_path, capsys, write):
  theirs = write(tmp_path, 'bert', **HEAD)
  params = paths.flatten(_start(tmp_path, 'bert'))
  assert 'skipped' not in capsys.readouterr().out
  jax.tree.map(np.testing.assert_array_equal, params, dict(theirs))


def test_labels_in_another_order_are_refused(tmp_path):
  """An output would stand for another label than it was trained for."""
  module, params = models.make('bert', **HEAD)
  weights.to_hf(module, params, tmp_path, labels=('b', 'a', 'c'))
  run = _run(models.config('bert', **HEAD), tmp_path)
  run.config.update(objective='classification',
                    data=dict(labels=('a', 'b', 'c')))
  with pytest.raises(RequestError, match=r'has the labels .b, a, c.*a, b, c'):
    initial_state.create(run, str(tmp_path))
  run.config.data.labels = ('b', 'a', 'c')
  initial_state.create(run, str(tmp_path))


def test_a_folder_with_a_head_is_imported_and_exported(tmp_path, capsys):
  module, params = models.make('bert', **HEAD)
  weights.to_hf(module, params, tmp_path / 'in', labels=('b', 'a', 'c'))
  convert.import_(tmp_path / 'in', epath.Path(tmp_path / 'run'),
                  partial=False, seed=0)
  config = run_config.load_config(epath.Path(tmp_path / 'run'))
  assert config.objective == 'classification'
  assert config.data.labels == ('b', 'a', 'c')
  convert.export(epath.Path(tmp_path / 'run'), tmp_path / 'out', step=None,
                 dtype='', shard_bytes=10**9)
  trees = [json.loads((tmp_path / name / 'config.json').read_text())
           for name in ('in', 'out')]
  assert trees[0]['id2label'] == trees[1]['id2label']
  again, read = weights.from_hf(tmp_path / 'out')
  assert again.config.num_labels == 3
  jax.tree.map(np.testing.assert_array_equal, params, read)


def test_one_label_for_each_token_is_refused(tmp_path):
  module, params = models.make('bert', head='tokens', num_labels=1)
  weights.to_hf(module, params, tmp_path / 'in')
  with pytest.raises(RequestError, match="head 'tokens' with .*num_labels 1"):
    convert.import_(tmp_path / 'in', epath.Path(tmp_path / 'run'),
                    partial=False, seed=0)


def test_as_many_labels_as_the_data_have(tmp_path):
  config = base.base()
  config.model = models.config('bert', head='sequence', num_labels=2)
  config.update(objective='classification',
                data=dict(labels=('a', 'b', 'c'), length=16))
  with pytest.raises(RequestError, match='num_labels is 2, .* have 3'):
    runs.resolve(config, tokenizers.load('bytes:61'))


def test_a_language_model_does_not_start_from_the_head_of_a_task():
  lm = architectures.resolve(models.config('bert'))
  task = dataclasses.replace(lm, **HEAD)
  assert new_head.is_put_on(task, lm) and not new_head.is_put_on(lm, task)
  assert not new_head.is_put_on(task, task)
