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
from common.errors import RequestError, require, shorten
from training import objectives
from training.data import labelled, records, sources, texts
from training.evals import answers
from training.objectives import pipeline


class TextLabel(NamedTuple):
  """The predicted label of a text or of a pair of texts.

  Attributes:
    label: the likeliest label.
    probabilities: the probability of each label; they add up to 1.
  """
  label: str
  probabilities: dict[str, float]


class WordLabels(NamedTuple):
  """The predicted labels of the words of a sentence.

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


class QuestionAnswer(NamedTuple):
  """The predicted answer to a question.

  Attributes:
    text: a span of the context; '': the context holds no answer.
    start: its first character in the context; -1: there is no answer.
    probability: its share among the best spans and no answer, by their scores.
  """
  text: str
  start: int
  probability: float


def predict_labels(view: records.Classes, scores: Sequence[np.ndarray]
                   ) -> list[TextLabel]:
  """Predicts the likeliest label of each text, with the probabilities of all
  labels.

  Args:
    view: the texts, and the names of the U labels.
    scores: the scores [U] of the labels for each of N texts.

  Returns:
    For each text its label, and {label: probability}, the softmax of the
    scores.
  """
  scores_NU = np.stack(scores).astype(np.float64)
  predictions = []
  for p_U in special.softmax(scores_NU, axis=1):
    likeliest = view.labels[int(p_U.argmax())]
    probabilities = dict(zip(view.labels, p_U.tolist()))
    predictions.append(TextLabel(label=likeliest, probabilities=probabilities))
  return predictions


def predict_numbers(view: records.Numbers, scores: Sequence[np.ndarray]
                    ) -> list[float]:
  """Returns the number that the model gives each text of a view, which is its
  score, [1]."""
  return [float(score_1[0]) for score_1 in scores]


def predict_word_labels(view: records.Sentences, scores: Sequence[np.ndarray]
                        ) -> list[WordLabels]:
  """Predicts the likeliest label of each word of each sentence.

  Args:
    view: the sentences, of which long ones are cut into several rows of tokens;
      and the names of the K labels.
    scores: for each row, the scores [L, K] of the labels for its L tokens.

  Returns:
    For each sentence its words, their labels and the probabilities of these.
  """
  # Begin with a label that is kept by words without a token, which are in no
  # row. 'O' is the usual label of words that are no part of an entity.
  label_without_token = 'O' if 'O' in view.labels else '_'
  predictions = []
  for sentence in view.records:
    num_words = len(sentence.words)
    predictions.append(WordLabels(
        words=list(sentence.words), labels=[label_without_token] * num_words,
        probabilities=[np.nan] * num_words))

  # Give each word the label of its first token. Rows overlap, but row.words has
  # the number of a word only at one token of one row, so each word is set once.
  for row, scores_LK in zip(view.items, scores, strict=True):
    prediction = predictions[row.sentence]
    p_LK = special.softmax(scores_LK.astype(np.float64), axis=-1)
    for place in np.flatnonzero(row.words != records.NO_WORD):
      word = row.words[place]
      p_K = p_LK[1 + place]  # before the sentence stands one token
      prediction.labels[word] = view.labels[int(p_K.argmax())]
      prediction.probabilities[word] = float(p_K.max())
  return predictions


def predict_answer(answer: answers.ChosenAnswer) -> QuestionAnswer:
  """Returns the answer to a question with its probability: the softmax over the
  scores of the best spans of the text and of "no answer".

  Args:
    answer: the chosen answer, with the best spans and their scores, and how
      much higher "no answer" scores than the best span.
  """
  # Compute the score of "no answer" from the difference to the best span. If
  # there are no spans, any score gives it the probability 1.
  span_scores = [span.score for span in answer.spans]
  null_score = answer.null_minus_best
  if span_scores:
    null_score += span_scores[0]
  probabilities = special.softmax([*span_scores, null_score])
  if not answer.text:
    return QuestionAnswer(text='', start=-1,
                          probability=float(probabilities[-1]))
  return QuestionAnswer(text=answer.text, start=answer.spans[0].start,
                        probability=float(probabilities[0]))


def predict_rows(module: Any, params: Any, config: objectives.Config,
                 tokenizer: Any, rows: Sequence[Any],
                 options: types.SimpleNamespace) -> list[Any]:
  """Returns what a model predicts for each row: a TextLabel, a number,
  WordLabels or a QuestionAnswer.

  Args:
    module: the Flax module of the model.
    params: its parameters, a tree of arrays.
    config: the config of its run, to be changed; its objective, data.labels,
      data.length and data.batch_size are read.
    tokenizer: the tokenizer of its run.
    rows: texts, or pairs of texts; sentences, or lists of words; or pairs of a
      question and its context: what the objective reads.
    options: max_answer_length, n_best and null_threshold, of answers.

  Raises:
    RequestError: for a row that is none of these, or has no token.
  """
  # The rows as the records of a source of data.
  objective = objectives.find_objective(config)
  make_record = _RECORD_OF_KIND[objective.record_kind]
  corpus_records = []
  for number, row in enumerate(rows):
    corpus_records.append(make_record(row, f'row {number}'))
  corpus = sources.Corpus(
      name='the rows', text='the rows', split='eval', tokenizer=tokenizer,
      config=config, records=corpus_records)
  view = objective.view(corpus)

  # The rows are padded to a length that is a power of two, so that few programs
  # are compiled.
  longest = max(map(objective.length, view))
  power_of_two = 1 << (longest - 1).bit_length()
  config.data.update(
      batch_size=min(config.data.batch_size, len(view)), length_buckets=1,
      length=min(config.data.length, power_of_two))
  loader = pipeline.Loader(
      name=corpus.name, share=1.0, text=corpus.text, dataset=view, views=[view],
      config=config, tokenizer=tokenizer, split='eval', process_index=0,
      process_count=1)

  # The scores of each item; what fills up the last batch is none.
  scores: list[np.ndarray] = []
  for batch in loader.iterate():
    scores += list(jax.device_get(
        _compute_scores(module, config.objective, params, batch)))
  del scores[len(view):]

  # The predictions from them; an answer is that of several windows.
  if config.objective != 'question_answering':
    return PREDICT_BY_OBJECTIVE[config.objective](view, scores)
  chosen_answers = answers.answer_questions(
      view, scores=scores, stack=architectures.stack(module.config),
      options=options)
  return [predict_answer(chosen) for chosen in chosen_answers]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compute_scores(module: Any, objective_name: str, params: Any, batch: Any
                    ) -> jax.Array:
  """Returns the scores that the head of an objective gives each row of a
  batch."""
  objective = objectives.OBJECTIVES[objective_name]
  return objective.apply(module, params, batch).extra['scores']


def _make_text_record(row: Any, location: str) -> labelled.Record:
  """Makes a record without a label of a text, or of a pair of texts, that is to
  be classified.

  Args:
    row: the text, or the pair.
    location: the words for the row in messages.

  Raises:
    RequestError: where it is neither, or a text is empty.
  """
  texts_of_row = row
  if isinstance(row, str):
    texts_of_row = [row]
  is_sequence = isinstance(texts_of_row, Sequence)
  if not is_sequence or len(texts_of_row) not in (1, 2):
    raise RequestError(f'{location} is {shorten(row)}: pass a text, or a pair '
                       'of texts')
  names: tuple[str, ...] = ('text',)
  if len(texts_of_row) == 2:
    names = ('first', 'second')
  checked_texts = tuple(
      _check_not_empty(text, location) for text in texts_of_row)
  return labelled.Record(texts=checked_texts, label='', where=f'{location},',
                         names=names)


def _make_sentence(row: Any, location: str) -> labelled.Sentence:
  """Makes a record without labels of a sentence whose words are to be labelled.

  Args:
    row: the sentence, with spaces between its words, or a list of the words.
    location: the words for the row in messages.

  Raises:
    RequestError: where it is neither, or has no word.
  """
  words = row
  if isinstance(row, str):
    words = row.split()
  if not isinstance(words, Sequence) or not len(words):
    raise RequestError(f'{location} is {shorten(row)}: pass a sentence, or a '
                       'list of its words')
  checked_words = [_check_not_empty(word, location) for word in words]
  return labelled.Sentence(words=checked_words, labels=[],
                           locations=[location] * len(words))


def _make_paragraph(row: Any, location: str) -> labelled.Paragraph:
  """Makes a record without an answer of a question and the text that has the
  answer.

  Args:
    row: the pair of the question and the text.
    location: the words for the row in messages.

  Raises:
    RequestError: where it is no such pair, or a text is empty.
  """
  is_pair = isinstance(row, Sequence) and not isinstance(row, str)
  if not is_pair or len(row) != 2:
    raise RequestError(f'{location} is {shorten(row)}: pass a pair of a '
                       'question and the text that has the answer')
  question_text, context = (_check_not_empty(text, location) for text in row)
  question = labelled.Question(id=location, question=question_text,
                               answers=None, where=location)
  return labelled.Paragraph(context=context, questions=(question,))


def _check_not_empty(value: Any, location: str) -> str:
  """Returns a text; RequestError where it is none, or holds space alone."""
  require(bool(texts.check_text(value, location).strip()), f'{location} has an '
          'empty text')
  return value


# The function that makes a record of a row, by what an objective reads.
_RECORD_OF_KIND = {labelled.TEXTS: _make_text_record,
                   labelled.SENTENCES: _make_sentence,
                   labelled.QUESTIONS: _make_paragraph}
# The function that predicts from the scores of a view, by objective; an answer
# to a question takes the scores of several windows.
PREDICT_BY_OBJECTIVE = {'classification': predict_labels,
                        'regression': predict_numbers,
                        'token_classification': predict_word_labels}
OBJECTIVES = (*PREDICT_BY_OBJECTIVE, 'question_answering')
