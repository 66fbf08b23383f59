"""Grouped feed-forward: rows sorted by expert, each through its own weights."""

import jax
import jax.numpy as jnp

from architectures.parts import ffn as dense


def ffn(rows_RD: jax.Array, count_E: jax.Array, w, kind: str,
        mask_RF=None) -> jax.Array:
  """FFN_e of each row; rows past the counts give zeros.

  Args:
    rows_RD: expert 0's rows, then expert 1's, ...; sum(count_E) <= R.
    count_E: int32, the rows of each expert.
    w: experts.Weights.
    kind: of the network, a name of ffn.ACTIVATIONS.
    mask_RF: multiplies the hidden units, for dropout.
  """
  act, gated = dense.ACTIVATIONS[kind]
  ends_E = jnp.cumsum(count_E)
  expert_R = jnp.searchsorted(ends_E, jnp.arange(rows_RD.shape[0]),
                              side='right')
  add = lambda x, b: x if b is None else x + b.at[expert_R].get(
      mode='fill', fill_value=0)
  product = lambda x, m: jax.lax.ragged_dot(x, m, count_E)
  h_RF = add(product(rows_RD, w.up_EDF), w.up_bias_EF)
  if gated:
    h_RF = act(add(product(rows_RD, w.gate_EDF), w.gate_bias_EF)) * h_RF
  else:
    h_RF = act(h_RF)
  if mask_RF is not None:
    h_RF = h_RF * mask_RF.astype(h_RF.dtype)
  return add(product(h_RF, w.down_EFD), w.down_bias_ED)
