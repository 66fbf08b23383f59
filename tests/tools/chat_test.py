"""Lines in, answers out; and the program as a user runs it."""

import io
import sys
import types

import pytest

from tests.helpers import forked
from tests.training.chat import load_test
from tools import chat as conversing


class Echo:
  """A session that says what it is told."""
  ended = 'length'

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
  conversing.converse(session, in_terminal=False)
  said = capsys.readouterr()
  assert said.out == '<a>\n< b >\n<c>\n' and said.err == ''
  assert session.messages == ['c']


def test_at_a_terminal_what_is_wrong_ends_nothing(monkeypatch, capsys):
  lines = iter(['a', KeyboardInterrupt(), '', 'a\udc80', EOFError()])

  def line(prompt):
    following = next(lines)
    if isinstance(following, BaseException):
      raise following
    return following
  monkeypatch.setattr('builtins.input', line)
  conversing.converse(Echo(), in_terminal=True)
  said = capsys.readouterr()
  assert said.out == '<a>\n\n'
  for words in ('[cut off at --max_new_tokens]', 'Ctrl-D ends the program',
                'line 3 is not text'):
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
