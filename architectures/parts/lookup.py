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

The first norm is RMSNorm, whose scale all layers have in common.

The tables are sharded by rows, over fsdp and the experts' axis, and only rows
that were looked up are sent.

smear (modded-nanogpt) reads no table, but the input of the token before: see
Smear. A row of a batch keeps the last one.
"""

import dataclasses
import functools
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
from architectures.parts.streams import RESIDUALS
from common.errors import require
from common.fields import field, FUNCTION, SHAPES

# The values of model.memory of layers that look up no table, and of those that
# read the token before.
NAME_OF_NO_MEMORY = 'none'
NAME_OF_SMEAR = 'smear'
# The rows of all tables together are a multiple of it, so that a mesh divides
# them.
ROWS_ARE_MULTIPLE_OF = 128
# The seed from which a_i are drawn, as in transformers.
SEED_OF_MULTIPLIERS = 1234
# The least number whose root the gate of engram takes, as in the authors'
# program: the root of 0 has no gradient.
LEAST_NUMBER_UNDER_ROOT = 1e-6


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
    """The number of tables."""
    return (self.order - 1) * self.heads

  def derived(self, config: ModelConfig) -> 'NGramsConfig':
    return dataclasses.replace(self,
                               size=self.size or config.d_model // self.tables)


@dataclasses.dataclass(frozen=True)
class PerLayerConfig:
  """The fields of memory per_layer."""
  size: int = field(0, 'features of a row; derived: d_model / 8', resume=SHAPES)

  def derived(self, config: ModelConfig) -> 'PerLayerConfig':
    return dataclasses.replace(self,
                               size=self.size or max(1, config.d_model // 8))


@dataclasses.dataclass(frozen=True)
class SmearConfig:
  """The fields of memory smear."""
  features: int = field(
      12, 'The features of the input of a token, from the first on, of which '
      'its gate is made.', least=1, resume=SHAPES)


@struct.dataclass
class State:
  """The part of a cache for a layer that reads n-grams or the token before.

  Attributes:
    tokens_BW: the last N - 1 tokens; None: the layer reads no n-grams.
    inputs_BWD: the last inputs of engram's convolution, or of smear.
  """
  tokens_BW: Optional[jax.Array] = None
  inputs_BWD: Optional[jax.Array] = None


# Hashing: integers of 64 bits as two of 32, high and low, as JAX has no others.


_STEP_OF_SPLITMIX = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
_MASK_OF_64_BITS = 2**64 - 1


def _splitmix64(x: int) -> int:
  """Returns a random integer of 64 bits that x determines: one step of
  SplitMix64 (Steele et al. 2014)."""
  x = (x + _STEP_OF_SPLITMIX) & _MASK_OF_64_BITS
  x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_OF_64_BITS
  x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_OF_64_BITS
  return x ^ (x >> 31)


def hash_multipliers(vocab_size: int, order: int) -> list[int]:
  """Returns the factors by which the hash of an n-gram multiplies its tokens.
  They are odd, and so small that no product with a token reaches 2^63.

  Args:
    vocab_size: the number of different tokens.
    order: the length of the longest n-gram, which is how many factors there
      are.

  Returns:
    The factors. They are the same in each run, as they belong to the model.
  """
  # A factor is 2r + 1 with r below this limit, where r is drawn by splitmix64,
  # a generator whose i-th number follows from the seed and i alone.
  limit = max(1, (2**63 - 1) // vocab_size // 2)
  multipliers = []
  for i in range(1, order + 1):
    seed = (SEED_OF_MULTIPLIERS + i * _STEP_OF_SPLITMIX) & _MASK_OF_64_BITS
    multipliers.append(2 * (_splitmix64(seed) % limit) + 1)
  return multipliers


@functools.cache
def first_primes(least: int, count: int) -> tuple[int, ...]:
  """Returns the first `count` primes that are not below `least`."""
  primes: list[int] = []
  number = max(least, 2)
  while len(primes) < count:
    possible_divisors = range(2, math.isqrt(number) + 1)
    if all(number % divisor for divisor in possible_divisors):
      primes.append(number)
    number += 1
  return tuple(primes)


def _multiply_to_64_bits(token: jax.Array, factor: int
                         ) -> tuple[jax.Array, jax.Array]:
  """Multiplies tokens by a factor in 64 bits. The result is two halves of 32
  bits, because JAX has no integers of 64 bits by default.

  The numbers are cut into parts of 16 bits, whose products fit into 32 bits.
  With t = t1 2^16 + t0 and a = a2 2^32 + a1 2^16 + a0,

    t a = (t1 a1 + t a2) 2^32 + (t1 a0 + t0 a1) 2^16 + t0 a0   modulo 2^64

  Args:
    token: t, uint32 of any shape.
    factor: a, an integer below 2^63.

  Returns:
    The high and the low 32 bits of the product, uint32 of the token's shape.
  """
  mask = 0xffff  # the low half of 32 bits
  a0 = np.uint32(factor & mask)
  a1 = np.uint32(factor >> 16 & mask)
  a2 = np.uint32(factor >> 32)
  t0, t1 = token & mask, token >> 16
  # `middle` adds up bits 16 to 31 of the product. What exceeds 16 bits of it is
  # carried over to the high half.
  middle = (t0 * a0 >> 16) + (t0 * a1 & mask) + (t1 * a0 & mask)
  low = t0 * a0 & mask | middle << 16
  high = (t1 * a1 + (t0 * a1 >> 16) + (t1 * a0 >> 16) + (middle >> 16)
          + token * a2)
  return high, low


def _remainders_of_64_bits(high: jax.Array, low: jax.Array,
                           divisors: tuple[int, ...]) -> jax.Array:
  """Returns the remainders of 64-bit numbers by K divisors, computed with
  integers of 32 bits only.

  This is a long division. Its digits have as many bits as fit into 32 bits
  behind a remainder.

  Args:
    high: the high 32 bits of the numbers, uint32 of any shape [...].
    low: the low 32 bits, of the same shape.
    divisors: the K divisors, all below 2^31, so that a digit has a bit at
      least.

  Returns:
    The remainders, uint32 [..., K].
  """
  divisor_K = jnp.asarray(divisors, jnp.uint32)
  divisor_K = divisor_K.reshape((1,) * low.ndim + (-1,))
  bits_that_fit = 32 - max(divisors).bit_length()
  # The high half is the first digit. The low half is brought down a few bits at
  # a time: the new number is remainder * 2^bits + digit, below 2^32.
  remainder = high[..., None] % divisor_K
  bits_left = 32
  while bits_left:
    bits = min(bits_that_fit, bits_left)
    bits_left -= bits
    digit = low[..., None] >> bits_left & np.uint32(2**bits - 1)
    remainder = (remainder << bits | digit) % divisor_K
  return remainder


def hash_ngrams(config: ModelConfig, all_BM: jax.Array,
                segment_ids_BL: Optional[jax.Array] = None) -> jax.Array:
  """Hashes the n-grams that end at each token, which gives the rows that the
  token reads of the tables of n-grams.

  The hash of an n-gram is the xor of its tokens, each times a factor for its
  place. Each table reads the row that is the hash modulo a prime of its own.

  Args:
    config: the config of the layer.
    all_BM: the token ids, [batch, M = N - 1 + L]: L tokens of each row, after
      the N - 1 that stand before them, where N is the longest n-gram.
    segment_ids_BL: the document of each of the L tokens; B may be 1 here. None:
      each row is one document.

  Returns:
    The rows, int32 [B, L, tables], counted through all tables: first those of
    2-grams, then those of 3-grams, and so on.
  """
  ngrams = config.part(NGramsConfig)
  divisors = first_primes(ngrams.rows, ngrams.tables)
  L = all_BM.shape[1] - ngrams.order + 1
  rows_of_orders = []
  hashes: tuple[jax.Array, ...] = ()
  is_past_stop_BL = jnp.zeros((1, 1), bool)
  multipliers = hash_multipliers(config.vocab_size, ngrams.order)
  for back, multiplier in enumerate(multipliers):
    # The token that stands `back` places before each, in the same document.
    # Where another document stands there, it counts as pad_token: the mask
    # writes 0, so pad_token is subtracted before it and added after it.
    token_BL = all_BM[:, ngrams.order - 1 - back:][:, :L]
    if segment_ids_BL is not None:
      token_BL = ngrams.pad_token + features.mask_other_documents(
          token_BL - ngrams.pad_token, segment_ids_BL, back)
    # From the first pad_token on, all tokens before it count as pad_token.
    if ngrams.stops and back:
      is_past_stop_BL |= token_BL == ngrams.pad_token
      token_BL = jnp.where(is_past_stop_BL, ngrams.pad_token, token_BL)
    # The hashes of the n-grams of back + 1 tokens: those that are one shorter,
    # xor this token's product. A single token is no n-gram, and reads no table.
    product = _multiply_to_64_bits(token_BL.astype(jnp.uint32), multiplier)
    if not back:
      hashes = product
      continue
    hashes = tuple([x ^ y for x, y in zip(hashes, product)])
    high, low = hashes
    first_table = (back - 1) * ngrams.heads
    rows_of_orders.append(_remainders_of_64_bits(
        high, low, divisors[first_table:first_table + ngrams.heads]))
  # The first row of each table, counted through all tables.
  first_rows = np.cumsum((0, *divisors[:-1]))[None, None]
  return jnp.concatenate(rows_of_orders, -1).astype(jnp.int32) + first_rows


def _read_ngram_tables(module: nn.Module, ctx: Context, state: Optional[State]
                       ) -> tuple[jax.Array, jax.Array]:
  """Looks up the vectors of the n-grams that end at each token: a hash of the
  last n tokens chooses a row of a table.

  The suffixes name axes: B batch, L length, W = N - 1 tokens before those (N is
  the longest n-gram), M = W + L tokens, T tables, S features of a row, U
  features of the rows of all tables.

  Args:
    module: the module that declares the table, which holds all tables one after
      another.
    ctx: the context of the call, which has the tokens, [batch, length].
    state: the tokens before those of this call; None: there are none.

  Returns:
    The vectors e of a token's n-grams side by side, [B, L, U]; and the last
    tokens of each row of the batch, [B, W], which the next call's n-grams begin
    with.
  """
  config: Any = module.config  # type: ignore[attr-defined]
  ngrams = config.part(NGramsConfig)
  tokens_BL = ctx.tokens_BL
  assert tokens_BL is not None
  B, L = tokens_BL.shape
  num_before = ngrams.order - 1

  # Put the tokens before those of this call in front of them. At a row's start
  # these are padding. Padding at the end matters only where a state is kept.
  valid_BL = None
  before_BW = jnp.full((B, num_before), ngrams.pad_token, tokens_BL.dtype)
  if state is not None:
    assert state.tokens_BW is not None
    before_BW = state.tokens_BW
    valid_BL = ctx.valid_BL
  all_BM = jnp.concatenate([before_BW, tokens_BL], axis=1)

  # Look up the vectors. All tables are one array, one behind the other, and
  # each has a prime number of rows.
  num_rows = sum(first_primes(ngrams.rows, ngrams.tables))
  row_ids_BLT = hash_ngrams(config, all_BM, ctx.segment_ids_BL)
  e_BLTS = _read_rows_of_table(
      module, num_rows=num_rows, size=ngrams.size, ids_BLU=row_ids_BLT)
  e_BLU = e_BLTS.reshape(B, L, -1)

  # Keep the last tokens that are no padding.
  after_BW = features.last_inputs(
      all_BM, count=num_before, length=L, valid_BL=valid_BL)
  return sharding.constrain(e_BLU, 'batch', 'length', 'mlp'), after_BW


def _read_rows_of_table(module: nn.Module, num_rows: int, size: int,
                        ids_BLU: jax.Array) -> jax.Array:
  """Declares a table of vectors and looks up some of its rows.

  Args:
    module: the module that declares the table, as its parameter 'table'.
    num_rows: the number of rows that are read; the table has as many, rounded
      up so that devices can divide them.
    size: the features of a row, S.
    ids_BLU: the U rows that each token reads, [batch, length, U].

  Returns:
    The rows, [B, L, U, S].
  """
  config: Any = module.config  # type: ignore[attr-defined]
  rounded_up = -(-num_rows // ROWS_ARE_MULTIPLE_OF) * ROWS_ARE_MULTIPLE_OF
  role = Role(axes=('table', None), inputs=(0,), kind='embedding',
              reads=ids_BLU.shape[-1])
  table_IS = declare(
      module, 'table', init=nn.initializers.normal(config.init_stddev),
      shape=(rounded_up, size), role=role)
  return sharding.look_up_sharded_rows(table_IS, ids_BLU, config.compute_dtype)


def _project(module: nn.Module, name: str, x_BLI: jax.Array, size: int = 0,
             axes: tuple[str, str] = ('mlp', 'embed'), **weight_options: Any
             ) -> jax.Array:
  """Multiplies each token by a weight, x W. The weight is declared here, as a
  parameter of the given module.

  The suffixes name axes: B batch, L length, I inputs, O outputs.

  Args:
    module: the module that declares W.
    name: the name of W, which is [I, O].
    x_BLI: the input x.
    size: O, the number of outputs; 0: d_model.
    axes: the logical axes of W, by which it is split over devices.
    **weight_options: further arguments of layers.weight.

  Returns:
    The product, [B, L, O].
  """
  config: Any = module.config  # type: ignore[attr-defined]
  w_IO = layers.weight(module, name,
                       shape=(x_BLI.shape[-1], size or config.d_model),
                       axes=axes, **weight_options)
  return layers.einsum('BLI,IO->BLO', x_BLI, w_IO, dtype=config.compute_dtype,
                       axes=axes)


def gate_values(key_BLD: jax.Array, x_BLD: jax.Array, value_BLD: jax.Array
                ) -> jax.Array:
  """Multiplies the values of looked-up vectors e by gates, which say how well e
  fits the residual stream x (Engram's memory):

    v = sigmoid(sign(g) sqrt(|g|)) W_V e,   g = n(W_K e) . n(x) / sqrt(D)

  where n is a norm.

  The suffixes name axes: B batch, L length, D d_model.

  Args:
    key_BLD: n(W_K e), [B, L, D]; with U residual streams, [B, L, U, D].
    x_BLD: n(x), of the same shape.
    value_BLD: W_V e, [B, L, D] in either case.

  Returns:
    v, of the shape of x.
  """
  key = key_BLD.astype(jnp.float32)
  x = x_BLD.astype(jnp.float32)
  value = value_BLD.astype(jnp.float32)
  # All streams have the same value, and each has its own gate.
  if x.ndim > value.ndim:
    value = jnp.broadcast_to(value[:, :, None], x.shape)
  g_BL = features.inner_products(key, x) * x.shape[-1] ** -0.5
  # The root has no finite gradient at 0, so its argument is kept above 0.
  root_BL = jnp.sqrt(jnp.maximum(jnp.abs(g_BL), LEAST_NUMBER_UNDER_ROOT))
  gate_BL = jax.nn.sigmoid(jnp.sign(g_BL) * root_BL)
  return features.scale_vectors(value, gate_BL).astype(value_BLD.dtype)


class Engram(nn.Module):
  """The memory engram: see the equations above.

  (x_BLD, context, state) -> (what is added to x_BLD, state). x may be several
  streams, [B, L, U, D].
  """
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, state: Optional[State]):
    """Computes what the memory Engram adds to the residual stream x. Vectors e
    are looked up in tables by the last few tokens (n-grams). Gates multiply
    their values v, and a causal convolution over tokens is added:

      v = gate(n(W_k e), n(x)) * W_v e,   y = v + silu(conv(n(v)))

    where n is a norm.

    The suffixes name axes: B batch, L length, D d_model, U features of e, W
    tokens that the convolution sees.

    Args:
      x_BLD: the residual stream, [B, L, D], or several, [B, L, streams, D].
      ctx: the context of the call, with the tokens and their documents.
      state: the last tokens and the last inputs of the convolution; None: there
        is no cache.

    Returns:
      y, in the shape of x, and the state after these tokens.
    """
    config, shape = self.config, x_BLD.shape
    ngrams = config.part(NGramsConfig)
    size = math.prod(shape[2:])  # the features of all streams
    make_norm = functools.partial(
        layers.norm if x_BLD.ndim == 3 else layers.norm_of_streams, config)
    # Look up the vectors e, and make the gated values v of them. Each residual
    # stream has keys and gates of its own.
    e_BLU, tokens_BW = _read_ngram_tables(self, ctx, state)
    key_BLD = make_norm('key_norm')(
        _project(self, 'key', e_BLU, size=size).reshape(shape))
    query_BLD = make_norm('query_norm')(x_BLD)
    value_BLD = _project(self, 'value', e_BLU, residual=True)
    v_BLD = layers.recompute_in_backward(gate_values)(
        key_BLD, query_BLD, value_BLD)
    # Add a causal convolution of v, whose weights are 0 at first. The tokens
    # that it sees are as far apart as the longest n-gram is long.
    w_WD = declare(self, 'conv', init=nn.initializers.zeros,
                   shape=(ngrams.kernel, size), role=Role((None, 'embed')))
    y_BLD, inputs_BWD = features.convolve(
        make_norm('conv_norm')(v_BLD).reshape(*shape[:2], size), w_WD,
        before_BWHK=state and state.inputs_BWD,
        segment_ids_BL=ctx.segment_ids_BL,
        valid_BL=None if state is None else ctx.valid_BL, silu=True,
        apart=ngrams.order)
    if state is not None:
      state = State(tokens_BW=tokens_BW, inputs_BWD=inputs_BWD)
    return v_BLD + y_BLD.reshape(shape), state


class OverEncoding(nn.Module):
  """The memory over_encoding, W e: see the equations above.

  (x_BLD, context, state) -> (what is added to x_BLD, state).
  """
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, state: Optional[State]):
    e_BLU, tokens_BW = _read_ngram_tables(self, ctx, state)
    y_BLD = _project(self, 'value', e_BLU)
    if state is None:
      return y_BLD, None
    return y_BLD, State(tokens_BW=tokens_BW)


class ScaleOfRows(nn.Module):
  """The scale of the norm that the per-layer embeddings of all layers have in
  common: the size of a row, S -> [S]."""
  config: ModelConfig

  @nn.compact
  def __call__(self, size: int) -> jax.Array:
    return declare(self, 'scale', init=nn.initializers.ones, shape=(size,),
                   role=Role(('mlp',)))


class PerLayer(nn.Module):
  """The memory per_layer, n(W_out (gelu(W_gate x) * e)): see the equations
  above.

  (x_BLD, context) -> what is added to x_BLD.
  """
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context) -> jax.Array:
    """Computes what per-layer embeddings (Gemma 3n) add to the residual stream.
    Each layer has a table with a row E_t for each token t. The row is mixed
    with a product of the token's embedding x_0, and gated by the layer's input
    x:

      e = (n(W_0 x_0 / sqrt(D)) + sqrt(S) E_t) / sqrt(2)
      y = n_out(W_out (gelu(W_gate x) * e))

    where n is RMSNorm, with a scale that all layers share, and n_out the norm
    of the model.

    The suffixes name axes: B batch, L length, D d_model, S features of a row.

    Args:
      x_BLD: the layer's input x.
      ctx: the context of the call, with the tokens, their embeddings, and the
        scale of n.

    Returns:
      y, [B, L, D].
    """
    config, size = self.config, self.config.part(PerLayerConfig).size
    assert ctx.tokens_BL is not None and ctx.embedded_BLD is not None
    assert ctx.row_scale_S is not None
    project_to_row = functools.partial(
        _project, self, size=size, axes=('embed', 'mlp'))
    # Look up the row E_t of each token.
    ids_BL1 = ctx.tokens_BL[..., None]
    row_BLS = _read_rows_of_table(
        self, num_rows=config.vocab_size, size=size, ids_BLU=ids_BL1)[:, :, 0]
    # Compute n(W_0 x_0 / sqrt(D)).
    projected_BLS = layers.multiply_exactly(
        project_to_row('input', ctx.embedded_BLD), config.d_model ** -0.5)
    normed_BLS = layers.recompute_in_backward(layers.rmsnorm)(
        projected_BLS, ctx.row_scale_S, config.norm_eps)
    # Mix both to e, and apply the gate.
    sum_BLS = normed_BLS + layers.multiply_exactly(row_BLS, size ** 0.5)
    e_BLS = layers.multiply_exactly(sum_BLS, 2 ** -0.5)
    gate_BLS = layers.recompute_in_backward(layers.gelu_tanh)(
        project_to_row('gate', x_BLD))
    y_BLD = _project(self, 'out', gate_BLS * e_BLS, residual=True)
    return layers.norm(config, 'out_norm')(y_BLD)


class Smear(nn.Module):
  """The memory smear (modded-nanogpt): what is added to the input x_l of token
  l is a part of the input of the token before it, in the same document,

    y_l = a sigmoid(w . x_l[:S]) x_(l-1)

  with a number a and a vector w of S = smear.features features, 0 at first. All
  residual streams have the gate of the first.

  (x_BLD, context, state) -> (what is added to x_BLD, state). x may be several
  streams, [B, L, U, D].
  """
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, state: Optional[State]
               ) -> tuple[jax.Array, Optional[State]]:
    """Computes the memory smear y_l = a sigmoid(w . x_l[:S]) x_(l-1) of each
    token l. The caller adds it to the input x_l.

    The suffixes name axes: B batch, L length, M = L + 1 tokens with the one
    before them, U features of all residual streams, S features that the gate
    reads.

    Args:
      x_BLD: the input, [B, L, D]; or [B, L, streams, D].
      ctx: the context of the layer, with the documents of a row and its
        padding.
      state: the input of the token before these; None: the first of these
        begins its row, and no state is kept.

    Returns:
      y, of the shape and dtype of x; and the state after these tokens, or None.
    """
    # All residual streams of a token are one vector, since they have one gate.
    B, L = x_BLD.shape[:2]
    x_BLU = x_BLD.reshape(B, L, -1)

    # Move the inputs by one token. A token has none before it where its row or
    # its document begins, and 0 stands there.
    before_B1U = jnp.zeros_like(x_BLU[:, :1])
    if state is not None:
      before_B1U = state.inputs_BWD.astype(x_BLU.dtype)
    all_BMU = jnp.concatenate([before_B1U, x_BLU], axis=1)
    previous_BLU = all_BMU[:, :-1]
    if ctx.segment_ids_BL is not None:
      previous_BLU = features.mask_other_documents(
          previous_BLU, ctx.segment_ids_BL, gap=1)

    # Multiply them by the gate a sigmoid(w . x[:S]), one number a token, which
    # is computed in float32.
    num_gate_features = min(
        self.config.part(SmearConfig).features, x_BLD.shape[-1])
    zeros = nn.initializers.zeros
    w_S = declare(self, 'gate', init=zeros, shape=(num_gate_features,),
                  role=Role((None,)))
    scale = declare(self, 'scale', init=zeros, shape=(), role=Role(()))
    gate_input_BLS = x_BLU[..., :num_gate_features].astype(jnp.float32)
    logit_BL = jnp.einsum('BLS,S->BL', gate_input_BLS, w_S.astype(jnp.float32))
    gate_BL = scale * jax.nn.sigmoid(logit_BL)
    y_BLU = features.scale_vectors(previous_BLU.astype(jnp.float32), gate_BL)
    y_BLD = y_BLU.astype(x_BLD.dtype).reshape(x_BLD.shape)

    # The next token will need the last input that is no padding.
    if state is None:
      return y_BLD, None
    last_B1U = features.last_inputs(
        all_BMU, count=1, length=L, valid_BL=ctx.valid_BL)
    return y_BLD, State(inputs_BWD=last_B1U)


def keeps_last_tokens(config: ModelConfig) -> bool:
  """Returns whether a layer looks up n-grams, for which its cache keeps the
  last tokens of a row."""
  memory = MEMORIES[config.memory]
  return memory is not None and memory.settings is NGramsConfig


def keeps_state(config: ModelConfig) -> bool:
  """Returns whether a layer's cache keeps a State for model.memory."""
  return keeps_last_tokens(config) or config.memory == NAME_OF_SMEAR


def empty_state(config: ModelConfig, shape: tuple[int, ...]) -> State:
  """Returns what a layer with tables of n-grams, or with smear, keeps between
  calls, before the first token.

  The suffixes name axes: B batch, W last tokens that are kept, D features of an
  input.

  Args:
    config: the config of the layer.
    shape: (..., rows, tokens). The state does not grow with the tokens.

  Returns:
    The State. It has the last N - 1 tokens of each row, which are padding at
    first (N is the length of the longest n-gram); and for the memory 'engram'
    the last inputs of its convolution, all 0. For 'smear' it has the last
    input, 0, alone.
  """
  # The features of all residual streams.
  size = config.d_model
  if config.residual != 'plain':
    size *= RESIDUALS[config.residual].count(config, branches=1)
  if config.memory == NAME_OF_SMEAR:
    return State(inputs_BWD=jnp.zeros((*shape[:-1], 1, size),
                                      config.compute_dtype))
  ngrams = config.part(NGramsConfig)
  tokens_BW = jnp.full(
      (*shape[:-1], ngrams.order - 1), ngrams.pad_token, jnp.int32)
  if config.memory != 'engram':
    return State(tokens_BW=tokens_BW)
  # Engram's convolution is over all residual streams. It sees `kernel` tokens
  # that are `order` tokens apart.
  reach = (ngrams.kernel - 1) * ngrams.order
  inputs_BWD = jnp.zeros((*shape[:-1], reach, size), config.compute_dtype)
  return State(tokens_BW=tokens_BW, inputs_BWD=inputs_BWD)


def check_memory(config: ModelConfig) -> None:
  """Checks that a layer can have a memory: tables of vectors that are looked up
  by the tokens.

  Args:
    config: the config of the layer.

  Raises:
    RequestError: if the layer cannot add to the model's residual streams, if
      muP is asked for, or if the sizes of the tables do not fit.
  """
  memory = f'model.memory is {config.memory!r}'
  # The residual stream, and muP.
  can_have_streams = (config.memory in ('engram', NAME_OF_SMEAR)
                      and config.residual != 'attention')
  require(config.residual == 'plain' or can_have_streams,
          f'{memory}, which adds to one stream, and model.residual '
          f"{config.residual!r} has others: set it to 'plain'")
  require(config.parametrization == 'standard', f'{memory}, for which '
          f'model.parametrization {config.parametrization!r} has no rules: set '
          "it to 'standard'")
  if not keeps_last_tokens(config):
    return
  # The tables of n-grams.
  ngrams = config.part(NGramsConfig)
  require(ngrams.size > 0, f'{memory}, and model.d_model {config.d_model} has '
          f'not a feature for each of the {ngrams.tables} tables: set '
          'model.ngrams.size')
  require(ngrams.pad_token < config.vocab_size, f'model.ngrams.pad_token is '
          f'{ngrams.pad_token}, which is no token of {config.vocab_size}')
  # The numbers of rows are primes a little above ngrams.rows; 2^20 is room for
  # the difference.
  num_rows = ngrams.rows * ngrams.tables
  require(num_rows < 2**31 - 2**20, f'model.ngrams.rows is {ngrams.rows} in '
          f'each of {ngrams.tables} tables, together {num_rows}: choose less, '
          'as rows are counted in 32 bits')


class TableMemory(NamedTuple):
  """An entry of MEMORIES: what a layer reads beside its input, such as tables.

  Attributes:
    module: (x_BLD, context, state) -> (what is added to x_BLD, state); of one
      that is read after the layer, without the state.
    settings: the group of fields of config.model that it reads.
    fields: of the group, those that this entry reads and others may not.
    is_read_after_layer: whether it reads the result of the layer, and not its
      input.
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
    NAME_OF_SMEAR: TableMemory(Smear, SmearConfig),
}
