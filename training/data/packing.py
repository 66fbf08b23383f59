"""Views: the raw items that an objective makes rows of, cut from a corpus.

A view is a sequence: it has len(view) items, and view[i] takes the same time
for every i, so that an item can be read wherever the order of a run puts it.
`num_tokens` and `num_bytes` say how much text one pass over a view reads. To
give an objective other items, write a class that takes a Corpus, and name it in
the objective's record.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from configs.errors import RequestError, require
from training.data import conversations, sources, token_cache
from training.data.shards import reader


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The documents of one source that belong to one split.

  Attributes:
    name: the source, for messages.
    text: which part of the source this is, in words.
    cache: the tokens of all documents of the source.
    document_ids: int64 [N], the documents of this split.
    split: 'train' or 'eval'.
    tokenizer: see tokenizers.load.
    config: the run's config.
    shards: the tokens of the split, where they are in shards and not in a
      cache, which is None then, as are document_ids.
  """

  name: str
  text: str
  cache: token_cache.TokenCache
  document_ids: np.ndarray
  split: str
  tokenizer: Any
  config: Any
  shards: reader.Split | None = None

  @property
  def stream(self) -> 'Joined | reader.Split':
    """All tokens, in order, as the class Windows says."""
    return self.shards or Joined(self)

  @property
  def bounds(self) -> tuple[np.ndarray, np.ndarray]:
    """The first part of each document, and the one after its last, int64 [N]:
    indices into cache.parts and cache.num_bytes."""
    documents = self.cache.documents
    return documents[self.document_ids], documents[self.document_ids + 1]

  @property
  def num_bytes(self) -> int:
    """The bytes of text in all documents."""
    first, end = self.bounds
    total = np.concatenate([[0], np.cumsum(self.cache.num_bytes)])
    return int(np.sum(total[end] - total[first]))

  def holds(self, kinds: tuple[str, ...]) -> np.ndarray:
    """Returns for each part of the cache whether it is of one of `kinds`; of
    shards, which hold plain text, nothing."""
    if self.shards:
      return np.zeros(0, bool)
    return np.isin(self.cache.kinds, [sources.KINDS.index(k) for k in kinds])


def documents(starts_L: np.ndarray) -> dict[str, np.ndarray]:
  """Returns segment_ids and positions [L] of packed documents: one begins
  wherever starts_L is true, and one at the beginning of the row."""
  index_L = np.arange(len(starts_L))
  first_L = np.maximum.accumulate(np.where(starts_L, index_L, 0))
  return dict(segment_ids=1 + np.cumsum(starts_L), positions=index_L - first_L)


def reads(objective: Any) -> tuple[str, ...]:
  """Returns what of sources.HOLDS an objective reads: the READS of its view,
  or any documents where that has none."""
  if objective.records:
    return (objective.records,)
  return getattr(objective.view, 'READS', sources.DOCUMENTS)


def _check_plain(corpus: Corpus) -> None:
  if corpus.cache.kinds.any():
    held = (sources.PAIRS if corpus.holds(sources.PAIR).any() else
            sources.TURNS)
    raise RequestError(
        f'objective {corpus.config.objective!r} reads plain text, but data '
        f'source {corpus.name!r} holds {held}: choose from '
        f'{sources.forms((sources.TEXT,), True)}, of a field of text')


class Window(NamedTuple):
  """Consecutive tokens of the text, and the one token that follows them.

  Attributes:
    tokens: int32 [length + 1].
    size: how many of them are text; separators fill up the rest.
  """

  tokens: np.ndarray
  size: int


class Joined:
  """The documents of a token cache as one stream of tokens.

  Attributes:
    num_tokens: of the stream, less the separator that it begins with.
    num_bytes: of the text.
  """

  def __init__(self, corpus: Corpus):
    cache, (first, end) = corpus.cache, corpus.bounds
    _check_plain(corpus)
    self._cache = cache
    self._first_token = cache.parts[first]
    sizes = cache.parts[end] - self._first_token
    # Where each document's separator stands in the stream; then the last one.
    self._starts = np.concatenate([[0], np.cumsum(sizes + 1)])
    self.num_tokens = int(self._starts[-1])
    self.num_bytes = corpus.num_bytes

  def fill(self, tokens: np.ndarray, first: int) -> None:
    """Fills `tokens`, which are separators, with the stream from token `first`
    on, as far as it goes."""
    last = min(first + len(tokens) - 1, self.num_tokens)  # Inclusive.
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


class Windows:
  """All documents as one stream of tokens, cut into windows of equal length.

  The stream is separator, document, separator, ... document, separator. Window
  i is stream[i L : i L + L + 1]: it overlaps the next one by a token, and so
  each token of the stream but the first separator is a target exactly once. In
  the 'eval' split the last window may be short, and is filled up with
  separators; in 'train' a short last window is left out.

  Args:
    corpus: of plain text.
    length: L; 0: data.length.
  """

  STREAMS = True  # it reads tokens as they come, and may do so from shards
  READS = (sources.TEXT,)

  def __init__(self, corpus: Corpus, length: int = 0):
    self.length = length or corpus.config.data.length
    self.separator = corpus.tokenizer.separator_id
    self._stream = corpus.stream
    self.num_tokens = self._stream.num_tokens
    self.num_bytes = self._stream.num_bytes
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
    self._stream.fill(tokens, first)
    return Window(tokens, last - first + 1)


class Passages(Windows):
  """Windows of data.length - 2 tokens, which leave room for [CLS] and [SEP]."""

  def __init__(self, corpus: Corpus):
    room = corpus.config.data.length - 2
    if room < 1:
      raise RequestError(f'data.length={corpus.config.data.length}: a row of '
                         '[CLS], text and [SEP] needs at least 3.')
    super().__init__(corpus, room)


class Stretch(NamedTuple):
  """Consecutive tokens of one document, and the way to other documents.

  Attributes:
    tokens: [T], at most data.length - 3.
    elsewhere: (rng, size) -> up to `size` tokens of another document.
  """

  tokens: np.ndarray
  elsewhere: Callable[[np.random.Generator, int], np.ndarray]


class Stretches:
  """Each document cut into stretches of data.length - 3 tokens.

  The three places are for [CLS] and two [SEP], for BERT's pairs of texts. A
  stretch of fewer than MIN tokens, too short to learn from, is left out.
  """

  MIN = 8
  READS = (sources.TEXT,)

  def __init__(self, corpus: Corpus):
    cache, (first, end) = corpus.cache, corpus.bounds
    _check_plain(corpus)
    self.room = corpus.config.data.length - 3  # [CLS] and twice [SEP]
    if self.room < self.MIN:
      raise RequestError(f'data.length={corpus.config.data.length}: pairs of '
                         f'texts need at least {self.MIN + 3}.')
    self._tokens = cache.tokens
    sizes = cache.parts[end] - cache.parts[first]
    enough = sizes >= self.MIN
    self._first, self._sizes = cache.parts[first][enough], sizes[enough]
    if len(self._first) < 2:
      raise RequestError(
          f'data source {corpus.name!r} has {len(self._first)} document(s) of '
          f'{self.MIN} tokens or more in the split {corpus.split!r}: pairs '
          'need two, to take a second text from another document.')
    counts = (self._sizes + self.room - self.MIN) // self.room
    self._starts = np.concatenate([[0], np.cumsum(counts)])
    self.num_tokens = int(self._sizes.sum())
    self.num_bytes = corpus.num_bytes

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, i: int) -> Stretch:
    document = int(np.searchsorted(self._starts, i, side='right')) - 1
    low = (int(i) - int(self._starts[document])) * self.room
    high = min(low + self.room, int(self._sizes[document]))
    first = int(self._first[document])
    return Stretch(self._tokens[first + low:first + high],
                   functools.partial(self.other, document))

  def other(self, document: int, rng: np.random.Generator, size: int
            ) -> np.ndarray:
    """Returns up to `size` tokens from a random place of a random document
    other than `document`."""
    other = int(rng.integers(len(self._first) - 1))
    other += other >= document
    size = min(size, int(self._sizes[other]))
    low = int(self._first[other]) + int(
        rng.integers(int(self._sizes[other]) - size + 1))
    return self._tokens[low:low + size]


class Conversations:
  """Documents made of turns: item i is the [(kind, ids)] parts of one."""

  READS = (sources.TURNS,)

  def __init__(self, corpus: Corpus):
    if not corpus.holds(conversations.KINDS).all():
      raise RequestError(
          f'objective {corpus.config.objective!r} reads conversations, but '
          f'data source {corpus.name!r} holds other documents: it must name a '
          'JSONL field with a list of turns, or be alpaca:GLOB.')
    if not corpus.holds(conversations.ANSWERS).any():
      raise RequestError(
          f'objective {corpus.config.objective!r} predicts the answers of the '
          f'assistant, but no conversation of data source {corpus.name!r} has '
          'one: add turns of the role assistant.')
    self._cache, self._ids = corpus.cache, corpus.document_ids
    first, end = corpus.bounds
    if corpus.split == 'train':
      self._check_length(corpus, first, end)
    self.num_tokens = int(np.sum(self._cache.parts[end]
                                 - self._cache.parts[first]))
    self.num_bytes = corpus.num_bytes

  def _check_length(self, corpus: Corpus, first: np.ndarray, end: np.ndarray
                    ) -> None:
    """Refuses rows so short that all are cut off before the first answer."""
    answers = np.append(np.flatnonzero(corpus.holds(conversations.ANSWERS)),
                        len(self._cache.kinds))
    answer = answers[np.searchsorted(answers, first)]
    before = (self._cache.parts[answer] - self._cache.parts[first])[
        answer < end]
    length = corpus.config.data.length
    require(not len(before) or before.min() < length,
            f'data.length is {length}, and the first answer of each '
            f'conversation of data source {corpus.name!r} comes later, after '
            f'{before.min(initial=2 ** 62):,} tokens or more: there is nothing '
            'to predict')

  def __len__(self) -> int:
    return len(self._ids)

  def __getitem__(self, i: int) -> list[tuple[str, np.ndarray]]:
    return self._cache.document_parts(int(self._ids[i]))


class Pair(NamedTuple):
  """A source and its target.

  Attributes:
    source, target: token ids, of any length.
    whole: whether both end where a text ends, and not in the middle of it.
  """
  source: np.ndarray
  target: np.ndarray
  whole: bool


def pair_lengths(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """Returns how many tokens a source and a target may have: M and L."""
  return config.data.length, config.data.target_length or config.data.length


class Pairs:
  """Pairs of a source and a target, as a file has them. Plain text is cut into
  stretches of M + L tokens, whose last L are the target."""

  STREAMS = True
  READS = (sources.TEXT, sources.PAIRS)

  def __init__(self, corpus: Corpus):
    self._cache, self._ids = corpus.cache, corpus.document_ids
    self._lengths = pair_lengths(corpus.config)
    self._windows = None
    if not corpus.holds(sources.PAIR).any():
      self._windows = Windows(corpus, sum(self._lengths))
      share = self._lengths[1] / sum(self._lengths)
      self.num_tokens = max(1, round(self._windows.num_tokens * share))
      self.num_bytes = max(1, round(self._windows.num_bytes * share))
      return
    pair = [sources.KINDS.index(kind) for kind in sources.PAIR]
    if self._cache.kinds.tolist() != pair * len(self._cache):
      raise RequestError(f'data source {corpus.name!r} holds more than pairs.')
    targets = 2 * self._ids + 1
    parts = self._cache.parts
    self.num_tokens = int(np.sum(parts[targets + 1] - parts[targets] + 1))
    self.num_bytes = int(np.sum(self._cache.num_bytes[targets]))

  def __len__(self) -> int:
    return len(self._ids if self._windows is None else self._windows)

  def __getitem__(self, i: int) -> Pair:
    if self._windows is not None:
      window, (M, L) = self._windows[i], self._lengths
      ids = window.tokens[:min(window.size, M + L)]
      return Pair(ids[:M], ids[M:], False)
    parts = dict(self._cache.document_parts(int(self._ids[i])))
    return Pair(parts['source'], parts['target'], True)
