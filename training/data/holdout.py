"""What is held out of a source for evaluation, by data.holdout_every = n.

Of documents, the first of each n. A source that is a single file of text,
`text:one.txt`, is one document, of which nothing could be held out: it is cut
in two, and its last n-th part is held out. A run may be evaluated on one of
two halves of what is held out alone: eval.part.
"""

from collections.abc import Iterator
import dataclasses

import numpy as np

from training.data import sources

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


def cut(source: sources.Source, every: int | None, part: str = ''
        ) -> sources.Source:
  """Returns a source that is a single file of text as two documents: its last
  1/every, in characters and rounded up, which is document 0 and so the one that
  is held out, and all that comes before it. Another source is returned as it
  is.

  Args:
    source: as it was parsed.
    every: data.holdout_every.
    part: eval.part: document 0 is this half of the last part.
  """
  if (every or 0) < 2 or source.reader != 'text' or len(source.files) != 1:
    return source

  def read(path: str) -> Iterator[str]:
    for text in source.read(path):
      end = len(text) - -(-len(text) // every)
      middle = (end + len(text)) // 2
      last = {'': slice(end, None), 'first': slice(end, middle),
              'second': slice(middle, None)}[part]
      yield from (text[last], text[:end])

  # The reader is part of what names the tokens in the cache.
  return dataclasses.replace(
      source, reader=' '.join(filter(None, (
          f'{source.reader}, the last 1/{every} first', part))), read=read,
      is_cut=True)
