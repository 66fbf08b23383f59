"""Skeletons: a decoder, an encoder, or both. A model is an embedding, a stack
of layers, a final norm and a head.

Decoder is the plain case, and reads so from top to bottom. stack.py has the
layers: how they are scanned, and where their parameters stand. A page under
architectures/ puts these together.
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools
import operator
from typing import Any, Optional

import chex
from flax import struct
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import blocks, heads, layers, positions
from architectures.parts import sharding
from architectures.parts.cache import LayerCache
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context, Memory, Report
from architectures.parts.heads import GeneratorConfig
from architectures.parts.layers import FFNS, norm
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.passes import project_concatenation
from architectures.parts.stack import add_distances, add_losses, Carry
from architectures.parts.stack import find_cache_of_tokens, is_cache
from architectures.parts.stack import merge_reports_of_stacks, PassedOn
from architectures.parts.stack import Period, Stack
from common.errors import require, shorten


@struct.dataclass
class Output:
  """The result of a model; `logits` [B, L, V] are computed when asked for.

  Attributes:
    hidden: [B, L, D], the input of the head.
    head: the output projection; None of a model with the head of a task that
      has scores, extra['scores'] (parts/heads.py).
    cache: keys and values of every layer, where a cache went in.
    aux: {'losses': scalars summed over layers, 'health': arrays by layer,
      'loads': the loads of experts, by the path of the bias that they move},
      with keep_layers 'layers': [N + 1, B, L, D], what the first layer is
      given and what each returns, 'readouts': the same as the head would read
      it, which ends with `hidden`, and 'experts': moe.layer.choices by layer
      of experts; with keep_attention 'attention': [N, B, H, L, M], what each
      layer weighs the values with, and of a decoder with a memory
      'cross_attention'.
    memory: [B, M, D] the encoder's output, of an encoder-decoder.
    extra: the results that one system alone has, by name.
  """
  hidden: jax.Array
  head: Optional[heads.Head]
  cache: Any = None
  aux: Any = struct.field(default_factory=dict)
  memory: Optional[jax.Array] = None
  extra: Any = struct.field(default_factory=dict)

  @property
  def logits(self) -> jax.Array:
    """The logits of the tokens, [B, L, V].

    Raises:
      RequestError: where the head of the model has none.
    """
    require(self.head is not None, "a model whose model.head is not 'lm' has "
            "no logits of tokens: its scores are extra['scores']")
    return self.head.logits(self.hidden)


class Decoder(nn.Module):
  """A decoder-only model (GPT, LLaMA, ...).

  REREADS: whether a text that outgrows one of
    positions.lengths_that_change_rotation while it is written is read again, as
    if all of it had been its prompt.
  """
  STACK = 'decoder'
  REREADS = False
  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BL: jax.Array, *,
               positions_BL: Optional[jax.Array] = None,
               segment_ids_BL: Optional[jax.Array] = None,
               cache: Any = None, one_by_one: bool = False,
               clean_BL: Optional[jax.Array] = None,
               estimate_BLD: Optional[jax.Array] = None,
               **context_fields: Any) -> Output:
    """Runs the model.

    Args:
      tokens_BL: the tokens.
      positions_BL: where they stand; default: 0..L-1. With a cache, where the
        tokens go.
      segment_ids_BL: an id for each packed document, which keeps it apart. A
        mask, 1 on tokens and 0 on padding, is such ids of one document. Each id
        but 0 lies in one piece of a row. One in several, as in a mask
        1 1 0 0 1 1, raises a RequestError unless it is traced: a state would
        begin anew with each piece, and positions would count what is between
        them. Passed with positions, ids also promise that each document is in
        order, and attention skips keys by it.
      cache: the entries of all layers; see init_cache.
      one_by_one: whether parameters and cache are those that `unstack_layers`
        returns.
      clean_BL: with model.diffusion_block, the tokens without noise, where
        `tokens_BL` is noised: each sees its noised block, and the clean blocks
        before it. The output is that of the noised tokens.
      estimate_BLD: with model.self_conditioning, what an earlier call predicted
        of the noised tokens (embed_predictions), 0 where nothing is known;
        None: the tokens are clean.
      **context_fields: further fields of Context: deterministic, keep_layers,
        keep_attention; `prefix_B`, the number of tokens at a row's start that
        see each other; `valid_BL`, 0 on padding where that is all a row's end:
        it is unseen, and takes no room of an expert; `lengths_B`, the number of
        tokens of each row, by which dynamic or longrope turn (default: L or,
        with a cache, up to the last of them).
    """
    config = self.config
    require(cache is None or segment_ids_BL is None,
            'a cache holds one document a row: pass no segment ids with it')
    ctx = _make_context(tokens_BL, positions_BL=positions_BL,
                        segment_ids_BL=segment_ids_BL, **context_fields)
    L = tokens_BL.shape[1]
    if clean_BL is not None:
      require(config.diffusion_block > 0 and cache is None, 'clean tokens go '
              'with model.diffusion_block, and with no cache')
      ctx = _append_clean_copy(ctx, clean_BL)
    # The embedding, the layers and the final norm.
    embed = Embed(config, name='embed')
    embedded_BLD, table_DV = embed(
        ctx.tokens_BL, ctx.positions_BL, deterministic=ctx.deterministic)
    reads_estimate = estimate_BLD is not None or self.is_initializing()
    if config.self_conditioning and reads_estimate:
      add_estimate = AddEstimate(config, name='self_conditioning')
      embedded_BLD = add_estimate(embedded_BLD, estimate_BLD, ctx)
    stack = Stack(config, config.sections(config.num_layers), name='decoder')
    x_BLD, cache, aux = stack(
        embedded_BLD, ctx, cache=cache, one_by_one=one_by_one)
    if clean_BL is not None:
      x_BLD = x_BLD[:, :L]
    # The head: the next token's, or that of a task.
    if config.head != 'lm':
      return self._apply_task_head(x_BLD, ctx).replace(cache=cache, aux=aux)
    head = Unembed(config, name='head')(table_DV)
    extra = {}
    if 'exits' in aux:
      extra['exits'] = aux.pop('exits')
    # The tokens further ahead, in training alone: a cache is for generating
    # text, and a caller who looks at layers wants those of the model itself.
    shows_layers = ctx.keep_layers or ctx.keep_attention
    if config.mtp_depth and cache is None and not shows_layers:
      predict_further = Mtp(config, name='mtp')
      extra['mtp'], reports = predict_further(x_BLD, embedded_BLD, ctx)
      for layer_report in reports:
        aux = add_losses(
            aux, losses=layer_report.losses, loads=layer_report.loads)
    return Output(hidden=x_BLD, head=head, cache=cache, aux=aux, extra=extra)

  def _apply_task_head(self, x_BLD: jax.Array, ctx: Context) -> Output:
    """Applies the head of a task, such as classification, which takes the place
    of a language model's head.

    The head reads each token or, if its answer is about the whole row, the
    row's last token. In a decoder only the last token has seen all others.

    Args:
      x_BLD: the result of the last layer, [batch, length, d_model].
      ctx: the context of the call, which says which tokens are padding.

    Returns:
      The Output. A head that predicts all tokens of a row returns them as
      logits: `hidden` and `head`. Others have no `head`, and their scores are
      extra['scores'], [B, K] or [B, L, K] with K scores.
    """
    config = self.config
    kind = heads.HEADS[config.head]
    # The input of the head: a vector of each token, or of each row.
    inputs = x_BLD
    if kind.is_for_rows:
      inputs = heads.pool_last_token(x_BLD, ctx.valid_BL, ctx.segment_ids_BL)
    # Logits of all tokens of a row, predicted from its one vector.
    if kind.has_logits_of_tokens:
      unfold = heads.Unfold(config, name='task')
      hidden_BLD, head = unfold(inputs, x_BLD.shape[1])
      return Output(hidden=hidden_BLD, head=head)
    # Scores of each row, which have no bias here, or of each token.
    task = heads.TaskHead(config, bias=not kind.is_for_rows, name='task')
    scores = task(inputs, deterministic=ctx.deterministic)
    return Output(hidden=x_BLD, head=None, extra=dict(scores=scores))


class Embed(nn.Module):
  """The embedding of tokens, with all that is added to it."""
  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BL: jax.Array, positions_BL: jax.Array, *,
               type_ids_BL: Optional[jax.Array] = None, prefix: str = '',
               added: bool = False, deterministic: bool = True
               ) -> tuple[jax.Array, jax.Array]:
    """Embeds tokens: looks them up, and adds positions, types, norm and dropout
    as the model has them.

    Args:
      tokens_BL: the token ids, [batch, length].
      positions_BL: the position of each token, [B or 1, L].
      type_ids_BL: which text of a pair each token is of, 0 or 1; None: all are
        of the first.
      prefix: the beginning of the names of the parameters of the positions and
        the norm. Two embeddings of one module share the table of the tokens,
        and with different prefixes nothing else.
      added: whether a second table is added to that of the tokens, which then
        has no gradient (an ELECTRA discriminator, beside its generator).
      deterministic: whether there is no dropout.

    Returns:
      The embedding, [B, L, D] with D = d_model, and the transpose of the table,
      [D, V] with V tokens in the vocabulary, which is the matrix of a tied
      head.
    """
    config = self.config
    # The tokens. A lookup is divided over the devices as the table is.
    table_VD = layers.embedding(self, 'tokens', rows=config.vocab_size,
                                axis='vocab')
    if added:
      role = sharding.Role(('vocab', 'embed'), inputs=(0,), kind='embedding')
      table_VD = jax.lax.stop_gradient(table_VD) + sharding.declare(
          self, NAME_OF_ADDED_TABLE, init=nn.initializers.zeros,
          shape=table_VD.shape, role=role)
    x_BLD = sharding.look_up_embeddings(
        table_VD, tokens_BL, config.compute_dtype)
    if config.embed_scale != 1:
      x_BLD = x_BLD * jnp.asarray(config.embed_scale, x_BLD.dtype)
    # Their positions, where the encoding is one that is added here, and which
    # of T texts of a pair they are of.
    add_positions = positions.position_of(config).embed
    if add_positions:
      x_BLD = add_positions(self, x_BLD, positions_BL, f'{prefix}positions')
    if config.type_vocab_size:
      types_TD = layers.embedding(self, 'types', config.type_vocab_size)
      if type_ids_BL is None:
        type_ids_BL = jnp.zeros((1, 1), jnp.int32)
      x_BLD = x_BLD + types_TD[type_ids_BL].astype(x_BLD.dtype)
    if config.embed_affine:
      x_BLD = self._shift_and_scale(x_BLD, prefix)
    # Norm and dropout.
    if config.embed_norm:
      x_BLD = norm(config, f'{prefix}norm')(x_BLD)
    x_BLD = layers.Dropout(config.dropout)(x_BLD, deterministic=deterministic)
    return sharding.constrain_stream(x_BLD, 'embed'), table_VD.T

  def _shift_and_scale(self, x_BLD: jax.Array, prefix: str) -> jax.Array:
    """Returns s (x + b) for embeddings x, [B, L, D], with a learned shift b
    and a learned factor s of each feature (Zaya, in transformers). At first
    b = 0 and s = 1.

    Args:
      x_BLD: the embeddings.
      prefix: the beginning of the names of the parameters.
    """
    shape, role = x_BLD.shape[-1:], sharding.Role(('embed',))
    shift_D = sharding.declare(self, f'{prefix}shift', shape=shape, role=role,
                               init=nn.initializers.zeros)
    scale_D = sharding.declare(self, f'{prefix}scale', shape=shape, role=role,
                               init=nn.initializers.ones)
    shifted_BLD = x_BLD.astype(jnp.float32) + shift_D[None, None]
    return (shifted_BLD * scale_D[None, None]).astype(x_BLD.dtype)


class AddEstimate(nn.Module):
  """Self-conditioning of a model of diffusion (Chen et al. 2023, arXiv
  2208.04202, section 2.2; in the form of transformers' diffusion_gemma): noised
  tokens read what the model predicted of them before."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, estimate_BMD: Optional[jax.Array],
               ctx: Context) -> jax.Array:
    """Returns the embeddings x of the first M tokens, with the estimate e,

      x' = (x + FFN(norm(e))) / rms,   rms that of x + FFN(norm(e))

    and those after them, which are not noised, as they are.

    Args:
      x_BLD: the embeddings, [batch, length L, d_model].
      estimate_BMD: e, see `embed_predictions`; None: zeros.
      ctx: the context of the call.
    """
    config = self.config
    if estimate_BMD is None:
      estimate_BMD = jnp.zeros_like(x_BLD)
    M = estimate_BMD.shape[1]

    # The network is a dense one. In a model with experts it is of the kind that
    # each expert is.
    kind = config.ffn
    if kind == 'moe':
      kind = config.part(MoEConfig).ffn
    e_BMD = norm(config, 'norm')(estimate_BMD.astype(x_BLD.dtype))
    y_BMD, _ = layers.FFN(config, kind, name='ffn')(e_BMD, ctx)
    normalise = layers.PlainRMSNorm(config, name='sum_norm')
    noised_BMD = normalise(x_BLD[:, :M] + y_BMD)
    return jnp.concatenate([noised_BMD, x_BLD[:, M:]], 1)


def embed_predictions(config: ModelConfig, params: Any, output: Output
                      ) -> jax.Array:
  """Computes the mean embedding of the tokens that a model predicts, weighted
  by their probabilities: the estimate that self-conditioning reads,

    mean = softmax(logits) E embed_scale

  with the table E of embeddings. The suffixes name axes: B batch, L length, V
  vocabulary, D d_model.

  Args:
    config: the config of the model.
    params: its parameters, of which E is read.
    output: the output of an earlier call, with the logits of the tokens.

  Returns:
    The mean, [B, L, D], without a gradient.
  """
  p_BLV = jax.nn.softmax(output.logits, -1).astype(config.compute_dtype)
  table_VD = params['embed']['tokens'].astype(config.compute_dtype)
  mean_BLD = jnp.einsum('BLV,VD->BLD', p_BLV, table_VD) * config.embed_scale
  return jax.lax.stop_gradient(mean_BLD)


class Unembed(nn.Module):
  """The module that makes the head of a language model, whose matrix is the
  embedding, transposed, or one of its own."""
  config: ModelConfig

  @nn.compact
  def __call__(self, table_DV: jax.Array) -> heads.Head:
    """Makes the output head of a language model, and declares its parameters.

    The suffixes name axes: D d_model, V vocabulary.

    Args:
      table_DV: the transpose of the table of embeddings. It is the head's
        matrix if the two are tied.

    Returns:
      The Head. It has not computed any logits yet: callers do so for the tokens
      that they need.
    """
    config = self.config
    kernel_DV = table_DV
    if not config.tie_embeddings:
      kernel_DV = layers.weight(
          self, 'kernel', shape=(config.d_model, config.vocab_size),
          axes=('embed', 'vocab'), output=True)
    bias_V = None
    if config.logits_bias:
      bias_V = layers.bias(self, 'bias', shape=(config.vocab_size,),
                           axes=('vocab',), output=True)
    # `widening` is muP's output multiplier, the ratio of the model's width to
    # its base model's. It divides the bias too, whose learning rate makes up
    # for that.
    return heads.Head(kernel_DV=kernel_DV, bias_V=bias_V,
                scale=config.logits_scale / config.widening,
                softcap=config.logits_softcap, tied=config.tie_embeddings)


def _make_context(tokens_BL: jax.Array, positions_BL: Optional[jax.Array],
                  segment_ids_BL: Optional[jax.Array], **context_fields: Any
                  ) -> Context:
  """Makes the Context of a call: what all layers are told about the tokens,
  such as their positions and which document they belong to.

  Args:
    tokens_BL: the token ids, [batch, length].
    positions_BL: the position of each token, [batch or 1, length]; None: 0, 1,
      2, ... With segment ids, tokens must stand in the order of their
      positions.
    segment_ids_BL: the number of the document that each token belongs to, if
      several documents are packed into a row; 0 on padding. None: each row is
      one document.
    **context_fields: further fields of Context.

  Raises:
    RequestError: if the tokens of a document do not stand side by side. This
      cannot be checked inside jit.
  """
  chex.assert_rank(tokens_BL, 2)
  # Inside jit the ids have no values yet, and cannot be checked.
  is_traced = isinstance(segment_ids_BL, jax.core.Tracer)
  if segment_ids_BL is not None and not is_traced:
    _check_segments_are_contiguous(np.asarray(segment_ids_BL))
  # With positions but no segment ids, tokens may stand in any order. Then
  # attention must not skip keys because they come later in the row.
  in_order = positions_BL is None or segment_ids_BL is not None
  if positions_BL is None:
    positions_BL = jnp.arange(tokens_BL.shape[1])[None]
  return Context(positions_BL=positions_BL, segment_ids_BL=segment_ids_BL,
                 tokens_BL=tokens_BL, in_order=in_order, **context_fields)


def _append_clean_copy(ctx: Context, clean_BL: jax.Array) -> Context:
  """Returns the context of a row of noised tokens with the same tokens without
  noise after them, at the same positions: [B, 2 L] (block diffusion: Arriola et
  al. 2025, arXiv 2503.09573, section 4). A noised block then sees the clean
  blocks before it.

  The suffixes name axes: M = 2 L tokens of a row with its copy.

  Args:
    ctx: the context of the noised tokens, [B, L].
    clean_BL: the tokens without noise.
  """
  def twice(x_BL: Optional[jax.Array]) -> Optional[jax.Array]:
    """Returns x for the noised tokens and again for the clean ones."""
    if x_BL is None:
      return None
    return jnp.concatenate([x_BL, x_BL], 1)

  assert ctx.tokens_BL is not None
  B, L = clean_BL.shape
  tokens_BM = jnp.concatenate([ctx.tokens_BL, clean_BL], 1)
  return ctx.replace(
      tokens_BL=tokens_BM, positions_BL=twice(ctx.positions_BL),
      segment_ids_BL=twice(ctx.segment_ids_BL), valid_BL=twice(ctx.valid_BL),
      lengths_B=jnp.full(B, L), in_order=False, has_clean_copy=True)


def _check_segments_are_contiguous(segment_ids_BL: np.ndarray) -> None:
  """Raises RequestError where a row has a segment id but 0 in several pieces,
  with other ids between them."""
  for ids_L in segment_ids_BL:
    is_start_L = np.diff(ids_L, prepend=0) != 0
    ids_of_pieces = ids_L[(ids_L != 0) & is_start_L]
    require(len(np.unique(ids_of_pieces)) == len(ids_of_pieces),
            'a row of segment ids, or of a mask, is '
            f'{shorten(ids_L.tolist())}: each id but 0, which is padding, lies '
            'in one piece')


class Mtp(nn.Module):
  """Modules that predict tokens further ahead (DeepSeek-AI 2024b, arXiv
  2412.19437, section 2.2): the one of depth k, for the token at place i,

    h'_i = M [n(e_(i+k)); n(h_i)],   h_i^k = layer(h'_1 ... h'_i)

  where e is the embedding, h the input of the model's head, or of the head as
  it reads the module of depth k - 1, and the layer is one more of the last
  kind. The head, which is the model's, reads of h_i^k, after a norm, the token
  at place i + k + 1.
  """
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, embedded_BLD: jax.Array, ctx: Context
               ) -> tuple[tuple[jax.Array, ...], list[Report]]:
    """Runs the modules that predict tokens further ahead, one for each depth
    from 1 to model.mtp_depth: each is one more layer.

    Args:
      x_BLD: the input of the head for the model itself, [batch, length,
        d_model].
      embedded_BLD: the embedding of the tokens, of the same shape.
      ctx: the context of the model's call.

    Returns:
      The input of the head at each depth, [B, L, D], and the Reports of their
      layers. The last k places at depth k are to be ignored: no token follows
      them at that distance.
    """
    inputs_of_head = []
    reports: list[Report] = []
    for depth in range(1, self.config.mtp_depth + 1):
      # A module reads the result of the one before, so the depths form a chain.
      x_BLD, reports_of_depth = self._run_depth(
          depth, x_BLD, embedded_BLD=embedded_BLD, ctx=ctx)
      inputs_of_head.append(x_BLD)
      reports += reports_of_depth
    return tuple(inputs_of_head), reports

  def _run_depth(self, depth: int, x_BLD: jax.Array, embedded_BLD: jax.Array,
                 ctx: Context) -> tuple[jax.Array, tuple[Report, ...]]:
    """Runs the module of one depth k:

      h'_i = M [n(e_(i+k)); n(h_i)],   h_i^k = layer(h'_1 ... h'_i)

    Args:
      depth: k, the distance of the token that is read, at least 1.
      x_BLD: h, the input of the head at the depth before, [batch, length,
        d_model].
      embedded_BLD: e, the embedding of the tokens.
      ctx: the context of the model's call.

    Returns:
      The input of the head at this depth, [B, L, D], and the Reports of the
      layer.
    """
    config = self.config
    kind = config.layer_kinds(config.num_layers)[-1]

    # Join each place with the embedding of the token k places on.
    ahead_BLD = jnp.roll(embedded_BLD, -depth, 1)
    joined_BLD = project_concatenation(
        self, f'join_{depth}',
        first_BLD=norm(config, f'token_norm_{depth}')(ahead_BLD),
        second_BLD=norm(config, f'hidden_norm_{depth}')(x_BLD))
    x = blocks.begin_residual(
        config, blocks.pin_residual(joined_BLD), (kind,))

    # The layer is told of the later tokens, in the place of the first ones.
    # Those that the roll wraps around are marked, and routed nowhere.
    ctx_k = ctx.replace(tokens_BL=jnp.roll(ctx.tokens_BL, -depth, 1),
                        routed_BL=_mark_tokens_with_successor(ctx, depth))
    ctx_k = add_distances(
        config, kind=kind, ctx=ctx_k, k_positions_BM=ctx.positions_BL,
        name_suffix=f'_{depth}')

    # Run the layer as a stack of its own: one period with one layer.
    period = Period(config, (kind,), name=f'depth_{depth}')
    carry, results = period(Carry(x, PassedOn()), None, ctx_k, {})
    end_streams = blocks.EndOfResidual(config, name=f'streams_{depth}')
    x_BLD = end_streams(carry.x)
    wiring = blocks.BLOCKS[config.layer_config(kind.name).block]
    if wiring.FINAL_NORM:
      x_BLD = norm(config, f'norm_{depth}')(x_BLD)
    return x_BLD, results.reports


def _mark_tokens_with_successor(ctx: Context, depth: int) -> jax.Array:
  """Marks the tokens whose document has another token `depth` places later.
  Modules that predict further tokens join the two; elsewhere nothing is
  predicted, and tokens are routed to no expert.

  The suffixes name axes: B batch, L length.

  Args:
    ctx: the context of the call: its tokens, the ids of their documents, and
      which of them are padding.
    depth: the distance to the later token, at least 1.

  Returns:
    The mask, int32 [B, L]: 1 where there is such a token, and 0 elsewhere.
  """
  B, L = ctx.tokens_BL.shape
  has_successor_L = jnp.arange(L) < L - depth
  has_successor_BL = jnp.broadcast_to(has_successor_L[None], (B, L))
  # jnp.roll(x, -depth) brings to place i what stands at place i + depth. It
  # wraps around, but the last `depth` places are excluded already.
  if ctx.segment_ids_BL is not None:
    ids_BL = ctx.segment_ids_BL
    has_successor_BL &= ids_BL == jnp.roll(ids_BL, -depth, 1)
  if ctx.valid_BL is not None:
    has_successor_BL &= jnp.roll(ctx.valid_BL, -depth, 1) != 0
  return has_successor_BL.astype(jnp.int32)


# An encoder that tells replaced tokens (model.head 'replaced', heads.py).
# The names of the parameters that its generator has of its own in `embed` begin
# so.
PREFIX_OF_GENERATOR = 'generator_'
# The name of the encoder's own part of the table of tokens.
NAME_OF_ADDED_TABLE = 'tokens_added'


def config_of_generator(config: ModelConfig) -> ModelConfig:
  """Returns the config of ELECTRA's generator, a small masked language model
  that draws replacements for masked tokens. The model itself, the
  discriminator, learns to tell these from the tokens of the text.

  Args:
    config: the config of the model, which has the sizes of its generator.

  Returns:
    A copy with the generator's sizes, a head that predicts masked words, and no
    generator of its own.
  """
  fields = config.part(GeneratorConfig)
  head_dim = fields.d_model // fields.num_heads
  # The generator reads the embedding of the model. If the widths differ, it is
  # projected; an embed_dim of 0 says that it is not.
  embed_dim = config.config_of_embedding.d_model
  if embed_dim == fields.d_model:
    embed_dim = 0
  # replace() does not derive sizes from others, so all sizes are given here.
  return dataclasses.replace(
      config.without_part(GeneratorConfig), head='lm', next_sentence=False,
      d_model=fields.d_model, num_layers=fields.num_layers,
      num_decoder_layers=fields.num_layers, d_ff=fields.d_ff,
      num_heads=fields.num_heads, num_kv_heads=fields.num_heads,
      head_dim=head_dim, attention_scale=head_dim ** -0.5, embed_dim=embed_dim)


class Encoder(nn.Module):
  """An encoder, whose tokens all see each other, as BERT's and those that came
  after it. A page of architectures/ says how its pre-training reads the last
  layer and, with `input_of_task_head`, what the head of a task is applied to.

  HEAD_ACT: the network of FFNS whose activation the head of masked words has;
    '': that of the layers.
  HEAD_BIAS: whether the product of that head has a bias.
  POOLER_ACT: the network of FFNS whose activation the pooler has; '': tanh.
  PAIR_SEPARATORS: how many separators stand between two texts of a row.
  """
  STACK = 'encoder'
  HEAD_ACT = ''
  HEAD_BIAS = True
  POOLER_ACT = ''
  PAIR_SEPARATORS = 1
  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BL: jax.Array, *,
               type_ids_BL: Optional[jax.Array] = None,
               positions_BL: Optional[jax.Array] = None,
               segment_ids_BL: Optional[jax.Array] = None,
               places_BM: Optional[jax.Array] = None,
               embedded: Optional[tuple[jax.Array, jax.Array]] = None,
               **context_fields: Any) -> Output:
    """Runs the model.

    Args:
      tokens_BL: the tokens.
      type_ids_BL: which text of a pair each is of.
      positions_BL: where they stand; default: 0..L-1.
      segment_ids_BL: an id for each document, 0 on padding; as a Decoder's.
      places_BM: the places of the masked words, for a generator to fill; one
        past the row's end is none.
      embedded: what Embed returned already.
      **context_fields: further fields of Context.

    Returns:
      `logits` of the masked words, and in `extra` hidden [B, L, D] of the
      encoder and, with model.next_sentence, pooled [B, D] and nsp_logits [B, 2]
      (0: the second text follows the first, 1: it does not, or with objective
      mlm_sop it is the first that follows). With the head of a task: in `extra`
      hidden, scores and, where a pooler is what a row is scored by, pooled.
      With a generator (model.generator): hidden and head are the generator's,
      at `places_BM` if they are there; what it draws for these, extra['drawn']
      [B, M], is what the encoder reads at them.
    """
    config = self.config
    ctx = _make_context(tokens_BL, positions_BL=positions_BL,
                        segment_ids_BL=segment_ids_BL, **context_fields)
    # The encoder and its generator embed their tokens by the same function.
    embed = functools.partial(
        Embed(config.config_of_embedding, name='embed'),
        positions_BL=ctx.positions_BL, type_ids_BL=type_ids_BL,
        deterministic=ctx.deterministic)

    # ELECTRA's generator guesses the masked words, and the encoder reads its
    # guesses. With sharing 'apart', the table of the embedding is trained by
    # the generator alone, and the encoder adds a table of its own to it.
    generator = config.find_part(GeneratorConfig)
    generated: Optional[Output] = None
    has_own_table = False
    if generator is not None and generator.num_layers > 0:
      has_own_table = generator.sharing == 'apart'
      prefix = ''
      if has_own_table:
        prefix = PREFIX_OF_GENERATOR
      network = type(self)(config_of_generator(config), name='generator')
      generated = network(
          tokens_BL, positions_BL=positions_BL, segment_ids_BL=segment_ids_BL,
          deterministic=ctx.deterministic,
          embedded=embed(tokens_BL, prefix=prefix)).replace(extra={})
      if places_BM is not None:
        generated = self._guess_masked_words(
            generated, places_BM=places_BM, deterministic=ctx.deterministic)
        tokens_BL = _replace_tokens(
            tokens_BL, places_BM=places_BM, new_BM=generated.extra['drawn'])

    # The embedding, the layers and the final norm.
    if embedded is None:
      embedded = embed(tokens_BL, added=has_own_table)
    x_BLD, table_DV = embedded
    if config.embed_dim:
      x_BLD = self._dense('widen', x_BLD, config.d_model)
      x_BLD = sharding.constrain_stream(x_BLD, 'embed')
    stack = Stack(config, config.sections(config.num_layers, causal=False),
                  name='encoder')
    x_BLD, _, aux = stack(x_BLD, ctx)

    # The head predicts masked words, or does a task. Beside a generator it
    # tells which words were replaced; the result then keeps the generator's
    # hidden states and head, for the generator's own loss.
    if config.head == 'lm':
      return self._apply_pretraining_head(x_BLD, table_DV, aux)
    output = self._apply_task_head(x_BLD, segment_ids_BL, ctx.deterministic)
    if generated is not None:
      output = generated.replace(extra=output.extra | generated.extra)
    return output.replace(aux=aux)

  def _guess_masked_words(self, generated: Output, places_BM: jax.Array,
                          deterministic: bool) -> Output:
    """Returns the output of ELECTRA's generator at the masked places alone, and
    in it as extra['drawn'] the tokens that are drawn for them, int32 [B, M].

    Args:
      generated: the output for all tokens of the rows.
      places_BM: the M masked places of each row, counted from its start.
      deterministic: whether there is no dropout.
    """
    at_places = _select_positions(generated, places_BM)
    drawn_BM = self._draw_tokens(at_places, deterministic)
    return at_places.replace(extra=dict(drawn=drawn_BM))

  def _draw_tokens(self, generated: Output, deterministic: bool) -> jax.Array:
    """Draws tokens from the distribution of ELECTRA's generator, for the masked
    places of each row.

    No gradient flows through a draw, so the generator is trained by its own
    loss only.

    The suffixes name axes: B batch, M masked places, D d_model.

    Args:
      generated: the generator's output at these places.
      deterministic: whether there is no dropout, as outside of training. Then
        the draws are always the same.

    Returns:
      The tokens, int32 [B, M].
    """
    if deterministic:
      key = jax.random.key(0)
    else:
      key = self.make_rng('dropout')
    hidden_BMD, head = jax.lax.stop_gradient(
        (generated.hidden, generated.head))

    def draw_at_place(key_and_hidden: tuple[jax.Array, jax.Array]) -> jax.Array:
      """Returns a token for the same place of each row, [B]."""
      key, hidden_BD = key_and_hidden
      return jax.random.categorical(key, head.logits(hidden_BD))

    # Go over the places one after another, so that only the logits of one
    # place, [B, vocabulary], are in memory. lax.map goes over the first axis,
    # so M is moved to the front, and the result is transposed back.
    keys_M = jax.random.split(key, hidden_BMD.shape[1])
    hidden_MBD = jnp.moveaxis(hidden_BMD, 1, 0)
    drawn_MB = jax.lax.map(draw_at_place, (keys_M, hidden_MBD))
    return drawn_MB.T.astype(jnp.int32)

  def _apply_task_head(self, x_BLD: jax.Array,
                       segment_ids_BL: Optional[jax.Array],
                       deterministic: bool) -> Output:
    """Applies the head of a task, such as classification, which takes the place
    of the head that predicts masked words.

    Args:
      x_BLD: the result of the last layer, [batch, length, d_model].
      segment_ids_BL: the document of each token, 0 on padding; None: there is
        no padding.
      deterministic: whether there is no dropout.

    Returns:
      The Output. A head that predicts all tokens of a row returns them as
      logits: `hidden` and `head`. Others have no `head`, and `extra` has
      `scores`, [B, K] or [B, L, K] with K scores. `extra` also has `hidden`,
      x_BLD itself, and what `input_of_task_head` adds, such as `pooled`.
    """
    config = self.config
    kind = heads.HEADS[config.head]
    extra = dict(hidden=x_BLD)
    # Logits of all tokens of a row, predicted from its last token.
    if kind.has_logits_of_tokens:
      last_BD = heads.pool_last_token(x_BLD, None, segment_ids_BL)
      unfold = heads.Unfold(config, name='task')
      hidden_BLD, head = unfold(last_BD, x_BLD.shape[1])
      return Output(hidden=hidden_BLD, head=head, extra=extra)
    # The input of the head: each token, or a vector of each row.
    x = x_BLD
    if kind.is_for_rows:
      x = heads.POOLINGS[config.pooling](x_BLD, segment_ids_BL)
    inputs, more_extra = self.input_of_task_head(x, kind.is_for_rows)
    if kind.has_detector:
      act = self._activation()
      inputs = act(self._dense('detector', inputs, config.d_model))
    # Its scores.
    task = heads.TaskHead(config, name='task')
    scores = task(inputs, deterministic=deterministic)
    return Output(hidden=x_BLD, head=None,
                  extra=extra | dict(scores=scores) | more_extra)

  def input_of_task_head(self, x: jax.Array, of_row: bool
                         ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Prepares the vectors to which the head of a task is applied. Those of
    rows go through BERT's pooler (a dense layer and its activation), and those
    of tokens stay as they are. Subclasses may override this.

    Args:
      x: a vector for each row, [batch, d_model], or for each token, [batch,
        length, d_model].
      of_row: whether x has a vector for each row.

    Returns:
      The vectors, of the shape of x; and a dict of further results for
      Output.extra, which has `pooled` for rows and is {} for tokens.
    """
    if not of_row:
      return x, {}
    pooled_BD = self._pool_first_token(x)
    return pooled_BD, dict(pooled=pooled_BD)

  def transform(self, x: jax.Array) -> jax.Array:
    """Returns the input of the head of masked words, n(act(x W + b)), whose
    width is that of the embedding."""
    config = self.config
    act = self._activation(self.HEAD_ACT)
    y = self._dense('transform', x, config.config_of_embedding.d_model,
                    bias=self.HEAD_BIAS)
    return norm(config, 'transform_norm')(act(y))

  def _apply_pretraining_head(self, x_BLD: jax.Array, table_DV: jax.Array,
                              aux: dict) -> Output:
    """Applies the heads for pretraining (BERT): the one that predicts masked
    words and, with next_sentence, the one that says whether the second text of
    a row follows the first.

    The suffixes name axes: B batch, L length, D d_model, V tokens in the
    vocabulary.

    Args:
      x_BLD: the result of the last layer, [batch, length, d_model].
      table_DV: the transpose of the embedding's table, [d_model, vocabulary],
        which is the matrix of a tied head.
      aux: what the layers report, by name; `readouts`, [N, B, L, D], are the
        results of all N layers where the caller asked for them.

    Returns:
      The Output: `hidden` is the input of the `head` of masked words, and
      `extra` has `hidden`, x_BLD itself. With next_sentence, it has `pooled`
      and the logits of the two answers, `nsp_logits`, [B, 2], too.
    """
    config = self.config
    extra = dict(hidden=x_BLD)
    # Whether the second text of a row follows the first.
    if config.next_sentence:
      pooled_BD = self._pool_first_token(x_BLD[:, 0])
      logits_B2 = self._dense('nsp', pooled_BD, 2, output=True)
      extra |= dict(pooled=pooled_BD,
                    nsp_logits=logits_B2.astype(jnp.float32))
    # The head of masked words begins with a transform. Where the results of all
    # layers are kept, it transforms each; the last one is that of x_BLD.
    if 'readouts' in aux:
      readouts_NBLD = self.transform(aux['readouts'])
      hidden_BLD = readouts_NBLD[-1]
      aux = aux | {'readouts': readouts_NBLD}
    else:
      hidden_BLD = self.transform(x_BLD)
    head = Unembed(config.config_of_embedding, name='head')(table_DV)
    return Output(hidden=hidden_BLD, head=head, aux=aux, extra=extra)

  def _activation(self, network: str = '') -> Callable[[jax.Array], jax.Array]:
    """Returns the activation of a feed-forward network.

    Args:
      network: a name of FFNS; '': the network of the layers, which in a mixture
        is that of each expert.
    """
    config = self.config
    if not network:
      network = config.ffn
    if network == 'moe':
      network = config.part(MoEConfig).ffn
    return FFNS[network].act

  def _pool_first_token(self, first_BD: jax.Array) -> jax.Array:
    """Returns act(x W + b), [B, D], of the first token x of each row: BERT's
    pooler (Devlin et al. 2019)."""
    act = jnp.tanh
    if self.POOLER_ACT:
      act = FFNS[self.POOLER_ACT].act
    return act(self._dense('pooler', first_BD, self.config.d_model))

  def _dense(self, name: str, x: jax.Array, size: int, output: bool = False,
             bias: bool = True) -> jax.Array:
    """Declares the parameters of a dense layer and applies it, x W + b.

    Args:
      name: the name of W, which is [D, E]. That of b is `{name}_bias`.
      x: the input, [..., D].
      size: E, the number of outputs.
      output: whether the result is logits. Their number does not grow with the
        width of the model, which matters to how muP initialises W.
      bias: whether there is a b.

    Returns:
      The result, [..., E].
    """
    axis_of_outputs = None if output else 'features'
    w_DE = layers.weight(self, name, shape=(x.shape[-1], size),
                         axes=('embed', axis_of_outputs), output=output)
    y = layers.einsum('...D,DE->...E', x, w_DE, dtype=self.config.compute_dtype)
    if bias:
      b_E = layers.bias(self, f'{name}_bias', shape=(size,),
                        axes=(axis_of_outputs,), output=output)
      y = layers.add_bias(y, b_E)
    # muP divides logits by the width over that of its base.
    if output and self.config.widening != 1:
      y = y / self.config.widening
    return y


def _select_positions(output: Output, places_BM: jax.Array) -> Output:
  """Returns an output whose head reads M places of each row alone.

  Args:
    output: the output for all tokens.
    places_BM: the places, counted from the row's start.
  """
  hidden_BMD = jnp.take_along_axis(
      output.hidden, places_BM[..., None], 1, mode='clip')
  return output.replace(hidden=hidden_BMD)


def _replace_tokens(tokens_BL: jax.Array, places_BM: jax.Array,
                    new_BM: jax.Array) -> jax.Array:
  """Replaces the tokens at M places of each row.

  The suffixes name axes: B batch, L length, M places.

  Args:
    tokens_BL: the token ids.
    places_BM: the places, numbered from 0. A row with fewer places is filled up
      with numbers from L on, at which nothing is written.
    new_BM: the new token at each place.

  Returns:
    The token ids after the replacement, [B, L].
  """
  tokens_BL = jnp.asarray(tokens_BL)
  # The row numbers [B, 1] and the places [B, M] index together, and 'drop'
  # leaves out the places past the end.
  rows_B1 = jnp.arange(len(tokens_BL))[:, None]
  return tokens_BL.at[rows_B1, places_BM].set(new_BM, mode='drop')


class EncoderDecoder(nn.Module):
  """Source [B, M] and target [B, L] -> Output (Vaswani et al. 2017, figure 1).

  The encoder reads the source, every token seeing all; the decoder writes the
  target, a token seeing those before it and, by cross-attention, all of the
  encoder's output: the memory. One embedding serves both and, tied, the head.

  The target is what the decoder is shown: its output at l predicts target
  l + 1. To generate: `encode` once, `decode` the start with an empty cache
  and the memory, then token by token with the cache alone, which holds the
  keys and values of the memory from then on.

  DECODER_EMBED: the beginning of the names of the decoder's positions and norm
    of the embedding; '': they are the encoder's.
  STARTS_AFTER_END: whether a target starts after the token that ends texts, and
    not after that of padding.
  """
  STACK = 'encoder-decoder'
  REREADS = False
  DECODER_EMBED = ''
  STARTS_AFTER_END = False
  config: ModelConfig

  def setup(self):
    """Makes the parts of the model: an embedding that source and target share,
    the stacks of layers, and the head."""
    config = self.config
    self.embed = Embed(config)
    self.encoder = Stack(config,
                         config.sections(config.num_layers, causal=False))
    self.decoder = Stack(config,
                         config.sections(config.num_decoder_layers, cross=True))
    self.head = Unembed(config)

  def __call__(self, tokens_BM: Optional[jax.Array],
               decoder_tokens_BL: Optional[jax.Array] = None, *,
               segment_ids_BM: Optional[jax.Array] = None,
               decoder_positions_BL: Optional[jax.Array] = None,
               decoder_segment_ids_BL: Optional[jax.Array] = None,
               cache: Any = None, memory: Optional[jax.Array] = None,
               one_by_one: bool = False, **context_fields: Any) -> Output:
    """Runs the encoder and then the decoder, or only the decoder if the output
    of the encoder is known already.

    The suffixes name axes: B batch, M tokens of the source, L tokens of the
    target.

    Args:
      tokens_BM: the source; None if `memory` is given, or a cache that holds
        the memory.
      decoder_tokens_BL: the tokens that the decoder reads; None: the source.
      segment_ids_BM: the number of the document of each token of the source, 0
        on padding; None: each row is one document.
      decoder_positions_BL: the positions of the target's tokens; None: 0, 1, 2,
        ... With a cache, these are the places where they are written.
      decoder_segment_ids_BL: as segment_ids_BM, for the target.
      cache: the decoder's cache; see architectures.init_cache.
      memory: the encoder's output, if it is known.
      one_by_one: whether parameters and cache are those that `unstack_layers`
        returns.
      **context_fields: further fields of Context: deterministic; keep_layers
        and keep_attention, with which the encoder's layers come first in aux,
        and `readouts` are what the head would read of the decoder's.
    """
    aux = {}
    # The encoder runs unless its output is passed, or is in the cache already.
    if memory is None and tokens_BM is not None:
      memory, aux = self.encode(
          tokens_BM, segment_ids_BM=segment_ids_BM, **context_fields)
    if decoder_tokens_BL is None:
      decoder_tokens_BL = tokens_BM
    output = self.decode(
        decoder_tokens_BL, memory=memory,
        memory_segment_ids_BM=segment_ids_BM,
        positions_BL=decoder_positions_BL,
        segment_ids_BL=decoder_segment_ids_BL, cache=cache,
        one_by_one=one_by_one, **context_fields)
    return output.replace(aux=merge_reports_of_stacks(aux, output.aux))

  def encode(self, tokens_BM: jax.Array, *,
             segment_ids_BM: Optional[jax.Array] = None,
             **context_fields: Any) -> tuple[jax.Array, dict]:
    """Runs the encoder over the source.

    The suffixes name axes: B batch, M tokens of the source, D d_model.

    Args:
      tokens_BM: the tokens of the source.
      segment_ids_BM: the number of each token's document, 0 on padding; None:
        each row is one document.
      **context_fields: further fields of Context, such as deterministic.

    Returns:
      The memory, which the decoder attends to: the result of the last layer
      after the final norm, [B, M, D]. And what the layers report, by name (see
      Output.aux).
    """
    ctx = _make_context(tokens_BM, positions_BL=None,
                        segment_ids_BL=segment_ids_BM, **context_fields)
    x_BMD, _ = self.embed(tokens_BM, ctx.positions_BL,
                          deterministic=ctx.deterministic)
    memory_BMD, _, aux = self.encoder(x_BMD, ctx)
    return memory_BMD, aux

  def decode(self, tokens_BL: jax.Array, *, memory: Optional[jax.Array] = None,
             memory_segment_ids_BM: Optional[jax.Array] = None,
             positions_BL: Optional[jax.Array] = None,
             segment_ids_BL: Optional[jax.Array] = None, cache: Any = None,
             one_by_one: bool = False, **context_fields: Any) -> Output:
    """Runs the decoder over the target. After each token it predicts the next
    one.

    The suffixes name axes: B batch, M tokens of the source, L tokens of the
    target, D d_model.

    Args:
      tokens_BL: the tokens of the target.
      memory: the encoder's output, [B, M, D]; None if the cache already has its
        keys and values.
      memory_segment_ids_BM: the number of the document of each token of the
        source, 0 on padding; None: each row is one document.
      positions_BL: the positions of the target's tokens; None: 0, 1, 2, ...
      segment_ids_BL: as memory_segment_ids_BM, for the target.
      cache: the cache of the decoder; None: there is none.
      one_by_one: whether parameters and cache are those that `unstack_layers`
        returns.
      **context_fields: further fields of Context.

    Raises:
      RequestError: without a memory, or for segment ids with a cache.
    """
    # A cache that was once filled with a memory keeps its keys and values.
    has_memory = memory is not None
    if not has_memory and cache is not None:
      has_memory = find_cache_of_tokens(cache).memory_key_BMJK is not None
    require(has_memory, 'a decoder attends to a memory: pass the source, '
            '`memory`, or a cache that was filled with one')
    require(cache is None or segment_ids_BL is None,
            'a cache holds one target a row: pass no decoder segment ids')
    ctx = _make_context(
        tokens_BL, positions_BL=positions_BL, segment_ids_BL=segment_ids_BL,
        memory=Memory(x_BMD=memory, segment_ids_BM=memory_segment_ids_BM),
        **context_fields)
    x_BLD, table_DV = self.embed(tokens_BL, ctx.positions_BL,
                                 prefix=self.DECODER_EMBED,
                                 deterministic=ctx.deterministic)
    x_BLD, cache, aux = self.decoder(
        x_BLD, ctx, cache=cache, one_by_one=one_by_one)
    return Output(hidden=x_BLD, head=self.head(table_DV), cache=cache, aux=aux,
                  memory=memory)


def init_cache(config: ModelConfig, batch: int, length: int
               ) -> tuple[LayerCache, ...]:
  """Makes an empty cache for generating text with a model.

  The layers of a model are in up to three sections: a prefix, a pattern that is
  repeated, and a suffix. A repetition of the pattern is called a period.

  Args:
    config: the model.
    batch: the number of rows.
    length: for how many tokens each row has room.

  Returns:
    A cache for each layer of the prefix, of the pattern and of the suffix, in
    their order. Its arrays have an axis of periods in front, such as
    [periods, batch, length, heads, features], where the prefix and the suffix
    have 1 period. Layers that are run several times (model.loop) have
    passes * periods in its place.

  Raises:
    RequestError: if the model's learned positions do not reach `length`.
  """
  positions.check_length(config, length)
  entries = []
  for section in config.sections(config.num_decoder_layers):
    num_rows = section.runs
    for kind in section.kinds:
      layer = config.layer_config(kind.name)
      entries.append(
          blocks.empty_cache_of_layer(layer, (num_rows, batch, length)))
  return tuple(entries)


def unstack_layers(config: ModelConfig, params: Any, cache: Any
                   ) -> tuple[Any, list]:
  """Splits the parameters and the cache of a decoder, which are stacked over
  its layers, into arrays of single layers. A loop that generates text token by
  token calls the model with these and `one_by_one=True`, which is faster than a
  scan over the stacked arrays.

  A decoder has up to three sections: a prefix, a pattern of layers that is
  repeated, and a suffix. One repetition of the pattern is a period; a prefix or
  a suffix has one period. The arrays of a section have an axis in front: the
  parameters one of its periods, and the cache one of its runs, which are more
  than the periods where layers are run several times (model.loop).

  Args:
    config: the config of the model.
    params: the parameters of the model.
    cache: the cache of the model: the stacked cache of each layer of the
      prefix, of the pattern and of the suffix.

  Returns:
    The parameters, in which each section is a dict of its periods by their
    number as text; and a list with a tuple for each run of a period, in order,
    which has the cache of each of its layers.
  """
  decoder = dict(params['decoder'])
  stacked_caches = iter(cache)
  caches_of_runs: list[tuple[LayerCache, ...]] = []
  for section in config.sections(config.num_decoder_layers):
    weights_of_periods = _unstack_rows(
        decoder[section.name], section.periods)
    # The next caches are those of the layers of this section's pattern.
    caches_of_pattern = tuple(
        itertools.islice(stacked_caches, len(section.kinds)))
    caches_of_runs += _unstack_rows(caches_of_pattern, section.runs)
    decoder[section.name] = _name_and_copy_weights(weights_of_periods)
  if sharding.is_single_cpu():
    caches_of_runs = jax.tree.map(
        _reorder_if_cache, caches_of_runs, is_leaf=is_cache)
  return params | {'decoder': decoder}, caches_of_runs


def _name_and_copy_weights(weights_of_periods: list) -> dict[str, Any]:
  """Returns the weights of each period of layers, by its number as text.

  On CPU they are copied here, once, by a barrier. Otherwise XLA would slice
  them from the stacked arrays at every turn of a loop that reads them. On other
  platforms it reads them where they lie.

  Args:
    weights_of_periods: the weights of each period, slices of stacked arrays.
  """
  weights_by_number = {}
  for number, weights in enumerate(weights_of_periods):
    weights_by_number[str(number)] = weights
  return jax.lax.platform_dependent(
      weights_by_number, cpu=jax.lax.optimization_barrier, default=_identity)


def _unstack_rows(stacked: Any, num_rows: int) -> list:
  """Returns the rows of a tree of arrays [num_rows, ...], each a tree of its
  own. The tree may be empty: layers that read the keys of others cache none."""
  rows = []
  for i in range(num_rows):
    rows.append(jax.tree.map(operator.itemgetter(i), stacked))
  return rows


def _identity(tree: Any) -> Any:
  """Returns a tree as it is."""
  return tree


def _reorder_if_cache(x: Any) -> Any:
  """Returns a cache of keys and values with its axes in the order in which
  single tokens are multiplied with them, and anything else as it is."""
  if is_cache(x):
    return x.reorder_for_single_tokens()
  return x
