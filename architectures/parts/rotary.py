"""Rotary positions (Su et al. 2021), and how they stretch past training.

Queries and keys are turned by pos * frequency, so that a score depends on the
distance alone. An entry of SCALINGS, at the end of this file, is all that there
is of one way to stretch.
"""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp

from architectures.parts.config import ModelConfig
from configs.errors import require, short
from configs.fields import field, FUNCTION


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Of position rope: rotary positions, and how they stretch past training."""
  theta: float = field(10000.0, 'the base of the frequencies', above=0,
                       resume=FUNCTION)
  fraction: float = field(1.0, 'the share of a head that is rotated', above=0,
                          most=1, resume=FUNCTION)
  interleaved: bool = field(
      False, 'pairs are neighbours, not half a head apart', resume=FUNCTION)
  scaling: str = field('none', 'how they stretch past original_len',
                       resume=FUNCTION)
  factor: float = field(1.0, 'how many times the original length', least=1,
                        resume=FUNCTION)
  original_len: int = field(
      0, 'where the scaling starts; derived: max_len', resume=FUNCTION)
  low_freq_factor: float = field(1.0, 'of llama3', above=0, resume=FUNCTION)
  high_freq_factor: float = field(4.0, 'of llama3', resume=FUNCTION)
  beta_fast: float = field(32.0, 'of yarn', resume=FUNCTION)
  beta_slow: float = field(1.0, 'of yarn', above=0, resume=FUNCTION)
  mscale: float = field(
      1.0, 'Of yarn, how much of its temperature is on turned features '
      '(DeepSeek-V2).', least=0, resume=FUNCTION)
  mscale_all_dim: float = field(
      0.0, 'Of yarn, how much of it is on all features of a head.', least=0,
      resume=FUNCTION)
  truncate: bool = field(
      True, 'of yarn: its ramp is between whole frequencies', resume=FUNCTION)
  short_factor: tuple = field(
      (), 'of longrope: what divides each frequency', resume=FUNCTION)
  long_factor: tuple = field(
      (), 'the same in rows of more than original_len', resume=FUNCTION)
  attention_factor: float = field(
      0.0, 'Of longrope, on turned features; derived: of factor, '
      'original_len.', least=0, resume=FUNCTION)

  def derived(self, c: ModelConfig) -> 'RopeConfig':
    return dataclasses.replace(
        self, original_len=self.original_len or c.max_len)


@dataclasses.dataclass(frozen=True)
class Scaling:
  """How rotary positions stretch past their training length.

  Attributes:
    frequencies: (config.rope, how many features are rotated) -> as
      `rope_frequencies`. With `by_length`, a third argument is how many tokens
      a row has room for.
    fields: of config.model that it reads.
    check: (config.rope, how many features are rotated) -> None; raises
      RequestError.
    score_factor: config.rope -> what multiplies the scores; None: nothing.
    by_length: whether longer rows turn otherwise than shorter ones.
    by_multiple: whether `factor` alone says how many times the original length
      it is for, so that any model can be tried with it.
  """
  frequencies: Callable
  fields: tuple[str, ...] = ()
  check: Callable[[RopeConfig, int], None] = lambda r, dim: None
  score_factor: Callable[[RopeConfig], float] | None = None
  by_length: bool = False
  by_multiple: bool = True


def rotary_dim(c: ModelConfig) -> int:
  """Returns how many of a head's features are rotated."""
  return int(c.head_dim * c.rope.fraction)


def rope_frequencies(config: ModelConfig, length: int = 0
                     ) -> tuple[jax.Array, float]:
  """Returns radians per position [K'/2], and the factor on cos and sin.

  linear: positions / factor (Chen et al. 2023). ntk: theta grows so that the
  slowest wave stretches by factor. llama3: waves longer than original_len /
  low_freq_factor are stretched, short ones kept, smooth between. yarn: the
  same by the number of turns, and a temperature (Peng et al. 2023). dynamic:
  ntk by the length of the row. longrope: each frequency is divided by a factor
  of its own, that was searched for (Ding et al. 2024).

  `length` decides on the last two: how many tokens a row has room for, which is
  those that it has or, with a cache, those that the cache can hold. So all
  tokens of a text turn alike, those before it was long too.
  """
  r, dim = config.rope, rotary_dim(config)
  row = SCALINGS[r.scaling]
  return row.frequencies(r, dim, *((length,) if row.by_length else ()))


def _unscaled(r: RopeConfig, dim: int, theta: float = 0.0):
  steps = jnp.arange(0, dim, 2, dtype=jnp.float32)
  return (theta or r.theta) ** (-steps / dim), 1.0


def _linear(r: RopeConfig, dim: int):
  return _unscaled(r, dim)[0] / r.factor, 1.0


def _ntk(r: RopeConfig, dim: int):
  return _unscaled(r, dim, ntk_theta(r, dim))


def ntk_theta(r: RopeConfig, dim: int) -> float:
  return r.theta * r.factor ** (dim / (dim - 2))


def _dynamic(r: RopeConfig, dim: int, length: int):
  stretch = r.factor * max(length / r.original_len, 1.0) - (r.factor - 1)
  return _unscaled(r, dim, r.theta * stretch ** (dim / (dim - 2)))


def _longrope(r: RopeConfig, dim: int, length: int):
  divided_by = r.long_factor if length > r.original_len else r.short_factor
  frequency, _ = _unscaled(r, dim)
  return (frequency / jnp.asarray(divided_by, jnp.float32),
          r.attention_factor or longrope_factor(r.factor, r.original_len))


def longrope_factor(factor: float, original_len: int) -> float:
  """On cos and sin, for texts that are so many times as long (Ding et al.
  2024, as Phi-3 has it)."""
  return (math.sqrt(1 + math.log(factor) / math.log(original_len))
          if factor > 1 else 1.0)


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
  """On cos and sin: its square multiplies the scores (YaRN, equation 15)."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
  """On cos and sin: what is left of the temperature where DeepSeek-V2's
  mscale_all_dim puts a part of it on whole scores."""
  return yarn_temperature(factor, mscale) / yarn_temperature(
      factor, mscale_all_dim)


def score_factor(c: ModelConfig) -> float:
  """Returns what multiplies the scores, of turned and other features alike."""
  factor = SCALINGS[c.rope.scaling].score_factor
  return factor(c.rope) if factor else 1.0


def _llama3(r: RopeConfig, dim: int):
  frequency, _ = _unscaled(r, dim)
  turns = r.original_len * frequency / (2 * math.pi)
  smooth = (turns - r.low_freq_factor) / (
      r.high_freq_factor - r.low_freq_factor)
  smooth = jnp.clip(smooth, 0, 1)
  return (1 - smooth) * frequency / r.factor + smooth * frequency, 1.0


def _yarn(r: RopeConfig, dim: int):
  frequency, _ = _unscaled(r, dim)
  def index(turns):  # of the frequency that makes `turns` in original_len
    return dim * math.log(r.original_len / (turns * 2 * math.pi)) / (
        2 * math.log(r.theta))
  low, high = index(r.beta_fast), index(r.beta_slow)
  if r.truncate:  # as the authors' program; gpt-oss does not
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  ramp = (jnp.arange(dim // 2) - low) / ((high - low) or 0.001)
  keep = 1 - jnp.clip(ramp, 0, 1)
  return ((1 - keep) * frequency / r.factor + keep * frequency,
          yarn_factor(r.factor, r.mscale, r.mscale_all_dim))


def _check_ntk(r: RopeConfig, dim: int) -> None:
  require(dim > 2, f'model.rope.scaling is {r.scaling}, but only {dim} '
          'features of a head are rotated: it needs 4 or more')


def _check_longrope(r: RopeConfig, dim: int) -> None:
  for name in ('short_factor', 'long_factor'):
    found = getattr(r, name)
    require(len(found) == dim // 2 and all(
        type(x) in (int, float) and x > 0 for x in found),
            f'model.rope.{name} is {short(found)}: longrope needs {dim // 2} '
            f'numbers > 0, one for each pair of the {dim} features that turn')
  require(r.original_len > 1, f'model.rope.original_len is {r.original_len}: '
          'longrope needs it above 1')


def _check_llama3(r: RopeConfig, dim: int) -> None:
  del dim
  require(r.high_freq_factor > r.low_freq_factor,
          f'model.rope.high_freq_factor is {r.high_freq_factor}: llama3 needs '
          f'it above model.rope.low_freq_factor {r.low_freq_factor}')


def _check_yarn(r: RopeConfig, dim: int) -> None:
  del dim
  require(r.beta_fast > r.beta_slow and r.theta > 1,
          f'model.rope.beta_fast is {r.beta_fast}: yarn needs it above '
          f'model.rope.beta_slow {r.beta_slow}, and model.rope.theta '
          f'{r.theta} above 1')


def rotate(x_BLHK: jax.Array, positions_BL: jax.Array, config: ModelConfig,
           length: int = 0) -> jax.Array:
  """Turns the first `rope.fraction` of each head by its position.

  Feature i is paired with i + K'/2, as in GPT-NeoX and Hugging Face; the
  paper pairs neighbours (`rope.interleaved`), which is the same up to a
  permutation of features. `length`: as of `rope_frequencies`.
  """
  dim = rotary_dim(config)
  frequency, factor = rope_frequencies(config, length)
  angle = (positions_BL[..., None].astype(jnp.float32)
           * frequency[None, None])[:, :, None]
  cos = (jnp.cos(angle) * factor).astype(x_BLHK.dtype)
  sin = (jnp.sin(angle) * factor).astype(x_BLHK.dtype)
  a, b, rest = jnp.split(x_BLHK, (dim // 2, dim), axis=-1)
  if config.rope.interleaved:
    a, b = x_BLHK[..., 0:dim:2], x_BLHK[..., 1:dim:2]
  turned = a * cos - b * sin, b * cos + a * sin
  if config.rope.interleaved:
    pairs = jnp.stack(turned, -1)
    turned = (pairs.reshape(*pairs.shape[:-2], dim),)
  return jnp.concatenate([*turned, rest], -1)


SCALINGS = {
    'none': Scaling(_unscaled),
    'linear': Scaling(_linear, ('rope.factor',)),
    'ntk': Scaling(_ntk, ('rope.factor',), _check_ntk),
    'dynamic': Scaling(
        _dynamic, ('rope.factor', 'rope.original_len'), _check_ntk,
        by_length=True, by_multiple=False),
    'longrope': Scaling(
        _longrope, ('rope.factor', 'rope.original_len', 'rope.short_factor',
                    'rope.long_factor', 'rope.attention_factor'),
        _check_longrope, by_length=True, by_multiple=False),
    'llama3': Scaling(_llama3, (
        'rope.factor', 'rope.original_len', 'rope.low_freq_factor',
        'rope.high_freq_factor'), _check_llama3),
    'yarn': Scaling(_yarn, (
        'rope.factor', 'rope.original_len', 'rope.beta_fast',
        'rope.beta_slow', 'rope.truncate', 'rope.mscale',
        'rope.mscale_all_dim'), _check_yarn,
        lambda r: yarn_temperature(r.factor, r.mscale_all_dim) ** 2),
}
