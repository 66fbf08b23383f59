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

Two further forms are run by the same code. A correction may read the state by
another vector than the key times the rate, e_t = b_t k_t above:

  d_t = v_t - (A_t S_t-1)^T e_t     S_t = (I - k_t e_t^T) A_t S_t-1 + k_t v_t^T

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

PLACES = 64  # of a piece at most
LEAST_PLACES = 16  # of one at most, where keys are small
# Places that meet at once where each feature has a decay: such a piece takes a
# copy of its keys for each time that it is halved.
AT_ONCE = 256
# So few numbers, the decays of all pieces, meet at once: on CPU the loop over
# groups takes up to a fifth of KDA's time, and nearly half of GLA's.
WHOLE = 1 << 20


def run(x: Inputs, state_BHKU: Optional[jax.Array] = None, *,
        places: Optional[int] = None) -> tuple[jax.Array, jax.Array]:
  """Returns what is read at each place, float32 [B, L, H, U], and the state
  after the last, float32 [B, H, K, U].

  Args:
    x: of any dtypes; everything is computed in float32. L are its tokens.
    state_BHKU: the state before the first place; None: zero.
    places: the most that a piece has; default: `most_places`. All pieces of a
      row are equally long; if each feature has a decay, their length is the
      next power of 2.
  """
  B, L, H, U = x.v_BLHU.shape
  J, K = x.k_BLJK.shape[2:]
  assert H % J == 0, (H, J)
  steps, tokens = x.steps, x.q_BLJK.shape[1]
  if x.log_decay_BLHK is None:
    x = x._replace(log_decay_BLHK=jnp.zeros((B, tokens, H, 1)))
  assert x.log_decay_BLHK.shape[-1] in (1, K), x.log_decay_BLHK.shape
  if state_BHKU is None:
    state_BHKU = jnp.zeros((B, H, K, U))
  # If the state is a constant of the program, XLA's CPU backend (jaxlib 0.10
  # and 0.12) joins several products into kernels that return whatever is in
  # memory: 1e29 with 8 heads and 32 tokens.
  state_BHKU = jax.lax.optimization_barrier(state_BHKU)
  if steps > 1:
    x = x._replace(q_BLJK=_of_step(steps - 1, steps, x.q_BLJK),
                   log_decay_BLHK=_of_step(0, steps, x.log_decay_BLHK))
  if tokens == 1:
    for i in range(steps):
      o_BLHU, state_BHKU = _step(i, x, state_BHKU)
    return o_BLHU, state_BHKU
  places = places or most_places(K)
  count = -(-L // places)
  places = -(-L // count)
  if by_feature(x.log_decay_BLHK):
    places = 1 << (places - 1).bit_length()
  elif not x.corrects:
    assert steps == 1, steps
    return _additive(places, x, state_BHKU)
  o_BLHU, state_BHKU = _chunked(places, steps, x, state_BHKU)
  return o_BLHU[:, steps - 1::steps] if steps > 1 else o_BLHU, state_BHKU


def _of_step(step: int, steps: int, x_BL: jax.Array) -> jax.Array:
  """[B, L, ...] -> [B, L x steps, ...]: what tokens have in one of their steps,
  and 0 in the others."""
  B, L, *rest = x_BL.shape
  others = ((0, 0), (0, 0), (step, steps - 1 - step), *((0, 0) for _ in rest))
  return jnp.pad(x_BL[:, :, None], others).reshape(B, L * steps, *rest)


def most_places(K: int) -> int:
  """Returns the most places of a piece: half as many as a key has features. The
  states between pieces are then as large, beside the inputs, for all K."""
  return min(PLACES, max(LEAST_PLACES, K // 2))


def by_feature(log_decay: jax.Array) -> bool:
  """Whether each feature of a key has a decay of its own."""
  return log_decay.shape[-1] > 1


def _step(i: int, x: Inputs, state_BHKU: jax.Array
          ) -> tuple[jax.Array, jax.Array]:
  """Computes place i alone, by the definition."""
  q, k, v, log_decay, rate, erase = jax.tree.map(
      lambda x: x[:, i].astype(jnp.float32), x)
  each = lambda x: jnp.repeat(x, v.shape[1] // x.shape[1], 1)
  q_BHK, k_BHK = each(q), each(k)
  state_BHKU = jnp.exp(log_decay)[..., None] * state_BHKU
  with layers.count_flops_as_useful_part(1, 1):
    if rate is not None:
      old_BHU = jnp.einsum('BHK,BHKU->BHU', k_BHK, state_BHKU)
      v = rate[..., None] * (v - old_BHU)
    if erase is not None:
      v -= jnp.einsum('BHK,BHKU->BHU', each(erase), state_BHKU)
    state_BHKU += jnp.einsum('BHK,BHU->BHKU', k_BHK, v)
    o_BHU = jnp.einsum('BHK,BHKU->BHU', q_BHK, state_BHKU)
  return o_BHU[:, None], state_BHKU


class _Pairs(NamedTuple):
  """How the places i of a piece meet those before them, j."""
  weights_BHPQ: jax.Array  # how much of what j writes is read at i
  key_weights_BHPQ: Optional[jax.Array]  # how much of it the key at i finds
  first_BHPK: jax.Array  # the decay of the piece up to each place; K or 1
  after_BHPK: jax.Array  # and of the piece after it


class _Pieces(NamedTuple):
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
def _chunked(places: int, steps: int, x: Inputs, state_BHKU: jax.Array):
  """Computes pieces of so many places, of which a token has `steps`; for the
  gradient it keeps the inputs and the state before each piece, and the backward
  pass computes the rest again."""
  return _forward(places, steps, x, state_BHKU)[0]


def _forward(places: int, steps: int, x: Inputs, state_BHKU: jax.Array):
  cut = _cut_all(places, x)
  p = _pieces(cut, _meet(steps, cut))

  def step(state_BHKU: jax.Array, here: Any):
    k_BHPK, decay_BHK1, write_BHPU, read_BHPK = here
    if read_BHPK is not None:
      write_BHPU -= read_BHPK @ state_BHKU
    return (decay_BHK1 * state_BHKU + _t(k_BHPK) @ write_BHPU,
            (write_BHPU, state_BHKU))
  with layers.count_flops_as_useful_part(1, 1):
    last_BHKU, (write, states) = jax.lax.scan(
        step, state_BHKU, (p.k_BHPK, p.decay_BHK1, p.write_BHPU, p.read_BHPK))
  with layers.count_flops_as_useful_part(1, steps):
    o_BHPU = p.q_BHPK @ states
  with layers.count_flops_as_useful_part(places + steps, 2 * places * steps):
    o_BHPU += p.pairs.weights_BHPQ @ write
  return (_joined(o_BHPU, x.v_BLHU.shape[1]), last_BHKU), (x, states)


def _chunked_bwd(places: int, steps: int, kept: Any, grads: Any):
  x, states = kept
  d_o, d_state_BHKU = pieces.cut(places, grads[0]), grads[1]
  cut, to_inputs = jax.vjp(functools.partial(_cut_all, places), x)
  pairs, to_met = jax.vjp(functools.partial(_meet, steps), cut)
  p = _pieces(cut, pairs)
  write = p.write_BHPU
  if p.read_BHPK is not None:
    write -= p.read_BHPK @ states

  def step(d_state_BHKU: jax.Array, here: Any):
    k_BHPK, decay_BHK1, read_BHPK, d_write_BHPU, d_of_read_BHKU = here
    d_write_BHPU += k_BHPK @ d_state_BHKU
    before_BHKU = decay_BHK1 * d_state_BHKU + d_of_read_BHKU
    if read_BHPK is not None:
      before_BHKU -= _t(read_BHPK) @ d_write_BHPU
    return before_BHKU, (d_write_BHPU, d_state_BHKU)
  first_BHKU, (d_write, d_states) = jax.lax.scan(
      step, d_state_BHKU, (p.k_BHPK, p.decay_BHK1, p.read_BHPK,
                           _t(p.pairs.weights_BHPQ) @ d_o, _t(p.q_BHPK) @ d_o),
      reverse=True)
  d_x = _to_pieces(cut, p, write, states, d_o, d_write, d_states, to_met)
  return to_inputs(d_x)[0], first_BHKU


_chunked.defvjp(_forward, _chunked_bwd)


def _to_pieces(x: Inputs, p: _Pieces, write: jax.Array, states: jax.Array,
               d_o: jax.Array, d_write: jax.Array, d_states: jax.Array,
               to_met: Callable) -> Inputs:
  """Returns the gradient of the inputs of all pieces."""
  q, k, v, log_decay, rate, erase = x
  each = functools.partial(_each, v.shape[2])
  per_feature = by_feature(log_decay)
  times = jnp.multiply if per_feature else (
      lambda x, y: features.dots(x, y)[..., None])
  met, d_v, d_rate, d_erase, d_key_weights = (
      p.pairs, d_write, None, None, None)
  d_q, d_k = d_o @ _t(states), write @ _t(d_states)
  d_first, d_after = times(each(q), d_q), times(each(k), d_k)
  d_k = _of_heads(k, met.after_BHPK, d_k)
  if x.corrects:
    finds = _finds(x)
    first_finds = met.first_BHPK * each(finds)
    # The gradients of what the system is solved for, and of the inverse: for
    # X = (I + A)^-1, dA = -X^T dX X^T.
    back = _t(p.inverse_BHPQ)
    d_v = back @ d_write
    d_read = -d_v @ _t(states)
    d_system = -jnp.tril(
        d_v @ _t(p.write_BHPU) + d_read @ _t(p.read_BHPK), -1)
    d_key_weights = d_system
    if rate is not None:
      d_rate = features.dots(d_v, v) + features.dots(d_read, first_finds) + (
          features.dots(d_system, met.key_weights_BHPQ))
      d_key_weights, d_v, d_read = (rate[..., None] * y for y in (
          d_system, d_v, d_read))
    d_first += times(each(finds), d_read)
    d_finds = _of_heads(finds, met.first_BHPK, d_read)
    if erase is None:
      d_k += d_finds
    else:
      d_erase = d_finds
  d_last = features.dots(states, d_states)[..., None, :]
  if not per_feature:
    d_last = d_last.sum(-1, keepdims=True)
  d_first += jnp.pad(d_last, (*((0, 0) for _ in range(3)), (
      q.shape[-2] - 1, 0), (0, 0)))
  d_x, = to_met(_Pairs(d_o @ _t(write), d_key_weights, d_first, d_after))
  if d_erase is not None:
    d_x = d_x._replace(erase_BLJK=d_x.erase_BLJK + d_erase)
  return d_x._replace(
      q_BLJK=d_x.q_BLJK + _of_heads(q, met.first_BHPK, d_q),
      k_BLJK=d_x.k_BLJK + d_k, v_BLHU=d_v, rate_BLH=d_rate)


def _finds(x: Inputs) -> jax.Array:
  """Returns what a correction reads the state by, but for its rate."""
  return x.k_BLJK if x.erase_BLJK is None else x.erase_BLJK


def _t(x: jax.Array) -> jax.Array:
  """The transposed matrices."""
  return jnp.swapaxes(x, -1, -2)


def _each(H: int, x: jax.Array) -> jax.Array:
  """[pieces, B, J, ...] -> [pieces, B, H, ...]: heads of keys to those of
  values."""
  return jnp.repeat(x, H // x.shape[2], 2)


def _of_heads(x: jax.Array, by: jax.Array, y: jax.Array) -> jax.Array:
  """Returns `by * y`, both of heads of values, summed over those that share one
  of the heads that x has. The last axis of `by` is K or 1. On CPU the plain sum
  takes 20 times as long (features.py)."""
  if x.shape[2] == y.shape[2]:
    return by * y
  by, y = (z.reshape(*x.shape[:3], -1, *z.shape[3:]) for z in (by, y))
  if by.shape[-1] == 1:
    return jnp.einsum('...rp,...rpk->...pk', by[..., 0], y)
  return jnp.einsum('...rpk,...rpk->...pk', by, y)


def _cut_all(places: int, x: Inputs) -> Inputs:
  return jax.tree.map(functools.partial(pieces.cut, places), x)


def _joined(x: jax.Array, length: int) -> jax.Array:
  """[pieces, B, H, P, U] -> [B, L, H, U]."""
  x = jnp.moveaxis(x, (0, 2), (1, 3))
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _pieces(x: Inputs, pairs: _Pairs) -> _Pieces:
  q, k, v, _, rate, erase = x
  q, k = (_each(v.shape[2], y) for y in (q, k))
  whole = (pairs, pairs.first_BHPK * q, pairs.after_BHPK * k,
           _t(pairs.first_BHPK[..., -1:, :]))
  if not x.corrects:
    return _Pieces(*whole, v)
  P = k.shape[-2]
  if rate is None:
    solve = inverse = _inverse(pairs.key_weights_BHPQ)
  else:
    inverse = _inverse(rate[..., None] * pairs.key_weights_BHPQ)
    solve = inverse * rate[..., None, :]
  finds = k if erase is None else _each(v.shape[2], erase)
  with layers.count_flops_as_useful_part(P + 1, 2 * P):
    return _Pieces(*whole, solve @ v, solve @ (pairs.first_BHPK * finds),
                   inverse)


def _meet(steps: int, x: Inputs) -> _Pairs:
  """Returns how the places of all pieces meet."""
  if by_feature(x.log_decay_BLHK):
    count, places = x.k_BLJK.shape[0], x.k_BLJK.shape[-2]
    few = x.log_decay_BLHK.size <= WHOLE
    return pieces.in_groups(
        functools.partial(_meet_by_feature, steps),
        count if few else max(1, AT_ONCE // places), x)
  return _meet_by_head(steps, x)


def _meet_by_head(steps: int, x: Inputs) -> _Pairs:
  """With the delta rule: `_additive` is what there is without it."""
  q, k, v, log_decay = x[:4]
  P = k.shape[-2]
  pair, first = pieces.decays(log_decay[..., 0])
  with layers.count_flops_as_useful_part(P + steps, 2 * P * steps):
    weights = pair * _each(v.shape[2], q @ _t(k))
  with layers.count_flops_as_useful_part(P - 1, 2 * P):
    key_weights = pair * _each(v.shape[2], _finds(x) @ _t(k))
  return _Pairs(weights, key_weights, first[..., None], pair[..., -1, :, None])


def _meet_by_feature(steps: int, x: Inputs) -> _Pairs:
  """Returns the pairs of places of one piece where each feature has a decay of
  its own."""
  q_BJPK, k_BJPK, v_BHPU, log_decay_BHPK = x[:4]
  each = lambda y: jnp.repeat(y, v_BHPU.shape[1] // y.shape[1], 1)
  q_BHPK, k_BHPK = each(q_BJPK), each(k_BJPK)
  rows = [q_BHPK]
  if x.corrects:
    rows.append(k_BHPK if x.erase_BLJK is None else each(x.erase_BLJK))
  with layers.count_flops_as_useful_part(1, 1):
    met, upto_BHPK, after_BHPK = pieces.paired(
        rows, k_BHPK, log_decay_BHPK, steps)
  with layers.count_flops_as_useful_part(1, steps):
    diagonal_BHP = each(jnp.einsum('BJPK,BJPK->BJP', q_BJPK, k_BJPK))
  weights_BHPQ = met[0] + diagonal_BHP[..., None] * jnp.eye(
      q_BHPK.shape[2])[None, None]
  return _Pairs(weights_BHPQ, met[1] if x.corrects else None,
                jnp.exp(upto_BHPK), jnp.exp(after_BHPK))


def _inverse(a_BHPQ: jax.Array) -> jax.Array:
  """Returns (I + A)^-1, where A is what lies below the diagonal. It counts as
  substitution, in which an entry d places below the diagonal is a sum of d - 1
  products and of A's entry."""
  P = a_BHPQ.shape[-1]
  with layers.count_flops_as_useful_part(1, 1):
    inverse = layers.count_flops_by_result(
        pieces.inverse, (P - 1) * (P - 2), 3 * P)
    return inverse(a_BHPQ)


# Recurrences that add to the state, whatever it is: there is no delta rule, and
# a head has one decay (Mamba-2: Dao and Gu 2024, arXiv 2405.21060, section 6;
# RetNet: Sun et al. 2023, arXiv 2307.08621). Such a decay multiplies values and
# outputs as well as keys and queries, and queries and keys are shared by R
# heads of values, whose states stand side by side here, [K, R, U]. So each
# product with the states of a piece is one for all R heads, and nothing is
# copied for each of them: with the eight heads of Mamba-2's default on CPU,
# copies of queries and keys are as large as the states.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _additive(places: int, x: Inputs, state_BHKU: jax.Array):
  """Returns what is read, float32 [B, L, H, U], and the last state, from pieces
  of so many places. For the gradient it keeps the inputs and the state before
  each piece."""
  return _additive_forward(places, x, state_BHKU)[0]


def _additive_forward(places: int, x: Inputs, state_BHKU: jax.Array):
  q, k, v, log_decay = _cut_heads(places, x)
  pair, first, after = _decays(log_decay)
  with layers.count_flops_as_useful_part(places + 1, 2 * places):
    met = _met(q, k)
    o = jnp.einsum('nbjrpm,nbmjru->nbpjru', pair * met[:, :, :, None], v)

  def step(state_BJKRU: jax.Array, here: Any):
    k, v, decay = here
    added_BJKRU = jnp.einsum('bpjk,bpjru->bjkru', k, v)
    return _by(decay, state_BJKRU) + added_BJKRU, state_BJKRU
  with layers.count_flops_as_useful_part(1, 1):
    last, states = jax.lax.scan(
        step, _side_by_side(x.k_BLJK.shape[2], state_BHKU),
        (k, after[..., None] * v, first[:, :, -1]))
    o += first[..., None] * _read(q, states)
  return (_rows(o, x.v_BLHU), _one_by_one(last)), (x, states)


def _additive_bwd(places: int, kept: Any, grads: Any):
  x, states = kept
  (q, k, v, log_decay), to_inputs = jax.vjp(
      functools.partial(_cut_heads, places), x)
  (pair, first, after), to_log = jax.vjp(_decays, log_decay)
  met = _met(q, k)
  d_o = _by_key(k, pieces.by_place(places, grads[0]))
  read_d_o, write = first[..., None] * d_o, after[..., None] * v

  def step(d_state_BJKRU: jax.Array, here: Any):
    q, d_o, decay = here
    read_BJKRU = jnp.einsum('bpjk,bpjru->bjkru', q, d_o)
    return _by(decay, d_state_BJKRU) + read_BJKRU, d_state_BJKRU
  d_before, d_states = jax.lax.scan(
      step, _side_by_side(k.shape[3], grads[1]),
      (q, read_d_o, first[:, :, -1]), reverse=True)

  d_weights = jnp.einsum('nbpjru,nbmjru->nbjrpm', d_o, v)
  # A plain sum over r takes 20 times as long on CPU (features.py).
  d_met = jnp.einsum('nbjrpm,nbjrpm->nbjpm', pair, d_weights)
  d_write = _read(k, d_states)
  d_v = jnp.einsum('nbjrpm,nbpjru->nbmjru', pair * met[:, :, :, None], d_o
                   ) + after[..., None] * d_write
  d_whole = features.dots(states, d_states).sum(3)
  d_first = features.dots(d_o, _read(q, states)) + jnp.pad(
      d_whole[:, :, None], (*2 * ((0, 0),), (v.shape[2] - 1, 0),
                            *2 * ((0, 0),)))
  d_log, = to_log((d_weights * met[:, :, :, None], d_first,
                   features.dots(v, d_write)))
  d_q = jnp.einsum('nbjpm,nbmjk->nbpjk', d_met, k) + _by_states(
      read_d_o, states)
  d_k = jnp.einsum('nbjpm,nbpjk->nbmjk', d_met, q) + _by_states(
      write, d_states)
  return to_inputs((d_q, d_k, d_v, d_log))[0], _one_by_one(d_before)


_additive.defvjp(_additive_forward, _additive_bwd)


def _cut_heads(places: int, x: Inputs):
  """Returns q and k, [pieces, B, P, J, K], v, [pieces, B, P, J, R, U], and the
  logarithms of the decays, [pieces, B, P, J, R]."""
  cut = functools.partial(pieces.by_place, places)
  k = cut(x.k_BLJK)
  return (cut(x.q_BLJK), k, _by_key(k, cut(x.v_BLHU)),
          _by_key(k, cut(x.log_decay_BLHK[..., 0])))


def _by_key(k: jax.Array, x: jax.Array) -> jax.Array:
  """[pieces, B, P, H, ...] -> [pieces, B, P, J, R, ...]."""
  return x.reshape(*k.shape[:4], -1, *x.shape[4:])


def _rows(x: jax.Array, v_BLHU: jax.Array) -> jax.Array:
  """[pieces, B, P, J, R, U] -> [B, L, H, U]."""
  B, L, H, U = v_BLHU.shape
  return jnp.moveaxis(x, 0, 1).reshape(B, -1, H, U)[:, :L]


def _side_by_side(J: int, x_BHKU: jax.Array) -> jax.Array:
  """[B, H, K, U] -> [B, J, K, R, U]."""
  B, _, K, U = x_BHKU.shape
  return jnp.swapaxes(x_BHKU.reshape(B, J, -1, K, U), 2, 3)


def _one_by_one(x_BJKRU: jax.Array) -> jax.Array:
  """[B, J, K, R, U] -> [B, H, K, U]."""
  B, _, K, _, U = x_BJKRU.shape
  return jnp.swapaxes(x_BJKRU, 2, 3).reshape(B, -1, K, U)


def _by(decay_BJR: jax.Array, state_BJKRU: jax.Array) -> jax.Array:
  return decay_BJR[:, :, None, :, None] * state_BJKRU


def _decays(log_decay: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the decay between two places of a piece, [pieces, B, J, R, P, P],
  that of the piece up to a place, and that after it, [pieces, B, P, J, R]."""
  pair, first = pieces.decays(jnp.moveaxis(log_decay, 2, -1))
  return pair, jnp.moveaxis(first, -1, 2), jnp.moveaxis(pair[..., -1, :], -1, 2)


def _met(q: jax.Array, k: jax.Array) -> jax.Array:
  return jnp.einsum('nbpjk,nbmjk->nbjpm', q, k)


def _read(q: jax.Array, states: jax.Array) -> jax.Array:
  """Returns what is read of the states of all heads, [pieces, B, P, J, R, U].
  As an einsum it transposes the states, which are larger than the rest."""
  wide = states.reshape(*states.shape[:4], -1)
  read = jnp.swapaxes(q, 2, 3) @ wide
  return jnp.swapaxes(read, 2, 3).reshape(*q.shape[:4], *states.shape[4:])


def _by_states(x: jax.Array, states: jax.Array) -> jax.Array:
  """Returns the products of what heads have with their states, summed over the
  heads that share a key."""
  return jnp.einsum('nbpjru,nbjkru->nbpjk', x, states)
