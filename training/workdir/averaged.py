"""The checkpoints whose mean with the last parameters is evaluated after the
last step (checkpoint.average)."""

from collections.abc import Sequence
from typing import Any

from etils import epath

from configs.errors import require
from training.workdir import restoring


def steps(config: Any) -> list[int]:
  """Returns the steps of these checkpoints, ascending, without the last step's;
  `config` is a run's."""
  c = config.checkpoint
  if not c.average:
    return []
  last = (config.train.steps - 1) // c.every_steps * c.every_steps
  return [last - i * c.every_steps for i in reversed(range(c.average - 1))]


def lacking(config: Any, folders: Sequence[epath.Path]) -> int | None:
  """Returns the first of `steps` of which one of these folders of checkpoints
  has none: it was deleted, or its parameters were not finite. Every process
  calls it, and gets what process 0 sees."""
  saved = [restoring.steps(folder) for folder in folders]
  return next((step for step in steps(config)
               if any(step not in own for own in saved)), None)


def check(config: Any, folders: Sequence[epath.Path], start: int) -> None:
  """Raises RequestError where a run that goes on from step `start` cannot have
  a checkpoint of each of `steps` any more."""
  if not any(step <= start for step in steps(config)):
    return
  step = lacking(config, folders)
  require(step is None or step > start, 'checkpoint.average is '
          f'{config.checkpoint.average}, and the run goes on from step '
          f'{start}, but step {step} is not saved: choose a smaller mean, or '
          '0, with --allow_config_change')
