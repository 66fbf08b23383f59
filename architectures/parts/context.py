"""The context of a call: what the layers of a stack read besides their input.
"""

from typing import Optional

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
  table_UD: Optional[jax.Array] = None  # of distances, for all layers
  memory_BMD: Optional[jax.Array] = None  # for cross-attention
  memory_segment_ids_BM: Optional[jax.Array] = None
  tokens_BL: Optional[jax.Array] = None  # ids, for routers that hash them
  embedded_BLD: Optional[jax.Array] = None  # for memory per_layer
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

  def counted(self, B: int, L: int) -> jax.Array:
    """Returns bool [B, L]: which tokens are neither padding nor, for the
    modules that predict further tokens, join two texts."""
    counted_BL = jnp.ones((B, L), bool)
    if self.segment_ids_BL is not None:
      counted_BL = jnp.broadcast_to(self.segment_ids_BL != 0, (B, L))
    for mask_BL in (self.valid_BL, self.routed_BL):
      counted_BL = (counted_BL if mask_BL is None else
                    counted_BL & (mask_BL != 0))
    return counted_BL

  @property
  def length(self) -> int | jax.Array:
    """How many tokens the rows have: the same number, or [B]."""
    return (self.positions_BL.shape[1] if self.lengths_B is None else
            self.lengths_B)
