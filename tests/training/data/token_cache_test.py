"""The token cache: each source is tokenised once, whole or not at all."""

import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from configs.errors import EnvironmentFailure
from training.data import sources, token_cache, token_workers, tokenizers

ROOT = pathlib.Path(__file__).parents[3]
BYTES = tokenizers.load('bytes')


def text_of(i):
  return ''.join(chr(97 + (7 * i + k * k) % 26) for k in range(20 + 10 * i))


@pytest.fixture
def folder(tmp_path):
  """A folder of 12 documents of 20 to 130 bytes, and an empty cache."""
  (tmp_path / 'a').mkdir()
  for i in range(12):
    (tmp_path / 'a' / f'{i:02}.txt').write_text(text_of(i))
  return tmp_path


def cached(folder, tokenizer=BYTES, workers=1, pattern='a/*.txt'):
  [(_, source)] = sources.parse(f'text:{folder}/{pattern}')
  return token_cache.cached_tokens(
      source, tokenizer, str(folder / 'cache'), workers)


def test_cache_holds_every_document(folder):
  cache = cached(folder)
  assert len(cache) == 12 and cache.tokens.dtype == np.uint16
  for i in range(12):
    text = text_of(i)
    assert BYTES.decode(cache.document(i)) == text
    assert cache.num_bytes[i] == len(text)
  [(kind, ids)] = cache.document_parts(3)
  assert kind == 'text' and ids.tolist() == cache.document(3).tolist()


def test_entry_is_keyed_by_content_and_tokenizer(folder, monkeypatch):
  first = cached(folder).path
  os.utime(folder / 'a' / '00.txt')  # Another time, the same content.
  (folder / 'a').rename(folder / 'b')  # Another place.
  with monkeypatch.context() as patch:
    patch.setattr(token_cache, '_write', None)  # Nothing is tokenised again.
    assert cached(folder, pattern='b/*.txt').path == first
  (folder / 'b' / '03.txt').write_text('changed')
  changed = cached(folder, pattern='b/*.txt')
  assert changed.path != first
  assert BYTES.decode(changed.document(3)) == 'changed'


class Wide(tokenizers.Bytes):
  """Bytes in a vocabulary that needs 32 bits."""

  def __init__(self):
    super().__init__()
    self.vocab_size, self.fingerprint = 70_000, 'wide'

  def encode_batch(self, texts):
    return [ids + 69_000 for ids in super().encode_batch(texts)]


def test_large_vocabularies_take_four_bytes(folder):
  cache = cached(folder, Wide())
  assert cache.tokens.dtype == np.uint32 and cache.tokens.min() > 69_000
  assert cache.path != cached(folder).path


def test_documents_of_parts(folder):
  pair = [('source', 'ab'), ('target', 'cde')]
  source = sources.Source(
      'pairs', 'pairs', (), lambda _: iter([pair, pair]), content='1')
  cache = token_cache.cached_tokens(source, BYTES, str(folder / 'cache'), 1)
  assert [(kind, BYTES.decode(ids)) for kind, ids
          in cache.document_parts(1)] == pair
  assert len(cache) == 2 and cache.num_bytes.tolist() == [2, 3, 2, 3]


def test_worker_processes_write_the_same_entry(folder, monkeypatch):
  monkeypatch.setattr(token_cache, 'CHUNK_CHARS', 100)
  alone = cached(folder)
  kept = {path.name: path.read_bytes() for path in alone.path.iterdir()}
  alone.path.rename(folder / 'away')
  together = cached(folder, workers=2)
  assert kept == {path.name: path.read_bytes()
                  for path in together.path.iterdir()}


def test_a_failing_worker_is_heard():
  broken = Wide()
  broken.name = 'none.json'  # Which its workers cannot load.
  with pytest.raises(RuntimeError, match='ended early'):
    list(token_workers.encode_chunks(broken, [['a'], ['b']], 2))


def script(folder, workers, after=''):
  """A program without a main guard that fills the cache."""
  return textwrap.dedent(f"""
      import sys
      sys.path.insert(0, {str(ROOT)!r})
      from training.data import sources, token_cache, tokenizers
      token_cache.CHUNK_CHARS = 100
      {after}
      [(_, source)] = sources.parse('text:{folder}/a/*.txt')
      cache = token_cache.cached_tokens(
          source, tokenizers.load('bytes'),
          {str(folder / 'cache')!r}, {workers})
      print(len(cache), len(cache.tokens), cache.path.name)
      """)


def test_no_main_guard_is_needed_and_of_two_processes_one_reads(folder):
  path = folder / 'script.py'
  path.write_text(script(folder, 2))
  runs = [subprocess.Popen([sys.executable, path], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
          for _ in range(2)]
  outputs = [run.communicate(timeout=60) for run in runs]
  assert [run.returncode for run in runs] == [0, 0], outputs
  assert outputs[0][0] == outputs[1][0]  # The script ran once in each.
  told = ''.join(err for _, err in outputs)
  assert told.count('tokenised') == 1  # One read the text, the other waited.
  entry = cached(folder).path
  assert outputs[0][0].split() == ['12', '900', entry.name]
  assert [path.name for path in entry.parent.iterdir()] == [entry.name]


def test_a_killed_process_leaves_no_entry(folder):
  slow = ('real = token_cache._bounds; import time\n      '
          'def slow(x): print("half", flush=True); time.sleep(60)\n      '
          'token_cache._bounds = slow')
  run = subprocess.Popen([sys.executable, '-c', script(folder, 1, slow)],
                         text=True, stdout=subprocess.PIPE)
  assert run.stdout.readline() == 'half\n'
  run.send_signal(signal.SIGKILL)
  run.communicate()
  tokens = folder / 'cache' / 'tokens'
  [left] = tokens.iterdir()
  assert left.name.startswith('.building-')
  entry = cached(folder).path
  assert set(tokens.iterdir()) == {left, entry}
  # What is over a day old is swept away by the next process that builds; not
  # a folder that was made then, and in which a file still grows.
  for old, tokenizer in ((left, 'bytes:64'), (left / 'tokens.bin', 'bytes:32')):
    assert left in tokens.iterdir()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    cached(folder, tokenizers.load(tokenizer))
  assert left not in tokens.iterdir()


def test_a_damaged_entry_is_named(folder):
  cache = cached(folder)
  with open(cache.path / 'tokens.bin', 'r+b') as file:
    file.truncate(100)
  with pytest.raises(EnvironmentFailure,
                     match=f'{cache.path.name}.* is damaged'):
    cached(folder)


def test_the_manifest_survives_being_torn(folder):
  cached(folder)
  [manifest] = (folder / 'cache' / 'manifests').iterdir()
  whole = manifest.read_text()
  manifest.write_text(whole[:20])
  cached(folder)
  assert json.loads(manifest.read_text()) == json.loads(whole)


@pytest.mark.parametrize('sent', [0, 1, 2])
def test_a_worker_ends_quietly_when_its_parent_is_gone(sent):
  """Before it has the tokenizer, before the first chunk, and before the answer
  is read: the last is what Ctrl-C leaves behind."""
  worker = subprocess.Popen(
      [sys.executable, '-m', 'training.data.token_workers'], cwd=ROOT,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  worker.stdout.close()
  for message in ['bytes', ['a text'] * 1000][:sent]:
    pickle.dump(message, worker.stdin)
  worker.stdin.close()
  assert (worker.stderr.read(), worker.wait(100)) == (b'', 0)
