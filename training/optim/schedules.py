"""Learning-rate schedules: a warm-up, then the shape that a config names.

At update t (the first is t = 1) of T the rate is
  lr * min(t / warmup_steps, shape(t)),
and stays at shape(T) from there on. The shape is 1 until the warm-up ends, so
the two parts meet. Cosine, linear and wsd arrive at final_fraction at t = T,
cosine and linear at t = decay_steps where that is set. An entry of SCHEDULES is
all that there is of one.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from configs import base as base_config
from configs.errors import RequestError, one_of, require


def _cosine(t: jax.Array, steps: int, optim: ml_collections.ConfigDict):
  """SGDR (Loshchilov and Hutter 2017, equation 5), without restarts."""
  low = optim.final_fraction
  progress = _progress(t, optim.warmup_steps, steps)
  return low + (1 - low) * 0.5 * (1 + jnp.cos(math.pi * progress))


def _linear(t: jax.Array, steps: int, optim: ml_collections.ConfigDict):
  progress = _progress(t, optim.warmup_steps, steps)
  return 1 - (1 - optim.final_fraction) * progress


def _rsqrt(t: jax.Array, steps: int, optim: ml_collections.ConfigDict):
  """1 / sqrt(t), scaled to 1 where the warm-up ends (Vaswani et al. 2017)."""
  del steps
  return jnp.minimum(1.0, jnp.sqrt(jnp.maximum(optim.warmup_steps, 1) / t))


def _wsd(t: jax.Array, steps: int, optim: ml_collections.ConfigDict):
  """Warm-up, stable, decay (Hu et al. 2024): linear over the last share."""
  start = steps - round(optim.decay_fraction * steps)
  return 1 - (1 - optim.final_fraction) * _progress(t, start, steps)


def _constant(t: jax.Array, steps: int, optim: ml_collections.ConfigDict):
  del steps, optim
  return jnp.ones_like(t)


class Schedule(NamedTuple):
  """One schedule.

  Attributes:
    shape: (updates done + 1, T, config.optim) -> the share of optim.lr.
    reads: the fields of config.optim that it reads and others may not; another
      one set is refused, not ignored.
  """
  shape: Callable[..., jax.Array]
  reads: tuple[str, ...] = ()


SCHEDULES = {
    'cosine': Schedule(_cosine, ('final_fraction', 'decay_steps')),
    'linear': Schedule(_linear, ('final_fraction', 'decay_steps')),
    'rsqrt': Schedule(_rsqrt),
    'wsd': Schedule(_wsd, ('final_fraction', 'decay_fraction')),
    'constant': Schedule(_constant),
}


def rate(optim: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the number of updates done.
  optim.lr and optim.warmup_steps may be traced, as where several runs train as
  one program (training/vectorised.py).

  Args:
    optim: config.optim.
    steps: T, the run's train.steps.
  """
  shape = SCHEDULES[optim.schedule].shape
  steps = optim.decay_steps or steps

  def schedule(count: jax.Array):
    t = jnp.asarray(count, jnp.float32) + 1
    warm = t / jnp.maximum(optim.warmup_steps, 1)  # never < 1 without one
    return optim.lr * jnp.minimum(shape(t, steps, optim), warm)

  return schedule


def check_schedule(optim: ml_collections.ConfigDict) -> None:
  """Raises ValueError for a schedule field that cannot be honoured."""
  one_of('optim.schedule', optim.schedule, SCHEDULES)
  require(optim.decay_steps == 0 or optim.decay_steps > optim.warmup_steps,
          f'optim.decay_steps is {optim.decay_steps} and optim.warmup_steps '
          f'{optim.warmup_steps}: choose more than these, or 0 for train.steps')
  refuse_unread(optim, 'schedule', SCHEDULES)


def refuse_unread(optim: ml_collections.ConfigDict, selector: str,
                  table: Mapping[str, Any]) -> None:
  """Raises RequestError for a field that an entry of the table reads and the
  chosen one does not, and that was set.

  A field counts as set where it differs from the default of configs/base.py.
  """
  defaults = base_config.base().optim
  choice = optim[selector]
  for field in sorted({f for row in table.values() for f in row.reads}):
    if field in table[choice].reads or optim[field] == defaults[field]:
      continue
    readers = ', '.join(n for n, row in table.items() if field in row.reads)
    raise RequestError(
        f'optim.{field} is {optim[field]}, which optim.{selector} {choice!r} '
        f'does not read (it is read by {readers}): leave it at '
        f'{defaults[field]}, or choose one of these')


def _progress(t: jax.Array, start: float, end: float):
  """How far t is from start to end, in [0, 1]."""
  return jnp.clip((t - start) / jnp.maximum(end - start, 1), 0.0, 1.0)
