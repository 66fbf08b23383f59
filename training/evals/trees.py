"""Rows of texts to be scored: what several texts begin with stands there once.

In order of their tokens, texts that begin alike stand together. A row holds a
stretch of that order: of each text, the tokens in which it parts from the one
before it. So a row is one or more trees, each branch of which is a text, and
the places after a token up to its `reach` follow it in one of the texts:

  texts      a b c     a b d e     a f     g
  tokens     a b c d e f g
  positions  0 1 2 2 3 1 0
  reach      6 5 3 5 5 6 7
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Question(NamedTuple):
  """Some tokens, the last `scored` of which are to be judged.

  Attributes:
    tokens: int32 [T]; of them the model is shown all but the last.
    scored: from 1 to T - 1.
  """
  tokens: np.ndarray
  scored: int


class Row(NamedTuple):
  """What the model is shown, and the places in it that are asked about.

  Attributes:
    tokens: int32 [L].
    positions: of each in its text, [L].
    reach: the first place that does not follow on it, [L].
    questions: the numbers of those that the row answers.
    places: of all of them, one question after another, [P].
    targets: which tokens are asked about there, [P].
  """
  tokens: np.ndarray
  positions: np.ndarray
  reach: np.ndarray
  questions: list[int]
  places: np.ndarray
  targets: np.ndarray


class Order(NamedTuple):
  """Questions in the order of their texts' tokens.

  Attributes:
    questions: their numbers.
    lengths: tokens of each one's text.
    shared: how many of them are those of the text before it.
  """
  questions: list[int]
  lengths: list[int]
  shared: list[int]


def ordered(questions: Sequence[Question], which: Sequence[int]) -> Order:
  """Returns the questions `which` in order."""
  # As bytes, of which the first decide: a text stands after its beginnings.
  texts = {i: questions[i].tokens[:-1] for i in which}
  order = sorted(which, key=lambda i: texts[i].astype('>i4').tobytes())
  shared, before = [], np.zeros(0, np.int32)
  for i in order:
    shared.append(_shared(before, texts[i]))
    before = texts[i]
  return Order(order, [len(texts[i]) for i in order], shared)


def _shared(one: np.ndarray, other: np.ndarray) -> int:
  """Returns with how many of the same tokens both begin."""
  length = min(len(one), len(other))
  differ = one[:length] != other[:length]
  first = int(differ.argmax()) if length else 0
  return first if length and differ[first] else length


def whole_texts(order: Order) -> list[tuple[int, int]]:
  """Returns (start, stop) in the order of each row of one text and those that
  it begins with: there, what stands before a token is all that it sees."""
  starts = [n for n, shared in enumerate(order.shared)
            if not n or shared < order.lengths[n - 1]]
  return list(zip(starts, [*starts[1:], len(order.shared)]))


def each_alone(order: Order) -> list[tuple[int, int]]:
  """Returns the same of rows of one question each."""
  return [(n, n + 1) for n in range(len(order.shared))]


def filled(order: Order, room: int) -> list[tuple[int, int]]:
  """Returns the same of rows of at most `room` tokens, which no text exceeds.
  """
  starts, used = [], room + 1
  for n, (length, shared) in enumerate(zip(order.lengths, order.shared)):
    used += length - shared
    if used > room:
      starts.append(n)
      used = length
  return list(zip(starts, [*starts[1:], len(order.shared)]))


def row(questions: Sequence[Question], order: Order, span: tuple[int, int]
        ) -> Row:
  """Returns the row of a stretch of the order."""
  growing = _Growing()
  for n in range(*span):
    growing.add(order.questions[n], questions[order.questions[n]],
                order.shared[n] if n > span[0] else 0)
  return growing.done()


class _Growing:
  """A row as texts are put into it."""

  def __init__(self):
    self.length = 0
    self._last = np.zeros(0, int)  # the places of the last text's tokens
    self._parts: list[tuple[np.ndarray, ...]] = []
    self._ended: list[tuple[np.ndarray, int]] = []
    self._asked: list[tuple[np.ndarray, np.ndarray]] = []
    self._questions: list[int] = []

  def add(self, number: int, question: Question, shared: int) -> None:
    text = question.tokens[:-1]
    self._ended.append((self._last[shared:], self.length))
    new = np.arange(shared, len(text))
    self._last = np.concatenate([self._last[:shared],
                                 self.length + new - shared])
    self._parts.append((text[shared:], new))
    self._asked.append((self._last[len(text) - question.scored:],
                        question.tokens[-question.scored:]))
    self._questions.append(number)
    self.length += len(new)

  def done(self) -> Row:
    reach = np.zeros(self.length, np.int32)
    for places, end in (*self._ended, (self._last, self.length)):
      reach[places] = end
    tokens, positions = map(np.concatenate, zip(*self._parts))
    places, targets = map(np.concatenate, zip(*self._asked))
    return Row(tokens, positions, reach, self._questions, places, targets)
