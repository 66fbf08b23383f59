"""Several real processes on loopback: they train as one does, restore what
another number of them has saved, and end together.

Few launches, each with several runs: the processes cost more than the steps.
"""

import json
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
EVAL = '--config.eval.every_steps=6'
EXPERTS = ('--config.model.moe.num_experts=4', '--config.model.moe.d_ff=32',
           '--config.model.num_kv_heads=2', '--config.mesh.expert=4')


def words(workdir, texts, *flags, config='configs/gpt.py', **mesh):
  mesh = dict(data=1, fsdp=1, expert=1, tensor=1) | mesh
  return [f'--config={config}', f'--workdir={workdir}', texts,
          *train_test.SMALL, f'--config.train.steps={STEPS}',
          '--config.checkpoint.every_steps=3', '--config.checkpoint.keep=4',
          '--config.eval.every_steps=0',
          *(f'--config.mesh.{axis}={size}' for axis, size in mesh.items()),
          *flags]


def launch(folder, processes, devices, runs, faults=(), max_restarts=0):
  """Runs the processes to their end; returns (code, all they have printed)."""
  command = [sys.executable, '-m', 'tests.helpers.pod_worker',
             json.dumps(dict(runs=runs, faults=list(faults)))]
  code = local.supervise(
      command, {'PYTHONPATH': str(train_test.ROOT)}, processes, devices, 'cpu',
      str(folder / 'logs'), max_restarts)
  return code, [path.read_text() for path in
                sorted((folder / 'logs').glob('process-*.log'))]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('pods')


def saved_at(folder, name, step):
  """Returns a copy of a run as it was after `step`."""
  copy = folder / f'{name}-{len(list(folder.iterdir()))}'
  shutil.copytree(folder / name, copy)
  for path in (copy / 'checkpoints').iterdir():
    if path.name.isdigit() and int(path.name) > step:
      shutil.rmtree(path)
  assert (copy / 'checkpoints' / str(step)).exists()
  return copy


def losses(workdir):
  return train_test.losses(workdir)


def same(workdir, reference, steps=range(1, STEPS + 1)):
  ours, theirs = losses(workdir), losses(reference)
  assert sorted(ours) == list(steps)
  np.testing.assert_allclose([ours[s] for s in steps],
                             [theirs[s] for s in steps], rtol=1e-5)


@pytest.fixture(scope='module')
def alone(folder, texts):
  """One process, eight devices: what the others are compared with."""
  code, _ = launch(folder, 1, 8, [
      words(folder / 'alone', texts, EVAL, fsdp=4, data=2)])
  assert code == 0
  return folder


@pytest.fixture(scope='module')
def experts(folder, texts):
  """Likewise, of a mixture of experts."""
  code, _ = launch(folder, 1, 8, [
      words(folder / 'experts', texts, *EXPERTS, config='configs/mixtral.py',
            tensor=2)])
  assert code == 0
  return folder / 'experts'


@pytest.fixture(scope='module')
def two(alone, texts):
  """Two processes of four devices, as two slices; the last run, of the same
  program, is stopped."""
  capture = alone / 'two'
  capture.mkdir()
  code, output = launch(capture, 2, 4, [
      words(alone / 'two-run', texts, EVAL, '--config.mesh.slices=2', fsdp=4,
            data=2),
      words(alone / 'stopped', texts, '--config.mesh.slices=2', fsdp=4,
            data=2)],
      faults=[dict(folder=str(capture), workdir=str(alone / 'stopped'),
                   process=1, step=2, kind='term')])
  assert code == 0
  return output


@pytest.mark.long
def test_two_processes_as_two_slices_train_as_one(alone, two):
  same(alone / 'two-run', alone / 'alone')


@pytest.mark.long
def test_experts_over_two_processes_are_those_of_one(folder, experts, texts):
  code, _ = launch(folder, 2, 4, [
      words(folder / 'two-experts', texts, *EXPERTS, tensor=2,
            config='configs/mixtral.py')])
  assert code == 0
  same(folder / 'two-experts', experts)


@pytest.mark.long
def test_two_processes_evaluate_as_one(alone, two):
  ours, theirs = ([(r['step'], r['loss']) for r in train_test.rows(workdir)
                   if r['split'] == 'eval']
                  for workdir in (alone / 'two-run', alone / 'alone'))
  assert [step for step, _ in ours] == [6, 12]
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_figures_cross_hosts_once_a_log_interval(two):
  """Here each step, but for those that a checkpoint has to agree on more."""
  for step in (5, 6, 8, 9):
    assert f'exchanges in step {step}: 1\n' in two[0]


def test_sigterm_to_one_stops_all_after_the_same_step(alone, two):
  saved = max(int(path.name) for path in
              (alone / 'stopped/checkpoints').iterdir() if path.name.isdigit())
  assert 2 <= saved < LOST
  assert max(losses(alone / 'stopped')) == saved


@pytest.fixture(scope='module')
def reshaped(alone, two, texts):
  """The checkpoint of 2 x 4 devices, on 4 x 2, 1 x 8 and 1 x 1."""
  copies = {shape: saved_at(alone, 'two-run', 3)
            for shape in ('4x2', '1x8', '1x1')}
  rare = '--config.log.every_steps=3'
  (alone / 'four').mkdir()
  code, output = launch(alone / 'four', 4, 2, [
      words(copies['4x2'], texts, rare, data=4, fsdp=2),
      words(alone / 'four-experts', texts, *EXPERTS, tensor=2,
            config='configs/mixtral.py')])
  assert code == 0
  for log in output:  # the interval ends with step 6, which is read in step 7
    for step in (5, 6, 8, 9):
      assert f'exchanges in step {step}: 0\n' in log
    assert 'exchanges in step 7: 0' not in log
  return copies


@pytest.mark.parametrize('shape, devices, mesh', [
    pytest.param('4x2', 0, {}, marks=pytest.mark.long),
    pytest.param('1x8', 8, dict(fsdp=4, tensor=2), marks=pytest.mark.long),
    pytest.param('1x1', 1, {}, marks=pytest.mark.long)])
def test_a_checkpoint_goes_on_on_another_shape(alone, reshaped, texts, shape,
                                               devices, mesh):
  if devices:  # by one process; four have done it already
    code, _ = launch(alone / 'four', 1, devices, [
        words(reshaped[shape], texts, **mesh)])
    assert code == 0
  steps = {'4x2': [1, 2, 3, 6, 9, 12]}.get(shape, range(1, STEPS + 1))
  same(reshaped[shape], alone / 'alone', steps)


@pytest.mark.long
def test_experts_over_four_processes_are_those_of_one(alone, experts, reshaped):
  same(alone / 'four-experts', experts)


@pytest.mark.long
def test_a_lost_process_ends_all_and_the_run_goes_on(alone, two, texts,
                                                     monkeypatch, capfd):
  """From the stopped run: one process is killed, then the other one raises,
  and each time the launcher starts them again."""
  ends = []
  def run(*args):
    codes = local_run(*args)
    ends.append((time.time(), codes))
    return codes
  local_run = local.run
  monkeypatch.setattr(local, 'run', run)
  where = alone / 'faults'
  where.mkdir()
  fault = dict(folder=str(where), workdir=str(alone / 'stopped'))
  code, (log,) = launch(
      where, 2, 4, [words(alone / 'stopped', texts, '--config.mesh.slices=2',
                          fsdp=4, data=2)],
      faults=[fault | dict(process=1, step=LOST, kind='kill'),
              fault | dict(process=0, step=LOST + 1, kind='raise')],
      max_restarts=2)
  said = capfd.readouterr()
  assert code == 0, said.err
  assert [codes for _, codes in ends] == [[1, -9], [1, 1], [0, 0]]
  for (end, _), kind in zip(ends, ('kill', 'raise')):
    assert end - float((where / f'fault-{kind}').read_text()) < 15
  assert 'process 1 is gone: it was killed' in said.err
  assert "process 0 failed: KeyError: 'raised on purpose'" in said.err
  assert "process 0 failed: KeyError: 'raised on purpose'; process 1" in log
  assert said.out.count('going on from step') == 3
  tables = re.findall(r'process +host +pid +devices +slice\n'
                      r'0 +\S+ +\d+ +4 x cpu +0\n1 +\S+ +\d+ +4 x cpu +0\n'
                      '2 processes, 8 devices\n', said.out)
  assert len(tables) == 3  # one a start
  same(alone / 'stopped', alone / 'alone')


def test_a_wrong_request_of_one_is_one_of_all(alone, texts, capfd):
  """Found by all of them, after they have joined: no trace, no wait."""
  began = time.monotonic()
  code, _ = launch(alone / 'wrong', 2, 1, [
      words(alone / 'never', texts, data=3)])
  assert code == 2 and time.monotonic() - began < 60
  assert 'mesh.data=3' in capfd.readouterr().err
  assert not pathlib.Path(alone / 'never').exists()
