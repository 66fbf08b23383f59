"""The mesa layer of MesaNet: its state answers each query with the optimal
solution of a ridge regression from keys to values (von Oswald et al. 2025,
arXiv 2506.05233; as in flash-linear-attention's mesa_net).

  q, k  = silu(conv(W_q x)), silu(conv(W_k x))     each divided by its length
  v     = W_v x                                    without a convolution
  a, b  = sigmoid(W_a x + bias), sigmoid(W_b x + bias)
  H_t   = a_t H_t-1 + b_t k_t k_t^T                [K, K] of a head
  G_t   = a_t G_t-1 + b_t k_t v_t^T                [K, U] of a head
  o_t   = G_t^T (H_t + Lambda)^-1 q_t              Lambda: a diagonal matrix
  y     = W_o RMSNorm(o)                           a head by itself

The inverse is applied by a fixed number of steps of conjugate gradients, which
needs no more than products of H_t with vectors. Both matrices stand side by
side in the state, [K, K + U].
"""

import dataclasses
import functools
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.recurrent import features, layer, pieces, recurrence
from architectures.parts.recurrent.linear_attention import States
from architectures.parts.sharding import Role, declare
from common.fields import field, FUNCTION, MOST_TAPS, SHAPES

LEAST_RIDGE = 0.25  # of Lambda; it is 1 at first (the authors' program)
# Beside what conjugate gradients divide by, which is 0 once they have solved a
# system. The authors' 1e-5 ends them while 1e-3 of a solution is missing.
DIVISION_EPS = 1e-30
MOST_CG_STEPS = 1024


@dataclasses.dataclass(frozen=True)
class MesaConfig(States):
  """The fields of mixer mesa. What is left open is as attention has it."""
  key_dim: int = field(0, "size of a head's query and key; derived: head_dim",
                       resume=SHAPES)
  value_dim: int = field(0, "size of a head's value; derived: head_dim",
                         resume=SHAPES)
  conv: int = field(4, 'tokens that a convolution sees; 0: no convolution',
                    most=MOST_TAPS, resume=SHAPES)
  cg_steps: int = field(
      30, 'steps of conjugate gradients, by which the inverse is applied',
      least=1, most=MOST_CG_STEPS, resume=FUNCTION)

  def derived(self, config: ModelConfig) -> 'MesaConfig':
    return dataclasses.replace(
        self, heads=self.heads or config.num_heads,
        key_dim=self.key_dim or config.head_dim,
        value_dim=self.value_dim or config.head_dim)


class Covariance(NamedTuple):
  """The matrices H_t + Lambda of all places t (tokens) of a row, as the
  summands that products with them are computed from. The matrix of a place is
  never stored.

  The row is cut into pieces of P places. For place t of a piece, with the state
  H_0 before the piece,

    H_t = upto_t H_0 + sum over s <= t of between_ts written_s k_s^T

  The suffixes name axes: B rows of the batch, H heads, P and Q places of a
  piece, K features of a key. All arrays but `ridge_HK` have one more axis in
  front of these, that of the pieces.
  """
  k_BHPK: jax.Array  # the keys k
  written_BHPK: jax.Array  # the keys times their rates, b k
  # The product of the decays after place Q up to place P; 0 if Q is later.
  between_BHPQ: jax.Array
  # The product of the decays from the start of the piece up to place P.
  upto_BHP: jax.Array
  states_BHKK: jax.Array  # the state H_0 before each piece
  ridge_HK: jax.Array  # the diagonal of Lambda


class _PieceOfState(NamedTuple):
  """The numbers by which a piece of P places changes the state of a head, which
  has both matrices H and G side by side, [K, M] with M = K + U columns.

  The suffixes name axes: B rows of the batch, H heads, P places of the piece, K
  features of a key, M features of a key and of a value. In a scan over pieces,
  the axis of the pieces stands in front.
  """
  # Keys times their rates, b k, as far as they last until the piece ends.
  written_BHPK: jax.Array
  keys_and_values_BHPM: jax.Array  # k and v of each place, side by side
  decay_BH: jax.Array  # the product of the decays of all places of the piece


class _Search(NamedTuple):
  """How far conjugate gradients have come in solving A x = q. Arrays of vectors
  are [pieces, B, H, P, K], and there is a system for each place P."""
  x: jax.Array  # the solution so far
  residual: jax.Array  # what is missing, q - A x
  direction: jax.Array  # the vector along which the next step goes
  square: jax.Array  # the squared length of `residual`, [pieces, B, H, P]


class Mesa(layer.Layer):
  """(x_BLD, context, cache) -> (y_BLD, cache, report): see the file's
  equations."""
  settings = MesaConfig
  silu_without_conv = True
  convolved = 'query', 'key'

  def inputs(self, x_BLD: jax.Array, q_BLJK: jax.Array, k_BLJK: jax.Array,
             v_BLHU: jax.Array, ctx: Context) -> recurrence.Inputs:
    """Makes the inputs of the mesa layer: queries and keys of length 1, values,
    and for each head a decay a = sigmoid(W_a x + bias) and a rate b =
    sigmoid(W_b x + bias). The arguments are those of `Layer.inputs`.

    The suffixes name axes: B batch, L length, D d_model, J heads of keys, H
    heads of values (as many), K features of a key, U features of a value.
    """
    del ctx
    q_BLJK = features.normalize_length(q_BLJK)
    k_BLJK = features.normalize_length(k_BLJK)
    decay_logits_BLH = self._project_with_bias('decay', x_BLD)
    log_decay_BLH1 = jax.nn.log_sigmoid(decay_logits_BLH)[..., None]
    rate_logits_BLH = self._project_with_bias('rate', x_BLD)
    return recurrence.Inputs(
        q_BLJK=q_BLJK, k_BLJK=k_BLJK, v_BLHU=v_BLHU,
        log_decay_BLHK=log_decay_BLH1,
        rate_BLH=jax.nn.sigmoid(rate_logits_BLH))

  def _project_with_bias(self, name: str, x_BLD: jax.Array) -> jax.Array:
    """Returns W x + bias, one number for each head, float32 [B, L, H]. The
    weight `name` and the bias `name`_bias are declared here."""
    bias_H = layers.bias(self, f'{name}_bias', shape=(self.sizes.heads,),
                         axes=('heads',))
    return layers.add_bias(self.project_to_heads(name, x_BLD), bias_H)

  def run(self, inputs: recurrence.Inputs, x_BLD: jax.Array, ctx: Context,
          cache: Optional[layer.State]) -> tuple[jax.Array, layer.State]:
    """Runs the recurrence of both matrices, H and G, and reads them by
    conjugate gradients. Lambda = LEAST_RIDGE + softplus(r), where r, a number
    for each feature of a key, is learned. The arguments and results are those
    of `Layer.run`."""
    del x_BLD
    sizes = self.sizes
    learned_HK = declare(self, 'ridge', init=_initial_ridge,
                         shape=(sizes.heads, sizes.key_dim),
                         role=Role(layer.VALUE_AXES)).astype(jnp.float32)
    # The bound keeps Lambda positive, so that H + Lambda has an inverse.
    ridge_HK = LEAST_RIDGE + jax.nn.softplus(learned_HK)

    # Both matrices begin at zero with each document.
    inputs = layer.reset_at_documents(inputs, ctx,
                                      keeps_state=cache is not None)
    previous_BHKM = None
    if cache is not None:
      previous_BHKM = cache.state_BHKU
    o_BLHU, state_BHKM = run_mesa(inputs, ridge_HK, steps=sizes.cg_steps,
                                  state_BHKM=previous_BHKM)
    return o_BLHU, layer.State(state_BHKM)

  def normalise_and_gate(self, o_BLHU: jax.Array, x_BLD: jax.Array,
                         v_BLHU: jax.Array, ctx: Context) -> jax.Array:
    """Returns RMSNorm(o): this layer has no gate."""
    del x_BLD, v_BLHU, ctx
    return features.RMSNorm(self.config, name='out_norm')(o_BLHU)


def _initial_ridge(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype
                   ) -> jax.Array:
  """Returns the number that the softplus maps to 1 - LEAST_RIDGE, so that
  Lambda is 1 at first. log(exp(y) - 1) is the inverse of the softplus."""
  del key  # nothing is drawn
  return jnp.full(shape, jnp.log(jnp.expm1(1 - LEAST_RIDGE)), dtype)


def run_mesa(x: recurrence.Inputs, ridge_HK: jax.Array, steps: int,
             state_BHKM: Optional[jax.Array] = None,
             places: Optional[int] = None) -> tuple[jax.Array, jax.Array]:
  """Computes the outputs of the mesa layer for all places t (tokens) of a row,

    o_t = G_t^T (H_t + Lambda)^-1 q_t
    H_t = a_t H_t-1 + b_t k_t k_t^T,   G_t = a_t G_t-1 + b_t k_t v_t^T

  in pieces (chunks) of a row. A piece of one place, as in decoding, is the
  definition.

  The suffixes name axes: B rows of the batch, L places, H heads, K features of
  a key, U features of a value, M = K + U.

  Args:
    x: queries, keys, values, decays a and rates b, with as many heads of keys
      as of values and one decay of a head. Everything is computed in float32.
    ridge_HK: the diagonal of Lambda for each head.
    steps: the steps of conjugate gradients, by which the inverse is applied.
    state_BHKM: H and G before the first place, side by side; None: zero.
    places: the most places of a piece; default: recurrence.default_places.

  Returns:
    o, float32 [B, L, H, U], and the state after the last place.
  """
  B, L, H, U = x.v_BLHU.shape
  K = x.k_BLJK.shape[-1]
  if state_BHKM is None:
    state_BHKM = jnp.zeros((B, H, K, K + U))
  # A state that is a constant of the program would be miscompiled on CPU: see
  # recurrence.run_recurrence.
  state_BHKM = jax.lax.optimization_barrier(state_BHKM)

  # Cut the row into as few pieces as possible, all of equal length, [pieces, B,
  # H, P, ...], and add up their decays. The minus signs make // round up.
  most_places = places or recurrence.default_places(K)
  num_pieces = -(-L // most_places)
  places_of_piece = -(-L // num_pieces)
  q, k, v, log_decay, rate = jax.tree.map(
      functools.partial(pieces.cut_heads_into_pieces, places_of_piece),
      (x.q_BLJK, x.k_BLJK, x.v_BLHU, x.log_decay_BLHK, x.rate_BLH))
  between, upto = pieces.decays_within_piece(log_decay[..., 0])
  written = features.scale_vectors(k, rate)
  without_padding = functools.partial(
      pieces.count_flops_without_padding, places_of_piece, L)

  # Compute the states before all pieces, one piece after another.
  written_until_end = features.scale_vectors(written, between[..., -1, :])
  with without_padding():
    pieces_of_state = _PieceOfState(
        written_BHPK=written_until_end,
        keys_and_values_BHPM=jnp.concatenate([k, v], -1),
        decay_BH=upto[..., -1])
    last_BHKM, states = jax.lax.scan(
        _add_piece_to_state, state_BHKM, pieces_of_state)

  # Solve (H + Lambda) y = q for each query, and read the values by y.
  covariance = Covariance(
      k_BHPK=k, written_BHPK=written, between_BHPQ=between, upto_BHP=upto,
      states_BHKK=states[..., :K], ridge_HK=ridge_HK)
  with without_padding():
    solution = solve_by_conjugate_gradients(steps, covariance, q)
    o = _read_decayed_sums(
        covariance, solution, values=v, states=states[..., K:])

  # The pieces, [pieces, B, H, P, U], are one row again. The places that filled
  # up the last one are cut off.
  o_BLHU = jnp.moveaxis(o, (0, 2), (1, 3)).reshape(B, -1, H, U)[:, :L]
  return o_BLHU, last_BHKM


def _add_piece_to_state(state_BHKM: jax.Array, piece: _PieceOfState
                        ) -> tuple[jax.Array, jax.Array]:
  """Returns the state of the mesa layer after a piece of a row, which is the
  carry of a scan over pieces; and the state before it, which the scan collects.

  Args:
    state_BHKM: the matrices H and G side by side before the piece, [B, H, K,
      M], with M = K + U.
    piece: what the piece adds, and how far the state decays in it.
  """
  added_BHKM = jnp.einsum('bhpk,bhpm->bhkm', piece.written_BHPK,
                          piece.keys_and_values_BHPM)
  decayed_BHKM = piece.decay_BH[..., None, None] * state_BHKM
  return decayed_BHKM + added_BHKM, state_BHKM


def _read_decayed_sums(covariance: Covariance, x: jax.Array, values: jax.Array,
                       states: jax.Array) -> jax.Array:
  """Multiplies a vector x_t of each place t (token) by a matrix S_t, which is
  the decayed sum of what all places up to t have written:

    S_t = upto_t S_0 + sum over s <= t of between_ts written_s y_s^T

  so that the product is

    x_t S_t = upto_t x_t S_0
              + sum over s <= t of between_ts (x_t . written_s) y_s

  With y = k, S_t is the matrix H_t of the mesa layer, and with y = v it is G_t.
  The matrices S_t are never made, which would take K times the memory.

  The shapes name axes: N pieces of a row, B rows of the batch, H heads, P
  places of a piece, K features of a key, U features of y.

  Args:
    covariance: `written_BHPK`, `between_BHPQ` and `upto_BHP` of it are read.
    x: the vectors x_t, [N, B, H, P, K].
    values: y, [N, B, H, P, U].
    states: S_0, the sum before each piece, [N, B, H, K, U].

  Returns:
    x_t S_t, [N, B, H, P, U].
  """
  # Within the piece. All P * P pairs of places are multiplied, but only P *
  # (P + 1) / 2 count as FLOPs: those of a place with itself and earlier ones.
  P = x.shape[-2]
  with layers.count_flops_as_useful_part(P + 1, 2 * P):
    products = x @ jnp.swapaxes(covariance.written_BHPK, -1, -2)
    read_in_piece = (covariance.between_BHPQ * products) @ values
  # From before the piece. All of this product counts.
  with layers.count_flops_as_useful_part(1, 1):
    read_of_states = x @ states
  return read_in_piece + features.scale_vectors(
      read_of_states, covariance.upto_BHP)


def multiply_by_covariance(covariance: Covariance, x: jax.Array) -> jax.Array:
  """Returns (H_t + Lambda) x_t of all places t, of the shape of x, [pieces, B,
  H, P, K]. H_t is symmetric, so that x_t H_t is H_t x_t."""
  ridge_HPK = covariance.ridge_HK[:, None]
  return ridge_HPK[None, None] * x + _read_decayed_sums(
      covariance, x, values=covariance.k_BHPK, states=covariance.states_BHKK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def solve_by_conjugate_gradients(steps: int, covariance: Covariance,
                                 q: jax.Array) -> jax.Array:
  """Returns x_t = (H_t + Lambda)^-1 q_t of all places t, by a fixed number of
  steps of conjugate gradients from x = 0 (Hestenes and Stiefel 1952).

  The gradient is that of the exact inverse, as in the authors' program, and not
  of the steps: `_solve_backward` has its equations.

  Args:
    steps: how many steps there are.
    covariance: the matrices H_t + Lambda.
    q: the right sides, [pieces, B, H, P, K].

  Returns:
    x, of the shape of q.
  """
  # From x = 0, all of q is missing, and the first step goes along it.
  start = _Search(x=jnp.zeros_like(q), residual=q, direction=q,
                  square=_inner_products(q, q))
  take_step = functools.partial(_take_conjugate_step, covariance)
  end, _ = jax.lax.scan(take_step, start, None, length=steps)
  return end.x


def _take_conjugate_step(covariance: Covariance, search: _Search, _: None
                         ) -> tuple[_Search, None]:
  """Takes one step of conjugate gradients for A x = q, where A is H_t + Lambda
  of a place, r the residual q - A x and d the direction of the step:

    x' = x + s d,   r' = r - s A d,        s = |r|^2 / (d . A d)
    d' = r' + (|r'|^2 / |r|^2) d           so that d' . A d = 0

  Args:
    covariance: the matrices A.
    search: x, r and d before the step.

  Returns:
    The same after the step; and None, since a scan collects nothing of it.
  """
  # Go along the direction, as far as makes the error least.
  product = multiply_by_covariance(covariance, search.direction)
  curvature = _inner_products(search.direction, product)
  length = search.square / (curvature + DIVISION_EPS)
  x = search.x + features.scale_vectors(search.direction, length)
  residual = search.residual - features.scale_vectors(product, length)

  # The next direction.
  square = _inner_products(residual, residual)
  ratio = square / (search.square + DIVISION_EPS)
  direction = residual + features.scale_vectors(search.direction, ratio)
  next_search = _Search(
      x=x, residual=residual, direction=direction, square=square)
  return next_search, None


def _inner_products(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns the inner products of vectors, which count as the recurrence's
  FLOPs and not as products with weights."""
  with layers.count_flops_as_useful_part(1, 1):
    return features.inner_products(x, y)


def _solve_forward(steps: int, covariance: Covariance, q: jax.Array):
  """Returns `solve_by_conjugate_gradients`, and what its gradient reads: the
  matrices and the solution."""
  x = solve_by_conjugate_gradients(steps, covariance, q)
  return x, (covariance, x)


def _solve_backward(steps: int, kept: tuple[Covariance, jax.Array],
                    d_x: jax.Array) -> tuple[Covariance, jax.Array]:
  """Computes the gradients of x = A^-1 q, where A is H_t + Lambda of a place:

    dq = A^-1 dx        A is symmetric, so this is a system like the first
    dA = -dq x^T

  dA has a matrix for each place and is not made. It is the gradient of the
  product A x where that of the result is -dq, and JAX takes it from there to
  the arrays that A is a sum of.

  Args:
    steps: how many steps of conjugate gradients solve for dq.
    kept: what the forward pass kept: the matrices, and the solution x.
    d_x: the gradient of x, [pieces, B, H, P, K].

  Returns:
    The gradients of the matrices' summands, and of q.
  """
  covariance, x = kept
  d_q = solve_by_conjugate_gradients(steps, covariance, d_x)
  _, backward = jax.vjp(lambda matrices: multiply_by_covariance(matrices, x),
                        covariance)
  d_covariance, = backward(-d_q)
  return d_covariance, d_q


solve_by_conjugate_gradients.defvjp(_solve_forward, _solve_backward)


class MesaMixer(layer.Recurrence):
  """The entry of the mesa layer."""

  def cache(self, config: ModelConfig, shape: tuple[int, ...]) -> layer.State:
    """Returns an empty cache, whose state has both matrices of each head."""
    state = super().cache(config, shape)
    empty_BHKK = jnp.zeros(
        (*state.state_BHKU.shape[:-1], state.state_BHKU.shape[-2]))
    return state.replace(state_BHKU=jnp.concatenate(
        [empty_BHKK, state.state_BHKU], -1))
