"""How many tokens an expert takes of a group, and which."""

from collections.abc import Callable
import fractions
import math
from typing import Optional

import jax
import jax.numpy as jnp


def slots(factor: float, tokens: int, choices: int, experts: int) -> int:
  """Tokens an expert takes of a group: ceil(factor * S * X / E), of the factor
  as it is written: 1.1 is 11/10, and not the binary number a hair above."""
  return max(1, math.ceil(
      fractions.Fraction(str(factor)) * tokens * choices / experts))


def ranks(key_A: jax.Array, keys: int) -> jax.Array:
  """How many earlier entries of key_A (each < keys) equal this one."""
  order_A = jnp.argsort(key_A, stable=True)
  start_U = jnp.searchsorted(key_A[order_A], jnp.arange(keys))
  rank_A = jnp.arange(key_A.shape[0]) - start_U[key_A[order_A]]
  return jnp.zeros_like(rank_A).at[order_A].set(rank_A, unique_indices=True)


def limit(expert_A: jax.Array, *, choices: int, groups: int, slots: int,
          experts: int, earlier: Optional[Callable] = None) -> jax.Array:
  """Voids what exceeds the capacity: first choices first, then by position.

  Args:
    expert_A: G groups of S tokens of X choices.
    choices: X.
    groups: G.
    slots: the capacity of an expert in a group.
    experts: E.
    earlier: where the group goes on in other shards: (what they hold of each
      (choice, expert) before this shard, what all hold), from [X, E] counts.

  Returns:
    expert_A, E where there was no room.
  """
  A, bins = expert_A.shape[0], experts + 1
  index_A = jnp.arange(A)
  row_A = index_A // (A // groups) * choices + index_A % choices
  key_A = row_A * bins + expert_A
  count_GXE = jnp.bincount(key_A, length=groups * choices * bins).reshape(
      groups, choices, bins)
  if earlier is None:
    before_GXE, total_GXE = jnp.zeros_like(count_GXE), count_GXE
  else:
    before_GXE, total_GXE = earlier(count_GXE)
  base_GXE = before_GXE + jnp.cumsum(total_GXE, 1) - total_GXE
  slot_A = ranks(key_A, groups * choices * bins) + base_GXE.reshape(-1)[key_A]
  return jnp.where(slot_A < slots, expert_A, experts)
