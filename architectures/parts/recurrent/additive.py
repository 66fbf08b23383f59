"""Recurrences that add to the state, whatever it is: there is no delta rule,
and a head has one decay (Mamba-2: Dao and Gu 2024, arXiv 2405.21060, section 6;
RetNet: Sun et al. 2023, arXiv 2307.08621).

recurrence.py says what is computed and calls this. Such a decay multiplies
values and outputs as well as keys and queries, and queries and keys are shared
by R heads of values, whose states stand side by side here, [K, R, U]. So each
product with the states of a piece is one for all R heads, and nothing is copied
for each of them: with the eight heads of Mamba-2's default on CPU, copies of
queries and keys are as large as the states.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from architectures.parts import linear
from architectures.parts.recurrent import pieces
from architectures.parts.recurrent import vectors


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked(places: int, x: pieces.Inputs, state_BHKU: jax.Array):
  """Returns what is read, float32 [B, L, H, U], and the last state, from pieces
  of so many places. For the gradient it keeps the inputs and the state before
  each piece."""
  return _forward(places, x, state_BHKU)[0]


def _forward(places: int, x: pieces.Inputs, state_BHKU: jax.Array):
  q, k, v, log_decay = _cut(places, x)
  pair, first, after = _decays(log_decay)
  with linear.useful(places + 1, 2 * places):
    met = _met(q, k)
    o = jnp.einsum('nbjrpm,nbmjru->nbpjru', pair * met[:, :, :, None], v)

  def step(state_BJKRU: jax.Array, here: Any):
    k, v, decay = here
    added_BJKRU = jnp.einsum('bpjk,bpjru->bjkru', k, v)
    return _by(decay, state_BJKRU) + added_BJKRU, state_BJKRU
  with linear.useful(1, 1):
    last, states = jax.lax.scan(
        step, _side_by_side(x.k_BLJK.shape[2], state_BHKU),
        (k, after[..., None] * v, first[:, :, -1]))
    o += first[..., None] * _read(q, states)
  return (_joined(o, x.v_BLHU), _one_by_one(last)), states


def _forward_kept(places: int, x: pieces.Inputs, state_BHKU: jax.Array):
  out, states = _forward(places, x, state_BHKU)
  return out, (x, states)


def _backward(places: int, kept: Any, grads: Any):
  x, states = kept
  (q, k, v, log_decay), to_inputs = jax.vjp(
      functools.partial(_cut, places), x)
  (pair, first, after), to_log = jax.vjp(_decays, log_decay)
  met = _met(q, k)
  d_o = _heads(k, pieces.by_place(places, grads[0]))
  read_d_o, write = first[..., None] * d_o, after[..., None] * v

  def step(d_state_BJKRU: jax.Array, here: Any):
    q, d_o, decay = here
    read_BJKRU = jnp.einsum('bpjk,bpjru->bjkru', q, d_o)
    return _by(decay, d_state_BJKRU) + read_BJKRU, d_state_BJKRU
  d_before, d_states = jax.lax.scan(
      step, _side_by_side(k.shape[3], grads[1]),
      (q, read_d_o, first[:, :, -1]), reverse=True)

  d_weights = jnp.einsum('nbpjru,nbmjru->nbjrpm', d_o, v)
  # As a plain sum over r it takes 20 times as long on CPU (vectors.py).
  d_met = jnp.einsum('nbjrpm,nbjrpm->nbjpm', pair, d_weights)
  found = _read(k, d_states)
  d_v = jnp.einsum('nbjrpm,nbpjru->nbmjru', pair * met[:, :, :, None], d_o
                   ) + after[..., None] * found
  d_whole = vectors.dots(states, d_states).sum(3)
  d_first = vectors.dots(d_o, _read(q, states)) + jnp.pad(
      d_whole[:, :, None], (*2 * ((0, 0),), (v.shape[2] - 1, 0),
                            *2 * ((0, 0),)))
  d_log, = to_log((d_weights * met[:, :, :, None], d_first,
                   vectors.dots(v, found)))
  d_q = jnp.einsum('nbjpm,nbmjk->nbpjk', d_met, k) + _by_states(
      read_d_o, states)
  d_k = jnp.einsum('nbjpm,nbpjk->nbmjk', d_met, q) + _by_states(
      write, d_states)
  return to_inputs((d_q, d_k, d_v, d_log))[0], _one_by_one(d_before)


chunked.defvjp(_forward_kept, _backward)


def _cut(places: int, x: pieces.Inputs):
  """Returns q and k, [pieces, B, P, J, K], v, [pieces, B, P, J, R, U], and the
  logarithms of the decays, [pieces, B, P, J, R]."""
  cut = functools.partial(pieces.by_place, places)
  k = cut(x.k_BLJK)
  return (cut(x.q_BLJK), k, _heads(k, cut(x.v_BLHU)),
          _heads(k, cut(x.log_decay_BLHK[..., 0])))


def _heads(k: jax.Array, x: jax.Array) -> jax.Array:
  """[pieces, B, P, H, ...] -> [pieces, B, P, J, R, ...]."""
  return x.reshape(*k.shape[:4], -1, *x.shape[4:])


def _joined(x: jax.Array, v_BLHU: jax.Array) -> jax.Array:
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
