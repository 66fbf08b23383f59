"""An array of jobs on SLURM, through submitit."""

import ast
import pathlib
import subprocess

from configs.errors import EnvironmentFailure, RequestError


class Work:
  """What one job of the array does: run a command.

  A job that is preempted or out of time is queued again by submitit, and the
  command must go on from where it was.
  """

  def __init__(self, words: list[str]):
    self._words = words

  def __call__(self) -> int:
    return subprocess.run(self._words).returncode

  def checkpoint(self):
    import submitit
    return submitit.helpers.DelayedSubmission(self)


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
  try:
    executor = submitit.AutoExecutor(folder, cluster=cluster or 'slurm')
    executor.update_parameters(name=name, **_parsed(options))
  except (AssertionError, NameError, RuntimeError, TypeError) as error:
    raise RequestError(f'--launcher=slurm: {error}') from error
  try:
    with executor.batch():
      submitted = [executor.submit(Work(words)) for words in commands]
  except submitit.core.utils.FailedJobError as error:  # sbatch refuses
    raise EnvironmentFailure(f'sbatch: {" ".join(str(error).split())}'
                             ) from error
  print(f'{len(submitted)} job{"s" * (len(submitted) != 1)}:',
        ' '.join(job.job_id for job in submitted))
  return submitted


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
