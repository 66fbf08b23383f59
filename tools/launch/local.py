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

from configs.errors import RequestError
from tools import tether
from tools.launch import job as job_lib
from training.distributed import interrupts

# (kind, name, default, what it says).
FLAGS = (
    ('integer', 'processes', 2, 'How many.'),
    ('integer', 'devices', 1, 'Devices of each.'),
    ('string', 'platform', '',
     'Default: $JAX_PLATFORMS, else gpu where there is one.'),
)

PATIENCE_SECONDS = 20  # for the others to end by themselves after one failed
POLL_SECONDS = 0.05
_GPUS = 'CUDA_VISIBLE_DEVICES'


def size(args) -> tuple[int, int]:
  """Returns the number of devices, and of slices."""
  job_lib.positive(args, 'processes', 'devices')
  return args.processes * args.devices, 1


def _platform(given: str) -> str:
  given = given or os.environ.get('JAX_PLATFORMS', '')
  if given not in ('', 'cpu', 'gpu', 'cuda', 'rocm'):
    raise RequestError(f'--platform is {given!r}: choose cpu or gpu')
  if given:
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
    # processes.meet() compares it with what there is.
    own = dict(env) | {'ARCHETYPE_DEVICES': str(devices)}
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
  failures = 0
  with Forwarding() as forwarding:
    while True:
      if forwarding.stopped:  # between two runs
        return 0
      codes = run(words, environments(env, processes, devices, kind,
                                      f'127.0.0.1:{free_port()}'),
                  pathlib.Path(logs), forwarding)
      if not any(codes):
        return 0
      stopped = set(codes) <= {0, job_lib.STOPPED}
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
        tether.words(words), env=os.environ | env, stdout=out, stderr=out,
        start_new_session=True))  # so that Ctrl-C is passed on only once
    if out:
      out.close()
  forwarding.start(running)
  deadline = None
  while any(p.poll() is None for p in running):
    time.sleep(POLL_SECONDS)
    if deadline is None and any(p.poll() not in (None, 0) for p in running):
      deadline = time.monotonic() + PATIENCE_SECONDS
    if deadline and time.monotonic() > deadline:
      for process in running:
        process.kill()
  forwarding.to = []
  codes = [p.returncode for p in running]
  for i, code in enumerate(codes):
    if code not in (0, job_lib.STOPPED):
      _say(f'process {i} {_ended(code)}'
           + (f'; its output: {logs}/process-{i}.log' if i else ''))
  return codes


class Forwarding:
  """Passes the first signal on to process 0, which tells the others; a second
  one kills all. The end of the terminal is passed on as such, since process 0
  prints to it too.

  Attributes:
    to: the processes.
  """

  def __init__(self):
    self.to = []
    self._count = interrupts.Count()
    self._hung_up = False
    self._told = set()

  @property
  def stopped(self) -> bool:
    return self._count.n > 0

  def start(self, processes):
    """Passes signals on to `processes`, and what came while they started."""
    self.to = processes
    self._pass_on()

  def _heard(self, number):
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

  def __enter__(self):
    self._handled = interrupts.handled(self._heard)
    self._handled.__enter__()
    return self

  def __exit__(self, *error):
    self._handled.__exit__(*error)


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
