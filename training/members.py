"""A run as the training loop sees it: its metrics, its checkpoints, its end."""

import dataclasses
import math
import pathlib
from typing import Any

import ml_collections
import numpy as np

from architectures.parts.moe import health
from training.distributed import devices
from training.step import TrainState
from training.workdir import checkpoints, metrics

STOPPED = 75  # how a run ends after a signal, before its last step
# And after too many bad steps: as for a wrong request, since the same command
# would end in the same way, and no launcher is to start it again.
DIVERGED = 2
BAD = ('the loss or a gradient was not finite, or there was nothing to '
       'predict')


@dataclasses.dataclass(eq=False)
class Member:
  """A run that the loop trains, alone or beside others.

  Attributes:
    config: its config.
    workdir: its folder.
    saved: its checkpoints.
    label: what its messages name it by; '': it is alone.
    last: the figures of the last step that was read.
    bad: how many steps in a row were bad, up to that one.
    code: how it ended: 0, STOPPED or DIVERGED.
    sentence: why it did not reach its last step; '': it did.
  """
  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  saved: checkpoints.Checkpoints
  label: str = ''
  last: dict[str, Any] = dataclasses.field(default_factory=dict)
  bad: int = 0
  code: int = 0
  sentence: str = ''

  def begin(self, start: int) -> None:
    """Opens its metrics, less the rows after step `start`."""
    self._writers = metrics.writers(self.workdir, self.config.to_dict(), start,
                                    devices.primary())
    self._loads = []  # of the experts, since the last report

  def read(self, figures: dict[str, Any]) -> None:
    """Takes the figures of a step."""
    if not self.too_many_bad:  # else one that was under way: it is too late
      self.bad = figures['bad_in_row']
    self.last = figures
    if 'health/load_E' in figures:
      self._loads.append((figures['health/load_E'], figures['health/tokens']))

  def report(self, n: int, lap: dict[str, Any]) -> None:
    """Writes the figures of step `n`, and those of the time it took."""
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
    """Whether the parameters are finite. Where they are not, no later step
    can mend them, and they are not saved."""
    return math.isfinite(self.last['param_norm'])

  def save(self, n: int, state: TrainState, tokens: int) -> None:
    for writer in self._writers:
      writer.flush()
    self.saved.save(n, state, next_batch=n, tokens=tokens, config=self.config,
                    good=not self.last['bad_in_row'])

  def close(self) -> None:
    for writer in self._writers:
      writer.close()

  def end(self, code: int, n: int) -> None:
    """Notes that step `n` was its last one, and why: STOPPED or DIVERGED."""
    self.code = code
    if code == DIVERGED:
      self.sentence = _diverged(n, self.bad, self.saved.newest)
    else:
      of = f' of {self.config.train.steps}' if self.label else ''
      self.sentence = (f'stopped after step {n}{of}, '
                       f'{_saved_as(n, self.saved.newest)}')


def _over_window(loads: list[tuple]) -> dict[str, Any]:
  """Returns the experts' panel over the steps since the last report, given
  (load, tokens) of each."""
  if not loads:
    return {}
  figures = health.window(*(np.asarray(x, np.float32) for x in zip(*loads)))
  return {f'health/window_{name}': np.asarray(x).tolist()
          for name, x in figures.items()}


def _saved_as(n: int, newest: int | None) -> str:
  """Says what a run that was stopped after step `n` goes on from."""
  if newest == n:
    return 'saved: the same command goes on from it.'
  return ('not saved: the same command goes on from '
          + ('the beginning.' if newest is None else f'step {newest}.'))


def ended_badly(state: TrainState,
                config: ml_collections.ConfigDict) -> str:
  """Returns why a run is not gone on with from `state` unless its config is
  another: it ended there after too many bad steps. '': it did not."""
  bad, step = int(state.bad_in_row), int(state.step)
  if bad < config.train.max_bad_steps:
    return ''
  return (f'the run in this workdir ended at step {step}: {BAD}, in {bad} '
          'steps in a row (train.max_bad_steps), and the same config would end '
          'in the same way. Change what made it so, such as a smaller '
          'optim.lr, with --allow_config_change; raise train.max_bad_steps to '
          'go on '
          'unchanged; or move the latest folders out of checkpoints to go on '
          'from an earlier step.')


def _diverged(n: int, bad: int, newest: int | None) -> str:
  """Why a run ends after step `n`, the last `bad` of them not finite; `newest`
  is the checkpoint that it has."""
  what = (f'{BAD}, in {bad} steps in a row (train.max_bad_steps); no update '
          'was made in them' if bad else
          f'the parameters are not finite after the last step, {n}')
  if newest == n:
    kept = (f'The parameters before them are saved as step {n}, beside the '
            'last good checkpoints')
  else:
    kept = ('Parameters that are not finite are not saved: '
            + ('there is no checkpoint' if newest is None else
               f'the newest checkpoint is of step {newest}'))
  return (f'{what}. {kept}. Try a smaller optim.lr, a longer '
          'optim.warmup_steps, optim.clip_norm=1, or model.dtype=float32, with '
          '--allow_config_change.')
