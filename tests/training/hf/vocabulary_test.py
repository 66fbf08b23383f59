"""Imports whose tokenizer has a special token that the model has no embedding
of, as Gemma 3's text models have it of <image_soft_token>."""

import json

import pytest
import tokenizers as hf

from configs.errors import RequestError
from tests.helpers import evaluations
from tests.training.data import roberta_files
from training import runs
from training.data import pipeline, tokenizers

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
