"""What a model learns to do: one record an objective, in the table OBJECTIVES.

To add an objective, write its record in a file of this folder, in a table
OBJECTIVES of that file; record.py says what a record holds. Everything else
reads these tables: the data pipeline, the training step, evaluation and
sampling, plans of memory, exports, and the check for fields that a run would
not read.
"""

import importlib
import pkgutil

import ml_collections

from architectures.parts.config import ModelConfig
from configs import base
from configs.errors import one_of, require, short
from training import limits
from training.data import chat_templates
from training.data import conversations
from training.data import records
from training.objectives.record import Objective, Shape

OBJECTIVES: dict[str, Objective] = {
    name: row for file in pkgutil.iter_modules(__path__)
    if file.name != 'record'
    for name, row in importlib.import_module(
        f'{__name__}.{file.name}').OBJECTIVES.items()}


def of(config: ml_collections.ConfigDict) -> Objective:
  """Returns the record of a run's objective; RequestError if there is none."""
  one_of('objective', config.objective, OBJECTIVES)
  return OBJECTIVES[config.objective]


def with_head(model: ModelConfig) -> str:
  """Returns the objective that trains a model's head of a task.

  Raises:
    RequestError: for a head with one label for each token.
  """
  classes = model.num_labels > 1
  found = [name for name, row in OBJECTIVES.items()
           if row.head == model.head and (row.labels is not None) == classes]
  require(bool(found), f'no objective trains model.head {model.head!r} with '
          f'model.num_labels {model.num_labels}: two labels or more are needed')
  return found[0]


def with_labels(config: ml_collections.ConfigDict
                ) -> ml_collections.ConfigDict:
  """Returns a run's config with data.labels as its training data have them,
  where the objective has labels and the config names none."""
  labels = of(config).labels
  if labels is None or config.data.labels:
    return config
  config = config.copy_and_resolve_references()
  config.data.labels = labels(config)
  return config


def shapes(config: ml_collections.ConfigDict) -> dict[str, Shape]:
  """Returns the shape and dtype of each array of a run's batches."""
  return {key: ((config.data.batch_size, *shape), dtype)
          for key, (shape, dtype) in of(config).arrays(config).items()}


def check_objective(config: ml_collections.ConfigDict) -> None:
  """Raises RequestError for an unknown objective, and for a field that was set,
  so that it differs from its default, and that the objective does not read."""
  objective = of(config)
  if config.data.chat_template != conversations.PUBLISHED_NAME:
    chat_templates.source(config.data.chat_template)
  defaults = base.base()
  for name in {field: None for row in OBJECTIVES.values()
               for field in row.reads}:
    readers = [key for key, row in OBJECTIVES.items() if name in row.reads]
    value, default = limits.get(config, name), limits.get(defaults, name)
    require(config.objective in readers or value == default,
            f'{name} is {value!r}, which objective {config.objective!r} does '
            f'not read (it is read by {", ".join(readers)}): leave it at '
            f'{default!r}, or choose one of these')
  for name in objective.ignores:
    value, default = limits.get(config, name), limits.get(defaults, name)
    require(value == default, f'{name} is {value!r}, which objective '
            f'{config.objective!r} does not read: leave it at {default!r}')
  depth = config.model.mtp_depth
  choices = [key for key, row in OBJECTIVES.items() if row.mtp]
  require(not depth or objective.mtp, f'model.mtp_depth is {short(depth)}, '
          f'which objective {config.objective!r} does not train: set it to 0, '
          f'or choose the objective from {", ".join(choices)}')
  records.check_labels(config.data.labels)
  objective.check(config)
