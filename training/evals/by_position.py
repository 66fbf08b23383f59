"""Losses by position, and the text that they are means over."""

import math
from typing import Any, NamedTuple

import numpy as np


class Text(NamedTuple):
  """What a length is measured on, by position, [L].

  Attributes:
    tokens: how many tokens are predicted there.
    weights: what they count in all.
  """
  tokens: np.ndarray
  weights: np.ndarray


def loss_at(curve: Any, text: Text, where: slice) -> float:
  """Returns the loss of the tokens at some positions; nan: there are none."""
  there = text.tokens[where] > 0
  if not there.any():
    return math.nan
  return float(np.average(curve[where][there],
                          weights=text.weights[where][there]))
