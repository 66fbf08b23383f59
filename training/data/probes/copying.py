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
from training.data.probes.record import Row, Settings


def selective_copying(rng: np.random.Generator, count: int, settings: Settings
                      ) -> Row:
  """Returns a row of settings.length: letters with blanks before them, a mark,
  and as many blanks as letters, each of which asks for one."""
  blank, mark = settings.vocab, settings.vocab + 1
  letters = rng.integers(0, settings.vocab, count)
  blanks = settings.length - 2 * count - 1
  tokens = np.insert(letters, np.sort(rng.integers(0, count, blanks)), blank)
  tokens = np.concatenate([tokens, [mark], np.full(count, blank)])
  return record.asking(tokens, np.arange(len(tokens) - count, len(tokens)),
                       letters)


def _write(letters: np.ndarray, answer: np.ndarray, settings: Settings) -> Row:
  mark, end = settings.vocab, settings.vocab + 1
  return record.writing(np.append(letters, mark), np.append(answer, end))


def copy(rng: np.random.Generator, count: int, settings: Settings) -> Row:
  """Returns letters, a mark, the letters again, of which the end is asked for
  too."""
  letters = rng.integers(0, settings.vocab, count)
  return _write(letters, letters, settings)


def reverse(rng: np.random.Generator, count: int, settings: Settings) -> Row:
  """Returns letters, a mark, and the letters from the last to the first."""
  letters = rng.integers(0, settings.vocab, count)
  return _write(letters, letters[::-1], settings)


PLUS, EQUALS, END = 10, 11, 12  # after the digits


def addition(rng: np.random.Generator, digits: int, settings: Settings) -> Row:
  """Returns a sum of two numbers, one of so many digits and one of as many or
  fewer; its end is asked for too. No number of several digits begins with 0. In
  the paper each number of digits is as frequent in both numbers; here that of
  the longer one is."""
  del settings
  sizes = rng.permutation([digits, rng.integers(1, digits + 1)])
  terms = []
  for size in sizes:
    term = rng.integers(0, 10, size)
    term[:1] = rng.integers(int(size > 1), 10)
    terms.append(term)
  total = sum(int(''.join(map(str, term))) for term in terms)
  first, second = terms
  return record.writing(
      np.concatenate([first, [PLUS], second, [EQUALS]]),
      np.array([*map(int, str(total)), END]))


def compression(rng: np.random.Generator, letters: int, settings: Settings
                ) -> Row:
  """Returns so many letters and a mark; every token asks for itself."""
  tokens = np.append(rng.integers(0, settings.vocab, letters), settings.vocab)
  return record.asking(tokens, np.arange(len(tokens)), tokens)


_LETTERS = record.Probe(
    copy, 'letters', tuple(range(1, 21)),  # trained up to 20, tested up to 40
    lambda count, settings: 2 * count + 1, lambda settings: settings.vocab + 2,
    vocab=100, length=41, examples=100_000, grows=True)
PROBES = {
    'selective_copying': record.Probe(
        selective_copying, 'letters to copy', (16,),
        lambda count, settings: 2 * count + 1,
        lambda settings: settings.vocab + 2, vocab=14, length=256, grows=True,
        hides=True),
    'copy': _LETTERS,
    'reverse': _LETTERS._replace(draw=reverse),
    'addition': record.Probe(
        addition, 'digits of the longer number', tuple(range(1, 9)),
        lambda digits, settings: 3 * digits + 3, lambda settings: 13,
        length=27, examples=100_000, grows=True),
    'compression': record.Probe(
        compression, 'letters', (31,), lambda letters, settings: letters + 1,
        lambda settings: settings.vocab + 1, vocab=15, length=32, grows=True,
        hides=True, objective='compression'),
}
