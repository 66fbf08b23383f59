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


def join(key_path: Any) -> str:
  """Returns a jax key path as its '/'-joined string."""
  return jax.tree_util.keystr(key_path, simple=True, separator='/')


def flatten(tree: Any) -> dict[str, Any]:
  """Returns {path: leaf}, in the tree's own order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {join(path): leaf for path, leaf in leaves}


class Stacks:
  """Where the layers of each stack of a model stand, by its parameters' paths.

  Layer n of a stack is block n of its prefix, or behind it row n // period of
  block n % period of `layers`, or behind those a block of its suffix; see
  architectures/parts/skeletons.py.

  Attributes:
    counts: how many layers each stack has.
  """
  _PATH = re.compile(
      rf'(\w+)/({"|".join(SECTIONS)})/block_(\d+)/(.*)')

  def __init__(self, shapes: Mapping[str, Any]):
    blocks: dict[tuple[str, str], dict[int, int]] = {}  # rows of each block
    for path, x in shapes.items():
      if match := self._PATH.fullmatch(path):
        blocks.setdefault((match[1], match[2]), {})[int(match[3])] = x.shape[0]
    # By stack and layer: its section, its block there, and its row.
    self._layers: dict[str, list[tuple[str, int, int]]] = {}
    for stack in sorted({stack for stack, _ in blocks}):
      self._layers[stack] = [
          (section, block, row) for section in SECTIONS
          for row in range(max(blocks.get((stack, section), {0: 0}).values()))
          for block in range(len(blocks[stack, section]))]
    self.counts = {stack: len(layers)
                   for stack, layers in self._layers.items()}

  @classmethod
  def has(cls, path: str) -> bool:
    """Whether a parameter is one of layers."""
    return cls._PATH.fullmatch(path) is not None

  def split(self, path: str) -> tuple[str, str]:
    """Returns the stack of a layer's parameter, and its name in the layer."""
    stack, _, _, name = self._match(path)
    return stack, name

  def layers(self, path: str) -> list[int]:
    """Returns which layers the rows of a parameter are of."""
    stack, section, block, _ = self._match(path)
    return [n for n, layer in enumerate(self._layers[stack])
            if layer[:2] == (section, int(block))]

  def place(self, path: str, n: int) -> tuple[str, int]:
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
