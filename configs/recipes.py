"""What the configs of systems have in common: how each begins, and how a run of
its smallest size and of a published size is set."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from configs import base
from configs.errors import one_of


def begin(size: str, sizes: Mapping[str, Any], **parts: Any
          ) -> ml_collections.ConfigDict:
  """Returns the config of a system before its training is set.

  Args:
    size: the ':size' argument, a key of `sizes`.
    sizes: the fields of config.model that a size has, by its name.
    **parts: those that all sizes have.
  """
  one_of('size', size, sizes)
  c = base.base()
  c.model.update(parts)
  c.model.update(sizes[size])
  c.data.length = c.model.max_len
  return c


def tiny(c: ml_collections.ConfigDict, batch_size: int = 16, steps: int = 300,
         lr: float = 3e-3, warmup_steps: int = 30
         ) -> ml_collections.ConfigDict:
  """Sets a run of minutes on one CPU core."""
  c.data.batch_size, c.train.steps = batch_size, steps
  c.optim.update(lr=lr, warmup_steps=warmup_steps)
  return c


def pretraining(c: ml_collections.ConfigDict, *, batch_size: int, steps: int,
                lr: float, warmup_steps: int = 2000, length: int = 0,
                remat: str = 'full', **optim: Any) -> ml_collections.ConfigDict:
  """Sets a run of a published size, in bfloat16.

  Args:
    c: the config.
    batch_size: sequences in a batch.
    steps: the last step.
    lr: the highest learning rate.
    warmup_steps: steps in which the learning rate rises to it.
    length: tokens in a sequence; 0: the model's max_len.
    remat: config.model.remat.
    **optim: further fields of config.optim.
  """
  c.model.update(dtype='bfloat16', remat=remat)
  c.data.update(length=length or c.data.length, batch_size=batch_size)
  c.train.steps = steps
  c.optim.update(lr=lr, warmup_steps=warmup_steps, **optim)
  return c
