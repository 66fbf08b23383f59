"""Runs and sweeps on a real SLURM, of two nodes on this machine: no part of it
is a stand-in. Only with `-m slurm`, as `make slurm-test` does."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from tests.helpers import slurm_cluster
from tests.helpers.launching import args_of, hostile_job, starts
from tools.launch import slurm

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(
    bool(slurm_cluster.missing()), reason=slurm_cluster.missing())]

ROOT = pathlib.Path(__file__).parents[3]
# What each process runs first: this Python, one device each.
SETUP = (f'export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH '
         'JAX_PLATFORMS=cpu XLA_FLAGS=')
STEPS = 40
WORDS = ('--config=configs/gpt.py:tiny', '--config.model.d_model=32',
         '--config.model.num_layers=1', '--config.model.num_heads=2',
         '--config.model.max_len=32', '--config.data.length=32',
         '--config.data.batch_size=8', '--config.eval.every_steps=0',
         '--config.eval.batches=1', '--config.log.every_steps=1')


@pytest.fixture(scope='module', name='cluster')
def _cluster():
  # A socket's path has at most 107 characters.
  folder = pathlib.Path(tempfile.mkdtemp(prefix='slurm-', dir='/tmp'))
  cluster = slurm_cluster.Cluster(folder)
  try:
    cluster.start()
    yield cluster
  finally:
    cluster.stop()
    shutil.rmtree(folder)


class Launched:
  """A job of `tools.launch slurm`, and what it has printed."""

  def __init__(self, cluster, workdir, *words):
    self.cluster, self.workdir = cluster, workdir
    result = subprocess.run(
        [sys.executable, '-m', 'tools.launch', 'slurm', '--notail',
         f'--setup={SETUP}', f'--workdir={workdir}', *WORDS, *words],
        cwd=ROOT, env=cluster.env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    self.job = re.search(r'job (\d+);', result.stdout)[1]

  def log(self, name='process-0.log'):
    path = self.workdir / 'logs' / name
    return path.read_text() if path.exists() else ''

  def until(self, pattern, name='process-0.log', seconds=600):
    self.cluster.until(lambda: re.search(pattern, self.log(name)),
                       f'{pattern!r} in {name}: {self.log(name)[-3000:]}\n'
                       f'{self.log("job.log")[-1000:]}\n', seconds)

  def ended(self, seconds=600):
    self.cluster.until(
        lambda: self.cluster.state(self.job) in (
            'COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL', ''),
        f'job {self.job}: {self.log("job.log")} {self.log()[-2000:]}', seconds)
    return self.cluster.state(self.job)

  def losses(self):
    rows = map(json.loads, (self.workdir / 'metrics.jsonl').open())
    return {row['step']: row['loss'] for row in rows if 'loss' in row}


@pytest.fixture(scope='module', name='alone')
def _alone(tmp_path_factory):
  """Returns the losses of the run in one process, without SLURM."""
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  subprocess.run(['bash', '-c', f'{SETUP}; exec "$@"', 'run', sys.executable,
                  'train.py', f'--workdir={workdir}', *WORDS,
                  f'--config.train.steps={STEPS}'],
                 cwd=ROOT, check=True, capture_output=True)
  return Launched.losses(type('Run', (), {'workdir': workdir}))


def test_two_nodes_train_as_one_process_though_one_is_lost(cluster, alone,
                                                          tmp_path):
  """A process is killed: the other one ends within a minute, the job is queued
  again, and goes on from its checkpoint to the end."""
  run = Launched(cluster, tmp_path / 'a run', '--nodes=2', '--gpus=0',
                 '--sbatch=--time=10', '--config.mesh.data=2',
                 '--config.checkpoint.every_steps=2',
                 f'--config.train.steps={STEPS}')
  run.until('2 processes, 2 devices')
  run.until('step 5/')
  killed = time.monotonic()
  os.kill(cluster.pid_of('1'), signal.SIGKILL)
  run.until('failed with exit code .*: queued again', 'job.log', 90)
  assert time.monotonic() - killed < 70
  assert 'task 1: Killed' in run.log('job.log')
  assert run.ended() == 'COMPLETED', run.log()
  assert 'going on from step' in run.log()
  assert run.log('job.log').splitlines()[-1] == 'complete'
  losses = run.losses()
  assert losses.keys() == alone.keys() == set(range(1, STEPS + 1))
  assert losses == pytest.approx(alone, abs=2e-5)


def test_a_signal_saves_and_the_job_goes_on_where_it_was(cluster, tmp_path):
  run = Launched(cluster, tmp_path / 'run', '--gpus=0',
                 f'--config.train.steps={100 * STEPS}')
  run.until('step 5/')
  cluster.ask('scancel', '--signal=TERM', run.job)
  run.until('stopped before the last step: queued again', 'job.log')
  run.until(r'(?s)going on from step \d+.*step \d+/')
  losses = run.losses()
  assert sorted(losses) == list(range(1, max(losses) + 1))
  # Without a name of a signal, scancel ends it for good.
  cluster.ask('scancel', run.job)
  assert run.ended() == 'CANCELLED'


def test_no_word_is_taken_for_shell_by_any_part_of_it(cluster, tmp_path):
  job, told = hostile_job(tmp_path)
  words = slurm.words(job, args_of(
      slurm, '--gpus=0', '--sbatch=--wait --comment="a b \'$(touch x)` # %j"'))
  number = cluster.ask(*words).strip()
  [start] = starts(tmp_path)
  assert start['argv'] == [told, '--x=' + told] and start['JAX_X'] == told
  assert not (tmp_path / 'executed').exists()
  assert 'a b \'$(touch x)` # %j' in cluster.ask('scontrol', 'show', 'job',
                                                 number)


SWEEP = '''
from configs import gpt

def get_config():
  c = gpt.get_config('tiny')
  c.model.update(d_model=32, num_layers=1, num_heads=2, max_len=32)
  c.data.update(length=32, batch_size=8)
  c.train.steps = 20
  c.optim.warmup_steps = 2
  c.eval.update(every_steps=20, batches=1)
  return c

base = get_config

def sweep(add):
  add('rms', **{'model.norm': 'rmsnorm'})
'''


def test_an_array_of_runners_ends_a_sweep(cluster, tmp_path):
  pytest.importorskip('submitit')
  file = tmp_path / 'mini.py'
  file.write_text(SWEEP)
  def sweep(command, *words):
    result = subprocess.run(
        [sys.executable, '-m', 'tools.sweep', command, *words,
         f'--workdir={tmp_path / "sweep"}'], cwd=ROOT, text=True,
        env=cluster.env | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
        capture_output=True)
    assert result.returncode == 0, result.stderr
    return result.stdout
  said = sweep('run', str(file), '--seeds=1', '--launcher=slurm', '--jobs=2',
               '--slurm=timeout_min=10')
  runs = lambda: json.loads(sweep('status', '--json'))['runs']
  cluster.until(lambda: all(run['state'] == 'done' for run in runs()),
                f'the sweep: {said}', 600, every=10)
  assert len(runs()) == 2
