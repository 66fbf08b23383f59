"""The threads that several devices of a CPU need."""

import os

import pytest

from training.distributed import cpu

EIGHT = '--xla_force_host_platform_device_count=8'


@pytest.mark.parametrize('flags, before, own, after', [
    (EIGHT, None, 2, '32'),
    (EIGHT, None, 48, '48'),
    (f'{EIGHT} --xla_force_host_platform_device_count=16', None, 2, '64'),
    (EIGHT, '9', 2, '9'),
    ('', None, 2, None),
])
def test_devices_get_four_threads_each(monkeypatch, flags, before, own, after):
  monkeypatch.setattr(os, 'cpu_count', lambda: 128)  # of the host
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(own)))
  monkeypatch.setenv('XLA_FLAGS', flags)
  monkeypatch.delenv('PJRT_NPROC')
  if before:
    monkeypatch.setenv('PJRT_NPROC', before)
  cpu.give_threads()
  assert os.environ.get('PJRT_NPROC') == after
