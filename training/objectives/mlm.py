"""Masked words: BERT's examples (Devlin et al. 2019, section 3.1 and appendix
A.1) and RoBERTa's (Liu et al. 2019, section 4).

  [CLS] first text [SEP] second text [SEP]     mlm_nsp, mlm_sop
  [CLS] text, over documents' ends [SEP]       mlm

With next sentences the second text is, half of the time, what follows the
first in its document; else it comes from another document. With the order of
sentences (ALBERT: Lan et al. 2020, arXiv 1909.11942, section 3.1) both texts
follow each other in a document, and half of the time they are swapped; the head
is that of next sentences. Without either a row
is full of text: documents one after the other, with a separator between them.
15 % of the tokens are prediction targets. Of these, 80 % are replaced by
[MASK], 10 % by a random token, and 10 % stay. Masks are drawn anew in each pass
over the text, as RoBERTa's are.

Masked diffusion over text (LLaDA: Nie et al. 2025, arXiv 2502.09992).

Of each row a share t is drawn, uniformly from (0, 1], and each of its tokens is
replaced by [MASK] with probability t, by itself. An encoder, which sees the
whole row, predicts the masked tokens. The loss of a row of L tokens is (their
equation 3, divided by the length as in their algorithm 1)

  1 / (t L)  sum over masked i  of  -log p(x_i | the masked row)

whose mean over t and masks is an upper bound of -log p(x) / L, in nats a token:
that of a model which writes the tokens in a random order (their appendix A.2).
A mean over rows is a draw of it. `eval.py --tasks=diffusion_bound` draws many,
and `--tasks=diffusion_samples` writes text (training/generate.py).

Here a row is a stretch of the text, without [CLS] and [SEP]; separators of
documents are tokens like others, which tell where a text ends. The rows that
LLaDA cuts to random lengths, one in a hundred, are not.

Block diffusion (BD3-LM: Arriola et al. 2025, arXiv 2503.09573) draws a share t
for each block of S tokens. A decoder predicts the masked tokens of a block from
that block and the clean tokens x of those before it (their equation 8, with
linear noise, whose weight is 1 / t):

  1 / L  sum over blocks b  1 / t_b  sum over masked i of b  of
      -log p(x_i | the masked block b, x of the blocks before it)

One pass over a row's masked tokens and, after them, its clean ones computes all
blocks (their section 3.2). With S = 1 the mean over t and masks is the loss of
a model that writes from left to right, and with S = L masked diffusion's.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import sharding, skeletons
from architectures.parts.skeletons import Output
from common.errors import RequestError, require
from training import objectives
from training.data import sources
from training.data.tokenizers import Tokenizer
from training.data.tokens import Documents
from training.objectives import Batch, Config, Figures, Mean, Objective, Row
from training.objectives import causal, Shape


# With model.self_conditioning, the share of the rows in which the model reads
# its own first prediction (Chen et al. 2023, arXiv 2208.04202, section 2.2).
SHARE_OF_ROWS_WITH_ESTIMATE = 0.5


class Passages(causal.Windows):
  """Windows of data.length - 2 tokens, which leave room for [CLS] and [SEP]."""

  AROUND = 2


def frame_text(window: causal.Window, config: Config, tokenizer: Tokenizer
               ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
  """Puts a window of text between [CLS] and [SEP], as a row of an encoder.

  Args:
    window: consecutive tokens of the text, after a separator.
    config: the config of the run.
    tokenizer: the tokenizer of the run.

  Returns:
    The ids of [CLS], the text and [SEP], int32 [L]; bool [L], which of them are
    special, and never masked; and the arrays that keep documents apart:
    segment_ids, and with data.document_mask also positions.
  """
  # The first token of a window is the separator before its text. [CLS] takes
  # its place. The tokens after the first window.size ones are padding.
  text = window.tokens[1:window.size]
  framed_ids = np.concatenate([[tokenizer.cls_id], text, [tokenizer.sep_id]])
  ids = framed_ids.astype(np.int32)

  # Separators between documents are special too. For BERT they are [SEP], as
  # the last token of the row is.
  begins_document = ids == tokenizer.separator_id
  is_special = begins_document.copy()
  is_special[[0, -1]] = True

  # Without data.document_mask the row is one segment.
  segments = dict(segment_ids=np.ones(len(ids)))
  if config.data.document_mask:
    begins_document[-1] = False  # the end of the row begins no document
    segments = objectives.number_documents(begins_document)
  return ids, is_special, segments


class Stretch(NamedTuple):
  """Consecutive tokens of one document, and a way to draw tokens of another
  one.

  Attributes:
    tokens: [T], at most data.length - 3.
    elsewhere: (rng, size) -> up to `size` tokens of another document.
  """

  tokens: np.ndarray
  elsewhere: Callable[[np.random.Generator, int], np.ndarray]


class Stretches:
  """Documents cut into stretches of data.length - 3 tokens, for pairs of texts.

  The three other places of a row are for [CLS] and two [SEP]. A stretch of
  fewer than MIN tokens, too short to learn from, is left out."""

  MIN = 8
  READS = (sources.TEXT,)

  def __init__(self, corpus: sources.Corpus):
    """Cuts the documents of a text into stretches, consecutive pieces of which
    each is to be split into a pair of texts for a row. Documents of fewer than
    MIN tokens are left out.

    Args:
      corpus: the text, either of the training data or of the held-out data.

    Raises:
      RequestError: where rows are too short for a pair, or fewer than two
        documents are long enough.
    """
    corpus.check_plain()
    # The text of a row shares it with [CLS] and two [SEP].
    self.room = corpus.config.data.length - 3
    require(self.room >= self.MIN, f'data.length={corpus.config.data.length}: '
            f'pairs of texts need at least {self.MIN + 3}.')

    # Keep the long documents: the first token and the number of tokens of each.
    # `parts` has the index of the token at which each part of the text begins;
    # here every document is one part.
    self._documents = documents = Documents(corpus.tokens)
    first_tokens = documents.parts[documents.first]
    sizes = documents.parts[documents.end] - first_tokens
    is_long = sizes >= self.MIN
    self._first_tokens = first_tokens[is_long]
    self._sizes = sizes[is_long]
    num_documents = len(self._first_tokens)
    require(num_documents > 1, f'data source {corpus.name!r} has '
            f'{num_documents} document(s) of {self.MIN} tokens or more in '
            f'the split {corpus.split!r}: pairs need two, to take a second '
            'text from another document.')

    # Count the stretches of each document, and number them through. A stretch
    # has `room` tokens. The last one of a document may have fewer, but MIN at
    # least, so that it can still be split in two.
    counts = (self._sizes + self.room - self.MIN) // self.room
    self._starts = np.concatenate([[0], np.cumsum(counts)])
    self.num_tokens = int(self._sizes.sum())
    self.num_bytes = corpus.tokens.num_bytes

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, i: int) -> Stretch:
    """Reads stretch i: up to `room` consecutive tokens of one document."""
    document = int(np.searchsorted(self._starts, i, side='right')) - 1
    stretch_of_document = int(i) - int(self._starts[document])
    start = stretch_of_document * self.room
    end = min(start + self.room, int(self._sizes[document]))
    first_token = int(self._first_tokens[document])
    return Stretch(
        tokens=self._documents.read(first_token + start, first_token + end),
        elsewhere=functools.partial(self.draw_from_other_document, document))

  def draw_from_other_document(self, document: int, rng: np.random.Generator,
                               size: int) -> np.ndarray:
    """Draws some consecutive tokens of a random document, but never of a given
    one.

    Args:
      document: the number of the document that must not be drawn from.
      rng: the random generator.
      size: how many tokens to draw.

    Returns:
      int [T], the tokens, from a random place of the document. T is `size`, or
      fewer where the document has fewer.
    """
    # Draw among the other documents. Numbers from `document` on are moved up by
    # one: so it is skipped, and all others are equally likely.
    other = int(rng.integers(len(self._first_tokens) - 1))
    if other >= document:
      other += 1
    size_of_other = int(self._sizes[other])
    size = min(size, size_of_other)
    place = int(rng.integers(size_of_other - size + 1))
    start = int(self._first_tokens[other]) + place
    return self._documents.read(start, start + size)


def _mask_pair(first: np.ndarray, second: np.ndarray, target: bool,
               rng: np.random.Generator, config: Config, tokenizer: Tokenizer
               ) -> Row:
  """Lays out a pair of texts as one row, [CLS] first [SEP] second [SEP], in
  which some tokens are masked.

  Args:
    first, second: the token ids of the two texts.
    target: the label of the pair, such as whether the second text follows the
      first.
    rng: the random generator that draws which tokens are masked, and how.
    config: the config of the run.
    tokenizer: the tokenizer of the run.

  Returns:
    The arrays of the row of L tokens: tokens [L], some masked; targets [L], the
    tokens without masks; weights [L], 1 where a token is to be predicted; types
    [L], 1 for tokens of the second text; segment_ids [L], all 1, as nothing is
    padding; and nsp_targets [], the label.
  """
  cls = tokenizer.cls_id
  sep = tokenizer.sep_id
  ids = np.concatenate([[cls], first, [sep], second, [sep]]).astype(np.int32)
  place_of_sep = len(first) + 1
  # [CLS] and both [SEP] are never masked.
  is_special = np.zeros(len(ids), bool)
  is_special[[0, place_of_sep, -1]] = True
  row = _mask_row(ids, special=is_special, rng=rng, config=config,
                  tokenizer=tokenizer)

  # The second text begins after the first [SEP].
  row['types'] = np.arange(len(ids)) > place_of_sep
  row['segment_ids'] = np.ones(len(ids))
  row['nsp_targets'] = target
  return row


def _mask_row(ids: np.ndarray, special: np.ndarray, rng: np.random.Generator,
              config: Config, tokenizer: Tokenizer) -> Row:
  """Masks some tokens of a row of text, at the rate that the config gives.

  Args:
    ids: int32 [L], the tokens of the row.
    special: bool [L], which of them are never masked, such as [CLS].
    rng: the random generator that draws which tokens are masked, and how.
    config: the config of the run.
    tokenizer: the tokenizer of the run.

  Returns:
    The arrays of the row, [L]: tokens, some of them masked; targets, the tokens
    without masks; and weights, 1 where a token is to be predicted.
  """
  masked, chosen = mask_tokens(ids, special=special, rng=rng,
                               tokenizer=tokenizer, rate=config.data.mask_rate,
                               whole_words=config.data.whole_words,
                               size=config.model.vocab_size)
  return dict(tokens=masked, targets=ids, weights=chosen)


def most_targets(rate: float, length: int) -> int:
  """Returns how many of `length` tokens are chosen to be predicted, at most.
  Where words are masked whole, the last word may exceed it."""
  return max(1, round(rate * length))


def mask_tokens(ids: np.ndarray, special: np.ndarray, rng: np.random.Generator,
                tokenizer: Tokenizer, *, rate: float, whole_words: bool,
                size: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Chooses tokens to predict, and masks most of them (Devlin et al. 2019,
  section 3.1): 80 % become [MASK], 10 % a random token, and 10 % stay.

  Args:
    ids: int32 [L], the tokens of a row.
    special: bool [L], which tokens are never masked.
    rng: the random generator that draws what is masked, and how.
    tokenizer: has the mask token and the vocabulary.
    rate: the share of tokens that are chosen, at least one of them.
    whole_words: whether all tokens of a word are chosen, or none.
    size: how many ids the model has; 0: as many as the tokenizer.

  Returns:
    int32 [L], the ids with some of them masked; and bool [L], which of them are
    to be predicted.
  """
  # Number the units that are chosen as a whole, which are words or tokens:
  # unit_L says which one each token is of, from 1 on.
  starts_L = np.ones(len(ids), bool)
  if whole_words:
    starts_L = _find_word_starts(ids, tokenizer)
  unit_L = np.cumsum(starts_L)

  # Choose units in a random order until they have tokens enough: a unit is
  # chosen if those before it have too few. Special tokens do not count in the
  # size of a unit, and are left out at the end.
  places = np.flatnonzero(~special)
  num_targets = most_targets(rate, len(places))
  order = rng.permutation(np.unique(unit_L[places]))
  tokens_of_unit = np.bincount(unit_L[places], minlength=unit_L[-1] + 1)
  sizes = tokens_of_unit[order]
  chosen_before = np.cumsum(sizes) - sizes
  chosen_units = order[chosen_before < num_targets]
  chosen_L = np.isin(unit_L, chosen_units) & ~special

  # Mask 80 % of the chosen tokens, replace 10 % by a random one, and keep 10 %.
  # A random token must be one that the model has.
  draw_L = rng.random(len(ids))
  masked_L = np.where(chosen_L & (draw_L < 0.8), tokenizer.mask_id, ids)
  num_ids = min(tokenizer.vocab_size, size or tokenizer.vocab_size)
  random_ids_L = rng.integers(0, num_ids, len(ids))
  is_replaced_L = chosen_L & (draw_L >= 0.8) & (draw_L < 0.9)
  masked_L = np.where(is_replaced_L, random_ids_L, masked_L)
  return masked_L.astype(np.int32), chosen_L


def _find_word_starts(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  """Returns bool [L]: whether a word begins at each of the tokens `ids` [L]."""
  begins_word_V, ends_word_V = _find_tokens_at_word_ends(tokenizer)
  follows_word_L = np.concatenate([[True], ends_word_V[ids[:-1]]])
  return begins_word_V[ids] | follows_word_L


@functools.lru_cache(maxsize=4)
def _find_tokens_at_word_ends(tokenizer: Tokenizer
                              ) -> tuple[np.ndarray, np.ndarray]:
  """Tells which tokens of a vocabulary begin a word, and which end one.

  Args:
    tokenizer: the tokenizer, whose vocabulary has V ids.

  Returns:
    bool [V], whether a word begins with the token; and bool [V], whether one
    ends with it.

  Raises:
    RequestError: for a tokenizer that does not show where words begin.
  """
  # Decode each token. A special token separates words, as a space does.
  special_ids = set(tokenizer.special_ids.values())
  texts = []
  for token in range(tokenizer.vocab_size):
    text = b' '
    if token not in special_ids:
      text = tokenizer.decode_bytes([token])
    texts.append(text)

  # WordPiece marks with ## what goes on with a word. There a word ends where
  # the next one begins.
  if any(text.startswith(b'##') and len(text) > 2 for text in texts):
    begins_word_V = np.array([not text.startswith(b'##') for text in texts])
    return begins_word_V, np.zeros(len(texts), bool)

  # Other tokens show a word's ends by spaces, before a word (byte-level BPE) or
  # after it. Special tokens were given spaces above, so they prove nothing.
  begins_word_V = np.array([text[:1].isspace() for text in texts])
  ends_word_V = np.array([text[-1:].isspace() for text in texts])
  is_usual_V = [i not in special_ids for i in range(len(texts))]
  shows_words = (begins_word_V | ends_word_V)[is_usual_V].any()
  require(bool(shows_words), f'data.whole_words: tokenizer '
          f'{tokenizer.name!r} does not show where a word begins. Set it to '
          'False, or take WordPiece, bytes or a byte-level BPE.')
  return begins_word_V, ends_word_V


def count_rows(batch: Batch) -> jax.Array:
  """Returns how many rows of a batch are not padding."""
  return _is_real_row_B(batch).sum()


def _is_real_row_B(batch: Batch) -> jax.Array:
  """Returns float32 [B]: 1 for a row with a token, and 0 for padding."""
  return (batch['segment_ids'] != 0).any(1).astype(jnp.float32)


def count_unread_places(config: Config, length: int) -> int:
  """Returns how many places of a row the head does not read in training, as
  `masked_word_figures` leaves them out."""
  if config.data.whole_words or config.mesh.context > 1:
    return 0
  return max(length - most_targets(config.data.mask_rate, length), 0)


def masked_word_figures(output: Output, batch: Batch,
                        config: Config) -> Figures:
  """Computes the loss and the accuracy of masked words, as
  objectives.token_loss_figures does, for less than all places of a row.

  The head reads only the places that are to be predicted, of which
  `mask_tokens` chooses at most M = most_targets in a row. If a batch has more,
  the loss is nan. The head reads every place where words are masked whole,
  which may exceed M, and where a row is split over devices.

  Args:
    output: the output of the model, with hidden states [B, L, D].
    batch: targets and weights [B, L], where a weight is 0 unless the token is
      to be predicted.
    config: the config of the run.

  Returns:
    {name: Mean}, each figure as a sum and its weight.
  """
  # Read all places where M of them would not be enough, or save nothing.
  weights_BL = batch['weights']
  L = weights_BL.shape[1]
  M = most_targets(config.data.mask_rate, L)
  has_shards = sharding.count_shards('length', L) > 1
  if config.data.whole_words or has_shards or M >= L:
    return objectives.token_loss_figures(output, batch=batch, config=config)

  # Find the places of the first M tokens that are chosen. A token that is not
  # chosen has the place L, so that sorting puts it last. Shapes must not depend
  # on the batch in JAX, hence M places for every row.
  chosen_BL = weights_BL != 0
  places_BL = jnp.sort(jnp.where(chosen_BL, jnp.arange(L), L), axis=1)
  places_BM = places_BL[:, :M]
  exists_BM = places_BM < L

  def at_places(x_BL: jax.Array) -> jax.Array:
    """Returns what an array [B, L, ...] has at the places, [B, M, ...]."""
    # The index needs as many axes as the array. The place L, past the end, is
    # clipped to the last one; its weight is 0.
    index = places_BM.reshape(*places_BM.shape, *(1,) * (x_BL.ndim - 2))
    return jnp.take_along_axis(x_BL, index, axis=1, mode='clip')

  # A row with more than M chosen tokens would be scored in part, unseen. Make
  # its loss nan: nothing can be raised inside a compiled function.
  weights_BM = jnp.where(exists_BM, at_places(weights_BL), 0)
  has_too_many = chosen_BL.sum() > exists_BM.sum()
  weights_BM = jnp.where(has_too_many, jnp.nan, weights_BM)
  chosen = dict(targets=at_places(batch['targets']), weights=weights_BM)
  return objectives.token_loss_figures(
      output.replace(hidden=at_places(output.hidden)), batch=chosen,
      config=config)


def masked_word_and_sentence_figures(output: Output, batch: Batch,
                                     config: Config) -> Figures:
  """Computes the two losses of BERT's pre-training (Devlin et al. 2019, section
  3.1): that of the masked words, a mean over these words; and that of
  predicting whether the second text follows the first, a mean over rows.

  Args:
    output: the output of the model, with the scores nsp_logits [B, 2] of "it
      follows" and "it does not" for each of B rows in output.extra.
    batch: targets and weights [B, L], and nsp_targets [B], the right one of the
      two.
    config: the config of the run.

  Returns:
    {name: Mean} of mlm_loss, mlm_accuracy, nsp_loss and nsp_accuracy, and the
    other figures of the masked words, each a sum and the weight to divide it
    by.
  """
  # Score the masked words. What is minimised is the sum of both losses, so the
  # loss of the words alone must not be named `loss`.
  figures = {}
  for name, mean in masked_word_figures(output, batch=batch,
                                        config=config).items():
    if name in ('loss', 'accuracy'):
      name = f'mlm_{name}'
    figures[name] = mean

  # Score whether the second text follows, once a row. Rows of padding at the
  # end of a pass do not count.
  real_B = _is_real_row_B(batch)
  logits_B2 = output.extra['nsp_logits']
  log_p_B2 = jax.nn.log_softmax(logits_B2, -1)
  targets_B1 = batch['nsp_targets'][:, None]
  loss_B = -jnp.take_along_axis(log_p_B2, targets_B1, axis=1)[:, 0]
  right_B = jnp.argmax(logits_B2, -1) == batch['nsp_targets']
  figures['nsp_loss'] = Mean((real_B * loss_B).sum(), real_B.sum())
  figures['nsp_accuracy'] = Mean((real_B * right_B).sum(), real_B.sum())
  return figures


def count_tokens(batch: Batch) -> jax.Array:
  """Returns how many tokens of a batch are text, masked or not."""
  return (batch['segment_ids'] != 0).astype(jnp.float32).sum()


class MaskedWords(Objective):
  """Masked words of a row that is full of text (RoBERTa)."""
  stacks = ('encoder',)
  view = Passages
  reads = ('data.mask_rate', 'data.whole_words', 'data.document_mask')

  def example(self, item: causal.Window, rng: np.random.Generator,
              config: Config, tokenizer: Tokenizer) -> Row:
    """Returns one masked row of text.

    Args:
      item: a window of text: `tokens`, [L + 1], of which the first `size` are
        no padding.
      rng: the random generator that draws the masked tokens.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      The arrays of the row, [L]: tokens; targets; weights, 1 where a token is
      to be predicted; and segment_ids. With data.document_mask a document is a
      segment, from its separator on, and its positions begin with 0.
    """
    ids, is_special, segments = frame_text(item, config, tokenizer=tokenizer)
    row = _mask_row(ids, special=is_special, rng=rng, config=config,
                    tokenizer=tokenizer)
    return row | segments

  def arrays(self, config: Config) -> dict[str, Shape]:
    return objectives.arrays_of_documents(config)

  def figures(self, output: Output, batch: Batch, config: Config) -> Figures:
    return masked_word_figures(output, batch=batch, config=config)

  def num_unread_places(self, config: Config, length: int) -> int:
    return count_unread_places(config, length)


class NextSentence(Objective):
  """Masked words, and whether the second of two texts follows the first (BERT).
  """
  stacks = ('encoder',)
  view = Stretches
  reads = ('data.mask_rate', 'data.whole_words')
  terms = ('mlm_loss', 'nsp_loss')
  loss_unit = 'nats'  # the sum of two losses

  def example(self, item: Stretch, rng: np.random.Generator, config: Config,
              tokenizer: Tokenizer) -> Row:
    """Returns one masked pair of texts, of which the second is replaced half of
    the time by tokens of another document.

    Args:
      item: `tokens` [T] of one document, and `elsewhere`, a function that draws
        tokens of another document.
      rng: the random generator that draws the cut, the second text and the
        masks.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      The arrays of the row: tokens, types, segment_ids and targets [L]; weights
      [L], 1 where a token is to be predicted; and nsp_targets [], 1 where the
      second text is from elsewhere.
    """
    # Cut the text in two at a random place, and half of the time replace its
    # second part by as many tokens from elsewhere.
    place = int(rng.integers(1, len(item.tokens)))
    first, second = np.split(item.tokens, [place])
    from_elsewhere = rng.random() >= 0.5
    if from_elsewhere:
      second = item.elsewhere(rng, len(second))
    return _mask_pair(first, second=second, target=from_elsewhere, rng=rng,
                      config=config, tokenizer=tokenizer)

  def arrays(self, config: Config) -> dict[str, Shape]:
    row = objectives.arrays_of_text(config, 'types', 'segment_ids')
    return row | dict(nsp_targets=((), np.int32))

  def check(self, config: Config) -> None:
    """Raises RequestError for a model without the head that is trained."""
    model = config.model
    system = architectures.systems().get(model.arch)
    is_encoder = getattr(system, 'STACK', '') == 'encoder'
    if is_encoder and not model.next_sentence:
      raise RequestError(
          f'model.next_sentence is {model.next_sentence}, and objective '
          f'{config.objective!r} trains the head that it stands for: set it to '
          "True, or choose objective 'mlm'")

  def figures(self, output: Output, batch: Batch, config: Config) -> Figures:
    return masked_word_and_sentence_figures(output, batch=batch, config=config)

  def weights(self, batch: Batch) -> dict[str, jax.Array]:
    return {'mlm_loss': objectives.count_targets(batch),
            'nsp_loss': count_rows(batch)}

  def num_unread_places(self, config: Config, length: int) -> int:
    return count_unread_places(config, length)

  def loss_of_guessing(self, config: Config, vocab: int) -> float:
    return math.log(vocab) + math.log(2)


class SentenceOrder(NextSentence):
  """Masked words, and in which order two texts stand (ALBERT)."""

  def example(self, item: Stretch, rng: np.random.Generator, config: Config,
              tokenizer: Tokenizer) -> Row:
    """Cuts a text in two, swaps the parts half of the time, and masks some
    tokens (sentence order prediction, ALBERT: Lan et al. 2020, section 3.1).

    Args:
      item: `tokens` [T] of one document, and `elsewhere`, a function that draws
        tokens of another document.
      rng: the random generator that draws the cut, the order and the masks.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      The arrays of the row, as NextSentence has them; nsp_targets is 1 where
      the order is swapped.
    """
    # Split the text at a random place, and swap the parts half of the time.
    # Both are of one text, so only their order can give the answer away.
    place = int(rng.integers(1, len(item.tokens)))
    first, second = np.split(item.tokens, [place])
    is_swapped = rng.random() < 0.5
    if is_swapped:
      first, second = second, first
    return _mask_pair(first, second=second, target=is_swapped, rng=rng,
                      config=config, tokenizer=tokenizer)


class MaskedDiffusion(Objective):
  """Masked diffusion over text (LLaDA)."""
  stacks = ('encoder',)
  view = causal.Windows
  reads = ('data.document_mask',)
  bound = True

  def example(self, item: causal.Window, rng: np.random.Generator,
              config: Config, tokenizer: Tokenizer) -> Row:
    """Masks a random share of the tokens of a row (masked diffusion).

    Args:
      item: a window of text: `tokens`, [L + 1], of which the first `size` are
        no padding.
      rng: the random generator that draws the share and the masks.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      The arrays of the row, [L]: tokens; targets; weights, 1 / t where a token
      is masked, with the share t; and segment_ids. With data.document_mask a
      document is a segment, from its separator on, and its positions begin with
      0.
    """
    # Draw the share t of the row, and mask each token with this probability.
    # Separators are masked too. As the weights are divided by t, it must not be
    # 0: rng.random() may be 0, but never 1.
    ids = item.tokens[1:item.size]
    t = 1 - rng.random()
    is_masked = rng.random(len(ids)) < t
    shown = np.where(is_masked, tokenizer.mask_id, ids)
    row = dict(tokens=shown, targets=ids, weights=is_masked / t)

    # Without data.document_mask the row is one segment.
    segments = dict(segment_ids=np.ones(len(ids)))
    if config.data.document_mask:
      segments = objectives.number_documents(ids == tokenizer.separator_id)
    return row | segments

  def arrays(self, config: Config) -> dict[str, Shape]:
    return objectives.arrays_of_documents(config)

  def figures(self, output: Output, batch: Batch, config: Config) -> Figures:
    """Returns the bound of the text's loss: the weighted losses of the masked
    tokens over the number of all tokens (Nie et al. 2025, equation 3). The
    accuracy is a mean over the masked ones, by weight.

    The arguments are those of Objective.figures."""
    figures = objectives.token_loss_figures(output, batch=batch, config=config)
    for name in figures.keys() - {'accuracy'}:
      figures[name] = Mean(figures[name].total, count_tokens(batch))
    return figures

  def weights(self, batch: Batch) -> dict[str, jax.Array]:
    return {'loss': count_tokens(batch)}


class BlockDiffusion(MaskedDiffusion):
  """Masked diffusion of one block of tokens after another, from left to right
  (BD3-LM: Arriola et al. 2025, arXiv 2503.09573)."""
  stacks = ('decoder',)
  options = {'segment_ids': 'segment_ids_BL', 'targets': 'clean_BL'}
  reads = ('model.diffusion_block', 'model.self_conditioning')

  def example(self, item: causal.Window, rng: np.random.Generator,
              config: Config, tokenizer: Tokenizer) -> Row:
    """Masks a random share of the tokens of each block of a row.

    Args:
      item: a window of text: `tokens`, [L + 1], of which the first `size` are
        no padding.
      rng: the random generator that draws the shares and the masks.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      The arrays of the row, [L]: tokens; targets, the tokens without masks;
      weights, 1 / t where a token is masked, with the share t of its block; and
      segment_ids, 1. With model.self_conditioning also has_estimate, a number
      for the row: 1 for half of the rows, in which the model reads its own
      first prediction (see `apply`), and 0 for the others.
    """
    # Draw the share t of each block, and give it to the block's tokens. The
    # last block may be shorter. As the weights are divided by t, it must not be
    # 0: rng.random() may be 0, but never 1.
    ids = item.tokens[1:item.size]
    size = config.model.diffusion_block
    num_blocks = math.ceil(len(ids) / size)
    t_of_block = 1 - rng.random(num_blocks)
    t_L = np.repeat(t_of_block, size)[:len(ids)]
    is_masked = rng.random(len(ids)) < t_L
    shown = np.where(is_masked, tokenizer.mask_id, ids)
    row = dict(tokens=shown, targets=ids, weights=is_masked / t_L,
               segment_ids=np.ones(len(ids)))
    if config.model.self_conditioning:
      has_estimate = rng.random() < SHARE_OF_ROWS_WITH_ESTIMATE
      row['has_estimate'] = float(has_estimate)
    return row

  def arrays(self, config: Config) -> dict[str, Shape]:
    row = objectives.arrays_of_text(config, 'segment_ids')
    if config.model.self_conditioning:
      row['has_estimate'] = (), np.float32
    return row

  def check(self, config: Config) -> None:
    """Raises RequestError for a model without blocks."""
    require(config.model.diffusion_block > 0, 'model.diffusion_block is 0, and '
            f'objective {config.objective!r} denoises blocks of so many '
            'tokens: set it to 1 or more')

  def apply(self, module: Any, params: Any, batch: Batch, **kwargs) -> Output:
    """Runs the model on the noised tokens, of which each sees its block and the
    clean tokens of earlier blocks.

    With self-conditioning the model also reads an estimate of the tokens, e,
    and runs twice, with the same parameters (Chen et al. 2023, arXiv
    2208.04202, section 2.2):

      logits_1 = model(tokens, e = 0)
      e        = softmax(logits_1) E      (a constant, without a gradient)
      logits   = model(tokens, has_estimate e)

    with the embeddings E. has_estimate is 1 for half of the rows, so that the
    model also learns the first run, which has no estimate to read.

    The suffixes name axes: B batch, L length, D d_model.

    Args:
      module: the model.
      params: its parameters.
      batch: the arrays of the batch; `has_estimate` is [B].
      **kwargs: further arguments of the model, as in Objective.apply.

    Returns:
      The output of the only run, or of the second one.
    """
    config = module.config
    if not config.self_conditioning:
      return super().apply(module, params, batch, **kwargs)

    # The first run, which knows nothing of the tokens.
    B, L = batch['tokens'].shape
    unknown_BLD = jnp.zeros((B, L, config.d_model), config.compute_dtype)
    first_output = super().apply(
        module, params, batch, estimate_BLD=unknown_BLD, **kwargs)

    # The second run, which reads what the first one predicted.
    predicted_BLD = skeletons.embed_predictions(config, params, first_output)
    has_estimate_B = batch['has_estimate'].astype(predicted_BLD.dtype)
    estimate_BLD = predicted_BLD * has_estimate_B[:, None, None]
    return super().apply(
        module, params, batch, estimate_BLD=estimate_BLD, **kwargs)


OBJECTIVES = {
    'mlm': MaskedWords(),
    'mlm_nsp': NextSentence(),
    'mlm_sop': SentenceOrder(),
    'masked_diffusion': MaskedDiffusion(),
    'block_diffusion': BlockDiffusion(),
}
