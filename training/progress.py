"""How far a program is, for who watches it in a terminal.

It is drawn on stderr, below what is printed, and leaves nothing behind. Where
stderr is no terminal nothing is drawn at all, so a log, a pipe and --json hold
what the program prints and no more.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
import contextlib
import datetime
import os
import signal
import sys
import time
from typing import Any, TextIO, TypeVar

Item = TypeVar('Item')
_DRAWN_A_SECOND = 2  # by a thread, which takes time from the host's cores

_bar = None  # of this process: what is done inside another task has its line
_stop: Callable[[], bool] | None = None  # inside a run


class Stopped(Exception):
  """What `each` goes through is not wanted any more."""


@contextlib.contextmanager
def inside_a_run(stop: Callable[[], bool]) -> Iterator[None]:
  """While the `with` block runs nothing is drawn here, because the run has a
  bar of its own, and `each` raises Stopped as soon as `stop` says so."""
  global _stop
  _stop = stop
  try:
    yield
  finally:
    _stop = None


@contextlib.contextmanager
def during(text: str, total: int | None = None
           ) -> Iterator[Callable[[], None]]:
  """Shows what is being done while the `with` block runs, and for how long.

  Args:
    text: what is being done.
    total: in how many parts, where that is known.

  Yields:
    A function to call when one more part is done.
  """
  global _bar
  if _stop is not None or not sys.stderr.isatty():
    yield lambda: None
    return
  outermost = _bar is None
  if outermost:
    _bar = _make()
    _bar.start()
  task = _bar.add_task(text, total=total,
                       parts='' if total is None else f'0/{total}')
  done = 0

  def advance() -> None:
    nonlocal done
    done += 1
    of = '' if total is None else f'/{total}'
    _bar.update(task, completed=done, parts=f'{done}{of}')

  try:
    yield advance
  finally:
    _bar.remove_task(task)
    if outermost:
      _bar.stop()
      _bar = None


def each(items: Iterable[Item], text: str, total: int | None = None
         ) -> Iterator[Item]:
  """Yields `items`, and shows how many of them are done.

  Args:
    items: any.
    text: what is being done with them.
    total: how many there are; None: as len() says, if it does.
  """
  if total is None and isinstance(items, Sized):
    total = len(items)
  with during(text, total) as advance:
    for item in items:
      if _stop is not None and _stop():
        raise Stopped
      yield item
      advance()


def console(stream: TextIO):
  """Returns rich's console, which leaves the cursor alone: a process that is
  killed could not show it again."""
  from rich import console as rich_console

  class Console(rich_console.Console):

    def show_cursor(self, show: bool = True) -> bool:
      return False

  return Console(file=stream)


def _make():
  from rich import progress
  return progress.Progress(
      progress.TextColumn('{task.description}', markup=False),
      progress.BarColumn(), progress.TextColumn('{task.fields[parts]}'),
      progress.TimeElapsedColumn(), console=console(sys.stderr),
      transient=True, refresh_per_second=_DRAWN_A_SECOND,
      # What rich redirects goes to its console: to stderr.
      redirect_stdout=sys.stdout.isatty())


class _Lines:
  """Where there is no terminal: one plain line for each update."""

  def __init__(self, total: int, stream: TextIO):
    self._total, self._stream = total, stream

  def step(self, step: int) -> None:
    """Nothing: a line comes with figures."""

  def update(self, step: int, figures: Mapping[str, Any]) -> None:
    self.say(f'step {step}/{self._total}  {_text(step, self._total, figures)}')

  def say(self, text: str) -> None:
    try:
      print(text, file=self._stream, flush=True)
    except BrokenPipeError:
      _end_unread(self._stream)

  def close(self) -> None:
    self._stream.flush()


def _end_unread(stream: TextIO) -> None:
  """Ends the run as SIGTERM does, so that it is saved, where nobody reads what
  it prints any more: `| head` has read enough, or `| tee` was killed."""
  with open(os.devnull, 'w') as nowhere:
    os.dup2(nowhere.fileno(), stream.fileno())
  with contextlib.suppress(OSError):
    print('nobody reads what this program prints', file=sys.stderr, flush=True)
  os.kill(os.getpid(), signal.SIGTERM)


class _Bar:
  """On a terminal: step, loss, tokens/s, time left, redrawn in place."""

  def __init__(self, total: int, first: int, stream: TextIO):
    from rich import progress
    self._total = total
    # No thread of its own: it would take time from the host's two cores.
    self._bar = progress.Progress(
        progress.TextColumn('step'), progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=None), progress.TextColumn(
            '{task.fields[text]}'), console=console(stream),
        auto_refresh=False,
        redirect_stderr=sys.stderr.isatty())
    self._task = self._bar.add_task('', total=total, completed=first, text='')
    self._drawn = 0.0
    self._bar.start()

  def step(self, step: int) -> None:
    self._bar.update(self._task, completed=step)
    if time.monotonic() - self._drawn > 0.25:
      self._draw()

  def update(self, step: int, figures: Mapping[str, Any]) -> None:
    self._bar.update(self._task, completed=step,
                     text=_text(step, self._total, figures))
    self._draw()

  def say(self, text: str) -> None:
    self._bar.console.print(text, markup=False, highlight=False)

  def close(self) -> None:
    self._draw()
    self._bar.stop()

  def _draw(self):
    self._drawn = time.monotonic()
    self._bar.refresh()


def bar(total: int, first: int = 0, primary: bool = True,
        stream: TextIO | None = None) -> _Lines | _Bar:
  """Returns what shows a run's progress: step(), update(), say(), close().

  Args:
    total: train.steps.
    first: the step that the run starts or resumes at.
    primary: whether this is process 0; the others print nothing.
    stream: where to; stdout by default.
  """
  stream = stream or sys.stdout
  if not primary:
    return _Lines(total, open(os.devnull, 'w'))
  return (_Bar(total, first, stream) if stream.isatty()
          else _Lines(total, stream))


@contextlib.contextmanager
def compiling(primary: bool = True):
  """Around what is compiled before the first step: says so, and how long it
  took."""
  if not primary:
    yield
    return
  start = time.monotonic()
  if not sys.stderr.isatty():  # where `during` shows nothing
    print('compiling', flush=True)
  with during('compiling'):
    yield
  print(f'compiled in {time.monotonic() - start:.1f} s', flush=True)


def _text(step: int, total: int, figures: Mapping[str, Any]) -> str:
  """loss 3.1416  12,345 tokens/s  MFU 43.2%  1:02:03 left, as far as known."""
  parts = []
  if 'loss' in figures:
    parts.append(f'loss {figures["loss"]:.4f}')
  if 'tokens_per_second' in figures:
    parts.append(f'{figures["tokens_per_second"]:,.0f} tokens/s')
  if figures.get('mfu') is not None:  # no peak is known of a CPU
    parts.append(f'MFU {figures["mfu"]:.1%}')
  if 'step_seconds' in figures:
    left = ((total - step) * figures['step_seconds']
            + figures.get('evaluation_left', 0))
    parts.append(f'{datetime.timedelta(seconds=round(left))} left')
  return '  '.join(parts)
