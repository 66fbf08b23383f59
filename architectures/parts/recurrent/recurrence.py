"""Linear recurrences: a state of one size stands for all tokens before.

  S_t = A_t S_t-1 + k_t d_t^T        the state of a head, [K, U]
  o_t = S_t^T q_t                    what is read of it
  d_t = v_t                          what is written: the value as it is, or
  d_t = b_t (v_t - (A_t S_t-1)^T k_t)  what corrects the value that k_t finds

The last is the delta rule, S_t = (I - b_t k_t k_t^T) A_t S_t-1 + b_t k_t v_t^T
(Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464; theirs is the transposed
state). A is a diagonal matrix, the decays: one number for a head, or one for
each feature of its keys. The family's members are settings of A and the rate b:

                 no decay          one of a head    one of each feature
  no rate        linear attention  RetNet, Mamba-2  GLA
  a rate         DeltaNet          Gated DeltaNet   KDA

A decay is given as its logarithm, -inf for 0, which forgets all. Only decays
of places that lie between two others are added up: 0 is exact, and a large one
takes no digits from those after it.

`run` computes a row in pieces of P places. Within a piece all that is written
follows from the state before it by one triangular system, the UT transform
(Yang et al. 2024, arXiv 2406.06484; with decays, 2412.06464):

  d_i + sum over j < i of A_ij d_j = b_i (v_i - D_i S^T k_i)
  A_ij = b_i P_ij k_i^T k_j

where P_ij is the decay after j up to i, and D_i that of the piece up to i.
Where features have decays of their own, P_ij is inside of the product of both
keys: feature_decays.py.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp

from architectures.parts import linear
from architectures.parts.recurrent import feature_decays
from architectures.parts.recurrent import triangular

PLACES = 64  # of a piece at most
# Pieces that are computed at once where each feature has a decay: such a piece
# takes a copy of its keys for each time that it is halved.
GROUP = 16


class Inputs(NamedTuple):
  """What a recurrence is given. J heads of queries and keys serve H heads of
  values, each of them H / J that follow one another."""
  q_BLJK: jax.Array
  k_BLJK: jax.Array
  v_BLHU: jax.Array
  # The last axis is 1 (a head has one decay) or K (each feature has its own).
  log_decay_BLHK: Optional[jax.Array] = None  # None: no decay
  rate_BLH: Optional[jax.Array] = None  # None: no delta rule


def run(x: Inputs, state_BHKU: Optional[jax.Array] = None, *,
        places: int = PLACES) -> tuple[jax.Array, jax.Array]:
  """Returns what is read at each place, float32 [B, L, H, U], and the state
  after the last, float32 [B, H, K, U].

  Args:
    x: of any dtypes; all is computed in float32.
    state_BHKU: before the first place; None: zero.
    places: of a piece at most; pieces of a row are as long as each other. With
      a decay of each feature, that is the next power of 2.
  """
  B, L, H, U = x.v_BLHU.shape
  J, K = x.k_BLJK.shape[2:]
  assert H % J == 0, (H, J)
  if x.log_decay_BLHK is None:
    x = x._replace(log_decay_BLHK=jnp.zeros((B, L, H, 1)))
  assert x.log_decay_BLHK.shape[-1] in (1, K), x.log_decay_BLHK.shape
  if state_BHKU is None:
    state_BHKU = jnp.zeros((B, H, K, U))
  if L == 1:
    return _step(x, state_BHKU)
  count = -(-L // places)
  places = -(-L // count)
  if by_feature(x.log_decay_BLHK):
    places = 1 << (places - 1).bit_length()
  return _chunked(places, x, state_BHKU)


def by_feature(log_decay: jax.Array) -> bool:
  """Whether each feature of a key has a decay of its own."""
  return log_decay.shape[-1] > 1


def _step(x: Inputs, state_BHKU: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The same for one place, which is the definition."""
  q, k, v, log_decay, rate = jax.tree.map(
      lambda x: x[:, 0].astype(jnp.float32), x)
  q_BHK, k_BHK = (jnp.repeat(x, v.shape[1] // x.shape[1], 1) for x in (q, k))
  state_BHKU = jnp.exp(log_decay)[..., None] * state_BHKU
  with linear.useful(1, 1):
    if rate is not None:
      found_BHU = jnp.einsum('BHK,BHKU->BHU', k_BHK, state_BHKU)
      v = rate[..., None] * (v - found_BHU)
    state_BHKU += jnp.einsum('BHK,BHU->BHKU', k_BHK, v)
    o_BHU = jnp.einsum('BHK,BHKU->BHU', q_BHK, state_BHKU)
  return o_BHU[:, None], state_BHKU


class _Piece(NamedTuple):
  """What a piece is to the state, whatever the state is."""
  q_BHPK: jax.Array  # times the decay since the piece began
  k_BHPK: jax.Array  # times the decay until it ends
  write_BHPU: jax.Array  # d, were the state before it zero
  read_BHPK: Optional[jax.Array]  # what d is less, times that state
  weights_BHPQ: jax.Array  # of d at j in o at i
  decay_BHK1: jax.Array  # of the whole piece; K or 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(places: int, x: Inputs, state_BHKU: jax.Array):
  """Between the passes, the inputs and the state before each piece are kept;
  the gradient computes the rest again."""
  return _forward(places, x, state_BHKU)[0]


def _forward(places: int, x: Inputs, state_BHKU: jax.Array):
  def step(state_BHKU: jax.Array, piece: _Piece):
    o_BHPU, new_BHKU = _advance(state_BHKU, piece)
    return new_BHKU, (o_BHPU, state_BHKU)
  last_BHKU, (o, states) = jax.lax.scan(step, state_BHKU, _pieces(places, x))
  return (_joined(o, x.v_BLHU.shape[1]), last_BHKU), states


def _chunked_fwd(places: int, x: Inputs, state_BHKU: jax.Array):
  out, states = _forward(places, x, state_BHKU)
  return out, (x, states)


def _chunked_bwd(places: int, kept: Any, grads: Any):
  x, states = kept
  d_o_BLHU, d_state_BHKU = grads
  pieces, to_inputs = jax.vjp(functools.partial(_pieces, places), x)

  def step(d_state_BHKU: jax.Array, here: Any):
    state_BHKU, piece, d_o_BHPU = here
    back = jax.vjp(_advance, state_BHKU, piece)[1]
    return back((d_o_BHPU, d_state_BHKU))
  d_state_BHKU, d_pieces = jax.lax.scan(
      step, d_state_BHKU, (states, pieces, _cut(places, d_o_BLHU)),
      reverse=True)
  return to_inputs(d_pieces)[0], d_state_BHKU


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _cut(places: int, x_BLH: jax.Array) -> jax.Array:
  """[B, L, H, ...] -> float32 [pieces, B, H, P, ...], filled up with zeros: a
  place of zeros writes nothing and its decay is 1."""
  B, L, *rest = x_BLH.shape
  x_BLH = jnp.pad(x_BLH.astype(jnp.float32), (
      (0, 0), (0, -L % places), *((0, 0) for _ in rest)))
  return jnp.moveaxis(x_BLH.reshape(B, -1, places, *rest), (1, 3), (0, 2))


def _joined(x: jax.Array, length: int) -> jax.Array:
  """[pieces, B, H, P, U] -> [B, L, H, U]."""
  x = jnp.moveaxis(x, (0, 2), (1, 3))
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _pieces(places: int, x: Inputs) -> _Piece:
  """Returns all pieces of a row, along a first axis."""
  cut = jax.tree.map(functools.partial(_cut, places), x)
  if by_feature(x.log_decay_BLHK):
    return jax.lax.map(jax.checkpoint(_piece, prevent_cse=False), cut,
                       batch_size=GROUP)
  return jax.vmap(_piece)(cut)


class _Pairs(NamedTuple):
  """How the places of a piece meet."""
  weights_BHPQ: jax.Array  # of what is written at j in what is read at i
  found_BHPQ: Optional[jax.Array]  # of what the key at i finds of it
  first_BHPK: jax.Array  # the decay of the piece up to each place; K or 1
  after_BHPK: jax.Array  # and of the piece after it


def _piece(x: Inputs) -> _Piece:
  q_BJPK, k_BJPK, v_BHPU, log_decay_BHPK, rate_BHP = x
  H, P = v_BHPU.shape[1:3]
  each = lambda x: jnp.repeat(x, H // x.shape[1], 1)  # to heads of values
  meet = _meet_by_feature if by_feature(log_decay_BHPK) else _meet
  pairs = meet(q_BJPK, k_BJPK, log_decay_BHPK, each, rate_BHP is not None)
  k_BHPK = each(k_BJPK)
  write_BHPU, read_BHPK = v_BHPU, None
  if rate_BHP is not None:
    inverse_BHPQ = _inverse(
        rate_BHP[..., None] * pairs.found_BHPQ) * rate_BHP[..., None, :]
    with linear.useful(P + 1, 2 * P):
      write_BHPU = jnp.einsum('BHPQ,BHQU->BHPU', inverse_BHPQ, v_BHPU)
      read_BHPK = jnp.einsum('BHPQ,BHQK->BHPK', inverse_BHPQ,
                             pairs.first_BHPK * k_BHPK)
  return _Piece(each(q_BJPK) * pairs.first_BHPK, k_BHPK * pairs.after_BHPK,
                write_BHPU, read_BHPK, pairs.weights_BHPQ,
                pairs.first_BHPK[:, :, -1, :, None])


def _meet(q_BJPK: jax.Array, k_BJPK: jax.Array, log_decay_BHP1: jax.Array,
          each: Callable, is_delta: bool) -> _Pairs:
  P = q_BJPK.shape[2]
  pair_BHPQ, first_BHP = _decays(log_decay_BHP1[..., 0])
  found_BHPQ = None
  with linear.useful(P + 1, 2 * P):
    weights_BHPQ = pair_BHPQ * each(
        jnp.einsum('BJPK,BJQK->BJPQ', q_BJPK, k_BJPK))
  if is_delta:
    with linear.useful(P - 1, 2 * P):
      found_BHPQ = pair_BHPQ * each(
          jnp.einsum('BJPK,BJQK->BJPQ', k_BJPK, k_BJPK))
  return _Pairs(weights_BHPQ, found_BHPQ, first_BHP[..., None],
                pair_BHPQ[..., -1, :, None])


def _meet_by_feature(q_BJPK: jax.Array, k_BJPK: jax.Array,
                     log_decay_BHPK: jax.Array, each: Callable, is_delta: bool
                     ) -> _Pairs:
  q_BHPK, k_BHPK = each(q_BJPK), each(k_BJPK)
  with linear.useful(1, 1):
    met, upto_BHPK, after_BHPK = feature_decays.paired(
        [q_BHPK, k_BHPK] if is_delta else [q_BHPK], k_BHPK, log_decay_BHPK)
    own_BHP = each(jnp.einsum('BJPK,BJPK->BJP', q_BJPK, k_BJPK))
  weights_BHPQ = met[0] + own_BHP[..., None] * jnp.eye(
      q_BHPK.shape[2])[None, None]
  return _Pairs(weights_BHPQ, met[1] if is_delta else None,
                jnp.exp(upto_BHPK), jnp.exp(after_BHPK))


def _inverse(a_BHPQ: jax.Array) -> jax.Array:
  """Returns (I + A)^-1 of what lies below the diagonal. By substitution an
  entry d below the diagonal is a sum of d - 1 products, and of A's own."""
  P = a_BHPQ.shape[-1]
  with linear.useful(1, 1):
    return linear.counted(triangular.inverse, (P - 1) * (P - 2), 3 * P)(a_BHPQ)


def _decays(log_decay_BHP: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the decay after place j up to i, [B, H, i, j], 0 where j is later;
  and that of the piece up to i, [B, H, i]."""
  P = log_decay_BHP.shape[-1]
  later_PQ = jnp.tri(P, k=-1, dtype=bool)[None, None]  # i after j
  sums_BHPQ = jnp.cumsum(
      jnp.where(later_PQ, log_decay_BHP[..., None], 0), -2)
  pair_BHPQ = jnp.where(jnp.tri(P, dtype=bool)[None, None],
                        jnp.exp(sums_BHPQ), 0)
  return pair_BHPQ, jnp.exp(jnp.cumsum(log_decay_BHP, -1))


def _advance(state_BHKU: jax.Array, piece: _Piece
             ) -> tuple[jax.Array, jax.Array]:
  """Returns what is read in a piece, and the state after it."""
  P, write_BHPU = piece.q_BHPK.shape[2], piece.write_BHPU
  with linear.useful(1, 1):
    if piece.read_BHPK is not None:
      write_BHPU -= jnp.einsum('BHPK,BHKU->BHPU', piece.read_BHPK, state_BHKU)
    o_BHPU = jnp.einsum('BHPK,BHKU->BHPU', piece.q_BHPK, state_BHKU)
    new_BHKU = piece.decay_BHK1 * state_BHKU + jnp.einsum(
        'BHPK,BHPU->BHKU', piece.k_BHPK, write_BHPU)
  with linear.useful(P + 1, 2 * P):
    o_BHPU += jnp.einsum('BHPQ,BHQU->BHPU', piece.weights_BHPQ, write_BHPU)
  return o_BHPU, new_BHKU
