"""Files with a word a line, as CoNLL's shared tasks have them.

  Empire    B-location        the columns are parted by tabs, or else by blanks
  State     I-location
                              a line without text ends a sentence
  # a comment                 before a sentence, without the columns of a word
  -DOCSTART- -X- O O          ends a sentence, and is left out

Labels that are O, B-TYPE and I-TYPE mark entities (Ramshaw and Marcus 1995, in
the form that is called IOB2): each entity begins with B, and I goes on with the
entity of the word before. A file in which they do not is refused, because its
entities could be read in several ways.
"""

from collections.abc import Callable, Iterator, Sequence
import re
from typing import Any, NamedTuple

from configs.errors import RequestError, require, short
from training.data import texts

KIND = 'sentences with a label for each word'
COLUMNS = (0, -1)  # the word's and the label's, where a source names none
_TAG = re.compile(r'(O|[BI]-\S+)')


class Sentence(NamedTuple):
  """A sentence.

  Attributes:
    words: its words.
    labels: one for each word.
    lines: where each word stands: its file and line, for messages.
  """
  words: list[str]
  labels: list[str]
  lines: list[str]


def read(path: str, columns: tuple[int, int] = COLUMNS) -> Iterator[Sentence]:
  """Yields the sentences of a file, in order.

  Args:
    path: the file.
    columns: those of the words and of the labels, counted from 0, or with -1
      from the last.

  Raises:
    RequestError: for a line without one of the columns, or one that is no
      UTF-8.
  """
  words, labels, lines = [], [], []
  shape = None  # of the first line that is surely a word's
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      where = f'{path}, line {number}'
      text = texts.decoded(line, f'{where},').rstrip('\r\n')
      # A word may hold other spaces, such as one that breaks no line.
      fields = (text.split('\t') if '\t' in text else
                re.split(' +', text.strip(' ')))
      if not text.strip() or fields[0] == '-DOCSTART-':
        if words:
          yield Sentence(words, labels, lines)
        words, labels, lines = [], [], []
        continue
      own = ('\t' in text, len(fields))
      # A hashtag may be a word, so a comment has not the shape of one.
      if text.startswith('#') and not words and (
          own != shape if shape else '\t' not in text):
        continue
      shape = shape or own
      require(len(fields) > 1, f'{where}, has one column: a line is a word and '
              'its label')
      for found, column, of in ((words, columns[0], 'word'),
                                (labels, columns[1], 'label')):
        require(-len(fields) <= column < len(fields),
                f'{where}, has {len(fields)} columns, and none with the {of} '
                f'(column {column}): a line is a word and its label')
        value = fields[column].strip()
        require(bool(value), f'{where}, column {column}, is empty: it should '
                f'hold a {of}')
        found.append(value)
      lines.append(where)
  if words:
    yield Sentence(words, labels, lines)


def reader_of_rows(name: str, fields: Sequence[str], dataset: Any
                   ) -> Callable[[str], Iterator[Sentence]]:
  """Returns what yields the sentences of a data set of the package datasets,
  whose columns `fields` are lists: of words, and of labels or their numbers.

  Raises:
    RequestError: for other columns, rows whose lists differ in length, and a
      label that is none.
  """
  require(len(fields) == 2, f'data source {name!r} names the fields '
          f'{"+".join(fields)}: write those of the words and of the labels')
  features = dataset.features
  for field in fields:
    require(hasattr(features[field], 'feature'), f'data source {name!r}: its '
            f'field {field!r} holds no lists: write one of lists of words and '
            'one of lists of labels, a label for each word')
  names = getattr(features[fields[1]].feature, 'names', None)

  def read(_: Any) -> Iterator[Sentence]:
    for number, row in enumerate(dataset.select_columns([*fields]), 1):
      words, labels = (row[field] or [] for field in fields)
      where = f'{name}, row {number}'
      require(len(words) == len(labels) > 0, f'{where}, has {len(words)} words '
              f'and {len(labels)} labels: there is one for each word')
      lines = [f'{where}, word {i}' for i in range(1, len(words) + 1)]
      yield Sentence([texts.checked(word, f'{where},') for word in words],
                     [_label(*pair, names) for pair in zip(labels, lines)],
                     lines)
  return read


def _label(label: Any, where: str, names: Sequence[str] | None) -> str:
  """Returns a word's label out of a data set, by its name if it has one."""
  require(isinstance(label, str | int | float), f'{where}, has the label '
          f'{short(label)}: a label is a text or a number')
  if names is None or isinstance(label, str):
    return str(label)
  require(0 <= label < len(names), f'{where}, has the label {label}, and the '
          f'set has {len(names)}: one whose labels are kept back has -1 for '
          'them')
  return names[label]


def check_entities(sentence: Sentence) -> None:
  """Raises RequestError where the labels of a sentence mark no entities."""
  before = 'O'
  for label, where in zip(sentence.labels, sentence.lines):
    require(bool(_TAG.fullmatch(label)), f'{where}, has the label {label!r} '
            'among labels of entities, which are O, B-TYPE and I-TYPE')
    if label.startswith('I') and before[2:] != label[2:]:
      raise RequestError(
          f'{where}, has the label {label!r} after {before!r}: an entity '
          f'begins with {"B" + label[1:]!r}.')
    before = label


def marks_entities(labels: Sequence[str]) -> bool:
  """Returns whether a set of labels is one of entities: all are O, B-TYPE or
  I-TYPE, and one at least is not O."""
  return set(labels) != {'O'} and all(map(_TAG.fullmatch, labels))


def columns_of(name: str, written: str) -> tuple[int, int]:
  """Returns the columns that a source names, `WORD+LABEL`; '': COLUMNS.

  Raises:
    RequestError: for anything but two numbers.
  """
  if not written:
    return COLUMNS
  match = re.fullmatch(r'(-?\d{1,4})\+(-?\d{1,4})', written)
  require(match is not None, f'data source {name!r} names the columns '
          f'{written!r}: write the number of the words and of the labels, '
          'counted from 0, as 0+3, or from the last, as 0+-1')
  return int(match[1]), int(match[2])
