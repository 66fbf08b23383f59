"""Devices: the mesh, over slices too, and where arrays lie on it."""

from collections.abc import Mapping, Sequence
import math
import os
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
from common.arguments import parse_assignments
from common.errors import RequestError, require
from configs import sharding as tables


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
  """Returns the size of each mesh axis; one may be -1: what the others leave.

  Raises:
    ValueError: where the sizes do not multiply to the number of devices.
  """
  shape = {axis: sizes[axis] for axis in tables.MESH_AXES}
  text = ', '.join(f'mesh.{axis}={size}' for axis, size in shape.items())
  free, fixed = [], 1  # the axis of size -1, and the product of the others
  for axis, size in shape.items():
    require(size >= 1 or size == -1, f'mesh.{axis} is {size}: choose a size '
            '>= 1, or -1 for what the other axes leave')
    if size == -1:
      free.append(axis)
    else:
      fixed *= size
  require(len(free) <= 1, f'{text}: only one axis may be -1')

  # The axes use all devices.
  fault = ''
  if free and num_devices % fixed:
    fault = 'does not divide'
  elif not free and num_devices != fixed:
    fault = 'is not'
  if fault:
    plural = '' if num_devices == 1 else 's'
    raise RequestError(
        f'{text}: the sizes multiply to {fixed}, which {fault} the '
        f'{num_devices} device{plural} there are: choose sizes whose product '
        f'is {num_devices}, or -1 for one of them')
  for axis in free:
    shape[axis] = num_devices // fixed
  return shape


def on_device(tree: Any) -> int:
  """Returns the bytes of one device's shards of abstract arrays."""
  total = 0
  for x in jax.tree.leaves(tree):
    shard = x.sharding.shard_shape(x.shape)
    total += math.prod(shard) * np.dtype(x.dtype).itemsize
  return total


def check_memory(state: Any, mesh: Mesh) -> None:
  """Raises RequestError for a state, as abstract arrays, that is larger than
  all memory of a device, or of this machine where its devices are CPUs."""
  size = on_device(state)
  device = mesh.local_devices[0]
  if device.platform == 'cpu':
    size *= len(mesh.local_devices)
  check_size(size, device=device, what='parameters and optimiser',
             more=', or more devices over which mesh.fsdp cuts them')


def check_size(size: int, device: jax.Device, what: str, more: str = ''
               ) -> None:
  """Raises RequestError for so many bytes, where all memory of a device, or of
  this machine if its devices are CPUs, has less.

  Args:
    size: the number of bytes.
    device: the device on which they are to be.
    what: the name of what has them, for the message.
    more: what else may be done, for the message.
  """
  if device.platform == 'cpu':
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  else:
    stats = device.memory_stats() or {}
    memory = stats.get('bytes_limit', math.inf)
  require(size <= memory, f'{what} have {size / 2**30:,.1f} GiB on a '
          f'{device.device_kind}, which has {memory / 2**30:,.1f}: take a '
          f'smaller model.d_model or model.num_layers{more}')


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
  """Returns the mesh that a tool's --mesh names: data=2,fsdp=8, or a preset.

  An axis that is not named has size 1, and `data` what the others leave of
  `num_devices`; 0: as many devices as the mesh that is named.

  Raises:
    ValueError: for an unknown axis, or sizes that do not fit.
  """
  if text in tables.PRESETS:
    return mesh_shape(tables.PRESETS[text], num_devices or 8)
  # The axes that are named, `data` being what they leave.
  sizes = dict.fromkeys(tables.MESH_AXES, 1)
  sizes['data'] = -1
  names = (*tables.MESH_AXES, *tables.PRESETS)
  for axis, size in parse_assignments(text.split(','), '--mesh', names).items():
    require(axis in sizes, f'--mesh has {axis}={size}, and {axis} is a preset '
            'of all axes: give it alone, or sizes of axes')
    require(re.fullmatch('-?[0-9]{1,9}', size) is not None,
            f'--mesh has {axis}={size}: write it as {axis}=8')
    sizes[axis] = int(size)
  if not num_devices:
    num_devices = abs(math.prod(sizes.values()))
  return mesh_shape(sizes, num_devices)


def check_mesh(model: ModelConfig, shape: Mapping[str, int]) -> None:
  """Raises ValueError where the mesh does not divide the model."""
  # An axis that cuts rows suits no layer that reads them in order.
  if shape['context'] != 1 and blocks.has_layers_with_state(model):
    raise RequestError(
        f'mesh.context is {shape["context"]}, and some layers keep each '
        'row on one device (a state of model.mixer, '
        'model.attention_conv, branch_conv, memory or indexer.block): set '
        'mesh.context=1')
  for name in model.kinds_used:
    _check_kind(model, name, shape)
  if shape['tensor'] != 1 and model.keep_gathered != 'none':
    raise RequestError(
        f'model.keep_gathered is {model.keep_gathered!r}, and mesh.tensor '
        f'{shape["tensor"]}: XLA then gathers the weights of products as it '
        "chooses; set mesh.tensor=1, or model.keep_gathered='none'")
  if not model.has_experts:
    require(shape['expert'] == 1, f'mesh.expert is {shape["expert"]}, but '
            f'model.ffn {model.ffn!r} has no experts: set mesh.expert=1')
    return
  # Each device holds as many experts as the others.
  experts = model.part(MoEConfig).num_experts
  require(experts % shape['expert'] == 0,
          f'mesh.expert is {shape["expert"]}, which does not divide '
          f'model.moe.num_experts {experts}: choose mesh.expert from '
          f'{_divisors(experts)}, or num_experts a multiple of it')


def _check_kind(model: ModelConfig, name: str, shape: Mapping[str, int]
                ) -> None:
  """Raises RequestError where a mesh axis does not divide a size of the layers
  of a kind."""
  # The mesh axes, each with a field that it must divide.
  c = model.of_kind(name)
  mixer = blocks.mixer_of_layers(c)
  for path, size in mixer.sizes_over_tensor(c, shape['tensor']).items():
    require(size % shape['tensor'] == 0, f'mesh.tensor is {shape["tensor"]}, '
            f'which does not divide the {size} of the parameter {path} of '
            f'model.mixer {c.mixer!r}: choose from {_divisors(size)}')
  divided = [*mixer.fields_to_divide(c), ('fsdp', 'd_model')]
  if model.has_experts:
    divided += [('tensor', 'moe.d_ff'), ('fsdp', 'moe.latent_dim')]
  if c.ffn != NO_FFN:
    divided.append(('tensor', 'd_ff'))

  # A size of 1 that every device holds whole need not be divided.
  for axis, field in divided:
    size = flat.get_field(c, field)
    if size % shape[axis] == 0 or size == 1 and field in mixer.may_be_one:
      continue
    where = ''
    if name in model.kinds and field in model.kinds[name].overrides:
      where = f'kinds.{name}.'
    raise RequestError(
        f'mesh.{axis} is {shape[axis]}, which does not divide '
        f'model.{where}{field} {size}: choose from {_divisors(size)}')


def _divisors(size: int) -> str:
  """Returns the smaller divisors of a size, which a mesh axis may have."""
  divisors = [n for n in range(1, min(size, 256) + 1) if size % n == 0]
  return ', '.join(map(str, divisors))


def make_mesh(shape: Mapping[str, int],
              devices: Sequence[jax.Device] | None = None, slices: int = 0
              ) -> Mesh:
  """Returns the mesh, its axes left to the compiler between constraints.

  Args:
    shape: the size of each axis, `data` first.
    devices: the devices; None: all.
    slices: the number of groups of devices with a slower network between them,
      over which only `data` goes; 0: as many as the devices say.

  Raises:
    ValueError: where the devices or mesh.data do not divide into the slices.
  """
  if devices is None:
    devices = jax.devices()
  groups = by_slice(list(devices), slices)
  (axis, size), *others = shape.items()
  assert axis == 'data', shape
  require(size % len(groups) == 0, f'mesh.data is {size}, which the '
          f'{len(groups)} slices do not divide: only `data` goes over the '
          f'network between slices, so choose a multiple of {len(groups)}')

  # A mesh in each slice, one behind the other along `data`. An axis of 8 x 8
  # fits on 4 x 4 x 4 chips only if physical axes may be split.
  within = (size // len(groups), *[other for _, other in others])
  placed = []
  for group in groups:
    placed.append(mesh_utils.create_device_mesh(
        within, group, allow_split_physical_axes=True))
  axis_types = (AxisType.Auto,) * len(shape)
  return Mesh(np.concatenate(placed), tuple(shape), axis_types=axis_types)


def slice_index(device: jax.Device) -> int:
  """Returns the slice of a TPU pod that a device is in; elsewhere 0: GPUs
  number their hosts there, over which every axis may go."""
  if device.platform == 'tpu' and hasattr(device, 'slice_index'):
    return device.slice_index
  return 0


def by_slice(devices: Sequence[jax.Device], slices: int) -> list[list]:
  """Returns the devices of each slice; `slices` is as in `make_mesh`."""
  # The slices that the devices know.
  known: dict[int, list] = {}
  for device in devices:
    known.setdefault(slice_index(device), []).append(device)
  if len(known) > 1:
    require(slices in (0, len(known)), f'mesh.slices is {slices}, but the '
            f'devices are of {len(known)} slices: set it to 0 (what they say)')
    return [known[index] for index in sorted(known)]

  # Groups of the devices in their order, so process by process.
  slices = slices or 1
  require(slices >= 1 and len(devices) % slices == 0,
          f'mesh.slices is {slices}, which does not divide the '
          f'{len(devices)} devices: choose a divisor, or 0 (what they say)')
  size = len(devices) // slices
  return [devices[i:i + size] for i in range(0, len(devices), size)]


def param_shardings(abstract: Any, mesh: Mesh, rules: str):
  """Returns a NamedSharding for each boxed parameter of `abstract`.

  Mesh axes that do not divide a dimension are left out of it, the last ones
  first. That happens to `vocab` and `rows` (GPT-2's 50,257), and to `expert`
  after `fsdp`; `check_mesh` refuses all others.
  """

  def is_box(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)

  def place(x: Any) -> NamedSharding:
    # An array without names lies whole on every device.
    names: Sequence[str | None] = ()
    if is_box(x):
      x, names = x.value, x.names
    return NamedSharding(mesh, spec(x.shape, names=names, mesh=mesh,
                                    rules=rules))

  return jax.tree.map(place, abstract, is_leaf=is_box)


def spec(shape: Sequence[int], names: Sequence[str | None], mesh: Mesh,
         rules: str) -> PartitionSpec:
  """Returns where an array with these logical axes lies, without the mesh axes
  that do not divide its dimensions.

  Args:
    shape: the shape of the array.
    names: the logical name of each axis; None: it has none.
    mesh: the mesh.
    rules: the entry of RULES that maps names to mesh axes.
  """
  if not names:
    return PartitionSpec()
  entries = []
  wanted = nn.logical_to_mesh_axes(names, tables.RULES[rules])
  for axes, size in zip(wanted, shape):
    if isinstance(axes, str):
      axes = (axes,)
    fitting = sharding.mesh_axes_that_divide(
        tuple(axes or ()), size, mesh.shape)
    entries.append(fitting or None)
  return PartitionSpec(*entries)


def shards(axis: str, shape: Mapping[str, int], rules: str) -> int:
  """Returns into how many parts a mesh of this shape cuts a logical axis."""
  return math.prod(shape[name] for name in dict(tables.RULES[rules])[axis])


def stream_shards(shape: Mapping[str, int], rules: str, length: int) -> int:
  """Returns into how many parts a mesh of this shape cuts rows of this length
  where they go from layer to layer."""
  parts = shards('stream', shape, rules)
  if length % parts:
    parts = shards('length', shape, rules)
  return shards('batch', shape, rules) * parts


def batch_sharding(mesh: Mesh, rules: str) -> NamedSharding:
  """Returns how the rows of a batch lie on the mesh."""
  axes = nn.logical_to_mesh_axes(('batch',), tables.RULES[rules])[0]
  return NamedSharding(mesh, PartitionSpec(axes))


def batch_shard(sharding_: NamedSharding, batch_size: int) -> tuple[int, int]:
  """Returns (index, count): which slice of a batch this process loads.

  Raises:
    ValueError: where a process would hold rows that are not one slice.
  """
  # The rows of each device of this process, (first, past the last).
  slices = set()
  indices = sharding_.addressable_devices_indices_map((batch_size,))
  for index in indices.values():
    first, end, _ = index[0].indices(batch_size)
    slices.add((first, end))

  # They are one slice, and every process has as many.
  start = min(first for first, _ in slices)
  stop = max(end for _, end in slices)
  rows = sum(end - first for first, end in slices)
  require(rows == stop - start and start % rows == 0,
          f'process {jax.process_index()} would hold rows of the batch that '
          f'are not one slice ({sorted(slices)}): keep the tensor axis within '
          'a host')
  return start // rows, batch_size // rows


def put(batch: Mapping[str, np.ndarray], to: NamedSharding):
  """Puts this process's rows of a global batch on its devices."""
  return {name: jax.make_array_from_process_local_data(to, x)
          for name, x in batch.items()}


def primary() -> bool:
  """Whether this is the process that prints and writes."""
  return jax.process_index() == 0


def sync(name: str) -> None:
  """Waits until all processes are here."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices(name)
