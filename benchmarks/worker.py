"""A side of a comparison in a process of its own, which does one job at a
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
  """Returns of each contender its median time and CPU time, in seconds, the
  least time, and the medians of the turns' ratios to the first contender; of
  what else is measured, the last figure.

  Args:
    contenders: what is measured.
    rounds: how many turns each takes, after one that warms it up.
    measure: of a contender's turn.
  """
  results = {name: [] for name in contenders}
  for _ in range(1 + rounds):
    for name, one in contenders.items():
      results[name].append(measure(one))
  times = {name: np.array([(x['seconds'], x['cpu_seconds']) for x in each[1:]])
           for name, each in results.items()}
  first = next(iter(times.values()))
  figures = 'seconds', 'cpu_seconds', 'ratio', 'cpu_ratio'
  return {name: results[name][-1] | dict(
      zip(figures, np.median(np.hstack([x, x / first]), 0).tolist()),
      least_seconds=float(x[:, 0].min())) for name, x in times.items()}


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


def main():
  side = importlib.import_module(f'benchmarks.{sys.argv[1]}')
  answer = lambda **message: print(json.dumps(message), flush=True)
  try:
    request = json.loads(sys.stdin.readline())
    trainer = side.Trainer(request)
    trainer.step()
    jobs = {'step': trainer.step, 'generate': lambda: trainer.generate(
        request['prompt'], request['new'])}
    answer(ready=True)
    for line in sys.stdin:
      job = json.loads(line)
      if job is None:
        break
      answer(**timed(jobs[job]), peak_bytes=1024 * resource.getrusage(
          resource.RUSAGE_SELF).ru_maxrss)
  except RequestError as error:
    answer(refused=str(error))
  except Exception as error:
    answer(failed=f'{type(error).__name__}: '
           + ' '.join(str(error).split())[:400])
    raise


if __name__ == '__main__':
  main()
