"""From texts to tokens and back: which token is of which word, which part of a
text a token spells, and how a long text is shown in windows.

Every tokenizer tells which characters of a text each token stands for
(`Tokenizer.encode_spans`), and all else follows from that. A word has the
tokens that begin in it. Its first one carries its label, as in BERT (Devlin et
al. 2019, section 5.3), and the others do not count.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from training.data.tokenizers import Tokenizer

NO_WORD = -1


class Words(NamedTuple):
  """The tokens of a sentence whose words are given.

  Attributes:
    ids: int32 [T].
    words_T: int32 [T], the word that each token begins in; NO_WORD: it is the
      space between two.
    first_T: bool [T], the first token of each word.
  """
  ids: np.ndarray
  words_T: np.ndarray
  first_T: np.ndarray


def of_words(sentences: Sequence[Sequence[str]], tokenizer: Tokenizer
             ) -> list[Words]:
  """Returns the tokens of sentences, whose words a space parts."""
  texts = [' '.join(words) for words in sentences]
  return [_words(words, *found) for words, found in
          zip(sentences, tokenizer.encode_spans(texts))]


def _words(words: Sequence[str], ids: np.ndarray, spans_T2: np.ndarray
           ) -> Words:
  # Of each character its word; of the spaces between them none.
  sizes = [1 + len(word) for word in words]
  word_C = np.repeat(np.arange(len(words), dtype=np.int32), sizes)
  word_C[np.cumsum(sizes) - 1] = NO_WORD
  place_C = np.arange(len(word_C))
  # Where the next character of a word stands, from each character on.
  next_C = np.minimum.accumulate(np.where(
      word_C == NO_WORD, len(word_C), place_C)[::-1])[::-1]
  next_C = np.append(next_C, len(word_C))
  word_C = np.append(word_C, NO_WORD)
  begin_T = next_C[spans_T2[:, 0]]
  words_T = np.where(begin_T < spans_T2[:, 1], word_C[begin_T], NO_WORD)
  first_T = np.zeros(len(ids), bool)
  first_T[np.unique(words_T, return_index=True)[1]] = True
  return Words(ids, words_T, first_T & (words_T != NO_WORD))


def windows(size: int, room: int, stride: int) -> list[tuple[int, int]]:
  """Returns the (first, end) of the windows that show `size` tokens, at most
  `room` at once; two neighbours share `stride` tokens.

  Raises:
    AssertionError: unless stride is less than room.
  """
  assert 0 <= stride < room, (stride, room)
  count = 1 + max(0, -(-(size - room) // (room - stride)))
  starts = [i * (room - stride) for i in range(count)]
  return [(start, min(start + room, size)) for start in starts]


def owners(windows_W2: Sequence[tuple[int, int]], size: int) -> np.ndarray:
  """Returns int32 [size], the window in which each token has the most context:
  the most tokens on that side where it has fewer, as in BERT's code
  (run_squad.py, _check_is_max_context); the first of several."""
  place_1T = np.arange(size)[None]
  first_W1, end_W1 = (np.array(side)[:, None] for side in zip(*windows_W2))
  before_WT, after_WT = place_1T - first_W1, end_W1 - 1 - place_1T
  context_WT = np.minimum(before_WT, after_WT)
  # BERT adds a hundredth of the window's length, which parts equals. A window
  # that does not show a token has a context below 0 and is none of its.
  score_WT = np.where(context_WT < 0, -np.inf,
                      context_WT + 0.01 * (end_W1 - first_W1))
  return np.argmax(score_WT, 0).astype(np.int32)


def tokens_of(spans_T2: np.ndarray, start: int, end: int
              ) -> tuple[int, int] | None:
  """Returns the first and the last token of a part of a text.

  Args:
    spans_T2: of Tokenizer.encode_spans.
    start, end: the part's first character, and the one after its last.

  Returns:
    (first, last), the tokens that stand for any of its characters; None: there
    are none.
  """
  spelt_T = (spans_T2[:, 0] < end) & (spans_T2[:, 1] > start)
  places = np.flatnonzero(spelt_T)
  return (int(places[0]), int(places[-1])) if len(places) else None
