"""Runs and sweeps on a real SLURM, of two nodes on this machine: no part of it
is a stand-in. Only with `-m slurm`, as `make slurm-test` does."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

from tests.helpers import slurm_cluster
from tests.helpers.launching import args_of, hostile_job, maker, starts
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


@pytest.fixture(scope='module', name='limited')
def _limited(cluster, tmp_path_factory):
  """A run whose time limit of three minutes passes while others are tested."""
  return Launched(cluster, tmp_path_factory.mktemp('limited') / 'run',
                  '--gpus=0', '--grace_seconds=1', '--sbatch=--time=3',
                  '--config.train.steps=1000000', '--config.log.every_steps=50',
                  '--config.checkpoint.every_steps=1000000')


def test_two_nodes_of_two_processes_train_as_one_process(
    cluster, limited, alone, tmp_path):
  run = Launched(cluster, tmp_path / 'a run', '--nodes=2', '--gpus=2',
                 '--per_gpu', '--sbatch=--time=10', '--config.mesh.data=4',
                 f'--config.train.steps={STEPS}')
  assert run.ended() == 'COMPLETED', run.log()
  assert '4 processes, 4 devices' in run.log()
  assert run.log('job.log').splitlines()[-1] == 'complete'
  losses = run.losses()
  assert losses.keys() == alone.keys() == set(range(1, STEPS + 1))
  assert losses == pytest.approx(alone, abs=2e-5)


def test_a_signal_saves_and_the_job_goes_on_where_it_was(
    cluster, alone, tmp_path):
  run = Launched(cluster, tmp_path / 'run', '--gpus=0',
                 f'--config.train.steps={100 * STEPS}')
  run.until('step 5/')
  cluster.ask('scancel', '--signal=TERM', run.job)
  run.until('stopped before the last step: queued again', 'job.log')
  run.until(r'(?s)going on from step \d+.*step \d+/')
  losses = run.losses()
  assert {step: losses[step] for step in range(1, 6)} == pytest.approx(
      {step: alone[step] for step in range(1, 6)}, abs=2e-5)
  assert sorted(losses) == list(range(1, max(losses) + 1))
  # Without a name of a signal, scancel ends it for good.
  cluster.ask('scancel', run.job)
  assert run.ended() == 'CANCELLED'
  # Longer than a job that is queued again has to wait.
  time.sleep(slurm_cluster.EXPIRE + 3)
  assert cluster.state(run.job) == 'CANCELLED'


def test_a_node_that_dies_is_named_and_the_job_goes_on_without_loss(
    cluster, alone, tmp_path):
  run = Launched(cluster, tmp_path / 'run', '--nodes=2', '--gpus=0',
                 '--config.mesh.data=2', '--config.checkpoint.every_steps=2',
                 f'--config.train.steps={100 * STEPS}')
  run.until('step 5/')
  cluster.kill_node(slurm_cluster.NODES[1])
  run.until('process 1 .*is gone')
  cluster.until(lambda: cluster.state(run.job) == 'PENDING', run.log('job.log'))
  cluster.start_node(slurm_cluster.NODES[1])
  run.until(r'(?s)going on from step \d+.*step \d+/')
  cluster.ask('scancel', run.job)
  run.ended()
  losses = run.losses()
  assert {step: losses[step] for step in range(1, 6)} == pytest.approx(
      {step: alone[step] for step in range(1, 6)}, abs=2e-5)
  assert sorted(losses) == list(range(1, max(losses) + 1))


def test_no_word_is_taken_for_shell_by_any_part_of_it(cluster, tmp_path):
  told, changes = hostile_job(tmp_path)
  job = maker(tmp_path)('0', **changes)
  path = tmp_path / 'job.sh'
  path.write_text(slurm.script(job, args_of(
      slurm, '--gpus=0', '--sbatch=--comment="a b \'$(touch x)` # %j"')))
  number = cluster.ask('sbatch', '--parsable', '--wait', str(path)).strip()
  [start] = starts(tmp_path)
  assert start['argv'] == [told, '--x=' + told] and start['JAX_X'] == told
  assert not (tmp_path / 'executed').exists()
  assert 'a b \'$(touch x)` # %j' in cluster.ask('scontrol', 'show', 'job',
                                                 number)


def test_a_time_limit_saves_and_the_job_goes_on(cluster, limited):
  limited.until('stopped before the last step: queued again', 'job.log', 300)
  limited.until(r'(?s)going on from step \d+.*step \d+/')
  cluster.ask('scancel', limited.job)
  assert limited.ended() == 'CANCELLED'


SWEEP = '''
from configs import gpt

def base():
  c = gpt.get_config('tiny')
  c.model.update(d_model=32, num_layers=1, num_heads=2, max_len=32)
  c.data.update(length=32, batch_size=8)
  c.train.steps = {steps}
  c.optim.warmup_steps = 2
  c.eval.update(every_steps={steps}, batches=1)
  c.checkpoint.update(every_steps=20, keep=1)
  return c

get_config = base

def sweep(add):
  add('rms', **{{'model.norm': 'rmsnorm'}})
'''


@pytest.fixture(name='sweep')
def _sweep(cluster, tmp_path):
  """Returns a function that calls `tools.sweep`."""
  def call(command, *words):
    environment = cluster.env | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    return subprocess.run(
        [sys.executable, '-m', 'tools.sweep', command,
         f'--workdir={tmp_path / "sweep"}', *words],
        cwd=ROOT, env=environment, capture_output=True, text=True)
  return call


def test_an_array_of_runners_is_preempted_and_ends_the_sweep(
    cluster, sweep, tmp_path):
  pytest.importorskip('submitit')
  file = tmp_path / 'mini.py'
  file.write_text(SWEEP.format(steps=3000))
  result = sweep('run', str(file), '--seeds=2', '--launcher=slurm', '--jobs=2',
                 '--novectorised',
                 '--slurm=timeout_min=40,slurm_partition=low,cpus_per_task=3')
  assert result.returncode == 0, result.stderr
  jobs = re.findall(r'(\d+_\d+)', result.stdout)
  assert len(jobs) == 2

  def runs():
    return json.loads(sweep('status', '--json').stdout)['runs']

  def logs():
    return [path.read_text() for path in (tmp_path / 'sweep').rglob('log.txt')]

  def saved(run):
    folder = tmp_path / 'sweep/points' / run['point'] / f'seed-{run["seed"]}'
    return any(path.name.isdigit() for path in folder.glob('checkpoints/*'))

  def both_can_go_on():
    running = [run for run in runs() if run['state'] == 'running']
    return len(running) == 2 and all(map(saved, running))
  # On a busy machine the time between the signal and the kill is too short to
  # save in.
  # (To ask takes seconds of the cores that the runs need.)
  cluster.until(both_can_go_on, f'two runs: {result.stdout}', 600, every=5)
  # A job that comes first takes a whole node, and one runner with it.
  first = subprocess.run(
      ['sbatch', '--parsable', '--partition=high', '--exclusive', '--nodes=1',
       '--output=/dev/null', '--wrap=sleep 20'],
      env=cluster.env, capture_output=True, text=True, check=True)
  cluster.until(lambda: cluster.state(first.stdout.strip()) == 'COMPLETED',
                'the first job', 600)
  cluster.until(lambda: all(run['state'] == 'done' for run in runs()),
                f'the sweep: {runs()}', 1200, every=10)
  assert len(runs()) == 4
  restarts = [re.search(r'Restarts=(\d+)', cluster.ask(
      'scontrol', 'show', 'job', job))[1] for job in jobs]
  assert sorted(restarts) == ['0', '1']
  assert any('going on from step' in text for text in logs())


def test_a_run_that_failed_is_tried_again_by_an_array(
    cluster, sweep, tmp_path):
  pytest.importorskip('submitit')
  file = tmp_path / 'mini.py'
  file.write_text(SWEEP.format(steps=20))
  words = (str(file), '--seeds=1', '--launcher=slurm', '--jobs=1')

  def ended(*more):
    result = sweep('run', *words, *more)
    assert result.returncode == 0, result.stderr
    states = lambda: [run['state'] for run in json.loads(
        sweep('status', '--json').stdout)['runs']]
    cluster.until(lambda: set(states()) <= {'done', 'failed'},
                  f'the sweep: {result.stdout}', 600, every=5)
    return states()
  # Files may grow to 60 KiB: a checkpoint cannot be written.
  assert ended("--slurm=timeout_min=10,slurm_setup=['ulimit -f 60']") == [
      'failed'] * 2
  assert ended('--slurm=timeout_min=10', '--retry') == ['done'] * 2
