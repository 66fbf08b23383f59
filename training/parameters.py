"""Where the parameters of a run come from: drawn, a checkpoint, or weights.

A run draws them, goes on from its own newest good checkpoint, or begins with
the weights of another training (init_from): a workdir, or Hugging Face's
format. Those must be of the same function, or of a language model's under the
head of a task: the head is drawn then, and what only the language model's head
needed is passed over. With init_partial what fits is taken, the rest is as it
was drawn, and every difference is listed.

A checkpoint is evaluated, exported and continued with its parameters; with
their average in a run with optim.ema, unless `live` asks for those that were
trained; or with the mean of several checkpoints, where several are named
(checkpoints.MeanOfSteps).

The modules that read the weights of another training are imported by the
functions that use them: most runs begin without.
"""

from collections.abc import Sequence
import dataclasses
import math
import os
import pathlib
import sys
from typing import Any

from etils import epath
import flax.linen as nn
import jax
import jax.numpy as jnp

import architectures
from architectures.parts import paths
from architectures.parts import positions
from architectures.parts.config import ModelConfig
from architectures.parts.heads import GeneratorConfig
from common.errors import RequestError, require, shorten
from training import hub, objectives, runs
from training.data.tokenizers import Tokenizer
from training.distributed import devices
from training.objectives import pipeline
from training.workdir import checkpoints, provenance, run_config, storage

StepChoice = int | str | checkpoints.MeanOfSteps | None


def restore_run(run: runs.Run, saved: checkpoints.Checkpoints
                ) -> checkpoints.RestoredCheckpoint | None:
  """Restores a run from its newest good checkpoint.

  A run that tools.convert has made from other weights has only parameters in
  its checkpoint. It gets the training state before the first step, with these.

  Args:
    run: the run, with its config, its model and its devices.
    saved: the checkpoints of the run. Later ones than the one that is restored
      are set aside.

  Returns:
    The checkpoint, with the training state as its `state`; None for a run
    without a checkpoint, which begins.
  """
  if not checkpoints.list_steps(saved.directory):
    return None

  def state_to_read(arrays: dict[str, dict]) -> runs.TrainState | None:
    """Returns the shapes of the state to read from a checkpoint with these
    arrays; None: only its record is to be read."""
    if checkpoints.has_only_parameters(arrays):
      return None
    return run.abstract_state

  # Read the newest checkpoint that is not damaged. restore_checkpoint asks the
  # function above what to read of it.
  restored = checkpoints.restore_checkpoint(saved.directory, state_to_read)
  if devices.is_primary_process():
    _warn_of_damaged_checkpoints(restored)
  # A converted run has only parameters.
  if restored.state is None:
    state = create_state(run, source=saved.directory.parent, step=restored.step)
    restored = restored._replace(state=state)
    if devices.is_primary_process():
      print('starting from the parameters in this workdir')
  saved.go_on_from(restored)
  return restored


def _warn_of_damaged_checkpoints(restored: checkpoints.RestoredCheckpoint
                                 ) -> None:
  """Prints a warning for each later checkpoint that was passed over because it
  is damaged."""
  for sentence in restored.damaged:
    print(f'warning: {sentence}', file=sys.stderr)


# From the weights of another training.


def create_state(run: runs.Run, source: str | epath.Path,
                 step: int | None = None) -> runs.TrainState:
  """Makes the training state of a run before its first step. The parameters are
  drawn at random, or taken from another run or from published weights.

  Args:
    run: the run, with its config, its model and its devices.
    source: config.init_from: the folder of another run, or of weights in the
      Hugging Face format; '': all parameters are drawn.
    step: the step of the other run's checkpoint; None: its newest good one.

  Raises:
    RequestError: where there is no such folder, or it is of another model.
  """
  # Draw all parameters first, as the weights may lack some of them.
  state = run.new_state()
  if not str(source):
    return state
  check_init_from(str(source))
  path = _path_of_source(source)
  _check_labels(run, path)

  # Read the weights. `skipped` has a line for each parameter or field that does
  # not fit.
  if storage.has_checkpoints(path):
    params, skipped = _read_weights_of_run(
        run, source=path, drawn=state.params, step=step)
  else:
    params, skipped = _read_hugging_face_weights(run, source=path,
                                                 drawn=state.params)
  for line in skipped:
    print(f'skipped: {line}')
  return run.with_params(state, params)


def check_init_from(source: str) -> None:
  """Checks that the weights exist which config.init_from names. A bucket is not
  looked at.

  Args:
    source: the value of init_from: a folder or a file; '': there is none.

  Raises:
    RequestError: where it does not exist, or is a run without a checkpoint.
  """
  path = _path_of_source(source)
  if not source or storage.is_in_bucket(path):
    return
  # The folder must exist, and must not be of a run that was stopped before its
  # first checkpoint.
  require(os.path.exists(path),
          f'init_from is {source!r}: no such folder or file (one of the hub '
          'is hf://ORG/NAME)')
  if storage.has_config(path) and not run_config.has_begun(path):
    raise RequestError(f'init_from is {source!r}, the folder of a run that has '
                       'no checkpoint')


def check_tokenizer_of_weights(config: objectives.Config,
                               our_tokenizer: Tokenizer) -> None:
  """Checks that a run has the tokenizer with which the weights of
  config.init_from were trained: with another one, token ids stand for other
  texts.

  Nothing is checked with init_partial, nor where the tokenizer of the weights
  cannot be read.

  Args:
    config: the config of the run.
    our_tokenizer: the tokenizer of the run.

  Raises:
    RequestError: for another tokenizer.
  """
  from training.data import tokenizers
  from training.hf import tokenizer as hf_tokenizer
  is_ignored = 'data.tokenizer' in objectives.find_objective(config).ignores
  if not config.init_from or config.init_partial or is_ignored:
    return

  # Find the name or the folder of the weights' tokenizer.
  path = _path_of_source(config.init_from)
  if storage.has_checkpoints(path):
    spec = run_config.load_config(path).data.tokenizer
    _check_tokenizer_file(config, tokenizer=our_tokenizer, source=path)
  elif hub.repository_of_name(config.init_from):
    spec = config.init_from
  else:
    spec = str(_folder_of_weights(path))

  # Compare the vocabularies, unless the name is that of a stand-in: weights
  # that come without a tokenizer are imported with a tokenizer of bytes.
  if spec == config.data.tokenizer or hf_tokenizer.is_stand_in(spec):
    return
  try:
    their_tokenizer = tokenizers.load(spec)
  except RequestError:
    return
  require(our_tokenizer.vocabulary == their_tokenizer.vocabulary,
          f'init_from is {config.init_from!r}, whose weights have another '
          f'tokenizer than data.tokenizer {our_tokenizer.name!r}: pass '
          f'--config.data.tokenizer={spec}, or --config.init_partial=True to '
          'take the weights all the same')


def _check_tokenizer_file(config: objectives.Config, tokenizer: Tokenizer,
                          source: epath.Path) -> None:
  """Checks that the file of a tokenizer is still the one with which another run
  was trained, whose weights are taken.

  Args:
    config: the config of the new run.
    tokenizer: the tokenizer of the new run.
    source: the folder of the run whose weights are taken.

  Raises:
    RequestError: where the file was replaced since then.
  """
  starts = run_config.load_starts(source)
  hash_of_file = pipeline.digest_tokenizer(config, tokenizer)
  changes = provenance.check_data(starts, data=hash_of_file, allowed=True)
  require(not changes, f'init_from is {config.init_from!r}, whose weights '
          f'were trained with what data.tokenizer {tokenizer.name!r} held '
          'before it was replaced: put the file back, or pass '
          '--config.init_partial=True to take the weights all the same')


def _check_labels(run: runs.Run, source: epath.Path) -> None:
  """Checks that the weights of a classifier were trained for the labels of the
  run, in the same order. With others, its outputs would be taken for other
  labels.

  Args:
    run: the run, which may have labels or none.
    source: the folder of the weights: that of a run, or one of Hugging Face.

  Raises:
    RequestError: for other labels, or another order.
  """
  from training.hf import config as hf_config
  if run.model.head == 'lm' or run.config.init_partial:
    return

  # Read the labels of the weights.
  their_labels: tuple[str, ...] = ()
  if storage.has_checkpoints(source):
    their_labels = hf_config.meaningful_labels(run_config.load_labels(source))
  else:
    tree = hf_config.load_config_json(_folder_of_weights(source))
    # In a language model, the labels of the config.json have no meaning.
    if hf_config.model_of_config_json(tree).head != 'lm':
      their_labels = hf_config.read_labels(tree)

  # Compare them if both are known.
  our_labels = tuple(objectives.fill_in_labels(run.config).data.labels)
  if our_labels and their_labels and our_labels != their_labels:
    raise RequestError(
        f'init_from {str(source)!r} has the labels '
        f'{shorten(", ".join(their_labels))}, in this order, and the run '
        f'{shorten(", ".join(our_labels))}: set data.labels to the first')


def _path_of_source(source: str | epath.Path) -> epath.Path:
  """Returns the path of config.init_from, on this machine or in a bucket; what
  is named on the Hugging Face hub is downloaded first."""
  return storage.checked_path(hub.download_if_on_hub(source), 'init_from')


def _folder_of_weights(path: epath.Path) -> epath.Path:
  """Returns the folder of a file of weights, or the folder itself."""
  return path.parent if path.is_file() else path


def _read_hugging_face_weights(run: runs.Run, source: epath.Path, drawn: Any
                               ) -> tuple[Any, list[str]]:
  """Reads the parameters of a run from weights in the Hugging Face format, onto
  the devices of the run.

  Args:
    run: the run, with its config, its model and its devices.
    source: the folder or file of the weights.
    drawn: the randomly drawn parameters of the run. Low-rank adapters are taken
      from these, as they are in no such file.

  Returns:
    The parameters; and a line for each field of the model config and each
    parameter that was skipped because it does not fit.

  Raises:
    RequestError: for weights of another model, unless init_partial allows it.
  """
  from training.hf import config as hf_config, files, weights
  is_partial = run.config.init_partial
  module = architectures.build(weights.without_adapters(run.model))

  # Compare the model of the weights with that of the run. Either may have a
  # head for predicting the next sentence and the other not.
  config_json = hf_config.load_config_json(_folder_of_weights(source))
  their_model = hf_config.model_of_config_json(config_json)
  their_model = dataclasses.replace(
      their_model, next_sentence=module.config.next_sentence)
  skipped = _list_model_differences(
      module.config, their_model=their_model, path=source,
      is_partial=is_partial)

  # Read the weights into a model without adapters, and then add these.
  with run.context():
    loaded = weights.read_params(
        module, source=files.Files(pathlib.Path(source)), partial=is_partial,
        like=weights.remove_adapters(run.abstract_state.params),
        seed=int(runs.seed_of_parameters(run.config)),
        new_head=weights.is_new_head(module.config, their_model))
  return weights.add_adapters(loaded.params, drawn), skipped + loaded.skipped


def _read_weights_of_run(run: runs.Run, source: epath.Path, drawn: Any,
                         step: int | None) -> tuple[Any, list[str]]:
  """Reads the parameters of a run from a checkpoint of another run.

  Args:
    run: the run, with its config, its model and its devices.
    source: the folder of the other run.
    drawn: the parameters of the run as they were drawn. Its low-rank adapters
      are taken where the other model has none, and else those of the
      checkpoint, which must be alike.
    step: the checkpoint; None: the newest good one.

  Returns:
    The parameters, and a line for each thing that was skipped.
  """
  from training.hf import weights

  # Adapters of the same kind are read like all other parameters. Else ours are
  # set aside, to be added as they were drawn.
  their_model = runs.load_run_model_config(source)
  our_model = run.model
  abstract_params = run.abstract_state.params
  initial_params = drawn
  has_same_adapters = weights.same_adapters(our_model, their_model)
  if not has_same_adapters:
    require(not their_model.lora.rank, f'init_from is {str(source)!r}, whose '
            'model has other low-rank adapters than the run: begin with its '
            'export, which python -m tools.convert export writes')
    our_model = weights.without_adapters(our_model)
    abstract_params = weights.remove_adapters(abstract_params)
    initial_params = weights.remove_adapters(drawn)

  # The differences of the models, and of their parameters. All parameters have
  # to fit, but where the head is new or init_partial allows others.
  is_partial = run.config.init_partial
  folder = checkpoints.checkpoint_folder(source)
  skipped = _list_model_differences(
      our_model, their_model=their_model, path=source, is_partial=is_partial)
  params_to_read = {'params': abstract_params}
  saved_arrays = checkpoints.read_array_records(folder, step)
  is_new_head = weights.is_new_head(our_model, their_model)
  if saved_arrays and (is_partial or is_new_head):
    params_to_read, misfit_lines = _split_by_fit(params_to_read, saved_arrays)
    _check_unfitting(our_model, their_model=their_model, source=source,
                     params_to_read=params_to_read, misfit_lines=misfit_lines,
                     is_partial=is_partial)
    skipped += misfit_lines.values()

  # The parameters that fit are read, and the others are as they were drawn: the
  # second `|=` replaces the drawn ones that were read.
  restored = read_parameters(folder, params=params_to_read['params'], step=step)
  if step is None:
    _warn_of_damaged_checkpoints(restored)
  arrays = paths.flatten_by_path(initial_params)
  arrays |= paths.flatten_by_path(restored.state)
  params = checkpoints.nest_by_path(arrays)
  if not has_same_adapters:
    params = weights.add_adapters(params, drawn)
  return params, skipped


def _split_by_fit(our_params: Any, saved_arrays: dict[str, dict]
                  ) -> tuple[dict, dict[str, str]]:
  """Splits the parameters of a run into those that a checkpoint has in the same
  shape and dtype, and those that do not fit.

  Args:
    our_params: the shapes of the parameters, a tree of ShapeDtypeStructs.
    saved_arrays: {name: {'shape': ..., 'dtype': ..., ...}} of the arrays in the
      checkpoint.

  Returns:
    The tree of the parameters that fit; and {name: a line for the user} for
    each one that does not fit, or that only the checkpoint has.
  """
  # The checkpoint also has arrays of the optimiser, which are not to be read.
  # Only names of parameters begin with params/.
  our_arrays = paths.flatten_by_path(our_params)
  misfit_lines = {}
  differences = checkpoints.list_array_differences(saved_arrays, our_arrays)
  for name, line in differences.items():
    if name in our_arrays or name.startswith('params/'):
      misfit_lines[name] = line
  fitting = {}
  for name, x in our_arrays.items():
    if name not in misfit_lines:
      fitting[name] = x
  return checkpoints.nest_by_path(fitting), misfit_lines


def _check_unfitting(our_model: ModelConfig, their_model: ModelConfig,
                     source: epath.Path, params_to_read: dict,
                     misfit_lines: dict[str, str], is_partial: bool) -> None:
  """Checks that the parameters of a checkpoint that fit a run may be taken
  without those that do not.

  Args:
    our_model: the model of the run.
    their_model: the model of the weights.
    source: the folder of the weights.
    params_to_read: the parameters that fit.
    misfit_lines: a line for each path of the others.
    is_partial: config.init_partial, which allows any part to be missing.

  Raises:
    RequestError: where they may not.
  """
  # Beside a generator, an encoder may have a table of tokens that is the sum of
  # the generator's and one of its own: neither fits a model by itself.
  from training.hf import weights
  generator = their_model.find_part(GeneratorConfig)
  if generator is not None and generator.num_layers and (
      generator.sharing != 'whole'):
    raise RequestError(
        f'init_from is {str(source)!r}, whose table of tokens is the sum of '
        'two: begin with its export, which python -m tools.convert export '
        'writes')

  # The head of a task may differ, and a part that only one of the models has.
  only_ours = weights.shapes_only_in_other_model(architectures.build(our_model),
                                                 their_model)
  only_theirs = weights.shapes_only_in_other_model(
      architectures.build(their_model), our_model)
  wrong_lines = []
  for path, line in misfit_lines.items():
    name = path.removeprefix('params/')
    is_task_head = path.startswith(f'params/{weights.TASK_HEAD_FOLDER}')
    if not is_task_head and name not in only_ours | only_theirs:
      wrong_lines.append(line)
  if wrong_lines and not is_partial:
    raise RequestError(
        f'init_from {str(source)!r}: {"; ".join(wrong_lines)}. To take what '
        'fits all the same: --config.init_partial=True')
  require(bool(params_to_read),
          f'init_from is {str(source)!r}, of which nothing fits '
          'this model')


def _list_model_differences(our_model: ModelConfig, their_model: ModelConfig,
                            path: epath.Path, is_partial: bool) -> list[str]:
  """Lists the fields of the model config in which the model of some weights
  computes another function than the model of a run.

  Args:
    our_model: the model of the run.
    their_model: the model of the weights.
    path: the folder of the weights.
    is_partial: config.init_partial: whether to take the weights all the same.

  Returns:
    A line for the user about each such field.

  Raises:
    RequestError: where there is such a field, without init_partial.
  """
  from training.hf import config as hf_config, weights
  # A run may have the head of another task. It may also have another max_len,
  # if positions are not learned.
  if weights.is_new_head(our_model, their_model):
    their_model = dataclasses.replace(
        their_model, head=our_model.head, pooling=our_model.pooling,
        num_labels=our_model.num_labels)
  if our_model.position == their_model.position and (
      math.isinf(positions.longest_supported_length(our_model))):
    their_model = dataclasses.replace(their_model, max_len=our_model.max_len)

  # All other differences are listed.
  different = hf_config.describe_differences(our_model, their_model)
  lines = [f'{line} as in its config.json' for line in different.values()]
  require(is_partial or not lines,
          f'init_from {str(path)!r}: {"; ".join(lines)}. '
          'Set these fields to begin with all of it, or take what fits all the '
          'same: --config.init_partial=True')
  return lines


# From a checkpoint.


def read_parameters(folder: epath.Path, params: Any, step: StepChoice = None, *,
                    live: bool = False) -> checkpoints.RestoredCheckpoint:
  """Reads the parameters of a checkpoint, without the optimiser's state: their
  average, in a run with optim.ema, and else the parameters themselves.

  Args:
    folder: the folder that checkpoints.checkpoint_folder(workdir) returns.
    params: the parameters to read, as ShapeDtypeStructs with shardings.
    step: the checkpoint, or the checkpoints whose mean is taken; None: the
      newest good one.
    live: read the parameters themselves, where there is an average too.

  Returns:
    The checkpoint, with the parameters as its `state`.

  Raises:
    RequestError: there is no such checkpoint, or not of these parameters.
  """
  if isinstance(step, checkpoints.MeanOfSteps):
    return _read_mean_of_checkpoints(folder, params=params, mean_of_steps=step,
                                     live=live)

  def arrays_to_read(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the tree of the arrays to read, given those that were saved. An
    average is kept in float32, of trained parameters alone."""
    leaves = {}
    for path, x in paths.flatten_by_path(params).items():
      if not live and f'ema/{path}' in saved:
        leaves[f'ema/{path}'] = jax.ShapeDtypeStruct(
            x.shape, jnp.float32, sharding=x.sharding)
      else:
        leaves[f'params/{path}'] = x
    return checkpoints.nest_by_path(leaves)

  restored = checkpoints.restore_checkpoint(folder, abstract=arrays_to_read,
                                            step=step, partial=True)

  # The arrays by the path of their parameter, without ema/ or params/ in front.
  arrays = {}
  for path, x in paths.flatten_by_path(restored.state).items():
    _, _, name = path.partition('/')
    arrays[name] = x

  def array_of_parameter(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns the array that was read for a parameter, in its dtype."""
    return arrays[paths.path_to_string(path)].astype(x.dtype)

  state = jax.tree_util.tree_map_with_path(array_of_parameter, params)
  which_parameters = ''
  if 'ema' in restored.state:
    which_parameters = 'the average (optim.ema)'
  return restored._replace(state=state, which_parameters=which_parameters)


def _read_mean_of_checkpoints(folder: epath.Path, params: Any,
                              mean_of_steps: checkpoints.MeanOfSteps, live: bool
                              ) -> checkpoints.RestoredCheckpoint:
  """Reads several checkpoints of a run, and computes the mean of their
  parameters.

  Args:
    folder, params, live: the arguments of `read_parameters`, which reads each
      checkpoint.
    mean_of_steps: the steps of the checkpoints, or how many of the last ones.

  Returns:
    The newest of the checkpoints, with the mean as its `state`.

  Raises:
    RequestError: for more of the last checkpoints than there are.
  """
  available = checkpoints.list_steps(folder)
  if len(available) < mean_of_steps.last:
    names = ', '.join(map(str, available)) or 'none'
    raise RequestError(
        f'the mean of the last {mean_of_steps.last} checkpoints was asked for, '
        f'and {folder} has {len(available)}: {names}')

  # Read the checkpoints, the newest one last.
  steps = sorted(mean_of_steps.steps) or available[-mean_of_steps.last:]
  restored_steps = []
  for step in steps:
    restored = read_parameters(folder, params=params, step=step, live=live)
    restored_steps.append(restored)

  # The mean is returned with the record of the newest checkpoint.
  newest = restored_steps[-1]
  which_parameters = f'the mean of steps {", ".join(map(str, steps))}'
  if newest.which_parameters:
    which_parameters += f', each {newest.which_parameters}'
  mean = mean_of_trees([restored.state for restored in restored_steps])
  return newest._replace(state=mean, which_parameters=which_parameters)


def mean_of_trees(trees: Sequence[Any]):
  """Returns the mean of several trees of arrays of the same shapes, such as
  parameters: added up in float32, and returned in the dtype of each array."""
  # A sum in bfloat16 would lose the small differences between checkpoints.
  def mean_of_arrays(*arrays: jax.Array) -> jax.Array:
    total = sum(x.astype(jnp.float32) for x in arrays)
    return (total / len(arrays)).astype(arrays[0].dtype)
  return jax.tree.map(mean_of_arrays, *trees)


def read_parameters_on_one_device(
    workdir: epath.Path, module: nn.Module, step: StepChoice = None
    ) -> checkpoints.RestoredCheckpoint:
  """Reads the parameters of a run from its checkpoint, for evaluation, onto the
  first device of this process. It prints a warning about each newer checkpoint
  that is damaged and was therefore not read.

  Args:
    workdir: the folder of the run.
    module: the Flax module of the run's model.
    step: the step of the checkpoint; 'best'; None: the newest good one.

  Returns:
    The checkpoint, with the parameters as its `state`.
  """
  on_first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  params = nn.meta.unbox(runs.abstract_params(module))
  shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
                                     sharding=on_first_device), params)
  folder = checkpoints.checkpoint_folder(workdir)
  restored = read_parameters(folder, params=shapes, step=step)
  _warn_of_damaged_checkpoints(restored)
  return restored


def read_parameters_of_run(run: runs.Run, workdir: epath.Path,
                           step: StepChoice = None, live: bool = False
                           ) -> checkpoints.RestoredCheckpoint:
  """Reads the parameters of a run from its checkpoint onto the mesh of the run,
  and prints which checkpoint it is. A warning is printed about each newer one
  that is damaged and was therefore not read.

  Args:
    run: the run, built on its devices.
    workdir: the folder of the run.
    step: the step of the checkpoint; 'best'; several, for the mean of their
      parameters; None: the newest good one.
    live: whether to read the parameters that are trained where a run also keeps
      a moving average of them (optim.ema), which is read by default.

  Returns:
    The checkpoint, with the parameters as its `state`.

  Raises:
    RequestError: for `live` where the run keeps no average.
  """
  if live and not run.config.optim.ema:
    raise RequestError(f'{workdir} keeps no average of its parameters '
                       '(optim.ema is 0): there is nothing to choose. Leave '
                       'out --live')
  restored = read_parameters(
      checkpoints.checkpoint_folder(workdir), params=run.abstract_state.params,
      step=step, live=live)
  _warn_of_damaged_checkpoints(restored)
  text = f'{workdir}, step {restored.step}'
  if restored.which_parameters:
    text += f': {restored.which_parameters}'
  print(text)
  return restored
