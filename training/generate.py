"""Text from a model: the prompt in one pass, then one while_loop of steps.

Prompts of different lengths stand in one batch, padded on the right: a cache's
slot is its token's position, so a row goes on where its own prompt ends, and
overwrites the padding's slots before it can see them; a state is told which
tokens are padding. Experts have no capacity here, and where positions turn by
the length of a row, each row's is its own so far: so a row's text depends
neither on the others nor on how many tokens may follow.

`generate` draws each token, `beam_search` finds the likeliest texts of those
that a few beams come upon, and `write_diffusion` writes by unmasking.

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
stayed once is never taken back.
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
from architectures.parts.skeletons import unstack_layers
from common.errors import one_of
from common.fields import check_number

# A step runs up to this many layers one by one, which is faster; a deeper stack
# is scanned, since the program would grow with it.
UNROLLED_LAYERS = 48


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
    check_number('temperature', self.temperature, [('>=', 0)])
    check_number('top_k', self.top_k, [('>=', 0)])
    check_number('top_p', self.top_p, [('>', 0), ('<=', 1)])
    check_number('min_p', self.min_p, [('>=', 0), ('<=', 1)])
    check_number('repetition_penalty', self.repetition_penalty, [('>', 0)])

  @property
  def remembers(self) -> bool:
    """Whether a draw depends on which tokens the text has already."""
    return self.repetition_penalty != 1

  def __call__(self, logits_BV: jax.Array, key: jax.Array,
               seen_BV: jax.Array | None = None) -> jax.Array:
    """Returns one token a row, [B].

    Args:
      logits_BV: the logits of the next token.
      key: the key of the draw.
      seen_BV: bool, the tokens that each row has already; it is needed where
        `remembers`.
    """
    if self.remembers:
      assert seen_BV is not None
      logits_BV = self.penalize(logits_BV, seen_BV)
    if self.temperature == 0:
      return logits_BV.argmax(-1)
    return jax.random.categorical(key, self.filter(logits_BV))

  def penalize(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
    """Returns the logits, lower where a token has been seen."""
    penalty = self.repetition_penalty
    lower_BV = jnp.where(logits_BV < 0, logits_BV * penalty,
                         logits_BV / penalty)
    return jnp.where(seen_BV, lower_BV, logits_BV)

  def filter(self, logits_BV: jax.Array) -> jax.Array:
    """Returns the logits over the temperature, -inf where none is drawn."""
    logits_BV = logits_BV / self.temperature
    if self.top_k:
      k = min(self.top_k, logits_BV.shape[-1])
      largest_BK, _ = jax.lax.top_k(logits_BV, k)
      least_B1 = largest_BK[:, -1:]
      logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if self.top_p < 1:
      sorted_BV = jnp.sort(logits_BV, -1, descending=True)
      p_BV = jax.nn.softmax(sorted_BV, -1)
      # A token stays while those before it have not reached p.
      kept_BV = jnp.cumsum(p_BV, -1) - p_BV < self.top_p
      kept_logits_BV = jnp.where(kept_BV, sorted_BV, jnp.inf)
      least_B1 = kept_logits_BV.min(-1, keepdims=True)
      logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if self.min_p:
      p_BV = jax.nn.softmax(logits_BV, -1)
      least_B1 = self.min_p * p_BV.max(-1, keepdims=True)
      logits_BV = jnp.where(p_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


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
    params: its parameters.
    prompts_BL: the prompts' tokens, padded on the right.
    lengths_B: the number of tokens of each prompt, at least 1.
    key: the key of the draws.
    max_new_tokens: T, the number of new tokens.
    sampling: how a token is drawn.
    stop_token: the token that ends a row, or several. A row that has drawn one
      is filled up to the end with the first of them.
    **inputs: source_BM, source_lengths_B and prefix_B of `begin`.

  Returns:
    [B, T] new tokens.

  Raises:
    ValueError: where learned positions do not reach L + T.
  """
  chex.assert_rank([prompts_BL, lengths_B], [2, 1])
  B, L = prompts_BL.shape
  module = module.clone(config=without_capacity(module.config))
  stops = as_stop_tokens(stop_token)
  rows_B = jnp.arange(B)

  # Read the prompts.
  logits_BV, cache, advance = read_prompts(
      module, params=params, prompts_BL=prompts_BL, lengths_B=lengths_B,
      room=max_new_tokens, **inputs)
  seen_BV = None
  if sampling.remembers:
    V = module.config.vocab_size
    is_prompt_BL = jnp.arange(L)[None] < lengths_B[:, None]
    # Padding stands for token V, which does not exist and is dropped.
    ids_BL = jnp.where(is_prompt_BL, prompts_BL, V)
    seen_BV = jnp.zeros((B, V), bool)
    seen_BV = seen_BV.at[rows_B[:, None], ids_BL].set(True, mode='drop')

  def draw(logits_BV: jax.Array, t: jax.Array | int,
           seen_BV: jax.Array | None):
    """Returns the new token t of each row, and the tokens seen by then."""
    token_key = jax.random.fold_in(key, t)
    new_B = sampling(logits_BV, token_key, seen_BV).astype(jnp.int32)
    if seen_BV is not None:
      seen_BV = seen_BV.at[rows_B, new_B].set(True)
    return new_B, seen_BV

  # The first token.
  first_B, seen_BV = draw(logits_BV, 0, seen_BV)
  tokens_BL = jnp.zeros((B, max_new_tokens), jnp.int32)
  if stops:  # a row that ends early is filled up with the stop token
    tokens_BL = tokens_BL.at[:, 1:].set(stops[0])
  tokens_BL = tokens_BL.at[:, 0].set(first_B)
  done_B = jnp.isin(first_B, jnp.array(stops, jnp.int32))

  # The others, until every row is done.
  def unfinished(carry: Any):
    t, _, done_B, *_ = carry
    return (t < max_new_tokens) & ~jnp.all(done_B)

  def step(carry: Any):
    """Adds the new token t to each row."""
    t, tokens_BL, done_B, cache, seen_BV = carry
    logits_BV, cache = advance(cache, tokens_BL, t)
    new_B, seen_BV = draw(logits_BV, t, seen_BV)
    if stops:
      new_B = jnp.where(done_B, stops[0], new_B)
      done_B |= jnp.isin(new_B, jnp.array(stops, jnp.int32))
    tokens_BL = tokens_BL.at[:, t].set(new_B)
    return t + 1, tokens_BL, done_B, cache, seen_BV

  one = jnp.ones((), jnp.int32)
  _, tokens_BL, *_ = jax.lax.while_loop(
      unfinished, step, (one, tokens_BL, done_B, cache, seen_BV))
  return tokens_BL


def read_prompts(module: nn.Module, params: Any, prompts_BL: jax.Array,
                 lengths_B: jax.Array, room: int, *,
                 source_BM: Optional[jax.Array] = None,
                 source_lengths_B: Optional[jax.Array] = None,
                 prefix_B: Optional[jax.Array] = None, copies: int = 1
                 ) -> tuple[jax.Array, Any, Callable]:
  """Reads the prompts, and the sources of an encoder-decoder.

  Args:
    module, params, prompts_BL, lengths_B: those of `generate`.
    room: the number of tokens that may follow.
    source_BM: the tokens that an encoder-decoder reads, padded on the right.
      They are encoded once; the prompts are the beginnings of the targets.
    source_lengths_B: the number of tokens of each source.
    prefix_B: for a decoder, how many tokens of each prompt see each other, at
      most all of them (a prefix LM: its whole prompt); None: none.
    copies: the number of texts that follow each prompt; they have rows of their
      own.

  Returns:
    The logits of the first new tokens, [B, V]; a cache with room for all; and
    a function advance(cache, new tokens [B, T], t) -> (logits, cache), which
    reads new token t - 1 and gives the logits of token t.
  """
  apply: Callable[..., Any] = module.apply
  B, L = prompts_BL.shape
  cache = architectures.init_cache(module.config, B, L + room)
  options: dict[str, Any] = dict(cache=cache, lengths_B=lengths_B)

  # The inputs of every step. An encoder-decoder encodes its source here, and
  # its steps are given None in the source's place.
  leading: tuple[None, ...] = ()
  fixed: dict[str, jax.Array] = {}
  places = 'positions_BL'
  if source_BM is None:
    options['prefix_B'] = prefix_B
    if blocks.has_layers_with_state(module.config):
      options['valid_BL'] = _token_mask(prompts_BL, lengths_B)
  else:
    assert source_lengths_B is not None, 'a source comes with its lengths'
    leading = (None,)
    fixed['segment_ids_BM'] = _token_mask(source_BM, source_lengths_B)
    places = 'decoder_positions_BL'
    options['memory'], _ = apply({'params': params}, source_BM, method='encode',
                                 lengths_B=source_lengths_B, **fixed)

  # Read the prompts; the last token of each gives the first new token.
  output = apply({'params': params}, *leading, prompts_BL, **fixed, **options)
  last_B11 = (lengths_B - 1)[:, None, None]
  last_B1D = jnp.take_along_axis(output.hidden, last_B11, axis=1)
  assert output.head is not None  # each objective with a prompt trains a head
  logits_BV = output.head.logits(last_B1D)[:, 0]

  # The rows are the first axis of a layer's cache, and the second of a stack's.
  cache = output.cache
  apart = _is_unrolled(module)
  if apart:
    params, cache = unstack_layers(params, cache)
  if copies > 1:
    cache = _repeat_rows(cache, copies, _row_axis_of_cache(module))
    prompts_BL, lengths_B, prefix_B, fixed = _repeat_rows(
        (prompts_BL, lengths_B, prefix_B, fixed), copies, 0)

  def advance(cache: Any, new_BT: jax.Array, t: jax.Array):
    """Returns the logits of new token t, and the cache that has read t - 1."""
    cache = _reread_outgrown_rows(module, params=params, cache=cache,
                                  prompts_BL=prompts_BL,
                                  lengths_B=lengths_B, prefix_B=prefix_B,
                                  new_BT=new_BT, t=t)
    token_B1 = jax.lax.dynamic_slice_in_dim(new_BT, t - 1, 1, axis=1)
    places_B1 = (lengths_B + t - 1)[:, None]
    output = apply({'params': params}, *leading, token_B1, cache=cache,
                   one_by_one=apart, **{places: places_B1}, **fixed)
    return output.head.logits(output.hidden)[:, 0], output.cache

  return logits_BV, cache, advance


def _token_mask(tokens_BL: jax.Array, lengths_B: jax.Array) -> jax.Array:
  """Returns 1 where a place holds a token and 0 where it is padding, [B, L]."""
  places_1L = jnp.arange(tokens_BL.shape[1])[None]
  return (places_1L < lengths_B[:, None]).astype(jnp.int32)


def _repeat_rows(tree: Any, copies: int, axis: int) -> Any:
  """Returns the tree with each row of its arrays `copies` times in a row."""
  return jax.tree.map(lambda x: jnp.repeat(x, copies, axis), tree)


def _is_unrolled(module: Any) -> bool:
  """Whether the layers of a step follow one another in the program."""
  return module.config.num_decoder_layers <= UNROLLED_LAYERS


def _row_axis_of_cache(module: Any) -> int:
  """Returns the axis of a cache's arrays along which the rows of a batch lie:
  the first one is that of the layers where these are stacked."""
  return 0 if _is_unrolled(module) else 1


def lengths_to_reread_at(module: Any) -> tuple[int, ...]:
  """Returns the lengths, ascending, past which a text is read again."""
  if not module.REREADS:
    return ()
  return positions.lengths_that_change_rotation(module.config)


def _reread_outgrown_rows(module: nn.Module, params: Any, cache: Any,
                          prompts_BL: jax.Array,
                          lengths_B: jax.Array, prefix_B: Optional[jax.Array],
                          new_BT: jax.Array, t: jax.Array) -> Any:
  """Returns the cache where the model has yet to read the last of `t` new
  tokens. Rows that this token makes longer than one of `rereads_at` are read
  again up to there.

  Args:
    module, params, prompts_BL, lengths_B, prefix_B: those of `generate`.
    cache: the cache that holds the tokens before it.
    new_BT: the new tokens, of which T may be written.
    t: the number of new tokens.
  """
  B, T = new_BT.shape
  M = prompts_BL.shape[1] + T
  apart = _is_unrolled(module)
  ends = [n for n in lengths_to_reread_at(module) if n < M - 1]
  if not ends:
    return cache
  outgrown_B = jnp.isin(lengths_B + t, jnp.array(ends) + 1)

  def again() -> Any:
    """Returns the cache with the rows that have outgrown a length read
    again."""
    # The texts so far, from an empty cache, without their last token.
    texts_BM = jnp.pad(prompts_BL, ((0, 0), (0, T)))
    rows_B1 = jnp.arange(B)[:, None]
    places_BT = lengths_B[:, None] + jnp.arange(T)[None]
    texts_BM = texts_BM.at[rows_B1, places_BT].set(new_BT)
    empty = jax.tree.map(jnp.zeros_like, cache)
    output: Any = module.apply(
        {'params': params}, texts_BM, cache=empty,
        valid_BL=_token_mask(texts_BM, lengths_B + t - 1),
        lengths_B=lengths_B + t, prefix_B=prefix_B, one_by_one=apart)

    # Only the rows that have outgrown a length take what was read again.
    rows = outgrown_B
    if not apart:
      rows = rows[None]

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
      later_axes = range(rows.ndim, new.ndim)
      return jnp.where(jnp.expand_dims(rows, later_axes), new, old)

    return jax.tree.map(choose, output.cache, cache)

  return jax.lax.cond(outgrown_B.any(), again, lambda: cache)


def as_stop_tokens(stop: int | tuple[int, ...] | None) -> tuple[int, ...]:
  """Returns the tokens that end a text."""
  if stop is None:
    return ()
  if isinstance(stop, tuple):
    return stop
  return (stop,)


def tokens_before_stop(row: np.ndarray,
                       stop: int | tuple[int, ...]) -> np.ndarray:
  """Returns the tokens of a row before the first that is `stop`, or in it."""
  ends = np.flatnonzero(np.isin(row, as_stop_tokens(stop)))
  return row[:ends[0]] if ends.size else row


def text_before_stop(text: str, stops: Sequence[str]) -> str:
  """Returns a text up to the first of the stop strings in it."""
  end = len(text)
  for stop in stops:
    place = text.find(stop)
    if place >= 0:
      end = min(end, place)
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
    count: K, the number of texts that are followed at once. The Transformer's
      paper has 4 (Vaswani et al. 2017, section 6.1).
    length_penalty: the exponent alpha of the penalty; 0: none. The paper has
      0.6.
    penalty: the entry of PENALTIES that gives the base of the penalty.
  """
  count: int = 4
  length_penalty: float = 0.6
  penalty: str = 'gnmt'

  def __post_init__(self):
    check_number('beams', self.count, [('>=', 1), ('<=', MOST_BEAMS)])
    one_of('penalty', self.penalty, LENGTH_PENALTY_BASES)
    check_number('length_penalty', self.length_penalty,
                 [('>=', -10), ('<=', 10)])

  def divisor(self, length: jax.Array | int) -> jax.Array | float:
    """Returns the length penalty base(length)^alpha, by which the
    log-probability of a text is divided."""
    base = LENGTH_PENALTY_BASES[self.penalty](length)
    return base ** self.length_penalty


class _ScoredTexts(NamedTuple):
  """K texts of each row: their new tokens, and their scores."""
  tokens_BKT: jax.Array
  score_BK: jax.Array


class _SearchState(NamedTuple):
  """The texts that the search has come upon for each row.

  Attributes:
    running: the texts that go on, by their log-probability.
    ended: the texts that have ended, by their score.
    full_BK: bool, which of the K places of `ended` hold a text.
    open_B: bool, the rows that may yet find a better one.
  """
  running: _ScoredTexts
  ended: _ScoredTexts
  full_BK: jax.Array
  open_B: jax.Array


@functools.partial(jax.jit, static_argnames=(
    'module', 'max_new_tokens', 'beams', 'stop_token'))
def beam_search(module: nn.Module, params: Any, prompts_BL: jax.Array,
                lengths_B: jax.Array, *, max_new_tokens: int,
                beams: Beams = Beams(),
                stop_token: int | tuple[int, ...] | None = None,
                **inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Continues each prompt by the likeliest texts of up to T tokens.

  Args:
    module, params, prompts_BL, lengths_B, **inputs: those of `generate`.
    max_new_tokens: T, the largest number of new tokens.
    beams: how to search.
    stop_token: the token that ends a text and fills it up; or several, of which
      the first fills up. A text of T tokens ends there.

  Returns:
    ([B, K, T] new tokens, [B, K] scores), the best text first. Where there are
    fewer than K texts, the scores of the others are NEVER or less.

  Raises:
    ValueError: where learned positions do not reach L + T.
  """
  chex.assert_rank([prompts_BL, lengths_B], [2, 1])
  B = len(prompts_BL)
  K = beams.count
  T = max_new_tokens
  module = module.clone(config=without_capacity(module.config))
  stops = as_stop_tokens(stop_token)

  # Read the prompts, and choose the first tokens. Only the first beam counts
  # then, since the others would be equal to it.
  logits_BV, cache, advance = read_prompts(
      module, params=params, prompts_BL=prompts_BL, lengths_B=lengths_B,
      room=T, copies=K, **inputs)
  logits_BKV = jnp.repeat(logits_BV[:, None], K, axis=1)
  state = _first_search_state(B=B, K=K, T=T, stops=stops)
  state, _ = _extend_texts(beams, stops=stops, state=state,
                           logits_BKV=logits_BKV,
                           t=0)

  def unfinished(carry: Any):
    t, state, _ = carry
    return (t < T) & state.open_B.any()

  def step(carry: Any):
    """Adds the new token t to each text of each row."""
    t, state, cache = carry
    tokens = state.running.tokens_BKT.reshape(B * K, T)
    logits, cache = advance(cache, tokens, t)
    logits_BKV = logits.reshape(B, K, -1)
    state, parent_BK = _extend_texts(beams, stops=stops, state=state,
                                     logits_BKV=logits_BKV, t=t)
    # Each text goes on with the cache of the text that it extends.
    first_B1 = K * jnp.arange(B)[:, None]
    rows = (parent_BK + first_B1).reshape(-1)
    return t + 1, state, _reorder_cache(cache, rows, _row_axis_of_cache(module))

  one = jnp.ones((), jnp.int32)
  _, state, _ = jax.lax.while_loop(unfinished, step, (one, state, cache))
  return state.ended.tokens_BKT, state.ended.score_BK


def _first_search_state(B: int, K: int, T: int,
                        stops: tuple[int, ...]) -> _SearchState:
  """Returns the state before the first token: one empty text for each row."""
  filler = stops[0] if stops else 0
  tokens_BKT = jnp.full((B, K, T), filler, jnp.int32)
  never_BK = jnp.full((B, K), SCORE_OF_NO_TEXT)
  first_BK = never_BK.at[:, 0].set(0)
  return _SearchState(
      running=_ScoredTexts(tokens_BKT=tokens_BKT, score_BK=first_BK),
      ended=_ScoredTexts(tokens_BKT=tokens_BKT, score_BK=never_BK),
      full_BK=jnp.zeros((B, K), bool),
      open_B=jnp.ones(B, bool))


def _extend_texts(beams: Beams, stops: tuple[int, ...], state: _SearchState,
                  logits_BKV: jax.Array, t: jax.Array | int
                  ) -> tuple[_SearchState, jax.Array]:
  """Adds token t to the running texts: one step of the beam search.

  The axis C is that of the candidates, which are each row's likeliest
  extensions of a running text by one token.

  Args:
    beams: how to search.
    stops: the tokens that end a text.
    state: the state of t tokens.
    logits_BKV: the logits of token t after each running text.
    t: the index of the token.

  Returns:
    The state; and [B, K], which running text each one goes on from.
  """
  B, K, V = logits_BKV.shape
  T = state.running.tokens_BKT.shape[2]

  # The candidates: so many that at least K go on, whichever of them end.
  log_p_BKV = jax.nn.log_softmax(logits_BKV, -1)
  score_BKV = state.running.score_BK[..., None] + log_p_BKV
  count = K * min(max(2, 1 + len(stops)), V)
  score_BC, place_BC = jax.lax.top_k(score_BKV.reshape(B, K * V), count)
  parent_BC = place_BC // V
  token_BC = place_BC % V
  tokens_BCT = _select_texts(state.running.tokens_BKT, parent_BC)
  tokens_BCT = tokens_BCT.at[:, :, t].set(token_BC)
  ends_BC = jnp.broadcast_to(t + 1 == T, token_BC.shape)
  if stops:
    ends_BC |= jnp.isin(token_BC, jnp.array(stops, jnp.int32))

  # The K best of those that go on.
  going_BC = jnp.where(ends_BC, SCORE_OF_NO_TEXT + score_BC, score_BC)
  going_BK, chosen_BK = jax.lax.top_k(going_BC, K)
  running = _ScoredTexts(tokens_BKT=_select_texts(tokens_BCT, chosen_BK),
                         score_BK=going_BK)

  # A text that ends counts where it is one of the K best, and where its row
  # is not done. (Those below NEVER go on from a text that is none.)
  best_1C = jnp.arange(count)[None] < K
  new_BC = ends_BC & best_1C & (score_BC > SCORE_OF_NO_TEXT / 2)
  final_BC = jnp.where(new_BC & state.open_B[:, None],
                       score_BC / beams.divisor(t + 1), SCORE_OF_NO_TEXT)

  # The K best of these and of those that had ended before.
  every_score = jnp.concatenate([state.ended.score_BK, final_BC], axis=1)
  every_text = jnp.concatenate([state.ended.tokens_BKT, tokens_BCT], axis=1)
  every_full = jnp.concatenate([state.full_BK, new_BC], axis=1)
  ended_BK, kept_BK = jax.lax.top_k(every_score, K)
  ended = _ScoredTexts(tokens_BKT=_select_texts(every_text, kept_BK),
                       score_BK=ended_BK)
  full_BK = jnp.take_along_axis(every_full, kept_BK, axis=1)

  # A row is done when its best running text, were it to end now, would not
  # beat the worst of K finished ones.
  hope_B = running.score_BK[:, 0] / beams.divisor(t + 1)
  worst_B = jnp.where(full_BK.all(1), ended.score_BK.min(1), SCORE_OF_NO_TEXT)
  state = _SearchState(running=running, ended=ended, full_BK=full_BK,
                       open_B=state.open_B & (hope_B > worst_B))
  return state, jnp.take_along_axis(parent_BC, chosen_BK, axis=1)


def _select_texts(tokens_BCT: jax.Array, chosen_BK: jax.Array) -> jax.Array:
  """Returns the K chosen ones of C texts a row, [B, K, T]."""
  return jnp.take_along_axis(tokens_BCT, chosen_BK[..., None], axis=1)


def _reorder_cache(cache: Any, rows: jax.Array, axis: int) -> Any:
  """Returns the cache whose rows are those of the texts that go on; the beams
  of a row share what is kept of its memory.

  Args:
    cache: the caches of the layers: a Cache, or the arrays of a state.
    rows: the row that each text goes on from, [B * K].
    axis: the axis of the rows in each array.
  """

  def take(x: jax.Array) -> jax.Array:
    return jnp.take(x, rows, axis)

  def reorder_entry(entry: Any) -> Any:
    """Returns the cache of one layer in the new order."""
    if not isinstance(entry, Cache):  # an array of a state
      return take(entry)
    return dataclasses.replace(
        entry,
        key_BMJK=jax.tree.map(take, entry.key_BMJK),
        value_BMJK=jax.tree.map(take, entry.value_BMJK),
        index_BMJK=jax.tree.map(take, entry.index_BMJK),
        inputs=jax.tree.map(take, entry.inputs))

  return jax.tree.map(reorder_entry, cache,
                      is_leaf=lambda x: isinstance(x, Cache))


def generate_by_unmasking(module: nn.Module, params: Any, prompts_BL: jax.Array,
                          lengths_B: jax.Array, key: jax.Array, *, new: int,
                          steps: int, mask: int,
                          temperature: float) -> jax.Array:
  """Returns the text that follows each prompt, int32 [B, new], by masked
  diffusion (LLaDA, arXiv 2502.09992, algorithm 5).

  Args:
    module: an encoder that gives logits of tokens.
    params: its parameters.
    prompts_BL: the prompts' tokens, padded on the right.
    lengths_B: the number of tokens of each prompt.
    key: the key of the draws.
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
  places_1L = jnp.arange(L + new)[None]
  ends_B1 = lengths_B[:, None] + new
  asked_BL = (places_1L >= lengths_B[:, None]) & (places_1L < ends_B1)
  real_BL = (places_1L < ends_B1).astype(jnp.int32)
  padded_BL = jnp.pad(prompts_BL, ((0, 0), (0, new)))
  tokens_BL = jnp.where(asked_BL, mask, padded_BL)

  def step(s: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Returns the tokens after step s: some more of them are no masks."""
    masked_BL = asked_BL & (tokens_BL == mask)
    output: Any = module.apply({'params': params}, tokens_BL,
                               segment_ids_BL=real_BL,
                               lengths_B=ends_B1[:, 0])

    # Fill every mask: the largest of logits with Gumbel noise is a draw.
    logits_BLV = output.logits.at[..., mask].set(-jnp.inf)
    drawn_BLV = logits_BLV
    if temperature:
      noise_BLV = jax.random.gumbel(jax.random.fold_in(key, s),
                                    logits_BLV.shape)
      drawn_BLV = logits_BLV / temperature + noise_BLV
    filled_BL = drawn_BLV.argmax(-1).astype(tokens_BL.dtype)

    # The surest fillings stay. Those that have stayed before count as surer
    # (2) than any probability, and the prompt and the padding as less (-1).
    p_BLV = jax.nn.softmax(logits_BLV, -1)
    sure_BL1 = jnp.take_along_axis(p_BLV, filled_BL[..., None], -1)
    other_BL = jnp.where(asked_BL, 2.0, -1.0)
    sure_BL = jnp.where(masked_BL, sure_BL1[..., 0], other_BL)
    stays_BL = is_among_largest(sure_BL, new * (s + 1) // steps)
    return jnp.where(masked_BL & stays_BL, filled_BL, tokens_BL)

  tokens_BL = jax.lax.fori_loop(0, steps, step, tokens_BL)

  def cut(row: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(row, start, new)

  return jax.vmap(cut)(tokens_BL, lengths_B)


def is_among_largest(x_BL: jax.Array, count: jax.Array | int) -> jax.Array:
  """Returns which `count` of each row are the largest, bool [B, L]; of equal
  ones, the first."""
  order_BL = jnp.argsort(-x_BL, axis=1, stable=True)
  return jnp.argsort(order_BL, axis=1) < count
