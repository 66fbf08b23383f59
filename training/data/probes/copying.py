"""Probes that write: copies, sums, and a row out of one vector.

Letters that are to be written again: MAD's selective copying (Poli et al.
2024, section 3.1), and copying and reversing as tests of longer rows than in
training (Kazemnejad et al. 2023, "The Impact of Positional Encoding on Length
Generalization in Transformers", section 3).

  selective_copying  a . . b . c > . . .     copy  a b c > a b c
                                 a b c             reverse  a b c > c b a

Sums of two numbers, written from the highest digit on (Kazemnejad et al.
2023, section 3): 4 7 + 5 8 = 1 0 5.

Compression of MAD (Poli et al. 2024, section 3.1): a row of letters and a
mark, all of which are to be told again from the vector of the mark.

  a c b >      a and c and b and > , each from what the model makes of >

What turns the vector into tokens is no part of the architecture: it is the head
'vector' (architectures/parts/heads.py), the same for all.

Letters are ids, where Kazemnejad et al. have words of a text, of which their
tokenizer makes one token each, and words around the numbers.
"""

import numpy as np

from training.data.probes import record
from training.data.probes.record import Probe, Row, Settings


class SelectiveCopying(Probe):
  """Selective copying of MAD."""

  level = 'letters to copy'
  levels = (16,)
  vocab = 14
  length = 256
  grows = True
  hides = True

  def draw(self, rng: np.random.Generator, count: int, settings: Settings
           ) -> Row:
    """Draws a row of letters with blanks between them, after which the letters
    are to be written again without the blanks.

    Args:
      rng: the generator of the draws.
      count: the number of letters.
      settings: the settings of the probe. The row has settings.length tokens:
        the letters, with blanks before them, a mark, and as many blanks as
        letters, each of which asks for one letter.
    """
    # The ids after those of the letters are the blank and the mark.
    blank = settings.vocab
    mark = settings.vocab + 1

    # Insert as many blanks before letters as the row has room for. np.insert
    # counts positions in the letters alone, and several blanks may have the
    # same position.
    letters = rng.integers(0, settings.vocab, count)
    num_blanks = settings.length - 2 * count - 1
    blank_positions = np.sort(rng.integers(0, count, num_blanks))
    letters_and_blanks = np.insert(letters, blank_positions, blank)

    # The blanks after the mark ask for the letters, of which they show nothing.
    tokens = np.concatenate([letters_and_blanks, [mark], np.full(count, blank)])
    asking_positions = np.arange(len(tokens) - count, len(tokens))
    return record.ask_at_positions(
        tokens, positions=asking_positions, answers=letters)

  def min_length(self, count: int, settings: Settings) -> int:
    return 2 * count + 1

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab + 2


class Copy(Probe):
  """Copying, trained on up to 20 letters and tested on up to 40."""

  level = 'letters'
  levels = tuple(range(1, 21))
  vocab = 100
  length = 41
  examples = 100_000
  grows = True

  def draw(self, rng: np.random.Generator, count: int, settings: Settings
           ) -> Row:
    """Draws a row of letters and a mark, after which the letters are to be
    written again, with an end mark.

    Args:
      rng: the generator of the draws.
      count: the number of letters.
      settings: the settings of the probe.
    """
    # The ids after those of the letters are the mark and the end.
    letters = rng.integers(0, settings.vocab, count)
    mark = settings.vocab
    end = settings.vocab + 1
    answer = self.letters_to_write(letters)
    return record.ask_to_write(np.append(letters, mark), np.append(answer, end))

  def letters_to_write(self, letters: np.ndarray) -> np.ndarray:
    """Returns the letters that are to be written after some letters."""
    return letters

  def min_length(self, count: int, settings: Settings) -> int:
    return 2 * count + 1

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab + 2


class Reverse(Copy):
  """Copying of the letters from the last to the first."""

  def letters_to_write(self, letters: np.ndarray) -> np.ndarray:
    """Returns the letters in reverse order."""
    return letters[::-1]


PLUS, EQUALS, END = 10, 11, 12  # after the digits


class Addition(Probe):
  """Sums of two numbers."""

  level = 'digits of the longer number'
  levels = tuple(range(1, 9))
  length = 27
  examples = 100_000
  grows = True

  def draw(self, rng: np.random.Generator, digits: int, settings: Settings
           ) -> Row:
    """Draws a sum of two numbers, after which the digits of its result and an
    end mark are to be written, the highest digit first.

    No number of several digits begins with 0. In the paper, all numbers of
    digits are equally frequent in both numbers; here they are so in the longer
    one.

    Args:
      rng: the generator of the draws.
      digits: the number of digits of the longer number. The other one has as
        many or fewer.
      settings: the settings of the probe, which are not read.
    """
    # Draw the digits of both numbers. Either may be the longer one. The first
    # digit is drawn again, without 0 unless it is the only digit.
    sizes = rng.permutation([digits, rng.integers(1, digits + 1)])
    terms = []
    total = 0
    for size in sizes:
      term_digits = rng.integers(0, 10, size)
      least_first_digit = 1 if size > 1 else 0
      term_digits[:1] = rng.integers(least_first_digit, 10)
      terms.append(term_digits)
      total += int(''.join(map(str, term_digits)))

    # Write the question and the answer, in which a digit is its own id.
    first, second = terms
    question = np.concatenate([first, [PLUS], second, [EQUALS]])
    answer = [int(digit) for digit in str(total)]
    return record.ask_to_write(question, np.array([*answer, END]))

  def min_length(self, digits: int, settings: Settings) -> int:
    return 3 * digits + 3

  def vocab_size(self, settings: Settings) -> int:
    return 13


class Compression(Probe):
  """Compression of MAD."""

  level = 'letters'
  levels = (31,)
  vocab = 15
  length = 32
  grows = True
  hides = True
  objective = 'compression'

  def draw(self, rng: np.random.Generator, letters: int, settings: Settings
           ) -> Row:
    """Draws a row of letters and a mark, all of which ask for themselves.

    Args:
      rng: the generator of the draws.
      letters: the number of letters.
      settings: the settings of the probe.
    """
    mark = settings.vocab
    tokens = np.append(rng.integers(0, settings.vocab, letters), mark)
    return record.ask_at_positions(
        tokens, positions=np.arange(len(tokens)), answers=tokens)

  def min_length(self, letters: int, settings: Settings) -> int:
    return letters + 1

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab + 1


PROBES = {
    'selective_copying': SelectiveCopying(),
    'copy': Copy(),
    'reverse': Reverse(),
    'addition': Addition(),
    'compression': Compression(),
}
