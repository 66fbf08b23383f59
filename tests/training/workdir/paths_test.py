"""Paths that cannot be used are refused before any work, in one sentence."""

import errno
import pathlib

import pytest

from configs import base
from configs.errors import RequestError
from training import runs
from training.data import pipeline
from training.workdir import run_config, storage

# Root may write everywhere, so what is read-only is of the kernel.
UNUSABLE = {
    'a file': ('FILE', 'not a directory'),
    'below a file': ('FILE/a/b', 'not a directory'),
    'a device': ('/dev/null', 'not a directory'),
    'a long name': ('FOLDER/' + 300 * 'a', 'file name too long'),
    'read-only': ('/proc/a/b', 'no such file|permission|read-only'),
    'a NUL': ('FOLDER/a\0b', 'is no path'),
}


@pytest.fixture(name='place')
def _place(tmp_path):
  (tmp_path / 'file').write_text('')
  return lambda text: text.replace('FILE', str(tmp_path / 'file')).replace(
      'FOLDER', str(tmp_path))


@pytest.mark.parametrize('name', UNUSABLE)
def test_an_unusable_folder_is_refused(name, place):
  text, reason = UNUSABLE[name]
  with pytest.raises(RequestError, match='^--flag is ') as error:
    storage.try_folder(place(text), '--flag')
  assert error.match(reason)


@pytest.mark.parametrize('name', UNUSABLE)
def test_an_unusable_file_is_refused(name, place):
  text, _ = UNUSABLE[name]
  file = text if name in ('a device', 'a long name') else f'{text}/x.json'
  with pytest.raises(RequestError, match='^--flag is '):
    storage.output(place(file), '--flag')


def test_what_is_tried_leaves_nothing(tmp_path):
  storage.try_folder(tmp_path / 'a' / 'b')
  storage.output(str(tmp_path / 'c' / 'd.json'), '--json')
  assert not list(tmp_path.iterdir())


def test_a_file_whose_place_is_taken_is_refused(tmp_path):
  for name in ('a.json', 'b.json.partial'):
    (tmp_path / name).mkdir()
  for name in ('a.json', 'b.json'):
    with pytest.raises(RequestError, match='is there and is no file'):
      storage.output(str(tmp_path / name), '--json')
  with pytest.raises(RequestError, match='file name too long'):
    storage.output(str(tmp_path / (250 * 'a')), '--json')  # with .partial


def test_a_full_disk_is_no_wrong_request(tmp_path, monkeypatch):
  def full(**_):
    raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(storage.tempfile, 'TemporaryFile', full)
  with pytest.raises(OSError, match='No space left') as error:
    storage.try_folder(tmp_path)
  assert not isinstance(error.value, ValueError)


@pytest.mark.parametrize('name', ['checkpoints', 'config.json',
                                  'metrics.jsonl'])
def test_a_workdir_in_which_something_is_in_the_way(name, tmp_path):
  in_the_way = tmp_path / name
  in_the_way.write_text('') if name == 'checkpoints' else in_the_way.mkdir()
  with pytest.raises(RequestError, match=name):
    runs.try_workdir(storage.path(tmp_path))


@pytest.mark.parametrize('text', [
    '{"model_type": "gpt2"}', '', '[]', '{', 10_000 * '['])
def test_the_config_of_something_else_is_not_written_over(text, tmp_path):
  file = tmp_path / 'config.json'
  file.write_text(text)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(RequestError, match='whose config.json is not that of a '
                     'run .*: take another --workdir'):
    runs.try_workdir(storage.path(tmp_path))
  assert file.read_text() == text
  # Of a run that has begun it is damaged, which is said where it is read.
  (tmp_path / 'checkpoints/5').mkdir()
  runs.try_workdir(storage.path(tmp_path))
  with pytest.raises(RequestError, match='config.json is damaged'):
    run_config.load_config(tmp_path)


def test_files_that_are_of_no_run_are_told(tmp_path, capsys):
  for name in ('logs', 'log.txt', 'slurm-12.out', '.git', 'lock', 'lab.log'):
    (tmp_path / name).write_text('')
  runs.try_workdir(storage.path(tmp_path))
  runs.try_workdir(storage.path(tmp_path / 'new'))
  assert not capsys.readouterr().err
  (tmp_path / 'thesis.tex').write_text('')
  runs.try_workdir(storage.path(tmp_path))
  assert capsys.readouterr().err.endswith(
      'not empty and holds no run: the run is written beside thesis.tex\n')
  run_config.save(tmp_path, base.base())
  runs.try_workdir(storage.path(tmp_path))
  assert not capsys.readouterr().err


def test_a_run_that_has_not_begun_is_begun_again(tmp_path):
  run_config.save(tmp_path, base.base())
  runs.try_workdir(storage.path(tmp_path))


@pytest.mark.parametrize('folder, sentence', [
    ('FILE', 'not a directory'), ('gs://a/b', 'a folder on disk'),
    ('~nobody-of-this-name/x', 'home directory')])
def test_an_unusable_cache_is_refused(folder, sentence, place):
  c = base.base()
  c.data.cache_dir = place(folder)
  with pytest.raises(RequestError, match='data.cache_dir is') as error:
    pipeline.check_sources(c)
  assert error.match(sentence)


def test_a_cache_that_has_entries_may_be_read_only(tmp_path, monkeypatch):
  (tmp_path / 'tokens').mkdir()
  c = base.base()
  c.data.cache_dir = str(tmp_path)
  def read_only(**_):
    raise OSError(errno.EROFS, 'Read-only file system')
  monkeypatch.setattr(storage.tempfile, 'TemporaryFile', read_only)
  pipeline.check_sources(c)
  (pathlib.Path(tmp_path) / 'tokens').rmdir()
  with pytest.raises(RequestError, match='read-only file system'):
    pipeline.check_sources(c)
