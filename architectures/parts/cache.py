"""The cache of a layer: what decoding keeps of the tokens that were read.

An entry of a model's cache is a LayerCache. In it stands what the mixer keeps:
a Cache of keys and values, or the state of a recurrence.
"""

from typing import Any, Optional

from flax import struct
import jax
import jax.numpy as jnp

# The axis M of keys, and of values, that are turned.
KEY_AXIS, VALUE_AXIS = 3, 2


@struct.dataclass
class Cache:
  """A layer's keys and values; slot m holds the token at position m.

  A single token's products with keys and values are quick on CPU where these
  lie in the products' order of axes: `turned` ones do, keys as [B, J, K, M] and
  values as [B, J, M, K]. `slots` and `memory` give them as they are elsewhere.

  Attributes:
    key_BMJK: the keys; None: the layer has none of its own.
    value_BMJK: the values; None: they are a part of the keys (latent.py).
    index_BMJK: the keys of an indexer, of one head; None: there is none.
    memory_key_BMJK: the keys of the memory, which are put in when a decoder is
      given it with the cache, and stand for it from then on.
    memory_value_BMJK: the values of the memory, likewise.
    inputs: the last inputs of convolutions, by name.
    layer: the arrays are [N, ...], of N layers: which of them this one is.
    turned: whether the axes are in the products' order.
  """
  key_BMJK: Optional[jax.Array] = None
  value_BMJK: Optional[jax.Array] = None
  index_BMJK: Optional[jax.Array] = None
  memory_key_BMJK: Optional[jax.Array] = None
  memory_value_BMJK: Optional[jax.Array] = None
  inputs: dict[str, jax.Array] = struct.field(default_factory=dict)
  layer: Optional[jax.Array] = None
  turned: bool = struct.field(pytree_node=False, default=False)

  @property
  def num_slots(self) -> int:
    """How many tokens there is room for."""
    return self.key_BMJK.shape[-1 if self.turned else -3]

  @property
  def slots(self) -> tuple[jax.Array, jax.Array, Optional[jax.Array]]:
    """Keys, values and the keys of an indexer, [B, M, J, K]."""
    slots = self.key_BMJK, self.value_BMJK, self.index_BMJK
    if self.layer is None:
      return self._upright(*slots)
    return jax.tree.map(self._row, slots)

  @property
  def memory(self) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the memory, [B, M, J, K]."""
    key, value, _ = self._upright(
        self.memory_key_BMJK, self.memory_value_BMJK)
    return key, value

  def _row(self, x_NBMJK: jax.Array) -> jax.Array:
    """Returns the row of the layer."""
    return jax.lax.dynamic_index_in_dim(x_NBMJK, self.layer, keepdims=False)

  def _upright(self, key: jax.Array, value: Optional[jax.Array],
               index: Optional[jax.Array] = None) -> tuple:
    """Returns the arrays with M as their second axis, as numbers."""
    if not self.turned:
      return key, value, index
    return (_moved(_from_bits(key), KEY_AXIS, 1),
            _moved(_from_bits(value), VALUE_AXIS, 1),
            _moved(_from_bits(index), KEY_AXIS, 1))

  def turn(self) -> 'Cache':
    """Returns the cache of one layer as a loop over single tokens takes it on
    CPU: turned, unless its values are a part of its keys, and bfloat16 as bits,
    for a scatter would make float32 of all slots, and bfloat16 again."""
    turned = self.value_BMJK is not None
    key_axis = KEY_AXIS if turned else 1
    value_axis = VALUE_AXIS if turned else 1
    return self.replace(
        turned=turned,
        key_BMJK=_moved(_to_bits(self.key_BMJK), 1, key_axis),
        value_BMJK=_moved(_to_bits(self.value_BMJK), 1, value_axis),
        index_BMJK=_moved(_to_bits(self.index_BMJK), 1, key_axis),
        memory_key_BMJK=_moved(_to_bits(self.memory_key_BMJK), 1, key_axis),
        memory_value_BMJK=_moved(
            _to_bits(self.memory_value_BMJK), 1, value_axis))

  def write(self, key_BLJK: jax.Array, value_BLJK: Optional[jax.Array],
            positions_BL: jax.Array, index_BLJK: Optional[jax.Array] = None
            ) -> 'Cache':
    """Puts L new tokens at their positions (a row's are consecutive)."""
    key_axis = KEY_AXIS if self.turned else 1
    value_axis = VALUE_AXIS if self.turned else 1
    return self.replace(
        key_BMJK=self._put(
            self.key_BMJK, key_BLJK, positions_BL, key_axis),
        value_BMJK=self._put(
            self.value_BMJK, value_BLJK, positions_BL, value_axis),
        index_BMJK=self._put(
            self.index_BMJK, index_BLJK, positions_BL, key_axis))

  def _put(self, slots: Optional[jax.Array], new_BLJK: Optional[jax.Array],
           positions_BL: jax.Array, axis: int) -> Optional[jax.Array]:
    """Returns slots, whose axis `axis` is M, with the new tokens in them."""
    if new_BLJK is None:
      return slots
    if slots.dtype == jnp.uint16:
      new_BLJK = _to_bits(new_BLJK.astype(jnp.bfloat16))
    new_BLJK = new_BLJK.astype(slots.dtype)
    # The slots of several layers are [N, B, M, J, K].
    layer = () if self.layer is None else (self.layer,)
    if len(positions_BL) > 1 or axis > 1:
      return _scattered(slots, new_BLJK, positions_BL, layer, axis)
    new = new_BLJK.reshape((1,) * len(layer) + new_BLJK.shape)
    return jax.lax.dynamic_update_slice(
        slots, new, (*layer, 0, positions_BL[0, 0], 0, 0))


def _scattered(slots: jax.Array, new_BLJK: jax.Array, positions_BL: jax.Array,
               layer: tuple[jax.Array, ...], axis: int) -> jax.Array:
  """Returns slots with the new tokens of each row at its positions.

  A scatter over rows writes them where they lie; under vmap, XLA moves them for
  it on TPU. A turned token of a single row is written twice: written once,
  XLA's CPU backend copies all slots four times.
  """
  single = new_BLJK.shape[:2] == (1, 1)
  times = 2 if axis > 1 and single else 1
  rows_B1 = jnp.arange(len(new_BLJK))[:, None]
  between = (slice(None),) * (axis - 1)
  places = *layer, rows_B1, *between, jnp.repeat(positions_BL, times, 1)
  return slots.at[places].set(
      jnp.repeat(new_BLJK, times, 1), indices_are_sorted=True,
      unique_indices=times == 1)


def _moved(x: Optional[jax.Array], source: int, target: int
           ) -> Optional[jax.Array]:
  """Returns x with an axis moved; None: there is no array."""
  return None if x is None else jnp.moveaxis(x, source, target)


def _to_bits(x: Optional[jax.Array]) -> Optional[jax.Array]:
  """Returns numbers in bfloat16 as bits, others as they are."""
  if x is None or x.dtype != jnp.bfloat16:
    return x
  return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _from_bits(x: Optional[jax.Array]) -> Optional[jax.Array]:
  """Returns bits as the numbers in bfloat16 that they are, others as they are.
  """
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


# The arrays that Cache.write puts into an entry, by name; {}: its mixer keeps a
# state.
Slots = Optional[tuple[dict[str, Optional[jax.Array]], ...]]


def apart(entries: tuple[LayerCache, ...]) -> tuple[Slots, tuple]:
  """Returns the keys and values of entries, and the entries without."""
  slots, rest = [], []
  for entry in entries:
    cache, written = entry.mixer, {}
    if isinstance(cache, Cache):
      written = dict(key_BMJK=cache.key_BMJK, value_BMJK=cache.value_BMJK,
                     index_BMJK=cache.index_BMJK)
      cache = cache.replace(key_BMJK=None, value_BMJK=None, index_BMJK=None,
                            layer=None)
    slots.append(written)
    rest.append(entry.replace(mixer=cache))
  return tuple(slots), tuple(rest)


def joined(slots: Slots, rest: tuple[LayerCache, ...],
           layer: Optional[jax.Array] = None) -> tuple[LayerCache, ...]:
  """Returns what `apart` was given; if `layer` is, entries of this layer, to
  which `rest` belongs, with the slots of all."""
  entries = []
  for entry, written in zip(rest, slots, strict=True):
    if written.get('key_BMJK') is not None:
      cache = entry.mixer.replace(**written, layer=layer)
      entry = entry.replace(mixer=cache)
    entries.append(entry)
  return tuple(entries)
