"""Mamba-3: Mamba-2 whose state is complex and takes in each token twice (Lahoti
et al. 2026, arXiv 2603.15569; as in state-spaces/mamba, in its form with one
input and one output a head).

  x, B, C = W_x u, RMSNorm(W_B u) + bias, RMSNorm(W_C u) + bias'
  dt, l   = softplus(W_dt u + bias''), sigmoid(W_l u)       numbers of a head
  a_t     = exp(-dt_t max(softplus(W_A u_t), 0.0001))
  r_t     = r_t-1 + dt_t pi tanh(W_r u_t)                   angles of a head
  S_t     = a_t S_t-1 + (1 - l_t) dt_t a_t B_t-1 x_t-1^T + l_t dt_t B_t x_t^T
  y_t     = S_t^T C_t + D x_t
  out     = W_o (y * silu(W_z u))

The second line of S is the trapezoidal rule, of which Mamba-2 has l = 1, and
stands in the place of its convolutions. B and C belong to a group of heads, and
their biases to a head; in S they are turned by r, as rotary positions turn,
which is what a state of complex numbers does. Feature i is paired with the one
`turned` / 2 of the state after it; the authors pair neighbours, which is a
permutation of the features.

S without its last term, S', is a recurrence of the usual form, in which a token
writes what the one before it had, and g_t = l_t dt_t:

  S'_t = a_t S'_t-1 + a_t (g_t-1 + (1 - l_t) dt_t) B_t-1 x_t-1^T
  y_t  = S'_t^T C_t + (g_t B_t . C_t + D) x_t

The form with several inputs and outputs a head (MIMO) is not here. In names, A
counts the angles of a head, and the other letters are those of mamba2.py.
"""

import dataclasses
from typing import Optional

from flax import struct
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import layers, mixer
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context, Report
from architectures.parts.recurrent import features, layer, mamba2, recurrence
from architectures.parts.sharding import Role, declare
from common.errors import RequestError
from common.fields import field, SHAPES

# The least rate at which a state decays, as in the authors' program.
LEAST_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Mamba3Config(mamba2.Groups):
  """The fields of mixer mamba3."""
  turned: float = field(
      0.5, 'the part of the features of B and C that turns; 0: a real state',
      least=0, most=1, resume=SHAPES)
  conv = 0

  @property
  def angles(self) -> int:
    return int(self.state * self.turned) // 2


@struct.dataclass
class State:
  """The cache of a layer: S' after a row's last token, the angles there, and B,
  x and g of that token."""
  state_BHKU: jax.Array
  angle_B1HA: jax.Array
  key_B1HK: jax.Array
  value_B1HU: jax.Array
  step_B1H: jax.Array


class Mamba3(mamba2.Mamba2):
  """The mixer mamba3, which reads no positions."""
  settings = Mamba3Config

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[State]):
    """Computes Mamba-3, by the equations of S' at the head of this file.

    The suffixes name axes: B batch, L length, D d_model, H heads, K entries of
    the state of a feature, U features of a head, A angles of a head.

    Args:
      x_BLD: the input, u in the equations.
      ctx: the context of the layer, with documents and padding.
      cache: the state after the tokens before; None: it is zero, and none is
        kept.

    Returns:
      The output [B, L, D], the cache after these tokens, and an empty report.
    """
    sizes, L = self.sizes, x_BLD.shape[1]
    mixer.check_context_of_recurrence(self.config.mixer, ctx)
    # Padding matters only where a state goes on after it.
    valid_BL = None if cache is None else ctx.valid_BL
    before = cache or empty_state(self.config, x_BLD.shape[:2])

    # The step dt, the decay's log a, and g = l dt, the weight by which a token
    # writes itself; dt - g is the weight for the token before it.
    dt_BLH = self.step(x_BLD)
    log_decay_BLH = -dt_BLH * self._decay_rate(x_BLD)
    now_BLH = dt_BLH * jax.nn.sigmoid(self.project_to_heads('share', x_BLD))

    # C, B, which are turned, and x.
    angle_BLHA = self._angles(
        x_BLD, dt_BLH=dt_BLH, valid_BL=valid_BL, before_B1HA=before.angle_B1HA)
    q_BLHK = self._project_and_rotate(
        'query', x_BLD, angle_BLHA=angle_BLHA, ctx=ctx)
    k_BLHK = self._project_and_rotate(
        'key', x_BLD, angle_BLHA=angle_BLHA, ctx=ctx)
    v_BLHU = self.project(
        'value', x_BLD, axes=layer.VALUE_AXES,
        shape=(sizes.heads, sizes.head_dim), ctx=ctx).astype(jnp.float32)

    # A token writes B and x of the one before it, by both of their steps, so
    # keys, values and steps move by one place: the cached ones stand in front.
    all_keys = jnp.concatenate((before.key_B1HK, k_BLHK), 1)
    all_values = jnp.concatenate((before.value_B1HU, v_BLHU), 1)
    all_steps = jnp.concatenate((before.step_B1H, now_BLH), 1)
    key_BLHK, value_BLHU = all_keys[:, :L], all_values[:, :L]
    step_BLH = all_steps[:, :L]
    value_BLHU = features.mask_other_documents(
        value_BLHU, ctx.segment_ids_BL, 1)
    written_BLHU = features.scale_vectors(
        value_BLHU, jnp.exp(log_decay_BLH) * (step_BLH + dt_BLH - now_BLH))
    inputs = recurrence.Inputs(
        q_BLJK=q_BLHK, k_BLJK=key_BLHK, v_BLHU=written_BLHU,
        log_decay_BLHK=log_decay_BLH[..., None])
    o_BLHU, state_BHKU = recurrence.run_recurrence(
        layer.reset_at_documents(inputs, ctx, keeps_state=cache is not None),
        before.state_BHKU)

    # S' lacks the token's own term, (g B . C) x, which is added here with the
    # skip D x.
    skip_H = self.declare_by_head('skip', nn.initializers.ones)
    product_BLH = features.inner_products(q_BLHK, k_BLHK)
    share_BLH = skip_H[None, None] + now_BLH * product_BLH
    o_BLHU += features.scale_vectors(v_BLHU, share_BLH)
    if cache is not None:
      cache = State(
          state_BHKU=state_BHKU, angle_B1HA=angle_BLHA[:, -1:],
          key_B1HK=features.last_inputs(
              all_keys, count=1, length=L, valid_BL=valid_BL),
          value_B1HU=features.last_inputs(
              all_values, count=1, length=L, valid_BL=valid_BL),
          step_B1H=features.last_inputs(
              all_steps, count=1, length=L, valid_BL=valid_BL))
    o_BLHU = o_BLHU * self.gate(x_BLD, ctx)
    return self.project_output(o_BLHU, ctx), cache, Report()

  def _decay_rate(self, x_BLD: jax.Array) -> jax.Array:
    """Returns how fast the state of each head decays, float32 [B, L, H]."""
    rate_BLH = jax.nn.softplus(self.project_to_heads('decay', x_BLD))
    return jnp.maximum(rate_BLH, LEAST_RATE)

  def _angles(self, x_BLD: jax.Array, dt_BLH: jax.Array,
              valid_BL: Optional[jax.Array], before_B1HA: jax.Array
              ) -> jax.Array:
    """Computes the angles r by which Mamba-3 rotates queries and keys. They add
    up over the tokens t:

      r_t = r_t-1 + dt_t pi tanh(W_r u_t)

    The sums are taken modulo 2 pi, so that they stay precise in long rows.

    The suffixes name axes: B batch, L length, D d_model, H heads, A angles of a
    head.

    Args:
      x_BLD: the layer's input u.
      dt_BLH: the step dt of each head.
      valid_BL: 0 on padding, which leaves the angles as they are; None: there
        is no padding.
      before_B1HA: the angles of the token before the first one.

    Returns:
      The angles, float32 [B, L, H, A].
    """
    config, A = self.config, self.sizes.angles
    if not A:
      return jnp.zeros((*dt_BLH.shape, 0))

    # How far each token turns the angles: at most pi dt. Heads differ only in
    # dt. The number of angles does not grow with the width of the model, so muP
    # divides them by the widening, as it does logits.
    w_DA = layers.weight(
        self, 'angle', shape=(config.d_model, A), axes=('embed', None),
        output=True)
    y_BLA = layers.einsum(
        'BLD,DA->BLA', x_BLD, w=w_DA, dtype=config.compute_dtype)
    y_BLA = y_BLA.astype(jnp.float32) / config.widening
    turn_BLHA = dt_BLH[..., None] * (np.pi * jnp.tanh(y_BLA))[:, :, None]
    if valid_BL is not None:
      turn_BLHA = jnp.where(valid_BL[..., None, None] != 0, turn_BLHA, 0)

    # Add up the turns, from the angles before the first token on. These stand
    # first in the sums and are dropped.
    all_turns = jnp.concatenate([before_B1HA, turn_BLHA], 1)
    return layers.count_flops_by_result(_sum_turns, 0)(all_turns)[:, 1:]

  def _project_and_rotate(self, name: str, x_BLD: jax.Array,
                          angle_BLHA: jax.Array, ctx: Context) -> jax.Array:
    """Makes Mamba-3's keys or queries, RMSNorm(W u) + bias, and rotates their
    first 2 A features by A angles.

    The suffixes name axes: B batch, L length, D d_model, J groups of heads, H
    heads, K features of a key, A angles of a head.

    Args:
      name: 'key' (B in the paper) or 'query' (C in the paper).
      x_BLD: the layer's input u.
      angle_BLHA: the angles.
      ctx: the context of the layer.

    Returns:
      float32 [B, L, H, K].
    """
    sizes, A = self.sizes, angle_BLHA.shape[-1]
    norm = features.RMSNorm(self.config, name=f'{name}_norm')
    x_BLJK = self.project(
        name, x_BLD, axes=self.key_axes, shape=(sizes.groups, sizes.state),
        ctx=ctx)
    x_BLJK = norm(x_BLJK)

    # The heads of a group share the product. Each head has its own bias.
    bias_HK = declare(
        self, f'{name}_bias', init=nn.initializers.ones,
        shape=(sizes.heads, sizes.state), role=Role(('heads', None)))
    x_BLHK = jnp.repeat(
        x_BLJK.astype(jnp.float32), sizes.heads // sizes.groups, 2)
    x_BLHK = x_BLHK + bias_HK.astype(jnp.float32)[None, None]

    # Features i and A + i are a pair, which turns by angle i. The features
    # after the first 2 A do not turn.
    first, second, unrotated = jnp.split(x_BLHK, (A, 2 * A), -1)
    cos, sin = jnp.cos(angle_BLHA), jnp.sin(angle_BLHA)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin, unrotated], -1)


def _sum_turns(turn_BLHA: jax.Array) -> jax.Array:
  """Returns the sums of all turns up to each place, modulo 2 pi."""
  def add(x: jax.Array, y: jax.Array) -> jax.Array:
    return (x + y) % (2 * np.pi)
  return jax.lax.associative_scan(add, turn_BLHA, axis=1)


def empty_state(config: ModelConfig, shape: tuple[int, ...]) -> State:
  """Returns an empty cache for a Mamba-3 layer, which is its state before the
  first token: all zeros.

  The suffixes name axes: B rows of the batch, H heads, K features of a key, U
  features of a value, A angles; the 1 is the last token.

  Args:
    config: the config of the layer.
    shape: (..., rows, tokens). The state does not grow with the tokens.
  """
  sizes, rows = config.part(Mamba3Config), shape[:-1]
  heads_of_last_token = (*rows, 1, sizes.heads)
  return State(
      state_BHKU=jnp.zeros((*rows, sizes.heads, sizes.state, sizes.head_dim)),
      angle_B1HA=jnp.zeros((*heads_of_last_token, sizes.angles)),
      key_B1HK=jnp.zeros((*heads_of_last_token, sizes.state)),
      value_B1HU=jnp.zeros((*heads_of_last_token, sizes.head_dim)),
      step_B1H=jnp.zeros(heads_of_last_token))


class Mamba3Mixer(mamba2.Grouped):
  """The entry of Mamba-3."""

  def cache(self, config: ModelConfig, shape: tuple[int, ...]) -> State:
    return empty_state(config, shape)

  def check(self, config: ModelConfig, stack: str) -> None:
    super().check(config, stack)
    m = config.part(Mamba3Config)
    if m.turned and not m.angles:
      raise RequestError(
          f'model.mamba3.turned is {m.turned}, which is less than a pair of '
          f'model.mamba3.state {m.state}: choose more, or 0')
