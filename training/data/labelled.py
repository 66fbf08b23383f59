"""Labelled data in files, read into records.

  labelled:GLOB[:FIELDS]   a text or a pair of texts, and its label: TEXTS
  conll:GLOB[:COLUMNS]     sentences, a word and its label a line: SENTENCES
  squad:GLOB               questions on paragraphs: QUESTIONS
  parallel:GLOB            pairs of a source and a target

`labelled` reads .tsv, .csv and .jsonl. FIELDS names columns, with + between
them, of which the last is the label's: `sentence+label`. Names stand in the
first line of a table, or are the keys of a .jsonl's objects. Numbers count
columns from 0, in a table that has no line of names. Without FIELDS a .jsonl
has `text` and `label`, and a table has no line of names, and two or three
columns. In a .tsv quotes mean nothing, as in the files of GLUE.

`conll` reads the files of CoNLL's shared tasks:

  Empire    B-location        columns are separated by tabs, or else by blanks
  State     I-location
                              a line without text ends a sentence
  # a comment                 before a sentence, without the columns of a word
  -DOCSTART- -X- O O          ends a sentence, and is left out

Labels that are O, B-TYPE and I-TYPE mark entities (Ramshaw and Marcus 1995, in
the form that is called IOB2): an entity begins with B, and I goes on with the
entity of the word before. Other labels among them are refused, because their
entities could be read in several ways.

`squad` reads SQuAD's JSON (Rajpurkar et al. 2016; version 2: Rajpurkar, Jia and
Liang 2018), where a question with `is_impossible` has no answer.
"""

from collections.abc import Callable, Iterator, Sequence
import csv
import io
import pathlib
import re
from typing import Any, NamedTuple

from configs.errors import RequestError, require, short
from training.data import texts

TEXTS = 'labelled texts'
SENTENCES = 'sentences with a label for each word'
QUESTIONS = 'questions on paragraphs'
PROBE_ROWS = 'rows of a probe'
PAIR = ('source', 'target')
SUFFIXES = ('.tsv', '.csv', '.jsonl')
COLUMNS = (0, -1)  # of a word and of its label, where a source names none
SQUAD_FIELDS = ('context', 'question', 'answers')  # of a data set

_TAG = re.compile(r'(O|[BI]-\S+)')
_Row = tuple[str, Sequence[str], list[str]]  # where, names and cells


class Record(NamedTuple):
  """A text or a pair of texts, with its label.

  Attributes:
    texts: one or two, neither of them empty.
    label: as it is written; not empty.
    where: the file and the line, for messages.
    names: of the columns of `texts`.
  """
  texts: tuple[str, ...]
  label: str
  where: str
  names: tuple[str, ...]

  def written(self) -> list[tuple[str, str]]:
    """Returns the record as a source text and a target text, as T5 reads tasks
    (Raffel et al. 2020, appendix D): each text after the name of its column,
    and the label."""
    source = [f'{name}: {text}' for name, text in zip(self.names, self.texts)]
    return [('source', ' '.join(source)), ('target', self.label)]


class Sentence(NamedTuple):
  """A sentence: its words, a label for each, and the line where each stands."""
  words: list[str]
  labels: list[str]
  lines: list[str]


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


def fields_of(name: str, written: str) -> tuple[str, ...]:
  """Returns the columns that FIELDS names; () where it is left out.

  Raises:
    RequestError: unless these are two or three, all names or all numbers.
  """
  fields = tuple(written.split('+')) if written else ()
  numbers = {field.isdigit() for field in fields}
  require(not fields or len(fields) in (2, 3) and all(fields)
          and len(numbers) == 1,
          f'data source {name!r} names the fields {written!r}: write the '
          "columns of a text or of two and, last, the label's: "
          'sentence+label, or premise+hypothesis+label, or their numbers')
  return fields


def columns_of(name: str, written: str) -> tuple[int, int]:
  """Returns the columns of words and of labels that COLUMNS names."""
  match = re.fullmatch(r'(-?\d{1,4})\+(-?\d{1,4})', written or '0+-1')
  if match is None:
    raise RequestError(
        f'data source {name!r} names the columns {written!r}: write the number '
        'of the words and of the labels, counted from 0, as 0+3, or from the '
        'last, as 0+-1')
  return int(match[1]), int(match[2])


def read_texts(path: str, fields: tuple[str, ...]) -> Iterator[Record]:
  """Yields the records of a file; `fields` by fields_of."""
  rows = _json_rows if path.endswith('.jsonl') else _table_rows
  yield from _records(rows(path, fields))


def texts_of_rows(name: str, fields: tuple[str, ...], dataset: Any
                  ) -> Iterator[Record]:
  """Yields the records of a data set of the package datasets. A label that is
  a number, of which the data set knows the name, is the name."""
  names_of = getattr(dataset.features[fields[-1]], 'names', None)

  def rows() -> Iterator[_Row]:
    for number, row in enumerate(dataset.select_columns([*fields]), 1):
      where = f'{name}, row {number},'
      label = _named(row[fields[-1]], names_of, where)
      yield where, fields, _cells(row | {fields[-1]: label}, fields, where)

  yield from _records(rows())


def _records(rows: Iterator[_Row]) -> Iterator[Record]:
  for where, names, cells in rows:
    for name, cell in zip(names, cells):
      require(bool(cell.strip()), f'{where} column {name!r}, is empty: a '
              'record has a text, or two, and a label')
    yield Record(tuple(cells[:-1]), cells[-1].strip(), where,
                 tuple(names[:-1]))


def _table_rows(path: str, fields: tuple[str, ...]) -> Iterator[_Row]:
  named = bool(fields) and not fields[0].isdigit()
  places: list[int] | None = None if named or not fields else [
      *map(int, fields)]
  for number, cells in _lines(path):
    where, many = f'{path}, line {number},', f'{len(cells)} columns'
    if named and places is None:  # the line of names
      for field in fields:
        require(field in cells, f'{where} has no column {field!r}: it has '
                f'{short(", ".join(cells))}')
      places, width = [cells.index(field) for field in fields], None
      continue
    if places is None:
      require(len(cells) in (2, 3), f'{where} has {many}: name those of the '
              'text and of the label, as in labelled:GLOB:sentence+label '
              'where this line has names, or labelled:GLOB:0+1')
      places = [*range(len(cells))]
    width = None if fields else len(places)
    require(max(places) < len(cells) and width in (None, len(cells)),
            f'{where} has {many}, and {width or max(places) + 1} are read')
    names = fields if named else (
        *(('text',) if len(places) == 2 else ('first', 'second')), 'label')
    yield where, names, [cells[place] for place in places]


def _lines(path: str) -> Iterator[tuple[int, list[str]]]:
  """Yields each row of a table that holds text, and the line it begins in."""
  text = texts.decoded(pathlib.Path(path).read_bytes(), path)
  csv.field_size_limit(2**31 - 1)  # else a field of 131,073 is refused
  tabs: dict[str, Any] = dict(
      delimiter='\t', quoting=csv.QUOTE_NONE) if path.endswith('.tsv') else {}
  rows = csv.reader(io.StringIO(text.removeprefix('\ufeff'), newline=''),
                    strict=True, **tabs)
  begin = 1
  try:
    for row in rows:
      if any(map(str.strip, row)):
        yield begin, row
      begin = rows.line_num + 1
  except csv.Error as error:
    raise RequestError(f'{path}, line {begin}, is broken CSV: {error}.'
                       ) from error


def _json_rows(path: str, fields: tuple[str, ...]) -> Iterator[_Row]:
  names = fields or ('text', 'label')
  for where, row in texts.objects(path):
    yield f'{where},', names, _cells(row, names, f'{where},')


def _cells(row: dict[str, Any], names: Sequence[str], where: str) -> list[str]:
  """Returns the cells `names` of a row, as text; a label may be a number."""
  for name in names:
    require(name in row, f'{where} has no field {name!r}: it has '
            f'{short(", ".join(row))}')
  label = _named(row[names[-1]], None, where)
  return [texts.checked(value, f'{where} field {name!r},') for name, value in
          zip(names, [*(row[name] for name in names[:-1]), label])]


def _named(label: Any, names: Sequence[str] | None, where: str) -> str:
  """Returns a label as text: by its name, where a data set has names."""
  require(isinstance(label, str | int | float), f'{where} has the label '
          f'{short(label)}: a label is a text or a number')
  if names is None or isinstance(label, str):
    return str(label)
  require(0 <= label < len(names), f'{where} has the label {label}, and the '
          f'set has {len(names)}: one whose labels are kept back has -1 for '
          'them')
  return names[int(label)]


def read_pairs(path: str) -> Iterator[list[tuple[str, str]]]:
  """Yields the (kind, text) parts of each pair of a file: a source, a tab and a
  target a line, or in a .jsonl an object with both."""
  if path.endswith('.jsonl'):
    for where, row in texts.objects(path):
      yield [(kind, texts.checked(row.get(kind), f'{where}, field {kind!r},'))
             for kind in PAIR]
    return
  for where, text in texts.lines(path):
    pair = text.split('\t')
    require(len(pair) == 2, f'{where}, has {len(pair)} fields: a pair is a '
            'source, one tab and a target')
    yield list(zip(PAIR, pair))


def read_sentences(path: str, columns: tuple[int, int] = COLUMNS
                   ) -> Iterator[Sentence]:
  """Yields the sentences of a file, in order; `columns` by columns_of."""
  sentence = Sentence([], [], [])
  shape = None  # of the first line that is surely a word's
  for where, text in texts.lines(path, all_lines=True):
    # A word may hold other spaces, such as one that breaks no line.
    fields = (text.split('\t') if '\t' in text else
              re.split(' +', text.strip(' ')))
    if not text.strip() or fields[0] == '-DOCSTART-':
      if sentence.words:
        yield sentence
      sentence = Sentence([], [], [])
      continue
    own = ('\t' in text, len(fields))
    # A hashtag may be a word, so a comment has not the shape of one.
    if text.startswith('#') and not sentence.words and (
        own != shape if shape else '\t' not in text):
      continue
    shape = shape or own
    pair = [fields[column].strip() if -len(fields) <= column < len(fields)
            else '' for column in columns]
    require(len(fields) > 1 and all(pair), f'{where}, has {len(fields)} '
            f'columns, and no word and label in {columns[0]} and {columns[1]}')
    for found, value in zip(sentence, (*pair, where)):
      found.append(value)
  if sentence.words:
    yield sentence


def sentences_of_rows(name: str, fields: Sequence[str], dataset: Any
                      ) -> Iterator[Sentence]:
  """Yields the sentences of a data set of the package datasets, whose columns
  `fields` are lists: of words, and of labels or their numbers."""
  features = dataset.features
  require(len(fields) == 2 and all(
      hasattr(features[field], 'feature') for field in fields),
          f'data source {name!r} names the fields {"+".join(fields)}: write '
          'one of lists of words and one of lists of labels')
  names = getattr(features[fields[1]].feature, 'names', None)
  for number, row in enumerate(dataset.select_columns([*fields]), 1):
    words, labels = (row[field] or [] for field in fields)
    where = f'{name}, row {number}'
    require(len(words) == len(labels) > 0, f'{where}, has {len(words)} words '
            f'and {len(labels)} labels: there is one for each word')
    lines = [f'{where}, word {i}' for i in range(1, len(words) + 1)]
    yield Sentence([texts.checked(word, f'{where},') for word in words],
                   [_named(label, names, f'{line},')
                    for label, line in zip(labels, lines)], lines)


def check_entities(sentence: Sentence) -> None:
  """Raises RequestError where the labels of a sentence mark no entities."""
  before = 'O'
  for label, where in zip(sentence.labels, sentence.lines):
    require(bool(_TAG.fullmatch(label)), f'{where}, has the label {label!r} '
            'among labels of entities, which are O, B-TYPE and I-TYPE')
    require(not label.startswith('I') or before[2:] == label[2:],
            f'{where}, has the label {label!r} after {before!r}: an entity '
            f'begins with {"B" + label[1:]!r}')
    before = label


def marks_entities(labels: Sequence[str]) -> bool:
  """Returns whether a set of labels is one of entities: all are O, B-TYPE or
  I-TYPE, and one at least is not O."""
  return set(labels) != {'O'} and all(map(_TAG.fullmatch, labels))


def read_questions(path: str) -> Iterator[Paragraph]:
  """Yields the paragraphs of a file that have questions, in order.

  Raises:
    RequestError: for a file that is not of this form, or an answer that does
      not stand in its context where it says.
  """
  document = texts.parsed(pathlib.Path(path).read_bytes(), path)
  try:
    paragraphs = [(paragraph['context'], paragraph['qas'])
                  for article in document['data']
                  for paragraph in article['paragraphs']]
    found = [Paragraph(_text(context, path), tuple(
        _question(asked, context, path) for asked in qas))
             for context, qas in paragraphs if qas]
  except (KeyError, TypeError, AttributeError) as error:
    raise RequestError(f'{path} is no file of SQuAD: {type(error).__name__}: '
                       f'{error}.') from error
  ids = [question.id for p in found for question in p.questions]
  require(len(ids) == len({*ids}), f'{path} has an id of two questions')
  yield from found


def questions_of_rows(name: str, dataset: Any) -> Iterator[Paragraph]:
  """Yields the paragraphs of a data set of the package datasets, which has a
  question a row, and those of a paragraph one after the other."""
  context, asked = '', list[Question]()
  for number, row in enumerate(dataset, 1):
    if asked and row['context'] != context:
      yield Paragraph(context, tuple(asked))
      asked = []
    context, told = row['context'], row['answers']
    answers = [dict(text=text, answer_start=start) for text, start in zip(
        told['text'], told['answer_start'])]
    asked.append(_question(
        dict(id=str(row.get('id', number)), question=row['question'],
             answers=answers, is_impossible=not answers), context, name))
  if asked:
    yield Paragraph(context, tuple(asked))


def _question(asked: dict[str, Any], context: str, path: str) -> Question:
  where = f'{path}, question {short(asked["id"])}'
  impossible, answers = bool(asked.get('is_impossible', False)), []
  # Of an impossible question, a file may hold answers that only look right.
  for answer in () if impossible else asked['answers']:
    text, start = _text(answer['text'], where), answer['answer_start']
    there = context[start:start + len(text)] if start >= 0 else ''
    require(there == text, f'{where}, has the answer {short(text)}, but its '
            f'context has {short(there)} at answer_start={start}')
    answers.append((text, start))
  require(bool(answers) != impossible, f'{where}, has no answer, and '
          'is_impossible is not true')
  return Question(_text(asked['id'], where), _text(asked['question'], where),
                  tuple(answers), where)


def _text(value: Any, where: str) -> str:
  require(bool(texts.checked(value, f'{where}, a text,').strip()),
          f'{where}, has an empty text')
  return value


# What yields the records of a data set of the package datasets, by the kind of
# these: (name, fields, data set) -> records.
OF_ROWS: dict[str, Callable[[str, tuple[str, ...], Any], Iterator[Any]]] = {
    TEXTS: texts_of_rows, SENTENCES: sentences_of_rows,
    QUESTIONS: lambda name, fields, dataset: questions_of_rows(name, dataset)}
