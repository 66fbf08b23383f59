"""Induction, in one hop or several (Sanford, Hsu and Telgarsky 2024,
"Transformers, parallel computation, and logarithmic depth", section 4): where
did this letter stand last, and which letter followed it there? With k hops the
question is asked k times, each time of the place that was found.

One hop is the induction head of Olsson et al. 2022.
"""

import numpy as np

from training.data.probes import record


def found(letters_T: np.ndarray) -> np.ndarray:
  """Returns for each place t the latest j <= t with letters[j - 1] =
  letters[t]; -1 where there is none."""
  found_T = np.full(len(letters_T), -1)
  after: dict[int, int] = {}  # of a letter: the place after its latest
  for t, letter in enumerate(letters_T.tolist()):
    found_T[t] = after.get(letter, -1)
    after[letter] = t + 1
  return found_T


def draw(rng: np.random.Generator, hops: int, settings: record.Settings
         ) -> record.Row:
  """Returns a row that fills settings.length: an id that says how many hops,
  then letters. A place from which there are not so many asks for nothing."""
  letters_T = rng.integers(0, settings.vocab, settings.length - 1)
  step_T = found(letters_T)
  place_T = np.arange(len(letters_T))
  for _ in range(hops):
    place_T = np.where(place_T < 0, -1, step_T[place_T])
  asks = np.flatnonzero(place_T >= 0)
  tokens = np.concatenate([[settings.vocab + hops - 1], letters_T])
  return record.asking(tokens, 1 + asks, letters_T[place_T[asks]])


PROBES = {'induction': record.Probe(
    asks='the letter that followed the same letter when it stood last',
    source='Sanford, Hsu and Telgarsky 2024, section 4 (k-hop induction '
           'heads); Olsson et al. 2022 for one hop',
    differs='A place without so many hops asks for nothing, where the paper '
            'has a symbol for it. The size of the alphabet, the length and the '
            'number of examples are ours.',
    level='hops', levels=(1,), draw=draw,
    size=lambda hops, settings: hops + 2,
    vocab_size=lambda settings: settings.vocab + settings.most, vocab=16,
    limit=lambda settings, hops: '' if hops <= settings.most else
    f'a row says its number of hops, and training has at most {settings.most}',
    hides=True, length=64)}
