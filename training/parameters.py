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
from common.errors import RequestError, require, short
from training import hub, objectives, runs
from training.data.tokenizers import Tokenizer
from training.distributed import devices
from training.objectives import pipeline
from training.workdir import checkpoints, provenance, run_config, storage

StepChoice = int | str | checkpoints.MeanOfSteps | None


def restore_run(run: runs.Run, saved: checkpoints.Checkpoints
                ) -> checkpoints.RestoredCheckpoint | None:
  """Returns the newest good checkpoint of a run, and goes on from it; None
  where the run begins. One that tools.convert made has parameters alone: its
  state is that of a run before its first step with them."""
  if not checkpoints.list_steps(saved.directory):
    return None

  def wanted(arrays: dict[str, dict]) -> runs.TrainState | None:
    """Returns the state to read; None: there is only a record to read."""
    if checkpoints.has_only_parameters(arrays):
      return None
    return run.abstract

  restored = checkpoints.restore_checkpoint(saved.directory, wanted)
  if devices.primary():
    _warn_of_damaged_checkpoints(restored)
  # A converted run has parameters and nothing else.
  if restored.state is None:
    state = create_state(run, saved.directory.parent, restored.step)
    restored = restored._replace(state=state)
    if devices.primary():
      print('starting from the parameters in this workdir')
  saved.go_on_from(restored)
  return restored


def _warn_of_damaged_checkpoints(restored: checkpoints.RestoredCheckpoint
                                 ) -> None:
  """Prints which checkpoints were passed over because they are damaged."""
  for sentence in restored.damaged:
    print(f'warning: {sentence}', file=sys.stderr)


# From the weights of another training.


def create_state(run: runs.Run, source: str | epath.Path,
                 step: int | None = None
                 ) -> runs.TrainState:
  """Returns the state of a run before its first step.

  Args:
    run: the run.
    source: config.init_from; '' for none.
    step: the checkpoint of a workdir; None: the newest good one.

  Raises:
    RequestError: for a source that is none, or of another model.
  """
  state = run.new_state()
  if not str(source):
    return state
  check_init_from(str(source))
  path = _path_of_source(source)
  _check_labels(run, path)
  # The source is a folder of a run, or one of Hugging Face.
  if storage.has_checkpoints(path):
    params, skipped = _read_weights_of_run(run, source=path, drawn=state.params,
                                           step=step)
  else:
    params, skipped = _read_hugging_face_weights(run, path, state.params)
  for line in skipped:
    print(f'skipped: {line}')
  return run.with_params(state, params)


def check_init_from(source: str) -> None:
  """Raises RequestError where config.init_from names nothing that is there."""
  path = _path_of_source(source)
  if not source or storage.is_in_bucket(path):
    return
  require(os.path.exists(path),
          f'init_from is {source!r}: no such folder or file (one of the hub '
          'is hf://ORG/NAME)')
  if storage.has_config(path) and not run_config.has_begun(path):
    raise RequestError(f'init_from is {source!r}, the folder of a run that has '
                       'no checkpoint')


def check_tokenizer_of_weights(config: objectives.Config,
                               ours: Tokenizer) -> None:
  """Raises RequestError where the ids of a run stand for other pieces of text
  than those for which the weights of config.init_from were trained, unless
  init_partial; their tokenizer is not compared where it cannot be read."""
  from training.data import tokenizers
  from training.hf import tokenizer as hf_tokenizer
  ignored = 'data.tokenizer' in objectives.of(config).ignores
  if not config.init_from or config.init_partial or ignored:
    return

  # The tokenizer of the weights, by its name or folder.
  path = _path_of_source(config.init_from)
  if storage.has_checkpoints(path):
    spec = run_config.load_config(path).data.tokenizer
    _check_tokenizer_file(config, ours, path)
  elif hub.repository_of_name(config.init_from):
    spec = config.init_from
  else:
    spec = str(_folder_of_weights(path))

  # Its vocabulary, if it can be read.
  if spec == config.data.tokenizer or hf_tokenizer.is_stand_in(spec):
    return
  try:
    theirs = tokenizers.load(spec)
  except RequestError:
    return
  require(ours.vocabulary == theirs.vocabulary, f'init_from is '
          f'{config.init_from!r}, whose weights have another tokenizer than '
          f'data.tokenizer {ours.name!r}: pass --config.data.tokenizer={spec}, '
          'or --config.init_partial=True to take the weights all the same')


def _check_tokenizer_file(config: objectives.Config, ours: Tokenizer,
                          source: epath.Path) -> None:
  """Raises RequestError where the tokenizer of a run holds something else than
  it held when the run in `source` was trained with it."""
  starts = run_config.load_starts(source)
  contents = pipeline.of_tokenizer(config, ours)
  replaced = provenance.check_data(starts, contents, allowed=True)
  require(not replaced, f'init_from is {config.init_from!r}, whose weights '
          f'were trained with what data.tokenizer {ours.name!r} held before '
          'it was replaced: put the file back, or pass '
          '--config.init_partial=True to take the weights all the same')


def _check_labels(run: runs.Run, source: epath.Path) -> None:
  """Raises RequestError where the outputs of the head that is taken stand for
  other labels than those of the run."""
  from training.hf import config as hf_config
  if run.model.head == 'lm' or run.config.init_partial:
    return
  theirs: tuple[str, ...] = ()
  if storage.has_checkpoints(source):
    theirs = hf_config.meaningful_labels(run_config.load_labels(source))
  else:
    tree = hf_config.load_config_json(_folder_of_weights(source))
    # A language model's table of labels says nothing.
    if hf_config.read(tree).head != 'lm':
      theirs = hf_config.labels(tree)
  ours = tuple(objectives.with_labels(run.config).data.labels)
  if ours and theirs and ours != theirs:
    raise RequestError(
        f'init_from {str(source)!r} has the labels {short(", ".join(theirs))}, '
        f'in this order, and the run {short(", ".join(ours))}: set data.labels '
        'to the first')


def _path_of_source(source: str | epath.Path) -> epath.Path:
  """Returns the path of a source on this machine or in a bucket."""
  return storage.checked_path(hub.download_if_on_hub(source), 'init_from')


def _folder_of_weights(path: epath.Path) -> epath.Path:
  """Returns the folder of a file, or the folder itself."""
  return path.parent if path.is_file() else path


def _read_hugging_face_weights(run: runs.Run, source: epath.Path, drawn: Any
                               ) -> tuple[Any, list[str]]:
  """Reads the weights of a Hugging Face folder or file.

  Args:
    run: the run.
    source: the folder or file.
    drawn: the parameters of the run as they were drawn, of which its low-rank
      adapters are taken.

  Returns:
    The parameters, and a line for each thing that was skipped.
  """
  from training.hf import config as hf_config, files, weights
  partial = run.config.init_partial
  module = architectures.build(weights.without_adapters(run.model))
  config_json = hf_config.load_config_json(_folder_of_weights(source))
  theirs = hf_config.read(config_json)
  # Optional heads are drawn or passed over.
  theirs = dataclasses.replace(
      theirs, next_sentence=module.config.next_sentence)
  skipped = _list_model_differences(module.config, theirs=theirs, path=source,
                                    partial=partial)
  with run.context():
    loaded = weights.read_params(
        module, source=files.Files(pathlib.Path(source)), partial=partial,
        like=weights.without(run.abstract.params),
        seed=int(runs.seed_of_parameters(run.config)),
        new_head=weights.is_new_head(module.config, theirs))
  return weights.beside(loaded.params, drawn), skipped + loaded.skipped


def _read_weights_of_run(run: runs.Run, source: epath.Path, drawn: Any,
                         step: int | None) -> tuple[Any, list[str]]:
  """Reads the weights of a checkpoint of another run.

  Args:
    run: the run.
    source: the folder of the other run.
    drawn: the parameters of the run as they were drawn. Its low-rank adapters
      are taken where the other model has none, and else those of the
      checkpoint, which must be alike.
    step: the checkpoint; None: the newest good one.

  Returns:
    The parameters, and a line for each thing that was skipped.
  """
  from training.hf import weights
  theirs = runs.load_run_model_config(source)
  model = run.model
  abstract = run.abstract.params
  initial = drawn
  same_adapters = weights.same_adapters(model, theirs)
  if not same_adapters:
    require(not theirs.lora.rank, f'init_from is {str(source)!r}, whose model '
            'has other low-rank adapters than the run: begin with its export, '
            'which python -m tools.convert export writes')
    model = weights.without_adapters(model)
    abstract = weights.without(abstract)
    initial = weights.without(drawn)

  # The differences of the models, and of their parameters.
  partial = run.config.init_partial
  folder = checkpoints.checkpoint_folder(source)
  skipped = _list_model_differences(model, theirs=theirs, path=source,
                                    partial=partial)
  wanted = {'params': abstract}
  saved = checkpoints.read_array_records(folder, step)
  if saved and (partial or weights.is_new_head(model, theirs)):
    wanted, lines = _split_by_fit(wanted, saved)
    _check_unfitting(model, theirs=theirs, source=source, wanted=wanted,
                     lines=lines, partial=partial)
    skipped += lines.values()

  # The parameters that fit are read, and the others are as they were drawn.
  restored = read_parameters(folder, wanted['params'], step)
  if step is None:
    _warn_of_damaged_checkpoints(restored)
  params = checkpoints.nest_by_path(
      paths.flatten_by_path(initial) | paths.flatten_by_path(restored.state))
  if not same_adapters:
    params = weights.beside(params, drawn)
  return params, skipped


def _split_by_fit(wanted: Any, saved: dict[str, dict]
                  ) -> tuple[dict, dict[str, str]]:
  """Returns the part of `wanted` that is alike in `saved`, and a line for each
  path of the rest."""
  flat = paths.flatten_by_path(wanted)
  lines = {}
  for name, line in checkpoints.list_array_differences(saved, flat).items():
    if name in flat or name.startswith('params/'):
      lines[name] = line
  fitting = {name: x for name, x in flat.items() if name not in lines}
  return checkpoints.nest_by_path(fitting), lines


def _check_unfitting(ours: ModelConfig, theirs: ModelConfig, source: epath.Path,
                     wanted: dict, lines: dict[str, str],
                     partial: bool) -> None:
  """Raises RequestError unless the parameters that fit may be taken without
  those that do not.

  Args:
    ours: the model of the run.
    theirs: the model of the weights.
    source: the folder of the weights.
    wanted: the parameters that fit.
    lines: a line for each path of the others.
    partial: config.init_partial.
  """
  from training.hf import weights
  generator = theirs.find(GeneratorConfig)
  if generator is not None and generator.num_layers and (
      generator.sharing != 'whole'):
    raise RequestError(
        f'init_from is {str(source)!r}, whose table of tokens is the sum of '
        'two: begin with its export, which python -m tools.convert export '
        'writes')

  # The head of a task, and what one of the two models is without, may differ.
  ours_apart = weights.left_out(architectures.build(ours), theirs)
  theirs_apart = weights.left_out(architectures.build(theirs), ours)
  wrong = []
  for path, line in lines.items():
    name = path.removeprefix('params/')
    is_task = path.startswith(f'params/{weights.TASK}')
    if not is_task and name not in ours_apart | theirs_apart:
      wrong.append(line)
  if wrong and not partial:
    raise RequestError(
        f'init_from {str(source)!r}: {"; ".join(wrong)}. To take what fits all '
        'the same: --config.init_partial=True')
  require(bool(wanted), f'init_from is {str(source)!r}, of which nothing fits '
          'this model')


def _list_model_differences(ours: ModelConfig, theirs: ModelConfig,
                            path: epath.Path,
                            partial: bool) -> list[str]:
  """Returns a line for each field by which weights are those of another
  function than the run's model. The length may differ where no position is
  learned.

  Args:
    ours: the model of the run.
    theirs: the model of the weights.
    path: the folder of the weights.
    partial: config.init_partial, without which such a field is refused.
  """
  from training.hf import config as hf_config, weights
  # The head of a new task may differ, and the longest text where no position
  # is learned.
  if weights.is_new_head(ours, theirs):
    theirs = dataclasses.replace(
        theirs, head=ours.head, pooling=ours.pooling,
        num_labels=ours.num_labels)
  has_no_end = math.isinf(positions.longest_supported_length(ours))
  if ours.position == theirs.position and has_no_end:
    theirs = dataclasses.replace(theirs, max_len=ours.max_len)
  different = hf_config.different(ours, theirs)
  lines = [f'{line} as in its config.json' for line in different.values()]
  require(partial or not lines, f'init_from {str(path)!r}: {"; ".join(lines)}. '
          'Set these fields to begin with all of it, or take what fits all the '
          'same: --config.init_partial=True')
  return lines


# From a checkpoint.


def read_parameters(folder: epath.Path, params: Any, step: StepChoice = None, *,
                    live: bool = False) -> checkpoints.RestoredCheckpoint:
  """Returns a checkpoint whose `state` are parameters.

  Args:
    folder: the folder that checkpoints.checkpoint_folder(workdir) returns.
    params: the parameters to read, as ShapeDtypeStructs with shardings.
    step: the checkpoint, or the checkpoints whose mean is taken; None: the
      newest good one.
    live: take the parameters themselves, where an average is kept as well.

  Raises:
    RequestError: there is no such checkpoint, or not of these parameters.
  """
  if isinstance(step, checkpoints.MeanOfSteps):
    return _read_mean_of_checkpoints(folder, params=params, wanted=step,
                                     live=live)

  def wanted(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays to read, given those that were saved."""
    leaves = {}
    for path, x in paths.flatten_by_path(params).items():
      if not live and f'ema/{path}' in saved:
        leaves[f'ema/{path}'] = jax.ShapeDtypeStruct(
            x.shape, jnp.float32, sharding=x.sharding)
      else:
        leaves[f'params/{path}'] = x
    return checkpoints.nest_by_path(leaves)

  restored = checkpoints.restore_checkpoint(folder, abstract=wanted, step=step,
                                            partial=True)

  # The tree of parameters, whichever part of the state each one is from.
  arrays = {}
  for path, x in paths.flatten_by_path(restored.state).items():
    _, _, name = path.partition('/')
    arrays[name] = x

  def restored_array(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns the array that was read for a parameter, in its type."""
    return arrays[paths.path_to_string(path)].astype(x.dtype)

  state = jax.tree_util.tree_map_with_path(restored_array, params)
  what = 'the average (optim.ema)' if 'ema' in restored.state else ''
  return restored._replace(state=state, what=what)


def _read_mean_of_checkpoints(folder: epath.Path, params: Any,
                              wanted: checkpoints.MeanOfSteps, live: bool
                              ) -> checkpoints.RestoredCheckpoint:
  """Returns the mean of several checkpoints; see `of_checkpoint`.

  Args:
    folder, params, live: those of `of_checkpoint`.
    wanted: the checkpoints whose mean is taken.
  """
  available = checkpoints.list_steps(folder)
  if len(available) < wanted.last:
    names = ', '.join(map(str, available)) or 'none'
    raise RequestError(
        f'the mean of the last {wanted.last} checkpoints was asked for, and '
        f'{folder} has {len(available)}: {names}')
  steps = sorted(wanted.steps) or available[-wanted.last:]
  each = []
  for step in steps:
    each.append(read_parameters(folder, params=params, step=step, live=live))
  # The record of the mean is that of the newest one.
  newest = each[-1]
  what = f'the mean of steps {", ".join(map(str, steps))}'
  if newest.what:
    what += f', each {newest.what}'
  return newest._replace(
      state=mean_of_trees([restored.state for restored in each]), what=what)


def mean_of_trees(trees: Sequence[Any]):
  """Returns the mean of trees of parameters, taken in float32, in their own
  dtype."""
  def mean_leaf(*leaves: jax.Array) -> jax.Array:
    total = sum(x.astype(jnp.float32) for x in leaves)
    return (total / len(leaves)).astype(leaves[0].dtype)
  return jax.tree.map(mean_leaf, *trees)


def read_parameters_on_one_device(workdir: epath.Path, module: nn.Module,
                                  step: StepChoice = None
                                  ) -> checkpoints.RestoredCheckpoint:
  """Returns the parameters of a checkpoint that are evaluated, as its `state`,
  all on one device of this process; warns of checkpoints that were passed over
  because they are damaged.

  Args:
    workdir: the folder of the run.
    module: the model of the run.
    step: the checkpoint; 'best'; None: the newest good one.
  """
  # Every parameter is placed on the first device of this process.
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  params = nn.meta.unbox(runs.abstract_params(module))
  shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), params)
  restored = read_parameters(checkpoints.checkpoint_folder(workdir), shapes,
                             step)
  _warn_of_damaged_checkpoints(restored)
  return restored


def read_parameters_of_run(run: runs.Run, workdir: epath.Path,
                           step: StepChoice = None,
                           live: bool = False
                           ) -> checkpoints.RestoredCheckpoint:
  """Returns the parameters of a checkpoint of a run, as its `state`; prints
  which it is, and the checkpoints that were passed over as damaged.

  Args:
    run: the run of `workdir`.
    workdir: the folder of the run.
    step: the checkpoint; 'best'; several, for their mean; None: the newest
      good one.
    live: with optim.ema, the parameters themselves and not their average.
  """
  if live and not run.config.optim.ema:
    raise RequestError(f'{workdir} keeps no average of its parameters '
                       '(optim.ema is 0): there is nothing to choose. Leave '
                       'out --live')
  restored = read_parameters(checkpoints.checkpoint_folder(workdir),
                             params=run.abstract.params, step=step, live=live)
  _warn_of_damaged_checkpoints(restored)
  which = f': {restored.what}' if restored.what else ''
  print(f'{workdir}, step {restored.step}{which}')
  return restored
