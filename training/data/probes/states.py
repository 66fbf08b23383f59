"""Probes of a state that each token changes, of hops, and of formulas.

State tracking: after each token, which element is the product of all so far?
(Merrill, Petty and Sabharwal 2024, "The Illusion of State in State-Space
Models", section 5: word problems of groups.) Parity is the group of two
elements, counting that of `vocab`; S3 and S5 are all permutations of three and
of five things, A5 the even ones of five. Of these S5 and A5 are not solvable,
and so hard for a fixed depth. The paper's experiments are on Z60 (counting) and
A5, and on A4 x Z5, which is not here; it trains one model for each length, on
rows of two tokens and of that length, where here a row has a number of tokens
up to the longest.

A first id, the same in all rows, stands before them. Without it a decoder whose
positions are relative cannot tell how often a token that fills the row so far
has come: attention takes a mean of equal values.

Induction, in one hop or several (Sanford, Hsu and Telgarsky 2024,
"Transformers, parallel computation, and logarithmic depth", section 4): where
did this letter stand last, and which letter followed it there? With k hops the
question is asked k times, each time of the position that was found.

One hop is the induction head of Olsson et al. 2022; the size of its alphabet,
the length and the number of examples are ours. `hops` is the published form of
several (section 4 and appendix G, and the code), in which no letter follows
itself and a position without so many hops has a symbol of its own; the number
of hops asks for nothing here, where the code has a symbol for it.

Depo of Physics of Language Models 4.1 (Allen-Zhu 2025), as in the code
published with it: a circle of words is told as pairs of a word and the next, in
no order; then, of some words, which one stands k positions on.

  ^ c d  a b  d a  b c  2? a : c  2? d : b          k = 2, words of one letter
                           c        b

A word is one token or several; its last one is of another alphabet, so that it
shows where the word ends. In Depo1 words are short and of many letters; in
Depo2 they are long, of few. The sign before an answer is not asked for, and a
row holds one circle, where the paper fills its context with several.

Mano of Physics of Language Models 4.1 (Allen-Zhu 2025), as in the code
published with it: the value of a formula, each operator before its two
operands, modulo a prime.

  ^ len_2  *  5  +  4  21  ans_2        5 * (4 + 21) = 10 modulo 23
                           10

The start, each operator, and both signs of the number of operators have two
forms, one of which is drawn each time. The value alone is asked for, and a row
holds one formula: the published code returns whole rows, and the paper fills
its context with several.
"""

import functools
import itertools

import numpy as np

from training.data.probes import record
from training.data.probes.record import Probe, Row, Settings


@functools.lru_cache(maxsize=8)
def list_permutations(num_items: int, even: bool = False
                      ) -> tuple[np.ndarray, np.ndarray]:
  """Lists a group of permutations with its multiplication table.

  A permutation p is the array p[0], p[1], ..., where p[i] is the item that
  takes the place of item i.

  Args:
    num_items: the number of items that are permuted.
    even: whether only the even permutations are listed.

  Returns:
    The P permutations in lexicographic order, int [P, num_items]; and the table
    of their products, int [P, P]: table[a, b] is the row of the permutation
    that does the permutation of row a first and then that of row b.
  """
  permutations = np.array(list(itertools.permutations(range(num_items))))

  # A permutation is even if it has an even number of inversions, which are
  # pairs of items in falling order.
  if even:
    num_inversions = np.zeros(len(permutations), np.int64)
    for i, j in itertools.combinations(range(num_items), 2):
      num_inversions += permutations[:, i] > permutations[:, j]
    permutations = permutations[num_inversions % 2 == 0]

  # Note the row of each permutation, by which products are found.
  row_of_permutation = {}
  for row, permutation in enumerate(permutations.tolist()):
    row_of_permutation[tuple(permutation)] = row

  # Multiply each permutation with each. The first one puts first[i] in the
  # place of item i, and the second one second[first[i]] in the place of that.
  table = np.zeros((len(permutations), len(permutations)), np.int64)
  for a, first in enumerate(permutations):
    for b, second in enumerate(permutations):
      product = second[first]
      table[a, b] = row_of_permutation[tuple(product.tolist())]
  return permutations, table


def _ask_for_states(first_id: int, tokens: np.ndarray, states: np.ndarray
                    ) -> Row:
  """Returns a row of 1 + T tokens that asks at each token but the first for the
  state after that token.

  Args:
    first_id: the id that is put before the tokens, the same in all rows.
    tokens: int [T], the tokens.
    states: int [T], the state after each token.
  """
  # The first id moves all tokens on by one position.
  positions = 1 + np.arange(len(tokens))
  return record.ask_at_positions(
      np.append(first_id, tokens), positions=positions, answers=states)


class Counting(Probe):
  """Counting: sums of numbers modulo the number of letters (probe.vocab)."""

  level = 'tokens'
  levels = tuple(range(1, 21))
  vocab = 60
  length = 21
  examples = 100_000
  grows = True
  hides = True

  def draw(self, rng: np.random.Generator, count: int, settings: Settings
           ) -> Row:
    """Draws a row of numbers, each of which asks for the sum so far.

    Args:
      rng: the generator of the draws.
      count: the number of numbers.
      settings: the settings of the probe; settings.vocab is the modulus.
    """
    return self.draw_sums(rng, count, modulus=settings.vocab)

  def draw_sums(self, rng: np.random.Generator, count: int,
                modulus: int) -> Row:
    """Draws a row of numbers below a modulus, each of which asks for the sum of
    the numbers so far, modulo that modulus.

    Args:
      rng: the generator of the draws.
      count: the number of numbers.
      modulus: the modulus. Its own id is the first id of the row.
    """
    numbers = rng.integers(0, modulus, count)
    sums = np.cumsum(numbers) % modulus
    return _ask_for_states(first_id=modulus, tokens=numbers, states=sums)

  def min_length(self, count: int, settings: Settings) -> int:
    return count + 1

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab + 1


class Parity(Counting):
  """Parity: counting modulo 2."""

  vocab = 0

  def draw(self, rng: np.random.Generator, count: int, settings: Settings
           ) -> Row:
    """Draws a row of bits, each of which asks for the parity so far.

    Args:
      rng: the generator of the draws.
      count: the number of bits.
      settings: the settings of the probe, which are not read.
    """
    return self.draw_sums(rng, count, modulus=2)

  def vocab_size(self, settings: Settings) -> int:
    return 3


class Permutations(Counting):
  """The word problem of a group of permutations.

  Args:
    num_items: the number of items that are permuted.
    even: whether only the even permutations are in the group.
  """

  vocab = 0

  def __init__(self, num_items: int, even: bool = False):
    self._num_items = num_items
    self._even = even

  def draw(self, rng: np.random.Generator, count: int, settings: Settings
           ) -> Row:
    """Draws a row of permutations, each of which asks for the product so far.

    A permutation is the id of its row in `list_permutations`.

    Args:
      rng: the generator of the draws.
      count: the number of permutations.
      settings: the settings of the probe, which are not read.
    """
    _, table = list_permutations(self._num_items, self._even)
    num_permutations = len(table)
    tokens = rng.integers(0, num_permutations, count)

    # The state at a position is the product of all permutations up to it. The
    # first one is a state itself.
    states = tokens.copy()
    for t in range(1, count):
      states[t] = table[states[t - 1], tokens[t]]
    return _ask_for_states(first_id=num_permutations, tokens=tokens,
                           states=states)

  def vocab_size(self, settings: Settings) -> int:
    permutations, _ = list_permutations(self._num_items, self._even)
    return len(permutations) + 1


def find_successors(letters_T: np.ndarray) -> np.ndarray:
  """Finds for each position the position after the last earlier occurrence of
  its letter, as an induction head does.

  Args:
    letters_T: int [T], the letters of a row.

  Returns:
    int [T]: for position t the latest j <= t with letters[j - 1] = letters[t];
    -1 if the letter has not occurred before.
  """
  # `position_after` holds for each letter the position after its last
  # occurrence. It is read before the letter is entered, so that no position
  # finds itself.
  successor_T = np.full(len(letters_T), -1)
  position_after: dict[int, int] = {}
  for t, letter in enumerate(letters_T.tolist()):
    successor_T[t] = position_after.get(letter, -1)
    position_after[letter] = t + 1
  return successor_T


class Induction(Probe):
  """Induction heads, in one hop or several."""

  level = 'hops'
  levels = (1,)
  vocab = 16
  length = 64
  hides = True

  def draw(self, rng: np.random.Generator, hops: int, settings: Settings
           ) -> Row:
    """Draws a row of letters, each of which asks which letter followed its last
    occurrence.

    That is one hop. With several hops, the question is asked again at the
    position that was found. A letter for which there are fewer hops asks for
    nothing.

    Args:
      rng: the generator of the draws.
      hops: the number of hops, at least 1.
      settings: the settings of the probe. The row has settings.length tokens:
        an id that says how many hops, and then letters.
    """
    # Follow the hops from all positions at once; -1 marks those with fewer
    # hops.
    letters_T = rng.integers(0, settings.vocab, settings.length - 1)
    position_T = follow_hops(letters_T, hops)
    asking_positions = np.flatnonzero(position_T >= 0)
    answers = letters_T[position_T[asking_positions]]

    # The ids after those of the letters mean 1, 2, ... hops. The id of the hops
    # comes first, and moves all letters on by one position.
    id_of_hops = settings.vocab + hops - 1
    tokens = np.concatenate([[id_of_hops], letters_T])
    return record.ask_at_positions(
        tokens, positions=1 + asking_positions, answers=answers)

  def min_length(self, hops: int, settings: Settings) -> int:
    return hops + 2

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab + settings.hardest_level

  def reason_against(self, settings: Settings, hops: int) -> str:
    return record.reason_against_harder_level(settings, hops)


def follow_hops(letters_T: np.ndarray, hops: int) -> np.ndarray:
  """Returns for each position the position at which a number of hops from there
  ends.

  A hop goes to the position after the last earlier occurrence of the letter.

  Args:
    letters_T: int [T], the letters of a row.
    hops: the number of hops; 0: each position is its own end.

  Returns:
    int [T], the position of the end; -1 if there are fewer hops.
  """
  successor_T = find_successors(letters_T)
  position_T = np.arange(len(letters_T))
  for _ in range(hops):
    # To numpy, the index -1 means the last position: its result is dropped.
    position_T = np.where(position_T < 0, -1, successor_T[position_T])
  return position_T


class Hops(Probe):
  """Several hops, in the published form."""

  level = 'hops'
  levels = tuple(range(17))
  vocab = 4
  length = 99
  examples = 100_000
  least = 0
  hides = True

  def draw(self, rng: np.random.Generator, hops: int, settings: Settings
           ) -> Row:
    """Draws a row of letters, each of which asks for the letter that is some
    hops from it, or for a symbol that says that there are fewer hops.

    A hop goes to the position after the last earlier occurrence of the letter.

    Args:
      rng: the generator of the draws.
      hops: the number of hops; 0: each letter asks for itself.
      settings: the settings of the probe. The row has settings.length tokens:
        an id that says how many hops, and then letters.
    """
    # The ids are, in this order: the letters, the signs of 0, 1, ... hops, and
    # the symbol of no answer.
    vocab = settings.vocab
    no_answer = vocab + settings.hardest_level + 1

    # No letter may follow itself: each differs from the one before it by a step
    # of 1 to vocab - 1, modulo vocab.
    steps_T = rng.integers(1, vocab, settings.length - 1)
    letters_T = (rng.integers(vocab) + np.cumsum(steps_T)) % vocab

    # All letters ask. At a position of -1 the letter is read, and not used.
    position_T = follow_hops(letters_T, hops)
    answers_T = np.where(position_T < 0, no_answer, letters_T[position_T])
    tokens = np.concatenate([[vocab + hops], letters_T])
    return record.ask_at_positions(
        tokens, positions=np.arange(1, settings.length), answers=answers_T)

  def min_length(self, hops: int, settings: Settings) -> int:
    return 2

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab + settings.hardest_level + 2

  def reason_against(self, settings: Settings, hops: int) -> str:
    return record.reason_against_harder_level(settings, hops)


MOST_QUESTIONS = 10  # in a row of Depo: M of the published code

_WordLengths = tuple[int, int]  # the least and the most tokens of a word


def _most_tokens_of_row(words: _WordLengths, count: int) -> int:
  """Returns how many tokens a row of Depo has at most.

  Args:
    words: the least and the most tokens of a word.
    count: how many words the row tells of.
  """
  # Each word is told twice, with the one before it and the one after it. A
  # question has two signs and two words: the one that is asked, and the answer.
  _, longest = words
  return 2 * count * longest + min(count, MOST_QUESTIONS) * (2 + 2 * longest)


def most_words_of_row(words: _WordLengths, length: int) -> int:
  """Returns how many words a row of Depo may tell of: the published N.

  It is the largest count for which `_most_tokens_of_row` is within the length.

  Args:
    words: the least and the most tokens of a word.
    length: the number of tokens of the row.
  """
  # A row of many words asks MOST_QUESTIONS questions, whatever their number.
  _, longest = words
  tokens_of_questions = MOST_QUESTIONS * (2 + 2 * longest)
  count = (length - tokens_of_questions) // (2 * longest)
  if count >= MOST_QUESTIONS:
    return count
  # A row of few words asks one question about each: it needs 2 * longest tokens
  # to tell of a word, and 2 + 2 * longest to ask for it.
  return length // (4 * longest + 2)


@functools.lru_cache(maxsize=8)
def _probability_of_word_count(most: int) -> np.ndarray:
  """Returns the probabilities with which a row of training tells of 3, 4, ...
  `most` words."""
  weight = 1 / (np.arange(3, most + 1) + most ** 0.5)
  return weight / weight.sum()


def _draw_words(rng: np.random.Generator, count: int, words: _WordLengths,
                letters: int) -> list[tuple[int, ...]]:
  """Draws different words, in the order in which they stand on a circle.

  Args:
    rng: the generator of the draws.
    count: how many words. That many words must exist: see Depo.reason_against.
    words: the least and the most tokens of a word.
    letters: the number of letters. The last letter of a word has another id,
      that is larger by this number, so that it shows where the word ends.

  Returns:
    The ids of each word.
  """
  # A word that has been drawn before is entered again and changes nothing. The
  # keys of a dict keep their order; that of a set would change with each run.
  shortest, longest = words
  circle: dict[tuple[int, ...], None] = {}
  while len(circle) < count:
    length = rng.integers(shortest, longest + 1)
    word = rng.integers(0, letters, length)
    word[-1] += letters
    circle[tuple(word.tolist())] = None
  return list(circle)


class Depo(Probe):
  """Depo of Physics of Language Models 4.1.

  Args:
    words: the least and the most tokens of a word.
    letters: the published number of letters.
    hops: the most hops of training.
    count: how many words a published row may tell of.
  """

  level = 'hops'
  examples = 100_000

  def __init__(self, words: _WordLengths, letters: int, hops: int, count: int):
    self._words = words
    self.vocab = letters
    self.levels = tuple(range(1, hops + 1))
    self.length = _most_tokens_of_row(words, count)

  def draw(self, rng: np.random.Generator, hops: int, settings: Settings
           ) -> Row:
    """Draws a row that describes a circle of words and asks questions about it:
    which word comes some hops after this one?

    In a row of training each question has its own number of hops. In a row of
    evaluation all questions have `hops`, and there are as many words as fit
    into settings.length, as published.

    Args:
      rng: the generator of the draws.
      hops: the number of hops in a row of evaluation.
      settings: the settings of the probe; settings.test says whether the row is
        one of evaluation.
    """
    # Draw the words, which of them are asked about, and the hops of each
    # question. A row of training tells of 3 words or more.
    letters = settings.vocab
    count = max_count = most_words_of_row(self._words, settings.length)
    if not settings.test:
      count = 3 + rng.choice(max_count - 2,
                             p=_probability_of_word_count(max_count))
    circle = _draw_words(rng, count=count, words=self._words, letters=letters)
    asked_words = rng.permutation(count)[:MOST_QUESTIONS]
    if settings.test:
      hops_of_questions = np.full(len(asked_words), hops)
    else:
      hops_of_questions = rng.choice(settings.levels, len(asked_words))

    # Write each pair of a word and the next one, in random order. The ids are,
    # in this order: the letters, the last letters of words, the start of a row,
    # the sign before an answer, and the signs of 1, 2, ... hops.
    start_id = 2 * letters
    answer_id = 2 * letters + 1
    tokens = [start_id]
    for i in rng.permutation(count).tolist():
      tokens += [*circle[i], *circle[(i + 1) % count]]

    # Write the questions: the sign of the hops, the word, the sign before the
    # answer, and the answer. A position predicts the token after it, so the
    # answer is asked for from that sign on to its last letter but one.
    asking_positions: list[int] = []
    for i, num_hops in zip(asked_words.tolist(), hops_of_questions.tolist()):
      answer = circle[(i + num_hops) % count]
      tokens += [answer_id + num_hops, *circle[i], answer_id]
      first_position = len(tokens) - 1
      asking_positions += range(first_position, first_position + len(answer))
      tokens += answer

    # The last token is only a target: nothing follows that it could predict.
    row = np.array(tokens)
    positions_A = np.array(asking_positions)
    return record.ask_at_positions(
        row[:-1], positions=positions_A, answers=row[positions_A + 1])

  def min_length(self, hops: int, settings: Settings) -> int:
    return _most_tokens_of_row(self._words, 3)

  def vocab_size(self, settings: Settings) -> int:
    return 2 * settings.vocab + 2 + settings.hardest_level

  def reason_against(self, settings: Settings, hops: int) -> str:
    """Returns the reason why no row can ask for a number of hops; '' if one
    can.

    Args:
      settings: the settings of the probe.
      hops: the number of hops from one word of a circle to another.
    """
    reason = record.reason_against_harder_level(settings, hops)
    if reason:
      return reason
    # The words of a row must all be different. There must be at least so many
    # words of the allowed sizes, or drawing them would never end.
    least, longest = self._words
    num_possible_words = 0
    for size in range(least, longest + 1):
      num_possible_words += settings.vocab ** size
    num_told_words = most_words_of_row(self._words, settings.length)
    if num_told_words <= num_possible_words:
      return ''
    return (f'{settings.vocab} letters spell {num_possible_words} words, and '
            f'rows of {settings.length} tokens tell of {num_told_words}')


OPERATORS = (np.add, np.subtract, np.multiply)  # 'asm' of the published code
FORMS_OF_SIGN = 2


class Mano(Probe):
  """Mano of Physics of Language Models 4.1."""

  level = 'operators'
  levels = tuple(range(1, 11))
  vocab = 23
  length = 24
  examples = 100_000
  longer = False
  hides = True

  def draw(self, rng: np.random.Generator, operators: int, settings: Settings
           ) -> Row:
    """Draws a row with a formula in modular arithmetic, whose last token asks
    for the formula's value.

    Args:
      rng: the generator of the draws.
      operators: the number of operators of the formula.
      settings: the settings of the probe; settings.vocab is the modulus.
    """
    # The ids are, in this order: the numbers below the modulus, the operators,
    # the start, and two signs for each number of operators, one that announces
    # the formula and one that asks for the value. Each but the numbers has
    # FORMS_OF_SIGN ids, of which these are the first.
    modulus = settings.vocab
    start = modulus + FORMS_OF_SIGN * len(OPERATORS)
    announcing = start + FORMS_OF_SIGN + 2 * FORMS_OF_SIGN * (operators - 1)

    # Draw the row in a fixed order, as each draw moves the generator on.
    formula, value = _draw_formula(rng, count=operators, modulus=modulus)
    tokens = [_draw_form(rng, start), _draw_form(rng, announcing), *formula]
    tokens.append(_draw_form(rng, announcing + FORMS_OF_SIGN))
    last_position = len(tokens) - 1
    return record.ask_at_positions(
        np.array(tokens), positions=np.array([last_position]),
        answers=np.array([value]))

  def min_length(self, operators: int, settings: Settings) -> int:
    return 2 * operators + 4

  def vocab_size(self, settings: Settings) -> int:
    signs = len(OPERATORS) + 1 + 2 * settings.hardest_level
    return settings.vocab + FORMS_OF_SIGN * signs

  def reason_against(self, settings: Settings, operators: int) -> str:
    return record.reason_against_harder_level(settings, operators)


def _draw_form(rng: np.random.Generator, first: int) -> int:
  """Draws one of the ids of a sign.

  Args:
    rng: the generator of the draws.
    first: the first of the FORMS_OF_SIGN ids of the sign.
  """
  return int(first + rng.integers(FORMS_OF_SIGN))


def _draw_formula(rng: np.random.Generator, count: int, modulus: int
                  ) -> tuple[list[int], int]:
  """Draws a formula in prefix notation, and computes its value.

  Args:
    rng: the generator of the draws.
    count: the number of its operators; 0: the formula is a number.
    modulus: the prime modulo which it is computed.

  Returns:
    The ids of the formula, each operator before its two operands; and its
    value.
  """
  if count == 0:
    value = int(rng.integers(modulus))
    return [value], value

  # Draw the operator. The other count - 1 operators are divided between its two
  # operands, all divisions with the same probability.
  operator = int(rng.integers(len(OPERATORS)))
  count_of_first = int(rng.integers(count))
  sign = _draw_form(rng, modulus + FORMS_OF_SIGN * operator)

  # Each operand is a formula of its own.
  first, first_value = _draw_formula(
      rng, count=count_of_first, modulus=modulus)
  second, second_value = _draw_formula(
      rng, count=count - 1 - count_of_first, modulus=modulus)
  value = int(OPERATORS[operator](first_value, second_value)) % modulus
  return [sign, *first, *second], value


PROBES = {
    'parity': Parity(),
    'counting': Counting(),
    's3': Permutations(3),
    's5': Permutations(5),
    'a5': Permutations(5, even=True),
    'induction': Induction(),
    'hops': Hops(),
    'depo1': Depo(words=(1, 2), letters=50, hops=8, count=225),
    'depo2': Depo(words=(5, 7), letters=3, hops=16, count=75),
    'mano': Mano(),
}
