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
    """Counts the tokens and FLOPs of a step, for batches of each shape.

    Args:
      program: the program that is trained on the batches.
      loaders: the training batches: one loader for all runs of the program, or
        one for each seed.
      num_runs: the number of runs.
    """
    self._program = program
    self._loaders = loaders
    config = program.run.config
    self._ramp = pipeline.read_ramp(config)
    row_lengths = loaders[0].objective.row_lengths(config)
    self._row_tokens = sum(row_lengths)  # at most
    self.most_tokens = self._ramp.last * self._row_tokens
    self._peak = flops.total_peak_flops(
        program.devices, program.run.model.dtype)

    # Batches may have fewer rows than data.batch_size (a ramp), and rows that
    # are padded less far than to data.length (length 0 stands for that).
    row_lengths_of = {0: row_lengths}
    for length in pipeline.padded_lengths(config)[:-1]:
      row_lengths_of[length] = (length,)
    self._work = {}
    for num_rows in (*self._ramp.sizes, self._ramp.last):
      for length, row_lengths in row_lengths_of.items():
        self._work[num_rows, length] = self._work_of_step(
            num_rows, row_lengths=row_lengths, num_runs=num_runs)
    usual_work = self._work[self._ramp.last, 0]
    self.meter = progress.StepTimer(usual_work.tokens,
                                    flops_per_step=usual_work.flops,
                                    peak_flops=self._peak)

  def _work_of_step(self, num_rows: int, row_lengths: tuple[int, ...],
                    num_runs: int) -> StepWork:
    """Returns the tokens and the FLOPs of a step. FLOPs are counted where the
    devices' peak is known, since nothing else reads them.

    Args:
      num_rows: the number of rows of a batch.
      row_lengths: the tokens of a row; for an encoder-decoder those of the
        source and of the target.
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
    """Returns the batch of the step after step n, on the devices; to be called
    for each n in turn."""
    batches = [next(stream) for stream in self._streams]
    # The work of the step, where batches differ in their shape.
    if len(self._work) > 1:
      num_rows = self._ramp.rows(n)
      row_length = batches[0]['tokens'].shape[1]
      usual_work = self._work[num_rows, 0]
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
