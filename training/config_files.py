"""Config files as a user writes them: loaded, and refused with file and line.

ml_collections loads a config file by itself, but it reports an error in the
file as a traceback inside a message, and a misspelt field as whatever exception
the first access raises. So a program checks the file, what it returns, and the
fields that the command line names before it lets ml_collections parse them.
"""

from collections.abc import Callable, Mapping, Sequence
import difflib
import functools
import importlib.machinery
import importlib.util
import operator
import os
import pathlib
import re
import traceback
import types
from typing import Any

import ml_collections

from architectures.parts import tables
from configs import base
from configs.errors import RequestError, one_of, require, short
from configs.fields import check_type


def load_config_file(spec: str) -> ml_collections.ConfigDict:
  """Returns the config that FILE.py:SIZE describes.

  Raises:
    RequestError: where the file is missing, fails, or returns no config; the
      message gives the file and the line.
  """
  file, colon, size = spec.partition(':')
  if not os.path.isfile(file) or b'get_config' not in _bytes(file):
    files = [p for p in sorted(map(str, pathlib.Path('configs').glob('*.py')))
             if b'get_config' in _bytes(p)]
    what = ('is no config: it has no get_config()' if os.path.isfile(file)
            else 'is no file')
    raise RequestError(f'--config {file!r} {what}; choose from '
                       f'{", ".join(files)}.{_hint(file, files)}')
  module = run(file)
  require(callable(getattr(module, 'get_config', None)),
          f'{file} has no function get_config(): define one that returns a '
          'config')
  config = call(file, module.get_config, *([size] if colon else []))
  check_config_fields(config, f'{file}: get_config()')
  return config


def run(file: str) -> types.ModuleType:
  """Returns the module that a Python file of the user defines.

  Raises:
    RequestError: where the file fails, with the line.
  """
  loader = importlib.machinery.SourceFileLoader('of_user', file)
  spec = importlib.util.spec_from_loader(loader.name, loader)
  module = importlib.util.module_from_spec(spec)
  call(file, spec.loader.exec_module, module)
  return module


def call(file: str, function: Callable, *args):
  """Calls a function of a user's file.

  Raises:
    RequestError: where it fails, with the file, the line and the reason.
  """
  try:
    return function(*args)
  except RequestError:
    raise  # which is a sentence already
  except (Exception, SystemExit) as error:  # whatever the user's code raises
    raise RequestError(_sentence(file, error)) from error


def _sentence(file: str, error: BaseException) -> str:
  if isinstance(error, SyntaxError) and error.filename:
    at, line, text = error.filename, error.lineno, error.msg
  else:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file]
    at, line = file, own[-1].lineno if own else None
    text = str(error).strip()
    if of_field := _of_field(error):
      return f'{at}{f", line {line}" if line else ""}: {of_field}'
  first = (text.splitlines() or ['no message'])[0]
  return (f'{at}{f", line {line}" if line else ""}: {type(error).__name__}: '
          f'{first}')


def _of_field(error: BaseException) -> str:
  """Returns in a sentence what ml_collections says of a field that a config
  does not have, or has of another type; '' for another error. It quotes the
  name, and its AttributeError holds a KeyError."""
  if found := re.fullmatch(
      r"Could not override field '(\w+)' \(reference\)\. (.*) is of original "
      r"type <class '(.*)'> and cannot be casted to type <class '(.*)'>",
      str(error), re.S):
    given, wanted = (kind.rpartition('.')[2] for kind in found.groups()[2:])
    return (f'{found[1]} is {short(found[2])}, of type {given}: it must be of '
            f'type {wanted}')
  said = error
  while isinstance(said, LookupError | AttributeError) and said.args:
    said = said.args[0]
  found = re.fullmatch(
      r"""(?:Key )?(['"])(\w+)\1(?: does not exist and .*?)?"""
      r'(?:\nDid you mean "(\w+)" instead of .*)?', str(said), re.S)
  if said is error or not found:
    return ''
  return f'no config field {found[2]!r}.' + (
      f' Did you mean {found[3]!r}?' if found[3] else '')


def check_config_fields(config: Any, who: str) -> None:
  """Raises RequestError unless `config` has the fields of configs/base.py, each
  of the type that it has there."""
  require(isinstance(config, ml_collections.ConfigDict),
          f'{who} returned {short(config)}, which is no ConfigDict: end it '
          'with `return c`, where c began as base.base()')
  _check_group(config, base.base(), who, '')


def _check_group(group: Mapping, expected: Mapping, who: str, prefix: str):
  for name in expected:
    require(name in group, f'{who}: the field {prefix}{name} is missing: begin '
            'with base.base() of configs/base.py, which has every field')
  for name, value in group.items():
    field = f'{prefix}{name}'
    require(name in expected, f'{who}: {field} is no config field, so nothing '
            f'would read it; there are {", ".join(sorted(expected))}.'
            f'{_hint(str(name), list(expected))}')
    check_type(value, expected[name], f'{who}: {field}')
    if field == 'model.kinds':
      tables.check_kinds(value, f'{who}: {field}')
    elif isinstance(expected[name], ml_collections.ConfigDict):
      _check_group(value, expected[name], who, f'{field}.')


def check_keys(config: ml_collections.ConfigDict, argv: Sequence[str]) -> None:
  """Raises RequestError for a word --config.FIELD of a command line whose
  field is not there, or is a group of fields; and for --noconfig.FIELD of a
  field that is not true or false."""
  for word in argv:
    found = re.match(r'--?(?:no)?config\.([^=]*)', word)
    if found:
      _check_key(config, word.partition('=')[0], found[1])
  declare_kinds(config, argv)
  for word in argv:
    found = re.match(r'--?noconfig\.([^=]*)(=?)', word)
    if found:
      value = functools.reduce(operator.getitem, found[1].split('.'), config)
      require(type(value) is bool and not found[2],
              f'{word.partition("=")[0]} sets a field that is true or false to '
              f'false, and takes no value: write --config.{found[1]}=VALUE')


def declare_kinds(config: ml_collections.ConfigDict, argv: Sequence[str]
                  ) -> None:
  """Gives the kinds of layer of a config the fields that a command line sets,
  since ml_collections sets what is there."""
  whole = any(re.match(r'--?config\.model\.kinds(=|$)', w) for w in argv)
  for word in argv:
    found = re.match(
        r'--?(?:no)?config\.model\.kinds(?:\.|\[\')([^=]*)', word)
    if found:
      require(not whole, f'{word.partition("=")[0]} is beside '
              '--config.model.kinds, which sets all of them: put it there')
      name, _, field = found[1].replace("']", '').partition('.')
      declare(config.model, name, field)


def declare(model: ml_collections.ConfigDict, kind: str, field: str) -> None:
  """Gives a kind of layer a field, with the model's value, where it has none:
  to be set.

  Args:
    model: config.model.
    kind: its name, which may be new.
    field: of it, dotted below it.

  Raises:
    RequestError: for a field that a kind does not have.
  """
  name, _, inner = field.partition('.')
  of_model = tables.OF_LAYERS.get(name, '')
  group = of_model in tables.GROUPS
  who = f'model.kinds.{kind}.{field}'
  choices = tuple(model[of_model]) if group else ()
  require(of_model != '', f'{who} is no field that a kind may change: choose '
          f'from {", ".join(tables.OF_LAYERS)}')
  require(not group or bool(inner), f'{who} is a group of fields: set one of '
          'them, ' + ', '.join(f'model.kinds.{kind}.{name}.{x}'
                               for x in choices))
  require(group or not inner, f'{who} is one value and has no fields')
  require(not group or inner in model[of_model], f'{who} is no field of '
          f'model.{name}: choose from {", ".join(choices)}')
  tables.check_kinds({kind: {}})
  with model.unlocked():
    at = model.kinds
    for part in (kind, *([name] if inner else ())):
      if part not in at:
        at[part] = ml_collections.ConfigDict()
      at = at[part]
    if (inner or name) not in at:
      value = model[of_model]
      at[inner or name] = value[inner] if inner else value


def _check_key(config: Any, flag: str, name: str) -> None:
  if re.fullmatch(r'model\.kinds(\.\w+\.\w+(\.\w+)?)?', name):
    return  # whose fields need not be there
  at, parents = config, []
  for part in name.split('.'):
    require(isinstance(at, ml_collections.ConfigDict),
            f'{flag}: {".".join(parents)} is one value and has no fields')
    require(part in at, f'{flag}: no config field {part!r}.'
            f'{_hint(part, list(at))} There are {", ".join(sorted(at))}.')
    at, parents = at[part], [*parents, part]
  if isinstance(at, ml_collections.ConfigDict):
    raise RequestError(f'{flag}: {name} is a group of fields: set one of them, '
                       f'{", ".join(f"{name}.{field}" for field in at)}')


def set_fields(model: ml_collections.ConfigDict, fields: Mapping[str, Any],
               group: str = 'model') -> None:
  """Sets fields of a group of a config, and of the groups in it.

  Raises:
    RequestError: for a field that there is not.
  """
  for name, value in fields.items():
    check_field(f'config.{group}', name, list(model))
    if name == 'kinds':
      model.kinds = ml_collections.ConfigDict(value)
    elif isinstance(value, Mapping):
      set_fields(model[name], value, f'{group}.{name}')
    else:
      model[name] = value


def check_field(group: str, name: str, choices: Sequence[str]) -> None:
  """Raises RequestError unless `name`, a keyword argument, is one of the
  fields `choices` of `group`. For a dotted name it says how to write it."""
  parts = name.removeprefix('config.').removeprefix('model.').split('.')
  if name not in choices and parts[0] in choices:
    *groups, last = parts
    written = last + '=...'
    for outer in reversed(groups):
      written = f'{outer}=dict({written})'
    raise RequestError(f'{name!r} is written {written} here')
  one_of(f'field of {group}', name, choices)


def _bytes(file: str) -> bytes:
  try:
    return pathlib.Path(file).read_bytes()
  except OSError as error:
    raise RequestError(f'--config {file!r} cannot be read: {error.strerror}'
                       ) from error


def _hint(word: str, choices: Sequence[str]) -> str:
  near = difflib.get_close_matches(word, choices, n=1)
  return f' Did you mean {near[0]!r}?' if near else ''

