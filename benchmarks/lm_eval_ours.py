"""This project's side of benchmarks.lm_eval: a run, as lm_eval asks it."""

import time

from benchmarks import lm_eval
from training.distributed import cpu


def jobs(request: dict) -> dict:
  """Returns what a worker can be asked to do, by name."""
  from training.evals import harness
  cpu.prepare()
  model = harness.Model.create_from_arg_obj({'workdir': request['workdir']})
  asked = lm_eval.instances(request['pairs'])

  def answers() -> list[float]:
    return [x for x, _ in model.loglikelihood(asked, disable_tqdm=True)]

  return dict(answers=answers, timed=lambda: seconds(answers))


def seconds(job) -> float:
  """Returns how long a job takes."""
  start = time.perf_counter()
  job()
  return time.perf_counter() - start
