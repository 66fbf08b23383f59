"""Linear recurrences: a state of one size stands for all tokens before.

  S_t = A_t S_t-1 + k_t d_t^T        the state of a head, [K, U]
  o_t = S_t^T q_t                    what is read of it
  d_t = v_t                          what is written: the value as it is, or
  d_t = b_t (v_t - (A_t S_t-1)^T k_t)  what corrects the value that k_t finds

The last is the delta rule, S_t = (I - b_t k_t k_t^T) A_t S_t-1 + b_t k_t v_t^T
(Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464; theirs is the transposed
state). A is a diagonal matrix, the decays: one number for a head, or one for
each feature of its keys. A and the rate b tell the members of the family apart:

                 no decay          one of a head    one of each feature
  no rate        linear attention  RetNet, Mamba-2  GLA
  a rate         DeltaNet          Gated DeltaNet   KDA

Further forms are run by the same code. A correction may read the state by
another vector e than the key, with a rate or with b = 1, and with one decay of
a head it may read the state before that has decayed (Comba):

  d_t = b_t (v_t - (A_t S_t-1)^T e_t)   or   d_t = b_t (v_t - S_t-1^T e_t)

And a token may take several steps, of which the first alone decays, and whose
last state is read: its transition is then a product (DeltaProduct, RWKV-7).
FLOPs are those of all steps, but what is read after the last alone.

A decay is given as its logarithm, -inf for 0, which forgets all. Only decays
of places that lie between two others are added up: 0 is exact, and a large one
takes no digits from those after it.

`run` computes a row in pieces of P places. Within a piece all that is written
follows from the state before it by one triangular system, the UT transform
(Yang et al. 2024, arXiv 2406.06484; with decays, 2412.06464):

  d_i + sum over j < i of A_ij d_j = b_i (v_i - D_i S^T k_i)
  A_ij = b_i P_ij k_i^T k_j

where P_ij is the decay after j up to i, and D_i that of the piece up to i.
Where features have decays of their own, P_ij is inside the product of the two
keys, and pieces.py computes it.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts.recurrent import features, pieces
from architectures.parts.recurrent.pieces import Inputs

MOST_PLACES = 64  # of a piece at most
FEWEST_PLACES = 16  # of one at most, where keys are small
# Places that meet at once where each feature has a decay: such a piece takes a
# copy of its keys for each time that it is halved.
PLACES_AT_ONCE = 256
# So few numbers, the decays of all pieces, meet at once: on CPU the loop over
# groups takes up to a fifth of KDA's time, and nearly half of GLA's.
MOST_DECAYS_AT_ONCE = 1 << 20


def run_recurrence(x: Inputs, state_BHKU: Optional[jax.Array] = None, *,
                   places: Optional[int] = None
                   ) -> tuple[jax.Array, jax.Array]:
  """Runs a linear recurrence over rows of tokens.

  Args:
    x: queries, keys, values, decays and rates, of any dtypes; everything is
      computed in float32. L is the number of tokens.
    state_BHKU: the state before the first place; None: zero.
    places: the most places of a piece; default: `default_places`. All pieces of
      a row are equally long; if each feature has a decay, their length is the
      next power of 2.

  Returns:
    What is read at each token, float32 [B, L, H, U], and the state after the
    last, float32 [B, H, K, U].
  """
  B, L, H, U = x.v_BLHU.shape
  J, K = x.k_BLJK.shape[2:]
  assert H % J == 0, (H, J)
  steps = x.steps
  tokens = x.q_BLJK.shape[1]

  # Without a decay, its logarithm is 0; without a state, that is zero.
  if x.log_decay_BLHK is None:
    x = x._replace(log_decay_BLHK=jnp.zeros((B, tokens, H, 1)))
  assert x.log_decay_BLHK.shape[-1] in (1, K), x.log_decay_BLHK.shape
  if x.undecayed_BL1 is not None:
    assert steps == 1 and not has_decay_per_feature(x.log_decay_BLHK), steps
  if state_BHKU is None:
    state_BHKU = jnp.zeros((B, H, K, U))
  # If the state is a constant of the program, XLA's CPU backend (jaxlib 0.10
  # and 0.12) joins several products into kernels that return whatever is in
  # memory: 1e29 with 8 heads and 32 tokens.
  state_BHKU = jax.lax.optimization_barrier(state_BHKU)

  # A token's state decays in its first step, and is read after its last.
  if steps > 1:
    x = x._replace(
        q_BLJK=_spread_over_steps(steps - 1, steps, x.q_BLJK),
        log_decay_BLHK=_spread_over_steps(0, steps, x.log_decay_BLHK))

  # One token, as in decoding, is computed by the definition.
  if tokens == 1:
    for i in range(steps):
      o_BLHU, state_BHKU = _take_step(i, x, state_BHKU)
    return o_BLHU, state_BHKU

  # A row is computed in pieces of equal length.
  places = _length_of_pieces(x, most=places)
  is_additive = not x.has_delta_rule
  with pieces.count_flops_without_padding(places, L):
    if is_additive and not has_decay_per_feature(x.log_decay_BLHK):
      assert steps == 1, steps
      return _run_additive(places, x, state_BHKU)
    o_BLHU, state_BHKU = _run_in_pieces(places, steps, x, state_BHKU)
  if steps > 1:
    o_BLHU = o_BLHU[:, steps - 1::steps]
  return o_BLHU, state_BHKU


def _length_of_pieces(x: Inputs, most: Optional[int]) -> int:
  """Returns the length of the pieces in which a row is computed. They are as
  few as can be and equally long, so that little is computed for padding. Where
  each feature of a key has a decay, a piece is halved again and again, so its
  length is rounded up to a power of 2.

  The suffixes name axes: B batch, L length, J heads of keys, H heads of values,
  K features of a key, U features of a value.

  Args:
    x: the inputs of the recurrence.
    most: the most places that a piece may have; None: `default_places`.
  """
  length = x.v_BLHU.shape[1]
  if most is None:
    most = default_places(x.k_BLJK.shape[-1])
  num_pieces = -(-length // most)  # rounded up
  places = -(-length // num_pieces)
  if has_decay_per_feature(x.log_decay_BLHK):
    places = 1 << (places - 1).bit_length()
  return places


def _spread_over_steps(step: int, steps: int, x_BL: jax.Array) -> jax.Array:
  """Gives numbers of tokens to one step of each token, where a recurrence takes
  several steps for each token. The other steps get zeros.

  Args:
    step: which step of a token gets the numbers.
    steps: how many steps a token has.
    x_BL: the numbers, [B rows, L tokens, ...].

  Returns:
    An array [B, L * steps, ...].
  """
  B, L, *rest = x_BL.shape
  no_padding = [(0, 0)] * len(rest)
  other_steps = step, steps - 1 - step
  by_step = jnp.pad(x_BL[:, :, None],
                    ((0, 0), (0, 0), other_steps, *no_padding))
  return by_step.reshape(B, L * steps, *rest)


def default_places(K: int) -> int:
  """Returns the most places of a piece: half as many as a key has features. The
  states between pieces are then as large, beside the inputs, for all K."""
  return min(MOST_PLACES, max(FEWEST_PLACES, K // 2))


def has_decay_per_feature(log_decay: jax.Array) -> bool:
  """Whether each feature of a key has a decay of its own."""
  return log_decay.shape[-1] > 1


def _take_step(i: int, x: Inputs, state_BHKU: jax.Array
               ) -> tuple[jax.Array, jax.Array]:
  """Computes a single step of a linear recurrence by its definition, with a
  state S, decays a, rates b, queries q, keys k and values v:

    S' = a S,   d = v  or, by the delta rule,  d = b (v - S'^T e)
    S  = S' + k d^T,   o = S^T q

  Here e is the key or another vector (`erase`). Some corrections read the state
  S before its decay, and not S'. A decay or rate that the recurrence lacks
  counts as 1.

  The suffixes name axes: B batch, H heads of values, J heads of keys, K
  features of a key, U features of a value.

  Args:
    i: the index of the step in the row.
    x: the inputs of all steps.
    state_BHKU: the state before the step.

  Returns:
    o, which is what the step reads, [B, 1, H, U]; and the state after it.
  """
  # The inputs of this step, in the order of `Inputs`, which lack the axis L.
  (q_BJK, k_BJK, v_BHU, log_decay_BHK, rate_BH, erase_BJK,
   undecayed_B1) = jax.tree.map(lambda x: x[:, i].astype(jnp.float32), x)
  H = v_BHU.shape[1]
  q_BHK = _repeat_axis_of_heads(q_BJK, H)
  k_BHK = _repeat_axis_of_heads(k_BJK, H)

  # The state S' after its decay, and the one that a correction reads.
  read_BHKU = decayed_BHKU = jnp.exp(log_decay_BHK)[..., None] * state_BHKU
  if undecayed_B1 is not None:
    read_BHKU = undecayed_B1[..., None, None] * state_BHKU
  with layers.count_flops_as_useful_part(1, 1):
    # By the delta rule, what is written corrects the value that the key, or
    # `erase`, finds in the state.
    d_BHU = v_BHU
    if x.has_delta_rule:
      e_BHK = k_BHK
      if erase_BJK is not None:
        e_BHK = _repeat_axis_of_heads(erase_BJK, H)
      d_BHU = v_BHU - jnp.einsum('BHK,BHKU->BHU', e_BHK, read_BHKU)
    if rate_BH is not None:
      d_BHU = rate_BH[..., None] * d_BHU

    # Write to the state, and read it.
    new_BHKU = decayed_BHKU + jnp.einsum('BHK,BHU->BHKU', k_BHK, d_BHU)
    o_BHU = jnp.einsum('BHK,BHKU->BHU', q_BHK, new_BHKU)
  return o_BHU[:, None], new_BHKU


def _repeat_axis_of_heads(x_BJ: jax.Array, H: int) -> jax.Array:
  """Repeats heads of keys for the H heads of values that share them:
  [B, J, ...] -> [B, H, ...]."""
  J = x_BJ.shape[1]
  return jnp.repeat(x_BJ, H // J, axis=1)


class _Pairs(NamedTuple):
  """How the places i (axis P) of a piece meet the places before them, j (Q)."""
  weights_BHPQ: jax.Array  # how much of what j writes is read at i
  key_weights_BHPQ: Optional[jax.Array]  # how much of it the key at i finds
  first_BHPK: jax.Array  # the decay of the piece up to each place; K or 1
  after_BHPK: jax.Array  # and of the piece after it
  # The decay of the piece up to the state that each correction reads, where
  # that has not decayed at the place itself; None: first_BHPK.
  before_BHPK: Optional[jax.Array] = None

  @property
  def until_read(self) -> jax.Array:
    """Returns the decay of the piece up to what each correction reads."""
    if self.before_BHPK is None:
      return self.first_BHPK
    return self.before_BHPK


class _PieceEffects(NamedTuple):
  """The effect of pieces on any state. The first axis, which
  the names leave out, is that of the pieces of a row."""
  pairs: _Pairs
  q_BHPK: jax.Array  # times the decay since the piece began
  k_BHPK: jax.Array  # times the decay until it ends
  decay_BHK1: jax.Array  # of the whole piece; K or 1
  # d if the state before it were zero, and what that state takes from d.
  write_BHPU: jax.Array
  read_BHPK: Optional[jax.Array] = None
  inverse_BHPQ: Optional[jax.Array] = None  # of the triangular system


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_in_pieces(places: int, steps: int, x: Inputs, state_BHKU: jax.Array
                   ) -> tuple[jax.Array, jax.Array]:
  """Runs a linear recurrence in pieces (chunks) of a row. It may have the delta
  rule, or a decay for each feature of a key.

  The gradient is defined below. Only the inputs and the state before each piece
  are kept for it; the backward pass computes the rest again.

  The suffixes name axes: B batch, L places of a row, H heads of values, K
  features of a key, U features of a value. A place is a step of the recurrence.

  Args:
    places: how many places a piece has.
    steps: how many places belong to one token.
    x: the queries, keys, values, decays and rates.
    state_BHKU: the state before the first place.

  Returns:
    What is read at each place, float32 [B, L, H, U], and the state after the
    last.
  """
  results, _ = _run_in_pieces_forward(places, steps=steps, x=x,
                                      state_BHKU=state_BHKU)
  return results


def _run_in_pieces_forward(places: int, steps: int, x: Inputs,
                           state_BHKU: jax.Array) -> tuple[tuple, tuple]:
  """Runs a linear recurrence in pieces (chunks) of a row: the forward pass of
  `_run_in_pieces`.

  The suffixes name axes: B batch, H heads of values, P and Q places of a piece
  (a place is a step of the recurrence), K features of a key, U features of a
  value.

  Args:
    places: P, how many places a piece has.
    steps: how many places belong to one token.
    x: the queries, keys, values, decays and rates of rows.
    state_BHKU: the state before the first place.

  Returns:
    The results: what is read at each place, and the state after the last. And
    what the backward pass needs: the inputs, and the state before each piece,
    [pieces, B, H, K, U].
  """
  # The effect of each piece on the state is computed for all pieces at once.
  cut = _cut_inputs(places, x)
  effects = _effects_of_pieces(cut, _meet_places(steps, cut))

  def add_piece(state_BHKU: jax.Array, piece: Any):
    """Adds a piece to the state before it: S <- decay S + k^T d."""
    k_BHPK, decay_BHK1, write_BHPU, read_BHPK = piece
    if read_BHPK is not None:
      write_BHPU -= read_BHPK @ state_BHKU
    after_BHKU = decay_BHK1 * state_BHKU + _transpose(k_BHPK) @ write_BHPU
    return after_BHKU, (write_BHPU, state_BHKU)

  # Go through the pieces in order, for the states between them and what each
  # place writes.
  with layers.count_flops_as_useful_part(1, 1):
    last_BHKU, (write, states) = jax.lax.scan(
        add_piece, state_BHKU,
        (effects.k_BHPK, effects.decay_BHK1, effects.write_BHPU,
         effects.read_BHPK))

  # Each place reads the state before its piece, and what the places of its
  # piece have written before it.
  with layers.count_flops_as_useful_part(1, steps):
    o_BHPU = effects.q_BHPK @ states
  with layers.count_flops_as_useful_part(places + steps, 2 * places * steps):
    o_BHPU += effects.pairs.weights_BHPQ @ write
  length = x.v_BLHU.shape[1]
  return (_join_pieces(o_BHPU, length), last_BHKU), (x, states)


def _run_in_pieces_backward(places: int, steps: int, kept: Any, grads: Any):
  """Returns the gradients of the inputs and of the first state.

  With S' = decay S + k^T d and o = q S + W d, where d = write - read S, they go
  through the pieces from the last to the first: dd = k dS' + W^T do, and dS =
  decay dS' + q^T do - read^T dd.

  The suffixes name axes: B batch, L length, H heads, K features of a key, U
  features of a value, P and Q places of a piece.

  Args:
    places: the number of places of a piece.
    steps: how many places belong to one token.
    kept: the inputs and the states before the pieces, from the forward pass.
    grads: the gradients of the results and of the last state.
  """
  x, states = kept
  d_o_BLHU, d_last_BHKU = grads
  d_o = pieces.cut_heads_into_pieces(places, d_o_BLHU)

  # The forward pass again, but for its states.
  cut, to_inputs = jax.vjp(functools.partial(_cut_inputs, places), x)
  pairs, to_met = jax.vjp(functools.partial(_meet_places, steps), cut)
  effects = _effects_of_pieces(cut, pairs)
  write = effects.write_BHPU
  if effects.read_BHPK is not None:
    write -= effects.read_BHPK @ states

  def pass_piece(d_state_BHKU: jax.Array, piece: Any):
    """Passes the gradient of the state after a piece to that before it."""
    k_BHPK, decay_BHK1, read_BHPK, d_write_BHPU, d_of_read_BHKU = piece
    d_write_BHPU += k_BHPK @ d_state_BHKU
    before_BHKU = decay_BHK1 * d_state_BHKU + d_of_read_BHKU
    if read_BHPK is not None:
      before_BHKU -= _transpose(read_BHPK) @ d_write_BHPU
    return before_BHKU, (d_write_BHPU, d_state_BHKU)

  d_write_by_o = _transpose(effects.pairs.weights_BHPQ) @ d_o
  d_state_by_o = _transpose(effects.q_BHPK) @ d_o
  d_first_BHKU, (d_write, d_states) = jax.lax.scan(
      pass_piece, d_last_BHKU,
      (effects.k_BHPK, effects.decay_BHK1, effects.read_BHPK, d_write_by_o,
       d_state_by_o), reverse=True)

  d_cut = _gradient_of_pieces(
      cut, effects=effects, write=write, states=states, d_o=d_o,
      d_write=d_write, d_states=d_states, to_met=to_met)
  d_x, = to_inputs(d_cut)
  return d_x, d_first_BHKU


_run_in_pieces.defvjp(_run_in_pieces_forward, _run_in_pieces_backward)


def _gradient_of_pieces(x: Inputs, effects: _PieceEffects, write: jax.Array,
                        states: jax.Array, d_o: jax.Array, d_write: jax.Array,
                        d_states: jax.Array, to_met: Callable) -> Inputs:
  """Returns the gradient of the inputs of all pieces.

  Args:
    x: the inputs, cut into pieces.
    effects: the effect of each piece.
    write: what each place writes, d, [pieces, B, H, P, U].
    states: the state before each piece, [pieces, B, H, K, U].
    d_o: the gradient of what is read, [pieces, B, H, P, U].
    d_write: the gradient of `write`.
    d_states: the gradient of the state after each piece.
    to_met: takes the gradient of the pairs of places to that of the inputs.
  """
  q, k, v, log_decay, rate, erase, _ = x
  pairs = effects.pairs
  for_value_heads = functools.partial(_repeat_for_value_heads, v.shape[2])
  per_feature = has_decay_per_feature(log_decay)

  def decay_gradient(x: jax.Array, d_x: jax.Array) -> jax.Array:
    """Returns the gradient of a decay that multiplies x: for each feature, or
    summed over features."""
    if per_feature:
      return jnp.multiply(x, d_x)
    return features.inner_products(x, d_x)[..., None]

  # Through the decayed queries and keys, which read and write states.
  d_q = d_o @ _transpose(states)
  d_k = write @ _transpose(d_states)
  d_first = decay_gradient(for_value_heads(q), d_q)
  d_after = decay_gradient(for_value_heads(k), d_k)
  d_k = _sum_over_value_heads(k, pairs.after_BHPK, d_k)

  # Through the triangular system of the delta rule: for X = (I + A)^-1,
  # dA = -X^T dX X^T.
  d_v = d_write
  d_rate = d_erase = d_key_weights = d_before = None
  if x.has_delta_rule:
    correction_keys = _correction_keys(x)
    decayed_keys = pairs.until_read * for_value_heads(correction_keys)
    d_v = _transpose(effects.inverse_BHPQ) @ d_write
    d_read = -d_v @ _transpose(states)
    d_system = -jnp.tril(
        d_v @ _transpose(effects.write_BHPU)
        + d_read @ _transpose(effects.read_BHPK), -1)
    d_key_weights = d_system

    # The rate multiplies the values, the keys and the system.
    if rate is not None:
      d_rate = (
          features.inner_products(d_v, v)
          + features.inner_products(d_read, decayed_keys)
          + features.inner_products(d_system, pairs.key_weights_BHPQ))
      d_key_weights = rate[..., None] * d_system
      d_v = rate[..., None] * d_v
      d_read = rate[..., None] * d_read
    d_until_read = decay_gradient(for_value_heads(correction_keys), d_read)
    if pairs.before_BHPK is None:
      d_first += d_until_read
    else:
      d_before = d_until_read
    d_correction_keys = _sum_over_value_heads(
        correction_keys, pairs.until_read, d_read)
    if erase is None:
      d_k += d_correction_keys
    else:
      d_erase = d_correction_keys

  # Through the decay of the whole piece, which is that up to its last place.
  d_last = features.inner_products(states, d_states)[..., None, :]
  if not per_feature:
    d_last = d_last.sum(-1, keepdims=True)
  P = q.shape[-2]
  d_first += jnp.pad(
      d_last, ((0, 0), (0, 0), (0, 0), (P - 1, 0), (0, 0)))

  # Through the pairs of places.
  d_pairs = _Pairs(weights_BHPQ=d_o @ _transpose(write),
                   key_weights_BHPQ=d_key_weights, first_BHPK=d_first,
                   after_BHPK=d_after, before_BHPK=d_before)
  d_x, = to_met(d_pairs)
  if d_erase is not None:
    d_x = d_x._replace(erase_BLJK=d_x.erase_BLJK + d_erase)
  return d_x._replace(
      q_BLJK=d_x.q_BLJK + _sum_over_value_heads(q, pairs.first_BHPK, d_q),
      k_BLJK=d_x.k_BLJK + d_k, v_BLHU=d_v, rate_BLH=d_rate)


def _correction_keys(x: Inputs) -> jax.Array:
  """Returns what a correction reads the state by, but for its rate."""
  if x.erase_BLJK is None:
    return x.k_BLJK
  return x.erase_BLJK


def _transpose(x: jax.Array) -> jax.Array:
  """Returns the transposed matrices of the last two axes."""
  return jnp.swapaxes(x, -1, -2)


def _repeat_for_value_heads(H: int, x: jax.Array) -> jax.Array:
  """Returns heads of keys for the H heads of values that they serve:
  [pieces, B, J, ...] -> [pieces, B, H, ...]."""
  return jnp.repeat(x, H // x.shape[2], 2)


def _sum_over_value_heads(x: jax.Array, factors: jax.Array, y: jax.Array
                          ) -> jax.Array:
  """Sums `factors * y` over the R heads of values that share a head of keys.

  The sums are einsums, because on CPU a plain product and sum takes 20 times as
  long.

  Args:
    x: an array with the heads of keys, [pieces, B, J, P, K], whose shape the
      result is to have.
    factors: [pieces, B, H, P, K], or one factor for all features,
      [pieces, B, H, P, 1], with H = J R heads of values.
    y: [pieces, B, H, P, K].

  Returns:
    The sums, [pieces, B, J, P, K].
  """
  if x.shape[2] == y.shape[2]:
    return factors * y
  # The heads that share a head of keys get an axis of their own:
  # [pieces, B, J, R, P, ...].
  factors = factors.reshape(*x.shape[:3], -1, *factors.shape[3:])
  y = y.reshape(*x.shape[:3], -1, *y.shape[3:])
  if factors.shape[-1] == 1:
    return jnp.einsum('...rp,...rpk->...pk', factors[..., 0], y)
  return jnp.einsum('...rpk,...rpk->...pk', factors, y)


def _cut_inputs(places: int, x: Inputs) -> Inputs:
  """Returns the inputs of each piece, [pieces, B, heads, P, ...]."""
  return jax.tree.map(
      functools.partial(pieces.cut_heads_into_pieces, places), x)


def _join_pieces(x: jax.Array, length: int) -> jax.Array:
  """Returns whole rows: [pieces, B, H, P, U] -> [B, L, H, U]."""
  x = jnp.moveaxis(x, (0, 2), (1, 3))
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _effects_of_pieces(x: Inputs, pairs: _Pairs) -> _PieceEffects:
  """Computes how each piece (chunk of a row) changes the state before it, as
  far as this does not depend on that state.

  With the delta rule, what the places (steps) of a piece write is the solution
  of a triangular system, the UT transform (Yang et al. 2024, arXiv 2406.06484).
  Its inverse is applied to the values and to the keys that read the state.

  The suffixes name axes: B batch, H heads of values, P and Q places of a piece,
  K features of a key, U features of a value; all after an axis of pieces.

  Args:
    x: the inputs, cut into pieces.
    pairs: the weights and decays between the places of each piece.
  """
  # Queries and keys, by the decays from the start of the piece and to its end.
  q, k, v, _, rate, erase, _ = x
  H = v.shape[2]
  P = k.shape[-2]
  q = _repeat_for_value_heads(H, q)
  k = _repeat_for_value_heads(H, k)
  effects = _PieceEffects(
      pairs=pairs, q_BHPK=pairs.first_BHPK * q, k_BHPK=pairs.after_BHPK * k,
      decay_BHK1=_transpose(pairs.first_BHPK[..., -1:, :]), write_BHPU=v)
  if not x.has_delta_rule:
    return effects

  # Invert the system. A rate multiplies its rows, and what it is solved for.
  if rate is None:
    solve = inverse = pieces.invert_system(pairs.key_weights_BHPQ)
  else:
    inverse = pieces.invert_system(rate[..., None] * pairs.key_weights_BHPQ)
    solve = inverse * rate[..., None, :]
  correction_keys = k
  if erase is not None:
    correction_keys = _repeat_for_value_heads(H, erase)
  with layers.count_flops_as_useful_part(P + 1, 2 * P):
    return effects._replace(
        write_BHPU=solve @ v,
        read_BHPK=solve @ (pairs.until_read * correction_keys),
        inverse_BHPQ=inverse)


def _meet_places(steps: int, x: Inputs) -> _Pairs:
  """Computes the weights by which the places (steps) of each piece of a row
  read what earlier places of the piece wrote, and the decays between them.

  The suffixes name axes: B batch, L length, J heads of keys, H heads of values,
  K features of a key.

  Args:
    steps: how many places belong to one token.
    x: the inputs, cut into pieces.

  Returns:
    The weights and the decays of all pieces.
  """
  if not has_decay_per_feature(x.log_decay_BLHK):
    return _meet_with_decay_per_head(steps, x)
  # With a decay for each feature this takes much memory, so that large inputs
  # are computed a few pieces at a time.
  num_pieces = x.k_BLJK.shape[0]
  places = x.k_BLJK.shape[-2]
  pieces_at_once = num_pieces
  if x.log_decay_BLHK.size > MOST_DECAYS_AT_ONCE:
    pieces_at_once = max(1, PLACES_AT_ONCE // places)
  return pieces.map_pieces_in_groups(
      functools.partial(_meet_with_decay_per_feature, steps), pieces_at_once, x)


def _meet_with_decay_per_head(steps: int, x: Inputs) -> _Pairs:
  """Computes the weights and decays between the places (steps) of each piece of
  a row, for the delta rule with one decay for each head.

  With decays a, queries q, keys k, and the vectors e by which corrections read
  the state (the keys, where there are no others), for places j <= i,

    weights_ij     = (a_j+1 ... a_i) q_i . k_j     how much of j is read at i
    key_weights_ij = (a_j+1 ... a_i) e_i . k_j     how much of j is corrected
                                                   at i, for j < i alone

  The suffixes name axes: B batch, H heads of values, P and Q places of a piece,
  K = 1 decay; all after an axis of pieces.

  Args:
    steps: how many places belong to one token.
    x: the inputs, cut into pieces, [pieces, batch, heads, P, ...].

  Returns:
    Both weights for each pair of places i (P) and j (Q) of a piece; the decays
    from the start of the piece up to each place (`first`), and from each place
    to the end of the piece (`after`); and those up to what a correction reads
    (`before`), where it reads the state before its decay.
  """
  H = x.v_BLHU.shape[2]
  P = x.k_BLJK.shape[-2]
  decay_between, decay_upto = pieces.decays_within_piece(
      x.log_decay_BLHK[..., 0])
  key_decay_between, before_BHPK = decay_between, None
  if x.undecayed_BL1 is not None:
    key_decay_between, before_BHPK = _decays_up_to_place_before(
        x.undecayed_BL1, decay_between=decay_between, decay_upto=decay_upto)

  # Queries, of which a token has one, with the keys of its own and of earlier
  # places: (P + steps) / 2 of the P places on average. Only these count as
  # FLOPs, and only the query of the token's last step.
  with layers.count_flops_as_useful_part(P + steps, 2 * P * steps):
    products = x.q_BLJK @ _transpose(x.k_BLJK)
    weights = decay_between * _repeat_for_value_heads(H, products)
  # The corrections of each place with the keys of earlier places alone: (P - 1)
  # / 2 of the P places on average.
  with layers.count_flops_as_useful_part(P - 1, 2 * P):
    key_products = _correction_keys(x) @ _transpose(x.k_BLJK)
    key_weights = key_decay_between * _repeat_for_value_heads(H, key_products)
  return _Pairs(weights_BHPQ=weights, key_weights_BHPQ=key_weights,
                first_BHPK=decay_upto[..., None],
                after_BHPK=decay_between[..., -1, :, None],
                before_BHPK=before_BHPK)


def _decays_up_to_place_before(
    undecayed: jax.Array, decay_between: jax.Array, decay_upto: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
  """Returns the decays of what a correction reads, where it reads the state as
  it was before its decay: those up to the place before, one place later.

  The shapes name axes: N pieces, B batch, H heads of values, P and Q places of
  a piece.

  Args:
    undecayed: what multiplies them, 0 where a document begins and else 1, [N,
      B, 1, P].
    decay_between: the product of the decays after place Q up to place P, [N, B,
      H, P, Q].
    decay_upto: the product of the decays from the start of the piece up to
      place P, [N, B, H, P].

  Returns:
    Both decays at each place P, of which the second has an axis more: [N, B, H,
    P, Q] and [N, B, H, P, 1].
  """
  # Before the first place of a piece no place of it has written, and the state
  # before the piece has not decayed.
  factor = undecayed[..., None]
  no_padding = [(0, 0)] * 3
  earlier_between = jnp.pad(decay_between[..., :-1, :],
                            (*no_padding, (1, 0), (0, 0)))
  between_until_read = factor * earlier_between
  earlier_upto = jnp.pad(decay_upto[..., :-1], (*no_padding, (1, 0)),
                         constant_values=1)
  upto_until_read = factor * earlier_upto[..., None]
  return between_until_read, upto_until_read


def _meet_with_decay_per_feature(steps: int, x: Inputs) -> _Pairs:
  """Computes the weights and decays between the places (steps) of a piece of a
  row, where each feature of a key has its own decay.

  The suffixes name axes: B batch, J heads of keys, H heads of values, P and Q
  places of a piece, K features of a key, U features of a value.

  Args:
    steps: how many places belong to one token.
    x: the inputs of a piece, [B, heads, P, ...].

  Returns:
    For each pair of places i and j <= i the weights by which i reads and
    corrects what j writes (the latter is None without the delta rule); and the
    decays from the start of the piece up to each place, and from it to the end.
  """
  q_BJPK, k_BJPK, v_BHPU, log_decay_BHPK = x[:4]
  H = v_BHPU.shape[1]

  # Multiply the queries and, for the delta rule, the vectors that read the
  # state for its correction, with the keys of all earlier places.
  q_BHPK = _repeat_axis_of_heads(q_BJPK, H)
  k_BHPK = _repeat_axis_of_heads(k_BJPK, H)
  rows = [q_BHPK]
  if x.erase_BLJK is not None:
    rows.append(_repeat_axis_of_heads(x.erase_BLJK, H))
  elif x.has_delta_rule:
    rows.append(k_BHPK)
  with layers.count_flops_as_useful_part(1, 1):
    products, upto_BHPK, after_BHPK = pieces.meet_earlier_places(
        rows, k_BHPK, log_decay_BHPK=log_decay_BHPK, steps=steps)

  # A query also meets the key of its own place, which has not decayed.
  with layers.count_flops_as_useful_part(1, steps):
    diagonal_BJP = jnp.einsum('BJPK,BJPK->BJP', q_BJPK, k_BJPK)
    diagonal_BHP = _repeat_axis_of_heads(diagonal_BJP, H)
  eye_PP = jnp.eye(q_BHPK.shape[2])
  weights_BHPQ = products[0] + diagonal_BHP[..., None] * eye_PP[None, None]
  key_weights_BHPQ = None
  if x.has_delta_rule:
    key_weights_BHPQ = products[1]
  return _Pairs(weights_BHPQ=weights_BHPQ, key_weights_BHPQ=key_weights_BHPQ,
                first_BHPK=jnp.exp(upto_BHPK), after_BHPK=jnp.exp(after_BHPK))


# Recurrences that add to the state, whatever it is: there is no delta rule, and
# a head has one decay (Mamba-2: Dao and Gu 2024, arXiv 2405.21060, section 6;
# RetNet: Sun et al. 2023, arXiv 2307.08621). Such a decay multiplies values and
# outputs as well as keys and queries, and queries and keys are shared by R
# heads of values, whose states stand side by side here, [K, R, U]. So each
# product with the states of a piece is one for all R heads, and nothing is
# copied for each of them: with the eight heads of Mamba-2's default on CPU,
# copies of queries and keys are as large as the states.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_additive(places: int, x: Inputs, state_BHKU: jax.Array
                  ) -> tuple[jax.Array, jax.Array]:
  """Runs a linear recurrence that only adds to its state, with one decay a for
  each head (as Mamba-2 and RetNet), in pieces (chunks) of a row:

    S_t = a_t S_t-1 + k_t v_t^T,   o_t = S_t^T q_t

  The gradient is defined below. Only the inputs and the state before each piece
  are kept for it.

  The suffixes name axes: B batch, L places of a row, H heads of values, K
  features of a key, U features of a value.

  Args:
    places: how many places (steps of the recurrence) a piece has.
    x: the queries, keys, values and decays.
    state_BHKU: the state before the first place.

  Returns:
    What is read at each place, float32 [B, L, H, U], and the state after the
    last.
  """
  results, _ = _run_additive_forward(places, x, state_BHKU)
  return results


def _run_additive_forward(places: int, x: Inputs, state_BHKU: jax.Array
                          ) -> tuple[tuple, tuple]:
  """Runs a linear recurrence S_t = a_t S_t-1 + k_t v_t^T, o_t = S_t^T q_t in
  pieces (chunks) of a row: the forward pass of `_run_additive`.

  In the einsums n are the pieces, b the batch, p and m the places (steps) of a
  piece, j the heads of keys, r the heads of values that share one, k and u the
  features of keys and values. Suffixes name the same axes in capitals, and H
  all heads of values.

  Args:
    places: how many places a piece has.
    x: the queries, keys, values and decays of rows.
    state_BHKU: the state before the first place.

  Returns:
    The results: what is read at each place, [B, L, H, U], and the state after
    the last. And what the backward pass needs: the inputs, and the state before
    each piece, [pieces, B, J, K, R, U].
  """
  # The decays between two places of a piece, from the start of the piece up to
  # a place, and from a place to the end of the piece.
  q, k, v, log_decay = _cut_inputs_by_key_head(places, x)
  between, upto, after = _decays_of_heads(log_decay)

  # Each place reads what its piece has written up to itself.
  with layers.count_flops_as_useful_part(places + 1, 2 * places):
    weights = between * _products_of_keys(q, k)[:, :, :, None]
    o = jnp.einsum('nbjrpm,nbmjru->nbpjru', weights, v)

  def add_piece(state_BJKRU: jax.Array, piece: Any):
    """Adds a piece to the state before it: S <- decay S + k^T v."""
    k, decayed_v, decay = piece
    added_BJKRU = jnp.einsum('bpjk,bpjru->bjkru', k, decayed_v)
    return _decay_states(decay, state_BJKRU) + added_BJKRU, state_BJKRU

  # It also reads the state before the piece.
  J = x.k_BLJK.shape[2]
  with layers.count_flops_as_useful_part(1, 1):
    last, states = jax.lax.scan(
        add_piece, _states_side_by_side(J, state_BHKU),
        (k, after[..., None] * v, upto[:, :, -1]))
    o += upto[..., None] * _read_states(q, states)
  return (_join_rows(o, x.v_BLHU), _states_one_by_one(last)), (x, states)


def _run_additive_backward(places: int, kept: Any, grads: Any):
  """Returns the gradients of the inputs and of the first state.

  With S' = decay S + k^T (after v) and o = W v + upto q S, they go through the
  pieces from the last to the first: dS = decay dS' + q^T (upto do).

  The suffixes name axes: B batch, L length, J heads of keys, R heads of values
  for each of these, H = J R, K features of a key, U features of a value.
  """
  x, states = kept
  d_o_BLHU, d_last_BHKU = grads

  # The forward pass again, but for its states.
  (q, k, v, log_decay), to_inputs = jax.vjp(
      functools.partial(_cut_inputs_by_key_head, places), x)
  (between, upto, after), to_log_decay = jax.vjp(_decays_of_heads, log_decay)
  products = _products_of_keys(q, k)
  weights = between * products[:, :, :, None]
  d_o = _group_by_key_head(k, pieces.cut_row_into_pieces(places, d_o_BLHU))
  decayed_d_o = upto[..., None] * d_o
  decayed_v = after[..., None] * v

  def pass_piece(d_state_BJKRU: jax.Array, piece: Any):
    """Passes the gradient of the state after a piece to that before it."""
    q, decayed_d_o, decay = piece
    d_by_reading_BJKRU = jnp.einsum('bpjk,bpjru->bjkru', q, decayed_d_o)
    d_before_BJKRU = _decay_states(decay, d_state_BJKRU) + d_by_reading_BJKRU
    return d_before_BJKRU, d_state_BJKRU

  d_first, d_states = jax.lax.scan(
      pass_piece, _states_side_by_side(k.shape[3], d_last_BHKU),
      (q, decayed_d_o, upto[:, :, -1]), reverse=True)

  # The values, through the places of the piece and through the state after it.
  d_weights = jnp.einsum('nbpjru,nbmjru->nbjrpm', d_o, v)
  # A plain sum over r takes 20 times as long on CPU (features.py).
  d_products = jnp.einsum('nbjrpm,nbjrpm->nbjpm', between, d_weights)
  d_decayed_v = _read_states(k, d_states)
  d_v = jnp.einsum('nbjrpm,nbpjru->nbmjru', weights, d_o)
  d_v += after[..., None] * d_decayed_v

  # The decays. That of the whole piece is the one up to its last place.
  P = v.shape[2]
  d_whole = features.inner_products(states, d_states).sum(3)
  d_upto = features.inner_products(d_o, _read_states(q, states))
  d_upto += jnp.pad(d_whole[:, :, None],
                    ((0, 0), (0, 0), (P - 1, 0), (0, 0), (0, 0)))
  d_between = d_weights * products[:, :, :, None]
  d_after = features.inner_products(v, d_decayed_v)
  d_log_decay, = to_log_decay((d_between, d_upto, d_after))

  # Queries and keys, through each other and through the states.
  d_q = jnp.einsum('nbjpm,nbmjk->nbpjk', d_products, k)
  d_q += _multiply_by_states(decayed_d_o, states)
  d_k = jnp.einsum('nbjpm,nbpjk->nbmjk', d_products, q)
  d_k += _multiply_by_states(decayed_v, d_states)
  d_x, = to_inputs((d_q, d_k, d_v, d_log_decay))
  return d_x, _states_one_by_one(d_first)


_run_additive.defvjp(_run_additive_forward, _run_additive_backward)


def _cut_inputs_by_key_head(places: int, x: Inputs
                            ) -> tuple[jax.Array, jax.Array, jax.Array,
                                       jax.Array]:
  """Cuts the inputs of a recurrence into pieces (chunks) of a row, and groups
  the heads of values by the head of keys that they share.

  The letters name axes: B batch, P places (steps) of a piece, J heads of keys,
  R heads of values that share one, K features of a key, U features of a value.

  Args:
    places: P.
    x: the queries, keys, values and decays of rows.

  Returns:
    Queries and keys, [pieces, B, P, J, K] each; values, [pieces, B, P, J, R,
    U]; and the logarithms of the decays, [pieces, B, P, J, R].
  """
  cut = functools.partial(pieces.cut_row_into_pieces, places)
  k = cut(x.k_BLJK)
  q = cut(x.q_BLJK)
  v = _group_by_key_head(k, cut(x.v_BLHU))
  log_decay = _group_by_key_head(k, cut(x.log_decay_BLHK[..., 0]))
  return q, k, v, log_decay


def _group_by_key_head(k: jax.Array, x: jax.Array) -> jax.Array:
  """Returns heads of values by the head of keys that they share, as k has them:
  [pieces, B, P, H, ...] -> [pieces, B, P, J, R, ...]."""
  return x.reshape(*k.shape[:4], -1, *x.shape[4:])


def _join_rows(x: jax.Array, v_BLHU: jax.Array) -> jax.Array:
  """Returns whole rows of the shape of the values: [pieces, B, P, J, R, U] ->
  [B, L, H, U]."""
  B, L, H, U = v_BLHU.shape
  return jnp.moveaxis(x, 0, 1).reshape(B, -1, H, U)[:, :L]


def _states_side_by_side(J: int, x_BHKU: jax.Array) -> jax.Array:
  """Returns states with those of one head of keys beside each other:
  [B, H, K, U] -> [B, J, K, R, U]."""
  B, _, K, U = x_BHKU.shape
  return jnp.swapaxes(x_BHKU.reshape(B, J, -1, K, U), 2, 3)


def _states_one_by_one(x_BJKRU: jax.Array) -> jax.Array:
  """Returns states head by head: [B, J, K, R, U] -> [B, H, K, U]."""
  B, _, K, _, U = x_BJKRU.shape
  return jnp.swapaxes(x_BJKRU, 2, 3).reshape(B, -1, K, U)


def _decay_states(decay_BJR: jax.Array, state_BJKRU: jax.Array) -> jax.Array:
  """Returns the states times the decay of each head."""
  return decay_BJR[:, :, None, :, None] * state_BJKRU


def _decays_of_heads(log_decay: jax.Array
                     ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the decay between two places of a piece, [pieces, B, J, R, P, P],
  that of the piece up to a place, and that after it, [pieces, B, P, J, R]."""
  between, upto = pieces.decays_within_piece(jnp.moveaxis(log_decay, 2, -1))
  after = between[..., -1, :]
  return between, jnp.moveaxis(upto, -1, 2), jnp.moveaxis(after, -1, 2)


def _products_of_keys(q: jax.Array, k: jax.Array) -> jax.Array:
  """Returns the products of the queries and keys of each two places of a piece,
  [pieces, B, J, P, P]."""
  return jnp.einsum('nbpjk,nbmjk->nbjpm', q, k)


def _read_states(q: jax.Array, states: jax.Array) -> jax.Array:
  """Returns what queries read of the states of all heads, [pieces, B, P, J, R,
  U]. As an einsum it transposes the states, which are larger than the rest."""
  wide = states.reshape(*states.shape[:4], -1)
  read = jnp.swapaxes(q, 2, 3) @ wide
  return jnp.swapaxes(read, 2, 3).reshape(*q.shape[:4], *states.shape[4:])


def _multiply_by_states(x: jax.Array, states: jax.Array) -> jax.Array:
  """Returns the products of what heads have with their states, summed over the
  heads that share a key, [pieces, B, P, J, K]."""
  return jnp.einsum('nbpjru,nbjkru->nbpjk', x, states)
