"""The command lines that messages tell a user to run."""

from collections.abc import Container
import importlib
import os
import shlex

import ml_collections

import architectures
from training.workdir import run_config


def to_train(workdir: str | os.PathLike, config: ml_collections.ConfigDict
             ) -> str:
  """Returns the command that trains in `workdir` with this very config."""
  arch = config.model.arch
  return shlex.join(['python', 'train.py', '--config',
                     f'configs/{architectures.file_name(arch)}.py',
                     f'--workdir={workdir}', *flags(config, usual(arch))])


def usual(arch: str) -> ml_collections.ConfigDict:
  """Returns the `tiny` of a system's file of configs/."""
  return importlib.import_module(
      f'configs.{architectures.file_name(arch)}').get_config('tiny')


def flags(wanted: ml_collections.ConfigDict, there: ml_collections.ConfigDict,
          names: Container[str] | None = None) -> list[str]:
  """Returns the words of a command line that make one config of another.

  Args:
    wanted: the config.
    there: the other.
    names: of the fields that matter, dotted; None: all.
  """
  flat, kinds = run_config.flatten(there), wanted.model.kinds.to_dict()
  words = [f'--config.{name}={value}'
           for name, value in run_config.flatten(wanted).items()
           if not name.startswith('model.kinds.') and value != flat[name]
           and (names is None or name in names)]
  if kinds != there.model.kinds.to_dict():
    words.append(f'--config.model.kinds={kinds}')
  return words
