"""A gate on what the heads of attention return, before the output's product
(Qiu et al. 2025, "Gated Attention for Large Language Models", arXiv 2505.06708,
the gate that it calls G1; Qwen3-Next).

  y = W_o (o * sigmoid(W_g x))

x is what the layer's queries are made of, and o what its heads return. The gate
has a number for each feature of each head (elementwise, as in Qwen3-Next), or
one for each head (headwise). Where the products of attention have biases, so
has that of the gate.

An entry of GATES, at the end of this file, is all that there is of one.
"""

import flax.linen as nn
import jax

from architectures.parts import linear
from architectures.parts import sharding

NAME = 'output_gate'  # of the weight, and of the product for adapters


def elementwise(module: nn.Module, x_BLD: jax.Array, o_BLHK: jax.Array, *,
                deterministic: bool) -> jax.Array:
  """Returns o with each of its features multiplied by a gate of its own."""
  axes = 'embed', 'heads', 'head'
  w_DHK = linear.weight(module, NAME, (x_BLD.shape[-1], *o_BLHK.shape[2:]),
                        axes)
  z_BLHK = linear.product(module, NAME, 'BLD,DHK->BLHK', x_BLD, w_DHK, axes,
                          deterministic=deterministic)
  z_BLHK = sharding.constrain(_with_bias(module, z_BLHK, axes[1:]),
                              'batch', 'length', *axes[1:])
  return o_BLHK * jax.nn.sigmoid(z_BLHK)


def headwise(module: nn.Module, x_BLD: jax.Array, o_BLHK: jax.Array, *,
             deterministic: bool) -> jax.Array:
  """Returns o with each head multiplied by one number.

  A wider model may have as many heads, so in muP these are logits, as a
  router's: divided by how many times as wide it is as its base.
  """
  axes = 'embed', 'heads'
  w_DH = linear.weight(module, NAME, (x_BLD.shape[-1], o_BLHK.shape[2]), axes,
                       output=True)
  z_BLH = linear.product(module, NAME, 'BLD,DH->BLH', x_BLD, w_DH, axes,
                         deterministic=deterministic) / module.config.widening
  z_BLH = sharding.constrain(_with_bias(module, z_BLH, axes[1:]),
                             'batch', 'length', *axes[1:])
  return o_BLHK * jax.nn.sigmoid(z_BLH)[..., None]


def _with_bias(module: nn.Module, z: jax.Array, axes: tuple[str, ...]
               ) -> jax.Array:
  if not module.config.attention_bias:
    return z
  return linear.add_bias(
      z, linear.bias(module, f'{NAME}_bias', z.shape[2:], axes))


def products(gate: str) -> set[str]:
  """Returns which of linear.PRODUCTS a layer has for its gate."""
  return {NAME} if GATES[gate] else set()


GATES = {
    'none': None,
    'elementwise': elementwise,
    'headwise': headwise,
}
