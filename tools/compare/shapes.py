"""The shape that a dataclass has in a JSON file, from the types it declares."""

import dataclasses
import types
import typing
from typing import Any

from training.workdir import schema


def of(kind: Any) -> Any:
  """Returns the shape (training/schema.py) of what plan.to_json writes of a
  type: any number may be null, where it is not finite."""
  if kind is float:
    return schema.MAYBE
  if kind in (int, str, bool):
    return kind
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if kind is dict or origin is dict:
    return schema.Each(of(inner[1])) if inner else {}
  if origin in (list, tuple):
    return [of(inner[0])]
  if origin is types.UnionType:
    one, = (x for x in inner if x is not type(None))
    return schema.Maybe(of(one))
  if dataclasses.is_dataclass(kind) or hasattr(kind, '_fields'):
    hints = typing.get_type_hints(kind)
    return {name: of(hint) for name, hint in hints.items()}
  raise TypeError(f'{kind} has no shape in a JSON file')
