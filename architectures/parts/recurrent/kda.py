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

import dataclasses

import jax

from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.recurrent import layer
from architectures.parts.recurrent import recurrence
from architectures.parts.recurrent import vectors
from configs.errors import require
from configs.fields import field, FUNCTION, SHAPES


@dataclasses.dataclass(frozen=True)
class KDAConfig:
  """Of mixer kda. What is left open is as attention has it, and products of low
  rank are as wide as a head's value."""
  key_heads: int = field(0, 'heads of queries and keys; derived: num_heads',
                         resume=SHAPES)
  value_heads: int = field(0, 'a multiple of key_heads, which is the default',
                           resume=SHAPES)
  key_dim: int = field(0, "size of a head's query and key; derived: head_dim",
                       resume=SHAPES)
  value_dim: int = field(0, "size of a head's value; derived: head_dim",
                         resume=SHAPES)
  conv: int = field(4, 'tokens that a convolution sees; 0: no convolution',
                    resume=SHAPES)
  rank: int = field(
      0, "rank of the decays' and gate's product; derived: value_dim",
      resume=SHAPES)
  negative: bool = field(
      False, 'rates up to 2, not 1: eigenvalues may be negative',
      resume=FUNCTION)

  def derived(self, c: ModelConfig) -> 'KDAConfig':
    value_dim = self.value_dim or c.head_dim
    return dataclasses.replace(
        self, key_heads=self.key_heads or c.num_heads,
        value_heads=self.value_heads or self.key_heads or c.num_heads,
        key_dim=self.key_dim or c.head_dim, value_dim=value_dim,
        rank=self.rank or value_dim)


class KDA(layer.Layer):
  """Positions are not read."""
  NAME = 'kda'
  settings = KDAConfig
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
