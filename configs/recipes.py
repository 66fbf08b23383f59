"""Helpers for the configs of systems: the sizes of a system as a table, and how
a run of its smallest size and of a published size is set."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import ml_collections

import architectures
from common.errors import check_choice
from configs import base

# The training of a small size, for minutes of one CPU core.
TINY_TRAINING = dict(batch_size=16, steps=300, lr=3e-3, warmup_steps=30)
# The model of most such sizes of decoders.
SMALL_DECODER = dict(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2,
                     d_ff=344, max_len=256)
# LLaMA 2's batch in tokens, tokens and rates, where a paper has no others.
PUBLISHED_TRAINING = dict(batch=2**22, tokens=500_000 * 2**22, lr=3e-4,
                          warmup_steps=2000)
# The names in a size that set the training, and are no fields of config.model.
NAMES_OF_TRAINING = (
    'batch', 'batch_size', 'tokens', 'steps', 'warmup', 'decay', 'length',
    *(field.name for field in dataclasses.fields(base.Optim)))


def table_of_sizes(names: str, rows: Mapping[str, Sequence[Any]], **same: Any
                   ) -> dict[str, dict[str, Any]]:
  """Returns {size: its fields} of a table with a row for each size.

  Args:
    names: the names of the columns, with spaces between: fields of
      config.model, dotted in a group of fields; NAMES_OF_TRAINING; other fields
      of the config as 'train.z_loss'; and `parameters`, the published count.
    rows: the values of each size, by its name.
    **same: the fields that all of them have.
  """
  sizes = {}
  for size, values in rows.items():
    fields = dict(zip(names.split(), values, strict=True))
    sizes[size] = same | fields
  return sizes


def make_config(arch: str, size: str, sizes: Mapping[str, Mapping[str, Any]],
                model: Mapping[str, Any] | None = None,
                run: Mapping[str, Any] | None = None, remat: str = 'full',
                **training: Any) -> ml_collections.ConfigDict:
  """Returns the config of a run of one size of a system.

  Its model has the parts of the system's page (architectures/), then `model`,
  then what its size says. A size that is not `tiny` computes in bfloat16.

  Args:
    arch: model.arch.
    size: the ':size' argument, a key of `sizes`.
    sizes: the fields of each size, by its name; see `table_of_sizes`.
    model: the fields of config.model that all sizes have.
    run: the other fields of the config, dotted, that all sizes have.
    remat: model.remat of a published size.
    **training: of all published sizes, before what theirs says: `batch` in
      tokens, or `batch_size` in rows; `tokens` in all, or `steps`; `warmup` and
      `decay` in tokens, or `warmup_steps`; `length` of a row, where it is not
      model.max_len; and fields of config.optim.

  Raises:
    RequestError: where there is no such size.
  """
  check_choice('size', size, sizes)

  # A size sets fields of the training, of the run, and of the model.
  training_fields = dict(PUBLISHED_TRAINING | training)
  if size == 'tiny':
    training_fields = dict(TINY_TRAINING)
  run_fields = dict(run or {})
  model_fields = {}
  for name, value in sizes[size].items():
    if name in NAMES_OF_TRAINING:
      training_fields[name] = value
    elif name in base.FIELDS:
      run_fields[name] = value
    elif name != 'parameters':
      model_fields[name] = value

  # The model; the later fields win.
  config = base.base()
  if size != 'tiny':
    config.model.update(dtype='bfloat16', remat=remat)
  _update_model(config.model, architectures.system(arch).PARTS)
  _update_model(config.model, model or {})
  _update_model(config.model, model_fields)
  config.model.arch = arch
  if architectures.stack(config.model) == 'encoder-decoder':
    config.model.num_decoder_layers = config.model.num_layers

  # The training, whose length may be the model's.
  _set_training(config, training_fields)
  config.update_from_flattened_dict(run_fields)
  return config


def _update_model(model: ml_collections.ConfigDict, fields: Mapping[str, Any]
                  ) -> None:
  """Sets fields of config.model: groups of fields, and then single fields of a
  group, which have dotted names."""
  # Groups come first: the single field of a group overrides the group's value.
  undotted = {}
  dotted = {}
  for name, value in fields.items():
    if '.' in name:
      dotted[name] = value
    else:
      undotted[name] = value
  model.update(undotted)
  model.update_from_flattened_dict(dotted)


def _set_training(config: ml_collections.ConfigDict, training: dict[str, Any]
                  ) -> None:
  """Sets the length, the batch, the steps and the optimiser of a config.

  Args:
    config: the config.
    training: the fields of NAMES_OF_TRAINING; figures in tokens become rows and
      steps. Fields are popped from it as they are used, and those that are left
      are fields of config.optim.
  """
  # The rows of a batch, of `length` tokens each.
  length = training.pop('length', config.model.max_len)
  tokens_of_batch = training.pop('batch', 0)
  num_rows = training.pop('batch_size', tokens_of_batch // length)
  config.data.update(length=length, batch_size=num_rows)

  # The steps, and the phases of the schedule in them.
  tokens_of_step = num_rows * length
  num_tokens = training.pop('tokens', 0)
  config.train.steps = training.pop('steps', int(num_tokens / tokens_of_step))
  for phase in ('warmup', 'decay'):
    if phase in training:
      tokens_of_phase = training.pop(phase)
      training[f'{phase}_steps'] = int(tokens_of_phase / tokens_of_step)
  config.optim.update(training)


def make_get_config(arch: str, sizes: Mapping[str, Mapping[str, Any]],
                    *args: Any, **kwargs: Any
                    ) -> Callable[..., ml_collections.ConfigDict]:
  """Returns the function get_config(size) of a system's file of configs, for a
  system whose sizes are all set alike; the arguments are those of
  `make_config`."""
  return lambda size='tiny': make_config(arch, size, sizes, *args, **kwargs)
