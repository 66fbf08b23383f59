"""Mano of Physics of Language Models 4.1 (Allen-Zhu 2025), as in the code
published with it: the value of a formula, each operator before its two
operands, modulo a prime.

  ^ len_2  *  5  +  4  21  ans_2        5 * (4 + 21) = 10 modulo 23
                           10

The start, each operator, and both signs of the number of operators have two
forms, one of which is drawn each time.
"""

import numpy as np

from training.data.probes import record
from training.data.probes.record import Row, Settings

OPERATORS = (np.add, np.subtract, np.multiply)  # 'asm' of the published code
FORMS = 2


def draw(rng: np.random.Generator, operators: int, settings: Settings) -> Row:
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


PROBES = {'mano': record.Probe(
    asks='the value of a formula, modulo the number of values',
    source='Allen-Zhu 2025, Physics of Language Models 4.1, Mano (L = 10)',
    differs='The value alone is asked for, and a row holds one formula: the '
            'published code returns whole rows, and the paper fills its '
            'context with several.',
    level='operators', levels=tuple(range(1, 11)), draw=draw,
    size=lambda operators, settings: 2 * operators + 4,
    vocab_size=lambda settings: settings.vocab + FORMS * (
        len(OPERATORS) + 1 + 2 * settings.most),
    vocab=23, longer=False,
    limit=lambda settings, operators: '' if operators <= settings.most else
    'a row says its number of operators, and training has at most '
    f'{settings.most}',
    hides=True, length=24, examples=100_000)}
