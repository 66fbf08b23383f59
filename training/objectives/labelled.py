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

import math

import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts.skeletons import Output
from training.data import labelled, records
from training.data.tokenizers import Tokenizer
from training.objectives import Batch, Config, Figures, Mean, Objective, Row
from training.objectives import Shape

SCORE_OF_PADDING = -1e30  # the score of padding


def find_stack(config: Config) -> str:
  """Returns whether the model of a run is an encoder, a decoder or both,
  however far its config is resolved."""
  return architectures.systems()[config.model.arch].STACK


def arrays_of_texts(config: Config, **numbers: type) -> dict[str, Shape]:
  """Describes the arrays that a row of one or two texts consists of, by shape
  and type.

  Args:
    config: the config of the run; rows have data.length = L tokens.
    **numbers: the type of each further array that has one number a row, such as
      the label, by its name.

  Returns:
    {name: (shape, dtype)} of tokens and segment_ids [L], which is 1 for each
    token and 0 for padding; of weights and each of `numbers`, one number; and
    for an encoder of types [L], which is 1 for the tokens of the second text.
  """
  ids = (config.data.length,), np.int32
  arrays = dict(tokens=ids, segment_ids=ids, weights=((), np.float32))
  for name, dtype in numbers.items():
    arrays[name] = (), dtype
  if find_stack(config) == 'encoder':
    arrays['types'] = ids
  return arrays


def classification_figures(output: Output, batch: Batch, config: Config,
                           targets: str) -> Figures:
  """Computes the cross-entropy loss and the accuracy of a classifier.

  With K labels, the score z_k of each, and label smoothing s, the loss is
  -sum_k q_k log softmax(z)_k with q_k = (1 - s) [k is the right label] + s / K
  (Szegedy et al. 2016, section 7).

  Args:
    output: the output of the model. Its scores, in output.extra, are [B, K]
      where each of B rows is classified, and [B, L, K] where each of its L
      tokens is.
    batch: the arrays of the batch; its weights [B] or [B, L] say how much each
      row or token counts in the loss, and are 0 for padding.
    config: the config of the run.
    targets: the name of the array of right labels in the batch, int [B] or [B,
      L].

  Returns:
    {name: Mean} of loss and accuracy, each a sum and the weight to divide it
    by.
  """
  # The sum over k has two terms: that of the right label, and the mean of log p
  # over all labels.
  scores = output.extra['scores']
  weights = batch['weights']
  smooth = config.train.label_smoothing
  log_p = jax.nn.log_softmax(scores)
  log_p_target = jnp.take_along_axis(
      log_p, batch[targets][..., None], axis=-1)[..., 0]
  loss = -((1 - smooth) * log_p_target + smooth * log_p.mean(-1))

  # Classes may be weighted differently in the loss. In the accuracy, all rows
  # or tokens that are no padding count the same.
  is_right = jnp.argmax(scores, -1) == batch[targets]
  is_counted = (weights > 0).astype(jnp.float32)
  return {'loss': Mean((weights * loss).sum(), weights.sum()),
          'accuracy': Mean((is_counted * is_right).sum(), is_counted.sum())}


def start_of_paragraph(item: records.Window) -> int:
  """Returns the place in a row at which the paragraph begins."""
  return 1 + len(item.question) + item.between


def length_of_row(item: records.Window) -> int:
  """Returns how many tokens the row of a question and a part of its paragraph
  has."""
  return (len(item.question) + len(item.context)
          + records.count_special_tokens(2, item.between))


def place_of_null_token(item: records.Window, kind: str) -> int:
  """Returns the place of the token whose scores are those of no answer: [CLS]
  of an encoder, and the last token of a decoder.

  Args:
    item: a question and a part of its paragraph.
    kind: 'encoder' or 'decoder', the kind of the model's stack.
  """
  if kind == 'encoder':
    return 0
  return length_of_row(item) - 1


class Labelled(Objective):
  """The base class of the objectives of labelled data."""
  stacks = ('encoder', 'decoder')
  has_lengths = True
  loss_unit = 'nats'  # of an answer

  def loss_of_guessing(self, config: Config, vocab: int) -> float | None:
    return math.log(self.num_labels(config))


class TextObjective(Labelled):
  """A target for one text, or for a pair of texts."""
  head = 'sequence'
  record_kind = labelled.TEXTS

  def example(self, item: records.Item, rng: np.random.Generator | None,
              config: Config, tokenizer: Tokenizer) -> Row:
    """Lays out one text or a pair of texts as a row: [CLS] text [SEP], or [CLS]
    text [SEP] text [SEP].

    Args:
      item: the `texts`, one or two arrays of token ids; the `target`, a number,
        and its `weight`; and `between`, the number of separators between the
        texts.
      rng: not used, as nothing is drawn.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      The arrays of the row: tokens and segment_ids [up to L], for an encoder
      also types [up to L], 1 for tokens of the second text; the target and its
      weight [], under targets and weights. L is data.length.
    """
    # Join the texts. A separator follows each one and has its type; some
    # systems, such as RoBERTa, have two between the texts (item.between).
    start_id, separator_id = records.special_tokens(tokenizer,
                                                    find_stack(config))
    token_parts = [[start_id]]
    types = [0]
    last_text = len(item.texts) - 1
    for number, ids in enumerate(item.texts):
      separators = [separator_id]
      if number < last_text:
        separators = [separator_id] * item.between
      token_parts += [ids, separators]
      types += [number] * (len(ids) + len(separators))
    row = dict(tokens=np.concatenate(token_parts).astype(np.int32),
               segment_ids=np.ones(len(types)), targets=item.target,
               weights=item.weight)
    if find_stack(config) == 'encoder':
      row['types'] = types
    return row

  def length(self, item: records.Item) -> int:
    return item.length


class Classification(TextObjective):
  """A label for a text or a pair of texts."""
  view = records.Classes
  reads = ('data.labels', 'data.class_weights', 'data.length_buckets')
  ignores = ('train.z_loss',)
  has_labels = True

  def arrays(self, config: Config) -> dict[str, Shape]:
    return arrays_of_texts(config, targets=np.int32)

  def labels(self, config: Config) -> tuple[str, ...]:
    return records.find_labels(config)

  def figures(self, output: Output, batch: Batch, config: Config) -> Figures:
    return classification_figures(output, batch=batch, config=config,
                                  targets='targets')


class Regression(TextObjective):
  """A number for a text or a pair of texts."""
  view = records.Numbers
  reads = ('data.length_buckets',)
  ignores = ('train.z_loss', 'train.label_smoothing')
  loss_unit = ''

  def arrays(self, config: Config) -> dict[str, Shape]:
    return arrays_of_texts(config, targets=np.float32)

  def num_labels(self, config: Config) -> int:
    return 1

  def loss_of_guessing(self, config: Config, vocab: int) -> None:
    return None

  def figures(self, output: Output, batch: Batch, config: Config) -> Figures:
    """Computes the squared and the absolute error of a regression, in the units
    of the data.

    Args:
      output: the output of the model, with scores [B, 1] in output.extra.
      batch: the batch, with targets [B] and weights [B].
      config: the config of the run.

    Returns:
      {name: Mean} of loss, the squared error, and of mean_absolute_error.
    """
    # A score is the number that the model predicts for a row.
    weights_B = batch['weights']
    error_B = output.extra['scores'][:, 0] - batch['targets']
    squared_B = error_B ** 2
    absolute_B = jnp.abs(error_B)
    return {
        'loss': Mean((weights_B * squared_B).sum(), weights_B.sum()),
        'mean_absolute_error': Mean((weights_B * absolute_B).sum(),
                                    weights_B.sum())}


class TokenClassification(Labelled):
  """A label for each word of a sentence."""
  view = records.Sentences
  reads = ('data.labels', 'data.stride', 'data.length_buckets')
  ignores = ('train.z_loss',)
  head = 'tokens'
  record_kind = labelled.SENTENCES
  has_labels = True

  def example(self, item: records.Piece, rng: np.random.Generator | None,
              config: Config, tokenizer: Tokenizer) -> Row:
    """Lays out a sentence, or a part of it, as a row with a label for each
    word: [CLS] sentence [SEP].

    Args:
      item: the token ids of a part of a sentence, `ids` [T], with the number of
        the label of each, `targets` [T], and its weight, `weights` [T].
      rng: not used, as nothing is drawn.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      The arrays of the row, [up to L]: tokens; segment_ids, which are 1;
      labels, the number of the label of each token; and weights, 1 where a
      label counts.
    """
    # The two special tokens have the label 0, which does not count.
    start_id, separator_id = records.special_tokens(tokenizer,
                                                    find_stack(config))
    tokens = np.concatenate([[start_id], item.ids, [separator_id]])
    return dict(tokens=tokens, segment_ids=np.ones(len(tokens)),
                labels=np.pad(item.targets, 1), weights=np.pad(item.weights, 1))

  def arrays(self, config: Config) -> dict[str, Shape]:
    shape = (config.data.length,)
    ids = shape, np.int32
    return dict(tokens=ids, segment_ids=ids, labels=ids,
                weights=(shape, np.float32))

  def labels(self, config: Config) -> tuple[str, ...]:
    return records.find_labels(config)

  def length(self, item: records.Piece) -> int:
    return len(item.ids) + records.SPECIAL_TOKENS_OF_SENTENCE

  def figures(self, output: Output, batch: Batch, config: Config) -> Figures:
    return classification_figures(output, batch=batch, config=config,
                                  targets='labels')


class QuestionAnswering(Labelled):
  """The place of a question's answer in a paragraph."""
  view = records.Questions
  reads = ('data.stride', 'data.length_buckets')
  ignores = ('train.z_loss', 'train.label_smoothing')
  head = 'span'
  record_kind = labelled.QUESTIONS

  def example(self, item: records.Window, rng: np.random.Generator | None,
              config: Config, tokenizer: Tokenizer) -> Row:
    """Lays out a question and a part of its paragraph as a row: [CLS] question
    [SEP] paragraph [SEP].

    Args:
      item: the token ids of a `question` and of a part of its paragraph,
        `context`; the `answer`, the places of its first and last token there,
        or None; and `between`, the number of separators between the two.
      rng: not used, as nothing is drawn.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      The arrays of the row: tokens and segment_ids [up to L], for an encoder
      also types [up to L], 1 for tokens of the paragraph; starts and ends [],
      the places of the first and the last token of the answer; weights [], 1.
    """
    # Some systems, such as RoBERTa, have two separators between the texts.
    stack = find_stack(config)
    start_id, separator_id = records.special_tokens(tokenizer, stack)
    separators = [separator_id] * item.between
    tokens = np.concatenate([[start_id], item.question, separators,
                             item.context, [separator_id]])

    # Find the answer in the row. item.answer counts from the start of the
    # paragraph. The place of a token that is no part of it, such as [CLS],
    # stands for no answer.
    start = end = place_of_null_token(item, stack)
    if item.answer is not None:
      start, end = (start_of_paragraph(item) + place for place in item.answer)
    row = dict(tokens=tokens, segment_ids=np.ones(len(tokens)), starts=start,
               ends=end, weights=1.0)
    if stack == 'encoder':
      row['types'] = np.arange(len(tokens)) >= start_of_paragraph(item)
    return row

  def arrays(self, config: Config) -> dict[str, Shape]:
    return arrays_of_texts(config, starts=np.int32, ends=np.int32)

  def length(self, item: records.Window) -> int:
    return length_of_row(item)

  def loss_of_guessing(self, config: Config, vocab: int) -> float:
    return math.log(config.data.length)

  def figures(self, output: Output, batch: Batch, config: Config) -> Figures:
    """Computes the loss and the accuracy of finding an answer in a text (Devlin
    et al. 2019, section 4.2).

    The model scores each token as the start of the answer and as its end. The
    loss is the mean of -log p(start) and -log p(end), each with a softmax over
    the tokens of the row.

    Args:
      output: the output of the model, with scores [B, L, 2] in output.extra:
        for each of B rows and L tokens that of a start and that of an end.
      batch: the batch, with starts, ends and weights [B], and segment_ids
        [B, L], which are 0 on padding.
      config: the config of the run.

    Returns:
      {name: Mean} of loss and accuracy: the share of rows in which the
      likeliest start and the likeliest end are both right.
    """
    # Axis U has two places, the start and the end. A softmax over the tokens
    # (axis 1) must give nothing to padding, whose scores are set very low.
    real_BL1 = batch['segment_ids'][..., None] != 0
    scores_BLU = jnp.where(real_BL1, output.extra['scores'], SCORE_OF_PADDING)
    places_BU = jnp.stack([batch['starts'], batch['ends']], axis=1)
    log_p_BLU = jax.nn.log_softmax(scores_BLU, axis=1)

    # Read the log-probability of each right place. The index needs the axes of
    # the array that it reads; its axis of one token is dropped again.
    log_p_B1U = jnp.take_along_axis(log_p_BLU, places_BU[:, None], axis=1)
    loss_BU = -log_p_B1U[:, 0]

    # An answer is right if its start and its end are.
    likeliest_BU = jnp.argmax(scores_BLU, 1)
    is_right_B = (likeliest_BU == places_BU).all(1)
    weights_B = batch['weights']
    total_weight = weights_B.sum()
    return {'loss': Mean((weights_B * loss_BU.mean(1)).sum(), total_weight),
            'accuracy': Mean((weights_B * is_right_B).sum(), total_weight)}


OBJECTIVES = {
    'classification': Classification(),
    'regression': Regression(),
    'token_classification': TokenClassification(),
    'question_answering': QuestionAnswering(),
}
