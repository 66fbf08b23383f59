"""An array of jobs on SLURM, through submitit.

What a job that is queued again held goes back into the ledger of its sweep, and
a run goes on from its checkpoint.
"""

import ast
import pathlib
import subprocess
import time
from typing import Any

from common.fields import parse_assignments
from common.errors import EnvironmentFailure, RequestError, require


# Between submitit's signal and the end of a job: its own default, which
# slurm_signal_delay_s changes, and how many of them it has to queue it again.
SIGNAL_SECONDS, QUEUE_SECONDS = 90, 10
POLL_SECONDS = 0.1


class Work:
  """A job of a SLURM array: it runs a command.

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
    # subprocess.run would kill it as soon as submitit ends this process; and
    # while one waits for a process, `checkpoint` could not.
    self._process = subprocess.Popen(self._words)
    while self._process.poll() is None:
      time.sleep(POLL_SECONDS)
    return self._process.returncode

  def checkpoint(self):
    """Makes the command save and end, and returns the job that submitit queues
    in its place. submitit calls this in its signal handler, when the time of
    the job is nearly over."""
    # SIGTERM asks the command to save. If it takes too long, it is killed.
    import submitit
    if self._process:
      self._process.terminate()
      try:
        self._process.wait(self._save_seconds)
      except subprocess.TimeoutExpired:
        self._process.kill()
    return submitit.helpers.DelayedSubmission(
        Work(self._words, self._save_seconds))


def submit(commands: list[list[str]], folder: pathlib.Path, options: str,
           name: str, cluster: str = 'slurm') -> list:
  """Submits an array of jobs to SLURM by the library submitit, prints their
  names, and returns them.

  Args:
    commands: the command of each job.
    folder: the folder for the scripts and logs of the jobs.
    options: the options of submitit's executor, such as
      'slurm_partition=gpu,timeout_min=60'.
    name: the name of the array.
    cluster: submitit's name of the cluster. Tests use 'local'.

  Raises:
    RequestError: if submitit is missing, or refuses the options.
    EnvironmentFailure: if sbatch refuses the jobs.
  """
  # Parse the options. A job is told to save so many seconds before its end,
  # and needs some of them to be queued again.
  try:
    import submitit
  except ImportError as error:
    raise RequestError('--launcher=slurm needs submitit: pip install -e '
                       "'.[slurm]'") from error
  given = [option for option in options.split(',') if option]
  parsed = {option: _option(value)
            for option, value in parse_assignments(given, '--slurm').items()}
  delay = parsed.get('slurm_signal_delay_s', SIGNAL_SECONDS)
  require(type(delay) is int and delay > QUEUE_SECONDS, '--slurm has '
          f'slurm_signal_delay_s={delay}: a job is told so many seconds before '
          f'its end, and needs {QUEUE_SECONDS} of them to be queued again')

  # Submit the jobs.
  try:
    executor = submitit.AutoExecutor(folder, cluster=cluster)
    executor.update_parameters(name=name, **parsed)
  except (AssertionError, NameError, RuntimeError, TypeError) as error:
    raise RequestError(f'--launcher=slurm: {error}') from error
  try:
    with executor.batch():
      jobs = [executor.submit(Work(words, delay - QUEUE_SECONDS))
              for words in commands]
  except submitit.core.utils.FailedJobError as error:  # sbatch refuses
    raise EnvironmentFailure(f'sbatch: {" ".join(str(error).split())}'
                             ) from error
  print(f'{len(jobs)} jobs:', ' '.join(job.job_id for job in jobs))
  return jobs


def _option(text: str) -> Any:
  """Returns the value of an option: a number, truth value or such where the
  text is one in Python, else the text itself."""
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text
