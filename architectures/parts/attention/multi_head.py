"""Multi-head attention: softmax(scale * q k^T + bias) v over visible keys.

Heads may share keys and values (grouped heads: Ainslie et al. 2023, num_kv
heads = 1: Shazeer 2019), be banded (a query sees the last `sliding_window`
keys), capped (softcap * tanh(score / softcap), Gemma 2), have normalised
queries and keys (QK-norm: each head by itself, as in Qwen3, or all that is
projected, as in OLMo 2) or bounded ones (clipped, as in Inkling 2), normalised
values that may be the keys themselves (Gemma 4), a learned sink per head in the
denominator, and what has equations of its own further down: differences of
pairs of heads, a gate on what the heads return, more in their values, and short
convolutions of queries, keys and values. Which keys a query sees is in
kernels.py.

A layer with kv_sharing has no keys and values of its own and reads those of an
earlier layer, as they were turned and mixed there (cross-layer attention:
Brandon et al. 2024, arXiv 2405.12981; which layer: kinds.source).
"""

import dataclasses
import functools
from typing import Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts import positions
from architectures.parts import sharding
from architectures.parts.attention import indexer
from architectures.parts.attention import kernels
from architectures.parts.attention.indexer import IndexerConfig
from architectures.parts.cache import Cache
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context, First, Keys
from architectures.parts.recurrent import features
from architectures.parts.report import Report
from architectures.parts.sharding import Role, declare
from common.errors import require

GATE = 'output_gate'  # its weight, and the product for adapters
VALUE_AXES = 'batch', 'length', 'kv_heads', 'head'


class Attention(nn.Module):
  """(x_BLD, context, cache) -> (y_BLD, cache, report), over x itself or the
  memory."""
  FUSED = True  # whether a fused kernel may weigh the values
  config: ModelConfig
  kind: LayerKind
  cross: bool = False

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[Cache]):
    c = self.config
    rotate = None if self.cross else positions.of(c).rotate
    cached, shared, memory = cache is not None, ctx.shared, ctx.memory
    slots = cached and (self.cross or not kernels.begins(self.kind, ctx))
    index, cache = self._index(x_BLD, x_BLD, 'embed', ctx, cache)
    read = None if self.cross else shared.keys
    before, after, first = cache.inputs if cached else {}, {}, None

    def project(name: str, x_BLD: jax.Array, heads: int, axis: str):
      y_BLHK = self._project(name, x_BLD, heads, axis, ctx)
      if c.attention_conv and not self.cross:
        y_BLHK, after[name] = features.convolved(
            self, f'{name}_conv', y_BLHK, c.attention_conv, (axis, 'head'),
            before_BWHK=before.get(name), segment_ids_BL=ctx.segment_ids_BL,
            valid_BL=ctx.valid_BL)
      return sharding.constrain(y_BLHK, 'batch', 'length', axis, 'head')

    q_BLHK = self._bounded('query', project(
        'query', x_BLD, c.num_heads, 'heads'))
    if self.cross and memory.x_BMD is None:
      k_BMJK, v_BMJK = cache.memory
    elif read is not None:
      k_BMJK, v_BMJK = read.key_BMJK, read.value_BMJK
    else:
      from_BMD = memory.x_BMD if self.cross else x_BLD
      k_BMJK = project('key', from_BMD, c.num_kv_heads, 'kv_heads')
      v_BMJK = k_BMJK if c.keys_as_values else project(
          'value', from_BMD, c.num_kv_heads, 'kv_heads')
      if c.value_norm:
        v_BMJK = layers.PlainRMSNorm(c, 'head', name='value_norm')(v_BMJK)
      k_BMJK = self._bounded('key', k_BMJK)
      if not self.cross:
        v_BMJK, first = mixed_values(self, x_BLD, v_BMJK, shared.first,
                                     ctx.tokens_BL)
      elif cached:
        cache = cache.replace(memory_key_BMJK=k_BMJK, memory_value_BMJK=v_BMJK)
    if rotate:
      q_BLHK = rotate(q_BLHK, ctx.positions_BL, c, ctx.length)
      if read is None:
        k_BMJK = rotate(k_BMJK, ctx.positions_BL, c, ctx.length)
    if c.attention_log_scale and not self.cross:
      q_BLHK = _grown(q_BLHK, ctx.positions_BL, c)
    k_positions_BM = ctx.positions_BL
    if cached and not self.cross:
      if read is None:
        cache = cache.write(k_BMJK, v_BMJK, ctx.positions_BL,
                            index and index.key_BMJK)
        if slots:
          k_BMJK, v_BMJK, index_BMJK = cache.slots
          index = index and index.replace(key_BMJK=index_BMJK)
      if slots:
        k_positions_BM = jnp.arange(k_BMJK.shape[1])[None]
      cache = cache.replace(inputs=before | after)
    scored = None
    if index is not None:
      scored, k_positions_BM, (k_BMJK, v_BMJK) = self._scored(
          index, k_positions_BM, (k_BMJK, v_BMJK), ctx, slots)
    # Queries may be split over the mesh along the length; each sees all keys.
    k_BMJK, v_BMJK = (sharding.constrain(x, 'batch', None, 'kv_heads', 'head')
                      for x in (k_BMJK, v_BMJK))
    L, M = q_BLHK.shape[1], k_BMJK.shape[1]
    seen = (1, 1) if self.cross else kernels.share(
        self.kind, c, L, M, ctx.prefix_B is not None)
    layer_BHLM = self._layer_bias(x_BLD, q_BLHK, k_BMJK, k_positions_BM, ctx)
    pairs = c.attention_difference > 0
    with layers.useful(*seen):
      o_BLHK, report = self._weigh(
          q_BLHK, k_BMJK, both_values(v_BMJK) if pairs else v_BMJK,
          k_positions_BM, ctx, slots=slots, strict=not cached,
          scored=scored, layer_BHLM=layer_BHLM)
    if pairs:
      o_BLHK = subtracted(self, o_BLHK)
    if not self.cross:
      lent = Keys(k_BMJK, v_BMJK) if shared.lends else None
      report = report.replace(first=first, keys=lent)
    return self._out(x_BLD, o_BLHK, ctx), cache, report

  @property
  def scale(self) -> float:
    """What multiplies the products of queries and keys."""
    return self.config.score_scale * positions.of(
        self.config).score_factor(self.config)

  def _out(self, x_BLD: jax.Array, o_BLHK: jax.Array, ctx: Context
           ) -> jax.Array:
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

  def _weigh(self, q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
             k_positions_BM: jax.Array, ctx: Context, *, slots: bool,
             strict: bool = True, scored: Optional[indexer.Scored] = None,
             layer_BHLM: Optional[jax.Array] = None,
             masked: Optional[tuple] = None
             ) -> tuple[jax.Array, Report]:
    """Returns the weighted values, by the kernel that the config asks for, and
    a report: the weights where the context asks for them, and in training
    the loss of an indexer, which has `scored` the keys. `layer_BHLM` is the
    bias that the layer makes itself, if it makes one. No kernel meets the
    `slots` of a cache; `strict` is as of kernels.choose. `masked` is what
    stands for `_mask`."""
    c, key, report = self.config, None, Report()
    mask, seen_BLM, bias_BHLM = masked or self._mask(k_positions_BM, ctx)
    if layer_BHLM is not None:
      mask, bias_BHLM = mask.replace(bias=True), layer_BHLM
    if scored is not None:
      top = c.part(IndexerConfig).top_k
      if 0 < top < k_BMJK.shape[1]:
        seen_BLM = scored.best(seen_BLM, top)
        mask = mask.replace(rule=True)
    if c.attention_dropout and not ctx.deterministic:
      key, mask = self.make_rng('dropout'), mask.replace(dropout=True)
    sink_H = (layers.bias(self, 'sink', (c.num_heads,), ('heads',))
              if c.attention_sinks else None)
    causal = (mask.causal and mask.in_order and not mask.prefix
              and sharding.shards('length', q_BLHK.shape[1]) == 1)
    how = dict(mask_BLM=seen_BLM, bias_BHLM=bias_BHLM, sink_H=sink_H,
               scale=self.scale, softcap=c.attention_softcap)
    if ctx.keep_attention:
      weights_BHLM = kernels.weights(q_BLHK, k_BMJK, **how)
      report = (report.replace(memory_weights_BHLM=weights_BHLM) if self.cross
                else report.replace(weights_BHLM=weights_BHLM))
    if scored is not None and not ctx.deterministic:
      target_BLM = jax.lax.stop_gradient(kernels.weights(
          *jax.lax.stop_gradient((q_BLHK, k_BMJK)), causal=causal, mean=True,
          **how))
      weight = c.part(IndexerConfig).loss_weight
      report = report.replace(losses={
          'indexer': weight * scored.divergence(target_BLM, seen_BLM, ctx)})
    kernel = 'xla'
    if self.FUSED and not (slots or self.is_initializing()):
      kernel = kernels.choose(c, mask, q_BLHK.shape[1], k_BMJK.shape[1],
                              strict=strict)
    if kernel != 'xla':
      return kernels.KERNELS[kernel].run(
          q_BLHK, k_BMJK, v_BMJK, mask, seen_BLM, scale=self.scale,
          softcap=c.attention_softcap, sink_H=sink_H), report
    return kernels.attend(
        q_BLHK, k_BMJK, v_BMJK, key=key, dropout=c.attention_dropout,
        causal=causal, window=mask.window, **how), report

  def _index(self, x_BLD: jax.Array, asks_BLU: jax.Array, axis: str,
             ctx: Context, cache: Optional[Cache]
             ) -> tuple[Optional[indexer.Index], Optional[Cache]]:
    """Returns what an indexer makes of the tokens, None: there is none; and the
    cache with what it keeps of them beside its keys. `axis` is the logical axis
    of what its queries are made of."""
    if self.cross or not kernels.RULES[self.kind.attention].top:
      return None, cache
    index = indexer.Indexer(self.config, axis, name='indexer')(
        x_BLD, asks_BLU, ctx, cache and cache.inputs)
    return index, cache and cache.replace(inputs=cache.inputs | index.inputs)

  def _scored(self, index: indexer.Index, k_positions_BM: jax.Array,
              arrays: tuple[jax.Array, ...], ctx: Context, slots: bool):
    """Returns the indexer's scores of the keys, the keys' positions and their
    arrays [B, M, J, K]. Where one token meets the slots of a cache, those that
    it chooses alone, without scores."""
    c, top = self.config, self.config.part(IndexerConfig).top_k
    whole = dataclasses.replace(self.kind, attention='global')
    shape = *index.query_BLHK.shape[:2], arrays[0].shape[1]
    with layers.useful(*kernels.share(whole, c, *shape[1:],
                                      ctx.prefix_B is not None)):
      scored = indexer.scored(c, index, None if slots else ctx.segment_ids_BL)
    if not (slots and indexer.gathers(top, shape)
            and ctx.distances.bias_BHLM is None and not ctx.keep_attention):
      return scored, k_positions_BM, arrays
    _, seen_BLM, _ = self._mask(k_positions_BM, ctx)
    best_BM = scored.places(seen_BLM, top)
    return None, best_BM, tuple(jnp.take_along_axis(
        x_BMJK, best_BM[..., None, None], 1, mode='clip') for x_BMJK in arrays)

  def _layer_bias(self, x_BLD: Optional[jax.Array], q_BLHK: jax.Array,
                  k_BMJK: jax.Array, k_positions_BM: jax.Array, ctx: Context
                  ) -> Optional[jax.Array]:
    """Returns the bias on the scores that a layer makes itself; None: there is
    none."""
    bias = positions.of(self.config).layer_bias
    return bias(self, x_BLD, q_BLHK, k_BMJK, k_positions_BM, ctx) if (
        bias and not self.cross) else None

  def _mask(self, k_positions_BM: jax.Array, ctx: Context):
    """Returns the mask as a kernel takes it and written out, and the bias."""
    c, ids_BL = self.config, ctx.segment_ids_BL
    if self.cross:
      k_ids_BM, seen_BLM = ctx.memory.segment_ids_BM, None
      if k_ids_BM is None:
        ids_BL = None
      else:
        ids_BL = jnp.ones((1, 1), jnp.int32) if ids_BL is None else ids_BL
        seen_BLM = ids_BL[:, :, None] == k_ids_BM[:, None]
      return kernels.Mask(ids_BL, k_ids_BM), seen_BLM, None
    seen_BLM = kernels.visible(
        self.kind, c, ctx.positions_BL, k_positions_BM, ids_BL, ids_BL,
        ctx.prefix_B)
    bias_BHLM = (ctx.distances.bias_BHLM if positions.of(c).stack_bias else
                 None)
    rule = kernels.RULES[self.kind.attention]
    ids_BL = kernels.parts(self.kind, c, ctx.positions_BL, ids_BL)
    mask = kernels.Mask(
        ids_BL, ids_BL, causal=self.kind.causal, in_order=ctx.in_order,
        window=rule.window(c) if rule.window else 0,
        prefix=self.kind.causal and ctx.prefix_B is not None,
        bias=bias_BHLM is not None)
    return mask, seen_BLM, bias_BHLM

  def _bounded(self, name: str, x_BLHK: jax.Array) -> jax.Array:
    """Returns queries or keys as the config bounds them: normalised, and none
    longer than qk_clip, for which queries have a scale."""
    c = self.config
    if c.qk_norm:
      x_BLHK = self._normalise(f'{name}_norm', x_BLHK)
    if not c.qk_clip:
      return x_BLHK
    x32_BLHK = x_BLHK.astype(jnp.float32)
    if name == 'query':
      x32_BLHK *= declare(self, 'query_scale', nn.initializers.ones,
                          x_BLHK.shape[2:], Role(('heads', 'head')))[None, None]
    length_BLH1 = jnp.sqrt(jnp.maximum(
        jnp.square(x32_BLHK).sum(-1, keepdims=True), 1e-30))
    return (x32_BLHK * jnp.minimum(
        c.qk_clip / (length_BLH1 + 1e-6), 1.0)).astype(x_BLHK.dtype)

  def _normalise(self, name: str, x_BLHK: jax.Array) -> jax.Array:
    """Returns queries or keys with a norm over each head or over all heads.
    """
    norm = (layers.norm if self.config.qk_norm_scale else
            lambda c, name, axis: layers.PlainRMSNorm(c, axis, name=name))
    if self.config.qk_norm_over == 'head':
      return norm(self.config, name, 'head')(x_BLHK)
    y_BLU = norm(self.config, name, 'joined')(
        x_BLHK.reshape(*x_BLHK.shape[:2], -1))
    return y_BLU.reshape(x_BLHK.shape)

  def _project(self, name: str, x_BLD: jax.Array, heads: int, axis: str,
               ctx: Context):
    c = self.config
    # What the scores are not scaled by, the query's weights are (T5).
    gain = (c.base_head_dim ** -0.5 / c.attention_scale
            if name == 'query' and c.init == 'fan_in' else 1.0)
    return layers.dense(
        self, name, 'BLD,DHK->BLHK', x_BLD, (c.d_model, heads, c.head_dim),
        ('embed', axis, 'head'), gain=gain, with_bias=c.attention_bias,
        deterministic=ctx.deterministic)


def _grown(q_BLHK: jax.Array, positions_BL: jax.Array, c: ModelConfig
           ) -> jax.Array:
  """Returns queries that grow with their position, against weights that flatten
  over more keys (Nakanishi 2025, arXiv 2501.19399; as in Llama 4):

    q' = q (1 + attention_log_scale log(1 + n)),
    n  = floor((position + 1) / attention_log_from)
  """
  steps_BL = jnp.floor((positions_BL.astype(jnp.float32) + 1.0)
                       / c.attention_log_from)
  factor_BL = 1.0 + c.attention_log_scale * jnp.log1p(steps_BL)
  return (q_BLHK.astype(jnp.float32) * factor_BL[..., None, None]).astype(
      q_BLHK.dtype)


def empty(c: ModelConfig, shape: tuple[int, ...]) -> Cache:
  """Returns a cache of this shape: what stands before the heads' axis."""
  zeros = lambda *shape: jnp.zeros(shape, c.compute_dtype)
  heads = {'query': c.num_heads} | ({} if c.kv_sharing else {
      'key': c.num_kv_heads, 'value': c.num_kv_heads})
  # Of the convolutions, by projection.
  inputs = {name: zeros(*shape[:-1], c.attention_conv - 1, count, c.head_dim)
            for name, count in heads.items()} if c.attention_conv else {}
  slots = [zeros(*shape, c.num_kv_heads, c.head_dim)
           for _ in range(0 if c.kv_sharing else 2)]
  return Cache(*slots, indexer.empty(c, shape),
               inputs=inputs | indexer.inputs(c, shape))


# Differences of pairs of heads (Ye et al. 2024, "Differential Transformer",
# arXiv 2410.05258; as transformers' DiffLlama).
#
#   y  = (1 - l) n((A_1 - lambda A_2) [v_1, v_2]),   n(y) = y / rms(y)
#   lambda = exp(a_1 b_1) - exp(a_2 b_2) + l,        l = attention_difference
#
# A_1 and A_2 are the weights of two heads that are half of all heads apart, as
# those of their keys are, and v_1 and v_2 the values there. A layer has vectors
# a and b of its own. In the paper l grows with the depth, 0.8 - 0.6 exp(-0.3 n)
# in layer n, as kinds of layer can have it. y has the features of two heads,
# which stand for the pair in what follows.


def both_values(v_BMJK: jax.Array) -> jax.Array:
  """Returns, for each head of keys, the values of its pair."""
  pairs = jnp.concatenate(jnp.split(v_BMJK, 2, 2), -1)
  return jnp.concatenate([pairs, pairs], 2)


def subtracted(module: nn.Module, o_BLHU: jax.Array) -> jax.Array:
  """Returns y [B, L, H, K] of what the heads return of values of pairs."""
  c: ModelConfig = module.config  # type: ignore[attr-defined]
  a1_K, b1_K, a2_K, b2_K = (
      declare(module, f'difference_{name}', nn.initializers.normal(0.1),
              (c.head_dim,), Role(('head',))).astype(jnp.float32)
      for name in ('a1', 'b1', 'a2', 'b2'))
  share = (jnp.exp((a1_K * b1_K).sum()) - jnp.exp((a2_K * b2_K).sum())
           + c.attention_difference).astype(o_BLHU.dtype)
  first, second = jnp.split(o_BLHU, 2, 2)
  y = layers.PlainRMSNorm(c, name='difference_norm')(first - share * second)
  return (1 - c.attention_difference) * y.reshape(
      *y.shape[:2], c.num_heads, c.head_dim)


def check(c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what a layer of attention cannot be."""
  del stack
  require(not c.attention_difference or (
      c.num_kv_heads % 2 == 0 and c.parametrization != 'mup'),
          f'model.attention_difference is {c.attention_difference}: it needs '
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


def _gated(headwise: bool, module: nn.Module, x_BLD: jax.Array,
           o_BLHK: jax.Array, *, deterministic: bool) -> jax.Array:
  """Returns o with each of its features, or each head, multiplied by a gate.

  A wider model may have as many heads, so in muP the numbers of heads are
  logits, as a router's: divided by how many times as wide it is as its base.
  """
  c, axes = module.config, ('embed', 'heads', 'head')[:3 - headwise]
  shape = o_BLHK.shape[2:4 - headwise]
  spec = 'BLD,DH->BLH' if headwise else 'BLD,DHK->BLHK'
  z = layers.dense(module, GATE, spec, x_BLD, (x_BLD.shape[-1], *shape), axes,
                   output=headwise, with_bias=False,
                   deterministic=deterministic)
  z = z / c.widening if headwise else z
  if c.attention_bias:  # which muP does not divide
    z = layers.add_bias(z, layers.bias(module, f'{GATE}_bias', shape, axes[1:]))
  gate = jax.nn.sigmoid(sharding.constrain(z, 'batch', 'length', *axes[1:]))
  return o_BLHK * (gate[..., None] if headwise else gate)


def gate_products(gate: str) -> set[str]:
  """Returns which of layers.PRODUCTS a layer has for its gate."""
  return {GATE} if GATES[gate] else set()


# What is mixed into the values of self-attention before they are weighed.
#
# With model.value_residual, the values of the first layer (Zhou et al. 2024,
# "Value Residual Learning", arXiv 2410.17897; with one learned number a layer,
# as in modded-nanogpt):
#
#   v'_n = (1 - lambda_n) v_n + lambda_n v_1,   lambda_n = 1/2 at first
#
# v_1 are the same token's values in the first layer, which mixes them with
# themselves. So a layer needs of the first one only what it makes of the tokens
# that it is given, and a cache of keys and values holds what was mixed already.
#
# With model.value_embedding, a vector of the token (modded-nanogpt; the gate is
# nanochat's, which reads a few features of x, and here reads them all):
#
#   v' = v + 2 sigmoid(W_g x) e[token],   W_g = 0 at first
#
# e is a table of the layer's own, with a row of all heads for each token, and
# the gate has one number for each head. With both, e is added after the mixing.


def first_values(c: ModelConfig, x_BLD: jax.Array) -> First:
  """Returns what the first layer is given, whose config is `c`."""
  shape = *x_BLD.shape[:2], c.num_kv_heads, c.head_dim
  zeros_BLJK = jnp.zeros(shape, c.compute_dtype)
  return First(sharding.constrain(zeros_BLJK, *VALUE_AXES), jnp.array(False))


def mixed_values(module: nn.Module, x_BLD: jax.Array, v_BLJK: jax.Array,
                 first: Optional[First], tokens_BL: Optional[jax.Array]
                 ) -> tuple[jax.Array, Optional[First]]:
  """Returns the values as they are weighed, and what the next layer is given.

  Args:
    module: the layer's attention, with a `config`.
    x_BLD: what the values are made of.
    v_BLJK: what the product of the values returns.
    first: from the layer before; None: this layer is alone.
    tokens_BL: the tokens' ids.
  """
  c = module.config
  if c.value_residual:
    first = first or first_values(c, x_BLD)
    first = First(sharding.constrain(jnp.where(
        first.known, first.value_BLJK, v_BLJK), *VALUE_AXES), jnp.array(True))
    share = declare(module, 'value_residual', nn.initializers.constant(0.5),
                    (), Role(()))
    # In float32, so that the share's gradient, a sum over all tokens, is too.
    v32, first32 = (a.astype(jnp.float32) for a in (v_BLJK, first.value_BLJK))
    v_BLJK = (v32 + share * (first32 - v32)).astype(v_BLJK.dtype)
  if c.value_embedding:
    v_BLJK = v_BLJK + _embedded_values(module, x_BLD, v_BLJK, tokens_BL)
  return v_BLJK, first


def _embedded_values(module: nn.Module, x_BLD: jax.Array, v_BLJK: jax.Array,
                     tokens_BL: Optional[jax.Array]) -> jax.Array:
  """Returns the gated rows of the tokens, [B, L, J, K]."""
  c, shape = module.config, v_BLJK.shape[2:]
  table_VJK = declare(
      module, 'value_embedding', nn.initializers.normal(c.init_stddev),
      (c.vocab_size, *shape),
      Role(('rows', 'kv_heads', 'head'), inputs=(0,), kind='embedding'))
  # Gathered whole over fsdp first, as the embedding of tokens.
  whole_VJK = sharding.constrain_if(table_VJK, None, 'kv_heads', 'head')
  e_BLJK = whole_VJK[tokens_BL].astype(v_BLJK.dtype)
  gate_DJ = declare(
      module, 'value_gate', nn.initializers.zeros,
      (x_BLD.shape[-1], shape[0]),
      Role(('embed', 'kv_heads'), inputs=(0,), kind='logits'))
  # A wider model may have as many heads: in muP these are logits.
  z_BLJ = layers.einsum('BLD,DJ->BLJ', x_BLD, gate_DJ,
                        v_BLJK.dtype) / c.widening
  return 2 * jax.nn.sigmoid(z_BLJ)[..., None] * e_BLJK


# Short convolutions of queries, keys and values (Primer's multi-DConv-head
# attention: So et al. 2021, arXiv 2109.08668, section 3, with 3 tokens).
#
#   q'_l = sum over i < W of w_i * q_(l - W + 1 + i),   W = model.attention_conv
#
# and keys and values likewise. Each feature of each head has weights of its
# own. The convolutions come after the projections, and before norms, positions
# and what is mixed into values. Through them a token sees the W - 1 tokens
# before it in its document, so a cache holds the last W - 1 outputs of each
# projection besides keys and values.


GATES = {
    'none': None,
    'elementwise': functools.partial(_gated, False),
    'headwise': functools.partial(_gated, True),
}
