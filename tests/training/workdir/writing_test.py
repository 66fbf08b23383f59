"""A disk that takes no more, or a folder that is gone: one sentence, exit 1.

The limit on the size of a file (RLIMIT_FSIZE) stands in for a full disk: it is
met where a full disk is, below Python and below TensorStore, and needs no
privilege.
"""

import contextlib
import importlib.util
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import pytest

from configs import base
from configs.errors import EnvironmentFailure, RequestError
from tests.helpers import toy_run
from training.data import sources, token_cache
from training.data import tokenizers
from training.workdir import metrics, run_config, storage
from training.workdir import writing

ROOT = pathlib.Path(__file__).parents[3]


@contextlib.contextmanager
def files_of_at_most(size):
  old = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def _jsonl(folder):
  return metrics.JsonlWriter(folder, 0)


def _tensorboard(folder):
  if importlib.util.find_spec('tensorboard') is None:
    pytest.skip('the package tensorboard is not installed')
  return metrics.TensorboardWriter(folder, 0)


@pytest.mark.parametrize('make', [_jsonl, _tensorboard])
def test_figures_that_cannot_be_written(tmp_path, make):
  writer = make(tmp_path)
  writer.write(1, 'train', {'loss': 1.0})
  file, = [path for path in tmp_path.rglob('*') if path.is_file()]
  with files_of_at_most(file.stat().st_size + 10):
    with pytest.raises(EnvironmentFailure, match=f'{file.name}: File too lar'):
      writer.write(2, 'train', {'loss': 1.0})
  writer.close()
  # A line cut short is dropped when the run goes on.
  if make is _jsonl:
    metrics.JsonlWriter(tmp_path, 1).write(2, 'train', {'loss': 2.0})
    assert [row['step'] for row in metrics.read(file)] == [1, 2]


@pytest.mark.parametrize('make', [_jsonl, _tensorboard])
def test_figures_whose_file_is_deleted(tmp_path, make):
  writer = make(tmp_path / 'run')
  writer.write(1, 'train', {'loss': 1.0})
  shutil.rmtree(tmp_path / 'run')
  with pytest.raises(EnvironmentFailure, match='run/.* deleted in mid-run'):
    writer.write(2, 'train', {'loss': 1.0})


def _write(folder):
  storage.write(storage.path(folder / 'eval.json'), 'x' * 100)


def _config(folder):
  run_config.save(folder, base.base())


def _tokens(folder):
  (folder / 'a.txt').write_text('All the tokens of this text. ' * 99)
  with files_of_at_most(1000):
    token_cache.cached_tokens(
        sources.parse(f'text:{folder}/*.txt')[0][1],
        tokenizers.load('bytes'), str(folder / 'cache'), 1)


@pytest.mark.parametrize('write, name', [
    (_write, 'eval.json'), (_config, 'config.json'), (_tokens, 'cache/tokens')])
def test_what_else_a_run_writes(tmp_path, write, name):
  limit = contextlib.nullcontext() if write is _tokens else files_of_at_most(50)
  with limit, pytest.raises(EnvironmentFailure,
                            match=f'cannot write .*{name}.* too large'):
    write(tmp_path)
  assert not (tmp_path / name).is_file()


def test_a_save_that_fails_says_what_the_run_goes_on_from(tmp_path, capfd):
  """By a sentence alone, and the same command does go on from there."""
  state = toy_run.born(4, 2)
  with pytest.raises(EnvironmentFailure) as failure:
    with toy_run.open_store(tmp_path) as store:
      toy_run.save(store, 10, state)
      store.wait()
      with files_of_at_most(20_000):
        toy_run.save(store, 20, state)
        store.wait()
  assert str(failure.value) == (
      f'cannot write checkpoint 20 in {tmp_path}/checkpoints: File too large; '
      'once that is mended, the same command goes on from step 10')
  assert capfd.readouterr().err == ''
  with toy_run.open_store(tmp_path) as store:
    restored = store.restore(toy_run.abstract(4, 2))
    assert (restored.step, restored.damaged) == (10, ())
    assert toy_run.save(store, 20, restored.state)


def test_a_folder_that_is_gone(tmp_path, capfd):
  state = toy_run.born(1, 1)
  with pytest.raises(EnvironmentFailure, match='cannot write checkpoint 20 .*'
                     'from the beginning'):
    with toy_run.open_store(tmp_path) as store:
      toy_run.save(store, 10, state)
      store.wait()
      shutil.rmtree(store.directory)
      store.directory.write_text('')  # so that it is not made again
      toy_run.save(store, 20, state)
  assert capfd.readouterr().err == ''


# As TensorStore and its bucket driver say it.
_FULL = ('RESOURCE_EXHAUSTED: Error writing "step/0" in OCDBT database at '
         'local file "/r/20/": Failed to write 320135 bytes to file 30: No '
         "space left on device [os_error_code='28'] [source locations='a.cc:1"
         "\nb.cc:2']")
_BUCKET = ('UNAVAILABLE: Error writing "gs://b/r/20": CURL error [source '
           "locations='a.cc:1']")


@pytest.mark.parametrize('error, reason', [
    (ValueError(_FULL), 'No space left on device'),
    (ValueError(_BUCKET), 'Error writing "gs://b/r/20": CURL error'),
    (OSError(28, 'No space left on device'), 'No space left on device'),
    (OSError('3000 requested and 12 written'), '3000 requested and 12 written'),
    (TimeoutError(), 'TimeoutError')])
def test_the_environment_fails(error, reason):
  with pytest.raises(EnvironmentFailure, match='cannot write /r: ') as failure:
    with writing.to('/r', lambda: 'so'):
      try:
        raise error
      except type(error) as inner:
        raise RuntimeError('Orbax wraps it') from inner
  assert str(failure.value) == f'cannot write /r: {reason}; so'


@pytest.mark.parametrize('error', [
    ValueError('INVALID_ARGUMENT: rank 2 does not match'), KeyError('x'),
    RequestError('a wrong request'), EnvironmentFailure('said already')])
def test_a_bug_stays_a_bug_and_a_sentence_as_it_is(error):
  with pytest.raises(type(error)) as raised:
    with writing.to('/r'):
      raise error
  assert raised.value is error


@pytest.mark.long
def test_train_on_a_full_disk(tmp_path):
  (tmp_path / 'a.txt').write_text('A text to be learned. ' * 500)
  words = ['train.py', '--config', 'configs/gpt.py', f'--workdir={tmp_path}/a',
           f'--config.data.source=text:{tmp_path}/a.txt',
           f'--config.data.cache_dir={tmp_path}/cache',
           '--config.model.d_model=32', '--config.model.num_layers=1',
           '--config.data.length=16', '--config.data.batch_size=8',
           '--config.train.steps=6', '--config.checkpoint.every_steps=2',
           '--config.eval.every_steps=0', '--config.model.num_heads=2']
  limit = ('import resource, sys, runpy; resource.setrlimit(resource.'
           'RLIMIT_FSIZE, (60_000,) * 2); sys.argv = sys.argv[1:]; '
           'runpy.run_path(sys.argv[0], run_name="__main__")')
  result = subprocess.run(
      [sys.executable, '-c', limit, *words], cwd=ROOT, text=True,
      # Else what is compiled would be cut short in the cache of all tests.
      capture_output=True, env=os.environ | {
          'JAX_ENABLE_COMPILATION_CACHE': 'false'})
  assert result.returncode == 1, result.stdout + result.stderr
  *_, sentence = lines = [line for line in result.stderr.splitlines()
                          if 'tokenised' not in line]
  assert len(lines) == 1, result.stderr
  assert sentence.startswith(
      f'error: cannot write checkpoint 2 in {tmp_path}/a/checkpoints: File too '
      'large; once that is mended')
