"""Attention of plain products, for any mask: what XLA makes a program of.

The gradient is written out: as FlashAttention's (Dao et al. 2022, appendix B)
it works the scores [B, H, L, M] out again rather than keep them. Under a causal
mask queries go block by block, and meet only the keys that one of them may see.
"""

import functools
from typing import Any, NamedTuple, Optional

import chex
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts import sharding
from architectures.parts.layers import drop

MASKED = -1e30  # finite, so that a row that sees nothing is no NaN
BLOCKS = 4  # of queries under a causal mask, which spare 3 of 8 scores; but
QUERIES = 128  # a block has no fewer


class _How(NamedTuple):
  scale: float
  softcap: float
  dropout: float
  causal: bool
  window: int

  def blocks(self, L: int, M: int):
    """Yields (queries, the keys that they meet), as slices."""
    count = max(1, min(BLOCKS, L // QUERIES)) if self.causal else 1
    for i in range(count):
      start, stop = i * L // count, (i + 1) * L // count
      first, last = 0, stop if self.causal else M
      if self.causal and self.window:
        first = max(0, start - self.window + 1)
      yield slice(start, stop), slice(first, last)


def attend(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array, *,
           scale: float, mask_BLM: Optional[jax.Array] = None,
           bias_BHLM: Optional[jax.Array] = None, softcap: float = 0.0,
           sink_H: Optional[jax.Array] = None, dropout: float = 0.0,
           key: Optional[jax.Array] = None, causal: bool = False,
           window: int = 0) -> jax.Array:
  """Weighted values [B, L, H, K]; the softmax is taken in float32.

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
  if bias_BHLM is not None:
    bias_BHLM = bias_BHLM.reshape(-1, J, H // J, *bias_BHLM.shape[2:])
  if sink_H is not None:
    sink_H = sink_H.astype(jnp.float32).reshape(1, J, H // J, 1, 1)
  o_BJRLK = _attend(
      _How(scale, softcap, dropout, causal, window),
      _heads_first(q_BLHK).reshape(B, J, H // J, L, K), _heads_first(k_BMJK),
      _heads_first(v_BMJK), bias_BHLM, sink_H, mask_BLM, key)
  return _heads_first(o_BJRLK.reshape(B, H, L, -1))


def _heads_first(x_BLHK: jax.Array) -> jax.Array:
  return jnp.swapaxes(x_BLHK, 1, 2)


def weights(q_BLHK: jax.Array, k_BMJK: jax.Array, *,
            mask_BLM: Optional[jax.Array] = None, **how: Any) -> jax.Array:
  """Returns what `attend` weighs the values with, float32 [B, H, L, M]: what it
  makes of values that are unit vectors.

  A row sums to 1, less the share of the sink where there is one; weights that
  are hidden are 0. The arguments are those of `attend`.
  """
  B, M, J, _ = k_BMJK.shape
  unit_BMJM = jnp.broadcast_to(jnp.eye(M)[None, :, None], (B, M, J, M))
  w_BHLM = _heads_first(attend(q_BLHK, k_BMJK, unit_BMJM, mask_BLM=mask_BLM,
                               **how))
  return w_BHLM if mask_BLM is None else jnp.where(mask_BLM[:, None], w_BHLM, 0)


def _scores(how: _How, rows: slice, keys: slice, mask_BLM: Optional[jax.Array],
            q_BJRLK: jax.Array, k_BJMK: jax.Array,
            bias_BJRLM: Optional[jax.Array]):
  s_BJRLM = _times_keys(layers.times(q_BJRLK[..., rows, :], how.scale),
                        k_BJMK[..., keys, :])
  if how.softcap:
    s_BJRLM = how.softcap * jnp.tanh(s_BJRLM / how.softcap)
  if bias_BJRLM is not None:
    s_BJRLM = _plus(s_BJRLM, bias_BJRLM[..., rows, keys])
  if mask_BLM is not None:
    s_BJRLM = jnp.where(mask_BLM[:, None, None, rows, keys], s_BJRLM, MASKED)
  return s_BJRLM


def _plus(s_BJRLM: jax.Array, bias_BJRLM: jax.Array) -> jax.Array:
  if len(bias_BJRLM) == len(s_BJRLM) or not sharding.one_cpu():
    return s_BJRLM + bias_BJRLM
  return _plus_one(s_BJRLM, bias_BJRLM.astype(s_BJRLM.dtype))


@jax.custom_vjp
def _plus_one(s_BJRLM: jax.Array, bias_1JRLM: jax.Array) -> jax.Array:
  """A bias that all rows share. Its gradient, a sum over the rows, is a product
  with ones: jaxlib 0.10.2 takes 37 times as long for the sum."""
  return s_BJRLM + bias_1JRLM


_plus_one.defvjp(
    lambda s_BJRLM, bias_1JRLM: (_plus_one(s_BJRLM, bias_1JRLM), None),
    lambda _, d_BJRLM: (d_BJRLM, layers.counted(_over_rows, 0)(d_BJRLM)))


def _over_rows(d_BJRLM: jax.Array) -> jax.Array:
  B, *rest = d_BJRLM.shape
  return (jnp.ones((1, B)) @ d_BJRLM.reshape(B, -1)).reshape(1, *rest)


def _weigh(how: _How, rows: slice, keys: slice, key: Optional[jax.Array],
           p_BJRLM: jax.Array, v_BJMK: jax.Array):
  if key is not None:
    p_BJRLM = drop(p_BJRLM, how.dropout, jax.random.fold_in(key, rows.start))
  return _times_values(p_BJRLM, v_BJMK[..., keys, :])


# The two products, and their gradients, with axes in such orders that XLA's CPU
# backend transposes queries, keys and values for them, but no scores.


@jax.custom_vjp
def _times_keys(q_BJRLK: jax.Array, k_BJMK: jax.Array) -> jax.Array:
  return layers.einsum('BJRLK,BJMK->BJRLM', q_BJRLK, k_BJMK, q_BJRLK.dtype,
                       jnp.float32)


def _times_keys_bwd(saved: tuple, d_BJRLM: jax.Array):
  q_BJRLK, k_BJMK = saved
  return (layers.einsum('BJRLM,BJMK->BJRLK', d_BJRLM, k_BJMK, q_BJRLK.dtype),
          _by_keys(q_BJRLK, d_BJRLM, k_BJMK.dtype))


def _by_keys(x_BJRLK: jax.Array, w_BJRLM: jax.Array, dtype: Any) -> jax.Array:
  return jnp.swapaxes(
      layers.einsum('BJRLK,BJRLM->BJKM', x_BJRLK, w_BJRLM, dtype), 2, 3)


@jax.custom_vjp
def _times_values(p_BJRLM: jax.Array, v_BJMK: jax.Array) -> jax.Array:
  return layers.einsum('BJRLM,BJMK->BJRLK', p_BJRLM, v_BJMK, v_BJMK.dtype,
                       jnp.float32)


def _times_values_bwd(saved: tuple, d_BJRLK: jax.Array):
  p_BJRLM, v_BJMK = saved
  return (layers.einsum('BJRLK,BJMK->BJRLM', d_BJRLK, v_BJMK, v_BJMK.dtype,
                        p_BJRLM.dtype),
          _by_keys(d_BJRLK, p_BJRLM, v_BJMK.dtype))


_times_keys.defvjp(lambda q, k: (_times_keys(q, k), (q, k)), _times_keys_bwd)
_times_values.defvjp(lambda p, v: (_times_values(p, v), (p, v)),
                     _times_values_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, q_BJRLK: jax.Array, k_BJMK: jax.Array, v_BJMK: jax.Array,
            bias_BJRLM: Optional[jax.Array], sink_1JR11: Optional[jax.Array],
            mask_BLM: Optional[jax.Array], key: Optional[jax.Array]):
  return _attend_fwd(how, q_BJRLK, k_BJMK, v_BJMK, bias_BJRLM, sink_1JR11,
                     mask_BLM, key)[0]


def _attend_fwd(how: _How, q_BJRLK: jax.Array, k_BJMK: jax.Array,
                v_BJMK: jax.Array, bias_BJRLM: Optional[jax.Array],
                sink_1JR11: Optional[jax.Array], mask_BLM: Optional[jax.Array],
                key: Optional[jax.Array]):
  outs, tops, sums = [], [], []
  for rows, keys in how.blocks(q_BJRLK.shape[3], k_BJMK.shape[2]):
    s_BJRLM = _scores(how, rows, keys, mask_BLM, q_BJRLK, k_BJMK, bias_BJRLM)
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
       jnp.concatenate(sums, 3)), layers.PRODUCT)
  return o_BJRLK, (q_BJRLK, k_BJMK, v_BJMK, bias_BJRLM, sink_1JR11, mask_BLM,
                   key, top_BJRL1, sum_BJRL1)


def _attend_bwd(how: _How, saved: tuple, d_BJRLK: jax.Array):
  (q_BJRLK, k_BJMK, v_BJMK, bias_BJRLM, sink_1JR11, mask_BLM, key, top_BJRL1,
   sum_BJRL1) = saved
  d_BJRLK, blocks = d_BJRLK.astype(jnp.float32), []
  for rows, keys in how.blocks(q_BJRLK.shape[3], k_BJMK.shape[2]):
    s_BJRLM, of_scores = jax.vjp(
        functools.partial(_scores, how, rows, keys, mask_BLM), q_BJRLK, k_BJMK,
        bias_BJRLM)
    top, total = top_BJRL1[..., rows, :], sum_BJRL1[..., rows, :]
    p_BJRLM = jnp.exp(s_BJRLM - top) / total
    _, of_weighing = jax.vjp(
        functools.partial(_weigh, how, rows, keys, key), p_BJRLM, v_BJMK)
    dp_BJRLM, dv_BJMK = of_weighing(d_BJRLK[..., rows, :])
    # Not p (dp - mean), which XLA's CPU backend joins with the product that
    # gives dp: on one core that takes twice as long.
    share_BJRLM = p_BJRLM * dp_BJRLM
    mean_BJRL1 = share_BJRLM.sum(-1, keepdims=True)
    ds_BJRLM = share_BJRLM - p_BJRLM * mean_BJRL1
    d_sink = None
    if sink_1JR11 is not None:
      p_BJRL1 = jnp.exp(sink_1JR11 - top) / total
      d_sink = -(p_BJRL1 * mean_BJRL1).sum((0, 3), keepdims=True)
    blocks.append((*of_scores(ds_BJRLM), dv_BJMK, d_sink))
  d_q, d_k, d_bias, d_v, d_sink = jax.tree.map(
      lambda *parts: sum(parts), *blocks)
  return d_q, d_k, d_v, d_bias, d_sink, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
