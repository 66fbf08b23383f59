"""Compilers for devices that are not here, kept out of what runs here.

The extras `plan` and `plan-gpu` bring libtpu and a CUDA plugin, to compile for
a TPU or GPU that is not there. JAX takes each for a device that it should find,
searches, and complains. Where this machine shows neither chip, it is told to
look for the CPU alone.
"""

import glob
import importlib.util
import os
import pathlib
import sys

# Device files of TPUs and of GPUs.
_FILES = ('/dev/accel*', '/dev/vfio/*', '/dev/nvidia*', '/dev/dxg', '/dev/kfd')
# Devices on the PCI bus, Google's vendor id, and the classes of its disks and
# network cards, which are no TPUs.
_PCI = '/sys/bus/pci/devices/*'
_GOOGLE, _OTHER_CLASSES = '0x1ae0', ('0x01', '0x02')
# By one of these somebody says that there is a device, or which to take.
_NAMED = ('JAX_PLATFORMS', 'JAX_FORCE_TPU_INIT', 'PJRT_DEVICE', 'TPU_NAME',
          'TPU_WORKER_ID', 'TPU_ACCELERATOR_TYPE')


def hide_absent_devices() -> None:
  """Sets JAX_PLATFORMS=cpu where only compilers of absent devices are here."""
  here = any(importlib.util.find_spec(name) for name in (
      'libtpu', 'jax_cuda13_plugin'))
  if not here or any(name in os.environ for name in _NAMED) or _devices():
    return
  os.environ['JAX_PLATFORMS'] = 'cpu'
  if 'jax' in sys.modules:  # which read it when it was imported
    sys.modules['jax'].config.update('jax_platforms', 'cpu')


def _devices() -> bool:
  return any(glob.glob(pattern) for pattern in _FILES) or any(
      _read(path, 'vendor') == _GOOGLE
      and not _read(path, 'class').startswith(_OTHER_CLASSES)
      for path in glob.glob(_PCI))


def _read(path: str, name: str) -> str:
  return pathlib.Path(path, name).read_text().strip()
