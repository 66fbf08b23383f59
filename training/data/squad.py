"""Questions on paragraphs, whose answers are stretches of these, as SQuAD's
files have them (Rajpurkar et al. 2016; version 2: Rajpurkar, Jia and Liang
2018):

  {"version": ..., "data": [{"title": ..., "paragraphs": [
      {"context": TEXT, "qas": [
          {"id": ID, "question": TEXT, "is_impossible": false, "answers": [
              {"text": TEXT, "answer_start": CHARACTER}]}]}]}]}

Version 2 has questions that the paragraph does not answer: `is_impossible`,
with no answers.
"""

from collections.abc import Callable, Iterator
import pathlib
from typing import Any, NamedTuple

from configs.errors import require, short
from training.data import texts

FIELDS = ('context', 'question', 'answers')  # of a data set
KIND = 'questions on paragraphs'
# What an element of each list of a file is called in messages.
_ONE = dict(data='article', paragraphs='paragraph', qas='question',
            answers='answer')


class Question(NamedTuple):
  """A question.

  Attributes:
    id: of the file, unique in it.
    question: what is asked.
    answers: (text, its first character in the context) of each answer; ():
      the context holds none.
    where: its file and id, for messages.
  """
  id: str
  question: str
  answers: tuple[tuple[str, int], ...]
  where: str


class Paragraph(NamedTuple):
  """A paragraph and the questions on it, one at least. What is held out are
  whole paragraphs: so no run is evaluated on one that it was trained on."""
  context: str
  questions: tuple[Question, ...]


def read(path: str) -> Iterator[Paragraph]:
  """Yields the paragraphs of a file that have questions, in order.

  Raises:
    RequestError: for a file that is not of this form, or an answer that does
      not stand in its context where it says.
  """
  document = texts.parsed(pathlib.Path(path).read_bytes(), path)
  seen: set[str] = set()
  for article, place in _each(document, 'data', path):
    for paragraph, place_ in _each(article, 'paragraphs', place):
      context = _text(paragraph, 'context', place_)
      questions = []
      for asked, at in _each(paragraph, 'qas', place_):
        questions.append(_question(asked, context, path, at))
        require(questions[-1].id not in seen, f'{questions[-1].where}, stands '
                'there twice: an id names one question')
        seen.add(questions[-1].id)
      if questions:
        yield Paragraph(context, tuple(questions))


def reader_of_rows(name: str, dataset: Any
                   ) -> Callable[[str], Iterator[Paragraph]]:
  """Returns what yields the paragraphs of a data set of the package datasets,
  which has a question a row and those of a paragraph one after the other."""
  def question(row: dict[str, Any], number: int) -> Question:
    found = row['answers']
    answers = [dict(text=text, answer_start=start) for text, start in zip(
        found['text'], found['answer_start'])]
    return _question(
        dict(id=str(row.get('id', number)), question=row['question'],
             answers=answers, is_impossible=not answers), row['context'], name,
        f'{name}, row {number}')

  def read(_: Any) -> Iterator[Paragraph]:
    asked: list[Question] = []
    before = None
    for number, row in enumerate(dataset, 1):
      if asked and row['context'] != before:
        yield Paragraph(before, tuple(asked))
        asked = []
      before = row['context']
      asked.append(question(row, number))
    if asked:
      yield Paragraph(before, tuple(asked))
  return read


def _question(asked: Any, context: str, path: str, place: str) -> Question:
  name = _text(asked, 'id', place)
  where = f'{path}, question {short(name)}'
  impossible = asked.get('is_impossible', False)
  require(isinstance(impossible, bool), f'{where}, has is_impossible='
          f'{short(impossible)}: choose true or false')
  answers = []
  # Of an impossible question, a file may hold answers that only look right.
  for answer, at in () if impossible else _each(asked, 'answers', where):
    text = _text(answer, 'text', at)
    start = answer.get('answer_start')
    require(type(start) is int, f'{at} has answer_start={short(start)}: it '
            'must be the number of a character of the context')
    there = context[start:start + len(text)] if start >= 0 else ''
    require(there == text, f'{at} is {short(text)}, but its context has '
            f'{short(there)} at answer_start={start}')
    answers.append((text, start))
  require(bool(answers) != impossible, f'{where}, has no answer, and '
          'is_impossible is not true')
  return Question(name, _text(asked, 'question', where), tuple(answers), where)


def _each(holder: Any, name: str, where: str) -> Iterator[tuple[Any, str]]:
  """Yields each element of a list of an object, and where it stands."""
  found = holder.get(name) if isinstance(holder, dict) else None
  require(isinstance(found, list),
          f'{where} is no part of a SQuAD file: it has no list {name!r}')
  for number, element in enumerate(found, 1):
    yield element, f'{where}, {_ONE[name]} {number}'


def _text(holder: Any, name: str, where: str) -> str:
  require(isinstance(holder, dict) and name in holder,
          f'{where} is no part of a SQuAD file: it has no {name!r}')
  text = texts.checked(holder[name], f'{where}, field {name!r},')
  require(bool(text.strip()), f'{where}, field {name!r}, is empty')
  return text
