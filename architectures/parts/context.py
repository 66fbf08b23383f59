"""The context of a call, which the layers of a stack read besides their input;
and the report of a layer, which it returns beside its result and its cache.

An array's leading dimension may be 1 where all rows agree.
"""

from typing import Optional

from flax import struct
import jax
import jax.numpy as jnp


@struct.dataclass
class Distances:
  """The result of a position encoding for distances, made once for all layers.

  Attributes:
    bias_BHLM: a bias on the scores of self-attention.
    table_UD: vectors of U distances (attention/disentangled.py).
  """
  bias_BHLM: Optional[jax.Array] = None
  table_UD: Optional[jax.Array] = None


@struct.dataclass
class Memory:
  """The memory that cross-attention reads: the result of an encoder.

  Attributes:
    x_BMD: the result; None: a cache has its keys and values already.
    segment_ids_BM: the segment of each of its tokens, which those of the same
      segment alone see.
  """
  x_BMD: Optional[jax.Array] = None
  segment_ids_BM: Optional[jax.Array] = None


@struct.dataclass
class FirstLayerValues:
  """The values of the first layer, on their way to the layers after it, which
  mix them into their own (model.value_residual).

  Attributes:
    value_BLJK: the values.
    known: bool, whether a layer has computed them yet.
  """
  value_BLJK: jax.Array
  known: jax.Array


@struct.dataclass
class KeysAndValues:
  """Keys and values of a layer. Layers with kv_sharing read those of an earlier
  layer instead of their own.

  Attributes:
    key_BMJK: the keys.
    value_BMJK: the values.
    forget_BMHU: for each head of queries, the sum of the logarithms of the
      forget gates of the tokens up to this one, with U = 1; None: there are no
      such gates.
  """
  key_BMJK: jax.Array
  value_BMJK: jax.Array
  forget_BMHU: Optional[jax.Array] = None


@struct.dataclass
class SharedArrays:
  """The arrays that the attention of one layer shares with that of others.

  Attributes:
    first_values: the values of the first layer, with model.value_residual.
    router_BLU: the state of the last router before the layer, with
      moe.router_dim.
    keys: keys and values that the layer reads instead of its own.
    lends: whether later layers read those of this one, so that it reports them.
  """
  first_values: Optional[FirstLayerValues] = None
  router_BLU: Optional[jax.Array] = None
  keys: Optional[KeysAndValues] = None
  lends: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Context:
  """The facts that every layer of a stack is told, besides its input.

  Attributes:
    positions_BL: where the tokens stand.
    segment_ids_BL: the id of each token's segment; tokens see each other only
      within one, and padding has an id of its own (0).
    distances: the result of the position encoding for distances.
    memory: the memory that cross-attention reads.
    tokens_BL: ids, for routers that hash them and tables that are looked up.
    embedded_BLD: the embedding of the tokens, for model.memory per_layer.
    row_scale_S: the scale of a norm that layers of model.memory per_layer have
      in common.
    prefix_B: how many tokens at the start of a row are seen by all.
    valid_BL: 0 on padding, which takes no expert.
    routed_BL: 0 on other tokens that take no expert.
    lengths_B: how many tokens each row has, those in a cache included; None:
      all have L.
    shared: the arrays that attention shares with that of other layers.
    has_clean_copy: whether the tokens are L noised ones, and after them the
      same L without noise, which the noised ones of later blocks see (block
      diffusion).
    in_order: whether the tokens stand in the order of their positions.
    deterministic: whether nothing is drawn: no dropout.
    keep_layers: whether routers report what they chose.
    keep_attention: whether attention reports its weights.
  """
  positions_BL: jax.Array
  segment_ids_BL: Optional[jax.Array] = None
  distances: Distances = Distances()
  memory: Optional[Memory] = None
  tokens_BL: Optional[jax.Array] = None
  embedded_BLD: Optional[jax.Array] = None
  row_scale_S: Optional[jax.Array] = None
  prefix_B: Optional[jax.Array] = None
  valid_BL: Optional[jax.Array] = None
  routed_BL: Optional[jax.Array] = None
  lengths_B: Optional[jax.Array] = None
  shared: SharedArrays = SharedArrays()
  has_clean_copy: bool = struct.field(pytree_node=False, default=False)
  in_order: bool = struct.field(pytree_node=False, default=True)
  deterministic: bool = struct.field(pytree_node=False, default=True)
  keep_layers: bool = struct.field(pytree_node=False, default=False)
  keep_attention: bool = struct.field(pytree_node=False, default=False)

  def real_tokens(self, B: int, L: int) -> jax.Array:
    """Returns bool [B, L]: which tokens are neither padding nor, for the
    modules that predict further tokens, join two texts."""
    is_real_BL = jnp.ones((B, L), bool)
    if self.segment_ids_BL is not None:
      is_real_BL = jnp.broadcast_to(self.segment_ids_BL != 0, (B, L))
    for mask_BL in (self.valid_BL, self.routed_BL):
      if mask_BL is not None:
        is_real_BL = is_real_BL & (mask_BL != 0)
    return is_real_BL

  @property
  def length(self) -> int | jax.Array:
    """How many tokens the rows have: the same number, or [B]."""
    if self.lengths_B is None:
      return self.positions_BL.shape[1]
    return self.lengths_B


@struct.dataclass
class Report:
  """The losses and figures that a layer, or a part of it, returns beside its
  result.

  Attributes:
    losses: the terms that it adds to the training loss, by name.
    health: the figures of a router, by name.
    loads: the load of each expert, by the path of the bias that it moves.
    experts: the choices of a router (moe.layer.choices), with
      context.keep_layers.
    weights_BHLM: the weights with which self-attention sums the values, with
      context.keep_attention.
    memory_weights_BHLM: the weights of attention to a memory, likewise.
    first_values: the values of the first layer, which the layers after this
      one read, with model.value_residual.
    router_BLU: the state of the layer's router, which the next router reads,
      with moe.router_dim.
    keys: the keys and values of this layer, where later layers read them
      instead of their own (context.shared.lends).
  """
  losses: dict[str, jax.Array] = struct.field(default_factory=dict)
  health: dict[str, jax.Array] = struct.field(default_factory=dict)
  loads: dict[str, jax.Array] = struct.field(default_factory=dict)
  experts: dict[str, jax.Array] = struct.field(default_factory=dict)
  weights_BHLM: Optional[jax.Array] = None
  memory_weights_BHLM: Optional[jax.Array] = None
  first_values: Optional[FirstLayerValues] = None
  router_BLU: Optional[jax.Array] = None
  keys: Optional[KeysAndValues] = None
