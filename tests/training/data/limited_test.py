"""What a chat template and a tokenizer.json may take: what has no end, writes
gigabytes or ends its process is a sentence that names the file, and the next
call is answered."""

import json
import os
import sys
from unittest import mock

import pytest
import tokenizers as hf

from common.errors import RequestError
from training.data import conversations, limited, tokenizers

BYTES = tokenizers.load('bytes')
OVER = 'it takes more than .* seconds or 1,024 MiB of memory, or ends the proc'


def rendered(text, content='x'):
  return conversations.make_template('of models/a', text, BYTES).render(
      [dict(role='user', content=content)])


@pytest.mark.parametrize('text, why', [
    ('{% for x in range(99999) %}' * 3 + '{% endfor %}' * 3, OVER),
    pytest.param('{{ (10**100000)**1000 }}', OVER, marks=pytest.mark.long),
    ('{{ "%1000000000s"|format(1) }}', OVER),
    ('{{ "%9000000s"|format(1) }}', 'it writes 9,000,000 characters where 5 '),
    (f'{{{{ {"(" * 5000}1{")" * 5000} }}}}', 'maximum recursion depth'),
    ('{% break %}', "'break' outside loop"),
    ('{% for x in [1] %}' * 60 + '{% endfor %}' * 60, 'too many statically'),
    (r'{{ "\ud800" }}', 'its text is not text')])
def test_a_template_has_limits(text, why, monkeypatch):
  if why == OVER:
    monkeypatch.setattr(limited, 'MOST_SECONDS', 2)
    limited._start_limited_process.cache_clear()
  with pytest.raises(RequestError, match='^the chat template of models/a fails'
                     f': {why}') as caught:
    rendered(text)
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 300
  assert rendered('{{ messages[0].content }}!') == 'x!'


def test_a_long_conversation_is_rendered():
  content = 'x' * 2**20
  assert rendered('{{ messages[0].content }}' * 2, content) == content * 2


def test_an_interrupted_call_answers_no_other(monkeypatch):
  def interrupt(*args, **options):
    print(*args, **options)
    raise KeyboardInterrupt
  monkeypatch.setattr(limited, 'print', interrupt, raising=False)
  with pytest.raises(KeyboardInterrupt):
    rendered('first')
  monkeypatch.undo()
  assert rendered('second') == 'second'


def test_each_call_has_its_own_time(monkeypatch):
  """A process that is kept has as long for a later call as for the first."""
  limits = mock.Mock(**{'getrlimit.return_value': (0, 99)})
  for name, value in (('resource', limits), ('signal', mock.MagicMock())):
    monkeypatch.setattr(limited, name, value)
  for name, value in (('argv', ['', '10', '1000', '300']),
                      ('stdin', ['["abs", 1]', '["abs", 1]']),
                      ('stdout', mock.Mock())):
    monkeypatch.setattr(sys, name, value)
  spent = mock.Mock(side_effect=[(2.5, 0.25), (30.5, 1.0)])
  monkeypatch.setattr(limited.os, 'times', spent)
  limited.main()
  assert [call.args[1] for call in limits.setrlimit.call_args_list
          if call.args[0] == limits.RLIMIT_CPU] == [(13, 99), (42, 99)]


def test_what_waits_has_a_limit(tmp_path, monkeypatch):
  os.mkfifo(tmp_path / 'a.json')
  monkeypatch.setattr(limited, 'WAITING_FACTOR', 1)
  monkeypatch.setattr(limited, 'MOST_SECONDS', 2)
  limited._start_limited_process.cache_clear()
  with pytest.raises(RequestError, match=f'^a.json: {OVER}'):
    limited.call_with_limits('a.json', 'read_json', str(tmp_path / 'a.json'))


SLOW = dict(type='Split', pattern=dict(Regex='(b+)+c'), behavior='Isolated',
            invert=False)


def pipeline(path, model=(), **parts):
  """Writes a tokenizer.json of one word, and these parts."""
  tree = json.loads(hf.Tokenizer(hf.models.WordLevel(
      {'a': 0}, unk_token='a')).to_str()) | parts
  path.write_text(json.dumps(tree | dict(model=tree['model'] | dict(model))))
  return str(path)


def bpe(second, prefix):
  return dict(type='BPE', vocab={'a': 0, second: 1}, merges=[['a', second]],
              continuing_subword_prefix=prefix, unk_token=None)


@pytest.mark.parametrize('parts, why', [
    (dict(normalizer=dict(type='Prepend', prepend='x' * 10**8)), OVER),
    (dict(normalizer=dict(type='Prepend', prepend='x' * 10**6)),
     'it makes 1,012,320 characters of 12,320'),
    (dict(model=bpe('b', 'xxxx')), 'range end index'),  # a panic of Rust
    (dict(model=bpe('éb', '#')), OVER),  # which ends the process
    (dict(pre_tokenizer=SLOW), 'fails at a text: Onig: Regex search error'),
    (dict(model=dict(vocab={'b': 0}, unk_token='none')), 'WordLevel error'),
    (dict(model=dict(vocab={'a': 2**32 - 1})), 'has the id 4,294,967,295')])
def test_a_tokenizer_has_limits(parts, why, tmp_path):
  file = pipeline(tmp_path / 'tokenizer.json', **parts)
  with pytest.raises(RequestError, match=f"^tokenizer '{file}' (cannot be read "
                     f'as a Hugging Face tokenizer.json: )?{why}') as caught:
    tokenizers.load(file).encode('b' * 60)
  assert '\n' not in str(caught.value)
