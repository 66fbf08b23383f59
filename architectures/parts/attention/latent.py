"""Latent attention: the keys and values of all heads are made of one small
vector a token (DeepSeek-AI 2024, DeepSeek-V2, section 2.1 and appendix C).

  c_m    = n(W_dkv x_m)                          the latent
  k_m,h  = [W_uk,h c_m; R_m W_kr x_m]            the turned part is all heads'
  v_m,h  = W_uv,h c_m
  q_l,h  = [a; R_l b],  [a; b] = W_uq,h n(W_dq x_l)
  y_l    = W_o [sum over m of softmax(scale q_l,h k_m,h) v_m,h] over h

R turns by the position; with `q_rank` 0 queries are made of x itself.

A cache holds of a token the latent and the turned key, once for all heads (and
the key of an indexer, whose queries are made of n(W_dq x)). A
few queries meet these as they are ("absorbed"): a k = (W_uk^T a) c, so W_uk
goes to the query, and W_uv behind the weighted sum. Many queries are cheaper
met by keys and values that are made of the latents again.
"""

import dataclasses
from typing import Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts import mixer
from architectures.parts import positions
from architectures.parts import sharding
from architectures.parts.attention import indexer
from architectures.parts.attention import kernels
from architectures.parts.attention.fields import LatentConfig
from architectures.parts.attention.multi_head import Attention
from architectures.parts.cache import Cache
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.positions import RopeConfig
from architectures.parts.report import Report
from common.errors import require

UP_AXES = 'latent', 'heads', 'head'


class LatentAttention(Attention):
  """Attention whose keys and values are made of a small vector a token:
  (x_BLD, context, cache) -> (y_BLD, cache, report)."""
  settings = LatentConfig
  FUSED = False

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[Cache]
               ) -> tuple[jax.Array, Optional[Cache], Report]:
    c = self.config
    asks_BLU, axis = self._asks(x_BLD, ctx)
    q_BLHK = self._queries(asks_BLU, axis, ctx)
    index, cache = self.index(x_BLD, asks_BLU, axis, ctx, cache)
    # The latents: those of the tokens, or all that the cache holds.
    slots = cache is not None and not kernels.begins(self.kind, ctx)
    slot_BM1U, k_positions_BM = self._slots(x_BLD, ctx), ctx.positions_BL
    if cache is not None:
      index_BLJK = None if index is None else index.key_BMJK
      cache = cache.write(slot_BM1U, None, ctx.positions_BL, index_BLJK)
    if slots:
      slot_BM1U, _, index_BMJK = cache.slots
      k_positions_BM = jnp.arange(slot_BM1U.shape[1])[None]
      if index is not None:
        index = index.replace(key_BMJK=index_BMJK)
    scored, k_positions_BM, (slot_BM1U,) = self.choose(
        index, k_positions_BM, (slot_BM1U,), ctx, slots)
    # Queries may be split over the mesh along the length; each sees all keys.
    slot_BM1U = sharding.constrain(slot_BM1U, 'batch', None, None, None)
    L, M = q_BLHK.shape[1], slot_BM1U.shape[1]
    sizes = c.part(LatentConfig)
    up_UHK = layers.weight(
        self, 'kv_up', (sizes.kv_rank, c.num_heads,
                        sizes.nope_dim + sizes.v_dim), UP_AXES)
    # Queries meet the latents as they are, or keys and values made of them.
    attend = self._on_heads
    if slots and ctx.deterministic and is_absorbed(c, L, M):
      attend = self._on_latents
    seen = self.biased(
        kernels.seen(self.kind, c, ctx, k_positions_BM), x_BLD, q_BLHK,
        slot_BM1U, k_positions_BM, ctx)
    o_BLHK, report = attend(q_BLHK, slot_BM1U, up_UHK, seen, ctx, scored)
    return self.output(x_BLD, o_BLHK, ctx), cache, report

  @property
  def scale(self) -> float:
    return self.config.part(LatentConfig).scale * positions.position_of(
        self.config).score_factor(self.config)

  def _asks(self, x_BLD: jax.Array, ctx: Context) -> tuple[jax.Array, str]:
    """Returns what queries are made of, [B, L, U], and its logical axis."""
    q_rank = self.config.part(LatentConfig).q_rank
    if not q_rank:
      return x_BLD, 'embed'
    down_BLU = self._down('query', x_BLD, q_rank, ctx)
    return self._normalised('query', down_BLU), 'latent'

  def _queries(self, asks_BLU: jax.Array, axis: str, ctx: Context
               ) -> jax.Array:
    c = self.config
    sizes = c.part(LatentConfig)
    name = 'query_up' if sizes.q_rank else 'query'
    shape = asks_BLU.shape[-1], c.num_heads, sizes.key_dim
    gain = 1.0
    if c.init == 'fan_in':
      # The query's weights have the factor that the scores lack.
      gain = sizes.key_dim ** -0.5 / sizes.scale
    q_BLHK = layers.dense(
        self, name, 'BLU,UHK->BLHK', asks_BLU, shape, (axis, 'heads', 'head'),
        gain=gain, with_bias=False, deterministic=ctx.deterministic)
    q_BLHK = sharding.constrain(q_BLHK, 'batch', 'length', 'heads', 'head')
    plain_BLHK, turned_BLHK = jnp.split(q_BLHK, (sizes.nope_dim,), -1)
    return jnp.concatenate([plain_BLHK, self._turn(turned_BLHK, ctx)], -1)

  def _slots(self, x_BLD: jax.Array, ctx: Context) -> jax.Array:
    """Returns of each token the latent and the turned key, [B, L, 1, U]."""
    c = self.config
    sizes = c.part(LatentConfig)
    down_BLU = self._down('kv', x_BLD, sizes.slot_dim, ctx)
    latent_BLU, key_BLU = jnp.split(down_BLU, (sizes.kv_rank,), -1)
    latent_BLU = self._normalised('kv', latent_BLU)
    key_BL1U = self._turn(key_BLU[:, :, None], ctx)
    return jnp.concatenate([latent_BLU[:, :, None], key_BL1U], -1)

  def _normalised(self, name: str, latent_BLU: jax.Array) -> jax.Array:
    c = self.config
    norm_config = dataclasses.replace(c, norm_eps=c.part(LatentConfig).norm_eps)
    return layers.norm(norm_config, f'{name}_norm', 'latent')(latent_BLU)

  def _down(self, name: str, x_BLD: jax.Array, size: int, ctx: Context
            ) -> jax.Array:
    c, name = self.config, f'{name}_down'
    y_BLU = layers.dense(self, name, 'BLD,DU->BLU', x_BLD, (c.d_model, size),
                         ('embed', 'latent'), with_bias=False,
                         deterministic=ctx.deterministic)
    if c.attention_bias:
      bias_U = layers.bias(self, f'{name}_bias', (size,), (None,))
      y_BLU = layers.add_bias(y_BLU, bias_U)
    return sharding.constrain(y_BLU, 'batch', 'length', None)

  def _turn(self, x_BLHK: jax.Array, ctx: Context) -> jax.Array:
    rotate = positions.position_of(self.config).rotate
    if not rotate:
      return x_BLHK
    return rotate(x_BLHK, ctx.positions_BL, turned(self.config), ctx.length)

  def _on_heads(self, q_BLHK: jax.Array, slot_BM1U: jax.Array,
                up_UHK: jax.Array, seen: kernels.Seen, ctx: Context,
                scored: Optional[indexer.Scored]
                ) -> tuple[jax.Array, Report]:
    """Meets keys and values that are made of the latents, a head each."""
    c = self.config
    sizes = c.part(LatentConfig)
    latent_BM1U, key_BM1K = jnp.split(slot_BM1U, (sizes.kv_rank,), -1)
    kv_BMHK = layers.product(
        self, 'kv_up', 'BMU,UHK->BMHK', latent_BM1U[:, :, 0], up_UHK, UP_AXES,
        deterministic=ctx.deterministic)
    k_BMHK, v_BMHK = jnp.split(kv_BMHK, (sizes.nope_dim,), -1)
    key_BMHK = jnp.broadcast_to(
        key_BM1K, (*k_BMHK.shape[:3], sizes.rope_dim))
    k_BMHK = jnp.concatenate([k_BMHK, key_BMHK], -1)
    k_BMHK, v_BMHK = (sharding.constrain(x, 'batch', None, 'heads', 'head')
                      for x in (k_BMHK, v_BMHK))
    with self.useful(q_BLHK, k_BMHK, ctx):
      return self.weigh(q_BLHK, k_BMHK, v_BMHK, seen, ctx, scored=scored)

  def _on_latents(self, q_BLHK: jax.Array, slot_BM1U: jax.Array,
                  up_UHK: jax.Array, seen: kernels.Seen, ctx: Context,
                  scored: Optional[indexer.Scored]
                  ) -> tuple[jax.Array, Report]:
    """Meets the latents themselves, as keys and values that all heads share."""
    c = self.config
    up_UHK = layers.adapted_weight(self, 'kv_up', up_UHK, UP_AXES)
    sizes = c.part(LatentConfig)
    key_UHK, value_UHK = jnp.split(up_UHK, (sizes.nope_dim,), -1)
    q_BLHK, turned_BLHK = jnp.split(q_BLHK, (sizes.nope_dim,), -1)
    q_BLHU = layers.einsum('BLHK,UHK->BLHU', q_BLHK, key_UHK, c.compute_dtype)
    q_BLHU = jnp.concatenate([q_BLHU, turned_BLHK], -1)
    value_BM1U = slot_BM1U[..., :sizes.kv_rank]
    with self.useful(q_BLHU, slot_BM1U, ctx):
      o_BLHU, report = self.weigh(
          q_BLHU, slot_BM1U, value_BM1U, seen, ctx, scored=scored)
    o_BLHK = layers.einsum(
        'BLHU,UHK->BLHK', o_BLHU, value_UHK, c.compute_dtype)
    return o_BLHK, report


def is_absorbed(c: ModelConfig, queries: int, slots: int) -> bool:
  """Whether so many queries meet the slots of a cache with fewer products as
  they are than as keys and values of each head."""
  dims = c.part(LatentConfig)
  up = dims.kv_rank * (dims.nope_dim + dims.v_dim)
  return (queries * (up + slots * (dims.kv_rank + dims.slot_dim))
          < slots * (up + queries * (dims.key_dim + dims.v_dim)))


def turned(c: ModelConfig) -> ModelConfig:
  """Returns a config whose heads are the part that positions turn."""
  return dataclasses.replace(c, head_dim=c.part(LatentConfig).rope_dim)


class Latent(mixer.Mixer):
  """The entry of latent attention in the table of mixers."""
  module = LatentAttention
  fields = 'norm_eps', *mixer.FIELDS_OF_ATTENTION
  sources = 'head_dim', 'mup_base_head_dim'
  positional = has_scores = True

  def cache(self, c: ModelConfig, shape: tuple[int, ...]) -> Cache:
    sizes = c.part(LatentConfig)
    key_BM1K = jnp.zeros((*shape, 1, sizes.slot_dim), c.compute_dtype)
    return Cache(key_BMJK=key_BM1K, index_BMJK=indexer.empty(c, shape),
                 inputs=indexer.inputs(c, shape))

  def fields_to_divide(self, c: ModelConfig) -> mixer.AxesAndFields:
    return (('tensor', 'num_heads'), ('fsdp', 'latent.kv_rank'),
            ('fsdp', 'latent.q_rank'))

  def check(self, c: ModelConfig, stack: str) -> None:
    who = "model.mixer is 'latent'"
    require(stack != 'encoder-decoder', f'{who}, which has no attention to the '
            f'memory of an encoder, as model.arch {c.arch!r} needs: choose '
            'attention')
    require(c.parametrization != 'mup', f"{who}, for whose ranks "
            "model.parametrization 'mup' has no rule: choose standard")
    sizes = c.part(LatentConfig)
    require(c.attention_kernel in ('auto', 'xla'), f'{who}, whose keys have '
            f'{sizes.key_dim} features and whose values {sizes.v_dim}: '
            f'model.attention_kernel {c.attention_kernel} takes heads of one '
            'size, so choose auto or xla')
    if positions.position_of(c).rotate:
      rope = c.part(RopeConfig)
      require(rope.fraction == 1, f'model.rope.fraction is {rope.fraction}, '
              f'and {who}, of whose heads model.latent.rope_dim features are '
              'turned: set it to 1')
      positions.check_rope(turned(c), head='model.latent.rope_dim')
