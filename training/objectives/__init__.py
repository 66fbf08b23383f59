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
import math
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from architectures.parts.config import ModelConfig
from architectures.parts.skeletons import Output
from configs import base, lazy
from configs.errors import RequestError, one_of, require, short
from training.data import conversations, records, sources
from training.data.tokenizers import Tokenizer, spelt
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


def targets(batch: Batch) -> jax.Array:
  """Returns how many tokens of a batch are to be predicted, by weight."""
  return batch['weights'].astype(jnp.float32).sum()


def given_token(output: Output, batch: Batch, config: Config) -> Figures:
  """Returns the cross-entropy of targets [B, L], where weights [B, L] count
  them: of the next tokens, or of the masked ones."""
  train = config.train
  loss_sum, sums = losses.cross_entropy(
      output.hidden, output.head, batch['targets'], batch['weights'],
      z_loss=train.z_loss, label_smoothing=train.label_smoothing,
      chunk=train.loss_chunk)
  weight = sums.pop('weight')
  return {name: Mean(total, weight)
          for name, total in (sums | {'loss': loss_sum}).items()} | {
              name: Mean(*both) for name, both in losses.mtp_sums(
                  output, batch, train).items()}


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
      too repeat on any number of hosts and workers. See `row`.
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
  view: type
  example: Callable[..., Row]
  arrays: Callable[[Config], dict[str, Shape]]
  inputs: tuple[str, ...] = ('tokens',)
  options: Mapping[str, str] = {
      'positions': 'positions_BL', 'types': 'type_ids_BL',
      'segment_ids': 'segment_ids_BL'}
  seen: tuple[str, ...] = ('segment_ids',)
  reads: tuple[str, ...] = ()
  fill: Callable[[Tokenizer], int] = lambda tokenizer: tokenizer.separator_id
  figures: Callable[..., Figures] = given_token
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
    batch = {}
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
    return module.apply({'params': params},
                        *[batch[key] for key in self.inputs], **kwargs)

  def ends(self, config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids with which a written text ends, the separator first."""
    talked = self.talk(config, tokenizer).ends if self.talk else frozenset()
    end = tokenizer.separator_id
    return (end, *sorted(talked - {end}))

  @property
  def holds(self) -> tuple[str, ...]:
    """What a source may hold for it (sources.Source.holds): the READS of its
    view, or any documents where that has none."""
    return (self.records,) if self.records else getattr(
        self.view, 'READS', sources.DOCUMENTS)

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
    return sum((batch[key] != 0).astype(jnp.float32).sum() for key in self.seen)

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
    return share + losses.mtp_share(figures, config), figures

  def means(self, figures: Mapping[str, Mean]) -> dict[str, Any]:
    """Returns the figures' values, `loss` among them."""
    values = {name: mean.total / mean.weight for name, mean in figures.items()}
    return values | {'loss': sum(values[name] for name in self.terms)}


# The fields that some objectives read and others do not; see Objective.reads.
OF_SOME = (
    *(f'data.{name}' for name in (
        'chat_template', 'class_weights', 'document_mask', 'labels',
        'length_buckets', 'mask_rate', 'pair_separators', 'stride',
        'target_length', 'whole_words')),
    *(f'probe.{name}' for name in ('examples', 'held_out', 'levels', 'vocab')),
    'span.mean_length', 'span.noise_density')


OBJECTIVES: Mapping[str, Objective] = lazy.Lazy(
    __name__, __path__, lambda file: file.OBJECTIVES,
    without=('losses', 'pipeline'))


def of(config: Config) -> Objective:
  """Returns the record of a run's objective; RequestError if there is none."""
  one_of('objective', config.objective, OBJECTIVES)
  return OBJECTIVES[config.objective]


def with_head(model: ModelConfig) -> str:
  """Returns the objective that trains a model's head of a task.

  Raises:
    RequestError: for a head with one label for each token.
  """
  classes = model.num_labels > 1
  found = [name for name, row in OBJECTIVES.items()
           if row.head == model.head and (row.labels is not None) == classes]
  require(bool(found), f'no objective trains model.head {model.head!r} with '
          f'model.num_labels {model.num_labels}: two labels or more are needed')
  return found[0]


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
  defaults = base.base()
  for name in {*OF_SOME, *objective.ignores} - {*objective.reads}:
    value, default = base.get(config, name), base.get(defaults, name)
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
