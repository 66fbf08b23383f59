"""Watching a run: the clock, figures read a step late, the progress bar."""

from collections.abc import Mapping
import contextlib
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from training import progress as terminal


class Read(NamedTuple):
  """What a step has come to: its figures, and when it was done."""
  step: int
  figures: dict[str, Any]
  done: Any


class Deferred:
  """Holds a step's metrics until the next one is dispatched.

  Reading a result waits for it. Read one step late, the device has work while
  the host formats, logs and fetches the next batch.
  """

  def __init__(self, now):
    """Args:
      now: Meter.now, or what else tells when a step was done.
    """
    self._held = None
    self._now = now

  def push(self, step: int, metrics: Mapping[str, jax.Array]) -> Read | None:
    """Takes the metrics of `step`; returns those of the last one.

    Call it when `step` has been dispatched. None at the first call.
    """
    leaves = jax.tree.leaves(metrics)
    for value in leaves:
      value.copy_to_host_async()
    # A CPU computes in the thread that dispatches (distributed/malloc.py):
    # there the step is done by now, and not when it is read, a step later.
    done = self._now() if all(x.is_ready() for x in leaves) else None
    return self._swap((step, metrics, done))

  def flush(self) -> Read | None:
    """Returns what is held, or None: before evaluating, saving and ending."""
    return self._swap(None)

  def _swap(self, new):
    held, self._held = self._held, new
    if held is None:
      return None
    step, metrics, done = held
    figures = jax.tree.map(_host, jax.device_get(dict(metrics)))
    return Read(step, figures, done or self._now())


class Meter:
  """Times steps: between laps, less what is paused (evaluation, saving)."""

  def __init__(self, tokens_per_step: int, flops_per_step: float,
               peak_flops: float | None, clock=time.perf_counter):
    """Args:
      tokens_per_step: the global batch's tokens.
      flops_per_step: model FLOPs of a training step (training/costs/flops.py).
      peak_flops: of all devices together (training/costs/peaks.py), or None.
      clock: seconds, for tests.
    """
    self._tokens = tokens_per_step
    self._flops = flops_per_step
    self._peak = peak_flops
    self._clock = clock
    self._once = {}
    self._paused = 0.0
    self._waited = 0.0
    self.begin(0)

  def now(self) -> tuple[float, float]:
    """Returns (seconds so far, less the paused; those of them that waited)."""
    return self._clock() - self._paused, self._waited

  @contextlib.contextmanager
  def compiling(self):
    """Around the compilation of the training step, alone of all that a run
    compiles: its seconds come once, in the next lap."""
    start = self._clock()
    with self.paused():
      yield
    self._once['compile_seconds'] = self._clock() - start

  @contextlib.contextmanager
  def waiting(self):
    """Around the fetch of the next batch."""
    start = self._clock()
    yield
    self._waited += self._clock() - start

  @contextlib.contextmanager
  def paused(self):
    """Around what is no training step."""
    start = self._clock()
    yield
    self._paused += self._clock() - start

  def begin(self, step: int) -> None:
    """Starts the clock: `step` steps are done, the next one comes."""
    self._step, self._since = step, self.now()

  def lap(self, step: int, done: tuple[float, float]
          ) -> dict[str, float | None]:
    """Returns the figures since the last lap; `done` is what `now` was when
    `step` was done."""
    steps = step - self._step
    seconds, waited = (y - x for x, y in zip(self._since, done))
    each = seconds / steps
    figures = {
        'step_seconds': each,
        'tokens_per_second': self._tokens / each,
        'data_seconds': waited / steps,
        'mfu': self._flops / each / self._peak if self._peak else None,
        **self._once,
    }
    self._once = {}
    self._step, self._since = step, done
    return figures


def slowest(figures: Mapping[str, Any],
            names=('data_seconds', 'compile_seconds')) -> dict[str, Any]:
  """Returns `figures` with `names` at the worst of all processes.

  A collective: every process calls it, at the same steps, with the same keys.
  What the step computed is the same everywhere already.
  """
  figures = dict(figures)
  names = [name for name in names if name in figures]
  if jax.process_count() > 1 and names:
    from jax.experimental import multihost_utils
    own = np.array([figures[name] for name in names], np.float32)
    worst = multihost_utils.process_allgather(own).max(axis=0)
    figures.update(zip(names, worst.tolist()))
  return figures


class _Lines:
  """Where there is no terminal: one plain line for each update."""

  def __init__(self, total: int, stream):
    self._total, self._stream = total, stream

  def step(self, step: int) -> None:
    """Nothing: a line comes with figures."""

  def update(self, step: int, figures: Mapping[str, Any]) -> None:
    self.say(f'step {step}/{self._total}  {_text(step, self._total, figures)}')

  def say(self, text: str) -> None:
    print(text, file=self._stream, flush=True)

  def close(self) -> None:
    self._stream.flush()


class _Bar:
  """On a terminal: step, loss, tokens/s, time left, redrawn in place."""

  def __init__(self, total: int, first: int, stream):
    from rich import progress as rich_progress
    self._total = total
    # No thread of its own: it would take time from the host's two cores.
    self._bar = rich_progress.Progress(
        rich_progress.TextColumn('step'), rich_progress.MofNCompleteColumn(),
        rich_progress.BarColumn(bar_width=None), rich_progress.TextColumn(
            '{task.fields[text]}'), console=terminal.console(stream),
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


class _Silent:
  """On every process but the first."""

  def step(self, step: int) -> None:
    pass

  def update(self, step: int, figures: Mapping[str, Any]) -> None:
    pass

  def say(self, text: str) -> None:
    pass

  def close(self) -> None:
    pass


def progress(total: int, first: int = 0, primary: bool = True, stream=None):
  """Returns what shows a run's progress: step(), update(), say(), close().

  Args:
    total: train.steps.
    first: the step that the run starts or resumes at.
    primary: whether this is process 0; the others print nothing.
    stream: where to; stdout by default.
  """
  stream = stream or sys.stdout
  if not primary:
    return _Silent()
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
  with terminal.during('compiling'):
    yield
  print(f'compiled in {time.monotonic() - start:.1f} s', flush=True)


def _text(step: int, total: int, figures: Mapping[str, Any]) -> str:
  """loss 3.1416  12.3k tokens/s  MFU 43.2%  1:02:03 left, as far as known."""
  parts = []
  if 'loss' in figures:
    parts.append(f'loss {figures["loss"]:.4f}')
  if 'tokens_per_second' in figures:
    parts.append(f'{_short(figures["tokens_per_second"])} tokens/s')
  if figures.get('mfu') is not None:  # no peak is known of a CPU
    parts.append(f'MFU {figures["mfu"]:.1%}')
  if 'step_seconds' in figures:
    parts.append(_duration((total - step) * figures['step_seconds']) + ' left')
  return '  '.join(parts)


def _short(x: float) -> str:
  for unit in ('', 'k', 'M'):
    if x < 1000:
      return f'{x:.3g}{unit}'
    x /= 1000
  return f'{x:.3g}G'


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (f'{hours}:{minutes:02}:{seconds:02}' if hours
          else f'{minutes}:{seconds:02}')


def _host(x: np.ndarray):
  return x.item() if x.ndim == 0 else x.tolist()
