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


class WorkStopped(Exception):
  """The work that `each` goes through is not wanted any more."""


@contextlib.contextmanager
def stop_work_of_run(stop: Callable[[], bool]) -> Iterator[None]:
  """While the `with` block runs nothing is drawn here, because the run has a
  bar of its own, and `each` raises Stopped as soon as `stop` says so."""
  global _should_stop
  _should_stop = stop
  try:
    yield
  finally:
    _should_stop = None


@contextlib.contextmanager
def show_task(text: str, total: int | None = None
              ) -> Iterator[Callable[[], None]]:
  """Shows what is being done while the `with` block runs, and for how long.

  Args:
    text: the words for what is being done.
    total: the number of its parts, where that is known.

  Yields:
    A function to call when one more part is done.
  """
  global _tasks_bar
  if _should_stop is not None or not sys.stderr.isatty():
    yield lambda: None
    return
  # One bar shows everything that is under way.
  outermost = _tasks_bar is None
  if outermost:
    _tasks_bar = _make_tasks_bar()
    _tasks_bar.start()
  task = _tasks_bar.add_task(text, total=total)
  try:
    yield lambda: _tasks_bar.advance(task)
  finally:
    _tasks_bar.remove_task(task)
    if outermost:
      _tasks_bar.stop()
      _tasks_bar = None


def _make_tasks_bar() -> Any:
  """Returns rich's bar on stderr, which has a line for each task."""
  from rich import progress
  columns = [
      progress.TextColumn('{task.description}', markup=False),
      progress.BarColumn(),
      progress.MofNCompleteColumn(),
      progress.TimeElapsedColumn(),
  ]
  # rich prints what it redirects on its console: to stderr.
  redirects = sys.stdout.isatty()
  return progress.Progress(
      *columns, console=_make_console(sys.stderr), transient=True,
      refresh_per_second=_REDRAWS_PER_SECOND, redirect_stdout=redirects)


def show_items(items: Iterable[Item], text: str, total: int | None = None
               ) -> Iterator[Item]:
  """Yields `items`, and shows how many of them are done.

  Args:
    items: any items.
    text: the words for what is being done with them.
    total: the number of items; None: as len() says, if it does.
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
  """Returns rich's console, which leaves the cursor alone: a process that is
  killed could not show it again."""
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
    text = _format_figures(step, self._total, figures)
    self.say(f'step {step}/{self._total}  {text}')

  def say(self, text: str) -> None:
    print(text, file=self._stream, flush=True)

  def close(self) -> None:
    self._stream.flush()


class _ProgressBar:
  """The progress of a run on a terminal: step, loss, tokens/s and time left,
  redrawn in place."""

  def __init__(self, total: int, first: int, stream: TextIO):
    """Makes the bar, at the step from which the run goes on."""
    from rich import progress
    self._total = total
    self._bar = progress.Progress(
        progress.TextColumn('step'),
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=None),
        progress.TextColumn('{task.fields[text]}'),
        console=_make_console(stream),
        # No thread of its own: it would take time from the host's two cores.
        auto_refresh=False,
        redirect_stderr=sys.stderr.isatty())
    self._task = self._bar.add_task('', total=total, completed=first, text='')
    self._drawn = 0.0
    self._bar.start()

  def step(self, step: int) -> None:
    self._bar.update(self._task, completed=step)
    if time.monotonic() - self._drawn > 0.25:
      self._drawn = time.monotonic()
      self._bar.refresh()

  def update(self, step: int, figures: Mapping[str, Any]) -> None:
    self._bar.update(self._task, completed=step, refresh=True,
                     text=_format_figures(step, self._total, figures))

  def say(self, text: str) -> None:
    self._bar.console.print(text, markup=False, highlight=False)

  def close(self) -> None:
    self._bar.refresh()
    self._bar.stop()


def make_run_progress(total: int, first: int = 0, primary: bool = True,
                      stream: TextIO | None = None
                      ) -> ProgressLines | _ProgressBar:
  """Returns what shows a run's progress: step(), update(), say(), close().

  Args:
    total: train.steps.
    first: the step that the run starts or resumes at.
    primary: whether this is process 0; the others print nothing.
    stream: the stream to print to; None: stdout.
  """
  if not primary:
    return ProgressLines(total, open(os.devnull, 'w'))
  stream = stream or sys.stdout
  if stream.isatty():
    return _ProgressBar(total, first, stream)
  return ProgressLines(total, stream)


@contextlib.contextmanager
def show_compilation(primary: bool = True):
  """Says that the `with` block compiles, before the first step, and how long
  it took; process 0 alone does."""
  if not primary:
    yield
    return
  start = time.monotonic()
  if not sys.stderr.isatty():  # where `during` shows nothing
    print('compiling', flush=True)
  with show_task('compiling'):
    yield
  print(f'compiled in {time.monotonic() - start:.1f} s', flush=True)


def format_seconds(seconds: float) -> str:
  """Returns a time as 1:02:03."""
  return str(datetime.timedelta(seconds=round(seconds)))


def _format_figures(step: int, total: int, figures: Mapping[str, Any]) -> str:
  """Returns the figures that are known in one line: loss 3.1416  12,345
  tokens/s  MFU 43.2%  1:02:03 left."""
  parts = []
  if 'loss' in figures:
    parts.append(f'loss {figures["loss"]:.4f}')
  if 'tokens_per_second' in figures:
    parts.append(f'{figures["tokens_per_second"]:,.0f} tokens/s')
  if figures.get('mfu') is not None:  # no peak is known of a CPU
    parts.append(f'MFU {figures["mfu"]:.1%}')
  if 'step_seconds' in figures:
    seconds = (total - step) * figures['step_seconds']
    parts.append(f'{format_seconds(seconds)} left')
  return '  '.join(parts)


# The times of steps.


class StepFigures(NamedTuple):
  """The figures of a step, and when it was done."""
  step: int
  figures: dict[str, Any]
  done: Any


class DeferredFigures:
  """Holds a step's metrics until the next one is dispatched.

  Reading a result waits for it. Read one step late, the device has work while
  the host formats, logs and fetches the next batch.

  Args:
    now: a function that returns the time, such as Meter.now.
  """

  def __init__(self, now: Callable[[], Any]):
    self._waiting: tuple[int, Mapping[str, Any], Any] | None = None
    self._now = now

  def push(self, step: int, metrics: Mapping[str, Any]) -> StepFigures | None:
    """Takes the metrics of `step`, jax arrays, which has been dispatched;
    returns those of the last one, None at the first call."""
    import jax  # late: what only draws progress needs no jax
    leaves = jax.tree.leaves(metrics)
    for value in leaves:
      value.copy_to_host_async()
    # Before the time of this step is taken: it is done after the last one.
    read = self.flush()
    # A CPU computes in the thread that dispatches (distributed/cpu.py):
    # there the step is done by now, and not when it is read, a step later.
    done = None
    if all(x.is_ready() for x in leaves):
      done = self._now()
    self._waiting = step, metrics, done
    return read

  def flush(self) -> StepFigures | None:
    """Returns what is held, or None: before evaluating, saving and ending."""
    if self._waiting is None:
      return None
    import jax
    step, metrics, done = self._waiting
    self._waiting = None
    arrays = jax.device_get(dict(metrics))
    figures = jax.tree.map(lambda x: x.tolist(), arrays)
    return StepFigures(step=step, figures=figures, done=done or self._now())


class StepTimer:
  """Times steps: between laps, less what is paused (evaluation, saving).

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
    """Returns the seconds so far, less those that were paused, and how many of
    them waited for a batch."""
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
    """Times the fetch of the next batch."""
    start = self._clock()
    yield
    self._waited += self._clock() - start

  @contextlib.contextmanager
  def paused(self):
    """Leaves out the time of what is no training step. A pause within another
    one counts once: an evaluation may compile its step for rows of another
    length."""
    start = self._clock()
    self._pauses += 1
    try:
      yield
    finally:
      self._pauses -= 1
      if not self._pauses:
        self._paused += self._clock() - start

  def note_work(self, step: int, tokens: int, flops: float) -> None:
    """Notes the work of a step, where that is not what most steps have."""
    self._others[step] = tokens, flops

  def begin(self, step: int) -> None:
    """Starts the clock: `step` steps are done, the next one comes."""
    self._step, self._since = step, self.now()

  def lap(self, step: int, done: tuple[float, float]
          ) -> dict[str, float | None]:
    """Returns the figures since the last lap; `done` is what `now` was when
    `step` was done."""
    # The time and the work of the steps since then.
    end, waited_by_end = done
    start, waited_by_start = self._since
    seconds = end - start
    waited = waited_by_end - waited_by_start
    steps = step - self._step
    tokens = 0
    flops = 0
    for n in range(self._step + 1, step + 1):
      tokens_of_step, flops_of_step = self._others.pop(n, self._usual)
      tokens += tokens_of_step
      flops += flops_of_step

    # Seconds of compiling are told once, apart from those of steps.
    figures: dict[str, float | None] = {
        'step_seconds': seconds / steps,
        'tokens_per_second': tokens / seconds,
        'data_seconds': waited / steps,
        'mfu': flops / seconds / self._peak if self._peak else None}
    if self.compiled:
      figures['compile_seconds'] = self.compiled
    self.compiled = 0.0
    self._step = step
    self._since = done
    return figures


def parse_profiled_steps(steps: str, total: float = math.inf
                         ) -> tuple[int, int] | None:
  """Parses 'START:STOP', as a slice of a run's `total` steps; '': no profile.

  Raises:
    RequestError: for anything else.
  """
  if not steps:
    return None
  match = re.fullmatch('([0-9]{1,9}):([0-9]{1,9})', steps)
  # A profile begins before the run ends.
  if match is not None:
    start = int(match[1])
    stop = int(match[2])
    if start < stop and start < total:
      return start, stop
  raise RequestError(
      f'--profile_steps is {steps!r}: write '
      'START:STOP, such as 10:13 for steps 10, 11 and 12, with a START '
      f'below STOP and train.steps ({total})')
