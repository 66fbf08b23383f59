"""Writes folders of tokens (tokens.py): what is cut into which shards, and how
one is made.

Which documents make which shard is the same for any number of machines: a shard
is made of neighbouring files, so many that they have SHARD_BYTES of text, or a
MOST_SHARDS-th of all. A larger file is a shard of its own.
"""

from collections.abc import Iterable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from typing import Any, NamedTuple
import uuid
import zlib

from etils import epath
import numpy as np

from configs.errors import EnvironmentFailure, require
from training.data import chat_templates, holdout, tokens
from training.data.sources import Document, Source
from training.data.tokenizers import Tokenizer
from training.workdir import storage

SHARD_BYTES = 256 << 20
MOST_SHARDS = 1 << 14
CHUNK_CHARS, CHUNK_TEXTS = 1 << 20, 1 << 13  # encoded at once
TEMPORARY = '.writing-'
STALE_SECONDS = 24 * 3600
TELL_SECONDS = 10
FIGURES = tokens.FIGURES


class Plan(NamedTuple):
  """What a source is cut into.

  Attributes:
    source: whose documents these are.
    parts: the sources whose documents make one shard each, in order.
    sizes: of each, in bytes of its files; without files all are 1.
    digest: of what the parts are made from, and where it is cut.
    every: data.holdout_every, of which the index says what is held out.
    shard_bytes: of text in a shard; 0 for a source without files.
  """
  source: Source
  parts: list[Source]
  sizes: list[int]
  digest: str
  every: int
  shard_bytes: int = 0


def plan(source: Source, every: int, shard_bytes: int = SHARD_BYTES) -> Plan:
  """Returns the plan of a source; one without files is one shard."""
  if not source.files:
    return Plan(source, [source], [1], source.content, every)
  sizes = _sizes(source)
  for path, size in zip(source.files, sizes):
    require(size > 0,
            f'data source {source.name!r} is empty: {path} holds no text')
  target = max(shard_bytes, sum(sizes) // MOST_SHARDS)
  groups: list[list[tuple[str, int]]] = []
  room = 0
  for path, size in zip(source.files, sizes):
    if not groups or size > room:
      groups.append([])
      room = target
    groups[-1].append((path, size))
    room -= size
  named = [[os.path.basename(path), size]
           for path, size in zip(source.files, sizes)]
  return Plan(
      source, [dataclasses.replace(source, files=tuple(p for p, _ in group))
               for group in groups],
      [sum(size for _, size in group) for group in groups],
      tokens.digest([source.reader, named, [len(group) for group in groups]]),
      every, shard_bytes)


def _sizes(source: Source) -> list[int]:
  return [os.stat(path).st_size for path in source.files]


def documents(part: Source) -> Iterator[Document]:
  """Yields the documents of a shard.

  Raises:
    EnvironmentFailure: at their end, where the files were written meanwhile.
  """
  before = _sizes(part)
  yield from part.documents()
  if _sizes(part) != before:
    raise EnvironmentFailure(
        f'data source {part.name!r} changed while it was being read: start '
        'again when its files are complete')


def begin(folder: epath.Path, planned: Plan, tokenizer: Tokenizer
          ) -> dict[str, Any]:
  """Writes begun.json, or sees that it is of the same plan; returns it.

  Raises:
    RequestError: where the folder holds something else.
  """
  path = folder / tokens.BEGUN
  if not path.exists():
    with storage.writing(str(folder)):
      folder.mkdir(parents=True, exist_ok=True)
      put(path, _json(dict(
          format=tokens.FORMAT, source=planned.source.name,
          files=len(planned.source.files) or sum(planned.sizes),
          digest=planned.digest, shards=len(planned.parts),
          shard_bytes=planned.shard_bytes, holdout_every=planned.every,
          dtype='<u4' if tokenizer.vocab_size > 1 << 16 else '<u2',
          tokenizer=dict(
              name=tokenizer.name, fingerprint=tokenizer.fingerprint,
              vocab_size=tokenizer.vocab_size))))
  begun = tokens.parsed(path)
  tokens.check_format(begun, folder)
  made = begun['tokenizer']
  require(made['fingerprint'] == tokenizer.fingerprint,
          f'{folder} was begun with the tokenizer {made["name"]!r}, and '
          f'--tokenizer is {tokenizer.name!r}, which is another one: choose '
          'the same, or another folder for --out')
  require(begun['digest'] == planned.digest,
          f'{folder} was begun of the source {begun["source"]!r} with '
          f'--shard_mib {begun["shard_bytes"] >> 20}, and that of now, '
          f'{planned.source.name!r}, has other files or is cut otherwise: '
          'choose the same, or another folder for --out')
  return begun


def forget(folder: epath.Path, count: int) -> None:
  """Removes begun.json where no shard is finished: of a command that is
  refused, and that works alone."""
  if not any(finished(folder, count)):
    (folder / tokens.BEGUN).unlink()


def finished(folder: epath.Path, count: int) -> list[dict[str, Any] | None]:
  """Returns what the .json of each of `count` shards says, of those of which
  all files are there."""
  sizes = tokens.file_sizes(folder, '')

  def one(i: int) -> dict[str, Any] | None:
    name = f'{i:05}'
    if not {f'{name}.json', f'{name}.npz', f'{name}.tokens'} <= sizes.keys():
      return None
    try:
      told = json.loads((folder / f'{name}.json').read_bytes())
      return told if told['size'] == sizes[f'{name}.tokens'] else None
    except (OSError, ValueError, KeyError, TypeError):
      return None

  with futures.ThreadPoolExecutor(tokens.THREADS) as pool:
    return list(pool.map(one, range(count)))


def shard(folder: epath.Path, i: int, part: Source, tokenizer: Tokenizer,
          dtype: str, plain: bool) -> dict[str, Any]:
  """Tokenises the documents of a source into shard i; returns what its .json
  holds, which is written last: without it, the shard is not finished.

  Args:
    folder: of the shards.
    i: the number of the shard.
    part: whose documents these are.
    tokenizer: see tokenizers.load.
    dtype: of ids on disk.
    plain: whether documents of several parts are refused.

  Raises:
    EnvironmentFailure: where it cannot be written.
  """
  with _temporary(folder) as room:
    path = room / f'{i:05}.tokens'
    # Around what writes, and not around what reads: of the text, an error says
    # more by itself.
    table = _encode(path, part, tokenizer, dtype, plain)
    with storage.writing(str(folder)):
      data = io.BytesIO()
      np.savez(data, **table._asdict())
      described = dict(zip(FIGURES, tokens.total(
          table, np.ones(len(table.counts), bool)))) | dict(
              size=path.stat().st_size, checksum=zlib.crc32(data.getvalue()),
              kinds=[tokens.KINDS[k] for k in np.unique(table.kinds)])
      if storage.in_bucket(folder):
        with path.open('rb') as file, (folder / path.name).open('wb') as sink:
          shutil.copyfileobj(file, sink, 1 << 20)
      else:
        os.replace(path, folder / path.name)
      put(folder / f'{i:05}.npz', data.getvalue())
      put(folder / f'{i:05}.json', _json(described))
  return described


def index(folder: epath.Path, begun: dict[str, Any],
          shards: list[dict[str, Any]], every: int) -> None:
  """Writes index.json: that all shards are there, and how much of each is held
  out. The number of a document, by which it is, is only known now."""
  whole = tokens.Index(folder, begun | dict(shards=shards))
  read = tokens.Tokens(whole)
  firsts = tokens.bounds([each['documents'] for each in shards])

  def held_out(i: int) -> list[int]:
    return tokens.total(read.table(i), holdout.chosen(
        np.arange(*firsts[i:i + 2]), every, 'eval'))

  with futures.ThreadPoolExecutor(tokens.THREADS) as pool:
    rows = list(pool.map(held_out, range(len(shards))))
  described = whole.described | {
      key: sum(each[key] for each in shards) for key in FIGURES} | dict(
          held_out=dict(every=every, shards=rows))
  with storage.writing(str(folder)):
    put(folder / tokens.INDEX, _json(described))


def put(target: epath.Path, data: bytes) -> None:
  """Writes a file whole or not at all, whoever else writes it too."""
  if storage.in_bucket(target):
    target.write_bytes(data)
    return
  partial = target.with_name(f'{TEMPORARY}{uuid.uuid4().hex}')
  partial.write_bytes(data)
  os.replace(partial, target)


def _json(described: Any) -> bytes:
  return json.dumps(described, indent=1).encode()


@contextlib.contextmanager
def _temporary(folder: epath.Path) -> Iterator[pathlib.Path]:
  """A folder to write in, from which a file can be moved in one piece."""
  where = None
  if not storage.in_bucket(folder):
    with storage.writing(str(folder)):
      storage.sweep(folder, f'{TEMPORARY}*', STALE_SECONDS)
    where = os.fspath(folder)
  with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=where) as text:
    yield pathlib.Path(text)


def _encode(path: pathlib.Path, part: Source, tokenizer: Tokenizer, dtype: str,
            plain: bool) -> tokens.Table:
  """Writes the ids of a shard; returns its table."""
  kinds: list[int] = []
  counts: list[int] = []
  sizes, num_bytes, checksums = [], [], []
  told = time.monotonic()
  left = b''
  with storage.File(path) as file:
    for chunk in _chunks(documents(part), kinds, counts):
      require(not plain or not any(kinds), f'data source {part.name!r} holds '
              'pairs or conversations, and tools.tokenize writes plain text: a '
              'run reads these from their own files')
      rows = [left]
      for ids, text in encode(tokenizer, chunk):
        rows.append(np.asarray(ids).astype(dtype).tobytes())
        sizes.append(len(ids))
        num_bytes.append(len(text.encode('utf-8')))
      left = b''.join(rows)
      whole = len(left) // tokens.BLOCK_BYTES * tokens.BLOCK_BYTES
      checksums += _checksums(left[:whole])
      file.write(left[:whole])
      left = left[whole:]
      if time.monotonic() - told > TELL_SECONDS:
        told = time.monotonic()
        print(f'tokenising {part.name}: {sum(num_bytes) / 1e6:,.0f} MB so far',
              file=sys.stderr)
    file.write(left)
    checksums += _checksums(left)
  return tokens.Table(
      np.array(sizes, np.int64), np.array(num_bytes, np.int64),
      np.array(kinds, np.uint8), np.array(counts, np.int64),
      np.array(checksums, np.uint32))


def _checksums(data: bytes) -> list[int]:
  return [zlib.crc32(data[at:at + tokens.BLOCK_BYTES])
          for at in range(0, len(data), tokens.BLOCK_BYTES)]


def _chunks(documents_: Iterable[Document], kinds: list[int],
            counts: list[int]) -> Iterator[list[list[tuple[str, str]]]]:
  """Yields documents as lists of parts, some at a time; fills in the kinds of
  these, and how many each document has."""
  chunk, chars = [], 0
  for document in documents_:
    parts = ([('text', document)] if isinstance(document, str) else document)
    counts.append(len(parts))
    kinds += [tokens.KINDS.index(kind) for kind, _ in parts]
    chunk.append(parts)
    chars += sum(len(text) for _, text in parts)
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
  encoded as one, too, by chat_templates.encode. The library of a tokenizer
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
      for own, text in zip(chat_templates.encode(texts, tokenizer), texts):
        yield own, chat_templates.unmarked(text)
      continue
    rows = [next(ids) for _ in parts]
    for i, (kind, _) in enumerate(parts):
      if kind == 'answer' and i and parts[i - 1][0] == 'question':
        same = shared(rows[i], rows[i - 1])
        rows[i - 1], rows[i] = rows[i][:same], rows[i][same:]
    yield from zip(rows, (text for _, text in parts))


def shared(a: np.ndarray, b: np.ndarray) -> int:
  """Returns how many ids two sequences begin with alike."""
  size = min(len(a), len(b))
  different = np.flatnonzero(a[:size] != b[:size])
  return int(different[0]) if different.size else size
