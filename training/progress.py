"""The progress of a program, and the times of its steps.

What is under way is drawn on stderr, below what is printed, and leaves nothing
behind. Where stderr is no terminal nothing is drawn at all, so a log, a pipe
and --json hold what the program prints and no more.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
import contextlib
import datetime
import math
import os
import re
import sys
import time
from typing import Any, NamedTuple, TextIO, TypeVar

from common.errors import RequestError

Item = TypeVar('Item')
# Often enough: the thread that draws takes time from the host's cores.
_REDRAWS_PER_SECOND = 2

# The bar of this process, with a line for each task under way.
_tasks_bar = None
_should_stop: Callable[[], bool] | None = None  # set inside a run
# Where milestones are printed while nothing else is; None: all is printed.
_milestones_stream: TextIO | None = None


class WorkStopped(Exception):
  """The work on some items, which `show_items` yields one by one, is to end
  before the last of them, since a signal has come."""


@contextlib.contextmanager
def stop_work_of_run(stop: Callable[[], bool]) -> Iterator[None]:
  """Within a `with` block, lets the work of a training run, such as an
  evaluation, end soon after a signal: `show_items` then raises WorkStopped
  before the next item. No progress is shown, because the run has a progress bar
  of its own.

  Args:
    stop: returns whether the work is to end.
  """
  global _should_stop
  _should_stop = stop
  try:
    yield
  finally:
    _should_stop = None


@contextlib.contextmanager
def print_milestones_only(is_wanted: bool) -> Iterator[None]:
  """Within a `with` block, hides what is printed to stdout, except for a few
  milestones. It is for a program that is called by somebody who pays for each
  line, such as an agent. Warnings and errors are printed to stderr as usual.

  Args:
    is_wanted: whether to do so; if not, everything is printed.
  """
  global _milestones_stream
  if not is_wanted:
    yield
    return
  _milestones_stream = sys.stdout
  try:
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
      yield
  finally:
    _milestones_stream = None


def are_milestones_wanted() -> bool:
  """Returns whether nothing but milestones is printed."""
  return _milestones_stream is not None


def print_milestone(text: str) -> None:
  """Prints a milestone, where nothing but milestones is printed."""
  if _milestones_stream is not None:
    print(text, file=_milestones_stream, flush=True)


def print_result(text: str) -> None:
  """Prints a result, which is a milestone, too: always."""
  print(text, file=_milestones_stream or sys.stdout, flush=True)


@contextlib.contextmanager
def show_task(text: str, total: int | None = None
              ) -> Iterator[Callable[[], None]]:
  """Shows on the terminal what is being done while a `with` block runs, and for
  how long.

  Args:
    text: the words for what is being done.
    total: the number of its parts, if that is known.

  Yields:
    A function to be called whenever a part is done.
  """
  global _tasks_bar
  if _should_stop is not None or not sys.stderr.isatty():
    yield lambda: None
    return
  # There is one bar on the terminal, with a line for each task. The outermost
  # `with` block makes and removes it; those inside it add lines.
  is_outermost = _tasks_bar is None
  if is_outermost:
    _tasks_bar = _make_tasks_bar()
    _tasks_bar.start()
  task = _tasks_bar.add_task(text, total=total)
  try:
    yield lambda: _tasks_bar.advance(task)
  finally:
    _tasks_bar.remove_task(task)
    if is_outermost:
      _tasks_bar.stop()
      _tasks_bar = None


def _make_tasks_bar() -> Any:
  """Makes the progress bar on stderr, which has a line for each task. It is of
  the package rich.
  """
  from rich import progress
  columns = [
      progress.TextColumn('{task.description}', markup=False),
      progress.BarColumn(),
      progress.MofNCompleteColumn(),
      progress.TimeElapsedColumn(),
  ]
  # Redirect stdout only if it is a terminal: rich prints what it redirects to
  # its own console, which is stderr.
  redirects = sys.stdout.isatty()
  return progress.Progress(
      *columns, console=_make_console(sys.stderr), transient=True,
      refresh_per_second=_REDRAWS_PER_SECOND, redirect_stdout=redirects)


def show_items(items: Iterable[Item], text: str, total: int | None = None
               ) -> Iterator[Item]:
  """Yields items one by one, and shows on the terminal how many of them are
  done.

  Args:
    items: the items.
    text: the words for what is being done with them.
    total: the number of items; None: len(items), if it has one.

  Raises:
    WorkStopped: during a training run, after a signal.
  """
  if total is None and isinstance(items, Sized):
    total = len(items)
  with show_task(text, total) as advance:
    for item in items:
      if _should_stop is not None and _should_stop():
        raise WorkStopped
      yield item
      advance()


def _make_console(stream: TextIO):
  """Returns a console of rich that never hides the cursor, since a process that
  is killed could not show it again."""
  from rich import console as rich_console

  class Console(rich_console.Console):

    def show_cursor(self, show: bool = True) -> bool:
      return False

  return Console(file=stream)


class ProgressLines:
  """The progress of a run where there is no terminal: a plain line for each
  update.

  Args:
    total: train.steps.
    stream: the stream to print to.
  """

  def __init__(self, total: int, stream: TextIO):
    self._total = total
    self._stream = stream

  def step(self, step: int) -> None:
    """Does nothing: a line comes with figures."""

  def update(self, step: int, figures: Mapping[str, Any]) -> None:
    text = _format_figures(step, total=self._total, figures=figures)
    self.say(f'step {step}/{self._total}  {text}')

  def say(self, text: str) -> None:
    print(text, file=self._stream, flush=True)

  def close(self) -> None:
    self._stream.flush()


class _ProgressMilestones(ProgressLines):
  """The progress of a run of which milestones alone are printed: that it
  begins, when a tenth is done how long the rest takes, and at its end the last
  line that was said, such as the held-out loss.

  Args:
    total: train.steps.
    first_step: the step from which the run goes on.
  """

  def __init__(self, total: int, first_step: int):
    super().__init__(total, sys.stdout)
    self._step_of_tenth = first_step + (total - first_step) / 10
    self._last_said = 'nothing was evaluated'
    print_milestone(f'began: step {first_step} of {total}')

  def update(self, step: int, figures: Mapping[str, Any]) -> None:
    if step >= self._step_of_tenth:
      self._step_of_tenth = math.inf
      text = _format_figures(step, total=self._total, figures=figures)
      print_milestone(f'under way: step {step} of {self._total}  {text}')

  def say(self, text: str) -> None:
    self._last_said = text

  def close(self) -> None:
    print_milestone(f'ended: {self._last_said}')


class _ProgressBar:
  """The progress of a run on a terminal: step, loss, tokens/s and time left,
  redrawn in place."""

  def __init__(self, total: int, first_step: int, stream: TextIO):
    """Makes the bar, at the step from which the run goes on.

    Args:
      total: the number of steps of the run.
      first_step: the step that the run starts or resumes at.
      stream: the terminal.
    """
    from rich import progress
    self._total = total
    self._bar = progress.Progress(
        progress.TextColumn('step'),
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=None),
        progress.TextColumn('{task.fields[text]}'),
        console=_make_console(stream),
        # Do not redraw in a thread, which would take time from the training.
        auto_refresh=False,
        redirect_stderr=sys.stderr.isatty())
    self._task = self._bar.add_task('', total=total, completed=first_step,
                                    text='')
    self._drawn = 0.0
    self._bar.start()

  def step(self, step: int) -> None:
    self._bar.update(self._task, completed=step)
    if time.monotonic() - self._drawn > 0.25:
      self._drawn = time.monotonic()
      self._bar.refresh()

  def update(self, step: int, figures: Mapping[str, Any]) -> None:
    self._bar.update(
        self._task, completed=step, refresh=True,
        text=_format_figures(step, total=self._total, figures=figures))

  def say(self, text: str) -> None:
    self._bar.console.print(text, markup=False, highlight=False)

  def close(self) -> None:
    self._bar.refresh()
    self._bar.stop()


def make_run_progress(total: int, first_step: int = 0, primary: bool = True,
                      stream: TextIO | None = None
                      ) -> ProgressLines | _ProgressBar:
  """Makes the object that shows the progress of a training run: a bar on a
  terminal, plain lines elsewhere, or only a few lines if the user wants
  milestones. It has the methods step, update, say and close.

  Args:
    total: the number of steps of the run, train.steps.
    first_step: the step at which the run starts or is resumed.
    primary: whether this is process 0; the others print nothing.
    stream: the stream to print to; None: stdout.
  """
  if not primary:
    return ProgressLines(total, open(os.devnull, 'w'))
  if are_milestones_wanted():
    return _ProgressMilestones(total, first_step)
  stream = stream or sys.stdout
  if stream.isatty():
    return _ProgressBar(total, first_step=first_step, stream=stream)
  return ProgressLines(total, stream)


@contextlib.contextmanager
def show_compilation(primary: bool = True):
  """Around a `with` block that compiles the first step, prints that it does,
  and afterwards how long it took.

  Args:
    primary: whether this is process 0; the others print nothing.
  """
  if not primary:
    yield
    return
  start = time.monotonic()
  if not sys.stderr.isatty():  # where `show_task` shows nothing
    print('compiling', flush=True)
  with show_task('compiling'):
    yield
  print(f'compiled in {time.monotonic() - start:.1f} s', flush=True)


def format_seconds(seconds: float) -> str:
  """Returns a number of seconds as hours, minutes and seconds: 1:02:03."""
  return str(datetime.timedelta(seconds=round(seconds)))


def _format_figures(step: int, total: int, figures: Mapping[str, Any]) -> str:
  """Formats the figures of a step that are known as one line, such as: loss
  3.1416 12,345 tokens/s  MFU 43.2%  1:02:03 left.

  Args:
    step: the number of the step.
    total: the last step of the run.
    figures: {name: figure}.
  """
  parts = []
  if 'loss' in figures:
    parts.append(f'loss {figures["loss"]:.4f}')
  if 'tokens_per_second' in figures:
    parts.append(f'{figures["tokens_per_second"]:,.0f} tokens/s')
  if figures.get('mfu') is not None:  # no peak is known of a CPU
    parts.append(f'MFU {figures["mfu"]:.1%}')
  if 'step_seconds' in figures:
    seconds_left = (total - step) * figures['step_seconds']
    parts.append(f'{format_seconds(seconds_left)} left')
  return '  '.join(parts)


# The times of steps.


class StepFigures(NamedTuple):
  """The figures of a step as numbers.

  Attributes:
    step: the number of the step.
    figures: {name: number, or nested list where several runs train as one}.
    done: the time at which the step was done, as the function `now` of
      DeferredFigures returns it.
  """
  step: int
  figures: dict[str, Any]
  done: Any


class DeferredFigures:
  """Holds a step's metrics until the next one is dispatched.

  Reading a result waits for it. Read one step late, the device has work while
  the host formats, logs and fetches the next batch.

  Args:
    now: a function that returns the time, such as StepTimer.now.
  """

  def __init__(self, now: Callable[[], Any]):
    # (step, its metrics, when it was done or None) of the step not yet read.
    self._unread: tuple[int, Mapping[str, Any], Any] | None = None
    self._now = now

  def push(self, step: int, metrics: Mapping[str, Any]) -> StepFigures | None:
    """Keeps the metrics of a step that has been dispatched, and returns those
    of the step before it. Reading them a step late keeps the devices busy.

    Args:
      step: the number of the step.
      metrics: its metrics, arrays that may not be computed yet.

    Returns:
      The figures of the step before; None at the first call.
    """
    import jax  # late: what only draws progress needs no jax
    # Begin to copy the metrics to the host, without waiting.
    arrays = jax.tree.leaves(metrics)
    for array in arrays:
      array.copy_to_host_async()
    # Read the step before, which waits until it is done. The time is taken only
    # after that.
    figures_of_step_before = self.flush()
    # A step is usually done when `flush` reads it, one call later. On a CPU it
    # is done here already, since it is computed while it is dispatched
    # (distributed/cpu.py): so its time is taken here.
    done = None
    if all(array.is_ready() for array in arrays):
      done = self._now()
    self._unread = step, metrics, done
    return figures_of_step_before

  def flush(self) -> StepFigures | None:
    """Waits until the last step is done, and returns its metrics, which `push`
    has kept. It must also be called before an evaluation, a save and the end.

    Returns:
      The figures of that step; None if they have been returned already, or if
      there was no step.
    """
    if self._unread is None:
      return None
    import jax  # late, as above
    step, metrics, done = self._unread
    self._unread = None
    arrays = jax.device_get(dict(metrics))
    figures = jax.tree.map(lambda x: x.tolist(), arrays)
    return StepFigures(step=step, figures=figures, done=done or self._now())


class StepTimer:
  """Measures the time of training steps, and the figures that follow from it: a
  lap is the time of some steps, less what was paused (evaluating, saving).

  Args:
    tokens_per_step: the tokens of the global batch.
    flops_per_step: the model FLOPs of a training step
      (training/costs/flops.py).
    peak_flops: the peak of all devices together (training/costs/flops.py), or
      None.
    clock: a function that returns seconds; tests pass their own.

  Attributes:
    compiled: the seconds of compiling since the last lap.
  """

  def __init__(self, tokens_per_step: int, flops_per_step: float,
               peak_flops: float | None,
               clock: Callable[[], float] = time.perf_counter):
    """Begins the first lap at step 0."""
    self._usual = (tokens_per_step, flops_per_step)
    self._peak = peak_flops
    self._clock = clock
    self._others: dict[int, tuple[int, float]] = {}
    self.compiled = self._paused = self._waited = 0.0
    self._pauses = 0
    self.begin(0)

  def now(self) -> tuple[float, float]:
    """Returns the seconds of training so far, without those that were paused,
    and how many of them were spent waiting for a batch."""
    return self._clock() - self._paused, self._waited

  @contextlib.contextmanager
  def compiling(self):
    """Times the compilation of a training or evaluation step: its seconds come
    once, in the next lap, and those of several compilations add up."""
    start = self._clock()
    with self.paused():
      yield
    self.compiled += self._clock() - start

  @contextlib.contextmanager
  def waiting(self):
    """Counts the time of the `with` block as spent waiting for a batch."""
    start = self._clock()
    yield
    self._waited += self._clock() - start

  @contextlib.contextmanager
  def paused(self):
    """Leaves the time of a `with` block out of the time of training steps. A
    pause within another one counts once: during an evaluation, which is a
    pause, a step may be compiled, which is one too."""
    start = self._clock()
    self._pauses += 1
    try:
      yield
    finally:
      self._pauses -= 1
      if not self._pauses:
        self._paused += self._clock() - start

  def note_work(self, step: int, tokens: int, flops: float) -> None:
    """Notes how many tokens and FLOPs a step has, where these are not the usual
    ones."""
    self._others[step] = tokens, flops

  def begin(self, step: int) -> None:
    """Starts the clock: `step` steps are done, the next one comes."""
    self._step, self._since = step, self.now()

  def lap(self, step: int, done: tuple[float, float]
          ) -> dict[str, float | None]:
    """Computes the times of a lap, which is all steps since the last lap, and
    begins the next one.

    Args:
      step: the last step of the lap.
      done: what `now` returned when that step was done: the seconds of training
        so far, and how many of them were spent waiting for a batch.

    Returns:
      The figures of the lap: step_seconds and data_seconds (of these, the
      seconds of waiting for data) of one step on average; tokens_per_second;
      mfu, the share of the devices' peak FLOPs that the model's FLOPs reach
      (Chowdhery et al. 2022), None if no peak is known; and compile_seconds, if
      something was compiled.
    """
    # Compute the seconds of this lap, and how many of them were spent waiting.
    # Pauses are in neither.
    end, waited_by_end = done
    start, waited_by_start = self._since
    seconds = end - start
    waited = waited_by_end - waited_by_start
    num_steps = step - self._step

    # Add up the tokens and FLOPs of its steps. `_others` has the steps whose
    # batches have another shape than usual (`note_work`).
    tokens = 0
    flops = 0
    for n in range(self._step + 1, step + 1):
      tokens_of_step, flops_of_step = self._others.pop(n, self._usual)
      tokens += tokens_of_step
      flops += flops_of_step

    # Report the seconds of compiling separately, and only once.
    figures: dict[str, float | None] = {
        'step_seconds': seconds / num_steps,
        'tokens_per_second': tokens / seconds,
        'data_seconds': waited / num_steps,
        'mfu': flops / seconds / self._peak if self._peak else None}
    if self.compiled:
      figures['compile_seconds'] = self.compiled
    self.compiled = 0.0
    self._step = step
    self._since = done
    return figures


def parse_profiled_steps(steps: str, total: float = math.inf
                         ) -> tuple[int, int] | None:
  """Parses the flag --profile_steps, 'START:STOP', which says which steps are
  traced with a profiler.

  Args:
    steps: the text of the flag.
    total: the number of steps of the run.

  Returns:
    The first step, and the step after the last one; None for ''.

  Raises:
    RequestError: for any other text, and for a START that the run does not
      reach.
  """
  if not steps:
    return None
  # The range must not be empty, and must begin before the run ends. STOP may
  # come after the last step.
  match = re.fullmatch('([0-9]{1,9}):([0-9]{1,9})', steps)
  if match is not None:
    start = int(match[1])
    stop = int(match[2])
    if start < stop and start < total:
      return start, stop
  raise RequestError(
      f'--profile_steps is {steps!r}: write '
      'START:STOP, such as 10:13 for steps 10, 11 and 12, with a START '
      f'below STOP and train.steps ({total})')
