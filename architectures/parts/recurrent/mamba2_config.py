"""The fields of Mamba-2 (mamba2.py): config.model.mamba2."""

from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
  """Sizes and settings of a layer of model.mixer mamba2; configs/model.py says
  what each is."""
  heads: int
  head_dim: int
  groups: int
  state: int
  conv: int
  conv_bias: bool
  norm_over: str
  least_step: float
  most_step: float

  @property
  def key_heads(self) -> int:
    """B and C of a group serve its heads, as keys and queries serve values."""
    return self.groups

  @property
  def value_heads(self) -> int:
    return self.heads

  @property
  def key_dim(self) -> int:
    return self.state

  @property
  def value_dim(self) -> int:
    return self.head_dim


def derived(fields: Mapping[str, Any], heads: int, head_dim: int
            ) -> Mamba2Config:
  """Returns the group with what is left open filled in: heads of attention's
  size, and twice as many ("expand" is 2 in the published models)."""
  return Mamba2Config(**{
      **fields,
      'heads': fields['heads'] or 2 * heads,
      'head_dim': fields['head_dim'] or head_dim})
