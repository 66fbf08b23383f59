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
import json
import os
import pathlib
from typing import Any

from common.errors import RequestError, require, shorten

MOST_BYTES_OF_LINE = 1 << 28  # bytes
_CHECKED_BYTES = 1 << 20
# Control characters of ASCII, but for those that move a cursor or begin an
# escape sequence; so many of them are no sign of anything.
_CONTROL_CHARACTERS = bytes({*range(8), *range(14, 27), *range(28, 32), 127})
_ALLOWED_CONTROL_CHARACTERS = 8
# How files begin that are no text, and what they are.
_ADVICE_FOR_FIRST_BYTES = {
    b'\x1f\x8b': 'compressed (gzip): unpack it',
    b'BZh91AY&SY': 'compressed (bzip2): unpack it',
    b'\xfd7zXZ\0': 'compressed (xz): unpack it',
    b'\x28\xb5\x2f\xfd': 'compressed (zstd): unpack it',
    b'PK\x03\x04': 'compressed (zip): unpack it',
    b'PAR1\x15': 'a parquet file: write parquet:GLOB:FIELD',
    b'\xff\xfe': 'UTF-16: write it as UTF-8',
    b'\xfe\xff': 'UTF-16: write it as UTF-8'}
TABLE_ENDINGS = ('.tsv', '.csv')
Rows = Iterator[tuple[str, dict[str, Any]]]  # where it stands, and what it has


def decode_text(content: bytes, location: str) -> str:
  """Decodes UTF-8 bytes, and refuses bytes that are no text.

  Args:
    content: the bytes of the text.
    location: the file and the line, for messages.

  Raises:
    RequestError: for bytes that are not UTF-8, or that have so many control
      characters that they cannot be text.
  """
  # Recognise compressed files and the like by their first bytes.
  for first_bytes, advice in _ADVICE_FOR_FIRST_BYTES.items():
    require(not content.startswith(first_bytes), f'{location} is {advice}')

  # Damaged and binary data may also be valid UTF-8. Count the control
  # characters, for each part of the text separately, so that a damaged end of a
  # long text is found. A few of them, or a twentieth, are allowed.
  for start in range(0, len(content), _CHECKED_BYTES):
    part = content[start:start + _CHECKED_BYTES]
    controls = len(part) - len(part.translate(None, _CONTROL_CHARACTERS))
    most_controls = max(_ALLOWED_CONTROL_CHARACTERS, len(part) // 20)
    require(controls <= most_controls, f'{location} is no text: of '
            f'{len(part):,} bytes from byte {start:,} on {controls:,} are '
            'control characters, as in UTF-16, of which UTF-8 has to be made, '
            'or in a damaged or binary file')
  try:
    return content.decode('utf-8')
  except UnicodeDecodeError as error:
    raise RequestError(f'{location} is not UTF-8: {error}.') from error


def check_size(location: str, size: int) -> None:
  """Checks that a file, or a part of one, fits into this machine's memory
  twice: as bytes, and as text.

  Args:
    location: the file or the part, for messages.
    size: the number of bytes, which are read at once.

  Raises:
    RequestError: for a file that is too large.
  """
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  require(2 * size <= memory, f'{location} has {size / 2**30:,.1f} GiB, which '
          f'are read at once, and this machine has {memory / 2**30:,.1f} GiB '
          'of memory: cut it into several')


def read_text(path: str) -> str:
  """Returns the text of a UTF-8 file.

  Raises:
    RequestError: for a file that does not fit into memory, or is not text.
  """
  check_size(path, os.stat(path).st_size)
  return decode_text(pathlib.Path(path).read_bytes(), path)


def read_lines(path: str, all_lines: bool = False) -> Iterator[tuple[str, str]]:
  """Yields the lines of a UTF-8 file, as (location, text). The location is the
  file and the line, for messages.

  Args:
    path: the path of the file.
    all_lines: whether to yield empty lines too.

  Raises:
    RequestError: for a line that is no text.
  """
  # Read the lines as bytes, so that a message can name one that is not UTF-8.
  # Limit their length: a file without line breaks might not fit into memory.
  with open(path, 'rb') as file:
    number = 0
    while line := file.readline(MOST_BYTES_OF_LINE):
      number += 1
      location = f'{path}, line {number}'
      require(len(line) < MOST_BYTES_OF_LINE,
              f'{location}, has {MOST_BYTES_OF_LINE:,} bytes or '
              'more: it is no file of lines')
      text = decode_text(line, f'{location},').rstrip('\r\n')
      # Some editors begin a file with a byte order mark.
      if number == 1:
        text = text.removeprefix('\ufeff')
      if all_lines or text.strip():
        yield location, text


def parse_json(data: bytes | str, location: str) -> Any:
  """Returns the value that UTF-8 JSON holds.

  Raises:
    RequestError: for broken JSON.
  """
  text = data if isinstance(data, str) else decode_text(data, location)
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise RequestError(f'{location} is broken JSON: {error}.') from error


def check_text(text: Any, location: str) -> str:
  """Checks that a value is a string that can be written as UTF-8, and returns
  it. JSON may have strings that cannot, with half of a surrogate pair.

  Args:
    text: the value to check.
    location: the file and the line, for messages.

  Raises:
    RequestError: for any other value.
  """
  if not isinstance(text, str):
    raise RequestError(f'{location} is {shorten(text)}, not a string.')
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    raise RequestError(f'{location} is not text: {error}.') from error
  return text


def read_rows(path: str, has_header: bool = True) -> Rows:
  """Yields the rows of a file as (location, {column: value}). The location is
  the file and the line, for messages.

  The file is a table (.tsv or .csv), a JSON list of objects, or JSON Lines,
  with one object on each line.

  Args:
    path: the path of the file.
    has_header: whether the first line of a table has the names of its columns.
      If not, they are called '0', '1', and so on.

  Raises:
    RequestError: for a row that cannot be read.
  """
  if path.endswith(TABLE_ENDINGS):
    yield from _read_table(path, has_header)
    return
  with open(path, 'rb') as file:
    is_list = file.read(1) == b'['
  values = _read_json_list(path) if is_list else _read_json_lines(path)
  for location, row in values:
    require(isinstance(row, dict), f'{location}, is not a JSON object')
    yield location, row


def _read_json_list(path: str) -> Iterator[tuple[str, Any]]:
  """Yields (where it stands, value) of each value of a file with a list of
  JSON."""
  for number, row in enumerate(parse_json(read_text(path), path), 1):
    yield f'{path}, record {number}', row


def _read_json_lines(path: str) -> Iterator[tuple[str, Any]]:
  """Yields (where it stands, value) of each line of a file, which is a value of
  JSON."""
  for location, line in read_lines(path):
    yield location, parse_json(line, f'{location},')


def _read_table(path: str, has_header: bool) -> Rows:
  """Yields the rows of a .tsv or a .csv as (location, {column: cell}). The
  location is the file and the line, for messages.

  Args:
    path: the path of the file.
    has_header: whether the first line has the names of the columns. If not,
      they are called '0', '1', and so on.

  Raises:
    RequestError: for quotes that are not closed, and the like.
  """
  # In a .tsv, quotes have no meaning, as in the files of GLUE. By default the
  # module csv refuses a cell of more than 131,072 characters.
  csv.field_size_limit(2**31 - 1)
  dialect: dict[str, Any] = {}
  if path.endswith('.tsv'):
    dialect = dict(delimiter='\t', quoting=csv.QUOTE_NONE)
  text = io.StringIO(read_text(path).removeprefix('\ufeff'), newline='')
  reader = csv.reader(text, strict=True, **dialect)

  # A quoted cell may have several lines, so the location is the line at which a
  # row begins: the one after the last line of the row before.
  columns = None
  first_line = 1
  try:
    for cells in reader:
      location = f'{path}, line {first_line}'
      first_line = reader.line_num + 1
      is_empty = not any(map(str.strip, cells))
      if is_empty:
        continue
      if has_header and columns is None:
        columns = cells
        continue
      names = columns or map(str, range(len(cells)))
      yield location, dict(zip(names, cells))
  except csv.Error as error:
    raise RequestError(f'{path}, line {first_line}, is broken CSV: {error}.'
                       ) from error


def check_columns(columns: Iterable[str], names: Iterable[str], location: str
                  ) -> None:
  """Checks that a row or a file has all columns that are to be read.

  Args:
    columns: the columns that it has.
    names: the columns that are to be read.
    location: the row or the file, for messages.

  Raises:
    RequestError: for a column that is missing.
  """
  for name in names:
    require(name in columns, f'{location} has no field {name!r}: it has '
            f'{", ".join(columns)}')


def import_extra(module: str, subject: str, extra: str) -> Any:
  """Returns a module of an optional package.

  Args:
    module: the dotted name of the module.
    subject: the thing that needs it, for messages.
    extra: the extra of this project that installs it.

  Raises:
    RequestError: where the package is not installed.
  """
  # transformers would advise all users to install PyTorch.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise RequestError(
        f'{subject} needs the package {module.partition(".")[0]}: '
        f"pip install 'archetype[{extra}]'.") from error
