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
_ADDED_NAMES = re.compile(r'jit|jvp|closed_call|checkpoint|while|body|[A-Z]')


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
    A dict for JSON with the `name` and `shape` of the array; in `dimensions`
    words for each dimension, with its size and mesh axes; and the
    `bytes_per_device`.
  """
  # Find the mesh axes that each dimension is sharded over. An entry of the spec
  # is the name of one, a tuple of names, or None.
  mesh = run.mesh.shape
  rules = run.config.mesh.rules
  spec = devices.partition_spec(x.shape, names=axes, mesh=run.mesh, rules=rules)
  mesh_axes_of_dimensions: list[tuple[str, ...]] = []
  used_axes: set[str] = set()
  for entry in spec:
    if isinstance(entry, str):
      entry = entry,
    mesh_axes = tuple(entry or ())
    mesh_axes_of_dimensions.append(mesh_axes)
    used_axes.update(mesh_axes)

  # Describe each dimension in words. Mesh axes of one device shard nothing, so
  # they are left out.
  dimensions = []
  table = dict(tables.RULES[rules])
  for size, axis, mesh_axes in zip(x.shape, axes, mesh_axes_of_dimensions):
    rule_axes = [name for name in table.get(axis, ()) if mesh[name] > 1]
    words = f'{axis or "-"} {size:,}'
    sharding_axes = [name for name in mesh_axes if mesh[name] > 1]
    if sharding_axes:
      words += f' over {" x ".join(sharding_axes)}'
    words += _why_not_sharded(
        rule_axes, mesh_axes=mesh_axes, used_axes=used_axes)
    dimensions.append(words)

  # A mesh axis shards at most one dimension, so the sizes can be multiplied.
  num_shards = math.prod(mesh[name] for name in used_axes)
  nbytes = math.prod(x.shape) * x.dtype.itemsize
  return dict(name=name, shape=list(x.shape), dimensions=dimensions,
              bytes_per_device=nbytes // num_shards)


def _why_not_sharded(rule_axes: list[str], mesh_axes: tuple[str, ...],
                     used_axes: set[str]) -> str:
  """Explains in a few words why a dimension of an array is not sharded over all
  mesh axes that the sharding rules name for it.

  Args:
    rule_axes: the mesh axes that the rules name for the dimension.
    mesh_axes: the mesh axes that do shard the dimension.
    used_axes: the mesh axes that shard any dimension of the array.

  Returns:
    The words, with a space before them, for the first reason that holds; '' if
    the dimension is sharded over all of these axes.
  """
  missing = [name for name in rule_axes if name not in mesh_axes]
  # A mesh axis can shard only one dimension of an array.
  elsewhere = [name for name in missing if name in used_axes]
  if elsewhere:
    return f' ({elsewhere[0]} shards another dimension)'
  if missing:
    return f' (not over {" x ".join(missing)}, which does not divide it)'
  return ''


def describe_parameters(run: runs.Run) -> list[dict]:
  """Describes the sharding of each parameter of the model.

  Args:
    run: the run, on the mesh.

  Returns:
    A dict of `describe_array` for each parameter.
  """
  # Flax wraps each parameter in a box that has `names`, its logical axes. The
  # tree of parameters is cut at these boxes, and not at the arrays in them.
  leaves, _ = jax.tree_util.tree_flatten_with_path(
      abstract_params(run.module), is_leaf=lambda x: hasattr(x, 'names'))
  descriptions = []
  for path, box in leaves:
    name = paths.path_to_string(path)
    descriptions.append(
        describe_array(run, name=name, x=box.value, axes=box.names))
  return descriptions


def describe_activations(run: runs.Run) -> list[dict]:
  """Describes the sharding of each activation that the forward pass constrains.

  Args:
    run: the run, on the mesh.

  Returns:
    A dict of `describe_array` for each activation, in the order of the forward
    pass. Equal layers share one.
  """
  objective = objectives.find_objective(run.config)

  # Make a batch of shapes without values, because nothing is computed.
  batch = {}
  for key, (shape, dtype) in objectives.shapes_of_batch(run.config).items():
    batch[key] = jax.ShapeDtypeStruct(shape, dtype)

  def compute_loss(params, batch):
    """Returns the loss of a batch, as in training (with dropout)."""
    rngs = {name: jax.random.key(0) for name in RANDOM_STREAMS}
    output = objective.apply(
        run.module, params, batch, deterministic=False, rngs=rngs)
    loss, _ = objective.loss(output, batch, run.config)
    return loss

  # Trace the loss. In the traced program (a jaxpr), each constraint on the
  # sharding of an activation is an operation of its own.
  with run.context():
    jaxpr = jax.make_jaxpr(compute_loss)(run.abstract_state.params, batch)

  # Describe the constraints. The description itself is the key, so that those
  # of equal layers are kept once.
  descriptions = {}
  for name, activation, axes in _find_constraints(jaxpr.jaxpr, ''):
    description = describe_array(run, name=name, x=activation, axes=axes)
    descriptions[json.dumps(description)] = description
  return list(descriptions.values())


def _find_constraints(jaxpr: Any, names_above: str
                      ) -> Iterator[tuple[str, Any, list[str | None]]]:
  """Finds the constraints on the sharding of activations in a traced program,
  which is a list of operations (equations, in jax's words).

  The model constrains an activation within jax.named_scope of a text such as
  SCOPE(batch,None,embed), which lists the logical axis of each dimension. An
  operation keeps the names of the scopes and modules that it is in, as in
  'layers/attention/SCOPE(batch,None,embed)', and the axes are read from there.

  Args:
    jaxpr: the traced program, or a program inside of one of its operations.
    names_above: the names of the scopes that the program is in; '' at first.

  Yields:
    For each constraint: the path of its module, the array's shape and dtype,
    and the logical axis of each dimension (None: it is never sharded).
  """
  scope = re.compile(rf'{sharding.SCOPE_OF_CONSTRAINT}\(([^()]*)\)')
  for eqn in jaxpr.eqns:
    name = f'{names_above}/{eqn.source_info.name_stack}'
    named_axes = scope.search(name)
    if eqn.primitive.name == 'sharding_constraint' and named_axes:
      axes: list[str | None] = []
      for axis in named_axes[1].split(','):
        if axis:
          axes.append(None if axis == 'None' else axis)
      path_of_module = _path_of_module(scope.sub('', name))
      array = eqn.invars[0].aval
      yield path_of_module, array, axes
    # A scan, a checkpoint or a jit is one operation with a program inside.
    for inner_program in jex.jaxprs_in_params(eqn.params):
      yield from _find_constraints(inner_program, name)


def _path_of_module(stack: str) -> str:
  """Returns the path of a module, such as layers/attention.

  Args:
    stack: JAX's stack of names inside of it, with slashes between them. It also
      has names that JAX and Flax add, such as jit(...), and methods after the
      names of modules, as in attention.project.

  Returns:
    The names of the modules, each once; 'loss' outside of all modules.
  """
  names = []
  for name in stack.split('/'):
    if name and not _ADDED_NAMES.match(name):
      names.append(name.split('.')[0])
  return '/'.join(dict.fromkeys(names)) or 'loss'


def explain_sharding(config: Any, mesh: dict[str, int]) -> dict:
  """Describes how every parameter and activation of a run is sharded on a mesh,
  and which collectives (communication between devices) follow.

  Args:
    config: the config of the run, checked.
    mesh: the number of devices of each mesh axis.

  Returns:
    A dict for JSON:
    model, mesh, rules: the architecture, the mesh, and the name of its table of
      sharding rules.
    parameters, activations: a dict of `describe_array` for each.
    collectives: the collectives of a training step, summed by kind.
  """
  model, _ = runs.resolve_model(config, tokenizers.load(config.data.tokenizer))
  num_devices = math.prod(mesh.values())
  device_mesh = devices.make_mesh(mesh, jax.devices()[:num_devices])
  run = runs.build(config, model, device_mesh)

  # Predict the collectives. All devices are taken to be on host 0, so that no
  # bytes count as sent between hosts.
  host_of_device = np.zeros(num_devices, int)
  predicted = predict.predict_collectives(run, host_of_device)
  return dict(
      model=model.arch, mesh=dict(mesh), rules=config.mesh.rules,
      parameters=describe_parameters(run),
      activations=describe_activations(run),
      collectives=collectives.sum_by_kind(predicted))


def format_report(report: dict) -> str:
  """Returns the sharding of a run as text for a terminal.

  Args:
    report: the result of `explain_sharding`.
  """
  nbytes = sum(array['bytes_per_device'] for array in report['parameters'])
  mesh = ' '.join(f'{axis}={size}' for axis, size in report['mesh'].items())
  lines = [f'{report["model"]}, mesh {mesh}, rules {report["rules"]!r}: '
           f'{nbytes / 2**20:,.1f} MiB of parameters a device']
  for kind in ('parameters', 'activations'):
    lines += ['', kind]
    for array in report[kind]:
      dimensions = ', '.join(array['dimensions'])
      mebibytes = array['bytes_per_device'] / 2**20
      lines.append(f'  {array["name"]}  [{dimensions}]  '
                   f'{mebibytes:,.3f} MiB a device')
  lines += ['', 'collectives of a training step, by an estimate '
            '(python -m tools.plan compiles it)']
  lines += plans.table_of_collectives(report['collectives'], mark='')
  return '\n'.join(lines)


def main() -> int:
  """Explains the sharding of the run and the mesh that the flags name."""
  cli.define_config()
  flags.DEFINE_string('mesh', '', 'fsdp=8,expert=8 (others: 1), or a preset of '
                      "configs/sharding.py; '': config.mesh, where -1 is 1.")
  flags.DEFINE_bool('json', False, 'Print JSON.')
  cli.parse(__doc__)
  args = flags.FLAGS
  require(args.config is not None, 'pass --config FILE.py:SIZE')

  # The mesh of the config has -1 for an axis that takes all other devices,
  # which counts as 1 here.
  mesh = {axis: abs(args.config.mesh[axis]) for axis in tables.MESH_AXES}
  if args.mesh:
    mesh = devices.parse_mesh(args.mesh, 0)
  num_devices = math.prod(mesh.values())
  require(num_devices <= MAX_DEVICES,
          f'a mesh of {num_devices:,} devices is asked for: choose '
          f'one of {MAX_DEVICES:,} at most, as each becomes a virtual '
          'CPU device')

  # Make as many virtual CPU devices as the mesh has.
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', num_devices)
  preflight.check_config(args.config, cli.overridden_fields())
  report = explain_sharding(args.config, mesh)
  if args.json:
    print(json.dumps(report, indent=2))
  else:
    print(format_report(report))
  return 0


if __name__ == '__main__':
  cli.run(main)
