"""The parameters that a run has trained, to do something with them."""

import sys

from etils import epath
import flax.linen as nn
import jax

from configs.errors import require
from training import runs
from training import step as step_lib
from training.workdir import parameters, restoring, step_folders


def on_one_device(workdir: epath.Path, module: nn.Module,
                  step: int | str | None = None) -> restoring.Restored:
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
  restored = parameters.restore(restoring.directory(workdir), shapes, step)
  for sentence in restored.damaged:
    print(f'warning: {sentence}', file=sys.stderr)
  return restored


def of_run(run: runs.Run, workdir: epath.Path,
           step: int | str | step_folders.Mean | None = None,
           live: bool = False) -> restoring.Restored:
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
  restored = parameters.restore(restoring.directory(workdir),
                                run.abstract.params, step, live=live)
  for sentence in restored.damaged:
    print(f'warning: {sentence}', file=sys.stderr)
  print(f'{workdir}, step {restored.step}'
        + (f': {restored.what}' if restored.what else ''))
  return restored
