"""How a run goes: devices, data, objectives, optimiser, step, checkpoints."""

import glob
import importlib.util
import os
import sys

# Device files of TPUs and of GPUs.
_DEVICE_FILES = ('/dev/accel*', '/dev/vfio/*', '/dev/nvidia*', '/dev/dxg',
                 '/dev/kfd')
# The variables of the environment that say that there is a device, or which one
# to take.
_VARIABLES_NAMING_DEVICES = ('JAX_PLATFORMS', 'JAX_FORCE_TPU_INIT',
                             'PJRT_DEVICE', 'TPU_NAME',
                             'TPU_WORKER_ID', 'TPU_ACCELERATOR_TYPE')


def hide_absent_devices() -> None:
  """Makes JAX use the CPU (JAX_PLATFORMS=cpu) if compilers for TPUs or GPUs are
  installed, as by the extras `plan` and `plan-gpu`, but this machine has no
  such device. JAX would otherwise search for one, and complain.
  """
  has_compilers = any(importlib.util.find_spec(name) for name in (
      'libtpu', 'jax_cuda13_plugin'))
  is_named = any(name in os.environ for name in _VARIABLES_NAMING_DEVICES)
  has_device = any(map(glob.glob, _DEVICE_FILES))
  if has_compilers and not is_named and not has_device:
    os.environ['JAX_PLATFORMS'] = 'cpu'
    # JAX reads the variable when it is imported. If that is too late, tell it.
    if 'jax' in sys.modules:
      sys.modules['jax'].config.update('jax_platforms', 'cpu')


hide_absent_devices()  # here, so that no program forgets it
