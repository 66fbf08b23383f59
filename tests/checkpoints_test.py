"""What is saved comes back bit for bit, or is named and not used."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from configs import base
from training import checkpoints, checksums, paths, restoring

_OPTIMIZER = optax.adamw(1e-2)
_CONFIG = base.base().lock()


def _mesh(*shape):
  names = ('fsdp', 'tensor')
  return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 2)


def _init(key):
  """A state as a run has it: float32 and bfloat16, counters, a key.

  Each shard has more than the 1 KB up to which values stand, compressed, in
  the index of the files.
  """
  w1, w2, b = jax.random.split(key, 3)
  params = {
      'up': {'kernel': jax.random.normal(w1, (64, 512)),
             'bias': jax.random.normal(b, (512,))},
      'down': {'kernel': jax.random.normal(w2, (512, 64), jnp.bfloat16)}}
  return {'params': params, 'opt_state': _OPTIMIZER.init(params),
          'step': jnp.int32(0), 'key': key, 'is_good': jnp.array([True, False])}


def _abstract(mesh):
  """ShapeDtypeStructs with shardings; matrices over both axes of the mesh."""
  def sharded(x):
    spec = P('fsdp', 'tensor') if x.ndim == 2 else P()
    return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  return jax.tree.map(sharded, jax.eval_shape(_init, jax.random.key(0)))


def _born(mesh):
  shardings = jax.tree.map(lambda x: x.sharding, _abstract(mesh))
  return jax.jit(_init, out_shardings=shardings)(jax.random.key(3))


def _update(state):
  key, use = jax.random.split(state['key'])
  x_BD = jax.random.normal(use, (8, 64))
  def loss(params):
    up, down = params['up'], params['down']
    h_BF = jax.nn.gelu(x_BD @ up['kernel'] + up['bias'][None])
    y_BD = h_BF @ down['kernel'].astype(jnp.float32)
    return jnp.mean((y_BD - x_BD) ** 2)
  grads = jax.grad(loss)(state['params'])
  updates, opt_state = _OPTIMIZER.update(
      grads, state['opt_state'], state['params'])
  return dict(state, params=optax.apply_updates(state['params'], updates),
              opt_state=opt_state, step=state['step'] + 1, key=key)


def _trainer(mesh):
  shardings = jax.tree.map(lambda x: x.sharding, _abstract(mesh))
  return jax.jit(_update, donate_argnums=0, out_shardings=shardings)


def _open(workdir, **changes):
  options = dict(every_steps=10, every_minutes=0.0, keep=3, keep_every=0)
  return checkpoints.Checkpoints(workdir, **{**options, **changes})


def _save(store, step, state):
  return store.save(step, state, next_batch=step, tokens=64 * step,
                    config=_CONFIG)


def _host(state):
  """Copies: a view would see what the next donated step writes."""
  return {name: np.array(x) for name, x in restoring.plain(state).items()}


def _assert_bitwise(state, expected):
  got = _host(state)
  assert got.keys() == expected.keys()
  for name, x in got.items():
    assert x.dtype == expected[name].dtype, name
    assert x.tobytes() == expected[name].tobytes(), name


@pytest.fixture(name='run', scope='module')
def _run(tmp_path_factory):
  """(workdir, {step: state on the host}) of a run saved at 10, 20 and 30."""
  workdir = tmp_path_factory.mktemp('run')
  mesh = _mesh(4, 2)
  state, train_step, states = _born(mesh), _trainer(mesh), {}
  with _open(workdir) as store:
    for step in range(1, 31):
      state = train_step(state)
      if store.due(step):
        states[step] = _host(state)
        assert _save(store, step, state)
  return workdir, states


@pytest.fixture(name='copy')
def _copy(run, tmp_path):
  shutil.copytree(run[0], tmp_path / 'run')
  return tmp_path / 'run'


def test_round_trip_is_bitwise(run):
  workdir, states = run
  with _open(workdir) as store:
    restored = store.restore(_abstract(_mesh(4, 2)))
  _assert_bitwise(restored.state, states[30])
  assert isinstance(restored.state['opt_state'][0], optax.ScaleByAdamState)
  assert restored.state['key'].dtype == jax.random.key(0).dtype
  assert (restored.step, restored.damaged) == (30, ())
  assert restored.record['next_batch'] == 30
  assert restored.record['tokens'] == 64 * 30
  assert restored.record['config']['optim']['lr'] == _CONFIG.optim.lr
  assert checkpoints.environment_changes(restored.record) == []


def test_resumed_equals_straight_bit_for_bit(run):
  """20 straight steps = 10 + restart + 10; the run goes on while it saves."""
  workdir, states = run
  mesh = _mesh(4, 2)
  restored = restoring.restore(
      restoring.directory(workdir), _abstract(mesh), step=10)
  state, train_step = restored.state, _trainer(mesh)
  _assert_bitwise(state, states[10])
  for _ in range(10):
    state = train_step(state)
  _assert_bitwise(state, states[20])


@pytest.mark.parametrize('shape', [(8, 1), (2, 4), (1, 1)])
def test_another_mesh_gets_the_same_bits(run, shape):
  workdir, states = run
  mesh = _mesh(*shape)
  restored = restoring.restore(
      restoring.directory(workdir), _abstract(mesh))
  _assert_bitwise(restored.state, states[30])
  for name, x in paths.flatten(restored.state['params']).items():
    assert x.sharding.mesh == mesh, name
  after = _trainer(mesh)(restored.state)
  assert int(after['step']) == 31


def test_the_host_memory_of_reading_is_bounded_by_a_shard():
  """By the saved shards that a new one overlaps, and 1 GB; never less."""
  def limit_gb(shape, saved, spec):
    place = NamedSharding(_mesh(4, 2), spec)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    record = {'arrays': {'x': {'shard': saved}}}
    return restoring._read_limit_gb(record, {'x': x})
  n = 2**15  # n x n is 4.3 GB
  assert limit_gb((n, n), [n, n], P()) == 1 + 4
  assert limit_gb((n, n), [n // 8, n], P('fsdp')) == 1 + 2
  assert limit_gb((n, n), [n, n], P('fsdp', 'tensor')) == 1 + 4
  assert limit_gb((64, 64), [8, 64], P('fsdp')) == 1


def test_params_alone(run):
  """For evaluation: the optimizer's two thirds are not read."""
  workdir, states = run
  abstract = {'params': _abstract(_mesh(1, 1))['params']}
  folder = restoring.directory(workdir)
  state = restoring.restore(folder, abstract, partial=True).state
  _assert_bitwise(state, {name: x for name, x in states[30].items()
                          if name.startswith('params/')})
  with pytest.raises(restoring.Mismatch, match='opt_state/0/mu.* not here'):
    restoring.restore(folder, abstract)


def test_a_step_by_number_and_one_that_is_not_there(run):
  workdir, states = run
  folder, abstract = restoring.directory(workdir), _abstract(_mesh(1, 1))
  _assert_bitwise(restoring.restore(folder, abstract, 20).state, states[20])
  with pytest.raises(ValueError, match='step 25 .* there are 10, 20, 30'):
    restoring.restore(folder, abstract, 25)
  with pytest.raises(ValueError, match='no checkpoint in'):
    restoring.restore(folder / 'nothing', abstract)


def test_a_new_run_has_nothing_to_restore(tmp_path):
  with _open(tmp_path) as store:
    assert store.restore(_abstract(_mesh(1, 1))) is None


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
  abstract = _abstract(_mesh(1, 1))
  change(abstract)
  with _open(copy) as store:
    with pytest.raises(restoring.Mismatch, match=sentence):
      store.restore(abstract)
  assert restoring.steps(restoring.directory(copy)) == [10, 20, 30]


def _data_files(step_dir):
  """The files that hold arrays, largest first."""
  files = [path for path in (step_dir / 'state').rglob('*')
           if path.parent.name == 'd']
  return sorted(files, key=lambda path: -path.stat().st_size)


def _truncate(step_dir):
  path = _data_files(step_dir)[0]
  os.truncate(path, path.stat().st_size // 2)


def _delete(step_dir):
  _data_files(step_dir)[0].unlink()


def _delete_manifest(step_dir):
  (step_dir / 'state' / 'manifest.ocdbt').unlink()


def _empty(step_dir):
  for path in _data_files(step_dir):
    os.truncate(path, 0)


def _flip_in_largest(step_dir):
  path = _data_files(step_dir)[0]
  _flip(path, path.stat().st_size // 2)


def _flip(path, place, bit=4):
  content = bytearray(path.read_bytes())
  content[place] ^= 1 << bit
  path.write_bytes(content)


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
    _truncate, _delete, _delete_manifest, _empty, _flip_in_largest,
    _delete_record, _truncate_record, _edit_record])
def test_damage_is_named_and_the_step_before_is_used(run, copy, damage):
  damage(copy / 'checkpoints' / '30')
  with _open(copy) as store:
    restored = store.restore(_abstract(_mesh(4, 2)))
    sentence, = restored.damaged
    assert sentence.startswith('checkpoint 30 in ')
    assert ' is damaged: ' in sentence and '\n' not in sentence
    assert sentence.endswith('; using 20 instead')
    assert restored.step == 20
    _assert_bitwise(restored.state, run[1][20])
    # The run comes to step 30 again, and `keep` counts only what is good.
    assert restoring.steps(store.directory) == [10, 20]
    assert (copy / 'checkpoints' / '30.aside').exists()
    assert _save(store, 30, restored.state)
    store.wait()
    assert restoring.steps(store.directory) == [10, 20, 30]


def test_nothing_good_is_an_error_and_nothing_is_moved(copy):
  for step in (10, 20, 30):
    _truncate(copy / 'checkpoints' / str(step))
  with _open(copy) as store:
    with pytest.raises(RuntimeError, match='(is damaged.*){3}is no other'):
      store.restore(_abstract(_mesh(4, 2)))
    assert restoring.steps(store.directory) == [10, 20, 30]


def test_a_damaged_step_asked_for_by_number_is_not_replaced(copy):
  _truncate(copy / 'checkpoints' / '20')
  with pytest.raises(RuntimeError, match='20 .* is damaged.* also 10, 30'):
    restoring.restore(
        restoring.directory(copy), _abstract(_mesh(1, 1)), step=20)


def test_going_back_sets_later_steps_aside(copy):
  with _open(copy) as store:
    assert store.restore(_abstract(_mesh(1, 1)), step=10).step == 10
    assert restoring.steps(store.directory) == [10]


def test_no_flipped_bit_gets_through(run, copy):
  """20 places drawn from all files of a step: found, or without effect."""
  step_dir, states = copy / 'checkpoints' / '30', run[1]
  abstract = _abstract(_mesh(1, 1))
  folder = restoring.directory(copy)
  files = [path for path in sorted(step_dir.rglob('*')) if path.is_file()]
  sizes = [path.stat().st_size for path in files]
  draw = random.Random(0)
  found = 0
  for _ in range(20):
    path, = draw.choices(files, sizes)
    place, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
    _flip(path, place, bit)
    restored = restoring.restore(folder, abstract)
    found += restored.step == 20
    _assert_bitwise(restored.state, states[restored.step])
    _flip(path, place, bit)
  assert found >= 10


@pytest.mark.parametrize('name', sorted(
    paths.flatten(jax.eval_shape(_init, jax.random.key(0)))))
def test_the_checksum_of_every_array_is_compared(copy, name):
  path = copy / 'checkpoints' / '30' / 'record' / 'metadata'
  record = json.loads(path.read_text())['record']
  record['arrays'][name]['checksum'] ^= 1
  path.write_text(json.dumps(restoring.seal(record)))
  restored = restoring.restore(
      restoring.directory(copy), _abstract(_mesh(1, 1)))
  assert restored.step == 20
  assert f'the checksum of {name} is not the one saved' in restored.damaged[0]


def test_a_flip_in_any_matrix_is_found_by_its_checksum(run, copy):
  """Each is looked up where it lies in the file, and hit there."""
  step_dir, expected = copy / 'checkpoints' / '30', run[1][30]
  folder, abstract = restoring.directory(copy), _abstract(_mesh(1, 1))
  contents = {path: path.read_bytes() for path in _data_files(step_dir)}
  hit = []
  for name, x in expected.items():
    if x.ndim != 2:
      continue
    # The run was sharded 4 x 2: half of the first row is in one piece.
    piece = x[0, :x.shape[1] // 2].tobytes()
    (path, place), = [(path, content.find(piece))
                      for path, content in contents.items() if piece in content]
    _flip(path, place + 1)
    restored = restoring.restore(folder, abstract)
    _flip(path, place + 1)
    assert restored.step == 20, name
    assert f'the checksum of {name} is not' in restored.damaged[0], name
    hit.append(name)
  assert len(hit) == 6  # two matrices and their two moments


def test_checksum_is_that_of_the_definition_and_of_every_mesh():
  x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
  sums = set()
  for shape in ((8, 1), (2, 4), (1, 1)):
    place = NamedSharding(_mesh(*shape), P('fsdp', 'tensor'))
    sums.add(checksums.of({'x': jax.device_put(x, place)})['x'])
  h = np.arange(x.size, dtype=np.uint32) * np.uint32(0x9E3779B1)
  h ^= x.view(np.uint32).ravel()
  h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)  # MurmurHash3's fmix32
  h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
  h ^= h >> 16
  assert sums == {int(np.sum(h, dtype=np.uint32))}


@pytest.mark.parametrize('dtype', [
    'float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'int32', 'uint32',
    'int16', 'int8', 'uint8', 'int4', 'bool'])
def test_checksum_sees_any_one_element(dtype):
  zeros = jnp.zeros((3, 5), dtype)
  sums = {checksums.of({'x': zeros})['x']}
  for i in range(15):
    one = zeros.at[i // 5, i % 5].set(jnp.ones((), dtype))
    sums.add(checksums.of({'x': one})['x'])
  assert len(sums) == 16


def test_checksum_goes_by_parts_and_holds_little(monkeypatch):
  """In pieces of any size the sum is the same; a CPU needs only one piece."""
  x = jnp.arange(24 * 128, dtype=jnp.float32).reshape(2, 12, 128)
  whole = checksums.of({'x': x})
  for at_once in (1, 128 * 5, 128 * 7):
    monkeypatch.setattr(checksums, '_AT_ONCE', at_once)
    checksums._parts.cache_clear()
    assert checksums.of({'x': x}) == whole
  monkeypatch.setattr(checksums, '_AT_ONCE', 128)
  checksums._parts.cache_clear()
  big = jax.ShapeDtypeStruct((4096, 128), jnp.float32)
  memory = checksums._parts(None, P()).lower(big).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4096 * 128 * 4 // 16
  checksums._parts.cache_clear()


def test_checksum_sees_a_sign_of_zero_a_key_and_an_exchange():
  def of(x):
    return checksums.of({'x': x})['x']
  assert of(jnp.array([0.0])) != of(jnp.array([-0.0]))
  assert of(jax.random.key(0)) != of(jax.random.key(1))
  assert of(jnp.array([1.0, 2.0])) != of(jnp.array([2.0, 1.0]))
  with pytest.raises(ValueError, match='no checksum for an array of complex64'):
    of(jnp.array([1j]))


@pytest.mark.parametrize('keep, keep_every, left', [
    (1, 0, [9]), (2, 0, [8, 9]), (2, 4, [4, 8, 9]), (1, 3, [3, 6, 9])])
def test_keeps_the_newest_and_every_nth(tmp_path, keep, keep_every, left):
  state = _born(_mesh(1, 1))
  with _open(tmp_path, keep=keep, keep_every=keep_every) as store:
    for step in range(1, 10):
      _save(store, step, state)
  assert restoring.steps(restoring.directory(tmp_path)) == left


def test_the_same_state_is_not_saved_twice(tmp_path):
  state = _born(_mesh(1, 1))
  with _open(tmp_path) as store:
    assert _save(store, 10, state)
    assert not _save(store, 10, state)
  with _open(tmp_path) as store:
    restored = store.restore(_abstract(_mesh(1, 1)))
    assert not _save(store, 10, restored.state)


@pytest.mark.parametrize('every_steps, every_minutes, due', [
    (0, 0.0, []), (4, 0.0, [4, 8, 12]), (0, 5.0, [5, 10]),
    (4, 5.0, [4, 8, 12]), (7, 5.0, [5, 7, 12])])
def test_due_by_step_or_by_time_since_the_last(
    tmp_path, every_steps, every_minutes, due):
  """One step takes one minute of this clock; a save starts the time anew."""
  now, saved = [0.0], []
  state = _born(_mesh(1, 1))
  with _open(tmp_path, every_steps=every_steps, every_minutes=every_minutes,
             clock=lambda: now[0]) as store:
    for step in range(1, 14):
      now[0] += 60
      if store.due(step):
        _save(store, step, state)
        saved.append(step)
  assert saved == due


@pytest.mark.parametrize('field, value', [
    ('keep', 0), ('keep_every', -1), ('every_steps', -1),
    ('every_minutes', -0.5)])
def test_wrong_numbers_are_refused(tmp_path, field, value):
  with pytest.raises(ValueError, match=rf'checkpoint\.{field}={value}'):
    _open(tmp_path, **{field: value})


_PROCESS = '''
    import os, pathlib, sys, traceback
    port, index, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    # Else the other process would wait for one that failed.
    sys.excepthook = lambda *error: (
        traceback.print_exception(*error), os._exit(1))
    import jax
    jax.config.update('jax_num_cpu_devices', 4)
    jax.distributed.initialize(
        f'127.0.0.1:{port}', 2, index, cluster_detection_method='deactivate',
        coordinator_bind_address=f'127.0.0.1:{port}')
    from training import checkpoints
    from tests import checkpoints_test as here
    mesh = here._mesh(4, 2)
    now = [0.0]
    state, train_step = here._born(mesh), here._trainer(mesh)
    with here._open(workdir, every_steps=0, every_minutes=5, agree_every=2,
                    clock=lambda: now[0]) as store:
      for step in range(1, 13):
        state = train_step(state)
        now[0] += 60 if index == 0 else 0  # only process 0's clock counts
        if store.due(step):
          here._save(store, step, state)
          print('saved', step, flush=True)
      store.wait()
      if index == 0:
        here._flip_in_largest(pathlib.Path(store.directory / '12'))
      restored = store.restore(here._abstract(mesh))
      print('restored', restored.step, len(restored.damaged), flush=True)
      for step in range(restored.step + 1, 13):
        restored.state.update(train_step(restored.state))
      here._save(store, 12, restored.state)
      print('saved', 12, flush=True)
    '''


@pytest.mark.slow
@pytest.mark.multihost
def test_two_processes_save_pass_over_damage_and_one_reads(tmp_path):
  """2 x 4 devices agree on when and on what; 1 x 8 and 1 x 1 read it."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  processes = [
      subprocess.Popen(
          [sys.executable, '-c', textwrap.dedent(_PROCESS), str(port),
           str(index), tmp_path],
          stdout=subprocess.PIPE, text=True,
          env={**os.environ, 'XLA_FLAGS': ''}) for index in range(2)]
  try:
    outs = [process.communicate(timeout=100)[0].splitlines()
            for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0]
  for out in outs:
    assert [line for line in out if '[Gloo]' not in line] == [
        'saved 6', 'saved 12', 'restored 6 1', 'saved 12']
  folder, states = restoring.directory(tmp_path), []
  for shape in ((8, 1), (1, 1)):
    restored = restoring.restore(folder, _abstract(_mesh(*shape)))
    assert (restored.step, restored.damaged) == (12, ())
    states.append(_host(restored.state))
    _assert_bitwise(restored.state, states[0])
  changes = checkpoints.environment_changes(restored.record)
  assert 'processes: 2 -> 1' in changes


_LOOP = '''
    import sys
    from tests import checkpoints_test as here
    mesh = here._mesh(4, 2)
    state, train_step = here._born(mesh), here._trainer(mesh)
    with here._open(sys.argv[1], keep=1) as store:
      for step in range(1, 10**6):
        state = train_step(state)
        here._save(store, step, state)
        print(step, flush=True)
    '''


@pytest.mark.slow
def test_kill_9_in_a_save_leaves_a_good_step(tmp_path):
  """Three times, each at its own moment; the store opens on what is left."""
  abstract = _abstract(_mesh(4, 2))
  for trial, moment in enumerate((0.0, 0.02, 0.05)):
    workdir = tmp_path / str(trial)
    process = subprocess.Popen(
        [sys.executable, '-c', textwrap.dedent(_LOOP), workdir],
        stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
      if int(line) == 4:
        break
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    last = [int(line) for line in process.stdout.read().split()][-1:] or [4]
    process.wait()
    with _open(workdir) as store:
      restored = store.restore(abstract)
      assert restored.damaged == ()
      # keep=1 removes a step only when the next is whole; one is under way.
      assert last[0] - 2 <= restored.step <= last[0] + 1
      assert int(restored.state['step']) == restored.step
      _save(store, restored.step + 1, restored.state)
    assert [path.name for path in store.directory.iterdir()
            if 'tmp' in path.name] == []
