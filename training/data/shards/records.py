"""Records of tokens, and how one is found in an ArrayRecord file.

A record holds RECORD_TOKENS tokens, of a shard's last one what is left:

  uint32 checksum   CRC-32 of all that follows
  uint32 ends       how many documents end in it
  uint64 document   the number in its shard of the first token's document
  uint16 [ends]     where they end, counted in tokens from its beginning
  uint16 or uint32  the tokens, with nothing between documents

ArrayRecord is a layout of Riegeli's records
(github.com/google/riegeli, doc/riegeli_records_file_format.md): chunks of a
header of 40 bytes and data; a block header of 24 bytes at each multiple of 64
KiB, wherever in a chunk that is. With a record a chunk and no compression, the
record is the end of the data. So a record whose place is known takes one read,
from a bucket too, where array_record would read the list of all records of the
file first.
"""

from collections.abc import Iterator
import struct
from typing import NamedTuple
import zlib

import numpy as np

RECORD_TOKENS = 8192
OPTIONS = 'group_size:1,uncompressed'
BLOCK, BLOCK_HEADER = 1 << 16, 24
_FIRST_CHUNK = 64  # after the signature of the file
_CHUNK = struct.Struct('<5Q')  # hash, size, hash of the data; type; decoded
_HEAD = struct.Struct('<IIQ')
_RECORDS, _PADDING = ord('r'), ord('p')


class Record(NamedTuple):
  """What a record holds.

  Attributes:
    document: the number in its shard of the document of the first token.
    ends: where documents end, int64 [documents that end in it].
    tokens: [T] uint16 or uint32.
  """
  document: int
  ends: np.ndarray
  tokens: np.ndarray


def encode(record: Record) -> bytes:
  """Returns the bytes of a record."""
  rest = struct.pack('<IQ', len(record.ends), record.document) + (
      record.ends.astype('<u2').tobytes() + record.tokens.tobytes())
  return struct.pack('<I', zlib.crc32(rest)) + rest


def decode(data: bytes, dtype: np.dtype) -> Record:
  """Returns a record; ValueError: it is none, or it is damaged."""
  if len(data) < _HEAD.size or zlib.crc32(data[4:]) != struct.unpack_from(
      '<I', data)[0]:
    raise ValueError('its checksum does not fit')
  _, count, document = _HEAD.unpack_from(data)
  ends = np.frombuffer(data, '<u2', count, _HEAD.size)
  return Record(document, ends.astype(np.int64),
                np.frombuffer(data, dtype, offset=_HEAD.size + 2 * count))


class Pending:
  """Cuts documents into records.

  A document ends in the record of its last token; one without tokens, where the
  one before it ends (`splits.table` relies on it).
  """

  def __init__(self, dtype: np.dtype):
    self._tokens = np.zeros(0, dtype)
    self._ends: list[np.ndarray] = []  # counted from the record's beginning
    self._first = 0  # document of the record

  def add(self, tokens: np.ndarray, sizes: np.ndarray) -> Iterator[Record]:
    """Takes documents; yields the records that are full and not the last.

    Args:
      tokens: [T] of all the documents.
      sizes: int64 [N], the tokens of each.
    """
    ends = len(self._tokens) + np.cumsum(sizes)
    tokens = np.concatenate([self._tokens, tokens])
    at = 0
    while len(tokens) - at > RECORD_TOKENS:
      inside = int(np.searchsorted(ends, at + RECORD_TOKENS, side='right'))
      yield self._record(tokens[at:at + RECORD_TOKENS], ends[:inside] - at)
      ends, at = ends[inside:], at + RECORD_TOKENS
    self._tokens = tokens[at:]
    self._ends.append(ends - at)

  def rest(self) -> Iterator[Record]:
    """Yields the last record."""
    if len(self._tokens) or self._ends:
      yield self._record(self._tokens, np.zeros(0, np.int64))

  def _record(self, tokens: np.ndarray, ends: np.ndarray) -> Record:
    ends = np.concatenate([*self._ends, ends])
    record = Record(self._first, ends, tokens)
    self._first += len(ends)
    self._ends = []
    return record


def places(data: bytes | memoryview) -> np.ndarray:
  """Returns where the chunks of an ArrayRecord file's records begin, and how
  many bytes of the file each takes, int64 [records, 2]."""
  found, at = [], _FIRST_CHUNK
  while at < len(data):
    header, after = _stripped(data, at, _CHUNK.size)
    _, size, _, kind, _ = _CHUNK.unpack(header)
    if kind & 255 == _PADDING:  # what follows is the list of records
      break
    after = _end(after, size)
    found.append((at, after - at))
    at = after
  # The last chunk before the padding is the writer's own.
  return np.array(found[:-1], np.int64).reshape(-1, 2)


def of_chunk(data: bytes, at: int) -> bytes:
  """Returns the record of a chunk.

  Args:
    data: the bytes of the file that the chunk takes.
    at: where they begin in the file.

  Raises:
    ValueError: where this is no such chunk.
  """
  try:
    parts, left = [], memoryview(data)
    while left:
      if at % BLOCK == 0:
        left, at = left[BLOCK_HEADER:], at + BLOCK_HEADER
      take = min(len(left), BLOCK - at % BLOCK)
      parts.append(left[:take])
      left, at = left[take:], at + take
    chunk = b''.join(parts)
    _, size, _, kind, _ = _CHUNK.unpack_from(chunk)
    if kind != _RECORDS | 1 << 8 or size != len(chunk) - _CHUNK.size:
      raise ValueError('it is no chunk of one record')
    # No compression, the number of bytes that tell the size, the size.
    begin = _CHUNK.size + 2 + chunk[_CHUNK.size + 1]
    length = sum((byte & 127) << 7 * i for i, byte in enumerate(
        chunk[_CHUNK.size + 2:begin]))
    if chunk[_CHUNK.size] or length != len(chunk) - begin:
      raise ValueError('it is no chunk of one record')
  except (struct.error, IndexError) as error:
    raise ValueError('it is no chunk of one record') from error
  return chunk[begin:]


def _stripped(data: bytes | memoryview, at: int, size: int
              ) -> tuple[bytes, int]:
  """Returns `size` bytes from `at` on without block headers, and where what
  follows begins."""
  found = b''
  while len(found) < size:
    if at % BLOCK == 0:
      at += BLOCK_HEADER
    take = min(size - len(found), BLOCK - at % BLOCK)
    found += bytes(data[at:at + take])
    at += take
  return found, at


def _end(at: int, size: int) -> int:
  """Returns where `size` bytes from `at` on end, block headers left out."""
  while size:
    if at % BLOCK == 0:
      at += BLOCK_HEADER
    take = min(size, BLOCK - at % BLOCK)
    at, size = at + take, size - take
  return at
