"""Which checkpoints are kept: never a stretch of bad steps instead of the last
good ones."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Policy:
  """Orbax asks it after each save; what it does not keep is deleted.

  Attributes:
    keep: how many of the newest good checkpoints are kept.
    keep_every: a step that is a multiple of it is kept for good; 0: none.
    is_good: whether the checkpoint of a step is of no bad step.
    best: returns the step whose evaluation was the best; None: there is none.
    average: so many of the newest that are multiples of every_steps are kept,
      to take their mean after the last step; 0: none.
    every_steps: checkpoint.every_steps.
  """
  keep: int
  keep_every: int
  is_good: Callable[[int], bool]
  best: Callable[[], int | None] = lambda: None
  average: int = 0
  every_steps: int = 0

  def should_preserve(self, checkpoints: Sequence, *, context: Any
                      ) -> list[bool]:
    """Returns, for each checkpoint in ascending order of its step, whether to
    keep it."""
    del context
    kept = self.kept([checkpoint.step for checkpoint in checkpoints])
    return [checkpoint.step in kept for checkpoint in checkpoints]

  def kept(self, steps: Sequence[int]) -> set[int]:
    """Returns those of `steps` to keep: the newest, since the run goes on from
    it; the newest `keep` good ones; each multiple of keep_every; the best; and
    those whose mean is to be taken.
    """
    good = []
    for step in sorted(steps, reverse=True):
      if len(good) == self.keep:
        break  # older records need not be read
      if self.is_good(step):
        good.append(step)
    forever = [step for step in steps
               if self.keep_every and step % self.keep_every == 0]
    best = [step for step in steps if step == self.best()]
    return {*good, *forever, *best, *sorted(steps)[-1:], *self._averaged(steps)}

  def _averaged(self, steps: Sequence[int]) -> list[int]:
    if not self.average:
      return []
    return [step for step in sorted(steps) if step % self.every_steps == 0][
        -self.average:]
