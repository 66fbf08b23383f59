"""Tables whose rows a layer looks up by the last few tokens, or by the token:
parameters that nothing multiplies.

Of n-grams there are, for each order n from 2 to N, `heads` tables. With odd
numbers a_i, and p, a prime that is each table's own, a token reads the row

  h = ((a_0 t_l) xor (a_1 t_(l-1)) xor ... xor (a_(n-1) t_(l-n+1))) mod p

in integers of 64 bits, where t are the tokens of its document, and pad_token
stands before them. e, [U], are the rows of all tables, one after another.

engram (Cheng et al. 2026, arXiv 2601.07372, section 2; in transformers
Qwen4ExpTextPLELayer) is, before a layer whose input is x,

  g  = n(W_K e) . n(x) / sqrt(D)
  v  = sigmoid(sign(g) sqrt(|g|)) W_V e
  x' = x + v + silu(conv(n(v)))

n is the model's norm, each time with its own scale. The convolution is of each
feature by itself, over tokens that are N places apart, and 0 at first. The
authors also join tokens that differ by case and accents alone, which is a
tokenizer's work and not done here, and give each layer its own a_i and primes;
here all layers hash alike, as layers that are scanned must. Of several streams
each has its own W_K, norms, g and convolution, and W_V is one (Qwen4-Exp).

over_encoding (Huang et al. 2025, arXiv 2501.16975, section 3.2) is

  x' = x + W e

before the first layer, where x is the embedding of the tokens.

A row of a batch keeps its last N - 1 tokens, and the last inputs of the
convolution.

per_layer (Gemma 3n and 4) has a table E of the vocabulary for each layer. With
x_0, the embedding of the tokens, S features of a row, and x, what the layer
returns,

  e  = (n(W_0 x_0 / sqrt(D)) + sqrt(S) E_t) / sqrt(2)
  x' = x + n(W_out (gelu(W_gate x) * e))

Gemma's layers have the scale of the first norm in common; here each has one.

The tables are sharded by rows, over fsdp and the experts' axis, and only rows
that were looked up are sent.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple, Optional

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import layers, sharding
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.recurrent import features
from architectures.parts.sharding import Role, declare
from architectures.parts.streams import StreamsConfig
from common.errors import require
from common.fields import field, FUNCTION, SHAPES

NAME_OF_NO_MEMORY = 'none'  # model.memory of layers that read nothing
ROWS_ARE_MULTIPLE_OF = 128  # rows of all tables together are a multiple of it
SEED_OF_MULTIPLIERS = 1234  # of a_i, as in transformers


@dataclasses.dataclass(frozen=True)
class NGramsConfig:
  """The fields of memory engram and memory over_encoding."""
  GROUP = 'ngrams'
  order: int = field(3, 'N, the tokens of the longest n-gram', least=2,
                     resume=SHAPES)
  heads: int = field(4, 'tables of each order', least=1, resume=SHAPES)
  rows: int = field(4096, 'The rows of a table: the primes from this number '
                    'on, one a table.', least=2, most=2**30, resume=SHAPES)
  size: int = field(0, 'features of a row; derived: d_model / the number of '
                    'tables', resume=SHAPES)
  pad_token: int = field(0, 'the token that stands before a document',
                         resume=FUNCTION)
  stops: bool = field(False, 'whether no n-gram reaches over a pad_token',
                      resume=FUNCTION)
  kernel: int = field(4, 'of engram: tokens that the convolution sees, the '
                      'token itself included', least=2, resume=SHAPES)

  @property
  def tables(self) -> int:
    return (self.order - 1) * self.heads

  def derived(self, c: ModelConfig) -> 'NGramsConfig':
    return dataclasses.replace(self, size=self.size or c.d_model // self.tables)


@dataclasses.dataclass(frozen=True)
class PerLayerConfig:
  """The fields of memory per_layer."""
  size: int = field(0, 'features of a row; derived: d_model / 8', resume=SHAPES)

  def derived(self, c: ModelConfig) -> 'PerLayerConfig':
    return dataclasses.replace(self, size=self.size or max(1, c.d_model // 8))


@struct.dataclass
class State:
  """The last N - 1 tokens of each row, and what the convolution saw last."""
  tokens_BW: jax.Array
  inputs_BWD: Optional[jax.Array] = None


# Hashing: integers of 64 bits as two of 32, high and low, as JAX has no others.


_STEP_OF_SPLITMIX, _MASK_OF_64_BITS = 0x9E3779B97F4A7C15, 2**64 - 1


def _splitmix64(x: int) -> int:
  """SplitMix64 (Steele et al. 2014)."""
  x = (x + _STEP_OF_SPLITMIX) & _MASK_OF_64_BITS
  x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_OF_64_BITS
  x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_OF_64_BITS
  return x ^ (x >> 31)


def hash_multipliers(vocab_size: int, order: int) -> list[int]:
  """Returns a_i: odd, and so small that no product with a token reaches 2^63.
  """
  most = max(1, (2**63 - 1) // vocab_size // 2)
  return [2 * (_splitmix64((SEED_OF_MULTIPLIERS + i * _STEP_OF_SPLITMIX)
               & _MASK_OF_64_BITS) % most) + 1 for i in range(1, order + 1)]


@functools.cache
def first_primes(least: int, count: int) -> tuple[int, ...]:
  """Returns the first so many primes from `least` on."""
  is_prime = lambda n: n > 1 and all(
      n % divisor for divisor in range(2, math.isqrt(n) + 1))
  return tuple(itertools.islice(filter(is_prime, itertools.count(least)),
                                count))


def _multiply_to_64_bits(t: jax.Array, a: int) -> tuple[jax.Array, jax.Array]:
  """Returns t * a, of uint32 and an integer below 2^63, as high and low."""
  a0, a1, high = (np.uint32(x) for x in (a & 0xffff, a >> 16 & 0xffff, a >> 32))
  t0, t1, half = t & 0xffff, t >> 16, lambda x: x & 0xffff
  middle = (t0 * a0 >> 16) + half(t0 * a1) + half(t1 * a0)
  return (t1 * a1 + (t0 * a1 >> 16) + (t1 * a0 >> 16) + (middle >> 16)
          + t * high, half(t0 * a0) | middle << 16)


def _remainders_of_64_bits(
  high: jax.Array, low: jax.Array, by: tuple[int, ...]) -> jax.Array:
  """Returns the number modulo each of `by`, which becomes the last axis: a long
  division, whose digits have as many bits as fit beside a rest."""
  by_K = jnp.asarray(by, jnp.uint32).reshape((1,) * low.ndim + (-1,))
  rest, left = high[..., None] % by_K, 32
  while left:
    bits = min(32 - max(by).bit_length(), left)
    left -= bits
    digit = low[..., None] >> left & np.uint32(2**bits - 1)
    rest = (rest << bits | digit) % by_K
  return rest


def hash_ngrams(c: ModelConfig, all_BM: jax.Array,
           segment_ids_BL: Optional[jax.Array] = None) -> jax.Array:
  """Returns which rows each token reads, [B, L, tables]: orders one after
  another, all tables counted through.

  Args:
    c: the config.
    all_BM: the tokens, after the N - 1 that stand before them.
    segment_ids_BL: documents; the leading axis may be 1.
  """
  m, places = c.part(NGramsConfig), []
  by = first_primes(m.rows, m.tables)
  L = all_BM.shape[1] - m.order + 1
  mixed: tuple[jax.Array, ...] = ()
  over_BL = jnp.zeros((1, 1), bool)
  for back, a in enumerate(hash_multipliers(c.vocab_size, m.order)):
    t_BL = all_BM[:, m.order - 1 - back:][:, :L]
    if segment_ids_BL is not None:
      t_BL = m.pad_token + features.of_one_document(
          t_BL - m.pad_token, segment_ids_BL, back)
    if m.stops and back:
      over_BL |= t_BL == m.pad_token
      t_BL = jnp.where(over_BL, m.pad_token, t_BL)
    product = _multiply_to_64_bits(t_BL.astype(jnp.uint32), a)
    if not back:
      mixed = product
      continue
    mixed = tuple(x ^ y for x, y in zip(mixed, product))
    places.append(_remainders_of_64_bits(
      *mixed, by[(back - 1) * m.heads:back * m.heads]))
  first = np.cumsum((0, *by[:-1]))[None, None]
  return jnp.concatenate(places, -1).astype(jnp.int32) + first


def _read_ngram_tables(module: nn.Module, ctx: Context, state: Optional[State]
               ) -> tuple[jax.Array, jax.Array]:
  """Returns e, [B, L, U], and the last N - 1 tokens."""
  c: Any = module.config  # type: ignore[attr-defined]
  m, tokens_BL = c.part(NGramsConfig), ctx.tokens_BL
  assert tokens_BL is not None
  before_BW = state.tokens_BW if state else jnp.full(
      (len(tokens_BL), m.order - 1), m.pad_token, tokens_BL.dtype)
  all_BM = jnp.concatenate([before_BW, tokens_BL], 1)
  e_BLUS = _read_rows_of_table(
  module, sum(
    first_primes(
      m.rows, m.tables)), m.size, hash_ngrams(
        c, all_BM, ctx.segment_ids_BL))
  after_BW = features.last(all_BM, m.order - 1, tokens_BL.shape[1],
                           None if state is None else ctx.valid_BL)
  e_BLU = e_BLUS.reshape(*tokens_BL.shape, -1)
  return sharding.constrain(e_BLU, 'batch', 'length', 'mlp'), after_BW


def _read_rows_of_table(
  module: nn.Module,
  rows: int,
  size: int,
   ids_BLU: jax.Array ) -> jax.Array:
  """Declares a table and returns the rows of these ids, [B, L, U, size]."""
  c: Any = module.config  # type: ignore[attr-defined]
  table_IS = declare(
      module, 'table', nn.initializers.normal(c.init_stddev),
      (-(-rows // ROWS_ARE_MULTIPLE_OF) * ROWS_ARE_MULTIPLE_OF, size),
      Role(('table', None), inputs=(0,), kind='embedding',
           reads=ids_BLU.shape[-1]))
  return sharding.look_up_sharded_rows(table_IS, ids_BLU, c.compute_dtype)


def _project(module: nn.Module, name: str, x_BLI: jax.Array, size: int = 0,
             axes: tuple[str, str] = ('mlp', 'embed'), **how: Any) -> jax.Array:
  c: Any = module.config  # type: ignore[attr-defined]
  w_IO = layers.weight(module, name, (x_BLI.shape[-1], size or c.d_model), axes,
                       **how)
  return layers.einsum('BLI,IO->BLO', x_BLI, w_IO, c.compute_dtype, axes=axes)


def gate_values(key_BLD: jax.Array, x_BLD: jax.Array, value_BLD: jax.Array
          ) -> jax.Array:
  """Returns v of the module's docstring, of n(W_K e), n(x) and W_V e; the first
  two may be of streams, [B, L, U, D]. The root is of 1e-6 at least, as in the
  authors' program."""
  key, x, value = (a.astype(jnp.float32) for a in (key_BLD, x_BLD, value_BLD))
  if x.ndim > value.ndim:
    value = jnp.broadcast_to(value[:, :, None], x.shape)
  g_BL = features.dots(key, x) * x.shape[-1] ** -0.5
  g_BL = jnp.sign(g_BL) * jnp.sqrt(jnp.maximum(jnp.abs(g_BL), 1e-6))
  return features.scaled(value, jax.nn.sigmoid(g_BL)).astype(value_BLD.dtype)


class Engram(nn.Module):
  """(x_BLD, context, state) -> (what is added to x_BLD, state). x may be
  several streams, [B, L, U, D]."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, state: Optional[State]):
    c, shape = self.config, x_BLD.shape
    m, size = c.part(NGramsConfig), math.prod(shape[2:])
    norm = functools.partial(
        layers.norm if x_BLD.ndim == 3 else layers.norm_of_streams, c)
    e_BLU, tokens_BW = _read_ngram_tables(self, ctx, state)
    v_BLD = layers.recompute_in_backward(gate_values)(
        norm('key_norm')(_project(self, 'key', e_BLU, size).reshape(shape)),
        norm('query_norm')(x_BLD),
        _project(self, 'value', e_BLU, residual=True))
    w_WD = declare(self, 'conv', nn.initializers.zeros, (m.kernel, size),
                   Role((None, 'embed')))
    y_BLD, inputs_BWD = features.convolve(
        norm('conv_norm')(v_BLD).reshape(*shape[:2], size), w_WD,
        before_BWHK=state and state.inputs_BWD,
        segment_ids_BL=ctx.segment_ids_BL,
        valid_BL=None if state is None else ctx.valid_BL, silu=True,
        apart=m.order)
    if state is not None:
      state = State(tokens_BW, inputs_BWD)
    return v_BLD + y_BLD.reshape(shape), state


class OverEncoding(nn.Module):
  """(x_BLD, context, state) -> (what is added to x_BLD, state)."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, state: Optional[State]):
    e_BLU, tokens_BW = _read_ngram_tables(self, ctx, state)
    y_BLD = _project(self, 'value', e_BLU)
    return y_BLD, None if state is None else State(tokens_BW)


class PerLayer(nn.Module):
  """(x_BLD, context) -> what is added to x_BLD."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context) -> jax.Array:
    c, size = self.config, self.config.part(PerLayerConfig).size
    assert ctx.tokens_BL is not None and ctx.embedded_BLD is not None
    row_BLS = _read_rows_of_table(
      self, c.vocab_size, size, ctx.tokens_BL[..., None])[:, :, 0]
    into = functools.partial(_project, self, size=size, axes=('embed', 'mlp'))
    seen_BLS = layers.norm(c, 'input_norm', 'mlp')(layers.multiply_exactly(
        into('input', ctx.embedded_BLD), c.d_model ** -0.5))
    e_BLS = layers.multiply_exactly(
  seen_BLS +
  layers.multiply_exactly(
    row_BLS,
    size ** 0.5),
    2 ** -
    0.5)
    gate_BLS = layers.recompute_in_backward(
      layers.gelu_tanh)(into('gate', x_BLD))
    return layers.norm(c, 'out_norm')(
        _project(self, 'out', gate_BLS * e_BLS, residual=True))


def keeps_last_tokens(c: ModelConfig) -> bool:
  """Whether the layers of one kind keep the last tokens of a row."""
  memory = MEMORIES[c.memory]
  return memory is not None and memory.settings is NGramsConfig


def empty_state(c: ModelConfig, shape: tuple[int, ...]) -> State:
  """Returns the state of rows without a token; `shape` is [..., B, M], and the
  state does not depend on M."""
  m = c.part(NGramsConfig)
  tokens_BW = jnp.full((*shape[:-1], m.order - 1), m.pad_token, jnp.int32)
  if c.memory != 'engram':
    return State(tokens_BW)
  size = c.d_model
  if c.residual != 'plain':
    size *= c.part(StreamsConfig).count
  return State(tokens_BW, jnp.zeros(
      (*shape[:-1], (m.kernel - 1) * m.order, size), c.compute_dtype))


def check_memory(c: ModelConfig) -> None:
  """Raises RequestError for what a layer that reads tables cannot be."""
  reads = f'model.memory is {c.memory!r}'
  require(c.residual == 'plain' or (
      c.memory == 'engram' and c.residual != 'attention'),
          f'{reads}, which adds to one stream, and model.residual '
          f"{c.residual!r} has others: set it to 'plain'")
  require(c.parametrization == 'standard', f'{reads}, for which '
          f'model.parametrization {c.parametrization!r} has no rules: set it '
          "to 'standard'")
  if not keeps_last_tokens(c):
    return
  m = c.part(NGramsConfig)
  require(m.size > 0, f'{reads}, and model.d_model {c.d_model} has not a '
          f'feature for each of the {m.tables} tables: set model.ngrams.size')
  require(m.pad_token < c.vocab_size, f'model.ngrams.pad_token is '
          f'{m.pad_token}, which is no token of {c.vocab_size}')
  rows = m.rows * m.tables
  require(rows < 2**31 - 2**20, f'model.ngrams.rows is {m.rows} in each of '
          f'{m.tables} tables, together {rows}: choose less, as rows are '
          'counted in 32 bits')


class TableMemory(NamedTuple):
  """A memory, which a layer reads beside its input.

  Attributes:
    module: (x_BLD, context, state) -> (what is added to x_BLD, state); of one
      that is read after the layer, without the state.
    settings: the group of fields of config.model that it reads.
    fields: of the group, those that this entry reads and others may not.
    after: whether it is read of what the layer returns.
  """
  module: type[nn.Module]
  settings: type = NGramsConfig
  fields: tuple[str, ...] = ()
  is_read_after_layer: bool = False


MEMORIES: dict[str, Optional[TableMemory]] = {
    NAME_OF_NO_MEMORY: None,
    'engram': TableMemory(Engram, fields=('ngrams.kernel',)),
    'over_encoding': TableMemory(OverEncoding),
    'per_layer': TableMemory(
        PerLayer, PerLayerConfig, is_read_after_layer=True),
}
