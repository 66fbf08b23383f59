"""Devices: the mesh, over slices too, and where arrays lie on it."""

from collections.abc import Mapping, Sequence
import math
import re
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from architectures.parts import blocks
from architectures.parts import flat
from architectures.parts import sharding
from architectures.parts.config import ModelConfig
from architectures.parts.layers import NO_FFN
from architectures.parts.moe.routing import MoEConfig
from common.fields import parse_assignments
from common.errors import RequestError, format_count, require
from configs import sharding as tables


def resolve_mesh_shape(sizes: Mapping[str, int], num_devices: int
                       ) -> dict[str, int]:
  """Computes the size of each axis of a mesh that uses all devices.

  Args:
    sizes: {name: size} of the axes, as in config.mesh. One size may be -1,
      which stands for what the others leave.
    num_devices: the number of devices.

  Returns:
    {name: size} without -1.

  Raises:
    RequestError: where the product of the sizes is not the number of devices.
  """
  shape = {axis: sizes[axis] for axis in tables.MESH_AXES}
  written_sizes = ', '.join(f'mesh.{axis}={size}'
                            for axis, size in shape.items())
  for axis, size in shape.items():
    require(size >= 1 or size == -1, f'mesh.{axis} is {size}: choose a size '
            '>= 1, or -1 for what the other axes leave')
  free_axes = [axis for axis, size in shape.items() if size == -1]
  require(len(free_axes) <= 1, f'{written_sizes}: only one axis may be -1')

  # The axes must use all devices: without a free axis their sizes multiply to
  # the number of devices, with one the product divides that number.
  product_of_sizes = math.prod(size for size in shape.values() if size != -1)
  if free_axes:
    uses_all_devices = num_devices % product_of_sizes == 0
    relation = 'does not divide'
  else:
    uses_all_devices = num_devices == product_of_sizes
    relation = 'is not'
  if not uses_all_devices:
    devices = format_count(num_devices, 'device')
    raise RequestError(
        f'{written_sizes}: the sizes multiply to {product_of_sizes}, which '
        f'{relation} the {devices} there are: choose sizes whose product is '
        f'{num_devices}, or -1 for one of them')
  for axis in free_axes:
    shape[axis] = num_devices // product_of_sizes
  return shape


def bytes_on_one_device(tree: Any) -> int:
  """Returns how many bytes one device holds of a tree of arrays.

  Args:
    tree: arrays or ShapeDtypeStructs, with shardings.
  """
  total = 0
  for x in jax.tree.leaves(tree):
    shard = x.sharding.shard_shape(x.shape)
    total += math.prod(shard) * np.dtype(x.dtype).itemsize
  return total


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
  """Parses the flag --mesh of a tool, which describes a mesh of devices.

  Args:
    text: the value of the flag: sizes of axes, such as data=2,fsdp=8, or the
      name of a preset in configs/sharding.py, which gives all sizes. Axes that
      are not named have size 1, but `data` takes the devices that are left.
    num_devices: the number of devices; 0: as many as the sizes multiply to, or
      8 for a preset.

  Returns:
    {name: size} of all axes. Their product is the number of devices.

  Raises:
    ValueError: for an unknown axis, or sizes that do not fit.
  """
  if text in tables.PRESETS:
    return resolve_mesh_shape(tables.PRESETS[text], num_devices or 8)

  # Parse the sizes. -1 stands for what the other axes leave. The names of
  # presets are accepted at first, so that a preset beside sizes of axes can be
  # refused with a message of its own.
  sizes = dict.fromkeys(tables.MESH_AXES, 1)
  sizes['data'] = -1
  names = (*tables.MESH_AXES, *tables.PRESETS)
  for axis, size in parse_assignments(text.split(','), '--mesh', names).items():
    require(axis in sizes, f'--mesh has {axis}={size}, and {axis} is a preset '
            'of all axes: give it alone, or sizes of axes')
    require(re.fullmatch('-?[0-9]{1,9}', size) is not None,
            f'--mesh has {axis}={size}: write it as {axis}=8')
    sizes[axis] = int(size)

  # Count the devices. If `data` is still -1, it counts as 1: hence the abs.
  if not num_devices:
    num_devices = abs(math.prod(sizes.values()))
  return resolve_mesh_shape(sizes, num_devices)


def check_mesh(model: ModelConfig, shape: Mapping[str, int]) -> None:
  """Checks that a mesh can split a model over its devices.

  Args:
    model: the config of the model.
    shape: {name: size} of the axes of the mesh.

  Raises:
    RequestError: where an axis cannot be used with this model, or does not
      divide one of its sizes.
  """
  # The context axis splits the length of rows. A layer with a state, such as a
  # recurrence, must read a row in order, on one device.
  if shape['context'] != 1 and blocks.has_layers_with_state(model):
    raise RequestError(
        f'mesh.context is {shape["context"]}, and some layers keep each '
        f'row on one device (a state of {blocks.SOURCES_OF_STATE}): set '
        'mesh.context=1')
  for name in model.kinds_used:
    _check_layer_kind(model, name, shape)
  if shape['tensor'] != 1 and model.keep_gathered != 'none':
    raise RequestError(
        f'model.keep_gathered is {model.keep_gathered!r}, and mesh.tensor '
        f'{shape["tensor"]}: XLA then gathers the weights of products as it '
        "chooses; set mesh.tensor=1, or model.keep_gathered='none'")
  if not model.has_experts:
    require(shape['expert'] == 1, f'mesh.expert is {shape["expert"]}, but '
            f'model.ffn {model.ffn!r} has no experts: set mesh.expert=1')
    return
  # Each device along the expert axis gets the same number of experts.
  experts = model.part(MoEConfig).num_experts
  require(experts % shape['expert'] == 0,
          f'mesh.expert is {shape["expert"]}, which does not divide '
          f'model.moe.num_experts {experts}: choose mesh.expert from '
          f'{_divisors(experts)}, or num_experts a multiple of it')


def _check_layer_kind(model: ModelConfig, name: str, shape: Mapping[str, int]
                      ) -> None:
  """Checks that the axes of a mesh divide the sizes of layers of one kind. A
  kind of layer is a named set of fields in which some layers differ from the
  model.

  Args:
    model: the config of the model.
    name: the name of the kind in model.kinds; '': layers without a kind.
    shape: {name: size} of the axes of the mesh.

  Raises:
    RequestError: for a size that is not divided, with the choices.
  """
  # Check the parameters of the mixer (attention, or what stands in its place)
  # that are split along the tensor axis.
  layer = model.layer_config(name)
  mixer = blocks.mixer_of_layers(layer)
  for path, size in mixer.sizes_over_tensor(layer, shape['tensor']).items():
    require(size % shape['tensor'] == 0, f'mesh.tensor is {shape["tensor"]}, '
            f'which does not divide the {size} of the parameter {path} of '
            f'model.mixer {layer.mixer!r}: choose from {_divisors(size)}')

  # List mesh axes, each with a field of the config that it must divide.
  axes_and_fields = [*mixer.fields_to_divide(layer), ('fsdp', 'd_model')]
  if model.has_experts:
    axes_and_fields += [('tensor', 'moe.d_ff'), ('fsdp', 'moe.latent_dim')]
  if layer.ffn != NO_FFN:
    axes_and_fields.append(('tensor', 'd_ff'))

  # Check each. A size of 1 is not split if the mixer allows it: then every
  # device holds the whole parameter.
  for axis, field in axes_and_fields:
    size = flat.get_field(layer, field)
    if size % shape[axis] == 0 or size == 1 and field in mixer.may_be_one:
      continue
    location = ''
    if name in model.kinds and field in model.kinds[name].overrides:
      location = f'kinds.{name}.'
    raise RequestError(
        f'mesh.{axis} is {shape[axis]}, which does not divide '
        f'model.{location}{field} {size}: choose from {_divisors(size)}')


def _divisors(size: int) -> str:
  """Returns the smaller divisors of a size, which a mesh axis may have."""
  divisors = [n for n in range(1, min(size, 256) + 1) if size % n == 0]
  return ', '.join(map(str, divisors))


def make_mesh(shape: Mapping[str, int],
              devices: Sequence[jax.Device] | None = None, slices: int = 0
              ) -> Mesh:
  """Makes the mesh of devices. Its axes are Auto: the compiler decides how
  arrays are split where no constraint says it.

  Args:
    shape: {name: size} of the axes, of which `data` must be the first.
    devices: the devices; None: all.
    slices: the number of slices, groups of devices with a slower network
      between them; 0: as many as the devices say. Only the axis `data` goes
      over that network.

  Raises:
    ValueError: where the devices or mesh.data do not divide into the slices.
  """
  if devices is None:
    devices = jax.devices()
  groups = group_by_slice(list(devices), slices)
  (first_axis, data_size), *other_axes = shape.items()
  assert first_axis == 'data', shape
  require(data_size % len(groups) == 0, f'mesh.data is {data_size}, which the '
          f'{len(groups)} slices do not divide: only `data` goes over the '
          f'network between slices, so choose a multiple of {len(groups)}')

  # Make a mesh of each slice, and join them along `data`. Splitting physical
  # axes must be allowed, or a mesh of 8 x 8 would not fit on 4 x 4 x 4 chips.
  other_sizes = [size for _, size in other_axes]
  shape_of_slice = (data_size // len(groups), *other_sizes)
  meshes_of_slices = []
  for group in groups:
    meshes_of_slices.append(mesh_utils.create_device_mesh(
        shape_of_slice, group, allow_split_physical_axes=True))
  axis_types = (AxisType.Auto,) * len(shape)
  return Mesh(np.concatenate(meshes_of_slices), tuple(shape),
              axis_types=axis_types)


def slice_index(device: jax.Device) -> int:
  """Returns the slice of a TPU pod that a device is in; elsewhere 0: GPUs
  number their hosts there, over which every axis may go."""
  if device.platform == 'tpu' and hasattr(device, 'slice_index'):
    return device.slice_index
  return 0


def group_by_slice(devices: Sequence[jax.Device], slices: int) -> list[list]:
  """Groups devices by their slice. The network between devices of a slice is
  faster than that to other slices.

  Args:
    devices: the devices.
    slices: the number of slices; 0: as many as the devices say.

  Returns:
    A list of devices for each slice.

  Raises:
    RequestError: for another number of slices than the devices have, or one
      that does not divide the devices.
  """
  # Devices of several slices say in which they are.
  devices_of_slice: dict[int, list] = {}
  for device in devices:
    devices_of_slice.setdefault(slice_index(device), []).append(device)
  num_slices = len(devices_of_slice)
  if num_slices > 1:
    require(slices in (0, num_slices), f'mesh.slices is {slices}, but the '
            f'devices are of {num_slices} slices: set it to 0 (what they say)')
    return [devices_of_slice[index] for index in sorted(devices_of_slice)]

  # If they all say the same, cut them into groups of equal size. They are
  # sorted by process, so that the devices of a process stay together.
  slices = slices or 1
  require(slices >= 1 and len(devices) % slices == 0,
          f'mesh.slices is {slices}, which does not divide the '
          f'{len(devices)} devices: choose a divisor, or 0 (what they say)')
  size = len(devices) // slices
  return [devices[i:i + size] for i in range(0, len(devices), size)]


def param_shardings(abstract: Any, mesh: Mesh, rules: str):
  """Returns the NamedSharding of each parameter of a model, as a tree.

  A mesh axis that does not divide a dimension does not split it. If several
  axes would split a dimension, the last ones are left out first. This happens
  to dimensions such as the vocabulary (50,257 in GPT-2); `check_mesh` refuses
  it for most others.

  Args:
    abstract: the shapes of the parameters, each in a box of Flax
      (nn.LogicallyPartitioned) with the names of its dimensions.
    mesh: the mesh of devices.
    rules: the name of a table of RULES, which maps these names to mesh axes.
  """

  def is_box(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)

  def shard_parameter(x: Any) -> NamedSharding:
    # An array without a box is not split.
    names: Sequence[str | None] = ()
    if is_box(x):
      x, names = x.value, x.names
    spec = partition_spec(x.shape, names=names, mesh=mesh, rules=rules)
    return NamedSharding(mesh, spec)

  return jax.tree.map(shard_parameter, abstract, is_leaf=is_box)


def partition_spec(shape: Sequence[int], names: Sequence[str | None],
                   mesh: Mesh, rules: str) -> PartitionSpec:
  """Returns which mesh axes split each dimension of an array. A mesh axis that
  does not divide the size of a dimension is left out.

  Args:
    shape: the shape of the array.
    names: the name of each dimension, such as 'embed'; None: it has no name and
      is not split.
    mesh: the mesh of devices.
    rules: the name of a table of RULES, which maps the names to mesh axes.

  Returns:
    A PartitionSpec, with a tuple of mesh axes for each dimension, or None for
    one that is not split. It is empty for an array without names, which every
    device holds whole.
  """
  if not names:
    return PartitionSpec()

  # A rule may give one mesh axis, a tuple of several, or None. Make all of them
  # tuples.
  entries = []
  mesh_axes_by_rule = nn.logical_to_mesh_axes(names, tables.RULES[rules])
  for mesh_axes, size in zip(mesh_axes_by_rule, shape):
    if isinstance(mesh_axes, str):
      mesh_axes = (mesh_axes,)
    fitting = sharding.mesh_axes_that_divide(
        tuple(mesh_axes or ()), size, mesh.shape)
    entries.append(fitting or None)
  return PartitionSpec(*entries)


def num_shards(axis: str, shape: Mapping[str, int], rules: str) -> int:
  """Returns into how many parts a mesh splits a logical axis.

  Args:
    axis: the name of the logical axis.
    shape: the size of each mesh axis.
    rules: the entry of RULES that maps names to mesh axes.
  """
  return math.prod(shape[name] for name in dict(tables.RULES[rules])[axis])


def num_stream_shards(shape: Mapping[str, int], rules: str, length: int) -> int:
  """Computes into how many shards a mesh splits the residual stream [B, L, D]:
  B rows of L tokens with D features.

  Args:
    shape: {name: size} of the axes of the mesh.
    rules: the name of a table of RULES, which maps names of dimensions to mesh
      axes. Those of the rows and tokens are 'batch', and 'stream' or 'length'.
    length: L. Where the mesh axes of 'stream' do not divide it, those of
      'length' are used.
  """
  parts_of_a_row = num_shards('stream', shape, rules)
  if length % parts_of_a_row:
    parts_of_a_row = num_shards('length', shape, rules)
  return num_shards('batch', shape, rules) * parts_of_a_row


def batch_sharding(mesh: Mesh, rules: str) -> NamedSharding:
  """Returns how the rows of a batch lie on the mesh."""
  axes = nn.logical_to_mesh_axes(('batch',), tables.RULES[rules])[0]
  return NamedSharding(mesh, PartitionSpec(axes))


def batch_slice_of_process(batch_sharding_: NamedSharding, batch_size: int
                           ) -> tuple[int, int]:
  """Returns which slice of the rows of a global batch this process has to load.

  Args:
    batch_sharding_: the sharding of a batch [B, ...].
    batch_size: B, the number of rows in the global batch.

  Returns:
    The index of the slice, and the number of slices.

  Raises:
    RequestError: where the rows of a process are not one slice.
  """
  # Collect the (first, end) row of each device of this process. Devices that
  # differ along another mesh axis hold the same rows; the set has these once.
  ranges = set()
  indices = batch_sharding_.addressable_devices_indices_map((batch_size,))
  for index in indices.values():
    first, end, _ = index[0].indices(batch_size)
    ranges.add((first, end))

  # The rows must be one slice without gaps, which begins at a multiple of its
  # size: then all slices are of equal size and have an index.
  start = min(first for first, _ in ranges)
  stop = max(end for _, end in ranges)
  num_rows = sum(end - first for first, end in ranges)
  require(num_rows == stop - start and start % num_rows == 0,
          f'process {jax.process_index()} would hold rows of the batch that '
          f'are not one slice ({sorted(ranges)}): keep the tensor axis within '
          'a host')
  return start // num_rows, batch_size // num_rows


def put_on_devices(batch: Mapping[str, np.ndarray],
                   batch_sharding_: NamedSharding):
  """Puts a batch on all devices. Each process passes its own rows, which become
  parts of one global array.

  Args:
    batch: {name: array [rows of this process, ...]}.
    batch_sharding_: the sharding of a global batch.

  Returns:
    {name: global array}.
  """
  arrays = {}
  for name, x in batch.items():
    arrays[name] = jax.make_array_from_process_local_data(batch_sharding_, x)
  return arrays


def is_primary_process() -> bool:
  """Whether this is the process that prints and writes."""
  return jax.process_index() == 0


def wait_for_all_processes(name: str) -> None:
  """Waits until all processes of the run have called this with the same name.
  """
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices(name)
