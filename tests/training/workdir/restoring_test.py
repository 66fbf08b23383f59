"""What is saved comes back bit for bit, or is named and not used."""

import errno
import json
import os
import random
import shutil

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
import optax
import pytest

from configs.errors import EnvironmentFailure
from tests.helpers import toy_run
from training import paths
from training.workdir import checkpoints
from training.workdir import restoring


@pytest.fixture(name='run', scope='module')
def _run(tmp_path_factory):
  """(workdir, {step: state on the host}) of a run saved at 10, 20 and 30."""
  workdir = tmp_path_factory.mktemp('run')
  return workdir, toy_run.run(workdir)


@pytest.fixture(name='copy')
def _copy(run, tmp_path):
  shutil.copytree(run[0], tmp_path / 'run')
  return tmp_path / 'run'


def test_round_trip_is_bitwise(run):
  workdir, states = run
  with toy_run.open_store(workdir) as store:
    restored = store.restore(toy_run.abstract(4, 2))
  toy_run.assert_bitwise(restored.state, states[30])
  assert isinstance(restored.state['opt_state'][0], optax.ScaleByAdamState)
  assert restored.state['key'].dtype == jax.random.key(0).dtype
  assert (restored.step, restored.damaged) == (30, ())
  assert restored.record['next_batch'] == 30
  assert restored.record['tokens'] == 64 * 30
  assert restored.record['config']['optim']['lr'] == toy_run.CONFIG.optim.lr
  assert checkpoints.environment_changes(restored.record) == []


def test_resumed_equals_straight_bit_for_bit(run):
  """20 straight steps = 10 + restart + 10; the run goes on while it saves."""
  workdir, states = run
  restored = restoring.restore(
      restoring.directory(workdir), toy_run.abstract(4, 2), step=10)
  state, train_step = restored.state, toy_run.trainer(4, 2)
  toy_run.assert_bitwise(state, states[10])
  for _ in range(10):
    state = train_step(state)
  toy_run.assert_bitwise(state, states[20])


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(8, 1), (2, 4), (1, 1)])
def test_another_mesh_gets_the_same_bits(run, shape):
  workdir, states = run
  restored = restoring.restore(
      restoring.directory(workdir), toy_run.abstract(*shape))
  toy_run.assert_bitwise(restored.state, states[30])
  for name, x in paths.flatten(restored.state['params']).items():
    assert x.sharding.mesh == toy_run.make_mesh(*shape), name
  after = toy_run.trainer(*shape)(restored.state)
  assert int(after['step']) == 31


def test_the_host_memory_of_reading_is_bounded_by_a_shard():
  """By the saved shards that a new one overlaps, and 1 GB; never less."""
  def limit_gb(shape, saved, spec):
    place = NamedSharding(toy_run.make_mesh(4, 2), spec)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    least = jax.ShapeDtypeStruct(
        (1, 1), jnp.float32, sharding=NamedSharding(place.mesh, P()))
    record = {'arrays': {'x': {'shard': saved}, 'least': {'shard': [1, 1]}}}
    return restoring._read_limit_gb(record, {'x': x, 'least': least})
  n = 2**15  # n x n is 4.3 GB
  assert limit_gb((n, n), [n, n], P()) == 1 + 4
  assert limit_gb((n, n), [n // 8, n], P('fsdp')) == 1 + 2
  assert limit_gb((n, n), [n, n], P('fsdp', 'tensor')) == 1 + 4
  assert limit_gb((64, 64), [8, 64], P('fsdp')) == 1


def test_params_alone(run):
  """For evaluation: the optimizer's two thirds are not read."""
  workdir, states = run
  abstract = {'params': toy_run.abstract(1, 1)['params']}
  folder = restoring.directory(workdir)
  state = restoring.restore(folder, abstract, partial=True).state
  toy_run.assert_bitwise(state, {name: x for name, x in states[30].items()
                          if name.startswith('params/')})
  with pytest.raises(restoring.Mismatch, match='opt_state/0/mu.* not here'):
    restoring.restore(folder, abstract)


def test_a_step_by_number_and_one_that_is_not_there(run):
  workdir, states = run
  folder, abstract = restoring.directory(workdir), toy_run.abstract(1, 1)
  restored = restoring.restore(folder, abstract, 20)
  toy_run.assert_bitwise(restored.state, states[20])
  with pytest.raises(ValueError, match='step 25 .* there are 10, 20, 30'):
    restoring.restore(folder, abstract, 25)
  with pytest.raises(ValueError, match='no checkpoint in'):
    restoring.restore(folder / 'nothing', abstract)


def test_a_new_run_has_nothing_to_restore(tmp_path):
  with toy_run.open_store(tmp_path) as store:
    assert store.restore(toy_run.abstract(1, 1)) is None


def _reshape(state):
  bias = state['params']['up']['bias']
  state['params']['up']['bias'] = jax.ShapeDtypeStruct(
      (513,), bias.dtype, sharding=bias.sharding)


def _recast(state):
  bias = state['params']['up']['bias']
  state['params']['up']['bias'] = jax.ShapeDtypeStruct(
      bias.shape, jnp.bfloat16, sharding=bias.sharding)


def _rename(state):
  state['params']['over'] = state['params'].pop('up')


@pytest.mark.parametrize('change, sentence', [
    (_reshape, r'params/up/bias is float32\[512\] in it and float32\[513\]'),
    (_recast, r'params/up/bias is float32\[512\] in it and bfloat16\[512\]'),
    (_rename, r'params/over/kernel is not in it.*params/up/kernel is in it')])
def test_what_does_not_fit_is_refused_by_name(copy, change, sentence):
  """And not taken for damage: no step is passed over or set aside."""
  abstract = toy_run.abstract(1, 1)
  change(abstract)
  with toy_run.open_store(copy) as store:
    with pytest.raises(restoring.Mismatch, match=sentence):
      store.restore(abstract)
  assert restoring.steps(restoring.directory(copy)) == [10, 20, 30]


def _truncate(step_dir):
  path = toy_run.data_files(step_dir)[0]
  os.truncate(path, path.stat().st_size // 2)


def _delete(step_dir):
  toy_run.data_files(step_dir)[0].unlink()


def _delete_manifest(step_dir):
  (step_dir / 'state' / 'manifest.ocdbt').unlink()


def _empty(step_dir):
  for path in toy_run.data_files(step_dir):
    os.truncate(path, 0)


def _delete_record(step_dir):
  shutil.rmtree(step_dir / 'record')


def _truncate_record(step_dir):
  os.truncate(step_dir / 'record' / 'metadata', 100)


def _edit_record(step_dir):
  path = step_dir / 'record' / 'metadata'
  sealed = json.loads(path.read_text())
  sealed['record']['next_batch'] += 1
  path.write_text(json.dumps(sealed))


@pytest.mark.parametrize('damage', [
    _truncate, _delete, _delete_manifest, _empty, toy_run.flip_in_largest,
    _delete_record, _truncate_record, _edit_record])
def test_damage_is_named_and_the_step_before_is_used(run, copy, damage):
  damage(copy / 'checkpoints' / '30')
  with toy_run.open_store(copy) as store:
    restored = store.restore(toy_run.abstract(4, 2))
    sentence, = restored.damaged
    assert sentence.startswith('checkpoint 30 in ')
    assert ' is damaged: ' in sentence and '\n' not in sentence
    assert sentence.endswith('; using 20 instead')
    assert restored.step == 20
    toy_run.assert_bitwise(restored.state, run[1][20])
    # The run comes to step 30 again, and `keep` counts only what is good.
    assert restoring.steps(store.directory) == [10, 20]
    assert (copy / 'checkpoints' / '30.aside').exists()
    assert toy_run.save(store, 30, restored.state)
    store.wait()
    assert restoring.steps(store.directory) == [10, 20, 30]


@pytest.mark.parametrize('part', ['record', 'arrays'])
@pytest.mark.parametrize('code', [errno.ESTALE, errno.EMFILE, errno.EIO])
def test_an_error_of_the_machine_is_no_damage(copy, monkeypatch, code, part):
  name = f'_read_{part}'
  read = getattr(restoring, name)

  def fail(folder, *args):
    if folder.name == '30':
      raise OSError(code, os.strerror(code), str(folder))
    return read(folder, *args)
  monkeypatch.setattr(restoring, name, fail)
  with toy_run.open_store(copy) as store:
    if code == errno.EIO:  # which may be of these files alone
      assert store.restore(toy_run.abstract(1, 1)).step == 20
      return
    with pytest.raises(EnvironmentFailure, match='30 .* may be sound: .*Errno'):
      store.restore(toy_run.abstract(1, 1))
    assert restoring.steps(store.directory) == [10, 20, 30]


def test_nothing_good_is_an_error_and_nothing_is_moved(copy):
  for step in (10, 20, 30):
    _truncate(copy / 'checkpoints' / str(step))
  with toy_run.open_store(copy) as store:
    with pytest.raises(RuntimeError, match='(is damaged.*){3}is no other'):
      store.restore(toy_run.abstract(4, 2))
    assert restoring.steps(store.directory) == [10, 20, 30]


def test_a_damaged_step_asked_for_by_number_is_not_replaced(copy):
  _truncate(copy / 'checkpoints' / '20')
  with pytest.raises(RuntimeError, match='20 .* is damaged.* also 10, 30'):
    restoring.restore(
        restoring.directory(copy), toy_run.abstract(1, 1), step=20)


@pytest.mark.parametrize('step', [None, 20])
def test_a_step_that_is_deleted_while_it_is_read(step, copy, monkeypatch):
  """By a run that goes on there, and has saved its next one."""
  folder = restoring.directory(copy)
  (folder / '30').rename(copy / 'next')
  read = restoring._read_arrays

  def and_lose(*args):
    if (copy / 'next').exists():
      (copy / 'next').rename(folder / '30')
      shutil.rmtree(folder / '20')
    return read(*args)
  monkeypatch.setattr(restoring, '_read_arrays', and_lose)
  if step:
    with pytest.raises(RuntimeError, match='20 .* was deleted .* 10, 30'):
      restoring.restore(folder, toy_run.abstract(1, 1), step)
    return
  restored = restoring.restore(folder, toy_run.abstract(1, 1))
  assert (restored.step, restored.damaged) == (30, ())


def test_going_back_sets_later_steps_aside(copy):
  with toy_run.open_store(copy) as store:
    assert store.restore(toy_run.abstract(1, 1), step=10).step == 10
    assert restoring.steps(store.directory) == [10]


def test_no_flipped_bit_gets_through(run, copy):
  """20 places drawn from all files of a step: found, or without effect."""
  step_dir, states = copy / 'checkpoints' / '30', run[1]
  abstract = toy_run.abstract(1, 1)
  folder = restoring.directory(copy)
  files = [path for path in sorted(step_dir.rglob('*')) if path.is_file()]
  sizes = [path.stat().st_size for path in files]
  draw = random.Random(0)
  found = 0
  for _ in range(20):
    path, = draw.choices(files, sizes)
    place, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
    toy_run.flip(path, place, bit)
    restored = restoring.restore(folder, abstract)
    found += restored.step == 20
    toy_run.assert_bitwise(restored.state, states[restored.step])
    toy_run.flip(path, place, bit)
  assert found >= 10


@pytest.mark.parametrize('name', sorted(
    paths.flatten(jax.eval_shape(toy_run.init, jax.random.key(0)))))
def test_the_checksum_of_every_array_is_compared(copy, name):
  path = copy / 'checkpoints' / '30' / 'record' / 'metadata'
  record = json.loads(path.read_text())['record']
  record['arrays'][name]['checksum'] ^= 1
  path.write_text(json.dumps(restoring.seal(record)))
  restored = restoring.restore(
      restoring.directory(copy), toy_run.abstract(1, 1))
  assert restored.step == 20
  assert f'the checksum of {name} is not the one saved' in restored.damaged[0]


def test_a_flip_in_any_matrix_is_found_by_its_checksum(run, copy):
  """Each is looked up where it lies in the file, and hit there."""
  step_dir, expected = copy / 'checkpoints' / '30', run[1][30]
  folder, abstract = restoring.directory(copy), toy_run.abstract(1, 1)
  contents = {path: path.read_bytes() for path in toy_run.data_files(step_dir)}
  hit = []
  for name, x in expected.items():
    if x.ndim != 2:
      continue
    # The run was sharded 4 x 2: half of the first row is in one piece.
    piece = x[0, :x.shape[1] // 2].tobytes()
    (path, place), = [(path, content.find(piece))
                      for path, content in contents.items() if piece in content]
    toy_run.flip(path, place + 1)
    restored = restoring.restore(folder, abstract)
    toy_run.flip(path, place + 1)
    assert restored.step == 20, name
    assert f'the checksum of {name} is not' in restored.damaged[0], name
    hit.append(name)
  assert len(hit) == 6  # two matrices and their two moments
