"""Labelled data in files, read into records.

  labelled:GLOB[:FIELDS]   a text or a pair of texts, and its label: TEXTS
  conll:GLOB[:COLUMNS]     sentences, a word and its label a line: SENTENCES
  squad:GLOB               questions on paragraphs: QUESTIONS
  parallel:GLOB            pairs of a source and a target

`labelled` reads .tsv, .csv and .jsonl. FIELDS names columns, with + between
them, of which the last is the label's: `sentence+label`. Names stand in the
first line of a table, or are the keys of a .jsonl's objects. Where rows have no
label, as those that are to be predicted, none is named: `sentence`, or with two
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
out; one number, where words have no labels.

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

from common.errors import RequestError, require, shorten
from training.data import texts

TEXTS = 'labelled texts'
SENTENCES = 'sentences with a label for each word'
QUESTIONS = 'questions on paragraphs'
PROBE_ROWS = 'rows of a probe'
PAIR = ('source', 'target')
SQUAD_FIELDS = ('context', 'question', 'answers')  # in a data set

# How a line of names calls the columns of texts, that of the label, and those
# that number the rows, in lower case.
NAMES_OF_TEXT_COLUMNS = (
    'text', 'text1', 'text2', 'text_a', 'text_b', 'sentence', 'sentence1',
    'sentence2', 'premise', 'hypothesis', 'question', 'question1', 'question2',
    'passage', 'paragraph', 'content', 'body', 'title', 'headline', 'document',
    'abstract', 'description', 'review', 'comment', 'message', 'tweet', 'post',
    'query', 'utterance', 'first', 'second', 'input', 'x')
NAMES_OF_LABEL_COLUMNS = (
    'label', 'labels', 'class', 'category', 'target', 'gold', 'gold_label',
    'score', 'stars', 'rating', 'sentiment', 'polarity', 'emotion', 'intent',
    'topic', 'verdict', 'similarity', 'output', 'y')
NAMES_OF_NUMBER_COLUMNS = ('', 'unnamed: 0', 'index', 'idx', 'id', 'guid')

_USUAL_COLUMN_NAMES = {2: ('text', 'label'), 3: ('first', 'second', 'label')}
_PATTERN_OF_ENTITY_LABEL = re.compile(r'(O|[BI]-\S+)')


class Record(NamedTuple):
  """A text or a pair of texts, with its label.

  Attributes:
    texts: one or two, neither of them empty.
    label: as it is written; '': the row has none.
    where: the file and the line with a comma after them, as a message begins.
    names: the names of the columns of `texts`.
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
  """A sentence of labelled words.

  Attributes:
    words: the words, in order.
    labels: the label of each word; []: there are none.
    locations: where each word stands, such as the file and the line, for
      messages.
  """
  words: list[str]
  labels: list[str]
  locations: list[str]


class Question(NamedTuple):
  """A question.

  Attributes:
    id: its id, unique in the file.
    question: the text of the question.
    answers: (text, its first character in the context) of each answer; ():
      the context holds none; None: the file does not say.
    where: its file and id, for messages.
  """
  id: str
  question: str
  answers: tuple[tuple[str, int], ...] | None
  where: str


class Paragraph(NamedTuple):
  """A paragraph and the questions on it, one at least. Whole paragraphs are
  held out: so no run is evaluated on one that it was trained on."""
  context: str
  questions: tuple[Question, ...]


def has_nothing_to_predict(record: Any) -> bool:
  """Returns whether a record is a text or a sentence without labels, or a
  paragraph with questions whose answers are not known."""
  if isinstance(record, Record):
    return not record.label
  if isinstance(record, Sentence):
    return not record.labels
  return isinstance(record, Paragraph) and record.questions[0].answers is None


def check_all_labelled(name: str, records: Iterable[Any]) -> None:
  """Checks that all records have a label or an answer, without which nothing
  can be learned or measured.

  Args:
    name: the name of the data source.
    records: the records of the source.

  Raises:
    RequestError: where a record has none.
  """
  if any(map(has_nothing_to_predict, records)):
    raise RequestError(
        f'data source {name!r} has no labels or answers, so that nothing can '
        'be learned or measured of it: eval.py --tasks=labels '
        f'--text={name} --predictions=FILE predicts them')


def parse_fields(name: str, written: str) -> tuple[str, ...]:
  """Parses the FIELDS of a data source `labelled:GLOB:FIELDS`, which name the
  columns of a table that are read.

  Args:
    name: the name of the source, for messages.
    written: FIELDS, such as 'premise+hypothesis+label'; '': it is left out.

  Returns:
    The columns of one text or two and, last, of the label, which is '' if rows
    have no label; () where FIELDS is left out.

  Raises:
    RequestError: unless these are one to three columns, all names or all
      numbers.
  """
  if not written:
    return ()
  fields = tuple(written.split('+'))

  # A single column has texts without labels, for which '' is added.
  if len(fields) == 1:
    fields = (*fields, '')
  *text_columns, label_column = fields

  # No text may be left out, and numbers and names must not be mixed.
  named = [*text_columns, label_column] if label_column else text_columns
  are_numbers = {field.isdigit() for field in named}
  if len(fields) not in (2, 3) or not all(named) or len(are_numbers) != 1:
    raise RequestError(
        f'data source {name!r} names the fields {written!r}: write the columns '
        "of a text or of two and, last, the label's: sentence+label, or "
        'premise+hypothesis+label, or their numbers; of rows without a label: '
        'sentence, or premise+hypothesis+')
  return fields


def parse_columns(name: str, written: str) -> tuple[int, ...]:
  """Parses the COLUMNS of a data source `conll:GLOB:COLUMNS`: the number of the
  column of words and, behind a +, that of their labels.

  Args:
    name: the name of the source, for messages.
    written: COLUMNS, such as '0+3', where negative numbers count from the last
      column; '': the first column has the words and the last one the labels.

  Returns:
    The two numbers; only the first if words have no labels.

  Raises:
    RequestError: unless these are one number or two.
  """
  numbers = (written or '0+-1').split('+')
  are_numbers = [re.fullmatch(r'-?\d{1,4}', number) for number in numbers]
  if len(numbers) > 2 or not all(are_numbers):
    raise RequestError(
        f'data source {name!r} names the columns {written!r}: write the number '
        'of the words and of the labels, counted from 0, as 0+3, or from the '
        'last, as 0+-1; of words without labels, 0')
  return tuple(map(int, numbers))


def read_texts(fields: tuple[str, ...], path: str) -> Iterator[Record]:
  """Reads the texts of a file with their labels, as records.

  Args:
    fields: the columns that `parse_fields` returns, those of the texts and,
      last, of the label; (): the file itself says which they are.
    path: a .tsv, a .csv or a .jsonl.

  Yields:
    A record for each row.

  Raises:
    RequestError: naming the line that has other columns.
  """
  # Read columns by name: those of JSON, and those of a table whose first line
  # names them, which a choice by name says.
  is_table = path.endswith(texts.TABLE_ENDINGS)
  if not is_table or (fields and not fields[0].isdigit()):
    columns = fields or ('text', 'label')
    for location, row in texts.read_rows(path):
      yield _record_of_row(location, row=row, columns=columns, names=columns)
    return

  # Read columns by number. The first line may still be one of names: then it is
  # no record, and may say which columns are meant. Where neither says it, all
  # columns are read, and each line must have as many as the first one.
  columns = fields
  names: tuple[str, ...] = ()
  size = 0
  for number, (location, row) in enumerate(
      texts.read_rows(path, has_header=False)):
    if number == 0:
      size = len(row)
      named = _find_named_columns(location, row=row, fields=fields)
      if named:
        columns = named
        cells = [row.get(column, '') for column in named]
        names = tuple(map(str.strip, cells))
        continue
      columns = fields or tuple(row)
    has_size_of_first = bool(fields) or len(row) == size
    if len(columns) not in (2, 3) or not has_size_of_first:
      raise RequestError(
          f'{location}, has {len(row)} columns: name those of the text and of '
          'the label, as in labelled:GLOB:sentence+label where line 1 has '
          'names, or labelled:GLOB:0+1')
    yield _record_of_row(location, row=row, columns=columns,
                         names=names or _USUAL_COLUMN_NAMES[len(columns)])


def _find_named_columns(location: str, row: dict[str, str],
                        fields: tuple[str, ...]
                        ) -> tuple[str, ...]:
  """Finds out whether the first line of a table names its columns, and which
  ones are read.

  Args:
    location: the file and the line, for messages.
    row: the line as {number of the column: cell}.
    fields: the numbers of the columns that are read; (): the names say it.

  Returns:
    The numbers of the columns of the texts and, last, of the label; () where
    the line is a record.

  Raises:
    RequestError: for a line of names that leaves open which columns are meant.
  """
  # Collect the columns that have a usual name of each kind. Names of numbers,
  # such as 'id', are those of columns that are not read.
  named_texts = []
  named_labels = []
  named_numbers = []
  for column, cell in row.items():
    name = cell.strip().lower()
    if name in NAMES_OF_TEXT_COLUMNS:
      named_texts.append(column)
    if name in NAMES_OF_LABEL_COLUMNS:
      named_labels.append(column)
    if name in NAMES_OF_NUMBER_COLUMNS:
      named_numbers.append(column)

  # Where columns are chosen, the line is one of names if it has usual names in
  # all of them; a record could have one by chance.
  if fields:
    *text_columns, label_column = fields
    names_texts = {*text_columns} <= {*named_texts}
    names_label = not label_column or label_column in named_labels
    return fields if names_texts and names_label else ()

  # Where none are chosen, the names have to say which are read: one text or
  # two, one label, and no column whose name means nothing here.
  if not named_texts or not named_labels:
    return ()
  read = [*named_texts, *named_labels]
  all_named = len(read) + len(named_numbers) == len(row)
  if len(named_texts) > 2 or len(named_labels) > 1 or not all_named:
    raise RequestError(
        f'{location}, names the columns {", ".join(row.values())}: say which '
        'are the text and the label, as in labelled:GLOB:sentence+label')
  return tuple(read)


def advice_for_line_of_names(location: str) -> str:
  """Returns advice for a message about a record that may not be a record at
  all: the first line of a table may have the names of its columns.

  Args:
    location: the file and the line of the record.

  Returns:
    A sentence for the end of the message; '' for any other line.
  """
  match = re.fullmatch(r'(.*), line 1,?', location)
  if match is None or not match[1].endswith(texts.TABLE_ENDINGS):
    return ''
  return ('. If that is a line of names, name the columns: labelled:GLOB:'
          'sentence+label')


def _record_of_row(location: str, row: dict[str, Any], columns: Sequence[str],
                   names: Sequence[str]) -> Record:
  """Makes a labelled record of one text or two from a row of a table.

  Args:
    location: the file and the line of the row, for messages.
    row: {column: cell} of the row.
    columns: the columns of the texts and, last, of the label; '': there is no
      label.
    names: the names of these columns, for messages.

  Raises:
    RequestError: for a cell that is missing or empty.
  """
  # Take the cells of the texts and, last, of the label. A label may be a
  # number.
  location = f'{location},'
  *text_columns, label_column = columns
  texts.check_columns(row, names=filter(None, columns), location=location)
  values = [row[column] for column in text_columns]
  if label_column:
    values.append(_label_as_text(row[label_column], location))

  # Check that all cells are text that can be written as UTF-8, and then that
  # none is empty.
  cells = []
  for name, value in zip(names, values):
    cells.append(texts.check_text(value, f'{location} field {name!r},'))
  for name, cell in zip(names, cells):
    require(bool(cell.strip()), f'{location} column {name!r}, is empty: a '
            'record has a text, or two, and a label')

  # The label is the last cell. It is stripped, as '1' and ' 1' are one label.
  written = cells.pop().strip() if label_column else ''
  return Record(texts=tuple(cells), label=written, where=location,
                names=tuple(names[:-1]))


def _label_as_text(value: Any, location: str) -> str:
  """Returns a label, which may be a number, as text."""
  require(isinstance(value, str | int | float), f'{location} has the label '
          f'{shorten(value)}: a label is a text or a number')
  return str(value)


def read_dataset_rows(name: str, fields: Sequence[str],
                      dataset: Any) -> texts.Rows:
  """Reads the rows of a data set of the Hugging Face package `datasets`. A
  label that is a number is replaced by its name, if the data set knows it.

  Args:
    name: the name of the source, for messages.
    fields: the columns to read. A column `id` is read as well.
    dataset: the data set, a datasets.Dataset.

  Yields:
    (location, {column: value}) of each row. The location is for messages.
  """
  # Find the names of the labels of each column. A column's type has `names` if
  # it is a ClassLabel; that of lists has the type of its elements as `feature`.
  label_names = {}
  for column, feature in dataset.features.items():
    feature_of_value = getattr(feature, 'feature', feature)
    label_names[column] = getattr(feature_of_value, 'names', None)

  # Put the names in the place of the numbers. Only the columns that are needed
  # are loaded; others may be large, such as pictures.
  columns = {*fields, 'id'} & {*dataset.column_names}
  for number, row in enumerate(dataset.select_columns([*columns]), 1):
    location = f'{name}, row {number}'
    for column, value in row.items():
      names = label_names.get(column)
      if not names or value is None:
        continue
      if isinstance(value, list):
        row[column] = [
            _name_of_label(label, names=names, location=location)
            for label in value]
      else:
        row[column] = _name_of_label(value, names=names, location=location)
    yield location, row


def _name_of_label(label: int, names: Sequence[str], location: str) -> str:
  """Returns the name of a label that is a number."""
  require(0 <= label < len(names), f'{location} has the label {label}, and the '
          f'set has {len(names)}: one whose labels are kept back has -1 for '
          'them')
  return names[label]


def choose_reader_of_rows(
    name: str, fields: tuple[str, ...], features: Any
    ) -> tuple[str, Callable[[texts.Rows], Iterator[Any]]]:
  """Chooses how the rows of a data set become labelled records: questions with
  answers, sentences with a label for each word (columns of lists), or texts
  with one label.

  Args:
    name: the name of the source, for messages.
    fields: the columns to read. If the last one is '', texts have no label.
    features: {column: type}, as the package `datasets` has it.

  Returns:
    The kind of the records; and a function that turns rows into records.

  Raises:
    RequestError: where only some of the columns are lists.
  """
  if fields == SQUAD_FIELDS:
    return QUESTIONS, _read_questions_of_rows

  # Find the columns of lists, whose type has that of their elements as
  # `feature`. If there are none, rows are texts and their label.
  named = [field for field in fields if field]
  are_lists = [hasattr(features[field], 'feature') for field in named]
  if not any(are_lists):
    parse_fields(name, '+'.join(fields))

    def records(rows: texts.Rows) -> Iterator[Record]:
      """Yields a text, or a pair of texts, of each row."""
      for location, row in rows:
        yield _record_of_row(location, row=row, columns=fields, names=fields)
    return TEXTS, records

  # Otherwise there must be a list of words, and one of their labels.
  if not all(are_lists) or len(fields) != 2:
    raise RequestError(f'data source {name!r} names the fields '
                       f'{"+".join(fields)}: write one of lists of words and '
                       'one of lists of labels')

  def sentences(rows: texts.Rows) -> Iterator[Sentence]:
    """Yields the sentence of each row."""
    for location, row in rows:
      yield _sentence_of_words(location, *[row[field] or [] for field in named])
  return SENTENCES, sentences


def _read_questions_of_rows(rows: texts.Rows) -> Iterator[Paragraph]:
  """Reads questions with the columns of SQuAD from the rows of a data set, and
  yields the paragraphs that they are about. Questions in successive rows with
  the same context belong to one paragraph.

  Args:
    rows: (location, {column: value}) of each row. The location is for messages.
  """
  def asked() -> Iterator[_WrittenQuestion]:
    """Yields the question of each row in the form that SQuAD's files have."""
    for location, row in rows:
      # The data set has two lists, of the answers' texts and of their starts;
      # the files have an object for each answer. In the data set, a question
      # without an answer is one that cannot be answered.
      answers = []
      for text, start in zip(row['answers']['text'],
                             row['answers']['answer_start']):
        answers.append(dict(text=text, answer_start=start))
      question = dict(
          id=str(row.get('id', location)), question=row['question'],
          is_impossible=not row['answers']['text'], answers=answers)
      yield _WrittenQuestion(where=location, context=row['context'],
                             question=question, paragraph=row['context'])
  return _group_into_paragraphs(asked())


def _sentence_of_words(location: str, words: list[Any],
                       labels: list[Any] | None = None) -> Sentence:
  """Makes a record of a sentence from its words and their labels.

  Args:
    location: the row that holds the sentence, such as 'NAME, row 3'; messages
      go on after a comma.
    words: the words of the sentence.
    labels: the label of each word, in the same order; None: there are none.

  Raises:
    RequestError: for a sentence without words, or another number of labels.
  """
  require(bool(words), f'{location}, has no words')
  if labels is None:
    labels = []
  elif len(labels) != len(words):
    raise RequestError(f'{location}, has {len(words)} words and {len(labels)} '
                       'labels: there is one for each word')

  sentence = Sentence(words=[], labels=[], locations=[])
  for number, word in enumerate(words, 1):
    sentence.words.append(texts.check_text(word, f'{location},'))
    sentence.locations.append(f'{location}, word {number}')
  for label, location_of_word in zip(labels, sentence.locations):
    sentence.labels.append(_label_as_text(label, f'{location_of_word},'))
  return sentence


def read_pairs(path: str) -> Iterator[list[tuple[str, str]]]:
  """Reads pairs of texts from a file, such as sentences and their translations.

  Args:
    path: a file with a source, a tab and a target on each line, or a .jsonl
      whose objects have the fields `source` and `target`.

  Yields:
    For each pair a list of two (kind, text): those of its source and target.

  Raises:
    RequestError: for a line that is no pair.
  """
  # A .jsonl has objects with a source and a target.
  if path.endswith('.jsonl'):
    for location, row in texts.read_rows(path):
      parts = []
      for kind in PAIR:
        text = texts.check_text(row.get(kind), f'{location}, field {kind!r},')
        parts.append((kind, text))
      yield parts
    return

  # Any other file has lines of a source, a tab and a target.
  for location, text in texts.read_lines(path):
    pair = text.split('\t')
    require(len(pair) == 2, f'{location}, has {len(pair)} fields: a pair is a '
            'source, one tab and a target')
    yield list(zip(PAIR, pair))


def read_sentences(columns: tuple[int, ...], path: str) -> Iterator[Sentence]:
  """Reads the sentences of a file in the format of CoNLL: words and their
  labels, a word a line, and an empty line after each sentence.

  Args:
    columns: the numbers of the columns of words and perhaps of labels, as
      `parse_columns` returns them.
    path: the path of the file.

  Yields:
    Each sentence, with its words, their labels and their locations.

  Raises:
    RequestError: naming the line without one of these columns.
  """
  sentence = Sentence(words=[], labels=[], locations=[])
  # The shape of the first line that is surely a word's: whether it has a tab,
  # and how many columns.
  shape_of_words = None
  for location, text in texts.read_lines(path, all_lines=True):
    # Split the line into columns, at tabs or else at plain spaces. A word may
    # hold other spaces, such as one that breaks no line.
    has_tab = '\t' in text
    fields = text.split('\t') if has_tab else re.split(' +', text.strip(' '))

    # An empty line, or the mark before a document, ends a sentence.
    if not text.strip() or fields[0] == '-DOCSTART-':
      if sentence.words:
        yield sentence
      sentence = Sentence(words=[], labels=[], locations=[])
      continue

    # A line that begins with # before a sentence is a comment, unless it has
    # the shape of a word's: a hashtag may be a word.
    shape = (has_tab, len(fields))
    if text.startswith('#') and not sentence.words:
      is_word = has_tab
      if shape_of_words is not None:
        is_word = shape == shape_of_words
      if not is_word:
        continue

    # Any other line has a word, and its label if `columns` names two.
    if shape_of_words is None:
      shape_of_words = shape
    word, *labels = _word_and_label(fields, columns=columns, location=location)
    sentence.words.append(word)
    sentence.labels.extend(labels)
    sentence.locations.append(location)

  # The last sentence may have no empty line after it.
  if sentence.words:
    yield sentence


def _word_and_label(fields: Sequence[str], columns: tuple[int, ...],
                    location: str
                    ) -> list[str]:
  """Takes a word and, if it has one, its label from a line of a table.

  Args:
    fields: the cells of the line.
    columns: the number of the column of words, and that of labels if there is
      one. Negative numbers count from the last column.
    location: the file and the line, for messages.

  Returns:
    [word, label] or [word].

  Raises:
    RequestError: for a line in which one of these is missing or empty.
  """
  # A missing column is treated like an empty one, which is refused.
  cells = []
  for column in columns:
    is_there = -len(fields) <= column < len(fields)
    cells.append(fields[column].strip() if is_there else '')
  if len(fields) >= len(columns) and all(cells):
    return cells
  missing = f'word in {columns[0]}'
  if len(columns) > 1:
    missing = f'word and label in {columns[0]} and {columns[1]}'
  raise RequestError(f'{location}, has {len(fields)} columns, and no {missing}')


def check_entities(sentence: Sentence) -> None:
  """Checks that the labels of a sentence mark entities as IOB2 does: an entity
  begins with B-TYPE and goes on with I-TYPE.

  Args:
    sentence: the sentence, with a label for each word.

  Raises:
    RequestError: if a label is none of an entity, or goes on with an entity
      that does not stand before it. The message names the line.
  """
  # Before I-TYPE there must be B-TYPE or I-TYPE with the same TYPE. A label
  # without its first two characters is its TYPE. 'O' has none: 'O'[2:] is '',
  # which equals no TYPE.
  previous_label = 'O'
  for label, location in zip(sentence.labels, sentence.locations):
    require(bool(_PATTERN_OF_ENTITY_LABEL.fullmatch(label)),
            f'{location}, has the label {label!r} '
            'among labels of entities, which are O, B-TYPE and I-TYPE')
    if label.startswith('I') and previous_label[2:] != label[2:]:
      first_label = 'B' + label[1:]
      raise RequestError(f'{location}, has the label {label!r} after '
                         f'{previous_label!r}: an entity begins with '
                         f'{first_label!r}')
    previous_label = label


def marks_entities(labels: Sequence[str]) -> bool:
  """Returns whether a set of labels is one of entities: all are O, B-TYPE or
  I-TYPE, and one at least is not O."""
  return set(labels) != {'O'} and all(map(_PATTERN_OF_ENTITY_LABEL.fullmatch,
                                          labels))


def read_questions(path: str) -> Iterator[Paragraph]:
  """Reads the paragraphs of a SQuAD file that have questions, in order.

  Args:
    path: a file in the JSON format of SQuAD (Rajpurkar et al. 2016): `data` is
      a list of articles with `paragraphs`, each with its text, `context`, and
      its questions, `qas`.

  Yields:
    Each paragraph, with its questions and their answers.

  Raises:
    RequestError: for a file of another form; for an answer that does not stand
      in its paragraph where it says; for two questions with one id; and where
      some questions have answers and others do not say.
  """
  # Parse everything first. A file of another form fails here, at a missing key
  # or a wrong type.
  document = texts.parse_json(texts.read_text(path), path)
  try:
    written_questions = _read_written_questions(document, path)
    paragraphs = list(_group_into_paragraphs(written_questions))
  except (KeyError, TypeError, AttributeError) as error:
    raise RequestError(f'{path} is no file of SQuAD: {type(error).__name__}: '
                       f'{error}.') from error

  # Predictions are written by id, so no two questions may share one.
  questions: list[Question] = []
  for paragraph in paragraphs:
    questions += paragraph.questions
  ids = {question.id for question in questions}
  require(len(ids) == len(questions), f'{path} has an id of two questions')

  # A file is for training, with the answers of all its questions (`()` if a
  # question has none), or to be answered, with those of none (None).
  num_unknown = sum(question.answers is None for question in questions)
  if 0 < num_unknown < len(questions):
    raise RequestError(
        f'{path} has answers, or is_impossible, of some of its questions '
        'alone: give them for all, or for none, so that all are to be answered')
  yield from paragraphs


class _WrittenQuestion(NamedTuple):
  """A question as a file has it, before it is checked.

  Attributes:
    where: the file, and the row if it has rows, for messages.
    context: the text of the paragraph.
    question: its id, question, answers and is_impossible.
    paragraph: a value that tells one paragraph from the next.
  """
  where: str
  context: str
  question: dict[str, Any]
  paragraph: Any


def _read_written_questions(document: Any,
                            path: str) -> Iterator[_WrittenQuestion]:
  """Yields the questions of a file of SQuAD as they are written."""
  for article in document['data']:
    for paragraph in article['paragraphs']:
      for question in paragraph['qas']:
        yield _WrittenQuestion(where=path, context=paragraph['context'],
                               question=question, paragraph=id(paragraph))


def _group_into_paragraphs(
    questions_of_file: Iterable[_WrittenQuestion]) -> Iterator[Paragraph]:
  """Yields the paragraphs that questions are about. Successive questions with
  the same `paragraph` belong to one.

  Args:
    questions_of_file: the questions in the order of the file, each with the
      text of its paragraph (`context`).
  """
  groups = itertools.groupby(questions_of_file, lambda row: row.paragraph)
  for _, group in groups:
    rows = list(group)
    location = rows[0].where
    context = rows[0].context
    text = _check_not_empty(context, location)
    questions = []
    for row in rows:
      questions.append(
          _check_question(row.question, context=context, path=location))
    yield Paragraph(context=text, questions=tuple(questions))


def _check_question(question: dict[str, Any], context: str, path: str
                    ) -> Question:
  """Makes a Question from the fields that a SQuAD file has, and checks that its
  answers stand in the paragraph.

  Args:
    question: the fields id, question, answers and is_impossible.
    context: the text of the paragraph.
    path: the file, for messages.

  Raises:
    RequestError: for an answer that does not stand where it says; and where
      there is neither an answer nor is_impossible.
  """
  # If neither field is there, the answer is not known and is to be predicted.
  location = f'{path}, question {shorten(question["id"])}'
  if 'answers' not in question and 'is_impossible' not in question:
    return Question(id=_check_not_empty(question['id'], location),
                    question=_check_not_empty(question['question'], location),
                    answers=None, where=location)

  # Compare each answer with the characters at its start. Answers to a question
  # that cannot be answered are wrong on purpose, and are ignored.
  is_impossible = bool(question.get('is_impossible', False))
  written_answers = [] if is_impossible else question['answers']
  answers = []
  for answer in written_answers:
    text = _check_not_empty(answer['text'], location)
    start = answer['answer_start']
    text_there = context[start:start + len(text)] if start >= 0 else ''
    require(text_there == text,
            f'{location}, has the answer {shorten(text)}, but its '
            f'context has {shorten(text_there)} at answer_start={start}')
    answers.append((text, start))

  # A question with an empty list of answers must say that it is impossible, or
  # it is not clear whether its answer is just not known.
  require(is_impossible or bool(answers), f'{location}, has no answer, and '
          'is_impossible is not true: leave out `answers` where they are not '
          'known')
  return Question(id=_check_not_empty(question['id'], location),
                  question=_check_not_empty(question['question'], location),
                  answers=tuple(answers), where=location)


def _check_not_empty(value: Any, location: str) -> str:
  """Returns a text, after a check that it has more than spaces."""
  require(bool(texts.check_text(value, f'{location}, a text,').strip()),
          f'{location}, has an empty text')
  return value
