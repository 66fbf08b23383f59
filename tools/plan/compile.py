"""The programs of a run, compiled for devices that are not there."""

from collections.abc import Callable
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from configs.errors import RequestError, one_of, require
from training import generate, objectives, progress, runs
from training.step import make_train_step

DRAWN = {'prefill': 1, 'decode': 64}  # tokens that are added to each prompt


class Program(NamedTuple):
  """Something a run does, as jax.jit would be given it.

  Attributes:
    name: of PROGRAMS.
    function: to be jitted.
    args: of it, as shapes with shardings.
    options: of jax.jit.
    passes: of a loop in it whose end depends on data; None: there is none.
  """
  name: str
  function: Callable
  args: tuple
  options: dict
  passes: int | None = None


class Compiled(NamedTuple):
  """A program's compiled form, and the jaxpr that it came from."""
  program: Program
  jaxpr: Any
  executable: Any
  seconds: float


class DoesNotFit(RequestError):
  """Says by how much a program is too large for a device."""


def program(run: runs.Run, name: str) -> Program:
  """Returns the training step, or a generation, of a run.

  Raises:
    ValueError: for a program that the run's model does not have.
  """
  check(run, name)
  return PROGRAMS[name](run)


def check(run: runs.Run, name: str) -> None:
  """Raises RequestError for a program that the run's model does not have."""
  one_of('program in --programs', name, PROGRAMS)
  if name not in DRAWN:
    return
  objective, length = objectives.of(run.config), run.config.data.length
  require(objective.prompt and 'decoder' in objective.stacks,
          f'--programs has {name!r}, but a plan of generation is for decoders, '
          f'and model.arch is {run.model.arch!r}: choose train')
  require(length > DRAWN[name], f'data.length is {length}: {name} needs more '
          f'than {DRAWN[name]}')


def _train(run: runs.Run) -> Program:
  """As training/loop.py compiles it."""
  batch = {key: jax.ShapeDtypeStruct(shape, dtype, sharding=run.place)
           for key, (shape, dtype) in objectives.shapes(run.config).items()}
  return Program(
      'train', make_train_step(run.module, run.tx, run.config),
      (run.abstract, batch),
      dict(donate_argnums=0, out_shardings=(run.shardings, None)))


def _prefill(run: runs.Run) -> Program:
  return _generation(run, 'prefill')


def _decode(run: runs.Run) -> Program:
  return _generation(run, 'decode')


def _generation(run: runs.Run, name: str) -> Program:
  """So many tokens more after prompts that, with them, are data.length long."""
  data, tokens = run.config.data, DRAWN[name]
  length = data.length - tokens
  whole = NamedSharding(run.mesh, PartitionSpec())
  shape = lambda size, place: jax.ShapeDtypeStruct(
      size, jnp.int32, sharding=place)
  prefix = objectives.of(run.config).prefix
  def function(params, prompts_BL, lengths_B, seed):
    return generate.generate(run.module, params, prompts_BL, lengths_B,
                             jax.random.key(seed), max_new_tokens=tokens,
                             prefix_B=lengths_B if prefix else None)
  args = (run.abstract.params, shape((data.batch_size, length), run.place),
          shape((data.batch_size,), run.place), shape((), whole))
  return Program(name, function, args, {}, tokens - 1)


PROGRAMS = {'train': _train, 'prefill': _prefill, 'decode': _decode}


def lower(run: runs.Run, what: Program):
  """Returns (jaxpr, lowered); both are quick."""
  with run.context():
    traced = jax.jit(what.function, **what.options).trace(*what.args)
    return traced.jaxpr, traced.lower()


def build(run: runs.Run, what: Program, jaxpr, lowered, hbm: float
          ) -> Compiled:
  """Compiles.

  Raises:
    DoesNotFit: with the compiler's figures, or with ours where it lets a
      program pass that the device has no room for (GPUs).
    RequestError: where a kernel needs more on-chip memory than there is.
  """
  begun = time.monotonic()
  try:
    with run.context(), progress.during(f'compiling {what.name}'):
      executable = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    reason = str(error).split('RESOURCE_EXHAUSTED: ')[-1].splitlines()[0]
    if 'hbm' not in reason.lower():  # as VMEM, which no sharding relieves
      raise RequestError(
          f'{what.name} cannot be compiled: a kernel takes more on-chip memory '
          f'than there is: {reason}') from error
    raise DoesNotFit(f'{what.name} does not fit a device: {reason}') from error
  peak = peak_bytes(executable.memory_analysis())
  if peak > hbm:
    raise DoesNotFit(
        f'{what.name} does not fit a device: it needs {peak / 2 ** 30:.2f} GiB '
        f'at its peak, and a device has {hbm / 2 ** 30:.2f} GiB')
  return Compiled(what, jaxpr, executable, time.monotonic() - begun)


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
