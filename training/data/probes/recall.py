"""Recall in context of MAD (Poli et al. 2024, "Mechanistic Design and Scaling
of Hybrid Architectures", section 3.1 and appendix B): pairs of a key and its
value follow each other to the end, and a key that has been before asks for its
value.

  a 1  b 2  a 1  c 3  b 2        noisy: a 1  x y  b 2  a 1
            1         2          fuzzy: a b 1  c 2 3  a b 1
"""

import numpy as np

from training.data.probes import record
from training.data.probes.record import Row, Settings

NOISE = 16  # ids of the noise, as published
_PAPER = 'Poli et al. 2024, section 3.1'
_ALL = ('The published code trains on all next tokens of a row and tests on '
        'the answers alone; here both are on the answers.')


def _alphabets(vocab: int, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the keys and the values of `vocab` letters, of an alphabet of
  `most`: its first half are keys."""
  return np.arange(vocab // 2), most // 2 + np.arange(vocab // 2)


def _pairs(rng: np.random.Generator, keys: np.ndarray, values: np.ndarray,
           noise: float, first_noise: int, settings: Settings) -> Row:
  """Returns a row of pairs, of which a share is noise instead."""
  count = settings.length // 2
  of_key = rng.choice(values, len(keys))  # what each key has in this row
  chosen = rng.integers(0, len(keys), count)
  noisy = rng.random(count) < noise
  noisy[rng.integers(0, count - 1)] = False  # one pair at least,
  shown = chosen[:-1][~noisy[:-1]]
  noisy[-1], chosen[-1] = False, rng.choice(shown)  # which the last asks for
  tokens = np.stack([keys[chosen], of_key[chosen]], 1)
  tokens[noisy] = first_noise + rng.integers(0, NOISE, (noisy.sum(), 2))
  _, first = np.unique(np.where(noisy, -1 - np.arange(count), chosen),
                       return_index=True)
  again = ~noisy
  again[first] = False
  return record.asking(tokens.reshape(-1), 2 * np.flatnonzero(again),
                       of_key[chosen[again]])


def recall(rng: np.random.Generator, vocab: int, settings: Settings) -> Row:
  """Returns a row of pairs of `vocab` letters, half of them keys."""
  return _pairs(rng, *_alphabets(vocab, settings.most), 0.0, 0, settings)


def noisy_recall(rng: np.random.Generator, noise: float, settings: Settings
                 ) -> Row:
  """Returns a row of pairs, of which a share is two ids of noise instead."""
  keys, values = _alphabets(settings.vocab, settings.vocab)
  return _pairs(rng, keys, values, noise, settings.vocab, settings)


def fuzzy_recall(rng: np.random.Generator, motif: int, settings: Settings
                 ) -> Row:
  """Returns a row of keys and values of one to `motif` letters each, which do
  not repeat inside of a key or a value. The last key has been before."""
  keys, values = np.split(np.arange(settings.vocab), [settings.vocab // 2])
  of_key: dict[tuple[int, ...], np.ndarray] = {}
  tokens: list[int] = []
  places: list[int] = []
  room = settings.length - 2 * motif  # for the last pair

  def add(key: tuple[int, ...]) -> None:
    value = of_key[key]
    if key in seen:
      first = len(tokens) + len(key) - 1
      places.extend(range(first, first + len(value)))
    seen.add(key)
    tokens.extend([*key, *value])

  seen: set[tuple[int, ...]] = set()
  while True:
    key = tuple(_motif(rng, keys, motif))
    if key not in of_key:
      of_key[key] = _motif(rng, values, motif)
    if seen and len(tokens) + len(key) + len(of_key[key]) > room:
      break
    add(key)
  add(sorted(seen)[rng.integers(len(seen))])
  answers = np.array(tokens)[np.array(places) + 1]
  return record.asking(np.array(tokens), np.array(places), answers)


def _motif(rng: np.random.Generator, letters: np.ndarray, most: int
           ) -> np.ndarray:
  return rng.choice(letters, rng.integers(1, most + 1), replace=False)


def _even(settings: Settings, vocab: int) -> str:
  return '' if vocab % 2 == 0 else 'half of the letters are keys'


def _short_motifs(settings: Settings, motif: int) -> str:
  return '' if motif <= settings.vocab // 2 else (
      f'{settings.vocab} letters have {settings.vocab // 2} keys of one')


PROBES = {
    'recall': record.Probe(
        asks='the value of a key that has been before',
        source=f'{_PAPER}, in-context recall', differs=_ALL,
        level='letters', levels=(16,), draw=recall, least=2,
        size=lambda vocab, settings: 4,
        vocab_size=lambda settings: settings.most,
        limit=lambda settings, vocab: _even(settings, vocab) or (
            '' if vocab <= settings.most else
            f'training has {settings.most} letters')),
    'noisy_recall': record.Probe(
        asks='the value of a key that has been before, among noise',
        source=f'{_PAPER}, noisy in-context recall', differs=_ALL,
        level='shares of noise', levels=(0.2,), draw=noisy_recall, least=0.0,
        size=lambda noise, settings: 4,
        vocab_size=lambda settings: settings.vocab + NOISE, vocab=16,
        limit=lambda settings, noise: '' if noise < 1 else
        'a share is below 1'),
    'fuzzy_recall': record.Probe(
        asks='the value of a key that has been before, of several letters',
        source=f'{_PAPER}, fuzzy in-context recall',
        differs=f'{_ALL} The published test has keys of the full length '
                'alone. Its rows are filled up on the left, and what the last '
                'key is was drawn before the row.',
        level='longest motifs', levels=(3,), draw=fuzzy_recall,
        size=lambda motif, settings: 4 * motif,
        vocab_size=lambda settings: settings.vocab, vocab=15,
        limit=_short_motifs),
}
