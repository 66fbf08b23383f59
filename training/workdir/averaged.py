"""The checkpoints whose mean with the last parameters is evaluated where a run
ends (checkpoint.average)."""

from collections.abc import Mapping, Sequence
from typing import Any

from configs.errors import require
from training.workdir import checkpoints, parameters


def _steps(config: Any, last: int) -> list[int]:
  """Returns the steps of these checkpoints, ascending, without `last`, after
  which the run ends; `config` is its own. Those of a run that ends early may
  be 0 or less: there are too few."""
  c = config.checkpoint
  if not c.average:
    return []
  newest = (last - 1) // c.every_steps * c.every_steps
  return [newest - i * c.every_steps for i in reversed(range(c.average - 1))]


def _lacking(steps: Sequence[int], saved: checkpoints.Checkpoints
             ) -> int | None:
  """Returns the first of the steps that is not saved: it was deleted, or its
  parameters were not finite. Every process calls it, and gets what process 0
  sees."""
  saved.wait()
  there = checkpoints.steps(saved.directory)
  return next((step for step in steps if step not in there), None)


def check(config: Any, saved: checkpoints.Checkpoints, start: int) -> None:
  """Raises RequestError where a run that goes on from step `start` cannot have
  a checkpoint of each of `_steps` any more."""
  steps = _steps(config, config.train.steps)
  if not any(step <= start for step in steps):
    return
  step = _lacking(steps, saved)
  require(step is None or step > start, 'checkpoint.average is '
          f'{config.checkpoint.average}, and the run goes on from step '
          f'{start}, but step {step} is not saved: choose a smaller mean, or '
          '0, with --allow_config_change')


def means(program: Any, params: Any, last: int,
          saved: Mapping[int, checkpoints.Checkpoints]
          ) -> tuple[Any, dict[int, str]]:
  """Returns the means of runs that end after step `last`.

  Args:
    program: of these runs, and maybe others.
    params: those of all of its runs after that step.
    last: the step.
    saved: the checkpoints of these runs, by row.

  Returns:
    `params` with the means instead of the runs' own; and by row, why a run has
    none.
  """
  found, lacking = list(program.split(params)), {}
  steps = _steps(program.config, last)
  for row, own in saved.items():
    step = _lacking(steps, own)
    if step is None:
      found[row] = parameters.mean([*(parameters.restore(
          own.directory, program.single.abstract.params, step).state
          for step in steps), found[row]])
    else:
      lacking[row] = (
          f'step {step} is not saved' if step > 0 else
          f'there are fewer than {len(steps) + 1} up to step {last}')
  return (program.joined(found) if len(lacking) < len(saved) else params,
          lacking)
