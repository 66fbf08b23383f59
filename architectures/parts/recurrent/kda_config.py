"""The fields of Kimi Delta Attention (kda.py): config.model.kda."""

from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class KDAConfig:
  """Sizes and settings of a layer of model.mixer kda; configs/model.py says
  what each is."""
  key_heads: int
  value_heads: int
  key_dim: int
  value_dim: int
  conv: int
  rank: int
  negative: bool


def derived(fields: Mapping[str, Any], heads: int, head_dim: int) -> KDAConfig:
  """Returns the group with what is left open filled in: as attention has it,
  and products of low rank as wide as a head's value."""
  value_dim = fields['value_dim'] or head_dim
  return KDAConfig(**{
      **fields,
      'key_heads': fields['key_heads'] or heads,
      'value_heads': fields['value_heads'] or fields['key_heads'] or heads,
      'key_dim': fields['key_dim'] or head_dim,
      'value_dim': value_dim,
      'rank': fields['rank'] or value_dim})
