"""Steps that change queries, keys and values between their products and the
scores.

A step is a function of (module, name, x_BLHK, ctx) that returns x_BLHK,
unchanged where the config does not ask for the step:

  module    the layer's attention, in which the step declares its parameters
  name      'query', 'key' or 'value', what x is
  x_BLHK    queries [B, L, H, K], or keys or values [B, L, J, K]
  ctx       the context of the layer

QUERY_STEPS, KEY_STEPS, VALUE_STEPS and CROSS_ATTENTION_STEPS at the end have
the steps in their order. Convolutions, the mixing of values and the differences
of pairs of heads, which read or keep more than x, are functions beside them.
"""

from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts import positions
from architectures.parts import sharding
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.cache import Cache
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context, FirstLayerValues
from architectures.parts.recurrent import features
from architectures.parts.sharding import Role, declare

VALUE_AXES = 'batch', 'length', 'kv_heads', 'head'


def convolve_heads(module: Any, name: str, x_BLHK: jax.Array,
                   axes: tuple[str, str], ctx: Context, cache: Optional[Cache]
                   ) -> tuple[jax.Array, Optional[Cache]]:
  """Returns queries, keys or values after a short convolution (Primer's
  multi-DConv-head attention: So et al. 2021, arXiv 2109.08668, section 3, with
  3 tokens),

    x'_l = sum over i < W of w_i * x_(l - W + 1 + i),   W = model.attention_conv

  and the cache, which holds the last W - 1 inputs. Each feature of each head
  has weights of its own. Through it a token sees the W - 1 tokens before it in
  its document.

  Args:
    module: the layer's attention, in which the weights are declared.
    name: 'query', 'key' or 'value', what x is.
    x_BLHK: the inputs of the convolution, [batch, length, heads, features].
    axes: the logical axes of its heads and of their features.
    ctx: the context of the layer.
    cache: the layer's cache; None: there is none.
  """
  # A cache has the last inputs of each convolution by its name.
  previous_BWHK = None if cache is None else cache.inputs[name]
  W = module.config.part(AttentionConfig).attention_conv
  x_BLHK, last_BWHK = features.declare_and_convolve(
      module, f'{name}_conv', x_BLHK, width=W, axes=axes,
      before_BWHK=previous_BWHK, segment_ids_BL=ctx.segment_ids_BL,
      valid_BL=ctx.valid_BL)
  if cache is not None:
    cache = cache.replace(inputs=cache.inputs | {name: last_BWHK})
  return x_BLHK, cache


def normalise_heads(module: Any, name: str, x_BLHK: jax.Array, ctx: Context
                    ) -> jax.Array:
  """Returns queries or keys after a norm (QK-norm), or unchanged without
  model.qk_norm.

  The norm is taken over each head by itself (Qwen3) or over all heads at once
  (OLMo 2). It is the norm of the model, or one without parameters.

  Args:
    module: the layer's attention, in which the norm is declared.
    name: 'query' or 'key', what x is.
    x_BLHK: queries or keys, [batch, length, heads, features].
    ctx: the context of the layer, which is not read.
  """
  del ctx
  config: ModelConfig = module.config
  fields = config.part(AttentionConfig)
  if not fields.qk_norm:
    return x_BLHK

  # The norm that the config asks for, and the features that it is over.
  is_over_head = fields.qk_norm_over == 'head'
  axis = 'head' if is_over_head else 'joined'
  if fields.qk_norm_scale:
    norm = layers.norm(config, f'{name}_norm', axis)
  else:
    norm = layers.PlainRMSNorm(config, axis, name=f'{name}_norm')
  if is_over_head:
    return norm(x_BLHK)

  # All features of a token, U = H K, as one vector.
  x_BLU = norm(x_BLHK.reshape(*x_BLHK.shape[:2], -1))
  return x_BLU.reshape(x_BLHK.shape)


def clip_lengths(module: Any, name: str, x_BLHK: jax.Array, ctx: Context
                 ) -> jax.Array:
  """Returns queries or keys of which none is longer than model.qk_clip
  (Inkling 2):

    x' = x min(1, clip / |x|)

  A query is first multiplied by a learned scale of each feature.

  Args:
    module: the layer's attention, in which the scale is declared.
    name: 'query' or 'key', what x is.
    x_BLHK: queries or keys, [batch, length, heads, features].
    ctx: the context of the layer, which is not read.
  """
  del ctx
  fields = module.config.part(AttentionConfig)
  if not fields.qk_clip:
    return x_BLHK

  # Queries have a scale, so that a head can choose how sharp its scores are
  # below the bound.
  x32_BLHK = x_BLHK.astype(jnp.float32)
  if name == 'query':
    scale_HK = declare(module, 'query_scale', init=nn.initializers.ones,
                       shape=x_BLHK.shape[2:], role=Role(('heads', 'head')))
    x32_BLHK *= scale_HK[None, None]

  # The length of each head's vector. The bound below the root gives the root a
  # finite gradient where x is 0.
  squares_BLH1 = jnp.square(x32_BLHK).sum(-1, keepdims=True)
  length_BLH1 = jnp.sqrt(jnp.maximum(squares_BLH1, 1e-30))
  factor_BLH1 = jnp.minimum(fields.qk_clip / (length_BLH1 + 1e-6), 1.0)
  return (x32_BLHK * factor_BLH1).astype(x_BLHK.dtype)


def rotate_by_position(module: Any, name: str, x_BLHK: jax.Array, ctx: Context
                       ) -> jax.Array:
  """Returns queries or keys after the rotation R_l of their position l, where
  the position encoding is rotary."""
  del name
  rotate = positions.position_of(module.config).rotate
  if not rotate:
    return x_BLHK
  return rotate(x_BLHK, ctx.positions_BL, module.config, ctx.length)


def scale_queries_by_position(module: Any, name: str, x_BLHK: jax.Array,
                              ctx: Context) -> jax.Array:
  """Returns queries that grow with their position, against weights that flatten
  over more keys (Nakanishi 2025, arXiv 2501.19399; as in Llama 4):

    q' = q (1 + attention_log_scale log(1 + n)),
    n  = floor((position + 1) / attention_log_from)

  Args:
    module: the layer's attention.
    name: 'query', which is not read.
    x_BLHK: queries, [batch, length, heads, features].
    ctx: the context of the layer, with the positions.
  """
  del name
  fields = module.config.part(AttentionConfig)
  if not fields.attention_log_scale:
    return x_BLHK
  position_BL = ctx.positions_BL.astype(jnp.float32)
  n_BL = jnp.floor((position_BL + 1.0) / fields.attention_log_from)
  factor_BL = 1.0 + fields.attention_log_scale * jnp.log1p(n_BL)
  x32_BLHK = x_BLHK.astype(jnp.float32) * factor_BL[..., None, None]
  return x32_BLHK.astype(x_BLHK.dtype)


def normalise_values(module: Any, name: str, x_BLHK: jax.Array, ctx: Context
                     ) -> jax.Array:
  """Returns values, each head divided by its root mean square (Gemma 4)."""
  del ctx
  config: ModelConfig = module.config
  fields = config.part(AttentionConfig)
  if not fields.value_norm:
    return x_BLHK
  return layers.PlainRMSNorm(config, 'head', name=f'{name}_norm')(x_BLHK)


# Values of the first layer, and values from a table of tokens, are mixed into
# those of self-attention before they are weighed.


def zero_first_values(config: ModelConfig, x_BLD: jax.Array
                      ) -> FirstLayerValues:
  """Returns the values that the first layer is given as those of the first
  layer: zeros [B, L, J, K], and the mark that they are not known yet.

  Args:
    config: the config of the first layer.
    x_BLD: its input.
  """
  shape = *x_BLD.shape[:2], config.num_kv_heads, config.head_dim
  zeros_BLJK = jnp.zeros(shape, config.compute_dtype)
  return FirstLayerValues(
      value_BLJK=sharding.constrain(zeros_BLJK, *VALUE_AXES),
      known=jnp.array(False))


def mix_first_values(module: Any, x_BLD: jax.Array, v_BLJK: jax.Array,
                     first: Optional[FirstLayerValues]
                     ) -> tuple[jax.Array, Optional[FirstLayerValues]]:
  """Returns the values, mixed with those of the first layer, and the latter for
  the next layer (value residual: Zhou et al. 2024, arXiv 2410.17897; with one
  learned number a layer, as in modded-nanogpt):

    v'_n = (1 - lambda_n) v_n + lambda_n v_1,   lambda_n = 1/2 at first

  v_1 are the same token's values in the first layer, which mixes them with
  themselves. So a layer needs of the first one only what it makes of the tokens
  that it is given, and a cache of keys and values holds what was mixed already.

  Args:
    module: the layer's attention.
    x_BLD: the input of the product that makes the values.
    v_BLJK: the values.
    first: the first layer's values, from the layer before; None: this layer is
      alone.
  """
  config: ModelConfig = module.config
  fields = config.part(AttentionConfig)
  if not fields.value_residual:
    return v_BLJK, None

  # In the first layer its own values stand in for those of the first layer.
  if first is None:
    first = zero_first_values(config, x_BLD)
  first_BLJK = jnp.where(first.known, first.value_BLJK, v_BLJK)
  first_BLJK = sharding.constrain(first_BLJK, *VALUE_AXES)
  share = declare(module, 'value_residual', init=nn.initializers.constant(0.5),
                  shape=(), role=Role(()))
  # The mix is computed in float32, so that the gradient of the share, a sum
  # over all tokens, is too.
  v32_BLJK = v_BLJK.astype(jnp.float32)
  first32_BLJK = first_BLJK.astype(jnp.float32)
  mixed_BLJK = v32_BLJK + share * (first32_BLJK - v32_BLJK)
  first = FirstLayerValues(value_BLJK=first_BLJK, known=jnp.array(True))
  return mixed_BLJK.astype(v_BLJK.dtype), first


def add_value_embedding(module: Any, x_BLD: jax.Array, v_BLJK: jax.Array,
                        ctx: Context) -> jax.Array:
  """Returns the values plus, for each token, a vector of its own (value
  embedding: modded-nanogpt; the gate is nanochat's, which reads a few features
  of x, and here reads them all):

    v' = v + 2 sigmoid(W_g x) e[token],   W_g = 0 at first

  e is a table of the layer's own, with a row of all heads for each token, and
  the gate has one number for each head.

  Args:
    module: the layer's attention.
    x_BLD: the layer's input.
    v_BLJK: the values.
    ctx: the context of the layer, with the tokens.
  """
  config: ModelConfig = module.config
  fields = config.part(AttentionConfig)
  if not fields.value_embedding:
    return v_BLJK

  # The rows of the table, which is gathered whole over fsdp first, as the
  # embedding of tokens.
  J, K = v_BLJK.shape[2:]
  table_VJK = declare(
      module, 'value_embedding',
      init=nn.initializers.normal(config.init_stddev),
      shape=(config.vocab_size, J, K),
      role=Role(('rows', 'kv_heads', 'head'), inputs=(0,), kind='embedding'))
  gathered_VJK = sharding.constrain_where_divisible(
      table_VJK, None, 'kv_heads', 'head')
  e_BLJK = gathered_VJK[ctx.tokens_BL].astype(v_BLJK.dtype)

  # The gate. A wider model may have as many heads: in muP these are logits.
  gate_DJ = declare(
      module, 'value_gate', init=nn.initializers.zeros,
      shape=(x_BLD.shape[-1], J),
      role=Role(('embed', 'kv_heads'), inputs=(0,), kind='logits'))
  z_BLJ = layers.einsum('BLD,DJ->BLJ', x_BLD, gate_DJ, dtype=v_BLJK.dtype)
  gate_BLJ = jax.nn.sigmoid(z_BLJ / config.widening)
  return v_BLJK + 2 * gate_BLJ[..., None] * e_BLJK


# Differences of pairs of heads (Ye et al. 2024, "Differential Transformer",
# arXiv 2410.05258; as transformers' DiffLlama).
#
#   y  = (1 - l) n((A_1 - lambda A_2) [v_1, v_2]),   n(y) = y / rms(y)
#   lambda = exp(a_1 b_1) - exp(a_2 b_2) + l,        l = attention_difference
#
# A_1 and A_2 are the weights of two heads that are half of all heads apart, as
# those of their keys are, and v_1 and v_2 the values there. A layer has vectors
# a and b of its own. In the paper l grows with the depth, 0.8 - 0.6 exp(-0.3 n)
# in layer n, as kinds of layer can have it. y has the features of two heads,
# which stand for the pair in what follows.


def join_values_of_head_pairs(config: ModelConfig, v_BMJK: jax.Array
                              ) -> jax.Array:
  """Returns the values of pairs of heads for the differential attention above,
  or the values as they are without model.attention_difference.

  Args:
    config: the config of the layer.
    v_BMJK: the values, [batch, tokens M, heads of keys J, features K].

  Returns:
    [B, M, J, 2 K]: for each head the values [v_1, v_2] of its pair.
  """
  if not config.part(AttentionConfig).attention_difference:
    return v_BMJK
  # Head j and head j + J / 2 are a pair, so both halves of the heads have the
  # joined values.
  first_BMJK, second_BMJK = jnp.split(v_BMJK, 2, 2)
  pairs_BMJU = jnp.concatenate([first_BMJK, second_BMJK], -1)
  return jnp.concatenate([pairs_BMJU, pairs_BMJU], 2)


def subtract_head_pairs(module: Any, o_BLHU: jax.Array) -> jax.Array:
  """Returns the differences of pairs of heads, with model.attention_difference:

    y = (1 - l) n(o_1 - lambda o_2),   o_i = A_i [v_1, v_2]

  as [B, L, H, K], where each pair has the features of two heads; the equations
  above define l, n and lambda. Else o is returned.

  Args:
    module: the layer's attention.
    o_BLHU: the results of the heads, with U = 2 K features each.
  """
  config: ModelConfig = module.config
  fields = config.part(AttentionConfig)
  if not fields.attention_difference:
    return o_BLHU

  def declare_vector(name: str) -> jax.Array:
    """Returns a learned vector of a head's size, in float32."""
    vector_K = declare(
        module, f'difference_{name}', init=nn.initializers.normal(0.1),
        shape=(config.head_dim,), role=Role(('head',)))
    return vector_K.astype(jnp.float32)

  # The share lambda of the second head.
  a1_K = declare_vector('a1')
  b1_K = declare_vector('b1')
  a2_K = declare_vector('a2')
  b2_K = declare_vector('b2')
  share = (jnp.exp((a1_K * b1_K).sum()) - jnp.exp((a2_K * b2_K).sum())
           + fields.attention_difference).astype(o_BLHU.dtype)

  # The differences of the first half of the heads and the second, each a pair.
  # Their 2 K features become those of two heads.
  first_BLHU, second_BLHU = jnp.split(o_BLHU, 2, 2)
  norm = layers.PlainRMSNorm(config, name='difference_norm')
  y_BLHU = norm(first_BLHU - share * second_BLHU)
  y_BLHK = y_BLHU.reshape(*y_BLHU.shape[:2], config.num_heads, config.head_dim)
  return (1 - fields.attention_difference) * y_BLHK


# The order matters: a norm would undo the factors of later steps, and the clip
# bounds what the norm returns.
QUERY_STEPS = (normalise_heads, clip_lengths, rotate_by_position,
               scale_queries_by_position)
KEY_STEPS = normalise_heads, clip_lengths, rotate_by_position
VALUE_STEPS = (normalise_values,)
# The steps of queries and keys in cross-attention, whose memory has no
# positions here.
CROSS_ATTENTION_STEPS = normalise_heads, clip_lengths
