"""What one answer to everything scores in a probe.

That is what a model gets which knows no more of a task than which answer is the
best one to give always. The largest of the shares that some rows have is larger
than any answer's true share, so the answer is chosen on other rows than those
that it is scored on: on seven eighths of them it is chosen, on the last eighth
scored, and so for each eighth.
"""

import functools

import ml_collections
import numpy as np

from configs.errors import one_of
from training.data import probes
from training.evals.tasks import probe as task

ROWS = 4096  # over all levels
FOLDS = 8
# In `accuracy` all answers count alike; in a task's figures all levels do.
FIGURES = ('accuracy', 'probe/accuracy', 'probe/rows_right')


def score(config: ml_collections.ConfigDict, figure: str = 'probe/accuracy'
          ) -> float:
  """Returns the figure of the constant answer that is the best one for it.

  Args:
    config: of a run whose source is a probe.
    figure: one of FIGURES.
  """
  one_of('figure', figure, FIGURES)
  return _score(probes.name_of(config.data.source), probes.settings(config),
                probes.held_out_seed(config), figure)


@functools.cache
def _score(name: str, settings: probes.Settings, seed: int, figure: str
           ) -> float:
  probe = probes.PROBES[name]
  levels = [()] if figure == 'accuracy' else [
      (cell.level,) for cell in task.cells(settings, probe.grows, longer=False)]
  count = ROWS // len(levels)
  right, asked = [], []  # [level][fold]
  for own in levels:
    rows = probes.Rows(probe, settings._replace(held_out=count), 'eval', seed,
                       own)
    folds = [[rows[i] for i in range(fold, count, FOLDS)]
             for fold in range(FOLDS)]
    answers = [_answers(fold, figure == 'probe/rows_right') for fold in folds]
    right.append([np.bincount(each, minlength=probe.vocab_size(settings))
                  for each, _ in answers])
    asked.append([number for _, number in answers])
  right_NKV, asked_NK1 = np.array(right), np.array(asked)[..., None]
  rest_KV = ((right_NKV.sum(1, keepdims=True) - right_NKV)
             / (asked_NK1.sum(1, keepdims=True) - asked_NK1)).mean(0)
  score_KV = (right_NKV / asked_NK1).mean(0)
  return float(score_KV[np.arange(FOLDS), rest_KV.argmax(1)].mean())


def _answers(rows: list[probes.Row], whole: bool) -> tuple[np.ndarray, int]:
  """Returns the answers that rows ask for, and how many these are; or where
  `whole` the answers of rows that ask for one alone, and how many rows
  ask for any."""
  each = [row.targets[row.asked] for row in rows if row.asked.any()]
  if whole:
    return np.array([own[0] for own in each if (own == own[0]).all()],
                    int), len(each)
  answers = np.concatenate(each)
  return answers, len(answers)
