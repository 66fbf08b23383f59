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
from architectures.parts.attention import kernels
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.cache import Cache
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context, FirstLayerValues
from architectures.parts.recurrent import features
from architectures.parts.sharding import Role, declare

VALUE_AXES = 'batch', 'length', 'kv_heads', 'head'
# A number beside a squared length, so that the gradient of a vector of zeros is
# finite.
LEAST_SQUARED_LENGTH = 1e-24
# The names of what a cache keeps of the last token: the features of its key
# that are offset, and the sum of its forget gates; and of the last tokens.
DYNAMIC_CONV = '{}_dynamic_conv'
KEY_OFFSET = 'key_offset'
FORGET_GATE = 'forget_gate'


def convolve_heads(module: Any, name: str, x_BLHK: jax.Array,
                   axes: tuple[str, str], ctx: Context, cache: Optional[Cache]
                   ) -> tuple[jax.Array, Optional[Cache]]:
  """Applies a short convolution over tokens to queries, keys or values
  (Primer's multi-DConv-head attention: So et al. 2021, arXiv 2109.08668,
  section 3, there over 3 tokens):

    x'_l = sum over i < W of w_i * x_(l - W + 1 + i),   W = model.attention_conv

  Each feature of each head has weights of its own. A token sees the W - 1
  tokens before it in its document.

  The suffixes name axes: B batch, L length, H heads, K features of a head, W
  tokens of the convolution.

  Args:
    module: the layer's attention, in which the weights are declared.
    name: 'query', 'key' or 'value', what x is.
    x_BLHK: the inputs of the convolution.
    axes: the logical axes of heads and of features, by which the weights are
      split over devices.
    ctx: the context of the layer.
    cache: the layer's cache; None: there is none.

  Returns:
    The convolved x, [B, L, H, K], and the cache with the last W - 1 inputs,
    which the next tokens need; None without a cache.
  """
  # A cache keeps the last inputs of each of the three convolutions by name.
  previous_BWHK = None if cache is None else cache.inputs[name]
  W = module.config.part(AttentionConfig).attention_conv
  x_BLHK, last_BWHK = features.declare_and_convolve(
      module, f'{name}_conv', x_BLHK, width=W, axes=axes,
      before_BWHK=previous_BWHK, segment_ids_BL=ctx.segment_ids_BL,
      valid_BL=ctx.valid_BL)
  if cache is not None:
    cache = cache.replace(inputs=cache.inputs | {name: last_BWHK})
  return x_BLHK, cache


def convolve_by_token(module: Any, name: str, x_BLJK: jax.Array,
                      input_BLD: jax.Array, ctx: Context,
                      cache: Optional[Cache]
                      ) -> tuple[jax.Array, Optional[Cache]]:
  """Applies a short convolution whose filters each token makes to keys or
  values (Inkling 2: Thinking Machines 2026, as transformers has it):

    y_l = (x_l + sum over i < W of (w_i + u_li) * x_(l - W + 1 + i)) / c
    u_l = W_u input_l,   c = sqrt(2 W + 1),   W = model.dynamic_conv

  w, 0 at first, is a filter of each feature, and u_l one of each head. c keeps
  the size of x, as y is a sum of 2 W + 1 products. A wider model may have as
  many heads: so muP treats u as logits and divides it by `widening`, the ratio
  of the model's width to that of its base model, which is 1 without muP.

  The suffixes name axes: B batch, L length, D d_model, J heads of keys, K
  features of a head, W tokens of the convolution, the token itself last.

  Args:
    module: the layer's attention, in which w and W_u are declared.
    name: 'key' or 'value', what x is.
    x_BLJK: keys or values.
    input_BLD: the layer's input.
    ctx: the context of the layer, with the documents.
    cache: the layer's cache; None: there is none.

  Returns:
    y, [B, L, J, K], and the cache with the last W - 1 inputs. With a
    model.dynamic_conv of 0, x and the cache are returned as they are.
  """
  config: ModelConfig = module.config
  W = config.part(AttentionConfig).dynamic_conv
  if not W:
    return x_BLJK, cache

  # The filters w that all tokens share, and u that each token makes.
  name_of_filters = DYNAMIC_CONV.format(name)
  J, K = x_BLJK.shape[2:]
  w_WJK = declare(module, f'{name_of_filters}_static',
                  init=nn.initializers.zeros, shape=(W, J, K),
                  role=Role((None, 'kv_heads', 'head')))
  logits_BLJW = layers.dense(
      module, name_of_filters, 'BLD,DJW->BLJW', input_BLD,
      shape=(config.d_model, J, W), axes=('embed', 'kv_heads', None),
      output=True, with_bias=False, deterministic=ctx.deterministic)
  token_w_BLJW = logits_BLJW / config.widening

  # The convolution, which begins with the last inputs of an earlier call.
  previous_BWJK = None
  if cache is not None:
    previous_BWJK = cache.inputs[name_of_filters]
  convolved_BLJK, last_BWJK = features.convolve_by_filters_of_tokens(
      x_BLJK, w_WJK, token_w_BLJW, before_BWHK=previous_BWJK,
      segment_ids_BL=ctx.segment_ids_BL, valid_BL=ctx.valid_BL)
  sum_BLJK = x_BLJK.astype(jnp.float32) + convolved_BLJK
  y_BLJK = sum_BLJK * (2 * W + 1) ** -0.5
  if cache is not None:
    cache = cache.replace(inputs=cache.inputs | {name_of_filters: last_BWJK})
  return y_BLJK.astype(x_BLJK.dtype), cache


def normalise_heads(module: Any, name: str, x_BLHK: jax.Array, ctx: Context
                    ) -> jax.Array:
  """Normalises queries or keys (QK-norm). Without model.qk_norm they are
  returned unchanged.

  The norm is over each head by itself (Qwen3) or over all heads at once
  (OLMo 2). It is the model's kind of norm, or one without parameters.

  The suffixes name axes: B batch, L length, H heads, K features of a head.

  Args:
    module: the layer's attention, in which the norm is declared.
    name: 'query' or 'key', what x is.
    x_BLHK: queries or keys.
    ctx: the context of the layer. It is not read: all such steps have the same
      arguments.

  Returns:
    The normalised x, [B, L, H, K].
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
  """Bounds the length of each query or key by model.qk_clip (Inkling 2):

    x' = x min(1, clip / |x|)

  A query is first multiplied by a learned scale of each feature.

  The suffixes name axes: B batch, L length, H heads, K features of a head.

  Args:
    module: the layer's attention, in which the scale is declared.
    name: 'query' or 'key', what x is.
    x_BLHK: queries or keys.
    ctx: the context of the layer. It is not read: all such steps have the same
      arguments.

  Returns:
    The bounded x, [B, L, H, K]; x itself with a qk_clip of 0.
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

  # The length of each head's vector. The minimum under the root keeps its
  # gradient finite where x is 0.
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
  """Scales queries up with their position, so that attention's weights do not
  flatten as the number of keys grows (Nakanishi 2025, arXiv 2501.19399; as in
  Llama 4):

    q' = q (1 + attention_log_scale log(1 + n)),
    n  = floor((position + 1) / attention_log_from)

  The suffixes name axes: B batch, L length, H heads, K features of a head.

  Args:
    module: the layer's attention.
    name: 'query'. It is not read: all such steps have the same arguments.
    x_BLHK: queries.
    ctx: the context of the layer, with the positions.

  Returns:
    The scaled queries, [B, L, H, K].
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


def scale_queries_by_learned_log(module: Any, name: str, x_BLHK: jax.Array,
                                 ctx: Context) -> jax.Array:
  """Multiplies queries by a learned factor of each head h that grows with the
  logarithm of their position, so that attention's weights do not flatten as the
  number of keys grows (scalable softmax: Nakanishi 2025, arXiv 2501.19399,
  equation 3 and section 2.3; as in Mistral Large 4):

    q'_h = q_h (a_h log(1 + position) + b_h),   a_h = 0 and b_h = 1 at first

  The suffixes name axes: B batch, L length, H heads, K features of a head.

  Args:
    module: the layer's attention, in which a and b are declared.
    name: 'query'. It is not read: all such steps have the same arguments.
    x_BLHK: queries.
    ctx: the context of the layer, with the positions.

  Returns:
    q', [B, L, H, K]; the queries as they are without model.learned_log_scale.
  """
  del name
  if not module.config.part(AttentionConfig).learned_log_scale:
    return x_BLHK
  H = x_BLHK.shape[2]
  slope_H = declare(module, 'log_scale', init=nn.initializers.zeros,
                    shape=(H,), role=Role(('heads',)))
  offset_H = declare(module, 'log_scale_bias', init=nn.initializers.ones,
                     shape=(H,), role=Role(('heads',)))
  log_BL = jnp.log1p(ctx.positions_BL.astype(jnp.float32))
  factor_BLH = (slope_H[None, None] * log_BL[..., None]
                + offset_H[None, None])
  scaled_BLHK = x_BLHK.astype(jnp.float32) * factor_BLH[..., None]
  return scaled_BLHK.astype(x_BLHK.dtype)


def normalise_values(module: Any, name: str, x_BLHK: jax.Array, ctx: Context
                     ) -> jax.Array:
  """Returns values, each head divided by its root mean square (Gemma 4)."""
  del ctx
  config: ModelConfig = module.config
  fields = config.part(AttentionConfig)
  if not fields.value_norm:
    return x_BLHK
  return layers.PlainRMSNorm(config, 'head', name=f'{name}_norm')(x_BLHK)


def offset_keys(config: ModelConfig, k_BLJK: jax.Array, ctx: Context,
                cache: Optional[Cache]) -> tuple[jax.Array, Optional[Cache]]:
  """Replaces those features of each key that no position encoding rotates by
  the ones of the token before (partial key offset: modded-nanogpt):

    k'_l = (rotated features of k_l, other features of k_(l-1))

  So a query that looks for a token finds the key of the token that followed it,
  and one layer can copy what came after an earlier occurrence. The first token
  of a document keeps its own features.

  The suffixes name axes: B batch, L length, J heads of keys, K features of a
  key, U features that are not rotated.

  Args:
    config: the config of the layer.
    k_BLJK: keys after all steps.
    ctx: the context of the layer, with positions and documents.
    cache: the layer's cache, which keeps these features of the last token;
      None: there is none.

  Returns:
    k', [B, L, J, K], and the cache. Without model.key_offset both are returned
    as they are.
  """
  if not config.part(AttentionConfig).key_offset:
    return k_BLJK, cache

  # The rotated features stand first.
  num_rotated = positions.rotary_dim(config)
  rotated_BLJK, own_BLJU = jnp.split(k_BLJK, [num_rotated], axis=-1)
  shifted_BLJU, cache = take_token_before(
      KEY_OFFSET, own_BLJU, first_BLJK=own_BLJU, ctx=ctx, cache=cache)
  return jnp.concatenate([rotated_BLJK, shifted_BLJU], -1), cache


def take_token_before(name: str, x_BLJK: jax.Array, first_BLJK: jax.Array,
                      ctx: Context, cache: Optional[Cache]
                      ) -> tuple[jax.Array, Optional[Cache]]:
  """Returns for each token l the vectors x_(l-1) of the token before it in its
  document, and those of `first_BLJK` for the first token of a document.

  The suffixes name axes: B batch, L length, J heads, K features of a head, M =
  L + 1 tokens.

  Args:
    name: the name under which the cache keeps x of the last token.
    x_BLJK: the x of each token.
    first_BLJK: what the first token of a document gets instead, of this shape
      or of one that broadcasts to it.
    ctx: the context of the layer, with positions and documents.
    cache: the layer's cache; None: there is none.

  Returns:
    The x of the tokens before, [B, L, J, K], and the cache, which keeps x of
    the last token for the next call; None without a cache.
  """
  # The last token of an earlier call stands in front of those of this one.
  previous_B1JK = jnp.zeros_like(x_BLJK[:, :1])
  if cache is not None:
    previous_B1JK = cache.inputs[name].astype(x_BLJK.dtype)
  all_BMJK = jnp.concatenate([previous_B1JK, x_BLJK], 1)
  before_BLJK = all_BMJK[:, :-1]
  if cache is not None:
    last_B1JK = features.last_inputs(
        all_BMJK, count=1, length=x_BLJK.shape[1], valid_BL=ctx.valid_BL)
    cache = cache.replace(inputs=cache.inputs | {name: last_B1JK})

  # The first token of a document has none before it.
  is_first_BL = ctx.positions_BL == 0
  if ctx.segment_ids_BL is not None:
    is_first_BL = is_first_BL | features.begins_document(ctx.segment_ids_BL)
  result_BLJK = jnp.where(is_first_BL[..., None, None], first_BLJK, before_BLJK)
  return result_BLJK, cache


# Forgetting attention (FoX: Lin et al. 2025, arXiv 2503.02130, equations 4 and
# 5): each token lowers the weights of all tokens before it, in each head by a
# gate f of its own.
#
#   f_l = sigmoid(W_f x_l + b_f),   c_l = sum over i <= l of log f_i
#   o_l = softmax over m of (scale q_l k_m + c_l - c_m) v_m
#
# The difference c_l - c_m is a bias on the scores. A cache keeps c of all
# tokens in float32, and the newest one by itself, from which the sum goes on.


def sum_forget_gates(module: Any, x_BLD: jax.Array, ctx: Context,
                     cache: Optional[Cache]
                     ) -> tuple[Optional[jax.Array], Optional[Cache]]:
  """Computes how far the tokens up to each token l have lowered the weights of
  those before them, as the sum of the logarithms of their forget gates f
  (forgetting attention, FoX: Lin et al. 2025, arXiv 2503.02130, equation 4):

    f_l = sigmoid(W_f x_l + b_f),   c_l = sum over i <= l of log f_i

  The sum goes over the whole row. Attention reads differences c_l - c_m alone,
  so that documents before drop out of it.

  The suffixes name axes: B batch, L length, D d_model, H heads, U = 1, M = L +
  1 tokens.

  Args:
    module: the layer's attention, in which W_f and b_f are declared.
    x_BLD: the layer's input.
    ctx: the context of the layer, which says what is padding.
    cache: the layer's cache, which has c of the last token; None: there is
      none.

  Returns:
    c, [B, L, H, 1] in float32, and the cache with c of the last token; (None,
    the cache as it is) without model.forget_gate.
  """
  config: ModelConfig = module.config
  if not config.part(AttentionConfig).forget_gate:
    return None, cache

  # The gates. A wider model may have as many heads, so muP treats the products
  # as logits: it divides them by `widening`, but not the bias.
  D, H = x_BLD.shape[-1], config.num_heads
  weight_DH = layers.weight(module, FORGET_GATE, shape=(D, H),
                            axes=('embed', 'heads'), output=True)
  bias_H = layers.bias(module, f'{FORGET_GATE}_bias', shape=(H,),
                       axes=('heads',))
  z_BLH = layers.einsum('BLD,DH->BLH', x_BLD, weight_DH, dtype=x_BLD.dtype,
                        out_dtype=jnp.float32, axes=('embed', 'heads'))
  logits_BLH = z_BLH / config.widening + bias_H[None, None]
  log_f_BLH = jax.nn.log_sigmoid(logits_BLH)
  c_BLHU = jnp.cumsum(log_f_BLH, axis=1)[..., None]
  if cache is None:
    return c_BLHU, None

  # The sum goes on from that of the last token of an earlier call.
  previous_B1HU = cache.inputs[FORGET_GATE]
  c_BLHU += previous_B1HU
  all_BMHU = jnp.concatenate([previous_B1HU, c_BLHU], 1)
  last_B1HU = features.last_inputs(all_BMHU, count=1, length=x_BLD.shape[1],
                                   valid_BL=ctx.valid_BL)
  cache = cache.replace(inputs=cache.inputs | {FORGET_GATE: last_B1HU})
  return c_BLHU, cache


def add_forget_bias(visible: kernels.VisibleKeys,
                    q_sums_BLHU: Optional[jax.Array],
                    k_sums_BMHU: Optional[jax.Array]) -> kernels.VisibleKeys:
  """Adds to the scores of attention, for query l and key m, how far the tokens
  after m up to l have lowered the weight of m (forgetting attention, FoX):

    bias_lm = c_l - c_m = sum over m < i <= l of log f_i

  where f_i is the forget gate of token i (`sum_forget_gates`).

  The suffixes name axes: B batch, L queries, M keys, H heads, U = 1.

  Args:
    visible: which keys the queries see, and what is added to their scores.
    q_sums_BLHU: c of the queries' tokens; None: there are no such gates.
    k_sums_BMHU: c of the keys' tokens.

  Returns:
    `visible` with the bias; `visible` as it is without forget gates.
  """
  if q_sums_BLHU is None:
    return visible
  c_BHL1 = q_sums_BLHU.swapaxes(1, 2)
  c_BH1M = jnp.moveaxis(k_sums_BMHU, 1, 3)
  return add_bias_to_scores(visible, c_BHL1 - c_BH1M)


def add_bias_to_scores(visible: kernels.VisibleKeys, bias_BHLM: jax.Array
                       ) -> kernels.VisibleKeys:
  """Returns `visible` with a further bias, [batch, heads, queries, keys], on
  the scores; it is added to the bias that `visible` has, if it has one.

  The suffixes name axes: B batch, H heads, L queries, M keys.
  """
  sum_BHLM = bias_BHLM
  if visible.bias_BHLM is not None:
    sum_BHLM = bias_BHLM + visible.bias_BHLM
  # The mask is marked, so that no fused kernel is chosen: these cannot add a
  # bias.
  marked_mask = visible.mask.replace(has_bias=True)
  return visible._replace(mask=marked_mask, bias_BHLM=sum_BHLM)


# Values of the first layer, and values from a table of tokens, are mixed into
# those of self-attention before they are weighed.


def zero_first_values(config: ModelConfig, x_BLD: jax.Array
                      ) -> FirstLayerValues:
  """Returns a placeholder for the values of the first layer, which later layers
  mix into their own (value residual): zeros, marked as not known yet. The first
  layer is given it, so that all layers have inputs of the same structure, as a
  scan over layers needs.

  The suffixes name axes: B batch, L length, D d_model, J heads of values, K
  features of a head.

  Args:
    config: the config of the first layer.
    x_BLD: the input of the first layer, which gives B and L.

  Returns:
    The zeros, [B, L, J, K], with `known` false.
  """
  shape = *x_BLD.shape[:2], config.num_kv_heads, config.head_dim
  zeros_BLJK = jnp.zeros(shape, config.compute_dtype)
  return FirstLayerValues(
      value_BLJK=sharding.constrain(zeros_BLJK, *VALUE_AXES),
      known=jnp.array(False))


def mix_first_values(module: Any, x_BLD: jax.Array, v_BLJK: jax.Array,
                     first: Optional[FirstLayerValues]
                     ) -> tuple[jax.Array, Optional[FirstLayerValues]]:
  """Mixes the values of the first layer into the values of this layer n (value
  residual: Zhou et al. 2024, arXiv 2410.17897; with one learned number a layer,
  as in modded-nanogpt):

    v'_n = (1 - lambda_n) v_n + lambda_n v_1,   lambda_n = 1/2 at first

  v_1 are the same token's values in the first layer. A cache holds values that
  are mixed already, so only the values of new tokens are passed on here.

  The suffixes name axes: B batch, L length, D d_model, J heads of values, K
  features of a head.

  Args:
    module: the layer's attention, in which lambda is declared.
    x_BLD: the layer's input, which gives the shape of missing values.
    v_BLJK: the values of this layer.
    first: the first layer's values, passed on by the layer before; None: the
      layer is used by itself.

  Returns:
    The mixed values, [B, L, J, K], and the first layer's values for the next
    layer; None in their place without model.value_residual.
  """
  config: ModelConfig = module.config
  fields = config.part(AttentionConfig)
  if not fields.value_residual:
    return v_BLJK, None

  # The first layer is given zeros marked as unknown: its own values are v_1.
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
  """Adds to the values an embedding of the token (value embedding:
  modded-nanogpt; with nanochat's gate, but made of all features of x):

    v' = v + 2 sigmoid(W_g x) e[token],   W_g = 0 at first

  Each layer has its own table e, with a vector of all heads for each token of
  the vocabulary. The gate has one number for each head.

  The suffixes name axes: B batch, L length, D d_model, V vocabulary, J heads of
  values, K features of a head.

  Args:
    module: the layer's attention, in which the table and W_g are declared.
    x_BLD: the layer's input.
    v_BLJK: the values.
    ctx: the context of the layer, with the tokens.

  Returns:
    v', [B, L, J, K]; v without model.value_embedding.
  """
  config: ModelConfig = module.config
  fields = config.part(AttentionConfig)
  if not fields.value_embedding:
    return v_BLJK

  # Look up the tokens. The table is split over the devices of the mesh axis
  # 'fsdp' and gathered first, as the embedding of the model's input is.
  J, K = v_BLJK.shape[2:]
  table_VJK = declare(
      module, 'value_embedding',
      init=nn.initializers.normal(config.init_stddev),
      shape=(config.vocab_size, J, K),
      role=Role(('rows', 'kv_heads', 'head'), inputs=(0,), kind='embedding'))
  gathered_VJK = sharding.constrain_where_divisible(
      table_VJK, None, 'kv_heads', 'head')
  e_BLJK = gathered_VJK[ctx.tokens_BL].astype(v_BLJK.dtype)

  # The gate. A wider model need not have more heads, so under muP its logits
  # are divided by the widening, as those of the vocabulary are.
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
  """Joins the values of each pair of heads, as differential attention needs
  (Ye et al. 2024, arXiv 2410.05258): both heads of a pair weigh the values
  [v_1, v_2] of both.

  The suffixes name axes: B batch, M tokens, J heads of values, K features of a
  head, U = 2 K.

  Args:
    config: the config of the layer.
    v_BMJK: the values.

  Returns:
    The joined values, [B, M, J, 2 K]; the values as they are without
    model.attention_difference.
  """
  if not config.part(AttentionConfig).attention_difference:
    return v_BMJK
  # Head j and head j + J / 2 are a pair, so both halves of the heads have the
  # joined values.
  first_BMJK, second_BMJK = jnp.split(v_BMJK, 2, 2)
  pairs_BMJU = jnp.concatenate([first_BMJK, second_BMJK], -1)
  return jnp.concatenate([pairs_BMJU, pairs_BMJU], 2)


def subtract_head_pairs(module: Any, o_BLHU: jax.Array) -> jax.Array:
  """Subtracts the second head of each pair from the first (differential
  attention: Ye et al. 2024, arXiv 2410.05258):

    y      = (1 - l) n(o_1 - lambda o_2),   o_i = A_i [v_1, v_2]
    lambda = exp(a_1 b_1) - exp(a_2 b_2) + l

  A_i are the attention weights of the pair's heads and v_i their values, n is a
  norm, a_i and b_i are learned vectors, and l is model.attention_difference.

  The suffixes name axes: B batch, L length, H heads, K features of a head, U =
  2 K.

  Args:
    module: the layer's attention, in which a_i and b_i are declared.
    o_BLHU: the results o of the heads.

  Returns:
    y, [B, L, H, K]: a pair's U features stand as those of two heads. Without
    model.attention_difference o is returned.
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

  # Lambda, the share of the second head. The vectors are declared in an order
  # that fixes their initial values by the seed.
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


def remove_own_value(module: Any, o_BLHK: jax.Array, v_BLJK: jax.Array
                     ) -> jax.Array:
  """Removes from the result o of each head its part along the value v of the
  token itself (exclusive self-attention, XSA: arXiv 2603.09078):

    o' = o - s (o . v) v / |v|^2

  What a token holds reaches the output by the residual stream anyway, so that
  attention need only bring what other tokens hold. With
  model.attention_exclusive 'all', s is 1; with 'learned' it is tanh(alpha) of a
  number alpha of each head, 0 at first (as in NeoMME); with 'none' o is
  returned as it is.

  The suffixes name axes: B batch, L length, H heads, J heads of values, R = H /
  J heads that share one head of values, K features of a head.

  Args:
    module: the layer's attention, in which alpha is declared.
    o_BLHK: the results of the heads.
    v_BLJK: the values of the same tokens.

  Returns:
    o', [B, L, H, K].
  """
  fields = module.config.part(AttentionConfig)
  if fields.attention_exclusive == 'none':
    return o_BLHK

  # Values of length 1. The bound keeps the gradient of a value of zeros finite.
  v32_BLJK = v_BLJK.astype(jnp.float32)
  squares_BLJ1 = jnp.square(v32_BLJK).sum(-1, keepdims=True)
  squares_BLJ1 = jnp.maximum(squares_BLJ1, LEAST_SQUARED_LENGTH)
  unit_BLJK = v32_BLJK * jax.lax.rsqrt(squares_BLJ1)

  # The part of each head's result along them.
  B, L, H, K = o_BLHK.shape
  J = unit_BLJK.shape[2]
  o32_BLJRK = o_BLHK.astype(jnp.float32).reshape(B, L, J, H // J, K)
  unit_BLJ1K = unit_BLJK[:, :, :, None]
  along_BLJR1 = (o32_BLJRK * unit_BLJ1K).sum(-1, keepdims=True)
  own_part_BLHK = (along_BLJR1 * unit_BLJ1K).reshape(B, L, H, K)
  if fields.attention_exclusive == 'learned':
    alpha_H = declare(module, 'exclusive', init=nn.initializers.zeros,
                      shape=(H,), role=Role(('heads',)))
    own_part_BLHK = jnp.tanh(alpha_H)[None, None, :, None] * own_part_BLHK
  return (o_BLHK - own_part_BLHK).astype(o_BLHK.dtype)


def normalise_results(module: Any, o_BLHK: jax.Array) -> jax.Array:
  """Divides the result o of each head by its root mean square (Muse Spark):

    o' = o / sqrt(mean over the features of o^2 + epsilon)

  The suffixes name axes: B batch, L length, H heads, K features of a head.

  Args:
    module: the layer's attention.
    o_BLHK: the results of the heads, [batch, length, heads, features].

  Returns:
    o', of the shape of o; o itself without model.context_norm.
  """
  config: ModelConfig = module.config
  if not config.part(AttentionConfig).context_norm:
    return o_BLHK
  norm = layers.PlainRMSNorm(config, 'head', name='context_norm')
  return norm(o_BLHK)


# The order matters: a norm would undo the factors of later steps, and the clip
# bounds what the norm returns.
QUERY_STEPS = (normalise_heads, clip_lengths, rotate_by_position,
               scale_queries_by_position, scale_queries_by_learned_log)
KEY_STEPS = normalise_heads, clip_lengths, rotate_by_position
VALUE_STEPS = (normalise_values,)
# The steps of queries and keys in cross-attention, whose memory has no
# positions here.
CROSS_ATTENTION_STEPS = normalise_heads, clip_lengths
