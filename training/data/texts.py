"""Text and rows out of files: decoded, parsed and checked, or a sentence that
says where it is wrong.

A row is a dict of its columns. A .tsv or .csv has the columns of its first
line, or '0', '1', ... where that names none. In a .tsv quotes mean nothing, as
in the files of GLUE.
"""

from collections.abc import Iterable, Iterator
import csv
import importlib
import io
import itertools
import json
import os
import pathlib
from typing import Any

from common.errors import RequestError, require, short

TABLES = ('.tsv', '.csv')
Rows = Iterator[tuple[str, dict[str, Any]]]  # where it stands, and what it has


def decoded(data: bytes, where: str) -> str:
  """Returns UTF-8 bytes as text."""
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    raise RequestError(f'{where} is not UTF-8: {error}.') from error


def read(path: str) -> str:
  """Returns the text of a file."""
  return decoded(pathlib.Path(path).read_bytes(), path)


def lines(path: str, all_lines: bool = False) -> Iterator[tuple[str, str]]:
  """Yields (where it stands, text) of the lines of a file, or of those that
  hold text."""
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      where = f'{path}, line {number}'
      text = decoded(line, f'{where},').rstrip('\r\n')
      text = text.removeprefix('\ufeff') if number == 1 else text
      if all_lines or text.strip():
        yield where, text


def parsed(data: bytes | str, where: str) -> Any:
  """Returns what UTF-8 JSON holds."""
  text = data if isinstance(data, str) else decoded(data, where)
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise RequestError(f'{where} is broken JSON: {error}.') from error


def checked(text: Any, where: str) -> str:
  """Returns a string that can be written as UTF-8: JSON may hold half of a
  surrogate pair."""
  if not isinstance(text, str):
    raise RequestError(f'{where} is {short(text)}, not a string.')
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    raise RequestError(f'{where} is not text: {error}.') from error
  return text


def rows(path: str, names: bool = True) -> Rows:
  """Yields the rows of a .tsv or a .csv, or of a file of JSON: the objects of a
  list, or one a line.

  Args:
    path: of the file.
    names: whether the first line of a table names its columns.
  """
  if path.endswith(TABLES):
    yield from _table(path, names)
    return
  with open(path, 'rb') as file:
    is_list = file.read(1) == b'['
  values = (((f'{path}, record {number}', row) for number, row in enumerate(
      parsed(read(path), path), 1)) if is_list else
           ((where, parsed(line, f'{where},')) for where, line in lines(path)))
  for where, row in values:
    require(isinstance(row, dict), f'{where}, is not a JSON object')
    yield where, row


def _table(path: str, names: bool) -> Rows:
  csv.field_size_limit(2**31 - 1)  # else a field of 131,073 is refused
  tabs: dict[str, Any] = dict(
      delimiter='\t', quoting=csv.QUOTE_NONE) if path.endswith('.tsv') else {}
  reader = csv.reader(io.StringIO(read(path).removeprefix('\ufeff'),
                                  newline=''), strict=True, **tabs)
  columns, begin = None, 1
  try:
    for cells in reader:
      if any(map(str.strip, cells)):
        if names and columns is None:
          columns = cells
        else:
          yield f'{path}, line {begin}', dict(zip(
              columns or map(str, itertools.count()), cells))
      begin = reader.line_num + 1
  except csv.Error as error:
    raise RequestError(f'{path}, line {begin}, is broken CSV: {error}.'
                       ) from error


def check_columns(columns: Iterable[str], names: Iterable[str], where: str
                  ) -> None:
  """Raises RequestError for one of `names` that is none of the columns."""
  for name in names:
    require(name in columns, f'{where} has no field {name!r}: it has '
            f'{", ".join(columns)}')


def imported(module: str, who: str, extra: str) -> Any:
  """Returns a module; RequestError: of a package that is not installed."""
  # transformers would advise all users to install PyTorch.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise RequestError(
        f'{who} needs the package {module.partition(".")[0]}: '
        f"pip install 'archetype[{extra}]'.") from error
