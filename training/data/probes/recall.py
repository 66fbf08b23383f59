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
  """Returns the ids of keys and those of values.

  Args:
    vocab: how many letters a row has; half of them are keys.
    most: how many letters there are; the first half of their ids are keys.
  """
  return np.arange(vocab // 2), most // 2 + np.arange(vocab // 2)


def _draw_pairs(rng: np.random.Generator, keys: np.ndarray, values: np.ndarray,
                noise: float, first_noise: int, settings: Settings) -> Row:
  """Draws a row of pairs of a key and its value, of which a share is noise.

  A key that has been before asks for its value; the last pair is such a one.

  Args:
    rng: the generator of the draws.
    keys: int [K], the ids of the keys.
    values: int [K], the ids of the values.
    noise: the share of pairs that are two ids of noise instead.
    first_noise: the first of the NUM_NOISE_IDS ids of noise.
    settings: the settings of the probe. The row has settings.length tokens.
  """
  # Draw the key of each pair by its number, and which pairs are noise. A key
  # has the same value all through the row, and another one in other rows.
  num_pairs = settings.length // 2
  value_of_key = rng.choice(values, len(keys))  # in this row
  chosen = rng.integers(0, len(keys), num_pairs)
  is_noise = rng.random(num_pairs) < noise
  # One pair at least is shown, and the last pair asks for one of these.
  is_noise[rng.integers(0, num_pairs - 1)] = False
  shown = chosen[:-1][~is_noise[:-1]]
  is_noise[-1] = False
  chosen[-1] = rng.choice(shown)

  # Lay out the tokens as [pairs, 2], and write noise over its pairs.
  tokens = np.stack([keys[chosen], value_of_key[chosen]], 1)
  noise_ids = rng.integers(0, NUM_NOISE_IDS, (is_noise.sum(), 2))
  tokens[is_noise] = first_noise + noise_ids

  # A key that has been before asks for its value. np.unique finds where each
  # number stands first; each pair of noise gets a negative number of its own,
  # so that it is not taken for an occurrence of the key that it replaced.
  numbers = np.where(is_noise, -1 - np.arange(num_pairs), chosen)
  _, first_places = np.unique(numbers, return_index=True)
  is_asked = ~is_noise
  is_asked[first_places] = False

  # The row is read pair after pair, so that keys stand at even places.
  return record.ask_at_places(
      tokens.reshape(-1), places=2 * np.flatnonzero(is_asked),
      answers=value_of_key[chosen[is_asked]])


class Recall(Probe):
  """Recall in context of MAD."""

  level = 'letters'
  levels = (16,)
  least = 2

  def draw(self, rng: np.random.Generator, vocab: int, settings: Settings
           ) -> Row:
    """Returns a row of pairs of a key and its value, of `vocab` letters in all.

    Args:
      rng: the generator of the draws.
      vocab: the number of letters, half of which are keys.
      settings: the settings of the probe.
    """
    # A value has the same id whatever the level: values begin after the keys of
    # the level with most letters.
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
    """Returns a row of pairs, of which a share is two ids of noise instead.

    Args:
      rng: the generator of the draws.
      noise: the share of noise.
      settings: the settings of the probe.
    """
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
    not repeat inside a key or a value. The last key has been before.

    The published test has keys of the full length alone. Its rows are filled up
    on the left, and its last key was drawn before the row.

    Args:
      rng: the generator of the draws.
      motif: the most letters of a key or a value.
      settings: the settings of the probe.
    """
    # The first half of the letters spells keys, and the rest values.
    keys, values = np.split(np.arange(settings.vocab), [settings.vocab // 2])
    value_of_key: dict[tuple[int, ...], np.ndarray] = {}
    tokens: list[int] = []
    asking_places: list[int] = []
    seen_keys: set[tuple[int, ...]] = set()

    def add_pair(key: tuple[int, ...]) -> None:
      """Appends a key and its value to the row. The value is asked for where
      the key has been before: from the key's last letter on."""
      value = value_of_key[key]
      if key in seen_keys:
        first_place = len(tokens) + len(key) - 1
        asking_places.extend(range(first_place, first_place + len(value)))
      seen_keys.add(key)
      tokens.extend([*key, *value])

    # Add pairs while the longest possible last pair still fits. At least one is
    # added, since the last pair repeats a key. A key gets its value when it is
    # drawn first.
    room = settings.length - 2 * motif
    while True:
      key = tuple(_draw_motif(rng, keys, motif))
      if key not in value_of_key:
        value_of_key[key] = _draw_motif(rng, values, motif)
      size_of_pair = len(key) + len(value_of_key[key])
      if seen_keys and len(tokens) + size_of_pair > room:
        break
      add_pair(key)

    # Sorting makes the draw the same in all processes; a set has no order.
    last_key = sorted(seen_keys)[rng.integers(len(seen_keys))]
    add_pair(last_key)

    # A place asks for the token after it.
    row = np.array(tokens)
    places = np.array(asking_places)
    return record.ask_at_places(row, places, row[places + 1])

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
    """Draws a row of pairs of a key and its value, and then the keys again,
    which ask for their values.

    Ids below half of the vocabulary are keys, but 0, the filler; the others are
    values. Where the queries stand is drawn from the published power law, which
    puts most of them soon after the pairs. With settings.random_non_queries, as
    the published code has by default and its figure 2 has not, each place
    between the queries has any of all ids: also that of a key, which then asks
    for nothing.

    Args:
      rng: the generator of the draws.
      pairs: the number of pairs.
      settings: the settings of the probe. The row has settings.length tokens,
        of ids below settings.vocab.
    """
    # Write the pairs: keys at even places, values at odd ones.
    half = settings.vocab // 2
    keys = rng.choice(np.arange(1, half), pairs, replace=False)
    values = rng.choice(np.arange(half, settings.vocab), pairs, replace=False)
    tokens = np.full(settings.length, FILLER_ID, np.int32)
    context = 2 * pairs
    tokens[:context:2] = keys
    tokens[1:context:2] = values

    # Write the queries. What follows the pairs is divided into slots of two
    # tokens, as a pair has; a query is the first of a slot. Slot s = 1, 2, ...
    # is drawn with a probability in proportion to s ** (POWER_OF_GAPS - 1), and
    # none twice, so that no query stands on another one.
    slots = np.arange(1, (settings.length - context) // 2 + 1)
    weight = slots ** (POWER_OF_GAPS - 1)
    gaps = rng.choice(slots - 1, pairs, replace=False, p=weight / weight.sum())
    places = context + 2 * gaps
    tokens[places] = keys

    # Fill the places between the queries. Keys are above FILLER_ID, and so is
    # every value, so that only free places still hold it.
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
def table_of_values(keys: int) -> np.ndarray:
  """Returns the value of each key, int [keys]: a fixed permutation of the
  published seed. It is not the published one, which has one value more.

  Args:
    keys: the number of keys, whose ids are 0 to keys - 1. Values come next.
  """
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
    """Draws a row of keys, each before a mark that asks for the key's value in
    a table that no row shows.

    Args:
      rng: the generator of the draws.
      keys: the number of keys, of which those of the row are drawn.
      settings: the settings of the probe. The row has settings.length tokens.
    """
    # The table has a fixed size, that of the level with most keys: a lower
    # level asks for a part of the same table. The mark is the id after keys and
    # values.
    num_keys_of_table = settings.most
    chosen_keys = rng.integers(0, keys, settings.length // 2)
    tokens = np.full((len(chosen_keys), 2), 2 * num_keys_of_table)

    # A key stands in each even place, and its mark in the odd one after it.
    tokens[:, 0] = chosen_keys
    places = 1 + 2 * np.arange(len(chosen_keys))
    return record.ask_at_places(
        tokens.reshape(-1), places,
        table_of_values(num_keys_of_table)[chosen_keys])

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
  """Draws a text in which numbers are hidden, and a question about one of them.

  Args:
    rng: the generator of the draws.
    needles: how many numbers are hidden, each with a name.
    length: the bytes of the text and its answer, at most.

  Returns:
    The text with the question at its end; and the answer.
  """
  # Draw the facts, and ask about one of them. Names do not repeat, so that the
  # question has one answer.
  names = rng.choice(NAMES_OF_NUMBERS, needles, replace=False)
  drawn = rng.integers(10 ** (NUM_DIGITS - 1), 10 ** NUM_DIGITS, needles)
  facts = []
  for name, number in zip(names, drawn):
    facts.append(FACT.format(name=name, number=number))
  asked = rng.integers(needles)
  question = QUESTION.format(name=names[asked])

  # Fill the room that is left with sentences that say nothing, in a fixed
  # order, until the next one does not fit. The 1 is for the answer's last
  # digit, which a row only predicts and does not show.
  room = length - sum(map(len, facts)) - len(question) - NUM_DIGITS + 1
  sentences: list[str] = []
  for sentence in itertools.cycle(FILLING_SENTENCES):
    if len(sentence) > room:
      break
    sentences.append(sentence)
    room -= len(sentence)

  # Insert the facts. The last comes first, so that the places before it stay
  # what they are.
  places = np.sort(rng.integers(0, len(sentences) + 1, needles))
  for place, fact in reversed(list(zip(places, facts))):
    sentences.insert(place, fact)
  return ''.join([*sentences, question]), str(drawn[asked])


class Passkey(Probe):
  """Numbers hidden in text."""

  level = 'numbers'
  levels = (1,)
  length = 256

  def draw(self, rng: np.random.Generator, needles: int, settings: Settings
           ) -> Row:
    """Draws a text in which numbers are hidden, as bytes; its last bytes ask
    for one of the numbers.

    Lengths are in bytes, for which no tokenizer is needed; the sentences around
    are those of the passkey, in a circle, and not essays.

    Args:
      rng: the generator of the draws.
      needles: how many numbers are hidden.
      settings: the settings of the probe. The row nearly fills settings.length.
    """
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
