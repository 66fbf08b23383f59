"""What a model learns to do: one record an objective, in the table OBJECTIVES.

To add an objective, write its record in a file of this folder, in a table
OBJECTIVES of that file; record.py says what a record holds. Everything else
reads these tables: the batches (pipeline.py), the training step, evaluation
and sampling, plans of memory, exports, and the check for fields that a run
would not read.
"""

from collections.abc import Mapping

from architectures.parts.config import ModelConfig
from configs import base, lazy
from configs.errors import RequestError, one_of, require, short
from training.data import conversations, records, sources
from training.objectives.record import Config, Objective, Shape

# The fields that some objectives read and others do not; see Objective.reads.
OF_SOME = (
    *(f'data.{name}' for name in (
        'chat_template', 'class_weights', 'document_mask', 'labels',
        'length_buckets', 'mask_rate', 'pair_separators', 'stride',
        'target_length', 'whole_words')),
    *(f'probe.{name}' for name in ('examples', 'held_out', 'levels', 'vocab')),
    'span.mean_length', 'span.noise_density')


OBJECTIVES: Mapping[str, Objective] = lazy.Lazy(
    __name__, __path__, lambda file: file.OBJECTIVES,
    without=('losses', 'pipeline', 'record'))


def of(config: Config) -> Objective:
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


def check_fits(config: Config, source: sources.Source) -> None:
  """Raises RequestError for a source of which the objective cannot learn."""
  reads = of(config).holds
  require(bool(set(reads) & set(source.holds)), f'objective '
          f'{config.objective!r} reads {" or ".join(reads)}, but data source '
          f'{source.name!r} holds {source.holds[0]}: choose from '
          f'{sources.forms(reads)}')


def with_labels(config: Config) -> Config:
  """Returns a run's config with data.labels as its training data have them,
  where the objective has labels and the config names none."""
  labels = of(config).labels
  if labels is None or config.data.labels:
    return config
  for _, source in sources.parse(config.data.source):
    check_fits(config, source)
  config = config.copy_and_resolve_references()
  config.data.labels = labels(config)
  return config


def shapes(config: Config) -> dict[str, Shape]:
  """Returns the shape and dtype of each array of a run's batches."""
  return {key: ((config.data.batch_size, *shape), dtype)
          for key, (shape, dtype) in of(config).arrays(config).items()}


def check_objective(config: Config) -> None:
  """Raises RequestError for an unknown objective, and for a field that was set,
  so that it differs from its default, and that the objective does not read."""
  objective = of(config)
  if config.data.chat_template != conversations.PUBLISHED_NAME:
    conversations.source(config.data.chat_template)
  defaults = base.base()
  for name in {*OF_SOME, *objective.ignores} - {*objective.reads}:
    value, default = base.get(config, name), base.get(defaults, name)
    if value != default:
      readers = [key for key, row in OBJECTIVES.items() if name in row.reads]
      raise RequestError(
          f'{name} is {value!r}, which objective {config.objective!r} does not '
          f'read: leave it at {default!r}' + (
              f', or choose one that does: {", ".join(readers)}'
              if readers else ''))
  depth = config.model.mtp_depth
  if depth and not objective.mtp:
    choices = [key for key, row in OBJECTIVES.items() if row.mtp]
    raise RequestError(
        f'model.mtp_depth is {short(depth)}, which objective '
        f'{config.objective!r} does not train: set it to 0, or choose the '
        f'objective from {", ".join(choices)}')
  records.check_labels(config.data.labels)
  objective.check(config)
