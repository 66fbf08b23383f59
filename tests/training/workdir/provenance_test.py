"""A run remembers its code, its command and its data, and notices a change."""

import itertools
import json
import shutil
import subprocess
import sys
import types

import pytest

from common.errors import RequestError
from configs import base
from tests.helpers import data_files
from training import objectives, runs
from training.data import probes, tokenizers
from training.objectives import pipeline
from training.workdir import provenance
from training.workdir import run_config


@pytest.fixture(name='repository')
def _repository(tmp_path):
  if shutil.which('git') is None:
    pytest.skip('the program git is not installed')
  root = tmp_path / 'code'
  root.mkdir()
  (root / 'a.py').write_text('a = 1\n')
  for words in (['init', '-q'], ['add', 'a.py'],
                ['-c', 'user.name=A', '-c', 'user.email=a@b', 'commit', '-qm',
                 'first']):
    subprocess.run(['git', '-C', root, *words], check=True)
  return root


def code(root):
  provenance._describe_code.cache_clear()
  return provenance._describe_code(root)


def test_commit_and_what_differs_from_it(repository):
  clean = code(repository)
  assert len(clean['commit']) == 40 and clean['diff'] == ''
  (repository / 'notes.txt').write_text('No code.')
  assert code(repository) == clean
  (repository / 'a.py').write_text('a = 2\n')
  changed = code(repository)
  new_file = repository / 'architectures/parts/b.py'
  new_file.parent.mkdir(parents=True)
  new_file.write_text('b = 1\n')
  new = code(repository)
  new_file.write_text('b = 2\n')
  edited = code(repository)
  assert len({x['diff'] for x in (clean, changed, new, edited)}) == 4
  assert changed['commit'] == clean['commit']
  # A new config, and a sweep that a user saves here, are not the program.
  (repository / 'configs').mkdir()
  for name in ('configs/mine.py', 'sweep.py'):
    (repository / name).write_text('c = 1\n')
  assert code(repository) == edited
  new_file.unlink()
  (repository / 'a.py').write_text('a = 1\n')
  assert code(repository) == clean


def test_a_copy_within_another_repository_has_no_commit(repository):
  """As where the project is installed below a user's own repository."""
  (repository / 'site').mkdir()
  assert code(repository / 'site') == dict(commit=None, diff=None)


def _saved(folder, monkeypatch, *starts):
  (folder / 'checkpoints/1').mkdir(parents=True, exist_ok=True)
  for start in starts:
    monkeypatch.setattr(provenance, 'describe_this_start',
                        lambda data=None, start=start: start)
    run_config.save_config(folder, base.base())
  return run_config.load_starts(folder)


def test_config_json_remembers_each_start(tmp_path, monkeypatch):
  one = dict(commit='1' * 40, diff='', command='train.py --workdir a')
  two = dict(one, diff='ab')
  assert _saved(tmp_path, monkeypatch, one, one, two) == [one, two]
  assert run_config.load_config(tmp_path) == base.base().lock()
  assert provenance.list_code_changes([one]) == [
      'the code has changed since this run was last started: commit '
      '111111111111 -> commit 111111111111 with changes ab']
  assert provenance.list_code_changes([one, two]) == []


def test_a_run_whose_data_have_changed_is_not_gone_on_with_unasked(
    tmp_path, monkeypatch):
  code = dict(commit=None, diff=None, command='train.py')
  starts = _saved(tmp_path, monkeypatch, code | {'data': {'a': '1', 'b': '1'}},
                  code)  # the newest one that knows it counts
  for same in ({'a': '1', 'b': '1'}, {'b': '1'}, {'b': '1', 'new': '1'}):
    assert not provenance.check_data(starts, same, allowed=False)
  with pytest.raises(RequestError, match=r"(?s)'b' holds.*allow_config_change"):
    provenance.check_data(starts, {'a': '1', 'b': '2'}, allowed=False)
  assert len(provenance.check_data(starts, {'a': '2', 'b': '2'}, True)) == 2
  assert not provenance.check_data(starts[1:], {'a': '2'}, allowed=False)


TURNS = [dict(role='user', content='Who?'), dict(role='assistant', content='I')]


@pytest.fixture(name='place')
def _place(tmp_path, monkeypatch):
  monkeypatch.setenv('ARCHETYPE_CACHE', str(tmp_path / 'cache'))
  data_files.write_roberta_tokenizer(tmp_path, eos_token='</s>')
  (tmp_path / 'chat.jsonl').write_text(json.dumps(dict(turns=TURNS)))
  (tmp_path / 'chat.jinja').write_text('{{ messages[0].content }}')
  (tmp_path / 'rows.tsv').write_text('a man\tyes\na pan\tno\n')
  (tmp_path / 'rows.jsonl').write_text(
      '{"text": "a man", "label": "yes"}\n{"text": "a pan", "label": "no"}\n')
  monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(
      load_dataset=lambda name, config, split: _hugging_face(tmp_path)))
  return tmp_path


def _start(place, source, objective, **data):
  """Returns what a start of a run finds changed since the start before, which
  is remembered if there was none."""
  source = source.format(place)
  tokenizer_file = str(place / 'tokenizer.json')
  config = objectives.fill_in_labels(data_files.make_run_config(
      source, objective, eval_source=source, tokenizer=tokenizer_file, **data))
  tokenizer = tokenizers.load(config.data.tokenizer)
  _, derived = runs.resolve_model(config, tokenizer)
  contents = pipeline.digest_contents(config, tokenizer)
  if not run_config.has_begun(place):
    run_config.save_config(place, config, derived, contents)
    (place / 'checkpoints/1').mkdir(parents=True)
  return [change.name for change in run_config.list_changes(place, config,
                                                            derived)
          ] + provenance.check_data(run_config.load_starts(place), contents,
                                    True)


def _replace(file, old, new):
  def change(place, _):
    text = (place / file).read_text()
    assert old in text
    (place / file).write_text(text.replace(old, new))
  return change


def _another_vocabulary(place, _):
  tree = json.loads((place / 'tokenizer.json').read_text())
  vocab = tree['model']['vocab']
  vocab['b'], vocab['c'] = vocab['c'], vocab['b']
  (place / 'tokenizer.json').write_text(json.dumps(tree))


def _another_probe(place, monkeypatch):
  recall = type(probes.PROBES['recall'])

  class Turned(recall):

    def draw(self, *of):
      row = super().draw(*of)
      return row._replace(tokens=row.tokens[::-1])

  monkeypatch.setitem(probes.PROBES, 'recall', Turned())
  probes.digest_probe.cache_clear()


def _hugging_face(place):
  """Returns, as the package `datasets` does, the rows of a file."""
  rows = [json.loads(line) for line in
          (place / 'rows.jsonl').read_text().splitlines()]

  class Dataset:
    column_names, features = list(rows[0]), dict.fromkeys(rows[0])
    _fingerprint = str(next(_loads))  # as of files that were touched

    def select_columns(self, names):
      return [{name: row[name] for name in names} for row in rows]

  return Dataset()


_loads = itertools.count()
CHAT = dict(source='jsonl:{}/chat.jsonl:turns', objective='chat')
ROWS = dict(source='labelled:{}/rows.tsv', objective='classification',
            arch='bert')
HF_ROWS = ROWS | dict(source='hf:rows:::text+label')
HF_TEXT = dict(source='hf:rows', objective='causal')


@pytest.mark.parametrize('run, change, name', [
    (CHAT, _another_vocabulary, 'tokenizer.json'),
    (CHAT, _replace('tokenizer_config.json', '</s>', '<s>'), 'tokenizer.json'),
    (CHAT | dict(chat_template='{}/chat.jinja'),
     _replace('chat.jinja', '[0]', '[1]'), 'data.chat_template'),
    (CHAT, _replace('chat.jsonl', 'Who', 'Why'), 'chat.jsonl'),
    (ROWS, _replace('rows.tsv', 'man', 'fan'), 'rows.tsv'),
    (ROWS, _replace('rows.tsv', 'man\tyes\na pan\tno',
                    'man\tno\na pan\tyes'), 'rows.tsv'),
    (ROWS, _replace('rows.tsv', 'yes', 'oui'), 'data.labels'),
    (HF_ROWS, _replace('rows.jsonl', 'man', 'fan'), 'hf:rows'),
    (HF_ROWS, _replace('rows.jsonl', 'man", "label": "yes"}\n{"text": "a pan',
                       'pan", "label": "yes"}\n{"text": "a man'), 'hf:rows'),
    (HF_TEXT, _replace('rows.jsonl', 'man', 'fan'), 'hf:rows'),
    (dict(source='probe:recall', objective='probe'), _another_probe,
     'probe:recall')])
def test_a_start_notices_whatever_makes_other_rows(
    run, change, name, place, monkeypatch):
  """A file of the same name may hold something else. Whatever turns text into
  numbers is compared with what it was."""
  run = {key: value.format(place) for key, value in run.items()}
  start = lambda: _start(place, **run)
  probes.digest_probe.cache_clear()
  assert not start() and not start()
  change(place, monkeypatch)
  assert any(name in line for line in start())
  probes.digest_probe.cache_clear()
