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
from architectures.parts.skeletons import one_by_one
from common.errors import one_of
from common.fields import check_number

# So many layers a token goes through one by one, which is faster; deeper
# stacks are scanned, or the program would grow with them.
UNROLLED_LAYERS = 48


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn.

  Attributes:
    temperature: divides the logits; 0: the likeliest token (greedy).
    top_k: only the k likeliest tokens; 0: all.
    top_p: only the likeliest tokens that together reach p (Holtzman et al.
      2020); 1: all.
    min_p: only tokens that are at least so many times as likely as the
      likeliest (Nguyen et al. 2024); 0: all.
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
    for name, bounds in (
        ('temperature', (('>=', 0),)), ('top_k', (('>=', 0),)),
        ('top_p', (('>', 0), ('<=', 1))), ('min_p', (('>=', 0), ('<=', 1))),
        ('repetition_penalty', (('>', 0),))):
      check_number(name, getattr(self, name), bounds)

  @property
  def remembers(self) -> bool:
    """Whether a draw depends on which tokens the text has already."""
    return self.repetition_penalty != 1

  def __call__(self, logits_BV: jax.Array, key: jax.Array,
               seen_BV: jax.Array | None = None) -> jax.Array:
    """Returns one token a row, [B].

    Args:
      logits_BV: of the next token.
      key: of the draw.
      seen_BV: bool, the tokens that each row has; where `remembers`.
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
      least_B1 = jax.lax.top_k(logits_BV, k)[0][:, -1:]
      logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if self.top_p < 1:
      sorted_BV = jnp.sort(logits_BV, -1, descending=True)
      p_BV = jax.nn.softmax(sorted_BV, -1)
      # A token stays while those before it have not reached p.
      kept_BV = jnp.cumsum(p_BV, -1) - p_BV < self.top_p
      least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), -1,
                         keepdims=True)
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
    prompts_BL: tokens, padded on the right.
    lengths_B: how many of each row are its prompt, at least 1.
    key: of the draws.
    max_new_tokens: T.
    sampling: how a token is drawn.
    stop_token: a row that draws it is done, and repeats it to the end; of
      several, the first.
    **inputs: source_BM, source_lengths_B and prefix_B, as those of `begin`.

  Returns:
    [B, T] new tokens.

  Raises:
    ValueError: where learned positions do not reach L + T.
  """
  chex.assert_rank([prompts_BL, lengths_B], [2, 1])
  B, L = prompts_BL.shape
  module = module.clone(config=without_capacity(module.config))
  logits_BV, cache, advance = begin(
      module, params, prompts_BL, lengths_B, max_new_tokens, **inputs)
  rows_B = jnp.arange(B)
  real_BL = jnp.arange(L)[None] < lengths_B[:, None]
  seen_BV = None
  if sampling.remembers:
    V = module.config.vocab_size
    seen_BV = jnp.zeros((B, V), bool).at[
        rows_B[:, None], jnp.where(real_BL, prompts_BL, V)].set(
            True, mode='drop')

  def draw(logits_BV: jax.Array, t: jax.Array | int,
           seen_BV: jax.Array | None):
    new_B = sampling(logits_BV, jax.random.fold_in(key, t), seen_BV).astype(
        jnp.int32)
    return new_B, (seen_BV if seen_BV is None else
                   seen_BV.at[rows_B, new_B].set(True))

  first_B, seen_BV = draw(logits_BV, 0, seen_BV)
  tokens_BL = jnp.zeros((B, max_new_tokens), jnp.int32).at[:, 0].set(first_B)
  stops = stops_of(stop_token)
  done_B = jnp.isin(first_B, jnp.array(stops, jnp.int32))

  def unfinished(carry: Any):
    t, _, done_B, *_ = carry
    return (t < max_new_tokens) & ~jnp.all(done_B)

  def step(carry: Any):
    t, tokens_BL, done_B, cache, seen_BV = carry
    logits_BV, cache = advance(cache, tokens_BL, t)
    new_B, seen_BV = draw(logits_BV, t, seen_BV)
    if stops:
      new_B = jnp.where(done_B, stops[0], new_B)
      done_B |= jnp.isin(new_B, jnp.array(stops, jnp.int32))
    return t + 1, tokens_BL.at[:, t].set(new_B), done_B, cache, seen_BV

  if stops:  # what an early end leaves
    tokens_BL = tokens_BL.at[:, 1:].set(stops[0])
  return jax.lax.while_loop(
      unfinished, step, (jnp.ones((), jnp.int32), tokens_BL, done_B,
                         cache, seen_BV))[1]


def begin(module: nn.Module, params: Any, prompts_BL: jax.Array,
          lengths_B: jax.Array, room: int, *,
          source_BM: Optional[jax.Array] = None,
          source_lengths_B: Optional[jax.Array] = None,
          prefix_B: Optional[jax.Array] = None, copies: int = 1
          ) -> tuple[jax.Array, Any, Callable]:
  """Reads the prompts, and the sources of an encoder-decoder.

  Args:
    module, params, prompts_BL, lengths_B: as those of `generate`.
    room: how many tokens may follow.
    source_BM: what an encoder-decoder reads, padded on the right. It is
      encoded once; the prompts are the beginnings of the targets.
    source_lengths_B: how many of each row are its source.
    prefix_B: of a decoder, how many tokens of each prompt see each other, at
      most all of them (a prefix LM: its whole prompt); None: none.
    copies: how many texts follow each prompt; they have rows of their own.

  Returns:
    The logits of the first new tokens, [B, V]; a cache with room for all; and
    (cache, the new tokens, how many of them there are) -> the logits of the
    next ones, and the cache, where the last one has been read.
  """
  apply: Callable[..., Any] = module.apply
  cache = architectures.init_cache(module.config, prompts_BL.shape[0],
                                   prompts_BL.shape[1] + room)
  options: dict[str, Any] = dict(cache=cache, lengths_B=lengths_B)
  fixed: dict[str, jax.Array] = {}  # what every step is given
  before: tuple[None, ...] = ()
  places = 'positions_BL'
  real = lambda tokens, lengths_B: (
      jnp.arange(tokens.shape[1])[None] < lengths_B[:, None]).astype(jnp.int32)
  if source_BM is None:
    options['prefix_B'] = prefix_B
    if blocks.with_state(module.config):
      options['valid_BL'] = real(prompts_BL, lengths_B)
  else:
    before, places = (None,), 'decoder_positions_BL'
    fixed = dict(segment_ids_BM=real(source_BM, source_lengths_B))
    options['memory'], _ = apply({'params': params}, source_BM, method='encode',
                                 lengths_B=source_lengths_B, **fixed)
  output = apply({'params': params}, *before, prompts_BL, **fixed, **options)
  last_B1D = jnp.take_along_axis(
      output.hidden, (lengths_B - 1)[:, None, None], axis=1)
  assert output.head is not None  # objectives with a prompt train none else
  logits_BV = output.head.logits(last_B1D)[:, 0]
  cache, apart = output.cache, _apart(module)
  if apart:
    params, cache = one_by_one(params, cache)
  if copies > 1:
    cache = jax.tree.map(lambda x: jnp.repeat(x, copies, int(not apart)), cache)
    prompts_BL, lengths_B, prefix_B, fixed = jax.tree.map(
        lambda x: jnp.repeat(x, copies, 0),
        (prompts_BL, lengths_B, prefix_B, fixed))

  def advance(cache: Any, new_BT: jax.Array, t: jax.Array):
    cache = _reread(module, params, cache, prompts_BL, lengths_B, prefix_B,
                    new_BT, t)
    token_B1 = jax.lax.dynamic_slice_in_dim(new_BT, t - 1, 1, 1)
    places_B1 = (lengths_B + t - 1)[:, None]
    output = apply({'params': params}, *before, token_B1, cache=cache,
                   one_by_one=apart, **{places: places_B1}, **fixed)
    return output.head.logits(output.hidden)[:, 0], output.cache

  return logits_BV, cache, advance


def _apart(module: Any) -> bool:
  """Whether the layers of a step follow one another in the program."""
  return module.config.num_decoder_layers <= UNROLLED_LAYERS


def rereads_at(module: Any) -> tuple[int, ...]:
  """Returns the lengths, ascending, past which a text is read again."""
  return positions.lengths_apart(module.config) if module.REREADS else ()


def _reread(module: nn.Module, params: Any, cache: Any, prompts_BL: jax.Array,
            lengths_B: jax.Array, prefix_B: Optional[jax.Array],
            new_BT: jax.Array, t: jax.Array) -> Any:
  """Returns the cache where the model has yet to read the last of `t` new
  tokens. Rows that this token makes longer than one of `rereads_at` are read
  again up to there.

  Args:
    module, params, prompts_BL, lengths_B, prefix_B: as those of `generate`.
    cache: what holds the tokens before it.
    new_BT: the new tokens, of which T may be written.
    t: how many of them there are.
  """
  (B, T), apart = new_BT.shape, _apart(module)
  M = prompts_BL.shape[1] + T
  ends = [n for n in rereads_at(module) if n < M - 1]
  if not ends:
    return cache
  outgrown_B = jnp.isin(lengths_B + t, jnp.array(ends) + 1)

  def again() -> Any:
    places_BT = lengths_B[:, None] + jnp.arange(T)[None]
    texts_BM = jnp.pad(prompts_BL, ((0, 0), (0, T))).at[
        jnp.arange(B)[:, None], places_BT].set(new_BT)
    read_BM = jnp.arange(M)[None] < (lengths_B + t - 1)[:, None]
    output: Any = module.apply(
        {'params': params}, texts_BM, cache=jax.tree.map(jnp.zeros_like, cache),
        valid_BL=read_BM.astype(jnp.int32), lengths_B=lengths_B + t,
        prefix_B=prefix_B, one_by_one=apart)
    rows = outgrown_B if apart else outgrown_B[None]
    return jax.tree.map(lambda new, old: jnp.where(jnp.expand_dims(
        rows, range(rows.ndim, new.ndim)), new, old), output.cache, cache)

  return jax.lax.cond(outgrown_B.any(), again, lambda: cache)


def stops_of(stop: int | tuple[int, ...] | None) -> tuple[int, ...]:
  """Returns the tokens that end a text."""
  return () if stop is None else stop if isinstance(stop, tuple) else (stop,)


def until(row: np.ndarray, stop: int | tuple[int, ...]) -> np.ndarray:
  """Returns the tokens of a row before the first that is `stop`, or in it."""
  ends = np.flatnonzero(np.isin(row, stops_of(stop)))
  return row[:ends[0]] if ends.size else row


def before(text: str, stops: Sequence[str]) -> str:
  """Returns a text up to the first of the stop strings in it."""
  places = [place for stop in stops if (place := text.find(stop)) >= 0]
  return text[:min(places, default=len(text))]


NEVER = -1e9  # of what may not be chosen; finite, as in transformers
MOST = 1000  # beams
# What a length counts as: 1 for one token. gnmt: Wu et al. 2016, equation 14,
# as the Transformer's paper has it; power: transformers' length_penalty, whose
# default is 1, the mean log-probability of a token.
PENALTIES: dict[str, Callable] = {
    'gnmt': lambda length: (5 + length) / 6,
    'power': lambda length: length,
}


@dataclasses.dataclass(frozen=True)
class Beams:
  """How the likeliest texts are searched.

  Attributes:
    count: K, how many texts are followed at once. The Transformer's paper has
      4 (Vaswani et al. 2017, section 6.1).
    length_penalty: the exponent alpha of the penalty; 0: none. The paper has
      0.6.
    penalty: an entry of PENALTIES: which penalty of a length.
  """
  count: int = 4
  length_penalty: float = 0.6
  penalty: str = 'gnmt'

  def __post_init__(self):
    check_number('beams', self.count, (('>=', 1), ('<=', MOST)))
    one_of('penalty', self.penalty, PENALTIES)
    check_number('length_penalty', self.length_penalty,
                 (('>=', -10), ('<=', 10)))

  def divisor(self, length: jax.Array | int) -> jax.Array | float:
    """Returns what the log-probability of so many tokens is divided by."""
    return PENALTIES[self.penalty](length) ** self.length_penalty


class _Texts(NamedTuple):
  """K texts of each row: their new tokens, and their scores."""
  tokens_BKT: jax.Array
  score_BK: jax.Array


class _State(NamedTuple):
  """Running texts by log-probability; those that ended by score, and which of
  their K places hold one; rows that may yet find a better one."""
  running: _Texts
  ended: _Texts
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
    module, params, prompts_BL, lengths_B, **inputs: as those of `generate`.
    max_new_tokens: T.
    beams: how to search.
    stop_token: ends a text, which is filled up with it; or several, of which
      the first fills up. A text of T tokens ends there.

  Returns:
    ([B, K, T] new tokens, [B, K] scores), the best text first. Where there are
    fewer than K texts, the scores of the others are NEVER or less.

  Raises:
    ValueError: where learned positions do not reach L + T.
  """
  chex.assert_rank([prompts_BL, lengths_B], [2, 1])
  B, K, T = len(prompts_BL), beams.count, max_new_tokens
  module = module.clone(config=without_capacity(module.config))
  logits_BV, cache, advance = begin(
      module, params, prompts_BL, lengths_B, T, copies=K, **inputs)
  stops = stops_of(stop_token)
  choose = functools.partial(_choose, beams, stops)
  # Of the first step one beam counts: the others would be the same.
  state, _ = choose(_start(B, K, T, stops), jnp.repeat(
      logits_BV[:, None], K, 1), 0)

  def unfinished(carry: Any):
    t, state, _ = carry
    return (t < T) & state.open_B.any()

  def step(carry: Any):
    t, state, cache = carry
    logits, cache = advance(
        cache, state.running.tokens_BKT.reshape(B * K, T), t)
    state, parent_BK = choose(state, logits.reshape(B, K, -1), t)
    rows = (parent_BK + K * jnp.arange(B)[:, None]).reshape(-1)
    return t + 1, state, _reorder(cache, rows, int(not _apart(module)))

  state = jax.lax.while_loop(
      unfinished, step, (jnp.ones((), jnp.int32), state, cache))[1]
  return state.ended.tokens_BKT, state.ended.score_BK


def _start(B: int, K: int, T: int, stops: tuple[int, ...]) -> _State:
  tokens_BKT = jnp.full((B, K, T), stops[0] if stops else 0, jnp.int32)
  never_BK = jnp.full((B, K), NEVER)
  return _State(_Texts(tokens_BKT, never_BK.at[:, 0].set(0)),
                _Texts(tokens_BKT, never_BK), jnp.zeros((B, K), bool),
                jnp.ones(B, bool))


def _choose(beams: Beams, stops: tuple[int, ...], state: _State,
            logits_BKV: jax.Array, t: jax.Array | int
            ) -> tuple[_State, jax.Array]:
  """Adds token t to the running texts.

  Returns:
    the state; and [B, K], which running text each one goes on from.
  """
  B, K, V = logits_BKV.shape
  T = state.running.tokens_BKT.shape[2]
  score_BKV = (state.running.score_BK[..., None]
               + jax.nn.log_softmax(logits_BKV, -1))
  # So many that K at least go on, whichever end.
  count = K * min(max(2, 1 + len(stops)), V)
  score_BC, place_BC = jax.lax.top_k(score_BKV.reshape(B, K * V), count)
  parent_BC, token_BC = place_BC // V, place_BC % V
  tokens = _take(state.running.tokens_BKT, parent_BC).at[:, :, t].set(token_BC)
  ends_BC = jnp.broadcast_to(t + 1 == T, token_BC.shape)
  if stops:
    ends_BC |= jnp.isin(token_BC, jnp.array(stops, jnp.int32))

  going_BC = jnp.where(ends_BC, NEVER + score_BC, score_BC)
  score_BK, chosen_BK = jax.lax.top_k(going_BC, K)
  running = _Texts(_take(tokens, chosen_BK), score_BK)

  # A text that ends counts where it is one of the K best, and where its row
  # is not done. (Those below NEVER go on from a text that is none.)
  best_1C = jnp.arange(score_BC.shape[1])[None] < K
  new_BC = ends_BC & best_1C & (score_BC > NEVER / 2)
  final_BC = jnp.where(new_BC & state.open_B[:, None],
                       score_BC / beams.divisor(t + 1), NEVER)
  score_BK, kept_BK = jax.lax.top_k(
      jnp.concatenate([state.ended.score_BK, final_BC], 1), K)
  ended = _Texts(
      _take(jnp.concatenate([state.ended.tokens_BKT, tokens], 1), kept_BK),
      score_BK)
  full_BK = jnp.take_along_axis(
      jnp.concatenate([state.full_BK, new_BC], 1), kept_BK, 1)
  hope_B = running.score_BK[:, 0] / beams.divisor(t + 1)
  worst_B = jnp.where(full_BK.all(1), ended.score_BK.min(1), NEVER)
  return (_State(running, ended, full_BK, state.open_B & (hope_B > worst_B)),
          jnp.take_along_axis(parent_BC, chosen_BK, 1))


def _take(tokens_BCT: jax.Array, chosen_BK: jax.Array) -> jax.Array:
  return jnp.take_along_axis(tokens_BCT, chosen_BK[..., None], 1)


def _reorder(cache: Any, rows: jax.Array, axis: int) -> Any:
  """Returns the cache whose rows are those of the texts that go on; the beams
  of a row share what is kept of its memory."""
  take = lambda x: jnp.take(x, rows, axis)
  def of(entry: Any) -> Any:
    if not isinstance(entry, Cache):  # an array of a state
      return take(entry)
    key, value, index, inputs = jax.tree.map(take, (
        entry.key_BMJK, entry.value_BMJK, entry.index_BMJK, entry.inputs))
    return dataclasses.replace(
        entry, key_BMJK=key, value_BMJK=value, index_BMJK=index, inputs=inputs)
  return jax.tree.map(of, cache, is_leaf=lambda x: isinstance(x, Cache))


def write_diffusion(module: nn.Module, params: Any, prompts_BL: jax.Array,
          lengths_B: jax.Array, key: jax.Array, *, new: int, steps: int,
          mask: int, temperature: float) -> jax.Array:
  """Returns the text that follows each prompt, int32 [B, new].

  Args:
    module: an encoder that gives logits of tokens.
    params: its parameters.
    prompts_BL: prompts, padded on the right.
    lengths_B: how many tokens of each row are its prompt's.
    key: of the draws.
    new: tokens to write.
    steps: of unmasking; more than `new` are as many.
    mask: the id that stands for a masked token, which is never written.
    temperature: of the draws; 0: the likeliest token.
  """
  module = module.clone(config=without_capacity(
      module.config))  # type: ignore[attr-defined]
  steps, L = min(steps, new), prompts_BL.shape[1]
  places_L = jnp.arange(L + new)[None]
  ends_B1 = lengths_B[:, None] + new
  asked_BL = (places_L >= lengths_B[:, None]) & (places_L < ends_B1)
  real_BL = (places_L < ends_B1).astype(jnp.int32)
  tokens_BL = jnp.where(asked_BL, mask, jnp.pad(prompts_BL, ((0, 0), (0, new))))

  def step(s: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    masked_BL = asked_BL & (tokens_BL == mask)
    output: Any = module.apply({'params': params}, tokens_BL,
                               segment_ids_BL=real_BL,
                               lengths_B=ends_B1[:, 0])
    logits_BLV = output.logits.at[..., mask].set(-jnp.inf)
    drawn_BLV = logits_BLV
    if temperature:
      drawn_BLV = logits_BLV / temperature + jax.random.gumbel(
          jax.random.fold_in(key, s), logits_BLV.shape)
    filled_BL = drawn_BLV.argmax(-1).astype(tokens_BL.dtype)
    sure_BL = jnp.take_along_axis(
        jax.nn.softmax(logits_BLV, -1), filled_BL[..., None], -1)[..., 0]
    sure_BL = jnp.where(masked_BL, sure_BL, jnp.where(asked_BL, 2.0, -1.0))
    stays_BL = among_largest(sure_BL, new * (s + 1) // steps)
    return jnp.where(masked_BL & stays_BL, filled_BL, tokens_BL)

  tokens_BL = jax.lax.fori_loop(0, steps, step, tokens_BL)
  return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(
      row, start, new))(tokens_BL, lengths_B)


def among_largest(x_BL: jax.Array, count: jax.Array | int) -> jax.Array:
  """Returns which `count` of each row are the largest, bool [B, L]; of equal
  ones, the first."""
  order_BL = jnp.argsort(-x_BL, axis=1, stable=True)
  return jnp.argsort(order_BL, axis=1) < count
