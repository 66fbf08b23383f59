"""Patterns over parameter paths: the first that matches gives the value.

A path is the parameter's place in the tree, '/'-joined, such as
decoder/layers/block_0/attention/query. A pattern is a regular expression that
must match the whole of it. Weight decay, freezing and learning rates by group
are all such lists; a path that no pattern covers is an error, so a new
parameter is never treated by accident.
"""

from collections.abc import Mapping, Sequence
import re
from typing import Any

import jax

from common.errors import RequestError
from common.kinds import SECTIONS


def path_to_string(key_path: Any) -> str:
  """Returns a jax key path as its '/'-joined string."""
  return jax.tree_util.keystr(key_path, simple=True, separator='/')


def flatten_by_path(tree: Any) -> dict[str, Any]:
  """Returns {path: leaf}, in the tree's own order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path_to_string(path): leaf for path, leaf in leaves}


class Stacks:
  """Where the layers of each stack of a model stand, by its parameters' paths.

  Layer n of a stack is block n of its prefix, or behind it row n // period of
  block n % period of `layers`, or behind those a block of its suffix; see
  architectures/parts/stack.py.

  Attributes:
    counts: how many layers each stack has.
  """
  _PATH = re.compile(
      rf'(\w+)/({"|".join(SECTIONS)})/block_(\d+)/(.*)')

  def __init__(self, shapes: Mapping[str, Any]):
    # The rows of each block, by stack and section.
    rows: dict[tuple[str, str], dict[int, int]] = {}
    for path, x in shapes.items():
      if match := self._PATH.fullmatch(path):
        stack, section, block, _ = match.groups()
        rows.setdefault((stack, section), {})[int(block)] = x.shape[0]
    # The section, block and row of each layer, by stack. The blocks of a
    # section take turns.
    self._layers: dict[str, list[tuple[str, int, int]]] = {}
    for stack in sorted({stack for stack, _ in rows}):
      self._layers[stack] = []
      for section in SECTIONS:
        blocks = rows.get((stack, section), {})
        for row in range(max(blocks.values(), default=0)):
          for block in range(len(blocks)):
            self._layers[stack].append((section, block, row))
    self.counts = {stack: len(layers)
                   for stack, layers in self._layers.items()}

  @classmethod
  def is_in_stack(cls, path: str) -> bool:
    """Whether a parameter is one of a stack's layers."""
    return cls._PATH.fullmatch(path) is not None

  def split(self, path: str) -> tuple[str, str]:
    """Returns the stack of a layer's parameter, and its name in the layer."""
    stack, _, _, name = self._match(path)
    return stack, name

  def layer_numbers(self, path: str) -> list[int]:
    """Returns the number of the layer that each row of a parameter is of."""
    stack, section, block, _ = self._match(path)
    numbers = []
    for n, (of_section, of_block, _) in enumerate(self._layers[stack]):
      if (of_section, of_block) == (section, int(block)):
        numbers.append(n)
    return numbers

  def path_and_row(self, path: str, n: int) -> tuple[str, int]:
    """Returns the path and the row of the same parameter of layer n."""
    stack, name = self.split(path)
    section, block, row = self._layers[stack][n]
    return f'{stack}/{section}/block_{block}/{name}', row

  def _match(self, path: str) -> tuple[str, ...]:
    match = self._PATH.fullmatch(path)
    assert match is not None, path
    return match.groups()


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
  written = ', '.join(repr(pattern) for pattern, _ in patterns)
  raise RequestError(
      f'{name} has no pattern for the parameter {path!r}: it has '
      f'{written or "none"}; end it with '
      "('.*', VALUE) for all the others")


def map_by_pattern(
  patterns: Sequence[tuple[str, Any]], tree: Any, name: str) -> Any:
  """Returns `tree` with each leaf replaced by its pattern's value.

  The values are scalars: a 0/1 mask, a learning-rate multiplier, a label.
  """
  def value(path: Any, _: Any) -> Any:
    return first_match(patterns, path_to_string(path), name)

  return jax.tree_util.tree_map_with_path(value, tree)
