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
from typing import Any, NamedTuple, Optional

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

# The random stream of a module whose parameters' shapes alone are wanted: their
# initial values are not drawn, and nothing counts how often they would be.
SHAPES_ALONE = 'shapes'

# The names that an axis of an array may have. 'stream' is the length of what
# goes from layer to layer, and 'length' that of what a layer computes of it.
# 'tokens' are batch and length in one axis, 'joined' heads and their features,
# 'rows' the tokens of a table whose columns are heads, 'groups' heads of keys
# whose number does not grow with the width, 'table' the rows of tables of
# model.memory, 'features' the outputs of a square matrix, which stay whole.
LOGICAL_AXES = (
    'batch', 'experts', 'vocab', 'mlp', 'heads', 'kv_heads', 'groups', 'joined',
    'embed', 'features', 'latent', 'rows', 'table', 'length', 'stream',
    'tokens', 'head', 'capacity', 'layers')

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
  """Looks up over which mesh axes each dimension of an array is sharded, by the
  rules of the run (pairs of a logical axis and its mesh axes).

  Args:
    *axes: the logical axis of each dimension, such as 'batch'; None: the
      dimension is not sharded.

  Returns:
    For each dimension the names of its mesh axes, without those that have a
    single device. () stands for a dimension that is whole on every device. All
    are () where there is no mesh.
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
  """Chooses over which mesh axes a dimension of a weight is sharded, so that
  its size can be divided by the number of devices. From the end, names are
  dropped until the remaining ones divide it.

  Args:
    names: the mesh axes that the rules give the dimension.
    length: the size of the dimension.
    devices_along: the number of devices along each mesh axis.

  Returns:
    The first few of `names`; () where none divides the size.
  """
  # The loop ends at the latest when no name is left: an empty product is 1.
  while length % math.prod(devices_along[name] for name in names):
    names = names[:-1]
  return names


def mesh_axes_of_weight(shape: tuple[int, ...], axes: tuple[str | None, ...]
                        ) -> MeshAxesByAxis:
  """Returns over which mesh axes each dimension of a weight is sharded. These
  are the mesh axes of the run's rules whose devices divide the dimension.

  Args:
    shape: the shape of the weight.
    axes: its logical axes, one for each dimension.

  Returns:
    For each dimension the names of its mesh axes; () for a dimension that is
    whole on every device.
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
  """Returns into how many shards a dimension of an array is cut, one for each
  device along its mesh axes.

  Args:
    axis: the logical axis of the dimension, such as 'batch'.
    length: the size of the dimension.

  Returns:
    The number of shards; 1 without a mesh, or where the number of devices does
    not divide the size.
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
  """Fixes how the residual stream is sharded over the mesh, so that XLA neither
  gathers nor moves it between layers.

  Its length is sharded over the mesh axes of the logical axis 'stream' or, if
  their devices do not divide the length, over those of 'length'.

  Args:
    x: the stream, [batch, length, ...].
    *axes: the logical axes of the dimensions after batch and length.

  Returns:
    x with this constraint.
  """
  axis_of_length = 'length'
  if count_shards('stream', x.shape[1]) > 1:
    axis_of_length = 'stream'
  return constrain(x, 'batch', axis_of_length, *axes)


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
class Scale:
  """The scale of a parameter, as muP has to know it beyond the width of the
  model: how it differs from that of the base model because its experts are
  others.

  Attributes:
    mlp: how many times as long as in the base its axis 'mlp' is; None: as many
      times as d_model.
    stddev: how many times as large as a matrix of this shape is otherwise its
      initial standard deviation is.
    gradient: how many times as small as in the base its gradient is.
  """
  mlp: Optional[float] = None
  stddev: float = 1.0
  gradient: float = 1.0


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
    scale: how it differs from that of muP's base beyond the width.
  """
  axes: tuple[str | None, ...]
  inputs: tuple[int, ...] = ()
  batch: tuple[int, ...] = ()
  kind: str = 'hidden'
  tuned: bool = False
  reads: int = 0
  scale: Scale = Scale()

  @property
  def is_matrix(self) -> bool:
    """Whether the parameter is a matrix, or a table that is looked up."""
    return bool(self.inputs)

  @property
  def is_hidden_matrix(self) -> bool:
    """Whether it is a matrix whose product is neither looked up nor logits."""
    return self.is_matrix and self.kind == 'hidden'

  def split(self, ndim: int) -> Axes:
    """Sorts the axes of a parameter into batch, inputs and outputs, by which
    optimisers that work on matrices (such as Muon) treat it. A product sums
    over the inputs; along the batch there are separate matrices.

    Args:
      ndim: the number of axes of the array. It may have more axes in front than
        the parameter was declared with, such as one over layers that a scan
        adds. These count as batch.

    Returns:
      The indices of the axes of each sort.
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


def roles_of_parameters(boxed: Any) -> Any:
  """Returns the role of each parameter. A Role says what the axes of a
  parameter are and what it is for; sharding and optimisers read it.

  Args:
    boxed: a tree of parameters, each inside the box (`Declared`) in which
      `declare` made it together with its role.

  Returns:
    A tree of the same structure, with a Role for each parameter.

  Raises:
    RequestError: for a parameter that was made without a role.
  """
  def role_of_box(path: tuple, box: Any) -> Role:
    """Returns the role of the parameter at a path of the tree."""
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
  """Declares a parameter of a Flax module together with its role, which says
  what the axes of the parameter are and what it is for. Sharding and optimisers
  read the role, so that they need no table of parameters' names.

  Args:
    module: the module, which must have a `config`.
    name: the parameter's name.
    init: its initialiser, (key, shape, dtype) -> the initial value.
    shape: its shape.
    role: its role.
    dtype: its type; None: the config's param_dtype.

  Returns:
    The value of the parameter.

  Raises:
    ValueError: for a logical axis that is not in LOGICAL_AXES.
  """
  axes = check_logical_axes(role.axes)
  dtype = dtype or module.config.param_dtype

  def make_box(key: jax.Array, shape: tuple[int, ...]) -> Declared:
    """Draws the initial value, and boxes it with the role."""
    if module.has_rng(SHAPES_ALONE):
      return Declared(jnp.zeros(shape, dtype), axes, role=role)
    # The draw is in float32: JAX's normal numbers in bfloat16 have only 128
    # values, whose mean is not 0.
    value = init(key, shape, jnp.float32).astype(dtype)
    return Declared(value, axes, role=role)

  return module.param(name, make_box, shape)


# The shapes of a module's parameters.


@functools.lru_cache(maxsize=64)  # a program asks for the same ones often
def abstract_params(module: nn.Module):
  """Returns the shapes of a model's parameters, each in its box; nothing is
  computed."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  key = jax.random.key(0)
  keys = {'params': key, SHAPES_ALONE: key}
  return jax.eval_shape(module.init, keys, tokens)['params']


def parameter_shapes(module: nn.Module) -> Any:
  """Returns the shape and the dtype of each parameter of a model, without
  computing anything.

  Args:
    module: the model.

  Returns:
    A tree with a ShapeDtypeStruct for each parameter.
  """
  # Each parameter is inside a box that holds its role. It is taken out by hand,
  # because `nn.meta.unbox` would also constrain it to the mesh of the run.
  def shape_in_box(box: Any) -> Any:
    """Returns what is inside a box."""
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
  """Sums an array over devices and keeps this device's shard of the sum, which
  may be sharded along several dimensions. It is called inside of shard_map.

  Args:
    d: the summand of this device.
    axes: for each dimension of the sum, the mesh axes that it is sharded over.
      The sum goes over the devices of all these mesh axes.

  Returns:
    The shard.
  """
  # One dimension after another. Each step leaves less to send for the next.
  for axis, names in enumerate(axes):
    if names:
      d = reduce_scatter(d, axis, names)
  return d


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_shards(w: jax.Array, axis: int, names: tuple[str, ...]) -> jax.Array:
  """Gathers the shards of an array along one axis from all devices
  (all-gather). It is called inside of shard_map. Its gradient, defined below,
  is the transpose of a gather: a reduce-scatter.

  Args:
    w: the shard of this device.
    axis: the axis that is sharded.
    names: the mesh axes that it is sharded over.

  Returns:
    The array, whole along this axis.
  """
  if axis == 0 and w.shape[-1] % LANES_OF_TPU_REGISTER == 0:
    # This is the layout that such a weight has on a TPU anyway. If it is not
    # fixed, XLA copies the weights of all layers into another order of axes,
    # and keeps the copies until the end of the backward pass.
    w = with_layout_constraint(w, Layout(tuple(range(w.ndim))))
  # The steps must be those of `reduce_scatter` in reverse, so that the shards
  # come back in the order of the devices.
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
  """Sums an array over devices and keeps this device's shard of the sum, along
  one axis (reduce-scatter). It is called inside of shard_map.

  Args:
    d: the summand of this device.
    axis: the axis along which the sum is sharded.
    names: the mesh axes over whose devices the sum goes.

  Returns:
    The shard.
  """
  # The axis is moved to the front, because XLA turns a reduce-scatter along the
  # last axis in memory into an all-reduce, which sends twice as much.
  d = jnp.moveaxis(d, axis, 0)
  for mesh_axis, groups in _steps_of_collective(names):
    d = jax.lax.psum_scatter(d, mesh_axis, tiled=True, axis_index_groups=groups)
  return jnp.moveaxis(d, 0, axis)


def _steps_of_collective(names: tuple[str, ...]
                         ) -> list[tuple[str, list[list[int]] | None]]:
  """Divides a reduce-scatter over mesh axes into steps, none of which goes over
  all devices of the mesh, as XLA would turn such a step into an all-reduce. A
  gather takes the same steps in reverse order.

  Several mesh axes are taken one after another. A single axis that has all
  devices is taken in two steps, first over devices that are far apart and then
  over neighbours. The steps together send as much as one step would.

  Args:
    names: the mesh axes.

  Returns:
    A pair for each step: its mesh axis, and the groups of devices along it
    within which the step goes, by their numbers. None in place of the groups
    stands for a single group of all devices along the axis.
  """
  if len(names) > 1:
    return [(name, None) for name in names]
  num_devices = count_devices_along(names)
  group_size = _size_of_first_groups(num_devices)
  is_part_of_mesh = num_devices < jax.sharding.get_abstract_mesh().size
  if is_part_of_mesh or group_size == num_devices:
    return [(names[0], None)]
  # Number the devices row by row in a grid. The devices of a column are far
  # apart, and those of a row are neighbours.
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
  """Decides whether the devices gather the sharded weight of a product by
  themselves (fully sharded data parallelism) or leave that to XLA. In the first
  case it returns how tokens and weight are sharded.

  Args:
    letters: the letters of the product's einsum. They begin with those of the
      axes of x, where B is the batch.
    x: the activations, [batch, length, ...].
    w: the weight.
    axes: the weight's logical axes; None: the weight is not sharded.

  Returns:
    The mesh axes of the tokens (of their batch and their length) and those of
    each axis of the weight; None: the product is left to XLA.
  """
  if axes is None or letters[0] != 'B':
    return None
  weight = mesh_axes_of_weight(w.shape, axes)
  weight_axes = set(sum(weight, ()))
  batch_axes = mesh_axes('batch')
  # The weight must be sharded only over mesh axes that split the batch too, and
  # there must be no tensor parallelism (which would shard 'mlp').
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
  """Multiplies tokens by a sharded weight, which each device gathers whole and
  applies to its own tokens (fully sharded data parallelism).

  Args:
    multiply: the product, (tokens, whole weight) -> result. The result must
      begin with the tokens' axes.
    x: the activations, [batch, length, ...].
    w: the weight, in the dtype in which it is to be sent.
    product_sharding: the mesh axes of the tokens and of the weight.
    keep: whether the gathered weight may be kept for the gradient. It may where
      the layer is computed again in the backward pass (remat), since it is then
      kept for a short time only.
    name: a name for the gathered weight, by which a remat policy can choose to
      keep it longer; '': it has none.

  Returns:
    The product, sharded as the tokens are.
  """
  on_device = functools.partial(
      _multiply_on_device, multiply, product_sharding.weight, name)
  # Without `keep` the weight is gathered a second time for the gradient. The
  # product is not computed a second time, since its gradient does not need it.
  if not keep:
    on_device = jax.checkpoint(on_device)
  tokens_spec = _partition_spec(*product_sharding.tokens)
  weight_spec = _partition_spec(*product_sharding.weight)
  # check_vma, JAX's check of what varies over devices, is off: it knows nothing
  # of the hand-written gradient. Tests compare with a single device instead.
  on_mesh = jax.shard_map(
      on_device, in_specs=(tokens_spec, weight_spec), out_specs=tokens_spec,
      check_vma=False)
  return on_mesh(x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _multiply_on_device(multiply: Callable, axes: MeshAxesByAxis, name: str,
                        x: jax.Array, w: jax.Array) -> jax.Array:
  """Gathers a weight from all devices and multiplies the tokens of this device
  by it. It is called inside of shard_map.

  The gradient (`_multiply_on_device_bwd`) computes that of the weight and
  scatters it over the devices before it computes the gradient of x. So a device
  holds the whole gradient of one weight at a time, and the memory of x can be
  freed before its gradient, which is as large, is made. XLA's own scheduler
  would scatter at the end of the layer, when there is nothing left to compute
  meanwhile.

  Args:
    multiply: the product, (tokens, whole weight) -> result.
    axes: the mesh axes over which each axis of the weight is sharded.
    name: a name for the gathered weight, which remat policies read; '': none.
    x: the tokens of this device.
    w: this device's shard of the weight.

  Returns:
    The product.
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
                            dy: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes the gradients of `_multiply_on_device`, y = multiply(x, w):

    dx = dy w^T on each device
    dw = sum over devices of x^T dy, of which each device keeps its shard

  Args:
    multiply: the product, (tokens, whole weight) -> result.
    axes: the mesh axes over which each axis of the weight is sharded.
    name: not read here.
    operands: the tokens of this device, and the gathered weight.
    dy: the gradient of the product.

  Returns:
    dx, and this device's shard of dw.
  """
  x, w = operands
  # Compute dw and scatter it along the first axis that is sharded. After that,
  # only a part of dw is left on the device.
  _, gradient_of_w = jax.vjp(functools.partial(multiply, x), w)
  dw, = gradient_of_w(dy)
  first_axis = next(axis for axis, names in enumerate(axes) if names)
  matrix = reduce_scatter(
      _to_matrix_with_axis_first(dw, first_axis), 0, axes[first_axis])
  # Compute dx after that. The barrier forces the order, as it makes dy depend
  # on the scattered dw.
  matrix, dy = jax.lax.optimization_barrier((matrix, dy))
  _, gradient_of_x = jax.vjp(lambda x: multiply(x, w), x)
  dx, = gradient_of_x(dy)
  # Scatter dw along its other axes.
  dw = _from_matrix_with_axis_first(matrix, dw.shape, first_axis)
  other_axes = axes[:first_axis] + ((),) + axes[first_axis + 1:]
  return dx, _reduce_scatter_all_axes(dw, other_axes)


_multiply_on_device.defvjp(_multiply_on_device_fwd, _multiply_on_device_bwd)


def look_up_embeddings(table_VD: jax.Array, ids_BL: jax.Array,
                       dtype: jax.typing.DTypeLike) -> jax.Array:
  """Looks up tokens in a table of embeddings that may be sharded over devices.

  If the columns of the table (its features) are split over the devices that
  also split the batch, each device looks up its columns for the tokens of all
  these devices. An all-to-all then returns each token to its own device. So
  neither the table nor its gradient is ever whole on a device.

  The suffixes name axes: V vocabulary, D d_model, B batch, L length.

  Args:
    table_VD: the table.
    ids_BL: the row of each token.
    dtype: the type of the result.

  Returns:
    The rows, [B, L, D].
  """
  # Without such columns the table is gathered over data parallelism first, and
  # XLA does the rest. Split rows would have to move to where the batch is.
  product_sharding = sharding_of_product(
      'BL', ids_BL, table_VD, axes=('vocab', 'embed'))
  column_axes: tuple[str, ...] = ()
  if product_sharding is not None:
    _, column_axes = product_sharding.weight
  if product_sharding is None or not column_axes:
    whole_VD = constrain_where_divisible(table_VD, 'vocab', None)
    return whole_VD[ids_BL].astype(dtype)

  def look_up_on_device(table_VD: jax.Array, ids_BL: jax.Array) -> jax.Array:
    """Looks up this device's columns for the tokens of all devices that share
    the columns, and exchanges them for all columns of its own tokens."""
    # Both collectives must go over the same mesh axes, batch first: the second
    # one undoes the first along the batch.
    ids_BL = jax.lax.all_gather(ids_BL, column_axes, axis=0, tiled=True)
    x_BLD = table_VD[ids_BL].astype(dtype)
    return jax.lax.all_to_all(x_BLD, column_axes, split_axis=0, concat_axis=2,
                              tiled=True)

  tokens_spec = _partition_spec(*product_sharding.tokens)
  table_spec = _partition_spec(*product_sharding.weight)
  # check_vma, JAX's check of what varies over devices, is off. Tests compare
  # the result with that of a single device instead.
  on_mesh = jax.shard_map(
      look_up_on_device, in_specs=(table_spec, tokens_spec),
      out_specs=tokens_spec, check_vma=False)
  return on_mesh(table_VD, ids_BL)


def look_up_sharded_rows(table_IK: jax.Array, ids_BLU: jax.Array,
                         dtype: jax.typing.DTypeLike) -> jax.Array:
  """Looks up several rows for each token in a large table whose rows are split
  over devices.

  Each device gets the ids of the tokens of all devices that share the table,
  and looks up those that are among its own rows. The sum over these devices is
  scattered to where the tokens are. So neither the table nor its gradient is
  ever whole on a device.

  The suffixes name axes: I rows of the table, K features of a row, B batch, L
  length, U rows that a token reads.

  Args:
    table_IK: the table.
    ids_BLU: the rows that each token reads.
    dtype: the type of the result.

  Returns:
    The rows, [B, L, U, K].
  """
  # Where the rows are not split over devices that also split the batch, XLA
  # gathers the table and looks up the rows.
  row_axes, _ = mesh_axes_of_weight(table_IK.shape, ('table', None))
  batch_axes = mesh_axes('batch')
  lies_along_batch = bool(row_axes) and set(row_axes) <= set(batch_axes)
  if not lies_along_batch or count_shards('batch', ids_BLU.shape[0]) == 1:
    whole_IK = constrain_where_divisible(table_IK, None, None)
    return whole_IK[ids_BLU].astype(dtype)

  def look_up_on_device(table_IK: jax.Array, ids_BLU: jax.Array) -> jax.Array:
    """Looks up this device's rows for the tokens of all devices that share the
    table, and returns all rows of its own tokens."""
    # Gather the ids, and count them from the device's first row on.
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
  """Gathers a weight from the devices over which data parallelism shards it
  (FSDP), in its own dtype. It stays sharded by tensor parallelism.

  Args:
    w: the weight.
    axes: its logical axes, one for each dimension.

  Returns:
    The gathered weight.
  """
  # A weight that data parallelism does not shard is whole already.
  batch_axes, other_axes = _split_by_batch_axes(w.shape, axes)
  if not any(batch_axes):
    return w

  def gather_on_device(w: jax.Array) -> jax.Array:
    """Gathers the shards of all devices."""
    return _gather_all_axes(w, batch_axes)

  on_mesh = jax.shard_map(
      gather_on_device, in_specs=_spec_of_both(batch_axes, other_axes),
      out_specs=_partition_spec(*other_axes), check_vma=False)
  return on_mesh(w)


def sum_gradients_of_shards(d_Q: jax.Array, axes: tuple[str | None, ...]
                            ) -> jax.Array:
  """Sums the gradients of a weight that each device has computed from its own
  tokens, and shards the sum as the weight is sharded.

  Args:
    d_Q: the gradients, [Q, ...], one for each of Q shards of the tokens. The
      first axis is sharded as the tokens are.
    axes: the logical axes of the weight, one for each dimension after Q.

  Returns:
    The gradient, of the shape of the weight.
  """
  # The sum is left to XLA if the weight is not sharded over devices that split
  # the tokens, or if there is not one gradient for each of these devices.
  batch_axes, other_axes = _split_by_batch_axes(d_Q.shape[1:], axes)
  token_axes = mesh_axes('tokens')
  weight_axes = set(sum(batch_axes, ()))
  lies_along_tokens = bool(weight_axes) and weight_axes <= set(token_axes)
  if not lies_along_tokens or count_devices_along(token_axes) != d_Q.shape[0]:
    return constrain_where_divisible(d_Q.sum(0), *axes)

  def sum_on_device(d_Q: jax.Array) -> jax.Array:
    """Sums over all devices of the tokens: over the weight's mesh axes the sum
    is scattered, over the others it is whole."""
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
  """Sorts the mesh axes that a weight is sharded over into those that also
  split the batch (data parallelism) and others (tensor or expert parallelism).

  Args:
    shape: the shape of the weight.
    axes: its logical axes, one for each dimension.

  Returns:
    Two tuples with an entry for each dimension: its mesh axes of the batch, and
    its other mesh axes. One of the two entries is () at least.
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
