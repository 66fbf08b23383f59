"""Texts with labels in files: a text or a pair of texts, and a label of it.

  labelled:GLOB[:FIELDS]    .tsv, .csv and .jsonl, told apart by their suffix

FIELDS names columns, with + between them, of which the last is the label's:
`sentence+label`, or `premise+hypothesis+label` of pairs. Named columns stand in
the first line of a table, or are the keys of a .jsonl's objects. Numbers count
columns from 0, in a table that has no line of names. Where FIELDS is left out,
a .jsonl has `text` and `label`, and a table has no line of names, and two or
three columns.

A field of a .tsv is all that stands between two tabs: quotes mean nothing, as
in the files of GLUE. A .csv is read by the rules of Python's csv module.
"""

from collections.abc import Callable, Iterator, Sequence
import csv
import io
import pathlib
from typing import Any, NamedTuple

from configs.errors import RequestError, require, short
from training.data import texts

KIND = 'labelled texts'
Row = tuple[str, list[str]]  # (where it stands, its cells)


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
    said = [f'{name}: {text}' for name, text in zip(self.names, self.texts)]
    return [('source', ' '.join(said)), ('target', self.label)]


def fields_of(name: str, written: str) -> tuple[str, ...]:
  """Returns the columns that FIELDS names; () where it is left out.

  Raises:
    RequestError: for fewer than two, or more than three.
  """
  if not written:
    return ()
  fields = tuple(written.split('+'))
  require(2 <= len(fields) <= 3 and all(fields),
          f'data source {name!r} names the fields {written!r}: write the '
          "columns of a text or of two and, last, the label's: "
          'sentence+label, or premise+hypothesis+label')
  numbers = [field.isdigit() for field in fields]
  require(all(numbers) or not any(numbers), f'data source {name!r} mixes '
          f'names and numbers of columns in {written!r}: choose one of these')
  return fields


def reader(name: str, fields: tuple[str, ...], files: Sequence[str]
           ) -> Callable[[str], Iterator[Record]]:
  """Returns what yields the records of one of `files`.

  Raises:
    RequestError: for a file of another suffix than those that are read.
  """
  for path in files:
    suffix = pathlib.Path(path).suffix
    require(suffix in ROWS, f'data source {name!r} names {path}, whose suffix '
            f'is {suffix!r}: choose files that end in {", ".join(ROWS)}')

  def read(path: str) -> Iterator[Record]:
    names, rows = ROWS[pathlib.Path(path).suffix](path, fields)
    yield from records(rows, names)

  return read


def reader_of_rows(name: str, fields: tuple[str, ...], dataset: Any
                   ) -> Callable[[str], Iterator[Record]]:
  """Returns what yields the records of a data set of the package datasets. A
  label that is a number, of which the data set knows the name, is the name."""
  names_of = getattr(dataset.features[fields[-1]], 'names', None)

  def rows() -> Iterator[Row]:
    for number, row in enumerate(dataset.select_columns([*fields]), 1):
      where = f'{name}, row {number},'
      label = row[fields[-1]]
      if names_of and isinstance(label, int):
        require(0 <= label < len(names_of), f'{where} has the label {label}: a '
                'set whose labels are kept back has -1 for them')
        row = row | {fields[-1]: names_of[label]}
      yield where, cells_of(row, fields, where)

  return lambda _: records(rows(), fields)


def records(rows: Iterator[Row], names: Sequence[str]) -> Iterator[Record]:
  """Yields a record of each row, which has a cell for each of `names`.

  Raises:
    RequestError: for a cell that is empty.
  """
  for where, cells in rows:
    for name, cell in zip(names, cells):
      require(bool(cell.strip()), f'{where} column {name!r}, is empty: a '
              'record has a text, or two, and a label')
    yield Record(tuple(cells[:-1]), cells[-1].strip(), where,
                 tuple(names[:-1]))


def _table(cells: Iterator[tuple[int, list[str]]], path: str,
           fields: tuple[str, ...]) -> tuple[tuple[str, ...], Iterator[Row]]:
  """Returns the names of the columns that are read, and their rows."""
  first = next(cells, None)
  require(first is not None, f'{path} is empty: it holds no record')
  number, head = first
  named = bool(fields) and not fields[0].isdigit()
  if named:
    for field in fields:
      require(field in head, f'{path}, line {number}, has no column {field!r}: '
              f'it has {short(", ".join(head))}')
    places, names = [head.index(field) for field in fields], fields
  else:
    require(bool(fields) or len(head) in (2, 3),
            f'{path}, line {number}, has {_columns(head)}: name those of the '
            'text and of the label, as in labelled:GLOB:sentence+label '
            'where this line has names, or labelled:GLOB:0+1')
    places = [*map(int, fields)] or [*range(len(head))]
    names = (('text',) if len(places) == 2 else ('first', 'second')) + (
        'label',)

  def rows() -> Iterator[Row]:
    if not named:
      yield of(number, head)
    for line, cells_ in cells:
      yield of(line, cells_)

  def of(line: int, row: list[str]) -> Row:
    where = f'{path}, line {line},'
    many = _columns(row)
    require(max(places) < len(row), f'{where} has {many}, and none numbered '
            f'{max(places)}, counted from 0')
    require(bool(fields) or len(row) == len(head),
            f'{where} has {many}, and line {number} {len(head)}')
    return where, [row[place] for place in places]

  return names, rows()


def _columns(row: list[str]) -> str:
  return f'{len(row)} column{"s" * (len(row) != 1)}'


def _tsv(path: str, fields: tuple[str, ...]):
  def cells() -> Iterator[tuple[int, list[str]]]:
    with open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        text = texts.decoded(line, f'{path}, line {number},').rstrip('\r\n')
        text = text.removeprefix('\ufeff') if number == 1 else text
        if text.strip():
          yield number, text.split('\t')
  return _table(cells(), path, fields)


def _csv(path: str, fields: tuple[str, ...]):
  def cells() -> Iterator[tuple[int, list[str]]]:
    text = texts.decoded(pathlib.Path(path).read_bytes(), path)
    csv.field_size_limit(2**31 - 1)  # else a field of 131,073 is refused
    rows = csv.reader(io.StringIO(text.removeprefix('\ufeff'), newline=''),
                      strict=True)
    begin = 1  # the line that a row begins in; it may have several
    try:
      for row in rows:
        if row:
          yield begin, row
        begin = rows.line_num + 1
    except csv.Error as error:
      raise RequestError(f'{path}, line {begin}, is broken CSV: {error}.'
                         ) from error
  return _table(cells(), path, fields)


def _jsonl(path: str, fields: tuple[str, ...]):
  names = fields or ('text', 'label')

  def rows() -> Iterator[Row]:
    with open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          where = f'{path}, line {number},'
          row = texts.parsed(line, where)
          require(isinstance(row, dict), f'{where} is not a JSON object')
          yield where, cells_of(row, names, where)
  return names, rows()


def cells_of(row: dict[str, Any], names: Sequence[str], where: str
             ) -> list[str]:
  """Returns the cells `names` of a row, as text; a label may be a number."""
  for name in names:
    require(name in row, f'{where} has no field {name!r}: it has '
            f'{short(", ".join(row))}')
  cells = [texts.checked(row[name], f'{where} field {name!r},')
           for name in names[:-1]]
  label = row[names[-1]]
  require(isinstance(label, str | int | float), f'{where} field '
          f'{names[-1]!r}, is {short(label)}: a label is a text or a number')
  return [*cells, texts.checked(str(label), f'{where} field {names[-1]!r},')]


# By suffix: (path, fields) -> the names of the columns, and the rows.
ROWS = {'.tsv': _tsv, '.csv': _csv, '.jsonl': _jsonl}
