"""A split of the tokens of a folder of shards, as one stream of tokens.

The stream is separator, document, separator, ... document, separator, as in
packing.Windows. A look goes from a place in the stream to the shard, by a row
of numbers in memory; to the record, by the two pieces of pages.py; and reads
that record. So the memory of a process does not depend on the tokens: it is 24
bytes for each shard, of which there are at most 2 plan.MOST_SHARDS + 1, and
PAGES_BYTES + RECORDS_BYTES of what was read last.
"""

from typing import Any

import numpy as np

from configs.errors import require
from training.data.shards import files
from training.data.shards import folder as folders
from training.data.shards import pages, records

PAGES_BYTES = 64 << 20
RECORDS_BYTES = 4 << 20


class Split:
  """The documents of a split, as a stream.

  Attributes:
    num_tokens: of the stream, less the separator that it begins with.
    num_bytes: of the text.
    documents: how many there are; `of`, in all.
  """

  def __init__(self, index: folders.Index, every: int, wanted: list[int],
               separator: int):
    """Args:
      index: of a folder that is whole.
      every: of which split-EVERY is read.
      wanted: the classes, see pages.of_set.
      separator: the token between documents.
    """
    self._folder = index.folder
    self._dtype = np.dtype(index.described['dtype'])
    self._every, self._wanted, self._separator = every, wanted, separator
    self._records = np.array([s['records'] for s in index.shards], np.int64)
    counts, sizes, num_bytes = _totals(index, every)[:, :, wanted].sum(2).T
    self._starts = np.concatenate([[0], np.cumsum(sizes + counts)])
    self.num_tokens = int(self._starts[-1])
    self.num_bytes = int(num_bytes.sum())
    self.documents = int(counts.sum())
    self.of = int(index.described['documents'])
    # The number in the source of the first document of each shard.
    self._firsts = np.cumsum([0] + [s['documents'] for s in index.shards])
    self._forget()

  def _forget(self) -> None:
    self._pages = pages.Cache(PAGES_BYTES, lambda rows: rows.nbytes)
    self._read = pages.Cache(RECORDS_BYTES, lambda ids: ids.nbytes)

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {'_pages': None, '_read': None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._forget()

  def fill(self, tokens: np.ndarray, first: int) -> None:
    """Fills `tokens` with the stream from token `first` on, as far as it goes.
    """
    done = 0
    if first == 0:
      tokens[0], done = self._separator, 1
    at, end = first + done - 1, min(first + len(tokens), self.num_tokens + 1)
    while at < end - 1:
      shard = int(np.searchsorted(self._starts, at, side='right')) - 1
      ids, begin = self._around(shard, at - int(self._starts[shard]))
      ids = ids[begin:begin + end - 1 - at]
      tokens[done:done + len(ids)] = ids
      done, at = done + len(ids), at + len(ids)

  def _around(self, shard: int, at: int) -> tuple[np.ndarray, int]:
    """Returns the tokens of the split in the record that holds a token of a
    shard, and which one of them it is."""
    root = self._page(shard, None)
    page = int(np.searchsorted(root[:, 0], at, side='right')) - 1
    rows = self._page(shard, page)
    count = min(pages.ROWS, int(self._records[shard]) - page * pages.ROWS)
    row = int(np.searchsorted(rows[:count, 0], at, side='right')) - 1
    before, begin, size = map(int, rows[row])
    record = page * pages.ROWS + row
    ids = self._read.get((shard, record), lambda: self._ids(
        shard, record, begin, size))
    if at - before >= len(ids):
      raise files.damaged(self._name(shard), f'record {record:,} is another')
    return ids, at - before

  def _page(self, shard: int, page: int | None) -> np.ndarray:
    """Returns rows of how many tokens of the split come before a record, and
    where its chunk begins, and the bytes of that."""
    def make() -> np.ndarray:
      name = (f'{folders.split_name(self._every)}/{folders.number(shard)}'
              '.marks')
      data = files.read(self._folder, name, *pages.place(
          int(self._records[shard]), page))
      try:
        rows = pages.decode(data)
      except ValueError as error:
        raise files.damaged(f'{self._folder}/{name}', str(error)) from error
      return np.concatenate([rows[:, self._wanted].sum(1, keepdims=True),
                             rows[:, pages.CLASSES:]], axis=1)
    return self._pages.get((shard, page), make)

  def _ids(self, shard: int, number: int, begin: int, size: int) -> np.ndarray:
    """Returns the tokens of the split in a record, with separators."""
    name = folders.number(shard) + folders.SHARD
    data = files.read(self._folder, name, begin, begin + size)
    try:
      record = records.decode(records.of_chunk(data, begin), self._dtype)
    except ValueError as error:
      raise files.damaged(self._name(shard), f'record {number:,}: {error}'
                          ) from error
    ends = record.ends
    kinds = pages.classes(int(self._firsts[shard]) + record.document
                          + np.arange(len(ends) + 1), self._every)
    with_separators = np.insert(record.tokens.astype(np.int32), ends,
                                self._separator)
    lengths = np.diff(np.concatenate([[0], ends, [len(record.tokens)]]))
    lengths[:-1] += 1
    return with_separators[np.repeat(np.isin(kinds, self._wanted), lengths)]

  def _name(self, shard: int) -> str:
    return f'{self._folder}/{folders.number(shard)}{folders.SHARD}'


def split(index: folders.Index, name: str, every: int, held_out: bool | None,
          part: str, separator: int) -> Split:
  """Returns a split of a folder of shards, all of which are there.

  Args:
    index: of the folder.
    name: of the source, for messages.
    every: data.holdout_every; it is not read where held_out is None.
    held_out: whether to read what is held out, or what is not; None: all.
    part: eval.part.
    separator: the token between documents.

  Raises:
    RequestError: where it is not known what is held out.
    EnvironmentFailure: for a shard that is missing or cut short.
  """
  folders.check_shards(index)
  known = folders.splits(index.folder)
  if held_out is None or not every and not held_out:
    every, held_out = min(known, default=every), None
  require(every in known, f'data.holdout_every is {every}, and what it holds '
          f'out of data source {name!r} is not written down: choose from '
          f'{", ".join(map(str, known))}, or add it (no text is read) by '
          + folders.command(index.described, index.folder, every))
  return Split(index, every, pages.of_set(every, held_out, part), separator)


def _totals(index: folders.Index, every: int) -> np.ndarray:
  """Returns documents, tokens and bytes of each shard and class, int64
  [shards, 3, CLASSES]."""
  path = index.folder / f'{folders.split_name(every)}.json'
  found = np.array(folders.parsed(path)['shards'], np.int64)
  if found.shape != (len(index.shards), 3, pages.CLASSES) or (
      found[:, 1].sum() != index.described['tokens']):
    raise files.damaged(str(path), 'it is of other shards')
  return found
