"""Views: what raw material an objective is fed, by index, from a corpus.

A view is a sequence: `len(view)` raw items and `view[i]` in constant time,
so an item is read wherever the order of a run puts it. It also says how much
text one pass sees: `num_tokens` and `num_bytes` of it. To give an
objective other material (documents, pairs, conversations), write a class
that takes a Corpus, and list it in VIEWS.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from configs.errors import RequestError
from training.data import conversations, pairs, sources, token_cache


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The documents of one source that belong to one split.

  Attributes:
    name: the source, for messages.
    text: what of the source this is, in words.
    cache: the tokens of all documents of the source.
    document_ids: int64 [N], the documents of this split.
    split: 'train' or 'eval'.
    tokenizer: see tokenizers.load.
    config: the run's.
  """

  name: str
  text: str
  cache: token_cache.TokenCache
  document_ids: np.ndarray
  split: str
  tokenizer: Any
  config: Any


def _check_plain(corpus: Corpus) -> None:
  kinds = corpus.cache.kinds
  if kinds.any():
    names = ', '.join(sources.KINDS[k] for k in np.unique(kinds))
    raise RequestError(
        f'objective {corpus.config.objective!r} reads plain text, but data '
        f'source {corpus.name!r} holds parts of the kinds {names}.')


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

  def __init__(self, corpus: Corpus, length: int = 0):  # 0: data.length
    cache, ids = corpus.cache, corpus.document_ids
    _check_plain(corpus)
    self.length = length or corpus.config.data.length
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
      raise RequestError(
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


class Passages(Windows):
  """Windows of data.length - 2 tokens, for [CLS] and [SEP] round them."""

  def __init__(self, corpus: Corpus):
    room = corpus.config.data.length - 2
    if room < 1:
      raise RequestError(f'data.length={corpus.config.data.length}: a row of '
                         '[CLS], text and [SEP] needs at least 3.')
    super().__init__(corpus, room)


class Stretch(NamedTuple):
  """Tokens that follow one another in one document, and the way to others."""

  tokens: np.ndarray
  document: int
  view: 'Stretches'

  def elsewhere(self, rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns up to `size` tokens from a random place of another document."""
    return self.view.other(self.document, rng, size)


class Stretches:
  """Each document cut into stretches of data.length - 3 tokens, for pairs.

  A rest of fewer than MIN tokens is left out: nothing is learnt of it.
  """

  MIN = 8

  def __init__(self, corpus: Corpus):
    cache, ids = corpus.cache, corpus.document_ids
    _check_plain(corpus)
    self.room = corpus.config.data.length - 3  # [CLS] and twice [SEP]
    if self.room < self.MIN:
      raise RequestError(f'data.length={corpus.config.data.length}: pairs of '
                         f'texts need at least {self.MIN + 3}.')
    self._tokens = cache.tokens
    first = cache.parts[cache.documents[ids]]
    sizes = cache.parts[cache.documents[ids + 1]] - first
    enough = sizes >= self.MIN
    self._first, self._sizes = first[enough], sizes[enough]
    if len(self._first) < 2:
      raise RequestError(
          f'data source {corpus.name!r} has {len(self._first)} document(s) of '
          f'{self.MIN} tokens or more in the split {corpus.split!r}: pairs '
          'need two, to take a second text from another document.')
    counts = (self._sizes + self.room - self.MIN) // self.room
    self._starts = np.concatenate([[0], np.cumsum(counts)])
    self.num_tokens = int(self._sizes.sum())
    byte_bounds = np.concatenate([[0], np.cumsum(cache.num_bytes)])
    self.num_bytes = int(np.sum(byte_bounds[cache.documents[ids + 1]]
                                - byte_bounds[cache.documents[ids]]))

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, i: int) -> Stretch:
    document = int(np.searchsorted(self._starts, i, side='right')) - 1
    low = (int(i) - int(self._starts[document])) * self.room
    high = min(low + self.room, int(self._sizes[document]))
    first = int(self._first[document])
    return Stretch(self._tokens[first + low:first + high], document, self)

  def other(self, document: int, rng, size: int) -> np.ndarray:
    """Returns tokens of any document but `document`, all alike likely."""
    other = int(rng.integers(len(self._first) - 1))
    other += other >= document
    size = min(size, int(self._sizes[other]))
    low = int(self._first[other]) + int(
        rng.integers(int(self._sizes[other]) - size + 1))
    return self._tokens[low:low + size]


class Conversations:
  """Documents made of turns: item i is [(kind, ids)] of one conversation."""

  def __init__(self, corpus: Corpus):
    self._cache, self._ids = corpus.cache, corpus.document_ids
    told = [sources.KINDS.index(kind) for kind in conversations.HEADERS]
    if not np.isin(self._cache.kinds, told).all():
      raise RequestError(
          f'objective {corpus.config.objective!r} reads conversations, but '
          f'data source {corpus.name!r} holds other documents: it must name a '
          'JSONL field with a list of turns, or be alpaca:GLOB.')
    bounds = self._cache.documents
    parts = self._cache.parts
    self.num_tokens = int(np.sum(parts[bounds[self._ids + 1]]
                                 - parts[bounds[self._ids]]))
    byte_bounds = np.concatenate([[0], np.cumsum(self._cache.num_bytes)])
    self.num_bytes = int(np.sum(byte_bounds[bounds[self._ids + 1]]
                                - byte_bounds[bounds[self._ids]]))

  def __len__(self) -> int:
    return len(self._ids)

  def __getitem__(self, i: int) -> list[tuple[str, np.ndarray]]:
    return self._cache.document_parts(int(self._ids[i]))


class Pairs:
  """Pairs of a source and a target, or, of plain text, a stretch and the one
  that follows it; see pairs.py."""

  def __init__(self, corpus: Corpus):
    self._cache, self._ids = corpus.cache, corpus.document_ids
    self._lengths = pairs.lengths(corpus.config)
    self._windows = None
    told = [sources.KINDS.index(kind) for kind in pairs.KINDS]
    if not np.isin(self._cache.kinds, told).any():
      self._windows = Windows(corpus, sum(self._lengths))
      share = self._lengths[1] / sum(self._lengths)
      self.num_tokens = round(self._windows.num_tokens * share)
      self.num_bytes = round(self._windows.num_bytes * share)
      return
    if self._cache.kinds.tolist() != told * len(self._cache):
      raise RequestError(f'data source {corpus.name!r} holds more than pairs.')
    targets = 2 * self._ids + 1
    parts = self._cache.parts
    self.num_tokens = int(np.sum(parts[targets + 1] - parts[targets] + 1))
    self.num_bytes = int(np.sum(self._cache.num_bytes[targets]))

  def __len__(self) -> int:
    return len(self._ids if self._windows is None else self._windows)

  def __getitem__(self, i: int) -> pairs.Pair:
    if self._windows is not None:
      window, (M, L) = self._windows[i], self._lengths
      ids = window.tokens[:min(window.size, M + L)]
      return pairs.Pair(ids[:M], ids[M:], False)
    parts = dict(self._cache.document_parts(int(self._ids[i])))
    return pairs.Pair(parts['source'], parts['target'], True)


VIEWS = {
    'windows': Windows,
    'passages': Passages,
    'stretches': Stretches,
    'conversations': Conversations,
    'pairs': Pairs,
}
