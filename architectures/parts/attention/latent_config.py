"""The fields of latent attention (latent.py): config.model.latent."""

from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class LatentConfig:
  """Sizes of a layer of model.mixer latent; configs/model.py says what each is.
  """
  q_rank: int
  kv_rank: int
  nope_dim: int
  rope_dim: int
  v_dim: int
  scale: float
  norm_eps: float

  @property
  def key_dim(self) -> int:
    """The size of a head's queries and keys."""
    return self.nope_dim + self.rope_dim

  @property
  def slot_dim(self) -> int:
    """What a cache holds of a token: the latent and the turned key."""
    return self.kv_rank + self.rope_dim


def derived(fields: Mapping[str, Any], head_dim: int, norm_eps: float
            ) -> LatentConfig:
  """Returns the group with what is left open filled in: in DeepSeek-V2 the
  latent has the size of 4 heads and the turned part that of half a head
  (section 3.1.2); here it is even, too. `norm_eps` is that of the model."""
  nope_dim = fields['nope_dim'] or head_dim
  rope_dim = fields['rope_dim'] or 2 * -(-head_dim // 4)
  return LatentConfig(
      q_rank=fields['q_rank'], kv_rank=fields['kv_rank'] or 4 * head_dim,
      nope_dim=nope_dim, rope_dim=rope_dim, v_dim=fields['v_dim'] or head_dim,
      scale=fields['scale'] or (nope_dim + rope_dim) ** -0.5,
      norm_eps=fields['norm_eps'] or norm_eps)
