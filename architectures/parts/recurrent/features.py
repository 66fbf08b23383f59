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


def inner_products(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns the inner products of the vectors of x and y, [..., K] -> [...]."""
  return jnp.einsum('...k,...k->...', x, y)


@jax.custom_vjp
def scale_vectors(x: jax.Array, factors: jax.Array) -> jax.Array:
  """Returns the vectors of x, [..., K], times their factors, [...]."""
  return x * factors[..., None]


def _scale_vectors_forward(x: jax.Array, factors: jax.Array):
  return scale_vectors(x, factors), (x, factors)


def _scale_vectors_backward(kept: tuple[jax.Array, jax.Array], d_y: jax.Array):
  """For y = f x: dx = f dy, and df is the inner product of dy and x."""
  x, factors = kept
  return d_y * factors[..., None], inner_products(d_y, x)


scale_vectors.defvjp(_scale_vectors_forward, _scale_vectors_backward)


@jax.custom_vjp
def multiply_by_weights(x: jax.Array, weights: jax.Array) -> jax.Array:
  """Multiplies an array by weights that vary along its last axes, in float32.

  The gradient is defined below and not derived by JAX, for speed on CPU: it
  sums over all other axes at once, which takes 1.1 ms for an array of [1, 2048,
  8, 64]. JAX would sum over axis 1 alone, which takes 12 ms.

  Args:
    x: an array of any shape.
    weights: an array of the shape of x's last axes.

  Returns:
    The products, of the shape of x.
  """
  # The weights get axes of size 1 in front, to be alike along those of x.
  leading = (1,) * (x.ndim - weights.ndim)
  return x * weights.astype(jnp.float32).reshape(leading + weights.shape)


def _multiply_by_weights_forward(x: jax.Array, weights: jax.Array):
  return multiply_by_weights(x, weights), (x, weights)


def _multiply_by_weights_backward(kept: tuple[jax.Array, jax.Array],
                                  d_y: jax.Array):
  """For y = w x: dx = w dy, and dw is the sum of dy x over the leading axes."""
  x, weights = kept
  leading_axes = tuple(range(x.ndim - weights.ndim))
  d_weights = (d_y * x).sum(leading_axes)
  return multiply_by_weights(d_y, weights), d_weights.astype(weights.dtype)


multiply_by_weights.defvjp(_multiply_by_weights_forward,
                           _multiply_by_weights_backward)


def normalize_length(x: jax.Array, length: float = 1.0) -> jax.Array:
  """Returns x / |x| times a length, over the last axis, in x's dtype."""
  x32 = x.astype(jnp.float32)
  squares = jnp.square(x32).sum(-1)
  factors = length * jax.lax.rsqrt(squares + LENGTH_EPS)
  return scale_vectors(x32, factors).astype(x.dtype)


def rmsnorm(x: jax.Array, scale_K: jax.Array, eps: float) -> jax.Array:
  """Computes layers.rmsnorm by a sum that is fast on CPU,
  [..., K] -> [..., K]."""
  x32 = x.astype(jnp.float32)
  mean_square = jnp.square(x32).mean(-1)
  y = scale_vectors(x32, jax.lax.rsqrt(mean_square + eps))
  leading = (None,) * (x.ndim - 1)
  return (y * scale_K.astype(jnp.float32)[leading]).astype(x.dtype)


class RMSNorm(nn.Module):
  """layers.RMSNorm of the features of a head."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_K = declare(self, 'scale', init=nn.initializers.ones,
                      shape=x.shape[-1:], role=Role(('head',)))
    return layers.recompute_in_backward(rmsnorm)(
        x, scale_K, self.config.norm_eps)


# A short convolution of each feature by itself:
#   y_l = b + sum over i < W of w_i x_(l - W + 1 + i)
# The last weight is the token's own. Tokens of other documents count as zero,
# as do those before the row, unless a cache has them (W - 1 tokens of a row).
# The tokens that it sees may also be several places apart.


def declare_filters(module: nn.Module, name: str, width: int,
                    shape: tuple[int, ...], axes: tuple[str | None, ...]
                    ) -> jax.Array:
  """Declares the weights or the bias of a convolution over tokens, in which
  each feature has a filter of its own (a depthwise convolution).

  The initial values are drawn uniformly between -1 / sqrt(width) and
  1 / sqrt(width), as torch.nn.Conv1d draws them.

  The parameter's Role names no axis as an input, because no matrix product sums
  over an axis of it. So muP and the optimiser Muon treat it as a vector, like
  the scale of a norm, and not as a matrix.

  Args:
    module: the module that declares the parameter.
    name: the name of the parameter.
    width: how many tokens the convolution sees.
    shape: the shape of the parameter: [width, heads, features] for weights, or
      [heads, features] for a bias.
    axes: the logical axes of the parameter, by which it is split over devices.

  Returns:
    The parameter.
  """
  bound = width ** -0.5

  def draw_uniformly(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype
                     ) -> jax.Array:
    """Draws the initial values between -bound and bound."""
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

  return declare(module, name, init=draw_uniformly, shape=shape,
                 role=Role(axes))


def declare_and_convolve(module: nn.Module, name: str, x_BLHK: jax.Array,
                         width: int, axes: tuple[str | None, ...],
                         with_bias: bool = False, **options: Any
                         ) -> tuple[jax.Array, jax.Array]:
  """Declares the weights of a short convolution over tokens as parameters of a
  module, and applies the convolution (`convolve`):

    y_l = bias + sum over i < W of w_i * x_(l - (W - 1) + i)

  The suffixes name axes: B batch, L length, H heads, K features of a head, W
  tokens that the convolution sees.

  Args:
    module: the module that declares the weights.
    name: the name of the weights. The bias is named `{name}_bias`.
    x_BLHK: the inputs of the convolution. The axes after the length may also be
      others than heads and features.
    width: W.
    axes: the logical axes of the inputs after the length, by which the weights
      are split over devices.
    with_bias: whether the convolution has a bias.
    **options: the other arguments of `convolve`, passed on as they are:
      `before_BWHK`, `segment_ids_BL`, `valid_BL`, `silu` and `apart`.

  Returns:
    The results y, of the shape of the inputs; and the last W - 1 inputs, which
    the convolution of the next tokens needs.
  """
  # A filter of W weights for each feature, whose last one is the token's own.
  features = x_BLHK.shape[2:]
  w_WHK = declare_filters(module, name, width=width, shape=(width, *features),
                          axes=(None, *axes))
  bias_HK = None
  if with_bias:
    bias_HK = declare_filters(module, f'{name}_bias', width=width,
                              shape=features, axes=axes)
  return convolve(x_BLHK, w_WHK, bias_HK=bias_HK, **options)


def convolve(x_BLHK: jax.Array, w_WHK: jax.Array,
             bias_HK: Optional[jax.Array] = None, *,
             before_BWHK: Optional[jax.Array] = None,
             segment_ids_BL: Optional[jax.Array] = None,
             valid_BL: Optional[jax.Array] = None, silu: bool = False,
             apart: int = 1) -> tuple[jax.Array, jax.Array]:
  """Applies a short causal convolution to each feature by itself,

    y_l = b + sum over i < W of w_i x_(l - (W - 1 - i) apart)

  where tokens of other documents count as zero.

  Args:
    x_BLHK: the inputs, [batch, length L, heads, features]; the axes after the
      length may be others.
    w_WHK: the weights w of the W tokens that the convolution sees; the last one
      is the token's own.
    bias_HK: the bias b; None: there is none.
    before_BWHK: the (W - 1) * apart inputs before these, from a cache; None:
      zeros.
    segment_ids_BL: the number of each token's document, [batch or 1, length];
      None: a row is one document.
    valid_BL: 0 on padding, which stands at the end of a row; None: there is
      none.
    silu: whether y goes through SiLU, in float32.
    apart: how many places apart the tokens are that it sees.

  Returns:
    y, [B, L, H, K] in x's dtype, and the last (W - 1) * apart inputs of each
    row that are no padding, which the next tokens will see.
  """
  # The inputs from before, zeros or a cache's, stand in front: M = reach + L.
  B, L, *features = x_BLHK.shape
  W = w_WHK.shape[0]
  reach = (W - 1) * apart
  if before_BWHK is None:
    before_BWHK = jnp.zeros((B, reach, *features), x_BLHK.dtype)
  all_BMHK = jnp.concatenate([before_BWHK.astype(x_BLHK.dtype), x_BLHK], 1)

  # Each output counts as W products and W sums, 2 W FLOPs.
  function = _convolve_with_bias
  if silu:
    function = _convolve_with_silu
  convolve_once = layers.count_flops_by_result(
      _with_distance(function, apart), 2 * W)
  y_BLHK = convolve_once(all_BMHK, w_WHK, bias_HK, segment_ids_BL)
  last_BWHK = last_inputs(all_BMHK, count=reach, length=L, valid_BL=valid_BL)
  return y_BLHK.astype(x_BLHK.dtype), last_BWHK


def convolve_by_filters_of_tokens(
    x_BLHK: jax.Array, w_WHK: jax.Array, token_w_BLHW: jax.Array, *,
    before_BWHK: Optional[jax.Array], segment_ids_BL: Optional[jax.Array],
    valid_BL: Optional[jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Applies a short causal convolution over the last W tokens, whose filters
  depend on the token l:

    y_l = sum over i < W of (w_i + u_li) * x_(l - (W - 1 - i))

  Tokens of other documents count as zero.

  The suffixes name axes: B batch, L length, H heads, K features of a head, W
  tokens that the convolution sees, the token itself last.

  Args:
    x_BLHK: the inputs x.
    w_WHK: w, one filter for each feature, which all tokens share.
    token_w_BLHW: u, one filter for each token and head, which all features of
      the head share.
    before_BWHK: the W - 1 inputs before these, from a cache; None: zeros.
    segment_ids_BL: the number of each token's document; None: a row is one
      document.
    valid_BL: 0 on padding, which stands at the end of a row; None: there is
      none.

  Returns:
    y, float32 [B, L, H, K], and the last W - 1 inputs of each row that are no
    padding, which the next tokens will see.
  """
  W = len(w_WHK)
  all_BMHK, seen_BLWHK = stack_seen_tokens(
      x_BLHK, W, before_BWHK=before_BWHK, segment_ids_BL=segment_ids_BL)

  # Each output counts as W products and W sums, 2 W FLOPs.
  convolve_once = layers.count_flops_by_result(_apply_filters_of_tokens, 2 * W)
  y_BLHK = convolve_once(seen_BLWHK, w_WHK, token_w_BLHW)
  last_BWHK = last_inputs(all_BMHK, count=W - 1, length=x_BLHK.shape[1],
                          valid_BL=valid_BL)
  return y_BLHK, last_BWHK


def _apply_filters_of_tokens(seen_BLWHK: jax.Array, w_WHK: jax.Array,
                             token_w_BLHW: jax.Array) -> jax.Array:
  """Returns y_l = sum over i of (w_i + u_li) * x_li, float32 [B, L, H, K],
  where x_li are the W tokens that token l sees. w is a filter of each feature,
  and u one of each token and head."""
  token_w_BLWH1 = jnp.moveaxis(token_w_BLHW, 3, 2)[..., None]
  filters_BLWHK = (w_WHK[None, None].astype(jnp.float32)
                   + token_w_BLWH1.astype(jnp.float32))
  return (filters_BLWHK * seen_BLWHK.astype(jnp.float32)).sum(2)


def stack_seen_tokens(x_BLHK: jax.Array, width: int, *,
                      before_BWHK: Optional[jax.Array],
                      segment_ids_BL: Optional[jax.Array]
                      ) -> tuple[jax.Array, jax.Array]:
  """Returns for each token the W inputs that a convolution over tokens sees
  from there: the inputs of the W - 1 tokens before it, and its own.

  The suffixes name axes: B batch, L length, H heads, K features of a head, M =
  W - 1 + L inputs.

  Args:
    x_BLHK: the inputs.
    width: W, the number of tokens that the convolution sees.
    before_BWHK: the W - 1 inputs before these, from a cache; None: zeros.
    segment_ids_BL: the number of each token's document; None: a row is one
      document.

  Returns:
    All inputs, [B, M, H, K], with those from before in front; and those that
    each token sees, [B, L, W, H, K], in the order of time: the token's own is
    the last. Inputs of other documents are 0 there.
  """
  # Put the inputs of earlier tokens in front.
  B, length, *features = x_BLHK.shape
  if before_BWHK is None:
    before_BWHK = jnp.zeros((B, width - 1, *features), x_BLHK.dtype)
  all_BMHK = jnp.concatenate([before_BWHK.astype(x_BLHK.dtype), x_BLHK], 1)

  # Shift them against the tokens. Input i of a token's W inputs is that of the
  # token `gap` places before it.
  seen = []
  for i in range(width):
    gap = width - 1 - i
    shifted_BLHK = all_BMHK[:, i:i + length]
    seen.append(mask_other_documents(shifted_BLHK, segment_ids_BL, gap=gap))
  return all_BMHK, jnp.stack(seen, 2)


def last_inputs(all_BM: jax.Array, count: int, length: int,
                valid_BL: Optional[jax.Array]) -> jax.Array:
  """Returns the last `count` inputs of each row that are no padding. A
  convolution over the tokens that follow needs them.

  The suffixes name axes: B batch, L new inputs, M = count + length inputs.

  Args:
    all_BM: the inputs of each row, [B, M, ...]: first `count` inputs of earlier
      tokens, and then `length` new ones.
    count: how many inputs to return.
    length: the number of new inputs.
    valid_BL: 0 on padding, which may only stand at the end of a row; None:
      there is no padding.

  Returns:
    The inputs, [B, count, ...].
  """
  if valid_BL is None:
    return all_BM[:, length:]

  # A row with n valid new inputs has count + n inputs that are no padding: the
  # last `count` of these begin at n. With n = 0 those from before are returned.
  valid_B = jnp.broadcast_to((valid_BL != 0).sum(1), (len(all_BM),))

  def inputs_of_row(row_M: jax.Array, num_valid: jax.Array) -> jax.Array:
    """Returns the last inputs of one row. Its slice begins elsewhere than that
    of other rows."""
    return jax.lax.dynamic_slice_in_dim(row_M, num_valid, count, 0)

  return jax.vmap(inputs_of_row)(all_BM, valid_B)


@functools.cache  # one function for each, which is traced once
def _with_distance(function: Callable[..., jax.Array], apart: int
                   ) -> Callable[..., jax.Array]:
  """Returns a function of a convolution for tokens that are `apart` places from
  one another."""
  if apart == 1:
    return function
  return lambda *args: function(*args, apart)


def _inputs_of_weights(W: int, M: int, apart: int) -> list[tuple[slice, int]]:
  """Returns which inputs each of the W weights of a convolution over tokens
  multiplies.

  Args:
    W: the number of weights.
    M: the number of inputs: (W - 1) * apart inputs of earlier tokens, and after
      them L inputs of new tokens.
    apart: the distance of the tokens that the convolution sees (its dilation).

  Returns:
    A pair for each weight: the slice of its L inputs, one for each new token;
    and the gap, how many tokens before the new token its input stands.
  """
  # The first weight multiplies the farthest input. The last one multiplies the
  # token itself, with a gap of 0.
  reach = (W - 1) * apart
  slices_and_gaps = []
  for i in range(W):
    first = i * apart
    slices_and_gaps.append((slice(first, first + M - reach), reach - first))
  return slices_and_gaps


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _filter_inputs(all_BMHK: jax.Array, w_WHK: jax.Array,
                   segment_ids_BL: Optional[jax.Array], apart: int
                   ) -> jax.Array:
  """Convolves inputs over tokens, with a filter for each feature:

    y_l = sum over i of w_i * x_(l - gap_i)

  where gap_i is how many tokens before token l the input of weight i stands.
  Inputs of another document count as 0.

  The gradient is defined below, because on CPU the one that JAX derives takes
  20 times as long.

  The suffixes name axes: B batch, M inputs, L new inputs, H heads, K features,
  W weights.

  Args:
    all_BMHK: the inputs of earlier tokens, and after them the L new ones.
    w_WHK: the weights w.
    segment_ids_BL: the number of each token's document; None: a row is one
      document.
    apart: the distance of the tokens that the convolution sees (its dilation).

  Returns:
    y, float32 [B, L, H, K].
  """
  w32_WHK = w_WHK.astype(jnp.float32)
  W = len(w_WHK)
  M = all_BMHK.shape[1]
  y_BLHK = 0
  for i, (inputs, gap) in enumerate(_inputs_of_weights(W, M, apart)):
    # The slice for this weight has one input for each new token: the one that
    # the token sees `gap` places before itself.
    inputs_BLHK = all_BMHK[:, inputs].astype(jnp.float32)
    products_BLHK = inputs_BLHK * w32_WHK[i][None, None]
    y_BLHK += mask_other_documents(products_BLHK, segment_ids_BL, gap)
  return y_BLHK


def begins_document(ids_BL: jax.Array) -> jax.Array:
  """Returns bool, [B, L]: whether a document begins, but for the first of a
  row."""
  return jnp.pad(ids_BL[:, 1:] != ids_BL[:, :-1], ((0, 0), (1, 0)))


def start_of_document(ids_BL: jax.Array) -> jax.Array:
  """Returns at which place the document of each token begins, [B, L]."""
  places_1L = jnp.arange(ids_BL.shape[1])[None]
  starts_BL = jnp.where(begins_document(ids_BL), places_1L, 0)
  return jax.lax.cummax(starts_BL, axis=1)


def mask_other_documents(x_BLHK: jax.Array,
                         segment_ids_BL: Optional[jax.Array], gap: int
                         ) -> jax.Array:
  """Replaces x by 0 at each token l for which the token l - gap belongs to
  another document or would stand before the row.

  The suffixes name axes: B batch, L length, H heads, K features of a head; H
  and K may be any later axes.

  Args:
    x_BLHK: an array [batch, length, ...].
    segment_ids_BL: the number of each token's document; None: a row is one
      document, and x is returned.
    gap: the distance of the two tokens.

  Returns:
    The masked x, of its shape.
  """
  if segment_ids_BL is None or not gap:
    return x_BLHK
  # Compare each token's document with that of the token `gap` before it. The
  # first `gap` tokens (or the whole row, if it is shorter) have no such token.
  length = x_BLHK.shape[1]
  same_BL = jnp.pad(segment_ids_BL[:, gap:] == segment_ids_BL[:, :-gap],
                    ((0, 0), (min(gap, length), 0)))
  ones = [1] * len(x_BLHK.shape[2:])
  return jnp.where(same_BL.reshape(*same_BL.shape, *ones), x_BLHK, 0)


def _filter_inputs_forward(all_BMHK: jax.Array, w_WHK: jax.Array,
                           segment_ids_BL: Optional[jax.Array], apart: int):
  y_BLHK = _filter_inputs(all_BMHK, w_WHK, segment_ids_BL, apart)
  return y_BLHK, (all_BMHK, w_WHK, segment_ids_BL)


def _filter_inputs_backward(apart: int, kept: Any, d_y_BLHK: jax.Array
                            ) -> tuple[jax.Array, jax.Array, None]:
  """Computes the gradients of a convolution over tokens (`_filter_inputs`):

    y_l  = sum over i of w_i * x_(l - gap_i)
    dw_i = sum over l of x_(l - gap_i) * dy_l
    dx_m = sum over i of w_i * dy_(m + gap_i)

  The suffixes name axes: B batch, M inputs, L new inputs, H heads, K features,
  W weights.

  Args:
    apart: the distance of the tokens that the convolution sees (its dilation).
    kept: what the forward pass kept: the inputs, the weights, and the number of
      each token's document.
    d_y_BLHK: the gradient dy of the result.

  Returns:
    The gradients of the inputs, those of earlier tokens included, and of the
    weights; and None for the documents.
  """
  all_BMHK, w_WHK, segment_ids_BL = kept
  W = len(w_WHK)
  M = all_BMHK.shape[1]
  reach = M - d_y_BLHK.shape[1]
  no_padding = [(0, 0)] * len(d_y_BLHK.shape[2:])

  d_all_BMHK = 0
  d_w = []
  for i, (inputs, gap) in enumerate(_inputs_of_weights(W, M, apart)):
    # The gradient of this weight, from its inputs.
    d_tap_BLHK = mask_other_documents(d_y_BLHK, segment_ids_BL, gap)
    inputs_BLHK = all_BMHK[:, inputs].astype(jnp.float32)
    d_w.append((inputs_BLHK * d_tap_BLHK).sum((0, 1)))

    # The gradient of the inputs: dy, shifted by reach - gap places among zeros.
    # The padding must be the same for all i: then XLA makes a single padded
    # array for all of them where there are no documents.
    padded = jnp.pad(d_tap_BLHK, ((0, 0), (reach, reach), *no_padding))
    shifted_BMHK = padded[:, gap:][:, :M]
    d_all_BMHK += shifted_BMHK * w_WHK[i].astype(jnp.float32)[None, None]
  d_w_WHK = jnp.stack(d_w).astype(w_WHK.dtype)
  return d_all_BMHK.astype(all_BMHK.dtype), d_w_WHK, None


_filter_inputs.defvjp(_filter_inputs_forward, _filter_inputs_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _convolve_with_silu(all_BMHK: jax.Array, w_WHK: jax.Array,
                        bias_HK: Optional[jax.Array],
                        segment_ids_BL: Optional[jax.Array], apart: int = 1
                        ) -> jax.Array:
  """Returns silu(y + bias), float32; the gradient computes y again."""
  return jax.nn.silu(
      _convolve_with_bias(all_BMHK, w_WHK, bias_HK=bias_HK,
                          segment_ids_BL=segment_ids_BL, apart=apart))


def _convolve_with_bias(all_BMHK: jax.Array, w_WHK: jax.Array,
                        bias_HK: Optional[jax.Array],
                        segment_ids_BL: Optional[jax.Array], apart: int = 1
                        ) -> jax.Array:
  """Returns y + bias, float32 [B, L, H, K]."""
  y_BLHK = _filter_inputs(all_BMHK, w_WHK, segment_ids_BL, apart)
  if bias_HK is None:
    return y_BLHK
  return y_BLHK + bias_HK.astype(jnp.float32)[None, None]


def _convolve_with_silu_forward(*args: Any):
  """Keeps the inputs, weights, bias and documents for the backward pass."""
  return _convolve_with_silu(*args), args[:4]


def _convolve_with_silu_backward(apart: int, kept: Any, d_BLHK: jax.Array):
  """Computes the gradients of silu(z), z = conv(x, w) + b, a convolution over
  tokens with an activation. With the gradient d of the result,

    dz = silu'(z) d,   db = sum over rows and tokens of dz

  and from dz follow dx and dw (`_filter_inputs_backward`). z is computed again
  here, so that it need not be kept for the backward pass.

  The suffixes name axes: B batch, L new inputs, M all inputs, H heads, K
  features, W weights.

  Args:
    apart: the distance of the tokens that the convolution sees (its dilation).
    kept: what the forward pass kept: the inputs, the weights, the bias and the
      number of each token's document.
    d_BLHK: the gradient of the result.

  Returns:
    The gradients of the inputs, the weights and the bias (None without one),
    and None for the documents.
  """
  all_BMHK, w_WHK, bias_HK, segment_ids_BL = kept
  # Through the activation.
  z_BLHK = _convolve_with_bias(all_BMHK, w_WHK, bias_HK=bias_HK,
                               segment_ids_BL=segment_ids_BL, apart=apart)
  _, silu_backward = jax.vjp(jax.nn.silu, z_BLHK)
  d_z_BLHK, = silu_backward(d_BLHK)

  # Through the convolution, and the sum with the bias.
  d_all_BMHK, d_w_WHK, _ = _filter_inputs_backward(
      apart, (all_BMHK, w_WHK, segment_ids_BL), d_z_BLHK)
  d_bias_HK = None
  if bias_HK is not None:
    d_bias_HK = d_z_BLHK.sum((0, 1)).astype(bias_HK.dtype)
  return d_all_BMHK, d_w_WHK, d_bias_HK, None


_convolve_with_silu.defvjp(_convolve_with_silu_forward,
                           _convolve_with_silu_backward)
