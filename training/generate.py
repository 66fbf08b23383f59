"""Text from a model: the prompt in one pass, then one while_loop of steps.

Prompts of different lengths stand in one batch, padded on the right: a cache's
slot is its token's position, so a row goes on where its own prompt ends, and
overwrites the padding's slots before it can see them; a state is told which
tokens are padding. Experts have no capacity here, and where positions turn by
the length of a row, each row's is its own so far: so a row's text depends
neither on the others nor on how many tokens may follow.

`generate` draws each token, `beam_search` finds the likeliest texts of those
that a few beams come upon, and `generate_by_unmasking` fills masks in.

Each step of the search extends every running text by every token and keeps the
K best of those that go on. A text that ends is finished if it is among the K
best of all, and the K finished texts with the best scores are kept. The score
of a text is its log-probability over a penalty of its length, so that a short
text is not better for being short. The loop is that of transformers' `generate`
with num_beams: token for token the same. A row is done when its best running
text, were it to end now, would not beat the worst finished one.

Masked diffusion (LLaDA: Nie et al. 2025, arXiv 2502.09992, algorithm 5, with
its low-confidence remasking) begins with a prompt and N masks. In each of S
steps the model fills every mask; after step s the floor(N s / S) fillings of
which it is surest stay, and the others are masked again. A filling that has
stayed once is never taken back. Block diffusion does so for one block of tokens
after another.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple, Optional

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import blocks, positions
from architectures.parts.cache import Cache
from architectures.parts.moe.layer import without_capacity
from architectures.parts.skeletons import embed_predictions, unstack_layers
from common.errors import check_choice
from common.fields import check_number

# A step runs up to this many layers one by one, which is faster; a deeper stack
# is scanned, since the program would grow with it.
UNROLLED_LAYERS = 48


# By how sure the model is, places are ranked. A probability lies between these
# numbers, those of tokens that are known already and of places outside of what
# is to be written.
SURENESS_OF_KNOWN_TOKENS = 2.0
SURENESS_OF_OTHER_PLACES = -1.0


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn.

  Attributes:
    temperature: the divisor of the logits; 0 takes the likeliest token
      (greedy).
    top_k: draw among the k likeliest tokens only; 0: among all.
    top_p: draw among the likeliest tokens that together reach p only (nucleus
      sampling, Holtzman et al. 2020); 1: among all.
    min_p: draw among the tokens that are at least min_p times as likely as the
      likeliest only (Nguyen et al. 2024); 0: among all.
    repetition_penalty: the logit of a token that the text has already, prompt
      included, is divided by it where it is positive and multiplied where it
      is not (Keskar et al. 2019, section 4.1); 1: none.
  """
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0

  def __post_init__(self):
    check_number('temperature', value=self.temperature, bounds=[('>=', 0)])
    check_number('top_k', value=self.top_k, bounds=[('>=', 0)])
    check_number('top_p', value=self.top_p, bounds=[('>', 0), ('<=', 1)])
    check_number('min_p', value=self.min_p, bounds=[('>=', 0), ('<=', 1)])
    check_number('repetition_penalty', value=self.repetition_penalty,
                 bounds=[('>', 0)])

  @property
  def needs_seen_tokens(self) -> bool:
    """Whether a draw depends on which tokens the text has already."""
    return self.repetition_penalty != 1

  def __call__(self, logits_BV: jax.Array, key: jax.Array,
               seen_BV: jax.Array | None = None) -> jax.Array:
    """Draws the next token of each row. With temperature 0 it is the likeliest
    one.

    Args:
      logits_BV: the logits of the next token, for B rows and the vocabulary V.
      key: the random key of the draw.
      seen_BV: bool [B, V], which tokens each row has already. It is needed only
        if `needs_seen_tokens` is true, to make these tokens less likely.

    Returns:
      The tokens, int [B].
    """
    if self.needs_seen_tokens:
      assert seen_BV is not None
      logits_BV = self.penalize(logits_BV, seen_BV)
    if self.temperature == 0:
      return logits_BV.argmax(-1)
    return jax.random.categorical(key, self.mask_unlikely(logits_BV))

  def penalize(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
    """Returns the logits with the repetition penalty: lower for each token that
    its row has already (seen_BV, bool)."""
    penalty = self.repetition_penalty
    lower_BV = jnp.where(logits_BV < 0, logits_BV * penalty,
                         logits_BV / penalty)
    return jnp.where(seen_BV, lower_BV, logits_BV)

  def mask_unlikely(self, logits_BV: jax.Array) -> jax.Array:
    """Divides logits by the temperature, and sets those of unlikely tokens to
    -inf (top_k, top_p and min_p).

    The three filters apply in this order. top_p and min_p use probabilities
    that are normalised over the tokens that earlier filters have left. Where
    tokens are equally likely, a filter keeps all of them or none.

    Args:
      logits_BV: the logits of the next token, [B, V]: B rows, V tokens of the
        vocabulary.
    """
    logits_BV = logits_BV / self.temperature
    # top_k: keep the k likeliest tokens, whose logits are largest_BK.
    if self.top_k:
      k = min(self.top_k, logits_BV.shape[-1])
      largest_BK, _ = jax.lax.top_k(logits_BV, k)
      least_B1 = largest_BK[:, -1:]
      logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    # top_p: keep the likeliest tokens that together reach the probability
    # top_p.
    if self.top_p < 1:
      sorted_BV = jnp.sort(logits_BV, -1, descending=True)
      probs_BV = jax.nn.softmax(sorted_BV, -1)
      # A token is kept if the likelier ones together have not reached top_p.
      probs_before_BV = jnp.cumsum(probs_BV, -1) - probs_BV
      is_kept_BV = probs_before_BV < self.top_p
      kept_logits_BV = jnp.where(is_kept_BV, sorted_BV, jnp.inf)
      # Find the least logit that is kept. The others are +inf in this minimum.
      least_B1 = kept_logits_BV.min(-1, keepdims=True)
      logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    # min_p: keep the tokens that are at least min_p times as likely as the
    # likeliest one.
    if self.min_p:
      probs_BV = jax.nn.softmax(logits_BV, -1)
      least_prob_B1 = self.min_p * probs_BV.max(-1, keepdims=True)
      logits_BV = jnp.where(probs_BV < least_prob_B1, -jnp.inf, logits_BV)
    return logits_BV


class WritingState(NamedTuple):
  """The state that goes from token to token while B texts are written.

  Attributes:
    t: the number of new tokens so far.
    new_tokens_BT: the new tokens of each row, with room for T. Those from t on
      are filled with the token that ends a text.
    is_done_B: bool, which rows have ended.
    cache: the cache of the model, which has read all new tokens but the last.
    seen_BV: bool, which tokens of the vocabulary each row has already; None:
      the draws do not depend on it.
  """
  t: jax.Array
  new_tokens_BT: jax.Array
  is_done_B: jax.Array
  cache: Any
  seen_BV: jax.Array | None


@dataclasses.dataclass(frozen=True)
class TokenWriter:
  """Writes texts token by token, one text in each row.

  Attributes:
    reader: the model with the prompts, which reads the new tokens.
    sampling: the way to draw a token from logits.
    key: the random key of all draws.
    stop_tokens: the tokens that end a text; (): none does.
    rows_B: the numbers of the rows, 0 to B - 1.
  """
  reader: 'TokenReader'
  sampling: Sampling
  key: jax.Array
  stop_tokens: tuple[int, ...]
  rows_B: jax.Array

  def draw_token(self, logits_BV: jax.Array, t: jax.Array | int,
                 seen_BV: jax.Array | None
                 ) -> tuple[jax.Array, jax.Array | None]:
    """Draws new token t of each row.

    The suffixes name axes: B rows of the batch, V tokens in the vocabulary.

    Args:
      logits_BV: the logits of the token.
      t: the index of the token. Each has a random key of its own.
      seen_BV: bool, which tokens each row has already; None: the draws do not
        depend on it.

    Returns:
      The token of each row, int32 [B]; and seen_BV with these tokens.
    """
    key_of_token = jax.random.fold_in(self.key, t)
    token_B = self.sampling(logits_BV, key_of_token, seen_BV).astype(jnp.int32)
    if seen_BV is not None:
      seen_BV = seen_BV.at[self.rows_B, token_B].set(True)
    return token_B, seen_BV

  def ends_text(self, token_B: jax.Array) -> jax.Array:
    """Returns whether each token is one that ends a text, bool [B]."""
    return jnp.isin(token_B, jnp.array(self.stop_tokens, jnp.int32))

  def is_unfinished(self, state: WritingState) -> jax.Array:
    """Returns whether there is room for a token, and a row that goes on."""
    has_room = state.t < state.new_tokens_BT.shape[1]
    return has_room & ~jnp.all(state.is_done_B)

  def add_token(self, state: WritingState) -> WritingState:
    """Lets the model read the last token, and draws the next one of each row.

    The suffixes name axes: B rows of the batch, T places for new tokens, V
    tokens in the vocabulary.

    Args:
      state: the state with t >= 1 new tokens in each row.

    Returns:
      The state with t + 1 new tokens.
    """
    num_written = state.t
    logits_BV, cache = self.reader(
        state.cache, new_BT=state.new_tokens_BT, t=num_written)
    token_B, seen_BV = self.draw_token(
        logits_BV, t=num_written, seen_BV=state.seen_BV)

    # A row that has ended is filled up with the first token that ends a text,
    # until all rows have ended.
    is_done_B = state.is_done_B
    if self.stop_tokens:
      token_B = jnp.where(is_done_B, self.stop_tokens[0], token_B)
      is_done_B |= self.ends_text(token_B)
    new_tokens_BT = state.new_tokens_BT.at[:, num_written].set(token_B)
    return WritingState(t=num_written + 1, new_tokens_BT=new_tokens_BT,
                        is_done_B=is_done_B, cache=cache, seen_BV=seen_BV)


@functools.partial(jax.jit, static_argnames=(
    'module', 'max_new_tokens', 'sampling', 'stop_token'))
def generate(module: nn.Module, params: Any, prompts_BL: jax.Array,
             lengths_B: jax.Array, key: jax.Array, *, max_new_tokens: int,
             sampling: Sampling = Sampling(),
             stop_token: int | tuple[int, ...] | None = None,
             **inputs: Any) -> jax.Array:
  """Continues each prompt by up to `max_new_tokens` tokens.

  Args:
    module: a model that writes: a decoder, or an encoder-decoder.
    params: its parameters, a tree of arrays.
    prompts_BL: the prompts' tokens, padded on the right.
    lengths_B: the number of tokens of each prompt, at least 1.
    key: the key of the draws.
    max_new_tokens: T, the number of new tokens.
    sampling: the way to draw a token from logits: temperature, top_k and so on.
    stop_token: the token that ends a row, or several. A row that has drawn one
      is filled up to the end with the first of them.
    **inputs: source_BM, source_lengths_B and prefix_B of `read_prompts`.

  Returns:
    [B, T] new tokens.

  Raises:
    ValueError: where learned positions do not reach L + T.
  """
  chex.assert_rank([prompts_BL, lengths_B], [2, 1])
  B = len(prompts_BL)
  module = module.clone(config=without_capacity(module.config))

  # Read the prompts.
  rows_B = jnp.arange(B)
  logits_BV, cache, reader = read_prompts(
      module, params=params, prompts_BL=prompts_BL, lengths_B=lengths_B,
      room=max_new_tokens, **inputs)
  seen_BV = None
  if sampling.needs_seen_tokens:
    seen_BV = _tokens_of_prompts(prompts_BL, lengths_B, rows_B=rows_B,
                                 vocab_size=module.config.vocab_size)

  # The first token, from what the prompts predict.
  writer = TokenWriter(reader=reader, sampling=sampling, key=key,
                       stop_tokens=as_stop_tokens(stop_token), rows_B=rows_B)
  first_token_B, seen_BV = writer.draw_token(logits_BV, 0, seen_BV)
  new_tokens_BT = jnp.zeros((B, max_new_tokens), jnp.int32)
  if writer.stop_tokens:  # a row that ends early is filled up with the first
    new_tokens_BT = new_tokens_BT.at[:, 1:].set(writer.stop_tokens[0])
  new_tokens_BT = new_tokens_BT.at[:, 0].set(first_token_B)
  is_done_B = writer.ends_text(first_token_B)

  # The others, until every row is done.
  state = WritingState(
      t=jnp.ones((), jnp.int32), new_tokens_BT=new_tokens_BT,
      is_done_B=is_done_B, cache=cache, seen_BV=seen_BV)
  state = jax.lax.while_loop(writer.is_unfinished, writer.add_token, state)
  return state.new_tokens_BT


def _tokens_of_prompts(prompts_BL: jax.Array, lengths_B: jax.Array,
                       rows_B: jax.Array, vocab_size: int) -> jax.Array:
  """Returns which tokens of the vocabulary stand in each prompt, bool [B, V].

  Args:
    prompts_BL: the prompts' tokens, padded on the right.
    lengths_B: the number of tokens of each prompt.
    rows_B: the numbers of the rows, 0 to B - 1.
    vocab_size: V.
  """
  B, L = prompts_BL.shape
  is_prompt_BL = jnp.arange(L)[None] < lengths_B[:, None]
  # Padding stands for token V, which does not exist and is dropped.
  ids_BL = jnp.where(is_prompt_BL, prompts_BL, vocab_size)
  none_BV = jnp.zeros((B, vocab_size), bool)
  return none_BV.at[rows_B[:, None], ids_BL].set(True, mode='drop')


def read_prompts(module: nn.Module, params: Any, prompts_BL: jax.Array,
                 lengths_B: jax.Array, room: int, *,
                 source_BM: Optional[jax.Array] = None,
                 source_lengths_B: Optional[jax.Array] = None,
                 prefix_B: Optional[jax.Array] = None, copies: int = 1
                 ) -> tuple[jax.Array, Any, 'TokenReader']:
  """Reads the prompts into a new cache, and returns what is needed to continue
  them: the logits of the first new token, and the reader of further ones.

  Args:
    module, params, prompts_BL, lengths_B: those of `generate`.
    room: the number of new tokens that the cache has room for.
    source_BM: the tokens that an encoder-decoder reads, padded on the right.
      They are encoded once; the prompts are the beginnings of the targets.
    source_lengths_B: the number of tokens of each source.
    prefix_B: for a decoder, how many tokens of each prompt see each other, at
      most all of them (a prefix LM: its whole prompt); None: none.
    copies: the number of texts that follow each prompt; they have rows of their
      own.

  Returns:
    The logits of the first new token, [B, V]; the cache; and the TokenReader,
    which lets the model read the new tokens. The cache and the reader have B
    times `copies` rows.
  """
  # Read the prompts; the last token of each gives the first new token.
  B, L = prompts_BL.shape
  cache = architectures.init_cache(module.config, B, L + room)
  if source_BM is None:
    inputs = _inputs_of_decoder(
        module, prompts_BL=prompts_BL, lengths_B=lengths_B, prefix_B=prefix_B)
  else:
    assert source_lengths_B is not None, 'a source comes with its lengths'
    inputs = _inputs_of_encoder_decoder(
        module, params=params, source_BM=source_BM,
        source_lengths_B=source_lengths_B)
  apply: Callable[..., Any] = module.apply
  output = apply({'params': params}, *inputs.source_argument, prompts_BL,
                 cache=cache, lengths_B=lengths_B, **inputs.of_each_step,
                 **inputs.of_prompts)
  last_B11 = (lengths_B - 1)[:, None, None]
  last_B1D = jnp.take_along_axis(output.hidden, last_B11, axis=1)
  assert output.head is not None  # each objective with a prompt trains a head
  logits_BV = output.head.logits(last_B1D)[:, 0]

  # The steps after this run a shallow stack's layers one by one. Where several
  # texts follow each prompt, all of them have a row.
  cache = output.cache
  is_unrolled = _is_unrolled(module)
  if is_unrolled:
    params, cache = unstack_layers(module.config, params, cache)
  inputs_of_step = inputs.of_each_step
  if copies > 1:
    cache = _repeat_rows(cache, copies, _row_axis_of_cache(module))
    prompts_BL, lengths_B, prefix_B, inputs_of_step = _repeat_rows(
        (prompts_BL, lengths_B, prefix_B, inputs_of_step), copies, 0)

  reader = TokenReader(
      module=module, params=params, prompts_BL=prompts_BL, lengths_B=lengths_B,
      prefix_B=prefix_B, source_argument=inputs.source_argument,
      source_inputs=inputs_of_step, positions_name=inputs.positions_name,
      is_unrolled=is_unrolled)
  return logits_BV, cache, reader


class PromptInputs(NamedTuple):
  """The inputs of a model that reads prompts and then writes, beside the tokens
  and the cache.

  Attributes:
    of_prompts: the inputs of the call that reads the prompts, by name.
    of_each_step: those of this call and of each later one, by name.
    positions_name: the name of the input that has the positions of the tokens.
    source_argument: (None,) in the place of the source, which an
      encoder-decoder has encoded already; () for a decoder.
  """
  of_prompts: dict[str, Any]
  of_each_step: dict[str, jax.Array]
  positions_name: str
  source_argument: tuple[None, ...] = ()


def _inputs_of_decoder(module: nn.Module, prompts_BL: jax.Array,
                       lengths_B: jax.Array, prefix_B: Optional[jax.Array]
                       ) -> PromptInputs:
  """Returns the inputs of a decoder. The arguments are those of `read_prompts`.

  Layers that pass on a state are told which tokens are padding. Attention need
  not be told: the tokens that are written take the places of the padding before
  anything sees it.
  """
  of_prompts: dict[str, Any] = {'prefix_B': prefix_B}
  config = module.config  # type: ignore[attr-defined]
  if blocks.has_layers_with_state(config):
    of_prompts['valid_BL'] = _token_mask(prompts_BL, lengths_B)
  return PromptInputs(of_prompts=of_prompts, of_each_step={},
                      positions_name='positions_BL')


def _inputs_of_encoder_decoder(module: nn.Module, params: Any,
                               source_BM: jax.Array,
                               source_lengths_B: jax.Array) -> PromptInputs:
  """Encodes the sources, and returns the inputs of the decoder.

  The suffixes name axes: B batch, M tokens of a source, L tokens of a prompt, D
  d_model.

  Args:
    module: an encoder-decoder.
    params: its parameters.
    source_BM: the tokens of the sources, padded on the right.
    source_lengths_B: the number of tokens of each source.
  """
  of_each_step = {
      'segment_ids_BM': _token_mask(source_BM, source_lengths_B)}
  apply: Callable[..., Any] = module.apply
  memory_BMD, _ = apply(
      {'params': params}, source_BM, method='encode',
      lengths_B=source_lengths_B, **of_each_step)
  return PromptInputs(
      of_prompts={'memory': memory_BMD}, of_each_step=of_each_step,
      positions_name='decoder_positions_BL', source_argument=(None,))


@dataclasses.dataclass(frozen=True)
class TokenReader:
  """Lets a model read the new tokens after some prompts, one at a time.

  Attributes:
    module: the model.
    params: its parameters; with is_unrolled, those of unstack_layers.
    prompts_BL: the prompts' tokens, padded on the right, of B rows.
    lengths_B: the number of tokens of each prompt.
    prefix_B: how many tokens of each prompt see each other; None: none.
    source_argument: (None,) for an encoder-decoder, whose source has been
      encoded already; else ().
    source_inputs: the model's further inputs in each step, by name.
    positions_name: the name of the model's input that has the positions.
    is_unrolled: whether the layers run one by one.
  """
  module: nn.Module
  params: Any
  prompts_BL: jax.Array
  lengths_B: jax.Array
  prefix_B: Optional[jax.Array]
  source_argument: tuple[None, ...]
  source_inputs: dict[str, jax.Array]
  positions_name: str
  is_unrolled: bool

  def __call__(self, cache: Any, new_BT: jax.Array, t: jax.Array
               ) -> tuple[jax.Array, Any]:
    """Lets the model read new token t - 1, and returns the logits of token t.

    Args:
      cache: the cache of the model, which has read the tokens before t - 1.
      new_BT: the new tokens, [B, T], for B rows. Those before t are drawn.
      t: the index of the new token, at least 1. Token 0 was drawn from the
        prompt.

    Returns:
      The logits [B, V], for the vocabulary V; and the cache.
    """
    cache = self._reread_outgrown_rows(cache, new_BT, t)
    # The position of the token is counted from the start of the prompt. An
    # encoder-decoder is also given its source, which was encoded once.
    token_B1 = jax.lax.dynamic_slice_in_dim(new_BT, t - 1, 1, axis=1)
    positions_B1 = (self.lengths_B + t - 1)[:, None]
    apply: Callable[..., Any] = self.module.apply
    output = apply(
        {'params': self.params}, *self.source_argument, token_B1, cache=cache,
        one_by_one=self.is_unrolled, **{self.positions_name: positions_B1},
        **self.source_inputs)
    return output.head.logits(output.hidden)[:, 0], output.cache

  def _reread_outgrown_rows(self, cache: Any, new_BT: jax.Array, t: jax.Array
                            ) -> Any:
    """Returns a cache whose rows fit the lengths of their texts.

    Some position encodings (dynamic, longrope) turn the tokens of a text in
    another way once it exceeds a certain length, one of `lengths_to_reread_at`.
    A row that exceeds one with the last of its `t` new tokens is read again
    from its start, because its earlier tokens were turned in the old way.

    Args:
      cache: the cache that holds the tokens before the last one.
      new_BT: the new tokens, with room for T, of which the first t are written.
      t: the number of new tokens so far.
    """
    # M is the number of places of a text: those of the prompt and of new
    # tokens.
    M = self.prompts_BL.shape[1] + new_BT.shape[1]
    lengths_that_fit = []
    for length in lengths_to_reread_at(self.module):
      if length < M - 1:
        lengths_that_fit.append(length)
    if not lengths_that_fit:
      return cache

    # A text outgrows a length with the first token past it.
    is_outgrown_B = jnp.isin(
        self.lengths_B + t, jnp.array(lengths_that_fit) + 1)

    def reread(cache: Any) -> Any:
      return self._reread(
          cache, new_BT=new_BT, t=t, is_outgrown_B=is_outgrown_B)

    def keep(cache: Any) -> Any:
      return cache

    return jax.lax.cond(is_outgrown_B.any(), reread, keep, cache)

  def _reread(self, cache: Any, new_BT: jax.Array, t: jax.Array,
              is_outgrown_B: jax.Array) -> Any:
    """Returns the cache after some rows were read again from the start.

    The suffixes name axes: B rows of the batch, L tokens of a prompt, T new
    tokens, M = L + T.

    Args:
      cache: the cache before, which the other rows keep.
      new_BT: the new tokens, with room for T, of which the first t are written.
      t: the number of new tokens so far.
      is_outgrown_B: bool, the rows to read again.
    """
    # Let the model read the texts into an empty cache. The mask hides the last
    # token, which the caller lets the model read.
    texts_BM = _texts_with_new_tokens(self.prompts_BL, self.lengths_B, new_BT)
    empty_cache = jax.tree.map(jnp.zeros_like, cache)
    output: Any = self.module.apply(
        {'params': self.params}, texts_BM, cache=empty_cache,
        valid_BL=_token_mask(texts_BM, self.lengths_B + t - 1),
        lengths_B=self.lengths_B + t, prefix_B=self.prefix_B,
        one_by_one=self.is_unrolled)

    # Choose row by row. If the layers are scanned, an axis of layers comes
    # before that of the rows.
    is_outgrown = is_outgrown_B
    if not self.is_unrolled:
      is_outgrown = is_outgrown[None]
    return jax.tree.map(
        functools.partial(_where, is_outgrown), output.cache, cache)


def _token_mask(tokens_BL: jax.Array, lengths_B: jax.Array) -> jax.Array:
  """Returns 1 for a token and 0 for padding after a row's length, [B, L]."""
  positions_1L = jnp.arange(tokens_BL.shape[1])[None]
  return (positions_1L < lengths_B[:, None]).astype(jnp.int32)


def _repeat_rows(tree: Any, copies: int, axis: int) -> Any:
  """Returns a tree of arrays in which each row, along `axis`, stands `copies`
  times in succession."""
  repeat = functools.partial(jnp.repeat, repeats=copies, axis=axis)
  return jax.tree.map(repeat, tree)


def _is_unrolled(module: Any) -> bool:
  """Whether the layers of a decoding step stand one after another in the
  program, as in a stack that is not deep, and not in a scan."""
  return module.config.num_decoder_layers <= UNROLLED_LAYERS


def _row_axis_of_cache(module: Any) -> int:
  """Returns the axis of a cache's arrays along which the rows of a batch lie:
  the first one, or the second where the caches of all layers are stacked."""
  if _is_unrolled(module):
    return 0
  return 1


def lengths_to_reread_at(module: Any) -> tuple[int, ...]:
  """Returns the lengths, ascending, at which a model's positions change: a text
  that grows past one has to be read again from its beginning."""
  if not module.REREADS:
    return ()
  return positions.lengths_that_change_rotation(module.config)


def _texts_with_new_tokens(prompts_BL: jax.Array, lengths_B: jax.Array,
                           new_BT: jax.Array) -> jax.Array:
  """Writes the new tokens of each row behind its prompt, over the padding.

  The suffixes name axes: B batch, L tokens of a prompt, T new tokens, M = L +
  T.

  Args:
    prompts_BL: the prompts' tokens, padded on the right.
    lengths_B: the number of tokens of each prompt.
    new_BT: the new tokens, with room for T.

  Returns:
    The texts, [B, L + T].
  """
  B, T = new_BT.shape
  texts_BM = jnp.pad(prompts_BL, ((0, 0), (0, T)))
  rows_B1 = jnp.arange(B)[:, None]
  positions_BT = lengths_B[:, None] + jnp.arange(T)[None]
  return texts_BM.at[rows_B1, positions_BT].set(new_BT)


def _where(condition: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
  """Returns `new` where a condition on the first axes of both arrays holds, and
  `old` elsewhere. It is the same along all later axes."""
  later_axes = range(condition.ndim, new.ndim)
  return jnp.where(jnp.expand_dims(condition, later_axes), new, old)


def as_stop_tokens(stop: int | tuple[int, ...] | None) -> tuple[int, ...]:
  """Returns the tokens that end a text as a tuple, given one, several or
  none."""
  if stop is None:
    return ()
  if isinstance(stop, tuple):
    return stop
  return (stop,)


def tokens_before_stop(row: np.ndarray, stop: int | tuple[int, ...]
                       ) -> np.ndarray:
  """Returns the tokens of a text before the first one that ends it.

  Args:
    row: the tokens of the text, an array [T].
    stop: the id of the token that ends a text, or several.
  """
  indices = np.flatnonzero(np.isin(row, as_stop_tokens(stop)))
  if not indices.size:
    return row
  return row[:indices[0]]


def text_before_stop(text: str, stops: Sequence[str]) -> str:
  """Returns a text up to the first of the stop strings that it contains, or all
  of it."""
  end = len(text)
  for stop in stops:
    start_of_stop = text.find(stop)
    if start_of_stop >= 0:
      end = min(end, start_of_stop)
  return text[:end]


# The score of a text that may not be chosen; finite, as in transformers.
SCORE_OF_NO_TEXT = -1e9
MOST_BEAMS = 1000  # The largest number of beams.
# The base of each length penalty: 1 for one token. gnmt is equation 14 of Wu et
# al. 2016, which the Transformer's paper uses; power is transformers'
# length_penalty, whose default exponent of 1 gives the mean log-probability of
# a token.
LENGTH_PENALTY_BASES: dict[str, Callable] = {
    'gnmt': lambda length: (5 + length) / 6,
    'power': lambda length: length,
}


@dataclasses.dataclass(frozen=True)
class Beams:
  """How the likeliest texts are searched.

  Attributes:
    num_beams: K, the number of texts that are followed at once. The
      Transformer's paper has 4 (Vaswani et al. 2017, section 6.1).
    length_penalty: the exponent alpha of the penalty; 0: none. The paper has
      0.6.
    penalty: the entry of LENGTH_PENALTY_BASES that gives the base.

  """
  num_beams: int = 4
  length_penalty: float = 0.6
  penalty: str = 'gnmt'

  def __post_init__(self):
    check_number('beams', value=self.num_beams,
                 bounds=[('>=', 1), ('<=', MOST_BEAMS)])
    check_choice('penalty', value=self.penalty, choices=LENGTH_PENALTY_BASES)
    check_number('length_penalty', value=self.length_penalty,
                 bounds=[('>=', -10), ('<=', 10)])

  def divisor(self, length: jax.Array | int) -> jax.Array | float:
    """Returns the length penalty base(length)^alpha for a text of `length` new
    tokens: its score is its log-probability divided by this."""
    base = LENGTH_PENALTY_BASES[self.penalty](length)
    return base ** self.length_penalty


class _ScoredTexts(NamedTuple):
  """K texts of each row of a batch: their new tokens, and their scores."""
  tokens_BKT: jax.Array
  score_BK: jax.Array


class _SearchState(NamedTuple):
  """The texts that a beam search has found for each row so far.

  Attributes:
    running: the texts that go on; their scores are log-probabilities.
    ended: the texts that have ended; their scores are log-probabilities over
      the length penalty.
    is_text_BK: bool, which of the K entries of `ended` hold a text.
    is_open_B: bool, the rows that may yet find a better text.
  """
  running: _ScoredTexts
  ended: _ScoredTexts
  is_text_BK: jax.Array
  is_open_B: jax.Array


class _SearchStep(NamedTuple):
  """The state that goes from token to token of a beam search.

  Attributes:
    t: the number of new tokens so far.
    texts: the texts that have been found.
    cache: the cache of the model, with a row for each running text.
  """
  t: jax.Array
  texts: _SearchState
  cache: Any


@dataclasses.dataclass(frozen=True)
class _BeamSearcher:
  """Extends the K texts of each row of a beam search token by token.

  Attributes:
    reader: the model with the prompts, which reads the new tokens. It has K
      rows for each row of the batch: beam k of row b is its row b * K + k.
    beams: the options of the search.
    stop_tokens: the tokens that end a text; (): none does.
  """
  reader: TokenReader
  beams: Beams
  stop_tokens: tuple[int, ...]

  def is_unfinished(self, step: _SearchStep) -> jax.Array:
    """Returns whether there is room for a token, and a row that may yet find a
    better text."""
    has_room = step.t < step.texts.running.tokens_BKT.shape[2]
    return has_room & step.texts.is_open_B.any()

  def add_token(self, step: _SearchStep) -> _SearchStep:
    """Extends the running texts of a beam search by one token: lets the model
    read the last token of each, and keeps the K likeliest continuations of a
    row.

    The suffixes name axes: B rows of the batch, K texts of a row, T new tokens
    of a text, V tokens in the vocabulary.

    Args:
      step: the state before, with t >= 1 new tokens in each running text.

    Returns:
      The state with t + 1 tokens.
    """
    # The logits of the next token. The model has a row for each of the B * K
    # texts.
    tokens_BKT = step.texts.running.tokens_BKT
    B, K, T = tokens_BKT.shape
    logits, cache = self.reader(
        step.cache, new_BT=tokens_BKT.reshape(B * K, T), t=step.t)
    logits_BKV = logits.reshape(B, K, -1)

    # Choose the best texts. parent_BK says which of the K texts before each of
    # them extends, and so whose cache it needs.
    texts, parent_BK = _extend_texts(
        self.beams, stop_tokens=self.stop_tokens, state=step.texts,
        logits_BKV=logits_BKV, t=step.t)
    # Text k of row b is row b * K + k of the model and of its cache.
    first_row_B1 = K * jnp.arange(B)[:, None]
    parent_rows = (parent_BK + first_row_B1).reshape(-1)
    cache = _reorder_cache(cache, parent_rows=parent_rows,
                           axis=_row_axis_of_cache(self.reader.module))
    return _SearchStep(t=step.t + 1, texts=texts, cache=cache)


@functools.partial(jax.jit, static_argnames=(
    'module', 'max_new_tokens', 'beams', 'stop_token'))
def beam_search(module: nn.Module, params: Any, prompts_BL: jax.Array,
                lengths_B: jax.Array, *, max_new_tokens: int,
                beams: Beams = Beams(),
                stop_token: int | tuple[int, ...] | None = None,
                **inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Continues each prompt by the K likeliest texts of up to T tokens that a
  beam search finds.

  The suffixes name axes: V tokens in the vocabulary.

  Args:
    module, params, prompts_BL, lengths_B, **inputs: those of `generate`.
    max_new_tokens: T, the largest number of new tokens.
    beams: the options of the search, with K, the number of texts that are
      followed in each row.
    stop_token: the token that ends a text and fills it up; or several, of which
      the first fills up. A text of T tokens ends there.

  Returns:
    ([B, K, T] new tokens, [B, K] scores), the best text first. Where there are
    fewer than K texts, the scores of the others are SCORE_OF_NO_TEXT or less.

  Raises:
    ValueError: where learned positions do not reach L + T.
  """
  chex.assert_rank([prompts_BL, lengths_B], [2, 1])
  B = len(prompts_BL)
  K = beams.num_beams
  T = max_new_tokens
  module = module.clone(config=without_capacity(module.config))
  stop_tokens = as_stop_tokens(stop_token)

  # Read the prompts, and choose the first tokens. Only the first beam counts
  # then, since the others would be equal to it.
  logits_BV, cache, reader = read_prompts(
      module, params=params, prompts_BL=prompts_BL, lengths_B=lengths_B,
      room=T, copies=K, **inputs)
  logits_BKV = jnp.repeat(logits_BV[:, None], K, axis=1)
  texts = _first_search_state(B=B, K=K, T=T, stop_tokens=stop_tokens)
  texts, _ = _extend_texts(beams, stop_tokens=stop_tokens, state=texts,
                           logits_BKV=logits_BKV, t=0)

  # Choose the others, until no row can find a better text.
  searcher = _BeamSearcher(reader=reader, beams=beams, stop_tokens=stop_tokens)
  first_step = _SearchStep(t=jnp.ones((), jnp.int32), texts=texts, cache=cache)
  last_step = jax.lax.while_loop(
      searcher.is_unfinished, searcher.add_token, first_step)
  ended = last_step.texts.ended
  return ended.tokens_BKT, ended.score_BK


def _first_search_state(B: int, K: int, T: int, stop_tokens: tuple[int, ...]
                        ) -> _SearchState:
  """Returns the state of a beam search before the first token. Each row follows
  K texts, its beams. At first there is only one text, the empty one: the other
  K - 1 beams get a score so low that they are never chosen.

  Args:
    B: the number of rows of the batch.
    K: the number of beams.
    T: the largest number of new tokens.
    stop_tokens: the tokens that end a text. Arrays of tokens are filled with
      the first one, as texts may end early; with token 0 if there is none.
  """
  filler = stop_tokens[0] if stop_tokens else 0
  tokens_BKT = jnp.full((B, K, T), filler, jnp.int32)
  no_score_BK = jnp.full((B, K), SCORE_OF_NO_TEXT)
  running_score_BK = no_score_BK.at[:, 0].set(0)
  return _SearchState(
      running=_ScoredTexts(tokens_BKT=tokens_BKT, score_BK=running_score_BK),
      ended=_ScoredTexts(tokens_BKT=tokens_BKT, score_BK=no_score_BK),
      is_text_BK=jnp.zeros((B, K), bool),
      is_open_B=jnp.ones(B, bool))


def _extend_texts(beams: Beams, stop_tokens: tuple[int, ...],
                  state: _SearchState, logits_BKV: jax.Array,
                  t: jax.Array | int) -> tuple[_SearchState, jax.Array]:
  """Extends the running texts of a beam search by token t, and keeps the K best
  that go on and the K best that have ended.

  The suffixes name axes: B rows of the batch, K texts that are kept of a row, C
  candidates of a row, T new tokens of a text, V tokens in the vocabulary.

  Args:
    beams: the options of the search, with K, the number of texts that are
      followed in each row.
    stop_tokens: the tokens that end a text.
    state: the state of t tokens.
    logits_BKV: the logits of token t after each running text.
    t: the index of the token.

  Returns:
    The state of t + 1 tokens; and int [B, K], the running text of `state` that
    each new running text extends.
  """
  K = logits_BKV.shape[1]
  candidates = _list_candidates(
      state.running, logits_BKV=logits_BKV, t=t, stop_tokens=stop_tokens)

  # The K best of those that go on. Those that end rank below all of them.
  running_score_BC = jnp.where(
      candidates.ends_BC, SCORE_OF_NO_TEXT + candidates.score_BC,
      candidates.score_BC)
  running_score_BK, chosen_BK = jax.lax.top_k(running_score_BC, K)
  running = _ScoredTexts(
      tokens_BKT=_select_texts(candidates.tokens_BCT, chosen_BK),
      score_BK=running_score_BK)

  ended, is_text_BK = _keep_best_ended(state, candidates, beams=beams, t=t)

  # A row is done when its best running text, were it to end now, would not
  # beat the worst of K finished ones.
  best_running_B = running.score_BK[:, 0] / beams.divisor(t + 1)
  worst_ended_B = jnp.where(is_text_BK.all(1), ended.score_BK.min(1),
                            SCORE_OF_NO_TEXT)
  is_open_B = state.is_open_B & (best_running_B > worst_ended_B)
  state = _SearchState(running=running, ended=ended, is_text_BK=is_text_BK,
                       is_open_B=is_open_B)
  parent_BK = jnp.take_along_axis(candidates.parent_BC, chosen_BK, axis=1)
  return state, parent_BK


class _Candidates(NamedTuple):
  """The C likeliest texts that extend the running texts of each row by one
  token, the likeliest first.

  Attributes:
    tokens_BCT: their new tokens.
    score_BC: their log-probabilities.
    parent_BC: the running text that each of them extends.
    ends_BC: bool, which of them end with that token.
  """
  tokens_BCT: jax.Array
  score_BC: jax.Array
  parent_BC: jax.Array
  ends_BC: jax.Array


def _list_candidates(running: _ScoredTexts, logits_BKV: jax.Array,
                     t: jax.Array | int, stop_tokens: tuple[int, ...]
                     ) -> _Candidates:
  """Returns the likeliest of all extensions of the running texts by token t, so
  many that at least K of each row go on.

  The suffixes name axes: B rows of the batch, K texts that are kept of a row, C
  candidates of a row, T new tokens of a text, V tokens in the vocabulary.

  Args:
    running: the K running texts of each row.
    logits_BKV: the logits of token t after each of them.
    t: the index of the token.
    stop_tokens: the tokens that end a text. A text that has no more room ends,
      too.
  """
  B, K, V = logits_BKV.shape
  T = running.tokens_BKT.shape[2]
  log_p_BKV = jax.nn.log_softmax(logits_BKV, -1)
  score_BKV = running.score_BK[..., None] + log_p_BKV

  # At most one candidate of a running text ends for each stop token, so that
  # K * (1 + number of stop tokens) are enough. An index of the flattened
  # extensions is text * V + token.
  num_candidates = K * min(max(2, 1 + len(stop_tokens)), V)
  score_BC, index_BC = jax.lax.top_k(
      score_BKV.reshape(B, K * V), num_candidates)
  parent_BC = index_BC // V
  token_BC = index_BC % V
  tokens_BCT = _select_texts(running.tokens_BKT, parent_BC)
  tokens_BCT = tokens_BCT.at[:, :, t].set(token_BC)
  ends_BC = jnp.broadcast_to(t + 1 == T, token_BC.shape)
  if stop_tokens:
    ends_BC |= jnp.isin(token_BC, jnp.array(stop_tokens, jnp.int32))
  return _Candidates(tokens_BCT=tokens_BCT, score_BC=score_BC,
                     parent_BC=parent_BC, ends_BC=ends_BC)


def _keep_best_ended(state: _SearchState, candidates: _Candidates,
                     beams: Beams, t: jax.Array | int
                     ) -> tuple[_ScoredTexts, jax.Array]:
  """Returns the K best of the texts that have ended, now or before; and bool
  [B, K], which of them are texts, as there may be fewer than K.

  The suffixes name axes: B rows of the batch, K texts that are kept of a row, C
  candidates of a row, T new tokens of a text.

  Args:
    state: the texts before, of which `ended` and `is_open_B` are read.
    candidates: the texts that are one token longer.
    beams: the options of the search, of which the length penalty is read.
    t: the index of their last token.
  """
  # A text that ends counts where it is one of the K best, and where its row
  # is not done. (Those below SCORE_OF_NO_TEXT extend an entry that is no text.)
  K = state.ended.score_BK.shape[1]
  num_candidates = candidates.score_BC.shape[1]
  is_best_1C = jnp.arange(num_candidates)[None] < K
  is_text_BC = candidates.ends_BC & is_best_1C & (
      candidates.score_BC > SCORE_OF_NO_TEXT / 2)
  final_score_BC = jnp.where(
      is_text_BC & state.is_open_B[:, None],
      candidates.score_BC / beams.divisor(t + 1), SCORE_OF_NO_TEXT)

  # The K best of these and of those that had ended before.
  all_scores = jnp.concatenate([state.ended.score_BK, final_score_BC], axis=1)
  all_tokens = jnp.concatenate(
      [state.ended.tokens_BKT, candidates.tokens_BCT], axis=1)
  all_is_text = jnp.concatenate([state.is_text_BK, is_text_BC], axis=1)
  score_BK, kept_BK = jax.lax.top_k(all_scores, K)
  ended = _ScoredTexts(tokens_BKT=_select_texts(all_tokens, kept_BK),
                       score_BK=score_BK)
  return ended, jnp.take_along_axis(all_is_text, kept_BK, axis=1)


def _select_texts(tokens_BCT: jax.Array, chosen_BK: jax.Array) -> jax.Array:
  """Returns K chosen ones of the C texts that each row of a batch has.

  Args:
    tokens_BCT: the tokens of the texts, [B = rows, C = texts, T = tokens].
    chosen_BK: the indices, along C, of the K texts to take.

  Returns:
    The tokens of the chosen texts, [B, K, T].
  """
  return jnp.take_along_axis(tokens_BCT, chosen_BK[..., None], axis=1)


def _reorder_cache(cache: Any, parent_rows: jax.Array, axis: int) -> Any:
  """Copies the rows of a cache to the texts that a step of beam search has
  chosen. Each of these extends one of the texts before, whose cache it needs.

  Args:
    cache: the caches of the layers. A layer has a Cache of keys and values, or
      arrays of a recurrent state. What it keeps of an encoder's output is the
      same for all beams of a row, and is left as it is.
    parent_rows: [B * K], the row to copy from for each of the K beams of B
      rows.
    axis: the axis of the rows in each array.
  """

  def take_rows(x: jax.Array) -> jax.Array:
    return jnp.take(x, parent_rows, axis)

  def reorder_layer(layer_cache: Any) -> Any:
    """Returns the cache of one layer with its rows in the new order."""
    # An array of a recurrent state is no Cache, and has rows alone.
    if not isinstance(layer_cache, Cache):
      return take_rows(layer_cache)
    # A Cache also has the encoder's keys and values, which stay. Each of the
    # others may be None, an array or a tree of arrays: tree.map handles all
    # alike.
    reordered = {}
    for name in _FIELDS_OF_TEXT_IN_CACHE:
      reordered[name] = jax.tree.map(take_rows, getattr(layer_cache, name))
    return dataclasses.replace(layer_cache, **reordered)

  return jax.tree.map(reorder_layer, cache, is_leaf=_is_cache)


# The fields of a Cache that depend on the tokens of a text.
_FIELDS_OF_TEXT_IN_CACHE = (
    'key_BMJK', 'value_BMJK', 'index_BMJK', 'forget_BMHU', 'inputs')


def _is_cache(x: Any) -> bool:
  """Returns whether a node of a tree is the Cache of a layer."""
  return isinstance(x, Cache)


def generate_by_unmasking(
    module: nn.Module, params: Any, prompts_BL: jax.Array,
    lengths_B: jax.Array, key: jax.Array, *, new: int, steps: int, mask: int,
    temperature: float) -> jax.Array:
  """Returns the text that follows each prompt, int32 [B, new], written by
  masked diffusion (LLaDA, arXiv 2502.09992, algorithm 5): all new tokens begin
  as masks, and each step fills in those of which the model is surest.

  Args:
    module: an encoder that gives logits of tokens.
    params: its parameters, a tree of arrays.
    prompts_BL: the prompts' tokens, padded on the right.
    lengths_B: the number of tokens of each prompt.
    key: the random key of the draws.
    new: N, the number of tokens to write.
    steps: S, the number of steps of unmasking; at most N are taken.
    mask: the id that stands for a masked token, which is never written.
    temperature: the temperature of the draws; 0: the likeliest token.
  """
  config = module.config  # type: ignore[attr-defined]
  module = module.clone(config=without_capacity(config))
  steps = min(steps, new)
  L = prompts_BL.shape[1]

  # The prompt, and after it `new` masks.
  positions_1L = jnp.arange(L + new)[None]
  ends_B1 = lengths_B[:, None] + new
  is_new_BL = (positions_1L >= lengths_B[:, None]) & (positions_1L < ends_B1)
  is_token_BL = (positions_1L < ends_B1).astype(jnp.int32)
  padded_prompts_BL = jnp.pad(prompts_BL, ((0, 0), (0, new)))
  tokens_BL = jnp.where(is_new_BL, mask, padded_prompts_BL)

  # Fill the masks in step by step.
  writer = RowWriter(
      module=module, params=params, is_new_BL=is_new_BL,
      is_token_BL=is_token_BL, ends_B1=ends_B1, key=key, new=new, steps=steps,
      mask=mask, temperature=temperature)
  tokens_BL = jax.lax.fori_loop(0, steps, writer.unmask_step, tokens_BL)
  return _take_new_tokens(tokens_BL, lengths_B, new)


@dataclasses.dataclass(frozen=True)
class RowWriter:
  """Writes text by masked diffusion, all tokens of a row at once.

  Attributes:
    module: the model.
    params: its parameters.
    is_new_BL: bool, which places of each row are to be written.
    is_token_BL: int, 1 on the prompt and the places to be written, and 0 on the
      padding after them.
    ends_B1: how many places of each row are no padding.
    key: the random key of all draws.
    new: N, the number of tokens to write in each row.
    steps: S, the number of steps.
    mask: the id that stands for a masked token.
    temperature: the temperature of the draws; 0: the likeliest token.
  """
  module: nn.Module
  params: Any
  is_new_BL: jax.Array
  is_token_BL: jax.Array
  ends_B1: jax.Array
  key: jax.Array
  new: int
  steps: int
  mask: int
  temperature: float

  def unmask_step(self, step: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Replaces some masks of each row by tokens. After step s of S, from 0 on,
    floor(N (s + 1) / S) of the N tokens to be written are known.

    Args:
      step: s.
      tokens_BL: the tokens before the step, with masks for unknown ones.

    Returns:
      The tokens after the step, [B, L].
    """
    # Predict all tokens of the rows; padding belongs to no segment.
    output: Any = self.module.apply(
        {'params': self.params}, tokens_BL, segment_ids_BL=self.is_token_BL,
        lengths_B=self.ends_B1[:, 0])
    logits_BLV = output.logits

    # Fill in the surest ones.
    key_of_step = jax.random.fold_in(self.key, step)
    num_known = self.new * (step + 1) // self.steps
    return unmask_surest(
        tokens_BL, logits_BLV=logits_BLV, is_new_BL=self.is_new_BL,
        key=key_of_step, mask=self.mask, temperature=self.temperature,
        num_known=num_known)


def unmask_surest(tokens_BL: jax.Array, *, logits_BLV: jax.Array,
                  is_new_BL: jax.Array, key: jax.Array, mask: int,
                  temperature: float, num_known: jax.Array) -> jax.Array:
  """Replaces some masks by tokens: draws a token for each mask, and keeps those
  of which the model is surest (low-confidence remasking: LLaDA, arXiv
  2502.09992, algorithm 5).

  How many masks are replaced follows from `num_known`, which counts all tokens
  of a row that are known afterwards: those that were known before stay, and as
  many are added as are missing from that number.

  The suffixes name axes: B batch, L length, V vocabulary.

  Args:
    tokens_BL: the tokens, with masks for those to be written.
    logits_BLV: the logits of the tokens.
    is_new_BL: which places are not the prompt's, masks and tokens that earlier
      calls have written.
    key: the random key of the draws.
    mask: the id of a mask, which is never drawn.
    temperature: the temperature of the draws; 0: the likeliest token.
    num_known: how many of these places have a token afterwards; one number for
      all rows, or [B, 1].

  Returns:
    The tokens, [B, L], with fewer masks.
  """
  # Draw a token for every mask: the largest of logits with Gumbel noise is a
  # draw from their softmax. The mask itself is never drawn.
  is_masked_BL = is_new_BL & (tokens_BL == mask)
  possible_logits_BLV = logits_BLV.at[..., mask].set(-jnp.inf)
  noisy_logits_BLV = possible_logits_BLV
  if temperature:
    noise_BLV = jax.random.gumbel(key, possible_logits_BLV.shape)
    noisy_logits_BLV = possible_logits_BLV / temperature + noise_BLV
  drawn_BL = noisy_logits_BLV.argmax(-1).astype(tokens_BL.dtype)

  # How sure the model is of what was drawn: its probability, from 0 to 1.
  # Tokens that were written before have a larger number, so that they count
  # among the num_known surest. The prompt and padding have a smaller one.
  probs_BLV = jax.nn.softmax(possible_logits_BLV, -1)
  prob_of_drawn_BL1 = jnp.take_along_axis(probs_BLV, drawn_BL[..., None], -1)
  sureness_of_others_BL = jnp.where(
      is_new_BL, SURENESS_OF_KNOWN_TOKENS, SURENESS_OF_OTHER_PLACES)
  sureness_BL = jnp.where(is_masked_BL, prob_of_drawn_BL1[..., 0],
                          sureness_of_others_BL)

  # Keep the surest; the other masks stay masks.
  stays_BL = is_among_largest(sureness_BL, num_known)
  return jnp.where(is_masked_BL & stays_BL, drawn_BL, tokens_BL)


class UnmaskingState(NamedTuple):
  """The state that goes from step to step of unmasking one block of each row.

  Attributes:
    tokens_BS: the tokens of the block, with masks for unknown ones.
    estimate_BSD: the mean embedding of the tokens that the step before
      predicted, for self-conditioning; None: the model has none.
    cache: the cache of the model.
  """
  tokens_BS: jax.Array
  estimate_BSD: jax.Array | None
  cache: Any


class PlacesOfBlock(NamedTuple):
  """The places of one block of each row, B rows of S places.

  Attributes:
    positions_1S: their positions.
    is_new_BS: which of them are to be written.
    num_new_B1: how many of a row are.
    key: the random key of the block.
  """
  positions_1S: jax.Array
  is_new_BS: jax.Array
  num_new_B1: jax.Array
  key: jax.Array


class WrittenText(NamedTuple):
  """The text that block diffusion has written so far.

  Attributes:
    tokens_BM: the tokens of the rows, with masks where nothing is written yet.
    cache: the cache of the model, with the clean tokens.
  """
  tokens_BM: jax.Array
  cache: Any


def generate_by_blocks(
    module: nn.Module, params: Any, prompts_BL: jax.Array,
    lengths_B: jax.Array, key: jax.Array, *, new: int, steps: int, mask: int,
    temperature: float) -> jax.Array:
  """Returns the text that follows each prompt, int32 [B, new], written by block
  diffusion (BD3-LM: Arriola et al. 2025, arXiv 2503.09573, algorithm 2): blocks
  of S = model.diffusion_block tokens are unmasked one after another, as
  `generate_by_unmasking` does, and a cache has the clean tokens before them.

  Blocks lie where they do in training, so that of a prompt's last block only
  the tokens after the prompt are masks.

  Args:
    module: a decoder with model.diffusion_block.
    params: its parameters, a tree of arrays.
    prompts_BL: the prompts' tokens, padded on the right.
    lengths_B: the number of tokens of each prompt.
    key: the random key of the draws.
    new: the number of tokens to write.
    steps: the number of steps in which each block is unmasked; at most S.
    mask: the id that stands for a masked token, which is never written.
    temperature: the temperature of the draws; 0: the likeliest token.
  """
  config = without_capacity(module.config)  # type: ignore[attr-defined]
  module = module.clone(config=config)
  apply = functools.partial(module.apply, {'params': params})
  S, (B, L) = config.diffusion_block, prompts_BL.shape
  steps = min(steps, S)
  num_blocks = -(-(L + new) // S)
  M = num_blocks * S
  positions_1M = jnp.arange(M)[None]
  is_new_BM = positions_1M >= lengths_B[:, None]
  padded_prompts_BM = jnp.pad(prompts_BL, ((0, 0), (0, M - L)))
  tokens_BM = jnp.where(is_new_BM, mask, padded_prompts_BM)

  # Read the prompts. The blocks from the first mask on are read again.
  read_length = -(-L // S) * S
  output: Any = apply(tokens_BM[:, :read_length],
                      cache=architectures.init_cache(config, B, M))

  # Write block after block, from the first one that has a mask in any row.
  writer = BlockWriter(
      module=module, params=params, is_new_BM=is_new_BM, key=key, steps=steps,
      mask=mask, temperature=temperature)
  first_block = lengths_B.min() // S
  written = jax.lax.fori_loop(
      first_block, num_blocks, writer.write_block,
      WrittenText(tokens_BM, output.cache))
  return _take_new_tokens(written.tokens_BM, lengths_B, new)


@dataclasses.dataclass(frozen=True)
class BlockWriter:
  """Writes text by block diffusion, one block of each row after another. The
  suffixes name axes: B rows, M tokens of a row, S tokens of a block.

  Attributes:
    module: the model.
    params: its parameters.
    is_new_BM: which places of each row are to be written.
    key: the random key of all draws.
    steps: the number of steps in which a block is unmasked.
    mask: the id that stands for a masked token.
    temperature: the temperature of the draws; 0: the likeliest token.
  """
  module: nn.Module
  params: Any
  is_new_BM: jax.Array
  key: jax.Array
  steps: int
  mask: int
  temperature: float

  def write_block(self, block: jax.Array, text: WrittenText) -> WrittenText:
    """Writes one block of each row, from the cache of those before it.

    The suffixes name axes: B rows, M tokens of a row, S tokens of a block, L =
    S, D d_model.

    Args:
      block: the number of the block.
      text: the text before.

    Returns:
      The text with the block, and the cache with its clean tokens.
    """
    # The places of the block: which are to be written, and how many of a row.
    config: Any = self.module.config  # type: ignore[attr-defined]
    S, B = config.diffusion_block, len(text.tokens_BM)
    start = block * S
    positions_1S = start + jnp.arange(S)[None]
    is_new_BS = jax.lax.dynamic_slice_in_dim(self.is_new_BM, start, S, axis=1)
    num_new_B1 = is_new_BS.sum(1, keepdims=True)
    places = PlacesOfBlock(
        positions_1S=positions_1S, is_new_BS=is_new_BS, num_new_B1=num_new_B1,
        key=jax.random.fold_in(self.key, block))

    # Unmask the block step by step. Nothing is predicted of it at first.
    masked_BS = jax.lax.dynamic_slice_in_dim(text.tokens_BM, start, S, axis=1)
    unknown_BSD = None
    if config.self_conditioning:
      unknown_BSD = jnp.zeros((B, S, config.d_model), config.compute_dtype)
    state = jax.lax.fori_loop(
        0, self.steps, functools.partial(self._unmask_step, places=places),
        UnmaskingState(masked_BS, unknown_BSD, text.cache))

    # The clean tokens take the places of the masked ones in the cache.
    output = self._apply(state.tokens_BS, positions_BL=positions_1S,
                         cache=state.cache)
    tokens_BM = jax.lax.dynamic_update_slice_in_dim(
        text.tokens_BM, state.tokens_BS, start, axis=1)
    return WrittenText(tokens_BM, output.cache)

  def _unmask_step(self, step: jax.Array, state: UnmaskingState,
                   places: PlacesOfBlock) -> UnmaskingState:
    """Replaces some masks of a block by tokens: after step s of n steps,
    (s + 1) / n of the new tokens of the block are known.

    The suffixes name axes: B rows, S tokens of a block, D d_model, V tokens in
    the vocabulary.

    Args:
      step: s, from 0 on.
      state: the state after the step before.
      places: the places of the block.

    Returns:
      The state after this step.
    """
    # The model predicts all tokens of the block, by those that are known.
    output = self._apply(
        state.tokens_BS, positions_BL=places.positions_1S, cache=state.cache,
        estimate_BLD=state.estimate_BSD)
    logits_BSV = output.logits

    # The surest of those that are masked become known.
    tokens_BS = unmask_surest(
        state.tokens_BS, logits_BLV=logits_BSV, is_new_BL=places.is_new_BS,
        key=jax.random.fold_in(places.key, step), mask=self.mask,
        temperature=self.temperature,
        num_known=places.num_new_B1 * (step + 1) // self.steps)
    config: Any = self.module.config  # type: ignore[attr-defined]
    estimate_BSD = None
    if config.self_conditioning:
      estimate_BSD = embed_predictions(config, self.params, output)
    return UnmaskingState(tokens_BS, estimate_BSD, output.cache)

  def _apply(self, tokens_BS: jax.Array, **inputs: Any) -> Any:
    """Runs the model on the tokens of a block, with further inputs by name."""
    return self.module.apply({'params': self.params}, tokens_BS, **inputs)


def _take_new_tokens(tokens_BL: jax.Array, lengths_B: jax.Array, new: int
                     ) -> jax.Array:
  """Returns the `new` tokens after the prompt of each row, [B, new].

  Args:
    tokens_BL: the tokens of B rows, each with its prompt in front.
    lengths_B: the number of tokens of each prompt, which is where the new ones
      of the row begin.
    new: the number of tokens to take of each row.
  """
  def take_from(row: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(row, start, new)

  return jax.vmap(take_from)(tokens_BL, lengths_B)


def is_among_largest(x_BL: jax.Array, count: jax.Array | int) -> jax.Array:
  """Returns whether each number is among the `count` largest of its row, bool
  [B, L]; of equal numbers, the first ones are."""
  # argsort gives the index of each rank; argsort again inverts this
  # permutation, to the rank of each index.
  order_BL = jnp.argsort(-x_BL, axis=1, stable=True)
  rank_BL = jnp.argsort(order_BL, axis=1)
  return rank_BL < count
