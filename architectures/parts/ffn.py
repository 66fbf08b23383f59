"""The feed-forward network, dense.

FFN(x) = act(x W_up) W_down (Vaswani et al. 2017, section 3.3), and gated:
FFN(x) = (act(x W_gate) * x W_up) W_down (Shazeer 2020; SwiGLU: act = SiLU).

An entry of FFNS, at the end of this file, is all that there is of one; experts
are made of the same.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import flax.linen as nn
import jax

from architectures.parts import linear
from architectures.parts import sharding
from architectures.parts.attention import Context
from architectures.parts.config import ModelConfig

gelu = functools.partial(jax.nn.gelu, approximate=False)
gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)


class Kind(NamedTuple):
  """One feed-forward network.

  Attributes:
    act: the activation.
    gated: whether it multiplies x W_up, of a second product with x.
  """
  act: Callable[[jax.Array], jax.Array]
  gated: bool = False


# What an activation computes on its way is computed again for the gradient: to
# keep it takes longer, and a multiple of the memory.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


class FFN(nn.Module):
  """(x_BLD, context) -> (y_BLD, aux); a dense layer's aux is empty."""
  config: ModelConfig
  kind: str
  width: int = 0  # 0: d_ff

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context):
    c, F = self.config, self.width or self.config.d_ff
    act, gated = FFNS[self.kind]
    product = functools.partial(linear.product, self,
                                deterministic=ctx.deterministic)
    into, out = ('embed', 'mlp'), ('mlp', 'embed')
    up_DF = linear.weight(self, 'up', (c.d_model, F), into)
    down_FD = linear.weight(self, 'down', (F, c.d_model), out, residual=True)
    h_BLF = product('up', 'BLD,DF->BLF', x_BLD, up_DF, into)
    if c.ffn_bias:
      h_BLF = linear.add_bias(
          h_BLF, linear.bias(self, 'up_bias', (F,), ('mlp',)))
    if gated:
      gate_DF = linear.weight(self, 'gate', (c.d_model, F), into)
      g_BLF = product('gate', 'BLD,DF->BLF', x_BLD, gate_DF, into)
      if c.ffn_bias:
        g_BLF = linear.add_bias(
            g_BLF, linear.bias(self, 'gate_bias', (F,), ('mlp',)))
      h_BLF = recomputed(lambda g, h: act(g) * h)(g_BLF, h_BLF)
    else:
      h_BLF = recomputed(act)(h_BLF)
    h_BLF = nn.Dropout(c.ffn_dropout)(h_BLF, deterministic=ctx.deterministic)
    h_BLF = sharding.constrain(h_BLF, 'batch', 'length', 'mlp')
    y_BLD = product('down', 'BLF,FD->BLD', h_BLF, down_FD, out)
    if c.ffn_bias:
      y_BLD = linear.add_bias(
          y_BLD, linear.bias(self, 'down_bias', (c.d_model,), ('embed',)))
    return y_BLD, {}


FFNS = {
    'relu': Kind(jax.nn.relu),
    'gelu': Kind(gelu),
    'gelu_tanh': Kind(gelu_tanh),
    'silu': Kind(jax.nn.silu),
    'geglu': Kind(gelu, gated=True),
    'geglu_tanh': Kind(gelu_tanh, gated=True),
    'swiglu': Kind(jax.nn.silu, gated=True),
}
