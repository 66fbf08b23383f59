"""Sparse attention: a query sees the keys that a small attention, the lightning
indexer, scores highest (DeepSeek-AI 2025, DeepSeek-V3.2, arXiv 2512.02556,
section 2.1). model.attention=indexed has it, of a model or of a kind of layer.

  q_l,h = R_l W_q,h c_l,   k_m = R_m n(W_k x_m),   w_l = W_w x_l
  I_l,m = (K H)^-1/2 sum over the H heads of w_l,h relu(q_l,h k_m)
  S_l   = the top_k of the keys that l may see, by I_l; of equals, the first

c is the small vector that latent attention makes its queries of, where there
is one, and x elsewhere. R turns the first of the K features, as many as of a
head of the layer; n is a LayerNorm. Attention is over S_l, exactly: a mask
hides the other keys, and one token that meets a cache, which has the k of each
token too, gathers them. With top_k at the length or above it, or 0, it is
attention to all keys.

With a block of n tokens (Qwen Sparse Attention of Qwen4-Exp, in transformers)
queries choose among the blocks 0 ... n - 1, n ... 2 n - 1, ... of a document,
and see all of a block's keys, and those after their last whole block too:

  k_b = R_(n b) n(mean over b of W_k x_m),   q_l,h = R_l n(W_q,h x_l)
  I_l,b = K^-1/2 sum over the H heads of relu(q_l,h k_b)

Here n is the model's norm. A cache has of each token the key of the n tokens
that end with it, and the last n - 1 products W_k x.

The choice has no gradient. What teaches the indexer is added to the training
loss, aux/indexer in the metrics:

  loss_weight * mean over l of KL(p_l || softmax of I_l over the keys l attends)

where p_l is the mean over heads of what l weighs the values with, to which no
gradient goes, nor to x and c. So the rest of the model learns from its own loss
alone. While all keys are seen (top_k=0, the dense warm-up) an indexer learns
where attention goes: docs/howto/sparse_attention.md has the stages.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple, Optional

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import layers
from architectures.parts import positions
from architectures.parts import sharding
from architectures.parts.attention.fields import AttentionConfig, LatentConfig
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.positions import RopeConfig
from architectures.parts.recurrent import features
from common.errors import RequestError, require
from common.fields import field, FUNCTION, RECIPE, REGULARISATION, SHAPES
from common.fields import ReadIf

NORM_EPS = 1e-6  # of the norm of keys, whatever model.norm_eps is
UNSEEN_SCORE = -1e30  # finite, as kernels.MASKED_SCORE
CACHE_INPUT = 'index'  # in Cache.inputs: the last inputs of the keys' means
# How many times as many keys as are chosen there must be, for the chosen ones
# to be copied: a copy reads, writes and reads them again, where a mask
# has all keys read once.
LEAST_KEYS_OVER_CHOSEN = 4


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
  """The fields of attention indexed."""
  GROUP = 'indexer'
  top_k: int = field(
      64, 'Keys that a query sees; 0: all, while the indexer warms up.',
      resume=FUNCTION)
  block: int = field(
      0, 'Tokens of a block, which divide top_k: they are chosen together; 0: '
      'each by itself.', least=0, resume=SHAPES)
  heads: int = field(4, 'heads of the indexer', above=0, resume=SHAPES)
  head_dim: int = field(
      0, "size of such a head; derived: the model's head_dim", resume=SHAPES)
  interleaved: bool = field(
      False, 'turned pairs of its features are neighbours, not half as many '
      'apart', resume=FUNCTION)
  loss_weight: float = field(
      1.0, "of the divergence from attention's weights, in the training loss",
      least=0, resume=REGULARISATION, about=RECIPE)

  def derived(self, config: ModelConfig) -> 'IndexerConfig':
    return dataclasses.replace(self, head_dim=self.head_dim or config.head_dim)

  def conditions_of_reading(self, config: ModelConfig) -> dict[str, ReadIf]:
    """Returns the fields that nothing reads as long as another field has its
    value, each with that field and what it would have to be."""
    if config.position == 'rope':
      return {}
    return {'interleaved': ReadIf('position', 'is rope')}


@struct.dataclass
class Index:
  """The result of an indexer for tokens.

  Attributes:
    query_BLHK: the queries.
    weight_BLH: the weights of their heads.
    key_BMJK: the keys, which are of one head, J = 1.
    inputs: with blocks, what the keys of the next tokens are made of, for
      Cache.inputs.
  """
  query_BLHK: jax.Array
  weight_BLH: jax.Array
  key_BMJK: jax.Array
  inputs: dict[str, jax.Array] = struct.field(default_factory=dict)


class Indexer(nn.Module):
  """The queries and keys by which an indexer scores keys:
  (x_BLD, query_input_BLU, context, previous inputs) -> Index.

  Heads are whole on each device, as their scores add up. A layer may rotate
  queries itself, and make keys of x (compressed.py).

  Attributes:
    config: the config of the layer.
    axis: the logical axis of the features of query_input_BLU.
  """
  config: ModelConfig
  axis: str

  @nn.compact
  def __call__(self, x_BLD: jax.Array, query_input_BLU: jax.Array,
               ctx: Context,
               previous_inputs: Optional[dict[str, jax.Array]] = None, *,
               rotate_queries: Optional[Callable[..., jax.Array]] = None,
               make_keys: Optional[Callable[[jax.Array], jax.Array]] = None
               ) -> Index:
    """Returns the indexer's queries and keys of the tokens.

    The suffixes name axes: B batch, L length, D d_model, M keys, H heads of
    queries, J = 1 head of keys, K features of a head, U features of the
    queries' input.

    Args:
      x_BLD: the layer's input, [batch, length, d_model], of which keys are
        made.
      query_input_BLU: the input of the queries, [batch, length, features]: the
        layer's input, or the small vector that latent attention makes of it.
      ctx: the context of the layer.
      previous_inputs: Index.inputs of the tokens before, from a cache; None:
        there are none.
      rotate_queries: (q_BLHK, context) -> q_BLHK; None: `_rotate`.
      make_keys: x_BLD -> k_BMJK, in place of the indexer's own keys.
    """
    config, sizes = self.config, self.config.part(IndexerConfig)
    # No gradient reaches the layer: its indexer has a loss of its own.
    x_BLD, query_input_BLU = jax.lax.stop_gradient((x_BLD, query_input_BLU))

    # Products of queries and keys. Each weight draws its initial value when it
    # is declared, so the order of these lines is part of a seed's meaning.
    q_BLHK = self._product('query', 'BLU,UHK->BLHK', query_input_BLU,
                           (self.axis, None, 'head'), sizes.heads,
                           sizes.head_dim)
    k_BLK, k_BL1K, inputs = None, None, {}
    if make_keys is None:
      k_BLK = self._product('key', 'BLD,DK->BLK', x_BLD, ('embed', 'head'),
                            sizes.head_dim)
    if sizes.block:
      q_BLHK = layers.norm(config, 'query_norm', 'head')(q_BLHK)
    if make_keys is None:
      k_BL1K, inputs = self._normalise_keys(k_BLK, ctx, previous_inputs)

    # The weights of heads. Blocks are chosen by all heads alike: the factor
    # sqrt(H) leaves K^-1/2 of the (K H)^-1/2 by which scores are multiplied.
    if sizes.block:
      w_BLH = jnp.full(q_BLHK.shape[:3], sizes.heads ** 0.5)
    else:
      w_BLH = self._product('weights', 'BLD,DH->BLH', x_BLD,
                            ('embed', 'head'), sizes.heads, dtype=jnp.float32)

    # Queries and keys are rotated by their positions; the key of a block by
    # that of its first token.
    rotate_queries = rotate_queries or self._rotate
    q_BLHK = rotate_queries(q_BLHK, ctx)
    if make_keys is None:
      k_BL1K = self._rotate(k_BL1K, ctx, positions_back=max(sizes.block - 1, 0))
    else:
      k_BL1K = make_keys(x_BLD)
    return Index(
        query_BLHK=sharding.constrain(q_BLHK, 'batch', 'length', None, 'head'),
        weight_BLH=sharding.constrain(w_BLH, 'batch', 'length', None),
        key_BMJK=k_BL1K, inputs=inputs)

  def _normalise_keys(
      self, k_BLK: jax.Array, ctx: Context,
      previous_inputs: Optional[dict[str, jax.Array]]
      ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Makes the indexer's keys of the products W_k x, by a norm n.

    Without blocks a token's key is n(W_k x). With blocks of tokens it is n of
    the mean of W_k x over the block that would end with this token.

    The suffixes name axes: B batch, L length, K features of a key, W tokens of
    a block; J and the 1 are the one head of keys.

    Args:
      k_BLK: the products W_k x.
      ctx: the context of the layer.
      previous_inputs: the second result of the call for the tokens before, from
        a cache; None: there is no cache.

    Returns:
      The keys, [B, L, 1, K]; and what the next call needs: with blocks
      {CACHE_INPUT: the products of the last W - 1 tokens}, else {}.
    """
    config, sizes = self.config, self.config.part(IndexerConfig)
    if not sizes.block:
      norm_config = dataclasses.replace(config, norm_eps=NORM_EPS)
      k_BLK = layers.LayerNorm(norm_config, 'head', name='key_norm')(k_BLK)
      return k_BLK[:, :, None], {}

    # The mean is a convolution with equal weights 1 / n. It gives each token a
    # key, of the n tokens up to it, since any token may be the last of a block;
    # score_keys reads the keys at the last tokens alone.
    last_BWJK, valid_BL = None, None
    if previous_inputs:
      # The padding at the end of a row must not enter the cache.
      last_BWJK, valid_BL = previous_inputs[CACHE_INPUT], ctx.valid_BL
    mean_W1K = jnp.full((sizes.block, 1, sizes.head_dim), 1 / sizes.block)
    mean_BL1K, next_BWJK = features.convolve(
        k_BLK[:, :, None], mean_W1K, before_BWHK=last_BWJK,
        segment_ids_BL=ctx.segment_ids_BL, valid_BL=valid_BL)
    k_BLK = layers.norm(config, 'key_norm', 'head')(mean_BL1K[:, :, 0])
    return k_BLK[:, :, None], {CACHE_INPUT: next_BWJK}

  def _product(self, name: str, spec: str, x: jax.Array,
               axes: tuple[str | None, ...], *outputs: int,
               dtype: jax.typing.DTypeLike = None) -> jax.Array:
    """Multiplies x by a weight without a bias. The weight is declared here, as
    a parameter of this layer.

    Args:
      name: the name of the weight, which is part of its path in checkpoints.
      spec: the einsum of the product, such as 'BLD,DK->BLK'.
      x: the input, whose last axis the product sums over.
      axes: the logical axes of the weight, by which it is split over devices.
      *outputs: the sizes of the weight's axes after the first.
      dtype: the dtype of the result; None: the model's compute dtype.

    Returns:
      The product, with the axes that `spec` names.
    """
    w = layers.weight(self, name, shape=(x.shape[-1], *outputs), axes=axes)
    return layers.einsum(spec, x, w, dtype=self.config.compute_dtype,
                         out_dtype=dtype, axes=axes)

  def _rotate(self, x_BLHK: jax.Array, ctx: Context, positions_back: int = 0
              ) -> jax.Array:
    """Rotates the first features of queries or keys by the token's position
    (RoPE). Where the model's position encoding is not rotary, x is returned
    unchanged.

    The suffixes name axes: B batch, L length, H heads, K features of a head.

    Args:
      x_BLHK: queries or keys.
      ctx: the context of the layer, which has the positions.
      positions_back: how many positions before the token's own to rotate by. A
        key that stands for a block of n tokens is made at the last of them and
        rotated by the position of the first, n - 1 before.

    Returns:
      The rotated x, [B, L, H, K].
    """
    config, rotate = self.config, positions.position_of(self.config).rotate
    if not rotate:
      return x_BLHK
    num_rotated = num_rotated_features(config)
    rotated, unrotated = jnp.split(x_BLHK, (num_rotated,), -1)

    # The encoding rotates whole heads, so it is given a config whose heads are
    # the rotated features alone.
    rope_config = dataclasses.replace(config, head_dim=num_rotated).with_part(
        RopeConfig, fraction=1.0,
        interleaved=config.part(IndexerConfig).interleaved)
    rotated = rotate(
        rotated, ctx.positions_BL - positions_back, rope_config, ctx.length)
    return jnp.concatenate([rotated, unrotated], -1)


def num_rotated_features(config: ModelConfig) -> int:
  """Returns how many features of a head rotary positions rotate."""
  if config.mixer == 'latent':
    return config.part(LatentConfig).rope_dim
  return positions.rotary_dim(config)


class ScoredKeys(NamedTuple):
  """The scores of keys by an indexer, I in the head of this file, or of blocks
  of keys, of which there are N = M / size or fewer.

  Attributes:
    scores_BLM: float32 [B, L, M], or of blocks, [B, L, N].
    block_size: the keys of a block; 0: keys stand by themselves.
    last_key_BN: the last key of each block; M: there is no such block.
    block_of_key_BM: the block of each key. One that is in no whole block has a
      number that stands for none of its document.
  """
  scores_BLM: jax.Array
  block_size: int = 0
  last_key_BN: Any = None
  block_of_key_BM: Any = None

  def whole_blocks_seen(self, seen_BLM: Any) -> jax.Array:
    """Returns of which blocks each query sees all keys, bool [B, L, N]."""
    return jnp.take_along_axis(seen_BLM, self.last_key_BN[:, None], 2,
                               mode='fill', fill_value=False)

  def expand_blocks_to_keys(self, x_BLN: jax.Array, default: float | bool
                            ) -> jax.Array:
    """Returns for each key what `x_BLN` has for its block, [B, L, M], and
    `default` for a key that is in no whole block."""
    return jnp.take_along_axis(x_BLN, self.block_of_key_BM[:, None], 2,
                               mode='fill', fill_value=default)

  def mask_of_best(self, seen_BLM: Any, top_k: int) -> jax.Array:
    """Returns which of the keys that a query sees are the top_k best, bool
    [B, L, M]; with blocks, those of the best blocks and of no whole block."""
    if not self.block_size:
      return mask_of_best(self.scores_BLM, seen_BLM, top_k)
    whole_BLN = self.whole_blocks_seen(seen_BLM)
    best_BLN = mask_of_best(
        self.scores_BLM, whole_BLN, top_k // self.block_size)
    return seen_BLM & self.expand_blocks_to_keys(best_BLN | ~whole_BLN, True)

  def indices_of_best(self, seen_B1M: jax.Array, top_k: int) -> jax.Array:
    """Returns the indices of the top_k keys with the best scores, for a single
    query in each row of the batch. Each row must be one document.

    With blocks of keys, whole blocks are chosen, and the keys after the last
    whole block come with them.

    The suffixes name axes: B batch, 1 query, M keys, N blocks of keys.

    Args:
      seen_B1M: bool, the keys that the query may see.
      top_k: how many keys to choose; with blocks, a multiple of their size.

    Returns:
      Indices of keys, [B, top_k], or [B, top_k + block_size] with blocks. With
      blocks, some may be of keys that the query does not see or that do not
      exist. The caller must mask the former and clip the latter.
    """
    if not self.block_size:
      visible_scores = hide_unseen_scores(self.scores_BLM, seen_B1M)
      return jax.lax.top_k(visible_scores[:, 0], top_k)[1]

    # The best of the whole blocks, and the open block that follows the last of
    # them. In a row of one document the blocks 0 ... n - 1 are whole, so the
    # open one has the number n, which is how many are whole.
    whole_B1N = self.whole_blocks_seen(seen_B1M)
    visible_scores = hide_unseen_scores(self.scores_BLM, whole_B1N)
    score_BN, block_BN = jax.lax.top_k(
        visible_scores[:, 0], top_k // self.block_size)
    open_block_B1 = jnp.broadcast_to(whole_B1N.sum(-1), (len(block_BN), 1))
    # Where fewer blocks are whole than are to be chosen, top_k returns unseen
    # ones. The number of keys stands in for these: no block has that number.
    block_BN = jnp.where(score_BN > -jnp.inf, block_BN, seen_B1M.shape[-1])
    all_blocks = jnp.concatenate([block_BN, open_block_B1], 1)

    # The keys of these blocks.
    first_keys = all_blocks[..., None] * self.block_size
    key_in_block = jnp.arange(self.block_size)[None, None]
    return (first_keys + key_in_block).reshape(len(block_BN), -1)

  def divergence(self, target_BLM: jax.Array, seen_BLM: Any, ctx: Context
                 ) -> jax.Array:
    """Returns the Kullback-Leibler divergence of these scores from the weights
    of attention, which is the loss of an indexer. With blocks of keys, only the
    keys of whole blocks enter it.

    The suffixes name axes: B batch, L queries, M keys.

    Args:
      target_BLM: the weights that attention gives the keys.
      seen_BLM: bool, which keys a query sees.
      ctx: the context of the layer, which says which tokens are padding.
    """
    # Each key has the score of its block.
    scores_BLM = self.scores_BLM
    if self.block_size:
      seen_BLM = seen_BLM & self.expand_blocks_to_keys(
          self.whole_blocks_seen(seen_BLM), False)
      target_BLM = jnp.where(seen_BLM, target_BLM, 0)
      scores_BLM = self.expand_blocks_to_keys(scores_BLM, 0.0)
    return divergence(target_BLM, scores_BLM=scores_BLM, seen_BLM=seen_BLM,
                      ctx=ctx)


def score_keys(config: ModelConfig, index: Index, ids_BM: Optional[jax.Array]
               ) -> ScoredKeys:
  """Scores all keys for each query by an indexer, the small attention that
  chooses which keys a query may see. With a block size in the config, blocks of
  neighbouring keys are scored in place of single keys.

  The suffixes name axes: B batch, M keys, N blocks of keys, J = 1 head of keys,
  K features of the indexer's keys.

  Args:
    config: the config of the layer.
    index: the indexer's queries and keys.
    ids_BM: the number of each key's document; None: a row is one document.

  Returns:
    The scores and, with blocks, which keys belong to which block.
  """
  block_size = config.part(IndexerConfig).block
  num_keys = index.key_BMJK.shape[1]
  if not block_size:
    return ScoredKeys(indexer_scores(index))

  # Find the last key of each block, counted from the start of a document. The
  # indexer's key there is the mean of the block, so it stands for the block. A
  # key that ends no block is marked by num_keys, which the sort moves behind
  # the others.
  key_1M = jnp.arange(num_keys)[None]
  first_BM = 0 if ids_BM is None else features.start_of_document(ids_BM)
  is_last_BM = (key_1M - first_BM) % block_size == block_size - 1
  most_blocks = max(num_keys // block_size, 1)
  last_key_BN = jnp.sort(
      jnp.where(is_last_BM, key_1M, num_keys))[:, :most_blocks]
  block_keys_BNJK = jnp.take_along_axis(
      index.key_BMJK, last_key_BN[..., None, None], 1, mode='clip')

  # The block of a key is how many blocks have ended before it. The sum up to a
  # key counts the end at the key itself, which is subtracted again.
  return ScoredKeys(
      scores_BLM=indexer_scores(index.replace(key_BMJK=block_keys_BNJK)),
      block_size=block_size, last_key_BN=last_key_BN,
      block_of_key_BM=(
          jnp.cumsum(is_last_BM, -1, dtype=jnp.int32) - is_last_BM))


def indexer_scores(index: Index) -> jax.Array:
  """Returns the scores I of the keys, float32 [B, L, M]."""
  key_BMJK = sharding.constrain(index.key_BMJK, 'batch', None, None, 'head')
  return sharding.constrain(
      layers.recompute_in_backward(_scores_of_heads)(
          index.query_BLHK, index.weight_BLH, key_BMJK),
      'batch', 'length', None)


def _scores_of_heads(q_BLHK: jax.Array, w_BLH: jax.Array, k_BMJK: jax.Array
                     ) -> jax.Array:
  """Returns (K H)^-1/2 sum over the heads of w relu(q k), [B, L, M]."""
  H, K = q_BLHK.shape[2:]
  s_BHLM = layers.einsum('BLHK,BMK->BHLM', q_BLHK, k_BMJK[:, :, 0],
                         dtype=q_BLHK.dtype, out_dtype=jnp.float32)
  s_BHLM = jax.nn.relu(s_BHLM)
  w_BLH = layers.multiply_exactly(w_BLH, (H * K) ** -0.5)
  return layers.einsum('BLH,BHLM->BLM', w_BLH, s_BHLM, dtype=jnp.float32)


def hide_unseen_scores(scores_BLM: jax.Array, seen_BLM: Optional[jax.Array]
                       ) -> jax.Array:
  """Returns the scores without a gradient, -inf where a key is unseen."""
  scores_BLM = jax.lax.stop_gradient(scores_BLM)
  if seen_BLM is None:
    return scores_BLM
  return jnp.where(seen_BLM, scores_BLM, -jnp.inf)


def mask_of_best(scores_BLM: jax.Array, seen_BLM: Optional[jax.Array],
                 top_k: int) -> jax.Array:
  """Returns a mask of the top_k best-scored keys among those that each query
  sees.

  The choice is that of lax.top_k: of equal scores, the first ones win. It is
  written as comparisons, which each device makes for its own queries, rather
  than as a scatter of the indices that lax.top_k returns.

  The suffixes name axes: B batch, L queries, M keys.

  Args:
    scores_BLM: the scores of the keys.
    seen_BLM: bool, the keys that a query sees; None: it sees all.
    top_k: how many keys to choose, at most M.

  Returns:
    bool [B, L, M], true for top_k keys, or fewer where a query sees fewer.
  """
  scores_BLM = hide_unseen_scores(scores_BLM, seen_BLM)
  # All keys above the last chosen score are chosen; among its equals, the first
  # ones for which there is room.
  worst_of_best_BL1 = jax.lax.top_k(scores_BLM, top_k)[0][..., -1:]
  is_above_BLM = scores_BLM > worst_of_best_BL1
  is_equal_BLM = scores_BLM == worst_of_best_BL1
  room_BL1 = top_k - is_above_BLM.sum(-1, keepdims=True)
  equals_so_far_BLM = jnp.cumsum(is_equal_BLM, -1, dtype=jnp.int32)
  best_BLM = is_above_BLM | is_equal_BLM & (equals_so_far_BLM <= room_BL1)
  # A query that sees fewer than top_k keys would choose unseen ones, at -inf.
  return best_BLM if seen_BLM is None else best_BLM & seen_BLM


def should_copy_chosen_keys(top_k: int, shape: tuple[int, ...]) -> bool:
  """Returns whether queries that have scores of this shape, [B, L, M], meet a
  copy of the keys that they choose: one query in each row, whose choice is a
  small share of the keys."""
  return shape[1] == 1 and 0 < LEAST_KEYS_OVER_CHOSEN * top_k <= shape[2]


def divergence(target_BLM: jax.Array, scores_BLM: jax.Array,
               seen_BLM: Optional[jax.Array], ctx: Context) -> jax.Array:
  """Returns the loss of an indexer: the Kullback-Leibler divergence
  KL(p || softmax(scores)), in nats, as the mean over the tokens that are no
  padding. p are the weights that attention gives the keys.

  The suffixes name axes: B batch, L queries, M keys.

  Args:
    target_BLM: the weights of the keys. They may add up to less than 1; p are
      these weights divided by their sum.
    scores_BLM: the indexer's scores of the keys.
    seen_BLM: bool, the keys that p and the softmax are over; None: all keys.
    ctx: the context of the layer, which says which tokens are padding.
  """
  if seen_BLM is not None:
    scores_BLM = jnp.where(seen_BLM, scores_BLM, UNSEEN_SCORE)
  # A query without any weight has p = 0; the bound spares it 0 / 0.
  total_BL1 = target_BLM.sum(-1, keepdims=True)
  p_BLM = target_BLM / jnp.maximum(total_BL1, 1e-30)
  # A key of weight 0 adds nothing, and its logarithm would be infinite.
  has_weight_BLM = p_BLM > 0
  log_p_BLM = jnp.log(jnp.where(has_weight_BLM, p_BLM, 1))
  nats_BLM = log_p_BLM - jax.nn.log_softmax(scores_BLM)
  kl_BL = jnp.where(has_weight_BLM, p_BLM * nats_BLM, 0).sum(-1)
  # Padding counts nowhere. A batch of padding alone has the mean 0.
  counted_BL = ctx.real_tokens(*kl_BL.shape)
  return (kl_BL * counted_BL).sum() / jnp.maximum(counted_BL.sum(), 1)


def empty_key_cache(config: ModelConfig, shape: tuple[int, ...]
                    ) -> Optional[jax.Array]:
  """Returns an indexer's keys in an empty cache of `shape` (rows, tokens),
  zeros [..., 1, K]; None: the layer has no indexer."""
  if config.attention != 'indexed':
    return None
  head_dim = config.part(IndexerConfig).head_dim
  return jnp.zeros((*shape, 1, head_dim), config.compute_dtype)


def has_blocks(config: ModelConfig) -> bool:
  """Returns whether the layer has an indexer that chooses blocks of keys."""
  return config.attention == 'indexed' and config.part(IndexerConfig).block > 0


def empty_block_inputs(config: ModelConfig, shape: tuple[int, ...]
                       ) -> dict[str, jax.Array]:
  """Returns Index.inputs in an empty cache of `shape` (rows, tokens): zeros for
  an indexer with blocks, else none."""
  if not has_blocks(config):
    return {}
  sizes = config.part(IndexerConfig)
  shape = *shape[:-1], sizes.block - 1, 1, sizes.head_dim
  return {CACHE_INPUT: jnp.zeros(shape, config.compute_dtype)}


def count_chosen_keys(config: ModelConfig, num_seen: np.ndarray) -> np.ndarray:
  """Returns how many keys a query sees after an indexer has chosen among them.

  An indexer chooses whole blocks of keys, up to top_k keys in all. The keys
  after the last whole block are always seen. With a top_k of 0 it chooses all.

  Args:
    config: the config of the layer.
    num_seen: how many keys each query may see before the choice, an array of
      any shape.

  Returns:
    How many keys are left, an array of the same shape.
  """
  sizes = config.part(IndexerConfig)
  # Without blocks, each key counts as a block of its own.
  block_size = max(sizes.block, 1)
  if not sizes.top_k:
    return num_seen
  blocks = np.minimum(num_seen // block_size, sizes.top_k // block_size)
  return blocks * block_size + num_seen % block_size


def check_indexer(config: ModelConfig, stack: str) -> None:
  """Checks that a model can have a layer with an indexer, the small attention
  that chooses which keys a query may see.

  Args:
    config: the config of the layer.
    stack: the kind of stack: 'encoder', 'decoder' or 'encoder-decoder'.

  Raises:
    RequestError: if the stack is no decoder, muP is asked for, the layer takes
      its keys from another layer, the size of blocks does not divide top_k, or
      positions rotate more features than a head of the indexer has.
  """
  request = "model.attention is 'indexed'"
  # The model around the indexer.
  require(stack == 'decoder', f'{request}, whose queries choose of the keys '
          f'before them, and model.arch {config.arch!r} is no decoder: choose '
          'global')
  require(config.parametrization != 'mup', f'{request}, for whose indexer '
          "model.parametrization 'mup' has no rule: choose standard")
  attention = config.find_part(AttentionConfig)
  if attention is not None and attention.kv_sharing:
    raise RequestError(f'{request}, and model.kv_sharing is True: a layer '
                       'chooses of keys of its own, so set it to False')

  # The sizes of the indexer itself.
  sizes = config.part(IndexerConfig)
  require(not sizes.block or sizes.top_k % sizes.block == 0,
          f'model.indexer.block is {sizes.block}, which does not divide '
          f'model.indexer.top_k {sizes.top_k}')
  if positions.position_of(config).rotate:
    num_rotated = num_rotated_features(config)
    require(num_rotated <= sizes.head_dim, 'model.indexer.head_dim is '
            f'{sizes.head_dim}, and rotary positions turn {num_rotated} '
            'features of a head: choose as many or more')
