"""The arguments of public functions, checked by their annotations, and texts
that assign values to names.

`check_argument_types` wraps a function, or the public methods of a class. What
is called with an argument that its annotation does not allow raises
RequestError with the argument's name, before any work; what has too few
arguments, or one that there is not, raises Python's own TypeError, which names
it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import functools
import inspect
import numbers
import types
import typing
from typing import Annotated, Any, TypeVar

from common.errors import RequestError, check_choice, require, shorten
from common.fields import check_number

F = TypeVar('F', bound=Callable)
# A whole number in a range: the pairs are those of fields.check_number.
Seed = Annotated[int, (('>=', 0), ('<=', 2**32 - 1))]
Size = Annotated[int, (('>=', 0), ('<=', 2**31 - 1))]
PositiveSize = Annotated[int, (('>=', 1), ('<=', 2**31 - 1))]


def check_argument_types(function: F) -> F:
  """Decorates a function, so that each call checks its arguments against their
  annotations and raises RequestError for a wrong type. Decorates a class by
  decorating its public methods.

  Three things are not checked: an argument annotated as `Any`, the keywords
  that a function collects by **, and the elements of a sequence unless they
  must be texts (numbers are checked where they become arrays).

  Args:
    function: the function or class to decorate.
  """
  # For a class, replace each public method.
  if isinstance(function, type):
    for name, method in list(vars(function).items()):
      is_public = not name.startswith('_') or name in ('__init__', '__call__')
      if is_public and inspect.isfunction(method):
        setattr(function, name, check_argument_types(method))
    return function

  # For a function, make a wrapper. Annotations are resolved at the first call
  # and not here, because they may name classes that are defined further down.
  signature = inspect.signature(function)

  @functools.cache
  def annotations() -> dict[str, Any]:
    return typing.get_type_hints(function, include_extras=True)

  @functools.wraps(function)
  def checked_function(*args: Any, **kwargs: Any) -> Any:
    """Checks the arguments, and calls the function."""
    arguments = signature.bind(*args, **kwargs).arguments
    for name, value in arguments.items():
      if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
        _check_argument(name, value=value,
                        annotation=annotations().get(name, Any))
    return function(*args, **kwargs)

  return checked_function  # type: ignore[return-value]


def parse_assignments(words: Iterable[str], flag: str,
                      choices: Collection[str] = ()) -> dict[str, str]:
  """Parses words NAME=VALUE of a command line, and returns {name: value}.

  Args:
    words: the words, each with one assignment.
    flag: the flag that they were given to, for messages.
    choices: the allowed names; empty: any name is allowed.

  Raises:
    RequestError: for a word that is no assignment, for an unknown name, and for
      a name that is assigned twice, since one of its values would be ignored.
  """
  value_of_name: dict[str, str] = {}
  for word in words:
    name, equals, value = word.strip().partition('=')
    if choices:
      check_choice(f'name in {flag}', value=name, choices=choices)
    require(bool(name and equals),
            f'{flag} has {shorten(word)}: write it as NAME=VALUE')
    require(name not in value_of_name, f'{flag} has {name} twice, as '
            f'{shorten(value_of_name.get(name))} and {shorten(value)}: give it '
            'once')
    value_of_name[name] = value
  return value_of_name


def _check_argument(name: str, value: Any, annotation: Any) -> None:
  """Raises RequestError unless an argument has the type of its annotation. The
  annotation Annotated[type, bounds] gives a range too.

  Args:
    name: the name of the argument, with which a message begins.
    value: the value that the function was called with.
    annotation: the annotation of the argument.
  """
  # Take the bounds off the annotation, such as (('>=', 0), ('<', 10)).
  bounds: Any = ()
  if typing.get_origin(annotation) is Annotated:
    annotation, bounds = typing.get_args(annotation)

  # Check both. The message is made only where it is needed, because it takes
  # long to write a large value as text.
  if not _is_of_type(value, annotation):
    raise RequestError(
        f'{name} is {shorten(value)}, of type {type(value).__name__}: it must '
        f'be of type {inspect.formatannotation(annotation)}')
  if bounds:
    check_number(name, value=value, bounds=bounds)


def _is_of_type(value: Any, annotation: Any) -> bool:
  """Returns whether a value has the type of an annotation.

  For a Mapping, anything that has items() will do, such as a ConfigDict. For a
  number, some classes are excluded or added: see _CLASSES_EXCLUDED_FROM and
  _CLASS_OF_NUMBER_TYPE.

  Args:
    value: the value.
    annotation: a type, as typing.get_type_hints returns it.
  """
  # Types that are no class: Any, unions, and mappings.
  outer_type = typing.get_origin(annotation) or annotation
  inner_types = typing.get_args(annotation)
  if outer_type is Any:
    return True
  if outer_type in (typing.Union, types.UnionType):
    return any(_is_of_type(value, choice) for choice in inner_types)
  if outer_type is Mapping:
    return hasattr(value, 'items')

  # The class of the value, and the elements of a sequence of texts.
  if isinstance(value, _CLASSES_EXCLUDED_FROM.get(outer_type, ())):
    return False
  if not isinstance(value, _CLASS_OF_NUMBER_TYPE.get(outer_type, outer_type)):
    return False
  if inner_types[:1] == (str,):
    return all(isinstance(element, str) for element in value)
  return True


# The classes of the numbers that an annotation allows, numpy's too.
_CLASS_OF_NUMBER_TYPE: dict[Any, Any] = {int: numbers.Integral,
                                         float: numbers.Real}
# The classes that Python takes for a type and nobody means by it.
_CLASSES_EXCLUDED_FROM: dict[Any, Any] = {int: bool, float: bool,
                                          Sequence: (str, bytes)}
