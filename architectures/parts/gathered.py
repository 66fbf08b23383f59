"""Weights that lie in shards, gathered where they are used, and their gradients
scattered (ZeRO-3: Rajbhandari et al. 2020, arXiv 1910.02054).

If the choice is left to XLA, it may compile the gather of a weight that is
split over the whole mesh, and the sum of its gradient, to all-reduces, which
send twice the bytes. Here both are explicit: `shard_map` gives a device its
tokens and its shard of the weight, an all-gather makes the weight whole, and
the gradient of that is a reduce-scatter. Both send the dtype that the weight is
multiplied in.

A product or a lookup is left to XLA if the mesh does not split the rows of the
batch or the weight, and if `tensor` has more than one device: XLA then joins
the sums over `tensor` of several products.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple, Optional

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
import jax.numpy as jnp
import numpy as np

from architectures.parts import sharding

# The mesh axes of each axis of an array. (A PartitionSpec turns a tuple of one
# name into the name.)
Names = tuple[tuple[str, ...], ...]

KEPT = 'kept_weight'  # the name of a whole weight that remat is to keep
LANES = 128  # of a TPU's registers; an array's last axis is padded to them
LENGTHS = 'LM'  # the letters of axes that are sharded as `length` is


class Places(NamedTuple):
  """How the arrays of a product lie on the mesh.

  Attributes:
    tokens: the mesh axes of the activations' token axes, which come first.
    weight: the mesh axes of the weight's axes.
  """
  tokens: Names
  weight: Names


def _spec(*names: tuple[str, ...]) -> PartitionSpec:
  return PartitionSpec(*(n or None for n in names))


def _gather(w: jax.Array, of: Names) -> jax.Array:
  for axis, names in enumerate(of):
    if names:
      w = along(w, axis, names)
  return w


def _scatter(d: jax.Array, of: Names) -> jax.Array:
  for axis, names in enumerate(of):
    if names:
      d = scatter(d, axis, names)
  return d


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def along(w: jax.Array, axis: int, names: tuple[str, ...]) -> jax.Array:
  """Returns the shards of an axis joined, in a function that is mapped over the
  mesh. `names` are the mesh axes that the axis is sharded over."""
  if axis == 0 and w.shape[-1] % LANES == 0:
    # As a TPU holds such a weight. Else XLA copies those of all layers into the
    # order of axes that their product takes, and keeps the copies until the end
    # of the backward pass.
    w = with_layout_constraint(w, Layout(tuple(range(w.ndim))))
  for over, groups in _steps(names)[::-1]:
    w = jax.lax.all_gather(w, over, axis=axis, tiled=True,
                           axis_index_groups=groups)
  return w


def _along_bwd(axis: int, names: tuple[str, ...], _: None, d: jax.Array):
  matrix = scatter(_matrix(d, axis), 0, names)
  return (_of_matrix(matrix, d.shape, axis),)


along.defvjp(lambda w, axis, names: (along(w, axis, names), None), _along_bwd)


def _matrix(d: jax.Array, axis: int) -> jax.Array:
  """Returns d with an axis first and all others as one, row by row in memory.

  In most other layouts, and with more axes, XLA sums the whole array over the
  devices where it is to scatter the sum.
  """
  d = jnp.moveaxis(d, axis, 0)
  return with_layout_constraint(d.reshape(len(d), -1), Layout((0, 1)))


def _of_matrix(matrix: jax.Array, shape: tuple[int, ...], axis: int
               ) -> jax.Array:
  """Undoes `_matrix` of an array of this shape, whose axis may be shorter."""
  others = shape[:axis] + shape[axis + 1:]
  return jnp.moveaxis(matrix.reshape(-1, *others), 0, axis)


def scatter(d: jax.Array, axis: int, names: tuple[str, ...]) -> jax.Array:
  """Returns a device's shard, along an axis, of the sum of d over devices.

  The axis is moved to the front, because XLA turns a reduce-scatter along the
  last axis in memory into an all-reduce.
  """
  d = jnp.moveaxis(d, axis, 0)
  for over, groups in _steps(names):
    d = jax.lax.psum_scatter(d, over, tiled=True, axis_index_groups=groups)
  return jnp.moveaxis(d, 0, axis)


def _steps(names: tuple[str, ...]
           ) -> list[tuple[str, list[list[int]] | None]]:
  """Returns the steps in which a sum is scattered: a mesh axis, and the groups
  of devices along it (None: all in one group). Gathers take them in reverse.

  XLA turns a collective over all devices of the mesh into an all-reduce. So
  several axes are taken one after another, and a single axis that has all
  devices in two steps, first over devices that are far apart, then over
  neighbours. The steps together send as much as one would.
  """
  if len(names) > 1:
    return [(name, None) for name in names]
  n = sharding.size(names)
  first = _first_step(n)
  if n < jax.sharding.get_abstract_mesh().size or first == n:
    return [(names[0], None)]
  ids = np.arange(n).reshape(first, n // first)
  return [(names[0], ids.T.tolist()), (names[0], ids.tolist())]


def _first_step(n: int) -> int:
  """Returns the group size of the first of two steps over n devices: the least
  divisor of n that is not below its root. If that is n, there is one step."""
  return next(i for i in range(math.isqrt(n - 1) + 1, n + 1) if n % i == 0)


def places(letters: str, x: jax.Array, w: jax.Array,
           axes: Optional[tuple[str | None, ...]]) -> Optional[Places]:
  """Returns how x, whose axes have these letters, and a weight with these
  logical axes lie on the mesh; None: the product is left to XLA."""
  if axes is None or letters[0] != 'B':
    return None
  weight = sharding.weight_places(w.shape, axes)
  rows = sharding.mesh_axes('batch')
  held = set(sum(weight, ()))
  if (not held or not held <= set(rows) or sharding.mesh_axes('mlp')
      or sharding.shards('batch', x.shape[0]) == 1):
    return None
  cut = letters[1] in LENGTHS and sharding.shards('length', x.shape[1]) > 1
  return Places((rows, sharding.mesh_axes('length') if cut else ()), weight)


def product(local: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array,
            w: jax.Array, at: Places, keep: bool, name: str = '') -> jax.Array:
  """Returns local(x, the whole weight) of each device's tokens.

  Args:
    local: the product, whose result begins with the tokens' axes.
    x: activations.
    w: the weight, in the dtype that it is sent in.
    at: how both lie on the mesh.
    keep: whether the whole weight may be kept for the gradient. With remat it
      may: it is kept only while its layer is computed again.
    name: of the whole weight, by which a remat policy keeps it longer; '': it
      has none.
  """
  on_each = functools.partial(_on_each, local, at.weight, name)
  if not keep:  # gathers again; the product's gradient does not need its result
    on_each = jax.checkpoint(on_each)
  tokens = _spec(*at.tokens)
  return jax.shard_map(on_each, in_specs=(tokens, _spec(*at.weight)),
                       out_specs=tokens, check_vma=False)(x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _on_each(local: Callable, of: Names, name: str, x: jax.Array,
             w: jax.Array):
  """Returns local(x, the whole weight), in a function that is mapped over the
  mesh.

  The gradient of the weight is computed and scattered before that of x is
  computed. So a device holds the whole gradient of one weight at a time, and x
  may go before its gradient, which is as large, takes room. Left to itself,
  XLA's scheduler puts the scattering off to the end of the layer, and no
  compute is on its way meanwhile: libtpu compiles it to a synchronous
  operation.
  """
  return local(x, _gather(w, of))


def _on_each_fwd(local: Callable, of: Names, name: str, x: jax.Array,
                 w: jax.Array):
  w = _gather(w, of)
  if name:
    w = checkpoint_name(w, name)
  return local(x, w), (x, w)


def _on_each_bwd(local: Callable, of: Names, name: str,
                 operands: tuple[jax.Array, jax.Array], d: jax.Array):
  x, w = operands
  dw, = jax.vjp(functools.partial(local, x), w)[1](d)
  front = next(axis for axis, names in enumerate(of) if names)
  matrix = scatter(_matrix(dw, front), 0, of[front])
  matrix, d = jax.lax.optimization_barrier((matrix, d))
  dx, = jax.vjp(lambda x: local(x, w), x)[1](d)
  dw = _of_matrix(matrix, dw.shape, front)
  return dx, _scatter(dw, of[:front] + ((),) + of[front + 1:])


_on_each.defvjp(_on_each_fwd, _on_each_bwd)


def lookup(table_VD: jax.Array, ids_BL: jax.Array,
           dtype: jax.typing.DTypeLike) -> jax.Array:
  """Returns rows of a table of embeddings, [B, L, D], in `dtype`.

  If the table's columns are split over devices of the batch, each device looks
  up its columns for the tokens of all these devices, and an all-to-all returns
  each token to its own device. So neither the table nor its gradient, which
  adds up in the table's dtype, is ever whole.
  """
  at = places('BL', ids_BL, table_VD, ('vocab', 'embed'))
  columns = at and at.weight[1]
  if not columns:
    # Gathered whole over fsdp first: rows that are split over fsdp would have
    # to move to where the batch is split over it.
    whole_VD = sharding.constrain_if(table_VD, 'vocab', None)
    return whole_VD[ids_BL].astype(dtype)

  def local(table_VD: jax.Array, ids_BL: jax.Array):
    ids_BL = jax.lax.all_gather(ids_BL, columns, axis=0, tiled=True)
    return jax.lax.all_to_all(table_VD[ids_BL].astype(dtype), columns,
                              split_axis=0, concat_axis=2, tiled=True)

  tokens = _spec(*at.tokens)
  return jax.shard_map(local, in_specs=(_spec(*at.weight), tokens),
                       out_specs=tokens, check_vma=False)(table_VD, ids_BL)


def whole(w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Returns a weight gathered over the mesh axes of the batch, in its own
  dtype; it stays sharded over `tensor`."""
  ours, others = _by_batch(w.shape, axes)
  if not any(ours):
    return w
  return jax.shard_map(
      lambda w: _gather(w, ours), in_specs=_both(ours, others),
      out_specs=_spec(*others), check_vma=False)(w)


def total(d_Q: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Returns the sum over Q of gradients of a weight, [Q, ...], one for each
  shard of the tokens. The sum is sharded as the weight is."""
  ours, others = _by_batch(d_Q.shape[1:], axes)
  tokens, held = sharding.mesh_axes('tokens'), set(sum(ours, ()))
  if (not held or not held <= set(tokens)
      or sharding.size(tokens) != d_Q.shape[0]):
    return sharding.constrain_if(d_Q.sum(0), *axes)

  def local(d_Q: jax.Array):
    d = _scatter(d_Q.sum(0), ours)
    rest = tuple(name for name in tokens if name not in held)
    return jax.lax.psum(d, rest) if rest else d

  return jax.shard_map(local, in_specs=_spec(tokens, *others),
                       out_specs=_both(ours, others), check_vma=False)(d_Q)


def _by_batch(shape: tuple[int, ...], axes: tuple[str | None, ...]
              ) -> tuple[Names, Names]:
  """Returns how a weight lies on the mesh axes of the batch, and how on the
  others."""
  places = sharding.weight_places(shape, axes)
  rows = set(sharding.mesh_axes('batch'))
  return (tuple(n if set(n) <= rows else () for n in places),
          tuple(() if set(n) <= rows else n for n in places))


def _both(ours: Names, others: Names) -> PartitionSpec:
  return _spec(*(a + b for a, b in zip(ours, others)))
