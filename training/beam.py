"""Beam search: the likeliest texts, of those that a few beams come upon.

Each step extends every running text by every token and keeps the K best of
those that go on. A text that ends is finished if it is among the K best of all,
and the K finished texts with the best scores are kept. The score of a text is
its log-probability over a penalty of its length, so that a short text is not
better for being short. The loop is that of transformers' `generate` with
num_beams: token for token the same (tests/parity).
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, Optional

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts.attention.cache import Cache
from architectures.parts.moe.layer import without_capacity
from architectures.parts.skeletons import one_by_one
from configs.errors import one_of, require
from training import generate

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
    early_stopping: whether a row is done when it has K finished texts. If not,
      it goes on until the best running text, were it to end now, would not
      beat the worst finished one.
  """
  count: int = 4
  length_penalty: float = 0.6
  penalty: str = 'gnmt'
  early_stopping: bool = False

  def __post_init__(self):
    require(1 <= self.count <= MOST,
            f'beams is {self.count}: choose 1 to {MOST}')
    one_of('penalty', self.penalty, PENALTIES)
    require(-10 <= self.length_penalty <= 10, f'length_penalty is '
            f'{self.length_penalty}: choose -10 to 10')

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
def search(module: nn.Module, params: Any, prompts_BL: jax.Array,
           lengths_B: jax.Array, *, max_new_tokens: int,
           beams: Beams = Beams(),
           stop_token: int | tuple[int, ...] | None = None,
           source_BM: Optional[jax.Array] = None,
           source_lengths_B: Optional[jax.Array] = None,
           prefix_B: Optional[jax.Array] = None
           ) -> tuple[jax.Array, jax.Array]:
  """Continues each prompt by the likeliest texts of up to T tokens.

  Args:
    module, params, prompts_BL, lengths_B, source_BM, source_lengths_B,
      prefix_B: as those of generate.generate.
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
  output, advance, fixed = generate.begin(
      module, params, prompts_BL, lengths_B, T, source_BM=source_BM,
      source_lengths_B=source_lengths_B, prefix_B=prefix_B)
  last_B1D = jnp.take_along_axis(
      output.hidden, (lengths_B - 1)[:, None, None], axis=1)
  logits_BV = output.head.logits(last_B1D)[:, 0]
  stops = generate.stops_of(stop_token)
  choose = functools.partial(_choose, beams, stops)
  # Of the first step one beam counts: the others would be the same.
  state, _ = choose(_start(B, K, T, stops), jnp.repeat(
      logits_BV[:, None], K, 1), 0)

  places_B = jnp.repeat(lengths_B, K)
  fixed = jax.tree.map(lambda x: jnp.repeat(x, K, 0), fixed)
  cache, axis = output.cache, 1
  if apart := module.config.num_decoder_layers <= generate.UNROLLED_LAYERS:
    (params, cache), axis = one_by_one(params, cache), 0
  cache = jax.tree.map(lambda x: jnp.repeat(x, K, axis), cache)

  def unfinished(carry: Any):
    t, state, _ = carry
    return (t < T) & ~_done(state, beams)

  def step(carry: Any):
    t, state, cache = carry
    token_BK = jax.lax.dynamic_index_in_dim(state.running.tokens_BKT, t - 1, 2,
                                            keepdims=False)
    output = advance(params, token_BK.reshape(B * K, 1),
                     (places_B + t - 1)[:, None], fixed, cache=cache,
                     one_by_one=apart)
    logits = output.head.logits(output.hidden)[:, 0].reshape(B, K, -1)
    state, parent_BK = choose(state, logits, t)
    rows = (parent_BK + K * jnp.arange(B)[:, None]).reshape(-1)
    return t + 1, state, _reorder(output.cache, rows, axis)

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
  more_B = state.open_B
  if beams.early_stopping:
    more_B &= ~state.full_BK.all(1)
  new_BC = ends_BC & best_1C & (score_BC > NEVER / 2)
  final_BC = jnp.where(new_BC & more_B[:, None],
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


def _done(state: _State, beams: Beams) -> jax.Array:
  done = ~state.open_B.any()
  return done | state.full_BK.all() if beams.early_stopping else done


def _take(tokens_BCT: jax.Array, chosen_BK: jax.Array) -> jax.Array:
  return jnp.take_along_axis(tokens_BCT, chosen_BK[..., None], 1)


def _reorder(cache: Any, rows: jax.Array, axis: int) -> Any:
  """Returns the cache whose rows are those of the texts that go on; the beams
  of a row share what is kept of its memory."""
  take = lambda x: jnp.take(x, rows, axis)
  def of(entry: Any) -> Any:
    if not isinstance(entry, Cache):  # an array of a state
      return take(entry)
    key, value, inputs = jax.tree.map(
        take, (entry.key_BMJK, entry.value_BMJK, entry.inputs))
    return entry.replace(key_BMJK=key, value_BMJK=value, inputs=inputs)
  return jax.tree.map(of, cache, is_leaf=lambda x: isinstance(x, Cache))
