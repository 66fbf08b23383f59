"""What the layers of all recurrences share: linear_attention.py and mamba2.py
have what is particular to each.

  q, k, v = W_q x, W_k x, W_v x       each through silu(conv(.)), if it has one
  o       = recurrence(q, k, v, decays, rates)
  y       = W_o (RMSNorm(o) * gate(x))             a head by itself

The cache is the state, in float32, and what the convolutions look back on: it
does not grow with the row. Wherever the segment id changes, a document begins,
with a state of zero: so a mask has no 0 between two 1s. With a cache, padding
changes no state.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar, Optional

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts import layers, positions, sharding
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context
from architectures.parts.recurrent import recurrence, features
from architectures.parts.report import Report
from architectures.parts.sharding import Role, declare
from common.errors import require

VALUE_AXES = 'heads', 'head'


@struct.dataclass
class State:
  """What a layer keeps of a row, however long it is: the state after its last
  token, and the last inputs of the convolutions, if it has convolutions."""
  state_BHKU: jax.Array
  query_BWJK: Optional[jax.Array] = None
  key_BWJK: Optional[jax.Array] = None
  value_BWHU: Optional[jax.Array] = None


class Layer(nn.Module):
  """(x_BLD, context, cache) -> (y_BLD, cache, report), over x itself, in the
  order of the row.

  A recurrence is a subclass. Its NAME is that of the mixer, and `settings` are
  its group of fields in config.model, which has `key_heads`, `value_heads`,
  `key_dim`, `value_dim`, `conv` (how many tokens a convolution sees; 0: there
  is none) and `householders` (how many keys, values and rates a token has, one
  after another in its head), and may have `norm_eps` (of what is read) and
  `gate` (the name of its activation in jax.nn). It defines `inputs`, and may
  define `gate` or `gated`; `recurrent` in blocks.py makes its entry.
  """
  NAME = ''
  settings: ClassVar[Any] = None
  PRODUCTS = frozenset({'query', 'key', 'value', 'output_gate', 'out'})
  FUSED = True  # there are no scores
  config: ModelConfig
  kind: LayerKind

  def inputs(self, x_BLD: jax.Array, q_BLJK: jax.Array, k_BLJK: jax.Array,
             v_BLHU: jax.Array, ctx: Context) -> recurrence.Inputs:
    """Returns what the recurrence is given, as if a row were one text."""
    raise AssertionError(f'{self.NAME!r} has no inputs')

  def gate(self, x_BLD: jax.Array, ctx: Context) -> jax.Array:
    """Returns what the normalised outputs are multiplied by, [B, L, H, U]: the
    SiLU, or the sigmoid, of a product with the input."""
    act = getattr(jax.nn, getattr(self.sizes, 'gate', 'silu'))
    return act(self.project('output_gate', x_BLD, VALUE_AXES, (
        self.sizes.value_heads, self.sizes.value_dim), ctx).astype(jnp.float32))

  def gated(self, o_BLHU: jax.Array, x_BLD: jax.Array, v_BLHU: jax.Array,
            ctx: Context) -> jax.Array:
    """Returns what the last product joins, of what was read of the state."""
    del v_BLHU
    c = self.config
    norm_config = dataclasses.replace(
        c, norm_eps=getattr(self.sizes, 'norm_eps', c.norm_eps))
    return features.RMSNorm(norm_config, name='out_norm')(
        o_BLHU) * self.gate(x_BLD, ctx)

  @property
  def sizes(self):
    return self.config.part(self.settings)

  @property
  def base_key_dim(self) -> float:
    """The key_dim of muP's base."""
    return self.sizes.key_dim / self.config.head_widening

  @property
  def key_axes(self) -> tuple[str | None, str | None]:
    """The logical axes of the heads of queries and keys, and of their features.
    If that of the features is None, neither grows with the width."""
    return 'kv_heads', 'head'

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[State]):
    d, n = self.sizes, self.sizes.householders
    check_context(self.NAME, ctx)
    valid_BL = None if cache is None else ctx.valid_BL
    q_BLJK, query_BWJK = self._read(
        'query', x_BLD, (d.key_heads, d.key_dim), ctx, valid_BL,
        cache and cache.query_BWJK)
    k_BLJK, key_BWJK = self._read(
        'key', x_BLD, (d.key_heads * n, d.key_dim), ctx, valid_BL,
        cache and cache.key_BWJK)
    v_BLHU, value_BWHU = self._read(
        'value', x_BLD, (d.value_heads * n, d.value_dim), ctx, valid_BL,
        cache and cache.value_BWHU)
    o_BLHU, state_BHKU = recurrence.run(
        with_resets(self.inputs(x_BLD, q_BLJK, k_BLJK, v_BLHU, ctx),
                    ctx.segment_ids_BL, valid_BL), cache and cache.state_BHKU)
    if cache is not None:
      cache = State(state_BHKU, query_BWJK, key_BWJK, value_BWHU)
    o_BLHU = self.gated(o_BLHU, x_BLD, v_BLHU, ctx)
    return self.joined(o_BLHU, ctx), cache, Report()

  def joined(self, o_BLHU: jax.Array, ctx: Context) -> jax.Array:
    """Returns the last product, of all heads, [B, L, D]."""
    c = self.config
    o_BLHU = sharding.constrain(o_BLHU.astype(c.compute_dtype), 'batch',
                                'length', 'heads', 'head')
    return layers.dense(
        self, 'out', 'BLHU,HUD->BLD', o_BLHU, (*o_BLHU.shape[2:], c.d_model),
        ('heads', 'head', 'embed'), in_axes=(0, 1), residual=True,
        with_bias=False, deterministic=ctx.deterministic)

  def _read(self, name: str, x_BLD: jax.Array, shape: tuple[int, ...],
            ctx: Context, valid_BL: Optional[jax.Array],
            before_BWHK: Optional[jax.Array]
            ) -> tuple[jax.Array, Optional[jax.Array]]:
    """Returns queries, keys or values, and the inputs that the convolution of
    the next token sees."""
    axes = VALUE_AXES if name == 'value' else self.key_axes
    x_BLHK = self.project(name, x_BLD, axes, shape, ctx)
    if not self.sizes.conv:
      return x_BLHK, None
    return features.convolved(
        self, f'{name}_conv', x_BLHK, self.sizes.conv, axes,
        getattr(self.sizes, 'conv_bias', False), before_BWHK=before_BWHK,
        segment_ids_BL=ctx.segment_ids_BL, valid_BL=valid_BL, silu=True)

  def project(self, name: str, x_BLD: jax.Array,
              axes: tuple[str | None, str | None], shape: tuple[int, ...],
              ctx: Context) -> jax.Array:
    """Returns a product with the input, of heads of features on these logical
    axes."""
    c, fixed = self.config, axes[1] is None
    y_BLHK = layers.dense(
        self, name, 'BLD,DHK->BLHK', x_BLD, (c.d_model, *shape),
        ('embed', *axes), output=fixed, with_bias=False,
        deterministic=ctx.deterministic)
    if fixed:
      y_BLHK /= c.widening
    return sharding.constrain(y_BLHK, 'batch', 'length', *axes)

  def of_heads(self, name: str, x_BLD: jax.Array, each: int = 1) -> jax.Array:
    """Returns a number for each head of values, float32 [B, L, H].

    The number of heads may be the same in a wider model, so in muP these are
    logits, like a router's: they are divided by the widening. There are `each`
    of them for a head, side by side.
    """
    c = self.config
    w_DH = layers.weight(self, name, (
        c.d_model, self.sizes.value_heads * each), ('embed', 'heads'),
                         output=True)
    y_BLH = layers.einsum('BLD,DH->BLH', x_BLD, w_DH, c.compute_dtype)
    return y_BLH.astype(jnp.float32) / c.widening

  def low_rank(self, name: str, x_BLD: jax.Array, features: int, rank: int = 0,
               through: Callable[[jax.Array], jax.Array] = lambda y: y
               ) -> jax.Array:
    """Returns through(x W_down) W_up for each head of values, in float32. In
    muP the rank is that of the base, so the outputs of W_down are logits, too.
    """
    c, d = self.config, self.sizes
    rank = rank or d.rank
    down_DU = layers.weight(self, f'{name}_down', (c.d_model, rank),
                            ('embed', None), output=True)
    axes = 'latent', 'heads', 'head'
    up_UHK = layers.weight(self, f'{name}_up', (
        rank, d.value_heads, features), axes)
    y_BLU = layers.einsum('BLD,DU->BLU', x_BLD, down_DU, c.compute_dtype)
    y_BLHK = layers.einsum('BLU,UHK->BLHK', through(y_BLU / c.widening),
                           up_UHK, c.compute_dtype, axes=axes)
    return sharding.constrain(y_BLHK, 'batch', 'length', 'heads', 'head'
                              ).astype(jnp.float32)

  def rate(self, x_BLD: jax.Array) -> jax.Array:
    """Returns b of the delta rule, float32 [B, L, H], or [B, L, H x n]."""
    rate_BLH = jax.nn.sigmoid(self.of_heads(
        'rate', x_BLD, self.sizes.householders))
    return 2 * rate_BLH if self.sizes.negative else rate_BLH

  def softplus_decay(self, x_BLHK: jax.Array, least: float) -> jax.Array:
    """Returns -exp(A) softplus(x + bias), of numbers [B, L, H] or [B, L, H, K].
    Each head has an A, whose exponential is drawn between `least` and 16."""
    shape = x_BLHK.shape[2:]
    scale_H = declare(self, 'decay_scale', log_uniform(least), shape[:1],
                      Role(('heads',))).astype(jnp.float32)
    bias_HK = declare(self, 'decay_bias', step_bias, shape,
                      Role(('heads', 'head')[:len(shape)])).astype(jnp.float32)
    scale_H = -jnp.exp(scale_H).reshape(1, 1, -1, *(1 for _ in shape[1:]))
    return scale_H * jax.nn.softplus(x_BLHK + bias_HK[None, None])


def by_step(n: int, x_BLH: jax.Array) -> jax.Array:
  """[B, L, H x n, ...] -> [B, L x n, H, ...]: what a head has for each step of
  a token, to places of their own."""
  if n == 1:
    return x_BLH
  B, L, _, *rest = x_BLH.shape
  x_BLH = jnp.swapaxes(x_BLH.reshape(B, L, -1, n, *rest), 2, 3)
  return x_BLH.reshape(B, L * n, -1, *rest)


def with_resets(x: recurrence.Inputs, ids_BL: Optional[jax.Array],
                valid_BL: Optional[jax.Array]) -> recurrence.Inputs:
  """Returns the inputs with a state that begins anew with each document, and
  that padding leaves as it is: its decay is 1, and it writes nothing."""
  log_BLHK = x.log_decay_BLHK
  if valid_BL is not None:
    read_BL1 = valid_BL[..., None] != 0
    if log_BLHK is not None:
      log_BLHK = jnp.where(read_BL1[..., None], log_BLHK, 0)
    if x.steps > 1:
      read_BL1 = jnp.repeat(read_BL1, x.steps, 1)
    if x.rate_BLH is None:
      x = x._replace(k_BLJK=jnp.where(read_BL1[..., None], x.k_BLJK, 0))
    else:
      x = x._replace(rate_BLH=jnp.where(read_BL1, x.rate_BLH, 0))
  if ids_BL is not None:
    if log_BLHK is None:
      log_BLHK = jnp.zeros((*x.q_BLJK.shape[:2], x.v_BLHU.shape[2], 1))
    log_BLHK = jnp.where(features.begins(ids_BL)[..., None, None], -jnp.inf,
                         log_BLHK)
  return x._replace(log_decay_BLHK=log_BLHK)


def log_uniform(least: float):
  """Returns an initializer: the logarithm of a uniform number between `least`
  and 16 (Dao and Gu's Mamba-2, and the authors' programs)."""
  def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype):
    return jnp.log(jax.random.uniform(key, shape, dtype, least, 16.0))
  return init


def step_bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype):
  """An initializer: the bias whose softplus has a uniform logarithm, from 0.001
  to 0.1, likewise."""
  first = jnp.exp(jax.random.uniform(
      key, shape, jnp.float32, jnp.log(0.001), jnp.log(0.1)))
  return jnp.log(jnp.expm1(first)).astype(dtype)


def empty(module: type[Layer], c: ModelConfig, shape: tuple[int, ...]) -> State:
  """Returns the state of rows without a token; `shape` is [..., B, M], and the
  state does not depend on M."""
  d, rows = c.part(module.settings), shape[:-1]
  n = d.householders
  state = jnp.zeros((*rows, d.value_heads, d.key_dim, d.value_dim))
  if not d.conv:
    return State(state)
  before = lambda *heads: jnp.zeros((*rows, d.conv - 1, *heads),
                                    c.compute_dtype)
  return State(state, before(d.key_heads, d.key_dim),
               before(d.key_heads * n, d.key_dim),
               before(d.value_heads * n, d.value_dim))


def at_once(module: type[Layer], c: ModelConfig) -> int:
  """Returns how many numbers of a token the pieces of a row hold at once: a
  piece's weights, its triangular system, and the inverse of that."""
  d = c.part(module.settings)
  return 3 * d.householders * d.value_heads * recurrence.most_places(d.key_dim)


def check_context(name: str, ctx: Context) -> None:
  """Raises RequestError for what a state cannot do with a row."""
  who = f'model.mixer is {name!r}, which reads a row from left to right'
  require(ctx.prefix_B is None,
          f'{who}: it has no prefix whose tokens see each other')
  require(not ctx.keep_attention,
          f'{who} into a state: it has no attention weights to show')


def check_state(name: str, c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what a layer with a state cannot be."""
  who = f'model.mixer is {name!r}'
  require(stack == 'decoder', f'{who}, which reads a row in one direction and '
          f'has no attention to a memory; model.arch {c.arch!r} is an {stack}: '
          'choose attention')
  require(c.attention == 'global', f'{who}, which keeps no keys and has no '
          f'window, and model.attention is {c.attention!r}: set it to global, '
          'or window to 0 in a kind of layer')
  require(not positions.of(c).stack_bias, f'{who}, which has no scores for the '
          f'bias of model.position {c.position!r}: set it to none, at least in '
          'the kinds of layer that have this mixer')


def check(module: type[Layer], c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what a layer of a recurrence cannot be."""
  name, d = module.NAME, c.part(module.settings)
  check_state(name, c, stack)
  require(d.value_heads % d.key_heads == 0, f'model.{name}.key_heads is '
          f'{d.key_heads}, which does not divide model.{name}.value_heads '
          f'{d.value_heads}')
