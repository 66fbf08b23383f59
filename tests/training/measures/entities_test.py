"""The measures of entities, against counts by hand."""

import pytest

from training.measures import entities

pytest.importorskip('seqeval')
RIGHT = [['B-per', 'I-per', 'O', 'B-loc'], ['O', 'B-loc', 'I-loc', 'B-loc']]


def test_entities_are_found_where_type_and_ends_are_right():
  found = [['B-per', 'I-per', 'O', 'B-per'],  # one right, one of a wrong type
           ['O', 'B-loc', 'O', 'B-loc']]  # one too short, one right
  figures = entities.measures(RIGHT, found)
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
  figures = entities.measures(RIGHT, found)
  assert figures['f1'] == 1
  assert figures['strict_precision'] == 1
  assert figures['strict_recall'] == 3 / 4
