"""Computing the experts: one definition, two ways.

y_t = sum over the assignments (t, e, g) of g * FFN_e(x_t)

sorted    rows are gathered to [E, C, D] and multiplied as a batch.
dropless  rows are sorted by expert and multiplied in groups, without padding
          (MegaBlocks: Gale et al. 2022); parts/grouped.py has the product.

The two agree, drops included. Rows move by gathers both ways: forward by
the token of a row, backward by the rows of a token.
"""

import functools
from typing import Any, Optional

from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts.dropout import mix
from architectures.parts.ffn import Hidden
from architectures.parts.moe import grouped
from architectures.parts.moe.routing import Routing, ranks


@struct.dataclass
class Weights:
  """The experts' parameters; what a kind of network lacks is None."""
  up_EDF: jax.Array
  down_EFD: jax.Array
  gate_EDF: Optional[jax.Array] = None
  up_bias_EF: Optional[jax.Array] = None
  gate_bias_EF: Optional[jax.Array] = None
  down_bias_ED: Optional[jax.Array] = None


@struct.dataclass
class Dropout:
  """Expert dropout on the hidden units (Switch, section 2.4).

  The mask is a hash of (seed, assignment, unit): the same however the rows
  are ordered, and wherever they are computed.
  """
  seed: jax.Array  # uint32 scalar
  first_row: jax.Array | int = 0  # of this device's assignments
  first_unit: jax.Array | int = 0  # of this device's hidden units
  rate: float = struct.field(pytree_node=False, default=0.0)

  def mask(self, id_P: jax.Array, units: int) -> jax.Array:
    """float32 [P, units]: 0 or 1 / (1 - rate)."""
    unit_F = (jnp.arange(units) + self.first_unit).astype(jnp.uint32)
    row_P = mix(id_P.astype(jnp.uint32) ^ self.seed)
    bits_PF = mix(row_P[:, None] + unit_F[None] * jnp.uint32(0x9e3779b9))
    keep_PF = bits_PF >= jnp.uint32(int(self.rate * 2 ** 32))
    return keep_PF / (1 - self.rate)


def _batched_product(spec: str, x: jax.Array, m: jax.Array) -> jax.Array:
  """In x's dtype; on CPU XLA has no batched product of bfloat16."""
  def wide(x: jax.Array, m: jax.Array):
    return jnp.einsum(spec, x.astype(jnp.float32), m.astype(jnp.float32)
                      ).astype(x.dtype)
  def narrow(x: jax.Array, m: jax.Array):
    return jnp.einsum(spec, x, m)
  if x.dtype == jnp.float32:
    return narrow(x, m)
  return jax.lax.platform_dependent(x, m, cpu=wide, default=narrow)


def batched(rows_ECD: jax.Array, w: Weights, hidden: Hidden,
            mask_ECF: Optional[jax.Array] = None) -> jax.Array:
  """Every expert on its own C rows."""
  add = lambda x, b: x if b is None else x + b[:, None]
  product = _batched_product
  pre = [add(product('ECD,EDF->ECF', rows_ECD, w.up_EDF), w.up_bias_EF)]
  if hidden.gated:
    pre.append(add(product('ECD,EDF->ECF', rows_ECD, w.gate_EDF),
                   w.gate_bias_EF))
  h_ECF = hidden(*pre)
  if mask_ECF is not None:
    h_ECF = h_ECF * mask_ECF.astype(h_ECF.dtype)
  return add(product('ECF,EFD->ECD', h_ECF, w.down_EFD), w.down_bias_ED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def take(x_TD: jax.Array, token_P: jax.Array, row_A: jax.Array, choices: int):
  """Row r gets token token_P[r]; T there gives zeros.

  `row_A` is the inverse, P where an assignment has no row: with it, the
  gradient is a gather. Without `choices`, it is a scatter.
  """
  del row_A, choices
  return x_TD.at[token_P].get(mode='fill', fill_value=0)


def _take_fwd(x_TD: jax.Array, token_P: jax.Array, row_A: jax.Array,
              choices: int):
  return take(x_TD, token_P, row_A, choices), (token_P, row_A, x_TD.shape[0])


def _take_bwd(choices: int, saved: tuple, d_PD: jax.Array):
  token_P, row_A, T = saved
  if not choices:
    zeros_TD = jnp.zeros((T, d_PD.shape[1]), d_PD.dtype)
    return zeros_TD.at[token_P].add(d_PD, mode='drop'), None, None
  d_AD = d_PD.at[row_A].get(mode='fill', fill_value=0)
  d_TD = d_AD.reshape(T, choices, -1).sum(1, dtype=jnp.float32)
  return d_TD.astype(d_PD.dtype), None, None


take.defvjp(_take_fwd, _take_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def combine(y_PD: jax.Array, gate_A: Optional[jax.Array], token_A: jax.Array,
            row_A: jax.Array, assignment_P: jax.Array, tokens: int, choices: int
            ):
  """y_T = the sum of gate * row over the assignments of a token.

  `assignment_P` is the inverse of `row_A`; A where a row has none. Without
  `gate_A`, rows have already been multiplied by their gates.
  """
  del assignment_P
  y_AD = y_PD.at[row_A].get(mode='fill', fill_value=0)
  if gate_A is not None:
    y_AD = y_AD * gate_A[:, None].astype(y_AD.dtype)
  if choices:
    y_TD = y_AD.reshape(tokens, choices, -1).sum(1, dtype=jnp.float32)
    return y_TD.astype(y_PD.dtype)
  return jnp.zeros((tokens, y_AD.shape[1]), y_AD.dtype).at[token_A].add(y_AD)


def _combine_fwd(y_PD: jax.Array, gate_A: Optional[jax.Array],
                 token_A: jax.Array, row_A: jax.Array, assignment_P: jax.Array,
                 tokens: int, choices: int):
  y_TD = combine(y_PD, gate_A, token_A, row_A, assignment_P, tokens, choices)
  rows = None if gate_A is None else y_PD
  return y_TD, (rows, gate_A, token_A, row_A, assignment_P)


def _combine_bwd(tokens: int, choices: int, saved: tuple, d_TD: jax.Array):
  del tokens, choices
  y_PD, gate_A, token_A, row_A, assignment_P = saved
  fill = dict(mode='fill', fill_value=0)
  token_P = token_A.at[assignment_P].get(mode='fill', fill_value=d_TD.shape[0])
  d_PD = d_TD.at[token_P].get(**fill)
  if gate_A is None:
    return d_PD, None, None, None, None
  d_gate_P = (d_PD.astype(jnp.float32) * y_PD.astype(jnp.float32)).sum(1)
  d_gate_A = d_gate_P.at[row_A].get(**fill).astype(gate_A.dtype)
  gate_P = gate_A.at[assignment_P].get(**fill)
  return d_PD * gate_P[:, None].astype(d_PD.dtype), d_gate_A, None, None, None


combine.defvjp(_combine_fwd, _combine_bwd)


def inverse(row_A: jax.Array, rows: int) -> jax.Array:
  """assignment_P of row_A; A for a row that nobody has."""
  A = row_A.shape[0]
  return jnp.full(rows, A, jnp.int32).at[row_A].set(
      jnp.arange(A, dtype=jnp.int32), mode='drop', unique_indices=True)


def place_padded(expert_A: jax.Array, experts: int, slots: int) -> jax.Array:
  """The row of each assignment in [E, C]; E * C for a void one."""
  row_A = expert_A * slots + ranks(expert_A, experts + 1)
  return jnp.where(expert_A < experts, row_A, experts * slots)


def place_sorted(expert_A: jax.Array, experts: int
                 ) -> tuple[jax.Array, jax.Array]:
  """(the row of each assignment in [A], sorted by expert; rows by expert)."""
  order_A = jnp.argsort(expert_A, stable=True)
  row_A = jnp.zeros_like(order_A).at[order_A].set(
      jnp.arange(order_A.shape[0]), unique_indices=True)
  ends_E = jnp.searchsorted(expert_A[order_A], jnp.arange(experts),
                            side='right')
  count_E = jnp.diff(ends_E, prepend=0).astype(jnp.int32)
  return jnp.where(expert_A < experts, row_A, expert_A.shape[0]), count_E


def move(x_TD: jax.Array, r: Routing, row_A: jax.Array, rows: int):
  """Returns (rows [P, D], their assignments [P], and what combines results:
  (rows, gates or None) -> y_TD)."""
  T = x_TD.shape[0]
  assignment_P = inverse(row_A, rows)
  token_P = r.token_A.at[assignment_P].get(mode='fill', fill_value=T)
  back = lambda y_PD, gate_A: combine(y_PD, gate_A, r.token_A, row_A,
                                      assignment_P, T, r.choices)
  return take(x_TD, token_P, row_A, r.choices), assignment_P, back


def reorder(x_A: jax.Array, of_P: jax.Array, to_A: jax.Array) -> jax.Array:
  """Returns x[of_P], and 0 where of_P is A; `to_A` is its inverse, as for
  `take`."""
  return take(x_A[:, None], of_P, to_A, 1)[:, 0]


@struct.dataclass
class Local:
  """This device's experts, which rows may be handed to in two layouts."""
  w: Weights
  dropout: Optional[Dropout]
  hidden: Hidden = struct.field(pytree_node=False)
  even: int = struct.field(pytree_node=False)  # an expert's rows, evenly
  kernel: str = struct.field(pytree_node=False)  # of the grouped product
  again: bool = struct.field(pytree_node=False)  # see grouped.ffn
  experts: int = struct.field(pytree_node=False)  # of all devices

  def padded(self, rows_ECD: jax.Array, id_EC: jax.Array):
    """C rows an expert, with the ids of their assignments."""
    mask_ECF = self._mask(id_EC.reshape(-1))
    if mask_ECF is not None:
      mask_ECF = mask_ECF.reshape(*id_EC.shape, -1)
    return batched(rows_ECD, self.w, self.hidden, mask_ECF)

  def place(self, expert_A: jax.Array):
    """(the row of each assignment, how many rows, rows of each expert)."""
    row_A, count_E = place_sorted(expert_A, self.experts)
    return row_A, expert_A.shape[0], count_E

  def grouped(self, rows_PD: jax.Array, count_E: jax.Array, id_P: jax.Array,
              gate_P: jax.Array):
    """Rows sorted by expert, each result multiplied by its gate."""
    return grouped.ffn(
        rows_PD, count_E, gate_P, self.w, self._mask(id_P),
        grouped.How(self.hidden, self.even, self.kernel, self.again))

  def ids(self, assignment_P: jax.Array):
    """The ids that dropout knows assignments by, on any device."""
    return assignment_P + (self.dropout.first_row if self.dropout else 0)

  def _mask(self, id_P: jax.Array):
    if self.dropout is None:
      return None
    return self.dropout.mask(id_P, self.w.up_EDF.shape[2])


def by_sorted(x_TD: jax.Array, r: Routing, run: Any, slots: int) -> jax.Array:
  E, D = r.probs_TE.shape[1], x_TD.shape[1]
  rows_PD, assignment_P, back = move(
      x_TD, r, place_padded(r.expert_A, E, slots), E * slots)
  y_ECD = run.padded(rows_PD.reshape(E, slots, D),
                     run.ids(assignment_P).reshape(E, slots))
  return back(y_ECD.reshape(E * slots, D), r.gate_A)


def by_dropless(x_TD: jax.Array, r: Routing, run: Any, slots: int) -> jax.Array:
  del slots  # what has no room is void already
  row_A, rows, count_E = run.place(r.expert_A)
  rows_PD, assignment_P, back = move(x_TD, r, row_A, rows)
  # Gates go with the rows. Their gradient needs the expert's result, which
  # would otherwise have to come back once more when a layer is computed again.
  gate_P = reorder(r.gate_A, assignment_P, row_A)
  return back(run.grouped(rows_PD, count_E, run.ids(assignment_P), gate_P),
              None)


WAYS = {
    'sorted': by_sorted,
    'dropless': by_dropless,
}
