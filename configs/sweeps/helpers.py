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
    config: ml_collections.ConfigDict, steps: int, batch_size: int,
    length: int, *, eval_every: int, eval_batches: int = 16, lr: float = 4e-3,
    num_checkpoints: int = 1, **model_fields: Any) -> ml_collections.ConfigDict:
  """Turns a config into that of a small run, on which a sweep or a study is
  based. The config itself is changed, and returned.

  Args:
    config: the config to change.
    steps: the number of training steps.
    batch_size: the number of rows in a batch.
    length: the number of tokens in a row.
    eval_every: the number of steps between two evaluations.
    eval_batches: the number of batches of one evaluation.
    lr: the highest learning rate.
    num_checkpoints: the number of checkpoints that are written.
    **model_fields: fields of config.model, by name.
  """
  # The model and its data.
  config.model.update(model_fields, max_len=length)
  config.data.update(length=length, batch_size=batch_size)

  # The training. The learning rate rises during the first tenth of the steps.
  config.train.steps = steps
  config.optim.update(lr=lr, warmup_steps=steps // 10)

  # Evaluations and checkpoints. Only the newest checkpoint is kept.
  config.eval.update(every_steps=eval_every, batches=eval_batches)
  config.checkpoint.update(every_steps=steps // num_checkpoints, keep=1)
  return config


def small_gpt_config(steps: int, eval_every: int = 0, eval_batches: int = 16
                     ) -> ml_collections.ConfigDict:
  """Returns the config of a small GPT-2, on which most of the example sweeps
  are based: 4 layers of width 64, trained on 16 rows of 128 bytes a step.

  Args:
    steps: the number of training steps.
    eval_every: the number of steps between two evaluations. 0 stands for a
      tenth of all steps, which is often enough to fit a curve to.
    eval_batches: the number of batches of one evaluation.
  """
  return small_run_config(
      gpt.get_config('tiny'), steps=steps, batch_size=16, length=128,
      eval_every=eval_every or steps // 10, eval_batches=eval_batches,
      num_checkpoints=2, d_model=64)


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
    base_lr: float, base_width: int) -> Points:
  """Yields a point of a sweep (a name, and the fields of the config that it
  changes) for every width at every depth, trained for every number of steps.
  `tools.sweep fit` fits a scaling law to such a ladder of runs.

  The learning rate of a width is base_lr * base_width / width, which is how
  muP scales that of hidden matrices in Adam (Yang et al. 2022, arXiv
  2203.03466, table 8).

  Args:
    widths: the values of model.d_model.
    depths: the values of model.num_layers.
    steps: the values of train.steps.
    base_lr: the learning rate of the base width.
    base_width: the width at which base_lr was tuned.
  """
  for depth, width, num_steps in itertools.product(depths, widths, steps):
    yield f'd{width}x{depth}-{num_steps}', {
        'model.d_model': width, 'model.num_layers': depth,
        'train.steps': num_steps, 'optim.lr': base_lr * base_width / width}


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
