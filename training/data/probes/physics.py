"""Probes of Physics of Language Models 4.1: hops in a circle, and formulas.

Depo of Physics of Language Models 4.1 (Allen-Zhu 2025), as in the code
published with it: a circle of words is told as pairs of a word and the next, in
no order; then, of some words, which one stands k places on.

  ^ c d  a b  d a  b c  2? a : c  2? d : b          k = 2, words of one letter
                           c        b

A word is one token or several; its last one is of another alphabet, so that it
shows where the word ends. Of Depo1 words are short and of many letters; of
Depo2 they are long, of few. The sign before an answer is not asked for, and a
row holds one circle, where the paper fills its context with several.

Mano of Physics of Language Models 4.1 (Allen-Zhu 2025), as in the code
published with it: the value of a formula, each operator before its two
operands, modulo a prime.

  ^ len_2  *  5  +  4  21  ans_2        5 * (4 + 21) = 10 modulo 23
                           10

The start, each operator, and both signs of the number of operators have two
forms, one of which is drawn each time. The value alone is asked for, and a row
holds one formula: the published code returns whole rows, and the paper fills
its context with several.
"""

import functools

import numpy as np

from training.data.probes import record
from training.data.probes.record import Row, Settings


QUESTIONS = 10  # of a row, at most: M of the published code

_Words = tuple[int, int]  # the least and the most tokens of a word


def _room(words: _Words, count: int) -> int:
  """Returns how many tokens a row of so many words has at most."""
  _, most = words
  return 2 * count * most + min(count, QUESTIONS) * (2 + 2 * most)


def most_words(words: _Words, length: int) -> int:
  """Returns how many words rows of `length` tokens may tell of: the published
  N."""
  _, most = words
  asked = QUESTIONS * (2 + 2 * most)
  count = (length - asked) // (2 * most)
  return count if count >= QUESTIONS else length // (4 * most + 2)


@functools.lru_cache(maxsize=8)
def _shares(most: int) -> np.ndarray:
  """Returns how often a row of training tells of 3, 4, ... `most` words."""
  weight = 1 / (np.arange(3, most + 1) + most ** 0.5)
  return weight / weight.sum()


def _spelled(rng: np.random.Generator, count: int, words: _Words, letters: int
             ) -> list[tuple[int, ...]]:
  """Returns as many different words, in the order of the circle."""
  found: dict[tuple[int, ...], None] = {}  # in order, as a set is not
  while len(found) < count:
    spelled = rng.integers(0, letters, rng.integers(words[0], words[1] + 1))
    spelled[-1] += letters
    found[tuple(spelled.tolist())] = None
  return list(found)


def depo(words: _Words, rng: np.random.Generator, hops: int,
         settings: Settings) -> Row:
  """Returns a circle of words and questions about it. In a row of training each
  question has its own number of hops; in one to evaluate on all have `hops`,
  and there are as many words as fit settings.length, as published."""
  letters, most = settings.vocab, most_words(words, settings.length)
  count = most if settings.test else 3 + rng.choice(most - 2, p=_shares(most))
  circle = _spelled(rng, count, words, letters)
  asked = rng.permutation(count)[:QUESTIONS]
  steps = (np.full(len(asked), hops) if settings.test
           else rng.choice(settings.levels, len(asked)))
  start, answers = 2 * letters, 2 * letters + 1
  tokens = [start]
  for i in rng.permutation(count).tolist():
    tokens += [*circle[i], *circle[(i + 1) % count]]
  places: list[int] = []
  for i, step in zip(asked.tolist(), steps.tolist()):
    word = circle[(i + step) % count]
    tokens += [answers + step, *circle[i], answers]
    places += range(len(tokens) - 1, len(tokens) - 1 + len(word))
    tokens += word
  return record.asking(np.array(tokens[:-1]), np.array(places),
                       np.array(tokens)[np.array(places) + 1])


def _depo_limit(words: _Words, settings: Settings, hops: int) -> str:
  spelled = sum(settings.vocab ** size
                for size in range(words[0], words[1] + 1))
  most = most_words(words, settings.length)
  return record.trained(settings, hops) or ('' if most <= spelled else (
      f'{settings.vocab} letters spell {spelled} words, and rows of '
      f'{settings.length} tokens tell of {most}'))


def _depo(words: _Words, letters: int, hops: int, count: int) -> record.Probe:
  return record.Probe(
      functools.partial(depo, words), 'hops', tuple(range(1, hops + 1)),
      lambda hops, settings: _room(words, 3),
      lambda settings: 2 * settings.vocab + 2 + settings.most, vocab=letters,
      length=_room(words, count), examples=100_000,
      limit=functools.partial(_depo_limit, words))


OPERATORS = (np.add, np.subtract, np.multiply)  # 'asm' of the published code
FORMS = 2


def mano(rng: np.random.Generator, operators: int, settings: Settings) -> Row:
  """Returns a formula of so many operators, which asks for its value."""
  modulus = settings.vocab
  start = modulus + FORMS * len(OPERATORS)
  lengths = start + FORMS + 2 * FORMS * (operators - 1)

  def either(first: int) -> int:
    return int(first + rng.integers(FORMS))

  def formula(count: int) -> tuple[list[int], int]:
    if count == 0:
      value = int(rng.integers(modulus))
      return [value], value
    which, left = int(rng.integers(len(OPERATORS))), int(rng.integers(count))
    sign = either(modulus + FORMS * which)
    (a, x), (b, y) = formula(left), formula(count - 1 - left)
    return [sign, *a, *b], int(OPERATORS[which](x, y)) % modulus

  tokens, value = formula(operators)
  tokens = [either(start), either(lengths), *tokens, either(lengths + FORMS)]
  return record.asking(np.array(tokens), np.array([len(tokens) - 1]),
                       np.array([value]))


PROBES = {
    'depo1': _depo((1, 2), 50, 8, 225),
    'depo2': _depo((5, 7), 3, 16, 75),
    'mano': record.Probe(
        mano, 'operators', tuple(range(1, 11)),
        lambda operators, settings: 2 * operators + 4,
        lambda settings: settings.vocab + FORMS * (
            len(OPERATORS) + 1 + 2 * settings.most),
        vocab=23, length=24, examples=100_000, longer=False,
        limit=record.trained, hides=True),
}
