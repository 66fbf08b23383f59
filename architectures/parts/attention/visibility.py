"""Which keys the queries of a layer see: the mask of attention, and how many
pairs it shows.

An entry of KINDS, at the end of this file, is all that there is of what the
queries of a layer see, causality and documents apart.
"""

from collections.abc import Callable
import dataclasses
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
  if not seen:
    return None
  mask = seen[0]
  for more in seen[1:]:
    mask = mask & more
  return mask


def begins(kind: LayerKind, ctx: Context) -> bool:
  """Whether the tokens that a cache is given are at 0 ... L - 1 and see none
  after them: then they see each other alone, whatever it holds."""
  return kind.causal and ctx.in_order and not ctx.keep_attention


def pairs(kind: LayerKind, c: ModelConfig, queries: int, keys: int) -> int:
  """Returns how many pairs of a query and a key the mask of self-attention
  shows; with fewer queries than keys, the queries are the last."""
  rule = KINDS[kind.attention]
  first = keys - queries  # keys before the first query's own
  if rule.sees:  # count them, some queries at a time
    with jax.ensure_compile_time_eval():
      at_1M = jnp.arange(keys)[None]
      q_1L = at_1M[:, first:]
      return sum(int(visible(kind, c, q_1L[:, i:i + QUERIES], at_1M).sum())
                 for i in range(0, queries, QUERIES))
  reach = min(rule.window(c), keys) if rule.window else keys
  # Of the keys up to its own, and of those from its own on, a query sees
  # `reach` at most.
  one_way = sum_of_least(first + 1, keys, reach)
  if kind.causal:
    return one_way
  return one_way + sum_of_least(1, queries, reach) - queries


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
  # A query sees a later key in the prefixes that this key is part of.
  both_ways = dataclasses.replace(kind, causal=False)
  if KINDS[kind.attention].sees:
    at = np.arange(keys)
    with jax.ensure_compile_time_eval():
      earlier_M = np.concatenate([np.asarray(
          (visible(both_ways, c, at[None], at[None, i:i + QUERIES])[0]
           & (at[:, None] < at[i:i + QUERIES])).sum(0))
                                  for i in range(0, keys, QUERIES)])
  else:
    window = KINDS[kind.attention].window
    earlier_M = np.minimum(np.arange(keys), window(c) - 1 if window else keys)
  later = sum(int(n) * (keys - 1 - k) for k, n in enumerate(earlier_M))
  return (seen * (keys - 1) + later, whole * (keys - 1),
          pairs(both_ways, c, queries, keys) * (keys - 1))


def sum_of_least(first: int, last: int, most: int) -> int:
  """Returns the sum of min(i, most) over i = first ... last."""
  upto = lambda n: (n * (n + 1) // 2 if n <= most else
                    most * (most + 1) // 2 + (n - most) * most)
  return upto(last) - upto(first - 1)


def _check_banded(c: ModelConfig) -> None:
  require(c.sliding_window > 0,
          'model.attention has a banded layer, but model.sliding_window is 0: '
          'set it to the number of keys that such a layer sees')


KINDS = {
    'global': Kind(),
    'banded': Kind(window=lambda c: c.sliding_window,
                   fields=('sliding_window',), check=_check_banded),
}
