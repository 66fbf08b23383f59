"""How a model knows where a token stands.

learned     x + P[pos] (GPT, BERT; P[pos + offset]: RoBERTa); ends at max_len,
            or is stretched
sinusoidal  x + PE[pos] (Vaswani et al. 2017, section 3.5)
rope        q and k turned by pos * frequency (Su et al. 2021), see SCALINGS
alibi       scores - slope_h * distance (Press et al. 2022)
relative    scores + b[h, bucket(distance)] (Raffel et al. 2020, section 2.1)
relative_by_layer  the same, with b a table of each layer's own (UMT5)
disentangled  scores + products of queries and keys with vectors of distances
            (He et al. 2021): attention/disentangled.py
path        keys that the tokens between them and the query reflect (Yang et al.
            2025): attention/path.py
none        nothing

An entry of POSITIONS, at the end of this file, is all that there is of one.
Rotary positions come first, then the others in the order above.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import layers
from architectures.parts import sharding
from architectures.parts.attention import disentangled
from architectures.parts.attention.fields import AttentionConfig, PathConfig
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.sharding import Role, declare
from common.errors import RequestError, require, shorten
from common.fields import field, FUNCTION, SHAPES

# Rotary positions, and how they stretch past training.
#
# Queries and keys are turned by pos * frequency, so that a score depends on the
# distance alone. An entry of SCALINGS is all that there is of one way to
# stretch.


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """The fields of position rope: rotary positions, and how they stretch past
  training."""
  theta: float = field(10000.0, 'the base of the frequencies', above=0,
                       most=1e12, resume=FUNCTION)
  fraction: float = field(1.0, 'the share of a head that is rotated', above=0,
                          most=1, resume=FUNCTION)
  proportional: bool = field(
      False, 'Frequencies and pairs are those of a whole head, of which the '
      'first share turns (Gemma 4).', resume=FUNCTION)
  interleaved: bool = field(
      False, 'Pairs are neighbours, not half a head apart.', resume=FUNCTION)
  scaling: str = field('none', 'how they stretch past original_len',
                       resume=FUNCTION)
  factor: float = field(1.0, 'how many times the original length', least=1,
                        resume=FUNCTION)
  original_len: int = field(
      0, 'the length where the scaling starts; derived: max_len',
      resume=FUNCTION)
  low_freq_factor: float = field(
      1.0, 'for llama3: waves that turn less often than this in original_len '
      'are stretched', above=0, resume=FUNCTION)
  high_freq_factor: float = field(
      4.0, 'for llama3: waves that turn more often than this are kept',
      resume=FUNCTION)
  beta_fast: float = field(
      32.0, 'for yarn: waves that turn more often than this in original_len '
      'are kept', resume=FUNCTION)
  beta_slow: float = field(
      1.0, 'for yarn: waves that turn less often than this are stretched',
      above=0, resume=FUNCTION)
  mscale: float = field(
      1.0, 'for yarn: how much of its temperature is on turned features '
      '(DeepSeek-V2)', least=0, resume=FUNCTION)
  mscale_all_dim: float = field(
      0.0, 'for yarn: how much of it is on all features of a head', least=0,
      resume=FUNCTION)
  truncate: bool = field(
      True, 'for yarn: whether its ramp is between whole frequencies',
      resume=FUNCTION)
  short_factor: tuple = field(
      (), 'for longrope: the divisor of each frequency', resume=FUNCTION)
  long_factor: tuple = field(
      (), 'for longrope: the same in rows of more than original_len',
      resume=FUNCTION)
  attention_factor: float = field(
      0.0, 'for longrope: a factor on turned features; derived: of factor and '
      'original_len', least=0, resume=FUNCTION)

  def derived(self, config: ModelConfig) -> 'RopeConfig':
    """Returns the fields with what follows from those of the model."""
    return dataclasses.replace(
        self, original_len=self.original_len or config.max_len)


def rotary_dim(config: ModelConfig) -> int:
  """Returns how many of a head's features are in pairs that may be rotated."""
  rope = config.part(RopeConfig)
  if rope.proportional:
    return config.head_dim
  return int(config.head_dim * rope.fraction)


def rope_frequencies(config: ModelConfig, length: int | jax.Array = 0
                     ) -> tuple[jax.Array, float]:
  """Returns the frequencies of rotary positions (RoPE): how far each pair of a
  head's features turns at each position. Scalings to longer texts change them.

  Args:
    config: the model, or the config of one kind of layer.
    length: how many tokens a row has so far, on which some scalings depend: a
      number for all rows, or an array [B] with the number of each row.

  Returns:
    The frequencies in radians per position, [pairs], or [B, pairs] for an array
    of lengths. Pairs that do not turn have 0: with rope.proportional, those
    past the share rope.fraction of the head's features. And the factor that the
    scaling has on cos and sin, mostly 1.0.
  """
  rope, dim = config.part(RopeConfig), rotary_dim(config)
  scaling = SCALINGS[rope.scaling]
  num_pairs = num_rotated = dim // 2
  if rope.proportional:
    num_rotated = int(rope.fraction * dim // 2)

  def frequencies_of_length(length: int | jax.Array
                            ) -> tuple[jax.Array, float]:
    """Returns the radians of rows of one length, and the factor."""
    frequencies, factor = scaling.frequencies(rope, dim, length)
    is_rotated = jnp.arange(num_pairs) < num_rotated
    return jnp.where(is_rotated, frequencies, 0), factor

  # One set of frequencies for all rows.
  if not scaling.depends_on_length or isinstance(length, int):
    return frequencies_of_length(length)

  def frequencies_of_row(length: jax.Array) -> jax.Array:
    """Returns the radians of one row."""
    frequencies, _ = frequencies_of_length(length)
    return frequencies

  # One for each row. The factor does not depend on the length, so any will do.
  _, factor = frequencies_of_length(0)
  return jax.vmap(frequencies_of_row)(length), factor


class Scaling:
  """A way to stretch rotary positions past the length of training; this one,
  the base of all, does not stretch them.

  Attributes:
    fields: the fields of config.model that it reads.
    depends_on_length: whether longer rows are rotated otherwise than shorter
      ones.
    needs_factor_only: whether `factor` alone says how many times the original
      length it is for, so that any model can be tried with it.
  """
  fields: tuple[str, ...] = ()
  depends_on_length = False
  needs_factor_only = True

  def frequencies(self, rope: RopeConfig, dim: int, length: int | jax.Array
                  ) -> tuple[jax.Array, float]:
    """Returns radians per position, [dim / 2], and the factor on cos and sin.

    Args:
      rope: the fields.
      dim: how many features of a head are in pairs that may be rotated.
      length: how many tokens a row has: an int, or a scalar on the device.
    """
    return base_frequencies(rope.theta, dim), 1.0

  def reason_against(self, rope: RopeConfig, dim: int) -> str:
    """Returns why a model cannot have it, in words; '': it can.

    Args:
      rope: the fields.
      dim: how many features of a head are in pairs that may be rotated.
    """
    return ''

  def score_factor(self, rope: RopeConfig) -> float:
    """Returns the factor on the scores of rotated queries and keys."""
    return 1.0


def base_frequencies(theta: float | jax.Array, dim: int) -> jax.Array:
  """Returns the frequencies of rotary positions before any stretch: theta^(-2i
  / dim) of pair i, [dim / 2] (Su et al. 2021)."""
  steps = jnp.arange(0, dim, 2, dtype=jnp.float32)
  return theta ** (-steps / dim)


class Linear(Scaling):
  """Positions are divided by factor (Chen et al. 2023)."""
  fields = ('rope.factor',)

  def frequencies(self, rope: RopeConfig, dim: int, length: int | jax.Array
                  ) -> tuple[jax.Array, float]:
    return base_frequencies(rope.theta, dim) / rope.factor, 1.0


class Ntk(Scaling):
  """theta grows so that the slowest wave stretches by factor: theta' = theta
  factor^(dim / (dim - 2))."""
  fields = ('rope.factor',)

  def frequencies(self, rope: RopeConfig, dim: int, length: int | jax.Array
                  ) -> tuple[jax.Array, float]:
    return base_frequencies(ntk_theta(rope, dim), dim), 1.0

  def reason_against(self, rope: RopeConfig, dim: int) -> str:
    if dim > 2:
      return ''
    return f'only {dim} features of a head are rotated: it needs 4 or more'


def ntk_theta(rope: RopeConfig, dim: int) -> float:
  """Returns theta' = theta factor^(dim / (dim - 2)), the base of the
  frequencies with scaling ntk."""
  return rope.theta * rope.factor ** (dim / (dim - 2))


class Dynamic(Ntk):
  """The stretch of ntk, by the length of the row: factor length / original_len
  - (factor - 1) in place of factor, of lengths past original_len."""
  fields = ('rope.factor', 'rope.original_len')
  depends_on_length = True
  needs_factor_only = False

  def frequencies(self, rope: RopeConfig, dim: int, length: int | jax.Array
                  ) -> tuple[jax.Array, float]:
    """Returns the frequencies theta'^(-2i / dim), where the base theta' grows
    with the length of the row (dynamic NTK scaling):

      theta' = theta s^(dim / (dim - 2)),
      s = factor max(length / original_len, 1) - (factor - 1)

    Args:
      rope: the config of the rotary positions.
      dim: the number of features that are rotated.
      length: the length of the row, which may be traced.

    Returns:
      The frequencies [dim / 2], and the factor of attention's scores, 1.
    """
    # How many times as long as the original the row is, at least once.
    multiple = length / rope.original_len
    if isinstance(length, int):
      multiple = max(multiple, 1.0)
    else:
      multiple = jnp.maximum(multiple, 1.0)
    stretch = rope.factor * multiple - (rope.factor - 1)
    theta = rope.theta * stretch ** (dim / (dim - 2))
    return base_frequencies(theta, dim), 1.0


class LongRope(Scaling):
  """Each frequency is divided by a factor of its own, that was searched for
  (Ding et al. 2024); rows of more than original_len have factors of their own.
  """
  fields = ('rope.factor', 'rope.original_len', 'rope.short_factor',
            'rope.long_factor', 'rope.attention_factor')
  depends_on_length = True
  needs_factor_only = False

  def frequencies(self, rope: RopeConfig, dim: int, length: int | jax.Array
                  ) -> tuple[jax.Array, float]:
    """Returns the frequencies of rotary positions as LongRoPE scales them (Ding
    et al. 2024, arXiv 2402.13753). Each frequency is divided by a factor of its
    own. There is a list of factors for short sequences, and one for long ones.

    Args:
      rope: the fields of the rotary positions in the config.
      dim: how many features of a head are rotated, two for each frequency.
      length: the length of the sequence, which chooses the list.

    Returns:
      The frequencies in radians per position, [dim / 2]; and a factor by which
      cosines and sines are multiplied.
    """
    # A length that is known when the program is traced needs no operation.
    where = np.where if isinstance(length, int) else jnp.where
    divisors = where(length > rope.original_len, np.array(rope.long_factor),
                     np.array(rope.short_factor))
    frequencies = base_frequencies(rope.theta, dim)
    frequencies = frequencies / jnp.asarray(divisors, jnp.float32)
    factor = rope.attention_factor
    if not factor:
      factor = longrope_factor(rope.factor, rope.original_len)
    return frequencies, factor

  def reason_against(self, rope: RopeConfig, dim: int) -> str:
    """Returns the reason why the config's fields of LongRoPE are wrong, as text
    for an error message; '' if they are right. LongRoPE needs a positive
    divisor for each pair of features, for short and for long sequences.

    Args:
      rope: the fields of the rotary positions in the config.
      dim: how many features of a head are rotated.
    """
    num_pairs = dim // 2
    # One divisor for each pair. bool is an int in Python, and is refused.
    for name in ('short_factor', 'long_factor'):
      factors = getattr(rope, name)
      positive = [x for x in factors if type(x) in (int, float) and x > 0]
      if len(factors) != num_pairs or len(positive) != len(factors):
        return (f'model.rope.{name} is {shorten(factors)}: it needs '
                f'{num_pairs} numbers > 0, one for each pair of the {dim} '
                'features that turn')
    if rope.original_len > 1:
      return ''
    return (f'model.rope.original_len is {rope.original_len}: it needs it '
            'above 1')


def longrope_factor(factor: float, original_len: int) -> float:
  """Returns the factor on cos and sin of longrope, for texts that are `factor`
  times as long: sqrt(1 + log(factor) / log(original_len)) (Ding et al. 2024, as
  Phi-3 has it)."""
  if factor <= 1:
    return 1.0
  return math.sqrt(1 + math.log(factor) / math.log(original_len))


class Llama3(Scaling):
  """Waves longer than original_len / low_freq_factor are stretched by factor,
  those shorter than original_len / high_freq_factor are kept, and it is smooth
  between (Llama 3.1)."""
  fields = ('rope.factor', 'rope.original_len', 'rope.low_freq_factor',
            'rope.high_freq_factor')

  def frequencies(self, rope: RopeConfig, dim: int, length: int | jax.Array
                  ) -> tuple[jax.Array, float]:
    """Returns the frequencies f of rotary positions as Llama 3.1 scales them.
    Fast waves are kept, and slow ones are stretched by `factor`. For a wave
    that turns t times in original_len positions,

      kept  = clip((t - low_freq_factor) / width, 0, 1)
      width = high_freq_factor - low_freq_factor
      f'    = kept f + (1 - kept) f / factor

    Args:
      rope: the fields of the rotary positions in the config.
      dim: how many features of a head are rotated, two for each frequency.
      length: the length of the sequence; not read here.

    Returns:
      The frequencies f' in radians per position, [dim / 2]; and a factor by
      which cosines and sines are multiplied.
    """
    frequencies = base_frequencies(rope.theta, dim)
    # How often each wave turns in the original length.
    turns = rope.original_len * frequencies / (2 * math.pi)
    width_of_ramp = rope.high_freq_factor - rope.low_freq_factor
    if not width_of_ramp:
      width_of_ramp = 1e-30  # a step in place of a ramp
    # The share of each frequency that is kept; the rest of it is stretched.
    kept = jnp.clip((turns - rope.low_freq_factor) / width_of_ramp, 0, 1)
    stretched = (1 - kept) * frequencies / rope.factor
    return stretched + kept * frequencies, 1.0

  def reason_against(self, rope: RopeConfig, dim: int) -> str:
    if rope.high_freq_factor >= rope.low_freq_factor:
      return ''
    return (f'model.rope.high_freq_factor is {rope.high_freq_factor}: it needs '
            f'it no smaller than model.rope.low_freq_factor '
            f'{rope.low_freq_factor}')


class Yarn(Scaling):
  """Waves that turn less than beta_slow times in original_len are stretched by
  factor, those that turn more than beta_fast times are kept, with a ramp
  between, and scores have a temperature (YaRN: Peng et al. 2023)."""
  fields = ('rope.factor', 'rope.original_len', 'rope.beta_fast',
            'rope.beta_slow', 'rope.truncate', 'rope.mscale',
            'rope.mscale_all_dim')

  def frequencies(self, rope: RopeConfig, dim: int, length: int | jax.Array
                  ) -> tuple[jax.Array, float]:
    """Returns the frequencies f of rotary positions as YaRN scales them (Peng
    et al. 2023, arXiv 2309.00071). Fast waves are kept, and slow ones are
    stretched by `factor`; between two pairs of features the share `kept` falls
    in a ramp from 1 to 0:

      f' = kept f + (1 - kept) f / factor

    Args:
      rope: the fields of the rotary positions in the config.
      dim: how many features of a head are rotated, two for each frequency.
      length: the length of the sequence; not read here.

    Returns:
      The frequencies f' in radians per position, [dim / 2]; and a factor by
      which cosines and sines are multiplied.
    """
    frequencies = base_frequencies(rope.theta, dim)
    # The ramp lies between two pairs: the last one that turns more often than
    # beta_fast times in the original length, and the first one that turns less
    # often than beta_slow times.
    low = self._pair_that_turns(rope, dim, turns=rope.beta_fast)
    high = self._pair_that_turns(rope, dim, turns=rope.beta_slow)
    if rope.truncate:  # as the authors' program; gpt-oss does not
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width_of_ramp = (high - low) or 0.001  # never 0, as it divides
    ramp = (jnp.arange(dim // 2) - low) / width_of_ramp
    # The share of each frequency that is kept; the rest of it is stretched.
    kept = 1 - jnp.clip(ramp, 0, 1)
    mixed = (1 - kept) * frequencies / rope.factor + kept * frequencies
    factor = yarn_rotation_factor(
        rope.factor, rope.mscale, rope.mscale_all_dim)
    return mixed, factor

  @staticmethod
  def _pair_that_turns(rope: RopeConfig, dim: int, turns: float) -> float:
    """Returns the number of the pair of features whose wave turns so often in
    the original length (Peng et al. 2023)."""
    wave = rope.original_len / (turns * 2 * math.pi)
    return dim * math.log(wave) / (2 * math.log(rope.theta))

  def reason_against(self, rope: RopeConfig, dim: int) -> str:
    if rope.beta_fast >= rope.beta_slow and rope.theta > 1:
      return ''
    return (f'model.rope.beta_fast is {rope.beta_fast}: it needs at least '
            f'model.rope.beta_slow {rope.beta_slow}, and model.rope.theta '
            f'{rope.theta} above 1')

  def score_factor(self, rope: RopeConfig) -> float:
    return yarn_temperature(rope.factor, rope.mscale_all_dim) ** 2


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
  """Returns 0.1 mscale log(factor) + 1, the factor on cos and sin, whose square
  multiplies the scores (YaRN, equation 15); 1 where nothing is stretched."""
  if factor <= 1:
    return 1.0
  return 0.1 * mscale * math.log(factor) + 1.0


def yarn_rotation_factor(factor: float, mscale: float, mscale_all_dim: float
                         ) -> float:
  """Returns the factor by which YaRN multiplies the cosines and sines of rotary
  positions (Peng et al. 2023, arXiv 2309.00071). It makes attention sharper
  where positions are stretched.

  YaRN multiplies the scores by a temperature. DeepSeek-V2 splits it in two: the
  part for `mscale_all_dim` multiplies whole scores elsewhere, so it is divided
  out here.

  Args:
    factor: how many times the original length the positions are for.
    mscale: how much of the temperature is on rotated features.
    mscale_all_dim: how much of it is on all features of a head; 0: none.
  """
  temperature = yarn_temperature(factor, mscale)
  return temperature / yarn_temperature(factor, mscale_all_dim)


SCALINGS: dict[str, Scaling] = {
    'none': Scaling(),
    'linear': Linear(),
    'ntk': Ntk(),
    'dynamic': Dynamic(),
    'longrope': LongRope(),
    'llama3': Llama3(),
    'yarn': Yarn(),
}


def check_rope(config: ModelConfig, stack: str = '',
               head: str = 'model.head_dim') -> None:
  """Checks that the features of a head can be rotated by rotary positions with
  the scaling that the model has.

  Args:
    config: the config of the model or of a layer.
    stack: the kind of stack, which is not read: any may have rotary positions.
    head: the config's field that says how many features the head has, for the
      message.

  Raises:
    RequestError: if the number of rotated features is odd or 0, or if the
      fields of the scaling do not fit.
  """
  del stack
  dim = rotary_dim(config)
  rope = config.part(RopeConfig)
  require(dim % 2 == 0 and dim > 0, f'model.rope.fraction {rope.fraction} of '
          f'{head} {config.head_dim} is {dim}: rotary positions turn pairs, so '
          'it must be even and > 0')
  reason = SCALINGS[rope.scaling].reason_against(rope, dim)
  require(not reason, f'model.rope.scaling is {rope.scaling}, but {reason}')


def rotate_heads(x_BLHK: jax.Array, positions_BL: jax.Array,
                 config: ModelConfig, length: int | jax.Array = 0
                 ) -> jax.Array:
  """Returns queries or keys with pairs (a, b) of their features rotated by
  their position (RoPE: Su et al. 2021, arXiv 2104.09864, equation 34):

    a' = a cos(pos w_i) - b sin(pos w_i)
    b' = b cos(pos w_i) + a sin(pos w_i)

  The first `rope.fraction` of the features of each head, K', or of its pairs,
  are rotated. Feature i is paired with i + K'/2, as in GPT-NeoX and Hugging
  Face; the paper pairs neighbours (`rope.interleaved`), which is the same up to
  a permutation of features.

  Args:
    x_BLHK: queries or keys, [batch, length, heads, features of a head].
    positions_BL: the position of each token, [B or 1, L].
    config: the model, or the config of one kind of layer.
    length: how many tokens the rows have; see `rope_frequencies`.

  Returns:
    The rotated queries or keys, of the shape and dtype of x.
  """
  dim = rotary_dim(config)
  is_interleaved = config.part(RopeConfig).interleaved
  # The angle of each pair in float32, [B, L, 1, K'/2]. All heads turn alike,
  # and frequencies with an axis B are those of each row.
  frequencies, factor = rope_frequencies(config, length)
  positions_BL1 = positions_BL[..., None].astype(jnp.float32)
  if frequencies.ndim == 1:
    angle_BLK = positions_BL1 * frequencies[None, None]
  else:
    angle_BLK = positions_BL1 * frequencies[:, None]
  angle_BL1K = angle_BLK[:, :, None]
  cos = (jnp.cos(angle_BL1K) * factor).astype(x_BLHK.dtype)
  sin = (jnp.sin(angle_BL1K) * factor).astype(x_BLHK.dtype)
  # The pairs, rotated. In interleaved order, the split has cut a and b at the
  # wrong places, and only its third part is kept.
  a, b, unrotated = jnp.split(x_BLHK, (dim // 2, dim), axis=-1)
  if is_interleaved:
    a, b = x_BLHK[..., 0:dim:2], x_BLHK[..., 1:dim:2]
  rotated_a, rotated_b = a * cos - b * sin, b * cos + a * sin
  # Back in the order of the features.
  if not is_interleaved:
    return jnp.concatenate([rotated_a, rotated_b, unrotated], -1)
  pairs = jnp.stack([rotated_a, rotated_b], -1)
  rotated = pairs.reshape(*pairs.shape[:-2], dim)
  return jnp.concatenate([rotated, unrotated], -1)


# The encodings.


class Position:
  """No encoding, and the base of all of them. A hook that is None is not
  called.

  Attributes:
    embed: (module, x_BLD, positions_BL, name) -> x_BLD, at the embedding.
      `module` is the skeleton's Embed: parameters that are declared in it, as
      `name`, stand beside the table of tokens.
    rotate: (x_BLHK, positions_BL, config, how many tokens the rows have: see
      `rope_frequencies`) -> x_BLHK, of queries and of keys.
    layer_bias: (the layer's attention, its input, queries, keys,
      k_positions_BM, ctx) -> [B, H, L, M], added to the scores.
    stack_bias: a module of (config, causal) that makes such a bias once for all
      layers of a stack, called with the positions of queries and of keys. Its
      parameters stand in the stack, under the encoding's name and '_bias'.
    stack_table: a module of (config) that makes, once for all layers of a
      stack, what `layer_bias` reads: ctx.distances.table_UD. Its parameters
      stand in the stack, under the encoding's name.
    settings: the group of fields of config.model that it reads.
  """
  embed: Optional[Callable] = None
  rotate: Optional[Callable] = None
  layer_bias: Optional[Callable] = None
  stack_bias: Optional[type[nn.Module]] = None
  stack_table: Optional[type[nn.Module]] = None
  settings: Optional[type] = None

  def score_factor(self, config: ModelConfig) -> float:
    """Returns the factor by which the encoding multiplies all scores."""
    return 1.0

  def check(self, config: ModelConfig, stack: str) -> None:
    """Raises RequestError for fields that do not fit together.

    Args:
      config: the config of the model or of a layer.
      stack: 'encoder', 'decoder' or 'encoder-decoder'.
    """

  def longest_supported_length(self, config: ModelConfig) -> float:
    """Returns how many positions there are; infinity where they have no end."""
    return math.inf

  def variants_for_longer_rows(
      self, config: ModelConfig, length: int, multiple: int, interpolate: bool
      ) -> dict[str, Optional[ModelConfig]]:
    """Returns the variants of a model that are evaluated on texts longer than
    those of its training. Each variant extends the positions in another way.
    Without a subclass that knows one, there is the model itself.

    Args:
      config: the model.
      length: the length of its training texts, in tokens.
      multiple: how many times as long the texts of the evaluation are.
      interpolate: whether learned positions may be stretched.

    Returns:
      {name of the variant for the report: its config, or None if the model
      cannot read such texts}.
    """
    return {config.position: config}

  @property
  def has_bias(self) -> bool:
    """Whether scores have a bias, which fused kernels do not add."""
    return self.stack_bias is not None or self.layer_bias is not None

  @property
  def of_stack(self) -> bool:
    """Whether the encoding has something that all layers of a stack share: what
    is added to the embedding, or a bias or a table that is made once."""
    hooks = self.embed, self.stack_bias, self.stack_table
    return any(hook is not None for hook in hooks)


def position_of(config: ModelConfig) -> Position:
  """Returns the position encoding of a model."""
  return POSITIONS[config.position]


def longest_supported_length(config: ModelConfig) -> float:
  """Returns how many positions the model has; infinity where they have no end.
  """
  return position_of(config).longest_supported_length(config)


def lengths_that_change_rotation(config: ModelConfig) -> tuple[int, ...]:
  """Returns the lengths of a row past which some layers rotate its queries and
  keys by other frequencies (RoPE scalings that depend on the length).

  Args:
    config: the model.

  Returns:
    The lengths in ascending order; () if the length does not matter. Beyond the
    last one, rows of each length may have frequencies of their own.
  """
  lengths = set()
  for layer in config.distinct_layers:
    rope = layer.find_part(RopeConfig)
    if rope is not None and SCALINGS[rope.scaling].depends_on_length:
      lengths.add(rope.original_len)
  return tuple(sorted(lengths))


def check_length(config: ModelConfig, length: int) -> None:
  """Checks that the model's position encoding covers rows of a length.

  It is called before a run, because a compiled program cannot refuse a position
  that is too large. It would silently read the last row of the table of learned
  positions.

  Args:
    config: the model.
    length: the number of tokens of the longest row.

  Raises:
    RequestError: if the length exceeds the number of learned positions.
  """
  longest = longest_supported_length(config)
  stretch = -(-length // config.max_len)  # rounded up
  require(length <= longest,
          f'a sequence of {length} tokens is longer than the {longest} '
          'positions that this model has learned: shorten it, or set '
          f'model.learned.stretch to {stretch} to interpolate')


# Rotary positions.


class Rope(Position):
  """Queries and keys are rotated: see `rotate_heads`."""
  settings = RopeConfig

  def rotate(self, x_BLHK: jax.Array, positions_BL: jax.Array,
             config: ModelConfig, length: int | jax.Array = 0) -> jax.Array:
    return rotate_heads(x_BLHK, positions_BL=positions_BL, config=config,
                        length=length)

  def score_factor(self, config: ModelConfig) -> float:
    rope = config.part(RopeConfig)
    return SCALINGS[rope.scaling].score_factor(rope)

  def check(self, config: ModelConfig, stack: str) -> None:
    check_rope(config, stack)

  def variants_for_longer_rows(
      self, config: ModelConfig, length: int, multiple: int, interpolate: bool
      ) -> dict[str, Optional[ModelConfig]]:
    """Returns the variants of a model with rotary positions that are evaluated
    on texts longer than those of its training: the model as it is, and one for
    each scaling of the positions that needs only a factor.

    Args:
      config: the model. If its positions are scaled already, it is the only
        variant.
      length: the length of its training texts, in tokens.
      multiple: how many times as long the texts of the evaluation are. If it is
        1, all variants are the model itself.
      interpolate: not read here: rotary positions are not learned.

    Returns:
      {name of the variant, such as 'rope, linear': its config}.
    """
    rope = config.part(RopeConfig)
    if rope.scaling != 'none':
      return {f'rope, {rope.scaling}': config}
    variants: dict[str, Optional[ModelConfig]] = {'rope': config}
    for name, scaling in SCALINGS.items():
      if not scaling.needs_factor_only or name == 'none':
        continue
      variants[f'rope, {name}'] = config
      if multiple != 1:
        variants[f'rope, {name}'] = config.with_part(
            RopeConfig, scaling=name, factor=float(multiple),
            original_len=length)
    return variants


# Learned positions.


@dataclasses.dataclass(frozen=True)
class LearnedConfig:
  """The fields of position learned."""
  offset: int = field(0, "rows of the table before the first token's",
                      resume=SHAPES)
  stretch: float = field(1.0, 'above 1: learned positions are interpolated',
                         least=1, resume=FUNCTION)


class Learned(Position):
  """x + P[pos + offset], with a table P that ends at max_len, or is stretched.
  """
  settings = LearnedConfig

  def embed(self, module: nn.Module, x_BLD: jax.Array,
            positions_BL: jax.Array, name: str) -> jax.Array:
    """Adds to each token the learned vector of its position, as BERT and GPT
    do: y_l = x_l + P[position_l + offset].

    Args:
      module: the module that embeds, which the table becomes a parameter of.
      x_BLD: the embedded tokens.
      positions_BL: the position of each token in its row, from 0.
      name: the name of the parameter.

    Returns:
      The sum, [B, L, D].
    """
    config: ModelConfig = module.config  # type: ignore[attr-defined]
    check_length(config, x_BLD.shape[1])
    fields = config.part(LearnedConfig)
    table_LD = layers.embedding(module, name, config.max_len + fields.offset)
    table_LD = sharding.constrain(table_LD, None, None)
    added_BLD = look_up_learned_positions(table_LD, positions=positions_BL,
                                          stretch=fields.stretch,
                                          offset=fields.offset)
    return x_BLD + added_BLD.astype(x_BLD.dtype)

  def longest_supported_length(self, config: ModelConfig) -> int:
    # A quotient of lengths times its divisor may lie just below the other.
    return math.floor(
        config.max_len * config.part(LearnedConfig).stretch + 1e-6)

  def variants_for_longer_rows(
      self, config: ModelConfig, length: int, multiple: int, interpolate: bool
      ) -> dict[str, Optional[ModelConfig]]:
    """Returns the variants of a model that are evaluated on texts longer than
    those of its training. The arguments are those of Position.

    Returns:
      The configs by name. A table that ends before the longer texts do gives
      None, as the model cannot read them; and with `interpolate` also a variant
      whose table is stretched over them.
    """
    longer = length * multiple
    if longer <= self.longest_supported_length(config):
      return {'learned': config}
    variants: dict[str, Optional[ModelConfig]] = {'learned': None}
    if interpolate:
      variants['learned, interpolated'] = config.with_part(
          LearnedConfig, stretch=longer / config.max_len)
    return variants


def look_up_learned_positions(table_LD: jax.Array, positions: jax.Array,
                              stretch: float, offset: int = 0) -> jax.Array:
  """Looks up positions in a table of learned vectors. If the table is stretched
  over more positions than it has rows, vectors are interpolated between rows.

  Args:
    table_LD: the table, [L rows, D features].
    positions: the positions, integers of any shape [...].
    stretch: how many positions there are for each row. Position p is then at
      row p / stretch. 1: each position has a row.
    offset: how many rows of the table stand before that of position 0.

  Returns:
    The vectors, [..., D].
  """
  if stretch == 1:
    return table_LD[positions + offset]
  table_LD = table_LD[offset:]
  last_row = table_LD.shape[0] - 1
  # The rows on both sides, and how far from the lower one the position lies.
  row = jnp.minimum(positions / stretch, last_row)
  low = jnp.floor(row).astype(jnp.int32)
  high = jnp.minimum(low + 1, last_row)
  share = (row - low)[..., None].astype(table_LD.dtype)
  return table_LD[low] * (1 - share) + table_LD[high] * share


# Sinusoids.


# The layouts that `sinusoidal_encoding` knows.
LAYOUTS_OF_SINUSOIDS = ('interleaved', 'halves', 'fairseq')


@dataclasses.dataclass(frozen=True)
class SinusoidalConfig:
  """The fields of position sinusoidal."""
  layout: str = field('interleaved', 'the order of sines and cosines',
                      choices=LAYOUTS_OF_SINUSOIDS, resume=FUNCTION)


class Sinusoidal(Position):
  """x + PE[pos], with PE the sinusoids (Vaswani et al. 2017, section 3.5)."""
  settings = SinusoidalConfig

  def embed(self, module: nn.Module, x_BLD: jax.Array,
            positions_BL: jax.Array, name: str) -> jax.Array:
    config: ModelConfig = module.config  # type: ignore[attr-defined]
    layout = config.part(SinusoidalConfig).layout
    added_BLD = sinusoidal_encoding(positions_BL, config.d_model, layout)
    return x_BLD + added_BLD.astype(x_BLD.dtype)

  def check(self, config: ModelConfig, stack: str) -> None:
    check_width_for_sinusoids(config)


def sinusoidal_encoding(positions: jax.Array, d_model: int,
                        layout: str = 'interleaved') -> jax.Array:
  """Returns the sinusoidal encoding of positions (Vaswani et al. 2017, section
  3.5): sin(p w_i) and cos(p w_i) of position p, with w_i = 10000^(-2i/D) for
  each i below D/2.

  Args:
    positions: the positions, integers of any shape [...].
    d_model: the number of features, D.
    layout: the order of the features.
      interleaved: sin at feature 2i, cos at 2i + 1, as in the paper.
      halves: all sines, then all cosines, as in Marian.
      fairseq: halves, with w_i = 10000^(-i/(D/2 - 1)) as in tensor2tensor, and
        the first token at position 2 as in fairseq.

  Returns:
    The encoding, float32 [..., D].
  """
  num_pairs, divisor = d_model // 2, d_model // 2
  if layout == 'fairseq':
    divisor = num_pairs - 1
    positions = positions + 2
  # The angle of each pair, [..., D/2].
  steps = jnp.arange(num_pairs) / divisor
  frequencies = (10000.0 ** -steps).reshape((1,) * positions.ndim + (-1,))
  angle = positions[..., None].astype(jnp.float32) * frequencies
  # Sines and cosines, in the order of the layout.
  if layout != 'interleaved':
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
  pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1)
  return pairs.reshape(*positions.shape, d_model)


def check_width_for_sinusoids(config: ModelConfig) -> None:
  """Raises RequestError for a width that `sinusoidal_encoding` cannot have."""
  require(config.d_model % 2 == 0 and config.d_model >= 4, f'model.d_model is '
          f'{config.d_model}: sinusoids need it even and at least 4')


# Biases by distance.


class Alibi(Position):
  """scores - slope_h * distance (Press et al. 2022)."""

  def layer_bias(self, module: nn.Module, x_BLD: jax.Array, q_BLHK: jax.Array,
                 k_BMJK: jax.Array, k_positions_BM: jax.Array, ctx: Context
                 ) -> jax.Array:
    return alibi_bias(ctx.positions_BL, k_positions_BM, q_BLHK.shape[2])


def alibi_bias(q_positions_BL: jax.Array, k_positions_BM: jax.Array,
               num_heads: int) -> jax.Array:
  """Returns the bias -slope_h * |i - j|, [B, H, L, M] (Press et al. 2022)."""
  distance_BLM = jnp.abs(q_positions_BL[:, :, None] - k_positions_BM[:, None])
  slopes_H = jnp.array(alibi_slopes(num_heads), jnp.float32)
  return -slopes_H[None, :, None, None] * distance_BLM[:, None]


def alibi_slopes(num_heads: int) -> list[float]:
  """Returns the slopes of ALiBi (Press et al. 2022, arXiv 2108.12409): how much
  each head lowers a score for each token between query and key.

  If the number of heads H is a power of 2, head h = 1 ... H has the slope
  2^(-8h/H). Otherwise, as in the paper's code, the first P heads have the
  slopes of a model with P heads, where P is the largest power of 2 below H. The
  other heads take every other slope of a model with 2P heads.

  Args:
    num_heads: H.
  """
  power = 2 ** math.floor(math.log2(num_heads))
  slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
  slopes_between = [2 ** (-8 * (h + 1) / (2 * power))
                    for h in range(0, 2 * power, 2)]
  return slopes + slopes_between[:num_heads - power]


@dataclasses.dataclass(frozen=True)
class RelativeConfig:
  """The fields of positions relative and relative_by_layer: T5's buckets
  (Raffel et al. 2020, section 2.1)."""
  GROUP = 'relative'
  buckets: int = field(32, 'buckets of distances', above=0, resume=SHAPES)
  max_distance: int = field(
      128, 'The last bucket has all larger distances.', above=0,
      resume=FUNCTION)


def relative_bucket(offset: jax.Array, *, bidirectional: bool, buckets: int,
                    max_distance: int) -> jax.Array:
  """Maps the distance between a query and a key to a bucket, by which T5 looks
  up a bias on the score (Raffel et al. 2020, section 2.1).

  Half of the buckets have one distance each. The others widen logarithmically
  up to max_distance.

  Args:
    offset: key position minus query position, integers of any shape.
    bidirectional: whether half of all buckets are for keys after the query. If
      false, such keys count as distance 0: a causal mask hides them.
    buckets: the number of buckets.
    max_distance: the distance from which on all share the last bucket.

  Returns:
    The numbers of the buckets, int32 of the shape of `offset`.
  """
  # Earlier and later keys have half of the buckets each.
  first_bucket = jnp.zeros_like(offset)
  if bidirectional:
    buckets //= 2
    first_bucket = jnp.where(offset > 0, buckets, 0)
    distance = jnp.abs(offset)
  else:
    distance = jnp.maximum(-offset, 0)
  num_exact = buckets // 2
  # Place far distances on a logarithmic scale, from 0 at num_exact to 1 at
  # max_distance. The result for near ones is not used in the end; the maximum
  # only keeps their logarithm finite.
  multiple = jnp.maximum(distance, 1).astype(jnp.float32) / num_exact
  share_of_scale = jnp.log(multiple) / math.log(max_distance / num_exact)
  far_bucket = num_exact + (
      share_of_scale * (buckets - num_exact)).astype(jnp.int32)
  far_bucket = jnp.minimum(far_bucket, buckets - 1)
  bucket = jnp.where(distance < num_exact, distance, far_bucket)
  return first_bucket + bucket


class RelativeBias(nn.Module):
  """T5's bias on the scores, b[h, bucket(distance)], for all layers or one."""
  config: ModelConfig
  causal: bool

  @nn.compact
  def __call__(self, q_positions_BL: jax.Array,
               k_positions_BM: jax.Array) -> jax.Array:
    """Returns the bias that T5 adds to attention's scores: a learned number for
    each head and each bucket of distances between a query and a key.

    The suffixes name axes: B batch (or 1 for all rows), L queries, M keys, H
    heads, U buckets.

    Args:
      q_positions_BL: the positions of the queries.
      k_positions_BM: the positions of the keys.

    Returns:
      The bias, float32 [B, H, L, M].
    """
    config = self.config
    relative = config.part(RelativeConfig)
    # Declare the table of learned numbers.
    stddev = config.init_stddev
    if config.init == 'fan_in':
      stddev = config.base_width ** -0.5
    table_UH = declare(self, 'table', init=nn.initializers.normal(stddev),
                       shape=(relative.buckets, config.num_heads),
                       role=Role(axes=(None, 'heads')))
    # Look up all pairs of a query and a key. This gives the heads as the last
    # axis, [B, L, M, H], which is moved behind the batch.
    bucket_BLM = relative_bucket(
        k_positions_BM[:, None] - q_positions_BL[:, :, None],
        bidirectional=not self.causal, buckets=relative.buckets,
        max_distance=relative.max_distance)
    bias_BHLM = jnp.moveaxis(table_UH[bucket_BLM], -1, 1).astype(jnp.float32)
    return sharding.constrain(bias_BHLM, None, 'heads', 'length', None)


class Relative(Position):
  """scores + b[h, bucket(distance)], with one table b for all layers of a stack
  (T5)."""
  settings = RelativeConfig
  stack_bias: Optional[type[nn.Module]] = RelativeBias

  def check(self, config: ModelConfig, stack: str) -> None:
    """Checks the number of buckets into which T5 sorts distances between
    queries and keys.

    A quarter of an encoder's buckets (for each of two directions), and half of
    a decoder's, have one distance each. The others widen up to max_distance.

    Args:
      config: the config of the model or of a layer.
      stack: the kind of stack: 'encoder', 'decoder' or 'encoder-decoder'.

    Raises:
      RequestError: if there are too few buckets, if their number is odd, or if
        the buckets of one distance already reach max_distance.
    """
    relative = config.part(RelativeConfig)
    buckets, max_distance = relative.buckets, relative.max_distance
    fewest_buckets = 2 if stack == 'decoder' else 4
    num_exact = buckets // (4 if stack == 'encoder' else 2)
    fits = (buckets >= fewest_buckets and buckets % 2 == 0
            and max_distance > num_exact)
    require(fits, f'model.relative.buckets is {buckets} and '
            f'model.relative.max_distance {max_distance}: model.arch '
            f'{config.arch} needs an even number of buckets, {fewest_buckets} '
            f'or more, {num_exact} of which are of one distance each, and a '
            'larger distance')


class RelativeByLayer(Relative):
  """The bias of `Relative` with a table of each layer's own (UMT5)."""
  stack_bias = None

  def layer_bias(self, module: nn.Module, x_BLD: jax.Array, q_BLHK: jax.Array,
                 k_BMJK: jax.Array, k_positions_BM: jax.Array, ctx: Context
                 ) -> jax.Array:
    layer: Any = module
    bias = RelativeBias(layer.config, layer.kind.causal, name='relative_bias')
    return bias(ctx.positions_BL, k_positions_BM)


@dataclasses.dataclass(frozen=True)
class ProfilesConfig:
  """The fields of position relative_by_token."""
  GROUP = 'profiles'
  rank: int = field(16, 'profiles of the bias by distance, of which each token '
                    'mixes its own', above=0, resume=SHAPES)
  extent: int = field(1024, 'distances that have a bias: 0 to extent - 1',
                      above=0, resume=SHAPES)


class RelativeByToken(Position):
  """A bias on the scores that each query computes from its own token (Inkling:
  Thinking Machines 2026, as transformers has it):

    bias_ij = (W_r x_i) P[:, i - j]     and 0 past the extent and for later keys

  Each head mixes the rows of P, which are profiles by distance. A wider model
  may have as many, so in muP W_r x are logits, as a router's.
  """
  settings = ProfilesConfig

  def layer_bias(self, module: nn.Module, x_BLD: jax.Array, q_BLHK: jax.Array,
                 k_BMJK: jax.Array, k_positions_BM: jax.Array, ctx: Context
                 ) -> jax.Array:
    """Returns a bias on attention's scores that depends on the query's token
    and the distance of the key. There are a few learned profiles, each with a
    bias for each distance, and each token mixes them in its own way.

    The suffixes name axes: B batch, L queries, D d_model, M keys (or distances,
    before the look-up), H heads, U profiles.

    Args:
      module: the attention of the layer, which declares the parameters.
      x_BLD: the input of the layer.
      q_BLHK: the queries, which are not read.
      k_BMJK: the keys, which are not read.
      k_positions_BM: the positions of the keys, [B or 1, M].
      ctx: the context of the call, which has the positions of the queries.

    Returns:
      The bias, [B, H, L, M]; 0 for keys that come later than the query, or that
      are `profiles.extent` tokens away or more.
    """
    config: ModelConfig = module.config  # type: ignore[attr-defined]
    profiles = config.part(ProfilesConfig)
    rank, extent = profiles.rank, profiles.extent
    # How much of each profile a token takes, for each head. The product with
    # the profiles is the token's bias for each distance.
    mix_BLHU = layers.dense(module, 'profile', 'BLD,DHU->BLHU', x_BLD,
                            shape=(config.d_model, config.num_heads, rank),
                            axes=('embed', 'heads', None), output=True,
                            with_bias=False,
                            deterministic=ctx.deterministic) / config.widening
    profiles_UM = declare(
        module, 'profiles', init=nn.initializers.normal(config.init_stddev),
        shape=(rank, extent), role=Role(axes=(None, None), inputs=(0,)))
    by_distance_BHLM = layers.einsum('BLHU,UM->BHLM', mix_BLHU, profiles_UM,
                                     dtype=config.compute_dtype,
                                     out_dtype=jnp.float32)
    # Look up the bias of each key by its distance. Distances outside of the
    # profiles are clipped first, and their biases are replaced by 0 afterwards.
    distance_BLM = ctx.positions_BL[:, :, None] - k_positions_BM[:, None]
    index_BLM = jnp.clip(distance_BLM, 0, extent - 1)
    bias_BHLM = jnp.take_along_axis(
        by_distance_BHLM, index_BLM[:, None], -1)
    is_in_extent_BLM = (distance_BLM >= 0) & (distance_BLM < extent)
    return jnp.where(is_in_extent_BLM[:, None], bias_BHLM, 0)

  def check(self, config: ModelConfig, stack: str) -> None:
    require(stack == 'decoder' and config.mixer == 'attention',
            "model.position is 'relative_by_token', a bias of earlier keys by "
            'model.mixer attention in a decoder: choose these, or position '
            'relative_by_layer')


class Disentangled(Position):
  """scores + products of queries and keys with vectors of distances
  (attention/disentangled.py)."""
  settings = disentangled.DisentangledConfig
  stack_table = disentangled.Distances
  layer_bias = staticmethod(disentangled.bias)

  def score_factor(self, config: ModelConfig) -> float:
    return 3 ** -0.5

  def check(self, config: ModelConfig, stack: str) -> None:
    disentangled.check(config, stack)


class Path(Position):
  """Products of reflections that each token makes (attention/path.py)."""
  settings = PathConfig
  has_bias = True  # type: ignore[assignment]

  def check(self, config: ModelConfig, stack: str) -> None:
    """Checks that the rest of a layer goes with reflections, which each token
    makes and which move the keys of all tokens before it.

    So there must be earlier tokens and keys of the layer's own: attention in a
    decoder, without kv_sharing. What the moves of the keys change is added to
    the scores as a bias, after a softcap would have bounded them. The rates of
    muP are not known for reflections. An indexer would choose keys as they were
    before they moved.

    Args:
      config: the config of the model, or of the layers of one kind.
      stack: what the architecture is: 'decoder', 'encoder' or
        'encoder-decoder'.

    Raises:
      RequestError: for settings that do not go with reflections.
    """
    if stack != 'decoder' or config.mixer != 'attention':
      raise RequestError(
          "model.position is 'path', in which the tokens after a key change "
          'its scores: it needs model.mixer attention in a decoder, and they '
          f'are {config.mixer!r} and an {stack}')

    # The fields that must have their default.
    kv_sharing = config.part(AttentionConfig).kv_sharing
    _require_default_with_path('kv_sharing', kv_sharing, default=False)
    _require_default_with_path('attention_softcap', config.attention_softcap,
                               default=0.0)
    _require_default_with_path('parametrization', config.parametrization,
                               default='standard')
    if config.attention == 'indexed':
      raise RequestError(
          "model.position is 'path', which changes the scores of keys, and "
          "model.attention is 'indexed', whose indexer leaves some out: choose "
          'global')


def _require_default_with_path(field_name: str, value: Any, default: Any
                               ) -> None:
  """Raises RequestError if a field of config.model that position 'path' does
  not support is not its default."""
  if value != default:
    raise RequestError(
        "model.position is 'path', which changes the scores of keys: set "
        f'model.{field_name}, which is {value!r}, to {default!r}, or choose '
        'another position')


POSITIONS: dict[str, Position] = {
    'disentangled': Disentangled(),
    'learned': Learned(),
    'sinusoidal': Sinusoidal(),
    'rope': Rope(),
    'alibi': Alibi(),
    'relative': Relative(),
    'relative_by_layer': RelativeByLayer(),
    'relative_by_token': RelativeByToken(),
    'path': Path(),
    'none': Position(),
}
