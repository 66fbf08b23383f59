"""A cluster of SLURM on this machine: its real daemons, two nodes on loopback.

The nodes are named by addresses of the loopback range, so that their names
resolve everywhere. Each has four cores, and two GPUs that are empty files.
"""

import os
import pathlib
import re
import shutil
import socket
import subprocess
import time

PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'scontrol')
NODES = ('127.0.0.2', '127.0.0.3')
# A job that is queued again may begin once its credential has expired, which
# by default takes two minutes: cred_expire. What is left of the job on a node
# that is there has KillWait seconds until it is killed; where the job begins
# again there before that, SLURM drains the node.
EXPIRE = 25
_CONF = '''\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={expire}
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
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2
KillWait=20
MpiDefault=none
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
'''
_NODE = ('NodeName={name} NodeHostname={host} NodeAddr={name} Port={port} '
         'CPUs=4 RealMemory=8000 Gres=gpu:2')


def missing() -> str:
  """Returns why there can be no cluster here, or ''."""
  absent = [name for name in PROGRAMS if not _path(name)]
  if absent:
    return (f'{", ".join(absent)}: not here; Debian has them as slurm-wlm and '
            'munge')
  return '' if os.getuid() == 0 else 'the daemons of SLURM want to be root'


def _path(name: str) -> str | None:
  return shutil.which(name, path=os.environ['PATH'] + ':/usr/sbin:/sbin')


def _free_port() -> int:
  with socket.socket() as sock:
    sock.bind(('', 0))
    return sock.getsockname()[1]


class Cluster:
  """The daemons, from `start` to `stop`.

  Attributes:
    folder: what they write; of a short name, since it holds a socket.
    env: the environment in which SLURM's programs find them.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.env = os.environ | {'SLURM_CONF': str(folder / 'slurm.conf')}
    self._running: dict[str, subprocess.Popen] = {}

  def start(self) -> None:
    for name in ('state', 'spool'):
      (self.folder / name).mkdir()
    key = self.folder / 'key'
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    for i in range(2):
      (self.folder / f'gpu{i}').touch()
    (self.folder / 'gres.conf').write_text(
        f'Name=gpu File={self.folder}/gpu[0-1]\n')
    host = socket.gethostname()
    nodes = '\n'.join(_NODE.format(name=name, host=host, port=_free_port())
                      for name in NODES)
    (self.folder / 'slurm.conf').write_text(_CONF.format(
        host=host, port=_free_port(), folder=self.folder, nodes=nodes,
        expire=EXPIRE))
    self._start('munged', '--foreground', '--force', *(
        f'--{what}={self.folder}/{file}' for what, file in (
            ('socket', 'munge.socket'), ('key-file', 'key'),
            ('pid-file', 'munged.pid'), ('log-file', 'munged.log'),
            ('seed-file', 'seed'))))
    self.until(lambda: (self.folder / 'munge.socket').exists(), 'munged')
    self._start('slurmctld', '-D', '-c')
    for name in NODES:
      self.start_node(name)

  def start_node(self, name: str) -> None:
    """Starts the daemon of a node, and waits until the node takes jobs."""
    self._start('slurmd', '-D', '-N', name, called=name)
    self.until(lambda: self.ask('sinfo', '-h', '-n', name, '-o', '%T').split()
               [:1] in (['idle'], ['mixed'], ['allocated']), f'node {name}')

  def stop(self) -> None:
    self.ask('scancel', '--user=root')
    for daemon in reversed(self._running.values()):
      daemon.terminate()
      daemon.wait(30)

  def ask(self, *words: str) -> str:
    """Returns what one of SLURM's programs prints."""
    return subprocess.run(words, env=self.env, capture_output=True, text=True,
                          check=False, timeout=60).stdout

  def state(self, job: str) -> str:
    """Returns the state of a job, as 'PENDING', or '' once it is gone."""
    found = re.search(r'JobState=(\w+)',
                      self.ask('scontrol', 'show', 'job', job))
    return found[1] if found else ''

  def until(self, holds, what: str, seconds: float = 300,
            every: float = 0.5) -> None:
    """Waits until holds() is true, and asks again after `every` seconds.

    Raises:
      TimeoutError: with the end of each log, where it is not by then.
    """
    end = time.monotonic() + seconds
    while not holds():
      if time.monotonic() > end:
        logs = '\n'.join(f'{path.name}: {path.read_text()[-1000:]}'
                         for path in self.folder.glob('*.log'))
        raise TimeoutError(f'{what} after {seconds} s\n{logs}')
      time.sleep(every)

  def _start(self, program: str, *words: str, called: str = '') -> None:
    with open(self.folder / f'{called or program}.out', 'ab') as file:
      self._running[called or program] = subprocess.Popen(
          [_path(program), *words], env=self.env, stdout=file, stderr=file)

  def pid_of(self, task: str) -> int:
    """Returns the process of a run that is this task of its step."""
    for path in pathlib.Path('/proc').glob('[0-9]*'):
      try:
        environ = (path / 'environ').read_bytes().split(b'\0')
        command = (path / 'cmdline').read_bytes().split(b'\0')
      except OSError:
        continue
      if f'SLURM_PROCID={task}'.encode() in environ and b'train.py' in command:
        return int(path.name)
    raise LookupError(f'no process of task {task}')
