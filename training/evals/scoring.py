"""The log-probabilities that a decoder gives to tokens of texts: what lm_eval,
and perplexity with a stride, are made of.

Texts of one length, rounded up, go through the model together, and of each
only the places that are asked about go through its head. There are two lengths
for each power of two, and one number of places, so that what is compiled stays
bounded whatever the texts are. Questions about one text, and about the
beginnings of it, are answered by one row where no token sees those after it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from architectures.parts.moe.layer import without_capacity
from training import losses, objectives, progress
from training.distributed import devices
from training.evals.task import Evaluation

SHORTEST = 8
TOKENS = 2 ** 12  # of a batch, padding included


class Question(NamedTuple):
  """Some tokens, the last `scored` of which are to be judged.

  Attributes:
    tokens: int32 [T]; of them the model is shown all but the last.
    scored: from 1 to T - 1.
  """
  tokens: np.ndarray
  scored: int


class Answer(NamedTuple):
  """Of each token that was scored, [scored].

  Attributes:
    log_probs: in nats, given all tokens before it.
    greedy: whether it is the likeliest.
  """
  log_probs: np.ndarray
  greedy: np.ndarray


class _Row(NamedTuple):
  """What the model is shown, and the places in it that are asked about."""
  tokens: np.ndarray
  questions: list[int]
  places: np.ndarray
  targets: np.ndarray


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
  prefix = 'prefix_B' in _objective(evaluation).options.values()
  rows = _apart(questions) if prefix else _together(questions)
  step = evaluation.program(lambda: _program(evaluation, prefix), 'scoring')
  shards = evaluation.run.mesh.size
  most = max(SHORTEST, evaluation.run.model.max_len)
  found: list[Any] = [None] * len(questions)

  def read(chosen: list[_Row], output: Any) -> None:
    losses_BP, greedy_BP = jax.device_get(output)
    for row, losses_P, greedy_P in zip(chosen, losses_BP, greedy_BP):
      at = 0
      for i in row.questions:
        here = slice(at, at + questions[i].scored)
        found[i] = Answer(-losses_P[here].astype(np.float64), greedy_P[here])
        at = here.stop

  groups = list(batches(rows, most, shards))
  held = None
  for shape, chosen in progress.each(groups, doing):
    batch = _batch(shape, chosen, questions)
    now = chosen, step(evaluation.params,
                       devices.put(batch, evaluation.run.place))
    if held:  # read when the next one is under way
      read(*held)
    held = now
  if held:
    read(*held)
  return found


def _objective(evaluation: Evaluation):
  return objectives.of(evaluation.run.config)


def _row(question: Question, which: int) -> _Row:
  end = len(question.tokens) - 1
  return _Row(question.tokens[:-1], [which],
              np.arange(end - question.scored, end),
              question.tokens[end - question.scored + 1:])


def _apart(questions: Sequence[Question]) -> list[_Row]:
  return [_row(question, i) for i, question in enumerate(questions)]


def _together(questions: Sequence[Question]) -> list[_Row]:
  """Returns rows of which each answers for all that begin as it does."""
  # As bytes, of which the first decide: what begins alike stands together, and
  # the shorter one first.
  keys = [question.tokens[:-1].astype('>i4').tobytes()
          for question in questions]
  rows: list[_Row] = []
  longest = b''
  for i in sorted(range(len(keys)), key=keys.__getitem__, reverse=True):
    new = _row(questions[i], i)
    if rows and longest.startswith(keys[i]):
      last = rows[-1]
      rows[-1] = _Row(last.tokens, [*last.questions, i],
                      np.concatenate([last.places, new.places]),
                      np.concatenate([last.targets, new.targets]))
    else:
      rows.append(new)
      longest = keys[i]
  return rows


def batches(rows: Sequence[_Row], most: int, shards: int
            ) -> Iterator[tuple[tuple[int, int, int], list[_Row]]]:
  """Yields ((rows, length, places), which rows) of each batch, the longest
  first, so that what is too large for a device is so at once.

  Args:
    rows: in any order.
    most: the longest that the model takes.
    shards: what the number of rows is a multiple of.
  """
  by_length: dict[int, list[_Row]] = {}
  for row in rows:
    by_length.setdefault(rounded(len(row.tokens), most), []).append(row)
  for length in sorted(by_length, reverse=True):
    group = sorted(by_length[length], key=lambda row: len(row.places),
                   reverse=True)
    count = min(max(TOKENS // length, 1), _power_of_two(len(group)))
    count = -(-count // shards) * shards
    for start in range(0, len(group), count):
      chosen = group[start:start + count]
      yield (count, length, _power_of_two(len(chosen[0].places))), chosen


def rounded(length: int, most: int) -> int:
  """Returns the least of 8, 12, 16, 24, 32, 48, ... that is as long."""
  power = max(SHORTEST, _power_of_two(length))
  smaller = power * 3 // 4
  return min(smaller if max(length, SHORTEST) <= smaller else power, most)


def _power_of_two(least: int) -> int:
  return 1 << (least - 1).bit_length()


def _batch(shape: tuple[int, int, int], rows: Sequence[_Row],
           questions: Sequence[Question]) -> dict[str, np.ndarray]:
  count, length, places = shape
  batch = dict(
      tokens=np.zeros((count, length), np.int32),
      places=np.zeros((count, places), np.int32),
      targets=np.zeros((count, places), np.int32),
      lengths=np.zeros(count, np.int32), known=np.ones(count, np.int32))
  for i, row in enumerate(rows):
    batch['tokens'][i, :len(row.tokens)] = row.tokens
    batch['places'][i, :len(row.places)] = row.places
    batch['targets'][i, :len(row.places)] = row.targets
    batch['lengths'][i] = len(row.tokens)
    first = questions[row.questions[0]]
    batch['known'][i] = len(first.tokens) - first.scored
  return batch


def _program(evaluation: Evaluation, prefix: bool):
  # With a capacity, a text's probability would hang on the batch.
  module = evaluation.run.module.clone(
      config=without_capacity(evaluation.run.model))

  def score(params: Any, batch: dict[str, jax.Array]
            ) -> tuple[jax.Array, jax.Array]:
    """Returns the losses of the targets, [B, P], and whether each is the
    likeliest token; what the model knows beforehand is a prefix LM's
    prefix."""
    tokens_BL = batch['tokens']
    real_BL = (jnp.arange(tokens_BL.shape[1])[None]
               < batch['lengths'][:, None]).astype(jnp.int32)
    options = {'prefix_B': batch['known']} if prefix else {}
    output = module.apply({'params': params}, tokens_BL, valid_BL=real_BL,
                          **options)
    hidden_BPD = jnp.take_along_axis(
        output.hidden, batch['places'][..., None], axis=1)
    found = losses.token_losses(hidden_BPD, output.head, batch['targets'])
    return found.loss, found.correct
  return score
