"""The state that a run starts from: drawn, or with weights of another one.

Weights come from a workdir or from Hugging Face's format. They must be those
of the same function; with init_partial what fits is taken, the rest is as it
was drawn, and every difference is listed.
"""

import os
import sys

import architectures
from architectures.parts.config import ModelConfig
from configs.errors import require
from training import paths
from training import state as state_lib
from training.workdir import restoring
from training.workdir import run_config
from training.workdir import storage


def check(source: str) -> None:
  """Raises RequestError where config.init_from names nothing that is there."""
  if source:
    path = storage.path(source, 'init_from')
    require(storage.in_bucket(source) or os.path.exists(path),
            f'init_from is {source!r}: no such folder or file')


def create(run, source) -> state_lib.TrainState:
  """Returns the state of a run before its first step.

  Args:
    run: a runs.Run.
    source: config.init_from; '' for none.

  Raises:
    ValueError: for a source that is none, or of another model.
  """
  with run.context():
    state = state_lib.create(run.module, run.tx, run.abstract, run.config.seed)
  if not str(source):
    return state
  params, skipped = _read(run, storage.path(source, 'init_from'),
                          state.params)
  for line in skipped:
    print(f'skipped: {line}')
  return state.replace(params=params)


def _read(run, source, drawn):
  """Returns (parameters, a line for each thing that was skipped)."""
  partial = run.config.init_partial
  check(str(source))
  if restoring.directory(source).exists():
    return from_workdir(run, source, drawn, partial)
  from training import weights
  with run.context():
    return weights.start(source, run.module, like=run.abstract.params,
                         partial=partial, seed=run.config.seed)


def from_workdir(run, source, drawn, partial: bool):
  """Returns (parameters, skipped) of the newest good checkpoint there."""
  from training import weights
  folder = restoring.directory(source)
  skipped = weights.other_function(
      run.model, model(source), source, partial)
  wanted = {'params': run.abstract.params}
  saved = restoring.arrays(folder)
  if partial and saved:
    wanted, more = _fitting(wanted, saved)
    skipped += more
    require(wanted, f'init_from is {str(source)!r}, of which nothing fits this '
            'model')
  restored = restoring.restore(folder, wanted, partial=True)
  for sentence in restored.damaged:
    print(f'warning: {sentence}', file=sys.stderr)
  found = paths.flatten(restored.state)
  flat = {f'params/{path}': x for path, x in paths.flatten(drawn).items()}
  return restoring.nest(flat | found)['params'], skipped


def model(workdir) -> ModelConfig:
  """Returns the model of a run, for which its tokenizer need not be there."""
  from training import runs  # which imports this file
  config = runs.with_new_fields(run_config.load(workdir))
  fields = config.model.to_dict()
  for name, value in run_config.load_derived(workdir).items():
    fields[name.removeprefix('model.')] = value
  return architectures.resolve(fields)


def _fitting(wanted, saved) -> tuple[dict, list[str]]:
  """Returns what of `wanted` is in `saved` alike, and a line for the rest."""
  fits, lines = {}, []
  for name, x in paths.flatten(wanted).items():
    here = f'{x.dtype}{list(x.shape)}'
    if name not in saved:
      lines.append(f'{name} is not in the checkpoint')
      continue
    there = f'{saved[name]["dtype"]}{saved[name]["shape"]}'
    if here == there:
      fits[name] = x
    else:
      lines.append(f'{name} is {there} in the checkpoint and {here} here')
  lines += [f'{name} of the checkpoint has no place in the model'
            for name in saved if name.startswith('params/')
            and name not in paths.flatten(wanted)]
  return restoring.nest(fits), lines


def has_parameters_alone(folder) -> bool:
  """Whether a checkpoint folder is what tools.convert makes: weights that no
  optimiser has seen."""
  saved = restoring.arrays(folder)
  return bool(saved) and all(name.startswith('params/') for name in saved)
