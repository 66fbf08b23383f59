"""The writer of one run: its figures, its checkpoints, and how it ends.

eval.best names a figure of the evaluations. The checkpoint of the best one is
kept beside the newest, and with eval.patience the run ends after so many
evaluations in a row that were no better (early stopping: Prechelt 1998). What
was best is part of each checkpoint's record, so that a run that is resumed
decides as it would have without the break.
"""

from collections.abc import Collection, Mapping
import dataclasses
import math
import pathlib
from typing import Any

import ml_collections
import numpy as np

from common.errors import require
from training.distributed import devices
from training.runs import TrainState
from training.workdir import checkpoints, metrics

# How a run ends, beside 0 for its last step and STOPPED for a signal before it.
# After too many bad steps: the exit code of a wrong request, since the same
# command would end in the same way, and no launcher is to start it again.
DIVERGED = 2
ENDED_EARLY = -1  # after eval.patience evaluations: it is done, exit code 0
REASON_OF_BAD_STEP = ('the loss or a gradient was not finite, or there was '
                      'nothing to predict')


@dataclasses.dataclass(eq=False)
class RunWriter:
  """The figures and the checkpoints that one run writes, and how it ended.

  Attributes:
    config: the config of the run.
    workdir: the folder of the run.
    saved: the checkpoints of the run.
    label: the name of the run in messages; '' where it trains alone.
    last_figures: the figures of the last step that the loop has read.
    num_bad_in_row: the number of bad steps in a row, up to that step.
    code: how the run ended: 0, STOPPED, DIVERGED or ENDED_EARLY.
    sentence: why the run did not reach its last step; '' where it did.
    has_evaluation: whether the figures of an evaluation after the step that the
      run was resumed at are in its metrics, or it was not resumed.
    stop_requested: whether a signal came, be it too late to stop the run.
  """
  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  saved: checkpoints.Checkpoints
  label: str = ''
  last_figures: dict[str, Any] = dataclasses.field(default_factory=dict)
  num_bad_in_row: int = 0
  code: int = 0
  sentence: str = ''
  has_evaluation: bool = True
  stop_requested: bool = False

  def open_metrics(self, start: int) -> None:
    """Opens the files to which the metrics of the run are written. Their rows
    after step `start` are dropped, as the run will write them again.

    Args:
      start: the step from which the run is resumed; 0 for a new run.
    """
    self._files = metrics.open_writers(
        self.workdir, config=self.config.to_dict(), resumed_step=start,
        primary=devices.is_primary_process())
    self.best = BestEvaluation.begin_or_resume(self.config, self.saved.best)
    # Find out whether step `start` was evaluated already. Only process 0 has
    # the rows, so it answers for all processes.
    if start > 0:
      has_row = any(file.has_kept(start, 'eval') for file in self._files[:1])
      answer = checkpoints.broadcast_from_process_0(np.int32(has_row))
      self.has_evaluation = bool(answer)

  def take_figures(self, figures: dict[str, Any]) -> None:
    """Takes the figures of a step, as they were read from the devices."""
    # A step that was under way when there were too many bad ones is read too,
    # but a good loss does not save the run any more.
    if not self.has_too_many_bad_steps:
      self.num_bad_in_row = figures['bad_in_row']
    self.last_figures = figures

  def write_figures(self, n: int, split: str, figures: dict[str, Any]) -> None:
    """Writes a row of metrics.

    Args:
      n: the step.
      split: 'train' for the data to train on, or 'eval' for the held-out data.
      figures: the figures, by name.
    """
    for file in self._files:
      file.write(n, split, figures)

  @property
  def has_too_many_bad_steps(self) -> bool:
    """Whether so many steps in a row were bad that the run ends."""
    return self.num_bad_in_row >= self.config.train.max_bad_steps

  @property
  def is_sound(self) -> bool:
    """Whether the parameters are finite. No later step can mend parameters
    that are not finite, so they are not saved."""
    return math.isfinite(self.last_figures['param_norm'])

  def needs_save(self, n: int) -> bool:
    """Whether the run is saved after step `n`, even where no save is due: the
    step is the best so far, or one of too many that were bad, or the run ends
    there."""
    if self.has_too_many_bad_steps:
      return True
    if self.best is None:
      return False
    return self.best.step == n or self.best.is_over

  def evaluate(self, n: int, figures: dict[str, Any]) -> None:
    """Takes the figures of the evaluation after step `n`: writes them, and
    notes whether they are the best so far."""
    if self.best is not None and self.best.seen < n:
      self.best.add_evaluation(n, figures)
      self.saved.best = self.best.record()
    self.write_figures(n, split='eval', figures=figures)

  def save(self, n: int, state: TrainState, tokens: int) -> None:
    """Saves a checkpoint of the training state. It also records whether the
    last step was good and which evaluation was the best.

    Args:
      n: the number of steps done.
      state: the training state after them.
      tokens: the number of tokens that the run has been trained on.
    """
    # Write the metrics first: a resumed run expects all rows up to its
    # checkpoint.
    for file in self._files:
      file.flush()
    best = None
    if self.best is not None:
      best = self.best.record()
    is_good = not self.last_figures['bad_in_row']
    self.saved.save(n, state, next_batch=n, tokens=tokens, config=self.config,
                    good=is_good, best=best)

  def describe_lowest_loss(self) -> list[str]:
    """Tells the user if the held-out loss has risen since its lowest value, and
    what to do about it.

    Returns:
      A list of one line; [] if the last loss is the lowest, or there are no
      evaluations.
    """
    path = pathlib.Path(self.workdir) / metrics.METRICS_FILE
    if not path.exists():
      return []
    # Read the losses from the file, which also has those before the run was
    # resumed.
    loss_of_step = {}
    for row in metrics.read_metrics(path):
      if row['split'] == 'eval' and row.get('loss') is not None:
        loss_of_step[row['step']] = row['loss']
    if not loss_of_step:
      return []
    best_step = min(loss_of_step, key=loss_of_step.get)
    last_step = max(loss_of_step)
    # A run that still improves needs no advice.
    if best_step == last_step:
      return []
    advice = ('to keep the best, train with --config.eval.best=loss, and with '
              '--config.eval.patience=3 to end soon after it')
    if self.best is not None:
      advice = 'eval.py --step=best judges the best'
    return [f'held-out loss was lowest at step {best_step:,}, '
            f'{loss_of_step[best_step]:.4f}, and is '
            f'{loss_of_step[last_step]:.4f} at step {last_step:,}: {advice}']

  def close(self) -> None:
    """Closes the metrics files."""
    for file in self._files:
      file.close()

  def end(self, code: int, n: int) -> None:
    """Records that the run ends, and explains the reason to the user, in
    `sentence`.

    Args:
      code: STOPPED, DIVERGED or ENDED_EARLY.
      n: the step after which the run ends.
    """
    self.code = code
    newest_step = self.saved.newest
    if code == DIVERGED:
      self.sentence = _explain_divergence(n, num_bad=self.num_bad_in_row,
                                          newest_step=newest_step)
    elif code == ENDED_EARLY:
      self.sentence = self.best.explain_end(n)
    else:
      self.sentence = self._explain_stop(n, newest_step)

  def _explain_stop(self, n: int, newest_step: int | None) -> str:
    """Explains to the user that a signal has stopped the run, and from which
    step it can be resumed.

    Args:
      n: the step after which the run has stopped.
      newest_step: the step of the newest checkpoint; None: there is none.
    """
    # A run with a label is one of several that train together.
    step = f'step {n}'
    if self.label:
      step = f'step {n} of {self.config.train.steps}'
    if newest_step == n:
      return f'stopped after {step}, saved: the same command goes on from it.'
    start = f'step {newest_step}'
    if newest_step is None:
      start = 'the beginning'
    return (f'stopped after {step}, not saved: the same command goes on from '
            f'{start}.')


def _explain_divergence(n: int, num_bad: int, newest_step: int | None) -> str:
  """Explains to the user that a run has ended because it diverged, and what to
  try.

  Args:
    n: the step after which the run has ended.
    num_bad: how many of its last steps had a loss or a gradient that was not
      finite. If 0, the parameters are not finite after the last step.
    newest_step: the step of the run's newest checkpoint.
  """
  reason = f'the parameters are not finite after the last step, {n}'
  if num_bad:
    reason = (f'{REASON_OF_BAD_STEP}, in {num_bad} steps in a row '
              '(train.max_bad_steps), which changed no parameter')
  return (f'{reason}. The newest checkpoint is of step {newest_step}. Try a '
          'smaller optim.lr, a longer optim.warmup_steps, optim.clip_norm=1, '
          'or model.dtype=float32, with --allow_config_change.')


def explain_if_diverged(state: TrainState, config: ml_collections.ConfigDict
                        ) -> str:
  """Tells whether a run that is to be resumed has already ended because it
  diverged. With the same config it would end in the same way.

  Args:
    state: the training state of the newest checkpoint. It has the number of bad
      steps in a row, in which the loss or a gradient was not finite.
    config: the config of the run.

  Returns:
    A sentence for the user; '' for a run that can be resumed.
  """
  num_bad = int(state.bad_in_row)
  step = int(state.step)
  if num_bad < config.train.max_bad_steps:
    return ''
  return (f'the run in this workdir ended at step {step}: '
          f'{REASON_OF_BAD_STEP}, in {num_bad} steps in a row '
          '(train.max_bad_steps), and the same config would end in the same '
          'way. Change what made it so, with '
          '--allow_config_change, or move the latest folders out of '
          'checkpoints to go on from an earlier step.')


def explain_if_ended_early(config: ml_collections.ConfigDict,
                           record: Mapping[str, Any] | None, step: int) -> str:
  """Tells whether a run that is to be resumed has already ended, because its
  evaluations did not improve any more (eval.patience).

  Args:
    config: the config of the run.
    record: what BestEvaluation.record returned, from the newest checkpoint.
    step: the step of that checkpoint.

  Returns:
    A sentence for the user; '' for a run that can be resumed.
  """
  best = BestEvaluation.begin_or_resume(config, record)
  if best is None or not best.is_over:
    return ''
  return best.explain_end(step)


@dataclasses.dataclass
class BestEvaluation:
  """The best of a run's evaluations so far, and how long ago it was.

  Attributes:
    figure: eval.best.
    largest: whether the largest value is the best.
    patience: eval.patience.
    step: the step of the best evaluation; None: there was none.
    value: the figure of the best evaluation.
    waited: how many evaluations there were since.
    seen: the step of the last evaluation.
  """
  figure: str
  largest: bool
  patience: int
  step: int | None = None
  value: float | None = None
  waited: int = 0
  seen: int = 0

  @classmethod
  def begin_or_resume(cls, config: ml_collections.ConfigDict,
                      record: Mapping[str, Any] | None
                      ) -> 'BestEvaluation | None':
    """Begins to keep track of the best evaluation of a run, or resumes it.

    Args:
      config: the config of the run. eval.best names the figure that decides.
      record: what `record` returned when the checkpoint was saved from which
        the run is resumed; None: the run is new.

    Returns:
      The tracker; None if eval.best is empty.
    """
    figure = config.eval.best
    best_is = config.eval.best_is
    if not figure:
      return None
    # Find out whether large or small values are better. eval.best_is says it,
    # else the name of the figure: the larger an accuracy, the better.
    if best_is:
      largest = best_is == 'largest'
    else:
      name = figure.rpartition('/')[2]
      largest = name in metrics.FIGURES_BEST_WHEN_LARGEST

    # Resume from the record, unless another figure decides now.
    patience = config.eval.patience
    if record and (record['figure'], record['largest']) == (figure, largest):
      return cls(**record, patience=patience)
    return cls(figure=figure, largest=largest, patience=patience)

  def record(self) -> dict[str, Any]:
    """Returns the fields that a checkpoint keeps, for `begin_or_resume`."""
    fields = dataclasses.asdict(self)
    del fields['patience']  # a run that is resumed may have another
    return fields

  def add_evaluation(self, n: int, figures: Mapping[str, float]) -> None:
    """Notes whether an evaluation is the best one so far. Nothing is done if
    eval.best is none of its figures.

    Args:
      n: the step after which the run was evaluated.
      figures: {name: value} of all figures of the evaluation.

    Raises:
      RequestError: where eval.best names a figure of this task that does not
        exist.
    """
    self.seen = n
    if not self.check_is_among(figures):
      return
    value = float(figures[self.figure])
    # All processes must decide as process 0 does, even if their figures differ
    # in the last digit.
    is_better = np.int32(self._is_better(value))
    if checkpoints.broadcast_from_process_0(is_better):
      self.step = n
      self.value = value
      self.waited = 0
    else:
      self.waited += 1

  def _is_better(self, value: float) -> bool:
    """Whether a value is better than the best so far; an equal one is not."""
    if not math.isfinite(value):
      return False
    if self.value is None:
      return True
    if self.largest:
      return value > self.value
    return value < self.value

  def check_is_among(self, names: Collection[str]) -> bool:
    """Returns whether the figure that eval.best names is one of those of an
    evaluation.

    Args:
      names: the names of the figures of the evaluation. A figure of a task is
        called TASK/FIGURE.

    Raises:
      RequestError: where the evaluation is of the task that eval.best names,
        but has no such figure.
    """
    task, is_of_task, _ = self.figure.partition('/')
    choices = list(names)
    if is_of_task:
      choices = [name for name in names if name.partition('/')[0] == task]
    require(self.figure in names or not choices,
            f'eval.best is {self.figure!r}, which is no figure of these '
            f'evaluations: choose from {", ".join(choices)}')
    return self.figure in names

  @property
  def is_over(self) -> bool:
    """Whether the run is to end."""
    return 0 < self.patience <= self.waited

  def explain_end(self, n: int) -> str:
    """Returns the sentence for a run that ends early after step `n`."""
    best = 'no evaluation had a number'
    if self.step is not None:
      best = f'the best is {self.value:.6g}, of step {self.step}'
    return (f'ended early after step {n}: {self.figure} has not been better in '
            f'{self.waited} evaluations in a row (eval.patience); {best}')
