"""Where a parameter holds matrices: for optimisers that care about shape.

Muon and Adafactor treat a parameter as matrices from inputs to outputs. Ours
carry more axes: [layers, D, H, K] is one matrix D x (H*K) a layer, and
[layers, experts, D, F] one D x F an expert of a layer.
"""

import math
from typing import NamedTuple

from training import paths


class Axes(NamedTuple):
  """A parameter's axes by role; not a matrix where `outputs` is empty."""
  batch: tuple[int, ...]  # each index holds a matrix (or vector) of its own
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  @property
  def matrix(self) -> bool:
    return bool(self.outputs)

  def sizes(self, shape) -> tuple[int, int]:
    """Returns the rows and the columns of one matrix."""
    return (math.prod(shape[i] for i in self.inputs),
            math.prod(shape[i] for i in self.outputs))


# How many of a parameter's axes are inputs and outputs, counted from its end;
# those before them are the batch. No outputs: a vector or a table of biases.
_RANKS = (
    ('.*/(query|key|value)_bias', (2, 0)),  # H, K
    ('.*relative_bias/table', (2, 0)),  # buckets, H
    ('.*(bias|scale|sink)', (1, 0)),
    ('.*attention/(query|key|value)', (1, 2)),  # D -> H, K
    ('.*attention/out', (2, 1)),  # H, K -> D
    ('.*', (1, 1)),
)


def axes(path: str, ndim: int) -> Axes:
  """Returns the roles of the axes of the parameter at `path`."""
  inputs, outputs = paths.first_match(_RANKS, path, 'matrices._RANKS')
  if ndim < inputs + outputs:  # a vector, whatever its name
    inputs, outputs = ndim, 0
  split = ndim - outputs
  return Axes(tuple(range(split - inputs)),
              tuple(range(split - inputs, split)), tuple(range(split, ndim)))
