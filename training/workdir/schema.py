"""The types of what a JSON file holds, checked once, where it is read.

A shape is a type or a tuple of types; [shape], a list; {name: shape}, an object
that has at least these fields; Each(shape), an object of any names;
Positive(shape), a number; or Maybe(shape), which may be null.
"""

import dataclasses
import json
import re
from typing import Any

from configs.errors import require, short

NUMBER = (int, float)
MAYBE = (int, float, type(None))  # a figure that is not finite is null
MOST = 1e30  # what a float holds, with room to multiply
WORDS = {int: 'a whole number', float: 'a number', str: 'a text',
         bool: 'true or false', type(None): 'null', dict: 'an object',
         list: 'a list'}


@dataclasses.dataclass(frozen=True)
class Each:
  """An object whose values all have one shape, under any names.

  Attributes:
    shape: of a value.
    name: what a name must match, as a regular expression.
  """
  shape: Any
  name: str = '.*'


@dataclasses.dataclass(frozen=True)
class Positive:
  """A number above 0.

  Attributes:
    shape: its type, or types.
  """
  shape: Any


@dataclasses.dataclass(frozen=True)
class Maybe:
  """Null, or what has the shape.

  Attributes:
    shape: of what is there.
  """
  shape: Any


def parse(text: str | bytes, who: str) -> Any:
  """Returns what JSON text holds.

  Args:
    text: of a whole file, or of a line.
    who: the file, as the subject of a sentence.

  Raises:
    RequestError: where it is no JSON.
  """
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:  # of UTF-8, or of JSON
    reason = str(error)
  require(False, f'{who} is damaged, and is no JSON: {reason}')


def check_shape(value: Any, shape: Any, who: str) -> None:
  """Raises RequestError, which begins with `who`, where a value has not the
  shape."""
  if isinstance(shape, list):
    _kind(value, list, who)
    for i, item in enumerate(value):
      check_shape(item, shape[0], f'{who}[{i}]')
  elif isinstance(shape, Each):
    _kind(value, dict, who)
    for name, item in value.items():
      require(re.fullmatch(shape.name, name) is not None,
              f'{who} has the field {short(name)}, which is no name here')
      check_shape(item, shape.shape, f'{who}.{name}')
  elif isinstance(shape, Positive):
    check_shape(value, shape.shape, who)
    require(value > 0, f'{who} is damaged: it is {value}, and must be above 0')
  elif isinstance(shape, Maybe):
    if value is not None:
      check_shape(value, shape.shape, who)
  elif isinstance(shape, dict):
    _kind(value, dict, who)
    for name, inner in shape.items():
      require(name in value, f'{who} is damaged: it has no {name!r}')
      check_shape(value[name], inner, f'{who}.{name}')
  else:
    _scalar(value, shape if isinstance(shape, tuple) else (shape,), who)


def _scalar(value: Any, kinds: tuple[type, ...], who: str) -> None:
  require(type(value) in kinds, f'{who} is damaged: it is {short(value)}, and '
          f'must be {" or ".join(WORDS[kind] for kind in kinds)}')
  if type(value) in NUMBER:
    # NaN is neither more nor less; math.isnan cannot take a long integer.
    require(value != value or abs(value) <= MOST,
            f'{who} is damaged: it is {short(value)}, which is out of range')


def _kind(value: Any, kind: type, who: str) -> None:
  require(isinstance(value, kind), f'{who} is damaged: it is {short(value)}, '
          f'and must be {WORDS[kind]}')
