"""The log-probabilities that a decoder gives to tokens of texts: what lm_eval,
and perplexity with a stride, are made of.

Texts of about one length go through the model together, several of them in a
row, which holds what they begin with once (trees.py), where that is less work;
else each text has a row of its length, rounded up. Only the places that are
asked about go through the head. There are a few lengths of rows, and for each
one number of rows and of places, so that what is compiled stays bounded
whatever the texts are.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from architectures.parts import mixers
from architectures.parts import positions
from architectures.parts.moe.layer import without_capacity
from training import losses, objectives, progress
from training.distributed import devices
from training.evals import trees
from training.evals.task import Evaluation
from training.evals.trees import Question, Row

SHORTEST = 8
TOKENS = 2 ** 12  # of a batch, padding included


class Answer(NamedTuple):
  """Of each token that was scored, [scored].

  Attributes:
    log_probs: in nats, given all tokens before it.
    greedy: whether it is the likeliest.
  """
  log_probs: np.ndarray
  greedy: np.ndarray


class Shape(NamedTuple):
  """What a program is compiled for.

  Attributes:
    rows: of a batch.
    length: tokens of a row.
    shards: into how many parts the rows are cut.
    places: that are asked about in each of these.
    trees: whether a row holds several texts.
  """
  rows: int
  length: int
  shards: int
  places: int
  trees: bool


def unfit(config: ml_collections.ConfigDict) -> str:
  """Returns why the model of a run cannot be asked; '': it can."""
  objective = objectives.of(config)
  return '' if objective.stacks == ('decoder',) and objective.prompt else (
      f'objective {config.objective!r} does not train a decoder-only '
      'model that writes text, so a text has no probability')


def answer(questions: Sequence[Question], evaluation: Evaluation, doing: str
           ) -> list[Answer]:
  """Returns the answers in the order of the questions.

  Args:
    questions: of at most max_len + 1 tokens each.
    evaluation: of a decoder.
    doing: for who watches.
  """
  prefix = _objective(evaluation).prefix
  step = evaluation.program(lambda: _program(evaluation, prefix), 'scoring')
  model, shards = evaluation.run.model, evaluation.run.mesh.size
  found: list[Any] = [None] * len(questions)

  def read(parts: list[list[Row]], output: Any) -> None:
    for rows, losses_P, greedy_P in zip(parts, *jax.device_get(output)):
      at = 0
      for i in (i for row in rows for i in row.questions):
        here = slice(at, at + questions[i].scored)
        found[i] = Answer(-losses_P[here].astype(np.float64), greedy_P[here])
        at = here.stop

  lengths = positions.lengths_apart(model)
  groups = list(batches(
      questions, max(SHORTEST, model.max_len), shards, model.d_model,
      bool(prefix or mixers.with_state(model) or lengths),
      positions.reach(model), lengths))
  held = None
  for shape, parts in progress.each(groups, doing):
    batch = _batch(shape, parts, questions)
    now = parts, step(evaluation.params,
                      devices.put(batch, evaluation.run.place))
    if held:  # read when the next one is under way
      read(*held)
    held = now
  if held:
    read(*held)
  return found


def _objective(evaluation: Evaluation):
  return objectives.of(evaluation.run.config)


def batches(questions: Sequence[Question], most: int, shards: int, width: int,
            apart: bool, reach: float = math.inf,
            lengths: Sequence[int] = ()
            ) -> Iterator[tuple[Shape, list[list[Row]]]]:
  """Yields (shape, the rows of each shard) of each batch, the longest first,
  so that what is too large for a device is so at once.

  Args:
    questions: in any order.
    most: the longest that the model takes.
    shards: what the number of rows is a multiple of.
    width: the model's, by which it is judged how long a row may be.
    apart: whether each question has a row to itself.
    reach: the most tokens that a row may have, of any number of texts.
    lengths: positions.lengths_apart of the model.
  """
  by_length: dict[tuple[int, bool], list[Row]] = {}
  for which in _by_size(questions):
    order = trees.ordered(questions, which)
    for place, row in _laid_out(questions, order, most, width, apart,
                                reach, lengths):
      by_length.setdefault(place, []).append(row)
  for length, several in sorted(by_length, reverse=True):
    rows = sorted(by_length[length, several], key=lambda row: len(row.places),
                  reverse=True)
    count = -(-len(rows) // max(TOKENS // length, 1))
    groups = [rows[i::count] for i in range(count)]
    parts = [[group[i::shards] for i in range(shards)] for group in groups]
    places = max(sum(len(row.places) for row in part)
                 for group in parts for part in group)
    shape = Shape(-(-len(groups[0]) // shards) * shards, length, shards,
                  -(-places // SHORTEST) * SHORTEST, several)
    yield from ((shape, group) for group in parts)


def _by_size(questions: Sequence[Question]) -> list[list[int]]:
  """Returns the numbers of questions whose texts differ in length by no more
  than a factor of four or so."""
  sizes: dict[int, list[int]] = {}
  for i, question in enumerate(questions):
    size = max(len(question.tokens) - 2, 15).bit_length() // 2
    sizes.setdefault(size, []).append(i)
  return list(sizes.values())


def _laid_out(questions: Sequence[Question], order: trees.Order, most: int,
              width: int, apart: bool, reach: float, lengths: Sequence[int]
              ) -> Iterator[tuple[tuple[int, bool], Row]]:
  """Yields ((length, whether it holds several texts), row) of the layout that
  is the least work."""
  spans = (trees.each_alone if apart else trees.whole_texts)(order)
  length, several = 0, False
  if not apart:
    work = sum(_work(rounded(order.lengths[stop - 1], most), width)
               for _, stop in spans)
    longest = max(order.lengths)
    for room in dict.fromkeys(rounded(int(longest * times), 4 * longest)
                              for times in (1, 1.5, 2, 3, 4)):
      if room > reach:
        break
      others = trees.filled(order, room)
      if len(others) * _work(room, width) < work:
        work = len(others) * _work(room, width)
        spans, length, several = others, room, True
  for span in spans:
    row = trees.row(questions, order, span)
    yield (length or _padded(len(row.tokens), most, lengths), several), row


def _work(length: int, width: int) -> float:
  """Returns what a row costs. A token's products with weights are 12 width^2
  in a layer, those of attention 2 width for each of its keys; these and the
  softmax of the scores run slower."""
  return length * (1 + length / (2 * width))


def _padded(length: int, most: int, lengths: Sequence[int]) -> int:
  """Returns how long the row of a text is, which turns as the text alone."""
  if not lengths:
    return rounded(length, most)
  least = next((n for n in lengths if length <= n), length)
  return min(rounded(length, most), least)


def rounded(length: int, most: int) -> int:
  """Returns the least of 8, 12, 16, 24, 32, 48, ... that is as long."""
  power = max(SHORTEST, _power_of_two(length))
  smaller = power * 3 // 4
  return min(smaller if max(length, SHORTEST) <= smaller else power, most)


def _power_of_two(least: int) -> int:
  return 1 << (least - 1).bit_length()


def _batch(shape: Shape, parts: list[list[Row]],
           questions: Sequence[Question]) -> dict[str, np.ndarray]:
  batch = {name: np.zeros((shape.rows, shape.length), np.int32) for name in (
      'tokens', *(('positions', 'reach') if shape.trees else ()))}
  batch |= {name: np.zeros((shape.shards, shape.places), np.int32)
            for name in ('places', 'targets')}
  batch |= dict(lengths=np.zeros(shape.rows, np.int32),
                known=np.ones(shape.rows, np.int32))
  for part, rows in enumerate(parts):
    first, at = part * (shape.rows // shape.shards), 0
    for i, row in enumerate(rows):
      length = len(row.tokens)
      batch['tokens'][first + i, :length] = row.tokens
      batch['lengths'][first + i] = length
      if shape.trees:
        batch['positions'][first + i, :length] = row.positions
        batch['reach'][first + i, :length] = row.reach
      here = slice(at, at + len(row.places))
      batch['places'][part, here] = i * shape.length + row.places
      batch['targets'][part, here] = row.targets
      at = here.stop
      question = questions[row.questions[0]]
      batch['known'][first + i] = len(question.tokens) - question.scored
  return batch


def _program(evaluation: Evaluation, prefix: bool):
  # With a capacity, a text's probability would hang on the batch.
  model = without_capacity(evaluation.run.model)
  # A kernel that training names may have no mask for texts that share tokens.
  kernel = 'xla' if model.attention_kernel == 'xla' else 'auto'
  module = evaluation.run.module.clone(config=dataclasses.replace(
      model, attention_kernel=kernel))

  def score(params: Any, batch: dict[str, jax.Array]
            ) -> tuple[jax.Array, jax.Array]:
    """Returns the losses of the targets, [S, P], and whether each is the
    likeliest token; what the model knows beforehand is a prefix LM's
    prefix."""
    tokens_BL = batch['tokens']
    real_BL = (jnp.arange(tokens_BL.shape[1])[None]
               < batch['lengths'][:, None]).astype(jnp.int32)
    options = {'prefix_B': batch['known']} if prefix else {}
    if 'reach' in batch:
      options = dict(positions_BL=batch['positions'], reach_BL=batch['reach'])
    output = module.apply({'params': params}, tokens_BL, valid_BL=real_BL,
                          **options)
    places_SP = batch['places']
    hidden_SPD = jnp.take_along_axis(
        output.hidden.reshape(len(places_SP), -1, output.hidden.shape[-1]),
        places_SP[..., None], axis=1)
    found = losses.token_losses(hidden_SPD, output.head, batch['targets'])
    return found.loss, found.correct
  return score
