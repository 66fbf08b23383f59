"""Labelled data in files, read into records.

  labelled:GLOB[:FIELDS]   a text or a pair of texts, and its label: TEXTS
  conll:GLOB[:COLUMNS]     sentences, a word and its label a line: SENTENCES
  squad:GLOB               questions on paragraphs: QUESTIONS
  parallel:GLOB            pairs of a source and a target

`labelled` reads .tsv, .csv and .jsonl. FIELDS names columns, with + between
them, of which the last is the label's: `sentence+label`. Names stand in the
first line of a table, or are the keys of a .jsonl's objects. Where rows have no
label, as those that are to be predicted, none is named: `sentence`, or of two
texts `premise+hypothesis+`. Numbers count the columns of a table from 0.
Without FIELDS a .jsonl has `text` and `label`, and a table has two or three
columns. In a .tsv quotes mean nothing, as in the files of GLUE.

Where FIELDS names no columns, the first line of a table is a line of names, and
no record, if one of its cells is among TEXT_NAMES and one among LABEL_NAMES, as
in what pandas writes. Without FIELDS these say which columns are read.

`conll` reads the files of CoNLL's shared tasks:

  Empire    B-location        columns are separated by tabs, or else by blanks
  State     I-location
                              a line without text ends a sentence
  # a comment                 before a sentence, without the columns of a word
  -DOCSTART- -X- O O          ends a sentence, and is left out

COLUMNS are the numbers of the words and of the labels, 0+-1 where they are left
out; of words without labels one number.

Labels that are O, B-TYPE and I-TYPE mark entities (Ramshaw and Marcus 1995, in
the form that is called IOB2): an entity begins with B, and I goes on with the
entity of the word before. Other labels among them are refused, because their
entities could be read in several ways.

`squad` reads SQuAD's JSON (Rajpurkar et al. 2016; version 2: Rajpurkar, Jia and
Liang 2018), where a question with `is_impossible` has no answer. Questions that
are to be answered have neither `is_impossible` nor `answers`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import itertools
import re
from typing import Any, NamedTuple

from common.errors import RequestError, require, short
from training.data import texts

TEXTS = 'labelled texts'
SENTENCES = 'sentences with a label for each word'
QUESTIONS = 'questions on paragraphs'
PROBE_ROWS = 'rows of a probe'
PAIR = ('source', 'target')
SQUAD_FIELDS = ('context', 'question', 'answers')  # of a data set

# How a line of names calls the columns of texts, that of the label, and those
# that number the rows, in lower case.
TEXT_NAMES = (
    'text', 'text1', 'text2', 'text_a', 'text_b', 'sentence', 'sentence1',
    'sentence2', 'premise', 'hypothesis', 'question', 'question1', 'question2',
    'passage', 'paragraph', 'content', 'body', 'title', 'headline', 'document',
    'abstract', 'description', 'review', 'comment', 'message', 'tweet', 'post',
    'query', 'utterance', 'first', 'second', 'input', 'x')
LABEL_NAMES = (
    'label', 'labels', 'class', 'category', 'target', 'gold', 'gold_label',
    'score', 'stars', 'rating', 'sentiment', 'polarity', 'emotion', 'intent',
    'topic', 'verdict', 'similarity', 'output', 'y')
NUMBER_NAMES = ('', 'unnamed: 0', 'index', 'idx', 'id', 'guid')

_USUAL_NAMES = {2: ('text', 'label'), 3: ('first', 'second', 'label')}
_TAG = re.compile(r'(O|[BI]-\S+)')


class Record(NamedTuple):
  """A text or a pair of texts, with its label.

  Attributes:
    texts: one or two, neither of them empty.
    label: as it is written; '': the row has none.
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
    require(bool(self.label), f'{self.where} has no label, and the target of a '
            'pair of texts is one')
    source = [f'{name}: {text}' for name, text in zip(self.names, self.texts)]
    return [('source', ' '.join(source)), ('target', self.label)]


class Sentence(NamedTuple):
  """A sentence: its words, a label for each or none at all, and the line where
  each word stands."""
  words: list[str]
  labels: list[str]
  lines: list[str]


class Question(NamedTuple):
  """A question.

  Attributes:
    id: of the file, unique in it.
    question: what is asked.
    answers: (text, its first character in the context) of each answer; ():
      the context holds none; None: the file does not say.
    where: its file and id, for messages.
  """
  id: str
  question: str
  answers: tuple[tuple[str, int], ...] | None
  where: str


class Paragraph(NamedTuple):
  """A paragraph and the questions on it, one at least. What is held out are
  whole paragraphs: so no run is evaluated on one that it was trained on."""
  context: str
  questions: tuple[Question, ...]


def is_bare(record: Any) -> bool:
  """Returns whether a record has nothing to learn or to measure: it is a text
  or a sentence without labels, or questions whose answers are not known."""
  if isinstance(record, Record):
    return not record.label
  if isinstance(record, Sentence):
    return not record.labels
  return isinstance(record, Paragraph) and record.questions[0].answers is None


def refuse_bare(name: str, records: Iterable[Any]) -> None:
  """Raises RequestError where there is nothing to learn or to measure of the
  records of the source `name`."""
  require(not any(map(is_bare, records)), f'data source {name!r} has no labels '
          'or answers, so that nothing can be learned or measured of it: '
          f'eval.py --tasks=labels --text={name} --predictions=FILE predicts '
          'them')


def fields_of(name: str, written: str) -> tuple[str, ...]:
  """Returns the columns that FIELDS names, the label's last, which is '' where
  rows have none; () where FIELDS is left out.

  Raises:
    RequestError: unless these are two or three, all names or all numbers.
  """
  fields = tuple(written.split('+')) if written else ()
  if len(fields) == 1:
    fields = (*fields, '')
  named = fields[:-1] if fields and not fields[-1] else fields
  numbers = {field.isdigit() for field in named}
  require(not fields or len(fields) in (2, 3) and all(named)
          and len(numbers) == 1,
          f'data source {name!r} names the fields {written!r}: write the '
          "columns of a text or of two and, last, the label's: "
          'sentence+label, or premise+hypothesis+label, or their numbers; of '
          'rows without a label: sentence, or premise+hypothesis+')
  return fields


def columns_of(name: str, written: str) -> tuple[int, ...]:
  """Returns the columns of words and of labels that COLUMNS names; of words
  alone, if they have no labels."""
  numbers = (written or '0+-1').split('+')
  require(len(numbers) < 3
          and all(re.fullmatch(r'-?\d{1,4}', number) for number in numbers),
          f'data source {name!r} names the columns {written!r}: write the '
          'number of the words and of the labels, counted from 0, as 0+3, or '
          'from the last, as 0+-1; of words without labels, 0')
  return tuple(map(int, numbers))


def read_texts(fields: tuple[str, ...], path: str) -> Iterator[Record]:
  """Yields the records of a file; `fields` by fields_of."""
  is_table = path.endswith(texts.TABLES)
  if not is_table or fields and not fields[0].isdigit():
    columns = fields or ('text', 'label')
    for where, row in texts.rows(path):
      yield _record(where, row, columns, columns)
    return

  rows = texts.rows(path, names=False)
  columns, names, size = fields, (), 0
  for number, (where, row) in enumerate(rows):
    if number == 0:
      size = len(row)
      named = _named_columns(where, row, fields)
      if named:
        columns = named
        names = tuple(row.get(column, '').strip() for column in named)
        continue
      columns = fields or tuple(row)
    require(len(columns) in (2, 3) and (bool(fields) or len(row) == size),
            f'{where}, has {len(row)} columns: name those of the text and of '
            'the label, as in labelled:GLOB:sentence+label where line 1 has '
            'names, or labelled:GLOB:0+1')
    yield _record(where, row, columns, names or _USUAL_NAMES[len(columns)])


def _named_columns(where: str, row: dict[str, str], fields: tuple[str, ...]
                   ) -> tuple[str, ...]:
  """Returns the columns of the texts and, last, of the label, where the first
  line of a table names them; () where it is a record.

  Args:
    where: the file and the line, for messages.
    row: the line, with its columns by their numbers.
    fields: the numbers of the columns that are read; (): the names say it.

  Raises:
    RequestError: for a line of names that leaves open which columns are meant.
  """
  name_of = {column: cell.strip().lower() for column, cell in row.items()}
  texts_ = [column for column in name_of if name_of[column] in TEXT_NAMES]
  labels = [column for column in name_of if name_of[column] in LABEL_NAMES]
  if fields:
    *of_texts, label = fields
    is_named = {*of_texts} <= {*texts_} and (not label or label in labels)
    return fields if is_named else ()
  if not texts_ or not labels:
    return ()
  numbers = [column for column in name_of if name_of[column] in NUMBER_NAMES]
  read = [*texts_, *labels]
  require(len(texts_) <= 2 and len(labels) == 1
          and len(read) + len(numbers) == len(row),
          f'{where}, names the columns {", ".join(row.values())}: say which '
          'are the text and the label, as in labelled:GLOB:sentence+label')
  return tuple(read)


def hint(where: str) -> str:
  """Returns what to do where a record of a table is its line of names, as the
  end of a sentence; '' where it cannot be one."""
  match = re.fullmatch(r'(.*), line 1,?', where)
  if match is None or not match[1].endswith(texts.TABLES):
    return ''
  return ('. If that is a line of names, name the columns: labelled:GLOB:'
          'sentence+label')


def _record(where: str, row: dict[str, Any], columns: Sequence[str],
            names: Sequence[str]) -> Record:
  where = f'{where},'
  *of_texts, label = columns
  texts.check_columns(row, filter(None, columns), where)
  values = [row[column] for column in of_texts]
  if label:
    values.append(_label(row[label], where))
  cells = [texts.checked(value, f'{where} field {name!r},')
           for name, value in zip(names, values)]
  for name, cell in zip(names, cells):
    require(bool(cell.strip()), f'{where} column {name!r}, is empty: a record '
            'has a text, or two, and a label')
  return Record(texts=tuple(cells[:len(of_texts)]),
                label=cells[-1].strip() if label else '',
                where=where, names=tuple(names[:-1]))


def _label(value: Any, where: str) -> str:
  require(isinstance(value, str | int | float), f'{where} has the label '
          f'{short(value)}: a label is a text or a number')
  return str(value)


def dataset_rows(name: str, fields: Sequence[str], dataset: Any) -> texts.Rows:
  """Yields the rows of a data set of the package datasets. A label that is a
  number, of which the data set knows the name, is the name."""
  named = {column: getattr(getattr(feature, 'feature', feature), 'names', None)
           for column, feature in dataset.features.items()}

  def name_of(label: int, names: Sequence[str], where: str) -> str:
    require(0 <= label < len(names), f'{where} has the label {label}, and the '
            f'set has {len(names)}: one whose labels are kept back has -1 for '
            'them')
    return names[label]

  columns = {*fields, 'id'} & {*dataset.column_names}
  for number, row in enumerate(dataset.select_columns([*columns]), 1):
    where = f'{name}, row {number}'
    for column, value in row.items():
      names = named.get(column)
      if names and value is not None:
        row[column] = ([name_of(each, names, where) for each in value]
                       if isinstance(value, list) else
                       name_of(value, names, where))
    yield where, row


def of_rows(name: str, fields: tuple[str, ...], features: Any
            ) -> tuple[str, Callable[[texts.Rows], Iterator[Any]]]:
  """Returns what columns of a data set hold, and what makes records of its
  rows: of columns that are lists, words and their labels."""
  if fields == SQUAD_FIELDS:
    return QUESTIONS, lambda rows: _paragraphs(
        (where, row['context'], dict(
            id=str(row.get('id', where)), question=row['question'],
            is_impossible=not row['answers']['text'], answers=[
                dict(text=text, answer_start=start) for text, start in zip(
                    row['answers']['text'], row['answers']['answer_start'])]),
         row['context']) for where, row in rows)
  lists = [hasattr(features[field], 'feature') for field in fields if field]
  if not any(lists):
    fields_of(name, '+'.join(fields))
    return TEXTS, lambda rows: (
        _record(where, row, fields, fields) for where, row in rows)
  require(all(lists) and len(fields) == 2, f'data source {name!r} names the '
          f'fields {"+".join(fields)}: write one of lists of words and one of '
          'lists of labels')
  return SENTENCES, lambda rows: (_sentence(where, *(
      row[field] or [] for field in fields if field)) for where, row in rows)


def _sentence(where: str, words: list[Any], labels: list[Any] | None = None
              ) -> Sentence:
  require(bool(words), f'{where}, has no words')
  require(labels is None or len(labels) == len(words), f'{where}, has '
          f'{len(words)} words and {len(labels or ())} labels: there is one '
          'for each word')
  lines = [f'{where}, word {i}' for i in range(1, len(words) + 1)]
  return Sentence([texts.checked(word, f'{where},') for word in words],
                  [_label(label, f'{line},')
                   for label, line in zip(labels or (), lines)], lines)


def read_pairs(path: str) -> Iterator[list[tuple[str, str]]]:
  """Yields the (kind, text) parts of each pair of a file: a source, a tab and a
  target a line, or in a .jsonl an object with both."""
  if path.endswith('.jsonl'):
    for where, row in texts.rows(path):
      yield [(kind, texts.checked(row.get(kind), f'{where}, field {kind!r},'))
             for kind in PAIR]
    return
  for where, text in texts.lines(path):
    pair = text.split('\t')
    require(len(pair) == 2, f'{where}, has {len(pair)} fields: a pair is a '
            'source, one tab and a target')
    yield list(zip(PAIR, pair))


def read_sentences(columns: tuple[int, ...], path: str) -> Iterator[Sentence]:
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
    form = ('\t' in text, len(fields))
    # A hashtag may be a word, so a comment has not the shape of one.
    if text.startswith('#') and not sentence.words and (
        form != shape if shape else '\t' not in text):
      continue
    shape = shape or form
    cells = [fields[column].strip() if -len(fields) <= column < len(fields)
             else '' for column in columns]
    require(len(fields) >= len(columns) and all(cells), f'{where}, has '
            f'{len(fields)} columns, and no '
            + (f'word and label in {columns[0]} and {columns[1]}'
               if columns[1:] else f'word in {columns[0]}'))
    sentence.words.append(cells[0])
    sentence.labels.extend(cells[1:])
    sentence.lines.append(where)
  if sentence.words:
    yield sentence


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
  document = texts.parsed(texts.read(path), path)
  try:
    paragraphs = [*_paragraphs(
        (path, paragraph['context'], asked, id(paragraph))
        for article in document['data'] for paragraph in article['paragraphs']
        for asked in paragraph['qas'])]
  except (KeyError, TypeError, AttributeError) as error:
    raise RequestError(f'{path} is no file of SQuAD: {type(error).__name__}: '
                       f'{error}.') from error
  ids = [question.id for p in paragraphs for question in p.questions]
  require(len(ids) == len({*ids}), f'{path} has an id of two questions')
  unknown = {q.answers is None for p in paragraphs for q in p.questions}
  require(len(unknown) < 2, f'{path} has answers, or is_impossible, of some of '
          'its questions: of all, or of none that is to be answered')
  yield from paragraphs


def _paragraphs(asked: Iterable[tuple[str, str, dict[str, Any], Any]]
                ) -> Iterator[Paragraph]:
  """Yields paragraphs of (where, context, question, what tells one paragraph
  from the next), as SQuAD's files have a question."""
  for _, group in itertools.groupby(asked, lambda row: row[3]):
    group = list(group)
    where, context = group[0][:2]
    yield Paragraph(_text(context, where), tuple(
        _question(question, context, where)
        for where, _, question, _ in group))


def _question(asked: dict[str, Any], context: str, path: str) -> Question:
  where = f'{path}, question {short(asked["id"])}'
  if 'answers' not in asked and 'is_impossible' not in asked:
    return Question(id=_text(asked['id'], where), answers=None, where=where,
                    question=_text(asked['question'], where))
  impossible, answers = bool(asked.get('is_impossible', False)), []
  # Of an impossible question, a file may hold answers that only look right.
  for answer in () if impossible else asked['answers']:
    text, start = _text(answer['text'], where), answer['answer_start']
    there = context[start:start + len(text)] if start >= 0 else ''
    require(there == text, f'{where}, has the answer {short(text)}, but its '
            f'context has {short(there)} at answer_start={start}')
    answers.append((text, start))
  require(bool(answers) != impossible, f'{where}, has no answer, and '
          'is_impossible is not true: leave out `answers` where they are not '
          'known')
  return Question(_text(asked['id'], where), _text(asked['question'], where),
                  tuple(answers), where)


def _text(value: Any, where: str) -> str:
  require(bool(texts.checked(value, f'{where}, a text,').strip()),
          f'{where}, has an empty text')
  return value

