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
    c, distances = self.config, self.config.part(DisentangledConfig)
    table_UD = layers.embedding(self, 'table', 2 * distances.buckets)
    return layers.norm(c, 'norm')(table_UD.astype(c.compute_dtype))


def rows(distance: jax.Array, c: ModelConfig) -> jax.Array:
  """Returns r of i - j. Far buckets are looked up in a table that is made in
  float64, so that a distance on a bucket's border has the same one anywhere."""
  distances = c.part(DisentangledConfig)
  S, most = distances.buckets, distances.max_distance
  half, sizes = S // 2, np.arange(most + 1)
  logs = np.log(np.maximum(sizes, half) / half) / np.log((most - 1) / half)
  buckets = np.where(sizes <= half, sizes,
                     np.ceil(logs * (half - 1)) + half).astype(np.int32)
  bucket = jnp.asarray(buckets)[jnp.minimum(jnp.abs(distance), most)]
  return jnp.clip(S + jnp.sign(distance) * bucket, 0, 2 * S - 1)


def _projected(module: nn.Module, name: str, table_UD: jax.Array) -> jax.Array:
  """Returns the table times a product of the layer's attention that has
  multiplied its tokens already, with its bias, [U, H or J, K]."""
  c: ModelConfig = module.config  # type: ignore[attr-defined]
  of = lambda name: nn.meta.unbox(module.get_variable('params', name))
  w_DHK = of(name)
  if layers.has_adapter(c, name):
    w_DHK = w_DHK + c.lora.scale * jnp.tensordot(
        of(name + layers.SUFFIX_OF_LORA_A),
        of(name + layers.SUFFIX_OF_LORA_B), 1)
  y_UHK = layers.einsum('UD,DHK->UHK', table_UD, w_DHK, c.compute_dtype,
                        axes=('embed', 'heads', 'head'))
  return layers.add_bias(y_UHK, of(f'{name}_bias')) if (
      c.attention_bias) else y_UHK


def bias(module: nn.Module, x_BLD: jax.Array, q_BLHK: jax.Array,
         k_BMJK: jax.Array, k_positions_BM: jax.Array, ctx: Context
         ) -> jax.Array:
  """Returns what is added to the scaled scores, float32 [B, H, L, M].

  Args:
    module: the layer's attention, which has multiplied by its weights.
    x_BLD: its input.
    q_BLHK, k_BMJK: queries and keys.
    k_positions_BM: where the keys stand.
    ctx: with `distances.table_UD`, what Distances returns.
  """
  del x_BLD
  c: ModelConfig = module.config  # type: ignore[attr-defined]
  table_UD = layers.Dropout(c.dropout)(
      ctx.distances.table_UD, deterministic=ctx.deterministic)
  of_each = lambda x: jnp.repeat(x, c.num_heads // c.num_kv_heads, -2)
  key_UHK = of_each(_projected(module, 'key', table_UD))
  query_UHK = _projected(module, 'query', table_UD)
  row_BLM = rows(ctx.positions_BL[:, :, None] - k_positions_BM[:, None], c)
  to_position_BHLU = layers.einsum('BLHK,UHK->BHLU', q_BLHK, key_UHK,
                                   c.compute_dtype, jnp.float32)
  to_content_BHMU = layers.einsum('BMHK,UHK->BHMU', of_each(k_BMJK), query_UHK,
                                  c.compute_dtype, jnp.float32)
  of_query_BHLM = jnp.take_along_axis(to_position_BHLU, row_BLM[:, None], -1)
  of_key_BHML = jnp.take_along_axis(
      to_content_BHMU, jnp.swapaxes(row_BLM, 1, 2)[:, None], -1)
  scale: float = module.scale  # type: ignore[attr-defined]
  return scale * (of_query_BHLM + jnp.swapaxes(of_key_BHML, 2, 3))


def check(c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what disentangled attention cannot be."""
  del stack
  who = "model.position is 'disentangled'"
  if c.mixer != 'attention' or c.part(AttentionConfig).kv_sharing:
    raise RequestError(
        f"{who}, which needs queries and keys of the layer's own: choose "
        'model.mixer attention, without kv_sharing')
  d = c.part(DisentangledConfig)
  require(d.buckets % 2 == 0 and d.max_distance > d.buckets // 2 + 1,
          f'model.disentangled.buckets is {d.buckets} and '
          f'model.disentangled.max_distance {d.max_distance}: the first must '
          'be even, and the second more than half of it and 1')
  require(c.parametrization != 'mup', f"{who}, for whose table "
          "model.parametrization 'mup' has no rule: choose standard")
