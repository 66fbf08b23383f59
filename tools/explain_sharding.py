r"""Which rule of configs/sharding.py put each array where it is.

  python -m tools.explain_sharding --config configs/mixtral.py:8x7b \
      --mesh fsdp=8,expert=8
  python -m tools.explain_sharding --config configs/llama.py:2-7b \
      --mesh fsdp=8 --diff fsdp=4,tensor=2

For each parameter, and each activation that the code constrains: its logical
axes, the mesh axes that each lies on, the bytes of a device, and why a
dimension is not sharded as its rule says; then the collectives that follow, by
the estimate of tools.plan --search. Shapes alone, on virtual CPU devices.
`--diff` shows what another mesh, or another table of rules (replicated), would
change.
"""

import json
import math
import os
import re

from absl import flags

from configs.errors import RequestError, require
from training import cli

MOST_DEVICES = 2**14


def row(run, name: str, shape, axes, itemsize: int) -> dict:
  """Returns what there is to say of one array, `axes` its logical ones."""
  from configs import sharding as tables
  from training.distributed import devices
  mesh, table = run.mesh.shape, dict(tables.RULES[run.config.mesh.rules])
  spec = devices.spec(shape, axes, run.mesh, run.config.mesh.rules)
  on = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
  dimensions = []
  for size, axis, own in zip(shape, axes, on):
    said = f'{axis or "-"} {size:,}'
    if where := [name for name in own if mesh[name] > 1]:
      said += f' over {" x ".join(where)}'
    missing = [name for name in table.get(axis, ())
               if mesh[name] > 1 and name not in own]
    taken = [name for name in missing if any(name in other for other in on)]
    if taken:
      said += f' ({taken[0]} shards another dimension)'
    elif missing:
      said += f' (not over {" x ".join(missing)}, which does not divide it)'
    dimensions.append(said)
  parts = math.prod(mesh[name] for own in on for name in own)
  return dict(name=name, shape=[*shape], dimensions=dimensions,
              bytes_per_device=math.prod(shape) * itemsize // parts)


def parameters(run) -> list[dict]:
  """Returns the row of each parameter."""
  import jax
  from training import paths
  from training.step import abstract_params
  leaves, _ = jax.tree_util.tree_flatten_with_path(
      abstract_params(run.module), is_leaf=lambda x: hasattr(x, 'names'))
  return [row(run, paths.join(path), box.value.shape, box.names,
              box.value.dtype.itemsize) for path, box in leaves]


def activations(run) -> list[dict]:
  """Returns the row of each array that the forward pass constrains, once for
  all layers that are alike."""
  import jax
  from training import objectives
  objective = objectives.of(run.config)
  batch = {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype)
           in objectives.shapes(run.config).items()}

  def loss(params, batch):
    rngs = {name: jax.random.key(0) for name in ('dropout', 'router')}
    output = objective.apply(run.module, params, batch, deterministic=False,
                             rngs=rngs)
    return objective.loss(output, batch, run.config)[0]

  with run.context():
    jaxpr = jax.make_jaxpr(loss)(run.abstract.params, batch)
  rows = [row(run, name, aval.shape, axes, aval.dtype.itemsize)
          for name, aval, axes in _constraints(jaxpr.jaxpr, '')]
  return [*{json.dumps(one): one for one in rows}.values()]


def _constraints(jaxpr, above: str):
  """Yields (module, aval, logical axes) of each constraint that has a name."""
  import jax.extend.core as jex
  from architectures.parts import sharding
  scope = re.compile(rf'{sharding.AXES}\(([^()]*)\)')
  for eqn in jaxpr.eqns:
    name = f'{above}/{eqn.source_info.name_stack}'
    found = scope.search(name)
    if eqn.primitive.name == 'sharding_constraint' and found:
      parts = [part for part in scope.sub('', name).split('/')
               # What jax and flax add to a module's path.
               if part and not re.match(r'jit|jvp|closed_call|checkpoint|while|'
                                        r'body|[A-Z]', part)]
      yield ('/'.join(dict.fromkeys(part.split('.')[0] for part in parts))
             or 'loss', eqn.invars[0].aval,
             [None if axis == 'None' else axis
              for axis in found[1].split(',') if axis])
    for inner in jex.jaxprs_in_params(eqn.params):
      yield from _constraints(inner, name)


def explain(config, mesh: dict[str, int]) -> dict:
  """Returns the report of one config on one mesh."""
  import jax
  import numpy as np
  from tools.plan import collectives, predict
  from training import preflight, runs
  from training.data import tokenizers
  from training.distributed import devices
  preflight.check_config(config)
  model, _ = runs.resolve(config, tokenizers.load(config.data.tokenizer))
  count = math.prod(mesh.values())
  run = runs.build(config, model,
                   devices.make_mesh(mesh, jax.devices()[:count]))
  return dict(
      model=model.arch, mesh=dict(mesh), rules=config.mesh.rules,
      parameters=parameters(run), activations=activations(run),
      collectives=collectives.table(predict.sent(run, np.zeros(count, int))))


def text(report: dict, other: dict | None = None) -> str:
  """Returns a report for a terminal; with another one, what differs."""
  from tools.plan import report as plans
  lines = []
  for one in filter(None, (report, other)):
    total = sum(row['bytes_per_device'] for row in one['parameters'])
    lines.append(
        f'{one["model"]}, mesh '
        + ' '.join(f'{axis}={n}' for axis, n in one['mesh'].items())
        + f', rules {one["rules"]!r}: {total / 2**20:,.1f} MiB of parameters a '
        'device')
  for kind in ('parameters', 'activations'):
    lines += ['', kind + ' that differ' * bool(other)]
    told = [[f'  {row["name"]}  [{", ".join(row["dimensions"])}]  '
             f'{row["bytes_per_device"] / 2**20:,.3f} MiB a device'
             for row in one[kind]] for one in (report, other or {kind: []})]
    lines += [line for line in told[0] if line not in told[1]]
    lines += [f'  instead:{line[1:]}' for line in told[1]
              if line not in told[0]]
  for one in filter(None, (report, other)):
    lines += ['', 'collectives of a training step, by an estimate '
              '(python -m tools.plan compiles it)',
              *plans.collectives(one['collectives'], '')]
  return '\n'.join(lines)


def main():
  cli.define_config()
  flags.DEFINE_string('mesh', '', 'fsdp=8,expert=8 (others: 1), or a preset of '
                      "configs/sharding.py; '': config.mesh, where -1 is 1.")
  flags.DEFINE_string('diff', '', 'Another mesh, or a table of rules.')
  flags.DEFINE_bool('json', False, 'Print JSON.')
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
  second = config.copy_and_resolve_references()
  other = mesh
  if args.diff in tables.RULES:
    second.mesh.rules = args.diff
  elif args.diff:
    other = devices.parse_mesh(args.diff, 0)
  count = max(math.prod(mesh.values()), math.prod(other.values()))
  require(count <= MOST_DEVICES, f'the mesh is of {count:,} devices: choose '
          f'{MOST_DEVICES:,} or fewer, each of which is made here')
  os.environ['XLA_FLAGS'] = (
      os.environ.get('XLA_FLAGS', '')
      + f' --xla_force_host_platform_device_count={count}')
  reports = [explain(config, mesh)]
  if args.diff:
    reports.append(explain(second, other))
  print(json.dumps(reports, indent=2) if args.json else text(*reports))
  return 0


if __name__ == '__main__':
  cli.run(main)
