"""Compression of MAD (Poli et al. 2024, section 3.1): a row of letters and a
mark, all of which are to be told again from the vector of the mark.

  a c b >      a and c and b and > , each from what the model makes of >

What turns the vector into tokens is no part of the architecture: it is the head
'vector' (architectures/parts/heads.py), the same for all.
"""

import numpy as np

from training.data.probes import record
from training.data.probes.record import Row, Settings


def draw(rng: np.random.Generator, letters: int, settings: Settings) -> Row:
  """Returns so many letters and a mark; every token asks for itself."""
  tokens = np.append(rng.integers(0, settings.vocab, letters), settings.vocab)
  return record.asking(tokens, np.arange(len(tokens)), tokens)


PROBES = {'compression': record.Probe(
    asks='every token of the row, each from the vector of the last one',
    source='Poli et al. 2024, section 3.1, compression',
    differs='',
    level='letters', levels=(31,), draw=draw,
    size=lambda letters, settings: letters + 1,
    vocab_size=lambda settings: settings.vocab + 1, vocab=15, grows=True,
    hides=True, objective='compression', length=32)}
