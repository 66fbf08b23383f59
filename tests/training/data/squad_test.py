"""SQuAD's files: what is read, and what is refused where."""

import copy
import json
import os

import pytest

from training.data import squad

CONTEXT = 'Ana saw 308 gulls in the bay.'
QA = dict(id='q1', question='How many?',
          answers=[dict(text='308', answer_start=8),
                   dict(text='308 gulls', answer_start=8)])
NONE = dict(id='q2', question='Why?', is_impossible=True, answers=[],
            plausible_answers=[dict(text='x', answer_start=9)])
FILE = dict(version='v2.0', data=[dict(title='t', paragraphs=[
    dict(context=CONTEXT, qas=[QA, NONE])])])


def _read(folder, document):
  path = folder / 'a.json'
  path.write_text(json.dumps(document))
  return list(squad.read(str(path)))


def test_questions(tmp_path):
  (context, (first, second)), = _read(tmp_path, FILE)
  assert context == CONTEXT
  assert first == squad.Question(
      'q1', 'How many?', (('308', 8), ('308 gulls', 8)),
      f"{tmp_path}/a.json, question 'q1'")
  assert second.answers == () and second.id == 'q2'


def _asked(**fields):
  file = copy.deepcopy(FILE)
  asked = file['data'][0]['paragraphs'][0]['qas'][0]
  asked.update(fields)
  return file


def _answer(**fields):
  return _asked(answers=[dict(text='308', answer_start=8) | fields])


@pytest.mark.parametrize('document, message', [
    (_answer(answer_start=9), "question 'q1', answer 1 is '308', but its "
     "context has '08 ' at answer_start=9"),
    (_answer(answer_start=-3), "context has '' at answer_start=-3"),
    (_answer(answer_start=900), "context has '' at answer_start=900"),
    (_answer(answer_start='8'), "has answer_start='8': it must be the number"),
    (_answer(answer_start=True), 'has answer_start=True: it must be'),
    (_answer(text=''), "field 'text', is empty"),
    (_asked(answers=[]), "question 'q1', has no answer, and is_impossible is "),
    (_asked(is_impossible='no'), "has is_impossible='no': choose true or fals"),
    (_asked(id='q2'), "question 'q2', stands there twice"),
    (_asked(question=' '), "question 'q1', field 'question', is empty"),
    (_asked(answers=None), "has no list 'answers'"),
    (_asked(id=7), 'is 7, not a string'),
    ([], "a.json is no part of a SQuAD file: it has no list 'data'"),
    (dict(data=[dict(paragraphs=[dict(qas=[])])]),
     "article 1, paragraph 1 is no part of a SQuAD file: it has no 'context'"),
    (dict(data=[3]), "article 1 is no part of a SQuAD file: it has no list")])
def test_what_is_no_question_is_refused(document, message, tmp_path):
  with pytest.raises(ValueError, match=message) as caught:
    _read(tmp_path, document)
  assert '\n' not in str(caught.value) and 'a.json' in str(caught.value)


def test_broken_json_is_refused(tmp_path):
  (tmp_path / 'a.json').write_text('{\n"data": [')
  with pytest.raises(
      ValueError, match='a.json is broken JSON: .*, line 2, column 10'):
    list(squad.read(str(tmp_path / 'a.json')))


@pytest.mark.skipif(not os.environ.get('ARCHETYPE_DATA'),
                    reason='ARCHETYPE_DATA names no folder with XQuAD')
def test_xquad_has_the_questions_that_are_published():
  """Artetxe, Ruder and Yogatama 2020: 240 paragraphs, 1,190 questions."""
  found = list(squad.read(
      f'{os.environ["ARCHETYPE_DATA"]}/xquad/xquad.en.json'))
  assert (len(found), sum(len(p.questions) for p in found)) == (240, 1190)
