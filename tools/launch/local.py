r"""Starts a run as several processes on this machine.

  python -m tools.launch local --processes=2 --devices=2 --platform=cpu \
      --config configs/gpt.py --workdir runs/a --config.mesh.fsdp=2

On a CPU each process has --devices virtual devices; on GPUs, process i has the
GPUs i x devices to (i + 1) x devices - 1, of those that CUDA_VISIBLE_DEVICES
names if it is set. Process 0 writes here, the others to WORKDIR/logs. Ctrl-C,
SIGTERM or the end of the terminal: all finish the step, save and leave, and the
exit code is 0; once more ends them at once. Where this program is killed
(SIGKILL), so are they, on Linux.
"""

import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time

from tools import dies_with_parent
from tools.launch import job as job_lib
from training.distributed import signals

# (kind, name, default, what it says, bounds).
FLAGS = (
    ('integer', 'processes', 2, 'How many.', 1),
    ('integer', 'devices', 1, 'Devices of each.', 1),
    ('enum', 'platform', '', ('', 'cpu', 'gpu'),
     'Default: $JAX_PLATFORMS, else gpu where there is one.'),
)

PATIENCE_SECONDS = 10  # for the others to end by themselves after one failed
POLL_SECONDS = 0.05
_GPUS = 'CUDA_VISIBLE_DEVICES'


def size(args) -> int:
  """Returns the number of devices."""
  return args.processes * args.devices


def _platform(given: str) -> str:
  if given := given or os.environ.get('JAX_PLATFORMS', ''):
    return 'cpu' if given == 'cpu' else 'gpu'
  return 'gpu' if os.path.exists('/dev/nvidia0') else 'cpu'


def launch(job: job_lib.Job, args) -> int:
  job_lib.require_here(job)
  kind = _platform(args.platform)
  words = [sys.executable, *job.words[1:]]
  if job.dry_run:
    for env in environments(job.env, args.processes, args.devices, kind,
                            '127.0.0.1:PORT'):
      print(shlex.join([f'{k}={v}' for k, v in env.items()] + words))
    return 0
  return supervise(words, job.env, args.processes, args.devices, kind,
                   job.logs, job.max_restarts)


def environments(env, processes: int, devices: int, kind: str,
                 coordinator: str) -> list[dict[str, str]]:
  """Returns what is added to the environment of each process."""
  result = []
  for i in range(processes):
    own = dict(env)
    if processes > 1:
      own |= {'JAX_COORDINATOR_ADDRESS': coordinator,
              'JAX_NUM_PROCESSES': str(processes), 'JAX_PROCESS_ID': str(i)}
    if kind == 'cpu':
      count = f'--xla_force_host_platform_device_count={devices}'
      own |= {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join(
          [*_other_flags(os.environ.get('XLA_FLAGS', '')), count])}
    elif processes > 1:
      own['JAX_LOCAL_DEVICE_IDS'] = ','.join(
          str(i * devices + k) for k in range(devices))
    else:  # JAX reads that only where it joins several
      own[_GPUS] = _first_gpus(devices, own.get(_GPUS, os.environ.get(_GPUS)))
    result.append(own)
  return result


def _first_gpus(count: int, visible: str | None) -> str:
  gpus = map(str, range(count)) if visible is None else visible.split(',')
  return ','.join(list(gpus)[:count])


def _other_flags(text: str) -> list[str]:
  return [flag for flag in text.split()
          if not flag.startswith('--xla_force_host_platform_device_count')]


def supervise(words: list[str], env: dict[str, str], processes: int,
              devices: int, kind: str, logs: str, max_restarts: int) -> int:
  """Runs the processes, again where they were preempted or failed.

  Returns:
    0: complete, or stopped by a signal to this process; 2: a wrong request, or
    a loss that was not finite: it would end so again; 1: failed once more than
    max_restarts.
  """
  failures, forwarding = 0, Forwarding()
  with signals.handled(forwarding.heard):
    while True:
      if forwarding.stopped:  # between two runs
        return 0
      codes = run(words, environments(env, processes, devices, kind,
                                      f'127.0.0.1:{free_port()}'),
                  pathlib.Path(logs), forwarding)
      if not any(codes):
        return 0
      stopped = set(codes) <= {0, job_lib.STOPPED, -signal.SIGTERM}
      if forwarding.stopped:
        return 0 if stopped else 1
      if 2 in codes:
        return 2
      if stopped:
        _say('stopped before the last step: starting it again')
        continue
      failures += 1
      if failures > max_restarts:
        _say(f'failed {failures} times (--max_restarts={max_restarts}): '
             'giving up')
        return 1
      _say(f'failed: starting it again, {failures} of {max_restarts}')


def run(words, envs, logs: pathlib.Path, forwarding) -> list[int]:
  """Runs the processes once; returns their exit codes."""
  logs.mkdir(parents=True, exist_ok=True)
  running = []
  for i, env in enumerate(envs):
    out = None if i == 0 else open(logs / f'process-{i}.log', 'ab')
    running.append(subprocess.Popen(
        dies_with_parent.words(words), env=os.environ | env, stdout=out,
        stderr=out,
        start_new_session=True))  # so that Ctrl-C is passed on only once
    if out:
      out.close()
  forwarding.start(running)
  left, failed, deadline = running, set(), None
  while left:
    time.sleep(POLL_SECONDS)
    left = [process for process in running if process.poll() is None]
    for i, process in enumerate(running):
      code = process.returncode
      if code not in (None, 0, job_lib.STOPPED) and i not in failed:
        failed.add(i)
        deadline = deadline or time.monotonic() + PATIENCE_SECONDS
        _say(f'process {i} {_ended(code)}'
             + (f'; its output: {logs}/process-{i}.log' if i else ''))
      elif code is None and deadline and time.monotonic() > deadline:
        failed.add(i)
        process.kill()
        _say(f'process {i} did not end by itself then, and was killed')
  forwarding.to = []
  return [process.returncode for process in running]


class Forwarding:
  """Passes the first signal on to process 0, which tells the others; a second
  one kills all. The end of the terminal is passed on as such, since process 0
  prints to it too.

  Attributes:
    to: the processes.
  """

  def __init__(self):
    self.to = []
    self._count = signals.Count()
    self._hung_up = False
    self._told = set()

  @property
  def stopped(self) -> bool:
    return self._count.n > 0

  def start(self, processes):
    """Passes signals on to `processes`, and what came while they started."""
    self.to = processes
    self._pass_on()

  def heard(self, number):
    self._count.add(number)
    self._hung_up |= number == signal.SIGHUP
    self._pass_on()

  def _pass_on(self):
    if self._count.n > 1:
      for process in self.to:
        process.kill()
    elif self.stopped and self.to:
      number = signal.SIGHUP if self._hung_up else signal.SIGTERM
      if number not in self._told:
        self._told.add(number)
        self.to[0].send_signal(number)


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def _ended(code: int) -> str:
  if code < 0:
    return f'was killed by {signal.Signals(-code).name}'
  return f'ended with exit code {code}'


def _say(text: str):
  print(f'launch: {text}', file=sys.stderr, flush=True)
