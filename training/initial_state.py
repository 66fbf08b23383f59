"""The state that a run starts from: drawn, or with weights of another one.

Weights come from a workdir or from Hugging Face's format. They must be those
of the same function, or of a language model's under the head of a task
(new_head.py); with init_partial what fits is taken, the rest is as it was
drawn, and every difference is listed.
"""

import dataclasses
import os
import sys
from typing import Any

from etils import epath
import ml_collections

import architectures
from architectures.parts.config import ModelConfig
from configs.errors import require, short
from training import adapters, new_head, objectives, paths, runs, weights
from training.distributed import devices
from training.hf import config as hf_config
from training.hf import heads as hf_heads
from training.step import TrainState, initial_seed, parameter_shapes
from training.workdir import checkpoints, other_model, parameters, run_config
from training.workdir import storage


def restore_or_create(run: runs.Run, saved: checkpoints.Checkpoints
                      ) -> tuple[TrainState, int]:
  """Returns the state and the index of the next batch."""
  restored = restore(run, saved)
  if restored is None:
    if devices.primary():
      print(_from(run.config))
    return create(run, run.config.init_from), 0
  if devices.primary() and 0 < restored.step < run.config.train.steps:
    print(f'going on from step {restored.step}')
    for change in checkpoints.environment_changes(restored.record):
      print(f'not bit for bit, since this has changed: {change}')
  return restored.state, restored.record['next_batch']


def some_fit(workdir: epath.Path, model: ModelConfig) -> bool:
  """Whether a new run of `model` could take some of the parameters of the run
  in a workdir, by init_partial; before there are devices."""
  theirs = run_config.flatten(run_config.load_config(workdir))
  if theirs.get('model.lora.rank'):
    return False  # of adapters it takes no part
  folder = checkpoints.directory(workdir)
  steps = checkpoints.finished(folder)
  saved = checkpoints.arrays(folder, steps[-1]) if steps else {}
  shapes = parameter_shapes(architectures.build(model))
  return bool(_fitting({'params': shapes}, saved)[0])


def _from(config: ml_collections.ConfigDict) -> str:
  if config.init_from:
    return f'starting from the parameters in {config.init_from} (init_from)'
  seed = f'init_seed {config.init_seed} and ' * bool(config.init_seed)
  return f'starting from random parameters, drawn from {seed}seed {config.seed}'


def restore(run: runs.Run, saved: checkpoints.Checkpoints
            ) -> checkpoints.Restored | None:
  """Returns the newest good checkpoint, as Checkpoints.restore does; None where
  a run begins. One that tools.convert made has parameters alone, and its state
  is that of a run before its first step with them."""
  if not checkpoints.steps(saved.directory):
    return None
  restored = checkpoints.restore(
      saved.directory,
      lambda arrays: None if checkpoints.parameters_alone(arrays) else
      run.abstract)
  if devices.primary():
    _warn(restored)
  if restored.state is None:
    if devices.primary():
      print('starting from the parameters in this workdir')
    restored = dataclasses.replace(restored, state=create(
        run, saved.directory.parent, restored.step))
  saved.go_on_from(restored)
  return restored


def _warn(restored: checkpoints.Restored) -> None:
  for sentence in restored.damaged:
    print(f'warning: {sentence}', file=sys.stderr)


def check_source(source: str) -> None:
  """Raises RequestError where config.init_from names nothing that is there."""
  if source:
    path = storage.path(source, 'init_from')
    require(storage.in_bucket(source) or os.path.exists(path),
            f'init_from is {source!r}: no such folder or file')


def create(run: runs.Run, source: str | epath.Path, step: int | None = None
           ) -> TrainState:
  """Returns the state of a run before its first step.

  Args:
    run: the run.
    source: config.init_from; '' for none.
    step: of a workdir, which checkpoint; None: the newest good one.

  Raises:
    ValueError: for a source that is none, or of another model.
  """
  state = run.new_state()
  if not str(source):
    return state
  params, skipped = _read(run, storage.path(source, 'init_from'),
                          state.params, step)
  for line in skipped:
    print(f'skipped: {line}')
  return run.with_params(state, params)


def _read(run: runs.Run, source: epath.Path, drawn: Any,
          step: int | None = None) -> tuple[Any, list[str]]:
  """Returns (parameters, a line for each thing that was skipped)."""
  partial = run.config.init_partial
  check_source(str(source))
  _check_labels(run, source)
  if checkpoints.directory(source).exists():
    return _from_workdir(run, source, drawn, partial, step)
  with run.context():
    params, skipped = weights.params_to_start_from(
        source, architectures.build(adapters.plain(run.model)),
        like=adapters.without(run.abstract.params), partial=partial,
        seed=int(initial_seed(run.config)), config=run.config)
  return adapters.beside(params, drawn), skipped


def _check_labels(run: runs.Run, source: epath.Path) -> None:
  """Raises RequestError where the outputs of the head that is taken stand for
  other labels than those of the run."""
  if run.model.head == 'lm' or run.config.init_partial:
    return
  if checkpoints.directory(source).exists():
    theirs = hf_heads.told(run_config.labels(source))
  else:
    folder = source.parent if source.is_file() else source
    tree = hf_config.load_config_json(folder)
    # That of a language model has a table that says nothing.
    theirs = hf_heads.labels(tree) if hf_config.read(tree).head != 'lm' else ()
  ours = tuple(objectives.with_labels(run.config).data.labels)
  require(ours == theirs or not (ours and theirs), f'init_from {str(source)!r} '
          f'has the labels {short(", ".join(theirs))}, in this order, and the '
          f'run {short(", ".join(ours))}: set data.labels to the first')


def _from_workdir(run: runs.Run, source: epath.Path, drawn: Any,
                  partial: bool, step: int | None = None
                  ) -> tuple[Any, list[str]]:
  """Returns (parameters, skipped) of the newest good checkpoint there, or of
  that of `step`. Its adapters are taken where they are those of this run; else
  they are merged into the weights, and those of this run are drawn."""
  folder, theirs = checkpoints.directory(source), runs.model_of(source)
  if not adapters.same(run.model, theirs):
    if theirs.lora.rank:
      return _from_adapted(run, source, theirs, drawn, partial, step)
    params, skipped = _from_workdir(
        _without_adapters(run), source, adapters.without(drawn), partial,
        step)
    return adapters.beside(params, drawn), skipped
  skipped = other_model.refuse(run.model, theirs, source, partial, run.config)
  wanted = {'params': run.abstract.params}
  saved = checkpoints.arrays(folder, step)
  put_on = new_head.is_put_on(run.model, theirs)
  if (partial or put_on) and saved:
    wanted, more = _fitting(wanted, saved)
    wrong = [line for path, line in more.items() if not (
        path.startswith(f'params/{new_head.TASK}')
        or path.removeprefix('params/') in new_head.left_out(run.module))]
    require(partial or not wrong, f'init_from {str(source)!r}: '
            + '; '.join(wrong) + '. To take what fits all the same: '
            '--config.init_partial=True')
    skipped += more.values()
    require(wanted, f'init_from is {str(source)!r}, of which nothing fits this '
            'model')
  restored = parameters.restore(folder, wanted['params'], step)
  if step is None:
    _warn(restored)
  return checkpoints.nest(paths.flatten(drawn)
                        | paths.flatten(restored.state)), skipped


def _without_adapters(run: runs.Run) -> runs.Run:
  model = adapters.plain(run.model)
  params = adapters.without(run.abstract.params)
  return dataclasses.replace(
      run, model=model, module=architectures.build(model),
      abstract=run.abstract.replace(params=params))


def _from_adapted(run: runs.Run, source: epath.Path, theirs: ModelConfig,
                  drawn: Any, partial: bool, step: int | None
                  ) -> tuple[Any, list[str]]:
  """Returns (parameters, skipped) of a workdir whose model has other adapters
  than that of `run`."""
  require(not partial, f'init_from is {str(source)!r}, whose model has '
          'low-rank adapters, of which init_partial takes no part: merge them '
          'first, by python -m tools.convert merge')
  skipped = other_model.refuse(run.model, theirs, source, partial, run.config)
  other = runs.Run.of(run.config, theirs, run.mesh)
  restored = parameters.restore(checkpoints.directory(source),
                                other.abstract.params, step)
  if step is None:
    _warn(restored)
  print(f'{source}: its low-rank adapters are merged into the weights')
  with run.context():
    _, params = adapters.merge(other.module, restored.state)
  flat, found = paths.flatten(drawn), paths.flatten(params)
  return checkpoints.nest(flat | {path: x for path, x in found.items()
                                if path in flat}), skipped


def _fitting(wanted: Any, saved: dict[str, dict]
             ) -> tuple[dict, dict[str, str]]:
  """Returns what of `wanted` is in `saved` alike, and a line for each path of
  the rest."""
  fits, lines = {}, {}
  for name, x in paths.flatten(wanted).items():
    here = f'{x.dtype}{list(x.shape)}'
    if name not in saved:
      lines[name] = f'{name} is not in the checkpoint'
      continue
    there = f'{saved[name]["dtype"]}{saved[name]["shape"]}'
    if here == there:
      fits[name] = x
    else:
      lines[name] = f'{name} is {there} in the checkpoint and {here} here'
  lines |= {name: f'{name} of the checkpoint has no place in the model'
            for name in saved if name.startswith('params/')
            and name not in paths.flatten(wanted)}
  return checkpoints.nest(fits), lines


def has_parameters_alone(folder: epath.Path) -> bool:
  """Whether a checkpoint folder is what tools.convert makes: weights that no
  optimiser has seen."""
  return checkpoints.parameters_alone(checkpoints.arrays(folder))
