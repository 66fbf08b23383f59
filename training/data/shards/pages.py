"""Pages: a table of records as a file, of which a look reads two small pieces.

A row tells of a record how many tokens of each class come before it in its
shard, and where its chunk is in the ArrayRecord file. Pages of ROWS rows, each
with its CRC-32, stand one after the other; behind them the root, the first row
of each page, with its own. A token of a set of classes is found by the root,
then by one page.
"""

import collections
from collections.abc import Callable
import struct
import threading
from typing import Any, Generic, TypeVar
import zlib

import numpy as np

ROWS = 256
# A document is of one of these. Held out is each `every`-th, of which the even
# ones are the first half for eval.part, the odd ones the second. Of the others
# it only matters whether their number is even.
EVEN, ODD, FIRST, SECOND = range(4)
CLASSES = 4
COLUMNS = CLASSES + 2  # and the chunk's place and size
PAGE_BYTES = ROWS * COLUMNS * 8 + 4

Value = TypeVar('Value')


def classes(numbers: np.ndarray, every: int) -> np.ndarray:
  """Returns the class of documents.

  Args:
    numbers: int64 [N], their places in the source.
    every: data.holdout_every.
  """
  found = numbers % 2
  if every:
    held = numbers % every == 0
    found = np.where(held, FIRST + numbers // every % 2, found)
  return found


def of_set(every: int, held_out: bool | None, part: str = '') -> list[int]:
  """Returns the classes that a split is made of.

  Args:
    every: data.holdout_every, as given to `classes`.
    held_out: whether documents held out are wanted, or others; None: all.
    part: eval.part: '', 'first' or 'second' of every two documents.
  """
  if held_out is None:
    halves = {'first': [EVEN, FIRST], 'second': [ODD]}
    halves['second' if every % 2 else 'first'].append(SECOND)
    return halves.get(part, [EVEN, ODD, FIRST, SECOND])
  if not held_out:
    return [EVEN, ODD]
  return {'first': [FIRST], 'second': [SECOND]}.get(part, [FIRST, SECOND])


def encode(rows: np.ndarray) -> bytes:
  """Returns the file of a table, int64 [records, COLUMNS]."""
  pages = [rows[i:i + ROWS] for i in range(0, len(rows), ROWS)]
  last = np.repeat(rows[-1:], -len(rows) % ROWS, axis=0)
  pages[-1] = np.concatenate([pages[-1], last])
  return b''.join([*map(_checked, pages), _checked(rows[::ROWS])])


def decode(data: bytes) -> np.ndarray:
  """Returns the rows of a page or root; ValueError: it is damaged."""
  if len(data) < 5 or zlib.crc32(data[:-4]) != struct.unpack(
      '<I', data[-4:])[0]:
    raise ValueError('its checksum does not fit')
  return np.frombuffer(data[:-4], '<i8').reshape(-1, COLUMNS)


def place(records: int, page: int | None) -> tuple[int, int]:
  """Returns where a page, or the root, begins and ends in its file."""
  count = -(-records // ROWS)
  if page is not None:
    return page * PAGE_BYTES, (page + 1) * PAGE_BYTES
  return count * PAGE_BYTES, count * PAGE_BYTES + count * COLUMNS * 8 + 4


def _checked(rows: np.ndarray) -> bytes:
  data = np.ascontiguousarray(rows, '<i8').tobytes()
  return data + struct.pack('<I', zlib.crc32(data))


class Cache(Generic[Value]):
  """What was read last, up to a number of bytes; for several threads.

  Args:
    most: bytes.
    size: value -> its bytes.
  """

  def __init__(self, most: int, size: Callable[[Value], int]):
    self._most, self._size = most, size
    self._kept: collections.OrderedDict[Any, Value] = collections.OrderedDict()
    self._lock = threading.Lock()
    self.bytes = 0

  def get(self, key: Any, make: Callable[[], Value]) -> Value:
    """Returns the value of a key, which `make` returns where it is not kept."""
    with self._lock:
      if key in self._kept:
        self._kept.move_to_end(key)
        return self._kept[key]
    value = make()  # without the lock: it may take a while
    with self._lock:
      if key not in self._kept:
        self._kept[key] = value
        self.bytes += self._size(value)
      while self.bytes > self._most and len(self._kept) > 1:
        self.bytes -= self._size(self._kept.popitem(last=False)[1])
    return value
