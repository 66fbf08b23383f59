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

import jax

from architectures.parts.context import Context
from architectures.parts.recurrent import layer
from architectures.parts.recurrent import recurrence
from architectures.parts.recurrent import vectors


class DeltaNet(layer.Layer):
  """Positions are not read."""
  NAME = 'deltanet'

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
