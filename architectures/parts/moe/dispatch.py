"""Computing the experts, on this device or spread over the mesh.

y_t = sum over the assignments (t, e, g) of g * FFN_e(x_t), in two ways:

sorted    rows are gathered to [E, C, D] and multiplied as a batch.
dropless  rows are sorted by expert and multiplied in groups, without padding
          (MegaBlocks: Gale et al. 2022); moe/grouped.py has the product.

Beside the legend, A counts assignments, P rows that experts compute, X a
token's choices, and n the devices that the experts are spread over.

The two agree, drops included. Rows move by gathers both ways: forward by
the token of a row, backward by the rows of a token.

On a mesh, `shard_map` hands each device its tokens (split over the axes of
'tokens') and its experts (over the axis of 'experts'). Assignments are sorted
by the device of their expert, cross with one all-to-all, pass through the
expert, and return with a second; the backward pass has the same two. Once
dispatched, the batch is off the expert axis. Weights are gathered over the
axes of 'embed' (ZeRO-3), and with 'mlp' over tensor the halves of a result
are summed after they have returned, when there are fewest.

If remat computes a layer again ('dots' does so too), the two forward crossings
run again, which makes 6. In dropless only the crossing to the experts does,
which makes 5: the gates cross with the rows, so their gradients are known where
the experts are, and the results need not return again. To keep what has crossed
would take memory for the worst routing, n times the rows that there are, and
several times that for the hidden units.

Bytes that a device sends for each of its tokens, in each crossing:

  r * D * itemsize * (n - 1) / n

with n the devices along the expert axis and r the rows of the buffer a token:
  sorted           E * C / T    C a device's slots of an expert
  dropless         n * min(X, E / n), the bound that no routing exceeds
(XLA's CPU backend has no all-to-all of bfloat16, and sends it as float32.)

In the forward direction there also cross, as int32, the id of each row, if
experts have dropout, and in dropless how many rows are for each of the E
experts. In dropless a gate crosses with each row, in float32, and its gradient
crosses back.

On TPU and GPU dropless sends only the rows that are full
(`ragged_all_to_all`): X * (n - 1) / n of them in even load. Gates are an
exception on TPU, see `exchange_over_mesh`.

A capacity bounds what an expert takes of a group. A group of many devices may
fill an expert from one of them, so padding keeps the whole group's slots on
each: the work of a device would not fall with their number. `auto` pads only
where that costs little, and is dropless, which has the same drops, elsewhere.
"""

import functools
from typing import NamedTuple, Optional

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from architectures.parts import layers, sharding
from architectures.parts.layers import HiddenUnits, hash_uint32
from architectures.parts.moe import grouped, routing
from architectures.parts.moe.routing import MoEConfig, Routing
from architectures.parts.moe.routing import rank_among_equal_keys
from common.errors import RequestError

# How many slots for each assignment `auto` accepts, see `choose_dispatch`.
MOST_SLOTS_PER_ASSIGNMENT = 2
# 2^32 over the golden ratio. Times small whole numbers, it gives numbers that
# are spread over all 32 bits (Fibonacci hashing: Knuth, volume 3, 6.4).
SPREADING_FACTOR = 0x9e3779b9


# On one device.


@struct.dataclass
class ExpertWeights:
  """The weights of the experts' networks, act(x up, x gate) down; one that a
  kind of network lacks is None."""
  up_EDF: jax.Array
  down_EFD: jax.Array
  gate_EDF: Optional[jax.Array] = None
  up_bias_EF: Optional[jax.Array] = None
  gate_bias_EF: Optional[jax.Array] = None
  down_bias_ED: Optional[jax.Array] = None


@struct.dataclass
class ExpertDropout:
  """Expert dropout on the hidden units (Switch, section 2.4).

  The mask is a hash of (seed, assignment, unit): the same however the rows
  are ordered, and wherever they are computed.

  Attributes:
    seed: a uint32 scalar.
    first_row: the id of this device's first assignment.
    first_unit: the number of this device's first hidden unit.
    rate: the share of hidden units that are dropped.
  """
  seed: jax.Array
  first_row: jax.Array | int = 0
  first_unit: jax.Array | int = 0
  rate: float = struct.field(pytree_node=False, default=0.0)

  def mask(self, id_P: jax.Array, num_units: int) -> jax.Array:
    """Returns the factors by which dropout multiplies the hidden units of the
    experts' networks: 0 with probability `rate`, else 1 / (1 - rate), so that
    their mean is 1.

    The random bits are a hash of (seed, assignment, unit), where an assignment
    is a pair of a token and its expert:

      bits_pf = hash(hash(id_p xor seed) + unit_f SPREADING_FACTOR)

    So the mask is the same however rows are sorted and whichever device
    computes them, as it would not be if bits were drawn in the rows' order.

    The suffixes name axes: P rows, F hidden units.

    Args:
      id_P: the id of the assignment that each row computes.
      num_units: how many of a row's hidden units this device has.

    Returns:
      The factors, float32 [P, F].
    """
    # Hash each row, and then each unit of it.
    unit_F = (jnp.arange(num_units) + self.first_unit).astype(jnp.uint32)
    row_hash_P = hash_uint32(id_P.astype(jnp.uint32) ^ self.seed)
    bits_PF = hash_uint32(
        row_hash_P[:, None] + unit_F[None] * jnp.uint32(SPREADING_FACTOR))

    # A share `rate` of all 32-bit numbers is dropped: those below the bound.
    bound = int(self.rate * 2 ** 32)
    keep_PF = bits_PF >= jnp.uint32(bound)
    return keep_PF / (1 - self.rate)


def batched_ffn(rows_ECD: jax.Array, w: ExpertWeights, hidden: HiddenUnits,
                mask_ECF: Optional[jax.Array] = None) -> jax.Array:
  """Applies the feed-forward network of each expert to its rows, in one batch
  in which all experts have the same number of rows:

    y = act(x W_up + b_up, x W_gate + b_gate) W_down + b_down

  The suffixes name axes: E experts, C rows of an expert, D features of a row, F
  hidden units.

  Args:
    rows_ECD: the rows x.
    w: the experts' weights.
    hidden: the function act. Its second argument exists in gated networks only.
    mask_ECF: the factors of the hidden units, for dropout; None: there is no
      dropout.

  Returns:
    The results, [E, C, D].
  """

  def affine(spec: str, x: jax.Array, weight: jax.Array,
             bias: Optional[jax.Array]) -> jax.Array:
    """Returns x weight + bias, for each expert."""
    y = layers.einsum(spec, x, weight, dtype=x.dtype)
    if bias is None:
      return y
    return y + bias[:, None]

  # The products that the activation reads: one, or two in a gated network.
  to_hidden = 'ECD,EDF->ECF'
  activation_inputs = [affine(to_hidden, rows_ECD, w.up_EDF, w.up_bias_EF)]
  if hidden.gated:
    activation_inputs.append(
        affine(to_hidden, rows_ECD, w.gate_EDF, w.gate_bias_EF))

  # The hidden units, of which dropout sets some to 0, and the output.
  h_ECF = hidden(*activation_inputs)
  if mask_ECF is not None:
    h_ECF = h_ECF * mask_ECF.astype(h_ECF.dtype)
  return affine('ECF,EFD->ECD', h_ECF, w.down_EFD, w.down_bias_ED)


def _gather_rows(x_P: jax.Array, index_A: jax.Array) -> jax.Array:
  """Returns x[index], and zeros where an index is outside of x."""
  return x_P.at[index_A].get(mode='fill', fill_value=0)


def _sum_choices_of_tokens(x_AD: jax.Array, tokens: int, choices: int
                           ) -> jax.Array:
  """Returns the sum of each token's assignments, [T, D], added in float32,
  where the `choices` assignments of a token stand one after another."""
  x_TXD = x_AD.reshape(tokens, choices, -1)
  sum_TD = x_TXD.sum(1, dtype=jnp.float32)
  return sum_TD.astype(x_AD.dtype)


def _scatter_sum_to_tokens(x_AD: jax.Array, token_A: jax.Array, tokens: int
                           ) -> jax.Array:
  """Returns the sum of each token's assignments, [T, D], which may stand in any
  order. Where token_A is T, a row is left out."""
  zeros_TD = jnp.zeros((tokens, x_AD.shape[1]), x_AD.dtype)
  return zeros_TD.at[token_A].add(x_AD, mode='drop')


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gather_tokens(x_TD: jax.Array, token_P: jax.Array, row_A: jax.Array,
                  choices: int) -> jax.Array:
  """Copies tokens to the rows that experts compute, y_p = x[token_p]. The
  gradient, defined below, adds up the rows of each token. It gathers them by
  the inverse map `row_A`, which is faster than the scatter that JAX would
  derive.

  The suffixes name axes: T tokens, D d_model, P rows, A assignments. An
  assignment is a pair of a token and an expert that it goes to.

  Args:
    x_TD: the tokens.
    token_P: the token of each row. The number T, which is no token, gives a row
      of zeros.
    row_A: the inverse map, which only the gradient reads: the row of each
      assignment; P if it has no row.
    choices: how many assignments each token has, if those of a token stand one
      after another. 0: they stand in any order, and the gradient is a scatter.

  Returns:
    The rows, [P, D].
  """
  del row_A, choices  # the forward pass needs neither
  return _gather_rows(x_TD, token_P)


def _gather_tokens_forward(x_TD: jax.Array, token_P: jax.Array,
                           row_A: jax.Array, choices: int):
  """Returns `gather_tokens`, and what its gradient reads."""
  rows_PD = gather_tokens(x_TD, token_P, row_A, choices=choices)
  return rows_PD, (token_P, row_A, x_TD.shape[0])


def _gather_tokens_backward(choices: int, saved: tuple, dy_PD: jax.Array):
  """Computes the gradient of `gather_tokens`, y_p = x[token_p]:

    dx_t = sum over the assignments a of token t of dy[row_a]

  An assignment is a pair of a token and an expert; row_a is its row. The
  suffixes name axes: P rows, D d_model, A assignments.

  Args:
    choices: how many assignments each token has, one after another; 0: they
      stand in any order.
    saved: what the forward pass kept: token_P, row_A and the number of tokens.
    dy_PD: the gradient of the rows.

  Returns:
    The gradient of the tokens, [T, D], and None for each of the two indices.
  """
  token_P, row_A, tokens = saved
  if choices == 0:
    return _scatter_sum_to_tokens(dy_PD, token_P, tokens), None, None
  dy_AD = _gather_rows(dy_PD, row_A)
  return _sum_choices_of_tokens(dy_AD, tokens, choices), None, None


gather_tokens.defvjp(_gather_tokens_forward, _gather_tokens_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def combine_results(
    y_PD: jax.Array, gate_A: Optional[jax.Array], token_A: jax.Array,
    row_A: jax.Array, assignment_P: jax.Array, tokens: int, choices: int
    ) -> jax.Array:
  """Adds up the experts' results for each token, weighed by the router's gates:

    z_t = sum over the assignments a of token t of gate_a * y[row_a]

  An assignment is a pair of a token and an expert that it goes to. The suffixes
  name axes: P rows, D d_model, A assignments, T tokens.

  Args:
    y_PD: the experts' results.
    gate_A: the gate of each assignment; None: the rows have been multiplied by
      their gates already.
    token_A: the token of each assignment.
    row_A: the row that computed each assignment; P if it has no row.
    assignment_P: the inverse of row_A, which only the gradient reads; A if a
      row has no assignment.
    tokens: T, the number of tokens.
    choices: how many assignments each token has, if those of a token stand one
      after another. 0: they stand in any order, as where experts choose their
      tokens.

  Returns:
    z, [T, D].
  """
  del assignment_P  # the forward pass does not need it
  y_AD = _gather_rows(y_PD, row_A)
  if gate_A is not None:
    y_AD = y_AD * gate_A[:, None].astype(y_AD.dtype)
  # Where experts chose, a token has any number of assignments, in any order,
  # and only a scatter can add them.
  if choices == 0:
    return _scatter_sum_to_tokens(y_AD, token_A, tokens)
  return _sum_choices_of_tokens(y_AD, tokens, choices)


def _combine_results_forward(
    y_PD: jax.Array, gate_A: Optional[jax.Array], token_A: jax.Array,
    row_A: jax.Array, assignment_P: jax.Array, tokens: int, choices: int):
  """Returns `combine_results`, and what its gradient reads.

  The suffixes name axes: T tokens, D d_model, A assignments (pairs of a token
  and its expert), P rows.
  """
  z_TD = combine_results(
      y_PD, gate_A, token_A=token_A, row_A=row_A, assignment_P=assignment_P,
      tokens=tokens, choices=choices)
  # Only the gradient of the gates reads the results.
  rows_PD = None if gate_A is None else y_PD
  return z_TD, (rows_PD, gate_A, token_A, row_A, assignment_P)


def _combine_results_backward(tokens: int, choices: int, saved: tuple,
                              dz_TD: jax.Array):
  """Computes the gradients of `combine_results`, with gates g:

    z_t = sum over the assignments a of token t of g_a y[row_a]

  With a the assignment that row p computes, and t its token,

    dy_p = g_a dz_t,      dg_a = y[row_a] . dz_t

  Without gates, g is 1. An assignment is a pair of a token and an expert. The
  suffixes name axes: T tokens, D d_model, P rows, A assignments.

  Args:
    tokens: T, the number of tokens.
    choices: how the assignments are ordered, which makes no difference here.
    saved: what the forward pass kept: the rows (None without gates), the gates,
      and the three maps between tokens, assignments and rows.
    dz_TD: the gradient of the tokens' results.

  Returns:
    The gradients of y and g, and None for each of the three maps.
  """
  del choices
  y_PD, gate_A, token_A, row_A, assignment_P = saved
  # Each row takes the gradient of its token; a row without one takes zeros.
  token_P = token_A.at[assignment_P].get(mode='fill', fill_value=tokens)
  dz_PD = _gather_rows(dz_TD, token_P)
  if gate_A is None:
    return dz_PD, None, None, None, None
  # The gates' gradient is computed by row and then taken to the assignments.
  d_gate_P = (dz_PD.astype(jnp.float32) * y_PD.astype(jnp.float32)).sum(1)
  d_gate_A = _gather_rows(d_gate_P, row_A).astype(gate_A.dtype)
  gate_P = _gather_rows(gate_A, assignment_P)
  dy_PD = dz_PD * gate_P[:, None].astype(dz_PD.dtype)
  return dy_PD, d_gate_A, None, None, None


combine_results.defvjp(_combine_results_forward, _combine_results_backward)


def invert_row_of_assignment(row_A: jax.Array, num_rows: int) -> jax.Array:
  """Inverts the map from assignments a (pairs of a token and an expert) to the
  rows that compute them: assignment_p = a where row_a = p.

  The suffixes name axes: A assignments, P rows.

  Args:
    row_A: the row of each assignment. No two have the same row, except for
      numbers from P on, which stand for no row.
    num_rows: P, how many rows there are.

  Returns:
    The assignment of each row, int32 [P]; A, which is no assignment, for a row
    that has none.
  """
  # Each assignment writes its number into its row. One without a row writes
  # past the end, and is dropped.
  A = row_A.shape[0]
  no_assignment_P = jnp.full(num_rows, A, jnp.int32)
  assignment_A = jnp.arange(A, dtype=jnp.int32)
  return no_assignment_P.at[row_A].set(
      assignment_A, mode='drop', unique_indices=True)


class AssignedRows(NamedTuple):
  """The rows that compute the assignments (pairs of a token and its expert) of
  a mixture, in an array that is sorted by expert.

  Attributes:
    row_A: int32 [A], the row of each assignment. A void one, which no expert
      computes, has a number past the end.
    num_rows: how many rows the array has.
    count_E: int32 [E], how many of the rows each expert has.
  """
  row_A: jax.Array
  num_rows: int
  count_E: jax.Array


def assign_padded_rows(expert_A: jax.Array, experts: int, slots: int
                       ) -> jax.Array:
  """Gives each assignment (a pair of a token and its expert) a row, where each
  of E experts has C rows, in the order of its assignments:

    row_a = e C + (how many assignments before a have the expert e of a)

  Args:
    expert_A: the expert of each of A assignments. E stands for a void
      assignment, which no expert computes. An expert must not have more than C
      assignments.
    experts: E, the number of experts.
    slots: C, how many rows each expert has.

  Returns:
    The row of each assignment, int32 [A]; E C, which is past the end, for a
    void one.
  """
  # There are E + 1 numbers of experts, with that of void assignments.
  first_row_A = expert_A * slots
  row_A = first_row_A + rank_among_equal_keys(expert_A, experts + 1)
  past_the_end = experts * slots
  return jnp.where(expert_A < experts, row_A, past_the_end)


def assign_sorted_rows(expert_A: jax.Array, experts: int
                       ) -> tuple[jax.Array, jax.Array]:
  """Gives each assignment (a pair of a token and its expert) a row, such that
  the rows are sorted by expert and have no gaps.

  Args:
    expert_A: the expert of each of A assignments. E stands for a void
      assignment, which no expert computes.
    experts: E, the number of experts.

  Returns:
    The row of each assignment, int32 [A]; A, which is past the end, for a void
    one. And how many rows each expert has, int32 [E].
  """
  A = expert_A.shape[0]
  # order_A[p] is the assignment of row p; its inverse is the row of each. The
  # sort is stable, so that an expert's rows keep the order of the tokens.
  order_A = jnp.argsort(expert_A, stable=True)
  row_A = jnp.zeros_like(order_A).at[order_A].set(
      jnp.arange(A), unique_indices=True)
  # The counts, from where each expert's rows end in the sorted order.
  ends_E = jnp.searchsorted(
      expert_A[order_A], jnp.arange(experts), side='right')
  count_E = jnp.diff(ends_E, prepend=0).astype(jnp.int32)
  return jnp.where(expert_A < experts, row_A, A), count_E


class TokensAsRows(NamedTuple):
  """Tokens that were copied to the rows of their assignments (pairs of a token
  and an expert that it goes to).

  Attributes:
    rows_PD: the rows.
    assignment_P: the assignment of each row; A where it has none.
    row_A: the row of each assignment; P where it has none.
    token_A: the token of each assignment.
    num_tokens: T.
    choices: how many assignments each token has, if those of a token stand one
      after another; 0: they stand in any order.
  """
  rows_PD: jax.Array
  assignment_P: jax.Array
  row_A: jax.Array
  token_A: jax.Array
  num_tokens: int
  choices: int

  def combine(self, y_PD: jax.Array, gate_A: Optional[jax.Array]) -> jax.Array:
    """Adds up the results of the rows for each token:

      z_t = sum over the assignments a of token t of gate_a * y[row_a]

    The suffixes name axes: T tokens, D d_model, A assignments (pairs of a token
    and its expert), P rows.

    Args:
      y_PD: the results of the rows.
      gate_A: the gate of each assignment; None: the rows have been multiplied
        by their gates already.

    Returns:
      The tokens' results z, [T, D].
    """
    return combine_results(
        y_PD, gate_A, token_A=self.token_A, row_A=self.row_A,
        assignment_P=self.assignment_P, tokens=self.num_tokens,
        choices=self.choices)


def copy_tokens_to_rows(x_TD: jax.Array, routed: Routing, row_A: jax.Array,
                        num_rows: int) -> TokensAsRows:
  """Copies tokens to rows, one row for each assignment (pair of a token and an
  expert that it goes to).

  The suffixes name axes: T tokens, D d_model, A assignments, P rows.

  Args:
    x_TD: the tokens.
    routed: what the router decided: the assignments of the tokens.
    row_A: the row of each assignment; P if it has no row.
    num_rows: P, how many rows there are.

  Returns:
    The rows, with the maps between tokens, assignments and rows by which their
    results are added up.
  """
  # The assignment and the token of each row. A row without an assignment has
  # the numbers A and T, past the end.
  T = x_TD.shape[0]
  assignment_P = invert_row_of_assignment(row_A, num_rows)
  token_P = routed.token_A.at[assignment_P].get(mode='fill', fill_value=T)
  rows_PD = gather_tokens(x_TD, token_P, row_A, choices=routed.choices)
  return TokensAsRows(
      rows_PD=rows_PD, assignment_P=assignment_P, row_A=row_A,
      token_A=routed.token_A, num_tokens=T, choices=routed.choices)


def reorder_scalars(x_A: jax.Array, index_P: jax.Array, inverse_A: jax.Array
                    ) -> jax.Array:
  """Returns the scalars x[index_P], [P], and 0 where index_P is A; `inverse_A`
  is the inverse of index_P, which the gradient reads."""
  x_A1 = x_A[:, None]
  reordered_P1 = gather_tokens(
      x_A1, token_P=index_P, row_A=inverse_A, choices=1)
  return reordered_P1[:, 0]


@struct.dataclass
class LocalExperts:
  """The experts of this device, which compute rows of two layouts: as many
  slots for each expert (padded), or sorted by expert (grouped).

  Attributes:
    w: their weights.
    dropout: the dropout of their hidden units, if any.
    settings: how grouped rows are computed.
    experts: how many experts all devices have.
  """
  w: ExpertWeights
  dropout: Optional[ExpertDropout]
  settings: grouped.GroupedSettings = struct.field(pytree_node=False)
  experts: int = struct.field(pytree_node=False)

  def compute_padded(self, rows_ECD: jax.Array, id_EC: jax.Array) -> jax.Array:
    """Returns the results of C rows of each expert, [E, C, D]; id_EC are the
    ids of their assignments, which dropout reads."""
    mask_ECF = self._dropout_mask(id_EC.reshape(-1))
    if mask_ECF is not None:
      mask_ECF = mask_ECF.reshape(*id_EC.shape, -1)
    return batched_ffn(
        rows_ECD, self.w, hidden=self.settings.activation, mask_ECF=mask_ECF)

  def assign_rows(self, expert_A: jax.Array) -> AssignedRows:
    """Gives each assignment a row in the layout of `compute_grouped`: the rows
    of expert 0 first, then those of expert 1, and so on, without gaps.

    The suffixes name axes: A assignments (pairs of a token and its expert), E
    experts.

    Args:
      expert_A: the expert of each assignment; the number of experts for a void
        one.
    """
    row_A, count_E = assign_sorted_rows(expert_A, self.experts)
    return AssignedRows(
        row_A=row_A, num_rows=expert_A.shape[0], count_E=count_E)

  def compute_grouped(self, rows_PD: jax.Array, count_E: jax.Array,
                      id_P: jax.Array, gate_P: jax.Array) -> jax.Array:
    """Applies the experts of this device to rows that are sorted by expert, and
    multiplies each result by its gate: y_p = gate_p FFN_e(row_p), where e is
    the expert whose rows p is among.

    The suffixes name axes: P rows, D d_model, E experts, F hidden units.

    Args:
      rows_PD: the rows, those of the first expert first.
      count_E: int32, how many rows each expert has.
      id_P: the id of the assignment (pair of a token and its expert) that each
        row computes, of which dropout draws its random bits.
      gate_P: the gate of each row.

    Returns:
      The results, [P, D].
    """
    mask_PF = self._dropout_mask(id_P)
    return grouped.grouped_ffn(
        rows_PD, count_E=count_E, gate_P=gate_P, w=self.w, mask_PF=mask_PF,
        settings=self.settings)

  def dropout_ids(self, assignment_P: jax.Array) -> jax.Array:
    """Returns the ids that dropout knows assignments by, on any device."""
    if self.dropout is None:
      return assignment_P
    return assignment_P + self.dropout.first_row

  def _dropout_mask(self, id_P: jax.Array) -> Optional[jax.Array]:
    """Returns the factors of the hidden units, [P, F]; None without dropout."""
    if self.dropout is None:
      return None
    return self.dropout.mask(id_P, self.w.up_EDF.shape[2])


def compute_padded_batch(
    x_TD: jax.Array, routed: Routing, experts: 'LocalExperts | SpreadExperts',
    slots: int) -> jax.Array:
  """Computes a mixture of experts as one batch in which each expert has the
  same number of rows. Rows that no token fills are zeros.

  The suffixes name axes: T tokens, D d_model, A assignments (pairs of a token
  and its expert), E experts, C rows of an expert, P = E C rows.

  Args:
    x_TD: this device's tokens.
    routed: what the router decided: the assignments and their gates.
    experts: the experts' networks, all on this device or spread over a mesh.
    slots: C, how many rows each expert has.

  Returns:
    The experts' results, weighed by the gates and added up for each token,
    [T, D].
  """
  # Copy each token to a row of each of its experts.
  E, D = routed.probs_TE.shape[1], x_TD.shape[1]
  row_A = assign_padded_rows(routed.expert_A, E, slots)
  as_rows = copy_tokens_to_rows(x_TD, routed, row_A, num_rows=E * slots)

  # Apply the experts to the rows as a batch. The ids tell dropout which
  # assignment a row computes.
  rows_ECD = as_rows.rows_PD.reshape(E, slots, D)
  id_EC = experts.dropout_ids(as_rows.assignment_P).reshape(E, slots)
  y_ECD = experts.compute_padded(rows_ECD, id_EC)
  y_PD = y_ECD.reshape(E * slots, D)
  return as_rows.combine(y_PD, routed.gate_A)


def compute_dropless(
    x_TD: jax.Array, routed: Routing, experts: 'LocalExperts | SpreadExperts',
    slots: int) -> jax.Array:
  """Computes a mixture of experts by rows that are sorted by expert, without
  padding (MegaBlocks: Gale et al. 2022).

  The suffixes name axes: T tokens, D d_model, A assignments (pairs of a token
  and its expert), E experts, P rows.

  Args:
    x_TD: this device's tokens.
    routed: what the router decided: the assignments and their gates.
    experts: the experts' networks, all on this device or spread over a mesh.
    slots: how many rows an expert may have, which is not read. Assignments over
      an expert's capacity have been made void before.

  Returns:
    The experts' results, weighed by the gates and added up for each token,
    [T, D].
  """
  del slots
  # Copy each token to a row of each of its experts.
  assigned = experts.assign_rows(routed.expert_A)
  as_rows = copy_tokens_to_rows(
      x_TD, routed, assigned.row_A, num_rows=assigned.num_rows)

  # Apply the experts, which multiply each row by its gate. The gradient of a
  # gate needs the expert's result. Gates that were applied after the rows came
  # back from other devices would cost another exchange under remat.
  gate_P = reorder_scalars(
      routed.gate_A, index_P=as_rows.assignment_P, inverse_A=assigned.row_A)
  id_P = experts.dropout_ids(as_rows.assignment_P)
  y_PD = experts.compute_grouped(
      as_rows.rows_PD, count_E=assigned.count_E, id_P=id_P, gate_P=gate_P)
  # The gates must not be applied a second time, hence None.
  return as_rows.combine(y_PD, None)


# Over the mesh.


class MixtureAxes(NamedTuple):
  """The mesh axes of more than one device, by the logical axis of a mixture
  that is split over them."""
  tokens: tuple[str, ...] = ()
  experts: tuple[str, ...] = ()
  mlp: tuple[str, ...] = ()
  embed: tuple[str, ...] = ()


def mixture_mesh_axes() -> Optional[MixtureAxes]:
  """Returns the mesh axes that the installed sharding rules split a mixture
  over; None: each device has all of it."""
  tokens = sharding.mesh_axes('tokens')
  experts, mlp, embed = sharding.mesh_axes_by_axis('experts', 'mlp', 'embed')
  axes = MixtureAxes(tokens=tokens, experts=experts, mlp=mlp, embed=embed)
  if not any(axes):
    return None
  return axes


def num_expert_shards() -> int:
  """Returns over how many devices the experts are spread."""
  axes = mixture_mesh_axes()
  if axes is None:
    return 1
  return sharding.count_devices_along(axes.experts)


def slots_of_expert(moe: MoEConfig, factor: float, tokens: int, groups: int,
                    shards: int) -> int:
  """Returns how many rows each expert needs on a device in a padded batch: the
  most tokens of the device that can go to the same expert.

  Args:
    moe: the config of the mixture of experts.
    factor: the capacity factor, how much room an expert has relative to an even
      load; 0: there is no limit.
    tokens: the number of tokens of all devices.
    groups: the number of routing groups. The capacity of an expert holds for
      the tokens of a group.
    shards: the number of devices that the tokens are split over.
  """
  # A device's tokens, rounded up as padding does.
  T = -(-tokens // shards)
  if not factor:
    return T
  group_slots = routing.expert_capacity(factor, tokens=tokens // groups,
                                        choices=moe.top_k,
                                        experts=moe.all_experts)
  # A device has whole groups, or a part of one that may fill all of its slots.
  return min(T, max(1, groups // shards) * group_slots)


def choose_dispatch(moe: MoEConfig, factor: float, tokens: int, groups: int,
                    shards: int) -> str:
  """Chooses how a mixture of experts is computed: 'sorted', as a batch in which
  each expert has the same number of rows, or 'dropless', as rows sorted by
  expert without padding.

  The config names one of them, or 'auto': then the batch is taken if padding
  makes it at most MOST_SLOTS_PER_ASSIGNMENT times as large as the rows that are
  needed.

  Args:
    moe: the config of the mixture of experts.
    factor: the capacity factor, how much room an expert has relative to an even
      load; 0: there is no limit.
    tokens: the number of tokens of all devices.
    groups: the number of routing groups, within which tokens share capacity.
    shards: the number of devices that the tokens are split over.
  """
  if moe.dispatch != 'auto':
    return moe.dispatch
  # Experts that choose their tokens fill all of their slots.
  if routing.router_of(moe).experts_choose:
    return 'sorted'
  # Without a capacity, an expert could get all tokens, and padding be useless.
  if not factor:
    return 'dropless'
  # Compare the rows of the padded batch with the rows that tokens need: one for
  # each expert of each token.
  num_slots = moe.num_experts * slots_of_expert(
      moe, factor=factor, tokens=tokens, groups=groups, shards=shards)
  assignments = moe.top_k * -(-tokens // shards)
  if num_slots <= MOST_SLOTS_PER_ASSIGNMENT * assignments:
    return 'sorted'
  return 'dropless'


def compute_experts(
    moe: MoEConfig, x_TD: jax.Array, routed: Routing, w: ExpertWeights,
    hidden: HiddenUnits, groups: int, dropout: Optional[ExpertDropout], *,
    train: bool, recompute: bool = False) -> tuple[jax.Array, jax.Array]:
  """Computes the experts, on this device or spread over the mesh:

    y_t = sum over the assignments (token t, expert e, gate g) of g FFN_e(x_t)

  Args:
    moe: the config of the mixture.
    x_TD: the tokens, [T tokens, d_model].
    routed: the assignments of the tokens.
    w: the experts' weights.
    hidden: the activation of their networks.
    groups: the number of routing groups.
    dropout: the dropout of the hidden units, if any.
    train: whether the capacity is that of training.
    recompute: whether the backward pass computes the hidden units again
      (grouped.GroupedSettings).

  Returns:
    The tokens' results y, [T, D]; and bool [A]: the assignments that found
    room.
  """
  factor = moe.capacity_factor if train else moe.eval_capacity_factor
  T, axes = x_TD.shape[0], mixture_mesh_axes()
  compute = functools.partial(
      _compute_on_device, moe=moe, hidden=hidden, factor=factor, tokens=T,
      groups=groups, recompute=recompute)
  if axes is None:
    return compute(MixtureAxes(), x_TD, routed, w, dropout)

  # Each device computes its share of the tokens, which are filled up to whole
  # shards before.
  shards = sharding.count_devices_along(axes.tokens)
  _check_routing_groups(
      T, groups=groups, shards=shards, experts_choose=routed.experts_choose)
  num_padding = -T % shards
  x_TD, routed = _pad_tokens(x_TD, routed, num_padding)
  split_by_token = PartitionSpec(axes.tokens or None)
  replicated = PartitionSpec()
  # All arrays of the routing begin with tokens or their assignments, which are
  # in the tokens' order, so all are split along their first axis.
  routed_specs = jax.tree.map(lambda _: split_by_token, routed)
  y_TD, kept_A = jax.shard_map(
      functools.partial(compute, axes),
      in_specs=(split_by_token, routed_specs, _partition_specs(w, axes),
                replicated),
      out_specs=(split_by_token, split_by_token), check_vma=False)(
          x_TD, routed, w, dropout)
  # The padding stands at the end, and is cut off again.
  assignments = routed.expert_A.shape[0] - routed.choices * num_padding
  return y_TD[:T], kept_A[:assignments]


def _partition_specs(w: ExpertWeights, axes: MixtureAxes) -> ExpertWeights:
  """Returns how the weights of the experts are split over the mesh.

  The suffixes name axes: E experts, D features, F hidden units.

  Args:
    w: the weights, or their shapes.
    axes: the mesh axes that split the experts, the hidden units (mlp) and the
      features (embed).

  Returns:
    A PartitionSpec in place of each weight; None for a weight that the network
    does not have.
  """
  # A PartitionSpec has None for an axis that is whole on each device.
  expert = axes.experts or None
  mlp = axes.mlp or None
  embed = axes.embed or None
  specs = ExpertWeights(
      up_EDF=PartitionSpec(expert, embed, mlp),
      down_EFD=PartitionSpec(expert, mlp, embed),
      gate_EDF=PartitionSpec(expert, embed, mlp),
      up_bias_EF=PartitionSpec(expert, mlp),
      gate_bias_EF=PartitionSpec(expert, mlp),
      down_bias_ED=PartitionSpec(expert, embed))

  def spec_of_weight(spec: PartitionSpec, weight: Optional[jax.Array]):
    """Returns the spec where the network has the weight, else None."""
    if weight is None:
      return None
    return spec

  # A PartitionSpec is one leaf of the tree, and not a tuple of axes.
  return jax.tree.map(spec_of_weight, specs, w,
                      is_leaf=lambda x: isinstance(x, PartitionSpec))


def _pad_tokens(x_TD: jax.Array, routed: Routing, num_padding: int
                ) -> tuple[jax.Array, Routing]:
  """Appends padding tokens, which go to no expert, so that all devices get the
  same number of tokens.

  The suffixes name axes: T tokens, D d_model, A assignments (pairs of a token
  and its expert), E experts.

  Args:
    x_TD: the tokens.
    routed: what the router decided: the assignments and their gates.
    num_padding: how many tokens to append.

  Returns:
    The tokens and the assignments, with those of the padding at the end.
  """
  if not num_padding:
    return x_TD, routed
  # Experts have the numbers 0 ... E - 1, so E stands for no expert: such an
  # assignment is void.
  E, num_assignments = routed.probs_TE.shape[1], num_padding * routed.choices

  def append_rows(x: jax.Array, count: int, value: int = 0) -> jax.Array:
    """Returns x with `count` rows of a value after its own."""
    padding = [(0, count)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding, constant_values=value)

  x_TD = append_rows(x_TD, num_padding)
  routed = routed.replace(
      expert_A=append_rows(routed.expert_A, num_assignments, E),
      gate_A=append_rows(routed.gate_A, num_assignments),
      # The assignments are void, so any token will do.
      token_A=append_rows(routed.token_A, num_assignments),
      probs_TE=append_rows(routed.probs_TE, num_padding))
  return x_TD, routed


def _compute_on_device(
    axes: MixtureAxes, x_TD: jax.Array, routed: Routing, w: ExpertWeights,
    dropout: Optional[ExpertDropout], *, moe: MoEConfig, hidden: HiddenUnits,
    factor: float, tokens: int, groups: int, recompute: bool
    ) -> tuple[jax.Array, jax.Array]:
  """Computes one device's share of a mixture of experts: its tokens, by the
  experts that it has and, where experts are spread over devices, by others.

    y_t = sum over the assignments (token t, expert e, gate g) of g FFN_e(x_t)

  The suffixes name axes: T tokens of this device, D d_model, E experts, F
  hidden units of this device, A assignments (pairs of a token and its expert).

  Args:
    axes: the mesh axes; none: this device has all.
    x_TD: this device's tokens.
    routed: their assignments.
    w: this device's part of the weights.
    dropout: the dropout of the hidden units, if any.
    moe: the config of the mixture.
    hidden: the activation of its networks.
    factor: the capacity factor; 0: there is no capacity.
    tokens: the number of tokens of all devices, without padding.
    groups: the number of routing groups.
    recompute: whether the backward pass computes the hidden units again
      (grouped.GroupedSettings).

  Returns:
    The tokens' results, [T, D], and bool [A]: the assignments that found room.
  """
  T, E = x_TD.shape[0], moe.num_experts
  num_assignments = routed.expert_A.shape[0]
  shards = sharding.count_devices_along(axes.tokens)
  devices = sharding.count_devices_along(axes.experts)
  shard_index: jax.Array | int = 0
  if axes.tokens:
    shard_index = jax.lax.axis_index(axes.tokens)

  # Number the tokens from 0 on this device, and make void what exceeds the
  # capacity. `slots` are the rows of an expert; `most_rows_sent` are those that
  # this device may send to another one, for which memory is set aside.
  if routed.experts_choose:
    # Experts that choose their tokens fill all slots and never exceed them.
    routed = routed.replace(token_A=routed.token_A - shard_index * T)
    slots = num_assignments // E
    most_rows_sent = num_assignments // devices
  else:
    routed = _void_choices_over_capacity(
        moe, factor=factor, tokens=tokens, groups=groups, axes=axes, T=T,
        routed=routed)
    slots = slots_of_expert(
        moe, factor=factor, tokens=tokens, groups=groups, shards=shards)
    # A token goes to an expert once, so at most to all experts of a device.
    most_rows_sent = T * min(routed.choices, E // devices)

  # Dropout must not depend on the mesh.
  if dropout is not None:
    dropout = _number_units_over_mesh(
        dropout, axes=axes, first_row=shard_index * num_assignments,
        num_units=w.up_EDF.shape[2])

  # The experts are all on this device, or spread along a mesh axis.
  even_rows = max(1, T * devices * moe.top_k // moe.all_experts)
  settings = grouped.GroupedSettings(
      activation=hidden, even_rows=even_rows,
      kernel=grouped.choose_grouped_kernel(moe), recompute=recompute)
  experts: LocalExperts | SpreadExperts = LocalExperts(
      w=_gather_weights(w, axes), dropout=dropout, settings=settings, experts=E)
  if axes.experts:
    experts = SpreadExperts(
        local=experts, axis=axes.experts[0], most_rows_sent=most_rows_sent)

  # Compute their results as a padded batch or as rows sorted by expert.
  name = choose_dispatch(
      moe, factor=factor, tokens=tokens, groups=groups, shards=shards)
  compute = DISPATCHES[name]
  y_TD = compute(x_TD, routed, experts, slots)

  # The products sum over the hidden units, of which a device may have a part.
  if axes.mlp:
    y_TD = jax.lax.psum(y_TD, axes.mlp)
  return y_TD, routed.expert_A < E


def _number_units_over_mesh(dropout: ExpertDropout, axes: MixtureAxes,
                            first_row: jax.Array | int, num_units: int
                            ) -> ExpertDropout:
  """Returns the dropout of a device, which numbers assignments and hidden units
  through all devices. So what is dropped does not depend on the mesh.

  Args:
    dropout: the dropout of the whole mixture.
    axes: the mesh axes, of which `mlp` split the hidden units.
    first_row: how many assignments the devices before this one have.
    num_units: how many hidden units each device has.
  """
  first_unit: jax.Array | int = 0
  if axes.mlp:
    first_unit = jax.lax.axis_index(axes.mlp) * num_units
  return dropout.replace(first_row=first_row, first_unit=first_unit)


def _void_choices_over_capacity(
    moe: MoEConfig, factor: float, tokens: int, groups: int, axes: MixtureAxes,
    T: int, routed: Routing) -> Routing:
  """Makes void those assignments of this device's tokens to experts that exceed
  an expert's capacity. The capacity holds for each routing group of tokens, and
  a group may extend over several devices.

  Args:
    moe: the config of the mixture of experts.
    factor: the capacity factor, how much room an expert has relative to an even
      load; 0: there is no limit.
    tokens: the number of tokens of all devices, without padding.
    groups: the number of routing groups.
    axes: the mesh axes, of which `tokens` split the tokens.
    T: the number of this device's tokens.
    routed: the assignments of these tokens, X for each token, one after
      another.

  Returns:
    The assignments, with tokens numbered from 0 on this device. A void
    assignment has the number of experts as its expert.
  """
  E, X = moe.num_experts, routed.choices
  shards = sharding.count_devices_along(axes.tokens)
  # The router numbered the tokens over all devices; here they begin at 0.
  token_A = jnp.arange(T * X, dtype=jnp.int32) // X
  routed = routed.replace(token_A=token_A)
  if not factor:
    return routed

  # A group that goes over several shards (devices) fills its experts from all
  # of them: the earlier shards' choices come first.
  count_earlier = None
  if groups < shards:
    count_earlier = functools.partial(_count_choices_of_group, axes, groups)
  group_slots = routing.expert_capacity(
      factor, tokens=tokens // groups, choices=X, experts=moe.all_experts)
  expert_A = routing.void_over_capacity(
      routed.expert_A, choices=X, groups=max(1, groups // shards), experts=E,
      slots=group_slots, earlier=count_earlier)
  return routed.replace(expert_A=expert_A)


def _gather_weights(w: ExpertWeights, axes: MixtureAxes) -> ExpertWeights:
  """Gathers the features of the experts' weights from the devices that they are
  split over (ZeRO-3). The experts and the hidden units stay split.

  The suffixes name axes: E experts, D features, F hidden units.

  Args:
    w: this device's part of the weights.
    axes: the mesh axes: `embed` splits the features, and `mlp` the hidden
      units.

  Returns:
    The weights of this device's experts and hidden units, with all features.
  """

  def gather_embed(x: Optional[jax.Array], axis: int) -> Optional[jax.Array]:
    """Returns an array with all of its features; `axis` is their axis."""
    if x is None:
      return None
    return sharding.gather_shards(x, axis, axes.embed)

  if axes.embed:
    w = w.replace(
        up_EDF=gather_embed(w.up_EDF, 1), gate_EDF=gather_embed(w.gate_EDF, 1),
        down_EFD=gather_embed(w.down_EFD, 2),
        down_bias_ED=gather_embed(w.down_bias_ED, 1))

  # The results of devices that share an expert's hidden units are summed later,
  # so only the first of these devices may add the output's bias.
  if axes.mlp and w.down_bias_ED is not None:
    is_first_shard = jax.lax.axis_index(axes.mlp) == 0
    w = w.replace(down_bias_ED=jnp.where(is_first_shard, w.down_bias_ED, 0))
  return w


def _count_choices_of_group(axes: MixtureAxes, groups: int,
                            count_1XE: jax.Array
                            ) -> tuple[jax.Array, jax.Array]:
  """Counts how often the tokens of this device's routing group chose each
  expert, where a group extends over several neighbouring devices.

  The suffixes name axes: Q devices that the tokens are split over (shards), X
  choices of a token, E experts, and the 1 is this device's group.

  Args:
    axes: the mesh axes, of which `tokens` split the tokens.
    groups: the number of routing groups, which divides the number of devices.
    count_1XE: how often this device's tokens chose each expert as their first,
      second, ... choice.

  Returns:
    The counts over the devices of the group before this one, which are served
    first, and over all devices of the group, [1, X, E] each.
  """
  # The counts of all devices, and which of them share this one's group.
  shards = sharding.count_devices_along(axes.tokens)
  count_QXE = jax.lax.all_gather(count_1XE[0], axes.tokens)
  index_Q, index = jnp.arange(shards), jax.lax.axis_index(axes.tokens)
  shards_of_group = shards // groups
  is_same_group_Q = index_Q // shards_of_group == index // shards_of_group

  def sum_over_shards(mask_Q: jax.Array) -> jax.Array:
    """Returns the sum over the shards of a mask."""
    masked_QXE = count_QXE * mask_Q[:, None, None]
    return masked_QXE.sum(0)[None]

  earlier_1XE = sum_over_shards(is_same_group_Q & (index_Q < index))
  return earlier_1XE, sum_over_shards(is_same_group_Q)


@struct.dataclass
class SpreadExperts:
  """Experts that lie along a mesh axis of n devices (expert parallelism:
  GShard, Lepikhin et al. 2020), with the methods of `LocalExperts`.

  Attributes:
    local: the experts of this device.
    axis: the mesh axis.
    most_rows_sent: how many rows this device may send to one device.
  """
  local: LocalExperts
  axis: str = struct.field(pytree_node=False)
  most_rows_sent: int = struct.field(pytree_node=False)

  @property
  def devices(self) -> int:
    """The number of devices that the experts lie on, n."""
    return sharding.count_devices_along((self.axis,))

  def dropout_ids(self, assignment_P: jax.Array) -> jax.Array:
    """Returns the ids that dropout knows assignments by, on any device."""
    return self.local.dropout_ids(assignment_P)

  def compute_padded(self, rows_ECD: jax.Array, id_EC: jax.Array) -> jax.Array:
    """Applies the experts to a batch of rows, where the experts are spread over
    n devices. The rows go to the devices of their experts by an all-to-all, and
    the results come back by a second one.

    The suffixes name axes: E experts of all devices, C rows of an expert, D
    d_model, n devices.

    Args:
      rows_ECD: this device's rows for each expert. Experts are numbered device
        by device.
      id_EC: the id of the assignment (pair of a token and its expert) that each
        row computes, of which dropout draws its random bits.

    Returns:
      The results, [E, C, D].
    """
    # The ids travel as the rows do, if there is dropout to read them.
    if self.local.dropout is not None:
      id_EC = self._send_to_experts(id_EC)
    y_ECD = self.local.compute_padded(self._send_to_experts(rows_ECD), id_EC)

    # The way back undoes the steps of `_send_to_experts` in reverse order.
    n = self.devices
    E, C, D = rows_ECD.shape
    y_nECD = y_ECD.reshape(E // n, n, C, D).swapaxes(0, 1)
    return self._exchange(y_nECD).reshape(E, C, D)

  def _send_to_experts(self, x_EC: jax.Array) -> jax.Array:
    """Exchanges rows between the n devices, so that each gets those of its own
    E / n experts.

    Args:
      x_EC: this device's rows for all E experts, C for each, [E, C, ...].

    Returns:
      The rows of all devices for this device's experts, [E / n, n * C, ...].
    """
    n = self.devices
    E, C, *shape_of_row = x_EC.shape
    # Before the exchange the axis n is the device to send to; after it, the
    # device that sent.
    x_nEC = x_EC.reshape(n, E // n, C, *shape_of_row)
    x_EnC = self._exchange(x_nEC).swapaxes(0, 1)
    return x_EnC.reshape(E // n, n * C, *shape_of_row)

  def assign_rows(self, expert_A: jax.Array) -> AssignedRows:
    """Gives each assignment (pair of a token and its expert) a row of the array
    that is sent to the n devices of the experts. The rows for device d begin at
    d * most_rows_sent and are sorted by expert:

      row_a = d most_rows_sent + (sorted_row_a - start_d)

    where sorted_row_a is the row if all rows stood without gaps, and start_d
    the first such row that is for device d.

    The suffixes name axes: A assignments, E experts of all devices, n devices.

    Args:
      expert_A: the expert of each assignment. E stands for a void assignment,
        which no expert computes.
    """
    n, E = self.devices, self.local.experts
    sorted_row_A, count_E = assign_sorted_rows(expert_A, E)

    # Rows that are sorted by expert are sorted by device too. The rows of each
    # device are moved from where they start in that order (start_n) to where
    # the device's part of the array starts.
    count_n = count_E.reshape(n, -1).sum(1)
    device_A = expert_A // (E // n)  # n for a void one
    start_n = jnp.append(jnp.cumsum(count_n) - count_n, 0)
    row_A = (device_A * self.most_rows_sent
             + sorted_row_A - start_n[device_A])
    num_rows = n * self.most_rows_sent
    row_A = jnp.where(expert_A < E, row_A, num_rows)
    return AssignedRows(row_A=row_A, num_rows=num_rows, count_E=count_E)

  def compute_grouped(self, rows_PD: jax.Array, count_E: jax.Array,
                      id_P: jax.Array, gate_P: jax.Array) -> jax.Array:
    """Applies the experts to rows and multiplies each result by its gate, where
    the experts are spread over n devices. The rows are sent to the devices of
    their experts, computed there and sent back.

    The suffixes name axes: P = n * most_rows_sent rows, D d_model, E experts, n
    devices.

    Args:
      rows_PD: the rows in the order of `assign_rows`.
      count_E: int32, how many of them are for each expert.
      id_P: the id of the assignment (pair of a token and its expert) that each
        row computes, of which dropout draws its random bits.
      gate_P: the gate of each row.

    Returns:
      The results, [P, D], in the order of the rows.
    """
    n, P = self.devices, rows_PD.shape[0]

    # How many rows this device sends to each other's experts, and how many it
    # receives from each for its own.
    send_nE = count_E.reshape(n, -1)
    receive_nE = self._exchange(send_nE)
    send_n, receive_n = send_nE.sum(1), receive_nE.sum(1)

    # Rows arrive sorted by the device that sent them, and the experts need them
    # sorted by expert. sorted_P is the place of each arrived row in that order,
    # and arrived_P the inverse.
    expert_P = self._experts_of_received_rows(receive_nE)
    sorted_P, count_E = assign_sorted_rows(expert_P, send_nE.shape[1])
    arrived_P = invert_row_of_assignment(sorted_P, P)

    # Rows, ids and gates cross to the experts, where they are sorted.
    if self.local.dropout is not None:
      id_P = self._exchange_rows(id_P, send_n, receive_n)
      id_P = _gather_rows(id_P, arrived_P)
    rows_PD = self._exchange_rows(rows_PD, send_n, receive_n)
    rows_PD = gather_tokens(
        rows_PD, token_P=arrived_P, row_A=sorted_P, choices=1)
    gate_P = self._exchange_rows(gate_P, send_n, receive_n)
    gate_P = reorder_scalars(gate_P, index_P=arrived_P, inverse_A=sorted_P)
    y_PD = self.local.compute_grouped(
        rows_PD, count_E=count_E, id_P=id_P, gate_P=gate_P)

    # The results cross back in the order in which the rows arrived.
    y_PD = gather_tokens(y_PD, token_P=sorted_P, row_A=arrived_P, choices=1)
    return self._exchange_rows(y_PD, receive_n, send_n)

  def _experts_of_received_rows(self, receive_nE: jax.Array) -> jax.Array:
    """Returns the expert of each row that arrives from the other devices.

    Each of the n devices sends an array with room for `most_rows_sent` rows. It
    is filled from its start, with rows sorted by expert.

    Args:
      receive_nE: how many rows each device sent to each expert of this device,
        [n, E / n].

    Returns:
      int32 [P], with P = n * most_rows_sent. The number E / n stands for no
      expert: the row is not filled.
    """

    def experts_of_places(ends_E: jax.Array) -> jax.Array:
      """Returns the first expert whose rows end after each place; E / n past
      the last row."""
      places = jnp.arange(self.most_rows_sent)
      return jnp.searchsorted(ends_E, places, side='right')

    ends_nE = jnp.cumsum(receive_nE, 1)
    return jax.vmap(experts_of_places)(ends_nE).reshape(-1)

  def _exchange(self, x_n: jax.Array) -> jax.Array:
    """Returns x[this device] of each device's x, [n, ...]."""
    return exchange_over_mesh(x_n, None, None, self.axis)

  def _exchange_rows(self, x_P: jax.Array, send_n: jax.Array,
                     receive_n: jax.Array) -> jax.Array:
    """Returns the rows that arrive, [P, ...]; from each device, `receive_n` of
    them matter, and this device sends `send_n` of its own."""
    x_nP = x_P.reshape(self.devices, self.most_rows_sent, *x_P.shape[1:])
    received_nP = exchange_over_mesh(x_nP, send_n, receive_n, self.axis)
    return received_nP.reshape(x_P.shape)


def _check_routing_groups(T: int, groups: int, shards: int,
                          experts_choose: bool) -> None:
  """Checks that the routing groups (the groups of tokens that share the
  experts' capacity) can be divided among the devices.

  Args:
    T: the number of tokens of all devices.
    groups: the number of routing groups.
    shards: the number of devices that the tokens are split over.
    experts_choose: whether the experts choose their tokens. Then a device must
      have a whole group.

  Raises:
    RequestError: if none of the three ways below fits.
  """
  if T % shards == 0 and groups % shards == 0:
    return  # each shard has whole groups
  if groups == 1 and not experts_choose:
    return  # one group, which extends over all shards and may be padded
  if T % shards == 0 and shards % groups == 0 and not experts_choose:
    return  # each group extends over several whole shards
  divisor = max(1, T // shards)
  raise RequestError(
      f'{groups} routing groups of {T // groups} tokens do not fit on {shards} '
      f'shards of the batch: set model.moe.group_size to a divisor of {divisor}'
  )


# The all-to-all that rows cross the mesh by, there and, as gradients, back.

@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def exchange_over_mesh(x: jax.Array, send_n: Optional[jax.Array],
                       receive_n: Optional[jax.Array], axis: str) -> jax.Array:
  """Exchanges parts of an array between the n devices of a mesh axis
  (all-to-all): device i receives part i of each device's array.

  With `send_n` and `receive_n` only the first rows of each part are needed. The
  others are not sent where the backend can leave them out.

  Args:
    x: n parts, [n, ...], or [n, rows, ...] if rows are counted.
    send_n: how many rows go to each device, int [n]; None: all rows.
    receive_n: how many rows come from each device, int [n]; None: all rows.
    axis: the mesh axis of the n devices.

  Returns:
    The parts that arrive, in the order of the devices that sent them, of the
    shape of x. Rows past the counts must not be read: they hold zeros, or
    whatever the sender had there.
  """
  def exchange_all_rows(x: jax.Array, *counts: Optional[jax.Array]
                        ) -> jax.Array:
    """Returns x with all of its rows exchanged, full or not."""
    del counts
    return jax.lax.all_to_all(x, axis_name=axis, split_axis=0, concat_axis=0,
                              tiled=True)

  # Without counts, all rows are full.
  if send_n is None:
    return exchange_all_rows(x)

  # Only full rows travel, but for two cases. CPU cannot do it. And on TPU a row
  # of one number, such as a gate, is padded to a whole register of lanes if it
  # travels by itself: with few devices, to send all numbers is less.
  exchange_of_platform = {'cpu': exchange_all_rows}
  if x.ndim == 2 and x.shape[0] <= sharding.LANES_OF_TPU_REGISTER:
    exchange_of_platform['tpu'] = exchange_all_rows
  exchange_full_rows = functools.partial(_exchange_full_rows, axis)
  return jax.lax.platform_dependent(
      x, send_n, receive_n, default=exchange_full_rows, **exchange_of_platform)


def _exchange_full_rows(axis: str, x: jax.Array, send_n: jax.Array,
                        receive_n: jax.Array) -> jax.Array:
  """Exchanges the first rows of each part of an array between the n devices of
  a mesh axis (ragged all-to-all). The other rows are not sent and become zeros.

  Args:
    axis: the mesh axis of the n devices.
    x: a part for each device, [n, rows, ...].
    send_n: how many rows go to each device, int [n].
    receive_n: how many rows come from each device, int [n].

  Returns:
    The parts that arrive, [n, rows, ...], in the order of their senders.
  """
  n, rows_of_part, *shape_of_row = x.shape
  rows = x.reshape(n * rows_of_part, *shape_of_row)
  # In this device's array, the rows for device d begin at read_from_n[d]. In
  # the array of any receiver, they belong where part i begins if this is device
  # i. So the receiver has its parts in the order of the devices.
  read_from_n = jnp.arange(n, dtype=jnp.int32) * rows_of_part
  place_at_receiver = jax.lax.axis_index(axis) * rows_of_part
  write_to_n = jnp.full(n, place_at_receiver, jnp.int32)

  # Rows past the counts keep the zeros of `output`.
  received = jax.lax.ragged_all_to_all(
      operand=rows, output=jnp.zeros_like(rows), input_offsets=read_from_n,
      send_sizes=send_n.astype(jnp.int32), output_offsets=write_to_n,
      recv_sizes=receive_n.astype(jnp.int32), axis_name=axis)
  return received.reshape(x.shape)


def _exchange_forward(x: jax.Array, send_n: Optional[jax.Array],
                      receive_n: Optional[jax.Array], axis: str):
  """Returns `exchange_over_mesh`, and what its gradient reads: the counts."""
  return exchange_over_mesh(x, send_n, receive_n, axis), (send_n, receive_n)


def _exchange_backward(axis: str, saved: tuple, dy: jax.Array):
  """Returns the gradient of x, and None for the counts. An all-to-all is its
  own transpose, so the gradient dy of the result is exchanged back, with the
  counts of sent and received rows swapped."""
  send_n, receive_n = saved
  return exchange_over_mesh(dy, receive_n, send_n, axis), None, None


exchange_over_mesh.defvjp(_exchange_forward, _exchange_backward)


# The ways to compute the experts, by config.moe.dispatch.
DISPATCHES = {
    'sorted': compute_padded_batch,
    'dropless': compute_dropless,
}
