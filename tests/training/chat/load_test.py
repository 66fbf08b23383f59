"""What a conversation takes from a run, and from a Hugging Face folder."""

import pytest
import tokenizers as hf

from configs import base
from configs.errors import RequestError
from tests.helpers import models
from tools import convert
from training import chat, parameters
from training.hf import generation as hf_generation, weights
from training.workdir import checkpoints, run_config

TEMPLATE = ('{% for m in messages %}{{ m.content }}</s>{% endfor %}'
            '{% if add_generation_prompt %}b{% endif %}')


def save(folder, system='llama', **generation):
  """Writes a small model with a tokenizer of letters, as ids 0 to 16, and
  special tokens, 17 to 19."""
  module, params = models.make(system)
  weights.to_hf(module, params, folder, generation=hf_generation.Generation(
      {}, generation or None))
  tokenizer = hf.Tokenizer(hf.models.WordLevel(
      {letter: i for i, letter in enumerate('?abcdefghijklmno ')}, '?'))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Split('', 'isolated')
  tokenizer.add_special_tokens(['<s>', '</s>', '<end>'])
  tokenizer.save(str(folder / 'tokenizer.json'))
  return folder


ASK = [dict(role='user', content='a')]


def test_a_folder_with_a_template_is_asked_by_it(tmp_path):
  save(tmp_path, bos_token_id=17, eos_token_id=[18, 19], do_sample=True,
       temperature=0.6)
  (tmp_path / 'chat_template.jinja').write_text(TEMPLATE)
  speaker = chat.of_folder(tmp_path)
  assert speaker.talk.encode(ASK).tolist() == [1, 18, 2]
  assert speaker.talk.ends == {18, 19}
  assert speaker.options['temperature'] == 0.6


@pytest.mark.slow
def test_an_import_is_asked_as_its_folder_or_by_another_template(tmp_path):
  save(tmp_path, bos_token_id=17, eos_token_id=[18, 19], temperature=0.6)
  (tmp_path / 'chat_template.jinja').write_text(TEMPLATE)
  convert.import_(tmp_path, tmp_path / 'run', partial=False, seed=0)
  own = chat.of_run(tmp_path / 'run')
  assert own.talk.encode(ASK).tolist() == [1, 18, 2]
  assert own.talk.ends == {18, 19} and own.options['temperature'] == 0.6
  (tmp_path / 'b.jinja').write_text('{{ messages[0].content }}<end>')
  other = chat.of_run(tmp_path / 'run', template=str(tmp_path / 'b.jinja'))
  assert other.talk.encode(ASK).tolist() == [1, 19]


def test_an_import_that_was_trained_goes_on_as_in_training(
    tmp_path, monkeypatch):
  """After the separator, and not after the folder's bos."""
  save(tmp_path, bos_token_id=17, eos_token_id=18)
  convert.import_(tmp_path, tmp_path / 'run', partial=False, seed=0)
  assert chat.of_run(tmp_path / 'run').talk.encode(ASK).tolist() == [17, 1]
  read = chat.parameters.on_one_device
  monkeypatch.setattr(chat.parameters, 'on_one_device', lambda *args: (
      read(*args)._replace(step=5)))
  speaker = chat.of_run(tmp_path / 'run')
  assert speaker.talk.encode(ASK).tolist() == [
      speaker.tokenizer.separator_id, 1]
  assert speaker.tokenizer.separator_id != 17


@pytest.mark.parametrize('system, objective', [
    ('bert', 'mlm'), ('t5', 'seq2seq'), ('gpt', 'prefix')])
def test_runs_that_do_not_converse_are_refused(system, objective, tmp_path):
  config = base.base()
  config.objective, config.model = objective, models.config(system)
  run_config.save(tmp_path, config)
  with pytest.raises(RequestError, match='from left to right: eval.py has'):
    chat.of_run(tmp_path)


@pytest.mark.parametrize('objective', ['causal', 'chat'])
def test_a_run_is_asked_as_its_objective_says(objective, tmp_path, monkeypatch):
  config = base.base()
  config.objective = objective
  config.model = models.config('gpt', vocab_size=384)
  config.data.source = 'jsonl:x:messages'
  run_config.save(tmp_path, config)
  monkeypatch.setattr(parameters, 'on_one_device',
                      lambda *_: checkpoints.Restored(
      5, 'the parameters', {}, []))
  speaker = chat.of_run(tmp_path)
  assert speaker.params == 'the parameters' and speaker.options == {}
  assert speaker.talk.plain == (objective == 'causal')
  asked = speaker.tokenizer.decode(speaker.talk.encode(ASK))
  assert asked == 'a' or asked.endswith('USER: a ASSISTANT:')
  assert speaker.talk.ends == {speaker.tokenizer.separator_id}
