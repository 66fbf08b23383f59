"""A short causal convolution of each feature by itself, along a row.

  y_l = sum over i < W of w_i x_(l - W + 1 + i)

The last weight is the token's own. Tokens of other documents count as zero, as
do those before the row, unless a cache has them (W - 1 tokens of a row).
"""

from typing import Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts.roles import Role, declare


def weight(module: nn.Module, name: str, shape: tuple[int, ...],
           axes: tuple[str | None, ...]) -> jax.Array:
  """Declares the weights of a convolution, [W, heads, features]. Each feature
  has a filter of its own, so that no axis of it is summed over by a product:
  for muP and Muon it is a vector, as a norm's scale is.

  It is drawn as torch.nn.Conv1d draws it, uniformly within 1 / sqrt(W).
  """
  most = shape[0] ** -0.5
  def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype):
    return jax.random.uniform(key, shape, dtype, -most, most)
  return declare(module, name, init, shape, Role(axes))


def convolve(x_BLHK: jax.Array, w_WHK: jax.Array, *,
             before_BWHK: Optional[jax.Array] = None,
             segment_ids_BL: Optional[jax.Array] = None,
             valid_BL: Optional[jax.Array] = None
             ) -> tuple[jax.Array, jax.Array]:
  """Returns y, in x's dtype, and the W - 1 inputs that a next token sees.

  Args:
    x_BLHK: the inputs.
    w_WHK: the weights.
    before_BWHK: the W - 1 inputs before them; None: zeros.
    segment_ids_BL: documents; their leading axis may be 1.
    valid_BL: 0 on padding, which is all a row's end; None: there is none.
  """
  (B, L, H, K), W = x_BLHK.shape, w_WHK.shape[0]
  if before_BWHK is None:
    before_BWHK = jnp.zeros((B, W - 1, H, K), x_BLHK.dtype)
  all_BMHK = jnp.concatenate([before_BWHK.astype(x_BLHK.dtype), x_BLHK], 1)
  y_BLHK = jnp.zeros(x_BLHK.shape, jnp.float32)
  for i in range(W):
    term_BLHK = all_BMHK[:, i:i + L].astype(jnp.float32) * w_WHK[i].astype(
        jnp.float32)[None, None]
    gap = W - 1 - i
    if segment_ids_BL is not None and gap:
      same_BL = jnp.pad(segment_ids_BL[:, gap:] == segment_ids_BL[:, :-gap],
                        ((0, 0), (min(gap, L), 0)))
      term_BLHK = jnp.where(same_BL[:, :, None, None], term_BLHK, 0)
    y_BLHK += term_BLHK
  if valid_BL is None:
    after_BWHK = all_BMHK[:, L:]
  else:
    counts_B = jnp.broadcast_to((valid_BL != 0).sum(1), (B,))
    after_BWHK = jax.vmap(lambda x, n: jax.lax.dynamic_slice_in_dim(
        x, n, W - 1, 0))(all_BMHK, counts_B)
  return y_BLHK.astype(x_BLHK.dtype), after_BWHK
