"""Latent attention: the keys and values of all heads are made of one small
vector a token (DeepSeek-AI 2024, DeepSeek-V2, section 2.1 and appendix C).

  c_m    = n(W_dkv x_m)                          the latent
  k_m,h  = [W_uk,h c_m; R_m W_kr x_m]            the turned part is all heads'
  v_m,h  = W_uv,h c_m
  q_l,h  = [a; R_l b],  [a; b] = W_uq,h n(W_dq x_l)
  y_l    = W_o [sum over m of softmax(scale q_l,h k_m,h) v_m,h] over h

R turns by the position; with `q_rank` 0 queries are made of x itself. With
`q_raw` (A.X K2, in transformers) [n(W_dq x); W_dq x] stands in place of
n(W_dq x), and a gate of the heads' results is made of it too.

A cache holds of a token the latent and the turned key, once for all heads (and
the key of an indexer, whose queries are made of n(W_dq x)). A
few queries meet these as they are ("absorbed"): a k = (W_uk^T a) c, so W_uk
goes to the query, and W_uv behind the weighted sum. Many queries are cheaper
met by keys and values that are made of the latents again.
"""

import dataclasses
from typing import NamedTuple, Optional

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
from architectures.parts.context import Context, Report
from architectures.parts.positions import RopeConfig
from common.errors import require

UP_AXES = 'latent', 'heads', 'head'


class _QueryInput(NamedTuple):
  """The input that the queries of a layer are made of: with latent.q_rank a
  small vector of each token, the latent n(W_dq x), else the layer's input x.

  The suffixes name axes: B batch, L length, U features.
  """
  normed_BLU: jax.Array
  raw_BLU: jax.Array  # W_dq x, before the norm; x where there is no latent
  axis: str  # the logical axis of U, by which weights are split over devices


class LatentAttention(Attention):
  """Attention whose keys and values are made of a small vector a token:
  (x_BLD, context, cache) -> (y_BLD, cache, report)."""
  settings = LatentConfig
  FUSED = False

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[Cache]
               ) -> tuple[jax.Array, Optional[Cache], Report]:
    """Computes latent attention, by the equations at the head of this file.

    The suffixes name axes: B batch, L length, M tokens that are attended to, D
    d_model, H query heads, K features of a head, U those of a latent or of the
    vector that queries are made of.

    Args:
      x_BLD: the input.
      ctx: the context of the layer: positions, documents and padding.
      cache: the latents and turned keys of the tokens before; None: there are
        none, and none are kept.

    Returns:
      The output [B, L, D], the cache with these tokens, and the report.
    """
    # The queries are made of a small vector or of the input. With q_raw, they
    # and the gate of the heads read the small vector before its norm too.
    config = self.config
    query_input = self._make_query_input(x_BLD, ctx)
    wide_BLU = query_input.normed_BLU
    gate_input_BLU = x_BLD
    gate_axis = 'embed'
    if config.part(LatentConfig).q_raw:
      wide_BLU = jnp.concatenate(
          [query_input.normed_BLU, query_input.raw_BLU], -1)
      gate_input_BLU = wide_BLU
      gate_axis = query_input.axis
    q_BLHK = self._make_queries(wide_BLU, query_input.axis, ctx)

    # An indexer reads the small vector after its norm. The index is None where
    # the layer has no indexer.
    index, cache = self.apply_indexer(
        x_BLD, query_input_BLU=query_input.normed_BLU, axis=query_input.axis,
        ctx=ctx, cache=cache)

    # The latents with their rotated keys, [batch, M tokens, 1, U]: those of the
    # given tokens, or all slots of the cache, whose positions are 0, 1, 2, ...
    # Tokens at the start of a row need no slots, as they see each other alone.
    reads_slots = (
        cache is not None and not kernels.is_start_of_row(self.kind, ctx))
    slot_BM1U = self._make_latents_and_keys(x_BLD, ctx)
    k_positions_BM = ctx.positions_BL
    if cache is not None:
      index_BLJK = None if index is None else index.key_BMJK
      cache = cache.write(slot_BM1U, None, ctx.positions_BL, index_BLJK)
    if reads_slots:
      slot_BM1U, _, index_BMJK = cache.slots
      k_positions_BM = jnp.arange(slot_BM1U.shape[1])[None]
      if index is not None:
        index = index.replace(key_BMJK=index_BMJK)
    scored, k_positions_BM, (slot_BM1U,) = self.choose_keys(
        index, k_positions_BM=k_positions_BM, arrays=(slot_BM1U,), ctx=ctx,
        reads_slots=reads_slots)
    # Queries may be split over the mesh along the length; each sees all keys.
    slot_BM1U = sharding.constrain(slot_BM1U, 'batch', None, None, None)

    # The weight that makes keys and values of latents.
    L, M = q_BLHK.shape[1], slot_BM1U.shape[1]
    sizes = config.part(LatentConfig)
    shape = sizes.kv_rank, config.num_heads, sizes.nope_dim + sizes.v_dim
    up_UHK = layers.weight(self, 'kv_up', shape=shape, axes=UP_AXES)

    # Queries meet the latents as they are, or keys and values made of them,
    # whichever takes fewer multiplications; in training always the latter.
    attend = self._attend_to_heads
    if reads_slots and ctx.deterministic and is_absorbed(config, L, M):
      attend = self._attend_to_latents
    visible = self.add_layer_bias(
        kernels.find_visible_keys(self.kind, config, ctx=ctx,
                                  k_positions_BM=k_positions_BM),
        x_BLD, q_BLHK, slot_BM1U, k_positions_BM=k_positions_BM, ctx=ctx)
    o_BLHK, report = attend(q_BLHK, slot_BM1U, up_UHK, visible, ctx, scored)
    y_BLD = self.project_output(gate_input_BLU, o_BLHK, ctx, axis=gate_axis)
    return y_BLD, cache, report

  @property
  def scale(self) -> float:
    """The factor of the products of queries and keys."""
    return self.config.part(LatentConfig).scale * positions.position_of(
        self.config).score_factor(self.config)

  def _make_query_input(self, x_BLD: jax.Array, ctx: Context
                        ) -> _QueryInput:
    """Returns what the queries are made of: a latent n(W_dq x) with
    latent.q_rank, else x itself.

    The suffixes name axes: B batch, L length, D d_model, U features of the
    small vector.
    """
    q_rank = self.config.part(LatentConfig).q_rank
    if not q_rank:
      return _QueryInput(normed_BLU=x_BLD, raw_BLU=x_BLD, axis='embed')
    down_BLU = self._project_down('query', x_BLD, size=q_rank, ctx=ctx)
    normed_BLU = self._normalise_latent('query', down_BLU)
    return _QueryInput(normed_BLU=normed_BLU, raw_BLU=down_BLU, axis='latent')

  def _make_queries(self, query_input_BLU: jax.Array, axis: str, ctx: Context
                    ) -> jax.Array:
    """Makes the queries of latent attention. A query has nope_dim plain
    features and, after them, rope_dim features that are rotated by the position
    (RoPE).

    The suffixes name axes: B batch, L length, U features of the input, H heads,
    K features of a query.

    Args:
      query_input_BLU: what queries are made of: a latent of q_rank features
        or, with q_raw, of twice as many; with a q_rank of 0, the layer's input.
      axis: the logical axis of these features, by which the weight is split
        over devices.
      ctx: the context of the layer, which has the positions.

    Returns:
      The queries, [B, L, H, K].
    """
    config = self.config
    # The weight. Its name, which is part of its path in checkpoints, says what
    # it multiplies: a latent or the input.
    sizes = config.part(LatentConfig)
    name = 'query'
    if sizes.q_rank:
      name = 'query_up'
    shape = query_input_BLU.shape[-1], config.num_heads, sizes.key_dim
    gain = 1.0
    if config.init == 'fan_in':
      # Scores start as if they were scaled by key_dim ** -0.5. Where the
      # config's scale is another, the weight takes up the difference.
      gain = sizes.key_dim ** -0.5 / sizes.scale
    q_BLHK = layers.dense(
        self, name, spec='BLU,UHK->BLHK', x=query_input_BLU, shape=shape,
        axes=(axis, 'heads', 'head'), gain=gain, with_bias=False,
        deterministic=ctx.deterministic)
    q_BLHK = sharding.constrain(q_BLHK, 'batch', 'length', 'heads', 'head')

    # Only the last features are rotated. Keys have the same order.
    plain_BLHK, rope_BLHK = jnp.split(q_BLHK, (sizes.nope_dim,), -1)
    return jnp.concatenate([plain_BLHK, self._rotate(rope_BLHK, ctx)], -1)

  def _make_latents_and_keys(self, x_BLD: jax.Array, ctx: Context
                             ) -> jax.Array:
    """Makes what the cache holds of each token in latent attention: its latent,
    of which keys and values are made, and after it a key that all heads share,
    rotated by the token's position.

    The suffixes name axes: B batch, L length, D d_model, U features.

    Args:
      x_BLD: the layer's input.
      ctx: the context of the layer, which has the positions.

    Returns:
      Latents and keys, [B, L, 1, U], U = kv_rank + rope_dim. The axis of size 1
      is that of heads: the cache stores them as keys of one head.
    """
    sizes = self.config.part(LatentConfig)
    # One product makes both. Only the latent has a norm.
    down_BLU = self._project_down('kv', x_BLD, size=sizes.slot_dim, ctx=ctx)
    latent_BLU, key_BLU = jnp.split(down_BLU, (sizes.kv_rank,), -1)
    latent_BLU = self._normalise_latent('kv', latent_BLU)
    key_BL1U = self._rotate(key_BLU[:, :, None], ctx)
    return jnp.concatenate([latent_BLU[:, :, None], key_BL1U], -1)

  def _normalise_latent(self, name: str, latent_BLU: jax.Array) -> jax.Array:
    """Returns the norm of a latent, with the parameters `name`_norm."""
    config = self.config
    norm_eps = config.part(LatentConfig).norm_eps
    norm_config = dataclasses.replace(config, norm_eps=norm_eps)
    return layers.norm(norm_config, f'{name}_norm', 'latent')(latent_BLU)

  def _project_down(self, name: str, x_BLD: jax.Array, size: int, ctx: Context
                    ) -> jax.Array:
    """Projects the layer's input to a small vector, W x + b. The weight is
    declared here, and the bias too if attention has biases.

    The suffixes name axes: B batch, L length, D d_model, U features of the
    result.

    Args:
      name: 'query' or 'kv', what the small vector is for. The parameters are
        called `name`_down and `name`_down_bias.
      x_BLD: the layer's input, [batch, length, d_model].
      size: how many features the result has.
      ctx: the context of the layer.

    Returns:
      The small vectors, [batch, length, size].
    """
    config = self.config
    name_of_weight = f'{name}_down'
    y_BLU = layers.dense(
        self, name_of_weight, spec='BLD,DU->BLU', x=x_BLD,
        shape=(config.d_model, size), axes=('embed', 'latent'), with_bias=False,
        deterministic=ctx.deterministic)
    # The bias is whole on each device. layers.dense would give it the axis
    # 'latent' of the weight, by which it could be split over the mesh.
    if config.attention_bias:
      bias_U = layers.bias(
          self, f'{name_of_weight}_bias', shape=(size,), axes=(None,))
      y_BLU = layers.add_bias(y_BLU, bias_U)
    return sharding.constrain(y_BLU, 'batch', 'length', None)

  def _rotate(self, x_BLHK: jax.Array, ctx: Context) -> jax.Array:
    """Returns x rotated by its tokens' positions, where the position encoding
    is rotary."""
    rotate = positions.position_of(self.config).rotate
    if not rotate:
      return x_BLHK
    config = config_of_rotated_part(self.config)
    return rotate(x_BLHK, ctx.positions_BL, config, ctx.length)

  def _attend_to_heads(self, q_BLHK: jax.Array, slot_BM1U: jax.Array,
                       up_UHK: jax.Array, visible: kernels.VisibleKeys,
                       ctx: Context, scored: Optional[indexer.ScoredKeys]
                       ) -> tuple[jax.Array, Report]:
    """Computes latent attention by first making the keys and the values of each
    head h:

      k_m,h = [W_uk,h c_m; r_m],   v_m,h = W_uv,h c_m

    where c_m is the latent of token m and r_m its rotated key, which all heads
    share. This way is cheaper for many queries; `_attend_to_latents` computes
    the same, and is cheaper for few.

    The suffixes name axes: B batch, L queries, M tokens in the cache, H heads,
    K features of a head, U features of a latent and, in a slot, of the key too.

    Args:
      q_BLHK: queries.
      slot_BM1U: what the cache holds: each token's latent, and after it in the
        last axis its rotated key.
      up_UHK: the weight [W_uk, W_uv], [kv_rank, H, nope_dim + v_dim].
      visible: which keys the queries see.
      ctx: the context of the layer.
      scored: the scores of the keys by an indexer, which chooses the keys that
        a query sees; None: there is none.

    Returns:
      The heads' results, [B, L, H, v_dim], and a report, which holds the
      weights if the context asks for them, and in training the indexer's loss.
    """
    sizes = self.config.part(LatentConfig)
    # Keys and values of each head, by one product.
    latent_BM1U, key_BM1K = jnp.split(slot_BM1U, (sizes.kv_rank,), -1)
    kv_BMHK = layers.product(self, 'kv_up', 'BMU,UHK->BMHK',
                             latent_BM1U[:, :, 0], up_UHK, axes=UP_AXES,
                             deterministic=ctx.deterministic)
    k_BMHK, v_BMHK = jnp.split(kv_BMHK, (sizes.nope_dim,), -1)
    # The rotated key is appended to the key of every head, in the order of the
    # queries' features: plain ones, then rotated ones.
    rotated_BMHK = jnp.broadcast_to(
        key_BM1K, (*k_BMHK.shape[:3], sizes.rope_dim))
    k_BMHK = jnp.concatenate([k_BMHK, rotated_BMHK], -1)
    k_BMHK = sharding.constrain(k_BMHK, 'batch', None, 'heads', 'head')
    v_BMHK = sharding.constrain(v_BMHK, 'batch', None, 'heads', 'head')
    # The scope changes only how FLOPs are counted: pairs that the mask hides
    # are left out.
    with self.count_visible_pairs_only(q_BLHK, k_BMHK, ctx):
      return self.weigh_values(
          q_BLHK, k_BMHK, v_BMHK, visible=visible, ctx=ctx, scored=scored)

  def _attend_to_latents(self, q_BLHK: jax.Array, slot_BM1U: jax.Array,
                         up_UHK: jax.Array, visible: kernels.VisibleKeys,
                         ctx: Context, scored: Optional[indexer.ScoredKeys]
                         ) -> tuple[jax.Array, Report]:
    """Computes latent attention without making keys and values ("absorbed"
    weights: DeepSeek-V2). The latents c serve as keys and values that all heads
    share. With k = W_uk c, v = W_uv c and attention weights p,

      q . k = (W_uk^T q) . c,    sum of p v = W_uv sum of p c

    so W_uk multiplies the query, and W_uv the weighted sum. The result is that
    of `_attend_to_heads`.

    The suffixes name axes: B batch, L queries, M tokens in the cache, H heads,
    K features of a head, U features of a latent and, in a slot, of the key too.

    Args:
      q_BLHK: queries.
      slot_BM1U: what the cache holds: each token's latent, and after it in the
        last axis its rotated key.
      up_UHK: the weight [W_uk, W_uv], [kv_rank, H, nope_dim + v_dim].
      visible: which keys the queries see.
      ctx: the context of the layer.
      scored: the scores of the keys by an indexer, which chooses the keys that
        a query sees; None: there is none.

    Returns:
      The heads' results, [B, L, H, v_dim], and a report, which holds the
      weights if the context asks for them, and in training the indexer's loss.
    """
    config = self.config
    # The weight meets no latent here, so its adapter (LoRA) is added to it.
    up_UHK = layers.adapted_weight(self, 'kv_up', up_UHK, axes=UP_AXES)
    sizes = config.part(LatentConfig)
    key_UHK, value_UHK = jnp.split(up_UHK, (sizes.nope_dim,), -1)

    # W_uk^T q, and after it the rotated features, so that a query has the order
    # of a slot: latent, then rotated key.
    q_BLHK, rope_BLHK = jnp.split(q_BLHK, (sizes.nope_dim,), -1)
    q_BLHU = layers.einsum(
        'BLHK,UHK->BLHU', q_BLHK, key_UHK, dtype=config.compute_dtype)
    q_BLHU = jnp.concatenate([q_BLHU, rope_BLHK], -1)

    # The whole slot is the key, and its latent alone the value.
    value_BM1U = slot_BM1U[..., :sizes.kv_rank]
    with self.count_visible_pairs_only(q_BLHU, slot_BM1U, ctx):
      o_BLHU, report = self.weigh_values(q_BLHU, slot_BM1U, value_BM1U,
                                         visible=visible, ctx=ctx,
                                         scored=scored)
    o_BLHK = layers.einsum(
        'BLHU,UHK->BLHK', o_BLHU, value_UHK, dtype=config.compute_dtype)
    return o_BLHK, report


def is_absorbed(config: ModelConfig, queries: int, slots: int) -> bool:
  """Returns whether "absorbed" attention (DeepSeek-V2), which attends to the
  latents in the cache themselves, takes fewer multiplications than attention to
  keys and values that are made of the latents first.

  Args:
    config: the config of the layer.
    queries: the number of queries.
    slots: the number of tokens whose latents are in the cache.
  """
  sizes = config.part(LatentConfig)
  # Multiplications for each head. The weight that makes keys and values of a
  # latent multiplies each query in the first way, and each latent in the other.
  up = sizes.kv_rank * (sizes.nope_dim + sizes.v_dim)
  by_latents = queries * (up + slots * (sizes.kv_rank + sizes.slot_dim))
  by_heads = slots * (up + queries * (sizes.key_dim + sizes.v_dim))
  return by_latents < by_heads


def config_of_rotated_part(config: ModelConfig) -> ModelConfig:
  """Returns a config whose heads are the features that positions rotate."""
  rope_dim = config.part(LatentConfig).rope_dim
  return dataclasses.replace(config, head_dim=rope_dim)


class Latent(mixer.Mixer):
  """The entry of latent attention in the table of mixers."""
  module = LatentAttention
  fields = 'norm_eps', *mixer.FIELDS_OF_ATTENTION
  sources = 'head_dim', 'mup_base_head_dim'
  positional = has_scores = True

  def cache(self, config: ModelConfig, shape: tuple[int, ...]) -> Cache:
    """Returns an empty cache of a layer, of `shape` (rows, tokens): latents and
    rotated keys, and the keys of an indexer."""
    sizes = config.part(LatentConfig)
    # One array has both: values are read from the first features of the keys.
    key_BM1K = jnp.zeros((*shape, 1, sizes.slot_dim), config.compute_dtype)
    return Cache(key_BMJK=key_BM1K,
                 index_BMJK=indexer.empty_key_cache(config, shape),
                 inputs=indexer.empty_block_inputs(config, shape))

  def fields_to_divide(self, config: ModelConfig) -> mixer.AxesAndFields:
    return (('tensor', 'num_heads'), ('fsdp', 'latent.kv_rank'),
            ('fsdp', 'latent.q_rank'))

  def check(self, config: ModelConfig, stack: str) -> None:
    """Checks that a model can have latent attention (DeepSeek-V2), whose keys
    and values are made of one small vector for each token.

    Args:
      config: the config of the model.
      stack: the kind of stack: 'encoder', 'decoder' or 'encoder-decoder'.

    Raises:
      RequestError: if a decoder attends to an encoder, muP or a fused kernel is
        asked for, or the rotary encoding does not fit rope_dim.
    """
    request = "model.mixer is 'latent'"
    require(stack != 'encoder-decoder', f'{request}, which has no attention '
            f'to the memory of an encoder, as model.arch {config.arch!r} '
            'needs: choose attention')
    require(config.parametrization != 'mup', f"{request}, for whose ranks "
            "model.parametrization 'mup' has no rule: choose standard")
    # Keys have features that values lack, and fused kernels take one size.
    sizes = config.part(LatentConfig)
    require(config.attention_kernel in ('auto', 'xla'), f'{request}, whose '
            f'keys have {sizes.key_dim} features and whose values '
            f'{sizes.v_dim}: model.attention_kernel {config.attention_kernel} '
            'takes heads of one size, so choose auto or xla')
    # latent.rope_dim says already which features are rotated, so a fraction of
    # them would say it a second time.
    if positions.position_of(config).rotate:
      rope = config.part(RopeConfig)
      require(rope.fraction == 1, f'model.rope.fraction is {rope.fraction}, '
              f'and {request}, of whose heads model.latent.rope_dim features '
              'are turned: set it to 1')
      positions.check_rope(
          config_of_rotated_part(config), head='model.latent.rope_dim')
