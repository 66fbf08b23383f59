"""The cache of a layer: what decoding keeps of the tokens that were read."""

from typing import Any, Optional

from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts.context import First, Keys


@struct.dataclass
class Cache:
  """A layer's keys and values; slot m holds the token at position m.

  With `turned` keys are held as [B, J, K, M] and values as [B, J, M, K], which
  the products with a token's queries take on CPU without a copy; `slots` and
  `memory` give them as they are elsewhere.

  An indexer's keys, one head of them, are held as the others are.

  Those of the memory are put in when a decoder is given it with the cache,
  and stand for it from then on. With context.keep_attention a layer also
  returns here what it weighed the values with, with model.value_residual the
  values of the first layer, with context.lends its keys and values, and in
  training what it adds to the loss, by name, whether or not a cache went in.
  """
  key_BMJK: Optional[jax.Array] = None  # None: it holds no keys of its own
  # None: a mixer's values are a part of its keys (latent.py).
  value_BMJK: Optional[jax.Array] = None
  index_BMJK: Optional[jax.Array] = None  # None: there is no indexer
  memory_key_BMJK: Optional[jax.Array] = None
  memory_value_BMJK: Optional[jax.Array] = None
  weights_BHLM: Optional[jax.Array] = None
  memory_weights_BHLM: Optional[jax.Array] = None
  first: Optional[First] = None
  lent: Optional[Keys] = None
  losses: dict[str, jax.Array] = struct.field(default_factory=dict)
  # The last inputs of convolutions, by name.
  inputs: dict[str, jax.Array] = struct.field(default_factory=dict)
  # Keys and values are [N, ...], of N layers: which of them this one is.
  layer: Optional[jax.Array] = None
  turned: bool = struct.field(pytree_node=False, default=False)

  @property
  def num_slots(self) -> int:
    return self.key_BMJK.shape[-1 if self.turned else -3]

  @property
  def slots(self) -> tuple[jax.Array, jax.Array, Optional[jax.Array]]:
    """Keys, values and the keys of an indexer, [B, M, J, K]."""
    slots = self.key_BMJK, self.value_BMJK, self.index_BMJK
    return self._plain(*slots) if self.layer is None else jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False),
        slots)

  @property
  def memory(self) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the memory, [B, M, J, K]."""
    return self._plain(self.memory_key_BMJK, self.memory_value_BMJK)

  def _plain(self, *arrays: Optional[jax.Array]):
    arrays = jax.tree.map(lambda x: _cast(x, jnp.uint16, jnp.bfloat16), arrays)
    return tuple(x if x is None else jnp.moveaxis(x, axis, 1)
                 for x, axis in zip(arrays, _TURNED.values())
                 ) if self.turned else arrays

  def turn(self) -> 'Cache':
    """Returns the cache of one layer as a loop over single tokens takes it on
    CPU: turned, unless its values are a part of its keys, and bfloat16 as bits,
    for a scatter would make float32 of all slots, and bfloat16 again."""
    turned = self.value_BMJK is not None
    def move(name: str, axis: int):
      return jax.tree.map(lambda x: jnp.moveaxis(
          _cast(x, jnp.bfloat16, jnp.uint16), 1, axis if turned else 1),
                          getattr(self, name))
    return self.replace(turned=turned, **{
        f'{of}{name}_BMJK': move(f'{of}{name}_BMJK', axis)
        for of in ('', 'memory_') for name, axis in _TURNED.items()
        if of + name != 'memory_index'})

  def write(self, key_BLJK: jax.Array, value_BLJK: Optional[jax.Array],
            positions_BL: jax.Array, index_BLJK: Optional[jax.Array] = None
            ) -> 'Cache':
    """Puts L new tokens at their positions (a row's are consecutive)."""
    def put(slots: Optional[jax.Array], new: Optional[jax.Array], axis: int):
      if new is None:
        return slots
      if slots.dtype == jnp.uint16:
        new = _cast(new.astype(jnp.bfloat16), jnp.bfloat16, jnp.uint16)
      return _put(slots, new.astype(slots.dtype), positions_BL, self.layer,
                  axis if self.turned else 1)
    return self.replace(
        key_BMJK=put(self.key_BMJK, key_BLJK, _TURNED['key']),
        value_BMJK=put(self.value_BMJK, value_BLJK, _TURNED['value']),
        index_BMJK=put(self.index_BMJK, index_BLJK, _TURNED['index']))


# The axis M of what is turned.
_TURNED = {'key': 3, 'value': 2, 'index': 3}


def _cast(x: jax.Array, of: jax.typing.DTypeLike, to: jax.typing.DTypeLike
          ) -> jax.Array:
  """Returns numbers of one type as bits of the other, others as they are."""
  return jax.lax.bitcast_convert_type(x, to) if x.dtype == of else x


def _put(slots: jax.Array, new_BLJK: jax.Array, positions_BL: jax.Array,
         layer: Optional[jax.Array], axis: int) -> jax.Array:
  """Returns slots, whose axis `axis` is M: [B, M, J, K], or with a layer [N, B,
  M, J, K]. A scatter over rows writes them where they lie; under vmap, XLA
  moves them for it on TPU. A turned token of a single row is written twice:
  written once, XLA's CPU backend copies all slots four times."""
  first = () if layer is None else (layer,)
  if len(positions_BL) > 1 or axis > 1:
    twice = 2 if axis > 1 and new_BLJK.shape[:2] == (1, 1) else 1
    rows_B1 = jnp.arange(len(new_BLJK))[:, None]
    between = (slice(None),) * (axis - 1)
    return slots.at[
        *first, rows_B1, *between, jnp.repeat(positions_BL, twice, 1)].set(
            jnp.repeat(new_BLJK, twice, 1), indices_are_sorted=True,
            unique_indices=twice == 1)
  return jax.lax.dynamic_update_slice(
      slots, new_BLJK.reshape((1,) * len(first) + new_BLJK.shape),
      (*first, 0, positions_BL[0, 0], 0, 0))


@struct.dataclass
class Both:
  """The entry of a layer that keeps more than its mixer does: the last tokens,
  if it reads n-grams (lookup.py), and the last results of its branches, by
  name, if those have convolutions."""
  mixer: Any
  memory: Any = None
  inputs: dict[str, jax.Array] = struct.field(default_factory=dict)


# Of each entry what Cache.write puts in, which it may have none of.
Slots = Optional[tuple[dict[str, Optional[jax.Array]], ...]]
_WRITTEN = 'key_BMJK', 'value_BMJK', 'index_BMJK'


def apart(entries: tuple) -> tuple[Slots, tuple]:
  """Returns the keys and values of entries, and the entries without."""
  def of(entry: Any):
    if isinstance(entry, Both):
      slots, rest = of(entry.mixer)
      return slots, entry.replace(mixer=rest)
    if not isinstance(entry, Cache):  # the arrays of a state
      return {}, entry
    return {name: getattr(entry, name) for name in _WRITTEN}, entry.replace(
        **dict.fromkeys(_WRITTEN), layer=None)
  slots, rest = zip(*map(of, entries))
  return slots, rest


def joined(slots: Slots, rest: tuple, layer: Optional[jax.Array] = None
           ) -> tuple:
  """Returns what `apart` was given; if `layer` is, entries of this layer, to
  which `rest` belongs, with the slots of all."""
  def of(entry: Any, written: dict[str, Optional[jax.Array]]):
    if isinstance(entry, Both):
      return entry.replace(mixer=of(entry.mixer, written))
    return entry if written.get('key_BMJK') is None else entry.replace(
        **written, layer=layer)
  return tuple(of(*x) for x in zip(rest, slots, strict=True))
