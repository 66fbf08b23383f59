"""The fields of rotary positions (rotary.py): config.model.rope."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary positions (Su et al. 2021) and how they stretch past training."""
  theta: float
  fraction: float
  interleaved: bool
  scaling: str
  factor: float
  original_len: int
  low_freq_factor: float
  high_freq_factor: float
  beta_fast: float
  beta_slow: float
  mscale: float
  mscale_all_dim: float
  truncate: bool
  short_factor: tuple
  long_factor: tuple
  attention_factor: float
