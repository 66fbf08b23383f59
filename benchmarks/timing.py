"""How contenders are timed in one process: in turns, so that a busy machine
slows all of them alike."""

from collections.abc import Callable, Mapping
import statistics
import time
from typing import Any


def turns(contenders: Mapping[str, Callable[[], Any]], rounds: int
          ) -> dict[str, dict[str, float]]:
  """Returns of each contender its median time and CPU time, in seconds, and the
  medians of the turns' ratios to the first contender.

  Args:
    contenders: functions that wait for their result.
    rounds: how many turns each takes, after one that warms it up.
  """
  seconds = {name: [] for name in contenders}
  cpu = {name: [] for name in contenders}
  for turn in range(1 + rounds):
    for name, run in contenders.items():
      start, start_cpu = time.perf_counter(), time.process_time()
      run()
      if turn:
        cpu[name].append(time.process_time() - start_cpu)
        seconds[name].append(time.perf_counter() - start)
  first = next(iter(contenders))
  over = lambda times, name: statistics.median(
      own / base for own, base in zip(times[name], times[first]))
  return {name: dict(
      seconds=statistics.median(seconds[name]),
      cpu_seconds=statistics.median(cpu[name]),
      ratio=over(seconds, name), cpu_ratio=over(cpu, name))
          for name in contenders}
