"""Which documents are held out for evaluation."""

import numpy as np

PARTS = ('', 'first', 'second')  # eval.part: all, or one of every two documents


def chosen(numbers: np.ndarray, every: int | None, split: str, part: str = ''
           ) -> np.ndarray:
  """Tells which documents belong to a split.

  Args:
    numbers: int64 [N], their places in the source.
    every: data.holdout_every, of which 0 holds nothing out; None: the source
      has its split for itself (data.eval_source), and all belong to it.
    split: 'train' or 'eval'.
    part: eval.part, which is read for 'eval'.
  """
  if every is None:
    wanted, order = np.ones(len(numbers), bool), numbers
  else:
    held_out = numbers % every == 0 if every else np.zeros(len(numbers), bool)
    wanted = held_out if split == 'eval' else ~held_out
    order = numbers // max(every, 1)
  if part and split == 'eval':
    wanted = wanted & (order % 2 == PARTS.index(part) - 1)
  return wanted
