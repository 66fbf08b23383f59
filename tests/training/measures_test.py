"""Answers to questions: which stretch is best, and how right it is; entities,
against counts by hand."""

import re

import numpy as np
import pytest

from training.data import records
from training.measures import questions, words

RIGHT = [['B-per', 'I-per', 'O', 'B-loc'], ['O', 'B-loc', 'I-loc', 'B-loc']]


# Worked out by hand by the rules of evaluate-v2.0.py.
@pytest.mark.parametrize('answer, right, exact, f1', [
    ('The  U.S. Army!', ['us army'], 1, 1),
    ('an apple a day', ['Apple-day'], 0, 0),  # appleday is one word
    ('the red red car', ['red car', 'blue'], 0, 4 / 5),
    ('red car', ['the red red car'], 0, 4 / 5),
    ('Anna', ['an a the', 'Anna'], 1, 1),  # articles are whole words
    ('', [], 1, 1), ('x', [], 0, 0), ('', ['x'], 0, 0),
    ('The', ['a.'], 1, 1),  # nothing is left of either
    ('a b b c', ['b b d', 'b c'], 0, 4 / 5)])
def test_scores_by_the_official_rules(answer, right, exact, f1):
  assert questions.score(answer, right) == pytest.approx((exact, f1))


def test_the_best_threshold_is_the_best_of_all():
  rng = np.random.default_rng(0)
  names = [str(i) for i in range(40)]
  right = {n: ['x y'] if rng.random() < .6 else [] for n in names}
  found = {n: rng.choice(['x', 'x y', 'z']) for n in names}
  null = {n: float(rng.normal() - bool(right[n])) for n in names}
  best = questions.best_thresholds(found, right, null)
  for kind in ('exact', 'f1'):
    tried = {}
    for threshold in [-99.0, *null.values()]:
      told = {n: '' if null[n] > threshold else found[n] for n in names}
      tried[threshold] = questions.rules(told, right)[kind]
    assert best[f'best_{kind}'] == pytest.approx(max(tried.values()))
    assert tried[best[f'best_{kind}_thresh']] == pytest.approx(
        max(tried.values()))


def _windows(context, room, stride, seed):
  rng = np.random.default_rng(seed)
  places = np.array([m.span() for m in re.finditer(r'\S+', context)])
  return [questions.Window(rng.normal(size=e - f), rng.normal(size=e - f),
                       places[f:e], float(rng.normal(4, 2)))
          for f, e in records.windows(len(places), room, stride)]


@pytest.mark.parametrize('may_be_null', [False, True])
def test_the_best_stretches_are_the_best_of_all(may_be_null):
  """Against loops over all windows and pairs of tokens."""
  context = ' '.join(f'w{i}' for i in range(30))
  higher = 0
  for seed in range(20):
    windows = _windows(context, 12, 5, seed)
    found = questions.best(context, windows, most=4, count=10,
                       may_be_null=may_be_null)
    scores = {}
    for w in windows:
      for i in range(len(w.starts_T)):
        for j in range(i, min(i + 4, len(w.ends_T))):
          text = context[w.spans_T2[i, 0]:w.spans_T2[j, 1]]
          scores[text] = max(scores.get(text, -99), w.starts_T[i] + w.ends_T[j])
    order = sorted(scores, key=scores.get, reverse=True)
    assert [text for text, _, _ in found.stretches] == order[:10]
    for text, first, score in found.stretches:
      assert context[first:first + len(text)] == text
      assert score == pytest.approx(scores[text])
    gap = min(w.null for w in windows) - scores[order[0]]
    assert found.null_minus_best == pytest.approx(gap)
    none = may_be_null and gap > 0
    higher += gap > 0
    assert found.text == ('' if none else order[0])
    told = questions.best(context, windows, most=4, count=10,
                      may_be_null=may_be_null, threshold=gap + 1e-6)
    assert told.text == order[0]
    told = questions.best(context, windows, most=4, count=10, may_be_null=True,
                      threshold=gap - 1e-6)
    assert told.text == ''
  assert 0 < higher < 20


def test_space_and_a_character_of_several_tokens_take_no_place_of_others():
  """A space scores the most, and the two tokens of one letter come next."""
  window = questions.Window(np.array([9., 5, 5, 1]), np.array([9., 5, 5, 1]),
                            np.array([(0, 1), (1, 2), (1, 2), (2, 3)]), 0.0)
  for count in (1, 2):
    found = questions.best(' äb', [window], most=1, count=count,
                           may_be_null=False)
    assert found.stretches == [('ä', 1, 10.0), ('b', 2, 2.0)][:count]
    assert found.text == 'ä'


def test_entities_are_found_where_type_and_ends_are_right():
  found = [['B-per', 'I-per', 'O', 'B-per'],  # one right, one of a wrong type
           ['O', 'B-loc', 'O', 'B-loc']]  # one too short, one right
  figures = words.entities(RIGHT, found)
  assert (figures['precision'], figures['recall'], figures['f1']) == (.5,) * 3
  assert figures['entities'] == 4 and figures['strict_f1'] == 0.5
  assert figures['types'] == {
      'per': dict(precision=1 / 2, recall=1, f1=pytest.approx(2 / 3),
                  entities=1),
      'loc': dict(precision=1 / 2, recall=pytest.approx(1 / 3),
                  f1=pytest.approx(2 / 5), entities=3)}


def test_strict_takes_no_entity_that_begins_inside():
  """conlleval's rule, which is the default, takes I after O as a beginning."""
  found = [['I-per', 'I-per', 'O', 'B-loc'], RIGHT[1]]
  figures = words.entities(RIGHT, found)
  assert figures['f1'] == 1
  assert figures['strict_precision'] == 1
  assert figures['strict_recall'] == 3 / 4
