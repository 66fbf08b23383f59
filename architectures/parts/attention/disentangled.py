"""Disentangled attention: what a token holds and how far away it is have
vectors of their own (DeBERTa: He et al. 2021, arXiv 2006.03654, section 3.1;
in buckets, as DeBERTa-v2 and v3 have it: arXiv 2111.09543).

  score_ij = (q_i k_j + q_i K_r + k_j Q_r) / sqrt(3 K),    r = S + bucket(i - j)

q_i K_r is content to position, k_j Q_r position to content. K_r and Q_r are
rows of a table [2S, D] that all layers of a stack share, after a norm (and in
training dropout), multiplied by the layer's own products of keys and of
queries. With S = disentangled.buckets and half = S / 2

  bucket(d) = d                                               |d| <= half
  bucket(d) = +-(half + ceil((half - 1) log(|d| / half)
                             / log((max_distance - 1) / half)))     beyond

and r is kept within 0 ... 2S - 1. Not known here are products of the positions'
own (share_att_key=False), one of the two terms alone, and distances without
buckets.

The functions below make an encoding of architectures/parts/positions.py.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import layers
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from common.errors import RequestError, require
from common.fields import field, FUNCTION, SHAPES


@dataclasses.dataclass(frozen=True)
class DisentangledConfig:
  """The fields of position disentangled."""
  buckets: int = field(256, 'buckets of distances on each side', least=4,
                       resume=SHAPES)
  max_distance: int = field(
      512, 'the last bucket has all larger distances', above=0,
      resume=FUNCTION)


class Distances(nn.Module):
  """The table [2S, D] of distances, after its norm."""
  config: ModelConfig

  @nn.compact
  def __call__(self) -> jax.Array:
    config, sizes = self.config, self.config.part(DisentangledConfig)
    # U = 2 S rows: S for keys after the query, and S for those before it.
    table_UD = layers.embedding(self, 'table', 2 * sizes.buckets)
    return layers.norm(config, 'norm')(table_UD.astype(config.compute_dtype))


def rows(distance: jax.Array, config: ModelConfig) -> jax.Array:
  """Maps the distance between a query and a key to a row of the learned table
  of distances (DeBERTa-v2's log buckets: He et al. 2021, arXiv 2111.09543).

  A distance d has the row S + bucket(d). Near distances have a bucket each. Far
  ones share buckets that widen with the logarithm of the distance, with the
  sign of d:

    bucket(d) = d                                           |d| <= half = S / 2
    bucket(d) = +-(half + ceil((half - 1) log(|d| / half)
                               / log((max_distance - 1) / half)))     beyond

  Args:
    distance: int, the query's position less the key's, of any shape.
    config: the config, whose DisentangledConfig has S (`buckets`) and
      max_distance.

  Returns:
    Row numbers from 0 to 2 S - 1, int32, of the shape of `distance`.
  """
  distance_config = config.part(DisentangledConfig)
  S = distance_config.buckets
  max_distance = distance_config.max_distance
  half = S // 2

  # The bucket of each size |d| from 0 to max_distance. NumPy computes it in
  # float64, so that a size on a bucket's border has the same one on any device.
  # The share of the way from `half` to max_distance - 1 is one of logarithms.
  sizes = np.arange(max_distance + 1)
  logs = np.log(np.maximum(sizes, half) / half)
  share_of_way = logs / np.log((max_distance - 1) / half)
  far_buckets = np.ceil(share_of_way * (half - 1)) + half
  bucket_of_size = np.where(sizes <= half, sizes, far_buckets).astype(np.int32)

  # All larger sizes share the last bucket. S is the row of distance 0.
  size = jnp.minimum(jnp.abs(distance), max_distance)
  bucket = jnp.asarray(bucket_of_size)[size]
  return jnp.clip(S + jnp.sign(distance) * bucket, 0, 2 * S - 1)


def _projected(module: nn.Module, name: str, table_UD: jax.Array) -> jax.Array:
  """Makes queries or keys of the vectors that stand for distances (DeBERTa's
  relative positions). They are multiplied by the same weight by which the
  layer makes the queries or keys of its tokens.

  The suffixes name axes: U rows of the table of distances, D d_model, H heads,
  K features of a head.

  Args:
    module: the layer's attention. It has declared the weight already, when it
      multiplied its tokens, so the weight is read here and not declared again.
    name: 'query' or 'key', the name of the weight.
    table_UD: the vectors of the distances, a row for each bucket of distances.

  Returns:
    The queries or keys, with the weight's bias if it has one, [U, H, K].
  """
  config: ModelConfig = module.config  # type: ignore[attr-defined]

  def parameter(name: str) -> jax.Array:
    """Returns a parameter of the layer, without its metadata of sharding."""
    return nn.meta.unbox(module.get_variable('params', name))

  # The weight, with the low-rank update A B of an adapter (LoRA) if it has one.
  w_DHK = parameter(name)
  if layers.has_adapter(config, name):
    w_DHK = w_DHK + config.lora.scale * jnp.tensordot(
        parameter(name + layers.SUFFIX_OF_LORA_A),
        parameter(name + layers.SUFFIX_OF_LORA_B), 1)

  y_UHK = layers.einsum('UD,DHK->UHK', table_UD, w_DHK,
                        dtype=config.compute_dtype,
                        axes=('embed', 'heads', 'head'))
  if config.attention_bias:
    y_UHK = layers.add_bias(y_UHK, parameter(f'{name}_bias'))
  return y_UHK


def bias(module: nn.Module, x_BLD: jax.Array, q_BLHK: jax.Array,
         k_BMJK: jax.Array, k_positions_BM: jax.Array, ctx: Context
         ) -> jax.Array:
  """Returns the two terms of position in DeBERTa's scores, which attention adds
  to its scaled products of queries and keys:

    scale (q_i K_r + k_j Q_r),    r = the row of the distance i - j

  Args:
    module: the layer's attention, which has declared its weights already.
    x_BLD: the layer's input, which is not read.
    q_BLHK: queries, [batch, length L, heads H, features K of a head].
    k_BMJK: keys, [batch, number of keys M, heads of keys J, features K].
    k_positions_BM: the positions of the keys, [batch, M].
    ctx: the context of the layer. Its `distances.table_UD` is the result of
      `Distances`, a vector for each of the U = 2 S rows of distances.

  Returns:
    What is added to the scores, float32 [B, H, L, M].
  """
  del x_BLD
  config: ModelConfig = module.config  # type: ignore[attr-defined]
  table_UD = layers.Dropout(config.dropout)(
      ctx.distances.table_UD, deterministic=ctx.deterministic)

  # Keys K_r and queries Q_r of the distances. A head of keys serves H / J heads
  # of queries, so it is repeated for each.
  repeat_key_heads = lambda x: jnp.repeat(
      x, config.num_heads // config.num_kv_heads, -2)
  key_UHK = repeat_key_heads(_projected(module, 'key', table_UD))
  query_UHK = _projected(module, 'query', table_UD)

  # Products with all U rows, in which each pair of a query and a key then looks
  # up its own. To gather vectors first would take K numbers for each pair.
  row_BLM = rows(ctx.positions_BL[:, :, None] - k_positions_BM[:, None], config)
  to_position_BHLU = layers.einsum('BLHK,UHK->BHLU', q_BLHK, key_UHK,
                                   dtype=config.compute_dtype,
                                   out_dtype=jnp.float32)
  to_content_BHMU = layers.einsum(
      'BMHK,UHK->BHMU', repeat_key_heads(k_BMJK), query_UHK,
      dtype=config.compute_dtype, out_dtype=jnp.float32)

  # The look-up goes along the last axis: content to position has a line of U
  # products for each query, and position to content one for each key. So the
  # rows are swapped to [M, L] for the latter, and its result back to [L, M].
  query_term_BHLM = jnp.take_along_axis(to_position_BHLU, row_BLM[:, None], -1)
  key_term_BHML = jnp.take_along_axis(
      to_content_BHMU, jnp.swapaxes(row_BLM, 1, 2)[:, None], -1)
  scale: float = module.scale  # type: ignore[attr-defined]
  return scale * (query_term_BHLM + jnp.swapaxes(key_term_BHML, 2, 3))


def check(config: ModelConfig, stack: str) -> None:
  """Checks that a model can have disentangled attention (DeBERTa), which scores
  the content of a token and its distance apart.

  Args:
    config: the config of the model.
    stack: the kind of stack. It is not read: an encoder and a decoder may both
      have this attention.

  Raises:
    RequestError: if layers have no queries and keys of their own, if the
      buckets of distances cannot be computed, or if muP is asked for.
  """
  del stack
  request = "model.position is 'disentangled'"
  # The table is multiplied by the layer's own weights of queries and keys.
  if config.mixer != 'attention' or config.part(AttentionConfig).kv_sharing:
    raise RequestError(
        f"{request}, which needs queries and keys of the layer's own: choose "
        'model.mixer attention, without kv_sharing')
  # `rows` divides by log((max_distance - 1) / half), which must be above 0.
  sizes = config.part(DisentangledConfig)
  require(sizes.buckets % 2 == 0
          and sizes.max_distance > sizes.buckets // 2 + 1,
          f'model.disentangled.buckets is {sizes.buckets} and '
          f'model.disentangled.max_distance {sizes.max_distance}: the first '
          'must be even, and the second more than half of it and 1')
  require(config.parametrization != 'mup', f"{request}, for whose table "
          "model.parametrization 'mup' has no rule: choose standard")
