"""Multi-query associative recall (Arora et al. 2023, "Zoology", section 3.1 and
appendix E): pairs of a key and its value, then some of the keys again, at
random places, each of which asks for its value.

  a 1  b 2  c 3  . .  b .  . .  a .  c .
                      2       1    3
"""

import numpy as np

from training.data.probes import record

POWER = 0.01  # of the gaps' distribution: power_a of the published code
FILLER = 0  # the id between the queries


def draw(rng: np.random.Generator, pairs: int, settings: record.Settings
         ) -> record.Row:
  """Returns a row that fills settings.length.

  Ids below half of the vocabulary are keys, but 0, the filler; the others are
  values. Where the queries stand is drawn from the published power law, which
  puts most of them soon after the pairs.
  """
  half = settings.vocab // 2
  keys = rng.choice(np.arange(1, half), pairs, replace=False)
  values = rng.choice(np.arange(half, settings.vocab), pairs, replace=False)
  tokens = np.full(settings.length, FILLER, np.int32)
  context = 2 * pairs
  tokens[:context:2], tokens[1:context:2] = keys, values
  slots = np.arange(1, (settings.length - context) // 2 + 1)
  weight = slots ** (POWER - 1)
  gaps = rng.choice(slots - 1, pairs, replace=False, p=weight / weight.sum())
  places = context + 2 * gaps
  tokens[places] = keys
  return record.asking(tokens, places, values)


def limit(settings: record.Settings, pairs: int) -> str:
  most = settings.vocab // 2 - 1  # keys
  return '' if pairs <= most else (
      f'{settings.vocab} letters have {most} keys')


PROBES = {'mqar': record.Probe(
    asks='the value of each key, of pairs that the row begins with',
    source='Arora et al. 2023, section 3.1; settings of figure 2',
    differs='',
    level='pairs', levels=(4,), draw=draw,
    size=lambda pairs, settings: 4 * pairs,
    vocab_size=lambda settings: settings.vocab, vocab=8192, limit=limit,
    grows=True, hides=True, length=64, examples=100_000, held_out=3_000)}
