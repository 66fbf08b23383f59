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
  """Returns a jax key path as one string, with '/' between its keys."""
  return jax.tree_util.keystr(key_path, simple=True, separator='/')


def flatten_by_path(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree by their paths, such as
  'decoder/layers/block_0/ffn/up', in the tree's own order."""
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
    """Finds where each layer's parameters stand: those of several layers are
    stacked in one array.

    The layers of a model are in sections (a prefix, a repeated pattern and a
    suffix). A section has a block for each layer of its pattern, and an array
    of a block has a row for each repetition.

    Args:
      shapes: the parameters of a model, or their shapes, by path.
    """
    # The number of rows of each block, by stack and section.
    num_rows: dict[tuple[str, str], dict[int, int]] = {}
    for path, x in shapes.items():
      if match := self._PATH.fullmatch(path):
        stack, section, block, _ = match.groups()
        num_rows.setdefault((stack, section), {})[int(block)] = x.shape[0]
    # The section, block and row of each layer, by stack ('encoder', 'decoder').
    # The layers of a section go through all blocks in each repetition.
    self._layers: dict[str, list[tuple[str, int, int]]] = {}
    for stack in sorted({stack for stack, _ in num_rows}):
      self._layers[stack] = []
      for section in SECTIONS:
        rows_of_blocks = num_rows.get((stack, section), {})
        for row in range(max(rows_of_blocks.values(), default=0)):
          for block in range(len(rows_of_blocks)):
            self._layers[stack].append((section, block, row))
    self.counts = {stack: len(layers)
                   for stack, layers in self._layers.items()}

  @classmethod
  def is_in_stack(cls, path: str) -> bool:
    """Returns whether a path is that of a parameter of a stack's layers."""
    return cls._PATH.fullmatch(path) is not None

  def split(self, path: str) -> tuple[str, str]:
    """Returns the stack of a layer's parameter, and its name in the layer."""
    stack, _, _, name = self._match(path)
    return stack, name

  def layer_numbers(self, path: str) -> list[int]:
    """Returns for each row of a parameter the number of its layer in the
    stack."""
    stack, section, block, _ = self._match(path)
    numbers = []
    for number, layer in enumerate(self._layers[stack]):
      section_of_layer, block_of_layer, _ = layer
      if (section_of_layer, block_of_layer) == (section, int(block)):
        numbers.append(number)
    return numbers

  def path_and_row(self, path: str, number: int) -> tuple[str, int]:
    """Returns where the same parameter of another layer of the stack stands:
    its path, and its row in that array.

    Args:
      path: the path of the parameter in some layer.
      number: the number of the other layer in the stack.
    """
    stack, name = self.split(path)
    section, block, row = self._layers[stack][number]
    return f'{stack}/{section}/block_{block}/{name}', row

  def _match(self, path: str) -> tuple[str, ...]:
    """Returns the stack, the section, the block, and the name in the layer of
    the parameter at a path."""
    match = self._PATH.fullmatch(path)
    assert match is not None, path
    return match.groups()


def first_match(patterns: Sequence[tuple[str, Any]], path: str,
                name: str) -> Any:
  """Returns the value of the first pattern that matches the whole path of a
  parameter. The order of the patterns matters.

  Args:
    patterns: pairs of a regular expression and a value.
    path: the path.
    name: the field of the config that has the patterns, for messages.

  Raises:
    RequestError: if no pattern matches, or one is no regular expression.
  """
  for pattern, value in patterns:
    try:
      is_match = re.fullmatch(pattern, path) is not None
    except re.error as error:
      raise RequestError(f'{name} has the pattern {pattern!r}, which is no '
                         f'regular expression: {error}') from error
    if is_match:
      return value
  listed = ', '.join(repr(pattern) for pattern, _ in patterns)
  raise RequestError(
      f'{name} has no pattern for the parameter {path!r}: it has '
      f'{listed or "none"}; end it with '
      "('.*', VALUE) for all the others")


def map_by_pattern(patterns: Sequence[tuple[str, Any]], tree: Any, name: str
                   ) -> Any:
  """Chooses a value for each parameter of a model, such as a multiplier of the
  learning rate, by regular expressions for the parameter's path.

  Args:
    patterns: pairs of a regular expression and a value. The first one that
      matches the whole path counts.
    tree: the parameters, as nested dicts.
    name: the field of the config that has the patterns, for messages.

  Returns:
    A tree of the same structure with the values as its leaves.

  Raises:
    RequestError: if no pattern matches a path.
  """
  def value_of_path(path: Any, _: Any) -> Any:
    """Returns the value for one parameter."""
    return first_match(patterns, path_to_string(path), name)

  return jax.tree_util.tree_map_with_path(value_of_path, tree)
