"""The inputs of a recurrence, the pieces of a row, how decays add up within
one, and the inverse of its triangular system (recurrence.py says of what).

Where each feature of a key has a decay of its own (GLA: Yang et al. 2023, arXiv
2312.06635; KDA: Kimi Team 2025, arXiv 2510.26692), two places meet in sum over
k of x_ik P_ijk k_jk, where P_ijk is the decay of feature k after place j up to
i. A quotient of two cumulative decays gives P too, but the one divided by may
be 0, and a difference of cumulative logarithms loses the digits of small decays
after large ones. So a piece is halved, its halves are halved, and so on to
single places. Place i of a later half meets place j of the earlier one over the
border between them:

  P_ijk = (decay from the border up to i) x (decay after j up to the border)

Both factors are exponentials of a sum of logarithms that are <= 0, over places
that lie between i and j. Each half meets the other in one product of matrices,
and all products together have as many terms as the triangle of pairs has.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import layers

FORGETS = -1e30  # a logarithm in place of -inf, whose exponential is 0 as well


class Inputs(NamedTuple):
  """The inputs of a recurrence. J heads of queries and keys serve H heads of
  values, each of them H / J that follow one another.

  A token may take several steps: then keys, values, rates and `erase` have so
  many places for each of it, one after another. Its state decays in the first,
  and its query reads the state after the last.
  """
  q_BLJK: jax.Array
  k_BLJK: jax.Array
  v_BLHU: jax.Array
  # The last axis is 1 (a head has one decay) or K (each feature has its own).
  log_decay_BLHK: Optional[jax.Array] = None  # None: no decay
  rate_BLH: Optional[jax.Array] = None  # None: no delta rule, but for `erase`
  # A correction reads the state by this; None: the key times the rate.
  erase_BLJK: Optional[jax.Array] = None

  @property
  def corrects(self) -> bool:
    """Whether what is written corrects what the state has."""
    return self.rate_BLH is not None or self.erase_BLJK is not None

  @property
  def steps(self) -> int:
    """The number of steps of a token."""
    return self.k_BLJK.shape[1] // self.q_BLJK.shape[1]


def by_place(places: int, x_BL: jax.Array) -> jax.Array:
  """[B, L, ...] -> float32 [pieces, B, P, ...], filled up with zeros: a place
  of zeros writes nothing and its decay is 1."""
  B, L, *rest = x_BL.shape
  x_BL = jnp.pad(x_BL.astype(jnp.float32), (
      (0, 0), (0, -L % places), *((0, 0) for _ in rest)))
  return jnp.moveaxis(x_BL.reshape(B, -1, places, *rest), 1, 0)


def cut(places: int, x_BLH: jax.Array) -> jax.Array:
  """[B, L, H, ...] -> float32 [pieces, B, H, P, ...], likewise."""
  return jnp.swapaxes(by_place(places, x_BLH), 2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_groups(f: Callable[[Any], Any], most: int, x: Any) -> Any:
  """Returns f of all pieces, [pieces, B, ...] each, at most `most` of them at a
  time; the backward pass computes them again.

  A group is cut out of the arrays, and goes to `f` as [B x pieces, ...], which
  is how XLA keeps it in memory. If jax.lax.map stacks groups of the first axis
  instead, XLA moves that axis in a kernel together with what comes before it,
  and libtpu (0.0.50 and 0.0.52) aborts: "Cannot find a valid window".

  Args:
    f: a function whose rows do not depend on each other.
    most: the most pieces of a group. All groups are equally large, so that the
      last one may begin with some of those before it.
    x: its argument.
  """
  return _in_groups(functools.partial(_by_row, f), most, x)


def _in_groups(f: Callable[[Any], Any], most: int, x: Any) -> Any:
  count = jax.tree.leaves(x)[0].shape[0]
  groups = -(-count // most)
  if groups == 1:
    return f(x)
  size = -(-count // groups)
  # Both clamp where a group begins, so that it ends with the last piece.
  group = lambda i: jax.tree.map(
      lambda y: jax.lax.dynamic_slice_in_dim(y, i * size, size), x)
  put = lambda i, y, here: jax.lax.dynamic_update_slice_in_dim(
      y, here, i * size, 0)
  empty = jax.tree.map(lambda y: jnp.zeros((count, *y.shape[1:]), y.dtype),
                       jax.eval_shape(f, group(0)))
  return jax.lax.fori_loop(0, groups, lambda i, out: jax.tree.map(
      functools.partial(put, i), out, f(group(i))), empty)


def _by_row(f: Callable[[Any], Any], x: Any) -> Any:
  count, B = jax.tree.leaves(x)[0].shape[:2]
  rows = jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1).reshape(
      B * count, *y.shape[2:]), x)
  return jax.tree.map(lambda y: jnp.swapaxes(y.reshape(
      B, count, *y.shape[1:]), 0, 1), f(rows))


def _in_groups_bwd(f: Callable[[Any], Any], most: int, x: Any, d: Any):
  one = functools.partial(_by_row, f)
  return _in_groups(lambda x_d: jax.vjp(one, x_d[0])[1](x_d[1]), most, (x, d))


in_groups.defvjp(lambda f, most, x: (in_groups(f, most, x), x), _in_groups_bwd)


def decays(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the decay after place j up to i, [..., i, j], 0 where j is later;
  and that of the piece up to i, [..., i]."""
  sums, upto = layers.count_flops_by_result(_sums, 0)(
      jnp.maximum(log_decay, FORGETS))
  return jnp.where(_lower(log_decay), jnp.exp(sums), 0), jnp.exp(upto)


def _lower(log_decay: jax.Array) -> jax.Array:
  """A triangle of the places of the last axis, with leading axes of 1."""
  P = log_decay.shape[-1]
  return jnp.tri(P, dtype=bool).reshape((1,) * (log_decay.ndim - 1) + (P, P))


def _sums(log_decay: jax.Array):
  """Returns the sums over the places after j up to i, and over those up to i.
  As a product with a triangle of ones, on CPU it takes a third of the time of
  jnp.cumsum."""
  P = log_decay.shape[-1]
  upto = jnp.where(_lower(log_decay), log_decay[..., None, :], 0)
  return (jnp.einsum('...im,mj->...ij', upto, jnp.tri(P, k=-1),
                     precision='highest'), upto.sum(-1))


def paired(rows: Sequence[jax.Array], k_BHPK: jax.Array,
           log_decay_BHPK: jax.Array, steps: int = 1
           ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
  """Returns what each place meets at those before it, [B, H, i, j], which is 0
  where j is not before i, by each of `rows`; the logarithms of the decay of the
  piece up to each place, and of that after it, [B, H, P, K].

  Args:
    rows: vectors of each place, [B, H, P, K], such as queries and keys. They
      stay apart, because XLA's CPU backend (jaxlib 0.10.2) crashes in the
      gradient of decays that are shared along an axis of them.
    k_BHPK: the keys that they meet.
    log_decay_BHPK: <= 0, and -inf for a decay of 0. P is a power of 2.
    steps: in one of so many places the first of `rows` are not zero.
  """
  B, H, P, K = k_BHPK.shape
  assert P & (P - 1) == 0, P
  # U blocks of N (or M) places each; at first of one.
  upto_BHUNK = log_decay_BHPK[:, :, :, None]
  after_BHUNK = jnp.zeros_like(upto_BHUNK)
  met = [jnp.zeros((B, H, P, 1, 1)) for _ in rows]
  for n in (2 ** i for i in range(P.bit_length() - 1)):
    blocks = lambda x, n=n: _halves(x.reshape(B, H, -1, n, K))
    upto, later_upto = _halves(upto_BHUNK)
    after, later_after = _halves(after_BHUNK)
    keys = blocks(k_BHPK)[0] * jnp.exp(after)
    over = []
    for x, one_of in zip(rows, (steps, 1)):
      with layers.count_flops_as_useful_part(1, one_of):
        over.append(jnp.einsum('BHUNK,BHUMK->BHUNM',
                               blocks(x)[1] * jnp.exp(later_upto), keys))
    met = [_joined(*_halves(x), y) for x, y in zip(met, over)]
    upto_BHUNK = jnp.concatenate([upto, upto[..., -1:, :] + later_upto], 3)
    after_BHUNK = jnp.concatenate(
        [after + later_upto[..., -1:, :], later_after], 3)
  return [x[:, :, 0] for x in met], upto_BHUNK[:, :, 0], after_BHUNK[:, :, 0]


def _joined(met: jax.Array, later_met: jax.Array, over: jax.Array) -> jax.Array:
  """Returns a block of twice as many places: over its halves' border they meet
  by `over`."""
  return jnp.concatenate([
      jnp.concatenate([met, jnp.zeros_like(over)], -1),
      jnp.concatenate([over, later_met], -1)], -2)


def _halves(x_BHU: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns every other block: the earlier, and the later."""
  B, H, U, *rest = x_BHU.shape
  x_BHU = x_BHU.reshape(B, H, U // 2, 2, *rest)
  return x_BHU[:, :, :, 0], x_BHU[:, :, :, 1]


# The inverse of a triangular matrix whose diagonal is ones.

BAND = 32  # rows that `by_columns` solves for at a time


def inverse(a_PP: jax.Array) -> jax.Array:
  """Returns (I + A)^-1, [..., P, P].

  The product (I - A)(I + A^2)(I + A^4)..., which ends as A is nilpotent, is one
  of powers that cancel: of 64 keys alike with a rate near 2 no digit is left.

  Args:
    a_PP: [..., P, P]; what lies on the diagonal or above it is not read.
  """
  return jax.lax.platform_dependent(a_PP, cpu=by_columns, tpu=by_halves,
                                    default=solved)


def by_columns(a_PP: jax.Array) -> jax.Array:
  """Returns (I + A)^-1 on CPU: forward substitution, for all matrices at once.

  The rows are solved for in bands. Those before a band are taken away by a
  product, and those of the band one after another. XLA calls LAPACK for one
  matrix at a time, whose own threads wait for each other: on two cores, with
  256 matrices of 32 rows, a layer of Gated DeltaNet took 1.4 times as long.
  """
  *lead, P, _ = a_PP.shape
  lower = jnp.tri(P, k=-1, dtype=bool).reshape(*(1 for _ in lead), P, P)
  a_PP = jnp.where(lower, a_PP, 0)
  x = a_PP[..., :0, :0]  # the inverse of the rows before the band
  for start in range(0, P, BAND):
    block = a_PP[..., start:start + BAND, start:start + BAND]
    n = block.shape[-1]
    rows = jnp.concatenate(
        [-(a_PP[..., start:start + n, :start] @ x),
         jnp.broadcast_to(jnp.eye(n, dtype=block.dtype), block.shape)], -1)
    for i in range(n - 1):
      rows -= block[..., :, i:i + 1] * rows[..., i:i + 1, :]
    x = jnp.pad(x, (*((0, 0) for _ in lead), (0, 0), (0, n)))
    x = jnp.concatenate([x, rows], -2)
  return x


def by_halves(a_PP: jax.Array) -> jax.Array:
  """Returns (I + A)^-1 on TPU: blocks of 1, 2, 4, ... places join in twos,

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]],

  for all of them at once, in products of whole matrices. XLA's own solution has
  the leading axes in the lanes of a register, 128 of them: with two rows on a
  chip, [64, 2, 32, 64, 64] took 4 GiB where its numbers are 64 MiB. At the
  precision that TPUs have by default, the products would keep 8 bits.
  """
  P = a_PP.shape[-1]
  lead = (1,) * (a_PP.ndim - 2)
  x_PP = jnp.broadcast_to(jnp.eye(P, dtype=a_PP.dtype).reshape(*lead, P, P),
                          a_PP.shape)
  times = functools.partial(jnp.matmul, precision='highest')
  size = 1
  while size < P:
    block_P = np.arange(P) // size
    between_PP = (block_P[:, None] == block_P + 1) & (block_P % 2 == 0)
    b_PP = jnp.where(between_PP.reshape(*lead, P, P), a_PP, 0)
    x_PP -= b_PP if size == 1 else times(times(x_PP, b_PP), x_PP)
    size *= 2
  return x_PP


def solved(a_PP: jax.Array) -> jax.Array:
  """Returns (I + A)^-1 on GPU: by the library of the platform."""
  eye_PP = jnp.eye(a_PP.shape[-1], dtype=a_PP.dtype)
  return jax.lax.linalg.triangular_solve(
      a_PP, jnp.broadcast_to(eye_PP, a_PP.shape), left_side=True, lower=True,
      unit_diagonal=True)
