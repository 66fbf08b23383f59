"""The lines that a run prints before it begins: its model, data and steps."""

from collections.abc import Sequence

from training import runs
from training.costs import systems, totals
from training.data import records
from training.objectives import pipeline, probe

MANY_PASSES_OVER_DATA = 5  # over the data, before a run warns of them


def describe_run(run: runs.Run, start: int, tokens: int,
                 train_data: pipeline.Loader,
                 eval_data: Sequence[pipeline.Loader]) -> str:
  """Describes what a run is about to do: its model, its devices, its steps, its
  data and its evaluations. The lines are printed before the first step.

  Args:
    run: the run, built on its devices.
    start: the number of steps done already.
    tokens: the number of tokens of a step, padding included.
    train_data: the loader of training batches.
    eval_data: a loader of evaluation batches for each held-out source.
  """
  # Describe the model, and where it is trained.
  lines = [_model_line(run)]
  lines += _system_and_layer_lines(run)
  lines.append(_devices_line(run))

  # Describe the steps, their data, and the evaluations between them.
  lines += _step_lines(run, start=start, tokens=tokens)
  lines += _data_lines(run, train_data)
  lines.append(_held_out_line(eval_data))
  lines.append(_evaluation_line(run, eval_data))
  return '\n'.join(lines)


def _model_line(run: runs.Run) -> str:
  """Returns the line that names the model of a run and counts its parameters.

  Args:
    run: the run, built on its devices.
  """
  model = run.model
  num_parameters = runs.count_parameters(run.abstract_state.params)
  num_trained = totals.trained_parameters(run.module, run.config.optim)
  text = (f'model: {model.arch}, {num_parameters:,} parameters in '
          f'{model.param_dtype}')
  # A token uses only some of the experts, and a run may train only a part of
  # the model.
  if model.has_experts:
    _, num_active = totals.count_parameters(model)
    text += f', of which each token uses {num_active:,}'
  if num_trained != num_parameters:
    text += f', of which {num_trained:,} are trained'
  return f'{text}; computed in {model.dtype}'


def _system_and_layer_lines(run: runs.Run) -> list[str]:
  """Returns lines that say how the model differs from the system that it is
  named after, and which layers it has, where there is something to say."""
  lines = list(totals.describe_layers(run.model))
  system = systems.describe_differences(run.model)
  if system:
    lines.insert(0, system)
  return lines


def _devices_line(run: runs.Run) -> str:
  """Returns the line that counts the devices of a run and gives their mesh."""
  sizes = []
  for axis, size in run.mesh.shape.items():
    if size > 1:
      sizes.append(f'{axis}={size}')
  mesh = ','.join(sizes) or 'data=1'
  device_kind = run.mesh.devices.flat[0].device_kind
  return f'devices: {run.mesh.size} of the kind {device_kind}, mesh {mesh}'


def _step_lines(run: runs.Run, start: int, tokens: int) -> list[str]:
  """Describes the steps of a run: how many rows and tokens a step has, and how
  many steps there are.

  Args:
    run: the run, built on its devices.
    start: the number of steps done already.
    tokens: the number of tokens of a step, padding included.
  """
  # Batches may grow in stages (ramp), and rows may be padded to several
  # lengths.
  config = run.config
  ramp = pipeline.read_ramp(config)
  *shorter, longest = pipeline.padded_lengths(config)

  # Describe the size of a step.
  rows = f'{config.data.batch_size:,} rows'
  if config.train.grad_accumulation > 1:
    rows += f' in {config.train.grad_accumulation} micro-batches'
  is_padded_to_several = bool(shorter)
  at_most = 'at most ' if is_padded_to_several else ''
  if is_padded_to_several:
    rows += (f' padded to {", ".join(map(str, shorter))} or {longest} tokens '
             '(a program each)')
  lines = [f'step: {rows}, {at_most}{tokens:,} tokens']
  for end_step, num_rows in zip(ramp.change_steps, ramp.sizes):
    lines.append(f'until step {end_step:,}: {num_rows:,} rows')

  # Describe how many steps there are.
  row_tokens = tokens // ramp.last
  total = int(ramp.rows_before(config.train.steps)) * row_tokens
  lines.append(f'training: steps {start + 1:,} to {config.train.steps:,}, '
               f'{at_most}{total:,} tokens in all')
  return lines


def _data_lines(run: runs.Run, train_data: pipeline.Loader) -> list[str]:
  """Describes the training data of a run, with a warning if the model sees the
  same data many times.

  Args:
    run: the run, built on its devices.
    train_data: the loader of training batches.
  """
  # Compute how many times the run passes over its data.
  config = run.config
  source = train_data.text
  num_passes = 0.0  # those of a mixture are not counted
  if len(train_data.views) == 1:
    rows = int(pipeline.read_ramp(config).rows_before(config.train.steps))
    num_passes = rows / train_data.num_windows
    source = f'{num_passes:.3g} passes over {source}'

  # Count the rows that were cut off. This concerns labelled records; a text is
  # cut into rows without a loss.
  num_cut_off = sum(getattr(view, 'cut', 0) for view in train_data.views)
  if num_cut_off:
    source += (f', {num_cut_off:,} of whose {train_data.num_windows:,} rows '
               f'are longer than data.length {config.data.length}, and cut off')

  lines = [f'data: {source}', *records.describe_labels(train_data.views)]
  # Warn of many passes, but not if the run keeps its best checkpoint, nor for a
  # probe, whose rows are drawn at random.
  is_evaluated = config.eval.every_steps > 0
  is_watched = config.eval.best or config.objective in probe.OBJECTIVES
  has_many_passes = num_passes > MANY_PASSES_OVER_DATA
  if has_many_passes and is_evaluated and not is_watched:
    lines.append(
        f'warning: after some {MANY_PASSES_OVER_DATA} passes a model mostly '
        'learns its data by heart: add --config.eval.best=loss '
        '--config.eval.patience=3')
  return lines


def _held_out_line(eval_data: Sequence[pipeline.Loader]) -> str:
  """Returns the line that names the held-out data and counts its tokens."""
  names = ' and '.join(loader.text for loader in eval_data)
  tokens = sum(loader.num_tokens for loader in eval_data)
  return f'held out: {names}, {tokens:,} tokens'


def _evaluation_line(run: runs.Run,
                     eval_data: Sequence[pipeline.Loader]) -> str:
  """Returns the line that says how often a run is evaluated, and on how many
  batches."""
  every = run.config.eval.every_steps
  if not every:
    return 'evaluation: none while training'
  read = sum(loader.first(run.config.eval.batches) for loader in eval_data)
  total = sum(loader.num_batches for loader in eval_data)
  return (f'evaluation: every {every:,} steps, on {read:,} of the {total:,} '
          'batches held out')
