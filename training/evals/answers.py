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

In an answer neither case counts, nor punctuation, nor the articles a, an and
the, nor how much space there is. `exact` is whether what is left is the same;
`f1` that of the words, as often as they stand there. Where several answers are
right the best one counts. A question without an answer has the answer '', which
only '' equals. Figures are percentages, as the scripts give them.
"""

import collections
from collections.abc import Sequence
import json
import re
import string
from typing import Any, NamedTuple

import numpy as np

from common.errors import require
from training.data.records import Questions
from training.evals import items
from training.objectives import labelled

# The names of what is measured; all but the first three only where questions
# have no answer.
FIGURE_NAMES = 'exact', 'f1', 'total', 'HasAns_*', 'NoAns_*'
# How much higher null scores where there is no stretch.
NULL_LEAD_WITHOUT_SPANS = 1e30
_ARTICLES = re.compile(r'\b(a|an|the)\b')
_PUNCTUATION = str.maketrans('', '', string.punctuation)


class ContextWindow(NamedTuple):
  """The scores of one window of a context.

  Attributes:
    starts_T, ends_T: [T], the scores of the context's tokens that it shows.
    spans_T2: [T, 2], the characters that each stands for.
    null: the score of no answer.
  """
  starts_T: np.ndarray
  ends_T: np.ndarray
  spans_T2: np.ndarray
  null: float


class BestSpans(NamedTuple):
  """The answers to one question.

  Attributes:
    text: the answer; '': the context has none.
    stretches: (text, first character, score) of the best ones, best first.
    null_minus_best: how much higher the null score is than the best stretch's.
  """
  text: str
  stretches: list[tuple[str, int, float]]
  null_minus_best: float


def best_spans_of_window(context: str, window: ContextWindow, most: int,
                         count: int
           ) -> dict[tuple[int, int], float]:
  """Returns the scores of the best `count` stretches of a window, best first,
  by the first of their characters and the one after the last; of equals the
  earlier and shorter one. Space alone is no stretch, and what several tokens of
  one character make is one.

  Args:
    context: the text that the window shows.
    window: the window.
    most: tokens of a stretch.
    count: how many of the best stretches are wanted.
  """
  # The score of each stretch, of S tokens at most.
  T = len(window.starts_T)
  S = min(most, T)
  last_TS = np.arange(T)[:, None] + np.arange(S)[None]
  ends_T = np.append(window.ends_T, -np.inf)  # there is no token past the last
  ends_TS = ends_T[np.minimum(last_TS, T)]
  scores_TS = window.starts_T[:, None] + ends_TS

  # The best ones; a stable sort leaves equals in order.
  best_scores: dict[tuple[int, int], float] = {}
  for place in np.argsort(-scores_TS, axis=None, kind='stable'):
    first, more = divmod(int(place), S)
    score = float(scores_TS[first, more])
    if len(best_scores) == count or not np.isfinite(score):
      break
    start = int(window.spans_T2[first, 0])
    end = int(window.spans_T2[first + more, 1])
    if (start, end) not in best_scores and context[start:end].strip():
      best_scores[start, end] = score
  return best_scores


def choose_answer(context: str, windows: Sequence[ContextWindow], *, most: int,
                  count: int,
         may_be_null: bool, threshold: float = 0.0) -> BestSpans:
  """Returns the answers that a context holds.

  Args:
    context: the text that the windows show.
    windows: its windows, which together show all of it.
    most: tokens of a stretch.
    count: how many of the best stretches are wanted.
    may_be_null: whether there may be no answer.
    threshold: how much higher the null score has to be for that.
  """
  # The best score of each stretch.
  scores: dict[tuple[int, int], float] = {}
  for window in windows:
    for place, value in best_spans_of_window(context, window=window, most=most,
                               count=count).items():
      scores[place] = max(value, scores.get(place, -np.inf))
  ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
  stretches = []
  for (first, end), value in ranked[:count]:
    stretches.append((context[first:end].strip(), first, value))
  if not stretches:
    return BestSpans(text='', stretches=[],
                     null_minus_best=NULL_LEAD_WITHOUT_SPANS)

  # Each window has to agree that there is no answer.
  null = min(window.null for window in windows)
  text, _, highest = stretches[0]
  gap = float(null - highest)
  if may_be_null and gap > threshold:
    text = ''
  return BestSpans(text=text, stretches=stretches, null_minus_best=gap)


def answer_questions(view: Questions, scores: Sequence[np.ndarray], kind: str,
            options: Any) -> list[BestSpans]:
  """Returns the answer to each question of a view.

  There may be none where a question of the view has none.

  Args:
    view: the questions.
    scores: the scores of each item, [L, 2]: of its row's tokens, padding or
      not.
    kind: what the model stacks, as architectures.stack names it.
    options: max_answer_length, n_best and null_threshold.
  """
  # The windows of each question.
  windows: list[list[ContextWindow]] = [[] for _ in view.questions]
  for item, scores_L2 in zip(view.items, scores, strict=True):
    scores_L2 = np.asarray(scores_L2, np.float64)
    size = len(item.context)
    begin = labelled.start_of_paragraph(item)
    shown_T2 = scores_L2[begin:begin + size]
    _, spans = view.contexts[item.asked]
    null = scores_L2[labelled.place_of_null_token(item, kind)].sum()
    windows[item.asked].append(ContextWindow(
        starts_T=shown_T2[:, 0], ends_T=shown_T2[:, 1],
        spans_T2=spans[item.first:item.first + size], null=float(null)))

  # Their answers.
  may_be_null = not all(question.answers for question in view.questions)
  chosen = []
  for (context, _), shown in zip(view.contexts, windows, strict=True):
    chosen.append(choose_answer(context, windows=shown,
                                most=options.max_answer_length,
                       count=options.n_best, may_be_null=may_be_null,
                       threshold=options.null_threshold))
  return chosen


def normalize_answer(answer: str) -> str:
  """Returns what counts in an answer: its words, with one space between."""
  text = answer.lower().translate(_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', text).split())


def score_answer(answer: str, right: Sequence[str]) -> tuple[float, float]:
  """Returns the best `exact` and `f1` of an answer, from 0 to 1, over the right
  ones; (): '' is right."""
  # Right answers of punctuation or an article alone are left out, as in v2.0.
  golds = [normalize_answer(text) for text in right]
  golds = [gold for gold in golds if gold] or ['']
  predicted = normalize_answer(answer)
  exact = float(predicted in golds)
  f1 = max(_f1_of_words(gold.split(), predicted.split()) for gold in golds)
  return exact, f1


def _f1_of_words(gold: Sequence[str], predicted: Sequence[str]) -> float:
  """Returns the F1 of the words of an answer: 2 p r / (p + r), with the
  precision p = same / predicted and the recall r = same / gold."""
  if not gold or not predicted:
    return float(gold == predicted)
  common = collections.Counter(gold) & collections.Counter(predicted)
  return 2 * common.total() / (len(gold) + len(predicted))


def squad_figures(predictions: Sequence[str], right: Sequence[Sequence[str]]
          ) -> dict[str, Any]:
  """Returns the figures of the official scripts, in percent.

  Args:
    predictions: the answer that was found to each question; '': that it has
      none.
    right: the right answers to each question; (): it has none.

  Returns:
    exact, f1, total; where some questions have no answer also HasAns_exact, ...
    and NoAns_exact, ..., as evaluate-v2.0.py names them.
  """
  # The exact match and F1 of each of the N questions.
  scores = []
  for answer, texts in zip(predictions, right, strict=True):
    scores.append(score_answer(answer, texts))
  scores_N2 = np.array(scores)

  # Questions with and without an answer are measured apart, too.
  answered_N = np.array([bool(texts) for texts in right])
  parts = {'': np.ones(len(right), bool)}
  if not answered_N.all():
    parts['HasAns_'] = answered_N
    parts['NoAns_'] = ~answered_N
  figures: dict[str, Any] = {}
  for prefix, chosen_N in parts.items():
    if not chosen_N.any():
      continue
    exact, f1 = 100 * scores_N2[chosen_N].mean(0)
    figures[f'{prefix}exact'] = float(exact)
    figures[f'{prefix}f1'] = float(f1)
    figures[f'{prefix}total'] = int(chosen_N.sum())
  return figures


def measure_answers(view: Questions,
                    predictions: Sequence[BestSpans]) -> dict[str, Any]:
  """Returns the figures of SQuAD's scripts, in percent."""
  # Over all questions.
  right = []
  for question in view.questions:
    right.append([text for text, _ in question.answers])
  chosen = [answer.text for answer in predictions]
  overall = squad_figures(chosen, right)

  # For each question.
  scores = []
  for answer, texts in zip(chosen, right):
    scores.append(score_answer(answer, texts))
  scores_N2 = 100 * np.array(scores)
  names = []
  for question, (context, _) in zip(view.questions, view.contexts):
    names.append((question.question, context))
  overall['items'] = {'exact': items.record_scores(scores_N2[:, 0], names),
                      'f1': items.record_scores(scores_N2[:, 1], names)}
  return overall


def format_report(figures: dict[str, Any]) -> list[str]:
  """Returns `figures` for a reader."""
  parts = {'HasAns': 'of those with an answer', 'NoAns': 'without'}
  report = [f'{figures["total"]:,} questions']
  for kind in ('exact', 'f1'):
    line = f'  {kind:<16} {figures[kind]:.2f}'
    for part, words in parts.items():
      if f'{part}_{kind}' in figures:
        line += f', {words} {figures[f"{part}_{kind}"]:.2f}'
    report.append(line)
  return report


def check_question_ids(view: Questions) -> None:
  """Raises RequestError where `written` could not tell two questions apart.
  """
  names = [question.id for question in view.questions]
  require(len({*names}) == len(names), 'two questions have one id, and '
          '--predictions names each answer by its id: evaluate the files one '
          'by one')


def format_prediction_files(view: Questions,
                            predictions: Sequence[BestSpans]) -> dict[str, str]:
  """Returns the texts of three JSON files, by what stands in their names.

  '': {question: answer}, as evaluate-v2.0.py reads it; 'nbest': {question: the
  best answers}; 'null_odds': {question: how much higher the null score is},
  which that script reads as --na-prob-file. `check_ids` holds for the view.
  """
  best_texts = {}
  stretches = {}
  odds = {}
  for question, answer in zip(view.questions, predictions):
    best_texts[question.id] = answer.text
    stretches[question.id] = _spans_with_probabilities(answer)
    odds[question.id] = answer.null_minus_best
  return {'': _format_json(best_texts), 'nbest': _format_json(stretches),
          'null_odds': _format_json(odds)}


def _format_json(by_question: dict[str, Any]) -> str:
  """Returns the text of a JSON file."""
  return json.dumps(by_question, indent=1, ensure_ascii=False) + '\n'


def _spans_with_probabilities(answer: BestSpans) -> list[dict[str, Any]]:
  """Returns the best stretches with their probabilities among one another, as
  the predictions of BERT's code have them."""
  scores = np.array([score for _, _, score in answer.stretches])
  shares = np.exp(scores - scores.max(initial=-np.inf))
  shares /= shares.sum()
  rows = []
  for (text, first, score), share in zip(answer.stretches, shares):
    rows.append(dict(text=text, start=first, score=score,
                     probability=float(share)))
  return rows
