"""The cache of a layer: what decoding keeps of the tokens that were read.

A model's cache holds one LayerCache for each layer. In it stands what the mixer
of the layer keeps: a Cache of keys and values, or the state of a recurrence.
"""

import functools
from typing import Any, Optional

from flax import struct
import jax
import jax.numpy as jnp

# Arrays of a cache are [B, M, J, K], where M numbers the slots, one for each
# token. In reordered arrays, [B, J, K, M] of keys and [B, J, M, K] of values, M
# is at these axes. The other arrays have it at SLOT_AXIS.
SLOT_AXIS = 1
SLOT_AXIS_OF_REORDERED_KEYS = 3
SLOT_AXIS_OF_REORDERED_VALUES = 2


@struct.dataclass
class Cache:
  """A layer's keys and values; slot m holds the token at position m.

  On CPU, a single token is multiplied with keys and values faster where the
  axes of these lie in the order of the product. Such a cache is `reordered`:
  its keys are [B, J, K, M] and its values [B, J, M, K]. The properties `slots`
  and `memory` return [B, M, J, K] in either case.

  Attributes:
    key_BMJK: the keys; None: the layer has none of its own.
    value_BMJK: the values; None: they are a part of the keys (latent.py).
    index_BMJK: the keys of an indexer, of one head; None: there is none.
    forget_BMHU: the sums of the logarithms of forget gates (steps.py), float32,
      with U = 1; None: there are no such gates.
    memory_key_BMJK: the keys of the memory (an encoder's output, to which a
      decoder attends). They are written when the decoder is called with both
      the memory and the cache, and replace the memory from then on.
    memory_value_BMJK: the values of the memory, likewise.
    inputs: the last inputs of convolutions, by name.
    layer: the index of the layer, if the arrays are [N, ...] and hold those of
      N layers; None: they hold one layer.
    is_reordered: whether the axes are in the order of the products.
  """
  key_BMJK: Optional[jax.Array] = None
  value_BMJK: Optional[jax.Array] = None
  index_BMJK: Optional[jax.Array] = None
  forget_BMHU: Optional[jax.Array] = None
  memory_key_BMJK: Optional[jax.Array] = None
  memory_value_BMJK: Optional[jax.Array] = None
  inputs: dict[str, jax.Array] = struct.field(default_factory=dict)
  layer: Optional[jax.Array] = None
  is_reordered: bool = struct.field(pytree_node=False, default=False)

  @property
  def num_slots(self) -> int:
    """How many tokens there is room for."""
    return self.key_BMJK.shape[-1 if self.is_reordered else -3]

  @property
  def slots(self) -> tuple[jax.Array, jax.Array, Optional[jax.Array]]:
    """Keys, values and the keys of an indexer, [B, M, J, K]."""
    slots = self.key_BMJK, self.value_BMJK, self.index_BMJK
    if self.layer is None:
      return self._in_slot_order(*slots)
    return jax.tree.map(self._select_layer, slots)

  @property
  def forget_slots(self) -> Optional[jax.Array]:
    """The sums of the logarithms of forget gates, [B, M, H, 1]."""
    if self.layer is None or self.forget_BMHU is None:
      return self.forget_BMHU
    return self._select_layer(self.forget_BMHU)

  @property
  def memory(self) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the memory, [B, M, J, K]."""
    key, value, _ = self._in_slot_order(
        self.memory_key_BMJK, self.memory_value_BMJK)
    return key, value

  def _select_layer(self, x_NBMJK: jax.Array) -> jax.Array:
    """Returns this layer's row of an array that holds those of N layers."""
    return jax.lax.dynamic_index_in_dim(x_NBMJK, self.layer, keepdims=False)

  def _in_slot_order(self, key: jax.Array, value: Optional[jax.Array],
                     index: Optional[jax.Array] = None) -> tuple:
    """Brings keys and values from the order of axes in which the cache keeps
    them to the usual one.

    Args:
      key: the keys, as this cache keeps them.
      value: the values, as this cache keeps them; None: they are a part of the
        keys.
      index: the keys of an indexer (the small attention that chooses keys), as
        this cache keeps them; None: there is no indexer.

    Returns:
      The three as [batch, slots (places for a token), heads, features]. Numbers
      that were kept as the bits of bfloat16 are numbers again.
    """
    if not self.is_reordered:
      return key, value, index
    return (
        _move_axis(_bits_to_bfloat16(key), SLOT_AXIS_OF_REORDERED_KEYS,
                   SLOT_AXIS),
        _move_axis(_bits_to_bfloat16(value), SLOT_AXIS_OF_REORDERED_VALUES,
                   SLOT_AXIS),
        _move_axis(_bits_to_bfloat16(index), SLOT_AXIS_OF_REORDERED_KEYS,
                   SLOT_AXIS))

  def _slot_axes(self) -> tuple[int, int]:
    """Returns which axis of the keys, and which of the values, is M."""
    if self.is_reordered:
      return SLOT_AXIS_OF_REORDERED_KEYS, SLOT_AXIS_OF_REORDERED_VALUES
    return SLOT_AXIS, SLOT_AXIS

  def reorder_for_single_tokens(self) -> 'Cache':
    """Returns this cache of one layer in a form that is fast on CPU, where text
    is generated one token at a time.

    The axes get the order that attention's products read, unless the values are
    a part of the keys. Numbers in bfloat16 are kept as their bits, in uint16:
    otherwise XLA's CPU backend would convert the whole cache to float32 and
    back for each token that is written.

    The suffixes name axes: B batch, M slots (places for a token), J heads, K
    features of a head.
    """
    # A cache of the new order knows where its slots stand.
    is_reordered = self.value_BMJK is not None
    key_axis, value_axis = self.replace(is_reordered=is_reordered)._slot_axes()
    return self.replace(
        is_reordered=is_reordered,
        key_BMJK=_move_axis(
            _bfloat16_to_bits(self.key_BMJK), SLOT_AXIS, key_axis),
        value_BMJK=_move_axis(
            _bfloat16_to_bits(self.value_BMJK), SLOT_AXIS, value_axis),
        index_BMJK=_move_axis(
            _bfloat16_to_bits(self.index_BMJK), SLOT_AXIS, key_axis),
        memory_key_BMJK=_move_axis(
            _bfloat16_to_bits(self.memory_key_BMJK), SLOT_AXIS, key_axis),
        memory_value_BMJK=_move_axis(
            _bfloat16_to_bits(self.memory_value_BMJK), SLOT_AXIS, value_axis))

  def write(self, key_BLJK: jax.Array, value_BLJK: Optional[jax.Array],
            positions_BL: jax.Array, index_BLJK: Optional[jax.Array] = None,
            forget_BLHU: Optional[jax.Array] = None) -> 'Cache':
    """Writes the keys and values of new tokens into the cache.

    The suffixes name axes: B batch, L new tokens, J heads, K features of a
    head, M slots (places for a token), H heads of queries, U = 1.

    Args:
      key_BLJK: the keys of the new tokens.
      value_BLJK: their values; None: they are a part of the keys.
      positions_BL: their positions, which must be consecutive in each row.
      index_BLJK: their keys for an indexer (the small attention that chooses
        keys); None: there is no indexer.
      forget_BLHU: their sums of the logarithms of forget gates; None: there are
        no such gates.

    Returns:
      The cache with the new tokens.
    """
    # All arrays are written at the same positions. The axis of the slots is
    # another one where the cache is reordered for single tokens.
    key_axis, value_axis = self._slot_axes()
    write = functools.partial(self._write_array, positions_BL=positions_BL)
    return self.replace(
        key_BMJK=write(
            self.key_BMJK, new_BLJK=key_BLJK, slot_axis=key_axis),
        value_BMJK=write(
            self.value_BMJK, new_BLJK=value_BLJK, slot_axis=value_axis),
        index_BMJK=write(
            self.index_BMJK, new_BLJK=index_BLJK, slot_axis=key_axis),
        forget_BMHU=write(
            self.forget_BMHU, new_BLJK=forget_BLHU, slot_axis=SLOT_AXIS))

  def _write_array(self, slots: Optional[jax.Array],
                   new_BLJK: Optional[jax.Array], positions_BL: jax.Array,
                   slot_axis: int) -> Optional[jax.Array]:
    """Writes new tokens into one array of the cache.

    The letters name axes: B batch, M slots (places for a token), J heads, K
    features of a head, L new tokens.

    Args:
      slots: the array, [B, M, J, K] or in another order. If it holds several
        layers, their axis stands in front.
      new_BLJK: the new tokens; None: `slots` is returned unchanged.
      positions_BL: the positions of the new tokens.
      slot_axis: which axis of one layer's array is M.

    Returns:
      The array with the new tokens.
    """
    if new_BLJK is None:
      return slots
    # Bring the new tokens to the type of the array, which may be the bits of
    # bfloat16.
    if slots.dtype == jnp.uint16:
      new_BLJK = _bfloat16_to_bits(new_BLJK.astype(jnp.bfloat16))
    new_BLJK = new_BLJK.astype(slots.dtype)
    # If the array holds several layers, the index of the layer comes first.
    layer = () if self.layer is None else (self.layer,)
    has_several_rows = len(positions_BL) > 1
    if has_several_rows or slot_axis > 1:
      return _scatter_tokens(slots, new_BLJK=new_BLJK,
                             positions_BL=positions_BL, layer=layer,
                             slot_axis=slot_axis)
    # The tokens of a single row are one slice, as their positions are
    # consecutive.
    new = new_BLJK.reshape((1,) * len(layer) + new_BLJK.shape)
    return jax.lax.dynamic_update_slice(
        slots, new, (*layer, 0, positions_BL[0, 0], 0, 0))


def _scatter_tokens(slots: jax.Array, new_BLJK: jax.Array,
                    positions_BL: jax.Array, layer: tuple[jax.Array, ...],
                    slot_axis: int) -> jax.Array:
  """Writes new tokens into an array of the key-value cache, each row of the
  batch at its own positions.

  The letters name axes: B rows, M slots (places for a token), J heads, K
  features of a head, L new tokens.

  Args:
    slots: the array, [B, M, J, K], or with M at `slot_axis`. If it has several
      layers, their axis stands in front.
    new_BLJK: the keys or values of the new tokens.
    positions_BL: the positions of the new tokens, which are their slots.
    layer: (index of the layer,) if the array holds several layers, else ().
    slot_axis: which axis of one layer's array is M.

  Returns:
    The array with the tokens, of the same shape.
  """
  # A single token of a reordered array is written twice: if it were written
  # once, XLA's CPU backend would copy all slots four times.
  is_single_token = new_BLJK.shape[:2] == (1, 1)
  times_written = 2 if slot_axis > 1 and is_single_token else 1
  new_BLJK = jnp.repeat(new_BLJK, times_written, 1)
  positions_BL = jnp.repeat(positions_BL, times_written, 1)
  # The index of each token: its layer, its row, all of what stands between, and
  # its slot. Rows are indexed and not vmapped, as XLA would otherwise move all
  # slots on TPU.
  rows_B1 = jnp.arange(len(new_BLJK))[:, None]
  axes_between = (slice(None),) * (slot_axis - 1)
  index = *layer, rows_B1, *axes_between, positions_BL
  return slots.at[index].set(
      new_BLJK, indices_are_sorted=True, unique_indices=times_written == 1)


def _move_axis(x: Optional[jax.Array], source: int, target: int
               ) -> Optional[jax.Array]:
  """Returns x with one axis moved; None stays None."""
  return None if x is None else jnp.moveaxis(x, source, target)


def _bfloat16_to_bits(x: Optional[jax.Array]) -> Optional[jax.Array]:
  """Returns an array of bfloat16 as its bits, in uint16, and any other as it
  is."""
  if x is None or x.dtype != jnp.bfloat16:
    return x
  return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _bits_to_bfloat16(x: Optional[jax.Array]) -> Optional[jax.Array]:
  """Returns the numbers in bfloat16 whose bits are an array of uint16, and any
  other array as it is."""
  if x is None or x.dtype != jnp.uint16:
    return x
  return jax.lax.bitcast_convert_type(x, jnp.bfloat16)


@struct.dataclass
class LayerCache:
  """The cache of one layer: all that it keeps of the tokens that it has read.

  Attributes:
    mixer: what its mixer keeps: a Cache, or a state.
    memory: the last tokens, of a layer that reads n-grams (lookup.py).
    inputs: the last results of its branches, by name, if these have
      convolutions.
  """
  mixer: Any
  memory: Any = None
  inputs: dict[str, jax.Array] = struct.field(default_factory=dict)


# For each entry of a cache, the arrays that Cache.write changes, by the name of
# their field; {} where the mixer of the layer keeps a state.
SlotsOfEntries = Optional[tuple[dict[str, Optional[jax.Array]], ...]]


def split_off_slots(entries: tuple[LayerCache, ...]
                    ) -> tuple[SlotsOfEntries, tuple]:
  """Splits the caches of layers into their arrays of keys and values, which a
  scan over the layers updates in place, and everything else.

  The suffixes name axes: B batch, M slots (places for a token), J heads of
  keys, K features of a head, H heads of queries, U = 1.

  Args:
    entries: the cache of each layer, or of each stack of layers.

  Returns:
    Two tuples with an element for each entry: its keys and values, by the names
    of their fields, {} where it has none; and the entry with None in their
    place. `put_slots_back` is the inverse.
  """
  slots, entries_without_slots = [], []
  for entry in entries:
    # Only attention has keys and values; a recurrence keeps a state, which
    # stays in its entry.
    cache = entry.mixer
    arrays = {}
    if isinstance(cache, Cache):
      arrays = dict(key_BMJK=cache.key_BMJK, value_BMJK=cache.value_BMJK,
                    index_BMJK=cache.index_BMJK,
                    forget_BMHU=cache.forget_BMHU)
      cache = cache.replace(key_BMJK=None, value_BMJK=None, index_BMJK=None,
                            forget_BMHU=None, layer=None)
    slots.append(arrays)
    entries_without_slots.append(entry.replace(mixer=cache))
  return tuple(slots), tuple(entries_without_slots)


def put_slots_back(slots: SlotsOfEntries,
                   entries_without_slots: tuple[LayerCache, ...],
                   layer: Optional[jax.Array] = None
                   ) -> tuple[LayerCache, ...]:
  """Puts the keys and values of layers back into their caches. This is the
  inverse of `split_off_slots`.

  In a scan over N layers, the arrays are those of all of them, [N, B, M, ...],
  with B rows of the batch and M slots. The cache of layer `layer` then holds
  them whole, and its field `layer` says which row of N is its own: Cache.write
  changes this row alone.

  Args:
    slots: the keys and values of each layer, by the names of their fields; {}
      for a layer that has none, such as a recurrence.
    entries_without_slots: the caches of the layers without these.
    layer: the index of the layer, if `slots` are arrays of several layers
      [N, ...] and the caches belong to one of them; None: the arrays hold one
      layer.

  Returns:
    The caches, with the keys and values.
  """
  entries = []
  for entry, arrays in zip(entries_without_slots, slots, strict=True):
    # A layer whose attention has a cache has keys in it. Other layers have no
    # slots, and their caches are complete: a recurrence has a state, and a
    # layer that reads the keys of another one has nothing.
    if arrays.get('key_BMJK') is None:
      entries.append(entry)
      continue
    cache_of_attention = entry.mixer.replace(**arrays, layer=layer)
    entries.append(entry.replace(mixer=cache_of_attention))
  return tuple(entries)
