"""The threads that several devices of a CPU need."""

import os

import pytest

from training.distributed import cpu

EIGHT = '--xla_force_host_platform_device_count=8'


@pytest.mark.parametrize('flags, before, after', [
    (EIGHT, None, '32'),
    (f'{EIGHT} --xla_force_host_platform_device_count=16', None, '64'),
    (EIGHT, '9', '9'),
    ('', None, None),
])
def test_devices_get_four_threads_each(monkeypatch, flags, before, after):
  monkeypatch.setattr(os, 'cpu_count', lambda: 2)
  monkeypatch.setenv('XLA_FLAGS', flags)
  monkeypatch.delenv('PJRT_NPROC')
  if before:
    monkeypatch.setenv('PJRT_NPROC', before)
  cpu.give_threads()
  assert os.environ.get('PJRT_NPROC') == after
