"""The programs of a run, compiled for devices that are not there, and the
report of each: a dict that JSON can hold."""

from collections.abc import Callable, Iterator
import contextlib
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
# How many tokens a program of generation adds to each prompt.
NEW_TOKENS_OF_PROGRAM = {'prefill': 1, 'decode': 64}
# A plan names so many of the largest parameters that stand whole along fsdp, if
# they have so many bytes at least.
MOST_PARAMETERS_NAMED, LEAST_BYTES_NAMED = 5, 2 ** 20


class Program(NamedTuple):
  """Something a run does, as jax.jit would be given it.

  Attributes:
    name: train, prefill or decode.
    function: the function to be jitted.
    args: its arguments, as shapes with shardings.
    options: the options of jax.jit.
    passes: the passes of a loop in it whose end depends on data; None: there
      is none. Generation ends early where all rows have drawn a stop token:
      here none do.
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
    config: the config of the run, checked; its mesh is replaced by `mesh`,
      where that is given.
    topology: the devices.
    mesh: a mesh as devices.parse_mesh reads it; '': config.mesh.

  Raises:
    ValueError: for anything that the run could not honour.
  """
  if mesh:
    shape = devices.parse_mesh(mesh, topology.devices)
  else:
    shape = devices.resolve_mesh_shape(config.mesh, topology.devices)
  model, _ = runs.resolve_model(config, tokenizers.load(config.data.tokenizer))
  # Without a published peak, there is no bound to print.
  predict.require_peak_flops(topology, model.dtype)
  require(config.mesh.slices in (0, topology.slices), 'mesh.slices is '
          f'{config.mesh.slices}, but --slices is {topology.slices}: leave '
          'the first at 0')
  described = chips.described_devices(topology)
  mesh_of_devices = devices.make_mesh(shape, described, topology.slices)
  return runs.build(config, model, mesh_of_devices)


def make_plan(run: runs.Run, topology: chips.Topology, names: list[str]
              ) -> dict:
  """Compiles programs of a run for devices that are not there, and returns the
  plan: the model, its devices and settings, the report of each program that
  fits, whether all do, and why not.

  Args:
    run: the run, on the topology's devices.
    topology: the devices.
    names: the programs: any of train, prefill and decode.

  Raises:
    RequestError: for a program that the run's model does not have, before any
      is compiled.
  """
  for name in names:
    check_program(run, topology, name)

  # The programs.
  reports, reasons = [], []
  for name in names:
    try:
      reports.append(analyse_program(run, topology, name))
    except DoesNotFit as error:
      reasons.append(str(error))

  # The model, its devices and its settings.
  model, config = run.model, run.config
  accumulation = config.train.grad_accumulation
  parameters, active = totals.count_parameters(model)
  shards = devices.num_shards('batch', run.mesh.shape, config.mesh.rules)
  compiler = chips.installed_compiler(topology)
  return dict(
      model=model.arch, parameters=parameters, active_parameters=active,
      topology=topology.name, slices=topology.slices,
      chips=topology.chips, devices=topology.devices,
      mesh=dict(run.mesh.shape), rules=config.mesh.rules,
      compiler=compiler, estimate=not compiler,
      jax=importlib.metadata.version('jax'),
      batch_size=config.data.batch_size, length=config.data.length,
      sequences_per_device=config.data.batch_size / shards / accumulation,
      grad_accumulation=accumulation, remat=model.remat,
      keep_gathered=model.keep_gathered, optimizer=config.optim.name,
      whole_along_fsdp=whole_along_fsdp(run),
      programs=reports, fits=not reasons,
      reasons=list(dict.fromkeys(reasons)))


def whole_along_fsdp(run: runs.Run) -> list[dict]:
  """Returns the largest parameters that stand whole along fsdp, each with its
  bytes on a device: the optimiser's state of them is repeated, too."""
  if run.mesh.shape['fsdp'] == 1:
    return []
  rows = []
  for name, x in paths.flatten_by_path(run.abstract_state.params).items():
    nbytes = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    is_whole = 'fsdp' not in memory.sharded_axes(x.sharding)
    if is_whole and nbytes >= LEAST_BYTES_NAMED:
      rows.append(dict(name=name, bytes_per_device=nbytes))
  rows.sort(key=lambda row: -row['bytes_per_device'])
  return rows[:MOST_PARAMETERS_NAMED]


def check_program(run: runs.Run, topology: chips.Topology, name: str) -> None:
  """Raises RequestError for a program that cannot be planned.

  Args:
    run: the run, on the topology's devices.
    topology: the devices.
    name: the program.
  """
  one_of('program in --programs', name, ('train', *NEW_TOKENS_OF_PROGRAM))
  if name == 'train':
    return

  # A program of generation needs a compiler, a decoder, and rows that are
  # longer than what it writes.
  objective = objectives.find_objective(
      run.config)
  length = run.config.data.length
  require(chips.installed_compiler(topology), f'--programs has {name!r}, of '
          'which there is no estimate, and no compiler for '
          f"{topology.name} is installed: pip install 'archetype[plan]', or "
          '[plan-gpu]')
  require(objective.writes and 'decoder' in objective.stacks,
          f'--programs has {name!r}, but a plan of generation is for decoders, '
          f'and model.arch is {run.model.arch!r}: choose train')
  new_tokens = NEW_TOKENS_OF_PROGRAM[name]
  require(length > new_tokens, f'data.length is {length}: {name} needs more '
          f'than {new_tokens}')


def make_program(run: runs.Run, name: str) -> Program:
  """Returns a program of a run: a function, and the shapes of its arguments.

  `train` is the training step, as training/loop.py compiles it. `prefill` and
  `decode` write NEW_TOKENS_OF_PROGRAM[name] tokens after prompts that, with
  these, are data.length tokens long.

  Args:
    run: the run, on the topology's devices.
    name: train, prefill or decode.
  """
  if name == 'train':
    return _training_step(run)
  data = run.config.data
  new_tokens = NEW_TOKENS_OF_PROGRAM[name]
  prompts_are_prefixes = objectives.find_objective(run.config).prefix

  def write_text(params, prompts_BL, lengths_B, seed):
    prefix_B = lengths_B if prompts_are_prefixes else None
    return generate.generate(
        run.module, params, prompts_BL, lengths_B, jax.random.key(seed),
        max_new_tokens=new_tokens, prefix_B=prefix_B)

  def integers(shape, sharding):
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

  # The rows of prompts are split over devices; the seed is everywhere.
  prompt_shape = data.batch_size, data.length - new_tokens
  prompts_BL = integers(prompt_shape, run.batch_sharding)
  lengths_B = integers((data.batch_size,), run.batch_sharding)
  seed = integers((), NamedSharding(run.mesh, PartitionSpec()))
  return Program(
      name=name, function=write_text,
      args=(run.abstract_state.params, prompts_BL, lengths_B, seed), options={},
      passes=new_tokens - 1)


def _training_step(run: runs.Run) -> Program:
  """Returns the training step of a run: a function of its state and a batch."""
  batch = {}
  for key, (shape, dtype) in objectives.shapes_of_batch(run.config).items():
    batch[key] = jax.ShapeDtypeStruct(shape, dtype, sharding=run.batch_sharding)
  return Program(
      name='train', function=make_train_step(run.module, run.tx, run.config),
      args=(run.abstract_state, batch),
      options=dict(donate_argnums=0, out_shardings=(run.shardings, None)))


def trace_program(run: runs.Run, what: Program):
  """Returns a program as jax traces it: its jaxpr, and .lower()."""
  with run.context():
    return jax.jit(what.function, **what.options).trace(*what.args)


def compile_program(run: runs.Run, what: Program, traced: Any, hbm: float):
  """Returns the compiled program.

  Args:
    run: the run, on the topology's devices.
    what: the program.
    traced: the program, as `lower` returns it.
    hbm: the bytes that a program may use of a device.

  Raises:
    DoesNotFit: with the compiler's figures, or with ours where it lets a
      program pass that the device has no room for (GPUs).
    RequestError: where a kernel needs more on-chip memory than there is.
  """
  with run.context(), _as_does_not_fit(what.name), progress.show_task(
      f'compiling {what.name}'):
    executable = traced.lower().compile()
  _check_peak(what.name, peak_bytes(executable.memory_analysis()), hbm)
  return executable


@contextlib.contextmanager
def _as_does_not_fit(name: str) -> Iterator[None]:
  """Says in a sentence that the compiler finds too little memory."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    reason = str(error).split('RESOURCE_EXHAUSTED: ')[-1].splitlines()[0]
    if 'hbm' not in reason.lower():  # as VMEM, which no sharding relieves
      raise RequestError(
          f'{name} cannot be compiled: a kernel takes more on-chip memory '
          f'than there is: {reason}') from error
    raise DoesNotFit(f'{name} does not fit a device: {reason}') from error


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


def analyse_program(run: runs.Run, topology: chips.Topology, name: str) -> dict:
  """Compiles one program of a run, and returns the report: its memory, its
  collectives, its FLOPs, and the shortest time that a step can take.

  Args:
    run: the run, on the topology's devices.
    topology: the devices.
    name: the program: train, prefill or decode.

  Raises:
    DoesNotFit: with figures, where a device has too little memory.
  """
  hbm = topology.chip.hbm
  state = _state_bytes(run, topology, name)
  what = make_program(run, name)
  begun = time.monotonic()
  traced = trace_program(run, what)

  # Memory and collectives, by the compiler or by an estimate.
  if chips.installed_compiler(topology):
    executable = compile_program(run, what=what, traced=traced, hbm=hbm)
    sizes = state | _memory_of_program(executable.memory_analysis())
    sent = collectives.read_collectives(
        executable.as_text(), mesh=run.mesh.shape,
        host_of=host_of_devices(run, topology),
        ragged_rows=ragged_rows(run, name), passes=what.passes)
  else:
    sizes = memory.estimate_peak_bytes(run, platform=topology.chip.platform)
    _check_peak(name, peak=sizes['peak'], hbm=hbm, by=', by an estimate')
    sent = predict.predict_collectives(run, host_of_devices(run, topology))

  # The products, those that the model needs, and the bounds of a step.
  count = topology.devices
  work = _work_of_program(run, topology=topology, what=what, jaxpr=traced.jaxpr)
  needed = model_flops(run, name)
  all_needed = sum(needed.values())
  figures = dict(
      per_device=work.flops / count,
      model_per_device=all_needed / count,
      weights_per_device=needed['weights'] / count,
      attention_per_device=needed['attention'] / count,
      ratio=work.flops / all_needed,
      loops_counted_once=work.loops,
      all_groups_per_device=work.dense / count)
  inside, outside = collectives.bytes_sent(sent)
  roofline = predict.step_times(
      topology, dtype=run.model.dtype, flops=figures['per_device'],
      hbm_bytes=predict.memory_traffic(run, work.nbytes, name == 'train'),
      sent=inside, sent_outside=outside,
      model_flops=figures['model_per_device'])

  return dict(
      program=name, estimate=not chips.installed_compiler(topology), fits=True,
      compile_seconds=round(time.monotonic() - begun, 1),
      memory=dict(hbm=int(hbm), **sizes),
      collectives=collectives.sum_by_kind(sent),
      flops=figures, roofline=roofline)


def _state_bytes(run: runs.Run, topology: chips.Topology, name: str
                 ) -> dict[str, int]:
  """Returns the bytes of a run's state on a device, as a program needs it: in
  training with the optimiser's state, in generation the parameters alone.

  Raises:
    DoesNotFit: where these alone are more than the device has.
  """
  hbm = topology.chip.hbm
  state = memory.state_bytes(run)
  if name != 'train':
    state = {'parameters': state['parameters']}
  if sum(state.values()) > hbm:
    parts = ', '.join(f'{part} {n / GIB:,.1f} GiB' for part, n in state.items())
    raise DoesNotFit(
        f'the state does not fit a device of {topology.name}: {parts}, and a '
        f'device has {hbm / GIB:,.2f} GiB. Shard it over more devices '
        '(mesh.fsdp, mesh.expert, mesh.tensor), or take more of them')
  return state


def _memory_of_program(stats: Any) -> dict[str, int]:
  """Returns the bytes of a compiled program on a device."""
  sizes = dict(
      arguments=stats.argument_size_in_bytes,
      temporaries=stats.temp_size_in_bytes, peak=peak_bytes(stats))
  if stats.host_temp_size_in_bytes:
    sizes['host_memory'] = stats.host_temp_size_in_bytes
  return sizes


def _work_of_program(run: runs.Run, topology: chips.Topology, what: Program,
                     jaxpr: Any) -> flops.Work:
  """Returns the FLOPs and bytes of a program where tokens come to experts in
  even load.

  Args:
    run: the run, on the topology's devices.
    topology: the devices.
    what: the program.
    jaxpr: the program, as jax traced it.
  """
  data = run.config.data
  rows = ragged_rows(run, what.name)
  # Decoding reads the whole prompt first, then a token of each row.
  if what.name == 'decode':
    prompt = data.length - NEW_TOKENS_OF_PROGRAM['decode']
    rows = predict.rows_of_experts(run, data.batch_size * prompt)
  place = flops.Place(
      platform=topology.chip.platform, rows=rows, passes=what.passes,
      dense=chips.products_of_all_groups(topology),
      loop_rows=predict.rows_of_experts(run, data.batch_size))
  return flops.count_work(jaxpr, place)


def model_flops(run: runs.Run, name: str) -> dict[str, float]:
  """Returns the FLOPs that the model needs for a step, on all devices.

  Args:
    run: the run.
    name: the program: train, prefill or decode.

  Returns:
    `weights`: in training 6 N_active T, with N_active the weights that a token
      is multiplied with and T the tokens, less the gradients of what is frozen.
    `attention`: the products of attention that its mask leaves.
  """
  config = run.config
  model = run.model
  num_rows = config.data.batch_size
  if name == 'train':
    flops_of_row = flops.training_flops_of_row(config, model)
    return {part: num_rows * n for part, n in flops_of_row.items()}

  # A generation reads the prompt and, one at a time, all tokens after it but
  # the last: in the sum, a forward pass over them.
  objective = objectives.find_objective(config)
  length = objective.row_lengths(config)[0]
  needed = flops.forward_flops(model, length - 1)
  prompt = length - NEW_TOKENS_OF_PROGRAM[name]
  if objective.prefix:  # and in the prompt, later tokens are seen too
    both_ways = flops.forward_flops(model, prompt, prompt=True)
    causal = flops.forward_flops(model, prompt, prompt=False)
    needed['attention'] += both_ways['attention'] - causal['attention']

  # The head reads only the tokens after which one is drawn: of the prompt, the
  # last.
  needed['weights'] -= (prompt - 1) * 2 * model.d_model * model.vocab_size
  return {part: num_rows * n for part, n in needed.items()}


def ragged_rows(run: runs.Run, name: str) -> int:
  """Returns the rows that a device sends to experts in a layer, in even
  load."""
  if name == 'decode':
    return 0
  parts = 1
  if name == 'train':
    parts = run.config.train.grad_accumulation
  lengths = objectives.find_objective(run.config).row_lengths(run.config)
  tokens = run.config.data.batch_size * max(lengths)
  return predict.rows_of_experts(run, tokens / parts)


def host_of_devices(run: runs.Run, topology: chips.Topology) -> np.ndarray:
  """Returns the slice (TPU) or host (GPU) of each device, in mesh order."""
  placed = run.mesh.devices.reshape(-1)
  if topology.slices > 1:  # `data` goes over the slices, and comes first
    return np.arange(placed.size, dtype=np.int64) // topology.together
  ids = np.array([device.id for device in placed], np.int64)
  places = np.searchsorted(np.sort(ids), ids)
  return places // topology.together
