"""The retention of RetNet: a decay of each head that never changes, and no
delta rule (Sun et al. 2023, arXiv 2307.08621).

  q, k, v = turn(W_q x), turn(W_k x), W_v x   by rotary positions
  a       = 1 - 2^(-5 - h)                    of head h = 0, 1, ...
  S_t     = a S_t-1 + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
  y       = W_o (RMSNorm(o) * silu(W_z x))    a head by itself

Queries and keys are turned if model.position is rope, as the paper's are. What
is not of this recurrence alone is in layer.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import positions
from architectures.parts import rotary
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.recurrent import layer
from architectures.parts.recurrent import recurrence
from configs.errors import require
from configs.fields import field, SHAPES


@dataclasses.dataclass(frozen=True)
class RetNetConfig:
  """Of mixer retnet. The paper's values are twice as wide as the keys."""
  heads: int = field(0, 'heads, each with a state; derived: num_heads',
                     resume=SHAPES)
  key_dim: int = field(0, "size of a head's query and key; derived: head_dim",
                       resume=SHAPES)
  value_dim: int = field(0, "size of a head's value; derived: 2 head_dim",
                         resume=SHAPES)

  @property
  def key_heads(self) -> int:
    return self.heads

  @property
  def value_heads(self) -> int:
    return self.heads

  @property
  def conv(self) -> int:
    return 0

  def derived(self, c: ModelConfig) -> 'RetNetConfig':
    return dataclasses.replace(
        self, heads=self.heads or c.num_heads,
        key_dim=self.key_dim or c.head_dim,
        value_dim=self.value_dim or 2 * c.head_dim)


class RetNet(layer.Layer):
  """Its positions, if they turn, are those of a token in its document."""
  NAME = 'retnet'
  settings = RetNetConfig

  def inputs(self, x_BLD: jax.Array, q_BLJK: jax.Array, k_BLJK: jax.Array,
             v_BLHU: jax.Array, ctx: Context) -> recurrence.Inputs:
    del x_BLD
    c, d = self.config, self.sizes
    rotate = positions.of(c).rotate
    if rotate:
      q_BLJK, k_BLJK = (rotate(x, ctx.positions_BL, turned(c), ctx.length)
                        for x in (q_BLJK, k_BLJK))
    scale = jnp.asarray(self.base_key_dim ** 0.5 / d.key_dim, q_BLJK.dtype)
    log_H = np.log1p(-2.0 ** (-5 - np.arange(d.heads)))
    log_decay_BLH1 = jnp.broadcast_to(
        jnp.asarray(log_H, jnp.float32)[None, None, :, None],
        (*v_BLHU.shape[:3], 1))
    return recurrence.Inputs(scale * q_BLJK, k_BLJK, v_BLHU, log_decay_BLH1)


def turned(c: ModelConfig) -> ModelConfig:
  """Returns a config whose heads are the queries and keys that are turned."""
  return dataclasses.replace(c, head_dim=c.retnet.key_dim)


def check(name: str, c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what a layer of retention cannot be."""
  layer.check(name, c, stack)
  require(not positions.of(c).bias, 'model.mixer is \'retnet\', which has no '
          f'scores for the bias of model.position {c.position!r}: choose rope '
          'or none')
  if positions.of(c).rotate:
    require(not rotary.SCALINGS[c.rope.scaling].by_length, 'model.mixer is '
            "'retnet', whose state holds keys that were turned when the row "
            f'was shorter, and model.rope.scaling {c.rope.scaling!r} turns by '
            'the length of the row: choose another')
    dim = rotary.rotary_dim(turned(c))
    require(dim % 2 == 0 and dim > 0, f'model.rope.fraction {c.rope.fraction} '
            f'of model.retnet.key_dim {c.retnet.key_dim} is {dim}: rotary '
            'positions turn pairs, so it must be even and > 0')
    rotary.SCALINGS[c.rope.scaling].check(c.rope, dim)
