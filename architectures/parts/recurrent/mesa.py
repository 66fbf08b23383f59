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
  """The matrices H_t + Lambda of all places t of all pieces of a row, as what
  they are sums of. The first axis, which the names leave out, is that of the
  pieces."""
  k_BHPK: jax.Array
  written_BHPK: jax.Array  # b k
  between_BHPQ: jax.Array  # the decay after place Q up to P, or 0
  upto_BHP: jax.Array  # the decay of the piece up to a place
  states_BHKK: jax.Array  # H before each piece
  ridge_HK: jax.Array  # the diagonal of Lambda


class Mesa(layer.Layer):
  """(x_BLD, context, cache) -> (y_BLD, cache, report): see the file's
  equations."""
  settings = MesaConfig
  silu_without_conv = True
  convolved = 'query', 'key'

  def inputs(self, x_BLD: jax.Array, q_BLJK: jax.Array, k_BLJK: jax.Array,
             v_BLHU: jax.Array, ctx: Context) -> recurrence.Inputs:
    """Makes the inputs of the mesa layer: queries and keys of length 1, values,
    and the decays a and rates b of each head. The arguments are those of
    `Layer.inputs`."""
    del ctx

    def logits(name: str) -> jax.Array:
      """Returns a product with the input and a bias, [B, L, H]."""
      bias_H = layers.bias(self, f'{name}_bias', shape=(self.sizes.heads,),
                           axes=('heads',))
      return layers.add_bias(self.project_to_heads(name, x_BLD), bias_H)

    return recurrence.Inputs(
        features.normalize_length(q_BLJK), features.normalize_length(k_BLJK),
        v_BLHU, log_decay_BLHK=jax.nn.log_sigmoid(logits('decay'))[..., None],
        rate_BLH=jax.nn.sigmoid(logits('rate')))

  def run(self, inputs: recurrence.Inputs, x_BLD: jax.Array, ctx: Context,
          cache: Optional[layer.State]) -> tuple[jax.Array, layer.State]:
    """Runs the recurrence of both matrices, and reads them by conjugate
    gradients. The arguments and results are those of `Layer.run`."""
    del x_BLD
    sizes = self.sizes
    ridge_HK = declare(self, 'ridge', init=_initial_ridge,
                       shape=(sizes.heads, sizes.key_dim),
                       role=Role(layer.VALUE_AXES)).astype(jnp.float32)
    ridge_HK = LEAST_RIDGE + jax.nn.softplus(ridge_HK)
    inputs = layer.reset_at_documents(inputs, ctx,
                                      keeps_state=cache is not None)
    o_BLHU, state_BHKM = run_mesa(
        inputs, ridge_HK, steps=sizes.cg_steps,
        state_BHKM=None if cache is None else cache.state_BHKU)
    return o_BLHU, layer.State(state_BHKM)

  def normalise_and_gate(self, o_BLHU: jax.Array, x_BLD: jax.Array,
                         v_BLHU: jax.Array, ctx: Context) -> jax.Array:
    """Returns RMSNorm(o): this layer has no gate."""
    del x_BLD, v_BLHU, ctx
    return features.RMSNorm(self.config, name='out_norm')(o_BLHU)


def _initial_ridge(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype
                   ) -> jax.Array:
  """Returns what the softplus maps to 1 - LEAST_RIDGE, so that Lambda is 1."""
  del key
  return jnp.full(shape, jnp.log(jnp.expm1(1 - LEAST_RIDGE)), dtype)


def run_mesa(x: recurrence.Inputs, ridge_HK: jax.Array, steps: int,
             state_BHKM: Optional[jax.Array] = None,
             places: Optional[int] = None) -> tuple[jax.Array, jax.Array]:
  """Computes o_t = G_t^T (H_t + Lambda)^-1 q_t of the mesa layer (see the top
  of this file) in pieces (chunks) of a row. A piece of one place, as in
  decoding, is the definition.

  Args:
    x: queries, keys, values, decays and rates, with as many heads of keys as of
      values and one decay of a head. Everything is computed in float32.
    ridge_HK: the diagonal of Lambda for each head.
    steps: the steps of conjugate gradients.
    state_BHKM: H and G before the first place, side by side, M = K + U; None:
      zero.
    places: the most places of a piece; default: recurrence.default_places.

  Returns:
    o, float32 [B, L, H, U], and the state after the last place.
  """
  B, L, H, U = x.v_BLHU.shape
  K = x.k_BLJK.shape[-1]
  if state_BHKM is None:
    state_BHKM = jnp.zeros((B, H, K, K + U))
  # See recurrence.run_recurrence of a state that is a constant.
  state_BHKM = jax.lax.optimization_barrier(state_BHKM)

  # Cut the row into pieces of equal length, and add up their decays.
  places = places or recurrence.default_places(K)
  places = -(-L // -(-L // places))
  q, k, v, log_decay, rate = jax.tree.map(
      functools.partial(pieces.cut_heads_into_pieces, places), tuple(x[:5]))
  between, upto = pieces.decays_within_piece(log_decay[..., 0])
  written = features.scale_vectors(k, rate)
  without_padding = functools.partial(
      pieces.count_flops_without_padding, places, L)

  def add_piece(state_BHKM: jax.Array, piece: tuple[jax.Array, ...]
                ) -> tuple[jax.Array, jax.Array]:
    """Adds a piece to the state before it, which is returned too."""
    written_BHPK, values_BHPM, decay_BH = piece
    added_BHKM = jnp.einsum('bhpk,bhpm->bhkm', written_BHPK, values_BHPM)
    return decay_BH[..., None, None] * state_BHKM + added_BHKM, state_BHKM

  # The states between pieces, of keys and values side by side.
  decayed = features.scale_vectors(written, between[..., -1, :])
  with without_padding():
    last_BHKM, states = jax.lax.scan(
        add_piece, state_BHKM,
        (decayed, jnp.concatenate([k, v], -1), upto[..., -1]))

  # Solve for each query, and read the values by the solution.
  covariance = Covariance(
      k_BHPK=k, written_BHPK=written, between_BHPQ=between, upto_BHP=upto,
      states_BHKK=states[..., :K], ridge_HK=ridge_HK)
  with without_padding():
    solution = solve_by_conjugate_gradients(steps, covariance, q)
    o = _read(covariance, solution, values=v, states=states[..., K:])
  o_BLHU = jnp.moveaxis(o, (0, 2), (1, 3)).reshape(B, -1, H, U)[:, :L]
  return o_BLHU, last_BHKM


def _read(covariance: Covariance, x: jax.Array, values: jax.Array,
          states: jax.Array) -> jax.Array:
  """Returns what vectors x_t, [pieces, B, H, P, K], read of the decayed sum of
  all b k values^T up to their place t: of the places of the piece, and of the
  states before it."""
  P = x.shape[-2]
  with layers.count_flops_as_useful_part(P + 1, 2 * P):
    products = x @ jnp.swapaxes(covariance.written_BHPK, -1, -2)
    read = (covariance.between_BHPQ * products) @ values
  with layers.count_flops_as_useful_part(1, 1):
    read_of_states = x @ states
  return read + features.scale_vectors(read_of_states, covariance.upto_BHP)


def multiply_by_covariance(covariance: Covariance, x: jax.Array) -> jax.Array:
  """Returns (H_t + Lambda) x_t, of the shape of x, [pieces, B, H, P, K]."""
  ridge_HPK = covariance.ridge_HK[:, None]
  return ridge_HPK[None, None] * x + _read(
      covariance, x, values=covariance.k_BHPK, states=covariance.states_BHKK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def solve_by_conjugate_gradients(steps: int, covariance: Covariance,
                                 q: jax.Array) -> jax.Array:
  """Returns x_t = (H_t + Lambda)^-1 q_t of all places, by steps of conjugate
  gradients from x = 0.

  The gradient is that of the exact inverse, as in the authors' program: with
  A = H + Lambda, dq = A^-1 dx is solved for in the same way, and dA = -dq x^T.

  Args:
    steps: how many steps there are.
    covariance: the matrices H_t + Lambda.
    q: the right sides, [pieces, B, H, P, K].
  """
  def take_step(carry: tuple[jax.Array, ...], _: None):
    """Goes along a direction, and makes the next one, conjugate to it."""
    x, residual, direction, square = carry
    product = multiply_by_covariance(covariance, direction)
    length = square / (_inner_products(direction, product) + DIVISION_EPS)
    x += features.scale_vectors(direction, length)
    residual -= features.scale_vectors(product, length)
    new_square = _inner_products(residual, residual)
    ratio = new_square / (square + DIVISION_EPS)
    direction = residual + features.scale_vectors(direction, ratio)
    return (x, residual, direction, new_square), None

  first = jnp.zeros_like(q), q, q, _inner_products(q, q)
  (x, *_), _ = jax.lax.scan(take_step, first, None, length=steps)
  return x


def _inner_products(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns the inner products of vectors, which count as the recurrence's
  FLOPs and not as products with weights."""
  with layers.count_flops_as_useful_part(1, 1):
    return features.inner_products(x, y)


def _solve_forward(steps: int, covariance: Covariance, q: jax.Array):
  x = solve_by_conjugate_gradients(steps, covariance, q)
  return x, (covariance, x)


def _solve_backward(steps: int, kept: tuple[Covariance, jax.Array],
                    d_x: jax.Array) -> tuple[Covariance, jax.Array]:
  """Computes the gradients of the matrices and of the right sides."""
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
