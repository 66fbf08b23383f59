"""Next tokens: of all text, or of what follows a prefix."""

from collections.abc import Sequence

import numpy as np

from configs.errors import require
from training.data import packing
from training.data.tokenizers import Tokenizer
from training.objectives import record
from training.objectives.record import Config, Objective, Prompts, Row
from training.objectives.record import Shape, Talk


def causal(window: packing.Window, rng: np.random.Generator | None,
           config: Config, tokenizer: Tokenizer) -> Row:
  """Next-token prediction: the target of each token is the next one.

  Returns:
    tokens, targets, weights [L]: a weight is 0 on padding. With
    data.document_mask also segment_ids and positions [L]: a separator starts a
    new segment, at position 0, and so does the window.
  """
  del rng
  tokens_L, targets_L = window.tokens[:-1], window.tokens[1:]
  row = dict(tokens=tokens_L, targets=targets_L,
             weights=np.arange(len(tokens_L)) < window.size - 1)
  if config.data.document_mask:
    row |= packing.documents(tokens_L == tokenizer.separator_id)
  return row


def _arrays(config: Config) -> dict[str, Shape]:
  apart = ('segment_ids', 'positions') if config.data.document_mask else ()
  return record.text_arrays(config, *apart)


def prefix(window: packing.Window, rng: np.random.Generator, config: Config,
           tokenizer: Tokenizer) -> Row:
  """Prefix LM (Raffel et al. 2020, section 3.2.1): the tokens before a random
  place see each other; those from there on are predicted.

  Returns:
    as `causal`, and prefix []: how many tokens the prefix has; valid [L]: 0 on
    padding.
  """
  row = causal(window, rng, config, tokenizer)
  valid = row['weights']
  size = int(rng.integers(1, config.data.length))
  predicted = np.arange(config.data.length) >= size - 1
  return row | dict(weights=valid & predicted, valid=valid, prefix=size)


def _check_prefix(config: Config) -> None:
  require(config.data.length > 1, f'data.length is {config.data.length}, and '
          "objective 'prefix' cuts a row into a prefix and what follows: set "
          'it to 2 or more')


def _prefix_arrays(config: Config) -> dict[str, Shape]:
  row = record.text_arrays(config)
  return row | dict(valid=row['weights'], prefix=((), np.int32))


def _as_prefix(texts: Sequence[str], config: Config, tokenizer: Tokenizer
               ) -> Prompts:
  """Returns prompts whose tokens all see each other."""
  prompts = record.after_separator(texts, config, tokenizer)
  return prompts._replace(arguments=dict(prefix_B=prompts.lengths))


def goes_on(tokenizer: Tokenizer, start: int | None = None) -> Talk:
  """Returns how a model of plain text is talked with: each message is a line
  of its text, which the model goes on from.

  Args:
    tokenizer: the model's.
    start: the token before the text; default: the separator.
  """
  separator = tokenizer.separator_id
  first = separator if start is None else start

  def encode(messages: Sequence[dict[str, str]]) -> np.ndarray:
    text = ''
    for message in messages:
      starts = message['role'] == 'user' and text
      text += ('\n' if starts else '') + message['content']
    return np.concatenate([[first], tokenizer.encode(text)]).astype(np.int32)

  return Talk('goes on from the text', encode, frozenset({separator}),
              system=False, plain=True)


OBJECTIVES = {
    # Every token of a window but its padding is one to predict from.
    'causal': Objective(
        ('decoder',), packing.Windows, causal, _arrays, ('tokens',),
        {'positions': 'positions_BL', 'segment_ids': 'segment_ids_BL',
         'weights': 'valid_BL'}, ('weights',), reads=('data.document_mask',),
        prompt=record.after_separator, every_token=True, mtp=True,
        talk=lambda config, tokenizer: goes_on(tokenizer)),
    'prefix': Objective(
        ('decoder',), packing.Windows, prefix, _prefix_arrays, ('tokens',),
        {'prefix': 'prefix_B', 'valid': 'valid_BL'}, ('valid',),
        prompt=_as_prefix, check=_check_prefix),
}
