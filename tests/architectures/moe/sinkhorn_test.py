"""Sinkhorn's balance against the iteration written on the matrix itself."""

import jax.numpy as jnp
import numpy as np

from architectures.parts.moe import routing
from tests.architectures.moe.routing_test import (
    E, T, best, gates, inputs, route)


def sinkhorn_by_hand(logits, steps=8):
  """The iteration on the matrix itself, in float64."""
  tokens, experts = logits.shape
  m = np.exp(np.float64(logits))
  for _ in range(steps):
    m *= tokens / experts / m.sum(0, keepdims=True)
    m /= m.sum(1, keepdims=True)
  return m


def test_sinkhorn_is_the_iteration_of_each_group_without_its_padding():
  """A group of 12 tokens is balanced by itself, and padding weighs nothing:
  what stands in it does not matter."""
  logits = np.array(inputs(3).logits_TE) + np.array([[2.0, 0, 0, 0]])
  valid = np.ones(T, bool)
  valid[[3, 4, 13, 20, 23]] = False
  chosen = np.zeros((T, E), bool)
  for group in (np.arange(12), np.arange(12, 24)):
    rows = group[valid[group]]
    want = sinkhorn_by_hand(logits[rows])
    chosen[rows] = best(want, 2)
    padded = np.where(valid[group][:, None], logits[group], 9.0)
    got = np.exp(routing.balanced(jnp.array(padded, jnp.float32),
                                  jnp.array(valid[group])))
    np.testing.assert_allclose(got[valid[group]], want, rtol=1e-4)
  for filler in (-9.0, 9.0):
    padded = np.where(valid[:, None], logits, [[filler, 0, 0, 0]])
    _, r = route('sinkhorn', inputs(
        logits_TE=jnp.array(padded, jnp.float32), valid_T=jnp.array(valid),
        groups=2, train=True))
    np.testing.assert_array_equal(gates(r) > 0, chosen)
  alone = best(sinkhorn_by_hand(logits[valid]), 2)
  assert (alone != chosen[valid]).any()  # one group of all chooses otherwise
