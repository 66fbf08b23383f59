"""Text while it comes: whole characters, and no part of a stop string."""

import pytest

from training.chat import Stream
from training.data import tokenizers

BYTES = tokenizers.load('bytes')


def _pieces(text, **settings):
  stream = Stream(BYTES, **settings)
  pieces = []
  for token in text.encode('utf-8') if isinstance(text, str) else text:
    pieces.append(stream.add(token))
    if stream.stopped:
      break
  return [*pieces, stream.end()], stream


def test_a_character_waits_for_its_last_byte():
  pieces, _ = _pieces('aé€')
  assert pieces == ['a', '', 'é', '', '', '€', '']


@pytest.mark.parametrize('text, pieces', [
    ('one\nU: x', ['o', 'n', 'e', '', '', '', '']),
    ('a\n\nU', ['a', '', '\n', '', '\nU']),
    ('a\nX', ['a', '', '\nX', ''])])
def test_the_beginning_of_a_stop_string_is_held_back(text, pieces):
  found, stream = _pieces(text, stops=['\nU:', '###'])
  assert found == pieces
  assert stream.stopped == ('U:' in text)
  assert stream.text == ''.join(found) == text.partition('\nU:')[0]


def test_the_lead_is_no_part_of_the_answer():
  assert _pieces(' Hi', lead=' ')[0] == ['', 'H', 'i', '']
  assert _pieces('Hi', lead=' ')[0] == ['H', 'i', '']
  assert _pieces('', lead=' ')[0] == ['']
  assert _pieces(' ', lead=' ')[0] == ['', '']
