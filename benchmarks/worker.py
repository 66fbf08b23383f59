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


def timed(run: Callable[[], Any]) -> dict[str, float]:
  """Returns {seconds, cpu_seconds} of a function that waits for its result; the
  second is what all of its threads took together."""
  start, start_cpu = time.perf_counter(), time.process_time()
  run()
  return dict(seconds=time.perf_counter() - start,
              cpu_seconds=time.process_time() - start_cpu)


def turns(contenders: Mapping[str, Any], rounds: int,
          measure: Callable[[Any], dict[str, float]] = timed
          ) -> dict[str, dict[str, float]]:
  """Returns the figures of each contender: its median time and CPU time, in
  seconds, the least time, and the medians of the turns' ratios to the first
  contender; of anything else that is measured, the last figure.

  Args:
    contenders: the contenders.
    rounds: how many turns each takes, after one that warms it up.
    measure: the function that measures a contender's turn.
  """
  results: dict[str, list[dict[str, float]]] = {
      name: [] for name in contenders}
  for _ in range(1 + rounds):
    for name, one in contenders.items():
      results[name].append(measure(one))

  # The turns after the first, beside those of the first contender.
  figures: dict[str, dict[str, float]] = {}
  first = first_cpu = None
  for name, turns_of_one in results.items():
    seconds = np.array([turn['seconds'] for turn in turns_of_one[1:]])
    cpu_seconds = np.array([turn['cpu_seconds'] for turn in turns_of_one[1:]])
    if first is None:
      first, first_cpu = seconds, cpu_seconds
    figures[name] = turns_of_one[-1] | dict(
        seconds=float(np.median(seconds)),
        cpu_seconds=float(np.median(cpu_seconds)),
        ratio=float(np.median(seconds / first)),
        cpu_ratio=float(np.median(cpu_seconds / first_cpu)),
        least_seconds=float(seconds.min()))
  return figures


class Worker:
  """Starts a side and hands it jobs; a context that ends it."""

  def __init__(self, side: str, request: dict):
    self.side = side
    self.process = subprocess.Popen(
        [sys.executable, '-m', 'benchmarks.worker', side],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self.do(request)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    if self.process.poll() is None:
      self._send(None)
    self.process.communicate()

  def do(self, job: Any) -> dict:
    """Returns {seconds, cpu_seconds, peak_bytes} of one job, see `timed`.

    Raises:
      EnvironmentFailure: the job failed, as where the memory of a GPU is too
        small; the sentence says why.
    """
    self._send(job)
    for line in self.process.stdout:
      if line.startswith('{'):
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
  """Answers the process that handed over the job."""
  print(json.dumps(message), flush=True)


def main() -> None:
  side = importlib.import_module(f'benchmarks.{sys.argv[1]}')
  try:
    request = json.loads(sys.stdin.readline())
    trainer = side.Trainer(request)
    trainer.step()

    def generate() -> None:
      trainer.generate(request['prompt'], request['new'])

    jobs = {'step': trainer.step, 'generate': generate}
    _answer(ready=True)
    for line in sys.stdin:
      job = json.loads(line)
      if job is None:
        break
      times = timed(jobs[job])
      usage = resource.getrusage(resource.RUSAGE_SELF)
      _answer(**times, peak_bytes=1024 * usage.ru_maxrss)
  except RequestError as error:
    _answer(refused=str(error))
  except Exception as error:
    reason = ' '.join(str(error).split())[:400]
    _answer(failed=f'{type(error).__name__}: {reason}')
    raise


if __name__ == '__main__':
  main()
