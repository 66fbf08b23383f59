"""The measures of answers to questions, and the files of what a model answers,
which SQuAD's scripts read."""

from collections.abc import Sequence
import json
from typing import Any

import numpy as np

from configs.errors import require
from training.data.questions import Questions, Window
from training.measures import Measured, spans, squad_rules

# The names of what is measured; all but the first three only where questions
# have no answer.
FIGURES = 'exact', 'f1', 'total', 'HasAns_*', 'NoAns_*', 'best_*'


def answers(view: Questions, scores: Sequence[np.ndarray],
            null_places: Sequence[int], begins: Sequence[int], *, most: int,
            count: int, threshold: float) -> list[spans.Best]:
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
  windows: list[list[spans.Window]] = [[] for _ in view.questions]
  for item, scores_L2, null, begin in zip(
      view.items, scores, null_places, begins, strict=True):
    windows[item.asked].append(_window(view, item, scores_L2, null, begin))
  none = any(not question.answers for question in view.questions)
  return [spans.best(context, own, most=most, count=count, may_be_null=none,
                     threshold=threshold)
          for (context, _), own in zip(view.contexts, windows, strict=True)]


def _window(view: Questions, item: Window, scores_L2: np.ndarray, null: int,
            begin: int) -> spans.Window:
  size = len(item.context)
  spans_T2 = view.contexts[item.asked][1][item.first:item.first + size]
  starts_T, ends_T = np.asarray(scores_L2, np.float64)[begin:begin + size].T
  return spans.Window(starts_T, ends_T, spans_T2,
                      float(np.sum(scores_L2[null], dtype=np.float64)))


def figures(view: Questions, found: Sequence[spans.Best]) -> dict[str, Any]:
  """Returns the figures of SQuAD's scripts, in percent; where questions have no
  answer with the best thresholds."""
  right = {str(i): [text for text, _ in question.answers]
           for i, question in enumerate(view.questions)}
  own = squad_rules.measures(
      {str(i): answer.text for i, answer in enumerate(found)}, right)
  if not all(right.values()):
    own |= squad_rules.best_thresholds(
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


def written(view: Questions, found: Sequence[spans.Best]) -> dict[str, str]:
  """Returns the texts of three JSON files, by what stands in their names.

  '': {question: answer}, as evaluate-v2.0.py reads it; 'nbest': {question: the
  best answers}; 'null_odds': {question: how much higher the null score is},
  which that script reads as --na-prob-file. Of `view`, check_ids holds.
  """
  names = [question.id for question in view.questions]
  rows = zip(names, spans.as_json(found))
  return {kind: json.dumps(table, indent=1, ensure_ascii=False) + '\n'
          for kind, table in {
              '': {name: answer.text for name, answer in zip(names, found)},
              'nbest': dict(rows),
              'null_odds': {name: answer.null_minus_best
                            for name, answer in zip(names, found)}}.items()}


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
