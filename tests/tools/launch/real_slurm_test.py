"""A run on a real SLURM, of two nodes on this machine: no part of it is a
stand-in. Only with `-m slurm`, as `make slurm-test` does.

The nodes are named by addresses of the loopback range, so that their names
resolve everywhere.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from tools.launch import local

PATH = os.environ['PATH'] + ':/usr/sbin:/sbin'
MISSING = [name for name in (
    'munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'scontrol')
           if not shutil.which(name, path=PATH)]
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(
    bool(MISSING) or os.getuid() != 0, reason=f'{MISSING} are not here (Debian '
    'has them as slurm-wlm and munge), or this is not root')]

ROOT = pathlib.Path(__file__).parents[3]
NODES = ('127.0.0.2', '127.0.0.3')
# A job that is queued again may begin once its credential has expired, which
# by default takes two minutes: cred_expire. What is left of the job on a node
# that is there has KillWait seconds until it is killed; where the job begins
# again there before that, SLURM drains the node.
CONF = '''\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=25
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdLogFile={folder}/%n.log
SlurmctldLogFile={folder}/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2
KillWait=20
MpiDefault=none
{nodes}
PartitionName=all Nodes=ALL Default=YES
'''
# What each process runs first: this Python, one device each.
SETUP = (f'export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH '
         'JAX_PLATFORMS=cpu XLA_FLAGS=')
STEPS = 40
WORDS = ('--config=configs/gpt.py:tiny', '--config.model.d_model=32',
         '--config.model.num_layers=1', '--config.model.num_heads=2',
         '--config.model.max_len=32', '--config.data.length=32',
         '--config.data.batch_size=8', '--config.eval.every_steps=0',
         '--config.eval.batches=1', '--config.log.every_steps=1',
         f'--config.train.steps={STEPS}')


def until(holds, what, seconds=300):
  """Waits until holds() is true; `what` says what is waited for."""
  end = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < end, what()
    time.sleep(0.5)


@pytest.fixture(name='env')
def _env():
  """Starts the daemons; returns the environment in which SLURM's programs find
  them."""
  # A socket's path has at most 107 characters.
  folder = pathlib.Path(tempfile.mkdtemp(prefix='slurm-', dir='/tmp'))
  env = os.environ | {'SLURM_CONF': str(folder / 'slurm.conf')}
  for name in ('state', 'spool'):
    (folder / name).mkdir()
  (folder / 'key').touch(0o600)
  (folder / 'key').write_bytes(os.urandom(1024))
  host = socket.gethostname()
  (folder / 'slurm.conf').write_text(CONF.format(
      host=host, port=local.free_port(), folder=folder, nodes='\n'.join(
          f'NodeName={name} NodeHostname={host} NodeAddr={name} '
          f'Port={local.free_port()} CPUs=4 RealMemory=8000'
          for name in NODES)))
  running = []

  def start(program, *words):
    with open(folder / f'{program}.out', 'ab') as file:
      running.append(subprocess.Popen(
          [shutil.which(program, path=PATH), *words], env=env, stdout=file,
          stderr=file))

  logs = lambda: '\n'.join(path.read_text()[-1000:]
                           for path in folder.glob('*.log'))
  try:
    start('munged', '--foreground', '--force', *(
        f'--{what}={folder}/{file}' for what, file in (
            ('socket', 'munge.socket'), ('key-file', 'key'),
            ('pid-file', 'munged.pid'), ('log-file', 'munged.log'),
            ('seed-file', 'seed'))))
    until((folder / 'munge.socket').exists, logs)
    start('slurmctld', '-D', '-c')
    for name in NODES:
      start('slurmd', '-D', '-N', name)
    until(lambda: subprocess.run(
        ['sinfo', '-h', '-N', '-o', '%T'], env=env, capture_output=True,
        text=True).stdout.split() == ['idle'] * 2, logs)
    yield env
  finally:
    subprocess.run(['scancel', '--user=root'], env=env)
    for daemon in reversed(running):
      daemon.terminate()
      daemon.wait(30)
    shutil.rmtree(folder)


def losses(workdir):
  rows = map(json.loads, (workdir / 'metrics.jsonl').open())
  return {row['step']: row['loss'] for row in rows if 'loss' in row}


def process_of(task):
  """Returns the number of the process that is this task of a job's step."""
  for path in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      environ = (path / 'environ').read_bytes().split(b'\0')
      command = (path / 'cmdline').read_bytes().split(b'\0')
    except OSError:
      continue
    if f'SLURM_PROCID={task}'.encode() in environ and b'train.py' in command:
      return int(path.name)
  raise LookupError(f'no process of task {task}')


def test_two_nodes_train_as_one_process_though_one_is_lost(env, tmp_path):
  """A process is killed: the other one ends within a minute, the job is queued
  again, and goes on from its checkpoint to the end."""
  alone, workdir = tmp_path / 'alone', tmp_path / 'a run'
  subprocess.run(['bash', '-c', f'{SETUP}; exec "$@"', 'run', sys.executable,
                  'train.py', f'--workdir={alone}', *WORDS],
                 cwd=ROOT, check=True, capture_output=True)
  result = subprocess.run(
      [sys.executable, '-m', 'tools.launch', 'slurm', '--nodes=2', '--gpus=0',
       f'--setup={SETUP}', '--sbatch=--time=10', f'--workdir={workdir}', *WORDS,
       '--config.mesh.data=2', '--config.checkpoint.every_steps=2'],
      cwd=ROOT, env=env, capture_output=True, text=True)
  assert re.search(r'job \d+;', result.stdout), result.stderr

  def log(name='process-0.log'):
    path = workdir / 'logs' / name
    return path.read_text() if path.exists() else ''

  def printed(pattern, name='process-0.log', seconds=600):
    until(lambda: re.search(pattern, log(name)), lambda: (
        f'{pattern!r} in {name}: {log()[-3000:]}\n{log("job.log")}'), seconds)

  printed('devices: 2 of the kind cpu')
  printed('step 5/')
  killed = time.monotonic()
  os.kill(process_of('1'), signal.SIGKILL)
  printed('failed with exit code .*: queued again', 'job.log', 90)
  assert time.monotonic() - killed < 70
  assert 'task 1: Killed' in log('job.log')
  printed('(?m)^complete$', 'job.log')
  assert 'going on from step' in log()
  assert losses(workdir).keys() == losses(alone).keys() == set(
      range(1, STEPS + 1))
  assert losses(workdir) == pytest.approx(losses(alone), abs=2e-5)
