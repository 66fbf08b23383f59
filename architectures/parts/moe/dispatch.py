"""Computing the experts, on this device or spread over the mesh.

y_t = sum over the assignments (t, e, g) of g * FFN_e(x_t), in two ways:

sorted    rows are gathered to [E, C, D] and multiplied as a batch.
dropless  rows are sorted by expert and multiplied in groups, without padding
          (MegaBlocks: Gale et al. 2022); moe/grouped.py has the product.

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

import functools
from typing import Any, NamedTuple, Optional

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from architectures.parts import layers, sharding
from architectures.parts.layers import Hidden, mix
from architectures.parts.moe import grouped, routing
from architectures.parts.moe.routing import MoEConfig, Routing, ranks
from common.errors import require

PADDING = 2


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


def batched(rows_ECD: jax.Array, w: Weights, hidden: Hidden,
            mask_ECF: Optional[jax.Array] = None) -> jax.Array:
  """Every expert on its own C rows."""
  add = lambda x, b: x if b is None else x + b[:, None]
  product = lambda spec, x, m: layers.einsum(spec, x, m, x.dtype)
  pre = [add(product('ECD,EDF->ECF', rows_ECD, w.up_EDF), w.up_bias_EF)]
  if hidden.gated:
    pre.append(add(product('ECD,EDF->ECF', rows_ECD, w.gate_EDF),
                   w.gate_bias_EF))
  h_ECF = hidden(*pre)
  if mask_ECF is not None:
    h_ECF = h_ECF * mask_ECF.astype(h_ECF.dtype)
  return add(product('ECF,EFD->ECD', h_ECF, w.down_EFD), w.down_bias_ED)


_FILL = dict(mode='fill', fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def take(x_TD: jax.Array, token_P: jax.Array, row_A: jax.Array, choices: int):
  """Row r gets token token_P[r]; T there gives zeros.

  `row_A` is the inverse, P where an assignment has no row: with it, the
  gradient is a gather. Without `choices`, it is a scatter.
  """
  del row_A, choices
  return x_TD.at[token_P].get(**_FILL)


def _take_bwd(choices: int, saved: tuple, d_PD: jax.Array):
  token_P, row_A, T = saved
  if not choices:
    zeros_TD = jnp.zeros((T, d_PD.shape[1]), d_PD.dtype)
    return zeros_TD.at[token_P].add(d_PD, mode='drop'), None, None
  d_AD = d_PD.at[row_A].get(**_FILL)
  d_TD = d_AD.reshape(T, choices, -1).sum(1, dtype=jnp.float32)
  return d_TD.astype(d_PD.dtype), None, None


take.defvjp(
    lambda x_TD, token_P, row_A, choices: (
        take(x_TD, token_P, row_A, choices), (token_P, row_A, len(x_TD))),
    _take_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def combine(y_PD: jax.Array, gate_A: Optional[jax.Array], token_A: jax.Array,
            row_A: jax.Array, assignment_P: jax.Array, tokens: int, choices: int
            ):
  """y_T = the sum of gate * row over the assignments of a token.

  `assignment_P` is the inverse of `row_A`; A where a row has none. Without
  `gate_A`, rows have already been multiplied by their gates.
  """
  del assignment_P
  y_AD = y_PD.at[row_A].get(**_FILL)
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
  token_P = token_A.at[assignment_P].get(mode='fill', fill_value=d_TD.shape[0])
  d_PD = d_TD.at[token_P].get(**_FILL)
  if gate_A is None:
    return d_PD, None, None, None, None
  d_gate_P = (d_PD.astype(jnp.float32) * y_PD.astype(jnp.float32)).sum(1)
  d_gate_A = d_gate_P.at[row_A].get(**_FILL).astype(gate_A.dtype)
  gate_P = gate_A.at[assignment_P].get(**_FILL)
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
  how: grouped.How = struct.field(pytree_node=False)
  experts: int = struct.field(pytree_node=False)  # of all devices

  def padded(self, rows_ECD: jax.Array, id_EC: jax.Array):
    """C rows an expert, with the ids of their assignments."""
    mask_ECF = self._mask(id_EC.reshape(-1))
    if mask_ECF is not None:
      mask_ECF = mask_ECF.reshape(*id_EC.shape, -1)
    return batched(rows_ECD, self.w, self.how.kind, mask_ECF)

  def place(self, expert_A: jax.Array):
    """(the row of each assignment, how many rows, rows of each expert)."""
    row_A, count_E = place_sorted(expert_A, self.experts)
    return row_A, expert_A.shape[0], count_E

  def grouped(self, rows_PD: jax.Array, count_E: jax.Array, id_P: jax.Array,
              gate_P: jax.Array):
    """Rows sorted by expert, each result multiplied by its gate."""
    return grouped.ffn(rows_PD, count_E, gate_P, self.w, self._mask(id_P),
                       self.how)

  def ids(self, assignment_P: jax.Array):
    """The ids that dropout knows assignments by, on any device."""
    return assignment_P + (self.dropout.first_row if self.dropout else 0)

  def _mask(self, id_P: jax.Array):
    return self.dropout and self.dropout.mask(id_P, self.w.up_EDF.shape[2])


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


# Over the mesh.


class Axes(NamedTuple):
  """The mesh axes of more than one device, by what lies on them."""
  tokens: tuple[str, ...] = ()
  experts: tuple[str, ...] = ()
  mlp: tuple[str, ...] = ()
  embed: tuple[str, ...] = ()


def mesh_axes() -> Optional[Axes]:
  """Where the installed rules put things; None: all on each device."""
  names = sharding.mesh_axes('tokens'), *sharding.lies_on(
      'experts', 'mlp', 'embed')
  return Axes(*names) if any(names) else None


def expert_shards() -> int:
  """Over how many devices the experts are spread."""
  axes = mesh_axes()
  return sharding.size(axes.experts) if axes else 1


def slots(m: MoEConfig, factor: float, tokens: int, groups: int,
          shards: int) -> int:
  """C: a device's slots of an expert that T tokens of it may choose.

  Args:
    factor: of capacity; 0: none, so that all may come.
    tokens: of all devices, in `groups` groups.
    shards: devices that the tokens are split over.
  """
  T = -(-tokens // shards)
  if not factor:
    return T
  one = routing.capacity(factor, tokens // groups, m.top_k, m.all_experts)
  return min(T, max(1, groups // shards) * one)


def way(m: MoEConfig, factor: float, tokens: int, groups: int,
        shards: int) -> str:
  """The way of `auto`: a batch of padded experts where their slots are at most
  PADDING times a device's assignments, or groups without a bound."""
  if m.dispatch != 'auto':
    return m.dispatch
  if routing.of(m).experts_choose:  # they fill their slots, all of them
    return 'sorted'
  rows = m.num_experts * slots(m, factor, tokens, groups, shards)
  fits = rows <= PADDING * m.top_k * -(-tokens // shards)
  return 'sorted' if factor and fits else 'dropless'


def experts(m: MoEConfig, x_TD: jax.Array, routed: Routing,
            w: Weights, hidden: Hidden, groups: int,
            dropout: Optional[Dropout], *, train: bool, again: bool = False):
  """Returns (y_TD, kept_A: the assignments that found room); `again`: whether
  the backward pass computes the hidden units again (grouped.How)."""
  factor = m.capacity_factor if train else m.eval_capacity_factor
  T, axes = x_TD.shape[0], mesh_axes()
  compute = functools.partial(_compute, m, hidden, factor, T, groups, again)
  if axes is None:
    return compute(Axes(), x_TD, routed, w, dropout)
  shards = sharding.size(axes.tokens)
  _check_groups(T, groups, shards, routed.experts_choose)
  x_TD, routed = _pad(x_TD, routed, -T % shards)
  tokens, rows = PartitionSpec(axes.tokens or None), routed.expert_A.shape[0]
  y_TD, kept_A = jax.shard_map(
      functools.partial(compute, axes),
      in_specs=(tokens, jax.tree.map(lambda _: tokens, routed), _specs(w, axes),
                PartitionSpec()),
      out_specs=(tokens, tokens), check_vma=False)(x_TD, routed, w, dropout)
  return y_TD[:T], kept_A[:rows - routed.choices * (-T % shards)]


def _specs(w: Weights, axes: Axes) -> Weights:
  e, f, d = (a or None for a in (axes.experts, axes.mlp, axes.embed))
  specs = Weights(
      PartitionSpec(e, d, f), PartitionSpec(e, f, d), PartitionSpec(e, d, f),
      PartitionSpec(e, f), PartitionSpec(e, f), PartitionSpec(e, d))
  return jax.tree.map(lambda spec, x: None if x is None else spec, specs, w,
                      is_leaf=lambda x: isinstance(x, PartitionSpec))


def _pad(x_TD: jax.Array, routed: Routing, more: int):
  """Adds tokens that go nowhere, to fill the shards."""
  if not more:
    return x_TD, routed
  E, rows = routed.probs_TE.shape[1], more * routed.choices
  add = lambda x, n, value=0: jnp.pad(
      x, ((0, n),) + ((0, 0),) * (x.ndim - 1), constant_values=value)
  return add(x_TD, more), routed.replace(
      expert_A=add(routed.expert_A, rows, E), gate_A=add(routed.gate_A, rows),
      token_A=add(routed.token_A, rows),  # void, so any token will do
      probs_TE=add(routed.probs_TE, more))


def _compute(m: MoEConfig, hidden: Hidden, factor: float, tokens: int,
             groups: int, again: bool, axes: Axes, x_TD: jax.Array,
             routed: Routing, w: Weights, dropout: Optional[Dropout]):
  """One device's share. `tokens`: of all devices, padding apart."""
  T, E = x_TD.shape[0], m.num_experts
  shards = sharding.size(axes.tokens)
  index = jax.lax.axis_index(axes.tokens) if axes.tokens else 0
  devices = sharding.size(axes.experts)
  if routed.experts_choose:
    routed = routed.replace(token_A=routed.token_A - index * T)
    room = routed.expert_A.shape[0] // E
    bound = routed.expert_A.shape[0] // devices
  else:
    routed = _within_capacity(m, factor, tokens, groups, axes, T, routed)
    room = slots(m, factor, tokens, groups, shards)
    bound = T * min(routed.choices, E // devices)
  if dropout is not None:
    dropout = dropout.replace(
        first_row=index * routed.expert_A.shape[0],
        first_unit=(jax.lax.axis_index(axes.mlp) * w.up_EDF.shape[2]
                    if axes.mlp else 0))
  even = max(1, T * devices * m.top_k // m.all_experts)
  run = Local(_gather(w, axes), dropout,
              grouped.How(hidden, even, grouped.choose(m), again), E)
  if axes.experts:
    run = Spread(run, axes.experts[0], bound)
  compute = WAYS[way(m, factor, tokens, groups, shards)]
  y_TD = compute(x_TD, routed, run, room)
  if axes.mlp:
    y_TD = jax.lax.psum(y_TD, axes.mlp)
  return y_TD, routed.expert_A < E


def _within_capacity(m: MoEConfig, factor: float, tokens: int, groups: int,
                     axes: Axes, T: int, routed: Routing
                     ) -> Routing:
  """The choices of this device's T tokens, void where they exceed what an
  expert takes of a group."""
  E, X = m.num_experts, routed.choices
  shards = sharding.size(axes.tokens)
  routed = routed.replace(
      token_A=jnp.arange(T * X, dtype=jnp.int32) // X)
  if not factor:
    return routed
  return routed.replace(expert_A=routing.within_capacity(
      routed.expert_A, choices=X, groups=max(1, groups // shards), experts=E,
      slots=routing.capacity(factor, tokens // groups, X, m.all_experts),
      earlier=_earlier(axes, groups) if groups < shards else None))


def _gather(w: Weights, axes: Axes) -> Weights:
  """Whole weights of this device's experts, but for the share of 'mlp'."""
  if axes.embed:
    gather = lambda x, axis: None if x is None else sharding.join(
        x, axis, axes.embed)
    w = w.replace(
        up_EDF=gather(w.up_EDF, 1), gate_EDF=gather(w.gate_EDF, 1),
        down_EFD=gather(w.down_EFD, 2), down_bias_ED=gather(w.down_bias_ED, 1))
  if axes.mlp and w.down_bias_ED is not None:  # once, not once a shard
    first = jax.lax.axis_index(axes.mlp) == 0
    w = w.replace(down_bias_ED=jnp.where(first, w.down_bias_ED, 0))
  return w


def _earlier(axes: Axes, groups: int):
  """For routing.within_capacity: a group that goes over several shards."""
  def earlier(count_1XE: jax.Array):
    shards = sharding.size(axes.tokens)
    count_QXE = jax.lax.all_gather(count_1XE[0], axes.tokens)
    index_Q, index = jnp.arange(shards), jax.lax.axis_index(axes.tokens)
    span = shards // groups
    same_Q = index_Q // span == index // span
    total = lambda mask_Q: (count_QXE * mask_Q[:, None, None]).sum(0)[None]
    return total(same_Q & (index_Q < index)), total(same_Q)
  return earlier


@struct.dataclass
class Spread:
  """`Local` whose experts lie along a mesh axis of n devices."""
  local: Local
  axis: str = struct.field(pytree_node=False)
  bound: int = struct.field(pytree_node=False)  # rows for one device

  @property
  def devices(self) -> int:
    return sharding.size((self.axis,))

  def ids(self, assignment_P: jax.Array):
    return self.local.ids(assignment_P)

  def _cross(self, x: jax.Array, send_n: Optional[jax.Array] = None,
             receive_n: Optional[jax.Array] = None):
    return exchange(x, send_n, receive_n, self.axis)

  def padded(self, rows_ECD: jax.Array, id_EC: jax.Array):
    n, (E, C, D) = self.devices, rows_ECD.shape
    def to_experts(x):  # [E, C, ...] -> [E / n, n * C, ...]
      x = self._cross(x.reshape(n, E // n, C, *x.shape[2:]))
      return x.swapaxes(0, 1).reshape(E // n, n * C, *x.shape[3:])
    if self.local.dropout is not None:
      id_EC = to_experts(id_EC)
    y_ECD = self.local.padded(to_experts(rows_ECD), id_EC)
    y_ECD = self._cross(y_ECD.reshape(E // n, n, C, D).swapaxes(0, 1))
    return y_ECD.reshape(E, C, D)

  def place(self, expert_A: jax.Array):
    """Rows for device d stand from d * bound on, sorted by expert."""
    n, E = self.devices, self.local.experts
    row_A, count_E = place_sorted(expert_A, E)
    count_n = count_E.reshape(n, -1).sum(1)
    device_A = expert_A // (E // n)  # n for a void one
    start_n = jnp.append(jnp.cumsum(count_n) - count_n, 0)
    row_A = device_A * self.bound + row_A - start_n[device_A]
    row_A = jnp.where(expert_A < E, row_A, n * self.bound)
    return row_A, n * self.bound, count_E

  def grouped(self, rows_PD: jax.Array, count_E: jax.Array, id_P: jax.Array,
              gate_P: jax.Array):
    n, P = self.devices, rows_PD.shape[0]
    send_nE = count_E.reshape(n, -1)  # for the experts of each device
    got_nE = self._cross(send_nE)  # from each device, for those of this one
    send_n, got_n = send_nE.sum(1), got_nE.sum(1)
    cross = lambda x, a, b: self._cross(
        x.reshape(n, self.bound, *x.shape[1:]), a, b).reshape(x.shape)
    expert_P = jax.vmap(
        lambda ends_E: jnp.searchsorted(ends_E, jnp.arange(self.bound),
                                        side='right')
    )(jnp.cumsum(got_nE, 1)).reshape(-1)
    row_P, count_E = place_sorted(expert_P, send_nE.shape[1])
    from_P = inverse(row_P, P)
    if self.local.dropout is not None:
      id_P = cross(id_P, send_n, got_n).at[from_P].get(**_FILL)
    rows_PD = take(cross(rows_PD, send_n, got_n), from_P, row_P, 1)
    gate_P = reorder(cross(gate_P, send_n, got_n), from_P, row_P)
    y_PD = self.local.grouped(rows_PD, count_E, id_P, gate_P)
    return cross(take(y_PD, row_P, from_P, 1), got_n, send_n)


def _check_groups(T: int, groups: int, shards: int,
                  experts_choose: bool) -> None:
  fits = (T % shards == 0 and groups % shards == 0) or (
      not experts_choose and (
          groups == 1 or (T % shards == 0 and shards % groups == 0)))
  require(fits, f'{groups} routing groups of {T // groups} tokens do not fit '
          f'on {shards} shards of the batch: set model.moe.group_size to a '
          f'divisor of {max(1, T // shards)}')


# The all-to-all that rows cross the mesh by, there and, as gradients, back.

@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def exchange(x: jax.Array, send_n: Optional[jax.Array],
             receive_n: Optional[jax.Array], axis: str):
  """x[d] of this device becomes x[this] of device d, along mesh axis `axis`.

  With `send_n` and `receive_n`, only so many rows of each matter, and where
  the backend can, no others travel.
  """
  whole = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=0,
                            concat_axis=0, tiled=True)
  if send_n is None:
    return whole(x)
  everything = lambda x, *_: whole(x)
  # Where only full rows travel, TPU pads a number for each row to LANES of
  # them. The numbers of all rows are fewer.
  numbers = x.ndim == 2 and x.shape[0] <= sharding.LANES
  return jax.lax.platform_dependent(
      x, send_n, receive_n, cpu=everything,
      **(dict(tpu=everything) if numbers else {}),
      default=functools.partial(_ragged, axis))


def _ragged(axis: str, x: jax.Array, send_n: Optional[jax.Array],
            receive_n: Optional[jax.Array]):
  n, bound = x.shape[:2]
  flat = x.reshape(n * bound, *x.shape[2:])
  first_n = jnp.arange(n, dtype=jnp.int32) * bound
  mine_n = jnp.full(n, jax.lax.axis_index(axis) * bound, jnp.int32)
  return jax.lax.ragged_all_to_all(
      flat, jnp.zeros_like(flat), first_n, send_n.astype(jnp.int32), mine_n,
      receive_n.astype(jnp.int32), axis_name=axis).reshape(x.shape)


def _exchange_bwd(axis: str, saved: tuple, d: jax.Array):
  send_n, receive_n = saved
  return exchange(d, receive_n, send_n, axis), None, None


exchange.defvjp(
    lambda x, send_n, receive_n, axis: (
        exchange(x, send_n, receive_n, axis), (send_n, receive_n)),
    _exchange_bwd)


WAYS = {
    'sorted': by_sorted,
    'dropless': by_dropless,
}
