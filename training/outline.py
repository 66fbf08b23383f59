"""What a run is about to do, in a few lines, before it does it."""

from training import limits, runs
from training.costs import totals


def text(run: runs.Run, start: int, tokens: int, train_data, eval_data) -> str:
  """Returns the lines.

  Args:
    run: the run.
    start: how many steps of it are done.
    tokens: of a step, padding included.
    train_data: its loader.
    eval_data: those of what is held out.
  """
  config, model, steps = run.config, run.model, run.config.train.steps
  active = '' if model.ffn != 'moe' else (
      f', of which each token uses {totals.parameters(model)[1]:,}')
  devices = run.mesh.devices
  mesh = ','.join(f'{axis}={n}' for axis, n in run.mesh.shape.items() if n > 1)
  parts = config.train.grad_accumulation
  rows = f'{config.data.batch_size:,} rows' + (
      f' in {parts} micro-batches' if parts > 1 else '')
  source = train_data.text
  if train_data.num_sources == 1:
    passes = steps * config.data.batch_size / train_data.num_windows
    source = f'{passes:.3g} passes over {source}'
  return '\n'.join([
      f'model: {model.arch}, {runs.count(run.abstract.params):,} parameters in '
      f'{model.param_dtype}{active}; computed in {model.dtype}',
      f'devices: {devices.size} of the kind {devices.flat[0].device_kind}, '
      f'mesh {mesh or "data=1"}',
      f'step: {rows}, {tokens:,} tokens',
      f'training: steps {start + 1:,} to {steps:,}, {steps * tokens:,} tokens '
      'in all',
      f'data: {source}',
      f'held out: {" and ".join(loader.text for loader in eval_data)}, '
      f'{sum(loader.num_tokens for loader in eval_data):,} tokens',
      f'evaluation: {_evaluations(config, eval_data)}',
      *_unread(config, model)])


def _unread(config, model) -> list[str]:
  """A line for each condition under which fields that are set would be read.
  """
  names: dict[str, list[str]] = {}
  for name, row in limits.unread(config, model).items():
    names.setdefault(row.where, []).append(f'{name}={limits.get(config, name)}')
  return [f'not read: {", ".join(fields)}, unless {where}'
          for where, fields in names.items()]


def _evaluations(config, eval_data) -> str:
  every = config.eval.every_steps
  if not every:
    return 'none while training'
  there = [loader.num_batches for loader in eval_data]
  taken = [loader.first(config.eval.batches) for loader in eval_data]
  return (f'every {every:,} steps, on {sum(taken):,} of the {sum(there):,} '
          'batches held out')
