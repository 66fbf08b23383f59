"""Numbers hidden in text (Mohtashami and Jaggi 2023, "Landmark Attention",
section 4.2; with several, as RULER has them, Hsieh et al. 2024, section 3 and
appendix B): sentences that say nothing, among them each number with its name;
then one of the names asks for its number. Text is its UTF-8 bytes.
"""

import numpy as np

from training.data.probes import record
from training.data.probes.record import Row, Settings

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


def text(rng: np.random.Generator, needles: int, length: int
         ) -> tuple[str, str]:
  """Returns a text of at most `length` bytes with its answer, and the answer.
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


def draw(rng: np.random.Generator, needles: int, settings: Settings) -> Row:
  """Returns the bytes of a text that nearly fills settings.length."""
  prompt, answer = (np.frombuffer(part.encode(), np.uint8) for part in text(
      rng, needles, settings.length))
  return record.writing(prompt, answer)


PROBES = {'passkey': record.Probe(
    asks='the number that was said of a name, in a text',
    source='Mohtashami and Jaggi 2023, section 4.2; of several, RULER (Hsieh '
           'et al. 2024), section 3',
    differs='Lengths are in bytes, for which no tokenizer is needed; the '
            'sentences around are those of the passkey, in a circle, and not '
            'essays.',
    level='numbers', levels=(1,), draw=draw,
    size=lambda needles, settings: needles * _NEEDLE + _QUESTION + DIGITS,
    vocab_size=lambda settings: 256,
    limit=lambda settings, needles: '' if needles <= len(NAMES) else
    f'there are {len(NAMES)} names', length=256)}
