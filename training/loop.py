"""The training loop: it trains one run, or several runs as one program.

eval.best names a figure of the evaluations. The checkpoint of the best one is
kept beside the newest, and with eval.patience the run ends after so many
evaluations in a row that were no better (early stopping: Prechelt 1998). What
was best is part of each checkpoint's record, so that a run that is resumed
decides as it would have without the break.

`train_all` reads in the order in which things happen. Step n is dispatched
before the figures of step n-1 are read, so that the device has work while the
host writes figures and fetches the next batch. What is done between two steps
are its hooks: `_Report` hands figures to the writers, `_Evaluate` evaluates,
`_Save` saves, and ends the runs that are done before their last step.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import contextlib
import dataclasses
import math
import pathlib
import sys
import time
from typing import Any, NamedTuple

from etils import epath
import jax
import ml_collections
import numpy as np

from architectures.parts.moe import routing
from common.errors import STOPPED, require
from training import progress, runs
from training.costs import flops, systems, totals
from training.data import records
from training.distributed import cpu, devices, signals
from training.evals import held_out, in_training
from training.objectives import pipeline, probe
from training.runs import TrainState
from training.workdir import checkpoints, metrics, storage

# How a run ends, beside 0 for its last step and STOPPED for a signal before it.
# After too many bad steps; as for a wrong request, since the same command would
# end in the same way, and no launcher is to start it again.
DIVERGED = 2
EARLY = -1  # after eval.patience evaluations: it is done, exit code 0
REHEARSED = 5  # steps that a dry run times
MANY_PASSES = 5  # over the data, before a run warns of them
BAD = ('the loss or a gradient was not finite, or there was nothing to '
       'predict')


class Program(NamedTuple):
  """What the loop trains: one run, or a group of runs as one program.

  Attributes:
    run: the run; of a group, one of its runs alone.
    context: makes the context in which everything is traced.
    devices: those that it uses.
    new_state: () -> the state before the first step.
    train_step: jitted step(state, batch) -> (state, figures), to which the
      state is donated.
    eval_step: jitted step(params, batch) -> {figure: objectives.Mean}.
    put: (a batch, or one for each seed) -> the batch on the devices.
    split: a tree of all runs, such as a state -> that of each run.
    join: what `split` has taken apart -> the joint tree.
    part: (figures or sums on the host, row) -> those of one run.
    figures: what is said of each step beside the step's own figures.
    title: what is said before the description of the run.
  """
  run: runs.Run
  context: Callable[[], contextlib.AbstractContextManager]
  devices: Sequence[jax.Device]
  new_state: Callable[[], TrainState]
  train_step: jax.stages.Wrapped
  eval_step: jax.stages.Wrapped
  put: Callable[..., Any]
  split: Callable[[Any], Any] = lambda tree: [tree]
  join: Callable[[Sequence[Any]], Any] = lambda trees: trees[0]
  part: Callable[[Any, int], Any] = lambda figures, row: figures
  figures: dict[str, Any] = {}
  title: str = ''


def program_of(run: runs.Run) -> Program:
  """Returns the program of one run alone."""
  return Program(run, run.context, list(run.mesh.devices.flat), run.new_state,
                 run.train_step(), run.eval_step(), run.put)


def train(run: runs.Run, state: TrainState, start: int,
          train_data: pipeline.Loader, eval_data: Sequence[pipeline.Loader],
          saved: checkpoints.Checkpoints, workdir: pathlib.Path,
          profile_steps: str = '') -> int:
  """Trains one run, as `train_all` does, and prints how it ended.

  Returns:
    The exit code: 0, STOPPED or DIVERGED.
  """
  writer = Writer(run.config, workdir, saved)
  train_all(program_of(run), [writer], state, start, [train_data], eval_data,
            profile_steps)
  if devices.primary():
    if writer.code == DIVERGED:
      print(f'error: {writer.sentence}', file=sys.stderr)
    elif writer.code:
      print(writer.sentence)
    if writer.code in (0, EARLY):
      print(end='\n'.join([*writer.lowest(), '']))
  return 0 if writer.code == EARLY else writer.code


def rehearse(run: runs.Run, train_data: pipeline.Loader,
             eval_data: Sequence[pipeline.Loader]) -> list[str]:
  """Times some steps of a run that starts anew, without writing anything.

  Returns:
    What the run is about to do, and its time and memory, in some lines.
  """
  program, config = program_of(run), run.config
  batches = _Batches(program, [train_data], 1)
  step, evaluate = (_PerShape(x, batches.meter)
                    for x in (program.train_step, program.eval_step))
  steps, every = config.train.steps, config.eval.every_steps
  times, evaluated = [0.0], 0.0
  with program.context():
    state = program.new_state()
    batches.begin(0)
    for n in range(min(REHEARSED + 1, steps)):
      (state, _), seconds = step.timed(state, batches.after(n))
      times.append(seconds)
    batches.close()
    if every:
      _, evaluated = evaluate.timed(state.params, program.put(
          eval_data[0].batch(0)))
  a_step = float(np.median(times[2:] or times[1:]))  # the first is slow
  spent = [steps * a_step, evaluated * -(-steps // max(every, 1)) * sum(
      x.first(config.eval.batches) for x in eval_data), batches.meter.compiled]
  return [
      describe(run, 0, batches.tokens, train_data, eval_data),
      f'a step: {a_step:.3g} s, {batches.tokens / a_step:,.0f} tokens/s, '
      f'{step.memory() / 2**30:,.2f} GiB on each device',
      f'about {sum(spent):,.0f} s in all, without saving and eval.tasks: steps '
      '{}, evaluating {}, compiling {}'.format(*map(progress.clock, spent))]


def train_all(program: Program, writers: Sequence['Writer'], state: TrainState,
              start: int, loaders: Sequence[pipeline.Loader],
              eval_data: Sequence[pipeline.Loader],
              profile_steps: str = '') -> int:
  """Trains the runs of `program` from step `start` to train.steps.

  Args:
    program: the run, or the group of runs.
    writers: of each run. Afterwards `code` and `sentence` say how it ended.
    state: the state of the program after `start` steps.
    start: the index of the next batch.
    loaders: the training batches: one loader for all, or one for each seed.
    eval_data: a loader for each held-out source; all runs share them.
    profile_steps: which steps to trace; see progress.profiled_steps.

  Returns:
    How many steps are done.
  """
  n, steps = start, program.run.config.train.steps
  # 1. A run that resumes drops the lines of metrics.jsonl after `start`, ...
  for writer in writers:
    writer.begin(n)
  batches = _Batches(program, loaders, len(writers))
  meter = batches.meter
  if devices.primary():
    print(program.title + describe(
        program.run, n, batches.tokens, loaders[0], eval_data))
  with program.context(), signals.Stop() as stop:
    report = _Report(program, writers, meter)
    evaluate = _Evaluate(program, report, stop, loaders[0], eval_data)
    save = _Save(program, report, batches)
    profiler = _Profiler(profile_steps, writers[0].workdir)

    # 2. ... goes on with the data at batch `start`, ...
    batches.begin(n)
    batch = batches.after(n)
    evaluate.check(state)

    # 3. ... and compiles, waits for the other processes, and starts the clock.
    train_step = _PerShape(program.train_step, meter)
    evaluate.step = _PerShape(program.eval_step, meter)
    cpu.trim()
    with meter.compiling(), progress.compiling(devices.primary()):
      train_step.compile(state, batch)
      evaluate.compile(state)
    cpu.trim()
    devices.sync('compiled')
    report.bar = progress.bar(steps, n, devices.primary())
    meter.begin(n)

    # 4. The steps.
    ends = not evaluate.late(n, state)
    while report.live and not ends:
      profiler.before(n, state)
      with jax.profiler.StepTraceAnnotation('train', step_num=n):
        state, figures = train_step(state, batch)
      n += 1
      report.bar.step(n)
      with meter.waiting():
        if n < steps:
          batch = batches.after(n)
      report(n, figures)  # it reads those of step n-1
      stopped = stop.agreed(n)
      if evaluate.due(n) and (n == steps or not stopped):
        try:
          evaluate(n, state)
        except Exception:
          save.without_tasks(n, state, evaluate)
          raise
        stopped = stop.at_once
      ends = stopped or n == steps
      save(n, state, ends)

    # 5. The end: after a signal, or where no run is left.
    for writer in report.live.values() if n < steps else ():
      writer.end(STOPPED, n)
    batches.close()
    profiler.close(state)
    for writer in writers:
      writer.saved.wait()
    report.bar.close()
    for writer in writers:
      writer.stop_requested = stop.stop_requested
      writer.close()
  return n


class _Batches:
  """The batches on the devices, and what a step on one has to do."""

  def __init__(self, program: Program, loaders: Sequence[pipeline.Loader],
               count: int):
    self._program, self._loaders = program, loaders
    config, objective = program.run.config, loaders[0].objective
    self._ramp = pipeline.ramp_of(config)
    sides = objective.row_lengths(config)
    self._row_tokens = sum(sides)  # at most
    self.tokens = self._ramp.last * sum(sides)  # of each run in a step, at most
    peak = flops.total_peak(program.devices, program.run.model.dtype)
    # By rows and length: of steps with rows padded less far than to
    # data.length, or fewer than data.batch_size.
    rows_of = {length: (length,) for length in pipeline.lengths(config)[:-1]}
    self._work = {
        (n, length): (n * sum(row), count * n * sum(flops.of_a_row(
            config, program.run.model, row).values()) if peak else 0.0)
        for n in (*self._ramp.sizes, self._ramp.last)
        for length, row in (rows_of | {0: sides}).items()}
    self.meter = progress.Meter(
        self.tokens, self._work[self._ramp.last, 0][1], peak)

  def begin(self, start: int) -> None:
    steps = self._program.run.config.train.steps
    self._streams = [loader.iterate(start, steps) for loader in self._loaders]

  def after(self, n: int) -> Any:
    """Returns the batch of the step after step n."""
    batches = [next(stream) for stream in self._streams]
    if len(self._work) > 1:
      rows, length = self._ramp.rows(n), batches[0]['tokens'].shape[1]
      self.meter.does(n + 1, *self._work[
          rows, length if (rows, length) in self._work else 0])
    return self._program.put(*batches)

  def tokens_before(self, n: int) -> int:
    """Returns how many tokens a run has been trained on in its first n steps.
    """
    return int(self._ramp.before(n)) * self._row_tokens

  def close(self) -> None:
    for stream in self._streams:
      stream.close()


class _PerShape:
  """A jitted step, compiled ahead of time once for each shape of its batches.

  Labelled data come in batches of several lengths (data.length_buckets); those
  of text have one.
  """

  def __init__(self, step: jax.stages.Wrapped, meter: progress.Meter):
    self._step, self._meter = step, meter
    self._compiled: dict[tuple, Callable] = {}

  def compile(self, state: Any, batch: Any) -> None:
    """Compiles for the shape of a batch."""
    self._compiled[_shape(batch)] = self._step.lower(state, batch).compile()

  def prepare(self, state: Any, batch: Any) -> None:
    """Compiles for the shape of a batch, unless that is done."""
    if _shape(batch) not in self._compiled:  # all processes meet it at once
      with self._meter.compiling():
        self.compile(state, batch)
        devices.sync('compiled')

  def timed(self, state: Any, batch: Any) -> tuple[Any, float]:
    """Returns what a step gives, and its seconds without compiling."""
    self.prepare(state, batch)
    start = time.perf_counter()
    return jax.block_until_ready(self(state, batch)), (
        time.perf_counter() - start)

  def memory(self) -> int:
    """Returns the bytes that the programs need on each device."""
    return max(x.argument_size_in_bytes + x.output_size_in_bytes
               + x.temp_size_in_bytes - x.alias_size_in_bytes
               for x in (program.memory_analysis()
                         for program in self._compiled.values()))

  def __call__(self, state: Any, batch: Any) -> Any:
    self.prepare(state, batch)
    return self._compiled[_shape(batch)](state, batch)


def _shape(batch: Any) -> tuple:
  return tuple(x.shape for x in jax.tree.leaves(batch))


class _Report:
  """Hands the figures of a step to the writers, a step late; shows and writes
  them if they are due, and those of a run that they end in any case.

  Attributes:
    writers: of all runs.
    meter: the times of the steps.
    bar: what is shown of the progress.
  """

  def __init__(self, program: Program, writers: Sequence['Writer'],
               meter: progress.Meter):
    self.writers, self.meter = writers, meter
    self.bar: Any = None
    self._program, self._deferred = program, progress.Deferred(meter.now)

  @property
  def live(self) -> dict[int, 'Writer']:
    """The runs that have not ended, by their row in the joint arrays."""
    return {row: writer for row, writer in enumerate(self.writers)
            if not writer.code}

  def __call__(self, n: int, figures: Any) -> None:
    """Takes the figures of step `n`, and reports those of the step before."""
    self._report(self._deferred.push(n, figures))

  def flush(self) -> None:
    """Reports what is held: before evaluating and saving."""
    self._report(self._deferred.flush())

  def say(self, writer: 'Writer', text: str) -> None:
    self.bar.say(f'{writer.label}: {text}' if writer.label else text)

  def _report(self, read: progress.Read | None) -> None:
    if read is None:
      return
    (n, figures, done), live, ended = read, self.live, []
    for row, writer in live.items():
      before = writer.too_many_bad
      writer.read(self._program.part(figures, row))
      ended += [writer] if writer.too_many_bad > before else []
    config = self._program.run.config
    due = n % config.log.every_steps == 0 or n == config.train.steps
    if not (due or ended):
      return
    lap = self.meter.lap(n, done) | self._program.figures
    for writer in live.values() if due else ended:
      writer.report(n, lap)
    if live and due:
      self.bar.update(n, lap | {
          'loss': float(np.mean([w.last['loss'] for w in live.values()]))})


class _Evaluate:
  """Evaluates all runs by what is due, held-out data and eval.tasks; writes and
  shows the figures.

  Where a signal cuts it short nothing is written, and the run does it again
  when it is resumed.

  Attributes:
    step: the evaluation step.
  """

  def __init__(self, program: Program, report: _Report, stop: signals.Stop,
               train_data: pipeline.Loader,
               eval_data: Sequence[pipeline.Loader]):
    self._program, self._report, self._stop = program, report, stop
    self._config, self._eval_data = program.run.config, eval_data
    self._steps = self._config.train.steps
    self._tasks = in_training.Tasks(program.run, train_data.tokenizer)
    self.step: Any = None

  def check(self, state: TrainState) -> None:
    """Refuses, before the first step, an eval.best that is none of the figures.
    Figures of held-out data are traced, and those of a task that are not known
    come of doing it once."""
    writers, program = self._report.writers, self._program
    best = writers[0].best  # alike in all runs
    if best is None or best.seen:
      return
    task, is_task, _ = best.figure.partition('/')
    if is_task:
      names = self._tasks.names(
          task, next(iter(program.split(state.params))), writers[0].workdir,
          lambda: self._stop.at_once)
    else:
      names = held_out.names(program.eval_step, state.params, self._eval_data,
                             program.put, program.part)
    best.is_in(names or [best.figure])

  def compile(self, state: TrainState) -> None:
    if self._config.eval.every_steps:
      self.step.compile(state.params,
                        self._program.put(self._eval_data[0].batch(0)))

  def due(self, n: int) -> bool:
    return self._held_out_due(n) or self.tasks_due(n)

  def _held_out_due(self, n: int) -> bool:
    every = self._config.eval.every_steps
    return bool(every) and (n % every == 0 or n == self._steps)

  def tasks_due(self, n: int) -> bool:
    every = self._config.eval.tasks_every_steps
    return bool(self._config.eval.tasks) and (
        n == self._steps or bool(every) and n % every == 0)

  def late(self, n: int, state: TrainState) -> bool:
    """Does the evaluation after step `n` that a signal kept from being done
    before the run was resumed; returns False where one cuts it short again."""
    late = [w for w in self._report.live.values()
            if not w.evaluated or w.best and w.best.seen < n]
    whole = not late or not self.due(n) or self(n, state)
    for writer in late:
      if writer.best and writer.best.is_over:
        writer.end(EARLY, n)
    return whole

  def __call__(self, n: int, state: TrainState) -> bool:
    """Returns whether it came to the end."""
    self._report.flush()
    live = self._report.live
    figures: dict[int, dict] = {row: {} for row in live}
    with self._report.meter.paused():
      whole = ((not self._held_out_due(n)
                or self._on_held_out(n, state, figures))
               and (not self.tasks_due(n) or self._do_tasks(n, state, figures)))
    for row, writer in live.items() if whole else ():
      if figures[row]:
        writer.evaluate(n, figures[row])
    return whole

  def _cut_short(self, n: int) -> bool:
    """Whether a signal ends an evaluation; not the last: the run was for it."""
    return self._stop.at_once and n < self._steps

  def _on_held_out(self, n: int, state: TrainState, figures: dict[int, dict]
                   ) -> bool:
    """Adds the held-out figures; returns whether it came to the end."""
    evaluated = {'': self._program.run.evaluated(state)}
    if self._config.eval.live:
      evaluated['live/'] = state.params
    for prefix, params in evaluated.items():
      sums = held_out.evaluate(
          self.step, params, self._eval_data, self._config.eval.batches,
          self._program.put, stop=lambda: self._cut_short(n))
      if sums is None:
        return False
      for row, writer in self._report.live.items():
        means = held_out.means(
            [self._program.part(of_batch, row) for of_batch in sums],
            self._eval_data)
        figures[row] |= {prefix + name: x for name, x in means.items()}
        if writer.label:  # one of many, for each of which a figure is enough
          means = {'loss': means['loss']}
        text = '  '.join(f'{name.replace("_", " ")} {held_out.shown(value)}'
                         for name, value in means.items())
        self._report.bar.say(
            f'step {n}  held-out {prefix.replace("/", " ")}{text}'
            + f'  {writer.label}' * bool(writer.label))
    return True

  def _do_tasks(self, n: int, state: TrainState, figures: dict[int, dict]
                ) -> bool:
    """Adds the figures of the tasks; returns whether it came to the end."""
    live, results = self._report.live, {}
    for row, params in enumerate(self._program.split(
        self._program.run.evaluated(state))):
      if row in live:
        results[row] = self._tasks.of(params, n, live[row].workdir,
                                      stop=lambda: self._cut_short(n))
        if results[row] is None:
          return False
    for row, result in results.items():
      figures[row] |= result.figures
      for text in result.lines:
        self._report.say(live[row], f'step {n}  {text}')
    return True


class _Save:
  """Saves the runs when that is due, and ends those that diverged, and those
  that stop early."""

  def __init__(self, program: Program, report: _Report, batches: _Batches):
    self._program, self._report, self._batches = program, report, batches
    self._steps = program.run.config.train.steps

  def __call__(self, n: int, state: TrainState, ends: bool) -> None:
    """`ends` says that no run trains after step `n`."""
    live = self._report.live
    # One answer holds for all: the runs' clocks began together.
    if not (ends or any(w.saved.due(n) for w in live.values())):
      live = {row: w for row, w in live.items() if w.asks_to_be_saved(n)}
    if not live:
      return
    self._report.flush()
    with self._report.meter.paused():
      for row, alone in enumerate(self._program.split(state)):
        if row in live and live[row].sound:
          live[row].save(n, alone, self._batches.tokens_before(n))
        elif row in live:
          self._report.say(live[row], f'step {n} is not saved: its parameters '
                           'are not finite')
    for writer in live.values():
      if writer.too_many_bad or n == self._steps and not writer.sound:
        writer.end(DIVERGED, n)
      elif writer.best and writer.best.is_over and n < self._steps:
        writer.end(EARLY, n)
      if writer.code and writer.label:  # the others go on
        self._report.say(writer, writer.sentence)

  def without_tasks(self, n: int, state: TrainState, evaluate: _Evaluate
                    ) -> None:
    """Saves after an evaluation that failed, where that may be the fault of a
    task: what the runs have learned does not hang on it. Tasks are done by one
    process alone, so that no other waits."""
    if evaluate.tasks_due(n):
      self(n, state, ends=True)
      for writer in self._report.writers:
        writer.saved.wait()
      self._report.bar.say(
          f'step {n} is saved, without all that eval.tasks names')


@dataclasses.dataclass(eq=False)
class Writer:
  """What one run of the loop writes, its figures and its checkpoints, and how
  it ended.

  Attributes:
    config: the config of the run.
    workdir: the folder of the run.
    saved: the checkpoints of the run.
    label: the name of the run in messages; '' where it trains alone.
    last: the figures of the last step that the loop has read.
    bad: the number of bad steps in a row, up to that step.
    code: how the run ended: 0, STOPPED, DIVERGED or EARLY.
    sentence: why the run did not reach its last step; '' where it did.
    evaluated: whether the figures of an evaluation after the step that the run
      was resumed at are in its metrics, or it was not resumed.
    stop_requested: whether a signal came, be it too late to stop the run.
  """
  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  saved: checkpoints.Checkpoints
  label: str = ''
  last: dict[str, Any] = dataclasses.field(default_factory=dict)
  bad: int = 0
  code: int = 0
  sentence: str = ''
  evaluated: bool = True
  stop_requested: bool = False

  def begin(self, start: int) -> None:
    """Opens the metrics files, and drops the rows after step `start`."""
    self._files = metrics.writers(self.workdir, self.config.to_dict(), start,
                                  devices.primary())
    self._loads = []  # of the experts, since the last report
    # Process 0 alone has the rows.
    self.evaluated = start == 0 or bool(checkpoints.from_process_0(np.int32(
        any(file.has_kept(start, 'eval') for file in self._files[:1]))))
    self.best = Best.of(self.config, self.saved.best)

  def read(self, figures: dict[str, Any]) -> None:
    """Takes the figures of a step."""
    # A step that was under way when there were too many bad ones is read too,
    # but a good loss does not save the run any more.
    if not self.too_many_bad:
      self.bad = figures['bad_in_row']
    self.last = figures
    if 'health/load_E' in figures:
      self._loads.append((figures['health/load_E'], figures['health/tokens']))

  def report(self, n: int, lap: dict[str, Any]) -> None:
    """Writes the figures of step `n`, and how long it took."""
    self.write(n, 'train', self.last | lap | _over_window(self._loads))
    self._loads.clear()

  def write(self, n: int, split: str, figures: dict[str, Any]) -> None:
    for file in self._files:
      file.write(n, split, figures)

  @property
  def too_many_bad(self) -> bool:
    return self.bad >= self.config.train.max_bad_steps

  @property
  def sound(self) -> bool:
    """Whether the parameters are finite. No later step can mend parameters
    that are not finite, so they are not saved."""
    return math.isfinite(self.last['param_norm'])

  def asks_to_be_saved(self, n: int) -> bool:
    """Whether it is saved after step `n`, due or not: the step is the best so
    far, or one of too many that were bad, or the run ends there."""
    return self.too_many_bad or self.best is not None and (
        self.best.step == n or self.best.is_over)

  def evaluate(self, n: int, figures: dict[str, Any]) -> None:
    """Takes the figures of the evaluation after step `n`."""
    if self.best and self.best.seen < n:
      self.best.take(n, figures)
      self.saved.best = self.best.record()
    self.write(n, 'eval', figures)

  def save(self, n: int, state: TrainState, tokens: int) -> None:
    for file in self._files:
      file.flush()
    self.saved.save(n, state, next_batch=n, tokens=tokens, config=self.config,
                    good=not self.last['bad_in_row'],
                    best=self.best and self.best.record())

  def lowest(self) -> list[str]:
    """Says where the held-out loss was lowest, unless that is the end, of a run
    whose figures lie on disk."""
    path = pathlib.Path(self.workdir) / metrics.METRICS
    losses = {row['step']: row['loss']
              for row in (metrics.read(path) if path.exists() else ())
              if row['split'] == 'eval' and row.get('loss') is not None}
    step, last = min(losses, key=losses.get, default=0), max(losses, default=0)
    if step == last:
      return []
    keep = ('eval.py --step=best judges the best' if self.best else 'to keep '
            'the best, train with --config.eval.best=loss, and with '
            '--config.eval.patience=3 to end soon after it')
    return [f'held-out loss was lowest at step {step:,}, {losses[step]:.4f}, '
            f'and is {losses[last]:.4f} at step {last:,}: {keep}']

  def close(self) -> None:
    for file in self._files:
      file.close()

  def end(self, code: int, n: int) -> None:
    """Records that the run ends after step `n`, as `code` says."""
    self.code, newest = code, self.saved.newest
    if code == DIVERGED:
      self.sentence = _diverged(n, self.bad, newest)
    elif code == EARLY:
      self.sentence = self.best.sentence(n)
    else:
      of = f' of {self.config.train.steps}' if self.label else ''
      saved = ('saved: the same command goes on from it.' if newest == n else
               'not saved: the same command goes on from '
               + ('the beginning.' if newest is None else f'step {newest}.'))
      self.sentence = f'stopped after step {n}{of}, {saved}'


def _over_window(loads: list[tuple]) -> dict[str, Any]:
  """Returns the experts' panel over the steps since the last report, given
  (load, tokens) of each."""
  if not loads:
    return {}
  figures = routing.window(*(np.asarray(x, np.float32) for x in zip(*loads)))
  return {f'health/window_{name}': np.asarray(x).tolist()
          for name, x in figures.items()}


def ended_badly(state: TrainState, config: ml_collections.ConfigDict) -> str:
  """Returns why a run is not gone on with from `state` unless its config is
  another: it ended there after too many bad steps. '': it did not."""
  bad, step = int(state.bad_in_row), int(state.step)
  if bad < config.train.max_bad_steps:
    return ''
  return (f'the run in this workdir ended at step {step}: {BAD}, in {bad} '
          'steps in a row (train.max_bad_steps), and the same config would end '
          'in the same way. Change what made it so, with '
          '--allow_config_change, or move the latest folders out of '
          'checkpoints to go on from an earlier step.')


def _diverged(n: int, bad: int, newest: int | None) -> str:
  """Why a run ends after step `n`, the last `bad` of them not finite; `newest`
  is the checkpoint that it has."""
  what = (f'{BAD}, in {bad} steps in a row (train.max_bad_steps), which '
          'changed no parameter' if bad else
          f'the parameters are not finite after the last step, {n}')
  return (f'{what}. The newest checkpoint is of step {newest}. Try a smaller '
          'optim.lr, a longer optim.warmup_steps, optim.clip_norm=1, or '
          'model.dtype=float32, with --allow_config_change.')


@dataclasses.dataclass
class Best:
  """What the evaluations of a run have been so far.

  Attributes:
    figure: eval.best.
    largest: whether the largest value is the best.
    patience: eval.patience.
    step: of the best evaluation; None: there was none.
    value: its figure.
    waited: how many evaluations there were since.
    seen: the step of the last evaluation.
  """
  figure: str
  largest: bool
  patience: int
  step: int | None = None
  value: float | None = None
  waited: int = 0
  seen: int = 0

  @classmethod
  def of(cls, config: ml_collections.ConfigDict,
         record: Mapping[str, Any] | None) -> 'Best | None':
    """Returns what a run has to begin with; None where eval.best is empty.

    Args:
      config: the run's.
      record: what `record` returned before the run was stopped, if it was.
    """
    e = config.eval
    if not e.best:
      return None
    largest = (e.best_is == 'largest' if e.best_is
               else e.best.rpartition('/')[2] in metrics.LARGEST)
    if record and (record['figure'], record['largest']) == (e.best, largest):
      return cls(**record, patience=e.patience)
    return cls(e.best, largest, e.patience)

  def record(self) -> dict[str, Any]:
    """Returns what a checkpoint keeps of it."""
    fields = dataclasses.asdict(self)
    del fields['patience']  # a run that is resumed may have another
    return fields

  def take(self, n: int, figures: Mapping[str, float]) -> None:
    """Takes the figures of the evaluation after step `n`, if they have this
    one; raises as `is_in`."""
    self.seen = n
    if not self.is_in(figures):
      return
    value, sign = float(figures[self.figure]), 1 if self.largest else -1
    is_better = math.isfinite(value) and (
        self.value is None or sign * value > sign * self.value)
    # Every process decides as process 0 does.
    if checkpoints.from_process_0(np.int32(is_better)):
      self.step, self.value, self.waited = n, value, 0
    else:
      self.waited += 1

  def is_in(self, names: Collection[str]) -> bool:
    """Returns whether it is one of the figures of an evaluation.

    Raises:
      RequestError: where these are those of its own task, and it is not there.
    """
    task, is_task, _ = self.figure.partition('/')
    same = [name for name in names
            if name.partition('/')[0] == task or not is_task]
    require(self.figure in names or not same,
            f'eval.best is {self.figure!r}, which is no figure of these '
            f'evaluations: choose from {", ".join(same)}')
    return self.figure in names

  @property
  def is_over(self) -> bool:
    """Whether the run is to end."""
    return 0 < self.patience <= self.waited

  def sentence(self, n: int) -> str:
    """Says why the run ends after step `n`."""
    was = ('no evaluation had a number' if self.step is None else
           f'the best is {self.value:.6g}, of step {self.step}')
    return (f'ended early after step {n}: {self.figure} has not been better in '
            f'{self.waited} evaluations in a row (eval.patience); {was}')


def ended_early(config: ml_collections.ConfigDict,
                record: Mapping[str, Any] | None, step: int) -> str:
  """Returns why a run that is at `step` does not go on; '' where it does.

  Args:
    config: the run's.
    record: of Best, in the checkpoint that the run would go on from.
    step: of that checkpoint.
  """
  best = Best.of(config, record)
  return best.sentence(step) if best and best.is_over else ''


class _Profiler:
  """Starts and stops the trace of some steps, into WORKDIR/profile; the loop
  calls it before every step. The trace is xprof's: pip install xprof, then
  xprof --logdir WORKDIR/profile, or TensorBoard's profile plugin."""

  def __init__(self, steps: str, workdir: epath.Path):
    self._start, self._stop = progress.profiled_steps(steps) or (0, 0)
    self._files = storage.Uploads(storage.path(workdir) / 'profile')
    self._on = False

  def before(self, step: int, state: Any) -> None:
    """Called before `step` is dispatched, with the state that goes in."""
    if self._on and step >= self._stop:
      self.close(state)
    # A run that resumes inside the range traces what is left of it.
    elif not self._on and self._start <= step < self._stop:
      jax.block_until_ready(state)  # no work of earlier steps in the trace
      jax.profiler.start_trace(str(self._files.local))
      self._on = True

  def close(self, state: Any) -> None:
    """Ends a trace that is under way, with the work dispatched so far."""
    if self._on:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      self._files.push()
      self._on = False


def describe(run: runs.Run, start: int, tokens: int,
             train_data: pipeline.Loader,
             eval_data: Sequence[pipeline.Loader]) -> str:
  """Returns what a run is about to do, in some lines.

  Args:
    run: the run.
    start: how many steps of it are done.
    tokens: of a step, padding included.
    train_data: its batches.
    eval_data: those of what is held out.
  """
  config, model, steps = run.config, run.model, run.config.train.steps
  parameters = sum(x.size for x in jax.tree.leaves(run.abstract.params))
  trained = totals.trained_parameters(run.module, config.optim)
  active = '' if not model.has_experts else (
      f', of which each token uses {totals.parameters(model)[1]:,}')
  mesh = ','.join(
      f'{axis}={n}' for axis, n in run.mesh.shape.items() if n > 1)
  parts = config.train.grad_accumulation
  sizes = pipeline.ramp_of(config)
  all_rows = int(sizes.before(steps))
  rows = f'{config.data.batch_size:,} rows' + (
      f' in {parts} micro-batches' if parts > 1 else '')
  source = train_data.text
  passes = 0.0  # of a mixture they are not counted
  if len(train_data.views) == 1:
    passes = all_rows / train_data.num_windows
    source = f'{passes:.3g} passes over {source}'
  # Of views of records alone: text is cut into rows, and nothing of it is lost.
  cut = sum(getattr(view, 'cut', 0) for view in train_data.views)
  if cut:
    source += (f', {cut:,} of whose {train_data.num_windows:,} rows are longer '
               f'than data.length {config.data.length}, and cut off')
  lengths, most = pipeline.lengths(config), ''
  if len(lengths) > 1:
    most = 'at most '
    rows += f' padded to {", ".join(map(str, lengths[:-1]))} or {lengths[-1]}'
    rows += ' tokens (a program each)'
  every = config.eval.every_steps
  batches = [sum(numbers) for numbers in zip(*(
      (loader.first(config.eval.batches), loader.num_batches)
      for loader in eval_data))]
  return '\n'.join([
      f'model: {model.arch}, {parameters:,} parameters in {model.param_dtype}'
      + active
      + f', of which {trained:,} are trained' * (trained != parameters)
      + f'; computed in {model.dtype}',
      *filter(None, [systems.line(model)]), *totals.layers(model),
      f'devices: {run.mesh.size} of the kind '
      f'{run.mesh.devices.flat[0].device_kind}, mesh {mesh or "data=1"}',
      f'step: {rows}, {most}{tokens:,} tokens',
      *(f'until step {until:,}: {size:,} rows'
        for until, size in zip(sizes.until, sizes.sizes)),
      f'training: steps {start + 1:,} to {steps:,}, {most}'
      f'{all_rows * (tokens // sizes.last):,} tokens in all',
      f'data: {source}',
      *records.label_lines(train_data.views),
      *[f'warning: after some {MANY_PASSES} passes a model mostly learns its '
        'data by heart: add --config.eval.best=loss --config.eval.patience=3'
        ] * (passes > MANY_PASSES and not config.eval.best and every > 0
             and config.objective not in probe.OBJECTIVES),
      f'held out: {" and ".join(loader.text for loader in eval_data)}, '
      f'{sum(loader.num_tokens for loader in eval_data):,} tokens',
      'evaluation: ' + (
          f'every {every:,} steps, on {batches[0]:,} of the {batches[1]:,} '
          'batches held out' if every else 'none while training')])
