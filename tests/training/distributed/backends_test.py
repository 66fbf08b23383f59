"""A compiler for an absent device is not looked for as one that is here."""

import os
import subprocess
import sys

import pytest

from training.distributed import backends

CLEAN = {name: value for name, value in os.environ.items()
         if not name.startswith(('JAX_PLATFORMS', 'TPU_', 'PJRT_'))}


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """A machine with libtpu, of which a test says what else it shows."""
  for name in backends._NAMED:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(backends.importlib.util, 'find_spec',
                      lambda name: name == 'libtpu')
  monkeypatch.setattr(backends, '_FILES', (f'{tmp_path}/dev/*',))
  monkeypatch.setattr(backends, '_PCI', f'{tmp_path}/pci/*')
  monkeypatch.setitem(sys.modules, 'jax', None)
  del sys.modules['jax']

  def show(place, **files):
    (tmp_path / place).mkdir(parents=True)
    for name, text in files.items():
      (tmp_path / place / name).write_text(text + '\n')

  return show


def chosen() -> str:
  backends.hide_absent_devices()
  return os.environ.get('JAX_PLATFORMS', '')


def test_only_a_machine_without_accelerators_is_told_to_take_its_cpu(
    machine, monkeypatch):
  machine('pci/0', vendor='0x1ae0', **{'class': '0x020000'})  # Google's network
  assert chosen() == 'cpu'
  monkeypatch.setenv('JAX_PLATFORMS', 'tpu,cpu')
  assert chosen() == 'tpu,cpu'  # what somebody asked for stays


@pytest.mark.parametrize('place, files', [
    ('dev', dict(accel0='')),
    ('pci/0', {'vendor': '0x1ae0', 'class': '0x120000'})])
def test_a_device_that_is_here_is_left_to_jax(machine, place, files):
  machine(place, **files)
  assert chosen() == ''


def test_so_is_one_that_is_named(machine, monkeypatch):
  monkeypatch.setenv('TPU_NAME', 'local')
  assert chosen() == ''


def test_without_such_a_compiler_nothing_is_set(machine, monkeypatch):
  monkeypatch.setattr(backends.importlib.util, 'find_spec', lambda name: None)
  assert chosen() == ''


@pytest.mark.plan
def test_beside_libtpu_a_program_starts_without_a_word():
  program = (
      'from training.distributed import devices; import jax; '
      'print(jax.devices())')
  done = subprocess.run([sys.executable, '-c', program], env=CLEAN,
                        capture_output=True, text=True)
  assert 'Cpu' in done.stdout and not done.stderr, done
