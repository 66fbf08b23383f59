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
from architectures.parts.attention import indexer
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context
from common.errors import RequestError, require

# The mask: which keys a query sees, and how many pairs it shows.

MOST = 2**15  # chunks of a document


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


def visible(kind: LayerKind, c: ModelConfig, q_positions_BL: jax.Array,
            k_positions_BM: jax.Array,
            q_segments_BL: Optional[jax.Array] = None,
            k_segments_BM: Optional[jax.Array] = None,
            prefix_B: Optional[jax.Array] = None) -> Optional[jax.Array]:
  """Returns which keys each query sees, bool [B or 1, L, M]; None: all.

  Args:
    kind: the layer.
    c: its config.
    q_positions_BL: where the queries stand.
    k_positions_BM: where the keys stand.
    q_segments_BL: the documents of the queries; None: there is one.
    k_segments_BM: the documents of the keys.
    prefix_B: how many tokens at the start of a row are seen by all.
  """
  rule, seen = RULES[kind.attention], []
  q_BL1, k_B1M = q_positions_BL[:, :, None], k_positions_BM[:, None]
  if kind.causal:
    before_BLM = k_B1M <= q_BL1
    if prefix_B is not None:
      before_BLM |= k_B1M < prefix_B[:, None, None]
    seen.append(before_BLM)
  if rule.window:
    seen.append(jnp.abs(q_BL1 - k_B1M) < rule.window(c))
  if rule.chunk:
    size = rule.chunk(c)
    seen.append(q_BL1 // size == k_B1M // size)
  if q_segments_BL is not None:
    seen.append(q_segments_BL[:, :, None] == k_segments_BM[:, None])
  if not seen:
    return None
  return functools.reduce(operator.and_, seen)


def parts(kind: LayerKind, c: ModelConfig, positions_BL: jax.Array,
          segments_BL: Optional[jax.Array]) -> Optional[jax.Array]:
  """Returns segment ids as a kernel takes them, in which the chunks of a
  document are documents."""
  rule = RULES[kind.attention]
  if not rule.chunk:
    return segments_BL
  chunk_BL = positions_BL // rule.chunk(c)
  if segments_BL is None:
    return chunk_BL
  return chunk_BL + MOST * segments_BL


def begins(kind: LayerKind, ctx: Context) -> bool:
  """Whether the tokens that a cache is given are at 0 ... L - 1 and see none
  after them: then they see each other alone, whatever it holds."""
  return kind.causal and ctx.in_order and not ctx.keep_attention


def _counts(kind: LayerKind, c: ModelConfig, queries: np.ndarray,
            keys: np.ndarray) -> np.ndarray:
  """Returns how many of the keys at these places each query sees."""
  rule, size = RULES[kind.attention], keys.size
  # A query sees the keys of its chunk, up to itself where the layer is causal.
  if rule.chunk:
    chunk = rule.chunk(c)
    first = queries - queries % chunk
    stop = queries + 1 if kind.causal else first + chunk
    return np.minimum(stop, size) - first
  # Or it sees those that are less than `reach` away.
  reach = rule.window(c) if rule.window else size
  after = 1 if kind.causal else reach
  first = np.maximum(queries - reach + 1, 0)
  seen = np.minimum(queries + after, size) - first
  return rule.top(c, seen) if rule.top else seen


def pairs(kind: LayerKind, c: ModelConfig, queries: int, keys: int) -> int:
  """Returns how many pairs of a query and a key the mask of self-attention
  shows; with fewer queries than keys, the queries are the last."""
  at = np.arange(keys)
  return int(_counts(kind, c, at[keys - queries:], at).sum())


def share(kind: LayerKind, c: ModelConfig, queries: int, keys: int,
          prefix: bool = False) -> tuple[int, int, int]:
  """Returns the pairs that `pairs` counts, all that there are, and those that
  are seen where the whole row is a prompt.

  Args:
    kind: the layer.
    c: its config.
    queries: how many queries there are: the last of the keys' tokens.
    keys: how many keys there are.
    prefix: whether the tokens of a row's prefix see each other. Then all three
      numbers are sums over prefixes of 1 to keys - 1 tokens, which are alike
      likely in training; but a prompt is a prefix of all of its tokens.
  """
  seen, whole = pairs(kind, c, queries, keys), queries * keys
  if not (prefix and kind.causal and queries == keys > 1):
    return seen, whole, seen
  prefixes, at_M = keys - 1, np.arange(keys)
  both_ways = dataclasses.replace(kind, causal=False)
  in_prompt = pairs(both_ways, c, queries, keys) * prefixes
  top = RULES[kind.attention].top
  if top:
    of_prefixes = _best_of_prefixes(kind, c, keys)
  else:
    # A query sees a later key in the prefixes that this key is part of. As many
    # see a key from before it as it sees before itself: masks are symmetric.
    earlier_M = _counts(kind, c, at_M, at_M) - 1
    later = (earlier_M * (prefixes - at_M)).sum()
    of_prefixes = seen * prefixes + int(later)
  return of_prefixes, whole * prefixes, in_prompt


def _best_of_prefixes(kind: LayerKind, c: ModelConfig, keys: int) -> int:
  """Returns the pairs of all prefixes under an indexer's rule: a query sees
  max(query + 1, prefix) keys, or the best of them."""
  top, at_M = RULES[kind.attention].top, np.arange(keys)
  best_M = top(c, at_M)
  # Prefixes that end with the query or before it.
  own_M = np.append(best_M[1:], _counts(kind, c, at_M[-1:], at_M))
  shorter = (own_M * np.minimum(at_M + 1, keys - 1)).sum()
  # Prefixes that go on after the query.
  after_M = best_M.sum() - best_M.cumsum()
  longer = np.append(after_M[1:], 0).sum()
  return int(shorter + longer)


def _needs(field: str, what: str) -> Callable[[ModelConfig, str], None]:
  """Returns Rule.check of a rule that needs the number of `what`."""
  def check(c: ModelConfig, stack: str) -> None:
    del stack
    require(getattr(c, field) > 0, f'model.attention has a {c.attention} layer,'
            f' but model.{field} is 0: set it to the number of {what}')
  return check


RULES = {
    'global': Rule(),
    'chunked': Rule(chunk=lambda c: c.attention_chunk,  # Llama 4
                    fields=('attention_chunk',), check=_needs(
                        'attention_chunk', 'tokens of a chunk')),
    'banded': Rule(window=lambda c: c.sliding_window,
                   fields=('sliding_window',), check=_needs(
                       'sliding_window', 'keys that such a layer sees')),
    'indexed': Rule(top=indexer.kept,
                    settings=indexer.IndexerConfig, check=indexer.check),
}


# Attention of plain products, for any mask: what XLA makes a program of.
#
# The gradient is written out: as FlashAttention's (Dao et al. 2022, appendix B)
# it works the scores [B, H, L, M] out again rather than keep them. Under a
# causal mask queries go part by part, and meet only the keys that one of them
# may see.

MASKED = -1e30  # finite, so that a row that sees nothing is no NaN
PARTS = 4  # of queries under a causal mask, which spare 3 of 8 scores; but
LEAST = 128  # a part has no fewer queries


class _How(NamedTuple):
  """The numbers by which scores are made of products, and weights of scores."""
  scale: float
  softcap: float
  dropout: float
  causal: bool
  window: int

  def blocks(self, L: int, M: int) -> Iterator[tuple[slice, slice]]:
    """Yields the parts of L queries, and the part of M keys that each meets."""
    if not self.causal:
      yield slice(0, L), slice(0, M)
      return
    count = max(1, min(PARTS, L // LEAST))
    for i in range(count):
      start, stop = i * L // count, (i + 1) * L // count
      first = max(0, start - self.window + 1) if self.window else 0
      yield slice(start, stop), slice(first, stop)


def attend(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array, *,
           scale: float, mask_BLM: Optional[jax.Array] = None,
           bias_BHLM: Optional[jax.Array] = None, softcap: float = 0.0,
           sink_H: Optional[jax.Array] = None, dropout: float = 0.0,
           key: Optional[jax.Array] = None, causal: bool = False,
           window: int = 0) -> jax.Array:
  """Returns o_l = sum over m of p_lm v_m, [B, L, H, K], where p are `weights`;
  the softmax is taken in float32.

  Args:
    q_BLHK: queries.
    k_BMJK: keys, each shared by H / J heads.
    v_BMJK: values, whose heads may have another size.
    scale: multiplies the products of queries and keys.
    mask_BLM: bool, which keys a query sees; None: all.
    bias_BHLM: added to the scores; it may be of more keys, which come after.
    softcap: the scores' bound, softcap * tanh(score / softcap); 0: none.
    sink_H: the score of a key with no value, which all see.
    dropout: the share of weights that is dropped, given a key; others grow.
    key: of random numbers.
    causal: whether the mask shows query l no key after the l-th.
    window: and, if given, none before the `window` last of those.
  """
  B, L, H, K = q_BLHK.shape
  M, J = k_BMJK.shape[1:3]
  chex.assert_shape([k_BMJK, v_BMJK], [(B, M, J, K), (B, M, J, None)])
  how = _How(scale=scale, softcap=softcap, dropout=dropout, causal=causal,
             window=window)
  q_BJRLK = _heads_first(q_BLHK).reshape(B, J, H // J, L, K)
  o_BJRLK = _attend(
      how, q_BJRLK, _heads_first(k_BMJK), _heads_first(v_BMJK),
      _of_groups(bias_BHLM, J), _sink(sink_H, J), mask_BLM, key)
  return _heads_first(o_BJRLK.reshape(B, H, L, -1))


def weights(q_BLHK: jax.Array, k_BMJK: jax.Array, *,
            mask_BLM: Optional[jax.Array] = None,
            bias_BHLM: Optional[jax.Array] = None,
            sink_H: Optional[jax.Array] = None, scale: float,
            softcap: float = 0.0, causal: bool = False, window: int = 0,
            mean: bool = False) -> jax.Array:
  """Returns the weights that `attend` gives the values for these arguments,

    p_lm = softmax over m of (scale q_l k_m + bias_lm),

  float32 [B, H, L, M], or with `mean` their mean over heads, [B, L, M]. A row
  sums to 1, less the share of the sink where there is one; weights that are
  hidden are 0.
  """
  B, L, H, K = q_BLHK.shape
  M, J = k_BMJK.shape[1:3]
  how = _How(scale=scale, softcap=softcap, dropout=0.0, causal=causal,
             window=window)
  q_BJRLK = _heads_first(q_BLHK).reshape(B, J, H // J, L, K)
  k_BJMK = _heads_first(k_BMJK)
  bias_BJRLM, sink_1JR11 = _of_groups(bias_BHLM, J), _sink(sink_H, J)
  parts = []
  for rows, keys in how.blocks(L, M):
    s_BJRLM = _scores(how, rows, keys, mask_BLM, q_BJRLK, k_BJMK, bias_BJRLM)
    if sink_1JR11 is not None:  # a key more, and no value
      sink_BJRL1 = jnp.broadcast_to(sink_1JR11, (*s_BJRLM.shape[:-1], 1))
      s_BJRLM = jnp.concatenate([s_BJRLM, sink_BJRL1], -1)
    p_BJRLM = jax.nn.softmax(s_BJRLM)[..., :keys.stop - keys.start]
    if mask_BLM is not None:
      p_BJRLM = jnp.where(mask_BLM[:, None, None, rows, keys], p_BJRLM, 0)
    if mean:
      p = p_BJRLM.mean((1, 2))
    else:
      p = p_BJRLM.reshape(B, H, *p_BJRLM.shape[3:])
    # The keys that these queries do not meet.
    unmet = (keys.start, M - keys.stop)
    parts.append(jnp.pad(p, (*[(0, 0)] * (p.ndim - 1), unmet)))
  return jnp.concatenate(parts, -2)


def _heads_first(x_BLHK: jax.Array) -> jax.Array:
  return jnp.swapaxes(x_BLHK, 1, 2)


def _of_groups(bias_BHLM: Optional[jax.Array], groups: int
               ) -> Optional[jax.Array]:
  """Returns a bias by the keys' heads, [B, J, R, L, M]."""
  if bias_BHLM is None:
    return None
  B, H, *rest = bias_BHLM.shape
  return bias_BHLM.reshape(-1, groups, H // groups, *rest)


def _sink(sink_H: Optional[jax.Array], groups: int) -> Optional[jax.Array]:
  """Returns the scores of the sinks in float32, [1, J, R, 1, 1]."""
  if sink_H is None:
    return None
  return sink_H.astype(jnp.float32).reshape(
      1, groups, len(sink_H) // groups, 1, 1)


def _scores(how: _How, rows: slice, keys: slice, mask_BLM: Optional[jax.Array],
            q_BJRLK: jax.Array, k_BJMK: jax.Array,
            bias_BJRLM: Optional[jax.Array]) -> jax.Array:
  """Returns scale q k + bias of the queries `rows` and the keys `keys`, MASKED
  where a key is hidden, float32."""
  q_BJRLK = layers.multiply_exactly(q_BJRLK[..., rows, :], how.scale)
  s_BJRLM = _times_keys(q_BJRLK, k_BJMK[..., keys, :])
  if how.softcap:
    s_BJRLM = how.softcap * jnp.tanh(s_BJRLM / how.softcap)
  if bias_BJRLM is not None:
    s_BJRLM = _plus(s_BJRLM, bias_BJRLM[..., rows, keys])
  if mask_BLM is not None:
    s_BJRLM = jnp.where(mask_BLM[:, None, None, rows, keys], s_BJRLM, MASKED)
  return s_BJRLM


def _plus(s_BJRLM: jax.Array, bias_BJRLM: jax.Array) -> jax.Array:
  if len(bias_BJRLM) == len(s_BJRLM) or not sharding.is_single_cpu():
    return s_BJRLM + bias_BJRLM
  return _plus_one(s_BJRLM, bias_BJRLM.astype(s_BJRLM.dtype))


@jax.custom_vjp
def _plus_one(s_BJRLM: jax.Array, bias_1JRLM: jax.Array) -> jax.Array:
  """A bias that all rows share. Its gradient, a sum over the rows, is a product
  with ones: jaxlib 0.10.2 takes 37 times as long for the sum."""
  return s_BJRLM + bias_1JRLM


def _plus_one_fwd(s_BJRLM: jax.Array, bias_1JRLM: jax.Array):
  return _plus_one(s_BJRLM, bias_1JRLM), None


def _plus_one_bwd(_, d_BJRLM: jax.Array):
  return d_BJRLM, layers.count_flops_by_result(_over_rows, 0)(d_BJRLM)


_plus_one.defvjp(_plus_one_fwd, _plus_one_bwd)


def _over_rows(d_BJRLM: jax.Array) -> jax.Array:
  """Returns the sum over the rows, as a product with ones."""
  B, *rest = d_BJRLM.shape
  sum_1I = jnp.ones((1, B)) @ d_BJRLM.reshape(B, -1)
  return sum_1I.reshape(1, *rest)


def _weigh(how: _How, rows: slice, keys: slice, key: Optional[jax.Array],
           p_BJRLM: jax.Array, v_BJMK: jax.Array) -> jax.Array:
  """Returns the sums over keys of p v, where dropout leaves a part of p."""
  if key is not None:
    part_key = jax.random.fold_in(key, rows.start)
    p_BJRLM = layers.apply_dropout(p_BJRLM, how.dropout, part_key)
  return _times_values(p_BJRLM, v_BJMK[..., keys, :])


# The two products, and their gradients, with axes in such orders that XLA's CPU
# backend transposes queries, keys and values for them, but no scores.


@jax.custom_vjp
def _times_keys(q_BJRLK: jax.Array, k_BJMK: jax.Array) -> jax.Array:
  """Returns q k, float32."""
  return layers.einsum('BJRLK,BJMK->BJRLM', q_BJRLK, k_BJMK, q_BJRLK.dtype,
                       jnp.float32)


def _times_keys_fwd(q_BJRLK: jax.Array, k_BJMK: jax.Array):
  return _times_keys(q_BJRLK, k_BJMK), (q_BJRLK, k_BJMK)


def _times_keys_bwd(saved: tuple, d_BJRLM: jax.Array):
  q_BJRLK, k_BJMK = saved
  d_q = layers.einsum('BJRLM,BJMK->BJRLK', d_BJRLM, k_BJMK, q_BJRLK.dtype)
  return d_q, _by_keys(q_BJRLK, d_BJRLM, k_BJMK.dtype)


def _by_keys(x_BJRLK: jax.Array, w_BJRLM: jax.Array,
             dtype: jax.typing.DTypeLike) -> jax.Array:
  """Returns the sums over queries and heads of w x, [B, J, M, K]."""
  y_BJKM = layers.einsum('BJRLK,BJRLM->BJKM', x_BJRLK, w_BJRLM, dtype)
  return jnp.swapaxes(y_BJKM, 2, 3)


@jax.custom_vjp
def _times_values(p_BJRLM: jax.Array, v_BJMK: jax.Array) -> jax.Array:
  """Returns p v, float32."""
  return layers.einsum('BJRLM,BJMK->BJRLK', p_BJRLM, v_BJMK, v_BJMK.dtype,
                       jnp.float32)


def _times_values_fwd(p_BJRLM: jax.Array, v_BJMK: jax.Array):
  return _times_values(p_BJRLM, v_BJMK), (p_BJRLM, v_BJMK)


def _times_values_bwd(saved: tuple, d_BJRLK: jax.Array):
  p_BJRLM, v_BJMK = saved
  d_p = layers.einsum('BJRLK,BJMK->BJRLM', d_BJRLK, v_BJMK, v_BJMK.dtype,
                      p_BJRLM.dtype)
  return d_p, _by_keys(d_BJRLK, p_BJRLM, v_BJMK.dtype)


_times_keys.defvjp(_times_keys_fwd, _times_keys_bwd)
_times_values.defvjp(_times_values_fwd, _times_values_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, *arrays: Optional[jax.Array]) -> jax.Array:
  """Returns o of `attend`, [B, J, R, L, K], by the arguments of _attend_fwd."""
  o_BJRLK, _ = _attend_fwd(how, *arrays)
  return o_BJRLK


def _attend_fwd(how: _How, q_BJRLK: jax.Array, k_BJMK: jax.Array,
                v_BJMK: jax.Array, bias_BJRLM: Optional[jax.Array],
                sink_1JR11: Optional[jax.Array], mask_BLM: Optional[jax.Array],
                key: Optional[jax.Array]):
  """Returns o, and what the gradient needs: of the softmax its largest score
  and its sum, and no scores."""
  outs, tops, sums = [], [], []
  for rows, keys in how.blocks(q_BJRLK.shape[3], k_BJMK.shape[2]):
    s_BJRLM = _scores(how, rows, keys, mask_BLM, q_BJRLK, k_BJMK, bias_BJRLM)
    # e / sum is the softmax; the sink has a share of the sum, and no value.
    top_BJRL1 = s_BJRLM.max(-1, keepdims=True)
    if sink_1JR11 is not None:
      top_BJRL1 = jnp.maximum(top_BJRL1, sink_1JR11)
    e_BJRLM = jnp.exp(s_BJRLM - top_BJRL1)
    sum_BJRL1 = e_BJRLM.sum(-1, keepdims=True)
    if sink_1JR11 is not None:
      sum_BJRL1 += jnp.exp(sink_1JR11 - top_BJRL1)
    o_BJRLK = _weigh(how, rows, keys, key, e_BJRLM, v_BJMK) / sum_BJRL1
    outs.append(o_BJRLK.astype(v_BJMK.dtype))
    tops.append(top_BJRL1)
    sums.append(sum_BJRL1)
  # Where remat keeps products, it keeps what the gradient needs of these.
  o_BJRLK, top_BJRL1, sum_BJRL1 = checkpoint_name(
      (jnp.concatenate(outs, 3), jnp.concatenate(tops, 3),
       jnp.concatenate(sums, 3)), layers.NAME_OF_PRODUCT)
  return o_BJRLK, (q_BJRLK, k_BJMK, v_BJMK, bias_BJRLM, sink_1JR11, mask_BLM,
                   key, top_BJRL1, sum_BJRL1)


def _attend_bwd(how: _How, saved: tuple, d_BJRLK: jax.Array):
  """Returns the gradients of the arguments of _attend_fwd, which are sums over
  the parts of the queries."""
  (q_BJRLK, k_BJMK, v_BJMK, bias_BJRLM, sink_1JR11, mask_BLM, key, top_BJRL1,
   sum_BJRL1) = saved
  d_BJRLK, blocks = d_BJRLK.astype(jnp.float32), []
  for rows, keys in how.blocks(q_BJRLK.shape[3], k_BJMK.shape[2]):
    # The weights p again, and the gradient of what they weigh.
    s_BJRLM, of_scores = jax.vjp(
        functools.partial(_scores, how, rows, keys, mask_BLM), q_BJRLK, k_BJMK,
        bias_BJRLM)
    top_BJRL1_, total_BJRL1 = top_BJRL1[..., rows, :], sum_BJRL1[..., rows, :]
    p_BJRLM = jnp.exp(s_BJRLM - top_BJRL1_) / total_BJRL1
    _, of_weighing = jax.vjp(
        functools.partial(_weigh, how, rows, keys, key), p_BJRLM, v_BJMK)
    dp_BJRLM, dv_BJMK = of_weighing(d_BJRLK[..., rows, :])
    # Through the softmax: ds = p dp - p sum(p dp). Not p (dp - mean), which
    # XLA's CPU backend joins with the product that gives dp: on one core that
    # takes twice as long.
    share_BJRLM = p_BJRLM * dp_BJRLM
    mean_BJRL1 = share_BJRLM.sum(-1, keepdims=True)
    ds_BJRLM = share_BJRLM - p_BJRLM * mean_BJRL1
    d_sink = None
    if sink_1JR11 is not None:
      p_BJRL1 = jnp.exp(sink_1JR11 - top_BJRL1_) / total_BJRL1
      d_sink = -(p_BJRL1 * mean_BJRL1).sum((0, 3), keepdims=True)
    blocks.append((*of_scores(ds_BJRLM), dv_BJMK, d_sink))
  d_q, d_k, d_bias, d_v, d_sink = jax.tree.map(_sum_of_parts, *blocks)
  return d_q, d_k, d_v, d_bias, d_sink, None, None


def _sum_of_parts(*parts: jax.Array) -> jax.Array:
  return sum(parts)


_attend.defvjp(_attend_fwd, _attend_bwd)


# Fused kernels, which never write the scores [B, H, L, M] to memory.
#
# xla     `attend`, as the compiler makes of it; anywhere, any mask
# splash  Pallas' splash attention on TPU: skips the blocks that a mask hides
# cudnn   cuDNN's flash attention on GPU (Dao et al. 2022)
#
# `auto` takes splash on TPU and cudnn on GPU where they compute the same
# function, and xla elsewhere. The platform is that of the mesh, so that a
# program compiled ahead of time for a TPU has the TPU's kernel. One that is
# asked for by name and cannot do it is refused.

TILE = 128  # lanes of a TPU: the lengths that splash takes are multiples
BLOCKS = (512, 256, 128)  # of queries, and of keys, by what divides


@struct.dataclass
class Mask:
  """Which keys a query sees, in a kernel's terms.

  Attributes:
    q_ids_BL: with k_ids_BM, segment ids: a query sees its own alone.
    k_ids_BM: those of the keys.
    causal: a query sees no later key, by their places in the array.
    window: a query sees keys less than this away; 0: any.
    rule: whether an indexer hides keys besides.
    in_order: whether places in the array are the tokens' order.
    prefix: whether keys at the start are seen by all.
    bias: whether the scores have a bias.
    dropout: whether weights are dropped.
  """
  q_ids_BL: Optional[jax.Array] = None
  k_ids_BM: Optional[jax.Array] = None
  causal: bool = struct.field(pytree_node=False, default=False)
  window: int = struct.field(pytree_node=False, default=0)
  rule: bool = struct.field(pytree_node=False, default=False)
  in_order: bool = struct.field(pytree_node=False, default=True)
  prefix: bool = struct.field(pytree_node=False, default=False)
  bias: bool = struct.field(pytree_node=False, default=False)
  dropout: bool = struct.field(pytree_node=False, default=False)

  def in_parts(self, queries: int) -> bool:
    """Whether so many queries, of which later ones see more, may meet their
    keys part by part: as `causal` of `attend`."""
    if not self.causal or not self.in_order or self.prefix:
      return False
    return sharding.count_shards('length', queries) == 1


class Seen(NamedTuple):
  """Which keys queries see, and what is added to their scores.

  Attributes:
    mask: the keys in a kernel's terms.
    seen_BLM: the keys written out, bool; None: all.
    bias_BHLM: added to the scores; None: nothing is.
  """
  mask: Mask
  seen_BLM: Optional[jax.Array] = None
  bias_BHLM: Optional[jax.Array] = None


def seen(kind: LayerKind, c: ModelConfig, ctx: Context,
         k_positions_BM: jax.Array) -> Seen:
  """Returns which of the keys at these positions the tokens of a row see, with
  the bias on the scores that all layers of a stack have, if there is one."""
  rule, ids_BL = RULES[kind.attention], ctx.segment_ids_BL
  seen_BLM = visible(kind, c, ctx.positions_BL, k_positions_BM, ids_BL, ids_BL,
                     ctx.prefix_B)
  # A layer may have another encoding than the stack, without its bias.
  bias_BHLM = None
  if positions.position_of(c).stack_bias:
    bias_BHLM = ctx.distances.bias_BHLM
  ids_BL = parts(kind, c, ctx.positions_BL, ids_BL)
  mask = Mask(
      q_ids_BL=ids_BL, k_ids_BM=ids_BL, causal=kind.causal,
      in_order=ctx.in_order, window=rule.window(c) if rule.window else 0,
      prefix=kind.causal and ctx.prefix_B is not None,
      bias=bias_BHLM is not None)
  return Seen(mask, seen_BLM, bias_BHLM)


class Kernel(NamedTuple):
  """A fused kernel.

  Attributes:
    platform: that it runs on.
    refuse: (config, mask, queries, keys) -> why it cannot compute this, as
      'which ...'; '': it can.
    run: (q_BLHK, k_BMJK, v_BMJK, mask, seen_BLM, scale, softcap, sink_H) ->
      [B, L, H, K], with the last five as of attend.
  """
  platform: str
  refuse: Callable[[ModelConfig, Mask, int, int], str]
  run: Callable[..., jax.Array]


def choose(c: ModelConfig, mask: Mask, q_length: int, k_length: int, *,
           strict: bool = True) -> str:
  """Returns xla, splash or cudnn.

  Raises:
    ValueError: where config.attention_kernel names one that cannot do it, and
      `strict` asks for no other.
  """
  name, device = c.attention_kernel, sharding.traced_platform()
  names = KERNELS if name == 'auto' else [name]
  for kernel in names:
    why = refusal(kernel, c, mask, q_length, k_length, device)
    if not why:
      return kernel
    if strict and name != 'auto':
      _require(name, why)
  return 'xla'


def check_kernel(c: ModelConfig, device: str) -> None:
  """Raises ValueError where a named kernel does not run on the platform."""
  _require(c.attention_kernel, _elsewhere(c.attention_kernel, device))


def _require(name: str, why: str) -> None:
  """Raises RequestError where there is a reason why not."""
  if why:
    others = [x for x in ('auto', 'xla', *KERNELS) if x != name]
    raise RequestError(f'model.attention_kernel is {name}, {why}: choose from '
                       f'{", ".join(others)}')


def _elsewhere(name: str, device: str) -> str:
  """Returns why a kernel does not run on the device; '': it does."""
  home = KERNELS[name].platform if name in KERNELS else device
  if home == device:
    return ''
  return f'which runs on {home}, and this program is for {device}'


def refusal(name: str, c: ModelConfig, mask: Mask, q_length: int,
            k_length: int, device: str) -> str:
  """Returns why the kernel cannot compute this; '': it can."""
  if name == 'xla':
    return ''
  if mask.bias or mask.dropout:
    return ('which adds no bias to the scores and drops no weights, as '
            f'model.position {c.position} and model.attention_dropout '
            f'{c.attention_dropout} do')
  attention = c.find(AttentionConfig)
  if attention is not None and attention.attention_difference:
    return 'which takes no values of two heads (model.attention_difference)'
  why = _elsewhere(name, device)
  return why or KERNELS[name].refuse(c, mask, q_length, k_length)


def _refuse_splash(c: ModelConfig, mask: Mask, q_length: int, k_length: int
                   ) -> str:
  shards = sharding.count_shards('length', q_length)
  by_places = mask.causal or mask.window > 0
  if mask.prefix or mask.rule or by_places and not mask.in_order:
    return ('which has masks neither for a prefix that all tokens see, nor for '
            'positions without segment ids, nor for rules of attention but '
            'windows')
  is_padded = mask.causal and shards == 1 and q_length == k_length > TILE
  whole = q_length % (TILE * shards) == 0 and k_length % TILE == 0
  if whole or is_padded:
    return ''
  return (f'which takes lengths in multiples of {TILE * shards}, and '
          f'{q_length} queries meet {k_length} keys')


def _whole(L: int) -> int:
  """Returns the length that so many tokens under a causal mask are padded to:
  tiles, or whole blocks that are an eighth of it at most."""
  if L % TILE == 0:
    return L
  block = next(b for b in BLOCKS if b <= max(TILE, L // 8))
  return -(-L // block) * block


def _refuse_cudnn(c: ModelConfig, mask: Mask, q_length: int, k_length: int
                  ) -> str:
  if c.compute_dtype != jnp.bfloat16:
    return f'which computes in bfloat16, and model.dtype is {c.dtype}'
  if c.attention_softcap or c.attention_sinks:
    return 'which has neither model.attention_softcap nor attention_sinks'
  if c.head_dim % 8 or c.head_dim > 128:
    return ('which takes heads of a multiple of 8 features up to 128, and '
            f'model.head_dim is {c.head_dim}')
  if q_length % 2 or k_length % 2:
    return (f'which takes even lengths, and {q_length} queries meet '
            f'{k_length} keys')
  if not _cudnn_is_here():
    return 'whose library must be there to compile for it, and it is not'
  return ''


def _cudnn_is_here() -> bool:
  return (jax.default_backend() == 'gpu'
          and 'cuda' in jax.devices()[0].client.platform_version)


class _Places:
  """How queries and keys lie on the mesh: rows and heads of both are split,
  the length of the queries alone.

  Attributes:
    rows: the mesh axes of the rows.
    length: those of the queries' length.
    heads: those of the heads.
    queries: where queries lie.
    keys: where keys and values lie.
  """

  def __init__(self, q_BLHK: jax.Array, k_BMJK: jax.Array):
    B, L, H, _ = q_BLHK.shape
    self.rows = self._axes('batch', B)
    self.length = self._axes('length', L)
    self.heads = ()
    if self._axes('kv_heads', k_BMJK.shape[2]):
      self.heads = self._axes('heads', H)
    self.queries = self.spec(self.rows, self.length, self.heads)
    self.keys = self.spec(self.rows, (), self.heads)

  def _axes(self, axis: str, size: int) -> tuple[str, ...]:
    """Returns the mesh axes over which an axis of this size is split."""
    if sharding.count_shards(axis, size) == 1:
      return ()
    return sharding.mesh_axes(axis)

  def spec(self, *names: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*(n or None for n in names))

  def map(self, local: Callable[..., jax.Array],
          in_specs: tuple[Optional[PartitionSpec], ...]
          ) -> Callable[..., jax.Array]:
    """Returns `local`, applied on each device to its share."""
    if not self.rows + self.length + self.heads:
      return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=self.queries,
                         check_vma=False)


def splash(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array, mask: Mask,
           *, scale: float, softcap: float = 0.0,
           sink_H: Optional[jax.Array] = None, interpret: bool = False
           ) -> jax.Array:
  """Returns what `attend` does, by Pallas' splash attention; `interpret`: on
  CPU."""
  B, L, H, _ = q_BLHK.shape
  M, at = k_BMJK.shape[1], _Places(q_BLHK, k_BMJK)
  if _whole(L) > L:
    return _padded_splash(q_BLHK, k_BMJK, v_BMJK, mask, scale=scale,
                          softcap=softcap, sink_H=sink_H, interpret=interpret)
  # A mask that differs from query to query is cut up with them.
  cut = at.length if mask.causal or mask.window else ()
  queries = L if cut else L // sharding.count_devices_along(at.length)
  kernel = _splash_kernel(
      mask, heads=H // sharding.count_devices_along(at.heads), L=queries, M=M,
      shards=sharding.count_devices_along(cut), softcap=softcap,
      interpret=interpret)
  q_ids_BL, k_ids_BM = mask.q_ids_BL, mask.k_ids_BM
  if q_ids_BL is not None:
    q_ids_BL = jnp.broadcast_to(q_ids_BL, (B, L))
    k_ids_BM = jnp.broadcast_to(k_ids_BM, (B, M))

  def local(kernel: Any, q_BLHK: jax.Array, k_BMJK: jax.Array,
            v_BMJK: jax.Array, q_ids_BL: Optional[jax.Array],
            k_ids_BM: Optional[jax.Array], sink_H: Optional[jax.Array]):
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas
    ids = None
    if q_ids_BL is not None:
      ids = pallas.SegmentIds(q_ids_BL, k_ids_BM)
    q_BHLK = _heads_first(layers.multiply_exactly(q_BLHK, scale))
    o_BHLK = _by_splash(kernel, ids, q_BHLK, _heads_first(k_BMJK),
                        _heads_first(v_BMJK), sink_H)
    return _heads_first(o_BHLK)

  # Each device computes its rows and heads.
  mesh, of_kernel = jax.sharding.get_abstract_mesh(), None
  if not mesh.empty:
    of_kernel = kernel.manual_sharding_spec(
        NamedSharding(mesh, at.spec((), cut)))
  on_each_device = at.map(local, (
      of_kernel, at.queries, at.keys, at.keys, at.spec(at.rows, at.length),
      at.spec(at.rows), at.spec(at.heads)))
  return on_each_device(kernel, q_BLHK, k_BMJK, v_BMJK, q_ids_BL, k_ids_BM,
                        sink_H)


def _padded_splash(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
                   mask: Mask, **how: Any) -> jax.Array:
  """Returns what `splash` does, of tokens that are padded to whole blocks. The
  mask, which is causal, hides the padding from the tokens."""
  L = q_BLHK.shape[1]
  more = _whole(L) - L

  def pad(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))

  if mask.q_ids_BL is not None:
    mask = mask.replace(q_ids_BL=pad(mask.q_ids_BL),
                        k_ids_BM=pad(mask.k_ids_BM))
  o_BLHK = splash(pad(q_BLHK), pad(k_BMJK), pad(v_BMJK), mask, **how)
  return o_BLHK[:, :L]


@jax.custom_vjp
def _by_splash(kernel: Any, ids: Any, q_BHLK: jax.Array, k_BJMK: jax.Array,
               v_BJMK: jax.Array, sink_H: Optional[jax.Array]) -> jax.Array:
  """The kernel, of each row.

  It writes the sums of a row's scores 128 times, [B, H, L, 128] in float32, and
  its gradient reads them once. Left to itself, XLA takes the one of 128 where
  the gradient needs it, and keeps all of them until then.
  """
  return jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(
      q_BHLK, k_BJMK, v_BJMK, ids, sink_H)


def _by_splash_fwd(kernel: Any, ids: Any, *arrays: Optional[jax.Array]):
  def of_rows(q_BHLK: jax.Array, k_BJMK: jax.Array, v_BJMK: jax.Array,
              sink_H: Optional[jax.Array]) -> jax.Array:
    return jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(
        q_BHLK, k_BJMK, v_BJMK, ids, sink_H)

  return jax.lax.optimization_barrier(jax.vjp(of_rows, *arrays))


def _by_splash_bwd(pull: Any, d_BHLK: jax.Array):
  return None, None, *pull(d_BHLK)


_by_splash.defvjp(_by_splash_fwd, _by_splash_bwd)


def _splash_kernel(mask: Mask, heads: int, L: int, M: int, shards: int,
                   softcap: float, interpret: bool):
  """The kernel for `heads` heads; its mask is laid out for `shards` of L."""
  from jax.experimental.pallas.ops.tpu import splash_attention as pallas
  if mask.window:
    side = mask.window - 1
    seen = pallas.LocalMask((L, M), (side, 0 if mask.causal else side), 0)
  elif mask.causal:
    seen = pallas.CausalMask((L, M))
  else:
    seen = pallas.FullMask((L, M))
  q = next(b for b in BLOCKS if L // shards % b == 0)
  k = next(b for b in BLOCKS if M % b == 0)
  return pallas.make_splash_mha(
      pallas.MultiHeadMask([seen] * heads), head_shards=1, q_seq_shards=shards,
      block_sizes=pallas.BlockSizes(
          block_q=q, block_kv=k, block_kv_compute=k, block_q_dkv=q,
          block_kv_dkv=k, block_kv_dkv_compute=k, block_q_dq=q, block_kv_dq=k),
      attn_logits_soft_cap=softcap or None, interpret=interpret,
      # Where remat keeps products, it keeps what the gradient needs of these.
      residual_checkpoint_name=layers.NAME_OF_PRODUCT)


def cudnn(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
          mask: Mask, seen_BLM: Optional[jax.Array], *,
          scale: float) -> jax.Array:
  """Returns what `attend` does, by cuDNN, in bfloat16; `seen_BLM`: the mask,
  written out, for what is not a causal, banded or whole one of cuDNN's own."""
  (B, L), M, at = q_BLHK.shape[:2], k_BMJK.shape[1], _Places(q_BLHK, k_BMJK)
  by_places = mask.in_order and not mask.prefix and not mask.rule
  whole = mask.q_ids_BL is None and not at.length
  native = by_places and whole and (mask.causal or not mask.window)
  window = None
  if native:
    seen_BLM = None
    if mask.window:
      window = (mask.window - 1, 0)
  elif seen_BLM is not None:
    seen_BLM = jnp.broadcast_to(seen_BLM, (B, L, M))

  def local(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
            seen_BLM: Optional[jax.Array]):
    return jax.nn.dot_product_attention(
        q_BLHK, k_BMJK, v_BMJK, scale=scale, implementation='cudnn',
        mask=None if seen_BLM is None else seen_BLM[:, None],
        is_causal=native and mask.causal, local_window_size=window)

  on_each_device = at.map(
      local, (at.queries, at.keys, at.keys, at.spec(at.rows, at.length)))
  return on_each_device(q_BLHK, k_BMJK, v_BMJK, seen_BLM)


def _run_splash(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
                mask: Mask, seen_BLM: Optional[jax.Array], **how: Any
                ) -> jax.Array:
  """Runs `splash`, which makes its mask itself."""
  del seen_BLM
  return splash(q_BLHK, k_BMJK, v_BMJK, mask, **how)


def _run_cudnn(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
               mask: Mask, seen_BLM: Optional[jax.Array], *, scale: float,
               softcap: float, sink_H: Optional[jax.Array]) -> jax.Array:
  """Runs `cudnn`, which refuses softcaps and sinks."""
  del softcap, sink_H
  return cudnn(q_BLHK, k_BMJK, v_BMJK, mask, seen_BLM, scale=scale)


KERNELS = {
    'splash': Kernel(platform='tpu', refuse=_refuse_splash, run=_run_splash),
    'cudnn': Kernel(platform='gpu', refuse=_refuse_cudnn, run=_run_cudnn),
}
