"""The checks of a run before it begins: they come before any device work."""

from collections.abc import Iterable
from typing import Any

from etils import epath
import flax.linen as nn
import ml_collections

import architectures
from architectures.parts import blocks, flat, positions
from architectures.parts.config import ModelConfig
from common.errors import RequestError, one_of, require
from configs import base
from configs import sharding as sharding_tables
from training import evals, hook, objectives, runs
from training.data import tokenizers, tokens
from training.objectives import pipeline
from training.optim import mup, optimizers
from training.workdir import checkpoints, metrics, run_config, storage

# Fields that are read only where another one is set.
FIELD_THAT_ENABLES = {
    'eval.best_is': 'eval.best', 'eval.patience': 'eval.best',
    'eval.live': 'optim.ema', 'init_partial': 'init_from',
    'log.wandb_project': 'log.wandb', 'log.trackio_project': 'log.trackio',
    'train.mtp_weight': 'model.mtp_depth'}


def check_config(config: ml_collections.ConfigDict, by_hand: Iterable[str] = ()
                 ) -> None:
  """Raises RequestError for what can be seen wrong without data or devices.

  Args:
    config: the config of a run.
    by_hand: the fields that were set on the command line, or by the point of a
      sweep: one that the model does not read is refused.
  """
  # The fields by themselves, and those of one group.
  base.check(config.to_dict())
  objectives.check_objective(config)
  _check_enabling_fields(config)
  one_of('mesh.rules', config.mesh.rules, sharding_tables.RULES)
  pipeline.check_ramp(config)
  optimizers.check_optim(config.optim)
  _check_best_figure(config.eval)
  one_of('eval.part', config.eval.part, tokens.HELD_OUT_PARTS)
  metrics.check_writers(config.log)

  # The model, and what depends on it.
  module = architectures.build(runs.resolve_model_without_tokenizer(config))
  refuse_unread_fields(by_hand, config, module.config)
  mup.check_optimizer(module.config, config.optim.name)
  runs.parameter_shares(module, config.optim)  # refuses a pattern of nothing
  _check_row_length(config, module.config)
  _check_objective_fits_model(config.objective, module)
  evals.check_tasks_in_training(config)
  hook.load_hooks(config)


def _check_enabling_fields(config: ml_collections.ConfigDict) -> None:
  """Raises RequestError for a field that is set and not read, since the field
  beside it is not set."""
  for name, other in FIELD_THAT_ENABLES.items():
    value = config[name]
    default = base.FIELDS[name].default
    if value != default and not config[other]:
      raise RequestError(
          f'{name} is {value!r}, which is not read while {other} is not set: '
          f'leave it at {default!r}, or set {other}')


def _check_row_length(config: ml_collections.ConfigDict, model: ModelConfig
                      ) -> None:
  """Raises RequestError for rows that are longer than learned positions."""
  longest = max(objectives.find_objective(config).row_lengths(config))
  require(longest <= positions.longest_supported_length(model),
          f'model.max_len is {model.max_len}, and rows of {longest} tokens '
          '(data.length, or data.target_length) are longer than these learned '
          f'positions: set it to {longest} or more')


def _check_best_figure(e: ml_collections.ConfigDict) -> None:
  """Raises RequestError for fields of config.eval that do not fit together."""
  one_of('eval.best_is', e.best_is, ('', 'least', 'largest'))
  if not e.best:
    return

  # eval.best is a figure of the held-out data, or TASK/FIGURE.
  figure = e.best.rpartition('/')[2]
  if '/' in e.best:
    task = e.best.partition('/')[0]
    tasks = evals.parse_task_names(e.tasks)
    require(task in tasks, f'eval.best is {e.best!r}, and eval.tasks has no '
            f'{task!r}: it has {", ".join(tasks) or "none"}')
    # A task may also be run once, after the last step; patience needs more.
    is_known = e.tasks_every_steps or not e.patience
    every = 'tasks_every_steps'
  else:
    is_known = e.every_steps
    every = 'every_steps'
  if not is_known:
    raise RequestError(
        f'eval.best is {e.best!r} and eval.patience {e.patience}, but '
        f'eval.{every} is 0: nothing of it is known while training')

  has_usual_best = figure in (*metrics.FIGURES_BEST_WHEN_LEAST,
                              *metrics.FIGURES_BEST_WHEN_LARGEST)
  if not e.best_is and not has_usual_best:
    raise RequestError(
        f'eval.best is {e.best!r}, of which it is not known which value is '
        'the best: set eval.best_is to least or largest')


def refuse_unread_fields(names: Iterable[str],
                         config: ml_collections.ConfigDict,
                         model: ModelConfig) -> None:
  """Raises RequestError for a field of config.model that was set by hand, to
  another value than its default, and that the model does not read.

  Args:
    names: of the fields that were set.
    config: the run's.
    model: its resolved ModelConfig.
  """
  names = {name for name in names if name.startswith('model.')}
  unread = flat.fields_that_are_unread(model, config.model) if names else {}
  for inner, why in unread.items():
    name = f'model.{inner}'
    of_kind = inner.startswith('kinds.')
    # A kind's fields are set by setting model.kinds.
    if name not in names and not (of_kind and 'model.kinds' in names):
      continue
    default = base.find(name).default
    value = config[name]
    if value == default and not of_kind:
      continue
    way_on = 'away'
    if not of_kind:
      others = ' or '.join(f'model.{other}' for other in why.others)
      way_on = f'at {default}, or set {others}'
    raise RequestError(f'{name} is {value}, which this model does not read: it '
                       f'is read where {why.where}. Leave it {way_on}')


def _check_objective_fits_model(name: str, module: nn.Module) -> None:
  """Raises RequestError where the objective does not train such a model."""
  objective = objectives.OBJECTIVES[name]
  stack = architectures.stack(module.config)
  if stack not in objective.stacks:
    choices = [key for key, row in objectives.OBJECTIVES.items()
               if stack in row.stacks]
    raise RequestError(
        f'objective is {name!r}, which does not fit model.arch '
        f'{module.config.arch} ({stack}): choose from {", ".join(choices)}')
  # A prefix is read in both directions.
  if objective.prefix and blocks.has_layers_with_state(module.config):
    raise RequestError(
        f'objective is {name!r}, whose first tokens see each other, and some '
        'layers read a row in one direction (a state of model.mixer, '
        'model.attention_conv, branch_conv, memory or indexer.block): choose '
        'causal')
  require(module.config.head == objective.head, 'model.head is '
          f'{module.config.head!r}, and objective {name!r} trains '
          f'{objective.head!r}: leave it empty, to be derived')


def check_workdir_is_writable(workdir: epath.Path) -> None:
  """Raises RequestError where a run could not write its files."""
  storage.check_folder_is_writable(checkpoints.checkpoint_folder(workdir))
  for file in (run_config.config_file(workdir), workdir / metrics.METRICS_FILE):
    storage.check_file_is_writable(file, '--workdir')
  if not run_config.has_begun(workdir):
    storage.refuse_folder_of_others(workdir, '--workdir')


def config_to_print(config: ml_collections.ConfigDict,
                    by_hand: Iterable[str] = ()
                    ) -> dict[str, Any]:
  """Returns the config as a run reads it: checked, and with every field of
  the model that is derived filled in; `by_hand` is as for `check_config`."""
  check_config(config, by_hand)
  config = objectives.fill_in_labels(config)
  model, _ = runs.resolve_model(config, tokenizers.load(config.data.tokenizer))
  return run_config.without_unread_fields(config, model, resolved=True)
