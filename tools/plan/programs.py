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
from common.errors import RequestError, check_choice, require
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
  """A function of a run that is to be compiled, with what jax.jit needs.

  Attributes:
    name: train, prefill or decode.
    function: the function to be jitted.
    args: its arguments, as shapes with shardings.
    options: the options of jax.jit.
    passes: the number of passes of a loop in it whose end depends on data;
      None: there is no such loop. Generation ends early when all rows have
      drawn a stop token: here none do.
  """
  name: str
  function: Callable
  args: tuple
  options: dict
  passes: int | None = None


class DoesNotFit(RequestError):
  """A program needs more memory than a device has. The message has figures."""


def run_on_topology(config, topology: chips.Topology, mesh: str) -> runs.Run:
  """Builds a run on the devices of a topology. Nothing is computed, because
  these devices are only described.

  Args:
    config: the config of the run, checked.
    topology: the devices.
    mesh: the mesh to use, as devices.parse_mesh reads it; '': config.mesh.

  Raises:
    ValueError: for anything in the config that the run could not honour.
  """
  # Resolve the mesh and the model.
  if mesh:
    shape = devices.parse_mesh(mesh, topology.devices)
  else:
    shape = devices.resolve_mesh_shape(config.mesh, topology.devices)
  model, _ = runs.resolve_model(config, tokenizers.load(config.data.tokenizer))

  # Refuse what cannot be planned: without a published peak, there is no bound.
  predict.require_peak_flops(topology, model.dtype)
  require(config.mesh.slices in (0, topology.slices), 'mesh.slices is '
          f'{config.mesh.slices}, but --slices is {topology.slices}: leave '
          'the first at 0')

  # Lay the described devices out as the mesh.
  described = chips.described_devices(topology)
  mesh_of_devices = devices.make_mesh(
      shape, described, slices=topology.slices)
  return runs.build(config, model, mesh_of_devices)


def make_plan(run: runs.Run, topology: chips.Topology, names: list[str]
              ) -> dict:
  """Compiles programs of a run for devices that are not there.

  Args:
    run: the run, on the topology's devices.
    topology: the devices.
    names: the names of the programs: any of train, prefill and decode.

  Returns:
    The plan, a dict for JSON with the model, its devices and settings, the
    report of each program that fits (`programs`), whether all of them fit
    (`fits`), and why the others do not (`reasons`).

  Raises:
    RequestError: for a program that the run's model does not have, before any
      is compiled.
  """
  for name in names:
    check_program(run, topology, name)

  # Compile each program. One that does not fit gives a reason and no report.
  reports, reasons = [], []
  for name in names:
    try:
      reports.append(analyse_program(run, topology, name))
    except DoesNotFit as error:
      reasons.append(str(error))

  # Gather the figures of the model, its devices and its settings.
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
      whole_along_fsdp=largest_parameters_whole_along_fsdp(run),
      programs=reports, fits=not reasons,
      reasons=list(dict.fromkeys(reasons)))


def largest_parameters_whole_along_fsdp(run: runs.Run) -> list[dict]:
  """Returns the largest parameters that the fsdp axis of the mesh does not
  shard, so that a user sees what still takes memory on every device: each holds
  such a parameter, and its optimizer state, as a whole.

  Args:
    run: the run, on the topology's devices.

  Returns:
    A row for each, the largest first, with its name and its bytes on a device.
  """
  # With one device along fsdp, there is nothing to shard over.
  if run.mesh.shape['fsdp'] == 1:
    return []
  rows = []
  parameters = paths.flatten_by_path(run.abstract_state.params)
  for path, parameter in parameters.items():
    # Other axes of the mesh may shard it, so that a device has a part.
    part_of_device = parameter.sharding.shard_shape(parameter.shape)
    nbytes = math.prod(part_of_device) * parameter.dtype.itemsize
    is_whole = 'fsdp' not in memory.sharded_axes(parameter.sharding)
    if is_whole and nbytes >= LEAST_BYTES_NAMED:
      rows.append(dict(name=path, bytes_per_device=nbytes))
  rows.sort(key=lambda row: -row['bytes_per_device'])
  return rows[:MOST_PARAMETERS_NAMED]


def check_program(run: runs.Run, topology: chips.Topology, name: str) -> None:
  """Raises RequestError for a program that cannot be planned.

  Args:
    run: the run, on the topology's devices.
    topology: the devices.
    name: the name of the program.
  """
  check_choice('program in --programs', name, ('train', *NEW_TOKENS_OF_PROGRAM))
  if name == 'train':
    return

  # A program of generation needs a compiler, a decoder, and rows that are
  # longer than what it writes.
  objective = objectives.find_objective(run.config)
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
  `decode` generate NEW_TOKENS_OF_PROGRAM[name] tokens after prompts. Prompts
  and new tokens together are data.length tokens long.

  Args:
    run: the run, on the topology's devices.
    name: train, prefill or decode.
  """
  if name == 'train':
    return _training_step(run)

  # Define the function that generates text.
  data = run.config.data
  new_tokens = NEW_TOKENS_OF_PROGRAM[name]
  prompts_are_prefixes = objectives.find_objective(run.config).prefix

  def write_text(params, prompts_BL, lengths_B, seed):
    """Writes new tokens after each prompt; returns them, int32 [B, new]."""
    prefix_B = None
    if prompts_are_prefixes:
      prefix_B = lengths_B
    return generate.generate(
        run.module, params, prompts_BL, lengths_B, jax.random.key(seed),
        max_new_tokens=new_tokens, prefix_B=prefix_B)

  def integers(shape, sharding):
    """Returns the description of an array of integers."""
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

  # Describe its arguments by shapes, without values. The rows of prompts are
  # split over devices, and each device has the seed. A prompt and the new
  # tokens fill a row.
  prompt_shape = data.batch_size, data.length - new_tokens
  prompts_BL = integers(prompt_shape, run.batch_sharding)
  lengths_B = integers((data.batch_size,), run.batch_sharding)
  seed = integers((), NamedSharding(run.mesh, PartitionSpec()))
  return Program(
      name=name, function=write_text,
      args=(run.abstract_state.params, prompts_BL, lengths_B, seed), options={},
      passes=new_tokens - 1)


def _training_step(run: runs.Run) -> Program:
  """Returns the training step of a run as a program: a function of the state
  and a batch, and the shapes of both.

  As in a run, the old state is given up (donated), so that the new one may
  take its memory.

  Args:
    run: the run, on the topology's devices.
  """
  batch = {}
  for key, (shape, dtype) in objectives.shapes_of_batch(run.config).items():
    batch[key] = jax.ShapeDtypeStruct(shape, dtype, sharding=run.batch_sharding)
  return Program(
      name='train', function=make_train_step(run.module, run.tx, run.config),
      args=(run.abstract_state, batch),
      options=dict(donate_argnums=0, out_shardings=(run.shardings, None)))


def trace_program(run: runs.Run, program: Program):
  """Traces a program, which neither compiles nor runs it.

  Args:
    run: the run, on the topology's devices.
    program: the program.

  Returns:
    The traced program (jax.stages.Traced): its `jaxpr`, and `lower()`.
  """
  # Kernels of tokamax are made for the GPU that JAX computes on by default.
  device = run.mesh.devices.flat[0]
  default_device = None
  if device.platform == 'gpu':
    default_device = device
  with run.context(), jax.default_device(default_device):
    return jax.jit(program.function, **program.options).trace(*program.args)


def compile_program(run: runs.Run, program: Program, traced: Any, hbm: float):
  """Compiles a program, and checks that it fits into a device's memory.

  Args:
    run: the run, on the topology's devices.
    program: the program.
    traced: the program, as `trace_program` returns it.
    hbm: the bytes of a device's memory that a program may use.

  Returns:
    The compiled program.

  Raises:
    DoesNotFit: if it does not fit. The compiler for GPUs does not refuse such a
      program, so its peak is checked here too.
    RequestError: if a kernel needs more on-chip memory than there is.
  """
  shown_task = progress.show_task(f'compiling {program.name}')
  with run.context(), _translate_memory_errors(program.name), shown_task:
    executable = traced.lower().compile()
  peak = peak_bytes(executable.memory_analysis())
  _check_peak(program.name, peak=peak, hbm=hbm)
  return executable


@contextlib.contextmanager
def _translate_memory_errors(name: str) -> Iterator[None]:
  """Turns the compiler's error of too little memory into one of our own, with a
  sentence as its message. Other errors pass.

  Args:
    name: the name of the program that is compiled.

  Raises:
    DoesNotFit: if the device has too little memory.
    RequestError: if a kernel needs more on-chip memory than there is.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    reason = str(error).split('RESOURCE_EXHAUSTED: ')[-1].splitlines()[0]
    # Memory other than HBM is on the chip, such as VMEM. Sharding the model
    # over more devices does not help a kernel that needs too much of it, so
    # that this is no DoesNotFit.
    if 'hbm' not in reason.lower():
      raise RequestError(
          f'{name} cannot be compiled: a kernel takes more on-chip memory '
          f'than there is: {reason}') from error
    raise DoesNotFit(f'{name} does not fit a device: {reason}') from error


def _check_peak(name: str, peak: float, hbm: float, by: str = '') -> None:
  """Raises DoesNotFit if a program needs more memory than a device has.

  Args:
    name: the name of the program.
    peak: the most bytes that the program holds at a time.
    hbm: the bytes of a device's memory that a program may use.
    by: words for the message that say how the peak was found, such as
      ', by an estimate'.
  """
  if peak > hbm:
    raise DoesNotFit(
        f'{name} does not fit a device{by}: it needs {peak / GIB:.2f} GiB at '
        f'its peak, and a device has {hbm / GIB:.2f} GiB')


def peak_bytes(stats: Any) -> int:
  """Returns the most bytes of a device's memory that a compiled program holds
  at a time.

  libtpu 0.0.50.1 counts memory of the host into its figure of the peak. If the
  program uses any, this returns an upper bound instead: all temporaries of the
  device, and all arguments and results of the program, those that share memory
  (aliases) once.

  Args:
    stats: what memory_analysis() of the compiled program returns.
  """
  if not stats.host_temp_size_in_bytes:
    return stats.peak_memory_in_bytes
  return (stats.argument_size_in_bytes + stats.temp_size_in_bytes
          + stats.output_size_in_bytes - stats.alias_size_in_bytes)


def analyse_program(run: runs.Run, topology: chips.Topology, name: str) -> dict:
  """Compiles one program of a run, and reports what it costs.

  Args:
    run: the run, on the topology's devices.
    topology: the devices.
    name: the name of the program: train, prefill or decode.

  Returns:
    The report, a dict for JSON with the program's memory, its collectives, its
    FLOPs, and the shortest time that a step can take (`roofline`).

  Raises:
    DoesNotFit: if a device has too little memory, with figures.
  """
  # A state that is too large is refused before anything is traced.
  hbm = topology.chip.hbm
  state = _state_bytes(run, topology, name)
  program = make_program(run, name)
  begun = time.monotonic()
  traced = trace_program(run, program)

  # Find the memory and the collectives, by the compiler or by an estimate.
  if chips.installed_compiler(topology):
    executable = compile_program(run, program=program, traced=traced, hbm=hbm)
    sizes = state | _memory_of_program(executable.memory_analysis())
    sent = collectives.read_collectives(
        executable.as_text(), mesh_shape=run.mesh.shape,
        host_of_device=host_of_devices(run, topology),
        ragged_rows=ragged_rows(run, name), num_passes=program.passes)
  else:
    sizes = memory.estimate_peak_bytes(run, platform=topology.chip.platform)
    _check_peak(name, peak=sizes['peak'], hbm=hbm, by=', by an estimate')
    sent = predict.predict_collectives(run, host_of_devices(run, topology))

  # Count the FLOPs of the program and those that the model needs.
  count = topology.devices
  work = _work_of_program(
      run, topology=topology, program=program, jaxpr=traced.jaxpr)
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

  # Bound the time of a step.
  inside, outside = collectives.bytes_sent(sent)
  roofline = predict.step_times(
      topology, dtype=run.model.dtype, flops=figures['per_device'],
      hbm_bytes=predict.memory_traffic(
          run, products=work.nbytes, training=name == 'train'),
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
  """Returns the bytes of the state that a program needs on a device.

  A training step needs all of the run's state, and generation only the
  parameters.

  Args:
    run: the run, on the topology's devices.
    topology: the devices.
    name: the name of the program.

  Returns:
    The bytes of each part of the state, by its name.

  Raises:
    DoesNotFit: if the state alone is larger than the device's memory.
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
  """Returns the bytes that a compiled program takes of a device's memory, and
  of the host's if it uses any.

  Args:
    stats: what memory_analysis() of the compiled program returns.
  """
  sizes = dict(
      arguments=stats.argument_size_in_bytes,
      temporaries=stats.temp_size_in_bytes, peak=peak_bytes(stats))
  if stats.host_temp_size_in_bytes:
    sizes['host_memory'] = stats.host_temp_size_in_bytes
  return sizes


def _work_of_program(run: runs.Run, topology: chips.Topology, program: Program,
                     jaxpr: Any) -> flops.Work:
  """Returns the FLOPs and bytes of a program, if all experts get equally many
  tokens.

  Args:
    run: the run, on the topology's devices.
    topology: the devices.
    program: the program.
    jaxpr: the program, as jax traced it.

  Returns:
    The work of all devices together.
  """
  # Find how many rows of activations an expert layer gets, as the trace cannot
  # tell. Decoding reads the whole prompts first, outside of its loop, and in
  # each pass of the loop one token of each row.
  data = run.config.data
  rows = ragged_rows(run, program.name)
  if program.name == 'decode':
    prompt = data.length - NEW_TOKENS_OF_PROGRAM['decode']
    rows = predict.rows_of_experts(run, data.batch_size * prompt)
  options = flops.CountOptions(
      platform=topology.chip.platform, rows=rows, num_passes=program.passes,
      dense=chips.products_of_all_groups(topology),
      loop_rows=predict.rows_of_experts(run, data.batch_size))
  return flops.count_work(jaxpr, options)


def model_flops(run: runs.Run, name: str) -> dict[str, float]:
  """Returns the FLOPs that the model needs for a step, on all devices together.

  Args:
    run: the run.
    name: the name of the program: train, prefill or decode.

  Returns:
    `weights`: in training 6 N_active T, where N_active is the number of weights
      that a token is multiplied with and T the number of tokens, less the
      gradients of frozen parameters; in generation 2 N_active T, for the
      forward pass alone.
    `attention`: the FLOPs of the scores and weighted values that the mask
    shows.
  """
  config = run.config
  model = run.model
  num_rows = config.data.batch_size
  if name == 'train':
    needed = flops.training_flops_of_row(config, model)
    return {part: num_rows * flops_of_row
            for part, flops_of_row in needed.items()}

  # A generation reads the prompt and then, one at a time, all new tokens but
  # the last. In sum this is a forward pass over these tokens.
  objective = objectives.find_objective(config)
  length = objective.row_lengths(config)[0]
  needed = flops.forward_flops(model, length - 1)
  prompt = length - NEW_TOKENS_OF_PROGRAM[name]

  # With a prefix LM, the tokens of a prompt also see later ones.
  if objective.prefix:
    both_ways = flops.forward_flops(model, prompt, prompt=True)
    causal = flops.forward_flops(model, prompt, prompt=False)
    needed['attention'] += both_ways['attention'] - causal['attention']

  # The head computes logits only where a token is drawn, and so for none but
  # the last token of the prompt. A product with its matrix [d_model,
  # vocab_size] is two FLOPs for each weight.
  flops_of_head = 2 * model.d_model * model.vocab_size
  needed['weights'] -= (prompt - 1) * flops_of_head
  return {part: num_rows * flops_of_row
          for part, flops_of_row in needed.items()}


def ragged_rows(run: runs.Run, name: str) -> int:
  """Returns the number of rows that a device sends to the experts of a layer in
  one pass, if all experts get equally many tokens; 0 for decoding, whose passes
  have different numbers of tokens.

  Args:
    run: the run, on the topology's devices.
    name: the name of the program.
  """
  if name == 'decode':
    return 0
  num_micro_batches = 1
  if name == 'train':
    num_micro_batches = run.config.train.grad_accumulation
  lengths = objectives.find_objective(run.config).row_lengths(run.config)
  tokens = run.config.data.batch_size * max(lengths)
  return predict.rows_of_experts(run, tokens / num_micro_batches)


def host_of_devices(run: runs.Run, topology: chips.Topology) -> np.ndarray:
  """Returns the number of the slice (TPU) or host (GPU) of each device.

  Args:
    run: the run, on the topology's devices.
    topology: the devices.

  Returns:
    int [devices], in the order of the mesh.
  """
  # Only the first mesh axis, data, goes over several slices, so that the
  # devices of a slice follow each other in the mesh.
  devices_in_mesh = run.mesh.devices.reshape(-1)
  if topology.slices > 1:
    positions = np.arange(devices_in_mesh.size, dtype=np.int64)
    return positions // topology.devices_in_fast_network

  # Else the devices of a host have successive ids. The rank of an id among all
  # ids is its position, whatever the smallest id is.
  ids = np.array([device.id for device in devices_in_mesh], np.int64)
  positions = np.searchsorted(np.sort(ids), ids)
  return positions // topology.devices_in_fast_network
