"""Sums of two numbers, written from the highest digit on (Kazemnejad et al.
2023, section 3): 4 7 + 5 8 = 1 0 5."""

import numpy as np

from training.data.probes import record
from training.data.probes.record import Row, Settings

PLUS, EQUALS, END = 10, 11, 12  # after the digits


def draw(rng: np.random.Generator, digits: int, settings: Settings) -> Row:
  """Returns a sum of two numbers, one of so many digits and one of as many or
  fewer; its end is asked for too. No number of several digits begins with 0."""
  del settings
  sizes = rng.permutation([digits, rng.integers(1, digits + 1)])
  terms = []
  for size in sizes:
    term = rng.integers(0, 10, size)
    term[:1] = rng.integers(int(size > 1), 10)
    terms.append(term)
  total = sum(int(''.join(map(str, term))) for term in terms)
  first, second = terms
  return record.writing(
      np.concatenate([first, [PLUS], second, [EQUALS]]),
      np.array([*map(int, str(total)), END]))


PROBES = {'addition': record.Probe(
    asks='the sum of two numbers',
    source='Kazemnejad et al. 2023, section 3, addition',
    differs='Each digit is an id. In the paper each number of digits is as '
            'frequent in both numbers; here that of the longer one is. The '
            'code published with it writes words around the numbers.',
    level='digits of the longer number', levels=tuple(range(1, 9)), draw=draw,
    size=lambda digits, settings: 3 * digits + 3,
    vocab_size=lambda settings: 13, grows=True, length=27, examples=100_000)}
