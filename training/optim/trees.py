"""Trees of parameters beside the tree of their roles.

Where optax.partition gives an optimiser some of the parameters, the others are
optax.MaskedNode in its trees; and optax gives `init` no tree at times, but one
thing in its place, of which nothing but its shape is asked.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from architectures.parts.roles import Axes, Role
from training import paths


def over(roles: Any, fn: Callable[..., Any], *trees: Any):
  """Returns fn(axes, x, ...) of each parameter that is not masked, as a tree;
  `axes` are those of the parameter, by role."""

  def one(role: Role, x: Any, *more: Any):
    return x if isinstance(x, optax.MaskedNode) else fn(
        role.split(x.ndim), x, *more)

  return jax.tree.map(one, roles, *trees)


def over_paths(roles: Any, fn: Callable[[Role, jax.Array], Any], params: Any):
  """Returns fn(role, x) of each parameter, found by its path: for `init`."""
  by_path = paths.flatten(roles)
  return jax.tree_util.tree_map_with_path(
      lambda path, x: fn(by_path[paths.join(path)], x), params)


def zeros_without(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Returns zeros like x, with some axes at size 1."""
  shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
  return jnp.zeros(shape, jnp.float32)


def as_matrices(axes: Axes, x: jax.Array) -> jax.Array:
  """Returns an array [*batch, rows, columns] of the matrices of x."""
  x = x.transpose(*axes.batch, *axes.inputs, *axes.outputs)
  sizes = x.shape[len(axes.batch):]
  rows = 1
  for n in sizes[:len(axes.inputs)]:
    rows *= n
  return x.reshape(*x.shape[:len(axes.batch)], rows, -1)


def as_before(axes: Axes, matrices: jax.Array, shape: tuple[int, ...]
              ) -> jax.Array:
  """Returns what `as_matrices` took apart, in its shape."""
  order = (*axes.batch, *axes.inputs, *axes.outputs)
  x = matrices.reshape(*(shape[i] for i in order))
  return x.transpose(*(order.index(i) for i in range(len(order))))
