"""Compressed convolutional attention (CCA: Figliolia et al. 2025, arXiv
2510.04476; as transformers' Zaya has it).

Queries, keys and values are made in a width that is compressed: num_heads and
num_kv_heads times head_dim, which may be less than d_model. With q_l = W_q x_l,
k_l = W_k x_l and v_l = W_v x_l of that width

  q'_l = C(q)_l + (q_l + k_l) / 2        k'_l = C(k)_l + mean of (q_l + k_l) / 2
  q''  = sqrt(K) q' / |q'|               k''  = t sqrt(K) k' / |k'|
  v'_l = [first half of v_l, second half of v_(l-1)]

C is two causal convolutions, one after the other: the first has a filter for
each feature, and the second mixes the features of each head. A head of keys is
added to each of the queries' heads that it serves, and the mean is over these.
K is the size of a head, and t a learned temperature of each head of keys.

What follows, positions and the weighing of values, is plain attention.
"""

from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts import sharding
from architectures.parts.attention import steps
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.cache import Cache
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.recurrent import features
from architectures.parts.sharding import Role, declare

# The names of what a cache keeps: the last inputs of the two convolutions of
# queries and of keys, and the last token's values.
TAPS, MIX, VALUE_SHIFT = '{}_taps', '{}_mix', 'value_shift'
AXES_OF_HEADS = {'query': 'heads', 'key': 'kv_heads'}


def mix_queries_and_keys(module: Any, q_BLHK: jax.Array, k_BLJK: jax.Array,
                         ctx: Context, cache: Optional[Cache]
                         ) -> tuple[jax.Array, jax.Array, Optional[Cache]]:
  """Mixes queries and keys with each other and with those of the last tokens
  (compressed convolutional attention), where C is two convolutions:

    q'_l = C(q)_l + (q_l + k_l) / 2     k'_l = C(k)_l + mean of (q_l + k_l) / 2
    q''  = sqrt(K) q' / |q'|            k''  = t sqrt(K) k' / |k'|

  A head of keys is added to each of the heads of queries that it serves, and
  the mean is over these. t is a temperature of each head of keys, 1 at first.

  Args:
    module: the layer's attention, in which the parameters are declared.
    q_BLHK: queries, the product W_q x, [batch, length, heads H, features K].
    k_BLJK: keys, the product W_k x, [batch, length, heads of keys J, features].
    ctx: the context of the layer, with the documents.
    cache: the layer's cache; None: there is none.

  Returns:
    q'', k'', and the cache with the convolutions' last inputs.
  """
  # The means of each query with the key that serves it, R = H / J queries.
  B, L, H, K = q_BLHK.shape
  J = k_BLJK.shape[2]
  q_BLJRK = q_BLHK.reshape(B, L, J, H // J, K)
  mean_BLJRK = (q_BLJRK + k_BLJK[:, :, :, None]) / 2

  # Add what the convolutions make of each.
  convolved_q_BLHK, cache = _convolve_twice(module, 'query', q_BLHK, ctx, cache)
  convolved_k_BLJK, cache = _convolve_twice(module, 'key', k_BLJK, ctx, cache)
  q_BLHK = convolved_q_BLHK + mean_BLJRK.reshape(B, L, H, K)
  k_BLJK = convolved_k_BLJK + mean_BLJRK.mean(3)

  # The lengths, and the temperature of keys.
  temperature_J = declare(module, 'key_temperature', init=nn.initializers.ones,
                          shape=(J,), role=Role(('kv_heads',)))
  q_BLHK = _set_lengths(q_BLHK)
  k_BLJK = _set_lengths(k_BLJK) * temperature_J[None, None, :, None]
  return q_BLHK, k_BLJK.astype(q_BLHK.dtype), cache


def _convolve_twice(module: Any, name: str, x_BLHK: jax.Array, ctx: Context,
                    cache: Optional[Cache]
                    ) -> tuple[jax.Array, Optional[Cache]]:
  """Applies two causal convolutions, one after the other, to queries or keys:

    y_l = a + sum over i < W of w_i * x_(l - i)       a filter of each feature
    z_l = b + sum over i < U of M_i y_(l - i)         a matrix of each head

  W is model.cca_taps and U model.cca_head_taps. A token sees the tokens of its
  document; x counts as 0 before them, and so y as a.

  Args:
    module: the layer's attention, in which w, a, M and b are declared.
    name: 'query' or 'key', what x is.
    x_BLHK: the queries or keys, [batch, length, heads, features K].
    ctx: the context of the layer, with the documents.
    cache: the layer's cache; None: there is none.

  Returns:
    z, of the shape of x, and the cache with the last inputs of both.
  """
  config: ModelConfig = module.config
  fields = config.part(AttentionConfig)
  axes = AXES_OF_HEADS[name], 'head'
  inputs = {} if cache is None else cache.inputs
  _, length, H, K = x_BLHK.shape

  # The first convolution. Its bias is added below, behind the mask.
  taps, mix = TAPS.format(name), MIX.format(name)
  y_BLHK, last_x = features.declare_and_convolve(
      module, taps, x_BLHK, width=fields.cca_taps, axes=axes,
      before_BWHK=inputs.get(taps), segment_ids_BL=ctx.segment_ids_BL,
      valid_BL=ctx.valid_BL)
  bias_HK = features.declare_filters(
      module, f'{taps}_bias', width=fields.cca_taps, shape=(H, K), axes=axes)

  # The tokens that the second one sees; those of other documents are masked.
  reach = fields.cca_head_taps - 1
  all_BMHK, seen_BLWHK = features.stack_seen_tokens(
      y_BLHK, reach + 1, before_BWHK=inputs.get(mix),
      segment_ids_BL=ctx.segment_ids_BL)
  seen_BLWHK += bias_HK[None, None, None].astype(y_BLHK.dtype)

  # The second convolution, a product of each head.
  axes_of_weight = None, axes[0], 'head', None
  weight_WHKU = layers.weight(
      module, mix, shape=(reach + 1, H, K, K), axes=axes_of_weight,
      in_axes=(0, 2), batch_axes=(1,))
  z_BLHK = layers.einsum('BLWHK,WHKU->BLHU', seen_BLWHK, weight_WHKU,
                         dtype=config.compute_dtype, axes=axes_of_weight)
  z_BLHK = layers.add_bias(
      z_BLHK, layers.bias(module, f'{mix}_bias', shape=(H, K), axes=axes))
  z_BLHK = sharding.constrain(z_BLHK, 'batch', 'length', *axes)
  if cache is not None:
    last_y = features.last_inputs(all_BMHK, count=reach, length=length,
                                  valid_BL=ctx.valid_BL)
    cache = cache.replace(inputs=cache.inputs | {taps: last_x, mix: last_y})
  return z_BLHK, cache


def _set_lengths(x_BLHK: jax.Array) -> jax.Array:
  """Returns sqrt(K) x / |x| of vectors of K features, in x's dtype."""
  x32_BLHK = x_BLHK.astype(jnp.float32)
  squares_BLH1 = jnp.square(x32_BLHK).sum(-1, keepdims=True)
  # The least length keeps the gradient of a vector of zeros finite.
  least_length = jnp.finfo(jnp.float32).eps
  squares_BLH1 = jnp.maximum(squares_BLH1, least_length ** 2)
  factor_BLH1 = jnp.sqrt(x_BLHK.shape[-1]) * jax.lax.rsqrt(squares_BLH1)
  return (x32_BLHK * factor_BLH1).astype(x_BLHK.dtype)


def delay_half_of_values(module: Any, v_BLJK: jax.Array, ctx: Context,
                         cache: Optional[Cache]
                         ) -> tuple[jax.Array, Optional[Cache]]:
  """Takes half of the values from the token before (the value shift of
  compressed convolutional attention):

    v'_l = [first half of v_l, second half of v_(l-1)]

  The halves are of the features of all heads together: with an even number of
  heads, whole heads are delayed. The first token of a document has the bias of
  the product in place of v_(l-1), or 0.

  Args:
    module: the layer's attention, which has declared the product's bias.
    v_BLJK: the values, [batch, length, heads J, features K].
    ctx: the context of the layer, with positions and documents.
    cache: the layer's cache; None: there is none.

  Returns:
    The values, and the cache with those of the last token.
  """
  J, K = v_BLJK.shape[2:]
  first_JK = jnp.zeros((J, K), v_BLJK.dtype)
  if module.config.attention_bias:
    bias_JK = module.get_variable('params', 'value_bias')
    first_JK = nn.meta.unbox(bias_JK).astype(v_BLJK.dtype)
  shifted_BLJK, cache = steps.take_token_before(
      VALUE_SHIFT, v_BLJK, first_BLJK=first_JK[None, None], ctx=ctx,
      cache=cache)
  is_delayed_JK = (jnp.arange(J * K) >= J * K // 2).reshape(J, K)
  return jnp.where(is_delayed_JK[None, None], shifted_BLJK, v_BLJK), cache


def empty_inputs(config: ModelConfig, rows: tuple[int, ...]
                 ) -> dict[str, jax.Array]:
  """Returns what a cache keeps of the tokens before the first: zeros, by name.

  Args:
    config: the config of the layer.
    rows: the rows of the batch, (..., B).
  """
  fields = config.part(AttentionConfig)
  sizes = {VALUE_SHIFT: (1, config.num_kv_heads)}
  for name, heads in (('query', config.num_heads),
                      ('key', config.num_kv_heads)):
    sizes[TAPS.format(name)] = fields.cca_taps - 1, heads
    sizes[MIX.format(name)] = fields.cca_head_taps - 1, heads
  inputs = {}
  for name, (tokens, heads) in sizes.items():
    shape = *rows, tokens, heads, config.head_dim
    inputs[name] = jnp.zeros(shape, config.compute_dtype)
  return inputs
