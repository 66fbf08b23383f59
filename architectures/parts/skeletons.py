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

from architectures.parts import blocks, heads, layers, positions, report
from architectures.parts import sharding, streams
from architectures.parts.cache import LayerCache
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context, Memory
from architectures.parts.heads import GeneratorConfig
from architectures.parts.layers import FFNS, norm
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.passes import project_concatenation
from architectures.parts.stack import add_distances, find_cache_of_tokens
from architectures.parts.stack import is_cache, Period, Stack
from common.errors import require, short
from common.kinds import SECTIONS


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
    require(self.head is not None, "a model whose model.head is not 'lm' has "
            "no logits of tokens: its scores are extra['scores']")
    return self.head.logits(self.hidden)


class Decoder(nn.Module):
  """A decoder-only model (GPT, LLaMA, ...).

  REREADS: whether a text that outgrows one of positions.lengths_apart while it
    is written is read again, as if all of it had been its prompt.
  """
  STACK = 'decoder'
  REREADS = False
  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BL: jax.Array, *,
               positions_BL: Optional[jax.Array] = None,
               segment_ids_BL: Optional[jax.Array] = None,
               cache: Any = None, one_by_one: bool = False,
               **how: Any) -> Output:
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
      one_by_one: whether parameters and cache are those that the function of
        that name returns.
      **how: further fields of Context: deterministic, keep_layers,
        keep_attention; `prefix_B`, the number of tokens at a row's start that
        see each other; `valid_BL`, 0 on padding where that is all a row's end:
        it is unseen, and takes no room of an expert; `lengths_B`, the number of
        tokens of each row, by which dynamic or longrope turn (default: L or,
        with a cache, up to the last of them).
    """
    c = self.config
    require(cache is None or segment_ids_BL is None,
            'a cache holds one document a row: pass no segment ids with it')
    ctx = _make_context(tokens_BL, positions_BL, segment_ids_BL, **how)
    # The embedding, the layers and the final norm.
    embed = Embed(c, name='embed')
    embedded_BLD, table_DV = embed(
        tokens_BL, ctx.positions_BL, deterministic=ctx.deterministic)
    stack = Stack(c, c.sections(c.num_layers), name='decoder')
    x_BLD, cache, aux = stack(embedded_BLD, ctx, cache, one_by_one)
    # The head: the next token's, or that of a task.
    if c.head != 'lm':
      return self._apply_task_head(x_BLD, ctx).replace(cache=cache, aux=aux)
    head = heads.Unembed(c, name='head')(table_DV)
    extra = {}
    shows_layers = ctx.keep_layers or ctx.keep_attention
    if c.mtp_depth and cache is None and not shows_layers:
      ahead = Mtp(c, name='mtp')
      extra['mtp'], reports = ahead(x_BLD, embedded_BLD, ctx)
      for each in reports:
        aux = report.add_losses(aux, each.losses, each.loads)
    return Output(hidden=x_BLD, head=head, cache=cache, aux=aux, extra=extra)

  def _apply_task_head(self, x_BLD: jax.Array, ctx: Context) -> Output:
    """Returns what the head of a task makes of the tokens, or of the last token
    of each row."""
    c = self.config
    kind = heads.HEADS[c.head]
    read = x_BLD
    if kind.is_for_rows:
      read = heads.pool_last_token(x_BLD, ctx.valid_BL, ctx.segment_ids_BL)
    if kind.has_logits_of_tokens:
      unfold = heads.Unfold(c, name='task')
      hidden_BLD, head = unfold(read, x_BLD.shape[1])
      return Output(hidden=hidden_BLD, head=head)
    task = heads.Task(c, bias=not kind.is_for_rows, name='task')
    scores = task(read, deterministic=ctx.deterministic)
    return Output(hidden=x_BLD, head=None, extra=dict(scores=scores))


class Embed(nn.Module):
  """The embedding of tokens, with all that is added to it."""
  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BL: jax.Array, positions_BL: jax.Array, *,
               type_ids_BL: Optional[jax.Array] = None, prefix: str = '',
               added: bool = False, deterministic: bool = True
               ) -> tuple[jax.Array, jax.Array]:
    """Returns the embedded tokens, [B, L, D], and the table as a [D, V] kernel
    for a tied head.

    Args:
      tokens_BL: the tokens.
      positions_BL: where they stand.
      type_ids_BL: which text of a pair each is of; None: all are of the first.
      prefix: the beginning of the names of the positions and of the norm.
      added: whether another table is added to that of the tokens, which then
        has no gradient.
      deterministic: whether nothing is dropped.
    """
    c = self.config
    # The tokens.
    table_VD = layers.embedding(self, 'tokens', c.vocab_size, 'vocab')
    if added:
      role = sharding.Role(('vocab', 'embed'), inputs=(0,), kind='embedding')
      table_VD = jax.lax.stop_gradient(table_VD) + sharding.declare(
          self, NAME_OF_ADDED_TABLE, nn.initializers.zeros, table_VD.shape,
          role)
    x_BLD = sharding.look_up_embeddings(table_VD, tokens_BL, c.compute_dtype)
    if c.embed_scale != 1:
      x_BLD = x_BLD * jnp.asarray(c.embed_scale, x_BLD.dtype)
    # Their positions, and which text of a pair they are of; T: the texts.
    add_positions = positions.position_of(c).embed
    if add_positions:
      x_BLD = add_positions(self, x_BLD, positions_BL, f'{prefix}positions')
    if c.type_vocab_size:
      types_TD = layers.embedding(self, 'types', c.type_vocab_size)
      if type_ids_BL is None:
        type_ids_BL = jnp.zeros((1, 1), jnp.int32)
      x_BLD = x_BLD + types_TD[type_ids_BL].astype(x_BLD.dtype)
    # Norm and dropout.
    if c.embed_norm:
      x_BLD = norm(c, f'{prefix}norm')(x_BLD)
    x_BLD = layers.Dropout(c.dropout)(x_BLD, deterministic=deterministic)
    return sharding.constrain_stream(x_BLD, 'embed'), table_VD.T


def _make_context(tokens_BL: jax.Array, positions_BL: Optional[jax.Array],
             segment_ids_BL: Optional[jax.Array], **how: Any) -> Context:
  """Returns the Context of some tokens, whose positions are 0..L-1 by default.
  Those that are passed with segment ids promise an order: see Decoder.

  Raises:
    RequestError: for a segment id in several pieces of a row, unless it is
      traced: see Decoder.
  """
  chex.assert_rank(tokens_BL, 2)
  is_traced = isinstance(segment_ids_BL, jax.core.Tracer)
  if segment_ids_BL is not None and not is_traced:
    _check_segments_are_contiguous(np.asarray(segment_ids_BL))
  in_order = positions_BL is None or segment_ids_BL is not None
  if positions_BL is None:
    positions_BL = jnp.arange(tokens_BL.shape[1])[None]
  return Context(positions_BL=positions_BL, segment_ids_BL=segment_ids_BL,
                 tokens_BL=tokens_BL, in_order=in_order, **how)


def _check_segments_are_contiguous(segment_ids_BL: np.ndarray) -> None:
  """Raises RequestError for an id in several pieces of a row."""
  for ids_L in segment_ids_BL:
    begins_L = np.diff(ids_L, prepend=0) != 0
    pieces = ids_L[(ids_L != 0) & begins_L]  # the id of each
    require(len(np.unique(pieces)) == len(pieces), 'a row of segment ids, or '
            f'of a mask, is {short(ids_L.tolist())}: each id but 0, which is '
            'padding, lies in one piece')


class Mtp(nn.Module):
  """Modules that predict tokens further ahead (DeepSeek-AI 2024b, arXiv
  2412.19437, section 2.2): the one of depth k, for the token at place i,

    h'_i = M [n(e_(i+k)); n(h_i)],   h_i^k = layer(h'_1 ... h'_i)

  where e is the embedding, h what the head reads of the model, or of the module
  of depth k - 1, and the layer is one more of the last kind. The head, which is
  the model's, reads of h_i^k, after a norm, the token at place i + k + 1.
  """
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, embedded_BLD: jax.Array, ctx: Context
               ) -> tuple[tuple[jax.Array, ...], list[report.Report]]:
    """Returns what the head reads of the module of each depth, [B, L, D], and
    the reports of their layers. The last k places of depth k hold nothing: no
    token follows them.

    Args:
      x_BLD: what the head reads of the model.
      embedded_BLD: the embedding of the tokens.
      ctx: the context of the model.
    """
    c = self.config
    kind = c.layer_kinds(c.num_layers)[-1]
    hidden, reports = [], []
    for depth in range(1, c.mtp_depth + 1):
      ctx_k = ctx.replace(tokens_BL=jnp.roll(ctx.tokens_BL, -depth, 1),
                          routed_BL=_mark_tokens_with_successor(ctx, depth))
      # Each place is joined with the embedding of the token `depth` places on.
      ahead_BLD = jnp.roll(embedded_BLD, -depth, 1)
      joined_BLD = project_concatenation(
          self, f'join_{depth}', norm(c, f'token_norm_{depth}')(ahead_BLD),
          norm(c, f'hidden_norm_{depth}')(x_BLD))
      # One more layer, as a stack of its own.
      x = streams.begin_streams(c, streams.pin_residual(joined_BLD),
                                blocks.count_branches(c, (kind,)))
      ctx_k = add_distances(c, kind, ctx_k, ctx.positions_BL, f'_{depth}')
      period = Period(c, (kind,), name=f'depth_{depth}')
      (x, _), results = period((x, None), None, ctx_k, {})
      x_BLD = streams.EndOfStreams(c, name=f'streams_{depth}')(x)
      if blocks.BLOCKS[c.of_kind(kind.name).block].FINAL_NORM:
        x_BLD = norm(c, f'norm_{depth}')(x_BLD)
      hidden.append(x_BLD)
      reports += results.reports
    return tuple(hidden), reports


def _mark_tokens_with_successor(ctx: Context, depth: int) -> jax.Array:
  """Returns [B, L], 1 for tokens that have another one `depth` places on in the
  same document, and 0 for the others, which join two texts and take no expert.
  """
  B, L = ctx.tokens_BL.shape
  there_BL = jnp.broadcast_to(jnp.arange(L)[None] < L - depth, (B, L))
  if ctx.segment_ids_BL is not None:
    ids_BL = ctx.segment_ids_BL
    there_BL &= ids_BL == jnp.roll(ids_BL, -depth, 1)
  if ctx.valid_BL is not None:
    there_BL &= jnp.roll(ctx.valid_BL, -depth, 1) != 0
  return there_BL.astype(jnp.int32)


# An encoder that tells replaced tokens (model.head 'replaced', heads.py).
# what a generator has of its own in `embed` begins so
PREFIX_OF_GENERATOR = 'generator_'
# the encoder's own part of the table of tokens
NAME_OF_ADDED_TABLE = 'tokens_added'


def config_of_generator(c: ModelConfig) -> ModelConfig:
  """Returns the config of the network that replaces tokens."""
  fields = c.part(GeneratorConfig)
  head_dim = fields.d_model // fields.num_heads
  embed_width = c.config_of_embedding.d_model
  return dataclasses.replace(
      c.without_part(GeneratorConfig), head='lm', next_sentence=False,
      d_model=fields.d_model, num_layers=fields.num_layers,
      num_decoder_layers=fields.num_layers, d_ff=fields.d_ff,
      num_heads=fields.num_heads, num_kv_heads=fields.num_heads,
      head_dim=head_dim, attention_scale=head_dim ** -0.5,
      embed_dim=embed_width if embed_width != fields.d_model else 0)


class Encoder(nn.Module):
  """An encoder, whose tokens all see each other, as BERT's and those that came
  after it. A page says how its pre-training reads the last layer and, with
  `scored`, what a task's head is applied to.

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
               **how: Any) -> Output:
    """Runs the model.

    Args:
      tokens_BL: the tokens.
      type_ids_BL: which text of a pair each is of.
      positions_BL: where they stand; default: 0..L-1.
      segment_ids_BL: an id for each document, 0 on padding; as a Decoder's.
      places_BM: the places of the masked words, for a generator to fill; one
        past the row's end is none.
      embedded: what Embed returned already.
      **how: further fields of Context.

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
    c = self.config
    ctx = _make_context(tokens_BL, positions_BL, segment_ids_BL, **how)
    embed = functools.partial(
  Embed(
    c.config_of_embedding,
    name='embed'),
    positions_BL=ctx.positions_BL,
    type_ids_BL=type_ids_BL,
     deterministic=ctx.deterministic)
    # With a generator, the encoder reads what that puts at the masked places.
    generated, drawn = None, {}
    drawn_by = c.find(GeneratorConfig)
    own_table = False
    if drawn_by is not None and drawn_by.num_layers > 0:
      own_table = drawn_by.sharing == 'apart'
      network = type(self)(config_of_generator(c), name='generator')
      generated = network(
  tokens_BL,
  positions_BL=positions_BL,
  segment_ids_BL=segment_ids_BL,
  deterministic=ctx.deterministic,
  embedded=embed(
    tokens_BL,
     prefix=PREFIX_OF_GENERATOR if own_table else ''))
      if places_BM is not None:
        generated = _select_positions(generated, places_BM)
        drawn_BM = self._draw_tokens(generated, ctx.deterministic)
        tokens_BL = _replace_tokens(tokens_BL, places_BM, drawn_BM)
        drawn = dict(drawn=drawn_BM)
    # The embedding, the layers and the final norm.
    if embedded is None:
      embedded = embed(tokens_BL, added=own_table)
    x_BLD, table_DV = embedded
    if c.embed_dim:
      x_BLD = self._dense('widen', x_BLD, c.d_model)
      x_BLD = sharding.constrain_stream(x_BLD, 'embed')
    stack = Stack(c, c.sections(c.num_layers, causal=False), name='encoder')
    x_BLD, _, aux = stack(x_BLD, ctx)
    # The head: that of masked words, or that of a task.
    if c.head == 'lm':
      return self._apply_pretraining_head(x_BLD, table_DV, aux)
    output = self._apply_task_head(x_BLD, segment_ids_BL, ctx.deterministic)
    if generated is not None:
      output = generated.replace(extra=output.extra | drawn)
    return output.replace(aux=aux)

  def _draw_tokens(self, generated: Output, deterministic: bool) -> jax.Array:
    """Returns a token for each place, [B, M], drawn as likely as the generator
    has it, one place after the other, so that no logits [B, M, V] are held.
    Where nothing is dropped the draws are always the same."""
    key = jax.random.key(0) if deterministic else self.make_rng('dropout')
    hidden_BMD, head = jax.lax.stop_gradient(
        (generated.hidden, generated.head))

    def draw(at_place: tuple[jax.Array, jax.Array]) -> jax.Array:
      """Returns a token for the same place of each row, [B]."""
      key, hidden_BD = at_place
      return jax.random.categorical(key, head.logits(hidden_BD))

    keys_M = jax.random.split(key, hidden_BMD.shape[1])
    hidden_MBD = jnp.moveaxis(hidden_BMD, 1, 0)
    drawn_MB = jax.lax.map(draw, (keys_M, hidden_MBD))
    return drawn_MB.T.astype(jnp.int32)

  def _apply_task_head(self,
  x_BLD: jax.Array,
  segment_ids_BL: Optional[jax.Array],
   deterministic: bool) -> Output:
    """Returns what the head of a task makes of the last layer."""
    c = self.config
    kind = heads.HEADS[c.head]
    extra = dict(hidden=x_BLD)
    if kind.has_logits_of_tokens:
      last_BD = heads.pool_last_token(x_BLD, None, segment_ids_BL)
      unfold = heads.Unfold(c, name='task')
      hidden_BLD, head = unfold(last_BD, x_BLD.shape[1])
      return Output(hidden=hidden_BLD, head=head, extra=extra)
    x = x_BLD
    if kind.is_for_rows:
      x = heads.POOLINGS[c.pooling](x_BLD, segment_ids_BL)
    read, more = self.input_of_task_head(x, kind.is_for_rows)
    if kind.has_detector:
      read = self._activation()(self._dense('detector', read, c.d_model))
    task = heads.Task(c, name='task')
    scores = task(read, deterministic=deterministic)
    return Output(hidden=x_BLD, head=None,
                  extra=extra | dict(scores=scores) | more)

  def input_of_task_head(self, x: jax.Array, of_row: bool
             ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns what the head of a task is applied to, and what else belongs
    into `extra`.

    Args:
      x: a vector of each row, [B, D], or the tokens, [B, L, D].
      of_row: which of them it is.
    """
    if not of_row:
      return x, {}
    pooled_BD = self._pool_first_token(x)
    return pooled_BD, dict(pooled=pooled_BD)

  def transform(self, x: jax.Array) -> jax.Array:
    """Returns what the head of masked words reads: n(act(x W + b)), [..., D],
    or as wide as the embedding."""
    c = self.config
    act = self._activation(self.HEAD_ACT)
    y = self._dense(
  'transform',
  x,
  c.config_of_embedding.d_model,
   bias=self.HEAD_BIAS)
    return norm(c, 'transform_norm')(act(y))

  def _apply_pretraining_head(
  self,
  x_BLD: jax.Array,
  table_DV: jax.Array,
   aux: dict ) -> Output:
    """Returns the logits of masked words and, where the model has a head for
    them, of next sentences."""
    c = self.config
    extra = dict(hidden=x_BLD)
    if c.next_sentence:
      pooled_BD = self._pool_first_token(x_BLD[:, 0])
      logits_B2 = self._dense('nsp', pooled_BD, 2, output=True)
      extra |= dict(pooled=pooled_BD,
                    nsp_logits=logits_B2.astype(jnp.float32))
    # Where the layers are kept, the head reads every one of them.
    if 'readouts' in aux:
      readouts_NBLD = self.transform(aux['readouts'])
      hidden_BLD = readouts_NBLD[-1]
      aux = aux | {'readouts': readouts_NBLD}
    else:
      hidden_BLD = self.transform(x_BLD)
    head = heads.Unembed(c.config_of_embedding, name='head')(table_DV)
    return Output(hidden=hidden_BLD, head=head, aux=aux, extra=extra)

  def _activation(self, name: str = '') -> Callable[[jax.Array], jax.Array]:
    """Returns the activation of a network of FFNS; '': of that of the layers.
    """
    c = self.config
    if not name:
      name = c.part(MoEConfig).ffn if c.ffn == 'moe' else c.ffn
    return FFNS[name].act

  def _pool_first_token(self, x_BD: jax.Array) -> jax.Array:
    """Returns act(x W + b), [B, D]."""
    act = FFNS[self.POOLER_ACT].act if self.POOLER_ACT else jnp.tanh
    return act(self._dense('pooler', x_BD, self.config.d_model))

  def _dense(self, name: str, x: jax.Array, size: int, output: bool = False,
             bias: bool = True) -> jax.Array:
    """Returns x W + b, [..., size], with the parameters `name` and
    `{name}_bias`; E are the outputs."""
    w_DE = layers.weight(self, name, (x.shape[-1], size), ('embed', None),
                         output=output)
    y = layers.einsum('...D,DE->...E', x, w_DE, self.config.compute_dtype)
    if not bias:
      return y
    b_E = layers.bias(self, f'{name}_bias', (size,), (None,), output=output)
    return layers.add_bias(y, b_E)


def _select_positions(output: Output, places_BM: jax.Array) -> Output:
  """Returns an output with what the head reads at some places of each row."""
  hidden_BMD = jnp.take_along_axis(
      output.hidden, places_BM[..., None], 1, mode='clip')
  return output.replace(hidden=hidden_BMD)


def _replace_tokens(
  tokens_BL: jax.Array,
  places_BM: jax.Array,
   new_BM: jax.Array ) -> jax.Array:
  """Returns the tokens with new ones at some places of each row; a place past
  the row's end is none."""
  tokens_BL = jnp.asarray(tokens_BL)
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
    c = self.config
    self.embed = Embed(c)
    self.encoder = Stack(c, c.sections(c.num_layers, causal=False))
    self.decoder = Stack(c, c.sections(c.num_decoder_layers, cross=True))
    self.head = heads.Unembed(c)

  def __call__(self, tokens_BM: Optional[jax.Array],
               decoder_tokens_BL: Optional[jax.Array] = None, *,
               segment_ids_BM: Optional[jax.Array] = None,
               decoder_positions_BL: Optional[jax.Array] = None,
               decoder_segment_ids_BL: Optional[jax.Array] = None,
               cache: Any = None, memory: Optional[jax.Array] = None,
               one_by_one: bool = False, **how: Any) -> Output:
    """Runs both stacks, or the decoder alone.

    Args:
      tokens_BM: the source; None with `memory` or a cache that holds it.
      decoder_tokens_BL: the tokens that the decoder is shown; default: the
        source.
      segment_ids_BM: 0 where the source is padding; as a Decoder's.
      decoder_positions_BL: where the target's tokens stand; default: 0..L-1;
        with a cache, where they go.
      decoder_segment_ids_BL: 0 where the target is padding; as a Decoder's.
      cache: the decoder's cache; see architectures.init_cache.
      memory: the encoder's output, where it is known.
      one_by_one: whether parameters and cache are those that the function of
        that name returns.
      **how: further fields of Context: deterministic; keep_layers and
        keep_attention, with which the encoder's layers come first in aux, and
        `readouts` are what the head would read of the decoder's.
    """
    aux = {}
    if memory is None and tokens_BM is not None:
      memory, aux = self.encode(tokens_BM, segment_ids_BM=segment_ids_BM, **how)
    if decoder_tokens_BL is None:
      decoder_tokens_BL = tokens_BM
    output = self.decode(
        decoder_tokens_BL, memory=memory,
        memory_segment_ids_BM=segment_ids_BM,
        positions_BL=decoder_positions_BL,
        segment_ids_BL=decoder_segment_ids_BL, cache=cache,
        one_by_one=one_by_one, **how)
    return output.replace(aux=report.merge_reports_of_stacks(aux, output.aux))

  def encode(self, tokens_BM: jax.Array, *,
             segment_ids_BM: Optional[jax.Array] = None, **how: Any
             ) -> tuple[jax.Array, dict]:
    """Returns the memory [B, M, D] and what the encoder's layers report."""
    ctx = _make_context(tokens_BM, None, segment_ids_BM, **how)
    x_BMD, _ = self.embed(tokens_BM, ctx.positions_BL,
                          deterministic=ctx.deterministic)
    memory_BMD, _, aux = self.encoder(x_BMD, ctx)
    return memory_BMD, aux

  def decode(self, tokens_BL: jax.Array, *, memory: Optional[jax.Array] = None,
             memory_segment_ids_BM: Optional[jax.Array] = None,
             positions_BL: Optional[jax.Array] = None,
             segment_ids_BL: Optional[jax.Array] = None, cache: Any = None,
             one_by_one: bool = False, **how: Any) -> Output:
    """Returns what follows each target token; `memory` may be left out where
    the cache has been given it."""
    has_memory = memory is not None
    if not has_memory and cache is not None:
      has_memory = find_cache_of_tokens(cache).memory_key_BMJK is not None
    require(has_memory, 'a decoder attends to a memory: pass the source, '
            '`memory`, or a cache that was filled with one')
    require(cache is None or segment_ids_BL is None,
            'a cache holds one target a row: pass no decoder segment ids')
    ctx = _make_context(
        tokens_BL, positions_BL, segment_ids_BL,
        memory=Memory(x_BMD=memory, segment_ids_BM=memory_segment_ids_BM),
        **how)
    x_BLD, table_DV = self.embed(tokens_BL, ctx.positions_BL,
                                 prefix=self.DECODER_EMBED,
                                 deterministic=ctx.deterministic)
    x_BLD, cache, aux = self.decoder(x_BLD, ctx, cache, one_by_one)
    return Output(hidden=x_BLD, head=self.head(table_DV), cache=cache, aux=aux,
                  memory=memory)


def init_cache(config: ModelConfig, batch: int, length: int
               ) -> tuple[LayerCache, ...]:
  """Returns an empty cache for `length` tokens a row: one entry a layer of the
  prefix or the suffix, [1, B, M, J, K], and a block of the period,
  [N / period, B, M, J, K], in their order; of layers that loop, those of each
  pass.

  Raises:
    ValueError: where learned positions do not reach `length`.
  """
  positions.check_length(config, length)
  entries = []
  for section in config.sections(config.num_decoder_layers):
    rows = section.periods * section.passes
    for kind in section.kinds:
      layer = config.of_kind(kind.name)
      entries.append(blocks.empty_cache_of_layer(layer, (rows, batch, length)))
  return tuple(entries)


def unstack_layers(params: Any, cache: Any) -> tuple[Any, list]:
  """Returns what a loop over single tokens takes instead of both arguments,
  with `one_by_one=True` in each call of the model: the decoder's layers apart,
  and a list of their slots, of the prefix, each period and the suffix.

  On CPU these are copies of the layers' weights, made once: XLA would make
  them at every turn of the loop. Elsewhere it reads them where they lie.
  """
  decoder = params['decoder']
  entries = iter(cache)
  apart, slots = {}, []
  for name in SECTIONS:
    if name not in decoder:
      continue
    weights = _unstack_rows(decoder[name])
    slots += _unstack_rows(tuple(itertools.islice(entries, len(decoder[name]))))
    by_row = {str(i): row for i, row in enumerate(weights)}
    apart[name] = jax.lax.platform_dependent(
        by_row, cpu=jax.lax.optimization_barrier, default=_identity)
  if sharding.is_single_cpu():
    slots = jax.tree.map(_reorder_if_cache, slots, is_leaf=is_cache)
  return params | {'decoder': decoder | apart}, slots


def _unstack_rows(stacked: Any) -> list:
  """Returns the trees of each row of a tree of arrays [rows, ...]."""
  count = jax.tree.leaves(stacked)[0].shape[0]
  return [jax.tree.map(operator.itemgetter(i), stacked) for i in range(count)]


def _identity(tree: Any) -> Any:
  return tree


def _reorder_if_cache(x: Any) -> Any:
  """Returns a cache in the order of axes of single tokens, and others as they
  are."""
  return x.reorder_for_single_tokens() if is_cache(x) else x
