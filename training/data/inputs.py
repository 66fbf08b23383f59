"""What a caller from Python gives a model, checked and as arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.errors import require, short
from training import limits

# Of each stack, the names of inputs and of the module's arguments.
NAMES = {
    'decoder': dict(tokens='tokens_BL', mask='segment_ids_BL'),
    'encoder': dict(tokens='tokens_BL', mask='segment_ids_BL',
                    types='type_ids_BL'),
    'encoder-decoder': dict(
        tokens='tokens_BM', mask='segment_ids_BM',
        decoder_tokens='decoder_tokens_BL',
        decoder_mask='decoder_segment_ids_BL'),
}


def arrays(stack: str, given: Mapping[str, Any], vocab_size: int
           ) -> dict[str, jax.Array]:
  """Returns the module's arguments by name, int32 [B, L]; [L] is one row.

  Args:
    stack: as of `architectures.stack`.
    given: by the first names of NAMES: tokens and decoder_tokens, which are
      ids; masks, types.
    vocab_size: how many ids the model has.

  Raises:
    RequestError: for what is none, or is not as long as its tokens.
  """
  names = NAMES[stack]
  for name in given:
    require(name in names, f'a {stack} takes no input {name!r}: choose from '
            f'{", ".join(names)}')
  found = {name: _rows(name, value) for name, value in given.items()}
  for name, array in found.items():
    if name in ('tokens', 'decoder_tokens'):
      require(jnp.issubdtype(array.dtype, jnp.integer), f'{name} has numbers '
              f'of {array.dtype}, and ids are integers')
      limits.ids(name, array, vocab_size)
    like = ('decoder_tokens' if name == 'decoder_mask'
            and 'decoder_tokens' in found else 'tokens')
    if name == 'decoder_tokens':
      require(len(array) == len(found[like]), f'decoder_tokens has '
              f'{len(array)} rows, and tokens {len(found[like])}')
    else:
      require(array.shape == found[like].shape, f'{name} is of the shape '
              f'{array.shape}, and {like} of {found[like].shape}')
    if name in ('mask', 'decoder_mask'):
      _at_the_end(name, array)
  return {names[name]: jnp.asarray(array, jnp.int32)
          for name, array in found.items()}


def _at_the_end(name: str, mask: Any) -> None:
  """Raises RequestError for a mask that hides tokens before others: positions
  count from the start of a row. A traced mask passes: it is not known."""
  if isinstance(mask, jax.core.Tracer):
    return
  real = np.asarray(mask) != 0
  wrong = np.flatnonzero((real[:, 1:] & ~real[:, :-1]).any(1))
  require(not wrong.size, f'{name} has a 0 before a 1 in row '
          f'{wrong[:1].sum()}: it is 0 on padding, at the end of a row')


def _rows(name: str, value: Any) -> Any:
  """Returns an array [B, L] of numbers, of jax or of numpy."""
  try:
    array = value if isinstance(value, jax.Array) else np.asarray(value)
  except (TypeError, ValueError):  # rows of unequal lengths
    array = np.zeros(0)
  require(array.ndim in (1, 2) and array.size > 0
          and (array.dtype == bool or jnp.issubdtype(array.dtype, jnp.number)),
          f'{name} is {short(value)}: pass numbers, in one row or in rows of '
          'one length')
  return array if array.ndim == 2 else array[None]
