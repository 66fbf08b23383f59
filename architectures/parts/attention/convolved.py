"""Compressed convolutional attention (CCA: Figliolia et al. 2025, arXiv
2510.04476; as transformers' Zaya has it).

Queries, keys and values are made in a width that is compressed: num_heads and
num_kv_heads times head_dim, which may be less than d_model. With q_l = W_q x_l,
k_l = W_k x_l of that width

  q'_l = C(q)_l + (q_l + k_l) / 2        k'_l = C(k)_l + mean of (q_l + k_l) / 2
  q''  = sqrt(K) q' / |q'|               k''  = t sqrt(K) k' / |k'|
  v_l  = [W_v x_l, W_v' x_(l-1)]

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
# The names of the two products of values, of a token and of the one before.
VALUE, VALUE_BEFORE = 'value', 'value_before'
AXES_OF_HEADS = {'query': 'heads', 'key': 'kv_heads'}


def mix_queries_and_keys(module: Any, q_BLHK: jax.Array, k_BLJK: jax.Array,
                         ctx: Context, cache: Optional[Cache]
                         ) -> tuple[jax.Array, jax.Array, Optional[Cache]]:
  """Mixes queries and keys with each other and with those of the last tokens
  (compressed convolutional attention), where C is two convolutions:

    q'_l = C(q)_l + (q_l + k_l) / 2     k'_l = C(k)_l + mean of (q_l + k_l) / 2
    q''  = sqrt(K) q' / |q'|            k''  = t sqrt(K) k' / |k'|

  A head of keys is added to each of the R = H / J heads of queries that it
  serves, and the mean is over these. t is a learned temperature of each head of
  keys, 1 at first, and K the size of a head.

  The suffixes name axes: B batch, L length, H heads of queries, J heads of
  keys, R heads of queries for each head of keys, K features of a head.

  Args:
    module: the layer's attention, in which the parameters are declared.
    q_BLHK: queries q, the product W_q x.
    k_BLJK: keys k, the product W_k x.
    ctx: the context of the layer, with the documents.
    cache: the layer's cache; None: there is none.

  Returns:
    q'', [B, L, H, K]; k'', [B, L, J, K]; and the cache with the last inputs of
    the convolutions.
  """
  # The mean of each query and the key that serves it.
  B, L, H, K = q_BLHK.shape
  J = k_BLJK.shape[2]
  q_BLJRK = q_BLHK.reshape(B, L, J, H // J, K)
  mean_BLJRK = (q_BLJRK + k_BLJK[:, :, :, None]) / 2

  # Add it to what the convolutions make of queries and of keys.
  convolved_q_BLHK, cache = _convolve_twice(module, 'query', q_BLHK, ctx, cache)
  convolved_k_BLJK, cache = _convolve_twice(module, 'key', k_BLJK, ctx, cache)
  mixed_q_BLHK = convolved_q_BLHK + mean_BLJRK.reshape(B, L, H, K)
  mixed_k_BLJK = convolved_k_BLJK + mean_BLJRK.mean(3)

  # Set their lengths. Only the temperature changes how sharp the weights are.
  temperature_J = declare(module, 'key_temperature', init=nn.initializers.ones,
                          shape=(J,), role=Role(('kv_heads',)))
  new_q_BLHK = _set_lengths(mixed_q_BLHK)
  new_k_BLJK = _set_lengths(mixed_k_BLJK) * temperature_J[None, None, :, None]
  return new_q_BLHK, new_k_BLJK.astype(new_q_BLHK.dtype), cache


def _convolve_twice(module: Any, name: str, x_BLHK: jax.Array, ctx: Context,
                    cache: Optional[Cache]
                    ) -> tuple[jax.Array, Optional[Cache]]:
  """Applies two causal convolutions, one after the other, to queries or keys:

    y_l = a + sum over i < W of w_i * x_(l - i)       a filter of each feature
    z_l = b + sum over i < U of M_i y_(l - i)         a matrix of each head

  W is model.cca_taps and U model.cca_head_taps. A token sees the tokens of its
  document; x counts as 0 before them, and so y as its bias a.

  The suffixes name axes: B batch, L length, H heads, K features of a head, W
  tokens that a convolution sees, M inputs with those of earlier tokens.

  Args:
    module: the layer's attention, in which w, a, M and b are declared.
    name: 'query' or 'key', what x is.
    x_BLHK: the queries or keys.
    ctx: the context of the layer, with the documents.
    cache: the layer's cache; None: there is none.

  Returns:
    z, [B, L, H, K], and the cache with the last inputs of both convolutions.
  """
  config: ModelConfig = module.config
  fields = config.part(AttentionConfig)
  axes = AXES_OF_HEADS[name], 'head'
  _, length, H, K = x_BLHK.shape
  # The names of the parameters are those of the last inputs in a cache, too.
  taps, mix = TAPS.format(name), MIX.format(name)
  last_inputs: dict[str, jax.Array] = {}
  if cache is not None:
    last_inputs = cache.inputs

  # The first convolution, without its bias a. That is added below, behind the
  # mask of other documents, so that y counts there as a and not as 0.
  y_BLHK, last_x = features.declare_and_convolve(
      module, taps, x_BLHK, width=fields.cca_taps, axes=axes,
      before_BWHK=last_inputs.get(taps), segment_ids_BL=ctx.segment_ids_BL,
      valid_BL=ctx.valid_BL)
  bias_HK = features.declare_filters(
      module, f'{taps}_bias', width=fields.cca_taps, shape=(H, K), axes=axes)

  # The tokens that the second one sees; those of other documents are masked.
  num_seen = fields.cca_head_taps
  all_BMHK, seen_BLWHK = features.stack_seen_tokens(
      y_BLHK, num_seen, before_BWHK=last_inputs.get(mix),
      segment_ids_BL=ctx.segment_ids_BL)
  seen_BLWHK += bias_HK[None, None, None].astype(y_BLHK.dtype)

  # The second convolution, a product with a matrix M_i of each head for each
  # of the tokens seen, [K, U] with U = K.
  axes_of_weight = None, axes[0], 'head', 'latent'
  weight_WHKU = layers.weight(
      module, mix, shape=(num_seen, H, K, K), axes=axes_of_weight,
      in_axes=(0, 2), batch_axes=(1,))
  z_BLHK = layers.einsum('BLWHK,WHKU->BLHU', seen_BLWHK, weight_WHKU,
                         dtype=config.compute_dtype, axes=axes_of_weight)
  mix_bias_HK = layers.bias(module, f'{mix}_bias', shape=(H, K), axes=axes)
  z_BLHK = layers.add_bias(z_BLHK, mix_bias_HK)
  z_BLHK = sharding.constrain(z_BLHK, 'batch', 'length', *axes)

  # The next tokens see the last inputs of both.
  if cache is not None:
    last_y = features.last_inputs(all_BMHK, count=num_seen - 1, length=length,
                                  valid_BL=ctx.valid_BL)
    cache = cache.replace(inputs=cache.inputs | {taps: last_x, mix: last_y})
  return z_BLHK, cache


def _set_lengths(x_BLHK: jax.Array) -> jax.Array:
  """Returns sqrt(K) x / |x|, [B, L, H, K], in x's dtype: each vector of K
  features gets the length sqrt(K), whatever its own is."""
  x32_BLHK = x_BLHK.astype(jnp.float32)
  squares_BLH1 = jnp.square(x32_BLHK).sum(-1, keepdims=True)
  # The least length keeps the gradient of a vector of zeros finite.
  least_length = jnp.finfo(jnp.float32).eps
  squares_BLH1 = jnp.maximum(squares_BLH1, least_length ** 2)
  factor_BLH1 = jnp.sqrt(x_BLHK.shape[-1]) * jax.lax.rsqrt(squares_BLH1)
  return (x32_BLHK * factor_BLH1).astype(x_BLHK.dtype)


def make_values(module: Any, x_BLD: jax.Array, ctx: Context,
                cache: Optional[Cache]
                ) -> tuple[jax.Array, Optional[Cache]]:
  """Makes values of which half are of the token before (the value shift of
  compressed convolutional attention):

    v_l = [W x_l + b, W' x_(l-1) + b']

  The halves are of the features of all heads together: with an even number of
  heads, whole heads are of the token before. Before the first token of a
  document x counts as 0, so that this token has b' alone, and 0 without
  model.attention_bias.

  The suffixes name axes: B batch, L length, D d_model, J heads of values, K
  features of a head, I features of all heads together.

  Args:
    module: the layer's attention, in which W (value), W' (value_before) and
      their biases are declared, with half of the features of each head.
    x_BLD: the layer's input.
    ctx: the context of the layer, with positions and documents.
    cache: the layer's cache; None: there is none.

  Returns:
    v, [B, L, J, K], and the cache with the second product of the last token.
  """
  # The products, with half of the features of each head.
  config: ModelConfig = module.config
  J, K = config.num_kv_heads, config.head_dim
  products_BLJK = {}
  for name in (VALUE, VALUE_BEFORE):
    products_BLJK[name] = layers.dense(
        module, name, 'BLD,DJK->BLJK', x_BLD,
        shape=(config.d_model, J, K // 2), axes=('embed', 'kv_heads', 'head'),
        with_bias=config.attention_bias, deterministic=ctx.deterministic)

  # The second is taken from the token before. The product has declared the
  # bias, so it is read here and not declared again.
  second_BLJK = products_BLJK[VALUE_BEFORE]
  first_JK = jnp.zeros(second_BLJK.shape[2:], second_BLJK.dtype)
  if config.attention_bias:
    bias_JK = module.get_variable('params', f'{VALUE_BEFORE}_bias')
    first_JK = nn.meta.unbox(bias_JK).astype(second_BLJK.dtype)
  before_BLJK, cache = steps.take_token_before(
      VALUE_SHIFT, second_BLJK, first_BLJK=first_JK[None, None], ctx=ctx,
      cache=cache)

  # One half after the other, divided among the heads.
  B, L = x_BLD.shape[:2]
  own_BLI = products_BLJK[VALUE].reshape(B, L, -1)
  before_BLI = before_BLJK.reshape(B, L, -1)
  v_BLI = jnp.concatenate([own_BLI, before_BLI], -1)
  return v_BLI.reshape(B, L, J, K), cache


def empty_inputs(config: ModelConfig, rows: tuple[int, ...]
                 ) -> dict[str, jax.Array]:
  """Returns what a cache keeps for compressed convolutional attention before
  the first token: zeros.

  Args:
    config: the config of the layer.
    rows: the rows of the batch, (..., B).

  Returns:
    A dict of arrays [..., B, tokens, heads, head_dim] by the names under which
    this file reads them: the second product of values of the last token, which
    has half as many features, and the last inputs of the two convolutions of
    queries and of keys.
  """
  # Queries and keys go through two convolutions, one after the other. One over
  # n tokens needs the inputs of the last n - 1 tokens.
  fields = config.part(AttentionConfig)
  shapes = {}
  for name, heads in (('query', config.num_heads),
                      ('key', config.num_kv_heads)):
    tokens_of_taps = fields.cca_taps - 1
    tokens_of_mix = fields.cca_head_taps - 1
    shapes[TAPS.format(name)] = (*rows, tokens_of_taps, heads, config.head_dim)
    shapes[MIX.format(name)] = (*rows, tokens_of_mix, heads, config.head_dim)

  # Half of each value is made of the token before.
  shapes[VALUE_SHIFT] = (*rows, 1, config.num_kv_heads, config.head_dim // 2)
  inputs = {}
  for name, shape in shapes.items():
    inputs[name] = jnp.zeros(shape, config.compute_dtype)
  return inputs
