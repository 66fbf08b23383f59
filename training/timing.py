"""The times of training steps, whose figures are read a step late; and their
traces: --profile_steps=10:13 traces steps 10, 11 and 12 into WORKDIR/profile.

The trace is xprof's: pip install xprof, then xprof --logdir WORKDIR/profile,
or TensorBoard's profile plugin.
"""

from collections.abc import Callable, Mapping
import contextlib
import math
import re
import time
from typing import Any, NamedTuple

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from configs.errors import RequestError
from training.workdir import storage


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

  def __init__(self, now: Callable[[], Any]):
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
    # A CPU computes in the thread that dispatches (distributed/cpu.py):
    # there the step is done by now, and not when it is read, a step later.
    done = self._now() if all(x.is_ready() for x in leaves) else None
    return self._swap((step, metrics, done), done)

  def flush(self) -> Read | None:
    """Returns what is held, or None: before evaluating, saving and ending."""
    return self._swap(None, None)

  def _swap(self, new: Any, by: Any):
    """Holds `new` instead of what is held, which is returned; `by` is when it
    is known to have been done, None: it is waited for."""
    held = self._held
    read = None
    if held is not None:
      step, metrics, done, seen = held
      figures = jax.tree.map(_host, jax.device_get(dict(metrics)))
      if done is None and by is not None:
        # It was done after its own push and before `by`, as the step after it
        # was: halfway, so that no step takes no time.
        done = tuple((x + y) / 2 for x, y in zip(seen, by))
      read = Read(step, figures, done or self._now())
    self._held = None if new is None else (*new, self._now())
    return read


class Recurring:
  """Times what is done after some of the steps, such as an evaluation, to know
  how long those that are still to come will take.

  Args:
    every: it is done after each multiple of this many steps; 0: after none.
    last: the last step.
    at_last: whether it is done after the last step, too.
    clock: seconds, for tests.
  """

  def __init__(self, every: int, last: int, at_last: bool,
               clock: Callable[[], float] = time.perf_counter):
    self._every, self._last, self._at_last = every, last, at_last
    self._clock, self._seconds = clock, 0.0

  def due(self, step: int) -> bool:
    """Whether it is done after `step`."""
    return (self._at_last and step == self._last
            or bool(self._every) and step % self._every == 0)

  @contextlib.contextmanager
  def timed(self):
    """Around doing it."""
    start = self._clock()
    yield
    self._seconds = self._clock() - start

  def left(self, step: int) -> float:
    """Returns the seconds of those that come after `step`, each as long as the
    newest one, because the first may have compiled; 0 before there was one."""
    count = (self._last // self._every - step // self._every
             if self._every else 0)
    also_last = step < self._last and self.due(self._last) and (
        not self._every or self._last % self._every > 0)
    return self._seconds * (count + also_last)


class Meter:
  """Times steps: between laps, less what is paused (evaluation, saving)."""

  def __init__(self, tokens_per_step: int, flops_per_step: float,
               peak_flops: float | None,
               clock: Callable[[], float] = time.perf_counter):
    """Args:
      tokens_per_step: the global batch's tokens.
      flops_per_step: model FLOPs of a training step (training/costs/flops.py).
      peak_flops: of all devices together (training/costs/flops.py), or None.
      clock: seconds, for tests.
    """
    self._tokens = tokens_per_step
    self._flops = flops_per_step
    self._peak = peak_flops
    self._clock = clock
    self._others: dict[int, tuple[int, float]] = {}
    self._once = {}
    self._paused, self._pauses = 0.0, 0
    self._waited = 0.0
    self.begin(0)

  def now(self) -> tuple[float, float]:
    """Returns (seconds so far, less the paused; those of them that waited)."""
    return self._clock() - self._paused, self._waited

  @contextlib.contextmanager
  def compiling(self):
    """Around the compilation of a training or evaluation step: its seconds
    come once, in the next lap, and those of several compilations add up."""
    start = self._clock()
    with self.paused():
      yield
    before = self._once.get('compile_seconds', 0.0)
    self._once['compile_seconds'] = before + self._clock() - start

  @contextlib.contextmanager
  def waiting(self):
    """Around the fetch of the next batch."""
    start = self._clock()
    yield
    self._waited += self._clock() - start

  @contextlib.contextmanager
  def paused(self):
    """Around what is no training step. A pause within another one counts
    once: an evaluation may compile its step for rows of another length."""
    start = self._clock()
    self._pauses += 1
    try:
      yield
    finally:
      self._pauses -= 1
      if not self._pauses:
        self._paused += self._clock() - start

  def does(self, step: int, tokens: int, flops: float) -> None:
    """Takes what a step has to do, where that is not what most have."""
    self._others[step] = tokens, flops

  def begin(self, step: int) -> None:
    """Starts the clock: `step` steps are done, the next one comes."""
    self._step, self._since = step, self.now()

  def lap(self, step: int, done: tuple[float, float]
          ) -> dict[str, float | None]:
    """Returns the figures since the last lap; `done` is what `now` was when
    `step` was done."""
    steps = step - self._step
    seconds, waited = (y - x for x, y in zip(self._since, done))
    work = [self._others.pop(n, (self._tokens, self._flops))
            for n in range(self._step + 1, step + 1)]
    tokens, flops = map(sum, zip(*work))
    figures = {
        'step_seconds': seconds / steps,
        'tokens_per_second': tokens / seconds,
        'data_seconds': waited / steps,
        'mfu': flops / seconds / self._peak if self._peak else None,
        **self._once,
    }
    self._once = {}
    self._step, self._since = step, done
    return figures


def slowest(figures: Mapping[str, Any],
            names: Any = ('data_seconds', 'compile_seconds')) -> dict[str, Any]:
  """Returns `figures` with `names` at the worst of all processes.

  A collective: every process calls it, at the same steps, with the same keys.
  What the step computed is the same everywhere already.
  """
  figures = dict(figures)
  names = [name for name in names if name in figures]
  if jax.process_count() > 1 and names:
    own = np.array([figures[name] for name in names], np.float32)
    worst = multihost_utils.process_allgather(own).max(axis=0)
    figures.update(zip(names, worst.tolist()))
  return figures


def _host(x: np.ndarray):
  return x.item() if x.ndim == 0 else x.tolist()


def profiled_steps(steps: str, total: float = math.inf
                   ) -> tuple[int, int] | None:
  """Parses 'START:STOP', as a slice of a run's `total` steps; '': no profile.

  Raises:
    ValueError: a sentence, for anything else.
  """
  if not steps:
    return None
  match = re.fullmatch('([0-9]{1,9}):([0-9]{1,9})', steps)
  if not match:
    raise RequestError(f'--profile_steps is {steps!r}: write START:STOP, such '
                       'as 10:13 for steps 10, 11 and 12')
  start, stop = int(match[1]), int(match[2])
  if start >= stop:
    raise RequestError(f'--profile_steps is {steps!r}, which holds no step: '
                       'STOP must be greater than START')
  if start >= total:
    raise RequestError(f'--profile_steps is {steps!r}, but the last of the '
                       f'{total} steps (train.steps) is number {total - 1}')
  return start, stop


class Profiler:
  """Starts and stops the trace; the loop calls it before every step."""

  def __init__(self, steps: str, workdir: epath.Path):
    self._range = profiled_steps(steps)
    self._files = storage.Uploads(storage.path(workdir) / 'profile')
    self._on = False

  def before(self, step: int, state: Any) -> None:
    """Called before `step` is dispatched, with the state that goes in."""
    if self._range is None:
      return
    start, stop = self._range
    if self._on and step >= stop:
      self.close(state)
    # A run that resumes inside the range traces what is left of it.
    elif not self._on and start <= step < stop:
      jax.block_until_ready(state)  # no work of earlier steps in the trace
      jax.profiler.start_trace(str(self._files.local))
      self._on = True

  def annotate(self, step: int):
    """A context around the dispatch, so that the trace knows its steps."""
    return jax.profiler.StepTraceAnnotation('train', step_num=step)

  def close(self, state: Any) -> None:
    """Ends a trace that is under way, with the work dispatched so far."""
    if self._on:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      self._files.push()
      self._on = False
