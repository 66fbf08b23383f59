"""The log-probabilities that a decoder gives to tokens of texts: what lm_eval,
and perplexity with a stride, are made of.

Texts of about one length go through the model together. Questions about one
text have one row, which holds it once. Only the places that are asked about go
through the head. There are a few lengths of rows, and for each one number of
rows and of places, so that what is compiled stays bounded whatever the texts
are.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from architectures.parts.moe.layer import without_capacity
from training import objectives, progress
from training.distributed import devices
from training.evals import Evaluation
from training.objectives import losses

SHORTEST_ROW = 8
TOKENS_OF_BATCH = 2 ** 12  # of a batch, padding included


class Continuation(NamedTuple):
  """Some tokens, the last `scored` of which are to be judged.

  Attributes:
    tokens: int32 [T], all but the last of which the model is shown.
    scored: how many are judged, from 1 to T - 1.
  """
  tokens: np.ndarray
  scored: int


class TokenScores(NamedTuple):
  """The answer to a question: of each token that was scored, [scored].

  Attributes:
    log_probs: its log-probability in nats, given all tokens before it.
    greedy: whether it is the likeliest.
  """
  log_probs: np.ndarray
  greedy: np.ndarray


class BatchShape(NamedTuple):
  """The shape that a program is compiled for.

  Attributes:
    rows: how many rows a batch has.
    length: the tokens of a row.
    places: how many places are asked about in all rows.
  """
  rows: int
  length: int
  places: int


Row = list[int]  # the numbers of the questions about one text


def why_not_scorable(config: ml_collections.ConfigDict) -> str:
  """Returns why the model of a run cannot be asked; '': it can."""
  objective = objectives.find_objective(config)
  if objective.stacks == ('decoder',) and objective.writes:
    return ''
  return (f'objective {config.objective!r} does not train a decoder-only '
          'model that writes text, so a text has no probability')


def score_continuations(questions: Sequence[Continuation],
                        evaluation: Evaluation, doing: str
           ) -> list[TokenScores]:
  """Returns the answers in the order of the questions.

  Args:
    questions: questions of at most max_len + 1 tokens each.
    evaluation: the evaluation of a decoder.
    doing: what is done, for who watches.
  """
  prefix = objectives.find_objective(evaluation.run.config).prefix
  step = evaluation.jit_once(_make_score_function(evaluation, prefix),
                             'scoring')
  most = max(SHORTEST_ROW, evaluation.run.model.max_len)
  groups = list(group_into_batches(questions, most=most, apart=prefix,
                        shards=evaluation.run.mesh.size))
  answers: dict[int, TokenScores] = {}
  for shape, rows in progress.show_items(groups, doing):
    batch = devices.put(_make_batch(shape, rows, questions),
                        evaluation.run.place)
    losses_P, greedy_P = jax.device_get(step(evaluation.params, batch))

    # The places P are those of one question after the other.
    at = 0
    for row in rows:
      for i in row:
        here = slice(at, at + questions[i].scored)
        answers[i] = TokenScores(log_probs=-losses_P[here].astype(np.float64),
                            greedy=greedy_P[here])
        at = here.stop
  return [answers[i] for i in range(len(questions))]


def group_into_batches(questions: Sequence[Continuation], most: int,
                       shards: int,
            apart: bool = False) -> Iterator[tuple[BatchShape, list[Row]]]:
  """Yields (shape, rows) of each batch, the longest first, so that what is too
  large for a device is so at once.

  Args:
    questions: in any order.
    most: the longest that the model takes.
    shards: what the numbers of rows and of places are multiples of.
    apart: whether each question has a row to itself.
  """
  # Questions about the same text have one row.
  rows: dict[Any, Row] = {}
  for i, question in enumerate(questions):
    key = i if apart else question.tokens[:-1].tobytes()
    rows.setdefault(key, []).append(i)

  # Rows by the length that they are padded to.
  by_length: dict[int, list[Row]] = {}
  for row in rows.values():
    length = len(questions[row[0]].tokens) - 1
    by_length.setdefault(padded_length(length, most), []).append(row)

  def places(row: Row) -> int:
    """Returns how many places the questions of a row ask about."""
    return sum(questions[i].scored for i in row)

  # Groups of rows that ask about as many places as each other.
  multiple = int(np.lcm(SHORTEST_ROW, shards))
  for length, several in sorted(by_length.items(), reverse=True):
    several.sort(key=places, reverse=True)
    count = -(-len(several) // max(TOKENS_OF_BATCH // length, 1))
    groups = [several[i::count] for i in range(count)]
    most_places = 0
    for group in groups:
      most_places = max(most_places, sum(map(places, group)))
    shape = BatchShape(rows=_round_up(len(groups[0]), shards), length=length,
                  places=_round_up(most_places, multiple))
    for group in groups:
      yield shape, group


def _round_up(number: int, multiple: int) -> int:
  """Returns the least multiple of `multiple` that is as large as a number."""
  return -(-number // multiple) * multiple


def padded_length(length: int, most: int) -> int:
  """Returns the least of 8, 12, 16, 24, 32, 48, ... that is as long."""
  power = max(SHORTEST_ROW, 1 << (length - 1).bit_length())
  smaller = power * 3 // 4
  if max(length, SHORTEST_ROW) <= smaller:
    return min(smaller, most)
  return min(power, most)


def pad_into_batches(rows: Mapping[int, np.ndarray], most: int
           ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
  """Yields (which rows, tokens [B, L], lengths [B]) of batches of few shapes,
  the longest first; in what fills a batch up, a row has one token."""
  # Rows of similar lengths, of which all are padded to one.
  by_length: dict[int, list[int]] = {}
  for i, row in rows.items():
    length = padded_length(len(row), most)
    by_length.setdefault(length, []).append(i)
  for length, group in sorted(by_length.items(), reverse=True):
    # A batch has about TOKENS tokens, and a power of two rows if these are few.
    count = min(max(TOKENS_OF_BATCH // length, 1),
                1 << (len(group) - 1).bit_length())
    for start in range(0, len(group), count):
      chosen = group[start:start + count]
      tokens_BL = np.zeros((count, length), np.int32)
      lengths_B = np.ones(count, np.int32)
      for place, i in enumerate(chosen):
        tokens_BL[place, :len(rows[i])] = rows[i]
        lengths_B[place] = len(rows[i])
      yield chosen, tokens_BL, lengths_B


def _make_batch(shape: BatchShape, rows: list[Row],
                questions: Sequence[Continuation]
           ) -> dict[str, np.ndarray]:
  """Returns the arrays of a batch.

  Args:
    shape: the shape of the batch.
    rows: the questions of each row.
    questions: all questions.
  """
  batch = dict(tokens=np.zeros((shape.rows, shape.length), np.int32),
               lengths=np.zeros(shape.rows, np.int32),
               known=np.ones(shape.rows, np.int32),
               places=np.zeros(shape.places, np.int32),
               targets=np.zeros(shape.places, np.int32))
  at = 0
  for n, row in enumerate(rows):
    # The text of the row.
    text = questions[row[0]].tokens[:-1]
    batch['tokens'][n, :len(text)] = text
    batch['lengths'][n] = len(text)
    batch['known'][n] = len(text) + 1 - questions[row[0]].scored

    # The places that its questions ask about, in the batch as one row.
    for i in row:
      tokens, scored = questions[i]
      here = slice(at, at + scored)
      first = n * shape.length + len(text) - scored
      batch['places'][here] = np.arange(first, first + scored)
      batch['targets'][here] = tokens[-scored:]
      at = here.stop
  return batch


def _make_score_function(evaluation: Evaluation, prefix: bool):
  """Returns score(params, batch) of a decoder, which is a prefix LM or not."""
  # With a capacity, a text's probability would hang on the batch.
  model = without_capacity(evaluation.run.model)
  # A kernel that training names may not take rows of these lengths.
  kernel = 'xla' if model.attention_kernel == 'xla' else 'auto'
  module = evaluation.run.module.clone(config=dataclasses.replace(
      model, attention_kernel=kernel))

  def score(params: Any, batch: dict[str, jax.Array]
            ) -> tuple[jax.Array, jax.Array]:
    """Returns the losses of the targets, [P], and whether each is the likeliest
    token; what the model knows beforehand is a prefix LM's prefix."""
    # The states of the model.
    tokens_BL = batch['tokens']
    lengths_B = batch['lengths']
    places_1L = jnp.arange(tokens_BL.shape[1])[None]
    real_BL = (places_1L < lengths_B[:, None]).astype(jnp.int32)
    options = {'prefix_B': batch['known']} if prefix else {}
    output = module.apply({'params': params}, tokens_BL, valid_BL=real_BL,
                          lengths_B=lengths_B, **options)

    # The head, at the places that are asked about.
    size = output.hidden.shape[-1]
    hidden_PD = output.hidden.reshape(-1, size)[batch['places']]
    judged = losses.token_losses(hidden_PD[None], output.head,
                                 batch['targets'][None])
    return judged.loss[0], judged.correct[0]
  return score
