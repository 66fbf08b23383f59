"""Runs a side of a comparison as a process of its own, which does one job at a
time: so that two sides alternate, and the peak memory of each is its own.

  python -m benchmarks.worker SIDE   (ours, pytorch; a request on stdin)
"""

from collections.abc import Callable, Mapping
import importlib
import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np

from common.errors import EnvironmentFailure, RequestError


def time_function(function: Callable[[], Any]) -> dict[str, float]:
  """Calls a function once, and returns how long that took.

  Args:
    function: a function that waits for its result.

  Returns:
    seconds: the wall-clock time.
    cpu_seconds: the CPU time of all threads of this process together.
  """
  start = time.perf_counter()
  start_cpu = time.process_time()
  function()
  return dict(seconds=time.perf_counter() - start,
              cpu_seconds=time.process_time() - start_cpu)


def time_in_turns(contenders: Mapping[str, Any], rounds: int,
                  measure: Callable[[Any], dict[str, float]] = time_function
                  ) -> dict[str, dict[str, float]]:
  """Measures contenders in turns, so that a busy machine slows all alike.

  Args:
    contenders: what is timed, by name; ratios are taken to the first one.
    rounds: how many turns each contender takes, after one that warms it up.
    measure: the function that times one turn of a contender; it returns
      `seconds`, `cpu_seconds` and any other figures.

  Returns:
    The figures of each contender, by its name:
    seconds, cpu_seconds: the medians over its turns.
    least_seconds: the time of its fastest turn.
    ratio, cpu_ratio: the medians over the turns of its time divided by that of
      the first contender in the same round.
    Any other figure that was measured is that of the last turn.
  """
  # Measure a turn of each contender, and then the next turn of each.
  measured_turns: dict[str, list[dict[str, float]]] = {
      name: [] for name in contenders}
  for _ in range(1 + rounds):
    for name, contender in contenders.items():
      measured_turns[name].append(measure(contender))

  # Summarise the turns. Ratios are taken turn by turn, to the first contender.
  figures: dict[str, dict[str, float]] = {}
  first_seconds = first_cpu_seconds = None
  for name, turns in measured_turns.items():
    # The first turn compiles and warms up, so it does not count.
    seconds = np.array([turn['seconds'] for turn in turns[1:]])
    cpu_seconds = np.array([turn['cpu_seconds'] for turn in turns[1:]])
    if first_seconds is None:
      first_seconds = seconds
      first_cpu_seconds = cpu_seconds
    figures[name] = turns[-1] | dict(
        seconds=float(np.median(seconds)),
        cpu_seconds=float(np.median(cpu_seconds)),
        ratio=float(np.median(seconds / first_seconds)),
        cpu_ratio=float(np.median(cpu_seconds / first_cpu_seconds)),
        least_seconds=float(seconds.min()))
  return figures


class Worker:
  """A process that runs one side of a comparison, and does one job at a time.

  It is a context manager: leaving the context ends the process.
  """

  def __init__(self, side: str, request: dict):
    """Starts the process, and waits until its training step is compiled.

    Args:
      side: the module of benchmarks/ that has the side's Trainer.
      request: the request from which the Trainer is made, as JSON.
    """
    self.side = side
    self.process = subprocess.Popen(
        [sys.executable, '-m', 'benchmarks.worker', side],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # The first job is the request. The process replies to it when its training
    # step is compiled.
    self.do(request)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    if self.process.poll() is None:
      self._send(None)
    self.process.communicate()

  def do(self, job: Any) -> dict:
    """Hands a job to the process, waits for it, and returns its figures.

    Args:
      job: 'step' or 'generate'; the first job is the request itself.

    Returns:
      The `seconds` and `cpu_seconds` of the job, and the `peak_bytes` of memory
      that the process has held until then.

    Raises:
      RequestError: if the side refuses the request; the message says why.
      EnvironmentFailure: if the job fails, for example because the memory of a
        GPU is too small; the message says why.
    """
    self._send(job)
    for line in self.process.stdout:
      # Libraries print lines too. Only an answer is a line of JSON.
      if not line.startswith('{'):
        continue
      message = json.loads(line)
      if 'refused' in message:
        raise RequestError(message['refused'])
      if 'failed' in message:
        raise EnvironmentFailure(message['failed'])
      return message
    raise EnvironmentFailure(
        f'the {self.side} side ended with exit code {self.process.wait()}')

  def _send(self, message):
    self.process.stdin.write(json.dumps(message) + '\n')
    self.process.stdin.flush()


def _answer(**message: Any) -> None:
  """Prints an answer, as one line of JSON, for the process that gave the job.
  """
  print(json.dumps(message), flush=True)


def main() -> None:
  """Reads a request and then jobs from stdin, and answers each with a line."""
  side = importlib.import_module(f'benchmarks.{sys.argv[1]}')
  try:
    # Make the trainer. The first step compiles, and is taken before any job is
    # timed.
    request = json.loads(sys.stdin.readline())
    trainer = side.Trainer(request)
    trainer.step()

    def generate() -> None:
      trainer.generate(request['prompt'], request['new'])

    # Do one job for each line, until a line is null.
    jobs = {'step': trainer.step, 'generate': generate}
    _answer(ready=True)
    for line in sys.stdin:
      job = json.loads(line)
      if job is None:
        break
      times = time_function(jobs[job])
      usage = resource.getrusage(resource.RUSAGE_SELF)
      peak_bytes = 1024 * usage.ru_maxrss  # Linux counts in KiB
      _answer(**times, peak_bytes=peak_bytes)
  # The process that gave the jobs raises these errors again.
  except RequestError as error:
    _answer(refused=str(error))
  except Exception as error:
    reason = ' '.join(str(error).split())[:400]
    _answer(failed=f'{type(error).__name__}: {reason}')
    raise


if __name__ == '__main__':
  main()
