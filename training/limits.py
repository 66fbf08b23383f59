"""What a run cannot honour of a config, beyond what each field declares.

What belongs to a model is checked where it is built, what belongs to an
optimiser or a schedule in its own file.
"""

from collections.abc import Iterable
from typing import Any

import jax
import ml_collections
import numpy as np

from architectures.parts import tables
from architectures.parts.config import ModelConfig
from configs import base
from configs import fields
from configs.errors import require

MOST = base.MOST
MOST_OF_A_BATCH = 2**28  # tokens: a hundred times the largest that is published
number = fields.check_number


def ranges(config: ml_collections.ConfigDict, *sections: str) -> None:
  """Raises RequestError for a value that is out of its field's range. Those of
  config.model are checked where the model is built.

  Args:
    config: a run's.
    sections: of it, such as 'data'; default: all.
  """
  for name, leaf in base.FIELDS.items():
    section = name.split('.')[0]
    if section != 'model' and (not sections or section in sections):
      fields.check(leaf, get(config, name))
  if not sections or 'data' in sections:
    _check_batch(config.data)


def _check_batch(data: ml_collections.ConfigDict) -> None:
  tokens = data.batch_size * max(data.length, data.target_length)
  require(tokens <= MOST_OF_A_BATCH, f'data.batch_size is '
          f'{data.batch_size} and data.length {data.length}: a batch of '
          f'{tokens:,} tokens is more than the {MOST_OF_A_BATCH:,} that are '
          'taken')


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


def refuse_unread_of(names: Iterable[str], config: ml_collections.ConfigDict,
                     model: ModelConfig) -> None:
  """Raises RequestError for a field of config.model that was set by hand, to
  another value than its default, and that the model does not read.

  Args:
    names: of the fields that were set.
    config: the run's.
    model: its resolved ModelConfig.
  """
  names = {name for name in names if name.startswith('model.')}
  for inner, where in tables.unread(model).items() if names else ():
    name, of_kind = f'model.{inner}', inner.startswith('kinds.')
    if name not in names and not (of_kind and 'model.kinds' in names):
      continue
    leaf = tables.find(inner)
    assert leaf is not None, inner
    default = leaf.default
    require(not of_kind and get(config, name) == default,
            f'{name} is {get(config, name)}, which this model does not read: '
            f'it is read where {where}. Leave it ' + (
                'away' if of_kind else f'at {default}, or set ' + ' or '.join(
                    f'model.{x}' for x in (
                        tables.decided_by(inner) or ['kinds']))))


def as_read(config: ml_collections.ConfigDict, model: ModelConfig,
            resolved: bool = False) -> dict[str, Any]:
  """Returns a run's config as a dict, without the fields of config.model that
  the model does not read; `resolved`: with those filled in that are derived.
  """
  tree = config.to_dict() | (
      {'model': tables.as_dict(model)} if resolved else {})
  for name in tables.unread(model):
    *groups, last = name.split('.')
    at = above = tree['model']
    for group in groups:
      above, at = at, at.get(group, {})
    at.pop(last, None)
    if not at and groups[-1] in tables.GROUPS:
      above.pop(groups[-1], None)
  return tree


def get(config: ml_collections.ConfigDict, name: str):
  """Returns the field of a config by its dotted name."""
  for part in name.split('.'):
    config = config[part]
  return config
