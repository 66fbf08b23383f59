"""Sparse attention: a query sees the keys that a small attention, the lightning
indexer, scores highest (DeepSeek-AI 2025, DeepSeek-V3.2, arXiv 2512.02556,
section 2.1). model.attention=indexed has it, of a model or of a kind of layer.

  q_l,h = R_l W_q,h c_l,   k_m = R_m n(W_k x_m),   w_l = W_w x_l
  I_l,m = (K H)^-1/2 sum over the H heads of w_l,h relu(q_l,h k_m)
  S_l   = the top_k of the keys that l may see, by I_l; of equals, the first

c is the small vector that latent attention makes its queries of, where there
is one, and x elsewhere. R turns the first of the K features, as many as of a
head of the layer; n is a LayerNorm. Attention is over S_l, exactly: a mask
hides the other keys, and one token that meets a cache, which has the k of each
token too, gathers them. With top_k at the length or above it, or 0, it is
attention to all keys.

With a block of n tokens (Qwen Sparse Attention of Qwen4-Exp, in transformers)
queries choose among the blocks 0 ... n - 1, n ... 2 n - 1, ... of a document,
and see all of a block's keys, and those after their last whole block too:

  k_b = R_(n b) n(mean over b of W_k x_m),   q_l,h = R_l n(W_q,h x_l)
  I_l,b = K^-1/2 sum over the H heads of relu(q_l,h k_b)

Here n is the model's norm. A cache has of each token the key of the n tokens
that end with it, and the last n - 1 products W_k x.

The choice has no gradient. What teaches the indexer is added to the training
loss, aux/indexer in the metrics:

  loss_weight * mean over l of KL(p_l || softmax of I_l over the keys l attends)

where p_l is the mean over heads of what l weighs the values with, to which no
gradient goes, nor to x and c. So the rest of the model learns from its own loss
alone. While all keys are seen (top_k=0, the dense warm-up) an indexer learns
where attention goes: docs/howto/sparse_attention.md has the stages.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple, Optional

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import layers
from architectures.parts import positions
from architectures.parts import sharding
from architectures.parts.attention.fields import AttentionConfig, LatentConfig
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.positions import RopeConfig
from architectures.parts.recurrent import features
from common.errors import RequestError, require
from common.fields import field, FUNCTION, RECIPE, REGULARISATION, SHAPES
from common.fields import ReadIf

NORM_EPS = 1e-6  # of the norm of keys, whatever model.norm_eps is
UNSEEN = -1e30  # finite, as kernels.MASKED
INPUT = 'index'  # in Cache.inputs: of the means of keys


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
  """The fields of attention indexed."""
  GROUP = 'indexer'
  top_k: int = field(
      64, 'Keys that a query sees; 0: all, while the indexer warms up.',
      resume=FUNCTION)
  block: int = field(
      0, 'Tokens of a block, which divide top_k: they are chosen together; 0: '
      'each by itself.', least=0, resume=SHAPES)
  heads: int = field(4, 'heads of the indexer', above=0, resume=SHAPES)
  head_dim: int = field(
      0, "size of such a head; derived: the model's head_dim", resume=SHAPES)
  interleaved: bool = field(
      False, 'turned pairs of its features are neighbours, not half as many '
      'apart', resume=FUNCTION)
  loss_weight: float = field(
      1.0, "of the divergence from attention's weights, in the training loss",
      least=0, resume=REGULARISATION, about=RECIPE)

  def derived(self, c: ModelConfig) -> 'IndexerConfig':
    return dataclasses.replace(self, head_dim=self.head_dim or c.head_dim)

  def waits(self, c: ModelConfig) -> dict[str, ReadIf]:
    """Returns the fields that nothing reads as the others are, with what each
    of them waits for."""
    if c.position == 'rope':
      return {}
    return {'interleaved': ReadIf('position', 'is rope')}


@struct.dataclass
class Index:
  """The result of an indexer for tokens: queries and their heads' weights, and
  keys, which are of one head; of blocks, also what the next keys are made of.
  """
  query_BLHK: jax.Array
  weight_BLH: jax.Array
  key_BMJK: jax.Array
  inputs: dict[str, jax.Array] = struct.field(default_factory=dict)


class Indexer(nn.Module):
  """(x_BLD, what queries are made of, context, Index.inputs of the tokens
  before) -> Index. `axis` is the logical axis of the second one. Heads are
  whole on each device, as their scores add up. A layer may turn queries itself,
  and make keys of x (compressed.py)."""
  config: ModelConfig
  axis: str

  @nn.compact
  def __call__(self, x_BLD: jax.Array, asks_BLU: jax.Array, ctx: Context,
               before: Optional[dict[str, jax.Array]] = None, *,
               turn: Optional[Callable[..., jax.Array]] = None,
               keys: Optional[Callable[[jax.Array], jax.Array]] = None
               ) -> Index:
    c, i = self.config, self.config.part(IndexerConfig)
    x_BLD, asks_BLU = jax.lax.stop_gradient((x_BLD, asks_BLU))
    q_BLHK = self._product('query', 'BLU,UHK->BLHK', asks_BLU,
                           (self.axis, None, 'head'), i.heads, i.head_dim)
    k_BLK, k_BL1K, inputs = None, None, {}
    if keys is None:
      k_BLK = self._product('key', 'BLD,DK->BLK', x_BLD, ('embed', 'head'),
                            i.head_dim)
    if i.block:
      q_BLHK = layers.norm(c, 'query_norm', 'head')(q_BLHK)
    if keys is None:
      k_BL1K, inputs = self._keys(k_BLK, ctx, before)
    # Blocks are chosen by all heads alike.
    if i.block:
      w_BLH = jnp.full(q_BLHK.shape[:3], i.heads ** 0.5)
    else:
      w_BLH = self._product('weights', 'BLD,DH->BLH', x_BLD,
                            ('embed', 'head'), i.heads, dtype=jnp.float32)
    # R turns both by their positions.
    turn = turn or self._turn
    q_BLHK = turn(q_BLHK, ctx)
    if keys is None:
      k_BL1K = self._turn(k_BL1K, ctx, max(i.block - 1, 0))
    else:
      k_BL1K = keys(x_BLD)
    return Index(
        query_BLHK=sharding.constrain(q_BLHK, 'batch', 'length', None, 'head'),
        weight_BLH=sharding.constrain(w_BLH, 'batch', 'length', None),
        key_BMJK=k_BL1K, inputs=inputs)

  def _keys(self, k_BLK: jax.Array, ctx: Context,
            before: Optional[dict[str, jax.Array]]
            ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns n(W_k x) of W_k x, or n of its mean over a block of tokens that
    ends with each, [B, L, 1, K], and Index.inputs."""
    c, i = self.config, self.config.part(IndexerConfig)
    if not i.block:
      norm_config = dataclasses.replace(c, norm_eps=NORM_EPS)
      k_BLK = layers.LayerNorm(norm_config, 'head', name='key_norm')(k_BLK)
      return k_BLK[:, :, None], {}
    last_BWJK, valid_BL = None, None
    if before:
      last_BWJK, valid_BL = before[INPUT], ctx.valid_BL
    mean_W1K = jnp.full((i.block, 1, i.head_dim), 1 / i.block)
    mean_BL1K, after_BWJK = features.convolve(
        k_BLK[:, :, None], mean_W1K, before_BWHK=last_BWJK,
        segment_ids_BL=ctx.segment_ids_BL, valid_BL=valid_BL)
    k_BLK = layers.norm(c, 'key_norm', 'head')(mean_BL1K[:, :, 0])
    return k_BLK[:, :, None], {INPUT: after_BWJK}

  def _product(self, name: str, spec: str, x: jax.Array,
               axes: tuple[str | None, ...], *shape: int,
               dtype: jax.typing.DTypeLike = None) -> jax.Array:
    """Declares a weight of these outputs, and multiplies by it."""
    w = layers.weight(self, name, (x.shape[-1], *shape), axes)
    return layers.einsum(spec, x, w, self.config.compute_dtype, dtype,
                         axes=axes)

  def _turn(self, x_BLHK: jax.Array, ctx: Context, back: int = 0) -> jax.Array:
    c, rotate = self.config, positions.position_of(self.config).rotate
    if not rotate:
      return x_BLHK
    head, rest = jnp.split(x_BLHK, (turned(c),), -1)
    of_head = dataclasses.replace(c, head_dim=turned(c)).with_part(
        RopeConfig, fraction=1.0,
        interleaved=c.part(IndexerConfig).interleaved)
    head = rotate(head, ctx.positions_BL - back, of_head, ctx.length)
    return jnp.concatenate([head, rest], -1)


def turned(c: ModelConfig) -> int:
  """Returns how many features of a head rotary positions turn."""
  if c.mixer == 'latent':
    return c.part(LatentConfig).rope_dim
  return positions.rotary_dim(c)


class Scored(NamedTuple):
  """I of keys, or of their whole blocks, of which N = M / size or fewer are.

  Attributes:
    scores_BLM: float32 [B, L, M], or of blocks, [B, L, N].
    size: of a block; 0: keys stand by themselves.
    last_BN: the last key of each block; M: there is no such block.
    of_BM: the block of each key. One that is in no whole block has a number
      that stands for none of its document.
  """
  scores_BLM: jax.Array
  size: int = 0
  last_BN: Any = None
  of_BM: Any = None

  def whole(self, seen_BLM: Any) -> jax.Array:
    """Returns of which blocks each query sees all keys, bool [B, L, N]."""
    return jnp.take_along_axis(seen_BLM, self.last_BN[:, None], 2,
                               mode='fill', fill_value=False)

  def to_keys(self, x_BLN: jax.Array, rest: float | bool) -> jax.Array:
    """Returns for each key what `x_BLN` has for its block, or `rest`."""
    return jnp.take_along_axis(x_BLN, self.of_BM[:, None], 2, mode='fill',
                               fill_value=rest)

  def best(self, seen_BLM: Any, top_k: int) -> jax.Array:
    """Returns which keys are S, bool [B, L, M]."""
    if not self.size:
      return best(self.scores_BLM, seen_BLM, top_k)
    whole_BLN = self.whole(seen_BLM)
    best_BLN = best(self.scores_BLM, whole_BLN, top_k // self.size)
    return seen_BLM & self.to_keys(best_BLN | ~whole_BLN, True)

  def places(self, seen_B1M: jax.Array, top_k: int) -> jax.Array:
    """Returns where the keys of S are, of one query a row of one document:
    [B, top_k], or a block more of them; and places that it does not see."""
    if not self.size:
      return jax.lax.top_k(of_seen(self.scores_BLM, seen_B1M)[:, 0], top_k)[1]
    whole_B1N = self.whole(seen_B1M)
    score_BN, block_BN = jax.lax.top_k(
        of_seen(self.scores_BLM, whole_B1N)[:, 0], top_k // self.size)
    rest_B1 = jnp.broadcast_to(whole_B1N.sum(-1), (len(block_BN), 1))
    block_BN = jnp.where(score_BN > -jnp.inf, block_BN, seen_B1M.shape[-1])
    return (jnp.concatenate([block_BN, rest_B1], 1)[..., None] * self.size
            + jnp.arange(self.size)[None, None]).reshape(len(block_BN), -1)

  def divergence(self, target_BLM: jax.Array, seen_BLM: Any, ctx: Context
                 ) -> jax.Array:
    """Returns what the function `divergence` does; of blocks, over the keys of
    those that are whole."""
    scores_BLM = self.scores_BLM
    if self.size:
      seen_BLM = seen_BLM & self.to_keys(self.whole(seen_BLM), False)
      target_BLM = jnp.where(seen_BLM, target_BLM, 0)
      scores_BLM = self.to_keys(scores_BLM, 0.0)
    return divergence(target_BLM, scores_BLM, seen_BLM, ctx)


def scored(c: ModelConfig, index: Index, ids_BM: Optional[jax.Array]) -> Scored:
  """Returns the scores of all keys, whose documents are `ids_BM`."""
  size, keys = c.part(IndexerConfig).block, index.key_BMJK.shape[1]
  if not size:
    return Scored(scores(index))
  at_1M = jnp.arange(keys)[None]
  first_BM = 0 if ids_BM is None else features.starts(ids_BM)
  ends_BM = (at_1M - first_BM) % size == size - 1
  last_BN = jnp.sort(jnp.where(ends_BM, at_1M, keys))[:, :max(keys // size, 1)]
  key_BNJK = jnp.take_along_axis(
      index.key_BMJK, last_BN[..., None, None], 1, mode='clip')
  return Scored(scores(index.replace(key_BMJK=key_BNJK)), size, last_BN,
                jnp.cumsum(ends_BM, -1, dtype=jnp.int32) - ends_BM)


def scores(index: Index) -> jax.Array:
  """Returns I, float32 [B, L, M]."""
  key_BMJK = sharding.constrain(index.key_BMJK, 'batch', None, None, 'head')
  return sharding.constrain(
      layers.recompute_in_backward(_scores)(
          index.query_BLHK, index.weight_BLH, key_BMJK),
      'batch', 'length', None)


def _scores(q_BLHK: jax.Array, w_BLH: jax.Array, k_BMJK: jax.Array
            ) -> jax.Array:
  """Returns (K H)^-1/2 sum over the heads of w relu(q k)."""
  H, K = q_BLHK.shape[2:]
  s_BHLM = layers.einsum('BLHK,BMK->BHLM', q_BLHK, k_BMJK[:, :, 0],
                         q_BLHK.dtype, jnp.float32)
  s_BHLM = jax.nn.relu(s_BHLM)
  w_BLH = layers.multiply_exactly(w_BLH, (H * K) ** -0.5)
  return layers.einsum('BLH,BHLM->BLM', w_BLH, s_BHLM, jnp.float32)


def of_seen(scores_BLM: jax.Array, seen_BLM: Optional[jax.Array]) -> jax.Array:
  """Returns the scores without a gradient, and low where a key is unseen."""
  scores_BLM = jax.lax.stop_gradient(scores_BLM)
  if seen_BLM is None:
    return scores_BLM
  return jnp.where(seen_BLM, scores_BLM, -jnp.inf)


def best(scores_BLM: jax.Array, seen_BLM: Optional[jax.Array], top_k: int
         ) -> jax.Array:
  """Returns which keys are S, bool [B, L, M].

  As lax.top_k chooses them, but written with what each device has alone: those
  above the last one's score, and of its equals the first that there is room
  for.
  """
  scores_BLM = of_seen(scores_BLM, seen_BLM)
  last_BL1 = jax.lax.top_k(scores_BLM, top_k)[0][..., -1:]
  above_BLM, level_BLM = scores_BLM > last_BL1, scores_BLM == last_BL1
  room_BL1 = top_k - above_BLM.sum(-1, keepdims=True)
  best_BLM = above_BLM | level_BLM & (
      jnp.cumsum(level_BLM, -1, dtype=jnp.int32) <= room_BL1)
  return best_BLM if seen_BLM is None else best_BLM & seen_BLM


def gathers(top_k: int, shape: tuple[int, ...]) -> bool:
  """Whether queries that have scores of this shape, [B, L, M], meet a copy of
  the keys that they choose: of one query each, if it is a small share."""
  return shape[1] == 1 and 0 < GATHERED * top_k <= shape[2]


# Times as many keys, from which on chosen ones are copied: a copy reads them,
# writes them and reads them again, where a mask has all keys read once.
GATHERED = 4


def divergence(target_BLM: jax.Array, scores_BLM: jax.Array,
               seen_BLM: Optional[jax.Array], ctx: Context) -> jax.Array:
  """Returns the mean over tokens, in nats, of KL(target || softmax of scores),
  both over the keys that are seen; the target may add up to less than 1."""
  if seen_BLM is not None:
    scores_BLM = jnp.where(seen_BLM, scores_BLM, UNSEEN)
  total_BL1 = target_BLM.sum(-1, keepdims=True)
  p_BLM = target_BLM / jnp.maximum(total_BL1, 1e-30)
  there_BLM = p_BLM > 0
  nats_BLM = jnp.log(jnp.where(there_BLM, p_BLM, 1)) - jax.nn.log_softmax(
      scores_BLM)
  kl_BL = jnp.where(there_BLM, p_BLM * nats_BLM, 0).sum(-1)
  counted_BL = ctx.real_tokens(*kl_BL.shape)
  return (kl_BL * counted_BL).sum() / jnp.maximum(counted_BL.sum(), 1)


def empty(c: ModelConfig, shape: tuple[int, ...]) -> Optional[jax.Array]:
  """Returns what a cache of this shape holds of an indexer; None: nothing."""
  return None if c.attention != 'indexed' else jnp.zeros(
      (*shape, 1, c.part(IndexerConfig).head_dim), c.compute_dtype)


def has_blocks(c: ModelConfig) -> bool:
  """Whether the indexer of a layer, if it has one, chooses blocks."""
  return c.attention == 'indexed' and c.part(IndexerConfig).block > 0


def inputs(c: ModelConfig, shape: tuple[int, ...]) -> dict[str, jax.Array]:
  """Returns Index.inputs of rows without a token, likewise."""
  if not has_blocks(c):
    return {}
  sizes = c.part(IndexerConfig)
  shape = *shape[:-1], sizes.block - 1, 1, sizes.head_dim
  return {INPUT: jnp.zeros(shape, c.compute_dtype)}


def kept(c: ModelConfig, seen: np.ndarray) -> np.ndarray:
  """Returns how many keys queries see that may see so many."""
  size, top = max(c.part(IndexerConfig).block, 1), c.part(IndexerConfig).top_k
  return np.minimum(seen // size, top // size) * size + seen % size if (
      top) else seen


def check(c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what a layer with an indexer cannot be."""
  who = "model.attention is 'indexed'"
  require(stack == 'decoder', f'{who}, whose queries choose of the keys before '
          f'them, and model.arch {c.arch!r} is no decoder: choose global')
  require(c.parametrization != 'mup', f'{who}, for whose indexer '
          "model.parametrization 'mup' has no rule: choose standard")
  attention = c.find(AttentionConfig)
  if attention is not None and attention.kv_sharing:
    raise RequestError(f'{who}, and model.kv_sharing is True: a layer chooses '
                       'of keys of its own, so set it to False')
  i = c.part(IndexerConfig)
  require(not i.block or i.top_k % i.block == 0, f'model.indexer.block is '
          f'{i.block}, which does not divide model.indexer.top_k {i.top_k}')
  if positions.position_of(c).rotate:
    require(turned(c) <= i.head_dim, 'model.indexer.head_dim is '
            f'{i.head_dim}, and rotary positions turn {turned(c)} '
            'features of a head: choose as many or more')
