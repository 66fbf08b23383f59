"""The fields of Gated DeltaNet (deltanet.py): config.model.deltanet."""

from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig:
  """Sizes and settings of a layer of model.mixer deltanet; configs/model.py
  says what each is."""
  key_heads: int
  value_heads: int
  key_dim: int
  value_dim: int
  conv: int
  decay: bool
  negative: bool


def derived(fields: Mapping[str, Any], heads: int, head_dim: int
            ) -> DeltaNetConfig:
  """Returns the group with what is left open filled in: as attention has it."""
  return DeltaNetConfig(**{
      **fields,
      'key_heads': fields['key_heads'] or heads,
      'value_heads': fields['value_heads'] or fields['key_heads'] or heads,
      'key_dim': fields['key_dim'] or head_dim,
      'value_dim': fields['value_dim'] or head_dim})
