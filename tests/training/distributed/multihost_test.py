"""Two real processes on loopback: they train as one does, a checkpoint of
theirs goes on by one, and they stop and end together.

Few launches: the processes cost more than the steps.
"""

import json
import os
import pathlib
import re
import shutil
import sys
import time

import numpy as np
import pytest

from tests import train_test
from tools.launch import local

texts = train_test.texts
pytestmark = [pytest.mark.multihost, pytest.mark.slow]
STEPS = 12
LOST = 9  # the step that a process is lost in; a stop is agreed on before
SAVES = '--config.checkpoint.every_steps=3'
EXPERTS = ('--config.model.moe.num_experts=4', '--config.model.moe.d_ff=32',
           '--config.model.num_kv_heads=2', '--config.model.num_layers=1')


def words(workdir, texts, *flags, config='configs/gpt.py', **mesh):
  mesh = dict(data=1, fsdp=1, expert=1, tensor=1) | mesh
  usual = [*train_test.SMALL, f'--config.train.steps={STEPS}',
           '--config.checkpoint.every_steps=100', '--config.eval.every_steps=0',
           '--config.optim.name=sgd', '--config.optim.lr=0.1',
           *(f'--config.mesh.{axis}={size}' for axis, size in mesh.items())]
  last = {flag.partition('=')[0]: flag for flag in (*usual, *flags)}
  return [f'--config={config}', f'--workdir={workdir}', texts, *last.values()]


def launch(folder, processes, devices, words, faults=(), max_restarts=0):
  """Runs the processes to their end; returns the launcher's exit code."""
  command = [sys.executable, '-m', 'tests.helpers.pod_worker',
             json.dumps(dict(words=words, faults=list(faults)))]
  return local.run_until_complete(
      command, {'PYTHONPATH': str(train_test.ROOT)}, processes, devices, 'cpu',
      str(folder / 'logs'), max_restarts)


def same(workdir, reference, last=STEPS):
  ours, theirs = train_test.losses(workdir), train_test.losses(reference)
  steps = range(1, last + 1)
  assert sorted(ours) == list(steps)
  np.testing.assert_allclose([ours[s] for s in steps],
                             [theirs[s] for s in steps], rtol=1e-5)


def two_slices(workdir, texts, *flags):
  return words(workdir, texts, *flags, '--config.mesh.slices=2', fsdp=2, data=2)


def of_experts(workdir, texts):
  return words(workdir, texts, *EXPERTS, config='configs/mixtral.py',
               expert=2, tensor=2)


def alone(devices, words):
  """Runs train.py as one process."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XLA_FLAGS', f'{os.environ["XLA_FLAGS"]} '
                 f'--xla_force_host_platform_device_count={devices}')
    train_test.run([sys.executable, 'train.py', *words])


@pytest.fixture(scope='module')
def folder(tmp_path_factory, texts):
  """A run of one process with one device, and one of two with two each, that
  is stopped."""
  folder = tmp_path_factory.mktemp('pods')
  alone(1, words(folder / 'alone', texts))
  assert launch(folder, 2, 2, two_slices(folder / 'two', texts), faults=[
      dict(folder=str(folder), workdir=str(folder / 'two'), process=1, step=2,
           kind='term')]) == 0
  # Figures cross no hosts; only checkpoints have to be agreed on.
  assert 'exchanges in step 2: 0\n' in (
      folder / 'logs/process-1.log').read_text()
  return folder


@pytest.mark.long
def test_two_processes_train_as_one_and_stop_after_the_same_step(folder):
  """SIGTERM to one of them stops both."""
  stopped, = [int(path.name) for path in (
      folder / 'two/checkpoints').iterdir() if path.name.isdigit()]
  assert 2 <= stopped < LOST
  same(folder / 'two', folder / 'alone', stopped)


@pytest.mark.long
def test_two_processes_train_experts_as_one(tmp_path, texts):
  alone(4, of_experts(tmp_path / 'alone', texts))
  assert launch(tmp_path, 2, 2, of_experts(tmp_path / 'two', texts)) == 0
  same(tmp_path / 'two', tmp_path / 'alone')


@pytest.mark.long
def test_a_lost_process_ends_all_and_the_run_goes_on(folder, texts, monkeypatch,
                                                     capfd):
  """From a copy of the stopped run: one process is killed, then the other one
  raises, and each time the launcher starts them again."""
  shutil.copytree(folder / 'two', folder / 'lost')
  ends = []
  local_run = local.run_once
  def run(*args, **options):
    codes = local_run(*args, **options)
    ends.append((time.time(), codes))
    return codes
  monkeypatch.setattr(local, 'run_once', run)
  where = folder / 'faults'
  where.mkdir()
  fault = dict(folder=str(where), workdir=str(folder / 'lost'))
  code = launch(
      where, 2, 2, two_slices(folder / 'lost', texts, SAVES), max_restarts=2,
      faults=[fault | dict(process=1, step=LOST, kind='kill'),
              fault | dict(process=0, step=LOST + 1, kind='raise')])
  output = capfd.readouterr()
  assert code == 0, output.err
  (_, killed), (_, raised), (_, done) = ends
  assert killed[1] == -9 and raised[0] == 1 and done == [0, 0]
  for (end, _), kind in zip(ends, ('kill', 'raise')):
    assert end - float((where / f'fault-{kind}').read_text()) < 30
  assert 'launch: process 1 was killed by SIGKILL' in output.err
  assert "KeyError: 'raised on purpose'" in output.err
  assert output.out.count('going on from step') == 3
  met = re.findall(r'process 0: 2 x cpu, slice 0, .*\nprocess 1: 2 x cpu',
                   output.out)
  assert len(met) == 3  # once a start
  same(folder / 'lost', folder / 'alone')


@pytest.mark.long
def test_the_rest_ends_by_itself_where_no_launcher_ends_it(tmp_path, texts,
                                                           monkeypatch):
  """JAX's coordination service notices a process that was killed."""
  monkeypatch.setattr(local, 'PATIENCE_SECONDS', 55)
  code = launch(
      tmp_path, 2, 2, two_slices(tmp_path / 'left', texts),
      faults=[dict(folder=str(tmp_path), workdir=str(tmp_path / 'left'),
                   process=1, step=LOST, kind='kill')])
  assert code == 1
  assert time.time() - float((tmp_path / 'fault-kill').read_text()) < 54


def test_one_process_goes_on_from_a_checkpoint_of_two(folder, texts):
  shutil.copytree(folder / 'two', folder / 'one')
  alone(1, words(folder / 'one', texts))
  same(folder / 'one', folder / 'alone')


def test_a_wrong_request_of_all_is_a_sentence(folder, texts, capfd):
  """Found by all of them, after they have joined: no trace, no wait."""
  began = time.monotonic()
  code = launch(folder, 2, 1, words(folder / 'never', texts, data=3))
  assert code == 2 and time.monotonic() - began < 60
  assert 'mesh.data=3' in capfd.readouterr().err
  assert not pathlib.Path(folder / 'never').exists()
