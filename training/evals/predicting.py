"""What a model with the head of a task says of each record, with probabilities:
the label or the number of a text, the label of each word, the answer to a
question.

The records need no labels. eval.py --tasks=labels writes these predictions, and
measures them where the labels are known; archetype.Model.predict returns them.
"""

from collections.abc import Sequence
import functools
import itertools
import types
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import special

import architectures
from common.errors import require, short
from training import objectives
from training.data import labelled, records, sources, texts
from training.evals import answers
from training.objectives import pipeline


class Label(NamedTuple):
  """The label of a text or of a pair of texts.

  Attributes:
    label: the likeliest one.
    probabilities: of each label; they add up to 1.
  """
  label: str
  probabilities: dict[str, float]


class Words(NamedTuple):
  """The labels of the words of a sentence.

  Attributes:
    words: of the sentence.
    labels: the likeliest one of each word. A word in which no token begins has
      O, or '_' where that is no label.
    probabilities: of each of these labels; nan: of a word without a token.
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
  p_NU = special.softmax(np.stack(scores).astype(np.float64), axis=1)
  return [Label(label=view.labels[int(p_U.argmax())],
                probabilities=dict(zip(view.labels, map(float, p_U))))
          for p_U in p_NU]


def of_numbers(view: records.Numbers, scores: Sequence[np.ndarray]
               ) -> list[float]:
  """Returns the number of each text of a view, whose scores are [1]."""
  return [float(score_1[0]) for score_1 in scores]


def of_words(view: records.Sentences, scores: Sequence[np.ndarray]
             ) -> list[Words]:
  """Returns the labels of each sentence of a view; the scores are those of the
  tokens of its items, [L, K], padding or not."""
  outside = 'O' if 'O' in view.labels else '_'
  predicted = [Words(words=list(sentence.words),
                     labels=[outside] * len(sentence.words),
                     probabilities=[np.nan] * len(sentence.words))
               for sentence in view.records]
  for piece, scores_LK in zip(view.items, scores, strict=True):
    p_LK = special.softmax(scores_LK.astype(np.float64), axis=-1)
    sentence = predicted[piece.sentence]
    for place in np.flatnonzero(piece.words != records.NO_WORD):
      # Before the sentence stands one token.
      p_K, word = p_LK[1 + place], piece.words[place]
      sentence.labels[word] = view.labels[int(p_K.argmax())]
      sentence.probabilities[word] = float(p_K.max())
  return predicted


def of_best(best: answers.Best) -> Answer:
  """Returns the answer that was chosen of the best ones."""
  scores = [score for _, _, score in best.stretches]
  none = best.null_minus_best + (scores[0] if scores else 0.0)
  shares = special.softmax([*scores, none])
  if not best.text:
    return Answer(text='', start=-1, probability=float(shares[-1]))
  return Answer(text=best.text, start=best.stretches[0][1],
                probability=float(shares[0]))


def predict(module: Any, params: Any, config: objectives.Config, tokenizer: Any,
            rows: Sequence[Any], options: types.SimpleNamespace) -> list[Any]:
  """Returns what a model says of each row: Label, a number, Words or Answer.

  Args:
    module, params: of the model.
    config: of its run, to be changed; its objective, data.labels, data.length
      and data.batch_size are read.
    tokenizer: of its run.
    rows: texts, or pairs of texts; sentences, or lists of words; or pairs of a
      question and its context: what the objective reads.
    options: max_answer_length, n_best and null_threshold, of answers.

  Raises:
    RequestError: for a row that is none of these, or has no token.
  """
  objective, kind = objectives.of(config), config.objective
  corpus = sources.Corpus(
      name='the rows', text='the rows', split='eval', tokenizer=tokenizer,
      config=config, records=[
          _RECORDS[objective.record_kind](row, f'row {number}')
          for number, row in enumerate(rows)])
  view = objective.view(corpus)
  # Of few shapes, so that few programs are compiled.
  longest = max(map(objective.length, view))
  config.data.update(
      batch_size=min(config.data.batch_size, len(view)), length_buckets=1,
      length=min(config.data.length, 1 << (longest - 1).bit_length()))
  loader = pipeline.Loader(
      name=corpus.name, share=1.0, text=corpus.text, dataset=view, views=[view],
      config=config, tokenizer=tokenizer, split='eval', process_index=0,
      process_count=1)
  batches = [jax.device_get(_scores(module, kind, params, batch))
             for batch in loader.iterate()]
  scores = [*itertools.chain(*batches)][:len(view)]
  if kind == 'question_answering':
    return [of_best(best) for best in answers.answers(
        view, scores, architectures.stack(module.config), options)]
  return OF_VIEW[kind](view, scores)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(module: Any, objective: str, params: Any, batch: Any) -> jax.Array:
  row = objectives.OBJECTIVES[objective]
  return row.apply(module, params, batch).extra['scores']


def _record(row: Any, where: str) -> labelled.Record:
  parts = [row] if isinstance(row, str) else row
  require(isinstance(parts, Sequence) and len(parts) in (1, 2), f'{where} is '
          f'{short(row)}: pass a text, or a pair of texts')
  names = ('first', 'second') if len(parts) == 2 else ('text',)
  return labelled.Record(
      texts=tuple(_text(part, where) for part in parts), label='',
      where=f'{where},', names=names)


def _sentence(row: Any, where: str) -> labelled.Sentence:
  words = row.split() if isinstance(row, str) else row
  require(isinstance(words, Sequence) and len(words) > 0, f'{where} is '
          f'{short(row)}: pass a sentence, or a list of its words')
  return labelled.Sentence(
      words=[_text(word, where) for word in words], labels=[],
      lines=[where] * len(words))


def _paragraph(row: Any, where: str) -> labelled.Paragraph:
  require(isinstance(row, Sequence) and not isinstance(row, str)
          and len(row) == 2, f'{where} is {short(row)}: pass a pair of a '
          'question and the text that has the answer')
  question, context = (_text(part, where) for part in row)
  return labelled.Paragraph(context=context, questions=(labelled.Question(
      id=where, question=question, answers=None, where=where),))


def _text(value: Any, where: str) -> str:
  require(bool(texts.checked(value, where).strip()), f'{where} has an empty '
          'text')
  return value


# A record of a row, by what an objective reads.
_RECORDS = {labelled.TEXTS: _record, labelled.SENTENCES: _sentence,
            labelled.QUESTIONS: _paragraph}
# What scores say of a view, by objective; answers are said by several windows.
OF_VIEW = {'classification': of_texts, 'regression': of_numbers,
           'token_classification': of_words}
OBJECTIVES = (*OF_VIEW, 'question_answering')
