"""A short causal convolution of each feature by itself, along a row.

  y_l = b + sum over i < W of w_i x_(l - W + 1 + i)

The last weight is the token's own. Tokens of other documents count as zero, as
do those before the row, unless a cache has them (W - 1 tokens of a row).
"""

from collections.abc import Callable
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import linear
from architectures.parts.roles import Role, declare


def weight(module: nn.Module, name: str, shape: tuple[int, ...],
           axes: tuple[str | None, ...]) -> jax.Array:
  """Declares the weights of a convolution, [W, heads, features]. Each feature
  has a filter of its own, so that no axis of it is summed over by a product:
  for muP and Muon it is a vector, as a norm's scale is.

  It is drawn as torch.nn.Conv1d draws it, uniformly within 1 / sqrt(W).
  """
  return declare(module, name, _within(shape[0]), shape, Role(axes))


def bias(module: nn.Module, name: str, width: int, shape: tuple[int, ...],
         axes: tuple[str | None, ...]) -> jax.Array:
  """Declares the bias of a convolution of so many tokens, [heads, features],
  drawn likewise."""
  return declare(module, name, _within(width), shape, Role(axes))


def _within(width: int) -> Callable:
  most = width ** -0.5
  def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype):
    return jax.random.uniform(key, shape, dtype, -most, most)
  return init


def convolve(x_BLHK: jax.Array, w_WHK: jax.Array,
             bias_HK: Optional[jax.Array] = None, *,
             before_BWHK: Optional[jax.Array] = None,
             segment_ids_BL: Optional[jax.Array] = None,
             valid_BL: Optional[jax.Array] = None, silu: bool = False
             ) -> tuple[jax.Array, jax.Array]:
  """Returns y, in x's dtype, and the W - 1 inputs that a next token sees.

  Args:
    x_BLHK: the inputs.
    w_WHK: the weights.
    bias_HK: the bias; None: there is none.
    before_BWHK: the W - 1 inputs before them; None: zeros.
    segment_ids_BL: documents; the leading axis may be 1.
    valid_BL: 0 on padding, which stands at the end of a row; None: there is
      none.
    silu: whether y goes through SiLU, in float32.
  """
  (B, L, H, K), W = x_BLHK.shape, w_WHK.shape[0]
  if before_BWHK is None:
    before_BWHK = jnp.zeros((B, W - 1, H, K), x_BLHK.dtype)
  all_BMHK = jnp.concatenate([before_BWHK.astype(x_BLHK.dtype), x_BLHK], 1)
  y_BLHK = linear.counted(_activated if silu else _biased, 2 * W)(
      all_BMHK, w_WHK, bias_HK, segment_ids_BL)
  if valid_BL is None:
    after_BWHK = all_BMHK[:, L:]
  else:
    counts_B = jnp.broadcast_to((valid_BL != 0).sum(1), (B,))
    after_BWHK = jax.vmap(lambda x, n: jax.lax.dynamic_slice_in_dim(
        x, n, W - 1, 0))(all_BMHK, counts_B)
  return y_BLHK.astype(x_BLHK.dtype), after_BWHK


@jax.custom_vjp
def _filtered(all_BMHK: jax.Array, w_WHK: jax.Array,
              segment_ids_BL: Optional[jax.Array]) -> jax.Array:
  """Returns y, float32. Its gradient is written out, because XLA's CPU backend
  takes 20 times as long for the one that JAX derives from these lines."""
  W, L = len(w_WHK), all_BMHK.shape[1] - len(w_WHK) + 1
  w_WHK = w_WHK.astype(jnp.float32)
  return sum(_of_one_document(
      all_BMHK[:, i:i + L].astype(jnp.float32) * w_WHK[i][None, None],
      segment_ids_BL, W - 1 - i) for i in range(W))


def _of_one_document(x_BLHK: jax.Array, segment_ids_BL: Optional[jax.Array],
                     gap: int) -> jax.Array:
  """Returns x, and 0 where the token `gap` places before is of another
  document."""
  if segment_ids_BL is None or not gap:
    return x_BLHK
  same_BL = jnp.pad(segment_ids_BL[:, gap:] == segment_ids_BL[:, :-gap],
                    ((0, 0), (min(gap, x_BLHK.shape[1]), 0)))
  return jnp.where(same_BL[:, :, None, None], x_BLHK, 0)


def _filtered_fwd(all_BMHK: jax.Array, w_WHK: jax.Array,
                  segment_ids_BL: Optional[jax.Array]):
  return _filtered(all_BMHK, w_WHK, segment_ids_BL), (
      all_BMHK, w_WHK, segment_ids_BL)


def _filtered_bwd(kept: Any, d_BLHK: jax.Array):
  all_BMHK, w_WHK, segment_ids_BL = kept
  W, L = len(w_WHK), d_BLHK.shape[1]
  d_all_BMHK, d_w = 0, []
  for i in range(W):
    own_BLHK = _of_one_document(d_BLHK, segment_ids_BL, W - 1 - i)
    seen_BLHK = all_BMHK[:, i:i + L].astype(jnp.float32)
    d_w.append((seen_BLHK * own_BLHK).sum((0, 1)))
    # One padded array for all i, where there are no documents.
    wide = jnp.pad(own_BLHK, ((0, 0), (W - 1, W - 1), (0, 0), (0, 0)))
    d_all_BMHK += (wide[:, W - 1 - i:][:, :L + W - 1]
                   * w_WHK[i].astype(jnp.float32)[None, None])
  return (d_all_BMHK.astype(all_BMHK.dtype),
          jnp.stack(d_w).astype(w_WHK.dtype), None)


_filtered.defvjp(_filtered_fwd, _filtered_bwd)


@jax.custom_vjp
def _activated(all_BMHK: jax.Array, w_WHK: jax.Array,
               bias_HK: Optional[jax.Array],
               segment_ids_BL: Optional[jax.Array]) -> jax.Array:
  """Returns silu(y + bias), float32; the gradient computes y again."""
  return jax.nn.silu(_biased(all_BMHK, w_WHK, bias_HK, segment_ids_BL))


def _biased(all_BMHK: jax.Array, w_WHK: jax.Array,
            bias_HK: Optional[jax.Array],
            segment_ids_BL: Optional[jax.Array]) -> jax.Array:
  y_BLHK = _filtered(all_BMHK, w_WHK, segment_ids_BL)
  if bias_HK is None:
    return y_BLHK
  return y_BLHK + bias_HK.astype(jnp.float32)[None, None]


def _activated_bwd(kept: Any, d_BLHK: jax.Array):
  all_BMHK, w_WHK, bias_HK, segment_ids_BL = kept
  d_BLHK, = jax.vjp(jax.nn.silu, _biased(*kept))[1](d_BLHK)
  d_all_BMHK, d_w_WHK, _ = _filtered_bwd(
      (all_BMHK, w_WHK, segment_ids_BL), d_BLHK)
  d_bias_HK = None if bias_HK is None else d_BLHK.sum((0, 1)).astype(
      bias_HK.dtype)
  return d_all_BMHK, d_w_WHK, d_bias_HK, None


_activated.defvjp(lambda *args: (_activated(*args), args), _activated_bwd)
