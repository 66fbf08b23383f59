"""The training loop, of one run or of several that train as one program.

Step n is dispatched before the figures of step n-1 are read. What the loop
trains is a runs.Run, or a vectorised.Group of them: both offer the attributes
and methods of `Program`.
"""

from collections.abc import Iterator, Sequence
import pathlib
import sys
from typing import Any, Protocol

import jax
import ml_collections
import numpy as np

from architectures.parts.config import ModelConfig
from training import evaluating
from training import profile
from training import progress
from training import timing
from training.costs import flops
from training.costs import peaks
from training.data import pipeline
from training.distributed import devices
from training.distributed import cpu_memory
from training.distributed import signals
from training.members import DIVERGED, STOPPED, Member
from training.step import TrainState
from training.workdir import checkpoints


class Program(Protocol):
  """What the loop trains. Its members share one compiled step.

  Attributes:
    config: the config; of several members, the first one's.
    model: the model.
    devices: all that compute.
    figures: what each row of training metrics says beside the step's figures.
  """
  config: ml_collections.ConfigDict
  model: ModelConfig
  devices: Sequence[jax.Device]
  figures: dict[str, Any]

  def context(self):
    """Returns the context in which the steps are traced."""

  def describe(self, start: int, tokens: int, train_data: pipeline.Loader,
               eval_data: Sequence[pipeline.Loader]) -> str:
    """Returns what is about to be done, in some lines."""

  def put(self, *batches: dict[str, np.ndarray]):
    """Puts batches on the devices: one for all members, or one a seed."""

  def train_step(self):
    """Returns jitted step(state, batch) -> (state, figures); the state is
    donated."""

  def eval_step(self):
    """Returns jitted step(params, batch) -> sums."""

  def split(self, state: TrainState) -> Iterator[TrainState]:
    """Yields the state of each member, to be saved."""

  def part(self, figures, row: int):
    """Returns one member's part of figures, or of sums, on the host."""


def train(run: Program, state: TrainState, start: int,
          train_data: pipeline.Loader, eval_data: Sequence[pipeline.Loader],
          saved: checkpoints.Checkpoints, workdir: pathlib.Path,
          profile_steps: str = '') -> int:
  """Trains one run to its last step; returns its exit code.

  Args:
    run: the runs.Run.
    state: its state after `start` steps.
    start: the index of the next batch.
    train_data: the batches of training.
    eval_data: of each source that is held out.
    saved: its checkpoints.
    workdir: its folder.
    profile_steps: which steps to trace; see profile.parse.
  """
  member = Member(run.config, workdir, saved)
  train_all(run, [member], state, start, [train_data], eval_data,
            profile_steps)
  if devices.primary():
    if member.code == DIVERGED:
      print(f'error: {member.sentence}', file=sys.stderr)
    elif member.code == STOPPED:
      print(member.sentence)
  return member.code


def train_all(program: Program, members: Sequence[Member], state: TrainState,
              start: int, loaders: Sequence[pipeline.Loader],
              eval_data: Sequence[pipeline.Loader],
              profile_steps: str = '') -> int:
  """Trains the members of `program` from step `start` to train.steps.

  Order of a run that goes on: (1) the state is restored, (2) metrics.jsonl
  loses the lines after it, (3) the data go on at batch `start`, (4) the step
  is compiled, all processes wait for each other, and the clock starts.

  Args:
    program: what trains.
    members: its members; `code` and `sentence` of each say how it ended.
    state: the state of all of them.
    start: the index of the next batch.
    loaders: the batches of training: one for all, or one a seed.
    eval_data: of each source that is held out, the same for all.
    profile_steps: which steps to trace; see profile.parse.

  Returns:
    How many steps are done.
  """
  sides = _lengths(loaders[0].batch(start))
  tokens = program.config.data.batch_size * sum(sides)
  meter = timing.Meter(
      tokens, len(members) * tokens * flops.training_flops_per_token(
          program.model, *sides),
      peaks.total(program.devices, program.model.dtype))
  for member in members:
    member.begin(start)
  if devices.primary():
    print(program.describe(start, tokens, loaders[0], eval_data))
  with program.context(), signals.Stop() as stop:
    profiler = profile.Profiler(profile_steps, members[0].workdir)
    loop = _Loop(program, members, eval_data, tokens, meter, profiler, stop)
    return loop.run(state, start, loaders)


class _Loop:
  """What the loop holds; `run` is the loop."""

  def __init__(self, program: Program, members: Sequence[Member],
               eval_data: Sequence[pipeline.Loader], tokens: int,
               meter: timing.Meter, profiler: profile.Profiler,
               stop: signals.Stop):
    self.program, self.members, self.eval_data = program, members, eval_data
    self.tokens = tokens  # of a step, of each member
    self.meter, self.profiler, self.stop = meter, profiler, stop
    self.steps = program.config.train.steps
    self.held = timing.Deferred(meter.now)

  def run(self, state: TrainState, n: int,
          loaders: Sequence[pipeline.Loader]) -> int:
    """Trains from step `n`; returns how many steps are done."""
    streams = [loader.iterate(n, self.steps) for loader in loaders]
    batch = self._next(streams)
    step = self._compile(state, batch)
    self.bar = progress.bar(self.steps, n, devices.primary())
    self.meter.begin(n)
    ends = False
    while self.live and not ends:
      self.profiler.before(n, state)
      with self.profiler.annotate(n):
        state, figures = step(state, batch)
      n += 1
      self.bar.step(n)
      with self.meter.waiting():
        if n < self.steps:
          batch = self._next(streams)
      self._report(self.held.push(n, figures))
      stopped = self.stop.agreed(n)
      if self._is_evaluated(n) and not stopped:
        self._evaluate(n, state)
        stopped = self.stop.at_once
      ends = stopped or n == self.steps
      self._save_or_end(n, state, ends)
    for member in self.live.values():
      if n < self.steps:
        member.end(STOPPED, n)
    self._close(streams, state)
    return n

  @property
  def live(self) -> dict[int, Member]:
    """The members that have not ended, by their row of the joint arrays."""
    return {row: member for row, member in enumerate(self.members)
            if not member.code}

  def _next(self, streams: Sequence[Iterator]):
    return self.program.put(*[next(stream) for stream in streams])

  def _compile(self, state: TrainState, batch):
    """Returns the compiled training step, once all processes have it."""
    cpu_memory.trim()
    with self.meter.compiling(), progress.compiling(devices.primary()):
      step = self.program.train_step().lower(state, batch).compile()
      if self.program.config.eval.every_steps:
        self.eval_step = self.program.eval_step().lower(
            state.params, self.program.put(self.eval_data[0].batch(0))
            ).compile()
    cpu_memory.trim()
    devices.sync('compiled')
    return step

  def _report(self, read: timing.Read | None) -> None:
    """Takes the figures of a step; shows and writes them where they are due.
    """
    if read is None:
      return
    n, figures, done = read
    live = self.live
    for row, member in live.items():
      member.read(self.program.part(figures, row))
    if n % self.program.config.log.every_steps and n != self.steps:
      return
    lap = timing.slowest(self.meter.lap(n, done)) | self.program.figures
    for member in live.values():
      member.report(n, lap)
    if live:
      self.bar.update(n, lap | {'loss': float(np.mean(
          [member.last['loss'] for member in live.values()]))})

  def _is_evaluated(self, n: int) -> bool:
    every = self.program.config.eval.every_steps
    return bool(every) and (n % every == 0 or n == self.steps)

  def _evaluate(self, n: int, state: TrainState) -> None:
    """Writes and shows the figures of what is held out."""
    self._report(self.held.flush())
    with self.meter.paused():
      # The last evaluation is what the run was for: it is finished.
      sums = evaluating.evaluate(
          self.eval_step, state.params, self.eval_data,
          self.program.config.eval.batches, self.program.put,
          stop=lambda: self.stop.at_once and n < self.steps)
    if sums is None:
      return
    for row, member in self.live.items():
      figures = evaluating.means(
          [self.program.part(own, row) for own in sums], self.eval_data)
      member.write(n, 'eval', figures)
      if member.label:  # one of many, for each of which a figure is enough
        figures = {'loss': figures['loss']}
      told = '  '.join(f'{name.replace("_", " ")} {evaluating.shown(value)}'
                       for name, value in figures.items())
      self.bar.say(f'step {n}  held-out {told}'
                   + (f'  {member.label}' if member.label else ''))

  def _save_or_end(self, n: int, state: TrainState, ends: bool) -> None:
    """Saves what is due, and members that have had too many bad steps, and
    ends these. `ends`: step `n` is the last one of all."""
    live = self.live
    # All that still save give the same answer: their clocks began together.
    if not (ends or any(m.saved.due(n) for m in live.values())):
      live = {row: m for row, m in live.items() if m.too_many_bad}
    if not live:
      return
    self._report(self.held.flush())
    with self.meter.paused():
      for row, own in enumerate(self.program.split(state)):
        if row not in live:
          continue
        if live[row].sound:
          live[row].save(n, own, n * self.tokens)
        else:
          self._say(live[row], f'step {n} is not saved: its parameters are not '
                    'finite')
    for member in live.values():
      if member.too_many_bad or n == self.steps and not member.sound:
        member.end(DIVERGED, n)
        if member.label:  # the others go on
          self._say(member, member.sentence)

  def _say(self, member: Member, text: str) -> None:
    self.bar.say(f'{member.label}: {text}' if member.label else text)

  def _close(self, streams: Sequence[Iterator], state: TrainState) -> None:
    for stream in streams:
      stream.close()
    self.profiler.close(state)
    for member in self.members:
      member.saved.wait()
    self.bar.close()
    for member in self.members:
      member.close()


def _lengths(batch: dict[str, np.ndarray]) -> tuple[int, ...]:
  """Tokens of a row, the decoder's apart where there is an encoder too."""
  return tuple(batch[name].shape[1] for name in ('tokens', 'decoder_tokens')
               if name in batch)
