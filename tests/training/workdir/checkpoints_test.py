"""When a save is due, what is kept, and what a kill or another process does."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from tests.helpers import toy_run
from training.workdir import checkpoints
from training.workdir import restoring


@pytest.mark.slow
@pytest.mark.parametrize('keep, keep_every, left', [
    (1, 0, [9]), (2, 0, [8, 9]), (2, 4, [4, 8, 9]), (1, 3, [3, 6, 9])])
def test_keeps_the_newest_and_every_nth(tmp_path, keep, keep_every, left):
  state = toy_run.born(1, 1)
  with toy_run.open_store(tmp_path, keep=keep, keep_every=keep_every) as store:
    for step in range(1, 10):
      toy_run.save(store, step, state)
  assert restoring.steps(restoring.directory(tmp_path)) == left


def test_the_same_state_is_not_saved_twice(tmp_path):
  state = toy_run.born(1, 1)
  with toy_run.open_store(tmp_path) as store:
    assert toy_run.save(store, 10, state)
    assert not toy_run.save(store, 10, state)
  with toy_run.open_store(tmp_path) as store:
    restored = store.restore(toy_run.abstract(1, 1))
    assert not toy_run.save(store, 10, restored.state)


def test_a_stop_soon_after_a_start_is_saved(tmp_path, monkeypatch):
  """At a stop of several processes, all agree by JAX's preemption service,
  which Orbax asks too."""
  state = toy_run.born(1, 1)
  with toy_run.open_store(tmp_path) as store:
    toy_run.save(store, 1, state)
  monkeypatch.setattr('orbax.checkpoint.utils.reached_preemption',
                      lambda step: True)
  with toy_run.open_store(tmp_path) as store:
    restored = store.restore(toy_run.abstract(1, 1))
    toy_run.save(store, 2, restored.state)
    store.wait()
  assert restoring.steps(restoring.directory(tmp_path)) == [1, 2]


@pytest.mark.parametrize('every_steps, every_minutes, due', [
    (0, 0.0, []), (4, 0.0, [4, 8, 12]), (0, 5.0, [5, 10]),
    (4, 5.0, [4, 8, 12]), (7, 5.0, [5, 7, 12])])
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
      if store.due(step):
        toy_run.save(store, step, state)
        saved.append(step)
  assert saved == due


@pytest.mark.parametrize('field, value', [
    ('keep', 0), ('keep_every', -1), ('every_steps', -1),
    ('every_minutes', -0.5)])
def test_wrong_numbers_are_refused(tmp_path, field, value):
  with pytest.raises(ValueError, match=rf'checkpoint\.{field}={value}'):
    toy_run.open_store(tmp_path, **{field: value})


def test_what_differs_from_the_environment_of_a_run_is_said():
  now = checkpoints.environment()
  earlier = {'environment': now | dict(jax='0.1', processes=2)}
  assert checkpoints.environment_changes(earlier) == [
      f'jax: 0.1 -> {now["jax"]}', 'processes: 2 -> 1']


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
    from training.workdir import checkpoints
    from tests.helpers import toy_run as here
    now = [0.0]
    state, train_step = here.born(4, 2), here.trainer(4, 2)
    with here.open_store(workdir, every_steps=0, every_minutes=5, agree_every=2,
                    clock=lambda: now[0]) as store:
      for step in range(1, 13):
        state = train_step(state)
        now[0] += 60 if index == 0 else 0  # only process 0's clock counts
        if store.due(step):
          here.save(store, step, state)
          print('saved', step, flush=True)
      store.wait()
      if index == 0:
        here.flip_in_largest(pathlib.Path(store.directory / '12'))
      restored = store.restore(here.abstract(4, 2))
      print('restored', restored.step, len(restored.damaged), flush=True)
      for step in range(restored.step + 1, 13):
        restored.state.update(train_step(restored.state))
      here.save(store, 12, restored.state)
      print('saved', 12, flush=True)
    '''


@pytest.mark.long
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
    # Gloo writes between them, and not always by whole lines.
    assert [line for line in out
            if line.startswith(('saved', 'restored'))] == [
        'saved 6', 'saved 12', 'restored 6 1', 'saved 12']
  folder, states = restoring.directory(tmp_path), []
  for shape in ((8, 1), (1, 1)):
    restored = restoring.restore(folder, toy_run.abstract(*shape))
    assert (restored.step, restored.damaged) == (12, ())
    states.append(toy_run.host(restored.state))
    toy_run.assert_bitwise(restored.state, states[0])
  changes = checkpoints.environment_changes(restored.record)
  assert 'processes: 2 -> 1' in changes


_LOOP = '''
    import sys
    from tests.helpers import toy_run as here
    state, train_step = here.born(4, 2), here.trainer(4, 2)
    with here.open_store(sys.argv[1], keep=1) as store:
      for step in range(1, 10**6):
        state = train_step(state)
        here.save(store, step, state)
        print(step, flush=True)
    '''


@pytest.mark.slow
def test_kill_9_in_a_save_leaves_a_good_step(tmp_path):
  """Three times, each at its own moment; the store opens on what is left."""
  abstract = toy_run.abstract(4, 2)
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
    with toy_run.open_store(workdir) as store:
      restored = store.restore(abstract)
      assert restored.damaged == ()
      # keep=1 removes a step only when the next is whole; one is under way.
      assert last[0] - 1 <= restored.step <= last[0] + 1
      assert int(restored.state['step']) == restored.step
      toy_run.save(store, restored.step + 1, restored.state)
    assert [path.name for path in store.directory.iterdir()
            if 'tmp' in path.name] == []
