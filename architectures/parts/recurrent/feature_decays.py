"""What the places of a piece are to one another where each feature of a key has
a decay of its own (GLA: Yang et al. 2023, arXiv 2312.06635; KDA: Kimi Team
2025, arXiv 2510.26692).

Two places meet in sum over k of x_ik P_ijk k_jk, where P_ijk is the decay of
feature k after place j up to i. A quotient of two cumulative decays gives P
too, but the one divided by may be 0, and a difference of cumulative logarithms
loses the digits of small decays after large ones. So a piece is halved, its
halves are halved, and so on to single places. Place i of a later half meets
place j of the earlier one over the border between them:

  P_ijk = (decay from the border up to i) x (decay after j up to the border)

Both factors are exponentials of a sum of logarithms that are <= 0, over places
that lie between i and j. Each half meets the other in one product of matrices,
and all products together have as many terms as the triangle of pairs has.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def paired(rows: Sequence[jax.Array], k_BHPK: jax.Array,
           log_decay_BHPK: jax.Array
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
    over = [jnp.einsum('BHUNK,BHUMK->BHUNM',
                       blocks(x)[1] * jnp.exp(later_upto), keys) for x in rows]
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
