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

# The points of a sweep: (name, changes of the base config by dotted field).
Points = Iterator[tuple[str, dict[str, Any]]]


def small_run_config(
    config: ml_collections.ConfigDict, steps: int, rows: int, length: int, *,
    every: int, batches: int = 16, lr: float = 4e-3, checkpoints: int = 1,
    **model: Any) -> ml_collections.ConfigDict:
  """Returns a config as a small run: the base of a sweep or a study.

  Args:
    config: the config, to be changed.
    steps, rows, length: the steps of its training, the rows of a batch, and the
      tokens of a row.
    every, batches: steps between two evaluations, and how long one is.
    lr: the highest learning rate; it rises in a tenth of the steps.
    checkpoints: how many are written.
    **model: fields of config.model.
  """
  config.model.update(model, max_len=length)
  config.data.update(length=length, batch_size=rows)
  config.train.steps = steps
  config.optim.update(lr=lr, warmup_steps=steps // 10)
  config.eval.update(every_steps=every, batches=batches)
  config.checkpoint.update(every_steps=steps // checkpoints, keep=1)
  return config


def small_gpt_config(steps: int, every: int = 0, batches: int = 16
                     ) -> ml_collections.ConfigDict:
  """Returns the base of most worked sweeps: GPT-2's wiring at 4 layers of width
  64, trained on 16 x 128 bytes a step.

  Args:
    steps: the steps of its training.
    every: steps between two evaluations; 0: a tenth of them all, often enough
      to fit a curve to.
    batches: how many batches an evaluation has.
  """
  return small_run_config(
      gpt.get_config('tiny'), steps=steps, rows=16, length=128, batches=batches,
      every=every or steps // 10, checkpoints=2, d_model=64)


def grid(values: Mapping[str, Sequence]) -> Points:
  """Yields every combination of the values of each field, the last field
  changing first; `values` has the values by the field's dotted name."""
  for combination in itertools.product(*values.values()):
    changes = dict(zip(values, combination))
    yield name_of_changes(changes), changes


def one_at_a_time(values: Mapping[str, Sequence]) -> Points:
  """Yields each value of each field alone, all else as in the base; `values`
  has the values by the field's dotted name."""
  for field, choices in values.items():
    for value in choices:
      yield name_of_changes({field: value}), {field: value}


def leave_one_out(changes: Mapping[str, Any]) -> Points:
  """Yields all changes together as `all`, then all but each one in turn."""
  yield 'all', dict(changes)
  for field_left_out in changes:
    others = dict(changes)
    del others[field_left_out]
    yield f'without_{_last_part(field_left_out)}', others


def ladder_of_sizes(
    widths: Sequence[int], depths: Sequence[int], steps: Sequence[int],
    lr: float, at: int) -> Points:
  """Yields every width at every depth, trained on every number of steps: the
  ladder of sizes, shapes and lengths that `tools.sweep fit` fits a law to.

  Args:
    widths: the values of model.d_model.
    depths: the values of model.num_layers.
    steps: the values of train.steps.
    lr: the learning rate of width `at`; it falls as the width grows, as muP
      has it.
    at: that width.
  """
  for depth, width, num_steps in itertools.product(depths, widths, steps):
    yield f'd{width}x{depth}-{num_steps}', {
        'model.d_model': width, 'model.num_layers': depth,
        'train.steps': num_steps, 'optim.lr': lr * at / width}


def name_of_changes(changes: Mapping[str, Any]) -> str:
  """Returns a name for changes of a config: `rmsnorm-lr=0.001` of
  {'model.norm': 'rmsnorm', 'optim.lr': 1e-3}."""
  words = []
  for field, value in changes.items():
    word = value
    if not isinstance(value, str):
      word = f'{_last_part(field)}={value}'
    # The name is that of a folder, too.
    words.append(re.sub(r'[^\w.=+]+', '_', word))
  return '-'.join(words)


def _last_part(field: str) -> str:
  """Returns the name of a field without those of its groups."""
  return field.rsplit('.', 1)[-1]
