"""Text out of files: decoded, parsed and checked, or a sentence that says where
it is wrong."""

from collections.abc import Iterator
import json
from typing import Any

from configs.errors import RequestError, require, short


def decoded(data: bytes, where: str) -> str:
  """Returns UTF-8 bytes as text."""
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    raise RequestError(f'{where} is not UTF-8: {error}.') from error


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


def objects(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (where it stands, object) of each line of a .jsonl."""
  for where, line in lines(path):
    row = parsed(line, f'{where},')
    require(isinstance(row, dict), f'{where}, is not a JSON object')
    yield where, row


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
