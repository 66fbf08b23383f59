"""What a model learns to do: one record an objective, in the table OBJECTIVES.

To add an objective, write its record in a file of this folder, in a table
OBJECTIVES of that file; Objective says what a record holds. Everything else
reads these tables: the batches (pipeline.py), the training step, evaluation
and sampling, plans of memory, exports, and the check for fields that a run
would not read.

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
import functools
import math
from typing import Any, NamedTuple, TypeAlias

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import architectures
from architectures.parts import layers, sharding
from architectures.parts.config import ModelConfig
from architectures.parts.heads import Head
from architectures.parts.skeletons import Output
from common import lazy
from common.errors import RequestError, one_of, require, short
from configs import base
from training.data import conversations, records, sources
from training.data.tokenizers import Tokenizer, spelt

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
    prompt = self.tokens[row, :self.lengths[row]] if not self.gap else ()
    text = spelt(tokenizer, ids, prompt).decode('utf-8', 'replace')
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


def fill_id(tokenizer: Tokenizer) -> int:
  """Returns the token that fills rows up: padding, or the separator where there
  is none."""
  return tokenizer.special_ids.get('pad', tokenizer.separator_id)


def targets(batch: Batch) -> jax.Array:
  """Returns how many tokens of a batch are to be predicted, by weight."""
  return batch['weights'].astype(jnp.float32).sum()


def token_loss(output: Output, batch: Batch, config: Config) -> Figures:
  """Returns the cross-entropy of targets [B, L], where weights [B, L] count
  them: of the next tokens, or of the masked ones."""
  train = config.train
  assert output.head is not None, 'a head of a task predicts no tokens'
  loss_sum, sums = cross_entropy(
      output.hidden, output.head, batch['targets'], batch['weights'],
      z_loss=train.z_loss, label_smoothing=train.label_smoothing)
  weight = sums.pop('weight')
  return {name: Mean(total, weight)
          for name, total in (sums | {'loss': loss_sum}).items()
          } | mtp_sums(output, batch, train)


def lacks_ids(config: Config, tokenizer: Tokenizer) -> bool:
  """Returns whether the tokenizer has tokens that the model does not have, as
  that of an import may (Tokenizer.least_size)."""
  return 0 < config.model.vocab_size < tokenizer.vocab_size


def known_ids(ids: np.ndarray, config: Config, tokenizer: Tokenizer, what: str
              ) -> None:
  """Raises RequestError for a token that the model does not have."""
  if not lacks_ids(config, tokenizer):
    return
  size, most = config.model.vocab_size, int(np.max(ids, initial=0))
  if most >= size:
    raise RequestError(
        f'{what} has the token {tokenizer.piece(most)}, whose id is {most}, '
        f'and the model has the ids 0 to {size - 1}: take it out of the text, '
        'or out of the chat template')


def text_arrays(config: Config, *more: str) -> dict[str, Shape]:
  """Returns the arrays of a row of data.length tokens, each predicted at its
  own place, and `more` arrays of as many integers."""
  L = (config.data.length,)
  return dict(tokens=(L, np.int32), targets=(L, np.int32),
              weights=(L, np.float32)) | {key: (L, np.int32) for key in more}


def document_arrays(config: Config) -> dict[str, Shape]:
  """Returns the same for rows of segments; with data.document_mask these are
  documents, each with positions of its own."""
  apart = ('positions',) if config.data.document_mask else ()
  return text_arrays(config, 'segment_ids', *apart)


def documents(starts_L: np.ndarray) -> dict[str, np.ndarray]:
  """Returns segment_ids and positions [L] of packed documents: one begins
  wherever starts_L is true, and one at the beginning of the row."""
  index_L = np.arange(len(starts_L))
  first_L = np.maximum.accumulate(np.where(starts_L, index_L, 0))
  return dict(segment_ids=1 + np.cumsum(starts_L), positions=index_L - first_L)


def padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Returns prompts of unequal lengths as [B, L], and their lengths [B]."""
  lengths = np.array([len(row) for row in rows], np.int32)
  tokens = np.zeros((len(rows), lengths.max()), np.int32)
  for row, ids in zip(tokens, rows):
    row[:len(ids)] = ids
  return tokens, lengths


def after_separator(texts: Sequence[str], config: Config, tokenizer: Tokenizer
                    ) -> Prompts:
  """Returns texts that a document begins with, for a decoder to go on from."""
  return Prompts(*padded([np.concatenate([[tokenizer.separator_id], ids])
                          for ids in tokenizer.encode_batch(texts)]))


class Objective(NamedTuple):
  """An objective, from the text that it reads to the figures that it reports.

  Attributes:
    stacks: which models it trains, as architectures.stack names them.
    view: a class that takes a sources.Corpus and gives the items that rows are
      made of. It is a sequence whose view[i] takes the same time for every i,
      so that an item can be read wherever the order of a run puts it; its
      num_tokens and num_bytes say how much text one pass over it reads.
    example: (item, rng, config, tokenizer) -> one row of a batch. `rng` is
      drawn from the seed and the row's place in the whole run, so that masks
      too repeat on any number of hosts and threads. See `row`.
    arrays: config -> {key: (shape, dtype)} of one row: the batch's own, less
      their first axis.
    inputs: keys of the batch that are the module's positional arguments.
    options: {key of the batch, where it is there: keyword of the module}.
    seen: keys whose entries tell tokens from padding, which is 0.
    reads: fields of the config that this objective reads and some do not: to
      set one with an objective that does not read it is refused.
    fill: tokenizer -> the token that rows are filled up with.
    figures: (output, batch, config) -> {name: Mean}; losses are in nats.
    terms: {figure: batch -> what its mean is over}; the loss is the sum of
      these means. The first one is the mean over the tokens to predict.
    prompt: (texts, config, tokenizer) -> Prompts, where the model writes text;
      None: it does not write.
    every_token: whether each token of the text is predicted once, from those
      before it. The loss is then one of the text, in bits per byte whatever
      the tokenizer, and can be measured at longer lengths than in training.
    bound: whether its loss is an upper bound of the text's, by draws of what
      is masked, which is told in bits per byte too.
    mtp: whether model.mtp_depth may predict further tokens of its rows, in
      which none sees those after it.
    chat_template: (config, tokenizer) -> the Jinja template of an export, or
      None; None: there is never one.
    head: the head of the models that it trains (model.head), an entry of HEADS
      of architectures/parts/heads.py.
    talk: (config, tokenizer) -> Talk; None: the model cannot be talked with
      in turns.
    records: what its data hold where that is not text: Source.records.
    labels: config -> data.labels, as its training data have them; None: its
      data have none.
    length: item -> how many tokens its row has, where that differs so much that
      batches are padded to one of several lengths; None: to data.length.
    ignores: fields of the config that most objectives read and this one does
      not.
    unread: (config, tokens of a row) -> how many of its places the head does
      not read in training.
    guess: (config, ids of the model) -> the loss of guessing, in nats, where
      it is another than `guessing` takes it for.
    check: raises RequestError for a config that it cannot train by.
    vocab_size: (config, tokenizer) -> how many ids its data have.
    derived: config -> what it fills in of the config, by dotted name.
  """
  stacks: tuple[str, ...]
  view: Any
  example: Callable[..., Row]
  arrays: Callable[[Config], dict[str, Shape]]
  inputs: tuple[str, ...] = ('tokens',)
  options: Mapping[str, str] = {
      'positions': 'positions_BL', 'types': 'type_ids_BL',
      'segment_ids': 'segment_ids_BL'}
  seen: tuple[str, ...] = ('segment_ids',)
  reads: tuple[str, ...] = ()
  fill: Callable[[Tokenizer], int] = fill_id
  figures: Callable[..., Figures] = token_loss
  terms: Mapping[str, Callable] = {'loss': targets}
  prompt: Callable[..., Prompts] | None = None
  every_token: bool = False
  bound: bool = False
  mtp: bool = False
  chat_template: Callable[..., str | None] | None = None
  head: str = 'lm'
  talk: Callable[..., Talk] | None = None
  records: str = ''
  labels: Callable[[Config], tuple[str, ...]] | None = None
  length: Callable[[Any], int] | None = None
  ignores: tuple[str, ...] = ()
  unread: Callable[[Config, int], int] = lambda config, length: 0
  guess: Callable[[Config, int], float] | None = None
  check: Callable[[Config], None] = lambda config: None
  vocab_size: Callable[[Config, Tokenizer], int] = (
      lambda config, tokenizer: tokenizer.vocab_size)
  derived: Callable[[Config], Mapping[str, Any]] = lambda config: {}

  def batch(self, examples: Sequence[tuple[Any, np.random.Generator | None]],
            config: Config, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Returns the rows of a batch: what `example` makes of each item and its
    rng, in the shapes and dtypes of `arrays`. What is shorter is filled up:
    tokens and targets with `fill`, everything else with zeros."""
    # Once for a batch: fields of a config are slow to read.
    batch: dict[str, np.ndarray] = {}
    for key, (shape, dtype) in self.arrays(config).items():
      ids = key.endswith(('tokens', 'targets'))
      batch[key] = np.full((len(examples), *shape),
                           self.fill(tokenizer) if ids else 0, dtype)
    few = lacks_ids(config, tokenizer)
    for row, (item, rng) in enumerate(examples):
      values = self.example(item, rng, config, tokenizer)
      assert values.keys() == batch.keys(), (values.keys(), batch.keys())
      for key, value in values.items():
        if few and (key.endswith('tokens')
                    or key == 'targets' and self.head == 'lm'):
          known_ids(value, config, tokenizer, 'a row of the data')
        rows = batch[key]
        if np.shape(value) == rows.shape[1:]:
          rows[row] = value
        else:
          rows[row, :len(value)] = value
    return batch

  def row_lengths(self, config: Config) -> tuple[int, ...]:
    """Returns how many tokens a row has, at most: of an encoder-decoder, those
    of its source and of its target."""
    arrays = self.arrays(config)
    return tuple(arrays[key][0][0] for key in ('tokens', 'decoder_tokens')
                 if key in arrays)

  def apply(self, module: nn.Module, params: Any, batch: Batch,
            **kwargs) -> Output:
    """Runs `module` on what this objective shows it of the batch."""
    kwargs |= {keyword: batch[key] for key, keyword in self.options.items()
               if key in batch}
    return module.apply(  # type: ignore[return-value]
        {'params': params}, *[batch[key] for key in self.inputs], **kwargs)

  def token_losses(self, module: nn.Module, params: Any, batch: Batch
                   ) -> 'TokenLosses':
    """Returns each token's own loss; for evaluation."""
    output = self.apply(module, params, batch)
    assert output.head is not None  # else there are no logits
    return token_losses(output.hidden, output.head, batch['targets'])

  def ends(self, config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids with which a written text ends, the separator first."""
    talked = self.talk(config, tokenizer).ends if self.talk else frozenset()
    end = tokenizer.separator_id
    return (end, *sorted(talked - {end}))

  @property
  def holds(self) -> tuple[str, ...]:
    """What a source may hold for it (sources.Source.holds): its records, or the
    READS of its view."""
    return (self.records,) if self.records else self.view.READS

  @property
  def perplexity(self) -> bool:
    """Whether e to the power of the loss is one."""
    return self.head == 'lm' and not self.records

  def num_labels(self, config: Config) -> int:
    """Returns how many outputs the head has (model.num_labels), as the labels
    of the data say; 0 where it needs none."""
    return len(config.data.labels) if self.labels else int(
        self.head == 'sequence')

  def guessing(self, config: Config, vocab: int) -> float | None:
    """Returns the loss, in nats, of a model to which all answers are alike:
    all labels, or all tokens. None: it has none, as of numbers.

    Args:
      config: the run's, with data.labels as its data have them.
      vocab: how many ids the model has.
    """
    if self.guess is not None:
      return self.guess(config, vocab)
    if self.labels is not None:
      return math.log(self.num_labels(config))
    return math.log(vocab) if self.head in ('lm', 'vector') else None

  @property
  def prefix(self) -> bool:
    """Whether the first tokens of each row, its prefix, see each other."""
    return 'prefix_B' in self.options.values()

  @property
  def main(self) -> str:
    """The figure that is the loss of a token to predict."""
    return next(iter(self.terms))

  def weights(self, batch: Batch) -> dict[str, jax.Array]:
    """Returns what each term of the loss is divided by in this batch."""
    return {name: of(batch) for name, of in self.terms.items()}

  def tokens(self, batch: Batch) -> jax.Array:
    """Returns how many tokens of a batch the model sees, without padding."""
    return sum(  # type: ignore[return-value]
        (batch[key] != 0).astype(jnp.float32).sum() for key in self.seen)

  def loss(self, output: Output, batch: Batch, config: Config,
           whole: Batch | None = None) -> tuple[jax.Array, Figures]:
    """Returns a batch's share in whole[main] times the loss, and its figures.

    The shares of micro-batches add up, and so do their gradients.

    Args:
      output: the model's.
      batch: a batch, or a micro-batch.
      config: the run's.
      whole: `weights` of the whole batch; None: this is the whole.
    """
    figures = self.figures(output, batch, config)
    whole = self.weights(batch) if whole is None else whole
    share = figures[self.main].total
    for name in self.terms:
      if name != self.main:
        share += figures[name].total * (whole[self.main] / whole[name])
    return share + mtp_share(figures, config), figures

  def means(self, figures: Mapping[str, Mean]) -> dict[str, Any]:
    """Returns the figures' values, `loss` among them."""
    values = {name: mean.total / mean.weight for name, mean in figures.items()}
    return values | {'loss': sum(values[name] for name in self.terms)}


# The fields that some objectives read and others do not; see Objective.reads.
OF_SOME = (
    *(f'data.{name}' for name in (
        'chat_template', 'class_weights', 'document_mask', 'labels',
        'length_buckets', 'mask_rate', 'stride', 'target_length',
        'whole_words')),
    *(f'probe.{name}' for name in (
        'examples', 'held_out', 'levels', 'random_non_queries', 'vocab')),
    'span.mean_length', 'span.noise_density', 'span.permuted')


OBJECTIVES: Mapping[str, Objective] = lazy.Lazy(
    __name__, __path__, lambda file: file.OBJECTIVES,
    without=('pipeline',))


def of(config: Config) -> Objective:
  """Returns the record of a run's objective; RequestError if there is none."""
  one_of('objective', config.objective, OBJECTIVES)
  return OBJECTIVES[config.objective]


def with_head(model: ModelConfig) -> str:
  """Returns the objective that trains a model's head.

  Raises:
    RequestError: for a head with one label for each token.
  """
  classes = model.num_labels > 1
  names = [name for name, row in OBJECTIVES.items()
           if row.head == model.head and (row.labels is not None) == classes
           and architectures.stack(model) in row.stacks]
  require(bool(names), f'no objective trains model.head {model.head!r} with '
          f'model.num_labels {model.num_labels}: two labels or more are needed')
  return names[0]


def check_fits(config: Config, source: sources.Source) -> None:
  """Raises RequestError for a source of which the objective cannot learn."""
  reads = of(config).holds
  require(bool(set(reads) & set(source.holds)), f'objective '
          f'{config.objective!r} reads {" or ".join(reads)}, but data source '
          f'{source.name!r} holds {source.holds[0]}: choose from '
          f'{sources.forms(reads)}')


def with_labels(config: Config) -> Config:
  """Returns a run's config with data.labels as its training data have them,
  where the objective has labels and the config names none."""
  labels = of(config).labels
  if labels is None or config.data.labels:
    return config
  for _, source in sources.parse(config.data.source):
    check_fits(config, source)
  config = config.copy_and_resolve_references()
  config.data.labels = labels(config)
  return config


def shapes(config: Config) -> dict[str, Shape]:
  """Returns the shape and dtype of each array of a run's batches."""
  return {key: ((config.data.batch_size, *shape), dtype)
          for key, (shape, dtype) in of(config).arrays(config).items()}


def check_objective(config: Config) -> None:
  """Raises RequestError for an unknown objective, and for a field that was set,
  so that it differs from its default, and that the objective does not read."""
  objective = of(config)
  if config.data.chat_template != conversations.PUBLISHED_NAME:
    conversations.source(config.data.chat_template)
  for name in {*OF_SOME, *objective.ignores} - {*objective.reads}:
    value, default = config[name], base.FIELDS[name].default
    if value != default:
      readers = [key for key, row in OBJECTIVES.items() if name in row.reads]
      raise RequestError(
          f'{name} is {value!r}, which objective {config.objective!r} does not '
          f'read: leave it at {default!r}' + (
              f', or choose one that does: {", ".join(readers)}'
              if readers else ''))
  depth = config.model.mtp_depth
  if depth and not objective.mtp:
    choices = [key for key, row in OBJECTIVES.items() if row.mtp]
    raise RequestError(
        f'model.mtp_depth is {short(depth)}, which objective '
        f'{config.objective!r} does not train: set it to 0, or choose the '
        f'objective from {", ".join(choices)}')
  records.check_labels(config.data.labels)
  objective.check(config)


# Cross-entropy of a model's hidden states, a chunk of the length at a time.
#
# For a token with logits l, target y, and q = (1 - s) onehot(y) + s / V, where
# s is the label smoothing (Szegedy et al. 2016, section 7):
#
#   loss = log_z - q . l + c log_z^2,    log_z = logsumexp(l)
#
# with c the coefficient of the z-loss (PaLM: Chowdhery et al. 2022, section
# 5). Its gradient, (1 + 2 c log_z) softmax(l) - q, needs nothing but l. So it
# is taken in the forward pass, while a chunk's logits are there, and turned at
# once into gradients of the hidden states and of the head: no [B, L, V] array
# ever lives, and no logit is computed twice.
#
# Each shard of the tokens (Q) adds up its own gradient of the head, which the
# devices exchange once, after the last chunk of P positions.

# Where `chunk` is 0: float32 logits of 64 MiB a device, but tokens enough to
# be worth a reading of the head's weights.
AUTO_LOGITS = 2 ** 24
AUTO_TOKENS = 512


class TokenLosses(NamedTuple):
  """Of each token, [B, L], in float32.

  Attributes:
    loss: in nats, with label smoothing and z-loss.
    log_z: the logarithm of the softmax's denominator.
    correct: whether the target alone has the highest logit.
  """
  loss: jax.Array
  log_z: jax.Array
  correct: jax.Array


class _Settings(NamedTuple):
  z_loss: float
  label_smoothing: float
  rows: int  # shards of the batch
  lengths: int  # shards of the length; Q = rows * lengths
  positions: int  # P


def cross_entropy(hidden_BLD: jax.Array, head: Head, targets_BL: jax.Array,
                  weights_BL: jax.Array, *, z_loss: float = 0.0,
                  label_smoothing: float = 0.0, chunk: int = 0
                  ) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the weighted sum of the tokens' losses, and other weighted sums.

  Args:
    hidden_BLD: what the head is applied to; products are taken in its dtype
      and add up in float32.
    head: the output projection.
    targets_BL: token ids.
    weights_BL: how much each token counts; 0: not at all.
    z_loss: the z-loss's coefficient.
    label_smoothing: the probability that is spread over the vocabulary.
    chunk: tokens of one device whose logits are held at once; 0: by size.

  Returns:
    The sum to differentiate, and sums that nothing is differentiated through:
    `weight`, `accuracy` and, where there is one, `z_loss`.
  """
  settings = _settings(hidden_BLD, head, z_loss, label_smoothing, chunk)
  weights_BL = weights_BL.astype(jnp.float32)
  chex.assert_equal_shape([targets_BL, weights_BL])
  loss, tokens = _loss_sum(settings, hidden_BLD, head, targets_BL, weights_BL)
  tokens = jax.lax.stop_gradient(tokens)
  sums = {'weight': weights_BL.sum(),
          'accuracy': (weights_BL * tokens.correct).sum()}
  if z_loss:
    sums['z_loss'] = (weights_BL * z_loss * tokens.log_z ** 2).sum()
  return loss, jax.lax.stop_gradient(sums)


def token_losses(hidden_BLD: jax.Array, head: Head, targets_BL: jax.Array, *,
                 chunk: int = 0) -> TokenLosses:
  """Returns each token's negative log-likelihood; for evaluation."""
  settings = _settings(hidden_BLD, head, 0.0, 0.0, chunk)
  return _token_losses(settings, hidden_BLD, head, targets_BL)


def _token_losses(settings: _Settings, hidden_BLD: jax.Array, head: Head,
                  targets_BL: jax.Array) -> TokenLosses:
  kernel_DV = _kernel(head, hidden_BLD)

  def of_chunk(_: None, chunk: tuple[jax.Array, ...]):
    x_QBPD, targets_QBP = chunk
    logits_QBPV = head.finish(_product(x_QBPD, kernel_DV))
    return None, _losses(settings, logits_QBPV, targets_QBP)

  _, losses = jax.lax.scan(
      of_chunk, None, _cut(settings, (hidden_BLD, targets_BL)))
  return _join(settings, losses, targets_BL.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sum(settings: _Settings, hidden_BLD: jax.Array, head: Head,
              targets_BL: jax.Array, weights_BL: jax.Array):
  """(sum of weights * losses, TokenLosses, through which no gradient goes)."""
  tokens = _token_losses(settings, hidden_BLD, head, targets_BL)
  return (weights_BL * tokens.loss).sum(), tokens


def _loss_sum_fwd(settings: _Settings, *args):
  """The sum and, in the same pass, such of its gradients as are asked for."""
  asked = jax.tree.map(lambda x: x.perturbed, args)
  ask_hidden, ask_head, _, ask_weights = asked
  hidden_BLD, head, targets_BL, weights_BL = jax.tree.map(
      lambda x: x.value, args)
  kernel_DV = _kernel(head, hidden_BLD)
  kernel_VD = kernel_DV.T
  if sharding.platform() == 'cpu':
    # Both products read the kernel along its rows: one copy for all chunks.
    kernel_VD = jax.lax.optimization_barrier(kernel_VD)

  def of_chunk(d_head: Any, chunk: tuple[jax.Array, ...]):
    x_QBPD, targets_QBP, weights_QBP = chunk
    logits_QBPV, pull = jax.vjp(head.finish, _product(x_QBPD, kernel_DV))
    losses = _losses(settings, logits_QBPV, targets_QBP)
    d_QBPV, = pull(_gradient(settings, logits_QBPV, targets_QBP, weights_QBP,
                             losses.log_z))
    d_kernel, d_bias = d_head
    if ask_bias:
      d_bias += d_QBPV.sum((1, 2))
    d_QBPV = d_QBPV.astype(x_QBPD.dtype)
    if ask_head.kernel_DV:
      d_kernel += _kernel_gradient(x_QBPD, d_QBPV)
    dx_QBPD = None
    if ask_hidden:
      dx_QBPD = layers.einsum('QBPV,VD->QBPD', d_QBPV, kernel_VD, x_QBPD.dtype)
    return (d_kernel, d_bias), (losses, dx_QBPD)

  ask_bias = head.bias_V is not None and ask_head.bias_V
  zeros = (_zeros(settings, ask_head.kernel_DV, _turned(head.kernel_DV)),
           _zeros(settings, ask_bias, head.bias_V))
  (d_kernel, d_bias), (losses, dx_QBPD) = jax.lax.scan(
      of_chunk, zeros, _cut(settings, (hidden_BLD, targets_BL, weights_BL)))
  tokens, d_hidden = _join(settings, (losses, dx_QBPD), targets_BL.shape)
  d_head = head.replace(
      kernel_DV=_whole(d_kernel, head.kernel_DV, 'embed', 'vocab'),
      bias_V=_whole(d_bias, head.bias_V, 'vocab'))
  if sharding.devices() > 1:
    # The head's gradient is scattered before the layers' are computed: whole,
    # and in float32, it would lie there until the end.
    d_hidden, d_head = jax.lax.optimization_barrier((d_hidden, d_head))
  gradients = d_hidden, d_head, None, tokens.loss if ask_weights else None
  return ((weights_BL * tokens.loss).sum(), tokens), gradients


def _loss_sum_bwd(settings: _Settings, gradients: Any, cotangents: Any):
  scale = cotangents[0]
  if isinstance(scale, jax.custom_derivatives.SymbolicZero):
    return None, None, None, None
  return jax.tree.map(lambda x: (x * scale).astype(x.dtype), gradients)


_loss_sum.defvjp(_loss_sum_fwd, _loss_sum_bwd, symbolic_zeros=True)


def _product(x_QBPD: jax.Array, kernel_DV: jax.Array):
  return layers.einsum('QBPD,DV->QBPV', x_QBPD, kernel_DV, x_QBPD.dtype,
                       jnp.float32)


def _kernel_gradient(x_QBPD: jax.Array, d_QBPV: jax.Array) -> jax.Array:
  """Each shard's gradient of the kernel, `_turned`, in float32. XLA's CPU
  backend transposes the first operand of such a product, so there that is the
  hidden states. The barrier keeps it from turning the product of a tied kernel
  around, into one of bfloat16 that it does not have."""
  if sharding.one_cpu():
    return jax.lax.optimization_barrier(layers.einsum(
        'QBPD,QBPV->QDV', x_QBPD, d_QBPV, x_QBPD.dtype, jnp.float32))
  return layers.einsum('QBPV,QBPD->QVD', d_QBPV, x_QBPD, x_QBPD.dtype,
                       jnp.float32)


def _turned(kernel_DV: jax.Array) -> jax.Array:
  """The kernel as its gradient is added up: [V, D], but on one CPU [D, V]."""
  return kernel_DV if sharding.one_cpu() else kernel_DV.T


def _losses(settings: _Settings, logits_QBPV: jax.Array, targets_QBP: jax.Array
            ) -> TokenLosses:
  """The loss of each token. On a mesh the target's logit is found by a masked
  sum: a gather would collect a sharded vocabulary on every device."""
  smooth = settings.label_smoothing
  max_QBP1 = logits_QBPV.max(-1, keepdims=True)
  log_z_QBP = max_QBP1[..., 0] + jnp.log(
      jnp.exp(logits_QBPV - max_QBP1).sum(-1))
  if sharding.one_cpu():
    target_QBP = jnp.take_along_axis(
        logits_QBPV, targets_QBP[..., None], -1, mode='clip')[..., 0]
  else:
    target_QBP = jnp.where(_is_target(logits_QBPV, targets_QBP), logits_QBPV, 0
                           ).sum(-1)
  rivals_QBP = (logits_QBPV >= target_QBP[..., None]).sum(-1)
  loss_QBP = log_z_QBP - (1 - smooth) * target_QBP
  if smooth:
    loss_QBP -= smooth * logits_QBPV.mean(-1)
  if settings.z_loss:
    loss_QBP += settings.z_loss * log_z_QBP ** 2
  return TokenLosses(loss_QBP, log_z_QBP, rivals_QBP == 1)


def _gradient(settings: _Settings, logits_QBPV: jax.Array,
              targets_QBP: jax.Array, weights_QBP: jax.Array,
              log_z_QBP: jax.Array):
  """Of the weighted losses, in the logits."""
  smooth, z_loss = settings.label_smoothing, settings.z_loss
  p_QBPV = jnp.exp(logits_QBPV - log_z_QBP[..., None])
  q_QBPV = jnp.where(_is_target(logits_QBPV, targets_QBP), 1 - smooth, 0.0)
  if smooth:
    q_QBPV += smooth / logits_QBPV.shape[-1]
  if z_loss:
    p_QBPV *= (1 + 2 * z_loss * log_z_QBP)[..., None]
  return (p_QBPV - q_QBPV) * weights_QBP[..., None]


def _is_target(logits_QBPV: jax.Array, targets_QBP: jax.Array):
  ids_QBPV = jax.lax.broadcasted_iota(jnp.int32, logits_QBPV.shape, 3)
  return ids_QBPV == targets_QBP[..., None]


def _settings(hidden_BLD: jax.Array, head: Head, z_loss: float,
              label_smoothing: float, chunk: int) -> _Settings:
  """How the tokens are cut up: shards of the batch, and of the length chunks
  as even as can be."""
  batch, length, _ = hidden_BLD.shape
  rows, lengths = (sharding.shards('batch', batch),
                   sharding.shards('length', length))
  tokens = chunk or max(AUTO_TOKENS, AUTO_LOGITS // head.kernel_DV.shape[1])
  most = max(1, tokens * rows // batch)
  length //= lengths
  chunks = -(-length // most)
  return _Settings(z_loss, label_smoothing, rows, lengths, -(-length // chunks))


def _cut(settings: _Settings, arrays: tuple[jax.Array, ...]):
  """[B, L, ...] -> [chunks, Q, B / rows, P, ...], the length of a shard padded
  with zeros; the weight of a padded token is one of them."""
  rows, lengths, P = settings.rows, settings.lengths, settings.positions

  def cut(x: jax.Array):
    batch, length = x.shape[0] // rows, x.shape[1] // lengths
    chunks = -(-length // P)
    x = x.reshape(rows, batch, lengths, length, *x.shape[2:])
    pad = chunks * P - length
    if pad:
      x = jnp.pad(x, ((0, 0),) * 3 + ((0, pad),) + ((0, 0),) * (x.ndim - 4))
    x = x.reshape(rows, batch, lengths, chunks, P, *x.shape[4:])
    x = jnp.moveaxis(x, (3, 2), (0, 2))
    x = x.reshape(chunks, rows * lengths, batch, *x.shape[4:])
    return sharding.constrain_if(x, None, 'tokens', *(None,) * (x.ndim - 2))

  return jax.tree.map(cut, arrays)


def _join(settings: _Settings, arrays: tuple[jax.Array, ...],
          shape: tuple[int, ...]):
  """[chunks, Q, B / rows, P, ...] -> [B, L, ...]: `_cut` undone."""
  rows, lengths = settings.rows, settings.lengths

  def join(x: jax.Array):
    chunks, _, batch, P = x.shape[:4]
    x = x.reshape(chunks, rows, lengths, batch, P, *x.shape[4:])
    x = jnp.moveaxis(x, (0, 2), (3, 2))
    x = x.reshape(rows, batch, lengths, chunks * P, *x.shape[5:])
    x = x[:, :, :, :shape[1] // lengths]
    return x.reshape(*shape, *x.shape[4:])

  return jax.tree.map(join, arrays)


def _kernel(head: Head, hidden_BLD: jax.Array):
  """The head's kernel as every chunk reads it: cast, and gathered, once."""
  return sharding.whole(head.kernel_DV.astype(hidden_BLD.dtype),
                        ('embed', 'vocab'))


def _zeros(settings: _Settings, asked: Any, x: jax.Array):
  """What a gradient of x adds up in: a copy for each shard of the tokens."""
  if not asked:
    return None
  axes = ('vocab',) + (None,) * (x.ndim - 1)
  return sharding.constrain_if(
      jnp.zeros((settings.rows * settings.lengths, *x.shape), jnp.float32),
      'tokens', *axes)


def _whole(d: jax.Array | None, x: jax.Array, *axes: str):
  """The shards' gradients of x, added up and laid out as x is."""
  if d is None:
    return None
  if sharding.one_cpu():
    return d[0].astype(x.dtype)
  return sharding.total(d, axes[::-1]).T.astype(x.dtype)


# Of tokens further ahead, which model.mtp_depth predicts (DeepSeek-AI 2024b,
# arXiv 2412.19437, equations 24 and 25):
#
#   L_k = -1/T  sum over i of  log p_k(t_(i+k+1) | t_1 ... t_(i+k))
#   loss + lambda / D  sum over k = 1 ... D of  L_k
#
# T is the number of tokens that the loss itself is a mean over, and lambda is
# train.mtp_weight. Of packed documents a module predicts only tokens of the
# document that it reads.

MTP_LOSS = 'mtp_{}_loss'  # of the loss at a depth


def mtp_shifted(batch: Batch, depth: int
                ) -> tuple[jax.Array, jax.Array]:
  """Returns the targets of a depth, [B, L], and their weights."""
  targets_BL = jnp.roll(batch['targets'], -depth, 1)
  L = targets_BL.shape[1]
  there_BL = jnp.arange(L)[None] < L - depth
  if 'segment_ids' in batch:
    ids_BL = batch['segment_ids']
    there_BL &= ids_BL == jnp.roll(ids_BL, -depth, 1)
  weights_BL = jnp.roll(batch['weights'], -depth, 1)
  return targets_BL, jnp.where(there_BL, weights_BL, 0)


def mtp_sums(output: Any, batch: Batch, train: Config) -> Figures:
  """Returns the loss and the accuracy of each depth, of tokens, targets and
  weights [B, L]; {} of a model that looks no further than the next token."""
  figures = {}
  for depth, hidden_BLD in enumerate(output.extra.get('mtp', ()), 1):
    targets_BL, weights_BL = mtp_shifted(batch, depth)
    loss, sums = cross_entropy(
        hidden_BLD, output.head, targets_BL, weights_BL, z_loss=train.z_loss,
        label_smoothing=train.label_smoothing)
    figures[MTP_LOSS.format(depth)] = Mean(loss, sums['weight'])
    figures[f'mtp_{depth}_accuracy'] = Mean(sums['accuracy'], sums['weight'])
  return figures


def mtp_share(figures: Mapping[str, Any], config: Config):
  """Returns what these losses add to the sum of the tokens' losses.

  Args:
    figures: an objective's, by name.
    config: the run's.
  """
  depth = config.model.mtp_depth
  names = map(MTP_LOSS.format, range(1, depth + 1))
  losses = [figures[name].total for name in names if name in figures]
  return config.train.mtp_weight / depth * sum(losses) if losses else 0.0
