"""The best evaluation of a run so far, and whether to go on after it.

eval.best names a figure of the evaluations. The checkpoint of the best one is
kept beside the newest, and with eval.patience the run ends after so many
evaluations in a row that were no better (early stopping: Prechelt 1998). What
was best is part of each checkpoint's record, so that a run that is resumed
decides as it would have without the break.
"""

from collections.abc import Collection, Mapping
import dataclasses
import math
from typing import Any

import ml_collections
import numpy as np

from configs.errors import one_of, require
from training import evals
from training.workdir import checkpoints

# Of figures whose best value is known; the last part of a name, TASK/FIGURE.
LEAST = ('loss', 'perplexity', 'bits_per_byte', 'word_perplexity',
         'byte_perplexity')
LARGEST = ('accuracy', 'f1', 'macro_f1', 'micro_f1', 'mcc', 'matthews',
           'precision', 'recall', 'pearson', 'spearman', 'exact', 'exact_match',
           'em', 'acc', 'acc_norm', 'bleu')
WAYS = ('', 'least', 'largest')


def check_best(config: ml_collections.ConfigDict) -> None:
  """Raises RequestError for fields of config.eval that do not fit together."""
  e = config.eval
  one_of('eval.best_is', e.best_is, WAYS)
  for name, rest in (('patience', 0), ('best_is', '')):
    require(e.best or e[name] == rest, f'eval.{name} is {e[name]!r}, which is '
            f'not read where eval.best is empty: leave it at {rest!r}, or set '
            'eval.best to a figure of the evaluations, such as loss')
  if not e.best:
    return
  task, is_task, _ = e.best.partition('/')
  if is_task:
    tasks = evals.listed(e.tasks)
    require(task in tasks, f'eval.best is {e.best!r}, and eval.tasks has no '
            f'{task!r}: it has {", ".join(tasks) or "none"}')
  every = 'eval.tasks_every_steps' if is_task else 'eval.every_steps'
  require(is_task or e.every_steps, f'eval.best is {e.best!r}, but {every} is '
          '0: nothing is evaluated while training')
  require(e.tasks_every_steps or not (is_task and e.patience), 'eval.patience '
          f'is {e.patience}, but {every} is 0: the task {task} is done after '
          'the last step alone. Set it, or leave eval.patience at 0')
  require(e.best_is or _last_part(e.best) in (*LEAST, *LARGEST),
          f'eval.best is {e.best!r}, of which it is not known which value is '
          'the best: set eval.best_is to least or largest')


def _last_part(name: str) -> str:
  return name.rpartition('/')[2]


@dataclasses.dataclass
class Best:
  """What the evaluations of a run have been so far.

  Attributes:
    figure: eval.best.
    largest: whether the largest value is the best.
    patience: eval.patience.
    step: of the best evaluation; None: there was none.
    value: its figure.
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
  def of(cls, config: ml_collections.ConfigDict,
         record: Mapping[str, Any] | None) -> 'Best | None':
    """Returns what a run has to begin with; None where eval.best is empty.

    Args:
      config: the run's.
      record: what `record` returned before the run was stopped, if it was.
    """
    e = config.eval
    if not e.best:
      return None
    largest = (e.best_is == 'largest' if e.best_is
               else _last_part(e.best) in LARGEST)
    best = cls(e.best, largest, e.patience)
    if record and record['figure'] == e.best and record['largest'] == largest:
      best = cls(**record, patience=e.patience)
    return best

  def record(self) -> dict[str, Any]:
    """Returns what a checkpoint keeps of it."""
    fields = dataclasses.asdict(self)
    del fields['patience']  # a run that is resumed may have another
    return fields

  def take(self, n: int, figures: Mapping[str, float]) -> None:
    """Takes the figures of the evaluation after step `n`, if they have this
    one; raises as `is_in`."""
    self.seen = n
    if not self.is_in(figures):
      return
    value = float(figures[self.figure])
    # Every process decides as process 0 does.
    if checkpoints.from_process_0(np.int32(self._is_better(value))):
      self.step, self.value, self.waited = n, value, 0
    else:
      self.waited += 1

  def is_in(self, names: Collection[str]) -> bool:
    """Returns whether it is one of the figures of an evaluation.

    Raises:
      RequestError: where these are those of its own task, and it is not there.
    """
    task, is_task, _ = self.figure.partition('/')
    same = [name for name in names
            if name.partition('/')[0] == task or not is_task]
    require(self.figure in names or not same,
            f'eval.best is {self.figure!r}, which is no figure of these '
            f'evaluations: choose from {", ".join(same)}')
    return self.figure in names

  def _is_better(self, value: float) -> bool:
    if not math.isfinite(value):
      return False
    return self.value is None or (
        value > self.value if self.largest else value < self.value)

  @property
  def is_over(self) -> bool:
    """Whether the run is to end."""
    return 0 < self.patience <= self.waited

  def sentence(self, n: int) -> str:
    """Says why the run ends after step `n`."""
    was = ('no evaluation had a number' if self.step is None else
           f'the best is {self.value:.6g}, of step {self.step}')
    return (f'ended early after step {n}: {self.figure} has not been better in '
            f'{self.waited} evaluations in a row (eval.patience); {was}')


def ended_early(config: ml_collections.ConfigDict,
                record: Mapping[str, Any] | None, step: int) -> str:
  """Returns why a run that is at `step` does not go on; '' where it does.

  Args:
    config: the run's.
    record: of Best, in the checkpoint that the run would go on from.
    step: of that checkpoint.
  """
  best = Best.of(config, record)
  return best.sentence(step) if best and best.is_over else ''
