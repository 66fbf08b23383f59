"""Adafactor (Shazeer and Stern 2018, algorithm 4), a matrix at a time.

optax.adafactor factors the two largest axes of whatever array it meets, and
takes its root mean squares over all of it. Our layers are stacked in one
array, so it would mix them, and a scanned model would learn otherwise than an
unrolled one. Here each layer (and expert) keeps its own statistics; on plain
matrices the two agree (tests/training/optim/optimizers_test.py).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from training import paths
from training.optim import matrices

_MIN_SIZE = 128  # a matrix with fewer rows or columns is not factored
_EPS = 1e-30  # epsilon_1, added to squares
_MIN_SCALE = 1e-3  # epsilon_2, the least root mean square of a parameter
_DECAY = 0.8  # beta2 at update t is 1 - t ** -0.8
_CLIP = 1.0  # d, the greatest root mean square of an update


class FactoredState(NamedTuple):
  """Second moments in float32; a factored one's mean axes have size 1."""
  count: jax.Array
  rows: optax.Params  # factored: mean over outputs
  columns: optax.Params  # factored: mean over inputs
  full: optax.Params  # the others


def scale_by_factored_rms() -> optax.GradientTransformation:
  """Divides gradients by the root of their factored second moments."""

  def init(params):
    def keep(wanted):
      return jax.tree_util.tree_map_with_path(
          lambda path, x: wanted(paths.join(path), x), params)
    nothing = optax.MaskedNode()
    return FactoredState(
        count=jnp.zeros([], jnp.int32),
        rows=keep(lambda path, x: _zeros_without(x, _axes(path, x).outputs)
                  if _factored(path, x) else nothing),
        columns=keep(lambda path, x: _zeros_without(x, _axes(path, x).inputs)
                     if _factored(path, x) else nothing),
        full=keep(lambda path, x: nothing if _factored(path, x)
                  else jnp.zeros(x.shape, jnp.float32)))

  def update(grads, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    decay = 1 - count.astype(jnp.float32) ** -_DECAY

    def moments(path, g, row, column, full):
      path = paths.join(path)
      square = jnp.square(g.astype(jnp.float32)) + _EPS
      if not _factored(path, g):
        return row, column, decay * full + (1 - decay) * square
      axes = _axes(path, g)
      mean = lambda over: jnp.mean(square, axis=over, keepdims=True)
      return (decay * row + (1 - decay) * mean(axes.outputs),
              decay * column + (1 - decay) * mean(axes.inputs), full)

    def scale(path, g, row, column, full):
      path = paths.join(path)
      if _factored(path, g):
        level = jnp.mean(row, axis=_axes(path, g).inputs, keepdims=True)
        factor = jax.lax.rsqrt(row / level) * jax.lax.rsqrt(column)
      else:
        factor = jax.lax.rsqrt(full)
      return g.astype(jnp.float32) * factor

    rows, columns, full = _unzip(_map(
        moments, grads, state.rows, state.columns, state.full), 3)
    updates = _map(scale, grads, rows, columns, full)
    return updates, FactoredState(count, rows, columns, full)

  return optax.GradientTransformation(init, update)


def clip_by_rms() -> optax.GradientTransformation:
  """Clips the root mean square of each matrix's update at 1."""

  def clip(path, u):
    return u / jnp.maximum(1.0, _rms(path, u) / _CLIP)

  return optax.stateless(lambda updates, params: _map(clip, updates))


def scale_by_parameter_rms() -> optax.GradientTransformation:
  """Multiplies each matrix's update by its parameter's root mean square."""

  def scale(path, u, p):
    return (u * jnp.maximum(_rms(path, p), _MIN_SCALE)).astype(p.dtype)

  return optax.stateless(lambda updates, params: _map(scale, updates, params))


def _rms(path, x):
  own = tuple(range(len(_axes(paths.join(path), x).batch), x.ndim))
  square = jnp.square(x.astype(jnp.float32))
  return jnp.sqrt(jnp.mean(square, axis=own, keepdims=True))


def _axes(path, x):
  return matrices.axes(path, x.ndim)


def _factored(path, x) -> bool:
  axes = _axes(path, x)
  return axes.matrix and min(axes.sizes(x.shape)) >= _MIN_SIZE


def _zeros_without(x, axes):
  shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
  return jnp.zeros(shape, jnp.float32)


def _map(fn, tree, *rest):
  """Maps over `tree` with paths; a MaskedNode of `rest` counts as a leaf."""
  return jax.tree_util.tree_map_with_path(fn, tree, *rest)


def _unzip(tree, n):
  """Turns a tree of n-tuples into n trees."""
  is_leaf = lambda x: type(x) is tuple
  pick = lambda i: jax.tree.map(lambda x: x[i], tree, is_leaf=is_leaf)
  return tuple(pick(i) for i in range(n))
