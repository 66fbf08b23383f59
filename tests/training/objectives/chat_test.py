"""Conversations are laid out as Vicuna's and Alpaca's published code does."""

import json
import types

import jinja2
import numpy as np
import pytest
import tokenizers as hf

from tests import train_test
from tests.helpers import data_files as files
from training.objectives import pipeline
from training.data import tokenizers
from training.objectives import causal

texts = train_test.texts
BYTES = tokenizers.load('bytes')
TALK = [{'role': 'user', 'content': 'Hello!'},
        {'role': 'assistant', 'content': 'Hi!'},
        {'from': 'human', 'value': 'How are you?'},
        {'from': 'gpt', 'value': 'I am good.'}]
# What lm-sys/FastChat makes of it: get_conv_template('vicuna_v1.1'), of
# fastchat/conversation.py, and get_prompt().
SYSTEM = ('A chat between a curious user and an artificial intelligence '
          'assistant. The assistant gives helpful, detailed, and polite '
          "answers to the user's questions.")
VICUNA = (f'{SYSTEM} USER: Hello! ASSISTANT: Hi!</s>'
          'USER: How are you? ASSISTANT: I am good.</s>')


@pytest.mark.parametrize('start', [None, 5])
def test_each_message_of_a_user_is_a_line_of_plain_text(start):
  """The model's own goes on where the line ends."""
  talk = causal.talk_by_continuing(BYTES, start)
  messages = [dict(role=role, content=content) for role, content in (
      ('user', 'a'), ('assistant', ' b'), ('user', 'c'))]
  first = BYTES.separator_id if start is None else start
  assert talk.encode(messages).tolist() == [first, *b'a b\nc']
  assert talk.ends == {BYTES.separator_id}


@pytest.fixture
def talks(tmp_path, monkeypatch):
  monkeypatch.setenv('ARCHETYPE_CACHE', str(tmp_path / 'cache'))
  path = tmp_path / 'talks.jsonl'
  path.write_text(''.join(json.dumps({'messages': TALK, 'bad': [{'role': 'x'}]})
                          + '\n' for _ in range(8)))
  return f'jsonl:{path}'


def _text(ids, tokenizer=BYTES) -> str:
  """The text of a row, and </s> for the separator."""
  ends = [-1, *np.flatnonzero(np.asarray(ids) == tokenizer.separator_id)]
  pieces = [tokenizer.decode(ids[a + 1:b])
            for a, b in zip(ends, [*ends[1:], len(ids)])]
  return '</s>'.join(pieces)


def test_turns_are_laid_out_by_vicunas_template(talks):
  batch = pipeline.make_training_loader(files.make_run_config(
      f'{talks}:messages', 'chat', 350), BYTES).batch(0)
  tokens, targets, weights, valid = (
      batch[k][0] for k in ('tokens', 'targets', 'weights', 'valid'))
  assert _text(tokens[valid == 1]) == f'</s>{VICUNA}'
  # The loss counts the answers, from the space on, and what ends them.
  assert _text(targets[weights == 1]) == ' Hi!</s> I am good.</s>'


def test_a_question_is_the_start_of_a_conversation(talks):
  config = files.make_run_config(f'{talks}:messages', 'chat', 350)
  row = pipeline.make_training_loader(config, BYTES).batch(0)['tokens'][0]
  asked = causal.encode_question('Hello!', config, BYTES)
  np.testing.assert_array_equal(asked, row[:len(asked)])
  assert _text(asked) == f'</s>{SYSTEM} USER: Hello! ASSISTANT:'
  assert BYTES.decode(row[len(asked):]).startswith(' Hi!')
  assert causal.encode_question('', config, BYTES).tolist() == [row[0]]


@pytest.mark.parametrize('ids, end', [
    (dict(eos=1), 'eos'), (dict(sep=1), 'sep'), (dict(eos=2, sep=1), 'sep')])
@pytest.mark.parametrize('source', ['jsonl:x:y', 'alpaca:x'])
def test_the_template_of_an_export_writes_what_training_data_are(source, ids,
                                                                 end):
  """By Jinja, to which another separator than this one is nothing."""
  template = causal.write_chat_template(
      files.make_run_config(source, 'chat'),
      types.SimpleNamespace(special_ids=ids, separator_id=1))
  alpaca = source == 'alpaca:x'
  messages = TALK[:2] if alpaca else [*TALK[:2], *(
      dict(role=role, content=content) for role, content in (
          ('user', 'How are you?'), ('assistant', 'I am good.')))]
  asked = LAID_OUT[1].replace('Sing!', 'Hello!') + 'Hi!</s>'
  written = jinja2.Template(template).render(
      messages=messages, **{f'{end}_token': '</s>'})
  assert written == '</s>' + (asked if alpaca else VICUNA)


def _llama_like(tmp_path):
  """A BPE whose texts begin with a space of their own, as LLaMA's do."""
  tokenizer = hf.Tokenizer(hf.models.BPE(unk_token='<unk>'))
  tokenizer.normalizer = hf.normalizers.Sequence([
      hf.normalizers.Prepend('▁'), hf.normalizers.Replace(' ', '▁')])
  tokenizer.decoder = hf.decoders.Sequence([
      hf.decoders.Replace('▁', ' '), hf.decoders.Fuse(),
      hf.decoders.Strip(' ', 1, 0)])
  trainer = hf.trainers.BpeTrainer(
      vocab_size=200, special_tokens=['<unk>', '<s>', '</s>', ':'])
  tokenizer.train_from_iterator(
      [text.replace(':', '') for text in (VICUNA, *LAID_OUT)], trainer)
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  return tokenizers.load(str(tmp_path / 'tokenizer.json'))


def test_a_question_and_its_answer_are_tokenised_as_one(talks, tmp_path):
  """As in both published codes: an answer alone would begin otherwise."""
  tokenizer = _llama_like(tmp_path)
  batch = pipeline.make_training_loader(
      files.make_run_config(f'{talks}:messages', 'chat',
                            350), tokenizer).batch(0)
  targets, weights = batch['targets'][0], batch['weights'][0]
  turns = VICUNA.split('</s>')[:2]
  expected = [i for turn in turns
              for i in [*tokenizer.encode(turn), tokenizer.separator_id]]
  assert targets[:len(expected)].tolist() == expected
  alone = tokenizer.encode(' Hi!').tolist()
  assert alone not in [expected[i:i + len(alone)]
                       for i in range(len(expected))]
  config = files.make_run_config('jsonl:x:y', 'chat')
  asked = causal.encode_question('Hello!', config, tokenizer)
  assert asked[1:].tolist() == expected[:len(asked) - 1]
  assert not weights[:len(asked) - 1].any() and weights[len(asked) - 1]


RECORDS = [
    dict(instruction='Add.', input='1 and 2', output='3', text='ignored'),
    dict(instruction='Sing!', input='', output='La la'), dict(
        instruction='Sing!', output='La')]
# Of tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT.
LAID_OUT = [
    'Below is an instruction that describes a task, paired with an input that '
    'provides further context. Write a response that appropriately completes '
    'the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n'
    '### Response:', *2 * [
        'Below is an instruction that describes a task. Write a response that '
        'appropriately completes the request.\n\n### Instruction:\nSing!\n\n'
        '### Response:']]


@pytest.mark.parametrize('kind', ['json', 'jsonl'])
def test_alpacas_records_are_laid_out_by_its_template(kind, tmp_path):
  path = tmp_path / f'alpaca.{kind}'
  path.write_text(json.dumps(RECORDS) if kind == 'json' else
                  '\n'.join(map(json.dumps, RECORDS)) + '\n')
  config = files.make_run_config(f'alpaca:{path}', 'chat', 300, batch_size=3,
                                 cache_dir=str(tmp_path))
  batch = pipeline.make_training_loader(config, BYTES).batch(0)
  end, pairs = BYTES.separator_id, set()
  for tokens, targets, weights, valid in zip(*(
      batch[k] for k in ('tokens', 'targets', 'weights', 'valid'))):
    places = np.flatnonzero(weights)
    prompt, answer = tokens[:places[0] + 1], targets[places]
    assert prompt[0] == answer[-1] == end
    assert valid.sum() == len(prompt) + len(answer) and valid[0]
    assert (np.diff(valid) <= 0).all()  # and then no more
    pairs.add((BYTES.decode(prompt), BYTES.decode(answer)))
  assert pairs == {(text, record['output'])
                   for text, record in zip(LAID_OUT, RECORDS)}
  asked = causal.encode_question('Sing!', config, BYTES)
  assert asked[0] == end and BYTES.decode(asked) == LAID_OUT[1]
