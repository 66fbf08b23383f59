"""PaTH attention (Yang et al. 2025, arXiv 2505.16381): a position encoding of
products of reflections that each token makes.

  score_lm = scale q_l H_l H_(l-1) ... H_(m+1) k_m,   H_t = I - r_t w_t w_t^T

w_t has length 1 and r_t lies in (0, 2), one of both for each head of keys J:
w = n(silu(conv(W_2 W_1 x))), r = 2 sigmoid(W_r x + b). H_t moves a key along
w_t alone, and turns it around where r_t is 2.

The UT transform sums such a product up. Of tokens t and s of a chunk, and of
keys k as the tokens before the chunk have left them,

  score_lm = scale q_l (k_m - sum over s <= l of w_s y_sm)
  y        = (I + A)^-1 Z,   A_st = r_s w_s w_t for t < s,
                             Z_sm = r_s w_s k_m for m < s, and 0 for other m

and the same sum over all tokens s of the chunk leaves the keys for the next
one. So a row takes chunk after chunk, and its work is quadratic in its length.
A cache keeps the keys as all tokens so far have left them.
"""

import functools
from typing import Any, Optional

import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts.attention import kernels
from architectures.parts.attention import steps
from architectures.parts.attention.fields import PathConfig
from architectures.parts.cache import Cache
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context, KeysAndValues
from architectures.parts.recurrent import features
from architectures.parts.recurrent import pieces

MOST_TOKENS_OF_CHUNK = 64
CONV = 'path_conv'  # the name of the filters, and of what a cache keeps


def make_reflections(module: Any, x_BLD: jax.Array, ctx: Context,
                     cache: Optional[Cache]
                     ) -> tuple[jax.Array, jax.Array, Optional[Cache]]:
  """Makes the vectors w and the rates r of the reflections I - r w w^T by which
  each token moves the keys before it, one for each head of keys (PaTH):

    w = n(silu(conv(W_2 W_1 x))),   r = 2 sigmoid(W_r x + b),   n(w) = w / |w|

  r is 0 on padding, which must not move keys. With a model.path.rank of 0 there
  is one product W x in place of W_2 W_1 x.

  Args:
    module: the layer's attention, in which the parameters are declared.
    x_BLD: the layer's input, [batch, length, d_model].
    ctx: the context of the layer.
    cache: the layer's cache; None: there is none.

  Returns:
    w, [B, L, J, K], and r, [B, L, J], with J heads of keys of K features, in
    float32; and the cache with the last inputs of the convolution.
  """
  config: ModelConfig = module.config
  fields = config.part(PathConfig)
  J, K = config.num_kv_heads, config.head_dim
  dense = functools.partial(layers.dense, module, with_bias=False,
                            deterministic=ctx.deterministic)

  # The vectors, of a small vector of `rank` features or of the input.
  input_BLU, axis = x_BLD, 'embed'
  if fields.rank:
    axis = None
    input_BLU = dense('path_down', 'BLD,DU->BLU', x_BLD,
                      shape=(config.d_model, fields.rank), axes=('embed', None))
  w_BLJK = dense('path', 'BLU,UJK->BLJK', input_BLU,
                 shape=(input_BLU.shape[-1], J, K),
                 axes=(axis, 'kv_heads', 'head'))
  previous = None if cache is None else cache.inputs[CONV]
  w_BLJK, last = features.declare_and_convolve(
      module, CONV, w_BLJK, width=fields.conv, axes=('kv_heads', 'head'),
      before_BWHK=previous, segment_ids_BL=ctx.segment_ids_BL,
      valid_BL=ctx.valid_BL, silu=True)
  if cache is not None:
    cache = cache.replace(inputs=cache.inputs | {CONV: last})
  w_BLJK = features.normalize_length(w_BLJK.astype(jnp.float32))

  # The rates.
  z_BLJ = dense('path_rate', 'BLD,DJ->BLJ', x_BLD, shape=(config.d_model, J),
                axes=('embed', 'kv_heads'))
  bias_J = layers.bias(module, 'path_rate_bias', shape=(J,), axes=('kv_heads',))
  rate_BLJ = 2 * jax.nn.sigmoid(
      z_BLJ.astype(jnp.float32) + bias_J.astype(jnp.float32)[None, None])
  if ctx.valid_BL is not None:
    rate_BLJ = jnp.where(ctx.valid_BL[..., None] != 0, rate_BLJ, 0)
  return w_BLJK, rate_BLJ, cache


def reflect_keys(module: Any, x_BLD: jax.Array, q_BLHK: jax.Array,
                 keys: KeysAndValues, visible: kernels.VisibleKeys,
                 k_positions_BM: jax.Array, reads_slots: bool, ctx: Context,
                 cache: Optional[Cache]
                 ) -> tuple[kernels.VisibleKeys, Optional[Cache]]:
  """Adds to the scores q_l k_m of attention what the reflections H of the
  tokens between key m and query l change of them (PaTH), and leaves in the
  cache keys that all tokens so far have reflected:

    score_lm = scale q_l H_l H_(l-1) ... H_(m+1) k_m,   H_t = I - r_t w_t w_t^T

  Args:
    module: the layer's attention.
    x_BLD: the layer's input, [batch, length L, d_model].
    q_BLHK: queries, [B, L, heads, features].
    keys: the keys and values that they meet, [B, M, heads of keys, features].
    visible: which keys the queries see.
    k_positions_BM: the positions of the keys.
    reads_slots: whether the keys are the slots of a cache.
    ctx: the context of the layer.
    cache: the layer's cache; None: there is none.

  Returns:
    `visible` with the change of the scores as a bias, and the cache with the
    reflected keys.
  """
  config: ModelConfig = module.config
  w_BLJK, rate_BLJ, cache = make_reflections(module, x_BLD, ctx, cache)

  # A token moves the keys before it. The slot of a token in a cache is its
  # position; else the tokens stand in order.
  L, M = q_BLHK.shape[1], keys.key_BMJK.shape[1]
  places_BL = places_BM = jnp.arange(L)[None]
  if reads_slots:
    places_BL, places_BM = ctx.positions_BL, k_positions_BM
  is_before_BLM = places_BM[:, None] < places_BL[:, :, None]

  # Padding of the last chunk counts no FLOPs, nor do pairs that are hidden.
  visible_pairs, _, prompt_pairs = kernels.count_useful_pairs(
      module.kind, config, queries=L, keys=M, prefix=ctx.prefix_B is not None)
  places = min(L, MOST_TOKENS_OF_CHUNK)
  pairs = visible_pairs, -(-L // places) * places * M, prompt_pairs
  change_BHLM, k_BMJK = reflect_in_chunks(
      q_BLHK, keys.key_BMJK, w_BLJK=w_BLJK, rate_BLJ=rate_BLJ,
      is_before_BLM=is_before_BLM, places=places, pairs=pairs)
  if cache is not None:
    cache = cache.write(k_BMJK, None, positions_BL=k_positions_BM)
  return steps.add_bias_to_scores(visible, module.scale * change_BHLM), cache


def reflect_in_chunks(q_BLHK: jax.Array, k_BMJK: jax.Array, w_BLJK: jax.Array,
                      rate_BLJ: jax.Array, is_before_BLM: jax.Array,
                      places: int, pairs: tuple[int, int, int]
                      ) -> tuple[jax.Array, jax.Array]:
  """Computes, for reflections H_t = I - r_t w_t w_t^T,

    q_l (H_l ... H_(m+1) - I) k_m    and    H_L ... H_(m+1) k_m

  where H_t is left out of the products if is_before_tm is false. Of tokens t
  and s of a chunk, and of keys k as the chunks before have left them, the UT
  transform gives

    q_l (H_l ... - I) k_m = - sum over s <= l of (q_l w_s) y_sm
    y = (I + A)^-1 Z,   A_st = r_s w_s w_t for t < s,   Z_sm = r_s w_s k_m

  The suffixes name axes: B batch, L tokens, M keys, H heads of queries, J heads
  of keys, R = H / J, K features, P and Q tokens of a chunk.

  Args:
    q_BLHK: queries.
    k_BMJK: keys.
    w_BLJK: the vectors of the reflections, of length 1.
    rate_BLJ: their rates.
    is_before_BLM: whether a token moves a key.
    places: P, the number of tokens of a chunk.
    pairs: how many pairs of a token and a key count FLOPs, of all that are
      computed, and of a prompt (layers.count_flops_as_useful_part).

  Returns:
    The changes of the products, float32 [B, H, L, M], and the keys after all
    tokens, [B, M, J, K].
  """
  (B, L, H, K), (M, J) = q_BLHK.shape, k_BMJK.shape[1:3]
  k_BJMK = jnp.swapaxes(k_BMJK, 1, 2).astype(jnp.float32)
  cut = functools.partial(pieces.cut_heads_into_pieces, places)
  before_NBPM = pieces.cut_row_into_pieces(places, is_before_BLM)
  below_diagonal = functools.partial(
      layers.count_flops_as_useful_part, places - 1, 2 * places)
  up_to_diagonal = functools.partial(
      layers.count_flops_as_useful_part, places + 1, 2 * places)

  def apply_chunk(change_BJMK: jax.Array, chunk: tuple) -> tuple:
    """Returns how all keys are changed after a chunk, and the changes of its
    queries' products with them, [B, J, R, P, M]."""
    q_BHPK, w_BJPK, rate_BJP, before_BPM = chunk
    q_BJRPK = q_BHPK.reshape(B, J, H // J, places, K)
    scaled_BJPK = rate_BJP[..., None] * w_BJPK
    # The tokens of the chunk with each other. Of triangles the zeros count no
    # FLOPs.
    with pieces.count_flops_without_padding(places, L):
      with below_diagonal():
        a_BJPQ = jnp.einsum('bjpk,bjqk->bjpq', scaled_BJPK, w_BJPK)
      inverse_BJPQ = pieces.invert_system(jnp.tril(a_BJPQ, -1))
      with up_to_diagonal():
        seen_BJRPQ = jnp.tril(jnp.einsum('bjrpk,bjqk->bjrpq', q_BJRPK, w_BJPK))

    # The tokens of the chunk with all keys.
    with layers.count_flops_as_useful_part(*pairs):
      z_BJPM = jnp.einsum('bjpk,bjmk->bjpm', scaled_BJPK, k_BJMK + change_BJMK)
      from_earlier = jnp.einsum('bjrpk,bjmk->bjrpm', q_BJRPK, change_BJMK)
      with up_to_diagonal():
        y_BJPM = jnp.einsum('bjpq,bjqm->bjpm', inverse_BJPQ,
                            z_BJPM * before_BPM[:, None])
        from_chunk = jnp.einsum('bjrpq,bjqm->bjrpm', seen_BJRPQ, y_BJPM)
      change_BJMK -= jnp.einsum('bjpk,bjpm->bjmk', w_BJPK, y_BJPM)
    return change_BJMK, from_earlier - from_chunk

  change_BJMK, scores_NBJRPM = jax.lax.scan(
      apply_chunk, jnp.zeros_like(k_BJMK),
      (cut(q_BLHK), cut(w_BLJK), cut(rate_BLJ), before_NBPM))

  # The chunks as one row again, without the padding of the last one.
  scores_BHLM = jnp.moveaxis(scores_NBJRPM, 0, 3).reshape(B, H, -1, M)[:, :, :L]
  k_BMJK = jnp.swapaxes(k_BJMK + change_BJMK, 1, 2).astype(k_BMJK.dtype)
  return scores_BHLM, k_BMJK
