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

# A logarithm in place of -inf, whose exponential is 0 as well.
LOG_OF_ZERO = -1e30


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
  rate_BLH: Optional[jax.Array] = None  # None: 1, or no delta rule
  # A correction reads the state by this; None: by the key.
  erase_BLJK: Optional[jax.Array] = None
  # A correction reads the state as it was before its decay, times this (0 where
  # a document begins); None: it reads the decayed state.
  undecayed_BL1: Optional[jax.Array] = None

  @property
  def has_delta_rule(self) -> bool:
    """Whether what is written corrects what the state has."""
    return self.rate_BLH is not None or self.erase_BLJK is not None

  @property
  def steps(self) -> int:
    """The number of steps of a token."""
    return self.k_BLJK.shape[1] // self.q_BLJK.shape[1]


def cut_row_into_pieces(places: int, x_BL: jax.Array) -> jax.Array:
  """Cuts rows into pieces of equal length for a chunked recurrence, in float32.

  The last piece is filled up with zeros. They do no harm: a place of zeros
  writes nothing to the state, and the logarithm 0 is a decay of 1.

  Args:
    places: P, how many places (steps of the recurrence) a piece has.
    x_BL: the rows, [B rows, L places, ...].

  Returns:
    The pieces, [pieces, B, P, ...].
  """
  B, L, *rest = x_BL.shape
  missing = -L % places
  no_padding = [(0, 0)] * len(rest)
  padded = jnp.pad(x_BL.astype(jnp.float32),
                   ((0, 0), (0, missing), *no_padding))
  return jnp.moveaxis(padded.reshape(B, -1, places, *rest), 1, 0)


def count_flops_without_padding(places: int, length: int):
  """Returns a scope, for a `with` statement, in which the pieces of a row
  count the FLOPs of the row alone, without what fills up the last piece.

  Args:
    places: how many places a piece has.
    length: how many places the row has.
  """
  places_with_padding = length + -length % places
  return layers.count_flops_as_useful_part(length, places_with_padding)


def cut_heads_into_pieces(places: int, x_BLH: jax.Array) -> jax.Array:
  """Cuts rows of heads into pieces as `cut_row_into_pieces` does, with heads
  before places: [B, L, H, ...] -> float32 [pieces, B, H, P, ...]."""
  return jnp.swapaxes(cut_row_into_pieces(places, x_BLH), 2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def map_pieces_in_groups(function: Callable[[Any], Any], max_pieces: int, x: Any
                         ) -> Any:
  """Applies a function to all pieces of rows, a group of pieces at a time. So
  the function's intermediate results take little memory. The backward pass
  computes them again.

  This is not jax.lax.map over groups, because with it libtpu (0.0.50 and
  0.0.52) aborts with "Cannot find a valid window". Instead, each group is cut
  out of the arrays and given to the function as [B * pieces, ...], which is how
  XLA keeps it in memory.

  Args:
    function: a function of arrays [B, ...], whose rows do not depend on each
      other.
    max_pieces: how many pieces a group has at most. All groups have the same
      size, so the last one may begin with some pieces of the group before it.
    x: the function's argument, arrays [pieces, B rows, ...].

  Returns:
    The function's result for all pieces, arrays [pieces, B, ...].
  """
  return _map_groups(functools.partial(_apply_to_rows, function), max_pieces, x)


def _map_groups(function: Callable[[Any], Any], max_pieces: int, x: Any) -> Any:
  """Applies a function to groups of pieces, one group after another.

  Args:
    function: a function of arrays [pieces, B rows, ...], in which pieces do not
      depend on each other.
    max_pieces: how many pieces a group has at most.
    x: the function's argument for all pieces, a tree of such arrays.

  Returns:
    The function's result for all pieces.
  """
  # Take as few groups as possible. All must have the same size, since a loop on
  # the device has arrays of one shape.
  num_pieces = jax.tree.leaves(x)[0].shape[0]
  num_groups = -(-num_pieces // max_pieces)
  if num_groups == 1:
    return function(x)
  size = -(-num_pieces // num_groups)

  def add_group(i: jax.Array, results: Any) -> Any:
    """Returns the results with those of group i written into them."""
    start = i * size
    results_of_group = function(_read_pieces(x, start=start, size=size))
    return _write_pieces(results, pieces=results_of_group, start=start)

  # The loop begins with zeros in the shape of the results of all pieces.
  first_group = _read_pieces(x, start=0, size=size)
  shapes_of_group = jax.eval_shape(function, first_group)
  empty = _zeros_of_pieces(shapes_of_group, num_pieces)
  return jax.lax.fori_loop(0, num_groups, add_group, empty)


def _read_pieces(x: Any, start: jax.Array | int, size: int) -> Any:
  """Returns `size` pieces of each array of a tree. Where these would reach past
  the end, they are the last ones: a dynamic slice begins earlier then."""
  def read(array: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(
        array, start_index=start, slice_size=size)

  return jax.tree.map(read, x)


def _write_pieces(x: Any, pieces: Any, start: jax.Array | int) -> Any:
  """Returns the arrays of a tree with some pieces replaced, those which
  `_read_pieces` reads from there."""
  def write(array: jax.Array, new: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(
        array, update=new, start_index=start, axis=0)

  return jax.tree.map(write, x, pieces)


def _zeros_of_pieces(shapes: Any, num_pieces: int) -> Any:
  """Returns zeros for `num_pieces` pieces, by the shapes of fewer pieces."""
  def zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros((num_pieces, *shape.shape[1:]), shape.dtype)

  return jax.tree.map(zeros, shapes)


def _apply_to_rows(function: Callable[[Any], Any], x: Any) -> Any:
  """Applies a function of rows, arrays [B * pieces, ...], to the pieces of
  rows, arrays [pieces, B, ...], and returns its result as such arrays."""
  num_pieces, B = jax.tree.leaves(x)[0].shape[:2]

  def merge_pieces_into_rows(y: jax.Array) -> jax.Array:
    """[pieces, B, ...] -> [B, pieces, ...] -> [B * pieces, ...]."""
    by_row = jnp.swapaxes(y, 0, 1)
    return by_row.reshape(B * num_pieces, *y.shape[2:])

  def split_rows_into_pieces(y: jax.Array) -> jax.Array:
    """[B * pieces, ...] -> [B, pieces, ...] -> [pieces, B, ...]."""
    by_row = y.reshape(B, num_pieces, *y.shape[1:])
    return jnp.swapaxes(by_row, 0, 1)

  result = function(jax.tree.map(merge_pieces_into_rows, x))
  return jax.tree.map(split_rows_into_pieces, result)


def _map_pieces_forward(function: Callable[[Any], Any], max_pieces: int,
                        x: Any):
  """Keeps the argument alone for the backward pass."""
  return map_pieces_in_groups(function, max_pieces, x), x


def _map_pieces_backward(function: Callable[[Any], Any], max_pieces: int,
                         x: Any, d_result: Any) -> Any:
  """Computes the gradient of `map_pieces_in_groups`, which applied a function
  to the pieces of rows, a group of pieces at a time. The gradient is computed
  in the same groups, each of which goes through the function again, so that no
  intermediate results of all pieces are in memory at once.

  Args:
    function: the function of arrays [B rows, ...] that was applied.
    max_pieces: how many pieces a group has at most.
    x: the function's argument, arrays [pieces, B, ...].
    d_result: the gradient of its result, arrays [pieces, B, ...].

  Returns:
    The gradient of x.
  """
  apply_to_group = functools.partial(_apply_to_rows, function)

  def gradient_of_group(x_and_d_result: tuple[Any, Any]) -> Any:
    """Returns the gradient of x for a group, a tuple of one, by the group's
    part of x and of the result's gradient."""
    x_of_group, d_result_of_group = x_and_d_result
    _, backward = jax.vjp(apply_to_group, x_of_group)
    return backward(d_result_of_group)

  return _map_groups(gradient_of_group, max_pieces, (x, d_result))


map_pieces_in_groups.defvjp(_map_pieces_forward, _map_pieces_backward)


def decays_within_piece(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes how far a recurrence's state decays between any two places (steps)
  of a piece of P places.

  Args:
    log_decay: the logarithm of the decay at each place, [..., P].

  Returns:
    The product of the decays after place j up to place i, [..., i, j], which is
    0 where j is later than i; and the product of the decays from the start of
    the piece up to place i, [..., i].
  """
  # Logarithms are added up, and not decays multiplied. An infinite one is
  # replaced by a number whose exponential is 0 as well.
  sums = layers.count_flops_by_result(_sums_between_places, 0)
  between, upto = sums(jnp.maximum(log_decay, LOG_OF_ZERO))
  decay_between = jnp.where(_lower_triangle(log_decay), jnp.exp(between), 0)
  return decay_between, jnp.exp(upto)


def _lower_triangle(log_decay: jax.Array) -> jax.Array:
  """Returns a mask of the pairs of places (i, j) with j <= i, [1, ..., P, P],
  for an array [..., P]."""
  P = log_decay.shape[-1]
  leading = (1,) * (log_decay.ndim - 1)
  return jnp.tri(P, dtype=bool).reshape(*leading, P, P)


def _sums_between_places(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the sums over the places after j up to i, [..., i, j], and those up
  to i, [..., i]. As a product with a triangle of ones, on CPU it takes a third
  of the time of jnp.cumsum."""
  P = log_decay.shape[-1]
  upto = jnp.where(_lower_triangle(log_decay), log_decay[..., None, :], 0)
  between = jnp.einsum('...im,mj->...ij', upto, jnp.tri(P, k=-1),
                       precision='highest')
  return between, upto.sum(-1)


def meet_earlier_places(rows: Sequence[jax.Array], k_BHPK: jax.Array,
                        log_decay_BHPK: jax.Array, steps: int = 1
                        ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
  """Multiplies vectors of each place of a piece with the decayed keys of the
  places before it, where each feature of a key has a decay of its own.

  The piece is halved again and again (see the top of this file). From single
  places upwards, blocks of n places join in twos, and the later one of two
  meets the earlier one in one product over the border between them.

  Args:
    rows: vectors of each place, [B, H, P, K], such as queries and keys. They
      stay apart, because XLA's CPU backend (jaxlib 0.10.2) crashes in the
      gradient of decays that are shared along an axis of them.
    k_BHPK: the keys that they meet.
    log_decay_BHPK: the logarithms of the decays, <= 0, and -inf for a decay of
      0. P is a power of 2.
    steps: in one of so many places the first of `rows` are not zero.

  Returns:
    For each of `rows` the products of place i with the key of place j, [B, H,
    i, j], 0 where j is not before i; and the logarithms of the decay of the
    piece up to each place, and of that after it, [B, H, P, K].
  """
  B, H, P, K = k_BHPK.shape
  assert P & (P - 1) == 0, P
  # Blocks U of N (or M) places each; at first of one place.
  upto_BHUNK = log_decay_BHPK[:, :, :, None]
  after_BHUNK = jnp.zeros_like(upto_BHUNK)
  products = [jnp.zeros((B, H, P, 1, 1)) for _ in rows]

  for power in range(P.bit_length() - 1):
    size = 2 ** power

    def blocks(x_BHPK: jax.Array, size: int = size):
      return _split_every_other(x_BHPK.reshape(B, H, -1, size, K))

    # The decays within both halves, and the keys as they are at the border.
    upto, later_upto = _split_every_other(upto_BHUNK)
    after, later_after = _split_every_other(after_BHUNK)
    earlier_keys, _ = blocks(k_BHPK)
    keys_at_border = earlier_keys * jnp.exp(after)

    # The later half meets the earlier one over the border.
    joined = []
    for x, within, one_of in zip(rows, products, (steps, 1)):
      _, later_rows = blocks(x)
      with layers.count_flops_as_useful_part(1, one_of):
        over_border = jnp.einsum('BHUNK,BHUMK->BHUNM',
                                 later_rows * jnp.exp(later_upto),
                                 keys_at_border)
      earlier, later = _split_every_other(within)
      joined.append(_join_halves(earlier, later, over_border))
    products = joined

    # The decays of the joined block, up to each place and after it.
    upto_BHUNK = jnp.concatenate([upto, upto[..., -1:, :] + later_upto], 3)
    after_BHUNK = jnp.concatenate(
        [after + later_upto[..., -1:, :], later_after], 3)

  # One block is left: the piece.
  products = [x[:, :, 0] for x in products]
  return products, upto_BHUNK[:, :, 0], after_BHUNK[:, :, 0]


def _join_halves(earlier: jax.Array, later: jax.Array, over_border: jax.Array
                 ) -> jax.Array:
  """Returns the products of the places of a block, [[earlier, 0], [over_border,
  later]], by those of its two halves, [..., N, N] each, and those over the
  border between them."""
  upper = jnp.concatenate([earlier, jnp.zeros_like(over_border)], -1)
  lower = jnp.concatenate([over_border, later], -1)
  return jnp.concatenate([upper, lower], -2)


def _split_every_other(x_BHU: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns every other block, [B, H, U / 2, ...]: the earlier one of each two,
  and the later one."""
  B, H, U, *rest = x_BHU.shape
  pairs = x_BHU.reshape(B, H, U // 2, 2, *rest)
  return pairs[:, :, :, 0], pairs[:, :, :, 1]


# The inverse of a triangular matrix whose diagonal is ones.

ROWS_OF_BAND = 32  # rows that `invert_by_substitution` solves for at a time


def invert_unit_triangular(a_PP: jax.Array) -> jax.Array:
  """Inverts matrices I + A, where A is strictly lower triangular. The platform
  decides how: by substitution on CPU, by blocks on TPU, else by XLA's solver.

  The well-known product (I - A)(I + A^2)(I + A^4)... is not used, because its
  terms are large and cancel: with 64 equal keys and a rate near 2, the delta
  rule's matrix loses all digits.

  Args:
    a_PP: the matrices A, [..., P rows, P columns]. Numbers on the diagonal or
      above it are not read.

  Returns:
    (I + A)^-1, [..., P, P].
  """
  return jax.lax.platform_dependent(
      a_PP, cpu=invert_by_substitution, tpu=invert_by_blocks,
      default=invert_by_library)


def invert_by_substitution(a_PP: jax.Array) -> jax.Array:
  """Inverts matrices I + A on CPU by forward substitution, all matrices at
  once. A is strictly lower triangular.

  The rows of the inverse are computed in bands. In a band, the rows of earlier
  bands are subtracted by one product, and the rows of the band itself one after
  another. XLA's own solver calls LAPACK for one matrix at a time, which is
  slower: on two cores, with 256 matrices of 32 rows, a layer of Gated DeltaNet
  took 1.4 times as long.

  Args:
    a_PP: the matrices A, [..., P, P]. Numbers on the diagonal or above it are
      not read.

  Returns:
    (I + A)^-1, [..., P, P].
  """
  # Clear what must not be read.
  *lead, P, _ = a_PP.shape
  below_diagonal = jnp.tri(P, k=-1, dtype=bool)
  below_diagonal = below_diagonal.reshape(*(1 for _ in lead), P, P)
  a_PP = jnp.where(below_diagonal, a_PP, 0)

  inverse = a_PP[..., :0, :0]  # the rows before the band: none yet
  for start in range(0, P, ROWS_OF_BAND):
    block = a_PP[..., start:start + ROWS_OF_BAND, start:start + ROWS_OF_BAND]
    size = block.shape[-1]

    # Subtract the rows before the band.
    before_band = a_PP[..., start:start + size, :start]
    eye = jnp.broadcast_to(jnp.eye(size, dtype=block.dtype), block.shape)
    rows = jnp.concatenate([-(before_band @ inverse), eye], -1)

    # Subtract each row of the band from the rows after it. The rows up to i
    # stay as they are, since A is 0 there.
    for i in range(size - 1):
      rows -= block[..., :, i:i + 1] * rows[..., i:i + 1, :]

    # Append the band: the rows before it get zeros in its columns.
    no_padding = [(0, 0)] * len(lead)
    inverse = jnp.pad(inverse, (*no_padding, (0, 0), (0, size)))
    inverse = jnp.concatenate([inverse, rows], -2)
  return inverse


def invert_by_blocks(a_PP: jax.Array) -> jax.Array:
  """Inverts matrices I + A on TPU, where A is strictly lower triangular. From
  diagonal blocks of size 1, 2, 4, ... on, each two neighbouring blocks join:

    [[M, 0], [B, N]]^-1 = [[M^-1, 0], [-N^-1 B M^-1, N^-1]]

  All blocks of a size join at once, by products of whole matrices. XLA's own
  solver is not used, because it pads the leading axes to the 128 lanes of a
  register: [64, 2, 32, 64, 64] took 4 GiB, and its numbers are 64 MiB.

  Args:
    a_PP: the matrices A, [..., P, P]. Numbers on the diagonal or above it are
      not read.

  Returns:
    (I + A)^-1, [..., P, P].
  """
  P = a_PP.shape[-1]
  lead = (1,) * (a_PP.ndim - 2)
  eye_PP = jnp.eye(P, dtype=a_PP.dtype).reshape(*lead, P, P)
  inverse_PP = jnp.broadcast_to(eye_PP, a_PP.shape)
  # At their default precision, TPUs would keep 8 bits of the products.
  matmul = functools.partial(jnp.matmul, precision='highest')
  size = 1
  while size < P:
    # Take the block B of each two blocks that join. Its columns belong to the
    # earlier block, which has an even number, and its rows to the next block.
    block_P = np.arange(P) // size
    is_next_PP = block_P[:, None] == block_P + 1
    is_between_PP = is_next_PP & (block_P % 2 == 0)
    b_PP = jnp.where(is_between_PP.reshape(*lead, P, P), a_PP, 0)

    # Blocks of size 1 have the inverse 1, so nothing is multiplied yet.
    if size == 1:
      inverse_PP -= b_PP
    else:
      inverse_PP -= matmul(matmul(inverse_PP, b_PP), inverse_PP)
    size *= 2
  return inverse_PP


def invert_by_library(a_PP: jax.Array) -> jax.Array:
  """Returns (I + A)^-1 on GPU: by the library of the platform. What lies on the
  diagonal of A, [..., P, P], or above it is not read."""
  eye_PP = jnp.eye(a_PP.shape[-1], dtype=a_PP.dtype)
  return jax.lax.linalg.triangular_solve(
      a_PP, jnp.broadcast_to(eye_PP, a_PP.shape), left_side=True, lower=True,
      unit_diagonal=True)


def invert_system(a_BHPQ: jax.Array) -> jax.Array:
  """Returns (I + A)^-1, where A is what lies below the diagonal. It counts as
  substitution, in which an entry d places below the diagonal is a sum of d - 1
  products and of A's entry."""
  P = a_BHPQ.shape[-1]
  with layers.count_flops_as_useful_part(1, 1):
    invert = layers.count_flops_by_result(
        invert_unit_triangular, (P - 1) * (P - 2), 3 * P)
    return invert(a_BHPQ)
