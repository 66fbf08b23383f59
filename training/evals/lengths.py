"""Losses by position at a multiple of the training length: what extrapolation
computes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts.config import ModelConfig
from training import objectives, progress
from training.objectives import losses
from training.data import packing
from training.objectives import pipeline
from training.data.tokenizers import Tokenizer
from training.distributed import devices
from training.evals.task import Evaluation

TOKENS = 2 ** 17  # at each length, at least


def sources(evaluation: Evaluation, multiple: int, longest: int
            ) -> Iterator[tuple[float, list]]:
  """Yields (weight of a token, batches) of each source, in as many tokens a
  batch as the mesh allows. The rows are those of the longest multiple, cut into
  pieces of this one's length: at each length the same tokens are predicted."""
  config = evaluation.run.config.copy_and_resolve_references()
  length, pieces = config.data.length * longest, longest // multiple
  shards = math.prod(evaluation.run.mesh.shape.values())
  rows = max(config.data.batch_size // longest // shards, 1) * shards
  config.data.update(length=length, batch_size=rows)
  loaders = pipeline.held_out(config, evaluation.tokenizer,
                          *devices.batch_shard(evaluation.run.place, rows))
  for loader in loaders:
    batches = [devices.put(_cut(batch, pieces, evaluation.tokenizer),
                           evaluation.run.place)
               for batch in loader.iterate(0, -(-TOKENS // (rows * length)))]
    tokens = sum(float(batch['weights'].sum()) for batch in batches)
    yield loader.share / tokens, batches


def _cut(batch: Mapping[str, np.ndarray], pieces: int, tokenizer: Tokenizer
         ) -> dict[str, np.ndarray]:
  """Returns the rows of a batch cut into so many, each of which begins anew."""
  cut = {name: x.reshape(len(x) * pieces, -1) for name, x in batch.items()}
  if 'positions' in cut:  # of packed documents
    each = [packing.documents(row_L == tokenizer.separator_id)
            for row_L in cut['tokens']]
    cut |= {name: np.stack([own[name] for own in each])
            for name in ('segment_ids', 'positions')}
  return cut


def _sum(fn: Callable, batches: Sequence) -> np.ndarray:
  """Sums a function of batches, [L], in float64."""
  rows = f'evaluating rows of {batches[0]["tokens"].shape[1]:,} tokens'
  return sum(np.asarray(jax.device_get(fn(batch)), np.float64)
             for batch in progress.each(batches, rows))


def text(batches: Sequence[tuple[float, list]]
         ) -> tuple[np.ndarray, np.ndarray]:
  """Returns how many tokens the batches of some sources predict at each
  position, [L], and what they count in all."""
  count = jax.jit(lambda batch: batch['weights'].sum(0))
  tokens = [_sum(count, own) for _, own in batches]
  return (sum(tokens).astype(int),
          sum(each * x for (each, _), x in zip(batches, tokens)))


def by_position(evaluation: Evaluation, model: ModelConfig,
                batches: Sequence[tuple[float, list]], text: Any
                ) -> np.ndarray:
  """Returns the mean loss at each position, [L], in nats, of a Text; nan where
  there is no token."""
  module = architectures.build(model)
  objective = objectives.of(evaluation.run.config)

  def sums_of(params: Any, batch: Any):
    output = objective.apply(module, params, batch)
    loss_BL = losses.token_losses(output.hidden, output.head,
                                  batch['targets']).loss
    return jnp.sum(loss_BL * batch['weights'], 0)

  step = evaluation.program(lambda: sums_of, 'extrapolation', model)
  total = sum(each * _sum(lambda batch: step(evaluation.params, batch),
                          own) for each, own in batches)
  return np.divide(total, text.weights, where=text.tokens > 0,
                   out=np.full(total.shape, np.nan))
