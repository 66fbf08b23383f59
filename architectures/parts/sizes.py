"""The sizes that a part may ask of the model that has it, where the part stands
below the model (config.py)."""

from typing import Protocol


class Sizes(Protocol):
  """The fields of a ModelConfig of which parts derive sizes of their own, in
  `derived`: these alone."""

  @property
  def d_model(self) -> int: ...

  @property
  def num_layers(self) -> int: ...

  @property
  def num_heads(self) -> int: ...

  @property
  def head_dim(self) -> int: ...

  @property
  def d_ff(self) -> int: ...

  @property
  def vocab_size(self) -> int: ...

  @property
  def max_len(self) -> int: ...

  @property
  def norm_eps(self) -> float: ...

  @property
  def prefix(self) -> str: ...

  @property
  def suffix(self) -> str: ...

  @property
  def init(self) -> str: ...
