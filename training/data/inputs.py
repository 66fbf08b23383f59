"""The inputs that a caller from Python gives a model, checked and as arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import require, shorten

# By what a model stacks: how a caller names an input, and the argument of the
# module that takes it.
ARGUMENT_OF_INPUT = {
    'decoder': dict(tokens='tokens_BL', mask='segment_ids_BL'),
    'encoder': dict(tokens='tokens_BL', mask='segment_ids_BL',
                    types='type_ids_BL'),
    'encoder-decoder': dict(
        tokens='tokens_BM', mask='segment_ids_BM',
        decoder_tokens='decoder_tokens_BL',
        decoder_mask='decoder_segment_ids_BL'),
}


def arguments_of_module(stack: str, values: Mapping[str, Any], vocab_size: int
                        ) -> dict[str, jax.Array]:
  """Checks the inputs of a model, and names them as its arguments.

  Args:
    stack: what the model stacks, as `architectures.stack` names it.
    values: {tokens, decoder_tokens, mask, decoder_mask or types: an array [B,
      L], or [L] for one row}.
    vocab_size: the number of token ids of the model.

  Returns:
    {argument of the model: int32 [B, L]}.

  Raises:
    RequestError: for a value that is not such an array, or is not as long as
      its tokens.
  """
  names = ARGUMENT_OF_INPUT[stack]
  for name in values:
    require(name in names, f'a {stack} takes no input {name!r}: choose from '
            f'{", ".join(names)}')
  values = {name: array_of_rows(name, value) for name, value in values.items()}

  # Check each array by itself and against the tokens that it belongs to.
  for name, array in values.items():
    require(array.size > 0, f'{name} is empty')
    # An array is as long as its tokens. The two sides of an encoder-decoder
    # share only the number of rows.
    tokens = values['tokens']
    if name == 'decoder_mask':
      tokens = values.get('decoder_tokens', tokens)
    shared_axes = 2
    if name == 'decoder_tokens':
      shared_axes = 1
    fits = array.shape[:shared_axes] == tokens.shape[:shared_axes]
    require(fits, f'{name} is of the shape {array.shape}, and its tokens of '
            f'{tokens.shape}')

    # The values of an array that JAX traces are not known yet, so they pass.
    if name.endswith('tokens'):
      check_ids(name, tokens=array, vocab_size=vocab_size)
    if name.endswith('mask') and not isinstance(array, jax.core.Tracer):
      real_BL = np.asarray(array) != 0
      begins_again = real_BL[:, 1:] & ~real_BL[:, :-1]
      require(not begins_again.any(), f'{name} has a 0 before a 1: it is 0 on '
              'padding, at the end of a row, since positions count from its '
              'start')
  return {names[name]: jnp.asarray(array, jnp.int32)
          for name, array in values.items()}


def array_of_rows(name: str, value: Any) -> Any:
  """Converts numbers to an array [B, L], B rows of L numbers. A single row may
  be given as [L].

  Args:
    name: the name of the input, for messages.
    value: the numbers, as a list, lists of lists or an array. An array of JAX
      stays one, all else becomes one of numpy.

  Raises:
    RequestError: for a value that is not such an array.
  """
  # An array of JAX may be traced, and is left as it is. Rows of unequal lengths
  # do not make an array: an array without axes takes its place, which is
  # refused below.
  array = value
  if not isinstance(value, jax.Array):
    try:
      array = np.asarray(value)
    except (TypeError, ValueError):
      array = np.zeros(())
  is_numbers = array.dtype == bool or jnp.issubdtype(array.dtype, jnp.number)
  require(is_numbers and array.ndim in (1, 2), f'{name} is {shorten(value)}: '
          'pass numbers, in one row or in rows of one length')
  if array.ndim == 1:
    return array[None]
  return array


def check_ids(name: str, tokens: Any, vocab_size: int) -> None:
  """Checks that each token id has a row in the table of embeddings: for one
  that has none, JAX would silently take another row.

  Args:
    name: the name of the input, for messages.
    tokens: the ids, of any shape. Ids that JAX traces pass, as their values are
      not known yet.
    vocab_size: the number of token ids of the model.

  Raises:
    RequestError: for an id without a row, and for numbers that are no integers.
  """
  if not isinstance(tokens, jax.Array):
    tokens = np.asarray(tokens)
  require(tokens.size == 0 or jnp.issubdtype(tokens.dtype, jnp.integer),
          f'{name} has numbers of {tokens.dtype}, and ids are integers')
  if isinstance(tokens, jax.core.Tracer):
    return
  tokens = np.asarray(tokens)
  wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
  require(not wrong.size, f'{name} has the id {wrong[:1].sum()}, which this '
          f'model does not have: its ids are 0 to {vocab_size - 1}')
