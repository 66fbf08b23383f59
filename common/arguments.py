"""The arguments of public functions, checked by their annotations.

`typed` wraps a function, or the public methods of a class. What is called with
an argument that its annotation does not allow raises RequestError with the
argument's name, before any work; what has too few arguments, or one that there
is not, raises Python's own TypeError, which names it.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
import numbers
import types
import typing
from typing import Annotated, Any, TypeVar

from common.errors import RequestError, short
from common.fields import check_number

F = TypeVar('F', bound=Callable)
# A whole number in a range: the pairs are those of fields.check_number.
Seed = Annotated[int, (('>=', 0), ('<=', 2**32 - 1))]
Size = Annotated[int, (('>=', 0), ('<=', 2**31 - 1))]
PositiveSize = Annotated[int, (('>=', 1), ('<=', 2**31 - 1))]


def typed(function: F) -> F:
  """Returns a function, or a class with its public methods, whose arguments are
  checked when it is called. `Any` allows everything, and what follows ** is the
  function's own to check. Of a sequence the elements are checked only where
  they are to be texts: numbers are checked where they become arrays."""
  if isinstance(function, type):
    for name, method in list(vars(function).items()):
      if inspect.isfunction(method) and (
          name[0] != '_' or name in ('__init__', '__call__')):
        setattr(function, name, typed(method))
    return function
  signature = inspect.signature(function)
  hints = functools.cache(lambda: typing.get_type_hints(
      function, include_extras=True))

  @functools.wraps(function)
  def checked(*args: Any, **kwargs: Any) -> Any:
    arguments = signature.bind(*args, **kwargs).arguments
    for name, value in arguments.items():
      if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
        _check(name, value, hints().get(name, Any))
    return function(*args, **kwargs)

  return checked  # type: ignore[return-value]


def _check(name: str, value: Any, hint: Any) -> None:
  """Raises RequestError unless an argument is what its annotation allows."""
  bounds: Any = ()
  if typing.get_origin(hint) is Annotated:
    hint, bounds = typing.get_args(hint)
  if not _fits(value, hint):  # its text may be long in the making
    raise RequestError(f'{name} is {short(value)}, of type '
                       f'{type(value).__name__}: it must be of type '
                       f'{inspect.formatannotation(hint)}')
  if bounds:
    check_number(name, value, bounds)


def _fits(value: Any, hint: Any) -> bool:
  """Whether a value is of an annotated type; a mapping is what has items, as a
  ConfigDict has."""
  kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
  if kind in (typing.Union, types.UnionType):
    return any(_fits(value, x) for x in inner)
  if kind is Mapping:
    return hasattr(value, 'items')
  if kind in _NOT and isinstance(value, _NOT[kind]):
    return False
  kind = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
  return kind is Any or isinstance(value, kind) and (
      inner[:1] != (str,) or all(isinstance(x, str) for x in value))


# What Python takes for a type and nobody means by it.
_NOT: dict[Any, Any] = {int: bool, float: bool, Sequence: (str, bytes)}
