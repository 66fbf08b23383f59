"""Kimi Delta Attention: Gated DeltaNet with a decay of each feature of a key
(Kimi Team 2025, "Kimi Linear", arXiv 2510.26692).

  q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x))
  q, k    = q / (|q| sqrt(K)), k / |k|                  a head by itself
  b       = sigmoid(W_b x)                              doubled with `negative`
  log a   = -exp(A) softplus(W_up W_down x + bias)      K numbers of a head
  S_t     = (I - b_t k_t k_t^T) Diag(a_t) S_t-1 + b_t k_t v_t^T
  o_t     = S_t^T q_t
  y       = W_o (RMSNorm(o) * sigmoid(W_up' W_down' x)) a head by itself

The state first decays, and what the key finds in it then is corrected. Both
products of low rank have `rank`. What is not of this recurrence alone is in
layer.py.
"""

import jax

from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.recurrent import layer
from architectures.parts.recurrent import recurrence
from architectures.parts.recurrent import vectors
from configs.errors import require


class KDA(layer.Layer):
  """Positions are not read."""
  NAME = 'kda'
  PRODUCTS = frozenset({'query', 'key', 'value', 'out'})

  def inputs(self, x_BLD: jax.Array, q_BLJK: jax.Array, k_BLJK: jax.Array,
             v_BLHU: jax.Array, ctx: Context) -> recurrence.Inputs:
    del ctx
    d = self.sizes
    log_decay_BLHK = self.softplus_decay(
        self.low_rank('decay', x_BLD, d.key_dim), least=1.0)
    return recurrence.Inputs(
        vectors.unit(q_BLJK, self.base_key_dim ** -0.5), vectors.unit(k_BLJK),
        v_BLHU, log_decay_BLHK, self.rate(x_BLD))

  def gate(self, x_BLD: jax.Array, ctx: Context) -> jax.Array:
    del ctx
    return jax.nn.sigmoid(self.low_rank('gate', x_BLD, self.sizes.value_dim))


def check(name: str, c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what a layer of KDA cannot be."""
  layer.check(name, c, stack)
  require(c.head_widening == 1, "model.parametrization is 'mup' and a head is "
          f'{c.head_widening:g} times as wide as at the base, but the products '
          f'of low rank of model.mixer {name!r} have the rank of the base: set '
          'model.mup_base_head_dim to model.head_dim, and widen by more heads')
