"""How many rows each batch has: data.batch_size, or fewer at first.

data.batch_ramp is a text such as '100:8,300:16': batches of 8 rows until step
100, of 16 until step 300, and of data.batch_size from there on. Batch n is a
pure function of (seed, n) still, since the rows before it are: row g of the
order of a run is in one batch alone, whatever the sizes are. Each size is a
compiled program, so that there are few.
"""

from collections.abc import Mapping
import dataclasses
import functools

import ml_collections
import numpy as np

from configs.errors import require

MOST = 15  # sizes beside data.batch_size


@dataclasses.dataclass(frozen=True)
class Ramp:
  """The sizes of a run's batches.

  Attributes:
    until: the steps at which the sizes change, ascending.
    sizes: the rows of a batch before each of these, ascending.
    last: data.batch_size, from the last of them on.
  """
  until: tuple[int, ...]
  sizes: tuple[int, ...]
  last: int

  def rows(self, n: int) -> int:
    """Returns the rows of batch n."""
    return int((*self.sizes, self.last)[
        int(np.searchsorted(self.until, n, side='right'))])

  def before(self, n):
    """Returns the rows of all batches before batch n, which may be an array."""
    n, start, total = np.asarray(n), 0, 0
    for until, size in zip(self.until, self.sizes):
      total = total + size * np.clip(n - start, 0, until - start)
      start = until
    return total + self.last * np.clip(n - start, 0, None)


def of(config: ml_collections.ConfigDict) -> Ramp:
  """Returns the ramp of a run.

  Raises:
    RequestError: a sentence, for a data.batch_ramp that is none.
  """
  return parse(config.data.batch_ramp, config.data.batch_size)


@functools.lru_cache(maxsize=64)
def parse(text: str, batch_size: int) -> Ramp:
  """Returns the ramp of a text; '': none."""
  if not text:
    return Ramp((), (), batch_size)
  try:
    until, sizes = zip(*(map(int, stage.split(':'))
                         for stage in text.split(',')))
  except ValueError:
    until, sizes = (0,), ()
  require(len(until) <= MOST and all(
      a < b for values in ((0, *until), (0, *sizes, batch_size))
      for a, b in zip(values, values[1:])), f'data.batch_ramp is {text!r}: '
          "write STEP:ROWS with commas between, such as '100:8,300:16', at "
          f'most {MOST}; the steps must rise from 1 on, and the rows too, to '
          f'less than data.batch_size {batch_size}')
  return Ramp(until, sizes, batch_size)


def scaled(text: str, steps: int, short: int) -> str:
  """Returns the ramp of a run of `steps` steps for one of `short`; a size that
  no batch would have is left out."""
  stages: dict[int, str] = {}
  for stage in text.split(','):
    step, size = stage.split(':')
    stages[int(step) * short // steps] = size
  return ','.join(f'{step}:{size}' for step, size in stages.items() if step)


def check(config: ml_collections.ConfigDict) -> None:
  """Raises RequestError for a ramp that the run could not honour."""
  ramp, steps = of(config), config.train.steps
  require(not ramp.until or ramp.until[-1] < steps, 'data.batch_ramp is '
          f'{config.data.batch_ramp!r}, and train.steps is {steps}: it must '
          'end before, or data.batch_size would not be read')


def check_shards(config: ml_collections.ConfigDict, shape: Mapping[str, int]
                 ) -> None:
  """Raises RequestError for a size that the devices do not divide.

  Args:
    config: a run's.
    shape: the size of each mesh axis.
  """
  shards = (shape['data'] * shape['fsdp'] * shape['expert']
            * config.train.grad_accumulation)
  for size in of(config).sizes:
    require(size % shards == 0, 'data.batch_ramp is '
            f'{config.data.batch_ramp!r}, whose batches of {size} rows the '
            'batch shards of mesh.data x mesh.fsdp x mesh.expert times '
            f'train.grad_accumulation, {shards} in all, do not divide: choose '
            f'multiples of {shards}')
