"""The checks of a run before it begins: they come before any device work."""

from collections.abc import Iterable
from typing import Any

from etils import epath
import flax.linen as nn
import ml_collections

import architectures
from architectures.parts import blocks, flat, positions
from architectures.parts.config import ModelConfig
from common.errors import RequestError, check_choice, require
from configs import base
from configs import sharding as sharding_tables
from training import evals, hook, objectives, runs
from training.data import tokenizers, tokens
from training.objectives import pipeline
from training.optim import mup, optimizers
from training.workdir import checkpoints, metrics, run_config, storage

# For each field that is read only where another one is set, the other one.
FIELD_THAT_ENABLES = {
    'eval.best_is': 'eval.best', 'eval.patience': 'eval.best',
    'eval.live': 'optim.ema', 'init_partial': 'init_from',
    'log.wandb_project': 'log.wandb', 'log.trackio_project': 'log.trackio',
    'train.mtp_weight': 'model.mtp_depth'}


def check_config(config: ml_collections.ConfigDict, by_hand: Iterable[str] = ()
                 ) -> None:
  """Checks everything that can be wrong in a config, as far as it can be seen
  without reading data or using a device.

  Args:
    config: the config of a run.
    by_hand: the names of the fields that the user has set, on the command line
      or in a sweep. Such a field is refused if the model does not read it.

  Raises:
    RequestError: for what is wrong.
  """
  # Check each field by itself, and the fields of each section.
  base.check_config(config.to_dict())
  objectives.check_objective(config)
  _check_enabling_fields(config)
  check_choice('mesh.rules', value=config.mesh.rules,
               choices=sharding_tables.RULES)
  pipeline.check_ramp(config)
  optimizers.check_optim(config.optim)
  _check_best_figure(config.eval)
  check_choice('eval.part', value=config.eval.part,
               choices=tokens.HELD_OUT_PARTS)
  metrics.check_writers(config.log)

  # Check the model, and what depends on it.
  module = architectures.build(runs.resolve_model_without_tokenizer(config))
  refuse_unread_fields(by_hand, config, model=module.config)
  mup.check_optimizer(module.config, optimizer=config.optim.name)
  # This refuses a pattern of optim.freeze that fits no parameter.
  runs.parameter_shares(module, config.optim)
  _check_row_length(config, module.config)
  _check_objective_fits_model(config.objective, module)
  evals.check_tasks_in_training(config)
  hook.load_hooks(config)


def _check_enabling_fields(config: ml_collections.ConfigDict) -> None:
  """Raises RequestError for a field that is set but would not be read, since it
  needs another field, which is not set."""
  for name, enabling_field in FIELD_THAT_ENABLES.items():
    value = config[name]
    default = base.FIELDS[name].default
    if value != default and not config[enabling_field]:
      raise RequestError(
          f'{name} is {value!r}, which is not read while {enabling_field} is '
          f'not set: leave it at {default!r}, or set {enabling_field}')


def _check_row_length(config: ml_collections.ConfigDict, model: ModelConfig
                      ) -> None:
  """Raises RequestError where the rows of the data have more tokens than the
  model has learned positions."""
  longest_row = max(objectives.find_objective(config).row_lengths(config))
  require(longest_row <= positions.longest_supported_length(model),
          f'model.max_len is {model.max_len}, and rows of {longest_row} tokens '
          '(data.length, or data.target_length) are longer than these learned '
          f'positions: set it to {longest_row} or more')


def _check_best_figure(eval_config: ml_collections.ConfigDict) -> None:
  """Checks that eval.best, by which the best checkpoint of a run is chosen,
  names a figure that its evaluations will have.

  Args:
    eval_config: the fields of config.eval.

  Raises:
    RequestError: for a figure that will not be evaluated; and for one of which
      it is not known whether large or small values are better, unless
      eval.best_is says it.
  """
  check_choice('eval.best_is', value=eval_config.best_is,
               choices=('', 'least', 'largest'))
  best = eval_config.best
  if not best:
    return

  # The figure is either that of a task, TASK/FIGURE, or one of the held-out
  # data, such as `loss`. Find out whether it is evaluated during training.
  figure = best.rpartition('/')[2]
  if '/' in best:
    task = best.partition('/')[0]
    tasks = evals.parse_task_names(eval_config.tasks)
    require(task in tasks, f'eval.best is {best!r}, and eval.tasks has no '
            f'{task!r}: it has {", ".join(tasks) or "none"}')
    # Without an interval, a task is evaluated once, after the last step. That
    # is enough, unless patience needs a series of evaluations.
    is_evaluated = eval_config.tasks_every_steps or not eval_config.patience
    interval_field = 'tasks_every_steps'
  else:
    is_evaluated = eval_config.every_steps
    interval_field = 'every_steps'
  if not is_evaluated:
    raise RequestError(
        f'eval.best is {best!r} and eval.patience {eval_config.patience}, but '
        f'eval.{interval_field} is 0: nothing of it is known while training')

  # It must be known whether the least or the largest value is the best.
  has_usual_best = figure in (*metrics.FIGURES_BEST_WHEN_LEAST,
                              *metrics.FIGURES_BEST_WHEN_LARGEST)
  if not eval_config.best_is and not has_usual_best:
    raise RequestError(
        f'eval.best is {best!r}, of which it is not known which value is '
        'the best: set eval.best_is to least or largest')


def refuse_unread_fields(names: Iterable[str],
                         config: ml_collections.ConfigDict,
                         model: ModelConfig) -> None:
  """Refuses a field of config.model that the user has set although the model
  does not read it: the user believes that it has an effect.

  Args:
    names: the dotted names of the fields that the user has set.
    config: the config of the run.
    model: the complete model config of the run.

  Raises:
    RequestError: for such a field, with what would make the model read it.
  """
  # Only fields of the model can be unread.
  model_names = {name for name in names if name.startswith('model.')}
  if not model_names:
    return
  unread_fields = flat.fields_that_are_unread(model, config.model)
  for name_in_model, unread in unread_fields.items():
    name = f'model.{name_in_model}'
    is_of_layer_kind = name_in_model.startswith('kinds.')
    # Fields of a kind of layer (a named set of fields) may also be set by
    # setting model.kinds as a whole.
    is_set = name in model_names or (
        is_of_layer_kind and 'model.kinds' in model_names)
    if not is_set:
      continue
    default = base.find_field(name).default
    value = config[name]
    if value == default and not is_of_layer_kind:
      continue

    # Refuse it, and say what would make the model read it.
    advice = 'away'
    if not is_of_layer_kind:
      other_fields = ' or '.join(f'model.{other}' for other in unread.others)
      advice = f'at {default}, or set {other_fields}'
    raise RequestError(f'{name} is {value}, which this model does not read: it '
                       f'is read where {unread.where}. Leave it {advice}')


def _check_objective_fits_model(name: str, module: nn.Module) -> None:
  """Checks that an objective (what is learned, such as `causal`) can train a
  model.

  Args:
    name: the name of the objective.
    module: the Flax module of the model.

  Raises:
    RequestError: where the objective needs other stacks (a decoder, an encoder
      or both), other layers or another head.
  """
  # Check the stack: a decoder, an encoder or both.
  objective = objectives.OBJECTIVES[name]
  stack = architectures.stack(module.config)
  if stack not in objective.stacks:
    choices = []
    for other_name, other_objective in objectives.OBJECTIVES.items():
      if stack in other_objective.stacks:
        choices.append(other_name)
    raise RequestError(
        f'objective is {name!r}, which does not fit model.arch '
        f'{module.config.arch} ({stack}): choose from {", ".join(choices)}')
  # An objective with a prefix needs layers that read it in both directions.
  if objective.prefix and blocks.has_layers_with_state(module.config):
    raise RequestError(
        f'objective is {name!r}, whose first tokens see each other, and some '
        'layers read a row in one direction (a state of '
        f'{blocks.SOURCES_OF_STATE}): choose causal')
  require(module.config.head == objective.head, 'model.head is '
          f'{module.config.head!r}, and objective {name!r} trains '
          f'{objective.head!r}: leave it empty, to be derived')


def check_workdir_is_writable(workdir: epath.Path) -> None:
  """Raises RequestError where a run could not write its files into a folder, or
  would write over those of something else."""
  storage.check_folder_is_writable(checkpoints.checkpoint_folder(workdir))
  for file in (run_config.config_file(workdir), workdir / metrics.METRICS_FILE):
    storage.check_file_is_writable(file, '--workdir')
  if not run_config.has_begun(workdir):
    storage.refuse_folder_of_others(workdir, '--workdir')


def config_to_print(config: ml_collections.ConfigDict,
                    by_hand: Iterable[str] = ()) -> dict[str, Any]:
  """Returns the config as a run reads it, in nested dicts: checked, without the
  fields that the model does not read, and with the values of those that are
  derived. The arguments and errors are those of `check_config`."""
  check_config(config, by_hand)
  config = objectives.fill_in_labels(config)
  tokenizer = tokenizers.load(config.data.tokenizer)
  model, _ = runs.resolve_model(config, tokenizer)
  return run_config.without_unread_fields(config, model=model, resolved=True)
