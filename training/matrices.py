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


# How many of a parameter's own axes (after layers and experts) are inputs;
# 0: it is no matrix, but a vector or a table of biases.
_INPUT_AXES = (
    ('.*(bias|scale|sink).*', 0),
    ('.*attention/out', 2),  # H, K -> D
    ('.*', 1),
)


def axes(path: str, ndim: int) -> Axes:
  """Returns the roles of the axes of the parameter at `path`."""
  parts = path.split('/')
  batch = ('layers' in parts) + ('experts' in parts)
  inputs = paths.first_match(_INPUT_AXES, path, 'matrices._INPUT_AXES')
  if ndim - batch < 2 or not inputs:
    inputs = ndim - batch
  return Axes(tuple(range(batch)), tuple(range(batch, batch + inputs)),
              tuple(range(batch + inputs, ndim)))
