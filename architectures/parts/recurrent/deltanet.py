"""Gated DeltaNet: the state of a head, [K, U], stands for all tokens before
(Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464; as in Qwen3-Next).

  q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x))
  q, k    = q / (|q| sqrt(K)), k / |k|        a head by itself
  b       = sigmoid(W_b x)                    doubled with `negative`
  log a   = -exp(A) softplus(W_a x + bias)    0 without `decay` (DeltaNet)
  S_t     = a_t (I - b_t k_t k_t^T) S_t-1 + b_t k_t v_t^T,   o_t = S_t^T q_t
  y       = W_o (RMSNorm(o) * silu(W_z x))    a head by itself

A step of the state has the eigenvalues a and a (1 - b), which with `negative`
are above -1 instead of 0 (Grazzi et al. 2024, arXiv 2411.12537). What is not
of this recurrence alone is in layer.py.
"""

import dataclasses

import jax

from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.recurrent import layer
from architectures.parts.recurrent import recurrence
from architectures.parts.recurrent import vectors
from configs.fields import field, FUNCTION, SHAPES


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig:
  """Of mixer deltanet. What is left open is as attention has it."""
  key_heads: int = field(0, 'heads of queries and keys; derived: num_heads',
                         resume=SHAPES)
  value_heads: int = field(0, 'a multiple of key_heads, which is the default',
                           resume=SHAPES)
  key_dim: int = field(0, "size of a head's query and key; derived: head_dim",
                       resume=SHAPES)
  value_dim: int = field(0, "size of a head's value; derived: head_dim",
                         resume=SHAPES)
  conv: int = field(
      4, 'tokens that a convolution sees, the token itself included', least=1,
      resume=SHAPES)
  decay: bool = field(
      True, 'the state decays (Gated DeltaNet), or not (DeltaNet)')
  negative: bool = field(
      False, 'rates up to 2, not 1: eigenvalues may be negative',
      resume=FUNCTION)

  def derived(self, c: ModelConfig) -> 'DeltaNetConfig':
    return dataclasses.replace(
        self, key_heads=self.key_heads or c.num_heads,
        value_heads=self.value_heads or self.key_heads or c.num_heads,
        key_dim=self.key_dim or c.head_dim,
        value_dim=self.value_dim or c.head_dim)


class DeltaNet(layer.Layer):
  """Positions are not read."""
  NAME = 'deltanet'
  settings = DeltaNetConfig

  def inputs(self, x_BLD: jax.Array, q_BLJK: jax.Array, k_BLJK: jax.Array,
             v_BLHU: jax.Array, ctx: Context) -> recurrence.Inputs:
    del ctx
    log_decay_BLHK = None
    if self.sizes.decay:
      log_decay_BLHK = self.softplus_decay(self.of_heads('decay', x_BLD),
                                           least=0.01)[..., None]
    return recurrence.Inputs(
        vectors.unit(q_BLJK, self.base_key_dim ** -0.5), vectors.unit(k_BLJK),
        v_BLHU, log_decay_BLHK, self.rate(x_BLD))
