"""Gated linear attention: a decay of each feature of a key, and no delta rule
(Yang et al. 2023, arXiv 2312.06635).

  q, k, v = W_q x, W_k x, W_v x       with `conv`: each through silu(conv(.))
  log a   = logsigmoid(W_up W_down x + bias) / temperature      K of a head
  S_t     = Diag(a_t) S_t-1 + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
  y       = W_o (RMSNorm(o) * silu(W_z x))                      a head by itself

The convolutions are an option of the authors' program, which the paper does not
have. What is not of this recurrence alone is in layer.py.
"""

import dataclasses

import jax
import jax.numpy as jnp

from architectures.parts import linear
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.recurrent import layer
from architectures.parts.recurrent import recurrence
from configs.fields import field, FUNCTION, SHAPES


@dataclasses.dataclass(frozen=True)
class GLAConfig:
  """Of mixer gla. The paper's keys are half as wide as the values."""
  heads: int = field(0, 'heads, each with a state; derived: num_heads',
                     resume=SHAPES)
  key_dim: int = field(
      0, "size of a head's query and key; derived: head_dim / 2",
      resume=SHAPES)
  value_dim: int = field(0, "size of a head's value; derived: head_dim",
                         resume=SHAPES)
  conv: int = field(0, 'tokens that a convolution sees; 0: no convolution',
                    resume=SHAPES)
  rank: int = field(16, 'rank of the product for decays', least=1,
                    resume=SHAPES)
  temperature: float = field(16.0, 'divides the logarithms of the decays',
                             above=0, resume=FUNCTION)

  @property
  def key_heads(self) -> int:
    return self.heads

  @property
  def value_heads(self) -> int:
    return self.heads

  def derived(self, c: ModelConfig) -> 'GLAConfig':
    return dataclasses.replace(
        self, heads=self.heads or c.num_heads,
        key_dim=self.key_dim or -(-c.head_dim // 2),
        value_dim=self.value_dim or c.head_dim)


class GLA(layer.Layer):
  """Positions are not read."""
  NAME = 'gla'
  settings = GLAConfig

  def inputs(self, x_BLD: jax.Array, q_BLJK: jax.Array, k_BLJK: jax.Array,
             v_BLHU: jax.Array, ctx: Context) -> recurrence.Inputs:
    del ctx
    d = self.sizes
    bias_HK = linear.bias(self, 'decay_bias', (d.heads, d.key_dim),
                          ('heads', 'head'))
    log_decay_BLHK = jax.nn.log_sigmoid(linear.add_bias(
        self.low_rank('decay', x_BLD, d.key_dim), bias_HK)) / d.temperature
    scale = jnp.asarray(self.base_key_dim ** 0.5 / d.key_dim, q_BLJK.dtype)
    return recurrence.Inputs(scale * q_BLJK, k_BLJK, v_BLHU, log_decay_BLHK)
