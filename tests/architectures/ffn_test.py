"""The hidden units of each network are what its paper says, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from architectures.parts import ffn
from architectures.parts.config import ClampConfig

UP, GATE = np.random.default_rng(0).normal(size=(2, 40, 8)) * 6


def test_relu2_and_reglu_by_hand():
  up, gate = jnp.asarray(UP), jnp.asarray(GATE)
  np.testing.assert_allclose(ffn.Hidden('relu2')(up),
                             np.where(UP > 0, UP ** 2, 0), rtol=1e-5)
  np.testing.assert_allclose(ffn.Hidden('reglu')(up, gate),
                             np.where(GATE > 0, GATE * UP, 0), rtol=1e-5)


def test_clamped_swiglu_by_hand():
  alpha, limit = 1.3, 5.0
  assert GATE.max() > limit and min(UP.min(), GATE.min()) < -limit
  g, u = np.minimum(GATE, limit), np.clip(UP, -limit, limit)
  want = g / (1 + np.exp(-alpha * g)) * (u + 1)
  got = ffn.Hidden('swiglu_clamped', ClampConfig(alpha, limit))(
      jnp.asarray(UP), jnp.asarray(GATE))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('kind', ffn.FFNS)
def test_hidden_units_of_bfloat16_are_rounded_once(kind):
  """And so are their gradients."""
  hidden = ffn.Hidden(kind, ClampConfig(1.3, 5.0))
  narrow = [jnp.asarray(x, jnp.bfloat16) for x in (UP, GATE)]
  narrow = narrow[:1 + hidden.gated]
  wide = [x.astype(jnp.float32) for x in narrow]
  h, pull = jax.vjp(hidden, *narrow)
  want, pull_wide = jax.vjp(hidden, *wide)
  d = jnp.cos(want).astype(jnp.bfloat16)
  for got, exact in zip((h, *pull(d)), (want, *pull_wide(
      d.astype(jnp.float32)))):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))
