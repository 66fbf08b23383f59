r"""Explains which rule of configs/sharding.py put each array where it is.

  python -m tools.explain_sharding --config configs/mixtral.py:8x7b \
      --mesh fsdp=8,expert=8

It prints for each parameter, and each activation that the code constrains, its
logical axes, the mesh axes that each lies on, the bytes of a device, and why a
dimension is not sharded as its rule says; then the collectives that follow, by
the estimate of tools.plan --search. It works from shapes alone, on virtual CPU
devices.
"""

from collections.abc import Iterator, Sequence

import json
import math
import re
from typing import Any

from absl import flags
import jax
import jax.extend.core as jex
import numpy as np

from architectures.parts import paths, sharding
from common.errors import require
from configs import sharding as tables
from tools.plan import collectives, predict, report as plans
from training import cli, objectives, preflight, runs
from training.data import tokenizers
from training.distributed import devices
from training.runs import RANDOM_STREAMS, abstract_params

# The devices of a mesh: to make them takes seconds, and grows as the square.
MAX_DEVICES = 4096
# The names that jax and flax add to a module's path.
_ADDED = re.compile(r'jit|jvp|closed_call|checkpoint|while|body|[A-Z]')


def describe_array(run: runs.Run, name: str, x: Any,
                   axes: Sequence[str | None]) -> dict:
  """Describes how one array is sharded over the devices of a mesh.

  Args:
    run: the run, on the mesh.
    name: the name of the array.
    x: anything with the array's shape and dtype.
    axes: the logical axis of each dimension, such as 'embed', which the rules
      map to mesh axes; None for a dimension that is never sharded.

  Returns:
    name and shape: those of the array. dimensions: a sentence for each
    dimension, with its size and mesh axes. bytes_per_device: its share.
  """
  mesh, rules = run.mesh.shape, run.config.mesh.rules
  spec = devices.partition_spec(x.shape, names=axes, mesh=run.mesh, rules=rules)
  places: list[tuple[str, ...]] = []  # the mesh axes of each dimension
  for entry in spec:
    if isinstance(entry, str):
      entry = entry,
    places.append(tuple(entry or ()))
  taken = {name for place in places for name in place}

  # Each dimension in words. Mesh axes of one device shard nothing, so they are
  # left out.
  dimensions = []
  table = dict(tables.RULES[rules])
  for size, axis, place in zip(x.shape, axes, places):
    asked_for = [name for name in table.get(axis, ()) if mesh[name] > 1]
    words = f'{axis or "-"} {size:,}'
    over = [name for name in place if mesh[name] > 1]
    if over:
      words += f' over {" x ".join(over)}'
    dimensions.append(words + _why_not_sharded(asked_for, place, taken))

  # A mesh axis shards one dimension at most, so the sizes can be multiplied.
  parts = math.prod(mesh[name] for name in taken)
  nbytes = math.prod(x.shape) * x.dtype.itemsize
  return dict(name=name, shape=list(x.shape), dimensions=dimensions,
              bytes_per_device=nbytes // parts)


def _why_not_sharded(asked_for: list[str], place: tuple[str, ...],
                     taken: set[str]
                     ) -> str:
  """Returns why a dimension is not sharded as its rule says; '': it is.

  Args:
    asked_for: the mesh axes that the rule names.
    place: the mesh axes that the dimension lies on.
    taken: the mesh axes that any dimension of the array lies on.
  """
  missing = [name for name in asked_for if name not in place]
  elsewhere = [name for name in missing if name in taken]
  if elsewhere:
    return f' ({elsewhere[0]} shards another dimension)'
  if missing:
    return f' (not over {" x ".join(missing)}, which does not divide it)'
  return ''


def describe_parameters(run: runs.Run) -> list[dict]:
  """Returns how each parameter of the model is sharded, as `describe_array`
  does."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(
      abstract_params(run.module), is_leaf=lambda x: hasattr(x, 'names'))
  return [describe_array(run, paths.path_to_string(path), box.value,
                         axes=box.names)
          for path, box in leaves]


def describe_activations(run: runs.Run) -> list[dict]:
  """Describes the sharding of each activation that the forward pass constrains.

  Args:
    run: the run, on the mesh.

  Returns:
    A dict of `describe_array` for each activation, in the order of the forward
    pass. Layers that are alike share one.
  """
  objective = objectives.find_objective(run.config)

  # Only the shapes of a batch are needed, because nothing is computed.
  batch = {}
  for key, (shape, dtype) in objectives.shapes_of_batch(run.config).items():
    batch[key] = jax.ShapeDtypeStruct(shape, dtype)

  def loss(params, batch):
    rngs = {name: jax.random.key(0) for name in RANDOM_STREAMS}
    output = objective.apply(
        run.module, params, batch, deterministic=False, rngs=rngs)
    return objective.loss(output, batch, run.config)[0]

  # The traced program holds each constraint as an operation of its own.
  with run.context():
    jaxpr = jax.make_jaxpr(loss)(run.abstract_state.params, batch)

  # The description itself is the key, so that equal ones are kept once.
  rows = {}
  for name, x, axes in _find_constraints(jaxpr.jaxpr, ''):
    description = describe_array(run, name, x, axes=axes)
    rows[json.dumps(description)] = description
  return list(rows.values())


def _find_constraints(jaxpr: Any, above: str
                      ) -> Iterator[tuple[str, Any, list[str | None]]]:
  """Yields each named constraint on the sharding of an array in a traced
  program: the path of its module, its shape and dtype, and its logical axes.

  Args:
    jaxpr: the traced program, or one inside it.
    above: the stack of names around it.
  """
  # The model wraps each constraint in a named scope that lists its logical
  # axes, and the trace keeps that name: SCOPE(batch,None,embed).
  scope = re.compile(rf'{sharding.SCOPE_OF_CONSTRAINT}\(([^()]*)\)')
  for eqn in jaxpr.eqns:
    name = f'{above}/{eqn.source_info.name_stack}'
    declared = scope.search(name)
    if eqn.primitive.name == 'sharding_constraint' and declared:
      axes: list[str | None] = []
      for axis in declared[1].split(','):
        if axis:
          axes.append(None if axis == 'None' else axis)
      yield _path_of_module(scope.sub('', name)), eqn.invars[0].aval, axes
    # Scans and checkpoints hold programs of their own.
    for inner in jex.jaxprs_in_params(eqn.params):
      yield from _find_constraints(inner, name)


def _path_of_module(stack: str) -> str:
  """Returns the path of the module in a stack of names of JAX, without the
  names that JAX and Flax add, such as jit(...)."""
  parts = []
  for part in stack.split('/'):
    if part and not _ADDED.match(part):
      parts.append(part.split('.')[0])
  return '/'.join(dict.fromkeys(parts)) or 'loss'


def explain_sharding(config: Any, mesh: dict[str, int]) -> dict:
  """Returns how every parameter and activation of a run is sharded on a mesh,
  and the collectives (communication of devices) that follow.

  Args:
    config: the config of the run, which was checked.
    mesh: the number of devices of each mesh axis.

  Returns:
    model, mesh, rules: the architecture, the mesh and the name of its table of
    sharding rules. parameters, activations: a dict of `describe_array` for
    each. collectives: those of a training step, summed by kind.
  """
  model, _ = runs.resolve_model(config, tokenizers.load(config.data.tokenizer))
  count = math.prod(mesh.values())
  device_mesh = devices.make_mesh(mesh, jax.devices()[:count])
  run = runs.build(config, model, device_mesh)
  # The host of each device: all are on host 0, so that no bytes are counted as
  # sent between hosts.
  host_of_device = np.zeros(count, int)
  predicted = predict.predict_collectives(run, host_of_device)
  return dict(
      model=model.arch, mesh=dict(mesh), rules=config.mesh.rules,
      parameters=describe_parameters(run),
      activations=describe_activations(run),
      collectives=collectives.sum_by_kind(predicted))


def format_report(report: dict) -> str:
  """Returns what `explain_sharding` returns as text for a terminal."""
  total = sum(row['bytes_per_device'] for row in report['parameters'])
  mesh = ' '.join(f'{axis}={n}' for axis, n in report['mesh'].items())
  lines = [f'{report["model"]}, mesh {mesh}, rules {report["rules"]!r}: '
           f'{total / 2**20:,.1f} MiB of parameters a device']
  for kind in ('parameters', 'activations'):
    lines += ['', kind]
    for row in report[kind]:
      lines.append(f'  {row["name"]}  [{", ".join(row["dimensions"])}]  '
                   f'{row["bytes_per_device"] / 2**20:,.3f} MiB a device')
  lines += ['', 'collectives of a training step, by an estimate '
            '(python -m tools.plan compiles it)']
  lines += plans.table_of_collectives(report['collectives'], mark='')
  return '\n'.join(lines)


def main() -> int:
  cli.define_config()
  flags.DEFINE_string('mesh', '', 'fsdp=8,expert=8 (others: 1), or a preset of '
                      "configs/sharding.py; '': config.mesh, where -1 is 1.")
  flags.DEFINE_bool('json', False, 'Print JSON.')
  cli.parse(__doc__)
  args = flags.FLAGS
  require(args.config is not None, 'pass --config FILE.py:SIZE')
  mesh = {axis: abs(args.config.mesh[axis]) for axis in tables.MESH_AXES}
  if args.mesh:
    mesh = devices.parse_mesh(args.mesh, 0)
  count = math.prod(mesh.values())
  require(count <= MAX_DEVICES,
          f'a mesh of {count:,} devices is asked for: choose '
          f'one of {MAX_DEVICES:,} at most, as each becomes a virtual '
          'CPU device')
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', count)
  preflight.check_config(args.config, cli.overridden_fields())
  report = explain_sharding(args.config, mesh)
  if args.json:
    print(json.dumps(report, indent=2))
  else:
    print(format_report(report))
  return 0


if __name__ == '__main__':
  cli.run(main)
