"""The environment in which chat templates run; imports jinja2.

It is that of transformers, utils/chat_template_utils.py: a template that
renders there renders here, to the same text.
"""

from collections.abc import Iterator
import contextlib
import datetime
import json
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
  """{% generation %} ... {% endgeneration %}, around what the assistant says.

  `environment.tracked(told, spans)` is a context in which the place of each
  block is added to `spans`; `told` is what was rendered so far.
  """
  tags = {'generation'}

  def __init__(self, environment: jinja2.Environment):
    super().__init__(environment)
    environment.extend(tracked=self._tracked)
    self._told: list[str] = []
    self._spans: list[tuple[int, int]] = []

  def parse(self, parser: Any) -> Any:
    line = next(parser.stream).lineno
    body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
    call = self.call_method('_place')
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _place(self, caller: Any) -> str:
    text = caller()
    start = sum(map(len, self._told))
    self._spans.append((start, start + len(text)))
    return text

  @contextlib.contextmanager
  def _tracked(self, told: list[str], spans: list[tuple[int, int]]
               ) -> Iterator[None]:
    self._told, self._spans = told, spans
    yield


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """jinja2's, which refuses an unsafe attribute as soon as it is named; its
  own would print nothing instead, and refuse what is done with it."""

  def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
    raise jinja2.exceptions.SecurityError(
        f'{attribute!r} of {type(obj).__name__!r} is unsafe')


class _Dict:
  """`dict` for templates: what it makes, without its other attributes."""

  def __call__(self, *args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)

  def fromkeys(self, *args: Any) -> dict:
    return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
  """`namespace` for templates: it keeps nothing that begins with _."""

  def __init__(*args: Any, **kwargs: Any):  # pylint: disable=no-method-argument
    self, args = args[0], args[1:]
    values = dict(*args, **kwargs)
    for name in values:
      _refuse_hidden(name)
    jinja2.utils.Namespace.__init__(self, values)

  def __setitem__(self, name: str, value: Any) -> None:
    _refuse_hidden(name)
    super().__setitem__(name, value)


def _refuse_hidden(name: Any) -> None:
  if isinstance(name, str) and name.startswith('_'):
    raise jinja2.exceptions.SecurityError(
        f'a namespace keeps no {name!r}, because it begins with _')


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None,
            separators: Any = None, sort_keys: bool = False) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent,
                    separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.Environment:
  """Returns a new environment; in it, no template sees another's."""
  made = _Sandbox(
      trim_blocks=True, lstrip_blocks=True,
      extensions=[Generation, jinja2.ext.loopcontrols])
  made.filters['tojson'] = _tojson
  made.globals.update(
      raise_exception=_raise, dict=_Dict(), namespace=_Namespace,
      strftime_now=lambda form: datetime.datetime.now().strftime(form))
  return made
