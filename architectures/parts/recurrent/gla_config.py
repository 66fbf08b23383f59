"""The fields of gated linear attention (gla.py): config.model.gla."""

from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class GLAConfig:
  """Sizes and settings of a layer of model.mixer gla; configs/model.py says
  what each is."""
  heads: int
  key_dim: int
  value_dim: int
  conv: int
  rank: int
  temperature: float

  @property
  def key_heads(self) -> int:
    return self.heads

  @property
  def value_heads(self) -> int:
    return self.heads


def derived(fields: Mapping[str, Any], heads: int, head_dim: int) -> GLAConfig:
  """Returns the group with what is left open filled in: the paper's keys are
  half as wide as the values."""
  return GLAConfig(**{
      **fields,
      'heads': fields['heads'] or heads,
      'key_dim': fields['key_dim'] or -(-head_dim // 2),
      'value_dim': fields['value_dim'] or head_dim})
