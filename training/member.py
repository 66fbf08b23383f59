"""One of the runs that the loop trains: its figures, checkpoints and end."""

import dataclasses
import math
import pathlib
from typing import Any

import ml_collections
import numpy as np

from architectures.parts.moe import health
from training import best, endings
from training.distributed import devices
from training.endings import DIVERGED, EARLY
from training.step import TrainState
from training.workdir import checkpoints, metrics


@dataclasses.dataclass(eq=False)
class Member:
  """A run that the loop trains, alone or beside others.

  Attributes:
    config: the config of the run.
    workdir: the folder of the run.
    saved: the checkpoints of the run.
    label: the name of the run in messages; '' where it trains alone.
    last: the figures of the last step that the loop has read.
    bad: the number of bad steps in a row, up to that step.
    code: how the run ended: 0, STOPPED, DIVERGED or EARLY.
    sentence: why the run did not reach its last step; '' where it did.
    evaluated: whether the figures of an evaluation after the step that the run
      was resumed at are in its metrics, or it was not resumed.
    told_to_stop: whether a signal came, be it too late to stop the run.
  """
  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  saved: checkpoints.Checkpoints
  label: str = ''
  last: dict[str, Any] = dataclasses.field(default_factory=dict)
  bad: int = 0
  code: int = 0
  sentence: str = ''
  evaluated: bool = True
  told_to_stop: bool = False

  def begin(self, start: int) -> None:
    """Opens the metrics files, and drops the rows after step `start`."""
    self._writers = metrics.writers(self.workdir, self.config.to_dict(), start,
                                    devices.primary())
    self._loads = []  # of the experts, since the last report
    # Process 0 alone has the rows.
    self.evaluated = start == 0 or bool(checkpoints.from_process_0(np.int32(
        any(writer.has_kept(start, 'eval') for writer in self._writers[:1]))))
    self.best = best.Best.of(self.config, self.saved.best)

  def read(self, figures: dict[str, Any]) -> None:
    """Takes the figures of a step."""
    # A step that was under way when there were too many bad ones is read too,
    # but a good loss does not save the run any more.
    if not self.too_many_bad:
      self.bad = figures['bad_in_row']
    self.last = figures
    if 'health/load_E' in figures:
      self._loads.append((figures['health/load_E'], figures['health/tokens']))

  def report(self, n: int, lap: dict[str, Any]) -> None:
    """Writes the figures of step `n`, and how long it took."""
    self.write(n, 'train', self.last | lap | _over_window(self._loads))
    self._loads.clear()

  def write(self, n: int, split: str, figures: dict[str, Any]) -> None:
    for writer in self._writers:
      writer.write(n, split, figures)

  @property
  def too_many_bad(self) -> bool:
    return self.bad >= self.config.train.max_bad_steps

  @property
  def sound(self) -> bool:
    """Whether the parameters are finite. No later step can mend parameters
    that are not finite, so they are not saved."""
    return math.isfinite(self.last['param_norm'])

  def asks_to_be_saved(self, n: int) -> bool:
    """Whether it is saved after step `n`, due or not: the step is the best so
    far, or one of too many that were bad, or the run ends there."""
    return self.too_many_bad or self.best is not None and (
        self.best.step == n or self.best.is_over)

  def ends_with(self, n: int, figures: dict[str, Any]) -> bool:
    """Takes the figures of the evaluation after step `n`, for the best of them;
    returns whether the run ends with them before its last step."""
    if not self.best or self.best.seen >= n:
      return False
    self.best.take(n, figures)
    self.saved.best = self.best.record()
    return self.best.is_over and n < self.config.train.steps

  def save(self, n: int, state: TrainState, tokens: int) -> None:
    for writer in self._writers:
      writer.flush()
    self.saved.save(n, state, next_batch=n, tokens=tokens, config=self.config,
                    good=not self.last['bad_in_row'],
                    best=self.best and self.best.record())

  def close(self) -> None:
    for writer in self._writers:
      writer.close()

  def end(self, code: int, n: int) -> None:
    """Records that the run ends after step `n`, as `code` says."""
    self.code = code
    if code == DIVERGED:
      self.sentence = endings.diverged(n, self.bad, self.saved.newest)
    elif code == EARLY:
      self.sentence = self.best.sentence(n)
    else:
      of = f' of {self.config.train.steps}' if self.label else ''
      self.sentence = (f'stopped after step {n}{of}, '
                       f'{endings.saved_as(n, self.saved.newest)}')


def _over_window(loads: list[tuple]) -> dict[str, Any]:
  """Returns the experts' panel over the steps since the last report, given
  (load, tokens) of each."""
  if not loads:
    return {}
  figures = health.window(*(np.asarray(x, np.float32) for x in zip(*loads)))
  return {f'health/window_{name}': np.asarray(x).tolist()
          for name, x in figures.items()}
