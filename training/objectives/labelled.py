"""Objectives of labelled data: a label or a number for a text or a pair of
texts, a label for each word, and answers to questions.

  encoder    [CLS] text [SEP]            [CLS] first [SEP] second [SEP]
  roberta    <s> text </s>               <s> first </s></s> second </s>
  decoder    <sep> text <sep>            <sep> first <sep> second <sep>

As in BERT (Devlin et al. 2019, section 4.1), whose types tell the second text
from the first, and in GPT (Radford et al. 2018, section 3.3), where <sep> is
the separator of documents, with which texts begin in training. A question and
its paragraph are such a pair.

  classification      -sum_k q_k log softmax(scores)_k,
                      q = (1 - s) onehot(label) + s / K, s the label smoothing;
                      of words (token_classification) likewise
  regression          (score - number)^2
  question_answering  -(log softmax(starts)_first + log softmax(ends)_last) / 2

A head reads a row off [CLS], or off its last token (architectures/parts/
heads.py). The loss is a mean over the rows of a batch; with data.class_weights
one in which a row counts as its label says, as torch's CrossEntropyLoss takes
it; but with label smoothing torch weighs the smoothed share of each label by
that label's own weight, and here all of a row's loss has the row's. Evaluations
weigh all rows alike.

The first token of a word carries its label, and the others count nothing
(Devlin et al. 2019, section 5.3). A decoder reads a label off the words up to
its own, an encoder off all. The loss is a mean over the labels of a batch.

Each token of a row has the score of being an answer's first one, and that of
being its last (section 4.2). Where a row does not show the answer, both stand
at the null token (section 4.3): at [CLS], and in a decoder at the last token,
the only one that has seen all, as in XLNet (Yang et al. 2019), whose [CLS]
stands last.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts.skeletons import Output
from training.data import labelled, records
from training.data.tokenizers import Tokenizer
from training.objectives import Batch, Config, Figures, Mean, Objective, Row
from training.objectives import Shape

NEVER = -1e30  # the score of padding


def stack(config: Config) -> str:
  """Returns what the model of a run stacks, however far it is resolved."""
  return architectures.systems()[config.model.arch].STACK


def lay_out(item: records.Item, rng: np.random.Generator | None, config: Config,
            tokenizer: Tokenizer) -> Row:
  """Returns one row.

  tokens, segment_ids (0: padding) [up to L]; of an encoder types [up to L], 1:
  of the second text; targets [], weights [].
  """
  first, after = records.special_tokens(tokenizer, stack(config))
  pieces, types = [[first]], [0]
  ends = [item.between] * (len(item.texts) - 1) + [1]
  for number, (ids, end) in enumerate(zip(item.texts, ends)):
    pieces += [ids, [after] * end]
    types += [number] * (len(ids) + end)
  row = dict(tokens=np.concatenate(pieces).astype(np.int32),
             segment_ids=np.ones(len(types)), targets=item.target,
             weights=item.weight)
  return row | (dict(types=types) if stack(config) == 'encoder' else {})


def _arrays(config: Config, **of_a_row: type) -> dict[str, Shape]:
  """Returns the arrays of a row of one or two texts, and numbers by name."""
  L = ((config.data.length,), np.int32)
  row = dict(tokens=L, segment_ids=L, weights=((), np.float32))
  row |= {name: ((), kind) for name, kind in of_a_row.items()}
  return row | (dict(types=L) if stack(config) == 'encoder' else {})


def classified(targets: str) -> Callable[..., Figures]:
  """Returns what gives the cross-entropy of batch[targets], [B] or [B, L], and
  how many are likeliest."""
  def figures(output: Output, batch: Batch, config: Config) -> Figures:
    scores, weights = output.extra['scores'], batch['weights']
    smooth, log_p = config.train.label_smoothing, jax.nn.log_softmax(scores)
    likely = jnp.take_along_axis(log_p, batch[targets][..., None], -1)[..., 0]
    loss = -((1 - smooth) * likely + smooth * log_p.mean(-1))
    right = jnp.argmax(scores, -1) == batch[targets]
    counts = (weights > 0).astype(jnp.float32)
    return {'loss': Mean((weights * loss).sum(), weights.sum()),
            'accuracy': Mean((counts * right).sum(), counts.sum())}
  return figures


def estimated(output: Output, batch: Batch, config: Config) -> Figures:
  """Returns the squared error of targets [B], in what they are measured in."""
  weights_B = batch['weights']
  error_B = output.extra['scores'][:, 0] - batch['targets']
  return {'loss': Mean((weights_B * error_B ** 2).sum(), weights_B.sum()),
          'mean_absolute_error': Mean((weights_B * jnp.abs(error_B)).sum(),
                                      weights_B.sum())}


def lay_out_words(item: records.Piece, rng: np.random.Generator | None,
                  config: Config, tokenizer: Tokenizer) -> Row:
  """Returns one row.

  tokens, segment_ids (0: padding), labels, their numbers, and weights, 1 where
  a label counts [up to L].
  """
  first, after = records.special_tokens(tokenizer, stack(config))
  return dict(tokens=np.concatenate([[first], item.ids, [after]]),
              segment_ids=np.ones(len(item.ids) + records.AROUND),
              labels=np.pad(item.targets, 1), weights=np.pad(item.weights, 1))


def _word_arrays(config: Config) -> dict[str, Shape]:
  L = ((config.data.length,), np.int32)
  return dict(tokens=L, segment_ids=L, labels=L, weights=(L[0], np.float32))


def lay_out_question(item: records.Window, rng: np.random.Generator | None,
                     config: Config, tokenizer: Tokenizer) -> Row:
  """Returns one row.

  tokens, segment_ids (0: padding), of an encoder types (1: of the paragraph)
  [up to L]; starts, ends [], the places of the answer's ends; weights [], 1.
  """
  kind = stack(config)
  first, after = records.special_tokens(tokenizer, kind)
  tokens = np.concatenate([[first], item.question, [after] * item.between,
                           item.context, [after]])
  places = (null_place(item, kind),) * 2
  if item.answer is not None:
    places = tuple(begin(item) + place for place in item.answer)
  row = dict(tokens=tokens, segment_ids=np.ones(len(tokens)),
             starts=places[0], ends=places[1], weights=1.0)
  return row | (dict(types=np.arange(len(tokens)) >= begin(item))
                if kind == 'encoder' else {})


def begin(item: records.Window) -> int:
  """Returns where the paragraph begins in a row."""
  return 1 + len(item.question) + item.between


def length(item: records.Window) -> int:
  """Returns how many tokens a row has."""
  return (len(item.question) + len(item.context)
          + records.around(2, item.between))


def null_place(item: records.Window, kind: str) -> int:
  """Returns where the token stands whose scores are those of no answer."""
  return 0 if kind == 'encoder' else length(item) - 1


def answered(output: Output, batch: Batch, config: Config) -> Figures:
  """Returns the cross-entropy of starts [B] and ends [B], and of how many rows
  both are likeliest."""
  real_BL1 = batch['segment_ids'][..., None] != 0
  # Of the two axes without a letter, one stands for start and end.
  scores_BLU = jnp.where(real_BL1, output.extra['scores'], NEVER)
  places_BU = jnp.stack([batch['starts'], batch['ends']], 1)
  loss_BU = -jnp.take_along_axis(
      jax.nn.log_softmax(scores_BLU, axis=1), places_BU[:, None], 1)[:, 0]
  right_B = (jnp.argmax(scores_BLU, 1) == places_BU).all(1)
  weights_B = batch['weights']
  return {'loss': Mean((weights_B * loss_BU.mean(1)).sum(), weights_B.sum()),
          'accuracy': Mean((weights_B * right_B).sum(), weights_B.sum())}


_STACKS = ('encoder', 'decoder')


def _of_texts(view: type, target: type, **fields: Any) -> Objective:
  return Objective(
      _STACKS, view, lay_out, lambda config: _arrays(config, targets=target),
      head='sequence', records=labelled.TEXTS,
      length=lambda item: item.length, **fields)


OBJECTIVES = {
    'classification': _of_texts(
        records.Classes, np.int32, figures=classified('targets'),
        labels=records.labels_of, ignores=('train.z_loss',),
        reads=('data.labels', 'data.class_weights', 'data.length_buckets')),
    'regression': _of_texts(
        records.Numbers, np.float32, figures=estimated,
        reads=('data.length_buckets',),
        ignores=('train.z_loss', 'train.label_smoothing')),
    'token_classification': Objective(
        _STACKS, records.Sentences, lay_out_words, _word_arrays,
        reads=('data.labels', 'data.stride', 'data.length_buckets'),
        figures=classified('labels'), head='tokens',
        records=labelled.SENTENCES, labels=records.labels_of,
        ignores=('train.z_loss',),
        length=lambda item: len(item.ids) + records.AROUND),
    'question_answering': Objective(
        _STACKS, records.Questions, lay_out_question,
        lambda config: _arrays(config, starts=np.int32, ends=np.int32),
        reads=('data.stride', 'data.length_buckets'), figures=answered,
        head='span', length=length, records=labelled.QUESTIONS,
        ignores=('train.z_loss', 'train.label_smoothing'),
        guess=lambda config, vocab: math.log(config.data.length))}
