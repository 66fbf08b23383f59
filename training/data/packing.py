"""Views: the raw items that an objective makes rows of, cut from a corpus.

A view is a sequence: it has len(view) items, and view[i] takes the same time
for every i, so that an item can be read wherever the order of a run puts it.
`num_tokens` and `num_bytes` say how much text one pass over a view reads. To
give an objective other items, write a class that takes a Corpus, and name it in
the objective's record.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from configs.errors import require
from training.data import conversations, labelled, sources
from training.data.tokens import Documents, Split


@dataclasses.dataclass(frozen=True)
class Corpus:
  """What of one source belongs to one split.

  Attributes:
    name: the source, for messages.
    text: which part of the source this is, in words.
    split: 'train' or 'eval'.
    tokenizer: see tokenizers.load.
    config: the run's config.
    tokens: of text: the tokens of the split's documents.
    records: of labelled data: the records of the split.
  """

  name: str
  text: str
  split: str
  tokenizer: Any
  config: Any
  tokens: Split | None = None
  records: Sequence[Any] = ()


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
  require(corpus.tokens.kinds == {'text'}, f'objective '
          f'{corpus.config.objective!r} reads plain text, but data source '
          f'{corpus.name!r} holds pairs or conversations: name a field of text')


class Window(NamedTuple):
  """Consecutive tokens of the text, and the one token that follows them.

  Attributes:
    tokens: int32 [length + 1].
    size: how many of them are text; separators fill up the rest.
  """

  tokens: np.ndarray
  size: int


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

  READS = (sources.TEXT,)

  def __init__(self, corpus: Corpus, length: int = 0):
    self.length = length or corpus.config.data.length
    self.separator = corpus.tokenizer.separator_id
    _check_plain(corpus)
    self._stream = corpus.tokens
    self.num_tokens = self._stream.num_tokens
    self.num_bytes = self._stream.num_bytes
    full, rest = divmod(self.num_tokens, self.length)
    self._len = full + (rest > 0 and corpus.split == 'eval')
    require(self._len > 0, f'data source {corpus.name!r} has '
            f'{self.num_tokens} training tokens, fewer than one sequence of '
            f'data.length={self.length}.')

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
    require(room > 0, f'data.length={corpus.config.data.length}: a row of '
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
    _check_plain(corpus)
    self.room = corpus.config.data.length - 3  # [CLS] and twice [SEP]
    require(self.room >= self.MIN, f'data.length={corpus.config.data.length}: '
            f'pairs of texts need at least {self.MIN + 3}.')
    self._documents = documents = Documents(corpus.tokens)
    first = documents.parts[documents.first]
    sizes = documents.parts[documents.end] - first
    enough = sizes >= self.MIN
    self._first, self._sizes = first[enough], sizes[enough]
    require(len(self._first) > 1, f'data source {corpus.name!r} has '
            f'{len(self._first)} document(s) of {self.MIN} tokens or more in '
            f'the split {corpus.split!r}: pairs need two, to take a second '
            'text from another document.')
    counts = (self._sizes + self.room - self.MIN) // self.room
    self._starts = np.concatenate([[0], np.cumsum(counts)])
    self.num_tokens = int(self._sizes.sum())
    self.num_bytes = corpus.tokens.num_bytes

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, i: int) -> Stretch:
    document = int(np.searchsorted(self._starts, i, side='right')) - 1
    low = (int(i) - int(self._starts[document])) * self.room
    high = min(low + self.room, int(self._sizes[document]))
    first = int(self._first[document])
    return Stretch(self._documents.read(first + low, first + high),
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
    return self._documents.read(low, low + size)


class Conversations:
  """Documents made of turns: item i is the [(kind, ids)] parts of one."""

  READS = (sources.TURNS,)

  def __init__(self, corpus: Corpus):
    kinds = corpus.tokens.kinds
    require(kinds <= {*conversations.KINDS}
            and bool(kinds & {*conversations.ANSWERS}),
            f'objective {corpus.config.objective!r} predicts the answers of '
            f'the assistant, but data source {corpus.name!r} holds none: name '
            'a field with a list of turns, some of the role assistant')
    self._documents = Documents(corpus.tokens)
    self.num_tokens = corpus.tokens.num_tokens - corpus.tokens.documents
    self.num_bytes = corpus.tokens.num_bytes

  def __len__(self) -> int:
    return len(self._documents)

  def __getitem__(self, i: int) -> list[tuple[str, np.ndarray]]:
    return self._documents[int(i)]


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

  READS = (sources.TEXT, sources.PAIRS)

  def __init__(self, corpus: Corpus):
    self._lengths = pair_lengths(corpus.config)
    self._items: Windows | Documents
    if not corpus.tokens.kinds & {*labelled.PAIR}:
      self._items = Windows(corpus, sum(self._lengths))
      share = self._lengths[1] / sum(self._lengths)
      self.num_tokens = max(1, round(self._items.num_tokens * share))
      self.num_bytes = max(1, round(self._items.num_bytes * share))
      return
    require(corpus.tokens.kinds == {*labelled.PAIR},
            f'data source {corpus.name!r} holds more than pairs')
    self._items = documents = Documents(corpus.tokens)
    targets = documents.first + 1
    parts = documents.parts
    self.num_tokens = int(np.sum(parts[targets + 1] - parts[targets] + 1))
    self.num_bytes = int(np.sum(documents.num_bytes[targets]))

  def __len__(self) -> int:
    return len(self._items)

  def __getitem__(self, i: int) -> Pair:
    item = self._items[int(i)]
    if isinstance(item, Window):
      M, L = self._lengths
      ids = item.tokens[:min(item.size, M + L)]
      return Pair(ids[:M], ids[M:], False)
    parts = dict(item)
    return Pair(parts['source'], parts['target'], True)
