"""Tokens on disk: a folder of shards, which one process or many machines wrote.

`data.source=tokens:FOLDER` reads what `python -m tools.tokenize` wrote, on disk
or in a bucket; the cache of a run (token_cache.py) is folders of the same form.
A folder holds

  begun.json    of which source and tokenizer it is being made
  00000.tokens  a shard: the ids of some documents, uint16 or uint32, with
                nothing between them
  00000.npz     its Table: the parts of its documents, and a checksum of each
                block of ids
  00000.json    that the shard is finished: its figures
  index.json    that all are: the figures of the whole

What is held out follows from the number of a document, so that a folder serves
every data.holdout_every. A process keeps the tables of TABLES shards and some
blocks in memory, and reads the others as it needs them.
"""

from concurrent import futures
import functools
import hashlib
import io
import json
import os
import shlex
import threading
from typing import Any, NamedTuple
import zlib

from etils import epath
import numpy as np

from configs.errors import EnvironmentFailure, RequestError, require, short
from training.data import conversations, holdout, labelled
from training.data.tokenizers import Tokenizer
from training.workdir import storage

# What a part of a document is: text, one of a pair, or of a conversation.
KINDS = ('text', *labelled.PAIR, *conversations.KINDS)
FORMAT = 2  # raise it when the layout changes
BEGUN, INDEX = 'begun.json', 'index.json'
BLOCK_BYTES = 1 << 14  # of ids, with one checksum
FIGURES = ('documents', 'tokens', 'bytes')
TABLES, BLOCKS = 64, 1024  # kept in memory: the blocks are 16 MiB
THREADS = 32  # each waits for a small file

# numpy parses the header of an array with `ast`, which fails in Python 3.11 if
# several threads do so at the same time ("AST constructor recursion depth
# mismatch").
_PARSE = threading.Lock()


class Table(NamedTuple):
  """What there is to know of the documents of a shard.

  Attributes:
    sizes: int64 [parts], the ids of each part of a document.
    bytes: int64 [parts], of its text in UTF-8.
    kinds: uint8 [parts], indices into KINDS.
    counts: int64 [documents], the parts of each document.
    checksums: uint32 [blocks], the CRC-32 of each block of ids.
  """
  sizes: np.ndarray
  bytes: np.ndarray
  kinds: np.ndarray
  counts: np.ndarray
  checksums: np.ndarray

  def of_documents(self) -> np.ndarray:
    """Returns the ids and the bytes of each document, int64 [2, documents]."""
    ends = np.cumsum(self.counts)
    totals = np.stack([bounds(self.sizes), bounds(self.bytes)])
    return totals[:, ends] - totals[:, ends - self.counts]


class Index(NamedTuple):
  """A folder that is whole.

  Attributes:
    folder: where it is.
    described: what index.json holds.
  """
  folder: epath.Path
  described: dict[str, Any]

  @property
  def shards(self) -> list[dict[str, Any]]:
    """What there is to know of each shard: FIGURES, its kinds of parts, the
    size of its .tokens and the checksum of its .npz."""
    return self.described['shards']

  @property
  def digest(self) -> str:
    """Changes when any token could be another."""
    keys = ('digest', 'tokenizer', 'shards')
    return digest([self.described[key] for key in keys])


class Tokens:
  """The tokens of a folder that is whole."""

  def __init__(self, index: Index):
    self.index = index
    self._dtype = np.dtype(index.described['dtype'])
    self.table = functools.lru_cache(TABLES)(self._table)
    self._block = functools.lru_cache(BLOCKS)(self._read_block)

  def __reduce__(self):
    return Tokens, (self.index,)

  def read(self, shard: int, first: int, end: int) -> np.ndarray:
    """Returns the ids `first` to `end` of a shard."""
    size = BLOCK_BYTES // self._dtype.itemsize
    blocks = range(first // size, -(-end // size))
    ids = [self._block(shard, block) for block in blocks]
    start = blocks.start * size
    ids = ids[0] if len(ids) == 1 else np.concatenate(
        ids or [np.zeros(0, self._dtype)])
    return ids[first - start:end - start]

  def _read_block(self, shard: int, block: int) -> np.ndarray:
    path = f'{self.index.folder}/{shard:05}.tokens'
    data = read_bytes(path, block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
    checksums = self.table(shard).checksums
    if zlib.crc32(data) != checksums[block]:
      raise damaged(path, f'block {block:,} has another checksum')
    return np.frombuffer(data, self._dtype)

  def _table(self, shard: int) -> Table:
    path = self.index.folder / f'{shard:05}.npz'
    try:
      data = path.read_bytes()
    except FileNotFoundError as error:
      raise missing(str(path)) from error
    if zlib.crc32(data) != self.index.shards[shard]['checksum']:
      raise damaged(str(path), 'it has another checksum')
    with _PARSE:
      arrays = np.load(io.BytesIO(data))
      return Table(*(arrays[name] for name in Table._fields))


class Split:
  """The documents of a folder that belong to a split, as one stream of ids:
  separator, document, separator, ... document, separator.

  Attributes:
    tokens: of the folder.
    every, split, part: which documents these are, see holdout.chosen.
    kinds: of all the folder's documents, as KINDS has them.
    documents: how many there are; `of`, in all.
    num_tokens: of the stream, less the separator that it begins with.
    num_bytes: of the text.
  """

  def __init__(self, tokens: Tokens, every: int | None, split: str, part: str,
               separator: int):
    self.tokens, self.every = tokens, every
    self.split, self.part = split, part
    self._separator = separator
    index = tokens.index
    self.kinds = frozenset(k for shard in index.shards for k in shard['kinds'])
    self._firsts = bounds([shard['documents'] for shard in index.shards])
    documents, sizes, num_bytes = self._totals().T
    self._starts = bounds(documents + sizes)
    self.documents, self.of = int(documents.sum()), int(self._firsts[-1])
    self.num_tokens = int(self._starts[-1])
    self.num_bytes = int(num_bytes.sum())
    self._places = functools.lru_cache(TABLES)(self._find_places)

  def __getstate__(self) -> dict[str, Any]:  # to a worker goes no cache
    return {k: v for k, v in self.__dict__.items() if k != '_places'}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._places = functools.lru_cache(TABLES)(self._find_places)

  def fill(self, tokens: np.ndarray, first: int) -> None:
    """Fills `tokens`, which are separators, with the stream from token `first`
    on, as far as it goes."""
    # The shards' own streams follow the separator that all begins with.
    at, end = max(first - 1, 0), min(first - 1 + len(tokens), self.num_tokens)
    while at < end:
      shard = int(np.searchsorted(self._starts, at, side='right')) - 1
      start, stop = map(int, self._starts[shard:shard + 2])
      stop = min(stop, end)
      place = at - first + 1
      self._fill_from(shard, tokens[place:place + stop - at], at - start)
      at = stop

  def _fill_from(self, shard: int, tokens: np.ndarray, first: int) -> None:
    """Fills `tokens` from a shard's stream: document, separator, document."""
    starts, begins = self._places(shard)
    end = first + len(tokens)
    low, high = (int(np.searchsorted(starts, place, side='right')) - 1
                 for place in (first, end - 1))
    # From each of these documents, its tokens between `first` and `end`.
    pieces = []
    for k in range(low, high + 1):
      start, stop = int(starts[k]), int(starts[k + 1]) - 1
      a, b = max(start, first), min(stop, end)
      if a < b:
        pieces.append((a, b, int(begins[k]) - start))
    if not pieces:
      return
    origin = pieces[0][0] + pieces[0][2]
    ids = self.tokens.read(shard, origin, pieces[-1][1] + pieces[-1][2])
    for a, b, shift in pieces:
      tokens[a - first:b - first] = ids[a + shift - origin:b + shift - origin]

  def _find_places(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where each document of the split begins in the shard's stream,
    and at last where that ends; and where each begins among the ids."""
    sizes, _ = self.tokens.table(shard).of_documents()
    wanted = self.wanted(shard)
    return bounds(sizes[wanted] + 1), bounds(sizes)[:-1][wanted]

  def wanted(self, shard: int) -> np.ndarray:
    """Tells which documents of a shard belong to the split."""
    first, end = self._firsts[shard:shard + 2]
    return holdout.chosen(np.arange(first, end), self.every, self.split,
                          self.part)

  def _totals(self) -> np.ndarray:
    """Returns documents, tokens and bytes of each shard's part of the split,
    int64 [shards, 3]."""
    index = self.tokens.index
    totals = np.array([[shard[key] for key in FIGURES]
                       for shard in index.shards], np.int64)
    held_out = index.described['held_out']
    part = self.part if self.split == 'eval' else ''
    if not part and (self.every is None or not self.every
                     and self.split == 'train'):
      return totals
    if not part and self.every == held_out['every']:
      held = np.array(held_out['shards'], np.int64)
      return held if self.split == 'eval' else totals - held
    with futures.ThreadPoolExecutor(THREADS) as pool:
      return np.array(list(pool.map(self._total, range(len(totals)))))

  def _total(self, shard: int) -> list[int]:
    return total(self.tokens.table(shard), self.wanted(shard))


def total(table: Table, wanted: np.ndarray) -> list[int]:
  """Returns the FIGURES of some documents of a shard."""
  return [int(wanted.sum()), *map(int, table.of_documents()[:, wanted].sum(1))]


class Documents:
  """The documents of a split, of which each can be read by itself; the tables
  of all shards are kept in memory.

  Attributes:
    parts: int64 [parts + 1], where the parts of all documents begin and end.
    kinds: uint8 [parts]; num_bytes: int64 [parts].
    first, end: int64 [N], the first part of each document of the split, and the
      one after its last.
  """

  def __init__(self, split: Split):
    self._tokens = split.tokens
    shards = self._tokens.index.shards
    tables = [self._tokens.table(i) for i in range(len(shards))]
    sizes, self.num_bytes, self.kinds, counts = (
        np.concatenate(columns) for columns in list(zip(*tables))[:4])
    self.parts = bounds(sizes)
    self._shards = bounds([shard['tokens'] for shard in shards])
    wanted = np.concatenate([*map(split.wanted, range(len(shards)))])
    ends = np.cumsum(counts)
    self.first, self.end = (ends - counts)[wanted], ends[wanted]

  def __len__(self) -> int:
    return len(self.first)

  def read(self, first: int, end: int) -> np.ndarray:
    """Returns the ids `first` to `end`, as `parts` counts them, of a document.
    """
    shard = int(np.searchsorted(self._shards, first, side='right')) - 1
    shard = min(shard, len(self._shards) - 2)
    start = int(self._shards[shard])
    return self._tokens.read(shard, int(first) - start, int(end) - start)

  def __getitem__(self, n: int) -> list[tuple[str, np.ndarray]]:
    """Returns the (kind, ids [T]) parts of document n of the split."""
    return [(KINDS[self.kinds[p]],
             self.read(self.parts[p], self.parts[p + 1]))
            for p in range(self.first[n], self.end[n])]


def load(text: str, name: str) -> Index:
  """Returns the index of a folder.

  Args:
    text: the folder, on disk or in a bucket.
    name: of the source, for messages.

  Raises:
    RequestError: where there is none, or one that is half finished.
    EnvironmentFailure: where its index is damaged, or a shard is missing or
      cut short.
  """
  require(bool(text), f'data source {name!r} names no folder: write '
          'tokens:FOLDER or tokens:gs://BUCKET/NAME')
  folder = storage.path(text, f'the folder of data source {name!r}'
                        ).expanduser()
  if not (folder / INDEX).exists():
    require((folder / BEGUN).exists(), f'data source {name!r} has no {INDEX}, '
            'so it is no folder that tools.tokenize has written')
    begun = parsed(folder / BEGUN)
    done = sum(name[0].isdigit() for name in file_sizes(folder, '.json'))
    raise RequestError(
        f'data source {name!r} is half finished, {done} of '
        f'{begun["shards"]} shards: go on with ' + command(begun, text))
  index = Index(folder, parsed(folder / INDEX))
  check_format(index.described, folder)
  sizes = file_sizes(folder, '.tokens')
  for i, shard in enumerate(index.shards):
    path, found = f'{folder}/{i:05}.tokens', sizes.get(f'{i:05}.tokens')
    if found is None:
      raise missing(path)
    if found != shard['size']:
      raise damaged(path, f'{found:,} bytes, and not {shard["size"]:,}')
  return index


def command(begun: dict[str, Any], folder: Any) -> str:
  """Returns the command that goes on with a folder; `begun` of begun.json."""
  words = ['python', '-m', 'tools.tokenize', begun['source'], '--out',
           str(folder), '--tokenizer', begun['tokenizer']['name']]
  if begun['shard_bytes']:  # 0: of a dataset of Hugging Face
    words += ['--shard_mib', str(begun['shard_bytes'] >> 20)]
  return shlex.join([*words, '--holdout_every', str(begun['holdout_every'])])


def check_format(described: dict[str, Any], folder: epath.Path) -> None:
  version = described.get('format')
  require(version == FORMAT, f'{folder} has the format {short(version)} of '
          f'tokens, and this program reads {FORMAT}: tokenise into another '
          'folder')


def check_tokenizer(index: Index, tokenizer: Tokenizer, name: str) -> None:
  """Raises RequestError for a tokenizer other than the one of the tokens."""
  made = index.described['tokenizer']
  require(made['fingerprint'] == tokenizer.fingerprint,
          f'data source {name!r} was tokenised with {made["name"]!r}, '
          f'{made["vocab_size"]:,} ids, and data.tokenizer is '
          f'{tokenizer.name!r}, which is another one: choose that of the '
          'tokens, or tokenise into another folder')


def verify(index: Index) -> None:
  """Reads all shards; raises EnvironmentFailure for one that is damaged."""
  tokens = Tokens(index)

  def check(i: int) -> None:
    for block in range(len(tokens.table(i).checksums)):
      tokens._read_block(i, block)

  with futures.ThreadPoolExecutor(THREADS) as pool:
    list(pool.map(check, range(len(index.shards))))


def bounds(sizes: Any) -> np.ndarray:
  """Returns where things of these sizes begin, and where the last one ends."""
  return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def digest(described: Any) -> str:
  return hashlib.blake2b(json.dumps(described).encode('utf-8'),
                         digest_size=16).hexdigest()


def parsed(path: epath.Path) -> Any:
  """Returns what a file of JSON holds; EnvironmentFailure: it is damaged."""
  try:
    return json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise damaged(str(path), 'it is no JSON') from error


def read_bytes(path: str, start: int, end: int) -> bytes:
  """Returns the bytes start to end of a file; past its end there are none.

  Raises:
    EnvironmentFailure: where it cannot be read.
  """
  try:
    if storage.in_bucket(path):
      return _bucket().cat_file(path, start=start, end=end)
    with open(path, 'rb', buffering=0) as file:
      return os.pread(file.fileno(), end - start, start)
  except FileNotFoundError as error:
    raise missing(path) from error
  except Exception as error:  # those of a bucket's client have many types
    why = storage.reason(error)
    if not why:
      raise
    raise EnvironmentFailure(
        f'{path} cannot be read: {why}; once that is mended, the same command '
        'goes on') from error


def file_sizes(folder: epath.Path, ending: str) -> dict[str, int]:
  """Returns the bytes of each file of a folder whose name ends so."""
  if storage.in_bucket(folder):
    rows = _bucket().ls(str(folder), detail=True)
    return {row['name'].rpartition('/')[2]: int(row['size'] or 0)
            for row in rows if row['name'].endswith(ending)}
  with os.scandir(folder) as rows:
    return {row.name: row.stat().st_size for row in rows
            if row.name.endswith(ending)}


def missing(path: str) -> EnvironmentFailure:
  return EnvironmentFailure(
      f'{path} is missing: the command that made the folder makes it again, '
      'and tokenises nothing else')


def damaged(path: str, why: str) -> EnvironmentFailure:
  return EnvironmentFailure(
      f'{path} is damaged ({why}): delete it, and the command that made the '
      'folder makes it again')


@functools.cache
def _bucket() -> Any:
  import fsspec
  storage.path('gs://bucket/folder', 'data.source')  # sees what others write
  return fsspec.filesystem('gs')
