"""The best stretches of a context, by the scores of its tokens.

A stretch from token i to token j has the score start_i + end_j (Devlin et al.
2019, section 4.2). All stretches of at most `most` tokens of all windows of a
context are compared. A stretch that several windows show counts where its score
is highest. Where a question may have no answer, that has the score of the null
token, start_0 + end_0, the lowest of the windows: each window has to agree
(section 4.3). The answer is the best stretch unless the null score is higher by
more than a threshold.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


NEVER = 1e30  # how much higher null scores where there is no stretch


class Window(NamedTuple):
  """What the model says of one window of a context.

  Attributes:
    starts_T, ends_T: [T], scores of the context's tokens that it shows.
    spans_T2: [T, 2], the characters that each stands for.
    null: the score of no answer.
  """
  starts_T: np.ndarray
  ends_T: np.ndarray
  spans_T2: np.ndarray
  null: float


class Best(NamedTuple):
  """The answers to one question.

  Attributes:
    text: the answer; '': the context has none.
    stretches: (text, first character, score) of the best ones, best first.
    null_minus_best: how much higher the null score is than the best stretch's.
  """
  text: str
  stretches: list[tuple[str, int, float]]
  null_minus_best: float

  @property
  def best(self) -> str:
    """The text of the best stretch; '' where there is none."""
    return self.stretches[0][0] if self.stretches else ''


def n_best(context: str, window: Window, most: int, count: int
           ) -> dict[tuple[int, int], float]:
  """Returns the scores of the best `count` stretches of a window, best first,
  by the first of their characters and the one after the last; of equals the
  earlier and shorter one. Space alone is no stretch, and what several tokens of
  one character make is one."""
  T = len(window.starts_T)
  if not T:
    return {}
  length_1S = np.arange(min(most, T))[None]
  last_TS = np.arange(T)[:, None] + length_1S
  scores_TS = np.where(
      last_TS < T, np.asarray(window.starts_T, np.float64)[:, None]
      + np.asarray(window.ends_T, np.float64)[np.minimum(last_TS, T - 1)],
      -np.inf)
  flat = scores_TS.reshape(-1)
  found: dict[tuple[int, int], float] = {}
  for i in np.argsort(-flat, kind='stable'):
    if len(found) == count or not np.isfinite(flat[i]):
      break
    first, more = divmod(int(i), scores_TS.shape[1])
    place = (int(window.spans_T2[first, 0]),
             int(window.spans_T2[first + more, 1]))
    if place not in found and context[slice(*place)].strip():
      found[place] = float(flat[i])
  return found


def best(context: str, windows: Sequence[Window], *, most: int, count: int,
         may_be_null: bool, threshold: float = 0.0) -> Best:
  """Returns the answers that a context holds.

  Args:
    context: the text that the windows show.
    windows: of it, which together show all of it.
    most: tokens of a stretch.
    count: how many of the best stretches are wanted.
    may_be_null: whether there may be no answer.
    threshold: how much higher the null score has to be for that.
  """
  found: dict[tuple[int, int], float] = {}
  for window in windows:
    for place, score in n_best(context, window, most, count).items():
      found[place] = max(score, found.get(place, -np.inf))
  ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
  stretches = [(context[first:end].strip(), first, score)
               for (first, end), score in ranked[:count]]
  null = min(window.null for window in windows)
  gap = null - stretches[0][2] if stretches else NEVER
  none = not stretches or may_be_null and gap > threshold
  return Best('' if none else stretches[0][0], stretches, float(gap))


def as_json(answers: Sequence[Best]) -> list[list[dict[str, Any]]]:
  """Returns the best stretches of each question with their probabilities among
  one another, as the predictions of BERT's code have them."""
  rows = []
  for answer in answers:
    scores = np.array([score for _, _, score in answer.stretches])
    shares = np.exp(scores - scores.max(initial=-np.inf))
    rows.append([
        dict(text=text, start=first, score=score, probability=float(share))
        for (text, first, score), share in zip(
            answer.stretches, shares / shares.sum())])
  return rows
