"""Memorisation of MAD (Poli et al. 2024, section 3.1): keys and values of one
fixed table, which no row shows, so that it has to be kept in the weights.

  a ?  c ?  b ?  a ?
    7    2    9    7
"""

import functools

import numpy as np

from training.data.probes import record
from training.data.probes.record import Row, Settings

SEED = 12345  # of the table, as published


@functools.lru_cache(maxsize=8)
def table(keys: int) -> np.ndarray:
  """Returns the value of each key, [keys]: a fixed permutation."""
  return keys + np.random.default_rng(SEED).permutation(keys)


def draw(rng: np.random.Generator, keys: int, settings: Settings) -> Row:
  """Returns a row that fills settings.length, of the first `keys` keys."""
  most = settings.most
  chosen = rng.integers(0, keys, settings.length // 2)
  tokens = np.full((len(chosen), 2), 2 * most)  # the mark that asks
  tokens[:, 0] = chosen
  return record.asking(tokens.reshape(-1), 1 + 2 * np.arange(len(chosen)),
                       table(most)[chosen])


PROBES = {'memorisation': record.Probe(
    asks='the value of each key, in a table that is the same for all rows',
    source='Poli et al. 2024, section 3.1, memorisation',
    differs='The table is of the published seed, but ours: keys have as many '
            'values, in which the published one has one value more.',
    level='keys', levels=(127,), draw=draw,
    size=lambda keys, settings: 2,
    vocab_size=lambda settings: 2 * settings.most + 1,
    limit=lambda settings, keys: '' if keys <= settings.most else
    f'training has {settings.most} keys',
    hides=True, length=32, examples=256)}
