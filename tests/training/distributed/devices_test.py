"""The mesh over slices, how processes join, the threads of CPU devices, and
compilers for absent devices, which are not looked for as ones that are here."""

import dataclasses
import os
import sys

import jax
import numpy as np
import pytest

from configs import sharding as tables
import training
from training.distributed import cpu, devices, processes

SHAPE = dict(data=4, fsdp=2, expert=1, context=1, tensor=1)


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip of a slice, as far as a mesh looks at it."""
  id: int
  slice_index: int
  process_index: int = 0
  platform: str = 'tpu'
  device_kind: str = 'of the test'
  core_on_chip: int = 0

  @property
  def coords(self):
    """Of four chips in a square, two of which are 1 apart in their ids."""
    k = self.id // 2
    return k % 2, k // 2, 0


def rows(mesh):
  return np.asarray([[d.id for d in row.flat] for row in mesh.devices])


def test_a_replicated_model_shards_its_batch_alone():
  split = {axis for axis, mesh in tables.RULES['replicated']
           if {'data', 'fsdp'} & {*mesh}}
  assert split == {'batch', 'tokens'}


def test_only_data_goes_over_the_slices_of_cpu_devices():
  mesh = devices.make_mesh(SHAPE, slices=2)
  assert dict(mesh.shape) == SHAPE
  ids = [d.id for d in jax.devices()]
  assert sorted(rows(mesh)[:2].flat) == ids[:4]
  assert sorted(rows(mesh)[2:].flat) == ids[4:]


@pytest.mark.parametrize('length, pieces', [(12, 2 * 6), (16, 2 * 2)])
def test_a_row_is_cut_over_as_many_axes_as_divide_it(length, pieces):
  shape = dict(data=2, fsdp=1, expert=1, context=2, tensor=3)
  assert devices.num_stream_shards(shape, 'default', length) == pieces


def test_slices_are_what_the_devices_say():
  """In whatever order they come: half of `data` is one slice, half the other,
  as jax's create_hybrid_device_mesh has it."""
  from jax.experimental import mesh_utils
  chips = [Chip(id=i, slice_index=1 - i % 2) for i in range(8)]
  grid = np.concatenate([
      mesh_utils.create_device_mesh((2, 2, 1, 1), group)
      for group in devices.group_by_slice(chips, 0)])
  expected = mesh_utils.create_hybrid_device_mesh(
      (2, 2, 1, 1), (2, 1, 1, 1), chips)
  assert (grid == expected).all()
  assert {c.slice_index for c in grid[:2].flat} == {0}
  assert {c.slice_index for c in grid[2:].flat} == {1}


@pytest.mark.parametrize('slices, shape, parts', [
    (3, SHAPE, ['mesh.slices is 3', '8 devices']),
    (2, SHAPE | dict(data=1, fsdp=8), ['mesh.data is 1', '2 slices']),
])
def test_what_the_slices_do_not_divide_is_refused(slices, shape, parts):
  with pytest.raises(ValueError) as error:
    devices.make_mesh(shape, slices=slices)
  assert all(part in str(error.value) for part in parts), error.value


def test_how_a_process_joins_the_others(monkeypatch):
  assert processes.arguments_to_join() is None
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', '[::1]:1234')
  monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
  monkeypatch.setenv('JAX_PROCESS_ID', '1')
  how = processes.arguments_to_join()
  assert (how['coordinator_address'], how['num_processes'],
          how['process_id']) == ('[::1]:1234', 2, 1)
  assert how['coordinator_bind_address'] == '[::1]:1234'
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'node-0:1234')
  assert processes.arguments_to_join()['coordinator_bind_address'] is None


EIGHT = '--xla_force_host_platform_device_count=8'


@pytest.mark.parametrize('flags, before, cpus, after', [
    (EIGHT, None, 2, '32'), (EIGHT, None, 48, '48'), (EIGHT, '9', 2, '9'),
    ('', None, 2, None)])
def test_devices_get_four_threads_each(monkeypatch, flags, before, cpus, after):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(cpus)))
  monkeypatch.setenv('XLA_FLAGS', flags)
  monkeypatch.delenv('PJRT_NPROC')
  if before:
    monkeypatch.setenv('PJRT_NPROC', before)
  cpu.set_number_of_threads()
  assert os.environ.get('PJRT_NPROC') == after


@pytest.mark.parametrize('device, environment, chosen', [
    ('', {}, 'cpu'), ('accel0', {}, ''),
    ('', {'JAX_PLATFORMS': 'tpu,cpu'}, 'tpu,cpu'),
    ('', {'TPU_NAME': 'local'}, '')])
def test_beside_libtpu_only_a_machine_without_devices_is_told_to_take_its_cpu(
    monkeypatch, tmp_path, device, environment, chosen):
  for name in training._VARIABLES_NAMING_DEVICES:
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(training.importlib.util, 'find_spec',
                      lambda name: name == 'libtpu')
  monkeypatch.setattr(training, '_DEVICE_FILES', (f'{tmp_path}/*',))
  monkeypatch.delitem(sys.modules, 'jax')
  if device:
    (tmp_path / device).touch()
  training.hide_absent_devices()
  assert os.environ.pop('JAX_PLATFORMS', '') == chosen
