"""The programs of a run, compiled for devices that are not there, and the
report of each: a dict that JSON can hold."""

from collections.abc import Callable
import importlib.metadata
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from architectures.parts import paths
from common.errors import RequestError, one_of, require
from tools.plan import chips, collectives, predict
from training import generate, objectives, progress, runs
from training.costs import flops, memory, totals
from training.data import tokenizers
from training.distributed import devices
from training.runs import make_train_step

GIB = chips.GIB
DRAWN = {'prefill': 1, 'decode': 64}  # tokens that are added to each prompt
# Of the parameters that stand whole along fsdp, those that a plan names: so
# many of the largest, from so many bytes on.
LARGEST, SMALL = 5, 2 ** 20


class Program(NamedTuple):
  """Something a run does, as jax.jit would be given it.

  Attributes:
    name: train, prefill or decode.
    function: to be jitted.
    args: of it, as shapes with shardings.
    options: of jax.jit.
    passes: of a loop in it whose end depends on data; None: there is none.
      Generation ends early where all rows have drawn a stop token: here none
      do.
  """
  name: str
  function: Callable
  args: tuple
  options: dict
  passes: int | None = None


class DoesNotFit(RequestError):
  """Says by how much a program is too large for a device."""


def run_on(config, topology: chips.Topology, mesh: str) -> runs.Run:
  """Returns the run on the topology's devices; nothing is computed.

  Args:
    config: of the run, checked; its mesh is replaced by `mesh`, where that is
      given.
    topology: whose devices.
    mesh: as devices.parse_mesh reads it; '': config.mesh.

  Raises:
    ValueError: for anything that the run could not honour.
  """
  shape = (devices.parse_mesh(mesh, topology.devices) if mesh else
           devices.mesh_shape(config.mesh, topology.devices))
  model, _ = runs.resolve(config, tokenizers.load(config.data.tokenizer))
  predict.peak_flops(topology, model.dtype)  # or there is no bound to print
  require(config.mesh.slices in (0, topology.slices), 'mesh.slices is '
          f'{config.mesh.slices}, but --slices is {topology.slices}: leave '
          'the first at 0')
  return runs.build(config, model, devices.make_mesh(
      shape, chips.devices(topology), topology.slices))


def plan(run: runs.Run, topology: chips.Topology, names: list[str]) -> dict:
  """Returns what the plan is of, the reports of the programs that fit, whether
  all do, and why not.

  Raises:
    RequestError: for a program that the run's model does not have, before any
      is compiled.
  """
  for name in names:
    check(run, topology, name)
  c, config = run.model, run.config
  compiler = chips.compiler(topology)
  rows = devices.shards('batch', run.mesh.shape, config.mesh.rules)
  parameters, active = totals.parameters(c)
  reports, reasons = [], []
  for name in names:
    try:
      reports.append(analyse(run, topology, name))
    except DoesNotFit as error:
      reasons.append(str(error))
  return dict(
      model=c.arch, parameters=parameters, active_parameters=active,
      topology=topology.name, slices=topology.slices,
      chips=topology.chips, devices=topology.devices,
      mesh=dict(run.mesh.shape), rules=config.mesh.rules,
      compiler=compiler, estimate=not compiler,
      jax=importlib.metadata.version('jax'), batch_size=config.data.batch_size,
      length=config.data.length, sequences_per_device=(
          config.data.batch_size / rows / config.train.grad_accumulation),
      grad_accumulation=config.train.grad_accumulation, remat=c.remat,
      keep_gathered=c.keep_gathered, optimizer=config.optim.name,
      whole_along_fsdp=whole_along_fsdp(run),
      programs=reports, fits=not reasons,
      reasons=list(dict.fromkeys(reasons)))


def whole_along_fsdp(run: runs.Run) -> list[dict]:
  """Returns the largest parameters that stand whole along fsdp, each with its
  bytes on a device: the optimiser's state of them is repeated, too."""
  if run.mesh.shape['fsdp'] == 1:
    return []
  rows = []
  for name, x in paths.flatten(run.abstract.params).items():
    axes: set[str] = set()
    for entry in x.sharding.spec:
      axes.update((entry,) if isinstance(entry, str) else entry or ())
    size = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    if 'fsdp' not in axes and size >= SMALL:
      rows.append(dict(name=name, bytes_per_device=size))
  rows.sort(key=lambda row: -row['bytes_per_device'])
  return rows[:LARGEST]


def check(run: runs.Run, topology: chips.Topology, name: str) -> None:
  """Raises RequestError for a program that cannot be planned."""
  one_of('program in --programs', name, ('train', *DRAWN))
  if name == 'train':
    return
  objective, length = objectives.of(run.config), run.config.data.length
  require(chips.compiler(topology), f'--programs has {name!r}, of which there '
          f'is no estimate, and no compiler for {topology.name} is installed: '
          "pip install 'archetype[plan]', or [plan-gpu]")
  require(objective.writes and 'decoder' in objective.stacks,
          f'--programs has {name!r}, but a plan of generation is for decoders, '
          f'and model.arch is {run.model.arch!r}: choose train')
  require(length > DRAWN[name], f'data.length is {length}: {name} needs more '
          f'than {DRAWN[name]}')


def program(run: runs.Run, name: str) -> Program:
  """Returns the training step, as training/loop.py compiles it, or a generation
  of so many tokens more after prompts that, with them, are data.length long."""
  if name == 'train':
    batch = {key: jax.ShapeDtypeStruct(shape, dtype, sharding=run.place)
             for key, (shape, dtype) in objectives.shapes(run.config).items()}
    return Program(
        name, make_train_step(run.module, run.tx, run.config),
        (run.abstract, batch),
        dict(donate_argnums=0, out_shardings=(run.shardings, None)))
  data, tokens = run.config.data, DRAWN[name]
  whole = NamedSharding(run.mesh, PartitionSpec())
  shape = lambda size, place: jax.ShapeDtypeStruct(
      size, jnp.int32, sharding=place)
  prefix = objectives.of(run.config).prefix

  def function(params, prompts_BL, lengths_B, seed):
    return generate.generate(run.module, params, prompts_BL, lengths_B,
                             jax.random.key(seed), max_new_tokens=tokens,
                             prefix_B=lengths_B if prefix else None)

  args = (run.abstract.params,
          shape((data.batch_size, data.length - tokens), run.place),
          shape((data.batch_size,), run.place), shape((), whole))
  return Program(name, function, args, {}, tokens - 1)


def lower(run: runs.Run, what: Program):
  """Returns what jax traces of a program: its jaxpr, and .lower()."""
  with run.context():
    return jax.jit(what.function, **what.options).trace(*what.args)


def build(run: runs.Run, what: Program, traced: Any, hbm: float):
  """Returns the compiled program.

  Raises:
    DoesNotFit: with the compiler's figures, or with ours where it lets a
      program pass that the device has no room for (GPUs).
    RequestError: where a kernel needs more on-chip memory than there is.
  """
  try:
    with run.context(), progress.during(f'compiling {what.name}'):
      executable = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    reason = str(error).split('RESOURCE_EXHAUSTED: ')[-1].splitlines()[0]
    if 'hbm' not in reason.lower():  # as VMEM, which no sharding relieves
      raise RequestError(
          f'{what.name} cannot be compiled: a kernel takes more on-chip memory '
          f'than there is: {reason}') from error
    raise DoesNotFit(f'{what.name} does not fit a device: {reason}') from error
  _check_peak(what.name, peak_bytes(executable.memory_analysis()), hbm)
  return executable


def _check_peak(name: str, peak: float, hbm: float, by: str = '') -> None:
  if peak > hbm:
    raise DoesNotFit(
        f'{name} does not fit a device{by}: it needs {peak / GIB:.2f} GiB at '
        f'its peak, and a device has {hbm / GIB:.2f} GiB')


def peak_bytes(stats: Any) -> int:
  """Returns the most that a compiled program holds of a device's memory.

  libtpu 0.0.50.1 counts what lies in the host's memory into its figure of the
  peak. So it is no more than the device's temporaries and what goes in and out
  of the program, which is what this returns where the host holds something.
  """
  if not stats.host_temp_size_in_bytes:
    return stats.peak_memory_in_bytes
  return (stats.argument_size_in_bytes + stats.temp_size_in_bytes
          + stats.output_size_in_bytes - stats.alias_size_in_bytes)


def analyse(run: runs.Run, topology: chips.Topology, name: str) -> dict:
  """Returns the report of one program.

  Args:
    run: on the topology's devices.
    topology: these.
    name: of the program.

  Raises:
    DoesNotFit: with figures, where a device has too little memory.
  """
  hbm, state = topology.chip.hbm, memory.state(run)
  if name != 'train':  # a generation has no optimiser
    state = {'parameters': state['parameters']}
  if sum(state.values()) > hbm:
    parts = ', '.join(f'{part} {n / GIB:,.1f} GiB' for part, n in state.items())
    raise DoesNotFit(
        f'the state does not fit a device of {topology.name}: {parts}, and a '
        f'device has {hbm / GIB:,.2f} GiB. Shard it over more devices '
        '(mesh.fsdp, mesh.expert, mesh.tensor), or take more of them')
  what, begun = program(run, name), time.monotonic()
  traced = lower(run, what)
  if chips.compiler(topology):
    executable = build(run, what, traced, hbm)
    stats = executable.memory_analysis()
    sizes = state | dict(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes, peak=peak_bytes(stats))
    if stats.host_temp_size_in_bytes:
      sizes['host_memory'] = stats.host_temp_size_in_bytes
    sent = collectives.read(
        executable.as_text(), run.mesh.shape, host_of=hosts(run, topology),
        ragged_rows=ragged_rows(run, name), passes=what.passes)
  else:
    sizes = memory.analytic(run, platform=topology.chip.platform)
    _check_peak(name, sizes['peak'], hbm, ', by an estimate')
    sent = predict.sent(run, hosts(run, topology))
  count = topology.devices
  work = _work(run, topology, what, traced.jaxpr)
  needed = model_flops(run, name)
  inside, outside = collectives.total(sent)
  return dict(
      program=name, estimate=not chips.compiler(topology), fits=True,
      compile_seconds=round(time.monotonic() - begun, 1),
      memory=dict(hbm=int(hbm), **sizes), collectives=collectives.table(sent),
      flops=dict(
          per_device=work.flops / count,
          model_per_device=sum(needed.values()) / count,
          weights_per_device=needed['weights'] / count,
          attention_per_device=needed['attention'] / count,
          ratio=work.flops / sum(needed.values()),
          loops_counted_once=work.loops,
          all_groups_per_device=work.dense / count),
      roofline=predict.times(
          topology, run.model.dtype, flops=work.flops / count,
          hbm_bytes=predict.hbm_bytes(run, work.nbytes, name == 'train'),
          sent=inside, sent_outside=outside,
          model_flops=sum(needed.values()) / count))


def _work(run: runs.Run, topology: chips.Topology, what: Program, jaxpr: Any
          ) -> flops.Work:
  """Returns the work of a program, experts in even load."""
  data, rows = run.config.data, ragged_rows(run, what.name)
  if what.name == 'decode':  # reads the prompt, then a token of each row
    rows = predict.expert_rows(run, data.batch_size * (
        data.length - DRAWN['decode']))
  return flops.count(jaxpr, flops.Place(
      topology.chip.platform, rows, what.passes, chips.dense(topology),
      loop_rows=predict.expert_rows(run, data.batch_size)))


def model_flops(run: runs.Run, name: str) -> dict[str, float]:
  """Returns what the model needs for a step, of all devices: `weights`, which
  is 6 N_active T in training, N_active the weights that a token is multiplied
  with, less the gradients of what is frozen, and `attention`, as the mask has
  it."""
  config, c = run.config, run.model
  objective, rows = objectives.of(config), config.data.batch_size
  sides = objective.row_lengths(config)
  if name == 'train':
    return {part: rows * n
            for part, n in flops.of_a_row(config, c).items()}
  # The prompt and, one at a time, all tokens after it but the last, which is
  # not read: in the sum, a forward pass over them.
  needed = flops.forward_flops(c, sides[0] - 1)
  prompt = sides[0] - DRAWN[name]
  if objective.prefix:  # and in the prompt, later tokens are seen too
    both, one = (flops.forward_flops(c, prompt, prompt=way)['attention']
                 for way in (True, False))
    needed['attention'] += both - one
  # The head reads those that a token is drawn after.
  needed['weights'] -= (prompt - 1) * 2 * c.d_model * c.vocab_size
  return {part: rows * n for part, n in needed.items()}


def ragged_rows(run: runs.Run, name: str) -> int:
  """Rows that a device sends to experts in a layer, in even load."""
  if name == 'decode':
    return 0
  parts = run.config.train.grad_accumulation if name == 'train' else 1
  lengths = objectives.of(run.config).row_lengths(run.config)
  return predict.expert_rows(
      run, run.config.data.batch_size * max(lengths) / parts)


def hosts(run: runs.Run, topology: chips.Topology) -> np.ndarray:
  """Returns the slice (TPU) or host (GPU) of each device, in mesh order."""
  placed = run.mesh.devices.reshape(-1)
  if topology.slices > 1:  # `data` goes over the slices, and comes first
    return np.arange(placed.size, dtype=np.int64) // topology.together
  order = {id_: i for i, id_ in enumerate(sorted(d.id for d in placed))}
  return np.array([order[d.id] // topology.together for d in placed], np.int64)
