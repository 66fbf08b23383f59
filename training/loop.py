"""The training loop: it trains one run, or several runs as one program.

The loop dispatches step n before it reads the figures of step n-1, so that the
device has work while the host writes figures and fetches the next batch.
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from training import evaluating, profile, progress, runs
from training import shapes, timing
from training.costs import flops, peaks
from training.data import pipeline, ramp
from training.distributed import cpu, devices, signals
from training.endings import DIVERGED, EARLY, STOPPED
from training.evals import in_training
from training.member import Member
from training.step import TrainState
from training.workdir import averaged, checkpoints


def train(run: runs.Run, state: TrainState, start: int,
          train_data: pipeline.Loader, eval_data: Sequence[pipeline.Loader],
          saved: checkpoints.Checkpoints, workdir: pathlib.Path,
          profile_steps: str = '') -> int:
  """Trains one run, as `train_all` does, and prints how it ended.

  Returns:
    The exit code: 0, STOPPED or DIVERGED.
  """
  member = Member(run.config, workdir, saved)
  train_all(run, [member], state, start, [train_data], eval_data,
            profile_steps)
  if devices.primary():
    if member.code == DIVERGED:
      print(f'error: {member.sentence}', file=sys.stderr)
    elif member.code:
      print(member.sentence)
  return 0 if member.code == EARLY else member.code


def train_all(program: runs.Run, members: Sequence[Member], state: TrainState,
              start: int, loaders: Sequence[pipeline.Loader],
              eval_data: Sequence[pipeline.Loader],
              profile_steps: str = '') -> int:
  """Trains the members of `program` from step `start` to train.steps.

  A run that resumes does so in this order: (1) its state has been restored,
  (2) metrics.jsonl loses the lines after that step, (3) the data continue at
  batch `start`, (4) the step is compiled, all processes wait for each other,
  and the clock starts.

  Args:
    program: the run, or the group of runs.
    members: the runs. Afterwards `code` and `sentence` say how each one ended.
    state: the state of the program after `start` steps.
    start: the index of the next batch.
    loaders: the training batches: one loader for all, or one for each seed.
    eval_data: a loader for each held-out source; all members share them.
    profile_steps: which steps to trace; see profile.parse.

  Returns:
    How many steps are done.
  """
  for member in members:
    member.begin(start)
  loop = _Loop(program, members, start, loaders, eval_data)
  with program.context(), signals.Stop() as stop:
    return loop.run(state, stop, profile.Profiler(
        profile_steps, members[0].workdir))


class _Loop:
  """The values that the loop's parts share; `run` is the loop itself."""

  def __init__(self, program: runs.Run, members: Sequence[Member], start: int,
               loaders: Sequence[pipeline.Loader],
               eval_data: Sequence[pipeline.Loader]):
    self.program, self.members = program, members
    self.start, self.steps = start, program.config.train.steps
    self.loaders, self.eval_data = loaders, eval_data
    self.tasks = in_training.Tasks(program, loaders[0].tokenizer)
    sides = loaders[0].objective.row_lengths(program.config)
    self.ramp = ramp.of(program.config)
    rows = self.ramp.last
    self.row_tokens = sum(sides)  # at most
    self.tokens = rows * self.row_tokens  # of each member in a step, at most
    peak = peaks.total(program.devices, program.model.dtype)
    # What a step does whose rows are padded less far than to data.length, or
    # fewer than data.batch_size.
    own = {length: (length,)
           for length in pipeline.lengths(program.config)[:-1]}
    self.work = {(n, length): (n * sum(row), self._flops(n, row) if peak else
                               0.0)
                 for n in (*self.ramp.sizes, rows)
                 for length, row in (*own.items(), (0, sides))}
    every = program.config.eval.every_steps
    self.held_out = timing.Recurring(every, self.steps, at_last=bool(every))
    self.meter = timing.Meter(self.tokens, self.work[rows, 0][1], peak)
    self.held = timing.Deferred(self.meter.now)
    if devices.primary():
      print(program.describe(start, self.tokens, loaders[0], eval_data))

  def run(self, state: TrainState, stop: signals.Stop,
          profiler: profile.Profiler) -> int:
    """Trains from `state` to the end; returns how many steps are done."""
    n, self.stop = self.start, stop
    streams = [loader.iterate(n, self.steps) for loader in self.loaders]
    batch = self._next(streams, n)
    self._check_best(state)
    for member in self.members:
      averaged.check(self.program.config, member.saved, n)
    self._compile(state, batch)
    self.bar = progress.bar(self.steps, n, devices.primary())
    self.meter.begin(n)
    ends = not self._catch_up(n, state)
    while self.live and not ends:
      profiler.before(n, state)
      with profiler.annotate(n):
        state, figures = self.train_step(state, batch)
      n += 1
      self.bar.step(n)
      with self.meter.waiting():
        if n < self.steps:
          batch = self._next(streams, n)
      self._report(self.held.push(n, figures))
      stopped = self.stop.agreed(n)
      if (n == self.steps or not stopped) and self._is_evaluated(n):
        try:
          self._evaluate(n, state)
        except Exception as error:
          self._keep(n, state, error)
        stopped = self.stop.at_once
      ends = stopped or n == self.steps
      self._save_or_end(n, state, ends)
    for member in self.live.values() if n < self.steps else ():
      member.end(STOPPED, n)
    for stream in streams:
      stream.close()
    profiler.close(state)
    for member in self.members:
      member.saved.wait()
    self.bar.close()
    for member in self.members:
      member.told_to_stop = stop.stop_requested
      member.close()
    return n

  @property
  def live(self) -> dict[int, Member]:
    """The members that have not ended, by their row in the joint arrays."""
    return {row: member for row, member in enumerate(self.members)
            if not member.code}

  def _flops(self, rows: int, sides: tuple[int, ...]) -> float:
    """Returns the FLOPs of all members in a step on rows of `sides` tokens."""
    of, config = self.loaders[0].objective, self.program.config
    return len(self.members) * rows * sum(sides) * (
        flops.training_flops_per_token(
            self.program.model, *sides, unread=of.unread(config, sides[0]),
            freeze=config.optim.freeze, prefix=of.prefix))

  def _next(self, streams: Sequence[Iterator], n: int):
    """Returns the batch of the step after step n."""
    batches = [next(stream) for stream in streams]
    if len(self.work) > 1:
      rows, length = self.ramp.rows(n), batches[0]['tokens'].shape[1]
      self.meter.does(n + 1, *self.work[
          rows, length if (rows, length) in self.work else 0])
    return self.program.put(*batches)

  def _compile(self, state: TrainState, batch: Any) -> None:
    """Compiles both steps for the first batches; waits for all processes."""
    cpu.trim()
    self.train_step = shapes.PerShape(self.program.train_step(), self._another)
    self.eval_step = shapes.PerShape(self.program.eval_step(), self._another)
    with self.meter.compiling(), progress.compiling(devices.primary()):
      self.train_step.compile(state, batch)
      if self.program.config.eval.every_steps:
        self.eval_step.compile(
            state.params, self.program.put(self.eval_data[0].batch(0)))
    cpu.trim()
    devices.sync('compiled')

  def _check_best(self, state: TrainState) -> None:
    """Refuses an eval.best that is none of the figures, before the first step:
    those of held-out data are traced, and those of a task that are not known
    (evals.check_in_training) come of doing it once."""
    best, program = self.members[0].best, self.program  # alike in all members
    if best is None or best.seen:
      return
    task, is_task, _ = best.figure.partition('/')
    if is_task:
      names = self.tasks.names(
          task, next(iter(program.split(state.params))),
          self.members[0].workdir, lambda: self.stop.at_once)
    else:
      names = evaluating.names(program.eval_step(), state.params,
                               self.eval_data, program.put, program.part)
    best.is_in(names or [best.figure])

  @contextlib.contextmanager
  def _another(self, batch: Any):
    """Around the compilation of a step for batches of another shape, which all
    processes meet at the same step."""
    start = time.monotonic()
    with self.meter.compiling():
      yield
      devices.sync('compiled')
    rows, length = max(
        x.shape for x in jax.tree.leaves(batch) if x.ndim > 1)[-2:]
    self.bar.say(f'compiled for {rows:,} rows of {length:,} tokens in '
                 f'{time.monotonic() - start:.1f} s')

  def _report(self, read: timing.Read | None) -> None:
    """Hands the figures of a step to the members; shows and writes them if
    they are due, and those of a member that they end in any case."""
    if read is None:
      return
    n, figures, done = read
    live, ended = self.live, []
    for row, member in live.items():
      before = member.too_many_bad
      member.read(self.program.part(figures, row))
      ended += [member] if member.too_many_bad > before else []
    due = n % self.program.config.log.every_steps == 0 or n == self.steps
    if not (due or ended):
      return
    lap = timing.slowest(self.meter.lap(n, done)) | self.program.figures
    for member in live.values() if due else ended:
      member.report(n, lap)
    if live and due:
      self.bar.update(n, lap | {
          'loss': float(np.mean([m.last['loss'] for m in live.values()])),
          'evaluation_left': (self.held_out.left(n)
                              + self.tasks.times.left(n))})

  def _catch_up(self, n: int, state: TrainState) -> bool:
    """Does the evaluation after step `n` that a signal kept from being done
    before the run was resumed; returns False where one cuts it short again."""
    late = [m for m in self.members
            if not m.evaluated or m.best and m.best.seen < n]
    done = not late or not self._is_evaluated(n) or self._evaluate(n, state)
    for member in late:
      if member.best and member.best.is_over:
        member.end(EARLY, n)
    return done

  def _is_evaluated(self, n: int) -> bool:
    return self.held_out.due(n) or self.tasks.times.due(n)

  def _evaluate(self, n: int, state: TrainState) -> bool:
    """Evaluates all members by what is due, held-out data and eval.tasks;
    writes and shows what is found. Returns False where a signal cuts it short:
    nothing is written then, and the run does it again when it is resumed."""
    self._report(self.held.flush())
    figures: dict[int, dict] = {row: {} for row in self.live}
    with self.meter.paused():
      whole = True
      if self.held_out.due(n):
        with self.held_out.timed():
          whole = self._held_out(n, self._to_evaluate(n, state), figures)
      if whole and self.tasks.times.due(n):
        with self.tasks.times.timed():
          whole = self._do_tasks(n, state, figures)
      if whole:
        self._take(n, state, figures)
    return whole

  def _take(self, n: int, state: TrainState, figures: dict[int, dict]) -> None:
    """Hands the figures of step `n` to the members, and evaluates the mean of
    checkpoints, too, of those that end with them before the last step."""
    ending = {row: member for row, member in self.live.items()
              if figures[row] and member.ends_with(n, figures[row])}
    self._held_out(n, self._means(n, state, ending), figures)
    for row, member in self.live.items():
      if figures[row]:
        member.write(n, 'eval', figures[row])

  def _cut_short(self, n: int) -> bool:
    """Whether a signal ends an evaluation; not the last: the run was for it."""
    return self.stop.at_once and n < self.steps

  def _held_out(self, n: int, evaluated: Iterable[tuple],
                figures: dict[int, dict]) -> bool:
    """Adds the held-out figures of what `_to_evaluate` yields; returns whether
    it came to the end."""
    for prefix, params, rows in evaluated:
      # A mean comes where a run ends, which is then not resumed.
      sums = evaluating.evaluate(
          self.eval_step, params, self.eval_data,
          self.program.config.eval.batches, self.program.put,
          stop=lambda own=prefix: own != 'mean/' and self._cut_short(n))
      if sums is None:
        return False
      for row, member in rows.items():
        found = evaluating.means(
            [self.program.part(own, row) for own in sums], self.eval_data)
        figures[row] |= {prefix + name: x for name, x in found.items()}
        if member.label:  # one of many, for each of which a figure is enough
          found = {'loss': found['loss']}
        told = '  '.join(f'{name.replace("_", " ")} {evaluating.shown(value)}'
                         for name, value in found.items())
        self.bar.say(f'step {n}  held-out {prefix.replace("/", " ")}{told}'
                     + (f'  {member.label}' if member.label else ''))
    return True

  def _to_evaluate(self, n: int, state: TrainState) -> Iterator[tuple]:
    """Yields what the names of the figures begin with, the parameters that are
    evaluated after step `n`, and the members that they are of."""
    live = self.live
    yield '', self.program.evaluated(state), live
    if self.program.config.eval.live:
      yield 'live/', state.params, live
    if n == self.steps:
      yield from self._means(n, state, live)

  def _means(self, n: int, state: TrainState, ending: dict[int, Member]
             ) -> Iterator[tuple]:
    """Yields likewise the means of checkpoints, of the members that end after
    step `n` and have them all."""
    if not (self.program.config.checkpoint.average and ending):
      return
    means, lacking = averaged.means(
        self.program, self.program.evaluated(state), n,
        {row: member.saved for row, member in ending.items()})
    for row, reason in lacking.items():
      self._say(ending[row], f'no mean of checkpoints: {reason}')
    if len(lacking) < len(ending):
      yield 'mean/', means, {row: member for row, member in ending.items()
                             if row not in lacking}

  def _do_tasks(self, n: int, state: TrainState, figures: dict[int, dict]
                ) -> bool:
    """Adds the figures of the tasks; returns whether it came to the end."""
    found = {}
    for row, params in enumerate(
        self.program.split(self.program.evaluated(state))):
      if row in self.live:
        found[row] = self.tasks.of(params, n, self.live[row].workdir,
                                   stop=lambda: self._cut_short(n))
        if found[row] is None:
          return False
    for row, own in found.items():
      figures[row] |= own.figures
      for told in own.told:
        self._say(self.live[row], f'step {n}  {told}')
    return True

  def _save_or_end(self, n: int, state: TrainState, ends: bool) -> None:
    """Saves the members when that is due, and ends those that diverged.

    `ends` says that no member trains after step `n`.
    """
    live = self.live
    # One answer holds for all: the members' clocks began together.
    if not (ends or any(m.saved.due(n) for m in live.values())):
      live = {row: m for row, m in live.items() if m.asks_to_be_saved(n)}
    if not live:
      return
    self._report(self.held.flush())
    with self.meter.paused():
      for row, own in enumerate(self.program.split(state)):
        if row not in live:
          continue
        if live[row].sound:
          live[row].save(n, own, int(self.ramp.before(n)) * self.row_tokens)
        else:
          self._say(live[row], f'step {n} is not saved: its parameters are not '
                    'finite')
    for member in live.values():
      if member.too_many_bad or n == self.steps and not member.sound:
        member.end(DIVERGED, n)
      elif member.best and member.best.is_over and n < self.steps:
        member.end(EARLY, n)
      if member.code and member.label:  # the others go on
        self._say(member, member.sentence)

  def _keep(self, n: int, state: TrainState, error: Exception) -> None:
    """Raises `error` of the evaluation after step `n`. Where it may be one of a
    task, what the members have learned does not hang on it: they are saved
    first. Tasks are done by one process alone, so that no other waits."""
    if self.tasks.times.due(n):
      self._save_or_end(n, state, ends=True)
      for member in self.members:
        member.saved.wait()
      self.bar.say(f'step {n} is saved, without all that eval.tasks names')
    raise error

  def _say(self, member: Member, text: str) -> None:
    self.bar.say(f'{member.label}: {text}' if member.label else text)
