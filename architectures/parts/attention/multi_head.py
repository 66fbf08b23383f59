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

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts import mixer
from architectures.parts import positions
from architectures.parts import sharding
from architectures.parts.attention import convolved
from architectures.parts.attention import indexer
from architectures.parts.attention import kernels
from architectures.parts.attention import path
from architectures.parts.attention import steps
from architectures.parts.attention.fields import AttentionConfig, PathConfig
from architectures.parts.attention.indexer import IndexerConfig
from architectures.parts.cache import Cache
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context, FirstLayerValues, KeysAndValues
from architectures.parts.context import Report
from common.errors import RequestError, require

GATE = 'output_gate'  # the name of the gate's weight, and of its product


class MixedHeads(NamedTuple):
  """Queries and keys that are mixed with each other, before their positions
  (compressed convolutional attention, convolved.py)."""
  q_BLHK: jax.Array
  k_BLJK: jax.Array


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
    """Makes queries, keys or values of the layer's input, as the product W x.
    The weight W is declared here.

    The suffixes name axes: B batch, L length, D d_model, H heads, K features of
    a head.

    Args:
      name: 'query', 'key' or 'value', the name of the weight.
      x_BLD: the input.
      ctx: the context of the layer.

    Returns:
      The product, [B, L, H, K], with num_heads heads of queries, or
      num_kv_heads of keys or values.
    """
    config = self.config
    # Keys and values may have fewer heads than queries. `gain` multiplies the
    # weight's initial values.
    heads, axis, gain = config.num_kv_heads, 'kv_heads', 1.0
    if name == 'query':
      heads, axis = config.num_heads, 'heads'
      if config.init == 'fan_in':
        # Scores start as if they were scaled by head_dim ** -0.5. Where the
        # config's scale is another, as T5's 1, the weight has the difference.
        gain = config.base_head_dim ** -0.5 / config.attention_scale
    return layers.dense(self, name, 'BLD,DHK->BLHK', x_BLD,
                        shape=(config.d_model, heads, config.head_dim),
                        axes=('embed', axis, 'head'), gain=gain,
                        with_bias=config.attention_bias,
                        deterministic=ctx.deterministic)

  def add_layer_bias(self, visible: kernels.VisibleKeys, x_BLD: jax.Array,
                     q_BLHK: jax.Array, k_BMJK: jax.Array,
                     k_positions_BM: jax.Array, ctx: Context
                     ) -> kernels.VisibleKeys:
    """Sets the bias on attention's scores that this layer makes of its own
    parameters, where its position encoding has one, such as DeBERTa's vectors
    of distances.

    The suffixes name axes: B batch, L queries, D d_model, M keys, H heads of
    queries, J heads of keys, K features of a head.

    Args:
      visible: which keys the queries see.
      x_BLD: the layer's input.
      q_BLHK: queries.
      k_BMJK: keys.
      k_positions_BM: the positions of the keys.
      ctx: the context of the layer.

    Returns:
      `visible` with the bias [B, H, L, M]; `visible` itself where the position
      encoding has no such bias.
    """
    make_bias = positions.position_of(self.config).layer_bias
    if not make_bias:
      return visible
    bias_BHLM = make_bias(self, x_BLD, q_BLHK, k_BMJK, k_positions_BM, ctx)
    # The mask is marked too, so that no fused kernel is chosen: these cannot
    # add a bias.
    marked_mask = visible.mask.replace(has_bias=True)
    return visible._replace(mask=marked_mask, bias_BHLM=bias_BHLM)

  def weigh_values(self, q_BLHK: jax.Array, k_BMJK: jax.Array,
                   v_BMJK: jax.Array, visible: kernels.VisibleKeys,
                   ctx: Context, *, fused: bool = True, strict: bool = True,
                   scored: Optional[indexer.ScoredKeys] = None
                   ) -> tuple[jax.Array, Report]:
    """Returns o_l = sum over m of softmax over m (scale q_l k_m) v_m, of the
    keys that l sees, [B, L, H, K].

    Args:
      q_BLHK: queries.
      k_BMJK: keys.
      v_BMJK: values.
      visible: which keys the queries see.
      ctx: the context.
      fused: whether a fused kernel may compute it; none reads the slots of a
        cache.
      strict: as of kernels.choose_attention_kernel.
      scored: the scores of the keys by an indexer; None: there is none.

    Returns:
      o, and a report: the weights where the context asks for them, and in
      training the loss of an indexer.
    """
    config, key, sink_H = self.config, None, None
    L, M = q_BLHK.shape[1], k_BMJK.shape[1]
    # An indexer hides keys, and dropout hides weights. The mask has marks of
    # both, by which fused kernels that cannot do it are left out below.
    if scored is not None:
      visible = self._hide_all_but_best_keys(visible, scored, M)
    mask = visible.mask
    if config.attention_dropout and not ctx.deterministic:
      key, mask = self.make_rng('dropout'), mask.replace(has_dropout=True)
    if config.attention_sinks:
      sink_H = layers.bias(self, 'sink', shape=(config.num_heads,),
                           axes=('heads',))
    score_arguments = dict(
        mask_BLM=visible.seen_BLM, bias_BHLM=visible.bias_BHLM, sink_H=sink_H,
        scale=self.scale, softcap=config.attention_softcap)

    # The report has the weights, which `attend` does not return and which are
    # computed a second time for it, and the loss of an indexer. That loss moves
    # the indexer alone: no gradient goes to the layer's queries and keys.
    causal, report = mask.allows_query_blocks(L), Report()
    if ctx.keep_attention:
      weights_BHLM = kernels.attention_weights(
          q_BLHK, k_BMJK, **score_arguments)
      report = report.replace(weights_BHLM=weights_BHLM)
    if scored is not None and not ctx.deterministic:
      loss = self._indexer_loss(
          scored, *jax.lax.stop_gradient((q_BLHK, k_BMJK)), visible.seen_BLM,
          ctx, causal=causal, **score_arguments)
      report = report.replace(losses={'indexer': loss})

    # The products, by the kernel that the config asks for. Parameters are
    # initialised by the plain one, so that no platform refuses it.
    kernel = 'xla'
    if self.FUSED and fused and not self.is_initializing():
      kernel = kernels.choose_attention_kernel(
          config, mask=mask, q_length=L, k_length=M, strict=strict)
    if kernel == 'xla':
      o_BLHK = kernels.attend(
          q_BLHK, k_BMJK, v_BMJK, key=key, dropout=config.attention_dropout,
          causal=causal, window=mask.window, **score_arguments)
    else:
      o_BLHK = kernels.KERNELS[kernel].run(
          q_BLHK, k_BMJK, v_BMJK, mask, visible.seen_BLM, scale=self.scale,
          softcap=config.attention_softcap, sink_H=sink_H)
    return o_BLHK, report

  def project_output(self, x_BLD: jax.Array, o_BLHK: jax.Array, ctx: Context,
                     axis: str = 'embed') -> jax.Array:
    """Makes the output of the layer of the results of its heads, y = W_o o. If
    model.attention_gate names a gate, o is multiplied by it first.

    The suffixes name axes: B batch, L length, D d_model, H heads, K features.

    Args:
      x_BLD: what the gate is made of: the layer's input, or what latent
        attention makes its queries of.
      o_BLHK: the results of the heads.
      ctx: the context of the layer.
      axis: the logical axis of the features of x_BLD, by which the weight of
        the gate is split over devices.

    Returns:
      y, [B, L, D].
    """
    config = self.config
    gate_heads = GATES[config.attention_gate]
    if gate_heads:
      o_BLHK = gate_heads(
          self, x_BLD, o_BLHK, axis=axis, deterministic=ctx.deterministic)
    o_BLHK = sharding.constrain(o_BLHK, 'batch', 'length', 'heads', 'head')
    # The product sums over two axes, and its result is added to the residual
    # stream, by which some ways of initialisation scale the weight.
    return layers.dense(
        self, 'out', 'BLHK,HKD->BLD', o_BLHK,
        shape=(*o_BLHK.shape[2:], config.d_model),
        axes=('heads', 'head', 'embed'), in_axes=(0, 1), residual=True,
        with_bias=config.attention_bias and config.attention_out_bias,
        deterministic=ctx.deterministic)

  def count_visible_pairs_only(self, queries: jax.Array, keys: jax.Array,
                               ctx: Context) -> Any:
    """Returns a scope in which the FLOPs of products of all queries and keys
    count as those of the pairs that the mask shows: see
    layers.count_flops_as_useful_part."""
    visible_pairs, all_pairs, prompt_pairs = kernels.count_useful_pairs(
        self.kind, self.config, queries=queries.shape[1], keys=keys.shape[1],
        prefix=ctx.prefix_B is not None, has_clean_copy=ctx.has_clean_copy)
    return layers.count_flops_as_useful_part(
        visible_pairs, all_pairs, prompt_pairs)

  # An indexer (indexer.py) chooses the keys that a query sees.

  def apply_indexer(self, x_BLD: jax.Array, query_input_BLU: jax.Array,
                    axis: str, ctx: Context, cache: Optional[Cache]
                    ) -> tuple[Optional[indexer.Index], Optional[Cache]]:
    """Makes the queries and keys of the layer's indexer, a small attention that
    chooses which keys a query of the layer may see (DeepSeek-V3.2).

    The suffixes name axes: B batch, L length, D d_model, U features.

    Args:
      x_BLD: the layer's input.
      query_input_BLU: what the layer makes its own queries of: its input, or a
        smaller vector made of it.
      axis: the logical axis of the features U, by which the indexer's weight is
        split over devices.
      ctx: the context of the layer.
      cache: the layer's cache; None: there is none.

    Returns:
      The indexer's queries and keys, or None where the layer has no indexer;
      and the cache with what the next keys will be made of. The keys themselves
      are written into the cache later, by `write_and_read_cache`.
    """
    # A layer has an indexer if its rule of attention keeps only the top keys.
    if not kernels.RULES[self.kind.attention].top:
      return None, cache
    previous_inputs = None if cache is None else cache.inputs
    index = indexer.Indexer(self.config, axis, name='indexer')(
        x_BLD, query_input_BLU, ctx, previous_inputs)
    if cache is not None:
      cache = cache.replace(inputs=cache.inputs | index.inputs)
    return index, cache

  def choose_keys(self, index: Optional[indexer.Index],
                  k_positions_BM: jax.Array, arrays: Any, ctx: Context,
                  reads_slots: bool
                  ) -> tuple[Optional[indexer.ScoredKeys], jax.Array, Any]:
    """Has the indexer score the keys, and chooses the best already where that
    is cheap: where one query in each row meets the slots of a cache.

    The suffixes name axes: B batch, L queries, M keys, H heads of queries, J
    heads of keys, K features of a head.

    Args:
      index: the indexer's queries and keys; None: there is no indexer.
      k_positions_BM: the positions of the keys, [batch, number of keys].
      arrays: arrays of the keys, such as keys and values, [batch, number of
        keys, heads, features] each, in a tuple or a record.
      ctx: the context of the layer.
      reads_slots: whether the keys are the slots of a cache.

    Returns:
      A tuple of three:
        the scores, by which `weigh_values` hides keys later; None where there
          is no indexer, or the best keys were chosen here;
        the positions of the keys that are left;
        the arrays of these keys.
    """
    if index is None:
      return None, k_positions_BM, arrays
    config, top_k = self.config, self.config.part(IndexerConfig).top_k
    B, L = index.query_BLHK.shape[:2]
    M = jax.tree.leaves(arrays)[0].shape[1]

    # All keys that a query may see are scored, so the FLOPs of the scores count
    # as those of a layer without an indexer.
    global_kind = dataclasses.replace(self.kind, attention='global')
    pairs = kernels.count_useful_pairs(
        global_kind, config, queries=L, keys=M, prefix=ctx.prefix_B is not None)
    segment_ids = None if reads_slots else ctx.segment_ids_BL
    with layers.count_flops_as_useful_part(*pairs):
      scored = indexer.score_keys(config, index, segment_ids)

    # The best keys are copied, or else a mask hides the others later. A bias
    # and weights that are reported have an entry for every key, so with these
    # the keys stay where they are.
    copies_keys = (
        reads_slots and indexer.should_copy_chosen_keys(top_k, (B, L, M))
        and ctx.distances.bias_BHLM is None and not ctx.keep_attention)
    if not copies_keys:
      return scored, k_positions_BM, arrays
    seen_BLM = kernels.find_visible_keys(
        self.kind, config, ctx=ctx, k_positions_BM=k_positions_BM).seen_BLM
    # The slot of a token in a cache is its position, so these indices are the
    # positions of the keys too. Indices past the end are clipped, and the mask
    # that is made of the positions later hides them.
    best_BM = scored.indices_of_best(seen_BLM, top_k)

    def take_best(x_BMJK: jax.Array) -> jax.Array:
      return jnp.take_along_axis(
          x_BMJK, best_BM[..., None, None], axis=1, mode='clip')

    return None, best_BM, jax.tree.map(take_best, arrays)

  def _indexer_loss(self, scored: indexer.ScoredKeys, q_BLHK: jax.Array,
                    k_BMJK: jax.Array, seen_BLM: Optional[jax.Array],
                    ctx: Context, **score_arguments: Any) -> jax.Array:
    """Returns the loss that teaches the indexer (the small attention that
    chooses keys) where the layer's attention goes:

      loss_weight * KL(p || softmax of the indexer's scores)

    where p is the mean over heads of the layer's attention weights.

    The suffixes name axes: B batch, L queries, M keys, H heads of queries, J
    heads of keys, K features of a head.

    Args:
      scored: the indexer's scores of the keys.
      q_BLHK: queries of the layer.
      k_BMJK: keys of the layer.
      seen_BLM: bool, which keys a query sees; None: all.
      ctx: the context of the layer, which says which tokens are padding.
      **score_arguments: the other arguments of kernels.attention_weights.
    """
    # The target has no gradient: the loss moves the indexer alone.
    target_BLM = jax.lax.stop_gradient(kernels.attention_weights(
        q_BLHK, k_BMJK, mean=True, **score_arguments))
    divergence = scored.divergence(target_BLM, seen_BLM, ctx)
    return self.config.part(IndexerConfig).loss_weight * divergence

  def _hide_all_but_best_keys(
      self, visible: kernels.VisibleKeys, scored: indexer.ScoredKeys,
      num_keys: int) -> kernels.VisibleKeys:
    """Hides from each query all but the top_k keys that an indexer scores
    highest among those that the query sees.

    The suffixes name axes: B batch, L queries, M keys.

    Args:
      visible: which keys the queries see.
      scored: the indexer's scores of the keys.
      num_keys: how many keys there are.

    Returns:
      `visible` with fewer keys.
    """
    # There is nothing to hide with a top_k of 0 (which stands for all keys), or
    # where there are no more keys than top_k.
    top_k = self.config.part(IndexerConfig).top_k
    if not 0 < top_k < num_keys:
      return visible
    best_BLM = scored.mask_of_best(visible.seen_BLM, top_k)
    return visible._replace(seen_BLM=best_BLM,
                            mask=visible.mask.replace(has_indexer=True))


class SelfAttention(Attention):
  """Attention of the tokens of a row to one another:
  (x_BLD, context, cache) -> (y_BLD, cache, report).

    q_l = W_q x_l,   k_m = W_k x_m,   v_m = W_v x_m
    y_l = W_o sum over m of softmax over m (scale q_l k_m) v_m

  steps.py has what changes q, k and v; kernels.attention_weights is the
  softmax.
  """
  settings = AttentionConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[Cache]
               ) -> tuple[jax.Array, Optional[Cache], Report]:
    """Computes self-attention (see the class).

    The suffixes name axes: B batch, L length, M tokens that are attended to, D
    d_model, H query heads, J key heads, K features of a head.

    Args:
      x_BLD: the input.
      ctx: the context of the layer: positions, documents, padding, and what it
        shares with other layers.
      cache: the keys and values of the tokens before; None: there are none, and
        none are kept.

    Returns:
      The output [B, L, D], the cache with these tokens, and the report.
    """
    # An indexer's queries and keys (None where the layer has no indexer), and
    # the layer's queries. The cache gets the inputs that the next tokens need.
    config = self.config
    index, cache = self.apply_indexer(x_BLD, query_input_BLU=x_BLD,
                                      axis='embed', ctx=ctx, cache=cache)
    mixed, cache = self.mix_queries_and_keys(x_BLD, ctx, cache)
    q_BLHK, cache = self.make_queries(x_BLD, mixed, ctx=ctx, cache=cache)

    # Keys and values: an earlier layer's, or the layer's own. They are those of
    # the given tokens, or all slots of the cache, whose positions are 0, 1, ...
    # Tokens at the start of a row need no slots, as they see each other alone.
    reads_slots = (
        cache is not None and not kernels.is_start_of_row(self.kind, ctx))
    keys, first = ctx.shared.keys, None
    if keys is None:
      keys, first, cache = self.make_keys_and_values(
          x_BLD, mixed, ctx=ctx, cache=cache)
      keys, index, cache = write_and_read_cache(
          keys, index=index, ctx=ctx, cache=cache, reads_slots=reads_slots)
    own_keys = keys
    k_positions_BM = ctx.positions_BL
    if reads_slots:
      own_keys = take_slots_of_tokens(keys, config, ctx)
      k_positions_BM = jnp.arange(keys.key_BMJK.shape[1])[None]
    scored, k_positions_BM, keys = self.choose_keys(
        index, k_positions_BM=k_positions_BM, arrays=keys, ctx=ctx,
        reads_slots=reads_slots)
    k_BMJK, v_BMJK = keys.key_BMJK, keys.value_BMJK
    # Queries may be split over the mesh along the length; each sees all keys.
    k_BMJK = sharding.constrain(k_BMJK, 'batch', None, 'kv_heads', 'head')
    v_BMJK = sharding.constrain(v_BMJK, 'batch', None, 'kv_heads', 'head')

    # Each query weighs the values of the keys that it sees.
    visible = kernels.find_visible_keys(self.kind, config, ctx=ctx,
                                        k_positions_BM=k_positions_BM)
    visible = self.add_layer_bias(
        visible, x_BLD, q_BLHK, k_BMJK, k_positions_BM=k_positions_BM, ctx=ctx)
    visible = steps.add_forget_bias(visible, own_keys.forget_BMHU,
                                    keys.forget_BMHU)
    if config.position == 'path':
      visible, cache = path.reflect_keys(
          self, x_BLD, q_BLHK=q_BLHK, keys=keys, visible=visible,
          k_positions_BM=k_positions_BM, reads_slots=reads_slots, ctx=ctx,
          cache=cache)
    with self.count_visible_pairs_only(q_BLHK, k_BMJK, ctx):
      o_BLHK, report = self.weigh_values(
          q_BLHK, k_BMJK, steps.join_values_of_head_pairs(config, v_BMJK),
          visible=visible, ctx=ctx, fused=not reads_slots, strict=cache is None,
          scored=scored)
    o_BLHK = steps.subtract_head_pairs(self, o_BLHK)
    o_BLHK = steps.remove_own_value(self, o_BLHK, own_keys.value_BMJK)
    o_BLHK = steps.normalise_results(self, o_BLHK)

    # The report takes to later layers the keys and values that they share.
    shared_keys = None
    if ctx.shared.lends:
      shared_keys = keys.replace(key_BMJK=k_BMJK, value_BMJK=v_BMJK)
    report = report.replace(first_values=first, keys=shared_keys)
    return self.project_output(x_BLD, o_BLHK, ctx), cache, report

  def mix_queries_and_keys(
      self, x_BLD: jax.Array, ctx: Context, cache: Optional[Cache]
      ) -> tuple[Optional[MixedHeads], Optional[Cache]]:
    """Makes the queries and keys of compressed convolutional attention, which
    mixes the two with each other (convolved.py), before their positions.

    The suffixes name axes: B batch, L length, D d_model, H heads of queries, J
    heads of keys, K features of a head.

    Args:
      x_BLD: the layer's input.
      ctx: the context of the layer.
      cache: the layer's cache; None: there is none.

    Returns:
      The queries and keys; None without model.cca, where each is made by
      itself. And the cache, with the last inputs of the convolutions.
    """
    if not self.config.part(AttentionConfig).cca:
      return None, cache
    q_BLHK, cache = self.project_and_convolve('query', x_BLD, ctx=ctx,
                                              cache=cache)
    k_BLJK, cache = self.project_and_convolve('key', x_BLD, ctx=ctx,
                                              cache=cache)
    q_BLHK, k_BLJK, cache = convolved.mix_queries_and_keys(
        self, q_BLHK, k_BLJK=k_BLJK, ctx=ctx, cache=cache)
    return MixedHeads(q_BLHK=q_BLHK, k_BLJK=k_BLJK), cache

  def make_queries(self, x_BLD: jax.Array, mixed: Optional[MixedHeads],
                   ctx: Context, cache: Optional[Cache]
                   ) -> tuple[jax.Array, Optional[Cache]]:
    """Makes the queries of the tokens, q = W_q x, and applies all steps that
    change them, such as a norm and the rotation by position.

    The suffixes name axes: B batch, L length, D d_model, H heads, K features of
    a head.

    Args:
      x_BLD: the layer's input.
      mixed: queries and keys that are made already, by `mix_queries_and_keys`;
        None: the queries are a product of the input.
      ctx: the context of the layer.
      cache: the layer's cache; None: there is none.

    Returns:
      The queries, [B, L, H, K], and the cache, with the last inputs of a
      convolution if there is one.
    """
    if mixed is not None:
      q_BLHK = mixed.q_BLHK
    else:
      q_BLHK, cache = self.project_and_convolve('query', x_BLD, ctx=ctx,
                                                cache=cache)
    # Each step is told what it is applied to, since keys go through most of
    # them too. It returns its input where the model does not have the step.
    for apply_step in steps.QUERY_STEPS:
      q_BLHK = apply_step(self, 'query', q_BLHK, ctx)
    return q_BLHK, cache

  def make_keys_and_values(
      self, x_BLD: jax.Array, mixed: Optional[MixedHeads], ctx: Context,
      cache: Optional[Cache]
      ) -> tuple[KeysAndValues, Optional[FirstLayerValues], Optional[Cache]]:
    """Makes the keys and values of the tokens, and applies all steps that
    change them, such as a norm and the rotation by position.

    The suffixes name axes: B batch, L length, D d_model, J heads of keys, K
    features of a head.

    Args:
      x_BLD: the layer's input.
      mixed: queries and keys that are made already, by `mix_queries_and_keys`;
        None: the keys are a product of the input.
      ctx: the context of the layer.
      cache: the layer's cache; None: there is none.

    Returns:
      A tuple of three:
        keys and values, [B, L, J, K] each, and the sums of forget gates;
        the values of the model's first layer, which the next layer mixes into
          its own; None without model.value_residual;
        the cache, with the last inputs of the convolutions.
    """
    fields = self.config.part(AttentionConfig)
    if mixed is None:
      k_BLJK, cache = self.project_and_convolve('key', x_BLD, ctx=ctx,
                                                cache=cache)
    else:
      k_BLJK = mixed.k_BLJK

    # With keys_as_values the values start as the keys. The steps of the keys
    # come last, so that the values do not go through them.
    v_BLJK = k_BLJK
    if not fields.keys_as_values:
      v_BLJK, cache = self.project_and_convolve('value', x_BLD, ctx=ctx,
                                                cache=cache)

    # The values' own steps, and what is mixed into them: values of the first
    # layer, and a vector of each token.
    for apply_step in steps.VALUE_STEPS:
      v_BLJK = apply_step(self, 'value', v_BLJK, ctx)
    v_BLJK, first = steps.mix_first_values(
        self, x_BLD, v_BLJK, first=ctx.shared.first_values)
    v_BLJK = steps.add_value_embedding(self, x_BLD, v_BLJK, ctx=ctx)

    # The keys' own steps, and what lowers the weights of earlier keys.
    for apply_step in steps.KEY_STEPS:
      k_BLJK = apply_step(self, 'key', k_BLJK, ctx)
    k_BLJK, cache = steps.offset_keys(self.config, k_BLJK, ctx=ctx, cache=cache)
    forget_BLHU, cache = steps.sum_forget_gates(
        self, x_BLD, ctx=ctx, cache=cache)
    keys = KeysAndValues(
        key_BMJK=k_BLJK, value_BMJK=v_BLJK, forget_BMHU=forget_BLHU)
    return keys, first, cache

  def project_and_convolve(
      self, name: str, x_BLD: jax.Array, ctx: Context, cache: Optional[Cache]
      ) -> tuple[jax.Array, Optional[Cache]]:
    """Makes queries, keys or values of the layer's input, as the product W x.
    With model.attention_conv, a convolution over the last few tokens follows.
    With model.cca, half of the values are of the token before.

    The suffixes name axes: B batch, L length, D d_model, H heads, K features of
    a head.

    Args:
      name: 'query', 'key' or 'value', the name of the weight.
      x_BLD: the layer's input.
      ctx: the context of the layer.
      cache: the layer's cache; None: there is none.

    Returns:
      The result, [B, L, H, K], and the cache, with the convolution's last
      inputs.
    """
    fields = self.config.part(AttentionConfig)
    axis = 'kv_heads'
    if name == 'query':
      axis = 'heads'

    # The product, and what is computed over neighbouring tokens. Each of these
    # steps belongs to another model, and does nothing in all others.
    if fields.cca and name == convolved.VALUE:
      x_BLHK, cache = convolved.make_values(self, x_BLD, ctx, cache)
    else:
      x_BLHK = self.project(name, x_BLD, ctx)
    if fields.attention_conv:
      x_BLHK, cache = steps.convolve_heads(
          self, name, x_BLHK, axes=(axis, 'head'), ctx=ctx, cache=cache)
    if name != 'query':
      x_BLHK, cache = steps.convolve_by_token(
          self, name, x_BLHK, input_BLD=x_BLD, ctx=ctx, cache=cache)
    return sharding.constrain(x_BLHK, 'batch', 'length', axis, 'head'), cache


def take_slots_of_tokens(keys: KeysAndValues, config: ModelConfig, ctx: Context
                         ) -> KeysAndValues:
  """Returns the keys and values of the given tokens among those of all slots of
  a cache. The slot of a token is its position.

  They are needed where a layer shares the keys and values of an earlier one: it
  has those of all slots alone, and two of its steps read each token's own.

  The suffixes name axes: B batch, L given tokens, M slots, J heads of keys, K
  features of a head.

  Args:
    keys: the keys and values of all M slots, [batch, M, ...].
    config: the config of the layer.
    ctx: the context of the layer, with the positions of the L tokens.

  Returns:
    The keys and values of the tokens, [batch, L, ...]; `keys` as they are where
    the layer has neither of these steps.
  """
  fields = config.part(AttentionConfig)
  removes_own_value = fields.attention_exclusive != 'none'
  if not removes_own_value and not fields.forget_gate:
    return keys
  index_BL11 = ctx.positions_BL[..., None, None]

  def take_tokens(x_BMJK: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BMJK, index_BL11, axis=1)

  return jax.tree.map(take_tokens, keys)


def write_and_read_cache(
    keys: KeysAndValues, index: Optional[indexer.Index], ctx: Context,
    cache: Optional[Cache], reads_slots: bool
    ) -> tuple[KeysAndValues, Optional[indexer.Index], Optional[Cache]]:
  """Writes the keys and values of new tokens into the cache, and returns those
  that the queries are multiplied with.

  The suffixes name axes: B batch, L new tokens, M slots (places for a token), J
  heads of keys, K features of a head, H heads of queries, U = 1.

  Args:
    keys: the keys and values of the new tokens.
    index: the queries and keys of the new tokens in an indexer, the small
      attention that chooses keys; None: the layer has no indexer.
    ctx: the context of the layer, which has the tokens' positions.
    cache: the layer's cache; None: there is none.
    reads_slots: whether the queries meet all tokens of the cache, and not only
      the new ones.

  Returns:
    A tuple of three:
      the keys and values that the queries meet: those of the new tokens or,
        with `reads_slots`, of all slots (places for a token) of the cache;
      `index`, with the indexer's keys of the same tokens;
      the cache with the new tokens; None if there is none.
  """
  if cache is None:
    return keys, index, None

  # The tokens are written at their positions. They are written before slots are
  # read, since a token sees itself.
  index_BLJK = None if index is None else index.key_BMJK
  cache = cache.write(
      keys.key_BMJK, keys.value_BMJK, positions_BL=ctx.positions_BL,
      index_BLJK=index_BLJK, forget_BLHU=keys.forget_BMHU)
  if not reads_slots:
    return keys, index, cache

  # All slots. Empty ones are at later positions, which the mask hides.
  k_BMJK, v_BMJK, index_BMJK = cache.slots
  if index is not None:
    index = index.replace(key_BMJK=index_BMJK)
  keys = KeysAndValues(k_BMJK, v_BMJK, cache.forget_slots)
  return keys, index, cache


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
    """Computes cross-attention: each token attends to a memory z, the result of
    an encoder.

      y_l = W_o sum over m of softmax over m (scale q_l k_m) v_m
      q_l = W_q x_l,   k_m = W_k z_m,   v_m = W_v z_m

    The suffixes name axes: B batch, L length, D d_model, M tokens of the
    memory, H heads of queries, J heads of keys, K features of a head.

    Args:
      x_BLD: the layer's input.
      ctx: the context of the call, with the memory. While decoding it has none,
        and the cache has the memory's keys and values.
      cache: what the layer keeps between calls; None: there is none.

    Returns:
      The output [B, L, D], the cache with the memory's keys and values, and a
      report, which holds the attention weights if the context asks for them.
    """
    # Queries of the tokens, and keys and values of the memory: the first call
    # is given the memory and puts these into the cache, later ones read them.
    q_BLHK = self.project_and_apply_steps(
        'query', x_BLD, steps_to_apply=steps.CROSS_ATTENTION_STEPS, ctx=ctx)
    if ctx.memory.x_BMD is None:
      k_BMJK, v_BMJK = cache.memory
    else:
      k_BMJK, v_BMJK = self.make_keys_and_values(ctx.memory.x_BMD, ctx)
      if cache is not None:
        cache = cache.replace(memory_key_BMJK=k_BMJK, memory_value_BMJK=v_BMJK)
    # Queries may be split over the mesh along the length; each sees all keys.
    k_BMJK = sharding.constrain(k_BMJK, 'batch', None, 'kv_heads', 'head')
    v_BMJK = sharding.constrain(v_BMJK, 'batch', None, 'kv_heads', 'head')

    # Each query weighs the values of the memory. All pairs of a query and a key
    # count as useful: the share of them is 1 of 1.
    v_BMJK = steps.join_values_of_head_pairs(self.config, v_BMJK)
    with layers.count_flops_as_useful_part(1, 1):
      o_BLHK, report = self.weigh_values(
          q_BLHK, k_BMJK, v_BMJK, visible=visible_keys_of_memory(ctx), ctx=ctx,
          fused=cache is None, strict=cache is None)
    o_BLHK = steps.subtract_head_pairs(self, o_BLHK)
    o_BLHK = steps.normalise_results(self, o_BLHK)
    report = Report(memory_weights_BHLM=report.weights_BHLM)
    return self.project_output(x_BLD, o_BLHK, ctx), cache, report

  def make_keys_and_values(self, memory_BMD: jax.Array, ctx: Context
                           ) -> tuple[jax.Array, jax.Array]:
    """Makes the keys and the values of the memory, which is what
    cross-attention attends to.

    The suffixes name axes: B batch, M tokens of the memory, D d_model, J heads
    of keys, K features of a head.

    Args:
      memory_BMD: the result of the encoder.
      ctx: the context of the layer.

    Returns:
      The keys and the values, [B, M, J, K] each.
    """
    # With keys_as_values the values start as the keys, before any step.
    k_BMJK = self.project_and_apply_steps('key', memory_BMD, steps_to_apply=(),
                                          ctx=ctx)
    v_BMJK = k_BMJK
    if not self.config.part(AttentionConfig).keys_as_values:
      v_BMJK = self.project_and_apply_steps('value', memory_BMD,
                                            steps_to_apply=(), ctx=ctx)
    for apply_step in steps.VALUE_STEPS:
      v_BMJK = apply_step(self, 'value', v_BMJK, ctx)
    # The keys' own steps come after the values, which may be the keys.
    for apply_step in steps.CROSS_ATTENTION_STEPS:
      k_BMJK = apply_step(self, 'key', k_BMJK, ctx)
    return k_BMJK, v_BMJK

  def project_and_apply_steps(
      self, name: str, x_BLD: jax.Array, steps_to_apply: tuple, ctx: Context
      ) -> jax.Array:
    """Makes queries, keys or values of an input, as the product W x, and
    applies steps to it, such as a norm.

    The suffixes name axes: B batch, L length, D d_model, H heads, K features of
    a head.

    Args:
      name: 'query', 'key' or 'value', the name of the weight.
      x_BLD: the input.
      steps_to_apply: functions (module, name, x_BLHK, ctx) -> x_BLHK of
        steps.py, in the order in which they are applied.
      ctx: the context of the layer.

    Returns:
      The result, [B, L, H, K].
    """
    axis = 'kv_heads'
    if name == 'query':
      axis = 'heads'
    x_BLHK = self.project(name, x_BLD, ctx)
    x_BLHK = sharding.constrain(x_BLHK, 'batch', 'length', axis, 'head')
    for apply_step in steps_to_apply:
      x_BLHK = apply_step(self, name, x_BLHK, ctx)
    return x_BLHK


def visible_keys_of_memory(ctx: Context) -> kernels.VisibleKeys:
  """Returns which tokens of the memory (the encoder's result) each token of the
  decoder sees. These are the tokens of its own segment (document), or all
  tokens where the memory has no segments.

  The suffixes name axes: B batch, L queries, M tokens of the memory.

  Args:
    ctx: the context of the layer, which has the memory and the segment ids.
  """
  k_ids_BM = ctx.memory.segment_ids_BM
  if k_ids_BM is None:
    return kernels.VisibleKeys(kernels.Mask())
  # Tokens without segments are all of segment 1; padding of the memory is 0.
  q_ids_BL = ctx.segment_ids_BL
  if q_ids_BL is None:
    q_ids_BL = jnp.ones((1, 1), jnp.int32)
  seen_BLM = q_ids_BL[:, :, None] == k_ids_BM[:, None]
  return kernels.VisibleKeys(kernels.Mask(q_ids_BL, k_ids_BM), seen_BLM)


def _empty_inputs_of_heads(config: ModelConfig, rows: Sequence[int]
                           ) -> dict[str, jax.Array]:
  """Returns what a cache keeps for convolutions of queries, keys and values
  (model.attention_conv) before the first token: zeros, by the names of the
  three. Each is [..., B, W - 1, heads, head_dim] for a convolution over W
  tokens.

  Args:
    config: the config of the layer.
    rows: the rows of the batch, (..., B).
  """
  # A layer that shares the keys and values of an earlier one has only queries.
  fields = config.part(AttentionConfig)
  heads_of = {'query': config.num_heads}
  if not fields.kv_sharing:
    heads_of['key'] = config.num_kv_heads
    heads_of['value'] = config.num_kv_heads

  inputs = {}
  for name, heads in heads_of.items():
    last_inputs = *rows, fields.attention_conv - 1, heads, config.head_dim
    inputs[name] = jnp.zeros(last_inputs, config.compute_dtype)
  return inputs


def _empty_inputs_of_own_keys(config: ModelConfig, rows: Sequence[int]
                              ) -> dict[str, jax.Array]:
  """Returns what a cache keeps of the last tokens for steps that change a
  layer's own keys and values (steps.py), before the first token: zeros, by the
  names of these steps. A step that the layer lacks has no entry.

  Args:
    config: the config of the layer.
    rows: the rows of the batch, (..., B).
  """
  fields = config.part(AttentionConfig)
  inputs = {}
  # A convolution over W tokens needs the last W - 1.
  if fields.dynamic_conv:
    last_inputs = (*rows, fields.dynamic_conv - 1, config.num_kv_heads,
                   config.head_dim)
    for name in ('key', 'value'):
      inputs[steps.DYNAMIC_CONV.format(name)] = jnp.zeros(
          last_inputs, config.compute_dtype)
  # Keys that are offset keep those features of the last one that no position
  # encoding rotates.
  if fields.key_offset:
    num_features = config.head_dim - positions.rotary_dim(config)
    inputs[steps.KEY_OFFSET] = jnp.zeros(
        (*rows, 1, config.num_kv_heads, num_features), config.compute_dtype)
  # The sum of forget gates goes on from that of the last token.
  if fields.forget_gate:
    inputs[steps.FORGET_GATE] = jnp.zeros(
        (*rows, 1, config.num_heads, 1), jnp.float32)
  return inputs


class MultiHead(mixer.Mixer):
  """The entry of attention in the table of mixers."""
  module = SelfAttention
  fields = 'num_kv_heads', 'attention_scale', *mixer.FIELDS_OF_ATTENTION
  positional = turns_heads = has_scores = True

  def cache(self, config: ModelConfig, shape: tuple[int, ...]) -> Cache:
    """Returns an empty cache for a layer of attention.

    The suffixes name axes: B rows of the batch, M slots (places for a token), J
    heads of keys, K features of a head.

    Args:
      config: the config of the layer.
      shape: (..., rows, tokens): the rows of the batch, and for how many tokens
        of a row there is room.

    Returns:
      A cache of zeros, with keys and values, the keys of an indexer, and the
      last inputs of convolutions. What the layer does not have is None.
    """
    # The keys and values of all tokens, and the sums of their forget gates. A
    # layer that shares those of an earlier layer has none of its own.
    fields = config.part(AttentionConfig)
    has_own_keys = not fields.kv_sharing
    key_BMJK = value_BMJK = forget_BMHU = None
    if has_own_keys:
      slots = *shape, config.num_kv_heads, config.head_dim
      key_BMJK = jnp.zeros(slots, config.compute_dtype)
      value_BMJK = jnp.zeros(slots, config.compute_dtype)
      if fields.forget_gate:
        forget_BMHU = jnp.zeros((*shape, config.num_heads, 1), jnp.float32)

    # The last inputs of convolutions, however long the row is.
    *rows, _ = shape
    inputs = indexer.empty_block_inputs(config, shape)
    if fields.attention_conv:
      inputs |= _empty_inputs_of_heads(config, rows)
    if fields.cca:
      inputs |= convolved.empty_inputs(config, tuple(rows))
    if config.position == 'path':
      last_vectors = (*rows, config.part(PathConfig).conv - 1,
                      config.num_kv_heads, config.head_dim)
      inputs[path.CONV] = jnp.zeros(last_vectors, config.compute_dtype)
    if has_own_keys:
      inputs |= _empty_inputs_of_own_keys(config, rows)
    return Cache(key_BMJK=key_BMJK, value_BMJK=value_BMJK,
                 index_BMJK=indexer.empty_key_cache(config, shape),
                 forget_BMHU=forget_BMHU, inputs=inputs)

  def products(self, config: ModelConfig) -> set[str]:
    """Returns the products that a layer has, of those that adapters know."""
    fields = config.part(AttentionConfig)
    names = {'query', 'out'} | gate_products(config.attention_gate)
    if not fields.kv_sharing:
      names.add('key')
      if not fields.keys_as_values:
        names.add('value')
    if fields.cca:
      names.add(convolved.VALUE_BEFORE)
    return names

  def fields_to_divide(self, config: ModelConfig) -> mixer.AxesAndFields:
    return ('tensor', 'num_heads'), ('tensor', 'num_kv_heads')

  def check(self, config: ModelConfig, stack: str) -> None:
    """Checks that the steps which change queries, keys, values and the results
    of heads can be taken, and go together.

    Args:
      config: the config of the layer.
      stack: the kind of stack. It is not read: attention is alike in all.

    Raises:
      RequestError: if heads are to be subtracted in pairs
        (attention_difference) and there is no whole number of pairs, or muP,
        which has no rule for this; if a pair's result is to lose its part along
        the token's own value, since a pair has two values; if keys are to be
        offset (key_offset) and have no features that positions rotate beside
        others, which are offset, that they do not; or if queries and keys
        cannot be mixed (`check_mixed_heads`).
    """
    fields = config.part(AttentionConfig)
    if fields.cca:
      check_mixed_heads(config)

    # The second half of the heads is subtracted from the first.
    has_odd_heads = config.num_kv_heads % 2 != 0
    difference = fields.attention_difference
    if difference and (has_odd_heads or config.parametrization == 'mup'):
      raise RequestError(
          f'model.attention_difference is {difference}: it needs '
          'an even model.num_kv_heads, and model.parametrization standard; '
          f'they are {config.num_kv_heads} and {config.parametrization}')
    if difference and fields.attention_exclusive != 'none':
      raise RequestError(
          f'model.attention_exclusive is {fields.attention_exclusive!r}, and '
          f'model.attention_difference {difference}: the values of pairs of '
          "heads are not those of a head; set attention_exclusive='none', or "
          'attention_difference=0')

    # Without rope no feature is rotated, and with a fraction of 1 all are.
    if fields.key_offset:
      rope = config.find_part(positions.RopeConfig)
      if rope is None or rope.proportional or rope.fraction == 1.0:
        raise RequestError(
            'model.key_offset is set: it needs features that positions do not '
            "rotate beside others that they do; set model.position='rope' and "
            'model.rope.fraction below 1, without rope.proportional')


def check_mixed_heads(config: ModelConfig) -> None:
  """Checks that queries and keys can be mixed with each other, as compressed
  convolutional attention does (model.cca).

  Args:
    config: the config of the layer.

  Raises:
    RequestError: if the layer has no keys or values of its own that could be
      mixed and delayed (kv_sharing, keys_as_values); if it would normalise
      queries and keys a second time (qk_norm); if the features of its values
      cannot be halved; and for muP, which has no rule for these convolutions.
  """
  # This attention makes queries, keys and values in a way of its own.
  fields = config.part(AttentionConfig)
  for name in ('kv_sharing', 'keys_as_values', 'qk_norm'):
    require(not getattr(fields, name), f'model.cca is set, which makes and '
            f'normalises queries, keys and values of its own, and model.{name} '
            'is True: set one of them to False')
  # Half of the values' features are of the token before.
  require(config.head_dim % 2 == 0, 'model.cca is set, by which half of the '
          'features of values are of the token before: model.head_dim '
          f'{config.head_dim} must be even')
  require(config.parametrization != 'mup', 'model.cca is set, for whose '
          "convolutions model.parametrization 'mup' has no rule: choose "
          'standard')


# A gate on what the heads return, before the output's product (Qiu et al. 2025,
# "Gated Attention for Large Language Models", arXiv 2505.06708, the gate that
# it calls G1; Qwen3-Next).
#
#   y = W_o (o * sigmoid(W_g x))
#
# x is the input of the layer's queries, and o the result of its heads. The
# gate has a number for each feature of each head (elementwise, as in
# Qwen3-Next), or one for each head (headwise). Where the products of attention
# have biases, so has that of the gate. An entry of GATES, at the end of this
# file, is all that there is of one.


def _gate_features(module: Any, x_BLD: jax.Array, o_BLHK: jax.Array, *,
                   axis: str, deterministic: bool) -> jax.Array:
  """Multiplies the results of attention's heads by gates sigmoid(W_g x), one
  for each feature of each head.

  The suffixes name axes: B batch, L length, D d_model, H heads, K features.

  Args:
    module: the layer's attention, in which the weight W_g is declared.
    x_BLD: what the gates are made of.
    o_BLHK: the results of the heads.
    axis: the logical axis of the features of x_BLD.
    deterministic: whether there is no dropout, as outside of training.

  Returns:
    The gated results, [B, L, H, K].
  """
  H, K = o_BLHK.shape[2:]
  axes = axis, 'heads', 'head'
  z_BLHK = layers.dense(module, GATE, 'BLD,DHK->BLHK', x_BLD,
                        shape=(x_BLD.shape[-1], H, K), axes=axes, output=False,
                        with_bias=False, deterministic=deterministic)
  return o_BLHK * _gate_of_logits(module, z_BLHK, axes)


def _gate_heads(module: Any, x_BLD: jax.Array, o_BLHK: jax.Array, *,
                axis: str, deterministic: bool) -> jax.Array:
  """Multiplies the result o of each head of attention by a gate, one number
  for each head (Qiu et al. 2025, arXiv 2505.06708, headwise):

    o' = o sigmoid(W_g x / widening + bias)

  A wider model need not have more heads. So under muP W_g x is treated as
  logits are: it is divided by `widening`, the ratio of the model's width to
  that of the base model whose hyperparameters it takes. Otherwise `widening` is
  1.

  The suffixes name axes: B batch, L length, D d_model, H heads, K features.

  Args:
    module: the layer's attention, in which the weight W_g is declared.
    x_BLD: what the gates are made of.
    o_BLHK: the results of the heads.
    axis: the logical axis of the features of x_BLD.
    deterministic: whether there is no dropout, as outside of training.

  Returns:
    The gated results, [B, L, H, K].
  """
  D, H = x_BLD.shape[-1], o_BLHK.shape[2]
  axes = axis, 'heads'
  product_BLH = layers.dense(
      module, GATE, 'BLD,DH->BLH', x_BLD, shape=(D, H), axes=axes, output=True,
      with_bias=False, deterministic=deterministic)
  # The bias is added after the division, which must not divide it.
  logits_BLH = product_BLH / module.config.widening
  gate_BLH = _gate_of_logits(module, logits_BLH, axes)
  return o_BLHK * gate_BLH[..., None]


def _gate_of_logits(module: Any, z: jax.Array, axes: tuple[str, ...]
                    ) -> jax.Array:
  """Returns the gates sigmoid(z + bias). Without model.attention_bias there is
  no bias, nor is there one in any product of a latent.

  Args:
    module: the layer's attention, in which the bias is declared.
    z: the logits, [batch, length, heads] or [batch, length, heads, features].
    axes: the logical axes of the weight that made z: first that of its input,
      then those of z after the length, by which z is split over devices.
  """
  input_axis, *axes_of_z = axes
  # The bias is added here, after the caller's division by muP's factor, which
  # must not divide it.
  if module.config.attention_bias and input_axis != 'latent':
    bias = layers.bias(
        module, f'{GATE}_bias', shape=z.shape[2:], axes=tuple(axes_of_z))
    z = layers.add_bias(z, bias)
  z = sharding.constrain(z, 'batch', 'length', *axes_of_z)
  return jax.nn.sigmoid(z)


def gate_products(gate: str) -> set[str]:
  """Returns which of layers.NAMES_OF_PRODUCTS a layer has for its gate."""
  if GATES[gate] is None:
    return set()
  return {GATE}


GATES = {
    'none': None,
    'elementwise': _gate_features,
    'headwise': _gate_heads,
}
