"""The log-probabilities that a decoder gives to tokens of texts: what lm_eval,
and perplexity with a stride, are made of.

Texts of about one length go through the model together. Continuations of one
text have one row, which holds it once. Only the places that are asked about go
through the head. There are a few lengths of rows, and for each one number of
rows and of places, so that what is compiled stays bounded whatever the texts
are.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from architectures.parts.moe.layer import without_capacity
from training import objectives, progress
from training.distributed import devices
from training.evals import Evaluation
from training.objectives import losses

SHORTEST_ROW = 8  # tokens; shorter texts are padded to them
TOKENS_OF_BATCH = 2 ** 12  # padding included


class Continuation(NamedTuple):
  """A text, the last tokens of which are scored given all tokens before each.

  Attributes:
    tokens: int32 [T], all but the last of which the model is shown.
    num_scored: how many of the last tokens are scored, from 1 to T - 1.
  """
  tokens: np.ndarray
  num_scored: int


class TokenScores(NamedTuple):
  """The scores of a continuation, one for each token that is scored.

  Attributes:
    log_probs: [num_scored], the log-probability of the token in nats, given all
      tokens before it.
    is_greedy: bool [num_scored], whether it is the likeliest token there.
  """
  log_probs: np.ndarray
  is_greedy: np.ndarray


class BatchShape(NamedTuple):
  """The shape that a program is compiled for.

  Attributes:
    rows: the number of rows of a batch.
    length: the tokens of a row.
    places: the number of tokens that are scored in all rows.
  """
  rows: int
  length: int
  places: int


# The indices of the continuations that share the tokens that the model is
# shown, and so have one row of a batch.
RowOfIndices = list[int]


def why_not_scorable(config: ml_collections.ConfigDict) -> str:
  """Returns why a run's model gives texts no probability; '': it does."""
  objective = objectives.find_objective(config)
  if objective.stacks == ('decoder',) and objective.writes:
    return ''
  return (f'objective {config.objective!r} does not train a decoder-only '
          'model that writes text, so a text has no probability')


def score_continuations(continuations: Sequence[Continuation],
                        evaluation: Evaluation, task_name: str
                        ) -> list[TokenScores]:
  """Computes the log-probability of each token of some continuations of texts.

  Args:
    continuations: texts of at most max_len + 1 tokens each. The last tokens of
      each are scored.
    evaluation: the evaluation of a decoder, with its parameters.
    task_name: the words for the progress bar.

  Returns:
    The scores of the tokens of each continuation, in the same order.
  """
  is_prefix_lm = objectives.find_objective(evaluation.run.config).prefix
  score = functools.partial(
      _score_targets, module=_module_for_scoring(evaluation),
      is_prefix_lm=is_prefix_lm)
  step = evaluation.jit_once(score, 'scoring')

  # Continuations that differ only in how many tokens are scored share a row.
  # Not so in a prefix LM, which reads the tokens before the scored ones (the
  # prefix) in both directions: these tokens are not the same ones then.
  longest = max(SHORTEST_ROW, evaluation.run.model.max_len)
  batches = list(group_into_batches(
      continuations, longest=longest, shards=evaluation.run.mesh.size,
      one_per_row=is_prefix_lm))
  scores_by_index: dict[int, TokenScores] = {}
  for shape, rows in progress.show_items(batches, task_name):
    batch = devices.put_on_devices(
        _make_batch(shape, rows=rows, continuations=continuations),
        evaluation.run.batch_sharding)
    losses_P, is_greedy_P = jax.device_get(step(evaluation.params, batch))

    # Divide the P scores of the batch among the continuations, which
    # _make_batch has written one after another. Padding follows them.
    start = 0
    for i in itertools.chain.from_iterable(rows):
      stop = start + continuations[i].num_scored
      scores_by_index[i] = TokenScores(
          log_probs=-losses_P[start:stop].astype(np.float64),
          is_greedy=is_greedy_P[start:stop])
      start = stop
  return [scores_by_index[i] for i in range(len(continuations))]


def group_into_batches(continuations: Sequence[Continuation], longest: int,
                       shards: int, one_per_row: bool = False
                       ) -> Iterator[tuple[BatchShape, list[RowOfIndices]]]:
  """Groups continuations of texts into batches of few shapes, each of which
  has to be compiled.

  Args:
    continuations: the continuations, in any order.
    longest: the longest row that the model takes.
    shards: what the numbers of rows and of places are multiples of.
    one_per_row: whether each continuation has a row to itself.

  Yields:
    The shape of each batch, and its rows: for each the indices of its
    continuations. The longest rows come first, so that what is too large for a
    device fails at once.
  """
  # Collect the rows by the length that they are padded to. The last token of a
  # continuation is predicted and not shown, so it does not count.
  rows_by_length: dict[int, list[RowOfIndices]] = {}
  for row in _share_rows(continuations, one_per_row):
    length = len(continuations[row[0]].tokens) - 1
    rows_by_length.setdefault(padded_length(length, longest), []).append(row)

  def count_places(row: RowOfIndices) -> int:
    """Returns how many tokens are scored in a row."""
    return sum(continuations[i].num_scored for i in row)

  # Deal the rows of a length out to batches, those with the most places first,
  # so that the batches have about as many places as each other. All batches of
  # a length have one shape, that of the largest.
  multiple_of_places = int(np.lcm(SHORTEST_ROW, shards))
  for length, rows in sorted(rows_by_length.items(), reverse=True):
    rows.sort(key=count_places, reverse=True)
    most_rows = max(TOKENS_OF_BATCH // length, 1)
    num_batches = -(-len(rows) // most_rows)
    batches = [rows[i::num_batches] for i in range(num_batches)]
    most_places = 0
    for batch in batches:
      most_places = max(most_places, sum(map(count_places, batch)))
    shape = BatchShape(rows=_round_up(len(batches[0]), shards), length=length,
                       places=_round_up(most_places, multiple_of_places))
    for batch in batches:
      yield shape, batch


def _share_rows(continuations: Sequence[Continuation], one_per_row: bool
                ) -> list[RowOfIndices]:
  """Gives continuations that show the model the same tokens one row.

  Args:
    continuations: the continuations, in any order.
    one_per_row: whether each continuation has a row to itself nevertheless.

  Returns:
    The indices of the continuations of each row.
  """
  if one_per_row:
    return [[i] for i in range(len(continuations))]
  row_of_tokens: dict[bytes, RowOfIndices] = {}
  for i, continuation in enumerate(continuations):
    shown_tokens = continuation.tokens[:-1].tobytes()
    row_of_tokens.setdefault(shown_tokens, []).append(i)
  return list(row_of_tokens.values())


def _round_up(number: int, multiple: int) -> int:
  """Returns the least multiple of `multiple` that is as large as a number."""
  return -(-number // multiple) * multiple


def padded_length(length: int, longest: int) -> int:
  """Returns the length that a row is padded to: the least of 8, 12, 16, 24, 32,
  48, ... that is as long, and `longest` at most."""
  power_of_two = max(SHORTEST_ROW, 1 << (length - 1).bit_length())
  three_quarters = power_of_two * 3 // 4
  if max(length, SHORTEST_ROW) <= three_quarters:
    return min(three_quarters, longest)
  return min(power_of_two, longest)


def pad_into_batches(rows: Mapping[int, np.ndarray], longest: int
                     ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
  """Pads rows of tokens, and groups them into batches of a few different
  shapes. The longest rows come first.

  Args:
    rows: {number: the tokens of the row, int [L]}.
    longest: the length of the longest row that the model takes.

  Yields:
    The numbers of the rows of a batch; their tokens, int32 [B, L], padded with
    0; and their lengths, int32 [B]. Rows that only fill the batch up have
    length 1.
  """
  # Collect the rows by the length that they are padded to.
  numbers_by_length: dict[int, list[int]] = {}
  for number, tokens_L in rows.items():
    length = padded_length(len(tokens_L), longest)
    numbers_by_length.setdefault(length, []).append(number)

  for length, numbers in sorted(numbers_by_length.items(), reverse=True):
    # A batch has about TOKENS_OF_BATCH tokens. If there are fewer rows than
    # that, their number is rounded up to a power of two, so that few shapes are
    # compiled.
    most_rows = max(TOKENS_OF_BATCH // length, 1)
    batch_size = min(most_rows, 1 << (len(numbers) - 1).bit_length())
    for start in range(0, len(numbers), batch_size):
      numbers_of_batch = numbers[start:start + batch_size]
      tokens_BL = np.zeros((batch_size, length), np.int32)
      lengths_B = np.ones(batch_size, np.int32)
      for b, number in enumerate(numbers_of_batch):
        tokens_BL[b, :len(rows[number])] = rows[number]
        lengths_B[b] = len(rows[number])
      yield numbers_of_batch, tokens_BL, lengths_B


def _make_batch(shape: BatchShape, rows: list[RowOfIndices],
                continuations: Sequence[Continuation]
                ) -> dict[str, np.ndarray]:
  """Lays out continuations of texts as the arrays of a batch.

  Args:
    shape: the number of rows B, their length L, and the number of scored tokens
      P.
    rows: the indices of the continuations that share each row.
    continuations: the continuations of all rows.

  Returns:
    tokens [B, L]; lengths [B]; known [B], how many tokens of a row come before
    the first one that is scored; places [P], from where each scored token is
    predicted, as an index into the B * L tokens of the batch; targets [P], the
    scored tokens.
  """
  # Begin with arrays of padding. A scored token that is padding has place 0 and
  # target 0, and its score is never read.
  batch = dict(tokens=np.zeros((shape.rows, shape.length), np.int32),
               lengths=np.zeros(shape.rows, np.int32),
               known=np.ones(shape.rows, np.int32),
               places=np.zeros(shape.places, np.int32),
               targets=np.zeros(shape.places, np.int32))
  start = 0
  for n, row in enumerate(rows):
    # Write the text of the row, which all its continuations share, without the
    # last token, which is only predicted.
    first_of_row = continuations[row[0]]
    text = first_of_row.tokens[:-1]
    batch['tokens'][n, :len(text)] = text
    batch['lengths'][n] = len(text)
    batch['known'][n] = len(text) + 1 - first_of_row.num_scored

    # Write the places of each of its continuations. The scored tokens are the
    # last ones; each is predicted at the place before it.
    end_of_text = n * shape.length + len(text)
    for i in row:
      tokens, num_scored = continuations[i]
      stop = start + num_scored
      batch['places'][start:stop] = np.arange(
          end_of_text - num_scored, end_of_text)
      batch['targets'][start:stop] = tokens[-num_scored:]
      start = stop
  return batch


def _module_for_scoring(evaluation: Evaluation) -> nn.Module:
  """Returns the model of an evaluation, as texts are scored with it: each text
  by itself, and whatever its length.

  Args:
    evaluation: the evaluation, which has the model as it was trained.
  """
  # With a limit to the tokens of an expert (capacity), the probability of a
  # text would depend on the other texts of its batch.
  config = without_capacity(evaluation.run.model)

  # A kernel of attention may take rows of some lengths only. Training names one
  # for its own rows; 'auto' chooses one for the rows at hand. 'xla' takes all.
  if config.attention_kernel != 'xla':
    config = dataclasses.replace(config, attention_kernel='auto')
  return evaluation.run.module.clone(config=config)


def _score_targets(params: Any, batch: dict[str, jax.Array], module: nn.Module,
                   is_prefix_lm: bool) -> tuple[jax.Array, jax.Array]:
  """Scores the P target tokens of a batch.

  Args:
    params: the parameters of the model, a tree of arrays.
    batch: the arrays of a batch, as `_make_batch` returns them.
    module: the model, a decoder.
    is_prefix_lm: whether the tokens before the scored ones see each other.

  Returns:
    The loss of each target in nats, [P]; and whether it is the likeliest token,
    bool [P].
  """
  # Compute the hidden states of all B rows of L tokens.
  tokens_BL = batch['tokens']
  lengths_B = batch['lengths']
  places_1L = jnp.arange(tokens_BL.shape[1])[None]
  is_real_BL = (places_1L < lengths_B[:, None]).astype(jnp.int32)
  options = {}
  if is_prefix_lm:
    options['prefix_B'] = batch['known']
  output: Any = module.apply(
      {'params': params}, tokens_BL, valid_BL=is_real_BL, lengths_B=lengths_B,
      **options)

  # Apply the head only to the P tokens from which the targets are predicted,
  # as the logits of all tokens would be large. `places` are indices into all
  # tokens of the batch, hence the reshape. token_losses takes rows of tokens,
  # hence the added axis.
  d_model = output.hidden.shape[-1]
  hidden_PD = output.hidden.reshape(-1, d_model)[batch['places']]
  token_losses = losses.token_losses(hidden_PD[None], head=output.head,
                                     targets_BL=batch['targets'][None])
  return token_losses.loss[0], token_losses.correct[0]
