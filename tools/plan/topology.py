"""Devices that are not there: described by libtpu, by the CUDA plugin, or, as
an estimate, by virtual CPU devices.

`environment` must run before jax looks for devices, JAX_PLATFORMS=cpu be set
before it is imported: the CPU stays the default backend. No data are ever put
on the described devices.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys

from tools.plan.chips import Topology

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
  """Returns those of traced.GROUPED, jax.lax.ragged_dot's products, that the
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
    os.environ['XLA_FLAGS'] = (
        os.environ.get('XLA_FLAGS', '')
        + f' --xla_force_host_platform_device_count={topology.devices}')


def devices(topology: Topology) -> list:
  """Returns the topology's devices, or virtual ones in their place."""
  import jax
  if not compiler(topology):
    found = jax.devices('cpu')
    assert len(found) >= topology.devices, (len(found), topology)
    return found[:topology.devices]
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
    found = topologies.get_topology_desc(
        platform=topology.chip.platform, topology_name=name,
        **options).devices
  assert len(found) == topology.devices, (len(found), topology)
  return list(found)


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
