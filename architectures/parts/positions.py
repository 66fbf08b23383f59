"""How a model knows where a token stands.

learned     x + P[pos] (GPT, BERT); ends at max_len, or is stretched
sinusoidal  x + PE[pos] (Vaswani et al. 2017, section 3.5)
rope        q and k turned by pos * frequency (Su et al. 2021)
alibi       scores - slope_h * distance (Press et al. 2022)
relative    scores + b[h, bucket(distance)] (Raffel et al. 2020, section 2.1)
none        nothing
"""

import math

import jax
import jax.numpy as jnp

from architectures.parts.config import ModelConfig, RopeConfig, rotary_dim


def sinusoid(positions: jax.Array, d_model: int,
             layout: str = 'interleaved') -> jax.Array:
  """[...] -> [..., D]: sin(pos w_i) and cos(pos w_i), w_i = 10000^(-2i/D).

  interleaved: sin at 2i, cos at 2i + 1 (Vaswani et al. 2017, section 3.5).
  halves: all sines, then all cosines, as in Marian: a permutation of it.
  fairseq: halves with w_i = 10000^(-i/(D/2 - 1)), as in tensor2tensor, the
  paper's own code, and the first token at position 2, as in fairseq.
  """
  pairs = d_model // 2
  steps = jnp.arange(pairs) / (pairs - 1 if layout == 'fairseq' else pairs)
  positions = positions + (2 if layout == 'fairseq' else 0)
  angle = positions[..., None].astype(jnp.float32) * (
      10000.0 ** -steps).reshape((1,) * positions.ndim + (-1,))
  if layout != 'interleaved':
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
  pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1)
  return pairs.reshape(*positions.shape, d_model)


def learned(table_LD: jax.Array, positions: jax.Array,
            stretch: float) -> jax.Array:
  """Rows of the table at `positions`; between two rows where stretched."""
  if stretch == 1:
    return table_LD[positions]
  place = jnp.minimum(positions / stretch, table_LD.shape[0] - 1)
  low = jnp.floor(place).astype(jnp.int32)
  high = jnp.minimum(low + 1, table_LD.shape[0] - 1)
  part = (place - low)[..., None].astype(table_LD.dtype)
  return table_LD[low] * (1 - part) + table_LD[high] * part


def rope_frequencies(config: ModelConfig) -> tuple[jax.Array, float]:
  """Returns radians per position [K'/2], and the factor on cos and sin.

  linear: positions / factor (Chen et al. 2023). ntk: theta grows so that the
  slowest wave stretches by factor. llama3: waves longer than original_len /
  low_freq_factor are stretched, short ones kept, smooth between. yarn: the
  same by the number of turns, and a temperature (Peng et al. 2023).
  """
  r, dim = config.rope, rotary_dim(config)
  theta = ntk_theta(r, dim) if r.scaling == 'ntk' else r.theta
  frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  if r.scaling == 'linear':
    return frequency / r.factor, 1.0
  if r.scaling == 'llama3':
    return _llama3(frequency, r), 1.0
  if r.scaling == 'yarn':
    return _yarn(frequency, r, dim), yarn_temperature(r.factor)
  return frequency, 1.0


def ntk_theta(r: RopeConfig, dim: int) -> float:
  return r.theta * r.factor ** (dim / (dim - 2))


def yarn_temperature(factor: float) -> float:
  """On cos and sin: its square multiplies the scores (YaRN, equation 15)."""
  return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(frequency, r: RopeConfig):
  turns = r.original_len * frequency / (2 * math.pi)
  smooth = (turns - r.low_freq_factor) / (
      r.high_freq_factor - r.low_freq_factor)
  smooth = jnp.clip(smooth, 0, 1)
  return (1 - smooth) * frequency / r.factor + smooth * frequency


def _yarn(frequency, r: RopeConfig, dim: int):
  def index(turns):  # of the frequency that makes `turns` in original_len
    return dim * math.log(r.original_len / (turns * 2 * math.pi)) / (
        2 * math.log(r.theta))
  low = max(math.floor(index(r.beta_fast)), 0)
  high = min(math.ceil(index(r.beta_slow)), dim - 1)
  ramp = (jnp.arange(dim // 2) - low) / max(high - low, 0.001)
  keep = 1 - jnp.clip(ramp, 0, 1)
  return (1 - keep) * frequency / r.factor + keep * frequency


def rotate(x_BLHK: jax.Array, positions_BL: jax.Array,
           config: ModelConfig) -> jax.Array:
  """Turns the first `rope.fraction` of each head by its position.

  Feature i is paired with i + K'/2, as in GPT-NeoX and Hugging Face; the
  paper pairs neighbours, which is the same up to a permutation of features.
  """
  dim = rotary_dim(config)
  frequency, factor = rope_frequencies(config)
  angle = (positions_BL[..., None].astype(jnp.float32)
           * frequency[None, None])[:, :, None]
  cos = (jnp.cos(angle) * factor).astype(x_BLHK.dtype)
  sin = (jnp.sin(angle) * factor).astype(x_BLHK.dtype)
  a, b, rest = jnp.split(x_BLHK, (dim // 2, dim), axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def alibi_slopes(num_heads: int) -> list[float]:
  """Slope per head: 2^(-8h/H); for H no power of 2, as the paper's code."""
  def powers(n):
    return [2 ** (-8 * (h + 1) / n) for h in range(n)]
  floor = 2 ** math.floor(math.log2(num_heads))
  more = powers(2 * floor)[0::2][:num_heads - floor]
  return powers(floor) + more


def alibi(q_positions_BL: jax.Array, k_positions_BM: jax.Array,
          num_heads: int) -> jax.Array:
  """Bias [B, H, L, M] = -slope_h * |i - j|."""
  distance_BLM = jnp.abs(q_positions_BL[:, :, None] - k_positions_BM[:, None])
  slopes = jnp.array(alibi_slopes(num_heads), jnp.float32)
  return -slopes[None, :, None, None] * distance_BLM[:, None]


def relative_bucket(offset: jax.Array, *, bidirectional: bool, buckets: int,
                    max_distance: int) -> jax.Array:
  """T5's bucket of key position minus query position.

  Half of the buckets are exact, the rest widen logarithmically up to
  max_distance; with `bidirectional`, half of all serve keys that come later.
  """
  start = jnp.zeros_like(offset)
  if bidirectional:
    buckets //= 2
    start = jnp.where(offset > 0, buckets, 0)
    distance = jnp.abs(offset)
  else:
    distance = jnp.maximum(-offset, 0)
  exact = buckets // 2
  far = exact + (
      jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
      / math.log(max_distance / exact) * (buckets - exact)).astype(jnp.int32)
  far = jnp.minimum(far, buckets - 1)
  return start + jnp.where(distance < exact, distance, far)
