"""The measures of SQuAD, by the rules of its two official scripts,
evaluate-v1.1.py and evaluate-v2.0.py (Rajpurkar et al. 2016; Rajpurkar, Jia and
Liang 2018). Both give percentages: so do these.

Of an answer neither case counts, nor punctuation, nor the articles a, an and
the, nor how much space there is. `exact` is whether what is left is the same;
`f1` that of the words, as often as they stand there. Of several right answers
the best one counts. A question without an answer has the answer '', which only
'' equals.
"""

import collections
from collections.abc import Mapping, Sequence
import re
import string
from typing import Any, NamedTuple

import numpy as np

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_PUNCTUATION = str.maketrans('', '', string.punctuation)


class Score(NamedTuple):
  """Of one answer, from 0 to 1."""
  exact: float
  f1: float


def normalised(answer: str) -> str:
  """Returns what counts of an answer: its words, with one space between."""
  text = answer.lower().translate(_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', text).split())


def score(answer: str, right: Sequence[str]) -> Score:
  """Returns the best score of an answer, over the right ones; (): '' is right.
  """
  found = normalised(answer)
  # Right answers of punctuation or an article alone are left out, as in v2.0.
  golds = [gold for gold in map(normalised, right) if gold] or ['']
  return Score(float(max(gold == found for gold in golds)),
               max(_f1(gold.split(), found.split()) for gold in golds))


def _f1(gold: Sequence[str], found: Sequence[str]) -> float:
  if not gold or not found:
    return float(gold == found)
  same = sum((collections.Counter(gold) & collections.Counter(found)).values())
  # 2 p r / (p + r), with p = same / found and r = same / gold.
  return 2 * same / (len(gold) + len(found))


def measures(answers: Mapping[str, str], right: Mapping[str, Sequence[str]]
             ) -> dict[str, Any]:
  """Returns the figures of the official scripts, in percent.

  Args:
    answers: by question, what was found; '': that it has no answer.
    right: by question, the right answers; (): it has none.

  Returns:
    exact, f1, total; where some questions have no answer also HasAns_exact, ...
    and NoAns_exact, ..., as evaluate-v2.0.py names them.
  """
  assert answers.keys() == right.keys()
  scores = {name: score(answers[name], right[name]) for name in right}
  parts = {'': list(right)}
  if not all(right.values()):
    parts |= {'HasAns_': [name for name in right if right[name]],
              'NoAns_': [name for name in right if not right[name]]}
  figures: dict[str, Any] = {}
  for prefix, names in parts.items():
    if names:
      for kind in Score._fields:
        figures[prefix + kind] = 100 * float(
            np.mean([getattr(scores[name], kind) for name in names]))
      figures[f'{prefix}total'] = len(names)
  return figures


def best_thresholds(answers: Mapping[str, str],
                    right: Mapping[str, Sequence[str]],
                    null_scores: Mapping[str, float]) -> dict[str, float]:
  """Returns the best exact and f1 that a threshold gives, and the threshold.

  Above it a question counts as one without an answer. As evaluate-v2.0.py,
  this looks at the right answers, and so says how well the scores part the
  questions, not how well the model answers.

  Args:
    answers: by question, the best answer that is not ''.
    right: by question, the right answers; (): it has none.
    null_scores: by question, how much likelier it is to have no answer.
  """
  names = sorted(null_scores, key=lambda name: null_scores[name])
  none = sum(not right[name] for name in names)
  found = {}
  for kind in Score._fields:
    # From one question to the next the threshold rises above its score: what
    # has an answer gains its score, what has none was right, and now is wrong.
    gains = [getattr(score(answers[name], right[name]), kind) if right[name]
             else -1.0 for name in names]
    totals = np.concatenate([[0], np.cumsum(gains)])
    best = int(np.argmax(totals))
    found[f'best_{kind}'] = 100 * (none + float(totals[best])) / len(names)
    found[f'best_{kind}_thresh'] = (
        float(null_scores[names[best - 1]]) if best else 0.0)
  return found
