"""The parameters that a run has trained, to do something with them."""

import pathlib
import sys

from etils import epath
import flax.linen as nn
import jax

from configs.errors import RequestError, require
from training import runs
from training import step as step_lib
from training.hf import peft
from training.workdir import checkpoints, parameters, storage


def on_one_device(workdir: epath.Path, module: nn.Module,
                  step: int | str | None = None) -> checkpoints.Restored:
  """Returns the parameters of a checkpoint that are evaluated, as its `state`,
  all on one device of this process; warns of checkpoints that were passed over
  because they are damaged.

  Args:
    workdir: the run's folder.
    module: its model.
    step: which checkpoint; 'best'; None: the newest good one.
  """
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
      nn.meta.unbox(step_lib.abstract_params(module)))
  restored = parameters.restore(checkpoints.directory(workdir), shapes, step)
  for sentence in restored.damaged:
    print(f'warning: {sentence}', file=sys.stderr)
  return restored


def of_run(run: runs.Run, workdir: epath.Path,
           step: int | str | checkpoints.Mean | None = None,
           live: bool = False) -> checkpoints.Restored:
  """Returns the parameters of a checkpoint, as its `state`; prints which it is,
  and the checkpoints that were passed over because they are damaged.

  Args:
    run: the run of `workdir`.
    workdir: its folder.
    step: which checkpoint; 'best'; several, for their mean; None: the newest
      good one.
    live: with optim.ema, the parameters themselves and not their average.
  """
  require(run.config.optim.ema or not live, f'{workdir} keeps no average of '
          'its parameters (optim.ema is 0): there is nothing to choose. '
          'Leave out --live')
  restored = parameters.restore(checkpoints.directory(workdir),
                                run.abstract.params, step, live=live)
  for sentence in restored.damaged:
    print(f'warning: {sentence}', file=sys.stderr)
  print(f'{workdir}, step {restored.step}'
        + (f': {restored.what}' if restored.what else ''))
  return restored


def refuse_others(folder: pathlib.Path) -> None:
  """Raises RequestError for a folder that holds models, or a part of one."""
  for name, what in (('study.json', 'study'), ('sweep.json', 'sweep')):
    if (folder / name).is_file():
      runs_in = sorted(str(found.parent) for found in folder.glob(
          f'**/points/*/*/{storage.CHECKPOINTS}'))
      raise RequestError(
          f'{folder} is a {what} of several runs: load one of them, '
          + (f'such as {runs_in[0]} (there are {len(runs_in)})' if runs_in else
             'when it has trained; they lie in points/NAME/seed-S'))
  require(not (folder / peft.CONFIG).is_file()
          or (folder / storage.CONFIG).is_file(), f'{folder} holds low-rank '
          'adapters alone: make a run of them and the model that they adapt by '
          f'python -m tools.convert import MODEL WORKDIR --adapter={folder}')
