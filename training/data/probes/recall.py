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
random positions, each of which asks for its value.

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


def _keys_and_values(num_letters: int, vocab: int
                     ) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ids of the keys and the ids of the values of a row.

  Args:
    num_letters: the number of different letters of the row. Half of them are
      keys, and half are values.
    vocab: the number of letters of the task. The lower half of the ids is for
      keys, and the upper half for values.
  """
  num_keys = num_letters // 2
  first_value = vocab // 2
  return np.arange(num_keys), first_value + np.arange(num_keys)


def _draw_pairs(rng: np.random.Generator, keys: np.ndarray, values: np.ndarray,
                noise: float, first_noise: int, settings: Settings) -> Row:
  """Draws a row of pairs of a key and its value, some of which are noise.

  A key that has occurred before asks for its value. The key of the last pair is
  always one of these.

  Args:
    rng: the generator of the draws.
    keys: int [K], the ids of the keys.
    values: int [K], the ids of the values.
    noise: the probability that a pair is two ids of noise instead.
    first_noise: the first of the NUM_NOISE_IDS ids of noise.
    settings: the settings of the probe. The row has settings.length tokens.
  """
  # Draw the value that each key has in this row, the key of each pair as an
  # index into `keys`, and which pairs are noise.
  num_pairs = settings.length // 2
  value_of_key = rng.choice(values, len(keys))
  key_of_pair = rng.integers(0, len(keys), num_pairs)
  is_noise = rng.random(num_pairs) < noise

  # At least one pair before the last is not noise, and the last pair repeats
  # the key of such a pair.
  is_noise[rng.integers(0, num_pairs - 1)] = False
  shown_keys = key_of_pair[:-1][~is_noise[:-1]]
  is_noise[-1] = False
  key_of_pair[-1] = rng.choice(shown_keys)

  # Lay the tokens out as [pairs, 2], and write noise over the pairs of noise.
  tokens = np.stack([keys[key_of_pair], value_of_key[key_of_pair]], 1)
  noise_ids = rng.integers(0, NUM_NOISE_IDS, (is_noise.sum(), 2))
  tokens[is_noise] = first_noise + noise_ids

  # All pairs ask but noise and the first pair of each key, which np.unique
  # finds. Each pair of noise gets a negative number of its own there, so that
  # it does not count as an occurrence of the key that it replaced.
  numbers = np.where(is_noise, -1 - np.arange(num_pairs), key_of_pair)
  _, first_pairs = np.unique(numbers, return_index=True)
  is_asked = ~is_noise
  is_asked[first_pairs] = False

  # The row is read pair after pair, so that keys are at even positions.
  return record.ask_at_positions(
      tokens.reshape(-1), positions=2 * np.flatnonzero(is_asked),
      answers=value_of_key[key_of_pair[is_asked]])


class Recall(Probe):
  """Recall in context of MAD."""

  level = 'letters'
  levels = (16,)
  least = 2

  def draw(self, rng: np.random.Generator, vocab: int, settings: Settings
           ) -> Row:
    """Draws a row of pairs of a key and its value.

    Args:
      rng: the generator of the draws.
      vocab: the number of different letters of the row, half of which are keys.
      settings: the settings of the probe.
    """
    # The ids of values begin after the keys of the level with most letters, so
    # that they are the same at all levels.
    keys, values = _keys_and_values(vocab, settings.hardest_level)
    return _draw_pairs(rng, keys=keys, values=values, noise=0.0, first_noise=0,
                       settings=settings)

  def min_length(self, vocab: int, settings: Settings) -> int:
    return 4

  def vocab_size(self, settings: Settings) -> int:
    return settings.hardest_level

  def reason_against(self, settings: Settings, vocab: int) -> str:
    if vocab % 2:
      return 'half of the letters are keys'
    return record.reason_against_harder_level(settings, vocab)


class NoisyRecall(Probe):
  """Recall in context among noise, of MAD."""

  level = 'shares of noise'
  levels = (0.2,)
  vocab = 16
  least = 0.0

  def draw(self, rng: np.random.Generator, noise: float, settings: Settings
           ) -> Row:
    """Draws a row of pairs of a key and its value, with pairs of noise between
    them.

    Args:
      rng: the generator of the draws.
      noise: the probability that a pair is noise.
      settings: the settings of the probe.
    """
    keys, values = _keys_and_values(settings.vocab, settings.vocab)
    return _draw_pairs(rng, keys=keys, values=values, noise=noise,
                       first_noise=settings.vocab, settings=settings)

  def min_length(self, noise: float, settings: Settings) -> int:
    return 4

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab + NUM_NOISE_IDS

  def reason_against(self, settings: Settings, noise: float) -> str:
    return '' if noise < 1 else 'a share is below 1'


class FuzzyRecall(Probe):
  """Recall in context of keys and values of several letters, of MAD."""

  level = 'longest motifs'
  levels = (3,)
  vocab = 15

  def draw(self, rng: np.random.Generator, motif: int, settings: Settings
           ) -> Row:
    """Draws a row of pairs of a key and its value, both of which have several
    letters. A key that has occurred before asks for its value, and the last key
    is such a key.

    In the published test all keys have the full length. Its rows are filled up
    on the left, and its last key is drawn before the row.

    Args:
      rng: the generator of the draws.
      motif: the most letters of a key or a value, in which no letter repeats.
      settings: the settings of the probe.
    """
    # The first half of the letters spells keys, and the other half values.
    keys, values = np.split(np.arange(settings.vocab), [settings.vocab // 2])
    value_of_key: dict[tuple[int, ...], np.ndarray] = {}
    tokens: list[int] = []
    asking_positions: list[int] = []
    seen_keys: set[tuple[int, ...]] = set()

    def add_pair(key: tuple[int, ...]) -> None:
      """Appends a key and its value to the row. If the key has occurred before,
      its value is asked for, from the key's last letter on."""
      value = value_of_key[key]
      if key in seen_keys:
        start = len(tokens) + len(key) - 1
        asking_positions.extend(range(start, start + len(value)))
      seen_keys.add(key)
      tokens.extend([*key, *value])

    # Add pairs as long as the longest possible last pair still fits after them.
    # At least one is added, since the last pair repeats a key. A key gets its
    # value when it is drawn for the first time.
    room = settings.length - 2 * motif
    while True:
      key = tuple(_draw_motif(rng, keys, most=motif))
      if key not in value_of_key:
        value_of_key[key] = _draw_motif(rng, values, most=motif)
      size_of_pair = len(key) + len(value_of_key[key])
      if seen_keys and len(tokens) + size_of_pair > room:
        break
      add_pair(key)

    # The last pair repeats a key. A set has no order, so it is sorted to draw
    # the same key in all processes.
    last_key = sorted(seen_keys)[rng.integers(len(seen_keys))]
    add_pair(last_key)

    # A position asks for the token after it.
    row = np.array(tokens)
    positions = np.array(asking_positions)
    return record.ask_at_positions(
        row, positions=positions, answers=row[positions + 1])

  def min_length(self, motif: int, settings: Settings) -> int:
    return 4 * motif

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab

  def reason_against(self, settings: Settings, motif: int) -> str:
    keys = settings.vocab // 2
    if motif <= keys:
      return ''
    return f'{settings.vocab} letters have {keys} keys of one'


def _draw_motif(rng: np.random.Generator, letters: np.ndarray, most: int
                ) -> np.ndarray:
  """Draws one to `most` different letters, in random order."""
  return rng.choice(letters, rng.integers(1, most + 1), replace=False)


# The power law of the gaps before queries: power_a of the published code.
POWER_OF_GAPS = 0.01
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
    """Draws a row of pairs of a key and its value, and then the keys again as
    queries, which ask for their values.

    The ids are, in this order: the filler 0, the keys, and from half of the
    vocabulary on the values. The positions of the queries are drawn from the
    published power law, which puts most of them soon after the pairs. With
    settings.random_non_queries (the default of the published code, but not in
    its figure 2), the positions between the queries have any ids, also those of
    keys, which then ask for nothing.

    Args:
      rng: the generator of the draws.
      pairs: the number of pairs.
      settings: the settings of the probe. The row has settings.length tokens,
        of ids below settings.vocab.
    """
    # Write the pairs: keys at even positions, values at odd ones.
    half = settings.vocab // 2
    keys = rng.choice(np.arange(1, half), pairs, replace=False)
    values = rng.choice(np.arange(half, settings.vocab), pairs, replace=False)
    tokens = np.full(settings.length, FILLER_ID, np.int32)
    context = 2 * pairs
    tokens[:context:2] = keys
    tokens[1:context:2] = values

    # Write the queries. The tokens after the pairs are divided into slots of
    # two, of which a query is the first. Slot s = 1, 2, ... is drawn with a
    # probability proportional to s ** (POWER_OF_GAPS - 1), and no slot is drawn
    # twice, so that queries do not overwrite each other.
    slots = np.arange(1, (settings.length - context) // 2 + 1)
    weight = slots ** (POWER_OF_GAPS - 1)
    gaps = rng.choice(slots - 1, pairs, replace=False, p=weight / weight.sum())
    positions = context + 2 * gaps
    tokens[positions] = keys

    # Fill the positions between the queries. All keys and values are above
    # FILLER_ID, so that only free positions still hold it.
    if settings.random_non_queries:
      fillers = tokens == FILLER_ID
      tokens[fillers] = rng.integers(0, settings.vocab, fillers.sum())
    return record.ask_at_positions(tokens, positions=positions, answers=values)

  def min_length(self, pairs: int, settings: Settings) -> int:
    return 4 * pairs

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab

  def reason_against(self, settings: Settings, pairs: int) -> str:
    half = settings.vocab // 2
    if pairs < half:
      return ''
    return f'{settings.vocab} letters have {half - 1} keys'


SEED_OF_TABLE = 12345  # as published


@functools.lru_cache(maxsize=8)
def table_of_values(keys: int) -> np.ndarray:
  """Returns the fixed value of each key, int [keys].

  The values are a permutation, drawn with the published seed. It is not the
  published permutation, which has one value more.

  Args:
    keys: the number of keys, whose ids are 0 to keys - 1. The ids of the values
      come after these.
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
    """Draws a row of keys, each followed by a mark that asks for the value of
    the key in a fixed table. No row shows the table.

    Args:
      rng: the generator of the draws.
      keys: the number of different keys from which those of the row are drawn.
      settings: the settings of the probe. The row has settings.length tokens.
    """
    # The table has the keys of the level with most keys, so that all levels ask
    # for values of the same table. The mark is the id after keys and values.
    num_keys_of_table = settings.hardest_level
    mark = 2 * num_keys_of_table
    values = table_of_values(num_keys_of_table)

    # Lay the tokens out as [pairs, 2]: a key, and the mark after it.
    chosen_keys = rng.integers(0, keys, settings.length // 2)
    tokens = np.full((len(chosen_keys), 2), mark)
    tokens[:, 0] = chosen_keys
    marked_positions = 1 + 2 * np.arange(len(chosen_keys))
    return record.ask_at_positions(
        tokens.reshape(-1), positions=marked_positions,
        answers=values[chosen_keys])

  def min_length(self, keys: int, settings: Settings) -> int:
    return 2

  def vocab_size(self, settings: Settings) -> int:
    return 2 * settings.hardest_level + 1

  def reason_against(self, settings: Settings, keys: int) -> str:
    return record.reason_against_harder_level(settings, keys)


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
    needles: the number of hidden numbers, each of which has a name.
    length: the most bytes of the text and its answer.

  Returns:
    The text with the question at its end; and the answer.
  """
  # Draw the facts, and ask about one of them. Names do not repeat, so that the
  # question has one answer.
  names = rng.choice(NAMES_OF_NUMBERS, needles, replace=False)
  numbers = rng.integers(10 ** (NUM_DIGITS - 1), 10 ** NUM_DIGITS, needles)
  facts = []
  for name, number in zip(names, numbers):
    facts.append(FACT.format(name=name, number=number))
  asked = rng.integers(needles)
  question = QUESTION.format(name=names[asked])

  # Fill the remaining room with sentences without numbers, in a fixed order,
  # until the next one does not fit. The 1 is for the last digit of the answer,
  # which a row asks for and does not show.
  room = length - sum(map(len, facts)) - len(question) - NUM_DIGITS + 1
  sentences: list[str] = []
  for sentence in itertools.cycle(FILLING_SENTENCES):
    if len(sentence) > room:
      break
    sentences.append(sentence)
    room -= len(sentence)

  # Insert the facts at random positions among the sentences, the last fact
  # first, so that it does not move the positions of the others.
  positions = np.sort(rng.integers(0, len(sentences) + 1, needles))
  for position, fact in reversed(list(zip(positions, facts))):
    sentences.insert(position, fact)
  return ''.join([*sentences, question]), str(numbers[asked])


class Passkey(Probe):
  """Numbers hidden in text."""

  level = 'numbers'
  levels = (1,)
  length = 256

  def draw(self, rng: np.random.Generator, needles: int, settings: Settings
           ) -> Row:
    """Draws a text in which numbers are hidden, as bytes. Its end asks for one
    of the numbers.

    The sentences around the numbers are those of the passkey task, repeated,
    and not essays. No tokenizer is needed, as tokens are bytes.

    Args:
      rng: the generator of the draws.
      needles: the number of hidden numbers.
      settings: the settings of the probe. The row nearly fills settings.length.
    """
    prompt, answer = draw_passkey_text(
        rng, needles=needles, length=settings.length)
    return record.ask_to_write(np.frombuffer(prompt.encode(), np.uint8),
                               np.frombuffer(answer.encode(), np.uint8))

  def min_length(self, needles: int, settings: Settings) -> int:
    return needles * _MOST_BYTES_OF_FACT + _MOST_BYTES_OF_QUESTION + NUM_DIGITS

  def vocab_size(self, settings: Settings) -> int:
    return 256

  def reason_against(self, settings: Settings, needles: int) -> str:
    if needles <= len(NAMES_OF_NUMBERS):
      return ''
    return f'there are {len(NAMES_OF_NUMBERS)} names'


PROBES = {
    'recall': Recall(),
    'noisy_recall': NoisyRecall(),
    'fuzzy_recall': FuzzyRecall(),
    'mqar': MQAR(),
    'memorisation': Memorisation(),
    'passkey': Passkey(),
}
