"""Which keys the queries of a layer see, and the kernels that weigh values by
them. An entry of RULES, or of KERNELS at the end, is all that there is of one.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import operator
from typing import Any, NamedTuple, Optional

import chex
from flax import struct
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
import jax.numpy as jnp
import numpy as np

from architectures.parts import layers
from architectures.parts import positions
from architectures.parts import sharding
from architectures.parts import tokamax_kernels
from architectures.parts.attention import indexer
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context
from common.errors import RequestError, require

# The mask: which keys a query sees, and how many pairs it shows.

# Segment ids with chunks are chunk + this * document, so no document may have
# more chunks.
MOST_CHUNKS_OF_A_DOCUMENT = 2**15


@dataclasses.dataclass(frozen=True)
class Rule:
  """Which keys the queries of a layer see, causality and documents apart.

  Attributes:
    window: config -> n, where these are the keys less than n away; None: the
      rule has no window.
    top: (config, numbers of these keys) -> how many of them an indexer leaves
      a query; None: the rule has no indexer.
    settings: the group of fields of config.model that it reads.
    chunk: config -> n, where a document is in chunks of n tokens, and a query
      sees its own; None: it is whole.
    fields: of config.model that no other rule reads.
    check: (config, stack) -> None; raises RequestError for fields that do not
      fit; None: all fit. `stack` is what architectures.stack returns.
  """
  window: Optional[Callable[[ModelConfig], int]] = None
  top: Optional[Callable[[ModelConfig, np.ndarray], np.ndarray]] = None
  settings: Optional[type] = None
  chunk: Optional[Callable[[ModelConfig], int]] = None
  fields: tuple[str, ...] = ()
  check: Optional[Callable[[ModelConfig, str], None]] = None


def visible_keys(kind: LayerKind, config: ModelConfig,
                 q_positions_BL: jax.Array, k_positions_BM: jax.Array,
                 q_segments_BL: Optional[jax.Array] = None,
                 k_segments_BM: Optional[jax.Array] = None,
                 prefix_B: Optional[jax.Array] = None,
                 has_clean_copy: bool = False) -> Optional[jax.Array]:
  """Returns the mask of attention: which keys each query sees.

  Args:
    kind: the kind of the layer, with its rule of attention and causality.
    config: the config of the layer, which has the sizes of windows and chunks.
    q_positions_BL: the positions of the queries, [batch or 1, queries].
    k_positions_BM: the positions of the keys, [batch or 1, keys].
    q_segments_BL: the number of each query's document; None: a row is one
      document.
    k_segments_BM: the number of each key's document.
    prefix_B: how many tokens at the start of a row (its prompt) are seen by all
      tokens, in a causal layer; None: there are none.
    has_clean_copy: whether the first half of the tokens is noised, and the
      second half the same without noise; see `_find_earlier_blocks`.

  Returns:
    bool, [B or 1, L, M]; None: each query sees all keys.
  """
  rule, conditions = RULES[kind.attention], []
  # Positions of queries stand in rows and those of keys in columns, so that a
  # comparison of the two has all pairs.
  q_BL1, k_B1M = q_positions_BL[:, :, None], k_positions_BM[:, None]

  # A causal layer shows the past and the token itself, and the prefix to all.
  if kind.causal:
    is_earlier_BLM = k_B1M <= q_BL1
    if config.diffusion_block:
      is_earlier_BLM = _find_earlier_blocks(
          q_BL1 // config.diffusion_block, k_B1M // config.diffusion_block,
          has_clean_copy=has_clean_copy)
    if prefix_B is not None:
      is_earlier_BLM |= k_B1M < prefix_B[:, None, None]
    conditions.append(is_earlier_BLM)

  # The rule of the layer shows a window, a chunk, or all; and no token sees
  # another document.
  if rule.window:
    conditions.append(jnp.abs(q_BL1 - k_B1M) < rule.window(config))
  if rule.chunk:
    size = rule.chunk(config)
    conditions.append(q_BL1 // size == k_B1M // size)
  if q_segments_BL is not None:
    conditions.append(q_segments_BL[:, :, None] == k_segments_BM[:, None])

  # A key is seen where all conditions hold.
  if not conditions:
    return None
  return functools.reduce(operator.and_, conditions)


def _find_earlier_blocks(q_block_BL1: jax.Array, k_block_B1M: jax.Array,
                         has_clean_copy: bool) -> jax.Array:
  """Returns which keys each query sees where text is denoised block by block
  (BD3-LM: Arriola et al. 2025, arXiv 2503.09573, section 3.2), bool [B, L, M].

  A token sees its own block and those before it. In training a row has two
  copies of its tokens: the first M / 2 tokens are noised, and the last M / 2
  the same without noise (clean). So that a block is denoised given what stands
  before it, as in generating,

    a noised token sees the noised tokens of its own block, and the clean ones
                        of earlier blocks
    a clean token sees  the clean tokens of its own block and of earlier ones

  The suffixes name axes: B batch, L queries, M keys.

  Args:
    q_block_BL1: the number of each query's block.
    k_block_B1M: the number of each key's block.
    has_clean_copy: whether there are two copies. Then there are as many queries
      as keys.
  """
  if not has_clean_copy:
    return k_block_B1M <= q_block_BL1

  # Which queries and which keys belong to the noised first half.
  M = k_block_B1M.shape[2]
  is_noised_M = jnp.arange(M) < M // 2
  q_noised_1L1 = is_noised_M[None, :, None]
  k_noised_11M = is_noised_M[None, None]
  seen_by_noised_BLM = jnp.where(
      k_noised_11M, k_block_B1M == q_block_BL1, k_block_B1M < q_block_BL1)
  seen_by_clean_BLM = ~k_noised_11M & (k_block_B1M <= q_block_BL1)
  return jnp.where(q_noised_1L1, seen_by_noised_BLM, seen_by_clean_BLM)


def segment_ids_with_chunks(
    kind: LayerKind, config: ModelConfig, positions_BL: jax.Array,
    segments_BL: Optional[jax.Array]) -> Optional[jax.Array]:
  """Returns the segment ids of tokens for a fused kernel. Such a kernel lets a
  token see only tokens of the same id.

  The ids are the numbers of documents. In a layer whose attention stays within
  chunks of a fixed length, each chunk of a document has an id of its own.

  Args:
    kind: the kind of the layer, which names its rule of attention.
    config: the config of the layer.
    positions_BL: the positions of the tokens in their documents, [batch,
      length].
    segments_BL: the number of each token's document; None: a row is one
      document.

  Returns:
    The ids, int32 [batch, length]; None: a row is one segment.
  """
  rule = RULES[kind.attention]
  if not rule.chunk:
    return segments_BL
  # The id is the chunk's number in its document, plus a multiple of the
  # document's number. No document has as many chunks as the multiplier, so no
  # two chunks share an id.
  chunk_BL = positions_BL // rule.chunk(config)
  if segments_BL is None:
    return chunk_BL
  return chunk_BL + MOST_CHUNKS_OF_A_DOCUMENT * segments_BL


def is_start_of_row(kind: LayerKind, ctx: Context) -> bool:
  """Returns whether the tokens that a cache is given are at 0 ... L - 1 and see
  none after them: then they see each other alone, whatever it holds."""
  return kind.causal and ctx.in_order and not ctx.keep_attention


def _count_keys_of_queries(kind: LayerKind, config: ModelConfig,
                           queries: np.ndarray, keys: np.ndarray
                           ) -> np.ndarray:
  """Counts the keys that each query sees, in a row that is one document. This
  is the row sum of the mask of `visible_keys`, computed without the mask.

  Args:
    kind: the kind of the layer: its rule of attention, and whether it is
      causal.
    config: the config of the layer, with the sizes of chunks and windows.
    queries: the positions of L queries.
    keys: the positions of M keys, 0 ... M - 1.

  Returns:
    The number of keys of each query, int [L].
  """
  # Each query sees the keys from `first` to before `stop`. In a causal layer
  # these end with the query itself, or with its block where text is denoised
  # block by block.
  rule = RULES[kind.attention]
  num_keys = keys.size
  stop = np.full_like(queries, num_keys)
  if kind.causal:
    block = config.diffusion_block or 1
    stop = np.minimum((queries // block + 1) * block, num_keys)

  # In chunked attention a query sees the keys of its chunk.
  if rule.chunk:
    chunk = rule.chunk(config)
    first = queries - queries % chunk
    return np.minimum(stop, first + chunk) - first

  # Else it sees the keys that are less than `reach` positions away: those
  # before it and, if the layer is not causal, those after it.
  reach = num_keys
  if rule.window:
    reach = rule.window(config)
  first = np.maximum(queries - reach + 1, 0)
  num_seen = np.minimum(stop, queries + reach) - first

  # An indexer, which chooses the best keys, leaves only some of them.
  if rule.top:
    return rule.top(config, num_seen)
  return num_seen


def count_visible_pairs(kind: LayerKind, config: ModelConfig, queries: int,
                        keys: int) -> int:
  """Returns how many pairs of a query and a key the mask of self-attention
  shows; with fewer queries than keys, the queries are the last."""
  k_positions = np.arange(keys)
  q_positions = k_positions[keys - queries:]
  keys_of_queries = _count_keys_of_queries(
      kind, config, queries=q_positions, keys=k_positions)
  return int(keys_of_queries.sum())


def count_useful_pairs(kind: LayerKind, config: ModelConfig, queries: int,
                       keys: int, prefix: bool = False,
                       has_clean_copy: bool = False
                       ) -> tuple[int, int, int]:
  """Counts the pairs of a query and a key in a layer's attention. The FLOPs of
  attention are reported by them: a program may compute all pairs, but only
  those that the mask shows are useful.

  Args:
    kind: the kind of the layer: its rule of attention, and whether it is
      causal.
    config: the config of the layer.
    queries: how many queries there are. They belong to the last tokens.
    keys: how many keys there are, one for each token.
    prefix: whether the first tokens of a row (its prefix) see each other both
      ways, as in a prefix language model. In training every length of prefix
      from 1 to keys - 1 is equally likely, so the three numbers are then sums
      over all of these lengths.
    has_clean_copy: whether the tokens are noised ones, and as many without
      noise: a query sees as many keys in either half as in a row of one half.

  Returns:
    Three numbers of pairs: those that the mask shows; all that there are; and
    those that the mask would show if the whole row were the prefix, as a
    prompt is.
  """
  all_pairs = queries * keys
  if has_clean_copy:
    pairs_of_half = count_visible_pairs(
        kind, config, queries=queries // 2, keys=keys // 2)
    return 2 * pairs_of_half, all_pairs, 2 * pairs_of_half
  visible_pairs = count_visible_pairs(kind, config, queries=queries, keys=keys)
  if not (prefix and kind.causal and queries == keys > 1):
    return visible_pairs, all_pairs, visible_pairs

  # The whole row as a prompt, where each token sees the others both ways.
  num_prefixes, position_M = keys - 1, np.arange(keys)
  both_ways = dataclasses.replace(kind, causal=False)
  prompt_pairs = count_visible_pairs(
      both_ways, config, queries=queries, keys=keys) * num_prefixes

  # The row with each of the prefixes.
  top = RULES[kind.attention].top
  if top:
    prefix_pairs = _count_indexed_pairs_of_prefixes(kind, config, keys)
  else:
    # In a prefix, a query also sees the keys after it. By symmetry, as many
    # queries see a key from before it as that key's own query sees keys before
    # itself. Each such pair occurs in all prefixes that this key is part of.
    earlier_M = _count_keys_of_queries(
        kind, config, queries=position_M, keys=position_M) - 1
    later_pairs = (earlier_M * (num_prefixes - position_M)).sum()
    prefix_pairs = visible_pairs * num_prefixes + int(later_pairs)
  return prefix_pairs, all_pairs * num_prefixes, prompt_pairs


def _count_indexed_pairs_of_prefixes(kind: LayerKind, config: ModelConfig,
                                     keys: int) -> int:
  """Counts the pairs of a query and a key that attention computes where an
  indexer chooses the best keys of each query, in a prefix language model. The
  count is the sum over all lengths of the prefix, from 1 to keys - 1 tokens.

  With a prefix of p tokens, query i may see max(i + 1, p) keys: those up to
  itself, or the whole prefix. How many of n keys the indexer leaves depends on
  n alone.

  Args:
    kind: the kind of the layer, whose rule of attention has an indexer.
    config: the config of the layer.
    keys: how many keys there are, and as many queries.

  Returns:
    The number of pairs, summed over the prefixes.
  """
  # best_M[n] is how many of n keys the indexer leaves, for n up to keys - 1.
  top, position_M = RULES[kind.attention].top, np.arange(keys)
  best_M = top(config, position_M)

  # First, prefixes that end with the query or before it. Query i then sees
  # i + 1 keys, so best_M is shifted by one, and the last query's number is
  # appended. There are i + 1 such prefixes, but keys - 1 at most.
  last_count = _count_keys_of_queries(
      kind, config, queries=position_M[-1:], keys=position_M)
  up_to_query_M = np.append(best_M[1:], last_count)
  shorter = (up_to_query_M * np.minimum(position_M + 1, keys - 1)).sum()

  # Second, prefixes that go on after the query, of i + 2 to keys - 1 tokens.
  # The query sees the whole prefix, so it has the sum of best_M over these
  # lengths. The last query has no such prefix.
  longer_prefixes_M = best_M.sum() - best_M.cumsum()
  longer = np.append(longer_prefixes_M[1:], 0).sum()
  return int(shorter + longer)


def _check_is_set(field: str, meaning: str
                  ) -> Callable[[ModelConfig, str], None]:
  """Returns the Rule.check of a rule that needs a field of config.model to be
  above 0; `meaning` says what the field counts, for the error's text."""
  def check(config: ModelConfig, stack: str) -> None:
    """Raises RequestError where the field is 0."""
    del stack
    require(getattr(config, field) > 0,
            f'model.attention has a {config.attention} layer, but '
            f'model.{field} is 0: set it to the number of {meaning}')
  return check


RULES = {
    'global': Rule(),
    'chunked': Rule(chunk=lambda c: c.attention_chunk,  # Llama 4
                    fields=('attention_chunk',), check=_check_is_set(
                        'attention_chunk', 'tokens of a chunk')),
    'banded': Rule(window=lambda c: c.sliding_window,
                   fields=('sliding_window',), check=_check_is_set(
                       'sliding_window', 'keys that such a layer sees')),
    'indexed': Rule(top=indexer.count_chosen_keys,
                    settings=indexer.IndexerConfig,
                    check=indexer.check_indexer),
}


# Attention of plain products, for any mask: what XLA makes a program of.
#
# The gradient is written out: as FlashAttention's (Dao et al. 2022, appendix B)
# it works the scores [B, H, L, M] out again rather than keep them. Under a
# causal mask queries go block by block, and meet only the keys that one of them
# may see.

MASKED_SCORE = -1e30  # finite, so that a row that sees nothing is no NaN
# Blocks of queries under a causal mask: four of them spare 3 of 8 scores.
MOST_QUERY_BLOCKS = 4
LEAST_QUERIES_OF_A_BLOCK = 128


class _ScoreSettings(NamedTuple):
  """The numbers by which scores are made of products, and weights of scores;
  their meaning is that of the arguments of `attend`."""
  scale: float
  softcap: float
  dropout: float
  causal: bool
  window: int

  def query_blocks(self, L: int, M: int) -> Iterator[tuple[slice, slice]]:
    """Yields the blocks of queries that are computed one at a time.

    Args:
      L: the number of queries.
      M: the number of keys.

    Yields:
      The slice of a block's queries, and the slice of the keys that at least
      one of them may see; the mask hides the others of these keys.
    """
    # Without causality, all queries meet all keys, in one block.
    if not self.causal:
      yield slice(0, L), slice(0, M)
      return
    num_blocks = max(1, min(MOST_QUERY_BLOCKS, L // LEAST_QUERIES_OF_A_BLOCK))
    for i in range(num_blocks):
      start, stop = i * L // num_blocks, (i + 1) * L // num_blocks
      # The first query of the block has the window that begins first, and the
      # last query is the last key that any of them sees.
      first_key = max(0, start - self.window + 1) if self.window else 0
      yield slice(start, stop), slice(first_key, stop)


def attend(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array, *,
           scale: float, mask_BLM: Optional[jax.Array] = None,
           bias_BHLM: Optional[jax.Array] = None, softcap: float = 0.0,
           sink_H: Optional[jax.Array] = None, dropout: float = 0.0,
           key: Optional[jax.Array] = None, causal: bool = False,
           window: int = 0) -> jax.Array:
  """Returns the result of attention,

    o_l = sum over m of p_lm v_m,   p_lm = softmax over m of the scores s_lm

  where s_lm = scale q_l k_m, bounded by the softcap, plus a bias. The softmax
  is taken in float32.

  Args:
    q_BLHK: queries, [batch, length L, heads H, features K].
    k_BMJK: keys, [batch, number of keys M, heads of keys J, features K]. Head j
      serves the R = H / J heads of queries from j R on.
    v_BMJK: values, whose heads may have another size than those of keys.
    scale: multiplies the products of queries and keys.
    mask_BLM: bool, which keys a query sees; None: all.
    bias_BHLM: added to the scores; it may be of more keys, which come after.
    softcap: the scores' bound, softcap * tanh(score / softcap); 0: none.
    sink_H: a score of each head for a key with no value, which all queries see,
      so that the weights of the others sum to less than 1; None: there is none.
    dropout: the share of weights that are set to 0 where `key` is given; the
      others are divided by the share that is left.
    key: of dropout's random numbers; None: nothing is dropped.
    causal: whether the mask shows query l no key after the l-th. Blocks of
      queries then leave out keys, so it must not be said of other masks.
    window: how many keys the mask shows a query of a causal layer at most, the
      last being its own; 0: any number.

  Returns:
    o, [B, L, H, features of a value].
  """
  B, L, H, K = q_BLHK.shape
  M, J = k_BMJK.shape[1:3]
  chex.assert_shape([k_BMJK, v_BMJK], [(B, M, J, K), (B, M, J, None)])
  settings = _ScoreSettings(scale=scale, softcap=softcap, dropout=dropout,
                            causal=causal, window=window)
  # Heads come before the length, and those of queries are grouped by the head
  # of keys that they share, J by R: so products are of whole matrices [L, M].
  q_BJRLK = _swap_length_and_heads(q_BLHK).reshape(B, J, H // J, L, K)
  o_BJRLK = _attend_by_key_head(
      settings, q_BJRLK, _swap_length_and_heads(k_BMJK),
      _swap_length_and_heads(v_BMJK), _group_bias_by_key_head(bias_BHLM, J),
      _group_sinks_by_key_head(sink_H, J), mask_BLM, key)
  return _swap_length_and_heads(o_BJRLK.reshape(B, H, L, -1))


def attention_weights(
    q_BLHK: jax.Array, k_BMJK: jax.Array, *,
    mask_BLM: Optional[jax.Array] = None,
    bias_BHLM: Optional[jax.Array] = None, sink_H: Optional[jax.Array] = None,
    scale: float, softcap: float = 0.0, causal: bool = False, window: int = 0,
    mean: bool = False) -> jax.Array:
  """Returns the weights that `attend` gives the values for these arguments,

    p_lm = softmax over m of (scale q_l k_m + bias_lm)

  They sum to 1 over m, less the share of the sink where there is one. Weights
  of hidden keys are 0.

  Args:
    q_BLHK: queries, [batch, length L, heads H, features K].
    k_BMJK: keys, [batch, number of keys M, heads of keys J, features K].
    mask_BLM: as of `attend`.
    bias_BHLM: as of `attend`.
    sink_H: as of `attend`.
    scale: as of `attend`.
    softcap: as of `attend`.
    causal: as of `attend`.
    window: as of `attend`.
    mean: whether the mean over heads is returned.

  Returns:
    float32 [B, H, L, M], or with `mean` [B, L, M].
  """
  B, L, H, K = q_BLHK.shape
  M, J = k_BMJK.shape[1:3]
  settings = _ScoreSettings(scale=scale, softcap=softcap, dropout=0.0,
                            causal=causal, window=window)
  q_BJRLK = _swap_length_and_heads(q_BLHK).reshape(B, J, H // J, L, K)
  k_BJMK = _swap_length_and_heads(k_BMJK)
  bias_BJRLM = _group_bias_by_key_head(bias_BHLM, J)
  sink_1JR11 = _group_sinks_by_key_head(sink_H, J)
  weights_of_blocks = []
  for queries, keys in settings.query_blocks(L, M):
    # The softmax of a block's scores. A sink is a key more, with no value: its
    # weight, the last, is cut off again.
    s_BJRLM = _masked_scores(settings, queries=queries, keys=keys,
                             mask_BLM=mask_BLM, q_BJRLK=q_BJRLK, k_BJMK=k_BJMK,
                             bias_BJRLM=bias_BJRLM)
    if sink_1JR11 is not None:
      sink_BJRL1 = jnp.broadcast_to(sink_1JR11, (*s_BJRLM.shape[:-1], 1))
      s_BJRLM = jnp.concatenate([s_BJRLM, sink_BJRL1], -1)
    p_BJRLM = jax.nn.softmax(s_BJRLM)[..., :keys.stop - keys.start]
    # A query that sees no key has equal scores and weights; these become 0.
    if mask_BLM is not None:
      p_BJRLM = jnp.where(mask_BLM[:, None, None, queries, keys], p_BJRLM, 0)
    if mean:
      weights = p_BJRLM.mean((1, 2))
    else:
      weights = p_BJRLM.reshape(B, H, *p_BJRLM.shape[3:])
    # The keys that these queries do not meet have weight 0.
    unmet_keys = (keys.start, M - keys.stop)
    padding = (*[(0, 0)] * (weights.ndim - 1), unmet_keys)
    weights_of_blocks.append(jnp.pad(weights, padding))
  return jnp.concatenate(weights_of_blocks, -2)


def _swap_length_and_heads(x_BLHK: jax.Array) -> jax.Array:
  """Returns x with its length and its heads swapped, [B, H, L, K]."""
  return jnp.swapaxes(x_BLHK, 1, 2)


def _group_bias_by_key_head(bias_BHLM: Optional[jax.Array], key_heads: int
                            ) -> Optional[jax.Array]:
  """Returns a bias on the scores by the head of the keys, [B, J, R, L, M]."""
  if bias_BHLM is None:
    return None
  B, H, *lengths = bias_BHLM.shape
  return bias_BHLM.reshape(-1, key_heads, H // key_heads, *lengths)


def _group_sinks_by_key_head(sink_H: Optional[jax.Array], key_heads: int
                             ) -> Optional[jax.Array]:
  """Returns the scores of the sinks in float32, [1, J, R, 1, 1]."""
  if sink_H is None:
    return None
  return sink_H.astype(jnp.float32).reshape(
      1, key_heads, len(sink_H) // key_heads, 1, 1)


def _masked_scores(
    settings: _ScoreSettings, queries: slice, keys: slice,
    mask_BLM: Optional[jax.Array], q_BJRLK: jax.Array, k_BJMK: jax.Array,
    bias_BJRLM: Optional[jax.Array]) -> jax.Array:
  """Computes attention's scores scale * q k + bias for a block of queries and
  keys. A key that a query does not see gets MASKED_SCORE.

  The suffixes name axes: B batch, J heads of keys, R heads of queries for each
  head of keys, L queries, M keys, K features of a head.

  Args:
    settings: the scale, and the softcap c that bounds scores by c tanh(s / c).
    queries: which of all queries are in the block.
    keys: which of all keys are in the block.
    mask_BLM: bool, which keys a query sees; None: all.
    q_BJRLK: all queries.
    k_BJMK: all keys.
    bias_BJRLM: a bias on the scores of all pairs; None: there is none.

  Returns:
    The scores, float32 [B, J, R, L of the block, M of the block].
  """
  # The scale multiplies the queries, which are fewer numbers than the scores.
  q_BJRLK = layers.multiply_exactly(q_BJRLK[..., queries, :], settings.scale)
  s_BJRLM = _multiply_queries_and_keys(q_BJRLK, k_BJMK[..., keys, :])
  # The order matters: the softcap bounds the products alone, and neither the
  # bias nor MASKED_SCORE.
  if settings.softcap:
    s_BJRLM = settings.softcap * jnp.tanh(s_BJRLM / settings.softcap)
  if bias_BJRLM is not None:
    s_BJRLM = _add_bias(s_BJRLM, bias_BJRLM[..., queries, keys])
  if mask_BLM is not None:
    s_BJRLM = jnp.where(
        mask_BLM[:, None, None, queries, keys], s_BJRLM, MASKED_SCORE)
  return s_BJRLM


def _add_bias(s_BJRLM: jax.Array, bias_BJRLM: jax.Array) -> jax.Array:
  """Returns scores plus a bias, of each row or of all rows alike."""
  if len(bias_BJRLM) == len(s_BJRLM) or not sharding.is_single_cpu():
    return s_BJRLM + bias_BJRLM
  return _add_shared_bias(s_BJRLM, bias_BJRLM.astype(s_BJRLM.dtype))


@jax.custom_vjp
def _add_shared_bias(s_BJRLM: jax.Array, bias_1JRLM: jax.Array) -> jax.Array:
  """Returns s + b with a bias b that all rows share.

  Its gradient, a sum over the rows, is a product with ones: jaxlib 0.10.2 takes
  37 times as long for the sum.
  """
  return s_BJRLM + bias_1JRLM


def _add_shared_bias_forward(s_BJRLM: jax.Array, bias_1JRLM: jax.Array):
  """Returns s + b, and what its gradient reads: nothing."""
  return _add_shared_bias(s_BJRLM, bias_1JRLM), None


def _add_shared_bias_backward(_, dy_BJRLM: jax.Array):
  """Returns the gradients of s and b in y = s + b: ds = dy, and db is the sum
  of dy over the rows. The product that adds them up counts no FLOPs."""
  return dy_BJRLM, layers.count_flops_by_result(_sum_over_rows, 0)(dy_BJRLM)


_add_shared_bias.defvjp(_add_shared_bias_forward, _add_shared_bias_backward)


def _sum_over_rows(x_BJRLM: jax.Array) -> jax.Array:
  """Returns the sum over the rows of a batch, [1, J, R, L, M], as a product
  with ones."""
  B, *shape_of_row = x_BJRLM.shape
  sum_1I = jnp.ones((1, B)) @ x_BJRLM.reshape(B, -1)
  return sum_1I.reshape(1, *shape_of_row)


def _weigh_values(settings: _ScoreSettings, queries: slice, keys: slice,
                  key: Optional[jax.Array], p_BJRLM: jax.Array,
                  v_BJMK: jax.Array) -> jax.Array:
  """Sums the values of a block of keys by attention's weights p, after dropout
  of weights, for a block of queries l:

    o_l = sum over the keys m of the block of dropout(p)_lm v_m

  The suffixes name axes: B batch, J heads of keys, R heads of queries for each
  head of keys, L queries, M keys, K features of a head.

  Args:
    settings: has `dropout`, the share of weights that are set to 0.
    queries: which of all queries are in the block.
    keys: which of all keys are in the block.
    key: the random key of dropout; None: nothing is dropped.
    p_BJRLM: the weights p of these queries and keys.
    v_BJMK: the values v of all keys, of which those of the block are taken.

  Returns:
    The weighted sums, float32 [B, J, R, L, K].
  """
  # Each block draws numbers of its own, by its first query. The backward pass
  # calls this again and must draw the same ones.
  if key is not None:
    key_of_block = jax.random.fold_in(key, queries.start)
    p_BJRLM = layers.apply_dropout(p_BJRLM, settings.dropout, key_of_block)
  return _multiply_weights_and_values(p_BJRLM, v_BJMK[..., keys, :])


# The two products, and their gradients, with axes in such orders that XLA's CPU
# backend transposes queries, keys and values for them, but no scores.


@jax.custom_vjp
def _multiply_queries_and_keys(q_BJRLK: jax.Array, k_BJMK: jax.Array
                               ) -> jax.Array:
  """Returns s_lm = q_l . k_m, float32 [B, J, R, L, M]."""
  return layers.einsum('BJRLK,BJMK->BJRLM', q_BJRLK, k_BJMK,
                       dtype=q_BJRLK.dtype, out_dtype=jnp.float32)


def _multiply_queries_and_keys_forward(q_BJRLK: jax.Array, k_BJMK: jax.Array):
  """Returns the products, and what their gradient reads."""
  return _multiply_queries_and_keys(q_BJRLK, k_BJMK), (q_BJRLK, k_BJMK)


def _multiply_queries_and_keys_backward(saved: tuple, ds_BJRLM: jax.Array):
  """Returns the gradients of q and k in s_lm = q_l . k_m:

    dq_l = sum over m of ds_lm k_m,    dk_m = sum over l and r of ds_lm q_l
  """
  q_BJRLK, k_BJMK = saved
  dq_BJRLK = layers.einsum(
      'BJRLM,BJMK->BJRLK', ds_BJRLM, k_BJMK, dtype=q_BJRLK.dtype)
  return dq_BJRLK, _sum_over_queries(q_BJRLK, ds_BJRLM, k_BJMK.dtype)


def _sum_over_queries(x_BJRLK: jax.Array, w_BJRLM: jax.Array,
                      dtype: jax.typing.DTypeLike) -> jax.Array:
  """Returns the sums over queries l, and heads r of a key head, of w_lm x_l,
  [B, J, M, K]."""
  y_BJKM = layers.einsum('BJRLK,BJRLM->BJKM', x_BJRLK, w_BJRLM, dtype=dtype)
  return jnp.swapaxes(y_BJKM, 2, 3)


@jax.custom_vjp
def _multiply_weights_and_values(p_BJRLM: jax.Array, v_BJMK: jax.Array
                                 ) -> jax.Array:
  """Returns o_l = sum over m of p_lm v_m, float32 [B, J, R, L, K]."""
  return layers.einsum('BJRLM,BJMK->BJRLK', p_BJRLM, v_BJMK, dtype=v_BJMK.dtype,
                       out_dtype=jnp.float32)


def _multiply_weights_and_values_forward(p_BJRLM: jax.Array, v_BJMK: jax.Array):
  """Returns the products, and what their gradient reads."""
  return _multiply_weights_and_values(p_BJRLM, v_BJMK), (p_BJRLM, v_BJMK)


def _multiply_weights_and_values_backward(saved: tuple, do_BJRLK: jax.Array):
  """Returns the gradients of p and v in o_l = sum over m of p_lm v_m:

    dp_lm = do_l . v_m,    dv_m = sum over l and r of p_lm do_l
  """
  p_BJRLM, v_BJMK = saved
  dp_BJRLM = layers.einsum('BJRLK,BJMK->BJRLM', do_BJRLK, v_BJMK,
                           dtype=v_BJMK.dtype, out_dtype=p_BJRLM.dtype)
  return dp_BJRLM, _sum_over_queries(do_BJRLK, p_BJRLM, v_BJMK.dtype)


_multiply_queries_and_keys.defvjp(
    _multiply_queries_and_keys_forward, _multiply_queries_and_keys_backward)
_multiply_weights_and_values.defvjp(
    _multiply_weights_and_values_forward, _multiply_weights_and_values_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_by_key_head(settings: _ScoreSettings, *arrays: Optional[jax.Array]
                        ) -> jax.Array:
  """Returns the result of attention with a gradient that is written out, which
  keeps no scores; the arrays are the arguments of _attend_by_key_head_forward,
  and the result is [B, J, R, L, K]."""
  o_BJRLK, _ = _attend_by_key_head_forward(settings, *arrays)
  return o_BJRLK


def _attend_by_key_head_forward(
    settings: _ScoreSettings, q_BJRLK: jax.Array, k_BJMK: jax.Array,
    v_BJMK: jax.Array, bias_BJRLM: Optional[jax.Array],
    sink_1JR11: Optional[jax.Array], mask_BLM: Optional[jax.Array],
    key: Optional[jax.Array]):
  """Returns o and what its gradient reads, for one block of queries at a time:

    s_lm = scale q_l . k_m + bias_lm,    t_l = max over m of s_lm
    e_lm = exp(s_lm - t_l),              z_l = sum over m of e_lm
    o_l  = sum over m of e_lm v_m / z_l

  A sink is a key more, in t and z only. The gradient reads the arguments, t and
  z, but no scores.

  Args:
    settings: the numbers by which scores and weights are made.
    q_BJRLK: queries, [batch, heads of keys J, R heads of queries for each,
      length L, features K].
    k_BJMK: keys, [batch, J, number of keys M, K].
    v_BJMK: values, [batch, J, M, features of a value].
    bias_BJRLM: added to the scores; None: nothing is.
    sink_1JR11: the score of each head's sink; None: there is none.
    mask_BLM: bool, which keys a query sees; None: all.
    key: of dropout's random numbers; None: nothing is dropped.
  """
  o_of_blocks, top_of_blocks, sum_of_blocks = [], [], []
  blocks = settings.query_blocks(q_BJRLK.shape[3], k_BJMK.shape[2])
  for queries, keys in blocks:
    s_BJRLM = _masked_scores(settings, queries=queries, keys=keys,
                             mask_BLM=mask_BLM, q_BJRLK=q_BJRLK, k_BJMK=k_BJMK,
                             bias_BJRLM=bias_BJRLM)
    # The softmax is e / sum; the sink has a share of the sum, and no value. The
    # division comes after the product with the values, on fewer numbers.
    top_BJRL1 = s_BJRLM.max(-1, keepdims=True)
    if sink_1JR11 is not None:
      top_BJRL1 = jnp.maximum(top_BJRL1, sink_1JR11)
    e_BJRLM = jnp.exp(s_BJRLM - top_BJRL1)
    sum_BJRL1 = e_BJRLM.sum(-1, keepdims=True)
    if sink_1JR11 is not None:
      sum_BJRL1 += jnp.exp(sink_1JR11 - top_BJRL1)
    weighed_BJRLK = _weigh_values(settings, queries=queries, keys=keys, key=key,
                                  p_BJRLM=e_BJRLM, v_BJMK=v_BJMK)
    o_BJRLK = weighed_BJRLK / sum_BJRL1
    o_of_blocks.append(o_BJRLK.astype(v_BJMK.dtype))
    top_of_blocks.append(top_BJRL1)
    sum_of_blocks.append(sum_BJRL1)

  # Where remat keeps products, it keeps what the gradient needs of these.
  o_BJRLK, top_BJRL1, sum_BJRL1 = checkpoint_name(
      (jnp.concatenate(o_of_blocks, 3), jnp.concatenate(top_of_blocks, 3),
       jnp.concatenate(sum_of_blocks, 3)), layers.NAME_OF_PRODUCT)
  return o_BJRLK, (q_BJRLK, k_BJMK, v_BJMK, bias_BJRLM, sink_1JR11, mask_BLM,
                   key, top_BJRL1, sum_BJRL1)


def _attend_by_key_head_backward(settings: _ScoreSettings, saved: tuple,
                                 do_BJRLK: jax.Array):
  """Returns the gradients of the arguments of _attend_by_key_head_forward, as
  sums over the blocks of queries; None for the mask and the key.

  With s, t and z as there, the weights p are made again, and from the gradient
  do of the result follow

    p_lm  = exp(s_lm - t_l) / z_l
    dp_lm = do_l . v_m           dv_m = sum over l of p_lm do_l
    r_l   = sum over m of p_lm dp_lm
    ds_lm = p_lm dp_lm - p_lm r_l
    dsink = - sum over l of p_l,sink r_l

  and those of q, k and the bias from ds, by the gradient of the scores.

  Args:
    settings: the numbers by which scores and weights are made.
    saved: the arguments of the forward pass, t and z.
    do_BJRLK: the gradient of the result.
  """
  (q_BJRLK, k_BJMK, v_BJMK, bias_BJRLM, sink_1JR11, mask_BLM, key, top_BJRL1,
   sum_BJRL1) = saved
  do_BJRLK, gradients_of_blocks = do_BJRLK.astype(jnp.float32), []
  blocks = settings.query_blocks(q_BJRLK.shape[3], k_BJMK.shape[2])
  for queries, keys in blocks:
    # The weights p again, and the gradients of p and v. Each jax.vjp returns
    # the result and the function from its gradient to those of the arguments.
    s_BJRLM, scores_vjp = jax.vjp(
        functools.partial(_masked_scores, settings, queries, keys, mask_BLM),
        q_BJRLK, k_BJMK, bias_BJRLM)
    block_top_BJRL1 = top_BJRL1[..., queries, :]
    block_sum_BJRL1 = sum_BJRL1[..., queries, :]
    p_BJRLM = jnp.exp(s_BJRLM - block_top_BJRL1) / block_sum_BJRL1
    _, weighing_vjp = jax.vjp(
        functools.partial(_weigh_values, settings, queries, keys, key), p_BJRLM,
        v_BJMK)
    dp_BJRLM, dv_BJMK = weighing_vjp(do_BJRLK[..., queries, :])
    # Through the softmax. Not p (dp - r), which XLA's CPU backend joins with
    # the product that gives dp: on one core that takes twice as long.
    p_dp_BJRLM = p_BJRLM * dp_BJRLM
    r_BJRL1 = p_dp_BJRLM.sum(-1, keepdims=True)
    ds_BJRLM = p_dp_BJRLM - p_BJRLM * r_BJRL1
    d_sink = None
    if sink_1JR11 is not None:
      p_sink_BJRL1 = jnp.exp(sink_1JR11 - block_top_BJRL1) / block_sum_BJRL1
      d_sink = -(p_sink_BJRL1 * r_BJRL1).sum((0, 3), keepdims=True)
    gradients_of_blocks.append((*scores_vjp(ds_BJRLM), dv_BJMK, d_sink))

  # A block's gradients have the size of the whole arguments, with zeros outside
  # of the block, so they add up. Where a bias or sink is None, so is each term.
  dq, dk, d_bias, dv, d_sink = jax.tree.map(
      _sum_of_arguments, *gradients_of_blocks)
  return dq, dk, dv, d_bias, d_sink, None, None


def _sum_of_arguments(*terms: jax.Array) -> jax.Array:
  """Returns the sum of the arguments."""
  return sum(terms)


_attend_by_key_head.defvjp(
    _attend_by_key_head_forward, _attend_by_key_head_backward)


# Fused kernels, which never write the scores [B, H, L, M] to memory.
#
# xla      `attend`, as the compiler makes of it; anywhere, any mask
# splash   Pallas' splash attention on TPU: skips the blocks that a mask hides
# cudnn    cuDNN's flash attention on GPU (Dao et al. 2022)
# tokamax  tokamax's on Hopper and Blackwell, by name alone: it was never run
#
# `auto` takes splash on TPU and cudnn on GPU where they compute the same
# function, and xla elsewhere. The platform is that of the mesh, so that a
# program compiled ahead of time for a TPU has the TPU's kernel. One that is
# asked for by name and cannot do it is refused.

LANES = 128  # of a TPU: the lengths that splash takes are multiples
# The sizes of splash's blocks of queries and of keys, in order of choice: the
# first that divides the length.
SPLASH_BLOCK_SIZES = (512, 256, 128)


@struct.dataclass
class Mask:
  """Which keys a query sees, in the terms that kernels know.

  Attributes:
    q_ids_BL: with k_ids_BM, segment ids: a query sees its own alone.
    k_ids_BM: those of the keys.
    causal: whether a query sees no later key, by their places in the array.
    window: a query sees keys less than this away; 0: any.
    has_indexer: whether an indexer hides keys besides.
    in_order: whether places in the array are the tokens' order.
    shows_later_keys: whether a causal mask shows some later keys: those of a
      prefix, or of the query's block.
    has_bias: whether the scores have a bias.
    has_dropout: whether weights are dropped.
  """
  q_ids_BL: Optional[jax.Array] = None
  k_ids_BM: Optional[jax.Array] = None
  causal: bool = struct.field(pytree_node=False, default=False)
  window: int = struct.field(pytree_node=False, default=0)
  has_indexer: bool = struct.field(pytree_node=False, default=False)
  in_order: bool = struct.field(pytree_node=False, default=True)
  shows_later_keys: bool = struct.field(pytree_node=False, default=False)
  has_bias: bool = struct.field(pytree_node=False, default=False)
  has_dropout: bool = struct.field(pytree_node=False, default=False)

  def allows_query_blocks(self, queries: int) -> bool:
    """Returns whether so many queries, of which later ones see more, may meet
    their keys block by block: the argument `causal` of `attend`."""
    if not self.causal or not self.in_order or self.shows_later_keys:
      return False
    return sharding.count_shards('length', queries) == 1


class VisibleKeys(NamedTuple):
  """Which keys queries see, and what is added to their scores.

  Attributes:
    mask: the keys in the terms that kernels know.
    seen_BLM: the keys written out, bool; None: all.
    bias_BHLM: added to the scores; None: nothing is.
  """
  mask: Mask
  seen_BLM: Optional[jax.Array] = None
  bias_BHLM: Optional[jax.Array] = None


def find_visible_keys(kind: LayerKind, config: ModelConfig, ctx: Context,
                      k_positions_BM: jax.Array) -> VisibleKeys:
  """Finds which keys the tokens of a row see in self-attention, and the bias on
  their scores that all layers share, if the position encoding has one.

  The suffixes name axes: B batch, L queries, M keys, H heads.

  Args:
    kind: the kind of the layer: its rule of attention, and whether it is
      causal.
    config: the config of the layer.
    ctx: the context of the layer, with the tokens' positions and documents.
    k_positions_BM: the positions of the keys, [B or 1, M].

  Returns:
    The mask in two forms, described for fused kernels (`mask`) and written out
    (`seen_BLM`), and the bias (`bias_BHLM`, None without one).
  """
  # The mask, written out.
  rule, ids_BL = RULES[kind.attention], ctx.segment_ids_BL
  seen_BLM = visible_keys(
      kind, config, q_positions_BL=ctx.positions_BL,
      k_positions_BM=k_positions_BM, q_segments_BL=ids_BL, k_segments_BM=ids_BL,
      prefix_B=ctx.prefix_B, has_clean_copy=ctx.has_clean_copy)
  # A layer may have another encoding than the stack, without its bias.
  bias_BHLM = None
  if positions.position_of(config).stack_bias:
    bias_BHLM = ctx.distances.bias_BHLM
  # The mask, described: a fused kernel makes it itself, from ids and flags.
  kernel_ids_BL = segment_ids_with_chunks(
      kind, config, positions_BL=ctx.positions_BL, segments_BL=ids_BL)
  shows_later_keys = ctx.prefix_B is not None or config.diffusion_block > 0
  mask = Mask(
      q_ids_BL=kernel_ids_BL, k_ids_BM=kernel_ids_BL, causal=kind.causal,
      in_order=ctx.in_order, window=rule.window(config) if rule.window else 0,
      shows_later_keys=kind.causal and shows_later_keys,
      has_bias=bias_BHLM is not None)
  return VisibleKeys(mask=mask, seen_BLM=seen_BLM, bias_BHLM=bias_BHLM)


class Kernel(NamedTuple):
  """A fused kernel.

  Attributes:
    platform: that it runs on.
    refuse: (config, mask, queries, keys) -> why it cannot compute this, as
      'which ...'; '': it can.
    run: (q_BLHK, k_BMJK, v_BMJK, mask, seen_BLM, scale, softcap, sink_H) ->
      [B, L, H, K], with the last five as of attend.
    is_for_auto: whether `auto` may take it. A kernel that nobody has timed is
      taken by its name alone.
  """
  platform: str
  refuse: Callable[[ModelConfig, Mask, int, int], str]
  run: Callable[..., jax.Array]
  is_for_auto: bool = True


def choose_attention_kernel(config: ModelConfig, mask: Mask, q_length: int,
                            k_length: int, *, strict: bool = True) -> str:
  """Chooses the kernel that computes attention: 'xla' (plain JAX), 'splash'
  (Pallas, for TPU), 'cudnn' or 'tokamax' (for GPU).

  Args:
    config: the layer's config. Its attention_kernel names a kernel, or is
      'auto': then the first one that can compute this attention is taken.
    mask: which keys a query sees.
    q_length: the number of queries.
    k_length: the number of keys.
    strict: whether to raise where the named kernel cannot compute this. If
      false, xla takes its place.

  Returns:
    The kernel's name.

  Raises:
    RequestError: with `strict`, if config.attention_kernel names a kernel that
      cannot compute this.
  """
  # The order of KERNELS is the order of preference. xla computes everything.
  name, device = config.attention_kernel, sharding.traced_platform()
  candidates = [name]
  if name == 'auto':
    candidates = [x for x in KERNELS if KERNELS[x].is_for_auto]
  for kernel in candidates:
    reason = reason_of_refusal(kernel, config, mask=mask, q_length=q_length,
                               k_length=k_length, device=device)
    if not reason:
      return kernel
    # A kernel that was asked for by name is not replaced silently.
    if strict and name != 'auto':
      _raise_refusal(name, reason)
  return 'xla'


def check_attention_kernel(config: ModelConfig, device: str) -> None:
  """Raises RequestError where the attention kernel that the config names does
  not run on the platform `device`."""
  name = config.attention_kernel
  _raise_refusal(name, _refuse_platform(name, device))


def _raise_refusal(name: str, reason: str) -> None:
  """Raises RequestError where there is a reason why a kernel cannot be used;
  an empty reason raises nothing."""
  if reason:
    choices = [x for x in ('auto', 'xla', *KERNELS) if x != name]
    listed_choices = ', '.join(choices)
    raise RequestError(f'model.attention_kernel is {name}, {reason}: choose '
                       f'from {listed_choices}')


def _refuse_platform(name: str, device: str) -> str:
  """Returns why a kernel does not run on the platform `device`; '': it does."""
  kernels_platform = KERNELS[name].platform if name in KERNELS else device
  if kernels_platform == device:
    return ''
  return f'which runs on {kernels_platform}, and this program is for {device}'


def reason_of_refusal(name: str, config: ModelConfig, mask: Mask, q_length: int,
                      k_length: int, device: str) -> str:
  """Returns the reason why a kernel cannot compute a layer's attention, as text
  for an error message.

  Args:
    name: the name of the kernel.
    config: the layer's config.
    mask: which keys a query sees.
    q_length: the number of queries.
    k_length: the number of keys.
    device: the platform of the program, 'cpu', 'gpu' or 'tpu'.

  Returns:
    A clause 'which ...' that follows the kernel's name in the message; '' if
    the kernel can compute the attention.
  """
  if name == 'xla':
    return ''
  # First come the limits of all fused kernels, and then those of this one.
  if mask.has_bias or mask.has_dropout:
    return ('which adds no bias to the scores and drops no weights, as '
            f'model.position {config.position} and model.attention_dropout '
            f'{config.attention_dropout} do')
  attention = config.find_part(AttentionConfig)
  if attention is not None and attention.attention_difference:
    return 'which takes no values of two heads (model.attention_difference)'
  reason = _refuse_platform(name, device)
  return reason or KERNELS[name].refuse(config, mask, q_length, k_length)


def _refuse_splash(config: ModelConfig, mask: Mask, q_length: int,
                   k_length: int) -> str:
  """Returns the reason why Pallas' splash attention cannot compute a layer's
  attention: a clause 'which ...' for an error message, or '' if it can.

  Args:
    config: the layer's config, which is not read.
    mask: which keys a query sees.
    q_length: the number of queries.
    k_length: the number of keys.
  """
  # Splash makes causal masks and windows by the index of a token in the array,
  # so the tokens must be stored in their order.
  shards = sharding.count_shards('length', q_length)
  is_by_place = mask.causal or mask.window > 0
  is_unordered = is_by_place and not mask.in_order
  if mask.shows_later_keys or mask.has_indexer or is_unordered:
    return ('which has masks neither for a prefix that all tokens see, nor for '
            'positions without segment ids, nor for rules of attention but '
            'windows')

  # On each device it takes lengths in multiples of a TPU's lanes. Other lengths
  # can be padded if the mask hides the padding.
  can_be_padded = mask.causal and shards == 1 and q_length == k_length > LANES
  is_multiple = q_length % (LANES * shards) == 0 and k_length % LANES == 0
  if is_multiple or can_be_padded:
    return ''
  multiple = LANES * shards
  return (f'which takes lengths in multiples of {multiple}, and '
          f'{q_length} queries meet {k_length} keys')


def _padded_length(L: int) -> int:
  """Returns the length that so many tokens under a causal mask are padded to
  for splash: a multiple of LANES, or of a larger block that is an eighth of the
  tokens at most."""
  if L % LANES == 0:
    return L
  largest = max(LANES, L // 8)
  block = next(size for size in SPLASH_BLOCK_SIZES if size <= largest)
  return -(-L // block) * block


def _refuse_cudnn(config: ModelConfig, mask: Mask, q_length: int, k_length: int
                  ) -> str:
  """Returns the reason why cuDNN's attention cannot compute a layer's
  attention: a clause 'which ...' for an error message, or '' if it can.

  Args:
    config: the layer's config.
    mask: which keys a query sees, which is not read: a mask that cuDNN does not
      know is written out for it.
    q_length: the number of queries.
    k_length: the number of keys.
  """
  # Dtype and scores, sizes, and last whether the library is there.
  if config.attention_softcap or config.attention_sinks:
    return 'which has neither model.attention_softcap nor attention_sinks'
  reason = _refuse_dtype_and_head_of_gpu(config)
  if reason:
    return reason
  if q_length % 2 or k_length % 2:
    return (f'which takes even lengths, and {q_length} queries meet '
            f'{k_length} keys')
  if not _has_cudnn():
    return 'whose library must be there to compile for it, and it is not'
  return ''


def _refuse_dtype_and_head_of_gpu(config: ModelConfig) -> str:
  """Returns why the kernels for GPU take neither the dtype nor the heads of a
  layer: a clause 'which ...' for an error message, or '' if they do."""
  if config.compute_dtype != jnp.bfloat16:
    return f'which computes in bfloat16, and model.dtype is {config.dtype}'
  if config.head_dim % 8 or config.head_dim > 128:
    return ('which takes heads of a multiple of 8 features up to 128, and '
            f'model.head_dim is {config.head_dim}')
  return ''


def _has_cudnn() -> bool:
  """Returns whether the library cuDNN is there: whether this machine computes
  on a GPU of CUDA."""
  return (jax.default_backend() == 'gpu'
          and 'cuda' in jax.devices()[0].client.platform_version)


def _refuse_tokamax(config: ModelConfig, mask: Mask, q_length: int,
                    k_length: int) -> str:
  """Returns the reason why tokamax's attention cannot compute a layer's
  attention: a clause 'which ...' for an error message, or '' if it can.

  Args:
    config: the layer's config.
    mask: which keys a query sees, which is not read, as for cuDNN.
    q_length: the number of queries.
    k_length: the number of keys.
  """
  if config.attention_sinks:
    return 'which has no model.attention_sinks'
  reason = _refuse_dtype_and_head_of_gpu(config)
  if reason:
    return reason
  # On Hopper a mask that is written out is read in tiles of 64 keys.
  if q_length % 64 or k_length % 64:
    return (f'which takes lengths in multiples of 64, and {q_length} queries '
            f'meet {k_length} keys')
  return tokamax_kernels.reason_of_refusal(generations=(9, 10))


class _MeshLayout:
  """How queries and keys lie on the mesh: rows and heads of both are split,
  the length of the queries alone.

  Attributes:
    row_axes: the mesh axes of the rows.
    length_axes: those of the queries' length.
    head_axes: those of the heads.
    query_spec: where queries lie.
    key_spec: where keys and values lie.
  """

  def __init__(self, q_BLHK: jax.Array, k_BMJK: jax.Array):
    """Finds the mesh axes that the sharding rules split queries and keys over.

    Args:
      q_BLHK: the queries, [batch, length, H query heads, K features].
      k_BMJK: the keys, [batch, length, J key heads, K features].
    """
    B, L, H, _ = q_BLHK.shape
    self.row_axes = self._mesh_axes('batch', B)
    self.length_axes = self._mesh_axes('length', L)
    # A device needs the keys of its query heads. So query heads are split only
    # where the key heads can be split as well.
    num_key_heads = k_BMJK.shape[2]
    self.head_axes = ()
    if self._mesh_axes('kv_heads', num_key_heads):
      self.head_axes = self._mesh_axes('heads', H)
    self.query_spec = self.spec(
        self.row_axes, self.length_axes, self.head_axes)
    self.key_spec = self.spec(self.row_axes, (), self.head_axes)

  def _mesh_axes(self, axis: str, size: int) -> tuple[str, ...]:
    """Returns the mesh axes over which a logical axis of this size is split."""
    if sharding.count_shards(axis, size) == 1:
      return ()
    return sharding.mesh_axes(axis)

  def spec(self, *mesh_axes: tuple[str, ...]) -> PartitionSpec:
    """Returns the spec of an array by the mesh axes of each of its axes."""
    return PartitionSpec(*(axes or None for axes in mesh_axes))

  def apply_on_each_device(
      self, compute: Callable[..., jax.Array],
      in_specs: tuple[Optional[PartitionSpec], ...]
      ) -> Callable[..., jax.Array]:
    """Wraps a function so that each device applies it to its own share of the
    arguments. Fused kernels need this, since XLA cannot split them itself.

    Args:
      compute: a function of arrays. Its result must be split as queries are.
      in_specs: how each of its arguments is split over the mesh.

    Returns:
      A function of the whole arrays. Where no axis is split over the mesh, this
      is `compute` itself.
    """
    if not self.row_axes + self.length_axes + self.head_axes:
      return compute
    # check_vma is off because JAX cannot tell what a fused kernel's result
    # varies over. That `compute` needs no data of other devices is up to us.
    return jax.shard_map(compute, in_specs=in_specs, out_specs=self.query_spec,
                         check_vma=False)


def splash_attention(
    q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array, mask: Mask, *,
    scale: float, softcap: float = 0.0, sink_H: Optional[jax.Array] = None,
    interpret: bool = False) -> jax.Array:
  """Returns the result of attention, as `attend`, by Pallas' splash attention
  for TPU.

  Args:
    q_BLHK: queries, [batch, length L, heads H, features K].
    k_BMJK: keys, [batch, number of keys M, heads of keys J, features K].
    v_BMJK: values, [batch, M, J, features of a value].
    mask: which keys a query sees.
    scale: as of `attend`.
    softcap: as of `attend`.
    sink_H: as of `attend`.
    interpret: whether the kernel is emulated, so that it runs on CPU.
  """
  B, L, H, _ = q_BLHK.shape
  M, layout = k_BMJK.shape[1], _MeshLayout(q_BLHK, k_BMJK)
  if _padded_length(L) > L:
    return _pad_and_apply_splash(
        q_BLHK, k_BMJK, v_BMJK, mask=mask, scale=scale, softcap=softcap,
        sink_H=sink_H, interpret=interpret)

  # A mask that differs from query to query is split over the mesh with them.
  mask_axes = layout.length_axes if mask.causal or mask.window else ()
  length_shards = sharding.count_devices_along(layout.length_axes)
  queries = L if mask_axes else L // length_shards
  heads = H // sharding.count_devices_along(layout.head_axes)
  kernel = _make_splash_kernel(
      mask, heads=heads, L=queries, M=M,
      shards=sharding.count_devices_along(mask_axes), softcap=softcap,
      interpret=interpret)
  q_ids_BL, k_ids_BM = mask.q_ids_BL, mask.k_ids_BM
  if q_ids_BL is not None:
    q_ids_BL = jnp.broadcast_to(q_ids_BL, (B, L))
    k_ids_BM = jnp.broadcast_to(k_ids_BM, (B, M))

  def attend_on_device(
      kernel: Any, q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
      q_ids_BL: Optional[jax.Array], k_ids_BM: Optional[jax.Array],
      sink_H: Optional[jax.Array]):
    """Computes one device's share of the result by the splash kernel, from its
    shares of the queries [B, L, H, K], keys and values [B, M, J, K], segment
    ids and sinks."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas
    # The kernel takes heads before the length, and does not scale by itself.
    ids = None
    if q_ids_BL is not None:
      ids = pallas.SegmentIds(q_ids_BL, k_ids_BM)
    q_BHLK = _swap_length_and_heads(layers.multiply_exactly(q_BLHK, scale))
    o_BHLK = _apply_splash_to_rows(
        kernel, ids, q_BHLK, _swap_length_and_heads(k_BMJK),
        _swap_length_and_heads(v_BMJK), sink_H)
    return _swap_length_and_heads(o_BHLK)

  # Each device computes its rows and heads.
  mesh, kernel_spec = jax.sharding.get_abstract_mesh(), None
  if not mesh.empty:
    kernel_spec = kernel.manual_sharding_spec(
        NamedSharding(mesh, layout.spec((), mask_axes)))
  in_specs = (
      kernel_spec, layout.query_spec, layout.key_spec, layout.key_spec,
      layout.spec(layout.row_axes, layout.length_axes),
      layout.spec(layout.row_axes), layout.spec(layout.head_axes))
  attend_on_devices = layout.apply_on_each_device(attend_on_device, in_specs)
  return attend_on_devices(
      kernel, q_BLHK, k_BMJK, v_BMJK, q_ids_BL, k_ids_BM, sink_H)


def _pad_and_apply_splash(q_BLHK: jax.Array, k_BMJK: jax.Array,
                          v_BMJK: jax.Array, mask: Mask, **options: Any
                          ) -> jax.Array:
  """Computes `splash_attention` for a length that the kernel's blocks do not
  divide. Padding is appended to the tokens, and its results are cut off again.

  The suffixes name axes: B batch, L queries, M = L keys, H heads of queries, J
  heads of keys, K features of a head.

  Args:
    q_BLHK: queries.
    k_BMJK: keys.
    v_BMJK: values.
    mask: which keys a query sees. It must be causal: then no token sees the
      padding, which comes after it.
    **options: the other arguments of `splash_attention`.

  Returns:
    The results of the heads, [B, L, H, K].
  """
  L = q_BLHK.shape[1]
  num_padding = _padded_length(L) - L

  def pad_length(x: jax.Array) -> jax.Array:
    """Returns x with zeros after its length, axis 1."""
    other_axes = [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, ((0, 0), (0, num_padding), *other_axes))

  # Queries, keys, values and their segment ids get the same padding.
  if mask.q_ids_BL is not None:
    mask = mask.replace(q_ids_BL=pad_length(mask.q_ids_BL),
                        k_ids_BM=pad_length(mask.k_ids_BM))
  o_BLHK = splash_attention(pad_length(q_BLHK), pad_length(k_BMJK),
                            pad_length(v_BMJK), mask=mask, **options)
  return o_BLHK[:, :L]


@jax.custom_vjp
def _apply_splash_to_rows(
    kernel: Any, ids: Any, q_BHLK: jax.Array, k_BJMK: jax.Array,
    v_BJMK: jax.Array, sink_H: Optional[jax.Array]) -> jax.Array:
  """Applies a splash kernel, which takes one row of a batch, to each row.

  This is jax.vmap of the kernel over rows. It has a gradient of its own,
  defined below, which is the kernel's behind an optimisation barrier: that
  saves memory. The kernel writes the sum of each query's scores 128 times, as
  [B, H, L, 128] in float32, and its gradient reads one of the copies. Without
  the barrier, XLA would keep all 128 until the gradient.

  The suffixes name axes: B batch, H heads of queries, L queries, J heads of
  keys, M keys, K features of a head.

  Args:
    kernel: the splash kernel, compiled for one row.
    ids: the segment ids of queries and keys, as the kernel takes them; None: a
      row is one segment.
    q_BHLK: queries.
    k_BJMK: keys.
    v_BJMK: values.
    sink_H: for each head, a score that enters the softmax without a value (an
      attention sink); None: there is none.

  Returns:
    The results, [B, H, L, K].
  """
  # All rows have the same sinks.
  apply_to_rows = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
  return apply_to_rows(q_BHLK, k_BJMK, v_BJMK, ids, sink_H)


def _apply_splash_forward(kernel: Any, ids: Any, *arrays: Optional[jax.Array]):
  """Returns the result of the kernel, and its vjp function."""
  def apply_to_rows(q_BHLK: jax.Array, k_BJMK: jax.Array, v_BJMK: jax.Array,
                    sink_H: Optional[jax.Array]) -> jax.Array:
    """Returns the result of the kernel for each row."""
    return jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(
        q_BHLK, k_BJMK, v_BJMK, ids, sink_H)

  return jax.lax.optimization_barrier(jax.vjp(apply_to_rows, *arrays))


def _apply_splash_backward(vjp: Any, do_BHLK: jax.Array):
  """Returns the gradients of queries, keys, values and sinks from that of the
  result, do; None for the kernel and the ids."""
  return None, None, *vjp(do_BHLK)


_apply_splash_to_rows.defvjp(_apply_splash_forward, _apply_splash_backward)


def _make_splash_kernel(mask: Mask, heads: int, L: int, M: int, shards: int,
                        softcap: float, interpret: bool):
  """Makes a kernel of Pallas' splash attention for a mask and sizes.

  Args:
    mask: which keys a query sees. Its segment ids are not read here: they are
      an argument of the kernel.
    heads: the number of heads that a device has.
    L: the number of queries.
    M: the number of keys.
    shards: over how many devices the queries and their mask are split.
    softcap: the bound c of the scores s, as c tanh(s / c); 0: there is none.
    interpret: whether the kernel is emulated, so that it runs on CPU.

  Returns:
    A function of one row's queries, keys, values and segment ids.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as pallas
  # The mask of a head, described and not written out. A window of n keys counts
  # the query's own, so it reaches n - 1 keys to each side.
  if mask.window:
    reach = mask.window - 1
    reach_after = 0 if mask.causal else reach
    head_mask = pallas.LocalMask((L, M), (reach, reach_after), 0)
  elif mask.causal:
    head_mask = pallas.CausalMask((L, M))
  else:
    head_mask = pallas.FullMask((L, M))

  # The largest blocks that divide a device's queries, and the keys.
  sizes = SPLASH_BLOCK_SIZES
  block_q = next(size for size in sizes if L // shards % size == 0)
  block_kv = next(size for size in sizes if M % size == 0)
  return pallas.make_splash_mha(
      pallas.MultiHeadMask([head_mask] * heads), head_shards=1,
      q_seq_shards=shards,
      block_sizes=pallas.BlockSizes(
          block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
          block_q_dkv=block_q, block_kv_dkv=block_kv,
          block_kv_dkv_compute=block_kv, block_q_dq=block_q,
          block_kv_dq=block_kv),
      attn_logits_soft_cap=softcap or None, interpret=interpret,
      # Where remat keeps products, it keeps what the gradient needs of these.
      residual_checkpoint_name=layers.NAME_OF_PRODUCT)


def cudnn_attention(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
                    mask: Mask, seen_BLM: Optional[jax.Array], *, scale: float
                    ) -> jax.Array:
  """Computes attention by cuDNN's flash attention for GPU, in bfloat16; see
  `attend_on_gpu`."""
  kernel = functools.partial(
      jax.nn.dot_product_attention, scale=scale, implementation='cudnn')
  return attend_on_gpu(kernel, q_BLHK, k_BMJK, v_BMJK, mask=mask,
                       seen_BLM=seen_BLM)


def attend_on_gpu(kernel: Callable[..., jax.Array], q_BLHK: jax.Array,
                  k_BMJK: jax.Array, v_BMJK: jax.Array, mask: Mask,
                  seen_BLM: Optional[jax.Array]) -> jax.Array:
  """Computes attention by a kernel that is called as JAX calls cuDNN's, on each
  device: softmax(scale * q k) v over the keys that each query sees.

  The suffixes name axes: B batch, L queries, M keys, H heads of queries, J
  heads of keys, K features of a head.

  Args:
    kernel: (queries, keys, values, mask, is_causal, local_window_size) -> [B,
      L, H, K], with arguments as of jax.nn.dot_product_attention.
    q_BLHK: queries.
    k_BMJK: keys.
    v_BMJK: values.
    mask: which keys a query sees, described.
    seen_BLM: bool, the same mask written out; None: all keys are seen. It is
      read only where the kernel cannot make the mask itself.

  Returns:
    The results of the heads, [B, L, H, K].
  """
  (B, L), M = q_BLHK.shape[:2], k_BMJK.shape[1]
  layout = _MeshLayout(q_BLHK, k_BMJK)

  # The kernel makes causal masks and windows itself, for whole rows whose
  # tokens are stored in their order. Other masks are given to it written out.
  is_by_place = (mask.in_order and not mask.shows_later_keys
                 and not mask.has_indexer)
  is_whole_row = mask.q_ids_BL is None and not layout.length_axes
  is_native = (is_by_place and is_whole_row
               and (mask.causal or not mask.window))
  window = None
  if is_native:
    seen_BLM = None
    if mask.window:
      window = (mask.window - 1, 0)
  elif seen_BLM is not None:
    seen_BLM = jnp.broadcast_to(seen_BLM, (B, L, M))

  def attend_on_device(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
                       seen_BLM: Optional[jax.Array]):
    """Returns one device's share of the result."""
    return kernel(
        q_BLHK, k_BMJK, v_BMJK,
        mask=None if seen_BLM is None else seen_BLM[:, None],
        is_causal=is_native and mask.causal, local_window_size=window)

  # Each device computes its rows, queries and heads, with all keys.
  in_specs = (layout.query_spec, layout.key_spec, layout.key_spec,
              layout.spec(layout.row_axes, layout.length_axes))
  attend_on_devices = layout.apply_on_each_device(attend_on_device, in_specs)
  return attend_on_devices(q_BLHK, k_BMJK, v_BMJK, seen_BLM)


def _run_splash(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
                mask: Mask, seen_BLM: Optional[jax.Array], **options: Any
                ) -> jax.Array:
  """Returns the result of `splash_attention` by the arguments of Kernel.run;
  it makes its mask itself, so `seen_BLM` is not read."""
  del seen_BLM
  return splash_attention(q_BLHK, k_BMJK, v_BMJK, mask=mask, **options)


def _run_cudnn(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
               mask: Mask, seen_BLM: Optional[jax.Array], *, scale: float,
               softcap: float, sink_H: Optional[jax.Array]) -> jax.Array:
  """Returns the result of `cudnn_attention` by the arguments of Kernel.run;
  softcaps and sinks have been refused."""
  del softcap, sink_H
  return cudnn_attention(q_BLHK, k_BMJK, v_BMJK, mask=mask, seen_BLM=seen_BLM,
                         scale=scale)


def _run_tokamax(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
                 mask: Mask, seen_BLM: Optional[jax.Array], *, scale: float,
                 softcap: float, sink_H: Optional[jax.Array]) -> jax.Array:
  """Returns the result of tokamax's attention by the arguments of Kernel.run;
  sinks have been refused."""
  del sink_H
  kernel = functools.partial(
      tokamax_kernels.attention, scale=scale, softcap=softcap)
  return attend_on_gpu(kernel, q_BLHK, k_BMJK, v_BMJK, mask=mask,
                       seen_BLM=seen_BLM)


# The fused kernels; `auto` takes the first that can compute the attention.
KERNELS = {
    'splash': Kernel(platform='tpu', refuse=_refuse_splash, run=_run_splash),
    'cudnn': Kernel(platform='gpu', refuse=_refuse_cudnn, run=_run_cudnn),
    'tokamax': Kernel(platform='gpu', refuse=_refuse_tokamax, run=_run_tokamax,
                      is_for_auto=False),
}
