"""Views: what raw material an objective is fed, by index, from a corpus.

A view is a sequence: `len(view)` raw items and `view[i]` in constant time,
so an item is read wherever the order of a run puts it. It also says how much
text one pass sees: `num_tokens` predicted and `num_bytes` of text. To give an
objective other material (documents, pairs, conversations), write a class
that takes a Corpus, and list it in VIEWS.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from training import sources, token_cache


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The documents of one source that belong to one split.

  Attributes:
    name: the source, for messages.
    cache: the tokens of all documents of the source.
    document_ids: int64 [N], the documents of this split.
    split: 'train' or 'eval'.
    tokenizer: see tokenizers.load.
    config: the run's.
  """

  name: str
  cache: token_cache.TokenCache
  document_ids: np.ndarray
  split: str
  tokenizer: Any
  config: Any


class Window(NamedTuple):
  """A stretch of the stream: tokens [length + 1] int32, the first `size` real.
  """

  tokens: np.ndarray
  size: int


class Windows:
  """Windows over the stream: separator, document, separator, ... separator.

  Window i is stream[i L : i L + L + 1], so each overlaps the next by one
  token, and each token of the stream except the first separator is a target
  exactly once. In the 'eval' split the last window may be short, padded with
  separators; in 'train' a short last window is left out.
  """

  def __init__(self, corpus: Corpus):
    cache, ids = corpus.cache, corpus.document_ids
    if cache.kinds.any():
      kinds = ', '.join(sources.KINDS[k] for k in np.unique(cache.kinds))
      raise ValueError(
          f'objective {corpus.config.objective!r} reads plain text, but data '
          f'source {corpus.name!r} holds parts of the kinds {kinds}.')
    self.length = corpus.config.data.length
    self.separator = corpus.tokenizer.separator_id
    self._cache = cache
    self._first_token = cache.parts[cache.documents[ids]]
    sizes = cache.parts[cache.documents[ids + 1]] - self._first_token
    # Where each document's separator stands in the stream; then the last one.
    self._starts = np.concatenate([[0], np.cumsum(sizes + 1)])
    self.num_tokens = int(self._starts[-1])
    byte_bounds = np.concatenate([[0], np.cumsum(cache.num_bytes)])
    self.num_bytes = int(np.sum(byte_bounds[cache.documents[ids + 1]]
                                - byte_bounds[cache.documents[ids]]))
    full, rest = divmod(self.num_tokens, self.length)
    self._len = full + (rest > 0 and corpus.split == 'eval')
    if not self._len:
      raise ValueError(
          f'data source {corpus.name!r} has {self.num_tokens} training '
          f'tokens, fewer than one sequence of data.length={self.length}.')

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, i: int) -> Window:
    first = int(i) * self.length
    last = min(first + self.length, self.num_tokens)  # Inclusive.
    tokens = np.full(self.length + 1, self.separator, np.int32)
    stored = self._cache.tokens
    k = int(np.searchsorted(self._starts, first, side='right')) - 1
    # Document k occupies the stream from begin up to, without, its end, which
    # is the separator that the array was filled with.
    while k < len(self._first_token) and self._starts[k] < last:
      begin, end = int(self._starts[k]) + 1, int(self._starts[k + 1])
      low, high = max(begin, first), min(end, last + 1)
      if low < high:
        offset = int(self._first_token[k]) - begin
        tokens[low - first:high - first] = stored[low + offset:high + offset]
      k += 1
    return Window(tokens, last - first + 1)


class Joined:
  """Several views of one kind, one after the other."""

  def __init__(self, views):
    self._views = views
    self._starts = np.cumsum([0] + [len(view) for view in views])

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, i: int):
    which = int(np.searchsorted(self._starts, i, side='right')) - 1
    return self._views[which][i - int(self._starts[which])]


VIEWS = {
    'windows': Windows,
}
