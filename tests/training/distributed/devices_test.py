"""The mesh over slices, how processes join, the threads of CPU devices, and
compilers for absent devices, which are not looked for as ones that are here."""

import dataclasses
import os
import sys

import jax
import numpy as np
import pytest

import architectures
from common.errors import RequestError
from configs import sharding as tables
from tests.helpers import models
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


ALONE = dict.fromkeys(tables.MESH_AXES, 1)


@pytest.mark.parametrize('sizes, num_devices, words', [
    (dict(fsdp=0), 8, 'mesh.fsdp is 0: choose a size >= 1, or -1'),
    (dict(fsdp=-2), 8, 'mesh.fsdp is -2: choose'),
    (dict(data=-1, fsdp=-1), 8, 'only one axis may be -1'),
    (dict(data=-1, fsdp=3), 8, 'multiply to 3, which does not divide the 8 de'),
    (dict(fsdp=4), 8, 'multiply to 4, which is not the 8 devices there are'),
    (dict(fsdp=2), 1, 'multiply to 2, which is not the 1 device there')])
def test_a_mesh_that_the_devices_do_not_make_is_refused(
    sizes, num_devices, words):
  with pytest.raises(RequestError) as refusal:
    devices.resolve_mesh_shape(ALONE | sizes, num_devices)
  assert words in str(refusal.value)


@pytest.mark.parametrize('sizes, want', [
    (dict(data=-1), dict(data=8)), (dict(data=-1, fsdp=2, tensor=2),
                                    dict(data=2, fsdp=2, tensor=2)),
    (dict(expert=8), dict(expert=8)), (dict(fsdp=-1, context=8),
                                       dict(fsdp=1, context=8))])
def test_a_free_axis_takes_the_devices_that_are_left(sizes, want):
  assert devices.resolve_mesh_shape(ALONE | sizes, 8) == ALONE | want


@pytest.mark.parametrize('text, words', [
    ('v4-8', "unknown name in --mesh 'v4-8'"),
    ('fsdp=x', 'fsdp=x: write it as fs'),
    ('fsdp=2.5', '--mesh has fsdp=2.5: write it'),
    ('fsdp=9999999999', 'write it as fsdp=8'),
    (f'{next(iter(tables.PRESETS))}=2', 'is a preset of all axes: give it al')])
def test_a_mesh_that_is_no_text_of_one_is_refused(text, words):
  with pytest.raises(RequestError) as refusal:
    devices.parse_mesh(text, 8)
  assert words in str(refusal.value), str(refusal.value)


@pytest.mark.parametrize('system, fields, sizes, words', [
    ('gpt', dict(mixer='gla'), dict(context=2), 'mesh.context is 2, and some'),
    ('gpt', dict(keep_gathered='query'), dict(tensor=2),
     "keep_gathered is 'query', and mesh.tensor 2: XLA"),
    ('gpt', {}, dict(expert=2), "mesh.expert is 2, but model.ffn 'gelu_tanh'"),
    ('mixtral', dict(moe=dict(num_experts=4)), dict(expert=3),
     'mesh.expert is 3, which does not divide model.moe.num_experts 4: '
     'choose mesh.expert from 1, 2, 4,'),
    ('gpt', dict(num_heads=4), dict(tensor=3), 'mesh.tensor is 3, which does'),
    ('gpt', dict(d_model=36, num_heads=4), dict(fsdp=8), 'mesh.fsdp is 8'),
    ('mamba2', {}, dict(tensor=3), 'mesh.tensor is 3, which does not divide')])
def test_a_mesh_that_does_not_divide_a_model_is_refused(
    system, fields, sizes, words):
  model = architectures.resolve(models.small_config(system, **fields))
  devices.check_mesh(model, ALONE)
  with pytest.raises(RequestError) as refusal:
    devices.check_mesh(model, ALONE | sizes)
  assert words in str(refusal.value), str(refusal.value)


THREE = dict(coordinator='host:1', num_processes=2, process_id=0)


@pytest.mark.parametrize('changes, words', [
    (dict(coordinator=''), "coordinator '', 2 processes, id 0, cluster False"),
    (dict(num_processes=0), "coordinator 'host:1', 0 processes"),
    (dict(process_id=-1), '2 processes, id -1'),
    (dict(cluster=True), 'or --cluster alone; given'),
    (dict(coordinator='host'), "--coordinator is 'host': write HOST:PORT"),
    (dict(coordinator=':1'), "--coordinator is ':1': write HOST:PORT"),
    (dict(coordinator='host:a'), "--coordinator is 'host:a'"),
    (dict(process_id=2), '--process_id is 2 of --num_processes 2: choose')])
def test_processes_that_cannot_join_are_refused(changes, words, monkeypatch):
  for name in ('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID'):
    monkeypatch.delenv(f'JAX_{name}', raising=False)
  with pytest.raises(RequestError) as refusal:
    processes.arguments_to_join(**THREE | changes)
  assert words in str(refusal.value)


def test_processes_join_by_flags_or_by_the_environment(monkeypatch):
  for name in ('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID'):
    monkeypatch.delenv(f'JAX_{name}', raising=False)
  assert processes.arguments_to_join() is None
  assert processes.arguments_to_join(cluster=True) == {}
  last = processes.arguments_to_join(**THREE | dict(process_id=1))
  assert last == dict(
      coordinator_address='host:1', num_processes=2, process_id=1,
      cluster_detection_method='deactivate', coordinator_bind_address=None)

  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'localhost:7')
  monkeypatch.setenv('JAX_NUM_PROCESSES', '3')
  monkeypatch.setenv('JAX_PROCESS_ID', '2')
  here = processes.arguments_to_join()
  assert (here['num_processes'], here['process_id']) == (3, 2)
  # The service of one machine is not open to others.
  assert here['coordinator_bind_address'] == 'localhost:7'
