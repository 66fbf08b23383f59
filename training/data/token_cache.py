"""The token cache: each source is tokenised once, then memory-mapped.

An entry is a folder named by a hash of the documents' content and of the
tokenizer, so it is never stale, and is shared by all runs, whatever their
split, length or seed. It holds

  tokens.bin     uint16, or uint32 for vocabularies over 65,536: all ids, with
                 nothing between documents
  parts.npy      int64 [parts + 1]: part p is tokens[parts[p]:parts[p + 1]]
  kinds.npy      uint8 [parts]: each part's index in sources.KINDS
  bytes.npy      int64 [parts]: UTF-8 bytes of each part's text
  documents.npy  int64 [documents + 1]: document n is parts documents[n] to
                 documents[n + 1]
  meta.json      what it was made from

It is written beside its final place and renamed, so a killed process leaves
no half entry. Of several processes that want the same one, on hosts that share
the folder, one reads the text and the others wait: file locks see to it (where
a file system has none, all build, and either wins). A manifest remembers
(path, size, mtime) of a source's files and their content hash: while they
match, the text is not read again.
"""

from collections.abc import Iterable, Iterator
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any
import uuid

import numpy as np

from configs.errors import EnvironmentFailure, RequestError
from training.data import sources, token_workers
from training.data.tokenizers import Tokenizer
from training.workdir import storage

FORMAT = 1  # Part of the key: raise it when the layout changes.
CHUNK_CHARS = 1 << 20
CHUNK_PARTS = 1 << 13
TELL_SECONDS = 10
STALE_SECONDS = 24 * 3600


class TokenCache:
  """A cache entry, memory-mapped: documents, each of one or more parts.

  Attributes:
    tokens: [T] uint16 or uint32.
    parts: int64 [parts + 1], the parts' bounds in `tokens`.
    kinds: uint8 [parts], indices into sources.KINDS.
    num_bytes: int64 [parts].
    documents: int64 [documents + 1], the documents' bounds in `parts`.
  """

  def __init__(self, path: pathlib.Path):
    self.path = pathlib.Path(path)
    try:
      meta = json.loads((self.path / 'meta.json').read_text())
      self.parts, self.kinds, self.num_bytes, self.documents = (
          np.load(self.path / f'{name}.npy', mmap_mode='r').view(np.ndarray)
          for name in ('parts', 'kinds', 'bytes', 'documents'))
      self.tokens = np.memmap(self.path / 'tokens.bin', meta['dtype'],
                              mode='r').view(np.ndarray)
      whole = len(self.tokens) == self.parts[-1] == meta['tokens']
      whole &= len(self.documents) > 0 and self.documents[-1] == len(
          self.kinds) == len(self.num_bytes) == len(self.parts) - 1
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError
            ) as error:
      raise self._damaged() from error
    if not whole:
      raise self._damaged()

  def _damaged(self) -> EnvironmentFailure:
    return EnvironmentFailure(
        f'the token cache entry {str(self.path)!r} is damaged: delete it, and '
        'it will be made again.')

  def __reduce__(self):
    return TokenCache, (self.path,)  # To a worker goes the path alone.

  def __len__(self) -> int:
    return len(self.documents) - 1

  def document(self, n: int) -> np.ndarray:
    """Returns the ids [T] of document n, its parts one after the other."""
    first, last = self.documents[n], self.documents[n + 1]
    return self.tokens[self.parts[first]:self.parts[last]]

  def document_parts(self, n: int) -> list[tuple[str, np.ndarray]]:
    """Returns the (kind, ids [T]) parts of document n."""
    return [(sources.KINDS[self.kinds[p]],
             self.tokens[self.parts[p]:self.parts[p + 1]])
            for p in range(self.documents[n], self.documents[n + 1])]


def default_dir() -> pathlib.Path:
  """Returns $ARCHETYPE_CACHE, else ~/.cache/archetype."""
  return pathlib.Path(os.environ.get('ARCHETYPE_CACHE')
                      or '~/.cache/archetype').expanduser()


def folder(cache_dir: str) -> pathlib.Path:
  """Returns where the entries lie; '' stands for default_dir()."""
  if '://' in cache_dir:
    raise RequestError(f'data.cache_dir is {cache_dir!r}: tokens are mapped '
                       'into memory, so it must be a folder on disk')
  try:
    return (pathlib.Path(cache_dir).expanduser() if cache_dir
            else default_dir())
  except RuntimeError as error:  # ~ of a user who has no home
    raise RequestError(f'data.cache_dir is {cache_dir!r}: {error}') from error


def check_cache_dir(cache_dir: str) -> None:
  """Raises RequestError where no entry can be written; one that has entries is
  not tried, since all that a run needs may be there."""
  if not os.path.isdir(folder(cache_dir) / 'tokens'):
    storage.try_folder(folder(cache_dir), 'data.cache_dir')


def cached_tokens(source: sources.Source, tokenizer: Tokenizer,
                  cache_dir: str = '', workers: int = 0) -> TokenCache:
  """Returns the source's tokens, tokenising them if no entry has them.

  Args:
    source: see sources.parse.
    tokenizer: see tokenizers.load.
    cache_dir: '' is default_dir().
    workers: processes that tokenise; 0 is one per CPU core.

  Raises:
    ValueError: if a document cannot be read, naming the file and line.
  """
  root = folder(cache_dir)
  stats = _stat(source.files)
  manifest = root / 'manifests' / f'{_name(source)}.json'
  digest = _remembered(manifest, stats)
  path = root / 'tokens' / _key(digest, tokenizer)
  if digest is None or not path.is_dir():
    storage.try_folder(root, 'data.cache_dir')
    with _one_at_a_time(root, source):
      digest = _remembered(manifest, stats) or _digest(source, stats, manifest)
      path = root / 'tokens' / _key(digest, tokenizer)
      if not path.is_dir():
        _build(source, tokenizer, workers, stats, path)
  return TokenCache(path)


def content(source: sources.Source, cache_dir: str = '') -> str:
  """Returns the hash of the content of a source's files, which are read unless
  a manifest remembers it."""
  manifest = folder(cache_dir) / 'manifests' / f'{_name(source)}.json'
  return _remembered(manifest, _stat(source.files)) or source.digest()


def _name(source: sources.Source) -> str:
  return _hash([source.reader, source.content, source.files])


def _key(digest: str | None, tokenizer: Tokenizer) -> str:
  return _hash([FORMAT, digest, tokenizer.fingerprint])


@contextlib.contextmanager
def _one_at_a_time(root: pathlib.Path, source: sources.Source):
  """Lets one process at a time read the text of a source. The lock ends with
  the process that holds it, however that ends."""
  folder = root / 'locks'
  with _writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / _name(source), 'w')
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
      print(f'warning: {root} has no file locks ({error.strerror}): every '
            f'process reads {source.name}', file=sys.stderr)
    yield


def _remembered(manifest: pathlib.Path, stats: Any) -> str | None:
  """Returns the hash of the content, if the manifest's files are as now."""
  try:
    kept = json.loads(manifest.read_text())
    return kept['content'] if kept['files'] == stats else None
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return None  # None yet, or one that a killed machine left torn.


def _digest(source: sources.Source, stats: Any, manifest: pathlib.Path) -> str:
  """Returns the hash of the content, and writes it down."""
  digest = source.digest()
  with _writing(manifest):
    manifest.parent.mkdir(parents=True, exist_ok=True)
    temporary = manifest.with_suffix(f'.{uuid.uuid4().hex}')
    temporary.write_text(json.dumps({'files': stats, 'content': digest}))
    os.replace(temporary, manifest)
  return digest


def _writing(path: pathlib.Path):
  """Around what writes to the cache, and not around what reads the text: of
  that, an error says more by itself."""
  return storage.writing(path, _elsewhere)


def _elsewhere() -> str:
  return ('the tokens are kept there: make room, or name another folder with '
          '--config.data.cache_dir')


def _build(source: sources.Source, tokenizer: Tokenizer, workers: int,
           stats: Any, path: pathlib.Path):
  """Tokenises the source into `path`, which appears whole or not at all."""
  started = time.monotonic()
  temporary = path.parent / f'.building-{uuid.uuid4().hex}'
  with _writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.sweep(path.parent, '.building-*', STALE_SECONDS)
    temporary.mkdir()
  try:
    total = _write(source, tokenizer, workers, temporary)
    if _stat(source.files) != stats:
      raise EnvironmentFailure(
          f'data source {source.name!r} changed while it was being read: '
          'start again when its files are complete.')
    with _writing(path):
      try:
        os.rename(temporary, path)
      except OSError:
        if not path.is_dir():
          raise
        # Another process was first, and its entry is the same.
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  print(f'tokenised {source.name}: {total:,} tokens in '
        f'{time.monotonic() - started:.1f} s, kept in {path}', file=sys.stderr)


def _write(source: sources.Source, tokenizer: Tokenizer, workers: int,
           folder: pathlib.Path) -> int:
  """Writes an entry's files; returns its number of tokens."""
  wide = tokenizer.vocab_size > 1 << 16
  dtype = np.uint32 if wide else np.uint16
  kinds, counts, lengths, num_bytes = [], [], [], []
  chunks = _chunks(source.documents(), kinds, counts)
  told, done = time.monotonic(), 0
  with storage.File(folder / 'tokens.bin', _elsewhere) as file:
    for ids_T, lengths_U, bytes_U in token_workers.encode_chunks(
        tokenizer, chunks, workers):
      assert ids_T.max(initial=0) < tokenizer.vocab_size
      file.write(ids_T.astype(dtype).tobytes())
      lengths.append(lengths_U)
      num_bytes.append(bytes_U)
      done += int(bytes_U.sum())
      if time.monotonic() - told > TELL_SECONDS:
        told = time.monotonic()
        print(f'tokenising {source.name}: {done / 1e6:,.0f} MB so far',
              file=sys.stderr)
  parts = _bounds(np.concatenate(lengths))
  if not parts[-1]:
    raise RequestError(
        f'data source {source.name!r} is empty: its text has no tokens.')
  with _writing(folder):
    np.save(folder / 'parts.npy', parts)
    np.save(folder / 'kinds.npy', np.array(kinds, np.uint8))
    np.save(folder / 'bytes.npy', np.concatenate(num_bytes))
    np.save(folder / 'documents.npy', _bounds(np.array(counts, np.int64)))
    (folder / 'meta.json').write_text(json.dumps({
        'source': source.name, 'tokenizer': tokenizer.name,
        'fingerprint': tokenizer.fingerprint, 'dtype': np.dtype(dtype).name,
        'documents': len(counts), 'tokens': int(parts[-1])}, indent=1))
  return int(parts[-1])


def _chunks(documents: Iterable[sources.Document], kinds: list[int],
            counts: list[int]) -> Iterator[list]:
  """Yields the parts' texts in chunks, a question and its answer as a pair,
  what a Jinja template rendered as a whole; fills in kinds, and how many parts
  each document has."""
  chunk, chars = [], 0
  for document in documents:
    if isinstance(document, str):
      document = [('text', document)]
    counts.append(len(document))
    before = ''
    if document[0][0] == 'shown':
      chunk.append(token_workers.Rendered([text for _, text in document]))
    for kind, text in document:
      kinds.append(sources.KINDS.index(kind))
      if (before, kind) == ('question', 'answer'):
        chunk[-1] = (chunk[-1], text)  # tokenised as one
      elif kind not in ('shown', 'said'):
        chunk.append(text)
      before = kind
      chars += len(text)
    if chars >= CHUNK_CHARS or len(chunk) >= CHUNK_PARTS:
      yield chunk
      chunk, chars = [], 0
  if chunk:
    yield chunk


def _bounds(lengths: np.ndarray) -> np.ndarray:
  return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _stat(files: Iterable[str]) -> list[list]:
  stats = [(path, os.stat(path)) for path in files]
  return [[path, s.st_size, s.st_mtime_ns] for path, s in stats]


def _hash(described: Any) -> str:
  return hashlib.blake2b(json.dumps(described).encode('utf-8'),
                         digest_size=16).hexdigest()
