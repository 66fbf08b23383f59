"""Probes that ask for what the row, or a fixed table, told of a key.

Recall in context of MAD (Poli et al. 2024, "Mechanistic Design and Scaling
of Hybrid Architectures", section 3.1 and appendix B): pairs of a key and its
value follow each other to the end, and a key that has been before asks for its
value.

  a 1  b 2  a 1  c 3  b 2        noisy: a 1  x y  b 2  a 1
            1         2          fuzzy: a b 1  c 2 3  a b 1

The published code trains on all next tokens of a row and tests on the answers
alone; here both are on the answers.

Multi-query associative recall (Arora et al. 2023, "Zoology", section 3.1 and
appendix E): pairs of a key and its value, then some of the keys again, at
random places, each of which asks for its value.

  a 1  b 2  c 3  . .  b .  . .  a .  c .
                      2       1    3

Memorisation of MAD (Poli et al. 2024, section 3.1): keys and values of one
fixed table, which no row shows, so that it has to be kept in the weights.

  a ?  c ?  b ?  a ?
    7    2    9    7

Numbers hidden in text (Mohtashami and Jaggi 2023, "Landmark Attention",
section 4.2; with several, as RULER has them, Hsieh et al. 2024, section 3 and
appendix B): sentences that say nothing, among them each number with its name;
then one of the names asks for its number. Text is its UTF-8 bytes.
"""

import functools

import numpy as np

from training.data.probes import record
from training.data.probes.record import Row, Settings

NOISE = 16  # ids of the noise, as published


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
  not repeat inside of a key or a value. The last key has been before. The
  published test has keys of the full length alone. Its rows are filled up on
  the left, and what the last key is was drawn before the row."""
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


POWER = 0.01  # of the gaps' distribution: power_a of the published code
FILLER = 0  # the id between the queries, if they are not drawn


def mqar(rng: np.random.Generator, pairs: int, settings: Settings
         ) -> Row:
  """Returns a row that fills settings.length.

  Ids below half of the vocabulary are keys, but 0, the filler; the others are
  values. Where the queries stand is drawn from the published power law, which
  puts most of them soon after the pairs. With settings.random_non_queries, as
  the published code has by default and its figure 2 has not, each place between
  the queries has any of all ids: also that of a key, which then asks for
  nothing.
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
  if settings.random_non_queries:
    fillers = tokens == FILLER
    tokens[fillers] = rng.integers(0, settings.vocab, fillers.sum())
  return record.asking(tokens, places, values)


SEED = 12345  # of the table, as published


@functools.lru_cache(maxsize=8)
def table(keys: int) -> np.ndarray:
  """Returns the value of each key, [keys]: a fixed permutation of the published
  seed, but ours: the published one has one value more."""
  return keys + np.random.default_rng(SEED).permutation(keys)


def memorisation(rng: np.random.Generator, keys: int, settings: Settings
                 ) -> Row:
  """Returns a row that fills settings.length, of the first `keys` keys."""
  most = settings.most
  chosen = rng.integers(0, keys, settings.length // 2)
  tokens = np.full((len(chosen), 2), 2 * most)  # the mark that asks
  tokens[:, 0] = chosen
  return record.asking(tokens.reshape(-1), 1 + 2 * np.arange(len(chosen)),
                       table(most)[chosen])


NAMES = ('amber', 'birch', 'cedar', 'delta', 'ember', 'fjord', 'grove',
         'heron', 'islet', 'jolly', 'knoll', 'larch', 'maple', 'north',
         'opal', 'pearl')
DIGITS = 5
HAY = ('The grass is green. ', 'The sky is blue. ', 'The sun is yellow. ',
       'Here we go. ', 'There and back again. ')
NEEDLE = 'The magic number for {name} is {number}. '
QUESTION = 'What is the magic number for {name}? It is '
_LONGEST = max(map(len, NAMES))
_NEEDLE = len(NEEDLE.format(name='x' * _LONGEST, number='0' * DIGITS))
_QUESTION = len(QUESTION.format(name='x' * _LONGEST))


def passkey_text(rng: np.random.Generator, needles: int, length: int
                 ) -> tuple[str, str]:
  """Returns a text, of at most `length` bytes with its answer, and the answer.
  """
  names = rng.choice(NAMES, needles, replace=False)
  numbers = [str(n) for n in rng.integers(
      10 ** (DIGITS - 1), 10 ** DIGITS, needles)]
  facts = [NEEDLE.format(name=name, number=number)
           for name, number in zip(names, numbers)]
  asked = rng.integers(needles)
  question = QUESTION.format(name=names[asked])
  room = length - sum(map(len, facts)) - len(question) - DIGITS + 1
  hay = []
  while room >= len(HAY[len(hay) % len(HAY)]):
    room -= len(HAY[len(hay) % len(HAY)])
    hay.append(HAY[len(hay) % len(HAY)])
  places = np.sort(rng.integers(0, len(hay) + 1, needles))
  for place, fact in reversed(list(zip(places, facts))):
    hay.insert(place, fact)
  return ''.join([*hay, question]), numbers[asked]


def passkey(rng: np.random.Generator, needles: int, settings: Settings) -> Row:
  """Returns the bytes of a text that nearly fills settings.length. Lengths are
  in bytes, for which no tokenizer is needed; the sentences around are those of
  the passkey, in a circle, and not essays."""
  prompt, answer = (np.frombuffer(part.encode(), np.uint8) for part in
                    passkey_text(rng, needles, settings.length))
  return record.writing(prompt, answer)


PROBES = {
    'recall': record.Probe(
        recall, 'letters', (16,), lambda vocab, settings: 4,
        lambda settings: settings.most, least=2,
        limit=lambda settings, vocab: record.trained(settings, vocab)
        if vocab % 2 == 0 else 'half of the letters are keys'),
    'noisy_recall': record.Probe(
        noisy_recall, 'shares of noise', (0.2,), lambda noise, settings: 4,
        lambda settings: settings.vocab + NOISE, vocab=16, least=0.0,
        limit=lambda settings, noise:
        '' if noise < 1 else 'a share is below 1'),
    'fuzzy_recall': record.Probe(
        fuzzy_recall, 'longest motifs', (3,),
        lambda motif, settings: 4 * motif, lambda settings: settings.vocab,
        vocab=15, limit=lambda settings, motif:
        '' if motif <= settings.vocab // 2 else
        f'{settings.vocab} letters have {settings.vocab // 2} keys of one'),
    'mqar': record.Probe(
        mqar, 'pairs', (4,), lambda pairs, settings: 4 * pairs,
        lambda settings: settings.vocab, vocab=8192, length=64,
        examples=100_000, held_out=3_000, grows=True, hides=True, fills=True,
        limit=lambda settings, pairs: '' if pairs < settings.vocab // 2 else
        f'{settings.vocab} letters have {settings.vocab // 2 - 1} keys'),
    'memorisation': record.Probe(
        memorisation, 'keys', (127,), lambda keys, settings: 2,
        lambda settings: 2 * settings.most + 1, length=32, examples=256,
        limit=record.trained, hides=True),
    'passkey': record.Probe(
        passkey, 'numbers', (1,),
        lambda needles, settings: needles * _NEEDLE + _QUESTION + DIGITS,
        lambda settings: 256, length=256, limit=lambda settings, needles:
        '' if needles <= len(NAMES) else f'there are {len(NAMES)} names'),
}
