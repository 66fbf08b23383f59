"""Attention to entries that stand for several tokens each, beside a window of
plain keys: CSA, HCA and, without entries, SWA (DeepSeek-AI 2026, DeepSeek-V4,
arXiv 2606.19348, section 2.3; as transformers has it).

  k_m   = R_m n(W_k x_m)                          key and value of all heads
  q_l,h = R_l n(W_q,h n(W_dq x_l))
  e_w   = R_s n(sum over i of p_i * v_i),   p = softmax over i of (z_i + b_i)
  v_i   = W_v x_i,   z_i = W_z x_i
  o_l,h = R_-l sum of softmax([q_l,h [k; e] / sqrt(K), sink_h]) [k; e]
  y_l   = W_o [W_g o_l of the heads of group g] over the groups

A query sees the last `window` keys k, and entries whose windows have closed by
then. e_w is made of the tokens i of a window of `rate` tokens, each feature of
which has weights of its own, and s is the first of them. In HCA a query sees
all such entries. In CSA it sees those that an indexer (indexer.py) scores
highest, whose keys are entries of its own, and each entry is made of the window
before, too, by other v, z and b. R turns the last of the K features, and n is
the norm of the model, in queries without parameters.

Windows begin anew with each document. A cache has the keys of all tokens, the
entries, and v and z of the tokens of windows that have not closed.
"""

import dataclasses
from typing import NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import layers
from architectures.parts import mixer
from architectures.parts import positions
from architectures.parts import sharding
from architectures.parts.attention import indexer
from architectures.parts.attention import kernels
from architectures.parts.attention.indexer import IndexerConfig
from architectures.parts.attention.multi_head import Attention
from architectures.parts.cache import Cache
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context
from architectures.parts.positions import RopeConfig
from architectures.parts.recurrent import features
from architectures.parts.sharding import Role, declare
from common.errors import require
from common.fields import field, FUNCTION, SHAPES


@dataclasses.dataclass(frozen=True)
class CompressedConfig:
  """The fields of mixers csa, hca and swa."""
  GROUP = 'compressed'
  window: int = field(128, 'plain keys that a query sees, its own included',
                      above=0, resume=FUNCTION)
  csa_rate: int = field(4, 'tokens of an entry of csa, and of the one before',
                        above=0, resume=SHAPES)
  hca_rate: int = field(128, 'tokens of an entry of hca', above=0,
                        resume=SHAPES)
  q_rank: int = field(0, 'Size of the vector that queries are made from; '
                      'derived: 2 head_dim.', resume=SHAPES)
  out_groups: int = field(1, 'groups of heads that have a first product of the '
                          'output of their own', above=0, resume=SHAPES)
  out_rank: int = field(0, 'what it makes of a group; derived: 2 head_dim',
                        resume=SHAPES)

  def derived(self, c: ModelConfig) -> 'CompressedConfig':
    return dataclasses.replace(self, q_rank=self.q_rank or 2 * c.head_dim,
                               out_rank=self.out_rank or 2 * c.head_dim)


class Windows(NamedTuple):
  """The windows that tokens close, S tokens that each entry is made of.

  Attributes:
    at_BWS: their places among what is kept of tokens before and the tokens.
    there_BWS: whether the document has them.
    number_BW: which entries of the row these are.
    end_BW: the place of the last token in the row.
    first_BW: the position of the first token of the window.
  """
  at_BWS: jax.Array
  there_BWS: jax.Array
  number_BW: jax.Array
  end_BW: jax.Array
  first_BW: jax.Array


def windows(ctx: Context, L: int, rate: int, slots: int, cached: bool
            ) -> Windows:
  """Returns the windows of L tokens, with entries of `slots` tokens. There are
  as many as L tokens can close; those that stay open are seen by no token."""
  ids_BL, positions_BL = ctx.segment_ids_BL, ctx.positions_BL
  # With a cache, the row goes on: windows are counted from its beginning, and
  # the tokens of the open one stand before the first token.
  before, kept = 0, 0
  number_BW = jnp.arange(max(1, L // rate))[None]
  if cached:
    before, kept = positions_BL[:, :1, None], slots - 1
    number_BW = jnp.arange(-(-L // rate))[None] + positions_BL[:, :1] // rate
  # The place where each window ends, in the row and in its document.
  end_BW = stop_BW = number_BW * rate + rate - 1
  if ids_BL is not None:
    place_BL = jnp.arange(L)[None] - features.starts(ids_BL)
    closed_BL = jnp.cumsum((place_BL + 1) % rate == 0, 1)
    end_BW = jax.vmap(jnp.searchsorted, (0, None))(closed_BL, number_BW[0] + 1)
    stop_BW = _take(place_BL, end_BW)
  last_BW = end_BW if cached else _take(positions_BL, end_BW)
  # The tokens of each window, up to its end.
  back_11S = jnp.arange(1 - slots, 1)[None, None]
  at_BWS = end_BW[..., None] + back_11S + kept - before
  return Windows(
      at_BWS=jnp.clip(at_BWS, 0, kept + L - 1),
      there_BWS=stop_BW[..., None] + back_11S >= 0, number_BW=number_BW,
      end_BW=end_BW, first_BW=last_BW - rate + 1)


def _take(x_BL: jax.Array, at_BW: jax.Array) -> jax.Array:
  """Returns x at these places of each row; past its end, the last one."""
  rows, last = max(len(x_BL), len(at_BW)), x_BL.shape[1] - 1
  at_BW = jnp.minimum(at_BW, last)
  x_BL = jnp.broadcast_to(x_BL, (rows, x_BL.shape[1]))
  at_BW = jnp.broadcast_to(at_BW, (rows, at_BW.shape[1]))
  return jnp.take_along_axis(x_BL, at_BW, 1)


class Entries(nn.Module):
  """(x_BLD, windows, v and z of tokens before) -> (e_BWK, not turned; v and z
  that the next tokens need). `parts`: of how many windows an entry is made."""
  config: ModelConfig
  rate: int
  size: int
  parts: int

  @nn.compact
  def __call__(self, x_BLD: jax.Array, at: Windows, ctx: Context,
               before_BMU: Optional[jax.Array]):
    c, L = self.config, x_BLD.shape[1]
    # v and z side by side, those of tokens before first.
    both_BMU = jnp.concatenate(
        [self._product('value', x_BLD), self._product('score', x_BLD)], -1)
    bias_PU = declare(self, 'score_bias', nn.initializers.zeros,
                      (self.rate, self.parts * self.size), Role((None, None)))
    after_BMU = None
    if before_BMU is not None:
      before_BMU = before_BMU.astype(both_BMU.dtype)
      both_BMU = jnp.concatenate([before_BMU, both_BMU], 1)
      after_BMU = features.last(both_BMU, before_BMU.shape[1], L, ctx.valid_BL)
    both_BMU = sharding.constrain(both_BMU, 'batch', None, None)
    pooled = layers.count_flops_by_result(_pooled, 4 * self.rate * self.parts)
    e_BWK = pooled(both_BMU, bias_PU, at.at_BWS, at.there_BWS)
    return layers.norm(c, 'norm', 'head')(e_BWK), after_BMU

  def _product(self, name: str, x_BLD: jax.Array) -> jax.Array:
    """Returns W x, of the features of all parts."""
    axes, size = ('embed', None), self.parts * self.size
    w_DU = layers.weight(self, name, (x_BLD.shape[-1], size), axes)
    return layers.einsum('BLD,DU->BLU', x_BLD, w_DU, self.config.compute_dtype,
                         axes=axes)


def _pooled(both_BMU: jax.Array, bias_PU: jax.Array, at_BWS: jax.Array,
            there_BWS: jax.Array) -> jax.Array:
  """Returns the weighted means of v by z, both of which are in `both`."""
  (B, M, _), P = both_BMU.shape, len(bias_PU)
  parts = at_BWS.shape[-1] // P
  both_BMVTK = both_BMU.reshape(B, M, 2, parts, -1)
  at_BWS = jnp.broadcast_to(at_BWS, (B, *at_BWS.shape[1:]))
  # v and z of each part: of the windows before, and then of the own.
  of_parts = []
  for i in range(parts):
    at_BWP = at_BWS[..., i * P:(i + 1) * P]
    of_parts.append(jax.vmap(_rows_at)(both_BMVTK[:, :, :, i], at_BWP))
  both_BWSVK = jnp.concatenate(of_parts, 2).astype(jnp.float32)
  v_BWSK, z_BWSK = jnp.moveaxis(both_BWSVK, 3, 0)
  # p = softmax(z + b) over the tokens that the document has.
  bias_TPK = jnp.moveaxis(bias_PU.reshape(P, parts, -1), 1, 0)
  bias_SK = bias_TPK.reshape(parts * P, -1).astype(jnp.float32)
  z_BWSK = jnp.where(there_BWS[..., None], z_BWSK + bias_SK[None, None],
                     kernels.MASKED)
  e_BWK = (jax.nn.softmax(z_BWSK, 2) * v_BWSK).sum(2)
  return e_BWK.astype(both_BMU.dtype)


def _rows_at(x_MVK: jax.Array, at_WP: jax.Array) -> jax.Array:
  return x_MVK[at_WP]


class Scored(indexer.Scored):
  """I of entries, which stand behind plain keys."""

  def best(self, seen_BLM: jax.Array, top_k: int) -> jax.Array:
    count = self.scores_BLM.shape[-1]
    best_BLW = super().best(seen_BLM[..., -count:], min(top_k, count))
    return _joined(seen_BLM[..., :-count], best_BLW)

  def divergence(self, target_BLM: jax.Array, seen_BLM: jax.Array, ctx: Context
                 ) -> jax.Array:
    count = self.scores_BLM.shape[-1]
    return super().divergence(target_BLM[..., -count:], seen_BLM[..., -count:],
                              ctx)


def _joined(*seen: jax.Array) -> jax.Array:
  """Returns the keys that queries see, and then the entries."""
  rows = max(map(len, seen))
  return jnp.concatenate([jnp.broadcast_to(x, (rows, *x.shape[1:]))
                          for x in seen], -1)


class SWA(Attention):
  """(x_BLD, context, cache) -> (y_BLD, cache, report), over x itself.

  PARTS: how many windows an entry is made of; 0: there are no entries.
  """
  settings = CompressedConfig
  FUSED = False
  PARTS = 0

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[Cache]):
    c, m = self.config, self.config.part(CompressedConfig)
    require(not ctx.keep_attention, f'model.mixer {c.mixer!r} weighs entries '
            'of several tokens each: there is no weight of each token to keep')
    # Queries, and a key of each token, which is its value too.
    asks_BLU, q_BLHK = self._queries(x_BLD, ctx)
    k_BM1K, at_BM = self._key(x_BLD, ctx), ctx.positions_BL
    slots = cache is not None and not kernels.begins(self.kind, ctx)
    if cache is not None:
      cache = cache.write(k_BM1K, None, ctx.positions_BL)
    if slots:
      k_BM1K, _, _ = cache.slots
      at_BM = jnp.arange(k_BM1K.shape[1])[None]
    # A query sees a window of them, and entries.
    seen_BLM = kernels.visible(
        LayerKind('banded', self.kind.ffn),
        dataclasses.replace(c, sliding_window=m.window), ctx.positions_BL,
        at_BM, ctx.segment_ids_BL, ctx.segment_ids_BL)
    L, M, scored = q_BLHK.shape[1], k_BM1K.shape[1], None
    if self.PARTS:
      e_BW1K, scored, seen_BLW, cache = self._entries(
          x_BLD, asks_BLU, ctx, cache, slots)
      k_BM1K = jnp.concatenate([k_BM1K, e_BW1K], 1)
      seen_BLM = _joined(seen_BLM, seen_BLW)
    k_BM1K = sharding.constrain(k_BM1K, 'batch', None, None, 'head')
    with layers.count_flops_as_useful_part(
        self._pairs(L, M), L * k_BM1K.shape[1]):
      o_BLHK, report = self.weigh(
          q_BLHK, k_BM1K, k_BM1K, kernels.Seen(kernels.Mask(), seen_BLM), ctx,
          scored=scored)
    o_BLHK = turn(o_BLHK, -ctx.positions_BL, c, ctx.length)
    return self._grouped(o_BLHK, ctx), cache, report

  def _queries(self, x_BLD: jax.Array, ctx: Context
               ) -> tuple[jax.Array, jax.Array]:
    """Returns what queries are made of, n(W_dq x), and the queries."""
    c, m = self.config, self.config.part(CompressedConfig)
    asks_BLU = self._dense('query_down', 'BLD,DU->BLU', x_BLD,
                           ('embed', None), ctx, m.q_rank)
    asks_BLU = layers.norm(c, 'query_norm', 'latent')(asks_BLU)
    q_BLHK = self._dense('query_up', 'BLU,UHK->BLHK', asks_BLU,
                         ('latent', 'heads', 'head'), ctx, c.num_heads,
                         c.head_dim)
    q_BLHK = layers.PlainRMSNorm(c, name='head_norm')(q_BLHK)
    q_BLHK = turn(q_BLHK, ctx.positions_BL, c, ctx.length)
    return asks_BLU, sharding.constrain(
        q_BLHK, 'batch', 'length', 'heads', 'head')

  def _key(self, x_BLD: jax.Array, ctx: Context) -> jax.Array:
    """Returns the key of each token, [B, L, 1, K]."""
    c = self.config
    k_BLK = self._dense('key', 'BLD,DK->BLK', x_BLD, ('embed', 'head'), ctx,
                        c.head_dim)
    k_BLK = layers.norm(c, 'key_norm', 'head')(k_BLK)
    return turn(k_BLK[:, :, None], ctx.positions_BL, c, ctx.length)

  def _dense(self, name: str, spec: str, x: jax.Array,
             axes: tuple[str | None, ...], ctx: Context, *shape: int
             ) -> jax.Array:
    """Declares a weight of these outputs, and multiplies by it."""
    return layers.dense(
        self, name, spec, x, (x.shape[-1], *shape), axes, with_bias=False,
        deterministic=ctx.deterministic)

  def _grouped(self, o_BLHK: jax.Array, ctx: Context) -> jax.Array:
    """Returns the output, of two products, the first for each group."""
    c, (B, L, H, K) = self.config, o_BLHK.shape
    m = c.part(CompressedConfig)
    axes = 'heads', None, 'head', 'latent'
    shape = m.out_groups, H // m.out_groups, K
    w_GHKU = layers.weight(self, 'out_down', (*shape, m.out_rank), axes,
                           in_axes=(1, 2), batch_axes=(0,))
    y_BLGU = layers.einsum('BLGHK,GHKU->BLGU', o_BLHK.reshape(B, L, *shape),
                           w_GHKU, c.compute_dtype, axes=axes)
    y_BLGU = sharding.constrain(y_BLGU, 'batch', 'length', 'heads', None)
    return layers.dense(
        self, 'out', 'BLGU,GUD->BLD', y_BLGU, (*y_BLGU.shape[2:], c.d_model),
        ('heads', None, 'embed'), in_axes=(0, 1), residual=True,
        with_bias=False, deterministic=ctx.deterministic)

  def _entries(self, x_BLD: jax.Array, asks_BLU: jax.Array, ctx: Context,
               cache: Optional[Cache], slots: bool):
    """Returns the entries, what an indexer scored, which of them each query
    sees, and the cache with those that are new."""
    c, L, rate = self.config, x_BLD.shape[1], rate_of(self.config)
    at = windows(ctx, L, rate, rate * self.PARTS, cache is not None)
    e_BW1K, kept = made(c, self.PARTS, 'entry', c.head_dim, x_BLD, at, ctx,
                        cache, slots)
    # A query sees those that have ended, in its document.
    q_BL, end_BW = jnp.arange(L)[None], at.end_BW
    if cache is not None:
      q_BL = ctx.positions_BL
    if slots:
      end_BW = jnp.arange(1, e_BW1K.shape[1] + 1)[None] * rate - 1
    seen_BLW = end_BW[:, None] <= q_BL[:, :, None]
    if ctx.segment_ids_BL is not None:
      start_BL = features.starts(ctx.segment_ids_BL)
      seen_BLW &= end_BW[:, None] >= start_BL[:, :, None]
    scored = None
    if c.mixer == 'csa':
      scored, of_index = self._scored(x_BLD, asks_BLU, at, ctx, cache, slots)
      kept |= of_index
    if cache is not None:
      cache = cache.replace(inputs=cache.inputs | kept)
    return e_BW1K, scored, seen_BLW, cache

  def _scored(self, x_BLD: jax.Array, asks_BLU: jax.Array, at: Windows,
              ctx: Context, cache: Optional[Cache], slots: bool
              ) -> tuple['Scored', dict[str, jax.Array]]:
    """Returns an indexer's scores of the entries, by entries of its own, and
    what a cache keeps of these."""
    c, L = self.config, x_BLD.shape[1]
    sizes, kept = c.part(IndexerConfig), {}

    def turned(q_BLHK: jax.Array, ctx: Context) -> jax.Array:
      return turn(q_BLHK, ctx.positions_BL, c, ctx.length, of_index=True)

    def keys(x_BLD: jax.Array) -> jax.Array:
      e_BW1K, new = made(c, self.PARTS, 'index', sizes.head_dim, x_BLD, at, ctx,
                         cache, slots)
      kept.update(new)
      return e_BW1K

    index = indexer.Indexer(c, 'latent', name='indexer')(
        x_BLD, asks_BLU, ctx, turn=turned, keys=keys)
    M = cache.num_slots if slots else L
    entries = index.key_BMJK.shape[1]
    with layers.count_flops_as_useful_part(
        self._pairs(L, M, whole=True), L * entries):
      return Scored(indexer.scores(index)), kept

  def _pairs(self, queries: int, keys: int, whole: bool = False) -> int:
    """Returns how many pairs of a query and a key or an entry there are, where
    the queries are the last of so many tokens; `whole`: of all entries that a
    query might see."""
    c, at = self.config, np.arange(keys - queries, keys) + 1
    seen = 0 if whole else np.minimum(at, c.part(CompressedConfig).window)
    if self.PARTS:
      entries = at // rate_of(c)
      if c.mixer == 'csa' and not whole:
        top = c.part(IndexerConfig).top_k
        entries = np.minimum(entries, top) if top else entries
      seen = seen + entries
    return int(seen.sum())


def made(c: ModelConfig, parts: int, name: str, size: int, x_BLD: jax.Array,
         at: Windows, ctx: Context, cache: Optional[Cache], slots: bool
         ) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns entries, turned, [B, W, 1, K], and what a cache keeps of them: with
  `slots` they are all that it has. Their parameters stand in the module that
  calls: the layer's attention, or its indexer.

  Args:
    c: the config of the layer.
    parts: of how many windows an entry is made.
    name: entry, or index.
    size: K, the features of an entry.
    x_BLD: the input of the layer.
    at: the windows that the tokens close.
    ctx: the context.
    cache: what the layer keeps.
    slots: whether queries meet what the cache holds.
  """
  before_BMU = None if cache is None else cache.inputs[f'{name}_open']
  e_BWK, after_BMU = Entries(
      c, rate=rate_of(c), size=size, parts=parts, name='entries')(
          x_BLD, at, ctx, before_BMU)
  e_BW1K = turn(e_BWK[:, :, None], at.first_BW, c, ctx.length,
                of_index=name == 'index')
  if cache is None:
    return e_BW1K, {}
  all_BWK = cache.inputs[name]
  rows_B1 = jnp.arange(len(all_BWK))[:, None]
  new_BWK = e_BW1K[:, :, 0].astype(all_BWK.dtype)
  all_BWK = all_BWK.at[rows_B1, at.number_BW].set(new_BWK, mode='drop')
  if slots:
    e_BW1K = all_BWK[:, :, None]
  return e_BW1K, {name: all_BWK, f'{name}_open': after_BMU}


class HCA(SWA):
  PARTS = 1


class CSA(SWA):
  PARTS = 2


def rate_of(c: ModelConfig) -> int:
  """Returns how many tokens an entry stands for."""
  m = c.part(CompressedConfig)
  return m.csa_rate if c.mixer == 'csa' else m.hca_rate


def turn(x_BLHK: jax.Array, positions_BL: jax.Array, c: ModelConfig,
         length: int | jax.Array, of_index: bool = False) -> jax.Array:
  """Returns x whose last features are turned, as many as of a head; pairs `of
  index` are those of an indexer."""
  rotate = positions.position_of(c).rotate
  if not rotate:
    return x_BLHK
  dim, rope = positions.rotary_dim(c), c.part(RopeConfig)
  pairs = c.part(IndexerConfig) if of_index else rope
  of_tail = dataclasses.replace(c, head_dim=dim).with_part(
      RopeConfig, fraction=rope.fraction if rope.proportional else 1.0,
      interleaved=pairs.interleaved)
  rest, tail = jnp.split(x_BLHK, (x_BLHK.shape[-1] - dim,), -1)
  tail = rotate(tail, positions_BL, of_tail, length)
  return jnp.concatenate([rest, tail], -1)


class Compressed(mixer.Mixer):
  """The entry of an attention to entries in the table of mixers."""
  positional = turns_heads = has_scores = True
  may_be_one = ('compressed.out_groups',)

  def __init__(self, module: type[SWA], *fields: str):
    """Initialises the entry.

    Args:
      module: its layer.
      *fields: the fields of config.model that it reads and SWA does not.
    """
    self.module = module
    self.fields = (
        'attention_scale', 'norm_eps', *mixer.FIELDS_OF_SCORES, *fields)

  def cache(self, c: ModelConfig, shape: tuple[int, ...]) -> Cache:
    *rows, M = shape
    parts = self.module.PARTS
    inputs = {}
    if parts:
      sizes = {'entry': c.head_dim}
      if c.mixer == 'csa':
        sizes['index'] = c.part(IndexerConfig).head_dim
      rate = rate_of(c)
      for name, size in sizes.items():
        entries = *rows, max(1, M // rate), size
        inputs[name] = jnp.zeros(entries, c.compute_dtype)
        last = *rows, rate * parts - 1, 2 * parts * size
        inputs[f'{name}_open'] = jnp.zeros(last, c.compute_dtype)
    key_BM1K = jnp.zeros((*shape, 1, c.head_dim), c.compute_dtype)
    return Cache(key_BMJK=key_BM1K, inputs=inputs)

  def keeps_state(self, c: ModelConfig) -> bool:
    return True  # an entry of several tokens, or a window, is read as a whole

  def fields_to_divide(self, c: ModelConfig) -> mixer.AxesAndFields:
    return (('tensor', 'num_heads'), ('fsdp', 'compressed.q_rank'),
            ('tensor', 'compressed.out_groups'))

  def check(self, c: ModelConfig, stack: str) -> None:
    m, who = c.part(CompressedConfig), f'model.mixer is {c.mixer!r}'
    require(stack == 'decoder', f'{who}, whose entries are made of the tokens '
            f'before, and model.arch {c.arch!r} is no decoder: choose '
            'attention')
    require(c.attention == 'global', f'{who}, which says itself what a query '
            f'sees: set model.attention {c.attention!r} to global')
    require(c.parametrization != 'mup', f'{who}, for whose ranks '
            "model.parametrization 'mup' has no rule: choose standard")
    require(not positions.position_of(c).has_bias,
            f'{who}, which has no bias by distances as model.position '
            f'{c.position!r}: choose rope')
    require(c.num_heads % m.out_groups == 0, 'model.compressed.out_groups is '
            f'{m.out_groups}, which does not divide model.num_heads '
            f'{c.num_heads}')
    if c.mixer != 'csa':
      return
    sizes = c.part(IndexerConfig)
    require(not sizes.block, f'{who}, whose entries are chosen one by one: set '
            'model.indexer.block to 0')
    if positions.position_of(c).rotate:
      require(indexer.turned(c) <= sizes.head_dim, 'model.indexer.head_dim '
              f'is {sizes.head_dim}, and rotary positions turn '
              f'{indexer.turned(c)} features of a head: choose as many or more')
