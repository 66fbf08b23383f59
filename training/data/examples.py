"""The numpy side of an objective: raw material in, one row of a batch out.

Each function takes (raw, rng, config, tokenizer), where `raw` is an item of
the view that its entry in EXAMPLES names (see packing.VIEWS) and `rng` is
drawn from (seed, the row's place in the whole run): masks, too, repeat on any
number of hosts and workers. It returns a dict of arrays, all of a fixed
shape. Every loss weight stands under a key that ends in 'weights', and what
tells tokens from padding under 'segment_ids' or 'valid': in the padding rows of
an evaluation they are set to zero. To add an objective, write
its function and list it; what it feeds the loss is in objectives.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from configs.errors import RequestError, one_of, require
from training.data import conversations, masking, packing, pairs, spans


class Example(NamedTuple):
  """The view of the corpus that an objective reads, and what it makes of it.

  Attributes:
    view: of packing.VIEWS.
    make: the function.
    documents: whether data.document_mask can keep documents apart in a row.
  """

  view: str
  make: Callable[..., dict[str, np.ndarray]]
  documents: bool = False


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
    example |= masking.documents(tokens_L == tokenizer.separator_id)
  return example


def prefix(window: packing.Window, rng: np.random.Generator, config,
           tokenizer) -> dict[str, np.ndarray]:
  """Prefix LM (Raffel et al. 2020, section 3.2.1): the tokens before a random
  place see each other; those from there on are predicted.

  Returns:
    as `causal`, and prefix [] int32: how many tokens the prefix has; valid [L]
    float32: 0 on padding.
  """
  example = causal(window, rng, config, tokenizer)
  valid = example['weights']
  size = int(rng.integers(1, config.data.length))
  told = np.arange(config.data.length) >= size - 1
  return example | dict(weights=valid * told, valid=valid,
                        prefix=np.int32(size))


EXAMPLES = {
    'causal': Example('windows', causal, documents=True),
    'prefix': Example('windows', prefix),
    'mlm': Example('passages', masking.mlm, documents=True),
    'mlm_nsp': Example('stretches', masking.mlm_nsp),
    'span': Example('windows', spans.span),
    'seq2seq': Example('pairs', pairs.seq2seq),
    'chat': Example('conversations', conversations.chat),
}


def check(config) -> None:
  """Raises ValueError for fields of config.data that an objective ignores."""
  template = config.data.chat_template
  one_of('data.chat_template', template, conversations.TEMPLATES)
  require(template == 'published' or config.objective == 'chat',
          f'data.chat_template is {template!r}, which objective '
          f"{config.objective!r} does not read: leave it at 'published'")
  if config.data.document_mask and not EXAMPLES[config.objective].documents:
    apart = [name for name, row in EXAMPLES.items() if row.documents]
    raise RequestError(
        'data.document_mask has no meaning with objective '
        f'{config.objective!r}, whose rows are no packed documents or see '
        f'across them: set it to False, or choose from {", ".join(apart)}.')


def shapes(config) -> dict[str, tuple[tuple[int, ...], type]]:
  """Returns the shape and dtype of each array of a batch, by its key."""
  B, L = config.data.batch_size, config.data.length
  row = ((B, L), np.int32)
  if config.objective in ('span', 'seq2seq'):
    M, L = pairs.lengths(config) if config.objective == 'seq2seq' else (
        spans.lengths(config))
    source, target = ((B, M), np.int32), ((B, L), np.int32)
    return dict(tokens=source, segment_ids=source, decoder_tokens=target,
                decoder_segment_ids=target, targets=target,
                weights=((B, L), np.float32))
  batch = dict(tokens=row, targets=row, weights=((B, L), np.float32))
  more = {
      'mlm': dict(segment_ids=row),
      'mlm_nsp': dict(types=row, segment_ids=row, nsp_targets=((B,), np.int32)),
      'prefix': dict(prefix=((B,), np.int32), valid=((B, L), np.float32)),
      'chat': dict(valid=((B, L), np.float32)),
  }
  batch |= more[config.objective] if config.objective in more else {}
  if config.data.document_mask:
    batch |= dict(segment_ids=row, positions=row)
  return batch
