"""What the layers of a stack are told besides their input, and what attention
keeps of the tokens that it has read: keys and values."""

from typing import Any, Optional

from flax import struct
import jax
import jax.numpy as jnp


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
class Context:
  """What every layer of a stack is told, besides its input.

  A leading dimension may be 1 where all rows agree. Tokens see each other
  only within one segment id; padding has an id of its own (0).
  """
  positions_BL: jax.Array
  segment_ids_BL: Optional[jax.Array] = None
  bias_BHLM: Optional[jax.Array] = None  # on the scores of self-attention
  memory_BMD: Optional[jax.Array] = None  # for cross-attention
  memory_segment_ids_BM: Optional[jax.Array] = None
  tokens_BL: Optional[jax.Array] = None  # ids, for routers that hash them
  prefix_B: Optional[jax.Array] = None  # keys before it are seen by all
  valid_BL: Optional[jax.Array] = None  # 0: padding, which takes no expert
  routed_BL: Optional[jax.Array] = None  # 0: what else takes no expert
  # How many tokens each row has, those in a cache included; None: all have L.
  lengths_B: Optional[jax.Array] = None
  first: Optional[First] = None  # of the layers before this one
  keys: Optional[Keys] = None  # that a layer reads instead of its own
  # Those of the layers before a period, by how far before it they are: -1 ...
  lent: dict[int, Keys] = struct.field(default_factory=dict)
  in_order: bool = struct.field(pytree_node=False, default=True)
  deterministic: bool = struct.field(pytree_node=False, default=True)
  keep_layers: bool = struct.field(pytree_node=False, default=False)
  keep_attention: bool = struct.field(pytree_node=False, default=False)
  lends: bool = struct.field(pytree_node=False, default=False)  # its keys
  # The layers follow one another in the program: see skeletons.one_by_one.
  one_by_one: bool = struct.field(pytree_node=False, default=False)

  @property
  def length(self) -> int | jax.Array:
    """How many tokens the rows have: the same number, or [B]."""
    return (self.positions_BL.shape[1] if self.lengths_B is None else
            self.lengths_B)


@struct.dataclass
class Cache:
  """A layer's keys and values; slot m holds the token at position m.

  With `turned` keys are held as [B, J, K, M] and values as [B, J, M, K], which
  the products with a token's queries take on CPU without a copy; `slots` and
  `memory` give them as they are elsewhere.

  Those of the memory are put in when a decoder is given it with the cache,
  and stand for it from then on. With context.keep_attention a layer also
  returns here what it weighed the values with, with model.value_residual the
  values of the first layer, and with context.lends its keys and values, whether
  or not a cache went in.
  """
  key_BMJK: Optional[jax.Array] = None  # None: it holds no keys of its own
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
    slots = self.key_BMJK, self.value_BMJK
    return self._plain(*slots) if self.layer is None else jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False),
        slots)

  @property
  def memory(self) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the memory, [B, M, J, K]."""
    return self._plain(self.memory_key_BMJK, self.memory_value_BMJK)

  def _plain(self, key: jax.Array, value: Optional[jax.Array]):
    key, value = jax.tree.map(lambda x: _cast(x, jnp.uint16, jnp.bfloat16),
                              (key, value))
    return (jnp.moveaxis(key, 3, 1), jnp.moveaxis(value, 2, 1)
            ) if self.turned else (key, value)

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
        for of in ('', 'memory_') for name, axis in _TURNED.items()})

  def write(self, key_BLJK: jax.Array, value_BLJK: Optional[jax.Array],
            positions_BL: jax.Array) -> 'Cache':
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
        value_BMJK=put(self.value_BMJK, value_BLJK, _TURNED['value']))


_TURNED = {'key': 3, 'value': 2}  # the axis M of what is turned


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
  return tuple(entry if key is None else entry.replace(
      key_BMJK=key, value_BMJK=value, layer=layer)
               for entry, (key, value) in zip(rest, slots, strict=True))
