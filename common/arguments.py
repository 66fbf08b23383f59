"""The arguments of public functions, checked by their annotations, and texts
that assign values to names.

`typed` wraps a function, or the public methods of a class. What is called with
an argument that its annotation does not allow raises RequestError with the
argument's name, before any work; what has too few arguments, or one that there
is not, raises Python's own TypeError, which names it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import functools
import inspect
import numbers
import types
import typing
from typing import Annotated, Any, TypeVar

from common.errors import RequestError, one_of, require, short
from common.fields import check_number

F = TypeVar('F', bound=Callable)
# A whole number in a range: the pairs are those of fields.check_number.
Seed = Annotated[int, (('>=', 0), ('<=', 2**32 - 1))]
Size = Annotated[int, (('>=', 0), ('<=', 2**31 - 1))]
PositiveSize = Annotated[int, (('>=', 1), ('<=', 2**31 - 1))]


def check_argument_types(function: F) -> F:
  """Returns a function, or a class with its public methods, whose arguments are
  checked when it is called. `Any` allows everything, and what follows ** is the
  function's own to check. The elements of a sequence are checked only where
  they are to be texts: numbers are checked where they become arrays."""
  # A class: each of its public methods.
  if isinstance(function, type):
    for name, method in list(vars(function).items()):
      is_public = not name.startswith('_') or name in ('__init__', '__call__')
      if is_public and inspect.isfunction(method):
        setattr(function, name, check_argument_types(method))
    return function

  signature = inspect.signature(function)

  @functools.cache
  def hints() -> dict[str, Any]:
    """Returns the annotations; late, when all that they name is defined."""
    return typing.get_type_hints(function, include_extras=True)

  @functools.wraps(function)
  def checked(*args: Any, **kwargs: Any) -> Any:
    """Calls the function, if its arguments are what they may be."""
    arguments = signature.bind(*args, **kwargs).arguments
    for name, value in arguments.items():
      if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
        _check_argument(name, value, hints().get(name, Any))
    return function(*args, **kwargs)

  return checked  # type: ignore[return-value]


def parse_assignments(words: Iterable[str], flag: str,
                      choices: Collection[str] = ()) -> dict[str, str]:
  """Returns the value of each name that NAME=VALUE words assign.

  Args:
    words: the assignments, one in each.
    flag: the name of the flag where they were written, for messages.
    choices: the names that there are; none: any name may stand there.

  Raises:
    RequestError: for a word that is no assignment, an unknown name, and a name
      that is assigned twice, since one of its values would not be read.
  """
  values: dict[str, str] = {}
  for word in words:
    name, equals, value = word.strip().partition('=')
    if choices:
      one_of(f'name in {flag}', name, choices)
    require(bool(name and equals),
            f'{flag} has {short(word)}: write it as NAME=VALUE')
    require(name not in values, f'{flag} has {name} twice, as '
            f'{short(values.get(name))} and {short(value)}: give it once')
    values[name] = value
  return values


def _check_argument(name: str, value: Any, hint: Any) -> None:
  """Raises RequestError unless an argument is what its annotation allows."""
  bounds: Any = ()
  if typing.get_origin(hint) is Annotated:
    hint, bounds = typing.get_args(hint)
  if not _is_of_type(value, hint):  # its text may be long in the making
    raise RequestError(
        f'{name} is {short(value)}, of type {type(value).__name__}: it must be '
        f'of type {inspect.formatannotation(hint)}')
  if bounds:
    check_number(name, value, bounds)


def _is_of_type(value: Any, hint: Any) -> bool:
  """Returns whether a value is of an annotated type; a mapping is anything that
  has items, such as a ConfigDict."""
  kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
  if kind is Any:
    return True
  if kind in (typing.Union, types.UnionType):
    return any(_is_of_type(value, choice) for choice in inner)
  if kind is Mapping:
    return hasattr(value, 'items')

  # The class, and the elements of a sequence of texts.
  if isinstance(value, _CLASSES_EXCLUDED_FROM.get(kind, ())):
    return False
  if not isinstance(value, _CLASS_OF_NUMBER_TYPE.get(kind, kind)):
    return False
  if inner[:1] == (str,):
    return all(isinstance(element, str) for element in value)
  return True


# The classes of the numbers that an annotation allows, numpy's too.
_CLASS_OF_NUMBER_TYPE: dict[Any, Any] = {int: numbers.Integral,
                                         float: numbers.Real}
# The classes that Python takes for a type and nobody means by it.
_CLASSES_EXCLUDED_FROM: dict[Any, Any] = {int: bool, float: bool,
                                          Sequence: (str, bytes)}
