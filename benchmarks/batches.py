"""One batch of a run, of random tokens: what its objective makes of them.

The objective's own view and example cut and lay out the rows, so that a batch
has the arrays, shapes and masks of training, whatever is trained. Only the text
is made up: tokens of the whole vocabulary, none likelier than another.
"""

import types

import numpy as np

from training import objectives
from training.data import packing, pipeline, tokenizers
from training.objectives.record import Config

# Views of plain text, which may be made up. Conversations and labels are not.
PLAIN = (packing.Windows, packing.Stretches, packing.Pairs)


def tokenizer(config: Config) -> tokenizers.Tokenizer:
  """Returns one of as many ids as the model has, or, for data that are not made
  up, the run's own."""
  if _is_plain(config) and config.model.vocab_size:
    return tokenizers.Bytes(config.model.vocab_size)
  return tokenizers.load(config.data.tokenizer)


def make(config: Config, ids: tokenizers.Tokenizer) -> dict[str, np.ndarray]:
  """Returns a batch of data.batch_size rows, the same in each process.

  Args:
    config: a run's; where its objective reads more than plain text, the batch
      is the first one of its data.source.
    ids: see `tokenizer`.
  """
  if not _is_plain(config):
    return pipeline.training_loader(config, ids).batch(0)
  objective = objectives.of(config)
  view = objective.view(_random(config, ids))
  return objective.batch(
      [(view[i], np.random.default_rng([0, i]))
       for i in range(config.data.batch_size)], config, ids)


def _is_plain(config: Config) -> bool:
  return issubclass(objectives.of(config).view, PLAIN)


def _random(config: Config, ids: tokenizers.Tokenizer) -> packing.Corpus:
  """Returns two documents, each of which has all rows of a batch."""
  data = config.data
  size = 2 * data.batch_size * max(data.length, data.target_length)
  bounds = np.array([0, size, 2 * size])
  text = types.SimpleNamespace(
      tokens=np.random.default_rng(0).integers(
          0, ids.vocab_size, 2 * size, dtype=np.int32),
      parts=bounds, documents=np.arange(3), kinds=np.zeros(2, np.uint8),
      num_bytes=np.diff(bounds))
  return packing.Corpus('random', 'random tokens', text, np.arange(2), 'train',
                        ids, config)
