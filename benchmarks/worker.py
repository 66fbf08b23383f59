"""A side of a comparison in a process of its own, which does one job at a
time: so that two sides alternate, and the peak memory of each is its own.

  python -m benchmarks.worker SIDE   (ours, pytorch; a request on stdin)
"""

import importlib
import json
import resource
import subprocess
import sys
import time

from configs.errors import EnvironmentFailure, RequestError


class Worker:
  """Starts a side and hands it jobs; a context that ends it."""

  def __init__(self, side: str, request: dict):
    self.side = side
    self.process = subprocess.Popen(
        [sys.executable, '-m', 'benchmarks.worker', side],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self._send(request)
    self._receive()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.close()

  def close(self):
    """Ends the process."""
    if self.process.poll() is None:
      self._send(None)
    self.process.communicate()

  def do(self, job: str) -> dict:
    """Returns {seconds, cpu_seconds, peak_bytes, result} of one job; the second
    is what all of its threads took together.

    Raises:
      EnvironmentFailure: the job failed, as where the memory of a GPU is too
        small; the sentence says why.
    """
    self._send(job)
    return self._receive()

  def _send(self, message):
    self.process.stdin.write(json.dumps(message) + '\n')
    self.process.stdin.flush()

  def _receive(self):
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


def _peak_bytes() -> int:
  kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return kilobytes * (1 if sys.platform == 'darwin' else 1024)


def _answer(**message):
  print(json.dumps(message), flush=True)


def main():
  module = importlib.import_module(f'benchmarks.{sys.argv[1]}')
  try:
    jobs = module.jobs(json.loads(sys.stdin.readline()))
    _answer(ready=True)
    for line in sys.stdin:
      job = json.loads(line)
      if job is None:
        break
      start, cpu_start = time.perf_counter(), time.process_time()
      result = jobs[job]()
      _answer(seconds=time.perf_counter() - start,
              cpu_seconds=time.process_time() - cpu_start,
              peak_bytes=_peak_bytes(), result=result)
  except RequestError as error:
    _answer(refused=str(error))
  except Exception as error:
    _answer(failed=f'{type(error).__name__}: '
            + ' '.join(str(error).split())[:400])
    raise


if __name__ == '__main__':
  main()
