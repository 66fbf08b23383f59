"""The parameters that a run has trained, without the run around them."""

import sys
from typing import Any

from etils import epath
import flax.linen as nn
import jax

from training import step as step_lib
from training.workdir import restoring


def params(workdir: epath.Path, module: nn.Module, step: int | None = None
           ) -> Any:
  """Returns the parameters of a checkpoint, all on one device of this process;
  warns of checkpoints that were passed over because they are damaged.

  Args:
    workdir: the run's folder.
    module: its model.
    step: which checkpoint; None: the newest good one.
  """
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
      nn.meta.unbox(step_lib.abstract_params(module)))
  restored = restoring.restore(restoring.directory(workdir),
                               {'params': shapes}, step, partial=True)
  for sentence in restored.damaged:
    print(f'warning: {sentence}', file=sys.stderr)
  return restored.state['params']
