"""A decoder with its cache: it is shown tokens, and draws the one after them.

What the cache holds already is not computed again. Tokens are read in pieces of
a few sizes, so that few programs are compiled, whatever the lengths of the
messages; a single new token is a piece, too. A state cannot take back what it
has read: where the text is another, all of it is read again.
"""

from collections.abc import Sequence
import contextlib
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import mixers
from architectures.parts import skeletons
from architectures.parts.moe.layer import without_capacity
from training import generate, limits, progress

# So many tokens are read at once; what is left of the last piece is padding,
# which the next tokens overwrite.
PIECES = (1, 32, 256)


class Engine:
  """One row of text, and what draws from it.

  Attributes:
    context: how many tokens the cache holds.
    num_read: how many tokens were read so far, padding apart.
    sizes: the sizes of the pieces that were read: one program each.
  """

  def __init__(self, module: nn.Module, params: Any, context: int,
               sampling: generate.Sampling, seed: int = 0):
    config = without_capacity(module.config)  # type: ignore[attr-defined]
    self._module = module.clone(config=config)
    self._sampling = sampling
    self._apart = config.num_decoder_layers <= generate.UNROLLED_LAYERS
    self._params = params
    self._cache = architectures.init_cache(config, 1, context)
    if self._apart:
      self._params, self._cache = jax.jit(skeletons.one_by_one)(
          params, self._cache)
    self._key, self._drawn = jax.random.key(seed), 0
    self._ids = np.zeros(0, np.int32)  # what the cache holds
    self._state = mixers.with_state(config)
    self._whole = True  # whether a state has read `_ids` and no more
    self.context, self.num_read = context, 0
    self.sizes: set[int] = set()

  def draw(self, ids: Sequence[int] | np.ndarray) -> int:
    """Returns the token drawn after `ids`, int32 [T], of which T <= context.

    From the first one on that differs from what the cache holds, they are read.
    """
    ids = np.asarray(ids, np.int32)
    assert 0 < len(ids) <= self.context
    limits.ids('the text', ids, self._module.config.vocab_size)
    start = _shared(self._ids, ids[:-1])
    if self._state and not (self._whole and start == len(self._ids)):
      self._cache = jax.tree.map(jnp.zeros_like, self._cache)
      start = 0
    self._key, key = jax.random.split(self._key)
    seen_1V = None
    if self._sampling.remembers:
      seen_1V = np.zeros((1, self._module.config.vocab_size), bool)
      seen_1V[0, ids] = True
    while start < len(ids):
      # The program of single tokens comes first: while an answer stands on a
      # line of the terminal, nothing must be compiled, which is shown there.
      size = (self._size(len(ids) - start, self.context - start)
              if self.sizes else 1)
      piece = ids[start:start + size]
      tokens_1P = np.zeros((1, size), np.int32)
      tokens_1P[0, :len(piece)] = piece
      # Should the next line not return.
      self._ids, self._whole = ids[:start], False
      with (contextlib.nullcontext() if size in self.sizes
            else progress.during('compiling')):
        token, self._cache = _read(
            self._module, self._sampling, self._apart, self._params,
            self._cache, tokens_1P, np.int32(start), np.int32(len(piece) - 1),
            key, seen_1V, self._state)
      self.sizes.add(size)
      self.num_read += len(piece)
      start += len(piece)
      self._ids, self._whole = ids[:start], True
    return int(token)

  @staticmethod
  def _size(left: int, room: int) -> int:
    """The size of the next piece: one that takes all that is left, and else
    the largest that this fills. Its padding needs room, too."""
    enough = [size for size in PIECES if left <= size <= room]
    return enough[0] if enough else max(
        size for size in PIECES if size <= left)


def _shared(a: np.ndarray, b: np.ndarray) -> int:
  """Returns how many ids two arrays begin with alike."""
  size = min(len(a), len(b))
  different = np.flatnonzero(a[:size] != b[:size])
  return int(different[0]) if different.size else size


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 10),
                   donate_argnums=4)
def _read(module: nn.Module, sampling: generate.Sampling, apart: bool,
          params: Any, cache: Any, tokens_1P: jax.Array, start: jax.Array,
          last: jax.Array, key: jax.Array, seen_1V: jax.Array | None,
          state: bool) -> tuple[jax.Array, Any]:
  """Puts tokens into the cache from slot `start` on; returns what is drawn
  after the token `last` of them, and the cache. A `state` is told that those
  after it are padding."""
  positions_1P = start + jnp.arange(tokens_1P.shape[1])[None]
  options = {}
  if state:
    options['valid_BL'] = (
        jnp.arange(tokens_1P.shape[1])[None] <= last).astype(jnp.int32)
  output: Any = module.apply(
      {'params': params}, tokens_1P, positions_BL=positions_1P, cache=cache,
      one_by_one=apart, **options)
  last_11D = jax.lax.dynamic_slice_in_dim(output.hidden, last, 1, 1)
  logits_1V = output.head.logits(last_11D)[:, 0]
  return sampling(logits_1V, key, seen_1V)[0], output.cache
