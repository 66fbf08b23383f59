"""The role of each parameter, and how parameters and activations lie on a mesh.

Axis names stand beside the array; the table in configs/sharding.py says which
mesh axis each goes to. An unknown name raises: Linen alone would take a
misspelt one for 'not sharded'.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import math
from typing import NamedTuple, Optional

import flax.linen as nn
from flax import struct
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
import jax.numpy as jnp
import jax.typing
import numpy as np

from common.errors import one_of, require

# {logical axis: mesh axes}, as pairs: see configs/sharding.py.
AxisRules = Sequence[tuple[str, tuple[str, ...]]]
SCOPE_OF_CONSTRAINT = 'axes'  # the scope that names a constraint's logical axes

# The names that an axis of an array may have. 'stream' is the length of what
# goes from layer to layer, and 'length' that of what a layer computes of it.
# 'tokens' are batch and length in one axis, 'joined' heads and their features,
# 'rows' the tokens of a table whose columns are heads, 'groups' heads of keys
# whose number does not grow with the width, 'table' the rows of tables of
# model.memory.
LOGICAL_AXES = (
    'batch', 'experts', 'vocab', 'mlp', 'heads', 'kv_heads', 'groups', 'joined',
    'embed', 'latent', 'rows', 'table', 'length', 'stream', 'tokens', 'head',
    'capacity', 'layers')


def check_logical_axes(axes) -> tuple[str | None, ...]:
  """Returns `axes`; raises ValueError for one that the legend lacks."""
  for axis in {*axes} - {None, *LOGICAL_AXES}:
    one_of('logical axis', axis, LOGICAL_AXES)
  return tuple(axes)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Returns `x`, constrained to the mesh axes of its logical ones; without a
  mesh, as it is.

  The logical axes are part of the operation's name, for explain_sharding.
  """
  names = ','.join(map(str, check_logical_axes(axes)))
  with jax.named_scope(f'{SCOPE_OF_CONSTRAINT}({names})'):
    return nn.with_logical_constraint(x, axes)


def mesh_axes_by_axis(*axes: str | None) -> tuple[tuple[str, ...], ...]:
  """Returns the mesh axes, of more than one device, that each logical axis of
  an array lies on."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not nn.get_logical_axis_rules():
    return ((),) * len(axes)
  places = []
  for names in nn.logical_to_mesh_axes(check_logical_axes(axes)):
    if names is None:
      names = ()
    if isinstance(names, str):
      names = (names,)
    places.append(tuple(name for name in names if mesh.shape[name] > 1))
  return tuple(places)


def mesh_axes(axis: str) -> tuple[str, ...]:
  """Returns the mesh axes that an array lies on which has this axis alone."""
  return mesh_axes_by_axis(axis)[0]


def mesh_axes_that_divide(names: tuple[str, ...], places: int,
                shape: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes that a weight's dimension of size `places` is sharded
  over: as many of `names`, from the first one on, as together divide it."""
  while places % math.prod(shape[name] for name in names):
    names = names[:-1]
  return names


def mesh_axes_of_weight(shape: tuple[int, ...], axes: tuple[str | None, ...]
                  ) -> tuple[tuple[str, ...], ...]:
  """Returns the mesh axes that each axis of a weight lies on."""
  devices_along = jax.sharding.get_abstract_mesh().shape
  places = []
  for length, names in zip(shape, mesh_axes_by_axis(*axes)):
    places.append(mesh_axes_that_divide(names, length, devices_along))
  return tuple(places)


def count_devices_along(names: tuple[str, ...]) -> int:
  """Returns how many devices lie along mesh axes."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[name] for name in names)


def count_shards(axis: str, places: int) -> int:
  """Returns how many shards the mesh cuts `places` of a logical axis into; 1
  without a mesh, or where it does not divide them."""
  count = count_devices_along(mesh_axes(axis))
  if places % count:
    return 1
  return count


def constrain_where_divisible(x: jax.Array, *axes: str | None) -> jax.Array:
  """Returns `x`, constrained but for each axis that the mesh does not divide.
  """
  divided = []
  for axis, length in zip(axes, x.shape):
    is_cut = axis is not None and count_shards(axis, length) > 1
    divided.append(axis if is_cut else None)
  return constrain(x, *divided)


def constrain_stream(x: jax.Array, *axes: str | None) -> jax.Array:
  """Returns an array that goes from layer to layer, [B, L, ...], constrained.
  Its length is sharded as `stream` is or, if that does not divide it, as
  `length`. `axes` are the others."""
  length = 'stream' if count_shards('stream', x.shape[1]) > 1 else 'length'
  return constrain(x, 'batch', length, *axes)


def traced_platform() -> str:
  """Returns the kind of device that the program is traced for: cpu, gpu or
  tpu."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.abstract_device is None:
    return jax.default_backend()
  return mesh.abstract_device.platform


def count_devices() -> int:
  """Returns how many devices the mesh has; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.size


def is_single_cpu() -> bool:
  """Whether the program is traced for a CPU that is not part of a mesh."""
  return traced_platform() == 'cpu' and count_devices() == 1


@contextlib.contextmanager
def install_rules(table: AxisRules):
  """Installs a table of configs/sharding.py for what is traced."""
  with nn.logical_axis_rules(table):
    yield


# The role of a parameter, declared where it is made.
#
# Every parameter is made by `declare` (weight and bias of layers.py call it),
# which keeps its role beside its logical axes. The optimisers read nothing
# else: muP's learning rates, the matrices of Muon and Adafactor, and weight
# decay (training/optim/). No pattern over names has to know a new parameter.


class Axes(NamedTuple):
  """The axes of an array by role.

  Attributes:
    batch: the axes of which each index holds a parameter of its own.
    inputs: the axes that a product sums over; none: a vector.
    outputs: the others.
  """
  batch: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the rows and the columns of one matrix."""
    rows = math.prod(shape[i] for i in self.inputs)
    columns = math.prod(shape[i] for i in self.outputs)
    return rows, columns


@dataclasses.dataclass(frozen=True)
class Role:
  """The role of a parameter; its axes are numbered as its module makes it.

  Attributes:
    axes: its logical axes.
    inputs: the axes that a product sums over, or that ids of an embedding look
      up; none: a vector, or a table of biases, which is no matrix.
    batch: the axes that hold a matrix or a vector each: experts.
    kind: 'hidden'; 'logits', whose product is as many numbers at every width
      and is divided by config.widening (the head's, a router's); 'embedding',
      a table whose rows are looked up.
    reads: how many rows a token reads of a table that the last few tokens look
      up; 0: it is no such table.
    tuned: whether it is trained beside low-rank adapters (model.lora), which
      leave all else as it was: it is one of them, or new to the task.
  """
  axes: tuple[str | None, ...]
  inputs: tuple[int, ...] = ()
  batch: tuple[int, ...] = ()
  kind: str = 'hidden'
  tuned: bool = False
  reads: int = 0

  @property
  def is_matrix(self) -> bool:
    return bool(self.inputs)

  def split(self, ndim: int) -> Axes:
    """Returns the roles of the axes of an array that holds the parameter.

    Axes in front of the declared ones, such as the one over layers that the
    scan adds, are a batch.
    """
    front = ndim - len(self.axes)
    batch = [*range(front), *(front + i for i in self.batch)]
    inputs = [front + i for i in self.inputs]
    outputs = [i for i in range(front, ndim)
               if i not in batch and i not in inputs]
    return Axes(batch=tuple(batch), inputs=tuple(inputs),
                outputs=tuple(outputs))


class Declared(nn.LogicallyPartitioned, eq=False):
  """The box that a parameter is born in: its logical axes and its role."""
  role: Role | None = struct.field(default=None, pytree_node=False)


def roles_of_parameters(boxed):
  """Returns the Role of each parameter of a tree of boxes.

  Raises:
    RequestError: for a parameter that declares none.
  """
  def role(path, box) -> Role:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    require(isinstance(box, Declared),
            f'the parameter {name!r} declares no role: make it by weight, bias '
            'or embedding of architectures/parts/layers.py, or by declare of '
            'sharding.py')
    return box.role

  return jax.tree_util.tree_map_with_path(
      role, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def declare(module: nn.Module, name: str, init: Callable,
            shape: tuple[int, ...], role: Role,
            dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
  """Makes a parameter of `module` and returns it.

  Args:
    module: the module, with a `config`.
    name: the parameter's name.
    init: its initializer, (key, shape, dtype) -> the first value; it draws in
      float32, since JAX's bfloat16 normals have 128 values, whose mean is not
      0.
    shape: its shape.
    role: its role.
    dtype: its type; None: the config's param_dtype.

  Raises:
    ValueError: for a logical axis that the legend lacks.
  """
  axes = check_logical_axes(role.axes)
  dtype = dtype or module.config.param_dtype

  def born(key: jax.Array, shape: tuple[int, ...]) -> Declared:
    value = init(key, shape, jnp.float32).astype(dtype)
    return Declared(value, axes, role=role)

  return module.param(name, born, shape)


# The shapes of a module's parameters.


@functools.lru_cache(maxsize=64)  # a program asks for the same ones often
def abstract_params(module: nn.Module):
  """Returns the boxed parameters' shapes; nothing is computed."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(module.init, jax.random.key(0), tokens)['params']


def parameter_shapes(module: nn.Module):
  """Returns the parameters' shapes alone, out of their boxes; in a run's
  context `nn.meta.unbox` would constrain them to its mesh."""
  def shape(box):
    if nn.meta.is_axis_metadata(box):
      return box.value
    return box

  return jax.tree.map(
      shape, abstract_params(module), is_leaf=nn.meta.is_axis_metadata)


# Weights that lie in shards, gathered where they are used, and their gradients
# scattered (ZeRO-3: Rajbhandari et al. 2020, arXiv 1910.02054).
#
# If the choice is left to XLA, it may compile the gather of a weight that is
# split over the whole mesh, and the sum of its gradient, to all-reduces, which
# send twice the bytes. Here both are explicit: `shard_map` gives a device its
# tokens and its shard of the weight, an all-gather makes the weight whole, and
# the gradient of that is a reduce-scatter. Both send the dtype that the weight
# is multiplied in.
#
# A product or a lookup is left to XLA if the mesh does not split the rows of
# the batch or the weight, and if `tensor` has more than one device: XLA then
# joins the sums over `tensor` of several products.


# The mesh axes of each axis of an array. (A PartitionSpec turns a tuple of one
# name into the name.)
MeshAxesByAxis = tuple[tuple[str, ...], ...]

# the name of a whole weight that remat is to keep
NAME_OF_KEPT_WEIGHT = 'kept_weight'
# of a TPU's registers; an array's last axis is padded to them
LANES_OF_TPU_REGISTER = 128
LETTERS_OF_LENGTH = 'LM'  # the letters of axes that are sharded as `length` is


class ShardingOfProduct(NamedTuple):
  """How the arrays of a product lie on the mesh.

  Attributes:
    tokens: the mesh axes of the activations' token axes, which come first.
    weight: the mesh axes of the weight's axes.
  """
  tokens: MeshAxesByAxis
  weight: MeshAxesByAxis


def _partition_spec(*places: tuple[str, ...]) -> PartitionSpec:
  """Returns the PartitionSpec of an array whose axes lie on these mesh axes."""
  return PartitionSpec(*(names or None for names in places))


def _gather_all_axes(w: jax.Array, places: MeshAxesByAxis) -> jax.Array:
  """Returns an array whose shards are joined along each axis that lies on some
  of the mesh's."""
  for axis, names in enumerate(places):
    if names:
      w = gather_shards(w, axis, names)
  return w


def _reduce_scatter_all_axes(d: jax.Array, places: MeshAxesByAxis) -> jax.Array:
  """Returns a device's shard of a sum over devices, along each axis that lies
  on some of the mesh's."""
  for axis, names in enumerate(places):
    if names:
      d = reduce_scatter(d, axis, names)
  return d


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_shards(w: jax.Array, axis: int, names: tuple[str, ...]) -> jax.Array:
  """Returns the shards of an axis joined, in a function that is mapped over the
  mesh. `names` are the mesh axes that the axis is sharded over."""
  if axis == 0 and w.shape[-1] % LANES_OF_TPU_REGISTER == 0:
    # This is the layout of such a weight on a TPU. Without it XLA copies those
    # of all layers into the order of axes that their product takes, and keeps
    # the copies until the end of the backward pass.
    w = with_layout_constraint(w, Layout(tuple(range(w.ndim))))
  for over, groups in reversed(_steps_of_collective(names)):
    w = jax.lax.all_gather(w, over, axis=axis, tiled=True,
                           axis_index_groups=groups)
  return w


def _gather_shards_fwd(w: jax.Array, axis: int, names: tuple[str, ...]):
  return gather_shards(w, axis, names), None


def _gather_shards_bwd(
  axis: int, names: tuple[str, ...], _: None, d: jax.Array):
  matrix = reduce_scatter(_to_matrix_with_axis_first(d, axis), 0, names)
  return (_from_matrix_with_axis_first(matrix, d.shape, axis),)


gather_shards.defvjp(_gather_shards_fwd, _gather_shards_bwd)


def _to_matrix_with_axis_first(d: jax.Array, axis: int) -> jax.Array:
  """Returns d with an axis first and all others as one, row by row in memory.

  In most other layouts, and with more axes, XLA sums the whole array over the
  devices where it is to scatter the sum.
  """
  d = jnp.moveaxis(d, axis, 0)
  return with_layout_constraint(d.reshape(len(d), -1), Layout((0, 1)))


def _from_matrix_with_axis_first(
  matrix: jax.Array, shape: tuple[int, ...], axis: int ) -> jax.Array:
  """Returns the array of this shape that `_matrix` was given; its axis may be
  shorter."""
  others = shape[:axis] + shape[axis + 1:]
  return jnp.moveaxis(matrix.reshape(-1, *others), 0, axis)


def reduce_scatter(d: jax.Array, axis: int,
                   names: tuple[str, ...]) -> jax.Array:
  """Returns a device's shard, along an axis, of the sum of d over devices.

  The axis is moved to the front, because XLA turns a reduce-scatter along the
  last axis in memory into an all-reduce.
  """
  d = jnp.moveaxis(d, axis, 0)
  for over, groups in _steps_of_collective(names):
    d = jax.lax.psum_scatter(d, over, tiled=True, axis_index_groups=groups)
  return jnp.moveaxis(d, 0, axis)


def _steps_of_collective(names: tuple[str, ...]
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
  n = count_devices_along(names)
  first = _size_of_first_groups(n)
  if n < jax.sharding.get_abstract_mesh().size or first == n:
    return [(names[0], None)]
  ids = np.arange(n).reshape(first, n // first)
  return [(names[0], ids.T.tolist()), (names[0], ids.tolist())]


def _size_of_first_groups(n: int) -> int:
  """Returns the group size of the first of two steps over n devices: the least
  divisor of n that is not below its root. If that is n, there is one step."""
  group = math.isqrt(n - 1) + 1
  while n % group:
    group += 1
  return group


def sharding_of_product(letters: str, x: jax.Array, w: jax.Array,
                        axes: Optional[tuple[str | None, ...]]
                        ) -> Optional[ShardingOfProduct]:
  """Returns how the arrays of a product lie on the mesh; None: the product is
  left to XLA.

  Args:
    letters: the letters of the axes of x, which come first.
    x: activations.
    w: a weight.
    axes: its logical axes; None: it is none that is sharded.
  """
  if axes is None or letters[0] != 'B':
    return None
  weight = mesh_axes_of_weight(w.shape, axes)
  weight_axes = set(sum(weight, ()))
  rows = mesh_axes('batch')
  # The weight must lie on mesh axes of the batch alone, which split the rows;
  # and those of `tensor`, where `mlp` lies, must have one device.
  if not weight_axes or not weight_axes <= set(rows):
    return None
  if mesh_axes('mlp') or count_shards('batch', x.shape[0]) == 1:
    return None
  lengths = ()
  if letters[1] in LETTERS_OF_LENGTH and count_shards('length', x.shape[1]) > 1:
    lengths = mesh_axes('length')
  return ShardingOfProduct(tokens=(rows, lengths), weight=weight)


def multiply_by_gathered_weight(local: Callable[[jax.Array,
  jax.Array],
  jax.Array],
  x: jax.Array,
  w: jax.Array,
  at: ShardingOfProduct,
  keep: bool,
   name: str = '') -> jax.Array:
  """Returns local(x, the whole weight) of each device's tokens.

  Args:
    local: the product, whose result begins with the tokens' axes.
    x: activations.
    w: the weight, in the dtype that it is sent in.
    at: how both lie on the mesh.
    keep: whether the whole weight may be kept for the gradient. With remat it
      may: it is kept only while its layer is computed again.
    name: the name of the whole weight, by which a remat policy keeps it longer;
      '': it has none.
  """
  on_each = functools.partial(_multiply_on_device, local, at.weight, name)
  if not keep:  # gathers again; the product's gradient does not need its result
    on_each = jax.checkpoint(on_each)
  tokens, weight = _partition_spec(*at.tokens), _partition_spec(*at.weight)
  mapped = jax.shard_map(on_each, in_specs=(tokens, weight), out_specs=tokens,
                         check_vma=False)
  return mapped(x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _multiply_on_device(
  local: Callable,
  places: MeshAxesByAxis,
  name: str,
  x: jax.Array,
   w: jax.Array):
  """Returns local(x, the whole weight), in a function that is mapped over the
  mesh. `places` are the mesh axes of the weight's axes.

  The gradient of the weight is computed and scattered before that of x is
  computed. So a device holds the whole gradient of one weight at a time, and x
  may go before its gradient, which is as large, takes room. Left to itself,
  XLA's scheduler puts the scattering off to the end of the layer, and no
  compute is on its way meanwhile: libtpu compiles it to a synchronous
  operation.
  """
  return local(x, _gather_all_axes(w, places))


def _multiply_on_device_fwd(
  local: Callable,
  places: MeshAxesByAxis,
  name: str,
  x: jax.Array,
   w: jax.Array):
  w = _gather_all_axes(w, places)
  if name:
    w = checkpoint_name(w, name)
  return local(x, w), (x, w)


def _multiply_on_device_bwd(local: Callable, places: MeshAxesByAxis, name: str,
                 operands: tuple[jax.Array, jax.Array], d: jax.Array):
  x, w = operands
  # The gradient of the weight, scattered along the first of its axes that is
  # sharded, which takes most of the room.
  _, of_w = jax.vjp(functools.partial(local, x), w)
  dw, = of_w(d)
  front = next(axis for axis, names in enumerate(places) if names)
  matrix = reduce_scatter(
  _to_matrix_with_axis_first(
    dw, front), 0, places[front])
  # That of x waits for it.
  matrix, d = jax.lax.optimization_barrier((matrix, d))
  _, of_x = jax.vjp(lambda x: local(x, w), x)
  dx, = of_x(d)
  # The axes that are left.
  dw = _from_matrix_with_axis_first(matrix, dw.shape, front)
  others = places[:front] + ((),) + places[front + 1:]
  return dx, _reduce_scatter_all_axes(dw, others)


_multiply_on_device.defvjp(_multiply_on_device_fwd, _multiply_on_device_bwd)


def look_up_embeddings(table_VD: jax.Array, ids_BL: jax.Array,
           dtype: jax.typing.DTypeLike) -> jax.Array:
  """Returns rows of a table of embeddings, [B, L, D], in `dtype`.

  If the table's columns are split over devices of the batch, each device looks
  up its columns for the tokens of all these devices, and an all-to-all returns
  each token to its own device. So neither the table nor its gradient, which
  adds up in the table's dtype, is ever whole.
  """
  at = sharding_of_product('BL', ids_BL, table_VD, ('vocab', 'embed'))
  if at is None or not at.weight[1]:
    # Gathered whole over fsdp first: rows that are split over fsdp would have
    # to move to where the batch is split over it.
    whole_VD = constrain_where_divisible(table_VD, 'vocab', None)
    return whole_VD[ids_BL].astype(dtype)
  columns = at.weight[1]

  def local(table_VD: jax.Array, ids_BL: jax.Array):
    """Looks up a device's columns for the tokens of all `columns`."""
    ids_BL = jax.lax.all_gather(ids_BL, columns, axis=0, tiled=True)
    x_BLD = table_VD[ids_BL].astype(dtype)
    return jax.lax.all_to_all(x_BLD, columns, split_axis=0, concat_axis=2,
                              tiled=True)

  tokens, table = _partition_spec(*at.tokens), _partition_spec(*at.weight)
  mapped = jax.shard_map(local, in_specs=(table, tokens), out_specs=tokens,
                         check_vma=False)
  return mapped(table_VD, ids_BL)


def look_up_sharded_rows(table_IK: jax.Array, ids_BLU: jax.Array,
                   dtype: jax.typing.DTypeLike) -> jax.Array:
  """Returns rows of a table that is sharded by rows, [B, L, U, K], in `dtype`.

  A device is given the ids of all tokens of the devices that the table lies on,
  looks up those that are among its own rows, and the sum over the devices is
  scattered to where the tokens are. So neither the table nor its gradient is
  ever whole.
  """
  names, _ = mesh_axes_of_weight(table_IK.shape, ('table', None))
  rows = mesh_axes('batch')
  along_batch = bool(names) and set(names) <= set(rows)
  if not along_batch or count_shards('batch', ids_BLU.shape[0]) == 1:
    return constrain_where_divisible(table_IK, None, None)[
                                     ids_BLU].astype(dtype)

  def local(table_IK: jax.Array, ids_BLU: jax.Array):
    """Looks up a device's rows for the tokens of all `names`."""
    # The ids, counted from the device's first row on.
    ids_BLU = jax.lax.all_gather(ids_BLU, names, axis=0, tiled=True)
    ids_BLU = ids_BLU - jax.lax.axis_index(names) * len(table_IK)
    here_BLU = (ids_BLU >= 0) & (ids_BLU < len(table_IK))
    # Rows of other devices count as 0 in the sum.
    x_BLUK = table_IK[jnp.clip(ids_BLU, 0, len(table_IK) - 1)]
    x_BLUK = jnp.where(here_BLU[..., None], x_BLUK, 0)
    return reduce_scatter(x_BLUK.astype(dtype), 0, names)

  lengths = ()
  if count_shards('length', ids_BLU.shape[1]) > 1:
    lengths = mesh_axes('length')
  tokens = _partition_spec(rows, lengths)
  mapped = jax.shard_map(local, in_specs=(_partition_spec(names), tokens),
                         out_specs=tokens, check_vma=False)
  return mapped(table_IK, ids_BLU)


def gather_weight(w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Returns a weight gathered over the mesh axes of the batch, in its own
  dtype; it stays sharded over `tensor`."""
  ours, others = _split_by_batch_axes(w.shape, axes)
  if not any(ours):
    return w

  def local(w: jax.Array) -> jax.Array:
    return _gather_all_axes(w, ours)

  mapped = jax.shard_map(local, in_specs=_spec_of_both(ours, others),
                         out_specs=_partition_spec(*others), check_vma=False)
  return mapped(w)


def sum_gradients_of_shards(
  d_Q: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Returns the sum over Q of gradients of a weight, [Q, ...], one for each
  shard of the tokens. The sum is sharded as the weight is."""
  ours, others = _split_by_batch_axes(d_Q.shape[1:], axes)
  tokens = mesh_axes('tokens')
  weight_axes = set(sum(ours, ()))
  along_tokens = bool(weight_axes) and weight_axes <= set(tokens)
  if not along_tokens or count_devices_along(tokens) != d_Q.shape[0]:
    return constrain_where_divisible(d_Q.sum(0), *axes)

  def local(d_Q: jax.Array) -> jax.Array:
    """Scatters over the weight's mesh axes, and sums over the others."""
    d = _reduce_scatter_all_axes(d_Q.sum(0), ours)
    rest = tuple(name for name in tokens if name not in weight_axes)
    if not rest:
      return d
    return jax.lax.psum(d, rest)

  mapped = jax.shard_map(local, in_specs=_partition_spec(tokens, *others),
                         out_specs=_spec_of_both(ours, others), check_vma=False)
  return mapped(d_Q)


def _split_by_batch_axes(shape: tuple[int, ...], axes: tuple[str | None, ...]
              ) -> tuple[MeshAxesByAxis, MeshAxesByAxis]:
  """Returns how a weight lies on the mesh axes of the batch, and how on the
  others."""
  rows = set(mesh_axes('batch'))
  ours, others = [], []
  for names in mesh_axes_of_weight(shape, axes):
    of_batch = set(names) <= rows
    ours.append(names if of_batch else ())
    others.append(() if of_batch else names)
  return tuple(ours), tuple(others)


def _spec_of_both(
  ours: MeshAxesByAxis,
   others: MeshAxesByAxis) -> PartitionSpec:
  """Returns the PartitionSpec of a weight that lies on both."""
  return _partition_spec(*(a + b for a, b in zip(ours, others)))
