"""The numpy side of an objective: raw material in, one row of a batch out.

Each function takes (raw, rng, config, tokenizer), where `raw` is an item of
the view that its entry in EXAMPLES names (see packing.VIEWS) and `rng` is
drawn from (seed, the row's place in the whole run): masks, too, repeat on any
number of hosts and workers. It returns a dict of arrays, all of a fixed
shape. Every loss weight stands under a key that ends in 'weights': in the
padding rows of an evaluation they are set to zero. To add an objective, write
its function and list it; what it feeds the loss is in objectives.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from training import conversations, masking, packing, pairs, spans


class Example(NamedTuple):
  """The view of the corpus that an objective reads, and what it makes of it."""

  view: str
  make: Callable[..., dict[str, np.ndarray]]


def causal(window: packing.Window, rng: np.random.Generator, config,
           tokenizer) -> dict[str, np.ndarray]:
  """Next-token prediction: the target of each token is the next one.

  Returns:
    tokens [L] int32, targets [L] int32, weights [L] float32: 0 on padding.
    With data.document_mask also segment_ids [L] and positions [L], int32:
    a separator starts a new segment, at position 0, and so does the window.
  """
  del rng
  tokens_L, targets_L = window.tokens[:-1], window.tokens[1:]
  index_L = np.arange(len(tokens_L), dtype=np.int32)
  example = dict(tokens=tokens_L, targets=targets_L,
                 weights=(index_L < window.size - 1).astype(np.float32))
  if config.data.document_mask:
    starts_L = tokens_L == tokenizer.separator_id
    first_L = np.maximum.accumulate(np.where(starts_L, index_L, 0))
    example['segment_ids'] = 1 + np.cumsum(starts_L, dtype=np.int32)
    example['positions'] = index_L - first_L
  return example


def prefix(window: packing.Window, rng: np.random.Generator, config,
           tokenizer) -> dict[str, np.ndarray]:
  """Prefix LM (Raffel et al. 2020, section 3.2.1): the tokens before a random
  place see each other; those from there on are predicted.

  Returns:
    as `causal`, and prefix [] int32: how many tokens the prefix has.
  """
  if config.data.document_mask:
    raise ValueError("data.document_mask has no meaning with objective "
                     "'prefix', whose prefix may span documents: set it to "
                     'False.')
  example = causal(window, rng, config, tokenizer)
  size = int(rng.integers(1, config.data.length))
  told = np.arange(config.data.length) >= size - 1
  example['weights'] = example['weights'] * told
  return example | dict(prefix=np.int32(size))


EXAMPLES = {
    'causal': Example('windows', causal),
    'prefix': Example('windows', prefix),
    'mlm_nsp': Example('stretches', masking.mlm_nsp),
    'span': Example('windows', spans.span),
    'seq2seq': Example('pairs', pairs.seq2seq),
    'chat': Example('conversations', conversations.chat),
}
