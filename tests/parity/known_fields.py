"""Which fields of a config.json transformers knows, recorded for the import.

transformers keeps a field that it does not know as an attribute of the
configuration, which no model reads. So a field changes nothing if the
configuration class of a model_type does not declare it and no code of the model
reads it. training/hf/known_fields.json has the names of which one of the two
holds, by model_type, and under '' those that all of them share:

  python -m tests.parity.known_fields

writes that file anew. `make verify` compares it with the transformers that is
installed.
"""

import ast
from collections.abc import Iterable
import dataclasses
import functools
import importlib
import inspect
import json
import pathlib
import re
import textwrap
from typing import Any

import architectures
from tests.parity import reference
from training.hf import config as hf_config

FILE = pathlib.Path(hf_config.__file__).with_name('known_fields.json')
# What a configuration and the objects in it are called in code that reads them.
CONFIGURATION = re.compile(
    '_?((text|layer|effective|encoder|decoder)_)?config|cfg|rope_parameters')
LOOKS_UP = {'get', 'pop', 'setdefault', 'getattr', 'hasattr'}


def record() -> dict[str, Any]:
  """Returns what training/hf/known_fields.json should hold."""
  import transformers
  names = {}
  for system in architectures.systems():
    if hasattr(architectures.page(system), 'HF'):
      names[architectures.hugging_face(system).model_type] = known(system)
  shared = set.intersection(*names.values())
  return {'transformers': transformers.__version__, '': sorted(shared)} | {
      model_type: sorted(names[model_type] - shared)
      for model_type in sorted(names)}


def known(system: str) -> set[str]:
  """Returns the fields that transformers declares or reads in a system."""
  page = architectures.hugging_face(system)
  models = [reference.model_class(system, head)
            for head in ('lm', *page.heads)]
  config = models[0].config_class
  names = {field.name for field in dataclasses.fields(config)}
  names |= {*inspect.signature(config.__init__).parameters}
  names |= {*config.attribute_map, *config.attribute_map.values()}
  for kind in _of_transformers(config.__mro__):
    whole = kind.__name__ != 'PreTrainedConfig'  # which reads folders, too
    names |= _read(kind if whole else kind.__post_init__, ('self', 'kwargs'))
  for part in _parts(models):
    names |= _read(part)
  return {name for name in names if name.isidentifier()
          and not name.startswith('_') and name not in _OF_PYTHON
          and not callable(getattr(config, name, None))}


# Of dicts and functions, and no fields.
_OF_PYTHON = {'self', 'args', 'kwargs', 'keys', 'values', 'items', 'get', 'pop',
              'update', 'setdefault', 'copy'}


def _of_transformers(objects: Iterable[Any]) -> list[Any]:
  """Returns those classes and functions that transformers defines."""
  return [thing for thing in objects
          if (inspect.isclass(thing) or inspect.isfunction(thing))
          and thing.__module__.startswith('transformers.')]


def _parts(models: Iterable[type]) -> set[Any]:
  """Returns the classes and functions that a model is made of: those it
  extends, and all that their files define or import."""
  bases = {base for model in models for base in _of_transformers(model.__mro__)}
  files = {base.__module__ for base in bases if '.models.' in base.__module__}
  imported = {thing for name in files for thing in _of_transformers(
      vars(importlib.import_module(name)).values())}
  return {thing for thing in bases | imported
          if '.generation.' not in thing.__module__
          and not hasattr(thing, 'model_type')}


@functools.cache
def _read(part: Any, more: tuple[str, ...] = ()) -> frozenset[str]:
  """Returns the names of the fields that the code of a class or a function
  reads of a configuration: attributes, keys, and names that are looked up.

  Args:
    part: the class or function.
    more: further names that a configuration has there.
  """
  code = textwrap.dedent(inspect.getsource(inspect.unwrap(part)))
  names: set[str] = set()
  for node in ast.walk(ast.parse(code)):
    if isinstance(node, ast.Attribute) and _is_config(node.value, more):
      names.add(node.attr)
    elif isinstance(node, ast.Subscript) and _is_config(node.value, more):
      names |= _strings([node.slice])
    elif isinstance(node, ast.Call) and _last_name(node.func) in LOOKS_UP:
      owner = getattr(node.func, 'value', node.func)  # of a method
      if any(_is_config(x, more) for x in (owner, *node.args)):
        names |= _strings(node.args)
    elif isinstance(node, ast.Compare) and any(
        _is_config(x, more) for x in node.comparators):  # 'name' in config
      names |= _strings([node.left])
  return frozenset(names)


def _is_config(node: ast.AST, more: tuple[str, ...]) -> bool:
  """Whether an expression is a configuration, by its last name."""
  name = _last_name(node)
  return name in more or CONFIGURATION.fullmatch(name) is not None


def _last_name(node: ast.AST) -> str:
  return getattr(node, 'attr', getattr(node, 'id', ''))


def _strings(nodes: Iterable[ast.AST]) -> set[str]:
  return {node.value for node in nodes
          if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def main() -> None:
  """Writes the file."""
  lines = (f'{json.dumps(name)}: {json.dumps(value)}'
           for name, value in record().items())
  FILE.write_text('{\n' + ',\n'.join(lines) + '\n}\n')


if __name__ == '__main__':
  main()
