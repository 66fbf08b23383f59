"""An array of jobs on SLURM, through submitit.

What a job that is queued again held goes back into the ledger of its sweep, and
a run goes on from its checkpoint.
"""

import ast
import os
import pathlib
import subprocess
import time

from configs.errors import EnvironmentFailure, RequestError, require


# Between submitit's signal and the end of a job: its own default, which
# slurm_signal_delay_s changes, and how many of them it has to queue it again.
SIGNAL_SECONDS, QUEUE_SECONDS = 90, 10
POLL_SECONDS = 0.1


class Work:
  """What one job of the array does: run a command.

  A job that is preempted or out of time is queued again by submitit, and the
  command must go on from where it was.

  Args:
    words: the command.
    save_seconds: how long it may take to save when it is told to end.
  """

  _process = None  # while it runs; what is pickled runs nothing

  def __init__(self, words: list[str],
               save_seconds: float = SIGNAL_SECONDS - QUEUE_SECONDS):
    self._words, self._save_seconds = words, save_seconds

  def __call__(self) -> int:
    # subprocess.run would kill it as soon as submitit ends this process.
    self._process = subprocess.Popen(self._words)
    return self._process.wait()

  def checkpoint(self):
    """Has the command save and end, before submitit queues the job again.

    Submitit calls this in its signal handler, and so within the wait above.
    """
    import submitit
    if self._process:
      self._process.terminate()
      deadline = time.monotonic() + self._save_seconds
      while not _ended(self._process.pid):
        if time.monotonic() > deadline:
          self._process.kill()
          break
        time.sleep(POLL_SECONDS)
    return submitit.helpers.DelayedSubmission(
        Work(self._words, self._save_seconds))


def _ended(pid: int) -> bool:
  """Whether a child has ended. Its Popen cannot say so while it is waited for:
  the lock that it takes is held."""
  try:
    return os.waitpid(pid, os.WNOHANG)[0] == pid
  except ChildProcessError:  # the wait above was told already
    return True


def submit(commands: list[list[str]], folder: pathlib.Path, options: str,
           name: str, cluster: str | None = None) -> list:
  """Submits an array, prints the names of its jobs, returns them.

  Args:
    commands: of each job.
    folder: for the scripts and logs of the jobs.
    options: of submitit's executor, as slurm_partition=gpu,timeout_min=60.
    name: of the array.
    cluster: 'slurm'; tests run 'local'.

  Raises:
    ValueError: where submitit is missing or refuses.
  """
  try:
    import submitit
  except ImportError as error:
    raise RequestError('--launcher=slurm needs submitit: pip install -e '
                       "'.[slurm]'") from error
  parsed = _parsed(options)
  save_seconds = _save_seconds(parsed)
  try:
    executor = submitit.AutoExecutor(folder, cluster=cluster or 'slurm')
    executor.update_parameters(name=name, **parsed)
  except (AssertionError, NameError, RuntimeError, TypeError) as error:
    raise RequestError(f'--launcher=slurm: {error}') from error
  try:
    with executor.batch():
      submitted = [executor.submit(Work(words, save_seconds))
                   for words in commands]
  except submitit.core.utils.FailedJobError as error:  # sbatch refuses
    raise EnvironmentFailure(f'sbatch: {" ".join(str(error).split())}'
                             ) from error
  print(f'{len(submitted)} job{"s" * (len(submitted) != 1)}:',
        ' '.join(job.job_id for job in submitted))
  return submitted


def _save_seconds(parsed: dict) -> int:
  """Returns how long a command may take to save."""
  delay = parsed.get('slurm_signal_delay_s', SIGNAL_SECONDS)
  require(type(delay) is int and delay > QUEUE_SECONDS,
          f'--slurm has slurm_signal_delay_s={delay}: a job is told so many '
          f'seconds before its end, of which it needs {QUEUE_SECONDS} to be '
          'queued again; choose more of them')
  return delay - QUEUE_SECONDS


def _parsed(options: str) -> dict:
  """Returns {'timeout_min': 60} of 'timeout_min=60'."""
  parsed = {}
  for option in filter(None, options.split(',')):
    name, equals, value = option.partition('=')
    if not equals:
      raise RequestError(f'--slurm has {option!r}: write it as NAME=VALUE')
    try:
      parsed[name] = ast.literal_eval(value)
    except (SyntaxError, ValueError):
      parsed[name] = value
  return parsed
