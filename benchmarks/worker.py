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

from configs.errors import EnvironmentFailure, RequestError


def turns(contenders: Mapping[str, Callable[[], Any]], rounds: int
          ) -> dict[str, dict[str, float]]:
  """Returns of each contender its median time and CPU time, in seconds, and the
  medians of the turns' ratios to the first contender.

  Args:
    contenders: functions that wait for their result.
    rounds: how many turns each takes, after one that warms it up.
  """
  times = {name: [] for name in contenders}
  for turn in range(1 + rounds):
    for name, run in contenders.items():
      start, start_cpu = time.perf_counter(), time.process_time()
      run()
      if turn:
        times[name].append((time.perf_counter() - start,
                            time.process_time() - start_cpu))
  first = np.array(next(iter(times.values())))
  figures = 'seconds', 'cpu_seconds', 'ratio', 'cpu_ratio'
  return {name: dict(zip(figures, np.median(
      np.hstack([durations, durations / first]), 0).tolist()))
          for name, durations in times.items()}


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
    """Returns {seconds, cpu_seconds, peak_bytes, result} of one job; the second
    is what all of its threads took together.

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
      start, cpu_start = time.perf_counter(), time.process_time()
      result = jobs[job]()
      answer(seconds=time.perf_counter() - start,
             cpu_seconds=time.process_time() - cpu_start,
             peak_bytes=1024 * resource.getrusage(
                 resource.RUSAGE_SELF).ru_maxrss, result=result)
  except RequestError as error:
    answer(refused=str(error))
  except Exception as error:
    answer(failed=f'{type(error).__name__}: '
           + ' '.join(str(error).split())[:400])
    raise


if __name__ == '__main__':
  main()
