"""A workdir in a bucket: what train.py writes on disk, it writes there."""

import json
import signal
import subprocess
import sys

import pytest

from tests import train_test
from training.workdir import metrics, storage

texts = train_test.texts


@pytest.mark.parametrize('text, parts', [
    ('s3://bucket/a', ['s3://', 'gs://BUCKET/NAME']),
    ('fake://a', ['fake://']),
    ('gs://', ['no folder of a bucket']),
    ('gs:///', ['no folder of a bucket']),
    ('gs://bucket/', ['no folder of a bucket', 'gs://BUCKET/NAME']),
])
def test_what_is_no_place_is_refused(text, parts):
  with pytest.raises(ValueError) as error:
    storage.path(text)
  assert all(part in str(error.value) for part in ['--workdir', *parts])


def test_a_bucket_needs_gcsfs(monkeypatch):
  monkeypatch.setattr(storage.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"init_from is 'gs://a/b'.*\[gcs\]"):
    storage.path('gs://a/b', 'init_from')
  assert str(storage.path('runs/a')) == 'runs/a'


@pytest.mark.slow
def test_programs_refuse_an_unknown_scheme(tmp_path):
  for program, *words in (['train.py', '--config=configs/gpt.py'], ['eval.py']):
    error = train_test.run([sys.executable, program, *words,
                            '--workdir=ftp://a/b'], code=2).stderr
    assert error.startswith("error: --workdir is 'ftp://a/b'")
    assert len(error.splitlines()) == 1


def test_a_file_is_written_whole(tmp_path):
  file = tmp_path / 'a/b.json'
  storage.write(storage.path(file), 'one')
  storage.write(storage.path(file), 'two')
  assert file.read_text() == 'two' and list(file.parent.iterdir()) == [file]


def test_figures_are_uploaded_once_a_minute_and_before_a_checkpoint():
  pushed = []
  class Uploads:
    def push(self):
      pushed.append(now[0])
  now = [0]
  writer = metrics.UploadWriter(Uploads(), clock=lambda: now[0])
  for now[0] in range(1, 200):
    writer.write(now[0], 'train', {})
    if now[0] == 70:
      writer.flush()
  assert pushed == [60, 70, 130, 190]


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
  words = train_test.command('gs://bucket/runs/a', texts)[2:] + [
      '--config.log.tensorboard=True']
  run = tmp_path / 'bucket/runs/a'
  in_bucket(tmp_path, 'tools.verify_resume.worker', '5', *words,
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
  found, expected = (json.loads(path.read_text()) for path in (
      tmp_path / 'bucket/eval.json', tmp_path / 'eval.json'))
  assert found == expected
  # Nothing went to a local folder of that name.
  assert not (train_test.ROOT / 'gs:').exists()
  assert sorted(p.name for p in run.iterdir()) == [
      'checkpoints', 'config.json', 'metrics.jsonl', 'profile', 'tensorboard']
