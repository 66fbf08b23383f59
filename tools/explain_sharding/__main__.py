r"""Which rule of configs/sharding.py put each array where it is.

  python -m tools.explain_sharding --config configs/mixtral.py:8x7b \
      --mesh fsdp=8,expert=8
  python -m tools.explain_sharding --config configs/llama.py:2-7b \
      --mesh fsdp=8 --diff fsdp=4,tensor=2

For each parameter, and each activation that the code constrains: its logical
axes, the rule that fired, the PartitionSpec, the bytes of a device, and why a
dimension is not sharded; then the collectives that follow. Shapes alone, on
virtual CPU devices. `--diff` shows what another mesh, or another table of
rules (replicated), would change.
"""

import json
import math
import os

from absl import flags

from configs.errors import RequestError, require
from training import cli

cli.define_config()
flags.DEFINE_string('mesh', '', 'fsdp=8,expert=8 (others: 1), or a preset of '
                    "configs/sharding.py; '': config.mesh, where -1 is 1.")
flags.DEFINE_string('diff', '', 'Another mesh, or a table of rules.')
flags.DEFINE_bool('json', False, 'Print JSON.')
MOST_DEVICES = 2**14


def main():
  cli.parse(__doc__)
  args = flags.FLAGS
  if args.config is None:
    raise RequestError('pass --config FILE.py:SIZE')
  os.environ['JAX_PLATFORMS'] = 'cpu'  # before jax is imported
  from configs import sharding as tables
  from training.distributed import devices
  config = args.config
  mesh = (devices.parse_mesh(args.mesh, 0) if args.mesh else
          {axis: abs(config.mesh[axis]) for axis in tables.MESH_AXES})
  other, rules = mesh, config.mesh.rules
  if args.diff in tables.RULES:
    rules = args.diff
  elif args.diff:
    other = devices.parse_mesh(args.diff, 0)
  count = max(math.prod(mesh.values()), math.prod(other.values()))
  require(count <= MOST_DEVICES, f'the mesh is of {count:,} devices: choose '
          f'{MOST_DEVICES:,} or fewer, each of which is made here')
  os.environ['XLA_FLAGS'] = (
      os.environ.get('XLA_FLAGS', '')
      + f' --xla_force_host_platform_device_count={count}')
  from tools.explain_sharding import report as reports
  report = reports.explain(config, mesh)
  if args.diff:
    second = config.copy_and_resolve_references()
    second.mesh.rules = rules
    report = reports.diff(report, reports.explain(second, other))
  write = reports.diff_text if args.diff else reports.text
  print(json.dumps(report, indent=2) if args.json else write(report))
  return 0


if __name__ == '__main__':
  cli.run(main)
