"""What eval.py can ask of a checkpoint: one file a task, listed in TASKS.

A task takes an Evaluation and returns figures: a dict of numbers, lists and
strings that go into --json, after it has printed them for a reader.
"""

import dataclasses
import importlib
import importlib.util
import types
from typing import Any

from etils import epath

from configs.errors import one_of, require
from training import storage



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


# name: the module whose run(evaluation) does it, and whose check(options,
# config, workdir) raises RequestError for what it could not do.
TASKS = {
    'exact': 'training.evals.exact',
    'extrapolation': 'training.evals.extrapolation',
    'loss': 'training.evals.loss',
    'routing': 'training.evals.routing',
    'samples': 'training.evals.samples',
    'translation': 'training.evals.translation',
}


def task(name: str) -> types.ModuleType:
  """Returns the module of the task `name`; RequestError where there is none."""
  one_of('--tasks', name, TASKS)
  return importlib.import_module(TASKS[name])


def needs_plot(file: epath.Path) -> None:
  """Raises RequestError where a picture could not be drawn or written."""
  require(importlib.util.find_spec('matplotlib') is not None, 'the picture '
          "needs matplotlib: pip install -e '.[plot]'")
  storage.try_file(file, '--workdir')
