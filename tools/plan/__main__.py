r"""Compiles a config for a pod that is not there, and says what it costs.

  python -m tools.plan --config configs/mixtral.py:8x7b --topology v5p:4x4x4 \
      --mesh fsdp=8,expert=8 --config.data.batch_size=256

The real training step is compiled for a TPU (v4 v5e v5p v6e tpu7x, extra
`plan`) or for GPUs (a100 h100 h200 b200, extra `plan-gpu`). Printed are the
bytes on a device, every collective, the FLOPs, and the shortest step and
highest MFU that published figures allow. A plan that does not fit ends with a
sentence and exit code 2. Without a compiler for the topology, the figures are
estimates.

--search=3 lists the three best plans of all meshes (data, fsdp, expert and
tensor; context stays 1), remat policies and gradient accumulations that fit.
JAX_OPTIMIZATION_LEVEL=O1 halves the time of compiling.
"""

import json
import os

from absl import flags

from common.errors import RequestError, require
from training import cli

cli.define_config()
flags.DEFINE_string('topology', '', 'v5p:4x4x8 (chips), h100:1x8x8 (slices x '
                    'hosts x GPUs of a host).')
flags.DEFINE_integer('slices', 1, 'Slices of that shape; TPUs only.',
                     upper_bound=1024)
flags.DEFINE_string('mesh', '', "data=2,fsdp=8,expert=8; '': config.mesh.")
flags.DEFINE_list('programs', ['train'], 'Any of train, prefill, decode.')
flags.DEFINE_integer('search', 0, 'Search meshes, remat and accumulation: '
                     'list the best N plans that fit.', 0, 1000)
flags.DEFINE_bool('json', False, 'Print JSON.')


def main() -> int:
  """Plans the run that the command line describes, and prints the plan.

  Raises:
    DoesNotFit: for a plan that does not fit, after it is printed.
  """
  # Check the flags.
  cli.parse(__doc__)
  args = flags.FLAGS
  require(args.config is not None and args.topology, 'pass both --config '
          'FILE.py:SIZE and --topology, such as v5p:4x4x8')
  if args.search and (args.mesh or args.programs != ['train']):
    raise RequestError('--search chooses the mesh, and is for train alone: '
                       'leave out --mesh and --programs')
  require(args.programs, '--programs names none: choose from train, prefill, '
          'decode')

  # jax reads these variables when it is imported and when it looks for devices,
  # so they come before any import of jax.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from tools.plan import chips
  topology = chips.parse_topology(args.topology, args.slices)
  chips.set_environment(topology)

  # Check the config, and search for plans if the flags say so.
  from tools.plan import programs, report
  from training import preflight
  preflight.check_config(args.config, cli.overridden_fields())
  if args.search:
    from tools.plan import search
    plans = search.search_plans(
        args.config, topology, wanted=args.search)
    if args.json:
      print(json.dumps(plans, indent=2))
    else:
      print(search.plans_as_text(plans))
    return 0

  # Else plan the one run, and print the plan even if it does not fit.
  run = programs.run_on_topology(args.config, topology, mesh=args.mesh)
  plan = programs.make_plan(run, topology, names=args.programs)
  if args.json:
    print(json.dumps(plan, indent=2))
  elif plan['programs']:
    print(report.plan_as_text(plan))
  if not plan['fits']:
    raise programs.DoesNotFit('; '.join(plan['reasons']))
  return 0


if __name__ == '__main__':
  cli.run(main)
