"""Which keys the queries of a layer see: the mask of attention, and how many
pairs it shows.

An entry of KINDS, at the end of this file, is all that there is of what the
queries of a layer see, causality and documents apart.
"""

from collections.abc import Callable
import dataclasses
import functools
import operator
from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context
from configs.errors import require

QUERIES = 1024  # whose keys are counted at once


@dataclasses.dataclass(frozen=True)
class Kind:
  """Which keys the queries of a layer see, causality and documents apart.

  Attributes:
    window: config -> n, where these are the keys less than n away; None: the
      kind has no window.
    sees: (config, q_positions, k_positions) -> bool, of positions that
      broadcast: any other rule. Fused kernels have no mask for it.
    fields: of config.model that no other kind reads.
    check: config -> None; raises RequestError for fields that do not fit.
  """
  window: Optional[Callable[[ModelConfig], int]] = None
  sees: Optional[Callable] = None
  fields: tuple[str, ...] = ()
  check: Callable[[ModelConfig], None] = lambda c: None


def visible(kind: LayerKind, c: ModelConfig, q_positions_BL: jax.Array,
            k_positions_BM: jax.Array,
            q_segments_BL: Optional[jax.Array] = None,
            k_segments_BM: Optional[jax.Array] = None,
            prefix_B: Optional[jax.Array] = None) -> Optional[jax.Array]:
  """Which keys each query sees: bool [B or 1, L, M]; None: all."""
  rule = KINDS[kind.attention]
  q, k = q_positions_BL[:, :, None], k_positions_BM[:, None]
  seen = []
  if kind.causal:
    causal = k <= q
    if prefix_B is not None:
      causal |= k < prefix_B[:, None, None]
    seen.append(causal)
  if rule.window:
    seen.append(jnp.abs(q - k) < rule.window(c))
  if rule.sees:
    seen.append(rule.sees(c, q, k))
  if q_segments_BL is not None:
    seen.append(q_segments_BL[:, :, None] == k_segments_BM[:, None])
  return functools.reduce(operator.and_, seen) if seen else None


def begins(kind: LayerKind, ctx: Context) -> bool:
  """Whether the tokens that a cache is given are at 0 ... L - 1 and see none
  after them: then they see each other alone, whatever it holds."""
  return kind.causal and ctx.in_order and not ctx.keep_attention


def _counts(kind: LayerKind, c: ModelConfig, queries: np.ndarray,
            keys: np.ndarray) -> np.ndarray:
  """Returns how many of the keys at these places each query sees."""
  rule = KINDS[kind.attention]
  if rule.sees:  # count them, some queries at a time
    with jax.ensure_compile_time_eval():
      return np.concatenate([np.asarray(visible(
          kind, c, queries[None, i:i + QUERIES], keys[None])[0].sum(-1))
                             for i in range(0, len(queries), QUERIES)])
  reach = rule.window(c) if rule.window else keys.size
  first = np.maximum(queries - reach + 1, 0)
  last = np.minimum(queries + (1 if kind.causal else reach), keys.size)
  return last - first


def pairs(kind: LayerKind, c: ModelConfig, queries: int, keys: int) -> int:
  """Returns how many pairs of a query and a key the mask of self-attention
  shows; with fewer queries than keys, the queries are the last."""
  at = np.arange(keys)
  return int(_counts(kind, c, at[keys - queries:], at).sum())


def share(kind: LayerKind, c: ModelConfig, queries: int, keys: int,
          prefix: bool = False) -> tuple[int, int, int]:
  """Returns the pairs that `pairs` counts, all that there are, and those that
  are seen where the whole row is a prompt.

  Args:
    kind, c, queries, keys: as of `pairs`.
    prefix: whether the tokens of a row's prefix see each other. Then all three
      numbers are sums over prefixes of 1 to keys - 1 tokens, which are alike
      likely in training; but a prompt is a prefix of all of its tokens.
  """
  seen, whole = pairs(kind, c, queries, keys), queries * keys
  if not (prefix and kind.causal and queries == keys > 1):
    return seen, whole, seen
  # A query sees a later key in the prefixes that this key is part of. As many
  # see a key from before it as it sees before itself: masks are symmetric.
  both_ways, at = dataclasses.replace(kind, causal=False), np.arange(keys)
  earlier_M = _counts(kind, c, at, at) - 1
  return (seen * (keys - 1) + int((earlier_M * (keys - 1 - at)).sum()),
          whole * (keys - 1), pairs(both_ways, c, queries, keys) * (keys - 1))


def _check_banded(c: ModelConfig) -> None:
  require(c.sliding_window > 0,
          'model.attention has a banded layer, but model.sliding_window is 0: '
          'set it to the number of keys that such a layer sees')


KINDS = {
    'global': Kind(),
    'banded': Kind(window=lambda c: c.sliding_window,
                   fields=('sliding_window',), check=_check_banded),
}
