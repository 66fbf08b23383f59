"""Imports whose tokenizer has a special token that the model has no embedding
of, as Gemma 3's text models have it of <image_soft_token>."""

import dataclasses
import json
import shlex
import sys

import numpy as np
import pytest
import tokenizers as hf

from configs.errors import RequestError
from tests import train_test
from tests.helpers import evaluations, models
from tests.training.data import roberta_files
from tools import convert
from training import runs, weights
from training.chat import engine, load
from training.data import pipeline, tokenizers
from training.evals.tasks import inspect
from training.generate import Sampling
from training.hf import tokenizer as hf_tokenizer
from training.insides import record
from training.objectives import mlm

IMAGE = '<image_soft_token>'
TEMPLATE = ('{% for m in messages %}' + IMAGE + '{{ m.content }}'
            '{% generation %}</s>{% endgeneration %}{% endfor %}')


@pytest.fixture(scope='module', name='folder')
def _folder(tmp_path_factory):
  """Of a tokenizer whose last token is IMAGE."""
  folder = roberta_files.write(tmp_path_factory.mktemp('vocabulary'))
  file = str(folder / 'tokenizer.json')
  pipeline_ = hf.Tokenizer.from_file(file)
  pipeline_.add_special_tokens([IMAGE])
  pipeline_.save(file)
  (folder / 'a.txt').write_text(f'Any text, with {IMAGE} in it. ' * 60)
  (folder / 'a.jsonl').write_text(json.dumps({'messages': [
      {'role': 'user', 'content': f'An {IMAGE}?'},
      {'role': 'assistant', 'content': 'ant'}]}) + '\n')
  (folder / 'a.jinja').write_text(TEMPLATE)
  return folder


@pytest.fixture(name='config')
def _config(folder):
  """Of a model without IMAGE."""
  c = evaluations.config('gpt', 'causal', str(folder), max_len=32)
  c.model.vocab_size = tokenizers.load(str(folder)).vocab_size - 1
  c.data.update(source=f'text:{folder}/a.txt', holdout_every=2)
  return c


def test_a_model_needs_no_row_for_what_no_text_gives(config, folder):
  tokenizer = tokenizers.load(str(folder))
  size = tokenizer.vocab_size
  model, _ = runs.resolve(config, tokenizer)
  assert model.vocab_size == size - 1
  batch = pipeline.training_loader(config, tokenizer).batch(0)
  assert batch['tokens'].max() < size - 1  # IMAGE is spelt in plain text
  config.model.vocab_size = 0
  assert runs.resolve(config, tokenizer)[0].vocab_size == size
  config.model.vocab_size = size - 2
  with pytest.raises(RequestError, match=f'has {size - 1} ids: set it to 0'):
    runs.resolve(config, tokenizer)


def test_a_row_with_a_token_that_the_model_lacks_is_refused(config, folder):
  config.objective = 'chat'
  config.data.update(source=f'jsonl:{folder}/a.jsonl:messages',
                     holdout_every=0, chat_template=f'{folder}/a.jinja')
  tokenizer = tokenizers.load(str(folder))
  size = config.model.vocab_size
  with pytest.raises(RequestError, match=(
      f'row of the data has the token {IMAGE}, whose id is {size}, and the '
      f'model has the ids 0 to {size - 1}: take it out')):
    pipeline.training_loader(config, tokenizer).batch(0)
  with pytest.raises(RequestError, match=f'the prompt has the token {IMAGE}'):
    load.shown(['Hi'], config, tokenizer, None)
  for enough in size + 1, 0:  # 0: as many as the tokenizer
    config.model.vocab_size = enough
    tokens = pipeline.training_loader(config, tokenizer).batch(0)['tokens']
    assert (tokens == size).sum() == 2 * len(tokens)  # once in each turn
    assert size in load.shown(['Hi'], config, tokenizer, None)[0].tokens


@pytest.mark.slow
def test_a_conversation_with_such_a_token_is_refused():
  module, params = models.make('gpt', vocab_size=20)
  ours = engine.Engine(module, params, 16, Sampling(temperature=0))
  with pytest.raises(RequestError, match='the text has the id 20, which this '):
    ours.draw([1, 20])


def test_a_masked_word_becomes_no_token_that_the_model_lacks(config, folder):
  tokenizer = tokenizers.load(str(folder))
  config.objective = 'mlm'
  size, ids = config.model.vocab_size, np.full(4000, 7, np.int32)

  def drawn(seed, size):
    return mlm.mask(ids, ids == 0, np.random.default_rng(seed), tokenizer,
                    rate=0.9, whole_words=False, size=size)[0]

  assert max(drawn(seed, size).max() for seed in range(9)) == size - 1
  assert max(drawn(seed, size + 1).max() for seed in range(9)) == size
  for seed in range(3):  # draws are those of a model that has more
    np.testing.assert_array_equal(drawn(seed, 0), drawn(seed, size + 1))
    np.testing.assert_array_equal(drawn(seed, 0), drawn(seed, 10 * size))
  config.data.mask_rate = 0.9
  batch = pipeline.training_loader(config, tokenizer).batch(0)
  assert batch['tokens'].max() < size


@pytest.mark.slow
def test_random_text_has_the_models_own_tokens(config, monkeypatch,
                                               tmp_path):
  """That of which the heads are looked into."""
  shown, usual = [], record.record
  monkeypatch.setattr(record, 'record', lambda model, arrays, *more: (
      shown.append(arrays['tokens_BL']), usual(model, arrays, *more))[1])
  monkeypatch.setattr(inspect, 'REPEATED', 255)  # of 259
  config.model.max_len = config.data.length = 512
  evaluations.run('inspect', dataclasses.replace(
      evaluations.make(config, prompt='an ant'), workdir=tmp_path))
  assert shown[-1].shape[1] == 511
  assert shown[-1].max() == config.model.vocab_size - 2  # the last is <mask>


@pytest.mark.long
def test_such_an_import_is_evaluated_and_trained(folder, tmp_path, capsys):
  size = tokenizers.load(str(folder)).least_size
  module, params = models.make('llama', vocab_size=size)
  weights.to_hf(module, params, tmp_path / 'in')
  hf_tokenizer.copy(folder, tmp_path / 'in')
  convert.import_(tmp_path / 'in', tmp_path / 'run', partial=False, seed=0)
  words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1]
                      .removeprefix('to go on: '))
  file = tmp_path / 'run' / 'config.json'
  tree = json.loads(file.read_text())
  tree['data'] |= dict(source=f'text:{folder}/a.txt', length=16, batch_size=8)
  tree['train']['steps'] = 1
  file.write_text(json.dumps(tree))
  assert 'bits per byte' in train_test.evaluate(tmp_path / 'run').stdout
  said = train_test.run([
      sys.executable, *words[1:], f'--config.data.source=text:{folder}/a.txt',
      '--config.data.length=16', '--config.data.batch_size=8',
      '--config.train.steps=1'])
  assert 'starting from the parameters in this workdir' in said.stdout
  assert all(np.isfinite(row['loss'])
             for row in train_test.rows(tmp_path / 'run'))
