"""The measures of answers to questions, by the rules of SQuAD's two official
scripts, evaluate-v1.1.py and evaluate-v2.0.py (Rajpurkar et al. 2016;
Rajpurkar, Jia and Liang 2018), and the files of what a model answers, which
they read.

An answer is a stretch of the context. A stretch from token i to token j has the
score start_i + end_j (Devlin et al. 2019, section 4.2). All stretches of at
most `most` tokens of all windows of a context are compared. A stretch that
several windows show counts where its score is highest. Where a question may
have no answer, that has the score of the null token, start_0 + end_0, the
lowest of the windows: each window has to agree (section 4.3). The answer is the
best stretch unless the null score is higher by more than a threshold.

Of an answer neither case counts, nor punctuation, nor the articles a, an and
the, nor how much space there is. `exact` is whether what is left is the same;
`f1` that of the words, as often as they stand there. Of several right answers
the best one counts. A question without an answer has the answer '', which only
'' equals. Figures are percentages, as the scripts give them.
"""

import collections
from collections.abc import Mapping, Sequence
import json
import re
import string
from typing import Any, NamedTuple

import numpy as np

from configs.errors import require
from training.data.records import Questions
from training.measures import Measured

# The names of what is measured; all but the first three only where questions
# have no answer.
FIGURES = 'exact', 'f1', 'total', 'HasAns_*', 'NoAns_*', 'best_*'
NEVER = 1e30  # how much higher null scores where there is no stretch
_ARTICLES = re.compile(r'\b(a|an|the)\b')
_PUNCTUATION = str.maketrans('', '', string.punctuation)


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


def answers(view: Questions, scores: Sequence[np.ndarray],
            null_places: Sequence[int], begins: Sequence[int], *, most: int,
            count: int, threshold: float) -> list[Best]:
  """Returns the answer to each question of a view.

  There may be none where a question of the view has none.

  Args:
    view: the questions.
    scores: of each item, [L, 2]: of its row's tokens, padding or not.
    null_places: of each row, the place of its null token.
    begins: of each row, where its paragraph begins.
    most: tokens of an answer.
    count: how many of the best answers are wanted.
    threshold: by how much the null score has to be higher.
  """
  windows: list[list[Window]] = [[] for _ in view.questions]
  for item, scores_L2, null, begin in zip(
      view.items, scores, null_places, begins, strict=True):
    size = len(item.context)
    starts_T, ends_T = np.asarray(scores_L2, np.float64)[begin:begin + size].T
    windows[item.asked].append(Window(
        starts_T, ends_T,
        view.contexts[item.asked][1][item.first:item.first + size],
        float(np.sum(scores_L2[null], dtype=np.float64))))
  none = any(not question.answers for question in view.questions)
  return [best(context, own, most=most, count=count, may_be_null=none,
               threshold=threshold)
          for (context, _), own in zip(view.contexts, windows, strict=True)]


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


def rules(answers: Mapping[str, str], right: Mapping[str, Sequence[str]]
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


def figures(view: Questions, found: Sequence[Best]) -> dict[str, Any]:
  """Returns the figures of SQuAD's scripts, in percent; where questions have no
  answer with the best thresholds."""
  right = {str(i): [text for text, _ in question.answers]
           for i, question in enumerate(view.questions)}
  own = rules(
      {str(i): answer.text for i, answer in enumerate(found)}, right)
  if not all(right.values()):
    own |= best_thresholds(
        {str(i): answer.best for i, answer in enumerate(found)}, right,
        {str(i): answer.null_minus_best for i, answer in enumerate(found)})
  return own


def check_ids(view: Questions) -> None:
  """Raises RequestError where `written` could not tell two questions apart.
  """
  names = [question.id for question in view.questions]
  require(len({*names}) == len(names), 'two questions have one id, and '
          '--predictions names each answer by its id: evaluate the files one '
          'by one')


def written(view: Questions, found: Sequence[Best]) -> dict[str, str]:
  """Returns the texts of three JSON files, by what stands in their names.

  '': {question: answer}, as evaluate-v2.0.py reads it; 'nbest': {question: the
  best answers}; 'null_odds': {question: how much higher the null score is},
  which that script reads as --na-prob-file. Of `view`, check_ids holds.
  """
  names = [question.id for question in view.questions]
  return {kind: json.dumps(table, indent=1, ensure_ascii=False) + '\n'
          for kind, table in {
              '': {name: answer.text for name, answer in zip(names, found)},
              'nbest': dict(zip(names, map(_n_best_json, found))),
              'null_odds': {name: answer.null_minus_best
                            for name, answer in zip(names, found)}}.items()}


def _n_best_json(answer: Best) -> list[dict[str, Any]]:
  """Returns the best stretches with their probabilities among one another, as
  the predictions of BERT's code have them."""
  scores = np.array([score for _, _, score in answer.stretches])
  shares = np.exp(scores - scores.max(initial=-np.inf))
  return [dict(text=text, start=first, score=score, probability=float(share))
          for (text, first, score), share in zip(
              answer.stretches, shares / shares.sum())]


def measure(view: Questions, scores: Sequence[np.ndarray],
            null_places: Sequence[int], begins: Sequence[int], options: Any
            ) -> Measured:
  """Returns what is found of the questions of a view.

  Args:
    view, scores, null_places, begins: as for `answers`.
    options: max_answer_length, n_best and null_threshold.
  """
  found = answers(view, scores, null_places, begins,
                  most=options.max_answer_length, count=options.n_best,
                  threshold=options.null_threshold)
  own = figures(view, found)
  lines = [f'{own["total"]:,} questions']
  for kind in 'exact', 'f1':
    parts = ''.join(
        f', {words} {own[f"{part}_{kind}"]:.2f}' for part, words in (
            ('HasAns', 'of those with an answer'), ('NoAns', 'without'))
        if f'{part}_{kind}' in own)
    best = '' if f'best_{kind}' not in own else (
        f'; at best {own[f"best_{kind}"]:.2f}, with --null_threshold='
        f'{own[f"best_{kind}_thresh"]:.2f}')
    lines.append(f'  {kind:<16} {own[kind]:.2f}{parts}{best}')
  return Measured(own, lines, {} if not options.predictions else
                  written(view, found))
