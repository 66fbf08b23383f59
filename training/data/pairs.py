"""Sequence to sequence: pairs of a source and a target, read and laid out.

`parallel:GLOB` names files of pairs, one a line: source, a tab, target, or in
a file that ends in .jsonl an object with `source` and `target`. From plain
text pairs are cut: a stretch of data.length tokens, and as its target the
data.target_length tokens that follow it. So every model can be tried on the
default corpus, where it learns to go on with a text.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from configs.errors import RequestError
from training.data import texts

KINDS = ('source', 'target')


class Pair(NamedTuple):
  """Attributes:
    source, target: token ids, of any length.
    whole: whether both end there, and not in the middle of a text.
  """
  source: np.ndarray
  target: np.ndarray
  whole: bool


def read(path: str) -> Iterator[list[tuple[str, str]]]:
  """Yields the (kind, text) parts of each pair of a file.

  Raises:
    ValueError: naming the line that is none.
  """
  split = _from_json if path.endswith('.jsonl') else _from_tsv
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      where = f'{path}, line {number},'
      text = texts.decoded(line, where).rstrip('\r\n')
      if text.strip():
        yield list(zip(KINDS, split(text, where)))


def _from_tsv(line: str, where: str) -> list[str]:
  fields = line.split('\t')
  if len(fields) != 2:
    raise RequestError(f'{where} has {len(fields)} fields: a pair is a source, '
                       'one tab and a target.')
  return fields


def _from_json(line: str, where: str) -> list[str]:
  record = texts.parsed(line, where)
  pair = [record.get(kind) if isinstance(record, dict) else None
          for kind in KINDS]
  if not all(isinstance(text, str) for text in pair):
    raise RequestError(f'{where} is no pair: an object with source and target.')
  return [texts.checked(text, where) for text in pair]


def start_id(tokenizer) -> int:
  """The token that a target starts after: padding, as in T5 and Marian."""
  return tokenizer.special_ids.get('pad', tokenizer.separator_id)


def lengths(config) -> tuple[int, int]:
  """Tokens of a source and of a target: M and L."""
  return config.data.length, config.data.target_length or config.data.length


def seq2seq(pair: Pair, rng: np.random.Generator, config,
            tokenizer) -> dict[str, np.ndarray]:
  """Lays out one pair; what is longer than its row is cut off.

  Returns:
    what `lay_out` does, for rows of `lengths(config)`.
  """
  del rng
  source, target = pair.source, pair.target
  if pair.whole:
    source = np.append(source, tokenizer.separator_id)
    target = np.append(target, tokenizer.separator_id)
  return lay_out(source, target, *lengths(config), start_id(tokenizer))


def lay_out(source, target, M: int, L: int, start: int
            ) -> dict[str, np.ndarray]:
  """Returns one row for an encoder-decoder.

  tokens, segment_ids [M]: the source; 0 where it is padding. decoder_tokens,
  decoder_segment_ids [L]: the start, then the target but its last token.
  targets [L], and weights [L]: 1 where there is one.
  """
  source, target = source[:M], target[:L]
  def pad(ids, size):
    return np.pad(ids, (0, size - len(ids)), constant_values=start).astype(
        np.int32)
  def real(size, row):
    return np.arange(row) < size
  return dict(
      tokens=pad(source, M),
      segment_ids=real(len(source), M).astype(np.int32),
      decoder_tokens=pad(np.concatenate([[start], target[:-1]])[:L], L),
      decoder_segment_ids=real(len(target), L).astype(np.int32),
      targets=pad(target, L),
      weights=real(len(target), L).astype(np.float32))
