"""How a run goes: devices, data, objectives, optimiser, step, checkpoints."""

import glob
import importlib.util
import os
import sys

# Device files of TPUs and of GPUs.
_DEVICE_FILES = ('/dev/accel*', '/dev/vfio/*', '/dev/nvidia*', '/dev/dxg',
                 '/dev/kfd')
# By one of these somebody says that there is a device, or which to take.
_VARIABLES_NAMING_DEVICES = ('JAX_PLATFORMS', 'JAX_FORCE_TPU_INIT',
                             'PJRT_DEVICE', 'TPU_NAME',
                             'TPU_WORKER_ID', 'TPU_ACCELERATOR_TYPE')


def hide_absent_devices() -> None:
  """Sets JAX_PLATFORMS=cpu where the extras `plan` and `plan-gpu` have brought
  compilers for devices that are not here: JAX would search for them, and
  complain."""
  compilers = any(importlib.util.find_spec(name) for name in (
      'libtpu', 'jax_cuda13_plugin'))
  is_named = any(name in os.environ for name in _VARIABLES_NAMING_DEVICES)
  has_device = any(map(glob.glob, _DEVICE_FILES))
  if compilers and not is_named and not has_device:
    os.environ['JAX_PLATFORMS'] = 'cpu'
    if 'jax' in sys.modules:  # which read it when it was imported
      sys.modules['jax'].config.update('jax_platforms', 'cpu')


hide_absent_devices()  # here, so that no program forgets it
