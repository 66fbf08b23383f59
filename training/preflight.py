"""What is said of a run before it begins: what is wrong in its config, and what
it is about to do."""

from collections.abc import Iterable, Sequence
import sys
from typing import Any

from etils import epath
import flax.linen as nn
import jax
import ml_collections

import architectures
from architectures.parts import mixers, positions
from architectures.parts.config import ModelConfig
from configs import sharding as tables
from configs.errors import RequestError, one_of, require
from training import early_stopping, evals, limits, objectives, runs
from training.costs import systems, totals
from training.data import ramp, sources, tokenizers
from training.objectives import pipeline
from training.optim import mup, optimizers
from training.step import parameter_shares
from training.workdir import checkpoints, metrics, run_config, storage


def check_config(config: ml_collections.ConfigDict, by_hand: Iterable[str] = ()
                 ) -> None:
  """Raises ValueError for what can be seen wrong without data or devices.

  Args:
    config: a run's.
    by_hand: the fields that were set on the command line, or by the point of a
      sweep: one that the model does not read is refused.
  """
  limits.ranges(config)
  objectives.check_objective(config)
  limits.refuse_unread(config)
  one_of('mesh.rules', config.mesh.rules, tables.RULES)
  ramp.check(config)
  optimizers.check_optim(config.optim)
  early_stopping.check_best(config)
  one_of('eval.part', config.eval.part, sources.PARTS)
  metrics.check_writers(config.log)
  module = architectures.build(runs.resolve_alone(config))
  limits.refuse_unread_of(by_hand, config, module.config)
  mup.check_optimizer(module.config, config.optim.name)
  parameter_shares(module, config.optim)  # refuses a pattern without a match
  _check_reach(config, module.config)
  _check_objective(config.objective, module)
  evals.check_in_training(config)


def _check_reach(config: ml_collections.ConfigDict, c: ModelConfig) -> None:
  """Raises ValueError for rows that learned positions do not reach over."""
  longest = max(objectives.of(config).row_lengths(config))
  require(longest <= positions.reach(c),
          f'model.max_len is {c.max_len}, and rows of {longest} tokens '
          '(data.length, or data.target_length) are longer than these learned '
          f'positions: set it to {longest} or more')


def _check_objective(name: str, module: nn.Module) -> None:
  """Raises ValueError where the objective does not train such a model."""
  ours = architectures.stack(module.config)
  if ours not in objectives.OBJECTIVES[name].stacks:
    choices = [key for key, row in objectives.OBJECTIVES.items()
               if ours in row.stacks]
    raise RequestError(
        f'objective is {name!r}, which does not fit model.arch '
        f'{module.config.arch} ({ours}): choose from {", ".join(choices)}')
  require(not objectives.OBJECTIVES[name].prefix
          or not mixers.with_state(module.config), f'objective is {name!r}, '
          'whose first tokens see each other, and some layers read a row in '
          'one direction (a recurrence of model.mixer, or '
          'model.attention_conv): choose causal')
  head = objectives.OBJECTIVES[name].head
  require(module.config.head == head, f'model.head is {module.config.head!r}, '
          f'and objective {name!r} trains {head!r}: leave it empty, to be '
          'derived')


def try_workdir(workdir: epath.Path) -> None:
  """Raises RequestError where a run could not write what it has to."""
  for folder in (workdir, checkpoints.directory(workdir)):
    storage.try_folder(folder)
  for file in (run_config.file(workdir), workdir / metrics.METRICS):
    storage.try_file(file, '--workdir')
  if not run_config.has_begun(workdir):  # else it is damaged, which is told
    storage.refuse_others(workdir, '--workdir')


def printable(config: ml_collections.ConfigDict, by_hand: Iterable[str] = ()
              ) -> dict[str, Any]:
  """Returns the config as a run reads it: checked, and with every field of
  the model that is derived filled in; `by_hand` is as for `check_config`."""
  check_config(config, by_hand)
  config = objectives.with_labels(config)
  model, _ = runs.resolve(config, tokenizers.load(config.data.tokenizer))
  return limits.as_read(config, model, resolved=True)


def warn_of_unused_ids(config: ml_collections.ConfigDict, model: ModelConfig,
                       tokenizer: tokenizers.Tokenizer) -> None:
  """Says so where most rows of the vocabulary are no token of the text."""
  if model.vocab_size > 2 * runs.vocab_size(config, tokenizer):
    print(f'warning: model.vocab_size is {model.vocab_size}, of which the '
          f'tokenizer {tokenizer.name!r} uses {tokenizer.vocab_size}: set '
          'data.tokenizer to one of that size, or model.vocab_size=0 to take '
          'this one\'s', file=sys.stderr)


def describe(run: Any, start: int, tokens: int, train_data: pipeline.Loader,
       eval_data: Sequence[pipeline.Loader]) -> str:
  """Returns what a run is about to do, in some lines.

  Args:
    run: the run.
    start: how many steps of it are done.
    tokens: of a step, padding included.
    train_data: its batches.
    eval_data: those of what is held out.
  """
  config, model, steps = run.config, run.model, run.config.train.steps
  active = '' if not model.has_experts else (
      f', of which each token uses {totals.parameters(model)[1]:,}')
  parameters = sum(x.size for x in jax.tree.leaves(run.abstract.params))
  trained = totals.trained_parameters(run.module, config.optim)
  if trained != parameters:
    active += f', of which {trained:,} are trained'
  mesh = ','.join(
      f'{axis}={n}' for axis, n in run.mesh.shape.items() if n > 1)
  parts = config.train.grad_accumulation
  sizes = ramp.of(config)
  all_rows = int(sizes.before(steps))
  rows = f'{config.data.batch_size:,} rows' + (
      f' in {parts} micro-batches' if parts > 1 else '')
  source = train_data.text
  if len(train_data.views) == 1:
    passes = all_rows / train_data.num_windows
    source = f'{passes:.3g} passes over {source}'
  # Of views of records alone: text is cut into rows, and nothing of it is lost.
  cut = sum(getattr(view, 'cut', 0) for view in train_data.views)
  if cut:
    source += (f', {cut:,} of whose {train_data.num_windows:,} rows are longer '
               f'than data.length {config.data.length}, and cut off')
  lengths, most = pipeline.lengths(config), ''
  if len(lengths) > 1:
    most = 'at most '
    rows += f' padded to {", ".join(map(str, lengths[:-1]))} or {lengths[-1]}'
    rows += ' tokens (a program each)'
  return '\n'.join([
      f'model: {model.arch}, {parameters:,} parameters in '
      f'{model.param_dtype}{active}; computed in {model.dtype}',
      *filter(None, [systems.line(model)]), *totals.layers(model),
      f'devices: {run.mesh.size} of the kind '
      f'{run.devices[0].device_kind}, mesh {mesh or "data=1"}',
      f'step: {rows}, {most}{tokens:,} tokens',
      *(f'until step {until:,}: {size:,} rows'
        for until, size in zip(sizes.until, sizes.sizes)),
      f'training: steps {start + 1:,} to {steps:,}, {most}'
      f'{all_rows * (tokens // sizes.last):,} tokens in all',
      *_rate(config), f'data: {source}',
      f'held out: {" and ".join(loader.text for loader in eval_data)}, '
      f'{sum(loader.num_tokens for loader in eval_data):,} tokens',
      f'evaluation: {_evaluations(config, eval_data)}',
      *_tasks(config)])


def _evaluations(config: ml_collections.ConfigDict,
                 eval_data: Sequence[pipeline.Loader]) -> str:
  every = config.eval.every_steps
  if not every:
    return 'none while training'
  there = [loader.num_batches for loader in eval_data]
  taken = [loader.first(config.eval.batches) for loader in eval_data]
  return (f'every {every:,} steps, on {sum(taken):,} of the {sum(there):,} '
          'batches held out')


def _rate(config: ml_collections.ConfigDict) -> list[str]:
  """A line where the learning rate never gets to optim.lr."""
  warmup, steps = config.optim.warmup_steps, config.train.steps
  return [f'learning rate: it rises until step {warmup:,}, so it ends at '
          f'{steps / warmup:.3g} of optim.lr {config.optim.lr:g}; set '
          'optim.warmup_steps to fewer than train.steps to reach it'
          ] if warmup > steps else []


def _tasks(config: ml_collections.ConfigDict) -> list[str]:
  names = evals.listed(config.eval.tasks)
  every = config.eval.tasks_every_steps
  when = f'every {every:,} steps and ' if every else ''
  return [f'tasks: {", ".join(names)}, {when}after the last step'
          ] if names else []
