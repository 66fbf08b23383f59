"""What attention keeps of the tokens that it has read: keys and values."""

from typing import Any, Optional

from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts import sharding


@struct.dataclass
class First:
  """The values of the first layer, on their way to the others."""
  value_BLJK: jax.Array
  known: jax.Array  # bool: whether a layer has made them yet


@struct.dataclass
class Keys:
  """Keys and values of a layer, on their way to those that read them too."""
  key_BMJK: jax.Array
  value_BMJK: jax.Array
  # Whether a cache went into the layer that they are of.
  cached: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Cache:
  """A layer's keys and values; slot m holds the token at position m.

  With `turned` keys are held as [B, J, K, M] and values as [B, J, M, K], which
  the products with a token's queries take on CPU without a copy. After `turn`
  those of bfloat16 are held as their bits, which XLA can write where they lie.
  `slots` gives both as they are elsewhere.

  Those of the memory are put in when a decoder is given it with the cache,
  and stand for it from then on. With context.keep_attention a layer also
  returns here what it weighed the values with, with model.value_residual the
  values of the first layer, and with context.lends its keys and values, whether
  or not a cache went in.
  """
  key_BMJK: Optional[jax.Array]  # None: it holds no keys of its own
  # None: a mixer's values are a part of its keys (latent.py).
  value_BMJK: Optional[jax.Array] = None
  memory_key_BMJK: Optional[jax.Array] = None
  memory_value_BMJK: Optional[jax.Array] = None
  weights_BHLM: Optional[jax.Array] = None
  memory_weights_BHLM: Optional[jax.Array] = None
  first: Optional[First] = None
  lent: Optional[Keys] = None
  # The last inputs of convolutions, by name.
  inputs: dict[str, jax.Array] = struct.field(default_factory=dict)
  # Keys and values are [N, ...], of N layers: which of them this one is.
  layer: Optional[jax.Array] = None
  turned: bool = struct.field(pytree_node=False, default=False)

  @property
  def num_slots(self) -> int:
    return self.key_BMJK.shape[-1 if self.turned else -3]

  @property
  def slots(self) -> tuple[jax.Array, jax.Array]:
    """Keys and values, [B, M, J, K]."""
    if self.layer is None:
      return self._plain(self.key_BMJK, self.value_BMJK)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(
        x, self.layer, keepdims=False), (self.key_BMJK, self.value_BMJK))

  @property
  def memory(self) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the memory, [B, M, J, K]."""
    return self._plain(self.memory_key_BMJK, self.memory_value_BMJK)

  def _plain(self, key: jax.Array, value: jax.Array):
    key, value = jax.tree.map(_from_bits, (key, value))
    if not self.turned:
      return key, value
    return jnp.moveaxis(key, 3, 1), jnp.moveaxis(value, 2, 1)

  def turn(self) -> 'Cache':
    """Returns a cache of one layer, not turned, as a loop over single tokens
    holds it: as `turned` says, unless it has no keys or its values are a part
    of them."""
    key, value = jax.tree.map(_to_bits, (self.key_BMJK, self.value_BMJK))
    if value is None:
      return self.replace(key_BMJK=key)
    move = lambda x, to: None if x is None else jnp.moveaxis(x, 1, to)
    return self.replace(
        key_BMJK=move(key, 3), value_BMJK=move(value, 2),
        memory_key_BMJK=move(self.memory_key_BMJK, 3),
        memory_value_BMJK=move(self.memory_value_BMJK, 2), turned=True)

  def write(self, key_BLJK: jax.Array, value_BLJK: Optional[jax.Array],
            positions_BL: jax.Array) -> 'Cache':
    """Puts L new tokens at their positions (a row's are consecutive)."""
    def put(slots: Optional[jax.Array], new: Optional[jax.Array], axis: int):
      if new is None:
        return slots
      new = _like(new, slots)
      if self.turned:
        return _put_turned(slots, new, positions_BL, axis)
      return _put(slots, new, positions_BL, self.layer)
    return self.replace(key_BMJK=put(self.key_BMJK, key_BLJK, 3),
                        value_BMJK=put(self.value_BMJK, value_BLJK, 2))


def _put(slots: jax.Array, new_BLJK: jax.Array, positions_BL: jax.Array,
         layer: Optional[jax.Array]) -> jax.Array:
  """Returns slots [B, M, J, K], or with a layer [N, B, M, J, K]. A scatter over
  rows writes them where they lie; under vmap, XLA moves them for it on TPU."""
  first = () if layer is None else (layer,)
  if len(positions_BL) > 1:
    rows_B1 = jnp.arange(len(new_BLJK))[:, None]
    return slots.at[*first, rows_B1, positions_BL].set(
        new_BLJK, indices_are_sorted=True, unique_indices=True)
  return jax.lax.dynamic_update_slice(
      slots, new_BLJK.reshape((1,) * len(first) + new_BLJK.shape),
      (*first, 0, positions_BL[0, 0], 0, 0))


def _to_bits(x: jax.Array) -> jax.Array:
  """Returns numbers of bfloat16 as their bits, others as they are. A scatter of
  bfloat16 makes float32 of all slots on CPU, and bfloat16 of them again."""
  if x.dtype != jnp.bfloat16:
    return x
  return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _from_bits(x: jax.Array) -> jax.Array:
  if x.dtype != jnp.uint16:
    return x
  return jax.lax.bitcast_convert_type(x, jnp.bfloat16)


def _like(new: jax.Array, slots: jax.Array) -> jax.Array:
  """Returns new numbers as those of slots are held."""
  if slots.dtype == jnp.uint16:
    return _to_bits(new.astype(jnp.bfloat16))
  return new.astype(slots.dtype)


def _put_turned(slots: jax.Array, new: jax.Array, positions_BL: jax.Array,
                axis: int) -> jax.Array:
  """Returns slots whose axis `axis` is M.

  A token of a single row is written twice. If it is written once, XLA's CPU
  backend does so in two kernels, one of which reads what the other writes, and
  copies all slots four times for each token.
  """
  rows, L = new.shape[:2]
  new = jnp.moveaxis(new, 1, axis)
  if rows == 1 and L == 1:
    twice = jnp.repeat(positions_BL[0], 2)
    return slots.at[(slice(None),) * axis + (twice,)].set(
        jnp.repeat(new, 2, axis))
  starts = jnp.broadcast_to(positions_BL[:, 0], new.shape[:1])
  return jax.vmap(lambda s, n, i: jax.lax.dynamic_update_slice_in_dim(
      s, n, i, axis - 1))(slots, new, starts)


# Of each entry its keys and values, which it may have none of.
Slots = Optional[tuple[tuple[Optional[jax.Array], Optional[jax.Array]], ...]]


def apart(entries: tuple) -> tuple[Slots, tuple]:
  """Returns the keys and values of entries, and the entries without."""
  def of(entry: Any):
    if not isinstance(entry, Cache):  # the arrays of a state
      return (None, None), entry
    return (entry.key_BMJK, entry.value_BMJK), entry.replace(
        key_BMJK=None, value_BMJK=None, layer=None)
  slots, rest = zip(*map(of, entries))
  return slots, rest


def joined(slots: Slots, rest: tuple, layer: Optional[jax.Array] = None
           ) -> tuple:
  """Returns what `apart` was given; if `layer` is, entries of this layer, to
  which `rest` belongs, with the slots of all."""
  def of(entry: Any, key: Optional[jax.Array], value: Optional[jax.Array]):
    if key is None:
      return entry
    return entry.replace(key_BMJK=key, value_BMJK=value, layer=layer)
  return tuple(of(entry, *own) for entry, own in zip(rest, slots, strict=True))


def turned(entries: Any) -> Any:
  """Returns the entries of single layers, states among them, as the products of
  a loop over single tokens take them: turned, on one CPU."""
  if not sharding.one_cpu():
    return entries
  is_cache = lambda x: isinstance(x, Cache)
  return jax.tree.map(lambda x: x.turn() if is_cache(x) else x, entries,
                      is_leaf=is_cache)
