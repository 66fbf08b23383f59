"""What eval.py can ask of a checkpoint: one file a task, listed in TASKS.

A task takes an Evaluation and returns figures: a dict of numbers, lists and
strings that go into --json, after it has printed them for a reader.
"""

from collections.abc import Callable
import dataclasses
import importlib
from typing import Any

from etils import epath

from configs.errors import one_of



@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A run's checkpoint and what was asked about it.

  Attributes:
    run: the run's config, model and mesh; its params are `params`.
    step: the checkpoint's step.
    tokenizer: the run's.
    options: eval.py's flags by name.
    workdir: the run's folder; pictures go there.
  """
  run: Any
  params: Any
  step: int
  tokenizer: Any
  options: Any
  workdir: epath.Path


# name: the module whose run(evaluation) does it.
TASKS = {
    'exact': 'training.evals.exact',
    'extrapolation': 'training.evals.extrapolation',
    'loss': 'training.evals.loss',
    'routing': 'training.evals.routing',
    'samples': 'training.evals.samples',
    'translation': 'training.evals.translation',
}


def task(name: str) -> Callable[[Evaluation], dict]:
  """Returns the task `name`; ValueError for one that is not there."""
  one_of('--tasks', name, TASKS)
  return importlib.import_module(TASKS[name]).run
