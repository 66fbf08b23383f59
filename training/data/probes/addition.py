"""Sums of two numbers, written from the highest digit on (Kazemnejad et al.
2023, section 3): 4 7 + 5 8 = 1 0 5."""

import numpy as np

from training.data.probes import record
from training.data.probes.record import Row, Settings

PLUS, EQUALS, END = 10, 11, 12  # after the digits


def draw(rng: np.random.Generator, digits: int, settings: Settings) -> Row:
  """Returns a sum of two numbers of so many digits, the first not zero unless
  it is the only one; its end is asked for too."""
  del settings
  terms = rng.integers(0, 10, (2, digits))
  if digits > 1:
    terms[:, 0] = rng.integers(1, 10, 2)
  carry, total = 0, []
  for a, b in terms.T[::-1].tolist():
    carry, digit = divmod(a + b + carry, 10)
    total.append(digit)
  total += [carry] * (carry > 0)
  first, second = terms
  return record.writing(
      np.concatenate([first, [PLUS], second, [EQUALS]]),
      np.array([*total[::-1], END]))


PROBES = {'addition': record.Probe(
    asks='the sum of two numbers of as many digits',
    source='Kazemnejad et al. 2023, section 3, addition',
    differs='Both numbers have as many digits, and each digit is an id. The '
            'paper has words between the numbers.',
    level='digits', levels=tuple(range(1, 9)), draw=draw,
    size=lambda digits, settings: 3 * digits + 3,
    vocab_size=lambda settings: 13, grows=True, length=27, examples=100_000)}
