"""The predictions of a model with the head of a task for each record, with
probabilities: the label or the number of a text, the label of each word, the
answer to a question.

The records need no labels. eval.py --tasks=labels writes these predictions, and
measures them where the labels are known; archetype.Model.predict returns them.
"""

from collections.abc import Sequence
import functools
import types
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import special

import architectures
from common.errors import RequestError, require, short
from training import objectives
from training.data import labelled, records, sources, texts
from training.evals import answers
from training.objectives import pipeline


class Label(NamedTuple):
  """The label of a text or of a pair of texts.

  Attributes:
    label: the likeliest one.
    probabilities: the probability of each label; they add up to 1.
  """
  label: str
  probabilities: dict[str, float]


class Words(NamedTuple):
  """The labels of the words of a sentence.

  Attributes:
    words: the words of the sentence.
    labels: the likeliest one of each word. A word in which no token begins has
      O, or '_' where that is no label.
    probabilities: the probability of each of these labels; nan where a word has
      no token.
  """
  words: list[str]
  labels: list[str]
  probabilities: list[float]


class Answer(NamedTuple):
  """The answer to a question.

  Attributes:
    text: a stretch of the context; '': the context holds no answer.
    start: its first character in the context; -1: there is no answer.
    probability: its share among the best stretches and no answer, by their
      scores.
  """
  text: str
  start: int
  probability: float


def of_texts(view: records.Classes, scores: Sequence[np.ndarray]
             ) -> list[Label]:
  """Returns the label of each text of a view, whose scores are [U]."""
  scores_NU = np.stack(scores).astype(np.float64)
  labels = []
  for p_U in special.softmax(scores_NU, axis=1):
    likeliest = view.labels[int(p_U.argmax())]
    probabilities = dict(zip(view.labels, p_U.tolist()))
    labels.append(Label(label=likeliest, probabilities=probabilities))
  return labels


def of_numbers(view: records.Numbers, scores: Sequence[np.ndarray]
               ) -> list[float]:
  """Returns the number of each text of a view, whose scores are [1]."""
  return [float(score_1[0]) for score_1 in scores]


def of_words(view: records.Sentences, scores: Sequence[np.ndarray]
             ) -> list[Words]:
  """Returns the labels of each sentence of a view; the scores are those of the
  tokens of its items, [L, K], padding or not."""
  # Words without a token stay as they are here.
  outside = 'O' if 'O' in view.labels else '_'
  predicted = []
  for sentence in view.records:
    size = len(sentence.words)
    predicted.append(Words(words=list(sentence.words), labels=[outside] * size,
                           probabilities=[np.nan] * size))

  for piece, scores_LK in zip(view.items, scores, strict=True):
    sentence = predicted[piece.sentence]
    p_LK = special.softmax(scores_LK.astype(np.float64), axis=-1)
    for place in np.flatnonzero(piece.words != records.NO_WORD):
      word = piece.words[place]
      p_K = p_LK[1 + place]  # before the sentence stands one token
      sentence.labels[word] = view.labels[int(p_K.argmax())]
      sentence.probabilities[word] = float(p_K.max())
  return predicted


def of_best(best: answers.ChosenAnswer) -> Answer:
  """Returns the answer that was chosen of the best ones."""
  scores = [score for _, _, score in best.spans]
  none = best.null_minus_best
  if scores:
    none += scores[0]
  shares = special.softmax([*scores, none])
  if not best.text:
    return Answer(text='', start=-1, probability=float(shares[-1]))
  _, start, _ = best.spans[0]
  return Answer(text=best.text, start=start, probability=float(shares[0]))


def predict(module: Any, params: Any, config: objectives.Config, tokenizer: Any,
            rows: Sequence[Any], options: types.SimpleNamespace) -> list[Any]:
  """Returns what a model says of each row: Label, a number, Words or Answer.

  Args:
    module: the model.
    params: its parameters.
    config: the config of its run, to be changed; its objective, data.labels,
      data.length and data.batch_size are read.
    tokenizer: the tokenizer of its run.
    rows: texts, or pairs of texts; sentences, or lists of words; or pairs of a
      question and its context: what the objective reads.
    options: max_answer_length, n_best and null_threshold, of answers.

  Raises:
    RequestError: for a row that is none of these, or has no token.
  """
  # The rows as the records of a source.
  objective = objectives.find_objective(config)
  kind = config.objective
  record = _RECORDS[objective.record_kind]
  corpus = sources.Corpus(
      name='the rows', text='the rows', split='eval', tokenizer=tokenizer,
      config=config, records=[record(row, f'row {number}')
                              for number, row in enumerate(rows)])
  view = objective.view(corpus)

  # Batches of few shapes, so that few programs are compiled.
  longest = max(map(objective.length, view))
  power = 1 << (longest - 1).bit_length()
  config.data.update(
      batch_size=min(config.data.batch_size, len(view)), length_buckets=1,
      length=min(config.data.length, power))
  loader = pipeline.Loader(
      name=corpus.name, share=1.0, text=corpus.text, dataset=view, views=[view],
      config=config, tokenizer=tokenizer, split='eval', process_index=0,
      process_count=1)

  # The scores of each item; what fills up the last batch is none.
  scores: list[np.ndarray] = []
  for batch in loader.iterate():
    scores += list(jax.device_get(_scores(module, kind, params, batch)))
  del scores[len(view):]
  if kind != 'question_answering':
    return OF_VIEW[kind](view, scores)
  best = answers.answer_questions(view, scores=scores,
                         kind=architectures.stack(module.config),
                         options=options)
  return [of_best(one) for one in best]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(module: Any, objective: str, params: Any, batch: Any) -> jax.Array:
  """Returns the scores of each row of a batch, by an objective's name."""
  row = objectives.OBJECTIVES[objective]
  return row.apply(module, params, batch).extra['scores']


def _record(row: Any, where: str) -> labelled.Record:
  """Returns a text, or a pair of texts, as a record."""
  parts = [row] if isinstance(row, str) else row
  if not isinstance(parts, Sequence) or len(parts) not in (1, 2):
    raise RequestError(f'{where} is {short(row)}: pass a text, or a pair of '
                       'texts')
  names = ('first', 'second') if len(parts) == 2 else ('text',)
  return labelled.Record(
      texts=tuple(_text(part, where) for part in parts), label='',
      where=f'{where},', names=names)


def _sentence(row: Any, where: str) -> labelled.Sentence:
  """Returns a sentence, or a list of its words, as a record."""
  words = row.split() if isinstance(row, str) else row
  if not isinstance(words, Sequence) or not len(words):
    raise RequestError(f'{where} is {short(row)}: pass a sentence, or a list '
                       'of its words')
  return labelled.Sentence(
      words=[_text(word, where) for word in words], labels=[],
      lines=[where] * len(words))


def _paragraph(row: Any, where: str) -> labelled.Paragraph:
  """Returns a pair of a question and the text that has the answer as a
  record."""
  is_pair = isinstance(row, Sequence) and not isinstance(row, str)
  if not is_pair or len(row) != 2:
    raise RequestError(f'{where} is {short(row)}: pass a pair of a question '
                       'and the text that has the answer')
  question, context = (_text(part, where) for part in row)
  asked = labelled.Question(id=where, question=question, answers=None,
                            where=where)
  return labelled.Paragraph(context=context, questions=(asked,))


def _text(value: Any, where: str) -> str:
  require(bool(texts.check_text(value, where).strip()), f'{where} has an empty '
          'text')
  return value


# How a row becomes a record, by what an objective reads.
_RECORDS = {labelled.TEXTS: _record, labelled.SENTENCES: _sentence,
            labelled.QUESTIONS: _paragraph}
# The predictions of a view by its scores, by objective; an answer is that of
# several windows.
OF_VIEW = {'classification': of_texts, 'regression': of_numbers,
           'token_classification': of_words}
OBJECTIVES = (*OF_VIEW, 'question_answering')
