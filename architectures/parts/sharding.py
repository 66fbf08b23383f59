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

from common.errors import check_choice, require

# Pairs of a logical axis and its mesh axes: see configs/sharding.py.
AxisRules = Sequence[tuple[str, tuple[str, ...]]]
# The scope of a constraint's operation, which names its logical axes.
SCOPE_OF_CONSTRAINT = 'axes'

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

# The mesh axes of each axis of an array; () for one that is not sharded. (A
# PartitionSpec would turn a tuple of one name into the name.)
MeshAxesByAxis = tuple[tuple[str, ...], ...]


def check_logical_axes(axes) -> tuple[str | None, ...]:
  """Returns logical axes as a tuple.

  Raises:
    ValueError: for a name that is not in LOGICAL_AXES.
  """
  for axis in {*axes} - {None, *LOGICAL_AXES}:
    check_choice('logical axis', axis, LOGICAL_AXES)
  return tuple(axes)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Returns an array constrained to lie on the mesh axes of its logical axes;
  without a mesh, as it is.

  The logical axes are part of the operation's name, for explain_sharding.
  """
  names = ','.join(map(str, check_logical_axes(axes)))
  with jax.named_scope(f'{SCOPE_OF_CONSTRAINT}({names})'):
    return nn.with_logical_constraint(x, axes)


def mesh_axes_by_axis(*axes: str | None) -> MeshAxesByAxis:
  """Returns the mesh axes that each axis of an array is sharded over, by the
  rules of the run.

  Args:
    *axes: the logical axis of each dimension of the array, such as 'batch';
      None: it is not sharded.

  Returns:
    For each dimension the names of mesh axes, without those of a single device;
    () where it is whole on every device, or where there is no mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not nn.get_logical_axis_rules():
    return ((),) * len(axes)
  mesh_axes_of_array = []
  for names in nn.logical_to_mesh_axes(check_logical_axes(axes)):
    # Linen returns None, one name or a tuple of names.
    if names is None:
      names = ()
    if isinstance(names, str):
      names = (names,)
    of_several_devices = [name for name in names if mesh.shape[name] > 1]
    mesh_axes_of_array.append(tuple(of_several_devices))
  return tuple(mesh_axes_of_array)


def mesh_axes(axis: str) -> tuple[str, ...]:
  """Returns the mesh axes that a logical axis lies on where an array has no
  other axis."""
  return mesh_axes_by_axis(axis)[0]


def mesh_axes_that_divide(names: tuple[str, ...], length: int,
                          devices_along: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes over which a dimension of a weight is sharded: as
  many as together divide it, from the first one on.

  Args:
    names: the mesh axes of the dimension's logical axis.
    length: the size of the dimension.
    devices_along: the number of devices along each mesh axis.
  """
  # In the end no name is left: the product of none is 1, which divides any
  # size.
  while length % math.prod(devices_along[name] for name in names):
    names = names[:-1]
  return names


def mesh_axes_of_weight(shape: tuple[int, ...], axes: tuple[str | None, ...]
                        ) -> MeshAxesByAxis:
  """Returns the mesh axes that each axis of a weight is sharded over: those of
  the rules that divide its size.

  Args:
    shape: the shape of the weight.
    axes: its logical axes, one for each dimension.

  Returns:
    For each dimension the names of mesh axes; () where it is whole.
  """
  devices_along = jax.sharding.get_abstract_mesh().shape
  mesh_axes_of_array = []
  for length, names in zip(shape, mesh_axes_by_axis(*axes)):
    mesh_axes_of_array.append(
        mesh_axes_that_divide(names, length, devices_along))
  return tuple(mesh_axes_of_array)


def count_devices_along(names: tuple[str, ...]) -> int:
  """Returns how many devices lie along mesh axes together."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[name] for name in names)


def count_shards(axis: str, length: int) -> int:
  """Returns how many shards an axis of an array is cut into over the devices; 1
  without a mesh, or where the number of devices does not divide the axis.

  Args:
    axis: the logical axis, such as 'batch'.
    length: the size of the array along it.
  """
  count = count_devices_along(mesh_axes(axis))
  if length % count:
    return 1
  return count


def constrain_where_divisible(x: jax.Array, *axes: str | None) -> jax.Array:
  """Returns an array constrained as by `constrain`, but not along axes that the
  mesh does not divide."""
  divisible_axes = []
  for axis, length in zip(axes, x.shape):
    is_divisible = axis is not None and count_shards(axis, length) > 1
    divisible_axes.append(axis if is_divisible else None)
  return constrain(x, *divisible_axes)


def constrain_stream(x: jax.Array, *axes: str | None) -> jax.Array:
  """Returns the residual stream constrained to its place on the mesh, so that
  XLA neither gathers nor moves it between layers.

  Its length is sharded over the mesh axes of `stream` or, if their number of
  devices does not divide it, over those of `length`.

  Args:
    x: the array, [batch, length, ...].
    *axes: the logical axes after B and L.
  """
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
  """Returns whether the program is traced for a CPU that is not part of a
  mesh."""
  return traced_platform() == 'cpu' and count_devices() == 1


@contextlib.contextmanager
def install_rules(table: AxisRules):
  """Installs a table of configs/sharding.py for what is traced inside."""
  with nn.logical_axis_rules(table):
    yield


# The role of a parameter, declared where it is made.
#
# Every parameter is made by `declare` (weight and bias of layers.py call it),
# which keeps its role beside its logical axes. The optimisers read nothing
# else: muP's learning rates, the matrices of Muon and Adafactor, and weight
# decay (training/optim/). No pattern over names has to know a new parameter.


class Axes(NamedTuple):
  """The numbers of an array's axes, by what they are to a product.

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
    """Whether the parameter is a matrix, or a table that is looked up."""
    return bool(self.inputs)

  def split(self, ndim: int) -> Axes:
    """Sorts the axes of an array that holds the parameter, or several of them
    stacked, into batch, inputs and outputs.

    Axes in front of the declared ones, such as the one over layers that the
    scan adds, are a batch: the matrices along them are separate.

    Args:
      ndim: the number of axes of the array.

    Returns:
      The numbers of the axes of each sort.
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
  """Returns the Role of each parameter: its logical axes, which of them are
  inputs, and its kind, by which it is sharded and optimized.

  Args:
    boxed: a tree of parameters in the boxes (Declared) in which `declare` makes
      them.

  Returns:
    A tree of the same structure, with a Role for each parameter.

  Raises:
    RequestError: for a parameter that declares none.
  """
  def role_of_box(path, box) -> Role:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    require(isinstance(box, Declared),
            f'the parameter {name!r} declares no role: make it by weight, bias '
            'or embedding of architectures/parts/layers.py, or by declare of '
            'sharding.py')
    return box.role

  return jax.tree_util.tree_map_with_path(
      role_of_box, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def declare(module: nn.Module, name: str, init: Callable,
            shape: tuple[int, ...], role: Role,
            dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
  """Declares a parameter of a Flax module together with its role: the names of
  its axes and what it is for. Returns its value.

  Args:
    module: the module, with a `config`.
    name: the parameter's name.
    init: its initializer, (key, shape, dtype) -> the first value; it draws in
      float32, since JAX's bfloat16 normals have 128 values, whose mean is not
      0.
    shape: its shape.
    role: its role. Every parameter has one, so that sharding and the optimizer
      need no table of names.
    dtype: its type; None: the config's param_dtype.

  Raises:
    ValueError: for a logical axis that the legend lacks.
  """
  axes = check_logical_axes(role.axes)
  dtype = dtype or module.config.param_dtype

  def make_box(key: jax.Array, shape: tuple[int, ...]) -> Declared:
    value = init(key, shape, jnp.float32).astype(dtype)
    return Declared(value, axes, role=role)

  return module.param(name, make_box, shape)


# The shapes of a module's parameters.


@functools.lru_cache(maxsize=64)  # a program asks for the same ones often
def abstract_params(module: nn.Module):
  """Returns the shapes of a model's parameters, each in its box; nothing is
  computed."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(module.init, jax.random.key(0), tokens)['params']


def parameter_shapes(module: nn.Module):
  """Returns the shape and the dtype of each parameter of a model, as a tree.

  Parameters are made in boxes that hold their roles. In a run's context,
  `nn.meta.unbox` would constrain them to its mesh, so they are taken out here.

  Args:
    module: the model; nothing of it is computed.
  """
  def shape_in_box(box):
    if nn.meta.is_axis_metadata(box):
      return box.value
    return box

  return jax.tree.map(
      shape_in_box, abstract_params(module), is_leaf=nn.meta.is_axis_metadata)


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


# The name of a whole weight that remat is to keep.
NAME_OF_KEPT_WEIGHT = 'kept_weight'
# A TPU pads the last axis of an array to the lanes of its registers.
LANES_OF_TPU_REGISTER = 128
# The letters, in an einsum, of axes that are sharded as `length` is.
LETTERS_OF_LENGTH = 'LM'


class ShardingOfProduct(NamedTuple):
  """How the arrays of a product lie on the mesh.

  Attributes:
    tokens: the mesh axes of the activations' token axes, which come first.
    weight: the mesh axes of the weight's axes.
  """
  tokens: MeshAxesByAxis
  weight: MeshAxesByAxis


def _partition_spec(*axes: tuple[str, ...]) -> PartitionSpec:
  """Returns the PartitionSpec of an array, of the mesh axes of its axes."""
  return PartitionSpec(*(names or None for names in axes))


def _gather_all_axes(w: jax.Array, axes: MeshAxesByAxis) -> jax.Array:
  """Returns the whole of an array of which each device has a shard.

  Args:
    w: the shard of this device, in a function that is mapped over the mesh.
    axes: the mesh axes that each axis is sharded over.
  """
  for axis, names in enumerate(axes):
    if names:
      w = gather_shards(w, axis, names)
  return w


def _reduce_scatter_all_axes(d: jax.Array, axes: MeshAxesByAxis) -> jax.Array:
  """Returns this device's shard of the sum of an array over devices, where
  several axes of the sum may be sharded.

  Args:
    d: the summand of this device, inside of shard_map.
    axes: for each axis of the sum, the mesh axes that it is sharded over; the
      sum goes over all of these.
  """
  # Each step leaves less to send for the next one.
  for axis, names in enumerate(axes):
    if names:
      d = reduce_scatter(d, axis, names)
  return d


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_shards(w: jax.Array, axis: int, names: tuple[str, ...]) -> jax.Array:
  """Returns an array that is whole along one axis, made of the shards of all
  devices. Its gradient is a reduce-scatter, the transpose of a gather.

  Args:
    w: the shard of this device, inside of shard_map.
    axis: the axis that is sharded.
    names: the mesh axes that it is sharded over.
  """
  if axis == 0 and w.shape[-1] % LANES_OF_TPU_REGISTER == 0:
    # This is the layout of such a weight on a TPU. Without it XLA copies those
    # of all layers into the order of axes that their product takes, and keeps
    # the copies until the end of the backward pass.
    w = with_layout_constraint(w, Layout(tuple(range(w.ndim))))
  # The steps of the scattering sum are undone in reverse, so that shards come
  # back in the order of the devices.
  for mesh_axis, groups in reversed(_steps_of_collective(names)):
    w = jax.lax.all_gather(w, mesh_axis, axis=axis, tiled=True,
                           axis_index_groups=groups)
  return w


def _gather_shards_fwd(w: jax.Array, axis: int, names: tuple[str, ...]):
  """Returns the whole array, and nothing that the gradient needs."""
  return gather_shards(w, axis, names), None


def _gather_shards_bwd(axis: int, names: tuple[str, ...], _: None,
                       d: jax.Array):
  """Returns the gradient of the shard: this device's part of the sum over the
  devices of d, their gradients of the whole array."""
  matrix = reduce_scatter(_to_matrix_with_axis_first(d, axis), 0, names)
  return (_from_matrix_with_axis_first(matrix, d.shape, axis),)


gather_shards.defvjp(_gather_shards_fwd, _gather_shards_bwd)


def _to_matrix_with_axis_first(d: jax.Array, axis: int) -> jax.Array:
  """Returns d as a matrix whose rows are one axis of d, and whose columns are
  all others, row by row in memory.

  In most other layouts, and with more axes, XLA sums the whole array over the
  devices where it is to scatter the sum.
  """
  d = jnp.moveaxis(d, axis, 0)
  return with_layout_constraint(d.reshape(len(d), -1), Layout((0, 1)))


def _from_matrix_with_axis_first(matrix: jax.Array, shape: tuple[int, ...],
                                 axis: int) -> jax.Array:
  """Returns the array that `_to_matrix_with_axis_first` made a matrix of.

  Args:
    matrix: the matrix, which may have fewer rows than the array had.
    shape: the shape of the array.
    axis: the axis of the array that is the rows.
  """
  other_axes = shape[:axis] + shape[axis + 1:]
  return jnp.moveaxis(matrix.reshape(-1, *other_axes), 0, axis)


def reduce_scatter(d: jax.Array, axis: int, names: tuple[str, ...]
                   ) -> jax.Array:
  """Returns this device's shard, along one axis, of the sum of d over devices.

  The axis is moved to the front, because XLA turns a reduce-scatter along the
  last axis in memory into an all-reduce.

  Args:
    d: the summand of this device, inside of shard_map.
    axis: the axis along which the sum is sharded.
    names: the mesh axes over which the sum goes.
  """
  d = jnp.moveaxis(d, axis, 0)
  for mesh_axis, groups in _steps_of_collective(names):
    d = jax.lax.psum_scatter(d, mesh_axis, tiled=True, axis_index_groups=groups)
  return jnp.moveaxis(d, 0, axis)


def _steps_of_collective(names: tuple[str, ...]
                         ) -> list[tuple[str, list[list[int]] | None]]:
  """Returns the collectives into which a reduce-scatter over mesh axes is
  divided; a gather takes them in reverse.

  XLA turns a collective over all devices of the mesh into an all-reduce. So
  several axes are taken one after another, and a single axis that has all
  devices in two steps, first over devices that are far apart, then over
  neighbours. The steps together send as much as one would.

  Args:
    names: the mesh axes.

  Returns:
    For each collective its mesh axis, and the groups of devices along this that
    it goes over, by their numbers; None: all are one group.
  """
  if len(names) > 1:
    return [(name, None) for name in names]
  num_devices = count_devices_along(names)
  group_size = _size_of_first_groups(num_devices)
  is_part_of_mesh = num_devices < jax.sharding.get_abstract_mesh().size
  if is_part_of_mesh or group_size == num_devices:
    return [(names[0], None)]
  # Devices in a grid: its columns are far apart, and its rows are neighbours.
  grid = np.arange(num_devices).reshape(group_size, num_devices // group_size)
  return [(names[0], grid.T.tolist()), (names[0], grid.tolist())]


def _size_of_first_groups(num_devices: int) -> int:
  """Returns the size of the groups in the first of two steps: the least divisor
  of the number of devices that is not below its root. If that is the number
  itself, there is one step."""
  group_size = math.isqrt(num_devices - 1) + 1
  while num_devices % group_size:
    group_size += 1
  return group_size


def sharding_of_product(letters: str, x: jax.Array, w: jax.Array,
                        axes: Optional[tuple[str | None, ...]]
                        ) -> Optional[ShardingOfProduct]:
  """Returns how the tokens and the weight of a product lie on the mesh, where
  devices gather the weight themselves instead of leaving that to XLA.

  Args:
    letters: the letters of an einsum, which begin with those of the axes of x;
      the batch is B.
    x: activations, [batch, length, ...].
    w: a weight.
    axes: the weight's logical axes; None: it is none that is sharded.

  Returns:
    The mesh axes of the tokens, for their batch and their length, and those of
    each axis of the weight. None: the product is left to XLA.
  """
  if axes is None or letters[0] != 'B':
    return None
  weight = mesh_axes_of_weight(w.shape, axes)
  weight_axes = set(sum(weight, ()))
  batch_axes = mesh_axes('batch')
  # The weight must lie on mesh axes of the batch alone, which split the rows;
  # and those of `tensor`, where `mlp` lies, must have one device.
  if not weight_axes or not weight_axes <= set(batch_axes):
    return None
  if mesh_axes('mlp') or count_shards('batch', x.shape[0]) == 1:
    return None
  length_axes = ()
  if (letters[1] in LETTERS_OF_LENGTH
      and count_shards('length', x.shape[1]) > 1):
    length_axes = mesh_axes('length')
  return ShardingOfProduct(tokens=(batch_axes, length_axes), weight=weight)


def multiply_by_gathered_weight(
    multiply: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array,
    w: jax.Array, product_sharding: ShardingOfProduct, keep: bool,
    name: str = '') -> jax.Array:
  """Returns a product with a sharded weight, which each device gathers and
  multiplies with its own tokens (fully sharded data parallelism).

  Args:
    multiply: the product, (tokens, whole weight) -> result, which begins with
      the tokens' axes.
    x: activations, [batch, length, ...].
    w: the weight, in the dtype that it is sent in.
    product_sharding: how both lie on the mesh.
    keep: whether the whole weight may be kept for the gradient. With remat it
      may: it is kept only while its layer is computed again.
    name: the name of the whole weight, by which a remat policy keeps it longer;
      '': it has none.
  """
  on_device = functools.partial(
      _multiply_on_device, multiply, product_sharding.weight, name)
  if not keep:  # gathers again; the product's gradient does not need its result
    on_device = jax.checkpoint(on_device)
  tokens_spec = _partition_spec(*product_sharding.tokens)
  weight_spec = _partition_spec(*product_sharding.weight)
  on_mesh = jax.shard_map(
      on_device, in_specs=(tokens_spec, weight_spec), out_specs=tokens_spec,
      check_vma=False)
  return on_mesh(x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _multiply_on_device(multiply: Callable, axes: MeshAxesByAxis, name: str,
                        x: jax.Array, w: jax.Array):
  """Returns multiply(x, the whole weight), on one device of the mesh.

  The gradient of the weight is computed and scattered before that of x is
  computed. So a device holds the whole gradient of one weight at a time, and x
  may go before its gradient, which is as large, takes room. Left to itself,
  XLA's scheduler puts the scattering off to the end of the layer, and no
  compute is on its way meanwhile: libtpu compiles it to a synchronous
  operation.

  Args:
    multiply: the product.
    axes: the mesh axes that each axis of the weight is sharded over.
    name: the name of the whole weight for remat; '': it has none.
    x: the tokens of this device.
    w: its shard of the weight.
  """
  return multiply(x, _gather_all_axes(w, axes))


def _multiply_on_device_fwd(multiply: Callable, axes: MeshAxesByAxis, name: str,
                            x: jax.Array, w: jax.Array):
  """Returns the product, and x and the whole weight for the gradient."""
  w = _gather_all_axes(w, axes)
  if name:
    w = checkpoint_name(w, name)
  return multiply(x, w), (x, w)


def _multiply_on_device_bwd(multiply: Callable, axes: MeshAxesByAxis, name: str,
                            operands: tuple[jax.Array, jax.Array],
                            dy: jax.Array):
  """Returns the gradients of x and of this device's shard of the weight.

  With y = multiply(x, w), these are dx = dy w^T on each device, and
  dw = sum over devices of x^T dy, of which each keeps its shard.

  Args:
    multiply: the product.
    axes: the mesh axes that each axis of the weight is sharded over.
    name: not read here.
    operands: the tokens of this device, and the whole weight.
    dy: the gradient of the product.
  """
  x, w = operands
  # dw, scattered along the first of its axes that is sharded, which leaves the
  # least of it on the device.
  _, gradient_of_w = jax.vjp(functools.partial(multiply, x), w)
  dw, = gradient_of_w(dy)
  first_axis = next(axis for axis, names in enumerate(axes) if names)
  matrix = reduce_scatter(
      _to_matrix_with_axis_first(dw, first_axis), 0, axes[first_axis])
  # dx is computed after that: dy passes one barrier with the scattered dw.
  matrix, dy = jax.lax.optimization_barrier((matrix, dy))
  _, gradient_of_x = jax.vjp(lambda x: multiply(x, w), x)
  dx, = gradient_of_x(dy)
  # dw, scattered along its other axes.
  dw = _from_matrix_with_axis_first(matrix, dw.shape, first_axis)
  other_axes = axes[:first_axis] + ((),) + axes[first_axis + 1:]
  return dx, _reduce_scatter_all_axes(dw, other_axes)


_multiply_on_device.defvjp(_multiply_on_device_fwd, _multiply_on_device_bwd)


def look_up_embeddings(table_VD: jax.Array, ids_BL: jax.Array,
                       dtype: jax.typing.DTypeLike) -> jax.Array:
  """Looks up tokens in a table of embeddings that may be sharded.

  If the table's columns are split over devices of the batch, each device looks
  up its columns for the tokens of all these devices, and an all-to-all returns
  each token to its own device. So neither the table nor its gradient, which
  adds up in the table's dtype, is ever whole.

  Args:
    table_VD: the table, [vocabulary, d_model].
    ids_BL: the row of each token, [batch, length].
    dtype: the type of the result.

  Returns:
    The rows, [B, L, D].
  """
  product_sharding = sharding_of_product(
      'BL', ids_BL, table_VD, axes=('vocab', 'embed'))
  if product_sharding is None or not product_sharding.weight[1]:
    # Gathered whole over fsdp first: rows that are split over fsdp would have
    # to move to where the batch is split over it.
    whole_VD = constrain_where_divisible(table_VD, 'vocab', None)
    return whole_VD[ids_BL].astype(dtype)
  column_axes = product_sharding.weight[1]

  def look_up_on_device(table_VD: jax.Array, ids_BL: jax.Array) -> jax.Array:
    """Looks up this device's columns for the tokens of all devices that the
    columns lie on, and exchanges them for all columns of its own tokens."""
    ids_BL = jax.lax.all_gather(ids_BL, column_axes, axis=0, tiled=True)
    x_BLD = table_VD[ids_BL].astype(dtype)
    return jax.lax.all_to_all(x_BLD, column_axes, split_axis=0, concat_axis=2,
                              tiled=True)

  tokens_spec = _partition_spec(*product_sharding.tokens)
  table_spec = _partition_spec(*product_sharding.weight)
  on_mesh = jax.shard_map(
      look_up_on_device, in_specs=(table_spec, tokens_spec),
      out_specs=tokens_spec, check_vma=False)
  return on_mesh(table_VD, ids_BL)


def look_up_sharded_rows(table_IK: jax.Array, ids_BLU: jax.Array,
                         dtype: jax.typing.DTypeLike) -> jax.Array:
  """Looks up several rows for each token in a large table whose rows are
  divided over the devices.

  A device is given the ids of all tokens of the devices that the table lies on,
  looks up those that are among its own rows, and the sum over the devices is
  scattered to where the tokens are. So neither the table nor its gradient is
  ever whole.

  Args:
    table_IK: the table, of I rows with K features.
    ids_BLU: the U rows that each token reads, [batch, length, U].
    dtype: the type of the result.

  Returns:
    The rows, [B, L, U, K].
  """
  row_axes, _ = mesh_axes_of_weight(table_IK.shape, ('table', None))
  batch_axes = mesh_axes('batch')
  lies_along_batch = bool(row_axes) and set(row_axes) <= set(batch_axes)
  if not lies_along_batch or count_shards('batch', ids_BLU.shape[0]) == 1:
    whole_IK = constrain_where_divisible(table_IK, None, None)
    return whole_IK[ids_BLU].astype(dtype)

  def look_up_on_device(table_IK: jax.Array, ids_BLU: jax.Array) -> jax.Array:
    """Looks up this device's rows for the tokens of all devices that the table
    lies on, and returns the rows of its own tokens."""
    # The ids, counted from the device's first row on.
    ids_BLU = jax.lax.all_gather(ids_BLU, row_axes, axis=0, tiled=True)
    ids_BLU = ids_BLU - jax.lax.axis_index(row_axes) * len(table_IK)
    is_here_BLU = (ids_BLU >= 0) & (ids_BLU < len(table_IK))
    # Rows of other devices count as 0 in the sum.
    x_BLUK = table_IK[jnp.clip(ids_BLU, 0, len(table_IK) - 1)]
    x_BLUK = jnp.where(is_here_BLU[..., None], x_BLUK, 0)
    return reduce_scatter(x_BLUK.astype(dtype), 0, row_axes)

  length_axes = ()
  if count_shards('length', ids_BLU.shape[1]) > 1:
    length_axes = mesh_axes('length')
  tokens_spec = _partition_spec(batch_axes, length_axes)
  on_mesh = jax.shard_map(
      look_up_on_device, in_specs=(_partition_spec(row_axes), tokens_spec),
      out_specs=tokens_spec, check_vma=False)
  return on_mesh(table_IK, ids_BLU)


def gather_weight(w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Returns a weight made whole along what data parallelism shards of it, in
  its own dtype; it stays sharded over the mesh axis `tensor`.

  Args:
    w: the weight.
    axes: its logical axes, one for each dimension.
  """
  # A weight that data parallelism does not shard is whole already.
  batch_axes, other_axes = _split_by_batch_axes(w.shape, axes)
  if not any(batch_axes):
    return w

  def gather_on_device(w: jax.Array) -> jax.Array:
    return _gather_all_axes(w, batch_axes)

  on_mesh = jax.shard_map(
      gather_on_device, in_specs=_spec_of_both(batch_axes, other_axes),
      out_specs=_partition_spec(*other_axes), check_vma=False)
  return on_mesh(w)


def sum_gradients_of_shards(d_Q: jax.Array, axes: tuple[str | None, ...]
                            ) -> jax.Array:
  """Returns the gradient of a weight: the sum of those that each of Q shards of
  the tokens has computed, sharded as the weight is.

  Args:
    d_Q: the gradients, [Q, ...], whose first axis is sharded as the tokens are.
    axes: the logical axes of the weight.
  """
  batch_axes, other_axes = _split_by_batch_axes(d_Q.shape[1:], axes)
  token_axes = mesh_axes('tokens')
  # Where the weight does not lie along the devices of the tokens, or there is
  # another number of these than of gradients, the sum is left to XLA.
  weight_axes = set(sum(batch_axes, ()))
  lies_along_tokens = bool(weight_axes) and weight_axes <= set(token_axes)
  if not lies_along_tokens or count_devices_along(token_axes) != d_Q.shape[0]:
    return constrain_where_divisible(d_Q.sum(0), *axes)

  def sum_on_device(d_Q: jax.Array) -> jax.Array:
    """Scatters the sum over the weight's mesh axes, and sums over the other
    ones of the tokens."""
    d = _reduce_scatter_all_axes(d_Q.sum(0), batch_axes)
    remaining_axes = tuple(
        [name for name in token_axes if name not in weight_axes])
    if not remaining_axes:
      return d
    return jax.lax.psum(d, remaining_axes)

  on_mesh = jax.shard_map(
      sum_on_device, in_specs=_partition_spec(token_axes, *other_axes),
      out_specs=_spec_of_both(batch_axes, other_axes), check_vma=False)
  return on_mesh(d_Q)


def _split_by_batch_axes(shape: tuple[int, ...], axes: tuple[str | None, ...]
                         ) -> tuple[MeshAxesByAxis, MeshAxesByAxis]:
  """Splits the mesh axes that a weight is sharded over into those of the batch
  (data parallelism) and others (tensor or expert parallelism).

  Args:
    shape: the shape of the weight.
    axes: its logical axes, one for each dimension.

  Returns:
    For each dimension its mesh axes of the batch, and for each its others.
  """
  mesh_axes_of_batch = set(mesh_axes('batch'))
  batch_axes, other_axes = [], []
  for names in mesh_axes_of_weight(shape, axes):
    is_of_batch = set(names) <= mesh_axes_of_batch
    batch_axes.append(names if is_of_batch else ())
    other_axes.append(() if is_of_batch else names)
  return tuple(batch_axes), tuple(other_axes)


def _spec_of_both(batch_axes: MeshAxesByAxis, other_axes: MeshAxesByAxis
                  ) -> PartitionSpec:
  """Returns the PartitionSpec of a weight that lies on both kinds of mesh
  axes, as `_split_by_batch_axes` returns them."""
  both = [of_batch + others
          for of_batch, others in zip(batch_axes, other_axes)]
  return _partition_spec(*both)
