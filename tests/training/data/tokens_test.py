"""Tokens on disk: the same whoever makes them, and however often that is
killed; read as the text itself; what is wrong with them is named."""

import grp
import json
import os
import pathlib
import pwd
import random
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from common.errors import EnvironmentFailure, RequestError
from configs import base
from tools import tokenize as command
from training.data import sources, tokenizers, tokens
from training.objectives import pipeline

ROOT = pathlib.Path(__file__).parents[3]
BYTES = tokenizers.load('bytes')
EOS = BYTES.eos_id


def make_corpus(folder):
  """Writes seven files of JSON lines, whose texts are of no token to many
  blocks."""
  rng = random.Random(0)
  for i in range(7):
    texts = [''.join(rng.choices('abcdefgh \n', k=rng.choice(
        [0, 1, 5, 300, 700, 3000, 20_000])))
             for _ in range(rng.randint(3, 25))] + ['end']
    (folder / f'{i}.jsonl').write_text('\n'.join(
        json.dumps({'text': text}) for text in texts))
  return folder


def spec_of(corpus):
  return f'jsonl:{corpus}/*.jsonl:text'


def tokenize(corpus, out, *words):
  """Runs the command in this process; returns the exit code."""
  return command.main([spec_of(corpus), '--out', str(out), *words])


def contents(folder):
  return {str(path.relative_to(folder)): path.read_bytes()
          for path in sorted(folder.rglob('*')) if path.is_file()}


def config_of(corpus, folder, source='', **fields):
  config = base.base()
  config.objective = fields.pop('objective', 'causal')
  config.eval.part = fields.pop('part', '')
  config.seed = fields.pop('seed', 3)
  config.data.update(dict(
      source=source or spec_of(corpus), cache_dir=str(folder / 'cache'),
      length=96, batch_size=6, holdout_every=4) | fields)
  return config


def loaders(config):
  return [pipeline.make_training_loader(config, BYTES),
          *pipeline.make_evaluation_loaders(config, BYTES)]


def assert_same(ours, theirs, batches=12):
  assert len(ours) == len(theirs)
  for one, two in zip(ours, theirs):
    assert (one.num_windows, one.num_tokens, one.num_bytes) == (
        two.num_windows, two.num_tokens, two.num_bytes)
    for n in range(min(batches, one.num_batches)):
      a, b = one.batch(n), two.batch(n)
      assert a.keys() == b.keys()
      for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return make_corpus(tmp_path_factory.mktemp('corpus'))


@pytest.fixture
def small(monkeypatch):
  """Blocks and shards of a size at which there are many."""
  monkeypatch.setattr(tokens, 'BLOCK_BYTES', 1024)
  real = sources.plan_shards
  monkeypatch.setattr(sources, 'plan_shards', lambda source, size=0: real(
      source, 100_000))


@pytest.fixture
def shards(corpus, tmp_path, small):
  assert tokenize(corpus, tmp_path / 'shards') == 0
  return tmp_path / 'shards'


def entry(spec, folder, tokenizer=BYTES):
  """Returns the cache's folder of a source, and its tokens."""
  (_, source), = sources.parse_sources(spec)
  entry = sources.load_or_tokenize(source, tokenizer, str(folder / 'cache'))
  return pathlib.Path(entry.folder), entry


# Read.


@pytest.mark.parametrize('fields', [
    {}, {'part': 'first'}, {'eval_source': True, 'part': 'second'},
    {'holdout_every': 5, 'objective': 'mlm_nsp'}], ids=str)
def test_batches_are_those_of_the_text(fields, corpus, shards):
  spec, ours, theirs = f'tokens:{shards}', fields.copy(), fields.copy()
  if 'eval_source' in fields:
    ours['eval_source'], theirs['eval_source'] = spec, spec_of(corpus)
  assert_same(loaders(config_of(corpus, shards.parent, spec, **ours)),
              loaders(config_of(corpus, shards.parent, **theirs)))


def test_every_token_stands_where_the_text_has_it(corpus, shards):
  """All windows, in order, of each of the sets that a run may read."""
  (_, source), = sources.parse_sources(spec_of(corpus))
  texts = list(source.documents())
  read = tokens.load_tokens(str(shards), 'it')
  assert read.begun['shards'] > 3
  for every in (None, 4, 3):
    for split, part in (('train', ''), ('eval', ''), ('eval', 'first'),
                        ('eval', 'second')):
      chosen = tokens.select_documents(np.arange(len(texts)), every, split,
                                       part)
      kept = [text for text, is_in in zip(texts, chosen) if is_in]
      stream = np.array([EOS, *(i for text in kept
                                for i in (*text.encode(), EOS))])
      again = tokens.Split(read, every, split, part, EOS)
      assert again.documents == len(kept)
      assert again.num_documents_of_folder == len(texts)
      assert again.num_tokens == len(stream) - 1
      assert again.num_bytes == sum(map(len, kept))
      documents = tokens.Documents(again)
      for [(_, ids)], text in zip(documents, kept, strict=True):
        assert bytes(ids.tolist()) == text.encode()
      for first in range(0, len(stream), 1111):
        row = np.full(1112, EOS, np.int32)
        again.fill(row, first)
        expected = stream[first:first + 1112]
        np.testing.assert_array_equal(row[:len(expected)], expected)


@pytest.mark.parametrize('every', [None, 1, 3])
def test_the_parts_of_held_out_documents_take_turns(every):
  numbers = np.arange(24)
  held_out = numbers[tokens.select_documents(numbers, every, 'eval')]
  for i, part in enumerate(('first', 'second')):
    chosen = tokens.select_documents(numbers, every, 'eval', part)
    assert numbers[chosen].tolist() == held_out[i::2].tolist()
    # Training reads no part, and nothing that is held out.
    trained = tokens.select_documents(numbers, every, 'train', part)
    assert trained.all() if every is None else not trained[held_out].any()


def test_documents_of_parts_and_wide_ids(tmp_path):
  class Wide(tokenizers.Bytes):
    """Bytes in a vocabulary that needs 32 bits."""

    def __init__(self):
      super().__init__()
      self.vocab_size, self.fingerprint = 70_000, 'wide'

    def encode_batch(self, texts):
      return [ids + 69_000 for ids in super().encode_batch(texts)]

  (tmp_path / 'p.tsv').write_text('ab\tcde\n\tf\r\n' * 2)
  _, cached = entry(f'parallel:{tmp_path}/p.tsv', tmp_path, Wide())
  documents = tokens.Documents(tokens.Split(cached, 2, 'train', '', 0))
  (source, ids), (target, more) = documents[0]
  assert (source, target, len(documents)) == ('source', 'target', 2)
  assert (len(ids), (more - 69_000).tolist()) == (0, [*b'f'])


# Made, killed, and gone on with.


def test_the_cache_is_a_folder_of_shards(corpus, shards):
  path, _ = entry(spec_of(corpus), shards.parent)
  ours, theirs = contents(path), contents(shards)
  assert ours.keys() - {'.lock'} == theirs.keys()
  for name in theirs.keys() - {'begun.json'}:
    assert ours[name] == theirs[name]


def test_jobs_make_what_one_makes(corpus, shards, capsys, monkeypatch):
  other = shards.parent / 'other'
  assert tokenize(corpus, other, '--jobs=2', '--job=1') == 0
  with pytest.raises(RequestError, match=r'half finished, \d of \d shards: giv'
                     'e the command that made it again, with --out='):
    sources.parse_sources(f'tokens:{other}')
  monkeypatch.setenv('SLURM_ARRAY_TASK_ID', '0')
  assert tokenize(corpus, other, '--jobs=2') == 0
  assert contents(other) == contents(shards)
  capsys.readouterr()
  tokenize(corpus, other, '--json')
  figures = json.loads(capsys.readouterr().out)
  (_, source), = sources.parse_sources(spec_of(corpus))
  texts = list(source.documents())
  size = sum(map(len, texts))  # of bytes, each of which is a token
  assert (figures['documents'], figures['bytes'], figures['tokens']) == (
      len(texts), size, size)


@pytest.mark.slow
def test_what_was_killed_goes_on_and_of_two_processes_one_reads(tmp_path):
  for i in range(3):
    (tmp_path / f'{i}.txt').write_text(f'{i} and so on. ' * 9_000)
  program = textwrap.dedent(f"""
      import sys
      from training.data import sources, tokenizers, tokens
      plan, shard = sources.plan_shards, sources.write_shard
      sources.plan_shards = lambda source: plan(source, 1)
      def slow(*args, **kwargs):
        made = shard(*args, **kwargs)
        print('made', flush=True)
        sys.argv[1:] and __import__('time').sleep(60)
        return made
      sources.write_shard = slow
      (_, source), = sources.parse_sources('text:{tmp_path}/*.txt')
      sources.load_or_tokenize(source, tokenizers.load('bytes'),
                               '{tmp_path}/cache')
      """)
  start = lambda *words: subprocess.Popen(
      [sys.executable, '-c', program, *words], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  run = start('slow')
  assert run.stdout.readline() == 'made\n'
  run.send_signal(signal.SIGKILL)
  run.communicate()
  runs = [start(), start()]
  outputs = [run.communicate(timeout=100) for run in runs]
  assert [run.returncode for run in runs] == [0, 0], outputs
  assert sorted(out.count('made') for out, _ in outputs) == [0, 2]


@pytest.mark.slow
def test_a_bucket_has_the_same_batches(corpus, tmp_path):
  """gs:// in a folder of this machine, see tests/helpers/bucket.py."""
  program = f"""
import pathlib
from tests.helpers import bucket
bucket.install({str(tmp_path)!r})
from tests.training.data import tokens_test as t
corpus, folder = map(pathlib.Path, ({str(corpus)!r}, {str(tmp_path)!r}))
assert t.tokenize(corpus, 'gs://bucket/c') == 0
t.assert_same(t.loaders(t.config_of(corpus, folder, 'tokens:gs://bucket/c')),
              t.loaders(t.config_of(corpus, folder)))
print('the same')
"""
  run = subprocess.run([sys.executable, '-c', program], cwd=ROOT, text=True,
                       capture_output=True, check=False)
  assert run.stdout.endswith('the same\n'), run.stderr


def test_an_entry_is_keyed_by_files_and_tokenizer(tmp_path, monkeypatch):
  for i in range(3):
    (tmp_path / f'{i}.txt').write_text(f'text {i}')
  spec = f'text:{tmp_path}/*.txt'
  path, _ = entry(spec, tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(sources, 'write_shard', None)  # nothing is tokenised again
    assert entry(spec, tmp_path)[0] == path
  assert entry(spec, tmp_path, tokenizers.load('bytes:64'))[0] != path
  (tmp_path / '0.txt').write_text('changed')
  assert entry(spec, tmp_path)[0] != path


# What is wrong is named.


@pytest.mark.parametrize('mode, of_folders, of_files', [
    (0o777, 0o777, 0o666), (0o770, 0o770, 0o660), (0o755, 0o700, 0o600)])
def test_a_cache_serves_whoever_may_write_in_its_folder(
    mode, of_folders, of_files, corpus, tmp_path):
  """And where its first user alone may, what is made is that user's."""
  (_, source), = sources.parse_sources(spec_of(corpus))
  cache = tmp_path / 'cache'
  cache.mkdir()
  cache.chmod(mode)
  usual = os.umask(0o077)
  try:
    sources.load_or_tokenize(source, BYTES, str(cache))
  finally:
    assert os.umask(usual) == 0o077
  made = [*cache.rglob('*')]
  assert len(made) > 4
  for path in made:
    wanted = of_files if path.is_file() else of_folders
    assert path.stat().st_mode & 0o777 == wanted, path


def test_the_owner_of_tokens_needs_no_name(corpus, tmp_path, monkeypatch):
  """A container may run by the number of a user whom it does not know."""
  def unknown(number):
    raise KeyError(f'uid not found: {number}')

  monkeypatch.setattr(pwd, 'getpwuid', unknown)
  monkeypatch.setattr(grp, 'getgrgid', unknown)
  loaders(config_of(corpus, tmp_path))[0].batch(0)
  tokenize(corpus, tmp_path / 'out')
  loaders(config_of(corpus, tmp_path, f'tokens:{tmp_path}/out'))[0].batch(0)


def test_a_missing_shard_is_named_and_made_again(corpus, shards):
  before = contents(shards)
  config = config_of(corpus, shards.parent, f'tokens:{shards}')
  os.truncate(shards / '00001.tokens', 1000)
  for error, words in ((EnvironmentFailure, '00001.tokens is damaged'),
                       (RequestError, 'is half finished')):
    with pytest.raises(error, match=words):
      pipeline.make_training_loader(config, BYTES)
    (shards / '00001.tokens').unlink(missing_ok=True)
  assert tokenize(corpus, shards) == 0
  assert contents(shards) == before


def test_shards_that_are_cut_short_under_a_run_are_named(corpus, shards):
  """A map of a file that has become shorter would end the process."""
  source = tokens.load_tokens(str(shards), 'tokens')
  for i, table in enumerate(source.tables()):
    os.truncate(shards / f'{i:05}.tokens', 0)
    if size := int(table.sizes.sum()):
      with pytest.raises(EnvironmentFailure, match=f'{i:05}.tokens is damaged'):
        source.read(i, 0, size)


@pytest.mark.parametrize('name', ['00001.tokens', '00001.table', 'begun.json'])
def test_a_file_that_was_spoilt_is_seen(name, corpus, shards):
  config = config_of(corpus, shards.parent, f'tokens:{shards}')
  data = (shards / name).read_bytes()
  spoilt = [b'', bytes(4), bytes(len(data)), data[:len(data) // 2]]
  for at in range(0, len(data), len(data) // 3):
    flipped = bytearray(data)
    flipped[at] ^= 64
    spoilt.append(bytes(flipped))
  for content in spoilt:
    (shards / name).write_bytes(content)
    with pytest.raises(EnvironmentFailure,
                       match=f'{name} is damaged.*delete it'):
      for loader in loaders(config):
        for n in range(loader.num_batches):
          loader.batch(n)


def test_wrong_requests_are_sentences(corpus, shards, tmp_path):
  spec = f'tokens:{shards}'
  with pytest.raises(RequestError, match="with 'bytes', 384 ids, and "
                     "data.tokenizer is 'bytes:64'"):
    pipeline.make_training_loader(config_of(corpus, tmp_path, spec),
                                  tokenizers.load('bytes:64'))
  for fields, words in (
      ({'objective': 'chat'}, "'chat' reads conversations"),
      ({'source': f'tokens:{corpus}'}, 'is no folder that tools.tokenize')):
    with pytest.raises(RequestError, match=words):
      pipeline.check_sources(
          config_of(corpus, tmp_path, **({'source': spec} | fields)))
  talks = tmp_path / 'talks.jsonl'
  talks.write_text(json.dumps({'m': [
      {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}
      ]}))
  for source, words, part in (
      (spec_of(corpus), ['--tokenizer=bytes:64'], "'bytes:64' is another one"),
      (spec_of(corpus), ['--shard_mib=0'], '--shard_mib is 0'),
      (f'jsonl:{corpus}/0.jsonl:text', [], 'has other files'),
      ('probe:copy', [], 'holds rows of a probe'),
      (f'0.5*{spec_of(corpus)},0.5*sotu', [], 'is a mixture')):
    with pytest.raises(RequestError, match=part):
      command.main([source, '--out', str(shards), *words])
  with pytest.raises(RequestError, match='holds conversations'):
    command.main([f'jsonl:{talks}:m', '--out', str(tmp_path / 'x')])
