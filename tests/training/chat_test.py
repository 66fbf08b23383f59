"""Conversations: what is taken from a run or a folder, what is drawn is what
the whole text says and only new tokens are read, whole characters are shown and
no part of a stop string; lines in, answers out."""

import functools
import io
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf

import architectures
from common.errors import RequestError
from configs import base
from tests.helpers import forked, models
from tests.training import generate_test
from tools import chat as program
from tools import convert
from training import chat, generate
from training.data import conversations, tokenizers
from training.hf import config as hf_config
from training.hf import generation as hf_generation, weights
from training.objectives import causal
from training.workdir import run_config

GREEDY = generate.Sampling(temperature=0)
CONTEXT = 24
BYTES = tokenizers.load('bytes')


# What a conversation takes from a run, and from a Hugging Face folder.

OF_FOLDER = ('{% for m in messages %}{{ m.content }}</s>{% endfor %}'
             '{% if add_generation_prompt %}b{% endif %}')
ASK = [dict(role='user', content='a')]


def save(folder, template=OF_FOLDER, **generation):
  """Writes a small model with a tokenizer of letters, as ids 0 to 16, and
  special tokens, 17 to 19."""
  module, params = models.make_model('llama', num_layers=1)
  weights.to_hf(module, params, folder, generation=hf_generation.Generation(
      {}, dict(bos_token_id=17, eos_token_id=[18, 19]) | generation))
  tokenizer = hf.Tokenizer(hf.models.WordLevel(
      {letter: i for i, letter in enumerate('?abcdefghijklmno ')}, '?'))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Split('', 'isolated')
  tokenizer.add_special_tokens(['<s>', '</s>', '<end>'])
  tokenizer.save(str(folder / 'tokenizer.json'))
  if template:
    (folder / 'chat_template.jinja').write_text(template)
  return folder


@pytest.mark.slow
def test_a_folder_is_asked_by_its_template_or_by_another(tmp_path):
  """And so is a run that was imported from it."""
  save(tmp_path, do_sample=True, temperature=0.6)
  convert.import_model(tmp_path, tmp_path / 'run', partial=False, seed=0)
  for speaker in (chat.load_from_folder(tmp_path),
                  chat.load_from_run(tmp_path / 'run')):
    assert speaker.talk.encode(ASK).tolist() == [1, 18, 2]
    assert speaker.talk.words == 'answers by its chat template'
    assert speaker.talk.ends == {18, 19}
    assert speaker.options['temperature'] == 0.6
  (tmp_path / 'b.jinja').write_text('{{ messages[0].content }}<end>')
  other = chat.load_from_run(tmp_path / 'run',
                             template=str(tmp_path / 'b.jinja'))
  assert other.talk.encode(ASK).tolist() == [1, 19]


def test_an_import_that_was_trained_goes_on_as_in_training(
    tmp_path, monkeypatch):
  """After the separator, and not after the folder's bos."""
  save(tmp_path, template='')
  convert.import_model(tmp_path, tmp_path / 'run', partial=False, seed=0)
  imported = chat.load_from_run(tmp_path / 'run')
  assert imported.talk.encode(ASK).tolist() == [17, 1]
  read = chat.parameters.read_parameters_on_one_device
  monkeypatch.setattr(
      chat.parameters, 'read_parameters_on_one_device',
      lambda *args, **kwargs: read(*args, **kwargs)._replace(step=5))
  speaker = chat.load_from_run(tmp_path / 'run')
  assert speaker.tokenizer.separator_id != 17
  assert speaker.talk.encode(ASK).tolist() == [
      speaker.tokenizer.separator_id, 1]


@pytest.mark.parametrize('system, objective', [
    ('bert', 'mlm'), ('t5', 'seq2seq'), ('gpt', 'prefix')])
def test_runs_that_do_not_converse_are_refused(system, objective, tmp_path):
  config = base.base()
  config.objective, config.model = objective, models.small_config(system)
  run_config.save_config(tmp_path, config)
  with pytest.raises(RequestError, match='from left to right: eval.py has'):
    chat.load_from_run(tmp_path)


def test_a_folder_of_a_classifier_is_refused(tmp_path):
  model = architectures.resolve(models.small_config(
      'gpt', head='sequence', num_labels=2))
  (tmp_path / 'config.json').write_text(json.dumps(
      hf_config.config_json_of_model(model, labels=('a', 'b'))))
  with pytest.raises(RequestError, match='from left to right: eval.py has'):
    chat.load_from_folder(tmp_path)


# The engine.


@pytest.fixture(name='model', scope='module', params=['rope', 'scanned'])
def _model():
  return models.make_model('llama', max_len=CONTEXT)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch, request):
  monkeypatch.setattr(chat, 'PIECE_SIZES', (1, 4, 8))
  if 'scanned' in request.node.name:
    monkeypatch.setattr(generate, 'UNROLLED_LAYERS', 0)


@functools.partial(jax.jit, static_argnums=0)
def _logits(module, params, tokens):
  return models.logits(module, params, tokens)


def _next(model, ids):
  tokens = np.zeros((1, CONTEXT), np.int32)
  tokens[0, :len(ids)] = ids
  return int(np.asarray(_logits(*model, tokens))[0, len(ids) - 1].argmax())


def test_two_turns_are_what_a_forward_pass_says_up_to_the_last_slot(model):
  engine = chat.CachedDecoder(*model, CONTEXT, GREEDY)
  ids = [5, 17, 3, 44, 9, 12, 13, 2, 7, 30, 41]
  for new in ([], [8, 8, 1], [6] * 5):
    ids += new
    for _ in range(2 if len(ids) < 20 else CONTEXT - len(ids)):
      token = engine.draw_token(ids)
      assert token == _next(model, ids), len(ids)
      assert engine.num_read == len(ids)  # each once
      ids.append(token)
  assert engine.draw_token(ids) == _next(model, ids) and len(ids) == CONTEXT


def test_a_text_that_outgrows_a_length_is_as_if_written_in_one_go():
  module, params = models.make_model('phi3', max_len=CONTEXT, head_dim=8,
                                     rope=dict(
      generate_test.LONGROPE, original_len=9, factor=4.0), num_layers=1)
  model = module, jax.tree.map(lambda x: 3 * x, params)
  engine, ids = chat.CachedDecoder(*model, CONTEXT, GREEDY), [5, 17, 3, 44, 9]
  written = generate.generate(
      *model, jnp.array([ids]), jnp.array([5]), jax.random.key(0),
      max_new_tokens=9, sampling=GREEDY)[0]
  for token in written:
    assert engine.draw_token(ids) == token, len(ids)
    ids.append(int(token))


def test_what_changes_is_read_again_from_there(model):
  engine = chat.CachedDecoder(*model, CONTEXT, GREEDY)
  first = [5, 17, 3, 44, 9, 12]
  engine.draw_token([*first, 50, 51, 52])
  for ids, read in (([*first, 50, 9], 1), (first, 1), ([1, *first], 7)):
    before = engine.num_read
    assert engine.draw_token(ids) == _next(model, ids)
    assert engine.num_read == before + read  # the last one, for its logits


@pytest.mark.parametrize('model', ['rope'], indirect=True)
def test_draws_follow_the_seed_and_a_penalty_counts_the_conversation(model):
  def draws(seed):
    engine = chat.CachedDecoder(*model, CONTEXT, generate.Sampling(5.0), seed)
    return [engine.draw_token([1, 2, 3]) for _ in range(8)]
  assert draws(0) == draws(0) != draws(1)
  assert len(set(draws(0))) > 1
  engine = chat.CachedDecoder(*model, CONTEXT, generate.Sampling(
      temperature=0, repetition_penalty=1e6))
  ids = [5, 17, 3]
  for _ in range(6):
    ids.append(engine.draw_token(ids))
  assert len(set(ids)) == len(ids)


# Text while it comes.


def _pieces(text, **settings):
  stream = chat.AnswerStream(BYTES, **settings)
  pieces = []
  for token in text.encode():
    pieces.append(stream.add_token(token))
    if stream.stopped:
      break
  return [*pieces, stream.finish()], stream


@pytest.mark.parametrize('text, pieces', [
    ('aé€', ['a', '', 'é', '', '', '€', '']),
    ('one\nU: x', ['o', 'n', 'e', '', '', '', '']),
    ('a\n\nU', ['a', '', '\n', '', '\nU']),
    ('a\nX', ['a', '', '\nX', ''])])
def test_a_part_of_a_character_or_of_a_stop_string_is_held_back(text, pieces):
  got, stream = _pieces(text, stops=['\nU:', '###'])
  assert got == pieces
  assert stream.stopped == ('U:' in text)
  assert stream.text == ''.join(got) == text.partition('\nU:')[0]


def test_the_lead_is_no_part_of_the_answer():
  for text, pieces in ((' Hi', ['', 'H', 'i', '']), ('Hi', ['H', 'i', '']),
                       ('', ['']), (' ', ['', ''])):
    assert _pieces(text, lead=' ')[0] == pieces


# A conversation of several turns.

ROOM = 64
TALK = causal.talk_by_template(conversations.make_template('a template', (
    "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}"
    '{% endfor %}{% if add_generation_prompt %}a{% endif %}'), BYTES))


@pytest.fixture(name='writer', scope='module')
def _writer():
  return models.make_model('llama', max_len=ROOM, vocab_size=BYTES.vocab_size,
                           num_layers=1)


def make(writer, talk=TALK, **settings):
  engine = chat.CachedDecoder(*writer, ROOM, GREEDY)
  return engine, chat.ChatSession(engine, BYTES, talk,
                                  **dict(max_new_tokens=4) | settings)


def ask(session, text, **settings):
  return ''.join(session.ask(text, **settings))


def test_of_a_second_turn_only_what_is_new_is_read(writer):
  engine, session = make(writer)
  first = ask(session, 'hé')
  # The last token of an answer is drawn, and read with what follows.
  asked = len(TALK.encode(session.messages[:1]))
  assert engine.num_read == asked + 3 and session.end_reason == 'length'
  second = ask(session, 'xyz')
  assert [m['content'] for m in session.messages] == ['hé', first, 'xyz',
                                                      second]
  whole = TALK.encode(session.messages[:3])
  # As from the beginning, in one pass.
  fresh = np.asarray(generate.generate(
      *writer, whole[None], np.array([len(whole)]), jax.random.key(0),
      max_new_tokens=4, sampling=GREEDY))[0]
  assert second == BYTES.decode(fresh)


class Scripted:
  """An engine that draws the bytes of a text, and then the separator."""
  context = ROOM

  def __init__(self, text):
    self.left = [*text.encode(), BYTES.eos_id]

  def draw_token(self, ids):
    return self.left.pop(0)


@pytest.mark.parametrize('written, settings, answer, ended', [
    ('Hi!', {}, 'Hi!', 'end'), ('Hi! U: x', dict(stops=[' U:']), 'Hi!', 'stop'),
    ('Hi!', dict(max_new_tokens=2), 'Hi', 'length'),
    ('Hé', dict(max_new_tokens=2), 'H\ufffd', 'length')])
def test_an_answer_ends(written, settings, answer, ended):
  session = chat.ChatSession(Scripted(written), BYTES, TALK,
                             **dict(max_new_tokens=20) | settings)
  assert ask(session, 'a') == answer
  assert session.messages[-1]['content'] == answer
  assert session.end_reason == ended


def test_an_answer_can_be_interrupted_or_have_no_room(writer):
  _, session = make(writer, max_new_tokens=20)
  came = []
  answer = ask(session, 'a', stopped=lambda: came.append(1) or len(came) > 4)
  assert session.end_reason == 'interrupted' and len(came) < 8
  assert session.messages[-1] == dict(role='assistant', content=answer)
  before = list(session.messages)
  with pytest.raises(RequestError, match='tokens.*room for 64.*/res'):
    ask(session, 'b' * 60)
  assert session.messages == before
  # An answer for which there is no more room is cut off.
  _, session = make(writer, max_new_tokens=99)
  ask(session, 'b' * 50)
  assert session.end_reason == 'context'


def test_the_system_text_and_a_new_conversation(writer):
  _, session = make(writer, system='be brief')
  alone = ask(session, 'a')
  session.reset()
  assert ask(session, 'a') == alone
  with pytest.raises(RequestError, match='goes on from the text'):
    make(writer, causal.talk_by_continuing(BYTES), system='x')


# The program.


class Echo:
  """A session that says what it is told."""
  end_reason = 'length'

  def __init__(self):
    self.messages = []

  def ask(self, text, stopped=lambda: False):
    self.messages.append(text)
    yield from ('<', text, '>')

  def reset(self):
    self.messages = []


def test_each_line_of_a_pipe_is_a_message(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'stdin', types.SimpleNamespace(buffer=io.BytesIO(
      b'a\n\n  \n b \r\n/reset\nc\n/exit\nd\n')))
  session = Echo()
  program.converse(session, in_terminal=False)
  output = capsys.readouterr()
  assert output.out == '<a>\n< b >\n<c>\n' and output.err == ''
  assert session.messages == ['c']


def test_at_a_terminal_what_is_wrong_ends_nothing(monkeypatch, capsys):
  lines = iter(['a', KeyboardInterrupt(), '', 'a\udc80', EOFError()])

  def line(prompt):
    following = next(lines)
    if isinstance(following, BaseException):
      raise following
    return following
  monkeypatch.setattr('builtins.input', line)
  program.converse(Echo(), in_terminal=True)
  output = capsys.readouterr()
  assert output.out == '<a>\n\n'
  for words in ('[cut off at --max_new_tokens]', 'Ctrl-D ends the program',
                'line 3 is not text'):
    assert words in output.err


def test_the_program_through_a_pipe(tmp_path):
  def run(*flags, stdin='', code=0):
    result = forked.run('-m', 'tools.chat', *flags, stdin=stdin)
    assert result.returncode == code, result.stderr
    return result
  save(tmp_path)
  flags = (f'--folder={tmp_path}', '--max_new_tokens=3')
  first = run(*flags, stdin='a\n/reset\na\n')
  assert first.stderr == ''
  # A new conversation begins as the first one did.
  one, other = first.stdout.splitlines()
  assert one == other
  assert 'has 33 tokens' in run(*flags, stdin='a' * 31, code=2).stderr
  assert 'either --workdir DIR' in run('--folder=a', '--workdir=b',
                                       code=2).stderr
