"""Two processes on loopback train what one does, and go on from each other."""

import os
import socket
import subprocess

import numpy as np
import pytest

from tests import train_test

texts = train_test.texts
pytestmark = pytest.mark.multihost
FLAGS = ('--config.train.steps=6', '--config.mesh.data=2',
         '--config.mesh.fsdp=2', '--config.checkpoint.every_steps=3')


def _free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def launch(workdir, texts, processes, *flags, config='configs/gpt.py'):
  """Runs train.py as so many processes, over four devices in all."""
  words = train_test.command(workdir, texts, *FLAGS, *flags, config=config)
  devices = ('--xla_force_host_platform_device_count='
             f'{4 // processes} --xla_backend_optimization_level=0')
  together = [] if processes == 1 else [
      f'--coordinator=127.0.0.1:{_free_port()}',
      f'--num_processes={processes}']
  running = [subprocess.Popen(
      words + together + ([f'--process_id={i}'] if together else []),
      cwd=train_test.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      text=True, env=os.environ | {'XLA_FLAGS': devices})
             for i in range(processes)]
  outputs = [p.communicate(timeout=280) for p in running]
  for process, (out, err) in zip(running, outputs):
    assert process.returncode == 0, out + err
  return [out for out, _ in outputs]


@pytest.fixture(scope='module')
def alone(tmp_path_factory, texts):
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  launch(workdir, texts, 1)
  return train_test.losses(workdir)


def test_two_processes_train_as_one(alone, texts, tmp_path):
  first, second = launch(tmp_path / 'run', texts, 2)
  losses = train_test.losses(tmp_path / 'run')
  assert losses.keys() == alone.keys()
  np.testing.assert_allclose(list(losses.values()), list(alone.values()),
                             rtol=1e-5)
  assert 'step 6/6' in first and 'step 6/6' not in second  # one of them speaks


def test_one_process_goes_on_where_two_were(alone, texts, tmp_path):
  launch(tmp_path / 'run', texts, 2, '--config.train.steps=3',
         '--config.optim.schedule=constant')
  launch(tmp_path / 'run', texts, 1, '--config.optim.schedule=constant')
  whole = tmp_path / 'whole'
  launch(whole, texts, 1, '--config.optim.schedule=constant')
  np.testing.assert_allclose(
      list(train_test.losses(tmp_path / 'run').values()),
      list(train_test.losses(whole).values()), rtol=1e-5)
