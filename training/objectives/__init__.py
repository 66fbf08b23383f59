"""Objectives, by which models learn: one class each, in the table OBJECTIVES.

To add an objective, write a subclass of Objective in a file of this folder, and
its entry in a table OBJECTIVES of that file. Everything else reads these
tables: the batches (pipeline.py), the training step, evaluation and sampling,
plans of memory, exports, and the check for fields that a run would not read.

A batch is a dict of arrays. Every weight of a loss stands under a key that ends
in 'weights', and what tells tokens from padding under a key that ends in
'segment_ids' or 'valid': in the rows that fill up the last batch of an
evaluation these are zero.

A loss is a mean, or for BERT the sum of two means, each over things of its own
kind: tokens to predict, or rows. `Objective.figures` returns each figure as a
Mean, a sum and its weight, because these add up over micro-batches, batches and
hosts: a figure is sum(total) / sum(weight), however its batch was cut. The mean
of nothing is nan, not 0.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import architectures
from architectures.parts.config import ModelConfig
from architectures.parts.skeletons import Output
from common.errors import RequestError, check_choice, require, shorten
from configs import base
from training import plugins
from training.data import conversations, records, sources
from training.data.tokenizers import Tokenizer, decode_after_prompt
from training.objectives import losses

Config: TypeAlias = ml_collections.ConfigDict
Shape = tuple[tuple[int, ...], type]  # of an array, with its dtype
Row = dict[str, Any]  # arrays and numbers of one row, by key of the batch


class Mean(NamedTuple):
  """A mean that has yet to be taken; both of its numbers add up.

  Attributes:
    total: the weighted sum.
    weight: the sum of the weights.
  """
  total: jax.Array
  weight: jax.Array


Batch = Mapping[str, jax.Array]
Figures = dict[str, Mean]


class Prompts(NamedTuple):
  """Texts as a model is shown them before it writes.

  Attributes:
    tokens: int32 [B, L], what the written text goes on from, padded on the
      right.
    lengths: int32 [B], how many tokens of each row are real.
    arguments: further arguments of generate.generate.
    gap: what stands between a prompt and its text when both are printed.
    lead: what a text may begin with that is no part of it.
  """
  tokens: np.ndarray
  lengths: np.ndarray
  arguments: dict[str, np.ndarray] = {}
  gap: str = ''
  lead: str = ''

  def text(self, row: int, ids: Sequence[int] | np.ndarray,
           tokenizer: Tokenizer) -> str:
    """Returns the text of the ids that were written after a row's prompt, with
    the space before its first word unless there is a gap."""
    prompt: Sequence[int] | np.ndarray = ()
    if not self.gap:
      prompt = self.tokens[row, :self.lengths[row]]
    text = decode_after_prompt(tokenizer, ids=ids, prompt=prompt).decode(
        'utf-8', 'replace')
    return text.removeprefix(self.lead)


class Talk(NamedTuple):
  """How a model is talked with in turns.

  Attributes:
    words: what it does with what is said to it, for a reader.
    encode: messages, dicts with role (system, user, assistant) and content,
      the last the user's -> int32 [T], what the model goes on from.
    ends: the ids with which it ends an answer.
    lead: what an answer begins with that is no part of it.
    system: whether a system message has a place.
    plain: whether it goes on from the text, as no template says otherwise.
  """
  words: str
  encode: Callable[[Sequence[dict[str, str]]], np.ndarray]
  ends: frozenset[int]
  lead: str = ''
  system: bool = True
  plain: bool = False


def padding_id(tokenizer: Tokenizer) -> int:
  """Returns the token that fills rows up: padding, or the separator of
  documents where the vocabulary has no padding."""
  return tokenizer.special_ids.get('pad', tokenizer.separator_id)


def count_targets(batch: Batch) -> jax.Array:
  """Returns how many tokens of a batch are to be predicted, by their weights.
  """
  return batch['weights'].astype(jnp.float32).sum()


def token_loss_figures(output: Output, batch: Batch, config: Config) -> Figures:
  """Computes the cross-entropy loss of the tokens that a model is to predict,
  and the figures that are reported beside it, such as the accuracy.

  Args:
    output: the output of the model: its hidden states, and its head (the
      projection to the vocabulary). It has no logits yet: they are computed
      here for a part of the tokens at a time, to save memory.
    batch: the arrays of the batch; of them targets [B, L], the token ids to
      predict, and weights [B, L], how much each token counts. B rows have L
      tokens each.
    config: the config of the run.

  Returns:
    {name: Mean} of loss and accuracy, and of z_loss if there is one. A Mean is
    a sum and the weight to divide it by. With model.mtp_depth the losses of
    predicting tokens further ahead are among them.
  """
  train = config.train
  assert output.head is not None, 'a head of a task predicts no tokens'
  loss, sums = losses.cross_entropy(
      output.hidden, head=output.head, targets_BL=batch['targets'],
      weights_BL=batch['weights'], z_loss=train.z_loss,
      label_smoothing=train.label_smoothing)
  sums['loss'] = loss

  if 'exits' in output.extra:
    sums |= exit_losses(output, batch=batch, config=config)

  # All figures are sums over the same tokens, so they have one weight.
  weight = sums.pop('weight')
  figures = {name: Mean(total, weight) for name, total in sums.items()}
  return figures | multi_token_figures(output, batch=batch, train=train)


def exit_losses(output: Output, batch: Batch, config: Config
                ) -> dict[str, jax.Array]:
  """Returns the loss of a model whose tokens leave after a pass (Ouro: Zhu et
  al. 2025, arXiv 2510.25741, section 3), summed over the tokens with weights:

    sum over passes t  p_t loss_t  -  beta H(p),   H(p) = -sum of p_t log p_t

  where a token leaves after pass t with probability p_t, and loss_t is its loss
  by the state after that pass. The entropy H, times beta, keeps the gate from
  choosing one pass for all tokens.

  The suffixes name axes: T passes, B batch, L length, D d_model.

  Args:
    output: the output of the model; extra['exits'] has the hidden states after
      each pass, [T, B, L, D], and log p_t, [T, B, L].
    batch: targets and weights [B, L].
    config: the config of the run, with beta = loops.exit_entropy.

  Returns:
    `loss`, and `exit_pass`, the number of the pass after which a token leaves,
    from 1 on: its mean over the passes by p_t, summed over the tokens with
    weights, too.
  """
  assert output.head is not None
  states_TBLD, log_p_TBL = output.extra['exits']
  weights_BL = batch['weights'].astype(jnp.float32)
  p_TBL = jnp.exp(log_p_TBL)

  # The loss of each pass, in which a token counts by p_t. The gradient of such
  # a weight is its token's loss, by which the gate learns.
  loss = jnp.zeros(())
  for states_BLD, p_BL in zip(states_TBLD, p_TBL):
    loss_of_pass, _ = losses.cross_entropy(
        states_BLD, head=output.head, targets_BL=batch['targets'],
        weights_BL=weights_BL * p_BL, z_loss=config.train.z_loss,
        label_smoothing=config.train.label_smoothing)
    loss += loss_of_pass

  # The entropy.
  entropy_BL = -(p_TBL * log_p_TBL).sum(0)
  loss -= config.model.loops.exit_entropy * (weights_BL * entropy_BL).sum()

  # The figure for people, of which there is no gradient.
  number_T = 1.0 + jnp.arange(len(p_TBL))
  pass_BL = jnp.einsum('TBL,T->BL', p_TBL, number_T)
  exit_pass = jax.lax.stop_gradient((weights_BL * pass_BL).sum())
  return dict(loss=loss, exit_pass=exit_pass)


def model_lacks_ids(config: Config, tokenizer: Tokenizer) -> bool:
  """Returns whether the tokenizer has ids that the model does not have, as that
  of imported weights may."""
  return 0 < config.model.vocab_size < tokenizer.vocab_size


def check_model_has_ids(ids: np.ndarray, config: Config, tokenizer: Tokenizer,
                        subject: str) -> None:
  """Checks that the model has an embedding for each token.

  Args:
    ids: the tokens, of any shape.
    config: the config of the run.
    tokenizer: the tokenizer of the run.
    subject: the words for the thing with these tokens, with which a message
      begins.

  Raises:
    RequestError: for a token that the model does not have.
  """
  # Most models have all ids of their tokenizer, and need no look at each.
  if not model_lacks_ids(config, tokenizer):
    return
  num_ids = config.model.vocab_size
  highest_id = int(np.max(ids, initial=0))
  if highest_id >= num_ids:
    raise RequestError(
        f'{subject} has the token {tokenizer.piece(highest_id)}, whose id is '
        f'{highest_id}, and the model has the ids 0 to {num_ids - 1}: take it '
        'out of the text, or out of the chat template')


def arrays_of_text(config: Config, *more: str) -> dict[str, Shape]:
  """Describes the arrays that one row of text consists of, by shape and type.

  Args:
    config: the config of the run; rows have data.length = L tokens.
    *more: the names of further integer arrays of this length.

  Returns:
    {name: (shape, dtype)} of tokens [L]; of targets [L], the token to predict
    at each position; of weights [L], how much each position counts in the loss;
    and of each name in `more`.
  """
  shape = (config.data.length,)
  arrays: dict[str, Shape] = dict(
      tokens=(shape, np.int32), targets=(shape, np.int32),
      weights=(shape, np.float32))
  for key in more:
    arrays[key] = shape, np.int32
  return arrays


def arrays_of_documents(config: Config) -> dict[str, Shape]:
  """Returns the shapes of the arrays of a row of several documents.

  These are tokens, targets, weights and segment_ids; and with
  data.document_mask, by which a document sees only itself, also positions."""
  if config.data.document_mask:
    return arrays_of_text(config, 'segment_ids', 'positions')
  return arrays_of_text(config, 'segment_ids')


def number_documents(starts_L: np.ndarray) -> dict[str, np.ndarray]:
  """Numbers the documents that are packed into a row, so that attention can
  keep them apart.

  Args:
    starts_L: bool [L], where a document begins; one begins with the row, too.

  Returns:
    segment_ids [L], the number of the document of each token, 1 or more, as 0
    is padding's; and positions [L], which begin with 0 in each document.
  """
  # The start of a token's document is the largest start up to its place.
  place_L = np.arange(len(starts_L))
  start_of_document_L = np.maximum.accumulate(np.where(starts_L, place_L, 0))
  return dict(segment_ids=1 + np.cumsum(starts_L),
              positions=place_L - start_of_document_L)


def pad_prompts(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts of unequal lengths on the right.

  Args:
    rows: the token ids of each of B prompts.

  Returns:
    int32 [B, L], the tokens, where L is the longest length; and int32 [B], how
    many of each row are real.
  """
  # The rows of `tokens` are views, so writing into one fills the array. The id
  # of padding does not matter, as the lengths tell where it begins.
  lengths = np.array([len(row) for row in rows], np.int32)
  tokens = np.zeros((len(rows), lengths.max()), np.int32)
  for row, ids in zip(tokens, rows):
    row[:len(ids)] = ids
  return tokens, lengths


def prompt_after_separator(texts: Sequence[str], config: Config,
                           tokenizer: Tokenizer) -> Prompts:
  """Returns texts as prompts for a decoder: each follows the separator, as a
  document does in training."""
  rows = []
  for ids in tokenizer.encode_batch(texts):
    rows.append(np.concatenate([[tokenizer.separator_id], ids]))
  tokens, lengths = pad_prompts(rows)
  return Prompts(tokens=tokens, lengths=lengths)


class Objective:
  """An objective, from the text that it reads to the figures that it reports.

  A subclass says what is its own: `view`, `example` and `arrays` always, and
  of all else what differs from the defaults here.

  Attributes:
    stacks: which models it trains, as architectures.stack names them.
    view: a class that takes a sources.Corpus and gives the items that rows are
      made of. It is a sequence whose view[i] takes the same time for every i,
      so that an item can be read wherever the order of a run puts it; its
      num_tokens and num_bytes say how much text one pass over it reads, and its
      READS what a source may hold for it.
    inputs: keys of the batch that are the module's positional arguments.
    options: {key of the batch, where it is there: keyword of the module}.
    seen: keys whose entries tell tokens from padding, which is 0.
    reads: fields of the config that this objective reads and some do not: to
      set one with an objective that does not read it is refused.
    ignores: fields of the config that most objectives read and this one does
      not.
    head: the head of the models that it trains (model.head), an entry of HEADS
      of architectures/parts/heads.py.
    terms: the figures whose sum is the loss. The first one is the mean over the
      tokens to predict.
    loss_unit: what a loss is measured in; '': the square of a number of the
      data.
    record_kind: what its data hold where that is not text: Source.records.
    has_labels: whether the data have labels; see `labels`.
    writes: whether the model writes text; see `prompt`.
    talks: whether the model can be talked with in turns; see `talk`.
    has_chat_template: whether an export has one; see `chat_template`.
    has_lengths: whether rows differ so much in length that batches are padded
      to one of several lengths; see `length`.
    every_token: whether each token of the text is predicted once, from those
      before it. The loss is then one of the text, in bits per byte whatever
      the tokenizer, and can be measured at longer lengths than in training.
    bound: whether the loss is an upper bound of the text's, by draws of what
      is masked; it is given in bits per byte too.
    mtp: whether model.mtp_depth may predict further tokens of its rows, in
      which no token sees those after it.
  """
  stacks: tuple[str, ...] = ()
  view: Any = None
  inputs: tuple[str, ...] = ('tokens',)
  options: Mapping[str, str] = {
      'positions': 'positions_BL', 'types': 'type_ids_BL',
      'segment_ids': 'segment_ids_BL'}
  seen: tuple[str, ...] = ('segment_ids',)
  reads: tuple[str, ...] = ()
  ignores: tuple[str, ...] = ()
  head: str = 'lm'
  terms: tuple[str, ...] = ('loss',)
  loss_unit: str = 'nats a token'
  record_kind: str = ''
  has_labels: bool = False
  writes: bool = False
  talks: bool = False
  has_chat_template: bool = False
  has_lengths: bool = False
  predicts_every_token: bool = False
  bound: bool = False
  mtp: bool = False

  # A subclass defines these methods.

  def example(self, item: Any, rng: np.random.Generator | None, config: Config,
              tokenizer: Tokenizer) -> Row:
    """Turns one item of the data into a row of a batch. Each objective defines
    this for itself.

    Args:
      item: what the row is made of, such as a window of text.
      rng: the random generator of this row. It is seeded by the run's seed and
        the number of the row in the whole run, so that masks and the like
        repeat whatever the number of hosts and threads. None where nothing is
        drawn.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      The row, {name: array or number}, with the names of `arrays`.
    """
    raise NotImplementedError

  def arrays(self, config: Config) -> dict[str, Shape]:
    """Returns {key: (shape, dtype)} of one row: the arrays of a batch, without
    their first axis.

    Args:
      config: the config of the run.
    """
    raise NotImplementedError

  # A subclass may define these methods too.

  def check(self, config: Config) -> None:
    """Raises RequestError for a config that it cannot train by."""

  def fill(self, tokenizer: Tokenizer) -> int:
    """Returns the token that fills up rows that are too short."""
    return padding_id(tokenizer)

  def vocab_size(self, config: Config, tokenizer: Tokenizer) -> int:
    """Returns how many ids the data of this objective have."""
    return tokenizer.vocab_size

  def derived(self, config: Config) -> Mapping[str, Any]:
    """Returns values of the config that this objective fills in, by dotted
    name."""
    return {}

  def figures(self, output: Output, batch: Batch, config: Config) -> Figures:
    """Returns the losses, in nats, and other figures of a batch.

    Args:
      output: the output of the model.
      batch: the arrays of a batch by name, each [batch, ...].
      config: the config of the run.

    Returns:
      {name: Mean}: each figure as a sum and its weight.
    """
    return token_loss_figures(output, batch=batch, config=config)

  def weights(self, batch: Batch) -> dict[str, jax.Array]:
    """Returns the sum of the weights by which each loss of `terms` is divided
    in this batch, {name: scalar}."""
    return {self.main: count_targets(batch)}

  def num_unread_places(self, config: Config, length: int) -> int:
    """Returns how many places of a row the head does not read in training.

    Args:
      config: the config of the run.
      length: the tokens of the row.
    """
    return 0

  def loss_of_guessing(self, config: Config, vocab: int) -> float | None:
    """Returns the loss, in nats, of a model to which all answers are alike:
    all labels, or all tokens; None of an objective that has none.

    Args:
      config: the config of the run, with data.labels as its data have them.
      vocab: the number of token ids of the model.
    """
    return math.log(vocab)

  def num_labels(self, config: Config) -> int:
    """Returns how many outputs the head has for each row or token
    (model.num_labels); 0 where it predicts tokens."""
    if self.has_labels:
      return len(config.data.labels)
    return 0

  def labels(self, config: Config) -> tuple[str, ...]:
    """Returns the labels that the training data have, for data.labels."""
    raise NotImplementedError

  def length(self, item: Any) -> int:
    """Returns how many tokens the row of an item has."""
    raise NotImplementedError

  def prompt(self, texts: Sequence[str], config: Config, tokenizer: Tokenizer
             ) -> Prompts:
    """Returns the texts as the model is shown them before it writes."""
    raise NotImplementedError

  def talk(self, config: Config, tokenizer: Tokenizer) -> Talk:
    """Returns how the model is talked with in turns: how messages become
    tokens, and what ends an answer."""
    raise NotImplementedError

  def chat_template(self, config: Config, tokenizer: Tokenizer) -> str | None:
    """Returns the Jinja template that an export of the model gets; None: none.
    """
    return None

  # These methods follow from the ones above.

  def batch(self, examples: Sequence[tuple[Any, np.random.Generator | None]],
            config: Config, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Makes the arrays of a batch [B, ...] from the items of its B rows.

    An array that is shorter than a full row is padded at its end: tokens and
    targets with the token id `fill`, everything else with zeros.

    Args:
      examples: for each row, its item (what the row is made of, such as a
        window of text) and its random generator.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      {name: array}, with the names and the shapes that `arrays` gives.
    """
    # Make arrays of the right shape that hold nothing but padding. This is done
    # once for the batch, as the fields of a config are slow to read.
    batch: dict[str, np.ndarray] = {}
    for key, (shape, dtype) in self.arrays(config).items():
      filling = 0
      if key.endswith(('tokens', 'targets')):
        filling = self.fill(tokenizer)
      batch[key] = np.full((len(examples), *shape), filling, dtype)
    # The model may have fewer embeddings than the tokenizer has tokens.
    may_lack = model_lacks_ids(config, tokenizer)

    # Write each row into the arrays. A shorter value leaves its end as padding.
    for row, (item, rng) in enumerate(examples):
      values = self.example(item, rng, config, tokenizer)
      assert values.keys() == batch.keys(), (values.keys(), batch.keys())
      for key, value in values.items():
        if may_lack and self._has_ids(key):
          check_model_has_ids(value, config=config, tokenizer=tokenizer,
                              subject='a row of the data')
        rows = batch[key]
        if np.shape(value) == rows.shape[1:]:
          rows[row] = value
        else:
          rows[row, :len(value)] = value
    return batch

  def _has_ids(self, key: str) -> bool:
    """Returns whether an array of a batch holds ids of the vocabulary."""
    if key == 'targets':
      return self.head == 'lm'
    return key.endswith('tokens')

  def row_lengths(self, config: Config) -> tuple[int, ...]:
    """Returns how many tokens a row has at most: one number, or for an
    encoder-decoder that of its source and that of its target."""
    arrays = self.arrays(config)
    lengths = []
    for key in ('tokens', 'decoder_tokens'):
      if key in arrays:
        shape, _ = arrays[key]
        lengths.append(shape[0])
    return tuple(lengths)

  def apply(self, module: nn.Module, params: Any, batch: Batch,
            **kwargs) -> Output:
    """Runs the model on a batch. The objective decides which of the batch's
    arrays the model sees.

    Args:
      module: the Flax module of the model.
      params: its parameters, a tree of arrays.
      batch: the arrays of the batch by name.
      **kwargs: further arguments of module.apply, such as random keys.
    """
    # `inputs` names the arrays that the model takes by position. `options` maps
    # the arrays that a batch may have to the model's keyword arguments.
    inputs = [batch[key] for key in self.inputs]
    for key, keyword in self.options.items():
      if key in batch:
        kwargs[keyword] = batch[key]
    return module.apply(  # type: ignore[return-value]
        {'params': params}, *inputs, **kwargs)

  def token_losses(self, module: nn.Module, params: Any, batch: Batch
                   ) -> losses.TokenLosses:
    """Computes the loss of each token by itself, for evaluation.

    Args:
      module: the Flax module of the model.
      params: its parameters, a tree of arrays.
      batch: the arrays of a batch by name, with `targets` [B, L], the token ids
        to predict in B rows of L tokens.
    """
    output = self.apply(module, params=params, batch=batch)
    assert output.head is not None  # else there are no logits
    return losses.token_losses(output.hidden, head=output.head,
                               targets_BL=batch['targets'])

  def ends(self, config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids with which a text that the model writes ends, the
    separator of documents first."""
    separator = tokenizer.separator_id
    if not self.talks:
      return (separator,)
    other_ends = self.talk(config, tokenizer).ends - {separator}
    return (separator, *sorted(other_ends))

  @property
  def holds(self) -> tuple[str, ...]:
    """The kinds of data source that this objective can read, as
    sources.Source.holds names them."""
    if self.record_kind:
      return (self.record_kind,)
    return self.view.READS

  @property
  def has_perplexity(self) -> bool:
    """Whether e to the power of the loss is the perplexity of a text."""
    return self.head == 'lm' and not self.record_kind

  @property
  def prefix(self) -> bool:
    """Whether the first tokens of each row, its prefix, see each other."""
    return 'prefix_B' in self.options.values()

  @property
  def main(self) -> str:
    """The name of the figure that is the loss of a token to predict."""
    return self.terms[0]

  def tokens(self, batch: Batch) -> jax.Array:
    """Returns how many tokens of a batch the model sees, without padding."""
    return sum(  # type: ignore[return-value]
        (batch[key] != 0).astype(jnp.float32).sum() for key in self.seen)

  def loss(self, output: Output, batch: Batch, config: Config,
           whole: Batch | None = None) -> tuple[jax.Array, Figures]:
    """Computes the loss of a batch, or of a micro-batch: a part of a batch
    whose gradient is added to those of the other parts.

    The gradients of micro-batches are added first and divided afterwards, so
    the loss is returned as a sum, not as a mean:

      sum_main + sum over the other terms t of sum_t * W_main / W_t,

    with the sum of each term over this micro-batch, and its weight W over the
    whole batch. Divided by W_main, this is the sum of the terms' means.

    Args:
      output: the output of the model, with its hidden states and its head.
      batch: the batch or micro-batch.
      config: the config of the run.
      whole: the weight W of each term over the whole batch, by its name; None:
        `batch` is the whole batch.

    Returns:
      The loss as given above; and the figures of this micro-batch, {name:
      Mean}.
    """
    figures = self.figures(output, batch, config)
    if whole is None:
      whole = self.weights(batch)
    # The main term is the first one. The others may be means over something
    # else, such as over rows rather than tokens.
    share = figures[self.main].total
    for name in self.terms[1:]:
      share += figures[name].total * (whole[self.main] / whole[name])
    return share + multi_token_loss(figures, config), figures

  def means(self, figures: Mapping[str, Mean]) -> dict[str, Any]:
    """Returns the value of each figure, and the `loss`, which is the sum of
    `terms`."""
    values: dict[str, Any] = {
        name: mean.total / mean.weight for name, mean in figures.items()}
    values['loss'] = sum(values[name] for name in self.terms)
    return values


OBJECTIVES: Mapping[str, Objective] = plugins.LazyTable(
    __name__, path=__path__, read=lambda file: file.OBJECTIVES,
    without=('losses', 'pipeline'))


def find_objective(config: Config) -> Objective:
  """Returns the objective of a run.

  Raises:
    RequestError: where there is none of that name.
  """
  check_choice('objective', value=config.objective, choices=OBJECTIVES)
  return OBJECTIVES[config.objective]


def find_objective_of_head(model: ModelConfig) -> str:
  """Returns the name of the objective that trains a model's head.

  Args:
    model: the config of a model, whose head, number of labels and stack
      (encoder, decoder or both) decide.

  Raises:
    RequestError: for a head of classes that has only one.
  """
  # One label stands for a number that is predicted (regression). Of several
  # objectives that fit, the first one in OBJECTIVES is taken.
  has_labels = model.num_labels > 1
  stack = architectures.stack(model)
  for name, objective in OBJECTIVES.items():
    if (objective.head == model.head and objective.has_labels == has_labels
        and stack in objective.stacks):
      return name
  raise RequestError(
      f'no objective trains model.head {model.head!r} with model.num_labels '
      f'{model.num_labels}: two labels or more are needed')


def check_fits(config: Config, source: sources.Source) -> None:
  """Raises RequestError for a source of data that the objective cannot learn
  from."""
  reads = find_objective(config).holds
  require(bool(set(reads) & set(source.holds)), f'objective '
          f'{config.objective!r} reads {" or ".join(reads)}, but data source '
          f'{source.name!r} holds {source.holds[0]}: choose from '
          f'{sources.list_forms(reads)}')


def fill_in_labels(config: Config) -> Config:
  """Returns a run's config with the labels of its training data as data.labels,
  where the objective has labels and the config names none."""
  objective = find_objective(config)
  if not objective.has_labels or config.data.labels:
    return config
  for _, source in sources.parse_sources(config.data.source):
    check_fits(config, source)
  config = config.copy_and_resolve_references()
  config.data.labels = objective.labels(config)
  return config


def shapes_of_batch(config: Config) -> dict[str, Shape]:
  """Returns {key: (shape, dtype)} of each array of a run's batches."""
  rows = config.data.batch_size
  shapes: dict[str, Shape] = {}
  for key, (shape, dtype) in find_objective(config).arrays(config).items():
    shapes[key] = (rows, *shape), dtype
  return shapes


def check_objective(config: Config) -> None:
  """Checks all fields of a config that concern its objective, which says what
  the model is trained to predict.

  Args:
    config: the config of the run.

  Raises:
    RequestError: for an unknown objective; for a field that has been set
      although the objective does not read it; and for whatever the objective
      itself cannot do.
  """
  objective = find_objective(config)
  if config.data.chat_template != conversations.PUBLISHED_NAME:
    conversations.read_template_text(config.data.chat_template)

  # A field that only other objectives read must keep its default: a user who
  # sets it believes that it has an effect. Fields that no objective lists are
  # for all. They are checked in sorted order, so that the message about the
  # first wrong one is always the same.
  read_by_some: set[str] = set()
  for other in OBJECTIVES.values():
    read_by_some.update(other.reads)
  for name in sorted(read_by_some.union(objective.ignores)):
    if name not in objective.reads:
      _check_field_unset(config, name)

  # Check the rules that concern several fields, those of the objective last.
  _check_mtp(config, objective)
  records.check_labels(config.data.labels)
  objective.check(config)


def _check_field_unset(config: Config, name: str) -> None:
  """Raises RequestError unless a field has its default.

  Args:
    config: the config of the run.
    name: the dotted name of a field that the run's objective does not read.
  """
  value = config[name]
  default = base.FIELDS[name].default
  if value == default:
    return
  # The message names the objectives that do read it.
  readers = []
  for objective_name, objective in OBJECTIVES.items():
    if name in objective.reads:
      readers.append(objective_name)
  other_choice = ''
  if readers:
    other_choice = f', or choose one that does: {", ".join(readers)}'
  raise RequestError(
      f'{name} is {value!r}, which objective {config.objective!r} does not '
      f'read: leave it at {default!r}{other_choice}')


def _check_mtp(config: Config, objective: Objective) -> None:
  """Raises RequestError where the objective does not train the modules that
  predict further tokens (model.mtp_depth)."""
  depth = config.model.mtp_depth
  if not depth or objective.mtp:
    return
  choices = [name for name, other in OBJECTIVES.items() if other.mtp]
  raise RequestError(
      f'model.mtp_depth is {shorten(depth)}, which objective '
      f'{config.objective!r} does not train: set it to 0, or choose the '
      f'objective from {", ".join(choices)}')


# The loss of tokens further ahead, which model.mtp_depth predicts (DeepSeek-AI
# 2024b, arXiv 2412.19437, equations 24 and 25):
#
#   L_k = -1/T  sum over i of  log p_k(t_(i+k+1) | t_1 ... t_(i+k))
#   loss + lambda / D  sum over k = 1 ... D of  L_k
#
# T is the number of tokens that the loss itself is a mean over, and lambda is
# train.mtp_weight. Of packed documents a module predicts only tokens of the
# document that it reads.

MTP_LOSS = 'mtp_{}_loss'  # the name of the loss at depth k


def shift_targets(batch: Batch, depth: int
                  ) -> tuple[jax.Array, jax.Array]:
  """Shifts the targets of next-token prediction by k tokens, for a model that
  also predicts tokens further ahead (multi-token prediction).

  Args:
    batch: targets and weights [B, L] of next-token prediction, for B rows of L
      tokens; and segment_ids [B, L], the number of each token's document, where
      several documents are packed into a row.
    depth: k, how many tokens further ahead than the next one to predict.

  Returns:
    The shifted targets [B, L]; and their weights [B, L], which are 0 where the
    token k places on lies past the end of the row or in another document.
  """
  # jnp.roll moves the first k targets of a row to its end, where they are
  # wrong. There, and where the target is in another document, weights become 0.
  targets_BL = jnp.roll(batch['targets'], -depth, 1)
  L = targets_BL.shape[1]
  exists_BL = jnp.arange(L)[None] < L - depth
  if 'segment_ids' in batch:
    ids_BL = batch['segment_ids']
    exists_BL &= ids_BL == jnp.roll(ids_BL, -depth, 1)
  weights_BL = jnp.roll(batch['weights'], -depth, 1)
  return targets_BL, jnp.where(exists_BL, weights_BL, 0)


def multi_token_figures(output: Any, batch: Batch, train: Config) -> Figures:
  """Computes the losses of predicting tokens further ahead than the next one,
  and the accuracy of these predictions (multi-token prediction: DeepSeek-V3,
  equation 24).

  Args:
    output: the output of the model. output.extra['mtp'] has the hidden states
      [B, L, D] for each depth k = 1, 2, ..., from which the token k places
      behind the next one is predicted. B rows have L tokens, with D features
      each.
    batch: targets and weights [B, L] of next-token prediction.
    train: the section `train` of the config.

  Returns:
    {name: Mean}, each a sum and the weight to divide it by; {} for a model that
    predicts only the next token.
  """
  figures = {}
  hidden_of_depths = output.extra.get('mtp', ())
  for depth, hidden_BLD in enumerate(hidden_of_depths, 1):
    # Each depth looks one token further than the one before it.
    targets_BL, weights_BL = shift_targets(batch, depth)
    loss, sums = losses.cross_entropy(
        hidden_BLD, head=output.head, targets_BL=targets_BL,
        weights_BL=weights_BL, z_loss=train.z_loss,
        label_smoothing=train.label_smoothing)
    figures[MTP_LOSS.format(depth)] = Mean(loss, sums['weight'])
    figures[f'mtp_{depth}_accuracy'] = Mean(sums['accuracy'], sums['weight'])
  return figures


def multi_token_loss(figures: Mapping[str, Any], config: Config):
  """Returns what multi-token prediction adds to the loss: lambda / D times the
  sum of the losses of the depths 1 to D (DeepSeek-V3, equation 25).

  Args:
    figures: {name: Mean}, the figures of a batch, each a sum and the weight to
      divide it by. Those named by MTP_LOSS are the losses of the depths.
    config: the config of the run, with D = model.mtp_depth and lambda =
      train.mtp_weight.

  Returns:
    A sum over tokens, not a mean, so that it can be added to the sum of the
    loss of next tokens. It is 0 where the figures have no loss of a depth.
  """
  # The sums are not divided by their own weights: the caller divides the whole
  # loss by the weight of the next tokens.
  depth = config.model.mtp_depth
  totals = []
  for k in range(1, depth + 1):
    name = MTP_LOSS.format(k)
    if name in figures:
      totals.append(figures[name].total)
  if not totals:
    return 0.0
  return config.train.mtp_weight / depth * sum(totals)
