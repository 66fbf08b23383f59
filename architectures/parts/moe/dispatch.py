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
  sorted           E * C / T    C a device's slots of an expert, see `slots`
  dropless         n * min(X, E / n), the bound that no routing exceeds
(XLA's CPU backend has no all-to-all of bfloat16, and sends it as float32.)

In the forward direction there also cross, as int32, the id of each row, if
experts have dropout, and in dropless how many rows are for each of the E
experts. In dropless a gate crosses with each row, in float32, and its gradient
crosses back.

On TPU and GPU dropless sends only the rows that are full
(`ragged_all_to_all`): X * (n - 1) / n of them in even load. Gates are an
exception on TPU, see `exchange`.

A capacity bounds what an expert takes of a group. A group of many devices may
fill an expert from one of them, so padding keeps the whole group's slots on
each: the work of a device would not fall with their number. `auto` pads only
where that costs little, and is dropless, which has the same drops, elsewhere.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple, Optional

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from architectures.parts import layers, sharding
from architectures.parts.layers import Hidden, mix
from architectures.parts.moe import grouped, routing
from architectures.parts.moe.routing import MoEConfig, Routing, ranks
from common.errors import RequestError

PADDING = 2  # slots for each assignment that `auto` accepts, see `way`


# On one device.


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

  def mask(self, id_P: jax.Array, units: int) -> jax.Array:
    """Returns what multiplies the hidden units, 0 or 1 / (1 - rate), in float32
    [P, units]."""
    unit_F = (jnp.arange(units) + self.first_unit).astype(jnp.uint32)
    row_P = mix(id_P.astype(jnp.uint32) ^ self.seed)
    bits_PF = mix(row_P[:, None] + unit_F[None] * jnp.uint32(0x9e3779b9))
    keep_PF = bits_PF >= jnp.uint32(int(self.rate * 2 ** 32))
    return keep_PF / (1 - self.rate)


def batched(rows_ECD: jax.Array, w: Weights, hidden: Hidden,
            mask_ECF: Optional[jax.Array] = None) -> jax.Array:
  """Returns the results of every expert for its own C rows, [E, C, D]."""

  def affine(spec: str, x: jax.Array, weight: jax.Array,
             bias: Optional[jax.Array]) -> jax.Array:
    """Returns x weight + bias, for each expert."""
    y = layers.einsum(spec, x, weight, x.dtype)
    if bias is None:
      return y
    return y + bias[:, None]

  into = 'ECD,EDF->ECF'
  before = [affine(into, rows_ECD, w.up_EDF, w.up_bias_EF)]
  if hidden.gated:
    before.append(affine(into, rows_ECD, w.gate_EDF, w.gate_bias_EF))
  h_ECF = hidden(*before)
  if mask_ECF is not None:
    h_ECF = h_ECF * mask_ECF.astype(h_ECF.dtype)
  return affine('ECF,EFD->ECD', h_ECF, w.down_EFD, w.down_bias_ED)


def _rows_at(x_P: jax.Array, index_A: jax.Array) -> jax.Array:
  """Returns x[index], and zeros where an index is outside of x."""
  return x_P.at[index_A].get(mode='fill', fill_value=0)


def _sum_of_choices(x_AD: jax.Array, tokens: int, choices: int) -> jax.Array:
  """Returns the sum of each token's assignments, [T, D], added in float32.

  The `choices` assignments of a token stand one after another.
  """
  x_TXD = x_AD.reshape(tokens, choices, -1)
  sum_TD = x_TXD.sum(1, dtype=jnp.float32)
  return sum_TD.astype(x_AD.dtype)


def _sum_by_token(x_AD: jax.Array, token_A: jax.Array, tokens: int
                  ) -> jax.Array:
  """Returns the sum of each token's assignments, [T, D], which may stand in any
  order: a scatter. Where token_A is T, a row is left out."""
  zeros_TD = jnp.zeros((tokens, x_AD.shape[1]), x_AD.dtype)
  return zeros_TD.at[token_A].add(x_AD, mode='drop')


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def take(x_TD: jax.Array, token_P: jax.Array, row_A: jax.Array, choices: int
         ) -> jax.Array:
  """Returns the rows x[token_P], [P, D], with a gradient that is a gather too.

  Args:
    x_TD: the tokens.
    token_P: the token of each row; T gives zeros.
    row_A: the inverse, the row of each assignment; P where it has none.
    choices: how many assignments each token has, which stand one after
      another; 0: they stand in any order, and the gradient is a scatter.
  """
  del row_A, choices
  return _rows_at(x_TD, token_P)


def _take_fwd(x_TD: jax.Array, token_P: jax.Array, row_A: jax.Array,
              choices: int):
  rows_PD = take(x_TD, token_P, row_A, choices=choices)
  return rows_PD, (token_P, row_A, x_TD.shape[0])


def _take_bwd(choices: int, saved: tuple, d_PD: jax.Array):
  token_P, row_A, tokens = saved
  if choices == 0:
    return _sum_by_token(d_PD, token_P, tokens), None, None
  d_AD = _rows_at(d_PD, row_A)
  return _sum_of_choices(d_AD, tokens, choices), None, None


take.defvjp(_take_fwd, _take_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def combine(y_PD: jax.Array, gate_A: Optional[jax.Array], token_A: jax.Array,
            row_A: jax.Array, assignment_P: jax.Array, tokens: int, choices: int
            ) -> jax.Array:
  """Returns y_t = the sum of gate * row over the assignments of token t.

  Args:
    y_PD: the experts' results.
    gate_A: the gate of each assignment; None: the rows have been multiplied by
      their gates already.
    token_A: the token of each assignment.
    row_A: the row of each assignment; P where it has none.
    assignment_P: the inverse of row_A, which the gradient reads; A where a row
      has no assignment.
    tokens: T.
    choices: how many assignments each token has; 0: the experts chose.
  """
  del assignment_P
  y_AD = _rows_at(y_PD, row_A)
  if gate_A is not None:
    y_AD = y_AD * gate_A[:, None].astype(y_AD.dtype)
  # Where experts chose, a token has any number of assignments, in any order,
  # and only a scatter can add them.
  if choices == 0:
    return _sum_by_token(y_AD, token_A, tokens)
  return _sum_of_choices(y_AD, tokens, choices)


def _combine_fwd(y_PD: jax.Array, gate_A: Optional[jax.Array],
                 token_A: jax.Array, row_A: jax.Array, assignment_P: jax.Array,
                 tokens: int, choices: int):
  y_TD = combine(
      y_PD, gate_A, token_A=token_A, row_A=row_A, assignment_P=assignment_P,
      tokens=tokens, choices=choices)
  # Only the gradient of the gates reads the results.
  rows_PD = None if gate_A is None else y_PD
  return y_TD, (rows_PD, gate_A, token_A, row_A, assignment_P)


def _combine_bwd(tokens: int, choices: int, saved: tuple, d_TD: jax.Array):
  del choices
  y_PD, gate_A, token_A, row_A, assignment_P = saved
  token_P = token_A.at[assignment_P].get(mode='fill', fill_value=tokens)
  d_PD = _rows_at(d_TD, token_P)
  if gate_A is None:
    return d_PD, None, None, None, None
  # A gate's gradient is the product of a result with its gradient.
  d_gate_P = (d_PD.astype(jnp.float32) * y_PD.astype(jnp.float32)).sum(1)
  d_gate_A = _rows_at(d_gate_P, row_A).astype(gate_A.dtype)
  gate_P = _rows_at(gate_A, assignment_P)
  d_PD = d_PD * gate_P[:, None].astype(d_PD.dtype)
  return d_PD, d_gate_A, None, None, None


combine.defvjp(_combine_fwd, _combine_bwd)


def inverse(row_A: jax.Array, rows: int) -> jax.Array:
  """Returns the assignment of each row, [P]; A for a row that none has.

  Args:
    row_A: the row of each assignment.
    rows: P.
  """
  A = row_A.shape[0]
  nobody_P = jnp.full(rows, A, jnp.int32)
  assignment_A = jnp.arange(A, dtype=jnp.int32)
  return nobody_P.at[row_A].set(assignment_A, mode='drop', unique_indices=True)


def place_padded(expert_A: jax.Array, experts: int, slots: int) -> jax.Array:
  """Returns the row of each assignment in [E, C]; E * C for a void one."""
  row_A = expert_A * slots + ranks(expert_A, experts + 1)
  return jnp.where(expert_A < experts, row_A, experts * slots)


def place_sorted(expert_A: jax.Array, experts: int
                 ) -> tuple[jax.Array, jax.Array]:
  """Returns the row of each assignment when rows are sorted by expert, [A], and
  how many rows each expert has, [E]. A void assignment has row A."""
  A = expert_A.shape[0]
  order_A = jnp.argsort(expert_A, stable=True)
  row_A = jnp.zeros_like(order_A).at[order_A].set(
      jnp.arange(A), unique_indices=True)
  ends_E = jnp.searchsorted(
      expert_A[order_A], jnp.arange(experts), side='right')
  count_E = jnp.diff(ends_E, prepend=0).astype(jnp.int32)
  return jnp.where(expert_A < experts, row_A, A), count_E


class Moved(NamedTuple):
  """Tokens that stand as rows, and the way back.

  Attributes:
    rows_PD: the rows.
    assignment_P: the assignment of each row; A where it has none.
    back: (results of the rows, the gates or None) -> y_TD, as `combine`.
  """
  rows_PD: jax.Array
  assignment_P: jax.Array
  back: Callable[[jax.Array, Optional[jax.Array]], jax.Array]


def move(x_TD: jax.Array, r: Routing, row_A: jax.Array, rows: int) -> Moved:
  """Returns tokens as the rows of their assignments.

  Args:
    x_TD: the tokens.
    r: their assignments.
    row_A: the row of each assignment; P where it has none.
    rows: P.
  """
  T = x_TD.shape[0]
  assignment_P = inverse(row_A, rows)
  token_P = r.token_A.at[assignment_P].get(mode='fill', fill_value=T)

  def back(y_PD: jax.Array, gate_A: Optional[jax.Array]) -> jax.Array:
    """Returns the sums of the tokens' results."""
    return combine(
        y_PD, gate_A, token_A=r.token_A, row_A=row_A,
        assignment_P=assignment_P, tokens=T, choices=r.choices)

  rows_PD = take(x_TD, token_P, row_A, choices=r.choices)
  return Moved(rows_PD=rows_PD, assignment_P=assignment_P, back=back)


def reorder(x_A: jax.Array, from_P: jax.Array, to_A: jax.Array) -> jax.Array:
  """Returns the numbers x[from_P], and 0 where from_P is A; `to_A` is the
  inverse of from_P, as in `take`."""
  x_A1 = x_A[:, None]
  return take(x_A1, token_P=from_P, row_A=to_A, choices=1)[:, 0]


@struct.dataclass
class Local:
  """This device's experts, which rows may be handed to in two layouts.

  Attributes:
    w: their weights.
    dropout: the dropout of their hidden units, if any.
    how: how grouped rows are computed.
    experts: how many experts all devices have.
  """
  w: Weights
  dropout: Optional[Dropout]
  how: grouped.How = struct.field(pytree_node=False)
  experts: int = struct.field(pytree_node=False)

  def padded(self, rows_ECD: jax.Array, id_EC: jax.Array) -> jax.Array:
    """Returns the results of C rows of each expert, [E, C, D]; id_EC are the
    ids of their assignments."""
    mask_ECF = self._mask(id_EC.reshape(-1))
    if mask_ECF is not None:
      mask_ECF = mask_ECF.reshape(*id_EC.shape, -1)
    return batched(rows_ECD, self.w, hidden=self.how.kind, mask_ECF=mask_ECF)

  def place(self, expert_A: jax.Array) -> tuple[jax.Array, int, jax.Array]:
    """Returns the row of each assignment, how many rows there are, and how many
    of them each expert has."""
    row_A, count_E = place_sorted(expert_A, self.experts)
    return row_A, expert_A.shape[0], count_E

  def grouped(self, rows_PD: jax.Array, count_E: jax.Array, id_P: jax.Array,
              gate_P: jax.Array) -> jax.Array:
    """Returns the results of rows that are sorted by expert, each multiplied by
    its gate, [P, D]."""
    mask_PF = self._mask(id_P)
    return grouped.ffn(rows_PD, count_E=count_E, gate_P=gate_P, w=self.w,
                       mask_PF=mask_PF, how=self.how)

  def ids(self, assignment_P: jax.Array) -> jax.Array:
    """Returns the ids that dropout knows assignments by, on any device."""
    if self.dropout is None:
      return assignment_P
    return assignment_P + self.dropout.first_row

  def _mask(self, id_P: jax.Array) -> Optional[jax.Array]:
    if self.dropout is None:
      return None
    return self.dropout.mask(id_P, self.w.up_EDF.shape[2])


def by_sorted(x_TD: jax.Array, r: Routing, run: 'Local | Spread', slots: int
              ) -> jax.Array:
  """Returns y_TD; each expert has `slots` rows, and those that no assignment
  fills are zeros."""
  E, D = r.probs_TE.shape[1], x_TD.shape[1]
  row_A = place_padded(r.expert_A, E, slots)
  rows_PD, assignment_P, back = move(x_TD, r, row_A, E * slots)

  rows_ECD = rows_PD.reshape(E, slots, D)
  id_EC = run.ids(assignment_P).reshape(E, slots)
  y_ECD = run.padded(rows_ECD, id_EC)
  return back(y_ECD.reshape(E * slots, D), r.gate_A)


def by_dropless(x_TD: jax.Array, r: Routing, run: 'Local | Spread', slots: int
                ) -> jax.Array:
  """Returns y_TD; rows are sorted by expert, without padding (MegaBlocks)."""
  del slots  # what has no room is void already
  row_A, rows, count_E = run.place(r.expert_A)
  rows_PD, assignment_P, back = move(x_TD, r, row_A, rows)

  # Gates go with the rows. Their gradient needs the expert's result, which
  # would otherwise have to come back once more when a layer is computed again.
  gate_P = reorder(r.gate_A, assignment_P, row_A)
  id_P = run.ids(assignment_P)
  y_PD = run.grouped(rows_PD, count_E=count_E, id_P=id_P, gate_P=gate_P)
  return back(y_PD, None)


# Over the mesh.


class Axes(NamedTuple):
  """The mesh axes of more than one device, by what lies on them."""
  tokens: tuple[str, ...] = ()
  experts: tuple[str, ...] = ()
  mlp: tuple[str, ...] = ()
  embed: tuple[str, ...] = ()


def mesh_axes() -> Optional[Axes]:
  """Returns where the installed rules put things; None: each device has all."""
  tokens = sharding.mesh_axes('tokens')
  experts_on, mlp, embed = sharding.lies_on('experts', 'mlp', 'embed')
  axes = Axes(tokens=tokens, experts=experts_on, mlp=mlp, embed=embed)
  if not any(axes):
    return None
  return axes


def expert_shards() -> int:
  """Returns over how many devices the experts are spread."""
  axes = mesh_axes()
  if axes is None:
    return 1
  return sharding.size(axes.experts)


def slots(m: MoEConfig, factor: float, tokens: int, groups: int,
          shards: int) -> int:
  """Returns C, a device's slots of an expert that T tokens of it may choose.

  Args:
    m: the mixture.
    factor: the capacity factor; 0: there is none, so that all may come.
    tokens: the number of tokens of all devices, in `groups` groups.
    groups: the number of routing groups.
    shards: the number of devices that the tokens are split over.
  """
  T = -(-tokens // shards)
  if not factor:
    return T
  group_slots = routing.capacity(
      factor, tokens=tokens // groups, choices=m.top_k, experts=m.all_experts)
  return min(T, max(1, groups // shards) * group_slots)


def way(m: MoEConfig, factor: float, tokens: int, groups: int,
        shards: int) -> str:
  """Returns how a mixture is computed, an entry of WAYS; Args as for `slots`.

  `auto` is a batch of padded experts where their slots are at most PADDING
  times a device's assignments, else groups without a bound.
  """
  if m.dispatch != 'auto':
    return m.dispatch
  if routing.of(m).experts_choose:  # they fill their slots, all of them
    return 'sorted'
  if not factor:
    return 'dropless'
  rows = m.num_experts * slots(
      m, factor, tokens=tokens, groups=groups, shards=shards)
  assignments = m.top_k * -(-tokens // shards)
  if rows <= PADDING * assignments:
    return 'sorted'
  return 'dropless'


def experts(m: MoEConfig, x_TD: jax.Array, routed: Routing,
            w: Weights, hidden: Hidden, groups: int,
            dropout: Optional[Dropout], *, train: bool, again: bool = False
            ) -> tuple[jax.Array, jax.Array]:
  """Returns y_TD, and bool [A]: the assignments that found room.

  Args:
    m: the mixture.
    x_TD: the tokens.
    routed: their assignments.
    w: the experts' weights.
    hidden: the activation of their networks.
    groups: the number of routing groups.
    dropout: the dropout of the hidden units, if any.
    train: whether the capacity is that of training.
    again: whether the backward pass computes the hidden units again
      (grouped.How).
  """
  factor = m.capacity_factor if train else m.eval_capacity_factor
  T, axes = x_TD.shape[0], mesh_axes()
  compute = functools.partial(
      _compute, m=m, hidden=hidden, factor=factor, tokens=T, groups=groups,
      again=again)
  if axes is None:
    return compute(Axes(), x_TD, routed, w, dropout)

  # Each device computes its share of the tokens, which are filled up to whole
  # shards before.
  shards = sharding.size(axes.tokens)
  _check_groups(T, groups, shards, experts_choose=routed.experts_choose)
  more = -T % shards
  x_TD, routed = _pad(x_TD, routed, more)
  by_token = PartitionSpec(axes.tokens or None)
  whole = PartitionSpec()
  routed_specs = jax.tree.map(lambda _: by_token, routed)
  y_TD, kept_A = jax.shard_map(
      functools.partial(compute, axes),
      in_specs=(by_token, routed_specs, _specs(w, axes), whole),
      out_specs=(by_token, by_token), check_vma=False)(
          x_TD, routed, w, dropout)
  assignments = routed.expert_A.shape[0] - routed.choices * more
  return y_TD[:T], kept_A[:assignments]


def _specs(w: Weights, axes: Axes) -> Weights:
  """Returns how the weights lie on the mesh, a PartitionSpec of each."""
  expert = axes.experts or None
  mlp = axes.mlp or None
  embed = axes.embed or None
  specs = Weights(
      up_EDF=PartitionSpec(expert, embed, mlp),
      down_EFD=PartitionSpec(expert, mlp, embed),
      gate_EDF=PartitionSpec(expert, embed, mlp),
      up_bias_EF=PartitionSpec(expert, mlp),
      gate_bias_EF=PartitionSpec(expert, mlp),
      down_bias_ED=PartitionSpec(expert, embed))

  def spec_of(spec: PartitionSpec, x: Optional[jax.Array]):
    """Returns the spec of a weight that there is."""
    return None if x is None else spec

  return jax.tree.map(spec_of, specs, w,
                      is_leaf=lambda x: isinstance(x, PartitionSpec))


def _pad(x_TD: jax.Array, routed: Routing, more: int
         ) -> tuple[jax.Array, Routing]:
  """Adds `more` tokens that go nowhere, to fill the shards."""
  if not more:
    return x_TD, routed
  E, assignments = routed.probs_TE.shape[1], more * routed.choices

  def add(x: jax.Array, count: int, value: int = 0) -> jax.Array:
    """Returns x with `count` rows of a value after its own."""
    ends = [(0, count)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, ends, constant_values=value)

  x_TD = add(x_TD, more)
  routed = routed.replace(
      expert_A=add(routed.expert_A, assignments, E),
      gate_A=add(routed.gate_A, assignments),
      token_A=add(routed.token_A, assignments),  # void, so any token will do
      probs_TE=add(routed.probs_TE, more))
  return x_TD, routed


def _compute(axes: Axes, x_TD: jax.Array, routed: Routing, w: Weights,
             dropout: Optional[Dropout], *, m: MoEConfig, hidden: Hidden,
             factor: float, tokens: int, groups: int, again: bool
             ) -> tuple[jax.Array, jax.Array]:
  """Computes one device's share: its tokens, and the experts that it has.

  Args:
    axes: the mesh axes; none: this device has all.
    x_TD: this device's tokens.
    routed: their assignments.
    w: this device's part of the weights.
    dropout: the dropout of the hidden units, if any.
    m: the mixture.
    hidden: the activation of its networks.
    factor: the capacity factor; 0: there is no capacity.
    tokens: the number of tokens of all devices, without padding.
    groups: the number of routing groups.
    again: as in grouped.How.

  Returns:
    y_TD, and bool [A]: the assignments that found room.
  """
  T, E = x_TD.shape[0], m.num_experts
  shards = sharding.size(axes.tokens)
  index = jax.lax.axis_index(axes.tokens) if axes.tokens else 0
  devices = sharding.size(axes.experts)

  # The assignments that have room; the rows of an expert (room), and those that
  # this device may send to another one (bound).
  if routed.experts_choose:
    routed = routed.replace(token_A=routed.token_A - index * T)
    room = routed.expert_A.shape[0] // E
    bound = routed.expert_A.shape[0] // devices
  else:
    routed = _within_capacity(
        m, factor, tokens=tokens, groups=groups, axes=axes, T=T, routed=routed)
    room = slots(m, factor, tokens=tokens, groups=groups, shards=shards)
    bound = T * min(routed.choices, E // devices)

  # Dropout counts the assignments and hidden units of all devices.
  if dropout is not None:
    first_row, first_unit = index * routed.expert_A.shape[0], 0
    if axes.mlp:
      first_unit = jax.lax.axis_index(axes.mlp) * w.up_EDF.shape[2]
    dropout = dropout.replace(first_row=first_row, first_unit=first_unit)

  # The experts, here or along the mesh.
  even = max(1, T * devices * m.top_k // m.all_experts)
  how = grouped.How(kind=hidden, even=even, kernel=grouped.choose(m),
                    again=again)
  run: Local | Spread = Local(
      w=_gather(w, axes), dropout=dropout, how=how, experts=E)
  if axes.experts:
    run = Spread(local=run, axis=axes.experts[0], bound=bound)
  name = way(m, factor, tokens=tokens, groups=groups, shards=shards)
  compute = WAYS[name]
  y_TD = compute(x_TD, routed, run, room)

  # Each shard of the hidden units has a part of the sum.
  if axes.mlp:
    y_TD = jax.lax.psum(y_TD, axes.mlp)
  return y_TD, routed.expert_A < E


def _within_capacity(m: MoEConfig, factor: float, tokens: int, groups: int,
                     axes: Axes, T: int, routed: Routing
                     ) -> Routing:
  """Returns the choices of this device's T tokens, void where they exceed what
  an expert takes of a group."""
  E, X = m.num_experts, routed.choices
  shards = sharding.size(axes.tokens)
  token_A = jnp.arange(T * X, dtype=jnp.int32) // X
  routed = routed.replace(token_A=token_A)
  if not factor:
    return routed
  earlier = None
  if groups < shards:  # a group goes over several shards
    earlier = functools.partial(_earlier, axes, groups)
  group_slots = routing.capacity(
      factor, tokens=tokens // groups, choices=X, experts=m.all_experts)
  expert_A = routing.within_capacity(
      routed.expert_A, choices=X, groups=max(1, groups // shards), experts=E,
      slots=group_slots, earlier=earlier)
  return routed.replace(expert_A=expert_A)


def _gather(w: Weights, axes: Axes) -> Weights:
  """Returns whole weights of this device's experts, but for the share of
  'mlp'."""

  def joined(x: Optional[jax.Array], axis: int) -> Optional[jax.Array]:
    """Returns an array whose axis of 'embed' is whole."""
    if x is None:
      return None
    return sharding.join(x, axis, axes.embed)

  if axes.embed:
    w = w.replace(
        up_EDF=joined(w.up_EDF, 1), gate_EDF=joined(w.gate_EDF, 1),
        down_EFD=joined(w.down_EFD, 2), down_bias_ED=joined(w.down_bias_ED, 1))
  # The shards of 'mlp' are summed, and only the first one adds the bias.
  if axes.mlp and w.down_bias_ED is not None:
    first = jax.lax.axis_index(axes.mlp) == 0
    w = w.replace(down_bias_ED=jnp.where(first, w.down_bias_ED, 0))
  return w


def _earlier(axes: Axes, groups: int, count_1XE: jax.Array
             ) -> tuple[jax.Array, jax.Array]:
  """Returns what the shards of a group hold of each (choice, expert), [1, X, E]
  each: those before this shard, and all; for routing.within_capacity.

  Args:
    axes: the mesh axes.
    groups: the number of routing groups, fewer than there are shards.
    count_1XE: what this shard holds.
  """
  # Q counts the shards.
  shards = sharding.size(axes.tokens)
  count_QXE = jax.lax.all_gather(count_1XE[0], axes.tokens)
  index_Q, index = jnp.arange(shards), jax.lax.axis_index(axes.tokens)
  span = shards // groups  # shards of a group
  same_Q = index_Q // span == index // span

  def total(mask_Q: jax.Array) -> jax.Array:
    """Returns the sum over the shards of a mask."""
    masked_QXE = count_QXE * mask_Q[:, None, None]
    return masked_QXE.sum(0)[None]

  return total(same_Q & (index_Q < index)), total(same_Q)


@struct.dataclass
class Spread:
  """`Local` whose experts lie along a mesh axis of n devices (expert
  parallelism: GShard, Lepikhin et al. 2020).

  Attributes:
    local: the experts of this device.
    axis: the mesh axis.
    bound: how many rows this device may send to one device.
  """
  local: Local
  axis: str = struct.field(pytree_node=False)
  bound: int = struct.field(pytree_node=False)

  @property
  def devices(self) -> int:
    return sharding.size((self.axis,))

  def ids(self, assignment_P: jax.Array) -> jax.Array:
    """Returns the ids that dropout knows assignments by, on any device."""
    return self.local.ids(assignment_P)

  def padded(self, rows_ECD: jax.Array, id_EC: jax.Array) -> jax.Array:
    """Returns the results of C rows of each expert of all devices, [E, C, D]:
    there and back, each with one all-to-all."""
    n, (E, C, D) = self.devices, rows_ECD.shape

    def to_experts(x_EC: jax.Array) -> jax.Array:
      """Returns the rows of all devices for this one's experts, [E / n, n * C,
      ...]."""
      x_nEC = x_EC.reshape(n, E // n, C, *x_EC.shape[2:])
      x_EnC = self._cross(x_nEC).swapaxes(0, 1)
      return x_EnC.reshape(E // n, n * C, *x_EC.shape[2:])

    if self.local.dropout is not None:
      id_EC = to_experts(id_EC)
    y_ECD = self.local.padded(to_experts(rows_ECD), id_EC)
    y_nECD = y_ECD.reshape(E // n, n, C, D).swapaxes(0, 1)
    return self._cross(y_nECD).reshape(E, C, D)

  def place(self, expert_A: jax.Array) -> tuple[jax.Array, int, jax.Array]:
    """Returns what Local.place does. The rows for device d stand from d * bound
    on, sorted by expert."""
    n, E = self.devices, self.local.experts
    row_A, count_E = place_sorted(expert_A, E)
    count_n = count_E.reshape(n, -1).sum(1)
    device_A = expert_A // (E // n)  # n for a void one
    start_n = jnp.append(jnp.cumsum(count_n) - count_n, 0)
    row_A = device_A * self.bound + row_A - start_n[device_A]
    row_A = jnp.where(expert_A < E, row_A, n * self.bound)
    return row_A, n * self.bound, count_E

  def grouped(self, rows_PD: jax.Array, count_E: jax.Array, id_P: jax.Array,
              gate_P: jax.Array) -> jax.Array:
    """Returns the results of rows, each multiplied by its gate, [P, D]: rows
    cross to the devices of their experts, are computed there, and cross back.

    Args:
      rows_PD: the rows as `place` puts them, P = n * bound.
      count_E: int32, how many of them are for each expert.
      id_P: the ids of their assignments, which dropout reads.
      gate_P: their gates.
    """
    n, P = self.devices, rows_PD.shape[0]

    # How many rows this device sends to each other's experts, and how many it
    # receives from each for its own.
    send_nE = count_E.reshape(n, -1)
    receive_nE = self._cross(send_nE)
    send_n, receive_n = send_nE.sum(1), receive_nE.sum(1)

    # Rows arrive sorted by the device that sent them, and are to be sorted by
    # expert: row_P is where each of them goes, from_P its inverse.
    expert_P = self._received_experts(receive_nE)
    row_P, count_E = place_sorted(expert_P, send_nE.shape[1])
    from_P = inverse(row_P, P)

    # There.
    if self.local.dropout is not None:
      id_P = self._cross_rows(id_P, send_n, receive_n)
      id_P = _rows_at(id_P, from_P)
    rows_PD = self._cross_rows(rows_PD, send_n, receive_n)
    rows_PD = take(rows_PD, token_P=from_P, row_A=row_P, choices=1)
    gate_P = self._cross_rows(gate_P, send_n, receive_n)
    gate_P = reorder(gate_P, from_P, row_P)
    y_PD = self.local.grouped(
        rows_PD, count_E=count_E, id_P=id_P, gate_P=gate_P)

    # And back.
    y_PD = take(y_PD, token_P=row_P, row_A=from_P, choices=1)
    return self._cross_rows(y_PD, receive_n, send_n)

  def _received_experts(self, receive_nE: jax.Array) -> jax.Array:
    """Returns the expert of each row that arrives, [P]: those of one device
    stand in `bound` places, sorted; E / n, no expert, where there is no row."""

    def experts_of_device(ends_E: jax.Array) -> jax.Array:
      """Returns the first expert whose rows end after each place."""
      return jnp.searchsorted(ends_E, jnp.arange(self.bound), side='right')

    ends_nE = jnp.cumsum(receive_nE, 1)
    return jax.vmap(experts_of_device)(ends_nE).reshape(-1)

  def _cross(self, x_n: jax.Array) -> jax.Array:
    """Returns what each device has in x for this one, [n, ...]."""
    return exchange(x_n, None, None, self.axis)

  def _cross_rows(self, x_P: jax.Array, send_n: jax.Array, receive_n: jax.Array
                  ) -> jax.Array:
    """Returns the rows that arrive, [P, ...]; from each device, `receive_n` of
    them matter, and this device sends `send_n` of its own."""
    x_nP = x_P.reshape(self.devices, self.bound, *x_P.shape[1:])
    return exchange(x_nP, send_n, receive_n, self.axis).reshape(x_P.shape)


def _check_groups(T: int, groups: int, shards: int,
                  experts_choose: bool) -> None:
  """Raises RequestError unless routing groups fit on shards of the batch."""
  if T % shards == 0 and groups % shards == 0:
    return  # each shard has whole groups
  if groups == 1 and not experts_choose:
    return  # one group, which goes over all shards and may be padded
  if T % shards == 0 and shards % groups == 0 and not experts_choose:
    return  # each group has whole shards
  raise RequestError(
      f'{groups} routing groups of {T // groups} tokens do not fit on {shards} '
      'shards of the batch: set model.moe.group_size to a divisor of '
      f'{max(1, T // shards)}')


# The all-to-all that rows cross the mesh by, there and, as gradients, back.

@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def exchange(x: jax.Array, send_n: Optional[jax.Array],
             receive_n: Optional[jax.Array], axis: str) -> jax.Array:
  """Returns x after an all-to-all: x[d] of this device becomes x[this] of
  device d.

  With `send_n` and `receive_n`, only so many rows of each matter, and where
  the backend can, no others travel.

  Args:
    x: [n, ...], or [n, rows, ...] where rows are counted.
    send_n: how many rows go to each device; None: all.
    receive_n: how many rows come from each device.
    axis: the mesh axis of the n devices.
  """
  def all_rows(x: jax.Array, *counts: Optional[jax.Array]) -> jax.Array:
    """Returns x with all of its rows exchanged, full or not."""
    del counts
    return jax.lax.all_to_all(x, axis_name=axis, split_axis=0, concat_axis=0,
                              tiled=True)

  if send_n is None:
    return all_rows(x)
  # Where only full rows travel, TPU pads a number for each row to LANES of
  # them. The numbers of all rows are fewer.
  by_platform = {'cpu': all_rows}
  if x.ndim == 2 and x.shape[0] <= sharding.LANES:
    by_platform['tpu'] = all_rows
  full_rows = functools.partial(_ragged, axis)
  return jax.lax.platform_dependent(
      x, send_n, receive_n, default=full_rows, **by_platform)


def _ragged(axis: str, x: jax.Array, send_n: jax.Array, receive_n: jax.Array
            ) -> jax.Array:
  """Returns x with only its full rows exchanged, zeros elsewhere."""
  n, bound = x.shape[:2]
  rows = x.reshape(n * bound, *x.shape[2:])
  first_n = jnp.arange(n, dtype=jnp.int32) * bound
  mine_n = jnp.full(n, jax.lax.axis_index(axis) * bound, jnp.int32)
  received = jax.lax.ragged_all_to_all(
      operand=rows, output=jnp.zeros_like(rows), input_offsets=first_n,
      send_sizes=send_n.astype(jnp.int32), output_offsets=mine_n,
      recv_sizes=receive_n.astype(jnp.int32), axis_name=axis)
  return received.reshape(x.shape)


def _exchange_fwd(x: jax.Array, send_n: Optional[jax.Array],
                  receive_n: Optional[jax.Array], axis: str):
  return exchange(x, send_n, receive_n, axis), (send_n, receive_n)


def _exchange_bwd(axis: str, saved: tuple, d: jax.Array):
  send_n, receive_n = saved
  return exchange(d, receive_n, send_n, axis), None, None


exchange.defvjp(_exchange_fwd, _exchange_bwd)


WAYS = {
    'sorted': by_sorted,
    'dropless': by_dropless,
}
