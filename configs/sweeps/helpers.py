"""The loops that most sweeps are: each yields (name, changes) for `add`.

    for name, changes in helpers.grid({'model.norm': ('layernorm', 'rmsnorm'),
                                       'optim.lr': (1e-3, 2e-3)}):
      add(name, **changes)
"""

from collections.abc import Iterator, Mapping, Sequence
import itertools
import re
from typing import Any

import ml_collections

from configs import gpt

Points = Iterator[tuple[str, dict[str, Any]]]


def small_run_config(
    c: ml_collections.ConfigDict, steps: int, rows: int, length: int, *,
    every: int, batches: int = 16, lr: float = 4e-3, checkpoints: int = 1,
    **model: Any) -> ml_collections.ConfigDict:
  """Returns a config as a small run: the base of a sweep or a study.

  Args:
    c: the config.
    steps, rows, length: of its training.
    every, batches: steps between two evaluations, and how long one is.
    lr: the highest learning rate; it rises in a tenth of the steps.
    checkpoints: how many are written.
    **model: fields of config.model.
  """
  c.model.update(model, max_len=length)
  c.data.update(length=length, batch_size=rows)
  c.train.steps = steps
  c.optim.update(lr=lr, warmup_steps=steps // 10)
  c.eval.update(every_steps=every, batches=batches)
  c.checkpoint.update(every_steps=steps // checkpoints, keep=1)
  return c


def small_gpt_config(steps: int, every: int = 0, batches: int = 16
                     ) -> ml_collections.ConfigDict:
  """The base of most worked sweeps: GPT-2's wiring at 4 layers of width 64,
  trained on 16 x 128 bytes a step; its evaluations are often enough to fit a
  curve to."""
  return small_run_config(
      gpt.get_config('tiny'), steps, 16, 128, batches=batches,
      every=every or steps // 10, checkpoints=2, d_model=64)


def grid(values: Mapping[str, Sequence]) -> Points:
  """Every combination of the values of each key, the last changing first."""
  pairs = [[(key, value) for value in choices]
           for key, choices in values.items()]
  for combination in itertools.product(*pairs):
    yield name_of_changes(dict(combination)), dict(combination)


def one_at_a_time(values: Mapping[str, Sequence]) -> Points:
  """Each value of each key alone, all else as in the base."""
  for key, choices in values.items():
    for value in choices:
      yield name_of_changes({key: value}), {key: value}


def leave_one_out(changes: Mapping[str, Any]) -> Points:
  """All changes together as `all`, then all but each one in turn."""
  yield 'all', dict(changes)
  for left in changes:
    yield f'without_{_last_part(left)}', {
        key: value for key, value in changes.items() if key != left}


def ladder_of_sizes(
    widths: Sequence[int], depths: Sequence[int], steps: Sequence[int],
    lr: float, at: int) -> Points:
  """Every width at every depth, trained on every number of steps: the ladder
  of sizes, shapes and lengths that `tools.sweep fit` fits a law to.

  Args:
    widths: of model.d_model.
    depths: of model.num_layers.
    steps: of train.steps.
    lr: the learning rate of width `at`; it falls as the width grows, as muP
      has it.
  """
  for depth, width, length in itertools.product(depths, widths, steps):
    yield f'd{width}x{depth}-{length}', {
        'model.d_model': width, 'model.num_layers': depth,
        'train.steps': length, 'optim.lr': lr * at / width}


def name_of_changes(changes: Mapping[str, Any]) -> str:
  """Returns `rmsnorm-lr=0.001` of {'model.norm': 'rmsnorm', 'optim.lr': 1e-3}.
  """
  words = [value if isinstance(value, str) else f'{_last_part(key)}={value}'
           for key, value in changes.items()]
  return '-'.join(re.sub(r'[^\w.=+]+', '_', word) for word in words)


def _last_part(key: str) -> str:
  return key.rsplit('.', 1)[-1]
