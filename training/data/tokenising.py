"""Tokenises sources into folders of tokens, those of the cache among them: see
tokens.py for what they hold."""

from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pathlib
import sys
from typing import Any
import zlib

from etils import epath
import numpy as np

from configs.errors import EnvironmentFailure, RequestError, require
from training.data import conversations, tokens
from training.data.sources import Document, Source
from training.data.tokenizers import Tokenizer
from training.workdir import storage

SHARD_BYTES = 256 << 20
MOST_SHARDS = 1 << 14
CHUNK_CHARS, CHUNK_TEXTS = 1 << 20, 1 << 13  # encoded at once


def plan(source: Source, shard_bytes: int = SHARD_BYTES
         ) -> tuple[list[Source], list[int]]:
  """Returns the sources whose documents make one shard each, in order, and the
  bytes of their files; one without files is one shard."""
  if not source.files:
    return [source], [1]
  sizes = [os.stat(path).st_size for path in source.files]
  target = max(shard_bytes, sum(sizes) // MOST_SHARDS)
  parts: list[list[str]] = []
  totals: list[int] = []
  for path, size in zip(source.files, sizes):
    if not parts or totals[-1] + size > target:
      parts.append([])
      totals.append(0)
    parts[-1].append(path)
    totals[-1] += size
  return [dataclasses.replace(source, files=tuple(part))
          for part in parts], totals


def begin(folder: epath.Path, source: Source, parts: list[Source],
          content: str, tokenizer: Tokenizer) -> dict[str, Any]:
  """Writes begun.json, or sees that it is of the same `content`, cut into the
  same parts; returns it.

  Raises:
    RequestError: where the folder holds something else.
  """
  made = tokens.digest([content, [len(part.files) for part in parts]])
  if not (folder / tokens.BEGUN).exists():
    storage.write(folder / tokens.BEGUN, json.dumps(dict(
        format=tokens.FORMAT, source=source.name, content=content,
        digest=made, shards=len(parts),
        dtype='<u4' if tokenizer.vocab_size > 1 << 16 else '<u2',
        tokenizer=dict(
            name=tokenizer.name, fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size)), indent=1))
  begun = tokens.begun_of(folder)
  require(begun['digest'] == made and begun['tokenizer']['fingerprint']
          == tokenizer.fingerprint, f'{folder} was begun of the source '
          f'{begun["source"]!r} with the tokenizer '
          f'{begun["tokenizer"]["name"]!r}, and {source.name!r} has other '
          f'files or is cut otherwise, or {tokenizer.name!r} is another one: '
          'choose the same, or another folder for --out')
  return begun


def shard(folder: epath.Path, i: int, part: Source, tokenizer: Tokenizer,
          begun: dict[str, Any]) -> tokens.Table:
  """Tokenises the documents of a source into shard i; returns its table, which
  is written last: without it, the shard is not finished.

  Raises:
    EnvironmentFailure: where it cannot be written, or the files were written
      meanwhile.
  """
  print(f'tokenising {part.name}, shard {i + 1} of {begun["shards"]}',
        file=sys.stderr, flush=True)
  before = stats(part)
  with storage.whole(folder / f'{i:05}.tokens') as write:
    table = _encode(write, part, tokenizer, begun['dtype'])
  if stats(part) != before:
    raise EnvironmentFailure(
        f'data source {part.name!r} changed while it was being read: start '
        'again when its files are complete')
  data = io.BytesIO()
  np.savez_compressed(data, **table._asdict())
  storage.write(folder / f'{i:05}.table', zlib.crc32(data.getvalue()).to_bytes(
      4, 'little') + data.getvalue())
  return table


def stats(source: Source) -> list[list[Any]]:
  """Returns the path, the size and the time of each file of a source."""
  files = [(path, os.stat(path)) for path in source.files]
  return [[path, s.st_size, s.st_mtime_ns] for path, s in files]


def _encode(write: Any, part: Source, tokenizer: Tokenizer, dtype: str
            ) -> tokens.Table:
  """Writes the ids of a shard; returns its table."""
  kinds, counts, sizes, num_bytes, checksums = [], [], [], [], []
  left = b''

  def put_blocks(end: int) -> None:
    checksums.extend([
        zlib.crc32(left[at:min(at + tokens.BLOCK_BYTES, end)])
        for at in range(0, end, tokens.BLOCK_BYTES)])
    write(left[:end])

  for chunk in _chunks(part.documents()):
    counts += map(len, chunk)
    kinds += [tokens.KINDS.index(kind) for parts in chunk for kind, _ in parts]
    rows = [left]
    for ids, text in encode(tokenizer, chunk):
      rows.append(np.asarray(ids).astype(dtype).tobytes())
      sizes.append(len(ids))
      num_bytes.append(len(text.encode('utf-8')))
    left = b''.join(rows)
    whole = len(left) // tokens.BLOCK_BYTES * tokens.BLOCK_BYTES
    put_blocks(whole)
    left = left[whole:]
  put_blocks(len(left))
  return tokens.Table(
      np.array(sizes, np.int64), np.array(num_bytes, np.int64),
      np.array(kinds, np.uint8), np.array(counts, np.int64),
      np.array(checksums, np.uint32))


def _chunks(documents: Iterable[Document]
            ) -> Iterator[list[list[tuple[str, str]]]]:
  """Yields documents as lists of parts, some at a time."""
  chunk, chars = [], 0
  for document in documents:
    chunk.append([('text', document)] if isinstance(document, str)
                 else document)
    chars += sum([len(text) for _, text in chunk[-1]])
    if chars >= CHUNK_CHARS or len(chunk) >= CHUNK_TEXTS:
      yield chunk
      chunk, chars = [], 0
  if chunk:
    yield chunk


def encode(tokenizer: Tokenizer, chunk: list[list[tuple[str, str]]]
           ) -> Iterator[tuple[np.ndarray, str]]:
  """Yields (ids, text) of each part of some documents.

  A question and its answer are encoded as one text, and the answer has the ids
  from the first one on that it changes. What a Jinja template rendered is
  encoded as one, too, by conversations.encode. The library of a tokenizer
  encodes several texts at the same time.
  """
  spelt: list[str] = []
  for parts in chunk:
    if parts[0][0] not in ('shown', 'said'):
      for i, (kind, text) in enumerate(parts):
        is_answer = kind == 'answer' and i and parts[i - 1][0] == 'question'
        spelt.append(parts[i - 1][1] + text if is_answer else text)
  ids = iter(tokenizer.encode_batch(spelt))
  for parts in chunk:
    if parts[0][0] in ('shown', 'said'):
      texts = [text for _, text in parts]
      for row, text in zip(conversations.encode(texts, tokenizer), texts):
        yield row, conversations.unmarked(text)
      continue
    rows = [next(ids) for _ in parts]
    for i, (kind, _) in enumerate(parts):
      if kind == 'answer' and i and parts[i - 1][0] == 'question':
        same = shared(rows[i], rows[i - 1])
        rows[i - 1], rows[i] = rows[i][:same], rows[i][same:]
    yield from zip(rows, [text for _, text in parts])


def shared(a: np.ndarray, b: np.ndarray) -> int:
  """Returns how many ids two sequences begin with alike."""
  size = min(len(a), len(b))
  different = np.flatnonzero(a[:size] != b[:size])
  return int(different[0]) if different.size else size


# The cache.


def cache(cache_dir: str = '') -> pathlib.Path:
  """Returns the folder of data.cache_dir; '': $ARCHETYPE_CACHE, else
  ~/.cache/archetype."""
  require('://' not in cache_dir, f'data.cache_dir is {cache_dir!r}: it must '
          'be a folder on disk')
  try:
    return pathlib.Path(cache_dir or os.environ.get('ARCHETYPE_CACHE')
                        or '~/.cache/archetype').expanduser()
  except RuntimeError as error:  # ~ of a user who has no home
    raise RequestError(f'data.cache_dir is {cache_dir!r}: {error}') from error


def check_cache_dir(cache_dir: str) -> None:
  """Raises RequestError where no entry can be written; one that has entries is
  not tried, since all that a run needs may be there."""
  if not os.path.isdir(cache(cache_dir) / 'tokens'):
    storage.try_folder(cache(cache_dir), 'data.cache_dir')


def _entry(source: Source, tokenizer: Tokenizer, cache_dir: str) -> epath.Path:
  return epath.Path(cache(cache_dir)) / 'tokens' / tokens.digest(
      [tokens.FORMAT, source.reader, source.content, stats(source),
       tokenizer.fingerprint])


def cached(source: Source, tokenizer: Tokenizer, cache_dir: str
           ) -> tokens.Tokens:
  """Returns the tokens of a source, which is tokenised if no entry has them.

  Args:
    source: see sources.parse.
    tokenizer: see tokenizers.load.
    cache_dir: as data.cache_dir.

  Raises:
    ValueError: if a document cannot be read, naming the file and line.
  """
  path = _entry(source, tokenizer, cache_dir)
  parts, _ = plan(source)
  whole = lambda: (path / tokens.BEGUN).exists() and all(
      tokens.finished(path, tokens.begun_of(path)))
  if not whole():
    storage.try_folder(cache(cache_dir), 'data.cache_dir')
    with _one_at_a_time(path, source.name):
      if not whole():
        begun = begin(path, source, parts, source.digest(), tokenizer)
        for i, done in enumerate(tokens.finished(path, begun)):
          if not done:
            shard(path, i, parts[i], tokenizer, begun)
        print(f'the tokens are kept in {path}', file=sys.stderr)
  return tokens.load(str(path), source.name)


def content(source: Source, tokenizer: Tokenizer, cache_dir: str) -> str:
  """Returns the hash of the content of a source's files, which are read unless
  the cache remembers it."""
  path = _entry(source, tokenizer, cache_dir)
  return (tokens.begun_of(path)['content'] if (path / tokens.BEGUN).exists()
          else source.digest())


@contextlib.contextmanager
def _one_at_a_time(path: epath.Path, name: str) -> Iterator[None]:
  """Lets one process at a time make an entry. The lock ends with the process
  that holds it, however that ends."""
  with storage.writing(str(path)):
    path.mkdir(parents=True, exist_ok=True)
    file = open(path / '.lock', 'w')
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
      print(f'warning: {path} has no file locks ({error.strerror}): every '
            f'process reads {name}', file=sys.stderr)
    yield
