"""The layers: a table of the mixers of their tokens, how they are wired, and
the residual stream that they add to.

An entry of MIXERS or of BLOCKS is all that there is of one. streams.py has the
forms with several residual streams.
docs/architectures.md has the wirings in a table, and
tests/architectures/parts_test.py has their equations again.
"""

from collections.abc import Callable
import functools
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts import sharding, streams
from architectures.parts.attention import compressed
from architectures.parts.attention import latent
from architectures.parts.attention import multi_head
from architectures.parts import lookup
from architectures.parts.cache import LayerCache
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context, Report
from architectures.parts.layers import FFN, NO_FFN, norm
from architectures.parts.mixer import has_array_of_fixed_size, Mixer
from architectures.parts.moe.layer import MoE
from architectures.parts.recurrent import features
from architectures.parts.recurrent import linear_attention, mamba
from architectures.parts.recurrent import mamba2, mamba3, mesa, rwkv7
from architectures.parts.recurrent import short_conv
from architectures.parts.recurrent.layer import Recurrence
from architectures.parts.sharding import Role, declare
from architectures.parts.streams import LayerInput, Streams, StreamWeights

# The results of a layer, or of one of its branches: what it computes, the
# layer's cache (None: no cache went in), and the report.
LayerResult = tuple[LayerInput, Optional[LayerCache], Report]
BranchResult = tuple[jax.Array, Optional[LayerCache], Report]


def mixer_of_layers(config: ModelConfig) -> Mixer:
  """Returns the mixer of a model, or of its layers of one kind."""
  return MIXERS[config.mixer]


# The fields that give a layer a state that goes from token to token, for
# messages.
SOURCES_OF_STATE = (
    'model.mixer, attention_conv, dynamic_conv, cca, key_offset, forget_gate, '
    'branch_conv, memory, indexer.block, or position path')


def has_layers_with_state(config: ModelConfig) -> bool:
  """Returns whether some layers of a model carry a state from token to token.
  Such a model must read a row of tokens from left to right.

  Layers with a state have a recurrence, a short convolution before attention or
  after a residual branch, tables that are looked up by the last n tokens, or an
  indexer that selects blocks of keys.

  Args:
    config: the model.
  """
  for layer in config.distinct_layers:
    if mixer_of_layers(layer).keeps_state(layer):
      return True
    # An array of the cache that does not grow with the row is a state, whatever
    # part of the layer keeps it.
    cache_of_shape = functools.partial(empty_cache_of_layer, layer)
    if has_array_of_fixed_size(cache_of_shape):
      return True
  return False


def empty_cache_of_layer(config: ModelConfig, shape: tuple[int, ...]
                         ) -> LayerCache:
  """Returns an empty cache for generating text with one layer.

  Args:
    config: the config of the layer (not that of a model with several kinds of
      layer).
    shape: (..., rows, tokens): the rows of the batch, and for how many tokens
      of a row there is room. Axes in front, such as one of layers, are kept in
      all arrays.

  Returns:
    The cache: `mixer`, the keys and values of attention or the state of a
    recurrence; `memory`, the last tokens, or None; and `inputs`, the last
    results of the branches 'attention' and 'ffn', or {}.
  """
  # The last tokens, where the layer looks up tables by n-grams of tokens, or
  # the last input, where it reads that of the token before.
  memory = None
  if lookup.keeps_state(config):
    memory = lookup.empty_state(config, shape)
  # The last results of each branch, if a convolution over W = branch_conv
  # tokens follows it. The next token brings its own, so W - 1 are kept.
  inputs = {}
  if config.branch_conv:
    shape_of_inputs = *shape[:-1], config.branch_conv - 1, config.d_model
    inputs['attention'] = jnp.zeros(shape_of_inputs, config.compute_dtype)
    if config.ffn != NO_FFN:
      inputs['ffn'] = jnp.zeros(shape_of_inputs, config.compute_dtype)
  mixer = mixer_of_layers(config)
  return LayerCache(mixer=mixer.cache(config, shape), memory=memory,
                    inputs=inputs)


# The mixers of a layer's tokens, by the values of model.mixer. A new one is a
# file like latent.py or recurrent/mamba2.py, and its entry here.
MIXERS: dict[str, Mixer] = {
    'attention': multi_head.MultiHead(),
    'latent': latent.Latent(),
    'swa': compressed.Compressed(compressed.SWA),
    'hca': compressed.Compressed(compressed.HCA, 'compressed.hca_rate'),
    'csa': compressed.Compressed(
        compressed.CSA, 'compressed.csa_rate', 'indexer'),
    'deltanet': Recurrence(linear_attention.DeltaNet),
    'comba': Recurrence(linear_attention.Comba),
    'mamba': mamba.MambaMixer(),
    'mamba2': mamba2.Mamba2Mixer(mamba2.Mamba2, 'mamba2'),
    'mamba3': mamba3.Mamba3Mixer(mamba3.Mamba3, 'mamba3'),
    'kda': linear_attention.LowRank(linear_attention.KDA),
    'gdn2': linear_attention.LowRank(linear_attention.GDN2),
    'gla': Recurrence(linear_attention.GLA),
    'retnet': linear_attention.Retention(linear_attention.RetNet),
    'mesa': mesa.MesaMixer(mesa.Mesa),
    'rwkv7': rwkv7.Goose(rwkv7.RWKV7),
    'short_conv': short_conv.ShortConvMixer(),
}


# The residual stream, to which the branches of all layers add their results: an
# array [B, L, D]; or Streams, where model.residual is not plain (streams.py).


def begin_residual(config: ModelConfig, x_BLD: jax.Array,
                   kinds: tuple[LayerKind, ...]) -> LayerInput:
  """Returns the residual stream, or streams, that the first layer reads.

  Args:
    config: the model.
    x_BLD: the embedding of the tokens, [batch, length, d_model].
    kinds: the kind of each layer of the stack, in order.

  Returns:
    The embedding itself for a plain residual. Otherwise Streams, of whose
    branches none has run.
  """
  if config.residual == 'plain':
    return x_BLD
  # A layer with attention and a network one after the other has two branches,
  # and one with both side by side has one.
  branches = 0
  for kind in kinds:
    block = BLOCKS[config.layer_config(kind.name).block]
    branches += block.count_branches(kind)
  return streams.begin_streams(config, x_BLD, branches)


def read_residual(config: ModelConfig, name: str, x: LayerInput
                  ) -> tuple[jax.Array, Optional[StreamWeights]]:
  """Returns what a residual branch (attention or the feed-forward network)
  reads, and how its result is to be added to the residual streams later.

  Args:
    config: the model.
    name: the name of the branch, such as 'attention'. The parameters of the
      mixture are those of a submodule `{name}_streams` of the calling layer.
    x: one residual stream [B, L, D] = [batch, length, d_model], or Streams,
      as the branches before have left it.

  Returns:
    The input of the branch, [B, L, D], and the weights to pass on to
    `add_to_residual`. They are None where there is nothing to weight: for one
    stream, which takes a plain sum; and for model.residual 'attention', which
    keeps the result of each branch as a stream of its own.
  """
  if not isinstance(x, Streams):
    return x, None
  # Several streams are mixed to one, by a module with the learned weights.
  mix_streams = streams.Branch(config, name=f'{name}_streams')
  return mix_streams(x)


def add_to_residual(config: ModelConfig, x: LayerInput, y_BLD: jax.Array,
                    weights: Optional[StreamWeights]) -> LayerInput:
  """Returns the residual stream, or streams, after one branch (attention or the
  feed-forward network): x + branch_scale y for one stream.

  Args:
    config: the model.
    x: the same residual stream, or Streams, that `read_residual` was given.
    y_BLD: the result of the branch, [batch, length, d_model].
    weights: how y is added to several streams: the second result of
      `read_residual`.

  Returns:
    x of the same type and shapes, with y added.
  """
  if isinstance(x, Streams):
    return streams.add_to_streams(config, x, y_BLD, weights=weights)
  # A scale of 1 is left out, so that it costs no operation.
  if config.branch_scale != 1:
    y_BLD = layers.multiply_exactly(y_BLD, config.branch_scale)
  return x + y_BLD


class EndOfResidual(nn.Module):
  """The module that makes one array of the streams after the last layer.

  The result of a layer -> x_BLD, the input of the final norm. The arrays may
  have an axis of layers in front of theirs.
  """
  config: ModelConfig

  @nn.compact
  def __call__(self, x: LayerInput) -> jax.Array:
    if isinstance(x, Streams):
      return streams.RESIDUALS[self.config.residual].end(self, x)
    return x


def pin_residual(x: LayerInput) -> LayerInput:
  """Returns the residual stream, or several, constrained to their place on the
  mesh, so that XLA never reshards them between two layers."""
  if isinstance(x, Streams):
    return x.replace(x_BLUD=streams.pin_streams(x.x_BLUD))
  return sharding.constrain_stream(x, 'embed')


# Block wirings, side by side: (x, context, cache) -> (x, cache, report).
#
# The docstring of each begins with its equation and those who have it. A is
# self-attention and, in a decoder with a memory, C follows it wired alike. With
# model.ffn 'none' a block ends before F, as Mamba-2's do: x + A(n(x)).
#
# To add one, write a class with `input_of_branch` or `result_of_branch`, or
# with `run_branches`, and its entry in BLOCKS. What else it can do than
# self-attention and F on one stream it says by the attributes of Block; what it
# does not say is refused.


class Block(nn.Module):
  """The base of the wirings, with the parts that they share by name.

  FINAL_NORM: whether a norm follows the last block.
  CROSS: whether it has C too, where its kind of layer asks for it.
  WITHOUT_FFN: whether it ends before F, where its kind of layer has none.
  STREAMS: whether x may be several streams (streams.py): everything that the
    block adds to x is added by `add_to_residual`, as often as
    `count_branches` says.
  """
  FINAL_NORM = True
  CROSS = False
  WITHOUT_FFN = False
  STREAMS = False
  config: ModelConfig
  kind: LayerKind

  @nn.compact
  def __call__(self, x: LayerInput, ctx: Context, cache: Optional[LayerCache]
               ) -> LayerResult:
    """Runs one layer: attention, the feed-forward network, and what the model
    adds around them.

    With model.memory, the layer looks up vectors for each token in tables, and
    adds them to its input or to its result. With model.layer_scale, the result
    is multiplied by a learned number.

    Args:
      x: the residual stream, [B, L, D] = [batch, length, d_model], or Streams,
        which hold several.
      ctx: what all layers read besides their input: positions, documents,
        padding, dropout.
      cache: the generation cache of this layer; None: there is none.

    Returns:
      x after the layer; the cache with the tokens of this call in it, or None;
      and the Report of losses and statistics of the layer.
    """
    config = self.config
    memory = lookup.MEMORIES[config.memory]
    # Tables that are read before the branches.
    if memory and not memory.is_read_after_layer:
      x, cache = self._read_tables(memory, x, ctx=ctx, cache=cache)
    # Attention and the network.
    x, cache, report = self.run_branches(x, ctx, cache)
    # Tables that are read after them, and the layer's factor. A model that has
    # either cannot have several residual streams (this is checked when it is
    # made), so x is a plain array here.
    if memory and memory.is_read_after_layer:
      x = pin_residual(x + memory.module(config, name='memory')(x, ctx))
    if config.layer_scale:
      scale_1 = declare(self, 'layer_scale', init=nn.initializers.ones,
                        shape=(1,), role=Role(axes=(None,)))
      scaled = x.astype(jnp.float32) * scale_1[None, None]
      x = pin_residual(scaled.astype(x.dtype))
    return x, cache, report

  def run_branches(self, x: LayerInput, ctx: Context,
                   cache: Optional[LayerCache]) -> LayerResult:
    """Returns x after attention and the network, the cache, and the report: the
    wiring, which each subclass defines. Arguments are those of `__call__`."""
    raise NotImplementedError

  def _read_tables(self, memory: lookup.TableMemory, x: LayerInput,
                   ctx: Context, cache: Optional[LayerCache]
                   ) -> tuple[LayerInput, Optional[LayerCache]]:
    """Adds to the residual stream the vectors that the layer looks up in tables
    by the last tokens.

    The suffixes name axes: B batch, L length, U residual streams, D d_model.

    Args:
      memory: the kind of tables: the entry of lookup.MEMORIES for model.memory.
      x: the residual stream [B, L, D] = [batch, length, d_model], or Streams.
      ctx: the context of the call, which has the tokens.
      cache: the generation cache of the layer; None: there is none.

    Returns:
      x with the vectors added, and the cache with the last tokens of this call
      in it; None: there is none.
    """
    # The tokens just before this call, which its first n-grams begin with.
    state = None if cache is None else cache.memory
    tables = memory.module(self.config, name='memory')
    # U streams get a vector each.
    if isinstance(x, Streams):
      rows_BLUD, state = tables(x.x_BLUD, ctx, state)
      x = x.replace(x_BLUD=x.x_BLUD + rows_BLUD)
    else:
      rows_BLD, state = tables(x, ctx, state)
      x = x + rows_BLD
    if cache is not None:
      cache = cache.replace(memory=state)
    return pin_residual(x), cache

  def norm(self, name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns the config's norm, whose parameters stand under `name`."""
    return norm(self.config, name)

  def attention(self, x_BLD: jax.Array, ctx: Context,
                cache: Optional[LayerCache]) -> BranchResult:
    """Returns A(x_BLD), [B, L, D], the cache, and the report."""
    mixer = mixer_of_layers(self.config).module(
        self.config, self.kind, name='attention')
    y_BLD, cache, report = self._run_mixer(mixer, x_BLD, ctx=ctx, cache=cache)
    y_BLD, cache = self._add_convolution(
        'attention', y_BLD, ctx=ctx, cache=cache)
    return y_BLD, cache, report

  def cross_attention(self, x_BLD: jax.Array, ctx: Context,
                      cache: Optional[LayerCache]) -> BranchResult:
    """Returns C(x_BLD), [B, L, D], the cache, and the report."""
    module = multi_head.CrossAttention(
        self.config, self.kind, name='cross_attention')
    return self._run_mixer(module, x_BLD, ctx=ctx, cache=cache)

  @staticmethod
  def _run_mixer(module: Callable, x_BLD: jax.Array, ctx: Context,
                 cache: Optional[LayerCache]) -> BranchResult:
    """Returns the result of a mixer's module on x, the cache of the layer, and
    the report. The module reads and returns `cache.mixer` alone."""
    if cache is None:
      return module(x_BLD, ctx, None)
    y_BLD, cache_of_mixer, report = module(x_BLD, ctx, cache.mixer)
    return y_BLD, cache.replace(mixer=cache_of_mixer), report

  def ffn(self, x_BLD: jax.Array, ctx: Context, cache: Optional[LayerCache]
          ) -> BranchResult:
    """Returns F(x_BLD), [B, L, D], the cache, and the report."""
    network: nn.Module
    if self.kind.ffn == 'moe':
      network = MoE(self.config, name='ffn')
    else:
      network = FFN(self.config, self.kind.ffn, name='ffn')
    y_BLD, report = network(x_BLD, ctx)
    y_BLD, cache = self._add_convolution('ffn', y_BLD, ctx=ctx, cache=cache)
    return y_BLD, cache, report

  def _add_convolution(self, name: str, y_BLD: jax.Array, ctx: Context,
                       cache: Optional[LayerCache]
                       ) -> tuple[jax.Array, Optional[LayerCache]]:
    """Adds to the result of a residual branch a causal convolution of it, over
    the last W = model.branch_conv tokens, for each feature by itself (Inkling).

    The weights of the convolution are 0 at first, so that a new model computes
    the same as one without it.

    The suffixes name axes: B batch, L length, D d_model, W tokens of the
    convolution.

    Args:
      name: the name of the branch, 'attention' or 'ffn'.
      y_BLD: the result of the branch.
      ctx: the context of the call.
      cache: the cache of the layer; None: there is none.

    Returns:
      The sum, [B, L, D], and the cache with the last results of the branch.
      Without model.branch_conv, y and the cache as they are.
    """
    config = self.config
    if not config.branch_conv:
      return y_BLD, cache
    w_WD = declare(self, f'{name}_conv', init=nn.initializers.zeros,
                   shape=(config.branch_conv, config.d_model),
                   role=Role(axes=(None, 'embed')))
    # With a cache, the convolution begins with the last W - 1 results of the
    # call before. Padding must not push these out of the cache, so `convolve`
    # is told which tokens are padding.
    before_BWD = valid_BL = None
    if cache is not None:
      before_BWD, valid_BL = cache.inputs[name], ctx.valid_BL
    convolved_BLD, last_BWD = features.convolve(
        y_BLD, w_WD, before_BWHK=before_BWD,
        segment_ids_BL=ctx.segment_ids_BL, valid_BL=valid_BL)
    if cache is not None:
      cache = cache.replace(inputs=cache.inputs | {name: last_BWD})
    return y_BLD + convolved_BLD, cache

  @staticmethod
  def count_branches(kind: LayerKind) -> int:
    """Returns how often a layer of this wiring adds to x."""
    count = 1
    if kind.cross:
      count += 1
    if kind.ffn != NO_FFN:
      count += 1
    return count

  def apply_dropout(self, x: jax.Array, ctx: Context) -> jax.Array:
    """Returns x with the share model.dropout of its numbers at 0."""
    return layers.Dropout(self.config.dropout)(
        x, deterministic=ctx.deterministic)


class Sequential(Block):
  """Attention, attention to a memory where there is one, and the network, one
  after another.

  The branches are called 'attention', 'cross' and 'ffn'. A wiring overrides how
  the input of a branch is made, how its result is changed before it is added to
  x, and how x is changed after the sum.
  """
  CROSS = WITHOUT_FFN = STREAMS = True

  def input_of_branch(self, branch: str, x_BLD: jax.Array) -> jax.Array:
    """Returns the input of a branch, made of the residual stream."""
    return x_BLD

  def result_of_branch(self, branch: str, y_BLD: jax.Array) -> jax.Array:
    """Returns the result of a branch as it is added to x."""
    return y_BLD

  def after_sum(self, branch: str, x: LayerInput) -> LayerInput:
    """Returns x, with the result of a branch in it, as the next branch reads
    it."""
    return x

  def run_branches(self, x: LayerInput, ctx: Context,
                   cache: Optional[LayerCache]) -> LayerResult:
    """Runs the branches of a layer one after another: attention, attention to
    an encoder's result if the layer has it, and the feed-forward network. Each
    branch reads the residual stream after the branch before it has added its
    result.

    The suffixes name axes: B batch, L length, D d_model.

    Args:
      x: the residual stream, [B, L, D], or Streams, which are several.
      ctx: the context of the call: positions, documents, padding.
      cache: what the layer keeps of earlier tokens; None: there is none.

    Returns:
      The residual stream after the layer, the cache after these tokens, and the
      merged report of the branches (losses and statistics).
    """
    # Attention. With several residual streams, a branch reads a mixture of
    # them, and `weights` say how its result is added to each.
    x_BLD, weights = read_residual(self.config, 'attention', x)
    y_BLD, cache, report = self.attention(
        self.input_of_branch('attention', x_BLD), ctx, cache)
    x = self._add_result('attention', x, y_BLD, weights=weights, ctx=ctx)
    # Attention to the output of an encoder.
    if self.kind.cross:
      x_BLD, weights = read_residual(self.config, 'cross', x)
      y_BLD, cache, report_of_cross = self.cross_attention(
          self.input_of_branch('cross', x_BLD), ctx, cache)
      x = self._add_result('cross', x, y_BLD, weights=weights, ctx=ctx)
      report = merge_reports(report, report_of_cross)
    # The network.
    if self.kind.ffn == NO_FFN:
      return pin_residual(x), cache, report
    x_BLD, weights = read_residual(self.config, 'ffn', x)
    y_BLD, cache, report_of_ffn = self.ffn(
        self.input_of_branch('ffn', x_BLD), ctx, cache)
    x = self._add_result('ffn', x, y_BLD, weights=weights, ctx=ctx)
    return pin_residual(x), cache, merge_reports(report, report_of_ffn)

  def _add_result(self, branch: str, x: LayerInput, y_BLD: jax.Array,
                  weights: Optional[StreamWeights], ctx: Context
                  ) -> LayerInput:
    """Adds the result of a branch to the residual stream, with dropout and the
    norms that this wiring of a layer has.

    Args:
      branch: the name of the branch: 'attention', 'cross' or 'ffn'.
      x: the residual stream, [batch, length, d_model], or Streams, which are
        several.
      y_BLD: the result of the branch, [batch, length, d_model].
      weights: how the result is added to several streams, as
        `read_residual` returned it; None: there is one stream.
      ctx: the context of the call, which says whether dropout is applied.

    Returns:
      The residual stream after the sum.
    """
    # Subclasses override two methods: one may normalise the result before the
    # sum (`result_of_branch`), the other the sum itself (`after_sum`).
    y_BLD = self.result_of_branch(branch, y_BLD)
    y_BLD = self.apply_dropout(y_BLD, ctx)
    x = add_to_residual(self.config, x, y_BLD, weights=weights)
    return self.after_sum(branch, x)


class PreNorm(Sequential):
  """x + A(n(x)); x + F(n(x)) (GPT-2, LLaMA)."""

  def input_of_branch(self, branch: str, x_BLD: jax.Array) -> jax.Array:
    return self.norm(f'{branch}_norm')(x_BLD)


class NoNorm(Sequential):
  """x + A(x); x + F(x) (Qwen4-Exp, where the streams of residual gated are
  normalised as they are read)."""
  FINAL_NORM = False


class FfnNorm(Sequential):
  """x + A(x); x + F(n(x)) (the first layer of ModernBERT, whose input is
  normalised already)."""
  WITHOUT_FFN = False  # it would have no norm

  def input_of_branch(self, branch: str, x_BLD: jax.Array) -> jax.Array:
    if branch != 'ffn':
      return x_BLD
    return self.norm('ffn_norm')(x_BLD)


class PostNorm(Sequential):
  """n(x + A(x)); n(x + F(x)) (the Transformer, BERT).

  The papers of several streams have no equation for a sum that is normalised
  itself."""
  FINAL_NORM = STREAMS = False

  def after_sum(self, branch: str, x: LayerInput) -> LayerInput:
    return self.norm(f'{branch}_norm')(x)


class Sandwich(Sequential):
  """x + n(A(n(x))); x + n(F(n(x))) (CogView, Gemma 2)."""

  def input_of_branch(self, branch: str, x_BLD: jax.Array) -> jax.Array:
    return self.norm(f'{branch}_norm')(x_BLD)

  def result_of_branch(self, branch: str, y_BLD: jax.Array) -> jax.Array:
    return self.norm(f'{branch}_out_norm')(y_BLD)


class OutNorm(Sequential):
  """x + n(A(x)); x + n(F(x)) (OLMo 2: arXiv 2501.00656, 3.1)."""

  def result_of_branch(self, branch: str, y_BLD: jax.Array) -> jax.Array:
    return self.norm(f'{branch}_out_norm')(y_BLD)


class Parallel(Block):
  """x + A(n1(x)) + F(n2(x)) (GPT-NeoX)."""
  CROSS = STREAMS = True  # without F it would be pre_norm

  @staticmethod
  def count_branches(kind: LayerKind) -> int:
    return 1

  def normed_inputs(self, branches: list[str], x_BLD: jax.Array
                    ) -> dict[str, jax.Array]:
    """Returns the input of each branch, [B, L, D], by its name."""
    return {branch: self.norm(f'{branch}_norm')(x_BLD) for branch in branches}

  def run_branches(self, x: LayerInput, ctx: Context,
                   cache: Optional[LayerCache]) -> LayerResult:
    """Runs the branches of a layer side by side: attention, attention to an
    encoder's result if the layer has it, and the feed-forward network. All read
    the same residual stream, and the sum of their results is added to it.

    The suffixes name axes: B batch, L length, D d_model.

    Args:
      x: the residual stream, [B, L, D], or Streams, which are several.
      ctx: the context of the call: positions, documents, padding.
      cache: what the layer keeps of earlier tokens; None: there is none.

    Returns:
      The residual stream after the layer, the cache after these tokens, and the
      merged report of the branches (losses and statistics).
    """
    # The branches read the same x, each after a norm. Several residual streams
    # are mixed once for all, by the parameters of the name 'attention'.
    branches = ['attention', 'ffn']
    if self.kind.cross:
      branches = ['attention', 'cross', 'ffn']
    x_BLD, weights = read_residual(self.config, 'attention', x)
    inputs = self.normed_inputs(branches, x_BLD)
    # The sum of their results.
    y_BLD, cache, report = self.attention(inputs['attention'], ctx, cache)
    if self.kind.cross:
      cross_BLD, cache, report_of_cross = self.cross_attention(
          inputs['cross'], ctx, cache)
      y_BLD = y_BLD + cross_BLD
      report = merge_reports(report, report_of_cross)
    ffn_BLD, cache, report_of_ffn = self.ffn(inputs['ffn'], ctx, cache)
    y_BLD = self.apply_dropout(y_BLD + ffn_BLD, ctx)
    # To several residual streams, the sum counts as the result of one branch.
    x = add_to_residual(self.config, x, y_BLD, weights=weights)
    return pin_residual(x), cache, merge_reports(report, report_of_ffn)


class SharedNorm(Parallel):
  """x + A(n(x)) + F(n(x)) (GPT-J, PaLM, Falcon-7B)."""

  def normed_inputs(self, branches: list[str], x_BLD: jax.Array
                    ) -> dict[str, jax.Array]:
    return dict.fromkeys(branches, self.norm('attention_norm')(x_BLD))


BLOCKS = {
    'pre_norm': PreNorm,
    'post_norm': PostNorm,
    'parallel': Parallel,
    'shared_norm': SharedNorm,
    'sandwich': Sandwich,
    'out_norm': OutNorm,
    'ffn_norm': FfnNorm,
    'no_norm': NoNorm,
}


def merge_reports(first: Report, second: Report) -> Report:
  """Merges the reports of two parts of a layer, such as its attention and its
  feed-forward network, into one. A report has losses, statistics and what else
  a part returns beside its result.

  The suffixes name axes: B batch, H heads, L length, M keys, U features of the
  router's state.

  Args:
    first: the report of one part.
    second: the report of the other part. Both must not have the same loss or
      figure, nor both the same array.

  Returns:
    The merged report.
  """
  return Report(
      losses=first.losses | second.losses,
      health=first.health | second.health,
      loads=first.loads | second.loads,
      experts=first.experts | second.experts,
      weights_BHLM=_first_that_exists(first.weights_BHLM, second.weights_BHLM),
      memory_weights_BHLM=_first_that_exists(
          first.memory_weights_BHLM, second.memory_weights_BHLM),
      first_values=_first_that_exists(first.first_values, second.first_values),
      router_BLU=_first_that_exists(first.router_BLU, second.router_BLU),
      keys=_first_that_exists(first.keys, second.keys))


def _first_that_exists(first: Any, second: Any) -> Any:
  """Returns the first value, or the second where the first is None."""
  if first is None:
    return second
  return first
