"""Devices that are not there: chips by name, as vendors publish them and the
compilers enforce, and how libtpu or the CUDA plugin describes them to jax. As
an estimate, virtual CPU devices stand in their place.

Every figure is of one jax device. TPUs: docs.cloud.google.com/tpu/docs, the
pages v4, v5e, v5p, v6e and tpu7x (tables 'key specifications' and
'configurations'); compute peaks are those of training/costs/flops.py, with its
sources. `hbm` is what the TPU compiler lets a program use, which is a little
less than the chip has. `links` is the sum of a device's links in one direction:
half of the 'bidirectional' bandwidth. GPUs: datasheets of A100, H100, H200 and
HGX B200 at nvidia.com, NVLink likewise halved; `outside` is the one 200 or 400
Gb/s adapter a GPU of a DGX A100, H100, H200 or B200.

`environment` must run before jax looks for devices, JAX_PLATFORMS=cpu be set
before it is imported: the CPU stays the default backend. No data are ever put
on the described devices.
"""

import contextlib
import importlib.metadata
import math
import os
import sys
from typing import Any, NamedTuple, Optional

from common.errors import RequestError, check_choice

GIB = 2 ** 30
_GB = 1e9


class Chip(NamedTuple):
  """A model of TPU or GPU, and the machines that it is sold in.

  Attributes:
    platform: tpu or cuda.
    device_kind: the name of its devices in training/costs/flops.py.
    cores: the number of TensorCores of one device; TPUs only.
    devices: the number of jax devices of a chip.
    hbm: the bytes of a device's memory that a program may use.
    hbm_rate: the bytes of this memory that a device reads and writes a second.
    link_rate: the bytes that a device can send a second within a slice of TPUs,
      or within a host of GPUs.
    outside_rate: the bytes that a device can send a second to other slices or
      hosts; None: not published.
    shapes: the small shapes of a slice; larger slices have sides that are
      multiples of 4.
    max_chips: the number of chips of the largest slice.
  """
  platform: str
  device_kind: str
  cores: int
  devices: int
  hbm: float
  hbm_rate: float
  link_rate: float
  outside_rate: Optional[float]
  shapes: tuple[str, ...]
  max_chips: int


_SHAPES_OF_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4')
_SHAPES_OF_PLANES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')

CHIPS = {
    'v4': Chip(
        platform='tpu', device_kind='TPU v4', cores=2, devices=1,
        hbm=30.75 * GIB, hbm_rate=1228 * _GB, link_rate=300 * _GB,
        outside_rate=None, shapes=_SHAPES_OF_CUBES, max_chips=4096),
    'v5e': Chip(
        platform='tpu', device_kind='TPU v5 lite', cores=1, devices=1,
        hbm=15.75 * GIB, hbm_rate=819 * _GB, link_rate=200 * _GB,
        outside_rate=3.125 * _GB, shapes=_SHAPES_OF_PLANES, max_chips=256),
    'v5p': Chip(
        platform='tpu', device_kind='TPU v5', cores=2, devices=1,
        hbm=95.74 * GIB, hbm_rate=2765 * _GB, link_rate=600 * _GB,
        outside_rate=6.25 * _GB, shapes=_SHAPES_OF_CUBES, max_chips=6144),
    'v6e': Chip(
        platform='tpu', device_kind='TPU v6 lite', cores=1, devices=1,
        hbm=31.25 * GIB, hbm_rate=1638 * _GB, link_rate=400 * _GB,
        outside_rate=12.5 * _GB, shapes=_SHAPES_OF_PLANES, max_chips=256),
    'tpu7x': Chip(
        platform='tpu', device_kind='TPU7x', cores=1, devices=2,
        hbm=94.75 * GIB, hbm_rate=3690 * _GB, link_rate=300 * _GB,
        outside_rate=6.25 * _GB, shapes=_SHAPES_OF_CUBES, max_chips=9216),
    'a100': Chip(
        platform='cuda', device_kind='NVIDIA A100-SXM4-80GB', cores=1,
        devices=1, hbm=85.1e9, hbm_rate=2039 * _GB, link_rate=300 * _GB,
        outside_rate=25 * _GB, shapes=(), max_chips=0),
    'h100': Chip(
        platform='cuda', device_kind='NVIDIA H100 80GB HBM3', cores=1,
        devices=1, hbm=84.9e9, hbm_rate=3350 * _GB, link_rate=450 * _GB,
        outside_rate=50 * _GB, shapes=(), max_chips=0),
    'h200': Chip(
        platform='cuda', device_kind='NVIDIA H200', cores=1, devices=1,
        hbm=150.7e9, hbm_rate=4800 * _GB, link_rate=450 * _GB,
        outside_rate=50 * _GB, shapes=(), max_chips=0),
    'b200': Chip(
        platform='cuda', device_kind='NVIDIA B200', cores=1, devices=1,
        hbm=191.5e9, hbm_rate=7700 * _GB, link_rate=900 * _GB,
        outside_rate=50 * _GB, shapes=(), max_chips=0),
}


class Topology(NamedTuple):
  """The devices that a plan is for.

  Attributes:
    name: the name by which it was asked for.
    chip: the chip.
    shape: the shape of a slice; of GPUs, (slices, hosts, GPUs of a host).
    slices: the number of slices.
  """
  name: str
  chip: Chip
  shape: tuple[int, ...]
  slices: int

  @property
  def chips(self) -> int:
    """The number of chips."""
    return self.slices * math.prod(self.shape)

  @property
  def devices(self) -> int:
    """The number of jax devices."""
    return self.chips * self.chip.devices

  @property
  def devices_in_fast_network(self) -> int:
    """The number of devices that the fast network joins: those of a slice, or
    of a host."""
    if self.chip.platform == 'tpu':
      return self.devices // self.slices
    return self.shape[2]


def parse_topology(name: str, slices: int = 1) -> Topology:
  """Parses the name of a topology, which says how many chips there are and how
  they are wired, such as v5p:4x4x8 or h100:1x8x8.

  Args:
    name: the name of a chip, a colon and a shape. For TPUs it is the shape of a
      slice, which is a part of a pod. For GPUs it is 1xHOSTSxGPUS.
    slices: the number of slices of TPUs; 1 for GPUs.

  Returns:
    The topology: the chip, the shape and the slices.

  Raises:
    RequestError: for an unknown chip, or a shape that does not exist. This is
      checked here, because compilers accept any shape.
  """
  chip_name, _, text = name.partition(':')
  check_choice('chip in --topology', chip_name, CHIPS)
  chip = CHIPS[chip_name]
  shape = _parse_shape(name, chip_name=chip_name, text=text)
  if slices != 1 and (chip.platform != 'tpu' or slices < 1):
    raise RequestError(
        f'--slices is {slices}: it must be >= 1, and 1 for GPUs, written as '
        f'{chip_name}:1xHOSTSxGPUS')

  # A slice of TPUs must have a shape that is sold.
  if chip.platform == 'tpu':
    if text not in chip.shapes and not _is_shape_of_cubes(chip, shape):
      large_shapes = ''
      if chip.shapes != _SHAPES_OF_PLANES:
        large_shapes = (
            ', or three multiples of 4 in rising order, such as 4x4x8, of '
            f'{chip.max_chips:,} chips at most')
      raise RequestError(
          f'--topology is {name!r}, a shape that no {chip_name} slice has: '
          f'choose from {", ".join(chip.shapes)}{large_shapes}')
  # NVLink joins 8 GPUs of a machine at most.
  elif shape[0] != 1 or shape[2] not in (1, 2, 4, 8):
    raise RequestError(
        f'--topology is {name!r}: write all hosts in one slice, of 1, 2, 4 or '
        f'8 GPUs each, such as {chip_name}:1x8x8')
  return Topology(name=name, chip=chip, shape=shape, slices=slices)


def _parse_shape(name: str, chip_name: str, text: str) -> tuple[int, ...]:
  """Parses the shape of a slice, such as 4x4x8.

  Args:
    name: the whole name of the topology, for the error.
    chip_name: the name of the chip, a key of CHIPS.
    text: the shape, as it is written in the name.

  Returns:
    The sides, such as (4, 4, 8).

  Raises:
    RequestError: if it does not have as many sides as slices of the chip have,
      or a side is no number of 1 or more.
  """
  # Slices of TPUs have two sides or three, and GPUs are given by three numbers.
  if CHIPS[chip_name].shapes == _SHAPES_OF_PLANES:
    num_sides, example = 2, '4x8'
  elif CHIPS[chip_name].platform == 'cuda':
    num_sides, example = 3, '1x8x8 (slices x hosts x GPUs of a host)'
  else:
    num_sides, example = 3, '4x4x8'
  sides = text.split('x')
  are_numbers = all(side.isdigit() and int(side) for side in sides)
  if len(sides) != num_sides or not are_numbers:
    raise RequestError(
        f'--topology is {name!r}: write the shape of a {chip_name} as '
        f'{chip_name}:{example}')
  return tuple(int(side) for side in sides)


def _is_shape_of_cubes(chip: Chip, shape: tuple[int, ...]) -> bool:
  """Whether a slice that is built from cubes of 4x4x4 chips is sold in this
  shape: its sides are multiples of 4, in rising order."""
  if chip.shapes != _SHAPES_OF_CUBES or math.prod(shape) > chip.max_chips:
    return False
  is_rising = list(shape) == sorted(shape)
  return is_rising and all(side % 4 == 0 for side in shape)


class _GpuDescription(NamedTuple):
  """The properties of a GPU on which XLA's choices depend.

  They are from docs.nvidia.com/cuda (programming guide, compute capabilities)
  and the whitepapers of A100, H100 and Blackwell.

  Attributes:
    cores: the number of streaming multiprocessors.
    compute_capability: the major and the minor number.
    fp32_units: the number of FP32 units of a core.
    core_memory: the bytes of shared memory of a core.
    block_memory: the bytes of it that a block of threads may ask for.
    l2_cache: the bytes of the L2 cache.
    clock_ghz: the clock rate.
  """
  cores: int
  compute_capability: tuple[int, int]
  fp32_units: int
  core_memory: int
  block_memory: int
  l2_cache: int
  clock_ghz: float


# An H200 is an H100 with more memory.
_HOPPER = _GpuDescription(
    cores=132, compute_capability=(9, 0), fp32_units=128, core_memory=233472,
    block_memory=232448, l2_cache=52428800, clock_ghz=1.98)
_DESCRIPTION_OF_GPU = {
    'a100': _GpuDescription(
        cores=108, compute_capability=(8, 0), fp32_units=64, core_memory=167936,
        block_memory=166912, l2_cache=41943040, clock_ghz=1.41),
    'h100': _HOPPER,
    'h200': _HOPPER,
    'b200': _GpuDescription(
        cores=148, compute_capability=(10, 0), fp32_units=128,
        core_memory=233472, block_memory=232448, l2_cache=132644864,
        clock_ghz=1.965),
}


def installed_compiler(topology: Topology) -> str:
  """Returns the name and version of the installed compiler for the devices of a
  topology, such as 'libtpu 0.0.45', or '' if there is none.

  Args:
    topology: the devices.
  """
  names = ['libtpu']
  if topology.chip.platform == 'cuda':
    names = ['jax-cuda13-plugin', 'jax-cuda13-pjrt']
  try:
    versions = [importlib.metadata.version(name) for name in names]
  except importlib.metadata.PackageNotFoundError:
    return ''

  # libtpu works with any version of jax. The CUDA plugin loads only with the
  # version of jax that it was made for.
  jax_version = importlib.metadata.version('jax')
  if names[0] != 'libtpu' and versions[0] != jax_version:
    return ''
  return f'{names[0]} {versions[0]}'


def products_of_all_groups(topology: Topology) -> tuple[str, ...]:
  """Returns the grouped matrix products (jax.lax.ragged_dot) that a compiler
  computes wastefully: it multiplies all rows with the matrices of all groups,
  although each row belongs to one group. Their FLOPs are counted as such.

  Args:
    topology: the devices.

  Returns:
    The names of these products, among flops.GROUPED_PRODUCTS: the forward
    product, its gradient for the rows (transposed), and that for the weights.
  """
  # On GPUs it does so with all of them. On TPUs with one core per chip, jax
  # 0.10 with libtpu 0.0.45 has no kernel for two of them.
  if topology.chip.platform == 'cuda':
    return ('forward', 'transposed', 'weights')
  major, minor, *_ = importlib.metadata.version('jax').split('.')
  if topology.chip.cores == 1 and (int(major), int(minor)) < (0, 12):
    return ('forward', 'weights')
  return ()


def set_environment(topology: Topology) -> None:
  """Prepares this process to compile for devices that this machine does not
  have. It must be called before jax is first used, because libtpu, the CUDA
  plugin and XLA read these environment variables when they load.

  If no compiler is installed for the topology, jax is asked for as many virtual
  CPU devices as the topology has.

  Args:
    topology: the devices.
  """
  if topology.chip.platform == 'tpu':
    os.environ |= {
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_LOG_DIR': 'disabled',
        'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
        'TPU_MIN_LOG_LEVEL': '3', 'TPU_STDERR_LOG_LEVEL': '3'}
  else:
    os.environ['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = '1'
  if not installed_compiler(topology):
    import jax
    jax.config.update('jax_num_cpu_devices', topology.devices)


def described_devices(topology: Topology) -> list:
  """Returns jax devices that stand for the devices of a topology. Programs can
  be compiled for them, but not run.

  If there is no compiler for them, they are virtual CPU devices.

  Args:
    topology: the devices.
  """
  # jax is imported only here, because set_environment must have run before.
  import jax
  if not installed_compiler(topology):
    return jax.devices('cpu')[:topology.devices]

  # Say the topology as each compiler takes it: the CUDA plugin as an option,
  # with a description of the GPU, and libtpu as a name.
  from jax.experimental import topologies
  shape = 'x'.join(str(side) for side in topology.shape)
  chip_name = topology.name.partition(':')[0]
  options: dict[str, Any] = {}
  if topology.chip.platform == 'cuda':
    name = topology.name
    options['topology'] = shape
    options['target_config'] = _target_config(chip_name, topology.chip)
  else:
    name = f'{chip_name}:{shape}'
    if topology.slices > 1:
      options['num_slices'] = topology.slices
    # By default, both cores of a v4 chip are one device, a megacore.
    if chip_name == 'v4':
      options['chip_config_name'] = 'megacore'
    # A slice of a single chip needs its own shape of a host.
    if topology.chips == topology.slices:
      options['chips_per_host_bounds'] = (1, 1, 1)
  with _hide_stderr():
    described = topologies.get_topology_desc(
        platform=topology.chip.platform, topology_name=name, **options)
    return list(described.devices)


def _target_config(chip_name: str, chip: Chip) -> str:
  """Describes a GPU to XLA, which can then compile for it where there is none.

  The numbers that are written out here are the same for all GPUs of CHIPS.

  Args:
    chip_name: the name of the GPU, a key of CHIPS.
    chip: the GPU, the value of this key.

  Returns:
    The text of XLA's GpuTargetConfigProto.
  """
  gpu = _DESCRIPTION_OF_GPU[chip_name]
  major, minor = gpu.compute_capability
  return f"""gpu_device_info {{
    threads_per_block_limit: 1024 threads_per_warp: 32
    shared_memory_per_block: 49152 shared_memory_per_core: {gpu.core_memory}
    shared_memory_per_block_optin: {gpu.block_memory}
    threads_per_core_limit: 2048
    core_count: {gpu.cores} fpus_per_core: {gpu.fp32_units}
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
    block_dim_limit_z: 65535 memory_bandwidth: {int(chip.hbm_rate)}
    l2_cache_size: {gpu.l2_cache} clock_rate_ghz: {gpu.clock_ghz}
    device_memory_size: {int(chip.hbm)}
    cuda_compute_capability {{ major: {major} minor: {minor} }}
    registers_per_core_limit: 65536 registers_per_block_limit: 65536
  }}
  platform_name: "CUDA"
  dnn_version_info {{ major: 9 minor: 10 }}
  device_description_str: "{chip.device_kind}" """


@contextlib.contextmanager
def _hide_stderr():
  """Hides what libtpu writes to the standard error when it finds no TPU.

  libtpu writes to file descriptor 2 and not to sys.stderr, so the descriptor
  itself is redirected to /dev/null.
  """
  sys.stderr.flush()
  stderr_before = os.dup(2)
  null_device = os.open(os.devnull, os.O_WRONLY)
  os.dup2(null_device, 2)
  try:
    yield
  finally:
    os.dup2(stderr_before, 2)
    os.close(stderr_before)
    os.close(null_device)
