"""Whether the weights that a run starts from are those of its own model."""

import dataclasses
import math
import os
import shlex

from etils import epath
import ml_collections

import architectures
from architectures.parts import positions
from architectures.parts.config import ModelConfig
from configs.errors import RequestError
from training import new_head, runs
from training.hf import config as hf_config
from training.workdir import checkpoints, run_config


def refuse(ours: ModelConfig, theirs: ModelConfig, path: str | os.PathLike,
           partial: bool, config: ml_collections.ConfigDict | None = None
           ) -> list[str]:
  """Returns a line for each field by which the weights in `path` are those of
  another function; unless `partial`, one is a RequestError.

  Args:
    ours: the run's model.
    theirs: that of the weights.
    path: a workdir, or a folder or file of Hugging Face's.
    partial: config.init_partial.
    config: the run's, for the flags that make its model the other one.
  """
  theirs = new_head.put_on(ours, theirs)
  if ours.position == theirs.position and math.isinf(positions.reach(ours)):
    theirs = dataclasses.replace(theirs, max_len=ours.max_len)
  different = hf_config.different(ours, theirs)
  if different and not partial:
    raise RequestError(_refusal(different, epath.Path(path), config))
  return [f'{line} as in its config.json' for line in different.values()]


def _refusal(different: dict[str, str], path: epath.Path,
             config: ml_collections.ConfigDict | None) -> str:
  way, shown = '', different
  if config is not None:
    wanted = config.copy_and_resolve_references()
    with wanted.unlocked():
      wanted.model = _described(path)
    arch = wanted.model.arch
    if arch != config.model.arch:
      way = ('To begin with all of it, take a size of '
             f'configs/{architectures.file_name(arch)}.py. ')
    elif words := run_config.flags(
        wanted, config, {f'model.{name}' for name in different}):
      way = f'To begin with all of it, add {shlex.join(words)}. '
      # The others are derived from these.
      names = {word.split('=')[0].removeprefix('--config.model.')
               for word in words}
      shown = {name: line for name, line in different.items()
               if name in names} or different
  lines = '; '.join(f'{line} as in its config.json' for line in shown.values())
  return (f'init_from {str(path)!r}: {lines}. {way}To take what fits all the '
          'same: --config.init_partial=True')


def _described(path: epath.Path) -> ml_collections.ConfigDict:
  """Returns config.model of the weights in `path`, with what a run derived."""
  if not checkpoints.directory(path).exists():
    folder = path.parent if path.is_file() else path
    return hf_config.fields_and_notes(hf_config.load_config_json(folder))[0]
  model = runs.config_of(path).model
  for name, value in run_config.load_derived(path).items():
    if name.startswith('model.'):
      model[name.removeprefix('model.')] = value
  return model
