"""The slurm launcher: an array of runners on one ledger, through submitit."""

import pathlib

from tools.compare import slurm_array


def submit(words: list[str], folder: pathlib.Path, jobs: int, options: str,
           cluster: str | None = None) -> list:
  """Submits an array of runners; each trains until nothing is pending.

  What a job that is queued again held goes back into the ledger, and a run goes
  on from its checkpoint.

  Args:
    words: the command of a runner.
    folder: for the scripts and logs of the jobs.
    jobs: how many.
    options: as slurm_array.submit takes them, and raises.
    cluster: likewise.
  """
  return slurm_array.submit([words] * jobs, folder, options, 'sweep', cluster)
