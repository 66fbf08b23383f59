"""Gated DeltaNet: the state of a head, [K, U], stands for all tokens before
(Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464; as in Qwen3-Next).

  q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x))
  q, k    = q / (|q| sqrt(K)), k / |k|        a head by itself
  b       = sigmoid(W_b x)                    doubled with `negative`
  log a   = -exp(A) softplus(W_a x + bias)    0 without `decay` (DeltaNet)
  S_t     = a_t (I - b_t k_t k_t^T) S_t-1 + b_t k_t v_t^T,   o_t = S_t^T q_t
  y       = W_o (RMSNorm(o) * silu(W_z x))    a head by itself

A step of the state has the eigenvalues a and a (1 - b), which with `negative`
are above -1 instead of 0 (Grazzi et al. 2024, arXiv 2411.12537).

The cache is the state, in float32, and what the convolutions look back on: it
does not grow with the row. Documents begin with a state of zero.
"""

from typing import Optional

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts import linear
from architectures.parts import norms
from architectures.parts import positions
from architectures.parts.recurrent import recurrence
from architectures.parts import sharding
from architectures.parts.recurrent import short_conv
from architectures.parts.attention import Context
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.roles import Role, declare
from configs.errors import require

LENGTH_EPS = 1e-6  # beside a squared length, as in the authors' program


@struct.dataclass
class State:
  """What a layer keeps of a row, however long it is: the state after its last
  token, and the inputs of its last tokens to the convolutions."""
  state_BHKU: jax.Array
  query_BWJK: jax.Array
  key_BWJK: jax.Array
  value_BWHU: jax.Array


class DeltaNet(nn.Module):
  """(x_BLD, context, cache) -> (y_BLD, cache), over x itself, in the order of
  the row: positions are not read."""
  FUSED = True  # there are no scores
  config: ModelConfig
  kind: LayerKind

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[State]):
    c, d = self.config, self.config.deltanet
    _check_context(ctx)
    valid_BL = None if cache is None else ctx.valid_BL
    q_BLJK, query_BWJK = self._convolved(
        'query', x_BLD, (d.key_heads, d.key_dim), ctx, valid_BL,
        cache and cache.query_BWJK)
    k_BLJK, key_BWJK = self._convolved(
        'key', x_BLD, (d.key_heads, d.key_dim), ctx, valid_BL,
        cache and cache.key_BWJK)
    v_BLHU, value_BWHU = self._convolved(
        'value', x_BLD, (d.value_heads, d.value_dim), ctx, valid_BL,
        cache and cache.value_BWHU)
    o_BLHU, state_BHKU = recurrence.run(recurrence.Inputs(
        unit(q_BLJK, d.key_dim ** -0.5), unit(k_BLJK), v_BLHU,
        self._log_decay(x_BLD, ctx, valid_BL), self._rate(x_BLD, valid_BL)),
                                        cache and cache.state_BHKU)
    if cache is not None:
      cache = State(state_BHKU, query_BWJK, key_BWJK, value_BWHU)
    axes = 'embed', 'heads', 'head'
    gate_BLHU = self._project('output_gate', x_BLD,
                              (d.value_heads, d.value_dim), axes, ctx)
    o_BLHU = norms.RMSNorm(c, 'head', name='out_norm')(o_BLHU)
    o_BLHU *= jax.nn.silu(gate_BLHU.astype(jnp.float32))
    o_BLHU = sharding.constrain(o_BLHU.astype(c.compute_dtype), 'batch',
                                'length', 'heads', 'head')
    axes = 'heads', 'head', 'embed'
    out_HUD = linear.weight(self, 'out', (*o_BLHU.shape[2:], c.d_model), axes,
                            in_axes=(0, 1), residual=True)
    return linear.product(self, 'out', 'BLHU,HUD->BLD', o_BLHU, out_HUD, axes,
                          deterministic=ctx.deterministic), cache

  def _project(self, name: str, x_BLD: jax.Array, shape: tuple[int, ...],
               axes: tuple[str, ...], ctx: Context) -> jax.Array:
    w_DHK = linear.weight(self, name, (self.config.d_model, *shape), axes)
    y_BLHK = linear.product(self, name, 'BLD,DHK->BLHK', x_BLD, w_DHK, axes,
                            deterministic=ctx.deterministic)
    return sharding.constrain(y_BLHK, 'batch', 'length', *axes[1:])

  def _convolved(self, name: str, x_BLD: jax.Array, shape: tuple[int, ...],
                 ctx: Context, valid_BL: Optional[jax.Array],
                 before_BWHK: Optional[jax.Array]
                 ) -> tuple[jax.Array, jax.Array]:
    """Returns queries, keys or values, and what the next token's look back on.
    """
    W = self.config.deltanet.conv
    axes = 'embed', 'heads' if name == 'value' else 'kv_heads', 'head'
    x_BLHK = self._project(name, x_BLD, shape, axes, ctx)
    w_WHK = short_conv.weight(self, f'{name}_conv', (W, *shape),
                              (None, *axes[1:]))
    y_BLHK, after_BWHK = short_conv.convolve(
        x_BLHK, w_WHK, before_BWHK=before_BWHK,
        segment_ids_BL=ctx.segment_ids_BL, valid_BL=valid_BL)
    return jax.nn.silu(y_BLHK), after_BWHK

  def _of_heads(self, name: str, x_BLD: jax.Array) -> jax.Array:
    """Returns a number of each head of values, float32 [B, L, H]."""
    w_DH = linear.weight(
        self, name, (self.config.d_model, self.config.deltanet.value_heads),
        ('embed', 'heads'))
    return linear.einsum('BLD,DH->BLH', x_BLD, w_DH, self.config.compute_dtype
                         ).astype(jnp.float32)

  def _rate(self, x_BLD: jax.Array, valid_BL: Optional[jax.Array]
            ) -> jax.Array:
    """Returns b, [B, L, H]; 0, which writes nothing, of padding."""
    rate_BLH = jax.nn.sigmoid(self._of_heads('rate', x_BLD))
    if self.config.deltanet.negative:
      rate_BLH *= 2
    if valid_BL is not None:
      rate_BLH = jnp.where(valid_BL[..., None] != 0, rate_BLH, 0)
    return rate_BLH

  def _log_decay(self, x_BLD: jax.Array, ctx: Context,
                 valid_BL: Optional[jax.Array]) -> Optional[jax.Array]:
    """Returns log a, [B, L, H, 1]: 0 of padding, -inf where a document begins;
    None: the state never decays."""
    d, ids_BL = self.config.deltanet, ctx.segment_ids_BL
    if not d.decay and ids_BL is None:
      return None
    log_BLH = jnp.zeros((*x_BLD.shape[:2], d.value_heads))
    if d.decay:
      scale_H, bias_H = (declare(
          self, name, init, (d.value_heads,), Role(('heads',))
      ).astype(jnp.float32) for name, init in (
          ('decay_scale', _decay_scale), ('decay_bias', _decay_bias)))
      log_BLH = -jnp.exp(scale_H)[None, None] * jax.nn.softplus(
          self._of_heads('decay', x_BLD) + bias_H[None, None])
    if valid_BL is not None:
      log_BLH = jnp.where(valid_BL[..., None] != 0, log_BLH, 0)
    if ids_BL is not None:
      begins_BL = jnp.pad(ids_BL[:, 1:] != ids_BL[:, :-1], ((0, 0), (1, 0)))
      log_BLH = jnp.where(begins_BL[..., None], -jnp.inf, log_BLH)
    return log_BLH[..., None]


def unit(x: jax.Array, length: float = 1.0) -> jax.Array:
  """Returns x / |x| times a length, over the last axis, in x's dtype."""
  x32 = x.astype(jnp.float32)
  squares = jnp.square(x32).sum(-1, keepdims=True)
  return (x32 * (length * jax.lax.rsqrt(squares + LENGTH_EPS))).astype(x.dtype)


def _decay_scale(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype):
  """A, whose exponential is uniform below 16 (Gu and Dao's Mamba-2, and the
  authors' program)."""
  return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0))


def _decay_bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype):
  """The bias whose softplus is uniform in its logarithm from 0.001 to 0.1,
  likewise."""
  first = jnp.exp(jax.random.uniform(
      key, shape, jnp.float32, jnp.log(0.001), jnp.log(0.1)))
  return jnp.log(jnp.expm1(first)).astype(dtype)


def empty(c: ModelConfig, shape: tuple[int, ...]) -> State:
  """Returns the state of rows without a token; `shape` is [..., B, M], and M
  is nothing to it."""
  d, rows = c.deltanet, shape[:-1]
  keys, values = (d.key_heads, d.key_dim), (d.value_heads, d.value_dim)
  before = lambda heads: jnp.zeros((*rows, d.conv - 1, *heads), c.compute_dtype)
  return State(jnp.zeros((*rows, d.value_heads, d.key_dim, d.value_dim)),
               before(keys), before(keys), before(values))


def products(c: ModelConfig) -> set[str]:
  """Returns which of linear.PRODUCTS a layer has."""
  del c
  return {'query', 'key', 'value', 'output_gate', 'out'}


def at_once(c: ModelConfig) -> int:
  """Returns how many numbers of a token the pieces of a row hold at once: a
  piece's weights, its triangular system, and the inverse of that."""
  return 3 * c.deltanet.value_heads * recurrence.PLACES


def _check_context(ctx: Context) -> None:
  """Raises RequestError for what a state cannot do with a row."""
  who = "model.mixer is 'deltanet', which reads a row from left to right"
  require(ctx.prefix_B is None,
          f'{who}: it has no prefix whose tokens see each other')
  require(ctx.reach_BL is None,
          f'{who}: a row cannot hold several texts that share tokens')
  require(not ctx.keep_attention,
          f'{who} into a state: it has no attention weights to show')


def check(c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what a layer of Gated DeltaNet cannot be."""
  who = "model.mixer is 'deltanet'"
  require(stack == 'decoder', f'{who}, which reads a row in one direction and '
          f'has no attention to a memory; model.arch {c.arch!r} is an {stack}: '
          'choose attention')
  require(c.attention == 'global', f'{who}, whose state holds all tokens '
          f'before and has no window, and model.attention is {c.attention!r}: '
          'set it to global (of a kind of layer, window=0)')
  require(not positions.of(c).stack_bias, f'{who}, which has no scores for the '
          f'bias of model.position {c.position!r}: set it to none, if for the '
          'layers of this kind alone')
  heads = c.deltanet.key_heads, c.deltanet.value_heads
  require(heads[1] % heads[0] == 0, f'model.deltanet.key_heads is {heads[0]}, '
          f'which does not divide model.deltanet.value_heads {heads[1]}')
