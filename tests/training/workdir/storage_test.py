"""A run's folder, on disk or in a bucket: what cannot be used is refused before
any work, one process trains in it, and a disk that takes no more is one
sentence and exit code 1.

The limit on the size of a file (RLIMIT_FSIZE) stands in for a full disk: it is
met where a full disk is, below Python and below TensorStore, and needs no
privilege.
"""

import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

from etils import epath
import pytest

from common.errors import EnvironmentFailure, RequestError
from configs import gpt
from tests import train_test
from tests.helpers import forked, toy_run
from tools.compare import layout
from training import preflight, vectorised
from training.data import sources, tokenizers
from training.hf import config as hf_config
from training.workdir import metrics, run_config, storage

ROOT = pathlib.Path(__file__).parents[3]
texts = train_test.texts


@pytest.mark.parametrize('text', [
    's3://bucket/a', 'gs:///', 'gs://bucket/', 'a\0b', 'a\ud800'])
def test_what_is_no_place_is_refused(text):
  with pytest.raises(RequestError, match='--workdir is .* gs://BUCKET/NAME'):
    storage.checked_path(text)


def test_a_file_is_written_whole(tmp_path):
  file = tmp_path / 'a/b.json'
  storage.write_file(storage.checked_path(file), 'one')
  storage.write_file(storage.checked_path(file), 'two')
  # What a process that was killed has left goes with the next one.
  subprocess.run([sys.executable, '-c', 'import os, sys\n'
                  'from training.workdir import storage\n'
                  'path = storage.checked_path(sys.argv[1])\n'
                  'with storage.write_atomically(path):\n'
                  '  os.kill(os.getpid(), 9)', str(file)], cwd=ROOT)
  assert len(list(file.parent.iterdir())) == 2
  file.with_name(f'.writing-{storage.host_name()}-999999999-x').mkdir()
  file.with_name('.writing-1').touch()  # whose, it does not say: a day is left
  with storage.write_atomically(storage.checked_path(file)) as write:
    write(b'thr')
    storage.write_file(storage.checked_path(file.with_name('c')),
                       'another')  # nor is it
    write(b'ee')
  assert file.read_text() == 'three' and sorted(
      path.name for path in file.parent.iterdir()) == [
          '.writing-1', 'b.json', 'c']


def in_bucket(folder, program, *words, code=0):
  result = subprocess.run(
      [sys.executable, '-m', 'tests.helpers.bucket', str(folder), program,
       *words],
      cwd=train_test.ROOT, capture_output=True, text=True, timeout=300)
  assert result.returncode == code, result.stdout + result.stderr
  return result.stdout


@pytest.mark.slow
@pytest.mark.long
def test_a_run_in_a_bucket_is_the_run_on_disk(texts, tmp_path):
  """Killed after its first checkpoint and gone on with: the same figures, bit
  for bit; then evaluated."""
  words = train_test.command(
      'gs://bucket/runs/a', texts, '--config.log.tensorboard=True',
      '--config.checkpoint.every_steps=5')[2:]
  run = tmp_path / 'bucket/runs/a'
  in_bucket(tmp_path, 'tests.helpers.killed_run', '5', *words,
            code=-signal.SIGKILL)
  # At a checkpoint, the figures up to it are there.
  assert [row['step'] for row in train_test.rows(run)] == [1, 2, 3, 4, 5]
  assert 'going on from step 5' in in_bucket(
      tmp_path, 'train.py', *words, '--profile_steps=6:8')
  disk = tmp_path / 'disk'
  train_test.run(train_test.command(disk, texts))
  assert [(r['step'], r['split'], r['loss']) for r in train_test.rows(run)] == [
      (r['step'], r['split'], r['loss']) for r in train_test.rows(disk)]
  assert len(list((run / 'tensorboard').iterdir())) == 2
  assert len(list((run / 'profile').rglob('*.xplane.pb'))) == 1
  in_bucket(tmp_path, 'eval.py', '--workdir=gs://bucket/runs/a',
            '--json=gs://bucket/eval.json')
  train_test.evaluate(disk, f'--json={tmp_path}/eval.json')
  written, expected = (json.loads(path.read_text()) for path in (
      tmp_path / 'bucket/eval.json', tmp_path / 'eval.json'))
  assert written == expected
  # Nothing went to a local folder of that name.
  assert not (train_test.ROOT / 'gs:').exists()
  assert sorted(p.name for p in run.iterdir()) == [
      'checkpoints', 'config.json', 'metrics.jsonl', 'profile', 'tensorboard']


def test_what_grows_goes_into_a_bucket_whole(tmp_path, monkeypatch):
  """Not before it is pushed, and no more often than it changes; on disk it lies
  where it is written."""
  folder = epath.Path(tmp_path / 'run')
  folder.mkdir()
  assert storage.BucketUploads(folder).local == folder
  monkeypatch.setattr(storage, 'is_in_bucket', lambda path: True)
  (folder / 'old').write_text('before')
  uploads = storage.BucketUploads(folder)
  for name in ('old', 'absent'):
    uploads.fetch(name)
  assert [path.name for path in uploads.local.iterdir()] == ['old']
  assert (uploads.local / 'old').read_text() == 'before'
  (uploads.local / 'a').mkdir()
  for text in ('one', 'one, two'):
    (uploads.local / 'a/grows').write_text(text)
    assert not (folder / 'a/grows').exists() or (
        folder / 'a/grows').read_text() != text
    uploads.push()
    assert (folder / 'a/grows').read_text() == text
  (folder / 'a/grows').unlink()
  uploads.push()
  assert not (folder / 'a/grows').exists()


# Root may write everywhere, so what is read-only is of the kernel.
@pytest.mark.parametrize('text, reason', [
    ('FOLDER/file', 'Not a directory'), ('FOLDER/file/a/b', 'Not a directory'),
    ('FOLDER/' + 300 * 'a', 'File name too long'),
    ('/proc/a/b', 'No such file|[Pp]ermission|[Rr]ead-only')])
def test_an_unusable_folder_is_refused(text, reason, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(RequestError, match=f'^--flag is .*({reason})'):
    storage.check_folder_is_writable(text.replace('FOLDER', str(tmp_path)),
                                     '--flag')


def test_what_is_tried_leaves_nothing(tmp_path):
  storage.check_folder_is_writable(tmp_path / 'a' / 'b')
  storage.checked_output_file(str(tmp_path / 'c' / 'd.json'), '--json')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('text', [
    '{"model_type": "gpt2"}', '{'])
def test_the_config_of_something_else_is_not_written_over(text, tmp_path):
  file = tmp_path / 'config.json'
  file.write_text(text)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(RequestError, match='whose config.json is not that of a '
                     'run .*: take another --workdir'):
    preflight.check_workdir_is_writable(storage.checked_path(tmp_path))
  assert file.read_text() == text
  with pytest.raises(RequestError, match='in the Hugging Face format, which '
                     '.* --folder' if 'model_type' in text else 'is damaged'):
    run_config.load_config(tmp_path)
  # Of a run that has begun it is damaged, which is said where it is read.
  (tmp_path / 'checkpoints/5').mkdir()
  preflight.check_workdir_is_writable(storage.checked_path(tmp_path))
  with pytest.raises(RequestError, match='config.json is damaged'):
    run_config.load_config(tmp_path)


@pytest.mark.parametrize('kind', ['sweep', 'study'])
def test_the_folder_of_a_sweep_or_study_is_refused(kind, tmp_path):
  (tmp_path / f'{kind}.json').write_text('{}')
  result = forked.run('train.py', '--config=configs/gpt.py',
                      f'--workdir={tmp_path}')
  assert result.returncode == 2
  assert result.stderr.splitlines()[-1] == (
      f"error: --workdir is '{tmp_path}', which holds a {kind} ({kind}.json): "
      'choose another folder')
  assert [path.name for path in tmp_path.iterdir()] == [f'{kind}.json']


@pytest.mark.parametrize('name', ['metrics.jsonl', 'config.json'])
def test_a_folder_in_the_place_of_a_file_is_refused(name, tmp_path):
  (tmp_path / name).mkdir()
  workdir = storage.checked_path(tmp_path)
  config = gpt.get_config('tiny')
  for begin in (lambda: preflight.check_workdir_is_writable(workdir),
                lambda: vectorised.train_group([config], [tmp_path])):
    with pytest.raises(RequestError, match=f'{name}., which is a folder'):
      begin()


def test_a_file_in_the_place_of_the_checkpoints_is_refused(tmp_path):
  (tmp_path / 'checkpoints').touch()
  with pytest.raises(RequestError, match='checkpoints.*nothing can be written'):
    preflight.check_workdir_is_writable(storage.checked_path(tmp_path))


def test_a_second_process_is_refused(tmp_path):
  with storage.lock_workdir(tmp_path):
    with pytest.raises(RequestError, match='another process trains in'):
      storage.lock_workdir(tmp_path)
  with storage.lock_workdir(tmp_path):
    pass


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
    assert [row['step'] for row in metrics.read_metrics(file)] == [1, 2]
  writer = make(tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run')
  with pytest.raises(EnvironmentFailure, match='run/.* deleted in mid-run'):
    writer.write(2, 'train', {'loss': 1.0})


def _write(folder):
  storage.write_file(storage.checked_path(folder / 'eval.json'), 'x' * 100)


def _tokens(folder):
  (folder / 'a.txt').write_text('All the tokens of this text. ' * 99)
  with files_of_at_most(1000):
    sources.load_or_tokenize(
        sources.parse_sources(f'text:{folder}/*.txt')[0][1],
        tokenizers.load('bytes'), str(folder / 'cache'))


def _picture(folder):
  matplotlib = pytest.importorskip('matplotlib.figure')
  storage.write_picture(storage.checked_path(folder / 'a.png'),
                        matplotlib.Figure())


@pytest.mark.parametrize('write, name', [
    (_write, 'eval.json'), (_picture, 'a.png'), (_tokens, 'cache/tokens'),
    (lambda folder: layout.save_with_checksum(
        folder / 'a.json', {'b': 'x' * 100}), 'a.json'),
    (lambda folder: layout.append_to_log(folder, 'x' * 100), 'log.txt')])
def test_what_else_a_run_writes(tmp_path, write, name):
  limit = contextlib.nullcontext() if write is _tokens else files_of_at_most(50)
  with limit, pytest.raises(EnvironmentFailure,
                            match=f'cannot write .*{name}.* too large'):
    write(tmp_path)
  assert name == 'log.txt' or not (tmp_path / name).is_file()
  assert not list(tmp_path.rglob('.writing-*'))


def test_a_write_that_nobody_waits_for_logs_no_full_disk(tmp_path, caplog):
  """asyncio logs it when the task of the write is thrown away."""
  full = ValueError('Failed to write 48036 bytes: File too large '
                    "[os_error_code='27']")
  with toy_run.open_store(tmp_path):
    logger = logging.getLogger('asyncio')
    logger.error('Task exception was never retrieved', exc_info=full)
    assert not caplog.records
    logger.error('a bug', exc_info=ValueError('a bug'))
    assert [record.message for record in caplog.records] == ['a bug']


def test_a_save_that_fails_says_what_the_run_goes_on_from(tmp_path, caplog):
  """By a sentence alone, and the same command does go on from there."""
  state = toy_run.born(4, 2)
  with toy_run.open_store(tmp_path) as store:
    toy_run.save(store, 10, state)
  # The limit stays until the store is closed: TensorStore's other threads still
  # write when one has failed.
  with pytest.raises(EnvironmentFailure) as failure, files_of_at_most(
      20_000), toy_run.open_store(tmp_path) as store:
    toy_run.save(store, 20, state)
    store.wait()
  assert str(failure.value) == (
      f'cannot write checkpoint 20 in {tmp_path}/checkpoints: File too large; '
      'once that is mended, the same command goes on')
  assert not [record for record in caplog.records if record.exc_info]
  # A new process would go on, in which those threads are no more.
  written = None
  while written != (written := sorted(tmp_path.rglob('*'))):
    time.sleep(.5)
  with toy_run.open_store(tmp_path) as store:
    restored = toy_run.resume(store, toy_run.abstract(4, 2))
    assert (restored.step, restored.damaged) == (10, ())
    assert toy_run.save(store, 20, restored.state)


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
    (OSError(28, 'No space left on device'), 'No space left on device')])
def test_the_environment_fails(error, reason):
  with pytest.raises(EnvironmentFailure, match='cannot write /r: ') as failure:
    with storage.explain_write_failures('/r'):
      try:
        raise error
      except type(error) as inner:
        raise RuntimeError('Orbax wraps it') from inner
  assert str(failure.value).startswith(f'cannot write /r: {reason}; once ')


@pytest.mark.parametrize('what', ['device', 'pipe', 'folder', 'sparse'])
def test_a_file_of_json_that_has_no_end_is_not_read(what, tmp_path):
  file = tmp_path / 'config.json'
  if what == 'device':
    file.symlink_to('/dev/zero')
  elif what == 'pipe':
    os.mkfifo(file)
  elif what == 'folder':
    file.mkdir()
  else:
    with open(file, 'wb') as sparse:
      sparse.truncate(1 << 40)
  (tmp_path / 'checkpoints/1').mkdir(parents=True)
  for read in (
      lambda: run_config.load_config(epath.Path(tmp_path)),
      lambda: hf_config.load_config_json(tmp_path),
      lambda: storage.read_json(file)):
    with pytest.raises(RequestError, match='config.json (is|has)'):
      read()
  assert not storage.has_config(tmp_path)


@pytest.mark.parametrize('text, words', [
    ('', 'it is damaged, and is no JSON'), ('{"a": 1', 'is no JSON'),
    ('[' * 10**5, 'is no JSON'), ('[1]', 'it is damaged: it is'),
    ('{}', "it is damaged: its 'a' is"), ('{"a": "1"}', "its 'a' is '1'")])
def test_what_is_no_object_of_these_fields_is_refused(text, words):
  assert storage.parse_json_object('{"a": 1}', 'it', dict(a=int)) == {'a': 1}
  with pytest.raises(RequestError) as refusal:
    storage.parse_json_object(text, 'it', dict(a=int))
  assert words in str(refusal.value), str(refusal.value)
