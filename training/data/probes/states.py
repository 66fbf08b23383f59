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
question is asked k times, each time of the place that was found.

One hop is the induction head of Olsson et al. 2022; the size of its alphabet,
the length and the number of examples are ours. `hops` is the published form of
several (section 4 and appendix G, and the code), in which no letter follows
itself and a place without so many hops has a symbol of its own; the number of
hops asks for nothing here, where the code has a symbol for it.

Depo of Physics of Language Models 4.1 (Allen-Zhu 2025), as in the code
published with it: a circle of words is told as pairs of a word and the next, in
no order; then, of some words, which one stands k places on.

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
def list_permutations(things: int, even: bool = False
                      ) -> tuple[np.ndarray, np.ndarray]:
  """Lists a group of permutations with its multiplication table.

  Args:
    things: how many things are permuted.
    even: whether only the even permutations are listed.

  Returns:
    The P permutations in lexicographic order, int [P, things], where
    permutation[i] is the thing that takes the place of thing i; and their
    products, int [P, P]: table[a, b] is the row of the permutation that does a
    first and then b.
  """
  # A permutation is even if it has an even number of inversions: pairs of
  # things that are in falling order.
  rows = np.array(list(itertools.permutations(range(things))))
  if even:
    pairs = itertools.combinations(range(things), 2)
    num_inversions = sum(rows[:, i] > rows[:, j] for i, j in pairs)
    rows = rows[num_inversions % 2 == 0]

  # Give each permutation a code: read as the digits of a number in the base
  # `things`, no two are alike. `order` sorts the codes, and leads back from a
  # place among the sorted codes to the row of the permutation.
  digit_values = things ** np.arange(things)
  codes = rows @ digit_values
  order = np.argsort(codes)

  # Multiply each permutation with each, and find the row of the product by its
  # code. To do a and then b maps thing i to b[a[i]], which numpy reads for all
  # pairs at once as products[b, a, i].
  products = rows[:, rows]
  codes_of_products = products @ digit_values
  places_in_order = np.searchsorted(codes[order], codes_of_products)

  # The axes are [b, a] so far, and the table is to be read as table[a, b].
  return rows, order[places_in_order].T


def _ask_for_states(first: int, tokens: np.ndarray, states: np.ndarray) -> Row:
  """Returns the row of a probe that asks for a state at each token after the
  first.

  Args:
    first: the id that stands before the tokens, the same in all rows.
    tokens: int [T], the tokens.
    states: int [T], the state after each of them.
  """
  # The first id moves all tokens on by one place.
  places = 1 + np.arange(len(tokens))
  return record.ask_at_places(np.append(first, tokens), places, states)


class Counting(Probe):
  """Sums of numbers below a modulus, which is the number of letters."""

  level = 'tokens'
  levels = tuple(range(1, 21))
  vocab = 60
  length = 21
  examples = 100_000
  grows = True
  hides = True

  def draw(self, rng: np.random.Generator, count: int, settings: Settings
           ) -> Row:
    """Returns numbers below the modulus, and at each their sum so far."""
    return self.draw_sums(rng, count, settings.vocab)

  def draw_sums(self, rng: np.random.Generator, count: int,
                modulus: int) -> Row:
    """Returns a row of `count` numbers below a modulus, which asks at each for
    their sum so far, modulo the modulus."""
    tokens = rng.integers(0, modulus, count)
    return _ask_for_states(modulus, tokens, np.cumsum(tokens) % modulus)

  def size(self, count: int, settings: Settings) -> int:
    return count + 1

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab + 1


class Parity(Counting):
  """Counting of two numbers."""

  vocab = 0

  def draw(self, rng: np.random.Generator, count: int, settings: Settings
           ) -> Row:
    """Returns bits, and at each their parity so far."""
    return self.draw_sums(rng, count, modulus=2)

  def vocab_size(self, settings: Settings) -> int:
    return 3


class Permutations(Counting):
  """The word problem of a group of permutations.

  Args:
    things: how many things are permuted.
    even: whether the permutations are the even ones alone.
  """

  vocab = 0

  def __init__(self, things: int, even: bool = False):
    self._things = things
    self._even = even

  def draw(self, rng: np.random.Generator, count: int, settings: Settings
           ) -> Row:
    """Returns permutations by number, and at each the product so far.

    Args:
      rng: the generator of the draws.
      count: the number of permutations.
      settings: the settings of the probe, which are not read.
    """
    # A state is the product of all permutations up to a place.
    _, table = list_permutations(self._things, self._even)
    tokens = rng.integers(0, len(table), count)
    states = itertools.accumulate(tokens, lambda state, one: table[state, one])
    return _ask_for_states(len(table), tokens, np.fromiter(states, np.int64,
                                                           count))

  def vocab_size(self, settings: Settings) -> int:
    rows, _ = list_permutations(self._things, self._even)
    return len(rows) + 1


def find_successors(letters_T: np.ndarray) -> np.ndarray:
  """Finds for each place the one after the last earlier occurrence of its
  letter, as an induction head does.

  Args:
    letters_T: int [T], the letters of a row.

  Returns:
    int [T]: for place t the latest j <= t with letters[j - 1] = letters[t]; -1
    where the letter has not been before.
  """
  # A place is read before it is entered itself, so that it never finds itself.
  successor_T = np.full(len(letters_T), -1)
  place_after: dict[int, int] = {}  # letter -> the place after its last one
  for t, letter in enumerate(letters_T.tolist()):
    successor_T[t] = place_after.get(letter, -1)
    place_after[letter] = t + 1
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
    """Draws a row of letters, of which each asks which letter followed its last
    occurrence; with several hops that question is asked again of the place that
    was found.

    A place from which there are not so many hops asks for nothing.

    Args:
      rng: the generator of the draws.
      hops: the number of hops, at least 1.
      settings: the settings of the probe. The row has settings.length tokens:
        an id that says how many hops, and then letters.
    """
    # Follow the hops from all places at once; -1 is a place without so many.
    letters_T = rng.integers(0, settings.vocab, settings.length - 1)
    place_T = follow_hops(letters_T, hops)
    asking_places = np.flatnonzero(place_T >= 0)
    answers = letters_T[place_T[asking_places]]

    # The ids after those of the letters stand for 1, 2, ... hops. That first id
    # moves all letters on by one place.
    tokens = np.concatenate([[settings.vocab + hops - 1], letters_T])
    return record.ask_at_places(tokens, 1 + asking_places, answers)

  def size(self, hops: int, settings: Settings) -> int:
    return hops + 2

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab + settings.most

  def limit(self, settings: Settings, hops: int) -> str:
    return record.limit_to_training_levels(settings, hops)


def follow_hops(letters_T: np.ndarray, hops: int) -> np.ndarray:
  """Returns for each place where a number of hops from it ends.

  A hop goes to the place after the last earlier occurrence of the letter.

  Args:
    letters_T: int [T], the letters of a row.
    hops: the number of hops; 0: each place stays where it is.

  Returns:
    int [T], a place; -1 where there are not so many hops.
  """
  step_T = find_successors(letters_T)
  place_T = np.arange(len(letters_T))
  for _ in range(hops):
    # -1 must not be read as the last place, as numpy would.
    place_T = np.where(place_T < 0, -1, step_T[place_T])
  return place_T


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
    """Draws a row of letters, of which each asks for the letter that is some
    hops from it, or for a symbol that says that there are not so many.

    A hop goes to the place after the last earlier occurrence of the letter.

    Args:
      rng: the generator of the draws.
      hops: the number of hops; 0: each letter asks for itself.
      settings: the settings of the probe. The row has settings.length tokens:
        an id that says how many hops, and then letters.
    """
    # The ids are those of the letters, of 0, 1, ... hops, and of no answer.
    vocab = settings.vocab
    no_answer = settings.vocab + settings.most + 1

    # No letter may follow itself: each differs from the one before it by a step
    # of 1 to vocab - 1, modulo vocab.
    steps_T = rng.integers(1, vocab, settings.length - 1)
    letters_T = (rng.integers(vocab) + np.cumsum(steps_T)) % vocab

    # All letters ask. Where the place is -1, letters_T[-1] is read for nothing.
    place_T = follow_hops(letters_T, hops)
    answers_T = np.where(place_T < 0, no_answer, letters_T[place_T])
    tokens = np.concatenate([[vocab + hops], letters_T])
    return record.ask_at_places(tokens, np.arange(1, settings.length),
                                answers_T)

  def size(self, hops: int, settings: Settings) -> int:
    return 2

  def vocab_size(self, settings: Settings) -> int:
    return settings.vocab + settings.most + 2

  def limit(self, settings: Settings, hops: int) -> str:
    return record.limit_to_training_levels(settings, hops)


MOST_QUESTIONS = 10  # of a row, at most: M of the published code

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
  """Returns how often a row of training tells of 3, 4, ... `most` words."""
  weight = 1 / (np.arange(3, most + 1) + most ** 0.5)
  return weight / weight.sum()


def _draw_words(rng: np.random.Generator, count: int, words: _WordLengths,
                letters: int) -> list[tuple[int, ...]]:
  """Draws different words, in the order in which they stand on a circle.

  Args:
    rng: the generator of the draws.
    count: how many words. That many words must exist: see Depo.limit.
    words: the least and the most tokens of a word.
    letters: the number of letters. The last letter of a word has another id,
      that is larger by this number, so that it shows where the word ends.

  Returns:
    The ids of each word.
  """
  # A word that has been drawn before changes nothing, and another is drawn. The
  # keys of a dict keep their order; that of a set would change with each run.
  circle: dict[tuple[int, ...], None] = {}
  while len(circle) < count:
    spelled = rng.integers(0, letters, rng.integers(words[0], words[1] + 1))
    spelled[-1] += letters
    circle[tuple(spelled.tolist())] = None
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
    """Draws a row that tells of a circle of words and asks questions about it:
    which word stands some hops after this one?

    In a row of training each question has its own number of hops. In one to
    evaluate on all have `hops`, and there are as many words as fit
    settings.length, as published.

    Args:
      rng: the generator of the draws.
      hops: the number of hops of a row to evaluate on.
      settings: the settings of the probe; settings.test says which it is.
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

    # Tell each pair of a word and the next, shuffled. The ids are those of the
    # letters, of the last letters of words, of the start of a row, of the sign
    # before an answer, and then of 1, 2, ... hops.
    start_id = 2 * letters
    answer_id = 2 * letters + 1
    tokens = [start_id]
    for i in rng.permutation(count).tolist():
      tokens += [*circle[i], *circle[(i + 1) % count]]

    # Ask the questions: the sign of the hops, the word, and the sign before the
    # answer. A place predicts the token after it, so the answer is asked for
    # from that sign on to the last letter but one.
    asking_places: list[int] = []
    for i, step in zip(asked_words.tolist(), hops_of_questions.tolist()):
      answer = circle[(i + step) % count]
      tokens += [answer_id + step, *circle[i], answer_id]
      first_place = len(tokens) - 1
      asking_places += range(first_place, first_place + len(answer))
      tokens += answer

    # The last token is only a target: nothing follows that it could predict.
    row = np.array(tokens)
    places_A = np.array(asking_places)
    return record.ask_at_places(row[:-1], places_A, row[places_A + 1])

  def size(self, hops: int, settings: Settings) -> int:
    return _most_tokens_of_row(self._words, 3)

  def vocab_size(self, settings: Settings) -> int:
    return 2 * settings.vocab + 2 + settings.most

  def limit(self, settings: Settings, hops: int) -> str:
    """Returns why no row of these settings can ask for so many hops; '' where
    one can."""
    reason = record.limit_to_training_levels(settings, hops)
    if reason:
      return reason
    # The words of a row must all differ: so many of the allowed sizes have to
    # exist, or drawing them would never end.
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
    formula, value = _draw_formula(rng, operators, modulus)
    tokens = [_draw_form(rng, start), _draw_form(rng, announcing), *formula]
    tokens.append(_draw_form(rng, announcing + FORMS_OF_SIGN))
    last_place = len(tokens) - 1
    return record.ask_at_places(
        np.array(tokens), np.array([last_place]), np.array([value]))

  def size(self, operators: int, settings: Settings) -> int:
    return 2 * operators + 4

  def vocab_size(self, settings: Settings) -> int:
    signs = len(OPERATORS) + 1 + 2 * settings.most
    return settings.vocab + FORMS_OF_SIGN * signs

  def limit(self, settings: Settings, operators: int) -> str:
    return record.limit_to_training_levels(settings, operators)


def _draw_form(rng: np.random.Generator, first: int) -> int:
  """Returns one of the FORMS_OF_SIGN ids of a sign, of which `first` is the
  first."""
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

  # Draw the operator. The count - 1 others are divided between its operands,
  # each division alike likely, and each operand is a formula of its own.
  operator = int(rng.integers(len(OPERATORS)))
  count_of_first = int(rng.integers(count))
  sign = _draw_form(rng, modulus + FORMS_OF_SIGN * operator)
  first, first_value = _draw_formula(rng, count_of_first, modulus)
  second, second_value = _draw_formula(rng, count - 1 - count_of_first, modulus)
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
