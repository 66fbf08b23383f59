"""State tracking: after each token, which element is the product of all so far?
(Merrill, Petty and Sabharwal 2024, "The Illusion of State in State-Space
Models", section 5: word problems of groups.) Parity is the group of two
elements, counting that of `vocab`; S3 and S5 are all permutations of three and
of five things, A5 the even ones of five. Of these S5 and A5 are not solvable,
and so hard for a fixed depth. The paper's experiments are on Z60 (counting) and
A5, and on A4 x Z5, which is not here.

A first id, the same in all rows, stands before them. Without it a decoder whose
positions are relative cannot tell how often a token that fills the row so far
has come: attention takes a mean of equal values.
"""

from collections.abc import Callable
import functools
import itertools

import numpy as np

from training.data.probes import record
from training.data.probes.record import Row, Settings

_PAPER = 'Merrill, Petty and Sabharwal 2024, section 5'
_DIFFERS = ('The paper trains one model for each length, on rows of two tokens '
            'and of that length; here a row has a number of tokens up to the '
            'longest, after a first id.')
_GROUP = f"{_DIFFERS} The paper's experiments are on other groups."


@functools.lru_cache(maxsize=8)
def permutations(things: int, even: bool = False
                 ) -> tuple[np.ndarray, np.ndarray]:
  """Returns all permutations, or the even ones, [P, things], in lexicographic
  order, and the table [P, P] of their products: table[a, b] is b after a."""
  rows = np.array(list(itertools.permutations(range(things))))
  if even:
    pairs = itertools.combinations(range(things), 2)
    swaps = sum(rows[:, i] > rows[:, j] for i, j in pairs)
    rows = rows[swaps % 2 == 0]
  code = rows @ things ** np.arange(things)
  order = np.argsort(code)
  product = rows[:, rows]  # [b, a, things]: b of what a makes of each thing
  codes = product @ things ** np.arange(things)
  return rows, order[np.searchsorted(code[order], codes)].T


def _tagged(first: int, tokens: np.ndarray, states: np.ndarray) -> Row:
  return record.asking(np.append(first, tokens), 1 + np.arange(len(tokens)),
                       states)


def counted(rng: np.random.Generator, count: int, settings: Settings) -> Row:
  """Returns numbers below the modulus, and at each their sum so far."""
  tokens = rng.integers(0, settings.vocab, count)
  return _tagged(settings.vocab, tokens, np.cumsum(tokens) % settings.vocab)


def _words(things: int, even: bool, rng: np.random.Generator, count: int,
           settings: Settings) -> Row:
  """Returns permutations by number, and at each the product so far."""
  del settings
  _, table = permutations(things, even)
  tokens = rng.integers(0, len(table), count)
  states = itertools.accumulate(tokens, lambda state, one: table[state, one])
  return _tagged(len(table), tokens, np.fromiter(states, np.int64, count))


def _of(asks: str, draw: Callable[..., Row],
        letters: Callable[[Settings], int], vocab: int = 0,
        differs: str = _GROUP) -> record.Probe:
  return record.Probe(
      asks=asks, source=_PAPER, differs=differs, level='tokens',
      levels=tuple(range(1, 21)), draw=draw,
      size=lambda count, settings: count + 1,
      vocab_size=lambda settings: letters(settings) + 1, vocab=vocab,
      grows=True, hides=True, length=21, examples=100_000)


PROBES = {
    'parity': _of('whether the ones so far are odd in number',
                  lambda rng, count, settings: counted(
                      rng, count, settings._replace(vocab=2)), lambda _: 2),
    'counting': _of('the sum so far, modulo the number of letters', counted,
                    lambda settings: settings.vocab, vocab=60,
                    differs=_DIFFERS),
    's3': _of('the product so far of permutations of three things',
              functools.partial(_words, 3, False), lambda _: 6),
    's5': _of('the product so far of permutations of five things',
              functools.partial(_words, 5, False), lambda _: 120),
    'a5': _of('the product so far of even permutations of five things',
              functools.partial(_words, 5, True), lambda _: 60,
              differs=_DIFFERS),
}
