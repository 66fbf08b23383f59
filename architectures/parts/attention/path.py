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
from typing import Any, NamedTuple, Optional

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

  r is 0 on padding, which must not move keys: I - 0 w w^T leaves a key as it
  is. With a model.path.rank of 0 there is one product W x in place of W_2 W_1
  x.

  The suffixes name axes: B batch, L length, D d_model, J heads of keys, K
  features of a key, U features of the input of W_2.

  Args:
    module: the layer's attention, in which the parameters are declared.
    x_BLD: the layer's input.
    ctx: the context of the layer.
    cache: the layer's cache; None: there is none.

  Returns:
    w, [B, L, J, K], and r, [B, L, J], in float32; and the cache with the last
    inputs of the convolution.
  """
  config: ModelConfig = module.config
  fields = config.part(PathConfig)
  J, K = config.num_kv_heads, config.head_dim
  dense = functools.partial(layers.dense, module, with_bias=False,
                            deterministic=ctx.deterministic)

  # The products, of a small vector of `rank` features or of the input.
  input_BLU = x_BLD
  axis_of_input: Optional[str] = 'embed'
  if fields.rank:
    axis_of_input = None
    input_BLU = dense('path_down', 'BLD,DU->BLU', x_BLD,
                      shape=(config.d_model, fields.rank), axes=('embed', None))
  products_BLJK = dense('path', 'BLU,UJK->BLJK', input_BLU,
                        shape=(input_BLU.shape[-1], J, K),
                        axes=(axis_of_input, 'kv_heads', 'head'))

  # The convolution, which begins with the last inputs of an earlier call, and
  # the vectors of length 1.
  previous_BWJK = None
  if cache is not None:
    previous_BWJK = cache.inputs[CONV]
  convolved_BLJK, last_BWJK = features.declare_and_convolve(
      module, CONV, products_BLJK, width=fields.conv, axes=('kv_heads', 'head'),
      before_BWHK=previous_BWJK, segment_ids_BL=ctx.segment_ids_BL,
      valid_BL=ctx.valid_BL, silu=True)
  if cache is not None:
    cache = cache.replace(inputs=cache.inputs | {CONV: last_BWJK})
  w_BLJK = features.normalize_length(convolved_BLJK.astype(jnp.float32))

  # The rates, between 0 and 2.
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
  """Makes the bias that turns attention's scores of a query l and a key m into
  those of PaTH, in which each token t between the two reflects the key:

    score_lm = scale q_l H_l H_(l-1) ... H_(m+1) k_m,   H_t = I - r_t w_t w_t^T
    bias_lm  = score_lm - scale q_l k_m

  In the cache it leaves keys that all tokens so far have reflected, so that the
  next token need only reflect them once more.

  The suffixes name axes: B batch, L queries (tokens), D d_model, M keys, H
  heads of queries, J heads of keys, K features of a head.

  Args:
    module: the layer's attention, in which the parameters are declared.
    x_BLD: the layer's input, of which w and r are made.
    q_BLHK: queries.
    keys: the keys and values that they meet, [B, M, J, K].
    visible: which keys the queries see.
    k_positions_BM: the positions of the keys.
    reads_slots: whether the keys are the slots of a cache.
    ctx: the context of the layer.
    cache: the layer's cache; None: there is none.

  Returns:
    `visible` with the bias, and the cache with the reflected keys.
  """
  config: ModelConfig = module.config
  w_BLJK, rate_BLJ, cache = make_reflections(module, x_BLD, ctx, cache)

  # A token reflects the keys before it. The slot of a token in a cache is its
  # position; else the tokens stand in order.
  L, M = q_BLHK.shape[1], keys.key_BMJK.shape[1]
  places_BL = places_BM = jnp.arange(L)[None]
  if reads_slots:
    places_BL, places_BM = ctx.positions_BL, k_positions_BM
  is_before_BLM = places_BM[:, None] < places_BL[:, :, None]

  # The tokens are taken chunk by chunk, and the last chunk is filled up. Pairs
  # of its padding and a key count no FLOPs, nor do pairs that are hidden.
  visible_pairs, _, prompt_pairs = kernels.count_useful_pairs(
      module.kind, config, queries=L, keys=M, prefix=ctx.prefix_B is not None)
  places = min(L, MOST_TOKENS_OF_CHUNK)
  num_chunks = -(-L // places)
  computed_pairs = num_chunks * places * M
  pairs = visible_pairs, computed_pairs, prompt_pairs
  change_BHLM, k_BMJK = reflect_in_chunks(
      q_BLHK, keys.key_BMJK, w_BLJK=w_BLJK, rate_BLJ=rate_BLJ,
      is_before_BLM=is_before_BLM, places=places, pairs=pairs)
  if cache is not None:
    cache = cache.write(k_BMJK, None, positions_BL=k_positions_BM)
  return steps.add_bias_to_scores(visible, module.scale * change_BHLM), cache


class _Chunk(NamedTuple):
  """A chunk of P tokens that reflect the keys (PaTH). In a scan over chunks,
  the axis of the chunks stands in front.

  The suffixes name axes: B batch, P tokens of the chunk, H heads of queries, J
  heads of keys, K features, M keys.
  """
  q_BHPK: jax.Array  # queries
  w_BJPK: jax.Array  # the vectors of the reflections, of length 1
  rate_BJP: jax.Array  # their rates r
  before_BPM: jax.Array  # 1 where a token reflects a key, else 0


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
  B, L, H, _ = q_BLHK.shape
  M = k_BMJK.shape[1]
  k_BJMK = jnp.swapaxes(k_BMJK, 1, 2).astype(jnp.float32)
  cut = functools.partial(pieces.cut_heads_into_pieces, places)
  before_NBPM = pieces.cut_row_into_pieces(places, is_before_BLM)
  unchanged_BJMK = jnp.zeros_like(k_BJMK)
  chunks = _Chunk(q_BHPK=cut(q_BLHK), w_BJPK=cut(w_BLJK),
                  rate_BJP=cut(rate_BLJ), before_BPM=before_NBPM)
  change_BJMK, scores_NBJRPM = jax.lax.scan(
      functools.partial(_reflect_by_chunk, k_BJMK, pairs, L), unchanged_BJMK,
      chunks)

  # The chunks as one row again, without the padding of the last one.
  scores_BHLM = jnp.moveaxis(scores_NBJRPM, 0, 3).reshape(B, H, -1, M)[:, :, :L]
  k_BMJK = jnp.swapaxes(k_BJMK + change_BJMK, 1, 2).astype(k_BMJK.dtype)
  return scores_BHLM, k_BMJK


def _reflect_by_chunk(
    k_BJMK: jax.Array, pairs: tuple[int, int, int], length: int,
    change_BJMK: jax.Array, chunk: _Chunk) -> tuple[jax.Array, jax.Array]:
  """Reflects all keys by the tokens of one chunk, with the UT transform: for
  tokens t and s of the chunk and keys k' = k + change as the chunks before have
  left them,

    y         = (I + A)^-1 Z,   A_st = r_s w_s w_t for t < s,
                                Z_sm = r_s w_s k'_m, 0 if m is not before s
    change'_m = change_m - sum over s of w_s y_sm
    score_lm  = q_l change_m - sum over s <= l of (q_l w_s) y_sm

  The suffixes name axes: B batch, J heads of keys, R heads of queries for each
  head of keys, P and Q tokens of the chunk, M keys, K features.

  Args:
    k_BJMK: the keys k before any reflection.
    pairs: how many pairs of a token and a key count FLOPs; see
      `reflect_in_chunks`.
    length: how many tokens the row has, without what fills up the last chunk,
      which counts no FLOPs.
    change_BJMK: how the chunks before have changed the keys.
    chunk: the tokens of the chunk.

  Returns:
    The change of the keys after the chunk, which is the carry of a scan; and
    the change of the products of the chunk's queries with the keys, [B, J, R,
    P, M].
  """
  B, H, P, K = chunk.q_BHPK.shape
  J = k_BJMK.shape[1]
  q_BJRPK = chunk.q_BHPK.reshape(B, J, H // J, P, K)
  scaled_BJPK = chunk.rate_BJP[..., None] * chunk.w_BJPK
  # Products with a triangle count no FLOPs of its zeros.
  below_diagonal = functools.partial(
      layers.count_flops_as_useful_part, P - 1, 2 * P)
  up_to_diagonal = functools.partial(
      layers.count_flops_as_useful_part, P + 1, 2 * P)

  # The tokens of the chunk with each other: the system, and which w each query
  # meets.
  with pieces.count_flops_without_padding(P, length):
    with below_diagonal():
      a_BJPQ = jnp.einsum('bjpk,bjqk->bjpq', scaled_BJPK, chunk.w_BJPK)
    inverse_BJPQ = pieces.invert_system(jnp.tril(a_BJPQ, -1))
    with up_to_diagonal():
      seen_BJRPQ = jnp.tril(
          jnp.einsum('bjrpk,bjqk->bjrpq', q_BJRPK, chunk.w_BJPK))

  # The tokens of the chunk with all keys.
  with layers.count_flops_as_useful_part(*pairs):
    z_BJPM = jnp.einsum('bjpk,bjmk->bjpm', scaled_BJPK, k_BJMK + change_BJMK)
    from_earlier = jnp.einsum('bjrpk,bjmk->bjrpm', q_BJRPK, change_BJMK)
    with up_to_diagonal():
      y_BJPM = jnp.einsum('bjpq,bjqm->bjpm', inverse_BJPQ,
                          z_BJPM * chunk.before_BPM[:, None])
      from_chunk = jnp.einsum('bjrpq,bjqm->bjrpm', seen_BJRPQ, y_BJPM)
    next_change_BJMK = change_BJMK - jnp.einsum(
        'bjpk,bjpm->bjmk', chunk.w_BJPK, y_BJPM)
  return next_change_BJMK, from_earlier - from_chunk
