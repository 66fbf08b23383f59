"""One shard: the documents of some files, tokenised and written whole or not
at all."""

from collections.abc import Iterable, Iterator
from concurrent import futures
import contextlib
import hashlib
import io
import json
import mmap
import os
import pathlib
import shutil
import tempfile
from typing import Any
import uuid

from etils import epath
import numpy as np

from configs.errors import EnvironmentFailure, RequestError, require
from training.data import token_workers
from training.data.shards import files
from training.data.shards import folder as folders
from training.data.shards import records
from training.data.tokenizers import Tokenizer
from training.workdir import storage

CHUNK_CHARS = 1 << 20
CHUNK_TEXTS = 1 << 13
TEMPORARY = '.writing-'
STALE_SECONDS = 24 * 3600
THREADS = 32  # each waits for a small file


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
  """Returns what a token is stored as, by the size of the vocabulary."""
  return np.dtype('<u4' if tokenizer.vocab_size > 1 << 16 else '<u2')


def finished(folder: epath.Path, i: int, sizes: dict[str, int]
             ) -> dict[str, Any] | None:
  """Returns what shard i's .json says, where all its files are there.

  Args:
    folder: of the shards.
    i: the number of the shard.
    sizes: of all files of the folder, by files.sizes.
  """
  name = folders.number(i)
  if not {f'{name}.json', f'{name}.npz', name + folders.SHARD} <= sizes.keys():
    return None
  try:
    found = json.loads((folder / f'{name}.json').read_bytes())
    return found if found['size'] == sizes[name + folders.SHARD] else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def all_finished(folder: epath.Path, count: int) -> list[dict[str, Any] | None]:
  """Returns `finished` of each of `count` shards."""
  sizes = files.sizes(folder, '')
  with futures.ThreadPoolExecutor(THREADS) as pool:
    return list(pool.map(lambda i: finished(folder, i, sizes), range(count)))


def shard(folder: epath.Path, i: int, documents: Iterable[Any],
          tokenizer: Tokenizer, name: str) -> dict[str, Any]:
  """Tokenises documents into shard i; returns what its .json holds.

  The .json is written last: while it is not there, the shard is not finished.

  Args:
    folder: of the shards.
    i: the number of the shard.
    documents: texts, in order.
    tokenizer: see tokenizers.load.
    name: of the source, for messages.

  Raises:
    RequestError: for documents that are more than text.
    EnvironmentFailure: where it cannot be written.
  """
  own = folders.number(i)
  with contextlib.ExitStack() as stack:
    with storage.writing(str(folder)):
      room = stack.enter_context(_room(folder))
    path = room / (own + folders.SHARD)
    # Of the text that is read, an error says more by itself.
    sizes, num_bytes = _write(path, documents, tokenizer, name)
    with storage.writing(str(folder)):
      size, digest, places = read_back(path)
      described = dict(
          name=own, documents=len(sizes), tokens=int(sizes.sum()),
          bytes=int(num_bytes.sum()), records=len(places), size=size,
          digest=digest)
      table = io.BytesIO()
      np.savez(table, sizes=sizes, bytes=num_bytes, places=places)
      put_file(path, folder / path.name)
      put(folder / f'{own}.npz', table.getvalue())
      put(folder / f'{own}.json', json.dumps(described).encode())
  return described


def put(target: epath.Path, data: bytes) -> None:
  """Writes a file whole or not at all, whoever else writes it too."""
  if storage.in_bucket(target):
    target.write_bytes(data)
    return
  partial = target.with_name(f'{TEMPORARY}{uuid.uuid4().hex}')
  partial.write_bytes(data)
  os.replace(partial, target)


def put_file(path: pathlib.Path, target: epath.Path) -> None:
  """Moves a file of `_room` to its place."""
  if not storage.in_bucket(target):
    os.replace(path, target)
    return
  with path.open('rb') as source, target.open('wb') as sink:
    shutil.copyfileobj(source, sink, 1 << 20)


@contextlib.contextmanager
def _room(folder: epath.Path) -> Iterator[pathlib.Path]:
  """A folder to write in, from which a file can be moved in one piece."""
  if storage.in_bucket(folder):
    with tempfile.TemporaryDirectory(prefix='archetype-') as text:
      yield pathlib.Path(text)
    return
  storage.sweep(folder, f'{TEMPORARY}*', STALE_SECONDS)
  room = pathlib.Path(folder) / f'{TEMPORARY}{uuid.uuid4().hex}'
  room.mkdir()
  try:
    yield room
  finally:
    shutil.rmtree(room, ignore_errors=True)


def _write(path: pathlib.Path, documents: Iterable[Any], tokenizer: Tokenizer,
           name: str) -> tuple[np.ndarray, np.ndarray]:
  """Writes the records; returns the tokens and the bytes of each document."""
  try:
    from array_record.python import array_record_module
  except ImportError as error:
    raise RequestError("tools.tokenize needs the package array_record: pip "
                       "install 'archetype[data]'") from error
  dtype = dtype_of(tokenizer)
  sizes, num_bytes = [], []
  try:
    writer = array_record_module.ArrayRecordWriter(
        os.fspath(path), records.OPTIONS)
    pending = records.Pending(dtype)
    # One process: others have other shards.
    for ids_T, sizes_N, bytes_N in token_workers.encode_chunks(
        tokenizer, chunks(documents, name), workers=1):
      assert ids_T.max(initial=0) < tokenizer.vocab_size
      sizes.append(sizes_N)
      num_bytes.append(bytes_N)
      for record in pending.add(ids_T.astype(dtype), sizes_N):
        writer.write(records.encode(record))
    for record in pending.rest():
      writer.write(records.encode(record))
    writer.close()
  except RuntimeError as error:  # Riegeli's, as of a full disk
    if isinstance(error, EnvironmentFailure):
      raise
    raise EnvironmentFailure(f'cannot write {path}: {error}; once that is '
                             'mended, the same command goes on') from error
  require(bool(sizes), f'data source {name!r} is empty: it holds no text')
  return np.concatenate(sizes), np.concatenate(num_bytes)


def chunks(documents: Iterable[Any], name: str) -> Iterator[list[str]]:
  """Yields some documents at a time; RequestError: they are no plain text."""
  chunk, chars = [], 0
  for text in documents:
    require(isinstance(text, str), f'data source {name!r} holds pairs or '
            'conversations, and tools.tokenize writes plain text: a run reads '
            'these from their own files')
    chunk.append(text)
    chars += len(text)
    if chars >= CHUNK_CHARS or len(chunk) >= CHUNK_TEXTS:
      yield chunk
      chunk, chars = [], 0
  if chunk:
    yield chunk


def read_back(path: pathlib.Path) -> tuple[int, str, np.ndarray]:
  """Returns the size, the checksum and records.places of what was written."""
  with path.open('rb') as file, mmap.mmap(
      file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return len(data), digest, records.places(data)
