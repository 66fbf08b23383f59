"""Mamba-2: a state space model whose state decays by one number a head (Dao and
Gu 2024, "Transformers are SSMs", arXiv 2405.21060; as in state-spaces/mamba).

  x, B, C = silu(conv(W_x u)), silu(conv(W_B u)), silu(conv(W_C u))
  dt      = softplus(W_dt u + bias)                 a number a head
  S_t     = exp(dt_t A) S_t-1 + B_t (dt_t x_t)^T,   A = -exp(A_log)
  y_t     = S_t^T C_t + D x_t
  out     = W_o RMSNorm(y * silu(W_z u))

That is linear attention with a decay: C are queries, B keys and x values, and
they are called so here. A head of keys serves a group of heads of values. The
norm is over the heads of a group, or over all.

layer.py has what is not of this recurrence alone. In names, J counts the
groups, H the heads, K the state's features and U the features of a head.
"""

from collections.abc import Callable
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.recurrent import layer, recurrence, features
from architectures.parts.sharding import Role, declare
from common.errors import RequestError
from common.fields import field, FUNCTION, MOST_TAPS, SHAPES, ReadIf

NORMS_OVER = ('group', 'all')


@dataclasses.dataclass(frozen=True)
class Groups:
  """The sizes. Those left open give heads of attention's size, and twice as
  many ("expand" is 2 in the published models)."""
  heads: int = field(
      0, 'heads of x, each with a state; derived: 2 num_heads', resume=SHAPES)
  head_dim: int = field(0, 'features of a head; derived: head_dim',
                        resume=SHAPES)
  groups: int = field(
      1, 'groups of heads, each of which shares one B and one C', above=0,
      resume=SHAPES)
  state: int = field(128, 'features of B and C', above=0, resume=SHAPES)
  householders = 1

  @property
  def key_heads(self) -> int:
    """B and C of a group serve its heads, as keys and queries serve values."""
    return self.groups

  @property
  def value_heads(self) -> int:
    return self.heads

  @property
  def key_dim(self) -> int:
    return self.state

  @property
  def value_dim(self) -> int:
    return self.head_dim

  def derived(self, config: ModelConfig):
    return dataclasses.replace(
        self, heads=self.heads or 2 * config.num_heads,
        head_dim=self.head_dim or config.head_dim)


@dataclasses.dataclass(frozen=True)
class Mamba2Config(Groups):
  """The fields of mixer mamba2."""
  conv: int = field(
      4, 'tokens that a convolution sees, the token itself included', least=1,
      most=MOST_TAPS, resume=SHAPES)
  conv_bias: bool = field(True, 'whether the convolutions have a bias')
  norm_over: str = field(
      'group', 'one norm is over the heads of a group, or all',
      choices=NORMS_OVER, resume=FUNCTION)
  least_step: float = field(
      0.0, 'lower bound of dt, the step from one token to the next', least=0,
      resume=FUNCTION)
  most_step: float = field(
      0.0, 'its upper bound; 0: there is none', least=0, resume=FUNCTION)

  def conditions_of_reading(self, config: ModelConfig) -> dict[str, ReadIf]:
    """Returns the fields that nothing reads as long as another field has its
    value, each with that field and what it would have to be."""
    del config
    if self.groups > 1:
      return {}
    return {'norm_over': ReadIf('mamba2.groups', 'is not 1')}


class Mamba2(layer.Layer):
  """The mixer mamba2, which reads no positions."""
  settings = Mamba2Config

  @property
  def key_axes(self) -> tuple[str | None, str | None]:
    """One group is whole on every device. Neither groups nor the state grow
    with the width."""
    return ('groups' if self.sizes.groups > 1 else None), None

  def inputs(self, x_BLD: jax.Array, q_BLJK: jax.Array, k_BLJK: jax.Array,
             v_BLHU: jax.Array, ctx: Context) -> recurrence.Inputs:
    """Makes the inputs of Mamba-2's recurrence over tokens t. The state h of a
    head decays by exp(dt A) and takes in dt x:

      h_t = exp(dt_t A) h_t-1 + dt_t x_t B_t^T,   o_t = h_t C_t

    The suffixes name axes: B batch, L length, D d_model, J heads of keys, K
    features of a key, H heads of values, U features of a value.

    Args:
      x_BLD: the layer's input, of which the step dt is made.
      q_BLJK: C in the equation.
      k_BLJK: B in the equation.
      v_BLHU: x in the equation.
      ctx: the context of the layer; not read here.

    Returns:
      C as queries, B as keys, dt x as values, and dt A, the logarithm of the
      decay.
    """
    del ctx
    sizes = self.sizes
    # The step dt of each head, within bounds; a most_step of 0 is no bound.
    dt_BLH = jnp.clip(
        self.step(x_BLD), sizes.least_step, sizes.most_step or None)
    scale_H = self.declare_by_head(
        'decay_scale', layer.log_uniform_initializer(1.0))
    # The input of the state, and the logarithm of its decay, with the negative
    # A = -exp(scale) of each head.
    written_BLHU = features.scale_vectors(v_BLHU.astype(jnp.float32), dt_BLH)
    log_decay_BLH = -jnp.exp(scale_H)[None, None] * dt_BLH
    return recurrence.Inputs(
        q_BLJK=q_BLJK, k_BLJK=k_BLJK, v_BLHU=written_BLHU,
        log_decay_BLHK=log_decay_BLH[..., None])

  def normalise_and_gate(self, o_BLHU: jax.Array, x_BLD: jax.Array,
                         v_BLHU: jax.Array, ctx: Context) -> jax.Array:
    """Adds a skip connection to the results o of the recurrence, multiplies
    them by a gate and normalises them: RMSNorm((o + D x) silu(W_z u)).

    The suffixes name axes: B batch, L length, D d_model, H heads, U features of
    a head.

    Args:
      o_BLHU: the results of the recurrence.
      x_BLD: the layer's input, u in the equation.
      v_BLHU: the values, x in the equation.
      ctx: the context of the layer.

    Returns:
      The normalised results, [B, L, H, U].
    """
    sizes, shape = self.sizes, v_BLHU.shape[2:]
    # The skip connection D x with a number D for each head, and the gate.
    skip_H = self.declare_by_head('skip', nn.initializers.ones)
    o_BLHU += skip_H[None, None, :, None] * v_BLHU.astype(jnp.float32)
    gate_BLHU = self.project(
        'output_gate', x_BLD, axes=layer.VALUE_AXES, shape=shape, ctx=ctx)
    scale_HU = declare(
        self, 'out_norm_scale', init=nn.initializers.ones, shape=shape,
        role=Role(('heads', 'head')))
    # The norm is over the heads of a group, or over all heads as one group. The
    # backward pass computes it again, so that its inputs need not be kept.
    groups = sizes.groups if sizes.norm_over == 'group' else 1
    norm = functools.partial(
        gated_norm, groups=groups, eps=self.config.norm_eps)
    return layers.recompute_in_backward(norm)(o_BLHU, gate_BLHU, scale_HU)

  def step(self, x_BLD: jax.Array) -> jax.Array:
    """Returns dt, float32 [B, L, H]."""
    bias_H = self.declare_by_head('step_bias', layer.step_bias)
    step_BLH = self.project_to_heads('step', x_BLD)
    return jax.nn.softplus(step_BLH + bias_H[None, None])

  def declare_by_head(self, name: str, init: Callable) -> jax.Array:
    """Declares a number of each head; returns them in float32."""
    numbers_H = declare(
        self, name, init=init, shape=(self.sizes.heads,), role=Role(('heads',)))
    return numbers_H.astype(jnp.float32)


def gated_norm(y_BLHU: jax.Array, z_BLHU: jax.Array, scale_HU: jax.Array, *,
               groups: int, eps: float) -> jax.Array:
  """Multiplies the results of heads by a gate and normalises them, scale *
  RMSNorm(y silu(z)). The norm is over all features of a group of heads.

  The suffixes name axes: B batch, L length, H heads, U features of a head, J
  groups of heads, F features of a group.

  Args:
    y_BLHU: the results y of the heads.
    z_BLHU: the gate z before its SiLU.
    scale_HU: the scale of the norm.
    groups: J. Neighbouring heads form a group.
    eps: the epsilon of the norm.

  Returns:
    float32 [B, L, H, U].
  """
  B, L, H, U = y_BLHU.shape
  y_BLHU = y_BLHU * jax.nn.silu(z_BLHU.astype(jnp.float32))
  y_BLJF = y_BLHU.reshape(B, L, groups, -1)  # all features of a group
  square_BLJ = jnp.square(y_BLJF).mean(-1)
  y_BLJF = features.scale_vectors(y_BLJF, jax.lax.rsqrt(square_BLJ + eps))
  return features.multiply_by_weights(y_BLJF.reshape(B, L, H, U), scale_HU)


class Grouped(layer.Recurrence):
  """The entry of a recurrence whose groups of heads share B and C."""

  def __init__(self, module: type[layer.Layer], name: str):
    super().__init__(module)
    self.may_be_one = (f'{name}.groups',)

  def check(self, config: ModelConfig, stack: str) -> None:
    """Checks that a model can have this recurrence. The heads of values come
    in groups that share queries and keys, so there must be whole groups.

    Raises:
      RequestError: if the number of groups does not divide that of the heads,
        or for what no recurrence goes with.
    """
    sizes = config.part(self.module.settings)
    if sizes.heads % sizes.groups:
      raise RequestError(
          f'model.{config.mixer}.groups is {sizes.groups}, which does not '
          f'divide model.{config.mixer}.heads {sizes.heads}')
    super().check(config, stack)


class Mamba2Mixer(Grouped):
  """The entry of Mamba-2."""

  def check(self, config: ModelConfig, stack: str) -> None:
    """Checks that a model can have layers of Mamba-2.

    Raises:
      RequestError: if the least step dt is above the largest one, or for what
        the check of the superclass refuses.
    """
    super().check(config, stack)
    sizes = config.part(Mamba2Config)
    if sizes.most_step and sizes.least_step > sizes.most_step:
      raise RequestError(
          f'model.mamba2.least_step is {sizes.least_step}, above '
          f'model.mamba2.most_step {sizes.most_step}: choose it at most as '
          'large, or set most_step to 0, for no limit')
