"""Sentences with a label for each word, cut into the rows of batches.

A sentence that is longer than a row is shown in several, neighbours of which
share data.stride tokens (offsets.py). A label counts in the one row in which
its word's first token has the most context, in training and in evaluation.
"""

from typing import Any, NamedTuple

import numpy as np

from configs.errors import one_of, require, short
from training.data import conll, offsets, packing, records

AROUND = 2  # tokens of a row beside the sentence's: one before, one after it
MOST_LABELS = 1000


class Piece(NamedTuple):
  """What a row shows of a sentence.

  Attributes:
    ids: int32 [T].
    targets: int32 [T], the number of the label that counts here, or 0.
    weights: float32 [T], what that counts in the loss; 0: nothing.
    sentence: which one it is of.
    words: int32 [T], the word whose label that is; offsets.NO_WORD: none.
  """
  ids: np.ndarray
  targets: np.ndarray
  weights: np.ndarray
  sentence: int
  words: np.ndarray


class Sentences:
  """The rows of a split.

  Attributes:
    records: the sentences, by conll.read.
    items: a Piece for each row.
    labels: of the run, by number.
    num_tokens, num_bytes: of the text.
  """
  RECORDS = conll.KIND

  def __init__(self, corpus: packing.Corpus):
    config = corpus.config
    self.records = [corpus.cache[i] for i in corpus.document_ids]
    self.labels = labels_of(config)
    number = {label: i for i, label in enumerate(self.labels)}
    if conll.marks_entities(self.labels):
      for sentence in self.records:
        conll.check_entities(sentence)
    room = config.data.length - AROUND
    require(room > 0, f'data.length is {config.data.length}: a row of a '
            f'sentence needs {AROUND + 1} or more')
    tokens = offsets.of_words([s.words for s in self.records],
                              corpus.tokenizer)
    self.items: list[Piece] = []
    for i, (sentence, words) in enumerate(zip(self.records, tokens)):
      for label, where in zip(sentence.labels, sentence.lines):
        one_of(f'label in {where}:', label, number)
      numbers = np.array([number[label] for label in sentence.labels])
      shared = stride(config, room, sentence.lines[0])
      self.items += _pieces(i, words, numbers, shared, room)
    self.num_tokens = sum(len(words.ids) for words in tokens)
    self.num_bytes = sum(len(' '.join(s.words).encode('utf-8'))
                         for s in self.records)

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, i: int) -> Piece:
    return self.items[int(i)]


def _pieces(sentence: int, words: offsets.Words, numbers: np.ndarray,
            shared: int, room: int) -> list[Piece]:
  """Returns the rows of one sentence, with `numbers` for its words."""
  size = len(words.ids)
  windows = offsets.windows(size, room, shared)
  owner_T = offsets.owners(windows, size)
  pieces = []
  for i, (first, end) in enumerate(windows):
    counts_T = words.first_T[first:end] & (owner_T[first:end] == i)
    own_T = np.where(counts_T, words.words_T[first:end], offsets.NO_WORD)
    targets_T = np.where(counts_T, numbers[own_T], 0)
    pieces.append(Piece(words.ids[first:end], targets_T.astype(np.int32),
                        counts_T.astype(np.float32), sentence, own_T))
  return pieces


def stride(config: Any, room: int, where: str) -> int:
  """Returns how many tokens two neighbouring windows share.

  Args:
    config: a run's: its data.stride, or where that is 0 a third of data.length,
      as in BERT's 128 of 384, but at most half a window.
    room: tokens of a window.
    where: what is shown in it, for messages.

  Raises:
    RequestError: where nothing of a window would be new.
  """
  data = config.data
  if not data.stride:
    return min(data.length // 3, room // 2)
  require(data.stride < room, f'data.stride is {data.stride}, but in '
          f'data.length {data.length} there is room for {room} tokens of '
          f'{where}: choose a smaller stride, or a larger length')
  return data.stride


def labels_of(config: Any) -> tuple[str, ...]:
  """Returns the labels of a run: data.labels, or those of its training data,
  by the alphabet.

  Raises:
    RequestError: for one label alone, or so many that they may be words.
  """
  if config.data.labels:
    return tuple(config.data.labels)
  found = {label for sentence in records.of_training(config)
           for label in sentence.labels}
  source = config.data.source
  require(len(found) > 1, f'data source {source!r} has one label, '
          f'{short("".join(found))}, for all words: choose other COLUMNS')
  require(len(found) <= MOST_LABELS, f'data source {source!r} has '
          f'{len(found):,} labels: is the second of its COLUMNS that of the '
          'labels?')
  return tuple(sorted(found))
