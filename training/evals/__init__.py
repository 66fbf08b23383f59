"""What eval.py can ask of a checkpoint: one file a task, listed in TASKS.

A task takes an Evaluation and returns figures: a dict of numbers, lists and
strings that go into --json, after it has printed them for a reader.
"""

from collections.abc import Callable
import dataclasses
import importlib
import importlib.util
import types
from typing import Any

from etils import epath

from configs.errors import one_of, require
from training.workdir import run_config, storage



@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A run's checkpoint and what was asked about it.

  Attributes:
    run: the run's config, model and mesh; its params are `params`.
    step: the checkpoint's step.
    tokenizer: the run's.
    options: eval.py's flags by name.
    workdir: the run's folder; pictures go there.
    programs: what was compiled, by what it is of; see `program`.
  """
  run: Any
  params: Any
  step: int
  tokenizer: Any
  options: Any
  workdir: epath.Path
  programs: dict

  def program(self, make: Callable[[], Callable], *of):
    """Returns jax.jit of what `make` returns, or the same of an earlier run of
    this process that differs in nothing that an evaluation reads: so that the
    seeds of a sweep's point compile once.

    Args:
      make: makes the function.
      of: which of the run's functions it is: hashable.
    """
    import jax
    flat = run_config.flatten(self.run.config)
    key = (*of, self.run.model, *(
        (name, value) for name, value in flat.items()
        if not name.startswith(UNREAD)))
    if key not in self.programs:
      self.programs[key] = jax.jit(make())
    return self.programs[key]


# Fields that no evaluation reads: `model` stands resolved beside them.
UNREAD = ('seed', 'init_', 'model.', 'optim.', 'checkpoint.', 'log.')
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
