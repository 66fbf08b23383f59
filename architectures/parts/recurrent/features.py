"""Operations on features that recurrences share: lengths and scalings of
vectors, and short causal convolutions along a row. The gradients are written
out as products of vectors.

For a sum over features of x * y, where x and y are two arrays, XLA's CPU
backend (jaxlib 0.10.2) takes 15 times as long as for the same sum as an einsum.
JAX derives such sums as the gradient of a number that multiplies a vector.
"""

from collections.abc import Callable
import functools
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts.config import ModelConfig
from architectures.parts.sharding import Role, declare

LENGTH_EPS = 1e-6  # beside a squared length, as in the authors' programs


def dots(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns the inner products of the vectors of x and y, [..., K] -> [...]."""
  return jnp.einsum('...k,...k->...', x, y)


@jax.custom_vjp
def scaled(x: jax.Array, by: jax.Array) -> jax.Array:
  """Returns the vectors of x, [..., K], times the numbers of `by`, [...]."""
  return x * by[..., None]


scaled.defvjp(
    lambda x, by: (scaled(x, by), (x, by)),
    lambda kept, d: (d * kept[1][..., None], dots(d, kept[0])))


@jax.custom_vjp
def weighted(x: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns x times weights of its last axes, in float32. The gradient of the
  weights sums over all other axes at once: over [1, 2048, 8, 64] it takes 1.1
  ms on CPU, and 12 ms over axis 1 alone, which JAX derives."""
  lead = (1,) * (x.ndim - weights.ndim)
  return x * weights.astype(jnp.float32).reshape(lead + weights.shape)


def _weighted_bwd(kept: tuple[jax.Array, jax.Array], d: jax.Array):
  x, weights = kept
  d_weights = (d * x).sum(tuple(range(x.ndim - weights.ndim)))
  return weighted(d, weights), d_weights.astype(weights.dtype)


weighted.defvjp(lambda x, weights: (weighted(x, weights), (x, weights)),
                _weighted_bwd)


def unit(x: jax.Array, length: float = 1.0) -> jax.Array:
  """Returns x / |x| times a length, over the last axis, in x's dtype."""
  x32 = x.astype(jnp.float32)
  squares = jnp.square(x32).sum(-1)
  return scaled(x32, length * jax.lax.rsqrt(squares + LENGTH_EPS)
                ).astype(x.dtype)


def rmsnorm(x: jax.Array, scale_K: jax.Array, eps: float) -> jax.Array:
  """Computes layers.rmsnorm by a sum that is fast on CPU,
  [..., K] -> [..., K]."""
  x32 = x.astype(jnp.float32)
  y = scaled(x32, jax.lax.rsqrt(jnp.square(x32).mean(-1) + eps))
  return (y * scale_K.astype(jnp.float32)[(None,) * (x.ndim - 1)]
          ).astype(x.dtype)


class RMSNorm(nn.Module):
  """layers.RMSNorm of the features of a head."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_K = declare(self, 'scale', nn.initializers.ones, x.shape[-1:],
                      Role(('head',)))
    return layers.recompute_in_backward(rmsnorm)(
        x, scale_K, self.config.norm_eps)


# A short convolution of each feature by itself:
#   y_l = b + sum over i < W of w_i x_(l - W + 1 + i)
# The last weight is the token's own. Tokens of other documents count as zero,
# as do those before the row, unless a cache has them (W - 1 tokens of a row).
# The tokens that it sees may also be several places apart.


def filters(module: nn.Module, name: str, width: int, shape: tuple[int, ...],
            axes: tuple[str | None, ...]) -> jax.Array:
  """Declares the weights of a convolution of so many tokens, [W, heads,
  features], or its bias, [heads, features]. Each feature has a filter of its
  own, so that no axis of it is summed over by a product: for muP and Muon it is
  a vector, as a norm's scale is.

  It is drawn as torch.nn.Conv1d draws it, uniformly within 1 / sqrt(W).
  """
  def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype):
    return jax.random.uniform(key, shape, dtype, -width ** -0.5, width ** -0.5)
  return declare(module, name, init, shape, Role(axes))


def convolved(module: nn.Module, name: str, x_BLHK: jax.Array, width: int,
              axes: tuple[str | None, ...], with_bias: bool = False, **how: Any
              ) -> tuple[jax.Array, jax.Array]:
  """Declares filters over so many tokens and, if asked for, a bias of features
  on these logical axes; returns `convolve` by them, whose arguments are `how`.
  """
  shape = x_BLHK.shape[2:]
  w_WHK = filters(module, name, width, (width, *shape), (None, *axes))
  bias_HK = filters(module, f'{name}_bias', width, shape, axes) if (
      with_bias) else None
  return convolve(x_BLHK, w_WHK, bias_HK, **how)


def convolve(x_BLHK: jax.Array, w_WHK: jax.Array,
             bias_HK: Optional[jax.Array] = None, *,
             before_BWHK: Optional[jax.Array] = None,
             segment_ids_BL: Optional[jax.Array] = None,
             valid_BL: Optional[jax.Array] = None, silu: bool = False,
             apart: int = 1) -> tuple[jax.Array, jax.Array]:
  """Returns y, in x's dtype, and the (W - 1) * apart inputs that the next
  tokens see.

  Args:
    x_BLHK: the inputs; features may have other axes than heads and their own.
    w_WHK: the weights.
    bias_HK: the bias; None: there is none.
    before_BWHK: as many inputs before them; None: zeros.
    segment_ids_BL: documents; the leading axis may be 1.
    valid_BL: 0 on padding, which stands at the end of a row; None: there is
      none.
    silu: whether y goes through SiLU, in float32.
    apart: places between two tokens that it sees.
  """
  (B, L, *shape), W = x_BLHK.shape, w_WHK.shape[0]
  reach = (W - 1) * apart
  if before_BWHK is None:
    before_BWHK = jnp.zeros((B, reach, *shape), x_BLHK.dtype)
  all_BMHK = jnp.concatenate([before_BWHK.astype(x_BLHK.dtype), x_BLHK], 1)
  convolve_once = _at(_activated if silu else _biased, apart)
  y_BLHK = layers.count_flops_by_result(convolve_once, 2 * W)(
      all_BMHK, w_WHK, bias_HK, segment_ids_BL)
  return y_BLHK.astype(x_BLHK.dtype), last(all_BMHK, reach, L, valid_BL)


def last(all_BM: jax.Array, count: int, length: int,
         valid_BL: Optional[jax.Array]) -> jax.Array:
  """Returns the last `count` entries of each row, [B, count, ...], of which the
  last `length` are new; `valid_BL` is as of `convolve`."""
  if valid_BL is None:
    return all_BM[:, length:]
  counts_B = jnp.broadcast_to((valid_BL != 0).sum(1), (len(all_BM),))
  return jax.vmap(lambda x, n: jax.lax.dynamic_slice_in_dim(
      x, n, count, 0))(all_BM, counts_B)


@functools.cache  # one function for each, which is traced once
def _at(f: Callable[..., jax.Array], apart: int) -> Callable[..., jax.Array]:
  return f if apart == 1 else lambda *args: f(*args, apart)


def _taps(W: int, M: int, apart: int) -> list[tuple[slice, int]]:
  """Returns of each weight the inputs that it multiplies, of M, and how far
  before the token they stand."""
  reach = (W - 1) * apart
  return [(slice(i * apart, i * apart + M - reach), reach - i * apart)
          for i in range(W)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _filtered(all_BMHK: jax.Array, w_WHK: jax.Array,
              segment_ids_BL: Optional[jax.Array], apart: int) -> jax.Array:
  """Returns y, float32. Its gradient is written out, because XLA's CPU backend
  takes 20 times as long for the one that JAX derives from these lines."""
  w_WHK = w_WHK.astype(jnp.float32)
  return sum(of_one_document(
      all_BMHK[:, seen].astype(jnp.float32) * w_WHK[i][None, None],
      segment_ids_BL, gap) for i, (seen, gap) in enumerate(
          _taps(len(w_WHK), all_BMHK.shape[1], apart)))


def begins(ids_BL: jax.Array) -> jax.Array:
  """Returns bool, [B, L]: whether a document begins, but for the first of a
  row."""
  return jnp.pad(ids_BL[:, 1:] != ids_BL[:, :-1], ((0, 0), (1, 0)))


def starts(ids_BL: jax.Array) -> jax.Array:
  """Returns where the document of each token begins."""
  return jax.lax.cummax(jnp.where(
      begins(ids_BL), jnp.arange(ids_BL.shape[1])[None], 0), axis=1)


def of_one_document(x_BLHK: jax.Array, segment_ids_BL: Optional[jax.Array],
                     gap: int) -> jax.Array:
  """Returns x, and 0 where the token `gap` places before is of another
  document."""
  if segment_ids_BL is None or not gap:
    return x_BLHK
  same_BL = jnp.pad(segment_ids_BL[:, gap:] == segment_ids_BL[:, :-gap],
                    ((0, 0), (min(gap, x_BLHK.shape[1]), 0)))
  return jnp.where(same_BL.reshape(
      *same_BL.shape, *(1 for _ in x_BLHK.shape[2:])), x_BLHK, 0)


def _filtered_bwd(apart: int, kept: Any, d_BLHK: jax.Array):
  all_BMHK, w_WHK, segment_ids_BL = kept
  M, L = all_BMHK.shape[1], d_BLHK.shape[1]
  d_all_BMHK, d_w, reach = 0, [], M - L
  for i, (seen, gap) in enumerate(_taps(len(w_WHK), M, apart)):
    d_tap_BLHK = of_one_document(d_BLHK, segment_ids_BL, gap)
    seen_BLHK = all_BMHK[:, seen].astype(jnp.float32)
    d_w.append((seen_BLHK * d_tap_BLHK).sum((0, 1)))
    # One padded array for all i, where there are no documents.
    wide = jnp.pad(d_tap_BLHK, ((0, 0), (reach, reach), *(
        (0, 0) for _ in d_tap_BLHK.shape[2:])))
    d_all_BMHK += (wide[:, gap:][:, :M]
                   * w_WHK[i].astype(jnp.float32)[None, None])
  return (d_all_BMHK.astype(all_BMHK.dtype),
          jnp.stack(d_w).astype(w_WHK.dtype), None)


_filtered.defvjp(lambda *args: (_filtered(*args), args[:3]), _filtered_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _activated(all_BMHK: jax.Array, w_WHK: jax.Array,
               bias_HK: Optional[jax.Array],
               segment_ids_BL: Optional[jax.Array], apart: int = 1
               ) -> jax.Array:
  """Returns silu(y + bias), float32; the gradient computes y again."""
  return jax.nn.silu(_biased(all_BMHK, w_WHK, bias_HK, segment_ids_BL, apart))


def _biased(all_BMHK: jax.Array, w_WHK: jax.Array,
            bias_HK: Optional[jax.Array],
            segment_ids_BL: Optional[jax.Array], apart: int = 1) -> jax.Array:
  y_BLHK = _filtered(all_BMHK, w_WHK, segment_ids_BL, apart)
  if bias_HK is None:
    return y_BLHK
  return y_BLHK + bias_HK.astype(jnp.float32)[None, None]


def _activated_bwd(apart: int, kept: Any, d_BLHK: jax.Array):
  all_BMHK, w_WHK, bias_HK, segment_ids_BL = kept
  d_BLHK, = jax.vjp(jax.nn.silu, _biased(*kept, apart))[1](d_BLHK)
  d_all_BMHK, d_w_WHK, _ = _filtered_bwd(
      apart, (all_BMHK, w_WHK, segment_ids_BL), d_BLHK)
  d_bias_HK = None if bias_HK is None else d_BLHK.sum((0, 1)).astype(
      bias_HK.dtype)
  return d_all_BMHK, d_w_WHK, d_bias_HK, None


_activated.defvjp(
    lambda *args: (_activated(*args), args[:4]), _activated_bwd)
