"""A run remembers its code and its command, and a sweep that they changed."""

import shutil
import subprocess

import pytest

from common.errors import RequestError
from configs import base
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
  provenance._code.cache_clear()
  return provenance._code(root)


def test_commit_and_what_differs_from_it(repository):
  clean = code(repository)
  assert len(clean['commit']) == 40 and clean['diff'] == ''
  (repository / 'notes.txt').write_text('No code.')
  assert code(repository) == clean
  (repository / 'a.py').write_text('a = 2\n')
  changed = code(repository)
  (repository / 'b.py').write_text('b = 1\n')
  new = code(repository)
  (repository / 'b.py').write_text('b = 2\n')
  diffs = {clean['diff'], changed['diff'], new['diff'],
           code(repository)['diff']}
  assert len(diffs) == 4
  assert changed['commit'] == clean['commit']
  (repository / 'b.py').unlink()
  (repository / 'a.py').write_text('a = 1\n')
  assert code(repository) == clean


def _saved(folder, monkeypatch, *starts):
  (folder / 'checkpoints/1').mkdir(parents=True, exist_ok=True)
  for start in starts:
    monkeypatch.setattr(provenance, 'this_start',
                        lambda data=None, start=start: start)
    run_config.save(folder, base.base())
  return run_config.starts(folder)


def test_config_json_remembers_each_start(tmp_path, monkeypatch):
  one = dict(commit='1' * 40, diff='', command='train.py --workdir a')
  two = dict(one, diff='ab')
  assert _saved(tmp_path, monkeypatch, one, one, two) == [one, two]
  assert run_config.load_config(tmp_path) == base.base().lock()
  assert provenance.changes([one]) == [
      'the code has changed since this run was last started: commit '
      '111111111111 -> commit 111111111111 with changes ab']
  assert provenance.changes([one, two]) == []


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
