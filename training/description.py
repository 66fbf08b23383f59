"""What a run says before it begins."""

from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from architectures.parts.config import ModelConfig
from training import evals, limits
from training.costs import systems, totals
from training.data import pipeline, ramp


def of(run: Any, start: int, tokens: int, train_data: pipeline.Loader,
       eval_data: Sequence[pipeline.Loader]) -> str:
  """Returns what a run is about to do, in some lines; the arguments are those
  of `runs.Run.describe`."""
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
  if train_data.num_sources == 1:
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
      *filter(None, [systems.line(model)]), *layers(model),
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
      *_tasks(config), *_unread(config, model)])


def layers(model: ModelConfig) -> list[str]:
  """A line that says which kinds of layer there are, if there are several."""
  rows = totals.kinds_of_layer(model)
  said = ('; '.join('{layers} of {kind}'.format(
      layers=row['layers'], kind=row['kind'] or 'no kind') + ''.join(
          f', {name}={value}' for name, value in row['changes'].items())
                    for row in rows))
  order = ', then '.join(filter(None, (
      model.prefix, model.pattern or 'the rest', model.suffix)))
  return [f'layers: {said}; in the order {order}'] if rows else []


def _unread(config: ml_collections.ConfigDict, model: ModelConfig
            ) -> list[str]:
  """A line for each condition under which fields that are set would be read.
  """
  names: dict[str, list[str]] = {}
  for name, row in limits.unread(config, model).items():
    names.setdefault(row.where, []).append(f'{name}={limits.get(config, name)}')
  return [f'not read: {", ".join(fields)}, unless {where}'
          for where, fields in names.items()]


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
