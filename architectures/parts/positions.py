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
none        nothing

An entry of POSITIONS, at the end of this file, is all that there is of one.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import layers
from architectures.parts import sharding
from architectures.parts.attention import disentangled
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.sharding import Role, declare
from common.errors import require, short
from common.fields import field, FUNCTION, SHAPES

# Rotary positions, and how they stretch past training.
#
# Queries and keys are turned by pos * frequency, so that a score depends on the
# distance alone. An entry of SCALINGS is all that there is of one way to
# stretch.


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Of position rope: rotary positions, and how they stretch past training."""
  theta: float = field(10000.0, 'the base of the frequencies', above=0,
                       most=1e12, resume=FUNCTION)
  fraction: float = field(1.0, 'the share of a head that is rotated', above=0,
                          most=1, resume=FUNCTION)
  proportional: bool = field(
      False, 'Frequencies and pairs are those of a whole head, of which the '
      'first share turns (Gemma 4).', resume=FUNCTION)
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


class Scaling(NamedTuple):
  """How rotary positions stretch past their training length.

  Attributes:
    frequencies: (config.rope, how many features are rotated) -> as
      `rope_frequencies`. With `by_length`, a third argument is how many tokens
      a row has: an int, or a scalar on the device.
    fields: of config.model that it reads.
    refuse: (config.rope, how many features are rotated) -> why it cannot be;
      '': it can.
    score_factor: config.rope -> what multiplies the scores.
    by_length: whether longer rows turn otherwise than shorter ones.
    by_multiple: whether `factor` alone says how many times the original length
      it is for, so that any model can be tried with it.
  """
  frequencies: Callable
  fields: tuple[str, ...] = ()
  refuse: Callable[[RopeConfig, int], str] = lambda r, dim: ''
  score_factor: Callable[[RopeConfig], float] = lambda r: 1.0
  by_length: bool = False
  by_multiple: bool = True


def rotary_dim(c: ModelConfig) -> int:
  """Returns how many of a head's features are in pairs that may turn."""
  rope = c.part(RopeConfig)
  if rope.proportional:
    return c.head_dim
  return int(c.head_dim * rope.fraction)


def rope_frequencies(config: ModelConfig, length: int | jax.Array = 0
                     ) -> tuple[jax.Array, float]:
  """Returns radians per position, and the factor on cos and sin.

  linear: positions / factor (Chen et al. 2023). ntk: theta grows so that the
  slowest wave stretches by factor. llama3: waves longer than original_len /
  low_freq_factor are stretched, short ones kept, smooth between. yarn: the
  same by the number of turns, and a temperature (Peng et al. 2023). dynamic:
  ntk by the length of the row. longrope: each frequency is divided by a factor
  of its own, that was searched for (Ding et al. 2024).

  `length` decides on the last two: how many tokens the rows have so far. Of an
  int the radians are [K'/2], and of an array [B], a number for each row, they
  may be [B, K'/2]. With rope.proportional, those past rope.fraction of K are 0.
  """
  r, dim = config.part(RopeConfig), rotary_dim(config)
  row = SCALINGS[r.scaling]
  turned = int(r.fraction * dim // 2) if r.proportional else dim // 2

  def frequencies(*length):
    each, factor = row.frequencies(r, dim, *length)
    return jnp.where(jnp.arange(dim // 2) < turned, each, 0), factor

  if not row.by_length:
    return frequencies()
  if isinstance(length, int):
    return frequencies(length)
  return jax.vmap(lambda n: frequencies(n)[0])(length), frequencies(0)[1]


def _unscaled(r: RopeConfig, dim: int, theta: float | jax.Array | None = None):
  steps = jnp.arange(0, dim, 2, dtype=jnp.float32)
  return (r.theta if theta is None else theta) ** (-steps / dim), 1.0


def _linear(r: RopeConfig, dim: int):
  return _unscaled(r, dim)[0] / r.factor, 1.0


def _ntk(r: RopeConfig, dim: int):
  return _unscaled(r, dim, ntk_theta(r, dim))


def ntk_theta(r: RopeConfig, dim: int) -> float:
  return r.theta * r.factor ** (dim / (dim - 2))


def _dynamic(r: RopeConfig, dim: int, length: int | jax.Array):
  largest = max if isinstance(length, int) else jnp.maximum
  stretch = r.factor * largest(length / r.original_len, 1.0) - (r.factor - 1)
  return _unscaled(r, dim, r.theta * stretch ** (dim / (dim - 2)))


def _longrope(r: RopeConfig, dim: int, length: int | jax.Array):
  where = np.where if isinstance(length, int) else jnp.where
  divided_by = where(length > r.original_len, np.array(r.long_factor),
                     np.array(r.short_factor))
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


def _llama3(r: RopeConfig, dim: int):
  frequency, _ = _unscaled(r, dim)
  turns = r.original_len * frequency / (2 * math.pi)
  smooth = (turns - r.low_freq_factor) / (
      (r.high_freq_factor - r.low_freq_factor) or 1e-30)  # a step
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


def _refuse_ntk(r: RopeConfig, dim: int) -> str:
  del r
  return '' if dim > 2 else (
      f'only {dim} features of a head are rotated: it needs 4 or more')


def _refuse_longrope(r: RopeConfig, dim: int) -> str:
  for name in ('short_factor', 'long_factor'):
    factors = getattr(r, name)
    if len(factors) != dim // 2 or not all(
        type(x) in (int, float) and x > 0 for x in factors):
      return (f'model.rope.{name} is {short(factors)}: it needs {dim // 2} '
              f'numbers > 0, one for each pair of the {dim} features that turn')
  return '' if r.original_len > 1 else (
      f'model.rope.original_len is {r.original_len}: it needs it above 1')


def _refuse_llama3(r: RopeConfig, dim: int) -> str:
  del dim
  return '' if r.high_freq_factor >= r.low_freq_factor else (
      f'model.rope.high_freq_factor is {r.high_freq_factor}: it needs it no '
      f'smaller than model.rope.low_freq_factor {r.low_freq_factor}')


def _refuse_yarn(r: RopeConfig, dim: int) -> str:
  del dim
  return '' if r.beta_fast >= r.beta_slow and r.theta > 1 else (
      f'model.rope.beta_fast is {r.beta_fast}: it needs at least '
      f'model.rope.beta_slow {r.beta_slow}, and model.rope.theta {r.theta} '
      'above 1')


def check_rope(c: ModelConfig, stack: str = '', head: str = 'model.head_dim'
               ) -> None:
  """Raises RequestError for features of a head that cannot be turned.

  Args:
    c: the config.
    stack: as of Position.check.
    head: the field that says how many features the head has.
  """
  del stack
  dim = rotary_dim(c)
  rope = c.part(RopeConfig)
  require(dim % 2 == 0 and dim > 0, f'model.rope.fraction {rope.fraction} of '
          f'{head} {c.head_dim} is {dim}: rotary positions turn pairs, so it '
          'must be even and > 0')
  why = SCALINGS[rope.scaling].refuse(rope, dim)
  require(not why, f'model.rope.scaling is {rope.scaling}, but {why}')


def rotate(x_BLHK: jax.Array, positions_BL: jax.Array, config: ModelConfig,
           length: int | jax.Array = 0) -> jax.Array:
  """Turns the first `rope.fraction` of each head, or of its pairs, by its
  position.

  Feature i is paired with i + K'/2, as in GPT-NeoX and Hugging Face; the
  paper pairs neighbours (`rope.interleaved`), which is the same up to a
  permutation of features. `length`: as of `rope_frequencies`.
  """
  dim = rotary_dim(config)
  frequency, factor = rope_frequencies(config, length)
  angle = (positions_BL[..., None].astype(jnp.float32) * (
      frequency[None, None] if frequency.ndim == 1 else frequency[:, None]
  ))[:, :, None]
  cos = (jnp.cos(angle) * factor).astype(x_BLHK.dtype)
  sin = (jnp.sin(angle) * factor).astype(x_BLHK.dtype)
  a, b, rest = jnp.split(x_BLHK, (dim // 2, dim), axis=-1)
  if config.part(RopeConfig).interleaved:
    a, b = x_BLHK[..., 0:dim:2], x_BLHK[..., 1:dim:2]
  turned = a * cos - b * sin, b * cos + a * sin
  if config.part(RopeConfig).interleaved:
    pairs = jnp.stack(turned, -1)
    turned = (pairs.reshape(*pairs.shape[:-2], dim),)
  return jnp.concatenate([*turned, rest], -1)


def _rope_score_factor(c: ModelConfig) -> float:
  """Returns what multiplies the scores of turned queries and keys."""
  rope = c.part(RopeConfig)
  return SCALINGS[rope.scaling].score_factor(rope)


_FROM = ('rope.factor', 'rope.original_len')
SCALINGS = {
    'none': Scaling(_unscaled),
    'linear': Scaling(_linear, ('rope.factor',)),
    'ntk': Scaling(_ntk, ('rope.factor',), _refuse_ntk),
    'dynamic': Scaling(_dynamic, _FROM, _refuse_ntk, by_length=True,
                       by_multiple=False),
    'longrope': Scaling(
        _longrope, (*_FROM, 'rope.short_factor', 'rope.long_factor',
                    'rope.attention_factor'),
        _refuse_longrope, by_length=True, by_multiple=False),
    'llama3': Scaling(
        _llama3, (*_FROM, 'rope.low_freq_factor', 'rope.high_freq_factor'),
        _refuse_llama3),
    'yarn': Scaling(
        _yarn, (*_FROM, 'rope.beta_fast', 'rope.beta_slow', 'rope.truncate',
                'rope.mscale', 'rope.mscale_all_dim'), _refuse_yarn,
        lambda r: yarn_temperature(r.factor, r.mscale_all_dim) ** 2),
}


# The encodings.


# The layouts that `sinusoid` knows.
SINUSOIDS = ('interleaved', 'halves', 'fairseq')


@dataclasses.dataclass(frozen=True)
class LearnedConfig:
  """Of position learned."""
  offset: int = field(0, "rows of the table before the first token's",
                      resume=SHAPES)
  stretch: float = field(1.0, 'above 1: learned positions are interpolated',
                         least=1, resume=FUNCTION)


@dataclasses.dataclass(frozen=True)
class SinusoidalConfig:
  """Of position sinusoidal."""
  layout: str = field('interleaved', 'the order of sines and cosines',
                      choices=SINUSOIDS, resume=FUNCTION)


@dataclasses.dataclass(frozen=True)
class RelativeConfig:
  """Of positions relative and relative_by_layer: T5's buckets (Raffel et al.
  2020, section 2.1)."""
  GROUP = 'relative'
  buckets: int = field(32, 'buckets of distances', above=0, resume=SHAPES)
  max_distance: int = field(
      128, 'the last bucket has all larger distances', above=0,
      resume=FUNCTION)


def _as_it_is(c: ModelConfig, length: int, multiple: int, interpolate: bool
              ) -> dict[str, Optional[ModelConfig]]:
  del length, multiple, interpolate
  return {c.position: c}


class Position(NamedTuple):
  """One position encoding; a hook that is None is not called.

  Attributes:
    embed: (module, x_BLD, positions_BL, name) -> x_BLD, at the embedding.
      `module` is the skeleton's Embed: parameters that are declared in it, as
      `name`, stand beside the table of tokens.
    rotate: (x_BLHK, positions_BL, config, how many tokens the rows have, as
      of `rope_frequencies`) -> x_BLHK, of queries and of keys.
    score_factor: config -> what multiplies the scores.
    layer_bias: (the layer's attention, its input, queries, keys,
      k_positions_BM, ctx) -> [B, H, L, M], added to the scores.
    stack_bias: the same once for all layers of a stack: a module of (config,
      causal), called with the positions of queries and of keys. Its parameters
      stand in the stack, under the encoding's name and '_bias'.
    stack_table: a module of (config) that makes, once for all layers of a
      stack, what `layer_bias` reads: ctx.distances.table_UD. Its parameters
      stand in the stack, under the encoding's name.
    settings: the group of fields of config.model that it reads.
    check: (config, stack) -> None; raises RequestError for fields that do not
      fit together. `stack` is what architectures.stack returns.
    reach: config -> how many positions there are.
    longer: (config, length, multiple, interpolate) -> {name: config}, how it
      is evaluated at a multiple of its training length. A config is None where
      the model refuses; `interpolate` is whether learned positions may be
      stretched.
  """
  embed: Optional[Callable] = None
  rotate: Optional[Callable] = None
  layer_bias: Optional[Callable] = None
  stack_bias: Optional[type[nn.Module]] = None
  stack_table: Optional[type[nn.Module]] = None
  score_factor: Callable[[ModelConfig], float] = lambda c: 1.0
  settings: Optional[type] = None
  check: Callable[[ModelConfig, str], None] = lambda c, stack: None
  reach: Callable[[ModelConfig], float] = lambda c: math.inf
  longer: Callable = _as_it_is

  @property
  def has_bias(self) -> bool:
    """Whether scores have a bias, which fused kernels do not add."""
    return bool(self.stack_bias or self.layer_bias)

  @property
  def of_stack(self) -> bool:
    """Whether a stack reads it beside its layers, which share it."""
    return bool(self.embed or self.stack_bias or self.stack_table)


def of(c: ModelConfig) -> Position:
  """Returns the position encoding of a model."""
  return POSITIONS[c.position]


def reach(c: ModelConfig) -> float:
  """Returns how many positions the model has; infinity where they have no end.
  """
  return of(c).reach(c)


def lengths_apart(c: ModelConfig) -> tuple[int, ...]:
  """Returns the lengths, ascending, on whose sides a row turns otherwise, in
  some layers of a model; (): no length counts. Beyond the last one each may."""
  lengths = set()
  for layer in c.distinct_layers:
    rope = layer.find(RopeConfig)
    if rope is not None and SCALINGS[rope.scaling].by_length:
      lengths.add(rope.original_len)
  return tuple(sorted(lengths))


def check_length(c: ModelConfig, length: int) -> None:
  """Raises RequestError where the positions do not reach `length`.

  `positions_BL` that are passed in are values on the device, which a compiled
  program cannot refuse: there a row past the table is the table's last.
  """
  require(length <= reach(c), f'a sequence of {length} tokens is longer than '
          f'the {reach(c)} positions that this model has learned: shorten it, '
          f'or set model.learned.stretch to {-(-length // c.max_len)} to '
          'interpolate')


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


def _add_sinusoids(module: nn.Module, x_BLD: jax.Array, positions_BL: jax.Array,
                   name: str):
  del name
  c = module.config
  sinusoidal = c.part(SinusoidalConfig)
  return x_BLD + sinusoid(positions_BL, c.d_model, sinusoidal.layout).astype(
      x_BLD.dtype)


def check_sinusoids(c: ModelConfig, stack: str = '') -> None:
  """Raises RequestError for a width that `sinusoid` cannot have."""
  del stack
  require(c.d_model % 2 == 0 and c.d_model >= 4, f'model.d_model is '
          f'{c.d_model}: sinusoids need it even and at least 4')


def learned(table_LD: jax.Array, positions: jax.Array, stretch: float,
            offset: int = 0) -> jax.Array:
  """Rows of the table at `positions`, after the first `offset` of them; between
  two rows where stretched."""
  if stretch == 1:
    return table_LD[positions + offset]
  table_LD = table_LD[offset:]
  place = jnp.minimum(positions / stretch, table_LD.shape[0] - 1)
  low = jnp.floor(place).astype(jnp.int32)
  high = jnp.minimum(low + 1, table_LD.shape[0] - 1)
  part = (place - low)[..., None].astype(table_LD.dtype)
  return table_LD[low] * (1 - part) + table_LD[high] * part


def _add_learned(module: nn.Module, x_BLD: jax.Array, positions_BL: jax.Array,
                 name: str):
  c = module.config
  check_length(c, x_BLD.shape[1])
  learned_ = c.part(LearnedConfig)
  table_LD = layers.embedding(module, name, c.max_len + learned_.offset)
  return x_BLD + learned(sharding.constrain(table_LD, None, None),
                         positions_BL, learned_.stretch,
                         learned_.offset).astype(x_BLD.dtype)


def _learned_reach(c: ModelConfig) -> int:
  # The quotient of two lengths times one of them may lie just below the other.
  return math.floor(c.max_len * c.part(LearnedConfig).stretch + 1e-6)


def _longer_learned(c: ModelConfig, length: int, multiple: int,
                    interpolate: bool):
  if length * multiple <= _learned_reach(c):
    return {'learned': c}
  stretched = c.with_part(LearnedConfig,
                          stretch=length * multiple / c.max_len)
  return {'learned': None} | (
      {'learned, interpolated': stretched} if interpolate else {})


def _longer_rope(c: ModelConfig, length: int, multiple: int,
                 interpolate: bool):
  """As it is and, unless it is stretched already, with each scaling that a
  factor alone tells."""
  del interpolate
  rope = c.part(RopeConfig)
  if rope.scaling != 'none':
    return {f'rope, {rope.scaling}': c}
  ways = {'rope': c}
  for name, row in SCALINGS.items():
    if not row.by_multiple or name == 'none':
      continue
    ways[f'rope, {name}'] = c
    if multiple != 1:
      ways[f'rope, {name}'] = c.with_part(
          RopeConfig, scaling=name, factor=float(multiple),
          original_len=length)
  return ways


def alibi_slopes(num_heads: int) -> list[float]:
  """Slope per head: 2^(-8h/H); for H no power of 2, as the paper's code."""
  def powers(n: int):
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


def _alibi(module: nn.Module, x_BLD: jax.Array, q_BLHK: jax.Array,
           k_BMJK: jax.Array, k_positions_BM: jax.Array, ctx: Context
           ) -> jax.Array:
  return alibi(ctx.positions_BL, k_positions_BM, q_BLHK.shape[2])


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


class RelativeBias(nn.Module):
  """T5's bias on the scores, [B or 1, H, L, M]: of all layers, or of one."""
  config: ModelConfig
  causal: bool

  @nn.compact
  def __call__(self, q_positions_BL: jax.Array,
               k_positions_BM: jax.Array) -> jax.Array:
    c = self.config
    stddev = c.base_width ** -0.5 if c.init == 'fan_in' else c.init_stddev
    relative = c.part(RelativeConfig)
    table = declare(self, 'table', nn.initializers.normal(stddev),
                    (relative.buckets, c.num_heads), Role((None, 'heads')))
    bucket_BLM = relative_bucket(
        k_positions_BM[:, None] - q_positions_BL[:, :, None],
        bidirectional=not self.causal, buckets=relative.buckets,
        max_distance=relative.max_distance)
    bias_BHLM = jnp.moveaxis(table[bucket_BLM], -1, 1).astype(jnp.float32)
    return sharding.constrain(bias_BHLM, None, 'heads', 'length', None)


def _relative_by_layer(module: nn.Module, x_BLD: jax.Array, q_BLHK: jax.Array,
                       k_BMJK: jax.Array, k_positions_BM: jax.Array,
                       ctx: Context) -> jax.Array:
  return RelativeBias(module.config, module.kind.causal, name='relative_bias')(
      ctx.positions_BL, k_positions_BM)


def _check_relative(c: ModelConfig, stack: str) -> None:
  """A quarter of an encoder's buckets, half of a decoder's, is exact; the
  others grow from there to max_distance."""
  relative = c.part(RelativeConfig)
  buckets, most = relative.buckets, relative.max_distance
  least = 2 if stack == 'decoder' else 4
  exact = buckets // (4 if stack == 'encoder' else 2)
  require(buckets >= least and buckets % 2 == 0 and most > exact,
          f'model.relative.buckets is {buckets} and model.relative.max_distance'
          f' {most}: model.arch {c.arch} needs an even number of buckets, '
          f'{least} or more, {exact} of which are of one distance each, and a '
          'larger distance')


@dataclasses.dataclass(frozen=True)
class ProfilesConfig:
  """Of position relative_by_token."""
  GROUP = 'profiles'
  rank: int = field(16, 'profiles of the bias by distance, of which each token '
                    'mixes its own', above=0, resume=SHAPES)
  extent: int = field(1024, 'distances that have a bias: 0 to extent - 1',
                      above=0, resume=SHAPES)


def _by_token(module: nn.Module, x_BLD: jax.Array, q_BLHK: jax.Array,
              k_BMJK: jax.Array, k_positions_BM: jax.Array, ctx: Context
              ) -> jax.Array:
  """A bias that a token makes of its own (Inkling: Thinking Machines 2026, as
  transformers has it), [B, H, L, M]:

    bias_ij = (W_r x_i) P[:, i - j]     and 0 past the extent and for later keys

  Each head mixes the rows of P, which are profiles by distance. A wider model
  may have as many, so in muP W_r x are logits, as a router's.
  """
  del q_BLHK, k_BMJK
  c: ModelConfig = module.config  # type: ignore[attr-defined]
  profiles = c.part(ProfilesConfig)
  rank, extent = profiles.rank, profiles.extent
  mix_BLHU = layers.dense(
      module, 'profile', 'BLD,DHU->BLHU', x_BLD,
      (c.d_model, c.num_heads, rank), ('embed', 'heads', None), output=True,
      with_bias=False, deterministic=ctx.deterministic) / c.widening
  profiles_UM = declare(module, 'profiles',
                        nn.initializers.normal(c.init_stddev), (rank, extent),
                        Role((None, None), inputs=(0,)))
  by_distance_BHLM = layers.einsum('BLHU,UM->BHLM', mix_BLHU, profiles_UM,
                                   c.compute_dtype, jnp.float32)
  distance_BLM = ctx.positions_BL[:, :, None] - k_positions_BM[:, None]
  bias_BHLM = jnp.take_along_axis(by_distance_BHLM, jnp.clip(
      distance_BLM, 0, extent - 1)[:, None], -1)
  inside_BLM = (distance_BLM >= 0) & (distance_BLM < extent)
  return jnp.where(inside_BLM[:, None], bias_BHLM, 0)


def _check_profiles(c: ModelConfig, stack: str) -> None:
  require(stack == 'decoder' and c.mixer == 'attention',
          "model.position is 'relative_by_token', a bias of earlier keys by "
          'model.mixer attention in a decoder: choose these, or position '
          'relative_by_layer')


POSITIONS = {
    'disentangled': Position(
        stack_table=disentangled.Distances, layer_bias=disentangled.bias,
        score_factor=lambda c: 3 ** -0.5, check=disentangled.check,
        settings=disentangled.DisentangledConfig),
    'learned': Position(
        embed=_add_learned, settings=LearnedConfig, reach=_learned_reach,
        longer=_longer_learned),
    'sinusoidal': Position(
        embed=_add_sinusoids, settings=SinusoidalConfig,
        check=check_sinusoids),
    'rope': Position(
        rotate=rotate,
        score_factor=_rope_score_factor,
        check=check_rope, longer=_longer_rope, settings=RopeConfig),
    'alibi': Position(layer_bias=_alibi),
    'relative': Position(
        stack_bias=RelativeBias, check=_check_relative,
        settings=RelativeConfig),
    'relative_by_layer': Position(
        layer_bias=_relative_by_layer, check=_check_relative,
        settings=RelativeConfig),
    'relative_by_token': Position(
        layer_bias=_by_token, check=_check_profiles,
        settings=ProfilesConfig),
    'none': Position(),
}
