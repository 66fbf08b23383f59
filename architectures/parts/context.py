"""What the layers of a stack are told, besides their input."""

from typing import Optional

from flax import struct
import jax

from architectures.parts.attention.cache import First, Keys


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
  first: Optional[First] = None  # of the layers before this one
  keys: Optional[Keys] = None  # that a layer reads instead of its own
  # Those of the layers before a period, by how far before it they are: -1 ...
  lent: dict[int, Keys] = struct.field(default_factory=dict)
  # How many tokens a row has room for: its own, or a cache's.
  length: int = struct.field(pytree_node=False, default=0)
  in_order: bool = struct.field(pytree_node=False, default=True)
  deterministic: bool = struct.field(pytree_node=False, default=True)
  keep_layers: bool = struct.field(pytree_node=False, default=False)
  keep_attention: bool = struct.field(pytree_node=False, default=False)
  lends: bool = struct.field(pytree_node=False, default=False)  # its keys
  # The layers follow one another in the program: see skeletons.one_by_one.
  one_by_one: bool = struct.field(pytree_node=False, default=False)
