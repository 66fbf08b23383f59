r"""Which rule of configs/sharding.py put each array where it is.

  python -m tools.explain_sharding --config configs/mixtral.py:8x7b \
      --mesh fsdp=8,expert=8

For each parameter, and each activation that the code constrains: its logical
axes, the mesh axes that each lies on, the bytes of a device, and why a
dimension is not sharded as its rule says; then the collectives that follow, by
the estimate of tools.plan --search. Shapes alone, on virtual CPU devices.
"""

import json
import math
import re
from typing import Any

from absl import flags
import jax
import jax.extend.core as jex
import numpy as np

from architectures.parts import paths
from architectures.parts import sharding
from common.errors import require
from configs import sharding as tables
from tools.plan import collectives, predict, report as plans
from training import cli, objectives, preflight, runs
from training.data import tokenizers
from training.distributed import devices
from training.runs import STREAMS, abstract_params

MOST = 4096  # devices; their making takes seconds, and grows as the square


def row(run: runs.Run, name: str, x: Any, axes) -> dict:
  """Returns what there is to say of one array, `axes` its logical ones."""
  mesh, table = run.mesh.shape, dict(tables.RULES[run.config.mesh.rules])
  spec = devices.spec(x.shape, axes, run.mesh, run.config.mesh.rules)
  places = [(entry,) if isinstance(entry, str) else entry or ()
            for entry in spec]
  dimensions = []
  for size, axis, place in zip(x.shape, axes, places):
    words = f'{axis or "-"} {size:,}'
    if over := [name for name in place if mesh[name] > 1]:
      words += f' over {" x ".join(over)}'
    missing = [name for name in table.get(axis, ())
               if mesh[name] > 1 and name not in place]
    taken = [name for name in missing if any(name in other for other in places)]
    if taken:
      words += f' ({taken[0]} shards another dimension)'
    elif missing:
      words += f' (not over {" x ".join(missing)}, which does not divide it)'
    dimensions.append(words)
  parts = math.prod(mesh[name] for place in places for name in place)
  return dict(name=name, shape=[*x.shape], dimensions=dimensions,
              bytes_per_device=math.prod(x.shape) * x.dtype.itemsize // parts)


def parameters(run: runs.Run) -> list[dict]:
  """Returns the row of each parameter."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(
      abstract_params(run.module), is_leaf=lambda x: hasattr(x, 'names'))
  return [row(run, paths.join(path), box.value, box.names)
          for path, box in leaves]


def activations(run: runs.Run) -> list[dict]:
  """Returns the row of each array that the forward pass constrains, once for
  all layers that are alike."""
  objective = objectives.of(run.config)
  batch = {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype)
           in objectives.shapes(run.config).items()}

  def loss(params, batch):
    output = objective.apply(
        run.module, params, batch, deterministic=False,
        rngs={name: jax.random.key(0) for name in STREAMS})
    return objective.loss(output, batch, run.config)[0]

  with run.context():
    jaxpr = jax.make_jaxpr(loss)(run.abstract.params, batch)
  rows = [row(run, *one) for one in _constraints(jaxpr.jaxpr, '')]
  return [*{json.dumps(one): one for one in rows}.values()]


def _constraints(jaxpr, above: str):
  """Yields (module, aval, logical axes) of each constraint that has a name."""
  scope = re.compile(rf'{sharding.AXES}\(([^()]*)\)')
  for eqn in jaxpr.eqns:
    name = f'{above}/{eqn.source_info.name_stack}'
    if eqn.primitive.name == 'sharding_constraint' and (
        axes := scope.search(name)):
      parts = [part.split('.')[0] for part in scope.sub('', name).split('/')
               # What jax and flax add to a module's path.
               if part and not re.match(r'jit|jvp|closed_call|checkpoint|while|'
                                        r'body|[A-Z]', part)]
      yield ('/'.join(dict.fromkeys(parts)) or 'loss', eqn.invars[0].aval,
             [None if axis == 'None' else axis
              for axis in axes[1].split(',') if axis])
    for inner in jex.jaxprs_in_params(eqn.params):
      yield from _constraints(inner, name)


def explain(config, mesh: dict[str, int]) -> dict:
  """Returns the report of one config, checked, on one mesh."""
  model, _ = runs.resolve(config, tokenizers.load(config.data.tokenizer))
  count = math.prod(mesh.values())
  run = runs.build(config, model,
                   devices.make_mesh(mesh, jax.devices()[:count]))
  return dict(
      model=model.arch, mesh=dict(mesh), rules=config.mesh.rules,
      parameters=parameters(run), activations=activations(run),
      collectives=collectives.table(predict.sent(run, np.zeros(count, int))))


def text(report: dict) -> str:
  """Returns a report for a terminal."""
  total = sum(row['bytes_per_device'] for row in report['parameters'])
  mesh = ' '.join(f'{axis}={n}' for axis, n in report['mesh'].items())
  lines = [f'{report["model"]}, mesh {mesh}, rules {report["rules"]!r}: '
           f'{total / 2**20:,.1f} MiB of parameters a device']
  for kind in ('parameters', 'activations'):
    lines += ['', kind, *(
        f'  {row["name"]}  [{", ".join(row["dimensions"])}]  '
        f'{row["bytes_per_device"] / 2**20:,.3f} MiB a device'
        for row in report[kind])]
  return '\n'.join([
      *lines, '', 'collectives of a training step, by an estimate '
      '(python -m tools.plan compiles it)',
      *plans.collectives(report['collectives'], '')])


def main():
  cli.define_config()
  flags.DEFINE_string('mesh', '', 'fsdp=8,expert=8 (others: 1), or a preset of '
                      "configs/sharding.py; '': config.mesh, where -1 is 1.")
  flags.DEFINE_bool('json', False, 'Print JSON.')
  cli.parse(__doc__)
  args = flags.FLAGS
  require(args.config is not None, 'pass --config FILE.py:SIZE')
  mesh = (devices.parse_mesh(args.mesh, 0) if args.mesh else
          {axis: abs(args.config.mesh[axis]) for axis in tables.MESH_AXES})
  count = math.prod(mesh.values())
  require(count <= MOST, f'a mesh of {count:,} devices is asked for: choose '
          f'one of {MOST:,} at most, as each becomes a virtual CPU device')
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', count)
  preflight.check_config(args.config, cli.overrides())
  report = explain(args.config, mesh)
  print(json.dumps(report, indent=2) if args.json else text(report))
  return 0


if __name__ == '__main__':
  cli.run(main)
