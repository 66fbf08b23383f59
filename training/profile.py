"""--profile_steps=10:13 traces steps 10, 11 and 12 into WORKDIR/profile.

The trace is xprof's: pip install xprof, then xprof --logdir WORKDIR/profile,
or TensorBoard's profile plugin.
"""

import math
import re
from typing import Any

from etils import epath
import jax

from configs.errors import RequestError
from training.workdir import storage


def parse(steps: str, total: float = math.inf) -> tuple[int, int] | None:
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
    self._range = parse(steps)
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
