"""RWKV-7: a delta rule whose decays, rates and removed keys are vectors of a
token (Peng et al. 2025, "RWKV-7 Goose", arXiv 2503.14456, section 4.1; as in
flash-linear-attention).

  x_s     = x_l + (x_(l-1) - x_l) * m_s           of s in r, w, k, v, a, g
  r, k, v = W_r x_r, W_k x_k, W_v x_v
  w       = exp(-e^(-1/2) sigmoid(b_w + tanh(x_w A_w) B_w))    K of a head
  a       = sigmoid(b_a + x_a A_a B_a)                         K of a head
  kappa   = k * removal / |k * removal|
  k'      = k * (1 + boost * (a - 1))
  S_t     = Diag(w_t) S_t-1 - (a_t * kappa_t) (kappa_t^T S_t-1) + k'_t v_t^T
  o_t     = S_t^T r_t
  y       = W_o ((GroupNorm(o) + (r . (bonus * k')) v) * sigmoid(x_g A_g) B_g)

The token before, in the same document, is mixed into each input by a share of
each feature, which is a convolution over two tokens. The step of the state is
two of recurrence.py's: what kappa finds before the decay is removed along
a * kappa, and then k' writes v. It finds what decays afterwards by kappa / w,
and w is above 0.54. The norm of a head has the authors' epsilon, which is the
size of the head times model.norm_eps.

The authors' blend of a layer's values with those of the first layer is not
here, nor is their feed-forward network (relu2 after a shift of tokens). Their
initial values depend on the depth of a layer; here all have those of the
middle, and A and B are drawn as all other weights are.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Optional

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import layers, mixer
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context, Report
from architectures.parts.recurrent import features, layer
from architectures.parts.recurrent import linear_attention, recurrence
from architectures.parts.sharding import Role, declare
from common.errors import require
from common.fields import field, SHAPES

MOST_LOG_DECAY = np.exp(-0.5)
# The six things a token is mixed for, each with the power p of the initial
# share of the token before in feature n of N, 1 - (n / N)^p.
SHIFTED = dict(query=0.1, decay=0.45, key=0.35, value=0.35, rate=0.45, gate=0.1)


@dataclasses.dataclass(frozen=True)
class RWKV7Config(linear_attention.States):
  """The fields of mixer rwkv7. What is left open is as attention has it; the
  ranks grow with the root of d_model, in steps of 32."""
  key_dim: int = field(0, "size of a head's query and key; derived: head_dim",
                       resume=SHAPES)
  value_dim: int = field(0, "size of a head's value; derived: head_dim",
                         resume=SHAPES)
  decay_rank: int = field(
      0, "rank of the decays' product; derived: 2.5 sqrt(d_model)",
      resume=SHAPES)
  rate_rank: int = field(
      0, "rank of the rates' product; derived: 2.5 sqrt(d_model)",
      resume=SHAPES)
  gate_rank: int = field(
      0, "rank of the gate's product; derived: 5 sqrt(d_model)", resume=SHAPES)
  householders = 2  # steps of recurrence.py

  def derived(self, config: ModelConfig) -> 'RWKV7Config':
    """Returns the fields with those that were left open (0), which follow from
    the sizes of the model. A rank is a multiple of 32, as the authors have it.
    """
    def rank(times: float) -> int:
      """Returns the multiple of 32 that is nearest to times sqrt(d_model)."""
      multiples = round(times * config.d_model ** 0.5 / 32)
      return max(32, 32 * multiples)

    return dataclasses.replace(
        self, heads=self.heads or config.num_heads,
        key_dim=self.key_dim or config.head_dim,
        value_dim=self.value_dim or config.head_dim,
        decay_rank=self.decay_rank or rank(2.5),
        rate_rank=self.rate_rank or rank(2.5),
        gate_rank=self.gate_rank or rank(5))


@struct.dataclass
class State:
  """The cache of a layer: the state after its last token, and the input of that
  token."""
  state_BHKU: jax.Array
  input_B1D: jax.Array


class RWKV7(layer.Layer):
  """Positions are not read."""
  settings = RWKV7Config

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[State]):
    """Computes RWKV-7, by the equations at the head of this file.

    The suffixes name axes: B batch, L length, D d_model, H heads, K features of
    a key, U features of a value.

    Args:
      x_BLD: the input.
      ctx: the context of the layer, with documents and padding.
      cache: the state after the tokens before; None: it is zero, and none is
        kept.

    Returns:
      The output [B, L, D], the cache after these tokens, and an empty report.
    """
    # The input, mixed with that of the token before by other shares for each
    # thing that is made of it.
    sizes = self.sizes
    mixer.check_context_of_recurrence(self.config.mixer, ctx)
    valid_BL = None if cache is None else ctx.valid_BL
    mixed, input_B1D = self._mix_with_previous_token(
        x_BLD, ctx=ctx, cache=cache, valid_BL=valid_BL)

    # Queries r, keys k and values v.
    key_shape, value_shape = (
        (sizes.heads, sizes.key_dim), (sizes.heads, sizes.value_dim))
    q_BLHK = self.project(
        'query', mixed['query'], self.key_axes, key_shape, ctx)
    k_BLHK = self.project('key', mixed['key'], self.key_axes, key_shape, ctx)
    k_BLHK = k_BLHK.astype(jnp.float32)
    v_BLHU = self.project(
        'value', mixed['value'], layer.VALUE_AXES, value_shape, ctx)
    v_BLHU = v_BLHU.astype(jnp.float32)

    # Decays w, whose logarithm is at least -exp(-1/2); rates a; and the gate.
    decay_bias_HK = self._declare_by_feature(
        'decay_bias', decay_bias, key_shape)
    decay_BLHK = decay_bias_HK + self.project_low_rank(
        'decay', mixed['decay'], features=sizes.key_dim, rank=sizes.decay_rank,
        through=jnp.tanh)
    log_decay_BLHK = -MOST_LOG_DECAY * jax.nn.sigmoid(decay_BLHK)
    rate_bias_HK = self._declare_by_feature('rate_bias', rate_bias, key_shape)
    rate_BLHK = jax.nn.sigmoid(rate_bias_HK + self.project_low_rank(
        'rate', mixed['rate'], features=sizes.key_dim, rank=sizes.rate_rank))
    gate_BLHU = self.project_low_rank(
        'gate', mixed['gate'], features=sizes.value_dim, rank=sizes.gate_rank,
        through=jax.nn.sigmoid)

    # The key kappa that is removed from the state, and k' that is written.
    removal_HK = self._declare_by_feature(
        'removal_scale', removal_scale, key_shape)[0, 0]
    removed_BLHK = features.normalize_length(
        features.multiply_by_weights(k_BLHK, removal_HK))
    boost_HK = self._declare_by_feature(
        'boost_scale', nn.initializers.constant(1.02), key_shape)
    k_BLHK *= 1 + boost_HK * (rate_BLHK - 1)

    # A token removes in its first step, and writes in its second: the first has
    # the value 0, and the second erases nothing. The recurrence decays the
    # state before the first step, but kappa is to meet it undecayed, so kappa
    # is divided by the decay.
    keys = _interleave_steps(rate_BLHK * removed_BLHK, k_BLHK)
    values = _interleave_steps(jnp.zeros_like(v_BLHU), v_BLHU)
    erase = _interleave_steps(
        removed_BLHK * jnp.exp(-log_decay_BLHK), jnp.zeros_like(k_BLHK))
    inputs = recurrence.Inputs(
        q_BLJK=q_BLHK, k_BLJK=keys, v_BLHU=values,
        log_decay_BLHK=log_decay_BLHK, erase_BLJK=erase)
    o_BLHU, state_BHKU = recurrence.run_recurrence(
        layer.reset_at_documents(inputs, ctx, keeps_state=cache is not None),
        cache and cache.state_BHKU)
    if cache is not None:
      cache = State(state_BHKU=state_BHKU, input_B1D=input_B1D)

    # The norm, the token's own value by its bonus, and the gate.
    norm = functools.partial(
        group_norm, eps=sizes.value_dim * self.config.norm_eps)
    scale_HU = self._declare_by_feature(
        'out_norm_scale', nn.initializers.ones, value_shape)
    bias_HU = self._declare_by_feature(
        'out_norm_bias', nn.initializers.zeros, value_shape)
    o_BLHU = layers.recompute_in_backward(norm)(o_BLHU, scale_HU, bias_HU)
    bonus_HK = self._declare_by_feature(
        'bonus_scale', nn.initializers.constant(-0.04), key_shape)[0, 0]
    bonus_BLH = features.inner_products(
        q_BLHK.astype(jnp.float32),
        features.multiply_by_weights(k_BLHK, bonus_HK))
    o_BLHU += features.scale_vectors(v_BLHU, bonus_BLH)
    return self.project_output(o_BLHU * gate_BLHU, ctx), cache, Report()

  def _mix_with_previous_token(
      self, x_BLD: jax.Array, ctx: Context, cache: Optional[State],
      valid_BL: Optional[jax.Array]
      ) -> tuple[dict[str, jax.Array], jax.Array]:
    """Mixes each token's input with that of the token before it (RWKV's token
    shift). Each use s of the input, such as to make queries or keys, has
    learned shares m_s of its own:

      x_s,l = m_s x_(l-1) + (1 - m_s) x_l       for each s of SHIFTED

    The suffixes name axes: B batch, L length, S uses, D d_model.

    Args:
      x_BLD: the layer's input.
      ctx: the context of the layer.
      cache: the layer's cache, which has the last input; None: there is none.
      valid_BL: 0 on padding; None: there is no padding.

    Returns:
      {name of the use: mixed input [B, L, D]}, and the input of the last token
      that is no padding, [B, 1, D].
    """
    D, S = x_BLD.shape[2], len(SHIFTED)
    share_SD = declare(self, 'shift_conv', init=initial_shares_of_shift,
                       shape=(S, D), role=Role((None, 'embed')))

    def repeat_for_each_use(x: jax.Array) -> jax.Array:
      """Repeats x [B, length, D] for the S uses: [B, length, S, D]."""
      return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], S, D))

    before_B1SD = None
    if cache is not None:
      before_B1SD = repeat_for_each_use(cache.input_B1D)

    # Mixing is a convolution over two tokens, the one before and the token
    # itself. `convolve` takes care of documents and caches; its "heads" are the
    # S uses of the same input.
    filter_2SD = jnp.stack([share_SD, 1 - share_SD])
    x_BLSD, last_B1SD = features.convolve(
        repeat_for_each_use(x_BLD), filter_2SD, before_BWHK=before_B1SD,
        segment_ids_BL=ctx.segment_ids_BL, valid_BL=valid_BL)
    mixed = {}
    for i, name in enumerate(SHIFTED):
      mixed[name] = x_BLSD[:, :, i]
    # The last input is the same for all uses.
    return mixed, last_B1SD[:, :, 0]

  def _declare_by_feature(self, name: str, init: Callable,
                          shape: tuple[int, int]) -> jax.Array:
    """Declares a number of each feature of the heads, float32 [1, 1, H, K]."""
    return declare(self, name, init=init, shape=shape,
                   role=Role(('heads', 'head'))).astype(jnp.float32)[None, None]


def _interleave_steps(first_BLHK: jax.Array, second_BLHK: jax.Array
                      ) -> jax.Array:
  """Interleaves what tokens have in their two steps, so that the steps follow
  one another along the row: [B, L, H, K] each -> [B, 2 L, H, K]."""
  B, L, _, K = first_BLHK.shape
  steps = jnp.stack((first_BLHK, second_BLHK), 3)
  return layer.steps_to_places(2, steps.reshape(B, L, -1, K))


def group_norm(o_BLHU: jax.Array, scale_HU: jax.Array, bias_HU: jax.Array, *,
               eps: float) -> jax.Array:
  """Returns the outputs of each head less their mean and over their deviation,
  times a scale, plus a bias, in float32."""
  o_BLHU -= o_BLHU.mean(-1, keepdims=True)
  square_BLH = jnp.square(o_BLHU).mean(-1)
  return features.multiply_by_weights(features.scale_vectors(
      o_BLHU, jax.lax.rsqrt(square_BLH + eps)), scale_HU[0, 0]) + bias_HU


# Initial values of the authors' program, of a layer in the middle of its stack.


def initial_shares_of_shift(key: jax.Array, shape: tuple[int, ...],
                            dtype: jnp.dtype):
  """Initialises the shares of the token before, [S, D], as SHIFTED says."""
  del key
  part_D = np.arange(shape[1]) / shape[1]
  return jnp.asarray([1 - part_D ** p for p in SHIFTED.values()], dtype)


def _initializer_by_feature(
    value: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> Callable[..., jax.Array]:
  """Makes an initialiser for a parameter [H heads, K features], whose initial
  values follow from the index of the feature and are not random (RWKV-7).

  Args:
    value: a function (place_HK, zigzag_K) -> initial values [H, K]. place_HK
      rises from 0 to 1 over the features of all heads. zigzag_K is x |x|, where
      x rises from -1 to 1 over the features of one head.

  Returns:
    The initialiser, a function of (random key, shape, dtype).
  """
  def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype
           ) -> jax.Array:
    """Returns the initial values."""
    del key  # nothing is drawn
    H, K = shape
    place_HK = np.linspace(0, 1, H * K).reshape(shape)
    x_K = np.linspace(-1, 1, K)
    zigzag_K = x_K * abs(x_K)
    return jnp.asarray(value(place_HK, zigzag_K), dtype)
  return init


decay_bias = _initializer_by_feature(
    lambda n_HK, zigzag_K: 6 * n_HK ** (1 + 0.5 ** 0.3) - 5.5 + 2.5 * zigzag_K)
rate_bias = _initializer_by_feature(
    lambda n_HK, zigzag_K: -0.19 + 0.3 * zigzag_K + 0.4 * (n_HK - 0.5))
removal_scale = _initializer_by_feature(
    lambda n_HK, _: 0.71 - 0.1 * (n_HK - 0.5))


class Goose(layer.Recurrence):
  """The entry of RWKV-7."""

  def cache(self, config: ModelConfig, shape: tuple[int, ...]) -> State:
    # The state does not grow with the number of tokens, the last of `shape`.
    sizes, rows = config.part(RWKV7Config), shape[:-1]
    state_BHKU = jnp.zeros((*rows, sizes.heads, sizes.key_dim, sizes.value_dim))
    input_B1D = jnp.zeros((*rows, 1, config.d_model), config.compute_dtype)
    return State(state_BHKU, input_B1D)

  def check(self, config: ModelConfig, stack: str) -> None:
    super().check(config, stack)
    require(config.parametrization != 'mup',
            f'model.mixer is {config.mixer!r}, and '
            "model.parametrization is 'mup', which says nothing of its shares, "
            'removed keys and boosts: choose standard')
