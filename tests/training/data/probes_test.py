"""Probes: each answer follows from the tokens, as a solver written here finds
it, which knows the task's words and nothing of how its rows are drawn."""

import itertools
import re

from hypothesis import given, settings as hypothesis, strategies as st
import numpy as np
import pytest
from scipy import stats

from common.errors import RequestError
from configs import base
from training.data import probes

# A solver takes the tokens of a row, as a list, and the settings of its probe;
# it returns {place: answer} of all that the row asks for.


def mqar(tokens, settings):
  value, answers = {}, {}
  for place in range(0, len(tokens), 2):
    key, after = tokens[place:place + 2]
    if key in value:
      answers[place] = value[key]
    elif key:
      value[key] = after
  return answers


def induction(tokens, settings):
  hops, answers = tokens[0] - settings.vocab + 1, {}
  letters = tokens[1:]
  for place in range(len(letters)):
    at = place
    for _ in range(hops):
      before = [j + 1 for j in range(at) if letters[j] == letters[at]]
      at = max(before) if before else None
      if at is None:
        break
    if at is not None:
      answers[1 + place] = letters[at]
  return answers


def hops(tokens, settings):
  answers = induction([tokens[0] - 1, *tokens[1:]], settings)
  none = settings.vocab + settings.hardest_level + 1
  assert all(a != b for a, b in zip(tokens[1:], tokens[2:]))
  return {place: answers.get(place, none) for place in range(1, len(tokens))}


def recall(tokens, settings, values=None):
  known, answers = {}, {}
  most = settings.hardest_level if values is None else values
  for place in range(0, len(tokens), 2):
    key, value = tokens[place:place + 2]
    if key >= most:
      continue  # noise
    if key in known:
      answers[place] = known[key]
    known[key] = value
  return answers


def noisy_recall(tokens, settings):
  return recall(tokens, settings, settings.vocab)


def fuzzy_recall(tokens, settings):
  known, answers, place = {}, {}, 0
  runs = [tuple(run) for _, run in itertools.groupby(
      tokens, lambda token: token < settings.vocab // 2)]
  for key, value in zip(runs[::2], runs[1::2]):
    if key in known:
      first = place + len(key) - 1
      answers |= {first + i: known[key][i] for i in range(len(known[key]))}
    known[key] = value
    place += len(key) + len(value)
  return answers


def selective_copying(tokens, settings):
  blank, mark = settings.vocab, settings.vocab + 1
  end = tokens.index(mark)
  letters = [token for token in tokens[:end] if token != blank]
  return dict(zip(range(end + 1, len(tokens)), letters, strict=True))


def copy(tokens, settings, turn=lambda letters: letters):
  mark, end = settings.vocab, settings.vocab + 1
  at = tokens.index(mark)
  answer = [*turn(tokens[:at]), end]
  return dict(zip(range(at, len(tokens)), answer, strict=True))


def reverse(tokens, settings):
  return copy(tokens, settings, lambda letters: letters[::-1])


def addition(tokens, settings):
  text = ''.join('0123456789+='[token] for token in tokens)
  first, second, _ = re.split('[+=]', text)
  assert max(len(first), len(second)) in settings.levels
  assert all(term == str(int(term)) for term in (first, second))
  answer = [*map(int, str(int(first) + int(second))), 12]
  return dict(zip(range(text.index('='), len(text)), answer, strict=True))


def parity(tokens, settings):
  return {i: sum(tokens[1:i + 1]) % 2 for i in range(1, len(tokens))}


def counting(tokens, settings):
  return {i: sum(tokens[1:i + 1]) % settings.vocab
          for i in range(1, len(tokens))}


def permuted(tokens, things, keep=lambda permutation: True):
  """Moves things about, one permutation after the other."""
  numbered = list(filter(keep, itertools.permutations(range(things))))
  where, answers = list(range(things)), {}
  for i, token in enumerate(tokens[1:], 1):
    where = [numbered[token][thing] for thing in where]
    answers[i] = numbered.index(tuple(where))
  return answers


def passkey(tokens, settings):
  text = bytes(tokens).decode()
  name = re.search(r'for (\w+)\? It is ', text)[1]
  number, = re.findall(rf'magic number for {name} is (\d+)\.', text)
  at = text.index('It is ') + len('It is ') - 1
  return {at + i: ord(digit) for i, digit in enumerate(number)}


def is_even(permutation):
  """The determinant of its matrix says so."""
  return round(np.linalg.det(np.eye(len(permutation))[list(permutation)])) > 0


def depo(tokens, settings):
  letters = settings.vocab
  spelled = re.findall(r'\d*[a-z]|[A-Z]', ''.join(
      'S' if token == 2 * letters else 'A' if token == 2 * letters + 1 else
      'H' if token > 2 * letters + 1 else
      'e' if token >= letters else '0' for token in tokens))
  assert spelled[0] == 'S' and spelled.count('S') == 1
  words, place = [], 0
  for word in spelled:
    words.append((place, tuple(tokens[place:place + len(word)])))
    place += len(word)
  start = spelled.index('H')
  after = {words[i][1]: words[i + 1][1] for i in range(1, start, 2)}
  assert sorted(after) == sorted(after.values())
  answers = {}
  for i in range(start, len(words), 4):
    (_, (hops,)), (_, word), (place, _) = words[i:i + 3]
    for _ in range(hops - 2 * letters - 1):
      word = after[word]
    answers |= {place + j: token for j, token in enumerate(word)}
  return answers


def mano(tokens, settings):
  modulus, rest = settings.vocab, list(tokens[2:-1])

  def value():
    token = rest.pop(0)
    if token < modulus:
      return token
    left, right = value(), value()
    return (left + right, left - right, left * right)[
        (token - modulus) // 2] % modulus

  of_length = [(token - modulus - 8) // 2 for token in (tokens[1], tokens[-1])]
  operators = sum(token >= modulus for token in rest)
  assert of_length == [2 * operators - 2, 2 * operators - 1]
  answer = value()
  assert not rest and tokens[0] in (modulus + 6, modulus + 7)
  return {len(tokens) - 1: answer}


def compression(tokens, settings):
  assert tokens.index(settings.vocab) == len(tokens) - 1  # the mark
  return dict(enumerate(tokens))


def memorisation(tokens, settings):
  """The table itself is checked by another test."""
  from training.data.probes import recall as task
  table = task.table_of_values(settings.hardest_level)
  return {i: int(table[tokens[i - 1]]) for i in range(1, len(tokens), 2)}


SOLVERS = {name: globals()[name] for name in probes.PROBES
           if name not in ('s3', 's5', 'a5', 'depo1', 'depo2')} | {
    's3': lambda tokens, settings: permuted(tokens, 3),
    's5': lambda tokens, settings: permuted(tokens, 5),
    'a5': lambda tokens, settings: permuted(tokens, 5, is_even),
    'depo1': depo, 'depo2': depo}
# Levels to draw from, where the published ones are not enough of a choice.
LEVELS = {'recall': (4, 8, 16, 32), 'noisy_recall': (0.0, 0.2, 0.5, 0.9),
          'memorisation': (2, 8, 50), 'fuzzy_recall': (1, 2, 3),
          'induction': (1, 2, 3, 5), 'passkey': (1, 2, 3),
          'mqar': (1, 2, 4, 8), 'hops': (0, 1, 3, 7)}


def of(name, levels=(), length=0, vocab=0):
  probe = probes.PROBES[name]
  levels = tuple(levels) or probe.levels
  settings = probes.Settings(length or probe.length, levels,
                             vocab or probe.vocab, 50, 50)
  size = max(probe.min_length(level, settings) for level in levels)
  settings = settings._replace(length=max(settings.length, size))
  for level in levels:
    probes.check_level(name, level, settings)
  return probe, settings


def check(row, probe, settings, solver):
  tokens = row.tokens.tolist()
  assert len(tokens) == len(row.targets) == len(row.asked)
  assert 0 < len(tokens) <= settings.length
  size = probe.vocab_size(settings)
  assert min(tokens) >= 0 and max(tokens) < size
  answers = {int(i): int(row.targets[i]) for i in np.flatnonzero(row.asked)}
  assert answers == solver(tokens, settings)
  assert all(0 <= answer < size for answer in answers.values())


@pytest.mark.parametrize('name', probes.PROBES)
@hypothesis(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_solver_finds_every_answer(name, data):
  choice = LEVELS.get(name, range(1, 13))
  levels = data.draw(st.lists(st.sampled_from(choice), min_size=1, max_size=4,
                              unique=True))
  reads = bool(probes.PROBES[name].vocab)
  vocab = data.draw(st.sampled_from((0, 20, 34))) if reads else 0
  length = data.draw(st.sampled_from((0, 64, 130)))
  probe, settings = of(name, levels, length, vocab)
  rows = probes.Rows(probe, settings, data.draw(st.sampled_from(
      ('train', 'eval'))), data.draw(st.integers(0, 2**32 - 1)))
  check(rows[data.draw(st.integers(0, 49))], probe, settings, SOLVERS[name])


# Levels and letters of which each id of a probe is drawn soon.
ALL_LEVELS = {'hops': (range(8), 8), 'mqar': ((8,), 34)}


@pytest.mark.parametrize('name', [
    name for name in probes.PROBES if name != 'passkey'])  # of bytes
def test_a_model_has_no_id_that_a_probe_never_shows(name):
  levels, vocab = ALL_LEVELS.get(name, ((), 0))
  probe, settings = of(name, levels, vocab=vocab)
  seen = set()
  for row in probes.Rows(probe, settings._replace(examples=1000), 'train', 0):
    seen.update(row.tokens.tolist(), row.targets[row.asked > 0].tolist())
    if len(seen) == probe.vocab_size(settings):
      break
  assert seen == set(range(probe.vocab_size(settings)))


def test_motifs_have_all_lengths_up_to_the_level():
  probe, settings = of('fuzzy_recall', (3,), 64)
  lengths = {True: set(), False: set()}  # of keys, and of values
  for row in itertools.islice(probes.Rows(probe, settings, 'train', 0), 20):
    is_key = row.tokens < settings.vocab // 2
    for of_key, run in itertools.groupby(is_key.tolist()):
      lengths[of_key].add(len(list(run)))
  assert lengths == {True: {1, 2, 3}, False: {1, 2, 3}}


def test_what_is_memorised_is_one_table_for_all_rows():
  probe, settings = of('memorisation')
  seen = {}
  for split, seed in (('train', 0), ('train', 7), ('eval', 0)):
    for row in itertools.islice(probes.Rows(probe, settings, split, seed), 50):
      for i in np.flatnonzero(row.asked):
        assert seen.setdefault(int(row.tokens[i - 1]), int(row.targets[i])
                               ) == row.targets[i]
  assert len(seen) == len(set(seen.values())) == settings.hardest_level


@pytest.mark.parametrize('name, most', [('depo1', 225), ('depo2', 75)])
def test_circles_of_depo_are_as_large_as_published(name, most):
  """Training: 3 to N words, n of them with weight 1 / (n + sqrt(N)), and each
  question has its own hops; evaluation: N words, and one level of hops."""
  probe, settings = of(name)
  vocab, hops = settings.vocab, len(probe.levels)
  small = settings._replace(length=probe.min_length(1, settings), examples=1)
  assert set(words_of_circles(probe, small, 'train')) == {3}
  rows = probes.Rows(probe, settings, 'eval', 0, levels=(hops,))
  for row in itertools.islice(rows, 3):
    asks = row.tokens[row.tokens > 2 * vocab + 1]
    assert (row.tokens[:np.argmax(row.tokens > 2 * vocab + 1)] >= vocab
            ).sum() == 2 * most + 1 and set(asks - 2 * vocab - 1) == {hops}
  counts = np.array([*words_of_circles(
      probe, settings._replace(examples=800), 'train')])
  sizes = np.arange(3, most + 1)
  law = 1 / (sizes + np.sqrt(most))
  assert counts.min() >= 3 and counts.max() <= most
  np.testing.assert_allclose((counts <= most // 5).mean(),
                             law[sizes <= most // 5].sum() / law.sum(),
                             atol=0.06)
  row = probes.Rows(probe, settings, 'train', 0)[0]
  assert len(set(row.tokens[row.tokens > 2 * vocab + 1])) > 1


def words_of_circles(probe, settings, split):
  """Returns how many words the circle of each row has."""
  vocab = settings.vocab
  for row in probes.Rows(probe, settings, split, 0):
    facts = row.tokens[1:np.argmax(row.tokens > 2 * vocab + 1)]
    yield int((facts >= vocab).sum() // 2)


@pytest.mark.parametrize('name, levels, length, words', [
    ('mqar', (20,), 64, '80 tokens or more'),
    ('mqar', (0,), 64, 'of at least 1'),
    ('mqar', (2.5,), 64, 'whole number'),
    ('recall', (15,), 64, 'half of the letters'),
    ('noisy_recall', (1.0,), 64, 'below 1'),
    ('passkey', (17,), 4096, '16 names'),
    ('hops', (-1,), 64, 'of at least 0'),
    ('depo1', (1,), 29, '30 tokens or more'),
])
def test_levels_that_cannot_be_drawn(name, levels, length, words):
  probe = probes.PROBES[name]
  settings = probes.Settings(length, levels, probe.vocab, 1, 1)
  with pytest.raises(RequestError, match=words):
    probes.check_level(name, levels[0], settings)


def test_what_stands_between_the_queries_of_zoology_may_be_random():
  """As in multiquery_ar.py with random_non_queries=True: the pairs and queries
  are those without it, and every other place has any letter."""
  config = base.base()
  config.objective, config.data.source = 'probe', 'probe:mqar'
  config.data.length, config.probe.vocab = 64, 80
  plain, drawn = [], []
  for rows in (plain, drawn):
    probes.check_probe(config)
    rows += itertools.islice(probes.Rows(probes.find_probe(config),
                                         probes.read_settings(config), 'train',
                                         0), 200)
    config.probe.random_non_queries = True
  for before, after in zip(plain, drawn):
    assert np.array_equal(before.targets, after.targets)
    assert np.array_equal(before.asked, after.asked)
    shown = before.tokens > 0
    assert np.array_equal(before.tokens[shown], after.tokens[shown])
  filled = np.concatenate([after.tokens[before.tokens == 0]
                           for before, after in zip(plain, drawn)])
  assert stats.chisquare(np.bincount(filled, minlength=80)).pvalue > 0.001
  config.data.source, config.probe.vocab = 'probe:copy', 0
  with pytest.raises(RequestError, match='random_non_queries is True, which'):
    probes.check_probe(config)


def test_each_half_of_what_is_held_out_has_rows_of_its_own():
  config = base.base()
  config.objective, config.data.source = 'probe', 'probe:copy'
  rows = {}
  for part in ('', 'first', 'second'):
    config.eval.part = part
    rows[part] = [tuple(row.tokens) for row in itertools.islice(probes.Rows(
        probes.find_probe(config), probes.read_settings(config), 'eval',
        probes.held_out_seed(config)), 20)]
  assert not set(rows['first']) & set(rows['second'])
  assert rows[''] not in (rows['first'], rows['second'])
