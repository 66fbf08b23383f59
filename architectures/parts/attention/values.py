"""What is mixed into the values of self-attention before they are weighed.

With model.value_residual, the values of the first layer (Zhou et al. 2024,
"Value Residual Learning", arXiv 2410.17897; with one learned number a layer, as
in modded-nanogpt):

  v'_n = (1 - lambda_n) v_n + lambda_n v_1,   lambda_n = 1/2 at first

v_1 are the same token's values in the first layer, which mixes them with
themselves. So a layer needs of the first one only what it makes of the tokens
that it is given, and a cache of keys and values holds what was mixed already.

With model.value_embedding, a vector of the token (modded-nanogpt; the gate is
nanochat's, which reads a few features of x, and here reads them all):

  v' = v + 2 sigmoid(W_g x) e[token],   W_g = 0 at first

e is a table of the layer's own, with a row of all heads for each token, and the
gate has one number for each head. With both, e is added after the mixing.
"""

from typing import Optional

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts import linear
from architectures.parts import sharding
from architectures.parts.config import ModelConfig
from architectures.parts.roles import Role, declare
from configs.errors import require

AXES = 'batch', 'length', 'kv_heads', 'head'


@struct.dataclass
class First:
  """The values of the first layer, on their way to the others."""
  value_BLJK: jax.Array
  known: jax.Array  # bool: whether a layer has made them yet


def start(c: ModelConfig, x_BLD: jax.Array) -> First:
  """Returns what the first layer is given, whose config is `c`."""
  shape = *x_BLD.shape[:2], c.num_kv_heads, c.head_dim
  return First(sharding.constrain(jnp.zeros(shape, c.compute_dtype), *AXES),
               jnp.array(False))


def mixed(module: nn.Module, x_BLD: jax.Array, v_BLJK: jax.Array,
          first: Optional[First], tokens_BL: Optional[jax.Array]
          ) -> tuple[jax.Array, Optional[First]]:
  """Returns the values as they are weighed, and what the next layer is given.

  Args:
    module: the layer's attention, with a `config`.
    x_BLD: what the values are made of.
    v_BLJK: what the product of the values returns.
    first: from the layer before; None: this layer is alone.
    tokens_BL: the tokens' ids.
  """
  c = module.config
  if c.value_residual:
    first = first or start(c, x_BLD)
    first = First(sharding.constrain(jnp.where(
        first.known, first.value_BLJK, v_BLJK), *AXES), jnp.array(True))
    share = declare(module, 'value_residual', nn.initializers.constant(0.5),
                    (), Role(()))
    # In float32, so that the share's gradient, a sum over all tokens, is too.
    v32, first32 = (a.astype(jnp.float32) for a in (v_BLJK, first.value_BLJK))
    v_BLJK = (v32 + share * (first32 - v32)).astype(v_BLJK.dtype)
  if c.value_embedding:
    v_BLJK = v_BLJK + _embedded(module, x_BLD, v_BLJK, tokens_BL)
  return v_BLJK, first


def _embedded(module: nn.Module, x_BLD: jax.Array, v_BLJK: jax.Array,
              tokens_BL: Optional[jax.Array]) -> jax.Array:
  """Returns the gated rows of the tokens, [B, L, J, K]."""
  c, shape = module.config, v_BLJK.shape[2:]
  require(tokens_BL is not None, 'model.value_embedding is True, but this '
          'architecture does not hand the token ids to its layers: set it to '
          'False')
  table_VJK = declare(
      module, 'value_embedding', nn.initializers.normal(c.init_stddev),
      (c.vocab_size, *shape),
      Role(('rows', 'kv_heads', 'head'), inputs=(0,), kind='embedding'))
  # Gathered whole over fsdp first, as the embedding of tokens.
  whole_VJK = sharding.constrain_if(table_VJK, None, 'kv_heads', 'head')
  e_BLJK = whole_VJK[tokens_BL].astype(v_BLJK.dtype)
  gate_DJ = declare(
      module, 'value_gate', nn.initializers.zeros,
      (x_BLD.shape[-1], shape[0]),
      Role(('embed', 'kv_heads'), inputs=(0,), kind='logits'))
  # A wider model may have as many heads: in muP these are logits.
  z_BLJ = linear.einsum('BLD,DJ->BLJ', x_BLD, gate_DJ,
                        v_BLJK.dtype) / c.widening
  return 2 * jax.nn.sigmoid(z_BLJ)[..., None] * e_BLJK
