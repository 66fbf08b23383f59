"""The fields of RetNet's retention (retnet.py): config.model.retnet."""

from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class RetNetConfig:
  """Sizes of a layer of model.mixer retnet; configs/model.py says what each is.
  """
  heads: int
  key_dim: int
  value_dim: int

  @property
  def key_heads(self) -> int:
    return self.heads

  @property
  def value_heads(self) -> int:
    return self.heads

  @property
  def conv(self) -> int:
    return 0


def derived(fields: Mapping[str, Any], heads: int, head_dim: int
            ) -> RetNetConfig:
  """Returns the group with what is left open filled in: the paper's values are
  twice as wide as the keys."""
  return RetNetConfig(
      heads=fields['heads'] or heads,
      key_dim=fields['key_dim'] or head_dim,
      value_dim=fields['value_dim'] or 2 * head_dim)
