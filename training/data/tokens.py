"""Tokens on disk: a folder of shards, which one process or many machines wrote.

`data.source=tokens:FOLDER` reads what `python -m tools.tokenize` wrote, on disk
or in a bucket; the cache of a run is folders of the same form. A folder holds

  begun.json    of which source and tokenizer it is being made, in how many
                shards; with a checksum
  00000.tokens  a shard: the ids of some documents, uint16 or uint32, with
                nothing between them
  00000.table   that the shard is finished: a checksum, and as an .npz its
                Table, with the parts of its documents and a checksum of each
                block of ids

Which documents make which shard is the same for any number of machines: a shard
is made of neighbouring files, so many that they have sources.SHARD_BYTES of
text, or a sources.MOST_SHARDS-th of all. A larger file is a shard of its own.
What is held out follows from the number of a document, so that a folder serves
every data.holdout_every. A process keeps the tables of TABLES shards and some
blocks in memory, and reads the others as it needs them.

An entry of the cache is named by the paths, sizes and times of the source's
files and by the tokenizer, so it is never stale, and is shared by all runs,
whatever their split, length or seed. A build that was killed goes on where it
was. Of several processes that want the same entry, on hosts that share the
folder, one reads the text and the others wait: file locks see to it (where a
file system has none, all build, and all write the same).
"""

from collections.abc import Iterator
from concurrent import futures
import functools
import hashlib
import io
import json
import os
import threading
from typing import Any, NamedTuple
import zlib

from etils import epath
import numpy as np

from common.errors import EnvironmentFailure, require, shorten
from training.data import conversations, labelled
from training.data.tokenizers import Tokenizer
from training.workdir import storage

# The kinds of a part of a document: text, one of a pair, or of a conversation.
KINDS_OF_PARTS = ('text', *labelled.PAIR, *conversations.KINDS_OF_PARTS)
FORMAT_VERSION = 3  # raise it when the layout changes
BEGUN_FILE = 'begun.json'
BLOCK_BYTES = 1 << 14  # of ids, with one checksum
MOST_TABLES, MOST_BLOCKS = 64, 1024  # kept in memory: the blocks are 16 MiB
NUM_THREADS = 32  # each waits for a small file
# The values of eval.part: all held-out documents, or one of every two.
HELD_OUT_PARTS = ('', 'first', 'second')

# numpy parses the header of an array with `ast`, which fails in Python 3.11 if
# several threads do so at the same time ("AST constructor recursion depth
# mismatch").
_LOCK_OF_PARSER = threading.Lock()


def select_documents(numbers: np.ndarray, holdout_every: int | None, split: str,
                     part: str = '') -> np.ndarray:
  """Selects which documents of a data source belong to the training data, or to
  the held-out data. One document in `holdout_every` is held out, the first.

  Args:
    numbers: int64 [N], the numbers of the documents in the source.
    holdout_every: data.holdout_every; 0: none is held out; None: the source is
      only for evaluation (data.eval_source) or only for training, and all
      belong to it.
    split: 'train' for the data to train on, or 'eval' for the held-out data.
    part: eval.part, the half of the held-out documents that is read, 'first' or
      'second'; '': all.

  Returns:
    bool [N], whether each document is selected.
  """
  # Select the documents of the split. The held-out documents have the numbers
  # 0, 1, 2, ... in `numbers_if_held_out`; the others' are not used.
  if holdout_every is None:
    is_selected = np.ones(len(numbers), bool)
    numbers_if_held_out = numbers
  else:
    is_held_out = np.zeros(len(numbers), bool)
    if holdout_every:
      is_held_out = numbers % holdout_every == 0
    is_selected = is_held_out if split == 'eval' else ~is_held_out
    numbers_if_held_out = numbers // max(holdout_every, 1)

  # Held-out documents belong to the two parts in turn: the even ones to the
  # first part, the odd ones to the second.
  if part and split == 'eval':
    remainder = {'first': 0, 'second': 1}[part]
    is_selected = is_selected & (numbers_if_held_out % 2 == remainder)
  return is_selected


class Table(NamedTuple):
  """The sizes and kinds of the documents of one shard (a file of tokens).

  Attributes:
    sizes: int64 [parts], the number of ids of each part of a document.
    bytes: int64 [parts], the bytes of its text in UTF-8.
    kinds: uint8 [parts], indices into KINDS_OF_PARTS.
    counts: int64 [documents], the parts of each document.
    checksums: uint32 [blocks], the CRC-32 of each block of ids.
  """
  sizes: np.ndarray
  bytes: np.ndarray
  kinds: np.ndarray
  counts: np.ndarray
  checksums: np.ndarray

  def totals_of_documents(self) -> np.ndarray:
    """Returns the numbers of ids and of bytes of each document, int64 [2,
    documents]."""
    # Ids and bytes are known by part. What stands before the end of a document,
    # less what stands before its start, is in the document.
    ends = np.cumsum(self.counts)
    totals = np.stack([sizes_to_bounds(self.sizes),
                       sizes_to_bounds(self.bytes)])
    return totals[:, ends] - totals[:, ends - self.counts]


class Tokens:
  """A complete folder of tokens, whose blocks are read as they are needed.

  Attributes:
    folder: the path of the folder.
    begun: the content of begun.json.
    table: number of a shard -> its Table.
  """

  def __init__(self, folder: epath.Path, begun: dict[str, Any]):
    self.folder = folder
    self.begun = begun
    self._dtype = np.dtype(begun['dtype'])
    self.table = functools.lru_cache(MOST_TABLES)(self._table)
    self._block = functools.lru_cache(MOST_BLOCKS)(self._read_block)

  def tables(self) -> Iterator[Table]:
    """Yields the tables of all shards, in order."""
    with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
      yield from pool.map(self.table, range(self.begun['shards']))

  def read(self, shard: int, first: int, end: int) -> np.ndarray:
    """Reads some token ids of a shard, which is one file of tokens.

    Args:
      shard: the number of the shard.
      first: the index of the first id in the shard.
      end: the index after the last id.
    """
    # Read whole blocks, as only these have a checksum. They are also kept in
    # memory. -(-a // b) rounds the quotient up, to include the last block.
    size = BLOCK_BYTES // self._dtype.itemsize
    blocks = range(first // size, -(-end // size))
    ids_of_blocks = [self._block(shard, block) for block in blocks]

    # One block needs no copy. With no block at all, where end is first, the
    # empty array in front gives concatenate something to return.
    if len(ids_of_blocks) == 1:
      joined = ids_of_blocks[0]
    else:
      joined = np.concatenate([np.zeros(0, self._dtype), *ids_of_blocks])

    # Cut off what the blocks have before and after the ids.
    start = blocks.start * size
    return joined[first - start:end - start]

  def _read_block(self, shard: int, block: int) -> np.ndarray:
    """Reads a block of BLOCK_BYTES bytes of a shard, and checks its checksum.

    Args:
      shard: the number of the shard, which is one file of tokens.
      block: the number of the block in the file.

    Returns:
      The token ids of the block.

    Raises:
      EnvironmentFailure: for a wrong checksum.
    """
    path = f'{self.folder}/{shard:05}.tokens'
    data = read_bytes(path, start=block * BLOCK_BYTES,
                      end=(block + 1) * BLOCK_BYTES)
    if zlib.crc32(data) != self.table(shard).checksums[block]:
      raise damaged_file(path, f'block {block:,} has another checksum')
    return np.frombuffer(data, self._dtype)

  def _table(self, shard: int) -> Table:
    """Reads the table of a shard, which describes the documents in its file of
    tokens.

    Args:
      shard: the number of the shard.

    Raises:
      EnvironmentFailure: for a wrong checksum, or a file of tokens that has not
        the size of these documents.
    """
    # The file has a checksum of four bytes, followed by an .npz file.
    path = self.folder / f'{shard:05}.table'
    content_with_checksum = path.read_bytes()
    checksum = content_with_checksum[:4]
    content = content_with_checksum[4:]
    # Refuse an empty content: its checksum is 0, so a file of zeros would pass.
    if not content or checksum != zlib.crc32(content).to_bytes(4, 'little'):
      raise damaged_file(path, 'it has another checksum')

    # np.load reads an array only when it is asked for, so this too must be
    # under the lock.
    with _LOCK_OF_PARSER:
      arrays = np.load(io.BytesIO(content))
      table = Table(**{name: arrays[name] for name in Table._fields})

    # Compare the size of the file of tokens with that of all documents. Its
    # content is checked block by block when it is read.
    tokens_path = self.folder / f'{shard:05}.tokens'
    wanted_size = int(table.sizes.sum()) * self._dtype.itemsize
    size = storage.file_size(tokens_path)
    if size != wanted_size:
      raise damaged_file(tokens_path,
                         f'{size:,} bytes, and not {wanted_size:,}')
    return table


class Split:
  """The documents of a folder that belong to a split, as one stream of ids:
  separator, document, separator, ... document, separator.

  Attributes:
    tokens: the tokens of the folder.
    kinds: the kinds of all the folder's documents, as KINDS has them.
    documents: how many there are; `of`, in all.
    num_tokens: the tokens of the stream, less the separator that it begins
      with.
    num_bytes: the bytes of the text.
  """

  def __init__(self, tokens: Tokens, holdout_every: int | None, split: str,
               part: str, separator: int):
    """Finds the documents of a folder of tokens that belong to the training
    data, or to the held-out data.

    Their tokens make one stream: document, separator, document, and so on.

    Args:
      tokens: the tokens of the folder, in several files, called shards.
      holdout_every, split, part: the arguments of `select_documents`.
      separator: the id of the token between two documents.
    """
    self.tokens = tokens
    self._selection = (holdout_every, split, part)
    self._separator = separator
    # Count the selected documents of each shard, their tokens and their bytes.
    # Documents are numbered through all shards, as `select_documents` needs.
    kinds: set[int] = set()
    counts = []
    totals = []
    first = 0
    for table in tokens.tables():
      count = len(table.counts)
      is_selected = select_documents(first + np.arange(count), *self._selection)
      sizes, num_bytes = table.totals_of_documents()[:, is_selected].sum(1)
      totals.append([is_selected.sum(), sizes, num_bytes])
      counts.append(count)
      kinds.update(np.unique(table.kinds).tolist())
      first += count

    # Find where each shard begins, in documents and in the stream, which has a
    # separator after each document.
    self.kinds = frozenset(KINDS_OF_PARTS[kind] for kind in kinds)
    self._firsts = sizes_to_bounds(counts)
    documents, sizes, num_bytes = np.array(totals, np.int64).T
    self._starts = sizes_to_bounds(documents + sizes)
    self.documents = int(documents.sum())
    self.num_documents_of_folder = int(self._firsts[-1])
    self.num_tokens = int(self._starts[-1])
    self.num_bytes = int(num_bytes.sum())
    self._places = functools.lru_cache(MOST_TABLES)(self._find_places)

  def fill(self, tokens: np.ndarray, first: int) -> None:
    """Copies a part of the stream of tokens into an array. The stream is
    separator, document, separator, document, and so on.

    Args:
      tokens: the array to fill. It must be full of separators, as these are not
        written. If the stream ends before, the rest is left as it is.
      first: the index in the stream of the first token to copy.
    """
    # `place` and `end` do not count the separator before the first document, so
    # they are one less than indices of the stream.
    place = max(first - 1, 0)
    end = min(first - 1 + len(tokens), self.num_tokens)

    # Go from shard to shard (files of tokens): find the one with this place,
    # and copy as much as the array has room for. If several shards begin at the
    # same place, side='right' takes the last one, as the others are empty.
    while place < end:
      shard = int(np.searchsorted(self._starts, place, side='right')) - 1
      shard_start, stop = map(int, self._starts[shard:shard + 2])
      stop = min(stop, end)
      index = place - first + 1  # in the array
      self._fill_from(shard, tokens=tokens[index:index + stop - place],
                      first=place - shard_start)
      place = stop

  def _fill_from(self, shard: int, tokens: np.ndarray, first: int) -> None:
    """Copies a part of a shard's stream into an array. A shard is one file of
    tokens, and its stream is document, separator, document, and so on.

    Args:
      shard: the number of the shard.
      tokens: the array to fill. It must be full of separators, as these are not
        written.
      first: the index in the shard's stream of the first token to copy.
    """
    # Find the first and the last document with tokens between `first` and
    # `end`. `starts` has the start of each document in the stream, and `begins`
    # that in the file.
    starts, begins = self._places(shard)
    end = first + len(tokens)
    lowest = int(np.searchsorted(starts, first, side='right')) - 1
    highest = int(np.searchsorted(starts, end - 1, side='right')) - 1

    for number in range(lowest, highest + 1):
      # Find the part of the document that belongs into the array. A separator
      # follows each document, so it ends one token before the next one starts.
      start = int(starts[number])
      stop = int(starts[number + 1]) - 1
      part_start = max(start, first)
      part_stop = min(stop, end)
      if part_start >= part_stop:
        continue
      # The file has no separators, and it also has documents that are not
      # selected. So an index in the file differs from that in the stream.
      shift = int(begins[number]) - start
      part = self.tokens.read(shard, part_start + shift, part_stop + shift)
      tokens[part_start - first:part_stop - first] = part

  def _find_places(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds where the selected documents of a shard begin. A shard is one file
    of tokens.

    Args:
      shard: the number of the shard.

    Returns:
      int64 [N + 1], where each of the N documents begins in the shard's stream,
      and at last where that ends; and int64 [N], where each begins among the
      ids of the file.
    """
    # The number of tokens of each document in the file, selected or not.
    sizes, _ = self.tokens.table(shard).totals_of_documents()
    is_selected = self.select_in_shard(shard)

    # The stream has the selected documents alone, with a separator after each.
    starts_in_stream = sizes_to_bounds(sizes[is_selected] + 1)

    # The file has all documents, one right after the other. The last bound is
    # the end of the file, where no document begins.
    starts_in_file = sizes_to_bounds(sizes)[:-1]
    return starts_in_stream, starts_in_file[is_selected]

  def select_in_shard(self, shard: int) -> np.ndarray:
    """Returns bool [documents]: which documents of a shard belong to the split.
    """
    numbers = np.arange(self._firsts[shard], self._firsts[shard + 1])
    return select_documents(numbers, *self._selection)


class Documents:
  """The documents of a split, each of which can be read by itself. The tables
  of all shards are kept in memory.

  Attributes:
    parts: int64 [parts + 1], where the parts of all documents begin and end.
    kinds: uint8 [parts], indices into KINDS_OF_PARTS.
    num_bytes: int64 [parts], the bytes of their texts.
    first, end: int64 [N], the first part of each document of the split, and the
      one after its last.
  """

  def __init__(self, split: Split):
    """Finds the parts and documents of a split in the tables of all shards.

    A shard is one file of tokens, and its table describes the documents in it.
    A document consists of one part, or of several, such as questions and
    answers.

    Args:
      split: the documents of a folder of tokens that belong to the training
        data or to the held-out data.
    """
    # Join the tables, so that parts are numbered through all shards.
    self._tokens = split.tokens
    tables = list(self._tokens.tables())
    sizes = np.concatenate([table.sizes for table in tables])
    counts = np.concatenate([table.counts for table in tables])
    self.num_bytes = np.concatenate([table.bytes for table in tables])
    self.kinds = np.concatenate([table.kinds for table in tables])
    self.parts = sizes_to_bounds(sizes)
    self._shards = sizes_to_bounds([table.sizes.sum() for table in tables])

    # Find the first part of each document of the split, and the one after its
    # last.
    is_selected = np.concatenate(
        [split.select_in_shard(shard) for shard in range(len(tables))])
    ends = np.cumsum(counts)
    self.first = (ends - counts)[is_selected]
    self.end = ends[is_selected]

  def __len__(self) -> int:
    return len(self.first)

  def read(self, first: int, end: int) -> np.ndarray:
    """Returns the ids `first` to `end` of all documents, as `parts` counts
    them; they must be of one document."""
    shard = int(np.searchsorted(self._shards, first, side='right')) - 1
    shard = min(shard, len(self._shards) - 2)
    start = int(self._shards[shard])
    return self._tokens.read(shard, int(first) - start, int(end) - start)

  def __getitem__(self, n: int) -> list[tuple[str, np.ndarray]]:
    """Returns the (kind, ids [T]) parts of document n of the split."""
    parts = []
    for p in range(self.first[n], self.end[n]):
      ids = self.read(self.parts[p], self.parts[p + 1])
      parts.append((KINDS_OF_PARTS[self.kinds[p]], ids))
    return parts


def load_tokens(text: str, name: str) -> Tokens:
  """Opens a folder of tokens.

  Args:
    text: the folder, on disk or in a bucket.
    name: the name of the source, for messages.

  Raises:
    RequestError: where there is none, or one that is half finished.
  """
  require(bool(text), f'data source {name!r} names no folder: write '
          'tokens:FOLDER or tokens:gs://BUCKET/NAME')
  folder = storage.checked_path(text, f'the folder of data source {name!r}'
                                ).expanduser()

  # It must have been begun by tools.tokenize, and every shard be finished: a
  # missing one would change the numbers of all documents after it.
  require((folder / BEGUN_FILE).exists(),
          f'data source {name!r} has no {BEGUN_FILE}, '
          'so it is no folder that tools.tokenize has written')
  begun = read_begun(folder)
  done = find_finished_shards(folder, begun)
  require(all(done), f'data source {name!r} is half finished, {sum(done)} of '
          f'{len(done)} shards: give the command that made it again, with '
          f'--out={folder}')
  return Tokens(folder, begun)


def read_begun(folder: epath.Path) -> dict[str, Any]:
  """Reads begun.json, which says what a folder of tokens is made of.

  Args:
    folder: the folder of tokens.

  Returns:
    The content of the file, without its checksum.

  Raises:
    EnvironmentFailure: for a damaged file.
    RequestError: for tokens of another format.
  """
  # A damaged file may be no JSON, no object, or nested too deeply to parse.
  try:
    begun = dict(json.loads(storage.read_small(folder / BEGUN_FILE)))
  except (TypeError, ValueError, RecursionError) as error:
    raise damaged_file(folder / BEGUN_FILE, 'it is no JSON') from error

  # The checksum is of everything else. A folder may be without one.
  checksum = begun.pop('checksum', None)
  if checksum is not None and checksum != digest_json(begun):
    raise damaged_file(folder / BEGUN_FILE, 'it has another checksum')
  written = begun.get('format')
  require(
      written == FORMAT_VERSION, f'{folder} has the format {shorten(written)} '
      f'of tokens, and this program reads {FORMAT_VERSION}: tokenise into '
      'another folder')
  return begun


def find_finished_shards(folder: epath.Path, begun: dict[str,
                                                         Any]) -> list[bool]:
  """Returns for each shard whether all its files are there."""
  names = {path.name for path in folder.iterdir()}
  are_there = []
  for i in range(begun['shards']):
    files = {f'{i:05}.tokens', f'{i:05}.table'}
    are_there.append(files <= names)
  return are_there


def check_tokenizer(tokens: Tokens, tokenizer: Tokenizer, name: str) -> None:
  """Raises RequestError for a tokenizer other than the one that made the
  tokens."""
  made = tokens.begun['tokenizer']
  require(made['fingerprint'] == tokenizer.fingerprint,
          f'data source {name!r} was tokenised with {made["name"]!r}, '
          f'{made["vocab_size"]:,} ids, and data.tokenizer is '
          f'{tokenizer.name!r}, which is another one: choose that of the '
          'tokens, or tokenise into another folder')


def sizes_to_bounds(sizes: Any) -> np.ndarray:
  """Returns where things of these sizes begin one after another, and where the
  last one ends, int64 [N + 1]."""
  return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def digest_json(described: Any) -> str:
  """Returns a hash of a value that JSON can hold."""
  return hashlib.blake2b(json.dumps(described).encode('utf-8'),
                         digest_size=16).hexdigest()


def read_bytes(path: str, start: int, end: int) -> bytes:
  """Reads a range of bytes of a file.

  Args:
    path: the file, on disk or in a bucket.
    start: the place of the first byte.
    end: the byte after the last one.

  Returns:
    The bytes; fewer where the file ends before.

  Raises:
    EnvironmentFailure: where the file cannot be read.
  """
  # pread needs no seek, so that several threads may read; and a file without a
  # buffer reads no more than it is asked for.
  try:
    if storage.is_in_bucket(path):
      return _open_buckets().cat_file(path, start=start, end=end)
    with open(path, 'rb', buffering=0) as file:
      return os.pread(file.fileno(), end - start, start)
  except Exception as error:  # those of a bucket's client have many types
    why = storage.environment_reason(error)
    if not why:
      raise
    raise EnvironmentFailure(
        f'{path} cannot be read: {why}; once that is mended, the same command '
        'goes on') from error


@functools.cache
def _open_buckets() -> Any:
  """Returns the file system of Google's buckets, of the package fsspec."""
  import fsspec
  storage.checked_path('gs://bucket/folder',
                       'data.source')  # sees what others write
  return fsspec.filesystem('gs')


def damaged_file(path: Any, why: str) -> EnvironmentFailure:
  """Returns the failure that a file of tokens is damaged.

  Args:
    path: the path of the file.
    why: the end of the message: what is wrong with the file.
  """
  return EnvironmentFailure(
      f'{path} is damaged ({why}): delete it, and the command that made the '
      'folder makes it again')
