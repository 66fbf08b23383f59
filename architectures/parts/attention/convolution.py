"""Short convolutions of queries, keys and values (Primer's multi-DConv-head
attention: So et al. 2021, arXiv 2109.08668, section 3, with 3 tokens).

  q'_l = sum over i < W of w_i * q_(l - W + 1 + i),   W = model.attention_conv

and keys and values likewise. Each feature of each head has weights of its own.
The convolutions come after the projections, and before norms, positions and
what is mixed into values. Through them a token sees the W - 1 tokens before it
in its document, so a cache holds the last W - 1 outputs of each projection
besides keys and values.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts.config import ModelConfig
from architectures.parts.recurrent import short_conv
from configs.errors import require


class Convolution:
  """Convolves the projections of one call of a layer.

  Attributes:
    after: what the next token sees of each projection, [B, W - 1, H, K], by the
      projection's name.
  """

  def __init__(self, module: nn.Module, before: Mapping[str, jax.Array],
               segment_ids_BL: jax.Array | None, valid_BL: jax.Array | None):
    self._module, self._before = module, before
    self._rows = dict(segment_ids_BL=segment_ids_BL, valid_BL=valid_BL)
    self.after: dict[str, jax.Array] = {}

  def __call__(self, name: str, x_BLHK: jax.Array, axis: str) -> jax.Array:
    """Returns the output of a projection, convolved.

    Args:
      name: the projection's.
      x_BLHK: its output.
      axis: the logical axis of its heads.
    """
    width = self._module.config.attention_conv  # type: ignore[attr-defined]
    w_WHK = short_conv.weight(self._module, f'{name}_conv',
                              (width, *x_BLHK.shape[2:]), (None, axis, 'head'))
    y_BLHK, self.after[name] = short_conv.convolve(
        x_BLHK, w_WHK, before_BWHK=self._before.get(name), **self._rows)
    return y_BLHK


def empty(c: ModelConfig, shape: tuple[int, ...]) -> dict[str, jax.Array]:
  """Returns the cache of the convolutions before the first token: zeros, by the
  projection's name; empty without convolutions. `shape` is [..., B, M]."""
  heads = {'query': c.num_heads} | ({} if c.kv_sharing else {
      'key': c.num_kv_heads, 'value': c.num_kv_heads})
  return {name: jnp.zeros((*shape[:-1], c.attention_conv - 1, count,
                           c.head_dim), c.compute_dtype)
          for name, count in heads.items()} if c.attention_conv else {}


def check(c: ModelConfig, stack: str) -> None:
  """Raises RequestError for a stack that is not a decoder."""
  require(not c.attention_conv or stack == 'decoder',
          f'model.attention_conv is {c.attention_conv}, which only decoders '
          f'have, and model.arch {c.arch!r} is an {stack}: set it to 0')
