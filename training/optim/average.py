"""The moving average of the parameters that optim.ema keeps beside them.

After update t, with the decay b, the average is (Kingma and Ba 2015, section
7.2, "Temporal averaging")

    m_t = b m_{t-1} + (1 - b) p_t,  m_0 = 0;     average_t = m_t / (1 - b^t).

What is kept is average_t itself, which moves by

    average_t = average_{t-1} + w_t (p_t - average_{t-1}),
    w_t = (1 - b) / (1 - b^t),

so that a checkpoint holds the parameters that are evaluated, and the sum of
the weights is 1 from the first update on (w_1 = 1). It is in float32, whatever
model.param_dtype is: at b = 0.999 a bfloat16 would not move. A parameter that
is not trained has no average, since it is its own. A step whose gradient is
not finite is no update.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from training.optim import shares


def start(optim: ml_collections.ConfigDict, parts: Any, params: Any):
  """Returns the average before the first update, a copy of the parameters;
  None where optim.ema is 0.

  Args:
    optim: config.optim.
    parts: the shares of the learning rate (training/optim/shares.py).
    params: all parameters.
  """
  if not optim.ema:
    return None
  return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True),
                      shares.trained(parts, params))


def update(optim: ml_collections.ConfigDict, average: Any, own: Any,
           updates: jax.Array, ok: jax.Array):
  """Returns the average after a step.

  Args:
    optim: config.optim.
    average: what it was before.
    own: the parameters that are trained, after the step.
    updates: t, how many updates there have been, this one included.
    ok: whether the step was an update.
  """
  if not optim.ema:
    return None
  # 1 - b^t without the digits that it would lose where b is nearly 1.
  whole = -jnp.expm1(updates.astype(jnp.float32) * math.log(optim.ema))
  weight = jnp.where(ok, (1 - optim.ema) / whole, 0.0)
  return jax.tree.map(lambda m, p: m + weight * (p.astype(jnp.float32) - m),
                      average, own)


def evaluated(parts: Any, average: Any, params: Any):
  """Returns the parameters that a run is evaluated with: the average, in the
  dtype of the parameters, or where there is none these themselves."""
  if average is None:
    return params
  cast = jax.tree.map(lambda m, p: m.astype(p.dtype), average,
                      shares.trained(parts, params))
  return shares.whole(parts, cast, params)
