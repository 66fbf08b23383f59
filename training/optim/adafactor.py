"""Adafactor (Shazeer and Stern 2018, algorithm 4), a matrix at a time.

optax.adafactor factors the two largest axes of whatever array it meets, and
takes its root mean squares over all of it. Our layers are stacked in one
array, so it would mix them, and a scanned model would learn otherwise than an
unrolled one. Here each layer (and expert) keeps its own statistics; on plain
matrices the two agree (tests/training/optim/optimizers_test.py).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from architectures.parts.roles import Role
from training.optim import trees

_MIN_SIZE = 128  # a matrix with fewer rows or columns is not factored
_EPS = 1e-30  # epsilon_1, added to squares
_MIN_SCALE = 1e-3  # epsilon_2, the least root mean square of a parameter
_DECAY = 0.8  # beta2 at update t is 1 - t ** -0.8
_CLIP = 1.0  # d, the greatest root mean square of an update


class FactoredState(NamedTuple):
  """Second moments in float32; a factored one's mean axes have size 1."""
  count: jax.Array
  rows: optax.Params  # factored: mean over outputs; else the moments
  columns: optax.Params  # factored: mean over inputs; else masked


def scale_by_factored_rms(roles: Any) -> optax.GradientTransformation:
  """Divides gradients by the root of their factored second moments.

  Args:
    roles: the Role of each parameter, as a tree.
  """

  def init(params: Any):
    def rows(role: Role, x: jax.Array):
      axes = role.split(x.ndim).outputs if _factored(role, x) else ()
      return trees.zeros_without(x, axes)

    def columns(role: Role, x: jax.Array):
      return (trees.zeros_without(x, role.split(x.ndim).inputs)
              if _factored(role, x) else optax.MaskedNode())

    return FactoredState(jnp.zeros([], jnp.int32),
                         trees.over_paths(roles, rows, params),
                         trees.over_paths(roles, columns, params))

  def update(grads: Any, state: Any, params: Any = None):
    del params
    count = optax.safe_increment(state.count)
    decay = 1 - count.astype(jnp.float32) ** -_DECAY
    moved = lambda old, new: decay * old + (1 - decay) * new

    def scale(role: Role, g: jax.Array, row: jax.Array, column: jax.Array):
      axes, g = role.split(g.ndim), g.astype(jnp.float32)
      square = jnp.square(g) + _EPS
      mean = lambda x, over: jnp.mean(x, axis=over, keepdims=True)
      if not _factored(role, g):
        row = moved(row, square)
        return jax.lax.rsqrt(row) * g, row, column
      row = moved(row, mean(square, axes.outputs))
      column = moved(column, mean(square, axes.inputs))
      level = mean(row, axes.inputs)
      factor = jax.lax.rsqrt(row / level) * jax.lax.rsqrt(column)
      return g * factor, row, column

    found = jax.tree.map(scale, roles, grads, state.rows, state.columns)
    updates, rows, columns = (
        jax.tree.map(lambda x, i=i: x[i], found,
                     is_leaf=lambda x: type(x) is tuple) for i in range(3))
    return updates, FactoredState(count, rows, columns)

  return optax.GradientTransformation(init, update)


def clip_by_rms(roles: Any) -> optax.GradientTransformation:
  """Clips the root mean square of each matrix's update at 1."""

  def clip(role: Role, u: jax.Array):
    return u / jnp.maximum(1.0, _rms(role, u) / _CLIP)

  return optax.stateless(
      lambda updates, params: jax.tree.map(clip, roles, updates))


def scale_by_parameter_rms(roles: Any) -> optax.GradientTransformation:
  """Multiplies each matrix's update by its parameter's root mean square."""

  def scale(role: Role, u: jax.Array, p: jax.Array):
    return (u * jnp.maximum(_rms(role, p), _MIN_SCALE)).astype(p.dtype)

  return optax.stateless(
      lambda updates, params: jax.tree.map(scale, roles, updates, params))


def _rms(role: Role, x: jax.Array) -> jax.Array:
  axes = role.split(x.ndim)
  square = jnp.square(x.astype(jnp.float32))
  return jnp.sqrt(jnp.mean(square, axis=axes.inputs + axes.outputs,
                           keepdims=True))


def _factored(role: Role, x: jax.Array) -> bool:
  return role.matrix and min(role.split(x.ndim).sizes(x.shape)) >= _MIN_SIZE
