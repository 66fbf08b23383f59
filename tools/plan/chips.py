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

from common.errors import RequestError, one_of, require

GIB = 2 ** 30
_GB = 1e9


class Chip(NamedTuple):
  """One device, and the machine that it stands in.

  Attributes:
    platform: tpu or cuda.
    kind: its name in training/costs/flops.py.
    cores: the TensorCores of one device; TPUs only.
    devices: the jax devices of a chip.
    hbm: the bytes that a program may use.
    hbm_rate: the bytes a second that the device reads and writes of these.
    links: the bytes a second that it can send within a slice, or within a host
      of GPUs.
    outside: the bytes a second that it can send to other slices or hosts;
      None: not published.
    shapes: the small shapes of a slice; beyond, sides are multiples of 4.
    most: the chips of the largest slice.
  """
  platform: str
  kind: str
  cores: int
  devices: int
  hbm: float
  hbm_rate: float
  links: float
  outside: Optional[float]
  shapes: tuple[str, ...]
  most: int


_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4')
_PLANES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')

CHIPS = {
    'v4': Chip(
        platform='tpu', kind='TPU v4', cores=2, devices=1,
        hbm=30.75 * GIB, hbm_rate=1228 * _GB, links=300 * _GB,
        outside=None, shapes=_CUBES, most=4096),
    'v5e': Chip(
        platform='tpu', kind='TPU v5 lite', cores=1, devices=1,
        hbm=15.75 * GIB, hbm_rate=819 * _GB, links=200 * _GB,
        outside=3.125 * _GB, shapes=_PLANES, most=256),
    'v5p': Chip(
        platform='tpu', kind='TPU v5', cores=2, devices=1,
        hbm=95.74 * GIB, hbm_rate=2765 * _GB, links=600 * _GB,
        outside=6.25 * _GB, shapes=_CUBES, most=6144),
    'v6e': Chip(
        platform='tpu', kind='TPU v6 lite', cores=1, devices=1,
        hbm=31.25 * GIB, hbm_rate=1638 * _GB, links=400 * _GB,
        outside=12.5 * _GB, shapes=_PLANES, most=256),
    'tpu7x': Chip(
        platform='tpu', kind='TPU7x', cores=1, devices=2,
        hbm=94.75 * GIB, hbm_rate=3690 * _GB, links=300 * _GB,
        outside=6.25 * _GB, shapes=_CUBES, most=9216),
    'a100': Chip(
        platform='cuda', kind='NVIDIA A100-SXM4-80GB', cores=1, devices=1,
        hbm=85.1e9, hbm_rate=2039 * _GB, links=300 * _GB,
        outside=25 * _GB, shapes=(), most=0),
    'h100': Chip(
        platform='cuda', kind='NVIDIA H100 80GB HBM3', cores=1, devices=1,
        hbm=84.9e9, hbm_rate=3350 * _GB, links=450 * _GB,
        outside=50 * _GB, shapes=(), most=0),
    'h200': Chip(
        platform='cuda', kind='NVIDIA H200', cores=1, devices=1,
        hbm=150.7e9, hbm_rate=4800 * _GB, links=450 * _GB,
        outside=50 * _GB, shapes=(), most=0),
    'b200': Chip(
        platform='cuda', kind='NVIDIA B200', cores=1, devices=1,
        hbm=191.5e9, hbm_rate=7700 * _GB, links=900 * _GB,
        outside=50 * _GB, shapes=(), most=0),
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
  def together(self) -> int:
    """The number of devices that the fast network joins: those of a slice, or
    of a host."""
    if self.chip.platform == 'tpu':
      return self.devices // self.slices
    return self.shape[2]


def parse_topology(name: str, slices: int = 1) -> Topology:
  """Returns the topology that a name such as v5p:4x4x8 or h100:1x8x8 stands
  for. The compilers accept shapes that no pod has.

  Raises:
    ValueError: for a name of no chip, or a shape that no pod has.
  """
  kind, _, text = name.partition(':')
  one_of('chip in --topology', kind, CHIPS)
  chip = CHIPS[kind]
  shape = _parse_shape(name, kind, text)
  if slices != 1 and (chip.platform != 'tpu' or slices < 1):
    raise RequestError(
        f'--slices is {slices}: it must be >= 1, and 1 for GPUs, written as '
        f'{kind}:1xHOSTSxGPUS')

  # A slice of TPUs has a shape that is sold.
  if chip.platform == 'tpu':
    if text not in chip.shapes and not _is_shape_of_cubes(chip, shape):
      more = ''
      if chip.shapes != _PLANES:
        more = (', or three multiples of 4 in rising order, such as 4x4x8, of '
                f'{chip.most:,} chips at most')
      raise RequestError(
          f'--topology is {name!r}, a shape that no {kind} slice has: choose '
          f'from {", ".join(chip.shapes)}{more}')
  # NVLink joins 8 GPUs of a machine at most.
  elif shape[0] != 1 or shape[2] not in (1, 2, 4, 8):
    raise RequestError(
        f'--topology is {name!r}: write all hosts in one slice, of 1, 2, 4 or '
        f'8 GPUs each, such as {kind}:1x8x8')
  return Topology(name=name, chip=chip, shape=shape, slices=slices)


def _parse_shape(name: str, kind: str, text: str) -> tuple[int, ...]:
  """Returns the shape that `text` writes, as 4x4x8.

  Raises:
    RequestError: where it has not as many sides as a slice of the chip.
  """
  dimensions, example = 3, '4x4x8'
  if CHIPS[kind].shapes == _PLANES:
    dimensions, example = 2, '4x8'
  elif CHIPS[kind].platform == 'cuda':
    example = '1x8x8 (slices x hosts x GPUs of a host)'
  sides = text.split('x')
  are_numbers = all(side.isdigit() and int(side) for side in sides)
  require(len(sides) == dimensions and are_numbers, f'--topology is {name!r}: '
          f'write the shape of a {kind} as {kind}:{example}')
  return tuple(int(side) for side in sides)


def _is_shape_of_cubes(chip: Chip, shape: tuple[int, ...]) -> bool:
  """Whether a slice of so many cubes of 4x4x4 chips is sold."""
  if chip.shapes != _CUBES or math.prod(shape) > chip.most:
    return False
  return list(shape) == sorted(shape) and all(side % 4 == 0 for side in shape)


# The compiler's choices depend on these fields of a GpuTargetConfigProto: the
# cores, the compute capability, the FP32 units of a core, the bytes of shared
# memory of a core and of a block, those of the L2 cache, and the clock in GHz.
# docs.nvidia.com/cuda: programming guide, compute capabilities;
# the whitepapers of A100, H100 and Blackwell.
_TARGET_OF_GPU = {
    'a100': (108, '8', '0', 64, 167936, 166912, 41943040, 1.41),
    'h100': (132, '9', '0', 128, 233472, 232448, 52428800, 1.98),
    'h200': (132, '9', '0', 128, 233472, 232448, 52428800, 1.98),
    'b200': (148, '10', '0', 128, 233472, 232448, 132644864, 1.965),
}


def installed_compiler(topology: Topology) -> str:
  """Returns the compiler for a topology that is installed here, such as
  'libtpu 0.0.45'; '': there is none."""
  names = ['libtpu']
  if topology.chip.platform == 'cuda':
    names = ['jax-cuda13-plugin', 'jax-cuda13-pjrt']
  try:
    versions = [importlib.metadata.version(name) for name in names]
  except importlib.metadata.PackageNotFoundError:
    return ''
  # libtpu's interface is stable; the plugin loads only with its own jax.
  jax_version = importlib.metadata.version('jax')
  if names[0] != 'libtpu' and versions[0] != jax_version:
    return ''
  return f'{names[0]} {versions[0]}'


def products_of_all_groups(topology: Topology) -> tuple[str, ...]:
  """Returns the entries of flops.GROUPED, jax.lax.ragged_dot's products, that
  the compiler makes of all rows and all groups.

  On GPU these are all. On TPU, jax 0.10 with libtpu 0.0.45 has no kernel for
  two of them on chips of one core.
  """
  if topology.chip.platform == 'cuda':
    return ('forward', 'transposed', 'weights')
  major, minor, *_ = importlib.metadata.version('jax').split('.')
  if topology.chip.cores == 1 and (int(major), int(minor)) < (0, 12):
    return ('forward', 'weights')
  return ()


def set_environment(topology: Topology) -> None:
  """Sets the variables that libtpu, the CUDA plugin and XLA read when they
  load. Without a compiler, it makes as many virtual CPU devices as the topology
  has."""
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
  """Returns the topology's devices, or virtual ones in their place."""
  import jax
  if not installed_compiler(topology):
    return jax.devices('cpu')[:topology.devices]
  from jax.experimental import topologies
  shape = 'x'.join(str(side) for side in topology.shape)
  kind = topology.name.partition(':')[0]
  options: dict[str, Any] = {}
  if topology.chip.platform == 'cuda':
    name = topology.name
    options['topology'] = shape
    options['target_config'] = _target_config(kind, topology.chip)
  else:
    name = f'{kind}:{shape}'
    if topology.slices > 1:
      options['num_slices'] = topology.slices
    if kind == 'v4':  # the default there: one device a chip
      options['chip_config_name'] = 'megacore'
    if topology.chips == topology.slices:
      options['chips_per_host_bounds'] = (1, 1, 1)
  with _stderr_hidden():
    described = topologies.get_topology_desc(
        platform=topology.chip.platform, topology_name=name, **options)
    return list(described.devices)


def _target_config(kind: str, chip: Chip) -> str:
  """Returns the text of a GpuTargetConfigProto, which describes a GPU to
  XLA."""
  cores, major, minor, fpus, per_core, optin, l2, clock = _TARGET_OF_GPU[kind]
  return f"""gpu_device_info {{
    threads_per_block_limit: 1024 threads_per_warp: 32
    shared_memory_per_block: 49152 shared_memory_per_core: {per_core}
    shared_memory_per_block_optin: {optin} threads_per_core_limit: 2048
    core_count: {cores} fpus_per_core: {fpus}
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
    block_dim_limit_z: 65535 memory_bandwidth: {int(chip.hbm_rate)}
    l2_cache_size: {l2} clock_rate_ghz: {clock}
    device_memory_size: {int(chip.hbm)}
    cuda_compute_capability {{ major: {major} minor: {minor} }}
    registers_per_core_limit: 65536 registers_per_block_limit: 65536
  }}
  platform_name: "CUDA"
  dnn_version_info {{ major: 9 minor: 10 }}
  device_description_str: "{chip.kind}" """


@contextlib.contextmanager
def _stderr_hidden():
  """Hides what libtpu writes to file descriptor 2 when it finds no TPU."""
  sys.stderr.flush()
  before, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(sink, 2)
  try:
    yield
  finally:
    os.dup2(before, 2)
    os.close(before)
    os.close(sink)
