"""Text out of files: decoded, parsed and checked, or a sentence that says where
it is wrong."""

import json
from typing import Any

from configs.errors import RequestError, short


def decoded(data: bytes, where: str) -> str:
  """Returns UTF-8 bytes as text."""
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    raise RequestError(f'{where} is not UTF-8: {error}.') from error


def parsed(data: bytes | str, where: str) -> Any:
  """Returns what UTF-8 JSON holds."""
  text = data if isinstance(data, str) else decoded(data, where)
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    # Of a line of a file, `where` says which: it is line 1 of itself.
    line = f'line {error.lineno}, ' if '\n' in text.strip() else ''
    raise RequestError(f'{where} is broken JSON: {error.msg}, {line}column '
                       f'{error.colno}.') from error
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
