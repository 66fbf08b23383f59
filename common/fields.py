"""Rules of values: the fields of a config, and the arguments of functions.

A field of a config is declared once, beside what reads it. A group of fields is
a frozen dataclass. Each of its fields is made by `field`, which is given a
default, a sentence, a range or choices, and what a change of it does to a run
that is resumed. All else reads the declarations: a config's defaults, flags and
their checks, the reference page, the comparison of configs when a run is
resumed, and exports.

The arguments of public functions are checked by their annotations:
`check_argument_types` wraps a function, or the public methods of a class. What
is called with an argument that its annotation does not allow raises
RequestError with the argument's name, before any work; what has too few
arguments, or one that there is not, raises Python's own TypeError, which names
it. `parse_assignments` reads words NAME=VALUE of a command line.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import dataclasses
import functools
import inspect
import math
import numbers
import operator
import types
import typing
from typing import Annotated, Any, NamedTuple, TypeVar

from common.errors import RequestError, check_choice, require, shorten

LARGEST_INT = 2**31 - 1  # A device counts in 32 bits.
# A program has an operation for each token that a short convolution sees.
MOST_TAPS = 256

# The kinds of change of a field, for a run that is resumed.
SAFE = 'safe'
OPTIMISATION = 'changes the optimisation'
INCOMPATIBLE = 'incompatible'


class Effect(NamedTuple):
  """The effect that a change of a field has on a resumed run, and why."""
  kind: str
  why: str


SAME = Effect(SAFE, 'the same function, computed another way')
FUNCTION = Effect(OPTIMISATION, 'the same parameters in another function')
REGULARISATION = Effect(OPTIMISATION, 'another regularisation')
AT_START = Effect(OPTIMISATION, 'read only where a run begins: a resumed run '
                  'ignores it')
PARAMETERS = Effect(INCOMPATIBLE, 'other parameters')
SHAPES = Effect(INCOMPATIBLE, 'parameters of another shape or dtype')

# The subjects of a field of a model.
PART = 'part'  # which function of its sizes the model is
SIZE = 'size'  # how large it is, and what is read off it
RECIPE = 'recipe'  # how a system is trained, which an export does not say
RUN = 'run'  # how one run computes, or keeps from overfitting

_COMPARISON_OF_SIGN: dict[str, Callable[[Any, Any], bool]] = {
    '>=': operator.ge, '>': operator.gt, '<=': operator.le, '<': operator.lt}


@dataclasses.dataclass(frozen=True)
class Rule:
  """The declaration of a field; `field` explains its arguments."""
  doc: str
  choices: Collection[str]
  bounds: tuple[tuple[str, float], ...]
  resume: Effect | Callable[[Mapping, Mapping], Effect]
  about: str
  of_layers: bool
  several: bool


class ReadIf(NamedTuple):
  """The reason why nothing reads a field: another one, by its dotted name, and
  what that would have to be, as in 'is set'."""
  field: str
  until: str


def field(default: Any, doc: str, *, choices: Collection[str] = (),
          least: float | None = None, above: float | None = None,
          most: float | None = None, below: float | None = None,
          resume: Effect | Callable[[Mapping, Mapping], Effect] = PARAMETERS,
          about: str = PART, of_layers: bool = False, several: bool = False
          ) -> Any:
  """Declares a config field in a frozen dataclass, in place of
  dataclasses.field: its default, its documentation, its range, and what a
  change of it does to a run that is resumed.

  Args:
    default: the default, whose type is that of the field.
    doc: one sentence, or a noun phrase, for the reference page.
    choices: the names that a text may be; empty: it may be any text.
    least: the number is this or more. The default of a whole number is 0.
    above: the number is more than this.
    most: the number is this or less. The default of a whole number is
      LARGEST_INT.
    below: the number is less than this.
    resume: the effect that a change has on a run that is resumed, or a function
      that returns it, given all fields of the old and of the new config, by
      dotted name.
    about: what the field sets: PART, SIZE, RECIPE or RUN.
    of_layers: whether some layers may have a value of their own.
    several: whether a text lists several names, with commas between them.
  """
  # The range of a whole number, where none is given. A bool, which is an int to
  # isinstance, has no range.
  if type(default) is int:
    if least is None and above is None:
      least = 0
    if most is None and below is None:
      most = LARGEST_INT

  # Pair each given bound with its sign.
  bound_of_sign = {'>=': least, '>': above, '<=': most, '<': below}
  bounds = []
  for sign, bound in bound_of_sign.items():
    if bound is not None:
      bounds.append((sign, bound))
  rule = Rule(doc=doc, choices=choices, bounds=tuple(bounds), resume=resume,
              about=about, of_layers=of_layers, several=several)
  return dataclasses.field(default=default, metadata={'rule': rule})


class DeclaredField(NamedTuple):
  """A declared field."""
  default: Any
  rule: Rule

  @property
  def type(self) -> type:
    """The type of its values."""
    return type(self.default)


def declared_fields(group: type, prefix: str = '') -> dict[str, DeclaredField]:
  """Returns all fields that a dataclass of the config declares, by dotted name.
  A dataclass may have others inside, as the group `rope` of the model; their
  fields come as 'rope.theta'.

  Args:
    group: the dataclass.
    prefix: the text that is put before each name.
  """
  declared = {}
  for member in dataclasses.fields(group):
    name = prefix + member.name
    # The default factory of a group inside is the dataclass of that group. A
    # member that was not made by `field` has no rule, and is not a field.
    if dataclasses.is_dataclass(member.default_factory):
      declared |= declared_fields(member.default_factory, f'{name}.')
    elif 'rule' in member.metadata:
      rule = member.metadata['rule']
      declared[name] = DeclaredField(default=member.default, rule=rule)
  return declared


class FieldValue(NamedTuple):
  """A value that a field is to have.

  Attributes:
    leaf: the field.
    value: the value that it is to have.
    subject: the text that a refusal begins with.
    choices: the choices in place of those that are declared, if any.
  """
  leaf: DeclaredField
  value: Any
  subject: str
  choices: Collection[str] = ()


def check_values(values: Iterable[FieldValue]) -> None:
  """Checks values that config fields are to have.

  Where several runs train as one program, a number may be a traced array of
  jax, which has no value yet. It is not checked.

  Args:
    values: the values, each with the declaration of its field, the words that a
      refusal begins with, and choices in place of the declared ones, if any.

  Raises:
    RequestError: if a value is not of its field's type, in its range and among
      its choices.
  """
  for declared, value, subject, given_choices in values:
    expected_type = type(declared.default)
    is_scalar_array = getattr(value, 'shape', None) == ()
    if expected_type is not str and is_scalar_array:
      continue
    check_type(value, default=declared.default, subject=subject)
    if expected_type in (int, float):
      check_number(subject, value=value, bounds=declared.rule.bounds)

    # A text is one of the choices, or lists several, if its field allows that.
    choices = given_choices or declared.rule.choices
    if not choices:
      continue
    names = [value]
    if declared.rule.several:
      names = value.split(',')
    for name in names:
      check_choice(subject, value=name, choices=choices)


def check_type(value: Any, default: Any, subject: str) -> None:
  """Raises RequestError unless a value has the type of its field's default. An
  integer is allowed for a float, and any mapping for a group of fields.

  Args:
    value: the value that the field is to have.
    default: the default of the field.
    subject: the words that a refusal begins with, such as the field's name.
  """
  expected_type = type(default)
  if type(value) is expected_type:
    return
  if expected_type is float and type(value) is int:
    return
  # A group of fields may be any mapping, such as a ConfigDict.
  is_group = isinstance(default, Mapping) or hasattr(default, 'to_dict')
  if is_group and hasattr(value, 'items'):
    return
  expected = f'of type {expected_type.__name__}, as its default {default!r} is'
  if is_group:
    expected = 'a group of fields'
  raise RequestError(f'{subject} is {shorten(value)}, of type '
                     f'{type(value).__name__}: it must be {expected}')


def check_number(subject: str, value: float,
                 bounds: Collection[tuple[str, float]]) -> None:
  """Raises RequestError unless a number is finite and within its bounds.

  Args:
    subject: the name of what has the number, with which the message begins.
    value: the number to check.
    bounds: pairs of a sign and a number, such as ('>=', 1).
  """
  # A comparison with NaN is false, so that it is refused too.
  is_in_range = -math.inf < value < math.inf
  for sign, bound in bounds:
    is_in_range = is_in_range and _COMPARISON_OF_SIGN[sign](value, bound)
  if is_in_range:
    return

  # The message lists the bounds, whole numbers with commas.
  limits = []
  for sign, bound in bounds:
    number = f'{bound:g}'
    if type(bound) is int:
      number = f'{bound:,}'
    limits.append(f'{sign} {number}')
  expected = ' and '.join(limits) or 'a finite number'
  raise RequestError(f'{subject} is {shorten(value)}: it must be {expected}')


# Arguments of functions, and words of a command line.

F = TypeVar('F', bound=Callable)
# A whole number in a range: the pairs are those of check_number.
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

  Returns:
    For a function, one that checks its arguments and calls it. For a class, the
    class itself, whose methods are replaced by such functions.
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
    """Returns the annotation of each argument, by its name; with the bounds of
    an Annotated type, which get_type_hints would drop."""
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
