"""Attention to entries that stand for several tokens each, beside a window of
plain keys: CSA, HCA and, without entries, SWA (DeepSeek-AI 2026, DeepSeek-V4,
arXiv 2606.19348, section 2.3; as transformers has it).

  k_m   = R_m n(W_k x_m)                          key and value of all heads
  q_l,h = R_l n(W_q,h n(W_dq x_l))
  e_w   = R_s n(sum over i of p_i * v_i),   p = softmax over i of (z_i + b_i)
  v_i   = W_v x_i,   z_i = W_z x_i
  o_l,h = R_-l sum of softmax([q_l,h [k; e] / sqrt(K), sink_h]) [k; e]
  y_l   = W_o [W_g o_l of the heads of group g] over the groups

A query sees the last `window` keys k, and entries whose windows have closed by
then. e_w is made of the tokens i of a window of `rate` tokens, each feature of
which has weights of its own, and s is the first of them. In HCA a query sees
all such entries. In CSA it sees those that an indexer (indexer.py) scores
highest, whose keys are entries of its own, and each entry is made of the window
before, too, by other v, z and b. R turns the last of the K features, and n is
the norm of the model, in queries without parameters.

Windows begin anew with each document. A cache has the keys of all tokens, the
entries, and v and z of the tokens of windows that have not closed.
"""

import dataclasses
import functools
from typing import NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import layers
from architectures.parts import mixer
from architectures.parts import positions
from architectures.parts import sharding
from architectures.parts.attention import indexer
from architectures.parts.attention import kernels
from architectures.parts.attention.indexer import IndexerConfig
from architectures.parts.attention.multi_head import Attention
from architectures.parts.cache import Cache
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context
from architectures.parts.positions import RopeConfig
from architectures.parts.recurrent import features
from architectures.parts.sharding import Role, declare
from common.errors import require
from common.fields import field, FUNCTION, SHAPES


@dataclasses.dataclass(frozen=True)
class CompressedConfig:
  """The fields of mixers csa, hca and swa."""
  GROUP = 'compressed'
  window: int = field(128, 'plain keys that a query sees, its own included',
                      above=0, resume=FUNCTION)
  csa_rate: int = field(4, 'tokens of an entry of csa, and of the one before',
                        above=0, resume=SHAPES)
  hca_rate: int = field(128, 'tokens of an entry of hca', above=0,
                        resume=SHAPES)
  q_rank: int = field(0, 'Size of the vector that queries are made from; '
                      'derived: 2 head_dim.', resume=SHAPES)
  out_groups: int = field(1, 'groups of heads that have a first product of the '
                          'output of their own', above=0, resume=SHAPES)
  out_rank: int = field(0, 'what it makes of a group; derived: 2 head_dim',
                        resume=SHAPES)

  def derived(self, config: ModelConfig) -> 'CompressedConfig':
    return dataclasses.replace(self, q_rank=self.q_rank or 2 * config.head_dim,
                               out_rank=self.out_rank or 2 * config.head_dim)


class Windows(NamedTuple):
  """The windows of tokens that are closed by the tokens that a layer is given:
  W windows, each with the S tokens that its entry is made of.

  Attributes:
    index_BWS: the indices of these tokens in the array of the tokens that were
      kept from before and, after them, the tokens that are given.
    exists_BWS: whether the document has them.
    number_BW: which entries of the row these are.
    end_BW: the index of the window's last token in the row.
    first_position_BW: the position of the window's first token.
  """
  index_BWS: jax.Array
  exists_BWS: jax.Array
  number_BW: jax.Array
  end_BW: jax.Array
  first_position_BW: jax.Array


def find_closed_windows(ctx: Context, L: int, tokens_of_window: int,
                        tokens_of_entry: int, cached: bool) -> Windows:
  """Finds the windows of tokens that the tokens of a layer close: the last
  token of each is among them. An entry is made of each such window.

  Args:
    ctx: the context of the layer, with the tokens' positions and documents.
    L: the number of tokens.
    tokens_of_window: how many tokens a window has.
    tokens_of_entry: S, how many tokens an entry is made of: those of one or
      more windows.
    cached: whether the tokens follow those in a cache.

  Returns:
    As many windows as L tokens can close, however many they do: the number is
    part of the program. Those that stay open end after all tokens, so that no
    token sees them.
  """
  ids_BL, positions_BL = ctx.segment_ids_BL, ctx.positions_BL
  # With a cache, the row goes on: windows are counted from its beginning, and
  # the tokens of the open one stand before the first token.
  num_before, num_kept = 0, 0
  number_BW = jnp.arange(max(1, L // tokens_of_window))[None]
  if cached:
    num_before, num_kept = positions_BL[:, :1, None], tokens_of_entry - 1
    number_BW = (jnp.arange(-(-L // tokens_of_window))[None]
                 + positions_BL[:, :1] // tokens_of_window)

  # The index of the token that ends each window, in the row (end_BW) and in its
  # document (end_in_document_BW).
  end_BW = end_in_document_BW = (
      number_BW * tokens_of_window + tokens_of_window - 1)
  # With documents, windows begin anew with each. Window n of the row ends where
  # the number of windows that have closed first reaches n + 1.
  if ids_BL is not None:
    start_BL = features.start_of_document(ids_BL)
    index_in_document_BL = jnp.arange(L)[None] - start_BL
    num_closed_BL = jnp.cumsum(
        (index_in_document_BL + 1) % tokens_of_window == 0, 1)
    end_BW = jax.vmap(jnp.searchsorted, (0, None))(
        num_closed_BL, number_BW[0] + 1)
    end_in_document_BW = _take_columns(index_in_document_BL, end_BW)
  end_position_BW = end_BW if cached else _take_columns(positions_BL, end_BW)

  # The tokens of each entry, the S tokens up to its window's end. Their indices
  # are in the array of kept and given tokens. One that the document does not
  # have is clipped to some token, and marked as absent.
  offset_11S = jnp.arange(1 - tokens_of_entry, 1)[None, None]
  index_BWS = end_BW[..., None] + offset_11S + num_kept - num_before
  return Windows(
      index_BWS=jnp.clip(index_BWS, 0, num_kept + L - 1),
      exists_BWS=end_in_document_BW[..., None] + offset_11S >= 0,
      number_BW=number_BW, end_BW=end_BW,
      first_position_BW=end_position_BW - tokens_of_window + 1)


def _take_columns(x_BL: jax.Array, index_BW: jax.Array) -> jax.Array:
  """Looks up W numbers in each row of a table by their indices,

    y_bw = x_b,i with i = index_bw

  An index past the end of a row gives the row's last number: the caller looks
  up the ends of windows, and one that has not ended has such an index.

  The suffixes name axes: B rows of the batch, L numbers of a row, W look-ups.

  Args:
    x_BL: the numbers, [B or 1, L]. A single row stands for all rows.
    index_BW: the indices, [B or 1, W]. A single row stands for all rows.

  Returns:
    The numbers that were looked up, [B, W].
  """
  L = x_BL.shape[1]
  W = index_BW.shape[1]
  bounded_BW = jnp.minimum(index_BW, L - 1)

  # Give both as many rows, since take_along_axis wants them alike.
  num_rows = max(len(x_BL), len(index_BW))
  all_rows_BL = jnp.broadcast_to(x_BL, (num_rows, L))
  all_rows_BW = jnp.broadcast_to(bounded_BW, (num_rows, W))
  return jnp.take_along_axis(all_rows_BL, all_rows_BW, axis=1)


class Entries(nn.Module):
  """The entries that windows of tokens are compressed to:
  (x_BLD, windows, context, v and z of tokens before) -> (e_BWK, not rotated; v
  and z that the next tokens need).

  Attributes:
    config: the config of the layer.
    rate: how many tokens a window has.
    size: K, the features of an entry.
    windows_of_entry: of how many windows an entry is made.
  """
  config: ModelConfig
  rate: int
  size: int
  windows_of_entry: int

  @nn.compact
  def __call__(self, x_BLD: jax.Array, windows: Windows, ctx: Context,
               previous_BMU: Optional[jax.Array]):
    """Compresses each window of tokens to one vector, called its entry. It is a
    mean of the tokens' values v, weighed by their scores z and a learned bias
    b, for each feature by itself:

      v = W_v x,   z = W_z x,   entry = sum of softmax(z + b) v

    The suffixes name axes: B batch, L length, D d_model, M tokens with those
    from a cache, U the features of v and z side by side, P tokens of a window,
    W entries, K features of an entry.

    Args:
      x_BLD: the layer's input.
      windows: which tokens each entry is made of.
      ctx: the context of the call, which says which tokens are padding.
      previous_BMU: the values and scores of earlier tokens whose windows are
        still open, from a cache; None: there is no cache.

    Returns:
      The entries, [B, W, K], not rotated by positions; and the values and
      scores to be kept for the next call, of the shape of `previous_BMU`, or
      None without a cache.
    """
    # Values and scores of the tokens, joined in the order that _pool_windows
    # takes apart again. With several windows for each entry, both have as many
    # times the features.
    L = x_BLD.shape[1]
    values_and_scores_BMU = jnp.concatenate(
        [self._product('value', x_BLD), self._product('score', x_BLD)], -1)
    bias_PU = declare(self, 'score_bias', init=nn.initializers.zeros,
                      shape=(self.rate, self.windows_of_entry * self.size),
                      role=Role((None, None)))

    # The earlier tokens stand first. The last tokens, as many as came from the
    # cache, are returned for the next call.
    next_BMU = None
    if previous_BMU is not None:
      previous_BMU = previous_BMU.astype(values_and_scores_BMU.dtype)
      values_and_scores_BMU = jnp.concatenate(
          [previous_BMU, values_and_scores_BMU], 1)
      next_BMU = features.last_inputs(values_and_scores_BMU,
                                      count=previous_BMU.shape[1], length=L,
                                      valid_BL=ctx.valid_BL)
    values_and_scores_BMU = sharding.constrain(
        values_and_scores_BMU, 'batch', None, None)

    # The weighted means over windows, which take 4 FLOPs a token and feature.
    pool_windows = layers.count_flops_by_result(
        _pool_windows, 4 * self.rate * self.windows_of_entry)
    e_BWK = pool_windows(values_and_scores_BMU, bias_PU, windows.index_BWS,
                         windows.exists_BWS)
    return layers.norm(self.config, 'norm', 'head')(e_BWK), next_BMU

  def _product(self, name: str, x_BLD: jax.Array) -> jax.Array:
    """Returns W x with the features of all windows of an entry, [B, L, U],
    where W is the parameter `name`."""
    axes, size = ('embed', None), self.windows_of_entry * self.size
    w_DU = layers.weight(self, name, shape=(x_BLD.shape[-1], size), axes=axes)
    return layers.einsum('BLD,DU->BLU', x_BLD, w_DU,
                         dtype=self.config.compute_dtype, axes=axes)


def _pool_windows(values_and_scores_BMU: jax.Array, bias_PU: jax.Array,
                  index_BWS: jax.Array, exists_BWS: jax.Array) -> jax.Array:
  """Compresses each window of tokens to one vector, called its entry. An entry
  is a weighted mean of the tokens' values, for each feature by itself:

    e_w = sum over the tokens i of entry w of p_i * v_i,
    p   = softmax over i of (z_i + b_i)

  An entry is made of the tokens of T windows, its own and the T - 1 before it.
  A token has T values v and T scores z: one for each of the T entries that it
  enters.

  The suffixes name axes: B batch, M tokens, W entries, K features of an entry,
  T windows of an entry, P tokens of a window, S = T P tokens of an entry.

  Args:
    values_and_scores_BMU: the values v of the tokens, followed by their scores
      z: [B, M, U], where U = 2 T K.
    bias_PU: the biases b by the place of a token in its window, [P, T K].
    index_BWS: for each entry, which of the M tokens it is made of.
    exists_BWS: bool, whether the document has this token. The first entries of
      a document lack the tokens before its start.

  Returns:
    The entries, [B, W, K].
  """
  # The axis V has 2 members: values, then scores. The order is that in which
  # `Entries` joins them, and is undone by the moveaxis below.
  (B, M, _), P = values_and_scores_BMU.shape, len(bias_PU)
  num_windows = index_BWS.shape[-1] // P
  values_and_scores_BMVTK = values_and_scores_BMU.reshape(
      B, M, 2, num_windows, -1)
  index_BWS = jnp.broadcast_to(index_BWS, (B, *index_BWS.shape[1:]))

  # v and z of the tokens of each entry, in the order of time: first those of
  # the windows before, and last those of its own window.
  windows = []
  for i in range(num_windows):
    index_BWP = index_BWS[..., i * P:(i + 1) * P]
    windows.append(jax.vmap(_gather_rows)(
        values_and_scores_BMVTK[:, :, :, i], index_BWP))
  values_and_scores_BWSVK = jnp.concatenate(windows, 2).astype(jnp.float32)
  v_BWSK, z_BWSK = jnp.moveaxis(values_and_scores_BWSVK, 3, 0)

  # p = softmax(z + b) over the tokens that the document has. The biases [P, T,
  # K] are brought into the order of the S tokens, window by window.
  bias_TPK = jnp.moveaxis(bias_PU.reshape(P, num_windows, -1), 1, 0)
  bias_SK = bias_TPK.reshape(num_windows * P, -1).astype(jnp.float32)
  z_BWSK = jnp.where(exists_BWS[..., None], z_BWSK + bias_SK[None, None],
                     kernels.MASKED_SCORE)
  e_BWK = (jax.nn.softmax(z_BWSK, 2) * v_BWSK).sum(2)
  return e_BWK.astype(values_and_scores_BMU.dtype)


def _gather_rows(x_MVK: jax.Array, index_WP: jax.Array) -> jax.Array:
  """Returns the rows of x with these indices, [W, P, V, K]."""
  return x_MVK[index_WP]


class ScoredEntries(indexer.ScoredKeys):
  """An indexer's scores of entries, vectors that stand for a window of several
  tokens each. Queries meet W entries behind M plain keys, which have no scores.

  The field `scores_BLM` of the base class has scores of the entries alone,
  [B, L, W].
  """

  @property
  def num_entries(self) -> int:
    """The number of entries, W."""
    return self.scores_BLM.shape[-1]

  def mask_of_best(self, seen_BLM: jax.Array, top_k: int) -> jax.Array:
    """Returns a mask of what each query sees after an indexer has chosen: all
    plain keys that it saw before, and the top_k entries with the best scores.

    The suffixes name axes: B batch, L queries, M all that the queries meet.

    Args:
      seen_BLM: bool, what a query may see: first the keys of single tokens, and
        after them the entries.
      top_k: how many entries to choose. Where there are fewer, all are chosen.

    Returns:
      bool [B, L, M], in the same order.
    """
    # The base class chooses by the scores, which only the entries have. They
    # stand last in the mask.
    W = self.num_entries
    best_BLW = super().mask_of_best(seen_BLM[..., -W:], min(top_k, W))
    return _append_entries(seen_BLM[..., :-W], best_BLW)

  def divergence(self, target_BLM: jax.Array, seen_BLM: jax.Array, ctx: Context
                 ) -> jax.Array:
    """Returns the divergence of the scores from the target, over entries."""
    W = self.num_entries
    return super().divergence(target_BLM[..., -W:], seen_BLM[..., -W:], ctx)


def _append_entries(seen_BLM: jax.Array, seen_BLW: jax.Array) -> jax.Array:
  """Appends to a mask of keys the mask of entries, the vectors that stand for a
  window of several tokens each.

  The suffixes name axes: B batch, L queries, M keys, W entries.

  Args:
    seen_BLM: bool, whether a query sees a key, [B or 1, L, M].
    seen_BLW: bool, whether a query sees an entry, [B or 1, L, W].

  Returns:
    bool [B, L, M + W]. The entries stand after the keys, as they do in the
    array of keys that the mask belongs to.
  """
  # A mask with a single row holds for all rows of the batch.
  num_rows = max(len(seen_BLM), len(seen_BLW))
  seen_keys = jnp.broadcast_to(seen_BLM, (num_rows, *seen_BLM.shape[1:]))
  seen_entries = jnp.broadcast_to(seen_BLW, (num_rows, *seen_BLW.shape[1:]))
  return jnp.concatenate([seen_keys, seen_entries], -1)


class SWA(Attention):
  """(x_BLD, context, cache) -> (y_BLD, cache, report), over x itself.

  WINDOWS_OF_ENTRY: how many windows an entry is made of; 0: there are none.
  """
  settings = CompressedConfig
  FUSED = False
  WINDOWS_OF_ENTRY = 0

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[Cache]):
    """Returns attention over the last tokens of a window and, in subclasses,
    over entries that older windows are compressed to. One vector of each token
    is both its key and its value.

    Args:
      x_BLD: the layer's input, [batch, length, d_model].
      ctx: the context of the call: positions, documents, padding.
      cache: what the layer keeps of earlier tokens; None: there is none.

    Returns:
      The output [B, L, D], the cache after these tokens (None where there was
      none), and a report for the panel of figures.
    """
    config, fields = self.config, self.config.part(CompressedConfig)
    require(not ctx.keep_attention, f'model.mixer {config.mixer!r} weighs '
            'entries of several tokens each: there is no weight of each token '
            'to keep')
    # Queries, and a key of each token, which is its value too.
    query_input_BLU, q_BLHK = self._make_queries(x_BLD, ctx)
    k_BM1K, k_positions_BM = self._make_keys(x_BLD, ctx), ctx.positions_BL
    reads_slots = (
        cache is not None and not kernels.is_start_of_row(self.kind, ctx))
    if cache is not None:
      cache = cache.write(k_BM1K, None, ctx.positions_BL)
    if reads_slots:
      k_BM1K, _, _ = cache.slots
      k_positions_BM = jnp.arange(k_BM1K.shape[1])[None]

    # A query sees the last `window` keys, and entries, which stand behind the
    # keys as further keys and values.
    banded_config = dataclasses.replace(config, sliding_window=fields.window)
    seen_BLM = kernels.visible_keys(
        LayerKind('banded', self.kind.ffn), banded_config,
        q_positions_BL=ctx.positions_BL, k_positions_BM=k_positions_BM,
        q_segments_BL=ctx.segment_ids_BL, k_segments_BM=ctx.segment_ids_BL)
    L, M, scored = q_BLHK.shape[1], k_BM1K.shape[1], None
    if self.WINDOWS_OF_ENTRY:
      e_BW1K, scored, seen_BLW, cache = self._make_entries(
          x_BLD, query_input_BLU=query_input_BLU, ctx=ctx, cache=cache,
          reads_slots=reads_slots)
      k_BM1K = jnp.concatenate([k_BM1K, e_BW1K], 1)
      seen_BLM = _append_entries(seen_BLM, seen_BLW)
    k_BM1K = sharding.constrain(k_BM1K, 'batch', None, None, 'head')

    # The weighted sums of keys and entries. These are rotated by their own
    # positions, so the sums are rotated back by the query's: what is left
    # depends on distances alone.
    visible = kernels.VisibleKeys(kernels.Mask(), seen_BLM)
    with layers.count_flops_as_useful_part(
        self._count_pairs(L, M), L * k_BM1K.shape[1]):
      o_BLHK, report = self.weigh_values(
          q_BLHK, k_BM1K, k_BM1K, visible=visible, ctx=ctx, scored=scored)
    o_BLHK = rotate_last_features(o_BLHK, positions_BL=-ctx.positions_BL,
                                  config=config, length=ctx.length)
    return self._project_output_of_groups(o_BLHK, ctx), cache, report

  def _make_queries(self, x_BLD: jax.Array, ctx: Context
                    ) -> tuple[jax.Array, jax.Array]:
    """Makes the queries of attention by two products with a small vector
    between them:

      small = n(W_dq x),   q = R_l n(W_q small)

    where n is a norm and R_l the rotation by the position l (RoPE).

    The suffixes name axes: B batch, L length, D d_model, U features of the
    small vector (q_rank), H heads, K features of a head.

    Args:
      x_BLD: the layer's input.
      ctx: the context of the layer, which has the positions.

    Returns:
      The small vectors, [B, L, U], which an indexer makes its own queries of
      too; and the queries, [B, L, H, K].
    """
    # The small vector of each token, after its norm.
    config = self.config
    q_rank = config.part(CompressedConfig).q_rank
    down_BLU = self._dense('query_down', 'BLD,DU->BLU', x_BLD,
                           ('embed', None), ctx, q_rank)
    normalise_vector = layers.norm(config, 'query_norm', 'latent')
    query_input_BLU = normalise_vector(down_BLU)

    # The queries of all heads, each with a norm that has no parameters.
    q_BLHK = self._dense('query_up', 'BLU,UHK->BLHK', query_input_BLU,
                         ('latent', 'heads', 'head'), ctx, config.num_heads,
                         config.head_dim)
    q_BLHK = layers.PlainRMSNorm(config, name='head_norm')(q_BLHK)
    q_BLHK = rotate_last_features(
        q_BLHK, positions_BL=ctx.positions_BL, config=config, length=ctx.length)
    q_BLHK = sharding.constrain(q_BLHK, 'batch', 'length', 'heads', 'head')
    return query_input_BLU, q_BLHK

  def _make_keys(self, x_BLD: jax.Array, ctx: Context) -> jax.Array:
    """Returns the key of each token, [B, L, 1, K]."""
    config = self.config
    k_BLK = self._dense('key', 'BLD,DK->BLK', x_BLD, ('embed', 'head'), ctx,
                        config.head_dim)
    k_BLK = layers.norm(config, 'key_norm', 'head')(k_BLK)
    return rotate_last_features(k_BLK[:, :, None],
                                positions_BL=ctx.positions_BL, config=config,
                                length=ctx.length)

  def _dense(self, name: str, spec: str, x: jax.Array,
             axes: tuple[str | None, ...], ctx: Context, *outputs: int
             ) -> jax.Array:
    """Multiplies x by a weight without a bias. The weight is declared here, as
    a parameter of this layer.

    Args:
      name: the name of the weight, which is part of its path in checkpoints.
      spec: the einsum of the product, such as 'BLD,DK->BLK'.
      x: the input, whose last axis the product sums over.
      axes: the logical axes of the weight, by which it is split over devices.
      ctx: the context of the layer.
      *outputs: the sizes of the weight's axes after the first.

    Returns:
      The product, with the axes that `spec` names.
    """
    return layers.dense(self, name, spec=spec, x=x,
                        shape=(x.shape[-1], *outputs), axes=axes,
                        with_bias=False, deterministic=ctx.deterministic)

  def _project_output_of_groups(self, o_BLHK: jax.Array, ctx: Context
                                ) -> jax.Array:
    """Makes the layer's output of the results of its heads by two products:

      u_g = W_g o_g for each group g of heads,   y = W_o [u_1, u_2, ...]

    Each group has a first product W_g of its own, to out_rank features. The
    second product W_o is over the features of all groups. The two together have
    fewer weights than one product of all heads would have, as heads are large.

    The suffixes name axes: B batch, L length, H heads, K features of a head, G
    groups of heads, U features of u (out_rank), D d_model.

    Args:
      o_BLHK: the results of the heads. Neighbouring heads form a group.
      ctx: the context of the layer.

    Returns:
      y, [B, L, D].
    """
    config = self.config
    fields = config.part(CompressedConfig)
    B, L, H, K = o_BLHK.shape
    G = fields.out_groups
    heads_of_group = H // G

    # The first product. Groups are a batch axis of its weight.
    axes = 'heads', None, 'head', 'latent'
    w_GHKU = layers.weight(
        self, 'out_down', shape=(G, heads_of_group, K, fields.out_rank),
        axes=axes, in_axes=(1, 2), batch_axes=(0,))
    o_BLGHK = o_BLHK.reshape(B, L, G, heads_of_group, K)
    y_BLGU = layers.einsum('BLGHK,GHKU->BLGU', o_BLGHK, w_GHKU,
                           dtype=config.compute_dtype, axes=axes)
    y_BLGU = sharding.constrain(y_BLGU, 'batch', 'length', 'heads', None)

    # The second product, whose result is added to the residual stream.
    return layers.dense(self, 'out', 'BLGU,GUD->BLD', y_BLGU,
                        shape=(G, fields.out_rank, config.d_model),
                        axes=('heads', None, 'embed'), in_axes=(0, 1),
                        residual=True, with_bias=False,
                        deterministic=ctx.deterministic)

  def _make_entries(self, x_BLD: jax.Array, query_input_BLU: jax.Array,
                    ctx: Context, cache: Optional[Cache], reads_slots: bool):
    """Makes the entries, each of which stands for a window of tokens, and finds
    which of them each query sees.

    Args:
      x_BLD: the layer's input, [batch, length, d_model].
      query_input_BLU: the input of the queries' product, [batch, length, U].
      ctx: the context of the layer.
      cache: the layer's cache; None: there is none.
      reads_slots: whether queries meet all that the cache holds, and not the
        entries of these tokens alone.

    Returns:
      A tuple of four:
        the entries that queries meet, [B, W, 1, K];
        an indexer's scores of them; None in a layer without one;
        which of them each query sees, bool [B, L, W];
        the cache with the new ones; None: there is none.
    """
    config, L = self.config, x_BLD.shape[1]
    rate = tokens_of_window(config)
    windows = find_closed_windows(ctx, L, tokens_of_window=rate,
                                  tokens_of_entry=rate * self.WINDOWS_OF_ENTRY,
                                  cached=cache is not None)
    e_BW1K, new_inputs = compress_windows(
        config, windows_of_entry=self.WINDOWS_OF_ENTRY, name='entry',
        size=config.head_dim, x_BLD=x_BLD, windows=windows, ctx=ctx,
        cache=cache, reads_slots=reads_slots)

    # A query sees the entries whose windows have ended, in its document: both
    # are counted in places of the row, which with a cache are the positions.
    # All entries of a cache end at multiples of the window, one after another.
    q_BL, end_BW = jnp.arange(L)[None], windows.end_BW
    if cache is not None:
      q_BL = ctx.positions_BL
    if reads_slots:
      end_BW = jnp.arange(1, e_BW1K.shape[1] + 1)[None] * rate - 1
    seen_BLW = end_BW[:, None] <= q_BL[:, :, None]
    if ctx.segment_ids_BL is not None:
      start_BL = features.start_of_document(ctx.segment_ids_BL)
      seen_BLW &= end_BW[:, None] >= start_BL[:, :, None]

    # An indexer scores them by entries of its own.
    scored = None
    if config.mixer == 'csa':
      scored, index_inputs = self._score_entries(
          x_BLD, query_input_BLU=query_input_BLU, windows=windows, ctx=ctx,
          cache=cache, reads_slots=reads_slots)
      new_inputs |= index_inputs
    if cache is not None:
      cache = cache.replace(inputs=cache.inputs | new_inputs)
    return e_BW1K, scored, seen_BLW, cache

  def _score_entries(
      self, x_BLD: jax.Array, query_input_BLU: jax.Array, windows: Windows,
      ctx: Context, cache: Optional[Cache], reads_slots: bool
      ) -> tuple['ScoredEntries', dict[str, jax.Array]]:
    """Has the indexer score the entries, by entries of its own as its keys.

    The suffixes name axes: B batch, L length, D d_model, W entries, M tokens
    that the cache has room for, H heads of queries, J = 1 head of keys, K
    features of a head, U features of the queries' input.

    Args:
      x_BLD: the layer's input, [batch, length, d_model].
      query_input_BLU: the input of the indexer's queries, [batch, length, U].
      windows: the windows that the tokens close.
      ctx: the context of the layer.
      cache: the layer's cache; None: there is none.
      reads_slots: whether queries meet all that the cache holds.

    Returns:
      The scores, and what a cache keeps of the indexer's entries.
    """
    config, L = self.config, x_BLD.shape[1]
    new_inputs: dict[str, jax.Array] = {}

    def rotate_queries(q_BLHK: jax.Array, ctx: Context) -> jax.Array:
      """Returns the indexer's queries, rotated by their positions."""
      return rotate_last_features(q_BLHK, positions_BL=ctx.positions_BL,
                                  config=config, length=ctx.length,
                                  of_indexer=True)

    compress = functools.partial(
        compress_windows, config, windows_of_entry=self.WINDOWS_OF_ENTRY,
        name='index', size=config.part(IndexerConfig).head_dim, windows=windows,
        ctx=ctx, cache=cache, reads_slots=reads_slots)

    def make_keys(x_BLD: jax.Array) -> jax.Array:
      """Returns the indexer's keys, entries of its own. It is called inside of
      the indexer, which gets their parameters. The inputs that a cache keeps of
      them go into new_inputs, as the indexer has no place for them."""
      e_BW1K, inputs = compress(x_BLD=x_BLD)
      new_inputs.update(inputs)
      return e_BW1K

    # Scores are products with all entries, and count as those with the entries
    # that have ended before the query.
    index = indexer.Indexer(config, 'latent', name='indexer')(
        x_BLD, query_input_BLU, ctx, rotate_queries=rotate_queries,
        make_keys=make_keys)
    M = cache.num_slots if reads_slots else L
    num_entries = index.key_BMJK.shape[1]
    pairs = self._count_pairs(L, M, only_all_entries=True)
    with layers.count_flops_as_useful_part(pairs, L * num_entries):
      return ScoredEntries(indexer.indexer_scores(index)), new_inputs

  def _count_pairs(self, queries: int, keys: int,
                   only_all_entries: bool = False) -> int:
    """Counts the pairs of a query and something that it sees, in a row that is
    one document. The FLOPs of attention are reported by this number.

    A query sees the keys of the last few tokens, and entries: vectors that
    stand for a window of several earlier tokens each.

    Args:
      queries: how many queries there are. They belong to the last tokens.
      keys: how many keys there are, one for each token.
      only_all_entries: if true, only pairs with entries count, and with all of
        them that ended before the query. These are the pairs that an indexer
        scores before it chooses.

    Returns:
      The number of pairs.
    """
    # The keys that each query sees: those of the last `window` tokens. Query i
    # of the row has i + 1 tokens up to itself.
    config = self.config
    tokens_so_far_L = np.arange(keys - queries, keys) + 1
    num_keys_L = np.zeros_like(tokens_so_far_L)
    if not only_all_entries:
      window = config.part(CompressedConfig).window
      num_keys_L = np.minimum(tokens_so_far_L, window)
    if not self.WINDOWS_OF_ENTRY:
      return int(num_keys_L.sum())

    # The entries that each query sees: one for each window that has ended or,
    # where an indexer chooses among them, the top_k best. A top_k of 0 chooses
    # all.
    num_entries_L = tokens_so_far_L // tokens_of_window(config)
    if config.mixer == 'csa' and not only_all_entries:
      top_k = config.part(IndexerConfig).top_k
      if top_k:
        num_entries_L = np.minimum(num_entries_L, top_k)
    return int(num_keys_L.sum() + num_entries_L.sum())


def compress_windows(
    config: ModelConfig, windows_of_entry: int, name: str, size: int,
    x_BLD: jax.Array, windows: Windows, ctx: Context, cache: Optional[Cache],
    reads_slots: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Makes the entries of windows of tokens, and rotates them by the position of
  their first token.

  The parameters are declared in the module that calls: the layer's attention,
  or its indexer.

  The suffixes name axes: B batch, L length, D d_model, W windows, K features of
  an entry, M tokens of open windows, U values and scores of a token.

  Args:
    config: the config of the layer.
    windows_of_entry: of how many windows an entry is made.
    name: 'entry', or 'index' for those of an indexer; what they are called in a
      cache.
    size: K, the features of an entry.
    x_BLD: the input of the layer, [batch, length, d_model].
    windows: the windows that the tokens close.
    ctx: the context of the layer.
    cache: the layer's cache; None: there is none.
    reads_slots: whether queries meet all that the cache holds.

  Returns:
    The entries of these windows, or with `reads_slots` all that the cache has,
    [B, W, 1, K]; and what the cache keeps: {name: all entries, f'{name}_open':
    values and scores of the tokens of open windows}, or {} without a cache.
  """
  # The entries of these windows. The earlier tokens of a window that was open
  # come from the cache.
  previous_BMU = None if cache is None else cache.inputs[f'{name}_open']
  make_entries = Entries(config, rate=tokens_of_window(config), size=size,
                         windows_of_entry=windows_of_entry, name='entries')
  e_BWK, next_BMU = make_entries(x_BLD, windows, ctx, previous_BMU)
  e_BW1K = rotate_last_features(
      e_BWK[:, :, None], positions_BL=windows.first_position_BW, config=config,
      length=ctx.length, of_indexer=name == 'index')
  if cache is None:
    return e_BW1K, {}

  # The new entries are written into those of the cache, by their numbers. A
  # number past the cache's end is dropped. An entry whose window is still open
  # is written too; no query sees it, and it is written again when it closes.
  cached_BWK = cache.inputs[name]
  row_B1 = jnp.arange(len(cached_BWK))[:, None]
  new_BWK = e_BW1K[:, :, 0].astype(cached_BWK.dtype)
  cached_BWK = cached_BWK.at[row_B1, windows.number_BW].set(
      new_BWK, mode='drop')
  if reads_slots:
    e_BW1K = cached_BWK[:, :, None]
  return e_BW1K, {name: cached_BWK, f'{name}_open': next_BMU}


class HCA(SWA):
  """Attention to a window of keys and to all entries, of one window each."""
  WINDOWS_OF_ENTRY = 1


class CSA(SWA):
  """Attention to a window of keys and to the entries that an indexer chooses,
  of two windows each."""
  WINDOWS_OF_ENTRY = 2


def tokens_of_window(config: ModelConfig) -> int:
  """Returns how many tokens a window has, which an entry stands for."""
  fields = config.part(CompressedConfig)
  return fields.csa_rate if config.mixer == 'csa' else fields.hca_rate


def rotate_last_features(
    x_BLHK: jax.Array, positions_BL: jax.Array, config: ModelConfig,
    length: int | jax.Array, of_indexer: bool = False) -> jax.Array:
  """Rotates the last features of each head by positions (RoPE), and leaves the
  features before them as they are. Where the model's position encoding is not
  rotary, x is returned unchanged.

  The suffixes name axes: B batch, L length, H heads, K features of a head.

  Args:
    x_BLHK: queries, keys or results of heads.
    positions_BL: the positions. Negative positions rotate back.
    config: the config of the layer.
    length: the length of the sequence, by which some encodings scale.
    of_indexer: whether the features belong to an indexer (the small attention
      that chooses keys), which may pair features differently.

  Returns:
    The rotated x, [B, L, H, K].
  """
  rotate = positions.position_of(config).rotate
  if not rotate:
    return x_BLHK

  # A head of attention says how many features are rotated. They are rotated in
  # pairs: of neighbours (interleaved), or of one feature of each half.
  num_rotated = positions.rotary_dim(config)
  rope = config.part(RopeConfig)
  interleaved = rope.interleaved
  if of_indexer:
    interleaved = config.part(IndexerConfig).interleaved

  # `rotate` rotates the first features of a head. It is given the rotated
  # features alone and a config whose heads have only these. The fraction of
  # rotated features is then 1, unless it changes the angles too.
  fraction = 1.0
  if rope.proportional:
    fraction = rope.fraction
  config_of_rotated = dataclasses.replace(config, head_dim=num_rotated)
  config_of_rotated = config_of_rotated.with_part(
      RopeConfig, fraction=fraction, interleaved=interleaved)

  # Split the last features off, rotate them, and join them again.
  num_kept = x_BLHK.shape[-1] - num_rotated
  kept, before_rotation = jnp.split(x_BLHK, (num_kept,), axis=-1)
  rotated = rotate(before_rotation, positions_BL, config_of_rotated, length)
  return jnp.concatenate([kept, rotated], -1)


class Compressed(mixer.Mixer):
  """The entry of an attention to entries in the table of mixers."""
  positional = turns_heads = has_scores = True
  may_be_one = ('compressed.out_groups',)

  def __init__(self, module: type[SWA], *fields: str):
    """Initialises the entry.

    Args:
      module: its layer.
      *fields: the fields of config.model that it reads and SWA does not.
    """
    self.module = module
    self.fields = (
        'attention_scale', 'norm_eps', *mixer.FIELDS_OF_SCORES, *fields)

  def cache(self, config: ModelConfig, shape: tuple[int, ...]) -> Cache:
    """Returns an empty cache for a layer that compresses earlier tokens: each
    window of a few tokens becomes one vector, called an entry.

    Args:
      config: the config of the layer.
      shape: (..., rows, tokens): the rows of the batch, and for how many tokens
        of a row there is room.

    Returns:
      A cache of zeros, which holds:
        key_BMJK: the keys of all tokens. There is J = 1 head of keys, which all
          heads of queries share, and it has no values: keys are values too.
        inputs['entry']: the entries. inputs['index'] has those that are the
          keys of an indexer, the small attention that chooses entries.
        inputs['entry_open'], inputs['index_open']: the values and the scores of
          tokens whose window has not ended yet.
    """
    key_BMJK = jnp.zeros((*shape, 1, config.head_dim), config.compute_dtype)
    windows_of_entry = self.module.WINDOWS_OF_ENTRY
    if not windows_of_entry:
      return Cache(key_BMJK=key_BMJK)

    # How many features the entries of attention and of the indexer have.
    features_of_entry = {'entry': config.head_dim}
    if config.mixer == 'csa':
      features_of_entry['index'] = config.part(IndexerConfig).head_dim

    # Each window has an entry. An entry is made of the tokens of one or more
    # windows. Its last token completes it, so all tokens but one may wait.
    *rows, num_tokens = shape
    window_size = tokens_of_window(config)
    num_entries = max(1, num_tokens // window_size)
    num_waiting = window_size * windows_of_entry - 1
    inputs = {}
    for name, num_features in features_of_entry.items():
      # A waiting token has a value and a score for each entry that it enters.
      values_and_scores = 2 * windows_of_entry * num_features
      inputs[name] = jnp.zeros(
          (*rows, num_entries, num_features), config.compute_dtype)
      inputs[f'{name}_open'] = jnp.zeros(
          (*rows, num_waiting, values_and_scores), config.compute_dtype)
    return Cache(key_BMJK=key_BMJK, inputs=inputs)

  def keeps_state(self, config: ModelConfig) -> bool:
    return True  # an entry of several tokens, or a window, is read as a whole

  def fields_to_divide(self, config: ModelConfig) -> mixer.AxesAndFields:
    return (('tensor', 'num_heads'), ('fsdp', 'compressed.q_rank'),
            ('tensor', 'compressed.out_groups'))

  def check(self, config: ModelConfig, stack: str) -> None:
    """Checks that a model can have this attention, in which windows of earlier
    tokens are compressed to one vector each, called an entry.

    Args:
      config: the config of the model.
      stack: the kind of stack: 'encoder', 'decoder' or 'encoder-decoder'.

    Raises:
      RequestError: if the model is no decoder, sets another rule of which keys
        a query sees, is parametrised by muP, adds a bias by distances to the
        scores, or has sizes that do not fit each other.
    """
    # The model around the attention.
    fields = config.part(CompressedConfig)
    request = f'model.mixer is {config.mixer!r}'
    require(stack == 'decoder', f'{request}, whose entries are made of the '
            f'tokens before, and model.arch {config.arch!r} is no decoder: '
            'choose attention')
    require(config.attention == 'global', f'{request}, which says itself what '
            f'a query sees: set model.attention {config.attention!r} to global')
    require(config.parametrization != 'mup', f'{request}, for whose ranks '
            "model.parametrization 'mup' has no rule: choose standard")
    require(not positions.position_of(config).has_bias,
            f'{request}, which has no bias by distances as model.position '
            f'{config.position!r}: choose rope')
    require(config.num_heads % fields.out_groups == 0,
            'model.compressed.out_groups is '
            f'{fields.out_groups}, which does not divide model.num_heads '
            f'{config.num_heads}')

    # The indexer, which csa alone has.
    if config.mixer != 'csa':
      return
    sizes = config.part(IndexerConfig)
    require(not sizes.block, f'{request}, whose entries are chosen one by one: '
            'set model.indexer.block to 0')
    if positions.position_of(config).rotate:
      num_rotated = indexer.num_rotated_features(config)
      require(num_rotated <= sizes.head_dim, 'model.indexer.head_dim '
              f'is {sizes.head_dim}, and rotary positions turn {num_rotated} '
              'features of a head: choose as many or more')
