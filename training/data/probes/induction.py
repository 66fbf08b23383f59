"""Induction, in one hop or several (Sanford, Hsu and Telgarsky 2024,
"Transformers, parallel computation, and logarithmic depth", section 4): where
did this letter stand last, and which letter followed it there? With k hops the
question is asked k times, each time of the place that was found.

One hop is the induction head of Olsson et al. 2022. `hops` is the published
form of several, in which no letter follows itself and a place without so many
hops has a symbol of its own; none of it is left out of the loss.
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
  place_T = places(letters_T, hops)
  asks = np.flatnonzero(place_T >= 0)
  tokens = np.concatenate([[settings.vocab + hops - 1], letters_T])
  return record.asking(tokens, 1 + asks, letters_T[place_T[asks]])


def places(letters_T: np.ndarray, hops: int) -> np.ndarray:
  """Returns where each place's hops end; -1: there are not so many."""
  step_T, place_T = found(letters_T), np.arange(len(letters_T))
  for _ in range(hops):
    place_T = np.where(place_T < 0, -1, step_T[place_T])
  return place_T


def draw_hops(rng: np.random.Generator, hops: int, settings: record.Settings
              ) -> record.Row:
  """Returns a row that fills settings.length: an id that says how many hops,
  then letters of which none is followed by itself. Each of them asks, for a
  letter or for the symbol of no such place."""
  vocab, none = settings.vocab, settings.vocab + settings.most + 1
  steps_T = rng.integers(1, vocab, settings.length - 1)
  letters_T = (rng.integers(vocab) + np.cumsum(steps_T)) % vocab
  place_T = places(letters_T, hops)
  answers_T = np.where(place_T < 0, none, letters_T[place_T])
  return record.asking(np.concatenate([[vocab + hops], letters_T]),
                       np.arange(1, settings.length), answers_T)


def _limit(settings: record.Settings, hops: int) -> str:
  return '' if hops <= settings.most else (
      f'a row says its number of hops, and training has at most '
      f'{settings.most}')


PROBES = {
    'induction': record.Probe(
        asks='the letter that followed the same letter when it stood last',
        source='Olsson et al. 2022, induction heads; with several hops as '
               'Sanford, Hsu and Telgarsky 2024 ask',
        differs='Rows are of letters at random, and places where the letter '
                'has not been before ask for nothing. The size of the '
                'alphabet, the length and the number of examples are ours.',
        level='hops', levels=(1,), draw=draw,
        size=lambda hops, settings: hops + 2,
        vocab_size=lambda settings: settings.vocab + settings.most, vocab=16,
        limit=_limit, hides=True, length=64),
    'hops': record.Probe(
        asks='the letter that so many hops lead to, each to what followed the '
             'same letter when it stood last',
        source='Sanford, Hsu and Telgarsky 2024, section 4 and appendix G, as '
               'in the code published with it',
        differs='The number of hops at the start of a row asks for nothing, '
                'where the code has a symbol for it.',
        level='hops', levels=tuple(range(17)), draw=draw_hops, least=0,
        size=lambda hops, settings: 2,
        vocab_size=lambda settings: settings.vocab + settings.most + 2,
        vocab=4, limit=_limit, hides=True, length=99, examples=100_000),
}
