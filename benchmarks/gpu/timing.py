"""How both sides time a step, and the errors that both tell apart."""

from collections.abc import Callable
import statistics
import time
from typing import Any

WINDOWS = 3


def windows(take: Callable[[], Any], wait: Callable[[Any], Any],
            seconds: float) -> dict[str, float]:
  """Times what is queued without waiting, as a training loop does.

  Args:
    take: starts one step; returns what can be waited for.
    wait: waits for that.
    seconds: about how long a window of several steps is to take.

  Returns:
    The median and the least over the windows of a step's seconds, and how many
    steps were timed. Two steps before them are not.
  """
  wait(take())
  start = time.perf_counter()
  wait(take())
  count = max(1, round(seconds / (time.perf_counter() - start)))
  each = []
  for _ in range(WINDOWS):
    start = time.perf_counter()
    for _ in range(count):
      last = take()
    wait(last)
    each.append((time.perf_counter() - start) / count)
  return dict(step_s=statistics.median(each), least_s=min(each),
              steps=count * WINDOWS)


def sentence(error: BaseException) -> str:
  """Returns the kind of an error and its first line, as a page shows it."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  text = ': '.join([type(error).__name__, *lines[:1]])
  return text if len(text) <= 400 else text[:397] + '...'
