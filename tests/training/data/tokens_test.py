"""Tokens on disk: the same whoever makes them, and however often that is
killed; read as the text itself; what is wrong with them is named."""

import json
import os
import pathlib
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from configs.errors import EnvironmentFailure, RequestError
from tests.helpers.shards import BYTES, assert_same, config_of, loaders, spec_of
from tests.helpers.shards import contents, make_corpus, tokenize
from tools import tokenize as command
from training.data import holdout, pipeline, sources, token_cache, tokenising
from training.data import tokenizers, tokens

ROOT = pathlib.Path(__file__).parents[3]
EOS = BYTES.eos_id


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return make_corpus(tmp_path_factory.mktemp('corpus'))


@pytest.fixture
def small(monkeypatch):
  """Blocks and shards of a size at which there are many."""
  monkeypatch.setattr(tokens, 'BLOCK_BYTES', 1024)
  real = tokenising.plan
  monkeypatch.setattr(tokenising, 'plan', lambda source, every, size=0: real(
      source, every, 100_000))


@pytest.fixture
def shards(corpus, tmp_path, small):
  assert tokenize(corpus, tmp_path / 'shards') == 0
  return tmp_path / 'shards'


def entry(spec, folder, tokenizer=BYTES):
  """Returns the cache's folder of a source, and its tokens."""
  (_, source), = sources.parse(spec)
  found = token_cache.cached(source, tokenizer, str(folder / 'cache'), 4)
  return pathlib.Path(found.index.folder), found


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
  (_, source), = sources.parse(spec_of(corpus))
  texts = list(source.documents())
  read = tokens.Tokens(tokens.load(str(shards), 'it'))
  assert len(read.index.shards) > 3
  for every in (None, 4, 3):
    for split, part in (('train', ''), ('eval', ''), ('eval', 'first'),
                        ('eval', 'second')):
      chosen = holdout.chosen(np.arange(len(texts)), every, split, part)
      kept = [text for text, own in zip(texts, chosen) if own]
      stream = np.array([EOS, *(i for text in kept
                                for i in (*text.encode(), EOS))])
      found = pickle.loads(pickle.dumps(
          tokens.Split(read, every, split, part, EOS)))
      assert (found.documents, found.of) == (len(kept), len(texts))
      assert found.num_tokens == len(stream) - 1
      assert found.num_bytes == sum(map(len, kept))
      for first in range(0, len(stream), 1111):
        row = np.full(1112, EOS, np.int32)
        found.fill(row, first)
        expected = stream[first:first + 1112]
        np.testing.assert_array_equal(row[:len(expected)], expected)


def test_held_out_is_the_first_of_every_n():
  numbers = np.arange(10)
  for (every, split, part), expected in {
      (3, 'eval', ''): [0, 3, 6, 9], (3, 'eval', 'first'): [0, 6],
      (3, 'eval', 'second'): [3, 9], (3, 'train', 'first'): [1, 2, 4, 5, 7, 8],
      (0, 'eval', ''): [], (0, 'train', ''): [*range(10)],
      (None, 'eval', 'second'): [1, 3, 5, 7, 9]}.items():
    chosen = holdout.chosen(numbers, every, split, part)
    assert np.flatnonzero(chosen).tolist() == expected


def test_documents_of_parts_and_wide_ids(tmp_path):
  class Wide(tokenizers.Bytes):
    """Bytes in a vocabulary that needs 32 bits."""

    def __init__(self):
      super().__init__()
      self.vocab_size, self.fingerprint = 70_000, 'wide'

    def encode_batch(self, texts):
      return [ids + 69_000 for ids in super().encode_batch(texts)]

  (tmp_path / 'p.tsv').write_text('ab\tcde\n\tf\n' * 2)
  _, found = entry(f'parallel:{tmp_path}/p.tsv', tmp_path, Wide())
  documents = tokens.Documents(tokens.Split(found, 2, 'train', '', 0))
  (source, ids), (target, more) = documents[0]
  assert (source, target, len(documents)) == ('source', 'target', 2)
  assert (len(ids), (more - 69_000).tolist()) == (0, [*b'f'])


# Made, killed, and gone on with.


def test_the_cache_is_a_folder_of_shards(corpus, shards):
  path, _ = entry(spec_of(corpus), shards.parent)
  ours, theirs = contents(path), contents(shards)
  assert ours.keys() == theirs.keys()
  for name in ours.keys() - {'begun.json', 'index.json'}:
    assert ours[name] == theirs[name]


def test_jobs_make_what_one_makes(corpus, shards, capsys, monkeypatch):
  other = shards.parent / 'other'
  assert tokenize(corpus, other, '--jobs=2', '--job=1') == 0
  assert 'the job that ends last' in capsys.readouterr().out
  with pytest.raises(RequestError, match=r'half finished, \d of \d shards: go '
                     'on with python -m tools.tokenize .*--out') as refused:
    sources.parse(f'tokens:{other}')
  told = shlex.split(str(refused.value).partition(' python -m ')[2])
  assert told[0] == 'tools.tokenize'
  monkeypatch.setenv('SLURM_ARRAY_TASK_ID', '0')
  assert tokenize(corpus, other, '--jobs=2') == 0
  assert contents(other) == contents(shards)
  assert not any(path.name.startswith('.') for path in other.iterdir())
  # A job of several processes has the shards that it would have alone.
  sizes = [*range(24)]
  for jobs, job, processes in ((2, 0, 2), (2, 1, 3)):
    assert sorted(command.of_job(sizes, job, jobs)) == sorted(
        i for k in range(processes)
        for i in command.of_job(sizes, job + k * jobs, jobs * processes))


@pytest.mark.slow
def test_what_was_killed_goes_on_and_of_two_processes_one_reads(tmp_path):
  for i in range(3):
    (tmp_path / f'{i}.txt').write_text(f'{i} and so on. ' * 9_000)
  program = textwrap.dedent(f"""
      import sys
      from training.data import sources, token_cache, tokenising, tokenizers
      plan, shard = tokenising.plan, tokenising.shard
      tokenising.plan = lambda source, every: plan(source, every, 1)
      def slow(*args, **kwargs):
        made = shard(*args, **kwargs)
        print('made', flush=True)
        sys.argv[1:] and __import__('time').sleep(60)
        return made
      tokenising.shard = slow
      (_, source), = sources.parse('text:{tmp_path}/*.txt')
      token_cache.cached(source, tokenizers.load('bytes'),
                         '{tmp_path}/cache', 4)
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


@pytest.mark.slow
def test_a_bucket_has_the_same_batches(corpus, tmp_path):
  """gs:// in a folder of this machine, see tests/helpers/bucket.py."""
  program = f"""
import pathlib
from tests.helpers import bucket
bucket.install({str(tmp_path)!r})
from tests.helpers import shards as t
corpus, folder = map(pathlib.Path, ({str(corpus)!r}, {str(tmp_path)!r}))
assert t.tokenize(corpus, 'gs://bucket/c') == 0
assert t.command.main(['--verify', '--out', 'gs://bucket/c']) == 0
t.assert_same(t.loaders(t.config_of(corpus, folder, 'tokens:gs://bucket/c')),
              t.loaders(t.config_of(corpus, folder)))
print('the same')
"""
  run = subprocess.run([sys.executable, '-c', program], cwd=ROOT, text=True,
                       capture_output=True, check=False)
  assert run.stdout.endswith('the same\n'), run.stderr


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_streamed(corpus, tmp_path, monkeypatch):
  datasets = pytest.importorskip('datasets')
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'hub')
  out = tmp_path / 'shards'
  assert command.main([f'hf:{corpus}', '--out', str(out)]) == 0
  assert len(tokens.load(str(out), 'it').shards) == 7
  assert_same(loaders(config_of(corpus, tmp_path, f'tokens:{out}')),
              loaders(config_of(corpus, tmp_path)))


def test_each_job_of_slurm_is_told_which_it_is(capsys):
  words = ['hf:a b:en$(x)', '--out', 'gs://bucket/c', '--jobs=5',
           '--processes=0', '--launcher=slurm', '--dry_run']
  assert command.main(words) == 0
  line = shlex.split(capsys.readouterr().out.partition(': ')[2])
  assert line[:4] == [sys.executable, '-m', 'tools.tokenize', 'hf:a b:en$(x)']
  args = command._parser().parse_args(line[3:])
  assert (args.processes, args.jobs, args.job, args.launcher) == (
      0, 5, 0, 'here')


def test_an_entry_is_keyed_by_content_and_tokenizer(tmp_path, monkeypatch):
  (tmp_path / 'a').mkdir()
  for i in range(3):
    (tmp_path / 'a' / f'{i}.txt').write_text(f'text {i}')
  path, _ = entry(f'text:{tmp_path}/a/*.txt', tmp_path)
  os.utime(tmp_path / 'a' / '0.txt')  # another time, the same content
  (tmp_path / 'a').rename(tmp_path / 'b')
  spec = f'text:{tmp_path}/b/*.txt'
  with monkeypatch.context() as patch:
    patch.setattr(tokenising, 'shard', None)  # nothing is tokenised again
    assert entry(spec, tmp_path)[0] == path
    manifest = next((tmp_path / 'cache' / 'manifests').iterdir())
    manifest.write_text(manifest.read_text()[:20])  # torn
    assert entry(spec, tmp_path)[0] == path
  assert entry(spec, tmp_path, tokenizers.load('bytes:64'))[0] != path
  (tmp_path / 'b' / '0.txt').write_text('changed')
  assert entry(spec, tmp_path)[0] != path


# What is wrong is named.


def test_a_missing_shard_is_named_and_made_again(corpus, shards):
  before = contents(shards)
  config = config_of(corpus, shards.parent, f'tokens:{shards}')
  for spoil in (os.unlink, lambda path: os.truncate(path, 1000)):
    spoil(shards / '00001.tokens')
    with pytest.raises(EnvironmentFailure, match='00001.tokens is '
                       '(missing|damaged).*the command that made'):
      pipeline.training_loader(config, BYTES)
    assert tokenize(corpus, shards) == 0
    assert contents(shards) == before


@pytest.mark.parametrize('name', ['00001.tokens', '00001.npz'])
def test_a_flipped_bit_is_seen(name, corpus, shards):
  config = config_of(corpus, shards.parent, f'tokens:{shards}')
  data = (shards / name).read_bytes()
  for at in range(40, len(data), len(data) // 3):
    spoilt = bytearray(data)
    spoilt[at] ^= 64
    (shards / name).write_bytes(spoilt)
    for read in (lambda: command.main(['--verify', '--out', str(shards)]),
                 lambda: [loader.batch(n) for loader in loaders(config)
                          for n in range(loader.num_batches)]):
      with pytest.raises(EnvironmentFailure,
                         match=f'{name} is damaged.*delete it'):
        read()
  (shards / name).write_bytes(data)
  assert command.main(['--verify', '--out', str(shards)]) == 0


def test_a_disk_that_fails_is_a_sentence(shards, monkeypatch):
  def refused(*_):
    raise TimeoutError(110, 'Connection timed out')

  monkeypatch.setattr(os, 'pread', refused)
  with pytest.raises(EnvironmentFailure,
                     match='00000.tokens cannot be read: Connection'):
    tokens.read_bytes(f'{shards}/00000.tokens', 0, 10)


def test_a_refused_source_leaves_nothing_begun(tmp_path):
  """Which would refuse the corrected one."""
  for name, text in zip('ab', ('{"text": "a"}', '{"txt": "b"}')):
    (tmp_path / f'{name}.jsonl').write_text(text)
  words = [f'jsonl:{tmp_path}/*.jsonl:text', '--out', str(tmp_path / 'x')]
  with pytest.raises(RequestError, match="no field 'te"):
    command.main(words)
  (tmp_path / 'b.jsonl').write_text('{"text": "end"}')
  assert command.main(words) == 0
  shutil.copy(tmp_path / 'a.jsonl', tmp_path / 'c.jsonl')
  with pytest.raises(RequestError, match='has other files or is cut'):
    command.main(words)


def test_wrong_requests_are_sentences(corpus, shards, tmp_path):
  spec = f'tokens:{shards}'
  with pytest.raises(RequestError, match="with 'bytes', 384 ids, and "
                     "data.tokenizer is 'bytes:64'"):
    pipeline.training_loader(config_of(corpus, tmp_path, spec),
                             tokenizers.load('bytes:64'))
  for fields, words in (
      ({'objective': 'chat'}, "'chat' reads conversations"),
      ({'objective': 'classification'}, 'reads labelled texts'),
      ({'source': 'tokens:'}, 'names no folder'),
      ({'source': f'tokens:{corpus}'}, 'is no folder that tools.tokenize')):
    wrong = config_of(corpus, tmp_path, **({'source': spec} | fields))
    with pytest.raises(RequestError, match=words):
      pipeline.check_sources(wrong)
      pipeline.training_loader(wrong, BYTES)
  with pytest.raises(RequestError, match='holds tokens, and text is read'):
    list(sources.parse(spec)[0][1].documents())
  talks = tmp_path / 'talks.jsonl'
  talks.write_text(json.dumps({'m': [
      {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}
      ]}))
  for source, words, part in (
      (spec_of(corpus), ['--tokenizer=bytes:64'], "begun with the tokenizer"),
      (spec_of(corpus), ['--holdout_every=-1'], '--holdout_every is -1'),
      (spec_of(corpus), ['--jobs=3'], '--jobs is 3, and nothing says'),
      (spec_of(corpus), ['--jobs=3', '--job=3'], '--job is 3, and --jobs is'),
      (spec_of(corpus), ['--dry_run'], 'are for --launcher=slurm'),
      ('', [], 'pass the source'), ('probe:copy', [], 'holds no plain text'),
      (f'text:{corpus}/0.jsonl', [], 'is one file, and so one document'),
      (f'0.5*{spec_of(corpus)},0.5*sotu', [], 'is a mixture'),
      (f'jsonl:{talks}:m', ['--out', str(tmp_path / 'x')],
       'holds pairs or conversations')):
    with pytest.raises(RequestError, match=part):
      command.main([source, '--out', str(shards), *words])
