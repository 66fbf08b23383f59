"""The numbers that a run can honour, and the fields that it would not read.

What belongs to a model is checked where it is built, what belongs to an
optimiser or a schedule in its own file.
"""

from collections.abc import Iterable
import math
import operator
from typing import Any

import jax
import ml_collections
import numpy as np

from architectures.parts import unread as fields_unread
from architectures.parts.config import ModelConfig
from configs import base
from configs.base import MOST_FLOAT
from configs.errors import require, short

# A step, a row and a token are counted in int32 on a device.
MOST = 2**31 - 1
MOST_PROCESSES = 512  # of one host, that prepare batches or tokens
MOST_TOKENS = 2**24  # of a row, and rows of a batch
MOST_OF_A_BATCH = 2**28  # tokens: a hundred times the largest that is published


def _between(least: float, most: float) -> tuple:
  return ('>=', least), ('<=', most)


# Of each field, the bounds. Every number of a config has an upper one: those
# without a row here are held by MOST and MOST_FLOAT.
FROM_0, FROM_1 = _between(0, MOST), _between(1, MOST)
LIMITS = {
    'seed': _between(0, 2**32 - 1),
    'init_seed': _between(0, 2**32 - 1),
    'span.noise_density': (('>', 0), ('<', 1)),
    'span.mean_length': _between(1, MOST_TOKENS),
    'probe.vocab': _between(0, 2**20),
    'probe.examples': FROM_0,
    'probe.held_out': FROM_0,
    'data.length': _between(1, MOST_TOKENS),
    'data.target_length': _between(0, MOST_TOKENS),
    'data.batch_size': _between(1, MOST_TOKENS),
    'data.holdout_every': FROM_0,
    'data.length_buckets': _between(1, 64),
    'data.stride': _between(0, MOST_TOKENS),
    'data.pair_separators': _between(0, 2),
    'data.mask_rate': (('>', 0), ('<=', 1)),
    'data.workers': _between(0, MOST_PROCESSES),
    'data.tokenize_workers': _between(0, MOST_PROCESSES),
    'train.steps': FROM_1,
    'train.grad_accumulation': _between(1, MOST_TOKENS),
    'train.max_bad_steps': FROM_1,
    'train.z_loss': _between(0, MOST_FLOAT),
    'train.label_smoothing': (('>=', 0), ('<', 1)),
    'train.mtp_weight': _between(0, MOST_FLOAT),
    'train.loss_chunk': FROM_0,
    'mesh.slices': FROM_0,
    'checkpoint.every_steps': FROM_0,
    'checkpoint.every_minutes': _between(0, 1e6),
    'checkpoint.keep': _between(1, 10_000),
    'checkpoint.keep_every': FROM_0,
    'checkpoint.average': _between(0, 10_000),
    'eval.every_steps': FROM_0,
    'eval.batches': FROM_0,
    'eval.patience': FROM_0,
    'eval.tasks_every_steps': FROM_0,
    'log.every_steps': FROM_1,
}
SIGNS = {'>=': operator.ge, '>': operator.gt, '<=': operator.le,
         '<': operator.lt}


def ranges(config: ml_collections.ConfigDict, *sections: str) -> None:
  """Raises RequestError for a number that cannot be honoured.

  Args:
    config: a run's.
    *sections: of it, such as 'data'; default: all.
  """
  for name, value in _numbers(config):
    section = name.split('.')[0]
    # Those of a model: architectures/parts/fields.py, where it is built.
    if section == 'model' or sections and section not in sections:
      continue
    if name in LIMITS:
      number(name, value, LIMITS[name])
    else:
      most = MOST if type(value) is int else MOST_FLOAT
      number(name, value, _between(-most, most))
  if not sections or 'data' in sections:
    _check_batch(config.data)


def _check_batch(data: ml_collections.ConfigDict) -> None:
  tokens = data.batch_size * max(data.length, data.target_length)
  require(tokens <= MOST_OF_A_BATCH, f'data.batch_size is '
          f'{data.batch_size} and data.length {data.length}: a batch of '
          f'{tokens:,} tokens is more than the {MOST_OF_A_BATCH:,} that are '
          'taken')


def number(name: str, value: int | float, bounds: tuple) -> None:
  """Raises RequestError unless a number is finite and within its bounds."""
  fits = all(SIGNS[sign](value, bound) for sign, bound in bounds)
  text = ' and '.join(f'{sign} {bound:,}' if type(bound) is int else
                      f'{sign} {bound:g}' for sign, bound in bounds)
  require(fits and -math.inf < value < math.inf,
          f'{name} is {short(value)}: it must be {text}')


def ids(name: str, tokens: Any, vocab_size: int) -> None:
  """Raises RequestError for an id without a row in the table of embeddings, for
  which JAX would take the first or the last. Traced ids pass: they are not
  known."""
  if isinstance(tokens, jax.core.Tracer):
    return
  tokens = np.asarray(tokens)
  wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
  require(not wrong.size, f'{name} has the id {wrong[:1].sum()}, which this '
          f'model does not have: its ids are 0 to {vocab_size - 1}')


def _numbers(config: ml_collections.ConfigDict, prefix: str = ''):
  """Yields (dotted name, value) of each int and float of a config."""
  for name, value in config.items():
    if hasattr(value, 'items'):
      yield from _numbers(value, f'{prefix}{name}.')
    elif type(value) in (int, float):
      yield prefix + name, value


def refuse_unread(config: ml_collections.ConfigDict) -> None:
  """Raises RequestError for a field that was set, differing from its default in
  configs/base.py, and that nothing will read."""
  defaults = base.base()
  default = defaults.data.holdout_every
  require(not config.data.eval_source
          or config.data.holdout_every in (0, default),  # 0: as it is then
          f'data.holdout_every is {config.data.holdout_every}, which is not '
          'read where data.eval_source names other documents: leave it at '
          f'{default}, or data.eval_source empty')
  project = defaults.log.wandb_project
  require(config.log.wandb or config.log.wandb_project == project,
          f'log.wandb_project is {config.log.wandb_project!r}, which is not '
          f'read while log.wandb is False: leave it at {project!r}, or set '
          'log.wandb=True')
  require(not config.init_partial or config.init_from,
          'init_partial is True, but init_from names nothing to take weights '
          'from: set it, or leave init_partial at False')
  require(config.optim.ema or not config.eval.live, 'eval.live is True, which '
          'is not read while optim.ema is 0: there is no average beside the '
          'parameters. Set optim.ema, or leave eval.live at False')
  weight = defaults.train.mtp_weight
  require(config.model.mtp_depth or config.train.mtp_weight == weight,
          f'train.mtp_weight is {config.train.mtp_weight}, which is not read '
          f'while model.mtp_depth is 0: leave it at {weight}, or set '
          'model.mtp_depth')
  _check_average(config)


def _check_average(config: ml_collections.ConfigDict) -> None:
  """Raises RequestError for a mean of checkpoints that there will not be."""
  count, every = config.checkpoint.average, config.checkpoint.every_steps
  if not count:
    return
  start = f'checkpoint.average is {count}'
  require(count > 1, f'{start}: the mean is of 2 checkpoints or more; 0: none')
  require(every, f'{start}, but checkpoint.every_steps is 0: the mean is of '
          'checkpoints that are so many steps apart')
  require((count - 1) * every < config.train.steps, f'{start}, but there are '
          f'{-(-config.train.steps // every)} checkpoints in train.steps '
          f'{config.train.steps} by checkpoint.every_steps {every}')
  require(config.eval.every_steps, f'{start}, but eval.every_steps is 0: '
          'nothing is evaluated after the last step')


def unread(config: ml_collections.ConfigDict, model: ModelConfig
           ) -> dict[str, fields_unread.Row]:
  """Returns the fields of config.model that were set, differing from their
  defaults in configs/base.py, and that the model does not read.

  Args:
    config: a run's.
    model: its resolved ModelConfig.
  """
  defaults = base.base()
  found = {f'model.{name}': row
           for name, row in fields_unread.unread(model).items()}
  own = {f'model.{name}' for name in _of_kinds(config)}
  return {name: row for name, row in found.items()
          if (name in own if name.startswith('model.kinds.') else
              get(config, name) != get(defaults, name))}


def _of_kinds(config: ml_collections.ConfigDict) -> Iterable[str]:
  """Yields the names of what kinds of layer set, dotted below the model."""
  for name, kind in config.model.kinds.items():
    for field, value in kind.items():
      yield f'kinds.{name}.{field}'
      if hasattr(value, 'keys'):
        yield from (f'kinds.{name}.{field}.{inner}' for inner in value)


def refuse_unread_of(names: Iterable[str], config: ml_collections.ConfigDict,
                     model: ModelConfig) -> None:
  """Raises RequestError for a field of `names`, which were set by hand, that
  the model does not read. A field that was set together with one that decides
  whether it is read is let pass: a grid of a sweep has such points."""
  names = frozenset(names)
  defaults = base.base()
  for name, row in unread(config, model).items():
    decided_by = {f'model.{field}' for field in row.decided_by}
    of_kind = name.startswith('model.kinds.')
    by_hand = name in names or of_kind and 'model.kinds' in names
    instead = 'away' if of_kind else f'at {get(defaults, name)}'
    require(not by_hand or not of_kind and bool(decided_by & names),
            f'{name} is {get(config, name)}, which this model does not read: '
            f'it is read where {row.where}. Leave it {instead}, or set '
            f'{" or ".join(sorted(decided_by))}')


def get(config: ml_collections.ConfigDict, name: str):
  """Returns the field of a config by its dotted name."""
  for part in name.split('.'):
    config = config[part]
  return config
