"""Multi-head attention: softmax(scale * q k^T + bias) v over visible keys.

Heads may share keys and values (grouped heads: Ainslie et al. 2023, num_kv
heads = 1: Shazeer 2019), be banded (a query sees the last `sliding_window`
keys), capped (softcap * tanh(score / softcap), Gemma 2), and have a learned
sink per head in the denominator, values that are the keys themselves (Gemma 4),
and a gate on what the heads return: GATES. steps.py has the equations of what
changes queries, keys and values: norms, clips, positions, convolutions, and
what is mixed into values. Which keys a query sees is in kernels.py.

A layer with kv_sharing has no keys and values of its own and reads those of an
earlier layer, as they were turned and mixed there (cross-layer attention:
Brandon et al. 2024, arXiv 2405.12981; which layer: kinds.source).
"""

import dataclasses
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts import mixer
from architectures.parts import positions
from architectures.parts import sharding
from architectures.parts.attention import indexer
from architectures.parts.attention import kernels
from architectures.parts.attention import steps
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.attention.indexer import IndexerConfig
from architectures.parts.cache import Cache
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context, FirstLayerValues, KeysAndValues
from architectures.parts.report import Report
from common.errors import RequestError

GATE = 'output_gate'  # its weight, and the product for adapters


class Attention(nn.Module):
  """The base of all forms of attention: the way from queries, keys and values
  to the output, and an indexer that chooses keys.

  FUSED: whether a fused kernel may weigh the values.
  """
  FUSED = True
  config: ModelConfig
  kind: LayerKind

  @property
  def scale(self) -> float:
    """The factor of the products of queries and keys."""
    return self.config.score_scale * positions.position_of(
        self.config).score_factor(self.config)

  def project(self, name: str, x_BLD: jax.Array, ctx: Context) -> jax.Array:
    """Returns W x, [B, L, heads, K], for the `name` query, key or value."""
    c = self.config
    heads, axis, gain = c.num_kv_heads, 'kv_heads', 1.0
    if name == 'query':
      heads, axis = c.num_heads, 'heads'
      if c.init == 'fan_in':
        # The query's weights have the factor that the scores lack (T5).
        gain = c.base_head_dim ** -0.5 / c.attention_scale
    return layers.dense(
        self, name, 'BLD,DHK->BLHK', x_BLD, (c.d_model, heads, c.head_dim),
        ('embed', axis, 'head'), gain=gain, with_bias=c.attention_bias,
        deterministic=ctx.deterministic)

  def biased(self, seen: kernels.Seen, x_BLD: jax.Array, q_BLHK: jax.Array,
             k_BMJK: jax.Array, at_BM: jax.Array, ctx: Context
             ) -> kernels.Seen:
    """Returns what the queries see, with the bias that the layer makes itself,
    where its position encoding has one."""
    bias = positions.position_of(self.config).layer_bias
    if not bias:
      return seen
    bias_BHLM = bias(self, x_BLD, q_BLHK, k_BMJK, at_BM, ctx)
    return seen._replace(mask=seen.mask.replace(bias=True),
                         bias_BHLM=bias_BHLM)

  def weigh(self, q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
            seen: kernels.Seen, ctx: Context, *, fused: bool = True,
            strict: bool = True, scored: Optional[indexer.Scored] = None
            ) -> tuple[jax.Array, Report]:
    """Returns o_l = sum over m of softmax over m (scale q_l k_m) v_m, of the
    keys that l sees, [B, L, H, K].

    Args:
      q_BLHK: queries.
      k_BMJK: keys.
      v_BMJK: values.
      seen: which keys the queries see.
      ctx: the context.
      fused: whether a fused kernel may compute it; none meets a cache's slots.
      strict: as of kernels.choose.
      scored: the scores of the keys by an indexer; None: there is none.

    Returns:
      o, and a report: the weights where the context asks for them, and in
      training the loss of an indexer.
    """
    c, key, sink_H = self.config, None, None
    L, M = q_BLHK.shape[1], k_BMJK.shape[1]
    # An indexer hides keys, and dropout hides weights.
    if scored is not None:
      seen = self._best(seen, scored, M)
    mask = seen.mask
    if c.attention_dropout and not ctx.deterministic:
      key, mask = self.make_rng('dropout'), mask.replace(dropout=True)
    if c.attention_sinks:
      sink_H = layers.bias(self, 'sink', (c.num_heads,), ('heads',))
    scores = dict(mask_BLM=seen.seen_BLM, bias_BHLM=seen.bias_BHLM,
                  sink_H=sink_H, scale=self.scale, softcap=c.attention_softcap)
    # The layer reports its weights, which `attend` does not return.
    causal, report = mask.in_parts(L), Report()
    if ctx.keep_attention:
      report = report.replace(
          weights_BHLM=kernels.weights(q_BLHK, k_BMJK, **scores))
    if scored is not None and not ctx.deterministic:
      loss = self._indexer_loss(
          scored, *jax.lax.stop_gradient((q_BLHK, k_BMJK)), seen.seen_BLM, ctx,
          causal=causal, **scores)
      report = report.replace(losses={'indexer': loss})
    # The products, by the kernel that the config asks for.
    kernel = 'xla'
    if self.FUSED and fused and not self.is_initializing():
      kernel = kernels.choose(c, mask, L, M, strict=strict)
    if kernel == 'xla':
      o_BLHK = kernels.attend(
          q_BLHK, k_BMJK, v_BMJK, key=key, dropout=c.attention_dropout,
          causal=causal, window=mask.window, **scores)
    else:
      o_BLHK = kernels.KERNELS[kernel].run(
          q_BLHK, k_BMJK, v_BMJK, mask, seen.seen_BLM, scale=self.scale,
          softcap=c.attention_softcap, sink_H=sink_H)
    return o_BLHK, report

  def output(self, x_BLD: jax.Array, o_BLHK: jax.Array, ctx: Context
             ) -> jax.Array:
    """Returns y = W_o o, [B, L, D], of what the heads return through a gate,
    where there is one: see GATES."""
    c = self.config
    gate = GATES[c.attention_gate]
    if gate:
      o_BLHK = gate(self, x_BLD, o_BLHK, deterministic=ctx.deterministic)
    o_BLHK = sharding.constrain(o_BLHK, 'batch', 'length', 'heads', 'head')
    return layers.dense(
        self, 'out', 'BLHK,HKD->BLD', o_BLHK, (*o_BLHK.shape[2:], c.d_model),
        ('heads', 'head', 'embed'), in_axes=(0, 1), residual=True,
        with_bias=c.attention_bias and c.attention_out_bias,
        deterministic=ctx.deterministic)

  def useful(self, queries: jax.Array, keys: jax.Array, ctx: Context) -> Any:
    """Returns a scope whose products count as those of the pairs of a query and
    a key that the mask shows: see layers.count_flops_as_useful_part."""
    part, whole, prompt = kernels.share(
        self.kind, self.config, queries.shape[1], keys.shape[1],
        prefix=ctx.prefix_B is not None)
    return layers.count_flops_as_useful_part(part, whole, prompt)

  # An indexer (indexer.py) chooses the keys that a query sees.

  def index(self, x_BLD: jax.Array, asks_BLU: jax.Array, axis: str,
            ctx: Context, cache: Optional[Cache]
            ) -> tuple[Optional[indexer.Index], Optional[Cache]]:
    """Returns what an indexer makes of the tokens, None: there is none; and the
    cache with what it keeps of them beside its keys. `axis` is the logical axis
    of `asks_BLU`, what its queries are made of."""
    if not kernels.RULES[self.kind.attention].top:
      return None, cache
    before = None if cache is None else cache.inputs
    index = indexer.Indexer(self.config, axis, name='indexer')(
        x_BLD, asks_BLU, ctx, before)
    if cache is not None:
      cache = cache.replace(inputs=cache.inputs | index.inputs)
    return index, cache

  def choose(self, index: Optional[indexer.Index], at_BM: jax.Array,
             arrays: tuple[jax.Array, ...], ctx: Context, slots: bool
             ) -> tuple[Optional[indexer.Scored], jax.Array, tuple]:
    """Returns the indexer's scores of the keys, the keys' positions and their
    arrays [B, M, J, K]. Where one token meets the `slots` of a cache, the keys
    that it chooses alone are returned, without scores."""
    if index is None:
      return None, at_BM, arrays
    c, top = self.config, self.config.part(IndexerConfig).top_k
    B, L = index.query_BLHK.shape[:2]
    M = arrays[0].shape[1]
    # All keys that a query may see are scored.
    whole = dataclasses.replace(self.kind, attention='global')
    share = kernels.share(whole, c, L, M, prefix=ctx.prefix_B is not None)
    with layers.count_flops_as_useful_part(*share):
      scored = indexer.scored(c, index, None if slots else ctx.segment_ids_BL)
    gathers = (slots and indexer.gathers(top, (B, L, M))
               and ctx.distances.bias_BHLM is None and not ctx.keep_attention)
    if not gathers:
      return scored, at_BM, arrays
    seen_BLM = kernels.seen(self.kind, c, ctx, at_BM).seen_BLM
    best_BM = scored.places(seen_BLM, top)
    chosen = [jnp.take_along_axis(x_BMJK, best_BM[..., None, None], 1,
                                  mode='clip') for x_BMJK in arrays]
    return None, best_BM, tuple(chosen)

  def _indexer_loss(self, scored: indexer.Scored, q_BLHK: jax.Array,
                    k_BMJK: jax.Array, seen_BLM: Optional[jax.Array],
                    ctx: Context, **scores: Any) -> jax.Array:
    """Returns how far the indexer is from the mean over heads of the weights.
    """
    target_BLM = jax.lax.stop_gradient(kernels.weights(
        q_BLHK, k_BMJK, mean=True, **scores))
    distance = scored.divergence(target_BLM, seen_BLM, ctx)
    return self.config.part(IndexerConfig).loss_weight * distance

  def _best(self, seen: kernels.Seen, scored: indexer.Scored, keys: int
            ) -> kernels.Seen:
    """Returns which of so many keys are seen, of those that an indexer scores
    highest."""
    top = self.config.part(IndexerConfig).top_k
    if not 0 < top < keys:
      return seen
    return seen._replace(seen_BLM=scored.best(seen.seen_BLM, top),
                         mask=seen.mask.replace(rule=True))


class SelfAttention(Attention):
  """Attention of the tokens of a row to one another:
  (x_BLD, context, cache) -> (y_BLD, cache, report).

    q_l = W_q x_l,   k_m = W_k x_m,   v_m = W_v x_m
    y_l = W_o sum over m of softmax over m (scale q_l k_m) v_m

  steps.py has what changes q, k and v; kernels.weights is the softmax.
  """
  settings = AttentionConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[Cache]
               ) -> tuple[jax.Array, Optional[Cache], Report]:
    c = self.config
    index, cache = self.index(x_BLD, x_BLD, 'embed', ctx, cache)
    q_BLHK, cache = self.queries(x_BLD, ctx, cache)
    # Keys and values: an earlier layer's, or the layer's own.
    slots = cache is not None and not kernels.begins(self.kind, ctx)
    keys, first = ctx.shared.keys, None
    if keys is None:
      keys, first, cache = self.keys_and_values(x_BLD, ctx, cache)
      keys, index, cache = remembered(keys, index, ctx, cache, slots)
    k_BMJK, v_BMJK = keys.key_BMJK, keys.value_BMJK
    at_BM = ctx.positions_BL
    if slots:
      at_BM = jnp.arange(k_BMJK.shape[1])[None]
    scored, at_BM, (k_BMJK, v_BMJK) = self.choose(
        index, at_BM, (k_BMJK, v_BMJK), ctx, slots)
    # Queries may be split over the mesh along the length; each sees all keys.
    k_BMJK = sharding.constrain(k_BMJK, 'batch', None, 'kv_heads', 'head')
    v_BMJK = sharding.constrain(v_BMJK, 'batch', None, 'kv_heads', 'head')
    # Each query weighs the values of the keys that it sees.
    seen = self.biased(kernels.seen(self.kind, c, ctx, at_BM), x_BLD, q_BLHK,
                       k_BMJK, at_BM, ctx)
    with self.useful(q_BLHK, k_BMJK, ctx):
      o_BLHK, report = self.weigh(
          q_BLHK, k_BMJK, steps.values_of_pairs(c, v_BMJK), seen, ctx,
          fused=not slots, strict=cache is None, scored=scored)
    o_BLHK = steps.subtracted(self, o_BLHK)
    lent = KeysAndValues(k_BMJK, v_BMJK) if ctx.shared.lends else None
    report = report.replace(first_values=first, keys=lent)
    return self.output(x_BLD, o_BLHK, ctx), cache, report

  def queries(self, x_BLD: jax.Array, ctx: Context, cache: Optional[Cache]
              ) -> tuple[jax.Array, Optional[Cache]]:
    """Returns the queries, and the cache."""
    q_BLHK, cache = self.projected('query', x_BLD, ctx, cache)
    for step in steps.QUERIES:
      q_BLHK = step(self, 'query', q_BLHK, ctx)
    return q_BLHK, cache

  def keys_and_values(self, x_BLD: jax.Array, ctx: Context,
                      cache: Optional[Cache]
                      ) -> tuple[KeysAndValues, Optional[FirstLayerValues],
                                 Optional[Cache]]:
    """Returns the tokens' keys and values, the values of the first layer with
    model.value_residual, and the cache."""
    k_BLJK, cache = self.projected('key', x_BLD, ctx, cache)
    v_BLJK = k_BLJK
    if not self.config.part(AttentionConfig).keys_as_values:
      v_BLJK, cache = self.projected('value', x_BLD, ctx, cache)
    for step in steps.VALUES:
      v_BLJK = step(self, 'value', v_BLJK, ctx)
    v_BLJK, first = steps.mixed_with_first(
        self, x_BLD, v_BLJK, ctx.shared.first_values)
    v_BLJK = steps.with_embedding(self, x_BLD, v_BLJK, ctx)
    for step in steps.KEYS:
      k_BLJK = step(self, 'key', k_BLJK, ctx)
    return KeysAndValues(k_BLJK, v_BLJK), first, cache

  def projected(self, name: str, x_BLD: jax.Array, ctx: Context,
                cache: Optional[Cache]
                ) -> tuple[jax.Array, Optional[Cache]]:
    """Returns W x and, with model.attention_conv, a convolution of it; and the
    cache, which holds the convolution's last inputs."""
    axis = 'heads' if name == 'query' else 'kv_heads'
    x_BLHK = self.project(name, x_BLD, ctx)
    if self.config.part(AttentionConfig).attention_conv:
      x_BLHK, cache = steps.convolved(
          self, name, x_BLHK, (axis, 'head'), ctx, cache)
    return sharding.constrain(x_BLHK, 'batch', 'length', axis, 'head'), cache


def remembered(keys: KeysAndValues, index: Optional[indexer.Index],
               ctx: Context, cache: Optional[Cache], slots: bool
               ) -> tuple[KeysAndValues, Optional[indexer.Index],
                          Optional[Cache]]:
  """Returns the keys and values that queries meet, and an indexer's keys: those
  of the tokens or, where `slots` says so, of all tokens in the cache; and the
  cache, with the tokens in it."""
  if cache is None:
    return keys, index, None
  index_BLJK = None if index is None else index.key_BMJK
  cache = cache.write(keys.key_BMJK, keys.value_BMJK, ctx.positions_BL,
                      index_BLJK)
  if not slots:
    return keys, index, cache
  k_BMJK, v_BMJK, index_BMJK = cache.slots
  if index is not None:
    index = index.replace(key_BMJK=index_BMJK)
  return KeysAndValues(k_BMJK, v_BMJK), index, cache


class CrossAttention(Attention):
  """Attention of the tokens to a memory, the result of an encoder:
  (x_BLD, context, cache) -> (y_BLD, cache, report).

    q_l = W_q x_l,   k_m = W_k z_m,   v_m = W_v z_m,   z = the memory
    y_l = W_o sum over m of softmax over m (scale q_l k_m) v_m

  A cache that is given the memory holds its keys and values from then on.
  """

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[Cache]
               ) -> tuple[jax.Array, Optional[Cache], Report]:
    q_BLHK = self.projected('query', x_BLD, steps.MEMORY, ctx)
    if ctx.memory.x_BMD is None:
      k_BMJK, v_BMJK = cache.memory
    else:
      k_BMJK, v_BMJK = self.keys_and_values(ctx.memory.x_BMD, ctx)
      if cache is not None:
        cache = cache.replace(memory_key_BMJK=k_BMJK, memory_value_BMJK=v_BMJK)
    # Queries may be split over the mesh along the length; each sees all keys.
    k_BMJK = sharding.constrain(k_BMJK, 'batch', None, 'kv_heads', 'head')
    v_BMJK = sharding.constrain(v_BMJK, 'batch', None, 'kv_heads', 'head')
    v_BMJK = steps.values_of_pairs(self.config, v_BMJK)
    with layers.count_flops_as_useful_part(1, 1):
      o_BLHK, report = self.weigh(
          q_BLHK, k_BMJK, v_BMJK, seen_of_memory(ctx), ctx,
          fused=cache is None, strict=cache is None)
    o_BLHK = steps.subtracted(self, o_BLHK)
    report = Report(memory_weights_BHLM=report.weights_BHLM)
    return self.output(x_BLD, o_BLHK, ctx), cache, report

  def keys_and_values(self, memory_BMD: jax.Array, ctx: Context
                      ) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and values of the memory."""
    k_BMJK = self.projected('key', memory_BMD, (), ctx)
    v_BMJK = k_BMJK
    if not self.config.part(AttentionConfig).keys_as_values:
      v_BMJK = self.projected('value', memory_BMD, (), ctx)
    for step in steps.VALUES:
      v_BMJK = step(self, 'value', v_BMJK, ctx)
    for step in steps.MEMORY:
      k_BMJK = step(self, 'key', k_BMJK, ctx)
    return k_BMJK, v_BMJK

  def projected(self, name: str, x_BLD: jax.Array, then: tuple, ctx: Context
                ) -> jax.Array:
    """Returns W x after the steps `then`."""
    axis = 'heads' if name == 'query' else 'kv_heads'
    x_BLHK = self.project(name, x_BLD, ctx)
    x_BLHK = sharding.constrain(x_BLHK, 'batch', 'length', axis, 'head')
    for step in then:
      x_BLHK = step(self, name, x_BLHK, ctx)
    return x_BLHK


def seen_of_memory(ctx: Context) -> kernels.Seen:
  """Returns which tokens of the memory each token sees: those of its segment.
  """
  k_ids_BM = ctx.memory.segment_ids_BM
  if k_ids_BM is None:
    return kernels.Seen(kernels.Mask())
  ids_BL = ctx.segment_ids_BL
  if ids_BL is None:
    ids_BL = jnp.ones((1, 1), jnp.int32)
  seen_BLM = ids_BL[:, :, None] == k_ids_BM[:, None]
  return kernels.Seen(kernels.Mask(ids_BL, k_ids_BM), seen_BLM)


class MultiHead(mixer.Mixer):
  """The entry of attention in the table of mixers."""
  module = SelfAttention
  fields = 'num_kv_heads', 'attention_scale', *mixer.FIELDS_OF_ATTENTION
  positional = turns_heads = has_scores = True

  def cache(self, c: ModelConfig, shape: tuple[int, ...]) -> Cache:
    key_BMJK = value_BMJK = None
    fields = c.part(AttentionConfig)
    convolved = {'query': c.num_heads}
    if not fields.kv_sharing:
      convolved |= {'key': c.num_kv_heads, 'value': c.num_kv_heads}
      slots = *shape, c.num_kv_heads, c.head_dim
      key_BMJK = jnp.zeros(slots, c.compute_dtype)
      value_BMJK = jnp.zeros(slots, c.compute_dtype)
    inputs = indexer.inputs(c, shape)
    if fields.attention_conv:
      for name, heads in convolved.items():
        last = *shape[:-1], fields.attention_conv - 1, heads, c.head_dim
        inputs[name] = jnp.zeros(last, c.compute_dtype)
    return Cache(key_BMJK=key_BMJK, value_BMJK=value_BMJK,
                 index_BMJK=indexer.empty(c, shape), inputs=inputs)

  def products(self, c: ModelConfig) -> set[str]:
    fields = c.part(AttentionConfig)
    there = {'query', 'out'} | gate_products(c.attention_gate)
    if not fields.kv_sharing:
      there.add('key')
      if not fields.keys_as_values:
        there.add('value')
    return there

  def fields_to_divide(self, c: ModelConfig) -> mixer.AxesAndFields:
    return ('tensor', 'num_heads'), ('tensor', 'num_kv_heads')

  def check(self, c: ModelConfig, stack: str) -> None:
    odd = c.num_kv_heads % 2 != 0
    difference = c.part(AttentionConfig).attention_difference
    if difference and (odd or c.parametrization == 'mup'):
      raise RequestError(
          f'model.attention_difference is {difference}: it needs '
          'an even model.num_kv_heads, and model.parametrization standard; '
          f'they are {c.num_kv_heads} and {c.parametrization}')


# A gate on what the heads return, before the output's product (Qiu et al. 2025,
# "Gated Attention for Large Language Models", arXiv 2505.06708, the gate that
# it calls G1; Qwen3-Next).
#
#   y = W_o (o * sigmoid(W_g x))
#
# x is what the layer's queries are made of, and o what its heads return. The
# gate has a number for each feature of each head (elementwise, as in
# Qwen3-Next), or one for each head (headwise). Where the products of attention
# have biases, so has that of the gate. An entry of GATES, at the end of this
# file, is all that there is of one.


def _elementwise(module: Any, x_BLD: jax.Array, o_BLHK: jax.Array, *,
                 deterministic: bool) -> jax.Array:
  """Returns o with each of its features multiplied by a gate."""
  H, K = o_BLHK.shape[2:]
  axes = 'embed', 'heads', 'head'
  z_BLHK = layers.dense(
      module, GATE, 'BLD,DHK->BLHK', x_BLD, (x_BLD.shape[-1], H, K), axes,
      output=False, with_bias=False, deterministic=deterministic)
  return o_BLHK * _opened(module, z_BLHK, axes[1:])


def _headwise(module: Any, x_BLD: jax.Array, o_BLHK: jax.Array, *,
              deterministic: bool) -> jax.Array:
  """Returns o with each head multiplied by a gate.

  A wider model may have as many heads, so in muP the numbers of heads are
  logits, as a router's: divided by how many times as wide it is as its base.
  """
  H, axes = o_BLHK.shape[2], ('embed', 'heads')
  z_BLH = layers.dense(
      module, GATE, 'BLD,DH->BLH', x_BLD, (x_BLD.shape[-1], H), axes,
      output=True, with_bias=False, deterministic=deterministic)
  z_BLH = z_BLH / module.config.widening
  return o_BLHK * _opened(module, z_BLH, axes[1:])[..., None]


def _opened(module: Any, z: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Returns the gate of its logits, whose axes after the length are `axes`;
  muP does not divide the bias."""
  if module.config.attention_bias:
    bias = layers.bias(module, f'{GATE}_bias', z.shape[2:], axes)
    z = layers.add_bias(z, bias)
  z = sharding.constrain(z, 'batch', 'length', *axes)
  return jax.nn.sigmoid(z)


def gate_products(gate: str) -> set[str]:
  """Returns which of layers.NAMES_OF_PRODUCTS a layer has for its gate."""
  return {GATE} if GATES[gate] else set()


GATES = {
    'none': None,
    'elementwise': _elementwise,
    'headwise': _headwise,
}
