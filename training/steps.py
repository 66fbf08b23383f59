"""The batches that a program is trained on, and its compiled steps."""

from collections.abc import Callable, Iterator, Sequence
import time
from typing import Any, NamedTuple

import jax

from training import progress
from training.costs import flops
from training.distributed import devices
from training.objectives import pipeline
from training.program import Program


# Stands for data.length among the lengths that rows may be padded to.
FULL_LENGTH = 0


class StepWork(NamedTuple):
  """The work of a step: the tokens of one run, the FLOPs of all runs."""
  tokens: int
  flops: float


class TrainingBatches:
  """The batches on the devices, and what a step on one has to do.

  Attributes:
    most_tokens: how many tokens a step of one run has at most.
    meter: the times of the steps.
  """

  def __init__(self, program: Program, loaders: Sequence[pipeline.Loader],
               num_runs: int):
    """Computes how many tokens and FLOPs a training step takes, for batches of
    each shape that the run will have.

    Args:
      program: the model and the optimiser that are trained on the batches.
      loaders: the sources of training batches: one for all runs of the program,
        or one for each seed.
      num_runs: the number of runs that the program trains at once.
    """
    self._program = program
    self._loaders = loaders
    config = program.run.config
    self._ramp = pipeline.read_ramp(config)
    # A row has one length, but for an encoder-decoder, whose rows have the
    # length of the source and that of the target.
    full_lengths = loaders[0].objective.row_lengths(config)
    self._row_tokens = sum(full_lengths)  # at most
    self.most_tokens = self._ramp.last * self._row_tokens
    self._peak = flops.total_peak_flops(
        program.devices, program.run.model.dtype)

    # Rows may be padded less far than to data.length, which is the last of
    # padded_lengths and counted under FULL_LENGTH.
    lengths_by_padding = {FULL_LENGTH: full_lengths}
    for length in pipeline.padded_lengths(config)[:-1]:
      lengths_by_padding[length] = (length,)

    # Batches have fewer rows than data.batch_size at first if data.batch_ramp
    # says so. The work is kept by the number of rows and their padded length.
    self._work: dict[tuple[int, int], StepWork] = {}
    for num_rows in (*self._ramp.sizes, self._ramp.last):
      for length, row_lengths in lengths_by_padding.items():
        self._work[num_rows, length] = self._work_of_step(
            num_rows, row_lengths=row_lengths, num_runs=num_runs)

    # Steps are taken to have the work of the largest batch, unless
    # `batch_after` notes another.
    usual_work = self._work[self._ramp.last, FULL_LENGTH]
    self.meter = progress.StepTimer(usual_work.tokens,
                                    flops_per_step=usual_work.flops,
                                    peak_flops=self._peak)

  def _work_of_step(self, num_rows: int, row_lengths: tuple[int, ...],
                    num_runs: int) -> StepWork:
    """Computes how many tokens and FLOPs a training step takes. FLOPs are 0
    where the peak FLOPs of the devices are not known, as they are only needed
    to say which share of the peak is used.

    Args:
      num_rows: the number of rows of a batch.
      row_lengths: the number of tokens of a row; for an encoder-decoder those
        of the source and of the target.
      num_runs: the number of runs that take the step together.
    """
    total_flops = 0.0
    if self._peak:
      run = self._program.run
      flops_of_row = flops.training_flops_of_row(
          run.config, model=run.model, lengths=row_lengths)
      total_flops = num_runs * num_rows * sum(flops_of_row.values())
    return StepWork(tokens=num_rows * sum(row_lengths), flops=total_flops)

  def start_streams(self, start: int) -> None:
    """Starts the streams of training batches at batch `start`, one for each
    loader."""
    steps = self._program.run.config.train.steps
    self._streams: list[Iterator] = [
        loader.iterate(start, steps) for loader in self._loaders]

  def batch_after(self, n: int) -> Any:
    """Returns the batch for the step after step n, on the devices. The batches
    come in order, so this must be called once for each n in turn.

    Args:
      n: the number of steps done.
    """
    # Each stream is the batches of one seed.
    batches = [next(stream) for stream in self._streams]
    # Where batches differ in shape, tell the timer what this step has to do.
    if len(self._work) > 1:
      num_rows = self._ramp.rows(n)
      row_length = batches[0]['tokens'].shape[1]
      usual_work = self._work[num_rows, FULL_LENGTH]
      work = self._work.get((num_rows, row_length), usual_work)
      self.meter.note_work(n + 1, work.tokens, work.flops)
    return self._program.put(*batches)

  def tokens_before(self, n: int) -> int:
    """Returns how many tokens a run has been trained on in its first n steps.
    """
    return int(self._ramp.rows_before(n)) * self._row_tokens

  def close(self) -> None:
    for stream in self._streams:
      stream.close()


class CompiledPerShape:
  """A jitted step, compiled ahead of time once for each shape of its batches.

  Labelled data come in batches of several lengths (data.length_buckets); those
  of text have one.
  """

  def __init__(self, step: jax.stages.Wrapped, meter: progress.StepTimer):
    self._step = step
    self._meter = meter
    self._compiled: dict[tuple, Callable] = {}

  def compile(self, state: Any, batch: Any) -> None:
    """Compiles for the shape of a batch."""
    self._compiled[_shapes_of_batch(batch)] = self._step.lower(state,
                                                               batch).compile()

  def compile_if_new(self, state: Any, batch: Any) -> None:
    """Compiles for the shape of a batch, unless that is done."""
    if _shapes_of_batch(batch) in self._compiled:
      return
    with self._meter.compiling():  # all processes meet the shape at once
      self.compile(state, batch)
      devices.wait_for_all_processes('compiled')

  def run_timed(self, state: Any, batch: Any) -> tuple[Any, float]:
    """Runs the step, and returns what it returns and how many seconds it took,
    without compiling."""
    self.compile_if_new(state, batch)
    start = time.perf_counter()
    result = jax.block_until_ready(self(state, batch))
    return result, time.perf_counter() - start

  def bytes_per_device(self) -> int:
    """Returns the bytes that the largest program needs on each device."""
    sizes = []
    for program in self._compiled.values():
      stats = program.memory_analysis()
      sizes.append(stats.argument_size_in_bytes + stats.output_size_in_bytes
                   + stats.temp_size_in_bytes - stats.alias_size_in_bytes)
    return max(sizes)

  def __call__(self, state: Any, batch: Any) -> Any:
    self.compile_if_new(state, batch)
    return self._compiled[_shapes_of_batch(batch)](state, batch)


def _shapes_of_batch(batch: Any) -> tuple:
  """Returns the shapes of all arrays of a batch."""
  return tuple(x.shape for x in jax.tree.leaves(batch))
