"""What is held out of a source for evaluation, by data.holdout_every = n.

Of documents, the first of each n. A source that is a single file of text is
cut in two first (sources.cut), and its last n-th part is held out. A run may be
evaluated on one of two halves of what is held out alone: eval.part.
"""

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
