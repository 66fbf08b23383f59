"""What is saved comes back bit for bit, or is named and not used; when a save
is due, what is kept, and what a kill does; and the checksums: they see any one
element, and are the same on every mesh."""

import errno
import os
import random
import shutil
import signal
import textwrap

import hypothesis
from hypothesis import strategies as st
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from architectures.parts import paths
from common.errors import EnvironmentFailure, RequestError
from tests.helpers import forked, toy_run
from training.workdir import checkpoints


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
    restored = toy_run.resume(store, toy_run.abstract(4, 2))
  toy_run.assert_bitwise(restored.state, states[30])
  assert isinstance(restored.state['opt_state'][0], optax.ScaleByAdamState)
  assert (restored.step, restored.damaged) == (30, ())
  assert restored.record['next_batch'] == 30
  assert restored.record['tokens'] == 64 * 30
  assert restored.record['config']['optim']['lr'] == toy_run.CONFIG.optim.lr
  assert checkpoints.list_environment_changes(restored.record) == []


def test_resumed_equals_straight_bit_for_bit(run):
  """20 straight steps = 10 + restart + 10; the run goes on while it saves."""
  workdir, states = run
  restored = checkpoints.restore_checkpoint(
      checkpoints.checkpoint_folder(workdir), toy_run.abstract(4, 2), step=10)
  state, train_step = restored.state, toy_run.trainer(4, 2)
  toy_run.assert_bitwise(state, states[10])
  for _ in range(10):
    state = train_step(state)
  toy_run.assert_bitwise(state, states[20])


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(2, 4), (1, 1)])
def test_another_mesh_gets_the_same_bits(run, shape):
  workdir, states = run
  restored = checkpoints.restore_checkpoint(
      checkpoints.checkpoint_folder(workdir), toy_run.abstract(*shape))
  toy_run.assert_bitwise(restored.state, states[30])
  for name, x in paths.flatten_by_path(restored.state['params']).items():
    assert x.sharding.mesh == toy_run.make_mesh(*shape), name
  after = toy_run.trainer(*shape)(restored.state)
  assert int(after['step']) == 31


def test_a_part_of_a_step_by_number(run):
  """For evaluation: the optimizer's two thirds are not read."""
  workdir, states = run
  abstract = {'params': toy_run.abstract(1, 1)['params']}
  folder = checkpoints.checkpoint_folder(workdir)
  state = checkpoints.restore_checkpoint(folder, abstract, 20,
                                         partial=True).state
  toy_run.assert_bitwise(state, {name: x for name, x in states[20].items()
                                 if name.startswith('params/')})
  with pytest.raises(checkpoints.CheckpointMismatch,
                     match='opt_state/0/mu.* not here'):
    checkpoints.restore_checkpoint(folder, abstract)
  with pytest.raises(RequestError, match='step 25 .* there are 10, 20, 30'):
    checkpoints.restore_checkpoint(folder, abstract, 25)


def _bias(state, shape, dtype):
  bias = state['params']['up']['bias']
  state['params']['up']['bias'] = jax.ShapeDtypeStruct(
      shape, dtype, sharding=bias.sharding)


@pytest.mark.parametrize('change, sentence', [
    (lambda state: _bias(state, (513,), jnp.float32),
     r'params/up/bias is float32\[512\] in the .* and float32\[513\]'),
    (lambda state: _bias(state, (512,), jnp.bfloat16),
     r'params/up/bias is float32\[512\] in the .* and bfloat16\[512\]'),
    (lambda state: state['params'].update(over=state['params'].pop('up')),
     r'params/over/kernel is not in the.*params/up/kernel is .* not here')])
def test_what_does_not_fit_is_refused_by_name(copy, change, sentence):
  """And not taken for damage: no step is passed over or set aside."""
  abstract = toy_run.abstract(1, 1)
  change(abstract)
  with toy_run.open_store(copy) as store:
    with pytest.raises(checkpoints.CheckpointMismatch, match=sentence):
      toy_run.resume(store, abstract)
  assert checkpoints.list_steps(checkpoints.checkpoint_folder(copy)) == [10, 20,
                                                                         30]


def _truncate(step_dir):
  path = toy_run.data_files(step_dir)[0]
  os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize('damage', [
    _truncate, toy_run.flip_in_largest,
    lambda step_dir: toy_run.data_files(step_dir)[0].unlink(),
    lambda step_dir: (step_dir / 'state' / 'manifest.ocdbt').unlink(),
    lambda step_dir: shutil.rmtree(step_dir / 'record'),
    lambda step_dir: os.truncate(step_dir / 'record' / 'metadata', 100)])
def test_damage_is_named_and_the_step_before_is_used(run, copy, damage):
  damage(copy / 'checkpoints' / '30')
  with toy_run.open_store(copy) as store:
    restored = toy_run.resume(store, toy_run.abstract(4, 2))
    sentence, = restored.damaged
    assert sentence.startswith('checkpoint 30 in ')
    assert ' is damaged: ' in sentence and '\n' not in sentence
    assert sentence.endswith('; using 20 instead')
    assert restored.step == 20
    toy_run.assert_bitwise(restored.state, run[1][20])
    # The run comes to step 30 again, and `keep` counts only what is good.
    assert checkpoints.list_steps(store.directory) == [10, 20]
    assert len(list(store.directory.glob('30.aside-*'))) == 1
    assert toy_run.save(store, 30, restored.state)
    store.wait()
    assert checkpoints.list_steps(store.directory) == [10, 20, 30]


def test_what_was_saved_of_bad_steps_pushes_no_good_one_out(tmp_path):
  """Nor after a resume, where the records tell which are good."""
  state = toy_run.born(1, 1)
  for saves, kept in (({10: True, 20: True, 30: False, 40: False}, [20, 40]),
                      ({50: False}, [20, 50]), ({60: True}, [60])):
    with toy_run.open_store(tmp_path, keep=1) as store:
      for step, is_good in saves.items():
        toy_run.save(store, step, state, good=is_good)
    assert checkpoints.list_steps(store.directory) == kept


@pytest.mark.parametrize('part', ['record', 'arrays'])
@pytest.mark.parametrize('code', [errno.ESTALE, errno.EIO])
def test_an_error_of_the_machine_is_no_damage(copy, monkeypatch, code, part):
  name = f'_read_{part}'
  read = getattr(checkpoints, name)

  def fail(folder, *args, **options):
    if folder.name == '30':
      raise OSError(code, os.strerror(code), str(folder))
    return read(folder, *args, **options)
  monkeypatch.setattr(checkpoints, name, fail)
  with toy_run.open_store(copy) as store:
    if code == errno.EIO:  # which may be of these files alone
      assert toy_run.resume(store, toy_run.abstract(1, 1)).step == 20
      return
    with pytest.raises(EnvironmentFailure, match='30 .* may be sound: .*Errno'):
      toy_run.resume(store, toy_run.abstract(1, 1))
    assert checkpoints.list_steps(store.directory) == [10, 20, 30]


def test_no_flipped_bit_of_any_file_gets_through(run, copy):
  """Small files have as many as large ones: each is named or without effect,
  to a run and to an evaluation."""
  step_dir, states = copy / 'checkpoints' / '30', run[1]
  abstract = toy_run.abstract(1, 1)
  part = {'params': abstract['params']}
  folder = checkpoints.checkpoint_folder(copy)
  draw, noticed = random.Random(0), set()
  for path in sorted(p for p in step_dir.rglob('*') if p.is_file()):
    for _ in range(2):
      place, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
      toy_run.flip(path, place, bit)
      for wanted in (abstract, part):
        restored = checkpoints.restore_checkpoint(folder, wanted,
                                                  partial=wanted is part)
        assert (restored.step == 20) == bool(restored.damaged)
        noticed |= {path.name} if restored.damaged else set()
        expected = states[restored.step]
        toy_run.assert_bitwise(restored.state, {
            name: expected[name] for name in paths.flatten_by_path(wanted)})
      toy_run.flip(path, place, bit)
  assert {'_METADATA', 'metadata', 'manifest.ocdbt'} <= noticed


def test_a_flipped_name_is_named_whatever_is_read(copy):
  """In Orbax's own list of the arrays: of one that an evaluation leaves out."""
  path = copy / 'checkpoints' / '30' / 'state' / '_METADATA'
  toy_run.flip(path, path.read_bytes().index(b'"key": "opt_state"') + 10)
  abstract, folder = toy_run.abstract(1, 1), checkpoints.checkpoint_folder(copy)
  for wanted in (abstract, {'params': abstract['params']}):
    restored = checkpoints.restore_checkpoint(folder, wanted,
                                              partial=wanted != abstract)
    assert restored.step == 20 and '30' in restored.damaged[0]


def test_a_flip_in_any_matrix_is_found_by_its_checksum(run, copy):
  """Each is looked up where it lies in the file, and hit there."""
  step_dir, expected = copy / 'checkpoints' / '30', run[1][30]
  folder, abstract = checkpoints.checkpoint_folder(copy), toy_run.abstract(1, 1)
  contents = {path: path.read_bytes() for path in toy_run.data_files(step_dir)}
  matrices = [(name, x) for name, x in expected.items() if x.ndim == 2]
  assert len(matrices) == 6  # two matrices and their two moments
  for name, x in matrices:
    # The run was sharded 4 x 2: half of the first row is in one piece.
    piece = x[0, :x.shape[1] // 2].tobytes()
    (path, place), = [(path, content.find(piece))
                      for path, content in contents.items() if piece in content]
    toy_run.flip(path, place + 1)
    restored = checkpoints.restore_checkpoint(folder, abstract)
    toy_run.flip(path, place + 1)
    assert restored.step == 20, name
    assert f'the checksum of {name} is not' in restored.damaged[0], name


@pytest.mark.parametrize('change, new', [(shutil.move, 25),
                                         (shutil.copytree, 35)])
def test_a_folder_under_another_number_is_passed_over(
    run, copy, change, new):
  """Renamed or copied: of a run that says it goes on from step 35, the steps
  to 35 must have been trained. Other names are left alone."""
  folder = copy / 'checkpoints'
  shutil.rmtree(folder / '30')
  change(folder / '20', folder / str(new))
  (folder / 'notes').mkdir()
  (folder / f'{10 ** 20 - 1}').mkdir()  # no number of a step
  good = 10 if change is shutil.move else 20
  with toy_run.open_store(copy) as store:
    restored = toy_run.resume(store, toy_run.abstract(4, 2))
    assert restored.step == int(restored.state['step']) == good
    assert f'checkpoint {new} in ' in restored.damaged[0]
    assert 'it holds step 20' in restored.damaged[0]
    toy_run.assert_bitwise(restored.state, run[1][good])
  assert list(folder.glob(f'{new}.aside-*')) and (folder / 'notes').exists()


@hypothesis.given(
    goods=st.dictionaries(st.integers(0, 60), st.booleans(), max_size=20),
    keep=st.integers(1, 4), keep_every=st.sampled_from([0, 1, 7]),
    best=st.none() | st.integers(0, 60))
@hypothesis.settings(deadline=None)
def test_what_is_kept(goods, keep, keep_every, best):
  kept = checkpoints.steps_to_keep(list(goods), goods.__getitem__, best,
                                   keep=keep,
                                   keep_every=keep_every)
  assert kept <= set(goods)
  good = [step for step in sorted(goods) if goods[step]]
  assert set(good[-keep:]) <= kept
  assert not goods or max(goods) in kept
  assert best not in goods or best in kept
  for step in kept - set(good[-keep:]) - {max(goods, default=0), best}:
    assert keep_every and step % keep_every == 0
  if keep_every:
    assert {step for step in goods if step % keep_every == 0} <= kept


@pytest.mark.parametrize('every_steps, every_minutes, due', [
    (4, 0.0, [4, 8, 12]), (7, 5.0, [5, 7, 12])])
def test_due_by_step_or_by_time_since_the_last(
    tmp_path, every_steps, every_minutes, due):
  """One step takes one minute of this clock; a save starts the time anew."""
  now, saved = [0.0], []
  state = toy_run.born(1, 1)
  with toy_run.open_store(
      tmp_path, every_steps=every_steps, every_minutes=every_minutes,
      clock=lambda: now[0]) as store:
    for step in range(1, 14):
      now[0] += 60
      if store.is_due(step):
        toy_run.save(store, step, state)
        saved.append(step)
  assert saved == due


_LOOP = '''
    import os, signal, sys, threading
    from tests.helpers import toy_run as here
    state, train_step = here.born(4, 2), here.trainer(4, 2)
    with here.open_store(sys.argv[1], keep=1) as store:
      for step in range(1, 10**6):
        state = train_step(state)
        here.save(store, step, state)
        print(step, flush=True)
        if step == 4:
          threading.Timer(float(sys.argv[2]), os.kill, (
              os.getpid(), signal.SIGKILL)).start()
    '''


@pytest.mark.slow
def test_kill_9_in_a_save_leaves_a_good_step(tmp_path):
  """Three times, each at its own moment; the store opens on what is left."""
  abstract = toy_run.abstract(4, 2)
  program = tmp_path / 'loop.py'
  program.write_text(textwrap.dedent(_LOOP))
  for trial, moment in enumerate((0.0, 0.02, 0.05)):
    workdir = tmp_path / str(trial)
    killed = forked.run(program, workdir, moment)
    assert killed.returncode == -signal.SIGKILL
    last = int(killed.stdout.split()[-1])
    with toy_run.open_store(workdir) as store:
      restored = toy_run.resume(store, abstract)
      assert restored.damaged == ()
      # keep=1 removes a step only when the next is whole; one is under way.
      assert last - 1 <= restored.step <= last + 1
      assert int(restored.state['step']) == restored.step
      toy_run.save(store, restored.step + 1, restored.state)
    assert [path.name for path in store.directory.iterdir()
            if 'tmp' in path.name] == []


# Checksums.


def _checksum(x):
  return checkpoints.compute_checksums({'x': x})['x']


def test_a_checksum_is_that_of_the_definition_and_of_every_mesh(monkeypatch):
  """And of parts of any size, by which it goes."""
  x = np.random.default_rng(0).normal(size=(2, 16, 8)).astype(np.float32)
  sums = set()
  for shape in ((8, 1), (2, 4), (1, 1)):
    place = NamedSharding(toy_run.make_mesh(*shape), P(None, 'fsdp', 'tensor'))
    sums.add(_checksum(jax.device_put(x, place)))
  for at_once in (1, 8 * 5, 8 * 7):
    monkeypatch.setattr(checkpoints, '_ELEMENTS_SUMMED_AT_ONCE', at_once)
    checkpoints._make_device_sums.cache_clear()
    sums.add(_checksum(jnp.asarray(x)))
  checkpoints._make_device_sums.cache_clear()
  h = np.arange(x.size, dtype=np.uint32) * np.uint32(0x9E3779B1)
  h ^= x.view(np.uint32).ravel()
  h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)  # MurmurHash3's fmix32
  h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
  h ^= h >> 16
  assert sums == {int(np.sum(h, dtype=np.uint32))}


@pytest.mark.parametrize('dtype', [
    'float32', 'bfloat16', 'float8_e4m3fn', 'int32', 'uint32', 'int8', 'int4',
    'bool'])
def test_a_checksum_sees_any_one_element_and_an_exchange(dtype):
  zeros = jnp.zeros((3, 5), dtype)
  sums = {_checksum(zeros)}
  for i in range(15):
    sums.add(_checksum(zeros.at[i // 5, i % 5].set(jnp.ones((), dtype))))
  assert len(sums) == 16
  assert _checksum(jnp.array([0.0])) != _checksum(jnp.array([-0.0]))
