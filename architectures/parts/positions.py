"""How a model knows where a token stands.

learned     x + P[pos] (GPT, BERT; P[pos + offset]: RoBERTa); ends at max_len,
            or is stretched
sinusoidal  x + PE[pos] (Vaswani et al. 2017, section 3.5)
rope        q and k turned by pos * frequency (Su et al. 2021)
alibi       scores - slope_h * distance (Press et al. 2022)
relative    scores + b[h, bucket(distance)] (Raffel et al. 2020, section 2.1)
none        nothing

An entry of POSITIONS, at the end of this file, is all that there is of one.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import linear
from architectures.parts import rotary
from architectures.parts import sharding
from architectures.parts.config import ModelConfig
from architectures.parts.roles import Role, declare
from configs.errors import require
from configs.fields import field, FUNCTION, SHAPES

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
  """Of position relative: T5's buckets (Raffel et al. 2020, section 2.1)."""
  buckets: int = field(32, 'buckets of distances', above=0, resume=SHAPES)
  max_distance: int = field(
      128, 'the last bucket has all larger distances', above=0,
      resume=FUNCTION)


def _as_it_is(c: ModelConfig, length: int, multiple: int, interpolate: bool
              ) -> dict[str, Optional[ModelConfig]]:
  del interpolate
  return {c.position: c if length * multiple <= reach(c) else None}


@dataclasses.dataclass(frozen=True)
class Position:
  """One position encoding; a hook that is None is not called.

  Attributes:
    embed: (module, x_BLD, positions_BL) -> x_BLD, at the embedding. `module` is
      the skeleton's Embed: parameters that are declared in it stand beside the
      table of tokens.
    rotate: (x_BLHK, positions_BL, config, how many tokens a row has room for)
      -> x_BLHK, of queries and of keys.
    bias: (config, q_positions_BL, k_positions_BM) -> [B, H, L, M], added to the
      scores, in each layer anew.
    score_factor: config -> what multiplies the scores; None: nothing does.
    stack_bias: the same once for all layers of a stack: a module of (config,
      causal), called with both positions. Its parameters stand in the stack,
      under the encoding's name and '_bias'.
    settings: the group of fields of config.model that it reads.
    check: (config, stack) -> None; raises RequestError for fields that do not
      fit together. `stack` is what architectures.stack returns.
    reach: config -> how many positions there are; None: no end.
    longer: (config, length, multiple, interpolate) -> {name: config}, how it
      is evaluated at a multiple of its training length. A config is None where
      the model refuses; `interpolate` is whether learned positions may be
      stretched.
  """
  embed: Optional[Callable] = None
  rotate: Optional[Callable] = None
  bias: Optional[Callable] = None
  stack_bias: Optional[type[nn.Module]] = None
  score_factor: Optional[Callable[[ModelConfig], float]] = None
  settings: Optional[type] = None
  check: Optional[Callable[[ModelConfig, str], None]] = None
  reach: Optional[Callable[[ModelConfig], int]] = None
  longer: Callable = _as_it_is

  @property
  def has_bias(self) -> bool:
    """Whether scores have a bias, which fused kernels do not add."""
    return bool(self.bias or self.stack_bias)


def of(c: ModelConfig) -> Position:
  """Returns the position encoding of a model."""
  return POSITIONS[c.position]


def score_factor(c: ModelConfig) -> float:
  """Returns what the encoding multiplies the scores by."""
  factor = of(c).score_factor
  return factor(c) if factor else 1.0


def reach(c: ModelConfig) -> float:
  """Returns how many positions the model has; infinity where they have no end.
  """
  return of(c).reach(c) if of(c).reach else math.inf


def lengths_apart(c: ModelConfig) -> tuple[int, ...]:
  """Returns the lengths, ascending, on whose sides a row turns otherwise, in
  some layers of a model; (): no length counts. Beyond the last one each may."""
  kinds = [c.of_kind(name) for name in c.kinds_used]
  return tuple(sorted({
      k.rope.original_len for k in kinds
      if of(k).rotate and rotary.SCALINGS[k.rope.scaling].by_length}))


def check_length(c: ModelConfig, length: int) -> None:
  """Raises RequestError where the positions do not reach `length`.

  `positions_BL` that are passed in are values on the device, which a compiled
  program cannot refuse: there a row past the table is the table's last.
  """
  if length <= reach(c):
    return
  stretch = (', or set model.learned.stretch to '
             f'{-(-length // c.max_len)} to interpolate' if c.learned else '')
  require(False, f'a sequence of {length} tokens is longer than the {reach(c)} '
          f'positions that this model has learned: shorten it{stretch}')


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


def _add_sinusoids(module: nn.Module, x_BLD: jax.Array, positions_BL: jax.Array
                   ):
  c = module.config
  return x_BLD + sinusoid(positions_BL, c.d_model, c.sinusoidal.layout).astype(
      x_BLD.dtype)


def _check_sinusoids(c: ModelConfig, stack: str) -> None:
  del stack
  least = 4 if c.sinusoidal.layout == 'fairseq' else 2  # it divides by D/2 - 1
  require(c.d_model % 2 == 0 and c.d_model >= least,
          f'model.d_model is {c.d_model}: sinusoidal positions, '
          f'{c.sinusoidal.layout}, need it even and at least {least}')


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


def _add_learned(module: nn.Module, x_BLD: jax.Array, positions_BL: jax.Array):
  c = module.config
  check_length(c, x_BLD.shape[1])
  table_LD = linear.embedding(module, 'positions',
                              c.max_len + c.learned.offset)
  return x_BLD + learned(sharding.constrain(table_LD, None, None),
                         positions_BL, c.learned.stretch,
                         c.learned.offset).astype(x_BLD.dtype)


def _learned_reach(c: ModelConfig) -> int:
  # The quotient of two lengths times one of them may lie just below the other.
  return math.floor(c.max_len * c.learned.stretch + 1e-6)


def _longer_learned(c: ModelConfig, length: int, multiple: int,
                    interpolate: bool):
  if length * multiple <= _learned_reach(c):
    return {'learned': c}
  stretched = dataclasses.replace(c, learned=dataclasses.replace(
      c.learned, stretch=length * multiple / c.max_len))
  return {'learned': None} | (
      {'learned, interpolated': stretched} if interpolate else {})


def _check_rope(c: ModelConfig, stack: str) -> None:
  del stack
  dim = rotary.rotary_dim(c)
  require(dim % 2 == 0 and dim > 0,
          f'model.rope.fraction {c.rope.fraction} of model.head_dim '
          f'{c.head_dim} is {dim}: rotary positions turn pairs, so it must be '
          'even and > 0')
  rotary.SCALINGS[c.rope.scaling].check(c.rope, dim)


def _longer_rope(c: ModelConfig, length: int, multiple: int,
                 interpolate: bool):
  """As it is and, unless it is stretched already, with each scaling that a
  factor alone tells."""
  del interpolate
  if c.rope.scaling != 'none':
    return {f'rope, {c.rope.scaling}': c}
  scaled = lambda name: c if multiple == 1 else dataclasses.replace(
      c, rope=dataclasses.replace(c.rope, scaling=name, factor=float(multiple),
                                  original_len=length))
  return {'rope': c} | {f'rope, {name}': scaled(name)
                        for name, row in rotary.SCALINGS.items()
                        if row.by_multiple and name != 'none'}


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


def _alibi_bias(c: ModelConfig, q_positions_BL: jax.Array,
                k_positions_BM: jax.Array):
  return alibi(q_positions_BL, k_positions_BM, c.num_heads)


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
  """T5's bias on the scores, [B or 1, H, L, M], shared by all layers."""
  config: ModelConfig
  causal: bool

  @nn.compact
  def __call__(self, q_positions_BL: jax.Array,
               k_positions_BM: jax.Array) -> jax.Array:
    c = self.config
    stddev = c.base_width ** -0.5 if c.init == 'fan_in' else c.init_stddev
    table = declare(self, 'table', nn.initializers.normal(stddev),
                    (c.relative.buckets, c.num_heads), Role((None, 'heads')))
    bucket_BLM = relative_bucket(
        k_positions_BM[:, None] - q_positions_BL[:, :, None],
        bidirectional=not self.causal, buckets=c.relative.buckets,
        max_distance=c.relative.max_distance)
    bias_BHLM = jnp.moveaxis(table[bucket_BLM], -1, 1).astype(jnp.float32)
    return sharding.constrain(bias_BHLM, None, 'heads', 'length', None)


def _check_relative(c: ModelConfig, stack: str) -> None:
  """A quarter of an encoder's buckets, half of a decoder's, is exact; the
  others grow from there to max_distance."""
  least = 2 if stack == 'decoder' else 4
  exact = c.relative.buckets // (4 if stack == 'encoder' else 2)
  require(c.relative.buckets >= least and c.relative.buckets % 2 == 0,
          f'model.relative.buckets is {c.relative.buckets}: model.arch '
          f'{c.arch} needs an even number, {least} or more')
  require(c.relative.max_distance > exact,
          f'model.relative.max_distance is {c.relative.max_distance}: of '
          f'model.relative.buckets {c.relative.buckets}, {exact} are of one '
          'distance each, so it must be larger')


POSITIONS = {
    'learned': Position(
        embed=_add_learned, settings=LearnedConfig, reach=_learned_reach,
        longer=_longer_learned),
    'sinusoidal': Position(
        embed=_add_sinusoids, settings=SinusoidalConfig,
        check=_check_sinusoids),
    'rope': Position(
        rotate=rotary.rotate, score_factor=rotary.score_factor,
        check=_check_rope, longer=_longer_rope, settings=rotary.RopeConfig),
    'alibi': Position(bias=_alibi_bias),
    'relative': Position(
        stack_bias=RelativeBias, check=_check_relative,
        settings=RelativeConfig),
    'none': Position(),
}
