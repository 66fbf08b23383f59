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
from typing import NamedTuple, Optional

from common.errors import one_of, require

GIB = 2 ** 30
_GB = 1e9


class Chip(NamedTuple):
  """One device, and the machine that it stands in.

  Attributes:
    platform: tpu or cuda.
    kind: its name in training/costs/flops.py.
    cores: TensorCores of one device; TPUs only.
    devices: jax devices a chip.
    hbm: bytes that a program may use.
    hbm_rate: bytes a second between them and the device.
    links: bytes a second it can send within a slice, or a host of GPUs.
    outside: likewise between slices or hosts; None: not published.
    shapes: the small shapes of a slice; beyond, sides are multiples of 4.
    most: chips of the largest slice.
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
    'v4': Chip('tpu', 'TPU v4', 2, 1, 30.75 * GIB, 1228 * _GB, 300 * _GB,
               None, _CUBES, 4096),
    'v5e': Chip('tpu', 'TPU v5 lite', 1, 1, 15.75 * GIB, 819 * _GB, 200 * _GB,
                3.125 * _GB, _PLANES, 256),
    'v5p': Chip('tpu', 'TPU v5', 2, 1, 95.74 * GIB, 2765 * _GB, 600 * _GB,
                6.25 * _GB, _CUBES, 6144),
    'v6e': Chip('tpu', 'TPU v6 lite', 1, 1, 31.25 * GIB, 1638 * _GB, 400 * _GB,
                12.5 * _GB, _PLANES, 256),
    'tpu7x': Chip('tpu', 'TPU7x', 1, 2, 94.75 * GIB, 3690 * _GB, 300 * _GB,
                  6.25 * _GB, _CUBES, 9216),
    'a100': Chip('cuda', 'NVIDIA A100-SXM4-80GB', 1, 1, 85.1e9, 2039 * _GB,
                 300 * _GB, 25 * _GB, (), 0),
    'h100': Chip('cuda', 'NVIDIA H100 80GB HBM3', 1, 1, 84.9e9, 3350 * _GB,
                 450 * _GB, 50 * _GB, (), 0),
    'h200': Chip('cuda', 'NVIDIA H200', 1, 1, 150.7e9, 4800 * _GB, 450 * _GB,
                 50 * _GB, (), 0),
    'b200': Chip('cuda', 'NVIDIA B200', 1, 1, 191.5e9, 7700 * _GB, 900 * _GB,
                 50 * _GB, (), 0),
}


class Topology(NamedTuple):
  """Which devices a plan is for."""
  name: str  # as it was asked for
  chip: Chip
  shape: tuple[int, ...]
  slices: int

  @property
  def chips(self) -> int:
    return self.slices * math.prod(self.shape)

  @property
  def devices(self) -> int:
    return self.chips * self.chip.devices

  @property
  def together(self) -> int:
    """Devices that the fast network joins: a slice's, or a host's."""
    if self.chip.platform == 'tpu':
      return self.devices // self.slices
    return self.shape[2]


def parse(name: str, slices: int = 1) -> Topology:
  """Returns what a name such as v5p:4x4x8 or h100:1x8x8 stands for. The
  compilers accept shapes that no pod has.

  Raises:
    ValueError: for a name of no chip, or a shape that no pod has.
  """
  kind, _, text = name.partition(':')
  one_of('chip in --topology', kind, CHIPS)
  chip = CHIPS[kind]
  tpu, flat = chip.platform == 'tpu', chip.shapes == _PLANES
  example = ('4x8' if flat else '4x4x8' if tpu else
             '1x8x8 (slices x hosts x GPUs of a host)')
  sides = text.split('x')
  require(len(sides) == 3 - flat and all(s.isdigit() and int(s) for s in sides),
          f'--topology is {name!r}: write the shape of a {kind} as '
          f'{kind}:{example}')
  shape = tuple(map(int, sides))
  require(slices == 1 or tpu and slices > 1, f'--slices is {slices}: it must '
          f'be >= 1, and 1 for GPUs, written as {kind}:1xHOSTSxGPUS')
  if tpu:
    whole = not flat and all(s % 4 == 0 for s in shape) and (
        [*shape] == sorted(shape) and math.prod(shape) <= chip.most)
    more = '' if flat else (', or three multiples of 4 in rising order, such '
                            f'as 4x4x8, of {chip.most:,} chips at most')
    require(text in chip.shapes or whole, f'--topology is {name!r}, a shape '
            f'that no {kind} slice has: choose from {", ".join(chip.shapes)}'
            + more)
  else:  # NVLink joins 8 GPUs of a machine at most
    require(shape[0] == 1 and shape[2] in (1, 2, 4, 8), f'--topology is '
            f'{name!r}: write all hosts in one slice, of 1, 2, 4 or 8 GPUs '
            f'each, such as {kind}:1x8x8')
  return Topology(name, chip, shape, slices)


# Of a GpuTargetConfigProto, what the compiler's choices depend on: cores,
# compute capability, bytes of shared memory a core and a block, of the L2
# cache, GHz. docs.nvidia.com/cuda: programming guide, compute capabilities;
# the whitepapers of A100, H100 and Blackwell.
_GPUS = {
    'a100': (108, '8', '0', 64, 167936, 166912, 41943040, 1.41),
    'h100': (132, '9', '0', 128, 233472, 232448, 52428800, 1.98),
    'h200': (132, '9', '0', 128, 233472, 232448, 52428800, 1.98),
    'b200': (148, '10', '0', 128, 233472, 232448, 132644864, 1.965),
}


def compiler(topology: Topology) -> str:
  """Returns what compiles for it here: 'libtpu 0.0.45', ..., or ''."""
  names = (('libtpu',) if topology.chip.platform == 'tpu' else
           ('jax-cuda13-plugin', 'jax-cuda13-pjrt'))
  try:
    versions = [importlib.metadata.version(name) for name in names]
  except importlib.metadata.PackageNotFoundError:
    return ''
  # libtpu's interface is stable; the plugin loads only with its own jax.
  jax_version = importlib.metadata.version('jax')
  if names[0] != 'libtpu' and versions[0] != jax_version:
    return ''
  return f'{names[0]} {versions[0]}'


def dense(topology: Topology) -> tuple[str, ...]:
  """Returns those of flops.GROUPED, jax.lax.ragged_dot's products, that the
  compiler makes of all rows and all groups: on GPU each; on TPU, what jax 0.10
  with libtpu 0.0.45 has no kernel for on the chips of one core."""
  if topology.chip.platform == 'cuda':
    return ('forward', 'transposed', 'weights')
  release = importlib.metadata.version('jax').split('.')
  old = tuple(int(part) for part in release[:2]) < (0, 12)
  return ('forward', 'weights') if old and topology.chip.cores == 1 else ()


def environment(topology: Topology) -> None:
  """Sets what libtpu, the CUDA plugin and XLA read when they load.

  Without a compiler, as many virtual CPU devices as the topology has.
  """
  if topology.chip.platform == 'tpu':
    os.environ |= {
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_LOG_DIR': 'disabled',
        'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
        'TPU_MIN_LOG_LEVEL': '3', 'TPU_STDERR_LOG_LEVEL': '3'}
  else:
    os.environ['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = '1'
  if not compiler(topology):
    import jax
    jax.config.update('jax_num_cpu_devices', topology.devices)


def devices(topology: Topology) -> list:
  """Returns the topology's devices, or virtual ones in their place."""
  import jax
  if not compiler(topology):
    return jax.devices('cpu')[:topology.devices]
  from jax.experimental import topologies
  shape = 'x'.join(map(str, topology.shape))
  kind = topology.name.partition(':')[0]
  if topology.chip.platform == 'cuda':
    options = dict(topology=shape, target_config=_target_config(kind,
                                                                topology.chip))
    name = topology.name
  else:
    options, name = {}, f'{kind}:{shape}'
    if topology.slices > 1:
      options['num_slices'] = topology.slices
    if kind == 'v4':  # the default there: one device a chip
      options['chip_config_name'] = 'megacore'
    if topology.chips == topology.slices:
      options['chips_per_host_bounds'] = (1, 1, 1)
  with _quiet():
    return list(topologies.get_topology_desc(
        platform=topology.chip.platform, topology_name=name,
        **options).devices)


def _target_config(kind: str, chip) -> str:
  cores, major, minor, fpus, per_core, optin, l2, clock = _GPUS[kind]
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
def _quiet():
  """Hides what libtpu writes to file descriptor 2 when it finds no TPU."""
  sys.stderr.flush()
  kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(sink, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(sink)
