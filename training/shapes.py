"""A step, compiled ahead of time once for each shape of its batches."""

from collections.abc import Callable
from typing import Any

import jax


class PerShape:
  """A jitted function of (state or parameters, batch).

  Labelled data come in batches of several lengths (data.length_buckets); those
  of text have one.
  """

  def __init__(self, function: jax.stages.Wrapped, around: Callable):
    """Args:
      function: the jitted function.
      around: batch -> a context manager around each compilation but those that
        `compile` is asked for.
    """
    self._function, self._around = function, around
    self._compiled: dict[tuple, Callable] = {}

  def compile(self, state: Any, batch: Any) -> None:
    """Compiles for the shape of a batch."""
    self._compiled[_shape(batch)] = self._function.lower(
        state, batch).compile()

  def __call__(self, state: Any, batch: Any) -> Any:
    if _shape(batch) not in self._compiled:
      with self._around(batch):
        self.compile(state, batch)
    return self._compiled[_shape(batch)](state, batch)


def _shape(batch: Any) -> tuple:
  return tuple(x.shape for x in jax.tree.leaves(batch))
