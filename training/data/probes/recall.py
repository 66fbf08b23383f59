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
import itertools

import numpy as np

from training.data.probes import record
from training.data.probes.record import Probe, Row, Settings

NUM_NOISE_IDS = 16  # ids of the noise, as published


def _keys_and_values(vocab: int, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the keys and the values of `vocab` letters, of an alphabet of
  `most`: its first half are keys."""
  return np.arange(vocab // 2), most // 2 + np.arange(vocab // 2)


def _draw_pairs(rng: np.random.Generator, keys: np.ndarray, values: np.ndarray,
                noise: float, first_noise: int, settings: Settings) -> Row:
  """Returns a row of pairs, of which a share is noise instead.

  Args:
    rng: the generator of the draws.
    keys: the ids of the keys.
    values: the ids of the values.
    noise: the share of noise.
    first_noise: the first of its NOISE ids.
    settings: the settings of the probe.
  """
  # The key of each pair, or that it is noise.
  count = settings.length // 2
  of_key = rng.choice(values, len(keys))  # what each key has in this row
  chosen = rng.integers(0, len(keys), count)
  noisy = rng.random(count) < noise
  noisy[rng.integers(0, count - 1)] = False  # one pair at least,
  shown = chosen[:-1][~noisy[:-1]]
  noisy[-1] = False
  chosen[-1] = rng.choice(shown)  # which the last asks for

  # The tokens.
  tokens = np.stack([keys[chosen], of_key[chosen]], 1)
  tokens[noisy] = first_noise + rng.integers(0, NUM_NOISE_IDS, (noisy.sum(), 2))

  # A key that has been before asks; noise has a number of its own.
  numbers = np.where(noisy, -1 - np.arange(count), chosen)
  _, first = np.unique(numbers, return_index=True)
  again = ~noisy
  again[first] = False
  return record.ask_at_places(tokens.reshape(-1), 2 * np.flatnonzero(again),
                              of_key[chosen[again]])


class Recall(Probe):
  """Recall in context of MAD."""

  level = 'letters'
  levels = (16,)
  least = 2

  def draw(self, rng: np.random.Generator, vocab: int, settings: Settings
           ) -> Row:
    """Returns a row of pairs of `vocab` letters, half of them keys."""
    keys, values = _keys_and_values(vocab, settings.most)
    return _draw_pairs(rng, keys=keys, values=values, noise=0.0, first_noise=0,
                       settings=settings)

  def size(self, vocab: int, settings: Settings) -> int:
    return 4

  def vocab_size(self, settings: Settings) -> int:
    return settings.most

  def limit(self, settings: Settings, vocab: int) -> str:
    if vocab % 2:
      return 'half of the letters are keys'
    return record.limit_to_training_levels(settings, vocab)


class NoisyRecall(Probe):
  """Recall in context among noise, of MAD."""

  level = 'shares of noise'
  levels = (0.2,)
  vocab = 16
  least = 0.0

  def draw(self, rng: np.random.Generator, noise: float, settings: Settings
           ) -> Row:
    """Returns a row of pairs, of which a share is two ids of noise instead."""
    keys, values = _keys_and_values(settings.vocab, settings.vocab)
    return _draw_pairs(rng, keys=keys, values=values, noise=noise,
                       first_noise=settings.vocab, settings=settings)

  def size(self, noise: float, settings: Settings) -> int:
    return 4

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab + NUM_NOISE_IDS

  def limit(self, settings: Settings, noise: float) -> str:
    return '' if noise < 1 else 'a share is below 1'


class FuzzyRecall(Probe):
  """Recall in context of keys and values of several letters, of MAD."""

  level = 'longest motifs'
  levels = (3,)
  vocab = 15

  def draw(self, rng: np.random.Generator, motif: int, settings: Settings
           ) -> Row:
    """Returns a row of keys and values of one to `motif` letters each, which do
    not repeat inside of a key or a value. The last key has been before. The
    published test has keys of the full length alone. Its rows are filled up on
    the left, and what the last key is was drawn before the row."""
    # The letters of keys, and those of values.
    keys, values = np.split(np.arange(settings.vocab), [settings.vocab // 2])
    of_key: dict[tuple[int, ...], np.ndarray] = {}
    tokens: list[int] = []
    places: list[int] = []
    seen: set[tuple[int, ...]] = set()

    def add(key: tuple[int, ...]) -> None:
      """Adds a pair, which asks for its value if the key has been before."""
      value = of_key[key]
      if key in seen:
        first = len(tokens) + len(key) - 1
        places.extend(range(first, first + len(value)))
      seen.add(key)
      tokens.extend([*key, *value])

    # Pairs, while there is room for the last one.
    room = settings.length - 2 * motif
    while True:
      key = tuple(_draw_motif(rng, keys, motif))
      if key not in of_key:
        of_key[key] = _draw_motif(rng, values, motif)
      if seen and len(tokens) + len(key) + len(of_key[key]) > room:
        break
      add(key)
    add(sorted(seen)[rng.integers(len(seen))])

    # A place asks for the token after it.
    row = np.array(tokens)
    asking = np.array(places)
    return record.ask_at_places(row, asking, row[asking + 1])

  def size(self, motif: int, settings: Settings) -> int:
    return 4 * motif

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab

  def limit(self, settings: Settings, motif: int) -> str:
    keys = settings.vocab // 2
    if motif <= keys:
      return ''
    return f'{settings.vocab} letters have {keys} keys of one'


def _draw_motif(rng: np.random.Generator, letters: np.ndarray, most: int
           ) -> np.ndarray:
  """Returns one to `most` different letters."""
  return rng.choice(letters, rng.integers(1, most + 1), replace=False)


POWER_OF_GAPS = 0.01  # of the gaps' distribution: power_a of the published code
FILLER_ID = 0  # the id between the queries, if they are not drawn


class MQAR(Probe):
  """Multi-query associative recall."""

  level = 'pairs'
  levels = (4,)
  vocab = 8192
  length = 64
  examples = 100_000
  held_out = 3_000
  grows = True
  hides = True
  fills = True

  def draw(self, rng: np.random.Generator, pairs: int, settings: Settings
           ) -> Row:
    """Returns a row that fills settings.length.

    Ids below half of the vocabulary are keys, but 0, the filler; the others are
    values. Where the queries stand is drawn from the published power law, which
    puts most of them soon after the pairs. With settings.random_non_queries, as
    the published code has by default and its figure 2 has not, each place
    between the queries has any of all ids: also that of a key, which then asks
    for nothing.
    """
    # The pairs.
    half = settings.vocab // 2
    keys = rng.choice(np.arange(1, half), pairs, replace=False)
    values = rng.choice(np.arange(half, settings.vocab), pairs, replace=False)
    tokens = np.full(settings.length, FILLER_ID, np.int32)
    context = 2 * pairs
    tokens[:context:2] = keys
    tokens[1:context:2] = values

    # The queries.
    slots = np.arange(1, (settings.length - context) // 2 + 1)
    weight = slots ** (POWER_OF_GAPS - 1)
    gaps = rng.choice(slots - 1, pairs, replace=False, p=weight / weight.sum())
    places = context + 2 * gaps
    tokens[places] = keys

    # The ids between them.
    if settings.random_non_queries:
      fillers = tokens == FILLER_ID
      tokens[fillers] = rng.integers(0, settings.vocab, fillers.sum())
    return record.ask_at_places(tokens, places, values)

  def size(self, pairs: int, settings: Settings) -> int:
    return 4 * pairs

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab

  def limit(self, settings: Settings, pairs: int) -> str:
    half = settings.vocab // 2
    if pairs < half:
      return ''
    return f'{settings.vocab} letters have {half - 1} keys'


SEED_OF_TABLE = 12345  # of the table, as published


@functools.lru_cache(maxsize=8)
def value_of_key(keys: int) -> np.ndarray:
  """Returns the value of each key, [keys]: a fixed permutation of the published
  seed, but ours: the published one has one value more."""
  return keys + np.random.default_rng(SEED_OF_TABLE).permutation(keys)


class Memorisation(Probe):
  """Memorisation of MAD."""

  level = 'keys'
  levels = (127,)
  length = 32
  examples = 256
  hides = True

  def draw(self, rng: np.random.Generator, keys: int, settings: Settings
           ) -> Row:
    """Returns a row that fills settings.length, of the first `keys` keys."""
    most = settings.most
    chosen = rng.integers(0, keys, settings.length // 2)
    tokens = np.full((len(chosen), 2), 2 * most)  # the mark that asks
    tokens[:, 0] = chosen
    places = 1 + 2 * np.arange(len(chosen))
    return record.ask_at_places(tokens.reshape(-1), places,
                                value_of_key(most)[chosen])

  def size(self, keys: int, settings: Settings) -> int:
    return 2

  def vocab_size(self, settings: Settings) -> int:
    return 2 * settings.most + 1

  def limit(self, settings: Settings, keys: int) -> str:
    return record.limit_to_training_levels(settings, keys)


NAMES_OF_NUMBERS = ('amber', 'birch', 'cedar', 'delta', 'ember', 'fjord',
                    'grove', 'heron', 'islet', 'jolly', 'knoll', 'larch',
                    'maple', 'north', 'opal', 'pearl')
NUM_DIGITS = 5
FILLING_SENTENCES = ('The grass is green. ', 'The sky is blue. ',
                     'The sun is yellow. ', 'Here we go. ',
                     'There and back again. ')
FACT = 'The magic number for {name} is {number}. '
QUESTION = 'What is the magic number for {name}? It is '
_LONGEST_NAME = max(NAMES_OF_NUMBERS, key=len)
_MOST_BYTES_OF_FACT = len(FACT.format(name=_LONGEST_NAME,
                                      number=10 ** (NUM_DIGITS - 1)))
_MOST_BYTES_OF_QUESTION = len(QUESTION.format(name=_LONGEST_NAME))


def draw_passkey_text(rng: np.random.Generator, needles: int, length: int
                 ) -> tuple[str, str]:
  """Returns a text, of at most `length` bytes with its answer, and the answer.
  """
  # The facts, and the question about one of them.
  names = rng.choice(NAMES_OF_NUMBERS, needles, replace=False)
  drawn = rng.integers(10 ** (NUM_DIGITS - 1), 10 ** NUM_DIGITS, needles)
  facts = []
  for name, number in zip(names, drawn):
    facts.append(FACT.format(name=name, number=number))
  asked = rng.integers(needles)
  question = QUESTION.format(name=names[asked])

  # Sentences fill the room that is left.
  room = length - sum(map(len, facts)) - len(question) - NUM_DIGITS + 1
  hay: list[str] = []
  for sentence in itertools.cycle(FILLING_SENTENCES):
    if len(sentence) > room:
      break
    hay.append(sentence)
    room -= len(sentence)

  # The facts stand among them, in order.
  places = np.sort(rng.integers(0, len(hay) + 1, needles))
  for place, fact in reversed(list(zip(places, facts))):
    hay.insert(place, fact)
  return ''.join([*hay, question]), str(drawn[asked])


class Passkey(Probe):
  """Numbers hidden in text."""

  level = 'numbers'
  levels = (1,)
  length = 256

  def draw(self, rng: np.random.Generator, needles: int, settings: Settings
           ) -> Row:
    """Returns the bytes of a text that nearly fills settings.length. Lengths
    are in bytes, for which no tokenizer is needed; the sentences around are
    those of the passkey, in a circle, and not essays."""
    prompt, answer = draw_passkey_text(rng, needles, settings.length)
    return record.ask_to_write(np.frombuffer(prompt.encode(), np.uint8),
                               np.frombuffer(answer.encode(), np.uint8))

  def size(self, needles: int, settings: Settings) -> int:
    return needles * _MOST_BYTES_OF_FACT + _MOST_BYTES_OF_QUESTION + NUM_DIGITS

  def vocab_size(self, settings: Settings) -> int:
    return 256

  def limit(self, settings: Settings, needles: int) -> str:
    return '' if needles <= len(
        NAMES_OF_NUMBERS) else f'there are {len(NAMES_OF_NUMBERS)} names'


PROBES = {
    'recall': Recall(),
    'noisy_recall': NoisyRecall(),
    'fuzzy_recall': FuzzyRecall(),
    'mqar': MQAR(),
    'memorisation': Memorisation(),
    'passkey': Passkey(),
}
