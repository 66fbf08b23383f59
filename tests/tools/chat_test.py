"""Lines in, answers out; and the program as a user runs it."""

import io
import json
import sys
import types

import pytest

from tests.helpers import forked
from tests.training.chat import load_test
from tools import chat as conversing


class Echo:
  """A session that says what it is told."""
  ended = 'end'

  def __init__(self):
    self.messages, self.told = [], []

  def ask(self, text, stopped=lambda: False):
    self.messages.append(text)
    yield from ('<', text, '>')

  def reset(self):
    self.messages = []

  def instruct(self, text):
    self.told.append(text)

  def line(self):
    return json.dumps(self.messages) + '\n'


@pytest.fixture
def pipe(monkeypatch, capsys):
  def run(text):
    session = Echo()
    monkeypatch.setattr(sys, 'stdin', types.SimpleNamespace(
        buffer=io.BytesIO(text if isinstance(text, bytes) else text.encode())))
    conversing.through_pipe(session)
    return session, capsys.readouterr()
  return run


def test_each_line_of_a_pipe_is_a_message(pipe):
  session, said = pipe('a\n\n  \n b \r\n//c\n')
  assert said.out == '<a>\n< b >\n</c>\n' and said.err == ''
  assert session.messages == ['a', ' b ', '/c']


def test_commands(pipe, tmp_path):
  file = tmp_path / 'talk.jsonl'
  session, said = pipe(f'a\n/save {file}\n/system be brief\n/reset\nb\n'
                       f'/save {file}\n/system\n/help\n/exit\nc\n')
  assert said.out == '<a>\n<b>\n' and '/reset' in said.err
  assert file.read_text() == '["a"]\n["b"]\n'
  assert session.told == ['be brief', '']


def test_at_a_terminal_what_is_wrong_ends_nothing(monkeypatch, capsys):
  lines = iter(['/nothing', 'a', KeyboardInterrupt(), '', '/save /no/where',
                'a\udc80', EOFError()])

  def line(prompt):
    found = next(lines)
    if isinstance(found, BaseException):
      raise found
    return found
  monkeypatch.setattr('builtins.input', line)
  session = Echo()
  session.ended = 'length'
  conversing.with_terminal(session)
  said = capsys.readouterr()
  assert said.out == '<a>\n\n'
  for words in ('no command /nothing', '[cut off at --max_new_tokens]',
                'Ctrl-D ends the program', 'No such file',
                'the message is not text'):
    assert words in said.err


def _chat(*flags, said='', code=0):
  result = forked.run('-m', 'tools.chat', *flags, said=said)
  assert result.returncode == code, result.stderr
  assert 'Traceback' not in result.stderr
  return result


@pytest.mark.parametrize('flags, words', [
    ((), 'either --workdir DIR'), (('--folder=a', '--workdir=b'), 'either'),
    (('--folder=a', '--step=3'), 'has no --step'),
    (('--folder=a', '--min_p=2'), 'min_p is 2.0'),
    (('--folder=nowhere',), 'config.json')])
@pytest.mark.slow
def test_wrong_flags_are_refused(flags, words):
  assert words in _chat(*flags, code=2).stderr


def test_the_program_through_a_pipe(tmp_path):
  load_test.save(tmp_path, bos_token_id=17, eos_token_id=18)
  (tmp_path / 'chat_template.jinja').write_text(load_test.TEMPLATE)
  flags = (f'--folder={tmp_path}', '--max_new_tokens=3')
  first = _chat(*flags, said='a\nb\n')
  assert len(first.stdout.splitlines()) == 2 and first.stderr == ''
  assert _chat(*flags, said='a\nb\n').stdout == first.stdout
  # A new conversation begins as the first one did.
  again = _chat(*flags, said='a\n/reset\na\n').stdout.splitlines()
  assert again[0] == again[1] == first.stdout.splitlines()[0]
  assert 'has 33 tokens' in _chat(*flags, said='a' * 31, code=2).stderr
  (tmp_path / 'chat_template.jinja').write_text('{{ messages.__class__ }}')
  assert 'makes nothing' in _chat(*flags, said='a', code=2).stderr
