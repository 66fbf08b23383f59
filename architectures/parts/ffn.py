"""The feed-forward network, dense.

FFN(x) = act(x W_up) W_down (Vaswani et al. 2017, section 3.3), and gated:
FFN(x) = (act(x W_gate) * x W_up) W_down (Shazeer 2020; SwiGLU: act = SiLU).

relu2: relu(x)^2 (Primer: So et al. 2021, section 4.1). reglu: Shazeer's
equation 5. swiglu_clamped: `clamped` (gpt-oss: OpenAI 2025, section 2.2).

An entry of FFNS, at the end of this file, is all that there is of one; experts
are made of the same.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import linear
from architectures.parts import sharding
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.norms import recomputed
from configs.fields import field, FUNCTION

gelu = functools.partial(jax.nn.gelu, approximate=False)
gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)


NONE = 'none'  # model.ffn of layers without such a network


@dataclasses.dataclass(frozen=True)
class ClampConfig:
  """Of the network swiglu_clamped: see `clamped`."""
  GROUP = 'clamp'
  alpha: float = field(1.702, 'multiplies the gate in its sigmoid', above=0,
                       resume=FUNCTION)
  limit: float = field(
      7.0, 'the most that the gate and the other factor may be', above=0,
      resume=FUNCTION)


class Kind(NamedTuple):
  """One feed-forward network.

  Attributes:
    act: the activation.
    gated: whether it multiplies x W_up, of a second product with x.
    join: (x W_gate, x W_up, config.clamp) -> the hidden units, of a gated
      network that is no act(x W_gate) * x W_up.
    settings: the group of fields of config.model that it reads.
  """
  act: Callable[[jax.Array], jax.Array]
  gated: bool = False
  join: Optional[Callable[[jax.Array, jax.Array, ClampConfig], jax.Array]] = (
      None)
  settings: Optional[type] = None


@dataclasses.dataclass(frozen=True)
class Hidden:
  """What leads to the hidden units; hashable, so a program can be keyed on it.

  Attributes:
    kind: a name of FFNS.
    clamp: config.model.clamp.
  """
  kind: str
  clamp: Optional[ClampConfig] = None

  @property
  def gated(self) -> bool:
    return FFNS[self.kind].gated

  def __call__(self, up: jax.Array, gate: Optional[jax.Array] = None
               ) -> jax.Array:
    """Returns the hidden units, of x W_up and, where it is gated, x W_gate.

    They are computed in float32 and rounded once: rounded to bfloat16 after
    each operation they lose digits, and XLA's CPU backend takes three times as
    long for a GELU and its gradient.
    """
    row, dtype = FFNS[self.kind], up.dtype
    up, gate = jax.tree.map(lambda x: x.astype(jnp.float32), (up, gate))
    if row.join:
      hidden = row.join(gate, up, self.clamp)
    else:
      hidden = row.act(gate) * up if row.gated else row.act(up)
    return hidden.astype(dtype)


def relu2(x: jax.Array) -> jax.Array:
  return jnp.square(jax.nn.relu(x))


def clamped(gate: jax.Array, up: jax.Array, clamp: ClampConfig) -> jax.Array:
  """g sigmoid(alpha g) (u + 1), with g = min(gate, limit) and u = up, bounded
  by limit on both sides."""
  gate = jnp.minimum(gate, clamp.limit)
  up = jnp.clip(up, -clamp.limit, clamp.limit)
  return gate * jax.nn.sigmoid(clamp.alpha * gate) * (up + 1)


class FFN(nn.Module):
  """(x_BLD, context) -> (y_BLD, aux); a dense layer's aux is empty."""
  config: ModelConfig
  kind: str
  width: int = 0  # 0: d_ff

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context):
    c, F = self.config, self.width or self.config.d_ff
    hidden = Hidden(self.kind, c.clamp)
    product = functools.partial(linear.product, self,
                                deterministic=ctx.deterministic)
    into, out = ('embed', 'mlp'), ('mlp', 'embed')
    up_DF = linear.weight(self, 'up', (c.d_model, F), into)
    down_FD = linear.weight(self, 'down', (F, c.d_model), out, residual=True)
    h_BLF = product('up', 'BLD,DF->BLF', x_BLD, up_DF, into)
    if c.ffn_bias:
      h_BLF = linear.add_bias(
          h_BLF, linear.bias(self, 'up_bias', (F,), ('mlp',)))
    if hidden.gated:
      gate_DF = linear.weight(self, 'gate', (c.d_model, F), into)
      g_BLF = product('gate', 'BLD,DF->BLF', x_BLD, gate_DF, into)
      if c.ffn_bias:
        g_BLF = linear.add_bias(
            g_BLF, linear.bias(self, 'gate_bias', (F,), ('mlp',)))
    h_BLF = recomputed(hidden)(h_BLF, *([g_BLF] if hidden.gated else []))
    h_BLF = linear.Dropout(c.ffn_dropout)(
        h_BLF, deterministic=ctx.deterministic)
    h_BLF = sharding.constrain(h_BLF, 'batch', 'length', 'mlp')
    y_BLD = product('down', 'BLF,FD->BLD', h_BLF, down_FD, out)
    if c.ffn_bias:
      y_BLD = linear.add_bias(
          y_BLD, linear.bias(self, 'down_bias', (c.d_model,), ('embed',)))
    return y_BLD, {}


FFNS = {
    'relu': Kind(jax.nn.relu),
    'relu2': Kind(relu2),
    'gelu': Kind(gelu),
    'gelu_tanh': Kind(gelu_tanh),
    'silu': Kind(jax.nn.silu),
    'reglu': Kind(jax.nn.relu, gated=True),
    'geglu': Kind(gelu, gated=True),
    'geglu_tanh': Kind(gelu_tanh, gated=True),
    'swiglu': Kind(jax.nn.silu, gated=True),
    'swiglu_clamped': Kind(jax.nn.silu, gated=True, join=clamped,
                           settings=ClampConfig),
}
