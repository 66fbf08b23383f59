"""The measures of answers to questions, by the rules of SQuAD's two official
scripts, evaluate-v1.1.py and evaluate-v2.0.py (Rajpurkar et al. 2016;
Rajpurkar, Jia and Liang 2018), and the files of what a model answers, which
they read.

An answer is a span of the context. A span from token i to token j has the score
start_i + end_j (Devlin et al. 2019, section 4.2). A long context is read in
several windows, and the spans of a bounded number of tokens of all of them are
compared. A span that several windows show counts where its score is highest.
Where a question may have no answer, that has the score of the null token,
start_0 + end_0, the lowest of the windows: each window has to agree (section
4.3). The answer is the best span unless the null score is higher by more than a
threshold.

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
# How much higher the null score is where no window holds a span: a number that
# JSON can hold, above every threshold.
NULL_LEAD_WITHOUT_SPANS = 1e30
_ARTICLES = re.compile(r'\b(a|an|the)\b')
_DELETE_PUNCTUATION = str.maketrans('', '', string.punctuation)


class ContextWindow(NamedTuple):
  """A window of a context: T of its tokens, with their scores.

  Attributes:
    starts_T, ends_T: [T], the scores of each token as the first and as the last
      one of the answer.
    characters_T2: [T, 2], the first character that each token stands for, and
      the one after its last.
    null: the score of no answer.
  """
  starts_T: np.ndarray
  ends_T: np.ndarray
  characters_T2: np.ndarray
  null: float


class ScoredSpan(NamedTuple):
  """A span of the context that may be the answer.

  Attributes:
    text: its text.
    start: its first character in the context, before space was stripped.
    score: the score of its first token plus that of its last.
  """
  text: str
  start: int
  score: float


class ChosenAnswer(NamedTuple):
  """The answer to one question, and the spans that it was chosen from.

  Attributes:
    text: the answer; '': the context has none.
    spans: the best spans, the best first.
    null_minus_best: how much higher the null score is than the best span's.
  """
  text: str
  spans: list[ScoredSpan]
  null_minus_best: float


def best_spans_of_window(context: str, window: ContextWindow, most_tokens: int,
                         num_spans: int) -> dict[tuple[int, int], float]:
  """Finds the spans of tokens of a text that are most likely the answer to a
  question, in one part of the text (window).

  The score of a span is the score of its first token as a start plus that of
  its last token as an end (Devlin et al. 2019, section 4.2). Among equal
  scores, the earlier and then the shorter span comes first. A span of nothing
  but space is left out. If several tokens stand for one character, different
  spans of tokens may be the same characters; they count once, with their best
  score.

  Args:
    context: the text of which the window is a part.
    window: the part of the text, with the scores of its T tokens as starts and
      as ends.
    most_tokens: the largest number of tokens of a span.
    num_spans: the number of spans to return.

  Returns:
    {(first character, the one after the last): score}, the best first.
  """
  # Score all spans: axis T is the first token, and axis S how many more tokens
  # the span has. Spans that would end after the last token get -inf, which is
  # appended to the scores of the ends.
  T = len(window.starts_T)
  S = min(most_tokens, T)
  last_TS = np.arange(T)[:, None] + np.arange(S)[None]
  ends_T = np.append(window.ends_T, -np.inf)
  ends_TS = ends_T[np.minimum(last_TS, T)]
  scores_TS = window.starts_T[:, None] + ends_TS

  # Take the best spans. A stable sort keeps equal ones in the order of their
  # first token and their size.
  score_of_span: dict[tuple[int, int], float] = {}
  for index in np.argsort(-scores_TS, axis=None, kind='stable'):
    first_token, num_more = divmod(int(index), S)
    score = float(scores_TS[first_token, num_more])
    if len(score_of_span) == num_spans or not np.isfinite(score):
      break
    start = int(window.characters_T2[first_token, 0])
    end = int(window.characters_T2[first_token + num_more, 1])
    is_new = (start, end) not in score_of_span
    if is_new and context[start:end].strip():
      score_of_span[start, end] = score
  return score_of_span


def choose_answer(context: str, windows: Sequence[ContextWindow], *,
                  most_tokens: int, count: int, may_be_null: bool,
                  threshold: float = 0.0) -> ChosenAnswer:
  """Chooses the answer to a question among the spans of a text (context), or
  that there is none.

  Args:
    context: the text.
    windows: overlapping parts of the text, which together show all of it.
    most_tokens: the most tokens of an answer.
    count: the number of the best spans to return.
    may_be_null: whether the context may hold no answer.
    threshold: how much higher than the best span's score that of no answer (the
      null score) has to be for no answer.

  Returns:
    The text of the answer, '' where there is none; the best spans; and by how
    much the null score is higher than the best span's.
  """
  # Find the best spans of each window. A span that several windows show has its
  # best score.
  score_of_span: dict[tuple[int, int], float] = {}
  for window in windows:
    spans_of_window = best_spans_of_window(
        context, window=window, most_tokens=most_tokens, num_spans=count)
    for span, score in spans_of_window.items():
      score_of_span[span] = max(score, score_of_span.get(span, -np.inf))

  # Rank the spans of all windows; of equals the earlier and shorter one is
  # first. Without any span the difference to its score is a fixed number.
  ranked = sorted(score_of_span.items(), key=lambda item: (-item[1], item[0]))
  spans = []
  for (start, end), score in ranked[:count]:
    spans.append(ScoredSpan(text=context[start:end].strip(), start=start,
                            score=score))
  if not spans:
    return ChosenAnswer(text='', spans=[],
                        null_minus_best=NULL_LEAD_WITHOUT_SPANS)

  # Decide whether there is an answer. A window without the answer should score
  # the null high, so each has to agree: the lowest null score counts.
  null_score = min(window.null for window in windows)
  null_minus_best = float(null_score - spans[0].score)
  text = spans[0].text
  if may_be_null and null_minus_best > threshold:
    text = ''
  return ChosenAnswer(text=text, spans=spans, null_minus_best=null_minus_best)


def answer_questions(view: Questions, scores: Sequence[np.ndarray], stack: str,
                     options: Any) -> list[ChosenAnswer]:
  """Chooses the answer to each question, by the scores of the model.

  "No answer" is a possible choice only if the data are known to have a question
  without an answer.

  Args:
    view: the questions, their paragraphs (contexts), and the rows into which
      these were cut (windows).
    scores: for each window, the scores [L, 2] of the L tokens of its row, as
      the first and as the last token of the answer.
    stack: 'encoder' or 'decoder'. The token whose score stands for no answer is
      the first one of an encoder's row, and the last one of a decoder's.
    options: max_answer_length, n_best and null_threshold.

  Returns:
    The chosen answers, in the order of the questions.
  """
  # Collect the windows of each question. A row has the question and then T
  # tokens of the paragraph; only the scores of these are kept.
  windows_by_question: list[list[ContextWindow]] = [
      [] for _ in view.questions]
  for item, scores_L2 in zip(view.items, scores, strict=True):
    scores_L2 = np.asarray(scores_L2, np.float64)
    num_tokens = len(item.context)
    start = labelled.start_of_paragraph(item)
    context_T2 = scores_L2[start:start + num_tokens]
    null_score = scores_L2[labelled.place_of_null_token(item, stack)].sum()
    _, characters = view.contexts[item.asked]
    windows_by_question[item.asked].append(ContextWindow(
        starts_T=context_T2[:, 0], ends_T=context_T2[:, 1],
        characters_T2=characters[item.first:item.first + num_tokens],
        null=float(null_score)))

  # Choose the answers. question.answers is () for a question that is known to
  # have no answer, and None if the answer is not known.
  may_be_null = not all(question.answers for question in view.questions)
  chosen_answers = []
  for (context, _), windows in zip(view.contexts, windows_by_question,
                                   strict=True):
    chosen_answers.append(choose_answer(
        context, windows=windows, most_tokens=options.max_answer_length,
        count=options.n_best, may_be_null=may_be_null,
        threshold=options.null_threshold))
  return chosen_answers


def normalize_answer(answer: str) -> str:
  """Returns the words of an answer that count, with one space between them: in
  lower case, without punctuation and the articles a, an and the."""
  text = answer.lower().translate(_DELETE_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', text).split())


def score_answer(answer: str, right_answers: Sequence[str]
                 ) -> tuple[float, float]:
  """Scores an answer by the rules of SQuAD (Rajpurkar et al. 2016, section
  6.1).

  Args:
    answer: the answer of the model; '': it says that there is none.
    right_answers: the right answers, of which the best fitting one counts; ():
      the question has no answer.

  Returns:
    The exact match, 1 or 0; and the F1 of the words, from 0 to 1.
  """
  # Right answers that are only punctuation or an article are left out, as
  # evaluate-v2.0.py does. If none is left, '' is right.
  right_texts = []
  for right_answer in right_answers:
    text = normalize_answer(right_answer)
    if text:
      right_texts.append(text)
  if not right_texts:
    right_texts = ['']

  predicted = normalize_answer(answer)
  exact = float(predicted in right_texts)
  f1 = max(_f1_of_words(text.split(), predicted.split())
           for text in right_texts)
  return exact, f1


def _f1_of_words(gold: Sequence[str], predicted: Sequence[str]) -> float:
  """Returns the F1 of the words of an answer: 2 p r / (p + r), with the
  precision p = same / predicted and the recall r = same / gold."""
  if not gold or not predicted:
    return float(gold == predicted)
  same = collections.Counter(gold) & collections.Counter(predicted)
  return 2 * same.total() / (len(gold) + len(predicted))


def squad_figures(predictions: Sequence[str],
                  right_answers: Sequence[Sequence[str]]) -> dict[str, Any]:
  """Computes the figures of SQuAD's official evaluation scripts, in percent.

  The suffix N names the axis of the questions.

  Args:
    predictions: the answer of the model to each question; '': it says that
      there is none.
    right_answers: the right answers to each question; (): it has none.

  Returns:
    exact, f1 and total. If some questions have no answer, also the same figures
    of both groups, HasAns_exact and so on and NoAns_exact and so on, as
    evaluate-v2.0.py names them.
  """
  # Score each of the N questions: its exact match and its F1.
  scores = []
  for answer, texts in zip(predictions, right_answers, strict=True):
    scores.append(score_answer(answer, texts))
  scores_N2 = np.array(scores)

  # If some questions have no answer, also measure both groups separately.
  has_answer_N = np.array([bool(texts) for texts in right_answers])
  groups = {'': np.ones(len(right_answers), bool)}
  if not has_answer_N.all():
    groups['HasAns_'] = has_answer_N
    groups['NoAns_'] = ~has_answer_N

  figures: dict[str, Any] = {}
  for prefix, in_group_N in groups.items():
    if not in_group_N.any():
      continue
    exact, f1 = 100 * scores_N2[in_group_N].mean(0)
    figures[f'{prefix}exact'] = float(exact)
    figures[f'{prefix}f1'] = float(f1)
    figures[f'{prefix}total'] = int(in_group_N.sum())
  return figures


def measure_answers(view: Questions, predictions: Sequence[ChosenAnswer]
                    ) -> dict[str, Any]:
  """Measures answers to questions by the rules of SQuAD, together and one by
  one.

  Args:
    view: the questions, with their right answers.
    predictions: the answer of the model to each of them.

  Returns:
    The figures of `squad_figures`; and as `items` {figure: the scores of all
    questions}, by which two models can be compared question by question.
  """
  # Measure all questions together.
  right_answers = []
  for question in view.questions:
    right_answers.append([text for text, _ in question.answers])
  answers = [prediction.text for prediction in predictions]
  figures = squad_figures(answers, right_answers)

  # Score each question by itself. It is identified by its text and its
  # paragraph, also in other runs.
  scores = []
  for answer, texts in zip(answers, right_answers):
    scores.append(score_answer(answer, texts))
  scores_N2 = 100 * np.array(scores)
  names = []
  for question, (context, _) in zip(view.questions, view.contexts):
    names.append((question.question, context))
  figures['items'] = {'exact': items.record_scores(scores_N2[:, 0], names),
                      'f1': items.record_scores(scores_N2[:, 1], names)}
  return figures


def format_report(figures: dict[str, Any]) -> list[str]:
  """Returns the figures of `squad_figures` as lines for a reader."""
  words_of_group = {'HasAns': 'of those with an answer', 'NoAns': 'without'}
  lines = [f'{figures["total"]:,} questions']
  for name in ('exact', 'f1'):
    line = f'  {name:<16} {figures[name]:.2f}'
    for group, words in words_of_group.items():
      if f'{group}_{name}' in figures:
        line += f', {words} {figures[f"{group}_{name}"]:.2f}'
    lines.append(line)
  return lines


def check_question_ids(view: Questions) -> None:
  """Raises RequestError where two questions have one id, so that the files of
  `format_prediction_files` could not tell them apart."""
  ids = [question.id for question in view.questions]
  require(len({*ids}) == len(ids), 'two questions have one id, and '
          '--predictions names each answer by its id: evaluate the files one '
          'by one')


def format_prediction_files(view: Questions,
                            predictions: Sequence[ChosenAnswer]
                            ) -> dict[str, str]:
  """Formats predicted answers as the texts of three JSON files.

  Args:
    view: the questions, whose ids are known to be different.
    predictions: the answer of the model to each of them.

  Returns:
    {a word in the name of the file: its text}. '' has {question: answer}, for
    SQuAD's evaluate-v2.0.py. 'nbest' has {question: the best spans}.
    'null_odds' has {question: how much higher "no answer" scores than the best
    span}, for the --na-prob-file of that script.
  """
  answer_by_id = {}
  spans_by_id = {}
  null_odds_by_id = {}
  for question, prediction in zip(view.questions, predictions):
    answer_by_id[question.id] = prediction.text
    spans_by_id[question.id] = _spans_for_json(prediction.spans)
    null_odds_by_id[question.id] = prediction.null_minus_best
  return {'': _format_json(answer_by_id), 'nbest': _format_json(spans_by_id),
          'null_odds': _format_json(null_odds_by_id)}


def _format_json(value_by_id: dict[str, Any]) -> str:
  """Returns the text of a JSON file of a value for each question."""
  return json.dumps(value_by_id, indent=1, ensure_ascii=False) + '\n'


def _spans_for_json(spans: Sequence[ScoredSpan]) -> list[dict[str, Any]]:
  """Returns spans with their probabilities among one another, by the softmax of
  their scores, as the predictions of BERT's code have them."""
  scores = np.array([span.score for span in spans])
  probabilities = np.exp(scores - scores.max(initial=-np.inf))
  probabilities /= probabilities.sum()
  objects = []
  for span, probability in zip(spans, probabilities):
    objects.append(dict(text=span.text, start=span.start, score=span.score,
                        probability=float(probability)))
  return objects
