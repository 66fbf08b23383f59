"""Patterns over parameter paths: the first that matches gives the value.

A path is the parameter's place in the tree, '/'-joined, such as
decoder/layers/block_0/attention/query. A pattern is a regular expression that
must match the whole of it. Weight decay, freezing and learning rates by group
are all such lists; a path that no pattern covers is an error, so a new
parameter is never treated by accident.
"""

from collections.abc import Sequence
import re
from typing import Any

import jax

from configs.errors import RequestError


def join(key_path: Any) -> str:
  """Returns a jax key path as its '/'-joined string."""
  return '/'.join(str(getattr(key, 'key', getattr(
      key, 'name', getattr(key, 'idx', key)))) for key in key_path)


def flatten(tree: Any) -> dict[str, Any]:
  """Returns {path: leaf}, in the tree's own order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {join(path): leaf for path, leaf in leaves}


def first_match(patterns: Sequence[tuple[str, Any]], path: str,
                name: str) -> Any:
  """Returns the value of the first pattern that matches all of `path`.

  Raises:
    ValueError: naming `name`, the config field that holds the patterns, where
      no pattern matches or where one is no regular expression.
  """
  for pattern, value in patterns:
    try:
      matched = re.fullmatch(pattern, path)
    except re.error as error:
      raise RequestError(f'{name} has the pattern {pattern!r}, which is no '
                         f'regular expression: {error}') from error
    if matched:
      return value
  raise RequestError(
      f'{name} has no pattern for the parameter {path!r}: it has '
      f'{", ".join(repr(p) for p, _ in patterns) or "none"}; end it with '
      "('.*', VALUE) for all the others")


def match(patterns: Sequence[tuple[str, Any]], tree: Any, name: str):
  """Returns `tree` with each leaf replaced by its pattern's value.

  The values are scalars: a 0/1 mask, a learning-rate multiplier, a label.
  """
  return jax.tree_util.tree_map_with_path(
      lambda path, _: first_match(patterns, join(path), name), tree)
